"""``evomoe report``: what the experts of checkpoints do with text, measured, drawn, and on one page.

``sample`` holds what was seen, ``reading`` sees it; what is measured of it is pure (``loads``, ``lift``,
``passages``, ``explained``, ``together``, ``history``, ``curves``), ``measure`` puts it together, ``figures``
and ``page`` show it.

Shape suffixes: T rows (tokens that were routed; sub-tokens with several heads), N pairs of a row and an
expert, E experts, V values (entries of the dictionary, words), G groups, B bins.
"""

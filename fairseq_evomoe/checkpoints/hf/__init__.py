"""Models out of fairseq: folders that transformers loads, plain weights, and the way back.

``modeling_evomoe.py``, ``configuration_evomoe.py`` and ``tokenization_evomoe.py`` run where there is neither
fairseq nor this package; they are copied into each folder, together with the files of ``moe/`` that they
import.
"""

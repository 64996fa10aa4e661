"""fairseq_evomoe: Mixture-of-Experts models for fairseq that spawn experts out of one while they train.

Importing the package registers its models and criterions with fairseq and teaches fairseq's Trainer
to spawn experts; nothing else happens.  Where fairseq is not installed, ``fairseq_evomoe.moe`` is still
usable as a plain PyTorch library.
"""

from importlib.util import find_spec as _find_spec

from . import evolution  # noqa: F401  (tells moe how experts spawn)

__version__ = "0.2.0"

if _find_spec("fairseq") is not None:
    from . import compat

    compat.apply()

    from . import criterions, models  # noqa: F401  (registers with fairseq)
    from .training import hooks

    hooks.install()

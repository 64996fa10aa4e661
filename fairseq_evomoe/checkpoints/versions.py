"""With which versions a checkpoint was saved."""

import platform
from typing import Any, Dict, Mapping

import fairseq
import numpy
import torch

from .. import __version__

KEY = "moe_versions"
"""Of the versions, in what a checkpoint has beside model and optimizer."""


def here() -> Dict[str, str]:
    """The versions of what is installed here."""
    return {
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "fairseq": str(fairseq.__version__),
        "numpy": str(numpy.__version__),
        "fairseq_evomoe": __version__,
    }


def saved_in(state: Mapping[str, Any]) -> Dict[str, str]:
    """Those that a checkpoint was saved with; nothing, in one that does not say it."""
    return dict((state.get("extra_state") or {}).get(KEY) or {})

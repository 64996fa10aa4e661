"""The parts of the page, one file each: ``make`` returns HTML, or nothing if there is nothing to show."""

from typing import Any, Callable, Dict, Tuple

from ..figures import Pictures
from . import experts, history, layers, specialisation, together, trace, training
from .overview import overview
from .side_by_side import side_by_side

__all__ = ["SECTIONS", "overview", "side_by_side"]

Make = Callable[[Dict[str, Any], str, Pictures, str], str]

SECTIONS: Dict[str, Tuple[str, Make]] = {
    "layers": ("Layers", layers.make),
    "experts": ("What experts see", experts.make),
    "specialisation": ("Specialisation", specialisation.make),
    "together": ("Together", together.make),
    "history": ("Over the run", history.make),
    "trace": ("While training", trace.make),
    "training": ("Training", training.make),
}
"""Those of one run, in their order: title and what makes them."""

"""The mathematics of Mixture-of-Experts layers in plain PyTorch: nothing here knows fairseq."""

from .experts import Experts, Hidden
from .layer import MoELayer
from .recorder import record
from .routers import ROUTERS, Router
from .routing import Routing, RoutingContext, Vocabulary

__all__ = [
    "ROUTERS",
    "Experts",
    "Hidden",
    "MoELayer",
    "Router",
    "Routing",
    "RoutingContext",
    "Vocabulary",
    "record",
]

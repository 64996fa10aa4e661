"""Routers by name: one file for each published router; see ``router.Router`` for what one must have."""

from typing import Dict, Type

from .base import BaseRouter
from .comet import CometRouter
from .dts import DenseToSparseRouter
from .dynmoe import DynMoERouter
from .hash import HashRouter
from .laplace import LaplaceRouter
from .recurrent import RecurrentRouter
from .router import Router
from .soft import SoftRouter
from .stable import StableRouter
from .switch import SwitchRouter
from .top_p import TopPRouter
from .topk import TopKRouter

ROUTERS: Dict[str, Type[Router]] = {
    "dts": DenseToSparseRouter,
    "switch": SwitchRouter,
    "topk": TopKRouter,
    "base": BaseRouter,
    "hash": HashRouter,
    "stable": StableRouter,
    "comet": CometRouter,
    "dynmoe": DynMoERouter,
    "laplace": LaplaceRouter,
    "recurrent": RecurrentRouter,
    "soft": SoftRouter,
    "top-p": TopPRouter,
}

__all__ = ["ROUTERS", "DenseToSparseRouter", "Router"]

"""Routers by name: one file for each published router; see ``router.Router`` for what one must have."""

# the order is that of the options in --help
from .base import BaseRouter
from .comet import CometRouter
from .default_moe import DefaultMoERouter
from .dtop_p import SteeredTopPRouter
from .dts import DenseToSparseRouter
from .dynmoe import DynMoERouter
from .expert_choice import ExpertChoiceRouter
from .expert_threshold import ExpertThresholdRouter
from .hash import HashRouter
from .laplace import LaplaceRouter
from .recurrent import RecurrentRouter
from .registry import ROUTERS, register_router
from .remoe import ReLURouter
from .router import Router
from .soft import SoftRouter
from .stable import StableRouter
from .stratified import StratifiedRouter
from .switch import SwitchRouter
from .top_p import TopPRouter
from .topk import TopKRouter
from .xmoe import CosineRouter

__all__ = [
    "ROUTERS",
    "BaseRouter",
    "CometRouter",
    "CosineRouter",
    "DefaultMoERouter",
    "DenseToSparseRouter",
    "DynMoERouter",
    "ExpertChoiceRouter",
    "ExpertThresholdRouter",
    "HashRouter",
    "LaplaceRouter",
    "ReLURouter",
    "RecurrentRouter",
    "Router",
    "SoftRouter",
    "StableRouter",
    "SteeredTopPRouter",
    "StratifiedRouter",
    "SwitchRouter",
    "TopKRouter",
    "TopPRouter",
    "register_router",
]

"""Routers by name: one file for each published router.

A router is a module with ``forward(x_TD, context) -> Routing`` that is built as
``Router(dim, experts, **options)`` and has ``initialize(generator)``.
"""

from typing import Dict, Type

from .base import Router
from .dts import DenseToSparseRouter

ROUTERS: Dict[str, Type[Router]] = {
    "dts": DenseToSparseRouter,
}

__all__ = ["ROUTERS", "DenseToSparseRouter", "Router"]

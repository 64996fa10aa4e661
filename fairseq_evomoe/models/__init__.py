"""The registered models: fairseq's own, with Mixture-of-Experts layers in place of feed-forward ones."""

from ..moe.routers.registry import on_register
from . import causal_lm, masked_lm, translation  # noqa: F401  (registers with fairseq)
from .registration import refresh_options

on_register(refresh_options)

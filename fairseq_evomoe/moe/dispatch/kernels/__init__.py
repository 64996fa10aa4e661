"""Triton kernels around the experts' products: sort pairs, add biases and activate, weigh and add up.

What a grouped product cannot do by itself, in as few launches and passes over the memory as there can be.  No
sum depends on the order in which a GPU's threads run, so that results are the same on every run.  Where
Triton or the GPU is missing, `usable` says so, and `local.py` goes another way.

Suffixes: see ``routing.py``; besides, M hidden units of one expert (all have as many), ``_S`` of what is
sorted by expert, ``_P`` of parts into which the rows of each expert are cut.
"""

from .activation import ACTIVATIONS, activate, activate_backward
from .few import few_pairs
from .launch import triton, usable
from .pairs import Pairs, sort_pairs
from .sums import add_up, spread, sum_of_parts, sums_of_rows

__all__ = [
    "ACTIVATIONS",
    "Pairs",
    "activate",
    "activate_backward",
    "add_up",
    "few_pairs",
    "sort_pairs",
    "spread",
    "sum_of_parts",
    "sums_of_rows",
    "triton",
    "usable",
]

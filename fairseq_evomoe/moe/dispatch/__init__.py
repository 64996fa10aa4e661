"""How tokens get to their experts and the outputs back: on this device, or to other ranks."""

from .local import dispatch, grouped_experts, outputs, sum_of_outputs

__all__ = ["dispatch", "grouped_experts", "outputs", "sum_of_outputs"]

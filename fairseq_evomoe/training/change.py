"""A change of a layer's experts."""

from typing import Callable, NamedTuple

from ..moe import MoELayer
from ..moe.plan import Plan


class Change(NamedTuple):
    """What becomes of a layer's experts.

    Attributes:
        plan: how new experts come from old ones.
        carry_out: does it to the layer, or to a copy of it.
    """

    plan: Plan
    carry_out: Callable[[MoELayer], None]

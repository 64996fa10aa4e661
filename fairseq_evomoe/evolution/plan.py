"""Where ``moe.plan`` was in version 0.1; it goes with the next one."""

from ..moe.plan import Inherit, Origin, Plan, check_linear_gate, resize_plan

__all__ = ["Inherit", "Origin", "Plan", "check_linear_gate", "resize_plan"]

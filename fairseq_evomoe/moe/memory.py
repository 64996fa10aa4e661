"""Where ``dispatch.memory`` was in version 0.1; it goes with the next one."""

from .dispatch.memory import empty, release

__all__ = ["empty", "release"]

"""How one expert becomes many, and when."""

from ..moe.plan import register_spawner
from .spawn import Spawn

register_spawner(Spawn)

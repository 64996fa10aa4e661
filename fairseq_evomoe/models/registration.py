"""Options of routers that are registered after our models, such as those of another ``--user-dir``."""

from dataclasses import Field, fields, make_dataclass
from typing import Any, Optional, Type

from fairseq.models import MODEL_DATACLASS_REGISTRY, MODEL_REGISTRY
from hydra.core.config_store import ConfigStore

from ..config.config import routers_with
from ..config.errors import PREFIX
from ..config.options import flat_fields
from .feed_forward import MoEModel


def options_of(model: Type[Any]) -> Type[Any]:
    """The dataclass of a registered model's options, as it is now."""
    return getattr(model, "__dataclass")


def refresh_options() -> None:
    """Let our models have the options of all routers that are registered now.

    fairseq makes flags and Hydra's schema from a model's dataclass, which it takes when the model is
    registered; here both get a dataclass with the new options in its place.
    """
    for name, model in list(MODEL_REGISTRY.items()):
        if not issubclass(model, MoEModel) or name not in MODEL_DATACLASS_REGISTRY:
            continue
        old = MODEL_DATACLASS_REGISTRY[name]
        new = _extended(old)
        if new is old:
            continue
        setattr(model, "__dataclass", new)
        MODEL_DATACLASS_REGISTRY[name] = new
        node = new()
        node._name = name
        ConfigStore.instance().store(name=name, group="model", node=node, provider="fairseq")


def _extended(old: Type[Any]) -> Type[Any]:
    known = {field.name: field for field in fields(old)}
    of_routers = [item for item in flat_fields() if _is_of_routers(item[0])]
    new = [(name, kind, field) for name, kind, field in of_routers if _differs(known.get(name), kind, field)]
    if not new:
        return old
    made = make_dataclass(old.__name__, new, bases=(old,))
    made.__module__, made.__doc__ = old.__module__, old.__doc__
    return made


def _is_of_routers(name: str) -> bool:
    """Whether a flat option may change when a router is registered; models have some others their own way."""
    short = name[len(PREFIX) :] if name.startswith(PREFIX) else ""
    return short == "router" or bool(routers_with(short))


def _differs(old: Optional["Field[Any]"], kind: Any, field: "Field[Any]") -> bool:
    return old is None or _words(old.type) != _words(kind) or old.metadata != field.metadata


def _words(kind: Any) -> Any:
    """The choices that a type of an option has; ``None`` if it has none."""
    (kind,) = getattr(kind, "__args__", (kind, None))[:1]
    return [member.value for member in kind] if hasattr(kind, "__members__") else None

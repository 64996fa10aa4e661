"""Routers by name, in this package and in anybody else's."""

from typing import TYPE_CHECKING, Callable, Dict, List, Type, TypeVar, Union

from ..options import OptionError

if TYPE_CHECKING:
    from .router import Router

ROUTERS: Dict[str, Type["Router"]] = {}

_listeners: List[Callable[[], None]] = []

_R = TypeVar("_R", bound=Type["Router"])


def register_router(name: str) -> Callable[[_R], _R]:
    """Give a class of routers the name by which the option ``router`` and ``MoELayer`` know it.

    Registering a name again replaces its class, so that a module may be imported twice.

    Args:
        name: lower case.
    """

    def register(cls: _R) -> _R:
        ROUTERS[name] = cls
        for listener in _listeners:
            listener()
        return cls

    return register


def find_router(router: Union[str, Type["Router"]]) -> Type["Router"]:
    """A class of routers by its name, or itself.

    Raises:
        OptionError: there is none of that name.
    """
    if not isinstance(router, str):
        return router
    if router not in ROUTERS:
        raise OptionError(
            "router", f"There is no `router` {router}: choose one of {', '.join(sorted(ROUTERS))}."
        )
    return ROUTERS[router]


def on_register(listener: Callable[[], None]) -> None:
    """Have something called after each router that is registered from now on."""
    _listeners.append(listener)


def name_of(cls: Type["Router"]) -> str:
    """The name of a class of routers; the class's own if it is not registered."""
    return next((name for name, known in ROUTERS.items() if known is cls), cls.__name__)

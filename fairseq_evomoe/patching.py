"""The one way in which this package replaces a function of somebody else, say one of fairseq's Trainer.

What stands in is a function that is given the original first, and then what that would be given::

    patches = Patches()

    @patches.replaces(Trainer, "train_step")
    def train_step(original, trainer, samples, raise_oom=False):
        \"\"\"Experts spawn before an update.\"\"\"
        ...
        return original(trainer, samples, raise_oom)

    patches.apply()

Nothing is replaced twice by the same function, be it that ``apply`` is called again or that a second copy of
this package is imported: what stands in carries the name of the function that it stands for, and those that
it has found there, as an attribute.  ``functools.wraps`` hands the attribute on to whatever others put
around it.  ``applied`` tells what was replaced, and why.
"""

import functools
import inspect
from types import ModuleType
from typing import Any, Callable, Dict, List, NamedTuple, Optional, Tuple, TypeVar

_Function = TypeVar("_Function", bound=Callable[..., Any])
_Condition = Callable[[Any], bool]

_MARK = "_evomoe_replacements"


class Replacement(NamedTuple):
    """Something that was replaced.

    Attributes:
        where: what: its module, class and name.
        name: the function that stands in for it, with its module in this package.
        why: the first sentence of that function's docstring.
    """

    where: str
    name: str
    why: str


_applied: Dict[Tuple[str, str], Replacement] = {}


def applied() -> List[Replacement]:
    """What is replaced, in the order in which it was; something that is replaced twice is there twice."""
    return list(_applied.values())


class Patches:
    """Replacements that are declared beside what they do, and carried out together."""

    def __init__(self) -> None:
        self._steps: List[Tuple[Any, str, Callable[..., Any], Optional[_Condition]]] = []

    def replaces(
        self, owner: Any, name: str, when: Optional[_Condition] = None
    ) -> Callable[[_Function], _Function]:
        """Declare that the decorated function stands in for something; see ``wrap`` for the arguments."""

        def declare(function: _Function) -> _Function:
            self._steps.append((owner, name, function, when))
            return function

        return declare

    def apply(self) -> None:
        """Replace everything that is declared and not replaced yet."""
        for step in self._steps:
            wrap(*step)


def wrap(owner: Any, name: str, function: Callable[..., Any], when: Optional[_Condition] = None) -> None:
    """Let ``function(original, ...)`` stand in for ``owner.name(...)``, unless it does so already.

    Args:
        owner: a module, a class or an object; of an object the method is replaced for it alone, and neither
            the original nor the function is given the object itself.
        name: of a function, class, method or property in it; of a property what reads it is replaced, and a
            static method stays one.
        function: what is called instead, with the original and the arguments of the call.
        when: told the original, whether it is to be replaced: whether it has the fault that is to be mended.

    Raises:
        AttributeError: the owner has nothing of that name.
    """
    found = _attribute(owner, name)
    original: Any = found.fget if isinstance(found, property) else found
    if isinstance(found, staticmethod):
        original = found.__func__
    if _is_marked(original, function):
        _note(owner, name, function)
        return
    if when is not None and not when(original):
        return
    # a class has its whole dictionary of methods, which a function has no use for
    updated = () if isinstance(original, type) else functools.WRAPPER_UPDATES

    @functools.wraps(original, updated=updated)
    def replacement(*args: Any, **kwargs: Any) -> Any:
        return function(original, *args, **kwargs)

    _mark(replacement, original, function)
    _note(owner, name, function)
    if isinstance(found, property):
        setattr(owner, name, property(replacement, found.fset, found.fdel, found.__doc__))
    elif isinstance(found, staticmethod):
        setattr(owner, name, staticmethod(replacement))
    else:
        setattr(owner, name, replacement)


def put(owner: Any, name: str, make: Callable[[], Any]) -> None:
    """Let ``make()`` stand in for the value ``owner.name``, unless one that it has made does so already.

    Args:
        owner: a module, a class or an object.
        name: of what is replaced in it.
        make: makes the new value, an object that takes an attribute more.
    """
    original = _attribute(owner, name)
    if not _is_marked(original, make):
        value = make()
        _mark(value, original, make)
        setattr(owner, name, value)
    _note(owner, name, make)


def _attribute(owner: Any, name: str) -> Any:
    # a class's own property, and not what it would give
    return inspect.getattr_static(owner, name) if isinstance(owner, type) else getattr(owner, name)


def _is_marked(value: Any, function: Callable[..., Any]) -> bool:
    return _name(function) in getattr(value, _MARK, ())


def _mark(value: Any, original: Any, function: Callable[..., Any]) -> None:
    setattr(value, _MARK, (*getattr(original, _MARK, ()), _name(function)))


def _name(function: Callable[..., Any]) -> str:
    # in a second copy of the package, which may have another name, it is the same
    return f"{function.__module__.rpartition('.')[2]}.{function.__qualname__}"


def _note(owner: Any, name: str, function: Callable[..., Any]) -> None:
    if isinstance(owner, ModuleType):
        where = f"{owner.__name__}.{name}"
    elif isinstance(owner, type):
        where = f"{owner.__module__}.{owner.__qualname__}.{name}"
    else:
        where = f"{type(owner).__module__}.{type(owner).__qualname__}.{name} of one object"
    summary = (inspect.getdoc(function) or "").partition("\n")[0]
    _applied[where, _name(function)] = Replacement(where, _name(function), summary)

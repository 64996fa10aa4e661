"""Options that say what they are: default, range and help stand once, beside what they configure.

A class with options nests a dataclass of them::

    class SwitchRouter(LinearRouter):
        @dataclass(frozen=True)
        class Options(LinearRouter.Options):
            jitter: float = option(0.01, "While training, the gate's input is ...", at_least=0, below=1)

Constructors, command-line flags, YAML and the documentation's table all read these declarations.  Whoever
makes an instance gets values of the declared types within the declared ranges, or an ``OptionError``.
"""

import math
from dataclasses import Field, dataclass, field, fields
from enum import Enum
from typing import Any, Dict, Iterator, Optional, Sequence, Tuple, Type, TypeVar, Union, get_type_hints

_META = "evomoe"

_O = TypeVar("_O", bound="Options")


class OptionError(ValueError):
    """An option has a value that it cannot have.

    Attributes:
        option: its name, without a prefix.

    Args:
        option: see above.
        text: one sentence that says what is wrong and what to do.  Names of options are in backticks, so
            that a command line can print its flags instead.
    """

    def __init__(self, option: str, text: str) -> None:
        super().__init__(text)
        self.option = option


@dataclass(frozen=True)
class Range:
    """The numbers that an option may have; ``None``: no limit on that side."""

    at_least: Optional[float] = None
    above: Optional[float] = None
    at_most: Optional[float] = None
    below: Optional[float] = None

    def holds(self, value: float) -> bool:
        """Whether a finite value is within."""
        return not (
            (self.at_least is not None and value < self.at_least)
            or (self.above is not None and value <= self.above)
            or (self.at_most is not None and value > self.at_most)
            or (self.below is not None and value >= self.below)
        )

    def __str__(self) -> str:
        parts = []
        for words, limit in (
            ("at least", self.at_least),
            ("greater than", self.above),
            ("at most", self.at_most),
            ("less than", self.below),
        ):
            if limit is not None:
                parts.append(f"{words} {limit:g}")
        return " and ".join(parts)


@dataclass(frozen=True)
class Declaration:
    """What is known of an option before it has a value.

    Attributes:
        name: without a prefix.
        type: ``int``, ``float``, ``bool``, ``str`` or an enumeration.
        default: its value if none is given; ``None``: decided by the other options.
        help: what it is, in a sentence.
        range: what a number may be.
        choices: the words that are accepted; empty if any are.
        duration: whether it counts updates, so that ``10%`` of all updates is a value, too.
        words: words that a number, or a duration, may be instead.
        stages: whether it may be a list of moments with numbers of experts, such as ``5%:4,15%:16``.
        loss: whether it is the weight of an auxiliary loss.
    """

    name: str
    type: type
    default: Any
    help: str
    range: Range = Range()
    choices: Tuple[str, ...] = ()
    duration: bool = False
    words: Tuple[str, ...] = ()
    stages: bool = False
    loss: bool = False

    def convert(self, value: Any) -> Any:
        """A value as one of the declared type; ``None`` stays.

        Raises:
            OptionError: it is none, or out of range.
        """
        if value is None:
            return None
        if self.choices:
            return self._choice(value)
        if isinstance(value, str) and (value in self.words or (self.stages and ":" in value)):
            return value
        if self.type is bool:
            return self._boolean(value)
        if self.type in (int, float):
            return self._number(value)
        return str(value)

    def _choice(self, value: Any) -> Any:
        word = value.value if isinstance(value, Enum) else str(value)
        if word not in self.choices:
            raise OptionError(
                self.name, f"`{self.name}` must be one of {', '.join(self.choices)}, but is {word!r}."
            )
        return self.type(word) if issubclass(self.type, Enum) else word

    def _boolean(self, value: Any) -> bool:
        truth = {"true": True, "false": False}.get(str(value).lower())
        if truth is None:
            raise OptionError(self.name, f"`{self.name}` must be true or false, but is {value!r}.")
        return truth

    def _number(self, value: Any) -> Union[int, float]:
        number = _as_number(value, self.type)
        limits = str(self.range)
        if number is None or not math.isfinite(number):
            kind = "a whole number" if self.type is int else "a finite number"
            if self.duration:
                kind += " of updates or a percentage of all updates, such as 10%,"
            expected = f"{kind} {limits}".rstrip(" ,")
        elif not self.range.holds(number):
            expected = limits
        else:
            return number
        words = "".join(f", or {word}" for word in self.words)
        words += ", or stages such as 5%:4,15%:16" * self.stages
        raise OptionError(self.name, f"`{self.name}` must be {expected}{words}, but is {value}.")


def _as_number(value: Any, kind: type) -> Optional[Union[int, float]]:
    if isinstance(value, bool):
        return None
    try:
        number = float(value)
    except (TypeError, ValueError):
        return None
    if kind is float or not math.isfinite(number):
        return number
    return int(number) if number == int(number) else None


def option(
    default: Any,
    help: str,
    *,
    at_least: Optional[float] = None,
    above: Optional[float] = None,
    at_most: Optional[float] = None,
    below: Optional[float] = None,
    choices: Sequence[str] = (),
    duration: bool = False,
    words: Sequence[str] = (),
    stages: bool = False,
    loss: bool = False,
) -> Any:
    """A field of a dataclass of options; see ``Declaration`` and ``Range`` for the arguments."""
    known = dict(
        help=help,
        range=Range(at_least, above, at_most, below),
        choices=tuple(choices),
        duration=duration,
        words=tuple(words),
        stages=stages,
        loss=loss,
    )
    return field(default=default, metadata={_META: known})


def like(options: "Type[Options]", name: str, default: Any) -> Any:
    """A field that is declared as in other options, with another default."""
    known = next(item for item in fields(options) if item.name == name).metadata[_META]
    return field(default=default, metadata={_META: known})


def loss_weight(default: float, help: str) -> Any:
    """A field for the weight of an auxiliary loss; the option ``x_weight`` weighs the loss ``x``."""
    return option(default, help, at_least=0, loss=True)


@dataclass(frozen=True)
class Options:
    """Base of dataclasses of options: values have the declared types and are within the declared ranges.

    Raises:
        OptionError: one does not.
    """

    def __post_init__(self) -> None:
        for name, declaration in self.declared().items():
            object.__setattr__(self, name, declaration.convert(getattr(self, name)))

    @classmethod
    def declared(cls) -> Dict[str, Declaration]:
        """The options by name, in the order in which they are declared."""
        found = cls.__dict__.get("_declared")
        if found is None:
            types = get_type_hints(cls)
            found = {item.name: _declaration(item, types[item.name]) for item in fields(cls)}
            cls._declared = found  # type: ignore[attr-defined]
        return found

    @classmethod
    def given(cls: Type[_O], values: Dict[str, Any]) -> _O:
        """Options of which some are given.

        Raises:
            OptionError: a name that there is not, or a value that cannot be.
        """
        for name in values:
            if name not in cls.declared():
                known = ", ".join(f"`{known}`" for known in cls.declared()) or "none"
                raise OptionError(name, f"`{name}` is no option here: there are {known}.")
        return cls(**values)

    def contradictions(self, experts: int) -> Iterator[OptionError]:
        """What these values and the number of experts have against each other.

        Args:
            experts: E.
        """
        return iter(())

    def loss_weights(self) -> Dict[str, float]:
        """The weight of each auxiliary loss, by the loss's name."""
        return {
            name[: -len("_weight")]: getattr(self, name)
            for name, declaration in self.declared().items()
            if declaration.loss
        }


def _declaration(item: "Field[Any]", hint: Any) -> Declaration:
    arguments = [kind for kind in getattr(hint, "__args__", ()) if kind is not type(None)]
    kind = arguments[0] if getattr(hint, "__origin__", None) is Union else hint
    known = dict(item.metadata[_META])
    if issubclass(kind, Enum) and not known["choices"]:
        known["choices"] = tuple(member.value for member in kind)
    return Declaration(name=item.name, type=kind, default=item.default, **known)

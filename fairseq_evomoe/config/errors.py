"""Contradictions, as the command line prints them."""

import re
from typing import Iterable, List

from ..moe.options import OptionError

PREFIX = "moe_"


def flag(name: str) -> str:
    """The command-line spelling of an option's name."""
    return "--" + name.replace("_", "-")


def as_flags(text: str) -> str:
    """A sentence in which names of options, in backticks, are flags."""
    return re.sub(r"`(\w+)`", lambda name: flag(PREFIX + name.group(1)), text)


class ConfigError(ValueError):
    """Options that contradict themselves or each other: all that were found, one sentence each.

    Attributes:
        errors: the contradictions, each with the option that it is about.
    """

    def __init__(self, errors: Iterable[OptionError]) -> None:
        self.errors: List[OptionError] = list(errors)
        super().__init__("\n".join(as_flags(str(error)) for error in self.errors))

    @property
    def option(self) -> str:
        """The option that the first of them is about."""
        return self.errors[0].option

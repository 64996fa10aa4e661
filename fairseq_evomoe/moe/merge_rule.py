"""What a router says of its tensors, so that similar experts can be merged."""

from enum import Enum
from typing import Mapping, Optional


class MergeRule(str, Enum):
    """What becomes of a tensor of a router when each group of experts becomes one.

    ``mean`` and ``sum``: the tensor has an equal stretch of rows for each expert, and a group's rows are
    averaged in proportion to the experts' shares, or added up.  ``table``: it holds numbers of experts, or
    negative ones for none, and each becomes that of its group.  ``numbers``: it numbers the experts, and does
    so anew.  ``unchanged``: nothing in it depends on the experts.
    """

    mean = "mean"
    sum = "sum"
    table = "table"
    numbers = "numbers"
    unchanged = "unchanged"


def rule_of(rules: Mapping[str, MergeRule], name: str) -> Optional[MergeRule]:
    """The rule of a tensor, by its own name or that of the module that it is in; ``None``: there is none."""
    return rules.get(name, rules.get(name.split(".")[0]))

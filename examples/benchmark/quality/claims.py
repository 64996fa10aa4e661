"""The claims that are tested, a row each, with what the results say of them."""

from __future__ import annotations

from dataclasses import dataclass

from bootstrap import Difference, difference
from growth import GROWTH
from protocol import EXPERIMENTS, TASKS, Task
from tables import Records, comparable, of_variant, shares, table

ALL = {**EXPERIMENTS, **GROWTH}


@dataclass(frozen=True)
class Claim:
    """A row is at least as good as another one.

    Attributes:
        text: the claim.
        source: whose it is.
        experiment: which has both rows.
        task: of the experiment.
        ours: label of the row that is claimed to be better.
        theirs: label of the other.
        level: whether the claim is that it is no worse.
        updates: if given, the claim is that ours is where theirs ends after that share of its updates.
    """

    text: str
    source: str
    experiment: str
    task: str
    ours: str
    theirs: str
    level: bool = False
    updates: float | None = None


# of each task, the row of ours whose experts are as many and as wide as those of the rivals
_OURS = {"lm": "EvoMoE, 8 wide experts", "masked_lm": "EvoMoE, confident gate"}


def _of_tasks(text: str, source: str, theirs: str, **more: object) -> list[Claim]:
    return [Claim(text, source, "systems", task, ours, theirs, **more) for task, ours in _OURS.items()]


def _of_narrow(text: str, theirs: str) -> list[Claim]:
    return [Claim(text, _EVOMOE, "systems", "lm", "EvoMoE", theirs)]


_GROWN = "stages (5, 10, 20%): 4, 16, 64"
_EVOMOE, _HMOE, _RIVALS = "EvoMoE", "HMoE", "EMO, Expert Upcycling"
CLAIMS = (
    Claim(
        "64 experts in stages are no worse",
        _RIVALS,
        "growth_switch",
        "domains",
        _GROWN,
        "from the start",
        True,
    ),
    Claim(
        "and with a gate that sees context",
        _RIVALS,
        "growth_context",
        "domains",
        _GROWN,
        "from the start",
        True,
    ),
    Claim("8 experts that spawn at 2% are no worse", _EVOMOE, "spawn_when", "lm", "2%", "at the start", True),
    Claim("The published recipe beats Switch", _EVOMOE, "systems", "lm", "EvoMoE, published", "Switch"),
    *_of_tasks("EvoMoE with our options beats Switch", _EVOMOE, "Switch"),
    *_of_tasks("... BASE", _EVOMOE, "BASE"),
    *_of_tasks("... StableMoE", _EVOMOE, "StableMoE"),
    *_of_tasks("... Hash", _EVOMOE, "Hash"),
    *_of_narrow("With narrow experts it beats Hash", "Hash, 4 of 32 narrow experts"),
    *_of_narrow("... Top-4", "Top-4 of 32 narrow experts"),
    *_of_tasks("EvoMoE needs half of the updates to where Switch ends", _EVOMOE, "Switch", updates=0.5),
    Claim(
        "Different sizes beat equal ones, Top-P",
        _HMOE,
        "systems",
        "lm",
        "HMoE, Top-P",
        "equal experts, Top-P",
    ),
    Claim("... Top-K", _HMOE, "systems", "lm", "HMoE, Top-K", "equal experts, Top-K"),
)


def claims_table(known: dict[str, dict]) -> str:
    """A row for each claim: verdict, number with its interval, link."""
    heads = ["claim", "whose", "task", "verdict", "difference, 95% interval", "seeds"]
    return table(heads, [_row(claim, known) for claim in CLAIMS])


def _row(claim: Claim, known: dict[str, dict]) -> list[str]:
    task, experiment = TASKS[claim.task], ALL[claim.experiment]
    ours, theirs = (
        of_variant(next(v for v in experiment.variants if v.label == label), task, known)
        for label in (claim.ours, claim.theirs)
    )
    link = f"[{claim.text}](results.md#{anchor(f'{experiment.title}: {task.title}')})"
    if experiment.protocol > 1:
        link = f"[{claim.text}](results.md#{anchor(experiment.title)})"
    first = [link, claim.source, task.title]
    if not comparable(ours, theirs):
        return [*first, "not run yet", "", ""]
    if claim.updates is not None:
        return [*first, *_reached(claim.updates, ours, theirs)]
    found = difference(ours, theirs)
    return [*first, verdict(found, claim.level, task), in_words(found, task), str(found.seeds)]


def _reached(wanted: float, ours: Records, theirs: Records) -> list[str]:
    share = (shares(ours, theirs, 0) or (None, None))[1]
    seeds = str(len({r["seed"] for r in ours} & {r["seed"] for r in theirs}))
    if share is None:
        return ["**no**", "never there", seeds]
    return ["yes" if share <= wanted else "**no**", f"{share:.2f} of its updates", seeds]


def verdict(found: Difference, level: bool, task: Task) -> str:
    """Whether ours is better, or no worse: yes, no, or neither, where seeds or the interval leave it open."""
    if found.seeds == 1:
        return "one seed"
    sign = 1 if task.translates else -1  # of what is better
    if not found.excludes_zero:
        return "yes" if level else "level"
    return "yes" if sign * found.mean > 0 else "**no**"


def in_words(found: Difference, task: Task) -> str:
    """A difference with its interval."""
    scale, unit = (1, " BLEU") if task.translates else (100, "%")
    return f"{scale * found.mean:+.1f}{unit} [{scale * found.low:+.1f}, {scale * found.high:+.1f}]"


def anchor(heading: str) -> str:
    """The name that GitHub gives a heading."""
    kept = "".join(c for c in heading.lower() if c.isalnum() or c in " -_")
    return kept.replace(" ", "-")

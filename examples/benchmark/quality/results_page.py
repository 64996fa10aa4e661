"""The page of all results: `results.md`."""

from __future__ import annotations

from pathlib import Path

import growth_tables
from protocol import EXPERIMENTS
from records import read, read_gap, read_speed, read_steps
from tables import gap_table, section, speed_table

ABOUT = """# Results

Made by `report.py` out of the lines in [results](results), and of nothing else. What is compared, and how:
[protocol.md](protocol.md); what is to be thought of it: [notes.md](notes.md).

"""
OLD = """## Protocol 1

Up to the tables of ablations, systems are compared on the causal LM, the masked LM and translation.
Ablations are of EvoMoE with eight wide experts (`evomoe` in [recorded.py](recorded.py)) on the causal LM,
with seed 1 unless a row says more, chosen on valid. Each is a command, `run.py --experiments NAME`.

"""
SPEED = """### Seconds an update

Timed in turn, one thread: short runs with all their stages, scaled to their length (`speed.py`). The time
to where Switch ends is the ratio times the share of updates in the tables of systems.

"""
GAP = """### The gap between training and evaluation: causal LM

`gap.py` evaluates a run's checkpoints on valid with the routing of training (noise, the experts over the
threshold, and one of them once routing is top-1), with that of adaptive evaluation (no noise, those over
the threshold) and with that of evaluation (no noise, the best one). Perplexity in this order, and experts
of a token in training.

"""


def page(folder: Path) -> str:
    """``results.md``: all tables that the results in a folder make."""
    known = read(folder)
    parts = [ABOUT + growth_tables.sections(known, read_steps(folder / "2" / "steps")), OLD]
    for experiment in EXPERIMENTS.values():
        parts.append(section(experiment, known))
        if experiment.id == "systems":
            speed = read_speed(folder / "1" / "speed")
            parts.append(SPEED + speed_table(speed, experiment, known))
    parts.append(GAP + gap_table(read_gap(folder / "1" / "gap")))
    return "\n".join(part.strip() + "\n" for part in parts)

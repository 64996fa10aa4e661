#!/usr/bin/env python3
"""Draw `how_it_works.svg`: the three phases, from the plugin's own schedule and gate.

python examples/how_it_works.py
"""

from __future__ import annotations

import logging
import sys
from pathlib import Path

import matplotlib

matplotlib.use("svg")
logging.getLogger("matplotlib").setLevel(logging.WARNING)
import matplotlib.pyplot as plt  # noqa: E402
import torch  # noqa: E402

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from fairseq_evomoe.evolution.schedule import Schedule  # noqa: E402
from fairseq_evomoe.moe import RoutingContext  # noqa: E402
from fairseq_evomoe.moe.routers import DenseToSparseRouter  # noqa: E402

EXPERTS, SPAWN, ANNEAL, HARD, END = 4, 1000, 5000, 6000, 9000
BLUE, GREY, RED = "#2b6cb0", "#a0aec0", "#c05621"


def active_experts(schedule: Schedule, update: int) -> float:
    """Mean number of active experts of a token, for random tokens and a moderately sure gate."""
    phase = schedule.phase(update, stage=int(update >= SPAWN))
    if phase == phase.DIVERSIFY:
        return 1.0
    router = DenseToSparseRouter(16, EXPERTS).train()
    torch.manual_seed(0)
    torch.nn.init.normal_(router.weight, std=0.45)
    context = RoutingContext(schedule.temperature(update), hard=phase == phase.HARD)
    return router(torch.randn(4000, 16), context).token_N.shape[0] / 4000


def sketch(axes, center: float, title: str, links: list[float]) -> None:
    """A token, its gate and its experts; one line for each active pair."""
    axes.text(center, 1.08, title, ha="center", va="bottom", fontsize=10.5, weight="bold")
    xs = [center] if len(links) == 1 else [center + 0.045 * (i - 1.5) for i in range(4)]
    for x, strength in zip(xs, links):
        if strength:
            axes.plot([center, x], [0.12, 0.72], color=BLUE, lw=0.8 + 2.4 * strength, zorder=1)
        face = BLUE if strength else "white"
        box = dict(boxstyle="round,pad=0.35", fc=face, ec=BLUE if strength else GREY)
        axes.text(x, 0.82, "E", ha="center", va="center", color="white" if strength else GREY, bbox=box)
    axes.text(center, 0.05, "token", ha="center", va="center", fontsize=9,
              bbox=dict(boxstyle="round,pad=0.3", fc="white", ec="black"))  # fmt: skip


def main() -> None:
    """Draw and save."""
    plt.rcParams.update({"svg.hashsalt": "evomoe", "font.size": 9, "svg.fonttype": "none"})
    figure, (top, bottom) = plt.subplots(
        2, 1, figsize=(8.2, 4.4), height_ratios=[1, 1.35], layout="constrained"
    )
    top.set(xlim=(0, 1), ylim=(-0.1, 1.6))
    top.axis("off")
    sketch(top, 0.08, "one expert\nlearns", [1.0])
    sketch(top, 0.30, "it becomes four,\nthe gate is dense", [0.3, 0.3, 0.3, 0.3])
    sketch(top, 0.56, "fewer and fewer\npass the threshold", [0.8, 0, 0.4, 0])
    sketch(top, 0.84, "one expert\nfor each token", [1.0, 0, 0, 0])

    schedule = Schedule(spawn_update=SPAWN, anneal_updates=ANNEAL)
    updates = list(range(0, END + 1, 100))
    bottom.plot(updates, [active_experts(schedule, n) for n in updates], color=BLUE, lw=2)
    bottom.set(xlabel="update", ylabel="experts per token", xlim=(0, END), ylim=(0, 4.4))
    bottom.yaxis.label.set_color(BLUE)
    right = bottom.twinx()
    spawned = [n for n in updates if n >= SPAWN]
    right.plot(spawned, [schedule.temperature(n) for n in spawned], color=RED, lw=1.5, ls="--")
    right.set(ylabel="temperature of the gate", ylim=(0, 2.2))
    right.yaxis.label.set_color(RED)
    for x, text in (
        (SPAWN, "--moe-spawn-update"),
        (SPAWN + ANNEAL, "+ --moe-anneal-updates"),
        (SPAWN + HARD, "+ --moe-hard-update"),
    ):
        bottom.axvline(x, color=GREY, lw=0.8, zorder=0)
        bottom.text(x + 60, 0.12, text, rotation=90, va="bottom", fontsize=8, color="#4a5568")
    figure.savefig(HERE / "how_it_works.svg", metadata={"Date": None})


if __name__ == "__main__":
    main()

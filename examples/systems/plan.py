"""What is to be done for one system with one seed, and the record that comes of it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import finished
import logs
from jobs import Job
from systems import DENSE, TASKS, Settings, System, share


@dataclass
class Plan:
    """The jobs of a run, in order: a dense model if it needs one, training, translation.

    Attributes:
        seed: of all random numbers.
        task: name of the task.
        asked: what is run, see `finished.described`.
        train: the job that trains it.
        dense: the one that trains the dense model that its experts are made of.
        translate: the one that translates the test set.
    """

    seed: int
    task: str
    asked: dict[str, Any]
    train: Job
    dense: Job | None = None
    translate: Job | None = None

    @property
    def jobs(self) -> list[Job]:
        """All of them, in order."""
        return [job for job in (self.dense, self.train, self.translate) if job is not None]

    @property
    def failure(self) -> str:
        """Why it has not come to its end, if something has failed."""
        return self.jobs[-1].failure()

    @property
    def done(self) -> bool:
        """Whether it has come to its end."""
        return self.jobs[-1].done

    @property
    def checkpoint(self) -> Path:
        """Its last checkpoint."""
        return self.train.log.parent / "checkpoint_last.pt"

    def record(self) -> dict[str, Any]:
        """What came out of it."""
        validation = TASKS[self.task].validation
        return finished.record_of(
            self.asked,
            self.seed,
            run=logs.read(self.train.log, validation),
            before=logs.read(self.dense.log, validation) if self.dense else None,
            peak_mib=self.train.state["peak_mib"],
            bleu=logs.bleu(self.translate.log) if self.translate else None,
        )

    def tidy(self) -> None:
        """Delete its checkpoints, but for the last."""
        for path in self.train.log.parent.glob("checkpoint*.pt"):
            if path.name != "checkpoint_last.pt":
                path.unlink()


def plan(system: System, seed: int, settings: Settings, runs: Path, known: dict[Path, Job]) -> Plan:
    """Plan a run.

    Args:
        system: the system.
        seed: of all random numbers.
        settings: what is the same for all.
        runs: folder for a folder of each run.
        known: jobs by their logs, so that systems that are made of one dense model wait for one job; it is
            added to.
    """
    asked, common = finished.described(system, settings), finished.settings_of(settings)
    folder = runs / finished.key(asked, common, seed)
    updates, before = settings.updates, None
    if system.dense_updates:
        first = share(system.dense_updates, updates)
        updates -= first
        before = _dense(Settings(settings.data, settings.task, first, settings.more), seed, runs, known)
    last = before.log.parent / "checkpoint_last.pt" if before else None
    command = settings.train(system, seed, folder, last)
    title = f"{system.id}, seed {seed}"
    train = Job(title, command, folder / "train.log", updates, [before] if before else [])
    result = Plan(seed, settings.task, asked, train, before)
    if TASKS[settings.task].metric == "BLEU":
        command = settings.generate(folder / "checkpoint_last.pt")
        result.translate = Job(f"{title}: translation", command, folder / "generate.log", 0, result.jobs)
    return result


def _dense(settings: Settings, seed: int, runs: Path, known: dict[Path, Job]) -> Job:
    """The job that trains a dense model for as long as `settings` say."""
    seed += 1000  # another one, for other batches than those that the experts then see
    folder = runs / finished.key(finished.described(DENSE, settings), finished.settings_of(settings), seed)
    job = Job(
        f"dense for {settings.updates} updates",
        settings.train(DENSE, seed, folder),
        folder / "train.log",
        settings.updates,
    )
    return known.setdefault(job.log, job)

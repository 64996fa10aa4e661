"""Commands that run one after another or side by side, each once: what is finished is not run again."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Callable


@dataclass
class Job:
    """A command with its log and what is known of it, in files.

    Attributes:
        title: what to call it on the terminal.
        command: program and arguments.
        log: file that takes what it prints; its state is beside it, as JSON.
        updates: how many updates it makes, to show how far it is.
        needs: the jobs that must be done before.
    """

    title: str
    command: list[str]
    log: Path
    updates: int = 0
    needs: list[Job] = field(default_factory=list)
    process: subprocess.Popen | None = None

    @property
    def state_file(self) -> Path:
        """Where its state is kept."""
        return self.log.with_suffix(".json")

    @property
    def state(self) -> dict[str, Any]:
        """`command`; `done`; `error`, if it has failed; `peak_mib`, the largest memory of its process."""
        return json.loads(self.state_file.read_text()) if self.state_file.exists() else {}

    def write(self, **changes: Any) -> None:
        """Change its state."""
        partial = self.state_file.with_suffix(".partial")
        partial.write_text(json.dumps({**self.state, **changes}, indent=1) + "\n")
        partial.replace(self.state_file)

    @property
    def done(self) -> bool:
        """Whether it has run to its end."""
        return bool(self.state.get("done"))

    def failure(self) -> str:
        """Why it has not run, if it cannot be run any more or has failed."""
        before = [f"{need.title}: {need.failure()}" for need in self.needs if need.failure()]
        return before[0] if before else self.state.get("error", "")

    def start(self, environment: dict[str, str]) -> None:
        """Start or continue it."""
        self.log.parent.mkdir(parents=True, exist_ok=True)
        self.write(command=self.command, done=False, error="")
        with open(self.log, "a") as log:
            log.write("$ " + " ".join(self.command) + "\n")
            log.flush()
            self.process = subprocess.Popen(
                self.command, stdout=log, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, env=environment
            )

    def poll(self) -> bool:
        """Whether it has ended; if so, note how."""
        # not Popen.poll: only wait4 tells the memory of this one process
        pid, status, usage = os.wait4(self.process.pid, os.WNOHANG)
        if pid == 0:
            return False
        code = self.process.returncode = os.waitstatus_to_exitcode(status)
        peak = usage.ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)
        peak = max(round(peak), self.state.get("peak_mib", 0))
        error = self._last_line(code) if code else self._too_short()
        self.write(done=not error, peak_mib=peak, error=error)
        return True

    def _too_short(self) -> str:
        """A training that somebody else asks to end does so without an error, after a checkpoint."""
        made = self.updates_made() if self.updates else 0
        return f"ended after {made} of {self.updates} updates" if made < self.updates else ""

    def _last_line(self, code: int) -> str:
        if code < 0:
            return f"ended by {signal.Signals(-code).name}"
        lines = [line.strip() for line in self.log.read_text(errors="replace").splitlines() if line.strip()]
        return lines[-1][:500]

    def stop(self) -> None:
        """End its process; the next start goes on from its last checkpoint."""
        if self.process is not None and self.process.returncode is None:
            self.process.terminate()
            self.process.wait()

    def updates_made(self) -> int:
        """The last update that its log tells of."""
        with open(self.log, "rb") as log:
            log.seek(max(log.seek(0, os.SEEK_END) - 20000, 0))
            found = re.findall(rb'"(?:valid_)?num_updates": "(\d+)"', log.read())
        return int(found[-1]) if found else 0


def run(
    jobs: list[Job], parallel: int, threads: int, ended: Callable[[Job], None] = lambda job: None
) -> None:
    """Run what is not done of some jobs, so many at a time, and show how far they are.

    A job that fails is noted and the others go on; those that need it are left out.

    Args:
        jobs: in the order in which they start.
        parallel: how many at a time.
        threads: of each.
        ended: is called with each job that has run to its end.
    """
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
    for job in jobs:
        if not job.done and job.state:
            job.write(error="")  # it failed or was interrupted: another try
    waiting = [job for job in jobs if not job.done]
    total, running, screen = len(waiting), [], Screen()
    try:
        while waiting or running:
            waiting = [job for job in waiting if not job.failure()]
            ready = [job for job in waiting if all(need.done for need in job.needs)]
            for job in ready[: parallel - len(running)]:
                waiting.remove(job)
                job.start(environment)
                running.append(job)
            time.sleep(0.2)
            for job in [job for job in running if job.poll()]:
                running.remove(job)
                if job.done:
                    ended(job)
                screen.say(f"{job.title}: {job.failure() or 'done'}")
            screen.show(running, total - len(waiting) - len(running), total)
    finally:
        for job in running:
            job.stop()
        screen.end()


class Screen:
    """Progress on a terminal as one line that changes, elsewhere as a line now and then."""

    def __init__(self) -> None:
        self.start = time.time()
        self.shown = 0.0
        self.in_place = sys.stdout.isatty()

    def show(self, running: list[Job], ended: int, total: int) -> None:
        """How far the running jobs are."""
        if not running or time.time() - self.shown < (1 if self.in_place else 60):
            return
        self.shown = time.time()
        each = [
            f"{job.title} {job.updates_made()}/{job.updates}" if job.updates else job.title for job in running
        ]
        line = f"  {self.shown - self.start:.0f} s, {ended} of {total} ended; {', '.join(each)}"
        print(
            f"\r{line[:150]:<150}" if self.in_place else line, end="" if self.in_place else "\n", flush=True
        )

    def say(self, text: str) -> None:
        """A line that stays."""
        if self.in_place:
            print("\r" + " " * 150 + "\r", end="")
        print(f"  {time.time() - self.start:.0f} s, {text}", flush=True)

    def end(self) -> None:
        """Leave the line."""
        if self.in_place:
            print()

"""Run commands side by side, and leave no process behind.

A signal to the group of a launcher does not reach the ranks that torchrun has started, which have sessions of
their own.  So what is started here has a mark in its environment, which all that it starts inherits.
"""

import contextlib
import multiprocessing.connection
import os
import signal
import socket
import subprocess
import time
import uuid
from pathlib import Path

from support.cli import Result

# the plugin and this package, for processes that start elsewhere
PATH = os.pathsep.join(str(Path(__file__).parents[i]) for i in (1, 2))
MARK = "EVOMOE_TEST_PROCESS"


def run_side_by_side(commands, folder, time_limit):
    """Run commands at once: a list of ``Result``.

    When this returns, or raises an error, no process is left of what the commands have started.

    Args:
        commands: pairs of a command and what its environment has besides this process's.
        folder: for what they print.
        time_limit: seconds, after which an error is raised.
    """
    mark = uuid.uuid4().hex
    common = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": PATH, MARK: mark}
    files = [folder / f"output{i}.log" for i in range(len(commands))]
    processes = []
    try:
        for (command, environment), path in zip(commands, files):
            with path.open("w") as output:
                words = [str(word) for word in command]
                env = {**common, **environment}
                processes.append(subprocess.Popen(words, env=env, stdout=output, stderr=subprocess.STDOUT))
        deadline = time.monotonic() + time_limit
        while any(process.poll() is None for process in processes):
            assert time.monotonic() < deadline, f"not done in time\n{_ends_of(files)}"
            time.sleep(0.05)
        left = marked(mark)
        assert not left, f"processes left behind: {left}\n{_ends_of(files)}"
    finally:
        # again, since a launcher may have started one just before it was killed
        while left := marked(mark):
            for process in left:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(process, signal.SIGKILL)
        for process in processes:
            process.wait()
    return [Result(path.read_text(), process.returncode) for path, process in zip(files, processes)]


def wait_for_all(processes, time_limit, logs):
    """Start processes of ``multiprocessing`` and wait until all have ended well, or else kill them.

    Args:
        processes: not started yet.
        time_limit: seconds, after which an error is raised.
        logs: where they write what they print; the ends are shown if one fails.
    """
    deadline = time.monotonic() + time_limit
    try:
        for process in processes:
            process.start()
        while alive := [process.sentinel for process in processes if process.is_alive()]:
            assert time.monotonic() < deadline, f"not done in time\n{_ends_of(logs)}"
            # the others would wait for one that has failed
            assert not any(process.exitcode for process in processes), _ends_of(logs)
            multiprocessing.connection.wait(alive, 1)
        assert not any(process.exitcode for process in processes), _ends_of(logs)
    finally:
        for process in processes:
            if process.is_alive():
                process.kill()
            if process.pid is not None:
                process.join()


def marked(mark):
    """The processes that have a mark, whoever is their parent; those that have ended have none."""
    found = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        with contextlib.suppress(OSError):  # it ends just now, or is another user's
            if f"{MARK}={mark}".encode() in path.read_bytes().split(b"\0"):
                found.append(int(path.parent.name))
    return found


def free_port():
    """A port of this machine that nobody uses yet."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _ends_of(files):
    return "\n".join(f"{path.name}:\n{path.read_text()[-8000:]}" for path in files if path.exists())

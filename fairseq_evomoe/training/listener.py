"""A signal that asks the process to end, noted instead of obeyed at once."""

import os
import signal
import threading
from types import FrameType
from typing import List, Optional

SIGNALS = [getattr(signal, name) for name in ("SIGTERM", "SIGUSR1") if hasattr(signal, name)]


class Listener:
    """Waits for a signal that asks the training to end.

    A handler that somebody else has installed stays, and a second signal does what it does without this one.

    Attributes:
        received: name of the signal that has come; ``None``: none has.
    """

    def __init__(self) -> None:
        self.received: Optional[str] = None
        self._process = os.getpid()
        self._taken: List[int] = []

    def listen(self) -> None:
        """Begin to wait, unless it has begun; only the main thread may have handlers."""
        if not self._taken and threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                if signal.getsignal(number) == signal.SIG_DFL:
                    signal.signal(number, self._receive)
                    self._taken.append(number)

    def let_go(self) -> None:
        """Wait no longer."""
        if threading.current_thread() is threading.main_thread():
            for number in self._taken:
                if signal.getsignal(number) == self._receive:
                    signal.signal(number, signal.SIG_DFL)

    def _receive(self, number: int, frame: Optional[FrameType]) -> None:
        self.let_go()
        if os.getpid() != self._process:  # a process that loads data has its parent's handlers
            os.kill(os.getpid(), number)
        self.received = signal.Signals(number).name

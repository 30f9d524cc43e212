"""How a run ends early: a signal is answered at the end of the step that is under way, when all can be saved.

Ctrl-C (SIGINT), SIGTERM (a scheduler, a container that is stopped) and SIGHUP (a terminal that is closed) are treated
alike, but a second Ctrl-C ends the run at once, as of its last checkpoint.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Stopped(KeyboardInterrupt):
    """A signal has ended the run; `signal` says which, None where another process of the run was sent it."""

    def __init__(self, number: int | None = None) -> None:
        super().__init__()
        self.signal = None if number is None else signal.Signals(number)


class Stop:
    """Whether a signal has asked the run to end: to be called after every step."""

    def __init__(self) -> None:
        self.folder: Path | None = None  # of the run, once there is something to go on with
        self._signal: int | None = None
        self._waits = False
        self._terminals: list[int] = []

    def __call__(self) -> bool:
        return self._signal is not None

    @contextmanager
    def on_signals(self) -> Iterator[None]:
        """Answer signals in this block, but those that this process was started to ignore, as by nohup.

        Without effect outside of the main thread, where Python handles no signals.
        """
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        self._terminals = [descriptor for descriptor in (1, 2) if os.isatty(descriptor)]
        before = {number: signal.getsignal(number) for number in SIGNALS}
        before = {number: handler for number, handler in before.items() if handler is not signal.SIG_IGN}
        for number in before:
            signal.signal(number, self._handle)
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    @contextmanager
    def between_steps(self) -> Iterator[None]:
        """In this block a signal waits until it is asked for; elsewhere, where nothing could be lost, it ends the run
        at once. Raises Stopped at the end of the block when a signal has come.
        """
        self._waits = True
        try:
            yield
        finally:
            self._waits = False
        if self._signal is not None:
            raise Stopped(self._signal)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        again = self._signal is not None
        self._signal = number
        if number == signal.SIGHUP:  # writing to a terminal that is gone would fail
            self._leave_terminals()
        if not self._waits or (again and number == signal.SIGINT):
            raise Stopped(number)
        with suppress(OSError):  # not print: it may be in the middle of another
            os.write(2, b"\nstopping at the end of this step, and saving; Ctrl-C once more stops at once\n")

    def _leave_terminals(self) -> None:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        for descriptor in self._terminals:
            os.dup2(nowhere, descriptor)
        os.close(nowhere)

"""What a run says: JSON lines for programs, a terminal for people, and whatever else watches its events."""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from lofi_fast.errors import InputError, printable
from lofi_fast.run.events import Event, Step, encode
from lofi_fast.run.live import LiveView

NOTE_SECONDS = 30.0  # how often a long task is reported where no live bar can be drawn


class OutputLost(InputError):
    """The terminal, the file that stands for it, or the log takes no more."""


class Advance(Protocol):
    def __call__(self, done: int, note: str, total: int | None = None) -> None:
        """Report `done` units, with a short note; `total` corrects the total where it was not known before."""


class Watcher(Protocol):
    """Who is told of every event of a run beside its log."""

    def event(self, event: Event) -> None: ...

    def close(self) -> None:
        """No event follows."""


class Terminal:
    """Sentences and progress for people; with `plain` as lines alone, whatever the terminal could show."""

    def __init__(self, console: Console | None = None, plain: bool = False) -> None:
        self.console = console or Console(highlight=False, soft_wrap=True)
        self.plain = plain or not self.console.is_terminal

    def say(self, text: str) -> None:
        """Raises OutputLost where nothing can be written, and BrokenPipeError where nobody reads it any more."""
        try:
            self.console.print(printable(text), markup=False, emoji=False)
        except SystemExit:  # by which rich answers a pipe that has ended
            raise BrokenPipeError(errno.EPIPE, os.strerror(errno.EPIPE)) from None
        except BrokenPipeError:
            raise
        except OSError as error:
            raise OutputLost(f"the output cannot be written: {error.strerror}") from None

    @contextmanager
    def progress(self, title: str, total: int, start: int = 0) -> Iterator[Advance]:
        """A bar with the time left on a terminal; a line every half minute elsewhere. Yields advance(done, note)."""
        if self.plain:
            yield self._plain(title, total)
            return
        columns = (
            TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
            TextColumn("left"), TimeRemainingColumn(), TextColumn("{task.fields[note]}", markup=False),
        )  # fmt: skip
        with Progress(*columns, console=self.console) as bars:
            task = bars.add_task(title, total=total, completed=start, note="")

            def advance(done: int, note: str, total: int | None = None) -> None:
                bars.update(task, completed=done, note=printable(note), total=total)

            yield advance

    def _plain(self, title: str, total: int) -> Advance:
        began = last = time.monotonic()
        whole = total

        def advance(done: int, note: str, total: int | None = None) -> None:
            nonlocal last, whole
            whole = total or whole
            now = time.monotonic()
            if now - last < NOTE_SECONDS and done < whole:
                return
            last = now
            left = (now - began) / max(done, 1) * (whole - done)
            self.say(f"{title}: {done}/{whole}, {now - began:.0f} s, {left:.0f} s left  {note}".rstrip())

        return advance


class RunLog(Terminal):
    """`log.jsonl` of a run folder, one event a line, and the terminal, on which `view` shows what goes on."""

    def __init__(
        self,
        path: Path,
        console: Console | None = None,
        *,
        plain: bool = False,
        view: LiveView | None = None,
        watchers: Sequence[Watcher] = (),
    ) -> None:
        super().__init__(console, plain)
        self._view, self._watchers = view, [*([] if view is None else [view]), *watchers]
        torn = _ends_torn(path)
        self._file = path.open("ab")
        if torn:  # a killed run's last line: the next event starts a line of its own
            self._file.write(b"\n")
        self._lost = False  # whether a line could not be written
        self._start = time.monotonic()

    def event(self, event: Event) -> None:
        """Append one line. Flushed, so that a killed run keeps what it logged. Raises OutputLost where it cannot be."""
        with self._named():
            self._file.write(encode(event))
            self._file.flush()
        for watcher in self._watchers:
            watcher.event(event)

    @contextmanager
    def progress(self, title: str, total: int, start: int = 0) -> Iterator[Advance]:
        """As `Terminal.progress`; in the view where there is one, which leaves a line when it is over."""
        if self._view is None:
            with super().progress(title, total, start) as advance:
                yield advance
            return
        self._view.begin(title, total, start)
        try:
            yield self._view.advance
        finally:
            if said := self._view.end():
                self.say(said)

    def in_place(self) -> bool:
        """Whether the log's name still is that of the file that is written to."""
        try:
            return os.path.samestat(os.stat(self._file.name), os.fstat(self._file.fileno()))
        except OSError:
            return False

    def place(self) -> Path | None:
        """The folder that holds the log now, which may have been moved since it was opened; None where none does."""
        try:
            path = Path(os.readlink(f"/proc/self/fd/{self._file.fileno()}"))
        except OSError:
            return None
        return path.parent if path.exists() else None

    def close(self) -> None:
        for watcher in self._watchers:
            watcher.close()
        with suppress(OSError) if self._lost else self._named():  # which was told of: the line is tried once more
            self._file.close()

    @contextmanager
    def _named(self) -> Iterator[None]:
        """A failed write in this block says where, which the system does not tell."""
        try:
            yield
        except OSError as error:
            self._lost = True
            reason = error.strerror or error
            raise OutputLost(f"{self._file.name}: cannot write ({reason}); free some space or change --out") from None


class SilentLog(RunLog):
    """Of a process that another one speaks for: nothing is written or shown, but the last step is known, in case that
    the other one ends before it has logged it.
    """

    def __init__(self) -> None:
        self.last_step: Step | None = None
        Terminal.__init__(self, Console(quiet=True))

    @contextmanager
    def progress(self, title: str, total: int, start: int = 0) -> Iterator[Advance]:
        def advance(done: int, note: str, total: int | None = None) -> None:
            pass

        yield advance

    def event(self, event: Event) -> None:
        if isinstance(event, Step):
            self.last_step = event

    def close(self) -> None:
        pass


def _ends_torn(path: Path) -> bool:
    """Whether a killed run left its last line without an end; only the last byte is read, for logs grow large."""
    if not path.exists() or path.stat().st_size == 0:
        return False
    with path.open("rb") as file:
        file.seek(-1, os.SEEK_END)
        return file.read(1) != b"\n"

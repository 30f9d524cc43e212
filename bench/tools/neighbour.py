"""A neighbour on a CPU: a process that takes and frees memory, in one control group with the training that it presses.

The group's limit is the kernel's: whoever goes beyond ends a process, so a training that comes through has kept to it,
and nothing else on the machine is in danger. Where no group may be made, the neighbour takes the machine's own memory.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from threading import Event, Thread

import psutil

from lofi_fast.memory.cgroups import ControlGroup, control_groups

ROOM = 2.0  # budgets that the group holds
PLENTY = 1.3  # budgets that are left in good times
# Of the budget, taken with each step of the training. A CPU promises more memory than there is, so that what goes in
# the middle of a step ends a process where a GPU's driver would refuse: no planner can go down in time for more than
# its margin.
PIECE = 0.01
HELD, PLENTIFUL = 10, 20  # steps for which least is left, and plenty
POLL_SECONDS = 0.01
_HOG = """
import mmap, sys
held = mmap.mmap(-1, max(int(sys.argv[1]), 4096), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
now = 0
for line in sys.stdin:
    wanted = int(line)
    for page in range(now, wanted, 4096):
        held[page] = 1
    if wanted < now:
        held.madvise(mmap.MADV_DONTNEED, wanted, now - wanted)
    now = wanted
    print(now, flush=True)
"""


@contextmanager
def new_group(limit: int) -> Iterator[ControlGroup | None]:
    """A group inside this process's for processes that may hold `limit` bytes together; None where none may be made."""
    own = next(iter(control_groups()), None)
    if own is None:
        yield None
        return
    group = ControlGroup(own.folder / f"bench-{os.getpid()}", own.version)
    made = False
    with suppress(OSError):  # not allowed, or without the controller
        group.folder.mkdir()
        group.set_limit(limit)
        made = True
    try:
        yield group if made else None
    finally:
        with suppress(OSError):
            group.folder.rmdir()


def inside(group: ControlGroup | None, command: Sequence[str]) -> list[str]:
    """The command, to be run as a member of the group."""
    if group is None:
        return list(command)
    return ["sh", "-c", f'echo $$ > "{group.folder}/cgroup.procs" && exec "$@"', "sh", *command]


class Neighbour:
    """With every step of a training takes memory, until `least` bytes are left for it; holds it, frees it, and again.

    In `group` with the training, or on the whole machine without. `turns`: how often it began to take.
    """

    def __init__(self, budget: int, least: int, group: ControlGroup | None) -> None:
        self.turns = 0
        self._budget, self._least, self._group, self._held = budget, least, group, 0
        most = int(ROOM * budget) if group is not None else psutil.virtual_memory().total
        command = inside(group, [sys.executable, "-S", "-c", _HOG, str(most)])
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self._stop = Event()
        self._thread: Thread | None = None

    def __enter__(self) -> Neighbour:
        return self

    def begin(self, pid: int, log: Path) -> None:
        """Press the process, whose steps appear in `log`."""
        if self._thread is None:
            self._thread = Thread(target=self._press, args=(psutil.Process(pid), log), daemon=True)
            self._thread.start()

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
        status = self._process.poll()
        self._process.kill()
        self._process.wait()
        if status is not None:
            raise RuntimeError(f"the neighbour was ended (status {status}), and what followed was not beside it")

    def _press(self, other: psutil.Process, log: Path) -> None:
        steps = self._steps(log)
        with suppress(psutil.Error, StopIteration, BrokenPipeError, ValueError):  # one of the two has ended
            while True:
                self.turns += 1
                self._leave(other, self._budget)  # so far the other cannot notice
                while self._leave(other, self._least, int(PIECE * self._budget)):
                    next(steps)
                for _ in range(HELD):
                    next(steps)
                self._leave(other, int(PLENTY * self._budget))
                for _ in range(PLENTIFUL):
                    next(steps)

    def _leave(self, other: psutil.Process, amount: int, piece: int | None = None) -> bool:
        """Take or free until the other process could hold `amount`; whether all of a `piece` was wanted."""
        assert self._process.stdin and self._process.stdout
        more = other.memory_info().rss + self._free() - amount
        taken = more if piece is None else min(more, piece)
        self._process.stdin.write(f"{max(self._held + taken, 0) // 4096 * 4096}\n")
        self._process.stdin.flush()
        self._held = int(self._process.stdout.readline())
        return piece is not None and more > piece

    def _steps(self, log: Path) -> Iterator[None]:
        """One for each step that comes into the log, until there is no more to come."""
        with log.open() as lines:
            while not self._stop.is_set():
                if '"step"' in lines.readline():
                    yield
                else:
                    self._stop.wait(POLL_SECONDS)

    def _free(self) -> int:
        """Bytes that the group, or the machine, still has; pages of files are given back when others want them."""
        if self._group is None:
            return int(psutil.virtual_memory().available)
        return int(ROOM * self._budget) - self._group.used()

"""Training by several processes: what they tell each other before a step, so that all of them take the same one.

Every message goes through `gather`. A process that has ended, or that is about something else, is noticed there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol, TypeVar

from torch import distributed

from lofi_fast.errors import InputError
from lofi_fast.memory.meter import Memory

T = TypeVar("T")
TIMEOUT_SECONDS = 900.0  # after which a process that does not answer is given up


class LostProcess(InputError):
    """Another process has ended, or does not answer."""


def several() -> bool:
    """Whether this process is one of several that train together."""
    return distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1


@contextmanager
def answered() -> Iterator[None]:
    """Raises LostProcess when an exchange with the other processes in this block fails."""
    try:
        yield
    except RuntimeError as error:
        said = str(error).partition("\n")[0]
        reason = (said.partition("] ")[2] or said).partition(". ")[0]  # after its place in the code, without advice
        raise LostProcess(
            f"process {distributed.get_rank()} has lost another of the {distributed.get_world_size()} processes, which "
            f"has ended or did not answer within {TIMEOUT_SECONDS / 60:.0f} minutes ({reason}); its own output says why"
        ) from None


def gather(about: str, mine: T, group: distributed.ProcessGroup | None = None) -> list[T]:
    """The value of every process, in the order of their ranks; values are pickled. `about` is the same in all of them.

    `group` None: the processes answer within `TIMEOUT_SECONDS`. Raises LostProcess when one has ended or does not
    answer, and InputError when one of them is about something else.
    """
    if not several():
        return [mine]
    told: list[tuple[str, T] | None] = [None] * distributed.get_world_size()
    with answered():
        distributed.all_gather_object(told, (about, mine), group=group)
    values = [value for value in told if value is not None]
    if len({topic for topic, _ in values}) > 1:
        topics = ", ".join(f"process {rank}: {topic}" for rank, (topic, _) in enumerate(values))
        raise InputError(f"the processes are not at the same point any more ({topics}); go on with --resume")
    return [value for _, value in values]


def highest_of_all(value: int) -> int:
    """The largest of all processes' values."""
    return max(gather("the largest", value))


def lowest_of_all(value: int) -> int:
    """The smallest of all processes' values."""
    return min(gather("the smallest", value))


def agree(mine: int, fits: Callable[[int], bool], count: int) -> int:
    """The index of the plan that all processes run, of `count` plans, best first; `count` when no plan fits everywhere.

    It is the first that is no better than any process's own choice (`mine`) and that `fits` in all of them. In a single
    process it is `mine`.
    """
    if not several():
        return mine
    agreed = highest_of_all(mine)
    while True:
        mine = next((i for i in range(agreed, count) if fits(i)), count)
        lower = highest_of_all(mine)
        if lower == agreed:
            return agreed
        agreed = lower


class Readable(Protocol):
    """What is read of a meter, in bytes; see `memory.meter.Meter`."""

    def total(self) -> int: ...

    def reading(self) -> Memory: ...

    def held(self) -> int: ...


@dataclass(frozen=True)
class _Own:
    """What one process reads, in bytes."""

    base: int  # what it holds, without the frames that are decoded ahead
    room: int  # what it could hold beyond that


class SharedGauge:
    """What the processes read of their memory, taken together: all get the same numbers, of which a governor in each
    of them makes the same decisions.

    What is held is the most that any process holds. What could be held beyond it is the least that any of them could
    add. All processes have to ask at the same points.

    Args:
        meter: of this process.
        pending: bytes of the frames that are decoded ahead in this process; they are taken off what is held.
        sharers: how many processes live on the memory that this one reads, and share what is free of it.
    """

    def __init__(self, meter: Readable, pending: Callable[[], int], sharers: int) -> None:
        self._meter, self._pending, self._sharers = meter, pending, sharers
        try:
            total = meter.total()
        except Exception:  # a driver's library may raise anything
            total = 0
        self._total = lowest_of_all(total)  # 0: one of them does not know
        self._own = _Own(0, 0)
        self._most = 0  # of the bases of all processes, when they were last read

    def total(self) -> int:
        return self._total

    def reading(self) -> Memory:
        everyone = self._read("memory")
        return Memory(own=self._most, held=self._most, free=min(one.room for one in everyone))

    def held(self) -> int:
        self._read("memory held")
        return self._most

    def peak_of_all(self, mine: int | None) -> int | None:
        """The peak of a step that leads to the right plan in every process: what the step added in the one where it
        added most, on top of the most that any held before. None where one process has none, since memory ran out.
        """
        added = gather("peak of a step", None if mine is None else mine - self._own.base)
        known = [one for one in added if one is not None]
        return self._most + max(known) if len(known) == len(added) else None

    def _read(self, about: str) -> list[_Own]:
        """Of all processes. Raises RuntimeError in all when one of them could not read its own."""
        own, problem = None, ""
        try:
            memory = self._meter.reading()
            base = max(memory.held - self._pending(), 0)
            own = _Own(base, memory.own - base + memory.free // self._sharers)
        except Exception as error:  # as above
            problem = f"{type(error).__name__}: {error}"
        everyone = [one for one, _ in gather(about, (own, problem))]
        known = [one for one in everyone if one is not None]
        if own is None or len(known) < len(everyone):
            raise RuntimeError(problem or f"in process {everyone.index(None)}")
        self._own, self._most = own, max(one.base for one in known)
        return known

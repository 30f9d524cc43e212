"""Planning by running, where no ledger says what a step needs, or not closely enough.

`highest_fitting` is for a few candidates: it runs them until it knows the highest that fits the budget.
`highest_predicted` spares it those of which a ledger tells whether they fit. `learn_ledger` is for the joint stage,
whose governor chooses again at every step among hundreds of plans: it runs two of them and draws a line through what
they took, which the governor then uses in place of a ledger. Its trials, its margin and its retries make up for what a
straight line does not know.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Generic, Protocol

from lofi_fast.budget import gigabytes
from lofi_fast.errors import InputError
from lofi_fast.memory.meter import STEP, Meter
from lofi_fast.memory.plans import PRIOR, Plan, T

MARGIN = 0.05  # of the budget, kept free: what one and the same step's peak was seen to vary by
PATIENCE = 6  # readings after which lines are no longer trusted, and what is left is halved
SECOND_TRIES = 3  # plans that are tried for the second reading of a line, each smaller than the one before


# A few candidates


@dataclass(frozen=True)
class Reading(Generic[T]):
    """One candidate that was run: its peak in bytes, or None when memory ran out under the cap."""

    candidate: T
    peak: int | None


@dataclass(frozen=True)
class Choice(Generic[T]):
    candidate: T
    peak: int  # measured; predicted where there are no readings
    readings: tuple[Reading[T], ...]  # in the order they were taken


def highest_predicted(
    candidates: Sequence[T], ledger: Callable[[T], int], limit: int, held: int, refusal: str, late: bool = False
) -> tuple[Choice[T] | None, Sequence[T]]:
    """What arithmetic tells: (the choice, or None where steps have to be run for it, the candidates that may fit).

    `ledger` gives the bytes of tensors that a candidate adds to the `held` ones. Those whose tensors alone are too much
    are out. The highest of the others is the choice if it leaves the margin free by the careful assumptions with which
    the joint stage plans its first trial. Raises InputError, ending with `refusal`, where all are out. `late`: as in
    `highest_fitting`.
    """
    room = int(limit * (1 - MARGIN))
    possible = [candidate for candidate in candidates if held + ledger(candidate) <= (limit if late else room)]
    if not possible:
        raise InputError(
            f"nothing fits: of a budget of {gigabytes(limit)}, {gigabytes(room)} can be planned with, and the "
            f"smallest step ({candidates[-1]}) needs at least {gigabytes(held + ledger(candidates[-1]))}; {refusal}"
        )
    peak = held + PRIOR.careful.added(ledger(possible[0]))
    return (Choice(possible[0], peak, ()) if peak <= room else None), possible


def highest_fitting(
    candidates: Sequence[T],
    cost: Callable[[T], float],
    measure: Callable[[T], int | None],
    budget: int,
    held: int,
    refusal: str,
    late: bool = False,
) -> Choice[T]:
    """The highest of `candidates` (highest first) whose measured peak is under the budget less the margin.

    The search starts at the lowest candidate, goes where a straight line through its readings says that the budget
    ends, and closes in. The line only proposes: what is chosen has been run, because memory does not simply grow with
    pixels (libraries change their convolution algorithms).

    `cost` orders them (Omega, or a batch size); `measure` runs one and gives its peak in bytes, None for out of
    memory; `held` is what the process holds before any. The rung above the choice was run and did not fit, or the
    readings say that running it would pass the budget, or there is none. Raises InputError, ending with `refusal`,
    when not even the lowest fits. `late`: the training is under way, and the lowest may use the margin too.
    """
    limit = int(budget * (1 - MARGIN))
    rising = list(reversed(candidates))
    peaks: dict[int, int | None] = {}

    def fits(index: int) -> bool:
        peaks[index] = measure(rising[index])
        peak = peaks[index]
        return peak is not None and peak <= limit

    if not fits(0):
        peak = peaks[0]
        if late and peak is not None and peak <= budget:
            return Choice(rising[0], peak, (Reading(rising[0], peak),))
        needs = "more than that" if peak is None else f"{gigabytes(peak)}"
        raise InputError(
            f"nothing fits: of a budget of {gigabytes(budget)}, {gigabytes(limit)} can be planned with, and the "
            f"smallest step ({rising[0]}) needs {needs}; {refusal}"
        )
    good, bad = 0, len(rising)
    while bad - good > 1:
        readings = [(cost(rising[i]), p) for i, p in peaks.items() if p is not None]
        predicted = {i: _line([(0.0, held), *readings], cost(rising[i])) for i in range(good + 1, bad)}
        index = max((i for i, peak in predicted.items() if peak <= limit), default=good + 1)
        if len(peaks) > PATIENCE:
            index = (good + bad) // 2
        if predicted[index] > budget:
            index = good + 1
        if predicted[index] > budget:
            break
        if fits(index):
            good = index
        else:
            bad = index
    peak = peaks[good]
    assert peak is not None
    return Choice(rising[good], peak, tuple(Reading(rising[i], p) for i, p in peaks.items()))


def _line(points: list[tuple[float, int]], cost: float) -> float:
    """Peak at `cost` on the straight line through the two dearest readings."""
    (x0, y0), (x1, y1) = sorted(points)[-2:]
    return y1 if x1 == x0 else y1 + (y1 - y0) / (x1 - x0) * (cost - x1)


# A ledger for the governor


@dataclass(frozen=True)
class Line:
    """Bytes that a step adds: fixed + for_pixel * (micro_batch * Omega)."""

    fixed: float
    for_pixel: float

    @staticmethod
    def through(first: tuple[int, int], second: tuple[int, int] | None) -> Line:
        """Through readings (micro_batch * Omega, bytes), the smaller first. Neither part is ever negative: bytes that
        grow faster than in proportion, or that are known at one size only, are taken to be in proportion.
        """
        (x, y), (more_x, more_y) = first, second or first
        slope = max(more_y - y, 0) / (more_x - x) if more_x > x else 0.0
        fixed = y - slope * x
        return Line(fixed, slope) if slope and fixed >= 0 else Line(0.0, max(y / x, more_y / more_x))


@dataclass(frozen=True)
class LearnedLedger:
    """What `learn_ledger` found: called with a plan, it gives the bytes that a step adds at its peak to the process.

    With and without recomputation each have a line of their own.
    """

    kept: Line | None
    recomputed: Line | None

    def __call__(self, plan: Plan) -> int:
        line = self.recomputed if plan.recompute else self.kept
        if line is None:
            raise ValueError(
                f"{plan}: nothing was learned about plans {'with' if plan.recompute else 'without'} recompute"
            )
        return round(line.fixed + line.for_pixel * _pixels(plan))

    def to_json(self) -> dict[str, list[float] | None]:
        """For a checkpoint: a run that goes on must plan with the same numbers."""
        lines = {"kept": self.kept, "recomputed": self.recomputed}
        return {name: None if line is None else [line.fixed, line.for_pixel] for name, line in lines.items()}

    @staticmethod
    def from_json(content: Mapping[str, Any]) -> LearnedLedger:
        lines = (content["kept"], content["recomputed"])
        return LearnedLedger(*(None if line is None else Line(*line) for line in lines))


def learn_ledger(
    plans: Sequence[Plan],
    measure: Callable[[Plan], int | None],
    held: Callable[[], int],
    limit: int,
    refusal: str,
) -> LearnedLedger:
    """Find out what steps need by running two of `plans` for each setting of recompute: the smallest, and the largest
    that fits if bytes are in proportion to pixels.

    `measure` runs a step that updates nothing and gives its peak in bytes as the process holds them, None when memory
    ran out; `held` is what the process holds between steps; `limit` is what it may hold. A line knows nothing of
    chunks: of plans that differ in their chunk alone, the first stands for all. Raises InputError, ending with
    `refusal`, when no plan's step goes through.
    """
    first_of_shape = {replace(plan, chunk=0): plan for plan in reversed(plans)}
    rising = sorted(first_of_shape.values(), key=_pixels)
    settings = {again: [plan for plan in rising if plan.recompute == again] for again in (False, True)}
    measure(min(rising, key=lambda plan: (_pixels(plan), not plan.recompute)))  # a process's first step loads code
    lines: dict[bool, Line | None] = {}
    ran = False
    for again, alike in settings.items():
        lines[again] = None
        if not alike:
            continue
        smallest, base = alike[0], held()
        peak = measure(smallest)
        if peak is None:  # all that is known is that it needs more than there is
            lines[again] = Line(0.0, limit / _pixels(smallest))
            continue
        ran = True
        first = (_pixels(smallest), max(peak - base, 1))
        second = _second_reading(alike, measure, base, int(limit * (1 - MARGIN)) - base, first)
        lines[again] = Line.through(first, second)
    if not ran:
        raise InputError(
            f"nothing fits: the smallest step ({rising[0]}) needs more than the {gigabytes(limit)} that can be had; "
            f"{refusal}"
        )
    return LearnedLedger(lines[False], lines[True])


def _second_reading(
    rising: Sequence[Plan], measure: Callable[[Plan], int | None], base: int, room: int, first: tuple[int, int]
) -> tuple[int, int] | None:
    """(micro_batch * Omega, bytes) of the largest plan that should fit in `room`; None where no larger one does."""
    pixels, added = first
    larger = [plan for plan in rising if pixels < _pixels(plan) <= room * pixels / added]
    for _ in range(SECOND_TRIES):
        if not larger:
            return None
        peak = measure(larger[-1])
        if peak is not None:
            return _pixels(larger[-1]), max(peak - base, 1)
        larger = larger[: len(larger) // 2]
    return None


def _pixels(plan: Plan) -> int:
    return plan.micro_batch * plan.omega


# Running steps


class LogReading(Protocol):
    def __call__(self, plan: str, candidate: object, peak: int | None, limit: int) -> None:
        """One trial step of a plan: its peak in bytes under a cap of `limit`, None when memory ran out."""


class LogChoice(Protocol):
    def __call__(self, plan: str, choice: Choice[Any], limit: int, seconds: float) -> None:
        """What was chosen with `limit` bytes to be had, after so many seconds of trials."""


@dataclass(frozen=True)
class Trials:
    """Plans by running steps on a device, within a budget in bytes."""

    meter: Meter
    budget: int
    log_reading: LogReading
    log_choice: LogChoice

    def measure(self, step: Callable[[], None], limit: int) -> int | None:
        """Peak bytes of `step` run under a cap of `limit`, or None when it ran out of memory."""
        self.meter.release()
        self.meter.reset_peak()
        failed = False
        with self.meter.settle(STEP), self.meter.cap(limit):
            try:
                step()
            except Exception as error:
                if not self.meter.ran_out(error):
                    raise
                failed = True  # the traceback holds tensors: leave the except block before going on
        peak = self.meter.peak()
        if failed:
            self.meter.release()  # or what the broken step leaves in the allocator would count as the process's own
        return None if failed else peak

    def highest_fitting(
        self, name: str, candidates: Sequence[T], cost: Callable[[T], float], step: Callable[[T], None], refusal: str,
        late: bool = False, ledger: Callable[[T], int] | None = None,
    ) -> Choice[T]:  # fmt: skip
        """The highest of `candidates` whose step fits the budget: by its `ledger`, where there is one and arithmetic
        can tell, and else run for real; see the functions `highest_predicted` and `highest_fitting`.

        `name` is the plan's in the log. Raises InputError, ending with `refusal`, when nothing fits.
        """
        began = time.monotonic()
        self.meter.release()
        limit = min(self.budget, self.meter.available())
        if (own := self.meter.own()) >= limit:
            raise InputError(
                f"nothing fits: before its first step this process holds {gigabytes(own)} of a budget of "
                f"{gigabytes(limit)}; {refusal}"
            )
        if ledger is not None:
            told, candidates = highest_predicted(candidates, ledger, limit, own, refusal, late)
            if told is not None:
                self.log_choice(name, told, limit, time.monotonic() - began)
                return told
        caps = iter((self.meter.available(),))  # the first and lowest runs freely: a refusal can then say its need

        def measure(candidate: T) -> int | None:
            peak = self.measure(lambda: step(candidate), next(caps, limit))
            self.log_reading(name, candidate, peak, limit)
            return peak

        choice = highest_fitting(candidates, cost, measure, limit, own, refusal, late)
        self.log_choice(name, choice, limit, time.monotonic() - began)
        return choice

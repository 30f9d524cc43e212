"""Planning by running: the highest candidate whose step, run for real, fits the budget."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic

from lofi_fast.budget import gigabytes
from lofi_fast.errors import InputError
from lofi_fast.memory.plans import T

MARGIN = 0.05  # of the budget, kept free: what one and the same step's peak was seen to vary by
PATIENCE = 6  # readings after which lines are no longer trusted, and what is left is halved


# Planning by running


@dataclass(frozen=True)
class Reading(Generic[T]):
    """One candidate that was run: its peak in bytes, or None when memory ran out under the cap."""

    candidate: T
    peak: int | None


@dataclass(frozen=True)
class Choice(Generic[T]):
    candidate: T
    peak: int
    readings: tuple[Reading[T], ...]  # in the order they were taken


def highest_fitting(
    candidates: Sequence[T],
    cost: Callable[[T], float],
    measure: Callable[[T], int | None],
    budget: int,
    held: int,
    refusal: str,
) -> Choice[T]:
    """The highest of `candidates` (highest first) found to have a measured peak under the budget less the margin.

    `cost` orders them (Omega, or a batch size); `measure` runs one and gives its peak in bytes, None for out of
    memory; `held` is what the process holds before any. The rung above the choice was run and did not fit, or the
    readings say that running it would pass the budget, or there is none. Raises InputError, ending with `refusal`,
    when not even the lowest fits.
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

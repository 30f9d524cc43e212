"""The plan: which rung of a ladder fits the budget. Pure: what a rung needs is told by a function that runs it.

This first planner measures by running: it climbs from the lowest rung, jumps to where a straight line through its
readings says the budget ends, and closes in until the rung above is known not to fit. A line only proposes; what is
chosen has been run. (Memory is not monotone in pixels: convolution algorithms change.)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from lofi_fast.config import Budget
from lofi_fast.errors import InputError

T = TypeVar("T")
MARGIN = 0.05  # of the budget, kept free: what one and the same step's peak was seen to vary by
AUTO_SHARE = 0.9  # of what is free, for --mem-budget auto


def resolve_budget(budget: Budget, total: int, available: int) -> int:
    """Bytes of a budget on a device of `total` bytes with `available` for this process now."""
    if budget.amount is not None:
        return budget.amount
    if budget.share is not None:
        return round(budget.share * total)
    return round(AUTO_SHARE * available)


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


def gigabytes(amount: int) -> str:
    return f"{amount / 1e9:.2f} GB"


def highest_fitting(
    candidates: Sequence[T],
    cost: Callable[[T], float],
    measure: Callable[[T], int | None],
    budget: int,
    refusal: str,
) -> Choice[T]:
    """The highest of `candidates` (highest first) whose measured peak stays under the budget less the margin.

    `cost` orders them (Omega, or a batch size); `measure` runs one and gives its peak in bytes, None for out of
    memory. The rung above the choice was run and does not fit, or does not exist. Raises InputError, ending with
    `refusal`, when not even the lowest fits.
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
        target = _propose([(cost(rising[i]), p) for i, p in peaks.items() if p is not None], limit)
        inside = range(good + 1, bad)
        index = max((i for i in inside if cost(rising[i]) <= target), default=good + 1)
        if len(peaks) > 4:  # the line has had its chances: halve what is left
            index = (good + bad) // 2
        if fits(index):
            good = index
        else:
            bad = index
    peak = peaks[good]
    assert peak is not None
    return Choice(rising[good], peak, tuple(Reading(rising[i], p) for i, p in peaks.items()))


def _propose(points: list[tuple[float, int]], limit: int) -> float:
    """The cost at which a line through the two dearest readings meets `limit`; with one reading, 4 times its cost."""
    points = sorted(points)
    if len(points) < 2 or points[-1][0] == points[-2][0]:
        return 4 * points[-1][0]
    (x0, y0), (x1, y1) = points[-2:]
    slope = (y1 - y0) / (x1 - x0)
    return float("inf") if slope <= 0 else x1 + (limit - y1) / slope

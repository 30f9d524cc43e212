"""What other processes hold of a card through a day: made up in six manners, or read from a recording.

A trace is a step function of time. Made-up ones are of what the others *leave*, as a position between `low` and `high`
(bytes; 0 and 1, equal distances are equal factors), so that one manner presses small and large networks alike.
"""

from __future__ import annotations

import csv
import itertools
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from lofi_fast.errors import InputError

DAY = 86_400.0  # seconds that a made-up trace lasts
RIPPLE = 0.01  # of what is left: nobody holds exactly the same for a day
Changes = Iterator[tuple[float, float]]  # (seconds since the one before, position from now on)


@dataclass(frozen=True)
class Trace:
    """From `times[i]` on others hold `held[i]` bytes; after `seconds` it begins anew. `times` rise, the first is 0."""

    times: NDArray[np.float64]
    held: NDArray[np.int64]
    seconds: float

    def at(self, time: float) -> int:
        """Bytes that others hold at a moment."""
        return int(self.held[np.searchsorted(self.times, time % self.seconds, "right") - 1])

    def window(self, time: float, seconds: float) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
        """The changes in [time, time + seconds]: seconds since `time`, the first 0, and the bytes from then on."""
        start = time % self.seconds
        first = int(np.searchsorted(self.times, start, "right")) - 1
        last = int(np.searchsorted(self.times, min(start + seconds, self.seconds), "right"))
        offsets, held = np.maximum(self.times[first:last] - start, 0.0), self.held[first:last]
        rest = start + seconds - self.seconds
        if rest <= 0:
            return offsets, held
        more, later = self.window(0.0, min(rest, self.seconds / 2))
        return np.concatenate([offsets, self.seconds - start + more]), np.concatenate([held, later])

    def next_change(self, time: float) -> float:
        """The first moment after `time` from which others may hold another amount."""
        start = time % self.seconds
        index = int(np.searchsorted(self.times, start, "right"))
        return time - start + (float(self.times[index]) if index < len(self.times) else self.seconds)

    def most(self, time: float, seconds: float) -> int:
        """The largest amount in [time, time + seconds]."""
        return int(self.window(time, seconds)[1].max())

    def below(self, most: int) -> Trace:
        """The same with no more than `most` bytes at any time."""
        return Trace(self.times, np.minimum(self.held, most), self.seconds)


def recorded(path: Path) -> Trace:
    """A trace from lines of `seconds,bytes`, the seconds rising; a first line of words is passed over.

    The last amount is held as long as the one before it. Raises InputError with the line that cannot be read.
    """
    try:
        lines = list(csv.reader(path.read_text(encoding="utf-8-sig").splitlines()))
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"--trace {path}: cannot be read ({error})") from error
    found: list[tuple[float, float]] = []
    for number, line in enumerate(lines, start=1):
        if not line or (number == 1 and not line[0].strip()[:1].isdigit()):
            continue
        try:
            time, held = map(float, line)
            if not (0 <= held < 1e15 and math.isfinite(time)) or (found and time <= found[-1][0]):
                raise ValueError
        except ValueError:
            raise InputError(f"--trace {path}:{number}: not `seconds,bytes` with rising seconds: {line}") from None
        found.append((time, held))
    if len(found) < 2:
        raise InputError(f"--trace {path}: give at least two lines of `seconds,bytes`")
    times = np.array([time for time, _ in found]) - found[0][0]
    return Trace(times, np.array([held for _, held in found], dtype=np.int64), 2 * times[-1] - times[-2])


def made_up(manner: str, seed: int, total: int, low: float, high: float) -> Trace:
    """A day of one of `MANNERS` on a card of `total` bytes."""
    rng = np.random.default_rng([seed, list(MANNERS).index(manner)])
    times, positions = [0.0], [1.0]
    for wait, position in MANNERS[manner](rng):
        if times[-1] + wait >= DAY:
            break
        if wait:
            times.append(times[-1] + wait)
            positions.append(position)
        else:
            positions[-1] = position
    left = low * (high / low) ** np.array(positions) * rng.uniform(1 - RIPPLE, 1 + RIPPLE, len(positions))
    return Trace(np.array(times), np.clip(total - left, 0, total).astype(np.int64), DAY)


def _steady(rng: np.random.Generator) -> Changes:
    """Somebody holds the same all day."""
    return zip(itertools.chain([0.0], itertools.repeat(30.0)), itertools.repeat(0.55), strict=False)


def _spikes(rng: np.random.Generator) -> Changes:
    """Much is left, but for seconds to a minute and a half every seven minutes or so."""
    while True:
        yield rng.exponential(400.0), rng.uniform(0.0, 0.8)
        yield rng.uniform(5.0, 90.0), 1.0


def _leak(rng: np.random.Generator) -> Changes:
    """Somebody loses memory for three hours, is ended, and starts again."""
    while True:
        yield from ((10.0, position) for position in np.linspace(1.0, 0.1, 1080))
        yield 10.0, 1.0
        yield 290.0, 1.0


def _sleeper(rng: np.random.Generator) -> Changes:
    """A notebook: works for twenty minutes or so, sleeps for half an hour or so."""
    while True:
        yield rng.exponential(1800.0), 0.35
        for _ in range(int(rng.exponential(20.0))):
            yield 60.0, rng.uniform(0.3, 0.4)
        yield 60.0, 1.0


def _jobs(rng: np.random.Generator) -> Changes:
    """Jobs that come as a Poisson process, load for 20 seconds, hold, and go: some two at a time."""
    changes: list[tuple[float, float]] = []
    start = 0.0
    while (start := start + rng.exponential(750.0)) < DAY:
        size, end = rng.lognormal(math.log(0.2), 0.5), start + 20 + rng.exponential(1500.0)
        changes += [(start + second, -size / 8) for second in np.linspace(0, 20, 8)]
        changes.append((end, size))
    now = level = 0.0
    for time, change in sorted(changes):
        level += change
        yield time - now, max(1.0 + level, 0.05)
        now = time


def _trainer(rng: np.random.Generator) -> Changes:
    """Another training that gives back after each step of its own, and evaluates every half hour with little."""
    while True:
        for _ in range(int(1800 / 2.7)):
            period = rng.uniform(2.4, 3.0)
            yield 0.3 * period, 0.65
            yield 0.3 * period, 0.55
            yield 0.4 * period, 0.75
        yield 0.1, 0.9
        yield 120.0, 0.75


MANNERS: dict[str, Callable[[np.random.Generator], Iterable[tuple[float, float]]]] = {
    "steady": _steady, "spikes": _spikes, "leak": _leak, "sleeper": _sleeper, "jobs": _jobs, "trainer": _trainer,
}  # fmt: skip

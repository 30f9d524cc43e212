"""Fidelity: how much of a video one training step looks at, and the ladder of lower fidelities (LoFi, section 3).

A fidelity is (num_snippets L, side); a mini-batch costs Omega = L * side^2 for each video. A pattern says where a cut
k = Omega_full / Omega is taken from: pixels (spatial), snippets (temporal) or both (spatio_temporal). The cyclic
pattern visits the three in turn.

`ladder` has the rungs of the method, `offered` those of them that the planner takes when nobody names one: a network
that halves its images rounds up, so that a pixel costs up to twice as much at some sides as at others (`pixel_cost`).

The temporal pattern may fall to a few snippets, on which few actions have a proposal that covers them well. There is no
floor, because it would take cut 4, the paper's, from presets with few snippets; `--max-cut` sets one.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from functools import lru_cache
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

FRAMES_PER_SNIPPET = 8
MIN_SIDE = 16  # below this the last ResNet stage sees less than one pixel
MAX_CUT = 16.0
PAPER_CUT = 4.0
LARGEST_STEP = 0.1  # of Omega, from one rung to the next, where whole snippets and even pixels allow it
HALVINGS = (4, 8, 16, 32)  # pixels of a frame to one of an activation, in the four stages of a ResNet
SIDES = 8  # sides that are offered are multiples of it
DEAREST = 1.25  # the most that a pixel costs at a side that is offered: at 32 and multiples of 16 above at most 1.2


class Pattern(StrEnum):
    """Where the cut is taken from; the names are the paper's S-, T-, ST- and C-LoFi."""

    SPATIAL = "spatial"
    TEMPORAL = "temporal"
    SPATIO_TEMPORAL = "spatio_temporal"
    CYCLIC = "cyclic"


CYCLE = (Pattern.SPATIAL, Pattern.TEMPORAL, Pattern.SPATIO_TEMPORAL)


@dataclass(frozen=True, order=True)
class Fidelity:
    """`num_snippets` L snippets of 8 frames, each frame `side` x `side` pixels."""

    num_snippets: int
    side: int

    @property
    def omega(self) -> int:
        """L * side^2, the paper's cost of one video."""
        return self.num_snippets * self.side**2

    @property
    def num_frames(self) -> int:
        return self.num_snippets * FRAMES_PER_SNIPPET

    def __str__(self) -> str:
        return f"{self.num_snippets} snippets x {self.side} px"


def _even(pixels: float) -> int:
    return 2 * round(pixels / 2)


def rung(pattern: Pattern, full: Fidelity, cut: float) -> Fidelity:
    """The fidelity of cut k: spatial (L, side/sqrt k), temporal (L/k, side), spatio_temporal (L/sqrt k, side/k^(1/4)).

    Sides are rounded to even pixels. At k=4 and (100, 224) these are the paper's (100, 112), (25, 224), (50, 158).
    """
    length, side = full.num_snippets, full.side
    if pattern is Pattern.SPATIAL:
        return Fidelity(length, _even(side / math.sqrt(cut)))
    if pattern is Pattern.TEMPORAL:
        return Fidelity(round(length / cut), side)
    if pattern is Pattern.SPATIO_TEMPORAL:
        return Fidelity(round(length / math.sqrt(cut)), _even(side / cut**0.25))
    raise ValueError("the cyclic pattern has no rung of its own: ask for one of its three phases")


@lru_cache(maxsize=64)
def ladder(pattern: Pattern, full: Fidelity, min_cut: float = 1.0, max_cut: float = MAX_CUT) -> tuple[Fidelity, ...]:
    """A pattern's fidelities from the highest (cut `min_cut`) down to `max_cut`, in steps of at most 10% of Omega.

    The paper's cut of 4 is met exactly where it lies between. Rungs that rounding makes equal are listed once; rungs
    under 2 snippets or MIN_SIDE pixels are left out, but the highest is always there.
    """
    landmarks = sorted({min_cut, max_cut, *({PAPER_CUT} if min_cut < PAPER_CUT < max_cut else ())})
    chosen: dict[Fidelity, None] = {}
    for low, high in zip(landmarks, landmarks[1:] or landmarks, strict=False):
        chosen |= dict.fromkeys(_thinned(list(dict.fromkeys(rung(pattern, full, cut) for cut in _cuts(low, high)))))
    usable = [f for f in chosen if f.num_snippets >= 2 and f.side >= MIN_SIDE]
    return tuple(usable or list(chosen)[:1])


def pixel_cost(side: int) -> float:
    """What a pixel costs in multiplications where frames of `side` x `side` pixels are halved five times, rounding up,
    with as much work in each of the four last sizes, as in a ResNet: 1 at multiples of 32, 1.75 at 16, 2 at 34.
    """
    return sum((step * -(-side // step) / side) ** 2 for step in HALVINGS) / len(HALVINGS)


@lru_cache(maxsize=64)
def offered(pattern: Pattern, full: Fidelity, min_cut: float = 1.0, max_cut: float = MAX_CUT) -> tuple[Fidelity, ...]:
    """The rungs among which the planner chooses by itself, highest first: the first, the last and the paper's cut of 4
    as in the `ladder` of the same arguments, and between them sides at which a pixel costs about as much as elsewhere:
    multiples of 8 within `DEAREST`. Snippets are as many as the pattern has there. Steps are larger than those of the
    ladder where there is no such side.
    """
    every = ladder(pattern, full, min_cut, max_cut)
    if pattern is Pattern.TEMPORAL:
        return every
    named = [every[0], every[-1]]
    if min_cut < PAPER_CUT < max_cut and (paper := rung(pattern, full, PAPER_CUT)) in every[1:-1]:
        named.insert(1, paper)
    chosen: dict[Fidelity, None] = {}
    for high, low in pairwise(named):
        fair = [side for side in range(low.side, high.side + 1) if side % SIDES == 0 and pixel_cost(side) <= DEAREST]
        exact = _cuts(full.omega / high.omega, full.omega / low.omega) if fair else []
        near = [_nearest(rung(pattern, full, cut), fair) for cut in exact]
        between = [one for one in dict.fromkeys(near) if low.omega < one.omega < high.omega]
        chosen |= dict.fromkeys(_thinned([high, *between, low]))
    return tuple(chosen)


def _nearest(exact: Fidelity, sides: Sequence[int]) -> Fidelity:
    return Fidelity(exact.num_snippets, min(sides, key=lambda side: abs(side - exact.side)))


def _cuts(low: float, high: float) -> list[float]:
    """So many, from `low` to `high`, that no rung between them is missed."""
    steps = math.ceil(1000 * math.log2(high / low)) if high > low else 0
    cuts: list[float] = np.geomspace(low, high, 1 + steps).tolist()
    return cuts


def _thinned(rungs: list[Fidelity]) -> list[Fidelity]:
    """First, last, and just as many between them that no step is larger than it has to be."""
    kept = rungs[:1]
    for candidate, following in pairwise(rungs):
        if following.omega < (1 - LARGEST_STEP) * kept[-1].omega and candidate != kept[-1]:
            kept.append(candidate)
    return list(dict.fromkeys([*kept, rungs[-1]]))


def phase(pattern: Pattern, epoch: int, step: int, short_cycle: int | None) -> Pattern:
    """The pattern of one step. Cyclic: S, T, ST in turn, a switch every epoch (the paper's long cycle, its default)
    or, with `short_cycle`, every that many steps counted from the start of the stage.
    """
    if pattern is not Pattern.CYCLIC:
        return pattern
    return CYCLE[(epoch if short_cycle is None else step // short_cycle) % len(CYCLE)]


def coinciding(rungs: Mapping[str, Fidelity]) -> str | None:
    """A sentence where patterns of a cycle have the same rung, so that nothing changes from one to the other; `rungs`
    by pattern.
    """
    by_rung: dict[Fidelity, list[str]] = {}
    for pattern, chosen in rungs.items():
        by_rung.setdefault(chosen, []).append(pattern)
    same = [f"{' and '.join(patterns)} have the same rung, {of}" for of, patterns in by_rung.items() if patterns[1:]]
    if not same:
        return None
    return f"{'; '.join(same)}: nothing changes between them. --min-cut 4 trains at the paper's cut, where they differ"


def select_snippets(full: int, num_snippets: int) -> NDArray[np.int64]:
    """Indices of `num_snippets` of the `full` snippets, nearest to equally spaced centres; all of them when equal.

    Every rung is thus a sub-selection of one grid, so that one frame cache serves every fidelity. The head works with
    the true times of the snippets chosen.
    """
    centres = (np.arange(num_snippets) + 0.5) * full / num_snippets - 0.5
    return np.floor(centres + 0.5).astype(np.int64).clip(0, full - 1)

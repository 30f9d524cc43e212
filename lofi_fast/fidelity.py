"""Fidelity: how much of a video one training step looks at, and the ladder of lower fidelities (LoFi, section 3).

A fidelity is (num_snippets L, side); a mini-batch costs Omega = L * side^2 for each video. A pattern says where a cut
k = Omega_full / Omega is taken from: pixels (spatial), snippets (temporal) or both (spatio_temporal). The cyclic
pattern visits the three in turn.

The temporal pattern may fall to a few snippets, on which few actions have a proposal that covers them well. There is no
floor, because it would take cut 4, the paper's, from presets with few snippets; `--max-cut` sets one.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
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
        cuts = np.geomspace(low, high, 1 + math.ceil(1000 * math.log2(high / low)) if high > low else 1)
        chosen |= dict.fromkeys(_thinned(list(dict.fromkeys(rung(pattern, full, float(cut)) for cut in cuts))))
    usable = [f for f in chosen if f.num_snippets >= 2 and f.side >= MIN_SIDE]
    return tuple(usable or list(chosen)[:1])


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

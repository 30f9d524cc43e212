"""Ladders and cycles: the paper's arithmetic, and that a step down a ladder is never larger than it has to be."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lofi_fast.fidelity import CYCLE, MIN_SIDE, Fidelity, Pattern, coinciding, ladder, phase, rung, select_snippets
from lofi_fast.presets import PRESETS

PAPER = Fidelity(100, 224)
FULLS = sorted({preset().full for preset in PRESETS.values()})
NAMES = [f"{full.num_snippets}x{full.side}" for full in FULLS]


def reachable(pattern: Pattern, full: Fidelity) -> set[Fidelity]:
    """Every fidelity that some cut from 1 to 16 rounds to, by trying 4000 of them."""
    return {rung(pattern, full, 2 ** (i / 1000)) for i in range(4001)}


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        (Pattern.SPATIAL, Fidelity(100, 112)),
        (Pattern.TEMPORAL, Fidelity(25, 224)),
        (Pattern.SPATIO_TEMPORAL, Fidelity(50, 158)),
    ],
)
def test_cut_4_is_the_papers(pattern: Pattern, expected: Fidelity) -> None:
    assert rung(pattern, PAPER, 4.0) == expected
    assert expected in ladder(pattern, PAPER)


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        (Pattern.SPATIAL, Fidelity(100, 56)),
        (Pattern.TEMPORAL, Fidelity(6, 224)),
        (Pattern.SPATIO_TEMPORAL, Fidelity(25, 112)),
    ],
)
def test_ladder_ends_at_cut_16(pattern: Pattern, expected: Fidelity) -> None:
    assert ladder(pattern, PAPER)[0] == PAPER
    assert ladder(pattern, PAPER)[-1] == expected


def test_omega_and_frames_by_hand() -> None:
    assert Fidelity(25, 224).omega == 25 * 224 * 224 == 1_254_400
    assert Fidelity(25, 224).num_frames == 200
    assert str(Fidelity(25, 224)) == "25 snippets x 224 px"


@pytest.mark.parametrize("pattern", CYCLE)
@pytest.mark.parametrize("full", FULLS, ids=NAMES)
class TestLadders:
    def test_highest_first_and_strictly_down(self, full: Fidelity, pattern: Pattern) -> None:
        rungs = ladder(pattern, full)
        assert rungs[0] == full
        for above, below in pairwise(rungs):
            assert below.omega < above.omega
            assert below.num_snippets <= above.num_snippets and below.side <= above.side

    def test_a_step_is_at_most_a_tenth_or_the_smallest_there_is(self, full: Fidelity, pattern: Pattern) -> None:
        possible = reachable(pattern, full)
        for above, below in pairwise(ladder(pattern, full)):
            if below.omega < 0.9 * above.omega:
                assert not [f for f in possible if below.omega < f.omega < above.omega], f"{above} to {below}"

    def test_every_rung_is_one_the_pattern_can_reach(self, full: Fidelity, pattern: Pattern) -> None:
        rungs = ladder(pattern, full)
        assert set(rungs) <= reachable(pattern, full)
        assert all(f.side % 2 == 0 and f.side >= MIN_SIDE and f.num_snippets >= 2 for f in rungs)
        if pattern is Pattern.SPATIAL:
            assert {f.num_snippets for f in rungs} == {full.num_snippets}
        if pattern is Pattern.TEMPORAL:
            assert {f.side for f in rungs} == {full.side}

    def test_bounds_cut_both_ends(self, full: Fidelity, pattern: Pattern) -> None:
        rungs = ladder(pattern, full, 2.0, 8.0)
        assert rungs[0] == rung(pattern, full, 2.0)
        assert rungs[-1] == rung(pattern, full, 8.0)
        assert ladder(pattern, full, 4.0, 4.0) == (rung(pattern, full, 4.0),)


def test_a_min_cut_between_two_steps_is_the_first_rung() -> None:
    assert ladder(Pattern.TEMPORAL, PAPER, 3.0)[0] == Fidelity(33, 224)


def test_too_small_rungs_are_left_out_but_never_the_last_one_left() -> None:
    tiny = Fidelity(4, 16)
    assert ladder(Pattern.SPATIAL, tiny) == (tiny,)
    assert ladder(Pattern.TEMPORAL, tiny)[-1].num_snippets == 2
    assert ladder(Pattern.SPATIAL, tiny, 4.0) == (Fidelity(4, 8),)


def test_the_cyclic_pattern_has_no_rung_of_its_own() -> None:
    with pytest.raises(ValueError, match="phases"):
        rung(Pattern.CYCLIC, PAPER, 4.0)


def test_long_cycle_switches_by_epoch_whatever_the_step() -> None:
    names = [phase(Pattern.CYCLIC, epoch, step, None).value for epoch in range(4) for step in (0, 7)]
    assert names == ["spatial"] * 2 + ["temporal"] * 2 + ["spatio_temporal"] * 2 + ["spatial"] * 2


def test_short_cycle_switches_by_step_whatever_the_epoch() -> None:
    steps = [phase(Pattern.CYCLIC, epoch=5, step=step, short_cycle=2) for step in range(7)]
    spatial, temporal, both = CYCLE
    assert steps == [spatial, spatial, temporal, temporal, both, both, spatial]
    assert phase(Pattern.CYCLIC, 0, 15, 16) is spatial
    assert phase(Pattern.CYCLIC, 0, 16, 16) is temporal


@pytest.mark.parametrize("pattern", CYCLE)
def test_a_plain_pattern_has_one_phase(pattern: Pattern) -> None:
    assert {phase(pattern, epoch, step, 1) for epoch in range(3) for step in range(3)} == {pattern}


@pytest.mark.parametrize(
    ("full", "num_snippets", "expected"),
    [
        (8, 8, [0, 1, 2, 3, 4, 5, 6, 7]),
        (8, 4, [1, 3, 5, 7]),  # centres at 0.5, 2.5, 4.5, 6.5: halves go up
        (9, 3, [1, 4, 7]),
        (5, 2, [1, 3]),  # centres at 0.75 and 3.25
        (7, 1, [3]),
        (1, 1, [0]),
    ],
)
def test_selected_snippets_by_hand(full: int, num_snippets: int, expected: list[int]) -> None:
    chosen = select_snippets(full, num_snippets)
    assert chosen.tolist() == expected
    assert chosen.dtype == np.int64


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 300).flatmap(lambda full: st.tuples(st.just(full), st.integers(1, full))))
def test_selected_snippets_are_distinct_and_nearest_to_equal_spacing(sizes: tuple[int, int]) -> None:
    full, num_snippets = sizes
    chosen = select_snippets(full, num_snippets)
    assert len(chosen) == num_snippets
    assert np.all(np.diff(chosen) > 0)
    assert chosen[0] >= 0 and chosen[-1] < full
    for i, snippet in enumerate(chosen):
        centre = (i + 0.5) * full / num_snippets - 0.5
        assert abs(snippet - centre) <= 0.5 + 1e-9
    assert np.ptp(np.diff(chosen)) <= 1 if num_snippets > 2 else True


def test_the_largest_gap_between_selected_snippets_is_the_ratio_rounded_up() -> None:
    assert np.diff(select_snippets(100, 30)).max() == math.ceil(100 / 30)


def test_patterns_of_a_cycle_that_coincide_are_named() -> None:
    full = Fidelity(100, 224)
    assert coinciding({str(pattern): rung(pattern, full, 4) for pattern in CYCLE}) is None
    same = coinciding({str(pattern): rung(pattern, full, 1) for pattern in CYCLE})
    assert same is not None
    assert same.startswith("spatial and temporal and spatio_temporal have the same rung, 100 snippets x 224 px: ")
    assert "--min-cut 4" in same
    two = coinciding({"spatial": full, "temporal": full, "spatio_temporal": Fidelity(50, 158)})
    assert two is not None and two.startswith("spatial and temporal have the same rung")
    assert coinciding({"spatial": full}) is None

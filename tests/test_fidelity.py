"""Ladders and cycles: the paper's arithmetic, and that a step down a ladder is never larger than it has to be."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lofi_fast.config import EncoderName, PresetName
from lofi_fast.encoder.resnet_ledger import ResNetLedger
from lofi_fast.fidelity import (
    CYCLE,
    MIN_SIDE,
    Fidelity,
    Pattern,
    coinciding,
    ladder,
    offered,
    phase,
    pixel_cost,
    rung,
    select_snippets,
)
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


def literal_pixel_cost(side: int) -> float:
    """Pixels of the four last sizes when an image is halved five times, each as a share of what halving without
    rounding would leave, on average.
    """
    shares, size = [], side
    for halving in range(1, 6):
        size = size // 2 + size % 2
        if halving > 1:
            shares.append(size * size * 4**halving / side**2)
    return sum(shares) / 4


def test_a_pixel_costs_what_rounded_halves_cost() -> None:
    for side in range(MIN_SIDE, 321):
        assert pixel_cost(side) == pytest.approx(literal_pixel_cost(side), rel=1e-12)
    assert [pixel_cost(side) for side in (16, 32, 64, 96, 160, 224)] == [1.75, 1, 1, 1, 1, 1]
    within: dict[EncoderName, float] = {"tsm_r18": 0.06, "tsm_r34": 0.15, "tsm_r50": 0.15}
    for name, most in within.items():
        ledger = ResNetLedger(name)
        best = ledger.multiply_adds(224) / 224**2
        for side in range(MIN_SIDE, 226, 2):
            counted = ledger.multiply_adds(side) / side**2 / best
            assert counted == pytest.approx(pixel_cost(side), rel=most), (name, side)


@pytest.mark.parametrize("pattern", CYCLE)
@pytest.mark.parametrize("full", FULLS, ids=NAMES)
class TestWhatIsOffered:
    def test_the_ends_and_the_papers_cut_are_those_of_the_ladder(self, full: Fidelity, pattern: Pattern) -> None:
        rungs, every = offered(pattern, full), ladder(pattern, full)
        assert (rungs[0], rungs[-1]) == (every[0], every[-1]) and rung(pattern, full, 4) in rungs
        assert offered(pattern, full, 4.0, 4.0) == (rung(pattern, full, 4.0),)
        assert offered(pattern, full, 3.0, 9.0)[0] == rung(pattern, full, 3.0)

    def test_between_them_are_sides_at_which_a_pixel_costs_at_most_a_quarter_more(
        self, full: Fidelity, pattern: Pattern
    ) -> None:
        rungs = offered(pattern, full)
        named = (rungs[0], rung(pattern, full, 4), rungs[-1])
        fair = [s for s in range(MIN_SIDE, full.side + 1) if s % 8 == 0 and literal_pixel_cost(s) <= 1.25]
        for one in rungs:
            assert one in named or one.side in (fair if pattern is not Pattern.TEMPORAL else [full.side])
        for above, below in pairwise(rungs):
            assert below.omega < above.omega
            assert below.num_snippets <= above.num_snippets and below.side <= above.side
            if below.omega >= 0.9 * above.omega or pattern is Pattern.TEMPORAL:
                continue
            # A longer step jumps over no such side, and in the spatio-temporal pattern goes to a neighbour.
            over = [side for side in fair if below.side < side < above.side]
            assert not over, f"{above} to {below}"

    def test_snippets_are_those_of_the_pattern_where_its_side_is_near(self, full: Fidelity, pattern: Pattern) -> None:
        for one in offered(pattern, full):
            if pattern is Pattern.SPATIAL:
                assert one.num_snippets == full.num_snippets
            if pattern is Pattern.TEMPORAL:
                assert one in ladder(pattern, full)
            if pattern is Pattern.SPATIO_TEMPORAL:
                exact = full.side * math.sqrt(one.num_snippets / full.num_snippets)
                assert abs(one.side - exact) <= 0.25 * full.side


@pytest.mark.parametrize("name", ["activitynet", "hacs", "thumos", "actionformer_anet", "actionformer_thumos"])
def test_a_pixel_costs_about_as_much_at_every_rung_of_the_papers_presets(name: PresetName) -> None:
    config = PRESETS[name]()
    for pattern in CYCLE:
        rungs = offered(pattern, config.full, config.min_cut, config.max_cut)
        costs = [literal_pixel_cost(one.side) for one in rungs]
        assert max(costs) / min(costs) <= 1.25
        assert len(rungs) >= 10


@given(
    length=st.integers(4, 200), side=st.integers(8, 160), bounds=st.tuples(st.floats(1, 64), st.floats(1, 64)),
    pattern=st.sampled_from(CYCLE),
)  # fmt: skip
@settings(max_examples=30)
def test_something_is_offered_between_any_bounds(
    length: int, side: int, bounds: tuple[float, float], pattern: Pattern
) -> None:
    full = Fidelity(length, 2 * side)
    every, rungs = (of(pattern, full, min(bounds), max(bounds)) for of in (ladder, offered))
    assert (rungs[0], rungs[-1]) == (every[0], every[-1])
    assert all(below.omega < above.omega for above, below in pairwise(rungs))


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


@settings(max_examples=200)
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

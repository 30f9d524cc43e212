"""The search for the highest rung that fits: what it may choose, what it must refuse, and how little it may run."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lofi_fast.config import Budget
from lofi_fast.errors import InputError
from lofi_fast.fidelity import Fidelity, Pattern, ladder
from lofi_fast.plan import MARGIN, Choice, gigabytes, highest_fitting, resolve_budget

RUNGS = 29
COSTS = [2 ** (-i / 7) for i in range(RUNGS)]  # candidate i is the i-th rung of a ladder, the highest first
PEAKS = st.integers(1, 10**10)


def search(peaks: Sequence[int | None], budget: int) -> tuple[Choice[int] | None, list[int]]:
    """(choice, candidates in the order they were run) over `peaks`, highest candidate first; no choice if refused."""
    ran: list[int] = []

    def measure(candidate: int) -> int | None:
        ran.append(candidate)
        return peaks[candidate]

    try:
        return highest_fitting(range(len(peaks)), lambda i: 2 ** (-i / 7), measure, budget, "lower --batch"), ran
    except InputError:
        return None, ran


def fits(peak: int | None, budget: int) -> bool:
    return peak is not None and peak <= budget * (1 - MARGIN)


def as_under_a_cap(peaks: Sequence[int], budget: int) -> list[int | None]:
    """What a real run sees: beyond the budget memory runs out and there is no reading."""
    return [peak if peak <= budget else None for peak in peaks]


@settings(max_examples=200, deadline=None)
@given(st.lists(st.none() | PEAKS, min_size=1, max_size=40), st.integers(1, 2 * 10**10))
def test_whatever_the_peaks_the_choice_was_run_and_fits(peaks: list[int | None], budget: int) -> None:
    choice, ran = search(peaks, budget)
    assert len(ran) == len(set(ran)), "a candidate was run twice"
    assert (choice is None) == (not fits(peaks[-1], budget)), "refuse exactly when the lowest does not fit"
    if choice is None:
        assert ran == [len(peaks) - 1]
        return
    assert choice.peak == peaks[choice.candidate]
    assert fits(choice.peak, budget)
    assert choice.candidate in ran
    if choice.candidate > 0:
        assert choice.candidate - 1 in ran and not fits(peaks[choice.candidate - 1], budget)
    assert [(r.candidate, r.peak) for r in choice.readings] == [(i, peaks[i]) for i in ran]


@settings(max_examples=200, deadline=None)
@given(st.lists(PEAKS, min_size=1, max_size=40), st.integers(1, 2 * 10**10), st.booleans())
def test_monotone_peaks_give_the_highest_that_fits(unordered: list[int], budget: int, capped: bool) -> None:
    rising = sorted(unordered, reverse=True)
    peaks = as_under_a_cap(rising, budget) if capped else rising
    choice, _ = search(peaks, budget)
    fitting = [i for i, peak in enumerate(peaks) if fits(peak, budget)]
    assert (None if choice is None else choice.candidate) == (fitting[0] if fitting else None)


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 2 * 10**9), st.integers(10**8, 10**10), st.floats(0.0, 1.2, exclude_min=True), st.booleans())
def test_few_runs_over_29_rungs(static: int, slope: int, where: float, capped: bool) -> None:
    # Memory is a constant plus a share of Omega; the budget ends anywhere between the lowest rung and the highest.
    measured = [int(static + slope * cost) for cost in COSTS]
    budget = int(measured[-1] + where * (measured[0] - measured[-1])) + 1
    _, ran = search(as_under_a_cap(measured, budget) if capped else measured, budget)
    assert len(ran) <= 8


@settings(max_examples=200, deadline=None)
@given(st.lists(st.none() | PEAKS, min_size=RUNGS, max_size=RUNGS), st.integers(1, 2 * 10**10))
def test_never_many_runs_and_always_the_same_ones(peaks: list[int | None], budget: int) -> None:
    first, ran = search(peaks, budget)
    assert len(ran) <= 10  # five by the line, five to halve the 25 that may be left
    assert search(peaks, budget) == (first, ran)


def test_a_line_is_followed_to_the_answer_by_hand() -> None:
    # Peaks are 1 GB + cost * 8 GB and 4.2 GB can be planned with: cost 0.4 fits, rung 10 (0.3715) and not 9 (0.4102).
    peaks = [int(1e9 + cost * 8e9) for cost in COSTS]
    choice, ran = search(peaks, round(4.2e9 / (1 - MARGIN)))
    assert choice is not None and choice.candidate == 10
    # The lowest, then four times its cost, then where the line through both meets the limit, then the one above.
    assert ran == [28, 14, 10, 9]


def test_exactly_the_limit_fits_and_one_byte_more_does_not() -> None:
    assert search([950], 1000)[0] is not None
    assert search([951], 1000)[0] is None


def test_a_bump_in_the_middle_never_leads_to_a_choice_that_does_not_fit() -> None:
    # Another convolution algorithm: candidate 2 needs more than those above it.
    peaks: list[int | None] = [900, 800, 2000, 600, 500]
    choice, _ = search(peaks, 1000)
    assert choice is not None and choice.peak in (900, 600)


def test_real_rungs_with_their_omega() -> None:
    rungs = ladder(Pattern.SPATIAL, Fidelity(100, 224))
    choice = highest_fitting(rungs, lambda f: f.omega, lambda f: 1000 * f.omega, 10**9, "raise --mem-budget")
    assert choice.candidate == next(f for f in rungs if 1000 * f.omega <= 0.95e9)


@pytest.mark.parametrize(("peak", "needs"), [(3_210_000_000, "3.21 GB"), (None, "more than that")])
def test_the_refusal_says_what_is_needed_and_what_to_change(peak: int | None, needs: str) -> None:
    with pytest.raises(InputError) as refused:
        highest_fitting([Fidelity(25, 112)], lambda f: f.omega, lambda _: peak, 2 * 10**9, "lower --batch (now 16)")
    sentence = str(refused.value)
    for part in ("2.00 GB", "1.90 GB", "25 snippets x 112 px", needs, "lower --batch (now 16)"):
        assert part in sentence


def test_budget_in_bytes() -> None:
    total, available = 24 * 10**9, 10 * 10**9
    assert resolve_budget(Budget.parse("11GiB"), total, available) == 11 * 2**30
    assert resolve_budget(Budget.parse("25%"), total, available) == 6 * 10**9
    assert resolve_budget(Budget.parse("auto"), total, available) == 9 * 10**9
    assert gigabytes(11 * 2**30) == "11.81 GB"

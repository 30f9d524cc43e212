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


def search(peaks: Sequence[int | None], budget: int, held: int = 0) -> tuple[Choice[int] | None, list[int]]:
    """(choice, candidates in the order they were run) over `peaks`, highest candidate first; no choice if refused."""
    ran: list[int] = []

    def measure(candidate: int) -> int | None:
        ran.append(candidate)
        return peaks[candidate]

    try:
        return highest_fitting(range(len(peaks)), lambda i: 2 ** (-i / 7), measure, budget, held, "lower --batch"), ran
    except InputError:
        return None, ran


def fits(peak: int | None, budget: int) -> bool:
    return peak is not None and peak <= budget * (1 - MARGIN)


def as_under_a_cap(peaks: Sequence[int], budget: int) -> list[int | None]:
    """What a real run sees: beyond the budget memory runs out and there is no reading."""
    return [peak if peak <= budget else None for peak in peaks]


@settings(max_examples=200, deadline=None)
@given(st.lists(st.none() | PEAKS, min_size=1, max_size=40), st.integers(1, 2 * 10**10), st.integers(0, 10**9))
def test_whatever_the_peaks_the_choice_was_run_and_fits(peaks: list[int | None], budget: int, held: int) -> None:
    choice, ran = search(peaks, budget, held)
    assert len(ran) == len(set(ran)), "a candidate was run twice"
    assert ran[0] == len(peaks) - 1, "the lowest comes first"
    assert (choice is None) == (not fits(peaks[-1], budget)), "refuse exactly when the lowest does not fit"
    if choice is None:
        assert len(ran) == 1
        return
    assert choice.peak == peaks[choice.candidate]
    assert fits(choice.peak, budget)
    assert choice.candidate in ran
    assert not [i for i in ran if i < choice.candidate and fits(peaks[i], budget)], "a higher one was run and fits"
    assert [(r.candidate, r.peak) for r in choice.readings] == [(i, peaks[i]) for i in ran]


LINES = (st.integers(0, 2 * 10**9), st.integers(10**8, 10**10), st.floats(0.0, 1.2, exclude_min=True))


@settings(max_examples=200, deadline=None)
@given(*LINES, st.booleans())
def test_on_a_line_the_highest_is_found_in_few_runs_none_over_the_budget(
    held: int, slope: int, where: float, capped: bool
) -> None:
    # What is held before, plus a share of Omega; the budget ends anywhere from the lowest rung to past the highest.
    measured = [int(held + slope * cost) for cost in COSTS]
    budget = int(measured[-1] + where * (measured[0] - measured[-1])) + 1
    choice, ran = search(as_under_a_cap(measured, budget) if capped else measured, budget, held)
    fitting = [i for i, peak in enumerate(measured) if fits(peak, budget)]
    assert (None if choice is None else choice.candidate) == (fitting[0] if fitting else None)
    assert len(ran) <= 4
    assert all(measured[i] <= budget + 2 for i in ran[1:]), "run although the readings said it passes the budget"


@settings(max_examples=200, deadline=None)
@given(*LINES, st.integers(0, 2 * 10**9), st.booleans())
def test_a_constant_part_costs_few_runs_and_leaves_little_of_the_budget(
    held: int, slope: int, where: float, constant: int, capped: bool
) -> None:
    # Gradients and workspaces cost the same on every rung, which the first line takes for a part of Omega.
    measured = [int(held + constant + slope * cost) for cost in COSTS]
    budget = int(measured[-1] + where * (measured[0] - measured[-1])) + 1
    peaks = as_under_a_cap(measured, budget) if capped else measured
    choice, ran = search(peaks, budget, held)
    assert len(ran) <= 8
    if choice is not None and choice.candidate > 0:
        assert not fits(peaks[choice.candidate - 1], budget) or choice.peak >= 0.85 * budget


@settings(max_examples=200, deadline=None)
@given(st.lists(st.none() | PEAKS, min_size=RUNGS, max_size=RUNGS), st.integers(1, 2 * 10**10))
def test_never_many_runs_and_always_the_same_ones(peaks: list[int | None], budget: int) -> None:
    first, ran = search(peaks, budget)
    assert len(ran) <= 12  # seven by the line, five to halve the 22 that may be left
    assert search(peaks, budget) == (first, ran)


def test_a_line_is_followed_to_the_answer_by_hand() -> None:
    # Peaks are 1 GB + cost * 8 GB and 4.2 GB can be planned with: cost 0.4 fits, rung 10 (0.3715) and not 9 (0.4102).
    peaks = [int(1e9 + cost * 8e9) for cost in COSTS]
    choice, ran = search(peaks, round(4.2e9 / (1 - MARGIN)), held=10**9)
    assert choice is not None and choice.candidate == 10
    # The lowest; where the line from what is held meets the limit; the one above, 4.28 GB and within the budget.
    assert ran == [28, 10, 9]
    # With 4.25 GB, of which 4.04 can be planned with, rung 9 is not even tried.
    choice, ran = search(peaks, 4_250_000_000, held=10**9)
    assert choice is not None and choice.candidate == 10
    assert ran == [28, 10]


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
    choice = highest_fitting(rungs, lambda f: f.omega, lambda f: 1000 * f.omega, 10**9, 0, "raise --mem-budget")
    assert choice.candidate == next(f for f in rungs if 1000 * f.omega <= 0.95e9)


@pytest.mark.parametrize(("peak", "needs"), [(3_210_000_000, "3.21 GB"), (None, "more than that")])
def test_the_refusal_says_what_is_needed_and_what_to_change(peak: int | None, needs: str) -> None:
    with pytest.raises(InputError) as refused:
        highest_fitting([Fidelity(25, 112)], lambda f: f.omega, lambda _: peak, 2 * 10**9, 0, "lower --batch (now 16)")
    sentence = str(refused.value)
    for part in ("2.00 GB", "1.90 GB", "25 snippets x 112 px", needs, "lower --batch (now 16)"):
        assert part in sentence


def test_budget_in_bytes() -> None:
    total, available = 24 * 10**9, 10 * 10**9
    assert resolve_budget(Budget.parse("11GiB"), total, available) == 11 * 2**30
    assert resolve_budget(Budget.parse("25%"), total, available) == 6 * 10**9
    assert resolve_budget(Budget.parse("auto"), total, available) == 9 * 10**9
    assert gigabytes(11 * 2**30) == "11.81 GB"

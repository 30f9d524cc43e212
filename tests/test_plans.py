"""Plans: what may be chosen, the search for the highest that fits, what real steps say about the ledger, refusals."""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lofi_fast.budget import Budget, gigabytes, resolve_budget
from lofi_fast.config import Recompute
from lofi_fast.errors import InputError
from lofi_fast.fidelity import Fidelity, Pattern, ladder
from lofi_fast.ledger import default_chunk
from lofi_fast.memory.plans import (
    PRIOR,
    Device,
    Fit,
    Plan,
    Prior,
    candidates,
    first_fitting,
    fit,
    micro_batches,
    refusal,
    relative_cost,
    remedies,
    worthwhile,
)
from lofi_fast.memory.step_bytes import Setting, step_bytes
from lofi_fast.memory.trial import MARGIN, Choice, highest_fitting
from lofi_fast.presets import activitynet

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


@settings(max_examples=200)
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


@settings(max_examples=200)
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


@settings(max_examples=200)
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


@settings(max_examples=200)
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


def test_under_way_the_lowest_may_use_the_margin() -> None:
    def chosen(peaks: Sequence[int], late: bool) -> int | None:
        ran: list[int] = []
        try:
            found = highest_fitting(
                range(len(peaks)), lambda i: 2 ** (-i / 7), lambda i: ran.append(i) or peaks[i], 1000, 0, "", late
            )
        except InputError:
            return None
        assert found.peak == peaks[found.candidate]
        return found.candidate

    assert chosen([990, 980], late=False) is None and chosen([990, 980], late=True) == 1
    assert chosen([1200, 1001], late=True) is None
    assert chosen([900, 800], late=True) == chosen([900, 800], late=False) == 0


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


# What may be chosen

HIGH, LOW = Fidelity(32, 64), Fidelity(32, 32)
RECOMPUTES = st.sampled_from(["auto", "always", "never"])


def told(plans: Sequence[Plan]) -> list[str]:
    """ "H4" is the high rung with 4 videos at once, "H4r" with recomputation."""
    return [f"{'HL'[p.fidelity == LOW]}{p.micro_batch}{'r' if p.recompute else ''}" for p in plans]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ((4,), "H4 H2 H1 H4r H2r H1r L4 L2 L1 L4r L2r L1r"),
        ((4, None, "never"), "H4 H2 H1 L4 L2 L1"),
        ((4, None, "always"), "H4r H2r H1r L4r L2r L1r"),
        ((4, 2), "H2 H2r L2 L2r"),
        ((5, None, "never"), "H5 H3 H2 H1 L5 L3 L2 L1"),
        ((4, 9, "never"), "H4 L4"),
    ],
    ids=str,
)
def test_candidates_by_hand(arguments: tuple[int, int | None, Recompute], expected: str) -> None:
    assert told(candidates([HIGH, LOW], *arguments)) == expected.split()


@given(st.integers(1, 64), st.none() | st.integers(1, 64), RECOMPUTES, st.sampled_from([None, "cpu", "cuda"]))
def test_candidates_are_best_first(batch: int, micro: int | None, recompute: Recompute, device: Device | None) -> None:
    rungs = ladder(Pattern.SPATIO_TEMPORAL, Fidelity(32, 64))
    plans = candidates(rungs, batch, micro, recompute, device)
    assert len(set(plans)) == len(plans)
    assert plans == tuple(sorted(plans, key=lambda p: (-p.omega, relative_cost(p, rungs[0], device))))
    assert {p.fidelity for p in plans} == set(rungs)
    for rung in rungs:
        alike = [p for p in plans if p.fidelity == rung]
        assert {p.recompute for p in alike} == {"auto": {False, True}, "always": {True}, "never": {False}}[recompute]
        assert {p.micro_batch for p in alike} == set(micro_batches(batch) if micro is None else [min(micro, batch)])


@given(st.integers(1, 1000))
def test_micro_batches_are_halved_down_to_one(batch: int) -> None:
    sizes = micro_batches(batch)
    assert (sizes[0], sizes[-1]) == (batch, 1)
    assert all(a == 2 * b or a == 2 * b - 1 for a, b in itertools.pairwise(sizes))


def test_a_plan_in_words_and_as_json() -> None:
    assert str(Plan(Fidelity(50, 158), 16)) == "50 snippets x 158 px, 16 at once"
    plan = Plan(Fidelity(50, 158), 1, True)
    assert str(plan) == "50 snippets x 158 px, 1 at once, recompute"
    assert Plan.from_json(json.loads(json.dumps(plan.to_json()))) == plan
    for wrong in ([], [50, 158, 1], [50, 158, 0, 0], [50, "158", 1, 0], [50, 158, 1.0, 0]):
        with pytest.raises(ValueError, match="not a plan"):
            Plan.from_json(wrong)


def test_cost_follows_omega_and_costs_a_third_more_when_recomputed() -> None:
    many = relative_cost(Plan(HIGH, 10**6), HIGH)
    assert many == pytest.approx(1, abs=1e-6)
    assert relative_cost(Plan(LOW, 10**6), HIGH) == pytest.approx(many / 4)
    assert relative_cost(Plan(HIGH, 4, True), HIGH) == pytest.approx(4 / 3 * relative_cost(Plan(HIGH, 4), HIGH))
    # A pixel costs more where halves are rounded up: 36 px are 9, 5, 3 and 2, and 48 px 12, 6, 3 and 2.
    dear, fair = (relative_cost(Plan(Fidelity(32, side), 1), HIGH) for side in (36, 48))
    work = [4**2 * a**2 + 8**2 * b**2 + 16**2 * c**2 + 32**2 * d**2 for a, b, c, d in ((9, 5, 3, 2), (12, 6, 3, 2))]
    assert dear / fair == pytest.approx(work[0] / work[1]) and dear / fair > 0.8 > (36 / 48) ** 2
    one, two, sixteen = (relative_cost(Plan(HIGH, n), HIGH) for n in (1, 2, 16))
    assert many < sixteen < two < one < 1.2 * many


# What is chosen


@given(st.lists(PEAKS, min_size=1, max_size=30), st.integers(0, 10**10), st.integers(0, 10**9))
def test_the_first_that_fits_and_more_room_is_never_worse(needs: list[int], room: int, more: int) -> None:
    plans = [Plan(Fidelity(100 - i, 64), 4) for i in range(len(needs))]
    predict = dict(zip(plans, needs, strict=True)).__getitem__
    chosen = first_fitting(plans, predict, room)
    assert (chosen is None) == (min(needs) > room)
    if chosen is not None:
        assert predict(chosen) <= room
        assert all(predict(plan) > room for plan in plans[: plans.index(chosen)])
        better = first_fitting(plans, predict, room + more)
        assert better is not None and plans.index(better) <= plans.index(chosen)


LEDGERS = st.integers(0, 10**11)


@settings(max_examples=200)
@given(st.lists(st.tuples(LEDGERS, LEDGERS), max_size=20), LEDGERS)
def test_a_fit_never_predicts_under_the_ledger(readings: list[tuple[int, int]], ledger: int) -> None:
    found = fit(readings, PRIOR)
    assert found.scale >= 1 and found.extra >= 0
    assert found.added(ledger) >= ledger
    assert fit(readings, PRIOR) == found


@given(st.floats(1, 1.3), st.integers(0, 3 * 10**8), st.integers(10**9, 10**10))
def test_three_readings_tell_both_scalars(scale: float, extra: int, largest: int) -> None:
    readings = [(ledger, round(scale * ledger + extra)) for ledger in (largest, largest // 2, largest // 4)]
    found = fit(readings, PRIOR)
    for ledger, added in readings:
        assert found.added(ledger) == pytest.approx(added, rel=0.03)


@settings(max_examples=50)
@given(st.lists(st.tuples(st.integers(10**8, 10**10), st.floats(0.7, 1.5)), min_size=1, max_size=8))
def test_the_fit_is_the_most_probable_of_all(points: list[tuple[int, float]]) -> None:
    readings = [(ledger, round(ledger * factor)) for ledger, factor in points]

    def improbable(scale: float, extra: float) -> float:
        misses = (((scale * x + extra - y) / (PRIOR.noise * max(x, y))) ** 2 for x, y in readings)
        scale_off = (scale - PRIOR.likely.scale) / PRIOR.scale_spread
        return sum(misses) + scale_off**2 + ((extra - PRIOR.likely.extra) / PRIOR.extra_spread) ** 2

    found = fit(readings, PRIOR)
    best = improbable(found.scale, found.extra)
    for scale, extra in itertools.product((-0.01, 0, 0.01), (-1e7, 0, 1e7)):  # convex: no better near, no better at all
        assert improbable(max(found.scale + scale, 1), max(found.extra + extra, 0)) >= best * (1 - 1e-9) - 1e-9


def test_without_readings_the_prior_is_careful() -> None:
    assert fit([], PRIOR) == PRIOR.careful
    assert PRIOR.careful.added(10**9) == 1_300_000_000 + 128_000_000
    other = dataclasses.replace(PRIOR, careful=Fit(2.0, 0.0))
    assert isinstance(other, Prior) and fit([], other).added(5) == 10


# When nothing fits


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ((4, None, "auto"), ""),
        ((4, None, "never"), "--recompute auto: L1r"),
        ((4, 4, "auto"), "--micro-batch none: L1r"),
        ((4, 4, "never"), "--recompute auto: L4r; --micro-batch none: L1; --micro-batch none --recompute auto: L1r"),
        ((4, 2, "always"), "--micro-batch none: L1r"),
        ((4, 1, "auto"), ""),
        ((1, None, "auto"), ""),
    ],
    ids=str,
)
def test_remedies_by_hand(arguments: tuple[int, int | None, Recompute], expected: str) -> None:
    offers = remedies([HIGH, LOW], *arguments)
    assert "; ".join(f"{flag}: {told([plan])[0]}" for flag, plan in offers) == expected


def test_a_lower_rung_is_a_remedy() -> None:
    lower = Fidelity(32, 24)
    offers = remedies([HIGH, LOW], 1, recompute="never", lower=[("--max-cut 32", lower)])
    assert ("--max-cut 32", Plan(lower, 1, False)) in offers
    assert ("--max-cut 32", Plan(lower, 1, True)) in remedies([HIGH, LOW], 1, lower=[("--max-cut 32", lower)])


def test_the_refusal_names_the_flags_that_would_do_and_no_other() -> None:
    plans = candidates([HIGH, LOW], 4, 4, recompute="never")
    need = {"H4": 9, "L4": 5, "L1": 2, "L4r": 4, "L1r": 1}
    offers = remedies([HIGH, LOW], 4, 4, recompute="never")

    def say(limit: int, room: int, budget: int) -> str:
        return refusal(plans, lambda p: need[told([p])[0]] * 10**9, limit * 10**9, room * 10**8, budget * 10**9, offers)

    sentence = say(4, 35, 4)
    for part in ("a budget of 4.00 GB", "3.50 GB can be planned", "32 snippets x 32 px, 4 at once", "needs 5.00 GB"):
        assert part in sentence
    # 5 GB planned with as 3.5 of 4 are takes 5.72.
    assert sentence.endswith(
        "; --micro-batch none (2.00 GB) or --micro-batch none --recompute auto (1.00 GB) "
        "or --mem-budget 5.72GB would do"
    )
    assert "--recompute auto (4.00 GB)" not in sentence
    others = say(3, 15, 8)
    assert "the 3.00 GB that others leave" in others
    assert "free some memory (a step needs 10.00 GB to be left)" in others and "--mem-budget" not in others
    hopeless = say(1, 5, 1)
    assert "--micro-batch" not in hopeless and "a smaller --batch, --encoder or --width" in hopeless
    assert "--mem-budget 10.00GB" in hopeless
    assert "0.00 GB can be planned" in say(1, -3, 1)


# Snippets in one graph of the encoder


def graphs(plans: Sequence[Plan]) -> list[str]:
    return [f"{name}/{plan.chunk}" for name, plan in zip(told(plans), plans, strict=True)]


def test_of_one_rung_the_fastest_chunk_comes_first_and_then_smaller_ones_before_a_lower_rung() -> None:
    large, small = Fidelity(16, 112), Fidelity(2, 224)
    assert [p.chunk for p in candidates([large], 1, device="cpu")] == [8, 4, 2, 1] * 2  # then again, recomputing
    assert [p.chunk for p in candidates([large], 1, recompute="never", device="cuda")] == [16, 8, 4, 2, 1]
    assert [p.chunk for p in candidates([Fidelity(100, 224)], 1, recompute="never", device="cuda")] == [
        62, 31, 15, 7, 3, 1
    ]  # fmt: skip
    plans = candidates([large, small], 1, device="cpu")
    assert [(p.fidelity, p.recompute) for p in plans] == [
        *[(large, False)] * 4, *[(large, True)] * 4, *[(small, False)] * 2, *[(small, True)] * 2
    ]  # fmt: skip


def test_more_videos_at_once_and_larger_chunks_go_by_what_they_cost_on_the_device() -> None:
    rungs = [Fidelity(32, 112)]
    on_cpu = candidates(rungs, 2, recompute="never", device="cpu")
    assert [(p.micro_batch, p.chunk) for p in on_cpu] == [
        (2, 8),
        (2, 4),
        (2, 2),
        (2, 1),
        (1, 8),
        (1, 4),
        (1, 2),
        (1, 1),
    ]
    on_gpu = candidates(rungs, 2, recompute="never", device="cuda")
    assert [(p.micro_batch, p.chunk) for p in on_gpu][:3] == [(2, 64), (2, 32), (1, 32)]
    costs = [relative_cost(plan, rungs[0], "cuda") for plan in on_gpu]
    assert costs == sorted(costs)
    assert costs[-1] > 5 * costs[0], "a GPU waits for its host"


@settings(max_examples=40)
@given(st.integers(1, 64), st.none() | st.integers(1, 64), RECOMPUTES, st.sampled_from(["cpu", "cuda"]))
def test_the_lever_only_adds_plans_and_a_cpu_begins_with_the_encoders_own_chunk(
    batch: int, micro: int | None, recompute: Recompute, device: Device
) -> None:
    rungs = ladder(Pattern.SPATIO_TEMPORAL, Fidelity(32, 64))
    plain = candidates(rungs, batch, micro, recompute)
    plans = candidates(rungs, batch, micro, recompute, device)
    assert len(set(plans)) == len(plans)
    assert {dataclasses.replace(plan, chunk=0) for plan in plans} == set(plain)
    keys = [(-plan.omega, relative_cost(plan, rungs[0], device)) for plan in plans]
    assert keys == sorted(keys)
    firsts = {dataclasses.replace(plan, chunk=0): plan.chunk for plan in reversed(plans)}
    for plan, chunk in firsts.items():
        most = plan.micro_batch * plan.fidelity.num_snippets
        assert 1 <= chunk <= most
        if device == "cpu":
            assert chunk == min(default_chunk(plan.fidelity.side), most)
    if device == "cpu":
        assert list(dict.fromkeys(dataclasses.replace(plan, chunk=0) for plan in plans)) == list(plain)


def test_a_smaller_chunk_that_saves_next_to_nothing_is_no_plan() -> None:
    plans = candidates([HIGH, LOW], 4, 4, device="cpu")
    assert graphs(plans)[:5] == ["H4/24", "H4/12", "H4/6", "H4/3", "H4r/24"], "none that would be cut out of the heap"
    needs = {24: 1000, 12: 995, 6: 989, 3: 900}
    kept = list(worthwhile(plans, lambda plan: 0 if plan.recompute else needs.get(plan.chunk, 500)))
    assert graphs(kept)[:4] == ["H4/24", "H4/6", "H4/3", "H4r/24"]
    assert {told([plan])[0] for plan in kept} == {told([plan])[0] for plan in plans}
    alike = list(worthwhile(plans, lambda plan: 7))
    assert graphs(alike) == [graphs([plans[0]])[0], graphs([p for p in plans if p.fidelity == LOW])[0]]


def test_a_slower_way_that_needs_more_than_a_faster_one_is_no_plan() -> None:
    setting = Setting.of(activitynet(), 200, 2)
    assert setting is not None

    def needs(plan: Plan) -> int:
        return step_bytes(setting, plan.fidelity, plan.micro_batch, recompute=plan.recompute, chunk=plan.chunk).added

    plans = candidates(ladder(Pattern.SPATIAL, Fidelity(100, 224)), 16, device="cuda")
    kept = list(worthwhile(plans, needs))
    assert 4 * len(kept) < len(plans)
    for rung in {plan.fidelity for plan in plans}:
        ways = [needs(plan) for plan in kept if plan.fidelity == rung]
        assert ways == sorted(ways, reverse=True) and len(set(ways)) == len(ways)
        least = min(needs(plan) for plan in plans if plan.fidelity == rung)
        assert ways[-1] <= least / 0.99


def test_the_ledger_counts_the_chunk_so_that_recompute_needs_in_proportion_to_it() -> None:
    setting = Setting.of(activitynet(), 200, 2)
    assert setting is not None
    full = Fidelity(100, 224)
    many, few, one = (step_bytes(setting, full, 1, recompute=True, chunk=chunk).transient for chunk in (62, 15, 1))
    assert few < many / 3 and one < few / 3
    kept = list(
        worthwhile(
            candidates([full], 1, device="cuda"),
            lambda p: step_bytes(setting, full, 1, recompute=p.recompute, chunk=p.chunk).added,
        )
    )
    assert [plan.chunk for plan in kept if plan.recompute] == [62, 31, 15, 7, 3, 1]
    assert [plan.chunk for plan in kept if not plan.recompute][:2] == [62, 31]


def test_the_plan_of_a_log_from_before_chunks_were_recorded() -> None:
    assert Plan.from_json([50, 158, 1, 1]) == Plan(Fidelity(50, 158), 1, True, 0)
    plan = Plan(Fidelity(50, 158), 16, chunk=125)
    assert str(plan) == "50 snippets x 158 px, 16 at once, 125 to a graph"
    assert plan.to_json() == [50, 158, 16, 0, 125] and Plan.from_json(plan.to_json()) == plan
    with pytest.raises(ValueError, match="not a plan"):
        Plan.from_json([50, 158, 16, 0, -1])


def test_remedies_take_the_smallest_chunk() -> None:
    offers = remedies([HIGH, LOW], 4, 4, device="cuda")
    assert offers == (("--micro-batch none", Plan(LOW, 1, True, 1)),)

"""A ledger learned by running steps: what two readings tell, and a governor that plans with it on a made-up machine."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_governor import BUDGET, FULL, GB, MB, Machine

from lofi_fast.errors import InputError
from lofi_fast.fidelity import CYCLE, Fidelity, Pattern, ladder, phase
from lofi_fast.memory.decision import Decision
from lofi_fast.memory.frontier import CPU_BASE
from lofi_fast.memory.governor import SMALLEST_MARGIN, Governor
from lofi_fast.memory.plans import PRIOR, Plan, candidates, worthwhile
from lofi_fast.memory.settle import open_meter
from lofi_fast.memory.trial import MARGIN, Choice, LearnedLedger, Line, Trials, highest_predicted, learn_ledger
from lofi_fast.presets import configured
from lofi_fast.run.processes import ALONE
from lofi_fast.stages import joint, pretrain

PLANS = {pattern: candidates(ladder(pattern, FULL), 4, recompute="never") for pattern in CYCLE}
ALL = [plan for plans in PLANS.values() for plan in plans]
HELD = 500 * MB


def pixels(plan: Plan) -> int:
    return plan.micro_batch * plan.omega


def learned(
    need: Callable[[Plan], float], plans: list[Plan] = ALL, limit: int = BUDGET
) -> tuple[LearnedLedger, list[Plan]]:
    """The ledger of steps that add `need(plan)` bytes under a cap of `limit`, and the plans that were run for it."""
    ran: list[Plan] = []

    def measure(plan: Plan) -> int | None:
        ran.append(plan)
        peak = HELD + round(need(plan))
        return peak if peak <= limit else None

    return learn_ledger(plans, measure, lambda: HELD, limit, "raise --mem-budget"), ran


@settings(max_examples=100)
@given(st.integers(0, 2 * 10**9), st.floats(10, 1500))
def test_what_grows_in_a_line_is_learned_from_two_plans(fixed: int, for_pixel: float) -> None:
    def need(plan: Plan) -> float:
        return fixed + for_pixel * pixels(plan)

    smallest = min(ALL, key=pixels)
    ledger, ran = learned(need)
    assert ran[:2] == [smallest, smallest], "the first step of a process teaches nothing"
    assert all(HELD + need(plan) <= BUDGET for plan in ran)
    for plan in ALL:
        assert ledger(plan) >= need(plan) * (1 - 1e-6) - 2
        if len(ran) == 3:
            assert ledger(plan) == pytest.approx(need(plan), rel=1e-3, abs=1000)
    assert len(ran) <= 3


def test_the_second_plan_is_as_large_as_the_first_one_says_is_safe() -> None:
    _, ran = learned(lambda plan: 500 * pixels(plan))
    fitting = [plan for plan in ALL if HELD + 500 * pixels(plan) <= 0.95 * BUDGET]
    assert pixels(ran[2]) == max(map(pixels, fitting))


def test_bytes_that_grow_faster_than_pixels_are_taken_in_proportion_to_the_larger_reading() -> None:
    ledger, ran = learned(lambda plan: pixels(plan) ** 1.5 / 10)
    assert ledger.kept is not None and ledger.kept.fixed == 0
    assert ledger(ran[-1]) == pytest.approx(pixels(ran[-1]) ** 1.5 / 10, rel=1e-6)


def test_a_second_plan_that_runs_out_of_memory_is_followed_by_smaller_ones() -> None:
    ledger, ran = learned(lambda plan: 1000 * pixels(plan) if pixels(plan) < 3e6 else BUDGET)
    assert len(ran) > 3 and [pixels(plan) for plan in ran[2:]] == sorted(map(pixels, ran[2:]), reverse=True)
    assert ledger(ran[-1]) == pytest.approx(1000 * pixels(ran[-1]), rel=1e-6)


def test_one_plan_alone_is_taken_in_proportion() -> None:
    plan = Plan(Fidelity(8, 32), 1)
    ledger, ran = learned(lambda _: 10 * MB, [plan])
    assert ran == [plan, plan] and ledger.kept == Line(0.0, 10 * MB / pixels(plan))


def test_with_and_without_recompute_are_two_lines() -> None:
    plans = list(candidates(ladder(Pattern.SPATIAL, FULL), 4))

    def need(plan: Plan) -> float:
        return 300 * MB + 20 * pixels(plan) if plan.recompute else 100 * MB + 800 * pixels(plan)

    ledger, _ = learned(need, plans)
    for plan in plans:
        assert ledger(plan) == pytest.approx(need(plan), rel=1e-3)
    assert LearnedLedger.from_json(json.loads(json.dumps(ledger.to_json()))) == ledger
    only, _ = learned(need, [plan for plan in plans if plan.recompute])
    assert only.kept is None
    with pytest.raises(ValueError, match="without recompute"):
        only(plans[0])
    # Where even the smallest does not fit without, it is known to need more than there is.
    short, _ = learned(lambda plan: 10 * MB if plan.recompute else GB, plans, HELD + 200 * MB)
    assert min(short(plan) for plan in plans if not plan.recompute) >= HELD + 200 * MB


def test_of_plans_that_differ_in_their_chunk_the_first_is_run_and_stands_for_all() -> None:
    plans = list(candidates(ladder(Pattern.SPATIAL, FULL), 4, 4, recompute="never", device="cuda"))
    ledger, ran = learned(lambda plan: 100 * MB + 300 * pixels(plan), plans)
    assert len(ran) == 3
    for plan in ran:
        assert plan.chunk == max(other.chunk for other in plans if other.fidelity == plan.fidelity)
    made = list(worthwhile(plans, ledger))
    assert [plan.fidelity for plan in made] == list(ladder(Pattern.SPATIAL, FULL)), "smaller chunks save nothing known"


def test_nothing_that_fits_is_one_sentence() -> None:
    with pytest.raises(InputError, match=r"nothing fits: .* needs more than the 8\.00 GB .*; raise --mem-budget$"):
        learned(lambda _: 100 * GB)


class Unknown(Machine):
    """A machine whose encoder nobody has written down: a step needs a constant part, and bytes for each pixel."""

    def run(self, plan: Plan) -> int:
        bump = 1 + self.bumps.setdefault(plan, self.random.uniform(-self.bump, self.bump))
        noise = 1 + self.random.uniform(-self.noise, self.noise)
        self.base = 820 * MB
        return self.base + round((250 * MB + 600 * pixels(plan) * bump) * noise)


@pytest.mark.parametrize(("seed", "budget", "bump"), [(1, 6 * GB, 0.02), (2, 9 * GB, 0.04), (3, 12 * GB, 0.06)])
def test_a_governor_plans_with_what_was_learned(seed: int, budget: int, bump: float) -> None:
    machine, neighbour = Unknown(seed, bump=bump), random.Random(seed)
    plans = {p: candidates(ladder(p, FULL), 4, recompute="never") for p in CYCLE}
    over = 0

    def run(plan: Plan, limit: int) -> int | None:
        nonlocal over
        peak = machine.run(plan)
        over += peak > limit
        return peak if peak <= limit else None

    everything = [plan for of in plans.values() for plan in of]
    ledger = learn_ledger(everything, lambda plan: run(plan, budget), machine.held, budget, "raise --mem-budget")
    made = Governor(machine, budget, ledger, plans, print)
    made.calibrate(lambda trial: run(trial.plan, trial.limit))
    used = []
    for step in range(600):
        if step % 40 == 0:
            machine.left = round(neighbour.uniform(0.4, 1.5) * budget)
        decision = made.recheck(made.choose(phase(Pattern.CYCLIC, 0, step, 5)))
        peak = machine.run(decision.plan)
        over += peak > decision.limit
        made.learn(decision, peak)
        assert decision.room <= (1 - SMALLEST_MARGIN) * decision.limit
        if decision.plan.fidelity != FULL and step % 40 > 20:
            used.append(peak / decision.limit)
    assert over == 0
    assert not used or sum(used) / len(used) >= 0.85


# A few candidates, by arithmetic


@settings(max_examples=200)
@given(
    sizes=st.lists(st.integers(1, 10**10), min_size=1, max_size=7, unique=True).map(
        lambda of: sorted(of, reverse=True)
    ),
    held=st.integers(10**8, 2 * 10**9),
    limit=st.integers(10**9, 2 * 10**10),
    late=st.booleans(),
)
def test_arithmetic_chooses_where_it_can_tell(sizes: list[int], held: int, limit: int, late: bool) -> None:
    room = int(limit * (1 - MARGIN))
    fitting = [size for size in sizes if held + size <= (limit if late else room)]
    if not fitting:
        with pytest.raises(InputError, match=r"^nothing fits: .* needs at least .*; lower --batch$"):
            highest_predicted(sizes, lambda size: size, limit, held, "lower --batch", late)
        return
    choice, left = highest_predicted(sizes, lambda size: size, limit, held, "lower --batch", late)
    assert left == fitting, "what is surely too much is never run"
    careful = held + PRIOR.careful.added(fitting[0])
    if careful <= room:
        assert choice == Choice(fitting[0], careful, ())
    else:
        assert choice is None, "a step has to be run"


def test_a_ledger_spares_the_trial_steps_that_it_can_answer() -> None:
    meter, ran = open_meter(torch.device("cpu")), []
    meter.release()
    held = meter.own()

    def planned(room: int) -> Choice[int]:
        """Of 64, 32 and 16 clips of 10 MB each, where so much is free beyond the margin."""
        ran.clear()
        trials = Trials(meter, int((held + room) / (1 - MARGIN)), lambda *_: None, lambda *_: None)
        return trials.highest_fitting(
            "clips", [64, 32, 16], float, ran.append, "lower --batch", ledger=lambda size: size * 10 * MB
        )

    assert planned(1500 * MB).candidate == 64 and ran == []
    assert planned(800 * MB).candidate == 64 and 64 in ran, "its tensors fit, and perhaps not all the rest"
    assert planned(580 * MB).candidate == 32 and ran == [], "the tensors of 64 do not fit"
    with pytest.raises(InputError, match=r"needs at least .*; lower --batch"):
        planned(100 * MB)
    assert ran == []


def test_a_trial_leaves_free_what_it_is_told_to() -> None:
    """As the first step of a process does where it may not fit: a cap on tensors does not hold back libraries."""
    asked: list[int] = []
    trials = SimpleNamespace(measure=lambda step, limit: asked.append(limit))
    network = torch.nn.Linear(1, 1)
    run = SimpleNamespace(encoder=network, head=network, trials=trials, processes=ALONE, shared_gauge=None)
    plan = Plan(Fidelity(4, 32), 1, False, 1)
    decision = Decision(CYCLE[0], 0, 0, plan, plan, 1200, 1000, 1000, 1000, "a trial")
    joint.trial(run, [], decision)  # type: ignore[arg-type]
    joint.trial(run, [], decision, spare=joint.UNCAPPED)  # type: ignore[arg-type]
    assert asked == [1000, 980]


# Before anything is decoded


def of_budget(budget: int) -> Any:
    """A CPU on which this process holds CPU_BASE."""
    meter, precision = SimpleNamespace(own=lambda: CPU_BASE), SimpleNamespace(dtype=torch.float32)
    return SimpleNamespace(device=torch.device("cpu"), precision=precision, meter=meter, budget=budget)


@pytest.mark.parametrize("flags", [[], ["--recompute", "never"], ["--pattern", "temporal", "--micro-batch", "2"]])
def test_a_budget_below_the_smallest_step_is_told_of_before_decoding(flags: list[str]) -> None:
    said: list[str] = []
    words = {flag[2:]: value for flag, value in zip(flags[::2], flags[1::2], strict=True)}

    def check(budget: int) -> None:
        config = configured(words | {"mem_budget": f"{budget}"}, cuda=lambda: False)
        joint.check_smallest(config, of_budget(budget), said.append)

    with pytest.raises(
        InputError, match=r"^--mem-budget 400001000, .*: nothing fits: .* --mem-budget [\d.]+GB would do"
    ) as refused:
        check(CPU_BASE + 1000)
    enough = round(1e9 * float(re.findall(r"--mem-budget ([\d.]+)GB", str(refused.value))[-1]))
    assert not said
    check(2 * enough)
    assert not said
    check(enough - 20 * MB)
    (warning,) = said
    assert warning.startswith("warning: --mem-budget ") and "nothing fits" in warning


def test_a_budget_below_the_smallest_step_of_pretraining_is_told_of_before_decoding() -> None:
    config = configured({"mem_budget": "2GB", "fidelity": "8x224", "width": "64"}, cuda=lambda: False)

    def check(budget: int) -> None:
        pretrain.check_smallest_clips(config, of_budget(budget))

    with pytest.raises(InputError, match=r"the smallest step \(4\) needs at least .*; raise --mem-budget") as refused:
        check(CPU_BASE + 10 * MB)
    needs = 1e9 * float(re.findall(r"at least ([\d.]+) GB", str(refused.value))[0])
    check(round((needs + 10 * MB) / (1 - MARGIN)))
    with pytest.raises(InputError, match="nothing fits"):
        check(round((needs - 10 * MB) / (1 - MARGIN)))

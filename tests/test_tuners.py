"""Other trainers' ways to find what fits, on a made-up device; the tables of these; optimisers that must agree."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from bench.commands import optim
from bench.commands.tables import section_of
from bench.peers.tuners import TUNERS, doubling, fixed, halving, linear
from bench.tools.gate import GateError
from bench.tools.rows import Row
from lofi_fast.fidelity import Fidelity, Pattern, ladder
from lofi_fast.memory.plans import Plan, candidates

FULL = Fidelity(100, 224)
PLANS = candidates(ladder(Pattern.SPATIAL, FULL), 4, recompute="never")
HELD = 1000


class Device:
    """A step needs `HELD` and its share of 16,000, of full fidelity's Omega; more than `budget` fails."""

    def __init__(self, budget: int) -> None:
        self.budget = budget
        self.tried: list[Plan] = []

    def __call__(self, plan: Plan) -> int | None:
        self.tried.append(plan)
        peak = HELD + round(16_000 * plan.fidelity.omega / FULL.omega)
        return peak if peak <= self.budget else None


def share(plan: Plan | None) -> float:
    assert plan is not None
    return plan.fidelity.omega / FULL.omega


def test_by_hand_means_cut_4() -> None:
    device = Device(0)
    assert share(fixed(PLANS, device, 0, HELD)) == pytest.approx(1 / 4)
    assert not device.tried


@pytest.mark.parametrize(("budget", "cut"), [(17_000, 1), (16_999, 2), (9_000, 2), (8_000, 4), (2_000, 16)])
def test_doubling_and_halving_find_the_largest_power_of_two_that_works(budget: int, cut: int) -> None:
    up, down = Device(budget), Device(budget)
    assert share(doubling(PLANS, up, budget, HELD)) == pytest.approx(1 / cut, rel=0.1)
    assert share(halving(PLANS, down, budget, HELD)) == pytest.approx(1 / cut, rel=0.1)
    assert len(up.tried) <= 6 and len(down.tried) <= 5
    assert sum(plan.fidelity.omega > FULL.omega / cut * 1.1 for plan in up.tried) == (cut > 1), "one too many"


def test_a_search_where_nothing_works_ends() -> None:
    assert doubling(PLANS, Device(HELD), HELD, HELD) is None
    assert halving(PLANS, Device(HELD), HELD, HELD) is None
    assert linear(PLANS, Device(HELD), HELD, HELD) is None


def test_a_line_through_the_smallest_finds_all_that_a_line_can() -> None:
    device = Device(9_000)
    assert 0.45 < share(linear(PLANS, device, 9_000, HELD)) <= 0.5
    assert device.tried == [PLANS[-1]]


def place(**more: object) -> Row:
    return {
        "machine": "M", "device": "CPU, 2 cores", "threads": 1, "date": "2026-01-02T03:04:05+00:00", "commit": "abcdef",
        "dirty": False, **more,
    }  # fmt: skip


def test_tables_say_what_the_rows_hold() -> None:
    told = {"used": 0.9, "omega": 0.25, "failures": 2, "searched": 3, "trained": 8, "planning_seconds": 4.0}
    rows = [
        place(tuner=tuner, budget=10**9, **told | ({"used": None, "omega": None, "trained": 0} if number == 1 else {}))
        for number, tuner in enumerate(TUNERS)
    ]
    lines = section_of("tuners", rows).splitlines()
    assert "| cut 4 by hand | 90% (90%) | 25% | 0 of 1 | 2 | 3.0 | 4 |" in lines
    assert "| doubling until it fails (Lightning) | 0% (0%) | 0% | 1 of 1 | 2 | 3.0 | 4 |" in lines
    allocators = [
        place(of="governor", ms=0.25, spread_ms=[0.2, 0.3]),
        place(of="a", ms=100.0, spread_ms=[90.0, 110.0], of_default=0.9, peak=2**20, peak_varies=0.012, faults=1500),
    ]
    lines = section_of("overhead", allocators).splitlines()
    assert "| governor | 0.25 (0.2 to 0.3) |  |  |  |  |" in lines
    assert "| a | 100 (90 to 110) | 0.90x | 1 | 1.2% | 1,500 |" in lines
    updates = [
        place(optimizer="sgd", form=form, ms=[ms], times_ours=[ms / 2.0, 0.9, 1.1])
        for form, ms in (("apex", 2.0), ("torch, fused", 4.0))
    ]
    assert "| sgd | torch, fused | 4.0 | 2.00x (0.90 to 1.10) |" in section_of("optim", updates).splitlines()
    step = {
        "model": "demo", "budget": 10**9, "refused": None, "used": [0.8, 0.9, 1.0], "bound": True, "steps": 300,
        "error_of_peak": [0.01, 0.0], "error_of_added": [0.04, 0.0], "violations": 0, "lost": 0, "down": 20, "up": 21,
    }  # fmt: skip
    text = section_of("planner", [place(pressure=True, short=160, **step), place(pressure=False, **step)])
    assert "| demo, beside a neighbour | 1, 1.00 to 1.00 GB | 300, 160 with less left than the budget | 1.0% |" in text
    assert "| demo | 1, 1.00 to 1.00 GB | 300 | 1.0% | 4.0% |" in text


def test_an_optimiser_that_comes_to_other_weights_does_not_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = list(optim.measure(torch.device("cpu"), 1, 8))
    assert [row["optimizer"] for row in rows[::3]] == ["sgd", "adam", "adamw"]
    assert all(row["ours"] == (row["form"] == "torch, fused") for row in rows)
    uphill = partial(torch.optim.SGD, maximize=True)
    monkeypatch.setattr(optim, "_torch", lambda config, foreach, found: uphill(found, lr=config.lr))
    with pytest.raises(GateError, match="sgd, torch, foreach: weights differ"):
        list(optim.measure(torch.device("cpu"), 1, 8))

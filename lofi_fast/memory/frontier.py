"""The frontier of fidelity against time: what a budget of memory, and one of time, buy by arithmetic alone.

`ways` lists how a rung can be run, fastest first, each leaner than all before it; so the first that fits is the fastest
that fits. `chosen` is the planner's rule: the highest rung that fits the memory and is in time, run in the fastest way
that fits. `frontier` gives what else could be had for the same memory in less time.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

from lofi_fast.config import Recompute
from lofi_fast.fidelity import Fidelity
from lofi_fast.memory.plans import PRIOR, Device, Plan, candidates, relative_cost, worthwhile
from lofi_fast.memory.step_bytes import Setting, StepBytes, step_bytes

CPU_BASE = 400_000_000  # resident set of Python with torch and DALI before a step; assumed, as for a card
KEPT_FREE = 0.02  # of the budget: the governor's smallest margin


@dataclass(frozen=True)
class Levers:
    """What is the same for all plans of a run: its networks, its batch, and which levers may be used."""

    setting: Setting
    full: Fidelity
    batch: int
    device: Device
    micro_batch: int | None = None
    recompute: Recompute = "auto"
    launch_bound: float | None = None  # frame pixels, see `plans.relative_cost`

    def needs(self, plan: Plan) -> int:
        """Predicted bytes of a step, with parameters and optimiser, beside what the process holds outside tensors."""
        step = self._step(plan)
        return step.between + PRIOR.likely.added(step.added)

    def least(self, plan: Plan) -> int:
        """The same by the ledger alone, which no step is below."""
        step = self._step(plan)
        return step.between + step.added

    def added(self, plan: Plan) -> int:
        """Bytes of a step by the ledger alone, above what is held between steps."""
        return self._step(plan).added

    def _step(self, plan: Plan) -> StepBytes:
        return step_bytes(
            self.setting, plan.fidelity, plan.micro_batch, recompute=plan.recompute, chunk=plan.chunk,
            accumulates=plan.micro_batch < self.batch,
        )  # fmt: skip

    def cost(self, plan: Plan) -> float:
        return relative_cost(plan, self.full, self.device, self.launch_bound)


@dataclass(frozen=True)
class Way:
    """A plan, its predicted bytes (`Levers.needs`), and its time as a multiple of a step of cost 1."""

    plan: Plan
    needs: int
    cost: float


@lru_cache(maxsize=4096)
def ways(levers: Levers, rung: Fidelity) -> tuple[Way, ...]:
    """The ways to run a rung that are worth it, fastest first, each leaner than all before it; never empty."""
    plans = candidates(
        (rung,), levers.batch, levers.micro_batch, levers.recompute, levers.device, levers.launch_bound
    )  # fmt: skip
    return tuple(Way(plan, levers.needs(plan), levers.cost(plan)) for plan in worthwhile(plans, levers.added))


def fastest(levers: Levers, rung: Fidelity, room: int) -> Way | None:
    """The fastest way to run a rung within `room` bytes."""
    return next((way for way in ways(levers, rung) if way.needs <= room), None)


def chosen(levers: Levers, rungs: Sequence[Fidelity], room: int, most: float | None = None) -> Way | None:
    """The highest of `rungs` (highest first) that can be run within `room` bytes and at a cost of at most `most`, in
    the fastest way. Where none is so fast, the lowest that fits, for a time limit is wished and not owed; None where
    none fits.

    With more room or a higher `most` Omega never falls: whatever was allowed before is allowed still.
    """
    for rung in rungs:
        way = fastest(levers, rung, room)
        if way is not None and (most is None or way.cost <= most):
            return way
    return next(_fitting(levers, reversed(rungs), room), None)


def frontier(levers: Levers, rungs: Sequence[Fidelity], room: int) -> tuple[Way, ...]:
    """Of `rungs` (highest first) those that fit, each in its fastest way, without those that a higher one outruns."""
    found: list[Way] = []
    for way in _fitting(levers, rungs, room):
        if not found or way.cost < found[-1].cost:
            found.append(way)
    return tuple(found)


def _fitting(levers: Levers, rungs: Iterable[Fidelity], room: int) -> Iterator[Way]:
    return (way for rung in rungs if (way := fastest(levers, rung, room)) is not None)

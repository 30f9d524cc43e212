"""The governor: before each step it chooses the best plan that is predicted to fit the memory available now, and after
each step it learns from the peak that was measured.

All amounts are bytes. The words:

    base         what this process holds between steps; frames decoded ahead are not in it, they belong to their step
    peak         the most that the process held during a step
    added        peak - base
    predicted    of the peak: base + scale * ledger + extra for a plan that has never run; base + the most that it added
                 lately for one that has, since memory does not simply grow with pixels
    limit        the smaller of the budget and what this process could hold now
    margin       part of the limit that is left free, learned from how far peaks came out above their predictions
    room         limit - margin

The governor goes down at once when memory shrinks. It goes up after `CLEAN` steps if the higher plan leaves a tenth of
the room free, and after `STEADY` steps otherwise; so a neighbour whose memory comes and goes by less than the distance
of two rungs changes nothing. An untried plan needs some room for error beyond its prediction. After `STEADY` steps the
next higher rung is tried with no more of it than the plans that have run were found to need: what it needs itself is
known once it has run.

Where a step has a time limit (`--epoch-time`), plans that are expected to take longer are passed over in the same way
(times.py). Time is soft: where no plan that fits is fast enough, the lowest rung is run.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import groupby
from operator import attrgetter
from pathlib import Path
from typing import Any, Literal, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from lofi_fast.errors import InputError
from lofi_fast.fidelity import LARGEST_STEP, Pattern
from lofi_fast.memory.decision import Decision, NothingFits
from lofi_fast.memory.meter import Memory
from lofi_fast.memory.plans import PRIOR, Device, Plan, Prior, fit, refusal, relative_cost, worthwhile
from lofi_fast.memory.ranks import agree, highest_of_all
from lofi_fast.memory.readings import read_readings, write_readings
from lofi_fast.memory.times import Times

T = TypeVar("T", int, float)
CLEAN = 4  # readings in a row that must allow a higher plan, if it leaves the distance of a rung free
STEADY = 16  # readings in a row that must allow a higher plan, if it leaves less
SMALLEST_MARGIN = 0.02  # of the limit: peaks of one and the same step vary by so much
FAULT_MARGIN = 0.05  # of the limit, added to the margin while memory cannot be read
QUANTILE = 0.98  # the margin covers this share of the residuals (peak - predicted)
OVER = 0.95  # quantile of the relative errors of the fit, which an untried plan is allowed to have too
RESIDUALS = 256  # the last so many count
RECENT = 8  # the largest of the last 8 readings counts, of the base and of what a plan added: memory is freed late
UNSEEN = 0.02  # an untried plan is expected to add at least this share more than predicted
FEW = 0.12  # and this share more, divided by the number of plans that have been run
TRIALS = 3  # plans to run before training
CREEP = 0.02  # of the limit, by which what a process holds between steps may grow in the course of a training
LATE = 1.05  # of a step's time limit, up to which the plan that is running stays


class Gauge(Protocol):
    """What the governor reads of a meter, in bytes."""

    def total(self) -> int:
        """Memory of the device."""

    def reading(self) -> Memory:
        """Own, held and free memory at one moment."""

    def held(self) -> int:
        """What this process uses: all that it holds but what `release` would give back."""


@dataclass
class _Record:
    """What is known of one plan from running it."""

    recent: deque[int]  # what it added, the last `RECENT` times
    peak: int = 0  # the largest
    runs: int = 0  # 0: known only from an earlier run's file of readings, and not verified yet

    @property
    def added(self) -> int:
        return max(self.recent)


class Governor:
    """Chooses the plan of every step. Not for several threads.

    Args:
        ledger: bytes that a step adds at its peak to what the process holds between steps, by arithmetic
            (`step_bytes`) or by a line through two readings (`LearnedLedger`).
        candidates: the plans of each pattern, best first.
        say: is given one sentence, once, when readings fail.
        changes: what `plans.remedies` gives for each pattern, for the sentence of a refusal.
        pending: bytes of the frames that are decoded ahead now. They are held between steps, and the ledger counts
            them as the step's.
        device, launch_bound: whose time the costs of plans are estimated for; see `relative_cost`.
        step_seconds: the time limit of a step; None: there is none.
        expected: seconds that a step at full fidelity is expected to take, before any has been timed.
    """

    def __init__(
        self, meter: Gauge, budget: int, ledger: Callable[[Plan], int], candidates: Mapping[Pattern, Sequence[Plan]],
        say: Callable[[str], None], *, prior: Prior = PRIOR,
        changes: Mapping[Pattern, Sequence[tuple[str, Plan]]] | None = None, pending: Callable[[], int] = lambda: 0,
        device: Device | None = None, launch_bound: float | None = None, step_seconds: float | None = None,
        expected: float | None = None,
    ) -> None:  # fmt: skip
        self.budget, self.step_seconds = budget, step_seconds
        self._meter, self._say, self._prior, self._pending, self.device = meter, say, prior, pending, device
        self._plans = {pattern: tuple(worthwhile(plans, ledger)) for pattern, plans in candidates.items()}
        self._index = {p: {plan: i for i, plan in enumerate(plans)} for p, plans in self._plans.items()}
        self._changes = dict(changes or {})
        asked = [*self._plans.values(), *([plan for _, plan in offers] for offers in self._changes.values())]
        self._ledger = {plan: ledger(plan) for plans in asked for plan in plans}
        self._ledgers = {p: np.array([self._ledger[plan] for plan in plans]) for p, plans in self._plans.items()}
        self._needs: dict[Pattern, NDArray[np.float64]] = {}  # of all plans, beyond the base; see `_first_fitting`
        full = max((plan.fidelity for plans in self._plans.values() for plan in plans), key=lambda of: of.omega)
        every = (plan for plans in self._plans.values() for plan in plans)
        self._costs = {plan: relative_cost(plan, full, device, launch_bound) for plan in every}
        self._times = Times(self._costs.__getitem__, expected)
        self._seconds: dict[Pattern, NDArray[np.float64] | None] = {}  # of all plans; see `_seconds_of`
        self._options: dict[tuple[Pattern, Plan], tuple[Plan, ...]] = {}  # see `_lower`
        self._records: dict[Plan, _Record] = {}
        self._off: dict[Plan, tuple[int, int]] = {}  # (limit, base) at which a plan ran out of memory: it needs more
        self._available: deque[int] = deque(maxlen=STEADY)
        self._bases: deque[int] = deque(maxlen=RECENT)
        self._residuals: deque[int] = deque(maxlen=RESIDUALS)
        self._good: int | None = None  # the last plausible reading of what this process could hold
        self._free = self._base = self._learned = self._trials = 0
        self._last: Plan | None = None
        # What `_rung_above` gave for the last two steps: one is asked for before the one before it begins.
        self._tried: deque[Plan | None] = deque(maxlen=2)
        self._memory: int | None = None  # of the device
        self._faulty = False
        self._said: set[str] = set()
        self._refit()

    # Choosing

    def choose(self, pattern: Pattern, epoch: int = 0, step: int = 0) -> Decision:
        """The plan of a step, at the time when its frames are requested from the decoder. Raises NothingFits."""
        self._read()
        self._available.append(self._free)
        plans, room = self._plans[pattern], self._room(self._free)
        steady = self._room(min(self._available))
        spare = (1 - LARGEST_STEP) * self._room(min(list(self._available)[-CLEAN:]))
        index = self._first_fitting(pattern, math.floor(max(steady, spare)))
        if index == len(plans):  # memory has only just become enough: begin with the smallest
            index = self._index[pattern][min(plans, key=self.need)]
        self._tried.append(self._rung_above(pattern, index))
        if (above := self._tried[-1]) is not None:
            index = self._index[pattern][above]
        if self.need(plans[index]) > room:
            index = len(plans)
        index = agree(index, lambda i: self.need(plans[i]) <= room, len(plans))
        if index == len(plans):
            raise NothingFits(self._refusal(pattern), self._inside_margin(plans, pattern, epoch, step))
        best = self._first_fitting(pattern, room) == index
        reason = "the best that fits" if best else "up when memory stays"
        if best and self._first_fitting(pattern, room, timed=False) != index:
            reason = "the best in the time of an epoch"
        if plans[index] == above:
            reason = "one rung up, to see what it needs"
        return self._decide(pattern, epoch, step, plans[index], reason)

    def recheck(self, decision: Decision) -> Decision:
        """At the start of the step: the plan as decided, or a lower one if memory has shrunk since. Raises NothingFits.

        The frames of a lower plan can be cut out of those that were decoded. The plan is never raised here.
        """
        self._read(between_steps=True)
        if self._available:
            self._available[-1] = min(self._available[-1], self._free)
        options = self._lower_plans(decision.pattern, decision.plan)
        return self._lower(decision, options, "less memory than when its frames were asked for", agreeing=True)

    def failed(self, decision: Decision) -> Decision:
        """After memory ran out: a lower plan for the same samples. Raises NothingFits when there is none.

        A smaller chunk alone is the last resort: it saves little, and the prediction was wrong already. The plan that
        failed is not chosen again until the process could hold more than it could then.
        """
        self._read()
        limit = min(decision.limit, self._free)
        before, _ = self._off.get(decision.plan, (0, 0))
        self._off[decision.plan] = (max(limit, before), decision.base)
        self._last = None
        self._refit()
        plan = decision.plan
        _, *lower = self._lower_plans(decision.pattern, plan)
        options = sorted(lower, key=lambda other: replace(other, chunk=plan.chunk) == plan)  # the others as they were
        return self._lower(decision, options, "memory ran out", agreeing=False)

    def learn(self, decision: Decision, peak: int | None, seconds: float | None = None) -> None:
        """Learn the peak of a step that went through, in bytes (None: it could not be read), and its seconds."""
        self._last = decision.plan
        self._read_held()
        if peak is None:
            return
        if not 0 < peak <= 1.1 * self._total():
            self._once("peak", f"a peak of {peak} bytes makes no sense and is not learned from")
            return
        record = self._records.get(decision.plan)
        if record is None or not record.runs:  # from now on this run's own readings count
            record = self._records[decision.plan] = _Record(deque(maxlen=RECENT))
        else:
            self._residuals.append(peak - decision.predicted)
            self._learned = _quantile(self._residuals, QUANTILE)
        before = record.added if record.runs else None
        record.recent.append(max(peak - self._base, 0))  # the base after the step: what stays is not added again
        record.peak = max(record.peak, peak)
        record.runs += 1
        if seconds is not None:
            self.learn_time(decision.plan, seconds)
        if record.added != before:
            self._refit()

    def learn_time(self, plan: Plan, seconds: float, warm: bool = False) -> None:
        """Learn the seconds of a step of a plan; `warm`: even if it is the plan's first."""
        if self._times.learn(plan, seconds, warm):
            self._seconds.clear()

    def _lower(self, decision: Decision, options: Sequence[Plan], reason: str, *, agreeing: bool) -> Decision:
        """The decision with the first of `options` that fits."""
        room = self._room(self._free)
        fitting = [i for i, plan in enumerate(options) if self.need(plan) <= room]
        chosen = next((i for i in fitting if self._in_time(decision.pattern, options[i])), (*fitting, len(options))[0])
        if agreeing:
            chosen = agree(chosen, lambda i: self.need(options[i]) <= room, len(options))
        if chosen == len(options):
            last = self._inside_margin(options, decision.pattern, decision.epoch, decision.step)
            if last is not None:
                last = replace(last, requested=decision.requested)
            raise NothingFits(self._refusal(decision.pattern, options), last)
        reason = decision.reason if options[chosen] == decision.plan else reason
        made = self._decide(decision.pattern, decision.epoch, decision.step, options[chosen], reason)
        return replace(made, requested=decision.requested)

    def _lower_plans(self, pattern: Pattern, plan: Plan) -> tuple[Plan, ...]:
        """The plan itself and those below it whose frames can be cut out of its own, best first."""
        if (pattern, plan) not in self._options:
            whole, size = plan.fidelity, plan.micro_batch
            self._options[pattern, plan] = (
                plan,
                *(
                    lower
                    for lower in self._plans[pattern][self._index[pattern][plan] + 1 :]
                    if lower.fidelity.num_snippets <= whole.num_snippets
                    and lower.fidelity.side <= whole.side
                    and lower.micro_batch <= size
                ),
            )
        return self._options[pattern, plan]

    def _decide(self, pattern: Pattern, epoch: int, step: int, plan: Plan, reason: str) -> Decision:
        limit = min(self.budget, self._free)
        return Decision(
            pattern, epoch, step, plan, plan, self.predict(plan), limit, self._room(self._free), self._free, reason,
            self._base, not self._verified(plan), plan != self._last,
        )  # fmt: skip

    def _inside_margin(self, plans: Sequence[Plan], pattern: Pattern, epoch: int, step: int) -> Decision | None:
        """See `NothingFits`."""
        limit = min(self.budget, self._free)
        if not self.knows:
            return None
        for plan in sorted(plans, key=lambda plan: (not self._verified(plan), self.predict(plan))):
            failed_at, _ = self._off.get(plan, (0, 0))
            if self.predict(plan) <= limit and failed_at < limit:
                return self._decide(pattern, epoch, step, plan, "the last that fits, inside the margin")
        return None

    def _refusal(self, pattern: Pattern, plans: Sequence[Plan] = (), spare: int = 0) -> str:
        plans, changes = plans or self._plans[pattern], self._changes.get(pattern, ())
        limit, room = min(self.budget, self._free), self._room(self._free) - spare
        return refusal(plans, self.need, limit, room, self.budget, changes)

    # Predicting

    @property
    def knows(self) -> bool:
        """Whether any plan has run, so that predictions rest on more than the prior."""
        return any(record.runs for record in self._records.values())

    def predict(self, plan: Plan) -> int:
        """Predicted peak of a step in bytes; never less than base + ledger."""
        base, ledger = self._base, self._ledger[plan]
        record = self._records.get(plan)
        peak = base + (self.fit.added(ledger) if record is None else max(record.added, ledger))
        return max(peak, self._off[plan][0]) if plan in self._off else peak

    def need(self, plan: Plan) -> int:
        """Room that a plan needs to be chosen: its predicted peak, and an allowance for error if it is untried."""
        predicted, record = self.predict(plan), self._records.get(plan)
        if record is not None and record.runs:
            return predicted
        allowance = self._known_errors if plan in self._tried and plan not in self._off else self._allowance
        return predicted + math.ceil(allowance * (predicted - self._base))

    def _rung_above(self, pattern: Pattern, index: int) -> Plan | None:
        """An untried plan of the rung above the plan that runs, if memory was steady and leaves room for its prediction
        and little more; None if there is none.
        """
        plans = self._plans[pattern]
        plan, room = plans[index], self._room(min(self._available))
        if len(self._available) < STEADY or self._last != plan or not self._verified(plan):
            return None
        rungs = groupby(reversed(plans[:index]), attrgetter("omega"))  # from the nearest on, each by falling cost
        above = next((list(rung) for omega, rung in rungs if omega > plan.omega), [])
        for higher in reversed(above):
            predicted = self.predict(higher)
            needed = predicted + math.ceil(self._known_errors * (predicted - self._base))
            untried = higher not in self._off and not self._verified(higher)
            if untried and needed <= room and self._in_time(pattern, higher):
                return higher
        return None

    def would_fit(self, ledger: int) -> bool:
        """Whether an untried step of so many bytes by the ledger would be chosen, by what is known now."""
        added = self.fit.added(ledger)
        return self._base + added + math.ceil(self._allowance * added) <= self._room(self._free)

    def _first_fitting(self, pattern: Pattern, room: int, timed: bool = True) -> int:
        """The index of the first plan of a pattern whose `need` is within `room`, and which is in time, or else of the
        lowest rung within `room`; their number where none is. Not `timed`: as if there were no time limit.

        There may be thousands of plans, so all needs beyond the base are kept until something is learned.
        """
        index = self._index[pattern]
        if pattern not in self._needs:
            ledgers = self._ledgers[pattern]
            added = np.maximum(np.ceil(self.fit.scale * ledgers + self.fit.extra), ledgers)
            verified = np.zeros(len(index), dtype=bool)
            for plan, record in self._records.items():
                if plan in index:
                    added[index[plan]] = max(record.added, self._ledger[plan])
                    verified[index[plan]] = record.runs > 0
            self._needs[pattern] = added + np.where(verified, 0.0, np.ceil(self._allowance * added))
        fitting = self._needs[pattern] <= room - self._base
        for plan in self._off:
            if plan in index:
                fitting[index[plan]] = self.need(plan) <= room
        if not fitting.any():
            return len(index)
        seconds = self._seconds_of(pattern) if timed else None
        if seconds is None:
            return int(fitting.argmax())
        if (quick := fitting & (seconds <= self._allowed(pattern))).any():
            return int(quick.argmax())
        lowest = self._plans[pattern][int(np.flatnonzero(fitting)[-1])].fidelity
        return next(i for i in np.flatnonzero(fitting).tolist() if self._plans[pattern][i].fidelity == lowest)

    def _seconds_of(self, pattern: Pattern) -> NDArray[np.float64] | None:
        """Seconds of a step of each plan, where they matter and are known."""
        if self.step_seconds is None:
            return None
        if pattern not in self._seconds:
            self._seconds[pattern] = self._times.estimates(self._plans[pattern])
        return self._seconds[pattern]

    def _allowed(self, pattern: Pattern) -> NDArray[np.float64]:
        """Seconds that a step of each plan may take; a little more for the one that is running."""
        assert self.step_seconds is not None
        allowed = np.full(len(self._plans[pattern]), self.step_seconds)
        if self._last in self._index[pattern]:
            allowed[self._index[pattern][self._last]] *= LATE
        return allowed

    def _in_time(self, pattern: Pattern, plan: Plan) -> bool:
        seconds = self._seconds_of(pattern)
        index = self._index[pattern][plan]
        return seconds is None or bool(seconds[index] <= self._allowed(pattern)[index])

    def _refit(self) -> None:
        """Fit the two scalars to all readings, and the allowance by which an untried plan may exceed the fit."""
        readings = [(self._ledger[plan], record.added) for plan, record in self._records.items()]
        for plan, (limit, base) in self._off.items():
            if plan not in self._records or limit - base > self._records[plan].added:
                readings.append((self._ledger[plan], max(limit - base, 0)))
        self.fit = fit(readings, self._prior)
        self._needs.clear()
        over = [added / max(self.fit.added(ledger), 1) - 1 for ledger, added in readings]
        self._known_errors = max(UNSEEN, _quantile(over, OVER))
        self._allowance = self._known_errors + FEW / len(over) if over else 0.0

    def _room(self, available: int) -> int:
        """Bytes that a plan may need, when this process could hold `available` bytes: the limit minus the margin."""
        limit = min(self.budget, available)
        return limit - self.margin(limit)

    def margin(self, limit: int) -> int:
        """Bytes of a limit that are left free."""
        margin = max(math.ceil(SMALLEST_MARGIN * limit), self._learned)
        return margin + (math.ceil(FAULT_MARGIN * limit) if self._faulty else 0)

    def seconds(self, plan: Plan) -> float | None:
        """Seconds of a step: measured, or estimated; None before any plan was timed."""
        return self._times(plan)

    def timed(self, plan: Plan) -> bool:
        """Whether a step of the plan has been timed."""
        return self._times.measured(plan) is not None

    def table(self, pattern: Pattern) -> list[dict[str, Any]]:
        """A row for each plan of a pattern, best first: predictions and readings, for plan.json and the report."""
        rows, plans = [], self._plans[pattern]
        seconds = self._times.estimates(plans)
        for index, plan in enumerate(plans):
            record = self._records.get(plan)
            rows.append(
                {
                    "plan": plan.to_json(),
                    "predicted": self.predict(plan),
                    "measured": record.peak if record is not None and record.runs else None,
                    "cost": round(self._costs[plan], 4),
                    "seconds": None if seconds is None else float(seconds[index]),
                    "failed_at": self._off[plan][0] if plan in self._off else None,
                }
            )
        return rows

    # Calibration

    def warm_up(self) -> Decision:
        """The smallest plan of all, to be run before the trials and not learned from: the first step of a process loads
        code and takes memory for good, which would be mistaken for the plan's own.
        """
        self._read()
        room = self._room(self._free)
        pattern = min(self._plans, key=lambda pattern: min(map(self._ledger.__getitem__, self._plans[pattern])))
        alike = self._smallest(pattern)
        plan = next((plan for plan in alike if self._least(plan) <= room), alike[-1])
        return self._decide(pattern, 0, 0, plan, "the first step of the process")

    def calibrate(self, measure: Callable[[Decision], int | None]) -> None:
        """Run all trials. `measure` runs a step and gives its peak, None when memory ran out. Raises NothingFits."""
        while (trial := self.probe()) is not None:
            peak = measure(trial)
            if peak is None:
                with suppress(NothingFits):  # `probe` raises it, if it still holds
                    self.failed(trial)
            else:
                self.learn(trial, peak)

    def accept(self, patterns: Iterable[Pattern]) -> None:
        """Raises NothingFits for a pattern whose smallest plan fits now, but would not when the process has grown in
        the course of a training: a refusal must not come hours late.
        """
        limit = min(self.budget, self._free)
        for pattern in patterns:
            if min(map(self.need, self._plans[pattern])) > self._room(self._free) - math.ceil(CREEP * limit):
                raise NothingFits(self._refusal(pattern, spare=math.ceil(CREEP * limit)))

    def probe(self) -> Decision | None:
        """The next plan to run as a trial, or None when there have been enough. Raises NothingFits.

        It is the largest plan that is predicted to fit, of each pattern in turn. Three trials are enough, or fewer if
        the plan of every pattern has been run.
        """
        self._read(between_steps=True)
        patterns = list(self._plans)
        for turn in range(len(patterns)):
            pattern = patterns[(self._trials + turn) % len(patterns)]
            plan = self._worth_trying(pattern)
            if not self._verified(plan):
                if self._trials == TRIALS:
                    return None
                self._trials += 1
                return self._decide(pattern, 0, 0, plan, "a trial")
        return None

    def _worth_trying(self, pattern: Pattern) -> Plan:
        """The best plan that is predicted to fit. Where none is, the smallest, if its tensors alone could fit: then a
        refusal rests on a reading.
        """
        plans, room = self._plans[pattern], self._room(self._free)
        index = self._first_fitting(pattern, room)
        index = agree(index, lambda i: self.need(plans[i]) <= room, len(plans))
        if index < len(plans):
            return plans[index]
        alike, limit = self._smallest(pattern), min(self.budget, self._free)
        untried = [i for i, plan in enumerate(alike) if self._least(plan) <= room and not self._verified(plan)]
        index = next(iter(untried), len(alike))
        if untried and self.knows and self.predict(alike[index]) > limit:
            # More is known than the careful prior, and no cap holds back what libraries take for themselves.
            index = min(untried, key=lambda i: self.predict(alike[i]))
        index = highest_of_all(index)
        if index == len(alike):
            raise NothingFits(self._refusal(pattern))
        return alike[index]

    def _smallest(self, pattern: Pattern) -> tuple[Plan, ...]:
        """The smallest plan of a pattern and those that differ from it in their chunk alone, the largest chunk first:
        small chunks make small blocks, of which an allocator may keep more than the chunk saves.
        """
        smallest = min(self._plans[pattern], key=self._ledger.__getitem__)
        return tuple(plan for plan in self._plans[pattern] if replace(plan, chunk=smallest.chunk) == smallest)

    def _least(self, plan: Plan) -> int:
        """Bytes that a plan is known to need: its tensors, and more than it failed with."""
        return max(self._base + self._ledger[plan], self._off.get(plan, (0, 0))[0])

    def _verified(self, plan: Plan) -> bool:
        record = self._records.get(plan)
        return record is not None and record.runs > 0

    def save_readings(self, path: Path, key: Mapping[str, Any]) -> None:
        """Write what was learned, for later runs with the same `key` (device, driver, torch, model, dtype, threads)."""
        write_readings(path, key, {plan: record.added for plan, record in self._records.items()}, self._say)

    def load_readings(self, path: Path, key: Mapping[str, Any]) -> bool:
        """Start from an earlier run's readings. Gives False when there are none with the same `key`, and says why.

        One trial is still run, to see that they hold; the other plans are verified as they are used.
        """
        found = read_readings(path, key, self._say)
        if found is None:
            return False
        self._read_held()
        for plan, added in found.items():
            if plan in self._ledger and plan not in self._records:
                self._records[plan] = _Record(deque([max(added, self._ledger[plan])], RECENT))
        if self._records:
            self._trials = max(self._trials, TRIALS - 1)
        self._refit()
        return bool(self._records)

    # Reading

    def _read(self, between_steps: bool = False) -> None:
        """Read what this process could hold now; while the meter fails, keep the last plausible reading. Raises
        InputError when what the process holds has never been readable.
        """
        memory, problem = None, ""
        try:
            memory = self._meter.reading()
            if not (0 < memory.held <= memory.own and memory.free >= 0 and memory.available <= 1.1 * self._total()):
                problem = f"{memory.free} bytes free, {memory.own} its own, {memory.held} in use"
        except InputError:  # another process is gone
            raise
        except Exception as error:  # a driver's library may raise anything
            problem = f"{type(error).__name__}: {error}"
        self._faulty = bool(problem)
        if memory is not None and not problem:
            self._good = memory.available
            if between_steps or not self._bases:
                self._see_base(memory.held)
        else:
            self._once("reading", f"memory cannot be read ({problem}): planning with the last reading, and less of it")
        if self._good is None:
            self._good = self.budget
        if not self._bases:
            self._read_held()
        self._free = self._good

    def _read_held(self) -> None:
        """Read what is held between steps; while the meter fails, keep the last readings. Without any: InputError."""
        held, problem = 0, ""
        try:
            held = self._meter.held()
            if not 0 < held <= 1.1 * self._total():
                problem = f"{held} bytes"
        except InputError:
            raise
        except Exception as error:  # as above
            problem = f"{type(error).__name__}: {error}"
        if not problem:
            self._see_base(held)
        elif not self._bases:
            raise InputError(f"what this process holds cannot be read ({problem}): memory cannot be planned")
        else:
            self._once("held", f"what this process holds cannot be read ({problem}): taking the last readings")

    def _see_base(self, held: int) -> None:
        self._bases.append(max(held - self._pending(), 0))
        self._base = max(self._bases)

    def _total(self) -> float:
        """Memory of the device; infinite while it cannot be read."""
        if self._memory is None:
            with suppress(Exception):
                total = self._meter.total()
                self._memory = total if total > 0 else None
        return math.inf if self._memory is None else self._memory

    def _once(self, kind: str, text: str) -> None:
        if kind not in self._said:
            self._said.add(kind)
            self._say(text)

    # State

    def state_dict(self) -> dict[str, Any]:
        """All that decisions depend on, as numbers and lists that JSON can hold."""
        return {
            "records": [[p.to_json(), list(r.recent), r.peak, r.runs] for p, r in self._records.items()],
            "times": self._times.state_dict(),
            "off": [[plan.to_json(), limit, base] for plan, (limit, base) in self._off.items()],
            "available": list(self._available),
            "bases": list(self._bases),
            "residuals": list(self._residuals),
            "good": self._good,
            "trials": self._trials,
            "last": None if self._last is None else self._last.to_json(),
            "tried": [None if plan is None else plan.to_json() for plan in self._tried],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from `state_dict`. Plans that are no longer candidates are left out."""
        self._records = {
            plan: _Record(deque(recent, RECENT), *numbers)
            for key, recent, *numbers in state["records"]
            if (plan := Plan.from_json(key)) in self._ledger
        }  # fmt: skip
        self._times.load_state_dict(state["times"], self._ledger)
        self._seconds.clear()
        self._off = {
            plan: (limit, base) for key, limit, base in state["off"] if (plan := Plan.from_json(key)) in self._ledger
        }
        self._available = deque(state["available"], STEADY)
        self._bases = deque(state["bases"], RECENT)
        self._residuals = deque(state["residuals"], RESIDUALS)
        self._base, self._learned = max(self._bases, default=0), _quantile(self._residuals, QUANTILE)
        self._good, self._trials = state["good"], state["trials"]
        self._last = None if state["last"] is None else Plan.from_json(state["last"])
        self._tried = deque((None if key is None else Plan.from_json(key) for key in state["tried"]), 2)
        self._refit()


def _quantile(values: Iterable[T], share: float) -> T | Literal[0]:
    ordered = sorted(values)
    return ordered[math.ceil(share * len(ordered)) - 1] if ordered else 0

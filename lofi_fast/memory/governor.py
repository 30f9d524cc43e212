"""The governor: at every step the best plan that fits what memory is there, learned from every step that was run.

Words. Base: what this process holds between steps, frames decoded ahead aside: they belong to the step. Peak: the most
it held in a step. Added: peak less base. Predicted peak: base + scale * ledger + extra for a plan that has not been
run, base + the most it added lately for one that has; memory is not monotone in pixels. Limit: the smaller of the
budget and what can be had now. Room: the limit less a margin, learned from how far peaks came out above their
prediction.

Going down is immediate. Going up waits: `CLEAN` steps where a tenth of the room would be to spare, `STEADY` steps
otherwise, so that a neighbour whose memory comes and goes by less than a rung moves nothing.
"""

from __future__ import annotations

import json
import math
import os
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from lofi_fast.errors import InputError
from lofi_fast.fidelity import LARGEST_STEP, Fidelity, Pattern
from lofi_fast.memory.meter import Memory
from lofi_fast.memory.plans import PRIOR, Device, Plan, Prior, fit, refusal, relative_cost, worthwhile
from lofi_fast.memory.ranks import _agree, _highest_of_all

T = TypeVar("T", int, float)
CLEAN = 4  # readings in a row that must allow a higher plan with a rung to spare
STEADY = 16  # and without
SMALLEST_MARGIN = 0.02  # of the limit: what peaks of one and the same step were seen to vary by
FAULT_MARGIN = 0.05  # of the limit, more, while readings fail
QUANTILE = 0.98  # of the residuals, for the margin
OVER = 0.95  # of what plans were over the fit, for the allowance of one that was never run
RESIDUALS = 256
RECENT = 8  # readings of the base, and of what a plan added, of which the largest counts: what waits to be freed comes
# and goes
UNSEEN = 0.02  # of what a plan adds, more for one that was never run
FEW = 0.12  # and this, divided by the number of plans that were run
TRIALS = 3
VERSION = 2  # of the file of readings


class NothingFits(InputError):
    """No plan fits what memory there is now. Memory that others hold may be freed: a caller may wait and ask again."""


class Gauge(Protocol):
    """What the governor reads of a meter, in bytes."""

    def total(self) -> int:
        """Memory of the device."""

    def reading(self) -> Memory:
        """Own, held and free memory at one moment."""

    def held(self) -> int:
        """What this process holds and uses: without what `release` would give back."""


@dataclass(frozen=True)
class Decision:
    """The plan of one step, and why. `limit` is the cap to run it under."""

    pattern: Pattern
    epoch: int
    step: int
    plan: Plan
    requested: Plan  # the plan whose frames were asked for; `plan` when nothing came between
    predicted: int  # peak
    limit: int
    room: int
    free: int  # what this process could hold when it was last asked
    reason: str
    base: int = 0
    new: bool = False  # never run in this process or those that it goes on from
    changed: bool = False  # another plan than the last step's: to be run after `meter.release()`, for a peak of its own

    @property
    def reduced_from(self) -> Fidelity | None:
        """The fidelity that the frames were decoded at, where the step is to run lower."""
        return None if self.plan.fidelity == self.requested.fidelity else self.requested.fidelity

    def fields(self) -> dict[str, Any]:
        """For the step's event in log.jsonl; what `Replay` reads is among it."""
        source = self.reduced_from
        return {
            "num_snippets": self.plan.fidelity.num_snippets,
            "side": self.plan.fidelity.side,
            "micro_batch": self.plan.micro_batch,
            "recompute": self.plan.recompute,
            "chunk": self.plan.chunk,
            "reduced_from": None if source is None else [source.num_snippets, source.side],
            "predicted": self.predicted,
            "base": self.base,
            "limit": self.limit,
            "room": self.room,
            "free": self.free,
            "reason": self.reason,
        }


class Planner(Protocol):
    """What the training loop asks: a `Governor`, or a `Replay`."""

    def choose(self, pattern: Pattern, epoch: int, step: int) -> Decision:
        """The plan of a step, when its frames are asked for."""

    def recheck(self, decision: Decision) -> Decision:
        """The same or a lower plan, at the start of the step."""

    def learn(self, decision: Decision, peak: int | None, seconds: float | None = None) -> None:
        """Tell what the step needed; when its tensors are gone."""

    def failed(self, decision: Decision) -> Decision:
        """The plan to try the same samples with again, after memory ran out."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None: ...


@dataclass
class _Record:
    """One plan's readings."""

    recent: deque[int]  # what it added
    peak: int = 0  # the largest
    runs: int = 0  # 0: from the file of readings, to be verified
    seconds: float | None = None

    @property
    def added(self) -> int:
        return max(self.recent)


class Governor:
    """Chooses, at every step. Not for several threads.

    `ledger(plan)`: bytes that a step adds at its peak to the process between steps, by arithmetic. `candidates`: the
    plans of each pattern, best first. `say` is told, once, when readings fail. `changes`: what `plan.remedies` gives.
    `pending`: bytes of frames decoded ahead, which are held between steps and which the ledger counts.
    """

    def __init__(
        self, meter: Gauge, budget: int, ledger: Callable[[Plan], int], candidates: Mapping[Pattern, Sequence[Plan]],
        say: Callable[[str], None], *, prior: Prior = PRIOR,
        changes: Mapping[Pattern, Sequence[tuple[str, Plan]]] | None = None, pending: Callable[[], int] = lambda: 0,
        device: Device | None = None,
    ) -> None:  # fmt: skip
        self.budget = budget
        self._meter, self._say, self._prior, self._pending, self._device = meter, say, prior, pending, device
        self._plans = {pattern: tuple(worthwhile(plans, ledger)) for pattern, plans in candidates.items()}
        self._index = {p: {plan: i for i, plan in enumerate(plans)} for p, plans in self._plans.items()}
        self._changes = dict(changes or {})
        asked = [*self._plans.values(), *([plan for _, plan in offers] for offers in self._changes.values())]
        self._ledger = {plan: ledger(plan) for plans in asked for plan in plans}
        self._ledgers = {p: np.array([self._ledger[plan] for plan in plans]) for p, plans in self._plans.items()}
        self._needs: dict[Pattern, NDArray[np.float64]] = {}  # of all plans, beyond the base; see `_first_fitting`
        self._options: dict[tuple[Pattern, Plan], tuple[Plan, ...]] = {}  # see `_lower`
        self._records: dict[Plan, _Record] = {}
        self._off: dict[Plan, tuple[int, int]] = {}  # (limit, base) that a plan failed at: it needs more than that
        self._available: deque[int] = deque(maxlen=STEADY)
        self._bases: deque[int] = deque(maxlen=RECENT)
        self._residuals: deque[int] = deque(maxlen=RESIDUALS)
        self._good: int | None = None  # the last reading of what can be had that made sense
        self._free = self._base = self._learned = self._trials = 0
        self._last: Plan | None = None
        self._memory: int | None = None  # of the device
        self._faulty = False
        self._said: set[str] = set()
        self._refit()

    # Choosing

    def choose(self, pattern: Pattern, epoch: int = 0, step: int = 0) -> Decision:
        """The plan of a step, when its frames are asked for. Raises NothingFits."""
        self._read()
        self._available.append(self._free)
        plans, room = self._plans[pattern], self._room(self._free)
        steady = self._room(min(self._available))
        spare = (1 - LARGEST_STEP) * self._room(min(list(self._available)[-CLEAN:]))
        index = self._first_fitting(pattern, math.floor(max(steady, spare)))
        if index == len(plans):  # there was not enough until now: begin low
            index = self._index[pattern][min(plans, key=self.need)]
        if self.need(plans[index]) > room:
            index = len(plans)
        index = _agree(index, lambda i: self.need(plans[i]) <= room, len(plans))
        if index == len(plans):
            raise self._nothing_fits(pattern)
        best = self._first_fitting(pattern, room) == index
        reason = "the best that fits" if best else "up when memory stays"
        return self._decide(pattern, epoch, step, plans[index], reason)

    def recheck(self, decision: Decision) -> Decision:
        """At the start of the step: as it was decided, or lower when memory has shrunk since. Raises NothingFits.

        Lower is a rung whose frames can be cut out of those that were asked for, with as many videos at once where
        that is possible; never higher.
        """
        self._read(between_steps=True)
        if self._available:
            self._available[-1] = min(self._available[-1], self._free)
        return self._lower(decision, 0, "less memory than when its frames were asked for", agreeing=True)

    def failed(self, decision: Decision) -> Decision:
        """After memory ran out: the next plan for the same samples, lower. Raises NothingFits when there is none.

        The plan that failed stays off until more can be had than it failed with.
        """
        self._read()
        limit = min(decision.limit, self._free)
        before, _ = self._off.get(decision.plan, (0, 0))
        self._off[decision.plan] = (max(limit, before), decision.base)
        self._last = None
        self._refit()
        return self._lower(decision, 1, "memory ran out", agreeing=False)

    def learn(self, decision: Decision, peak: int | None, seconds: float | None = None) -> None:
        """Take in the peak of a step that went through, in bytes (None: no reading), and the seconds it took."""
        self._last = decision.plan
        self._read_held()
        if peak is None:
            return
        if not 0 < peak <= 1.1 * self._total():
            self._once("peak", f"a peak of {peak} bytes makes no sense and is not learned from")
            return
        record = self._records.get(decision.plan)
        if record is None or not record.runs:  # verified: what other runs read counts no more
            record = self._records[decision.plan] = _Record(deque(maxlen=RECENT))
        else:
            self._residuals.append(peak - decision.predicted)
            self._learned = _quantile(self._residuals, QUANTILE)
        before = record.added if record.runs else None
        record.recent.append(max(peak - self._base, 0))  # as it is now: what stays was not the plan's
        record.peak = max(record.peak, peak)
        record.runs += 1
        if seconds is not None:
            old = seconds if record.seconds is None else record.seconds
            record.seconds = old + (seconds - old) / min(record.runs, 8)
        if record.added != before:
            self._refit()

    def _lower(self, decision: Decision, start: int, reason: str, *, agreeing: bool) -> Decision:
        """The first that fits of the plan itself and those below it, from the `start`-th on."""
        room, options = self._room(self._free), self._lower_plans(decision.pattern, decision.plan)
        chosen = next((i for i in range(start, len(options)) if self.need(options[i]) <= room), len(options))
        if agreeing:
            chosen = _agree(chosen, lambda i: self.need(options[i]) <= room, len(options))
        if chosen == len(options):
            raise self._nothing_fits(decision.pattern, options[start:])
        reason = reason if chosen else decision.reason
        made = self._decide(decision.pattern, decision.epoch, decision.step, options[chosen], reason)
        return replace(made, requested=decision.requested)

    def _lower_plans(self, pattern: Pattern, plan: Plan) -> tuple[Plan, ...]:
        """The plan itself and those below it whose frames can be cut out of its own, as many videos at once first."""
        if (pattern, plan) not in self._options:
            whole, size = plan.fidelity, plan.micro_batch
            below = [
                lower
                for lower in self._plans[pattern][self._index[pattern][plan] + 1 :]
                if lower.fidelity.num_snippets <= whole.num_snippets and lower.fidelity.side <= whole.side
            ]
            self._options[pattern, plan] = (
                plan,
                *(lower for lower in below if lower.micro_batch == size),
                *(lower for lower in below if lower.micro_batch < size),
            )
        return self._options[pattern, plan]

    def _decide(self, pattern: Pattern, epoch: int, step: int, plan: Plan, reason: str) -> Decision:
        limit = min(self.budget, self._free)
        return Decision(
            pattern, epoch, step, plan, plan, self.predict(plan), limit, self._room(self._free), self._free, reason,
            self._base, not self._verified(plan), plan != self._last,
        )  # fmt: skip

    def _nothing_fits(self, pattern: Pattern, plans: Sequence[Plan] = ()) -> NothingFits:
        plans, changes = plans or self._plans[pattern], self._changes.get(pattern, ())
        limit, room = min(self.budget, self._free), self._room(self._free)
        return NothingFits(refusal(plans, self.need, limit, room, self.budget, changes))

    # Predicting

    def predict(self, plan: Plan) -> int:
        """Peak bytes of a step; at least base + ledger."""
        base, ledger = self._base, self._ledger[plan]
        record = self._records.get(plan)
        peak = base + (self.fit.added(ledger) if record is None else max(record.added, ledger))
        return max(peak, self._off[plan][0]) if plan in self._off else peak

    def need(self, plan: Plan) -> int:
        """The prediction, with an allowance where the plan is still to be verified."""
        predicted, record = self.predict(plan), self._records.get(plan)
        if record is not None and record.runs:
            return predicted
        return predicted + math.ceil(self._allowance * (predicted - self._base))

    def _first_fitting(self, pattern: Pattern, room: int) -> int:
        """The index of the first plan of a pattern whose `need` is within `room`; their number where none is.

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
        return int(fitting.argmax()) if fitting.any() else len(index)

    def _refit(self) -> None:
        """The two scalars, and how much more a plan that was never run may need than they say."""
        readings = [(self._ledger[plan], record.added) for plan, record in self._records.items()]
        for plan, (limit, base) in self._off.items():
            if plan not in self._records or limit - base > self._records[plan].added:
                readings.append((self._ledger[plan], max(limit - base, 0)))
        self.fit = fit(readings, self._prior)
        self._needs.clear()
        over = [added / max(self.fit.added(ledger), 1) - 1 for ledger, added in readings]
        self._allowance = max(UNSEEN, _quantile(over, OVER)) + FEW / len(over) if over else 0.0

    def _room(self, available: int) -> int:
        """What can be planned with of what can be had."""
        limit = min(self.budget, available)
        return limit - self.margin(limit)

    def margin(self, limit: int) -> int:
        """What of a limit is not planned with."""
        margin = max(math.ceil(SMALLEST_MARGIN * limit), self._learned)
        return margin + (math.ceil(FAULT_MARGIN * limit) if self._faulty else 0)

    def seconds(self, plan: Plan, full: Fidelity) -> float | None:
        """Of a step: measured, else by its cost relative to those measured; None before any was."""
        record = self._records.get(plan)
        if record is not None and record.seconds is not None:
            return record.seconds
        known = {p: r.seconds for p, r in self._records.items() if r.seconds is not None}
        if not known:
            return None
        costs = sum(relative_cost(p, full, self._device) for p in known)
        return sum(known.values()) * relative_cost(plan, full, self._device) / costs

    def table(self, pattern: Pattern, full: Fidelity) -> list[dict[str, Any]]:
        """What is thought of each plan of a pattern, best first; for plan.json, the report and the command `plan`."""
        rows = []
        for plan in self._plans[pattern]:
            record = self._records.get(plan)
            rows.append(
                {
                    "plan": plan.to_json(),
                    "predicted": self.predict(plan),
                    "measured": record.peak if record is not None and record.runs else None,
                    "cost": round(relative_cost(plan, full, self._device), 4),
                    "seconds": self.seconds(plan, full),
                    "failed_at": self._off[plan][0] if plan in self._off else None,
                }
            )
        return rows

    # Calibration

    def warm_up(self) -> Decision:
        """The smallest plan of all, to be run before the trials and not to be learned from: the first step of a process
        loads code and takes memory that stays, which would be read as the plan's own.
        """
        self._read()
        pattern, plan = min(
            ((pattern, plan) for pattern, plans in self._plans.items() for plan in plans),
            key=lambda pair: self._ledger[pair[1]],
        )
        return self._decide(pattern, 0, 0, plan, "the first step of the process")

    def calibrate(self, measure: Callable[[Decision], int | None]) -> None:
        """Run the trials: `measure` runs a step and gives its peak, or None when memory ran out. Raises NothingFits."""
        while (trial := self.probe()) is not None:
            peak = measure(trial)
            if peak is None:
                with suppress(NothingFits):  # `probe` looks again
                    self.failed(trial)
            else:
                self.learn(trial, peak)

    def probe(self) -> Decision | None:
        """The next plan to run as a trial: the largest that is thought to fit, of each pattern in turn, until three
        were run or each pattern's was. Raises NothingFits.
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
        """The best plan that is thought to fit; before a refusal the smallest, if it can fit at all."""
        plans, room = self._plans[pattern], self._room(self._free)
        index = self._first_fitting(pattern, room)
        index = _agree(index, lambda i: self.need(plans[i]) <= room, len(plans))
        if index < len(plans):
            return plans[index]
        smallest = min(plans, key=self._ledger.__getitem__)
        least = max(self._base + self._ledger[smallest], self._off.get(smallest, (0, 0))[0])
        if _highest_of_all(self._verified(smallest) or least > room):
            raise self._nothing_fits(pattern)
        return smallest

    def _verified(self, plan: Plan) -> bool:
        record = self._records.get(plan)
        return record is not None and record.runs > 0

    def save_readings(self, path: Path, key: Mapping[str, Any]) -> None:
        """Write what was learned, for runs with the same `key`: device, driver, torch, model, dtype, threads."""
        readings = [[*plan.to_json(), record.added] for plan, record in self._records.items()]
        content = {"version": VERSION, "key": dict(key), "readings": readings}
        partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            partial.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
            partial.replace(path)
        except OSError as error:
            self._say(f"{path}: readings of memory cannot be written ({error.strerror}); the next run starts without")
        finally:
            with suppress(OSError):
                partial.unlink(missing_ok=True)

    def load_readings(self, path: Path, key: Mapping[str, Any]) -> bool:
        """Start from what an earlier run read, if there is a file of it and it fits; else say why it is not used.

        One trial is left, to see that it still holds; the other plans are verified as they are used.
        """
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            if content["version"] != VERSION or content["key"] != json.loads(json.dumps(dict(key))):
                self._say(f"{path}: readings of memory of another machine or model are not used")
                return False
            found = {Plan.from_json(plan): _count(added) for *plan, added in content["readings"]}
        except FileNotFoundError:
            return False
        except OSError as error:
            self._say(f"{path}: readings of memory cannot be read ({error.strerror}) and are not used")
            return False
        except (ValueError, TypeError, KeyError, IndexError, AttributeError, RecursionError):
            self._say(f"{path}: not a readable file of readings of memory; it is not used")
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
        """What can be had now; the last good reading while the meter fails. Raises InputError where there is none."""
        memory, problem = None, ""
        try:
            memory = self._meter.reading()
            if not (0 < memory.held <= memory.own and memory.free >= 0 and memory.available <= 1.1 * self._total()):
                problem = f"{memory.free} bytes free, {memory.own} its own, {memory.held} in use"
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
        """What is held between steps; the last readings while the meter fails. Raises InputError without any."""
        held, problem = 0, ""
        try:
            held = self._meter.held()
            if not 0 < held <= 1.1 * self._total():
                problem = f"{held} bytes"
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
        """Of the device; without an end while that cannot be read."""
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
        """All that decisions depend on, as plain numbers and lists."""
        return {
            "records": [[p.to_json(), list(r.recent), r.peak, r.runs, r.seconds] for p, r in self._records.items()],
            "off": [[plan.to_json(), limit, base] for plan, (limit, base) in self._off.items()],
            "available": list(self._available),
            "bases": list(self._bases),
            "residuals": list(self._residuals),
            "good": self._good,
            "trials": self._trials,
            "last": None if self._last is None else self._last.to_json(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from `state_dict`. Plans that are no candidates any more are left out."""
        self._records = {
            plan: _Record(deque(recent, RECENT), *numbers)
            for key, recent, *numbers in state["records"]
            if (plan := Plan.from_json(key)) in self._ledger
        }  # fmt: skip
        self._off = {
            plan: (limit, base) for key, limit, base in state["off"] if (plan := Plan.from_json(key)) in self._ledger
        }
        self._available = deque(state["available"], STEADY)
        self._bases = deque(state["bases"], RECENT)
        self._residuals = deque(state["residuals"], RESIDUALS)
        self._base, self._learned = max(self._bases, default=0), _quantile(self._residuals, QUANTILE)
        self._good, self._trials = state["good"], state["trials"]
        self._last = None if state["last"] is None else Plan.from_json(state["last"])
        self._refit()


def _count(value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise ValueError(f"{value!r} is not a count")
    return value


def _quantile(values: Iterable[T], share: float) -> T | Literal[0]:
    ordered = sorted(values)
    return ordered[math.ceil(share * len(ordered)) - 1] if ordered else 0

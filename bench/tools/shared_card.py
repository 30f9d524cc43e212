"""A training on a card that others use too, in virtual time: nothing is allocated and nothing waits.

What a step takes is hidden from who plans it: what the process holds between steps, and the ledger's bytes times an
allocator's factor, times a deviation that each plan has for itself, plus some for libraries, with one percent of noise.
What libraries take at a plan's first step lies outside torch and outside the cap. Others come first: the trace says
what they hold, whatever this process does.

A step holds what it held before until half of its time is over, then its peak until its end, and gives it back. (What
torch's allocator would keep in its cache counts as free; the meter reads it as such.)

    memory runs out        the peak would be over the cap, or more than others leave at that moment. Half the step's
                           time is lost
    over                   a step that went through held more than its cap: the budget, or what others left of it when
                           the step began. (Outside torch: what the cap catches has run out of memory.)
    turned away            while the peak was held, others asked for more than was left beside it: theirs would have
                           failed. Only who knows the future can avoid it altogether
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from bench.peers.searches import SMALLEST, Peer
from bench.tools.traces import Trace
from lofi_fast.fidelity import FRAMES_PER_SNIPPET, Fidelity, Pattern, phase
from lofi_fast.memory.cards import Profile
from lofi_fast.memory.decision import Decision, NothingFits
from lofi_fast.memory.governor import STEADY, Governor
from lofi_fast.memory.meter import Memory
from lofi_fast.memory.plans import Device, Plan, relative_cost, worthwhile
from lofi_fast.stages.step import PATIENCE_SECONDS, POLL_SECONDS

DEVICE: Device = "cuda"
STEPS_AN_EPOCH = 626  # ActivityNet's training videos in batches of 16; the cycle's pattern changes with the epoch
NOISE, DEVIATION = 0.01, 0.04  # of what a step adds: from step to step, and from plan to plan
RESTART_SECONDS = 60.0  # from the end of a run to the first step of the one that goes on from its last checkpoint
FLOPS_A_SECOND = 30e12  # that a card reaches, all told
BY_HAND = 8  # snippets in a graph of the encoder: a script that recomputes has about as many
GIVE_UP = 8.0  # times the seconds that all steps take at full fidelity
BINS = 300  # of the series for a picture


@dataclass(frozen=True)
class Task:
    """What is trained, on which card. `ledger`: bytes that a step adds; `between`: what tensors hold between steps."""

    card: Profile
    budget: int
    full: Fidelity
    batch: int
    plans: Mapping[Pattern, Sequence[Plan]]
    ledger: Callable[[Plan], int]
    between: int
    flops: float  # of one frame of 224 px, forward

    @property
    def base(self) -> int:
        """Bytes that the process holds between steps, once all libraries are loaded."""
        return self.card.outside_torch + self.between

    def seconds(self, plan: Plan) -> float:
        """Of a step: forward, and twice as much for backward, at the card's rate."""
        scale = self.full.side**2 / 224**2 * self.full.num_snippets * FRAMES_PER_SNIPPET * self.batch
        return relative_cost(plan, self.full, DEVICE) * 3 * self.flops * scale / FLOPS_A_SECOND


@dataclass
class Day:
    """What became of one way to choose. `obtained` and `best` are sums of Omega in shares of full fidelity's: over the
    steps that were taken, and over what the clairvoyant would have taken at the same moments. In time without a step
    (waiting, starting again, searching, a step that ran out of memory) it would have gone on, and that is in `best`.
    """

    steps: int = 0
    obtained: float = 0.0
    best: float = 0.0
    seconds: float = 0.0
    over: int = 0
    turned_away: int = 0
    ran_out: int = 0
    moves: int = 0
    waited: float = 0.0  # seconds in which nothing fitted
    refused: int = 0  # runs that ended because nothing fitted for too long, and were started again
    restarts: int = 0  # runs that ended because memory ran out, and were started again
    searched: int = 0  # steps that trained nothing
    series: list[list[float]] = field(
        default_factory=list
    )  # means of each bin: [hour, GB left, GB at the peak, share, best]


class SharedCard:
    """The card, the others, and this process's clock. It is also the meter that the governor reads."""

    def __init__(self, task: Task, trace: Trace, seed: int) -> None:
        self.task = task
        self._rng = np.random.default_rng(seed)
        self._scale, self._extra = self._rng.uniform(1.02, 1.15), self._rng.uniform(30e6, 200e6)
        self._library = self._rng.uniform(10e6, 60e6)
        self.trace = trace.below(task.card.usable - task.base - int(self._library))  # this process holds the rest
        self._plans = {p: tuple(worthwhile(plans, task.ledger)) for p, plans in task.plans.items()}
        self._scripted = {pattern: scripted(plans) for pattern, plans in task.plans.items()}
        every = sorted({plan for of in (self._plans, self._scripted) for plans in of.values() for plan in plans})
        deviations = 1 + self._rng.uniform(-DEVIATION, DEVIATION, len(every))
        self._adds = {
            plan: float(self._scale * task.ledger(plan) * deviation + self._extra)
            for plan, deviation in zip(every, deviations, strict=True)
        }
        self._known: set[Plan] = set()
        self._tables = {pattern: self._table(plans) for pattern, plans in self._plans.items()}
        self.base = task.card.context + task.between
        self.time = 0.0
        self.noise = 0.0

    def _table(self, plans: Sequence[Plan]) -> tuple[NDArray[np.float64], ...]:
        """Of all plans, the highest Omega first and of those the fastest: (bytes added, seconds, share of Omega)."""
        full = self.task.full.omega
        rows = sorted((-plan.omega / full, self.task.seconds(plan), self._adds[plan]) for plan in plans)
        share, seconds, added = np.array(rows).T
        return added, seconds, -share

    # What the governor reads

    def total(self) -> int:
        return self.task.card.usable

    def held(self) -> int:
        return self.base

    def reading(self) -> Memory:
        return Memory(self.base, self.base, max(self.left() - self.base, 0))

    # What happens

    def left(self) -> int:
        """Bytes that this process could hold now."""
        return self.total() - self.trace.at(self.time)

    def next_step(self) -> None:
        """Draw the noise of the next step, which is the same for whatever plan it is taken with."""
        self.noise = self._rng.uniform(-NOISE, NOISE)

    def run(self, plan: Plan, cap: int, day: Day) -> int | None:
        """Take a step, or half of one: its peak, or None when memory ran out."""
        seconds = self.task.seconds(plan)
        capped = self.base + round(self._adds[plan] * (1 + self.noise))
        peak = capped + (0 if plan in self._known else round(self._library))
        self.time += seconds / 2
        if capped > cap or peak > self.left():
            day.ran_out += 1
            return None
        day.turned_away += self.trace.most(self.time, seconds / 2) > self.total() - peak
        day.over += peak > cap
        self.time += seconds / 2
        self._known.add(plan)
        self.base = self.task.base  # the first step loads code, and takes memory for good
        return peak

    def best(self, pattern: Pattern) -> tuple[float, float]:
        """(share of Omega, seconds) of the highest rung that some plan would hold through all of a step from now on,
        nobody turned away, and of those plans the fastest; (0, 0) where none is.
        """
        added, seconds, share = self._tables[pattern]
        offsets, held = self.trace.window(self.time, float(seconds.max()))
        left = self.total() - np.maximum.accumulate(held)[np.searchsorted(offsets, seconds, "right") - 1]
        fits = self.base + added * (1 + self.noise) <= np.minimum(left, self.task.budget)
        first = int(fits.argmax())
        return (float(share[first]), float(seconds[first])) if fits[first] else (0.0, 0.0)

    def rung(self, pattern: Pattern, share: float) -> Plan:
        """The highest rung of no more than a share of Omega, or the lowest, as a script without a planner takes it."""
        most, plans = share * self.task.full.omega * (1 + 1e-9), self._scripted[pattern]
        return next((plan for plan in plans if plan.omega <= most), plans[-1])


def scripted(plans: Sequence[Plan]) -> tuple[Plan, ...]:
    """Of each rung, highest first, what is written by hand to spare memory: one video at once, and where that is
    allowed recomputed, `BY_HAND` snippets in a graph. (Without recomputing, small graphs save little.)
    """
    found: dict[int, Plan] = {}
    for plan in sorted(plans, key=lambda p: (p.micro_batch, -p.recompute, p.recompute and p.chunk > BY_HAND, -p.chunk)):
        found.setdefault(plan.omega, plan)
    return tuple(found[omega] for omega in sorted(found, reverse=True))


def pattern_of(step: int) -> Pattern:
    """The cycle of training: another pattern with each epoch."""
    return phase(Pattern.CYCLIC, step // STEPS_AN_EPOCH, step, None)


class _Life:
    """What all ways share: steps are counted until all are taken, or the time is up."""

    def __init__(self, card: SharedCard, steps: int, series: bool) -> None:
        self.card, self.steps, self.day = card, steps, Day()
        slowest = max(card.task.seconds(card.rung(pattern, 1.0)) for pattern in card.task.plans)
        self._until = GIVE_UP * steps * slowest
        self._bins: list[list[float]] | None = [] if series else None
        self._last: dict[Pattern, int] = {}
        self._accounted = 0.0  # the time up to which `best` is known

    @property
    def goes_on(self) -> bool:
        return self.day.steps < self.steps and self.card.time < self._until

    def missed(self, until: float) -> None:
        """Nothing was taken since the last step: count what the clairvoyant would have."""
        card, pattern, now = self.card, pattern_of(self.day.steps), self.card.time
        while self._accounted < until:
            card.time = self._accounted
            best, seconds = card.best(pattern)
            rest = until - self._accounted
            self.day.best += best * min(1.0, rest / seconds) if best else 0.0
            self._accounted += seconds if best else POLL_SECONDS
        card.time = now

    def taken(self, pattern: Pattern, plan: Plan, seconds: float, best: float, left: int, peak: int) -> None:
        """A step went through just now, in so many seconds; `left` when it began."""
        day, share = self.day, plan.omega / self.card.task.full.omega
        self.missed(self.card.time - seconds)
        self._accounted = self.card.time
        day.steps += 1
        day.obtained += share
        day.best += best or share
        day.moves += self._last.setdefault(pattern, plan.omega) != plan.omega
        self._last[pattern] = plan.omega
        if self._bins is not None:
            self._bins.append([self.card.time / 3600, left / 1e9, peak / 1e9, share, best])

    def end(self) -> Day:
        self.missed(self.card.time)
        self.day.seconds = self.card.time
        if self._bins:
            for part in np.array_split(np.array(self._bins), min(BINS, len(self._bins))):
                hour, left, peak, share, best = part.T
                found = (hour.mean(), left.mean(), peak.mean(), share.mean(), best.mean())
                self.day.series.append([round(float(value), 3) for value in found])
        return self.day


def ours(
    task: Task, trace: Trace, steps: int, seed: int, series: bool = False, epoch_seconds: float | None = None
) -> Day:
    """The governor, asked as the joint stage asks it: a step's plan one step ahead, and again when the step starts.
    `epoch_seconds`: the time that an epoch may take.
    """
    card = SharedCard(task, trace, seed)
    life = _Life(card, steps, series)
    day = life.day
    made = Governor(
        card, task.budget, task.ledger, task.plans, lambda _: None, device=DEVICE,
        step_seconds=None if epoch_seconds is None else epoch_seconds / STEPS_AN_EPOCH,
    )  # fmt: skip

    def patiently(decide: Callable[[], Decision]) -> Decision:
        """As training does, with this clock; a run that is refused is started again, and goes on with what it knew."""
        began, deadline, polls = card.time, card.time + PATIENCE_SECONDS, 0
        while True:
            try:
                decision = decide()
                break
            except NothingFits as error:
                if card.left() >= task.budget or card.time > deadline:
                    if error.last is not None:
                        decision = error.last
                        break
                    day.refused += 1
                    card.time += RESTART_SECONDS
                    deadline = card.time + PATIENCE_SECONDS
            polls += 1
            # All that the governor remembers of readings is the same by then: nothing happens until others move.
            until = min(card.trace.next_change(card.time), deadline) if polls > STEADY else 0.0
            card.time = max(card.time + POLL_SECONDS, until)
        day.waited += card.time - began
        return decision

    def measure(decision: Decision) -> int | None:
        day.searched += 1
        return card.run(decision.plan, decision.limit, day)

    measure(made.warm_up())
    made.calibrate(measure)
    asked = patiently(lambda: made.choose(pattern_of(0)))
    for step in range(steps):
        if not life.goes_on:
            break
        card.next_step()
        following = patiently(lambda step=step: made.choose(pattern_of(step + 1), 0, step + 1))  # type: ignore[misc]
        decision = patiently(lambda asked=asked: made.recheck(asked))  # type: ignore[misc]
        best, _ = card.best(decision.pattern)
        while True:
            began, left = card.time, card.left()
            peak = card.run(decision.plan, decision.limit, day)
            if peak is not None:
                break
            decision = patiently(lambda decision=decision: made.failed(decision))  # type: ignore[misc]
        made.learn(decision, peak, card.time - began)
        life.taken(decision.pattern, decision.plan, card.time - began, best, left, peak)
        asked = following
    return life.end()


def theirs(task: Task, peer: Peer, trace: Trace, steps: int, seed: int) -> Day:
    """Another trainer. Its process is capped at the budget, which none of them does by itself."""
    card = SharedCard(task, trace, seed)
    life = _Life(card, steps, False)
    day = life.day

    def attempt(share: float) -> int | None:
        """A step of each pattern: Lightning runs three."""
        peaks = []
        for pattern in task.plans:
            day.searched += 1
            peak = card.run(card.rung(pattern, share), task.budget, day)
            if peak is None:
                return None
            peaks.append(peak)
        return max(peaks)

    found: float | None = None
    while life.goes_on:
        if found is None or peer.repeats:
            found = peer.search(attempt, task.card.usable, card.base)
        share = found
        while share is not None and life.goes_on:
            card.next_step()
            pattern = pattern_of(day.steps)
            best, _ = card.best(pattern)
            plan, began, left = card.rung(pattern, share), card.time, card.left()
            peak = card.run(plan, task.budget, day)
            if peak is not None:
                life.taken(pattern, plan, card.time - began, best, left, peak)
            else:
                share = share / 2 if peer.halves and share / 2 >= SMALLEST else None
        if life.goes_on:
            day.restarts += 1
            card.time += RESTART_SECONDS
    return life.end()


def clairvoyant(task: Task, trace: Trace, steps: int, seed: int) -> Day:
    """Who knows what every plan needs and what others will hold, and takes the highest rung through every step."""
    card = SharedCard(task, trace, seed)
    life = _Life(card, steps, False)
    card.base = task.base
    while life.goes_on:
        card.next_step()
        pattern = pattern_of(life.day.steps)
        best, seconds = card.best(pattern)
        if not best:
            card.time += POLL_SECONDS
            life.day.waited += POLL_SECONDS
            continue
        card.time += seconds
        life.taken(pattern, card.rung(pattern, best), seconds, best, card.left(), 0)
    return life.end()

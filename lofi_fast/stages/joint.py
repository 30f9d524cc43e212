"""Stage 2, joint: LoFi. Encoder and head learn together from the TAL loss, at the fidelity that fits."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypedDict

import torch
from torch import nn

from lofi_fast.budget import duration, gigabytes
from lofi_fast.config import Config
from lofi_fast.data.dataset import Sample
from lofi_fast.errors import InputError
from lofi_fast.fidelity import CYCLE, Fidelity, Pattern, coinciding, offered, phase
from lofi_fast.memory.cards import profile_of
from lofi_fast.memory.decision import Decision, Planner
from lofi_fast.memory.estimates import full_step_seconds, launch_bound
from lofi_fast.memory.frontier import CPU_BASE, KEPT_FREE, Levers
from lofi_fast.memory.governor import LATE, Governor
from lofi_fast.memory.plans import Device, Plan, candidates, refusal, remedies
from lofi_fast.memory.ranks import gather
from lofi_fast.memory.replay import Replay
from lofi_fast.memory.step_bytes import Setting, step_bytes
from lofi_fast.memory.trial import LearnedLedger, learn_ledger
from lofi_fast.run import events
from lofi_fast.run.seeds import seed_of
from lofi_fast.run.state import Machine, Run
from lofi_fast.stages import epochs
from lofi_fast.stages.epochs import Outcome, new_optimizer, optimizer_of
from lofi_fast.stages.step import batches, forward_backward, lofi_step, patiently

READINGS = "memory-readings.json"  # beside the frame cache
UNCAPPED = 0.02  # of a limit: what libraries may take in a step beyond the cap of tensors (seen: up to 0.7%)
TIMED = 6  # plans of a pattern that are timed, at most, before the first epoch under a time limit


def joint(run: Run) -> None:
    """Run the stage from where it stands."""
    if run.due("joint") is None or run.config.joint.epochs == 0:
        return
    torch.manual_seed(seed_of(run.config.seed, "joint"))
    set_modes(run)
    epochs.train(run, Joint(run), run.config.joint)


def set_modes(run: Run) -> None:
    """Both networks learn, but for batch norm."""
    run.encoder.freeze_batchnorm()
    run.encoder.train()
    run.head.train()


class Joint:
    """The steps of the stage."""

    name = "joint"
    lr_flag = "--joint-lr"

    def __init__(self, run: Run) -> None:
        self.run = run
        self.optimizer = optimizer_of(run, run.config.joint, run.encoder, run.head)
        self.modules: dict[str, nn.Module] = {}
        if run.planner is None:
            run.planner = new_planner(run)
            if planned := run.planner_state():
                run.planner.load_state_dict(planned)
        self.planner = run.planner

    def begin(self, epoch: int, first: int) -> int:
        self._order = self.run.sampler.epoch("joint", epoch, self.run.config.joint.batch)
        self._feed(epoch, first)
        return len(self._order)

    def step(self, epoch: int, step: int) -> Outcome:
        taken = lofi_step(self.run, self.planner, self.optimizer, next(self._batches))
        if taken.retries:  # the stream of frames ended with the step that failed
            self._feed(epoch, step + 1)
        videos, plan = [sample.window.video for sample in self._order[step]], taken.decision.plan
        logged = {
            "pattern": taken.decision.pattern, "terms": taken.terms, "videos": videos, "peak": taken.peak,
            "budget": self.run.machine.budget, "retries": taken.retries, **taken.decision.fields(),
        }  # fmt: skip
        note = f"{taken.decision.pattern}, {plan}, loss {taken.loss:.3f}, {gigabytes(taken.peak)}"
        return Outcome(taken.loss, videos, taken.not_finite, note, logged)

    def end(self, epoch: int) -> None:
        pass

    def _feed(self, epoch: int, first: int) -> None:
        """The batches of an epoch from a step on, each planned when its frames are asked for: one step ahead."""
        config, count = self.run.config, len(self._order)

        def decide(number: int) -> Decision:
            step = first + number
            pattern = phase(config.pattern, epoch, epoch * count + step, config.short_cycle)
            return patiently(self.run, lambda: self.planner.choose(pattern, epoch, step))

        shares = [self.run.processes.share(samples) for samples in self._order[first:]]
        self._batches = batches(self.run, epoch, shares, decide)


# Planning


def patterns_of(config: Config) -> tuple[Pattern, ...]:
    return CYCLE if config.pattern is Pattern.CYCLIC else (config.pattern,)


def ladders(config: Config) -> dict[Pattern, tuple[Fidelity, ...]]:
    return {pattern: offered(pattern, config.full, config.min_cut, config.max_cut) for pattern in patterns_of(config)}


def check_smallest(config: Config, machine: Machine, say: Callable[[str], None]) -> None:
    """What can be known of networks that the settings name before anything is decoded. Raises InputError for a budget
    below what this process holds and the tensors of the smallest step; says where it is likely to be too small.
    """
    setting = Setting.of(config, 1, machine.precision.dtype.itemsize)  # with more classes a step needs more
    if setting is None or config.replay is not None:
        return
    device, budget, held = _kind(machine), machine.budget, machine.meter.own()
    own = max(held, CPU_BASE) if device == "cpu" else held
    levers = Levers(setting, config.full, config.joint.batch, device, config.micro_batch, config.recompute)

    def expected(plan: Plan) -> int:
        return own + levers.needs(plan)

    room = int((1 - KEPT_FREE) * budget)
    for pattern, rungs in ladders(config).items():
        of = (rungs[-1:], config.joint.batch, config.micro_batch, config.recompute, device)
        plans = candidates(*of)
        if min(map(expected, plans)) <= room:
            continue
        sentence = refusal(plans, expected, budget, room, budget, remedies(*of))
        if held + min(map(levers.least, plans)) > budget:
            raise InputError(f"--mem-budget {config.budget.text}, {pattern}: {sentence}")
        say(f"warning: --mem-budget {config.budget.text}, {pattern}: by what steps are expected to take, {sentence}")
        return


def _kind(machine: Machine) -> Device:
    return "cuda" if machine.device.type == "cuda" else "cpu"


def new_planner(run: Run) -> Planner:
    """A governor over the ladder of every pattern of the run, or the replay of another run."""
    config, machine = run.config, run.machine
    if config.replay is not None:
        return Replay(Path(config.replay), machine.budget)
    device = _kind(machine)
    expected, bound = speed(run)
    plans, changes = {}, {}
    for pattern, rungs in ladders(config).items():
        levers = (rungs, share_of_a_step(run), config.micro_batch, config.recompute, device)
        plans[pattern], changes[pattern] = candidates(*levers, bound), remedies(*levers)
    every = [plan for pattern in plans for plan in (*plans[pattern], *(plan for _, plan in changes[pattern]))]
    shared = run.shared_gauge
    return Governor(
        machine.meter if shared is None else shared, machine.budget, ledger_of(run, every), plans, run.log.say,
        changes=changes, pending=lambda: run.pipeline.pending if shared is None else 0, device=device,
        launch_bound=bound,
        step_seconds=None if config.epoch_time is None else config.epoch_time / steps_of_an_epoch(run),
        expected=expected,
    )  # fmt: skip


def speed(run: Run) -> tuple[float | None, float | None]:
    """(seconds that a step at the highest rung is expected to take, frame pixels of a graph under which the host is
    slower than the card) before any step has run; None where nobody can say.
    """
    setting = run.setting()
    card = profile_of(torch.cuda.get_device_name(run.machine.device)) if run.machine.device.type == "cuda" else None
    if setting is None or card is None:
        return None, None
    top = max((rungs[0] for rungs in ladders(run.config).values()), key=lambda rung: rung.omega)
    batch = share_of_a_step(run)
    return full_step_seconds(setting, top, batch, card), launch_bound(setting, top, batch, card)


def share_of_a_step(run: Run) -> int:
    """Videos of a step that one process takes, at most: what plans are made for."""
    return run.processes.largest_share(run.config.joint.batch)


def steps_of_an_epoch(run: Run) -> int:
    return -(-len(run.dataset.samples["training"]) // run.config.joint.batch)


def ledger_of(run: Run, plans: Sequence[Plan]) -> Callable[[Plan], int]:
    """Bytes that a step of a plan adds: by arithmetic for the networks that the settings name; for others by a line
    through readings of steps, which are run once and then belong to the run's plans.
    """
    setting = run.setting()
    if setting is None:
        if "ledger" not in run.plans:
            run.plans["ledger"] = learn(run, plans).to_json()
        return LearnedLedger.from_json(run.plans["ledger"])

    def ledger(plan: Plan) -> int:
        parted = plan.micro_batch < share_of_a_step(run)
        return step_bytes(
            setting, plan.fidelity, plan.micro_batch, recompute=plan.recompute, chunk=plan.chunk, accumulates=parted
        ).added

    return ledger


def learn(run: Run, plans: Sequence[Plan]) -> LearnedLedger:
    """Run steps of a few plans to learn what all of them need."""
    meter = run.machine.meter if run.shared_gauge is None else run.shared_gauge
    limit = min(run.machine.budget, meter.reading().available)
    samples = run.sampler.epoch("joint", 0, run.config.joint.batch)[0]

    def measure(plan: Plan) -> int | None:
        decision = Decision(
            patterns_of(run.config)[0], 0, 0, plan, plan, 0, limit, limit, limit, "to learn what steps need"
        )
        peak = trial(run, samples, decision)
        run.log.event(events.Measured(plan="joint, ledger", candidate=str(plan), peak=peak, budget=limit))
        return peak

    refusal = "raise --mem-budget, or give a smaller --fidelity or --batch"
    return learn_ledger(plans, measure, meter.held, limit, refusal)


def trial(
    run: Run, samples: Sequence[Sample], decision: Decision, seconds: Callable[[float], None] | None = None,
    spare: float = 0.0,
) -> int | None:  # fmt: skip
    """Peak bytes of a step on real frames that updates nothing; None when memory ran out.

    `seconds` is given the time of a step, of two that follow the first one, which loads code. Where several processes
    share a step, each runs its own part of it, and both are those of the process that needs most. `spare`: share of the
    limit that the cap leaves free.
    """
    mine, taken = run.processes.share(samples), list[float]()

    def step() -> None:
        # The last batch is there to be decoded ahead, as in training.
        count = 1 if seconds is None else 3
        stream = batches(run, 0, [mine] * (count + 1), lambda _: decision)
        for _ in range(count):
            batch, began = next(stream), time.monotonic()
            try:
                forward_backward(run, batch, decision, alone=True)
            finally:
                run.encoder.zero_grad(set_to_none=True)
                run.head.zero_grad(set_to_none=True)
            taken.append(time.monotonic() - began)

    peak = run.trials.measure(step, math.floor((1 - spare) * decision.limit))
    if run.shared_gauge is not None:
        peak = run.shared_gauge.peak_of_all(peak)
    if seconds is not None and peak is not None:
        seconds(max(gather("seconds of a step", sum(taken[1:]) / (len(taken) - 1))))
    return peak


class PatternPlan(TypedDict):
    """What plan.json tells of one pattern; memory in bytes."""

    rung: list[int]  # [num_snippets, side], as chosen at the start
    cut: float
    batch: int  # videos of a step
    micro_batch: int  # of them at once
    recompute: bool
    chunk: int  # snippets in one graph of the encoder
    epoch_seconds: float | None  # expected, where a time limit made steps be timed
    predicted: int  # peak
    peak: int | None  # measured, where the rung was tried
    measured: list[list[int]]  # [num_snippets, side, peak] of all that were tried
    ladder: list[dict[str, Any]]  # see `Governor.table`


def plan_joint(run: Run) -> dict[str, PatternPlan]:
    """Make the planner, and run its trials on real frames. Leaves no trace but what was learned."""
    config = run.config
    set_modes(run)
    _optimizer = new_optimizer(run, config.joint, run.encoder, run.head)  # its state is held between steps
    samples = run.sampler.epoch("joint", 0, config.joint.batch)[0]
    run.planner = planner = new_planner(run)
    if not isinstance(planner, Governor):
        run.log.say(f"plan joint: the rungs of {config.replay}")
        return {}

    def measure(decision: Decision) -> int | None:
        # Where even the smallest plan may not fit the cap has to hold it back, and libraries are not held back by it.
        doubtful = decision.predicted > decision.limit and not planner.knows
        peak = trial(run, samples, decision, spare=UNCAPPED if doubtful else 0.0)
        run.log.event(
            events.Measured(
                plan=f"joint, {decision.pattern}", candidate=str(decision.plan), peak=peak,
                predicted=decision.predicted, budget=decision.limit,
            )
        )  # fmt: skip
        return peak

    readings, key = run.cache / READINGS, run.memory_key()

    def take_time(decision: Decision) -> int | None:
        return trial(run, samples, decision, lambda seconds: planner.learn_time(decision.plan, seconds, warm=True))

    first = planner.warm_up()
    measure(first)
    if config.epoch_time is not None:
        take_time(first)
    known = same_for_all(run, readings, key) and planner.load_readings(readings, key)
    planner.calibrate(measure)
    if run.processes.first:
        planner.save_readings(readings, key)
    planner.accept(patterns_of(run.config))
    chosen: dict[str, PatternPlan] = {}
    for pattern in patterns_of(run.config):
        decision = chosen_in_time(planner, pattern, take_time)
        rung = decision.plan.fidelity
        cut = config.full.omega / rung.omega
        epoch = None
        if config.epoch_time is not None and (seconds := planner.seconds(decision.plan)) is not None:
            epoch = seconds * steps_of_an_epoch(run)
        run.log.say(
            f"plan joint, {pattern}: {decision.plan} (cut {cut:.1f}), {gigabytes(decision.predicted)} predicted of "
            f"{gigabytes(decision.limit)}{f', {duration(epoch)} an epoch' if epoch is not None else ''}"
            f"{', readings of an earlier run' if known else ''}"
        )
        if epoch is not None and config.epoch_time is not None and epoch > LATE * config.epoch_time:
            run.log.say(
                f"note: --epoch-time {duration(config.epoch_time)}: no plan of {pattern} that fits is so fast; an "
                f"epoch of the lowest takes about {duration(epoch)}"
            )
        table = planner.table(pattern)
        measured = {tuple(row["plan"][:2]): row["measured"] for row in table if row["measured"] is not None}
        chosen[pattern.value] = {
            "rung": [rung.num_snippets, rung.side],
            "cut": round(cut, 2),
            "batch": config.joint.batch,
            "micro_batch": decision.plan.micro_batch,
            "recompute": decision.plan.recompute,
            "chunk": decision.plan.chunk,
            "epoch_seconds": epoch,
            "predicted": decision.predicted,
            "peak": measured.get((rung.num_snippets, rung.side)),
            "measured": [[*of, peak] for of, peak in measured.items()],
            "ladder": table,
        }
    if note := kept_down(run, planner, chosen):
        run.log.say(f"note: {note}")
    if note := coinciding({pattern: Fidelity(*of["rung"]) for pattern, of in chosen.items()}):
        run.log.say(f"note: {note}")
    return chosen


def same_for_all(run: Run, readings: Path, key: Mapping[str, Any]) -> bool:
    """Whether all processes would begin with the same readings of earlier runs."""
    if not run.processes.several:
        return True
    content = readings.read_bytes() if readings.exists() else b""
    return len(set(gather("earlier readings", (content, repr(key))))) == 1


def chosen_in_time(planner: Governor, pattern: Pattern, take_time: Callable[[Decision], int | None]) -> Decision:
    """The plan that is chosen; under a time limit when the times of all that were in question are known: each choice is
    timed, until it stays.
    """
    for _ in range(TIMED if planner.step_seconds is not None else 0):
        decision = planner.choose(pattern)
        if planner.timed(decision.plan):
            return decision
        if take_time(decision) is None:
            planner.failed(decision)
    return planner.choose(pattern)


def kept_down(run: Run, planner: Governor, chosen: Mapping[str, PatternPlan]) -> str | None:
    """A sentence where --min-cut keeps the fidelity below what fits the budget, and no time limit does."""
    config = run.config
    ledger = ledger_of(run, [])
    for pattern in patterns_of(run.config):
        top = offered(pattern, config.full, config.min_cut, config.max_cut)[0]
        rung = Fidelity(*chosen[pattern.value]["rung"])
        higher = [of for of in offered(pattern, config.full, 1.0, config.min_cut) if of.omega > rung.omega]
        if rung != top or not higher or config.epoch_time is not None:
            continue
        plans = candidates(higher, share_of_a_step(run), config.micro_batch, config.recompute, planner.device)
        plan = next((plan for plan in plans if planner.would_fit(ledger(plan))), None)
        if plan is not None:
            cut = config.full.omega / plan.omega
            return (
                f"--min-cut {config.min_cut:g} holds the fidelity of {pattern} at {rung}; the budget would hold "
                f"{plan.fidelity}, at some {plan.omega / rung.omega:.1f} times the time, with "
                f"--min-cut {max(cut, 1):.3g}"
            )
    return None

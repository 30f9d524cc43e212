"""Stage 2, joint: LoFi. Encoder and head learn together from the TAL loss, at the fidelity that fits."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from lofi_fast.budget import gigabytes
from lofi_fast.data.dataset import Sample
from lofi_fast.fidelity import CYCLE, Pattern, ladder, phase
from lofi_fast.memory.governor import Decision, Governor, Planner
from lofi_fast.memory.plans import Plan, candidates, remedies
from lofi_fast.memory.replay import Replay
from lofi_fast.memory.step_bytes import Setting, step_bytes
from lofi_fast.optim import learning_rate, make_optimizer, set_learning_rate
from lofi_fast.run import events
from lofi_fast.run.checkpoint import Position
from lofi_fast.run.seeds import seed_of
from lofi_fast.run.state import Run
from lofi_fast.stages.step import Batch, batches, forward_backward, patiently, take_step

READINGS = "memory-readings.json"  # beside the frame cache


def joint(run: Run) -> None:
    """Run the stage from where it stands."""
    start = run.due("joint")
    config = run.config.joint
    if start is None or config.epochs == 0:
        return
    torch.manual_seed(seed_of(run.config.seed, "joint"))
    run.encoder.freeze_batchnorm()
    run.encoder.train()
    run.head.train()
    parameters = [*run.encoder.parameters(), *run.head.parameters()]
    optimizer = make_optimizer(config, parameters, run.config.optimizer_impl)
    if state := run.optimizer_state():
        optimizer.load_state_dict(state)
    if run.planner is None:
        run.planner = new_planner(run)
        if planned := run.planner_state():
            run.planner.load_state_dict(planned)
    planner = run.planner

    for epoch in range(start.epoch, config.epochs):
        order = run.sampler.epoch("joint", epoch, config.batch)
        first = start.step if epoch == start.epoch else 0
        feed = feed_from(run, planner, epoch, order, first)
        with run.log.progress(f"joint {epoch + 1}/{config.epochs}", len(order), first) as advance:
            for step in range(first, len(order)):
                lr = learning_rate(config, epoch, step, len(order))
                set_learning_rate(optimizer, lr)
                taken = take_step(run, planner, optimizer, next(feed))
                if taken.retries:  # the stream of frames ended with the step that failed
                    feed = feed_from(run, planner, epoch, order, step + 1)
                plan, pattern = taken.decision.plan, taken.decision.pattern
                run.log.event(
                    events.Step(
                        stage="joint", epoch=epoch, step=step, pattern=pattern, lr=lr, peak=taken.peak,
                        budget=run.budget, retries=taken.retries, **taken.decision.fields(),
                        videos=[s.window.video for s in order[step]], loss=taken.loss, terms=taken.terms,
                    )
                )  # fmt: skip
                advance(step + 1, f"{pattern}, {plan}, loss {taken.loss:.3f}, {gigabytes(taken.peak)}")
                run.save_when_due(Position("joint", epoch, step + 1), optimizer)
        run.save(Position("joint", epoch + 1), optimizer)
    run.finish("joint")


def feed_from(run: Run, planner: Planner, epoch: int, order: Sequence[Sequence[Sample]], first: int) -> Iterator[Batch]:
    """The batches of an epoch from a step on, planned one ahead of the step that is taken."""
    config, count = run.config, len(order)

    def decide(number: int) -> Decision:
        step = first + number
        pattern = phase(config.pattern, epoch, epoch * count + step, config.short_cycle)
        return patiently(run, lambda: planner.choose(pattern, epoch, step))

    return batches(run, epoch, order[first:], decide)


# Planning


def patterns_of(run: Run) -> tuple[Pattern, ...]:
    return CYCLE if run.config.pattern is Pattern.CYCLIC else (run.config.pattern,)


def new_planner(run: Run) -> Planner:
    """A governor over the ladder of every pattern of the run, or the replay of another run."""
    config = run.config
    if config.replay is not None:
        return Replay(Path(config.replay), run.budget)
    setting = Setting.of(config, len(run.dataset.classes), run.precision.dtype.itemsize)

    def ledger(plan: Plan) -> int:
        parted = plan.micro_batch < config.joint.batch
        return step_bytes(setting, plan.fidelity, plan.micro_batch, recompute=plan.recompute, accumulates=parted).added

    plans, changes = {}, {}
    for pattern in patterns_of(run):
        rungs = ladder(pattern, config.full, config.min_cut, config.max_cut)
        levers = (rungs, config.joint.batch, config.policy, config.micro_batch, config.recompute)
        plans[pattern], changes[pattern] = candidates(*levers), remedies(*levers)
    return Governor(
        run.meter, run.budget, ledger, plans, run.log.say, changes=changes, pending=lambda: run.pipeline.pending
    )


def trial(run: Run, optimizer: torch.optim.Optimizer, samples: Sequence[Sample], decision: Decision) -> int | None:
    """Peak bytes of a step on real frames that updates nothing; None when memory ran out."""

    def step() -> None:
        # The second batch is there to be decoded ahead, as in training.
        forward_backward(run, next(batches(run, 0, [samples, samples], lambda _: decision)), decision)
        optimizer.zero_grad(set_to_none=True)

    peak = run.measure(step, decision.limit)
    optimizer.zero_grad(set_to_none=True)
    return peak


def plan_joint(run: Run) -> dict[str, dict[str, Any]]:
    """Make the planner, and run its trials on real frames. Leaves no trace but what was learned."""
    config = run.config
    run.encoder.freeze_batchnorm()
    run.encoder.train()
    run.head.train()
    parameters = [*run.encoder.parameters(), *run.head.parameters()]
    optimizer = make_optimizer(config.joint, parameters, config.optimizer_impl)
    samples = run.sampler.epoch("joint", 0, config.joint.batch)[0]
    run.planner = planner = new_planner(run)
    if not isinstance(planner, Governor):
        run.log.say(f"plan joint: the rungs of {config.replay}")
        return {}

    def measure(decision: Decision) -> int | None:
        peak = trial(run, optimizer, samples, decision)
        run.log.event(
            events.Measured(
                plan=f"joint, {decision.pattern}", candidate=str(decision.plan), peak=peak,
                predicted=decision.predicted, budget=decision.limit,
            )
        )  # fmt: skip
        return peak

    readings, key = run.cache / READINGS, run.memory_key()
    measure(planner.warm_up())
    known = planner.load_readings(readings, key)
    planner.calibrate(measure)
    planner.save_readings(readings, key)
    chosen = {}
    for pattern in patterns_of(run):
        decision = planner.choose(pattern)
        rung = decision.plan.fidelity
        cut = config.full.omega / rung.omega
        run.log.say(
            f"plan joint, {pattern}: {decision.plan} (cut {cut:.1f}), {gigabytes(decision.predicted)} predicted of "
            f"{gigabytes(decision.limit)}{', readings of an earlier run' if known else ''}"
        )
        table = planner.table(pattern, config.full)
        measured = {tuple(row["plan"][:2]): row["measured"] for row in table if row["measured"] is not None}
        chosen[pattern.value] = {
            "rung": [rung.num_snippets, rung.side],
            "cut": round(cut, 2),
            "batch": config.joint.batch,
            "micro_batch": decision.plan.micro_batch,
            "recompute": decision.plan.recompute,
            "predicted": decision.predicted,
            "peak": measured.get((rung.num_snippets, rung.side)),
            "measured": [[*of, peak] for of, peak in measured.items()],
            "ladder": table,
        }
    return chosen

"""Stage 2, joint: LoFi. Encoder and head learn together from the TAL loss, at the fidelity that fits."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lofi_fast.checkpoint import Position
from lofi_fast.data.dataset import Sample
from lofi_fast.data.pipeline import FrameRequest, shrink
from lofi_fast.encoder.lean import encode
from lofi_fast.errors import InputError
from lofi_fast.fidelity import CYCLE, FRAMES_PER_SNIPPET, Fidelity, Pattern, ladder, phase
from lofi_fast.head.loss import Counts, LossTerms, tal_loss
from lofi_fast.head.targets import Targets, make_targets
from lofi_fast.memory.governor import Decision, Governor, NothingFits, Planner, Replay
from lofi_fast.memory.meter import is_out_of_memory
from lofi_fast.memory.model import Setting, step_bytes
from lofi_fast.optim import learning_rate, make_optimizer, set_learning_rate
from lofi_fast.plan import Plan, candidates, gigabytes, remedies
from lofi_fast.run import Run, seed_of

PATIENCE_SECONDS = 120.0  # how long a step waits for memory that others hold
POLL_SECONDS = 1.0
READINGS = "memory-readings.json"  # beside the frame cache


@dataclass(frozen=True)
class Batch:
    """The videos of one optimiser step. Their frames arrive in micro-batches, each decoded while the one before it is
    worked on, as the plan was when they were asked for.
    """

    samples: tuple[Sample, ...]
    decision: Decision
    frames: Iterator[Tensor]  # of each micro-batch, uint8 (B * L * 8, side, side, 3)


@dataclass(frozen=True)
class Taken:
    """A step that went through."""

    terms: LossTerms
    decision: Decision  # as it was run
    peak: int
    retries: int  # how often memory ran out first


def targets_of(
    run: Run, sample: Sample, fidelity: Fidelity, stage: str, epoch: int, decoded: Fidelity | None = None
) -> Targets:
    """Labels of a window at a fidelity, from the true times of its snippets; `decoded` as in `Sampler.edges`."""
    return make_targets(
        run.sampler.edges(sample, fidelity, decoded),
        sample.segments,
        sample.labels,
        run.head.max_duration(fidelity.num_snippets),
        len(run.dataset.classes),
        run.sampler.rng(stage, epoch, sample.index, 1),
        with_zero=run.config.head.sample_zero_iou,
    )


def parts(samples: Sequence[Sample], size: int) -> list[Sequence[Sample]]:
    """Micro-batches of `size` videos; the last may be smaller."""
    return [samples[k : k + size] for k in range(0, len(samples), size)]


def batches(
    run: Run, epoch: int, order: Sequence[Sequence[Sample]], decide: Callable[[int], Decision]
) -> Iterator[Batch]:
    """The batches of `order`, decoded ahead; `decide(k)` plans the k-th when its frames are asked for."""
    sampler = run.sampler
    decisions: list[Decision] = []

    def decided(number: int) -> Decision:
        while len(decisions) <= number:
            decisions.append(decide(len(decisions)))
        return decisions[number]

    def requests() -> Iterator[list[FrameRequest]]:
        for number, samples in enumerate(order):
            plan = decided(number).plan
            for part in parts(samples, plan.micro_batch):
                yield [sampler.request(s, plan.fidelity, sampler.view(s, "joint", epoch)[0]) for s in part]

    stream = run.frames(requests())
    for number, samples in enumerate(order):
        decision = decided(number)
        frames = islice(stream, len(parts(samples, decision.plan.micro_batch)))
        yield Batch(tuple(samples), decision, frames)
        for _ in frames:  # what was left, so that the next batch gets its own
            pass


def forward_backward(run: Run, batch: Batch, decision: Decision) -> LossTerms:
    """Loss of a batch, its gradients added to the parameters'. Every term is divided by counts of the whole batch, so
    that neither depends on the size of the micro-batches.
    """
    config, epoch, plan, decoded = run.config, decision.epoch, decision.plan, batch.decision.plan
    fidelity = plan.fidelity
    targets = {s.index: targets_of(run, s, fidelity, "joint", epoch, decoded.fidelity) for s in batch.samples}
    counts = Counts.of(list(targets.values()), len(run.dataset.classes), config.head.positive_iou)
    terms = []
    for arrived, frames in zip(parts(batch.samples, decoded.micro_batch), batch.frames, strict=True):
        whole = shrink(frames, decoded.fidelity, fidelity)
        del frames
        run.jitter(whole, [run.sampler.view(sample, "joint", epoch)[1] for sample in arrived])
        share = plan.micro_batch * fidelity.num_frames
        for samples, frames in zip(parts(arrived, plan.micro_batch), whole.split(share), strict=True):
            with run.precision.autocast(run.device):
                features_NC = encode(
                    run.encoder, frames, FRAMES_PER_SNIPPET,
                    recompute=plan.recompute, eight_bit=config.kept_maps == "8bit",
                )  # fmt: skip
                features_BCL = features_NC.unflatten(0, (len(samples), -1)).transpose(1, 2)
                output = run.head(run.dropout(features_BCL, samples, "joint", epoch))
            part_terms = tal_loss(
                output,
                Targets.stack([targets[sample.index] for sample in samples], run.device),
                counts,
                positive_iou=config.head.positive_iou,
                class_weight=config.joint.class_loss,
            )
            run.scaler.scale(part_terms.total).backward()
            terms.append(part_terms.detach())
            del frames, features_NC, features_BCL, output, part_terms  # before the next part takes their place
        del whole
    return LossTerms.sum(terms)


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
                numbers, plan, pattern = taken.terms.numbers(), taken.decision.plan, taken.decision.pattern
                run.log.event(
                    "step", stage="joint", epoch=epoch, step=step, pattern=pattern, lr=lr, peak=taken.peak,
                    budget=run.budget, retries=taken.retries, **taken.decision.fields(),
                    videos=[s.window.video for s in order[step]], **numbers,
                )  # fmt: skip
                advance(step + 1, f"{pattern}, {plan}, loss {numbers['loss']:.3f}, {gigabytes(taken.peak)}")
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


def take_step(run: Run, planner: Planner, optimizer: torch.optim.Optimizer, batch: Batch) -> Taken:
    """One optimiser step. When memory runs out, the same videos are taken again, lower: none is lost, none repeated."""
    decision = patiently(run, partial(planner.recheck, batch.decision))
    retries = 0
    if decision.changed:
        run.meter.release()
    while True:
        began = time.monotonic()
        run.meter.reset_peak()
        terms, reason = attempt(run, optimizer, batch, decision)
        peak = run.meter.peak()
        optimizer.zero_grad(set_to_none=True)
        if terms is not None:
            planner.learn(decision, peak, time.monotonic() - began)
            run.say_faults()
            return Taken(terms, decision, peak, retries)
        retries += 1
        run.meter.release()
        failed, decision = decision, patiently(run, partial(planner.failed, decision))
        run.log.event(
            "out_of_memory", stage="joint", epoch=failed.epoch, step=failed.step, reason=reason, peak=peak,
            plan=failed.plan.to_json(), next=decision.plan.to_json(), limit=failed.limit,
        )  # fmt: skip
        # Decoded again, as the lower plan asks: the frames of the failed attempt may be gone, or half of them.
        decision = replace(decision, requested=decision.plan)
        batch = next(batches(run, decision.epoch, [batch.samples], [decision].__getitem__))


def attempt(
    run: Run, optimizer: torch.optim.Optimizer, batch: Batch, decision: Decision
) -> tuple[LossTerms | None, str]:
    """The step under the cap of its limit; (None, why) when memory ran out, and then nothing has changed.

    Batch norm is frozen and every random draw is keyed, so the scaler is all there is to bring back.
    """
    scaler = run.scaler.state_dict()
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    versions = [p._version for p in parameters]
    reason = ""
    # A plan's first step may take memory outside torch for good: workspaces, code that is loaded at its first use.
    settling = run.meter.settle(f"a step at {decision.plan}") if decision.new else nullcontext()
    with settling, run.meter.cap(decision.limit):
        try:
            terms = forward_backward(run, batch, decision)
            run.scaler.step(optimizer)
            run.scaler.update()
            return terms, ""
        except Exception as error:  # its traceback holds tensors: leave the block before going on
            if not is_out_of_memory(error):
                raise
            reason = str(error).partition("\n")[0]
    if versions != [p._version for p in parameters]:
        raise InputError(
            f"memory ran out in the middle of an update ({reason}); go on from the last checkpoint with --resume, and "
            "more --mem-budget"
        )
    run.scaler = run.new_scaler(scaler)
    return None, reason


def patiently(run: Run, decide: Callable[[], Decision]) -> Decision:
    """The decision; when nothing fits beside what others hold, wait for them a while. Raises NothingFits."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    waited = False
    while True:
        try:
            return decide()
        except NothingFits as error:
            if run.meter.available() >= run.budget or time.monotonic() > deadline:
                raise
            if not waited:
                run.log.say(f"{error}; waiting up to {PATIENCE_SECONDS:.0f} s for it")
                waited = True
        time.sleep(POLL_SECONDS)


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
            "measured", plan=f"joint, {decision.pattern}", candidate=str(decision.plan), peak=peak,
            predicted=decision.predicted, budget=decision.limit,
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

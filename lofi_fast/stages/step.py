"""One LoFi step: frames at the planned fidelity, loss, gradients, update; tried again, lower, when memory runs out.

`lofi_step` is the step, `forward_backward` what it does with its videos, and `batches` where their frames come from.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial, reduce
from itertools import islice
from operator import add

import torch
from torch import Tensor

from lofi_fast.data.dataset import Sample, jitter_pixels
from lofi_fast.data.pipeline import FrameRequest, shrink
from lofi_fast.errors import InputError
from lofi_fast.fidelity import FRAMES_PER_SNIPPET, Fidelity
from lofi_fast.head.dropout import video_dropout
from lofi_fast.head.protocol import Targets, total
from lofi_fast.memory.decision import Decision, NothingFits, Planner
from lofi_fast.memory.meter import STEP, reason_of
from lofi_fast.memory.ranks import gather
from lofi_fast.run import events
from lofi_fast.run.seeds import seed_of
from lofi_fast.run.state import Run
from lofi_fast.stages.epochs import gradients_of_all, numbers, update

PATIENCE_SECONDS = 120.0  # how long a step waits for memory that others hold
POLL_SECONDS = 1.0


@dataclass(frozen=True)
class Batch:
    """The videos of one optimiser step, of which this process takes its share. Their frames arrive in micro-batches,
    each decoded while the one before it is worked on, as the plan asked for them: `decision` may be higher than what
    is run in the end.
    """

    samples: tuple[Sample, ...]
    decision: Decision
    frames: Iterator[Tensor]  # of each micro-batch, uint8 (B * L * 8, side, side, 3)
    plan_next: Callable[[], object] = lambda: None  # the step after it, if it is not planned yet


@dataclass(frozen=True)
class Taken:
    """A step that went through."""

    loss: float
    terms: dict[str, float]
    not_finite: str  # see `epochs.update`
    decision: Decision  # as it was run
    peak: int
    retries: int  # how often memory ran out first


def lofi_step(run: Run, planner: Planner, optimizer: torch.optim.Optimizer, batch: Batch) -> Taken:
    """One optimiser step. When memory runs out, the same videos are taken again, lower: none is lost, none repeated."""
    meter = run.machine.meter
    decision, retries = patiently(run, partial(planner.recheck, batch.decision)), 0
    if decision.changed:
        meter.release()
    if run.processes.several:  # not when a process happens to ask for frames: all plan at the same point
        batch.plan_next()
    while True:
        began, reason = time.monotonic(), ""
        unchanged = Unchanged(run, optimizer)
        meter.reset_peak()
        # The first step of a plan, and of a process, may take memory outside torch for good: workspaces, code that is
        # loaded at its first use.
        event = STEP if decision.new else "the first step of the process"
        with meter.settle(event, once=not decision.new), meter.cap(decision.limit):
            try:
                loss, terms = gradients_of_all(run, optimizer, partial(forward_backward, run, batch, decision))
                not_finite = update(run, optimizer, loss, run.config.joint.clip)
            except Exception as error:  # its traceback holds tensors: leave the block before going on
                if not meter.ran_out(error):
                    raise
                reason = reason_of(error)
        peak, seconds = meter.peak(), time.monotonic() - began
        optimizer.zero_grad(set_to_none=True)
        learned: int | None = peak
        if run.shared_gauge is not None:
            ended = gather("the end of a step", (reason, peak, seconds))
            learned = run.shared_gauge.peak_of_all(peak)
            reason = next((said for said, *_ in ended if said), "")
            peak, seconds = max(most for _, most, _ in ended), max(took for *_, took in ended)
        if not reason:
            planner.learn(decision, learned, seconds)
            run.say_faults()
            return Taken(loss, terms, not_finite, decision, peak, retries)

        unchanged.restore(reason)
        meter.release()
        retries += 1
        failed, decision = decision, patiently(run, partial(planner.failed, decision))
        run.log.event(
            events.OutOfMemory(
                stage="joint", epoch=failed.epoch, step=failed.step, reason=reason, peak=peak,
                plan=failed.plan.to_json(), next=decision.plan.to_json(), limit=failed.limit,
            )
        )  # fmt: skip
        # Decoded again, as the lower plan asks: the frames of the failed attempt may be gone, or half of them.
        decision = replace(decision, requested=decision.plan)
        batch = next(batches(run, decision.epoch, [batch.samples], [decision].__getitem__))


def forward_backward(
    run: Run, batch: Batch, decision: Decision, *, alone: bool = False
) -> tuple[float, dict[str, float]]:
    """(loss, its terms) of a batch, its gradients added to the parameters'. The terms are divided by counts of the
    whole batch, so that neither they nor the gradients depend on the size of the micro-batches.

    Where several processes share the batch, these are the parts of this process's videos, of which there may be none.
    `alone`: as if no others shared it.
    """
    config, epoch, plan, decoded = run.config, decision.epoch, decision.plan, batch.decision.plan
    fidelity = plan.fidelity
    targets = {s.index: targets_of(run, s, fidelity, "joint", epoch, decoded.fidelity) for s in batch.samples}
    counts = run.head.counts(list(targets.values()))
    if not alone and run.processes.several:
        counts = reduce(add, gather("counts of labels", counts))
        if not batch.samples:
            return 0.0, {}
    done = []
    for arrived, frames in zip(parts(batch.samples, decoded.micro_batch), batch.frames, strict=True):
        whole = shrink(frames, decoded.fidelity, fidelity)
        del frames
        if config.data.jitter:
            jitter_pixels(whole, [run.sampler.view(sample, "joint", epoch)[1] for sample in arrived])
        share = plan.micro_batch * fidelity.num_frames
        for samples, frames in zip(parts(arrived, plan.micro_batch), whole.split(share), strict=True):
            with run.machine.autocast():
                features_NC = run.encoder.encode(
                    frames,
                    FRAMES_PER_SNIPPET,
                    chunk=plan.chunk or None,
                    recompute=plan.recompute,
                    eight_bit=config.kept_maps == "8bit",
                )
                features_BCL = features_NC.unflatten(0, (len(samples), -1)).transpose(1, 2)
                output = run.head(for_head(run, features_BCL, samples, "joint", epoch))
            labels = [targets[sample.index] for sample in samples]
            terms = run.head.loss(output, labels, counts, config.joint.class_loss)
            run.scaler.scale(total(terms)).backward()
            done.append({name: term.detach() for name, term in terms.items()})
            del frames, features_NC, features_BCL, output, terms  # before the next part takes their place
        del whole
    return numbers(done)


class Unchanged:
    """What an attempt at a step must leave as it was when memory runs out in it. Batch norm is frozen and every random
    draw is keyed by its step, so that is the scaler of gradients; the update itself cannot be undone.
    """

    def __init__(self, run: Run, optimizer: torch.optim.Optimizer) -> None:
        self._run, self._scaler = run, run.scaler.state_dict()
        self._parameters = [p for group in optimizer.param_groups for p in group["params"]]
        self._versions = [p._version for p in self._parameters]

    def restore(self, reason: str) -> None:
        """Raises InputError when memory ran out for `reason` after the update had begun."""
        if self._versions != [p._version for p in self._parameters]:
            raise InputError(
                f"memory ran out in the middle of an update ({reason}); go on from the last checkpoint with --resume, "
                "and more --mem-budget"
            )
        self._run.scaler = self._run.machine.new_scaler(self._scaler)


# What a step works on


def batches(
    run: Run, epoch: int, order: Sequence[Sequence[Sample]], decide: Callable[[int], Decision]
) -> Iterator[Batch]:
    """The batches of `order`, decoded ahead; `decide(k)` plans the k-th when its frames are asked for, or before the
    step ahead of it where several processes plan together.
    """
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

    stream = run.pipeline.stream(requests())
    for number, samples in enumerate(order):
        decision = decided(number)
        frames = islice(stream, len(parts(samples, decision.plan.micro_batch)))
        yield Batch(tuple(samples), decision, frames, partial(decided, min(number + 1, len(order) - 1)))
        for _ in frames:  # what was left, so that the next batch gets its own
            pass


def parts(samples: Sequence[Sample], size: int) -> list[Sequence[Sample]]:
    """Micro-batches of `size` videos; the last may be smaller."""
    return [samples[k : k + size] for k in range(0, len(samples), size)]


def targets_of(
    run: Run, sample: Sample, fidelity: Fidelity, stage: str, epoch: int, decoded: Fidelity | None = None
) -> Targets:
    """Labels of a window at a fidelity, from the true times of its snippets; `decoded` as in `Sampler.edges`."""
    edges = run.sampler.edges(sample, fidelity, decoded)
    return run.head.targets(edges, sample.segments, sample.labels, run.sampler.rng(stage, epoch, sample.index, 1))


def for_head(run: Run, features_BCL: Tensor, samples: Sequence[Sample], stage: str, epoch: int) -> Tensor:
    """What the head sees in training: the features after dropout. The head is given the seeds of what it draws itself;
    both are a function of (seed, stage, epoch, window): a step that is tried again, resumed, or taken in parts draws
    the same.
    """
    seeds = [seed_of(run.config.seed, "dropout", stage, epoch, sample.index) for sample in samples]
    run.head.seed(seeds)
    return video_dropout(features_BCL, run.config.head.dropout, seeds)


def patiently(run: Run, decide: Callable[[], Decision]) -> Decision:
    """The decision; when nothing fits beside what others hold, wait for them a while, and then take what fits inside
    the margin. Raises NothingFits when that does not help either.
    """
    deadline = time.monotonic() + PATIENCE_SECONDS
    waited = False
    while True:
        try:
            return decide()
        except NothingFits as error:
            in_vain = run.machine.meter.available() >= run.machine.budget or time.monotonic() > deadline
            if run.processes.any("waiting for memory", in_vain or run.stop()):
                if error.last is not None:
                    return error.last
                raise
            if not waited:
                run.log.say(f"{error}; waiting up to {PATIENCE_SECONDS:.0f} s for it")
                waited = True
        time.sleep(POLL_SECONDS)

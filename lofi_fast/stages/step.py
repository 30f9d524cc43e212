"""One LoFi step: frames at the planned fidelity, loss, gradients, update; tried again, lower, when memory runs out."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice

import torch
from torch import Tensor

from lofi_fast.data.dataset import Sample
from lofi_fast.data.pipeline import FrameRequest, shrink
from lofi_fast.errors import InputError
from lofi_fast.fidelity import FRAMES_PER_SNIPPET, Fidelity
from lofi_fast.head.protocol import Targets, total
from lofi_fast.memory.governor import Decision, NothingFits, Planner
from lofi_fast.memory.meter import is_out_of_memory
from lofi_fast.run import events
from lofi_fast.run.state import Run

PATIENCE_SECONDS = 120.0  # how long a step waits for memory that others hold
POLL_SECONDS = 1.0


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

    loss: float
    terms: dict[str, float]
    decision: Decision  # as it was run
    peak: int
    retries: int  # how often memory ran out first


def targets_of(
    run: Run, sample: Sample, fidelity: Fidelity, stage: str, epoch: int, decoded: Fidelity | None = None
) -> Targets:
    """Labels of a window at a fidelity, from the true times of its snippets; `decoded` as in `Sampler.edges`."""
    edges = run.sampler.edges(sample, fidelity, decoded)
    return run.head.targets(edges, sample.segments, sample.labels, run.sampler.rng(stage, epoch, sample.index, 1))


def numbers(parts: Sequence[Mapping[str, Tensor]]) -> tuple[float, dict[str, float]]:
    """(loss, its terms by name) of a batch, from the terms of its parts. Synchronises with the device."""
    terms = {name: torch.stack([part[name] for part in parts]).sum(0) for name in parts[0]}
    return float(total(terms)), {name: float(term) for name, term in terms.items()}


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


def forward_backward(run: Run, batch: Batch, decision: Decision) -> tuple[float, dict[str, float]]:
    """Loss of a batch, its gradients added to the parameters'. Every term is divided by counts of the whole batch, so
    that neither depends on the size of the micro-batches.
    """
    config, epoch, plan, decoded = run.config, decision.epoch, decision.plan, batch.decision.plan
    fidelity = plan.fidelity
    targets = {s.index: targets_of(run, s, fidelity, "joint", epoch, decoded.fidelity) for s in batch.samples}
    counts = run.head.counts(list(targets.values()))
    terms = []
    for arrived, frames in zip(parts(batch.samples, decoded.micro_batch), batch.frames, strict=True):
        whole = shrink(frames, decoded.fidelity, fidelity)
        del frames
        run.jitter(whole, [run.sampler.view(sample, "joint", epoch)[1] for sample in arrived])
        share = plan.micro_batch * fidelity.num_frames
        for samples, frames in zip(parts(arrived, plan.micro_batch), whole.split(share), strict=True):
            with run.precision.autocast(run.device):
                features_NC = run.encoder.encode(
                    frames, FRAMES_PER_SNIPPET,
                    recompute=plan.recompute, eight_bit=config.kept_maps == "8bit",
                )  # fmt: skip
                features_BCL = features_NC.unflatten(0, (len(samples), -1)).transpose(1, 2)
                output = run.head(run.dropout(features_BCL, samples, "joint", epoch))
            chosen = [targets[sample.index] for sample in samples]
            part_terms = run.head.loss(output, chosen, counts, config.joint.class_loss)
            run.scaler.scale(total(part_terms)).backward()
            terms.append({name: term.detach() for name, term in part_terms.items()})
            del frames, features_NC, features_BCL, output, part_terms  # before the next part takes their place
        del whole
    return numbers(terms)


def take_step(run: Run, planner: Planner, optimizer: torch.optim.Optimizer, batch: Batch) -> Taken:
    """One optimiser step. When memory runs out, the same videos are taken again, lower: none is lost, none repeated."""
    decision = patiently(run, partial(planner.recheck, batch.decision))
    retries = 0
    if decision.changed:
        run.meter.release()
    while True:
        began = time.monotonic()
        run.meter.reset_peak()
        done, reason = attempt(run, optimizer, batch, decision)
        peak = run.meter.peak()
        optimizer.zero_grad(set_to_none=True)
        if done is not None:
            planner.learn(decision, peak, time.monotonic() - began)
            run.say_faults()
            return Taken(*done, decision, peak, retries)
        retries += 1
        run.meter.release()
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


def attempt(
    run: Run, optimizer: torch.optim.Optimizer, batch: Batch, decision: Decision
) -> tuple[tuple[float, dict[str, float]] | None, str]:
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
            done = forward_backward(run, batch, decision)
            run.scaler.step(optimizer)
            run.scaler.update()
            return done, ""
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

"""Stage 2, joint: LoFi. Encoder and head learn together from the TAL loss, at the fidelity that fits."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lofi_fast.checkpoint import Position
from lofi_fast.data.dataset import Sample
from lofi_fast.encoder.lean import encode
from lofi_fast.errors import InputError
from lofi_fast.fidelity import CYCLE, FRAMES_PER_SNIPPET, Fidelity, Pattern, ladder, phase
from lofi_fast.head.loss import Counts, LossTerms, tal_loss
from lofi_fast.head.targets import Targets, make_targets
from lofi_fast.memory.meter import is_out_of_memory
from lofi_fast.optim import learning_rate, make_optimizer, set_learning_rate
from lofi_fast.plan import gigabytes
from lofi_fast.run import Run, seed_of


@dataclass(frozen=True)
class Batch:
    """The videos of one optimiser step at one fidelity. Their frames arrive in micro-batches, each decoded while the
    one before it is worked on.
    """

    samples: tuple[Sample, ...]
    fidelity: Fidelity
    targets: tuple[Targets, ...]
    parts: Iterator[Part]


@dataclass(frozen=True)
class Part:
    """The videos of a batch that are in memory at once."""

    samples: tuple[Sample, ...]
    targets: tuple[Targets, ...]
    frames: Tensor  # uint8 (B * L * 8, side, side, 3)


def targets_of(run: Run, sample: Sample, fidelity: Fidelity, stage: str, epoch: int) -> Targets:
    """Labels of a window at a fidelity, from the true times of its snippets."""
    return make_targets(
        run.sampler.edges(sample, fidelity),
        sample.segments,
        sample.labels,
        run.head.max_duration(fidelity.num_snippets),
        len(run.dataset.classes),
        run.sampler.rng(stage, epoch, sample.index, 1),
        with_zero=run.config.head.sample_zero_iou,
    )


def batches(run: Run, epoch: int, plan: Sequence[tuple[list[Sample], Fidelity]]) -> Iterator[Batch]:
    """Decode ahead and put together the batches of `plan`, each (samples, fidelity)."""
    sampler = run.sampler
    size = run.config.micro_batch or run.config.joint.batch
    split = [[samples[k : k + size] for k in range(0, len(samples), size)] for samples, _ in plan]
    stream = run.frames(
        [sampler.request(sample, fidelity, sampler.view(sample, "joint", epoch)[0]) for sample in part]
        for parts, (_, fidelity) in zip(split, plan, strict=True)
        for part in parts
    )
    for parts, (samples, fidelity) in zip(split, plan, strict=True):
        targets = tuple(targets_of(run, sample, fidelity, "joint", epoch) for sample in samples)
        arriving = _parts(run, epoch, parts, targets, stream)
        yield Batch(tuple(samples), fidelity, targets, arriving)
        for _ in arriving:  # what the consumer left, so that the next batch gets its own frames
            pass


def _parts(
    run: Run, epoch: int, parts: Sequence[list[Sample]], targets: Sequence[Targets], stream: Iterator[Tensor]
) -> Iterator[Part]:
    done = 0
    for samples in parts:
        frames = next(stream)
        run.jitter(frames, [run.sampler.view(sample, "joint", epoch)[1] for sample in samples])
        yield Part(tuple(samples), tuple(targets[done : done + len(samples)]), frames)
        del frames
        done += len(samples)


def forward_backward(run: Run, batch: Batch, epoch: int) -> LossTerms:
    """Loss of a batch, its gradients added to the parameters'. Every term is divided by counts of the whole batch, so
    that neither depends on the size of the micro-batches.
    """
    config = run.config
    counts = Counts.of(batch.targets, len(run.dataset.classes), config.head.positive_iou)
    terms = []
    for part in batch.parts:
        with run.precision.autocast(run.device):
            features_NC = encode(run.encoder, part.frames, FRAMES_PER_SNIPPET, recompute=config.recompute)
            features_BCL = features_NC.unflatten(0, (len(part.samples), -1)).transpose(1, 2)
            output = run.head(run.dropout(features_BCL, part.samples, "joint", epoch))
        terms.append(
            tal_loss(
                output,
                Targets.stack(part.targets, run.device),
                counts,
                positive_iou=config.head.positive_iou,
                class_weight=config.joint.class_loss,
            )
        )
        run.scaler.scale(terms[-1].total).backward()
        del part, features_NC, features_BCL, output  # before the next part's frames take their place
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
    rungs = {Pattern(name): Fidelity(*chosen["rung"]) for name, chosen in run.plans["joint"].items()}
    if state := run.optimizer_state():
        optimizer.load_state_dict(state)

    for epoch in range(start.epoch, config.epochs):
        order = run.sampler.epoch("joint", epoch, config.batch)
        first = start.step if epoch == start.epoch else 0
        steps = range(epoch * len(order), (epoch + 1) * len(order))
        patterns = [phase(run.config.pattern, epoch, step, run.config.short_cycle) for step in steps]
        plan = [(samples, rungs[pattern]) for samples, pattern in zip(order, patterns, strict=True)]
        over: dict[Pattern, int] = {}
        with run.log.progress(f"joint {epoch + 1}/{config.epochs}", len(plan), first) as advance:
            for step, batch in enumerate(batches(run, epoch, plan[first:]), first):
                lr = learning_rate(config, epoch, step, len(plan))
                set_learning_rate(optimizer, lr)
                terms, peak = step_within_budget(run, batch, epoch)
                run.scaler.step(optimizer)
                run.scaler.update()
                optimizer.zero_grad(set_to_none=True)
                numbers = terms.numbers()
                if peak > run.budget:
                    over[patterns[step]] = peak
                run.log.event(
                    "step", stage="joint", epoch=epoch, step=step, pattern=patterns[step], lr=lr, peak=peak,
                    num_snippets=batch.fidelity.num_snippets, side=batch.fidelity.side, budget=run.budget,
                    videos=[s.window.video for s in batch.samples], **numbers,
                )  # fmt: skip
                advance(step + 1, f"{patterns[step]} {batch.fidelity} loss {numbers['loss']:.3f} {gigabytes(peak)}")
                run.save_when_due(Position("joint", epoch, step + 1), optimizer)
        run.save(Position("joint", epoch + 1), optimizer)
        if over:
            rungs |= {pattern: step_down(run, pattern, peak) for pattern, peak in over.items()}
            run.save(Position("joint", epoch + 1), optimizer)
    run.finish("joint")


def step_within_budget(run: Run, batch: Batch, epoch: int) -> tuple[LossTerms, int]:
    """`forward_backward` with its peak in bytes, under the cap of the budget.

    Running out of memory ends the run with a sentence; nothing is lost, since the last checkpoint stands.
    """
    run.meter.reset_peak()
    failed = ""
    with run.meter.cap(run.budget):
        try:
            terms = forward_backward(run, batch, epoch)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            failed = str(error).splitlines()[0]
    if failed:
        raise InputError(
            f"a joint step at {batch.fidelity} ran out of its budget of {gigabytes(run.budget)} ({failed}); "
            "go on with --resume and a larger --min-cut, or more --mem-budget"
        )
    return terms, run.meter.peak()


def step_down(run: Run, pattern: Pattern, peak: int) -> Fidelity:
    """The rung below the planned one of `pattern`, from now on: a step's peak passed the budget.

    Raises InputError when there is none.
    """
    chosen = run.plans["joint"][pattern.value]
    rungs = ladder(pattern, run.config.full, run.config.min_cut, run.config.max_cut)
    now = Fidelity(*chosen["rung"])
    if now == rungs[-1]:
        raise InputError(
            f"a step at {now}, the lowest rung of the {pattern} pattern, held {gigabytes(peak)} of a budget of "
            f"{gigabytes(run.budget)}; go on with --resume and more --mem-budget"
        )
    lower = rungs[rungs.index(now) + 1]
    cut = round(run.config.full.omega / lower.omega, 2)
    chosen |= {"rung": [lower.num_snippets, lower.side], "cut": cut, "peak": None, "stepped_down_from_peak": peak}
    run.write_plans()
    run.log.say(f"{pattern}: a step at {now} held {gigabytes(peak)}, over the budget: {lower} from the next epoch on")
    run.log.event("step_down", pattern=pattern.value, peak=peak, rung=chosen["rung"])
    return lower


def plan_joint(run: Run) -> dict[str, dict[str, object]]:
    """For each pattern of the run the highest rung whose step, run on real frames, fits the budget. Leaves no trace."""
    config = run.config
    run.encoder.freeze_batchnorm()
    run.encoder.train()
    run.head.train()
    parameters = [*run.encoder.parameters(), *run.head.parameters()]
    optimizer = make_optimizer(config.joint, parameters, config.optimizer_impl)
    samples = run.sampler.epoch("joint", 0, config.joint.batch)[0]
    plans: dict[str, dict[str, object]] = {}
    for pattern in CYCLE if config.pattern is Pattern.CYCLIC else (config.pattern,):

        def step(fidelity: Fidelity) -> None:
            for batch in batches(run, 0, [(samples, fidelity), (samples, fidelity)]):
                forward_backward(run, batch, 0)
                return  # the second batch was there to be decoded ahead, as in training

        rungs = ladder(pattern, config.full, config.min_cut, config.max_cut)
        choice = run.plan(
            f"joint, {pattern}", rungs, lambda f: f.omega, step,
            f"raise --mem-budget, lower --batch (now {config.joint.batch}), raise --max-cut (now {config.max_cut:g}), "
            "or take a smaller --encoder or --width",
        )  # fmt: skip
        rung = choice.candidate
        plans[pattern.value] = {
            "rung": [rung.num_snippets, rung.side],
            "cut": round(config.full.omega / rung.omega, 2),
            "batch": config.joint.batch,
            "peak": choice.peak,
            "measured": [[r.candidate.num_snippets, r.candidate.side, r.peak] for r in choice.readings],
        }
    optimizer.zero_grad(set_to_none=True)
    return plans

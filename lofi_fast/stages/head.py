"""Stage 3, head: a fresh head learns on the frozen encoder's full-fidelity features."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from lofi_fast.data.dataset import Sample
from lofi_fast.head.protocol import total
from lofi_fast.optim import learning_rate, make_optimizer, set_learning_rate
from lofi_fast.run import events
from lofi_fast.run.checkpoint import Position
from lofi_fast.run.seeds import seed_of
from lofi_fast.run.state import Run
from lofi_fast.stages.evaluation import detect_subset, score
from lofi_fast.stages.features import encoder_digest, extract, load_features
from lofi_fast.stages.step import numbers, targets_of

WATCH_WINDOWS = 500  # up to so many validation windows, mAP is measured after each epoch; beyond, after the last


def train_head(run: Run) -> None:
    """Freeze the encoder, extract features once, train the head from scratch on them."""
    start = run.due("head")
    config = run.config.head_stage
    if start is None or config.epochs == 0:
        return
    run.encoder.freeze_batchnorm()
    run.encoder.eval().requires_grad_(False)
    before = encoder_digest(run)
    extract(run)
    if start == Position("head"):
        run.head = run.new_head("head")
        run.best = {}
    torch.manual_seed(seed_of(run.config.seed, "head"))
    optimizer = make_optimizer(config, run.head.parameters(), run.config.optimizer_impl)
    if state := run.optimizer_state():
        optimizer.load_state_dict(state)
    scored = any(video.segments for video in run.dataset.videos["validation"])
    watch = len(run.dataset.samples["validation"]) <= WATCH_WINDOWS

    for epoch in range(start.epoch, config.epochs):
        order = run.sampler.epoch("head", epoch, config.batch)
        first = start.step if epoch == start.epoch else 0
        run.head.train()
        sum_of_losses = 0.0
        with run.log.progress(f"head {epoch + 1}/{config.epochs}", len(order), first) as advance:
            for step, samples in enumerate(order[first:], first):
                lr = learning_rate(config, epoch, step, len(order))
                set_learning_rate(optimizer, lr)
                loss, terms = head_step(run, samples, epoch, optimizer)
                sum_of_losses += loss
                run.log.event(events.Step(stage="head", epoch=epoch, step=step, lr=lr, loss=loss, terms=terms))
                advance(step + 1, f"loss {sum_of_losses / (step + 1 - first):.3f}")
                run.save_when_due(Position("head", epoch, step + 1), optimizer)
        if scored and (watch or epoch + 1 == config.epochs):
            result = score(run, detect_subset(run, "validation"))
            run.log.event(
                events.Validation(stage="head", epoch=epoch, average=result.average, map=list(result.map_by_tiou))
            )
            run.save_best(epoch, result.average)
        run.save(Position("head", epoch + 1), optimizer)
    if encoder_digest(run) != before:
        raise RuntimeError("the encoder changed during the head stage")
    run.finish("head")


def head_step(
    run: Run, samples: Sequence[Sample], epoch: int, optimizer: torch.optim.Optimizer
) -> tuple[float, dict[str, float]]:
    """One optimiser step of the head on cached features."""
    config = run.config
    targets = [targets_of(run, sample, config.full, "head", epoch) for sample in samples]
    with run.precision.autocast(run.device):
        output = run.head(run.dropout(load_features(run, samples), samples, "head", epoch))
    terms = run.head.loss(output, targets, run.head.counts(targets), config.head_stage.class_loss)
    run.scaler.scale(total(terms)).backward()
    run.scaler.step(optimizer)
    run.scaler.update()
    optimizer.zero_grad(set_to_none=True)
    return numbers([{name: term.detach() for name, term in terms.items()}])

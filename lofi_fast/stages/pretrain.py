"""Stage 1, pretrain: the encoder learns to classify the trimmed positive segments, snippet by snippet, with live BN."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lofi_fast.data.dataset import Clip
from lofi_fast.fidelity import FRAMES_PER_SNIPPET
from lofi_fast.optim import learning_rate, make_optimizer, set_learning_rate
from lofi_fast.run import events
from lofi_fast.run.checkpoint import Position
from lofi_fast.run.seeds import seed_of
from lofi_fast.run.state import Run

LEAST_BATCH = 4  # below this the statistics of live BN are noise


def clip_batches(run: Run, epoch: int, batches: list[list[Clip]]) -> Iterator[tuple[Tensor, Tensor]]:
    """(frames (B*8, side, side, 3), labels (B,)) of each batch, every clip with an augmentation of its own."""
    sampler = run.sampler
    views = [[sampler.view(c.sample, "pretrain", epoch, 1 + c.snippet) for c in clips] for clips in batches]
    stream = run.frames(
        [sampler.clip_request(clip, view) for clip, (view, _) in zip(clips, augmented, strict=True)]
        for clips, augmented in zip(batches, views, strict=True)
    )
    for frames, clips, augmented in zip(stream, batches, views, strict=True):
        labels = torch.tensor([clip.label for clip in clips], device=run.device)
        yield run.jitter(frames, [jitter for _, jitter in augmented]), labels


def new_classifier(run: Run) -> nn.Linear:
    """A linear classifier over the classes, initialised the same on every machine."""
    torch.manual_seed(seed_of(run.config.seed, "pretrain"))
    return nn.Linear(run.encoder.num_features, len(run.dataset.classes)).to(run.device)


def clip_loss(run: Run, classifier: nn.Linear, frames: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """(cross-entropy, number of right answers) of a batch of clips."""
    with run.precision.autocast(run.device):
        logits = classifier(run.encoder(frames, FRAMES_PER_SNIPPET))
    return F.cross_entropy(logits.float(), labels), (logits.argmax(1) == labels).sum()


def pretrain(run: Run, extra: dict[str, Any]) -> None:
    """Run the stage from where it stands. Logs loss and accuracy of each step and epoch."""
    start = run.due("pretrain")
    config = run.config.pretrain
    if start is None or config.epochs == 0:
        return
    classifier = new_classifier(run)
    if "classifier" in extra:
        classifier.load_state_dict(extra["classifier"])
    run.encoder.freeze_batchnorm(False)
    run.encoder.train()
    parameters = [*run.encoder.parameters(), *classifier.parameters()]
    optimizer = make_optimizer(config, parameters, run.config.optimizer_impl)
    if state := run.optimizer_state():
        optimizer.load_state_dict(state)

    for epoch in range(start.epoch, config.epochs):
        batches = run.sampler.clip_epoch(epoch, run.plans["pretrain"]["batch"])
        first = start.step if epoch == start.epoch else 0
        correct = torch.zeros((), device=run.device)
        seen = 0
        with run.log.progress(f"pretrain {epoch + 1}/{config.epochs}", len(batches), first) as advance:
            for step, (frames, labels) in enumerate(clip_batches(run, epoch, batches[first:]), first):
                set_learning_rate(optimizer, learning_rate(config, epoch, step, len(batches)))
                loss, hits = clip_loss(run, classifier, frames, labels)
                run.scaler.scale(loss).backward()
                run.scaler.step(optimizer)
                run.scaler.update()
                optimizer.zero_grad(set_to_none=True)
                correct, seen = correct + hits, seen + len(labels)
                value, accuracy = float(loss.detach()), float(correct) / seen
                run.log.event(events.Step(stage="pretrain", epoch=epoch, step=step, loss=value, accuracy=accuracy))
                advance(step + 1, f"loss {value:.3f} accuracy {accuracy:.2f}")
                run.save_when_due(Position("pretrain", epoch, step + 1), optimizer, classifier=classifier)
        run.log.event(events.Epoch(stage="pretrain", epoch=epoch, accuracy=float(correct) / max(seen, 1)))
        run.save(Position("pretrain", epoch + 1), optimizer, classifier=classifier)
    run.finish("pretrain")


def plan_pretrain(run: Run) -> dict[str, Any]:
    """The largest batch of clips that fits: the asked one, or a half, a quarter ... of it. Leaves no trace."""
    config = run.config.pretrain
    before = {name: value.clone() for name, value in run.encoder.state_dict().items()}
    run.encoder.freeze_batchnorm(False)
    run.encoder.train()
    classifier = new_classifier(run)
    parameters = [*run.encoder.parameters(), *classifier.parameters()]
    optimizer = make_optimizer(config, parameters, run.config.optimizer_impl)
    sizes = [config.batch]
    while sizes[-1] // 2 >= LEAST_BATCH:
        sizes.append(sizes[-1] // 2)

    def step(size: int) -> None:
        clips = (run.sampler.clip_epoch(0, size)[0] * size)[:size]
        for frames, labels in clip_batches(run, 0, [clips, clips]):
            clip_loss(run, classifier, frames, labels)[0].backward()
            return  # the second batch was there to be decoded ahead, as in training

    choice = run.plan(
        "pretrain, clips a step", sizes, float, step,
        "raise --mem-budget, or give a smaller --fidelity, or leave the stage out with --stages joint,head,eval",
    )  # fmt: skip
    optimizer.zero_grad(set_to_none=True)
    run.encoder.load_state_dict(before)  # the trial moved BN's running statistics
    return {"batch": choice.candidate, "peak": choice.peak}

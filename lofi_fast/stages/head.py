"""Stage 3, head: a fresh head learns on the frozen encoder's full-fidelity features."""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce
from operator import add

import torch
from torch import nn

from lofi_fast.budget import gigabytes
from lofi_fast.data.dataset import Sample
from lofi_fast.errors import InputError
from lofi_fast.head.protocol import total
from lofi_fast.memory.ranks import gather
from lofi_fast.memory.step_bytes import head_bytes
from lofi_fast.run import events
from lofi_fast.run.checkpoint import Position
from lofi_fast.run.seeds import seed_of
from lofi_fast.run.state import Run
from lofi_fast.stages import epochs
from lofi_fast.stages.epochs import Outcome, gradients_of_all, numbers, optimizer_of, update
from lofi_fast.stages.evaluation import detect_subset, score
from lofi_fast.stages.features import encoder_digest, extract, load_features
from lofi_fast.stages.step import for_head, targets_of

WATCH_WINDOWS = 500  # up to so many validation windows, mAP is measured after each epoch; beyond, after the last


def train_head(run: Run) -> None:
    """Freeze the encoder, extract features once, train the head from scratch on them."""
    start = run.due("head")
    if start is None or run.config.head_stage.epochs == 0:
        return
    run.encoder.freeze_batchnorm()
    run.encoder.eval().requires_grad_(False)
    before = encoder_digest(run)
    extract(run)
    if run.stopped:
        return
    if start == Position("head"):
        run.head = run.new_head("head")
        run.best = {}
    torch.manual_seed(seed_of(run.config.seed, "head"))
    epochs.train(run, HeadStage(run), run.config.head_stage)
    if encoder_digest(run) != before:
        raise RuntimeError("the encoder changed during the head stage")


def check_head(run: Run) -> None:
    """Raises InputError where the tensors of one step of the stage are more than there is, before anything trains."""
    setting, meter = run.setting(), run.machine.meter
    if setting is None:
        return
    size, length = min(run.config.head_stage.batch, len(run.dataset.samples["training"])), run.config.full.num_snippets
    size = run.processes.largest_share(size)
    limit = min(run.machine.budget, meter.available())
    needed = meter.held() + head_bytes(setting.head, setting.encoder.num_features, size, length, setting.itemsize)
    if needed > limit:
        raise InputError(
            f"nothing fits: the head stage needs at least {gigabytes(needed)} of {gigabytes(limit)} for {size} windows "
            f"of {length} snippets a step; raise --mem-budget, or give a smaller --head-stage.batch or --fidelity"
        )


class HeadStage:
    """The steps of the stage."""

    name = "head"
    lr_flag = "--head-lr"

    def __init__(self, run: Run) -> None:
        self.run = run
        self.optimizer = optimizer_of(run, run.config.head_stage, run.head)
        self.modules: dict[str, nn.Module] = {}
        self._scored = any(video.segments for video in run.dataset.videos["validation"])
        self._watched = len(run.dataset.samples["validation"]) <= WATCH_WINDOWS

    def begin(self, epoch: int, first: int) -> int:
        self._order = self.run.sampler.epoch("head", epoch, self.run.config.head_stage.batch)
        self._losses: list[float] = []
        self.run.head.train()
        return len(self._order)

    def step(self, epoch: int, step: int) -> Outcome:
        run, config, samples = self.run, self.run.config, self._order[step]
        loss, logged = gradients_of_all(run, self.optimizer, lambda: self._gradients(epoch, samples))
        not_finite = update(run, self.optimizer, loss, config.head_stage.clip)
        self.optimizer.zero_grad(set_to_none=True)
        self._losses.append(loss)
        note = f"loss {sum(self._losses) / len(self._losses):.3f}"
        return Outcome(loss, [sample.window.video for sample in samples], not_finite, note, {"terms": logged})

    def _gradients(self, epoch: int, batch: Sequence[Sample]) -> tuple[float, dict[str, float]]:
        """(loss, its terms) of a batch, or of this process's share of it, and its gradients added."""
        run, config, samples = self.run, self.run.config, self.run.processes.share(batch)
        targets = [targets_of(run, sample, config.full, "head", epoch) for sample in samples]
        counts = run.head.counts(targets)
        if run.processes.several:
            counts = reduce(add, gather("counts of labels", counts))
            if not samples:
                return 0.0, {}
        with run.machine.autocast():
            output = run.head(for_head(run, load_features(run, samples), samples, "head", epoch))
        terms = run.head.loss(output, targets, counts, config.head_stage.class_loss)
        run.scaler.scale(total(terms)).backward()
        return numbers([terms])

    def end(self, epoch: int) -> None:
        run, config = self.run, self.run.config.head_stage
        if not self._scored or not (self._watched or epoch + 1 == config.epochs):
            return
        found = detect_subset(run, "validation")
        if not run.processes.first:
            return
        result = score(run, found)
        run.log.event(
            events.Validation(stage="head", epoch=epoch, average=result.average, map=list(result.map_by_tiou))
        )
        run.save_best(epoch, result.average)
        best = ", the best so far" if run.best["epoch"] == epoch else ""
        run.log.say(f"head {epoch + 1}/{config.epochs}: mAP {100 * result.average:.2f}%{best}")

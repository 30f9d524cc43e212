"""Stage 3, head: a fresh head learns on the frozen encoder's full-fidelity features."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from functools import reduce
from operator import add
from typing import Any

import torch
from torch import nn

from lofi_fast.budget import gigabytes
from lofi_fast.data.dataset import Sample
from lofi_fast.errors import InputError
from lofi_fast.head.protocol import Head, total
from lofi_fast.memory.ranks import gather
from lofi_fast.memory.step_bytes import head_bytes
from lofi_fast.run import events
from lofi_fast.run.checkpoint import Position
from lofi_fast.run.seeds import seed_of
from lofi_fast.run.state import Run, measures
from lofi_fast.stages import epochs
from lofi_fast.stages.epochs import Outcome, gradients_of_all, numbers, optimizer_of, update
from lofi_fast.stages.evaluation import by_threshold, detect_subset, score
from lofi_fast.stages.features import encoder_digest, extract, load_features
from lofi_fast.stages.step import for_head, targets_of

WATCH_WINDOWS = 500  # up to so many validation windows, mAP is measured after each epoch; beyond, after the last
AVERAGE = "average"  # of the head's weights, among what a checkpoint has of the stage alone


def train_head(run: Run, extra: Mapping[str, Any]) -> None:
    """Freeze the encoder, extract features once, train the head from scratch on them. `extra` is what `Run.resume`
    returned.

    Where the weights are averaged, the run's head is their average afterwards.
    """
    start = run.due("head")
    if start is None or run.config.head_stage.epochs == 0:
        if AVERAGE in extra:
            run.head.load_state_dict(extra[AVERAGE])
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
    stage = HeadStage(run)
    if stage.average is not None and AVERAGE in extra:
        stage.average.load_state_dict(extra[AVERAGE])
    epochs.train(run, stage, run.config.head_stage)
    if stage.average is not None:
        run.head = stage.average
    run.head_epochs = run.config.head_stage.epochs
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
    average = setting.head.parameters.held if run.config.head_stage.ema is not None else 0
    step = head_bytes(setting.head, setting.encoder.num_features, size, length, setting.itemsize)
    needed = meter.held() + average + step
    if needed > limit:
        raise InputError(
            f"nothing fits: the head stage needs at least {gigabytes(needed)} of {gigabytes(limit)} for {size} windows "
            f"of {length} snippets a step; raise --mem-budget, or give a smaller --head-stage.batch or --fidelity"
        )


def _copy(run: Run) -> Head:
    """The run's head as it is now, which does not learn. It is moved to where it is already, so that the weights of a
    recurrent network lie together again, as cuDNN wants them.
    """
    return deepcopy(run.head).to(run.machine.device).requires_grad_(False)


class HeadStage:
    """The steps of the stage."""

    name = "head"
    lr_flag = "--head-lr"

    def __init__(self, run: Run) -> None:
        self.run = run
        self.optimizer = optimizer_of(run, run.config.head_stage, run.head)
        self.average = None if run.config.head_stage.ema is None else _copy(run)
        self.modules: dict[str, nn.Module] = {} if self.average is None else {AVERAGE: self.average}
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
        if not not_finite:
            self._follow()
        self._losses.append(loss)
        note = f"loss {sum(self._losses) / len(self._losses):.3f}"
        return Outcome(loss, [sample.window.video for sample in samples], not_finite, note, {"terms": logged})

    @torch.no_grad()
    def _follow(self) -> None:
        """Let the average follow the weights by a step."""
        decay = self.run.config.head_stage.ema
        if self.average is None or decay is None:
            return
        for mean, weight in zip(self.average.parameters(), self.run.head.parameters(), strict=True):
            mean.lerp_(weight, 1 - decay)
        for kept, buffer in zip(self.average.buffers(), self.run.head.buffers(), strict=True):
            kept.copy_(buffer)

    @contextmanager
    def _averaged(self) -> Iterator[None]:
        """The average, where there is one, is the run's head in here."""
        learning = self.run.head
        self.run.head = learning if self.average is None else self.average
        try:
            yield
        finally:
            self.run.head = learning

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
        config = self.run.config.head_stage
        if not self._scored or not (self._watched or epoch + 1 == config.epochs):
            return
        with self._averaged():
            self._validate(epoch)

    def _validate(self, epoch: int) -> None:
        run, config = self.run, self.run.config.head_stage
        found = detect_subset(run, "validation")
        if not run.processes.first:
            return
        result = score(run, found)
        run.log.event(
            events.Validation(
                stage="head",
                epoch=epoch,
                average=result.average,
                map=list(by_threshold(result).values()),
                measure=measures(run.config),
            )
        )
        run.save_best(epoch, result.average)
        best = ", the best so far" if run.best["epoch"] == epoch else ""
        run.log.say(f"head {epoch + 1}/{config.epochs}: mAP {100 * result.average:.2f}%{best}")

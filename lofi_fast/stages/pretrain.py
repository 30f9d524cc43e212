"""Stage 1, pretrain: the encoder learns to classify single snippets that lie in a labelled segment, with live BN.

A snippet that lies in segments of several labels shows them all, and each has an equal share of its target: the
cross-entropy with shares that Mahajan et al. (ECCV 2018) pre-train with on several hashtags a picture. The classifier
is thrown away afterwards, so that its probabilities need not rank segments, as those of the head must.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from typing import Any, TypedDict

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lofi_fast.budget import gigabytes
from lofi_fast.config import Config
from lofi_fast.data.dataset import Clip, jitter_pixels
from lofi_fast.encoder.shared_batchnorm import SharedStatistics
from lofi_fast.errors import InputError
from lofi_fast.fidelity import FRAMES_PER_SNIPPET
from lofi_fast.gpu import send
from lofi_fast.memory.ranks import LostProcess, gather, lowest_of_all
from lofi_fast.memory.step_bytes import Setting, pretrain_bytes
from lofi_fast.memory.trial import Choice, highest_predicted
from lofi_fast.run import events
from lofi_fast.run.seeds import seed_of
from lofi_fast.run.state import Machine, Run
from lofi_fast.stages import epochs
from lofi_fast.stages.epochs import Outcome, gradients_of_all, optimizer_of, update

LEAST_BATCH = 4  # below this the statistics of live BN are noise
PLAN = "pretrain, clips a step"  # in the log
REFUSAL = "raise --mem-budget, or give a smaller --fidelity, or leave the stage out with --stages joint,head,eval"


def pretrain(run: Run, extra: Mapping[str, Any]) -> None:
    """Run the stage from where it stands; `extra` is what `Run.resume` returned. Logs loss and accuracy."""
    if run.due("pretrain") is None or run.config.pretrain.epochs == 0:
        return
    classifier = new_classifier(run)
    if "classifier" in extra:
        classifier.load_state_dict(extra["classifier"])
    run.encoder.freeze_batchnorm(False)
    run.encoder.train()
    stage = Pretrain(run, classifier)
    if "answers" in extra:
        stage.answers.load_state_dict(extra["answers"])
    epochs.train(run, stage, run.config.pretrain)


class Answers(nn.Module):
    """How many clips the epoch has seen so far, and how many of them were named right: a checkpoint within the epoch
    has them, so that its accuracy is of all its clips.
    """

    right: Tensor
    seen: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("right", torch.zeros((), dtype=torch.float64))
        self.register_buffer("seen", torch.zeros((), dtype=torch.float64))

    @property
    def accuracy(self) -> float | None:
        """None before the first clip."""
        return float(self.right / self.seen) if self.seen > 0 else None


class Pretrain:
    """The steps of the stage."""

    name = "pretrain"
    lr_flag = "--pretrain-lr"

    def __init__(self, run: Run, classifier: nn.Linear) -> None:
        self.run, self.classifier = run, classifier
        self.optimizer = optimizer_of(run, run.config.pretrain, run.encoder, classifier)
        self.answers = Answers()
        self.modules: dict[str, nn.Module] = {"classifier": classifier, "answers": self.answers}
        self._statistics = [buffer.clone() for buffer in run.encoder.buffers()]
        self._shared: SharedStatistics | None = None
        if run.processes.several:
            self._shared = SharedStatistics(run.encoder, run.processes.stack)
        self._ready: tuple[float, Tensor, list[Clip]] | None = None  # the first step's, see `_verify`

    def begin(self, epoch: int, first: int) -> int:
        if first == 0:
            copy_each(Answers().buffers(), self.answers.buffers())
        count = self._ask(epoch, first)
        while first == 0 and self.run.plans["pretrain"].get("peak", 0) is None:
            if not self._verify():
                count = self._ask(epoch, first)
        return count

    def _ask(self, epoch: int, first: int) -> int:
        """Ask for the batches of an epoch from the one numbered `first` on; how many the epoch has."""
        batches = self.run.sampler.clip_epoch(epoch, self.run.plans["pretrain"]["batch"])
        self._clips = iter(batches[first:])
        self._batches = clip_batches(self.run, epoch, [list(self.run.processes.share(b)) for b in batches[first:]])
        return len(batches)

    def _verify(self) -> bool:
        """Take the gradients of the first step of a plan, and measure what arithmetic has planned. Where it was too
        much, they are dropped, the batch is halved, and False is the answer. Raises InputError where it cannot be.
        """
        run, plan = self.run, self.run.plans["pretrain"]
        size, limit = plan["batch"], lowest_of_all(min(run.machine.budget, run.machine.meter.available()))

        def step() -> None:
            self._ready = self._gradients()

        peak = run.trials.measure(step, limit)
        peaks = gather("peak of the first step", peak)
        peak = None if None in peaks else max(one for one in peaks if one is not None)
        run.log.event(
            events.Measured(plan=PLAN, candidate=str(size), peak=peak, predicted=plan["predicted"], budget=limit)
        )
        smallest = size // 2 < LEAST_BATCH
        if fits := peak is not None and (smallest or peak <= limit):
            plan["peak"] = peak
        else:
            self._ready = None
            self.optimizer.zero_grad(set_to_none=True)
            copy_each(self._statistics, run.encoder.buffers())
            if smallest:
                raise InputError(f"nothing fits: {size} clips a step need more than {gigabytes(limit)}; {REFUSAL}")
            plan["batch"] = size // 2
            run.log.say(f"{size} clips a step need more than {gigabytes(limit)}: {size // 2} from the first step on")
        run.write_plans()
        return fits

    def _gradients(self) -> tuple[float, Tensor, list[Clip]]:
        """(loss, number of right answers, clips) of the next batch, its gradients added to the parameters'."""
        run, (frames, shares), clips = self.run, next(self._batches), next(self._clips)
        copy_each(run.encoder.buffers(), self._statistics)
        shared = self._shared
        if shared is None:
            loss, right = clip_loss(run, self.classifier, frames, shares)
            run.scaler.scale(loss).backward()
            return float(loss.detach()), right, clips

        def share() -> tuple[float, dict[str, float]]:
            with shared.step():
                part, named = clip_loss(run, self.classifier, frames, shares, of=len(clips))
                run.scaler.scale(part).backward()
                return float(part.detach()), {"right": float(named)}

        try:
            value, terms = gradients_of_all(run, self.optimizer, share)
        except LostProcess:  # the run is saved as it was before this step
            copy_each(self._statistics, run.encoder.buffers())
            raise
        return value, torch.tensor(terms["right"], device=run.machine.device), clips

    def step(self, epoch: int, step: int) -> Outcome:
        run = self.run
        value, right, clips = self._ready or self._gradients()
        self._ready = None
        not_finite = update(run, self.optimizer, value, run.config.pretrain.clip)
        self.optimizer.zero_grad(set_to_none=True)
        if not_finite:  # forward has moved the statistics of live BN
            copy_each(self._statistics, run.encoder.buffers())
        self.answers.right += float(right)
        self.answers.seen += len(clips)
        accuracy = self.answers.accuracy
        videos = [clip.sample.window.video for clip in clips]
        note = f"loss {value:.3f} accuracy {accuracy or 0:.2f}"
        return Outcome(value, videos, not_finite, note, {"accuracy": accuracy})

    def end(self, epoch: int) -> None:
        self.run.log.event(events.Epoch(stage="pretrain", epoch=epoch, accuracy=self.answers.accuracy))


def copy_each(sources: Iterable[Tensor], targets: Iterable[Tensor]) -> None:
    for source, target in zip(sources, targets, strict=True):
        target.copy_(source)


def clip_batches(run: Run, epoch: int, batches: list[list[Clip]]) -> Iterator[tuple[Tensor, Tensor]]:
    """(frames (B*8, side, side, 3), shares (B, K)) of each batch, each clip with an augmentation of its own. The shares
    of the classes in a clip add up to 1.
    """
    sampler = run.sampler
    views = [[sampler.view(c.sample, "pretrain", epoch, 1 + c.snippet) for c in clips] for clips in batches]
    stream = run.pipeline.stream(
        [sampler.clip_request(clip, view) for clip, (view, _) in zip(clips, augmented, strict=True)]
        for clips, augmented in zip(batches, views, strict=True)
        if clips
    )
    side = run.config.full.side
    for clips, augmented in zip(batches, views, strict=True):
        # A process may have no part in a last small batch, and still has to run the encoder with the others.
        empty = torch.empty(0, side, side, 3, dtype=torch.uint8, device=run.machine.device)
        frames = next(stream) if clips else empty
        shares = torch.zeros(len(clips), len(run.dataset.classes))
        for row, clip in zip(shares, clips, strict=True):
            row[list(clip.labels)] = 1 / len(clip.labels)
        if clips and run.config.data.jitter:
            jitter_pixels(frames, [jitter for _, jitter in augmented])
        yield frames, send(shares, run.machine.device)


def new_classifier(run: Run) -> nn.Linear:
    """A linear classifier over the classes, initialised the same on every machine."""
    torch.manual_seed(seed_of(run.config.seed, "pretrain"))
    return nn.Linear(run.encoder.num_features, len(run.dataset.classes)).to(run.machine.device)


def clip_loss(
    run: Run, classifier: nn.Linear, frames: Tensor, shares: Tensor, of: int | None = None
) -> tuple[Tensor, Tensor]:
    """(cross-entropy, number of right answers) of a batch of clips, where any class of a clip is a right answer. `of`:
    how many clips the step has in all, where these are a part of them, or none.
    """
    with run.machine.autocast():
        logits = classifier(run.encoder(frames, FRAMES_PER_SNIPPET))
    answers = logits.argmax(dim=1, keepdim=True)
    right = (shares.gather(1, answers) > 0).sum()
    if of is None:
        return F.cross_entropy(logits.float(), shares), right
    return F.cross_entropy(logits.float(), shares, reduction="sum") / of, right


class ClipsPlan(TypedDict):
    """The stage's part of plan.json."""

    batch: int  # clips of a step
    predicted: int  # bytes: the most that arithmetic expects, or the peak of a trial step
    peak: int | None  # of a trial step, or of the first step; None before it


def holds(run: Run, plan: ClipsPlan) -> bool:
    """Whether the plan of a run that goes on, maybe on another machine, fits there, or is the smallest anyway."""
    room = lowest_of_all(min(run.machine.budget, run.machine.meter.available()))
    return plan["batch"] // 2 < LEAST_BATCH or (plan["peak"] or plan["predicted"]) <= room


def plan_again(run: Run, before: ClipsPlan) -> None:
    """Plan anew where a run goes on, in place of the plan of `before`. Within an epoch its position then counts steps
    of the new batch, so that the epoch has each clip once still.
    """
    done = before["batch"] * run.position.step if run.position.stage == "pretrain" else 0
    run.plans["pretrain"] = plan = plan_pretrain(run, done)
    run.log.say(f"pretraining is planned again: {plan['batch']} clips a step, before {before['batch']}")
    if done:
        run.position = replace(run.position, step=done // plan["batch"])


def plan_pretrain(run: Run, done: int = 0) -> ClipsPlan:
    """The largest batch of clips that fits: the asked one, or a half, a quarter ... of it. Leaves no trace.

    `done`: clips that the epoch under way has seen. The batch divides them, and is measured now: an epoch's first step,
    of which the others are, is over.
    """
    config, setting = run.config.pretrain, run.setting()
    before = {name: value.clone() for name, value in run.encoder.state_dict().items()}
    run.encoder.freeze_batchnorm(False)
    run.encoder.train()
    classifier = new_classifier(run)
    optimizer = epochs.new_optimizer(run, config, run.encoder, classifier)
    sizes = [size for size in _sizes(config.batch) if done % size == 0]

    def step(size: int) -> None:
        clips = (run.sampler.clip_epoch(0, size)[0] * size)[: run.processes.largest_share(size)]
        for frames, shares in clip_batches(run, 0, [clips, clips]):
            clip_loss(run, classifier, frames, shares)[0].backward()
            return  # the second batch was there to be decoded ahead, as in training

    def ledger_of(setting: Setting) -> Callable[[int], int]:
        ledger = partial(_ledger, setting, len(run.dataset.classes), run.config.full.side)
        return lambda size: ledger(run.processes.largest_share(size))

    ledger = None if setting is None or done else ledger_of(setting)

    def choose() -> Choice[int]:
        return run.trials.highest_fitting(PLAN, sizes, float, step, REFUSAL, ledger=ledger)

    choice = min(run.processes.together(PLAN, choose, patient=True), key=lambda one: (one.candidate, -one.peak))
    optimizer.zero_grad(set_to_none=True)
    run.encoder.load_state_dict(before)  # the trial moved BN's running statistics
    measured = choice.peak if choice.readings else None
    return {"batch": choice.candidate, "predicted": choice.peak, "peak": measured}


def check_smallest_clips(config: Config, machine: Machine) -> None:
    """What can be known before anything is decoded. Raises InputError for a budget that does not hold this process and
    the tensors of the stage's smallest step.
    """
    setting = Setting.of(config, 1, machine.precision.dtype.itemsize)  # with more classes a step needs more
    if setting is not None:
        ledger = partial(_ledger, setting, 1, config.full.side)
        highest_predicted(_sizes(config.pretrain.batch)[-1:], ledger, machine.budget, machine.meter.own(), REFUSAL)


def _sizes(batch: int) -> list[int]:
    """Of a step, in clips: the asked one, and halves of it."""
    sizes = [batch]
    while sizes[-1] // 2 >= LEAST_BATCH:
        sizes.append(sizes[-1] // 2)
    return sizes


def _ledger(setting: Setting, num_classes: int, side: int, clips: int) -> int:
    return pretrain_bytes(setting.encoder, num_classes, clips, side, setting.itemsize)

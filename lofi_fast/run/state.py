"""What every stage of a run shares: folder, log, device, models, frames, plans, and the position to resume from."""

from __future__ import annotations

import json
import os
import platform
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from lofi_fast import __version__
from lofi_fast.budget import gigabytes
from lofi_fast.config import STAGES, Config, memory_settings
from lofi_fast.data.dataset import Dataset, Jitter, Sample, Sampler
from lofi_fast.data.pipeline import FramePipeline, FrameRequest, pictures_of_a_run
from lofi_fast.encoder.lean import CHUNK_PIXELS
from lofi_fast.encoder.weights import load_encoder_weights
from lofi_fast.errors import InputError
from lofi_fast.head.dropout import video_dropout
from lofi_fast.head.protocol import Head
from lofi_fast.memory import allocator
from lofi_fast.memory.governor import Planner
from lofi_fast.memory.meter import Meter, is_out_of_memory
from lofi_fast.memory.trial import Choice, Reading, highest_fitting
from lofi_fast.precision import Precision
from lofi_fast.run import checkpoint, events
from lofi_fast.run.checkpoint import Position
from lofi_fast.run.folder import cache_folder
from lofi_fast.run.log import RunLog
from lofi_fast.run.networks import Networks
from lofi_fast.run.seeds import seed_of

T = TypeVar("T")
CHECKPOINT_SECONDS = 300.0  # within an epoch; each epoch's end is saved besides
PACKAGES = ("torch", "triton", "nvidia-dali-cuda130", "numpy", "av", "nvidia-ml-py")


class Run:
    """One run folder and everything in memory that its stages work on."""

    def __init__(
        self, config: Config, dataset: Dataset, device: torch.device, precision: Precision, meter: Meter,
        budget: int, log: RunLog, networks: Networks | None = None,
    ) -> None:  # fmt: skip
        self.config, self.dataset, self.device, self.precision = config, dataset, device, precision
        self.meter, self.budget, self.log = meter, budget, log
        self.folder, self.cache = Path(config.out), cache_folder(config)
        self.sampler = Sampler(dataset, config.data, config.full, config.seed)
        torch.manual_seed(seed_of(config.seed, "encoder"))
        self.networks = networks or Networks()
        self.encoder = self.networks.encoder(config)
        if config.encoder.weights:
            log.say(load_encoder_weights(self.encoder, Path(config.encoder.weights)))
        self.encoder.to(device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.head = self.new_head("joint")
        largest = max(s.cached.width * s.cached.height for samples in dataset.samples.values() for s in samples)
        self.pipeline = FramePipeline(
            pictures_of_a_run(largest, device.type), device.type, num_threads=min(os.cpu_count() or 1, 8)
        )
        self.scaler = self.new_scaler()
        self.position = Position(config.stages[0])
        self.plans: dict[str, Any] = {}
        self.planner: Planner | None = None  # of the joint stage
        self._planner_state: dict[str, Any] = {}
        self.best: dict[str, Any] = {}
        self._optimizer_state: dict[str, Any] | None = None
        self._last_saved = time.monotonic()

    def new_head(self, stage: str) -> Head:
        """A head from scratch, initialised the same on every machine."""
        torch.manual_seed(seed_of(self.config.seed, "head", stage))
        config = self.config
        head = self.networks.head(config, self.encoder.num_features, len(self.dataset.classes))
        return head.to(self.device)

    def new_scaler(self, state: dict[str, Any] | None = None) -> torch.amp.GradScaler:
        scaler = torch.amp.GradScaler(self.device.type, enabled=self.precision.scaled)
        if state:
            scaler.load_state_dict(state)
        return scaler

    # Frames

    def frames(self, batches: Iterable[Sequence[FrameRequest]]) -> Iterator[Tensor]:
        """uint8 frames (num_frames, side, side, 3) on the device for each batch, decoded ahead of their use."""
        return self.pipeline.stream(batches)

    def jitter(self, frames: Tensor, jitters: Sequence[Jitter]) -> Tensor:
        """Apply each request's pixel jitter to its share of a batch's frames, in place; uint8.

        In pieces: they are floats in between, and so stay below the maps of one chunk of the encoder.
        """
        if not self.config.data.jitter:
            return frames
        size = max(CHUNK_PIXELS // (frames.shape[1] * frames.shape[2]), 1)
        for part, jitter in zip(frames.chunk(len(jitters)), jitters, strict=True):
            gain = torch.tensor(jitter.gain, device=frames.device)
            for piece in part.split(size):
                piece.copy_(piece.float().mul_(gain).add_(255 * jitter.offset).clamp_(0, 255))
        return frames

    def dropout(self, features_BCL: Tensor, samples: Sequence[Sample], stage: str, epoch: int) -> Tensor:
        """The head's dropout, a function of (seed, stage, epoch, window): a step tried again, resumed, or taken in
        parts draws the same.
        """
        seeds = [seed_of(self.config.seed, "dropout", stage, epoch, sample.index) for sample in samples]
        return video_dropout(features_BCL, self.config.head.dropout, seeds)

    # Plans

    def measure(self, step: Callable[[], None], limit: int) -> int | None:
        """Peak bytes of `step` run under a cap of `limit`, or None when it ran out of memory."""
        self.meter.release()
        self.meter.reset_peak()
        failed = False
        with self.meter.settle("a trial step"), self.meter.cap(limit):
            try:
                step()
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                failed = True  # the traceback holds tensors: leave the except block before going on
        peak = self.meter.peak()
        return None if failed else peak

    def plan(
        self, name: str, candidates: Sequence[T], cost: Callable[[T], float], step: Callable[[T], None], refusal: str
    ) -> Choice[T]:
        """The highest candidate whose step, run for real, fits the budget; logged with all that was measured."""
        began = time.monotonic()
        limit = min(self.budget, self.meter.available())
        if (own := self.meter.own()) >= limit:
            raise InputError(
                f"nothing fits: before its first step this process holds {gigabytes(own)} of a budget of "
                f"{gigabytes(limit)}; {refusal}"
            )
        caps = iter((self.meter.available(),))  # the first and lowest runs freely: a refusal can then say its need

        def measure(candidate: T) -> int | None:
            peak = self.measure(lambda: step(candidate), next(caps, limit))
            self.log.event(events.Measured(plan=name, candidate=str(candidate), peak=peak, budget=limit))
            return peak

        choice = highest_fitting(candidates, cost, measure, limit, own, refusal)
        others = "".join(f", {_reading(r)}" for r in choice.readings if r.candidate != choice.candidate)
        self.log.say(
            f"plan {name}: {choice.candidate}, peak {gigabytes(choice.peak)} of {gigabytes(limit)}"
            f"{f' (also measured{others[1:]})' if others else ''}"
        )
        self.log.event(
            events.Planned(
                plan=name, chosen=str(choice.candidate), peak=choice.peak, budget=limit,
                seconds=round(time.monotonic() - began, 3),
            )
        )  # fmt: skip
        return choice

    def memory_key(self) -> dict[str, Any]:
        """What readings of memory depend on beside the plan: another run with the same may start from them."""
        return {
            "device": self.meter.device,
            "torch": torch.__version__,
            "lofi_fast": __version__,
            "precision": str(self.precision),
            "threads": torch.get_num_threads(),
            "allocator": [os.environ.get("GLIBC_TUNABLES", ""), allocator.installed()],
            "classes": len(self.dataset.classes),
            "settings": memory_settings(self.config),
        }

    def say_faults(self) -> None:
        """Tell what went wrong with the meter's readings since the last call; each kind is told once."""
        for fault in self.meter.faults():
            self.log.say(f"memory readings: {fault}")

    def write_plans(self) -> None:
        self.write_json("plan.json", {"budget": self.budget, "plans": self.plans})

    # Folder

    def write_json(self, name: str, content: object) -> Path:
        """Atomic: a temporary name, then renamed."""
        path = self.folder / name
        partial = path.with_name(path.name + ".partial")
        try:
            partial.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
            partial.replace(path)
        except OSError as error:
            partial.unlink(missing_ok=True)
            raise InputError(f"{path}: cannot write ({error.strerror}); free some space or change --out") from error
        return path

    # Position, checkpoints

    def ahead(self, stage: str) -> bool:
        """Whether `stage` was asked for and is not done yet."""
        return stage in self.config.stages and STAGES.index(stage) >= STAGES.index(self.position.stage)

    def due(self, stage: str) -> Position | None:
        """Where to start `stage`, or None when it was not asked for or is already done."""
        if not self.ahead(stage):
            return None
        if self.position.stage != stage:
            self.position = Position(stage)
            self._optimizer_state = None  # it belongs to the stage that was under way
        return self.position

    def finish(self, stage: str) -> None:
        """Move on to the next stage asked for and save."""
        later = [name for name in self.config.stages if STAGES.index(name) > STAGES.index(stage)]
        if later:
            self.save(Position(later[0]), None)

    def planner_state(self) -> dict[str, Any]:
        """The resumed state of the joint stage's planner; empty when it has to begin anew."""
        return self._planner_state if "joint" in self.plans else {}

    def optimizer_state(self) -> dict[str, Any] | None:
        """The resumed optimiser state, once: for the stage that was under way."""
        state, self._optimizer_state = self._optimizer_state, None
        return state

    def save(self, position: Position, optimizer: torch.optim.Optimizer | None, **modules: nn.Module) -> None:
        """Write checkpoints/last.pt; `position` is the next step to do."""
        self.position = position
        content = self._weights() | {
            "position": asdict(position),
            "optimizer": None if optimizer is None else optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "rng": checkpoint.rng_state(),
            "plans": self.plans,
            "planner": self._planner_state if self.planner is None else self.planner.state_dict(),
            "best": self.best,
            "extra": {name: module.state_dict() for name, module in modules.items()},
        }
        checkpoint.save_atomic(content, self.folder / "checkpoints" / "last.pt")
        self._last_saved = time.monotonic()

    def save_when_due(self, position: Position, optimizer: torch.optim.Optimizer, **modules: nn.Module) -> None:
        if time.monotonic() - self._last_saved > CHECKPOINT_SECONDS:
            self.save(position, optimizer, **modules)

    def save_best(self, epoch: int, average: float) -> None:
        """Keep the weights as checkpoints/best.pt when `average` beats what was seen so far."""
        if average > self.best.get("average", -1.0):
            self.best = {"epoch": epoch, "average": average}
            path = self.folder / "checkpoints" / "best.pt"
            checkpoint.save_atomic(self._weights() | {"position": {}, "best": self.best}, path)

    def _weights(self) -> dict[str, Any]:
        return {
            "version": __version__,
            "config": self.config.to_json(),
            "classes": list(self.dataset.classes),
            "encoder": self.encoder.state_dict(),
            "head": self.head.state_dict(),
        }

    def resume(self) -> dict[str, Any]:
        """Restore checkpoints/last.pt; returns the state of modules that only one stage has."""
        path = self.folder / "checkpoints" / "last.pt"
        content = checkpoint.load(path)
        if missing := {"classes", "head", "plans", "best", "optimizer", "scaler", "rng", "extra"} - content.keys():
            raise InputError(
                f"{path}: not a checkpoint that a run can go on from (no {min(missing)}); name another --out"
            )
        if content["classes"] != list(self.dataset.classes):
            raise InputError(f"{path}: trained on other classes than --annotations has; use the run's own annotations")
        try:
            self.encoder.load_state_dict(content["encoder"])
            self.head.load_state_dict(content["head"])
        except RuntimeError:
            raise InputError(f"{path}: another model; resume with the run's own flags") from None
        self.position = Position(**content["position"])
        self.plans, self.best = content["plans"], content["best"]
        self._planner_state = content.get("planner", {})
        self._optimizer_state = content["optimizer"]
        self.scaler.load_state_dict(content["scaler"])
        checkpoint.restore_rng(content["rng"])
        extra: dict[str, Any] = content["extra"]
        return extra


def _reading(reading: Reading[Any]) -> str:
    return f"{reading.candidate}: {'out of memory' if reading.peak is None else gigabytes(reading.peak)}"


def environment(device: str, precision: Precision, kernels: str) -> dict[str, Any]:
    """environment.json: machine, versions, and which form of each kernel runs."""
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = "not installed"
    return {
        "lofi_fast": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "device": device,
        "threads": torch.get_num_threads(),
        "precision": str(precision),
        "kernels": kernels,
        "packages": versions,
    }

"""What the stages of a training share: where it runs, its data and networks, and the position to resume from.

A `Run` is a record: `open_run` builds the parts as the main job wants them, and other parts can stand in their place
(bench/synthetic.py has frames that are made up and saves nothing).
"""

from __future__ import annotations

import os
import platform
import shlex
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lofi_fast import __version__, files
from lofi_fast.budget import gigabytes
from lofi_fast.config import STAGES, Config, memory_settings
from lofi_fast.data.dataset import Dataset, Sampler
from lofi_fast.data.inventory import cache_folder
from lofi_fast.data.pipeline import FramePipeline, pictures_of_a_run
from lofi_fast.encoder.protocol import Encoder
from lofi_fast.encoder.weights import load_encoder_weights
from lofi_fast.errors import InputError
from lofi_fast.gpu import DALI
from lofi_fast.head.protocol import Head
from lofi_fast.memory import allocator
from lofi_fast.memory.decision import Planner
from lofi_fast.memory.meter import Meter
from lofi_fast.memory.ranks import LostProcess, SharedGauge
from lofi_fast.memory.step_bytes import Setting
from lofi_fast.memory.trial import Choice, Reading, Trials
from lofi_fast.precision import Precision
from lofi_fast.run import checkpoint, events, trained_on
from lofi_fast.run.checkpoint import Position
from lofi_fast.run.folder import take_lock
from lofi_fast.run.log import RunLog, SilentLog
from lofi_fast.run.networks import Networks
from lofi_fast.run.processes import ALONE, Processes
from lofi_fast.run.seeds import seed_of

CHECKPOINT_SECONDS = 300.0  # between two checkpoints within an epoch; the end of each epoch is saved besides
LOCK_SECONDS = 2.0  # that the system may take to let a killed process go
PACKAGES = ("torch", "triton", *DALI.values(), "numpy", "av", "nvidia-ml-py")


@dataclass(frozen=True)
class Machine:
    """Where a run computes, and with how much memory."""

    device: torch.device
    precision: Precision
    meter: Meter
    budget: int  # bytes

    def autocast(self) -> AbstractContextManager[None]:
        return self.precision.autocast(self.device)

    def new_scaler(self, state: dict[str, Any] | None = None) -> torch.amp.GradScaler:
        """A scaler of gradients, which does nothing where the precision needs none."""
        scaler = torch.amp.GradScaler(self.device.type, enabled=self.precision.scaled)
        if state:
            scaler.load_state_dict(state)
        return scaler


@dataclass
class Run:
    """What the stages of a training share."""

    config: Config
    dataset: Dataset
    machine: Machine
    pipeline: FramePipeline
    log: RunLog
    encoder: Encoder
    networks: Networks = field(default_factory=Networks)
    saves: bool = True  # whether checkpoints are written
    stop: Callable[[], bool] = lambda: False  # whether this process was told to stop
    processes: Processes = ALONE  # that train together; the first of them saves and writes

    stopped: bool = field(init=False, default=False)
    position: Position = field(init=False)
    plans: dict[str, Any] = field(init=False, default_factory=dict)  # of each stage, as plan.json has them
    planner: Planner | None = field(init=False, default=None)  # of the joint stage
    best: dict[str, Any] = field(init=False, default_factory=dict)  # epoch of the head with the highest mAP, and that
    head_epochs: int = field(init=False, default=0)  # that the head stage has trained for; 0 where it was left out

    def __post_init__(self) -> None:
        self.folder, self.cache = Path(self.config.out), cache_folder(self.config)
        self._identity = identity(self.folder) if self.folder.is_dir() else None
        self.sampler = Sampler(self.dataset, self.config.data, self.config.full, self.config.seed)
        self.head = self.new_head("joint")
        self.scaler = self.machine.new_scaler()
        self.position = Position(self.config.stages[0])
        self.data = trained_on.record_of(self.dataset, self.config)  # what the weights come from
        self.resumed_count: int | None = None  # of the processes that wrote the checkpoint
        self.shared_gauge = self._new_gauge() if self.processes.several else None
        self._resumed_planner: dict[str, Any] = {}
        self._resumed_optimizer: dict[str, Any] | None = None
        self._last_saved = time.monotonic()

    def new_head(self, stage: str) -> Head:
        """A head from scratch, initialised the same on every machine."""
        torch.manual_seed(seed_of(self.config.seed, "head", stage))
        head = self.networks.head(self.config, self.encoder.num_features, len(self.dataset.classes))
        return head.to(self.machine.device)

    # Several processes

    def told_to_stop(self) -> bool:
        """Whether any process was told to: asked after every step; once true, the run saves and trains no more. Where
        one is lost, which the next step will tell, this one's own answer.
        """
        try:
            return self.processes.any("stop", self.stop())
        except LostProcess:
            return self.stop()

    def take_over(self) -> None:
        """Save from now on where another process did so and has ended, which shows by its lock on the run folder."""
        if not self.saves and isinstance(self.log, SilentLog) and take_lock(self.folder, LOCK_SECONDS):
            last, path = self.log.last_step, self.folder / "log.jsonl"
            self.saves, self.log = True, RunLog(path)
            with path.open(encoding="utf-8", errors="replace") as lines:
                steps = [(e.stage, e.epoch, e.step) for e in events.read(lines) if isinstance(e, events.Step)]
            if last is not None and (last.stage, last.epoch, last.step) not in steps[-1:]:
                self.log.event(last)
            self.log.say(f"process 0 has ended: process {self.processes.rank} saves in its place")

    def _new_gauge(self) -> SharedGauge:
        sharers = 1 if self.machine.device.type == "cuda" else self.processes.local_count
        return SharedGauge(self.machine.meter, lambda: self.pipeline.pending, sharers)

    # Plans

    def setting(self) -> Setting | None:
        """For ledgers; None for networks that are not the settings' own, and for those without a ledger."""
        if not self.networks.named:
            return None
        return Setting.of(self.config, len(self.dataset.classes), self.machine.precision.dtype.itemsize)

    @property
    def trials(self) -> Trials:
        """For planning by running steps; what is measured and chosen is logged."""
        return Trials(self.machine.meter, self.machine.budget, self._log_reading, self._log_choice)

    def _log_reading(self, plan: str, candidate: object, peak: int | None, limit: int) -> None:
        self.log.event(events.Measured(plan=plan, candidate=str(candidate), peak=peak, budget=limit))

    def _log_choice(self, plan: str, choice: Choice[Any], limit: int, seconds: float) -> None:
        others = "".join(f", {_reading(r)}" for r in choice.readings if r.candidate != choice.candidate)
        self.log.say(
            f"plan {plan}: {choice.candidate}, peak {'' if choice.readings else 'at most '}{gigabytes(choice.peak)} of "
            f"{gigabytes(limit)}"
            f"{f' (also measured{others[1:]})' if others else ''}"
        )
        self.log.event(
            events.Planned(
                plan=plan,
                chosen=str(choice.candidate),
                peak=choice.peak,
                budget=limit,
                seconds=round(seconds, 3),
                measured=bool(choice.readings),
            )
        )

    def memory_key(self) -> dict[str, Any]:
        """What readings of memory depend on beside the plan: another run with the same may start from them."""
        return {
            "device": self.machine.meter.device,
            "torch": str(torch.__version__),  # which is a class of its own
            "lofi_fast": __version__,
            "precision": str(self.machine.precision),
            "threads": torch.get_num_threads(),
            "allocator": [os.environ.get("GLIBC_TUNABLES", ""), allocator.installed()],
            "networks": [type(self.encoder).__qualname__, type(self.head).__qualname__],
            "classes": len(self.dataset.classes),
            "settings": memory_settings(self.config),
        }

    def say_faults(self) -> None:
        """Tell what went wrong with the meter's readings since the last call; each kind is told once."""
        for fault in self.machine.meter.faults():
            self.log.say(f"memory readings: {fault}")

    def write_plans(self) -> None:
        self.write_json("plan.json", {"budget": self.machine.budget, "plans": self.plans})

    # Folder

    def write_json(self, name: str, content: object) -> Path:
        """Write a file of the run folder. Raises InputError when it cannot be written."""
        self.require_folder()
        return files.write_json(self.folder / name, content) if self.processes.first else self.folder / name

    def require_folder(self) -> None:
        """Raises InputError where the run folder was moved or removed while the run trains: what is written to its name
        would make another folder with a part of the run, or be written into that of another run.
        """
        if self.saves and self._moved():
            place = self.log.place()
            now = "it was removed"
            if place is not None:
                now = f"it is {place} now: go on with --resume {shlex.quote(str(place))}"
            raise InputError(f"{self.folder}: the run folder has gone while it was trained in; {now}")

    def _moved(self) -> bool:
        if self.log.in_place():  # an open file stays the same one, also on disks that number files anew
            return False
        return not self.folder.is_dir() or self._identity not in (None, identity(self.folder))

    # Position

    def ahead(self, stage: str) -> bool:
        """Whether `stage` was asked for and is not done yet; none is once the run was told to stop."""
        return (
            not self.stopped
            and stage in self.config.stages
            and STAGES.index(stage) >= STAGES.index(self.position.stage)
        )

    def due(self, stage: str) -> Position | None:
        """Where to start `stage`, or None when it was not asked for or is already done."""
        if not self.ahead(stage):
            return None
        if self.position.stage != stage:
            self.position = Position(stage)
            self._resumed_optimizer = None  # it belongs to the stage that was under way
        return self.position

    def finish(self, stage: str, optimizer: torch.optim.Optimizer, **modules: nn.Module) -> None:
        """Move on to the next stage asked for and save; with the optimiser and the stage's own modules where a resumed
        run may train longer.
        """
        later = [name for name in self.config.stages if STAGES.index(name) > STAGES.index(stage)]
        if (stage, *later[:1]) == ("head", "eval"):
            self.save(Position("eval"), optimizer, **modules)
        elif later:
            self.save(Position(later[0]), None)

    def planner_state(self) -> dict[str, Any]:
        """The resumed state of the joint stage's planner; empty when it has to begin anew."""
        return self._resumed_planner if "joint" in self.plans else {}

    def optimizer_state(self) -> dict[str, Any] | None:
        """The resumed state of the optimiser, once: for the stage that was under way."""
        state, self._resumed_optimizer = self._resumed_optimizer, None
        return state

    # Checkpoints

    @property
    def last_checkpoint(self) -> Path:
        return self.folder / "checkpoints" / checkpoint.LAST

    def save(self, position: Position, optimizer: torch.optim.Optimizer | None, **modules: nn.Module) -> None:
        """Write checkpoints/last.pt, and keep the one before; `position` is the next step to do, `modules` are those of
        one stage alone.

        Raises InputError when the weights are not finite: the checkpoint before stays.
        """
        self.position = position
        if not self.saves:
            return
        content = self._weights() | {
            "position": asdict(position),
            "optimizer": None if optimizer is None else optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "rng": checkpoint.rng_state(),
            "plans": self.plans,
            "data": trained_on.digest(self.data),
            "planner": self._resumed_planner if self.planner is None else self.planner.state_dict(),
            "best": self.best,
            "processes": self.processes.count,
            "extra": {name: module.state_dict() for name, module in modules.items()},
        }
        if broken := checkpoint.not_finite(content):
            raise InputError(
                f"{self.last_checkpoint}: not saved, since the weights are not finite any more ({broken}): the "
                f"training has diverged; {self.last_good()}; start again with a lower --pretrain-lr, --joint-lr or "
                "--head-lr and another --out"
            )
        if self._moved() and (place := self.log.place()) is not None:
            last = place / self.last_checkpoint.relative_to(self.folder)
            checkpoint.save_atomic(content, last, last.with_name(checkpoint.BEFORE))
        self.require_folder()
        checkpoint.save_atomic(content, self.last_checkpoint, self.last_checkpoint.with_name(checkpoint.BEFORE))
        self.log.event(events.Saved(stage=position.stage, epoch=position.epoch, step=position.step))
        self._last_saved = time.monotonic()

    def save_when_due(self, position: Position, optimizer: torch.optim.Optimizer, **modules: nn.Module) -> None:
        """Save within an epoch, when the last checkpoint is `CHECKPOINT_SECONDS` old."""
        if time.monotonic() - self._last_saved > CHECKPOINT_SECONDS:
            self.save(position, optimizer, **modules)

    def last_good(self) -> str:
        """In words: the checkpoint that a run which has diverged left, and where it stands."""
        if not self.last_checkpoint.exists():
            return "no checkpoint was saved before"
        content, path, _ = checkpoint.load_newest(self.last_checkpoint.parent)
        at = Position(**content["position"])
        return f"the last good checkpoint is {path} (before stage {at.stage}, epoch {at.epoch + 1}, step {at.step + 1})"

    def save_best(self, epoch: int, average: float) -> None:
        """Keep the weights as checkpoints/best.pt when `average` beats what was seen so far."""
        if average > self.best.get("average", -1.0):
            self.best = {"epoch": epoch, "average": average}
            if self.saves:
                self.require_folder()
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
        """Restore the last checkpoint that can be read; returns the state of modules that only one stage has."""
        content, path, reason = checkpoint.load_newest(self.last_checkpoint.parent)
        if reason:
            self.log.say(f"note: {reason}: going on from the checkpoint before it, {path}")
        if missing := {"data", "head", "plans", "best", "optimizer", "scaler", "rng", "extra"} - content.keys():
            raise InputError(
                f"{path}: not a checkpoint that a run can go on from (no {min(missing)}); name another --out"
            )
        if broken := checkpoint.not_finite(content):
            raise InputError(f"{path}: its weights are not finite ({broken}); start again with another --out")
        before = Config.from_json(content["config"], str(path))
        position = self._position_of(content, before)
        self._check_data(content, position)
        try:
            self.encoder.load_state_dict(content["encoder"])
            self.head.load_state_dict(content["head"])
        except RuntimeError:
            raise InputError(f"{path}: another model; resume with the run's own flags") from None
        self.position = position
        self.plans, self.best = content["plans"], content["best"]
        if position.stage == "eval" and "head" in before.stages:
            self.head_epochs = before.head_stage.epochs
        if self.best and measures(before) != measures(self.config):
            self.log.say(
                f"note: the best epoch so far was the best at {measures(before)}, not at {measures(self.config)}, and "
                "does not count any more"
            )
            self.best = {}
        self._resumed_planner = content.get("planner", {})
        self._resumed_optimizer = content["optimizer"]
        self.scaler.load_state_dict(content["scaler"])
        checkpoint.restore_rng(content["rng"])
        self.resumed_count = content.get("processes", 1)
        self.processes.together("resumed", lambda: None, patient=True)  # all have read
        if reason and self.processes.first:  # what cannot be read must not be kept as the one before
            path.replace(self.last_checkpoint)
        extra: dict[str, Any] = content["extra"]
        return extra

    def _position_of(self, content: dict[str, Any], before: Config) -> Position:
        """Where to go on from a checkpoint, which was saved under the settings `before`."""
        position = Position(**content["position"])
        longer = "head" in self.config.stages and self.config.head_stage.epochs > before.head_stage.epochs
        if position == Position("eval") and content["optimizer"] is not None and longer:
            return Position("head", before.head_stage.epochs)
        return position

    def _check_data(self, content: dict[str, Any], position: Position) -> None:
        """Raises InputError when what is to be trained on is not what it was; where only the evaluation is left, files
        may be others: features of videos are made anew, and scores are used only there.
        """
        if content["data"] == trained_on.digest(self.data):
            return
        before = trained_on.read_record(self.folder / trained_on.RECORD, content["data"])
        if before is None:
            what = f"and {trained_on.RECORD}, which could tell how, cannot be read"
        else:
            changes = trained_on.changes_between(before, self.data)
            same_classes = content["classes"] == list(self.dataset.classes)
            if position.stage == "eval" and same_classes and not changes.labels:
                self.log.say(f"note: since the run was trained, {'; '.join(changes.files)}")
                self.data = before
                return
            what = "; ".join((*changes.labels, *changes.files))
        raise InputError(
            f"{self.folder}: its data is not what it was started with, {what}; put it back as it was, or train "
            "another run in another --out (evaluate compares predictions.json with other labels)"
        )


def identity(folder: Path) -> tuple[int, int]:
    """What tells a folder from others, whatever its name is."""
    status = folder.stat()
    return status.st_dev, status.st_ino


def measures(config: Config) -> str:
    """What average mAP is an average over, as flags say it."""
    return f"--tolerance {config.detect.tolerances}" if config.points else f"--tiou {config.detect.tious}"


def open_run(
    config: Config,
    dataset: Dataset,
    machine: Machine,
    log: RunLog,
    networks: Networks | None = None,
    processes: Processes = ALONE,
) -> Run:
    """The run of a training on videos: networks on the device, frames out of the cache.

    `networks` None: those that the settings name; others have no ledger, and their memory is planned by running steps.
    Raises InputError for weights, or levers, that do not go with the encoder.
    """
    networks = networks or Networks()
    torch.manual_seed(seed_of(config.seed, "encoder"))
    encoder = networks.encoder(config)
    if config.kept_maps == "8bit" and not encoder.eight_bit:
        raise InputError(f"--kept-maps 8bit: {encoder.name} cannot keep its activations in 8 bits; use exact")
    if config.encoder.weights:
        log.say(load_encoder_weights(encoder, Path(config.encoder.weights)))
    encoder.place(machine.device)
    largest = max(s.cached.width * s.cached.height for samples in dataset.samples.values() for s in samples)
    device = machine.device.type
    with machine.meter.settle("the frame pipeline"):
        pipeline = FramePipeline(pictures_of_a_run(largest, device), device, num_threads=min(os.cpu_count() or 1, 8))
    return Run(
        config, dataset, machine, pipeline, log, encoder, networks, saves=processes.first, processes=processes
    )  # fmt: skip


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

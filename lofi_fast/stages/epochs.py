"""The one loop over epochs and steps: learning rate, progress, log, checkpoints, and the guard against divergence.

Pretrain, joint and head are each a `TrainingStage`: they say what a step is, and `train` runs them.
"""

from __future__ import annotations

import math
import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lofi_fast.config import StageConfig
from lofi_fast.errors import InputError
from lofi_fast.head.protocol import total
from lofi_fast.memory.ranks import LostProcess
from lofi_fast.optim import learning_rate, make_optimizer, set_learning_rate
from lofi_fast.run import events
from lofi_fast.run.checkpoint import Position
from lofi_fast.run.log import OutputLost
from lofi_fast.run.state import Run

NOT_FINITE_STEPS = 5  # in a row, after which a stage is given up
LEAST_SCALE = 1.0  # of the gradient scaler: infinite gradients are its own business as long as it is larger


@dataclass(frozen=True)
class Outcome:
    """One optimiser step."""

    loss: float
    videos: Sequence[str]
    not_finite: str  # "loss" or "gradient", and then nothing was updated; empty otherwise
    note: str  # for the progress bar
    logged: Mapping[str, Any] = field(default_factory=dict)  # further fields of its event


class TrainingStage(Protocol):
    """What differs between the stages."""

    name: str
    lr_flag: str  # that lowers the learning rate
    optimizer: Optimizer
    modules: dict[str, nn.Module]  # of the stage alone, beside encoder and head

    def begin(self, epoch: int, first: int) -> int:
        """Make ready for the steps of an epoch from the `first` on. Returns how many the whole epoch has."""

    def step(self, epoch: int, step: int) -> Outcome:
        """One optimiser step; they come in order. Buffers are as before where it raises InputError."""

    def end(self, epoch: int) -> None:
        """After the last step of an epoch, before it is saved: validate, log."""


def new_optimizer(run: Run, config: StageConfig, *modules: nn.Module) -> Optimizer:
    """An optimiser of the modules' parameters, as the settings of a stage want it."""
    parameters = [parameter for module in modules for parameter in module.parameters()]
    return make_optimizer(config, parameters, run.config.optimizer_impl)


def optimizer_of(run: Run, config: StageConfig, *modules: nn.Module) -> Optimizer:
    """The same, with the state that a resumed run left."""
    optimizer = new_optimizer(run, config, *modules)
    if state := run.optimizer_state():
        optimizer.load_state_dict(state)
    return optimizer


def train(run: Run, stage: TrainingStage, config: StageConfig) -> None:
    """Run a stage from the run's position to its end, or until the run is told to stop.

    Raises InputError when loss or gradients were not finite for `NOT_FINITE_STEPS` steps in a row, and when a step
    cannot be taken, by lack of memory for one: the run is saved as it was before that step, if it still is.
    """
    start, in_a_row = run.position, 0
    learning = [run.encoder, run.head, *stage.modules.values()]
    parameters = [value for module in learning for value in module.parameters()]
    for epoch in range(start.epoch, config.epochs):
        first = start.step if epoch == start.epoch else 0
        count = stage.begin(epoch, first)
        with run.log.progress(f"{stage.name} {epoch + 1}/{config.epochs}", count, first) as advance:
            for step in range(first, count):
                lr = learning_rate(config, epoch, step, count)
                set_learning_rate(stage.optimizer, lr)
                versions = [value._version for value in parameters]  # torch counts what changes a tensor in place
                waited = run.pipeline.waited
                try:
                    done = stage.step(epoch, step)
                except (InputError, BrokenPipeError) as error:
                    if versions != [value._version for value in parameters]:
                        raise
                    if isinstance(error, LostProcess):
                        run.take_over()
                    with suppress(OutputLost):  # of the log, after the checkpoint
                        run.save(Position(stage.name, epoch, step), stage.optimizer, **stage.modules)
                    if isinstance(error, BrokenPipeError):
                        raise
                    if run.told_to_stop():
                        run.stopped = True
                        return
                    raise InputError(
                        f"{error}; all up to here is saved: go on with --resume {shlex.quote(str(run.folder))}"
                    ) from error
                at: dict[str, Any] = {"stage": stage.name, "epoch": epoch, "step": step}
                waited = round(run.pipeline.waited - waited, 4)
                seen: dict[str, Any] = {"steps": count, "samples": len(done.videos), "waited": waited}
                after = Position(stage.name, epoch, step + 1)
                in_a_row = in_a_row + 1 if done.not_finite else 0
                with saved_where_unheard(run, stage, after):
                    run.log.event(events.Step(**at, loss=done.loss, lr=lr, **seen, **done.logged))
                    if done.not_finite:
                        run.log.event(
                            events.NotFinite(**at, what=done.not_finite, videos=list(done.videos), in_a_row=in_a_row)
                        )
                if in_a_row == NOT_FINITE_STEPS:
                    raise InputError(_diverged(run, stage, done))
                with saved_where_unheard(run, stage, after):
                    advance(step + 1, done.note)
                if run.told_to_stop():
                    run.stopped = True
                    return run.save(after, stage.optimizer, **stage.modules)
                run.save_when_due(after, stage.optimizer, **stage.modules)
        with saved_where_unheard(run, stage, Position(stage.name, epoch, count)):
            stage.end(epoch)
        run.save(Position(stage.name, epoch + 1), stage.optimizer, **stage.modules)
    run.finish(stage.name, stage.optimizer, **stage.modules)


@contextmanager
def saved_where_unheard(run: Run, stage: TrainingStage, at: Position) -> Iterator[None]:
    """Where what is said in this block reaches nobody, by a pipe that has ended or a full disk, the run ends, and all
    that was trained is saved, as far as there is room for it.
    """
    try:
        yield
    except (BrokenPipeError, OutputLost) as error:
        with suppress(OutputLost):  # of the log, which cannot tell that it was saved
            run.save(at, stage.optimizer, **stage.modules)
        if isinstance(error, BrokenPipeError):
            raise
        raise OutputLost(
            f"{error}; all up to here is saved: go on with --resume {shlex.quote(str(run.folder))}"
        ) from None


def _diverged(run: Run, stage: TrainingStage, done: Outcome) -> str:
    return (
        f"{stage.name}: the {done.not_finite} was not finite in {NOT_FINITE_STEPS} steps in a row, the last with "
        f"{', '.join(done.videos[:2])}: the training has diverged; {run.last_good()}; start again with a lower "
        f"{stage.lr_flag} and another --out"
    )


def numbers(parts: Sequence[Mapping[str, Tensor]]) -> tuple[float, dict[str, float]]:
    """(loss, its terms by name) of a batch, from the terms of its parts. Synchronises with the device."""
    terms = {name: torch.stack([part[name].detach() for part in parts]).sum(0) for name in parts[0]}
    return float(total(terms)), {name: float(term) for name, term in terms.items()}


def gradients_of_all(
    run: Run, optimizer: Optimizer, work: Callable[[], tuple[float, dict[str, float]]]
) -> tuple[float, dict[str, float]]:
    """Of a step's whole batch: (loss, its terms), and the gradients in every process. `work` adds the gradients of this
    process's share to the parameters', of a loss that is divided by counts of the whole batch, and gives that part of
    the loss. When it raises in one process, it raises in all.
    """
    if not run.processes.several:
        return work()
    parameters = [p for group in optimizer.param_groups for p in group["params"]]

    buckets: list[Tensor] = []

    def share() -> tuple[float, dict[str, float]]:
        done = work()
        buckets.append(run.processes.new_bucket(parameters, run.machine.device))
        return done

    parts = run.processes.together("loss", share)
    run.processes.add_gradients(parameters, *buckets)
    names = next((terms for _, terms in parts if terms), {})
    return sum(loss for loss, _ in parts), {name: sum(terms.get(name, 0.0) for _, terms in parts) for name in names}


def update(run: Run, optimizer: Optimizer, loss: float, clip: float | None) -> str:
    """Apply the gradients, scaled down to a norm of `clip` where theirs is larger, unless the loss or one of them is
    not finite: then nothing changes, and it is named.

    Under fp16 the scaler skips steps whose scaled gradients overflow, and lowers its scale. That is named only once the
    scale is so low that it cannot be the reason.
    """
    if not math.isfinite(loss):
        return "loss"
    scaler = run.scaler
    if not scaler.is_enabled():
        if not _finite_gradients(optimizer):
            return "gradient"
        _clip(optimizer, clip)
        optimizer.step()
        return ""
    scale = scaler.get_scale()
    if clip is not None:
        scaler.unscale_(optimizer)
        _clip(optimizer, clip)
    scaler.step(optimizer)
    scaler.update()
    return "gradient" if scaler.get_scale() < scale <= LEAST_SCALE else ""


def _clip(optimizer: Optimizer, clip: float | None) -> None:
    if clip is not None:
        torch.nn.utils.clip_grad_norm_([p for group in optimizer.param_groups for p in group["params"]], clip)


def _finite_gradients(optimizer: Optimizer) -> bool:
    """Largest magnitudes are enough to tell; a sum of squares can overflow where all gradients are finite."""
    gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    if not gradients:
        return True
    largest = torch._foreach_norm(gradients, ord=math.inf)
    return bool(torch.stack([value.float() for value in largest]).isfinite().all())

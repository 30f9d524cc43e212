"""What a run logs, as curves for TensorBoard: `tensorboard/` in the run folder, one of its runs for each stage.

Steps count through a stage. A run that goes on from a checkpoint takes the place of what came after it.
"""

from __future__ import annotations

import importlib
import math
from pathlib import Path
from typing import TYPE_CHECKING

from lofi_fast.errors import InputError
from lofi_fast.run import events

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

FOLDER = "tensorboard"
FLUSH_SECONDS = 10


def require_tensorboard() -> None:
    """Imports it, so that what it holds counts from the first reading of memory on. Raises InputError without it."""
    try:
        importlib.import_module("torch.utils.tensorboard")
    except ImportError as error:
        reason = " ".join(str(error).split())
        raise InputError(
            f'--tensorboard needs the package tensorboard ({reason}): pip install "lofi_fast[tensorboard]"'
        ) from None


class Board:
    """Writes the events of a run below `folder`. A writer's own thread brings them to the disk."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._writers: dict[str, SummaryWriter] = {}
        self._last = 0  # step of the stage under way

    def event(self, event: events.Event) -> None:
        match event:
            case events.Step():
                self._last = event.epoch * event.steps + event.step
                self._write(event.stage, scalars(event))
            case events.Validation():
                self._write(event.stage, {"mAP": event.average})
            case events.Metrics():
                self._last = 0
                by_tiou = {f"mAP at {tiou}": value for tiou, value in event.map_by_tiou.items()}
                self._write("eval", {"average mAP": event.average_map, **by_tiou})

    def close(self) -> None:
        for writer in self._writers.values():
            writer.close()
        self._writers = {}

    def _write(self, stage: str, values: dict[str, events.Number]) -> None:
        """Write the finite ones of named numbers at the step under way."""
        if stage not in self._writers:
            from torch.utils.tensorboard import SummaryWriter

            self._writers[stage] = SummaryWriter(
                str(self._folder / stage), purge_step=self._last, flush_secs=FLUSH_SECONDS
            )
        for name, value in values.items():
            if value is not None and math.isfinite(value):
                self._writers[stage].add_scalar(f"{stage}/{name}", value, self._last)


def scalars(step: events.Step) -> dict[str, events.Number]:
    """The numbers of a step by name; memory in GB."""
    values: dict[str, events.Number] = {"loss": step.loss, "learning rate": step.lr, "accuracy": step.accuracy}
    values |= {f"loss/{name}": value for name, value in step.terms.items()}
    if step.stage != "head":
        values["seconds waiting for frames"] = step.waited
    if step.num_snippets:
        values |= {"rung/snippets": step.num_snippets, "rung/side": step.side}
        memory = {"peak": step.peak, "predicted": step.predicted, "budget": step.budget}
        values |= {f"memory, GB/{name}": amount / 1e9 for name, amount in memory.items() if amount}
    return values

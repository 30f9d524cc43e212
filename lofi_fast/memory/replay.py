"""Replay: the plans of another run, step by step, in place of a governor."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import msgspec

from lofi_fast.budget import gigabytes
from lofi_fast.errors import InputError
from lofi_fast.fidelity import Pattern
from lofi_fast.memory.decision import Decision, NothingFits
from lofi_fast.memory.plans import Plan


class RecordedStep(msgspec.Struct, frozen=True):
    """What a replay needs of one step: fields of a log's `events.Step`, or of a list that was written by hand."""

    epoch: Annotated[int, msgspec.Meta(ge=0)]
    step: Annotated[int, msgspec.Meta(ge=0)]
    num_snippets: int
    side: int
    micro_batch: int
    recompute: bool = False
    chunk: int = 0  # not recorded: as many snippets to a graph as the encoder takes by itself
    reduced_from: list[int] | None = None  # [num_snippets, side]

    def plans(self) -> tuple[Plan, Plan]:
        """(plan that was run, plan whose frames were decoded). Raises ValueError for what is no plan."""
        plan = Plan.from_json([self.num_snippets, self.side, self.micro_batch, int(self.recompute), self.chunk])
        if self.reduced_from is None:
            return plan, plan
        return plan, Plan.from_json([*self.reduced_from, plan.micro_batch, int(plan.recompute), plan.chunk])


class Replay:
    """Takes the plans of another run from its log.jsonl, or from a JSON list of "step" events.

    It works on any machine, because nothing is measured; memory that runs out ends the run. `limit`: bytes of the cap.
    """

    def __init__(self, path: Path, limit: int) -> None:
        self._path, self._limit = path, limit
        self._steps: dict[tuple[int, int], tuple[Plan, Plan]] = {}  # (plan, requested)
        try:
            for event in _events(path.read_text(encoding="utf-8")):
                if event.get("event", "step") == "step" and event.get("stage", "joint") == "joint":
                    step = msgspec.convert(event, RecordedStep)
                    # A resumed run repeats the steps after its last checkpoint: the later ones led on.
                    self._steps[step.epoch, step.step] = step.plans()
        except OSError as error:
            raise InputError(f"--replay-rungs {path}: cannot be read ({error.strerror})") from None
        except (ValueError, msgspec.MsgspecError) as error:
            raise InputError(
                f"--replay-rungs {path}: a step without its plan ({error}); name a log.jsonl whose steps have "
                "epoch, step, num_snippets, side and micro_batch"
            ) from None
        if not self._steps:
            raise InputError(f"--replay-rungs {path}: no joint step in it; name the log.jsonl of a run")

    def choose(self, pattern: Pattern, epoch: int, step: int) -> Decision:
        found = self._steps.get((epoch, step))
        if found is None:
            raise InputError(
                f"--replay-rungs {self._path}: no plan for epoch {epoch}, step {step}; replay a run that got as far, "
                "with the same data, batch and seed"
            )
        _, requested = found
        return Decision(pattern, epoch, step, requested, requested, 0, self._limit, self._limit, 0, "replayed")

    def recheck(self, decision: Decision) -> Decision:
        plan, _ = self._steps[decision.epoch, decision.step]
        return replace(decision, plan=plan)

    def learn(self, decision: Decision, peak: int | None, seconds: float | None = None) -> None:
        pass

    def failed(self, decision: Decision) -> Decision:
        raise NothingFits(
            f"--replay-rungs {self._path}: memory ran out at {decision.plan}, which that run took at epoch "
            f"{decision.epoch}, step {decision.step}; a limit of {gigabytes(self._limit)} is too little to replay it"
        )

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        pass


def _events(text: str) -> Iterable[Mapping[str, Any]]:
    """The objects of a JSON list, or of JSON lines; a line that a killed run left torn is passed over."""
    with suppress(ValueError, RecursionError):
        whole = json.loads(text)
        if isinstance(whole, list):
            return [event for event in whole if isinstance(event, dict)]
    events = []
    for line in text.splitlines():
        with suppress(ValueError, RecursionError):
            event = json.loads(line)
            if isinstance(event, dict):
                events.append(event)
    return events

"""The plan of one step, decided: what a planner of the joint stage gives, and what such a planner is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from lofi_fast.errors import InputError
from lofi_fast.fidelity import Fidelity, Pattern
from lofi_fast.memory.plans import Plan


class NothingFits(InputError):
    """No plan fits the memory available now. Other processes may free some: a caller may wait and ask again.

    `last` is a decision to try before giving up: the smallest plan inside the margin, one that has run before where
    there is such a plan; none before any plan has run. The step's cap holds it to the limit, should it take more.
    """

    def __init__(self, sentence: str, last: Decision | None = None) -> None:
        super().__init__(sentence)
        self.last = last


@dataclass(frozen=True)
class Decision:
    """The plan of one step, and the reason for it. The step is run under a cap of `limit` bytes."""

    pattern: Pattern
    epoch: int
    step: int
    plan: Plan
    requested: Plan  # the plan whose frames were decoded; `plan` itself unless memory has shrunk since
    predicted: int  # peak
    limit: int
    room: int
    free: int  # what this process could hold at the last reading
    reason: str
    base: int = 0
    new: bool = False  # the plan has never run, in this process or in one that it continues
    changed: bool = False  # the step before had another plan: call `meter.release()` first, or its memory counts here

    @property
    def reduced_from(self) -> Fidelity | None:
        """The fidelity that the frames were decoded at, where the step is to run lower."""
        return None if self.plan.fidelity == self.requested.fidelity else self.requested.fidelity

    def fields(self) -> dict[str, Any]:
        """For the step's event in log.jsonl; `Replay` reads some of them."""
        source = self.reduced_from
        return {
            "num_snippets": self.plan.fidelity.num_snippets,
            "side": self.plan.fidelity.side,
            "micro_batch": self.plan.micro_batch,
            "recompute": self.plan.recompute,
            "chunk": self.plan.chunk,
            "reduced_from": None if source is None else [source.num_snippets, source.side],
            "predicted": self.predicted,
            "base": self.base,
            "limit": self.limit,
            "room": self.room,
            "free": self.free,
            "reason": self.reason,
        }


class Planner(Protocol):
    """What plans the steps of the joint stage: a `Governor`, or a `Replay` of another run."""

    def choose(self, pattern: Pattern, epoch: int, step: int) -> Decision:
        """The plan of a step, at the time when its frames are requested from the decoder."""

    def recheck(self, decision: Decision) -> Decision:
        """The same plan or a lower one, at the time when the step starts."""

    def learn(self, decision: Decision, peak: int | None, seconds: float | None = None) -> None:
        """Learn the peak and the time of a step that went through. Call it when the step's tensors are gone."""

    def failed(self, decision: Decision) -> Decision:
        """A lower plan for the same samples, after memory ran out."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None: ...

"""A step as a row of stages: what each leaves for backward, what is alive beside it, and the most that ever is."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

FLOAT, LONG = 4, 8  # bytes of float32 (parameters, sums, losses) and of int64


# A step, as a row of stages


class Stage(NamedTuple):
    """A piece of forward with its piece of backward, in bytes."""

    name: str
    kept: int = 0  # left by forward for backward
    handed: int = 0  # given on beside it, and alive until the next stage is done
    forward: int = 0  # alive beyond both while forward runs
    weight: int = 0  # numbers that learn
    backward: int = 0  # alive beyond `kept` and the gradients that come in, while backward runs; its weight's aside
    pending: int = 0  # gradients alive when its backward is done


class Tally:
    """Bytes alive, and the most that were."""

    __slots__ = ("now", "peak")

    def __init__(self) -> None:
        self.now = self.peak = 0

    def take(self, amount: int) -> None:
        """Also with a negative amount."""
        self.now += amount
        if self.now > self.peak:
            self.peak = self.now

    def spike(self, amount: int) -> None:
        """Taken and given back."""
        if self.now + amount > self.peak:
            self.peak = self.now + amount

    def forward(self, stages: Sequence[Stage], keep: bool = True) -> None:
        """Without `keep`, a stage's maps go when the next is done, which reads one as large as what was `handed`."""
        handed = 0
        for stage in stages:
            self.spike(handed * (1 if keep else 2) + stage.kept + stage.handed + stage.forward)
            self.take(stage.kept if keep else 0)
            handed = stage.handed

    def backward(self, stages: Sequence[Stage], pending: int, made: int, left: int, freed: int = 0) -> None:
        """From the gradients that are `pending`. `made`: bytes of a weight's gradient while it is worked out; `left`:
        afterwards; `freed`: of the weight itself.
        """
        for stage in reversed(stages):
            self.spike(stage.backward + made * stage.weight)
            self.take(stage.pending - pending - stage.kept + (left - freed) * stage.weight)
            pending = stage.pending
        self.take(-pending)  # what comes out is the caller's to count

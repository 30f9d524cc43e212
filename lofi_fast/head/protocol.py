"""What a head is to the rest of the package: an `nn.Module` with the methods below, and the proposals that it gives.

Shapes: B windows, C channels, L snippets, K classes, P proposals of a window. What a head calls its output, its targets
and its counts is its own affair: the stages hand them from one of its methods to the next and look into none.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from operator import add
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

Array = NDArray[np.float64]
Output = Any  # of `forward`, for B windows
Targets = Any  # of one window
Counts = Any  # of the windows of one optimiser step; + adds those of the parts that several processes take


class NotFiniteOutput(ValueError):
    """A head's output holds a NaN or an infinity: its training has diverged."""


@dataclass(frozen=True, eq=False)
class Proposals:
    """Segments of one window that may hold an action, before overlapping ones are suppressed."""

    segments_P2: Array  # start and end in seconds of the video's clock
    scores_P: Array  # in [0, 1]
    class_probs_KP: Array | None = None  # None: the head tells no classes


class Head(nn.Module, ABC):
    """Features (B, C, L) of B windows -> an output; targets, loss and proposals go with it.

    L differs from step to step, so weights must not depend on it.
    """

    def seed(self, seeds: Sequence[int]) -> None:
        """What the next forward draws, if it draws anything, is drawn from these, one for each window: a batch in parts
        then draws what the whole batch draws.
        """

    @abstractmethod
    def forward(self, features_BCL: Tensor) -> Output:
        """Under autocast."""

    @abstractmethod
    def targets(self, edges: Array, segments: Array, labels: NDArray[np.int64], random: np.random.Generator) -> Targets:
        """What a window's output should be, on the CPU.

        Args:
            edges: (L + 1,) seconds, ascending: the times between snippets.
            segments: (G, 2) seconds, those that touch the window.
            labels: (G,) indices of classes.
            random: for what is drawn; keyed by the window, so that a step tried again draws the same.
        """

    @abstractmethod
    def counts(self, targets: Sequence[Targets]) -> Counts:
        """What the terms of the loss are divided by, from all windows of an optimiser step: the losses of its parts,
        each divided by the counts of the whole, then add up to the loss of the whole.
        """

    @abstractmethod
    def loss(
        self, output: Output, targets: Sequence[Targets], counts: Counts, class_weight: float
    ) -> dict[str, Tensor]:
        """Terms of the loss by name (0-d, fp32), each as it enters their sum; the same names in every call.

        `class_weight`: of telling the classes apart, beside finding the segments.
        """

    @abstractmethod
    def proposals(self, output: Output, edges: Sequence[Array]) -> list[Proposals]:
        """Of each window, whose snippets lie between `edges` (see `targets`). Raises NotFiniteOutput."""


def total(terms: Mapping[str, Tensor]) -> Tensor:
    """The loss: the sum of its terms, in their order."""
    return reduce(add, terms.values())

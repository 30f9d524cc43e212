"""Spotting of points in time: a class, or none, of each snippet, as E2E-Spot has it (Hong et al., ECCV 2022).

A recurrent network reads the snippets in both directions, and a linear layer classifies each. A point is where its
label's segment starts, so that segments with a duration are spotted at their start; it is taught at the snippet that it
lies in, and found at a snippet's centre.

Shapes: B windows, C channels, H hidden channels, L snippets, K classes, G segments of a window. Class 0 of the output
is "nothing here".

The published code reads frames where this reads snippets, mixes pairs of clips in training, and takes the mean of a
frame's scores over the clips that show it, where here the best counts (`decoding.best_points`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from lofi_fast.config import SpottingConfig
from lofi_fast.gpu import send
from lofi_fast.head.dropout import video_dropout
from lofi_fast.head.protocol import Array, Head, NotFiniteOutput, Proposals

MOST_HIDDEN = 768  # channels of the recurrent network in each direction, where the settings name no number
NOTHING = 0  # the class of a snippet without a point


@dataclass(frozen=True)
class Counts:
    """Snippets of the windows of a step, without a point and with one."""

    nothing: int
    point: int

    def __add__(self, other: Counts) -> Counts:
        return Counts(self.nothing + other.nothing, self.point + other.point)


class Spotting(Head):
    """Snippet features (B, C, L) -> logits (B, K + 1, L). Weights do not depend on L."""

    _seeds: tuple[int, ...] = ()

    def __init__(self, config: SpottingConfig, num_features: int, num_classes: int) -> None:
        super().__init__()
        self.config, self.num_classes = config, num_classes
        hidden = config.hidden or min(num_features, MOST_HIDDEN)
        self.recurrent = nn.GRU(num_features, hidden, config.layers, batch_first=True, bidirectional=True)
        self.classifier = nn.Linear(2 * hidden, num_classes + 1)

    def seed(self, seeds: Sequence[int]) -> None:
        self._seeds = tuple(seeds)

    def forward(self, features_BCL: Tensor) -> Tensor:
        x_BLH, _ = self.recurrent(features_BCL.transpose(1, 2))
        x_BHL = x_BLH.transpose(1, 2)
        if self.training:
            # Not the numbers that the features' own dropout draws from the same seeds.
            x_BHL = video_dropout(x_BHL, self.config.dropout, [seed ^ 1 for seed in self._seeds])
        logits_BKL: Tensor = self.classifier(x_BHL.transpose(1, 2)).transpose(1, 2)
        return logits_BKL

    def targets(self, edges: Array, segments: Array, labels: NDArray[np.int64], random: np.random.Generator) -> Tensor:
        """(L,) the class of each snippet, 1 + its index, or `NOTHING`; nothing is drawn."""
        times = np.asarray(segments, dtype=np.float64).reshape(-1, 2)[:, 0]
        return torch.from_numpy(snippet_classes(edges, times, labels, self.config.dilation))

    def counts(self, targets: Sequence[Tensor]) -> Counts:
        """See `Counts`."""
        points = sum(int((window != NOTHING).sum()) for window in targets)
        return Counts(sum(map(len, targets)) - points, points)

    def loss(self, output: Tensor, targets: Sequence[Tensor], counts: Counts, class_weight: float) -> dict[str, Tensor]:
        """Cross-entropy of all snippets, those with a point `point_weight` times as heavy: the weighted mean.

        It is what finds the points, so `class_weight`, which is for heads that find segments without it, is not used.
        """
        weight = output.new_full((self.num_classes + 1,), self.config.point_weight, dtype=torch.float32)
        weight[NOTHING] = 1.0
        classes_BL = send(torch.stack(list(targets)), output.device)
        entropy = F.cross_entropy(output.float(), classes_BL, weight, reduction="sum")
        return {"classes": entropy / (counts.nothing + self.config.point_weight * counts.point)}

    def proposals(self, output: Tensor, edges: Sequence[Array]) -> list[Proposals]:
        """A point at the centre of every snippet, with the probability of each class there."""
        if not bool(output.isfinite().all()):
            raise NotFiniteOutput("a logit is not finite")
        probs_BKL = output.detach().double().softmax(dim=1)[:, 1:].cpu().numpy()
        centres = [(times[:-1] + times[1:]) / 2 for times in edges]
        return [
            Proposals(np.stack([at, at], axis=1), np.ones(len(at)), probs_KL)
            for at, probs_KL in zip(centres, probs_BKL, strict=True)
        ]


def snippet_classes(edges: Array, times: Array, labels: NDArray[np.int64], dilation: int) -> NDArray[np.int64]:
    """(L,) 1 + the class of the nearest of the points at `times` (G,), where it is at most `dilation` snippets away;
    of equally near ones the later in the list. Points outside the window teach nothing.
    """
    length = len(edges) - 1
    inside = (times >= edges[0]) & (times <= edges[-1])
    places = (np.searchsorted(edges, times[inside], side="right") - 1).clip(max=length - 1)
    classes = np.full(length, NOTHING, dtype=np.int64)
    if not len(places):
        return classes
    apart = np.abs(np.arange(length)[:, None] - places[::-1])
    nearest = apart.argmin(axis=1)
    near = apart[np.arange(length), nearest] <= dilation
    classes[near] = 1 + labels[inside][::-1][nearest[near]]
    return classes

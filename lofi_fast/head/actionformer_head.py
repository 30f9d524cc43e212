"""ActionFormer as a `Head`: its network, with its labels, loss and decoding.

Time is counted in snippets from the centre of the window's first, as its positions are. Shapes as in actionformer.py;
G segments of a window.

One thing differs from the published code: both terms of the loss are divided by the number of positive positions in the
step, and not by that number's moving average over the steps before: the loss of a step must not depend on how often it
was tried, or into which parts it was cut.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from lofi_fast.config import ActionFormerConfig
from lofi_fast.gpu import send
from lofi_fast.head.actionformer import ActionFormer, PyramidOutput, positions
from lofi_fast.head.protocol import Array, Head, NotFiniteOutput, Proposals

FIRST_RANGE = 4.0  # snippets: the largest distance that the first level answers for; twice as far at each further one
KEPT_SHARE = 0.5  # of a segment, that lies in the window, or it teaches nothing there
ALPHA, GAMMA = 0.25, 2.0  # of the focal loss
SHORTEST = 0.05  # snippets of a proposal
MOST_PROPOSALS = 2000  # of a window
EQUAL = 1e-3  # snippets that two segments' lengths differ by at most, to be both shown at a position


class Targets(NamedTuple):
    """Of one window: classes (K, P) in [0, 1], distances (2, P) in steps of the level, positive (P,)."""

    classes: Tensor
    distances: Tensor
    positive: Tensor


@dataclass(frozen=True)
class Counts:
    """Of the windows of a step."""

    positive: int

    def __add__(self, other: Counts) -> Counts:
        return Counts(self.positive + other.positive)


class ActionFormerHead(ActionFormer, Head):
    """`ActionFormer` with what belongs to it."""

    _seeds: tuple[int, ...] = ()

    def seed(self, seeds: Sequence[int]) -> None:
        self._seeds = tuple(seeds)

    def forward(self, features_BCL: Tensor, seeds: Sequence[int] | None = None) -> PyramidOutput:
        return super().forward(features_BCL, self._seeds if seeds is None else seeds)

    def targets(self, edges: Array, segments: Array, labels: NDArray[np.int64], random: np.random.Generator) -> Targets:
        """See `make_targets`; nothing is drawn."""
        return make_targets(self.config, self.num_classes, edges, segments, labels)

    def counts(self, targets: Sequence[Targets]) -> Counts:
        """Positive positions of the windows."""
        return Counts(sum(int(window.positive.sum()) for window in targets))

    def loss(
        self, output: PyramidOutput, targets: Sequence[Targets], counts: Counts, class_weight: float
    ) -> dict[str, Tensor]:
        """Focal loss of the classes at all positions, and the distance-IoU loss of the positive ones.

        The classes are what finds the actions, so their term has no weight beside the other: `class_weight` is for
        heads that find segments without them.
        """
        device = output.classes_BKP.device
        classes, distances, positive = (send(torch.stack(parts), device) for parts in zip(*targets, strict=True))
        _, _, there = positions(output.length, self.config.levels)
        divisor = max(counts.positive, 1)
        focal = focal_loss(output.classes_BKP.float(), classes) * send(there, device)
        found = output.distances_B2P.float().transpose(1, 2)
        iou = distance_iou_loss(found, distances.transpose(1, 2))
        apart = torch.where(positive, iou, 0.0)  # of the others the distances mean nothing
        return {
            "classes": focal.sum() / divisor,
            "distances": self.config.regression_loss * apart.sum() / divisor,
        }

    def proposals(self, output: PyramidOutput, edges: Sequence[Array]) -> list[Proposals]:
        """The positions whose likeliest class is best, `MOST_PROPOSALS` at most."""
        if not (bool(output.classes_BKP.isfinite().all()) and bool(output.distances_B2P.isfinite().all())):
            raise NotFiniteOutput("a logit or a distance is not finite")
        snippets, steps, there = positions(output.length, self.config.levels)
        found = []
        for row, times in enumerate(edges):
            distances = output.distances_B2P[row].detach().double().cpu() * steps
            segments = torch.stack([snippets - distances[0], snippets + distances[1]], dim=1).numpy()
            classes = output.classes_BKP[row].detach().double().sigmoid().cpu().numpy()
            kept = np.flatnonzero(there.numpy() & (segments[:, 1] - segments[:, 0] > SHORTEST))
            best = np.argsort(-classes[:, kept].max(axis=0), kind="stable")[:MOST_PROPOSALS]
            kept = kept[best]
            seconds = seconds_of(segments[kept], times)
            found.append(Proposals(seconds, np.ones(len(kept)), classes[:, kept]))
        return found


def snippets_of(seconds: Array, edges: Array) -> Array:
    """Times as snippets from the first one's centre; those outside the window as its nearest edge."""
    return np.asarray(np.interp(seconds, edges, np.arange(len(edges)) - 0.5), dtype=np.float64)


def seconds_of(snippets: Array, edges: Array) -> Array:
    """The reverse."""
    return np.asarray(np.interp(snippets, np.arange(len(edges)) - 0.5, edges), dtype=np.float64)


def make_targets(
    config: ActionFormerConfig, num_classes: int, edges: Array, segments: Array, labels: NDArray[np.int64]
) -> Targets:
    """A position learns the shortest segment in whose middle it is, and whose ends are as far as its level answers for.

    In the middle: within `center_radius` steps of the level from the segment's centre, and inside it. Source: label
    assignment of the published code, with segments cut by the window left out where less than half of them is inside.
    """
    snippets, steps, there = (part.double().numpy() for part in positions(len(edges) - 1, config.levels))
    segments = np.asarray(segments, dtype=np.float64).reshape(-1, 2)
    inside = np.clip(segments, edges[0], edges[-1])
    kept = (inside[:, 1] - inside[:, 0]) >= KEPT_SHARE * (segments[:, 1] - segments[:, 0])
    starts, ends = snippets_of(inside[kept], edges).T
    labels = labels[kept]
    classes, distances = np.zeros((num_classes, len(snippets))), np.zeros((2, len(snippets)))
    if not len(labels):
        return _as_tensors(classes, distances, np.zeros(len(snippets), dtype=np.bool_))
    left, right = snippets[:, None] - starts, ends - snippets[:, None]
    centres, radii = (starts + ends) / 2, config.center_radius * steps[:, None]
    in_middle = np.minimum(
        snippets[:, None] - np.maximum(centres - radii, starts), np.minimum(centres + radii, ends) - snippets[:, None]
    ) > 0  # fmt: skip
    farthest = np.maximum(left, right)
    least = np.where(steps > 1, FIRST_RANGE * steps / 2, 0.0)
    most = np.where(steps < 2 ** (config.levels - 1), FIRST_RANGE * steps, np.inf)
    in_range = (farthest >= least[:, None]) & (farthest <= most[:, None])
    lengths = np.where(in_middle & in_range & (there[:, None] > 0), ends - starts, np.inf)
    shortest = lengths.argmin(axis=1)
    shown = np.isfinite(lengths) & (lengths <= lengths.min(axis=1, keepdims=True) + EQUAL)
    for label, at in zip(labels, shown.T, strict=True):
        classes[label, at] = 1.0
    rows = np.arange(len(snippets))
    distances = np.stack([left[rows, shortest], right[rows, shortest]]) / steps
    return _as_tensors(classes, distances, shown.any(axis=1))


def _as_tensors(classes: Array, distances: Array, positive: NDArray[np.bool_]) -> Targets:
    return Targets(
        torch.from_numpy(classes).float(), torch.from_numpy(np.where(positive, distances, 0.0)).float(),
        torch.from_numpy(positive),
    )  # fmt: skip


def focal_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Of each logit (Lin et al., ICCV 2017): cross-entropy, less of what is told already."""
    probability = logits.sigmoid()
    right = probability * targets + (1 - probability) * (1 - targets)
    weight = ALPHA * targets + (1 - ALPHA) * (1 - targets)
    entropy = F.binary_cross_entropy_with_logits(logits, targets, reduction="none")
    return weight * (1 - right) ** GAMMA * entropy


def distance_iou_loss(found: Tensor, true: Tensor, least: float = 1e-8) -> Tensor:
    """Of pairs of segments around one position, given by their distances (..., 2) to start and end (Zheng et al., AAAI
    2020): 1 - IoU + (distance of the centres / length of both together)^2.
    """
    both = torch.minimum(found, true).sum(dim=-1)
    union = found.sum(dim=-1) + true.sum(dim=-1) - both
    around = torch.maximum(found, true).sum(dim=-1)
    apart = (found[..., 1] - found[..., 0] - true[..., 1] + true[..., 0]) / 2
    loss: Tensor = 1 - both / union.clamp(min=least) + (apart / around.clamp(min=least)) ** 2
    return loss

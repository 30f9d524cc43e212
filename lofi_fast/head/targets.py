"""Labels of G-TAD and BMN, worked out from true times: segments in seconds against the snippet boundaries in seconds.

Shapes: L snippets with boundary times edges (L+1,), G ground-truth segments, K classes, N valid cells (duration d,
start s): proposal (s, d) is [edges[s], edges[s + d + 1]]. All on the CPU in float64; a batch is stacked and moved once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lofi_fast.gpu import send

BOUNDARY_REACH = 1.5  # snippets on either side of a start or an end that count as its region
POSITIVE_BOUNDARY = 0.5
REGRESSION_HIGH, REGRESSION_LOW = 0.7, 0.3
POSITIVE_CLASS, NEGATIVE_CLASS = 0.5, 0.3  # tIoU with a segment of the class
SHOWN, ABSENT, IGNORED = 1, 0, -1  # of a class at a cell

Array = NDArray[np.float64]


def valid_cells(num_snippets: int, max_duration: int) -> NDArray[np.int64]:
    """Cells (N, 2) = (d, s) with s + d < L and d < D, by duration, then start."""
    cells = [(d, s) for d in range(min(max_duration, num_snippets)) for s in range(num_snippets - d)]
    return np.array(cells, dtype=np.int64).reshape(-1, 2)


def cell_segments(cells: NDArray[np.int64], edges: Array) -> Array:
    """Times (N, 2) in seconds of the cells."""
    d, s = cells.T
    return np.stack([edges[s], edges[s + d + 1]], axis=1)


def pairwise_iou(a: Array, b: Array) -> Array:
    """tIoU (len(a), len(b)) of segments (., 2); 0 where both are empty."""
    inter: Array = (np.minimum(a[:, None, 1], b[None, :, 1]) - np.maximum(a[:, None, 0], b[None, :, 0])).clip(0)
    union = (a[:, 1] - a[:, 0])[:, None] + (b[:, 1] - b[:, 0])[None, :] - inter
    iou: Array = np.divide(inter, union, out=np.zeros_like(inter), where=union > 0)
    return iou


def boundary_overlap(edges: Array, times: Array) -> Array:
    """(L,) for each of the first L edges: the largest share of its anchor that lies within 1.5 snippets of one of
    `times`, as upstream (G-TAD) scores it: intersection over anchor.

    The anchor of edge i, in snippets, is [i - 0.5, i + 0.5]: half a snippet on either side of the time that the
    decoding gives to this edge. G-TAD's ActivityNet code has [i - 0.5, i + 1.5], the snippet i with half of each
    neighbour, although its decoding puts the boundary at i as well: measured over random segments, its positive labels
    lie 0.4 to 0.5 snippets before the true boundary on average, and those here less than 0.1 snippets beside it.
    """
    widths = np.diff(edges)
    anchors = np.stack([edges[:-1] - widths / 2, edges[:-1] + widths / 2], axis=1)
    if not len(times):
        return np.zeros(len(widths))
    reach = BOUNDARY_REACH * widths.mean()
    inter = np.minimum(anchors[:, None, 1], times + reach) - np.maximum(anchors[:, None, 0], times - reach)
    overlap: Array = (inter.clip(0) / widths[:, None]).max(axis=1)
    return overlap


@dataclass(frozen=True)
class Targets:
    """Labels of one window, or of a stacked batch (with a leading B)."""

    start: Tensor  # (L,) float: share of the boundary region
    end: Tensor  # (L,)
    iou: Tensor  # (N,) highest tIoU with a segment
    regression: Tensor  # (N,) bool: cells drawn for the regression loss
    classes: Tensor  # (K, N) int8: SHOWN, ABSENT, or IGNORED between them; one cell may show several classes

    @staticmethod
    def stack(targets: Sequence[Targets], device: torch.device) -> Targets:
        def together(name: str) -> Tensor:
            return send(torch.stack([getattr(t, name) for t in targets]), device)

        return Targets(*(together(name) for name in ("start", "end", "iou", "regression", "classes")))


def draw_regression_cells(iou: Array, rng: np.random.Generator, with_zero: bool) -> NDArray[np.bool_]:
    """All cells of tIoU > 0.7 and equally many (at least one) random ones each of (0.3, 0.7] and (0, 0.3].

    Drawn for each window by itself, so that the choice does not depend on how a batch is split. `with_zero` lets the
    low ones include cells that touch no action.
    """
    high = iou > REGRESSION_HIGH
    middle = ~high & (iou > REGRESSION_LOW)
    low = (iou <= REGRESSION_LOW) & ((iou >= 0) if with_zero else (iou > 0))
    chosen = high.copy()
    for pool in (middle, low):
        members = np.flatnonzero(pool)
        wanted = min(max(int(high.sum()), 1), len(members))
        chosen[rng.choice(members, wanted, replace=False)] = True
    return chosen


def class_targets(ious: Array, labels: NDArray[np.int64], num_classes: int) -> NDArray[np.int8]:
    """(K, N) of cells with tIoU `ious` (N, G) with segments of classes `labels` (G,): each class by the best of its own
    segments, whatever others are there. So a segment with two labels, and two segments that overlap, teach both.
    """
    classes = np.full((num_classes, len(ious)), ABSENT, dtype=np.int8)
    for label in np.unique(labels):
        best = ious[:, labels == label].max(axis=1)
        classes[label, best >= NEGATIVE_CLASS] = IGNORED
        classes[label, best >= POSITIVE_CLASS] = SHOWN
    return classes


def make_targets(
    edges: Array,
    segments: Array,
    labels: NDArray[np.int64],
    max_duration: int,
    num_classes: int,
    rng: np.random.Generator,
    *,
    with_zero: bool,
) -> Targets:
    """Targets of one window: `edges` (L+1,) s, `segments` (G, 2) s that touch it, `labels` (G,) class indices."""
    cells = valid_cells(len(edges) - 1, max_duration)
    ious = pairwise_iou(cell_segments(cells, edges), segments.reshape(-1, 2))
    best = ious.max(axis=1) if len(segments) else np.zeros(len(cells))
    inside = (segments >= edges[0]) & (segments <= edges[-1]) if len(segments) else np.zeros((0, 2), bool)
    return Targets(
        start=torch.from_numpy(boundary_overlap(edges, segments[inside[:, 0], 0])).float(),
        end=torch.from_numpy(boundary_overlap(edges, segments[inside[:, 1], 1])).float(),
        iou=torch.from_numpy(best).float(),
        regression=torch.from_numpy(draw_regression_cells(best, rng, with_zero)),
        classes=torch.from_numpy(class_targets(ious, labels, num_classes)),
    )

"""GTAD_DOC"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from lofi_fast.config import HeadConfig
from lofi_fast.ledger import FLOAT, LONG, Stage

NUM_NEIGHBOURS = 3
BASE_GROUPS = 4
HEAD_TENSORS = 71  # parameters of the head, counted as tensors


class Head(NamedTuple):
    """Sizes of G-TAD at a rung, over a micro-batch."""

    config: HeadConfig
    num_features: int
    num_scores: int  # of a cell: the classes and background
    neighbours: int
    length: int  # L
    duration: int  # D
    steps: int  # B * L
    cells: int  # B * N, valid proposals
    dense: int  # cells that the middle convolutions work on: the whole D x L map where they are 3x3

    @staticmethod
    def of(config: HeadConfig, num_features: int, num_classes: int, full: int, batch: int, length: int) -> Head:
        """For B = `batch` videos of L = `length` of the full grid's `full` snippets."""
        duration = length
        if config.max_duration is not None:
            duration = max(1, math.ceil(config.max_duration * length / full))
        longest = min(duration, length)
        cells = longest * length - longest * (longest - 1) // 2
        dense = cells if config.middle_kernel == 1 else duration * length
        return Head(
            config, num_features, num_classes + 1, min(NUM_NEIGHBOURS, length), length, duration,
            batch * length, batch * cells, batch * dense,
        )  # fmt: skip

    @property
    def narrow(self) -> int:
        """Channels after the reduction."""
        return self.config.map_channels // 4

    @property
    def graph_weight(self) -> int:
        """Of one GCNeXt: five 1x1 convolutions between all and half the channels, grouped ones of kernels 3 and 1."""
        hidden, half = self.config.hidden, self.config.hidden // 2
        return 5 * hidden * half + 4 * half * (half // self.config.groups)

    @property
    def base_weight(self) -> int:
        return self.num_features // BASE_GROUPS * self.config.hidden * 3

    @property
    def middle_weight(self) -> int:
        return self.narrow**2 * self.config.middle_kernel**2

    @property
    def classifier(self) -> tuple[int, int]:
        """Weight and bias of the classes' align_linear."""
        return self.num_features * self.num_scores * self.config.class_bins, self.num_scores

    @property
    def bias(self) -> int:
        """All other biases."""
        c = self.config
        graphs = 4 * (4 * (c.hidden // 2) + 2 * c.hidden)
        return c.hidden + graphs + 2 + c.map_channels + 3 * self.narrow + 2


class Held(NamedTuple):
    """Bytes alive from the end of the loss to that of backward, beside what the stages keep."""

    saved: int  # by autograd too
    unsaved: int


def _head_held(h: Head, e: int, dropout: bool, class_loss: bool) -> Held:
    """The features, the head's output and the terms of the loss; what a classifier without a loss was given."""
    features, logits = FLOAT * h.steps * h.num_features, 2 * e * (h.steps + h.cells)
    given = features if dropout and not class_loss else 0
    saved = given + (0 if dropout else features) + (logits if e == FLOAT else 0)
    return Held(saved, given + features + logits + e * h.cells * h.num_scores + 5 * FLOAT - saved)


def _head_stages(h: Head, e: int, dropout: bool, class_loss: bool) -> list[Stage]:
    """The head and the loss, from the features on.

    Under autocast autograd keeps the cast inputs and weights of convolutions; align_linear keeps what it was given.
    """
    c, k = h.config, h.neighbours
    cast = 0 if e == FLOAT else e  # bytes of a number in a copy that autocast makes
    features, hidden = FLOAT * h.steps * h.num_features, e * h.steps * c.hidden
    aligned, reduced, wide = e * h.cells * c.map_channels, e * h.cells * h.narrow, e * h.dense * h.narrow
    scores, dense_map = FLOAT * h.cells * h.num_scores, wide if c.middle_kernel > 1 else 0
    distances = FLOAT * h.steps * (h.length + k + (c.hidden if cast else 0))
    classified = features if class_loss else 0  # the classifier's gradient of the features, until the base's joins it

    def graph(name: str, pending: int, after: int = 0) -> Stage:
        """A GCNeXt; `after`: the weight of a convolution that follows."""
        half, weight = c.hidden // 2, h.graph_weight + after
        temporal = 2 * half
        semantic = half + k * (2 * half + c.hidden) + c.hidden  # gathered from; edges, grouped, last; their maximum
        return Stage(
            name,
            kept=h.steps * (LONG * k + e * (temporal + semantic + c.hidden)) + cast * weight,
            forward=max(distances, hidden),
            weight=weight,
            backward=5 * hidden + h.steps * c.hidden * (LONG + k * (e + 1)),  # the maximum's, which counts its ties
            pending=pending * hidden + classified,
        )

    def conv(name: str, kept: int, weight: int, backward: int, pending: int) -> Stage:
        """On cells. `aligned`: what the ReLU after align_linear reads lives to the end of forward."""
        return Stage(name, kept + cast * weight, 0, aligned + wide, weight, backward, pending + classified)

    # align_linear makes Z out of rows of its features and its weight, each copied where it is not as it should be.
    inner, context = (c.hidden * c.map_channels * bins for bins in (c.inner_bins, c.context_bins))
    z, z_scores = (
        e * h.steps * n for n in (c.map_channels * (c.inner_bins + c.context_bins), h.num_scores * c.class_bins)
    )
    rows = e * h.steps * h.num_features
    z_made = z_scores + cast * h.classifier[0] + (rows if cast or dropout else 0)
    return [
        # The scaled mask and what it leaves, which a classifier without a loss does not give back (`Held`).
        Stage("dropout", features * (2 if class_loss else 1) if dropout else 0, backward=features, pending=features),
        Stage(
            "base",
            kept=hidden + cast * (h.steps * h.num_features + h.base_weight),
            weight=h.base_weight,
            backward=hidden + features + cast * h.steps * h.num_features,
            pending=features,
        ),
        graph("base graph", 1),
        graph("graph", 1),
        graph("start", 2, after=c.hidden),
        graph("end", 2, after=c.hidden),
        Stage(
            "neighbours",
            kept=LONG * h.steps * k + hidden,
            forward=max(distances, k * hidden),
            backward=max(2 * k, k + 2) * hidden,
            pending=hidden + classified,
        ),
        Stage(
            "align",
            forward=z + hidden + cast * context + max(hidden + cast * inner, aligned),
            weight=inner + context,
            # One after the other, each with its rows, its weight and the gradients of both.
            backward=z + 3 * hidden + cast * max(context - inner, inner - 2 * context),
            pending=2 * hidden + classified,
        ),
        Stage("aligned", kept=aligned, forward=aligned, backward=aligned, pending=aligned + classified),
        conv("reduce", reduced + dense_map, c.map_channels * h.narrow, max(aligned, 2 * reduced), aligned),
        conv("middle 1", wide, h.middle_weight, wide, wide),
        conv("middle 2", wide, h.middle_weight, wide, wide),
        conv("last", 0, 2 * h.narrow, 4 * e * h.dense + wide, wide),
        Stage(
            "classifier",
            forward=aligned + z_made,
            weight=h.classifier[0] if class_loss else 0,
            backward=z_made + rows + (features if cast else 0) if class_loss else 0,
            pending=2 * e * h.cells + classified,
        ),
        # Labels as floats and two masks for each of three balanced BCEs, and under autocast the logits as floats; for
        # the regression a sigmoid, a difference and the cells drawn.
        Stage(
            "loss",
            kept=(2 * h.steps + h.cells) * (FLOAT + 2 + (FLOAT if cast else 0)) + h.cells * (2 * FLOAT + 1),
            # The targets and some of their size; the cross entropy is worked out in any case.
            forward=FLOAT * (2 * h.steps + 8 * h.cells) + (0 if class_loss else scores) + (scores if cast else 0),
            backward=6 * FLOAT * h.cells,
            pending=2 * e * h.cells + (e * h.cells * h.num_scores if class_loss else 0),
        ),
        # The log-softmax, labels, masks.
        Stage(
            "class loss",
            kept=scores + h.cells * (LONG + 2) + FLOAT if class_loss else 0,
            forward=FLOAT * (2 * h.steps + 4 * h.cells),
            backward=FLOAT * h.cells + (2 * scores if class_loss else 0),
            pending=FLOAT * h.cells + (e * h.cells * h.num_scores if class_loss else 0),
        ),
    ]


# What is there besides


@lru_cache(maxsize=256)
def grid_bytes(config: HeadConfig, full: int, length: int, device: Literal["cpu", "cuda"]) -> int:
    """The sampling weights of the head's proposals at one L, on `device`. They stay for every L that was used."""
    duration = Head.of(config, 0, 0, full, 1, length).duration
    cells = np.array([(d, s) for d in range(duration) for s in range(length - d)])
    inner, context = (_sampled(cells, length, bins, 0.5) for bins in (config.inner_bins, config.context_bins))
    classes = _sampled(cells, length, config.class_bins, 0.0)

    def sparse(weights: int, bins: int, value_bytes: int) -> int:
        """A matrix by compressed rows, and its transpose."""
        return 4 * (len(cells) + 1 + length * bins + 1) + 2 * weights * (4 + value_bytes)

    both, bins = inner + context, config.inner_bins + config.context_bins
    if device == "cuda":
        return sparse(both, bins, FLOAT) + sparse(classes, config.class_bins, FLOAT)
    # Each grid in float64 with its rois and cells, the sum of inner and context, and what runs, in fp32.
    grids = ((inner, config.inner_bins), (context, config.context_bins), (classes, config.class_bins))
    exact = sum(sparse(weights, bins, 8) + len(cells) * (2 * FLOAT + 2 * LONG) for weights, bins in grids)
    return exact + sparse(both, bins, 8) + 2 * FLOAT * (both + classes)


def _sampled(cells: NDArray[np.int64], length: int, bins: int, expand: float) -> int:
    """Weights that are not 0: the snippets between which the samples of each bin of each cell lie."""
    d, s = cells.T[:, :, None].astype(np.float32)  # the precision in which samples are placed
    start, extent = s - expand * (d + 1), np.maximum(d + 2 * expand * (d + 1), 1)
    step, samples = extent / bins, np.ceil(extent / bins)
    bin_start = start + np.arange(bins, dtype=np.float32) * step
    first, last = bin_start + 0.5 * step / samples, bin_start + (samples - 0.5) * step / samples
    lower, upper = np.floor(first).clip(0, length - 1), np.ceil(last).clip(0, length - 1)
    return int(((upper - lower + 1) * ((last >= -1) & (first <= length))).sum())

"""The ledger of G-TAD: the bytes that head/gtad.py and head/loss.py hold in a step.

Letters as there: B windows, C channels, L snippets, D durations, N valid proposal cells.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

from lofi_fast.config import HeadConfig
from lofi_fast.ledger import FLOAT, LONG, Parameters, Pass, Stage, Tally

NUM_NEIGHBOURS = 3  # of a snippet in feature space, itself included
BASE_GROUPS = 4  # of the first convolution


class Layer(NamedTuple):
    """Numbers of a layer's parameters; a bias of 0: it has none."""

    weight: int
    bias: int


def graph_layers(channels: int, groups: int) -> tuple[Layer, ...]:
    """Of a GCNeXt: the temporal branch, the two projections before neighbours are gathered, the semantic branch."""
    half = channels // 2
    into, out, grouped = Layer(channels * half, half), Layer(half * channels, channels), half * (half // groups)
    temporal = (into, Layer(3 * grouped, half), out)
    return (*temporal, into, Layer(channels * half, 0), Layer(grouped, half), out)


class Head(NamedTuple):
    """Sizes of G-TAD at a rung, over a micro-batch."""

    config: HeadConfig
    num_features: int
    num_scores: int  # of a cell: one for each class
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
            config, num_features, num_classes, min(NUM_NEIGHBOURS, length), length, duration,
            batch * length, batch * cells, batch * dense,
        )  # fmt: skip

    @property
    def narrow(self) -> int:
        """Channels after the reduction."""
        return self.config.map_channels // 4

    @property
    def graph(self) -> tuple[Layer, ...]:
        """Of each of the four GCNeXts."""
        return graph_layers(self.config.hidden, self.config.groups)

    @property
    def base(self) -> Layer:
        return Layer(self.num_features // BASE_GROUPS * self.config.hidden * 3, self.config.hidden)

    @property
    def boundary(self) -> Layer:
        """Of the start and of the end."""
        return Layer(self.config.hidden, 1)

    @property
    def inner(self) -> Layer:
        return Layer(self.config.hidden * self.config.map_channels * self.config.inner_bins, self.config.map_channels)

    @property
    def context(self) -> Layer:
        return Layer(self.config.hidden * self.config.map_channels * self.config.context_bins, 0)

    @property
    def reduce(self) -> Layer:
        return Layer(self.config.map_channels * self.narrow, self.narrow)

    @property
    def middle(self) -> Layer:
        """Of each of the two."""
        return Layer(self.narrow**2 * self.config.middle_kernel**2, self.narrow)

    @property
    def last(self) -> Layer:
        return Layer(2 * self.narrow, 2)

    @property
    def classifier(self) -> Layer:
        """The align_linear that scores classes."""
        return Layer(self.num_features * self.num_scores * self.config.class_bins, self.num_scores)

    def layers(self, classifier: bool = True) -> tuple[Layer, ...]:
        """All of them; without the classifier, those that learn where the loss has no class term."""
        proposals = (self.inner, self.context, self.reduce, self.middle, self.middle, self.last)
        layers = (self.base, *(4 * self.graph), self.boundary, self.boundary, *proposals)
        return (*layers, self.classifier) if classifier else layers


class Held(NamedTuple):
    """Bytes alive from the end of the loss to the end of backward, beside what the stages keep."""

    saved: int  # those that autograd holds too
    unsaved: int


def held_bytes(h: Head, e: int, dropout: bool, class_loss: bool) -> Held:
    """Features, the head's output and the terms of the loss; without a class loss, what the classifier was given."""
    features, logits = FLOAT * h.steps * h.num_features, 2 * e * (h.steps + h.cells)
    given = features if dropout and not class_loss else 0
    saved = given + (0 if dropout else features) + (logits if e == FLOAT else 0)
    return Held(saved, given + features + logits + e * h.cells * h.num_scores + 5 * FLOAT - saved)


@lru_cache(maxsize=1024)
def head_stages(h: Head, e: int, dropout: bool, class_loss: bool) -> tuple[Stage, ...]:
    """The head and the loss, from the features on. `e`: bytes of a number in an activation.

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
        half, weight = c.hidden // 2, sum(layer.weight for layer in h.graph) + after
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
    inner, context = h.inner.weight, h.context.weight
    z, z_scores = (
        e * h.steps * n for n in (c.map_channels * (c.inner_bins + c.context_bins), h.num_scores * c.class_bins)
    )
    rows = e * h.steps * h.num_features
    z_made = z_scores + cast * h.classifier.weight + (rows if cast or dropout else 0)
    return (
        # The scaled mask and what it leaves, which a classifier without a loss does not give back (`Held`).
        Stage("dropout", features * (2 if class_loss else 1) if dropout else 0, backward=features, pending=features),
        Stage(
            "base",
            kept=hidden + cast * (h.steps * h.num_features + h.base.weight),
            weight=h.base.weight,
            backward=hidden + features + cast * h.steps * h.num_features,
            pending=features,
        ),
        graph("base graph", 1),
        graph("graph", 1),
        graph("start", 2, after=h.boundary.weight),
        graph("end", 2, after=h.boundary.weight),
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
        conv("reduce", reduced + dense_map, h.reduce.weight, max(aligned, 2 * reduced), aligned),
        conv("middle 1", wide, h.middle.weight, wide, wide),
        conv("middle 2", wide, h.middle.weight, wide, wide),
        conv("last", 0, h.last.weight, 4 * e * h.dense + wide, wide),
        Stage(
            "classifier",
            forward=aligned + z_made,
            weight=h.classifier.weight if class_loss else 0,
            backward=z_made + rows + (features if cast else 0) if class_loss else 0,
            pending=2 * e * h.cells + classified,
        ),
        # Labels as floats and two masks for each of three balanced BCEs, and under autocast the logits as floats; for
        # the regression a sigmoid, a difference and the cells drawn.
        Stage(
            "loss",
            kept=(2 * h.steps + h.cells) * (FLOAT + 2 + (FLOAT if cast else 0)) + h.cells * (2 * FLOAT + 1),
            # The targets, with a byte for each class of a cell, and some of their size.
            forward=FLOAT * (2 * h.steps + 8 * h.cells) + h.cells * h.num_scores,
            backward=6 * FLOAT * h.cells,
            pending=2 * e * h.cells + (e * h.cells * h.num_scores if class_loss else 0),
        ),
        # Logits with the sign that their class gives them, two masks; the softplus, and its product with a mask.
        Stage(
            "class loss",
            kept=scores + 2 * h.cells * h.num_scores if class_loss else 0,
            forward=FLOAT * (2 * h.steps + 4 * h.cells) + h.cells * h.num_scores + (2 * scores if class_loss else 0),
            backward=FLOAT * h.cells + (2 * scores if class_loss else 0),
            pending=FLOAT * h.cells + (e * h.cells * h.num_scores if class_loss else 0),
        ),
    )


# The head in a step


@dataclass(frozen=True)
class GTADLedger:
    """The ledger of a `GTAD` and its loss, over features of `num_features` channels. `full_snippets`: of the full grid,
    by which the longest duration of a rung is measured. `class_loss`: whether the loss has a term for classes.
    """

    config: HeadConfig
    num_features: int
    num_classes: int
    full_snippets: int
    class_loss: bool

    @property
    def parameters(self) -> Parameters:
        head = self._sizes(1, 1)
        numbers = [number for layer in head.layers() for number in layer if number]
        return Parameters(FLOAT * sum(numbers), sum(numbers), len(numbers), sum(map(sum, self._learning(head))))

    def forward(self, tally: Tally, work: Pass) -> None:
        head, dropout = self._sizes(work.videos, work.num_snippets), self.config.dropout > 0
        held = held_bytes(head, work.itemsize, dropout, self.class_loss)
        tally.take(sum(held) - FLOAT * head.steps * head.num_features)  # the features are there
        tally.forward(head_stages(head, work.itemsize, dropout, self.class_loss))

    def backward(self, tally: Tally, work: Pass) -> None:
        head, e = self._sizes(work.videos, work.num_snippets), work.itemsize
        stages = head_stages(head, e, self.config.dropout > 0, self.class_loss)
        # The gradients of the biases, a little early, and that of the loss.
        tally.take(FLOAT * (sum(layer.bias for layer in self._learning(head)) + 1))
        tally.backward(stages, 0, FLOAT if e == FLOAT else FLOAT + e, work.gradient)

    def _sizes(self, videos: int, num_snippets: int) -> Head:
        return Head.of(self.config, self.num_features, self.num_classes, self.full_snippets, videos, num_snippets)

    def _learning(self, head: Head) -> tuple[Layer, ...]:
        return head.layers(classifier=self.class_loss)

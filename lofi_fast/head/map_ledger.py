"""What the ledgers of G-TAD and BMN share: sizes, dropout before the head, the classifier beside it, the loss.

Letters: B windows, C channels, L snippets, D durations, N valid proposal cells.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

from lofi_fast.config import HeadConfig
from lofi_fast.ledger import FLOAT, Parameters, Pass, Stage, Tally


class Layer(NamedTuple):
    """Numbers of a layer's parameters; a bias of 0: it has none."""

    weight: int
    bias: int


class Sizes(NamedTuple):
    """Of a head at a rung, over a micro-batch."""

    config: HeadConfig
    num_features: int
    num_scores: int  # of a cell: one for each class
    length: int  # L
    duration: int  # D
    steps: int  # B * L
    cells: int  # B * N, valid proposals
    batch: int  # B

    @staticmethod
    def of(config: HeadConfig, num_features: int, num_classes: int, full: int, batch: int, length: int) -> Sizes:
        """For B = `batch` videos of L = `length` of the full grid's `full` snippets."""
        duration = config.longest(length, full)
        longest = min(duration, length)
        cells = longest * length - longest * (longest - 1) // 2
        return Sizes(config, num_features, num_classes, length, duration, batch * length, batch * cells, batch)

    @property
    def narrow(self) -> int:
        """Channels after the reduction."""
        return self.config.map_channels // 4

    @property
    def boundary(self) -> Layer:
        """The last of the start, and of the end."""
        return Layer(self.config.hidden, 1)

    @property
    def inner(self) -> Layer:
        """The align_linear over a proposal's samples."""
        return Layer(self.config.hidden * self.config.map_channels * self.config.inner_bins, self.config.map_channels)

    @property
    def reduce(self) -> Layer:
        return Layer(self.config.map_channels * self.narrow, self.narrow)

    def middle(self, kernel: int) -> Layer:
        """Each of the two convolutions over `kernel` x `kernel` proposals."""
        return Layer(self.narrow**2 * kernel**2, self.narrow)

    @property
    def last(self) -> Layer:
        return Layer(2 * self.narrow, 2)

    @property
    def classifier(self) -> Layer:
        """The align_linear that scores classes."""
        return Layer(self.num_features * self.num_scores * self.config.class_bins, self.num_scores)


class Held(NamedTuple):
    """Bytes alive from the end of the loss to the end of backward, beside what the stages keep."""

    saved: int  # those that autograd holds too
    unsaved: int


def held_bytes(h: Sizes, e: int, class_loss: bool) -> Held:
    """Features, the head's output and the terms of the loss; without a class loss, what the classifier was given."""
    features, logits = FLOAT * h.steps * h.num_features, 2 * e * (h.steps + h.cells)
    dropout = h.config.dropout > 0
    given = features if dropout and not class_loss else 0
    saved = given + (0 if dropout else features) + (logits if e == FLOAT else 0)
    return Held(saved, given + features + logits + e * h.cells * h.num_scores + 5 * FLOAT - saved)


def before(h: Sizes, class_loss: bool) -> Stage:
    """Dropout: the scaled mask and what it leaves, which a classifier without a loss does not give back (`Held`)."""
    features = FLOAT * h.steps * h.num_features
    kept = features * (2 if class_loss else 1) if h.config.dropout > 0 else 0
    return Stage("dropout", kept, backward=features, pending=features)


def after(h: Sizes, e: int, class_loss: bool, alive: int) -> tuple[Stage, ...]:
    """The classifier and the loss. `alive`: bytes that the network has not given back while the classifier runs."""
    cast = 0 if e == FLOAT else e  # bytes of a number in a copy that autocast makes
    features, rows = FLOAT * h.steps * h.num_features, e * h.steps * h.num_features
    scores = FLOAT * h.cells * h.num_scores
    z_scores = e * h.steps * h.num_scores * h.config.class_bins
    z_made = z_scores + cast * h.classifier.weight + (rows if cast or h.config.dropout > 0 else 0)
    return (
        Stage(
            "classifier",
            forward=alive + z_made,
            weight=h.classifier.weight if class_loss else 0,
            backward=z_made + rows + (features if cast else 0) if class_loss else 0,
            pending=2 * e * h.cells + (features if class_loss else 0),
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


@dataclass(frozen=True)
class MapLedger(ABC):
    """The ledger of a head and its loss, over features of `num_features` channels. `full_snippets`: of the full grid,
    by which the longest duration of a rung is measured. `class_loss`: whether the loss has a term for classes.
    """

    config: HeadConfig
    num_features: int
    num_classes: int
    full_snippets: int
    class_loss: bool

    @abstractmethod
    def layers(self, h: Sizes) -> tuple[Layer, ...]:
        """All but the classifier."""

    @abstractmethod
    def network(self, h: Sizes, e: int) -> tuple[Stage, ...]:
        """From the features to the proposals' scores. `e`: bytes of a number in an activation."""

    @abstractmethod
    def alive(self, h: Sizes, e: int) -> int:
        """Bytes that the network has not given back while the classifier runs, and does not keep."""

    @property
    def parameters(self) -> Parameters:
        h = self.sizes(1, 1)
        numbers = [number for layer in (*self.layers(h), h.classifier) for number in layer if number]
        return Parameters(FLOAT * sum(numbers), sum(numbers), len(numbers), sum(map(sum, self._learning(h))))

    def forward(self, tally: Tally, work: Pass) -> None:
        h, e = self.sizes(work.videos, work.num_snippets), work.itemsize
        tally.take(sum(held_bytes(h, e, self.class_loss)) - FLOAT * h.steps * h.num_features)  # the features are there
        tally.forward(stages(self, h, e))

    def backward(self, tally: Tally, work: Pass) -> None:
        h, e = self.sizes(work.videos, work.num_snippets), work.itemsize
        # The gradients of the biases, a little early, and that of the loss.
        tally.take(FLOAT * (sum(layer.bias for layer in self._learning(h)) + 1))
        tally.backward(stages(self, h, e), 0, FLOAT if e == FLOAT else FLOAT + e, work.gradient)

    def sizes(self, videos: int, num_snippets: int) -> Sizes:
        return Sizes.of(self.config, self.num_features, self.num_classes, self.full_snippets, videos, num_snippets)

    def _learning(self, h: Sizes) -> tuple[Layer, ...]:
        return (*self.layers(h), h.classifier) if self.class_loss else self.layers(h)


@lru_cache(maxsize=1024)
def stages(ledger: MapLedger, h: Sizes, e: int) -> tuple[Stage, ...]:
    """The head and the loss, from the features on.

    Under autocast autograd keeps the cast inputs and weights of convolutions; align_linear keeps what it was given.
    """
    network = ledger.network(h, e)
    return (before(h, ledger.class_loss), *network, *after(h, e, ledger.class_loss, ledger.alive(h, e)))

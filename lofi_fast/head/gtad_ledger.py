"""The ledger of G-TAD: the bytes that head/gtad.py and head/loss.py hold in a step.

Letters as there: B windows, C channels, L snippets, D durations, N valid proposal cells.
"""

from __future__ import annotations

from dataclasses import dataclass

from lofi_fast.head.map_ledger import Layer, MapLedger, Sizes
from lofi_fast.ledger import FLOAT, LONG, Stage

NUM_NEIGHBOURS = 3  # of a snippet in feature space, itself included
BASE_GROUPS = 4  # of the first convolution


def graph_layers(channels: int, groups: int) -> tuple[Layer, ...]:
    """Of a GCNeXt: the temporal branch, the two projections before neighbours are gathered, the semantic branch."""
    half = channels // 2
    into, out, grouped = Layer(channels * half, half), Layer(half * channels, channels), half * (half // groups)
    temporal = (into, Layer(3 * grouped, half), out)
    return (*temporal, into, Layer(channels * half, 0), Layer(grouped, half), out)


@dataclass(frozen=True)
class GTADLedger(MapLedger):
    """Of a `GTAD` and its loss; see `MapLedger`."""

    def layers(self, h: Sizes) -> tuple[Layer, ...]:
        c = self.config
        base = Layer(self.num_features // BASE_GROUPS * c.hidden * 3, c.hidden)
        graphs, middle = 4 * graph_layers(c.hidden, c.groups), h.middle(c.middle_kernel)
        proposals = (h.inner, _context(h), h.reduce, middle, middle, h.last)
        return (base, *graphs, h.boundary, h.boundary, *proposals)

    def alive(self, h: Sizes, e: int) -> int:
        """What the ReLU after align_linear reads."""
        return e * h.cells * self.config.map_channels

    def network(self, h: Sizes, e: int) -> tuple[Stage, ...]:
        c, k = self.config, min(NUM_NEIGHBOURS, h.length)
        cast = 0 if e == FLOAT else e  # bytes of a number in a copy that autocast makes
        base = self.num_features // BASE_GROUPS * c.hidden * 3
        features, hidden = FLOAT * h.steps * h.num_features, e * h.steps * c.hidden
        # The middle convolutions work on the whole D x L map where they are 3x3.
        dense = h.cells if c.middle_kernel == 1 else h.batch * h.duration * h.length
        aligned, reduced, wide = e * h.cells * c.map_channels, e * h.cells * h.narrow, e * dense * h.narrow
        dense_map = wide if c.middle_kernel > 1 else 0
        middle = h.middle(c.middle_kernel).weight
        distances = FLOAT * h.steps * (h.length + k + (c.hidden if cast else 0))
        # The classifier's gradient of the features, until the base's joins it.
        classified = features if self.class_loss else 0

        def graph(name: str, pending: int, after: int = 0) -> Stage:
            """A GCNeXt; `after`: the weight of a convolution that follows."""
            half, weight = c.hidden // 2, sum(layer.weight for layer in graph_layers(c.hidden, c.groups)) + after
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
        inner, context = h.inner.weight, _context(h).weight
        z = e * h.steps * c.map_channels * (c.inner_bins + c.context_bins)
        return (
            Stage(
                "base",
                kept=hidden + cast * (h.steps * h.num_features + base),
                weight=base,
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
            conv("middle 1", wide, middle, wide, wide),
            conv("middle 2", wide, middle, wide, wide),
            conv("last", 0, h.last.weight, 4 * e * dense + wide, wide),
        )


def _context(h: Sizes) -> Layer:
    """The align_linear over the samples of a proposal's neighbours; its bias is the other's."""
    return Layer(h.config.hidden * h.config.map_channels * h.config.context_bins, 0)

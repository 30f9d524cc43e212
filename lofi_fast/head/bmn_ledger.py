"""The ledger of BMN: the bytes that head/bmn.py and head/loss.py hold in a step.

Letters as there: B windows, C channels, L snippets, D durations, N valid proposal cells.
"""

from __future__ import annotations

from dataclasses import dataclass

from lofi_fast.config import BMNConfig
from lofi_fast.head.map_ledger import Layer, MapLedger, Sizes
from lofi_fast.ledger import FLOAT, LONG, Stage

GROUPS = 4  # of the convolutions over snippets, but the one before sampling
MIDDLE = 3  # proposals that the middle convolutions see along either axis of the map


@dataclass(frozen=True)
class BMNLedger(MapLedger):
    """Of a `BMN` and its loss; see `MapLedger`."""

    bmn: BMNConfig

    def layers(self, h: Sizes) -> tuple[Layer, ...]:
        of_snippets = (self._conv(self.num_features, GROUPS), self._conv(h.config.hidden, GROUPS))
        boundary = (self._conv(h.config.hidden, GROUPS), h.boundary)
        middle = h.middle(MIDDLE)
        sampled = (self._conv(h.config.hidden, 1), h.inner, h.reduce, middle, middle, h.last)
        return (*of_snippets, *boundary, *boundary, *sampled)

    def alive(self, h: Sizes, e: int) -> int:
        return 0

    def network(self, h: Sizes, e: int) -> tuple[Stage, ...]:
        c, released = self.config, self.bmn.definition == "released"
        cast = 0 if e == FLOAT else e  # bytes of a number in a copy that autocast makes
        features, hidden = FLOAT * h.steps * h.num_features, e * h.steps * c.hidden
        dense = h.batch * (h.length if released else h.duration) * h.length
        aligned, reduced, wide = e * h.cells * c.map_channels, e * h.cells * h.narrow, e * dense * h.narrow
        # The classifier's gradient of the features, until the base's joins it.
        classified = features if self.class_loss else 0
        base1, base2 = (self._conv(channels, GROUPS).weight for channels in (self.num_features, c.hidden))
        sampled, inner, middle = self._conv(c.hidden, 1).weight, h.inner.weight, h.middle(MIDDLE).weight

        def boundary(name: str) -> Stage:
            weight = base2 + h.boundary.weight
            return Stage(name, hidden + cast * weight, 0, 0, weight, 2 * hidden, hidden + classified)

        def on_map(name: str, kept: int, weight: int, backward: int) -> Stage:
            return Stage(name, kept + cast * weight, 0, wide, weight, backward, wide + classified)

        nowhere = FLOAT * c.map_channels + e * h.narrow + cast * c.map_channels
        places = 2 * LONG * (h.cells // h.batch)
        z = e * h.steps * c.map_channels * c.inner_bins
        return (
            Stage(
                "base 1",
                kept=hidden + cast * (h.steps * h.num_features + base1),
                weight=base1,
                backward=hidden + features + cast * h.steps * h.num_features,
                pending=features,
            ),
            Stage("base 2", hidden + cast * base2, 0, 0, base2, hidden, hidden + classified),
            boundary("start"),
            boundary("end"),
            Stage("sampled", hidden + cast * sampled, 0, 0, sampled, hidden, hidden + classified),
            # align_linear makes Z out of rows of its features and its weight, copied where they are not as they should
            # be.
            Stage(
                "align",
                forward=z + hidden + cast * inner + aligned,
                weight=inner,
                backward=z + 2 * hidden + cast * inner,
                pending=hidden + classified,
            ),
            Stage("aligned", kept=aligned, forward=aligned, backward=aligned, pending=aligned + classified),
            Stage(
                "reduce", reduced + cast * h.reduce.weight, 0, reduced, h.reduce.weight,
                max(aligned, reduced), aligned + classified,
            ),
            Stage(
                "map",
                kept=wide + nowhere + (places // 2 if released else 0),
                forward=places,
                backward=wide + reduced,
                pending=reduced + classified,
            ),
            on_map("middle 1", wide, middle, wide),
            on_map("middle 2", wide, middle, wide),
            on_map("last", 0, h.last.weight, 4 * e * dense + wide),
        )  # fmt: skip

    def _conv(self, channels: int, groups: int) -> Layer:
        """Over three snippets, to the hidden channels."""
        return Layer(channels // groups * self.config.hidden * 3, self.config.hidden)

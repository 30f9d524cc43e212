"""A `Head` that scores every (start, duration) of a window: labels, loss and decoding, the same for G-TAD and BMN."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from lofi_fast.config import HeadConfig
from lofi_fast.head.loss import Counts, tal_loss
from lofi_fast.head.map_decoding import WindowMaps, window_proposals
from lofi_fast.head.maps import HeadOutput
from lofi_fast.head.protocol import Array, Head, NotFiniteOutput, Proposals
from lofi_fast.head.targets import Targets, make_targets


class MapHead(Head):
    """What belongs to a network that gives a `HeadOutput`."""

    WITH_BOUNDARIES: ClassVar[bool] = False  # whether a proposal's score counts its start's and its end's too

    config: HeadConfig
    num_classes: int

    @abstractmethod
    def max_duration(self, num_snippets: int) -> int:
        """D of a rung of so many snippets."""

    def targets(self, edges: Array, segments: Array, labels: NDArray[np.int64], random: np.random.Generator) -> Targets:
        """See `make_targets`."""
        longest = self.max_duration(len(edges) - 1)
        return make_targets(
            edges, segments, labels, longest, self.num_classes, random, with_zero=self.config.sample_zero_iou
        )

    def counts(self, targets: Sequence[Targets]) -> Counts:
        """See `Counts`."""
        return Counts.of(targets, self.config.positive_iou)

    def loss(
        self, output: HeadOutput, targets: Sequence[Targets], counts: Counts, class_weight: float
    ) -> dict[str, Tensor]:
        """See `tal_loss`."""
        stacked = Targets.stack(targets, output.start_BL.device)
        config = self.config
        terms = tal_loss(
            output, stacked, counts, positive_iou=config.positive_iou, class_weight=class_weight,
            regression_weight=config.regression_loss, confidence_weight=config.confidence_loss,
        )  # fmt: skip
        return terms.by_name()

    def proposals(self, output: HeadOutput, edges: Sequence[Array]) -> list[Proposals]:
        """See `window_proposals`."""
        logits = (output.start_BL, output.end_BL, output.proposals_B2N, output.classes_BKN)
        if not all(bool(part.isfinite().all()) for part in logits):
            raise NotFiniteOutput("a logit is not finite")
        return [
            window_proposals(_maps(output, row, times), with_boundaries=self.WITH_BOUNDARIES)
            for row, times in enumerate(edges)
        ]


def _maps(output: HeadOutput, row: int, edges: Array) -> WindowMaps:
    """One window's probabilities out of a batch's logits, as maps over (duration, start)."""
    length = output.start_BL.shape[1]
    d, s = (index.cpu().numpy() for index in output.cells_N2.unbind(1))
    num_durations = int(d.max()) + 1
    confidence = np.zeros((num_durations, length))
    confidence[d, s] = output.proposals_B2N[row].float().sigmoid().prod(dim=0).cpu().numpy()
    classes = output.classes_BKN[row].float().sigmoid().cpu().numpy()
    class_probs = np.zeros((len(classes), num_durations, length))
    class_probs[:, d, s] = classes
    return WindowMaps(
        edges=edges,
        start=output.start_BL[row].float().sigmoid().cpu().numpy(),
        end=output.end_BL[row].float().sigmoid().cpu().numpy(),
        confidence=confidence,
        class_probs=class_probs,
    )

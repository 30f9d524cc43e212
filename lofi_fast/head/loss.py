"""The TAL loss of G-TAD and BMN: TEM + 10 * PEM_reg + PEM_cls (G-TAD on THUMOS: TEM + PEM_reg + 10 * PEM_cls), and our
class loss beside it.

The class loss is a balanced binary cross-entropy of every class at every cell, as the other terms are: half of it is
the mean over what is shown, half the mean over what is absent. The classes of a cell do not compete, so a segment may
carry several labels, as most do in MultiTHUMOS and some in THUMOS14 (a CliffDiving is a Diving too). With a softmax in
its place the labels of one segment share one probability, and rank below a wrong guess about a segment of one label.

Every term is a sum over cells divided by a count that the labels alone give. The counts are taken first (`Counts`), so
that the loss of a batch split into parts, each divided by the whole batch's counts, adds up to the whole batch's loss.
A count of zero (no positive at L=25 is common) leaves its term out: no NaN, ever.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from lofi_fast.head.maps import HeadOutput
from lofi_fast.head.targets import ABSENT, POSITIVE_BOUNDARY, SHOWN, Targets

REGRESSION_WEIGHT = 10.0
TERMS = ("boundary", "regression", "confidence", "classes")


@dataclass(frozen=True)
class Counts:
    """How many entries each term is averaged over: (positive, negative) pairs and the regression cells."""

    start: tuple[int, int]
    end: tuple[int, int]
    map: tuple[int, int]
    classes: tuple[int, int]
    regression: int

    def __add__(self, other: Counts) -> Counts:
        """Of the windows of both."""

        def both(mine: tuple[int, int], others: tuple[int, int]) -> tuple[int, int]:
            return mine[0] + others[0], mine[1] + others[1]

        return Counts(
            start=both(self.start, other.start),
            end=both(self.end, other.end),
            map=both(self.map, other.map),
            classes=both(self.classes, other.classes),
            regression=self.regression + other.regression,
        )

    @staticmethod
    def of(targets: Sequence[Targets], positive_iou: float) -> Counts:
        """Counts over the windows of an optimiser step, from their labels."""

        def split(positive: Sequence[Tensor]) -> tuple[int, int]:
            ones = sum(int(p.sum()) for p in positive)
            return ones, sum(p.numel() for p in positive) - ones

        return Counts(
            start=split([t.start > POSITIVE_BOUNDARY for t in targets]),
            end=split([t.end > POSITIVE_BOUNDARY for t in targets]),
            map=split([t.iou > positive_iou for t in targets]),
            classes=(
                sum(int((t.classes == SHOWN).sum()) for t in targets),
                sum(int((t.classes == ABSENT).sum()) for t in targets),
            ),
            regression=sum(int(t.regression.sum()) for t in targets),
        )


@dataclass(frozen=True)
class LossTerms:
    """Each term weighted as it enters the total (0-d tensors)."""

    boundary: Tensor
    regression: Tensor
    confidence: Tensor
    classes: Tensor

    @property
    def total(self) -> Tensor:
        return self.boundary + self.regression + self.confidence + self.classes

    def by_name(self) -> dict[str, Tensor]:
        """The terms in the order that they are summed in."""
        return {name: getattr(self, name) for name in TERMS}


def _balanced(losses: Tensor, positive: Tensor, negative: Tensor, counts: tuple[int, int]) -> Tensor:
    """Half the mean over positives plus half the mean over negatives: upstream's class-balanced BCE, rearranged."""
    positives = (losses * positive).sum() / max(counts[0], 1)
    negatives = (losses * negative).sum() / max(counts[1], 1)
    return 0.5 * (positives + negatives)


def _balanced_bce(logits: Tensor, positive: Tensor, counts: tuple[int, int]) -> Tensor:
    losses = F.binary_cross_entropy_with_logits(logits.float(), positive.float(), reduction="none")
    return _balanced(losses, positive, ~positive, counts)


def _class_loss(logits_BKN: Tensor, classes_BKN: Tensor, counts: tuple[int, int]) -> Tensor:
    """The same over the classes of cells, where some are neither positive nor negative."""
    shown, logits = classes_BKN == SHOWN, logits_BKN.float()
    losses = F.softplus(torch.where(shown, -logits, logits))
    return _balanced(losses, shown, classes_BKN == ABSENT, counts)


def tal_loss(
    output: HeadOutput, targets: Targets, counts: Counts, *, positive_iou: float, class_weight: float,
    regression_weight: float = REGRESSION_WEIGHT, confidence_weight: float = 1.0,
) -> LossTerms:  # fmt: skip
    """Loss of stacked `targets` (leading B) against the head's output for the same windows."""
    regression_logits, confidence_logits = output.proposals_B2N.unbind(1)
    squared = (regression_logits.float().sigmoid() - targets.iou).square() * targets.regression
    return LossTerms(
        boundary=_balanced_bce(output.start_BL, targets.start > POSITIVE_BOUNDARY, counts.start)
        + _balanced_bce(output.end_BL, targets.end > POSITIVE_BOUNDARY, counts.end),
        regression=regression_weight * 0.5 * squared.sum() / max(counts.regression, 1),
        confidence=confidence_weight * _balanced_bce(confidence_logits, targets.iou > positive_iou, counts.map),
        classes=class_weight * _class_loss(output.classes_BKN, targets.classes, counts.classes)
        if class_weight
        else torch.zeros((), device=output.start_BL.device),
    )

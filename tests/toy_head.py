"""A head in one file, as a newcomer would write one: classes of single snippets, and segments by joining them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from lofi_fast.config import Config
from lofi_fast.head.protocol import Array, Head, NotFiniteOutput, Proposals

LONGEST = 6  # snippets of a proposal


class ToyHead(Head):
    """Logits (B, K + 1, L) of each snippet's class; the last is background."""

    def __init__(self, num_features: int, num_classes: int) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.layers = nn.Sequential(
            nn.Conv1d(num_features, 32, 3, padding=1), nn.ReLU(), nn.Conv1d(32, num_classes + 1, 3, padding=1)
        )

    def forward(self, features_BCL: Tensor) -> Tensor:
        logits: Tensor = self.layers(features_BCL)
        return logits

    def targets(self, edges: Array, segments: Array, labels: NDArray[np.int64], random: np.random.Generator) -> Tensor:
        """Class (L,) of the segment that holds a snippet's centre."""
        classes = np.full(len(edges) - 1, self.num_classes)
        centres = (edges[:-1] + edges[1:]) / 2
        for (start, end), label in zip(segments, labels, strict=True):
            classes[(start <= centres) & (centres <= end)] = label
        return torch.from_numpy(classes)

    def counts(self, targets: Sequence[Tensor]) -> int:
        """Snippets."""
        return sum(len(target) for target in targets)

    def loss(self, output: Tensor, targets: Sequence[Tensor], counts: int, class_weight: float) -> dict[str, Tensor]:
        labels = torch.stack(list(targets)).to(output.device)
        return {"snippets": F.cross_entropy(output.float(), labels, reduction="sum") / counts}

    def proposals(self, output: Tensor, edges: Sequence[Array]) -> list[Proposals]:
        if not bool(output.isfinite().all()):
            raise NotFiniteOutput("a logit is not finite")
        probabilities = output.double().softmax(1).cpu().numpy()
        return [self._window(row, times) for row, times in zip(probabilities, edges, strict=True)]

    def _window(self, probabilities_KL: Array, edges: Array) -> Proposals:
        length = len(edges) - 1
        spans = [(s, s + d) for d in range(1, LONGEST + 1) for s in range(length - d + 1)]
        means = np.stack([probabilities_KL[:, s:e].mean(axis=1) for s, e in spans], axis=1)
        return Proposals(
            segments_P2=np.array([(edges[s], edges[e]) for s, e in spans]),
            scores_P=1 - means[-1],
            class_probs_KP=means[:-1],
        )


def make_head(config: Config, num_features: int, num_classes: int) -> ToyHead:
    return ToyHead(num_features, num_classes)

"""Segments of several labels, from the head's targets through its training to what it detects."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from lofi_fast.config import HeadConfig, StageConfig
from lofi_fast.head.decoding import detections
from lofi_fast.head.gtad_head import GTADHead
from lofi_fast.head.protocol import total
from lofi_fast.metrics import mean_average_precision
from lofi_fast.optim import make_optimizer

CLASSES = ("cliff diving", "diving", "running")
KINDS = ((0, 1), (1,), (2,), (0,))  # the labels of a segment
LENGTH, CHANNELS, BATCH = 8, 8, 16
EDGES = np.arange(LENGTH + 1.0)
SMALL = HeadConfig(
    hidden=16, groups=2, inner_bins=4, context_bins=2, map_channels=16, class_bins=2, positive_iou=0.7,
    sample_zero_iou=True,
)  # fmt: skip
Window = tuple[np.ndarray, np.ndarray, np.ndarray]  # features (C, L), segments (G, 2), labels (G,)


def windows(count: int, seed: int) -> list[Window]:
    """One or two segments apart from each other, whose features are the sum of their labels' own directions."""
    random, made = np.random.default_rng(seed), []
    directions = 3 * np.eye(len(CLASSES), CHANNELS)
    for _ in range(count):
        features = 0.3 * random.standard_normal((CHANNELS, LENGTH))
        segments, labels, start = [], [], int(random.integers(0, 3))
        while start < LENGTH - 2:
            end = min(start + int(random.integers(2, 5)), LENGTH)
            kind = KINDS[random.integers(len(KINDS))]
            for label in kind:
                segments.append((float(start), float(end)))
                labels.append(label)
                features[:, start:end] += directions[label][:, None]
            start = end + int(random.integers(1, 4))
        made.append((features.astype(np.float32), np.array(segments), np.array(labels)))
    return made


def trained(examples: Sequence[Window]) -> GTADHead:
    torch.manual_seed(0)
    head = GTADHead(SMALL, CHANNELS, len(CLASSES), LENGTH).train()
    stage = StageConfig(epochs=25, batch=BATCH, optimizer="adamw", lr=3e-3)
    optimizer = make_optimizer(stage, head.parameters(), "torch")
    for epoch in range(stage.epochs):
        order = np.random.default_rng(epoch).permutation(len(examples))
        for part in (order[k : k + BATCH] for k in range(0, len(order), BATCH)):
            targets = [head.targets(EDGES, *examples[i][1:], np.random.default_rng([epoch, int(i)])) for i in part]
            output = head(torch.from_numpy(np.stack([examples[i][0] for i in part])))
            total(head.loss(output, targets, head.counts(targets), 1.0)).backward()
            optimizer.step()
            optimizer.zero_grad()
    return head.eval()


def test_both_labels_of_a_segment_are_learned() -> None:
    """Beside segments of each alone, so that neither class tells the other."""
    with torch.random.fork_rng():
        head = trained(windows(64, 1))
    tried = windows(30, 2)
    with torch.no_grad():
        found = head.proposals(head(torch.from_numpy(np.stack([features for features, *_ in tried]))), [EDGES] * 30)
    predictions, truth = {}, {}
    for index, (window, (_, segments, labels)) in enumerate(zip(found, tried, strict=True)):
        truth[str(index)] = [(a, b, CLASSES[k]) for (a, b), k in zip(segments.tolist(), labels, strict=True)]
        predictions[str(index)] = [
            (d.start, d.end, d.label, d.score) for d in detections([window], CLASSES, duration=LENGTH, sigma=0.4)
        ]
    result = mean_average_precision(truth, predictions, np.array([0.5]))
    precision = dict(zip(result.classes, result.average_precision[:, 0].tolist(), strict=True))
    assert min(precision.values()) > 0.7, precision

"""Definition of Gaussian soft-NMS and plain NMS on time segments; the C++ form equals it to the bit.

Shapes: N candidates, K kept. segments_N2 float64 (start, end), scores_N float64, labels_N int64, order_K int64.
Only candidates of one label compete, and the label-free case is one label for all.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def iou_with(segment_2: Tensor, segments_N2: Tensor) -> Tensor:
    """Temporal IoU (N,) of one segment with N; 0 where the union has no length (two points)."""
    start, end = segment_2
    starts_N, ends_N = segments_N2.unbind(1)
    inter_N = (torch.minimum(end, ends_N) - torch.maximum(start, starts_N)).clamp(min=0)
    union_N = (end - start) + (ends_N - starts_N) - inter_N
    return torch.where(union_N > 0, inter_N / union_N, torch.zeros_like(inter_N))


def soft_nms(
    segments_N2: Tensor,
    scores_N: Tensor,
    labels_N: Tensor,
    sigma: float,
    threshold: float,
    threshold_slope: float,
    max_keep: int | None,
    min_score: float,
) -> tuple[Tensor, Tensor]:
    """Select the best candidate i, then s_j *= exp(-IoU(i, j)^2 / sigma) for the others of its label; repeat."""
    decayed_N = scores_N.clone()
    waiting_N = torch.ones_like(scores_N, dtype=torch.bool)
    limit = len(scores_N) if max_keep is None else min(max_keep, len(scores_N))
    order: list[int] = []
    while len(order) < limit:
        best = int(torch.where(waiting_N, decayed_N, -math.inf).argmax())  # the first of equals
        if decayed_N[best] < min_score:
            break
        order.append(best)
        waiting_N[best] = False
        start, end = segments_N2[best].tolist()
        iou_N = iou_with(segments_N2[best], segments_N2)
        rivals_N = waiting_N & (labels_N == labels_N[best]) & (iou_N > threshold + threshold_slope * (end - start))
        # math.exp is the C library's, as in C++; torch.exp may differ in the last bit, and an order hangs on it.
        factors = [math.exp(-(iou * iou) / sigma) for iou in iou_N[rivals_N].tolist()]
        decayed_N[rivals_N] *= torch.tensor(factors, dtype=torch.float64)
    order_K = torch.tensor(order, dtype=torch.int64)
    return order_K, decayed_N[order_K]


def nms(segments_N2: Tensor, scores_N: Tensor, labels_N: Tensor, iou_threshold: float) -> Tensor:
    """By falling score, keep a candidate unless its IoU with a kept one of its label is above the threshold."""
    suppressed_N = torch.zeros_like(scores_N, dtype=torch.bool)
    order: list[int] = []
    for candidate in scores_N.argsort(descending=True, stable=True).tolist():
        if suppressed_N[candidate]:
            continue
        order.append(candidate)
        iou_N = iou_with(segments_N2[candidate], segments_N2)
        suppressed_N |= (labels_N == labels_N[candidate]) & (iou_N > iou_threshold)
    return torch.tensor(order, dtype=torch.int64)

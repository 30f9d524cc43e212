"""Gaussian soft-NMS as G-TAD and BSN publish it: Python lists, popped one by one."""

from __future__ import annotations

import math
from collections.abc import Sequence


def published_soft_nms(
    segments: Sequence[tuple[float, float]], scores: Sequence[float], sigma: float, max_keep: int
) -> tuple[list[int], list[float]]:
    """(order, decayed scores) of the `max_keep` best. The last candidate of all is kept, which upstream drops."""
    starts, ends = [start for start, _ in segments], [end for _, end in segments]
    waiting, indices = list(scores), list(range(len(scores)))
    order: list[int] = []
    decayed: list[float] = []
    while waiting and len(order) < max_keep:
        best = waiting.index(max(waiting))
        for other in range(len(waiting)):
            if other != best:
                iou = _iou(starts[best], ends[best], starts[other], ends[other])
                if iou > 0:
                    waiting[other] = waiting[other] * math.exp(-(iou * iou) / sigma)
        order.append(indices.pop(best))
        decayed.append(waiting.pop(best))
        starts.pop(best)
        ends.pop(best)
    return order, decayed


def _iou(start: float, end: float, other_start: float, other_end: float) -> float:
    if other_start > end or start > other_end:
        return 0.0
    return (min(end, other_end) - max(start, other_start)) / (max(end, other_end) - min(start, other_start))

"""Non-maximum suppression of detections in time: Gaussian soft-NMS and the plain kind. Both run on the CPU."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import library
from . import reference


def soft_nms(
    segments: Tensor,
    scores: Tensor,
    labels: Tensor | None = None,
    *,
    sigma: float = 0.84,
    threshold: float = 0.0,
    threshold_slope: float = 0.0,
    max_keep: int | None = None,
    min_score: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Gaussian soft-NMS: take the best candidate i, multiply the others' scores by exp(-IoU(i, j)^2 / sigma), repeat.

    Args:
        segments: (N, 2) start and end in seconds, start <= end.
        scores: (N,) at least 0.
        labels: (N,) int64 classes, or None. Only candidates of one class decay each other.
        sigma: width of the Gaussian in units of IoU^2.
        threshold: scores decay only where the IoU is above it (G-TAD: 0).
        threshold_slope: IoU per second of the taken segment's length, added to the threshold. BMN's
            low + (high - low) * width is threshold=low, threshold_slope=(high - low) / duration of the video.
        max_keep: stop after so many over all classes; None runs to the last candidate.
        min_score: stop when the best decayed score is below it.

    Returns:
        order (K,) int64, indices into the input by falling decayed score, equal scores by rising index; and the decayed
        scores (K,) in that order, in the dtype of ``scores``. All arithmetic is float64. Tensors of another device are
        copied to the CPU and the results back. There is no gradient.

    Raises:
        ValueError: a NaN or an infinity, a segment that ends before it starts, a negative score, or a wrong shape,
            dtype or setting.

    Source: Bodla et al., "Soft-NMS", ICCV 2017; thresholds as in the G-TAD and BMN post-processing, except that the
    last candidate is kept.
    """
    checked = _checked(segments, scores, labels)
    if bool((checked[1] < 0).any()):
        raise ValueError("soft_nms: scores must be at least 0, since a decay would raise a negative one")
    if not sigma > 0:
        raise ValueError(f"soft_nms: sigma must be above 0, not {sigma}")
    if max_keep is not None and max_keep < 0:
        raise ValueError(f"soft_nms: max_keep must be at least 0 or None, not {max_keep}")
    order, decayed = torch.ops.lofi_fast.soft_nms(*checked, sigma, threshold, threshold_slope, max_keep, min_score)
    return order.to(scores.device), decayed.to(scores)


def nms(segments: Tensor, scores: Tensor, labels: Tensor | None, iou_threshold: float) -> Tensor:
    """Plain NMS: by falling score, drop a candidate whose IoU with a kept one of its class is above the threshold.

    Args: as ``soft_nms``; scores may have any sign.

    Returns:
        order (K,) int64, indices of the kept candidates by falling score, equal scores by rising index.

    Raises:
        ValueError: a NaN or an infinity, a segment that ends before it starts, or a wrong shape or dtype.
    """
    order: Tensor = torch.ops.lofi_fast.nms(*_checked(segments, scores, labels), iou_threshold)
    return order.to(scores.device)


def _checked(segments: Tensor, scores: Tensor, labels: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """The operators' tensors (float64, float64, int64 on the CPU), or ValueError."""
    num = scores.numel()
    if scores.shape != (num,) or segments.shape != (num, 2):
        raise ValueError(
            f"segments must be (N, 2) and scores (N,), not {tuple(segments.shape)} and {tuple(scores.shape)}"
        )
    if not (segments.is_floating_point() and scores.is_floating_point()):
        raise ValueError(f"segments and scores must be floating point, not {segments.dtype} and {scores.dtype}")
    if labels is None:
        labels = torch.zeros(num, dtype=torch.int64)
    if labels.shape != (num,) or labels.dtype != torch.int64:
        raise ValueError(f"labels must be ({num},) int64, not {tuple(labels.shape)} {labels.dtype}")
    segments = segments.detach().to("cpu", torch.float64)
    scores = scores.detach().to("cpu", torch.float64)
    if not bool(segments.isfinite().all() and scores.isfinite().all()):
        raise ValueError("segments and scores must be finite: found a NaN or an infinity")
    if bool((segments[:, 1] < segments[:, 0]).any()):
        raise ValueError("every segment must end at or after its start")
    return segments, scores, labels.cpu()


def _soft_nms_fake(
    segments: Tensor,
    scores: Tensor,
    labels: Tensor,
    sigma: float,
    threshold: float,
    threshold_slope: float,
    max_keep: int | None,
    min_score: float,
) -> tuple[Tensor, Tensor]:
    num_kept = torch.library.get_ctx().new_dynamic_size()
    return scores.new_empty((num_kept,), dtype=torch.int64), scores.new_empty((num_kept,))


def _nms_fake(segments: Tensor, scores: Tensor, labels: Tensor, iou_threshold: float) -> Tensor:
    num_kept = torch.library.get_ctx().new_dynamic_size()
    return scores.new_empty((num_kept,), dtype=torch.int64)


library.define(
    "soft_nms(Tensor segments, Tensor scores, Tensor labels, float sigma, float threshold, float threshold_slope, "
    "int? max_keep, float min_score) -> (Tensor, Tensor)",
    reference.soft_nms,
    _soft_nms_fake,
)
library.define(
    "nms(Tensor segments, Tensor scores, Tensor labels, float iou_threshold) -> Tensor", reference.nms, _nms_fake
)

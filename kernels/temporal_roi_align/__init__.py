"""temporal_roi_align: Align1D, the mean of linearly interpolated samples in each bin of a temporal segment."""

from __future__ import annotations

import torch
from torch import Tensor

from ..library import forms
from .reference import temporal_roi_align_reference

__all__ = ["temporal_roi_align", "temporal_roi_align_reference"]

forms["cpu"]["temporal_roi_align"] = "reference"


def temporal_roi_align(features: Tensor, rois: Tensor, num_bins: int, sampling_ratio: int = 0) -> Tensor:
    """Temporal ROI-align (G-TAD's Align1D; equals torchvision's roi_align, aligned=False, on (B, C, T, 1)).

    Args:
        features: (B, C, T), floating point, T >= 1; any strides.
        rois: (R, 3) float32 on the same device: batch index, start, end, in snippet index units. They may lie outside
            [0, T-1]; a sample outside [-1, T] counts as zero. An ROI shorter than one snippet, empty or reversed
            becomes [start, start + 1]. No gradient flows to them.
        num_bins: bins an ROI is divided into.
        sampling_ratio: samples in each bin; 0 = adaptive, ceil(length / num_bins).

    Returns:
        (R, C, num_bins) in the dtype of features; coordinates are always float32, sums at least float32.

    Raises:
        ValueError: a wrong shape, dtype or device, num_bins < 1, sampling_ratio < 0, or, among the ROI values, a
            number that is not finite or a batch index outside [0, B).

    Reference form (no dispatcher operator yet): this calls the definition, ``temporal_roi_align_reference``. Its time
    and its memory under autograd grow with the longest ROI's sample count, and on a GPU each call waits for the device
    to check the ROIs and to count the samples.
    """
    if features.dim() != 3 or not features.is_floating_point():
        raise ValueError(
            f"temporal_roi_align: features must be floating point (B, C, T), "
            f"got {features.dtype} of shape {tuple(features.shape)}"
        )
    if features.shape[2] < 1:
        raise ValueError("temporal_roi_align: features must have at least one snippet (T >= 1)")
    if rois.dim() != 2 or rois.shape[1] != 3 or rois.dtype != torch.float32:
        raise ValueError(
            f"temporal_roi_align: rois must be float32 (R, 3), got {rois.dtype} of shape {tuple(rois.shape)}"
        )
    if rois.device != features.device:
        raise ValueError(f"temporal_roi_align: rois are on {rois.device}, features on {features.device}")
    if num_bins < 1:
        raise ValueError(f"temporal_roi_align: num_bins must be at least 1, got {num_bins}")
    if sampling_ratio < 0:
        raise ValueError(f"temporal_roi_align: sampling_ratio must be 0 (adaptive) or more, got {sampling_ratio}")
    rois = rois.detach()
    batch = rois[:, 0]
    if not bool((rois.isfinite().all() & (batch >= 0).all() & (batch < features.shape[0]).all()).item()):
        raise ValueError(
            f"temporal_roi_align: rois must be finite, with a batch index in [0, {features.shape[0]}) in column 0"
        )
    return temporal_roi_align_reference(features, rois, num_bins, sampling_ratio)

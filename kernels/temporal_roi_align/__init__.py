"""temporal_roi_align: Align1D, the mean of linearly interpolated samples in each bin of a temporal segment."""

from __future__ import annotations

import weakref
from functools import cache
from typing import Any

import torch
from torch import Tensor

from .. import library
from . import reference
from .reference import temporal_roi_align_reference

__all__ = ["temporal_roi_align", "temporal_roi_align_reference"]


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
        (R, C, num_bins) in the dtype of features, as the transposed view of a contiguous (R, num_bins, C) tensor: a
        linear layer over (bin, channel) reads ``out.transpose(1, 2).flatten(1)`` without a copy. Coordinates are always
        float32, and which side of -1 or T a sample falls on is the same in every form; sums are at least float32.

    Raises:
        ValueError: a wrong shape, dtype or device, num_bins < 1, sampling_ratio < 0, or, among the ROI values, a
            number (or a length) that is not finite or a batch index outside [0, B).

    The gradient is a sum in a fixed order, without atomics, and for it only the ROIs are saved; differentiable once. On
    a GPU a call waits for the device to check the ROIs, unless they are the tensor that was checked last, unchanged.
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
    if not _were_checked(rois, features.shape[0]):
        batch, starts, ends = rois.detach().unbind(1)
        finite = starts.isfinite() & (ends - starts).isfinite()
        if not bool((finite & (batch >= 0) & (batch < features.shape[0])).all().item()):
            raise ValueError(
                f"temporal_roi_align: rois must be finite, with a batch index in [0, {features.shape[0]}) in column 0"
            )
        _remember(rois, features.shape[0])
    run = library.operator("temporal_roi_align", features)
    aligned: Tensor = run(features, rois.detach(), num_bins, sampling_ratio)
    return aligned


# The ROIs that were checked last on a GPU: the tensor, its version, and the size of the batch.
_checked: tuple[weakref.ref[Tensor], int, int] | None = None


def _were_checked(rois: Tensor, batch: int) -> bool:
    if _checked is None or not rois.is_cuda or rois.is_inference():
        return False
    last, version, last_batch = _checked
    return last() is rois and rois._version == version and last_batch == batch


def _remember(rois: Tensor, batch: int) -> None:
    global _checked
    if rois.is_cuda and not rois.is_inference():  # an inference tensor has no version
        _checked = (weakref.ref(rois), rois._version, batch)


@cache
def _kernel() -> Any:
    """The module of the Triton forms, imported when one first runs: elsewhere Triton may be missing."""
    from . import kernel

    return kernel


def _triton(*arguments: Any) -> Any:
    return _kernel().temporal_roi_align(*arguments)


def _backward_triton(*arguments: Any) -> Any:
    return _kernel().temporal_roi_align_backward(*arguments)


def _fake(features: Tensor, rois: Tensor, num_bins: int, sampling_ratio: int) -> Tensor:
    return features.new_empty(rois.shape[0], num_bins, features.shape[1]).transpose(1, 2)


def _backward_fake(
    grad: Tensor, rois: Tensor, batch: int, num_snippets: int, num_bins: int, sampling_ratio: int
) -> Tensor:
    return grad.new_empty(batch, num_snippets, grad.shape[1]).transpose(1, 2)


def _setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, int, int], output: Tensor) -> None:
    features, rois, num_bins, sampling_ratio = inputs
    ctx.save_for_backward(rois)
    ctx.arguments = (features.shape[0], features.shape[2], num_bins, sampling_ratio)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None, None, None]:
    (rois,) = ctx.saved_tensors
    run = library.operator("temporal_roi_align_backward", grad)
    return run(grad, rois, *ctx.arguments), None, None, None


library.define(
    "temporal_roi_align(Tensor features, Tensor rois, int num_bins, int sampling_ratio) -> Tensor",
    reference.temporal_roi_align_reference,
    _fake,
    triton=_triton,
)
library.define(
    "temporal_roi_align_backward(Tensor grad, Tensor rois, SymInt batch, SymInt num_snippets, int num_bins, "
    "int sampling_ratio) -> Tensor",
    reference.temporal_roi_align_backward_reference,
    _backward_fake,
    triton=_backward_triton,
)
library.differentiate("temporal_roi_align", _backward, _setup_context)

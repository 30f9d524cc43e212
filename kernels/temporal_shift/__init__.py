"""temporal_shift: moves a part of the channels one frame back and one frame on, inside each snippet."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..library import forms
from .reference import temporal_shift_reference

__all__ = ["temporal_shift", "temporal_shift_reference"]

forms["cpu"]["temporal_shift"] = "PyTorch"


def temporal_shift(x: Tensor, num_frames: int, fold: int | None = None) -> Tensor:
    """Bidirectional, zero-filled temporal shift: TSM (Lin et al. 2019), github.com/mit-han-lab/temporal-shift-module.

    In each snippet of ``num_frames`` frames, channels [0, fold) take the next frame's value, channels [fold, 2*fold)
    the previous frame's, the others stay. A value that would come from outside the snippet is zero.

    Args:
        x: (N*T, C, H, W), any dtype, any strides. The frames of one snippet are consecutive.
        num_frames: T, frames in one snippet. Given at each call: a step's frame count may change.
        fold: channels moved in each direction; C // 8 where None.

    Returns:
        A new tensor of x's shape, dtype and memory format (channels-last stays channels-last). Never an alias of x.

    Raises:
        ValueError: x is not 4-D, num_frames < 1, N*T is not a multiple of num_frames, or fold is outside [0, C // 2].

    PyTorch form, called directly (no dispatcher operator yet): slice copies that read and write each element once, on
    every device; the gradient is the opposite shift. The definition is ``temporal_shift_reference``.
    """
    if x.dim() != 4:
        raise ValueError(f"temporal_shift: x must be (N*T, C, H, W), got {x.dim()} dimensions")
    num_images, channels = x.shape[:2]
    if num_frames < 1:
        raise ValueError(f"temporal_shift: num_frames must be at least 1, got {num_frames}")
    if num_images % num_frames:
        raise ValueError(
            f"temporal_shift: {num_images} images are not a whole number of snippets of num_frames={num_frames}"
        )
    if fold is None:
        fold = channels // 8
    if not 0 <= 2 * fold <= channels:
        raise ValueError(f"temporal_shift: fold={fold} does not fit in {channels} channels twice")
    shifted: Tensor = _Shift.apply(x, num_frames, fold, False)  # type: ignore[no-untyped-call]
    return shifted


def _shift(x: Tensor, num_frames: int, fold: int, adjoint: bool) -> Tensor:
    # empty_like keeps the strides' order, so the copies below run along memory in both layouts.
    y = torch.empty_like(x)
    snippets = x.shape[0] // num_frames
    x_NTCHW = x.view(snippets, num_frames, *x.shape[1:])
    y_NTCHW = y.view(snippets, num_frames, *x.shape[1:])
    first, second, still = slice(0, fold), slice(fold, 2 * fold), slice(2 * fold, None)
    from_next, from_previous = (second, first) if adjoint else (first, second)
    y_NTCHW[:, :-1, from_next] = x_NTCHW[:, 1:, from_next]
    y_NTCHW[:, -1, from_next] = 0
    y_NTCHW[:, 1:, from_previous] = x_NTCHW[:, :-1, from_previous]
    y_NTCHW[:, 0, from_previous] = 0
    y_NTCHW[:, :, still] = x_NTCHW[:, :, still]
    return y


class _Shift(torch.autograd.Function):
    """The shift, or its adjoint; each is the other's derivative, so it can be differentiated any number of times."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, num_frames: int, fold: int, adjoint: bool) -> Tensor:
        ctx.arguments = (num_frames, fold, adjoint)
        return _shift(x, num_frames, fold, adjoint)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        num_frames, fold, adjoint = ctx.arguments
        grad_x = _Shift.apply(grads[0], num_frames, fold, not adjoint)  # type: ignore[no-untyped-call]
        return grad_x, None, None, None

"""temporal_shift: moves a part of the channels one frame back and one frame on, inside each snippet."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor

from .. import library
from . import reference

__all__ = ["check_snippets", "temporal_shift"]


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
        The gradient is the opposite shift, so it can be differentiated any number of times; nothing is saved for it.

    Raises:
        ValueError: x is not 4-D, num_frames < 1, N*T is not a multiple of num_frames, or fold is outside [0, C // 2].
    """
    fold = check_snippets("temporal_shift", "x", x, num_frames, fold)
    shifted: Tensor = library.operator("temporal_shift", x)(x, num_frames, fold, False)
    return shifted


def check_snippets(op: str, argument: str, x: Tensor, num_frames: int, fold: int | None) -> int:
    """ValueError unless ``x`` is whole snippets of ``num_frames`` frames in which ``fold`` channels can be shifted.

    Returns fold, or its default.
    """
    if x.dim() != 4:
        raise ValueError(f"{op}: {argument} must be (N*T, C, H, W), got {x.dim()} dimensions")
    num_images, channels = x.shape[:2]
    if num_frames < 1:
        raise ValueError(f"{op}: num_frames must be at least 1, got {num_frames}")
    if num_images % num_frames:
        raise ValueError(f"{op}: {num_images} images are not a whole number of snippets of num_frames={num_frames}")
    if fold is None:
        fold = channels // 8
    if not 0 <= 2 * fold <= channels:
        raise ValueError(f"{op}: fold={fold} does not fit in {channels} channels twice")
    return fold


@cache
def _kernel() -> Any:
    """The module of the Triton forms, imported when one first runs: elsewhere Triton may be missing."""
    from . import kernel

    return kernel


def _triton(*arguments: Any) -> Any:
    return _kernel().temporal_shift(*arguments)


def _fake(x: Tensor, num_frames: int, fold: int, adjoint: bool) -> Tensor:
    return torch.empty_like(x)


def _setup_context(ctx: Any, inputs: tuple[Tensor, int, int, bool], output: Tensor) -> None:
    _, *ctx.arguments = inputs


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
    num_frames, fold, adjoint = ctx.arguments
    return library.operator("temporal_shift", grad)(grad, num_frames, fold, not adjoint), None, None, None


library.define(
    "temporal_shift(Tensor x, int num_frames, int fold, bool adjoint) -> Tensor",
    reference.temporal_shift,
    _fake,
    triton=_triton,
)
library.differentiate("temporal_shift", _backward, _setup_context)

"""The definition of the stem: affine, ReLU and 3x3/2 max pool over the first convolution's output, and its gradient.

Shapes: N frames, C channels, H x W pixels of the convolution's output, h x w windows, h = (H - 1) // 2 + 1. Window
(i, j) covers the pixels (2i - 1 + ky, 2j - 1 + kx), ky and kx in 0..2, those of them that exist; its positions are
numbered 3*ky + kx. With v = relu(x * scale_C + bias_C), kept in float32 (float64 for float64), where a scale that is
None stands for 1:

    pooled[i, j] = max of v over the window, rounded to x's dtype
    argmax[i, j] = its first position with that maximum; the last position with a NaN where there is one
    grad_x[p]    = scale_C * sum of grad[i, j] over the windows whose argmax is p, unless pooled[i, j] <= 0

The maximum is chosen before rounding. Rounding is monotone, so pooled does not depend on that; but values that only
the dtype of x makes equal do not tie, and the gradient goes where the larger one is.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def memory_format(x: Tensor) -> torch.memory_format:
    """What the results of x (N, C, H, W) are laid out in: channels-last where its channels are adjacent."""
    channels_last = x.stride(1) == 1 and not x.is_contiguous()
    return torch.channels_last if channels_last else torch.contiguous_format


def empty_beside(x: Tensor, size: Sequence[int], dtype: torch.dtype | None = None) -> Tensor:
    """An uninitialised tensor on x's device, in its memory format and, unless told otherwise, its dtype."""
    if memory_format(x) == torch.contiguous_format:
        return x.new_empty(size, dtype=dtype)
    _, channels, height, width = size
    strides = (height * width * channels, 1, width * channels, channels)
    return x.new_empty_strided(size, strides, dtype=dtype)  # half the host's time of torch.empty with a memory format


def stem(x_NCHW: Tensor, scale_C: Tensor | None, bias_C: Tensor) -> tuple[Tensor, Tensor]:
    """(pooled_NChw in x's dtype, argmax_NChw int8)."""
    width = x_NCHW.shape[3]
    v_NCHW = x_NCHW.to(bias_C.dtype)
    if scale_C is not None:
        v_NCHW = v_NCHW * scale_C.view(-1, 1, 1)
    v_NCHW = F.relu(v_NCHW + bias_C.view(-1, 1, 1))
    maximum_NChw, pixel_NChw = F.max_pool2d(v_NCHW, 3, 2, 1, return_indices=True)
    rows_h1 = 2 * torch.arange(pixel_NChw.shape[2], device=x_NCHW.device).view(-1, 1) - 1
    columns_w = 2 * torch.arange(pixel_NChw.shape[3], device=x_NCHW.device) - 1
    ky_NChw = pixel_NChw // width - rows_h1
    kx_NChw = pixel_NChw % width - columns_w
    pooled_NChw = empty_beside(x_NCHW, maximum_NChw.shape).copy_(maximum_NChw)
    argmax_NChw = empty_beside(x_NCHW, maximum_NChw.shape, torch.int8).copy_(3 * ky_NChw + kx_NChw)
    return pooled_NChw, argmax_NChw


def stem_backward(
    grad_NChw: Tensor, pooled_NChw: Tensor, argmax_NChw: Tensor, scale_C: Tensor | None, height: int, width: int
) -> Tensor:
    """grad_x_NCHW in the dtype and memory format of grad; sums in float32 (float64), in scan order of the windows."""
    num, channels, h, w = grad_NChw.shape
    # The padded image: window (i, j) begins at its pixel (2i, 2j).
    exact = torch.float64 if grad_NChw.dtype == torch.float64 else torch.float32
    sum_NCHW = torch.zeros(num, channels, 2 * h + 1, 2 * w + 1, dtype=exact, device=grad_NChw.device)
    passed_NChw = grad_NChw.to(exact).masked_fill(pooled_NChw <= 0, 0)
    for position in reversed(range(9)):  # a pixel's later positions belong to its earlier windows
        ky, kx = divmod(position, 3)
        sum_NCHW[:, :, ky : ky + 2 * h : 2, kx : kx + 2 * w : 2] += passed_NChw.masked_fill(argmax_NChw != position, 0)
    grad_x_NCHW = sum_NCHW[:, :, 1 : 1 + height, 1 : 1 + width]
    if scale_C is not None:
        grad_x_NCHW = grad_x_NCHW * scale_C.view(-1, 1, 1)
    return empty_beside(grad_NChw, grad_x_NCHW.shape).copy_(grad_x_NCHW)


def stem_input(frames_NHW3: Tensor, mean_3: Tensor, dtype: torch.dtype) -> Tensor:
    """frames - mean as (N, 3, H, W), channels-last, in float32 (float64 for float64) and rounded once to dtype."""
    exact = torch.float64 if dtype == torch.float64 else torch.float32
    centred_NHW3: Tensor = (frames_NHW3.contiguous().to(exact) - mean_3.to(exact)).to(dtype)
    return centred_NHW3.permute(0, 3, 1, 2)


def fold_normalization(weight: Tensor, std: Tensor) -> Tensor:
    """weight[:, c] / std[c], in weight's dtype."""
    return (weight / std.view(1, 3, 1, 1)).to(weight.dtype)

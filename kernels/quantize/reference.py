"""The definition of quantize and dequantize: plain PyTorch.

For each frame and channel, over its H x W values, in float32 (float64 for float64), every operation rounded once:

    m     = max(0, max x)                      NaN where a value is NaN
    step  = max(m / 255, smallest normal)      of the float32 (float64) numbers; NaN stays
    scale = step, but 0 where m is 0
    code  = max(1, round(x * (1 / step))), ties to even;  0 where x <= 0
    y     = code * scale                       rounded to the dtype that is asked for

The bound on step keeps 1 / step finite where m / 255 is denormal or zero. x * (1 / step) is above 255 by roundings at
most, so no code is; code * scale is above m by roundings at most, and infinite where m is that close to the largest
float64. Where step is NaN or infinite, max(1, NaN) is 1: codes are the mask and nothing more.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..stem.reference import empty_beside


def quantize(x_NCHW: Tensor) -> tuple[Tensor, Tensor]:
    """(codes_NCHW uint8, in the memory format of x, scale_NC)."""
    v_NCHW = x_NCHW.double() if x_NCHW.dtype == torch.float64 else x_NCHW.float()
    zero_NC1 = v_NCHW.new_zeros(*v_NCHW.shape[:2], 1)
    maximum_NC = torch.cat([zero_NC1, v_NCHW.flatten(2)], dim=2).amax(dim=2)
    # By a tensor: by a number, CUDA's division is a multiplication, and rounds otherwise.
    step_NC = (maximum_NC / maximum_NC.new_tensor(255)).clamp(min=torch.finfo(v_NCHW.dtype).tiny)
    rounded_NCHW = torch.round(v_NCHW * step_NC.reciprocal()[:, :, None, None])
    lifted_NCHW = torch.where(rounded_NCHW > 1, rounded_NCHW, 1)
    codes_NCHW = empty_beside(x_NCHW, x_NCHW.shape, torch.uint8).copy_(lifted_NCHW.masked_fill(x_NCHW <= 0, 0))
    return codes_NCHW, step_NC.masked_fill(maximum_NC == 0, 0)


def dequantize(codes_NCHW: Tensor, scale_NC: Tensor, dtype: torch.dtype) -> Tensor:
    """y_NCHW of dtype, in the memory format of codes."""
    y_NCHW = codes_NCHW.to(scale_NC.dtype) * scale_NC[:, :, None, None]
    return empty_beside(codes_NCHW, codes_NCHW.shape, dtype).copy_(y_NCHW)

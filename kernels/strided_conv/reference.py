"""The definition of strided_conv: a convolution that halves an image, zero padded by half its own size; its gradients.

Shapes: N images, C input channels, K output channels, H x W pixels, R x R taps (R is 1 or 3), P = (R - 1) / 2.

    out[n, k, i, j] = sum over c, u, v of x[n, c, 2i + u - P, 2j + v - P] * weight[k, c, u, v]

for 0 <= i < ceil(H / 2), 0 <= j < ceil(W / 2).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def strided_conv(x_NCHW: Tensor, weight_KCRR: Tensor) -> Tensor:
    """(N, K, ceil(H / 2), ceil(W / 2)), channels-last, in x's dtype."""
    out = F.conv2d(x_NCHW, weight_KCRR, None, 2, weight_KCRR.shape[2] // 2)
    return out.contiguous(memory_format=torch.channels_last)


def strided_conv_backward(
    grad_NKHW: Tensor, x_NCHW: Tensor, weight_KCRR: Tensor, with_x: bool, with_weight: bool
) -> tuple[Tensor, Tensor]:
    """(grad_x_NCHW, grad_weight_KCRR), channels-last, in x's dtype; (0,) in place of one that is not wanted."""
    padding = [weight_KCRR.shape[2] // 2] * 2
    mask = [with_x, with_weight, False]
    grad_x, grad_weight, _ = torch.ops.aten.convolution_backward(
        grad_NKHW, x_NCHW, weight_KCRR, None, [2, 2], padding, [1, 1], False, [0, 0], 1, mask
    )
    nothing, last = x_NCHW.new_empty(0), torch.channels_last
    return (
        grad_x.contiguous(memory_format=last) if with_x else nothing,
        grad_weight.contiguous(memory_format=last) if with_weight else nothing,
    )

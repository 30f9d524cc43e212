"""The definition of conv3x3: the 3x3 convolution of a residual block, stride 1, zero padding 1; and its gradients.

Shapes: N images, C input channels, K output channels, H x W pixels.

    out[n, k, i, j] = sum over c, u, v of x[n, c, i + u - 1, j + v - 1] * weight[k, c, u, v] + bias[k]

and max(out, 0) where `relu`. The gradients are those before any ReLU of the output; with `relu`, x is itself the result
of a ReLU, whose gradient is taken along: grad_x is 0 where x <= 0.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def conv3x3(x_NCHW: Tensor, weight_KC33: Tensor, bias_K: Tensor | None, relu: bool) -> Tensor:
    """(N, K, H, W), channels-last, in x's dtype."""
    out_NKHW = F.conv2d(x_NCHW, weight_KC33, bias_K, padding=1)
    return (F.relu(out_NKHW) if relu else out_NKHW).contiguous(memory_format=torch.channels_last)


def conv3x3_backward(
    grad_NKHW: Tensor, x_NCHW: Tensor, weight_KC33: Tensor, relu: bool, with_x: bool, with_weight: bool
) -> tuple[Tensor, Tensor]:
    """(grad_x_NCHW, grad_weight_KC33), channels-last, in x's dtype; (0,) in place of one that is not wanted."""
    grad_x, grad_weight, _ = torch.ops.aten.convolution_backward(
        grad_NKHW, x_NCHW, weight_KC33, None, [1, 1], [1, 1], [1, 1], False, [0, 0], 1, [with_x, with_weight, False]
    )
    if with_x and relu:
        grad_x = torch.where(x_NCHW <= 0, 0, grad_x)
    nothing = x_NCHW.new_empty(0)
    last = torch.channels_last
    return (
        grad_x.contiguous(memory_format=last) if with_x else nothing,
        grad_weight.contiguous(memory_format=last) if with_weight else nothing,
    )

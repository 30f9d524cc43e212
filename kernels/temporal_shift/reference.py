"""The definition of the temporal shift: plain PyTorch, autograd supplies the adjoint.

x_TCHW seen as (N, T, C, H, W), f = fold:

    y[:, t, 0:f]   = x[:, t + 1, 0:f]      zero at t = T - 1
    y[:, t, f:2f]  = x[:, t - 1, f:2f]     zero at t = 0
    y[:, t, 2f:]   = x[:, t, 2f:]
"""

from __future__ import annotations

import torch
from torch import Tensor


def temporal_shift_reference(x: Tensor, num_frames: int, fold: int) -> Tensor:
    """The shift of ``x`` (N*T, C, H, W) in snippets of ``num_frames`` = T frames; a new tensor of that shape."""
    num_images, channels, height, width = x.shape
    x_NTCHW = x.reshape(num_images // num_frames, num_frames, channels, height, width)
    from_next, from_previous, still = torch.split(x_NTCHW, [fold, fold, channels - 2 * fold], dim=2)
    left = torch.cat([from_next[:, 1:], torch.zeros_like(from_next[:, :1])], dim=1)
    right = torch.cat([torch.zeros_like(from_previous[:, :1]), from_previous[:, :-1]], dim=1)
    return torch.cat([left, right, still], dim=2).reshape(x.shape)

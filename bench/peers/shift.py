"""The temporal shift as TSM publishes it (Lin et al. 2019, github.com/mit-han-lab/temporal-shift-module)."""

from __future__ import annotations

import torch
from torch import Tensor


def published_shift(x: Tensor, num_frames: int, fold: int) -> Tensor:
    """Three assignments into zeros, on the view (N, T, C, H, W) of ``x`` (N*T, C, H, W)."""
    x_NTCHW = x.view(-1, num_frames, *x.shape[1:])
    out = torch.zeros_like(x_NTCHW)
    out[:, :-1, :fold] = x_NTCHW[:, 1:, :fold]
    out[:, 1:, fold : 2 * fold] = x_NTCHW[:, :-1, fold : 2 * fold]
    out[:, :, 2 * fold :] = x_NTCHW[:, :, 2 * fold :]
    return out.view(x.shape)

"""The definition of the temporal shift and of its adjoint: plain PyTorch, each element read and written once.

x_NCHW seen as (N, T, C, H, W), f = fold:

    y[:, t, 0:f]   = x[:, t + 1, 0:f]      zero at t = T - 1
    y[:, t, f:2f]  = x[:, t - 1, f:2f]     zero at t = 0
    y[:, t, 2f:]   = x[:, t, 2f:]

The adjoint (the gradient of x given that of y) is the same with t + 1 and t - 1 exchanged.
"""

from __future__ import annotations

import torch
from torch import Tensor


def temporal_shift(x_NCHW: Tensor, num_frames: int, fold: int, adjoint: bool) -> Tensor:
    """The shift of ``x_NCHW`` (N*T, C, H, W) in snippets of ``num_frames`` = T frames, or its adjoint; a new tensor."""
    # empty_like keeps the strides' order, so the copies below run along memory in every layout.
    y_NCHW = torch.empty_like(x_NCHW)
    snippets = x_NCHW.shape[0] // num_frames
    x_NTCHW = x_NCHW.view(snippets, num_frames, *x_NCHW.shape[1:])
    y_NTCHW = y_NCHW.view(snippets, num_frames, *x_NCHW.shape[1:])
    first, second, still = slice(0, fold), slice(fold, 2 * fold), slice(2 * fold, None)
    from_next, from_previous = (second, first) if adjoint else (first, second)
    y_NTCHW[:, :-1, from_next] = x_NTCHW[:, 1:, from_next]
    y_NTCHW[:, -1, from_next] = 0
    y_NTCHW[:, 1:, from_previous] = x_NTCHW[:, :-1, from_previous]
    y_NTCHW[:, 0, from_previous] = 0
    y_NTCHW[:, :, still] = x_NTCHW[:, :, still]
    return y_NCHW

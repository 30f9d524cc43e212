"""The definition of residual_shift and of its backward: plain PyTorch.

With s, b the scale and bias of each channel (batch norm with fixed statistics), s', b' those of the identity, where a
scale that is None stands for 1:

    v       = s*x + b  [+ i  or  + s'*i + b']      in float32, in float64 for float64
    out     = relu(v)                              rounded once, to the dtype of x
    shifted = temporal_shift(out)

    g       = grad_out + temporal_shift^T(grad_shifted), but 0 where out <= 0
    grad_x  = s*g,   grad_i = g  or  s'*g
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..temporal_shift.reference import temporal_shift


def residual_shift(
    x_NCHW: Tensor,
    scale_C: Tensor | None,
    bias_C: Tensor,
    identity_NCHW: Tensor | None,
    identity_scale_C: Tensor | None,
    identity_bias_C: Tensor | None,
    num_frames: int,
    fold: int,
) -> tuple[Tensor, Tensor]:
    """``out`` in the memory format of ``x_NCHW``, and ``shifted`` likewise, or (0,) where fold is 0."""
    v_NCHW = _affine(x_NCHW, scale_C, bias_C)
    if identity_NCHW is not None:
        v_NCHW = v_NCHW + _affine(identity_NCHW, identity_scale_C, identity_bias_C)
    out_NCHW = torch.empty_like(x_NCHW).copy_(torch.relu(v_NCHW))
    if fold == 0:
        return out_NCHW, x_NCHW.new_empty(0)
    return out_NCHW, temporal_shift(out_NCHW, num_frames, fold, False)


def residual_shift_backward(
    grad_out_NCHW: Tensor | None,
    grad_shifted_NCHW: Tensor | None,
    out_NCHW: Tensor,
    scale_C: Tensor | None,
    identity_scale_C: Tensor | None,
    with_identity: bool,
    num_frames: int,
    fold: int,
) -> tuple[Tensor, Tensor]:
    """The gradients of x and of the identity in the memory format of ``out_NCHW``; the latter (0,) if not wanted.

    A gradient that is None counts as zero.
    """
    exact = torch.float64 if out_NCHW.dtype == torch.float64 else torch.float32
    g_NCHW = torch.zeros_like(out_NCHW, dtype=exact)
    if grad_out_NCHW is not None:
        g_NCHW += grad_out_NCHW
    if grad_shifted_NCHW is not None:
        g_NCHW += temporal_shift(grad_shifted_NCHW, num_frames, fold, True)
    g_NCHW.masked_fill_(out_NCHW <= 0, 0)
    grad_x_NCHW = torch.empty_like(out_NCHW).copy_(_affine(g_NCHW, scale_C))
    if not with_identity:
        return grad_x_NCHW, out_NCHW.new_empty(0)
    return grad_x_NCHW, torch.empty_like(out_NCHW).copy_(_affine(g_NCHW, identity_scale_C))


def _affine(x_NCHW: Tensor, scale_C: Tensor | None, bias_C: Tensor | None = None) -> Tensor:
    y_NCHW = x_NCHW.double() if x_NCHW.dtype == torch.float64 else x_NCHW.float()
    if scale_C is not None:
        y_NCHW = y_NCHW * scale_C.view(-1, 1, 1)
    if bias_C is not None:
        y_NCHW = y_NCHW + bias_C.view(-1, 1, 1)
    return y_NCHW

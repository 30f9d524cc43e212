"""strided_conv: the convolutions that halve an image between the stages of a ResNet, for small images on a CPU."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from .. import library
from . import product

__all__ = ["strided_conv", "strided_conv_backward", "strided_conv_is_faster"]

# From how many images on, and up to how many pixels a side, products are faster than oneDNN's convolution: measured
# with 32 to 256 channels, on a CPU with AVX2.
MIN_IMAGES = 32
LARGEST = {1: 16, 3: 4}  # by the taps of a side


def strided_conv_is_faster(x: Tensor, weight: Tensor, dtype: torch.dtype | None = None) -> bool:
    """Whether matrix products are faster with these arguments than PyTorch's own convolution: in float32 on a CPU, for
    many small images.

    Args:
        x: (N, C, H, W).
        weight: (K, C, R, R).
        dtype: what both are cast to before; None: as they are.
    """
    return (
        x.is_cpu
        and weight.is_cpu
        and weight.shape[2] == weight.shape[3]
        and max(x.shape[2:]) <= LARGEST.get(weight.shape[2], 0)
        and x.shape[0] >= MIN_IMAGES
        and (dtype or x.dtype) == (dtype or weight.dtype) == torch.float32
    )


def strided_conv(x: Tensor, weight: Tensor) -> Tensor:
    """Convolution of stride 2 with 1x1 or 3x3 taps, zero padding 0 or 1, by matrix products.

    Args:
        x: (N, C, H, W) float32 on a CPU, any strides; fastest channels-last.
        weight: (K, C, R, R) of x's dtype, any strides; fastest channels-last. R is 1 or 3.

    Returns:
        (N, K, ceil(H / 2), ceil(W / 2)), channels-last. Its rounding is that of a direct convolution. Saved for
        backward: x and weight. It can be differentiated once.

    Raises:
        ValueError: a shape, dtype or device that does not fit.
    """
    _check("strided_conv", x, weight)
    out: Tensor = torch.ops.lofi_fast.strided_conv(x, weight)
    return out


def strided_conv_backward(
    grad: Tensor, x: Tensor, weight: Tensor, mask: tuple[bool, bool] = (True, True)
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of x and weight, for autograd functions written by hand.

    Args:
        grad: (N, K, ceil(H / 2), ceil(W / 2)) the gradient of ``strided_conv``'s output.
        x, weight: as given to ``strided_conv``.
        mask: which of the two are wanted.

    Returns:
        grad_x (N, C, H, W) and grad_weight (K, C, R, R), channels-last; None where not wanted. No gradient flows
        through them.

    Raises:
        ValueError: as ``strided_conv``.
    """
    _check("strided_conv_backward", x, weight)
    expected = _size(x, weight)
    if grad.shape != expected or grad.dtype != x.dtype or grad.device != x.device:
        raise ValueError(
            f"strided_conv_backward: grad must be {expected} {x.dtype} on {x.device}, not {tuple(grad.shape)} "
            f"{grad.dtype} on {grad.device}"
        )
    grad_x, grad_weight = torch.ops.lofi_fast.strided_conv_backward(grad, x, weight, *mask)
    return grad_x if mask[0] else None, grad_weight if mask[1] else None


def _size(x: Tensor, weight: Tensor) -> tuple[int, int, int, int]:
    return x.shape[0], weight.shape[0], (x.shape[2] + 1) // 2, (x.shape[3] + 1) // 2


def _check(op: str, x: Tensor, weight: Tensor) -> None:
    if x.dim() != 4 or x.dtype != torch.float32 or not x.is_cpu:
        raise ValueError(f"{op}: x must be (N, C, H, W) float32 on a CPU, not {tuple(x.shape)} {x.dtype} on {x.device}")
    taps = weight.shape[2:]
    if weight.dim() != 4 or weight.shape[1] != x.shape[1] or taps not in ((1, 1), (3, 3)):
        raise ValueError(
            f"{op}: weight must be (K, {x.shape[1]}, 1, 1) or (K, {x.shape[1]}, 3, 3), not {tuple(weight.shape)}"
        )
    if weight.dtype != x.dtype or weight.device != x.device:
        raise ValueError(f"{op}: weight is {weight.dtype} on {weight.device}, but x {x.dtype} on {x.device}")


def _fake(x: Tensor, weight: Tensor) -> Tensor:
    return torch.empty(_size(x, weight), dtype=x.dtype, device=x.device, memory_format=torch.channels_last)


def _fake_backward(grad: Tensor, x: Tensor, weight: Tensor, with_x: bool, with_weight: bool) -> tuple[Tensor, Tensor]:
    def like(tensor: Tensor) -> Tensor:
        return torch.empty(tensor.shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)

    return like(x) if with_x else x.new_empty(0), like(weight) if with_weight else x.new_empty(0)


def _setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    with_x, with_weight = ctx.needs_input_grad
    found = torch.ops.lofi_fast.strided_conv_backward(grad, *ctx.saved_tensors, with_x, with_weight)
    return found[0] if with_x else None, found[1] if with_weight else None


def _no_second_derivative(ctx: Any, *grads: Tensor) -> None:
    raise NotImplementedError("strided_conv: its gradient cannot be differentiated again")


library.compose("strided_conv(Tensor x, Tensor weight) -> Tensor", product.strided_conv, _fake)
library.compose(
    "strided_conv_backward(Tensor grad, Tensor x, Tensor weight, bool with_x, bool with_weight) -> "
    "(Tensor grad_x, Tensor grad_weight)",
    product.strided_conv_backward,
    _fake_backward,
)
library.differentiate("strided_conv", _backward, _setup_context)
library.differentiate("strided_conv_backward", _no_second_derivative)


@register_flop_formula(torch.ops.lofi_fast.strided_conv)
def _operations(x: Sequence[int], weight: Sequence[int], *_: object, **__: object) -> int:
    """By the definition, as PyTorch counts every convolution's."""
    return 2 * math.prod((x[0], (x[2] + 1) // 2, (x[3] + 1) // 2, *weight))


@register_flop_formula(torch.ops.lofi_fast.strided_conv_backward)
def _operations_backward(
    grad: Sequence[int], x: Sequence[int], weight: Sequence[int], with_x: bool, with_weight: bool, **_: object
) -> int:
    return _operations(x, weight) * (with_x + with_weight)

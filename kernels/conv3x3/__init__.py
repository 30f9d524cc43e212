"""conv3x3: the 3x3 convolution of a residual block, on a CPU by whatever is fastest for its shape and dtype."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from .. import library
from . import product, reference

__all__ = ["conv3x3", "conv3x3_backward", "conv3x3_is_faster"]

CHANNELS = 16  # the C++ form's come in multiples of this
# How many images, or pixels of all, pay for the transformed weight; with 16 to 512 channels and AVX2 fewer paid too.
# From so many images on nothing depends on their number: a chunk of a video is computed in the form that all of it is.
MIN_IMAGES, MIN_PIXELS = 32, 256
# Pairs of channels from which the matrix of taps pays (`product`); measured with 32 to 512 channels. For images of one
# pixel it is the weight's middle, which pays for any number of them in float32; in bfloat16 that was not measured.
MIN_PAIRS = 128 * 128
MIN_PAIRS_OF_PIXELS = 64 * 64


def conv3x3_is_faster(x: Tensor, weight: Tensor, dtype: torch.dtype | None = None) -> bool:
    """Whether one of the forms here takes these arguments, and is faster with them than PyTorch's own convolution.

    The C++ form is, in float32 on a CPU with AVX2 or AVX-512, where channels come in multiples of 16, unless there are
    few images of few pixels. One matrix product is, in float32 and bfloat16, for many images of 1 or 2 pixels a side
    with many channels. It says nothing of the stride.

    Args:
        x: (N, C, H, W).
        weight: (K, C, h, w).
        dtype: what both are cast to before; None: as they are.
    """
    return _by_product(x, weight, dtype) or _by_tiles(x, weight, dtype)


def _by_tiles(x: Tensor, weight: Tensor, dtype: torch.dtype | None = None) -> bool:
    if not x.is_cpu:
        return False
    num, channels, height, width = x.shape
    return (
        weight.shape[2:] == (3, 3)
        and channels % CHANNELS == weight.shape[0] % CHANNELS == 0
        and (num >= MIN_IMAGES or num * height * width >= MIN_PIXELS)
        and (dtype or x.dtype) == (dtype or weight.dtype) == torch.float32
        and weight.is_cpu
        and library.forms["cpu"]["conv3x3"] == "C++"
        and torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512")
    )


def _by_product(x: Tensor, weight: Tensor, dtype: torch.dtype | None = None) -> bool:
    return (
        x.is_cpu
        and weight.is_cpu
        and max(x.shape[2:]) <= product.LARGEST
        and weight.shape[2:] == (3, 3)
        and _pays(x, weight.shape[0] * weight.shape[1], dtype or x.dtype)
        and (dtype or x.dtype) == (dtype or weight.dtype)
        and (dtype or x.dtype) in (torch.float32, torch.bfloat16)
    )


def _pays(x: Tensor, pairs: int, dtype: torch.dtype) -> bool:
    if max(x.shape[2:]) == 1 and dtype is torch.float32:
        return pairs >= MIN_PAIRS_OF_PIXELS
    return x.shape[0] >= MIN_IMAGES and pairs >= MIN_PAIRS


def _forms(x: Tensor, weight: Tensor) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """The convolution and its gradients, by the fastest form that takes these arguments."""
    if _by_product(x, weight):
        return torch.ops.lofi_fast.conv3x3_product, torch.ops.lofi_fast.conv3x3_product_backward
    if _by_tiles(x, weight):
        return torch.ops.lofi_fast.conv3x3, torch.ops.lofi_fast.conv3x3_backward
    return reference.conv3x3, reference.conv3x3_backward


def conv3x3(x: Tensor, weight: Tensor, bias: Tensor | None = None, relu: bool = False) -> Tensor:
    """3x3 convolution, stride 1, zero padding 1, and where asked its bias and ReLU in the same pass.

    Where ``conv3x3_is_faster`` it is Winograd's F(4x4, 3x3) (Lavin and Gray 2016): 36 multiplications for each 16
    outputs and pair of channels in place of 144; what a side has beyond a multiple of 4 is in smaller tiles. Its
    rounding errors are 2 to 8 times those of a direct float32 convolution (some 2e-6 of the result's norm at 512
    channels; TF32, a GPU's default, has some 3e-4), and a NaN or an infinity in x reaches the whole tiles that read it.
    Many images of 1 or 2 pixels a side are one matrix product, whose rounding is that of a direct convolution.
    Elsewhere it is PyTorch's.

    Args:
        x: (N, C, H, W) floating point, any strides.
        weight: (K, C, 3, 3) of x's dtype, any strides; fastest channels-last.
        bias: (K,) of x's dtype.
        relu: max(out, 0); a NaN stays NaN.

    Returns:
        (N, K, H, W), channels-last, in x's dtype. The C++ form takes memory for itself while it runs: the transformed
        weight or the transformed x, whichever is smaller (four times the weight at most), and for each thread 0.5 MB at
        64 channels, 6 MB at 512. Its results do not depend on the number of threads. The product takes 16/9 of the
        weight for images of 2 x 2.

        Saved for backward: x, weight, and out where `relu`. It can be differentiated once.

    Raises:
        ValueError: a shape, dtype or device that does not fit.
    """
    _check("conv3x3", x, weight)
    if bias is not None and (bias.shape != weight.shape[:1] or bias.dtype != x.dtype or bias.device != x.device):
        raise ValueError(
            f"conv3x3: bias must be ({weight.shape[0]},) {x.dtype} on {x.device}, not {tuple(bias.shape)} "
            f"{bias.dtype} on {bias.device}"
        )
    forward, _ = _forms(x, weight)
    out: Tensor = forward(x, weight, bias, relu)
    return out


def conv3x3_backward(
    grad: Tensor, x: Tensor, weight: Tensor, relu: bool = False, mask: tuple[bool, bool] = (True, True)
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of x and weight, for autograd functions written by hand.

    Args:
        grad: (N, K, H, W) the gradient of ``conv3x3``'s output before its own ReLU, of x's dtype.
        x, weight: as given to ``conv3x3``.
        relu: x is the result of a ReLU, and grad_x is to be the gradient before it: 0 where x <= 0.
        mask: which of the two are wanted.

    Returns:
        grad_x (N, C, H, W) and grad_weight (K, C, 3, 3), channels-last, in x's dtype; None where not wanted. No
        gradient flows through them.

    Raises:
        ValueError: as ``conv3x3``.
    """
    _check("conv3x3_backward", x, weight)
    expected = (x.shape[0], weight.shape[0], *x.shape[2:])
    if grad.shape != expected or grad.dtype != x.dtype or grad.device != x.device:
        raise ValueError(
            f"conv3x3_backward: grad must be {expected} {x.dtype} on {x.device}, not {tuple(grad.shape)} "
            f"{grad.dtype} on {grad.device}"
        )
    _, backward = _forms(x, weight)
    grad_x, grad_weight = backward(grad, x, weight, relu, *mask)
    return grad_x if mask[0] else None, grad_weight if mask[1] else None


def _check(op: str, x: Tensor, weight: Tensor) -> None:
    if x.dim() != 4 or not x.dtype.is_floating_point:
        raise ValueError(f"{op}: x must be (N, C, H, W) floating point, not {tuple(x.shape)} {x.dtype}")
    if weight.dim() != 4 or weight.shape[1:] != (x.shape[1], 3, 3):
        raise ValueError(f"{op}: weight must be (K, {x.shape[1]}, 3, 3), not {tuple(weight.shape)}")
    if weight.dtype != x.dtype or weight.device != x.device:
        raise ValueError(f"{op}: weight is {weight.dtype} on {weight.device}, but x {x.dtype} on {x.device}")


def _fake(x: Tensor, weight: Tensor, bias: Tensor | None, relu: bool) -> Tensor:
    size = (x.shape[0], weight.shape[0], *x.shape[2:])
    return torch.empty(size, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)


def _fake_backward(
    grad: Tensor, x: Tensor, weight: Tensor, relu: bool, with_x: bool, with_weight: bool
) -> tuple[Tensor, Tensor]:
    def like(tensor: Tensor) -> Tensor:
        return torch.empty(tensor.shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)

    return like(x) if with_x else x.new_empty(0), like(weight) if with_weight else x.new_empty(0)


def _setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor | None, bool], output: Tensor) -> None:
    x, weight, _, relu = inputs
    ctx.save_for_backward(x, weight, output if relu else None)


def _backward_by(name: str) -> Callable[..., tuple[Tensor | None, ...]]:
    """The derivative of a form, whose gradients are worked out by the operator of that name."""

    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, out = ctx.saved_tensors
        with_x, with_weight, with_bias, _ = ctx.needs_input_grad
        if out is not None:
            grad = torch.ops.aten.threshold_backward(grad, out, 0)
        grad_x, grad_weight = getattr(torch.ops.lofi_fast, name)(grad, x, weight, False, with_x, with_weight)
        return (
            grad_x if with_x else None,
            grad_weight if with_weight else None,
            grad.sum((0, 2, 3)) if with_bias else None,
            None,
        )

    return backward


def _no_second_derivative(ctx: Any, *grads: Tensor) -> None:
    raise NotImplementedError("conv3x3: its gradient cannot be differentiated again")


_ARGUMENTS = "(Tensor x, Tensor weight, Tensor? bias, bool relu) -> Tensor"
_GRADIENTS = (
    "(Tensor grad, Tensor x, Tensor weight, bool relu, bool with_x, bool with_weight) -> "
    "(Tensor grad_x, Tensor grad_weight)"
)
library.define(f"conv3x3{_ARGUMENTS}", reference.conv3x3, _fake)
library.define(f"conv3x3_backward{_GRADIENTS}", reference.conv3x3_backward, _fake_backward)
library.compose(f"conv3x3_product{_ARGUMENTS}", product.conv3x3, _fake)
library.compose(f"conv3x3_product_backward{_GRADIENTS}", product.conv3x3_backward, _fake_backward)
for _name in ("conv3x3", "conv3x3_product"):
    library.differentiate(_name, _backward_by(f"{_name}_backward"), _setup_context)
    library.differentiate(f"{_name}_backward", _no_second_derivative)


@register_flop_formula([torch.ops.lofi_fast.conv3x3, torch.ops.lofi_fast.conv3x3_product])
def _operations(x: Sequence[int], weight: Sequence[int], *_: object, **__: object) -> int:
    """By the definition, as PyTorch counts every convolution's."""
    return 2 * math.prod((x[0], *x[2:], *weight))


@register_flop_formula([torch.ops.lofi_fast.conv3x3_backward, torch.ops.lofi_fast.conv3x3_product_backward])
def _operations_backward(
    grad: Sequence[int],
    x: Sequence[int],
    weight: Sequence[int],
    relu: bool,
    with_x: bool,
    with_weight: bool,
    **_: object,
) -> int:
    return _operations(x, weight) * (with_x + with_weight)

"""The encoder's stem around its first convolution: normalisation before it; affine, ReLU and max pool after it."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .. import library
from . import reference

__all__ = ["fold_normalization", "stem", "stem_backward", "stem_forward", "stem_input"]

_FLOATS = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


def stem(x: Tensor, scale: Tensor | None, bias: Tensor) -> Tensor:
    """max_pool2d(relu(x * scale + bias), kernel 3, stride 2, padding 1) over the first convolution's output, in one
    pass: the stem of a ResNet (He et al., CVPR 2016) with frozen batch norm.

    Args:
        x: (N, C, H, W) float32, float16, bfloat16 or float64; any strides, channels-last is the fast layout.
        scale, bias: (C,) float32 (float64 for float64 x), the frozen batch norm as one affine: scale =
            weight / sqrt(running_var + eps), bias = bias_bn - running_mean * scale. They get no gradient. A scale of
            None stands for 1.

    Returns:
        pooled (N, C, (H - 1) // 2 + 1, (W - 1) // 2 + 1) in the dtype and memory format of x.

    Arithmetic is float32 (float64 for float64), rounded once. The gradient of a window goes to its maximum, the first
    in scan order where values are equal, as max_pool2d sends it; maxima are compared before rounding. A NaN in a
    window makes it NaN. Differentiable once: autograd keeps pooled, one byte a window (argmax) and scale, and neither x
    nor the map before pooling.

    Raises:
        ValueError: a wrong shape, dtype or device, or scale or bias requires grad in grad mode.
    """
    return stem_forward(x, scale, bias)[0]


def stem_forward(x: Tensor, scale: Tensor | None, bias: Tensor) -> tuple[Tensor, Tensor]:
    """``stem`` with what its backward needs, for an autograd function that saves for itself.

    Returns:
        pooled, as ``stem``, and argmax: int8 of the same shape and memory format, the position 3*ky + kx of the maximum
        in its 3x3 window. Position 4 of window (i, j) is the pixel (2i, 2j) of x.

    Raises:
        ValueError: as ``stem``.
    """
    if x.dim() != 4 or 0 in x.shape[1:]:
        raise ValueError(f"stem: x must be (N, C, H, W) with C, H and W at least 1, got {tuple(x.shape)}")
    _check_floating("stem", "x", x)
    _check_channels("stem", "scale", scale, x)
    _check_channels("stem", "bias", bias, x)
    pooled, argmax = library.operator("stem", x)(x, scale, bias)
    return pooled, argmax


def stem_backward(
    grad: Tensor, pooled: Tensor, argmax: Tensor, scale: Tensor | None, height: int, width: int
) -> Tensor:
    """The gradient of x, from that of ``stem``'s result, in one pass without atomics: the same bits at every run.

    Args:
        grad: (N, C, h, w) gradient of pooled, in its dtype.
        pooled, argmax: what ``stem_forward`` returned.
        scale: as given to it, or None.
        height, width: H and W of x in pixels.

    Returns:
        (N, C, height, width) in the dtype and memory format of grad. Sums are float32 (float64 for float64) in a fixed
        order, rounded once. No gradient passes where pooled <= 0; it does where pooled is NaN, as in torch's relu. The
        result has no gradient of its own.

    Raises:
        ValueError: a wrong shape, dtype or device, or scale requires grad in grad mode.
    """
    if pooled.dim() != 4 or 0 in pooled.shape[1:]:
        raise ValueError(f"stem_backward: pooled must be (N, C, h, w) with C, h, w >= 1, got {tuple(pooled.shape)}")
    _check_floating("stem_backward", "pooled", pooled)
    for name, tensor, dtype in (("grad", grad, pooled.dtype), ("argmax", argmax, torch.int8)):
        if tensor.shape != pooled.shape or tensor.dtype != dtype or tensor.device != pooled.device:
            raise ValueError(
                f"stem_backward: {name} must be {dtype} {tuple(pooled.shape)} on {pooled.device} like pooled, got "
                f"{tensor.dtype} {tuple(tensor.shape)} on {tensor.device}"
            )
    for name, size, windows in (("height", height, pooled.shape[2]), ("width", width, pooled.shape[3])):
        if (size - 1) // 2 + 1 != windows:
            raise ValueError(f"stem_backward: {name}={size} does not pool to {windows} windows")
    _check_channels("stem_backward", "scale", scale, pooled)
    run = library.operator("stem_backward", grad)
    grad_x: Tensor = run(grad, pooled, argmax, scale, height, width)
    return grad_x


def stem_input(frames: Tensor, mean: Tensor, dtype: torch.dtype) -> Tensor:
    """Frames as the first convolution takes them: frames - mean, so that its zero padding stands for the mean colour.

    The division by the standard deviation belongs in the weight: ``fold_normalization``.

    Args:
        frames: (N, H, W, 3) uint8, as decoded; any strides.
        mean: (3,) float32, in the units of the frames (0 to 255).
        dtype: float32, float16, bfloat16 or float64.

    Returns:
        (N, 3, H, W) of dtype, channels-last. Arithmetic is float32 (float64 for float64), rounded once. No gradient.

    Raises:
        ValueError: a wrong shape, dtype or device.
    """
    if frames.dtype != torch.uint8 or frames.dim() != 4 or frames.shape[3] != 3:
        raise ValueError(f"stem_input: frames must be uint8 (N, H, W, 3), got {frames.dtype} {tuple(frames.shape)}")
    if mean.dtype != torch.float32 or mean.shape != (3,) or mean.device != frames.device:
        raise ValueError(
            f"stem_input: mean must be float32 (3,) on {frames.device}, got {mean.dtype} {tuple(mean.shape)} on "
            f"{mean.device}"
        )
    if dtype not in _FLOATS:
        raise ValueError(f"stem_input: dtype must be float32, float16, bfloat16 or float64, got {dtype}")
    run = library.operator("stem_input", frames)
    x: Tensor = run(frames, mean, dtype)
    return x


def fold_normalization(weight: Tensor, std: Tensor) -> Tensor:
    """The first convolution's weight for frames that are not divided by std: conv(stem_input(frames, mean), folded)
    equals conv((frames - mean) / std, weight) to rounding. Plain PyTorch, differentiable: the weight goes on learning.

    Args:
        weight: (O, 3, kh, kw), of the convolution over normalised frames.
        std: (3,), in the units of the frames (0 to 255).

    Returns:
        weight / std for each input channel, in weight's dtype and memory format.

    Raises:
        ValueError: weight or std has another shape.
    """
    if weight.dim() != 4 or weight.shape[1] != 3:
        raise ValueError(f"fold_normalization: weight must be (O, 3, kh, kw), got {tuple(weight.shape)}")
    if std.shape != (3,):
        raise ValueError(f"fold_normalization: std must be (3,), got {tuple(std.shape)}")
    return reference.fold_normalization(weight, std)


def _check_floating(op: str, name: str, x: Tensor) -> None:
    if x.dtype not in _FLOATS:
        raise ValueError(f"{op}: {name} must be float32, float16, bfloat16 or float64, got {x.dtype}")


def _check_channels(op: str, name: str, values: Tensor | None, x: Tensor) -> None:
    """`values`, where given, must be a frozen number for each channel of `x`."""
    if values is None:
        return
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    if values.shape != x.shape[1:2] or values.dtype != dtype or values.device != x.device:
        raise ValueError(
            f"{op}: {name} must be {dtype} ({x.shape[1]},) on {x.device} for {x.dtype} images, got {values.dtype} "
            f"{tuple(values.shape)} on {values.device}"
        )
    if values.requires_grad and torch.is_grad_enabled():
        raise ValueError(f"{op}: {name} requires grad, but the affine is frozen and gets none: detach it")


def _stem_fake(x: Tensor, scale: Tensor | None, bias: Tensor) -> tuple[Tensor, Tensor]:
    num, channels, height, width = x.shape
    size = (num, channels, (height - 1) // 2 + 1, (width - 1) // 2 + 1)
    return reference.empty_beside(x, size), reference.empty_beside(x, size, torch.int8)


def _stem_backward_fake(
    grad: Tensor, pooled: Tensor, argmax: Tensor, scale: Tensor | None, height: int, width: int
) -> Tensor:
    return reference.empty_beside(grad, (*grad.shape[:2], height, width))


def _stem_input_fake(frames: Tensor, mean: Tensor, dtype: torch.dtype) -> Tensor:
    return frames.new_empty(frames.shape, dtype=dtype).permute(0, 3, 1, 2)


@cache
def _kernel() -> Any:
    """The module of the Triton forms, imported when one first runs: elsewhere Triton may be missing."""
    from . import kernel

    return kernel


def _stem_triton(*arguments: Any) -> Any:
    return _kernel().stem(*arguments)


def _stem_backward_triton(*arguments: Any) -> Any:
    return _kernel().stem_backward(*arguments)


def _stem_input_triton(*arguments: Any) -> Any:
    return _kernel().stem_input(*arguments)


def _save(ctx: Any, inputs: tuple[Tensor, Tensor | None, Tensor], output: tuple[Tensor, Tensor]) -> None:
    x, scale, _ = inputs
    ctx.save_for_backward(*output, scale)
    ctx.size = x.shape[2:]


@once_differentiable
def _backward(ctx: Any, grad_pooled: Tensor, grad_argmax: None) -> tuple[Tensor, None, None]:
    pooled, argmax, scale = ctx.saved_tensors
    run = library.operator("stem_backward", grad_pooled)
    return run(grad_pooled, pooled, argmax, scale, *ctx.size), None, None


library.define(
    "stem(Tensor x, Tensor? scale, Tensor bias) -> (Tensor, Tensor)", reference.stem, _stem_fake, _stem_triton
)
library.define(
    "stem_backward(Tensor grad, Tensor pooled, Tensor argmax, Tensor? scale, SymInt height, SymInt width) -> Tensor",
    reference.stem_backward,
    _stem_backward_fake,
    _stem_backward_triton,
)
library.define(
    "stem_input(Tensor frames, Tensor mean, ScalarType dtype) -> Tensor",
    reference.stem_input,
    _stem_input_fake,
    _stem_input_triton,
)
library.differentiate("stem", _backward, _save)

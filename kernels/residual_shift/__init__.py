"""residual_shift: what follows a block's last convolution, in one pass: affine, residual add, ReLU, shifted copy."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor

from .. import library
from ..temporal_shift import check_snippets
from . import reference

__all__ = ["residual_shift", "residual_shift_backward"]


def residual_shift(
    x: Tensor,
    scale: Tensor | None,
    bias: Tensor,
    identity: Tensor | None = None,
    identity_scale: Tensor | None = None,
    identity_bias: Tensor | None = None,
    *,
    num_frames: int = 1,
    fold: int = 0,
) -> tuple[Tensor, Tensor | None]:
    """``out = relu(scale * x + bias + identity)`` and ``temporal_shift(out, num_frames, fold)``, in one pass.

    Batch norm with fixed statistics is scale = weight / sqrt(var + eps), bias = bias - mean * scale. In a TSM-ResNet
    (Lin et al. 2019) ``out`` is the next block's identity, and the shifted copy the input of its first convolution.

    Args:
        x: (N*T, C, H, W) float32, float16, bfloat16 or float64, any strides. The frames of one snippet are consecutive.
        scale, bias: (C,) float32, or float64 with float64 x. They get no gradient. A scale of None stands for 1.
        identity: of x's shape and dtype, or None. It is read in x's memory format, and copied where it has another.
        identity_scale, identity_bias: as scale and bias, for the identity (a downsampling branch); both or neither.
        num_frames: T, frames in one snippet.
        fold: channels that the copy moves in each direction; 0 where no copy is wanted.

    Returns:
        ``out``, and the shifted copy (None where fold is 0), both new, of x's shape, dtype and memory format. The
        arithmetic is float32 (float64 for float64) with one rounding at its end. A NaN stays NaN.

        Saved for backward: ``out``, scale and identity_scale; so ``out`` must not be changed in place before. It can be
        differentiated once: the gradients of x and identity have no gradient of their own.

    Raises:
        ValueError: a shape, dtype or device that does not fit, num_frames < 1, N*T not a multiple of num_frames, fold
            outside [0, C // 2], half of the identity's affine, or an affine that requires a gradient.
    """
    check_snippets("residual_shift", "x", x, num_frames, fold)
    _check_features("residual_shift", "identity", identity, x)
    if (identity_scale is None) != (identity_bias is None):
        raise ValueError("residual_shift: identity_scale and identity_bias come together")
    if identity is None and identity_scale is not None:
        raise ValueError("residual_shift: identity_scale and identity_bias come with an identity")
    _check_floating("residual_shift", x)
    affine = {"scale": scale, "bias": bias, "identity_scale": identity_scale, "identity_bias": identity_bias}
    _check_channels("residual_shift", affine, x)
    run = library.operator("residual_shift", x, identity)
    out, shifted = run(x, scale, bias, identity, identity_scale, identity_bias, num_frames, fold)
    return out, shifted if fold else None


def residual_shift_backward(
    grad_out: Tensor | None,
    grad_shifted: Tensor | None,
    out: Tensor,
    scale: Tensor | None,
    identity_scale: Tensor | None = None,
    with_identity: bool = False,
    num_frames: int = 1,
    fold: int = 0,
) -> tuple[Tensor, Tensor | None]:
    """The gradients of ``residual_shift``'s x and identity, in one pass: for autograd functions written by hand.

    With g = grad_out + the adjoint shift of grad_shifted, and g = 0 where out <= 0: grad_x = scale * g, and
    grad_identity = identity_scale * g, or g itself.

    Args:
        grad_out, grad_shifted: of out's shape and dtype, any strides; None counts as zero.
        out: (N*T, C, H, W) what ``residual_shift`` returned.
        scale, identity_scale: (C,) or None, as given to ``residual_shift``.
        with_identity: whether the identity's gradient is wanted.
        num_frames, fold: as given to ``residual_shift``.

    Returns:
        grad_x, and grad_identity (None if not wanted), new, of out's shape, dtype and memory format. The arithmetic is
        float32 (float64 for float64) with one rounding at its end. No gradient flows through them.

    Raises:
        ValueError: as ``residual_shift``; and for grad_shifted where fold is 0.
    """
    op = "residual_shift_backward"
    check_snippets(op, "out", out, num_frames, fold)
    _check_features(op, "grad_out", grad_out, out)
    _check_features(op, "grad_shifted", grad_shifted, out)
    if grad_shifted is not None and not fold:
        raise ValueError(f"{op}: grad_shifted needs the fold of the shifted copy, not 0")
    _check_floating(op, out)
    _check_channels(op, {"scale": scale, "identity_scale": identity_scale}, out)
    run = library.operator("residual_shift_backward", out, grad_out, grad_shifted)
    grad_x, grad_identity = run(grad_out, grad_shifted, out, scale, identity_scale, with_identity, num_frames, fold)
    return grad_x, grad_identity if with_identity else None


def _check_features(op: str, name: str, features: Tensor | None, x: Tensor) -> None:
    if features is None:
        return
    if features.shape != x.shape or features.dtype != x.dtype or features.device != x.device:
        raise ValueError(
            f"{op}: {name} must be {tuple(x.shape)} {x.dtype} on {x.device}, not "
            f"{tuple(features.shape)} {features.dtype} on {features.device}"
        )


def _check_floating(op: str, x: Tensor) -> None:
    if not x.dtype.is_floating_point:
        raise ValueError(f"{op}: the features must be floating point, not {x.dtype}")


def _check_channels(op: str, affine: dict[str, Tensor | None], x: Tensor) -> None:
    size, device = x.shape[1:2], x.device
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    for name, numbers in affine.items():
        if numbers is None:
            continue
        if numbers.shape != size or numbers.dtype != dtype or numbers.device != device:
            raise ValueError(
                f"{op}: {name} must be ({x.shape[1]},) {dtype} on {device}, not "
                f"{tuple(numbers.shape)} {numbers.dtype} on {numbers.device}"
            )
        if numbers.requires_grad and torch.is_grad_enabled():
            raise ValueError(f"{op}: {name} gets no gradient, but requires one: detach it, or freeze batch norm")


@cache
def _kernel() -> Any:
    """The module of the Triton forms, imported when one first runs: elsewhere Triton may be missing."""
    from . import kernel

    return kernel


def _triton(*arguments: Any) -> Any:
    return _kernel().residual_shift(*arguments)


def _triton_backward(*arguments: Any) -> Any:
    return _kernel().residual_shift_backward(*arguments)


def _direct(*arguments: Any) -> Any:
    return _kernel().shift_if_wanted(*arguments)


def _direct_backward(*arguments: Any) -> Any:
    return _kernel().gradients_wanted(*arguments)


def _fake(
    x: Tensor,
    scale: Tensor | None,
    bias: Tensor,
    identity: Tensor | None,
    identity_scale: Tensor | None,
    identity_bias: Tensor | None,
    num_frames: int,
    fold: int,
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), torch.empty_like(x) if fold else x.new_empty(0)


def _fake_backward(
    grad_out: Tensor | None,
    grad_shifted: Tensor | None,
    out: Tensor,
    scale: Tensor | None,
    identity_scale: Tensor | None,
    with_identity: bool,
    num_frames: int,
    fold: int,
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(out), torch.empty_like(out) if with_identity else out.new_empty(0)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    _, scale, _, _, identity_scale, _, num_frames, fold = inputs
    ctx.save_for_backward(output[0], scale, identity_scale)
    ctx.arguments = (num_frames, fold)
    ctx.set_materialize_grads(False)  # a gradient that is missing stays None, where zeros would be read and added


def _backward(ctx: Any, grad_out: Tensor | None, grad_shifted: Tensor | None) -> tuple[Tensor | None, ...]:
    out, scale, identity_scale = ctx.saved_tensors
    num_frames, fold = ctx.arguments
    if grad_out is None and (grad_shifted is None or not fold):
        return (None,) * 8
    with_identity = ctx.needs_input_grad[3]
    run = library.operator("residual_shift_backward", out, grad_out, grad_shifted)
    grad_x, grad_identity = run(
        grad_out, grad_shifted if fold else None, out, scale, identity_scale, with_identity, num_frames, fold
    )
    return grad_x, None, None, grad_identity if with_identity else None, None, None, None, None


def _no_second_derivative(ctx: Any, *grads: Tensor) -> None:
    raise NotImplementedError("residual_shift: its gradient cannot be differentiated again")


library.define(
    "residual_shift(Tensor x, Tensor? scale, Tensor bias, Tensor? identity, Tensor? identity_scale, "
    "Tensor? identity_bias, int num_frames, int fold) -> (Tensor out, Tensor shifted)",
    reference.residual_shift,
    _fake,
    triton=_triton,
    direct=_direct,
)
library.define(
    "residual_shift_backward(Tensor? grad_out, Tensor? grad_shifted, Tensor out, Tensor? scale, "
    "Tensor? identity_scale, bool with_identity, int num_frames, int fold) -> (Tensor grad_x, Tensor grad_identity)",
    reference.residual_shift_backward,
    _fake_backward,
    triton=_triton_backward,
    direct=_direct_backward,
)
library.differentiate("residual_shift", _backward, _setup_context)
library.differentiate("residual_shift_backward", _no_second_derivative)

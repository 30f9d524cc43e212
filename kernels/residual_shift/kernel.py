"""Triton forms of residual_shift and its backward; rows, granules and tiles are those of temporal_shift's kernel.

The forward pass spreads: a program computes its block once and stores it twice, the copy partly into the frames beside
its own. The backward pass gathers in the same way, so neither needs atomics, and each element is written once.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..launch import Launch, Launcher
from ..temporal_shift.kernel import laid_out_as, place, rows_of, tile


@triton.jit
def residual_shift_kernel(
    x,
    scale,
    bias,
    identity,
    identity_scale,
    identity_bias,
    out,
    shifted,
    inner,
    row,
    moved,
    image,
    num_blocks,
    num_frames,
    BLOCK: tl.constexpr,
    GRANULE: tl.constexpr,
    WIDE: tl.constexpr,
):
    snippet, frame, granules, position, step = place(row, moved, num_blocks, num_frames, BLOCK, GRANULE, WIDE)
    lanes = tl.arange(0, GRANULE)[None, :]
    first = snippet * num_frames
    elements = granules + lanes
    here = (first + frame) * image + elements
    inside = granules < image
    channel = (position + lanes) // inner
    number: tl.constexpr = bias.dtype.element_ty
    value = tl.load(x + here, mask=inside, other=0).to(number)
    if scale is not None:
        value = value * tl.load(scale + channel)
    value = value + tl.load(bias + channel)
    if identity is not None:
        added = tl.load(identity + here, mask=inside, other=0).to(number)
        if identity_scale is not None:
            added = added * tl.load(identity_scale + channel) + tl.load(identity_bias + channel)
        value += added
    value = tl.where(value < 0, 0.0, value).to(out.dtype.element_ty)  # a NaN stays
    tl.store(out + here, value, mask=inside)
    if shifted is not None:
        # Frames form a ring: what would leave the snippet at one end is, as zeros, what comes in at the other.
        target = frame + step
        lost = (target < 0) | (target >= num_frames)
        target = tl.where(target < 0, num_frames - 1, tl.where(target >= num_frames, 0, target))
        value = tl.where(lost, tl.zeros_like(value), value)
        tl.store(shifted + (first + target) * image + elements, value, mask=inside)


@triton.jit
def residual_shift_backward_kernel(
    grad_out,
    grad_shifted,
    out,
    scale,
    identity_scale,
    grad_x,
    grad_identity,
    inner,
    row,
    moved,
    image,
    num_blocks,
    num_frames,
    BLOCK: tl.constexpr,
    GRANULE: tl.constexpr,
    WIDE: tl.constexpr,
):
    snippet, frame, granules, position, step = place(row, moved, num_blocks, num_frames, BLOCK, GRANULE, WIDE)
    lanes = tl.arange(0, GRANULE)[None, :]
    first = snippet * num_frames
    elements = granules + lanes
    here = (first + frame) * image + elements
    inside = granules < image
    channel = (position + lanes) // inner
    number: tl.constexpr = tl.float64 if out.dtype.element_ty == tl.float64 else tl.float32
    grad = tl.zeros((BLOCK // GRANULE, GRANULE), dtype=number)
    if grad_out is not None:
        grad += tl.load(grad_out + here, mask=inside, other=0).to(number)
    if grad_shifted is not None:
        source = frame + step
        there = (source >= 0) & (source < num_frames)
        limit = tl.where(there, image, 0)
        grad += tl.load(grad_shifted + (first + source) * image + elements, mask=granules < limit, other=0).to(number)
    grad = tl.where(tl.load(out + here, mask=inside, other=0).to(number) <= 0, 0.0, grad)
    value = grad * tl.load(scale + channel) if scale is not None else grad
    tl.store(grad_x + here, value.to(grad_x.dtype.element_ty), mask=inside)
    if grad_identity is not None:
        if identity_scale is not None:
            grad *= tl.load(identity_scale + channel)
        tl.store(grad_identity + here, grad.to(grad_identity.dtype.element_ty), mask=inside)


def _launch(
    kernel: Any, like: Tensor, tensors: dict[str, Tensor | None], num_frames: int, fold: int, block: int
) -> Launch:
    rows = rows_of(like)
    assert rows is not None
    tiling = tile(rows, like.shape[0], num_frames, fold, block)
    arguments: dict[str, Tensor | int | float | None] = {**tensors, "inner": rows.inner, **tiling.arguments}
    return Launch(kernel, tiling.grid, arguments, tiling.constants)


def residual_shift_launch(
    x: Tensor,
    scale: Tensor | None,
    bias: Tensor,
    identity: Tensor | None,
    identity_scale: Tensor | None,
    identity_bias: Tensor | None,
    out: Tensor,
    shifted: Tensor | None,
    num_frames: int,
    fold: int,
) -> Launch:
    """``x``, ``identity``, ``out`` and ``shifted`` have the same strides, images one after the other (``rows_of``)."""
    tensors = {
        "x": x,
        "scale": scale,
        "bias": bias,
        "identity": identity,
        "identity_scale": identity_scale,
        "identity_bias": identity_bias,
        "out": out,
        "shifted": shifted,
    }
    return _launch(residual_shift_kernel, out, tensors, num_frames, fold, 1024)


def residual_shift_backward_launch(
    grad_out: Tensor | None,
    grad_shifted: Tensor | None,
    out: Tensor,
    scale: Tensor | None,
    identity_scale: Tensor | None,
    grad_x: Tensor,
    grad_identity: Tensor | None,
    num_frames: int,
    fold: int,
) -> Launch:
    """All gradients have the strides of ``out``, images one after the other (``rows_of``)."""
    tensors = {
        "grad_out": grad_out,
        "grad_shifted": grad_shifted,
        "out": out,
        "scale": scale,
        "identity_scale": identity_scale,
        "grad_x": grad_x,
        "grad_identity": grad_identity,
    }
    return _launch(residual_shift_backward_kernel, grad_x, tensors, num_frames, fold, 1024)


_forward, _backward = Launcher(), Launcher(given=2)


def shift_if_wanted(
    x: Tensor,
    scale: Tensor | None,
    bias: Tensor,
    identity: Tensor | None,
    identity_scale: Tensor | None,
    identity_bias: Tensor | None,
    num_frames: int,
    fold: int,
) -> tuple[Tensor, Tensor | None]:
    """``residual_shift``, with None in the place of an empty tensor."""
    out = torch.empty_like(x)
    shifted = torch.empty_like(x) if fold else None
    tensors, key = (
        (x, scale, bias, identity, identity_scale, identity_bias, out, shifted),
        (num_frames, fold, x.dtype, x.shape),
    )
    if _forward.repeat(tensors, key) or x.numel() == 0:
        return out, shifted
    if rows_of(out) is None:
        plain = None if identity is None else identity.contiguous()
        plain_out, plain_shifted = shift_if_wanted(
            x.contiguous(), scale, bias, plain, identity_scale, identity_bias, num_frames, fold
        )
        if shifted is not None and plain_shifted is not None:
            shifted.copy_(plain_shifted)
        return out.copy_(plain_out), shifted
    launch = residual_shift_launch(
        laid_out_as(out, x),
        _contiguous(scale),
        bias.contiguous(),
        None if identity is None else laid_out_as(out, identity),
        _contiguous(identity_scale),
        _contiguous(identity_bias),
        out,
        shifted,
        num_frames,
        fold,
    )
    _forward.run(launch, tensors, key)
    return out, shifted


def gradients_wanted(
    grad_out: Tensor | None,
    grad_shifted: Tensor | None,
    out: Tensor,
    scale: Tensor | None,
    identity_scale: Tensor | None,
    with_identity: bool,
    num_frames: int,
    fold: int,
) -> tuple[Tensor, Tensor | None]:
    """``residual_shift_backward``, with None in the place of an empty tensor."""
    grad_x = torch.empty_like(out)
    grad_identity = torch.empty_like(out) if with_identity else None
    if grad_out is None and grad_shifted is None:
        return grad_x.zero_(), None if grad_identity is None else grad_identity.zero_()
    tensors, key = (
        (grad_out, grad_shifted, out, scale, identity_scale, grad_x, grad_identity),
        (num_frames, fold, out.dtype, out.shape),
    )
    if _backward.repeat(tensors, key) or out.numel() == 0:
        return grad_x, grad_identity
    if rows_of(grad_x) is None:
        plain_x, plain_identity = gradients_wanted(
            _contiguous(grad_out),
            _contiguous(grad_shifted),
            out.contiguous(),
            scale,
            identity_scale,
            with_identity,
            num_frames,
            fold,
        )
        if grad_identity is not None and plain_identity is not None:
            grad_identity.copy_(plain_identity)
        return grad_x.copy_(plain_x), grad_identity
    launch = residual_shift_backward_launch(
        None if grad_out is None else laid_out_as(grad_x, grad_out),
        None if grad_shifted is None else laid_out_as(grad_x, grad_shifted),
        laid_out_as(grad_x, out),
        _contiguous(scale),
        _contiguous(identity_scale),
        grad_x,
        grad_identity,
        num_frames,
        fold,
    )
    _backward.run(launch, tensors, key)
    return grad_x, grad_identity


def _contiguous(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.contiguous()


def residual_shift(*arguments: Any) -> tuple[Tensor, Tensor]:
    out, shifted = shift_if_wanted(*arguments)
    return out, out.new_empty(0) if shifted is None else shifted


def residual_shift_backward(*arguments: Any) -> tuple[Tensor, Tensor]:
    grad_x, grad_identity = gradients_wanted(*arguments)
    return grad_x, grad_x.new_empty(0) if grad_identity is None else grad_identity


def examples() -> dict[str, Launch]:
    """The launches of a ResNet's blocks, 64 frames: the hot ones channels-last, then every other variant once."""
    launches: dict[str, Launch] = {}
    for dtype, name in ((torch.float16, "fp16"), (torch.bfloat16, "bf16"), (torch.float32, "fp32")):
        launches |= _example(f"{name} channels-last", 64, 56, dtype, fold=8)
        launches |= _example(f"{name} channels-last downsampled", 128, 28, dtype, fold=16, affine=True)
        launches |= _example(f"{name} channels-last no identity", 256, 14, dtype, identity=False)
        launches |= _example(f"{name} channels-last no scale", 64, 56, dtype, fold=8, scaled=False)
        launches |= _example(f"{name} channels-last last block", 512, 7, dtype)
        launches |= _example(f"{name} NCHW", 64, 56, dtype, fold=8, layout=torch.contiguous_format)
    launches |= _example("fp32 channels-last", 32, 56, torch.float32, fold=4)
    return launches | _example("bf16 channels-last", 36, 56, torch.bfloat16, fold=3)


def _example(
    name: str,
    channels: int,
    side: int,
    dtype: torch.dtype,
    identity: bool = True,
    fold: int = 0,
    affine: bool = False,
    scaled: bool = True,
    layout: torch.memory_format = torch.channels_last,
) -> dict[str, Launch]:
    x = torch.empty(64, channels, side, side, dtype=dtype, device="meta").contiguous(memory_format=layout)
    numbers = torch.empty(channels, device="meta")
    scale, more = numbers if scaled else None, numbers if affine else None
    added, shifted = x if identity else None, x if fold else None
    name = f"{name} {side}x{side}x{channels} fold {fold}"
    return {
        f"forward {name}": residual_shift_launch(x, scale, numbers, added, more, more, x, shifted, 8, fold),
        f"backward {name}": residual_shift_backward_launch(x, shifted, x, scale, more, x, added, 8, fold),
    }

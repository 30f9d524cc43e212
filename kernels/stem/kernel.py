"""Triton form of the stem, for every layout: one kernel for each operator, whose tile follows the layout.

A tile is a few windows by a few channels, so that the pixels that neighbouring windows share come from the cache. In
channels-last a thread holds 8 adjacent channels of a window: 16-byte accesses in 16-bit types, two of them in float32.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..launch import Launch, Launcher
from .reference import empty_beside, memory_format

_THREADS = 128  # of one program: 4 warps
_INPUT_BLOCK = 16 * _THREADS  # values of one program of stem_input: 16 bytes of frames for each thread


@triton.jit
def _tile(
    tiles_height, tiles_width, tiles_channels,
    TILE_HEIGHT: tl.constexpr, TILE_WIDTH: tl.constexpr, TILE_CHANNELS: tl.constexpr,
):  # fmt: skip
    """This program's frame, its windows' rows and columns (P,) and its channels (K,), as int64."""
    program = tl.program_id(0)
    tile_channel = program % tiles_channels
    program //= tiles_channels
    tile_column = program % tiles_width
    program //= tiles_width
    tile_row = program % tiles_height
    frame = program // tiles_height
    window = tl.arange(0, TILE_HEIGHT * TILE_WIDTH)
    row = tile_row.to(tl.int64) * TILE_HEIGHT + window // TILE_WIDTH
    column = tile_column.to(tl.int64) * TILE_WIDTH + window % TILE_WIDTH
    channel = tile_channel.to(tl.int64) * TILE_CHANNELS + tl.arange(0, TILE_CHANNELS)
    return frame.to(tl.int64), row, column, channel


@triton.jit
def stem_kernel(
    x, scale, bias, pooled, argmax,
    channels, height, width, out_height, out_width, tiles_height, tiles_width, tiles_channels,
    x_frame, x_channel, x_row, x_column, out_frame, out_channel, out_row, out_column,
    TILE_HEIGHT: tl.constexpr, TILE_WIDTH: tl.constexpr, TILE_CHANNELS: tl.constexpr,
):  # fmt: skip
    frame, i, j, c = _tile(tiles_height, tiles_width, tiles_channels, TILE_HEIGHT, TILE_WIDTH, TILE_CHANNELS)
    number: tl.constexpr = bias.dtype.element_ty
    if scale is not None:
        a = tl.load(scale + c, mask=c < channels, other=0)[None, :]
    b = tl.load(bias + c, mask=c < channels, other=0)[None, :]
    x_row = tl.cast(x_row, tl.int64)
    x_column = tl.cast(x_column, tl.int64)
    corner = x + frame * x_frame + ((2 * i - 1) * x_row + (2 * j - 1) * x_column)[:, None] + (c * x_channel)[None, :]

    # The ReLU is the starting value: a maximum of zero at the first pixel that is there.
    best = tl.zeros([TILE_HEIGHT * TILE_WIDTH, TILE_CHANNELS], dtype=number)
    first = tl.where(i > 0, 0, 3) + tl.where(j > 0, 0, 1)
    position = tl.zeros([TILE_HEIGHT * TILE_WIDTH, TILE_CHANNELS], dtype=tl.int32) + first[:, None]
    for at in tl.static_range(9):
        row = 2 * i - 1 + at // 3
        column = 2 * j - 1 + at % 3
        inside = ((row >= 0) & (row < height) & (column >= 0) & (column < width))[:, None]
        pixel = corner + (at // 3 * x_row + at % 3 * x_column)
        value = tl.load(pixel, mask=inside & (c < channels)[None, :], other=0).to(number)
        if scale is not None:
            value = value * a
        value = value + b
        take = inside & ((value > best) | (value != value))
        best = tl.where(take, value, best)
        position = tl.where(take, at, position)

    to = frame * out_frame + (i * out_row + j * out_column)[:, None] + (c * out_channel)[None, :]
    mask = ((i < out_height) & (j < out_width))[:, None] & (c < channels)[None, :]
    tl.store(pooled + to, best.to(pooled.dtype.element_ty), mask=mask)
    tl.store(argmax + to, position.to(tl.int8), mask=mask)


@triton.jit
def _window(grad, pooled, argmax, mask, dtype: tl.constexpr):
    """A window's gradient, and the position it belongs to: -1 for nowhere, as where there is no window."""
    value = tl.load(grad, mask=mask, other=0).to(dtype)
    result = tl.load(pooled, mask=mask, other=0).to(dtype)
    position = tl.load(argmax, mask=mask, other=-1).to(tl.int32)
    return value, tl.where(result <= 0, -1, position)


@triton.jit
def stem_backward_kernel(
    grad, pooled, argmax, scale, grad_x,
    channels, height, width, out_height, out_width, tiles_height, tiles_width, tiles_channels,
    grad_frame, grad_channel, grad_row, grad_column,
    pooled_frame, pooled_channel, pooled_row, pooled_column,
    argmax_frame, argmax_channel, argmax_row, argmax_column,
    x_frame, x_channel, x_row, x_column,
    TILE_HEIGHT: tl.constexpr, TILE_WIDTH: tl.constexpr, TILE_CHANNELS: tl.constexpr,
):  # fmt: skip
    frame, i, j, c = _tile(tiles_height, tiles_width, tiles_channels, TILE_HEIGHT, TILE_WIDTH, TILE_CHANNELS)
    dtype: tl.constexpr = tl.float64 if grad.dtype.element_ty == tl.float64 else tl.float32
    in_channels = (c < channels)[None, :]
    grad += frame * grad_frame + (i * grad_row + j * grad_column)[:, None] + (c * grad_channel)[None, :]
    pooled += frame * pooled_frame + (i * pooled_row + j * pooled_column)[:, None] + (c * pooled_channel)[None, :]
    argmax += frame * argmax_frame + (i * argmax_row + j * argmax_column)[:, None] + (c * argmax_channel)[None, :]

    # The pixels (2i, 2j) to (2i + 1, 2j + 1) lie under the windows (i, j) to (i + 1, j + 1) and no others.
    here = ((i < out_height) & (j < out_width))[:, None] & in_channels
    right = ((i < out_height) & (j + 1 < out_width))[:, None] & in_channels
    below = ((i + 1 < out_height) & (j < out_width))[:, None] & in_channels
    across = ((i + 1 < out_height) & (j + 1 < out_width))[:, None] & in_channels
    g00, p00 = _window(grad, pooled, argmax, here, dtype)
    g01, p01 = _window(grad + grad_column, pooled + pooled_column, argmax + argmax_column, right, dtype)
    grad += grad_row
    pooled += pooled_row
    argmax += argmax_row
    g10, p10 = _window(grad, pooled, argmax, below, dtype)
    g11, p11 = _window(grad + grad_column, pooled + pooled_column, argmax + argmax_column, across, dtype)
    even_left = tl.where(p00 == 4, g00, 0)
    even_right = tl.where(p00 == 5, g00, 0) + tl.where(p01 == 3, g01, 0)
    odd_left = tl.where(p00 == 7, g00, 0) + tl.where(p10 == 1, g10, 0)
    odd_right = (tl.where(p00 == 8, g00, 0) + tl.where(p01 == 6, g01, 0)
                 + tl.where(p10 == 2, g10, 0) + tl.where(p11 == 0, g11, 0))  # fmt: skip

    if scale is not None:
        a = tl.load(scale + c, mask=c < channels, other=0)[None, :]
        even_left *= a
        even_right *= a
        odd_left *= a
        odd_right *= a
    grad_x += frame * x_frame + (2 * i * x_row + 2 * j * x_column)[:, None] + (c * x_channel)[None, :]
    result: tl.constexpr = grad_x.dtype.element_ty
    odd_row = (2 * i + 1 < height)[:, None]
    odd_column = (2 * j + 1 < width)[:, None]
    tl.store(grad_x, even_left.to(result), mask=here)
    tl.store(grad_x + x_column, even_right.to(result), mask=here & odd_column)
    grad_x += x_row
    tl.store(grad_x, odd_left.to(result), mask=here & odd_row)
    tl.store(grad_x + x_column, odd_right.to(result), mask=here & odd_row & odd_column)


@triton.jit
def stem_input_kernel(frames, mean, x, size, BLOCK: tl.constexpr):
    start = tl.program_id(0).to(tl.int64) * BLOCK
    inside = tl.arange(0, BLOCK)
    exact: tl.constexpr = tl.float64 if x.dtype.element_ty == tl.float64 else tl.float32
    colour = ((start % 3).to(tl.int32) + inside) % 3
    centre = tl.where(colour == 0, tl.load(mean), tl.where(colour == 1, tl.load(mean + 1), tl.load(mean + 2)))
    mask = start + inside < size
    value = tl.load(frames + start + inside, mask=mask, other=0).to(exact) - centre.to(exact)
    tl.store(x + start + inside, value.to(x.dtype.element_ty), mask=mask)


def _strides(name: str, x: Tensor) -> dict[str, int]:
    return {
        f"{name}_{axis}": stride for axis, stride in zip(("frame", "channel", "row", "column"), x.stride(), strict=True)
    }


def _tiles(windows: Tensor) -> tuple[int, dict[str, int], dict[str, int]]:
    """Programs, the counts of tiles, and a tile's size: channels in it where they are adjacent, else columns."""
    num, channels, height, width = windows.shape
    if memory_format(windows) == torch.channels_last:
        # Eight channels a thread where that is aligned; else every access is of one value, and fewer hide their wait.
        tile = (8 if channels % 16 == 0 else 2) * _THREADS
        tile_channels = min(64, triton.next_power_of_2(channels))
        num_windows = tile // tile_channels
        tile_height = 1 << (num_windows.bit_length() - 1) // 2
        tile_width = num_windows // tile_height
    else:
        tile_channels = 1
        tile_width = min(64, triton.next_power_of_2(width))
        tile_height = min(2 * _THREADS // tile_width, triton.next_power_of_2(height))
    counts = {
        "tiles_height": triton.cdiv(height, tile_height),
        "tiles_width": triton.cdiv(width, tile_width),
        "tiles_channels": triton.cdiv(channels, tile_channels),
    }
    sizes = {"TILE_HEIGHT": tile_height, "TILE_WIDTH": tile_width, "TILE_CHANNELS": tile_channels}
    return num * math.prod(counts.values()), counts, sizes


def stem_launch(x: Tensor, scale: Tensor | None, bias: Tensor, pooled: Tensor, argmax: Tensor) -> Launch:
    """pooled and argmax have the same strides; scale and bias are contiguous."""
    _, channels, height, width = x.shape
    programs, counts, sizes = _tiles(pooled)
    return Launch(
        stem_kernel,
        (programs,),
        {
            **{"x": x, "scale": scale, "bias": bias, "pooled": pooled, "argmax": argmax, "channels": channels},
            **{"height": height, "width": width, "out_height": pooled.shape[2], "out_width": pooled.shape[3]},
            **counts,
            **_strides("x", x),
            **_strides("out", pooled),
        },
        sizes,
        fp_fusion=False,  # the affine rounds as the reference's does, so that the same pixels are equal
    )


def stem_backward_launch(grad: Tensor, pooled: Tensor, argmax: Tensor, scale: Tensor | None, grad_x: Tensor) -> Launch:
    """Any strides; scale is contiguous."""
    _, channels, height, width = grad_x.shape
    programs, counts, sizes = _tiles(grad)
    return Launch(
        stem_backward_kernel,
        (programs,),
        {
            **{"grad": grad, "pooled": pooled, "argmax": argmax, "scale": scale, "grad_x": grad_x},
            **{"channels": channels, "height": height, "width": width},
            **{"out_height": grad.shape[2], "out_width": grad.shape[3]},
            **counts,
            **_strides("grad", grad),
            **_strides("pooled", pooled),
            **_strides("argmax", argmax),
            **_strides("x", grad_x),
        },
        sizes,
    )


def stem_input_launch(frames: Tensor, mean: Tensor, x: Tensor) -> Launch:
    """frames (N, H, W, 3) are contiguous, x (N, 3, H, W) is channels-last: the same order of values."""
    return Launch(
        stem_input_kernel,
        (triton.cdiv(frames.numel(), _INPUT_BLOCK),),
        {"frames": frames, "mean": mean, "x": x, "size": frames.numel()},
        {"BLOCK": _INPUT_BLOCK},
    )


_stem, _stem_backward, _stem_input = Launcher(), Launcher(), Launcher()


def stem(x: Tensor, scale: Tensor | None, bias: Tensor) -> tuple[Tensor, Tensor]:
    num, channels, height, width = x.shape
    size = (num, channels, (height - 1) // 2 + 1, (width - 1) // 2 + 1)
    pooled, argmax = empty_beside(x, size), empty_beside(x, size, torch.int8)
    tensors, key = (x, scale, bias, pooled, argmax), (x.dtype, x.shape)
    if not _stem.repeat(tensors, key):
        scale = None if scale is None else scale.contiguous()
        _stem.run(stem_launch(x, scale, bias.contiguous(), pooled, argmax), tensors, key)
    return pooled, argmax


def stem_backward(
    grad: Tensor, pooled: Tensor, argmax: Tensor, scale: Tensor | None, height: int, width: int
) -> Tensor:
    grad_x = empty_beside(grad, (*grad.shape[:2], height, width))
    tensors, key = (grad, pooled, argmax, scale, grad_x), (grad.dtype, grad_x.shape)
    if not _stem_backward.repeat(tensors, key):
        scale = None if scale is None else scale.contiguous()
        _stem_backward.run(stem_backward_launch(grad, pooled, argmax, scale, grad_x), tensors, key)
    return grad_x


def stem_input(frames: Tensor, mean: Tensor, dtype: torch.dtype) -> Tensor:
    frames = frames.contiguous()
    num, height, width, _ = frames.shape
    strides = (3 * height * width, 1, 3 * width, 3)
    x = frames.new_empty_strided((num, 3, height, width), strides, dtype=dtype)
    tensors, key = (frames, mean, x), (dtype, frames.shape)
    if not _stem_input.repeat(tensors, key):
        _stem_input.run(stem_input_launch(frames, mean.contiguous(), x), tensors, key)
    return x


def examples() -> dict[str, Launch]:
    """The launches of the encoder at 224 pixels (64 frames); of a narrow one, and of the other layouts, one each."""
    launches: dict[str, Launch] = {}

    def add(
        name: str,
        dtype: torch.dtype,
        channels: int,
        memory: torch.memory_format = torch.channels_last,
        scaled: bool = True,
    ) -> None:
        x = torch.empty(64, channels, 112, 112, dtype=dtype, device="meta", memory_format=memory)
        pooled = empty_beside(x, (64, channels, 56, 56))
        argmax = empty_beside(x, pooled.shape, torch.int8)
        bias = torch.empty(channels, device="meta")
        scale = bias if scaled else None
        launches[f"stem {name} 112x112x{channels}"] = stem_launch(x, scale, bias, pooled, argmax)
        launches[f"stem_backward {name} 112x112x{channels}"] = stem_backward_launch(pooled, pooled, argmax, scale, x)

    for name, dtype in (("fp32", torch.float32), ("fp16", torch.float16), ("bf16", torch.bfloat16)):
        add(f"{name} channels-last", dtype, 64)
        add(f"{name} channels-last no scale", dtype, 64, scaled=False)
        frames = torch.empty(64, 224, 224, 3, dtype=torch.uint8, device="meta")
        x = torch.empty(64, 224, 224, 3, dtype=dtype, device="meta").permute(0, 3, 1, 2)
        launches[f"stem_input {name} 224x224x3"] = stem_input_launch(frames, torch.empty(3, device="meta"), x)
    add("fp32 channels-last", torch.float32, 32)
    add("fp32 channels-last", torch.float32, 9)
    add("fp32 NCHW", torch.float32, 64, torch.contiguous_format)
    return launches

"""Triton form of quantize and dequantize: tiles of pixels by channels, in 16-byte pieces where the layout allows.

A program of quantize holds a few channels of one frame. It reads them twice: for their maxima, and, from the cache, for
the codes. In channels-last a thread holds 16 adjacent channels of a pixel, whose codes are 16 bytes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..launch import Launch, Launcher
from ..stem.reference import empty_beside, memory_format

_WARPS = 8
_TILE = 16 * 32 * _WARPS  # values of one tile: 16 bytes of codes for each thread


@triton.jit
def _divide(a, b):
    """a / b to the nearest number: what `/` is for float64 alone."""
    if b.dtype == tl.float64:
        return a / b
    else:
        return tl.div_rn(a, b)


@triton.jit
def quantize_kernel(
    x, codes, scale, channels, pixels, channel_stride, pixel_stride, channel_blocks,
    SMALLEST: tl.constexpr, WHOLE: tl.constexpr, PIXELS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    frame = (program // channel_blocks).to(tl.int64)
    channel = (program % channel_blocks).to(tl.int64) * CHANNELS + tl.arange(0, CHANNELS)
    pixel = tl.arange(0, PIXELS)[:, None]
    pixel_stride = tl.cast(pixel_stride, tl.int64)
    start = frame * channels * pixels + pixel * pixel_stride + (channel * channel_stride)[None, :]
    in_channels = (channel < channels)[None, :]
    number: tl.constexpr = scale.dtype.element_ty
    bits: tl.constexpr = tl.int64 if number == tl.float64 else tl.int32
    without_sign: tl.constexpr = 0x7FFFFFFFFFFFFFFF if number == tl.float64 else 0x7FFFFFFF

    # The bits of numbers that are not negative have their order, with NaN above all.
    largest = tl.zeros([PIXELS, CHANNELS], dtype=bits)
    for first in range(0, pixels, PIXELS):
        mask = (pixel < pixels - first) & in_channels
        value = tl.load(x + start + first * pixel_stride, mask=mask, other=0).to(number)
        largest = tl.maximum(largest, tl.where(value <= 0, 0, value.to(bits, bitcast=True) & without_sign))
    maximum = tl.max(largest, axis=0).to(number, bitcast=True)
    step = _divide(maximum, tl.full([CHANNELS], 255, dtype=number))
    step = tl.where(step < SMALLEST, SMALLEST, step)
    tl.store(scale + frame * channels + channel, tl.where(maximum == 0, 0, step), mask=channel < channels)

    inverse = _divide(tl.full([CHANNELS], 1, dtype=number), step)[None, :]
    for first in range(0, pixels, PIXELS):
        mask = (pixel < pixels - first) & in_channels
        value = tl.load(x + start + first * pixel_stride, mask=mask, other=0).to(number)
        steps = value * inverse
        lifted = tl.where(steps > 1, steps, 1)
        # At WHOLE numbers are one apart: the sum is rounded to a whole number, ties to even, and ends in its bits.
        code = (lifted + WHOLE).to(bits, bitcast=True).to(tl.uint8)
        tl.store(codes + start + first * pixel_stride, tl.where(value <= 0, 0, code), mask=mask)


@triton.jit
def dequantize_kernel(
    codes, scale, x, channels, pixels, channel_stride, pixel_stride, channel_blocks, pixel_blocks,
    PIXELS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    channel = (program % channel_blocks).to(tl.int64) * CHANNELS + tl.arange(0, CHANNELS)
    program //= channel_blocks
    pixel = (program % pixel_blocks).to(tl.int64) * PIXELS + tl.arange(0, PIXELS)
    frame = (program // pixel_blocks).to(tl.int64)
    at = frame * channels * pixels + (pixel * pixel_stride)[:, None] + (channel * channel_stride)[None, :]
    mask = (pixel < pixels)[:, None] & (channel < channels)[None, :]
    step = tl.load(scale + frame * channels + channel, mask=channel < channels, other=0)[None, :]
    value = tl.load(codes + at, mask=mask, other=0).to(scale.dtype.element_ty) * step
    tl.store(x + at, value.to(x.dtype.element_ty), mask=mask)


@dataclass(frozen=True)
class Tiling:
    """How frames of a dense (N, C, H, W) tensor are cut into tiles."""

    arguments: dict[str, int]
    constants: dict[str, int]
    channel_blocks: int
    pixel_blocks: int


def _tile(x: Tensor) -> Tiling:
    channels, pixels = x.shape[1], x.shape[2] * x.shape[3]
    channels_last = memory_format(x) == torch.channels_last
    # Tiles are long where neighbours lie; 32 channels are whole sectors of memory, even of codes.
    longest = _TILE // 32 if channels_last else _TILE
    tile_pixels = min(longest, triton.next_power_of_2(max(1, pixels)))
    tile_channels = min(_TILE // tile_pixels, triton.next_power_of_2(max(1, channels)))
    channel_blocks = triton.cdiv(channels, tile_channels)
    return Tiling(
        {
            **{"channels": channels, "pixels": pixels, "channel_blocks": channel_blocks},
            "channel_stride": 1 if channels_last else pixels,
            "pixel_stride": channels if channels_last else 1,
        },
        {"PIXELS": tile_pixels, "CHANNELS": tile_channels},
        channel_blocks,
        triton.cdiv(pixels, tile_pixels),
    )


def quantize_launch(x: Tensor, codes: Tensor, scale: Tensor) -> Launch:
    """x and codes are dense, in the same memory format; scale is contiguous."""
    tiling = _tile(codes)
    limits = torch.finfo(scale.dtype)
    return Launch(
        quantize_kernel,
        (codes.shape[0] * tiling.channel_blocks,),
        {"x": x, "codes": codes, "scale": scale, **tiling.arguments},
        {"SMALLEST": limits.tiny, "WHOLE": 1 / limits.eps, **tiling.constants},
        num_warps=_WARPS,
        fp_fusion=False,  # a step is rounded before it becomes a whole number, as the reference's is
    )


def dequantize_launch(codes: Tensor, scale: Tensor, x: Tensor) -> Launch:
    """codes and x are dense, in the same memory format; scale is contiguous."""
    tiling = _tile(codes)
    return Launch(
        dequantize_kernel,
        (codes.shape[0] * tiling.channel_blocks * tiling.pixel_blocks,),
        {"codes": codes, "scale": scale, "x": x, **tiling.arguments, "pixel_blocks": tiling.pixel_blocks},
        tiling.constants,
        num_warps=_WARPS,
    )


_quantize, _dequantize = Launcher(), Launcher()


def quantize(x: Tensor) -> tuple[Tensor, Tensor]:
    codes = empty_beside(x, x.shape, torch.uint8)
    num, channels, _, _ = x.shape
    exact = torch.float64 if x.dtype == torch.float64 else torch.float32
    scale = x.new_empty_strided((num, channels), (max(1, channels), 1), dtype=exact)
    tensors, key = (x, codes, scale), (x.dtype, x.shape)
    if not _quantize.repeat(tensors, key):
        launch = quantize_launch(x.contiguous(memory_format=memory_format(x)), codes, scale)
        _quantize.run(launch, tensors, key)
    return codes, scale


def dequantize(codes: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    x = empty_beside(codes, codes.shape, dtype)
    tensors, key = (codes, scale, x), (dtype, codes.shape)
    if not _dequantize.repeat(tensors, key):
        launch = dequantize_launch(codes.contiguous(memory_format=memory_format(codes)), scale.contiguous(), x)
        _dequantize.run(launch, tensors, key)
    return x


def examples() -> dict[str, Launch]:
    """The launches of a ResNet's stages, 64 frames: the hot ones channels-last, then every other variant once."""
    launches: dict[str, Launch] = {}

    def add(name: str, dtype: torch.dtype, side: int, channels: int, memory: torch.memory_format) -> None:
        x = torch.empty(64, channels, side, side, dtype=dtype, device="meta", memory_format=memory)
        codes = empty_beside(x, x.shape, torch.uint8)
        scale = torch.empty(
            64, channels, dtype=torch.float64 if dtype == torch.float64 else torch.float32, device="meta"
        )
        launches[f"quantize {name} {side}x{side}x{channels}"] = quantize_launch(x, codes, scale)
        launches[f"dequantize {name} {side}x{side}x{channels}"] = dequantize_launch(codes, scale, x)

    for name, dtype in (("fp32", torch.float32), ("fp16", torch.float16), ("bf16", torch.bfloat16)):
        for side, channels in ((56, 64), (28, 128), (14, 256), (7, 512)):
            add(f"{name} channels-last", dtype, side, channels, torch.channels_last)
        add(f"{name} NCHW", dtype, 56, 64, torch.contiguous_format)
    add("fp32 channels-last", torch.float32, 56, 9, torch.channels_last)
    add("fp32 NCHW", torch.float32, 7, 512, torch.contiguous_format)
    add("fp64 channels-last", torch.float64, 56, 64, torch.channels_last)
    return launches

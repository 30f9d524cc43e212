"""Triton form of the temporal shift: every element read and written once, in 16-byte pieces wherever the layout allows.

An image is seen as rows: in a channels-last tensor a row is one pixel's C channels, in a contiguous one it is the whole
image, and in both the channels that move are the row's first elements. Direction and mask are decided for granules of
up to 8 elements, which move together: 8 where fold and the channel count are multiples of 8, and down to 1.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..launch import Launch, Launcher


@dataclass(frozen=True)
class Rows:
    """How one image of a dense (N, C, H, W) tensor lies in memory, in elements."""

    inner: int  # neighbours of one channel: 1 where channels-last, H*W where contiguous
    row: int  # all channels once
    image: int


def rows_of(x: Tensor) -> Rows | None:
    """The rows of a dense ``x``, or None unless its images lie one after the other."""
    sizes, strides = x.shape, x.stride()
    inner = row = image = 1
    # Dimensions of size 1 have no place in memory, and their strides mean nothing.
    left = [dim for dim in (1, 2, 3) if sizes[dim] != 1]
    while left:
        dim = next((dim for dim in left if strides[dim] == image), None)
        if dim is None:
            return None
        left.remove(dim)
        image *= sizes[dim]
        if dim == 1:
            row = image
        elif row == 1:
            inner = image
    return Rows(inner, row if sizes[1] != 1 else inner, image)


def laid_out_as(like: Tensor, x: Tensor) -> Tensor:
    """``x`` with the strides of ``like``, copied only where they differ."""
    if all(a == b or size == 1 for size, a, b in zip(x.shape, x.stride(), like.stride(), strict=True)):
        return x
    return torch.empty_like(like).copy_(x)


@dataclass(frozen=True)
class Tiling:
    """One program for each block of each image. The frames of a block are neighbours in the grid, so that what they
    read of each other is still in the cache.
    """

    grid: tuple[int]
    arguments: dict[str, int]
    constants: dict[str, Any]


def tile(rows: Rows, num_images: int, num_frames: int, fold: int, block: int) -> Tiling:
    """Blocks of ``block`` elements, in the largest granules that have one direction and lie in one row each."""
    num_blocks = triton.cdiv(rows.image, block)
    moved = fold * rows.inner
    granule = next(size for size in (8, 4, 2, 1) if rows.row % size == 0 and moved % size == 0)
    return Tiling(
        grid=(num_images * num_blocks,),
        arguments={
            "row": rows.row,
            "moved": moved,
            "image": rows.image,
            "num_blocks": num_blocks,
            "num_frames": num_frames,
        },
        constants={"BLOCK": block, "GRANULE": granule, "WIDE": rows.image + block >= 2**31},
    )


@triton.jit
def place(row, moved, num_blocks, num_frames, BLOCK: tl.constexpr, GRANULE: tl.constexpr, WIDE: tl.constexpr):
    """Of this program: its snippet, its frame, the offsets of its granules in the image, and which way each moves in
    the forward shift: -1 to the previous frame, 1 to the next, 0 stays.
    """
    program = tl.program_id(0)
    frame = program % num_frames
    program //= num_frames
    block = program % num_blocks
    snippet = program // num_blocks
    if WIDE:
        block = block.to(tl.int64)
    granules = block * BLOCK + tl.arange(0, BLOCK // GRANULE)[:, None] * GRANULE
    # The compiler does not see it through the remainder; with it the numbers of a granule's channels are read at once.
    position = tl.multiple_of(granules % row, (GRANULE, GRANULE))
    step = tl.where(position < moved, -1, tl.where(position - moved < moved, 1, 0))
    return snippet.to(tl.int64), frame, granules, position, step


@triton.jit
def shift_kernel(
    x,
    y,
    row,
    moved,
    image,
    num_blocks,
    num_frames,
    ADJOINT: tl.constexpr,
    BLOCK: tl.constexpr,
    GRANULE: tl.constexpr,
    WIDE: tl.constexpr,
):
    snippet, frame, granules, _, step = place(row, moved, num_blocks, num_frames, BLOCK, GRANULE, WIDE)
    source = frame + step if ADJOINT else frame - step
    there = (source >= 0) & (source < num_frames)
    first = snippet * num_frames
    elements = granules + tl.arange(0, GRANULE)[None, :]
    values = tl.load(x + (first + source) * image + elements, mask=granules < tl.where(there, image, 0), other=0)
    tl.store(y + (first + frame) * image + elements, values, mask=granules < image)


# Elements are moved as bits, so one compiled kernel serves every dtype of a size.
_CARRIER = {1: torch.uint8, 2: torch.float16, 4: torch.int32, 8: torch.int64}


def temporal_shift_launch(x: Tensor, y: Tensor, num_frames: int, fold: int, adjoint: bool) -> Launch:
    """From ``x`` to ``y``, which have the same strides, images one after the other (``rows_of``)."""
    rows = rows_of(y)
    assert rows is not None
    if x.is_complex():
        # The two parts of a number are neighbours: a contiguous dimension more, that no shift knows of.
        rows = Rows(2 * rows.inner, 2 * rows.row, 2 * rows.image)
        x, y = torch.view_as_real(x), torch.view_as_real(y)
    carrier = _CARRIER[x.element_size()]
    # Each of 128 threads has four 16-byte loads under way.
    tiling = tile(rows, x.shape[0], num_frames, fold, 8192 // x.element_size())
    arguments: dict[str, Tensor | int | float | None] = {"x": x.view(carrier), "y": y.view(carrier), **tiling.arguments}
    return Launch(shift_kernel, tiling.grid, arguments, {"ADJOINT": adjoint, **tiling.constants})


_shift = Launcher()


def temporal_shift(x: Tensor, num_frames: int, fold: int, adjoint: bool) -> Tensor:
    y = torch.empty_like(x)
    tensors, key = (x, y), (num_frames, fold, adjoint, x.dtype, x.shape)
    if _shift.repeat(tensors, key) or x.numel() == 0:
        return y
    if rows_of(y) is None:
        return y.copy_(temporal_shift(x.contiguous(), num_frames, fold, adjoint))
    _shift.run(temporal_shift_launch(laid_out_as(y, x), y, num_frames, fold, adjoint), tensors, key)
    return y


def examples() -> dict[str, Launch]:
    """The launches of a ResNet's stages, 64 frames: the hot ones channels-last, then every other variant once."""
    cases = [
        (carrier, layout, channels, side, channels // 8)
        for carrier in (torch.float16, torch.int32)
        for layout, stages in (
            ("channels-last", ((64, 56), (128, 28), (256, 14), (512, 7))),
            ("NCHW", ((64, 56),)),
        )
        for channels, side in stages
    ]
    cases += [(torch.int32, "channels-last", 32, 56, 4), (torch.float16, "channels-last", 36, 56, 3)]
    launches = {}
    for carrier, layout, channels, side, fold in cases:
        x = torch.empty(64, channels, side, side, dtype=carrier, device="meta")
        if layout == "channels-last":
            x = x.contiguous(memory_format=torch.channels_last)
        name = f"{8 * x.element_size()}-bit {layout} {side}x{side}x{channels} fold {fold}"
        launches[name] = temporal_shift_launch(x, torch.empty_like(x), 8, fold, adjoint=False)
    return launches

"""Triton form of temporal_roi_align's gradient on tensor cores: a matrix product, snippets by bins by channels, whose
left matrix is made where it is used, of the samples of a few bins at a time.

A gradient is read once for each block of snippets that its bin has a part in. One that is not finite may make those of
other snippets of the block NaN too, as in any matrix product.
"""

from __future__ import annotations

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton import knobs

from ..launch import Launch
from .samples import bins_of, clamped_to, position_of, samples_between

SNIPPETS = 128  # of a program
ROWS = 32  # bins whose gradients it multiplies at once
BLOCK = 64  # channels of a program
WARPS = 8
LEAST_TARGET = 80  # compute capability times 10: Triton has no products on the tensor cores of older GPUs
PROGRAMS = 256  # enough for any GPU, where there are so many ROIs
MOST_PARTS = 128  # that the ROIs are divided into for that


@triton.jit
def align_backward_product_kernel(
    grad,
    rois,
    order,
    offsets,
    out,
    num_snippets,
    channels,
    num_rois,
    NUM_BINS: tl.constexpr,
    RATIO: tl.constexpr,
    HALF: tl.constexpr,
    ONE_BLOCK: tl.constexpr,
    SNIPPETS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A block of the snippets of a batch element, and a part of its ROIs. Without order and offsets all ROIs are of the
    one batch element.
    """
    blocks = tl.cdiv(num_snippets, SNIPPETS)
    batch = (tl.program_id(0) // blocks).to(tl.int64)
    first_snippet = tl.program_id(0) % blocks * SNIPPETS
    snippet = first_snippet + tl.arange(0, SNIPPETS)
    low, high = first_snippet - 1.0, (first_snippet + SNIPPETS).to(tl.float32)
    channel = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    first_row = tl.cast(0, tl.int64)
    last_row = tl.cast(num_rois, tl.int64) * NUM_BINS
    if offsets is not None:
        first_row = tl.load(offsets + batch) * NUM_BINS
        last_row = tl.load(offsets + batch + 1) * NUM_BINS
    of_part = tl.cdiv(tl.cdiv(last_row - first_row, ROWS), tl.num_programs(2)) * ROWS
    first_row += tl.program_id(2) * of_part
    last_row = tl.minimum(first_row + of_part, last_row)

    sums = tl.zeros((SNIPPETS, BLOCK), tl.float32)
    for chunk in range(first_row, last_row, ROWS):
        row = chunk + tl.arange(0, ROWS)
        there = row < last_row
        place = row // NUM_BINS
        bins = (row - place * NUM_BINS).to(tl.int32)
        if order is not None:
            roi = tl.load(order + place, mask=there, other=0)
        else:
            roi = tl.where(there, place, 0)
            there = there & (tl.load(rois + roi * 3) == 0.0)
        start, width, count, spacing = bins_of(rois, roi, there, NUM_BINS, RATIO)
        first, last = samples_between(start + bins.to(tl.float32) * width, count, spacing, low, high)
        last = tl.where(there, last, first)
        steps = tl.max(last - first)
        if ONE_BLOCK or steps > 0:
            weights = tl.zeros((SNIPPETS, ROWS), tl.float32)
            has_part = first < 0
            for step in range(0, steps):
                sample = first + step
                counts, position = clamped_to(position_of(start, width, count, bins, sample), num_snippets)
                counts = counts & (sample < last) & (position > low) & (position < high)
                has_part = has_part | counts
                # Of a snippet a sample has 1 less its distance; -2 is far from all.
                position = tl.where(counts, position, -2.0)
                weights += tl.maximum(1.0 - tl.abs(snippet.to(tl.float32)[:, None] - position[None, :]), 0.0)
            weights *= (1.0 / count)[None, :]
            limit = tl.where(has_part, channels, 0)
            from_grad = grad + (roi * NUM_BINS + bins)[:, None] * channels + channel[None, :]
            x = tl.load(from_grad, mask=channel[None, :] < limit[:, None], other=0.0)
            if HALF:
                # The weights are not rounded to half precision: what that leaves of them is multiplied too.
                most = weights.to(x.dtype)
                sums = tl.dot(most, x, sums)
                sums = tl.dot((weights - most.to(tl.float32)).to(x.dtype), x, sums)
            else:
                sums = tl.dot(weights, x.to(tl.float32), sums, input_precision="tf32x3")
    part = tl.program_id(2).to(tl.int64) * (tl.num_programs(0) // blocks)
    to = out + ((part + batch) * num_snippets + snippet)[:, None] * channels + channel[None, :]
    limit = tl.where(snippet < num_snippets, channels, 0)
    tl.store(to, sums.to(out.dtype.element_ty), mask=channel[None, :] < limit[:, None])


@cache
def has_tensor_cores(device: torch.device) -> bool:
    """Whether Triton multiplies matrices on them, of every dtype but float64."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= divmod(LEAST_TARGET, 10)


def _tile(grad_RPC: Tensor, num_snippets: int) -> tuple[int, int]:
    """Snippets and channels of a program: powers of two from 16 on, as tensor cores have them."""
    snippets, block = (max(triton.next_power_of_2(size), 16) for size in (num_snippets, grad_RPC.shape[2]))
    return min(SNIPPETS, snippets), min(BLOCK, block)


def parts_of(grad_RPC: Tensor, batch: int, num_snippets: int) -> int:
    """That the ROIs are divided into, so that there are programs enough."""
    num_rois, num_bins, channels = grad_RPC.shape
    snippets, block = _tile(grad_RPC, num_snippets)
    programs = batch * triton.cdiv(num_snippets, snippets) * triton.cdiv(channels, block)
    chunks = triton.cdiv(num_rois * num_bins, ROWS * max(batch, 1))
    parts: int = min(triton.cdiv(PROGRAMS, max(programs, 1)), triton.cdiv(chunks, 4), MOST_PARTS)
    return parts


def align_backward_product_launch(
    arguments: dict[str, Tensor | int | float | None], grad_RPC: Tensor, out_BTC: Tensor, sampling_ratio: int
) -> Launch:
    """Of the arguments of ``align_backward_launch``; not of float64."""
    *parts, batch, num_snippets, channels = out_BTC.shape
    snippets, block = _tile(grad_RPC, num_snippets)
    return Launch(
        align_backward_product_kernel,
        (batch * triton.cdiv(num_snippets, snippets), triton.cdiv(channels, block), *parts),
        arguments,
        {
            "NUM_BINS": grad_RPC.shape[1],
            "RATIO": sampling_ratio,
            "HALF": grad_RPC.itemsize == 2 and not knobs.runtime.interpret,  # which has no products of bfloat16
            "ONE_BLOCK": num_snippets <= snippets,
            "SNIPPETS": snippets,
            "ROWS": ROWS,
            "BLOCK": block,
        },
        num_warps=WARPS,
        fp_fusion=False,
        least_target=LEAST_TARGET,
    )

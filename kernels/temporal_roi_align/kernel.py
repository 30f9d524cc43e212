"""Triton form of temporal_roi_align and of its gradient; both are gathers with the channels innermost."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..launch import Launch, Launcher
from . import product
from .samples import bins_of, position_of, samples_between, spare_of, taps_of, whole

BLOCK = 128  # channels of a program
BINS = 8  # bins of a program of the forward kernel
ROIS = 8  # ROIs that a program of the backward kernel goes through at once
PROGRAMS = 4096  # of the backward kernel: enough for any GPU, where there are so many ROIs
MOST_PARTS = 64  # that the ROIs are divided into for that


@triton.jit
def align_kernel(
    features,
    rois,
    out,
    num_batches,
    num_snippets,
    channels,
    NUM_BINS: tl.constexpr,
    RATIO: tl.constexpr,
    SUM: tl.constexpr,
    BINS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    PARTS: tl.constexpr = (NUM_BINS + BINS - 1) // BINS
    roi = (tl.program_id(0) // PARTS).to(tl.int64)
    bins = tl.program_id(0) % PARTS * BINS + tl.arange(0, BINS)
    channel = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    batch = tl.load(rois + roi * 3)
    there = (batch >= 0.0) & (batch < num_batches)
    rows = features + batch.to(tl.int64) * num_snippets * channels + channel[None, :]

    each = bins * 0 + roi
    start, width, count, spacing = bins_of(rois, each, each >= 0, NUM_BINS, RATIO)
    first, last = samples_between(start + bins.to(tl.float32) * width, count, spacing, -1.0, num_snippets)
    last = tl.where(there, last, first)

    sums = tl.zeros((BINS, BLOCK), SUM)
    for step in range(0, tl.max(last - first)):
        sample = first + step
        lower, lower_weight, upper_weight = taps_of(position_of(start, width, count, bins, sample), num_snippets, SUM)
        lower = tl.where(sample < last, lower, -2)
        place = lower[:, None] * channels
        limit = tl.where(lower >= 0, channels, 0)
        x = tl.load(rows + place, mask=channel[None, :] < limit[:, None], other=0.0)
        sums += lower_weight[:, None] * x.to(SUM)
        # A snippet that weighs nothing has no influence, be it NaN; nor is there one after the last.
        limit = tl.where((lower >= 0) & (upper_weight > 0.0), channels, 0)
        x = tl.load(rows + (place + channels), mask=channel[None, :] < limit[:, None], other=0.0)
        sums += upper_weight[:, None] * x.to(SUM)
    sums *= (1.0 / count.to(SUM))[:, None]
    limit = tl.where(bins < NUM_BINS, channels, 0)
    to = out + (roi * NUM_BINS + bins)[:, None] * channels + channel[None, :]
    tl.store(to, sums.to(out.dtype.element_ty), mask=channel[None, :] < limit[:, None])


@triton.jit
def align_backward_kernel(
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
    SUM: tl.constexpr,
    ROIS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One snippet: the sum over a part of the ROIs of its batch element, ROIS at a time, of the samples it has a part
    in. Without order and offsets all ROIs are of the one batch element.
    """
    row = tl.program_id(0).to(tl.int64)
    batch = row // num_snippets
    snippet = row % num_snippets
    channel = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    first_roi = tl.cast(0, tl.int64)
    last_roi = tl.cast(num_rois, tl.int64)
    if offsets is not None:
        first_roi = tl.load(offsets + batch)
        last_roi = tl.load(offsets + batch + 1)
    parts = tl.num_programs(2)
    chunks = tl.cdiv((last_roi - first_roi).to(tl.int32), ROIS)
    of_part = tl.cdiv(chunks, parts) * ROIS
    first_roi += tl.program_id(2).to(tl.int64) * of_part
    last_roi = tl.minimum(first_roi + of_part, last_roi)

    sums = tl.zeros((ROIS, BLOCK), SUM)
    for chunk in range(first_roi, last_roi, ROIS):
        place = chunk + tl.arange(0, ROIS)
        there = place < last_roi
        if order is not None:
            roi = tl.load(order + place, mask=there, other=0)
        else:
            roi = tl.where(there, place, 0)
            there = there & (tl.load(rois + roi * 3) == 0.0)
        start, width, count, spacing = bins_of(rois, roi, there, NUM_BINS, RATIO)
        # All samples of a ROI are equally spaced; those within one snippet of this one have a part of it.
        middle = (snippet.to(tl.float32) - start) / spacing - 0.5
        reach = 1.0 / spacing + spare_of(count * NUM_BINS)
        first = whole(tl.math.floor(middle - reach), count * NUM_BINS)
        last = whole(tl.math.ceil(middle + reach) + 1.0, count * NUM_BINS)
        last = tl.where(there, last, first)
        # first // count and first % count; the quotient of floats is at most one off.
        each_bin = count.to(tl.int64)
        bins = tl.math.floor(first.to(tl.float32) / count).to(tl.int64)
        sample = first - bins * each_bin
        correction = tl.where(sample < 0, -1, tl.where(sample >= each_bin, 1, 0))
        bins += correction
        sample -= correction * each_bin
        share = 1.0 / count.to(SUM)
        for step in range(0, tl.max(last - first)):
            lower, lower_weight, upper_weight = taps_of(
                position_of(start, width, count, bins, sample), num_snippets, SUM
            )
            lower = tl.where(first + step < last, lower, -2)
            weight = tl.where(lower == snippet, lower_weight, tl.where(lower + 1 == snippet, upper_weight, 0.0))
            limit = tl.where(weight > 0.0, channels, 0)
            from_grad = grad + (roi * NUM_BINS + bins)[:, None] * channels + channel[None, :]
            x = tl.load(from_grad, mask=channel[None, :] < limit[:, None], other=0.0)
            sums += (weight * share)[:, None] * x.to(SUM)
            sample += 1
            bins += tl.where(sample == each_bin, 1, 0)
            sample = tl.where(sample == each_bin, 0, sample)
    total = tl.sum(sums, axis=0)
    row += tl.program_id(2).to(tl.int64) * tl.num_programs(0)
    tl.store(out + row * channels + channel, total.to(out.dtype.element_ty), mask=channel < channels)


def _constants(num_bins: int, sampling_ratio: int, dtype: torch.dtype) -> dict[str, object]:
    sum_dtype = tl.float64 if dtype == torch.float64 else tl.float32
    return {"NUM_BINS": num_bins, "RATIO": sampling_ratio, "SUM": sum_dtype, "BLOCK": BLOCK}


def align_launch(features_BTC: Tensor, rois: Tensor, out_RPC: Tensor, sampling_ratio: int) -> Launch:
    """All contiguous."""
    batch, num_snippets, channels = features_BTC.shape
    num_rois, num_bins, _ = out_RPC.shape
    bins = min(BINS, triton.next_power_of_2(num_bins))
    return Launch(
        align_kernel,
        (num_rois * triton.cdiv(num_bins, bins), triton.cdiv(channels, BLOCK)),
        {
            "features": features_BTC,
            "rois": rois,
            "out": out_RPC,
            "num_batches": batch,
            "num_snippets": num_snippets,
            "channels": channels,
        },
        {"BINS": bins} | _constants(num_bins, sampling_ratio, features_BTC.dtype),
        num_warps=max(bins * BLOCK // 256, 1),
        fp_fusion=False,
    )


def align_backward_launch(
    grad_RPC: Tensor,
    rois: Tensor,
    order: Tensor | None,
    offsets: Tensor | None,
    out_BTC: Tensor,
    sampling_ratio: int,
    by_product: bool = False,
) -> Launch:
    """All contiguous. ``order`` (R,) lists the ROIs by batch element, b's from ``offsets[b]`` (B + 1,) on; int64. They
    may be None where B is 1. ``out_BTC`` may have a dimension of parts ahead of the others, whose sum is the gradient.
    """
    *parts, batch, num_snippets, channels = out_BTC.shape
    arguments: dict[str, Tensor | int | float | None] = {
        "grad": grad_RPC,
        "rois": rois,
        "order": order,
        "offsets": offsets,
        "out": out_BTC,
        "num_snippets": num_snippets,
        "channels": channels,
        "num_rois": len(rois),
    }
    if by_product:
        return product.align_backward_product_launch(arguments, grad_RPC, out_BTC, sampling_ratio)
    return Launch(
        align_backward_kernel,
        (batch * num_snippets, triton.cdiv(channels, BLOCK), *parts),
        arguments,
        {"ROIS": ROIS} | _constants(grad_RPC.shape[1], sampling_ratio, grad_RPC.dtype),
        num_warps=4 if grad_RPC.itemsize == 2 else 8,
        fp_fusion=False,
    )


_align, _align_backward, _product = Launcher(), Launcher(), Launcher()


def temporal_roi_align(features: Tensor, rois: Tensor, num_bins: int, sampling_ratio: int) -> Tensor:
    features_BTC, rois = features.transpose(1, 2).contiguous(), rois.contiguous()
    out_RPC = features.new_empty(len(rois), num_bins, features.shape[1])
    tensors, key = (features_BTC, rois, out_RPC), (sampling_ratio, features.dtype, features.shape, out_RPC.shape)
    if not _align.repeat(tensors, key):
        _align.run(align_launch(features_BTC, rois, out_RPC, sampling_ratio), tensors, key)
    return out_RPC.transpose(1, 2)


def temporal_roi_align_backward(
    grad: Tensor,
    rois: Tensor,
    batch: int,
    num_snippets: int,
    num_bins: int,
    sampling_ratio: int,
    by_product: bool = False,
) -> Tensor:
    """A gather; or a product (not of float64), which no card has measured yet: `bench ops` does where it can run."""
    grad_RPC, rois = grad.transpose(1, 2).contiguous(), rois.contiguous()
    order = offsets = None
    if batch != 1:
        batches, order = torch.sort(rois[:, 0], stable=True)
        offsets = torch.searchsorted(batches, torch.arange(batch + 1, dtype=batches.dtype, device=batches.device))
    # A snippet is the sum over thousands of ROIs: where there are few snippets their sums are divided, in the same way
    # at every call.
    parts = (product.parts_of if by_product else _parts_of)(grad_RPC, batch, num_snippets)
    if parts <= 1:
        out_BTC = grad.new_empty(batch, num_snippets, grad.shape[1])
    else:
        sum_dtype = torch.float64 if grad.dtype == torch.float64 else torch.float32
        out_BTC = grad.new_empty(parts, batch, num_snippets, grad.shape[1], dtype=sum_dtype)
    tensors, key = (grad_RPC, rois, order, offsets, out_BTC), (sampling_ratio, grad.dtype, grad.shape, out_BTC.shape)
    launcher = _product if by_product else _align_backward
    if not launcher.repeat(tensors, key):
        launch = align_backward_launch(grad_RPC, rois, order, offsets, out_BTC, sampling_ratio, by_product)
        launcher.run(launch, tensors, key)
    if parts > 1:
        out_BTC = out_BTC.sum(dim=0).to(grad.dtype)
    return out_BTC.transpose(1, 2)


def _parts_of(grad_RPC: Tensor, batch: int, num_snippets: int) -> int:
    """Of the gather."""
    num_rois, _, channels = grad_RPC.shape
    programs = max(batch * num_snippets * triton.cdiv(channels, BLOCK), 1)
    parts: int = min(triton.cdiv(PROGRAMS, programs), triton.cdiv(num_rois, 2 * ROIS * max(batch, 1)), MOST_PARTS)
    return parts


def examples() -> dict[str, Launch]:
    """G-TAD's inner and context bins at every proposal of 100 snippets; RoI pooling of few, wide features."""
    launches = {}

    def empty(*shape: int, dtype: torch.dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    half, brain, single = torch.float16, torch.bfloat16, torch.float32
    cases = [(dtype, 256, 32, 0) for dtype in (half, brain, single)]
    cases += [(single, 256, 4, 0), (brain, 512, 16, 2), (brain, 100, 16, 0)]
    for dtype, channels, num_bins, ratio in cases:
        features, rois = empty(2, 100, channels, dtype=dtype), empty(10100, 3, dtype=single)
        aligned = empty(10100, num_bins, channels, dtype=dtype)
        order, offsets = empty(10100, dtype=torch.int64), empty(3, dtype=torch.int64)
        name = {half: "fp16", brain: "bf16", single: "fp32"}[dtype]
        shape = f"{name} 100x{channels} {num_bins} bins {f'ratio {ratio}' if ratio else 'adaptive'}"
        launches[f"temporal_roi_align {shape}"] = align_launch(features, rois, aligned, ratio)
        parts = empty(11, 1, 100, channels, dtype=single)
        for form, by_product in (("gathered", False), ("by products", True)):
            what = f"temporal_roi_align backward {form}"
            launches[f"{what} {shape}"] = align_backward_launch(
                aligned, rois, order, offsets, features, ratio, by_product
            )
            launches[f"{what} in parts {shape}"] = align_backward_launch(
                aligned, rois, None, None, parts, ratio, by_product
            )
    return launches

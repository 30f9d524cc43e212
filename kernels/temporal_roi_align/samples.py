"""Where the samples of a ROI lie, and what they weigh, for the Triton forms of temporal_roi_align and its gradient.

Positions must round as the reference's do, since a sample on -1 or T counts and one beside it does not: no product is
fused with the sum after it (``fp_fusion=False``), and divisions are IEEE ones. Which samples can matter is estimated
with some to spare, and whether they do is decided by their exact positions.
"""

import triton
import triton.language as tl


@triton.jit
def bins_of(rois, roi, mask, NUM_BINS: tl.constexpr, RATIO: tl.constexpr):
    """(start, width of a bin, samples in a bin, snippets from one to the next), float32."""
    start = tl.load(rois + roi * 3 + 1, mask=mask, other=0.0)
    end = tl.load(rois + roi * 3 + 2, mask=mask, other=0.0)
    width = tl.math.div_rn(tl.maximum(end - start, 1.0), tl.full(start.shape, NUM_BINS, tl.float32))
    count = tl.full(start.shape, RATIO, tl.float32) if RATIO > 0 else tl.math.ceil(width)
    return start, width, count, width / count


@triton.jit
def spare_of(count):
    """Samples to visit beyond an estimate: it and what it estimates are rounded a few times, by 2^-24 of the count."""
    return 2.0 + count * 5e-7


@triton.jit
def position_of(start, width, count, bin_index, sample):
    """Of a sample in a bin, in the reference's order: (s + p*w) + ((i + 0.5)*w)/g."""
    offset = tl.math.div_rn((sample.to(tl.float32) + 0.5) * width, count)
    return start + bin_index.to(tl.float32) * width + offset


@triton.jit
def clamped_to(position, num_snippets):
    """(whether a sample counts, its position on the snippets)."""
    inside = (position >= -1.0) & (position <= num_snippets)
    return inside, tl.minimum(tl.maximum(position, 0.0), num_snippets - 1.0)


@triton.jit
def taps_of(position, num_snippets, SUM: tl.constexpr):
    """(lower snippet, its weight, weight of the next one); the lower snippet is -2 for a sample that does not count."""
    inside, clamped = clamped_to(position, num_snippets)
    lower = tl.math.floor(clamped)
    fraction = (clamped - lower).to(SUM)
    return tl.where(inside, lower, -2.0).to(tl.int64), 1.0 - fraction, fraction


@triton.jit
def whole(value, limit):
    """A number of samples, at least 0 and at most ``limit``, for loops: no count comes near 2^62."""
    return tl.minimum(tl.minimum(tl.maximum(value, 0.0), limit), 4611686018427387904.0).to(tl.int64)


@triton.jit
def samples_between(left, count, spacing, low, high):
    """(first, one after the last) of the samples of a bin from ``left`` on that can lie between two positions."""
    first = whole(tl.math.floor((low - left) / spacing - 0.5 - spare_of(count)), count)
    return first, whole(tl.math.ceil((high - left) / spacing + 0.5 + spare_of(count)), count)

"""The definition of Align1D, temporal ROI-align (G-TAD, Xu et al. 2020, SGAlign; github.com/frostinassiky/gtad).

X (B, C, T); a ROI (b, s, e) in snippet index units; R bins; ratio rho, 0 = adaptive:

    h = max(e - s, 1)    w = h / R    g = rho if rho > 0 else ceil(h / R)
    t(p, i) = s + p*w + (i + 0.5)*w/g                       p = 0..R-1,  i = 0..g-1
    Y[n, c, p] = 1/g * sum_i I(X[b, c, :], t(p, i))
    I(x, t) = 0               t < -1 or t > T
              x[0]            t <= 0
              x[T-1]          floor(t) >= T-1
              linear between floor(t) and floor(t)+1        else

The divisor stays g when samples fall outside. No half-pixel shift. The coordinates are float32 whatever the features
are: a sample that lands on -1 or T must fall on the same side in every form of every operator built on this.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor


def sample_counts(lengths: Tensor, num_bins: int, sampling_ratio: int) -> Tensor:
    """g for each ROI: int64, the shape of ``lengths`` (float32 h = max(e - s, 1))."""
    if sampling_ratio > 0:
        return torch.full_like(lengths, sampling_ratio, dtype=torch.int64)
    return torch.ceil(_bin_widths(lengths, num_bins)).to(torch.int64)


def _bin_widths(lengths: Tensor, num_bins: int) -> Tensor:
    """w. By a tensor: on a GPU PyTorch divides by a number through its reciprocal, which rounds to other positions."""
    return lengths / torch.full_like(lengths, num_bins)


def sample_positions(
    starts: Tensor, lengths: Tensor, counts: Tensor, bins: Tensor, samples: Tensor, num_bins: int
) -> Tensor:
    """t(p, i) in snippet index units, float32; s, h, g, p and i broadcast against each other."""
    width = _bin_widths(lengths, num_bins)
    return starts + bins * width + (samples + 0.5) * width / counts


def linear_weights(positions: Tensor, num_snippets: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """I as two taps: (lower index, upper index, lower weight, upper weight); both weights are 0 outside [-1, T]."""
    inside = ((positions >= -1) & (positions <= num_snippets)).to(dtype)
    clamped = positions.clamp(0, num_snippets - 1)
    lower = clamped.floor()
    fraction = (clamped - lower).to(dtype)
    lower_index = lower.to(torch.int64)
    upper_index = (lower_index + 1).clamp(max=num_snippets - 1)
    return lower_index, upper_index, inside * (1 - fraction), inside * fraction


def temporal_roi_align_reference(features: Tensor, rois: Tensor, num_bins: int, sampling_ratio: int = 0) -> Tensor:
    """Align1D of ``features`` (B, C, T) at ``rois`` (R, 3) float32 (b, s, e): (R, C, num_bins), one sample a pass."""
    features_BTC = features.transpose(1, 2)
    dtype = _sum_dtype(features)
    aligned_RPC = torch.zeros(len(rois), num_bins, features.shape[1], dtype=dtype, device=features.device)
    batch_R1 = rois[:, :1].to(torch.int64)
    for index_RP, weight_RP in _taps(rois, features.shape[2], num_bins, sampling_ratio, dtype):
        aligned_RPC = aligned_RPC + weight_RP.unsqueeze(-1) * features_BTC[batch_R1, index_RP].to(dtype)
    return aligned_RPC.transpose(1, 2).to(features.dtype)


def temporal_roi_align_backward_reference(
    grad: Tensor, rois: Tensor, batch: int, num_snippets: int, num_bins: int, sampling_ratio: int
) -> Tensor:
    """The adjoint: ``grad`` (R, C, num_bins) to the gradient (B, C, T) of the features."""
    channels = grad.shape[1]
    dtype = _sum_dtype(grad)
    sums_BTC = torch.zeros(batch * num_snippets, channels, dtype=dtype, device=grad.device)
    batch_R1 = rois[:, :1].to(torch.int64)
    grad_RPC = grad.transpose(1, 2).to(dtype)
    for index_RP, weight_RP in _taps(rois, num_snippets, num_bins, sampling_ratio, dtype):
        rows_N = (batch_R1 * num_snippets + index_RP).flatten()
        sums_BTC.index_add_(0, rows_N, (weight_RP.unsqueeze(-1) * grad_RPC).flatten(0, 1))
    return sums_BTC.view(batch, num_snippets, channels).transpose(1, 2).to(grad.dtype)


def _sum_dtype(values: Tensor) -> torch.dtype:
    """Half-precision values are summed in float32 and rounded once, at the end."""
    return torch.float64 if values.dtype == torch.float64 else torch.float32


def _taps(
    rois: Tensor, num_snippets: int, num_bins: int, sampling_ratio: int, dtype: torch.dtype
) -> Iterator[tuple[Tensor, Tensor]]:
    """Snippets and their weights (R, P): the i-th sample of every bin that has one, lower tap, then upper."""
    starts_R1 = rois[:, 1:2]
    lengths_R1 = (rois[:, 2:] - starts_R1).clamp(min=1)
    counts_R1 = sample_counts(lengths_R1, num_bins, sampling_ratio)
    bins_P = torch.arange(num_bins, device=rois.device)
    # Without ROIs, one pass over nothing keeps the empty result in the graph of the features.
    for sample in range(int(counts_R1.max()) if len(rois) else 1):
        positions_RP = sample_positions(
            starts_R1, lengths_R1, counts_R1, bins_P, torch.full_like(bins_P, sample), num_bins
        )
        lower, upper, lower_weight, upper_weight = linear_weights(positions_RP, num_snippets, dtype)
        taken = (sample < counts_R1).to(dtype) / counts_R1
        yield lower, lower_weight * taken
        yield upper, upper_weight * taken

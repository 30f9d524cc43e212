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

import torch
from torch import Tensor


def sample_counts(lengths: Tensor, num_bins: int, sampling_ratio: int) -> Tensor:
    """g for each ROI: int64, the shape of ``lengths`` (float32 h = max(e - s, 1))."""
    if sampling_ratio > 0:
        return torch.full_like(lengths, sampling_ratio, dtype=torch.int64)
    return torch.ceil(lengths / num_bins).to(torch.int64)


def sample_positions(
    starts: Tensor, lengths: Tensor, counts: Tensor, bins: Tensor, samples: Tensor, num_bins: int
) -> Tensor:
    """t(p, i) in snippet index units, float32; s, h, g, p and i broadcast against each other."""
    width = lengths / num_bins
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
    num_snippets = features.shape[2]
    # Half-precision features are summed in float32 and rounded once, at the end.
    dtype = torch.float64 if features.dtype == torch.float64 else torch.float32
    batch_R1 = rois[:, :1].to(torch.int64)
    starts_R1 = rois[:, 1:2]
    lengths_R1 = (rois[:, 2:] - starts_R1).clamp(min=1)
    counts_R1 = sample_counts(lengths_R1, num_bins, sampling_ratio)
    bins_P = torch.arange(num_bins, device=rois.device)

    features_BTC = features.transpose(1, 2)
    aligned_RPC = torch.zeros(len(rois), num_bins, features.shape[1], dtype=dtype, device=features.device)
    # Without ROIs, one pass over nothing keeps the empty result in the graph of the features.
    for sample in range(int(counts_R1.max()) if len(rois) else 1):
        positions_RP = sample_positions(
            starts_R1, lengths_R1, counts_R1, bins_P, torch.full_like(bins_P, sample), num_bins
        )
        lower, upper, lower_weight, upper_weight = linear_weights(positions_RP, num_snippets, dtype)
        taken = (sample < counts_R1).to(dtype) / counts_R1
        for index, weight in ((lower, lower_weight), (upper, upper_weight)):
            aligned_RPC = aligned_RPC + (weight * taken).unsqueeze(-1) * features_BTC[batch_R1, index].to(dtype)
    return aligned_RPC.transpose(1, 2).to(features.dtype)

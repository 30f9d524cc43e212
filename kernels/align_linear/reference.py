"""The definition of align_linear: align every ROI of the grid, then one linear layer over (channel, bin).

Y[b, o, n] = bias[o] + sum_c sum_r W[o, c, r] * temporal_roi_align(F[b], roi_n)[c, r]
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..temporal_roi_align.reference import temporal_roi_align_reference
from .sampling import SamplingGrid


def align_linear_reference(features: Tensor, grid: SamplingGrid, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``features`` (B, C, L), ``weight`` (O, C, R), ``bias`` (O,): (B, O, num_cells). Materialises (B, cells, C, R)."""
    batch = len(features)
    rois_N2 = grid.rois.to(features.device)
    index_B11 = torch.arange(batch, dtype=torch.float32, device=features.device).reshape(batch, 1, 1)
    rois_BN3 = torch.cat([index_B11.expand(-1, grid.num_cells, 1), rois_N2.expand(batch, -1, -1)], dim=2)
    aligned = temporal_roi_align_reference(features, rois_BN3.flatten(0, 1), grid.num_bins)
    aligned_BNCR = aligned.reshape(batch, grid.num_cells, *aligned.shape[1:])
    out_BON = torch.einsum("bncr,ocr->bon", aligned_BNCR, weight)
    return out_BON if bias is None else out_BON + bias.unsqueeze(1)

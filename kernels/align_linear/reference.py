"""The definition of align_linear, and of the sparse product that it is computed with.

    Y[b, o, n] = bias[o] + sum_c sum_r W[o, c, r] * aligned[b, n, c, r]

aligned is temporal_roi_align of F[b] at roi_n, or, in a BoundaryMatchingGrid, the mean of the samples of BMN.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..temporal_roi_align.reference import temporal_roi_align_reference
from .sampling import BoundaryMatchingGrid, SamplingGrid


def align_linear_reference(features: Tensor, grid: SamplingGrid, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``features`` (B, C, L), ``weight`` (O, C, R), ``bias`` (O,): (B, O, num_cells). Materialises (B, cells, C, R)."""
    out_BON = torch.einsum("bncr,ocr->bon", align(features, grid), weight)
    return out_BON if bias is None else out_BON + bias.unsqueeze(1)


def align(features: Tensor, grid: SamplingGrid) -> Tensor:
    """The features of every cell (B, num_cells, C, R)."""
    if isinstance(grid, BoundaryMatchingGrid):
        weights_NTR = boundary_matching_weights(grid).to(features.device, features.dtype)
        return torch.einsum("bct,ntr->bncr", features, weights_NTR)
    batch = len(features)
    rois_N2 = grid.rois.to(features.device)
    index_B11 = torch.arange(batch, dtype=torch.float32, device=features.device).reshape(batch, 1, 1)
    rois_BN3 = torch.cat([index_B11.expand(-1, grid.num_cells, 1), rois_N2.expand(batch, -1, -1)], dim=2)
    aligned = temporal_roi_align_reference(features, rois_BN3.flatten(0, 1), grid.num_bins)
    return aligned.reshape(batch, grid.num_cells, *aligned.shape[1:])


def boundary_matching_weights(grid: BoundaryMatchingGrid) -> Tensor:
    """BMN's sampling mask (num_cells, num_snippets, num_bins), float64.

    Of the paper: a = s - (d+1)/2, b = s + d + (d+1)/2, u_j = a + (b-a)*j/(J-1), j = 0..J-1. Released: a = s - (d+2)/2,
    b = s + d + 1 + (d+2)/2, u_j = a + j*((b-a)/(J-1)). Each sample weighs 1 - (u - trunc(u)) at trunc(u) and
    u - trunc(u) at ceil(u), where these are snippets.
    """
    d_N1, s_N1 = grid.cells.to(torch.float64).split(1, dim=1)
    last = max(grid.num_bins * grid.num_samples - 1, 1)
    j_J = torch.arange(grid.num_bins * grid.num_samples, dtype=torch.float64)
    if grid.windows == "released":
        start_N1, end_N1 = s_N1 - (d_N1 + 2) / 2, s_N1 + d_N1 + 1 + (d_N1 + 2) / 2
        u_NJ = start_N1 + j_J * ((end_N1 - start_N1) / last)
    else:
        start_N1, end_N1 = s_N1 - (d_N1 + 1) / 2, s_N1 + d_N1 + (d_N1 + 1) / 2
        u_NJ = start_N1 + (end_N1 - start_N1) * j_J / last
    u_NRS1 = u_NJ.reshape(-1, grid.num_bins, grid.num_samples, 1)
    fraction_NRS1 = u_NRS1 - u_NRS1.trunc()
    t_T = torch.arange(grid.num_snippets)
    weights_NRST: Tensor = (u_NRS1.trunc() == t_T) * (1 - fraction_NRS1) + (u_NRS1.ceil() == t_T) * fraction_NRS1
    return weights_NRST.mean(dim=2).transpose(1, 2)


def gather_rows(
    dense: Tensor, offsets: Tensor, columns: Tensor, values: Tensor, bias: Tensor | None, row_step: int
) -> Tensor:
    """out[b, n, :] = sum of values[e] * dense[b, columns[e], :] over offsets[n] <= e < offsets[n + 1], plus bias.

    dense (B, num_columns, O) -> (B, num_rows, O) in its dtype; values and bias are float32, float64 where dense is, and
    so are the sums. row_step has no influence on the result.
    """
    # embedding_bag sums each row in order: no atomics on a GPU, and several times faster than a CSR product on a CPU.
    out = dense.new_empty(len(dense), len(offsets) - 1, dense.shape[2])
    for out_NO, dense_MO in zip(out, dense, strict=True):
        sums_NO = torch.zeros_like(out_NO, dtype=values.dtype)
        if sums_NO.numel() and len(columns):
            sums_NO = F.embedding_bag(
                columns,
                dense_MO.to(values.dtype),
                offsets,
                mode="sum",
                per_sample_weights=values,
                include_last_offset=True,
            )
        out_NO.copy_(sums_NO if bias is None else sums_NO + bias)
    return out


def gather_groups(
    dense: Tensor,
    places: Tensor,
    groups: Tensor,
    diagonals: Tensor,
    values: Tensor,
    singles: Tensor,
    single_values: Tensor,
    bias: Tensor | None,
    num_rows: int,
    row_step: int,
) -> Tensor:
    """gather_rows of a matrix by groups of rows (sampling.RowGroups): dense (B, num_columns, O) -> (B, num_rows, O)."""
    sums_BNO = dense.new_zeros(len(dense), num_rows, dense.shape[2], dtype=values.dtype)
    num_places = int(places.max()) + values.shape[1] if len(places) else values.shape[1]
    block_BPO = dense.new_zeros(len(dense), num_places, dense.shape[2], dtype=values.dtype)
    block_BPO[:, places] = dense.to(values.dtype)
    first, count, *ends = groups.to(torch.int64).unbind(1)
    of_diagonal, of_single = (
        torch.repeat_interleave(torch.arange(len(groups)), end.diff(prepend=end.new_zeros(1))) for end in ends
    )
    for i in range(values.shape[1]):
        there = i < count[of_diagonal]
        products = values[there, i].unsqueeze(1) * block_BPO[:, diagonals[there] + i]
        sums_BNO.index_add_(1, (first[of_diagonal] + i * row_step)[there], products)
    products = single_values.unsqueeze(1) * block_BPO[:, singles[:, 1]]
    sums_BNO.index_add_(1, first[of_single] + singles[:, 0] * row_step, products)
    return (sums_BNO if bias is None else sums_BNO + bias).to(dense.dtype)

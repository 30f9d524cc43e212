"""The definition of align_linear, and of the sparse product that it is computed with.

    Y[b, o, n] = bias[o] + sum_c sum_r W[o, c, r] * aligned[b, n, c, r]

aligned is temporal_roi_align of F[b] at roi_n, in a ProposalGrid with its coordinates in float64, or, in a
BoundaryMatchingGrid, the mean of the samples of BMN.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..temporal_roi_align.reference import linear_weights, temporal_roi_align_reference
from .sampling import BoundaryMatchingGrid, ProposalGrid, SamplingGrid


def align_linear_reference(features: Tensor, grid: SamplingGrid, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``features`` (B, C, L), ``weight`` (O, C, R), ``bias`` (O,): (B, O, num_cells). Materialises (B, cells, C, R)."""
    out_BON = torch.einsum("bncr,ocr->bon", align(features, grid), weight)
    return out_BON if bias is None else out_BON + bias.unsqueeze(1)


def align(features: Tensor, grid: SamplingGrid) -> Tensor:
    """The features of every cell (B, num_cells, C, R)."""
    if isinstance(grid, BoundaryMatchingGrid):
        return _sampled(features, boundary_matching_weights(grid))
    if isinstance(grid, ProposalGrid):
        return _sampled(features, proposal_weights(grid))
    batch = len(features)
    rois_N2 = grid.rois.to(features.device)
    index_B11 = torch.arange(batch, dtype=torch.float32, device=features.device).reshape(batch, 1, 1)
    rois_BN3 = torch.cat([index_B11.expand(-1, grid.num_cells, 1), rois_N2.expand(batch, -1, -1)], dim=2)
    aligned = temporal_roi_align_reference(features, rois_BN3.flatten(0, 1), grid.num_bins)
    return aligned.reshape(batch, grid.num_cells, *aligned.shape[1:])


def _sampled(features: Tensor, weights_NTR: Tensor) -> Tensor:
    return torch.einsum("bct,ntr->bncr", features, weights_NTR.to(features.device, features.dtype))


def proposal_weights(grid: ProposalGrid) -> Tensor:
    """SGAlign's sampling weights (num_cells, num_snippets, num_bins), float64: temporal_roi_align at [a, a + h],

    a = s - expand*(d+1) - margin, h = max(d + 2*(expand*(d+1) + margin), 1), with coordinates in float64.
    """
    d_N1, s_N1 = grid.cells.to(torch.float64).split(1, dim=1)
    wider_N1 = grid.expand * (d_N1 + 1) + grid.margin
    w_N1 = (d_N1 + 2 * wider_N1).clamp(min=1) / grid.num_bins
    g_N1 = w_N1.ceil()
    p_R = torch.arange(grid.num_bins)
    weights_NTR = torch.zeros(grid.num_cells, grid.num_snippets, grid.num_bins, dtype=torch.float64)
    for i in range(int(g_N1.max())):
        t_NR = s_N1 + (p_R * w_N1 - wider_N1 + (i + 0.5) * w_N1 / g_N1)
        lower, upper, lower_weight, upper_weight = linear_weights(t_NR, grid.num_snippets, torch.float64)
        taken_N11 = ((i < g_N1) / g_N1).unsqueeze(2)
        for index_NR, weight_NR in ((lower, lower_weight), (upper, upper_weight)):
            weights_NTR.scatter_add_(1, index_NR.unsqueeze(1), weight_NR.unsqueeze(1) * taken_N11)
    return weights_NTR


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
    strips: Tensor,
    strip_values: Tensor,
    diagonals: Tensor,
    values: Tensor,
    singles: Tensor,
    single_values: Tensor,
    bias: Tensor | None,
    num_rows: int,
    row_step: int,
) -> Tensor:
    """gather_rows of a matrix by groups of rows (sampling.RowGroups): dense (B, num_columns, O) -> (B, num_rows, O)."""
    group_rows = values.shape[1]
    sums_BNO = dense.new_zeros(len(dense), num_rows, dense.shape[2], dtype=values.dtype)
    num_places = int(places.max()) + group_rows if len(places) else group_rows
    block_BPO = dense.new_zeros(len(dense), num_places, dense.shape[2], dtype=values.dtype)
    block_BPO[:, places] = dense.to(values.dtype)
    first, count, *ends = groups.to(torch.int64).unbind(1)
    numbers = torch.arange(len(groups))

    # Diagonals of strips first, each with its value for every row.
    per_group = torch.stack(ends[:3], 1).flatten().diff(prepend=ends[0].new_zeros(1))
    size = torch.tensor([4, 2, 1]).repeat(len(groups)).repeat_interleave(per_group)
    nth = torch.arange(len(strip_values)) - (size.cumsum(0) - size).repeat_interleave(size)
    of_strip = numbers.repeat_interleave(3).repeat_interleave(per_group)
    of_single = numbers.repeat_interleave(ends[4].diff(prepend=ends[4].new_zeros(1)))
    of_diagonal = torch.cat(
        [of_strip.repeat_interleave(size), numbers.repeat_interleave(ends[3].diff(prepend=ends[3].new_zeros(1)))]
    )
    diagonals = torch.cat([strips.repeat_interleave(size) + nth, diagonals])
    values = torch.cat([strip_values.unsqueeze(1).expand(-1, group_rows), values])
    for i in range(group_rows):
        there = i < count[of_diagonal]
        products = values[there, i].unsqueeze(1) * block_BPO[:, diagonals[there] + i]
        sums_BNO.index_add_(1, (first[of_diagonal] + i * row_step)[there], products)
    products = single_values.unsqueeze(1) * block_BPO[:, singles[:, 1]]
    sums_BNO.index_add_(1, first[of_single] + singles[:, 0] * row_step, products)
    return (sums_BNO if bias is None else sums_BNO + bias).to(dense.dtype)

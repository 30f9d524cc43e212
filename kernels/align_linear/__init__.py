"""align_linear: a linear layer over the ROI-aligned features of every proposal, without ever forming those features.

The layer is linear in the features and the alignment is linear in time, so they commute. Project first:

    Z[b, t, r, :] = W[:, :, r] F[b, :, t]              one matrix product, L*R rows
    Y[b, n, :]    = bias + sum_(t,r) A[n, t*R + r] Z[b, t, r, :]

with A the sparse interpolation weights of the grid (see sampling.py). The materialised order would hold C*R numbers
for each cell (9216 in G-TAD), this one O.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..library import forms
from .reference import align_linear_reference
from .sampling import ProposalGrid, SamplingGrid, SparseRows, proposal_grid, roi_grid

__all__ = ["ProposalGrid", "SamplingGrid", "align_linear", "align_linear_reference", "proposal_grid", "roi_grid"]

forms["cpu"]["align_linear"] = "PyTorch"


def align_linear(features: Tensor, grid: SamplingGrid, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """ROI-align ``features`` at every cell of ``grid`` and apply a linear layer over (channel, bin).

    Equals the 1x1 convolution that follows SGAlign in G-TAD (Xu et al. 2020, section 3.3). A convolution over several
    aligned maps concatenated along (channel, bin) is the sum of one call for each map with its part of the weight.

    Args:
        features: (B, C, L), L = grid.num_snippets; floating point, any strides.
        grid: from ``proposal_grid`` or ``roi_grid``; moved to the device of features at first use.
        weight: (O, C, R), R = grid.num_bins. Fastest where it is a view, by ``.permute(2, 0, 1)``, of memory laid out
            as (C, R, O); any other layout is copied into that one in forward and again in backward.
        bias: (O,) or None.

    Returns:
        (B, O, num_cells), in the order of grid.rois. It is the transposed view of a contiguous (B, num_cells, O)
        tensor: 1x1 convolutions that follow are one matrix product on ``out.transpose(1, 2)``, without a copy. The
        dtype is that of the inputs, or autocast's: the products run in it, the sparse sum always in float32 or float64.

    Raises:
        ValueError: shapes that do not fit each other or the grid, devices or (outside autocast) dtypes that differ.

    PyTorch form, called directly (no dispatcher operator yet): matrix products and ``embedding_bag``, with an explicit
    backward that is the transposed gather; no atomics, differentiable once. The definition is
    ``align_linear_reference``.
    """
    if features.dim() != 3 or not features.is_floating_point():
        raise ValueError(
            f"align_linear: features must be floating point (B, C, L), "
            f"got {features.dtype} of shape {tuple(features.shape)}"
        )
    if features.shape[2] != grid.num_snippets:
        raise ValueError(f"align_linear: features have {features.shape[2]} snippets, the grid {grid.num_snippets}")
    if weight.dim() != 3 or weight.shape[1:] != (features.shape[1], grid.num_bins):
        raise ValueError(
            f"align_linear: weight must be (O, {features.shape[1]}, {grid.num_bins}) for these features and this grid, "
            f"got {tuple(weight.shape)}"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"align_linear: bias must be ({weight.shape[0]},), got {tuple(bias.shape)}")
    parameters = [weight] if bias is None else [weight, bias]
    if any(parameter.device != features.device for parameter in parameters):
        raise ValueError(f"align_linear: weight and bias must be on the device of features, {features.device}")

    kind = features.device.type
    # As for PyTorch's own operators, autocast leaves float64 alone.
    if torch.is_autocast_enabled(kind) and features.dtype != torch.float64 and weight.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(kind)
        features, weight = features.to(dtype), weight.to(dtype)
    elif any(parameter.dtype != features.dtype for parameter in parameters):
        raise ValueError(
            f"align_linear: features are {features.dtype}, weight and bias "
            f"{', '.join(str(parameter.dtype) for parameter in parameters)}; convert them or use autocast"
        )
    aligned: Tensor = _AlignLinear.apply(features, weight, bias, grid)  # type: ignore[no-untyped-call]
    return aligned


def _gather_each(matrix: SparseRows, dense: Tensor) -> Tensor:
    """(B, num_rows, O) = matrix @ dense (B, num_columns, O)."""
    if len(dense) == 1:  # one video a step is the usual case, and needs no copy into a batch
        return _gather(matrix, dense[0]).unsqueeze(0)
    out = dense.new_empty(len(dense), len(matrix.offsets) - 1, dense.shape[2])
    for element in range(len(dense)):
        out[element] = _gather(matrix, dense[element])
    return out


def _gather(matrix: SparseRows, dense: Tensor) -> Tensor:
    """(num_rows, O) = matrix @ dense (num_columns, O).

    embedding_bag sums each row in order, by one thread for each output: no atomics on a GPU, and on the CPU 2 to 4
    times faster than the CSR product (measured at L = 32, 64 and 100, O = 512).
    """
    num_rows = len(matrix.offsets) - 1
    if num_rows == 0 or len(matrix.columns) == 0:
        return dense.new_zeros(num_rows, dense.shape[1])
    return F.embedding_bag(
        matrix.columns,
        dense,
        matrix.offsets,
        mode="sum",
        per_sample_weights=matrix.values,
        include_last_offset=True,
    )


class _AlignLinear(torch.autograd.Function):
    """Keeps its inputs only: neither Z nor anything per cell survives forward."""

    @staticmethod
    def forward(ctx: Any, features: Tensor, weight: Tensor, bias: Tensor | None, grid: SamplingGrid) -> Tensor:
        ctx.save_for_backward(features, weight)
        ctx.grid = grid
        ctx.bias_dtype = None if bias is None else bias.dtype
        batch, channels, num_snippets = features.shape
        num_outputs, _, num_bins = weight.shape
        sum_dtype = _sum_dtype(features)
        matrix, _ = grid.matrices(features.device, sum_dtype)
        with torch.autocast(features.device.type, enabled=False):
            rows = features.transpose(1, 2).reshape(batch * num_snippets, channels)
            projected = rows @ weight.permute(1, 2, 0).reshape(channels, num_bins * num_outputs)
            projected = projected.to(sum_dtype).view(batch, num_snippets * num_bins, num_outputs)
            out_BNO = _gather_each(matrix, projected)
            if bias is not None:
                out_BNO += bias
            return out_BNO.to(features.dtype).transpose(1, 2)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
        features, weight = ctx.saved_tensors
        batch, channels, num_snippets = features.shape
        num_outputs, _, num_bins = weight.shape
        sum_dtype = _sum_dtype(features)
        _, transposed = ctx.grid.matrices(features.device, sum_dtype)
        grad_features = grad_weight = grad_bias = None
        with torch.autocast(features.device.type, enabled=False):
            grad_BNO = grads[0].transpose(1, 2).to(sum_dtype).contiguous()
            if ctx.needs_input_grad[0] or ctx.needs_input_grad[1]:
                grad_projected = _gather_each(transposed, grad_BNO)
                grad_rows = grad_projected.view(batch * num_snippets, num_bins * num_outputs).to(features.dtype)
            if ctx.needs_input_grad[0]:
                flat_weight = weight.permute(1, 2, 0).reshape(channels, num_bins * num_outputs)
                grad_features = (grad_rows @ flat_weight.t()).view(batch, num_snippets, channels).transpose(1, 2)
            if ctx.needs_input_grad[1]:
                rows = features.transpose(1, 2).reshape(batch * num_snippets, channels)
                grad_weight = (rows.t() @ grad_rows).view(channels, num_bins, num_outputs).permute(2, 0, 1)
            if ctx.needs_input_grad[2]:
                grad_bias = grad_BNO.sum((0, 1)).to(ctx.bias_dtype)
        return grad_features, grad_weight, grad_bias, None


def _sum_dtype(features: Tensor) -> torch.dtype:
    return torch.float64 if features.dtype == torch.float64 else torch.float32

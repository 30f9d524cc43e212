"""align_linear: a linear layer over the ROI-aligned features of every proposal, without ever forming those features.

The layer is linear in the features and the alignment is linear in time, so they commute. Project first:

    Z[b, t, r, :] = W[:, :, r] F[b, :, t]              one matrix product, L*R rows
    Y[b, n, :]    = bias + sum_(t,r) A[n, t*R + r] Z[b, t, r, :]

with A the sparse sampling weights of the grid (see sampling.py). The materialised order would hold C*R numbers for each
cell (9216 in G-TAD), this one O. Layers over several feature maps add up by giving each its bins of one Z.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .. import library
from . import reference
from .reference import align_linear_reference
from .sampling import (
    BoundaryMatchingGrid,
    ProposalGrid,
    SamplingGrid,
    SamplingWeights,
    boundary_matching_grid,
    proposal_grid,
    roi_grid,
    weights_of,
)

__all__ = [
    "BoundaryMatchingGrid",
    "ProposalGrid",
    "SamplingGrid",
    "align_linear",
    "align_linear_reference",
    "align_linear_sum",
    "boundary_matching_grid",
    "proposal_grid",
    "roi_grid",
]


def align_linear(features: Tensor, grid: SamplingGrid, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Sample ``features`` at every cell of ``grid`` and apply a linear layer over (channel, bin).

    With a ``proposal_grid`` this is SGAlign and the 1x1 convolution after it (G-TAD, Xu et al. 2020, section 3.3); with
    a ``boundary_matching_grid`` the boundary-matching layer and the convolution after it (BMN, Lin et al. 2019).

    Args:
        features: (B, C, L), L = grid.num_snippets; floating point, any strides.
        grid: from ``proposal_grid``, ``boundary_matching_grid`` or ``roi_grid``; moved to the device of features at
            first use.
        weight: (O, C, R), R = grid.num_bins. Fastest where it is a view, by ``.permute(2, 0, 1)``, of memory laid out
            as (C, R, O); any other layout is copied into that one in forward and again in backward.
        bias: (O,) or None.

    Returns:
        (B, O, num_cells), in the order of grid.rois. It is the transposed view of a contiguous (B, num_cells, O)
        tensor: 1x1 convolutions that follow are one matrix product on ``out.transpose(1, 2)``, without a copy. The
        dtype is that of the inputs, or autocast's: the products run in it, the sparse sum always in float32 or float64.

    Raises:
        ValueError: shapes that do not fit each other or the grid, devices or (outside autocast) dtypes that differ.

    Matrix products and the operator ``gather_rows``, which is its own transpose in backward: no atomics. Backward needs
    features and weight alone; differentiable once. The definition is ``align_linear_reference``.
    """
    return _align_linear("align_linear", [(features, grid, weight)], bias)


def align_linear_sum(terms: Sequence[tuple[Tensor, SamplingGrid, Tensor]], bias: Tensor | None = None) -> Tensor:
    """The sum of ``align_linear(features, grid, weight)`` over the ``terms``, plus bias, in one pass over the cells.

    A convolution over several sampled maps concatenated along (channel, bin) is such a sum, each map with its part of
    the weight: G-TAD's 32 inner bins of one map and 4 context bins of another.

    Args:
        terms: at least one (features, grid, weight), each as in ``align_linear``; the features may differ in C. Their
            grids have the same num_snippets and the same cells, in the same order (only their number is checked).
            Joining the weights of several grids takes a moment, and is done once for each of the last 32 tuples of
            grids: keep and reuse the grids.
        bias: (O,) or None.

    Returns, raises: as ``align_linear``; all features and weights have one device, batch, O and dtype.
    """
    if not terms:
        raise ValueError("align_linear_sum: terms must not be empty")
    return _align_linear("align_linear_sum", terms, bias)


def _align_linear(op: str, terms: Sequence[tuple[Tensor, SamplingGrid, Tensor]], bias: Tensor | None) -> Tensor:
    first, first_grid, first_weight = terms[0]
    for features, grid, weight in terms:
        if features.dim() != 3 or not features.is_floating_point():
            raise ValueError(
                f"{op}: features must be floating point (B, C, L), "
                f"got {features.dtype} of shape {tuple(features.shape)}"
            )
        if features.shape[2] != grid.num_snippets:
            raise ValueError(f"{op}: features have {features.shape[2]} snippets, the grid {grid.num_snippets}")
        if weight.dim() != 3 or weight.shape[1:] != (features.shape[1], grid.num_bins):
            raise ValueError(
                f"{op}: weight must be (O, {features.shape[1]}, {grid.num_bins}) for these features and this grid, "
                f"got {tuple(weight.shape)}"
            )
        if features.shape[0] != first.shape[0] or weight.shape[0] != first_weight.shape[0]:
            raise ValueError(
                f"{op}: terms must agree in batch and outputs, got {len(first)} and {len(first_weight)}, "
                f"then {len(features)} and {len(weight)}"
            )
        if (grid.num_snippets, grid.num_cells) != (first_grid.num_snippets, first_grid.num_cells):
            raise ValueError(
                f"{op}: grids must agree in snippets and cells, got {first_grid.num_snippets} and "
                f"{first_grid.num_cells}, then {grid.num_snippets} and {grid.num_cells}"
            )
    if bias is not None and bias.shape != first_weight.shape[:1]:
        raise ValueError(f"{op}: bias must be ({len(first_weight)},), got {tuple(bias.shape)}")

    operands = [tensor for features, _, weight in terms for tensor in (features, weight)]
    tensors = operands if bias is None else [*operands, bias]
    if any(tensor.device != first.device for tensor in tensors):
        raise ValueError(f"{op}: all tensors must be on the device of features, {first.device}")
    kind = first.device.type
    # As for PyTorch's own operators, autocast leaves float64 alone.
    if torch.is_autocast_enabled(kind) and all(tensor.dtype != torch.float64 for tensor in operands):
        dtype = torch.get_autocast_dtype(kind)
    elif all(tensor.dtype == first.dtype for tensor in tensors):
        dtype = first.dtype
    else:
        others = ", ".join(str(tensor.dtype) for tensor in tensors[1:])
        raise ValueError(f"{op}: features are {first.dtype}, the others {others}; convert them or use autocast")
    weights = weights_of(tuple(grid for _, grid, _ in terms))
    out: Tensor = _AlignLinear.apply(weights, dtype, bias, *operands)  # type: ignore[no-untyped-call]
    return out


class _AlignLinear(torch.autograd.Function):
    """Keeps its inputs only: neither Z, nor anything for each cell, nor what autocast made of the inputs."""

    @staticmethod
    def forward(
        ctx: Any, weights: SamplingWeights, dtype: torch.dtype, bias: Tensor | None, *operands: Tensor
    ) -> Tensor:
        ctx.save_for_backward(*operands)
        ctx.weights, ctx.dtype = weights, dtype
        ctx.bias_dtype = None if bias is None else bias.dtype
        features, weight = operands[:2]
        batch, _, num_snippets = features.shape
        num_outputs = weight.shape[0]
        num_bins = sum(weight.shape[2] for weight in operands[1::2])
        projected = features.new_empty(batch * num_snippets, num_bins * num_outputs, dtype=dtype)
        for rows, flat_weight, columns in _products(operands, dtype):
            torch.mm(rows, flat_weight, out=projected[:, columns])  # which autocast leaves alone, as it has an out
        projected = projected.view(batch, num_snippets * num_bins, num_outputs)
        out_BNO = _product(weights, False, projected, None if bias is None else bias.to(_sum_dtype(dtype)))
        return out_BNO.transpose(1, 2)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        operands, dtype = ctx.saved_tensors, ctx.dtype
        num_bins = sum(weight.shape[2] for weight in operands[1::2])
        grad_BNO = grads[0].transpose(1, 2)
        needs_bias, *needed = ctx.needs_input_grad[2:]
        grad_bias = grad_BNO.sum((0, 1), dtype=_sum_dtype(dtype)).to(ctx.bias_dtype) if needs_bias else None
        grad_operands: list[Tensor | None] = [None] * len(operands)
        if any(needed):
            with torch.autocast(grad_BNO.device.type, enabled=False):
                grad_projected = _product(ctx.weights, True, grad_BNO, None)
                batch, _, num_snippets = operands[0].shape
                grad_projected = grad_projected.view(batch * num_snippets, num_bins * grad_BNO.shape[2])
                for term, (rows, flat_weight, columns) in enumerate(_products(operands, dtype)):
                    features, weight = operands[2 * term : 2 * term + 2]
                    grad_rows = grad_projected[:, columns]
                    if needed[2 * term]:
                        channels = features.shape[1]
                        grad = (grad_rows @ flat_weight.t()).view(batch, num_snippets, channels).transpose(1, 2)
                        grad_operands[2 * term] = grad.to(features.dtype)
                    if needed[2 * term + 1]:
                        num_outputs, channels, bins = weight.shape
                        grad = (rows.t() @ grad_rows).view(channels, bins, num_outputs).permute(2, 0, 1)
                        grad_operands[2 * term + 1] = grad.to(weight.dtype)
        return None, None, grad_bias, *grad_operands


def _products(operands: Sequence[Tensor], dtype: torch.dtype) -> Iterator[tuple[Tensor, Tensor, slice]]:
    """Of each term: features (B*L, C), weight (C, R*O), and the columns of its R bins among those of all terms."""
    first = 0
    for features, weight in zip(operands[::2], operands[1::2], strict=True):
        batch, channels, num_snippets = features.shape
        last = first + weight.shape[2] * weight.shape[0]
        rows = features.to(dtype).transpose(1, 2).reshape(batch * num_snippets, channels)
        flat_weight = weight.to(dtype).permute(1, 2, 0).reshape(channels, last - first)
        yield rows, flat_weight, slice(first, last)
        first = last


def _sum_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


@cache
def _kernel() -> Any:
    """The module of the Triton form, imported when it first runs: elsewhere Triton may be missing."""
    from . import kernel

    return kernel


def _gather_rows_triton(*arguments: Any) -> Any:
    return _kernel().gather_rows(*arguments)


def _product(weights: SamplingWeights, transposed: bool, dense: Tensor, bias: Tensor | None) -> Tensor:
    """A, or A transposed, times ``dense`` (B, num_columns, O), plus bias: (B, num_rows, O), by the operator that serves
    the device and the cells best.
    """
    sum_dtype = _sum_dtype(dense.dtype)
    if dense.device.type == "cpu" and library.forms["cpu"]["gather_groups"] == "C++":
        groups = weights.grouped(sum_dtype)
        if groups is not None:
            *tensors, num_rows, row_step = groups[transposed]
            grouped: Tensor = torch.ops.lofi_fast.gather_groups(dense, *tensors, bias, num_rows, row_step)
            return grouped
    matrix = weights.on(dense.device, sum_dtype)[transposed]
    # Neighbouring snippets of one bin are sampled by neighbouring cells.
    row_step = weights.num_bins if transposed else 1
    rows: Tensor = library.operator("gather_rows", dense)(dense, *matrix, bias, row_step)
    return rows


def _gather_rows_fake(
    dense: Tensor, offsets: Tensor, columns: Tensor, values: Tensor, bias: Tensor | None, row_step: int
) -> Tensor:
    return dense.new_empty(dense.shape[0], offsets.shape[0] - 1, dense.shape[2])


# row_step has no influence on the result: rows n, n + row_step, n + 2 row_step, ... read neighbouring columns, and are
# computed one after the other (C++) or together (Triton), so that these come from the cache. It divides num_rows.
library.define(
    "gather_rows(Tensor dense, Tensor offsets, Tensor columns, Tensor values, Tensor? bias, int row_step) -> Tensor",
    reference.gather_rows,
    _gather_rows_fake,
    triton=_gather_rows_triton,
)


def _gather_groups_fake(
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
    return dense.new_empty(dense.shape[0], num_rows, dense.shape[2])


# The same product of a matrix by groups of rows (sampling.RowGroups), on a CPU.
library.define(
    "gather_groups(Tensor dense, Tensor places, Tensor groups, Tensor strips, Tensor strip_values, Tensor diagonals, "
    "Tensor values, Tensor singles, Tensor single_values, Tensor? bias, int num_rows, int row_step) -> Tensor",
    reference.gather_groups,
    _gather_groups_fake,
)

"""Other ways to a linear layer over the ROI-aligned features of every proposal. Two of them form those features."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lofi_fast.kernels import ProposalGrid, temporal_roi_align
from lofi_fast.kernels.align_linear.sampling import SparseRows, weights_of
from lofi_fast.kernels.library import forms
from lofi_fast.kernels.temporal_roi_align import temporal_roi_align_reference

CHUNK = 256  # ROIs at once, so that what the definition sums stays in the processor's cache


def batched_rois(grid: ProposalGrid, batch: int, device: torch.device | None = None) -> Tensor:
    """The grid's ROIs for every element of a batch: (batch * cells, 3) float32, batch index first."""
    index = torch.arange(batch, dtype=torch.float32).repeat_interleave(grid.num_cells).unsqueeze(1)
    return torch.cat([index, grid.rois.repeat(batch, 1)], dim=1).to(device)


def sampling_matrix(grid: ProposalGrid, dtype: torch.dtype) -> Tensor:
    """(L, R, cells) on the CPU: the alignment is linear, so this is its definition, applied to the identity matrix."""
    identity = torch.eye(grid.num_snippets, dtype=torch.float64).unsqueeze(0)
    matrix = torch.empty(grid.num_snippets, grid.num_bins, grid.num_cells, dtype=dtype)
    for part in torch.arange(grid.num_cells).split(CHUNK):
        rois = F.pad(grid.rois[part], (1, 0))  # of batch element 0
        matrix[:, :, part] = temporal_roi_align_reference(identity, rois, grid.num_bins).permute(1, 2, 0).to(dtype)
    return matrix


class DenseSampling:
    """BMN's boundary-matching layer (Lin et al. 2019, section 3.2), with the sampling rules of ``grids``.

    Each source's features (B, C, L) @ a dense matrix (L, R*D*L), then a convolution over (C, R) at every (d, s). Cells
    that would end after the video are sampled and convolved as well, as zeros; the last step leaves them out.
    """

    def __init__(self, grids: Sequence[ProposalGrid], like: Tensor) -> None:
        self.shape = (grids[0].max_duration, grids[0].num_snippets)
        d, s = grids[0].cells.unbind(1)
        cells = d * grids[0].num_snippets + s
        self.matrices = []
        for grid in grids:
            matrix = torch.zeros(grid.num_snippets, grid.num_bins, grid.max_duration * grid.num_snippets)
            matrix[:, :, cells] = sampling_matrix(grid, torch.float32)
            self.matrices.append(matrix.flatten(1).to(like))
        self.cells = cells.to(like.device)

    def __call__(self, features: Sequence[Tensor], weights: Sequence[Tensor], bias: Tensor) -> Tensor:
        """(B, O, cells)."""
        out = None
        for source, matrix, weight in zip(features, self.matrices, weights, strict=True):
            aligned = torch.matmul(source, matrix).view(len(source), -1, *self.shape)
            kernel = weight.reshape(len(weight), -1, 1, 1)
            part = F.conv2d(aligned, kernel, bias if out is None else None)
            out = part if out is None else out + part
        assert out is not None
        return out.flatten(2).index_select(2, self.cells)

    @staticmethod
    def nbytes(grids: Sequence[ProposalGrid], like: Tensor) -> int:
        """Of the sampling matrices, and of the aligned features with their gradients."""
        batch, channels, length = like.shape
        columns = sum(grid.num_bins for grid in grids) * grids[0].max_duration * length
        return like.itemsize * columns * (length + 2 * batch * channels)


class Materialised:
    """The ROI-align kernel at the valid cells of ``grids`` alone, then one matrix product for each source."""

    def __init__(self, grids: Sequence[ProposalGrid], like: Tensor) -> None:
        self.batch = len(like)
        self.bins = [grid.num_bins for grid in grids]
        self.rois = [batched_rois(grid, len(like), like.device) for grid in grids]

    def __call__(self, features: Sequence[Tensor], weights: Sequence[Tensor], bias: Tensor) -> Tensor:
        """(B, O, cells)."""
        out = bias
        for source, rois, bins, weight in zip(features, self.rois, self.bins, weights, strict=True):
            aligned = temporal_roi_align(source, rois, bins)
            rows = aligned.transpose(1, 2).flatten(1)  # as the kernel writes them: a view
            out = torch.addmm(out, rows, weight.transpose(1, 2).flatten(1).t())
        return out.view(self.batch, -1, len(bias)).transpose(1, 2)


class ProjectedCsr:
    """The order of ours with PyTorch's own operators: a matrix product for each source, whose weight lies in memory as
    that wants it, then the product with the sampling weights in CSR; in backward with their transpose, kept in CSR too.
    """

    def __init__(self, grids: Sequence[ProposalGrid], like: Tensor) -> None:
        self.bins = sum(grid.num_bins for grid in grids)
        matrix, transposed = weights_of(tuple(grids)).on(like.device, like.dtype)
        cells, projections = grids[0].num_cells, grids[0].num_snippets * self.bins
        self.matrix, self.transposed = _csr(matrix, cells, projections), _csr(transposed, projections, cells)

    def __call__(self, features: Sequence[Tensor], weights: Sequence[Tensor], bias: Tensor) -> Tensor:
        """(B, O, cells)."""
        rows = [
            (source.transpose(1, 2) @ weight.permute(1, 2, 0).flatten(1)).unflatten(2, (weight.shape[2], -1))
            for source, weight in zip(features, weights, strict=True)
        ]
        projected = rows[0] if len(rows) == 1 else torch.cat(rows, dim=2)
        sums = [_CsrProduct.apply(self.matrix, self.transposed, element) for element in projected.flatten(1, 2)]
        return (torch.stack(sums) if len(sums) > 1 else sums[0].unsqueeze(0)).add(bias).transpose(1, 2)


class _CsrProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, matrix: Tensor, transposed: Tensor, dense: Tensor) -> Tensor:
        ctx.transposed = transposed
        return matrix @ dense

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, None, Tensor]:
        return None, None, ctx.transposed @ grads[0]


def _csr(matrix: SparseRows, rows: int, columns: int) -> Tensor:
    return torch.sparse_csr_tensor(*matrix, size=(rows, columns), check_invariants=True)


class AlignedByProducts(torch.autograd.Function):
    """``temporal_roi_align`` whose gradient is Triton's product on tensor cores; for one batch element."""

    @staticmethod
    def forward(ctx: Any, features: Tensor, rois: Tensor, num_bins: int) -> Tensor:
        ctx.save_for_backward(rois)
        ctx.arguments = (1, features.shape[2], num_bins, 0)
        return temporal_roi_align(features, rois, num_bins)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        from lofi_fast.kernels.temporal_roi_align import kernel  # Triton may be missing

        (rois,) = ctx.saved_tensors
        return kernel.temporal_roi_align_backward(grads[0], rois, *ctx.arguments, by_product=True), None, None


def by_products(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether such a gradient can be taken here: on a GPU with tensor cores, or under Triton's interpreter."""
    if dtype == torch.float64 or not forms[device.type]["temporal_roi_align"].startswith("Triton"):
        return False
    from lofi_fast.kernels.temporal_roi_align import product

    return device.type == "cpu" or product.has_tensor_cores(device)

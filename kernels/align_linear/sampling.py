"""The interpolation weights of a set of ROIs as one sparse matrix. They depend on geometry alone, never on features.

Row n of A is ROI n, column t*R + r is (snippet t, bin r):

    temporal_roi_align(X, roi)[n, c, r] = sum_t A[n, t*R + r] * X[c, t]

A and its transpose are both kept by rows: forward and backward are each a gather, summed in a fixed order, without
atomics.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from ..temporal_roi_align.reference import linear_weights, sample_counts, sample_positions


class SparseRows(NamedTuple):
    """A sparse matrix by compressed rows: row n holds entries offsets[n] to offsets[n + 1]."""

    offsets: Tensor  # (num_rows + 1,) int32
    columns: Tensor  # (num_entries,) int32, ascending in each row
    values: Tensor  # (num_entries,) float32 or float64


@dataclass(frozen=True, eq=False)
class SamplingGrid:
    """ROIs over ``num_snippets`` snippets in ``num_bins`` bins, with their weights A. Made by ``roi_grid``."""

    num_snippets: int
    num_bins: int
    rois: Tensor  # (num_cells, 2) float32, start and end in snippet index units, on the CPU
    _weights: SparseRows = field(repr=False)
    _transposed: SparseRows = field(repr=False)
    _placed: dict[tuple[torch.device, torch.dtype], tuple[SparseRows, SparseRows]] = field(
        default_factory=dict, init=False, repr=False
    )

    @property
    def num_cells(self) -> int:
        return len(self.rois)

    @property
    def num_weights(self) -> int:
        """Non-zero entries of A."""
        return len(self._weights.values)

    def matrices(self, device: torch.device, dtype: torch.dtype = torch.float32) -> tuple[SparseRows, SparseRows]:
        """(A, A transposed) on ``device`` with float32 or float64 values; moved once, at the first call for a pair.

        A is (num_cells, num_snippets * num_bins). Raises ValueError for another dtype.
        """
        if dtype not in (torch.float32, torch.float64):
            raise ValueError(f"SamplingGrid.matrices: dtype must be float32 or float64, got {dtype}")
        placed = self._placed.get((device, dtype))
        if placed is None:
            # Tensors made in inference mode could never serve training; a grid may well be used in evaluation first.
            with torch.inference_mode(False):
                placed = (_place(self._weights, device, dtype), _place(self._transposed, device, dtype))
            self._placed[device, dtype] = placed
        return placed


@dataclass(frozen=True, eq=False)
class ProposalGrid(SamplingGrid):
    """The grid of all valid (duration, start) cells of a proposal map. Made by ``proposal_grid``."""

    max_duration: int
    expand: float
    cells: Tensor = field(repr=False)  # (num_cells, 2) int64 (d, s) in the order of rois: by d, then s; on the CPU


@lru_cache(maxsize=32)
def proposal_grid(num_snippets: int, max_duration: int, num_bins: int, *, expand: float = 0.5) -> ProposalGrid:
    """The ROIs of G-TAD's SGAlign (Xu et al. 2020, section 3.3) in every valid cell of a duration x start map.

    Cell (d, s), d < max_duration and s + d < num_snippets, covers len = d + 1 snippets; its ROI is
    [s - expand*len, s + d + expand*len] in snippet index units, sampled adaptively (sampling_ratio 0).
    Cached: the same arguments give the same object.

    Raises:
        ValueError: num_snippets, max_duration or num_bins below 1, or expand negative.
    """
    if max_duration < 1 or not 0 <= expand < float("inf"):
        raise ValueError(f"proposal_grid: max_duration must be >= 1 and expand >= 0, got {max_duration} and {expand}")
    with torch.inference_mode(False):
        durations = torch.arange(max_duration).unsqueeze(1)
        starts = torch.arange(max(num_snippets, 0)).unsqueeze(0)
        cells = torch.nonzero(durations + starts < num_snippets)
        d, s = cells.to(torch.float32).unbind(1)
        margin = expand * (d + 1)
        grid = roi_grid(torch.stack([s - margin, s + d + margin], dim=1), num_snippets, num_bins)
        return ProposalGrid(
            num_snippets, num_bins, grid.rois, grid._weights, grid._transposed, max_duration, expand, cells
        )


def roi_grid(rois: Tensor, num_snippets: int, num_bins: int) -> SamplingGrid:
    """A grid of arbitrary ROIs, the same for each element of a batch, sampled adaptively (sampling_ratio 0).

    Args:
        rois: (R, 2) float32, start and end in snippet index units, finite; any device. ROIs outside the clip, empty
            and reversed ones behave as in ``temporal_roi_align``. No gradient flows to them.
        num_snippets: snippets in the features the grid will be used on.
        num_bins: bins an ROI is divided into.

    Raises:
        ValueError: a wrong shape or dtype, a number that is not finite, num_snippets or num_bins below 1, or so many
            weights that 32-bit offsets cannot count them.
    """
    if rois.dim() != 2 or rois.shape[1] != 2 or rois.dtype != torch.float32:
        raise ValueError(f"roi_grid: rois must be float32 (R, 2), got {rois.dtype} of shape {tuple(rois.shape)}")
    if num_snippets < 1 or num_bins < 1:
        raise ValueError(f"a grid needs num_snippets >= 1 and num_bins >= 1, got {num_snippets} and {num_bins}")
    with torch.inference_mode(False), torch.no_grad():
        rois = rois.detach().to("cpu", copy=True)
        if not bool(rois.isfinite().all()):
            raise ValueError("roi_grid: rois must be finite")
        num_columns = num_snippets * num_bins
        rows, columns, values = _weights(rois, num_snippets, num_bins)
        if max(len(values), len(rois) * num_bins, num_columns) >= 2**31:
            raise ValueError(f"roi_grid: {len(values)} weights do not fit 32-bit offsets; use fewer ROIs or num_bins")
        by_snippet = torch.argsort(columns, stable=True)
        return SamplingGrid(
            num_snippets,
            num_bins,
            rois,
            _compress(rows, columns, values, len(rois)),
            _compress(columns[by_snippet], rows[by_snippet], values[by_snippet], num_columns),
        )


def _weights(rois: Tensor, num_snippets: int, num_bins: int) -> tuple[Tensor, Tensor, Tensor]:
    """The non-zero entries of A as (rows, columns, values), sorted by row, then column; values in float64."""
    starts = rois[:, 0]
    lengths = (rois[:, 1] - starts).clamp(min=1)
    counts = sample_counts(lengths, num_bins, 0)

    # One element for each sample of each bin of each ROI, in that order.
    samples_per_roi = counts * num_bins
    roi = torch.repeat_interleave(torch.arange(len(rois)), samples_per_roi)
    nth = torch.arange(len(roi)) - (samples_per_roi.cumsum(0) - samples_per_roi)[roi]
    bins, samples = nth // counts[roi], nth % counts[roi]
    positions = sample_positions(starts[roi], lengths[roi], counts[roi], bins, samples, num_bins)
    lower, upper, lower_weight, upper_weight = linear_weights(positions, num_snippets, torch.float64)

    num_columns = num_snippets * num_bins
    taps = torch.cat([lower, upper]) * num_bins + bins.repeat(2) + num_columns * roi.repeat(2)
    values = torch.cat([lower_weight, upper_weight]) / counts[roi].repeat(2)
    nonzero = values != 0
    entries, entry_of_tap = torch.unique(taps[nonzero], sorted=True, return_inverse=True)
    summed = torch.bincount(entry_of_tap, weights=values[nonzero], minlength=len(entries))
    return entries // num_columns, entries % num_columns, summed


def _compress(rows: Tensor, columns: Tensor, values: Tensor, num_rows: int) -> SparseRows:
    offsets = torch.zeros(num_rows + 1, dtype=torch.int64)
    offsets[1:] = torch.bincount(rows, minlength=num_rows).cumsum(0)
    return SparseRows(offsets.to(torch.int32), columns.to(torch.int32), values)


def _place(matrix: SparseRows, device: torch.device, dtype: torch.dtype) -> SparseRows:
    return SparseRows(matrix.offsets.to(device), matrix.columns.to(device), matrix.values.to(device, dtype))

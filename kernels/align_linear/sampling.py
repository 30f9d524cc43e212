"""The interpolation weights of a set of cells as one sparse matrix. They depend on geometry alone, never on features.

Row n of A is cell n, column t*R + r is (snippet t, bin r). For cells that are ROIs:

    temporal_roi_align(X, roi_n)[c, r] = sum_t A[n, t*R + r] * X[c, t]

A and its transpose are both kept by rows: forward and backward are each a gather, summed in a fixed order, without
atomics.

Cells of one duration that start one snippet after another sample the same bins one snippet later. So their rows of A
read columns that are neighbours in time, and so do the rows of the transpose. Such rows can be summed in groups
(``RowGroups``), each of which goes through the features that it samples once.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Literal, NamedTuple, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from ..temporal_roi_align.reference import linear_weights, sample_counts, sample_positions

Windows = Literal["paper", "released"]  # of a boundary_matching_grid


class SparseRows(NamedTuple):
    """A sparse matrix by compressed rows: row n holds entries offsets[n] to offsets[n + 1]."""

    offsets: Tensor  # (num_rows + 1,) int32
    columns: Tensor  # (num_entries,) int32, ascending in each row
    values: Tensor  # (num_entries,) float32 or float64


GROUP = 8  # rows of a group, at most
SLOTS = 2**22  # of diagonals of groups that are looked at together


class RowGroups(NamedTuple):
    """The same by groups of up to 8 rows, for the CPU. Columns lie at ``places`` in a row of memory that has gaps of 7
    zeros before, between and after its runs of columns. A diagonal is an entry of each row of a group: that of row i
    is at the i-th place after that of row 0, and counts for nothing where that place is in a gap. A strip is 4, 2 or 1
    diagonals that begin one place after another, each with one value for all rows; other diagonals have a value for
    each row. What is left, because not every row of the group has it, are single entries.
    """

    places: Tensor  # (num_columns,) int32
    # (num_groups, 7) int32: first row, number of rows; then ends, of its strips of 4 diagonals, of 2 and of 1, of its
    # other diagonals and of its single entries
    groups: Tensor
    strips: Tensor  # (num_strips,) int32: the place of row 0 on the first diagonal
    strip_values: Tensor  # one number for each diagonal of a strip, float32 or float64
    diagonals: Tensor  # (num_diagonals,) int32: the place of row 0, ascending in each group
    values: Tensor  # (num_diagonals, 8) float32 or float64; 0 beyond the rows of the group
    singles: Tensor  # (num_singles, 2) int32: row in the group, place
    single_values: Tensor  # (num_singles,)
    num_rows: int
    row_step: int  # between the rows of a group


class Runs(NamedTuple):
    """Rows or columns in runs of neighbours: run i is starts[i], starts[i] + step, ..., lengths[i] of them."""

    starts: Tensor  # int64
    lengths: Tensor  # int64, >= 1
    step: int


@dataclass(frozen=True, eq=False)
class SamplingWeights:
    """A and A transposed, on the CPU in float64, and on every device where they were used.

    ``cells``: lengths of the runs of cells that have one duration and start one snippet after another; None where cells
    are in no such order.
    """

    forward: SparseRows
    transposed: SparseRows
    num_snippets: int
    num_bins: int
    cells: Tensor | None = None
    _placed: dict[tuple[torch.device, torch.dtype], tuple[SparseRows, SparseRows]] = field(
        default_factory=dict, init=False
    )
    _grouped: dict[torch.dtype, tuple[RowGroups, RowGroups]] = field(default_factory=dict, init=False)

    def on(self, device: torch.device, dtype: torch.dtype = torch.float32) -> tuple[SparseRows, SparseRows]:
        """(A, A transposed) on ``device`` with float32 or float64 values; moved once, at the first call for a pair."""
        if dtype not in (torch.float32, torch.float64):
            raise ValueError(f"SamplingWeights.on: dtype must be float32 or float64, got {dtype}")
        placed = self._placed.get((device, dtype))
        if placed is None:
            # Tensors made in inference mode could never serve training; a grid may well be used in evaluation first.
            with torch.inference_mode(False):
                placed = (_place(self.forward, device, dtype), _place(self.transposed, device, dtype))
            self._placed[device, dtype] = placed
        return placed

    def grouped(self, dtype: torch.dtype) -> tuple[RowGroups, RowGroups] | None:
        """(A, A transposed) by groups, with values of ``dtype``; made at the first call. None without ``cells``."""
        if self.cells is None:
            return None
        if dtype not in self._grouped:
            with torch.inference_mode(False), torch.no_grad():
                cells = Runs(self.cells.cumsum(0) - self.cells, self.cells, 1)
                bins = torch.arange(self.num_bins)
                snippets = Runs(bins, torch.full_like(bins, self.num_snippets), self.num_bins)
                self._grouped[dtype] = (
                    group_rows(self.forward, cells, snippets, dtype),
                    group_rows(self.transposed, snippets, cells, dtype),
                )
        return self._grouped[dtype]


@dataclass(frozen=True, eq=False)
class SamplingGrid:
    """Cells over ``num_snippets`` snippets, each sampled in ``num_bins`` bins, and the weights A of the samples.

    Made by ``proposal_grid``, ``boundary_matching_grid`` and ``roi_grid``.
    """

    num_snippets: int
    num_bins: int
    rois: Tensor  # (num_cells, 2) float32, start and end in snippet index units, on the CPU
    weights: SamplingWeights = field(repr=False)

    @property
    def num_cells(self) -> int:
        return self.rois.shape[0]

    @property
    def num_weights(self) -> int:
        """Non-zero entries of A."""
        return len(self.weights.forward.values)

    def matrices(self, device: torch.device, dtype: torch.dtype = torch.float32) -> tuple[SparseRows, SparseRows]:
        """(A, A transposed) on ``device``; A is (num_cells, num_snippets * num_bins). See ``SamplingWeights.on``."""
        return self.weights.on(device, dtype)


@dataclass(frozen=True, eq=False)
class CellGrid(SamplingGrid):
    """A grid of all valid (duration, start) cells of a proposal map."""

    max_duration: int
    cells: Tensor = field(repr=False)  # (num_cells, 2) int64 (d, s) in the order of rois: by d, then s; on the CPU
    _placed: dict[torch.device, Tensor] = field(default_factory=dict, init=False, repr=False)

    def cells_on(self, device: torch.device) -> Tensor:
        """``cells`` on ``device``; moved once, at the first call for it."""
        if device not in self._placed:
            with torch.inference_mode(False):
                self._placed[device] = self.cells.to(device)
        return self._placed[device]


@dataclass(frozen=True, eq=False)
class ProposalGrid(CellGrid):
    """The cells sampled by G-TAD's rule. Made by ``proposal_grid``."""

    expand: float
    margin: float


@dataclass(frozen=True, eq=False)
class BoundaryMatchingGrid(CellGrid):
    """The same cells sampled by BMN's rule. Made by ``boundary_matching_grid``."""

    num_samples: int
    windows: Windows


@lru_cache(maxsize=32)
def proposal_grid(
    num_snippets: int, max_duration: int, num_bins: int, *, expand: float = 0.5, margin: float = 0.0
) -> ProposalGrid:
    """The ROIs of G-TAD's SGAlign (Xu et al. 2020, section 3.3) in every valid cell of a duration x start map.

    Cell (d, s), d < max_duration and s + d < num_snippets, covers len = d + 1 snippets; its ROI is
    [s - expand*len - margin, s + d + expand*len + margin] in snippet index units, where a whole number is the centre of
    a snippet, sampled adaptively (sampling_ratio 0). With expand 0 and margin 0.5 that is the time that the snippets
    s..s+d cover, and no more. Cached: the same arguments give the same object.

    Where a sample lies in a cell is computed in float64 from the cell's start, so that cells of one duration have the
    same weights to the bit. ``temporal_roi_align`` of ``rois`` computes it in float32 from the first snippet, which
    differs by rounding.

    Raises:
        ValueError: num_snippets, max_duration or num_bins below 1, or expand or margin negative.
    """
    if max_duration < 1 or not 0 <= expand < float("inf") or not 0 <= margin < float("inf"):
        raise ValueError(
            "proposal_grid: max_duration must be >= 1, expand and margin >= 0, got "
            f"{max_duration}, {expand} and {margin}"
        )
    _check_sizes(num_snippets, num_bins)
    with torch.inference_mode(False), torch.no_grad():
        cells, rois = _proposals(num_snippets, max_duration, expand, margin)
        weights = replace(_proposal_weights(cells, num_snippets, num_bins, expand, margin), cells=_runs(cells))
        return ProposalGrid(num_snippets, num_bins, rois, weights, max_duration, cells, expand, margin)


@lru_cache(maxsize=32)
def boundary_matching_grid(
    num_snippets: int, max_duration: int, num_bins: int = 32, num_samples: int = 3, windows: Windows = "paper"
) -> BoundaryMatchingGrid:
    """The samples of BMN's boundary-matching layer (Lin et al., ICCV 2019, section 3.2) in the same cells.

    Cell (d, s) has a window a..b in snippet index units, and J = num_bins * num_samples samples in it with both ends
    included, num_samples to a bin, which is their mean. A sample at u weighs snippet trunc(u) by 1 - (u - trunc(u)) and
    snippet ceil(u) by u - trunc(u), each only if it exists: left of the first snippet that comes to the first one, down
    to -1, and right of the last it fades to 0 at L. The two kinds of ``windows``, positions in float64, rounded as
    written here:

    - "paper": a = s - len/2, b = s + d + len/2 of len = d + 1, as in ``proposal_grid`` with expand 0.5;
      u_j = a + (b - a)*j/(J - 1).
    - "released": a = s - len/2, b = s + d + 1 + len/2 of len = d + 2; u_j = a + j*((b - a)/(J - 1)). The authors' code
      (JJBOY/BMN-Boundary-Matching-Network, 2020), with the same num_bins and num_samples and the same share of the
      length on either side (its prop_boundary_ratio of 0.5), takes the end of the last snippet for its place and counts
      one snippet more: its windows begin half a snippet earlier and end one and a half later.

    Cached: the same arguments give the same object.

    Raises:
        ValueError: a number below 1, unknown windows, or more weights than 32-bit offsets can count.
    """
    if max_duration < 1 or num_samples < 1:
        raise ValueError(
            f"boundary_matching_grid: max_duration and num_samples must be >= 1, got {max_duration} and {num_samples}"
        )
    if windows not in get_args(Windows):
        raise ValueError(f'boundary_matching_grid: windows must be "paper" or "released", got "{windows}"')
    _check_sizes(num_snippets, num_bins)
    with torch.inference_mode(False), torch.no_grad():
        cells, rois = _proposals(num_snippets, max_duration, 0.5, 0.0)
        if windows == "released":
            rois = rois + torch.tensor([-0.5, 1.5])
        starts_N1, ends_N1 = rois.to(torch.float64).split(1, dim=1)
        num_positions = num_bins * num_samples
        positions_J = torch.arange(num_positions, dtype=torch.float64)
        last = max(num_positions - 1, 1)
        if windows == "released":
            u_NJ = starts_N1 + positions_J * ((ends_N1 - starts_N1) / last)
        else:
            u_NJ = starts_N1 + (ends_N1 - starts_N1) * positions_J / last
        lower_NJ, upper_NJ = u_NJ.trunc(), u_NJ.ceil()
        fraction_NJ = u_NJ - lower_NJ
        snippets = torch.stack([lower_NJ, upper_NJ])
        values = torch.stack([1 - fraction_NJ, fraction_NJ]) / num_samples
        bins = torch.arange(num_positions) // num_samples
        rows = torch.arange(len(rois)).unsqueeze(1)
        # trunc brings what lies between -1 and 0 to -0.0, which is the first snippet.
        there = (snippets >= 0) & (snippets < num_snippets)
        columns = snippets.to(torch.int64) * num_bins + bins
        weights = _sum_taps(
            rows.expand_as(columns)[there], columns[there], values[there], len(rois), num_snippets, num_bins
        )
        weights = replace(weights, cells=_runs(cells))
        return BoundaryMatchingGrid(num_snippets, num_bins, rois, weights, max_duration, cells, num_samples, windows)


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
    _check_sizes(num_snippets, num_bins)
    with torch.inference_mode(False), torch.no_grad():
        rois = rois.detach().to("cpu", copy=True)
        if not bool(rois.isfinite().all()):
            raise ValueError("roi_grid: rois must be finite")
        return SamplingGrid(num_snippets, num_bins, rois, _roi_weights(rois, num_snippets, num_bins))


def weights_of(grids: tuple[SamplingGrid, ...]) -> SamplingWeights:
    """[A_1 | A_2 | ...]: the bins of all grids side by side, so that column t*R + r is (snippet t, bin r of all R).

    The grids have the same cells and snippets. Joins are cached, for the last 32 tuples of grids.
    """
    return grids[0].weights if len(grids) == 1 else _join(grids)


@lru_cache(maxsize=32)
def _join(grids: tuple[SamplingGrid, ...]) -> SamplingWeights:
    num_cells, num_snippets = grids[0].num_cells, grids[0].num_snippets
    num_bins = sum(grid.num_bins for grid in grids)
    with torch.inference_mode(False), torch.no_grad():
        rows, columns, values = [], [], []
        first_bin = 0
        for grid in grids:
            matrix = grid.weights.forward
            counts = matrix.offsets.diff().to(torch.int64)
            snippets, bins = matrix.columns // grid.num_bins, matrix.columns % grid.num_bins
            rows.append(torch.repeat_interleave(torch.arange(num_cells), counts))
            columns.append(snippets.to(torch.int64) * num_bins + bins + first_bin)
            values.append(matrix.values)
            first_bin += grid.num_bins
        joined = _sum_taps(torch.cat(rows), torch.cat(columns), torch.cat(values), num_cells, num_snippets, num_bins)
        return replace(joined, cells=grids[0].weights.cells)


def _check_sizes(num_snippets: int, num_bins: int) -> None:
    if num_snippets < 1 or num_bins < 1:
        raise ValueError(f"a grid needs num_snippets >= 1 and num_bins >= 1, got {num_snippets} and {num_bins}")


def _proposals(num_snippets: int, max_duration: int, expand: float, margin: float) -> tuple[Tensor, Tensor]:
    """Valid cells (d, s), and their windows widened by expand*len + margin on either side."""
    durations = torch.arange(max_duration).unsqueeze(1)
    starts = torch.arange(max(num_snippets, 0)).unsqueeze(0)
    cells = torch.nonzero(durations + starts < num_snippets)
    d, s = cells.to(torch.float32).unbind(1)
    wider = expand * (d + 1) + margin
    return cells, torch.stack([s - wider, s + d + wider], dim=1)


def _runs(cells_N2: Tensor) -> Tensor:
    """How many cells each duration has."""
    lengths: Tensor = torch.unique_consecutive(cells_N2[:, 0], return_counts=True)[1]
    return lengths


def _roi_weights(rois: Tensor, num_snippets: int, num_bins: int) -> SamplingWeights:
    starts = rois[:, 0]
    lengths = (rois[:, 1] - starts).clamp(min=1)
    counts = sample_counts(lengths, num_bins, 0)
    roi, bins, samples = _samples(counts, num_bins)
    positions = sample_positions(starts[roi], lengths[roi], counts[roi], bins, samples, num_bins)
    taps = linear_weights(positions, num_snippets, torch.float64)
    return _sum_samples(roi, bins, counts, taps, num_snippets, num_bins)


def _proposal_weights(
    cells_N2: Tensor, num_snippets: int, num_bins: int, expand: float, margin: float
) -> SamplingWeights:
    d, s = cells_N2.to(torch.float64).unbind(1)
    wider = expand * (d + 1) + margin
    widths = (d + 2 * wider).clamp(min=1) / num_bins
    counts = widths.ceil().to(torch.int64)
    cell, bins, samples = _samples(counts, num_bins)
    offsets = bins * widths[cell] - wider[cell] + (samples + 0.5) * widths[cell] / counts[cell]
    # As linear_weights, with the fraction of the offset itself, in which the cell's start has no part.
    fraction = offsets - offsets.floor()
    below = s[cell] + offsets.floor()
    inside = ((below >= -1) & (below + fraction <= num_snippets)).to(torch.float64)
    fraction[(below < 0) | (below >= num_snippets - 1)] = 0
    lower = below.clamp(0, num_snippets - 1).to(torch.int64)
    taps = (lower, (lower + 1).clamp(max=num_snippets - 1), inside * (1 - fraction), inside * fraction)
    return _sum_samples(cell, bins, counts, taps, num_snippets, num_bins)


def _samples(counts: Tensor, num_bins: int) -> tuple[Tensor, Tensor, Tensor]:
    """Cell, bin and number in the bin of each sample of each bin of each cell, in that order; ``counts`` to a bin."""
    per_cell = counts * num_bins
    cell = torch.repeat_interleave(torch.arange(len(counts)), per_cell)
    nth = torch.arange(len(cell)) - (per_cell.cumsum(0) - per_cell)[cell]
    return cell, nth // counts[cell], nth % counts[cell]


def _sum_samples(
    cell: Tensor,
    bins: Tensor,
    counts: Tensor,
    taps: tuple[Tensor, Tensor, Tensor, Tensor],
    num_snippets: int,
    num_bins: int,
) -> SamplingWeights:
    """A of the mean of each bin's samples; ``taps`` as ``linear_weights`` gives them."""
    lower, upper, lower_weight, upper_weight = taps
    columns = torch.cat([lower, upper]) * num_bins + bins.repeat(2)
    values = torch.cat([lower_weight, upper_weight]) / counts[cell].repeat(2)
    nonzero = values != 0
    return _sum_taps(cell.repeat(2)[nonzero], columns[nonzero], values[nonzero], len(counts), num_snippets, num_bins)


def _sum_taps(
    rows: Tensor, columns: Tensor, values: Tensor, num_rows: int, num_snippets: int, num_bins: int
) -> SamplingWeights:
    """A out of (row, column, value) in float64, in any order; values of one entry are summed in the order given."""
    num_columns = num_snippets * num_bins
    entries, entry_of_tap = torch.unique(rows * num_columns + columns, sorted=True, return_inverse=True)
    summed = torch.bincount(entry_of_tap, weights=values, minlength=len(entries))
    if max(len(entries), num_rows, num_columns) >= 2**31:
        raise ValueError(f"{len(entries)} weights do not fit 32-bit offsets: use fewer ROIs or num_bins")
    rows, columns = entries // num_columns, entries % num_columns
    by_column = torch.argsort(columns, stable=True)
    return SamplingWeights(
        _compress(rows, columns, summed, num_rows),
        _compress(columns[by_column], rows[by_column], summed[by_column], num_columns),
        num_snippets,
        num_bins,
    )


def _compress(rows: Tensor, columns: Tensor, values: Tensor, num_rows: int) -> SparseRows:
    offsets = torch.zeros(num_rows + 1, dtype=torch.int64)
    offsets[1:] = torch.bincount(rows, minlength=num_rows).cumsum(0)
    return SparseRows(offsets.to(torch.int32), columns.to(torch.int32), values)


def _place(matrix: SparseRows, device: torch.device, dtype: torch.dtype) -> SparseRows:
    return SparseRows(matrix.offsets.to(device), matrix.columns.to(device), matrix.values.to(device, dtype))


def group_rows(matrix: SparseRows, rows: Runs, columns: Runs, dtype: torch.dtype) -> RowGroups:
    """``matrix`` by groups of rows that are neighbours in a run. The runs cover all its rows, and all its columns.

    The product is the same for any runs; where rows do not read neighbouring columns, it is of single entries alone.
    """
    num_rows = len(matrix.offsets) - 1
    firsts, counts = _groups(rows)
    places, num_places = _places(columns)
    gaps = torch.ones(num_places, dtype=torch.int64)
    gaps[places] = 0
    gaps_before = F.pad(gaps.cumsum(0), (1, 0))

    parts: list[tuple[Tensor, ...]] = []
    at_once = max(1, SLOTS // num_places)
    for first, count in zip(firsts.split(at_once), counts.split(at_once), strict=True):
        group, nth, entry = _entries(matrix, first, count, rows.step)
        place, value = places[matrix.columns[entry].to(torch.int64)], matrix.values[entry].to(dtype)
        # Entries of one diagonal of a group meet in one slot.
        slot = group * num_places + place - nth
        present = torch.bincount(slot, minlength=len(first) * num_places)
        taken = present.nonzero().squeeze(1)
        start, needed = taken % num_places, count[taken // num_places]
        in_gaps = gaps_before[start + needed] - gaps_before[start]
        # A row whose column lies in a gap reads zeros; one entry is not worth seven such rows.
        whole = taken[(present[taken] + in_gaps == needed) & ((present[taken] > 1) | (needed == 1))]
        diagonal = torch.full_like(present, -1)
        diagonal[whole] = torch.arange(len(whole))
        diagonal = diagonal[slot]
        along, alone = diagonal >= 0, diagonal < 0
        values = value.new_zeros(len(whole), GROUP)
        values[diagonal[along], nth[along]] = value[along]
        # Zeros that a row reads in a gap come to nothing, whatever their value.
        highest, lowest = values.new_full((len(whole),), -torch.inf), values.new_full((len(whole),), torch.inf)
        highest.scatter_reduce_(0, diagonal[along], value[along], "amax")
        lowest.scatter_reduce_(0, diagonal[along], value[along], "amin")
        of_group, place_of = whole // num_places, whole % num_places
        one, own = highest == lowest, highest != lowest
        strips_of_part = _strips(of_group[one], place_of[one], highest[one], len(first))
        num_diagonals = torch.bincount(of_group[own], minlength=len(first))
        num_singles = torch.bincount(group[alone], minlength=len(first))
        singles = torch.stack([nth[alone], place[alone]], dim=1)
        parts.append((*strips_of_part, place_of[own], values[own], singles, value[alone], num_diagonals, num_singles))
    strips, strip_values, num_strips, diagonals, values, singles, single_values, num_diagonals, num_singles = map(
        torch.cat, zip(*parts, strict=True)
    )
    ends_of_strips = num_strips.flatten().cumsum(0).view_as(num_strips)
    groups = torch.cat(
        [torch.stack([firsts, counts], 1), ends_of_strips, torch.stack([num_diagonals, num_singles], 1).cumsum(0)], 1
    )
    places, groups, strips, diagonals, singles = (
        x.to(torch.int32) for x in (places, groups, strips, diagonals, singles)
    )
    return RowGroups(
        places, groups, strips, strip_values, diagonals, values, singles, single_values, num_rows, rows.step
    )


def _strips(group: Tensor, place: Tensor, value: Tensor, num_groups: int) -> tuple[Tensor, Tensor, Tensor]:
    """Diagonals of one value each, ascending by (group, place), as (strips, their values, how many each group has
    (num_groups, 3)): of 4 diagonals, of 2 and of 1.
    """
    if not len(group):
        return place, value, group.new_zeros(num_groups, 3)
    begins = torch.ones_like(group, dtype=torch.bool)
    begins[1:] = (group[1:] != group[:-1]) | (place[1:] != place[:-1] + 1)
    run = begins.cumsum(0) - 1
    length = torch.bincount(run)[run]
    nth = torch.arange(len(run)) - begins.nonzero().squeeze(1)[run]
    left = length - length % 4
    kind = torch.where(nth < left, 0, torch.where((length % 4 >= 2) & (nth < left + 2), 1, 2))
    order = torch.argsort(group * 3 + kind, stable=True)
    first = torch.where(kind == 0, nth % 4 == 0, (kind == 2) | (nth == left))[order]
    num_strips = torch.bincount((group * 3 + kind)[order][first], minlength=num_groups * 3).view(num_groups, 3)
    return place[order][first], value[order], num_strips


def _groups(rows: Runs) -> tuple[Tensor, Tensor]:
    """The first row of each group, and how many it has."""
    groups_of_run = (rows.lengths + GROUP - 1) // GROUP
    run = torch.repeat_interleave(torch.arange(len(rows.lengths)), groups_of_run)
    nth = torch.arange(len(run)) - (groups_of_run.cumsum(0) - groups_of_run)[run]
    firsts = rows.starts[run] + nth * GROUP * rows.step
    return firsts, (rows.lengths[run] - nth * GROUP).clamp(max=GROUP)


def _places(columns: Runs) -> tuple[Tensor, int]:
    """Where each column lies in a row of memory with gaps before, between and after the runs, and its size."""
    gap = GROUP - 1
    run = torch.repeat_interleave(torch.arange(len(columns.lengths)), columns.lengths)
    nth = torch.arange(len(run)) - (columns.lengths.cumsum(0) - columns.lengths)[run]
    places = torch.empty_like(run)
    places[columns.starts[run] + nth * columns.step] = torch.arange(len(run)) + (run + 1) * gap
    return places, len(run) + (len(columns.lengths) + 1) * gap


def _entries(matrix: SparseRows, firsts: Tensor, counts: Tensor, step: int) -> tuple[Tensor, Tensor, Tensor]:
    """Of all entries of the groups' rows: group, row in the group, place in the matrix's tensors."""
    group, nth = torch.nonzero(torch.arange(GROUP) < counts.unsqueeze(1)).unbind(1)
    row = firsts[group] + nth * step
    offsets = matrix.offsets.to(torch.int64)
    entries_of_row = offsets[row + 1] - offsets[row]
    of_row = torch.repeat_interleave(torch.arange(len(row)), entries_of_row)
    entry = torch.arange(len(of_row)) + (offsets[row] - (entries_of_row.cumsum(0) - entries_of_row))[of_row]
    return group[of_row], nth[of_row], entry

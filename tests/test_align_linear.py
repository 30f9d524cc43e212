from __future__ import annotations

import math
import mmap
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from forms import assert_as_good_as
from torch import Tensor

from lofi_fast.kernels import library, temporal_roi_align
from lofi_fast.kernels.align_linear import (
    SamplingGrid,
    align_linear,
    align_linear_reference,
    align_linear_sum,
    boundary_matching_grid,
    proposal_grid,
    reference,
    roi_grid,
)
from lofi_fast.kernels.align_linear.sampling import GROUP, RowGroups, Runs, SparseRows, Windows, group_rows, weights_of

pytestmark = pytest.mark.usefixtures("poison", "one_thread")

Gather = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor | None, int], Tensor]

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
UNRESERVED = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x4000  # Linux's MAP_NORESERVE: not counted until it is touched
DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


@pytest.fixture(params=["reference", "C++", "Triton"])
def gather(request: pytest.FixtureRequest) -> Gather:
    """One form of gather_rows, for tensors on the CPU. Triton runs on a GPU where there is one."""
    if request.param == "reference":
        return reference.gather_rows
    if request.param == "C++":
        request.getfixturevalue("native")
        assert library.forms["cpu"]["gather_rows"] == "C++"
        op: Gather = torch.ops.lofi_fast.gather_rows
        return op
    pytest.importorskip("triton")
    from lofi_fast.kernels.align_linear import kernel

    def run(dense: Tensor, *rest: Any) -> Tensor:
        moved = [x.to(DEVICE) if isinstance(x, Tensor) else x for x in (dense, *rest)]
        return kernel.gather_rows(*moved).cpu()

    return run


def normal(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def sparse(num_rows: int, num_columns: int, counts: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
    """(offsets, columns, values): rows have ``counts`` entries in turn, ascending."""
    generator = torch.Generator().manual_seed(num_rows)
    rows = [torch.randperm(num_columns, generator=generator)[: counts[n % len(counts)]] for n in range(num_rows)]
    offsets = torch.tensor([0, *(len(row) for row in rows)]).cumsum(0).to(torch.int32)
    columns = torch.cat([torch.zeros(0, dtype=torch.int64), *(row.sort().values for row in rows)]).to(torch.int32)
    return offsets, columns, normal(len(columns), dtype=torch.float32, seed=1)


def dense_of(offsets: Tensor, columns: Tensor, values: Tensor, num_columns: int) -> Tensor:
    matrix = torch.zeros(len(offsets) - 1, num_columns, dtype=torch.float64)
    rows = torch.repeat_interleave(torch.arange(len(offsets) - 1), offsets.diff().long())
    matrix[rows, columns.long()] = values.double()
    return matrix


# (B, num_rows, num_columns, O, entries of the rows in turn, row_step)
SPARSE = {
    "ordinary": (2, 12, 20, 16, (5, 3, 7), 1),
    "in-steps-of-three": (2, 12, 20, 16, (5, 3, 7, 1), 3),
    "one-row-a-step": (1, 6, 9, 8, (4,), 6),
    "one-row": (1, 1, 9, 16, (9,), 1),
    "one-entry": (2, 3, 5, 8, (1,), 1),
    "empty-rows": (2, 11, 20, 16, (0, 9, 0), 1),
    "no-entries": (2, 5, 4, 8, (0,), 1),
    "no-rows": (2, 0, 4, 8, (0,), 1),
    "no-batch": (0, 3, 4, 8, (2,), 1),
    "no-outputs": (2, 3, 4, 0, (2,), 1),
    "one-output": (2, 9, 20, 1, (6, 2), 1),
    "nine-outputs": (3, 9, 7, 9, (6, 2), 3),
    "several-blocks-of-outputs": (1, 5, 7, 150, (6, 2), 1),
    "more-columns-than-a-block-holds": (1, 2, 5000, 40, (3,), 1),
    "more-entries-than-a-row-holds": (1, 2, 400, 70, (200,), 1),
}
LAYOUTS = ("contiguous", "outputs-outside", "window", "expanded")


def laid_out(x: Tensor, layout: str) -> Tensor:
    if layout == "outputs-outside":
        return x.transpose(1, 2).contiguous().transpose(1, 2)
    if layout == "window":
        wide = torch.full((len(x) + 1, 2 * x.shape[1], x.shape[2] + 3), torch.nan, dtype=x.dtype)
        return wide[1:, ::2, 2:-1].copy_(x)
    return x.contiguous()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", SPARSE.values(), ids=SPARSE.keys())
def test_every_form_of_gather_rows(gather: Gather, case: tuple[Any, ...], dtype: torch.dtype) -> None:
    batch, num_rows, num_columns, num_outputs, counts, row_step = case
    number = list(SPARSE.values()).index(case)
    offsets, columns, values = sparse(num_rows, num_columns, counts)
    sum_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    values = values.to(sum_dtype)
    bias = normal(2 * num_outputs, dtype=sum_dtype, seed=2)[::2] if number % 2 else None
    # One layout a case, so that each form meets all of them.
    dense = laid_out(normal(batch, num_columns, num_outputs, dtype=dtype), LAYOUTS[number % 3])
    out = gather(dense, offsets, columns, values, bias, row_step)
    exact = dense_of(offsets, columns, values, num_columns) @ dense.double()
    exact = exact if bias is None else exact + bias.double()
    assert out.is_contiguous() and out.dtype == dtype
    if dtype == torch.float64:
        torch.testing.assert_close(out, exact, rtol=0, atol=1e-12)
    else:
        assert_as_good_as(out, reference.gather_rows(dense, offsets, columns, values, bias, row_step), exact)


def test_gather_rows_of_expanded_memory(gather: Gather) -> None:
    matrix = sparse(4, 6, (3, 2))
    dense = torch.ones(1, 1, 1).expand(2, 6, 9)
    torch.testing.assert_close(gather(dense, *matrix, None, 1), gather(dense.contiguous(), *matrix, None, 1))


def test_gather_rows_reads_nothing_else(gather: Gather) -> None:
    """A column without an entry is never read, and padding adds nothing, be it NaN."""
    dense = torch.full((1, 8, 16), torch.nan)
    dense[:, 3] = 2.0
    offsets, columns = (torch.tensor(x, dtype=torch.int32) for x in ([0, 1, 1, 2], [3, 3]))
    out = gather(dense, offsets, columns, torch.tensor([1.0, 3.0]), None, 1)
    assert out[0, :, 0].tolist() == [2.0, 0.0, 6.0] and torch.isfinite(out).all()


@pytest.mark.usefixtures("native")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("row_step", [1, 30])
def test_threads_do_not_change_the_result(row_step: int, dtype: torch.dtype) -> None:
    matrix = sparse(300, 200, (50, 3, 111))
    dense = normal(2, 200, 150, dtype=dtype)
    one = torch.ops.lofi_fast.gather_rows(dense, *matrix, None, row_step)
    torch.set_num_threads(3)
    assert torch.equal(torch.ops.lofi_fast.gather_rows(dense, *matrix, None, row_step), one)
    assert torch.equal(torch.ops.lofi_fast.gather_rows(dense, *matrix, None, 1), one)


@pytest.mark.usefixtures("native")
def test_wrong_arguments_do_not_reach_memory_in_cpp() -> None:
    dense, offsets, columns = torch.zeros(1, 5, 8), torch.tensor([0, 1, 3]).int(), torch.tensor([0, 4, 2]).int()
    values = torch.ones(3)
    right = (dense, offsets, columns, values, None, 1)
    assert torch.ops.lofi_fast.gather_rows(*right).shape == (1, 2, 8)
    for place, wrong in (
        (0, dense[0]),
        (0, dense.int()),
        (0, dense.double()),
        (1, offsets.long()),
        (1, offsets + 1),
        (1, torch.tensor([0, 4, 3]).int()),
        (1, torch.tensor([0, 1, 2]).int()),
        (1, offsets[:0]),
        (2, columns + 1),
        (2, columns - 1),
        (2, columns[:2]),
        (3, values[:2]),
        (3, values.double()),
        (4, torch.ones(7)),
        (4, torch.ones(8).double()),
        (5, 0),
        (5, 3),
    ):
        arguments = list(right)
        arguments[place] = wrong
        with pytest.raises(RuntimeError, match="gather_rows"):
            torch.ops.lofi_fast.gather_rows(*arguments)


@pytest.fixture(params=["reference", "C++"])
def gather_groups(request: pytest.FixtureRequest) -> Callable[..., Tensor]:
    """One form of gather_groups."""
    if request.param == "reference":
        return reference.gather_groups
    request.getfixturevalue("native")
    assert library.forms["cpu"]["gather_groups"] == "C++"
    op: Callable[..., Tensor] = torch.ops.lofi_fast.gather_groups
    return op


def with_bias(groups: RowGroups, bias: Tensor | None) -> tuple[Any, ...]:
    """What gather_groups is given after `dense`."""
    *tensors, num_rows, row_step = groups
    return *tensors, bias, num_rows, row_step


def runs(*lengths: int, step: int = 1) -> Runs:
    """One after the other, or all side by side where they are `step` runs."""
    lengths_R = torch.tensor(lengths)
    return Runs(lengths_R.cumsum(0) - lengths_R if step == 1 else torch.arange(step), lengths_R, step)


def neighbours(rows: int, columns: int, width: int, step: int) -> SparseRows:
    """Row n has entries in columns (n + k) * step, k < width, where these exist, and one by itself in every 5th row."""
    matrix = torch.zeros(rows, columns, dtype=torch.float64)
    numbers = normal(rows, width + 1, seed=3)
    for n in range(rows):
        for k in range(width):
            if (n + k) * step < columns:
                matrix[n, (n + k) * step] = numbers[n, k]
        if n % 5 == 0:
            matrix[n, (7 * n + 3) % columns] = numbers[n, width]
    offsets = torch.cat([torch.zeros(1), (matrix != 0).sum(1).cumsum(0)]).to(torch.int32)
    return SparseRows(offsets, matrix.nonzero()[:, 1].to(torch.int32), matrix[matrix != 0])


def alike(rows: int, columns: int, width: int) -> SparseRows:
    """Row n has entries in columns n + k, k < width, where these exist: of one value for each k, but for one entry."""
    matrix = neighbours(rows, columns, width, 1)
    row = torch.repeat_interleave(torch.arange(rows), matrix.offsets.diff())
    values = normal(columns + rows, seed=4)[matrix.columns - row]
    values[len(values) // 2] = 0.5
    return matrix._replace(values=values)


# (matrix, num_columns, runs of its rows, runs of its columns)
GROUPED = {
    "one-row": (SparseRows(*sparse(1, 9, (9,))), 9, runs(1), runs(9)),
    "one-row-a-run": (neighbours(6, 12, 3, 1), 12, runs(1, 1, 1, 1, 1, 1), runs(12)),
    "one-column-a-run": (neighbours(6, 4, 3, 1), 4, runs(6), runs(1, 1, 1, 1)),
    "eight": (neighbours(8, 20, 4, 1), 20, runs(8), runs(20)),
    "nine": (neighbours(9, 9, 2, 1), 9, runs(9), runs(9)),
    "columns-in-steps": (neighbours(17, 40, 6, 2), 40, runs(17), runs(20, 20, step=2)),
    "rows-in-steps": (neighbours(36, 30, 5, 1), 30, runs(12, 12, 12, step=3), runs(25, 5)),
    "long-diagonals": (neighbours(30, 30, 30, 1), 30, runs(30), runs(30)),
    "one-value-a-diagonal": (alike(26, 40, 7), 40, runs(26), runs(40)),
    "one-value-a-diagonal-to-the-ends": (alike(13, 8, 8), 8, runs(13), runs(8)),
    "nothing-in-common": (SparseRows(*sparse(20, 50, (5, 3, 0))), 50, runs(20), runs(50)),
    "empty-rows": (SparseRows(*sparse(10, 20, (0,))), 20, runs(4, 6), runs(20)),
}
PROPOSALS = [(1, 1, 1), (5, 9, 4), (25, 25, 32), (40, 7, 3)]


def literal_groups(groups: RowGroups) -> Tensor:
    """The matrix that they are, in float64."""
    matrix = torch.zeros(groups.num_rows, len(groups.places), dtype=torch.float64)
    column_at = {place: column for column, place in enumerate(groups.places.tolist())}
    diagonal = single = strip = first_value = 0
    for first, count, *last_strips, last_diagonal, last_single in groups.groups.tolist():
        for size, last_strip in zip((4, 2, 1), last_strips, strict=True):
            for place in groups.strips[strip:last_strip].tolist():
                for e, number in enumerate(groups.strip_values[first_value : first_value + size].tolist()):
                    for i in range(count):
                        column = column_at.get(place + e + i)
                        if column is not None:
                            matrix[first + i * groups.row_step, column] += number
                first_value += size
            strip = last_strip
        for e in range(diagonal, last_diagonal):
            for i, value in enumerate(groups.values[e].tolist()):
                column = column_at.get(int(groups.diagonals[e]) + i)
                if i < count and column is not None:
                    matrix[first + i * groups.row_step, column] += value
                else:
                    assert value == 0
        for e in range(single, last_single):
            i, place = groups.singles[e].tolist()
            assert i < count
            matrix[first + i * groups.row_step, column_at[place]] += float(groups.single_values[e])
        diagonal, single = last_diagonal, last_single
    assert (strip, first_value) == (len(groups.strips), len(groups.strip_values))
    assert (diagonal, single) == (len(groups.diagonals), len(groups.singles))
    return matrix


@pytest.mark.parametrize("case", GROUPED.values(), ids=GROUPED.keys())
def test_groups_are_the_matrix(case: tuple[SparseRows, int, Runs, Runs]) -> None:
    matrix, num_columns, rows, columns = case
    groups = group_rows(matrix, rows, columns, torch.float64)
    assert torch.equal(literal_groups(groups), dense_of(*matrix, num_columns))
    assert len(groups.groups) == sum(-(-length // GROUP) for length in rows.lengths.tolist())


@pytest.mark.parametrize(("num_snippets", "max_duration", "num_bins"), PROPOSALS)
@pytest.mark.parametrize("make", [proposal_grid, boundary_matching_grid])
def test_cells_are_grouped_by_their_starts(
    make: Callable[[int, int, int], SamplingGrid], num_snippets: int, max_duration: int, num_bins: int
) -> None:
    grid = make(num_snippets, max_duration, num_bins)
    grouped = grid.weights.grouped(torch.float64)
    assert grouped is not None and grid.weights.grouped(torch.float64) is grouped
    for groups, matrix in zip(grouped, grid.matrices(torch.device("cpu"), torch.float64), strict=True):
        assert torch.equal(literal_groups(groups), dense_of(*matrix, len(groups.places)))
        # Those of one duration start one snippet after another; those of one bin lie one snippet after another.
        assert groups.row_step == (1 if groups is grouped[0] else num_bins)
        if num_snippets >= 25:
            assert len(groups.singles) < 0.1 * grid.num_weights
            # Cells of one duration have the same weights, those at the ends of the video aside.
            if make is proposal_grid:
                assert len(groups.diagonals) < 0.3 * (len(groups.diagonals) + len(groups.strip_values))


def test_rois_in_no_order_are_not_grouped() -> None:
    assert roi_grid(torch.tensor([[0.0, 3.0], [1.0, 4.0]]), 5, 2).weights.grouped(torch.float32) is None


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("number", range(len(GROUPED)), ids=GROUPED.keys())
def test_every_form_of_gather_groups_is_equal(
    gather_groups: Callable[..., Tensor], number: int, dtype: torch.dtype
) -> None:
    matrix, num_columns, rows, columns = list(GROUPED.values())[number]
    batch, num_outputs = (1, 2, 3, 0)[number % 4], (33, 1, 70, 8, 16)[number % 5]
    sum_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    bias = normal(2 * num_outputs, dtype=sum_dtype, seed=2)[::2] if number % 2 else None
    dense = laid_out(normal(batch, num_columns, num_outputs, dtype=dtype), LAYOUTS[number % 3])
    groups = group_rows(matrix, rows, columns, sum_dtype)
    out = gather_groups(dense, *with_bias(groups, bias))
    values = matrix.values.to(sum_dtype)
    exact = dense_of(*matrix[:2], values, num_columns) @ dense.double()
    exact = exact if bias is None else exact + bias.double()
    assert out.is_contiguous() and out.dtype == dtype
    if dtype == torch.float64:
        torch.testing.assert_close(out, exact, rtol=0, atol=1e-12)
    else:
        assert_as_good_as(out, reference.gather_rows(dense, *matrix[:2], values, bias, 1), exact)


def test_gather_groups_reads_nothing_else(gather_groups: Callable[..., Tensor]) -> None:
    """A column that a row has no entry in has no part in it, be it NaN, though its neighbours have."""
    matrix = neighbours(24, 40, 3, 1)
    groups = group_rows(matrix, runs(24), runs(40), torch.float64)
    assert len(groups.diagonals) and len(groups.singles)
    for column in range(40):
        dense = torch.ones(1, 40, 5, dtype=torch.float64)
        dense[:, column] = torch.nan
        out = gather_groups(dense, *with_bias(groups, None))
        assert torch.equal(out.isnan().any(2)[0], dense_of(*matrix, 40)[:, column] != 0)


@pytest.mark.usefixtures("native")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_threads_do_not_change_the_bits_of_groups(dtype: torch.dtype) -> None:
    for groups in proposal_grid(40, 40, 8).weights.grouped(torch.float32) or ():
        dense = normal(2, len(groups.places), 150, dtype=dtype)
        torch.set_num_threads(1)
        one = torch.ops.lofi_fast.gather_groups(dense, *with_bias(groups, None))
        torch.set_num_threads(3)
        assert torch.equal(torch.ops.lofi_fast.gather_groups(dense, *with_bias(groups, None)), one)


@pytest.mark.usefixtures("native")
def test_wrong_groups_do_not_reach_memory_in_cpp() -> None:
    matrix = neighbours(11, 14, 3, 1)
    values = matrix.values.clone()
    row = torch.repeat_interleave(torch.arange(11), matrix.offsets.diff())
    values[matrix.columns - row == 1] = 1.0  # a strip in each group
    groups = group_rows(matrix._replace(values=values), runs(11), runs(14), torch.float32)
    right: dict[str, Any] = dict(zip(RowGroups._fields, groups, strict=True))
    assert len(groups.groups) == 2 and len(groups.strips) and len(groups.diagonals) > 1 and len(groups.singles) > 1
    dense = torch.zeros(1, 14, 8)

    def call(dense: Tensor = dense, bias: Tensor | None = None, **wrong: Any) -> Tensor:
        result: Tensor = torch.ops.lofi_fast.gather_groups(dense, *with_bias(RowGroups(**right | wrong), bias))
        return result

    def changed(name: str, *index: int, to: int) -> Tensor:
        tensor: Tensor = right[name].clone()
        tensor[index] = to
        return tensor

    assert call().shape == (1, 11, 8)
    last = int(groups.places.max())
    wrongs: list[dict[str, Any]] = [
        {"dense": dense[0]},
        {"dense": dense.int()},
        {"dense": dense.double()},
        {"dense": dense[:, 1:]},
        {"bias": torch.zeros(7)},
        {"bias": torch.zeros(8).double()},
        {"places": groups.places.long()},
        {"places": changed("places", 0, to=-1)},
        {"groups": groups.groups[:, :3]},
        {"groups": groups.groups[:1]},
        {"groups": changed("groups", 1, 0, to=9)},
        {"groups": changed("groups", 1, 0, to=-1)},
        {"groups": changed("groups", 0, 1, to=9)},
        {"groups": changed("groups", 0, 1, to=0)},
        {"groups": changed("groups", 0, 2, to=-1)},
        {"groups": changed("groups", 0, 2, to=len(groups.strips) + 1)},
        {"groups": changed("groups", 1, 4, to=len(groups.strips) + 1)},
        {"groups": changed("groups", 1, 4, to=len(groups.strips) - 1)},
        {"groups": changed("groups", 0, 5, to=-1)},
        {"groups": changed("groups", 0, 5, to=len(groups.diagonals) + 1)},
        {"groups": changed("groups", 1, 6, to=len(groups.singles) + 1)},
        {"groups": changed("groups", 1, 6, to=0)},
        {"strips": groups.strips[:-1]},
        {"strips": changed("strips", 0, to=-1)},
        {"strips": changed("strips", 0, to=last + 1)},
        {"strips": groups.strips.long()},
        {"strip_values": groups.strip_values[:-1]},
        {"strip_values": groups.strip_values.double()},
        {"diagonals": groups.diagonals[:-1]},
        {"diagonals": changed("diagonals", 0, to=-1)},
        {"diagonals": changed("diagonals", 0, to=last + 1)},
        {"diagonals": groups.diagonals.flip(0)},
        {"values": groups.values[:, :7]},
        {"values": groups.values.double()},
        {"singles": groups.singles[:-1]},
        {"singles": changed("singles", 0, 0, to=8)},
        {"singles": changed("singles", 0, 1, to=-1)},
        {"singles": changed("singles", 0, 1, to=last + 8)},
        {"single_values": groups.single_values.double()},
        {"num_rows": 10},
        {"num_rows": 12},
        {"num_rows": -1},
        {"row_step": 0},
        {"row_step": 2},
    ]
    for wrong in wrongs:
        with pytest.raises(RuntimeError, match="gather_groups"):
            call(**wrong)


@pytest.mark.usefixtures("native")
@pytest.mark.parametrize("capability", ["avx2", "default"])
def test_the_forms_for_narrower_vectors(capability: str) -> None:
    """As torch is told which vectors to use: in a process of its own, since it is read once."""
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", __file__, "-k", "gather_groups or bits_of_groups"],
        env=os.environ | {"ATEN_CPU_CAPABILITY": capability},
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed" in done.stdout


def test_gather_groups_is_well_formed() -> None:
    for bias in (None, normal(9)):
        groups = group_rows(neighbours(11, 14, 3, 1), runs(11), runs(14), torch.float64)
        dense = laid_out(normal(2, 14, 9), "window")
        torch.library.opcheck(torch.ops.lofi_fast.gather_groups.default, (dense, *with_bias(groups, bias)))


@pytest.mark.parametrize("layout", LAYOUTS[:3])
@pytest.mark.parametrize("biased", [False, True], ids=["no-bias", "bias"])
def test_gather_rows_is_well_formed(layout: str, biased: bool) -> None:
    offsets, columns, values = sparse(6, 5, (3, 0, 2))
    dense = laid_out(normal(2, 5, 9), layout)
    bias = normal(9) if biased else None
    torch.library.opcheck(torch.ops.lofi_fast.gather_rows.default, (dense, offsets, columns, values.double(), bias, 2))


@pytest.mark.skipif(DEVICE == "cuda", reason="counts on memory that is taken only where it is touched")
def test_offsets_above_32_bits() -> None:
    # The last of 2^28 + 1 columns of 16 outputs, of the second element of a batch; an offset that wraps around lands in
    # the first 2^32 bytes, or ahead of them.
    pytest.importorskip("triton")
    from lofi_fast.kernels.align_linear import kernel

    num_columns = 2**28 + 1
    memory = torch.frombuffer(mmap.mmap(-1, 2 * 32 * num_columns + 2**32, flags=UNRESERVED), dtype=torch.float16)
    dense = memory[2**31 :].view(2, num_columns, 16)
    dense[0, -1], dense[1, -1] = 3.0, 4.0
    offsets, columns = torch.tensor([0, 1]).int(), torch.tensor([num_columns - 1]).int()
    out = kernel.gather_rows(dense, offsets, columns, torch.tensor([2.0]), None, 1)
    assert out[:, 0].unique(dim=1).tolist() == [[6.0], [8.0]]


def test_launch_of_more_elements_than_32_bits_count() -> None:
    pytest.importorskip("triton")
    from lofi_fast.kernels.align_linear import kernel

    dense = torch.empty(1024, 5050, 512, dtype=torch.float16, device="meta")
    out = torch.empty(1024, 3600, 512, dtype=torch.float16, device="meta")
    assert dense.numel() > 2**31
    empty = torch.empty(3601, dtype=torch.int32, device="meta")
    launch = kernel.gather_rows_launch(dense, empty, empty, empty.float(), None, 36, out)
    # 13 tiles of 8 snippets in each of 36 steps.
    assert launch.grid == (1024 * 13 * 36, 4)
    assert launch.arguments["rows_of_step"] == 100


def operands(
    batch: int, channels: int, grid: SamplingGrid, outputs: int, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(batch, channels, grid.num_snippets, generator=generator, dtype=torch.float64)
    weight = torch.randn(outputs, channels, grid.num_bins, generator=generator, dtype=torch.float64)
    bias = torch.randn(outputs, generator=generator, dtype=torch.float64)
    weight /= (channels * grid.num_bins) ** 0.5
    features, weight, bias = features.to(dtype), weight.to(dtype), bias.to(dtype)
    return features.requires_grad_(), weight.requires_grad_(), bias.requires_grad_()


@pytest.mark.parametrize("batch", [0, 1, 3])
@pytest.mark.parametrize("num_bins", [1, 4, 32])
@pytest.mark.parametrize(
    ("num_snippets", "max_duration"), [(1, 1), (2, 2), (2, 1), (5, 5), (5, 3), (5, 9), (25, 25), (25, 7)]
)
def test_equals_the_definition_with_its_gradients(
    num_snippets: int, max_duration: int, num_bins: int, batch: int
) -> None:
    grid = proposal_grid(num_snippets, max_duration, num_bins)
    inputs = operands(batch, 9, grid, 5)
    features, weight, bias = inputs
    out = align_linear(features, grid, weight, bias)
    expected = align_linear_reference(features, grid, weight, bias)
    assert out.shape == (batch, 5, grid.num_cells)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-12)
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    for ours, theirs in zip(
        torch.autograd.grad(out, inputs, grad), torch.autograd.grad(expected, inputs, grad), strict=True
    ):
        # A gradient sums over every cell: the bound is relative to the largest entry.
        largest = theirs.abs().max().item() if theirs.numel() else 0.0
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12 * max(largest, 1.0))


def test_by_hand() -> None:
    # Two snippets, one bin. Cell (0, 0) is [-0.5, 0.5], sampled at 0; (0, 1) is [0.5, 1.5], sampled at 1; (1, 0) is
    # [-1, 2], sampled at -0.5, 0.5 and 1.5: the first value, the middle, the last.
    grid = proposal_grid(2, 2, 1)
    assert grid.cells.tolist() == [[0, 0], [0, 1], [1, 0]]
    features = torch.tensor([[[2.0, 6.0]]], dtype=torch.float64)
    out = align_linear(features, grid, torch.full((1, 1, 1), 10.0, dtype=torch.float64), torch.ones(1).double())
    assert out.flatten().tolist() == pytest.approx([21.0, 61.0, 41.0], abs=1e-12)


@pytest.mark.parametrize(("expand", "margin"), [(0.5, 0.0), (0.0, 0.5), (0.3, 0.1)])
def test_samples_lie_where_roi_align_has_them(expand: float, margin: float) -> None:
    """But for its coordinates, which are float32."""
    grid = proposal_grid(25, 25, 8, expand=expand, margin=margin)
    identity = torch.eye(25, dtype=torch.float64).unsqueeze(0)
    theirs_NTR = temporal_roi_align(identity, torch.nn.functional.pad(grid.rois, (1, 0)), 8)
    torch.testing.assert_close(reference.proposal_weights(grid), theirs_NTR, rtol=0, atol=1e-5)


def test_cells_of_one_duration_have_the_same_weights() -> None:
    matrix = dense_of(*proposal_grid(60, 60, 8).matrices(torch.device("cpu"), torch.float64)[0], 60 * 8)
    cells = proposal_grid(60, 60, 8).cells
    for duration in range(20):
        # Their windows lie in the video: at most 1.5 durations after the start, half of one before.
        rows = matrix[(cells[:, 0] == duration) & (cells[:, 1] >= 12) & (cells[:, 1] < 26)]
        assert len(rows) == 14
        shifted = torch.stack([row.roll(-8 * n) for n, row in enumerate(rows)])
        assert torch.equal(shifted, shifted[:1].expand_as(shifted))


def test_cells_are_exactly_the_valid_ones() -> None:
    grid = proposal_grid(7, 4, 2)
    assert grid.cells.tolist() == [[d, s] for d in range(4) for s in range(7) if s + d < 7]
    d, s = grid.cells.unbind(1)
    assert torch.equal(grid.rois, torch.stack([s - 0.5 * (d + 1), s + d + 0.5 * (d + 1)], dim=1))


def test_expand_changes_the_roi() -> None:
    grid = proposal_grid(6, 6, 4, expand=0.0)
    d, s = grid.cells.unbind(1)
    assert torch.equal(grid.rois, torch.stack([s, s + d], dim=1).float())
    features, weight, bias = operands(2, 3, grid, 4)
    torch.testing.assert_close(
        align_linear(features, grid, weight, bias),
        align_linear_reference(features, grid, weight, bias),
        rtol=0,
        atol=1e-12,
    )


def test_margin_widens_every_roi_alike() -> None:
    grid = proposal_grid(6, 6, 4, expand=0.0, margin=0.5)
    d, s = grid.cells.to(torch.float32).unbind(1)
    assert torch.equal(grid.rois, torch.stack([s - 0.5, s + d + 0.5], dim=1))
    assert grid is not proposal_grid(6, 6, 4, expand=0.0)
    with pytest.raises(ValueError, match="margin"):
        proposal_grid(4, 4, 4, margin=-0.5)


def test_grids_are_cached_by_their_arguments() -> None:
    assert proposal_grid(6, 6, 4) is proposal_grid(6, 6, 4)
    assert proposal_grid(6, 6, 4) is not proposal_grid(6, 6, 4, expand=0.25)


@pytest.mark.parametrize("batch", [0, 2])
def test_arbitrary_rois(batch: int) -> None:
    rois = torch.tensor([[-9.0, -4.0], [-2.0, 3.3], [4.0, 1.0], [2.0, 2.0], [0.0, 4.0], [3.7, 60.1], [-50.0, 50.0]])
    for some in (rois, rois.t().contiguous().t(), rois[::2], rois[:1], rois[:0]):
        grid = roi_grid(some, 5, 3)
        inputs = operands(batch, 4, grid, 2)
        out, expected = align_linear(inputs[0], grid, *inputs[1:]), align_linear_reference(inputs[0], grid, *inputs[1:])
        torch.testing.assert_close(out, expected, rtol=0, atol=1e-12)
        grad = torch.ones_like(out)
        for ours, theirs in zip(
            torch.autograd.grad(out, inputs, grad), torch.autograd.grad(expected, inputs, grad), strict=True
        ):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-11)


def test_a_grid_does_not_follow_later_changes_of_its_rois() -> None:
    rois = torch.tensor([[0.0, 3.0]])
    grid = roi_grid(rois, 4, 2)
    rois += 1
    assert grid.rois.tolist() == [[0.0, 3.0]]


def test_the_sum_equals_one_convolution_over_concatenated_bins() -> None:
    """G-TAD: 32 inner bins of one map and 4 context bins of another, concatenated, then a 1x1 convolution."""
    inner, around = proposal_grid(6, 6, 32), proposal_grid(6, 6, 4)
    graph, weight, bias = operands(2, 8, inner, 5)
    neighbours, context_weight, _ = operands(2, 8, around, 5)
    inputs = (graph, neighbours, weight, context_weight, bias)
    both = [reference.align(graph, inner), reference.align(neighbours.flip(2), around)]
    concatenated = torch.cat([x.flatten(2) for x in both], dim=2).transpose(1, 2)
    kernel = torch.cat([weight.flatten(1), context_weight.flatten(1)], dim=1)
    expected = torch.nn.functional.conv1d(concatenated, kernel.unsqueeze(-1), bias)
    apart = align_linear(graph, inner, weight, bias) + align_linear(neighbours.flip(2), around, context_weight)
    torch.testing.assert_close(apart, expected, rtol=0, atol=1e-12)
    out = align_linear_sum([(graph, inner, weight), (neighbours.flip(2), around, context_weight)], bias)
    assert out.transpose(1, 2).is_contiguous()
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-12)
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    for ours, theirs in zip(
        torch.autograd.grad(out, inputs, grad), torch.autograd.grad(expected, inputs, grad), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-11)


@pytest.mark.parametrize("batch", [0, 1, 3])
def test_three_terms_of_other_rules_and_widths(batch: int) -> None:
    grids = (proposal_grid(5, 4, 3), boundary_matching_grid(5, 4, 2), proposal_grid(5, 4, 1, expand=0.0))
    inputs = []
    for channels, grid in zip((2, 7, 4), grids, strict=True):
        inputs += operands(batch, channels, grid, 6)[:2]
    bias = normal(6).requires_grad_()
    out = align_linear_sum([(inputs[2 * k], grids[k], inputs[2 * k + 1]) for k in range(3)], bias)
    expected = bias.unsqueeze(1) + sum(
        align_linear_reference(inputs[2 * k], grids[k], inputs[2 * k + 1]) for k in range(3)
    )
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-12)
    grad = normal(*out.shape, seed=1)
    for ours, theirs in zip(
        torch.autograd.grad(out, [*inputs, bias], grad),
        torch.autograd.grad(expected, [*inputs, bias], grad),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-11)


def test_joined_weights_are_cached() -> None:
    inner, around = proposal_grid(6, 6, 32), proposal_grid(6, 6, 4)
    assert weights_of((inner,)) is inner.weights
    joined = weights_of((inner, around))
    assert weights_of((inner, around)) is joined is not weights_of((around, inner))
    assert joined.on(torch.device("cpu"))[0].values is joined.on(torch.device("cpu"))[0].values


@pytest.mark.parametrize("autocast", [False, True], ids=["plain", "autocast"])
def test_inputs_alone_are_saved(autocast: bool) -> None:
    """What autocast makes of them is made again in backward."""
    grids = (proposal_grid(9, 9, 4), proposal_grid(9, 9, 2))
    terms = [(*operands(2, 8, grid, 16, torch.float32)[:2], grid) for grid in grids]
    bias = normal(16, dtype=torch.float32).requires_grad_()
    saved: list[Tensor] = []
    with (
        torch.autocast("cpu", torch.bfloat16, enabled=autocast),
        torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x),
    ):
        out = align_linear_sum([(features, grid, weight) for features, weight, grid in terms], bias)
    assert out.dtype == (torch.bfloat16 if autocast else torch.float32)
    assert [x.data_ptr() for x in saved] == [x.data_ptr() for term in terms for x in term[:2]]


def test_a_snippet_outside_of_every_sample_has_no_influence() -> None:
    grid = proposal_grid(8, 2, 2)
    features, weight, bias = (x.detach() for x in operands(1, 3, grid, 4))
    expected = align_linear(features, grid, weight, bias)
    features[:, :, 7] = math.nan
    far = (grid.rois[:, 1] < 6).nonzero().flatten()
    assert len(far) > 5
    assert torch.equal(align_linear(features, grid, weight, bias)[:, :, far], expected[:, :, far])


def bmn_mask(num_snippets: int, d: int, s: int, num_bins: int, num_samples: int, windows: str) -> list[list[float]]:
    """Sampling weights (bin, snippet) of one cell in Python's own numbers, by the steps of BMN's published code."""
    if windows == "released":
        first, last = s, s + d + 1
        center = last - first + 1
        start, end = first - center * 0.5, last + center * 0.5
        step = (end - start) / (num_bins * num_samples - 1.0)
        positions = [start + step * j for j in range(num_bins * num_samples)]
    else:
        start, end = s - 0.5 * (d + 1), s + d + 0.5 * (d + 1)
        positions = [start + (end - start) * j / (num_bins * num_samples - 1) for j in range(num_bins * num_samples)]
    mask = []
    for r in range(num_bins):
        weights = [0.0] * num_snippets
        for position in positions[r * num_samples : (r + 1) * num_samples]:
            fraction, lower = math.modf(position)
            upper = math.ceil(position)
            if 0 <= int(lower) <= num_snippets - 1:
                weights[int(lower)] += 1 - fraction
            if 0 <= upper <= num_snippets - 1:
                weights[upper] += fraction
        mask.append([weight / num_samples for weight in weights])
    return mask


@pytest.mark.parametrize(
    ("num_snippets", "max_duration", "num_bins", "num_samples"),
    [(7, 7, 4, 3), (6, 2, 32, 3), (1, 1, 2, 1), (5, 9, 3, 2), (4, 4, 1, 5)],
)
@pytest.mark.parametrize("windows", ["paper", "released"])
def test_boundary_matching_weights(
    num_snippets: int, max_duration: int, num_bins: int, num_samples: int, windows: Windows
) -> None:
    grid = boundary_matching_grid(num_snippets, max_duration, num_bins, num_samples, windows)
    assert torch.equal(grid.cells, proposal_grid(num_snippets, max_duration, 1).cells)
    wider = torch.tensor([-0.5, 1.5] if windows == "released" else [0.0, 0.0])
    assert torch.equal(grid.rois, proposal_grid(num_snippets, max_duration, 1).rois + wider)
    expected = torch.tensor(
        [bmn_mask(num_snippets, d, s, num_bins, num_samples, windows) for d, s in grid.cells.tolist()],
        dtype=torch.float64,
    ).transpose(1, 2)
    torch.testing.assert_close(reference.boundary_matching_weights(grid), expected, rtol=0, atol=1e-14)
    matrix, transposed = grid.matrices(torch.device("cpu"), torch.float64)
    ours = dense_of(*matrix, num_snippets * num_bins)
    torch.testing.assert_close(ours.view(expected.shape), expected, rtol=0, atol=1e-14)
    assert torch.equal(dense_of(*transposed, grid.num_cells), ours.t())
    assert (matrix.values != 0).all()


def test_boundary_matching_by_hand() -> None:
    # Two snippets, cell (0, 0): -0.5 to 0.5 in two bins of one sample: the first comes to snippet 0, the second is half
    # of each. Cell (0, 1): 0.5 and 1.5, of which the second has half of snippet 1 and half of nothing. Cell (1, 0): -1,
    # which counts for nothing, and 2, whose weight has faded to nothing.
    grid = boundary_matching_grid(2, 2, 2, 1)
    weights = reference.boundary_matching_weights(grid)
    assert weights.tolist() == [[[1, 0.5], [0, 0.5]], [[0.5, 0], [0.5, 0.5]], [[0, 0], [0, 0]]]
    assert boundary_matching_grid(2, 2, 2, 1) is grid
    assert grid.num_weights == 6


def test_boundary_matching_layer_and_its_convolution() -> None:
    grid = boundary_matching_grid(9, 5)
    assert (grid.num_bins, grid.num_samples) == (32, 3)
    inputs = operands(2, 4, grid, 3)
    out, expected = align_linear(inputs[0], grid, *inputs[1:]), align_linear_reference(inputs[0], grid, *inputs[1:])
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-12)
    grad = normal(*out.shape, seed=1)
    for ours, theirs in zip(
        torch.autograd.grad(out, inputs, grad), torch.autograd.grad(expected, inputs, grad), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-11)


def test_gradcheck() -> None:
    grid = proposal_grid(4, 3, 3)
    features, weight, bias = operands(2, 3, grid, 2)
    assert torch.autograd.gradcheck(
        lambda *tensors: align_linear(tensors[0], grid, *tensors[1:]), (features, weight, bias)
    )
    assert torch.autograd.gradcheck(lambda *tensors: align_linear(tensors[0], grid, tensors[1]), (features, weight))


@pytest.mark.parametrize("needed", [(0,), (1,), (2,), (0, 2)], ids=str)
def test_only_the_gradients_asked_for(needed: tuple[int, ...]) -> None:
    grid = proposal_grid(5, 5, 4)
    inputs = [x.detach().requires_grad_(index in needed) for index, x in enumerate(operands(2, 3, grid, 4))]
    expected = align_linear_reference(inputs[0], grid, *inputs[1:]).square().sum()
    loss = align_linear(inputs[0], grid, *inputs[1:]).square().sum()
    wanted = [inputs[index] for index in needed]
    for ours, theirs in zip(torch.autograd.grad(loss, wanted), torch.autograd.grad(expected, wanted), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-10)


def test_strided_inputs() -> None:
    grid = proposal_grid(6, 6, 4)
    features, weight, bias = (x.detach() for x in operands(2, 3, grid, 5))
    expected = align_linear(features, grid, weight, bias)
    cbo = weight.permute(1, 2, 0).contiguous().permute(2, 0, 1)
    every_other = torch.stack([features, features + 1], dim=-1).flatten(2)[:, :, ::2]
    for x in (
        features.transpose(1, 2).contiguous().transpose(1, 2),
        every_other,
        features.permute(2, 1, 0).contiguous().permute(2, 1, 0),
    ):
        for w in (weight, cbo, weight.flip(0).flip(0).transpose(0, 1).contiguous().transpose(0, 1)):
            torch.testing.assert_close(align_linear(x, grid, w, bias), expected, rtol=0, atol=1e-13)
    # The gradient arrives strided too: a sum over one output hands back an expanded zero-stride tensor.
    inputs = operands(2, 3, grid, 5)
    (expanded,) = torch.autograd.grad(align_linear(inputs[0], grid, *inputs[1:]).sum(), inputs[:1])
    (expected_grad,) = torch.autograd.grad(align_linear_reference(inputs[0], grid, *inputs[1:]).sum(), inputs[:1])
    torch.testing.assert_close(expanded, expected_grad, rtol=0, atol=1e-11)


def test_layout_serves_the_convolution_that_follows() -> None:
    grid = proposal_grid(6, 6, 4)
    features, weight, bias = operands(2, 3, grid, 5)
    assert align_linear(features, grid, weight, bias).transpose(1, 2).is_contiguous()


def test_backward_is_bitwise_repeatable() -> None:
    grid = proposal_grid(25, 25, 4)
    inputs = operands(2, 16, grid, 8, torch.float32)

    def gradients() -> tuple[Tensor, ...]:
        return torch.autograd.grad(align_linear(inputs[0], grid, *inputs[1:]).square().sum(), inputs)

    assert all(torch.equal(first, second) for first, second in zip(gradients(), gradients(), strict=True))


@pytest.mark.parametrize("mode", ["float32", "bfloat16", "autocast"])
def test_no_less_exact_than_plain_pytorch(mode: str) -> None:
    grid = proposal_grid(25, 25, 32)
    dtype = torch.bfloat16 if mode == "bfloat16" else torch.float32
    inputs = operands(2, 64, grid, 16, dtype)
    exact_inputs = [x.detach().double().requires_grad_() for x in inputs]
    exact_out = align_linear_reference(exact_inputs[0], grid, *exact_inputs[1:])
    grad = torch.randn(exact_out.shape, generator=torch.Generator().manual_seed(1)).to(torch.bfloat16)
    exact = (exact_out, *torch.autograd.grad(exact_out, exact_inputs, grad.double()))

    results = []
    for function in (align_linear, align_linear_reference):
        with torch.autocast("cpu", torch.bfloat16, enabled=mode == "autocast"):
            out = function(inputs[0], grid, *inputs[1:])
        assert function is align_linear_reference or out.dtype == (dtype if mode != "autocast" else torch.bfloat16)
        gradients = torch.autograd.grad(out, inputs, grad.to(out.dtype))
        assert [x.dtype for x in gradients] == [dtype] * 3
        results.append((out, *gradients))
    for name, ours, plain, truth in zip(("out", "features", "weight", "bias"), *results, exact, strict=True):
        error, allowed = ((x.double() - truth).norm().item() for x in (ours, plain))
        assert error <= 2 * allowed, f"{name}: error {error:.3e}, plain PyTorch {allowed:.3e}"


def test_autocast_leaves_float64_alone() -> None:
    grid = proposal_grid(5, 5, 4)
    features, weight, bias = operands(1, 3, grid, 4)
    with torch.autocast("cpu", torch.bfloat16):
        out = align_linear(features, grid, weight, bias)
    assert torch.equal(out, align_linear(features, grid, weight, bias))


def test_a_grid_first_used_in_inference_mode_still_trains() -> None:
    with torch.inference_mode():
        grid = proposal_grid(9, 8, 3)
        features, weight, bias = operands(1, 3, grid, 4, torch.float32)
        align_linear(features, grid, weight, bias)
    assert not grid.cells.is_inference() and not grid.rois.is_inference()
    for matrix in grid.matrices(torch.device("cpu")):
        assert not any(part.is_inference() for part in matrix)
    inputs = operands(1, 3, grid, 4)
    torch.autograd.grad(align_linear(inputs[0], grid, *inputs[1:]).sum(), inputs)


def test_weights_of_a_cell_inside_the_clip_sum_to_one_in_each_bin() -> None:
    grid = roi_grid(torch.tensor([[0.0, 9.0], [-8.0, 30.0]]), 10, 4)
    (offsets, columns, values), _ = grid.matrices(torch.device("cpu"), torch.float64)
    sums = torch.zeros(4, dtype=torch.float64).index_add_(0, columns[: offsets[1]].long() % 4, values[: offsets[1]])
    torch.testing.assert_close(sums, torch.ones(4, dtype=torch.float64))
    assert values[offsets[1] :].sum().item() < 4


GRID = proposal_grid(5, 5, 4)


@pytest.mark.parametrize(
    ("features", "weight", "bias", "message"),
    [
        (torch.zeros(1, 5), torch.zeros(2, 3, 4), None, "features must be"),
        (torch.zeros(1, 3, 5, dtype=torch.int64), torch.zeros(2, 3, 4), None, "features must be"),
        (torch.zeros(1, 3, 6), torch.zeros(2, 3, 4), None, "features have 6 snippets, the grid 5"),
        (torch.zeros(1, 3, 5), torch.zeros(2, 3, 5), None, r"weight must be \(O, 3, 4\)"),
        (torch.zeros(1, 3, 5), torch.zeros(2, 4, 4), None, r"weight must be \(O, 3, 4\)"),
        (torch.zeros(1, 3, 5), torch.zeros(2, 3, 4), torch.zeros(3), r"bias must be \(2,\)"),
        (torch.zeros(1, 3, 5), torch.zeros(2, 3, 4).double(), None, "autocast"),
        (torch.zeros(1, 3, 5), torch.zeros(2, 3, 4, device="meta"), None, "on the device of features"),
    ],
)
def test_refuses(features: Tensor, weight: Tensor, bias: Tensor | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        align_linear(features, GRID, weight, bias)


@pytest.mark.parametrize(
    ("terms", "message"),
    [
        ([], "terms must not be empty"),
        ([(1, 3, GRID, 2), (2, 3, GRID, 2)], "batch and outputs, got 1 and 2, then 2 and 2"),
        ([(1, 3, GRID, 2), (1, 3, GRID, 4)], "batch and outputs, got 1 and 2, then 1 and 4"),
        ([(1, 3, GRID, 2), (1, 3, proposal_grid(5, 4, 4), 2)], "snippets and cells, got 5 and 15, then 5 and 14"),
        ([(1, 3, GRID, 2), (1, 3, proposal_grid(6, 5, 4), 2)], "snippets and cells, got 5 and 15, then 6 and 20"),
    ],
)
def test_the_sum_refuses(terms: list[tuple[int, int, SamplingGrid, int]], message: str) -> None:
    with pytest.raises(ValueError, match=f"align_linear_sum: .*{message}"):
        align_linear_sum(
            [
                (torch.zeros(batch, channels, grid.num_snippets), grid, torch.zeros(outputs, channels, grid.num_bins))
                for batch, channels, grid, outputs in terms
            ]
        )
    features, weight = torch.zeros(1, 3, 5), torch.zeros(2, 3, 4)
    with pytest.raises(ValueError, match="convert them or use autocast"):
        align_linear_sum([(features, GRID, weight), (features.half(), GRID, weight.half())])


def test_grids_refuse() -> None:
    with pytest.raises(ValueError, match="num_snippets"):
        proposal_grid(0, 1, 4)
    with pytest.raises(ValueError, match="max_duration"):
        proposal_grid(4, 0, 4)
    with pytest.raises(ValueError, match="num_bins"):
        proposal_grid(4, 4, 0)
    with pytest.raises(ValueError, match="expand"):
        proposal_grid(4, 4, 4, expand=-1.0)
    for arguments in ((0, 4), (4, 0), (4, 4, 0), (4, 4, 4, 0)):
        with pytest.raises(ValueError, match=r"must be >= 1|num_snippets >= 1"):
            boundary_matching_grid(*arguments)
    with pytest.raises(ValueError, match='windows must be "paper" or "released", got "other"'):
        boundary_matching_grid(4, 4, windows="other")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="float32"):
        roi_grid(torch.zeros(3, 2, dtype=torch.float16), 4, 4)
    with pytest.raises(ValueError, match="finite"):
        roi_grid(torch.full((1, 2), torch.nan), 4, 4)
    with pytest.raises(ValueError, match="dtype"):
        GRID.matrices(torch.device("cpu"), torch.bfloat16)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_on_the_gpu_at_a_head_shape(dtype: torch.dtype) -> None:
    assert library.forms["cuda"]["gather_rows"].startswith("Triton")
    grids = (proposal_grid(100, 100, 32), proposal_grid(100, 100, 4))
    inputs = [x.detach().cuda().requires_grad_() for grid in grids for x in operands(2, 64, grid, 512, dtype)[:2]]
    terms = [(inputs[0], grids[0], inputs[1]), (inputs[2], grids[1], inputs[3])]
    out = align_linear_sum(terms)
    grad = normal(*out.shape, dtype=dtype, seed=1).cuda()
    first, second = (torch.autograd.grad(out, inputs, grad, retain_graph=True) for _ in range(2))
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))
    exact = [x.detach().double().requires_grad_() for x in inputs]
    exact_out = align_linear_sum([(exact[0], grids[0], exact[1]), (exact[2], grids[1], exact[3])])
    exact_gradients = torch.autograd.grad(exact_out, exact, grad.double())
    results = list(zip((out, *first), (exact_out, *exact_gradients), strict=True))
    allowed = [4 * torch.finfo(dtype).eps * truth.norm() for _, truth in results]
    if dtype == torch.float32:
        # Those are of two roundings: of Z, or its gradient, and of the result. In float32 the sums round as well, at
        # each of some thousand entries of a row in turn, and in half precision they are kept in float32.
        constants = [x.detach() for x in inputs]
        plain = in_plain_pytorch(constants[::2], grids, constants[1::2], grad)
        errors = [2 * (x.double() - truth).norm() for x, (_, truth) in zip(plain, results, strict=True)]
        allowed = [max(pair) for pair in zip(allowed, errors, strict=True)]
    for (ours, truth), bound in zip(results, allowed, strict=True):
        assert (ours.double() - truth).norm() <= bound


def in_plain_pytorch(
    features: Sequence[Tensor], grids: tuple[SamplingGrid, ...], weights: Sequence[Tensor], grad: Tensor
) -> list[Tensor]:
    """The result of align_linear_sum and its gradients, of each term's features and weight: the same computation, with
    PyTorch's matrix products, and its embedding_bag for the sparse sums, whose order is that of every form.
    """
    matrix, transposed = weights_of(grids).on(grad.device, grad.dtype)
    projected = torch.cat([torch.einsum("bct,ocr->btro", x, w) for x, w in zip(features, weights, strict=True)], dim=2)
    out = reference.gather_rows(projected.flatten(1, 2), *matrix, None, 1).transpose(1, 2)
    grad_projected = reference.gather_rows(grad.transpose(1, 2), *transposed, None, 1).view_as(projected)
    parts = grad_projected.split([grid.num_bins for grid in grids], dim=2)
    gradients = []
    for x, w, part in zip(features, weights, parts, strict=True):
        gradients += [torch.einsum("btro,ocr->bct", part, w), torch.einsum("btro,bct->ocr", part, x)]
    return [out, *gradients]


def test_plain_pytorch_computes_the_same_layer() -> None:
    grids = (proposal_grid(6, 6, 4), proposal_grid(6, 6, 3))
    inputs = [x for grid in grids for x in operands(2, 5, grid, 7)[:2]]
    out = align_linear_sum([(inputs[0], grids[0], inputs[1]), (inputs[2], grids[1], inputs[3])])
    grad = normal(*out.shape, seed=1)
    constants = [x.detach() for x in inputs]
    plain = in_plain_pytorch(constants[::2], grids, constants[1::2], grad)
    for ours, theirs in zip((out, *torch.autograd.grad(out, inputs, grad)), plain, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-11)

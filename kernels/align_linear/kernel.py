"""Triton form of gather_rows: a program has some rows of the result and a block of their outputs in registers, and goes
through the entries of the rows together, so that what neighbouring rows read of ``dense`` comes from the L1 cache.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..launch import Launch, Launcher

ROWS = 8  # rows of a program
BLOCK = 128  # outputs of a program
UNROLL = 4  # entries of a row whose loads are under way at once


@triton.jit
def gather_rows_kernel(
    dense,
    offsets,
    columns,
    values,
    bias,
    out,
    num_tiles,
    tiles_of_step,
    rows_of_step,
    row_step,
    num_columns,
    num_outputs,
    SUM: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    UNROLL: tl.constexpr,
):
    batch = (tl.program_id(0) // num_tiles).to(tl.int64)
    tile = tl.program_id(0) % num_tiles
    nth = tile % tiles_of_step * ROWS + tl.arange(0, ROWS)
    there = nth < rows_of_step
    row = nth * row_step + tile // tiles_of_step
    output = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    block = dense + batch * num_columns * num_outputs + output[None, :]

    entry = tl.load(offsets + row, mask=there, other=0)
    end = tl.load(offsets + row + 1, mask=there, other=0)
    sums = tl.zeros((ROWS, BLOCK), SUM)
    for _ in range(0, tl.max(end - entry), UNROLL):
        for _ in tl.static_range(UNROLL):
            column = tl.load(columns + entry, mask=entry < end, other=0).to(tl.int64)
            value = tl.load(values + entry, mask=entry < end, other=0.0)
            limit = tl.where(entry < end, num_outputs, 0)
            x = tl.load(block + column[:, None] * num_outputs, mask=output[None, :] < limit[:, None], other=0.0)
            sums += value[:, None] * x.to(SUM)
            entry += 1
    if bias is not None:
        sums += tl.load(bias + output, mask=output < num_outputs, other=0.0)[None, :]
    limit = tl.where(there, num_outputs, 0)
    to = out + (batch * rows_of_step * row_step + row)[:, None] * num_outputs + output[None, :]
    tl.store(to, sums.to(out.dtype.element_ty), mask=output[None, :] < limit[:, None])


def gather_rows_launch(
    dense: Tensor,
    offsets: Tensor,
    columns: Tensor,
    values: Tensor,
    bias: Tensor | None,
    row_step: int,
    out: Tensor,
) -> Launch:
    """All contiguous; ``row_step`` divides the number of rows."""
    batch, num_columns, num_outputs = dense.shape
    rows_of_step = out.shape[1] // row_step
    tiles_of_step = triton.cdiv(rows_of_step, ROWS)
    num_tiles = tiles_of_step * row_step
    return Launch(
        gather_rows_kernel,
        (batch * num_tiles, triton.cdiv(num_outputs, BLOCK)),
        {
            "dense": dense,
            "offsets": offsets,
            "columns": columns,
            "values": values,
            "bias": bias,
            "out": out,
            "num_tiles": num_tiles,
            "tiles_of_step": tiles_of_step,
            "rows_of_step": rows_of_step,
            "row_step": row_step,
            "num_columns": num_columns,
            "num_outputs": num_outputs,
        },
        {
            "SUM": tl.float64 if dense.dtype == torch.float64 else tl.float32,
            "ROWS": ROWS,
            "BLOCK": BLOCK,
            "UNROLL": UNROLL,
        },
    )


_gather = Launcher()


def gather_rows(
    dense: Tensor, offsets: Tensor, columns: Tensor, values: Tensor, bias: Tensor | None, row_step: int
) -> Tensor:
    dense = dense.contiguous()
    batch, _, num_outputs = dense.shape
    out = dense.new_empty(batch, offsets.shape[0] - 1, num_outputs)
    tensors, key = (dense, offsets, columns, values, bias, out), (row_step, dense.dtype, dense.shape, out.shape)
    if _gather.repeat(tensors, key) or not out.numel():
        return out
    offsets, columns, values = (x.contiguous() for x in (offsets, columns, values))
    bias = None if bias is None else bias.contiguous()
    _gather.run(gather_rows_launch(dense, offsets, columns, values, bias, row_step, out), tensors, key)
    return out


def examples() -> dict[str, Launch]:
    """G-TAD's head, 100 snippets, 2 videos: 32 + 4 bins to 512 outputs, and a class score of each proposal."""
    launches = {}

    def empty(*shape: int, dtype: torch.dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    num_cells, num_entries = 5050, 773596
    columns = empty(num_entries, dtype=torch.int32)
    values = empty(num_entries, dtype=torch.float32)
    half, brain, single = torch.float16, torch.bfloat16, torch.float32
    cases = [(dtype, 36, 512) for dtype in (half, brain, single)] + [(dtype, 16, 201) for dtype in (brain, single)]
    for dtype, num_bins, num_outputs in cases:
        cells = empty(2, num_cells, num_outputs, dtype=dtype)
        snippets = empty(2, 100 * num_bins, num_outputs, dtype=dtype)
        bias = empty(num_outputs, dtype=torch.float32)
        of_cells = empty(num_cells + 1, dtype=torch.int32)
        of_snippets = empty(100 * num_bins + 1, dtype=torch.int32)
        name = {half: "fp16", brain: "bf16", single: "fp32"}[dtype]
        shape = f"{name} L=100 {num_bins} bins {num_outputs} outputs"
        launches[f"gather_rows {shape}"] = gather_rows_launch(snippets, of_cells, columns, values, bias, 1, cells)
        launches[f"gather_rows transposed {shape}"] = gather_rows_launch(
            cells, of_snippets, columns, values, None, num_bins, snippets
        )
    return launches

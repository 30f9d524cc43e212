"""What commands that compare forms do with their rows: append each at once, then the table, then what changed."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence

from bench.against import comparison
from bench.gate import GateError
from bench.rows import Row, append_row


def record(
    bench: str, measured: Iterable[Row], start: Row, args: argparse.Namespace, old: Sequence[Row],
    table: Callable[[Sequence[Row]], str], key: Sequence[str], values: Mapping[str, tuple[str, ...]],
    line: Callable[[Row], str] | None = None,
) -> int:  # fmt: skip
    """Take the rows as they are measured, so that a cut-off loses none; 1 when a form did not pass the gate.

    `start`: what all rows share. `args`: `results`, the file to append to, and `against`. `old`, `key`, `values`: as
    `comparison` has them. `line`: a row in words, where the measurement itself says nothing.
    """
    rows: list[Row] = []
    try:
        for row in measured:
            append_row(args.results, {"bench": bench} | row | start)
            rows.append(row | start)
            if line is not None:
                print(line(row), flush=True)
    except GateError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    finally:
        print(f"\n{table(rows)}\n{len(rows)} rows appended to {args.results}")
        if args.against:
            print(comparison(rows, old, key, values))
    return 0

"""What commands that compare forms share: their options, and what becomes of their rows: each is appended at once, then
come the table and what changed.
"""

from __future__ import annotations

import sys
from argparse import ArgumentParser as Parser
from argparse import Namespace
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

from bench.tools.against import add_against, comparison
from bench.tools.gate import GateError
from bench.tools.rows import RESULTS, Row, append_row
from bench.tools.table import Section, screen


def options(bench: str, description: str | None, quick: str, rounds: int | None, *, devices: bool = True) -> Parser:
    """What such commands share; `rounds`: the default, None where it is not asked for."""
    parser = Parser(
        prog=f"python -m bench {bench}", usage=f"python -m bench {bench} [options]", description=description
    )
    if devices:
        parser.add_argument(
            "--device", choices=("auto", "cpu", "cuda"), default="auto", help="default: a GPU if there is one"
        )
    parser.add_argument("--threads", type=int, default=1, help="CPU threads, decoders' too (default: 1)")
    if rounds is not None:
        parser.add_argument("--rounds", type=int, default=rounds, help=f"of each comparison (default: {rounds})")
    parser.add_argument("--quick", action="store_true", help=quick)
    parser.add_argument("--results", type=Path, default=RESULTS / f"{bench}.jsonl", help="file of rows to append to")
    add_against(parser)
    return parser


def record(
    bench: str, measured: Iterable[Row], start: Row, args: Namespace, old: Sequence[Row],
    table: Callable[[Sequence[Row]], list[Section]], key: Sequence[str], values: Mapping[str, tuple[str, ...]],
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
        print(f"\n{screen(table(rows))}\n{len(rows)} rows appended to {args.results}")
        if args.against:
            print(comparison(rows, old, key, values))
    return 0


def record_each(
    cases: Iterable[tuple[Row, Callable[[], Row]]], start: Row, results: Path, line: Callable[[Row], str]
) -> tuple[list[Row], bool]:
    """Rows of trainings, each of what names it and what is measured of it, appended at once; and whether one failed
    (RuntimeError): the others may go better. Below its line come the violations of the budget that a row describes.
    """
    rows: list[Row] = []
    failed = False
    for named, measure in cases:
        try:
            row = named | measure() | start
        except RuntimeError as error:
            print(f"error: {error}", file=sys.stderr, flush=True)
            failed = True
            continue
        append_row(results, row)
        rows.append(row)
        print("\n    ".join([line(row), *row["over"]]), flush=True)
    return rows, failed

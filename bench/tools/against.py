"""New rows beside old ones: `--against FILE`, for every command that measures."""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from bench.tools.rows import Row, read_rows
from bench.tools.table import aligned
from lofi_fast.errors import InputError


def add_against(parser: argparse.ArgumentParser) -> None:
    """The flag."""
    parser.add_argument(
        "--against", type=Path, metavar="FILE", help="print what changed since the newest row of each case in FILE"
    )


def read_against(path: Path | None) -> list[Row]:
    """Its rows; none without a path. To be read before measuring: the results may go to the same file."""
    if path is not None and not path.exists():
        raise InputError(f"--against {path}: there is no such file of rows")
    return [] if path is None else read_rows(path)


def comparison(
    new: Sequence[Row], old: Iterable[Row], key: Sequence[str], values: Mapping[str, tuple[str, ...]]
) -> str:
    """A line for each new row that has an old one alike in `key`, with new / old of each of the `values`.

    `values`: heading -> where in a row the number is. Of a list (median, p20, p80) the first counts. Old rows of
    another machine are named: such ratios say something of the machines too.
    """
    newest: dict[tuple[Any, ...], Row] = {}
    for row in sorted(old, key=lambda row: str(row["date"])):
        newest[tuple(row.get(name) for name in key)] = row
    lines: list[Sequence[str]] = [(*key, *values, "against")]
    for row in new:
        before = newest.get(tuple(row.get(name) for name in key))
        if before is None:
            continue
        ratios = [_ratio(_number(row, place), _number(before, place)) for place in values.values()]
        same = all(row.get(name) == before.get(name) for name in ("machine", "device"))
        where = "" if same else f", {before.get('device', before['machine'])}"
        named = [str(row.get(name, "")) for name in key]
        lines.append((*named, *ratios, f"{str(before['date'])[:10]} {str(before['commit'])[:7]}{where}"))
    if len(lines) == 1:
        return "new / old: no case in common"
    return f"new / old:\n{aligned(lines)}"


def _number(row: Row, place: Sequence[str]) -> float | None:
    value: Any = row
    for name in place:
        value = value.get(name) if isinstance(value, dict) else None
    if isinstance(value, list):
        value = value[0] if value else None
    return None if value is None else float(value)


def _ratio(new: float | None, old: float | None) -> str:
    return "" if new is None or not old else f"{new / old:.2f}x"

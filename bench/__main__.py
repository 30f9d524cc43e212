"""Measure, and make the README's tables: `python -m bench` says what there is."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from bench import job, tables
from bench.rows import RESULTS, ROOT, read_rows
from lofi_fast.errors import InputError

COMMANDS = {"job": job.main, "tables": tables.main}


def overview() -> str:
    """The commands, and the rows that were measured so far."""
    lines = [
        job.USAGE,
        "    train as a user would and append a row for each seed; --help lists the options",
        "python -m bench tables [--check]",
        "    make the README's tables from the rows",
        "",
    ]
    for path in sorted(RESULTS.glob("*.jsonl")):
        dates = [str(row["date"]) for row in read_rows(path)]
        lines.append(f"{path.relative_to(ROOT)}: {len(dates)} rows, the newest of {max(dates, default='never')}")
    if lines[-1] == "":
        lines.append(f"{RESULTS.relative_to(ROOT)}: nothing measured yet")
    return "\n".join(lines)


def main(argv: Sequence[str]) -> int:
    """0 when done, 1 for tables out of date, 2 for what the user can mend, or a failed training's status."""
    try:
        if not argv or argv[0] in ("-h", "--help"):
            print(overview())
            return 0
        if argv[0] not in COMMANDS:
            raise InputError(f"no measurement is called {argv[0]}; there are: {', '.join(COMMANDS)}")
        return COMMANDS[argv[0]](argv[1:])
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

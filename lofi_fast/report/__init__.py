"""The report of a run folder: what the folder says, what the page shows of it, its figures, and the page itself.

python -m lofi_fast.report runs/demo
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from lofi_fast.errors import InputError


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status (0, or 2 after an "error: ..." line)."""
    parser = argparse.ArgumentParser(
        prog="python -m lofi_fast.report", description="Write report.html and report.png of a run folder."
    )
    parser.add_argument("folder", type=Path, metavar="RUN_FOLDER", help="the --out of a run, finished or not")
    folder = parser.parse_args(argv).folder
    from lofi_fast.report.page import write_report  # --help and a typo are answered before it is imported

    try:
        print(write_report(folder))
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0

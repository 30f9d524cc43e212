"""The reports of run folders: what a folder says, what the page shows of it, its figures, the page itself, and a page
that compares several runs.

    lofi-fast report runs/demo
    lofi-fast report --compare runs/a runs/b
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from lofi_fast.command import parse, run
from lofi_fast.errors import InputError
from lofi_fast.settings import Setting

COMPARISON = "comparison.html"


@dataclass(frozen=True)
class ReportFlags:
    """The settings of the command."""

    runs: Annotated[tuple[str, ...], Setting("folders of runs, finished or not", "RUN", positional=True)]
    compare: Annotated[bool, Setting("one page of several runs: results, curves, and the settings that differ")] = False
    out: Annotated[
        Path | None, Setting("file of the page that compares", "FILE", unset=f"{COMPARISON} in this folder")
    ] = None


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status (0, or 2 after an "error: ..." line)."""
    return run(lambda: _command(argv))


def _command(argv: Sequence[str] | None) -> None:
    flags = parse(
        ReportFlags, argv, prog="lofi-fast report",
        description="Write report.html and report.png into run folders, or one page that compares runs.",
    )  # fmt: skip
    folders = [Path(name) for name in flags.runs]
    if flags.compare:
        from lofi_fast.report.compare import write_comparison  # --help and a typo are answered before it is imported

        print(write_comparison(folders, flags.out or Path(COMPARISON)))
        return
    if flags.out is not None:
        raise InputError("--out goes with --compare: a report is written into its run folder")
    from lofi_fast.report.page import write_report

    for folder in folders:
        print(write_report(folder))

"""The tables of both README.md and of docs/gain.md, from rows: what stands between `<!-- bench:NAME -->` and
`<!-- /bench -->`.
"""

from __future__ import annotations

import argparse
import importlib
import re
from collections.abc import Sequence
from hashlib import sha256
from pathlib import Path

from bench.tools import table
from bench.tools.rows import RESULTS, ROOT, Row, read_rows
from lofi_fast.errors import InputError

# Commands with a table; each has it from the rows in results/NAME.jsonl.
TABLES = (
    "job", "ops", "kernels", "memory", "step", "planner", "truth", "epochs", "tuners", "day", "optim", "overhead",
    "data", "eval", "gpu_planner", "fits", "plan", "scaling", "gpu", "tests", "launches", "faults", "recipes", "start",
    "published", "gain", "rungs", "stages", "detect", "pictures", "waits",
)  # fmt: skip
FIGURES = ("fits", "day", "gain", "pictures")  # commands that draw one too
PAGES = (ROOT / "README.md", ROOT / "bench" / "README.md", ROOT / "docs" / "gain.md")
SECTION = re.compile(r"(<!-- bench:(\w+) -->\n).*?(<!-- /bench -->)", re.DOTALL)


def main(argv: Sequence[str], pages: Sequence[Path] = PAGES, results: Path = RESULTS) -> int:
    """Bring the pages up to date; with --check only say whether they are (0) or not (1)."""
    parser = argparse.ArgumentParser(prog="python -m bench tables", description=__doc__)
    parser.add_argument("--check", action="store_true", help="change nothing; status 1 when a page is out of date")
    args = parser.parse_args(argv)
    texts = [_read(page) for page in pages]
    status = 0
    for name in TABLES:
        if read_rows(results / f"{name}.jsonl") and not any(f"<!-- bench:{name} -->" in text for text in texts):
            print(f"no page has a place for the rows of {name}.jsonl: add <!-- bench:{name} --> and <!-- /bench -->")
            status = int(args.check)
    for name in FIGURES:
        command = importlib.import_module(f"bench.commands.{name}")
        figure, digest = results / f"{name}.svg", _digest(results, command.DRAWN_FROM)
        if not (results / f"{name}.jsonl").exists() or _drawn_from(figure) == digest:
            continue
        if args.check:
            print(f"{_name(figure)} is out of date: run python -m bench tables")
            status = 1
        elif drawn := command.figure(results):
            figure.write_text(drawn + digest, encoding="utf-8")
            print(f"{_name(figure)} drawn")
    for page, before in zip(pages, texts, strict=True):
        after = filled(before, results, _name(page))
        if before == after:
            print(f"{_name(page)} is up to date")
        elif args.check:
            print(f"{_name(page)} is out of date: run python -m bench tables")
            status = 1
        else:
            page.write_text(after, encoding="utf-8")
            print(f"{_name(page)} rewritten")
    return status


def _name(path: Path) -> str:
    """From the repository's root, where it lies below it."""
    return str(path.relative_to(ROOT) if path.is_relative_to(ROOT) else path)


def _drawn_from(figure: Path) -> str:
    """The digest at the figure's end; empty without a figure."""
    return figure.read_text(encoding="utf-8").splitlines(keepends=True)[-1] if figure.exists() else ""


def _read(page: Path) -> str:
    try:
        return page.read_text(encoding="utf-8")
    except OSError as error:
        raise InputError(f"{_name(page)}: {error.strerror}; it holds the markers that tables go between") from error


def filled(text: str, results: Path, page: str) -> str:
    """`text` of a page with every marked section replaced by the table of the rows in `results`/NAME.jsonl."""
    if text.count("<!-- bench:") != len(SECTION.findall(text)) or not SECTION.search(text):
        raise InputError(f"{page}: each table needs a line <!-- bench:NAME --> and, below it, <!-- /bench -->")

    def section(match: re.Match[str]) -> str:
        if match[2] not in TABLES:
            raise InputError(f"{page}: no table is called {match[2]}; there are: {', '.join(TABLES)}")
        return match[1] + section_of(match[2], read_rows(results / f"{match[2]}.jsonl")) + match[3]

    return SECTION.sub(section, text)


def section_of(name: str, rows: Sequence[Row]) -> str:
    """What a page shows of a command's rows. Small cases (`quick`) and incomplete runs (`thin`) say nothing there."""
    shown = [row for row in rows if not row.get("quick") and not row.get("thin")]
    return table.page(importlib.import_module(f"bench.commands.{name}").table(shown))


def _digest(results: Path, names: Sequence[str]) -> str:
    """Of the files of rows that a figure is drawn from: figures differ between versions of matplotlib, rows do not."""
    digest = sha256()
    for name in names:
        path = results / f"{name}.jsonl"
        digest.update(path.read_bytes() if path.exists() else b"")
    return f"<!-- rows {digest.hexdigest()[:16]} -->\n"

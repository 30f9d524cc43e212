"""The README's tables, made from rows: what stands between `<!-- bench:NAME -->` and `<!-- /bench -->`."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from statistics import fmean

from bench.rows import RESULTS, ROOT, Row, read_rows
from lofi_fast.errors import InputError

MISSING = "not measured"
EXPECTED = (("demo", "true"), ("demo", "rolled"), ("ceiling", "true"))  # these have a line even without a row
TIOUS = ("0.3", "0.5", "0.7")
SAME = ("commit", "dirty", "machine", "device", "precision", "settings")  # what seeds must share to be averaged
HEADER = (
    "what", "seeds", *(f"mAP@{tiou} (%)" for tiou in TIOUS), "average mAP (%)",
    "training (min)", "peak memory", "machine", "date, commit",
)  # fmt: skip
SECTION = re.compile(r"(<!-- bench:(\w+) -->\n).*?(<!-- /bench -->)", re.DOTALL)


def main(argv: Sequence[str], readme: Path = ROOT / "README.md", results: Path = RESULTS) -> int:
    """Bring the README up to date; with --check only say whether it is (0) or not (1)."""
    parser = argparse.ArgumentParser(prog="python -m bench tables", description=__doc__)
    parser.add_argument("--check", action="store_true", help="change nothing; status 1 when README.md is out of date")
    args = parser.parse_args(argv)
    try:
        before = readme.read_text(encoding="utf-8")
    except OSError as error:
        raise InputError(f"{readme.name}: {error.strerror}; it holds the markers that tables go between") from error
    after = filled(before, results)
    if before == after:
        print(f"{readme.name} is up to date")
        return 0
    if args.check:
        print(f"{readme.name} is out of date: run python -m bench tables")
        return 1
    readme.write_text(after, encoding="utf-8")
    print(f"{readme.name} rewritten")
    return 0


def filled(text: str, results: Path) -> str:
    """`text` with every marked section replaced by the table of the rows in `results`/NAME.jsonl."""
    if text.count("<!-- bench:") != len(SECTION.findall(text)) or not SECTION.search(text):
        raise InputError("README.md: each table needs a line <!-- bench:NAME --> and, below it, <!-- /bench -->")

    def section(match: re.Match[str]) -> str:
        if match[2] not in TABLES:
            raise InputError(f"README.md: no table is called {match[2]}; there are: {', '.join(TABLES)}")
        return match[1] + TABLES[match[2]](read_rows(results / f"{match[2]}.jsonl")) + match[3]

    return SECTION.sub(section, text)


def job_table(rows: Sequence[Row]) -> str:
    """One line for each (name, labels), from its newest measurement."""
    found = dict.fromkeys((row["name"], row["labels"]) for row in rows)
    lines = []
    for name, labels in dict.fromkeys((*EXPECTED, *sorted(found))):
        what = name if labels == "true" else f"{name}, rolled labels"
        newest = newest_measurement([row for row in rows if (row["name"], row["labels"]) == (name, labels)])
        lines.append((what, *(_cells(newest) if newest else [MISSING] * (len(HEADER) - 1))))
    rule = ["---"] * len(HEADER)
    return "".join(f"| {' | '.join(cells)} |\n" for cells in (HEADER, rule, *lines))


def newest_measurement(rows: Iterable[Row]) -> list[Row]:
    """The newest row and, of every other seed, the newest made by the same code with the same settings; by seed."""
    rows = sorted(rows, key=lambda row: str(row["date"]))
    seeds = {row["seed"]: row for row in rows if all(row[key] == rows[-1][key] for key in SAME)}
    return [seeds[seed] for seed in sorted(seeds)]


def _cells(rows: Sequence[Row]) -> list[str]:
    last = max(rows, key=lambda row: str(row["date"]))
    peaks = [row["peak"] for row in rows if row["peak"] is not None]
    machine = last["machine"] if last["device"].startswith("CPU,") else last["device"]
    return [
        ", ".join(str(row["seed"]) for row in rows),
        *(_mean(row["map_by_tiou"].get(tiou) for row in rows) for tiou in TIOUS),
        _mean(row["average_map"] for row in rows),
        _mean((row["training_seconds"] for row in rows), 1 / 60),
        f"{max(peaks) / 1e9:.2f} of {last['budget'] / 1e9:.2f} GB" if peaks else MISSING,
        f"{machine}, {last['precision'].split(' (')[0]}",
        f"{last['date'][:10]}, {last['commit'][:7]}{' with changes' if last['dirty'] else ''}",
    ]


def _mean(values: Iterable[float | None], scale: float = 100) -> str:
    """The mean, and the range when there are several; "not measured" when one is missing."""
    known: list[float] = []
    for value in values:
        if value is None:
            return MISSING
        known.append(scale * value)
    spread = f" ({min(known):.1f} to {max(known):.1f})" if len(known) > 1 else ""
    return f"{fmean(known):.1f}{spread}"


TABLES: dict[str, Callable[[Sequence[Row]], str]] = {"job": job_table}

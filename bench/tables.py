"""The README's tables, made from rows: what stands between `<!-- bench:NAME -->` and `<!-- /bench -->`."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

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
OPS_HEADER = (
    "operator", "shape", "dtype", "against", "forward", "forward + backward", "peak memory", "ours, of the copy roof",
)  # fmt: skip
KERNELS_HEADER = (
    "operator", "kernel", "layout", "launches", "registers", "spilled bytes", "shared bytes",
    "widest load / store (bits)",
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
    missing = [
        name for name in TABLES if read_rows(results / f"{name}.jsonl") and f"<!-- bench:{name} -->" not in after
    ]
    for name in missing:
        print(f"{readme.name} has no place for the rows of {name}.jsonl: add <!-- bench:{name} --> and <!-- /bench -->")
    if before == after:
        print(f"{readme.name} is up to date" if not missing else f"{readme.name}: its own tables are up to date")
        return 1 if args.check and missing else 0
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
    return _markdown(HEADER, lines)


def _markdown(header: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    return "".join(f"| {' | '.join(cells)} |\n" for cells in (header, ["---"] * len(header), *lines))


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


def ops_table(rows: Sequence[Row]) -> str:
    """For each device a table of what the other forms take as a multiple of ours, each case from its newest run."""
    rows = [row for row in rows if not row["quick"]]
    if not rows:
        return f"{MISSING}\n"
    newest: dict[tuple[Any, ...], str] = {}
    for row in rows:
        key = _case(row)
        newest[key] = max(str(row["date"]), newest.get(key, ""))
    rows = [row for row in rows if row["date"] == newest[_case(row)]]  # one run has one date
    parts = []
    for place in dict.fromkeys(map(_place, rows)):
        here = [row for row in rows if _place(row) == place]
        ours = {_case(row): row for row in here if row["ours"]}
        forms = ", ".join(dict.fromkeys(row["form"] for row in ours.values()))
        lines = [_compared(row, ours[_case(row)]) for row in here if not row["ours"]]
        parts.append(f"{_where(place)}; ours is {forms}; {_when(here)}:\n\n{_markdown(OPS_HEADER, lines)}")
    return "\n".join(parts)


def _case(row: Row) -> tuple[Any, ...]:
    return *_place(row), row["op"], row["shape"], row["dtype"]


def _place(row: Row) -> tuple[Any, ...]:
    return row["machine"], row["device"], row["threads"]


def _where(place: tuple[Any, ...]) -> str:
    machine, device, threads = place
    return device if not device.startswith("CPU,") else f"{machine}, {threads} thread{'s' * (threads > 1)}"


def _when(rows: Iterable[Row]) -> str:
    """The runs that rows come from: date and commit."""
    rows = sorted(rows, key=lambda row: str(row["date"]))
    return ", ".join(
        dict.fromkeys(
            f"{row['date'][:10]} {row['commit'][:7]}{' with changes' if row['dirty'] else ''}" for row in rows
        )
    )


def _compared(row: Row, ours: Row) -> list[str]:
    """A line: another form against ours in the same run."""
    passes = ("forward", "forward_backward")
    times = [f"{row[step]['times_ours'][0]:.1f}x" if row[step] else "" for step in passes]
    roofs = [
        f"{100 * ours[step]['of_roof']:.0f}%" for step in passes if ours[step] and ours[step]["of_roof"] is not None
    ]
    peaks = ""
    if row["peak"] is not None and ours["peak"] is not None:
        ratio = f"{row['peak'] / ours['peak']:.1f}x, " if ours["peak"] >= 2**20 else ""  # less is noise
        peaks = f"{ratio}{row['peak'] / 2**20:.0f} : {ours['peak'] / 2**20:.0f} MiB"
    return [row["op"], row["shape"], row["dtype"], row["form"], *times, peaks, " / ".join(roofs)]


def kernels_table(rows: Sequence[Row]) -> str:
    """One line for each kernel, over all its launches and targets in the operator's newest complete run."""
    rows = [row for row in rows if not row["thin"]]
    if not rows:
        return f"{MISSING}\n"
    newest = {row["op"]: "" for row in rows}
    for row in rows:
        newest[row["op"]] = max(str(row["date"]), newest[row["op"]])
    rows = [row for row in rows if row["date"] == newest[row["op"]]]
    groups: dict[tuple[str, str, bool], list[Row]] = {}
    for row in rows:
        groups.setdefault((row["op"], row["kernel"], row["streams"]), []).append(row)
    lines = []
    for (op, kernel, streams), group in groups.items():
        found = [target for row in group for target in row["targets"].values()]
        widest = [_range(max(map(int, target[way])) for target in found if target[way]) for way in ("loads", "stores")]
        lines.append((
            op, kernel, "channels-last, C % 64 = 0" if streams else "others",
            str(sum(len(row["launches"]) for row in group)), _range(target["registers"] for target in found),
            str(max(target["spilled"] for target in found)), _range(target["shared"] for target in found),
            " / ".join(widest),
        ))  # fmt: skip
    targets = dict.fromkeys(f"sm_{target}" for row in rows for target in row["targets"])
    versions = ", ".join(dict.fromkeys(f"Triton {row['versions']['triton']}" for row in rows))
    return f"{versions}; {', '.join(targets)}; {_when(rows)}:\n\n{_markdown(KERNELS_HEADER, lines)}"


def aligned(lines: Sequence[Sequence[str]], text: int) -> str:
    """Lines of cells as columns for a terminal: the first `text` of them flush left, the others flush right."""
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if column < text else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )


def _range(values: Iterable[int]) -> str:
    known = sorted(set(values))
    return " to ".join(str(value) for value in (known if len(known) < 2 else (known[0], known[-1]))) or "none"


TABLES: dict[str, Callable[[Sequence[Row]], str]] = {"job": job_table, "ops": ops_table, "kernels": kernels_table}

"""Tables made of rows: which rows count, where and when they were measured, and how a table reads.

A command describes its tables once (`Table`); `page` writes them as Markdown and `screen` as columns for a terminal.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from bench.tools.rows import Row

MISSING = "not measured"


@dataclass(frozen=True)
class Table:
    """`title`: the sentence above it; none where it is empty."""

    title: str
    header: Sequence[str]
    lines: Sequence[Sequence[str]]


@dataclass(frozen=True)
class Picture:
    """A picture that a page shows; `path` from the folder of that page."""

    caption: str
    path: str


Section = Table | Picture | str  # a string is a paragraph


def page(sections: Sequence[Section]) -> str:
    """The sections in Markdown, with a line's end behind the last; "not measured" where there are none."""
    return "\n".join(map(_on_a_page, sections or [MISSING]))


def screen(sections: Sequence[Section]) -> str:
    """The sections for a terminal."""
    return "\n\n".join(map(_on_a_screen, sections or [MISSING]))


def _on_a_page(section: Section) -> str:
    if isinstance(section, Picture):
        return f"![{section.caption}]({section.path})\n"
    if isinstance(section, str):
        return f"{section}\n"
    lines = (section.header, ["---"] * len(section.header), *section.lines)
    title = f"{section.title}\n\n" if section.title else ""
    return title + "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def _on_a_screen(section: Section) -> str:
    if isinstance(section, Picture):
        return f"{section.caption}: {section.path}"
    if isinstance(section, str):
        return section
    return "\n".join(filter(None, (section.title, aligned([section.header, *section.lines]))))


def aligned(lines: Sequence[Sequence[str]]) -> str:
    """Lines of cells as columns. The first line is the heading; a column of which every other cell begins with a digit,
    or is empty, is flush right.
    """
    columns = []
    for cells in zip(*lines, strict=True):
        width = max(map(len, cells))
        numbers = all(not cell or cell[0].isdigit() for cell in cells[1:])
        columns.append([cell.rjust(width) if numbers else cell.ljust(width) for cell in cells])
    return "\n".join("  ".join(cells).rstrip() for cells in zip(*columns, strict=True))


def newest(rows: Sequence[Row], names: Sequence[str], measured: str | None = None) -> list[Row]:
    """Of rows of one place that are alike in `names`, the newest; in the order that they were first measured in.

    `measured`: only rows that say so of themselves.
    """
    found: dict[tuple[Any, ...], Row] = {}
    for row in rows:
        if measured is not None and row["measured"] != measured:
            continue
        key = (*place(row), *(row[name] for name in names))
        if key not in found or row["date"] >= found[key]["date"]:
            found[key] = row
    return list(found.values())


def place(row: Row) -> tuple[Any, ...]:
    """Rows of different places are never compared."""
    return row["machine"], row["device"], row["threads"]


def by_place(rows: Sequence[Row]) -> list[tuple[str, list[Row]]]:
    """The rows of each place, named in words, in the order of its first row."""
    places = dict.fromkeys(map(place, rows))
    return [(_where(*found), [row for row in rows if place(row) == found]) for found in places]


def _where(machine: str, device: str, threads: int) -> str:
    """A GPU by its own name; a CPU by its machine's and how much of it was used."""
    return device if not device.startswith("CPU,") else f"{machine}, {threads} thread{'s' * (threads > 1)}"


def when(rows: Iterable[Row]) -> str:
    """The runs that rows come from: date and commit of each."""
    rows = sorted(rows, key=lambda row: str(row["date"]))
    return ", ".join(
        dict.fromkeys(
            f"{row['date'][:10]} {row['commit'][:7]}{' with changes' if row['dirty'] else ''}" for row in rows
        )
    )

"""A plain table: a first line with video,start,end,label[,subset][,duration], and a row for each segment.

Seconds, also with a decimal comma or as hh:mm:ss.ff. Subsets from the column, if there is one. Cells are separated by
what separates the first line: comma, semicolon, tab, bar, what "sep=" says, or else what csv.Sniffer finds. A row whose
start, end and label are all empty names a video without segments.
"""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Sequence
from pathlib import Path

from lofi_fast.data.formats.file import Gathered, LabelFile, Table, shown
from lofi_fast.data.labels import UNASSIGNED, Video, subset_of
from lofi_fast.detections import in_one_line
from lofi_fast.errors import InputError
from lofi_fast.files import write_bytes

NAME = "a table"
OPTIONS = frozenset[str]()
COLUMNS = ("video", "start", "end", "label")
_THOUSANDS = re.compile(r"[+-]?[1-9]\d{0,2}(?:,\d{3})+")


def recognises(columns: list[str]) -> bool:
    return set(COLUMNS) <= set(columns)


def read(file: LabelFile, table: Table) -> list[Video]:
    """Raises InputError, which names the line, for what cannot be."""
    missing = [column for column in COLUMNS if column not in table.columns]
    if missing:
        raise InputError(
            f"{file.path} needs a first line video,start,end,label[,subset][,duration]; it lacks {', '.join(missing)}"
        )
    found = Gathered(file)
    for line, cell in table.rows():
        name = cell["video"]
        if not name:
            raise InputError(f"{line} has no video name")
        where = f"{line}: video {name}"
        subset = subset_of(cell["subset"], where) if "subset" in table.columns else None
        found.video(name, where, subset=subset, duration=cell.get("duration") or None)
        if unclear := next((cell[key] for key in ("start", "end") if _is_unclear(cell[key], table)), None):
            raise InputError(
                f"{where} has the time {unclear!r}, which may have a decimal comma or one between thousands; write it "
                "with a decimal point, or without"
            )
        if cell["start"] or cell["end"] or cell["label"]:
            found.segment(name, cell["start"], cell["end"], cell["label"], where)
    if unread := [column for column in table.columns if column and column not in (*COLUMNS, "subset", "duration")]:
        subsets = "" if "subset" in table.columns else "; subsets are read of a column subset"
        file.note(f"columns that are not read: {shown(unread)}{subsets}")
    return found.videos()


def _is_unclear(time: str, table: Table) -> bool:
    """Whether a time may be of thousands of seconds: programs that write decimal commas separate cells otherwise."""
    return table.separator == "," and "," in time and _THOUSANDS.fullmatch(time) is not None


def write(path: Path, videos: Sequence[Video]) -> None:
    """Write labels as such a table, each in one line, with the columns subset and duration where some video has them.
    Raises InputError when it cannot be.
    """
    subsets = any(video.subset != UNASSIGNED for video in videos)
    durations = any(video.duration is not None for video in videos)
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow((*COLUMNS, *(("subset",) if subsets else ()), *(("duration",) if durations else ())))
    for video in videos:
        duration = "" if video.duration is None else repr(video.duration)
        facts = (*((video.subset,) if subsets else ()), *((duration,) if durations else ()))
        rows = [(repr(s.start), repr(s.end), in_one_line(s.label)) for s in video.segments] or [("", "", "")]
        writer.writerows((video.name, *row, *facts) for row in rows)
    write_bytes(path, text.getvalue().encode())

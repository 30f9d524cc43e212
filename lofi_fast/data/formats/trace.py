"""TRACE (trace-tad): a table labelId,timestamp,endTimestamp for each video, named like it, perhaps with "_final" or
"_predictions" behind. Seconds; no subsets; comments begin with "#".
"""

from __future__ import annotations

import re

from lofi_fast.data.formats.file import Gathered, LabelFile, Table
from lofi_fast.data.labels import Video

NAME = "a table of TRACE"
OPTIONS = frozenset[str]()
_BEHIND = re.compile(r"(.+?)_(?:final|predictions?|annotations?|manual)$")


def recognises(columns: list[str]) -> bool:
    return {"labelid", "timestamp", "endtimestamp"} <= set(columns)


def read(file: LabelFile, table: Table) -> list[Video]:
    """Raises InputError, which names the line, for what cannot be."""
    match = _BEHIND.match(file.path.stem)
    name = match[1] if match else file.path.stem
    found = Gathered(file)
    found.video(name, f"{file.path}: video {name}")
    for line, cell in table.rows():
        end = cell["endtimestamp"] or cell["timestamp"]
        found.segment(name, cell["timestamp"], end, cell["labelid"], f"{line}: video {name}")
    file.note(f"read as {NAME}: seconds; the video is {name}, as the file is named; no subsets")
    return found.videos()

"""The table of HACS Clips: classname,youtube_id,subset,start,end,label. Seconds, subsets as told. Rows whose label is
-1 say that the action does not happen there, and are dropped. Of its testing videos the labels are kept back.
"""

from __future__ import annotations

from lofi_fast.data.formats.file import Gathered, LabelFile, Table, plural
from lofi_fast.data.labels import Video, subset_of

NAME = "HACS Clips"
OPTIONS = frozenset[str]()


def recognises(columns: list[str]) -> bool:
    return {"classname", "youtube_id", "subset", "start", "end"} <= set(columns)


def read(file: LabelFile, table: Table) -> list[Video]:
    """Raises InputError, which names the line, for what cannot be."""
    found, absent = Gathered(file), 0
    for line, cell in table.rows():
        where = f"{line}: video {cell['youtube_id']}"
        subset = subset_of(cell["subset"], where)
        found.video(cell["youtube_id"], where, subset=subset)
        if subset == "testing" and not cell["classname"]:
            continue
        if cell.get("label", "1") in ("-1", "-1.0", "0"):
            absent += 1
        else:
            found.segment(cell["youtube_id"], cell["start"], cell["end"], cell["classname"], where)
    file.note(f"read as {NAME}: seconds, subsets as told")
    if absent:
        file.note(f"{plural(absent, 'clip')} without the action (label -1) dropped")
    return found.videos()

"""Charades' own tables, such as Charades_v1_train.csv: a row for each video, and its actions in one cell, as
"c092 11.90 21.20;c147 0.00 12.60". Seconds. The file's name tells the subset. Charades_v1_classes.txt beside it names
the classes; without it "c092" is the label. Actions that end before they start, of which the data set has seven, are
dropped, and told.
"""

from __future__ import annotations

from lofi_fast.data.formats.actions import class_names
from lofi_fast.data.formats.file import Gathered, LabelFile, Table, plural, runs_backwards
from lofi_fast.data.labels import UNASSIGNED, Video
from lofi_fast.errors import InputError

NAME = "a table of Charades"
OPTIONS = frozenset[str]()


def recognises(columns: list[str]) -> bool:
    return {"id", "actions", "length"} <= set(columns)


def read(file: LabelFile, table: Table) -> list[Video]:
    """Raises InputError, which names the line, for what cannot be."""
    names, found, subset = class_names(file.path.parent), Gathered(file), file.subset_of_name()
    backwards = 0
    for line, cell in table.rows():
        where = f"{line}: video {cell['id']}"
        found.video(cell["id"], where, subset=subset, duration=cell["length"] or None)
        for action in filter(None, map(str.strip, cell["actions"].split(";"))):
            parts = action.split()
            if len(parts) != 3:
                raise InputError(f"{where} has the action {action!r}; it must be a class, a start and an end")
            if runs_backwards(parts[1], parts[2]):
                backwards += 1
                continue
            found.segment(cell["id"], parts[1], parts[2], names.get(parts[0], parts[0]), where)
    told = "no subset" if subset == UNASSIGNED else f"the subset {subset}"
    file.note(f"read as {NAME}: seconds; its name tells {told}")
    if backwards:
        file.note(f"{plural(backwards, 'action')} dropped: the end is before the start")
    return found.videos()

"""THUMOS14 and MultiTHUMOS as they are downloaded: a text file for each class, BaseballPitch_val.txt, with lines
"video_validation_0000266 72.8 76.4".

Seconds. The class is the file's name without _val or _test. Everybody trains on what THUMOS14 calls its validation
videos, so these are training here, and its test videos are testing. Segments of Ambiguous, which nobody is scored on,
are dropped.
"""

from __future__ import annotations

import re

from lofi_fast.data.formats.file import Gathered, LabelFile, plural
from lofi_fast.data.labels import UNASSIGNED, Video

NAME = "a class of THUMOS14"
OPTIONS = frozenset[str]()
_ROW = re.compile(r"\s*(\S+)\s+(\d+(?:\.\d*)?)\s+(\d+(?:\.\d*)?)\s*")
_SPLIT = re.compile(r"_(?:val(?:idation)?|test|train(?:ing)?|background)$", re.IGNORECASE)


def recognises(text: str) -> bool:
    lines = [line for line in text.splitlines() if line.strip()]
    return bool(lines) and all(_ROW.fullmatch(line) and not line.split()[0][0].isdigit() for line in lines)


def read(file: LabelFile) -> list[Video]:
    """Raises InputError, which names the line, for what cannot be."""
    label = _SPLIT.sub("", file.path.stem)
    found, ambiguous = Gathered(file), 0
    for number, line in enumerate(file.text.splitlines(), 1):
        if row := _ROW.fullmatch(line):
            where = f"{file.path} line {number}: video {row[1]}"
            found.video(row[1], where, subset=_subset(row[1]))
            if label.casefold() == "ambiguous":
                ambiguous += 1
            else:
                found.segment(row[1], row[2], row[3], label, where)
    file.note(
        "read as a class of THUMOS14: seconds; its validation videos are for training, as everybody uses them, and its "
        "test videos are testing"
    )
    if ambiguous:
        file.note(f"{plural(ambiguous, 'segment')} of Ambiguous dropped: nobody is scored on them")
    return found.videos()


def _subset(video: str) -> str:
    if match := re.match(r"video_(validation|test|background|train)", video):
        return "testing" if match[1] in ("test", "background") else "training"
    return UNASSIGNED

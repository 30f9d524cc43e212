"""CholecT50 and CholecT45 (VID01.json): triplets of instrument, verb and target that each frame shows, and its phase.

Frames are numbered, "fps" a second, which is 1; a number stands for the time up to the next. Consecutive frames with
one class are a segment. --label says which class is wanted: triplet (without it), instrument, verb, target or phase.
The file's name is the video's. Frames without a triplet (-1) have none. No subsets.
"""

from __future__ import annotations

import re
from collections import defaultdict
from typing import Any

from lofi_fast.data.formats.file import Gathered, LabelFile
from lofi_fast.data.labels import Video, seconds_of
from lofi_fast.errors import InputError

NAME = "CholecT50"
OPTIONS = frozenset(("fps", "label"))
PLACES = {"triplet": 0, "instrument": 1, "verb": 7, "target": 8, "phase": 14}  # in the list of one instance


def recognises(content: Any) -> bool:
    categories = content.get("categories") if isinstance(content, dict) else None
    return isinstance(categories, dict) and "triplet" in categories and isinstance(content.get("annotations"), dict)


def read(file: LabelFile, content: Any) -> list[Video]:
    """Raises InputError, which names the frame, for what cannot be, and for another --label."""
    kind = file.options.label or "triplet"
    names = content["categories"].get(kind)
    if kind not in PLACES or not isinstance(names, dict):
        raise InputError(f"{file.path}: --label {kind} is none of CholecT50; it is one of {', '.join(PLACES)}")
    name = file.path.stem
    rate = file.rates({name: seconds_of(content.get("fps", 1))})[name]
    frames: dict[str, set[int]] = defaultdict(set)
    last = -1
    for key, instances in content["annotations"].items():
        where = f"{file.path}: frame {key}"
        if not re.fullmatch(r"\d{1,9}", str(key), re.ASCII) or not isinstance(instances, list):
            raise InputError(f"{where} must be a number with a list of instances")
        last = max(last, int(key))
        for instance in instances:
            if not isinstance(instance, list) or len(instance) <= PLACES[kind]:
                raise InputError(f"{where} has an instance that is no list of 15 values")
            number = seconds_of(instance[PLACES[kind]])
            if number is None or number < 0:
                continue
            if str(int(number)) not in names:
                raise InputError(f"{where} has the {kind} {number:g}, which is not among its categories")
            frames[str(names[str(int(number))])].add(int(key))
    found = Gathered(file)
    where = f"{file.path}: video {name}"
    found.video(name, where, duration=(last + 1) / rate if last >= 0 else None)
    for label, at in frames.items():
        for first in sorted(frame for frame in at if frame - 1 not in at):
            after = first
            while after in at:
                after += 1
            found.segment(name, first / rate, after / rate, label, where)
    file.note(f"read as {NAME}: {rate:g} frames a second; the video is named like the file; labels are the {kind}s")
    return found.videos()

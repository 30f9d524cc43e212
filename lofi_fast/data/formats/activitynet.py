"""ActivityNet's JSON, in which HACS, FineAction and THUMOS14 are published too:

    {"database": {name: {"subset": "training", "duration": 82.7, "annotations": [{"segment": [a, b], "label": "x"}]}}}

Seconds, as numbers or texts. Subsets as they are told.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from lofi_fast.data.formats.file import LabelFile, check_name
from lofi_fast.data.labels import UNASSIGNED, Video, duration_of, segment_of, subset_of
from lofi_fast.errors import InputError
from lofi_fast.files import write_bytes

NAME = "ActivityNet JSON"
OPTIONS = frozenset[str]()


def recognises(content: Any) -> bool:
    return isinstance(content, dict) and isinstance(content.get("database"), dict)


def read(file: LabelFile, content: Any) -> list[Video]:
    """Raises InputError, which names video and segment, for what cannot be."""
    path, database = file.path, content["database"]
    unassigned = not any(isinstance(entry, dict) and "subset" in entry for entry in database.values())
    videos = []
    for name, entry in database.items():
        where = f"{path}: video {name}"
        check_name(name, str(path))
        if not isinstance(entry, dict):
            raise InputError(f"{where} must be an object")
        subset = UNASSIGNED if unassigned else subset_of(entry.get("subset"), where)
        duration = duration_of(entry.get("duration"), where)
        # unpublished ground truth: the test videos of ActivityNet and HACS may have no annotations at all
        listed = entry.get("annotations", [] if subset == "testing" else None)
        if not isinstance(listed, list):
            raise InputError(f'{where} needs a list "annotations"')
        segments = []
        for i, item in enumerate(listed):
            at = f"{where}, segment {i}"
            bounds = item.get("segment") if isinstance(item, dict) else None
            if not isinstance(bounds, list) or len(bounds) != 2:
                raise InputError(f'{at} needs "segment": [start, end]')
            segments.append(segment_of(bounds[0], bounds[1], item.get("label"), at))
        videos.append(file.made(name, subset, duration, segments))
    return videos


def write(path: Path, videos: Iterable[Video]) -> None:
    """Write labels in this form; videos that no subset is told of have none. Raises InputError when it cannot be."""
    database: dict[str, Any] = {}
    for video in videos:
        entry: dict[str, Any] = {} if video.subset == UNASSIGNED else {"subset": video.subset}
        if video.duration is not None:
            entry["duration"] = video.duration
        entry["annotations"] = [{"segment": [s.start, s.end], "label": s.label} for s in video.segments]
        database[video.name] = entry
    text = json.dumps({"version": "VERSION 1.3", "database": database}, allow_nan=False)
    write_bytes(path, text.encode() + b"\n")

"""E2E-Spot and T-DEED: a list of {"video", "fps", "num_frames", "events": [{"frame", "label"}]} for each subset.

Events are points in time, counted in frames from 0. The file's name (train.json, val.json, test.json) tells the subset.
"""

from __future__ import annotations

from typing import Any

from lofi_fast.data.formats.file import Gathered, LabelFile
from lofi_fast.data.labels import UNASSIGNED, Video, seconds_of
from lofi_fast.errors import InputError

NAME = "E2E-Spot"
OPTIONS = frozenset(("fps",))


def recognises(content: Any) -> bool:
    return isinstance(content, list) and bool(content) and all(
        isinstance(one, dict) and "video" in one and isinstance(one.get("events"), list) for one in content
    )  # fmt: skip


def read(file: LabelFile, content: Any) -> list[Video]:
    """Raises InputError, which names video and event, for what cannot be."""
    subset, found = file.subset_of_name(), Gathered(file)
    for item in content:
        found.video(item["video"], f"{file.path}: video {item['video']}", subset=subset)
    rates = file.rates({item["video"]: seconds_of(item.get("fps")) for item in content})
    for item in content:
        name, rate = item["video"], rates[item["video"]]
        where = f"{file.path}: video {name}"
        frames = seconds_of(item.get("num_frames"))
        found.video(name, where, duration=frames / rate if frames else None)
        for i, event in enumerate(item["events"]):
            frame = seconds_of(event.get("frame")) if isinstance(event, dict) else None
            if frame is None:
                raise InputError(f'{where}, event {i} needs a "frame"')
            found.segment(name, frame / rate, frame / rate, event.get("label"), where)
    told = "no subset" if subset == UNASSIGNED else f"the subset {subset}"
    file.note(f"read as {NAME}: points in frames of {_shown(rates)} a second; its name tells {told}")
    return found.videos()


def _shown(rates: dict[str, float]) -> str:
    found = sorted(set(rates.values()))
    return f"{found[0]:g}" if len(found) == 1 else f"{found[0]:g} to {found[-1]:g}"

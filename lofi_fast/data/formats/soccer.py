"""Events of SoccerNet, which are points in time: their segments start and end at once.

SoccerNet-v2 has a file for each game, Labels-v2.json, with "position" in milliseconds of one half, and "gameTime", of
which the number before the dash is the half. A half is a video, GAME/1_720p or the like: the file that is there in
--videos, and GAME/1 without them. OpenSportsLab's version 2 lists "data" with "inputs" (the path of the video) and
"events" with "position_ms"; version 1 lists "videos" with "path" and "annotations". Subsets: as an item says
("split"), or the file's metadata, or its name, or none.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from lofi_fast.data.formats.file import Gathered, LabelFile, plural, shown
from lofi_fast.data.labels import UNASSIGNED, Video, seconds_of, subset_named, subset_of
from lofi_fast.data.matching import EXTENSIONS
from lofi_fast.errors import InputError

NAME = "SoccerNet"
OPTIONS = frozenset(("label",))
_HALF = re.compile(r"\s*(\d{1,2})\s*-\s*(\d{1,4}:\d{2})")


def recognises(content: Any) -> bool:
    if not isinstance(content, dict):
        return False
    annotations, data, videos = content.get("annotations"), content.get("data"), content.get("videos")
    if isinstance(annotations, list) and ("UrlLocal" in content or any(_is_spot(one) for one in annotations)):
        return True
    if isinstance(data, list) and any(isinstance(one, dict) and "events" in one for one in data):
        return True
    return isinstance(videos, list) and any(
        isinstance(one, dict) and "path" in one and "annotations" in one for one in videos
    )


def _is_spot(item: Any) -> bool:
    return isinstance(item, dict) and "gameTime" in item and "label" in item


def read(file: LabelFile, content: Any) -> list[Video]:
    """Raises InputError, which names the event, for what cannot be."""
    if "annotations" in content:
        return _game(file, content)
    listed = content["data"] if "data" in content else content["videos"]
    facts = content.get("metadata")
    split = facts.get("split") if isinstance(facts, dict) else None
    of_all = "testing" if split == "challenge" else subset_named(split) if isinstance(split, str) else None
    return _listed(file, listed, of_all or file.subset_of_name())


def _game(file: LabelFile, content: Mapping[str, Any]) -> list[Video]:
    game = str(content.get("UrlLocal") or file.path.parent.name).strip("/") or file.path.stem
    found = Gathered(file)
    names: dict[str, str] = {}
    for i, event in enumerate(content["annotations"]):
        where = f"{file.path}: event {i}"
        if not isinstance(event, dict):
            raise InputError(f"{where} must be an object")
        half = _HALF.match(str(event.get("gameTime", "")))
        if half is None:
            raise InputError(f'{where} needs "gameTime" like "1 - 05:27", not {event.get("gameTime")!r}')
        name = names.setdefault(half[1], _half(file, game, half[1]))
        found.video(name, where)
        # SoccerNet's first version has the game's time alone, to the second
        at = _seconds(event, "position", where) if "position" in event else seconds_of(half[2])
        found.segment(name, at, at, event.get("label"), where)
    file.note(f"read as {NAME}-v2: points in milliseconds of each half; videos {', '.join(names.values())}; no subsets")
    return found.videos()


def _half(file: LabelFile, game: str, half: str) -> str:
    """The name of a half's video: as it is called in the folder of the videos, the largest picture first."""
    if file.options.videos is not None:
        folder = file.options.videos / game
        there = sorted(
            (path for path in (folder.iterdir() if folder.is_dir() else ()) if path.suffix.lower() in EXTENSIONS),
            key=lambda path: -int("".join(re.findall(r"_(\d{1,5})p", path.stem)) or 0),
        )
        for path in there:
            if re.match(rf"{half}(?:\D|$)", path.stem):
                return f"{game}/{path.stem}"
        if there and not any(re.match(r"[12](?:\D|$)", path.stem) for path in there):
            return f"{game}/{there[0].stem}"  # one file of the whole game
    return f"{game}/{half}"


def _listed(file: LabelFile, items: list[Any], of_file: str) -> list[Video]:
    """`of_file`: the subset of items that tell none."""
    paths: dict[int, str] = {}
    for i, item in enumerate(items):
        where = f"{file.path}: item {i}"
        if not isinstance(item, dict):
            raise InputError(f"{where} must be an object")
        paths[i] = _path(item, where)
    names = file.named(paths.values())
    found, others = Gathered(file), 0
    heads = sorted({str(event["head"]) for item in items for event in _events(item) if "head" in event})
    wanted = file.options.label if len(heads) > 1 else None
    if wanted is not None and wanted not in heads:
        raise InputError(f"{file.path}: --label {wanted}: it has no such head, but {shown(heads, 12)}")
    subsets = set()
    for i, item in enumerate(items):
        name = names[paths[i]]
        where = f"{file.path}: video {name}"
        subset = _split(item["split"], where) if "split" in item else of_file
        subsets.add(subset)
        found.video(name, where, subset=subset)
        events = item.get("events", item.get("annotations", []))
        if not isinstance(events, list):
            raise InputError(f'{where} needs a list "events"')
        for k, event in enumerate(events):
            at = f"{where}, event {k}"
            if not isinstance(event, dict):
                raise InputError(f"{at} must be an object")
            if wanted is not None and event.get("head") != wanted:
                others += 1
                continue
            point = _seconds(event, "position_ms" if "position_ms" in event else "position", at)
            found.segment(name, point, point, event.get("label"), at)
    told = "no subsets" if subsets <= {UNASSIGNED} else "subsets by split or the file's name"
    file.note(f"read as OpenSportsLab's: points in milliseconds; {told}")
    if len(heads) > 1 and wanted is None:
        file.note(f"events of the heads {shown(heads)} are put together; --label names one of them")
    if others:
        file.note(f"{plural(others, 'event')} of other heads than --label {wanted} dropped")
    return found.videos()


def _events(item: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    listed = item.get("events", item.get("annotations", []))
    yield from (event for event in listed if isinstance(event, dict)) if isinstance(listed, list) else ()


def _split(value: object, where: str) -> str:
    """A subset; SoccerNet's challenge is a test of which the labels are kept back."""
    return "testing" if value == "challenge" else subset_of(value, where)


def _path(item: Mapping[str, Any], where: str) -> str:
    """Of the video of an item."""
    inputs = item.get("inputs")
    if isinstance(inputs, list):
        for one in inputs:
            if isinstance(one, dict) and one.get("type", "video") == "video" and isinstance(one.get("path"), str):
                return str(one["path"])
    for key in ("path", "video", "id", "game_id"):
        if isinstance(item.get(key), str) and item[key].strip():
            return str(Path(item[key]).as_posix())
    raise InputError(f'{where} names no video; it needs "inputs" with the "path" of one')


def _seconds(event: Mapping[str, Any], key: str, where: str) -> float:
    milliseconds = seconds_of(event.get(key))
    if milliseconds is None:
        raise InputError(f'{where} has the "{key}" {event.get(key)!r}; it must be milliseconds')
    return milliseconds / 1000

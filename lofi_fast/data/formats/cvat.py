"""CVAT's XML: tracks ("CVAT for video") and tags of frames ("CVAT for images").

A track's label lasts from a frame in which its shape is there to one in which it is outside; without --label it is the
track's own, and with it the value of the attribute of that name. Consecutive frames with one tag are a segment. Frames
count from 0 and a last frame belongs to its segment; --fps says how many there are a second, or else the videos do.
The video is a task's source. No subsets.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterator
from xml.etree.ElementTree import Element

from lofi_fast.data.formats.file import Gathered, LabelFile, plural, shown
from lofi_fast.data.labels import Video
from lofi_fast.errors import InputError

NAME = "CVAT"
OPTIONS = frozenset(("fps", "label"))
SHAPES = ("box", "polygon", "polyline", "points", "cuboid", "ellipse", "mask", "skeleton")
Run = tuple[int, int, str]  # first frame, the frame after the last, label


def recognises(content: Element) -> bool:
    # a task without a label has neither tracks nor images
    return content.tag == "annotations" and any(
        content.find(path) is not None for path in ("track", "image", "meta/task", "meta/job", "meta/project")
    )


def read(file: LabelFile, content: Element) -> list[Video]:
    """Raises InputError, which names the track, for what cannot be, and where nothing tells the frame rate."""
    sources = _sources(file, content)
    names = file.named([path for path, _ in sources.values()])
    runs: dict[str, list[Run]] = {names[path]: [] for path, _ in sources.values()}
    nameless = 0
    for track in content.iter("track"):
        path, step = _source(file, sources, track)
        own = list(_of_track(file, track, step))
        nameless += not own
        runs[names[path]] += own
    frames: dict[str, dict[str, list[int]]] = defaultdict(lambda: defaultdict(list))
    steps: dict[str, int] = {}
    untagged = 0
    for image in content.iter("image"):
        path, step = _source(file, sources, image)
        steps[names[path]] = step
        untagged += image.find("tag") is None and any(shape.tag in SHAPES for shape in image)
        for tag in image.iter("tag"):
            frames[names[path]][_value(file, tag) or ""].append(_number(file, image, "id"))
    for name, tags in frames.items():
        for label, at in tags.items():
            runs[name] += [(first, last, label) for first, last in _consecutive(sorted(set(at)), steps[name]) if label]
    rates = file.rates(dict.fromkeys(name for name, own in runs.items() if own))
    found = Gathered(file)
    for name, own in runs.items():
        where = f"{file.path}: video {name}"
        found.video(name, where)
        for first, after, label in own:
            found.segment(name, first / rates[name], after / rates[name], label, where)
    told = ", ".join(f"{rate:g}" for rate in sorted(set(rates.values()))) or "any number"
    file.note(f"read as {NAME}: frames from 0, {told} a second; no subsets")
    counted = Counter(names[path] for path, _ in sources.values())
    if several := [name for name, count in counted.items() if count > 1]:
        file.note(
            f"the segments of {plural(len(several), 'video')} come from several tasks and are put together "
            f"({shown(several)})"
        )
    if untagged:
        file.note(
            f"{plural(untagged, 'image')} with shapes and without a tag left out: CVAT for video has them in time"
        )
    if nameless:
        file.note(f"{plural(nameless, 'track')} without a visible shape, or without the attribute, dropped")
    return found.videos()


def _sources(file: LabelFile, content: Element) -> dict[str, tuple[str, int]]:
    """Task -> (path of its video, frames of the video from one labelled frame to the next)."""
    found: dict[str, tuple[str, int]] = {}
    meta = content.find("meta")
    for task in [] if meta is None else [one for one in meta.iter() if one.tag in ("task", "job")]:
        source = (task.findtext("source") or task.findtext("name") or "").strip()
        if not source and meta is not None:
            source = (meta.findtext("source") or "").strip()
        step = re.search(r"step\s*=\s*([1-9]\d{0,5})", task.findtext("frame_filter") or "")
        found[task.findtext("id") or ""] = (source or file.path.stem, int(step[1]) if step else 1)
    if not found:
        source = "" if meta is None else (meta.findtext("source") or "").strip()
        found[""] = (source or file.path.stem, 1)
    return found


def _source(file: LabelFile, sources: dict[str, tuple[str, int]], element: Element) -> tuple[str, int]:
    """Of a track or an image. Raises InputError where it is of none of several tasks."""
    task = element.get("task_id", "")
    if task not in sources and len(set(sources.values())) > 1:
        raise InputError(
            f"{file.path}: {element.tag} {element.get('id')} has the task_id {task!r}, and the tasks are "
            f"{shown(sources)}; export it again"
        )
    return sources[task] if task in sources else next(iter(sources.values()))


def _of_track(file: LabelFile, track: Element, step: int) -> Iterator[Run]:
    """The runs of frames in which a track's shape is there with one label."""
    where = f"{file.path}: track {track.get('id')}"
    shapes = sorted(
        ((_number(file, shape, "frame", where), shape) for shape in track if shape.tag in SHAPES),
        key=lambda one: one[0],
    )
    label: str | None = None
    since = 0
    last = 0
    carried: str | None = None  # a mutable attribute stays until it is changed
    for frame, shape in shapes:
        outside = _is_outside(shape)
        carried = _value(file, shape, track) or carried
        now = None if outside else carried
        if now != label:
            if label is not None:
                yield since, frame, label
            label, since = now, frame
        last = frame
    if label is not None:
        yield since, last + step, label


def _is_outside(shape: Element) -> bool:
    """A skeleton itself does not say so, but each of its points does."""
    if shape.tag == "skeleton" and shape.get("outside") is None and len(shape):
        return all(_is_outside(part) for part in shape if part.tag in SHAPES)
    return shape.get("outside") == "1"


def _value(file: LabelFile, element: Element, track: Element | None = None) -> str | None:
    """The label of a tag, or of a track's shape; or the value of the attribute that --label names."""
    if file.options.label is None:
        return (element if track is None else track).get("label")
    for of in (element, track):
        for attribute in [] if of is None else of.findall("attribute"):
            if attribute.get("name") == file.options.label and (attribute.text or "").strip():
                return (attribute.text or "").strip()
    return None


def _consecutive(frames: list[int], step: int) -> Iterator[tuple[int, int]]:
    first = previous = None
    for frame in frames:
        if first is None or previous is None:
            first = frame
        elif frame > previous + step:
            yield first, previous + step
            first = frame
        previous = frame
    if first is not None and previous is not None:
        yield first, previous + step


def _number(file: LabelFile, element: Element, key: str, where: str = "") -> int:
    text = element.get(key, "")
    if not re.fullmatch(r"\d{1,9}", text, re.ASCII):
        raise InputError(f"{where or f'{file.path}: {element.tag}'} has the {key} {text!r}; it must be a whole number")
    return int(text)

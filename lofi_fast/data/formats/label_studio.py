"""Label Studio's export of video timelines, "JSON" and "JSON-MIN".

Ranges are in frames, the first frame is 1, and the last frame of a range belongs to it. A frame is one of the framerate
in the labelling setup (<Video framerate="30">; 24 where it has none), whatever the video's own. --fps tells it, or the
tasks do ("fps", as framerate="$fps" takes it; or a region's framesCount and duration), or else it is taken for that of
the videos, and this is told. Regions of audio, in seconds, are read too. A task's skipped annotations are left out;
several annotators' are put together, and told; predictions are read where a task has no annotation. No subsets.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote

from lofi_fast.data.formats.file import Gathered, LabelFile, Medium, plural
from lofi_fast.data.labels import Video, seconds_of
from lofi_fast.detections import Detection
from lofi_fast.errors import InputError
from lofi_fast.files import write_bytes

NAME = "Label Studio"
OPTIONS = frozenset(("fps",))
_MEDIA = re.compile(r"\.(?:mp4|m4v|mov|avi|mkv|webm|mpe?g|wmv|flv|ts|ogv|wav|mp3)(?:$|\?)", re.IGNORECASE)
_RATES = ("fps", "framerate", "frameRate", "frame_rate")  # what people call it among a task's data
_UPLOADED = re.compile(r"^[0-9a-f]{8}-")  # what Label Studio puts before the name of a file that it was given


def recognises(content: Any) -> bool:
    tasks = content if isinstance(content, list) else [content]
    if not tasks or not all(isinstance(task, dict) for task in tasks):
        return False
    if any(isinstance(task.get("data"), dict) for task in tasks):
        return all(_is_task(task) for task in tasks)
    # of JSON-MIN; a video without a region has none in its place either
    return any(_is_ranges(value) for task in tasks for value in task.values()) and all(
        any(_is_medium(value) for value in task.values()) for task in tasks
    )


def _is_task(task: Mapping[str, Any]) -> bool:
    return isinstance(task.get("data"), dict) and any(
        key in task for key in ("annotations", "completions", "predictions")
    )


def _is_ranges(value: Any) -> bool:
    return isinstance(value, list) and any(isinstance(one, dict) and "timelinelabels" in one for one in value)


def _is_medium(value: Any) -> bool:
    return isinstance(value, str) and bool(_MEDIA.search(value))


@dataclass(frozen=True)
class _Region:
    """start and end as they stand; in_frames: or else in seconds."""

    start: object
    end: object
    labels: list[str]
    in_frames: bool


def read(file: LabelFile, content: Any) -> list[Video]:
    """Raises InputError, which names the task, for what cannot be, and where nothing tells the frame rate."""
    tasks = content if isinstance(content, list) else [content]
    media = [_medium(task, f"{file.path}: task {task.get('id', i)}") for i, task in enumerate(tasks)]
    names = file.named(media)
    regions = [list(_regions(task, f"{file.path}: task {task.get('id', i)}")) for i, task in enumerate(tasks)]
    counted: dict[str, float | None] = {}
    for task, medium, of in zip(tasks, media, regions, strict=True):
        if any(region.in_frames for region in of):
            counted[names[medium]] = counted.get(names[medium]) or _rate(task)
    rates = file.rates(counted)
    found, annotators, unlabelled = Gathered(file), 0, 0
    for i, (task, medium, of) in enumerate(zip(tasks, media, regions, strict=True)):
        name = names[medium]
        where = f"{file.path}: task {task.get('id', i)}, video {name}"
        found.video(name, where)
        annotators += len(list(_annotations(task))) > 1
        for region in of:
            unlabelled += not region.labels
            start, end = seconds_of(region.start), seconds_of(region.end)
            if start is None or end is None:
                raise InputError(f"{where} has a region from {region.start!r} to {region.end!r}; both must be numbers")
            if region.in_frames:
                start, end = (start - 1) / rates[name], end / rates[name]
            for label in region.labels:
                found.segment(name, start, end, label, where)
    told = ", ".join(f"{rate:g}" for rate in sorted(set(rates.values())))
    file.note(f"read as {NAME}: {f'frames from 1, {told} a second' if rates else 'seconds'}; no subsets")
    if file.options.fps is None and None in counted.values():
        file.note(
            "its frames are those of the framerate in the labelling setup, which is 24 where <Video> has none; they "
            "were taken for the videos' own, so give --fps if the setup says otherwise"
        )
    if repeated := [names[medium] for medium, count in Counter(media).items() if count > 1]:
        file.note(f"{plural(len(repeated), 'video')} of several tasks or annotators, whose segments are put together")
    if annotators:
        file.note(f"{plural(annotators, 'task')} of several annotators, whose segments are put together")
    if unlabelled:
        file.note(f"{plural(unlabelled, 'region')} without a label dropped")
    if boxes := sum("sequence" in value for task in tasks for value in _values(task)):
        file.note(f"{plural(boxes, 'region')} with boxes left out")
    if predicted := sum(any(_annotations(task)) and not _labelled(task) for task in tasks):
        file.note(f"{plural(predicted, 'task')} without an annotation: what was predicted is read in its place")
    return found.videos()


def _medium(task: Mapping[str, Any], where: str) -> str:
    """The path of a task's video, as far as it was known before it was uploaded."""
    data = task["data"] if isinstance(task.get("data"), dict) else task
    texts = [value for value in (data.get("video"), *data.values()) if isinstance(value, str)]
    found = next(filter(_is_medium, texts), None) or (data["video"] if isinstance(data.get("video"), str) else None)
    if not found:
        raise InputError(f'{where} names no video; it needs "data": {{"video": path}}')
    path = found.partition("?d=")[2] or found.partition("?")[0]
    folder, slash, name = unquote(path).replace("\\", "/").rpartition("/")
    return folder + slash + _UPLOADED.sub("", name)


def _rate(task: Mapping[str, Any]) -> float | None:
    """Frames a second, where a task tells what its frames are counted by."""
    data = task["data"] if isinstance(task.get("data"), dict) else task
    told = next((rate for key in _RATES if (rate := seconds_of(data.get(key))) is not None and rate > 0), None)
    if told is not None:
        return 1 / told if told < 1 else told  # as Label Studio has it, which takes seconds a frame too
    for value in _values(task):
        frames, seconds = seconds_of(value.get("framesCount")), seconds_of(value.get("duration"))
        if frames is not None and seconds is not None and frames > 0 and seconds > 0:
            return frames / seconds
    return None


def _labelled(task: Mapping[str, Any]) -> Any:
    return task.get("annotations") or task.get("completions")


def _annotations(task: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    listed = _labelled(task) or task.get("predictions") or []
    for one in listed if isinstance(listed, list) else []:
        if isinstance(one, dict) and not one.get("was_cancelled"):
            yield one


def _values(task: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """What the regions of a task hold."""
    if isinstance(task.get("data"), dict):
        results = [result for one in _annotations(task) for result in one.get("result") or []]
        values = [result.get("value") for result in results if isinstance(result, dict)]
    else:
        values = [one for value in task.values() if _is_ranges(value) for one in value]
    return [value for value in values if isinstance(value, dict)]


def _regions(task: Mapping[str, Any], where: str) -> Iterator[_Region]:
    for value in _values(task):
        if isinstance(value.get("ranges"), list):
            for one in value["ranges"]:
                if not isinstance(one, dict):
                    raise InputError(f'{where} has a range {one!r}; it must be {{"start": frame, "end": frame}}')
                yield _Region(one.get("start"), one.get("end"), _labels(value, "timelinelabels"), True)
        elif "start" in value and "end" in value and "labels" in value:
            yield _Region(value["start"], value["end"], _labels(value, "labels"), False)


def _labels(value: Mapping[str, Any], key: str) -> list[str]:
    listed = value.get(key)
    return [str(label) for label in listed] if isinstance(listed, list) else []


def write(path: Path, predictions: Mapping[str, Sequence[Detection]], media: Mapping[str, Medium]) -> None:
    """Write detections as tasks with predictions, to be imported and corrected. The frame rate is a task's "fps", which
    the labelling setup takes with <Video framerate="$fps">.

    A region holds the frames whose middle lies in its segment, one at least. Raises
    InputError when the file cannot be written, and for a video whose frame rate is not known.
    """
    tasks = []
    for name, items in predictions.items():
        fps = media[name].fps
        if not fps:
            raise InputError(
                f"{path}: Label Studio counts frames, and how many {name} has a second is not known; give --fps, or "
                "the folder of the videos with --videos"
            )
        results = []
        for number, d in enumerate(sorted(items, key=lambda d: (d.start, d.end))):
            first = round(d.start * fps) + 1
            results.append({
                "id": f"d{number}", "type": "timelinelabels", "from_name": "videoLabels", "to_name": "video",
                "score": d.score, "readonly": False,
                "value": {
                    "ranges": [{"start": first, "end": max(round(d.end * fps), first)}],
                    "timelinelabels": [d.label],
                },
            })  # fmt: skip
        score = max((d.score for d in items), default=0.0)
        prediction = {"model_version": "lofi_fast", "score": score, "result": results}
        address = re.sub("[%?]", lambda match: quote(match[0]), media[name].path)
        tasks.append({"data": {"video": address, "fps": fps}, "predictions": [prediction]})
    write_bytes(path, json.dumps(tasks, indent=1, allow_nan=False).encode() + b"\n")

"""Ego4D's moment queries (moments_train.json, moments_val.json):

    {"videos": [{"video_uid": u, "split": "train", "clips": [{"clip_uid": c, "annotations": [{"labels": [
        {"label": x, "start_time": a, "end_time": b, "primary": true}]}]}]}]}

Seconds. A clip is a video here, by its clip_uid and on the clip's own clock, as the benchmark has it; where --videos
holds the whole videos and not the clips, the videos are, on theirs. Subsets by "split". Labels that are not primary are
dropped, as the benchmark does.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from lofi_fast.data.formats.file import Gathered, LabelFile, plural
from lofi_fast.data.labels import Video, seconds_of, subset_of
from lofi_fast.data.matching import match_videos
from lofi_fast.errors import InputError

NAME = "Ego4D moment queries"
OPTIONS = frozenset[str]()


def recognises(content: Any) -> bool:
    listed = content.get("videos") if isinstance(content, dict) else None
    if not isinstance(listed, list) or not all(isinstance(one, dict) and "video_uid" in one for one in listed):
        return False
    return any("clips" in one for one in listed)  # Goal-Step has videos alone


def read(file: LabelFile, content: Any) -> list[Video]:
    """Raises InputError, which names video and clip, for what cannot be."""
    whole = _whole(file, content["videos"])
    found = Gathered(file)
    others = 0
    for video in content["videos"]:
        where = f"{file.path}: video {video['video_uid']}"
        subset = subset_of(video["split"], where) if "split" in video else None
        for clip in _dicts(video, "clips", where):
            of_clip = f"{where}, clip {clip.get('clip_uid')}"
            name = str(video["video_uid"] if whole else clip.get("clip_uid") or "")
            length = None if whole else _length(clip)
            found.video(name, of_clip, subset=subset, duration=length)
            start, end = ("video_start_time", "video_end_time") if whole else ("start_time", "end_time")
            for annotation in _dicts(clip, "annotations", of_clip):
                for label in _dicts(annotation, "labels", of_clip):
                    if label.get("primary", True) is True:
                        found.segment(name, label.get(start), label.get(end), label.get("label"), of_clip)
                    else:
                        others += 1
    file.note(f"read as {NAME}: seconds of the {'videos' if whole else 'clips'}; subsets by split")
    if others:
        file.note(f"{plural(others, 'label')} that are not primary dropped, as the benchmark does")
    return found.videos()


def _whole(file: LabelFile, videos: list[dict[str, Any]]) -> bool:
    """Whether the folder of the videos holds videos, and none of the clips."""
    folder = file.options.videos
    if folder is None or not folder.is_dir():
        return False
    clips = [
        str(clip.get("clip_uid"))
        for video in videos
        for clip in _dicts(video, "clips", f"{file.path}: video {video['video_uid']}")
    ]
    return not match_videos(folder, clips).paths and bool(
        match_videos(folder, [str(video["video_uid"]) for video in videos]).paths
    )


def _dicts(of: dict[str, Any], key: str, where: str) -> Iterator[dict[str, Any]]:
    listed = of.get(key) or []
    if not isinstance(listed, list) or not all(isinstance(item, dict) for item in listed):
        raise InputError(f'{where}: "{key}" must be a list of objects')
    yield from listed


def _length(clip: dict[str, Any]) -> float | None:
    """Seconds of a clip, where both of its ends are told."""
    start, end = seconds_of(clip.get("video_start_sec")), seconds_of(clip.get("video_end_sec"))
    return end - start if start is not None and end is not None and end > start else None

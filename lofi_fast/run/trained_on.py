"""What a run trains on, by content: the labels as they are read, which file each video is, and the files of weights and
scores that its settings name.

A run goes on where its data has moved, and not where it has changed. data.json in the run folder is the record, for
people and for saying what differs; every checkpoint has its digest.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path

import msgspec

from lofi_fast.config import Config
from lofi_fast.data.dataset import Dataset
from lofi_fast.errors import InputError
from lofi_fast.files import json_bytes, sha256_of

RECORD = "data.json"


class VideoRecord(msgspec.Struct, frozen=True):
    """One video that can be used. Times are seconds."""

    subset: str
    size: int  # bytes of its file
    frames: int  # in its file
    duration: float  # that its file's clock shows at its end, to a millisecond
    segments: list[tuple[float, float, str]]  # start, end, label, as the labels have them

    @property
    def file(self) -> tuple[int, int, float]:
        return self.size, self.frames, self.duration


Videos = dict[str, VideoRecord]  # by name


class Record(msgspec.Struct, frozen=True):
    """What a run trains on. `files`: flag -> SHA-256 of the file that it names; flags that name none are left out."""

    videos: Videos
    files: dict[str, str]


@dataclass(frozen=True)
class Changes:
    """How two records differ, in words: in what the labels say, and in which files the videos are, or which a setting
    names.
    """

    labels: tuple[str, ...]
    files: tuple[str, ...]


def record_of(dataset: Dataset, config: Config) -> bytes:
    """The record, as JSON. Raises InputError for a file of the settings that cannot be read."""
    videos = {}
    for subset, members in dataset.videos.items():
        for video in members:
            source = dataset.sources[video.name]
            segments = [(segment.start, segment.end, segment.label) for segment in source.segments]
            videos[video.name] = VideoRecord(subset, source.size, source.frames, round(source.duration, 3), segments)
    named = {"--encoder-weights": config.encoder.weights, "--video-scores": config.data.video_scores}
    return json_bytes(Record(videos, {flag: _sha256(flag, Path(path)) for flag, path in named.items() if path}))


def _sha256(flag: str, path: Path) -> str:
    try:
        return sha256_of(path)
    except OSError as error:
        raise InputError(f"{flag} {path} cannot be read: {error.strerror}") from None


def digest(record: bytes) -> str:
    return hashlib.blake2b(record, digest_size=16).hexdigest()


def read_record(path: Path, expected: str) -> bytes | None:
    """The record in a file; None where the file is not there, or its digest is not the `expected` one."""
    try:
        record = path.read_bytes()
    except OSError:
        return None
    return record if digest(record) == expected else None


def changes_between(record: bytes, other: bytes) -> Changes:
    """What differs in the other record, each kind with how many videos it concerns and the first of them."""
    earlier, later = (msgspec.json.decode(content, type=Record) for content in (record, other))
    before, now = earlier.videos, later.videos
    both = [name for name in before if name in now]
    labels = [
        _counted([name for name in before if name not in now], "is gone", "are gone", lambda name: ""),
        _counted([name for name in now if name not in before], "is new", "are new", lambda name: ""),
        _counted(
            [name for name in both if before[name].subset != now[name].subset],
            "is in another subset", "are in other subsets",
            lambda name: f": {now[name].subset}, before {before[name].subset}",
        ),
        _counted(
            [name for name in both if before[name].segments != now[name].segments],
            "has other segments", "have other segments", lambda name: _other_segments(before[name], now[name]),
        ),
        *_classes(before, now),
        "the videos are in another order" if both != [name for name in now if name in before] else "",
    ]  # fmt: skip
    files = _counted(
        [name for name in both if before[name].file != now[name].file],
        "is another file", "are other files",
        lambda name: f": {_file(now[name])}, before {_file(before[name])}",
    )  # fmt: skip
    return Changes(tuple(filter(None, labels)), tuple(filter(None, [files, *_named(earlier.files, later.files)])))


def _named(before: dict[str, str], now: dict[str, str]) -> list[str]:
    """What differs in the files that settings name."""
    return [
        f"{flag} {'is another file' if flag in now else 'is left out'}" if flag in before else f"{flag} is new"
        for flag in sorted(before.keys() | now.keys())
        if before.get(flag) != now.get(flag)
    ]


def _counted(names: Collection[str], one: str, many: str, more: Callable[[str], str]) -> str:
    if not names:
        return ""
    first = next(iter(names))
    return f"{len(names)} video{'s' if len(names) > 1 else ''} {many if len(names) > 1 else one} ({first}{more(first)})"


def _other_segments(before: VideoRecord, now: VideoRecord) -> str:
    """Like ": 3 segments, before 2; of these [0.5, 2] jump is gone"."""
    counts = f": {len(now.segments)} segments, before {len(before.segments)}"
    gone = list((Counter(before.segments) - Counter(now.segments)).elements())
    new = list((Counter(now.segments) - Counter(before.segments)).elements())
    if gone or new:
        start, end, label = (gone or new)[0]
        return f"{counts}; [{start:g}, {end:g}] {label} {'is gone' if gone else 'is new'}"
    return f"{counts}, in another order"


def _classes(before: Videos, now: Videos) -> list[str]:
    then, today = (
        {label for video in videos.values() if video.subset == "training" for *_, label in video.segments}
        for videos in (before, now)
    )
    return [
        f"{len(names)} class{'es' if len(names) > 1 else ''} {what} ({min(names)})"
        for what, names in (("less", then - today), ("more", today - then))
        if names
    ]


def _file(video: VideoRecord) -> str:
    return f"{video.size} bytes, {video.frames} frames, {video.duration:g} s"

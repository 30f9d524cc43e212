"""What labels say of videos: segments in seconds, subsets, durations; and how one value of a file is read.

Times are seconds on the file's own clock, the one that players and labelling tools show: 0 is where the container
starts, also where its sound begins before its pictures (a cut by stream copy does that).
"""

from __future__ import annotations

import math
import re
import sys
import unicodedata
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path

from lofi_fast.errors import InputError

_SUBSETS = {
    "training": ("train", "training", "trn", "tr", "learn", "learning"),
    "validation": ("val", "valid", "validation", "validate", "dev", "development", "eval", "evaluation"),
    "testing": ("test", "testing", "tst"),
}
UNASSIGNED = "unassigned"  # the subset of every video of labels that tell none


@dataclass(frozen=True, slots=True)
class Segment:
    """One action: `start` and `end` in seconds on the file's clock, start <= end."""

    start: float
    end: float
    label: str


@dataclass(frozen=True, slots=True)
class Video:
    """One annotated video. `subset`: training, validation, testing, or UNASSIGNED. `duration` is in seconds, None where
    the labels do not tell it.
    """

    name: str
    subset: str
    duration: float | None
    segments: tuple[Segment, ...]


@dataclass(frozen=True)
class Annotations:
    """All videos in the order of the file, the sorted labels of training and validation, and what was repaired."""

    videos: tuple[Video, ...]
    classes: tuple[str, ...]
    notes: tuple[str, ...]
    duplicates: int = 0  # segments that stood there twice with one label, of which one is left

    def subset(self, name: str) -> tuple[Video, ...]:
        """Videos of "training", "validation", "testing", or UNASSIGNED; ValueError for any other name."""
        if name not in (*_SUBSETS, UNASSIGNED):
            raise ValueError(f"subset must be training, validation or testing, not {name!r}")
        return tuple(video for video in self.videos if video.subset == name)

    @property
    def untrained_classes(self) -> tuple[str, ...]:
        """Sorted labels of validation segments that no training segment has: no detector can learn them."""
        return tuple(sorted(labels_of(self.subset("validation")) - labels_of(self.subset("training"))))


@dataclass
class Repairs:
    """Counts of each kind of repair, so that a note is one sentence however many segments it concerns."""

    counts: Counter[str] = field(default_factory=Counter)

    def sentences(self, where: str) -> tuple[str, ...]:
        wording = {
            "zero": ("has zero length and is kept", "have zero length and are kept"),
            "early": ("starts before 0 s and is clipped", "start before 0 s and are clipped"),
            "clipped": ("ends after the video and is clipped", "end after the video and are clipped"),
            "outside": ("lies outside the video and is dropped", "lie outside the video and are dropped"),
            "duplicate": ("is a duplicate and is removed", "are duplicates and are removed"),
        }
        return tuple(
            f"{where}: {n} segment{'s' if n > 1 else ''} {wording[kind][n > 1]}"
            for kind, n in ((kind, self.counts[kind]) for kind in wording)
            if n
        )


def plain_spelling(label: str) -> str:
    """What spellings of one word have in common: no case, and one space for white space, dashes and underscores."""
    return re.sub(r"[\s_-]+", " ", unicodedata.normalize("NFKC", label).casefold()).strip()


def clip_to_duration(video: Video, duration: float) -> tuple[Video, tuple[str, ...]]:
    """The same video with its true `duration` (seconds, as probed) and its segments clipped to it; and what changed.

    Segments wholly after the end are dropped. ValueError when the duration is not a positive number.
    """
    if not (math.isfinite(duration) and duration > 0):
        raise ValueError(f"duration of {video.name} must be positive seconds, not {duration}")
    if all(0 <= segment.start < segment.end <= duration for segment in video.segments) and (
        len({segment.start for segment in video.segments}) == len(video.segments)
    ):
        return replace(video, duration=duration), ()  # most are: nothing to repair
    repairs = Repairs()
    segments = repaired(video.segments, duration, repairs)
    # zero-length segments were told of when the file was read
    repairs.counts.pop("zero", None)
    return Video(video.name, video.subset, duration, segments), repairs.sentences(video.name)


def labels_of(videos: Iterable[Video]) -> set[str]:
    return {segment.label for video in videos for segment in video.segments}


def repaired(segments: Iterable[Segment], duration: float | None, repairs: Repairs) -> tuple[Segment, ...]:
    end_of_video = math.inf if duration is None else duration
    kept: dict[Segment, None] = {}
    for given in segments:
        start, end = max(given.start, 0.0), min(given.end, end_of_video)
        # a segment that only touches the video's first or last instant from outside has nothing inside it either
        if start > end or (start == end and given.start < given.end):
            repairs.counts["outside"] += 1
            continue
        segment = given if (start, end) == (given.start, given.end) else Segment(start, end, given.label)
        if segment in kept:
            repairs.counts["duplicate"] += 1
            continue
        kept[segment] = None
        repairs.counts["zero"] += start == end
        repairs.counts["early"] += start != given.start
        repairs.counts["clipped"] += end != given.end
    return tuple(kept)


def require_file(path: Path, flag: str) -> None:
    """Raises InputError for a pipe or a device: labels are read more than once."""
    if path.exists() and not path.is_file() and not path.is_dir():
        raise InputError(f"{flag} {path} is a pipe or a device, which can be read only once; write it to a file first")


@lru_cache
def subset_named(text: str) -> str | None:
    """training, validation or testing, by any of its usual spellings, such as "Val", "test_set" or "train-1"."""
    plain = re.sub(r"[\W\d_]+", "", text.casefold())
    for ending in ("", "set", "subset", "split", "data", "videos"):
        for subset, spellings in _SUBSETS.items():
            if plain.endswith(ending) and plain.removesuffix(ending) in spellings:
                return subset
    return None


def subset_of(value: object, where: str) -> str:
    subset = subset_named(value) if isinstance(value, str) else None
    if subset is None:
        raise InputError(f"{where} has the subset {value!r}; it must be training, validation or testing")
    return subset


def duration_of(value: object, where: str) -> float | None:
    if value is None:
        return None
    duration = seconds_of(value)
    if duration is None or duration <= 0:
        raise InputError(f"{where} has the duration {value!r}; it must be positive seconds")
    return duration


def segment_of(start: object, end: object, label: object, where: str) -> Segment:
    start_s, end_s = seconds_of(start), seconds_of(end)
    if start_s is None or end_s is None:
        raise InputError(f"{where} runs from {start!r} to {end!r}; both must be finite seconds, or hh:mm:ss.ff")
    if start_s > end_s:
        raise InputError(f"{where} starts at {start_s} s, after its end at {end_s} s")
    if not isinstance(label, str) or not label.strip():
        raise InputError(f"{where} needs a label, not {label!r}")
    if not label.isascii() and any("\ud800" <= character <= "\udfff" for character in label):
        raise InputError(f"{where} has the label {label!r}, which holds half a character")
    return Segment(start_s, end_s, sys.intern(label.strip()))


_CLOCK = re.compile(r"(?:(?P<hours>\d{1,4}):)?(?P<minutes>\d{1,4}):(?P<seconds>\d{1,2}(?:[.,]\d*)?)", re.ASCII)
_DECIMAL_COMMA = re.compile(r"[+-]?\d+,\d+", re.ASCII)


def seconds_of(value: object) -> float | None:
    """A finite number of seconds, or None: a number, or its text, also with a decimal comma, or as hh:mm:ss or mm:ss
    with or without a fraction. bool is an int to Python and never a time.
    """
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    if isinstance(value, str):
        value = value.strip()
        if "_" in value:  # which is between digits to Python alone
            return None
        if ":" in value and (clock := _CLOCK.fullmatch(value)):
            hours, minutes = int(clock["hours"] or 0), int(clock["minutes"])
            seconds = float(clock["seconds"].replace(",", "."))
            # 61 s, or 61 min beside hours, is some other notation
            sensible = seconds < 60 and (clock["hours"] is None or minutes < 60)
            return 3600 * hours + 60 * minutes + seconds if sensible else None
        if "," in value and _DECIMAL_COMMA.fullmatch(value):
            value = value.replace(",", ".")
    try:
        seconds = float(value)
    except (ValueError, OverflowError):
        return None
    return seconds if math.isfinite(seconds) else None

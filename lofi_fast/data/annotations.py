"""Ground truth of temporal action localization, read from the formats people have.

Times are seconds on the file's own clock, the one that players and labelling tools show: 0 is where the container
starts, also where its sound begins before its pictures (a cut by stream copy does that).

ActivityNet and HACS publish ``{"database": {name: {"subset", "duration", "annotations": [{"segment", "label"}]}}}``;
THUMOS14 circulates in the same form with its numbers as strings; everyone else has a table. All of them come out as
`Annotations`, in seconds. What can be repaired without a guess is repaired and said in `Annotations.notes`; anything
else is an `InputError` that names the file, the video and the segment.
"""

from __future__ import annotations

import csv
import io
import json
import math
import os
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lofi_fast.errors import InputError

_SUBSETS = {
    "training": ("train", "training", "trn", "tr", "learn", "learning"),
    "validation": ("val", "valid", "validation", "validate", "dev", "development", "eval", "evaluation"),
    "testing": ("test", "testing", "tst"),
}
_COLUMNS = ("video", "start", "end", "label")  # that a table of labels must have
UNASSIGNED = "unassigned"  # the subset of every video of labels that tell none


@dataclass(frozen=True)
class Segment:
    """One action: `start` and `end` in seconds on the file's clock, start <= end."""

    start: float
    end: float
    label: str


@dataclass(frozen=True)
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
        return tuple(sorted(_labels(self.subset("validation")) - _labels(self.subset("training"))))


@dataclass
class _Repairs:
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


def load_annotations(path: Path, *, clip: bool = True) -> Annotations:
    """Reads a .json file in ActivityNet form or a .csv file with the header video,start,end,label[,subset][,duration].

    Seconds may be numbers or strings, also with a decimal comma or as hh:mm:ss.ff. Cells of a .csv (.tsv) file are
    separated by what separates its first line: comma, semicolon, tab, bar, or what "sep=" says; lines that begin with
    "#" are comments. A .csv row whose start, end and label are all empty names a video without segments. Without any
    subset all videos are UNASSIGNED.
    `clip`: segments to the durations that the labels tell; not where the files themselves are there to tell.

    Raises InputError for an unreadable or malformed file, start > end, seconds that are not finite numbers,
    a duration that is not positive, missing fields and unknown subsets.
    """
    path = Path(path)
    if path.suffix.lower() not in (".json", ".csv", ".tsv"):
        raise InputError(f"--annotations {path} must be a .json file (ActivityNet form) or a .csv file")
    try:
        # utf-8-sig: spreadsheets write a byte order mark, which would become part of the first column's name
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise InputError(f"--annotations {path} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise InputError(f"--annotations {path} is not UTF-8 text (byte {error.start})") from error

    repairs = _Repairs()
    if path.suffix.lower() == ".json":
        videos = _videos_of_json(path, text, repairs, clip)
    else:
        videos = _videos_of_csv(path, text, repairs, clip)
    if not videos:
        raise InputError(f"{path} holds no video")

    notes = list(repairs.sentences(str(path)))
    classes = tuple(sorted(_labels(v for v in videos if v.subset != "testing")))
    annotations = Annotations(tuple(videos), classes, ())
    untrained = annotations.untrained_classes
    if untrained and annotations.subset("training"):
        shown = ", ".join(untrained[:5]) + (", ..." if len(untrained) > 5 else "")
        plural = "es" if len(untrained) > 1 else ""
        notes.append(f"{path}: {len(untrained)} class{plural} of validation never seen in training: {shown}")
    notes += _spellings(classes, path)
    return Annotations(annotations.videos, classes, tuple(notes), repairs.counts["duplicate"])


def _spellings(classes: Iterable[str], path: Path) -> list[str]:
    """A note about labels that are one word in several spellings, and so several classes."""
    alike: dict[str, list[str]] = {}
    for label in classes:
        alike.setdefault(plain_spelling(label), []).append(label)
    several = [spellings for spellings in alike.values() if len(spellings) > 1]
    if not several:
        return []
    shown = "; ".join(" and ".join(map(repr, spellings)) for spellings in several[:3])
    return [
        f"{path}: labels that are spelt almost alike are classes of their own: {shown}{'; ...' * bool(several[3:])}"
    ]


def plain_spelling(label: str) -> str:
    """What spellings of one word have in common: no case, and one space for white space, dashes and underscores."""
    return re.sub(r"[\s_-]+", " ", unicodedata.normalize("NFKC", label).casefold()).strip()


def num_videos(path: Path) -> int:
    """How many videos a file labels; 0 for one that `load_annotations` refuses."""
    try:
        return len(load_annotations(path, clip=False).videos)
    except InputError:
        return 0


def clip_to_duration(video: Video, duration: float) -> tuple[Video, tuple[str, ...]]:
    """The same video with its true `duration` (seconds, as probed) and its segments clipped to it; and what changed.

    Segments wholly after the end are dropped. ValueError when the duration is not a positive number.
    """
    if not (math.isfinite(duration) and duration > 0):
        raise ValueError(f"duration of {video.name} must be positive seconds, not {duration}")
    repairs = _Repairs()
    segments = _repaired(video.segments, duration, repairs)
    # zero-length segments were told of when the file was read
    repairs.counts.pop("zero", None)
    return Video(video.name, video.subset, duration, segments), repairs.sentences(video.name)


def _labels(videos: Iterable[Video]) -> set[str]:
    return {segment.label for video in videos for segment in video.segments}


def _repaired(segments: Iterable[Segment], duration: float | None, repairs: _Repairs) -> tuple[Segment, ...]:
    end_of_video = math.inf if duration is None else duration
    kept: dict[Segment, None] = {}
    for given in segments:
        start, end = max(given.start, 0.0), min(given.end, end_of_video)
        # a segment that only touches the video's first or last instant from outside has nothing inside it either
        if start > end or (start == end and given.start < given.end):
            repairs.counts["outside"] += 1
            continue
        segment = Segment(start, end, given.label)
        if segment in kept:
            repairs.counts["duplicate"] += 1
            continue
        kept[segment] = None
        repairs.counts["zero"] += start == end
        repairs.counts["early"] += start != given.start
        repairs.counts["clipped"] += end != given.end
    return tuple(kept)


def once_each(path: Path, ending: str = "") -> Callable[[list[tuple[str, Any]]], dict[str, Any]]:
    """json's `object_pairs_hook` that refuses a key which stands twice: json keeps the last, and a video would be lost
    without a word. `ending`: of the sentence.
    """

    def checked(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            twice = next(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
            raise InputError(f"{path}: the key {twice!r} appears twice in one object{ending}")
        return found

    return checked


def _videos_of_json(path: Path, text: str, repairs: _Repairs, clip: bool) -> list[Video]:
    try:
        content = json.loads(text, object_pairs_hook=once_each(path))
    except json.JSONDecodeError as error:
        raise InputError(f"{path} is not valid JSON: {error.msg} at line {error.lineno}") from error
    except ValueError as error:  # a whole number of thousands of digits
        raise InputError(f"{path} is not an annotation file: {error}") from error
    except RecursionError as error:
        raise InputError(f"{path} is not an annotation file: it is nested too deeply") from error
    database = content.get("database") if isinstance(content, dict) else None
    if not isinstance(database, dict):
        raise InputError(f'{path} is not in ActivityNet form: it needs an object "database" of videos')

    unassigned = not any(isinstance(entry, dict) and "subset" in entry for entry in database.values())
    videos = []
    for name, entry in database.items():
        where = f"{path}: video {name}"
        if not name.strip():
            raise InputError(f"{path}: a video has an empty name")
        try:
            os.fsencode(name)
        except UnicodeEncodeError:
            raise InputError(
                f"{path}: no file can have the name {name!r} of a video: it holds half a character"
            ) from None
        if not isinstance(entry, dict):
            raise InputError(f"{where} must be an object")
        subset = UNASSIGNED if unassigned else _subset(entry.get("subset"), where)
        duration = _duration(entry.get("duration"), where)
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
            segments.append(_segment(bounds[0], bounds[1], item.get("label"), at))
        videos.append(Video(name, subset, duration, _repaired(segments, duration if clip else None, repairs)))
    return videos


def _videos_of_csv(path: Path, text: str, repairs: _Repairs, clip: bool) -> list[Video]:
    separator, text, skipped = _table(text)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=separator, skipinitialspace=separator != "\t")
    columns = [column.strip().lower() for column in next(reader, [])]
    missing = [column for column in _COLUMNS if column not in columns]
    if missing:
        raise InputError(
            f"{path} needs a first line video,start,end,label[,subset][,duration]; it lacks {', '.join(missing)}"
        )
    if len(set(columns)) < len(columns):
        raise InputError(f"{path} names a column twice in its first line")

    segments: dict[str, list[Segment]] = {}
    told: dict[str, dict[str, str | float | None]] = {}
    try:
        for row in reader:
            if not any(cell.strip() for cell in row):
                continue
            line = f"{path} line {skipped + reader.line_num}"
            if len(row) != len(columns):
                if row[0].lstrip().startswith("#"):
                    continue  # a comment
                raise InputError(f"{line} has {len(row)} cells, the first line has {len(columns)}")
            cell = {column: value.strip() for column, value in zip(columns, row, strict=True)}
            name = cell["video"]
            if not name:
                raise InputError(f"{line} has no video name")
            where = f"{line}: video {name}"
            facts: dict[str, str | float | None] = {"duration": _duration(cell.get("duration") or None, where)}
            if "subset" in columns:
                facts["subset"] = _subset(cell["subset"], where)
            earlier = told.setdefault(name, facts)
            for fact, value in facts.items():
                if earlier[fact] is None:
                    earlier[fact] = value
                elif value is not None and earlier[fact] != value:
                    raise InputError(f"{where} has the {fact} {value}, an earlier line says {earlier[fact]}")
            own = segments.setdefault(name, [])
            if cell["start"] or cell["end"] or cell["label"]:
                own.append(_segment(cell["start"], cell["end"], cell["label"], f"{where}, segment {len(own)}"))
    except csv.Error as error:
        raise InputError(f"{path} line {skipped + reader.line_num} is not valid CSV: {error}") from error

    videos = []
    for name, own in segments.items():
        duration = told[name]["duration"]
        assert duration is None or isinstance(duration, float)
        subset = str(told[name].get("subset", UNASSIGNED))
        videos.append(Video(name, subset, duration, _repaired(own, duration if clip else None, repairs)))
    return videos


_LINE = re.compile(r"([^\r\n]*)(?:\r\n|\r|\n|$)")


def _table(text: str) -> tuple[str, str, int]:
    """What separates the cells, the text from the line with the columns' names on, and how many lines stand before it:
    empty ones, comments that begin with "#", and "sep=;", by which spreadsheets tell the separator.
    """
    told, at, skipped = "", 0, 0
    while at < len(text):
        match = _LINE.match(text, at)
        assert match is not None  # every line is one
        line = match[1].strip(" \"'")
        if line.lower().startswith("sep=") and len(line) <= 5:
            told = line[4:] or "\t"
        elif line.startswith("#") and set(_COLUMNS) <= {
            cell.strip(" \"'#").lower() for cell in re.split(r"[,;\t|]", line)
        }:
            text = text[: match.start()] + match[1].replace("#", " ", 1) + text[match.end(1) :]
            break
        elif line.strip(",;\t|\"' ") and not line.startswith("#"):
            break
        at, skipped = match.end(), skipped + 1
    text = text[at:]
    # the first line holds nothing but names of columns
    first = text[: re.search(r"[\r\n]|$", text).start()]  # type: ignore[union-attr]
    return told or max(",;\t|", key=first.count), text, skipped


def subset_named(text: str) -> str | None:
    """training, validation or testing, by any of its usual spellings, such as "Val", "test_set" or "train-1"."""
    plain = re.sub(r"[\W\d_]+", "", text.casefold())
    for ending in ("", "set", "subset", "split", "data", "videos"):
        for subset, spellings in _SUBSETS.items():
            if plain.endswith(ending) and plain.removesuffix(ending) in spellings:
                return subset
    return None


def _subset(value: object, where: str) -> str:
    subset = subset_named(value) if isinstance(value, str) else None
    if subset is None:
        raise InputError(f"{where} has the subset {value!r}; it must be training, validation or testing")
    return subset


def _duration(value: object, where: str) -> float | None:
    if value is None:
        return None
    duration = seconds_of(value)
    if duration is None or duration <= 0:
        raise InputError(f"{where} has the duration {value!r}; it must be positive seconds")
    return duration


def _segment(start: object, end: object, label: object, where: str) -> Segment:
    start_s, end_s = seconds_of(start), seconds_of(end)
    if start_s is None or end_s is None:
        raise InputError(f"{where} runs from {start!r} to {end!r}; both must be finite seconds, or hh:mm:ss.ff")
    if start_s > end_s:
        raise InputError(f"{where} starts at {start_s} s, after its end at {end_s} s")
    if not isinstance(label, str) or not label.strip():
        raise InputError(f"{where} needs a label, not {label!r}")
    if any("\ud800" <= character <= "\udfff" for character in label):
        raise InputError(f"{where} has the label {label!r}, which holds half a character")
    return Segment(start_s, end_s, label.strip())


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
        if clock := _CLOCK.fullmatch(value):
            hours, minutes = int(clock["hours"] or 0), int(clock["minutes"])
            seconds = float(clock["seconds"].replace(",", "."))
            # 61 s, or 61 min beside hours, is some other notation
            sensible = seconds < 60 and (clock["hours"] is None or minutes < 60)
            return 3600 * hours + 60 * minutes + seconds if sensible else None
        if _DECIMAL_COMMA.fullmatch(value):
            value = value.replace(",", ".")
    try:
        seconds = float(value)
    except (ValueError, OverflowError):
        return None
    return seconds if math.isfinite(seconds) else None

"""A file of labels as the formats get it, and how what it holds becomes videos."""

from __future__ import annotations

import csv
import io
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Annotated
from urllib.parse import unquote
from xml.etree import ElementTree
from xml.etree.ElementTree import Element

from lofi_fast.config import FPS, LABEL, TIERS, DataConfig
from lofi_fast.data.labels import (
    UNASSIGNED,
    Repairs,
    Segment,
    Video,
    duration_of,
    repaired,
    seconds_of,
    segment_of,
    subset_named,
)
from lofi_fast.data.matching import EXTENSIONS, match_videos
from lofi_fast.data.video import stated_duration, stated_rate
from lofi_fast.errors import InputError
from lofi_fast.settings import Setting

_SOUND = frozenset((".aac", ".aif", ".flac", ".m4a", ".mp3", ".ogg", ".opus", ".wav", ".wma"))
_COLUMNS = ("video", "start", "end", "label")  # of the plain table, which may stand in a comment
_WORDS = ("video", "label")  # columns whose cells have one line
LARGEST_RATE = 1000.0  # frames a second


@dataclass(frozen=True)
class FormatOptions:
    """What some formats leave open, in the words of the flags.

    fps: frames a second, for labels that count frames; None: what the file says, or else the videos. label: which of
    the several labels that a segment has. tiers: those of an ELAN file that hold the actions. videos: the folder of the
    videos, which are asked for what a file does not tell. background: labels of frames that are no action, in lower
    case; None: the usual ones.
    """

    fps: float | None = None
    label: str | None = None
    tiers: tuple[str, ...] = ()
    videos: Path | None = None
    background: frozenset[str] | None = None

    @staticmethod
    def of(data: DataConfig) -> FormatOptions:
        """As the settings of a run say."""
        return FormatOptions(data.fps, data.label, tier_names(data.tiers), Path(data.videos) if data.videos else None)

    @property
    def given(self) -> frozenset[str]:
        """Names of the flags that are given."""
        return frozenset(f.name for f in fields(self) if f.name != "videos" and getattr(self, f.name))


NO_OPTIONS = FormatOptions()


@dataclass(frozen=True)
class LabelFlags:
    """The same as flags of a command that reads labels."""

    fps: Annotated[float | None, FPS] = None
    label: Annotated[str | None, LABEL] = None
    tiers: Annotated[str | None, TIERS] = None
    videos: Annotated[
        Path | None,
        Setting("folder of the videos, which are asked for what labels do not tell", "DIR", unset="not asked"),
    ] = None

    @property
    def options(self) -> FormatOptions:
        return FormatOptions(self.fps, self.label, tier_names(self.tiers), self.videos)


def tier_names(text: str | None) -> tuple[str, ...]:
    """ "A,B": names of tiers; none of None."""
    return tuple(name.strip() for name in (text or "").split(",") if name.strip())


@dataclass
class LabelFile:
    """One file, its text, and how it is to be read. `repairs`: counts what is repaired; None: segments stay as they
    are. `clip`: to the durations that the labels tell. `notes`: sentences for the user, which a format adds to.
    `media`: the path of each video's file, by the video's name, where the format tells it.
    """

    path: Path
    text: str
    options: FormatOptions = NO_OPTIONS
    clip: bool = True
    repairs: Repairs | None = None
    notes: list[str] = field(default_factory=list)
    media: dict[str, str] = field(default_factory=dict)

    def named(self, paths: Iterable[str]) -> dict[str, str]:
        """A name for each path of a media file, as `file_names` has it; a folder of labels tells videos apart by it."""
        names = file_names(paths)
        self.media |= {name: path for path, name in names.items()}
        return names

    def note(self, sentence: str) -> None:
        self.notes.append(f"{self.path}: {sentence}")

    def made(self, name: str, subset: str, duration: float | None, segments: Iterable[Segment]) -> Video:
        """A video with what can be repaired without a guess repaired."""
        if self.repairs is None:
            return Video(name, subset, duration, tuple(segments))
        return Video(name, subset, duration, repaired(segments, duration if self.clip else None, self.repairs))

    def subset_of_name(self) -> str:
        """The subset that a file's name tells, such as training for train.json or EPIC_100_train.csv; UNASSIGNED where
        it tells none.
        """
        for word in reversed(re.split(r"[\W_]+", self.path.stem)):
            if subset := subset_named(word):
                return subset
        return UNASSIGNED

    def rates(self, told: Mapping[str, float | None]) -> dict[str, float]:
        """Frames a second of each video: as --fps says, or else as the file does (`told`), or else as the videos do.

        Raises InputError where none of them says it.
        """
        if self.options.fps is not None:
            return dict.fromkeys(told, self.options.fps)
        silent = [name for name, rate in told.items() if rate is None]
        found = {name: stated_rate(path) for name, path in self._files(silent).items()}
        rates = {name: found.get(name, 0.0) if rate is None else rate for name, rate in told.items()}
        if unknown := next((name for name, rate in rates.items() if not 0 < rate <= LARGEST_RATE), None):
            raise InputError(
                f"{self.path}: its times are frames, and it does not say how many there are a second in {unknown}; "
                "give --fps, or the folder of the videos with --videos"
            )
        return rates

    def lengths(self, names: Iterable[str]) -> dict[str, float]:
        """Seconds that the headers of video files say they have; those that are not there are left out."""
        found = {name: stated_duration(path) for name, path in self._files(list(names)).items()}
        return {name: seconds for name, seconds in found.items() if seconds > 0}

    def _files(self, names: Sequence[str]) -> dict[str, Path]:
        if not names or self.options.videos is None or not self.options.videos.is_dir():
            return {}
        return match_videos(self.options.videos, names).paths


@dataclass(frozen=True)
class Medium:
    """A video as a tool opens it: the path of its file, or a name; seconds, and frames a second, where known."""

    path: str
    duration: float | None = None
    fps: float | None = None


class Gathered:
    """Videos of a file, of which the segments come in any order."""

    def __init__(self, file: LabelFile) -> None:
        self._file = file
        self._segments: dict[str, list[Segment]] = {}
        self._subsets: dict[str, str] = {}
        self._durations: dict[str, float] = {}

    def video(self, name: str, where: str, *, subset: str | None = None, duration: object = None) -> None:
        """Name a video and what is told of it. Raises InputError for a name that no file can have, and for facts that
        contradict earlier ones.
        """
        if not isinstance(name, str) or name not in self._segments:
            check_name(name, where)
            self._segments[name] = []
        if subset is not None and self._subsets.setdefault(name, subset) != subset:
            raise InputError(f"{where} has the subset {subset}, an earlier line says {self._subsets[name]}")
        seconds = duration_of(duration, where)
        if seconds is not None and self._durations.setdefault(name, seconds) != seconds:
            raise InputError(f"{where} has the duration {seconds}, an earlier line says {self._durations[name]}")

    def segment(self, name: str, start: object, end: object, label: object, where: str) -> None:
        """Add a segment; times as `labels.seconds_of` reads them. Raises InputError for one that cannot be."""
        own = self._segments.setdefault(name, [])
        own.append(segment_of(start, end, label, f"{where}, segment {len(own)}"))

    def videos(self) -> list[Video]:
        return [
            self._file.made(name, self._subsets.get(name, UNASSIGNED), self._durations.get(name), own)
            for name, own in self._segments.items()
        ]


def runs_backwards(start: object, end: object) -> bool:
    """Whether an action ends before it starts, as a few of Charades as it is published do."""
    first, last = seconds_of(start), seconds_of(end)
    return first is not None and last is not None and first > last


def check_name(name: object, where: str) -> None:
    """Raises InputError, which begins with `where`, for a name that no video file can have."""
    if not isinstance(name, str) or not name.strip():
        raise InputError(f"{where}: a video has an empty name")
    try:
        os.fsencode(name)
    except UnicodeEncodeError:
        raise InputError(f"{where}: no file can have the name {name!r} of a video: it holds half a character") from None


def file_names(paths: Iterable[str]) -> dict[str, str]:
    """A name for each path or URL of a media file: that of the file without its extension, with as many of its folders
    as tell it from the others.
    """
    parts = {path: _parts(path) for path in paths}
    names: dict[str, str] = {}
    for depth in range(1, max(map(len, parts.values()), default=0) + 1):
        of_depth: dict[tuple[str, ...], list[str]] = {}
        for path, of in parts.items():
            of_depth.setdefault(of[-depth:], []).append(path)
        for of, those in of_depth.items():
            if len({parts[path] for path in those}) == 1:
                for path in those:
                    names.setdefault(path, "/".join(of))
    return names


def _parts(path: str) -> tuple[str, ...]:
    text = path.strip()
    if re.match(r"https?://", text, re.IGNORECASE):
        text = re.split(r"[?#]", text)[0]  # what is asked of a server is no part of the name
    plain = re.sub(r"^[A-Za-z][\w+.-]+://[^/]*/|^file:/*", "", text)
    plain = (plain if plain == text else unquote(plain)).replace("\\", "/")
    parts = [part for part in plain.split("/") if part not in ("", ".", "..")]
    if not parts:
        return (path,)
    stem, extension = os.path.splitext(parts[-1])
    if stem and extension.lower() in EXTENSIONS | _SOUND:
        parts[-1] = stem
    return tuple(parts)


def shown(words: Iterable[str], most: int = 5) -> str:
    """The first few of them for a sentence."""
    listed = list(words)
    return ", ".join(listed[:most]) + (", ..." if listed[most:] else "")


def plural(count: int, word: str) -> str:
    return f"{count} {word}{'' if count == 1 else 's'}"


class Table:
    """The rows of a table whose first line names the columns: their names in lower case, and each row with the number
    of its line.
    """

    def __init__(self, path: Path, text: str, skipped: int = 0) -> None:
        self.path = path
        self.separator, rest, before = _beginning(text)
        self._skipped = skipped + before
        self._begins = 1  # the line of the row that is read next, after those skipped
        strips = self.separator != "\t"
        self._reader = csv.reader(io.StringIO(rest, newline=""), delimiter=self.separator, skipinitialspace=strips)
        try:
            self.columns = _without_blanks([column.strip().lower() for column in next(self._reader, [])])
        except csv.Error as error:
            raise self._invalid(error) from error
        self._begins = self._reader.line_num + 1

    def rows(self) -> Iterator[tuple[str, dict[str, str]]]:
        """(file and line for a sentence, cells by column). Empty lines and comments are passed over.

        Raises InputError for columns that are named twice, for rows of another length than the first line, and for the
        name of a video or a label of several lines.
        """
        if len(set(self.columns)) < len(self.columns):
            raise InputError(f"{self.path} names a column twice in its first line")
        words = [name for name in _WORDS if name in self.columns]
        try:
            for row in self._reader:
                self._begins = self._reader.line_num + 1
                row = [cell.strip() for cell in row]
                if not any(row):
                    continue
                where = f"{self.path} line {self._skipped + self._reader.line_num}"
                if len(row) > len(self.columns) >= len(_without_blanks(row)):
                    row = row[: len(self.columns)]
                if len(row) != len(self.columns):
                    if row[0].startswith("#"):
                        continue  # a comment
                    raise InputError(f"{where} has {len(row)} cells, the first line has {len(self.columns)}")
                cells = dict(zip(self.columns, row, strict=True))
                if torn := next((name for name in words if "\n" in cells[name] or "\r" in cells[name]), None):
                    raise InputError(
                        f"{where} ends a {torn} that began on an earlier line; is a quotation mark left open?"
                    )
                yield where, cells
        except csv.Error as error:
            raise self._invalid(error) from error

    def _invalid(self, error: csv.Error) -> InputError:
        open_quote = "; is a quotation mark left open?" if self._reader.line_num > self._begins else ""
        return InputError(f"{self.path} line {self._skipped + self._begins} is not valid CSV: {error}{open_quote}")


def _without_blanks(cells: list[str]) -> list[str]:
    """Without the empty cells behind the last one, which spreadsheets leave where something was deleted."""
    last = max((place for place, cell in enumerate(cells, 1) if cell.strip()), default=0)
    return cells[:last]


_LINE = re.compile(r"([^\r\n]*)(?:\r\n|\r|\n|$)")


def _beginning(text: str) -> tuple[str, str, int]:
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
    usual = max(",;\t|", key=first.count)
    return told or (usual if first.count(usual) else _sniffed(text[:4096])), text, skipped


def _sniffed(text: str) -> str:
    """The separator of a table that none of the usual ones divides."""
    try:
        found = csv.Sniffer().sniff(text, delimiters=" :^~/&").delimiter
    except csv.Error:
        return ","
    return found


def xml_root(file: LabelFile) -> Element:
    """The root of a file's XML. Raises InputError for what is none."""
    try:
        return ElementTree.fromstring(file.text)
    except ElementTree.ParseError as error:
        raise InputError(f"{file.path} is not valid XML: {error}") from error
    except ValueError as error:  # an encoding that contradicts itself
        raise InputError(f"{file.path} is not readable XML: {error}") from error

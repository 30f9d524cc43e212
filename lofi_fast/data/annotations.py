"""Labels of temporal action localization, read from any of the formats that people have (`formats/`, a file each).

The format is recognised by content. Whatever it is, what comes out is `Annotations`, in seconds on the clock of the
video files. What can be repaired or left out without a guess is, and is said in `Annotations.notes`; anything else is
an `InputError` that names the file and the place in it.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

from lofi_fast.data.formats import (
    actions,
    activitynet,
    boris,
    boris_table,
    charades,
    cholect50,
    cvat,
    ego4d,
    elan,
    epic,
    frames,
    hacs_clips,
    label_studio,
    soccer,
    spot,
    subtitles,
    table,
    thumos,
    trace,
    via,
)
from lofi_fast.data.formats.file import NO_OPTIONS, FormatOptions, LabelFile, Table, file_names, plural, shown, xml_root
from lofi_fast.data.labels import (
    UNASSIGNED,
    Annotations,
    Repairs,
    Segment,
    Video,
    clip_to_duration,
    labels_of,
    plain_spelling,
    require_file,
    seconds_of,
    subset_named,
)
from lofi_fast.data.matching import match_videos
from lofi_fast.errors import InputError
from lofi_fast.texts import decoded, once_each

__all__ = [
    "UNASSIGNED",
    "Annotations",
    "FormatOptions",
    "Segment",
    "Video",
    "clip_to_duration",
    "is_activitynet",
    "load_annotations",
    "num_videos",
    "plain_spelling",
    "require_file",
    "seconds_of",
    "subset_named",
    "unused_flags",
]

# Each has NAME, OPTIONS (of FormatOptions, those that it uses), `recognises(content)` and `read(file, content)`.
JSON = (activitynet, boris, cholect50, via, soccer, ego4d, spot, label_studio, actions)
TABLES = (table, boris_table, epic, trace, charades, hacs_clips)
XML = (elan, cvat)
SUFFIXES = frozenset(
    (".json", ".csv", ".tsv", ".txt", ".eaf", ".xml", ".boris", ".labels", ".srt", ".vtt")
)  # looked for in folders
NOTES_SHOWN = 30  # of the files of a folder
MOST_FILES = 100_000  # of labels in one folder
BEGINNING = 4096  # bytes of a file, which tell whether it is a text


def load_annotations(path: Path, *, clip: bool = True, options: FormatOptions = NO_OPTIONS) -> Annotations:
    """Reads a file of labels, or all those in a folder, of which the videos are put together.

    ActivityNet-form JSON and tables with video,start,end,label[,subset][,duration] are the plain ones; docs/formats.md
    lists the others. Seconds may be numbers or texts, also with a decimal comma or as hh:mm:ss.ff. Without any subset
    all videos are UNASSIGNED. A point event is a segment that starts and ends at once.
    `clip`: segments to the durations that the labels tell; not where the files themselves are there to tell.
    `options`: what some formats leave open; one that the format has no use for is noted.

    Raises InputError for an unreadable or malformed file, start > end, seconds that are not finite numbers,
    a duration that is not positive, missing fields, unknown subsets, and frames without a rate.
    """
    path = Path(path)
    repairs = Repairs()
    if path.is_dir():
        videos, notes = _of_folder(path, clip, options, repairs)
    else:
        file = LabelFile(path, _text(path), options, clip, repairs)
        read, used = _reader(file)
        videos, notes = read(file), file.notes
        notes += unused_flags(path, options, used)
    if not videos:
        raise InputError(f"{path} holds no video")

    notes += repairs.sentences(str(path))
    classes = tuple(sorted(labels_of(v for v in videos if v.subset != "testing")))
    annotations = Annotations(tuple(videos), classes, ())
    untrained = annotations.untrained_classes
    if untrained and annotations.subset("training"):
        plural_ending = "es" if len(untrained) > 1 else ""
        notes.append(
            f"{path}: {len(untrained)} class{plural_ending} of validation never seen in training: {shown(untrained)}"
        )
    notes += _spellings(classes, path)
    return Annotations(annotations.videos, classes, tuple(notes), repairs.counts["duplicate"])


def num_videos(path: Path, options: FormatOptions = NO_OPTIONS) -> int:
    """How many videos a file labels; 0 for one that `load_annotations` refuses."""
    try:
        return len(load_annotations(path, clip=False, options=options).videos)
    except InputError:
        return 0


def is_activitynet(path: Path) -> bool:
    """Whether a file is to be taken as ActivityNet's JSON: it is that, or nothing else can be told of it."""
    if path.is_dir() or path.suffix.lower() in (".csv", ".tsv", ".txt"):
        return False
    try:
        text = _text(path)
        return '"database"' in text or _recognised(LabelFile(path, text)) is None
    except InputError:
        return True


Reader = Callable[[LabelFile], list[Video]]


def _reader(file: LabelFile) -> tuple[Reader, frozenset[str]]:
    """What reads a file, and the options that it uses. Raises InputError for a file of no known format."""
    found = _recognised(file)
    if found is not None:
        return found
    path, suffix = file.path, file.path.suffix.lower()
    if suffix in (".csv", ".tsv"):
        return partial(table.read, table=Table(path, file.text)), table.OPTIONS
    if suffix == ".json":
        raise InputError(
            f'{path} is not in ActivityNet form: it needs an object "database" of videos (nor is it in another form '
            "that docs/formats.md lists)"
        )
    raise InputError(
        f"--annotations {path} must be a .json file (ActivityNet form), a .csv file, or in another format that "
        "docs/formats.md lists"
    )


def _recognised(file: LabelFile) -> tuple[Reader, frozenset[str]] | None:
    """The same, or None."""
    path, text, suffix = file.path, file.text, file.path.suffix.lower()
    beginning = text[:100].lstrip()[:1]
    is_table = suffix in (".csv", ".tsv")
    if suffix == ".json" or (beginning and beginning in "{[" and not is_table):
        content = _json(path, text)
        return _first(JSON, content)
    if beginning == "<":
        return _first(XML, xml_root(file))
    if via.recognises_text(text):
        return via.read_text, via.OPTIONS
    if is_table or _NAMES_COLUMNS.search(text[:10_000]):
        if (above := boris_table.begins(text)) is not None:
            rest = "".join(text.splitlines(keepends=True)[above:])
            return partial(boris_table.read, table=Table(path, rest, above)), boris_table.OPTIONS
        rows = Table(path, text)
        of = next((of for of in TABLES if of.recognises(rows.columns)), None)
        if of is not None:
            return partial(of.read, table=rows), of.OPTIONS
    if not is_table:
        for lines in (subtitles, thumos, frames):
            if lines.recognises(text) or (lines is subtitles and suffix in (".srt", ".vtt")):
                return lines.read, lines.OPTIONS
    return None


_NAMES_COLUMNS = re.compile(r"^.*(?:video|behavior|labelid).*[,;\t|].*$", re.IGNORECASE | re.MULTILINE)


def _first(formats: Iterable[ModuleType], content: Any) -> tuple[Reader, frozenset[str]] | None:
    """Of the formats that may have this content, the one that recognises it."""
    for of in formats:
        if of.recognises(content):
            return partial(of.read, content=content), of.OPTIONS
    return None


def _json(path: Path, text: str) -> Any:
    try:
        return json.loads(text, object_pairs_hook=once_each(path))
    except json.JSONDecodeError as error:
        raise InputError(f"{path} is not valid JSON: {error.msg} at line {error.lineno}") from error
    except ValueError as error:  # a whole number of thousands of digits
        raise InputError(f"{path} is not an annotation file: {error}") from error
    except RecursionError as error:
        raise InputError(f"{path} is not an annotation file: it is nested too deeply") from error


def require_text(path: Path) -> None:
    """Raises InputError for a file that cannot be read, or that is no text, without reading all of it: it may be a
    video of gigabytes that was named in the place of the labels.
    """
    require_file(path, "--annotations")
    try:
        with path.open("rb") as file:
            head = file.read(BEGINNING)
    except OSError as error:
        raise InputError(f"--annotations {path} cannot be read: {error.strerror}") from error
    if b"\0" in head and not head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise InputError(
            f"--annotations {path} is not UTF-8 text (byte {head.index(0)}), but a file of another kind, such as a "
            "video; name the file of labels"
        )


def _text(path: Path) -> str:
    require_text(path)
    try:
        return decoded(path)
    except OSError as error:
        raise InputError(f"--annotations {path} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise InputError(
            f"--annotations {path} is not UTF-8 text (byte {error.start}); save it as UTF-8, which spreadsheets call "
            "CSV UTF-8"
        ) from error


def _of_folder(folder: Path, clip: bool, options: FormatOptions, repairs: Repairs) -> tuple[list[Video], list[str]]:
    """The videos of all files of labels below a folder, those of one name put together; and notes, each once."""
    paths = sorted(
        path
        for path in folder.rglob("*")
        if path.suffix.lower() in SUFFIXES
        and path.is_file()
        and not any(part.startswith(".") for part in path.relative_to(folder).parts)
    )
    if not paths:
        raise InputError(f"--annotations {folder} cannot be read: it is a folder without a file of labels")
    if len(paths) > MOST_FILES:
        raise InputError(
            f"--annotations {folder} holds {len(paths)} files; name the folder that holds the labels alone"
        )
    notes: dict[str, int] = {}
    used: frozenset[str] = frozenset()
    read: list[tuple[LabelFile, list[Video]]] = []
    others = []
    for path in paths:
        file = LabelFile(path, _text(path), options)
        reader = _recognised(file)
        if reader is None:
            others.append(path.name)
            continue
        used |= reader[1]
        read.append((file, reader[0](file)))
        file.text = ""  # it is read
        for note in file.notes:
            sentence = note.removeprefix(f"{path}: ")
            notes[sentence] = notes.get(sentence, 0) + 1
    found: dict[str, Video] = {}
    names, several = _told_apart(read, options.videos)
    for file, of_file in read:
        for given in of_file:
            video = replace(given, name=names.get((file.path, given.name), given.name))
            found[video.name] = _together(found[video.name], video, file.path) if video.name in found else video
    if not found:
        raise InputError(f"--annotations {folder} cannot be read: none of its {len(paths)} files is of a known format")
    assigned = {video.subset == UNASSIGNED for video in found.values()}
    if len(assigned) > 1:
        without = next(video.name for video in found.values() if video.subset == UNASSIGNED)
        raise InputError(
            f"{folder}: of some videos a subset is told, and of others, such as {without}, none; tell it of all"
        )
    whole = LabelFile(folder, "", options, clip, repairs)
    videos = [whole.made(video.name, video.subset, video.duration, video.segments) for video in found.values()]
    told = [f"{folder}: {note}" for note in several]
    told += [f"{folder}: {note}{f' ({count} files)' if count > 1 else ''}" for note, count in notes.items()]
    if told[NOTES_SHOWN:]:
        told = [*told[:NOTES_SHOWN], f"{folder}: {len(told) - NOTES_SHOWN} more notes of its files are left out"]
    if others:
        told.append(f"{folder}: {plural(len(others), 'file')} of no known format passed over: {shown(others)}")
    return videos, [*told, *unused_flags(folder, options, used)]


def _told_apart(
    read: Iterable[tuple[LabelFile, list[Video]]], folder: Path | None
) -> tuple[dict[tuple[Path, str], str], list[str]]:
    """Names for those videos of files that have one name and are not one video, by (file, name), with as many folders
    as tell them apart; and notes on what was made of one name. `folder`: of the videos.

    Paths of media files that differ mean several videos, unless the folder of the videos knows none of their folders.
    Labels that are called like their video, in several folders, mean one, unless it knows them.
    """
    places: dict[str, dict[Path, str]] = {}
    told: set[str] = set()  # names of which some file tells the path
    for file, videos in read:
        told |= file.media.keys()
        for video in videos:
            place = file.media.get(video.name, (file.path.parent / video.name).as_posix())
            places.setdefault(video.name, {})[file.path] = place
    apart = {name: file_names(of.values()) for name, of in places.items() if len(set(of.values())) > 1}
    apart = {name: of for name, of in apart.items() if len(set(of.values())) > 1}
    known: set[str] = set()
    if apart and folder is not None and folder.is_dir():
        found = match_videos(folder, sorted({name for of in apart.values() for name in of.values()})).paths
        below = {name: path.relative_to(folder) for name, path in found.items()}
        known = {n for n, path in below.items() if f"/{path.with_suffix('').as_posix()}".endswith(f"/{n}")}
    names: dict[tuple[Path, str], str] = {}
    together = []
    for name, of in apart.items():
        if known.intersection(of.values()) or (name in told and folder is None):
            names |= {(path, name): of[place] for path, place in places[name].items()}
        else:
            together.append(f"{name} of {shown(map(str, places[name]), 2)}")
    notes = []
    if names:
        words = shown(dict.fromkeys(names.values()))
        notes.append(f"files of one name in several folders are as many videos, which have a folder in theirs: {words}")
    if together:
        notes.append(
            f"the segments of {plural(len(together), 'video')} come from files in several folders and are put together "
            f"({shown(together, 3)})"
        )
    return names, notes


def _together(one: Video, other: Video, path: Path) -> Video:
    """One video out of what two files say of it. Raises InputError where they contradict each other."""
    subset = other.subset if one.subset == UNASSIGNED else one.subset
    if other.subset not in (subset, UNASSIGNED):
        raise InputError(
            f"{path}: video {one.name} has the subset {other.subset}, and another file of the folder says {subset}; "
            "name one file, or a folder of those alone that are meant"
        )
    durations = [duration for duration in (one.duration, other.duration) if duration is not None]
    return replace(one, subset=subset, duration=max(durations, default=None), segments=one.segments + other.segments)


def unused_flags(path: Path, options: FormatOptions, used: frozenset[str]) -> list[str]:
    """A note about flags that a format has no use for."""
    return [
        f"{path}: --{name} is not used: nothing in these labels asks for it" for name in sorted(options.given - used)
    ]


def _spellings(classes: Iterable[str], path: Path) -> list[str]:
    """A note about labels that are one word in several spellings, and so several classes."""
    alike: dict[str, list[str]] = {}
    for label in classes:
        alike.setdefault(plain_spelling(label), []).append(label)
    several = [spellings for spellings in alike.values() if len(spellings) > 1]
    if not several:
        return []
    told = "; ".join(" and ".join(map(repr, spellings)) for spellings in several[:3])
    return [f"{path}: labels that are spelt almost alike are classes of their own: {told}{'; ...' * bool(several[3:])}"]

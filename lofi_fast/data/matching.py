"""Which file a name in the labels means, and which files of a folder are videos."""

from __future__ import annotations

import os
import re
import unicodedata
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from lofi_fast.data.packages import opened, require_pyav
from lofi_fast.errors import InputError

EXTENSIONS = frozenset((
    ".264", ".265", ".3g2", ".3gp", ".amv", ".asf", ".avc", ".avi", ".divx", ".dv", ".f4v", ".flv", ".gxf", ".h264",
    ".h265", ".hevc", ".ivf", ".lrv", ".m1v", ".m2t", ".m2ts", ".m2v", ".m4v", ".mjpeg", ".mjpg", ".mkv", ".mov",
    ".mp4", ".mpe", ".mpeg", ".mpg", ".mts", ".mxf", ".nut", ".ogm", ".ogv", ".qt", ".rm", ".rmvb", ".tp", ".trp",
    ".ts", ".vob", ".webm", ".wmv", ".wtv", ".y4m",
))  # fmt: skip
# What lies beside videos under the same name. Any other file counts as one if it opens as one.
_COMPANIONS = frozenset((
    ".ass", ".bmp", ".csv", ".eaf", ".flac", ".gz", ".h5", ".hdf5", ".html", ".info", ".jpeg", ".jpg", ".json",
    ".jsonl", ".log", ".lrc", ".m3u", ".m3u8", ".m4a", ".md", ".mp3", ".mpd", ".npy", ".npz", ".part", ".partial",
    ".pkl", ".png", ".pt", ".pth", ".py", ".sdp", ".srt", ".ssa", ".sub", ".tar", ".toml", ".tsv", ".txt", ".vtt",
    ".wav", ".webp", ".xml", ".yaml", ".yml", ".zip",
))  # fmt: skip


_ELSEWHERE = re.compile(r"(?:[A-Za-z][\w+.-]*:)?/+|(?:\.\./)+")  # what a path from another place begins with

# Rules by which a name is matched that no file has, as a note tells them.
_MOVED = "whose path begins in another place"
_UNICODE = "whose letters are written in another Unicode form"
_SPACE = "which differs from it in white space"
_EXTENSION_CASE = "whose extension is in another case"
_NOTHING = "no video file of this name"


@dataclass(frozen=True)
class Matches:
    """paths: name -> file. absent: name -> one sentence about why there is none. notes: what was taken by a rule that
    the user should know of. unclear: name -> one sentence about why no training can start before it is mended: it may
    mean several files, or means one that has another name already.
    """

    paths: dict[str, Path]
    absent: dict[str, str]
    notes: tuple[str, ...]
    unclear: dict[str, str] = field(default_factory=dict)


def find_videos(folder: Path, names: Iterable[str]) -> Matches:
    """As `match_videos`, for names that are all clear: raises InputError where a name may mean several files, and where
    two names mean one.
    """
    matches = match_videos(folder, names)
    if matches.unclear:
        raise InputError(next(iter(matches.unclear.values())))
    return matches


def match_videos(folder: Path, names: Iterable[str], flag: str = "--videos ") -> Matches:
    """The file below `folder` that each name means: its path from there, or the end of that path, with or without its
    extension; also with "v_" before the file's name, ActivityNet's habit.

    `cam2/0001` is found as cam2/0001.mp4, and as day1/cam2/0001.mp4. A whole path from `folder` wins over the end of
    another one. A file whose extension tells nothing is opened to see whether it is a video. Where nothing fits, the
    end of a path from another place is taken with a note, and so are other white space and another Unicode form.
    Sentences name the folder behind `flag`. Raises InputError when the folder cannot be listed.
    """
    folder = Path(folder)
    files = _Files(folder, _files_below(folder, lambda suffix: suffix not in _COMPANIONS, flag))
    paths: dict[str, Path] = {}
    absent: dict[str, str] = {}
    unclear: dict[str, str] = {}
    loose: dict[str, list[str]] = {}  # rule -> names
    taken: dict[str, str] = {}  # file -> name
    for name in names:
        found, rule = files.of(name), ""
        if not found:
            found, rule = files.near(name)
        if not found:
            absent[name] = rule
        elif len(found) > 1:
            shown = ", ".join(str(path.relative_to(folder)) for path in found[:3]) + (", ..." if found[3:] else "")
            unclear[name] = (
                f"the labels' video {name!r} may be any of {len(found)} files below {flag}{folder}: {shown}; "
                f"write it with its folder and extension, like {found[0].relative_to(folder).as_posix()!r}"
            )
        elif (other := taken.setdefault(str(found[0]), name)) != name:
            unclear[name] = (
                f"{found[0]} is meant by two names in the labels, {other!r} and {name!r}; give it one of them"
            )
        else:
            paths[name] = found[0]
            if rule:
                loose.setdefault(rule, []).append(name)
    notes = [
        f"{paths[those[0]]} is taken for {those[0]!r}, {rule}"
        f"{f' ({len(those) - 1} more names are matched so)' if len(those) > 1 else ''}"
        for rule, those in loose.items()
    ]
    return Matches(paths, absent, tuple(notes), unclear)


def list_videos(folder: Path) -> list[Path]:
    """All files below `folder` that have the extension of a video, sorted. InputError when it cannot be listed."""
    return _files_below(Path(folder), lambda suffix: suffix in EXTENSIONS)


class _Files:
    """The files below a folder, to be asked for by name."""

    def __init__(self, folder: Path, files: list[Path]) -> None:
        self.folder = folder
        # last part of the path, with and without extension -> files
        self.videos: dict[str, list[Path]] = {}
        self.others: dict[str, list[Path]] = {}
        self._indices: dict[Callable[[str], str], dict[str, list[Path]]] = {}
        self._above = folder.absolute().parts
        for path in files:
            name = path.name
            stem, suffix = _split(name)
            index = self.videos if suffix.lower() in EXTENSIONS else self.others
            index.setdefault(name, []).append(path)
            if stem != name:
                index.setdefault(stem, []).append(path)

    def of(self, name: str) -> list[Path]:
        """The files that a name may mean: none, the one, or several that are as likely."""
        return self._at(self._parts(name))

    def near(self, name: str) -> tuple[list[Path], str]:
        """Files that a name may mean which is no file's, and the rule that finds them; none, and what to say of it."""
        parts = self._parts(name)
        if not parts:
            return [], _NOTHING
        if begins := _ELSEWHERE.match(name.replace("\\", "/")):
            ends = self._parts(name.replace("\\", "/")[begins.end() :])
            for k in range(len(ends)):
                if found := self._at(ends[k:]):
                    return found, _MOVED
        for form, rule in ((_form, _UNICODE), (_spaced, _SPACE)):
            if found := self._like(parts, form):
                return found, rule
        stem, extension = os.path.splitext(parts[-1])
        if extension.lower() in EXTENSIONS:
            same_stem = self._at((*parts[:-1], stem))
            if same_case := [path for path in same_stem if path.suffix.lower() == extension.lower()]:
                return same_case, _EXTENSION_CASE
            if same_stem:
                shown = same_stem[0].relative_to(self.folder)
                return [], f"{_NOTHING}, but there is {shown}; leave the extension out in the labels if it is that one"
        return [], _NOTHING + self._hint(parts)

    def _hint(self, parts: tuple[str, ...]) -> str:
        """What comes near to a name and is not taken for it, to be added to a sentence."""
        if found := self._like(parts, _folded):
            shown = found[0].relative_to(self.folder)
            return f", but {shown} differs from it only in upper and lower case; rename one of them"
        if len(parts) > 1 and (found := self._at(parts[-1:])):
            return f" in that folder, but there is {found[0].relative_to(self.folder)}"
        if folder := self._folders.get(parts[-1]):
            return f", but a folder, {folder.relative_to(self.folder)}"
        return ""

    def _at(self, parts: tuple[str, ...]) -> list[Path]:
        """The files that a path from the folder, or the end of one, may mean."""
        if not parts:
            return []
        for wanted in (parts, (*parts[:-1], f"v_{parts[-1]}")):
            for index in (self.videos, self.others):
                found = self._best(index, wanted)
                if index is self.others:
                    found = [path for path in found if _opens_as_video(path)]
                if found:
                    return found
        return []

    def _like(self, parts: tuple[str, ...], form: Callable[[str], str]) -> list[Path]:
        """Videos whose path, or the end of it, is the same as `parts` once both are brought into a form."""
        candidates = self._indexed(form).get(form(parts[-1]), [])
        wanted = tuple(form(part) for part in parts[:-1])
        return [path for path in candidates if tuple(map(form, path.parts[-len(parts) : -1])) == wanted]

    def _parts(self, name: str) -> tuple[str, ...]:
        """Parts of a path from the folder."""
        if "\\" in name and name not in self.videos:
            name = name.replace("\\", "/")  # labels that were made under Windows
        if name.startswith("/"):
            path = Path(name)
            if path.is_relative_to(self.folder.absolute()):
                name = path.relative_to(self.folder.absolute()).as_posix()
        parts = tuple(part for part in name.split("/") if part not in ("", "."))
        for count in range(len(parts) - 1, 0, -1):  # written from beside the folder, or from above it
            if parts[:count] == self._above[-count:] and not (self.folder / parts[0]).exists():
                return parts[count:]
        return parts

    def _best(self, index: Mapping[str, list[Path]], wanted: tuple[str, ...]) -> list[Path]:
        candidates = index.get(wanted[-1], [])
        if len(wanted) > 1:
            candidates = [path for path in candidates if path.parts[-len(wanted) : -1] == wanted[:-1]]
        if len(candidates) < 2:
            return candidates
        named = [path for path in candidates if path.name == wanted[-1]]
        for group in (named, candidates):
            whole = [path for path in group if path.parent == self.folder.joinpath(*wanted[:-1])]
            for found in (whole, group):
                if found:
                    # links to one file are one file
                    return list({os.path.realpath(path): path for path in reversed(found)}.values())[::-1]
        return []

    def _indexed(self, form: Callable[[str], str]) -> dict[str, list[Path]]:
        """The videos by the last part of their path in a form."""
        if form not in self._indices:
            index: dict[str, list[Path]] = {}
            for key, paths in self.videos.items():
                known = index.setdefault(form(key), [])
                known += [path for path in paths if path not in known]
            self._indices[form] = index
        return self._indices[form]

    @cached_property
    def _folders(self) -> dict[str, Path]:
        """Folders that are named like a video, by their names with and without the extension."""
        found: dict[str, Path] = {}
        for root, folders, _ in os.walk(self.folder):
            for path in (Path(root, folder) for folder in folders):
                if path.suffix.lower() in EXTENSIONS:
                    found |= {path.name: path, path.stem: path}
        return found


def _form(text: str) -> str:
    return unicodedata.normalize("NFC", text)


def _folded(text: str) -> str:
    return _form(text).casefold()


def _spaced(text: str) -> str:
    """White space of any kind as one space, and none at either end, nor before the extension."""
    stem, extension = os.path.splitext(_form(text))
    return " ".join(stem.split()) + extension.strip()


def _opens_as_video(path: Path) -> bool:
    """Whether FFmpeg finds moving pictures in it; texts, single pictures and lists of other files are none."""
    if not path.is_file():
        return False  # opening a pipe would wait for what nobody writes
    require_pyav()
    import av

    try:
        with opened(path) as container:
            kind = container.format.name
            other = kind in ("tty", "image2", "concat", "hls", "dash") or kind.endswith("_pipe")
            return not other and container.streams.best("video") is not None
    except (av.FFmpegError, OSError, ValueError):
        return False


def _split(name: str) -> tuple[str, str]:
    """Stem and suffix of a file name, as those of its Path, which take ten times as long."""
    dot = name.rfind(".")
    return (name[:dot], name[dot:]) if 0 < dot < len(name) - 1 else (name, "")


def list_folder(folder: Path, flag: str = "") -> None:
    """Raises InputError for what is no folder, or none that can be listed."""
    if not folder.is_dir():
        what = "is a file, not a folder" if folder.exists() else "is not a folder: it is not there"
        raise InputError(f"{flag}{folder} {what}")
    try:
        os.listdir(folder)
    except OSError as error:
        raise InputError(f"{flag}{folder} cannot be listed: {error.strerror}") from error


def _files_below(folder: Path, wanted: Callable[[str], bool], flag: str = "") -> list[Path]:
    """The files whose suffix, in lower case, is `wanted`, sorted."""
    list_folder(folder, flag)
    visited: set[str] = set()
    found: list[Path] = []
    # data sets are often assembled from symlinked folders, which may form a loop
    for root, folders, files in os.walk(folder, followlinks=True):
        real = os.path.realpath(root)
        if real in visited:
            folders.clear()
            continue
        visited.add(real)
        base = Path(root)
        found += [base / file for file in files if wanted(_split(file)[1].lower())]
    return sorted(found, key=lambda path: str(path).replace(os.sep, "\0"))  # by the parts of the paths

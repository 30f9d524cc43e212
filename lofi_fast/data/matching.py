"""Which file a name in the labels means, and which files of a folder are videos."""

from __future__ import annotations

import os
import unicodedata
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from lofi_fast.data.packages import require_pyav
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


@dataclass(frozen=True)
class Matches:
    """paths: name -> file. absent: name -> one sentence about why there is none. notes: what was taken by a rule that
    the user should know of.
    """

    paths: dict[str, Path]
    absent: dict[str, str]
    notes: tuple[str, ...]


def find_videos(folder: Path, names: Iterable[str]) -> Matches:
    """The file below `folder` that each name means: its path from there, or the end of that path, with or without its
    extension; also with "v_" before the file's name, ActivityNet's habit.

    `cam2/0001` is found as cam2/0001.mp4, and as day1/cam2/0001.mp4. A whole path from `folder` wins over the end of
    another one. A file whose extension tells nothing is opened to see whether it is a video.
    Raises InputError when the folder cannot be listed, when a name may mean several files, and when two names mean one.
    """
    folder = Path(folder)
    files = _Files(folder, _files_below(folder, lambda path: path.suffix.lower() not in _COMPANIONS, "--videos "))
    paths: dict[str, Path] = {}
    absent: dict[str, str] = {}
    notes: list[str] = []
    taken: dict[Path, str] = {}
    for name in names:
        found = files.of(name)
        if len(found) > 1:
            shown = ", ".join(str(path.relative_to(folder)) for path in found[:3]) + (", ..." if found[3:] else "")
            raise InputError(
                f"the labels' video {name!r} may be any of {len(found)} files below --videos {folder}: {shown}; "
                f"write it with its folder and extension, like {found[0].relative_to(folder).as_posix()!r}"
            )
        if not found:
            found, absent_because = files.alike(name)
            if len(found) != 1:
                absent[name] = absent_because
                continue
            notes.append(f"{found[0]} is taken for {name!r}, whose letters are written in another Unicode form")
        path = found[0]
        if path in taken and taken[path] != name:
            raise InputError(
                f"{path} is meant by two names in the labels, {taken[path]!r} and {name!r}; give it one of them"
            )
        taken[path] = name
        paths[name] = path
    return Matches(paths, absent, tuple(notes))


def list_videos(folder: Path) -> list[Path]:
    """All files below `folder` that have the extension of a video, sorted. InputError when it cannot be listed."""
    return _files_below(Path(folder), lambda path: path.suffix.lower() in EXTENSIONS)


class _Files:
    """The files below a folder, to be asked for by name."""

    def __init__(self, folder: Path, files: list[Path]) -> None:
        self.folder = folder
        # last part of the path, with and without extension -> files
        self.videos: dict[str, list[Path]] = {}
        self.others: dict[str, list[Path]] = {}
        for path in files:
            index = self.videos if path.suffix.lower() in EXTENSIONS else self.others
            for key in {path.name, path.stem}:
                index.setdefault(key, []).append(path)

    def of(self, name: str) -> list[Path]:
        """The files that a name may mean: none, the one, or several that are as likely."""
        parts = self._parts(name)
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

    def alike(self, name: str) -> tuple[list[Path], str]:
        """Files whose name is the same text in another Unicode form; and what to say where that is not one file."""
        parts = self._parts(name)
        nothing = "no video file of this name"
        if not parts:
            return [], nothing
        same = self._by_form.get(_form(parts[-1]), [])
        equal = [path for path in same if _form("/".join(parts)) in self._forms(path, len(parts))]
        if equal:
            return equal, nothing
        folded = _form("/".join(parts)).casefold()
        other_case = [
            path
            for path in self._by_folded.get(_form(parts[-1]).casefold(), [])
            if folded in {form.casefold() for form in self._forms(path, len(parts))}
        ]
        if other_case:
            shown = other_case[0].relative_to(self.folder)
            return [], f"{nothing}, but {shown} differs from it only in upper and lower case; rename one of them"
        return [], nothing

    def _parts(self, name: str) -> tuple[str, ...]:
        """Parts of a path from the folder."""
        if "\\" in name and name not in self.videos:
            name = name.replace("\\", "/")  # labels that were made under Windows
        if name.startswith("/"):
            path = Path(name)
            if path.is_relative_to(self.folder.absolute()):
                name = path.relative_to(self.folder.absolute()).as_posix()
        parts = tuple(part for part in name.split("/") if part not in ("", "."))
        # written from beside the folder
        within = len(parts) > 1 and parts[0] == self.folder.name and not (self.folder / parts[0]).exists()
        return parts[1:] if within else parts

    def _best(self, index: Mapping[str, list[Path]], wanted: tuple[str, ...]) -> list[Path]:
        candidates = [path for path in index.get(wanted[-1], []) if path.parts[-len(wanted) : -1] == wanted[:-1]]
        named = [path for path in candidates if path.name == wanted[-1]]
        for group in (named, candidates):
            whole = [path for path in group if path.parent == self.folder.joinpath(*wanted[:-1])]
            for found in (whole, group):
                if found:
                    # links to one file are one file
                    return list({os.path.realpath(path): path for path in reversed(found)}.values())[::-1]
        return []

    @cached_property
    def _by_form(self) -> dict[str, list[Path]]:
        return self._indexed(_form)

    @cached_property
    def _by_folded(self) -> dict[str, list[Path]]:
        return self._indexed(lambda key: _form(key).casefold())

    def _indexed(self, form: Callable[[str], str]) -> dict[str, list[Path]]:
        index: dict[str, list[Path]] = {}
        for key, paths in self.videos.items():
            known = index.setdefault(form(key), [])
            known += [path for path in paths if path not in known]
        return index

    @staticmethod
    def _forms(path: Path, num_parts: int) -> set[str]:
        before = path.parts[-num_parts:-1]
        return {_form("/".join((*before, last))) for last in (path.name, path.stem)}


def _form(text: str) -> str:
    return unicodedata.normalize("NFC", text)


def _opens_as_video(path: Path) -> bool:
    """Whether FFmpeg finds moving pictures in it; texts, single pictures and lists of other files are none."""
    require_pyav()
    import av

    try:
        with av.open(str(path)) as container:
            kind = container.format.name
            other = kind in ("tty", "image2", "concat", "hls", "dash") or kind.endswith("_pipe")
            return not other and container.streams.best("video") is not None
    except (av.FFmpegError, OSError, ValueError):
        return False


def _files_below(folder: Path, wanted: Callable[[Path], bool], flag: str = "") -> list[Path]:
    if not folder.is_dir():
        raise InputError(f"{flag}{folder} is not a folder")
    try:
        os.listdir(folder)
    except OSError as error:
        raise InputError(f"{flag}{folder} cannot be listed: {error.strerror}") from error
    visited: set[str] = set()
    found: list[Path] = []
    # data sets are often assembled from symlinked folders, which may form a loop
    for root, folders, files in os.walk(folder, followlinks=True):
        real = os.path.realpath(root)
        if real in visited:
            folders.clear()
            continue
        visited.add(real)
        found += [path for path in (Path(root, file) for file in files) if wanted(path)]
    return sorted(found, key=lambda path: path.parts)  # compared as paths are, but taken apart once

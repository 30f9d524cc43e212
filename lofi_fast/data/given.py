"""The videos that a command was given: which files they are, and a name for what is made of each."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from lofi_fast.data.cache import file_name
from lofi_fast.data.matching import list_videos
from lofi_fast.errors import InputError


def paths_of(given: Sequence[str]) -> list[Path]:
    """The files named, and those in the folders named, each once. Raises InputError for a folder without a video, and
    where nothing that is named is there.
    """
    if given and not any(os.path.lexists(name) for name in given):
        mend = (
            "download it first, for a video has to be a file here" if "://" in given[0] else "name videos, or a folder"
        )
        raise InputError(f"none of the {len(given)} videos can be used: {given[0]}: no such file; {mend}")
    paths: dict[Path, Path] = {}
    for path in map(Path, given):
        inside = list_videos(path) if path.is_dir() else [path]
        if not inside:
            raise InputError(
                f"{path}: no video in this folder (a file whose name does not tell can be named by itself)"
            )
        for file in inside:
            paths.setdefault(file.resolve(), file)
    return list(paths.values())


def unique_names(paths: Sequence[Path]) -> dict[Path, str]:
    """A name for the results of each video: its own without the extension; with it, or with the folder too, where two
    would be the same. File systems that ignore case do not mix them up either.
    """
    names: dict[Path, str] = {}
    rest = list(paths)
    for name_of in (lambda p: p.stem, lambda p: p.name, lambda p: f"{p.resolve().parent.name}-{p.name}"):
        wanted = {path: file_name(printable_name(name_of(path))) for path in rest}
        counts = Counter(name.casefold() for name in (*wanted.values(), *names.values()))
        names |= {path: name for path, name in wanted.items() if counts[name.casefold()] == 1}
        rest = [path for path in rest if path not in names]
    taken = {name.casefold() for name in names.values()}
    for path in rest:
        number = 2
        while (name := f"{wanted[path]}-{number}").casefold() in taken:
            number += 1
        names[path] = name
        taken.add(name.casefold())
    return names


def printable_name(text: str) -> str:
    """Names of files may hold bytes that are no text."""
    return text.encode("utf-8", "surrogateescape").decode("utf-8", "replace")

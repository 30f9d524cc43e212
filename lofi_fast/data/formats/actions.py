"""MultiTHUMOS and Charades as JSON, the form in which multi-label detectors share them:

    {name: {"subset": "training", "duration": 82.7, "actions": [[class, start, end], ...]}}

Seconds. Subsets as they are told. Classes are numbers; a list of their names beside the file (class_list.txt,
Charades_v1_classes.txt, category.txt: a number and a name a line) is used, and without one the number is the label.
Actions that end before they start, of which Charades has seven, are dropped, and told.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from lofi_fast.data.formats.file import LabelFile, check_name, plural, runs_backwards
from lofi_fast.data.labels import UNASSIGNED, Video, duration_of, segment_of, subset_of
from lofi_fast.errors import InputError
from lofi_fast.texts import decoded

NAME = "MultiTHUMOS or Charades JSON"
OPTIONS = frozenset[str]()
LISTS = ("class_list.txt", "classes.txt", "category.txt", "multithumos_classes.txt", "Charades_v1_classes.txt")


def recognises(content: Any) -> bool:
    return (
        isinstance(content, dict)
        and bool(content)
        and all(isinstance(entry, dict) and "actions" in entry for entry in content.values())
    )


def read(file: LabelFile, content: Any) -> list[Video]:
    """Raises InputError, which names video and action, for what cannot be."""
    names = class_names(file.path.parent)
    videos = []
    unassigned = not any("subset" in entry for entry in content.values())
    unnamed, backwards = set(), 0
    for name, entry in content.items():
        where = f"{file.path}: video {name}"
        check_name(name, str(file.path))
        subset = UNASSIGNED if unassigned else subset_of(entry.get("subset"), where)
        if not isinstance(entry["actions"], list):
            raise InputError(f'{where} needs a list "actions"')
        segments = []
        for i, action in enumerate(entry["actions"]):
            if not isinstance(action, list) or len(action) != 3:
                raise InputError(f"{where}, action {i} needs [class, start, end]")
            if runs_backwards(action[1], action[2]):
                backwards += 1
                continue
            number = str(action[0]).strip()
            label = names.get(number, number)
            if number not in names:
                unnamed.add(number)
            segments.append(segment_of(action[1], action[2], label, f"{where}, action {i}"))
        videos.append(file.made(name, subset, duration_of(entry.get("duration"), where), segments))
    file.note(f"read as {NAME}: seconds, subsets as told")
    if backwards:
        file.note(f"{plural(backwards, 'action')} dropped: the end is before the start")
    if unnamed:
        file.note(
            f"{len(unnamed)} classes have no name, and their numbers are the labels; put a list of names beside it as "
            f"{LISTS[0]}, a number and a name a line"
        )
    return videos


def class_names(folder: Path) -> dict[str, str]:
    """{number: name} of the classes, as the first list of LISTS in a folder says; empty without one."""
    for name in LISTS:
        try:
            text = decoded(folder / name)
        except (OSError, UnicodeDecodeError):
            continue
        found = {}
        for line in text.splitlines():
            if match := re.fullmatch(r"\s*(c?\d+)[\s,;:]+(\S.*?)\s*", line):
                found[match[1]] = match[2]
        if found:
            return found
    return {}

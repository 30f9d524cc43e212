"""Detections and labels as files of labelling tools, where they can be looked at and corrected."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal, get_args

from lofi_fast.data.formats import boris, elan, label_studio, via
from lofi_fast.data.formats.file import Medium
from lofi_fast.data.matching import match_videos
from lofi_fast.data.video import stated_duration, stated_rate
from lofi_fast.detections import Detection
from lofi_fast.errors import InputError

Tool = Literal["elan", "boris", "label-studio", "via"]
TOOLS: tuple[Tool, ...] = get_args(Tool)
ENDINGS: dict[Tool, str] = {
    "elan": ".eaf",
    "boris": ".boris",
    "label-studio": ".label-studio.json",
    "via": ".via.json",
}


def write_for(tool: Tool, path: Path, found: Mapping[str, Sequence[Detection]], media: Mapping[str, Medium]) -> None:
    """Write what was found in videos, by name; ELAN's file holds one video only, whose `media` has to be there.

    Raises InputError where the file cannot be written, and for Label Studio where a frame rate is not known.
    """
    if tool == "elan":
        (name,) = found
        elan.write(path, found[name], media[name])
    elif tool == "boris":
        boris.write(path, found, media)
    elif tool == "via":
        via.write(path, found, media)
    else:
        label_studio.write(path, found, media)


def media_of(names: Sequence[str], videos: Path | None, fps: float | None = None) -> dict[str, Medium]:
    """The files of videos that names mean, as their headers have them; the name itself where there is none.

    `fps` counts where it is given. Raises InputError for a folder that cannot be listed.
    """
    if videos is not None and not videos.is_dir():
        raise InputError(f"--videos {videos}: no such folder; it is that of the videos")
    paths = {} if videos is None else match_videos(videos, names).paths
    return {name: medium_of(paths[name], fps) if name in paths else Medium(name, None, fps) for name in names}


def medium_of(path: Path, fps: float | None = None) -> Medium:
    """A video file as its header has it."""
    return Medium(str(path.absolute()), stated_duration(path) or None, fps or stated_rate(path) or None)

"""What `bench gain` trains on: labels and videos by fold, the set whose clips an encoder sees first, and the flags."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.tools import rooms
from lofi_fast.data import demo
from lofi_fast.data.annotations import load_annotations
from lofi_fast.errors import InputError

FOLDS = 5
DEVELOPMENT = 4  # every so many training videos one is kept apart for the search of rates
BACKGROUND = "background"
SHORTEST = 2.0  # seconds of a rest that is worth a label


@dataclass(frozen=True)
class Labelled:
    """Labels and the folder of their videos."""

    annotations: Path
    videos: Path

    @property
    def flags(self) -> list[str]:
        return ["--annotations", str(self.annotations), "--videos", str(self.videos)]


@dataclass(frozen=True)
class DataSet:
    name: str
    version: str
    folds: tuple[Labelled, ...]
    source: Labelled
    flags: tuple[str, ...]


def open_set(name: str, folder: Path, annotations: Path | None, videos: Path | None) -> DataSet:
    """Make a set below `folder`, or cut what the user has into folds. Raises InputError."""
    demos, rooms_ = folder / "demo", folder / "rooms"
    if name == "demo":
        target, source = Labelled(*demo.generate(demos)), Labelled(*rooms.generate(rooms_))
        return DataSet("demo", str(demo.VERSION), (target,), source, ("--preset", "demo"))
    source = Labelled(*demo.generate(demos, seed=1))
    if name == "rooms":
        target = Labelled(*rooms.generate(rooms_))
        return DataSet("rooms", str(rooms.VERSION), (target,), source, ("--preset", "demo", "--resize", "squash"))
    if annotations is None or videos is None:
        raise InputError(f"--data {name}: --annotations and --videos name its labels and videos")
    form = _form(annotations)
    names = sorted(form["database"])
    folds = []
    for number in range(FOLDS):
        kept = set(names[number::FOLDS])
        part = _with_subsets(form, kept)
        folds.append(Labelled(_written(folder / name / f"fold{number}.json", part), videos))
    return DataSet(name, f"{len(names)} videos", tuple(folds), source, ("--preset", "small"))


def development(labelled: Labelled, folder: Path) -> Labelled:
    """The training videos alone, some of them for validation instead."""
    form = _form(labelled.annotations)
    training = {name: video for name, video in form["database"].items() if video["subset"] == "training"}
    kept = set(sorted(training)[::DEVELOPMENT])
    part = _with_subsets({**form, "database": training}, kept)
    return Labelled(_written(folder / f"{labelled.annotations.stem}-development.json", part), labelled.videos)


def with_background(labelled: Labelled, folder: Path) -> Labelled:
    """The training videos' rests as segments of one more class."""
    form = _form(labelled.annotations)
    for video in form["database"].values():
        if video["subset"] == "training":
            video["annotations"] = [*video["annotations"], *_rests(video)]
    return Labelled(_written(folder / f"{labelled.annotations.stem}-background.json", form), labelled.videos)


def _rests(video: dict[str, Any]) -> list[dict[str, Any]]:
    found, at = [], 0.0
    for start, end in [*sorted(one["segment"] for one in video["annotations"]), (video["duration"], video["duration"])]:
        if start - at >= SHORTEST:
            found.append({"segment": [at, start], "label": BACKGROUND})
        at = max(at, end)
    return found


def _form(path: Path) -> dict[str, Any]:
    """ActivityNet form. Durations are needed, so that rests have an end."""
    load_annotations(path)  # says what is wrong with it
    form: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    if "database" not in form or any("duration" not in video for video in form["database"].values()):
        raise InputError(f"{path}: bench gain reads ActivityNet form with durations; lofi-fast convert writes it")
    return form


def _with_subsets(form: dict[str, Any], validation: set[str]) -> dict[str, Any]:
    """A copy in which `validation` names the videos of that subset."""
    database = {
        name: video | {"subset": "validation" if name in validation else "training"}
        for name, video in form["database"].items()
    }
    return {**form, "database": database}


def _written(path: Path, form: dict[str, Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(form, indent=1) + "\n", encoding="utf-8")
    return path


SETS = ("rooms", "demo", "ceiling")

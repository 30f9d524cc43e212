"""Ground truth for an evaluation: of the files that training reads, and of ActivityNet JSON just as it is given.

The official evaluator clips nothing and drops nothing: of a video's annotations all count, also those past its end and
those that stand there twice. `annotations.load_annotations`, which training reads with, repairs both.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from lofi_fast.data.annotations import (
    UNASSIGNED,
    FormatOptions,
    is_activitynet,
    load_annotations,
    require_file,
    seconds_of,
    subset_named,
    unused_flags,
)
from lofi_fast.data.formats.file import NO_OPTIONS
from lofi_fast.errors import InputError
from lofi_fast.metrics import number_of, read_object, segments_of

Truth = dict[str, list[tuple[float, float, str]]]


class Subset(NamedTuple):
    """One subset of labels: its name, video -> [(start, end, label)], the seconds of those videos whose length the
    labels tell, and sentences on how the labels were read.
    """

    name: str
    truth: Truth
    durations: dict[str, float]
    notes: tuple[str, ...] = ()


def load_ground_truth(path: Path, subset: str | None = None, options: FormatOptions = NO_OPTIONS) -> Truth:
    """One subset of an annotation file: video -> [(start, end, label)], seconds.

    ActivityNet, HACS and THUMOS JSON is taken as it is given: nothing is clipped or dropped, duplicates and zero
    lengths stay, as the official evaluator has it; where no video has a subset, all are one. Any other file, or a
    folder of files, is what training reads of it with the same `options`. subset None means validation, else the only
    one, else testing; train, val and test are understood, in any case. Raises InputError for unreadable files, missing
    keys, values that are no finite numbers, reversed segments, a key that stands twice in one object, and subsets
    without a segment.
    """
    return load_subset(path, subset, options)[1]


def load_subset(path: Path, wanted: str | None, options: FormatOptions = NO_OPTIONS) -> Subset:
    """The subset with its name and the lengths of its videos; see `load_ground_truth`."""
    require_file(path, "--ground-truth")
    subset = _as_given(path, wanted, options) if is_activitynet(path) else _as_trained(path, wanted, options)
    if not any(subset.truth.values()):
        raise InputError(f"{path} has no segment in the subset {subset.name!r}; choose another with --subset.")
    return subset


def _as_trained(path: Path, wanted: str | None, options: FormatOptions) -> Subset:
    if not path.exists():
        raise InputError(f"{path} does not exist; give --ground-truth an existing file.")
    annotations = load_annotations(path, options=options)
    videos = annotations.videos
    name = _choose_subset(path, {video.subset for video in videos}, wanted)
    chosen = [video for video in videos if video.subset == name]
    return Subset(
        name,
        {video.name: [(s.start, s.end, s.label) for s in video.segments] for video in chosen},
        {video.name: video.duration for video in chosen if video.duration is not None},
        annotations.notes,
    )


def _as_given(path: Path, wanted: str | None, options: FormatOptions) -> Subset:
    """Of ActivityNet JSON; videos of other subsets may hold anything."""
    database = read_object(path, "--ground-truth", "database")
    subsets: dict[str, str] = {}
    entries = [entry for entry in database.values() if isinstance(entry, dict)]
    unassigned = any(entry.get("annotations") for entry in entries) and not any("subset" in entry for entry in entries)
    for name, entry in database.items():
        said = entry.get("subset", UNASSIGNED if unassigned else None) if isinstance(entry, dict) else None
        if not isinstance(said, str):
            raise InputError(f'{path}, video {name}: "subset" is missing or is not a text.')
        subsets[name] = _subset_named(said)
    subset = _choose_subset(path, set(subsets.values()), wanted)
    names = [name for name, of in subsets.items() if of == subset]
    told = {name: seconds_of(database[name].get("duration")) for name in names}
    return Subset(
        subset,
        {name: _segments(database[name], subset, f"{path}, video {name}") for name in names},
        {name: seconds for name, seconds in told.items() if seconds is not None and seconds > 0},
        tuple(unused_flags(path, options, frozenset())),
    )


def _segments(entry: Mapping[str, Any], subset: str, where: str) -> list[tuple[float, float, str]]:
    if "annotations" not in entry:
        if subset == "testing":  # the annotations of a competition's test videos may be unpublished
            return []
        raise InputError(f'{where}: "annotations" is missing.')
    segments = []
    for i, (start, end, label, _) in enumerate(segments_of(entry["annotations"], where, _seconds)):
        if start > end:
            raise InputError(f"{where}, segment {i}: starts at {start} s, after its end at {end} s.")
        if not label:
            raise InputError(f'{where}, segment {i}: "label" is empty.')
        segments.append((start, end, label))
    return segments


def _seconds(value: object, where: str) -> float:
    """As training reads a time, which may be hh:mm:ss or have a decimal comma."""
    seconds = seconds_of(value)
    return number_of(value, where) if seconds is None else seconds


def _subset_named(text: str) -> str:
    """By its usual name; a subset of the file's own keeps its name."""
    return subset_named(text) or text.strip().lower()


def _choose_subset(path: Path, members: set[str], wanted: str | None) -> str:
    """The wanted subset of those there are, or validation, or the only one, or testing."""
    found = ", ".join(sorted(members)) or "none"
    if wanted is not None:
        subset = _subset_named(wanted)
        if subset not in members:
            raise InputError(f"{path} has no subset {wanted!r} (it has: {found}); change --subset.")
        return subset
    if "validation" in members:
        return "validation"
    if len(members) == 1:
        return next(iter(members))
    if "testing" in members:
        return "testing"
    raise InputError(f"{path} has neither a validation nor a testing subset (it has: {found}); give --subset.")

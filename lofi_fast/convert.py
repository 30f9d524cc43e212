"""The command `convert`: labels or detections of any format into another one.

lofi-fast convert project.boris labels.json
lofi-fast convert found/detections.json corrected/ --to elan --videos v/
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, get_args

from lofi_fast.command import parse, run
from lofi_fast.data.annotations import UNASSIGNED, Annotations, load_annotations
from lofi_fast.data.cache import file_name
from lofi_fast.data.exports import TOOLS, media_of, write_for
from lofi_fast.data.formats import activitynet, table
from lofi_fast.data.formats.file import LabelFlags, Table, check_name, plural
from lofi_fast.data.labels import seconds_of, segment_of
from lofi_fast.detections import Detection, with_plain_labels, write_csv, write_predictions, write_srt, write_vtt
from lofi_fast.errors import InputError, printable
from lofi_fast.metrics import load_predictions
from lofi_fast.settings import Section, Setting
from lofi_fast.texts import decoded

DESCRIPTION = (
    "Turn labels of any format that train takes, or detections, into another format. Labels become ActivityNet's JSON "
    "with their subsets and durations, detections with their scores. ELAN and subtitles have a file for each video."
)
Form = Literal["activitynet", "csv", "srt", "vtt", "elan", "boris", "label-studio", "via"]
FORMS: tuple[Form, ...] = get_args(Form)
BY_SUFFIX: dict[str, Form] = {
    ".json": "activitynet",
    ".csv": "csv",
    ".srt": "srt",
    ".vtt": "vtt",
    ".eaf": "elan",
    ".boris": "boris",
}
ONE_EACH: dict[Form, str] = {"srt": ".srt", "vtt": ".vtt", "elan": ".eaf"}  # forms with a file for each video


@dataclass(frozen=True)
class ConvertFlags:
    source: Annotated[Path, Setting("labels, a folder of them, or detections", "IN", positional=True)]
    out: Annotated[Path, Setting("file to write; a folder for a file for each video", "OUT", positional=True)]
    labels: Annotated[LabelFlags, Section("labels", flat=True)]
    to: Annotated[Form | None, Setting("format to write", unset="as the suffix of OUT says")] = None
    min_score: Annotated[float, Setting("leave out detections that score less", zero=True, below=1)] = 0.0
    overwrite: Annotated[bool, Setting("replace files that are there")] = False


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit status."""
    return run(lambda: _command(argv))


def _command(argv: Sequence[str] | None) -> None:
    flags = parse(ConvertFlags, argv, prog="lofi-fast convert", description=DESCRIPTION)
    form = flags.to or BY_SUFFIX.get(flags.out.suffix.lower())
    if form is None:
        raise InputError(f"{flags.out}: its suffix names no format; give --to, one of {', '.join(FORMS)}")
    if not flags.source.exists():
        raise InputError(f"{flags.source}: no such file or folder of labels or detections")
    annotations: Annotations | None = None
    found = _detections(flags.source)
    if found is None:
        try:
            annotations = load_annotations(flags.source, clip=False, options=flags.labels.options)
        except InputError as error:  # this command has no flag for them
            raise InputError(str(error).removeprefix("--annotations ")) from None
        found = {
            video.name: [Detection(s.start, s.end, s.label, 1.0) for s in video.segments]
            for video in annotations.videos
        }
        unused = [f"{flags.source}: --min-score is not used: labels have no scores"] if flags.min_score else []
        for note in (*annotations.notes, *unused):
            print(printable(f"note: {note}"))
        _print_counts(annotations)
    else:
        kept = {name: [d for d in items if d.score >= flags.min_score] for name, items in found.items()}
        total, left = (sum(map(len, of.values())) for of in (found, kept))
        print(f"{plural(len(found), 'video')}, {left} of {plural(total, 'detection')}")
        found = kept
    for path in _write(flags, form, found, annotations):
        print(f"written: {path}")


def _detections(path: Path) -> dict[str, list[Detection]] | None:
    """What a file of detections holds, JSON with "results" or a table with a score; None for any other file."""
    if path.suffix.lower() == ".json" and path.is_file():
        try:
            content = json.loads(decoded(path))
        except (OSError, ValueError, RecursionError):
            return None  # which the reader of labels says in a sentence
        if isinstance(content, dict) and "results" in content and "database" not in content:
            return {name: [Detection(*row) for row in rows] for name, rows in load_predictions(path).items()}
    if path.suffix.lower() in (".csv", ".tsv") and path.is_file():
        try:
            rows = Table(path, decoded(path))
        except (OSError, UnicodeDecodeError):
            return None
        # labels may have a score too, and would lose their subsets
        if {"video", "start", "end", "label", "score"} <= set(rows.columns) and "subset" not in rows.columns:
            return _of_table(rows)
    return None


def _of_table(rows: Table) -> dict[str, list[Detection]]:
    """The detections of a table. Raises InputError, which names the line, for what cannot be."""
    found: dict[str, list[Detection]] = {}
    for line, cell in rows.rows():
        check_name(cell["video"], line)
        where = f"{line}: video {cell['video']}"
        segment = segment_of(cell["start"], cell["end"], cell["label"], where)
        score = seconds_of(cell["score"])  # a number, which spreadsheets may write with a decimal comma
        if score is None or ":" in cell["score"]:
            raise InputError(f"{where} has the score {cell['score']!r}, which is not a finite number")
        found.setdefault(cell["video"], []).append(Detection(segment.start, segment.end, segment.label, score))
    return found


def _print_counts(annotations: Annotations) -> None:
    for subset in ("training", "validation", "testing", UNASSIGNED):
        if videos := annotations.subset(subset):
            segments = [segment for video in videos for segment in video.segments]
            points = sum(segment.start == segment.end for segment in segments)
            classes = len({segment.label for segment in segments})
            print(
                f"{subset if subset != UNASSIGNED else 'no subset'}: {plural(len(videos), 'video')}, "
                f"{plural(len(segments), 'segment')}{f' of which {points} are points' if points else ''}, "
                f"{classes} class{'' if classes == 1 else 'es'}"
            )


def _write(
    flags: ConvertFlags, form: Form, found: Mapping[str, list[Detection]], annotations: Annotations | None
) -> list[Path]:
    """Write OUT, or a file for each video in it; the paths of what was written."""
    if form not in ONE_EACH:
        targets = {flags.out: dict(found)}
        if flags.out.is_dir():
            raise InputError(f"{flags.out} is a folder; name a file for {form}")
    elif flags.out.suffix.lower() == ONE_EACH[form]:
        if len(found) != 1:
            raise InputError(
                f"{flags.out}: a file of {form} holds one video, and there are {len(found)}; name a folder, and give "
                f"--to {form}"
            )
        targets = {flags.out: dict(found)}
    else:
        targets = {flags.out / f"{file_name(name)}{ONE_EACH[form]}": {name: items} for name, items in found.items()}
    if not flags.overwrite and (there := [path for path in targets if path.exists()]):
        raise InputError(f"{there[0]} is there already; name another file, or give --overwrite")
    media = media_of(list(found), flags.labels.videos, flags.labels.fps) if form in TOOLS else {}
    for path, of in targets.items():
        if form == "activitynet" and annotations is not None:
            activitynet.write(path, annotations.videos)
        elif form == "activitynet":
            write_predictions(path, of)
        elif form == "csv" and annotations is not None:
            table.write(path, annotations.videos)
        elif form == "csv":
            write_csv(path, with_plain_labels(of))
        elif form == "srt" or form == "vtt":
            (items,) = of.values()
            (write_srt if form == "srt" else write_vtt)(path, items)
        else:
            write_for(form, path, of, media)
    return list(targets)


if __name__ == "__main__":
    sys.exit(main())

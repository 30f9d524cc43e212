"""The command `detect`: what happens when in videos, by a trained detector.

    lofi-fast detect runs/x new.mp4 --out found/
    torchrun --standalone --nproc-per-node 4 -m lofi_fast.detect runs/x videos/ --out found/    # 4 share the videos

Importing this file imports no torch: help, and a sentence about a mistyped flag, come at once.
"""

from __future__ import annotations

import csv
import sys
from collections import Counter
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from lofi_fast.budget import Budget, check_budget
from lofi_fast.command import INTERRUPTED, parse, run
from lofi_fast.config import MemBudget, PrecisionName
from lofi_fast.data.exports import ENDINGS, TOOLS, medium_of, write_for
from lofi_fast.data.given import paths_of, printable_name, unique_names
from lofi_fast.data.video import VideoError, stated_duration
from lofi_fast.detections import (
    MIN_SCORE,
    Detection,
    detector_of,
    draw_timeline,
    with_plain_labels,
    write_csv,
    write_predictions,
    write_srt,
    write_vtt,
)
from lofi_fast.errors import InputError
from lofi_fast.files import check_output, output_folder, sha256_of
from lofi_fast.metrics import load_predictions
from lofi_fast.model_file import metadata_of, model_file
from lofi_fast.settings import Setting

if TYPE_CHECKING:
    from lofi_fast.model import Found, Session
    from lofi_fast.run.log import Terminal
    from lofi_fast.run.processes import Processes

FORMATS = ("json", "csv", "srt", "vtt")
ALL_FORMATS = (*FORMATS, *TOOLS)
SUBTITLES = {"srt": write_srt, "vtt": write_vtt}
DESCRIPTION = (
    "Find actions in videos with a trained detector. Any file that FFmpeg reads will do, without labels. For each "
    "video it draws a picture of what was found, and writes subtitles; a table and a JSON file hold all videos."
)


def parse_formats(text: str) -> tuple[str, ...]:
    """ "json,srt": which files to write. Raises InputError."""
    asked = [name.strip() for name in text.lower().split(",") if name.strip()]
    if not asked or set(asked) - set(ALL_FORMATS):
        raise InputError(f'--format "{text}": name one or more of {",".join(ALL_FORMATS)}')
    return tuple(name for name in ALL_FORMATS if name in asked)


@dataclass(frozen=True)
class DetectFlags:
    """The settings of the command."""

    run: Annotated[Path, Setting("folder of a finished run, or its model.safetensors", "RUN", positional=True)]
    videos: Annotated[
        tuple[str, ...], Setting("files, and folders that are searched for videos", "VIDEO|FOLDER", positional=True)
    ]
    out: Annotated[
        Path,
        Setting(
            "folder for what is written; nothing but earlier results of the same videos is replaced, and what the same "
            "detector found in others stays",
            "DIR",
        ),
    ] = Path("found")
    format: Annotated[
        tuple[str, ...],
        Setting(
            "json (ActivityNet form) and csv: one file for all videos; srt and vtt: subtitles of each; elan, boris, "
            "label-studio and via: files of these tools, of what subtitles show",
            "A,B",
            parse=parse_formats, show=",".join,
        ),
    ] = FORMATS  # fmt: skip
    min_score: Annotated[float, Setting("leave out detections that score less", zero=True, below=1)] = MIN_SCORE
    subtitle_score: Annotated[
        float,
        Setting("subtitles, files of tools, and what is counted here, leave out more", zero=True, below=1),
    ] = 0.2
    top_k: Annotated[
        int | None,
        Setting("most detections of a video", unset="as the run was evaluated"),
    ] = None
    mem_budget: MemBudget = field(default_factory=lambda: Budget.parse("auto"))
    device: Annotated[
        Literal["auto", "cuda", "cpu"],
        Setting(
            "where to compute",
        ),
    ] = "auto"
    precision: Annotated[
        PrecisionName | None,
        Setting("what matrices are multiplied in: auto, bf16, fp16 or fp32", unset="as the run was asked for"),
    ] = None
    threads: Annotated[int | None, Setting("CPU threads", unset="all cores")] = None


def main(argv: Sequence[str] | None = None, *, owns_process: bool = False) -> int:
    """0 when all videos were looked at, 1 when some had to be skipped, 2 for what the user can mend or when none could
    be used, 130 when interrupted. `owns_process`: this Python was started for it.
    """
    return run(lambda: _command(list(sys.argv[1:] if argv is None else argv), owns_process))


def _command(argv: list[str], owns_process: bool) -> int:
    flags = parse(DetectFlags, argv, prog="lofi-fast detect", description=DESCRIPTION)
    check_budget(flags.mem_budget)
    file = model_file(flags.run)
    metadata_of(file)  # before torch, which takes seconds to import
    paths, digest = paths_of(flags.videos), sha256_of(file)
    work = _Work(flags, digest, _found_before(flags, set(unique_names(paths).values()), digest))
    check_output(flags.out)
    if owns_process:
        from lofi_fast.memory.settle import settle_allocator

        settle_allocator("lofi_fast.detect", argv)
    import torch

    from lofi_fast.model import Detector
    from lofi_fast.run.log import SilentLog, Terminal
    from lofi_fast.run.processes import opened

    if flags.threads:
        torch.set_num_threads(flags.threads)
    with opened() as processes, output_folder(flags.out):
        terminal = Terminal() if processes.first else SilentLog()
        device = processes.device(flags.device).type if processes.several else flags.device
        detector = Detector.load(flags.run)
        terminal.say(
            f"{flags.run}: {detector.config.encoder.name} of width {detector.config.encoder.width}, "
            f"{len(detector.classes)} classes"
        )
        with detector.session(
            mem_budget=flags.mem_budget.text, device=device, precision=flags.precision, say=terminal.say
        ) as session:
            return _detect(work, paths, session, terminal, processes)


def _found_before(flags: DetectFlags, names: Set[str], digest: str) -> dict[str, list[Detection]]:
    """What the same detector, by its digest, found before, which stays until it is found anew: pictures tell whose.

    Raises InputError where what is written would replace anything but earlier results of the videos of these names.
    """
    out, other = flags.out, "name another folder with --out"
    tables = {form: path for form in ("json", "csv") if (path := out / f"detections.{form}").exists()}
    found = _detections_of(tables["json"]) if "json" in tables else {}
    stays = {name: items for name, items in (found or {}).items() if detector_of(out / f"{name}.png") == digest}
    for form, path in tables.items():
        if form not in flags.format:
            continue
        there = _videos_of(path) if form == "csv" else found
        if there is None:
            raise InputError(f"{path} is there already, and not by this command; {other}")
        if lost := sorted(set(there) - names - stays.keys()):
            more = f" and {len(lost) - 1} more" if lost[1:] else ""
            raise InputError(
                f"{path} holds what was found in {printable_name(lost[0])}{more}, which would be lost; {other}"
            )
    forms = ("png", *(form for form in SUBTITLES if form in flags.format))
    for name in sorted(names):
        taken = next((path for form in forms if (path := out / f"{name}.{form}").exists()), None)
        if taken is not None and detector_of(out / f"{name}.png") is None:  # which is written before the others
            raise InputError(f"{taken} is there already, and not by this command; {other}")
    for tool in TOOLS:
        stems = names if tool == "elan" else {"detections"}
        for path in (out / f"{stem}{ENDINGS[tool]}" for stem in stems if tool in flags.format):
            if path.exists():
                raise InputError(f"{path} is there already, and may have been corrected; {other}")
    return stays


def _detections_of(path: Path) -> dict[str, list[Detection]] | None:
    """Those of detections.json; None of any other file."""
    try:
        return {name: [Detection(*row) for row in rows] for name, rows in load_predictions(path).items()}
    except InputError:
        return None


def _videos_of(path: Path) -> set[str] | None:
    """The videos of detections.csv; None of any other file."""
    try:
        with path.open(encoding="utf-8", newline="") as file:
            rows = csv.DictReader(file)
            return {row["video"] for row in rows} if "video" in (rows.fieldnames or ()) else None
    except (OSError, UnicodeDecodeError, csv.Error):
        return None


@dataclass(frozen=True)
class _Work:
    """What is asked for, whose results are written, and beside which others."""

    flags: DetectFlags
    detector: str  # its digest
    before: Mapping[str, list[Detection]]  # what it found in earlier calls


@dataclass
class _Seen:
    """What became of videos."""

    found: dict[str, Sequence[Detection]] = field(default_factory=dict)  # by the videos' names
    skipped: list[str] = field(default_factory=list)  # sentences
    interrupted: bool = False


def _detect(work: _Work, paths: Sequence[Path], session: Session, terminal: Terminal, processes: Processes) -> int:
    """Look at all videos, of which several processes take their shares, and write what is of all at the end."""
    flags = work.flags
    names = unique_names(paths)
    lengths = {path: stated_duration(path) for path in paths}
    # By length, so that no process has all that are long; each looks at its own in the order in which they were given.
    mine = set(sorted(paths, key=lambda path: -lengths[path])[processes.rank :: processes.count])
    own = {path: length for path, length in lengths.items() if path in mine}
    seen = processes.together("videos", lambda: _look(work, own, names, session, terminal), patient=True)
    of_all = {name: detections for one in seen for name, detections in one.found.items()}
    found = {names[path]: of_all[names[path]] for path in paths if names[path] in of_all}
    skipped, interrupted = [sentence for one in seen for sentence in one.skipped], any(one.interrupted for one in seen)
    for sentence in skipped[len(seen[0].skipped) :]:  # the first process has told of its own
        terminal.say(f"skipped: {sentence}")
    if not found and not interrupted:
        raise InputError(
            skipped[0] if len(skipped) == 1 else f"none of the {len(skipped)} videos can be used; first: {skipped[0]}"
        )
    if processes.first and found and "json" in flags.format:
        write_predictions(flags.out / "detections.json", {**work.before, **found})
    if processes.first and found and "csv" in flags.format:
        write_csv(flags.out / "detections.csv", with_plain_labels({**work.before, **found}))
    if processes.first and found:
        _write_for_tools(flags, {names[path]: path for path in paths if names[path] in found}, found)
    terminal.say(
        f"{'interrupted; ' if interrupted else ''}{len(found)} of {len(paths)} videos are done"
        f"{f', {len(skipped)} skipped' if skipped else ''}; what was found is in {printable_name(str(flags.out))}"
    )
    if interrupted:
        return INTERRUPTED
    return int(bool(skipped) and not processes.several)  # by another status than 0 torchrun would end those that write


def _look(
    work: _Work, lengths: Mapping[Path, float], names: Mapping[Path, str], session: Session, terminal: Terminal
) -> _Seen:
    """Look at one video after the other, and write what was found in each at once. `lengths` in seconds."""
    flags = work.flags
    seen = _Seen()
    total = max(round(sum(lengths.values())), 1)
    with terminal.progress("seconds of video", total) as advance:
        before = 0.0  # seconds of the videos that are done
        for path in lengths:

            def told(second: float, path: Path = path, before: float = before) -> None:
                advance(min(round(before + min(second, lengths[path])), total - 1), names[path])

            try:
                result = session.detect(path, min_score=flags.min_score, top_k=flags.top_k, told=told)
                _write(work, names[path], result)
                seen.found[names[path]] = result.detections
                terminal.say(_summary(names[path], result.detections, flags.subtitle_score))
            except VideoError as error:
                seen.skipped.append(printable_name(str(error)))
                terminal.say(f"skipped: {seen.skipped[-1]}")
            except KeyboardInterrupt:
                seen.interrupted = True
                break
            before += lengths[path]
        else:
            advance(total, "")
    return seen


def _write(work: _Work, name: str, result: Found) -> None:
    """The picture and the subtitles of one video."""
    flags = work.flags
    draw_timeline(flags.out / f"{name}.png", name, result.detections, result.duration, work.detector)
    shown = [d for d in result.detections if d.score >= flags.subtitle_score]
    for form in SUBTITLES.keys() & set(flags.format):
        SUBTITLES[form](flags.out / f"{name}.{form}", shown)


def _write_for_tools(flags: DetectFlags, paths: Mapping[str, Path], found: Mapping[str, Sequence[Detection]]) -> None:
    """What subtitles would show, for the labelling tools that are asked for."""
    clear = {name: [d for d in items if d.score >= flags.subtitle_score] for name, items in found.items()}
    asked = [tool for tool in TOOLS if tool in flags.format]
    media = {name: medium_of(path) for name, path in paths.items()} if asked else {}
    for tool in asked:
        if tool == "elan":
            for name, items in clear.items():
                write_for(tool, flags.out / f"{name}{ENDINGS[tool]}", {name: items}, media)
        else:
            write_for(tool, flags.out / f"detections{ENDINGS[tool]}", clear, media)


def _summary(name: str, detections: Sequence[Detection], least: float) -> str:
    clear = [d for d in detections if d.score >= least]
    if not clear:
        return f"{name}: nothing that scores {least:g} or more ({len(detections)} detections in all)"
    counts = ", ".join(f"{label} {count}" for label, count in Counter(d.label for d in clear).most_common(8))
    first = clear[0]
    where = f"from {first.start:.1f} to {first.end:.1f} s" if first.end > first.start else f"at {first.start:.1f} s"
    return (
        f"{name}: {len(clear)} detections that score {least:g} or more ({counts}); best: {first.label} {where}, "
        f"{first.score:.2f}"
    )


if __name__ == "__main__":
    sys.exit(main(owns_process=True))

"""Labels of frames: one a line (Breakfast, 50Salads, GTEA as MS-TCN has them), runs of frames ("31-150 take_bowl"), and
the tables of Cholec80 (video01-phase.txt, video01-tool.txt).

A file is a video and has its name. Frames count from 0 on lines, from 1 in runs, and by their number in tables.
Cholec80 has 25 a second; for the others --fps or the videos say it. Frames of the background (SIL, background,
action_start, action_end) are no action, and dropped. Where the file lies in groundTruth/ beside splits/, split 1 says
what is for training and what for testing; elsewhere there are no subsets.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from itertools import pairwise
from pathlib import Path

from lofi_fast.data.formats.file import Gathered, LabelFile, plural
from lofi_fast.data.labels import UNASSIGNED, Video
from lofi_fast.errors import InputError
from lofi_fast.texts import decoded

NAME = "labels of frames"
OPTIONS = frozenset(("fps", "background"))
BACKGROUND = frozenset(("background", "bg", "sil", "action_start", "action_end"))
CHOLEC80_RATE = 25.0
_RUN = re.compile(r"\s*(\d{1,9})\s*-\s*(\d{1,9})\s+(\S.*?)\s*", re.ASCII)
_NUMBER = re.compile(r"\d{1,9}", re.ASCII)
_BEHIND = re.compile(r"-(?:phase|tool|timestamp)$", re.IGNORECASE)
Run = tuple[int, int, str]  # first frame from 0, the frame after the last, label


def recognises(text: str) -> bool:
    lines = [line for line in text.splitlines() if line.strip()]
    if len(lines) >= 2 and _is_table(lines[0]):
        # Cholec80 has such a table of when each frame is shown, too
        return not re.fullmatch(r"\s*\d+\t\s*\d+:\d{2}(?::\d{2})?(?:\.\d*)?\s*", lines[1])
    if lines and all(_RUN.fullmatch(line) for line in lines):
        return True
    plain = len(lines) >= 2 and not any(re.search(r"[,;\t|{}<>]", line) for line in lines[:1000])
    repeats = sum(one == other for one, other in pairwise(lines))
    return plain and 2 * repeats >= len(lines) - 1


def _is_table(line: str) -> bool:
    cells = line.split("\t")
    return len(cells) >= 2 and cells[0].strip().lower() == "frame"


def read(file: LabelFile) -> list[Video]:
    """Raises InputError, which names the line, for what cannot be, and where nothing tells the frame rate."""
    lines = _lines(file.path, file.text)
    is_table = _is_table(lines[0][1])
    name = _BEHIND.sub("", file.path.stem) if is_table else _stem(file.path)
    if is_table:
        runs, count = _of_table(file, lines)
    elif _RUN.fullmatch(lines[0][1]):
        runs, count = _of_runs(file.path, lines)
    else:
        runs, count = list(_together(enumerate(line.strip() for _, line in lines))), len(lines)
    no_action = BACKGROUND if file.options.background is None else file.options.background
    rate = file.rates({name: CHOLEC80_RATE if is_table else None})[name]
    where = f"{file.path}: video {name}"
    found = Gathered(file)
    subset = _subset(file.path)
    found.video(name, where, subset=subset, duration=count / rate)
    background = [run for run in runs if run[2].casefold() in no_action]
    for first, after, label in runs:
        if label.casefold() not in no_action:
            found.segment(name, first / rate, after / rate, label, where)
    told = "no subset" if subset is None else "subsets by split 1"
    file.note(f"read as {NAME}: {rate:g} a second; the video is named like the file; {told}")
    if background:
        frames = sum(after - first for first, after, _ in background)
        file.note(
            f"{plural(frames, 'frame')} of {', '.join(sorted({run[2] for run in background}))} dropped as background"
        )
    return found.videos()


def recognised(path: Path) -> tuple[str, list[Run]]:
    """The video's name, and its labels of frames as a program that recognises them has written them: one a line, in
    runs, or all in the second line, below one that begins with "###", as MS-TCN writes. Raises InputError for what
    cannot be read.
    """
    try:
        text = decoded(path)
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} cannot be read as labels of frames ({error}); mend --predictions") from error
    lines = _lines(path, text)
    if lines and lines[0][1].startswith("###"):
        return _stem(path), list(_together(enumerate(label for _, line in lines[1:] for label in line.split())))
    if lines and _RUN.fullmatch(lines[0][1]):
        return _stem(path), _of_runs(path, lines)[0]
    return _stem(path), list(_together(enumerate(line.strip() for _, line in lines)))


def _lines(path: Path, text: str) -> list[tuple[int, str]]:
    """Each line that is not empty, with its number. Raises InputError for an empty one among labels of frames, of which
    nobody can tell whether it is a frame.
    """
    lines = [(number, line) for number, line in enumerate(text.splitlines(), 1) if line.strip()]
    if lines and not (_is_table(lines[0][1]) or _RUN.fullmatch(lines[0][1]) or lines[0][1].startswith("###")):
        for expected, (number, _) in enumerate(lines, 1):
            if number != expected:
                raise InputError(
                    f"{path} line {expected} is empty, and labels of frames follow; write a label on it, such as "
                    "background, or remove it where it is no frame"
                )
    return lines


def _stem(path: Path) -> str:
    """The file's name without .txt, and without the extension of a video before it."""
    return re.sub(r"\.(?:avi|mp4)$", "", path.name.removesuffix(path.suffix), flags=re.IGNORECASE)


def _of_runs(path: Path, lines: list[tuple[int, str]]) -> tuple[list[Run], int]:
    runs = []
    for number, line in lines:
        match = _RUN.fullmatch(line)
        if match is None:
            raise InputError(f"{path} line {number}: {line.strip()!r} is no run of frames like 31-150 take_bowl")
        first, last = int(match[1]), int(match[2])
        if not 1 <= first <= last:
            raise InputError(f"{path} line {number}: a run from frame {first} to {last}; frames count from 1")
        runs.append((first - 1, last, match[3]))
    return runs, max(after for _, after, _ in runs)


def _of_table(file: LabelFile, lines: list[tuple[int, str]]) -> tuple[list[Run], int]:
    """Of a column with a label (phases), or of columns that hold 1 where something is there (tools)."""
    columns = [cell.strip() for cell in lines[0][1].split("\t")][1:]
    rows = []
    for number, line in lines[1:]:
        cells = [cell.strip() for cell in line.split("\t")]
        if len(cells) != len(columns) + 1 or not _NUMBER.fullmatch(cells[0]):
            raise InputError(f"{file.path} line {number} must have a frame number and {plural(len(columns), 'value')}")
        rows.append((int(cells[0]), cells[1:]))
    step = min((b - a for (a, _), (b, _) in pairwise(rows) if b > a), default=1)
    runs: list[Run] = []
    if all(value in ("0", "1") for _, values in rows for value in values):
        for k, column in enumerate(columns):
            runs += _together(((frame, column if values[k] == "1" else "") for frame, values in rows), step)
    else:
        runs += _together(((frame, values[0]) for frame, values in rows), step)
    return [run for run in runs if run[2]], rows[-1][0] + step


def _together(labels: Iterable[tuple[int, str]], step: int = 1) -> Iterator[Run]:
    """Runs of consecutive frames with one label."""
    run: Run | None = None
    for frame, label in labels:
        if run is not None and (label, frame) == (run[2], run[1]):
            run = (run[0], frame + step, label)
        else:
            if run is not None:
                yield run
            run = (frame, frame + step, label)
    if run is not None:
        yield run


def _subset(path: Path) -> str | None:
    """By the lists of split 1, splits/train.split1.bundle and test.split1.bundle, where they are there."""
    splits = path.parent.parent / "splits"
    if path.parent.name.lower() != "groundtruth" or not splits.is_dir():
        return None
    for subset, word in (("training", "train"), ("testing", "test")):
        try:
            listed = (splits / f"{word}.split1.bundle").read_text().split()
        except (OSError, UnicodeDecodeError):
            continue
        if path.name in (Path(line).name for line in listed):
            return subset
    return UNASSIGNED

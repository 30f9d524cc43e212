"""What was found: labelled segments with scores, and the files that they are written to.

Every file is written whole or not at all. Times are seconds; 0 is where a player's clock begins.
"""

from __future__ import annotations

import csv
import io
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from lofi_fast.files import replacing, write_bytes

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# A timeline longer than this is drawn in several lines, one below the other, up to so many.
LINE_SECONDS = 600.0
MAX_LINES = 12
MAX_CLASSES = 30  # drawn; those with the best scores where there are more
PICTURE_BY = "lofi_fast"  # by which a picture of ours is known
MIN_SCORE = 1e-4  # what scores less is of no use to anybody
LEAST_WIDTH = 1 / 400  # of a line: a short detection in a long video is still seen
LEAST_OPACITY = 0.03  # what is fainter is not seen, and not drawn
FULL_SCORE = 0.25  # the least that is drawn in full colour, where it is the best of its video


@dataclass(frozen=True)
class Detection:
    """A labelled segment in seconds and its score in [0, 1]."""

    start: float
    end: float
    label: str
    score: float


def write_predictions(path: Path, predictions: Mapping[str, Sequence[Detection]]) -> None:
    """Write detections of videos as ActivityNet JSON, which `evaluate` reads.

    Raises InputError when the file cannot be written, ValueError for a score or time that is not finite.
    """
    results = {
        name: [
            {"segment": [float(d.start), float(d.end)], "score": float(d.score), "label": str(d.label)} for d in items
        ]
        for name, items in predictions.items()
    }
    text = json.dumps({"version": "VERSION 1.3", "results": results, "external_data": {}}, allow_nan=False)
    write_bytes(path, text.encode("utf-8") + b"\n")


def write_csv(path: Path, predictions: Mapping[str, Sequence[Detection]]) -> None:
    """Write a table with the columns video, start, end, label, score; seconds to the millisecond.

    Raises InputError when the file cannot be written.
    """
    table = io.StringIO(newline="")
    writer = csv.writer(table, lineterminator="\n")
    writer.writerow(("video", "start", "end", "label", "score"))
    for name, items in predictions.items():
        writer.writerows((name, f"{d.start:.3f}", f"{d.end:.3f}", d.label, f"{d.score:.6f}") for d in items)
    write_bytes(path, table.getvalue().encode("utf-8"))


def with_plain_labels(predictions: Mapping[str, Sequence[Detection]]) -> dict[str, list[Detection]]:
    """The same, with each label in one line."""
    return {
        name: [Detection(d.start, d.end, in_one_line(d.label), d.score) for d in items]
        for name, items in predictions.items()
    }


def in_one_line(label: str) -> str:
    """A label without line breaks, with which no table of labels is read."""
    return re.sub(r"\s*[\r\n]\s*", " ", label)


def write_srt(path: Path, detections: Sequence[Detection]) -> None:
    """Write the detections of one video as SubRip subtitles, a cue each, by start. Cues may overlap.

    Raises InputError when the file cannot be written.
    """
    cues = [
        f"{number}\n{start.replace('.', ',')} --> {end.replace('.', ',')}\n{_one_line(d)}\n"
        for number, (d, start, end) in enumerate(_cues(detections), 1)
    ]
    write_bytes(path, "\n".join(cues).encode("utf-8"))


def write_vtt(path: Path, detections: Sequence[Detection]) -> None:
    """Write the detections of one video as WebVTT subtitles, a cue each, by start. Cues may overlap.

    Raises InputError when the file cannot be written.
    """
    cues = []
    for d, start, end in _cues(detections):
        text = _one_line(d).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
        cues.append(f"{start} --> {end}\n{text}\n")
    write_bytes(path, "\n".join(["WEBVTT\n", *cues]).encode("utf-8"))


def _cues(detections: Sequence[Detection]) -> list[tuple[Detection, str, str]]:
    """(detection, start, end) by time, as HH:MM:SS.mmm; a cue is a millisecond long at least, or players drop it."""
    cues = []
    for d in sorted(detections, key=lambda d: (d.start, d.end, -d.score)):
        start = round(1000 * d.start)
        cues.append((d, _clock(start), _clock(max(round(1000 * d.end), start + 1))))
    return cues


def _clock(milliseconds: int) -> str:
    seconds, rest = divmod(milliseconds, 1000)
    return f"{seconds // 3600:02}:{seconds // 60 % 60:02}:{seconds % 60:02}.{rest:03}"


def _one_line(d: Detection) -> str:
    """Label and score. An empty line would end the cue, and an arrow would begin another."""
    return f"{' '.join(d.label.split()).replace('-->', '->')} {d.score:.2f}".strip()


def lanes(detections: Sequence[Detection]) -> list[list[Detection]]:
    """The same by start, divided so that of one lane none overlaps or touches another; as few lanes as there can be."""
    found: list[list[Detection]] = []
    for d in sorted(detections, key=lambda d: (d.start, d.end, -d.score)):
        lane = next((lane for lane in found if lane[-1].end < d.start), None)
        if lane is None:
            found.append([d])
        else:
            lane.append(d)
    return found


def draw_timeline(path: Path, title: str, detections: Sequence[Detection], duration: float, detector: str = "") -> None:
    """Draw a picture (PNG) of one video's detections over its `duration` in seconds: a row for each class, a bar for
    each detection, its opacity the score as a share of the video's best. Of bars that overlap, the better one is seen.
    `detector`: whose they are, in words, which `detector_of` reads of the picture.

    Raises InputError when the file cannot be written.
    """
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    full = max([FULL_SCORE, *(d.score for d in detections)])
    shown = [d for d in detections if d.score >= LEAST_OPACITY * full]
    best: dict[str, float] = {}
    for d in shown:
        best[d.label] = max(d.score, best.get(d.label, 0.0))
    classes = sorted(sorted(best, key=lambda label: -best[label])[:MAX_CLASSES])
    left_out = len(best) - len(classes)
    num_lines = min(max(math.ceil(duration / LINE_SECONDS), 1), MAX_LINES)
    line = max(duration, 1e-3) / num_lines
    title += f" (the {len(classes)} classes of {len(best)} with the best scores)" if left_out else ""
    with matplotlib.rc_context({"font.size": 10, "font.family": ["DejaVu Sans"]}):
        figure = Figure(figsize=(12, 0.9 + num_lines * (0.55 + 0.26 * max(len(classes), 1))), dpi=100)
        FigureCanvasAgg(figure)
        figure.set_layout_engine("constrained")
        figure.suptitle(_drawable(title), x=0.01, ha="left")
        for number in range(num_lines):
            axes = figure.add_subplot(num_lines, 1, number + 1)
            _draw_line(axes, shown, classes, full, number * line, (number + 1) * line)
        with replacing(path) as file:
            figure.savefig(file, format="png", metadata={"Software": PICTURE_BY, "Source": detector})


def detector_of(path: Path) -> str | None:
    """Whose detections a picture shows that `draw_timeline` has drawn; None of any other file."""
    from PIL import Image

    try:
        with Image.open(path) as picture:
            said = picture.info
    except OSError:
        return None
    return str(said.get("Source", "")) if said.get("Software") == PICTURE_BY else None


def _draw_line(
    axes: Axes, detections: Sequence[Detection], classes: Sequence[str], full: float, start: float, end: float
) -> None:
    """Draw what lies between `start` and `end` seconds; a score of `full` is opaque."""
    from matplotlib.ticker import FuncFormatter, MultipleLocator

    rows = {label: row for row, label in enumerate(classes)}
    least = LEAST_WIDTH * (end - start)
    colours = ("#0b6e99", "#a44a00")  # of neighbouring rows
    for order, d in enumerate(sorted(detections, key=lambda d: d.score)):
        if d.label not in rows or d.start >= end or d.start < d.end <= start or d.end < start:
            continue
        row, width = rows[d.label], max(d.end - d.start, least)
        for colour, alpha in (("white", 1.0), (colours[row % 2], d.score / full)):
            axes.barh(row, width, left=d.start, height=0.8, color=colour, alpha=alpha, linewidth=0, zorder=2 + order)
    step = next((s for s in (1, 2, 5, 10, 30, 60, 120, 300, 600, 1800, 3600) if (end - start) / s <= 12), 7200)
    axes.set_xlim(start, end)
    axes.set_ylim(max(len(classes), 1) - 0.5, -0.5)
    axes.set_yticks(range(len(classes)), [_drawable(label) for label in classes])
    axes.xaxis.set_major_locator(MultipleLocator(step))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda seconds, _: _tick(seconds)))
    axes.grid(axis="x", color="#dddddd", zorder=0)
    axes.set_axisbelow(True)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.tick_params(axis="y", length=0)
    if not classes:
        axes.text(0.5, 0.5, "nothing found", transform=axes.transAxes, ha="center", va="center", color="#666666")


def _tick(seconds: float) -> str:
    whole = round(seconds)
    clock = f"{whole // 60 % 60:02}:{whole % 60:02}"
    return f"{whole // 3600}:{clock}" if whole >= 3600 else clock


def _drawable(text: str) -> str:
    """One line, and a dollar sign that does not begin mathematics."""
    shown = " ".join(text.split()).replace("$", r"\$")
    return shown if len(shown) <= 100 else f"{shown[:99]}…"

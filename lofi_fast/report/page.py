"""A run folder as one page: report.html, self-contained, and report.png, the same at a glance.

    python -m lofi_fast.report runs/demo

What people look at first stands on top: mAP, and memory against the budget. Any file of the folder may be missing or
cut short, as a run that was killed leaves it: the page then says what is not there. The same folder gives the same
page.
"""

from __future__ import annotations

import argparse
import html
import io
import json
import math
import re
import shlex
import sys
import textwrap
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import numpy.typing as npt

from lofi_fast import __version__
from lofi_fast.budget import gigabytes
from lofi_fast.errors import InputError
from lofi_fast.fidelity import CYCLE

if TYPE_CHECKING:
    # matplotlib is imported where a figure is drawn: the training process imports this file, its resident memory counts
    # against the budget, and plots come last.
    from matplotlib.axes import Axes
    from matplotlib.figure import FigureBase

T = TypeVar("T")
Floats = npt.NDArray[np.float64]
Json = dict[str, Any]

FILES = ("config.json", "environment.json", "log.jsonl", "plan.json", "metrics.json", "predictions.json",
         "ground_truth.json")  # fmt: skip
LOSS_TERMS = ("boundary", "regression", "confidence", "classes")
STEP_NUMBERS = ("epoch", "step", "loss", *LOSS_TERMS, "peak", "budget", "predicted", "limit", "num_snippets", "side")
MOST_POINTS = 300  # of one curve; longer ones are thinned
MOST_VIDEOS = 8
MOST_LANES = 5  # of detections under one video
MOST_OPEN_ROWS = 30  # longer tables are folded

# Okabe and Ito's colours, told apart by the colour-blind, and grey.
PALETTE = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#7f7f7f")
INK, GRID = "#1b1f24", "#d6dae0"  # in the page both, and the palette, are CSS variables that follow light and dark
MARKERS = ("o", "s", "^", "D")
UNKNOWN, TIMES = "\N{EN DASH}", " \N{MULTIPLICATION SIGN} "


# What the run folder says


@dataclass(frozen=True)
class Steps:
    """The steps of a stage in order of (epoch, step): numbers (N, len(STEP_NUMBERS)), NaN where one has none."""

    numbers: Floats
    patterns: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, name: str) -> Floats:
        """One column (N,), by its name in STEP_NUMBERS."""
        return self.numbers[:, STEP_NUMBERS.index(name)]


NO_STEPS = Steps(np.empty((0, len(STEP_NUMBERS))), ())


@dataclass
class Log:
    """log.jsonl in the order of the run: what a resumed run did again stands once, the later one."""

    starts: list[Json] = field(default_factory=list)  # one for each sitting
    steps: dict[str, Steps] = field(default_factory=dict)  # by stage
    epochs: dict[str, list[Json]] = field(default_factory=dict)
    validations: list[Json] = field(default_factory=list)
    plans: dict[str, tuple[Json, list[Json]]] = field(default_factory=dict)  # name: (plan event, its readings)
    skipped: list[Json] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)  # by stage, over all sittings
    highest: tuple[float, float, str] | None = None  # (peak, budget at that time, in what), bytes
    over: int = 0  # readings above the budget of their time
    last: Json = field(default_factory=dict)
    unreadable: int = 0  # lines


@dataclass(frozen=True)
class Record:
    """The content of a run folder; {} for a file that is not there."""

    folder: Path
    config: Json
    environment: Json
    plan: Json
    metrics: Json
    predictions: Json
    ground_truth: Json
    log: Log
    absent: tuple[str, ...]  # a sentence for each file that is missing or unreadable


def _dict(value: object) -> Json:
    return value if isinstance(value, dict) else {}


def _list(value: object) -> list[Any]:
    return value if isinstance(value, list) else []


def _number(value: object) -> float:
    """A finite number, or NaN: a diverged loss and a missing field are both gaps in a curve."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return math.nan
    return float(value) if math.isfinite(value) else math.nan


def read_run(folder: Path) -> Record:
    """Read a run folder. Raises InputError when it is none, that is, when not one of its files is there."""
    if not any((folder / name).exists() for name in FILES):
        raise InputError(f"{folder}: not a run folder (it has none of {', '.join(FILES)}); name the --out of a run")
    absent: list[str] = []
    contents: dict[str, Json] = {}
    for name in FILES:
        if name == "log.jsonl":
            continue
        contents[name] = {}
        try:
            content = json.loads((folder / name).read_text(encoding="utf-8"))
        except FileNotFoundError:
            absent.append(f"{name} is not there")
        except (OSError, ValueError, RecursionError) as error:
            absent.append(f"{name} cannot be read ({error})")
        else:
            if isinstance(content, dict):
                contents[name] = content
            else:
                absent.append(f"{name} does not hold a JSON object")
    log = Log()
    try:
        with (folder / "log.jsonl").open(encoding="utf-8", errors="replace") as lines:
            log = read_log(lines)
    except FileNotFoundError:
        absent.append("log.jsonl is not there")
    except OSError as error:
        absent.append(f"log.jsonl cannot be read ({error.strerror})")
    by_field = {name.removesuffix(".json"): content for name, content in contents.items()}
    return Record(folder=folder, log=log, absent=tuple(absent), **by_field)


def _event(line: str) -> Json | None:
    try:
        event = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return event if isinstance(event, dict) else None


def _events(lines: Iterable[str], log: Log) -> Iterator[Json]:
    """The events of a log, less what a kill tore; an event that was appended to a torn line is found again."""
    for line in lines:
        event = _event(line)
        if event is None and line.strip():
            log.unreadable += 1
            event = _event(line[max(line.rfind('{"event"'), line.rfind('{"time"')) :])
        if event is not None:
            yield event


def _append_over(done: list[T], item: T, position: Callable[[T], list[float]]) -> None:
    """Append in place of all from this position on: a resumed run went back to its checkpoint."""
    here = position(item)
    while done and position(done[-1]) >= here:
        done.pop()
    done.append(item)


def _epoch(event: Json) -> list[float]:
    return [_number(event.get("epoch"))]


def read_log(lines: Iterable[str]) -> Log:
    """Read a log that may be torn at its end, and hold several sittings of which each went on from a checkpoint."""
    log = Log()
    readings: dict[str, list[Json]] = {}
    skipped: dict[str, Json] = {}
    steps: dict[str, list[tuple[list[float], str]]] = {}
    budget, before = math.nan, None
    for event in _events(lines, log):
        kind = event.get("event")
        stage = str(event.get("stage") or str(event.get("plan", "")).partition(",")[0])
        if kind == "start":
            log.starts.append(event)
            budget, skipped, readings = _number(event.get("budget")), {}, {}
        elif kind == "skipped":
            skipped[str(event.get("video"))] = event
            stage = "data"
        elif kind == "data":
            stage = "data"
        elif kind == "measured":
            readings.setdefault(str(event.get("plan")), []).append(event)
        elif kind == "plan":
            name = str(event.get("plan"))
            log.plans[name] = event, readings.pop(name, [])
        elif kind == "step":
            terms = _dict(event.get("terms"))
            row = [_number(event.get(name, terms.get(name))) for name in STEP_NUMBERS]
            if not math.isnan(row[0] + row[1]):
                pattern = sys.intern(str(event.get("pattern")))
                _append_over(steps.setdefault(stage, []), (row, pattern), lambda step: step[0][:2])
        elif kind == "epoch":
            _append_over(log.epochs.setdefault(stage, []), event, _epoch)
        elif kind == "validation":
            _append_over(log.validations, event, _epoch)
        elif kind == "features":
            stage = "features"
        elif kind in ("metrics", "done"):
            stage = "eval"
        if kind in ("step", "measured", "plan"):
            peak = _number(event.get("peak"))
            if log.highest is None or peak > log.highest[0]:
                where = f"a {stage} step" if kind == "step" else f"a trial step of the planner ({event.get('plan')})"
                log.highest = None if math.isnan(peak) else (peak, budget, where)
            log.over += kind != "plan" and peak > budget  # a plan repeats one of its readings
        now = _time(event)
        if before is not None and now is not None and kind != "start":
            log.seconds[stage or "other"] = log.seconds.get(stage or "other", 0.0) + (now - before).total_seconds()
        before = now or before
        log.last = event
    log.skipped = list(skipped.values())
    log.steps = {
        stage: Steps(np.array([row for row, _ in rows]), tuple(pattern for _, pattern in rows))
        for stage, rows in steps.items()
    }
    return log


def _time(event: Json) -> datetime | None:
    try:
        when = datetime.fromisoformat(str(event.get("time")))
    except ValueError:
        return None
    return when if when.tzinfo else when.replace(tzinfo=UTC)


# What the page shows of it


@dataclass(frozen=True)
class PlanRow:
    """One plan: what was chosen, and what else was measured, as (candidate, peak in bytes or None)."""

    name: str
    chosen: str
    cut: float
    batch: float
    peak: float
    others: tuple[tuple[str, float | None], ...]


def plan_rows(record: Record) -> list[PlanRow]:
    """The plans of plan.json, and those that only the log has."""
    plans = _dict(record.plan.get("plans"))
    rows: dict[str, PlanRow] = {}
    pretrain = _dict(plans.get("pretrain"))
    if pretrain:
        readings = record.log.plans.get("pretrain", ({}, []))[1]
        batch = _number(pretrain.get("batch"))
        others = [(f"{r.get('candidate')} clips", r.get("peak")) for r in readings]
        rows["pretrain"] = _plan_row("pretrain", f"{batch:g} clips", pretrain, others)
    for pattern, plan in _dict(plans.get("joint")).items():
        measured = [r for r in _list(_dict(plan).get("measured")) if isinstance(r, list) and len(r) == 3]
        others = [(_rung(r[:2]), r[2]) for r in measured]
        rows[f"joint, {pattern}"] = _plan_row(f"joint, {pattern}", _rung(_dict(plan).get("rung")), _dict(plan), others)
    for name, (event, readings) in record.log.plans.items():
        others = [(str(r.get("candidate")), r.get("peak")) for r in readings]
        rows.setdefault(name, _plan_row(name, str(event.get("chosen")), event, others))
    return list(rows.values())


def _plan_row(name: str, chosen: str, plan: Json, readings: Iterable[tuple[str, object]]) -> PlanRow:
    others = tuple((text, None if peak is None else _number(peak)) for text, peak in readings if text != chosen)
    cut, batch, peak = (_number(plan.get(key)) for key in ("cut", "batch", "peak"))
    if math.isnan(peak):
        peak = _number(plan.get("predicted"))
    return PlanRow(name, chosen, cut, batch, peak, others)


def _rung(value: object) -> str:
    numbers = [_number(x) for x in _list(value)]
    return f"{numbers[0]:g} snippets x {numbers[1]:g} px" if len(numbers) == 2 else "unknown"


@dataclass(frozen=True)
class Bar:
    """A segment or a detection on its lane, in seconds; the score of a segment is NaN."""

    start: float
    end: float
    label: str
    score: float
    lane: int


@dataclass(frozen=True)
class Timeline:
    """A video's ground truth above its top detections; `left_out` counts the detections that are not shown."""

    video: str
    duration: float
    truth: tuple[Bar, ...]
    found: tuple[Bar, ...]
    left_out: int


def timelines(ground_truth: Json, predictions: Json, most: int = MOST_VIDEOS) -> list[Timeline]:
    """Timelines of `most` videos that have segments, evenly spaced through their sorted names."""
    database, results = _dict(ground_truth.get("database")), _dict(predictions.get("results"))
    with_segments = sorted(name for name, video in database.items() if _list(_dict(video).get("annotations")))
    count = min(most, len(with_segments))
    chosen = [with_segments[(2 * i + 1) * len(with_segments) // (2 * count)] for i in range(count)]
    rows = []
    for name in chosen:
        truth, _ = _lanes(_bars(_dict(database[name]).get("annotations")), None)
        found = sorted(_bars(results.get(name)), key=lambda bar: -bar.score if bar.score == bar.score else math.inf)
        shown, left_out = _lanes(found[: max(10, 3 * len(truth))], MOST_LANES)
        duration = _number(_dict(database[name]).get("duration"))
        if not duration > 0:
            duration = max((bar.end for bar in (*truth, *shown)), default=0.0) or 1.0
        rows.append(Timeline(name, duration, truth, shown, left_out + max(len(found) - max(10, 3 * len(truth)), 0)))
    return rows


def _bars(items: object) -> list[Bar]:
    bars = []
    for item in map(_dict, _list(items)):
        ends = [_number(x) for x in _list(item.get("segment"))]
        if len(ends) == 2 and ends[0] <= ends[1]:
            bars.append(Bar(ends[0], ends[1], str(item.get("label")), _number(item.get("score")), 0))
    return bars


def _lanes(bars: Sequence[Bar], most: int | None) -> tuple[tuple[Bar, ...], int]:
    """Each bar on the first lane where it overlaps nothing before it; (bars, how many found no lane)."""
    lanes: list[list[Bar]] = []
    for bar in bars:
        free = (lane for lane in lanes if all(bar.end <= other.start or bar.start >= other.end for other in lane))
        lane = next(free, None)
        if lane is None and (most is None or len(lanes) < most):
            lane = []
            lanes.append(lane)
        if lane is not None:
            lane.append(bar)
    placed = [Bar(b.start, b.end, b.label, b.score, i) for i, lane in enumerate(lanes) for b in lane]
    return tuple(placed), len(bars) - len(placed)


def class_colours(rows: Sequence[Timeline]) -> dict[str, int]:
    """Index into the palette for each class shown, the most frequent of the ground truth first."""
    truth = Counter(bar.label for row in rows for bar in row.truth)
    found = Counter(bar.label for row in rows for bar in row.found)
    order = dict.fromkeys(label for counts in (truth, found) for label, _ in counts.most_common())
    return {label: i % len(PALETTE) for i, label in enumerate(order)}


def thin(values: Floats, most: int = MOST_POINTS) -> tuple[Floats, Floats, Floats, Floats]:
    """(index, least, mean, greatest) of `most` equal stretches of a curve (N,), or of its points when it is short.

    The extremes are kept so that no peak is lost; a stretch of NaN alone stays NaN.
    """
    most = min(most, len(values))
    first = np.arange(most) * len(values) // max(most, 1)
    if most == 0:
        return values, values, values, values
    known = np.isfinite(values)
    counts = np.add.reduceat(known.astype(np.float64), first)
    total = np.add.reduceat(np.where(known, values, 0.0), first)
    mean = np.divide(total, counts, out=np.full(most, np.nan), where=counts > 0)
    index = (first + np.append(first[1:], len(values)) - 1) / 2
    return index, np.fmin.reduceat(values, first), mean, np.fmax.reduceat(values, first)


def _column(events: Sequence[Json], name: str) -> Floats:
    return np.array([_number(event.get(name)) for event in events], dtype=np.float64)


def _map_by_tiou(metrics: Json) -> dict[float, float]:
    values: dict[float, float] = {}
    for key, value in _dict(metrics.get("map_by_tiou")).items():
        try:
            values[float(key)] = _number(value)
        except ValueError:
            continue
    return dict(sorted(values.items()))


def _tiou_range(tious: Sequence[float]) -> str:
    if len(tious) < 2:
        return f"at tIoU {tious[0]:g}" if tious else "tIoU unknown"
    steps = np.diff(tious)
    even = f" in steps of {steps[0]:.3g}" if np.allclose(steps, steps[0], atol=1e-6) else f", {len(tious)} thresholds"
    return f"tIoU {tious[0]:g} to {tious[-1]:g}{even}"


def _percent(value: float, digits: int = 2) -> str:
    return UNKNOWN if math.isnan(value) else f"{100 * value:.{digits}f}"


def _bytes(value: float | None) -> str:
    return "out of memory" if value is None else "unknown" if math.isnan(value) else gigabytes(round(value))


def _duration(seconds: float) -> str:
    """45 s, 7 min 31 s, 2 h 05 min."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def _clock(seconds: float, whole: float) -> str:
    return f"{seconds:g} s" if whole < 120 else f"{int(seconds // 60)}:{int(seconds % 60):02d}"


def _ticks(duration: float) -> list[float]:
    """Up to six round times from 0 to the end."""
    steps = (0.1, 0.2, 0.5, 1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 900, 1800, 3600)
    step = next((s for s in steps if duration / s <= 5.5), duration / 5)
    return [round(i * step, 6) for i in range(int(duration / step + 1e-6) + 1)]


def _cut(text: str, most: int) -> str:
    text = text.encode(errors="replace").decode()  # file names may hold bytes that are no text
    return text if len(text) <= most else f"{text[: most - 1]}\N{HORIZONTAL ELLIPSIS}"


# Figures: each is drawn into axes, alone for the page and together for report.png


@dataclass(frozen=True)
class Panel:
    """A figure of the page: what it shows, the same in words and numbers, and how to draw it into axes."""

    name: str
    title: str
    alt: str
    draw: Callable[[Sequence[Axes]], None]
    num_axes: int = 1


def panels(record: Record) -> dict[str, Panel | str]:
    """Every figure by name, or the sentence that says why there is none."""
    log = record.log
    found: dict[str, Panel | str] = {}

    by_tiou = _map_by_tiou(record.metrics)
    found["map"] = "No mAP: the run was not evaluated, or has no validation videos."
    if by_tiou:
        words = ", ".join(f"{_percent(m)} at {t:g}" for t, m in by_tiou.items())
        found["map"] = Panel("map", "mAP by tIoU", f"mAP in percent: {words}.", lambda axes: draw_map(axes[0], by_tiou))

    joint = log.steps.get("joint", NO_STEPS)
    found["memory"] = found["rungs"] = "No joint step was logged."
    if len(joint):
        peaks, budgets = joint["peak"], joint["budget"]
        found["memory"] = Panel(
            "memory", "Memory of each joint step, and the budget",
            f"Peak memory of {len(joint)} joint steps: {_span(peaks, _bytes)}, budget {_span(budgets, _bytes)}.",
            lambda axes: draw_memory(axes[0], joint),
        )  # fmt: skip
        snippets, sides = joint["num_snippets"], joint["side"]
        found["rungs"] = Panel(
            "rungs", "Rung of each joint step",
            f"Snippets: {_span(snippets, '{:g}'.format)}; side: {_span(sides, '{:g} px'.format)}; patterns: "
            f"{', '.join(dict.fromkeys(joint.patterns))}.",
            lambda axes: draw_rungs(axes, joint), num_axes=2,
        )  # fmt: skip

    average = _column(log.validations, "average")
    found["validation"] = "No validation was logged."
    if log.validations:
        found["validation"] = Panel(
            "validation", "Validation: average mAP by epoch",
            f"Average mAP in percent over {len(average)} validations: {_ends(average, _percent)}, "
            f"highest {_percent(float(np.fmax.reduce(average)))}.",
            lambda axes: draw_by_epoch(axes[0], log.validations, average, "average mAP, %", best=True),
        )  # fmt: skip
    found["pretrain"] = _loss_panel("pretrain", "Pretrain: loss", log.steps.get("pretrain", NO_STEPS))
    epochs = log.epochs.get("pretrain", [])
    accuracy = _column(epochs, "accuracy")
    found["accuracy"] = "No pretrain epoch was finished."
    if epochs:
        found["accuracy"] = Panel(
            "accuracy", "Pretrain: accuracy by epoch",
            f"Accuracy in percent over {len(epochs)} epochs: {_ends(accuracy, _percent)}.",
            lambda axes: draw_by_epoch(axes[0], epochs, accuracy, "accuracy, %"),
        )  # fmt: skip
    for stage in ("joint", "head"):
        found[stage] = _loss_panel(stage, f"{stage.capitalize()}: loss and its terms", log.steps.get(stage, NO_STEPS))
    return found


def _loss_panel(stage: str, title: str, steps: Steps) -> Panel | str:
    if not len(steps):
        return f"No {stage} step was logged."
    words = f"Loss over {len(steps)} {stage} steps: {_ends(steps['loss'], '{:.3f}'.format)}."
    return Panel(stage, title, words, lambda axes: draw_loss(axes[0], steps))


def _span(values: Floats, say: Callable[[float], str]) -> str:
    low, high = float(np.fmin.reduce(values)), float(np.fmax.reduce(values))
    if math.isnan(low):
        return "unknown"
    return say(low) if low == high else f"{say(low)} to {say(high)}"


def _ends(values: Floats, say: Callable[[float], str]) -> str:
    known = values[np.isfinite(values)]
    return f"from {say(float(known[0]))} to {say(float(known[-1]))}" if len(known) else "never a finite number"


def draw_map(axes: Axes, by_tiou: Mapping[float, float]) -> None:
    """Bars of mAP in percent, one for each tIoU; a line where there are too many for bars."""
    values = [100 * value for value in by_tiou.values()]
    if len(values) > 15:
        axes.plot(list(by_tiou), values, color=PALETTE[0])
    else:
        bars = axes.bar([f"{tiou:g}" for tiou in by_tiou], values, color=PALETTE[0], width=0.7)
        axes.bar_label(bars, fmt="%.1f", padding=2, fontsize="small")
        axes.grid(False, axis="x")
    axes.set(xlabel="tIoU", ylabel="mAP, %", ylim=(0, 1.12 * max(np.nanmax([0.0, *values]), 1e-3)))


def _by_pattern(joint: Steps, name: str) -> Iterator[tuple[str, str, str, Floats, Floats]]:
    """(pattern, colour, marker, step, value) of joint steps, thinned; of each stretch the greatest value is kept."""
    patterns, values = np.array(joint.patterns), joint[name]
    known = [pattern.value for pattern in CYCLE]
    order = sorted(set(joint.patterns), key=lambda p: (known.index(p) if p in known else len(known), p))
    for pattern in order:
        where = np.flatnonzero(patterns == pattern)
        index, _, _, greatest = thin(values[where])
        i = known.index(pattern) if pattern in known else len(known)
        x = np.interp(index, np.arange(len(where)), where + 1)
        yield pattern.replace("_", "-"), PALETTE[i], MARKERS[i], x, greatest


def _dot(steps: Steps) -> float:
    return 3.2 if len(steps) > 60 else 5.0


def _mark_epochs(axes: Axes, steps: Steps) -> None:
    """A faint line where an epoch begins, unless they would be too many to tell apart."""
    begins = np.flatnonzero(np.diff(steps["epoch"])) + 1.5
    if len(begins) <= 40:
        for x in begins:
            axes.axvline(x, color=GRID, linewidth=0.8, zorder=0)
    axes.grid(False, axis="x")
    axes.set_xlim(0.5 - 0.01 * len(steps), len(steps) * 1.01 + 0.5)
    axes.locator_params(axis="x", integer=True, nbins=6)


def _legend(axes: Axes, columns: int) -> None:
    axes.legend(loc="lower left", bbox_to_anchor=(-0.02, 1.0), ncols=columns, frameon=False, borderaxespad=0.2,
                handlelength=1.0, columnspacing=1.0, handletextpad=0.4, fontsize="small")  # fmt: skip


def draw_memory(axes: Axes, joint: Steps) -> None:
    """Peak of every joint step, coloured by pattern, what was predicted of it, and the budget above it (GB); where
    others left less than the budget, that too.
    """
    budgets = joint["budget"] / 1e9
    changes = np.flatnonzero(np.diff(np.nan_to_num(budgets, nan=-1.0), prepend=math.nan) != 0)
    for first, last in zip(changes, [*changes[1:], len(budgets)], strict=True):
        label = "budget" if first == 0 else None
        axes.plot([first + 0.5, last + 0.5], [budgets[first]] * 2, "--", color=INK, linewidth=1.4, label=label)
    steps = np.arange(1, len(joint) + 1)
    left = np.where(joint["limit"] < joint["budget"], joint["limit"], math.nan) / 1e9
    if not np.isnan(left).all():
        axes.plot(steps, left, ":", color=INK, linewidth=1.4, label="left by others")
    if not np.isnan(joint["predicted"]).all():
        axes.plot(steps, joint["predicted"] / 1e9, "-", color=INK, alpha=0.45, linewidth=0.9, label="predicted")
    for pattern, colour, marker, x, peaks in _by_pattern(joint, "peak"):
        axes.plot(x, peaks / 1e9, marker, color=colour, markersize=_dot(joint), markeredgewidth=0, label=pattern)
    _mark_epochs(axes, joint)
    axes.set(xlabel="joint step", ylabel="GB")
    axes.set_ylim(0, axes.get_ylim()[1] * 1.04)
    _legend(axes, 4)


def draw_rungs(axes: Sequence[Axes], joint: Steps) -> None:
    """Snippets above side, for every joint step, coloured by pattern."""
    for ax, name, label in zip(axes, ("num_snippets", "side"), ("snippets", "side, px"), strict=True):
        for pattern, colour, marker, x, values in _by_pattern(joint, name):
            ax.plot(x, values, marker, color=colour, markersize=_dot(joint), markeredgewidth=0, label=pattern)
        _mark_epochs(ax, joint)
        ax.set_ylabel(label)
        ax.set_ylim(0, ax.get_ylim()[1] * 1.08)
    axes[0].tick_params(labelbottom=False)
    axes[1].set_xlabel("joint step")
    _legend(axes[0], 3)


def draw_loss(axes: Axes, steps: Steps) -> None:
    """The loss and its terms over steps; of long runs the mean of each stretch, and the loss's range behind it."""
    loss = steps["loss"]
    index, least, mean, greatest = thin(loss)
    terms = [(name, thin(steps[name])[2]) for name in LOSS_TERMS]
    terms = [(name, values) for name, values in terms if np.nanmax(np.append(values, 0.0)) > 0]
    if len(loss) > len(index):
        axes.fill_between(index + 1, least, greatest, color=PALETTE[0], alpha=0.18, linewidth=0)
    axes.plot(index + 1, mean, color=PALETTE[0], linewidth=1.6, label="loss", zorder=3)
    for i, (name, values) in enumerate(terms, 1):
        axes.plot(index + 1, values, color=PALETTE[i], linewidth=1.0, label=name)
    known = mean[np.isfinite(mean)]
    spread = len(known) > 0 and known.min() > 0 and known.max() > 15 * np.median(known)
    if spread:
        axes.set_yscale("log")
    else:
        axes.set_ylim(0, None)
    if len(index) == 1:
        axes.lines[0].set_marker("o")
    _mark_epochs(axes, steps)
    axes.set(xlabel="step", ylabel="loss (log scale)" if spread else "loss")
    if terms:
        _legend(axes, 5)


def draw_by_epoch(axes: Axes, events: Sequence[Json], values: Floats, label: str, best: bool = False) -> None:
    """A fraction by epoch, in percent, counted from 1; the highest marked when asked."""
    x = _column(events, "epoch") + 1
    axes.plot(x, 100 * values, "o-", color=PALETTE[0], markersize=3.5)
    if best and np.isfinite(values).any():
        i = int(np.nanargmax(values))
        axes.plot(x[i], 100 * values[i], "o", color=PALETTE[1], markersize=7)
        at = (float(x[i]), float(100 * values[i]))
        axes.annotate(f"{at[1]:.2f}", at, (0, 7), textcoords="offset points", ha="center")
    axes.set(xlabel="epoch", ylabel=label)
    axes.set_ylim(0, 1.15 * max(np.nanmax(np.append(100 * values, 0.0)), 0.1))
    axes.locator_params(axis="x", integer=True, nbins=8)


def draw_timeline(axes: Axes, row: Timeline, colours: Mapping[str, int], best_score: float) -> None:
    """A video's segments above its detections; the lower the score, the fainter."""
    below = 1 + max((bar.lane for bar in row.truth), default=0)
    for bar in (*row.truth, *row.found):
        colour = PALETTE[colours[bar.label]]
        is_truth = math.isnan(bar.score) and bar in row.truth
        y = bar.lane if is_truth else below + 0.35 + bar.lane
        width = max(bar.end - bar.start, row.duration / 400)
        alpha = 1.0 if is_truth else _opacity(bar.score, best_score)
        axes.broken_barh([(bar.start, width)], (y, 0.8), facecolor=(colour, alpha), edgecolor=colour, linewidth=0.6)
    axes.axhline(below + 0.07, color=GRID, linewidth=0.8)
    axes.set(xlim=(0, row.duration), ylim=(below + 0.4 + MOST_LANES, -0.2), yticks=[])
    axes.grid(False)
    axes.tick_params(labelsize="x-small")
    ticks = _ticks(row.duration)
    axes.set_xticks(ticks, [_clock(tick, row.duration) for tick in ticks])


def _opacity(score: float, best: float) -> float:
    return 0.2 if math.isnan(score) or not best > 0 else 0.2 + 0.8 * min(max(score / best, 0.0), 1.0)


def _best_score(rows: Sequence[Timeline]) -> float:
    return max((bar.score for row in rows for bar in row.found if bar.score == bar.score), default=math.nan)


def _style(background: str) -> Any:
    return {
        "figure.facecolor": background, "axes.facecolor": background, "savefig.facecolor": background,
        "text.color": INK, "axes.labelcolor": INK, "axes.edgecolor": GRID, "xtick.color": GRID, "ytick.color": GRID,
        "xtick.labelcolor": INK, "ytick.labelcolor": INK, "axes.grid": True, "grid.color": GRID, "grid.linewidth": 0.8,
        "axes.axisbelow": True, "axes.spines.top": False, "axes.spines.right": False, "font.size": 10,
        "text.parse_math": False, "svg.fonttype": "none", "svg.hashsalt": "lofi_fast",
    }  # fmt: skip


def svg(panel: Panel) -> str:
    """A panel as inline SVG: text in the page's font, colours as CSS variables, ids of its own."""
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    with matplotlib.rc_context(_style("none")):
        figure = Figure(figsize=(5.2, 3.0), layout="constrained")
        panel.draw(list(np.atleast_1d(figure.subplots(panel.num_axes, 1))))
        FigureCanvasSVG(figure)
        file = io.StringIO()
        figure.savefig(file, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    text = file.getvalue()
    text = re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.DOTALL)
    viewbox = re.search(r'viewBox="[^"]*"', text)
    assert viewbox is not None
    head = f'<svg {viewbox[0]} role="img" aria-label="{html.escape(panel.alt)}" class="plot">'
    text = head + text[text.index(">") + 1 :]
    text = re.sub(r'(id="|url\(#|href="#)', rf"\g<1>{panel.name}-", text)
    text = text.replace('xlink:href="', 'href="')
    for colour, name in [(INK, "ink"), (GRID, "grid"), *((c, f"c{i}") for i, c in enumerate(PALETTE))]:
        text = text.replace(colour, f"var(--{name})")
    return text.strip()


def overview(record: Record, shown: Mapping[str, Panel | str], rows: Sequence[Timeline]) -> bytes:
    """report.png: the headline, every figure and the timelines, on white."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    heights = [1.0, 12.0, *([0.6 + 1.25 * ((len(rows) + 1) // 2)] if rows else [])]
    with matplotlib.rc_context(_style("white")), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph")  # a name in a script that the font lacks is drawn as boxes
        figure = Figure(figsize=(13, sum(heights)), dpi=100, layout="constrained")
        FigureCanvasAgg(figure)
        parts = figure.subfigures(len(heights), 1, height_ratios=heights, squeeze=False)[:, 0]
        tiles = headline(record)
        for i, tile in enumerate(tiles):
            x = 0.02 + 0.97 * i / len(tiles)
            parts[0].text(x, 0.72, tile.name, va="bottom")
            size = 21 if len(tile.value) < 16 else 10.5
            lines = textwrap.fill(tile.value, 22)
            parts[0].text(x, 0.62, lines, fontsize=size, va="top", weight="bold", color=PALETTE[0])
        _draw_panels(parts[1], shown)
        if rows:
            _draw_timelines(parts[2], rows)
        file = io.BytesIO()
        figure.savefig(file, format="png", metadata={"Software": "lofi_fast"})
    return file.getvalue()


def _draw_panels(figure: FigureBase, shown: Mapping[str, Panel | str]) -> None:
    grid = figure.add_gridspec(4, 2)
    for i, panel in enumerate(shown.values()):
        cell = grid[i // 2, i % 2]
        num_axes = panel.num_axes if isinstance(panel, Panel) else 1
        inner = cell.subgridspec(num_axes, 1)
        axes = [figure.add_subplot(inner[k]) for k in range(num_axes)]
        if isinstance(panel, Panel):
            panel.draw(axes)
            pad = 22 if axes[0].get_legend() else 8
            axes[0].set_title(panel.title, loc="left", weight="bold", fontsize=10.5, pad=pad)
        else:
            axes[0].set_axis_off()
            axes[0].text(0.5, 0.5, panel, ha="center", va="center", transform=axes[0].transAxes)


def _draw_timelines(figure: FigureBase, rows: Sequence[Timeline]) -> None:
    from matplotlib.patches import Patch

    colours, best = class_colours(rows), _best_score(rows)
    axes = np.atleast_1d(figure.subplots((len(rows) + 1) // 2, 2)).ravel()
    for ax, row in zip(axes, rows, strict=False):
        draw_timeline(ax, row, colours, best)
        ax.set_title(_cut(row.video, 60), loc="left", fontsize=8.5, pad=3)
    for ax in axes[len(rows) :]:
        ax.set_axis_off()
    patches = [Patch(color=PALETTE[i], label=_cut(name, 24)) for name, i in colours.items()]
    title = "Validation videos: ground truth above the top detections (fainter: lower score)"
    figure.suptitle(title, x=0.02, ha="left", weight="bold", fontsize=10.5)
    if len(patches) <= len(PALETTE):
        figure.legend(handles=patches, loc="outside lower left", ncols=len(PALETTE), frameon=False, fontsize="small")


# The page


@dataclass(frozen=True)
class Tile:
    """One number of the headline, what it is, and what to know about it."""

    name: str
    value: str
    note: str
    warns: bool = False


def headline(record: Record) -> list[Tile]:
    """mAP, budget, highest peak, device, time."""
    log, metrics = record.log, record.metrics
    start = log.starts[-1] if log.starts else {}
    tiles = []

    average = _number(metrics.get("average_map"))
    if not math.isnan(average):
        note = _tiou_range(list(_map_by_tiou(metrics)))
        if "videos" in metrics and "segments" in metrics:
            note += f"; {metrics['videos']} videos, {metrics['segments']} segments"
        tiles.append(Tile("average mAP", f"{_percent(average)} %", note))
    elif np.isfinite(_column(log.validations, "average")).any():
        best = int(np.nanargmax(_column(log.validations, "average")))
        seen = log.validations[best]
        note = f"the best validation so far, after epoch {_number(seen.get('epoch')) + 1:g}; not the final result"
        tiles.append(Tile("average mAP so far", f"{_percent(_number(seen.get('average')))} %", note))
    else:
        tiles.append(Tile("average mAP", UNKNOWN, "not evaluated"))

    budget = _number(record.plan.get("budget", start.get("budget")))
    asked = _dict(record.config.get("budget")).get("text")
    note = "" if math.isnan(budget) else f"{budget / 2**30:.2f} GiB"
    tiles.append(Tile("memory budget", _bytes(budget), note + (f"; --mem-budget {asked}" if asked else "")))

    if log.highest is None:
        tiles.append(Tile("highest peak", UNKNOWN, "no peak was logged"))
    else:
        peak, allowed, where = log.highest
        share = "" if math.isnan(allowed) else f"{100 * peak / allowed:.1f} % of the budget, "
        tiles.append(Tile("highest peak", _bytes(peak), f"{share}in {where}", warns=log.over > 0))

    device = str(record.environment.get("device") or start.get("device") or "unknown")
    precision = record.environment.get("precision") or start.get("precision")
    tiles.append(Tile("device", device, str(precision or "")))

    sittings = f"in {len(log.starts)} sittings" if len(log.starts) > 1 else "from start to last event"
    known = bool(log.seconds)
    tiles.append(Tile("time", _duration(sum(log.seconds.values())) if known else "unknown", sittings if known else ""))
    return tiles


_e = html.escape


def page(record: Record, shown: Mapping[str, Panel | str], rows: Sequence[Timeline]) -> str:
    """report.html."""
    preset = record.config.get("preset")
    title = f"{record.folder.resolve().name}{f' · {preset}' if preset else ''}"
    sections = [
        f"<header><h1>{_e(title)}</h1><p class=state>{_e(_state(record))}</p>{_notes(record)}</header>",
        f"<section class=tiles aria-label='Headline'>{''.join(map(_tile, headline(record)))}</section>",
        _section("Detection", f"<div class=pair>{_figure(shown['map'])}{_map_table(record)}</div>"),
        _section("Memory", f"<div class=pair>{_figure(shown['memory'])}{_figure(shown['rungs'])}</div>"
                 + _plan_table(record)),
        _section("Learning", "<div class=pair>" + "".join(
            _figure(shown[name]) for name in ("joint", "head", "validation", "pretrain", "accuracy")) + "</div>"),
        _section("Validation videos", _timelines(record, rows)),
        _section("Average precision by class", _class_table(record)),
        _section("Skipped videos", _skipped_table(record)),
        _section("Time by stage", _time_table(record)),
        _section("Settings and environment", _settings(record)),
    ]  # fmt: skip
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        f"<title>{_e(title)} · lofi_fast</title>\n<style>{STYLE}</style>\n</head>\n<body>\n<main>\n"
        + "\n".join(sections)
        + f"\n<footer>lofi_fast {_e(__version__)}. <code>python -m lofi_fast.report "
        f"{_e(shlex.quote(str(record.folder)))}</code> writes this page again.</footer>\n</main>\n</body>\n</html>\n"
    )


def _section(title: str, body: str) -> str:
    return f"<section><h2>{_e(title)}</h2>{body}</section>"


def _state(record: Record) -> str:
    log = record.log
    if not log.last:
        return "No event was logged."
    when = _time(log.last)
    stamp = f"{when:%Y-%m-%d %H:%M} UTC" if when else "an unknown time"
    if log.last.get("event") == "done":
        return f"Finished {stamp}."
    where = [f"{key} {log.last[key]}" for key in ("stage", "plan") if key in log.last]
    where += [f"{key} {_number(log.last[key]) + 1:g}" for key in ("epoch", "step") if key in log.last]
    at = f" ({', '.join(where)})" if where else ""
    return f"Not finished: the log ends {stamp}, with the event {log.last.get('event')}{at}. --resume goes on with it."


def _notes(record: Record) -> str:
    """What is wrong or not there, before anything else."""
    log, notes = record.log, [f"{sentence}." for sentence in record.absent]
    if log.unreadable:
        notes.append(f"log.jsonl: {log.unreadable} torn or unreadable line(s) left out.")
    for stage, steps in log.steps.items():
        lost = int(np.isnan(steps["loss"]).sum())
        if lost:
            notes.append(f"The loss of {lost} of {len(steps)} {stage} steps is not a finite number.")
    if log.over:
        notes.append(f"{log.over} measured peak(s) lie above the budget.")
    if log.skipped:
        notes.append(f"{len(log.skipped)} video(s) were skipped (listed below).")
    return f"<ul class=notes>{''.join(f'<li>{_e(note)}</li>' for note in notes)}</ul>" if notes else ""


def _tile(tile: Tile) -> str:
    size = " long" if len(tile.value) > 16 else ""
    warning = " warns" if tile.warns else ""
    note = f"{'⚠ over the budget: ' if tile.warns else ''}{tile.note}"
    return (
        f"<div class='tile{warning}'><div class=name>{_e(tile.name)}</div>"
        f"<div class='value{size}'>{_e(tile.value)}</div><div class=note>{_e(note)}</div></div>"
    )


def _figure(panel: Panel | str) -> str:
    if isinstance(panel, str):
        return f"<p class=absent>{_e(panel)}</p>"
    return f"<figure><figcaption>{_e(panel.title)}</figcaption>{svg(panel)}</figure>"


def _table(head: Sequence[str], rows: Iterable[Sequence[str]], caption: str, numbers_from: int = 1) -> str:
    """A table of escaped cells that scrolls sideways by itself; columns from `numbers_from` on are set right."""
    rows = list(rows)

    def cells(tag: str, row: Sequence[str]) -> str:
        made = (f"<{tag}{' class=n' if i >= numbers_from else ''}>{cell}</{tag}>" for i, cell in enumerate(row))
        return f"<tr>{''.join(made)}</tr>"

    body = "".join(cells("td", row) for row in rows)
    table = (
        f"<div class=scroll tabindex=0 role=region aria-label='{_e(caption)}'><table><caption>{_e(caption)}</caption>"
        f"<thead>{cells('th', [_e(name) for name in head])}</thead><tbody>{body}</tbody></table></div>"
    )
    if len(rows) <= MOST_OPEN_ROWS:
        return table
    return f"<details><summary>{_e(caption)} ({len(rows)} rows)</summary>{table}</details>"


def _map_table(record: Record) -> str:
    by_tiou = _map_by_tiou(record.metrics)
    if not by_tiou:
        return ""
    rows = [(f"{tiou:g}", _percent(value, 3)) for tiou, value in by_tiou.items()]
    rows.append(("<b>average</b>", f"<b>{_percent(_number(record.metrics.get('average_map')), 3)}</b>"))
    best = _dict(record.metrics.get("best_epoch"))
    note = ""
    if best:
        note = f"; best epoch {_number(best.get('epoch')) + 1:g} with {_percent(_number(best.get('average')))} %"
    return _table(("tIoU", "mAP, %"), rows, f"Mean over classes{note}")


def _plan_table(record: Record) -> str:
    rows = plan_rows(record)
    if not rows:
        return "<p class=absent>No plan was made: neither plan.json nor the log has one.</p>"
    budget = _number(record.plan.get("budget", record.log.starts[-1].get("budget") if record.log.starts else None))
    joint = record.log.steps.get("joint", NO_STEPS)
    cells = []
    for row in rows:
        peaks = joint["peak"][[f"joint, {pattern}" == row.name for pattern in joint.patterns]]
        trained = f"{_bytes(float(np.fmax.reduce(peaks)))} in {len(peaks)} steps" if len(peaks) else UNKNOWN
        share = f" ({100 * row.peak / budget:.0f} %)" if budget > 0 and not math.isnan(row.peak) else ""
        others = "; ".join(f"{text}: {_bytes(peak)}" for text, peak in row.others) or "nothing"
        cells.append((
            _e(row.name.replace("_", "-")), _e(row.chosen.replace(" x ", TIMES)),
            UNKNOWN if math.isnan(row.cut) else f"{row.cut:g}",
            UNKNOWN if math.isnan(row.batch) else f"{row.batch:g}",
            _e(_bytes(row.peak) + share), _e(trained), f"<span class=wide>{_e(others.replace(' x ', TIMES))}</span>",
        ))  # fmt: skip
    head = ("plan", "rung or size", "cut", "batch", "peak expected", "highest in training", "also measured")
    return _table(head, cells, "The plan: what was chosen at the start to fit the budget", 2)


def _timelines(record: Record, rows: Sequence[Timeline]) -> str:
    if not rows:
        return "<p class=absent>No video with segments is in ground_truth.json.</p>"
    colours, best = class_colours(rows), _best_score(rows)
    total = len(_dict(record.ground_truth.get("database")))
    note = f"{len(rows)} of {total} videos, evenly spaced by name. Below the ground truth are the top detections: "
    note += "the fainter, the lower the score"
    note += "." if math.isnan(best) else f" (full colour: {best:.3f}, the highest shown)."
    if len(colours) > len(PALETTE):
        note += f" {len(colours)} classes share {len(PALETTE)} colours; touch a bar for its class."
    if not record.predictions:
        note += " There are no predictions to show."
    return f"<p>{_e(note)}</p>" + "".join(_timeline(row, colours, best) for row in rows)


def _timeline(row: Timeline, colours: Mapping[str, int], best: float) -> str:
    labels = dict.fromkeys(bar.label for bar in (*row.truth, *row.found))
    key = "".join(f"<li><i style='background:var(--c{colours[label]})'></i>{_e(label)}</li>" for label in labels)
    hidden = f"; {row.left_out} more detections not shown" if row.left_out else ""
    return (
        f"<div class=video><h3>{_e(row.video)}</h3><small>{row.duration:.1f} s{hidden}</small><div class=lanes>"
        f"<span>truth</span>{_lane_svg(row.truth, row, colours, best, 'Ground truth')}"
        f"<span>detected</span>{_lane_svg(row.found, row, colours, best, 'Top detections')}"
        f"<span></span>{_time_axis(row.duration)}</div><ul class=key>{key}</ul></div>"
    )


def _lane_svg(bars: Sequence[Bar], row: Timeline, colours: Mapping[str, int], best: float, what: str) -> str:
    height, gap = 14, 3
    lanes = 1 + max((bar.lane for bar in bars), default=0)
    said = [_say_bar(bar) for bar in sorted(bars, key=lambda bar: bar.start)]
    more = f" and {len(said) - 12} more" if len(said) > 12 else ""
    alt = f"{what} of {row.video}: {'; '.join(said[:12]) or 'none'}{more}"
    shapes = []
    for bar in bars:
        left, right = (100 * min(max(t / row.duration, 0.0), 1.0) for t in (bar.start, bar.end))
        opacity = 1.0 if what == "Ground truth" else _opacity(bar.score, best)
        shapes.append(
            f"<rect x='{left:.2f}%' y='{bar.lane * (height + gap) + 1}' width='{max(right - left, 0.25):.2f}%' "
            f"height='{height}' rx='2' style='fill:var(--c{colours[bar.label]});stroke:var(--c{colours[bar.label]})' "
            f"fill-opacity='{opacity:.2f}'><title>{_e(_say_bar(bar))}</title></rect>"
        )
    return f"<svg class=lane height='{lanes * (height + gap)}' role=img aria-label='{_e(alt)}'>{''.join(shapes)}</svg>"


def _say_bar(bar: Bar) -> str:
    score = "" if math.isnan(bar.score) else f", score {bar.score:.3f}"
    return f"{bar.label}, {bar.start:.2f} to {bar.end:.2f} s{score}"


def _time_axis(duration: float) -> str:
    marks = []
    for tick in _ticks(duration):
        x = 100 * tick / duration
        anchor = "start" if tick == 0 else "end" if x > 95 else "middle"
        marks.append(f"<line x1='{x:.2f}%' x2='{x:.2f}%' y1='0' y2='4'/>")
        marks.append(f"<text x='{x:.2f}%' y='15' text-anchor='{anchor}'>{_clock(tick, duration)}</text>")
    return f"<svg class=axis height='18' aria-hidden=true>{''.join(marks)}</svg>"


def _class_table(record: Record) -> str:
    precision = _dict(record.metrics.get("average_precision"))
    if not precision:
        return "<p class=absent>No average precision by class: metrics.json has none.</p>"
    tious = list(_map_by_tiou(record.metrics))
    segments = Counter(
        str(_dict(item).get("label"))
        for video in _dict(record.ground_truth.get("database")).values()
        for item in _list(_dict(video).get("annotations"))
    )
    rows = []
    for name, values in precision.items():
        numbers = np.array([_number(value) for value in _list(values)], dtype=np.float64)
        known = numbers[np.isfinite(numbers)]
        rows.append((float(known.mean()) if len(known) else math.nan, name, numbers))
    rows.sort(key=lambda row: (-row[0] if row[0] == row[0] else math.inf, row[1]))
    cells = [
        (_e(name), str(segments[name]) if segments else UNKNOWN, f"<b>{_shaded(mean)}</b>", *map(_shaded, numbers))
        for mean, name, numbers in rows
    ]
    head = ("class", "segments", "average", *(f"{tiou:g}" for tiou in tious))
    return _table(head, cells, f"Average precision in percent, by tIoU, of {len(rows)} classes, best first")


def _shaded(value: float) -> str:
    share = 0.0 if math.isnan(value) else min(max(value, 0.0), 1.0)
    return f"<span class=ap style='--v:{100 * share:.0f}%'>{_percent(value, 1)}</span>"


def _skipped_table(record: Record) -> str:
    if not record.log.skipped:
        return "<p>None.</p>" if record.log.starts else "<p class=absent>Unknown: no log.</p>"
    cells = [[_e(str(s.get(key, ""))) for key in ("video", "reason", "path")] for s in record.log.skipped]
    return _table(("video", "why", "file"), cells, "Videos that were left out", 3)


def _time_table(record: Record) -> str:
    log = record.log
    if not log.seconds:
        return "<p class=absent>Unknown: the log has no two events in a row.</p>"
    cells = []
    for stage, seconds in log.seconds.items():
        steps = log.steps.get(stage, NO_STEPS)
        what = (str(len(set(steps["epoch"]))), str(len(steps))) if len(steps) else (UNKNOWN, UNKNOWN)
        cells.append((_e(stage), *what, _duration(seconds)))
    return _table(("stage", "epochs", "steps", "time"), cells, "Wall-clock time between events, all sittings")


def _settings(record: Record) -> str:
    commands = [
        f"python -m lofi_fast.train {shlex.join(str(x) for x in _list(start.get('argv')))}".strip()
        for start in record.log.starts
    ]
    parts = []
    if commands:
        listed = "".join(f"<li><code>{_e(command)}</code></li>" for command in commands)
        parts.append(f"<details><summary>Command lines</summary><ol>{listed}</ol></details>")
    files = {"Settings (config.json)": record.config, "Environment (environment.json)": record.environment}
    for title, content in files.items():
        if content:
            rows = [(f"<code>{_e(name)}</code>", _e(value)) for name, value in _flat(content)]
            body = "".join(f"<tr><td>{name}</td><td>{value}</td></tr>" for name, value in rows)
            parts.append(f"<details><summary>{title}</summary><div class=scroll><table>{body}</table></div></details>")
        else:
            parts.append(f"<p class=absent>{title}: not there.</p>")
    return "".join(parts)


def _flat(content: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """("data.window", "32.0") and so on, of nested settings."""
    for name, value in content.items():
        if isinstance(value, dict) and value:
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value if isinstance(value, str) else json.dumps(value)


STYLE = """
:root { color-scheme: light dark; --ink: #1b1f24; --quiet: #59636e; --ground: #fff; --card: #f4f5f7; --grid: #d6dae0;
  --warn: #b3400a; --c0: #0072b2; --c1: #d55e00; --c2: #009e73; --c3: #cc79a7; --c4: #56b4e9; --c5: #e69f00;
  --c6: #7f7f7f }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e7eaee; --quiet: #9aa4b0; --ground: #121519; --card: #1c2127; --grid: #39414b; --warn: #ff9d5c;
    --c0: #3d9fdf; --c1: #f07c2b; --c2: #1db98e; --c3: #d98bb6; --c6: #9a9a9a } }
* { box-sizing: border-box }
body { margin: 0; background: var(--ground); color: var(--ink); overflow-wrap: anywhere; -webkit-text-size-adjust: 100%;
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif }
main { max-width: 68rem; margin: 0 auto; padding: 1.25rem 1rem 3rem }
h1 { font-size: 1.6rem; line-height: 1.2; margin: 0 }
h2 { font-size: 1.15rem; margin: 2.2rem 0 .7rem; padding-bottom: .25rem; border-bottom: 1px solid var(--grid) }
h3 { font-size: .95rem; margin: 0; display: inline }
p { margin: .4rem 0 }
.state, .absent, .name, .note, small, caption, footer { color: var(--quiet) }
.name, .note, .key, caption, footer { font-size: .85rem }
.notes { margin: .8rem 0 0; padding: .6rem .9rem .6rem 2rem; background: var(--card);
  border-left: 4px solid var(--warn) }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 11.5rem), 1fr)); gap: .7rem;
  margin-top: 1.2rem }
.tile { background: var(--card); border-radius: .6rem; padding: .8rem 1rem }
.tile.warns { outline: 2px solid var(--warn) }
.tile.warns .note { color: var(--warn) }
.value { font-size: 1.7rem; font-weight: 650; line-height: 1.25; font-variant-numeric: tabular-nums }
.value.long { font-size: 1.05rem }
.pair { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 24rem), 1fr)); gap: 1.2rem;
  align-items: start }
.pair > * { margin: 0; min-width: 0 }
figcaption, summary { font-weight: 600; font-size: .95rem }
svg.plot { width: 100%; height: auto; display: block }
svg.plot text { font-family: inherit !important }
.scroll { overflow-x: auto; margin: .5rem 0 }
table { border-collapse: collapse; font-size: .9rem; overflow-wrap: normal; font-variant-numeric: tabular-nums }
caption { text-align: left; padding-bottom: .3rem }
th, td { padding: .28rem .9rem .28rem 0; text-align: left; vertical-align: top; border-bottom: 1px solid var(--grid) }
th { font-weight: 600; white-space: nowrap }
td { min-width: 3rem }
.n { text-align: right; white-space: nowrap }
.wide { display: inline-block; min-width: 16rem; white-space: normal; text-align: left }
.ap { display: block; padding: 0 .35rem; border-radius: .2rem;
  background: color-mix(in srgb, var(--c0) calc(var(--v) * .45), transparent) }
.video { margin: 1rem 0 1.4rem }
small { margin-left: .6rem }
.lanes { display: grid; grid-template-columns: auto minmax(0, 1fr); gap: .2rem .6rem; margin-top: .3rem }
.lanes span { font-size: .8rem; line-height: 1rem; color: var(--quiet) }
svg.lane, svg.axis { width: 100%; display: block }
svg.lane { background: var(--card) }
svg.axis line { stroke: var(--quiet) }
svg.axis text { fill: var(--quiet); font-size: .72rem }
.key { list-style: none; display: flex; flex-wrap: wrap; gap: .1rem 1rem; margin: .2rem 0 0; padding: 0 }
.key i { display: inline-block; width: .8em; height: .8em; border-radius: .15em; margin-right: .4em }
details { margin: .5rem 0 }
summary { cursor: pointer }
code { font: .88em ui-monospace, SFMono-Regular, Menlo, Consolas, monospace }
footer { margin-top: 2.5rem }
"""


def write_report(folder: Path) -> Path:
    """Write report.html and report.png of a run folder; returns the path of the page.

    Raises InputError when the folder is no run folder, or cannot be written to.
    """
    record = read_run(folder)
    shown = panels(record)
    rows = timelines(record.ground_truth, record.predictions)
    _write(folder / "report.png", overview(record, shown, rows))
    return _write(folder / "report.html", page(record, shown, rows).encode(errors="replace"))


def _write(path: Path, content: bytes) -> Path:
    """Atomic: a temporary name, then renamed."""
    partial = path.with_name(path.name + ".partial")
    try:
        partial.write_bytes(content)
        return partial.replace(path)
    except OSError as error:
        with suppress(OSError):
            partial.unlink()
        raise InputError(
            f"{path}: cannot write ({error.strerror}); free some space or mend the folder, then "
            f"python -m lofi_fast.report {shlex.quote(str(path.parent))}"
        ) from error


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status (0, or 2 after an "error: ..." line)."""
    parser = argparse.ArgumentParser(
        prog="python -m lofi_fast.report", description="Write report.html and report.png of a run folder."
    )
    parser.add_argument("folder", type=Path, metavar="RUN_FOLDER", help="the --out of a run, finished or not")
    try:
        print(write_report(parser.parse_args(argv).folder))
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())

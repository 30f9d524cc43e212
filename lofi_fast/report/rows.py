"""What the page shows of a run: its state in words, the headline, and the rows of its tables and timelines."""

from __future__ import annotations

import json
import math
import shlex
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from lofi_fast.budget import duration, gigabytes
from lofi_fast.report.read import (
    Floats,
    GroundTruthFile,
    JointPlan,
    MetricsFile,
    PredictionsFile,
    RunContents,
    Segment,
    Steps,
    finite,
    time_of,
)
from lofi_fast.run import events

MOST_VIDEOS = 8
MOST_LANES = 5  # of detections under one video
UNKNOWN, TIMES = "\N{EN DASH}", " \N{MULTIPLICATION SIGN} "


# Numbers in words


def percent(value: float, digits: int = 2) -> str:
    """A fraction in percent, without the sign."""
    return UNKNOWN if math.isnan(value) else f"{100 * value:.{digits}f}"


def memory(value: float | None) -> str:
    """Bytes as "0.77 GB"; None stands for a step that ran out of memory."""
    return "out of memory" if value is None else "unknown" if math.isnan(value) else gigabytes(round(value))


def clock(seconds: float, whole: float) -> str:
    """A time on the axis of a video that lasts `whole` seconds: seconds, or minutes and seconds of a long one."""
    return f"{seconds:g} s" if whole < 120 else f"{int(seconds // 60)}:{int(seconds % 60):02d}"


def ticks(whole: float) -> list[float]:
    """Up to six round times from 0 to the end of a video."""
    steps = (0.1, 0.2, 0.5, 1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 900, 1800, 3600)
    step = next((s for s in steps if whole / s <= 5.5), whole / 5)
    return [round(i * step, 6) for i in range(int(whole / step + 1e-6) + 1)]


def threshold_range(thresholds: Sequence[float], name: str = "tIoU") -> str:
    """Which tIoUs, or tolerances, an average goes over."""
    if len(thresholds) < 2:
        return f"at {name} {thresholds[0]:g}" if thresholds else f"{name} unknown"
    steps = np.diff(thresholds)
    even = f" in steps of {steps[0]:.3g}"
    if not np.allclose(steps, steps[0], atol=1e-6):
        even = f", {len(thresholds)} thresholds"
    return f"{name} {thresholds[0]:g} to {thresholds[-1]:g}{even}"


def count(number: int, noun: str) -> str:
    """ "1 step", "2 steps"."""
    return f"{number} {noun}{'' if number == 1 else 's'}"


# The state of the run


def state(run: RunContents) -> str:
    """Whether the run is finished and evaluated, and what to do where it is not."""
    log = run.log
    if log.last is None:
        return "No event was logged."
    when = time_of(log.last)
    stamp = f"{when:%Y-%m-%d %H:%M} UTC" if when else "at an unknown time"
    if not log.finished:
        results = "" if log.evaluated else " There are no results yet."
        return (
            f"Not finished: the log ends {stamp}, {_where(log.last)}.{results} "
            "The run's command with --resume goes on from its last checkpoint."
        )
    if log.evaluated:
        return f"Finished {stamp}."
    stages = run.config.get("stages")
    if isinstance(stages, list) and "eval" not in stages:
        return (
            f"Finished {stamp}, without an evaluation: --stages did not ask for it. "
            "The run's command with --resume --stages eval evaluates it."
        )
    return (
        f"Finished {stamp}, without an evaluation: no validation video has a segment. Annotate some, and run the same "
        "command with another --out."
    )


def _where(event: events.AnyEvent) -> str:
    """What the run was doing, like "in joint epoch 3, step 12"."""
    match event:
        case events.Step() | events.OutOfMemory() | events.NotFinite():
            return f"in {event.stage} epoch {event.epoch + 1}, step {event.step + 1}"
        case events.Epoch() | events.Validation():
            return f"after {event.stage} epoch {event.epoch + 1}"
        case events.Measured() | events.Planned():
            return f"while memory was planned ({event.plan})"
        case events.Features():
            return "after features were extracted"
        case events.Metrics() | events.Done():
            return "after the evaluation"
        case _:
            return "while the videos were prepared"


def notes(run: RunContents) -> list[str]:
    """What is wrong or not there, a sentence each."""
    log = run.log
    said = [f"{sentence}." for sentence in run.unread]
    if log.unreadable:
        said.append(f"log.jsonl: {log.unreadable} torn or unreadable line(s) left out.")
    for stage, steps in log.steps.items():
        lost = int(np.isnan(steps["loss"]).sum())
        if lost:
            said.append(f"The loss of {lost} of {len(steps)} {stage} steps is not a finite number.")
    for stage in dict.fromkeys(event.stage for event in log.not_finite):
        of_stage = [event for event in log.not_finite if event.stage == stage]
        kinds = Counter(event.what for event in of_stage)
        last = of_stage[-1]
        said.append(
            f"{count(len(of_stage), f'{stage} step')} updated nothing, because a number was not finite "
            f"({', '.join(f'{what}: {n}' for what, n in kinds.items())}); the last was step {last.step + 1} of epoch "
            f"{last.epoch + 1}, with {', '.join(last.videos[:3]) or 'unknown videos'}"
            f"{' and others' if len(last.videos) > 3 else ''}."
        )
    for stage in dict.fromkeys(event.stage for event in log.out_of_memory):
        where = dict.fromkeys((e.epoch, e.step) for e in log.out_of_memory if e.stage == stage)
        times = sum(event.stage == stage for event in log.out_of_memory)
        said.append(
            f"Memory ran out {count(times, 'time')}, in {count(len(where), f'{stage} step')}; each was taken again "
            "with the same videos by a lower plan."
        )
    if log.validated_otherwise:
        by = f" ({log.validations[-1].measure})" if log.validations[-1].measure else ""
        said.append(
            f"The validations of {count(log.validated_otherwise, 'epoch')} were scored at other thresholds than the "
            f"last one{by}, do not compare with it, and are left out."
        )
    if log.over:
        said.append(f"{log.over} measured peak(s) lie above the budget.")
    if log.skipped:
        said.append(f"{len(log.skipped)} video(s) were skipped (listed below).")
    return said


# The headline


@dataclass(frozen=True)
class Tile:
    """One number of the headline, what it is, and what to know about it."""

    name: str
    value: str
    note: str
    warns: bool = False


def headline(run: RunContents) -> list[Tile]:
    """mAP, budget, highest peak, device, time."""
    log = run.log
    start = log.starts[-1] if log.starts else None
    tiles = [_map_tile(run)]

    budget, asked = run.budget, run.config.get("budget")
    asked = asked.get("text") if isinstance(asked, dict) else asked
    note = "" if math.isnan(budget) else f"{budget / 2**30:.2f} GiB"
    tiles.append(Tile("memory budget", memory(budget), note + (f"; --mem-budget {asked}" if asked else "")))

    if log.highest is None:
        tiles.append(Tile("highest peak", UNKNOWN, "no peak was logged"))
    else:
        peak = log.highest
        share = "" if math.isnan(peak.budget) else f"{100 * peak.amount / peak.budget:.1f} % of the budget, "
        tiles.append(Tile("highest peak", memory(peak.amount), f"{share}in {peak.where}", warns=log.over > 0))

    device = str(run.environment.get("device") or (start.device if start else "unknown"))
    precision = str(run.environment.get("precision") or (start.precision if start else ""))
    tiles.append(Tile("device", device, precision))

    sittings = f"in {len(log.starts)} sittings" if len(log.starts) > 1 else "from start to last event"
    known = bool(log.seconds)
    tiles.append(Tile("time", duration(sum(log.seconds.values())) if known else "unknown", sittings if known else ""))
    return tiles


def _map_tile(run: RunContents) -> Tile:
    validations, metrics = run.log.validations, run.metrics
    average = finite(metrics.average_map)
    if not math.isnan(average):
        note = threshold_range(list(map_by_threshold(metrics)), threshold_name(metrics))
        if metrics.videos is not None and metrics.segments is not None:
            note += f"; {metrics.videos} videos, {metrics.segments} segments"
        if final := final_epoch(run):
            since = "" if run.log.finished or metrics.epoch is None else trained_since(run, metrics.epoch)
            note += f"; of the {'weights' if since else 'final weights,'} after {final}{since}"
        return Tile("average mAP", f"{percent(average)} %", note)
    averages = column(validations, "average")
    if np.isfinite(averages).any():
        best = validations[int(np.nanargmax(averages))]
        note = f"the best validation so far, after epoch {best.epoch + 1}; not the final result"
        return Tile("average mAP so far", f"{percent(finite(best.average))} %", note)
    return Tile("average mAP", UNKNOWN, "not evaluated")


def final_epoch(run: RunContents) -> str:
    """The last epoch that trained the weights which were evaluated, like "head epoch 25"; empty where none is known."""
    if run.metrics.epoch is not None:
        return f"head epoch {run.metrics.epoch + 1}"
    for stage in ("head", "joint"):
        if len(steps := run.log.steps.get(stage, Steps())):
            return f"{stage} epoch {steps['epoch'][-1] + 1:g}"
    return ""


def trained_since(run: RunContents, epoch: int) -> str:
    """In words, where the head has trained on after the epoch that was evaluated; empty where it has not."""
    steps = run.log.steps.get("head", Steps())
    further = len(steps) and steps["epoch"][-1] > epoch
    return f", and the head trains on since: epoch {steps['epoch'][-1] + 1:g}" if further else ""


def best_epoch(run: RunContents) -> str:
    """What the best validation was, and why the headline is another; empty where no epoch was validated."""
    best = run.metrics.best_epoch
    if not best or best.get("epoch") is None:
        return ""
    return (
        f"The best validation was {percent(finite(best.get('average')))} %, after epoch "
        f"{finite(best.get('epoch')) + 1:g}; checkpoints/best.pt has those weights. The headline is that of the final "
        "weights: a best that was picked by the very videos that it is measured on flatters."
    )


def threshold_name(metrics: MetricsFile) -> str:
    """What mAP is told by."""
    return "tolerance in seconds" if metrics.map_by_tolerance else "tIoU"


def map_by_threshold(metrics: MetricsFile) -> dict[float, float]:
    """mAP from 0 to 1 by tIoU, or by tolerance where points were looked for, in order."""
    values: dict[float, float] = {}
    for key, value in (metrics.map_by_tolerance or metrics.map_by_tiou).items():
        try:
            values[float(key)] = finite(value)
        except ValueError:
            continue
    return dict(sorted(values.items()))


def column(logged: Sequence[events.Validation] | Sequence[events.Epoch], name: str) -> Floats:
    """One number of each event (N,)."""
    return np.array([finite(getattr(event, name)) for event in logged], dtype=np.float64)


# Plans, and what was run


@dataclass(frozen=True)
class MeterRow:
    """The highest peak of a stage, in bytes, and as a share of the budget."""

    stage: str
    peak: float
    share: float


def meter_rows(run: RunContents) -> list[MeterRow]:
    """The stages whose memory was measured, in order."""
    peaks: dict[str, list[float]] = {"pretrain": [], "joint": [], "features": []}
    if run.plan.plans.pretrain:
        peaks["pretrain"].append(finite(run.plan.plans.pretrain.peak))
    peaks["joint"] += list(run.log.steps.get("joint", Steps())["peak"])
    for name, (event, readings) in run.log.plans.items():
        stage = name.partition(",")[0]
        if stage in ("pretrain", "features"):
            peaks[stage] += [finite(r.peak) for r in readings if r.candidate == event.chosen]
    rows = []
    for stage, values in peaks.items():
        known = [value for value in values if not math.isnan(value)]
        if known and run.budget > 0:
            rows.append(MeterRow(stage, max(known), max(known) / run.budget))
    return rows


@dataclass(frozen=True)
class PlanRow:
    """One plan: what was chosen, and what else was measured, as (candidate, peak in bytes or None: out of memory)."""

    name: str
    chosen: str
    levers: str
    cut: float
    batch: float
    peak: float
    others: tuple[tuple[str, float | None], ...]
    in_training: str = UNKNOWN  # the highest peak of the steps that the plan was made for

    @property
    def title(self) -> str:
        """The name less its unit: "features" of "features, snippets at once"."""
        return self.name.partition(", ")[0] if self.chosen.isdecimal() else self.name

    def size(self, candidate: str) -> str:
        """A candidate with its unit: "32 snippets at once"."""
        return f"{candidate} {self.name.partition(', ')[2]}".strip() if candidate.isdecimal() else candidate


def plan_rows(run: RunContents) -> list[PlanRow]:
    """The plans of plan.json, and those that only the log has."""
    logged = dict(run.log.plans)
    rows: list[PlanRow] = []
    if pretrain := run.plan.plans.pretrain:
        # The log has the same plan with its readings, as "pretrain" or "pretrain, clips a step".
        names = [name for name in logged if name.partition(",")[0] == "pretrain"]
        readings = [reading for name in names for reading in logged.pop(name)[1]]
        chosen = f"{pretrain.batch} clips"
        others = _others(chosen, ((f"{r.candidate} clips", r.peak) for r in readings))
        rows.append(PlanRow("pretrain", chosen, "", math.nan, pretrain.batch, finite(pretrain.peak), others))
    for pattern, plan in run.plan.plans.joint.items():
        name = f"joint, {pattern}"
        logged.pop(name, None)
        rows.append(replace(_joint_row(name, plan), in_training=_highest(run, pattern)))
    for name, (event, readings) in logged.items():
        others = _others(event.chosen, ((r.candidate, r.peak) for r in readings))
        taken = {reading.candidate: finite(reading.peak) for reading in readings}
        peak = event.peak if event.measured else taken.get(event.chosen, math.nan)
        rows.append(PlanRow(name, event.chosen, "", math.nan, math.nan, peak, others))
    return rows


def _joint_row(name: str, plan: JointPlan) -> PlanRow:
    chosen = _rung(*plan.rung)
    measured = [(_rung(r[0], r[1]), r[-1]) for r in plan.measured if len(r) >= 3 and r[0] and r[1]]
    return PlanRow(
        name=name,
        chosen=chosen,
        levers=levers(plan.micro_batch, plan.chunk, plan.recompute),
        cut=finite(plan.cut),
        batch=finite(plan.batch),
        peak=finite(plan.predicted if plan.peak is None else plan.peak),
        others=_others(chosen, measured),
    )


def _others(chosen: str, readings: Iterable[tuple[str, float | None]]) -> tuple[tuple[str, float | None], ...]:
    return tuple((text, None if peak is None else finite(peak)) for text, peak in readings if text != chosen)


def _highest(run: RunContents, pattern: str) -> str:
    joint = run.log.steps.get("joint", Steps())
    peaks = joint["peak"][[of == pattern for of in joint.patterns]]
    return f"{memory(float(np.fmax.reduce(peaks)))} in {count(len(peaks), 'step')}" if len(peaks) else UNKNOWN


def _rung(num_snippets: float, side: float) -> str:
    return f"{num_snippets:g} snippets x {side:g} px"


def levers(micro_batch: float, chunk: float, recompute: float) -> str:
    """How a step is run in less memory, in words."""
    said = [f"{count(int(micro_batch), 'video')} at once"] if micro_batch else []
    said += [f"chunks of {count(int(chunk), 'snippet')}"] if chunk else []
    return ", ".join([*said, *(["recompute"] if recompute else [])])


_RUN_AT = ("num_snippets", "side", "micro_batch", "chunk", "recompute")


@dataclass(frozen=True)
class RungRow:
    """The joint steps that ran at one rung with the same levers."""

    pattern: str
    rung: str
    levers: str
    steps: int
    peak: float  # the highest, bytes


def rung_rows(joint: Steps) -> list[RungRow]:
    """What the joint steps ran at, by pattern, the highest rung first."""
    keys = list(zip(joint.patterns, *(joint[name] for name in _RUN_AT), strict=True))
    peaks: dict[tuple[Any, ...], list[float]] = {}
    for key, peak in zip(keys, joint["peak"], strict=True):
        peaks.setdefault(key, []).append(peak)
    patterns = list(dict.fromkeys(joint.patterns))
    order = sorted(peaks, key=lambda key: (patterns.index(key[0]), -key[1] * key[2] ** 2, [-n for n in key[3:]]))
    return [
        RungRow(key[0], _rung(key[1], key[2]), levers(*key[3:]), len(peaks[key]), float(np.fmax.reduce(peaks[key])))
        for key in order
        if not math.isnan(key[1] + key[2])
    ]


# Results


@dataclass(frozen=True)
class ClassRow:
    """Average precision of a class, from 0 to 1: the mean over tIoUs, and at each."""

    name: str
    segments: int | None  # in the ground truth; None without one
    mean: float
    by_tiou: tuple[float, ...]


def class_rows(run: RunContents) -> list[ClassRow]:
    """Every class, the best first."""
    segments = Counter(item.label for video in run.ground_truth.database.values() for item in video.annotations)
    rows = []
    for name, values in run.metrics.average_precision.items():
        numbers = np.array([finite(value) for value in values], dtype=np.float64)
        known = numbers[np.isfinite(numbers)]
        mean = float(known.mean()) if len(known) else math.nan
        rows.append(ClassRow(name, segments[name] if segments else None, mean, tuple(numbers)))
    return sorted(rows, key=lambda row: (math.inf if math.isnan(row.mean) else -row.mean, row.name))


@dataclass(frozen=True)
class Bar:
    """A segment or a detection on its lane, in seconds; the score of a segment is NaN."""

    start: float
    end: float
    label: str
    score: float
    lane: int

    def __str__(self) -> str:
        score = "" if math.isnan(self.score) else f", score {self.score:.3f}"
        return f"{self.label}, {self.start:.2f} to {self.end:.2f} s{score}"


@dataclass(frozen=True)
class Timeline:
    """A video's ground truth above its top detections; `left_out` counts the detections that are not shown."""

    video: str
    duration: float
    truth: tuple[Bar, ...]
    found: tuple[Bar, ...]
    left_out: int


def timelines(truth: GroundTruthFile, predictions: PredictionsFile, most: int = MOST_VIDEOS) -> list[Timeline]:
    """Timelines of `most` videos that have segments, evenly spaced through their sorted names."""
    with_segments = sorted(name for name, video in truth.database.items() if video.annotations)
    shown = min(most, len(with_segments))
    chosen = [with_segments[(2 * i + 1) * len(with_segments) // (2 * shown)] for i in range(shown)]
    return [_timeline(name, truth, predictions) for name in chosen]


def _timeline(name: str, truth: GroundTruthFile, predictions: PredictionsFile) -> Timeline:
    video = truth.database[name]
    segments, _ = lanes(_bars(video.annotations), None)
    found = sorted(
        _bars(predictions.results.get(name, [])), key=lambda bar: math.inf if math.isnan(bar.score) else -bar.score
    )
    most = max(10, 3 * len(segments))
    shown, left_out = lanes(found[:most], MOST_LANES)
    whole = finite(video.duration)
    if not whole > 0:
        whole = max((bar.end for bar in (*segments, *shown)), default=0.0) or 1.0
    return Timeline(name, whole, segments, shown, left_out + max(len(found) - most, 0))


def _bars(items: Iterable[Segment]) -> list[Bar]:
    found = [Bar(*item.segment, item.label, finite(item.score), 0) for item in items]
    return [bar for bar in found if -math.inf < bar.start <= bar.end < math.inf]


def no_timelines(run: RunContents) -> str:
    """Why there is no timeline."""
    if run.log.last is not None and not run.log.evaluated:
        return "No video to show: the run was not evaluated."
    return "No video with segments is in ground_truth.json."


def lanes(bars: Sequence[Bar], most: int | None) -> tuple[tuple[Bar, ...], int]:
    """Each bar on the first lane where it overlaps nothing before it; (bars, how many found no lane)."""
    taken: list[list[Bar]] = []
    for bar in bars:
        free = (lane for lane in taken if all(bar.end <= other.start or bar.start >= other.end for other in lane))
        lane = next(free, None)
        if lane is None and (most is None or len(taken) < most):
            lane = []
            taken.append(lane)
        if lane is not None:
            lane.append(bar)
    placed = tuple(replace(bar, lane=i) for i, lane in enumerate(taken) for bar in lane)
    return placed, len(bars) - len(placed)


# Time and settings


@dataclass(frozen=True)
class TimeRow:
    stage: str
    epochs: int | None
    steps: int | None
    seconds: float


def time_rows(run: RunContents) -> list[TimeRow]:
    """The time between the log's events by stage, over all sittings."""
    rows = []
    for stage, seconds in run.log.seconds.items():
        steps = run.log.steps.get(stage)
        epochs = None if steps is None else len(set(steps["epoch"]))
        rows.append(TimeRow(stage, epochs, None if steps is None else len(steps), seconds))
    return rows


def commands(run: RunContents) -> list[str]:
    """The command line of each sitting."""
    return [f"python -m lofi_fast.train {shlex.join(start.argv)}".strip() for start in run.log.starts]


def flat(content: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """("data.window", "32.0") and so on, of nested settings."""
    for name, value in content.items():
        if isinstance(value, dict) and value:
            yield from flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value if isinstance(value, str) else json.dumps(value)

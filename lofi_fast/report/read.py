"""What a run folder says: its log, put in the order of the run, and its JSON files, each as a typed record.

Any file may be missing or cut short, as a run that was killed leaves it; `RunContents.unread` says which.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

import msgspec
import numpy as np
import numpy.typing as npt

from lofi_fast.errors import InputError
from lofi_fast.run import events
from lofi_fast.run.events import Number
from lofi_fast.run.moments import FILE as MOMENTS
from lofi_fast.run.moments import Moments

T = TypeVar("T")
Floats = npt.NDArray[np.float64]

FILES = ("config.json", "environment.json", "log.jsonl", "plan.json", "metrics.json", "predictions.json",
         "ground_truth.json")  # fmt: skip
RESULTS = ("metrics.json", "predictions.json", "ground_truth.json")  # written by the evaluation, the last stage


# The JSON files. A field that a version does not write has a default; fields that are not listed are passed over.


class PretrainPlan(msgspec.Struct, frozen=True):
    """`batch` clips a step, and the peak that a trial step of that size had."""

    batch: int
    peak: Number = None


class JointPlan(msgspec.Struct, frozen=True):
    """What the planner chose for the joint steps of one pattern before the first of them; bytes."""

    rung: tuple[int, int]  # (num_snippets, side)
    cut: Number = None
    batch: int | None = None
    micro_batch: int = 0
    chunk: int = 0
    recompute: bool = False
    predicted: Number = None
    peak: Number = None  # of a trial step
    measured: list[list[int | None]] = []  # [num_snippets, side, ..., peak], peak None: out of memory


class Plans(msgspec.Struct, frozen=True):
    pretrain: PretrainPlan | None = None
    joint: dict[str, JointPlan] = {}  # by pattern


class PlanFile(msgspec.Struct, frozen=True):
    """plan.json"""

    budget: Number = None
    plans: Plans = Plans()


class MetricsFile(msgspec.Struct, frozen=True):
    """metrics.json; the fields are those of `events.Metrics`."""

    average_map: Number = None
    map_by_tiou: dict[str, Number] = {}
    map_by_tolerance: dict[str, Number] = {}
    average_precision: dict[str, list[Number]] = {}
    best_epoch: dict[str, Number] | None = None
    videos: int | None = None
    segments: int | None = None
    epoch: int | None = None  # of the head, the last that the weights were trained for


class Segment(msgspec.Struct, frozen=True):
    """A labelled stretch of a video, in seconds; detections have a score."""

    segment: tuple[float, float]
    label: str
    score: Number = None


class TruthVideo(msgspec.Struct, frozen=True):
    duration: Number = None
    annotations: list[Segment] = []


class GroundTruthFile(msgspec.Struct, frozen=True):
    """ground_truth.json, by video."""

    database: dict[str, TruthVideo] = {}


class PredictionsFile(msgspec.Struct, frozen=True):
    """predictions.json, by video."""

    results: dict[str, list[Segment]] = {}


# The log


class Steps:
    """The steps of one stage in order of (epoch, step), as columns (N,); NaN where a step has no such number."""

    _NUMBERS = ("epoch", "step", "loss", "peak", "budget", "predicted", "limit", "num_snippets", "side", "micro_batch",
                "chunk", "recompute")  # fmt: skip
    _NONE_AT_ZERO = ("budget", "predicted", "limit", "num_snippets", "side")  # where zero says that there is none

    def __init__(self, steps: Sequence[events.Step] = ()) -> None:
        self.patterns = tuple(sys.intern(step.pattern or "") for step in steps)
        self._columns = {
            name: np.array([finite(getattr(step, name)) for step in steps], dtype=np.float64) for name in self._NUMBERS
        }
        for name in self._NONE_AT_ZERO:
            self._columns[name][self._columns[name] == 0] = math.nan
        names = dict.fromkeys(name for step in steps for name in step.terms)
        self.terms: dict[str, Floats] = {
            name: np.array([finite(step.terms.get(name)) for step in steps], dtype=np.float64) for name in names
        }

    def __len__(self) -> int:
        return len(self.patterns)

    def __getitem__(self, name: str) -> Floats:
        return self._columns[name]


@dataclass(frozen=True)
class Peak:
    """A measured peak in bytes, the budget at that time, and what was run."""

    amount: float
    budget: float
    where: str


@dataclass
class Log:
    """log.jsonl in the order of the run: what a resumed run did again stands once, the later one."""

    starts: list[events.Start] = field(default_factory=list)  # one for each sitting
    steps: dict[str, Steps] = field(default_factory=dict)  # by stage
    epochs: dict[str, list[events.Epoch]] = field(default_factory=dict)
    validations: list[events.Validation] = field(default_factory=list)  # all by the measure of the last
    validated_otherwise: int = 0  # epochs that were scored by another, as before a resume with another --tiou
    plans: dict[str, tuple[events.Planned, list[events.Measured]]] = field(default_factory=dict)  # by name
    skipped: list[events.SkippedVideo] = field(default_factory=list)
    out_of_memory: list[events.OutOfMemory] = field(default_factory=list)
    not_finite: list[events.NotFinite] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)  # by stage, over all sittings
    highest: Peak | None = None
    over: int = 0  # readings above the budget of their time
    evaluated: bool = False
    last: events.AnyEvent | None = None
    unreadable: int = 0  # lines

    @property
    def finished(self) -> bool:
        return isinstance(self.last, events.Done)


@dataclass(frozen=True)
class RunContents:
    """The content of a run folder; an empty record for a file that is not there."""

    folder: Path
    config: Mapping[str, Any]
    environment: Mapping[str, Any]
    plan: PlanFile
    metrics: MetricsFile
    predictions: PredictionsFile
    ground_truth: GroundTruthFile
    moments: Moments
    log: Log
    unread: tuple[str, ...]  # a sentence for each file that is missing and should be there, or is unreadable

    @property
    def budget(self) -> float:
        """Bytes; NaN where nothing says it."""
        start = self.log.starts[-1].budget if self.log.starts else None
        return finite(start if self.plan.budget is None else self.plan.budget)


def finite(value: float | None) -> float:
    """A finite number, or NaN: a diverged loss and a missing field are both gaps in a curve."""
    if value is None or abs(value) > sys.float_info.max:  # a whole number may be larger than any float
        return math.nan
    return float(value) if math.isfinite(value) else math.nan


def read_run(folder: Path) -> RunContents:
    """Read a run folder. Raises InputError when it is none, that is, when not one of its files is there."""
    if not any((folder / name).exists() for name in FILES):
        raise InputError(f"{folder}: not a run folder (it has none of {', '.join(FILES)}); name the --out of a run")
    unread: list[str] = []
    log: Log | None = None
    try:
        with (folder / "log.jsonl").open(encoding="utf-8", errors="replace") as lines:
            log = read_log(lines)
    except FileNotFoundError:
        unread.append("log.jsonl is not there")
    except OSError as error:
        unread.append(f"log.jsonl cannot be read ({error.strerror})")

    def content(name: str, kind: type[T], empty: T) -> T:
        try:
            return msgspec.convert(json.loads((folder / name).read_text(encoding="utf-8")), kind)
        except FileNotFoundError:
            if log is None or log.evaluated or name not in RESULTS:
                unread.append(f"{name} is not there")
        except (OSError, ValueError, RecursionError) as error:
            unread.append(f"{name} cannot be read ({error})")
        return empty

    return RunContents(
        folder=folder,
        config=content("config.json", dict[str, Any], {}),
        environment=content("environment.json", dict[str, Any], {}),
        plan=content("plan.json", PlanFile, PlanFile()),
        metrics=content("metrics.json", MetricsFile, MetricsFile()),
        predictions=content("predictions.json", PredictionsFile, PredictionsFile()),
        ground_truth=content("ground_truth.json", GroundTruthFile, GroundTruthFile()),
        moments=_moments(folder / MOMENTS),
        log=Log() if log is None else log,
        unread=tuple(unread),
    )


def _moments(path: Path) -> Moments:
    """What is shown of the validation videos; empty where there is no such file, or one that cannot be read."""
    try:
        return msgspec.json.decode(path.read_bytes(), type=Moments)
    except (OSError, ValueError, RecursionError):
        return Moments(0.0, {}, [])


def _without_refused(logged: Iterable[events.AnyEvent]) -> Iterator[events.AnyEvent]:
    """The events of a log without a last sitting that was refused before it did anything: a finished run that somebody
    has tried to resume, with videos that are none of its, is finished still.
    """
    done = False
    held: list[events.AnyEvent] = []
    for event in logged:
        if done and isinstance(event, events.Start | events.SkippedVideo | events.Data):
            held.append(event)
            continue
        yield from held
        held = []
        done = isinstance(event, events.Done)
        yield event


def read_log(lines: Iterable[str]) -> Log:
    """Read a log that may be torn at its end, and hold several sittings, each going on from the last checkpoint."""
    log = Log()
    readings: dict[str, list[events.Measured]] = {}
    skipped: dict[str, events.SkippedVideo] = {}
    steps: dict[str, list[events.Step]] = {}
    unreadable: list[str] = []
    budget, before, resumed = math.nan, None, False
    for event in _without_refused(events.read(lines, unreadable)):
        stage = _stage(event)
        if resumed and isinstance(event, events.Step | events.OutOfMemory | events.NotFinite):
            resumed = False  # its first step is where the checkpoint was: what came after is done again
            log.out_of_memory = [e for e in log.out_of_memory if e.stage != stage or _step(e) < _step(event)]
            log.not_finite = [e for e in log.not_finite if e.stage != stage or _step(e) < _step(event)]
        match event:
            case events.Start():
                log.starts.append(event)
                budget, skipped, readings, resumed = finite(event.budget), {}, {}, True
            case events.SkippedVideo():
                skipped[event.video] = event
            case events.Measured():
                readings.setdefault(event.plan, []).append(event)
                _note_peak(log, event.peak, budget, f"a trial step of the planner ({event.plan})")
            case events.Planned():
                log.plans[event.plan] = event, readings.pop(event.plan, [])
            case events.Step():
                slim = msgspec.structs.replace(event, videos=[], reason="")  # a log may hold a million steps
                _append_over(steps.setdefault(stage, []), slim, _step)
                _note_peak(log, event.peak, budget, f"a {stage} step")
            case events.OutOfMemory():
                log.out_of_memory.append(event)
            case events.NotFinite():
                log.not_finite.append(event)
            case events.Epoch():
                _append_over(log.epochs.setdefault(stage, []), event, _epoch)
            case events.Validation():
                _append_over(log.validations, event, _epoch)
            case events.Metrics():
                log.evaluated = True
        now = time_of(event)
        if before is not None and now is not None and not isinstance(event, events.Start):
            passed = max((now - before).total_seconds(), 0.0)  # a clock may be set back
            log.seconds[stage] = log.seconds.get(stage, 0.0) + passed
        before = now or before
        log.last = event
    alike = [one for one in log.validations if _same_measure(one, log.validations[-1])]
    log.validations, log.validated_otherwise = alike, len(log.validations) - len(alike)
    log.skipped = list(skipped.values())
    log.steps = {stage: Steps(taken) for stage, taken in steps.items()}
    log.unreadable = len(unreadable)
    return log


def _stage(event: events.AnyEvent) -> str:
    """The stage that the time up to this event is counted for."""
    match event:
        case events.SkippedVideo() | events.Data():
            return "data"
        case events.Features():
            return "features"
        case events.Metrics() | events.Done():
            return "eval"
        case events.Measured() | events.Planned():
            return event.plan.partition(",")[0]
        case events.Start():
            return ""
        case _:
            return event.stage


def _note_peak(log: Log, reading: int | None, budget: float, where: str) -> None:
    peak = finite(reading)
    if math.isnan(peak):
        return
    if log.highest is None or peak > log.highest.amount:
        log.highest = Peak(peak, budget, where)
    log.over += peak > budget


def _append_over(done: list[T], item: T, position: Callable[[T], tuple[int, ...]]) -> None:
    """Append in place of all from this position on: a resumed run went back to its checkpoint."""
    here = position(item)
    while done and position(done[-1]) >= here:
        done.pop()
    done.append(item)


def _same_measure(one: events.Validation, other: events.Validation) -> bool:
    """Whether two averages are over the same tIoUs, or tolerances, as far as the log tells."""
    told = {one.measure, other.measure} - {""}  # a log of before names none
    return len(told) < 2 and len(one.map) == len(other.map)


def _epoch(event: events.Epoch | events.Validation) -> tuple[int, ...]:
    return (event.epoch,)


def _step(event: events.Step | events.OutOfMemory | events.NotFinite) -> tuple[int, ...]:
    return event.epoch, event.step


def time_of(event: events.Event) -> datetime | None:
    try:
        when = datetime.fromisoformat(event.time)
    except ValueError:
        return None
    return when if when.tzinfo else when.replace(tzinfo=UTC)

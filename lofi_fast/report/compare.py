"""Several runs on one page: their results, their curves in one picture each, and the settings in which they differ."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from markupsafe import Markup

from lofi_fast import __version__
from lofi_fast.errors import InputError
from lofi_fast.files import write_bytes
from lofi_fast.report import rows
from lofi_fast.report.figures import PALETTE, Panel, svg, thin
from lofi_fast.report.page import environment
from lofi_fast.report.read import Floats, RunContents, Steps, finite, read_run
from lofi_fast.report.rows import UNKNOWN

if TYPE_CHECKING:
    from matplotlib.axes import Axes

DASHES = ("-", "--", ":", "-.")  # of runs beyond the palette's colours
UNSHOWN = frozenset(("out", "lofi_fast"))  # settings that say nothing of how a run was made


@dataclass(frozen=True)
class Compared:
    """A run and how it is told from the others: a name, a colour of the palette, and a dash."""

    name: str
    colour: int
    dash: str
    run: RunContents


@dataclass(frozen=True)
class Result:
    """A run's row of the table of results; NaN and empty where a run has none."""

    name: str
    finished: bool
    map: float
    so_far: bool  # the best validation of a run that was not evaluated
    by_tiou: dict[float, float]
    budget: float
    peak: float
    seconds: float
    device: str


@dataclass(frozen=True)
class Curve:
    """Values (N,) over x (N,) of one run."""

    of: Compared
    x: Floats
    y: Floats


def write_comparison(folders: Sequence[Path], out: Path) -> Path:
    """Write the page of two run folders or more; returns its path.

    Raises InputError for a folder that is no run folder, or is named twice, and where the page cannot be written.
    """
    places = [folder.resolve() for folder in folders]
    if again := next((folder for folder, place in zip(folders, places, strict=True) if places.count(place) > 1), None):
        raise InputError(f"--compare: {again} is named twice; name each run once")
    if len(folders) < 2:
        raise InputError("--compare needs two run folders or more")
    compared = named([read_run(folder) for folder in folders])
    return write_bytes(out, comparison(compared).encode(errors="replace"))


def named(runs: Sequence[RunContents]) -> list[Compared]:
    """The runs with names: of their folders, with as much of their paths as it takes to tell them apart."""
    parts = [run.folder.resolve().parts for run in runs]
    lengths = range(1, max(map(len, parts)) + 1)
    length = next((k for k in lengths if len({part[-k:] for part in parts}) == len(parts)), len(lengths))
    return [
        Compared("/".join(part[-length:]), k % len(PALETTE), DASHES[k // len(PALETTE) % len(DASHES)], run)
        for k, (part, run) in enumerate(zip(parts, runs, strict=True))
    ]


def comparison(compared: Sequence[Compared]) -> str:
    """The text of the page."""
    shown = panels(compared)
    template = environment(math.nan).get_template("compare.html.jinja")
    results = [result(of) for of in compared]
    return template.render(
        title=f"{len(compared)} runs compared",
        runs=compared,
        results=results,
        other=[
            *filter(None, [evaluated_otherwise(compared), averaged_otherwise(compared)]),
            *(f"{of.name}: {sentence}." for of in compared for sentence in of.run.unread),
        ],
        tious=sorted({tiou for row in results for tiou in row.by_tiou}),
        shown=shown,
        figures={name: Markup(svg(panel)) for name, panel in shown.items() if isinstance(panel, Panel)},
        settings=differences(compared),
        unknown=UNKNOWN,
        nan=math.nan,
        most_open_rows=60,
        version=__version__,
    )


def result(of: Compared) -> Result:
    """What a run has come to."""
    run = of.run
    start = run.log.starts[-1] if run.log.starts else None
    average = finite(run.metrics.average_map)
    best = rows.column(run.log.validations, "average")
    so_far = math.isnan(average) and bool(np.isfinite(best).any())
    return Result(
        name=of.name,
        finished=run.log.finished,
        map=float(np.nanmax(best)) if so_far else average,
        so_far=so_far,
        by_tiou=rows.map_by_threshold(run.metrics),
        budget=run.budget,
        peak=math.nan if run.log.highest is None else run.log.highest.amount,
        seconds=sum(run.log.seconds.values()) or math.nan,
        device=str(run.environment.get("device") or (start.device if start else "unknown")),
    )


def evaluated_otherwise(compared: Sequence[Compared]) -> str:
    """A sentence where not all runs were evaluated on the same segments, so that their mAPs do not compare; or none."""
    told = []
    for of in compared:
        videos = of.run.ground_truth.database
        if videos:
            told.append((
                {name: sorted((*s.segment, s.label) for s in video.annotations) for name, video in videos.items()},
                f"{of.name} on {sum(len(v.annotations) for v in videos.values())} of {len(videos)} videos",
            ))  # fmt: skip
    if all(segments == told[0][0] for segments, _ in told):
        return ""
    each = ", ".join(counts for _, counts in told)
    return f"These runs were not evaluated on the same segments, and their mAPs do not compare: {each}."


def averaged_otherwise(compared: Sequence[Compared]) -> str:
    """A sentence where the average mAPs of runs are over other tIoUs, or tolerances, and do not compare; or none."""
    evaluated = [(of.name, of.run.metrics) for of in compared if rows.map_by_threshold(of.run.metrics)]
    told = [(rows.threshold_name(m), tuple(rows.map_by_threshold(m)), name) for name, m in evaluated]
    if len({(kind, thresholds) for kind, thresholds, _ in told}) < 2:
        return ""
    each = ", ".join(f"{name} {rows.threshold_range(thresholds, kind)}" for kind, thresholds, name in told)
    return f"The average mAPs of these runs do not compare, being over other thresholds: {each}."


def differences(compared: Sequence[Compared]) -> list[tuple[str, list[str]]]:
    """(setting, its value in each run) of the settings that are not the same in all; a dash where one has none."""
    flat = [dict(rows.flat(of.run.config)) for of in compared]
    names = dict.fromkeys(name for settings in flat for name in settings if name not in UNSHOWN)
    values = {name: [settings.get(name, UNKNOWN) for settings in flat] for name in names}
    return [(name, of) for name, of in values.items() if len(set(of)) > 1]


def panels(compared: Sequence[Compared]) -> dict[str, Panel | str]:
    """Every figure by name, or the sentence that says why there is none."""
    by_tiou, validations, joint, head, memory, fidelity = [], [], [], [], [], []
    for of in compared:
        log, found = of.run.log, rows.map_by_threshold(of.run.metrics)
        by_tiou.append(Curve(of, np.array(list(found)), 100 * np.array(list(found.values()))))
        average = rows.column(log.validations, "average")
        validations.append(Curve(of, rows.column(log.validations, "epoch") + 1, 100 * average))
        steps = log.steps.get("joint", Steps())
        index, _, loss, _ = thin(steps["loss"])
        joint.append(Curve(of, index + 1, loss))
        index, _, _, peak = thin(steps["peak"] / 1e9)
        memory.append(Curve(of, index + 1, peak))
        index, _, share, _ = thin(100 * steps["num_snippets"] * steps["side"] ** 2 / _full(of.run))
        fidelity.append(Curve(of, index + 1, share))
        index, _, loss, _ = thin(log.steps.get("head", Steps())["loss"])
        head.append(Curve(of, index + 1, loss))
    no_joint = "No joint step was logged."
    made = [
        ("tiou", "mAP by tIoU", by_tiou, "tIoU", "mAP, %", "No run was evaluated."),
        ("validation", "Validation: average mAP by epoch of the head", validations, "epoch", "average mAP, %",
         "No run has logged a validation."),
        ("joint", "Joint: loss", joint, "joint step", "loss", no_joint),
        ("head", "Head: loss", head, "head step", "loss", "No head step was logged."),
        ("memory", "Peak memory of each joint step", memory, "joint step", "GB", no_joint),
        ("fidelity", "Fidelity of each joint step, as a share of the full", fidelity, "joint step", "% of full",
         no_joint),
    ]  # fmt: skip
    return {name: _panel(name, title, curves, x, y, absent) for name, title, curves, x, y, absent in made}


def _full(run: RunContents) -> float:
    """Full Omega, snippets x pixels; NaN where config.json does not say."""
    full = run.config.get("full")
    if not isinstance(full, dict):
        return math.nan
    numbers = [full.get("num_snippets"), full.get("side")]
    if not all(isinstance(number, int) and 0 < number < 1e6 for number in numbers):
        return math.nan
    return float(numbers[0] * numbers[1] ** 2)  # type: ignore[operator]


def _panel(name: str, title: str, curves: Sequence[Curve], x: str, y: str, absent: str) -> Panel | str:
    drawn = [curve for curve in curves if np.isfinite(curve.y).any()]
    if not drawn:
        return absent
    last = [f"{curve.of.name} {curve.y[np.isfinite(curve.y)][-1]:.4g}" for curve in drawn]
    words = f"{title}, at the end: {', '.join(last)}."
    return Panel(name, title, words, lambda axes: draw(axes[0], drawn, x, y))


def draw(axes: Axes, curves: Sequence[Curve], x: str, y: str) -> None:
    """The curves of the runs. Each is a group of its own, whose id ends in run and its number: the page can hide it."""
    for curve in curves:
        few = len(curve.x) < 30
        axes.plot(
            curve.x, curve.y, curve.of.dash, color=PALETTE[curve.of.colour], linewidth=1.5, markersize=3.5,
            marker="o" if few else None, gid=f"run{number_of(curve.of)}",
        )  # fmt: skip
    axes.set(xlabel=x, ylabel=y)
    low, high = axes.get_ylim()
    if y != "GB" or low < 0.5 * high:  # peaks that lie close together are told apart
        axes.set_ylim(0, max(1.05 * high, 1e-3))
    if x == "tIoU":
        axes.set_xticks(sorted({float(value) for curve in curves for value in curve.x})[:12])
    else:
        axes.locator_params(axis="x", integer=True, nbins=7)


def number_of(of: Compared) -> int:
    """Which of the runs it is, from 0."""
    return of.colour + len(PALETTE) * DASHES.index(of.dash)

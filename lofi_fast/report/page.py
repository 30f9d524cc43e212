"""report.html, a run folder as one self-contained page, and report.png, the same at a glance.

What people look at first stands on top: mAP, and memory against the budget. The same folder gives the same page. Its
words stand in page.html.jinja, its looks in style.css.
"""

from __future__ import annotations

import base64
import math
import re
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from markupsafe import Markup, escape

from lofi_fast import __version__
from lofi_fast.budget import duration
from lofi_fast.errors import InputError
from lofi_fast.files import write_bytes
from lofi_fast.report import rows
from lofi_fast.report.figures import PALETTE, Panel, best_score, class_colours, opacity, overview, panels, svg
from lofi_fast.report.read import RunContents, Steps, read_run
from lofi_fast.report.rows import TIMES, UNKNOWN, Bar, Timeline

if TYPE_CHECKING:
    from jinja2 import Environment

MOST_OPEN_ROWS = 30  # longer tables are folded
MOST_SAID_BARS = 12  # of a lane, in its description
LANE_HEIGHT = 17  # pixels


def write_report(folder: Path) -> Path:
    """Write report.html and report.png of a run folder; returns the path of the page.

    Raises InputError when the folder is no run folder, or cannot be written to.
    """
    run = read_run(folder)
    shown = panels(run)
    timelines = rows.timelines(run.ground_truth, run.predictions)
    try:
        write_bytes(folder / "report.png", overview(run, shown, timelines))
        return write_bytes(folder / "report.html", page(run, shown, timelines).encode(errors="replace"))
    except InputError as error:
        again = f"python -m lofi_fast.report {shlex.quote(str(folder))}"
        raise InputError(f"{error}, then {again}") from error


def page(run: RunContents, shown: Mapping[str, Panel | str], timelines: Sequence[Timeline]) -> str:
    """The text of report.html. `shown`: every figure by name, or the sentence that says why there is none."""
    preset = run.config.get("preset")
    best = best_score(timelines)
    template = environment(best).get_template("page.html.jinja")
    return template.render(
        title=f"{run.folder.resolve().name}{f' · {preset}' if preset else ''}",
        state=rows.state(run),
        notes=rows.notes(run),
        headline=rows.headline(run),
        shown=shown,
        figures={name: Markup(svg(panel)) for name, panel in shown.items() if isinstance(panel, Panel)},
        by_threshold=rows.map_by_threshold(run.metrics),
        threshold=rows.threshold_name(run.metrics),
        average=math.nan if run.metrics.average_map is None else run.metrics.average_map,
        best_epoch=rows.best_epoch(run),
        budget=run.budget,
        moments=run.moments,
        meters=rows.meter_rows(run),
        plans=rows.plan_rows(run),
        rungs=rows.rung_rows(run.log.steps.get("joint", Steps())),
        timelines=timelines,
        num_videos=len(run.ground_truth.database),
        detected=bool(run.predictions.results),
        no_timelines=rows.no_timelines(run),
        colours=class_colours(timelines),
        num_colours=len(PALETTE),
        best_score=best,
        classes=rows.class_rows(run),
        skipped=run.log.skipped,
        times=rows.time_rows(run),
        commands=rows.commands(run),
        config=run.config,
        environment=run.environment,
        version=__version__,
        again=f"python -m lofi_fast.report {shlex.quote(str(run.folder))}",
        unknown=UNKNOWN,
        most_open_rows=MOST_OPEN_ROWS,
        lane_height=LANE_HEIGHT,
    )


def environment(best: float) -> Environment:
    """Templates and what they can ask for. `best`: the score of a detection that is drawn in full colour."""
    # Imported here as matplotlib is in figures.py: the training process imports this file.
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {
        "base64": lambda content: base64.b64encode(content).decode("ascii"),
        "clock": rows.clock,
        "duration": duration,
        "flags": _flags,
        "flat": rows.flat,
        "labels": _labels,
        "left": _left,
        "memory": rows.memory,
        "number": lambda value: UNKNOWN if math.isnan(value) else f"{value:g}",
        "opacity": lambda bar: f"{opacity(bar.score, best):.2f}",
        "percent": rows.percent,
        "say_bars": _say_bars,
        "ticks": rows.ticks,
        "times": lambda text: text.replace(" x ", TIMES),
        "width": _width,
    }
    return environment


def _flags(text: str) -> Markup:
    """A sentence whose flags are not broken at their hyphens."""
    return Markup(re.sub(r"--[a-z][a-z-]*", r'<code class="flag">\g<0></code>', str(escape(text))))


def _labels(row: Timeline) -> list[str]:
    """The classes of a timeline, each once."""
    return list(dict.fromkeys(bar.label for bar in (*row.truth, *row.found)))


def _left(bar: Bar, row: Timeline) -> str:
    """Where a bar begins, in percent of the video."""
    return f"{_share(bar.start, row):.2f}"


def _width(bar: Bar, row: Timeline) -> str:
    """How wide a bar is, in percent of the video; wide enough to be seen."""
    return f"{max(_share(bar.end, row) - _share(bar.start, row), 0.25):.2f}"


def _share(seconds: float, row: Timeline) -> float:
    return 100 * min(max(seconds / row.duration, 0.0), 1.0)


def _say_bars(bars: Sequence[Bar], what: str, video: str) -> str:
    """A lane in words, for those who do not see it."""
    said = [str(bar) for bar in sorted(bars, key=lambda bar: bar.start)]
    more = f" and {len(said) - MOST_SAID_BARS} more" if len(said) > MOST_SAID_BARS else ""
    return f"{what} of {video}: {'; '.join(said[:MOST_SAID_BARS]) or 'none'}{more}"

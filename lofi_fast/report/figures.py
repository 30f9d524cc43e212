"""The figures of the report, drawn by matplotlib: each alone for the page, and all together for report.png.

matplotlib is imported where a figure is drawn: the training process imports this file, its resident memory counts
against the budget, and plots come last.
"""

from __future__ import annotations

import html
import io
import math
import re
import textwrap
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from lofi_fast.fidelity import CYCLE
from lofi_fast.report.read import Floats, RunContents, Steps
from lofi_fast.report.rows import (
    MOST_LANES,
    Timeline,
    clock,
    column,
    headline,
    map_by_threshold,
    memory,
    percent,
    threshold_name,
    ticks,
)
from lofi_fast.run import events

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import FigureBase

MOST_POINTS = 300  # of one curve; longer ones are thinned
NEAR_BUDGET = 1.25  # a budget up to so many times the highest reading is drawn; one further up is said in words

# Okabe and Ito's colours, told apart by the colour-blind, and grey.
PALETTE = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#7f7f7f")
INK, GRID = "#1b1f24", "#d6dae0"  # in the page both, and the palette, are CSS variables that follow light and dark
MARKERS = ("o", "s", "^", "D")


def _shorten(text: str, most: int) -> str:
    text = text.encode(errors="replace").decode()  # file names may hold bytes that are no text
    return text if len(text) <= most else f"{text[: most - 1]}\N{HORIZONTAL ELLIPSIS}"


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


@dataclass(frozen=True)
class Panel:
    """A figure of the page: what it shows, the same in words and numbers, and how to draw it into axes."""

    name: str
    title: str
    alt: str
    draw: Callable[[Sequence[Axes]], None]
    num_axes: int = 1
    note: str = ""  # said under the title


def panels(run: RunContents) -> dict[str, Panel | str]:
    """Every figure by name, or the sentence that says why there is none."""
    log = run.log
    found: dict[str, Panel | str] = {}

    by_threshold, name = map_by_threshold(run.metrics), threshold_name(run.metrics)
    found["map"] = "No mAP: the run was not evaluated, or has no validation videos."
    if by_threshold:
        words = ", ".join(f"{percent(m)} at {t:g}" for t, m in by_threshold.items())
        found["map"] = Panel(
            "map", f"mAP by {name}", f"mAP in percent: {words}.", lambda axes: draw_map(axes[0], by_threshold, name)
        )

    joint = log.steps.get("joint", Steps())
    found["memory"] = found["rungs"] = "No joint step was logged."
    if len(joint):
        peaks, budgets = joint["peak"], joint["budget"]
        found["memory"] = Panel(
            "memory", "Memory of each joint step, and the budget",
            f"Peak memory of {len(joint)} joint steps: {_span(peaks, memory)}, budget {_span(budgets, memory)}.",
            lambda axes: draw_memory(axes[0], joint), note=budget_above(joint),
        )  # fmt: skip
        snippets, sides = joint["num_snippets"], joint["side"]
        found["rungs"] = Panel(
            "rungs", "Rung of each joint step",
            f"Snippets: {_span(snippets, '{:g}'.format)}; side: {_span(sides, '{:g} px'.format)}; patterns: "
            f"{', '.join(dict.fromkeys(joint.patterns))}.",
            lambda axes: draw_rungs(axes, joint), num_axes=2,
        )  # fmt: skip

    average = column(log.validations, "average")
    found["validation"] = "No validation was logged."
    if log.validations:
        found["validation"] = Panel(
            "validation", "Validation: average mAP by epoch",
            f"Average mAP in percent over {len(average)} validations: {_ends(average, percent)}, "
            f"highest {percent(float(np.fmax.reduce(average)))}.",
            lambda axes: draw_by_epoch(axes[0], log.validations, average, "average mAP, %", best=True),
        )  # fmt: skip
    found["pretrain"] = _loss_panel("pretrain", "Pretrain: loss", log.steps.get("pretrain", Steps()))
    epochs = log.epochs.get("pretrain", [])
    accuracy = column(epochs, "accuracy")
    found["accuracy"] = "No pretrain epoch was finished."
    if epochs:
        found["accuracy"] = Panel(
            "accuracy", "Pretrain: accuracy by epoch",
            f"Accuracy in percent over {len(epochs)} epochs: {_ends(accuracy, percent)}.",
            lambda axes: draw_by_epoch(axes[0], epochs, accuracy, "accuracy, %"),
        )  # fmt: skip
    for stage in ("joint", "head"):
        found[stage] = _loss_panel(stage, f"{stage.capitalize()}: loss and its terms", log.steps.get(stage, Steps()))
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


def draw_map(axes: Axes, by_threshold: Mapping[float, float], name: str) -> None:
    """Bars of mAP in percent, one for each tIoU or tolerance; a line where there are too many for bars."""
    values = [100 * value for value in by_threshold.values()]
    if len(values) > 15:
        axes.plot(list(by_threshold), values, color=PALETTE[0])
    else:
        bars = axes.bar([f"{threshold:g}" for threshold in by_threshold], values, color=PALETTE[0], width=0.7)
        axes.bar_label(bars, fmt="%.1f", padding=2, fontsize="small")
        axes.grid(False, axis="x")
    axes.set(xlabel=name, ylabel="mAP, %", ylim=(0, 1.12 * max(np.nanmax([0.0, *values]), 1e-3)))


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


def memory_axis(joint: Steps) -> tuple[float, float, float]:
    """(low, high) of an axis in bytes that shows how the readings differ, and the highest budget that is drawn on it.

    A budget far above every reading would press them into a line at the bottom: it is left out of the axis.
    """
    readings = np.concatenate([joint["peak"], joint["predicted"]])
    readings = readings[np.isfinite(readings)]
    budgets = joint["budget"][np.isfinite(joint["budget"])]
    if not len(readings):
        return 0.0, 1.05 * float(budgets.max(initial=1.0)), float(budgets.max(initial=0.0))
    bottom, top = float(readings.min()), float(readings.max())
    drawn = NEAR_BUDGET * top
    high = max(top, float(budgets[budgets <= drawn].max(initial=0.0)))
    margin = 0.15 * max(high - bottom, 0.02 * high)
    low = 0.0 if bottom < 0.5 * high else max(bottom - margin, 0.0)
    return low, high + margin, drawn


def draw_memory(axes: Axes, joint: Steps) -> None:
    """Peak of every joint step, coloured by pattern, what was predicted of it, and the budget (GB).

    Where others left less than the budget, that is drawn too. A budget far above the readings is said in words.
    """
    low, high, drawn = memory_axis(joint)
    budget = joint["budget"]
    changes = np.flatnonzero(np.diff(np.nan_to_num(budget, nan=-1.0), prepend=math.nan) != 0)
    label: str | None = "budget"
    for first, last in zip(changes, [*changes[1:], len(budget)], strict=True):
        if budget[first] <= drawn:
            axes.plot([first + 0.5, last + 0.5], [budget[first] / 1e9] * 2, "--", color=INK, linewidth=1.4, label=label)
            label = None
    steps = np.arange(1, len(joint) + 1)
    left = np.where(joint["limit"] < budget, joint["limit"], math.nan) / 1e9
    if np.fmin.reduce(left) < high / 1e9:
        axes.plot(steps, left, ":", color=INK, linewidth=1.4, label="left by others")
    if not np.isnan(joint["predicted"]).all():
        axes.plot(steps, joint["predicted"] / 1e9, "-", color=INK, alpha=0.45, linewidth=0.9, label="predicted")
    for pattern, colour, marker, x, peaks in _by_pattern(joint, "peak"):
        axes.plot(x, peaks / 1e9, marker, color=colour, markersize=_dot(joint), markeredgewidth=0, label=pattern)
    _mark_epochs(axes, joint)
    axes.set(xlabel="joint step", ylabel="GB", ylim=(low / 1e9, high / 1e9))
    _legend(axes, 4)


def budget_above(joint: Steps) -> str:
    """What is said of a budget that lies above the axis; empty where it is drawn."""
    _, _, drawn = memory_axis(joint)
    above = joint["budget"][joint["budget"] > drawn]
    if not len(above):
        return ""
    top = float(np.fmax.reduce(np.append(joint["peak"], joint["predicted"])))
    return f"The budget, {_span(above, memory)}, is above this axis: {above.min() / top:.3g} times the highest point."


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
    terms = [(name, thin(values)[2]) for name, values in steps.terms.items()]
    terms = [(name, values) for name, values in terms if np.nanmax(np.append(values, 0.0)) > 0]
    if len(loss) > len(index):
        axes.fill_between(index + 1, least, greatest, color=PALETTE[0], alpha=0.18, linewidth=0)
    axes.plot(index + 1, mean, color=PALETTE[0], linewidth=1.6, label="loss", zorder=3)
    for i, (name, values) in enumerate(terms, 1):
        colour, dashes = PALETTE[i % len(PALETTE)], ("-", "--", ":")[i // len(PALETTE) % 3]
        axes.plot(index + 1, values, dashes, color=colour, linewidth=1.0, label=_shorten(name, 24))
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


def draw_by_epoch(
    axes: Axes,
    logged: Sequence[events.Validation] | Sequence[events.Epoch],
    values: Floats,
    label: str,
    best: bool = False,
) -> None:
    """A fraction by epoch, in percent, counted from 1; when asked, the highest and the last are marked."""
    x = column(logged, "epoch") + 1
    axes.plot(x, 100 * values, "o-", color=PALETTE[0], markersize=3.5)
    if best and np.isfinite(values).any():
        i, last = int(np.nanargmax(values)), len(values) - 1
        marks = [(i, "best", PALETTE[1], 8)]
        if last != i and np.isfinite(values[last]):
            marks.append((last, "last", PALETTE[0], -16))
        for k, name, colour, offset in marks:
            at = (float(x[k]), float(100 * values[k]))
            axes.plot(*at, "o", color=colour, markersize=7)
            where = "right" if at[0] > 0.8 * x[-1] else "center"
            axes.annotate(f"{name} {at[1]:.2f}", at, (0, offset), textcoords="offset points", ha=where)
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
        alpha = 1.0 if is_truth else opacity(bar.score, best_score)
        axes.broken_barh([(bar.start, width)], (y, 0.8), facecolor=(colour, alpha), edgecolor=colour, linewidth=0.6)
    axes.axhline(below + 0.07, color=GRID, linewidth=0.8)
    axes.set(xlim=(0, row.duration), ylim=(below + 0.4 + MOST_LANES, -0.2), yticks=[])
    axes.grid(False)
    axes.tick_params(labelsize="x-small")
    times = ticks(row.duration)
    axes.set_xticks(times, [clock(time, row.duration) for time in times])


def opacity(score: float, best: float) -> float:
    """Of a detection's bar, from 0.2 to 1: the lower its score, the fainter."""
    return 0.2 if math.isnan(score) or not best > 0 else 0.2 + 0.8 * min(max(score / best, 0.0), 1.0)


def best_score(rows: Sequence[Timeline]) -> float:
    """The highest score of the detections shown; NaN without one."""
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
        figure = Figure(figsize=(4.8, 2.9), layout="constrained")
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


def png(panel: Panel) -> bytes:
    """A panel as a picture by itself, with its title, on white."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with matplotlib.rc_context(_style("white")):
        figure = Figure(figsize=(7.2, 4.0), dpi=150, layout="constrained")
        FigureCanvasAgg(figure)
        axes = list(np.atleast_1d(figure.subplots(panel.num_axes, 1)))
        panel.draw(axes)
        axes[0].set_title(panel.title, loc="left", weight="bold", fontsize=10.5, pad=10)
        file = io.BytesIO()
        figure.savefig(file, format="png", metadata={"Software": "lofi_fast"})
    return file.getvalue()


def overview(run: RunContents, shown: Mapping[str, Panel | str], rows: Sequence[Timeline]) -> bytes:
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
        tiles = headline(run)
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
            axes[0].set_title(
                "\n".join([panel.title, *textwrap.wrap(panel.note, 56)]),
                loc="left",
                weight="bold",
                fontsize=10.5,
                pad=pad,
            )
        else:
            axes[0].set_axis_off()
            axes[0].text(0.5, 0.5, panel, ha="center", va="center", transform=axes[0].transAxes)


def _draw_timelines(figure: FigureBase, rows: Sequence[Timeline]) -> None:
    from matplotlib.patches import Patch

    colours, best = class_colours(rows), best_score(rows)
    axes = np.atleast_1d(figure.subplots((len(rows) + 1) // 2, 2)).ravel()
    for ax, row in zip(axes, rows, strict=False):
        draw_timeline(ax, row, colours, best)
        ax.set_title(_shorten(row.video, 60), loc="left", fontsize=8.5, pad=3)
    for ax in axes[len(rows) :]:
        ax.set_axis_off()
    patches = [Patch(color=PALETTE[i], label=_shorten(name, 24)) for name, i in colours.items()]
    title = "Validation videos: ground truth above the top detections (fainter: lower score)"
    figure.suptitle(title, x=0.02, ha="left", weight="bold", fontsize=10.5)
    if len(patches) <= len(PALETTE):
        figure.legend(handles=patches, loc="outside lower left", ncols=len(PALETTE), frameon=False, fontsize="small")

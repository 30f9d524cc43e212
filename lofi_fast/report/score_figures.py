"""Pictures of an evaluation: mAP by tIoU, recall by proposals, scores by characteristic, kinds of false positives, and
scores of frame labels.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from lofi_fast.diagnosis import KINDS, TOP, Diagnosis
from lofi_fast.files import write_bytes
from lofi_fast.framewise import SegmentalResult
from lofi_fast.intervals import LEVEL, MapIntervals
from lofi_fast.metrics import Floats, MapResult, RecallResult
from lofi_fast.report.figures import INK, PALETTE, Panel, draw_map, png

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MOST_BARS = 15  # more thresholds are a line


def write_pictures(
    folder: Path,
    precision: MapResult | None,
    recall: RecallResult | None,
    diagnosis: Diagnosis | None,
    intervals: MapIntervals | None,
    segmental: SegmentalResult | None,
) -> list[Path]:
    """Write a PNG for each of the scores that are there; the paths. Raises InputError where they cannot be written."""
    found = _panels(precision, recall, diagnosis, intervals, segmental)
    return [write_bytes(folder / f"{panel.name}.png", png(panel)) for panel in found]


def _panels(
    precision: MapResult | None,
    recall: RecallResult | None,
    diagnosis: Diagnosis | None,
    intervals: MapIntervals | None,
    segmental: SegmentalResult | None,
) -> Iterator[Panel]:
    if precision is not None:
        title = "mAP by tIoU" + (f", {100 * LEVEL:g}% intervals over videos" if intervals else "")
        yield Panel("map", title, "", lambda axes: _draw_map(axes[0], precision, intervals))
    if recall is not None:
        title = f"Average recall by proposals a video, AUC {recall.auc:.2f}"
        yield Panel("recall", title, "", lambda axes: _draw_recall(axes[0], recall))
    if diagnosis is not None:
        title = "Normalised mAP by characteristic of the segment"
        yield Panel("characteristics", title, "", lambda axes: _draw_characteristics(axes[0], diagnosis))
        title = "What predictions are, best scores first"
        yield Panel("false_positives", title, "", lambda axes: _draw_kinds(axes[0], diagnosis))
    if segmental is not None:
        yield Panel("frames", "Labels of frames", "", lambda axes: _draw_segmental(axes[0], segmental))


def _draw_map(axes: Axes, precision: MapResult, intervals: MapIntervals | None) -> None:
    by_tiou = dict(zip(precision.tious.tolist(), precision.map_by_tiou.tolist(), strict=True))
    if intervals is None:
        draw_map(axes, by_tiou, "tIoU")
        return
    values, spans = [100 * value for value in by_tiou.values()], 100 * intervals.map_by_tiou
    if len(values) > MOST_BARS:
        axes.plot(list(by_tiou), values, color=PALETTE[0])
        axes.fill_between(list(by_tiou), *spans.T, color=PALETTE[0], alpha=0.18, linewidth=0)
        axes.set(ylim=(0, 1.05 * max(float(np.nanmax(spans, initial=0.0)), 1e-3)))
    else:
        _draw_bars(axes, [f"{tiou:g}" for tiou in by_tiou], values, spans)
    axes.set(xlabel="tIoU", ylabel="mAP, %")


def _draw_bars(axes: Axes, names: Sequence[str], values: Sequence[float], spans: Floats | None) -> None:
    """A bar for each value with its number above it, and a line from low to high where `spans` (N, 2) has them."""
    axes.bar(names, values, 0.7, color=PALETTE[0])
    tops = np.array(values)
    if spans is not None:
        axes.vlines(range(len(names)), *spans.T, color=INK, linewidth=1.2)
        tops = np.fmax(tops, spans[:, 1])
    for x, (value, top) in enumerate(zip(values, tops, strict=True)):
        axes.annotate(f"{value:.1f}", (x, top), (0, 2), textcoords="offset points", ha="center", fontsize="small")
    axes.grid(False, axis="x")
    axes.set(ylim=(0, 1.12 * max(float(np.nanmax(tops, initial=0.0)), 1e-3)))


def _draw_recall(axes: Axes, recall: RecallResult) -> None:
    """The mean over thresholds, and the curves of the least and the greatest one."""
    for k, colour in dict(zip((0, len(recall.tious) - 1), PALETTE[1:], strict=False)).items():
        axes.plot(recall.proposals_per_video, 100 * recall.recall[k], color=colour, linewidth=1.0,
                  label=f"tIoU {recall.tious[k]:.4g}")  # fmt: skip
    axes.plot(recall.proposals_per_video, 100 * recall.average_recall, color=PALETTE[0], linewidth=2, label="mean")
    axes.set(xlabel="proposals a video, on average", ylabel="recall, %", ylim=(0, 100))
    axes.legend(frameon=False, fontsize="small")


def _draw_characteristics(axes: Axes, diagnosis: Diagnosis) -> None:
    """A bar for each group, and a line at what all segments have."""
    at, ticks, middles = 0.0, [], []
    for i, (name, groups) in enumerate(diagnosis.characteristics.items()):
        x = at + np.arange(len(groups))
        values = [100 * group.precision for group in groups]
        bars = axes.bar(x, [0.0 if math.isnan(value) else value for value in values], 0.8, color=PALETTE[i])
        axes.bar_label(bars, ["" if math.isnan(v) else f"{v:.0f}" for v in values], padding=2, fontsize="x-small")
        ticks += [(place, group.name) for place, group in zip(x, groups, strict=True)]
        middles.append((float(x.mean()), name))
        at = float(x[-1]) + 2
    axes.axhline(100 * diagnosis.precision, color=INK, linestyle="--", linewidth=1)
    axes.set_xticks([place for place, _ in ticks], [name for _, name in ticks])
    for middle, name in middles:
        axes.annotate(name, (middle, -0.11), xycoords=("data", "axes fraction"), ha="center", va="top")
    axes.grid(False, axis="x")
    axes.set(ylabel="mAP_N, %", ylim=(0, axes.get_ylim()[1] * 1.1))


def _draw_kinds(axes: Axes, diagnosis: Diagnosis) -> None:
    """A bar for each rank, divided by kind."""
    x, bottom = np.arange(TOP), np.zeros(TOP)
    colours = (PALETTE[2], *PALETTE[:2], *PALETTE[3:])
    shares = 100 * np.nan_to_num(diagnosis.kinds)
    for number, kind in enumerate(KINDS):
        axes.bar(x, shares[:, number], 0.85, bottom=bottom, color=colours[number], label=kind)
        bottom = bottom + shares[:, number]
    axes.set_xticks(x, [f"{g}N" for g in range(1, TOP + 1)])
    axes.grid(False, axis="x")
    axes.set(xlabel="best predictions of a class with N segments", ylabel="share, %", ylim=(0, 100))
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False, fontsize="small")


def _draw_segmental(axes: Axes, result: SegmentalResult) -> None:
    _draw_bars(axes, list(result.named), list(result.named.values()), result.intervals)
    axes.set(ylabel="%")

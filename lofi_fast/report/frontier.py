"""The picture of `lofi-fast plan`: what memory buys, in fidelity and in time, as an SVG by matplotlib."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

PALETTE = ("#0072b2", "#d55e00", "#009e73", "#cc79a7")  # Okabe and Ito's, told apart by the colour-blind
INK, GRID, SHADE = "#1b1f24", "#d6dae0", "#eef0f3"
BUDGET_TICKS = (1, 2, 4, 8, 11, 16, 24, 40, 80)  # GB


@dataclass(frozen=True)
class Point:
    """What a budget of so many GB buys."""

    gigabytes: float
    share: float  # of full Omega
    seconds: float | None  # of an epoch
    recompute: bool


@dataclass(frozen=True)
class Curve:
    """What an encoder gets, smallest budget first; those that fit nothing are left out."""

    name: str
    points: tuple[Point, ...]


def picture(curves: Sequence[Curve], *, title: str, times: str, budgets: Sequence[float], holds: float | None) -> str:
    """SVG text. `times`: whose seconds they are, in words. `budgets` (GB) are marked, and what is beyond the memory
    that the card `holds` (GB) is shaded. Without any seconds only fidelity is drawn.
    """
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    timed = any(point.seconds is not None for curve in curves for point in curve.points)
    style: dict[Any, Any] = {
        "svg.hashsalt": "lofi_fast", "svg.fonttype": "none", "font.size": 9, "text.color": INK, "axes.edgecolor": GRID,
        "axes.labelcolor": INK, "xtick.color": INK, "ytick.color": INK, "text.parse_math": False,
    }  # fmt: skip
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(9 if timed else 5.5, 4.0), layout="constrained")
        axes = figure.subplots(1, 2 if timed else 1, squeeze=False)[0]
        for ax in axes:
            ax.set_xscale("log")
            ax.set_xlim(1, 80)
            ax.set_xticks(BUDGET_TICKS, [str(tick) for tick in BUDGET_TICKS])
            ax.minorticks_off()
            ax.grid(color=GRID, linewidth=0.6)
            ax.set_axisbelow(True)
            ax.spines[["top", "right"]].set_visible(False)
            ax.set_xlabel("memory budget, GB")
            if holds is not None and holds < 80:
                ax.axvspan(holds, 80, color=SHADE, linewidth=0)
            for budget in budgets:
                ax.axvline(budget, color=INK, linewidth=0.6, alpha=0.6)
        for number, curve in enumerate(curves):
            look = {"color": PALETTE[number % len(PALETTE)], "linewidth": 1.8, "label": curve.name}
            gigabytes = [point.gigabytes for point in curve.points]
            axes[0].plot(gigabytes, [100 * point.share for point in curve.points], drawstyle="steps-post", **look)
            if timed:
                for again, line in ((False, "-"), (True, ":")):
                    hours = [(p.seconds or 0) / 3600 if p.recompute == again else math.nan for p in curve.points]
                    axes[1].plot(gigabytes, hours, line, drawstyle="steps-post", **look)
        axes[0].set_ylim(0, 104)
        axes[0].set_ylabel("highest fidelity that fits, % of full")
        if timed:
            axes[1].set_ylabel("hours of an epoch at it (dotted: recompute)")
            axes[1].set_yscale("log")
            axes[1].yaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 5, 7), numticks=12))
            axes[1].yaxis.set_major_formatter(FuncFormatter(lambda hours, _: f"{hours:g}"))
            axes[1].yaxis.set_minor_formatter(NullFormatter())
        axes[0].legend(frameon=False, loc="lower right")
        shaded = "" if holds is None or holds >= 80 else f"\nshaded: more than this card holds ({holds:.1f} GB)"
        figure.suptitle(title, fontsize=9.5)
        figure.supxlabel(f"times: {times}{shaded}", fontsize=8)
        file = io.StringIO()
        figure.savefig(file, format="svg", metadata={"Date": None, "Creator": None})
    return file.getvalue()

"""The picture at the head of README.md: what a training finds in validation videos, and its memory against the budget
beside a neighbour that takes some of it.

The demo is trained with fidelity up to full within a budget; in its joint stage a second process takes and frees memory
(`bench.tools.neighbour`). The head is trained when that process has gone. A row holds what is drawn, so the picture can
be drawn again from it.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import astuple
from io import StringIO
from pathlib import Path

from bench.commands.planner import run
from bench.tools.logs import read_log
from bench.tools.rows import RESULTS, ROOT, Row, append_row, environment, read_rows
from bench.tools.table import Picture, Section, screen, when
from lofi_fast.budget import parse_bytes
from lofi_fast.errors import InputError
from lofi_fast.report.figures import PALETTE, best_score, class_colours, draw_memory, draw_timeline
from lofi_fast.report.read import Steps, finite, read_run
from lofi_fast.report.rows import Bar, Timeline, timelines
from lofi_fast.run import events

USAGE = "python -m bench pictures [options] [-- <arguments of lofi_fast.train>]"
BUDGET, LEAST = "950MB", "790MB"  # the second is what the neighbour leaves of the first
VIDEOS = 2
DRAWN_FROM = ("pictures",)
# What is kept of a joint step.
COLUMNS = ("stage", "epoch", "step", "loss", "pattern", "num_snippets", "side", "predicted", "peak", "limit", "budget")


def main(argv: Sequence[str]) -> int:
    """Train and append a row; `python -m bench tables` draws it."""
    cut = list(argv).index("--") if "--" in argv else len(argv)
    args, more = _parser().parse_args(argv[:cut]), list(argv[cut + 1 :])
    budget, least = parse_bytes(args.budget), parse_bytes(args.least)
    if not least < budget:
        raise InputError(f"--least {args.least} leaves all of --budget {args.budget}: name less, or --alone")
    start = environment()
    with tempfile.TemporaryDirectory(prefix="bench-pictures-", ignore_cleanup_errors=True) as name:
        encoder, detector = Path(name) / "encoder", Path(name) / "detector"
        flags = ["--min-cut", "1", "--device", "cpu", "--mem-budget", str(budget), "--cache", f"{name}/cache", *more]
        first = [*flags, "--stages", "pretrain,joint", "--out", str(encoder)]
        told = run(first, encoder, None if args.alone else (budget, least))
        if told["refused"]:
            raise InputError(f"nothing to draw: {told['refused']}")
        weights = ["--encoder-weights", str(encoder / "checkpoints" / "last.pt")]
        command = [*flags, *weights, "--stages", "head,eval", "--out", str(detector)]
        subprocess.run([sys.executable, "-m", "lofi_fast.train", *command], cwd=ROOT, check=True)
        row = {"bench": "pictures", "flags": more, "budget": budget} | told | _drawn(encoder, detector) | start
        append_row(args.results, row)
    print(screen(table([row])))
    return 0


def _drawn(encoder: Path, detector: Path) -> Row:
    """Of two finished runs what the figure shows: columns of the joint steps, and some videos."""
    steps = [event for event in read_log(encoder) if isinstance(event, events.Step) and event.stage == "joint"]
    found = read_run(detector)
    shown = timelines(found.ground_truth, found.predictions, VIDEOS)
    return {
        "columns": {name: [getattr(step, name) for step in steps] for name in COLUMNS},
        "timelines": [
            {
                "video": one.video, "duration": one.duration, "left_out": one.left_out,
                "truth": [[bar.start, bar.end, bar.label, None, bar.lane] for bar in one.truth],
                "found": [astuple(bar) for bar in one.found],
            }
            for one in shown
        ],
        "average_map": found.metrics.average_map,
    }  # fmt: skip


def figure(results: Path) -> str | None:
    """An SVG of the newest row: timelines above, memory below; None without rows."""
    rows = read_rows(results / "pictures.jsonl")
    if not rows:
        return None
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    steps, shown = _steps(rows[-1]), _timelines(rows[-1])
    colours, best = class_colours(shown), best_score(shown)
    with matplotlib.rc_context({"svg.hashsalt": "bench", "svg.fonttype": "none", "font.size": 9}):
        drawing = Figure(figsize=(9, 3.0 + 1.3 * len(shown)), layout="constrained")
        above, below = drawing.subfigures(2, 1, height_ratios=(1.3 * len(shown), 3.0))
        for axes, one in zip(above.subplots(len(shown), 1, squeeze=False)[:, 0], shown, strict=True):
            draw_timeline(axes, one, colours, best)
            axes.set_title(f"{one.video}: as labelled, and below what was found", loc="left", fontsize=9)
        patches = [Patch(color=PALETTE[number], label=label) for label, number in colours.items()]
        above.legend(handles=patches, loc="outside right center", frameon=False)
        axes = below.subplots()
        draw_memory(axes, steps)
        axes.set_title("memory of each joint step", loc="left", fontsize=9, pad=34)
        text = StringIO()
        FigureCanvasSVG(drawing).print_svg(text, metadata={"Date": None, "Creator": None})
    return text.getvalue()


def _steps(row: Row) -> Steps:
    columns = row["columns"]
    rows = zip(*columns.values(), strict=True)
    return Steps([events.Step(**dict(zip(columns, values, strict=True))) for values in rows])


def _timelines(row: Row) -> list[Timeline]:
    def bars(of: Sequence[tuple[float, float, str, float | None, int]]) -> tuple[Bar, ...]:
        return tuple(Bar(start, end, label, finite(score), lane) for start, end, label, score, lane in of)

    return [
        Timeline(one["video"], one["duration"], bars(one["truth"]), bars(one["found"]), one["left_out"])
        for one in row["timelines"]
    ]


def table(rows: Sequence[Row]) -> list[Section]:
    """The picture, and what it is of."""
    if not rows:
        return []
    row = rows[-1]
    pressed = f", {row['short']} of which had less, since a neighbour took it" if row["short"] else ""
    return [
        Picture("What is found in two videos, and memory against the budget", "bench/results/pictures.svg"),
        f"The demo, trained within {row['budget'] / 1e9:.2f} GB (average mAP {100 * row['average_map']:.1f}): two "
        f"validation videos; and its {row['steps']} joint steps{pressed}: {row['violations']} violations, "
        f"{row['lost']} videos lost, {row['down']} rungs down and {row['up']} up. {row['machine']}, {when([row])}.",
    ]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench pictures", usage=USAGE, description=__doc__)
    parser.add_argument("--budget", default=BUDGET, help=f"of the training (default: {BUDGET})")
    parser.add_argument("--least", default=LEAST, help=f"what the neighbour leaves of it (default: {LEAST})")
    parser.add_argument("--alone", action="store_true", help="without a neighbour")
    parser.add_argument("--results", type=Path, default=RESULTS / "pictures.jsonl", help="file of rows to append to")
    return parser

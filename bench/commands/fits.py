"""What fits: the highest fidelity against the memory budget, for plain PyTorch, two ways to save memory, and ours.

By arithmetic alone (lofi_fast.memory.step_bytes), for the paper's setting in half precision: 100 snippets of 224 px,
cut in snippets and pixels alike, one video or 16 at once. All ways have our head, and beside tensors the same context,
libraries and allocator (lofi_fast.memory.cards, PRIOR in lofi_fast.memory.plans); the others are charged the
activations that autograd keeps of their encoder and nothing for what backward makes itself, which favours them.
`bench memory` measures such steps on a GPU.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from dataclasses import replace
from io import StringIO
from pathlib import Path

from bench.tools.rows import RESULTS, Row, append_row, environment, read_rows
from bench.tools.table import Picture, Section, Table, screen, when
from lofi_fast.config import EncoderName
from lofi_fast.encoder.resnet_ledger import ResNetLedger, plain_kept_bytes
from lofi_fast.fidelity import FRAMES_PER_SNIPPET, Fidelity, Pattern, ladder
from lofi_fast.ledger import default_chunk
from lofi_fast.memory.cards import profile_named
from lofi_fast.memory.plans import PRIOR
from lofi_fast.memory.step_bytes import Setting, step_bytes
from lofi_fast.presets import activitynet

USAGE = "python -m bench fits [options]"
ENCODERS: tuple[EncoderName, ...] = ("tsm_r18", "tsm_r50")
VIDEOS = (16, 1)  # at once: the paper's batch, and micro-batches of it
BUDGETS = tuple(range(2, 25))  # GB
SHOWN = (2, 4, 8, 11, 16, 24)  # of them, in the table
DRAWN_FROM = ("fits", "memory")  # the rows that the figure shows
CARD = "3090"  # the card whose context and libraries are assumed
LARGEST_CUT = 256.0
SAMPLED = 0.3  # of the snippets have gradients: ETAD's habit (Liu et al. 2022)
# Way -> forward passes' worth of a step, of which backward takes two; sampled gradients are not all gradients.
COSTS = {
    "plain PyTorch": 3.0,
    "checkpointed": 4.0,
    "sampled gradients, 30%": 1 + 2 * SAMPLED,
    "ours": 3.0,
    "ours, recompute": 4.0,
    "ours, 8 bits": 3.0,
}


def main(argv: Sequence[str]) -> int:
    """Compute, append rows, print a table."""
    args = _parser().parse_args(argv)
    start = environment() | {"quick": False}
    rows: list[Row] = [row(encoder, videos, way) for encoder in ENCODERS for videos in VIDEOS for way in COSTS]
    for found in rows:
        append_row(args.results, {"bench": "fits", "computed": True} | found | start)
    print(f"{screen(table([found | start for found in rows]))}\n{len(rows)} rows appended to {args.results}")
    return 0


def row(encoder: EncoderName, videos: int, way: str) -> Row:
    """The highest fidelity at each budget, as [GB, snippets, side]; of a budget that holds none there is no point."""
    config = activitynet()
    setting = Setting.of(replace(config, encoder=replace(config.encoder, name=encoder)), 200, 2)
    assert setting is not None
    rungs = ladder(Pattern.SPATIO_TEMPORAL, config.full, 1.0, LARGEST_CUT)
    needs = [(rung, need(way, setting, rung, videos)) for rung in rungs]
    points = []
    for budget in BUDGETS:
        fitting = next((rung for rung, bytes_ in needs if bytes_ <= budget * 10**9), None)
        if fitting is not None:
            points.append([budget, fitting.num_snippets, fitting.side])
    full = [config.full.num_snippets, config.full.side]
    return {
        "encoder": encoder, "videos": videos, "way": way, "cost": COSTS[way] / COSTS["plain PyTorch"], "full": full,
        "points": points, "full_needs": needs[0][1], "card": profile_named(CARD).name,
    }  # fmt: skip


def need(way: str, setting: Setting, fidelity: Fidelity, videos: int) -> int:
    """Bytes as the driver shows them, at the peak of a step."""
    setting = replace(setting, eight_bit=way == "ours, 8 bits")
    ours = step_bytes(setting, fidelity, videos, recompute=way == "ours, recompute")
    added = ours.added
    if not way.startswith("ours"):
        frames = videos * fidelity.num_frames
        if way == "checkpointed":
            frames = min(frames, FRAMES_PER_SNIPPET * default_chunk(fidelity.side))
        elif way != "plain PyTorch":
            frames = FRAMES_PER_SNIPPET * math.ceil(SAMPLED * videos * fidelity.num_snippets)
        assert isinstance(setting.encoder, ResNetLedger)
        kept = plain_kept_bytes(setting.encoder.name, setting.encoder.width, fidelity.side, frames, setting.itemsize)
        added = ours.frames + kept + ours.kept_head
    return profile_named(CARD).outside_torch + ours.between + PRIOR.likely.added(added)


def table(rows: Sequence[Row]) -> list[Section]:
    """Cuts at some budgets; the figure shows all."""
    rows = _newest(rows)
    if not rows:
        return []
    lines = [(row["encoder"], str(row["videos"]), row["way"], f"{row['cost']:.2f}x", *_cells(row),
              f"{row['full_needs'] / 1e9:.1f} GB") for row in rows]  # fmt: skip
    budgets = [f"{budget} GB" for budget in SHOWN]
    header = ("encoder", "videos at once", "way", "time", *budgets, "full fidelity takes")
    picture = Picture("Highest fidelity against budget", "results/fits.svg")
    return [picture, Table(f"Computed; {when(rows)}:", header, lines)]


def _cells(row: Row) -> list[str]:
    """The cut that fits each budget shown: "full", "cut 4.6", or "nothing"."""
    points = {budget: (snippets, side) for budget, snippets, side in row["points"]}
    length, width = row["full"]
    cells = []
    for budget in SHOWN:
        if budget not in points:
            cells.append("nothing")
            continue
        snippets, side = points[budget]
        cut = length * width**2 / (snippets * side**2)
        cells.append("full" if cut == 1 else f"cut {cut:.1f}")
    return cells


def figure(results: Path) -> str | None:
    """An SVG of `fits` rows, with crosses for the steps that `memory` measured on a GPU; None without rows."""
    rows = _newest(read_rows(results / "fits.jsonl"))
    if not rows:
        return None
    measured = [
        row
        for row in read_rows(results / "memory.jsonl")
        if row["measured"] == "step" and row["driver"] and not row["quick"]
    ]
    ways = {
        "plain PyTorch, dense SGAlign": "plain PyTorch", "lean": "ours", "lean, recompute": "ours, recompute",
        "lean, 8 bits": "ours, 8 bits",
    }  # fmt: skip
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    colours = {way: f"C{number}" for number, way in enumerate(dict.fromkeys(row["way"] for row in rows))}
    panels = list(dict.fromkeys((row["encoder"], row["videos"]) for row in rows))
    with matplotlib.rc_context({"svg.hashsalt": "bench", "svg.fonttype": "none", "font.size": 9}):
        drawing = Figure(figsize=(9, 2.9 * ((len(panels) + 1) // 2)), layout="constrained")
        axes = drawing.subplots((len(panels) + 1) // 2, 2, sharex=True, sharey=True, squeeze=False).ravel()
        for ax, (encoder, videos) in zip(axes, panels, strict=False):
            for row in (row for row in rows if (row["encoder"], row["videos"]) == (encoder, videos)):
                full = row["full"][0] * row["full"][1] ** 2
                x = [budget for budget, _, _ in row["points"]]
                y = [100 * snippets * side**2 / full for _, snippets, side in row["points"]]
                style = "--" if row["way"].endswith("recompute") else "-"
                ax.plot(x, y, style, drawstyle="steps-post", color=colours[row["way"]], label=row["way"])
            for row in measured:
                if (row["encoder"], row["videos"]) == (encoder, videos) and row["form"] in ways:
                    share = 100 * row["snippets"] * row["side"] ** 2 / full
                    ax.plot(row["driver"] / 1e9, share, "x", color=colours[ways[row["form"]]], markersize=8)
            ax.set_title(f"{encoder}, {videos} video{'s' * (videos > 1)} at once")
            ax.set_yscale("log")
            ax.set_yticks([1, 5, 25, 100], ["1%", "5%", "25%", "100%"])
            ax.minorticks_off()
            ax.grid(alpha=0.3)
        for ax in axes[-2:]:
            ax.set_xlabel("memory budget, GB")
        for ax in axes[::2]:
            ax.set_ylabel("highest fidelity, of Omega")
        handles, labels = axes[0].get_legend_handles_labels()
        drawing.legend(handles, labels, loc="outside lower center", ncols=(len(labels) + 1) // 2, frameon=False)
        text = StringIO()
        FigureCanvasSVG(drawing).print_svg(text, metadata={"Date": None, "Creator": None})
    return text.getvalue()


def _newest(rows: Sequence[Row]) -> list[Row]:
    """Of each encoder, number of videos and way the newest row; arithmetic is the same on every machine."""
    ordered = sorted(rows, key=lambda row: str(row["date"]))
    return list({(row["encoder"], row["videos"], row["way"]): row for row in ordered}.values())


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench fits", usage=USAGE, description=__doc__)
    parser.add_argument("--results", type=Path, default=RESULTS / "fits.jsonl", help="file of rows to append to")
    return parser

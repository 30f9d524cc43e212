"""What fits: the highest fidelity against the memory budget, for plain PyTorch, two ways to save memory, and ours.

By arithmetic alone (lofi_fast.memory.model), for the paper's setting in half precision: 100 snippets of 224 px, cut in
snippets and pixels alike, one video or 16 at once. All ways have our head, and beside tensors the same context,
libraries and allocator (lofi_fast.memory.profiles, lofi_fast.plan.PRIOR); the others are charged what autograd keeps of
their encoder and nothing for backward's own maps, which favours them. `bench memory` measures such steps on a GPU.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from bench.rows import RESULTS, Row, append_row, environment
from bench.tables import FITS_BUDGETS, aligned, fits_cells
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
    lines = [("encoder", "videos at once", "way", *(f"{budget} GB" for budget in FITS_BUDGETS))]
    for found in rows:
        lines.append((found["encoder"], str(found["videos"]), found["way"], *fits_cells(found, FITS_BUDGETS)))
    print(f"{aligned(lines, text=3)}\n{len(rows)} rows appended to {args.results}")
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


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench fits", usage=USAGE, description=__doc__)
    parser.add_argument("--results", type=Path, default=RESULTS / "fits.jsonl", help="file of rows to append to")
    return parser

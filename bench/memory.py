"""Memory of the encoder's step: what autograd keeps of a frame, and the peak of one forward and backward.

Kept bytes are counted exactly, in the storages that autograd saves. Peaks are each measured in a process of its own,
above what that process held before the step: the resident set on a CPU, torch's allocator on a GPU.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import get_args

import torch

from bench.gate import GateError
from bench.measure import in_child, peak_above_start
from bench.networks import DTYPES, Encoded, kept_bytes
from bench.rows import RESULTS, Row, append_row, environment, software
from bench.tables import aligned
from lofi_fast.config import EncoderName
from lofi_fast.errors import InputError
from lofi_fast.fidelity import FRAMES_PER_SNIPPET
from lofi_fast.precision import choose_device

USAGE = "python -m bench memory [options]"
SIDES = (224, 158, 112)  # of (100, 224) and (25, 224), (50, 158), (100, 112)
PEAKS = ((64, 224), (256, 112))  # frames, side


def main(argv: Sequence[str]) -> int:
    """Measure, append rows, print tables; 0, or 1 when a form did not pass the gate."""
    args = _parser().parse_args(argv)
    if args.threads < 1:
        raise InputError(f"--threads {args.threads}: must be at least 1")
    device = choose_device(args.device)
    torch.set_num_threads(args.threads)
    start = environment() | software(device, args.threads) | {"quick": args.quick}
    print(f"{start['device']}; {args.threads} thread(s); commit {start['commit'][:7]}")
    rows: list[Row] = []
    try:
        for row in (*kept(device, args.quick), *peaks(device, args.quick)):
            append_row(args.results, {"bench": "memory"} | row | start)
            rows.append(row)
    except GateError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    finally:
        print(f"\n{table(rows)}\n{len(rows)} rows appended to {args.results}")
    return 0


def kept(device: torch.device, quick: bool = False) -> Iterator[Row]:
    """One snippet tells the bytes of a frame: what is kept is proportional to the frames."""
    for name in get_args(EncoderName)[: 1 if quick else None]:
        for side in (64,) if quick else SIDES:
            for dtype in ("float32", "bfloat16"):
                case = Encoded.of(name, FRAMES_PER_SNIPPET, side, dtype, device)
                frames = Encoded.of(name, 2 * FRAMES_PER_SNIPPET, side, dtype, device)
                for form in ("plain PyTorch", "lean"):
                    # Two runs, so that what does not grow with the frames (folded weights) is told apart.
                    once, twice = (kept_bytes(c.encoder, partial(c.features, form)) for c in (case, frames))
                    yield {
                        "measured": "kept", "encoder": name, "side": side, "dtype": dtype, "form": form,
                        "bytes_a_frame": (twice - once) / FRAMES_PER_SNIPPET, "bytes_once": 2 * once - twice,
                    }  # fmt: skip
                print(f"kept: {name} {side} px {dtype}", flush=True)


def peaks(device: torch.device, quick: bool = False) -> Iterator[Row]:
    dtypes = ("float32", "bfloat16")
    for frames, side in ((16, 64),) if quick else PEAKS:
        for dtype in dtypes:
            case = Encoded.of("tsm_r18", frames, side, dtype, device)
            names = [name for name in case.forms() if name != "torch.compile"]
            if side == min(side for _, side in PEAKS) or quick:
                case.gate(names)
            del case
            for form in names:
                arguments = (frames, side, dtype, form, str(device), torch.get_num_threads())
                peak = in_child(_peak, *arguments) if device.type == "cpu" else _peak(*arguments)
                yield {
                    "measured": "peak", "encoder": "tsm_r18", "frames": frames, "side": side, "dtype": dtype,
                    "form": form, "peak": peak,
                }  # fmt: skip
                print(f"peak: {frames} frames, {side} px, {dtype}, {form}: {(peak or 0) / 2**20:.0f} MiB", flush=True)


def _peak(frames: int, side: int, dtype: str, form: str, device: str, threads: int) -> int:
    torch.set_num_threads(threads)
    case = Encoded.of("tsm_r18", frames, side, dtype, torch.device(device))
    # The first snippet loads code and makes the gradients, which stay; then the peak is the step's own.
    Encoded(case.encoder, case.frames[:FRAMES_PER_SNIPPET], DTYPES[dtype]).step(form)
    return peak_above_start(partial(case.step, form), case.frames.device, warm=False)


def table(rows: Sequence[Row]) -> str:
    lines = [("encoder", "side", "dtype", "form", "kept, MB a frame", "against plain")]
    plain: dict[object, float] = {}
    for row in (row for row in rows if row["measured"] == "kept"):
        key = (row["encoder"], row["side"], row["dtype"])
        plain.setdefault(key, row["bytes_a_frame"])
        cells = (row["encoder"], str(row["side"]), row["dtype"], row["form"])
        lines.append((*cells, f"{row['bytes_a_frame'] / 1e6:.2f}", f"{plain[key] / row['bytes_a_frame']:.2f}x less"))
    peaked = [("step", "dtype", "form", "peak, MiB", "against plain")]
    for row in (row for row in rows if row["measured"] == "peak" and row["peak"]):
        key = (row["frames"], row["side"], row["dtype"])
        plain.setdefault(key, row["peak"])
        cells = (f"{row['frames']} frames of {row['side']} px", row["dtype"], row["form"])
        peaked.append((*cells, f"{row['peak'] / 2**20:.0f}", f"{plain[key] / row['peak']:.2f}x less"))
    return f"{aligned(lines, text=4)}\n\n{aligned(peaked, text=3)}"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench memory", usage=USAGE, description=__doc__)
    parser.add_argument(
        "--device", choices=("auto", "cpu", "cuda"), default="auto", help="default: a GPU if there is one"
    )
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default: 1)")
    parser.add_argument("--quick", action="store_true", help="one small case: does everything run?")
    parser.add_argument("--results", type=Path, default=RESULTS / "memory.jsonl", help="file of rows to append to")
    return parser

"""Memory of the encoder's step: what autograd keeps of a frame, and the peak of one forward and backward.

Kept bytes are counted exactly, in the storages that autograd saves. Peaks are each measured in a process of its own,
above what that process held before the step: the resident set on a CPU; on a GPU torch's allocator, and beside it what
the driver shows.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import chain
from typing import Any

import torch

from bench.tools.against import read_against
from bench.tools.dtypes import DTYPES, half_of
from bench.tools.encoders import NAMES, PLAIN, Name, Other, held_bytes
from bench.tools.measure import in_child, peak_above_start
from bench.tools.networks import (
    EACH_SNIPPET,
    EIGHT_BIT,
    LEAN_EACH_SNIPPET,
    TINY_WIDTH,
    WIDTH,
    Encoded,
    WholeStep,
    kept_bytes,
)
from bench.tools.record import options, record
from bench.tools.rows import Row, environment, software
from bench.tools.table import MISSING, Section, Table, by_place, newest, when
from lofi_fast.encoder.resnet_table import BLOCKS
from lofi_fast.errors import InputError
from lofi_fast.fidelity import FRAMES_PER_SNIPPET
from lofi_fast.precision import choose_device

SIDES = (224, 158, 112)  # of (100, 224) and (25, 224), (50, 158), (100, 112)
PEAKS = ((64, 224), (256, 112))  # frames, side
# Videos, snippets, side, forms: full fidelity; the paper's batch at full fidelity, and at a cut of 4.
ON_GPU = (WholeStep.FORMS[0], "lean, planned chunk", "lean, recompute, planned chunk", "lean, recompute")
GPU_PEAKS = (
    (1, 100, 224, (*ON_GPU, "lean, 8 bits, planned chunk")),
    (16, 100, 224, ("lean, recompute",)),
    (16, 50, 158, ON_GPU[:3]),
)
OTHERS_PEAK = (16, 112)  # frames, side
FLOORS = (4, 12, 64)  # snippets of FLOOR_SIDE pixels, a snippet at a time
FLOOR_SIDE = 112
KEPT = ("plain PyTorch", "lean", EIGHT_BIT)
KEY = ("measured", "encoder", "videos", "snippets", "frames", "side", "dtype", "form")


def main(argv: Sequence[str]) -> int:
    """Measure, append rows, print tables; 0, or 1 when a form did not pass the gate."""
    args = _parser().parse_args(argv)
    if args.threads < 1:
        raise InputError(f"--threads {args.threads}: must be at least 1")
    device = choose_device(args.device)
    torch.set_num_threads(args.threads)
    old = read_against(args.against)
    quick = args.quick or args.tiny
    start = environment() | software(device, args.threads) | {"quick": quick}
    print(f"{start['device']}; {args.threads} thread(s); commit {start['commit'][:7]}")
    others = [others_kept(device, quick, args.tiny), others_peaks(device, quick)]
    measured = chain(*(others if args.others else _parts(device, quick, args.tiny, args.short)))
    values = {
        "kept": ("bytes_a_frame",), "kept of others": ("bytes_a_frame",),
        "peak": ("peak",), "peak of others": ("peak",), "floor": ("peak",), "driver": ("driver",),
    }  # fmt: skip
    return record("memory", measured, start, args, old, table, KEY, values)


def _parts(device: torch.device, quick: bool, tiny: bool, short: bool) -> list[Iterator[Row]]:
    """On a GPU the peaks are those of the whole step, as the driver sees them too."""
    if tiny:
        return [kept(device, quick, tiny), others_kept(device, tiny=True), whole_peaks(device, tiny)]
    if device.type == "cuda":
        return [whole_peaks(device, quick), *([] if short else [kept(device, quick)])]
    others = [others_kept(device, quick), others_peaks(device, quick)]
    return [kept(device, quick), *others, peaks(device, quick, short), floors(device, quick)]


def kept(device: torch.device, quick: bool = False, tiny: bool = False) -> Iterator[Row]:
    """One snippet tells the bytes of a frame: what is kept is proportional to the frames. On a GPU full fidelity stands
    for all, since each shape has kernels of its own to be compiled.
    """
    names = list(BLOCKS)[: 1 if quick else None]
    sides, dtypes = (16,) if tiny else (64,) if quick else SIDES, ("float32", "bfloat16")
    if tiny or device.type == "cuda":
        sides, dtypes = sides[:1], (half_of(device),)
    for name in names:
        for side in sides:
            for dtype in dtypes:
                width = TINY_WIDTH if tiny else WIDTH
                case = Encoded.of(name, FRAMES_PER_SNIPPET, side, dtype, device, width)
                frames = Encoded.of(name, 2 * FRAMES_PER_SNIPPET, side, dtype, device, width)
                for form in KEPT:
                    # Two runs, so that what does not grow with the frames (folded weights) is told apart.
                    once, twice = (kept_bytes(c.encoder, partial(c.features, form)) for c in (case, frames))
                    yield {
                        "measured": "kept", "encoder": name, "side": side, "dtype": dtype, "form": form,
                        "bytes_a_frame": (twice - once) / FRAMES_PER_SNIPPET, "bytes_once": 2 * once - twice,
                    }  # fmt: skip
                print(f"kept: {name} {side} px {dtype}", flush=True)


def others_kept(device: torch.device, quick: bool = False, tiny: bool = False) -> Iterator[Row]:
    """Of the encoders beside TSM-ResNet, as `kept`; theirs are compared in the forms that each has."""
    width, side = (TINY_WIDTH, 16) if tiny else (WIDTH, 32 if quick else SIDES[0])
    for name in NAMES:
        Other.of(name, FRAMES_PER_SNIPPET, 16 if tiny else 32, "float32", device, width).gate()
        for dtype in ("float32",) if tiny else ("float32", "bfloat16"):
            case = Other.of(name, 2 * FRAMES_PER_SNIPPET, side, dtype, device, width)
            for form in case.forms():
                once, twice = held_bytes(case.first(), form), held_bytes(case, form)
                yield {
                    "measured": "kept of others", "encoder": name, "side": side, "dtype": dtype, "form": form,
                    "bytes_a_frame": (twice - once) / FRAMES_PER_SNIPPET, "bytes_once": 2 * once - twice,
                }  # fmt: skip
            print(f"kept: {name} {side} px {dtype}", flush=True)


def others_peaks(device: torch.device, quick: bool = False) -> Iterator[Row]:
    frames, side = (16, 32) if quick else OTHERS_PEAK
    for name in NAMES:
        forms = list(Other.of(name, FRAMES_PER_SNIPPET, 32, "float32", device).forms())
        for dtype in ("float32", "bfloat16"):
            for form in forms:
                peak = in_child(_others_peak, name, frames, side, dtype, form, str(device), torch.get_num_threads())
                yield {
                    "measured": "peak of others", "encoder": name, "frames": frames, "side": side, "dtype": dtype,
                    "form": form, "peak": peak,
                }  # fmt: skip
                print(f"peak: {name}, {frames} frames, {side} px, {dtype}, {form}: {(peak or 0) / 2**20:.0f} MiB")


def _others_peak(name: Name, frames: int, side: int, dtype: str, form: str, device: str, threads: int) -> int:
    torch.set_num_threads(threads)
    case = Other.of(name, frames, side, dtype, torch.device(device))
    case.first().step(form)  # loads code and makes the gradients, which stay
    return peak_above_start(partial(case.step, form), case.frames.device, warm=False)


def peaks(device: torch.device, quick: bool = False, short: bool = False) -> Iterator[Row]:
    dtypes = ("float32", "bfloat16")
    for frames, side in ((16, 64),) if quick else PEAKS[:1] if short else PEAKS:
        for dtype in dtypes:
            case = Encoded.of("tsm_r18", frames, side, dtype, device)
            names = list(case.forms())
            if side == min(side for _, side in PEAKS) or quick:
                case.gate(names)
            del case
            for form in names:
                peak = in_child(_peak, frames, side, dtype, form, str(device), torch.get_num_threads())
                yield {
                    "measured": "peak", "encoder": "tsm_r18", "frames": frames, "side": side, "dtype": dtype,
                    "form": form, "peak": peak,
                }  # fmt: skip
                print(f"peak: {frames} frames, {side} px, {dtype}, {form}: {(peak or 0) / 2**20:.0f} MiB", flush=True)


def floors(device: torch.device, quick: bool = False) -> Iterator[Row]:
    """The least that a step can be run in: recomputed a snippet at a time, and beside it all in one lean graph. Peaks
    count the gradients that the step makes.
    """
    forms = (EACH_SNIPPET, LEAN_EACH_SNIPPET, "lean, one graph")
    for snippets in (2,) if quick else FLOORS:
        side = 64 if quick else FLOOR_SIDE
        frames = FRAMES_PER_SNIPPET * snippets
        for dtype in ("float32", "bfloat16"):
            if snippets == min(FLOORS) or quick:
                Encoded.of("tsm_r18", frames, side, dtype, device).gate(["plain PyTorch", *forms])
            for form in forms:
                peak = in_child(_peak, frames, side, dtype, form, str(device), torch.get_num_threads(), True)
                yield {
                    "measured": "floor", "encoder": "tsm_r18", "snippets": snippets, "side": side, "dtype": dtype,
                    "form": form, "peak": peak,
                }  # fmt: skip
                print(f"floor: {snippets} snippets, {dtype}, {form}: {(peak or 0) / 2**20:.0f} MiB", flush=True)


def _peak(
    frames: int, side: int, dtype: str, form: str, device: str, threads: int, with_gradients: bool = False
) -> int:
    torch.set_num_threads(threads)
    case = Encoded.of("tsm_r18", frames, side, dtype, torch.device(device))
    # The first snippet loads code and makes the gradients, which stay; then the peak is the step's own.
    Encoded(case.encoder, case.frames[:FRAMES_PER_SNIPPET], DTYPES[dtype]).step(form)
    if with_gradients:
        case.drop_gradients()
    return peak_above_start(partial(case.step, form), case.frames.device, warm=False)


def whole_peaks(device: torch.device, quick: bool = False) -> Iterator[Row]:
    """Encoder, head and loss, forward and backward, without an optimizer; each form in a process of its own.

    `peak`: above the start, by torch's allocator, with the gradients that the step makes. `driver`: what the device
    shows for the process after the step: the context and the libraries' own memory with all that torch reserved.
    """
    for videos, snippets, side, forms in ((2, 3, 16, WholeStep.FORMS),) if quick else GPU_PEAKS:
        for form in forms:
            width = TINY_WIDTH if quick else WIDTH
            arguments = (videos, snippets, side, half_of(device), form, str(device), torch.get_num_threads(), width)
            if device.type == "cuda":
                torch.cuda.empty_cache()
                found = in_child(_whole_peak, *arguments, torch.cuda.mem_get_info(device)[0], cuda=True)
            else:
                found = _whole_peak(*arguments)
            peak, driver = (None, None) if found is None else found
            yield {
                "measured": "step", "encoder": "tsm_r18", "videos": videos, "snippets": snippets, "side": side,
                "dtype": half_of(device), "form": form, "peak": peak, "driver": driver,
            }  # fmt: skip
            numbers = "more than there is" if peak is None else f"{peak / 1e9:.2f} GB, {(driver or 0) / 1e9:.2f} in all"
            print(f"step: {videos} videos, {snippets} x {side} px, {form}: {numbers}", flush=True)


def _whole_peak(
    videos: int, snippets: int, side: int, dtype: str, form: str, device_name: str, threads: int, width: int,
    free: int = 0,
) -> tuple[int, int | None]:  # fmt: skip
    """`free`: bytes of the device that were free before this process began."""
    torch.set_num_threads(threads)
    device = torch.device(device_name)
    case = WholeStep.of("tsm_r18", snippets, side, dtype, device, videos, width)
    if device.type == "cuda":
        case.step(form)  # loads code
    case.drop_gradients()
    peak = peak_above_start(partial(case.step, form), device, warm=False)
    return peak, free - torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else None


def table(rows: Sequence[Row]) -> list[Section]:
    """What autograd keeps of a frame, then the peaks of the encoder's step, the least of them, and of the whole one."""
    kept = newest(rows, ("measured", "encoder", "side", "dtype", "form"), "kept")
    peaks = newest(rows, ("measured", "encoder", "frames", "side", "dtype", "form"), "peak")
    others = newest(rows, ("measured", "encoder", "side", "dtype", "form"), "kept of others")
    others += newest(rows, ("measured", "encoder", "frames", "side", "dtype", "form"), "peak of others")
    floors = newest(rows, ("measured", "encoder", "snippets", "side", "dtype", "form"), "floor")
    steps = newest(rows, ("measured", "encoder", "videos", "snippets", "side", "dtype", "form"), "step")
    parts: list[Section] = [_kept_table(where, here) for where, here in by_place(kept)]
    parts += [_others_table(where, here) for where, here in by_place(others)]
    for where, here in by_place([row for row in peaks if row["peak"]]):  # without a peak: more than there is
        parts.append(_peak_table(where, here))
    parts += [_floor_table(where, here) for where, here in by_place([row for row in floors if row["peak"]])]
    return [*parts, *(_step_table(where, here) for where, here in by_place(steps))]


def _kept_table(where: str, rows: Sequence[Row]) -> Table:
    cells: dict[tuple[str, int], dict[str, float]] = {}
    for row in rows:
        cells.setdefault((row["encoder"], row["side"]), {})[f"{row['form']}, {row['dtype']}"] = row["bytes_a_frame"]
    dtypes = [dtype for dtype in DTYPES if any(row["dtype"] == dtype for row in rows)]
    forms = [f"{form}, {dtype}" for dtype in dtypes for form in KEPT]
    lines = []
    for (encoder, side), found in cells.items():
        numbers = [f"{found[form] / 1e6:.2f}" if form in found else MISSING for form in forms]
        lines.append((encoder, f"{side} px", *numbers))
    title = f"Kept of a frame from forward to backward, MB; {where}; {when(rows)}:"
    return Table(title, ("encoder", "side", *forms), lines)


def _others_table(where: str, rows: Sequence[Row]) -> Table:
    """What is kept of a frame beside the peak of one forward and backward."""
    kept = {(row["encoder"], row["dtype"], row["form"]): row for row in rows if row["measured"] == "kept of others"}
    peaks = {(row["encoder"], row["dtype"], row["form"]): row for row in rows if row["measured"] == "peak of others"}
    lines = []
    for (encoder, dtype, form), row in kept.items():
        plain = kept.get((encoder, dtype, PLAIN))
        less = MISSING if plain is None else f"{plain['bytes_a_frame'] / row['bytes_a_frame']:.1f}x less"
        peak = peaks.get((encoder, dtype, form))
        step = MISSING if peak is None else f"{peak['frames']} frames of {peak['side']} px"
        most = MISSING if peak is None or not peak["peak"] else f"{peak['peak'] / 2**20:.0f}"
        kept_of_one = f"{row['bytes_a_frame'] / 1e6:.2f}"
        lines.append((encoder, dtype, form, f"{row['side']} px", kept_of_one, less, step, most))
    title = f"Other encoders, kept of a frame and the peak of one step above the process; {where}; {when(rows)}:"
    header = ("encoder", "dtype", "form", "side", "kept of a frame, MB", "against plain", "step", "peak, MiB")
    return Table(title, header, lines)


def _peak_table(where: str, rows: Sequence[Row]) -> Table:
    plain: dict[tuple[Any, ...], int] = {}
    lines = []
    for row in rows:
        key = (row["frames"], row["side"], row["dtype"])
        plain.setdefault(key, row["peak"])
        lines.append((
            f"{row['frames']} frames of {row['side']} px", row["dtype"], row["form"], f"{row['peak'] / 2**20:.0f}",
            f"{plain[key] / row['peak']:.1f}x less",
        ))  # fmt: skip
    title = f"Peak of one forward and backward above the process before it; {where}; {when(rows)}:"
    return Table(title, ("step", "dtype", "form", "peak, MiB", "against plain"), lines)


def _floor_table(where: str, rows: Sequence[Row]) -> Table:
    plain = {(row["snippets"], row["dtype"]): row["peak"] for row in rows if row["form"] == EACH_SNIPPET}
    lines = [
        (
            f"{row['snippets']} snippets of {row['side']} px", row["dtype"], row["form"], f"{row['peak'] / 2**20:.0f}",
            f"{row['peak'] / plain[row['snippets'], row['dtype']]:.2f}x",
        )
        for row in rows
        if (row["snippets"], row["dtype"]) in plain
    ]  # fmt: skip
    title = f"The least that a step can be run in, its gradients counted; {where}; {when(rows)}:"
    return Table(title, ("step", "dtype", "form", "peak, MiB", "of plain, a snippet at a time"), lines)


def _step_table(where: str, rows: Sequence[Row]) -> Table:
    plain: dict[str, int] = {}
    lines: list[Sequence[str]] = []
    for row in rows:
        what = f"{row['videos']} x {row['snippets']} snippets of {row['side']} px"
        if row["peak"] is None:
            lines.append((what, row["dtype"], row["form"], "does not fit", "", ""))
            continue
        plain.setdefault(what, row["peak"])
        driver = MISSING if row["driver"] is None else f"{row['driver'] / 1e9:.2f}"
        less = f"{plain[what] / row['peak']:.1f}x less" if row["peak"] else ""
        lines.append((what, row["dtype"], row["form"], f"{row['peak'] / 1e9:.2f}", driver, less))
    header = ("step", "dtype", "form", "above the start, GB", "as the driver shows it, GB", "against plain")
    return Table(f"Whole step (encoder, head, loss); {where}; {when(rows)}:", header, lines)


def _parser() -> argparse.ArgumentParser:
    parser = options("memory", __doc__, "one small case: does everything run?", None)
    parser.add_argument("--tiny", action="store_true", help="smaller still, in one process: for Triton's interpreter")
    parser.add_argument("--others", action="store_true", help="the encoders beside TSM-ResNet alone")
    parser.add_argument("--short", action="store_true", help="the peaks of one size; on a GPU those of whole steps")
    return parser

"""What a frame pixel costs at the sides of the rungs: seconds of the lean encoder, forward and backward (CPU seconds
on a CPU), at every side that the planner takes by itself, and for the small presets at all sides of the ladder.

A network that halves its images rounds up, so that a pixel costs more at some sides than at others; beside the times
stands what `fidelity.pixel_cost` counts. The dearest side of each preset is set against its cheapest.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch

from bench.tools.against import read_against
from bench.tools.dtypes import half_of
from bench.tools.measure import Stopwatch, interleaved, spread
from bench.tools.networks import Encoded
from bench.tools.record import options, record
from bench.tools.rows import Row, environment, software
from bench.tools.table import Section, Table, by_place, newest, when
from lofi_fast.config import PresetName
from lofi_fast.errors import InputError
from lofi_fast.fidelity import CYCLE, FRAMES_PER_SNIPPET, Fidelity, ladder, offered, pixel_cost
from lofi_fast.precision import choose_device, cpu_multiplies_bf16
from lofi_fast.presets import PRESETS

# The others have one of these full fidelities. Of the first two all sides of the ladder are measured.
SMALL: tuple[PresetName, ...] = ("demo", "small")
SHOWN: tuple[PresetName, ...] = (*SMALL, "thumos", "activitynet")
ENCODER, FORM = "tsm_r18", "lean"
PIXELS = {"cpu": 500_000, "cuda": 32_000_000}  # of the frames of one call, as near as whole snippets come
SECONDS = 20.0  # that one side may take, at least three rounds

Rungs = Callable[..., tuple[Fidelity, ...]]


class CpuClock(Stopwatch):
    """Seconds of this process on a CPU; a neighbour lengthens them by what it does to caches alone."""

    def __call__(self, call: Callable[[], object]) -> float:
        began = time.process_time()
        call()
        return time.process_time() - began


def main(argv: Sequence[str]) -> int:
    """Measure, append rows, print a table."""
    args = options("rungs", __doc__, "two small sides: does everything run?", 5).parse_args(argv)
    if args.threads < 1 or args.rounds < 1:
        raise InputError("--threads and --rounds must be at least 1")
    device = choose_device(args.device)
    torch.set_num_threads(args.threads)
    old = read_against(args.against)
    start = environment() | software(device, args.threads) | {"quick": args.quick}
    sides = {8: [32, 16]} if args.quick else all_sides()
    values = {"ns": ("ns",)}
    return record(
        "rungs", measure(sides, device, args.rounds), start, args, old, table, ("width", "dtype", "side"), values, line
    )


def measure(sides: dict[int, list[int]], device: torch.device, rounds: int) -> Iterator[Row]:
    """A row for each width, dtype and side; the sides take turns."""
    dtypes = dtypes_of(device)
    clock = CpuClock(device) if device.type == "cpu" else Stopwatch(device)
    for width, some in sides.items():
        for dtype in dtypes:
            cases = {str(side): _case(width, side, dtype, device) for side in some}
            calls = {side: partial(case.step, FORM) for side, case in cases.items()}
            for side, seconds in interleaved(calls, clock, rounds, SECONDS).items():
                pixels = cases[side].frames[..., 0].numel()
                nanoseconds = [1e9 * one / pixels for one in seconds]
                timed = spread(nanoseconds)
                yield {
                    "encoder": ENCODER, "width": width, "side": int(side), "dtype": dtype, "form": FORM,
                    "frames": len(cases[side].frames), "rounds": len(seconds),
                    "ns": [round(one, 2) for one in (timed.median, timed.p20, timed.p80)],
                    "least": round(min(nanoseconds), 2), "counted": round(pixel_cost(int(side)), 4),
                }  # fmt: skip


def dtypes_of(device: torch.device) -> tuple[str, ...]:
    """What trainings compute in there: bfloat16 on a CPU only where that has a unit for it."""
    if device.type != "cpu":
        return (half_of(device),)
    return ("float32", "bfloat16") if cpu_multiplies_bf16() else ("float32",)


def _case(width: int, side: int, dtype: str, device: torch.device) -> Encoded:
    snippets = max(1, round(PIXELS[device.type] / (FRAMES_PER_SNIPPET * side**2)))
    return Encoded.of(ENCODER, snippets * FRAMES_PER_SNIPPET, side, dtype, device, width)


def line(row: Row) -> str:
    return f"width {row['width']}, {row['side']} px, {row['dtype']}: {row['least']:.1f} ns a pixel"


def sides_of(preset: PresetName, rungs: Rungs) -> list[int]:
    """Of all rungs of a preset, in its three patterns."""
    config = PRESETS[preset]()
    every = (one for pattern in CYCLE for one in rungs(pattern, config.full, config.min_cut, config.max_cut))
    return sorted({one.side for one in every}, reverse=True)


def all_sides() -> dict[int, list[int]]:
    """Width -> the sides to measure."""
    found: dict[int, set[int]] = {}
    for preset in SHOWN:
        for rungs in (offered, ladder) if preset in SMALL else (offered,):
            found.setdefault(PRESETS[preset]().encoder.width, set()).update(sides_of(preset, rungs))
    return {width: sorted(sides, reverse=True) for width, sides in found.items()}


def table(rows: Sequence[Row]) -> list[Section]:
    """The dearest against the cheapest side of each preset, then every side; by the quickest round of each."""
    parts: list[Section] = []
    for where, here in by_place(newest(rows, ("width", "dtype", "side"))):
        widths = {(row["width"], row["dtype"]): 0 for row in here}
        lines, sides = [], []
        for width, dtype in widths:
            times = {row["side"]: row for row in here if (row["width"], row["dtype"]) == (width, dtype)}
            for preset in SHOWN:
                if PRESETS[preset]().encoder.width == width:
                    lines.append(
                        (
                            preset,
                            dtype,
                            *_dearest(times, sides_of(preset, offered)),
                            *_dearest(times, sides_of(preset, ladder)),
                        )
                    )
            best = min(row["least"] for row in times.values())
            for side, row in sorted(times.items(), reverse=True):
                sides.append(
                    (
                        str(width),
                        dtype,
                        str(side),
                        f"{row['least']:.1f}",
                        f"{row['least'] / best:.2f}",
                        f"{row['counted']:.2f}",
                    )
                )
        header = (
            "preset",
            "dtype",
            "sides that are offered",
            "dearest pixel against cheapest",
            "counted",
            "sides of the ladder",
            "dearest against cheapest",
            "counted",
        )
        parts.append(Table(f"{where}; {when(here)}:", header, lines))
        parts.append(Table("", ("width", "dtype", "side", "ns a pixel", "against the cheapest", "counted"), sides))
    return parts


def _dearest(times: dict[int, Row], sides: Sequence[int]) -> tuple[str, str, str]:
    """(how many sides, dearest against cheapest as measured, empty where not all were, and as counted)."""
    counted = [pixel_cost(side) for side in sides]
    least = [times[side]["least"] for side in sides if side in times]
    measured = f"{max(least) / min(least):.2f}" if len(least) == len(sides) else ""
    return str(len(sides)), measured, f"{max(counted) / min(counted):.2f}"

"""What a GPU's host pays: time of one call of an operator, and how many device operations a step is made of.

Calls are of tensors so small that the device is done before the host is, so that their time is the host's own. Device
operations (kernels, copies, fills) are counted by PyTorch's profiler in one forward and backward.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from bench.tools.against import add_against, read_against
from bench.tools.cases import cases, form_of, forward, gate
from bench.tools.dtypes import DTYPES, half_of
from bench.tools.measure import spread
from bench.tools.networks import PLANNED, TINY_WIDTH, WIDTH, Encoded, WholeStep, planned_chunk
from bench.tools.record import record
from bench.tools.rows import RESULTS, Row, environment, software
from bench.tools.table import Section, Table, by_place, newest, when
from lofi_fast.encoder.lean import default_chunk
from lofi_fast.errors import InputError
from lofi_fast.fidelity import FRAMES_PER_SNIPPET
from lofi_fast.precision import choose_device

USAGE = "python -m bench launches [options]"
CALLS, REPEATS = 100, 9
STEPS = ((1, 100, 224), (16, 50, 158))  # videos, snippets, side: full fidelity, and the paper's batch at a cut of 4
SMALL = 32  # pixels
FEW = 800  # frames, up to which plain PyTorch is counted too
KEY = ("measured", "what", "dtype", "form")


def main(argv: Sequence[str]) -> int:
    """Measure, append rows, print a table; 1 when a form did not pass the gate."""
    args = _parser().parse_args(argv)
    if args.threads < 1:
        raise InputError("--threads must be at least 1")
    device = choose_device(args.device)
    if device.type != "cuda" and not args.tiny:
        raise InputError("launches: there is no GPU here, whose host would wait for it")
    torch.set_num_threads(args.threads)
    old = read_against(args.against)
    start = environment() | software(device, args.threads) | {"quick": args.tiny}
    values = {"host us": ("us",), "operations": ("operations",)}
    return record("launches", measure(device, args.tiny), start, args, old, table, KEY, values, line)


def measure(device: torch.device, tiny: bool) -> Iterator[Row]:
    """Steps first: they are few rows, and the calls' Triton kernels have to be compiled for such small tensors."""
    dtype, width = half_of(device), TINY_WIDTH if tiny else WIDTH
    chunk = 1 if tiny else default_chunk(FRAMES_PER_SNIPPET, STEPS[0][2])
    side = 32 if tiny else STEPS[0][2]
    encoded = Encoded.of("tsm_r18", chunk * FRAMES_PER_SNIPPET, side, dtype, device, width)
    steps: list[tuple[str, Encoded | WholeStep, str, str]] = [
        (f"encoder, one chunk: {chunk} snippets of {side} px", encoded, "plain PyTorch", "lean")
    ]
    for videos, snippets, side in ((1, 2, 32),) if tiny else STEPS:
        whole = WholeStep.of("tsm_r18", snippets, side, dtype, device, videos, width)
        steps.append((named(videos, snippets, side), whole, whole.FORMS[0], next(iter(PLANNED))))
        yield from host_of_step(videos, snippets, side, device, width, tiny)
    for what, case, plain, lean in steps:
        for form in (plain, lean) if case.frames.shape[0] <= FEW else (lean,):
            case.step(form)
            yield {
                "measured": "operations", "what": what, "dtype": dtype, "form": form,
                "operations": operations(partial(case.step, form), device),
            }  # fmt: skip
    del steps, encoded, whole
    for tested in (case for case in cases(device, tiny=True) if case.dtype == DTYPES[dtype]):
        problem = tested.problem(device)
        gate(problem)
        for form, run in {form_of(tested.op, device): problem.ours, **problem.peers}.items():
            yield {
                "measured": "call", "what": f"{tested.op} {tested.shape}", "dtype": dtype, "form": form,
                "us": host_microseconds(partial(forward, run), device, tiny),
            }  # fmt: skip


def named(videos: int, snippets: int, side: int) -> str:
    """As `bench step` names it where there is one video."""
    return f"whole step, {f'{videos} x ' if videos > 1 else ''}{snippets} snippets of {side} px"


def host_of_step(videos: int, snippets: int, side: int, device: torch.device, width: int, tiny: bool) -> Iterator[Row]:
    """What a step costs the host: the same graphs over frames so small that the device is done before the host is."""
    form, chunk = next(iter(PLANNED)), planned_chunk(videos * snippets, side)
    small = WholeStep.of("tsm_r18", snippets, SMALL, half_of(device), device, videos, width)
    small.step(form, chunk)  # loads code
    yield {
        "measured": "host", "what": named(videos, snippets, side), "dtype": half_of(device), "form": form,
        "us": host_microseconds(partial(small.step, form, chunk), device, tiny, calls=1),
    }  # fmt: skip


def operations(call: Callable[[], object], device: torch.device) -> int | None:
    """Kernels, copies and fills that a call makes on the device; None on a CPU, which has none."""
    if device.type != "cuda":
        return None
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA], acc_events=True) as found:
        call()
        torch.cuda.synchronize()
    return sum(event.device_type == DeviceType.CUDA for event in found.events())


def host_microseconds(call: Callable[[], object], device: torch.device, tiny: bool, calls: int = CALLS) -> list[float]:
    """Of one call: the median, and what a fifth of the repeats are below and above."""
    calls, repeats = (1, 1) if tiny else (calls, REPEATS)
    call()
    times = []
    for _ in range(repeats):
        if device.type == "cuda":
            torch.cuda.synchronize()
        began = time.perf_counter()
        for _ in range(calls):
            call()
        times.append(1e6 * (time.perf_counter() - began) / calls)
    found = spread(times)
    return [round(value, 2) for value in (found.median, found.p20, found.p80)]


def line(row: Row) -> str:
    if row["measured"] in ("call", "host"):
        return f"{row['what']}, {row['form']}: {row['us'][0]:.1f} us of the host"
    return f"{row['what']}, {row['form']}: {row['operations']} device operations"


def table(rows: Sequence[Row]) -> list[Section]:
    """Device operations of steps, then the host's time of calls."""
    rows = newest(rows, KEY)
    parts: list[Section] = []
    for where, here in by_place(rows):
        steps = [
            (row["what"], row["form"], "unknown" if row["operations"] is None else f"{row['operations']:,}")
            for row in here
            if row["measured"] == "operations"
        ]
        parts.append(Table(f"{where}; {when(here)}:", ("step", "form", "device operations"), steps))
        calls = []
        for row in (row for row in here if "us" in row):
            median, low, high = row["us"]
            calls.append((row["what"], row["form"], f"{median:.1f} ({low:.1f} to {high:.1f})"))
        header = ("operator or step", "form", "host's microseconds a call (p20 to p80)")
        parts.append(Table("Calls of small tensors, and steps of as many graphs over small frames:", header, calls))
    return parts


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench launches", usage=USAGE, description=__doc__)
    parser.add_argument(
        "--device", choices=("auto", "cpu", "cuda"), default="auto", help="default: a GPU if there is one"
    )
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default: 1)")
    parser.add_argument("--tiny", action="store_true", help="on a CPU, small: does everything run?")
    parser.add_argument("--results", type=Path, default=RESULTS / "launches.jsonl", help="file of rows to append to")
    add_against(parser)
    return parser

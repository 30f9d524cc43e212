"""How a step grows: time and peak of encoder, head and loss over snippets, pixels, videos at once and the encoder; and
how it shrinks when several processes share its videos.

One of them is changed at a time. Exponents are slopes of least squares through the logarithms: 1 is in proportion.
Peaks are above the start of a process of its own; beside those of the lean form stands what the ledger of bytes says.
Processes that share a step take gradients of their own videos and sum them as training does, by gloo on CPUs and NCCL
on GPUs; their times are taken under the settings of glibc that peaks need, also that of one process.
"""

from __future__ import annotations

import json
import math
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from pathlib import Path
from statistics import linear_regression
from typing import Any

import torch
from torch import Tensor, distributed, multiprocessing

from bench.tools.against import read_against
from bench.tools.dtypes import half_of
from bench.tools.gate import GateError
from bench.tools.measure import Stopwatch, in_child, interleaved, peak_above_start, spread
from bench.tools.networks import CLASSES, HEAD, LARGEST, LEAN, WIDTH, WholeStep
from bench.tools.record import options, record
from bench.tools.rows import Row, environment, software
from bench.tools.table import Section, Table, by_place, newest, when
from lofi_fast.config import EncoderName
from lofi_fast.encoder.resnet_ledger import ResNetLedger
from lofi_fast.errors import InputError
from lofi_fast.fidelity import Fidelity
from lofi_fast.head.gtad_ledger import GTADLedger
from lofi_fast.memory.ranks import gather
from lofi_fast.memory.settle import settle_glibc
from lofi_fast.memory.step_bytes import Setting, step_bytes
from lofi_fast.precision import choose_device
from lofi_fast.run.processes import Processes

ACTIVITYNET = 10_024  # its training videos
SECONDS = 20.0  # that one form may take, at least three rounds


@dataclass(frozen=True)
class Size:
    """Of a step."""

    snippets: int
    side: int
    videos: int = 1
    encoder: EncoderName = "tsm_r18"


Curves = dict[str, tuple[Size, tuple[object, ...]]]  # what is changed -> (all else, its values)
ON_CPU: Curves = {
    "snippets": (Size(16, 64), (8, 16, 32, 64)),
    "side": (Size(8, 64), (64, 96, 128, 192)),
    "videos": (Size(8, 64), (1, 2, 4)),
    "encoder": (Size(8, 64), ("tsm_r18", "tsm_r34", "tsm_r50")),
}
ON_GPU: Curves = {
    "snippets": (Size(100, 112), (25, 50, 100, 200, 400)),
    "side": (Size(50, 112), (64, 112, 158, 224, 320)),
    "videos": (Size(50, 112), (1, 2, 4, 8, 16)),
    "encoder": (Size(50, 158), ("tsm_r18", "tsm_r34", "tsm_r50")),
}
QUICK: Curves = {"snippets": (Size(4, 32), (2,))}
SHARED_ON_CPU, SHARED_ON_GPU, SHARED_QUICK = Size(8, 64, 4), Size(50, 112, 16), Size(2, 32, 2)  # steps to be shared
PROCESSES = (1, 2, 4, 8)  # that share a step, as far as there are cores or GPUs for them
FORM = "lean"  # of the step that they share


def main(argv: Sequence[str]) -> int:
    """Measure, append rows, print a table and exponents; 1 when a form did not pass the gate."""
    args = options("scaling", __doc__, "one small size: does everything run?", 3).parse_args(argv)
    if args.threads < 1 or args.rounds < 1:
        raise InputError("--threads and --rounds must be at least 1")
    device = choose_device(args.device)
    torch.set_num_threads(args.threads)
    old = read_against(args.against)
    start = environment() | software(device, args.threads) | {"quick": args.quick}
    curves = QUICK if args.quick else ON_GPU if device.type == "cuda" else ON_CPU
    shared = SHARED_QUICK if args.quick else SHARED_ON_GPU if device.type == "cuda" else SHARED_ON_CPU
    most = torch.cuda.device_count() if device.type == "cuda" else (os.cpu_count() or 1) // args.threads
    counts = [count for count in PROCESSES if count <= min(max(most, 1), shared.videos)]
    key = ("along", "snippets", "side", "videos", "encoder", "form", "processes")
    values = {"ms": ("ms",), "peak": ("peak",)}
    measured = chain(measure(curves, device, args.rounds), measure_shared(shared, counts, device, args.rounds))
    return record("scaling", measured, start, args, old, table, key, values)


def measure(curves: Curves, device: torch.device, rounds: int) -> Iterator[Row]:
    """A row for each size and form; a size that is on several curves is on each of them."""
    stopwatch = Stopwatch(device)
    dtype = half_of(device) if device.type == "cuda" else "float32"
    for along, (rest, values) in curves.items():
        for value in values:
            size = replace(rest, **{along: value})  # type: ignore[arg-type]
            yield from _rows(along, size, dtype, device, stopwatch, rounds)


def _rows(along: str, size: Size, dtype: str, device: torch.device, stopwatch: Stopwatch, rounds: int) -> Iterator[Row]:
    case = WholeStep.of(size.encoder, size.snippets, size.side, dtype, device, size.videos)
    if dtype == "float32":  # in half precision neighbours differ, see `WholeStep.gate`
        case.gate()
    samples = interleaved({form: partial(case.step, form) for form in case.FORMS}, stopwatch, rounds, SECONDS)
    del case
    for form, seconds in samples.items():
        arguments = (size, dtype, form, str(device), torch.get_num_threads())
        peak = in_child(_peak, *arguments, cuda=device.type == "cuda")
        timed = spread(seconds)
        yield {
            "along": along, "snippets": size.snippets, "side": size.side, "videos": size.videos,
            "encoder": size.encoder, "dtype": dtype, "form": form, "rounds": len(seconds),
            "ms": [round(1e3 * value, 2) for value in (timed.median, timed.p20, timed.p80)], "peak": peak,
            "predicted": None if form == WholeStep.FORMS[0] else predicted(size, dtype, **LEAN[form]),
        }  # fmt: skip
        said = "more than there is" if peak is None else f"{peak / 2**20:.0f} MiB"
        print(f"{along}: {size}, {form}: {1e3 * timed.median:.0f} ms, {said}", flush=True)


def _peak(size: Size, dtype: str, form: str, device: str, threads: int) -> int:
    torch.set_num_threads(threads)
    case = WholeStep.of(size.encoder, size.snippets, size.side, dtype, torch.device(device), size.videos)
    case.step(form)  # loads code; its gradients are then given back, for the step makes its own
    case.encoder.zero_grad(set_to_none=True)
    case.head.zero_grad(set_to_none=True)
    return peak_above_start(partial(case.step, form), case.frames.device, warm=False)


def measure_shared(size: Size, counts: Sequence[int], device: torch.device, rounds: int) -> Iterator[Row]:
    """A row for each number of processes that share one step. Raises GateError where the sum of their gradients is not
    the gradient of one process that has all the videos.
    """
    dtype = half_of(device) if device.type == "cuda" else "float32"
    for count in counts:
        with tempfile.TemporaryDirectory(prefix="scaling-") as folder:
            arguments = (count, size, dtype, device.type, torch.get_num_threads(), rounds, folder)
            multiprocessing.spawn(_one_process, arguments, nprocs=count)
            told = [json.loads(_told(folder, rank).read_text()) for rank in range(count)]
        if not told[0]["error"] <= LARGEST[torch.float32]:
            raise GateError(f"{count} processes: their gradients differ by {told[0]['error']:.1e} of their norm")
        milliseconds = {}  # of the process that takes longest, in each round
        for name in ("step", "sum"):
            timed = spread([1e3 * max(of_all) for of_all in zip(*(one[name] for one in told), strict=True)])
            milliseconds[name] = [round(value, 2) for value in (timed.median, timed.p20, timed.p80)]
        peak = max(one["peak"] for one in told)
        share = replace(size, videos=Processes(0, count).largest_share(size.videos))
        yield {
            "along": "processes", "processes": count, "snippets": size.snippets, "side": size.side,
            "videos": size.videos, "encoder": size.encoder, "dtype": dtype, "form": FORM, "rounds": rounds,
            "ms": milliseconds["step"], "sum_ms": milliseconds["sum"], "peak": peak,
            "predicted": predicted(share, dtype, **LEAN[FORM]),
        }  # fmt: skip
        said = f"{milliseconds['step'][0]:.0f} ms, of which {milliseconds['sum'][0]:.1f} for the sum of gradients"
        print(f"processes: {count}, {size}: {said}, {peak / 2**20:.0f} MiB each", flush=True)


def _one_process(
    rank: int, count: int, size: Size, dtype: str, device: str, threads: int, rounds: int, folder: str
) -> None:
    """One of those that share a step. Leaves its times in seconds, its peak in bytes, and the error of the sum."""
    settle_glibc()
    torch.set_num_threads(threads)
    own = torch.device("cuda", rank) if device == "cuda" else torch.device("cpu")
    if own.type == "cuda":
        torch.cuda.set_device(own)
    distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=count)
    try:
        told = _shared(Processes(rank, count, rank, count), size, dtype, own, rounds)
    finally:
        distributed.destroy_process_group()
    _told(folder, rank).write_text(json.dumps(told))


def _told(folder: str, rank: int) -> Path:
    return Path(folder, f"{rank}.json")


def _shared(processes: Processes, size: Size, dtype: str, device: torch.device, rounds: int) -> dict[str, Any]:
    whole = WholeStep.of(size.encoder, size.snippets, size.side, dtype, device, size.videos)
    case = whole.share(processes.share(range(size.videos)))
    parameters = [*whole.encoder.parameters(), *whole.head.parameters()]
    bucket = processes.new_bucket(parameters, device)

    def add() -> None:
        if processes.several:
            processes.add_gradients(parameters, bucket)

    def step() -> None:
        case.step(FORM)
        add()

    def seconds(call: Callable[[], None]) -> float:
        """Of a call that all processes begin together."""
        _finish(device)
        gather("round", None)
        began = time.perf_counter()
        call()
        _finish(device)
        return time.perf_counter() - began

    def gradients() -> list[Tensor]:
        return [parameter.grad.clone() for parameter in parameters if parameter.grad is not None]

    step()  # loads code
    case.drop_gradients()
    peak = peak_above_start(step, device, warm=False)
    told: dict[str, Any] = {"peak": peak, "step": [seconds(step) for _ in range(rounds)]}
    told["sum"] = [seconds(add) for _ in range(rounds)]
    step()
    found = gradients()
    told["error"] = 0.0
    if processes.first and dtype == "float32":  # in half precision neighbours differ, see `WholeStep.gate`
        whole.step(FORM)
        errors = [(a - b).norm() / b.norm().clamp(min=1e-20) for a, b in zip(found, gradients(), strict=True)]
        told["error"] = float(torch.stack(errors).mean())
    gather("end", None)
    return told


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def predicted(size: Size, dtype: str, recompute: bool = False, eight_bit: bool = False) -> int:
    """What the step adds by the ledger; its frames are there before."""
    encoder = ResNetLedger(size.encoder, WIDTH)
    head = GTADLedger(HEAD, encoder.num_features, CLASSES, size.snippets, class_loss=True)
    setting = Setting(encoder, head, 4 if dtype == "float32" else 2, "sgd", eight_bit)
    bytes_ = step_bytes(setting, Fidelity(size.snippets, size.side), size.videos, recompute=recompute)
    return bytes_.added - bytes_.frames


def table(rows: Sequence[Row]) -> list[Section]:
    """Times and peaks along each curve, then the exponents; then those of processes that share a step."""
    shared = [row for row in rows if row["along"] == "processes"]
    return [*_curves([row for row in rows if row["along"] != "processes"]), *_of_processes(shared)]


def _curves(rows: Sequence[Row]) -> list[Section]:
    sizes = ("snippets", "side", "videos", "encoder")
    rows = newest(rows, ("along", *sizes, "dtype", "form"))
    header = (
        "along", *sizes, "form", "ms", "videos an hour", "ActivityNet's epoch, hours, extrapolated", "peak, MiB",
        "ledger, MiB",
    )  # fmt: skip
    parts: list[Section] = []
    for where, here in by_place(rows):
        lines = []
        for row in here:
            cells = [str(row[name]) for name in ("along", *sizes, "form")]
            rate = 3.6e6 * row["videos"] / row["ms"][0]
            bytes_ = ["" if row[name] is None else f"{row[name] / 2**20:,.0f}" for name in ("peak", "predicted")]
            lines.append((*cells, f"{row['ms'][0]:,.0f}", f"{rate:,.0f}", f"{ACTIVITYNET / rate:,.1f}", *bytes_))
        parts.append(Table(f"{where}; {when(here)}:", header, lines))
        slopes = [
            (along, form, *("" if math.isnan(slope) else f"{slope:.2f}" for slope in found))
            for (along, form), found in exponents(here).items()
        ]
        parts.append(Table("Exponents:", ("of", "form", "time", "peak"), slopes))
    return parts


def _of_processes(rows: Sequence[Row]) -> list[Section]:
    sizes = ("snippets", "side", "videos", "encoder", "form")
    header = (
        "processes", *sizes, "ms", "of which sum of gradients", "against one process", "peak of a process, MiB",
        "ledger, MiB",
    )  # fmt: skip
    parts: list[Section] = []
    for where, here in by_place(newest(rows, ("processes", *sizes, "dtype"))):
        alone = {tuple(row[name] for name in sizes): row["ms"][0] for row in here if row["processes"] == 1}
        lines = []
        for row in here:
            size = tuple(row[name] for name in sizes)
            gained = f"{alone[size] / row['ms'][0]:.2f}x" if size in alone else ""
            summed = "" if row["processes"] == 1 else f"{row['sum_ms'][0]:,.1f}"
            bytes_ = [f"{row[name] / 2**20:,.0f}" for name in ("peak", "predicted")]
            lines.append((str(row["processes"]), *map(str, size), f"{row['ms'][0]:,.0f}", summed, gained, *bytes_))
        parts.append(Table(f"Processes that share a step, each on {where}; {when(here)}:", header, lines))
    return parts


def exponents(rows: Sequence[Row]) -> dict[tuple[str, str], tuple[float, float]]:
    """(along, form) -> slopes of log time and log peak over the log of what is changed; NaN with fewer than two."""
    found = {}
    for along, form in dict.fromkeys((row["along"], row["form"]) for row in rows if row["along"] != "encoder"):
        curve = [row for row in rows if (row["along"], row["form"]) == (along, form)]
        times = [(math.log(row[along]), math.log(row["ms"][0])) for row in curve]
        peaks = [(math.log(row[along]), math.log(row["peak"])) for row in curve if row["peak"]]
        found[along, form] = (_slope(times), _slope(peaks))
    return found


def _slope(points: Sequence[tuple[float, float]]) -> float:
    if len({x for x, _ in points}) < 2:
        return math.nan
    x, y = zip(*points, strict=True)
    return linear_regression(x, y).slope

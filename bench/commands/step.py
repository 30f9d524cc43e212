"""Time of a training step, ours beside plain PyTorch: the encoder alone, the head alone, and all of it with the loss.

Every form passes the gate first: its gradients are those of plain PyTorch. Forms alternate within one process, and with
them what tells the floor of the step (`bench.tools.roofs`). On a GPU the case is one video at full fidelity in mixed
precision, with the planner's chunks of the lean encoder; with --compiled it is torch.compile of plain PyTorch, at
several budgets of activations too.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch

from bench.tools.against import read_against
from bench.tools.dtypes import DTYPES, half_of
from bench.tools.measure import ROOF, Stopwatch, in_child, interleaved, peak_above_start, roof, spread
from bench.tools.networks import (
    BUDGETS,
    CHECKPOINTED,
    COMPILED,
    EACH_SNIPPET,
    LEAN_EACH_SNIPPET,
    PLANNED,
    SAMPLED,
    TINY_WIDTH,
    WIDTH,
    Encoded,
    WholeStep,
)
from bench.tools.record import options, record
from bench.tools.roofs import Work, encoder_work, rates
from bench.tools.rows import Row, environment, software
from bench.tools.table import Section, Table, by_place, newest, when
from lofi_fast.errors import InputError
from lofi_fast.fidelity import FRAMES_PER_SNIPPET
from lofi_fast.precision import choose_device

ENCODER = ((64, 112), (64, 224), (256, 112))  # frames, side
SNIPPETS, SIDE = 100, 112  # of the whole step
GPU_SIDE = 224  # full fidelity
GATED = (12, 112)  # snippets and side of the gate in float32 on a GPU; several chunks
UNRELATED = 0.7  # gradients of a wrong formula differ by more
COMPARED = ("lean, one graph", "lean", "lean, recompute", LEAN_EACH_SNIPPET)  # ours, beside what is compiled
SECONDS, GPU_SECONDS = 60.0, 3.0  # that one form may take, at least three rounds


def main(argv: Sequence[str]) -> int:
    """Measure, append rows, print a table; 0, or 1 when a form did not pass the gate."""
    args = _parser().parse_args(argv)
    if args.threads < 1 or args.rounds < 1:
        raise InputError("--threads and --rounds must be at least 1")
    device = choose_device(args.device)
    torch.set_num_threads(args.threads)
    torch.backends.cudnn.allow_tf32 = False
    old = read_against(args.against)
    start = environment() | software(device, args.threads) | {"quick": args.quick or args.tiny}
    print(f"{start['device']}; {args.threads} thread(s); commit {start['commit'][:7]}")
    stopwatch = Stopwatch(device)
    sizes = ENCODER[:1] if args.short else ENCODER
    if args.tiny or device.type == "cuda":
        parts = (gpu_compiled,) if args.compiled else (gpu_steps,)
    elif args.compiled:
        parts = (compiled_steps,)
    else:
        parts = (partial(encoder_steps, sizes=sizes), whole_step)
    measured = (row for part in parts for row in part(device, stopwatch, args.rounds, args.quick or args.tiny))
    values = {"ms": ("ms",), "peak": ("peak",)}
    return record("step", measured, start, args, old, table, ("step", "dtype", "form"), values)


def encoder_steps(
    device: torch.device, stopwatch: Stopwatch, rounds: int, quick: bool, sizes: Sequence[tuple[int, int]] = ENCODER
) -> Iterator[Row]:
    """Forward and backward of TSM-R18; in bf16 the float32 lean form runs beside the others."""
    for frames, side in ((16, 64),) if quick else sizes:
        single = Encoded.of("tsm_r18", frames, side, "float32", device)
        for dtype in ("float32", "bfloat16"):
            case = single if dtype == "float32" else Encoded.of("tsm_r18", frames, side, dtype, device)
            case.gate(case.forms())
            calls: dict[str, Callable[[], object]] = {name: partial(case.step, name) for name in case.forms()}
            if dtype != "float32":
                calls["lean, float32"] = partial(single.step, "lean")
            what = f"encoder, {frames} frames of {side} px"
            work = encoder_work("tsm_r18", WIDTH, frames, side, DTYPES[dtype].itemsize)
            yield from _rows(what, dtype, calls, stopwatch, rounds, work, device)


def compiled_steps(device: torch.device, stopwatch: Stopwatch, rounds: int, quick: bool) -> Iterator[Row]:
    """The encoder's step on a CPU, time and peak: torch.compile of plain PyTorch, by itself and with budgets of
    activations, beside checkpointing and ours. Inductor needs a C++ compiler; `quick` runs its graph as it is.
    """
    frames, side = (16, 64) if quick else ENCODER[0]
    arguments = ("tsm_r18", frames, side, "float32", device, WIDTH, "aot_eager" if quick else "inductor")
    case = Encoded.of(*arguments)  # type: ignore[arg-type]
    names = ["plain PyTorch", COMPILED, *BUDGETS, CHECKPOINTED, EACH_SNIPPET, *COMPARED]
    names = [name for name in names if name not in (COMPILED, *BUDGETS) or _compiles(name, case)]
    case.gate(names[1:])
    work = encoder_work("tsm_r18", WIDTH, frames, side, 4)
    calls = {name: partial(case.step, name) for name in names}
    what = f"encoder, {frames} frames of {side} px, compiled"
    threads = torch.get_num_threads()
    for row in list(_rows(what, "float32", calls, stopwatch, rounds, work, device)):
        # Inductor does not work in copies of a process: each of these is one from the start.
        row["peak"] = in_child(_encoder_peak, threads, row["form"], *arguments, cuda=True)
        print(f"{row['form']}: {(row['peak'] or 0) / 2**20:.0f} MiB", flush=True)
        yield row


def _encoder_peak(threads: int, form: str, *case: Any) -> int:
    torch.set_num_threads(threads)
    encoded = Encoded.of(*case)
    encoded.step(form)  # compiles
    encoded.drop_gradients()
    return peak_above_start(partial(encoded.step, form), encoded.frames.device, warm=False)


def whole_step(device: torch.device, stopwatch: Stopwatch, rounds: int, quick: bool) -> Iterator[Row]:
    """TSM-R18, G-TAD and the loss of one video."""
    snippets, side = (12, 32) if quick else (SNIPPETS, SIDE)
    case = WholeStep.of("tsm_r18", snippets, side, "float32", device)
    case.gate()
    features = torch.randn(1, case.encoder.num_features, snippets, device=device, requires_grad=True)
    heads = {name: partial(case.head_step, name, features) for name in case.FORMS[:2]}
    yield from _rows(f"head and loss, L={snippets}", "float32", heads, stopwatch, rounds)
    steps = {name: partial(case.step, name) for name in case.FORMS}
    work = encoder_work("tsm_r18", WIDTH, FRAMES_PER_SNIPPET * snippets, side, 4)
    what = f"whole step, {snippets} snippets of {side} px"
    rows = list(_rows(what, "float32", steps, stopwatch, rounds, work, device))
    del case, features, heads, steps
    for row in rows:
        row["peak"] = in_child(_peak, snippets, side, row["form"], str(device), torch.get_num_threads())
        yield row


def gpu_steps(device: torch.device, stopwatch: Stopwatch, rounds: int, quick: bool) -> Iterator[Row]:
    """TSM-R18 with head and loss, then alone, at full fidelity in mixed precision.

    Forms are taken a few at a time, each time beside plain PyTorch, so that there are rows after seconds: ours first,
    with the chunk that the planner takes.
    """
    whole, encoded = _full(device, quick)
    plain, width = whole.FORMS[0], whole.encoder.width
    exactly = WholeStep.of("tsm_r18", *((2, 32) if quick else GATED), "float32", device, width=width)
    planned = list(PLANNED)
    groups = [planned[:1]] if quick else [planned[:2], ["lean, one graph", "lean, recompute, chunk x8"], planned[2:]]
    for number, forms in enumerate(groups):
        exactly.gate(forms)
        yield from _whole(whole, (plain, *forms), stopwatch, rounds, without=(plain,) if number else ())
    snippets = len(whole.frames) // FRAMES_PER_SNIPPET
    features = torch.randn(1, encoded.encoder.num_features, snippets, device=device, requires_grad=True)
    heads = {name: partial(whole.head_step, name, features) for name in whole.FORMS[:2]}
    yield from _rows(f"head and loss, L={snippets}", half_of(device), heads, stopwatch, rounds, seconds=GPU_SECONDS)
    first = ["plain PyTorch", *(["lean"] if quick else [*planned[:2], "lean, one graph"])]
    yield from _encoder(encoded, first, stopwatch, rounds)
    if not quick:
        for forms in ([EACH_SNIPPET, LEAN_EACH_SNIPPET], [CHECKPOINTED, SAMPLED, planned[2], "lean"]):
            yield from _encoder(encoded, ["plain PyTorch", *forms], stopwatch, rounds, without=["plain PyTorch"])


def gpu_compiled(device: torch.device, stopwatch: Stopwatch, rounds: int, quick: bool) -> Iterator[Row]:
    """torch.compile of plain PyTorch, then with activation budgets, of the encoder alone and of the whole step, whose
    encoder is compiled by then. Compiling takes most of the time, so the most telling come first.
    """
    whole, encoded = _full(device, quick)
    cases = ((encoded, (COMPILED,)), (whole, (COMPILED,)), (encoded, BUDGETS), (whole, BUDGETS))
    for case, forms in cases[:1] if quick else cases:
        plain, rows = (whole.FORMS[0], _whole) if case is whole else ("plain PyTorch", _encoder)
        for form in forms:
            if _compiles(form, case):
                yield from rows(case, [plain, form], stopwatch, rounds, without=[plain])  # type: ignore[operator]


def _full(device: torch.device, quick: bool) -> tuple[WholeStep, Encoded]:
    """One video at full fidelity."""
    snippets, side = (2, 32) if quick else (SNIPPETS, GPU_SIDE)
    width = TINY_WIDTH if quick else WIDTH
    frames = FRAMES_PER_SNIPPET * (1 if quick else snippets)
    dtype = half_of(device)
    whole = WholeStep.of("tsm_r18", snippets, side, dtype, device, width=width)
    return whole, Encoded.of("tsm_r18", frames, side, dtype, device, width)


def _whole(
    case: WholeStep, forms: Sequence[str], stopwatch: Stopwatch, rounds: int, without: Collection[str]
) -> Iterator[Row]:
    """Rows of a whole step on a GPU, but for those forms that have one already (`without`)."""
    forms = _fitting(case, forms)
    if forms:
        case.gate(forms[1:], largest=UNRELATED)
        what = f"whole step, {len(case.frames) // FRAMES_PER_SNIPPET} snippets of {case.frames.shape[1]} px"
        yield from _on_gpu(what, case, forms, stopwatch, rounds, without)


def _encoder(
    case: Encoded, forms: Sequence[str], stopwatch: Stopwatch, rounds: int, without: Collection[str] = ()
) -> Iterator[Row]:
    """Rows of the encoder alone on a GPU, but for those forms that have one already (`without`)."""
    forms = _fitting(case, forms)
    if forms:
        case.gate(forms[1:])
        what = f"encoder, {len(case.frames)} frames of {case.frames.shape[1]} px"
        yield from _on_gpu(what, case, forms, stopwatch, rounds, without)


def _fitting(case: Encoded | WholeStep, forms: Sequence[str]) -> list[str]:
    """Those that the device has memory for; none where it has too little for plain PyTorch, the first."""
    fitting = []
    for form in forms:
        try:
            case.step(form)
        except torch.OutOfMemoryError:
            print(f"without {form}: it needs more memory than there is", flush=True)
            torch.cuda.empty_cache()
            if form == forms[0]:
                return []
        else:
            fitting.append(form)
    return fitting


def _on_gpu(
    what: str, case: Encoded | WholeStep, forms: Sequence[str], stopwatch: Stopwatch, rounds: int,
    without: Collection[str],
) -> Iterator[Row]:  # fmt: skip
    """With the peak of one more step of each form, by torch's allocator and with its gradients; on a CPU without."""
    frames, side = case.frames.shape[:2]
    device, dtype = case.frames.device, str(case.dtype).removeprefix("torch.")
    work = encoder_work("tsm_r18", case.encoder.conv1.out_channels, frames, side, case.dtype.itemsize)
    calls = {form: partial(case.step, form) for form in forms}
    for row in _rows(what, dtype, calls, stopwatch, rounds, work, device, GPU_SECONDS, without):
        if device.type == "cuda":
            case.drop_gradients()
            row["peak"] = peak_above_start(calls[row["form"]], device, warm=False)
            print(f"    peak {row['peak'] / 1e9:.3f} GB", flush=True)
        yield row


def _compiles(form: str, case: Encoded | WholeStep) -> bool:
    """Whether torch.compile can compile the network here; says what it said where not."""
    began = time.perf_counter()
    try:
        case.step(form)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # the compiler's own, of many types
        print(f"without {form}: {type(error).__name__}: {str(error).partition(chr(10))[0]}", flush=True)
        return False
    print(f"{form}: compiled in {time.perf_counter() - began:.0f} s", flush=True)
    return True


def _peak(snippets: int, side: int, form: str, device: str, threads: int) -> int:
    torch.set_num_threads(threads)
    case = WholeStep.of("tsm_r18", snippets, side, "float32", torch.device(device))
    return peak_above_start(partial(case.step, form), case.frames.device)


def _rows(
    what: str, dtype: str, calls: Mapping[str, Callable[[], object]], stopwatch: Stopwatch, rounds: int,
    work: Work | None = None, device: torch.device | None = None, seconds: float = SECONDS,
    without: Collection[str] = (),
) -> Iterator[Row]:  # fmt: skip
    """A row for each call but those `without`; the first is plain PyTorch. With the `work` of the encoder also the
    floor of the step, by rates measured among them. `seconds`: that one form may take, at least three rounds.
    """
    roofs: dict[str, Callable[[], object]] = {}
    if work is not None and device is not None:
        copy, copied = roof(device)
        fast = rates(device, DTYPES[dtype])
        roofs = {ROOF: copy} | {name: call for name, (call, _) in fast.items()}
    samples = interleaved({**calls, **roofs}, stopwatch, rounds, seconds)
    floor = None
    if work is not None and roofs:
        flops = max(operations / spread(samples[name]).median for name, (_, operations) in fast.items())
        bandwidth = copied / spread(samples[ROOF]).median
        floor = {
            "ms": round(1e3 * work.floor(flops, bandwidth), 4), "operations": work.operations, "bytes": work.bytes,
            "tflops": round(flops / 1e12, 4), "gbs": round(bandwidth / 1e9, 2),
        }  # fmt: skip
    plain = samples[next(iter(calls))]
    for name in (name for name in calls if name not in without):
        ratios = [theirs / mine for theirs, mine in zip(plain, samples[name], strict=False)]
        timed = spread(samples[name])
        ratio = spread(ratios)
        yield {
            "step": what, "dtype": dtype, "form": name, "rounds": len(samples[name]),
            "ms": [round(1e3 * value, 3) for value in (timed.median, timed.p20, timed.p80)],
            "faster_than_plain": [round(v, 3) for v in (spread(plain).median / timed.median, ratio.p20, ratio.p80)],
            "peak": None, "floor": floor,
            "times_floor": None if floor is None else round(1e3 * timed.median / max(floor["ms"], 1e-9), 2),
        }  # fmt: skip
        faster = spread(plain).median / timed.median
        print(f"{what}, {dtype}, {name}: {1e3 * timed.median:.1f} ms, {faster:.2f}x plain", flush=True)


def table(rows: Sequence[Row]) -> list[Section]:
    """Speeds relative to plain PyTorch, from the newest run of each step."""
    rows = newest(rows, ("step", "dtype", "form"))
    header = ("step", "dtype", "form", "speed of plain PyTorch, median (p20 to p80)", "peak, MiB")
    parts: list[Section] = []
    for where, here in by_place(rows):
        floors = any(row.get("times_floor") for row in here)  # rows of older versions have none
        plain: dict[tuple[Any, ...], int | None] = {}
        lines = []
        for row in here:
            median, low, high = row["faster_than_plain"]
            first = plain.setdefault((row["step"], row["dtype"]), row["peak"])
            peak = "" if not row["peak"] or not first else f"{row['peak'] / 2**20:.0f}, {first / row['peak']:.1f}x less"
            floor = [f"{row['times_floor']:.1f}x" if row.get("times_floor") else ""] * floors
            speed = f"{median:.2f}x ({low:.2f} to {high:.2f})"
            lines.append((row["step"], row["dtype"], row["form"], speed, *floor, peak))
        columns = (*header[:4], *["time of the floor"] * floors, header[4])
        parts.append(Table(f"{where}; {when(here)}:", columns, lines))
    return parts


def _parser() -> argparse.ArgumentParser:
    parser = options("step", __doc__, "small cases: does everything run? says nothing of speed", 7)
    parser.add_argument("--tiny", action="store_true", help="a GPU's cases, small enough for Triton's interpreter")
    parser.add_argument("--compiled", action="store_true", help="torch.compile of plain PyTorch, at several budgets")
    parser.add_argument("--short", action="store_true", help="one size of the encoder's step, and the whole step")
    return parser

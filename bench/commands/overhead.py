"""What planning costs: the governor's time in a step, and the allocators under it beside those PyTorch's users have.

The governor chooses, rechecks and learns over ActivityNet's ladder with the real meter. Allocators are compared in
processes of their own, in turn, one thread: forward and backward of a lean TSM-R18; and a whole step as it is trained
here beside plain PyTorch as it comes.
"""

from __future__ import annotations

import argparse
import resource
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median

import torch

from bench.tools.against import add_against, comparison, read_against
from bench.tools.measure import in_child
from bench.tools.networks import Encoded, WholeStep
from bench.tools.rows import RESULTS, Row, append_row, environment, software
from bench.tools.table import Section, Table, by_place, newest, screen, when
from lofi_fast.errors import InputError
from lofi_fast.fidelity import CYCLE, ladder
from lofi_fast.memory import allocator
from lofi_fast.memory.cpu import CpuMeter
from lofi_fast.memory.governor import Governor
from lofi_fast.memory.plans import Plan, candidates
from lofi_fast.memory.step_bytes import Setting, step_bytes
from lofi_fast.presets import activitynet

USAGE = "python -m bench overhead [options]"
PLAIN, SETTLED, OURS = "glibc as it comes", "glibc settled", "glibc settled, ours under torch"
# What is run -> the form and allocator of each row; the first is what the others are compared with.
CASES = {
    "encoder": [("lean", PLAIN), ("lean", SETTLED), ("lean", OURS)],
    "whole step": [
        ("plain PyTorch, dense SGAlign", PLAIN),
        ("plain PyTorch, dense SGAlign", OURS),
        ("lean", OURS),
        ("lean, recompute", OURS),
    ],
}
SNIPPETS = 100  # of the whole step, of 8 frames
FRAMES, SIDE, STEPS = 64, 112, 5
GOVERNED = 500
VALUES = {"ms a step": ("ms",), "peak": ("peak",)}


def main(argv: Sequence[str]) -> int:
    """Measure, append rows, print a table."""
    args = _parser().parse_args(argv)
    if args.rounds < 1:
        raise InputError("--rounds must be at least 1")
    old = read_against(args.against)
    start = environment() | software(torch.device("cpu"), 1)
    rows: list[Row] = [in_child(_governor) | {"bench": "overhead", "of": "governor"} | start]
    for what in CASES if args.whole else ["encoder"]:
        found: list[list[Row]] = [[] for _ in CASES[what]]
        for _ in range(args.rounds):
            for (form, under), readings in zip(CASES[what], found, strict=True):
                readings.append(in_child(_steps, what, form, under, args.width, settled=under != PLAIN))
        theirs = median(seconds for reading in found[0] for seconds in reading["seconds"])
        for (form, under), readings in zip(CASES[what], found, strict=True):
            times = sorted(seconds for reading in readings for seconds in reading["seconds"])
            peaks = [peak for reading in readings for peak in reading["peaks"]]
            rows.append({
                "bench": "overhead", "of": f"{what}, {form}, {under}", "ms": round(1e3 * median(times), 2),
                "spread_ms": [round(1e3 * times[int(share * (len(times) - 1))], 2) for share in (0.2, 0.8)],
                "of_default": round(median(times) / theirs, 3), "peak": int(median(peaks)),
                "peak_varies": round((max(peaks) - min(peaks)) / median(peaks), 4),
                "faults": int(median(reading["faults"] for reading in readings)),
            } | start)  # fmt: skip
    for row in rows:
        append_row(args.results, row)
    print(f"{screen(table(rows))}\n{len(rows)} rows appended to {args.results}")
    if args.against:
        print(comparison(rows, old, ("of",), VALUES))
    return 0


def _steps(what: str, form: str, under: str, width: int) -> Row:
    """Seconds of CPU time and peaks of identical steps, and page faults of the last."""
    if under == OURS and (reason := allocator.install()):
        raise RuntimeError(reason)
    torch.set_num_threads(1)
    case: Encoded | WholeStep
    if what == "encoder":
        case, steps = Encoded.of("tsm_r18", FRAMES, SIDE, "float32", torch.device("cpu"), width), STEPS
    else:
        case, steps = WholeStep.of("tsm_r18", SNIPPETS, SIDE, "float32", torch.device("cpu"), width=width), 1
    case.step(form)
    meter = CpuMeter()
    seconds, peaks, faults = [], [], 0
    for _ in range(steps):
        meter.reset_peak()
        before, began = resource.getrusage(resource.RUSAGE_SELF).ru_minflt, time.process_time()
        case.step(form)
        seconds.append(time.process_time() - began)
        faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
        peaks.append(meter.peak())
    return {"seconds": seconds, "peaks": peaks, "faults": faults}


def _governor() -> Row:
    """Milliseconds of one step's planning: choose, recheck, the peak's two readings, learn."""
    config = activitynet()
    setting = Setting.of(config, 200, 2)
    assert setting is not None

    def ledger(plan: Plan) -> int:
        return step_bytes(setting, plan.fidelity, plan.micro_batch, recompute=plan.recompute).added

    plans = {p: candidates(ladder(p, config.full, 1.0, 16.0), config.joint.batch) for p in CYCLE}
    began = time.perf_counter()
    governor = Governor(CpuMeter(), 11 * 10**9, ledger, plans, print)
    made = time.perf_counter() - began
    meter = CpuMeter()
    times = []
    for step in range(GOVERNED):
        began = time.perf_counter()
        decision = governor.recheck(governor.choose(CYCLE[step % 3], 0, step))
        meter.reset_peak()
        meter.peak()
        # What a step would have taken: a little more or less than was thought, so that the fit moves.
        governor.learn(decision, int(decision.predicted * (1 + 0.01 * ((step * 7) % 5 - 3))), 1.0)
        times.append(time.perf_counter() - began)
    times.sort()
    return {
        "ms": round(1e3 * median(times), 3),
        "spread_ms": [round(1e3 * times[int(share * (len(times) - 1))], 3) for share in (0.2, 0.8)],
        "plans": sum(map(len, plans.values())),
        "made_seconds": round(made, 3),
    }


def table(rows: Sequence[Row]) -> list[Section]:
    """The governor, and the allocators."""
    rows = newest(rows, ("of",))
    header = ("what", "ms a step (p20 to p80)", "of the first", "peak, MiB", "varies by", "page faults a step")
    parts: list[Section] = []
    for where, here in by_place(rows):
        lines = []
        for row in here:
            cells = ("", "", "", "")
            if "peak" in row:
                varies = f"{100 * row['peak_varies']:.1f}%"
                cells = (f"{row['of_default']:.2f}x", f"{row['peak'] / 2**20:.0f}", varies, f"{row['faults']:,}")
            ms, low, high = (f"{v:,.0f}" if v >= 100 else f"{v:.3g}" for v in (row["ms"], *row["spread_ms"]))
            lines.append((row["of"], f"{ms} ({low} to {high})", *cells))
        parts.append(Table(f"{where}; {when(here)}:", header, lines))
    return parts


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench overhead", usage=USAGE, description=__doc__)
    parser.add_argument("--rounds", type=int, default=3, help="processes of each allocator (default: 3)")
    parser.add_argument("--width", type=int, default=64, help="channels of the encoder's first stage (default: 64)")
    parser.add_argument("--whole", action="store_true", help="the whole step too, for minutes")
    parser.add_argument("--results", type=Path, default=RESULTS / "overhead.jsonl", help="file of rows to append to")
    add_against(parser)
    return parser

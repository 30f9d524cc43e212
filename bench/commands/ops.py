"""Operators against what people would otherwise use: on a CPU the C++ forms, on a GPU the Triton forms.

Every case passes the gate first: all forms equal the definition, ours at most twice as far from it as plain PyTorch at
the same dtype (conv3x3, which trades roundings for speed, 32 times). Then come times, and the peak memory of forward
with backward above the start: of each form in a process of its own on a CPU, by torch's allocator on a GPU.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from bench.tools.against import add_against, comparison, read_against
from bench.tools.cases import Case, Form, Problem, cases, form_of, forward, forward_backward, gate
from bench.tools.gate import GateError
from bench.tools.measure import ROOF, Stopwatch, copy_of, in_child, interleaved, peak_above_start, roof, spread
from bench.tools.rows import RESULTS, Row, alike, append_row, environment, read_rows, software
from bench.tools.table import Section, Table, by_place, place, screen, when
from lofi_fast.errors import InputError
from lofi_fast.kernels import describe
from lofi_fast.memory.meter import is_out_of_memory
from lofi_fast.precision import choose_device

USAGE = "python -m bench ops [options]"
PASSES = ("forward", "forward_backward")
AS_MANY = "copy of as many bytes"
TIMES = {"forward ms": ("forward", "ms"), "forward + backward ms": ("forward_backward", "ms"), "peak": ("peak",)}
LEFT_OUT = ("28x28x128, 64", "14x14x256", "L=25", "L=50", "L=256", "batch 4")  # by --short
HEADER = (
    "operator", "shape", "dtype", "against", "forward", "forward + backward", "peak memory", "ours, of the copy roof",
)  # fmt: skip
SECONDS = 6.0  # that one form may take in one pass, at least three rounds: slow peers run fewer rounds


def main(argv: Sequence[str]) -> int:
    """Measure, append rows, print a table; 0, or 1 when a case did not pass the gate."""
    args = _parser().parse_args(argv)
    device = choose_device(args.device)
    old = read_against(args.against)
    quick = args.quick or args.tiny
    chosen = _chosen(cases(device, args.quick, args.tiny), args.only)
    if args.short:
        chosen = [case for case in chosen if not any(part in case.shape for part in LEFT_OUT)]
    if args.threads < 1 or (args.rounds is not None and args.rounds < 1):
        raise InputError("--threads and --rounds must be at least 1")
    torch.set_num_threads(args.threads)
    torch.backends.cudnn.allow_tf32 = False  # float32 means float32, in every form
    rounds = args.rounds or (3 if quick else 15)
    start = environment() | software(device, args.threads) | {"quick": quick}
    if args.skip_measured:
        known = {(row["op"], row["shape"], row["dtype"]) for row in alike(read_rows(args.results), start)}
        print(f"{sum(case.key in known for case in chosen)} of {len(chosen)} cases were measured before")
        chosen = [case for case in chosen if case.key not in known]
    changed = " with changes" if start["dirty"] else ""
    print(f"{start['device']}, {args.threads} thread(s), commit {start['commit'][:7]}{changed}")
    print(f"kernels: {describe(device.type)}")
    stopwatch = Stopwatch(device)
    rows: list[Row] = []
    failed = 0
    for number, case in enumerate(chosen, start=1):
        name = " ".join(case.key)
        print(f"[{number}/{len(chosen)}] {name}: ", end="", flush=True)
        try:
            new = measure(case, device, stopwatch, rounds, args.quick, args.tiny)
        except GateError as error:
            print(f"does not pass the gate, and is not measured: {error}", flush=True)
            failed += 1
            continue
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            print("not measured: it needs more memory than there is", flush=True)
            continue
        for row in new:
            append_row(args.results, {"bench": "ops"} | row | start)
            rows.append(row | start)
    print(f"\n{screen(table(rows))}\n{len(rows)} rows appended to {args.results}")
    if args.against:
        print(comparison(rows, old, ("op", "shape", "dtype", "form"), TIMES))
    if failed:
        print(f"error: {failed} of {len(chosen)} cases do not pass the gate", file=sys.stderr)
    return min(failed, 1)


def measure(
    case: Case, device: torch.device, stopwatch: Stopwatch, rounds: int, quick: bool = False, tiny: bool = False
) -> list[Row]:
    """A row for each form, ours first. Raises GateError."""
    problem = case.problem(device)
    gate(problem)
    forms = {form_of(case.op, device): problem.ours} | problem.peers
    ours = next(iter(forms))
    rows = {name: _row(case, name, name == ours) for name in forms}
    if case.timed:
        for step in PASSES:
            if step == "forward_backward" and not problem.ours.grads:
                continue
            for name, timed in _time(problem, forms, step, device, stopwatch, rounds).items():
                rows[name][step] = timed
    for name in forms:
        other = name if name != ours else None
        rows[name]["peak"] = None if tiny else peak(case, other, problem, device, quick)
    print(_line(rows, ours), flush=True)
    for name, reason in problem.left_out.items():
        print(f"    without {name}: {reason}", flush=True)
    return list(rows.values())


def peak(case: Case, name: str | None, problem: Problem, device: torch.device, quick: bool) -> int | None:
    """Bytes above the start of a form (None: ours) in forward with backward, or forward where there is no backward."""
    if device.type == "cuda":
        return _peak(problem, name, device)
    measured: int | None = in_child(_peak_in_child, case.key, name, quick, torch.get_num_threads())
    return measured


def _peak_in_child(key: tuple[str, str, str], name: str | None, quick: bool, threads: int) -> int:
    torch.set_num_threads(threads)
    device = torch.device("cpu")
    case = next(case for case in cases(device, quick) if case.key == key)
    return _peak(case.problem(device), name, device)


def _peak(problem: Problem, name: str | None, device: torch.device) -> int:
    form = problem.ours if name is None else problem.peers[name]
    return peak_above_start(partial(forward_backward, form), device)


def _time(
    problem: Problem, forms: dict[str, Form], step: str, device: torch.device, stopwatch: Stopwatch, rounds: int
) -> dict[str, Row]:
    """Of each form: milliseconds, rate and share of the roof, and how many times as long as ours it took."""
    copy, copied = roof(device)
    moved = problem.bytes_forward
    if step == "forward_backward" and moved is not None:
        moved = None if problem.bytes_backward is None else moved + problem.bytes_backward
    roofs: dict[str, Callable[[], object]] = {ROOF: copy}
    if device.type == "cuda" and moved is not None:  # whose caches and launches count where there are few bytes
        roofs[AS_MANY] = copy_of(moved, device)
    run: Callable[[Form], object] = forward if step == "forward" else forward_backward
    calls: dict[str, Callable[[], object]] = {name: partial(run, form) for name, form in forms.items()}
    samples = interleaved(calls | roofs, stopwatch, rounds, SECONDS)
    roof_rate = copied / spread(samples[ROOF]).median
    as_many = spread(samples[AS_MANY]).median if AS_MANY in samples else None
    ours = samples[next(iter(forms))]
    found = {}
    for name in forms:
        seconds = spread(samples[name])
        # Of the same round, so that a moment in which the machine was slow counts on both sides.
        ratios = spread([theirs / mine for theirs, mine in zip(samples[name], ours, strict=False)])
        found[name] = {
            "ms": [_digits(1e3 * value) for value in (seconds.median, seconds.p20, seconds.p80)],
            "rounds": len(samples[name]),
            "times_ours": [_digits(value) for value in (seconds.median / spread(ours).median, ratios.p20, ratios.p80)],
            "bytes": moved,
            "gbs": None if moved is None else _digits(moved / seconds.median / 1e9),
            "roof_gbs": _digits(roof_rate / 1e9),
            "of_roof": None if moved is None else _digits(moved / seconds.median / roof_rate),
            "of_copy": None if as_many is None else _digits(as_many / seconds.median),
        }
    return found


def _digits(value: float) -> float:
    """Four of them: a measurement has no more."""
    return float(f"{value:.4g}")


def _row(case: Case, form: str, ours: bool) -> Row:
    op, shape, dtype = case.key
    return {
        "op": op,
        "shape": shape,
        "dtype": dtype,
        "form": form,
        "ours": ours,
        "forward": None,
        "forward_backward": None,
    }


def _line(rows: dict[str, Row], ours: str) -> str:
    """Progress: ours in milliseconds, and how many times as long the others take."""
    parts = []
    for step in PASSES:
        if (mine := rows[ours][step]) is not None:
            others = (f"{name} {row[step]['times_ours'][0]:.1f}x" for name, row in rows.items() if name != ours)
            parts.append(f"{step.replace('_', ' + ')} {mine['ms'][0]:.2f} ms, {', '.join(others)}")
    return "; ".join(["gate passed", *parts])


def table(rows: Sequence[Row]) -> list[Section]:
    """For each device a table of what the other forms take as a multiple of ours, each case from its newest run."""
    dates: dict[tuple[Any, ...], str] = {}
    for row in rows:
        key = _case(row)
        dates[key] = max(str(row["date"]), dates.get(key, ""))
    rows = [row for row in rows if row["date"] == dates[_case(row)]]  # one run has one date
    parts: list[Section] = []
    for where, here in by_place(rows):
        ours = {_case(row): row for row in here if row["ours"]}
        forms = ", ".join(dict.fromkeys(row["form"] for row in ours.values()))
        lines = [_compared(row, ours[_case(row)]) for row in here if not row["ours"]]
        parts.append(Table(f"{where}; ours is {forms}; {when(here)}:", HEADER, lines))
    return parts


def _case(row: Row) -> tuple[Any, ...]:
    return *place(row), row["op"], row["shape"], row["dtype"]


def _times(ratio: float) -> str:
    """1.5x; of small ratios, where ours is the slower form, the first digits that are not 0."""
    return f"{ratio:.1f}x" if ratio >= 0.1 else f"{ratio:.1g}x"


def _share(timed: Row) -> str:
    """Of the copy roof; in brackets, of a copy of as many bytes."""
    of_copy = timed.get("of_copy")
    return f"{100 * timed['of_roof']:.0f}%" + ("" if of_copy is None else f" ({100 * of_copy:.0f}%)")


def _compared(row: Row, ours: Row) -> list[str]:
    """A line: another form against ours in the same run."""
    passes = ("forward", "forward_backward")
    times = [_times(row[step]["times_ours"][0]) if row[step] else "" for step in passes]
    roofs = [_share(ours[step]) for step in passes if ours[step] and ours[step]["of_roof"] is not None]
    peaks = ""
    if row["peak"] is not None and ours["peak"] is not None:
        ratio = f"{row['peak'] / ours['peak']:.1f}x, " if ours["peak"] >= 2**20 else ""  # less is noise
        peaks = f"{ratio}{row['peak'] / 2**20:.0f} : {ours['peak'] / 2**20:.0f} MiB"
    return [row["op"], row["shape"], row["dtype"], row["form"], *times, peaks, " / ".join(roofs)]


def _chosen(found: Sequence[Case], only: str | None) -> list[Case]:
    if only is None:
        return list(found)
    known = list(dict.fromkeys(case.op for case in found))
    names = [name.strip() for name in only.split(",")]
    for name in names:
        if name not in known:
            raise InputError(f'--only "{only}": no operator is called {name!r}; there are: {", ".join(known)}')
    return [case for case in found if case.op in names]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench ops", usage=USAGE, description=__doc__)
    parser.add_argument("--only", metavar="NAME,...", help="operators to measure (default: all)")
    parser.add_argument(
        "--device", choices=("auto", "cpu", "cuda"), default="auto", help="default: a GPU if there is one"
    )
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default: 1)")
    parser.add_argument("--rounds", type=int, help="rounds of each comparison (default: 15; with --quick 3)")
    parser.add_argument("--quick", action="store_true", help="small shapes: does everything run? says nothing of speed")
    parser.add_argument("--tiny", action="store_true", help="smaller still, and no peaks: for Triton's interpreter")
    parser.add_argument("--short", action="store_true", help="the first and last stage, one grid of proposals")
    parser.add_argument("--skip-measured", action="store_true", help="leave out what these results hold of this commit")
    parser.add_argument("--results", type=Path, default=RESULTS / "ops.jsonl", help="file of rows to append to")
    add_against(parser)
    return parser

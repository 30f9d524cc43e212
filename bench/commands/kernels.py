"""Every launch that the Triton kernels name as an example, compiled ahead of time for GPUs that need not be there.

Of each: registers, spilled bytes, shared memory, and the widest reads and writes of global memory in the machine code.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import multiprocessing
import os
import pkgutil
import sys
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

import lofi_fast.kernels
from bench.tools.rows import RESULTS, Row, append_row, environment
from bench.tools.table import Section, Table, screen, when
from lofi_fast.errors import InputError

if TYPE_CHECKING:
    from lofi_fast.kernels.launch import Launch

USAGE = "python -m bench kernels [options]"
HEADER = (
    "operator", "kernel", "layout", "launches", "registers", "spilled bytes", "shared bytes",
    "widest load / store (bits)",
)  # fmt: skip
LEGEND = (
    "target, registers and spilled bytes a thread, shared bytes a block, widest load/store of global memory in bits"
)


@dataclass(frozen=True)
class Code:
    """What one compilation makes: launches that differ only in sizes the compiler does not see share it."""

    op: str
    kernel: str
    launches: tuple[str, ...]
    streams: bool  # whether it must read and write 16 bytes at a time
    targets: tuple[int, ...]  # compute capabilities, times 10, that it is for


def main(argv: Sequence[str]) -> int:
    """Compile everything, print the table, append rows where asked; 0, or 1 when something does not compile."""
    args = _parser().parse_args(argv)
    ops = _operators()
    if args.only is not None:
        ops = [name.strip() for name in args.only.split(",")]
        if unknown := set(ops) - set(_operators()):
            raise InputError(
                f"--only: no kernel.py in {', '.join(sorted(unknown))}; there is: {', '.join(_operators())}"
            )
    start = environment()
    codes = [code for op in ops for code in codes_of(op)]
    measured: dict[Code, dict[int, Row]] = {code: {} for code in codes}
    failed: list[str] = []
    wanted = thinned(codes) if args.thin else [(code, target) for code in codes for target in code.targets]
    with ProcessPoolExecutor(min(2, os.cpu_count() or 1), mp_context=multiprocessing.get_context("spawn")) as pool:
        jobs = {pool.submit(_compile, code.op, code.launches[0], target): (code, target) for code, target in wanted}
        for done, job in enumerate(as_completed(jobs), start=1):
            code, target = jobs[job]
            try:
                measured[code][target] = job.result()
            except Exception as error:  # Triton's and ptxas's own, of many types
                failed.append(f"{code.op}, {code.launches[0]}, sm_{target}: {error}")
            if done % 20 == 0 or done == len(jobs):
                print(f"{done} of {len(jobs)} compiled", file=sys.stderr, flush=True)
    import triton

    start |= {"thin": args.thin, "versions": {"triton": triton.__version__}}
    rows = [
        {"bench": "kernels"} | asdict(code) | {"targets": {str(key): targets[key] for key in sorted(targets)}} | start
        for code, targets in measured.items()
    ]
    print(f"{LEGEND}\n")
    for row in rows:
        print(line(row))
    print(f"\n{screen(table([row for row in rows if row['targets']]))}")
    for failure in failed:
        print(f"error: {failure}", file=sys.stderr)
    if args.save and not failed:
        for row in rows:
            append_row(args.results, row)
        print(f"{len(rows)} rows appended to {args.results}")
    return min(len(failed), 1)


def thinned(codes: Sequence[Code]) -> list[tuple[Code, int]]:
    """Each kernel for every target in one of its compilations; its others for two targets each, taken in turn."""
    seen: dict[tuple[str, str, bool], int] = {}
    chosen = []
    for code in codes:
        number = seen.setdefault((code.op, code.kernel, code.streams), 0)
        seen[code.op, code.kernel, code.streams] += 1
        some = [code.targets[(2 * number + more) % len(code.targets)] for more in (0, 1)]
        chosen += [(code, target) for target in (some if number else code.targets)]
    return chosen


def _operators() -> list[str]:
    """Folders with a kernel.py, or InputError where kernels cannot be compiled."""
    if importlib.util.find_spec("triton") is None:
        raise InputError("Triton is not installed here, so no kernel can be compiled: pip install triton")
    if os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
        raise InputError(
            "TRITON_INTERPRET is set, and interpreted kernels cannot be compiled: unset it for this command"
        )
    packages = (module.name for module in pkgutil.iter_modules(lofi_fast.kernels.__path__) if module.ispkg)
    return [name for name in packages if importlib.util.find_spec(f"lofi_fast.kernels.{name}.kernel")]


def codes_of(op: str) -> list[Code]:
    """The distinct compilations among an operator's examples, each with the launches that use it."""
    from lofi_fast.kernels.aot import TARGETS, source_of

    groups: dict[Any, list[str]] = {}
    for name, launch in _examples(op).items():
        groups.setdefault((source_of(launch).hash(), launch.num_warps, launch.fp_fusion), []).append(name)
    codes = []
    for names in groups.values():
        launches = [_examples(op)[name] for name in names]
        targets = tuple(target for target in TARGETS if target >= launches[0].least_target)
        streaming = any(streams(launch) for launch in launches)
        codes.append(Code(op, launches[0].kernel.__name__, tuple(names), streaming, targets))
    return codes


@cache
def _examples(op: str) -> Mapping[str, Launch]:
    examples: Mapping[str, Launch] = importlib.import_module(f"lofi_fast.kernels.{op}.kernel").examples()
    return examples


def streams(launch: Launch) -> bool:
    """Whether memory bounds the launch and its layout allows 16 bytes at a time: neighbours in memory of its largest
    tensor are a multiple of 64 channels, as in channels-last images.
    """
    tensors = [value for value in launch.arguments.values() if isinstance(value, Tensor)]
    largest = max(tensors, key=Tensor.numel)
    return any(stride == 1 and size % 64 == 0 for size, stride in zip(largest.shape, largest.stride(), strict=True))


def _compile(op: str, name: str, target: int) -> Row:
    from lofi_fast.kernels.aot import compile_launch

    return asdict(compile_launch(_examples(op)[name], target))


def table(rows: Sequence[Row]) -> list[Section]:
    """One line for each kernel, over all its launches and targets in the operator's newest complete run."""
    if not rows:
        return []
    dates = {row["op"]: "" for row in rows}
    for row in rows:
        dates[row["op"]] = max(str(row["date"]), dates[row["op"]])
    rows = [row for row in rows if row["date"] == dates[row["op"]]]
    groups: dict[tuple[str, str, bool], list[Row]] = {}
    for row in rows:
        groups.setdefault((row["op"], row["kernel"], row["streams"]), []).append(row)
    lines = []
    for (op, kernel, streams), group in groups.items():
        found = [target for row in group for target in row["targets"].values()]
        widest = [_range(max(map(int, target[way])) for target in found if target[way]) for way in ("loads", "stores")]
        lines.append((
            op, kernel, "channels-last, C % 64 = 0" if streams else "others",
            str(sum(len(row["launches"]) for row in group)), _range(target["registers"] for target in found),
            str(max(target["spilled"] for target in found)), _range(target["shared"] for target in found),
            " / ".join(widest),
        ))  # fmt: skip
    targets = dict.fromkeys(f"sm_{target}" for row in rows for target in row["targets"])
    versions = ", ".join(dict.fromkeys(f"Triton {row['versions']['triton']}" for row in rows))
    return [Table(f"{versions}; {', '.join(targets)}; {when(rows)}:", HEADER, lines)]


def _range(values: Iterable[int]) -> str:
    known = sorted(set(values))
    return " to ".join(str(value) for value in (known if len(known) < 2 else (known[0], known[-1]))) or "none"


def line(row: Row) -> str:
    """One compilation: the launch that it was made for, then what came out for each target."""
    name = row["launches"][0].removeprefix(f"{row['op']} ")
    more = f" (and {len(row['launches']) - 1} more)" if len(row["launches"]) > 1 else ""
    return "; ".join([f"{row['op']}: {name}{more}", *(_cell(*found) for found in row["targets"].items())])


def _cell(target: str, code: Row) -> str:
    widest = [max(map(int, code[accesses]), default=0) for accesses in ("loads", "stores")]
    return f"sm_{target} {code['registers']} {code['spilled']} {code['shared']} {widest[0]}/{widest[1]}"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench kernels", usage=USAGE, description=__doc__)
    parser.add_argument("--only", metavar="NAME,...", help="operators to compile (default: all)")
    parser.add_argument("--thin", action="store_true", help="of each kernel one launch for all targets, others for two")
    parser.add_argument("--save", action="store_true", help="append a row for each compilation")
    parser.add_argument("--results", type=Path, default=RESULTS / "kernels.jsonl", help="file that --save appends to")
    return parser

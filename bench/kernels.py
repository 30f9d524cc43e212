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
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

import lofi_fast.kernels
from bench.rows import RESULTS, Row, append_row, environment
from bench.tables import aligned
from lofi_fast.errors import InputError

if TYPE_CHECKING:
    from lofi_fast.kernels.launch import Launch

USAGE = "python -m bench kernels [options]"
LEGEND = "registers a thread, spilled bytes a thread, shared bytes a block, widest load/store of global memory in bits"


@dataclass(frozen=True)
class Code:
    """What one compilation makes: launches that differ only in sizes the compiler does not see share it."""

    op: str
    kernel: str
    launches: tuple[str, ...]
    streams: bool  # whether it must read and write 16 bytes at a time


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
    from lofi_fast.kernels.aot import TARGETS

    start = environment()
    codes = [code for op in ops for code in codes_of(op)]
    measured: dict[Code, dict[int, Row]] = {code: {} for code in codes}
    failed: list[str] = []
    wanted = thinned(codes, TARGETS) if args.thin else [(code, target) for code in codes for target in TARGETS]
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
    print(f"{LEGEND}\n\n{table(measured)}")
    for failure in failed:
        print(f"error: {failure}", file=sys.stderr)
    if args.save and not failed:
        import triton

        start |= {"thin": args.thin, "versions": {"triton": triton.__version__}}
        for code, targets in measured.items():
            by_target = {str(target): targets[target] for target in sorted(targets)}
            append_row(args.results, {"bench": "kernels"} | asdict(code) | {"targets": by_target} | start)
        print(f"{len(measured)} rows appended to {args.results}")
    return min(len(failed), 1)


def thinned(codes: Sequence[Code], targets: Sequence[int]) -> list[tuple[Code, int]]:
    """Each kernel for every target in one of its compilations; its others for two targets each, taken in turn."""
    seen: dict[tuple[str, str, bool], int] = {}
    chosen = []
    for code in codes:
        number = seen.setdefault((code.op, code.kernel, code.streams), 0)
        seen[code.op, code.kernel, code.streams] += 1
        some = [targets[(2 * number + more) % len(targets)] for more in (0, 1)]
        chosen += [(code, target) for target in (some if number else targets)]
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
    from lofi_fast.kernels.aot import source_of

    groups: dict[Any, list[str]] = {}
    for name, launch in _examples(op).items():
        groups.setdefault((source_of(launch).hash(), launch.num_warps, launch.fp_fusion), []).append(name)
    codes = []
    for names in groups.values():
        launches = [_examples(op)[name] for name in names]
        codes.append(Code(op, launches[0].kernel.__name__, tuple(names), any(streams(launch) for launch in launches)))
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


def table(measured: Mapping[Code, Mapping[int, Row]]) -> str:
    """A line for each compilation, a column for each target."""
    targets = sorted({target for found in measured.values() for target in found})
    lines = [("", *(f"sm_{target}" for target in targets))]
    for code, found in measured.items():
        more = f" (and {len(code.launches) - 1} more)" if len(code.launches) > 1 else ""
        cells = [_cell(found[target]) if target in found else "" for target in targets]
        lines.append((f"{code.op}: {code.launches[0].removeprefix(f'{code.op} ')}{more}", *cells))
    return aligned(lines, text=len(lines[0]))


def _cell(found: Row) -> str:
    widest = [max(map(int, found[accesses]), default=0) for accesses in ("loads", "stores")]
    return f"{found['registers']} {found['spilled']} {found['shared']} {widest[0]}/{widest[1]}"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench kernels", usage=USAGE, description=__doc__)
    parser.add_argument("--only", metavar="NAME,...", help="operators to compile (default: all)")
    parser.add_argument("--thin", action="store_true", help="of each kernel one launch for all targets, others for two")
    parser.add_argument("--save", action="store_true", help="append a row for each compilation")
    parser.add_argument("--results", type=Path, default=RESULTS / "kernels.jsonl", help="file that --save appends to")
    return parser

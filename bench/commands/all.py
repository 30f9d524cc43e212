"""Everything that a CPU can measure, in at most half an hour: operators, memory, steps, planner, decoding, evaluator.

Long parts are subsampled: each command by itself measures more. After a cut-off, --resume goes on where it stopped.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch

from bench.tools.parts import Ended, Part, Setting, chosen, introduce, measured, run_parts
from bench.tools.rows import RESULTS, environment, software
from lofi_fast.errors import InputError

USAGE = "python -m bench all [options]"
MINUTES = 30.0


def main(argv: Sequence[str]) -> int:
    """Run the parts, print what became of each; 1 when a part failed or did not come to its end."""
    args = _parser().parse_args(argv)
    if args.minutes <= 0 or args.threads < 1:
        raise InputError("--minutes and --threads must be positive")
    names = chosen(args.part, PARTS)
    start = environment() | software(torch.device("cpu"), args.threads) | {"quick": args.quick}
    against = None if args.against is None else args.against.absolute()
    setting = Setting("all", "cpu", args.threads, args.results.absolute(), args.resume, args.quick, start, against)
    introduce(start)
    return run_parts(PARTS, names, setting, 60 * args.minutes)


def on_cpu(name: str, options: Sequence[str], setting: Setting, limit: float) -> Ended:
    """A command of the bench with its subsampling."""
    flags = ["--threads", str(setting.threads), *options, *["--quick"] * setting.quick]
    return measured(name, setting, limit, flags if name == "eval" else ["--device", "cpu", *flags])


def planner(setting: Setting, limit: float) -> Ended:
    few = ["--models", "demo", "--budgets", "1" if setting.quick else "3"]
    return measured("planner", setting, limit, [*few, "--epochs", "1" if setting.quick else "6"])


def fits(setting: Setting, limit: float) -> Ended:
    return measured("fits", setting, limit)  # arithmetic: the same on any machine


PARTS = {
    "ops": Part("operators beside their peers", 300, partial(on_cpu, "ops", ["--short", "--rounds", "7"])),
    "memory": Part("what is kept of a frame, peaks of a step", 240, partial(on_cpu, "memory", ["--short"])),
    "step": Part("time of a step beside plain PyTorch", 720, partial(on_cpu, "step", ["--short", "--rounds", "3"])),
    "planner": Part("the planner at three budgets", 360, planner),
    "data": Part("decoding beside the videos themselves", 60, partial(on_cpu, "data", [])),
    "fits": Part("the highest fidelity against the budget", 20, fits),
    "eval": Part("the evaluator beside the official procedure", 100, partial(on_cpu, "eval", ["--rounds", "3"])),
}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench all", usage=USAGE, description=__doc__)
    parser.add_argument("--part", metavar="A,B", help=f"of {', '.join(PARTS)} (default: all)")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default: 1; not the planner's)")
    parser.add_argument("--minutes", type=float, default=MINUTES, help=f"for all parts (default: {MINUTES:g})")
    parser.add_argument("--quick", action="store_true", help="small cases: does everything run? says nothing of speed")
    parser.add_argument("--resume", action="store_true", help="leave out parts that the results hold of this commit")
    parser.add_argument("--against", type=Path, metavar="FOLDER", help="of older rows, to print what changed")
    parser.add_argument("--results", type=Path, default=RESULTS, metavar="FOLDER", help="of rows")
    return parser

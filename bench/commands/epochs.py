"""How well the planner knows the time of an epoch: what plan.json says before the first one, against the epochs as they
went.

Whole joint stages on the demo's videos, on a CPU, at a few fixed cuts of each phase of the cycle, under a time limit
that binds nowhere (a limit is what makes the planner time steps). An epoch's time is its steps' as the log has them,
decoding included, without validation and checkpoints.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from datetime import datetime
from itertools import pairwise
from pathlib import Path
from statistics import median

import torch

from bench.commands.planner import MODELS
from bench.tools.logs import read_log
from bench.tools.rows import RESULTS, ROOT, Row, append_row, environment, software
from bench.tools.table import Section, Table, newest, screen, when
from lofi_fast.data import demo
from lofi_fast.errors import InputError
from lofi_fast.run import events

USAGE = "python -m bench epochs [options]"
CUTS = "2,4,8"
VIDEOS, BATCH, EPOCHS = 16, 4, 9  # four steps an epoch; every phase three times
LIMIT = "100h"


def main(argv: Sequence[str]) -> int:
    """Measure, append rows, print a table."""
    args = _parser().parse_args(argv)
    if args.model not in MODELS:
        raise InputError(f"--model: no model is called {args.model}; there are: {', '.join(MODELS)}")
    start = environment() | software(torch.device("cpu"), args.threads)
    rows: list[Row] = []
    with tempfile.TemporaryDirectory(prefix="bench-epochs-", ignore_cleanup_errors=True) as name:
        folder = Path(name)
        annotations, videos = demo.generate(folder / "demo", num_training=args.videos, num_validation=2)
        flags = ["--annotations", str(annotations), "--videos", str(videos), "--device", "cpu", "--epoch-time", LIMIT]
        flags += ["--threads", str(args.threads), "--mem-budget", args.mem_budget, "--batch", str(BATCH)]
        flags += ["--stages", "joint", "--joint-epochs", str(args.epochs), *MODELS[args.model]]
        for cut in args.cuts.split(","):
            out = folder / f"cut-{cut}"
            told = [*flags, "--cut", cut, "--cache", str(folder / "cache"), "--out", str(out)]
            for row in measured(told, out):
                row = {"bench": "epochs", "model": args.model, "cut": float(cut)} | row | start
                append_row(args.results, row)
                rows.append(row)
                print(line(row), flush=True)
    print(f"\n{screen(table(rows))}\n{len(rows)} rows appended to {args.results}")
    return 0


def measured(flags: Sequence[str], out: Path) -> list[Row]:
    """Train in a process of its own: each phase's epoch, as it was planned and as it went."""
    command = [sys.executable, "-m", "lofi_fast.train", *flags]
    done = subprocess.run(
        command, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, text=True, capture_output=True, check=False
    )
    if done.returncode:
        said = (done.stdout + done.stderr).strip().splitlines()[-3:]
        raise RuntimeError(f"{' '.join(command)}: status {done.returncode}: {' / '.join(said)}")
    planned = json.loads((out / "plan.json").read_text())["plans"]["joint"]
    steps = [event for event in read_log(out) if isinstance(event, events.Step) and event.stage == "joint"]
    rows = []
    for pattern, plan in planned.items():
        epochs = [taken for taken in seconds_of_epochs(steps, pattern) if taken is not None]
        rows.append({
            "pattern": pattern, "rung": plan["rung"], "predicted_seconds": round(plan["epoch_seconds"], 3),
            "seconds": [round(taken, 3) for taken in epochs],
            "error": round(plan["epoch_seconds"] / median(epochs) - 1, 4),
        })  # fmt: skip
    return rows


def seconds_of_epochs(steps: Sequence[events.Step], pattern: str) -> list[float | None]:
    """Seconds of each epoch of a phase, by the times between its steps; None for one of a single step."""
    of_epoch: dict[int, list[datetime]] = {}
    for step in steps:
        if step.pattern == pattern:
            of_epoch.setdefault(step.epoch, []).append(datetime.fromisoformat(step.time))
    return [
        len(times) * median((after - before).total_seconds() for before, after in pairwise(times))
        if len(times) > 1
        else None
        for times in of_epoch.values()
    ]


def line(row: Row) -> str:
    length, side = row["rung"]
    return (
        f"{row['model']}, cut {row['cut']:g}, {row['pattern']}: {length} x {side} px: {row['predicted_seconds']:.2f} s "
        f"predicted, {median(row['seconds']):.2f} s measured ({100 * row['error']:+.1f}%)"
    )


def table(rows: Sequence[Row]) -> list[Section]:
    """Each rung of the newest run."""
    lines = [
        (
            row["model"], f"{row['cut']:g}, {row['pattern']}", f"{row['rung'][0]} x {row['rung'][1]} px",
            f"{row['predicted_seconds']:.2f} s", f"{median(row['seconds']):.2f} s", f"{100 * row['error']:+.1f}%",
            when([row]),
        )
        for row in newest(rows, ("model", "cut", "pattern"))
    ]  # fmt: skip
    header = ("model", "cut, phase", "rung", "an epoch as planned", "as measured", "off by", "date, commit")
    return [Table("", header, lines)] if lines else []


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench epochs", usage=USAGE, description=__doc__)
    parser.add_argument("--model", default="demo", metavar="NAME", help=f"of {', '.join(MODELS)} (default: demo)")
    parser.add_argument("--cuts", default=CUTS, metavar="A,B", help=f"default: {CUTS}")
    parser.add_argument("--epochs", type=int, default=EPOCHS, help=f"of each training (default: {EPOCHS})")
    parser.add_argument("--videos", type=int, default=VIDEOS, help=f"to train on (default: {VIDEOS})")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default: 1)")
    parser.add_argument("--mem-budget", default="4GB", metavar="BUDGET", help="default: 4GB")
    parser.add_argument("--results", type=Path, default=RESULTS / "epochs.jsonl", help="file of rows to append to")
    return parser

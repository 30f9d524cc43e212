"""The planner against budgets: predicted and measured peaks, how much of the budget is used, and whether it is kept to.

Each budget is a training of its own, as a user would start it, on a few videos of the demo set. Budgets are drawn
between the smallest that is not refused and what full fidelity needs. With `--pressure` a second process takes and
frees memory meanwhile, so that what is left lies under the budget about half of the time.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from threading import Event, Thread
from typing import Any

import numpy as np

from bench.rows import RESULTS, ROOT, Row, append_row, environment
from bench.tables import aligned
from lofi_fast.data import demo
from lofi_fast.errors import InputError
from lofi_fast.memory.meter import CpuMeter

USAGE = "python -m bench planner [options]"
MODELS = {
    "demo": ["--preset", "demo"],
    "r18": ["--preset", "demo", "--width", "64", "--fidelity", "16x112"],
}
VIDEOS, BATCH, EPOCHS = 8, 4, 6  # two steps an epoch; every pattern twice
LARGEST = 8e9
SHARE_LEFT = (0.7, 1.3)  # of the budget, that the neighbour leaves in turn
HOLD_SECONDS = 4.0


def main(argv: Sequence[str]) -> int:
    """Measure, append rows, print a table; 1 when a budget was passed or a sample lost."""
    args = _parser().parse_args(argv)
    if args.budgets < 1:
        raise InputError(f"--budgets {args.budgets}: must be at least 1")
    start = environment()
    rows: list[Row] = []
    with tempfile.TemporaryDirectory(prefix="bench-planner-", ignore_cleanup_errors=True) as name:
        folder = Path(name)
        annotations, videos = demo.generate(folder / "demo", num_training=VIDEOS, num_validation=1)
        data = ["--annotations", str(annotations), "--videos", str(videos), "--cache", str(folder / "cache")]
        for model in args.models.split(","):
            if model not in MODELS:
                raise InputError(f"--models: no model is called {model}; there are: {', '.join(MODELS)}")
            flags = [*data, *MODELS[model], "--min-cut", "1", "--batch", str(BATCH), "--stages", "joint"]
            flags += ["--joint-epochs", str(args.epochs), "--device", "cpu"]
            for number, budget in enumerate(budgets(folder, flags, args.budgets, args.seed)):
                out = folder / f"{model}-{number}"
                row = {"bench": "planner", "model": model, "pressure": args.pressure, "budget": budget}
                with neighbour(budget) if args.pressure else no_neighbour() as others:
                    row |= run([*flags, "--mem-budget", str(budget), "--out", str(out)], out)
                row |= others | start
                append_row(args.results, row)
                rows.append(row)
                print(line(row), flush=True)
    print(f"\n{table(rows)}\n{len(rows)} rows appended to {args.results}")
    return int(any(row["violations"] or row["lost"] for row in rows))


def budgets(folder: Path, flags: Sequence[str], count: int, seed: int) -> list[int]:
    """Random amounts, log-uniform between the smallest plan's need and that of full fidelity, or 8 GB."""
    out = folder / f"unbound-{len(list(folder.glob('unbound-*')))}"
    run([*flags, "--joint-epochs", "1", "--mem-budget", str(int(LARGEST)), "--out", str(out)], out)
    ladders = json.loads((out / "plan.json").read_text())["plans"]["joint"].values()
    needs = [row["predicted"] for chosen in ladders for row in chosen["ladder"]]
    low, high = 1.06 * max(min(row["predicted"] for row in chosen["ladder"]) for chosen in ladders), max(needs)
    drawn = np.random.default_rng(seed).uniform(np.log(low), np.log(min(1.15 * high, LARGEST)), count)
    return [int(np.exp(value)) for value in drawn]


def run(flags: Sequence[str], out: Path) -> Row:
    """Train in a process of its own, and read what its log says."""
    command = [sys.executable, "-m", "lofi_fast.train", *flags]
    began = time.perf_counter()
    done = subprocess.run(
        command, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True
    )  # fmt: skip
    seconds = time.perf_counter() - began
    if done.returncode:
        return _numbers([], [], seconds) | {"refused": (done.stderr or done.stdout).strip().splitlines()[-1]}
    events = [json.loads(text) for text in (out / "log.jsonl").read_text().splitlines()]
    steps = [event for event in events if event["event"] == "step"]
    trials = [event for event in events if event["event"] == "measured" and event["plan"].startswith("joint")]
    full = json.loads((out / "config.json").read_text())["full"]
    return _numbers(steps, trials, seconds, full["num_snippets"] * full["side"] ** 2) | {"refused": None}


def _numbers(steps: Sequence[Row], trials: Sequence[Row], seconds: float, full: int = 0) -> Row:
    errors = [abs(step["peak"] - step["predicted"]) / step["peak"] for step in steps]
    added = [
        abs(step["peak"] - step["predicted"]) / max(step["predicted"] - step["base"], 1)
        for step in steps
    ]  # fmt: skip
    omegas = [step["num_snippets"] * step["side"] ** 2 for step in steps]
    most = [max((o for o, s in zip(omegas, steps, strict=True) if s["pattern"] == step["pattern"])) for step in steps]
    rungs = [(step["num_snippets"], step["side"], step["micro_batch"], step["recompute"]) for step in steps]
    moves = [b - a for a, b, m, n in zip(omegas, omegas[1:], most, most[1:], strict=False) if m == n and a != b]
    seen: dict[int, list[str]] = {}
    for step in steps:
        seen.setdefault(step["epoch"], []).extend(step["videos"])
    lost = sum(abs(len(videos) - VIDEOS) + VIDEOS - len(set(videos)) for videos in seen.values())
    return {
        "seconds": round(seconds, 1),
        "steps": len(steps),
        "trials": len(trials),
        "error_of_peak": [round(max(errors, default=0.0), 4), round(median(errors or [0.0]), 4)],
        "error_of_added": [round(max(added, default=0.0), 4), round(median(added or [0.0]), 4)],
        "used": [
            round(f([step["peak"] / min(step["budget"], step["limit"]) for step in steps] or [0.0]), 4)
            for f in (min, median, max)
        ],
        "bound": any(omega < full for omega in omegas),  # a higher rung existed
        "violations": sum(step["peak"] > min(step["budget"], step["limit"]) for step in steps)
        + sum(trial["peak"] is not None and trial["peak"] > trial["budget"] for trial in trials),
        "retries": sum(step["retries"] for step in steps),
        "reduced": sum(step["reduced_from"] is not None for step in steps),
        "down": sum(move < 0 for move in moves),
        "up": sum(move > 0 for move in moves),
        "rungs": len(set(rungs)),
        "lost": lost,
    }


@contextmanager
def no_neighbour() -> Iterator[dict[str, Any]]:
    yield {}


@contextmanager
def neighbour(budget: int) -> Iterator[dict[str, Any]]:
    """A process that takes and frees memory, so that less, then more than the budget is left for a second one."""
    script = (
        "import sys\n"
        "for line in sys.stdin:\n"
        "    held = None\n"
        "    held = bytearray(int(line))\n"
        "    for page in range(0, len(held), 4096): held[page] = 1\n"
        "    print(len(held), flush=True)\n"
    )
    hog = subprocess.Popen([sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    stop, told = Event(), {"short": 0, "turns": 0}
    meter = CpuMeter()

    def turn() -> None:
        assert hog.stdin and hog.stdout
        held = 0
        while not stop.wait(HOLD_SECONDS):
            share = SHARE_LEFT[told["turns"] % 2]
            told["turns"] += 1
            told["short"] += share < 1
            free = meter.available() - meter.own() + held
            hog.stdin.write(f"{max(int(free - share * budget), 0)}\n")
            hog.stdin.flush()
            held = int(hog.stdout.readline())

    thread = Thread(target=turn, daemon=True)
    thread.start()
    try:
        yield told
    finally:
        stop.set()
        thread.join()
        hog.kill()
        hog.wait()


def line(row: Row) -> str:
    if row["refused"]:
        return f"{row['model']} {row['budget'] / 1e9:.2f} GB: refused: {row['refused']}"
    of_peak, used = 100 * row["error_of_peak"][0], 100 * row["used"][1]
    return (
        f"{row['model']} {row['budget'] / 1e9:.2f} GB: {row['steps']} steps, error at most {of_peak:.1f}% of the peak, "
        f"used {used:.0f}%, {row['violations']} violations, {row['down']} down, {row['up']} up"
    )


def table(rows: Sequence[Row]) -> str:
    lines = [("model", "budget, GB", "error of peak", "of what is added", "used", "violations", "lost", "down", "up")]
    for row in sorted(rows, key=lambda row: (row["model"], row["budget"])):
        if row["refused"]:
            lines.append((row["model"], f"{row['budget'] / 1e9:.2f}", *["refused"] * 7))
            continue
        percent = [f"{100 * row[key][0]:.1f}%" for key in ("error_of_peak", "error_of_added")]
        used = f"{100 * row['used'][1]:.0f}%"
        counts = [str(row[key]) for key in ("violations", "lost", "down", "up")]
        lines.append((row["model"], f"{row['budget'] / 1e9:.2f}", *percent, used, *counts))
    return aligned(lines, text=1)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench planner", usage=USAGE, description=__doc__)
    parser.add_argument("--models", default="demo,r18", metavar="A,B", help=f"of {', '.join(MODELS)} (default: all)")
    parser.add_argument("--budgets", type=int, default=15, help="random budgets for each model (default: 15)")
    parser.add_argument("--epochs", type=int, default=EPOCHS, help="of each training, two steps each (default: 6)")
    parser.add_argument("--pressure", action="store_true", help="with a neighbour that takes and frees memory")
    parser.add_argument("--seed", type=int, default=0, help="of the budgets")
    parser.add_argument("--results", type=Path, default=RESULTS / "planner.jsonl", help="file of rows to append to")
    return parser

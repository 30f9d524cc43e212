"""The planner against budgets on a CPU: predicted and measured peaks, budget used, and whether it is kept to.

Each budget is a training of its own, as a user would start it, on a few videos of the demo set. Budgets are drawn
between the smallest that is not refused and what full fidelity needs. With `--pressure` one budget of each model is
trained at for many steps, beside a process that takes and frees memory (`bench.tools.neighbour`).
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path

import numpy as np

from bench.tools.logs import read_log, summary
from bench.tools.neighbour import ROOM, Neighbour, inside, new_group
from bench.tools.rows import RESULTS, ROOT, Row, append_row, environment
from bench.tools.table import Section, Table, screen, when
from lofi_fast.data import demo
from lofi_fast.errors import InputError
from lofi_fast.fidelity import CYCLE
from lofi_fast.run import events

USAGE = "python -m bench planner [options]"
MODELS = {
    "demo": ["--preset", "demo"],
    "r18": ["--preset", "demo", "--width", "64", "--fidelity", "16x112"],
    "r34": ["--preset", "demo", "--encoder", "tsm_r34", "--width", "64", "--fidelity", "16x112"],
    "r50": ["--preset", "demo", "--encoder", "tsm_r50", "--width", "64", "--fidelity", "16x112", "--batch", "8"],
}
VIDEOS, BATCH, EPOCHS = 8, 4, 6  # two steps an epoch; every pattern twice
LARGEST = 8e9
CHOSEN = ("rung", "cut", "micro_batch", "recompute", "chunk")  # of what plan.json says of each phase
PRESSED = 0.75  # of the way from the smallest plan's need to full fidelity's: the budget under pressure
LEAST = 1.17  # times the smallest plan's need: what the neighbour leaves


def main(argv: Sequence[str]) -> int:
    """Measure, append rows, print a table; 1 when a budget was passed or a sample lost."""
    args = _parser().parse_args(argv)
    if args.budgets < 1 or args.epochs < 1:
        raise InputError("--budgets and --epochs must be at least 1")
    start = environment()
    rows: list[Row] = []
    with tempfile.TemporaryDirectory(prefix="bench-planner-", ignore_cleanup_errors=True) as name:
        folder = Path(name)
        annotations, videos = demo.generate(folder / "demo", num_training=VIDEOS, num_validation=1)
        data = ["--annotations", str(annotations), "--videos", str(videos)]
        for model in args.models.split(","):
            if model not in MODELS:
                raise InputError(f"--models: no model is called {model}; there are: {', '.join(MODELS)}")
            flags = [*data, "--min-cut", "1", "--batch", str(BATCH), "--stages", "joint", "--device", "cpu"]
            flags += [*MODELS[model], "--joint-epochs", str(args.epochs)]
            low, high = needs(folder, flags)
            alone = budgets(low, high, args.budgets, args.seed)
            for budget in [int(low + PRESSED * (high - low))] if args.pressure else alone:
                # A cache of its own: readings of an earlier budget would spare the trials.
                out = folder / f"{model}-{budget}"
                row = {"bench": "planner", "model": model, "pressure": args.pressure, "budget": budget}
                told = [*flags, "--cache", str(out / "cache"), "--mem-budget", str(budget), "--out", str(out / "run")]
                row |= run(told, out / "run", (budget, int(LEAST * low)) if args.pressure else None) | start
                append_row(args.results, row)
                rows.append(row)
                print(line(row), flush=True)
    print(f"\n{screen(table(rows))}\n{len(rows)} rows appended to {args.results}")
    return int(any(row["violations"] or row["lost"] for row in rows))


def needs(folder: Path, flags: Sequence[str]) -> tuple[float, float]:
    """Bytes of the smallest plan, of the pattern that needs most, and of full fidelity."""
    out = folder / f"unbound-{len(list(folder.glob('unbound-*')))}"
    cache = ["--cache", str(out / "cache"), "--out", str(out / "run")]
    done = run([*flags, *cache, "--joint-epochs", "1", "--mem-budget", str(int(LARGEST))], out / "run", None)
    if done["refused"]:
        raise InputError(f"nothing can be measured: {done['refused']}")
    ladders = json.loads((out / "run" / "plan.json").read_text())["plans"]["joint"].values()
    peaks = [[row["predicted"] for row in chosen["ladder"]] for chosen in ladders]
    return max(min(of) for of in peaks), max(max(of) for of in peaks)


def budgets(low: float, high: float, count: int, seed: int) -> list[int]:
    """Random amounts, log-uniform from just above the smallest plan's need to a little over full fidelity's."""
    drawn = np.random.default_rng(seed).uniform(np.log(1.06 * low), np.log(min(1.15 * high, LARGEST)), count)
    return [int(np.exp(value)) for value in drawn]


def run(flags: Sequence[str], out: Path, pressed: tuple[int, int] | None) -> Row:
    """Train in a process of its own, and read what its log says. `pressed`: (budget, bytes that a neighbour leaves)."""
    command = [sys.executable, "-m", "lofi_fast.train", *flags]
    began = time.perf_counter()
    last: deque[str] = deque(maxlen=3)
    group_of = new_group(int(ROOM * pressed[0])) if pressed else nullcontext()
    with group_of as group, Neighbour(*pressed, group) if pressed else nullcontext() as neighbour:
        with subprocess.Popen(
            inside(group, command), cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        ) as child:  # fmt: skip
            assert child.stdout
            for said in child.stdout:
                last.append(said.strip())
                if neighbour is not None and said.startswith("plan joint"):
                    neighbour.begin(child.pid, out / "log.jsonl")
        told: Row = {"seconds": round(time.perf_counter() - began, 1)}
        if neighbour is not None:
            told |= {"turns": neighbour.turns, "group": group is not None}
    if child.returncode == 2:  # as a user would read it
        return told | summary([], [], 0) | {"refused": last[-1]}
    if child.returncode:
        raise RuntimeError(f"{' '.join(command)}: status {child.returncode}: {' / '.join(last)}")
    log = read_log(out)
    steps = [event for event in log if isinstance(event, events.Step) and event.stage == "joint"]
    trials = [event for event in log if isinstance(event, events.Measured) and event.plan.startswith("joint")]
    full = json.loads((out / "config.json").read_text())["full"]
    planned = json.loads((out / "plan.json").read_text())["plans"]["joint"]
    chosen = {pattern: {key: plan[key] for key in CHOSEN} for pattern, plan in planned.items()}
    bound = any(step.num_snippets * step.side**2 < full["num_snippets"] * full["side"] ** 2 for step in steps)
    seen = max((event.peak for event in (*steps, *trials) if event.peak), default=0)
    return told | summary(steps, trials, seen) | {"bound": bound, "refused": None, "chosen": chosen}


def line(row: Row) -> str:
    if row["refused"]:
        return f"{row['model']} {row['budget'] / 1e9:.2f} GB: refused: {row['refused']}"
    of_peak, used = 100 * row["error_of_peak"][0], 100 * row["used"][1]
    return (
        f"{row['model']} {row['budget'] / 1e9:.2f} GB: {row['steps']} steps, error at most {of_peak:.1f}% of the peak, "
        f"used {used:.0f}%, {row['violations']} violations, {row['lost']} lost, {row['short']} steps with less left "
        f"than the budget, {row['down']} down, {row['up']} up, {row['retries']} retries"
    )


def table(rows: Sequence[Row]) -> list[Section]:
    """Over the budgets of each model in its newest run: how well peaks were predicted, and kept to."""
    if not rows:
        return []
    lines = []
    for model, pressure in dict.fromkeys((row["model"], row["pressure"]) for row in rows):
        mine = [row for row in rows if (row["model"], row["pressure"]) == (model, pressure)]
        newest = max(row["date"] for row in mine)
        run = [row for row in mine if row["date"] == newest]
        went = [row for row in run if not row["refused"]]
        if not went:
            continue
        bound = [100 * row["used"][1] for row in went if row["bound"]]
        span = [row["budget"] / 1e9 for row in run]
        errors = [f"{100 * max(row[key][0] for row in went):.1f}%" for key in ("error_of_peak", "error_of_added")]
        lines.append((
            model + ", beside a neighbour" * pressure, f"{len(run)}, {min(span):.2f} to {max(span):.2f} GB",
            _steps(went), *errors, f"{min(bound):.0f}% to {max(bound):.0f}%" if bound else "binds nowhere",
            str(sum(row["violations"] for row in went)), str(sum(row["lost"] for row in went)),
            f"{sum(row['down'] for row in went)} / {sum(row['up'] for row in went)}", when(run),
        ))  # fmt: skip
    header = (
        "model", "budgets", "steps", "largest error of the peak", "of what a step adds", "budget used where it binds",
        "violations", "lost or repeated videos", "rungs down / up", "date, commit",
    )  # fmt: skip
    return [Table("", header, lines), *_bought(rows)]


def _bought(rows: Sequence[Row]) -> list[Section]:
    """What each budget bought, in the newest run of each model that tells."""
    lines = []
    for model in dict.fromkeys(row["model"] for row in rows):
        mine = [row for row in rows if row["model"] == model and row.get("chosen") and not row["pressure"]]
        run = [row for row in mine if row["date"] == max(row["date"] for row in mine)]
        for row in sorted(run, key=lambda row: row["budget"]):
            cells = [_plan(row["chosen"].get(pattern.value)) for pattern in CYCLE]
            lines.append((model, f"{row['budget'] / 1e9:.2f} GB", *cells, f"{100 * row['used'][1]:.0f}%"))
    header = ("model", "budget", *(pattern.value.replace("_", "-") for pattern in CYCLE), "used, median")
    return [Table("What the budgets bought, as chosen at the start:", header, lines)] if lines else []


def _plan(chosen: Row | None) -> str:
    if chosen is None:
        return ""
    length, side = chosen["rung"]
    levers = f"{chosen['micro_batch']} at once" + ", recompute" * chosen["recompute"]
    return f"{length} x {side} px (cut {chosen['cut']:.1f}), {levers}, {chosen['chunk']} to a graph"


def _steps(rows: Sequence[Row]) -> str:
    """Of several trainings; of those with less left for them than the budget, how many."""
    short = sum(row.get("short", 0) for row in rows)
    return f"{sum(row['steps'] for row in rows)}{f', {short} with less left than the budget' if short else ''}"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench planner", usage=USAGE, description=__doc__)
    parser.add_argument(
        "--models", default="demo,r18", metavar="A,B", help=f"of {', '.join(MODELS)} (default: demo,r18)"
    )
    parser.add_argument("--budgets", type=int, default=15, help="random budgets for each model (default: 15)")
    parser.add_argument("--epochs", type=int, default=EPOCHS, help="of each training, two steps each (default: 6)")
    parser.add_argument("--pressure", action="store_true", help="with a neighbour that takes and frees memory")
    parser.add_argument("--seed", type=int, default=0, help="of the budgets")
    parser.add_argument("--results", type=Path, default=RESULTS / "planner.jsonl", help="file of rows to append to")
    return parser

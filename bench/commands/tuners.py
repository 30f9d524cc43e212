"""The planner beside the way other trainers find what fits (`bench.peers.tuners`): budget used, failures, steps lost.

Every tuner and budget is a process of its own: R18's ladder of one pattern, steps of the joint stage on noise, under a
hard cap at the budget, so that what would not fit fails. A search is followed by a few steps of training.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from statistics import fmean, median

import numpy as np
import torch

from bench.peers.tuners import TUNERS, halving
from bench.tools.against import add_against, comparison, read_against
from bench.tools.logs import read_log
from bench.tools.measure import in_child
from bench.tools.rows import RESULTS, Row, append_row, environment, software
from bench.tools.synthetic import synthetic_run
from bench.tools.table import Section, Table, by_place, screen, when
from lofi_fast.budget import Budget
from lofi_fast.config import Config
from lofi_fast.errors import InputError
from lofi_fast.fidelity import Fidelity, Pattern, ladder
from lofi_fast.memory import allocator
from lofi_fast.memory.decision import Decision
from lofi_fast.memory.plans import Plan, candidates
from lofi_fast.memory.settle import open_meter
from lofi_fast.optim import make_optimizer
from lofi_fast.presets import demo
from lofi_fast.run import events
from lofi_fast.run.log import RunLog
from lofi_fast.stages.joint import plan_joint, trial

USAGE = "python -m bench tuners [options]"
OURS = "lofi_fast"
BATCH, STEPS = 4, 8
FULL = Fidelity(16, 112)
RANGE = (1.1, 0.95)  # of the smallest plan's peak, and of full fidelity's: between them are the budgets
LARGEST = 8 * 10**9
VALUES = {"budget used": ("used",), "steps of the search": ("searched",), "planning": ("planning_seconds",)}


def main(argv: Sequence[str]) -> int:
    """Measure, append rows, print a table."""
    args = _parser().parse_args(argv)
    if args.budgets < 1 or args.steps < 1:
        raise InputError("--budgets and --steps must be at least 1")
    old = read_against(args.against)
    start = environment() | software(torch.device("cpu"), 1)
    rows: list[Row] = []
    with tempfile.TemporaryDirectory(prefix="bench-tuners-", ignore_cleanup_errors=True) as name:
        ends = [int(share * peak) for share, peak in zip(RANGE, _ends(Path(name), args.width), strict=True)]
        drawn = np.random.default_rng(args.seed).uniform(*np.log(ends), args.budgets)
        for budget in sorted(int(np.exp(value)) for value in drawn):
            for tuner in (OURS, *TUNERS):
                told = in_child(_work, tuner, budget, args.steps, args.width, Path(name))
                row = {"bench": "tuners", "tuner": tuner, "budget": budget, "width": args.width} | told | start
                append_row(args.results, row)
                rows.append(row)
                print(line(row), flush=True)
    print(f"\n{screen(table(rows))}\n{len(rows)} rows appended to {args.results}")
    if args.against:
        print(comparison(rows, old, ("tuner", "budget"), VALUES))
    return 0


def _ends(folder: Path, width: int) -> tuple[int, int]:
    """Peaks of the smallest and of the largest plan."""
    smallest, largest = (in_child(_work, which, LARGEST, 1, width, folder)["peak"] for which in ("smallest", "largest"))
    return smallest, largest


def _work(tuner: str, budget: int, steps: int, width: int, folder: Path) -> Row:
    """Find a plan, then train at it. `used`: of the budget, by the largest peak of training; None where none went
    through. `failures`: steps that asked for more than the budget. `searched`: steps that trained nothing.
    """
    if reason := allocator.install():
        raise RuntimeError(reason)
    torch.set_num_threads(1)
    device = torch.device("cpu")
    config = _config(budget, width, folder / f"{tuner} {budget}".replace("/", "-"))
    Path(config.out).mkdir(parents=True, exist_ok=True)
    plans = candidates(ladder(Pattern.SPATIAL, FULL, 1.0, 16.0), BATCH, recompute="never")
    attempts: list[int | None] = []
    with closing(RunLog(Path(config.out) / "log.jsonl")) as log:
        run = synthetic_run(config, device, open_meter(device), log)
        run.encoder.freeze_batchnorm()
        run.encoder.train()
        run.head.train()
        parameters = [*run.encoder.parameters(), *run.head.parameters()]
        optimizers = [make_optimizer(config.joint, parameters, "torch")]
        samples = run.sampler.epoch("joint", 0, BATCH)[0]

        def attempt(plan: Plan) -> int | None:
            decision = Decision(Pattern.SPATIAL, 0, 0, plan, plan, 0, budget, budget, budget, tuner)
            attempts.append(trial(run, samples, decision))
            return attempts[-1]

        attempt(plans[-1])  # a process's first step loads code and leaves memory behind, whoever plans
        attempts.clear()
        held, began = run.machine.meter.held(), time.perf_counter()
        chosen: Plan | None
        if tuner in ("smallest", "largest"):
            chosen = plans[0 if tuner == "largest" else -1]
        elif tuner == OURS:
            optimizers.clear()  # it makes one of its own, which holds as much as this
            plan_joint(run)
            optimizers.append(make_optimizer(config.joint, parameters, "torch"))
            assert run.planner is not None
            chosen = run.planner.choose(Pattern.SPATIAL, 0, 0).plan
            attempts += [event.peak for event in read_log(Path(config.out)) if isinstance(event, events.Measured)]
        else:
            chosen = TUNERS[tuner](plans, attempt, budget, held)
        seconds, searched = time.perf_counter() - began, len(attempts)
        while chosen is not None and len(attempts) < searched + steps:
            if attempt(chosen) is None:
                lower = [plan for plan in plans if 2 * plan.fidelity.omega <= chosen.fidelity.omega]
                if TUNERS.get(tuner) is not halving or not lower:
                    break
                chosen = halving(lower, attempt, budget, held)  # it wraps the training too, and goes on downwards
        trained = [peak for peak in attempts[searched:] if peak is not None]
    return {
        "plan": None if chosen is None else chosen.to_json(),
        "omega": None if chosen is None else round(chosen.fidelity.omega / FULL.omega, 4),
        "peak": max(trained, default=None),
        "used": round(max(trained) / budget, 4) if trained else None,
        "failures": sum(peak is None or peak > budget for peak in attempts),
        "searched": searched,
        "trained": len(trained),
        "planning_seconds": round(seconds, 2),
    }


def _config(budget: int, width: int, out: Path) -> Config:
    config = demo()
    return replace(
        config, full=FULL, encoder=replace(config.encoder, width=width), min_cut=1.0, stages=("joint",), out=str(out),
        joint=replace(config.joint, batch=BATCH), pattern=Pattern.SPATIAL, recompute="never",
        budget=Budget(str(budget), amount=budget),
    )  # fmt: skip


def line(row: Row) -> str:
    used = "trains nothing" if row["used"] is None else f"uses {100 * row['used']:.0f}%"
    return (
        f"{row['budget'] / 1e9:.2f} GB, {row['tuner']}: {used}, {row['searched']} steps of search, {row['failures']} "
        "failed"
    )


def table(rows: Sequence[Row]) -> list[Section]:
    """Each way over the budgets of its machine's newest run."""
    header = (
        "way", "budget used, median (least)", "Omega, of full fidelity", "trainings that broke off",
        "steps that did not fit", "steps of search", "planning, s",
    )  # fmt: skip
    parts: list[Section] = []
    for where, here in by_place(rows):
        run = [row for row in here if row["date"] == max(row["date"] for row in here)]
        lines = []
        for tuner in dict.fromkeys(row["tuner"] for row in run):
            mine = [row for row in run if row["tuner"] == tuner]
            used = [row["used"] or 0.0 for row in mine]
            omega = fmean(row["omega"] or 0.0 for row in mine)
            broken = sum(row["trained"] < max(other["trained"] for other in run) for row in mine)
            searched, failures = (sum(row[key] for row in mine) for key in ("searched", "failures"))
            lines.append((
                tuner, f"{100 * median(used):.0f}% ({100 * min(used):.0f}%)", f"{100 * omega:.0f}%",
                f"{broken} of {len(mine)}", str(failures), f"{searched / len(mine):.1f}",
                f"{fmean(row['planning_seconds'] for row in mine):.0f}",
            ))  # fmt: skip
        budgets = [row["budget"] / 1e9 for row in run]
        span = f"{len(set(budgets))} budgets from {min(budgets):.2f} to {max(budgets):.2f} GB"
        parts.append(Table(f"{where}, {span}; {when(run)}:", header, lines))
    return parts


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench tuners", usage=USAGE, description=__doc__)
    parser.add_argument("--budgets", type=int, default=6, help="random budgets (default: 6)")
    parser.add_argument("--steps", type=int, default=STEPS, help=f"of training at what was found (default: {STEPS})")
    parser.add_argument("--width", type=int, default=64, help="channels of the encoder's first stage (default: 64)")
    parser.add_argument("--seed", type=int, default=0, help="of the budgets")
    parser.add_argument("--results", type=Path, default=RESULTS / "tuners.jsonl", help="file of rows to append to")
    add_against(parser)
    return parser

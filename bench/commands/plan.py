"""What a budget buys: the plan that `lofi-fast plan` finds for every encoder at several budgets, and its time.

By arithmetic alone, for the paper's setting (100 snippets of 224 px, 16 videos a step, ActivityNet's 10,024 training
videos) on one card; all levers are allowed. With a limit on the time of an epoch too, fidelity is what gives.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import get_args

import lofi_fast
from bench.tools.rows import RESULTS, Row, append_row, environment
from bench.tools.table import Section, Table, screen, when
from lofi_fast.budget import duration
from lofi_fast.config import EncoderName
from lofi_fast.fidelity import Pattern

USAGE = "python -m bench plan [options]"
BUDGETS = ("3GB", "4GB", "5.6GB", "8GB", "11GB", "16GB", "24GB")
LIMITS = (None, "1h", "30min")  # of an epoch
CARD = "3090"
PATTERN = Pattern.SPATIAL


def main(argv: Sequence[str]) -> int:
    """Compute, append rows, print a table."""
    args = _parser().parse_args(argv)
    start = environment() | {"quick": False}
    rows = [row(encoder, limit) for encoder in get_args(EncoderName) for limit in LIMITS]
    for found in rows:
        append_row(args.results, {"bench": "plan", "computed": True} | found | start)
    print(f"{screen(table([found | start for found in rows]))}\n{len(rows)} rows appended to {args.results}")
    return 0


def row(encoder: EncoderName, limit: str | None) -> Row:
    """The plan at each budget, as `lofi-fast plan --json` has it; None where nothing fits."""
    plans = {}
    for budget in BUDGETS:
        found = lofi_fast.plan(mem_budget=budget, card=CARD, encoder=encoder, pattern=PATTERN.value, epoch_time=limit)
        plans[budget] = found.to_json()["budgets"][0]["chosen"][PATTERN.value]
    return {
        "encoder": encoder, "limit": limit, "card": found.device, "pattern": PATTERN.value,
        "samples": found.epoch.windows, "plans": plans,
    }  # fmt: skip


def table(rows: Sequence[Row]) -> list[Section]:
    """What each budget buys, the newest rows of each encoder and limit."""
    ordered = sorted(rows, key=lambda row: str(row["date"]))
    newest = list({(row["encoder"], row["limit"]): row for row in ordered}.values())
    if not newest:
        return []
    lines = [
        (row["encoder"], row["limit"] or "none", *(_cell(row["plans"].get(budget)) for budget in BUDGETS))
        for row in newest
    ]
    header = ("encoder", "limit of an epoch", *(budget.replace("GB", " GB") for budget in BUDGETS))
    return [Table(f"Computed for {newest[0]['card']}; {when(newest)}:", header, lines)]


def _cell(plan: Row | None) -> str:
    """ "100x224, 4 at once, recompute: 1 h 13 min"."""
    if plan is None:
        return "nothing"
    levers = f"{plan['micro_batch']} at once{', recompute' * plan['recompute']}"
    return f"{plan['num_snippets']}x{plan['side']}, {levers}: {duration(plan['epoch_seconds'])}"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench plan", usage=USAGE, description=__doc__)
    parser.add_argument("--results", type=Path, default=RESULTS / "plan.jsonl", help="file of rows to append to")
    return parser

"""Whether a budget is kept to, as an onlooker sees it: the resident set of whole trainings on a CPU, report included,
read from outside every 10 ms.

The process's own readings are not asked. (Nor can /usr/bin/time judge: the planner resets the high-water mark that it
reads.) Budgets lie from the smallest plan's need upward, where every megabyte decides: a training may be
refused when it is planned, but not afterwards.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path

from bench.commands.planner import MODELS, VIDEOS, needs
from bench.tools.logs import read_log
from bench.tools.rows import RESULTS, ROOT, Row, append_row, environment
from bench.tools.table import Section, Table, screen, when
from lofi_fast.data import demo
from lofi_fast.errors import InputError
from lofi_fast.run import events

USAGE = "python -m bench truth [options]"
SHARES = (1.0, 1.03, 1.06, 1.1, 1.15)  # of what the smallest plan needs, as a training without a bound says it
EVERY = 0.01  # seconds between two readings
PAGE = os.sysconf("SC_PAGE_SIZE")


def main(argv: Sequence[str]) -> int:
    """Measure, append rows, print a table; 1 when a budget was passed, or refused after it was planned."""
    args = _parser().parse_args(argv)
    if args.model not in MODELS:
        raise InputError(f"--model: no model is called {args.model}; there are: {', '.join(MODELS)}")
    start = environment()
    rows: list[Row] = []
    with tempfile.TemporaryDirectory(prefix="bench-truth-", ignore_cleanup_errors=True) as name:
        folder = Path(name)
        annotations, videos = demo.generate(folder / "demo", num_training=VIDEOS, num_validation=2)
        flags = ["--annotations", str(annotations), "--videos", str(videos), "--min-cut", "1", "--device", "cpu"]
        flags += ["--threads", "1", *MODELS[args.model]]
        low, _ = needs(folder, [*flags, "--stages", "pretrain,joint", "--pretrain-epochs", "1"])
        epochs = ["--pretrain-epochs", "1", "--joint-epochs", str(args.epochs), "--head-epochs", "5"]
        for share in SHARES[: args.budgets]:
            budget, out = int(share * low), folder / f"{share}"
            told = [*flags, *epochs, "--cache", str(out / "cache"), "--mem-budget", str(budget)]
            row = {"bench": "truth", "model": args.model, "share": share, "budget": budget}
            row |= watched([*told, "--out", str(out / "run")], out / "run") | start
            append_row(args.results, row)
            rows.append(row)
            print(line(row), flush=True)
    print(f"\n{screen(table(rows))}\n{len(rows)} rows appended to {args.results}")
    return int(any(row["most"] > row["budget"] or row["ended"] == "refused late" for row in rows))


def watched(flags: Sequence[str], out: Path) -> Row:
    """Train in a process of its own and watch it: the most that it held, and how it ended."""
    command = [sys.executable, "-m", "lofi_fast.train", *flags]
    began, readings = time.perf_counter(), 0
    with subprocess.Popen(
        command, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    ) as child:  # fmt: skip
        said: list[str] = []
        assert child.stdout is not None
        reader = threading.Thread(target=lambda stream=child.stdout: said.extend(stream))
        reader.start()
        most, at = 0, "start"
        while child.poll() is None:
            if (held := resident(child.pid)) > most:
                most, at = held, said[-1].strip()[:80] if said else "start"
            readings += 1
            time.sleep(EVERY)
        reader.join()
    ended = "trained"
    if child.returncode == 2:
        steps = out.exists() and any(isinstance(event, events.Step) for event in read_log(out))
        ended = "refused late" if steps else "refused"
    elif child.returncode:
        raise RuntimeError(f"{' '.join(command)}: status {child.returncode}: {' / '.join(said[-3:])}")
    return {
        "most": most, "at": at, "readings": readings, "ended": ended,
        "said": said[-1].strip() if ended != "trained" else "",
        "rungs": rungs(out) if ended == "trained" else [], "seconds": round(time.perf_counter() - began, 1),
    }  # fmt: skip


def resident(pid: int) -> int:
    """Bytes that a process holds now; 0 when it is gone."""
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * PAGE
    except (OSError, IndexError):
        return 0


def rungs(out: Path) -> list[list[int]]:
    """[num_snippets, side] of each pattern, as planned."""
    return [chosen["rung"] for chosen in json.loads((out / "plan.json").read_text())["plans"]["joint"].values()]


def line(row: Row) -> str:
    return (
        f"{row['model']} {row['budget'] / 1e6:.0f} MB: {row['ended']}, at most {row['most'] / 1e6:.0f} MB "
        f"({100 * row['most'] / row['budget']:.1f}%) in {row['readings']} readings, at: {row['at']} {row['said']}"
    )


def table(rows: Sequence[Row]) -> list[Section]:
    """The newest run: each budget, and the most that was seen."""
    if not rows:
        return []
    newest = max(row["date"] for row in rows)
    run = [row for row in rows if row["date"] == newest]
    lines = [
        (
            row["model"], f"{row['budget'] / 1e6:.0f} MB", f"{100 * row['share']:.0f}%", row["ended"],
            f"{row['most'] / 1e6:.0f} MB, {100 * row['most'] / row['budget']:.1f}%", f"{row['readings']}", when([row]),
        )
        for row in run
    ]  # fmt: skip
    header = (
        "model", "budget", "of the smallest plan's need", "ended", "most resident, of the budget", "readings",
        "date, commit",
    )  # fmt: skip
    return [Table("", header, lines)]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench truth", usage=USAGE, description=__doc__)
    parser.add_argument("--model", default="demo", metavar="NAME", help=f"of {', '.join(MODELS)} (default: demo)")
    parser.add_argument("--budgets", type=int, default=len(SHARES), help=f"how many, 1 to {len(SHARES)} (default: all)")
    parser.add_argument("--epochs", type=int, default=6, help="of the joint stage (default: 6)")
    parser.add_argument("--results", type=Path, default=RESULTS / "truth.jsonl", help="file of rows to append to")
    return parser

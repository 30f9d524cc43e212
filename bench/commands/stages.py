"""CPU seconds of the whole job by stage, of another checkout of the project beside this one.

Each seed is trained by both (`--before DIR` is the other, with its kernels built), one after the other, so that what
else the machine does falls on both; by `--precision` this one is trained in several. Seconds are those of the
processor, of all threads, and belong to the stage whose lines the log gets.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from statistics import fmean

import psutil

from bench.tools.rows import RESULTS, ROOT, Row, append_row, environment, read_rows
from bench.tools.table import Section, Table, screen, when
from lofi_fast.errors import InputError

USAGE = "python -m bench stages --before DIR [options] [-- <arguments of lofi_fast.train>]"
STAGES = ("prepare", "pretrain", "joint", "features", "head", "eval")
BEFORE = "before"
EVERY = 0.05  # seconds between two looks at the log


def main(argv: Sequence[str]) -> int:
    """Train every seed by both, append a row for each, print the table."""
    cut = list(argv).index("--") if "--" in argv else len(argv)
    args, more = _parser().parse_args(argv[:cut]), list(argv[cut + 1 :])
    if not (args.before / "lofi_fast").is_dir():
        raise InputError(f"--before {args.before}: no checkout of the project")
    checkouts = {BEFORE: args.before.absolute()} | dict.fromkeys(args.precision.split(","), ROOT)
    start = {name: environment(checkout) for name, checkout in checkouts.items()}
    for of in start.values():
        of["date"] = start[BEFORE]["date"]  # one measurement
    with tempfile.TemporaryDirectory(prefix="bench-stages-", ignore_cleanup_errors=True) as folder:
        for seed in range(args.first, args.first + args.seeds):
            for name, checkout in checkouts.items():
                flags = [*more, "--threads", str(args.threads), "--seed", str(seed)]
                flags += ["--precision", name] if name != BEFORE else []
                out = Path(folder) / f"{name}-{seed}"
                seconds = trained(checkout, out, flags)
                metrics = json.loads((out / "metrics.json").read_text(encoding="utf-8"))
                row = {"bench": "stages", "which": name, "seed": seed, "threads": args.threads, "flags": more,
                       "seconds": seconds, "average_map": metrics["average_map"]} | start[name]  # fmt: skip
                append_row(args.results, row)
                print(f"seed {seed}, {name}: {sum(seconds.values()):.0f} CPU seconds, average mAP "
                      f"{100 * row['average_map']:.1f}", flush=True)  # fmt: skip
    print(screen(table(read_rows(args.results))))
    return 0


def trained(checkout: Path, out: Path, flags: Sequence[str]) -> dict[str, float]:
    """CPU seconds of each stage of a run, its cache's decoding included. Raises InputError where it fails."""
    out.mkdir(parents=True)
    command = [sys.executable, "-m", "lofi_fast.train", *flags, "--out", str(out), "--cache", f"{out}-cache"]
    found: Counter[str] = Counter()
    with (
        (out.parent / f"{out.name}.log").open("w+") as said,
        subprocess.Popen(
            command, cwd=checkout, env=os.environ | {"PYTHONPATH": str(checkout)}, stdout=said, stderr=said
        ) as child,
    ):
        process, before, place = psutil.Process(child.pid), 0.0, 0
        while child.poll() is None:
            time.sleep(EVERY)
            stages, place = _new_stages(out / "log.jsonl", place)
            now = _cpu_seconds(process)
            if stages and now > before:  # several lines of one look are of one stage, but for the moments between
                found[stages[-1]] += now - before
                before = now
        said.seek(0)
        if child.returncode:
            raise InputError(f"{checkout}: a training ended with status {child.returncode}: {said.read()[-500:]}")
    return {stage: round(found[stage], 2) for stage in STAGES if stage in found}  # to a tick of the CPU's clock


def _new_stages(log: Path, place: int) -> tuple[list[str], int]:
    """(stages of the lines that a log has got since it was `place` bytes long, its length now)."""
    if not log.exists():
        return [], place
    with log.open("rb") as file:
        file.seek(place)
        lines = file.read()
    lines = lines[: lines.rfind(b"\n") + 1]
    return list(filter(None, map(_stage_of, lines.splitlines()))), place + len(lines)


def _stage_of(line: bytes) -> str:
    """The stage that was at work until a line was written; empty where it does not tell."""
    event = json.loads(line)
    kinds = {"data": "prepare", "features": "features", "metrics": "eval", "done": "eval"}
    return str(event.get("stage") or kinds.get(event["event"], ""))


def _cpu_seconds(process: psutil.Process) -> float:
    """Of a process, its threads, the children that have ended and those that run."""
    spent = 0.0
    with suppress(psutil.NoSuchProcess):  # it has ended
        for one in (process, *process.children()):
            times = one.cpu_times()
            spent += times.user + times.system + times.children_user + times.children_system
    return spent


def table(rows: Sequence[Row]) -> list[Section]:
    """Of each machine the newest measurement: mean CPU seconds of each stage over the seeds, and all of them against
    before.
    """
    machines = dict.fromkeys(row["machine"] for row in rows)
    return [_newest([row for row in rows if row["machine"] == machine]) for machine in machines]


def _newest(rows: Sequence[Row]) -> Table:
    last = [row for row in rows if row["date"] == rows[-1]["date"] and row["flags"] == rows[-1]["flags"]]
    whole = {name: [row for row in last if row["which"] == name] for name in dict.fromkeys(r["which"] for r in last)}
    before = {row["seed"]: sum(row["seconds"].values()) for row in whole.get(BEFORE, [])}
    lines = []
    for name, of in whole.items():
        spent = {stage: fmean(row["seconds"].get(stage, 0.0) for row in of) for stage in STAGES}
        ratios = [before[row["seed"]] / sum(row["seconds"].values()) for row in of if row["seed"] in before]
        maps = sorted(100 * row["average_map"] for row in of)
        lines.append((
            name if name == BEFORE else f"after, {name}", str(len(of)), *(f"{value:.0f}" for value in spent.values()),
            f"{sum(spent.values()):.0f}", f"{fmean(ratios):.2f}" if ratios else "", f"{maps[0]:.1f} to {maps[-1]:.1f}",
        ))  # fmt: skip
    header = ("what", "seeds", *STAGES, "all", "times faster", "average mAP (%)")
    return Table(f"{last[0]['machine']}, {last[0]['threads']} thread; {when(last)}:", header, lines)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench stages", usage=USAGE, description=__doc__)
    parser.add_argument("--before", type=Path, required=True, metavar="DIR", help="the other checkout")
    parser.add_argument("--seeds", type=int, default=3, metavar="N", help="how many (default: 3)")
    parser.add_argument("--first", type=int, default=0, metavar="N", help="the first of them (default: 0)")
    parser.add_argument("--precision", default="bf16,fp32", help="of this checkout (default: bf16,fp32)")
    parser.add_argument("--threads", type=int, default=1, help="of each training (default: 1)")
    parser.add_argument("--results", type=Path, default=RESULTS / "stages.jsonl", help="file of rows to append to")
    return parser

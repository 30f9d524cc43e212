"""Does the GPU wait for frames? Whole joint stages of `lofi_fast.train`, each a process of its own, and what their logs
say.

Videos are made for it: for R18 at 100 snippets of 224 px such of 340 x 256 px, whose frames the cache holds as large as
it holds any for 224 px; for the demo its own. What fills the cache is not counted, nor is what comes between steps.

Frames are decoded one step ahead, so the first step of each epoch waits for all of its own; among the hundreds of steps
of an epoch of a real data set that is nothing, among the few here it is not. So there are three shares: of the first
epoch, of all later ones, and of their steps but the first of each, which is what a long training comes to.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any

from bench.tools.logs import described, read_log, violations
from bench.tools.record import record_each
from bench.tools.rows import RESULTS, ROOT, Row, alike, environment, read_rows, software
from bench.tools.table import Section, Table, by_place, newest, screen, when
from lofi_fast.errors import InputError
from lofi_fast.fidelity import FRAMES_PER_SNIPPET
from lofi_fast.precision import choose_device
from lofi_fast.run import events

USAGE = "python -m bench waits [options]"
R18 = ["--preset", "activitynet", "--batch", "4"]
# What is trained -> its flags.
SETTINGS: dict[str, list[str]] = {
    "full": [*R18, "--cut", "1"],
    "lofi": [*R18, "--pattern", "cyclic", "--min-cut", "4"],
    "demo": ["--preset", "demo"],
}
TINY = ["--fidelity", "16x32", "--width", "8", "--batch", "2", "--head.map-channels", "16"]
VIDEOS, EPOCHS, BUDGET = 24, 4, "11GB"  # one epoch, then one of each phase of the cycle
SECONDS, SIZE = 30.0, (340, 256)  # of a video
TINY_SECONDS, TINY_SIZE = 6.0, (96, 72)
SHOWN = 10  # violations of a budget that a row describes


@dataclass(frozen=True)
class Taken:
    """A step, and its seconds: since what was logged before it, so that validation and checkpoints do not count."""

    step: events.Step
    seconds: float


def main(argv: Sequence[str]) -> int:
    """Train, append rows, print a table; 1 when a training failed or passed its budget."""
    args = _parser().parse_args(argv)
    device = choose_device(args.device)
    if min(args.threads, args.videos) < 1 or args.epochs < 2:
        raise InputError("--threads and --videos must be at least 1, --epochs 2: the first one fills caches")
    usual = "full,lofi,demo" if device.type == "cuda" or args.tiny else "demo"
    asked = (args.settings or usual).split(",")
    if unknown := [name for name in asked if name not in SETTINGS]:
        raise InputError(f"--settings: there is no setting {unknown[0]}; there are: {', '.join(SETTINGS)}")
    start = environment() | software(device, args.threads) | {"quick": args.tiny}
    known = {row["setting"] for row in alike(read_rows(args.results), start)} if args.skip_measured else set()
    with tempfile.TemporaryDirectory(prefix="bench-waits-", ignore_cleanup_errors=True) as name:
        folder = Path(name)

        def training(setting: str) -> Row:
            flags = [*SETTINGS[setting], *(TINY if args.tiny else [])]
            flags += data_of(setting, folder, args.videos, args.tiny)
            flags += ["--joint-epochs", str(args.epochs), "--mem-budget", args.mem_budget, "--device", device.type]
            flags += ["--threads", str(args.threads), "--cache", str(folder / "cache")]
            return measured(flags, folder / setting)

        named: Row = {"bench": "waits", "videos": args.videos, "epochs": args.epochs}
        cases = [(named | {"setting": one}, partial(training, one)) for one in asked if one not in known]
        rows, failed = record_each(cases, start, args.results, line)
    print(f"\n{screen(table(rows))}\n{len(rows)} rows appended to {args.results}")
    return int(failed or any(row["violations"] for row in rows))


def data_of(setting: str, folder: Path, count: int, tiny: bool) -> list[str]:
    """Make the videos of a setting, where they are not there yet; the flags that name them."""
    from bench.tools import footage  # what decodes is imported where videos are made
    from lofi_fast.data import demo

    if setting == "demo":
        annotations, videos = demo.generate(folder / "demo", num_training=count, num_validation=1)
    else:
        size = (TINY_SECONDS, *TINY_SIZE) if tiny else (SECONDS, *SIZE)
        annotations, videos = footage.generate(folder, count, *size)
    # PyAV starts sooner than the video engine's processes; the pictures in the cache are the same.
    return ["--annotations", str(annotations), "--videos", str(videos), "--data.decoder", "pyav"]


def measured(flags: Sequence[str], out: Path) -> Row:
    """Train in a process of its own. Raises RuntimeError where it ends with another status than 0."""
    command = [sys.executable, "-m", "lofi_fast.train", *flags, "--stages", "joint", "--out", str(out), "--plain"]
    paths = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    done = subprocess.run(
        command, cwd=ROOT, env=os.environ | {"PYTHONPATH": paths}, text=True, capture_output=True, check=False
    )
    if done.returncode:
        said = (done.stdout + done.stderr).strip().splitlines()[-3:]
        raise RuntimeError(f"{out.name}: status {done.returncode}: {' / '.join(said)}")
    machine = json.loads((out / "environment.json").read_text(encoding="utf-8"))
    config = json.loads((out / "config.json").read_text(encoding="utf-8"))
    decoder = "DALI on the CPU" if machine["device"].startswith("CPU,") else "DALI on the GPU"
    return {
        "preset": config["preset"], "encoder": config["encoder"]["name"],
        "fidelity": [config["full"]["num_snippets"], config["full"]["side"]], "batch": config["joint"]["batch"],
        "precision": machine["precision"], "decoder": decoder, **summary(read_log(out)),
    }  # fmt: skip


def summary(log: Sequence[events.AnyEvent]) -> Row:
    """What the log of a training says of waiting, and of its memory."""
    steps = list(taken(log))
    first = [one for one in steps if one.step.epoch == 0]
    after = [one for one in steps if one.step.epoch > 0]
    alone = [one.step for one in steps]
    over = violations(alone, [event for event in log if isinstance(event, events.Measured)])
    rungs = dict.fromkeys((one.step.pattern, one.step.num_snippets, one.step.side) for one in steps)
    return {
        "first": share(first), "after": share(after), "within": share(one for one in after if one.step.step > 0),
        "rungs": [list(rung) for rung in rungs], "peak": max((step.peak or 0 for step in alone), default=0),
        "budget": max((step.budget for step in alone), default=0), "violations": len(over),
        "over": [described(event) for event in over][:SHOWN],
    }  # fmt: skip


def taken(log: Iterable[events.AnyEvent]) -> Iterator[Taken]:
    """The steps of the joint stage."""
    before = None
    for event in log:
        if isinstance(event, events.Step) and event.stage == "joint" and before is not None:
            yield Taken(event, (datetime.fromisoformat(event.time) - before).total_seconds())
        before = datetime.fromisoformat(event.time)


def share(steps: Iterable[Taken]) -> Row:
    """Of some steps: how many, their seconds, the seconds of them that were spent waiting for frames, and their share,
    None without steps; frames a second.
    """
    steps = list(steps)
    seconds, waited = sum(one.seconds for one in steps), sum(one.step.waited for one in steps)
    frames = FRAMES_PER_SNIPPET * sum(one.step.samples * one.step.num_snippets for one in steps)
    return {
        "steps": len(steps), "seconds": round(seconds, 3), "waited": round(waited, 3),
        "share": round(waited / seconds, 4) if seconds else None,
        "frames_a_second": round(frames / seconds, 1) if seconds else None,
    }  # fmt: skip


def line(row: Row) -> str:
    after = row["after"]
    return (
        f"{row['setting']}: waited {_percent(row['first'])} of the first epoch, {_percent(after)} afterwards, "
        f"{_percent(row['within'])} but for the first step of each epoch; {after['steps']} steps in "
        f"{after['seconds']:.1f} s, {after['frames_a_second'] or 0:.0f} frames a second, {row['violations']} violations"
    )


def table(rows: Sequence[Row]) -> list[Section]:
    """The newest training of each setting."""
    header = (
        "training", "rungs", "waited: first epoch", "later epochs", "their steps but the first", "steps, seconds",
        "frames a second", "peak of the budget", "violations", "precision", "decoder",
    )  # fmt: skip
    parts: list[Section] = []
    for where, here in by_place(newest(rows, ("setting",))):
        lines = []
        for row in here:
            after: dict[str, Any] = row["after"]
            rungs = dict.fromkeys(f"{length}x{side}" for _, length, side in row["rungs"])
            lines.append((
                f"{row['setting']}: {row['preset']}, {row['encoder']}, {row['batch']} videos a step", ", ".join(rungs),
                *(_percent(row[part]) for part in ("first", "after", "within")),
                f"{after['steps']}, {after['seconds']:.1f}", f"{after['frames_a_second'] or 0:,.0f}",
                f"{row['peak'] / 1e9:.2f} of {row['budget'] / 1e9:.2f} GB", str(row["violations"]),
                row["precision"].split(" (")[0], row["decoder"],
            ))  # fmt: skip
        parts.append(Table(f"{where}; {when(here)}:", header, lines))
    return parts


def _percent(part: Row) -> str:
    return "no steps" if part["share"] is None else f"{100 * part['share']:.1f}%"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench waits", usage=USAGE, description=__doc__)
    parser.add_argument(
        "--device", choices=("auto", "cpu", "cuda"), default="auto", help="default: a GPU if there is one"
    )
    parser.add_argument("--settings", metavar="A,B", help=f"of {', '.join(SETTINGS)} (default: all; on a CPU demo)")
    parser.add_argument("--videos", type=int, default=VIDEOS, help=f"to train on (default: {VIDEOS})")
    parser.add_argument("--epochs", type=int, default=EPOCHS, help=f"of each training (default: {EPOCHS})")
    parser.add_argument("--mem-budget", default=BUDGET, metavar="BUDGET", help=f"default: {BUDGET}")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of the training (default: 1)")
    parser.add_argument("--tiny", action="store_true", help="few pixels and a small network: does everything run?")
    parser.add_argument("--skip-measured", action="store_true", help="leave out settings that these results hold")
    parser.add_argument("--results", type=Path, default=RESULTS / "waits.jsonl", help="file of rows to append to")
    return parser

"""The whole job, measured from outside: `python -m lofi_fast.train` as its own process, one row for each run.

With `--roll-labels` the training labels are moved by half a video first. That is the control that must fail: a model
that detects as well after learning from such labels did not learn when actions happen.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from datetime import datetime
from pathlib import Path
from statistics import fmean
from typing import Any

from bench.tools.logs import read_log
from bench.tools.rows import RESULTS, ROOT, Row, append_row, environment
from bench.tools.table import MISSING, Section, Table
from lofi_fast.config import Config
from lofi_fast.data import demo
from lofi_fast.data.annotations import load_annotations
from lofi_fast.data.matching import find_videos
from lofi_fast.data.video import VideoError, probe
from lofi_fast.errors import InputError
from lofi_fast.run import events
from lofi_fast.train import read_flags

USAGE = "python -m bench job [options] -- <arguments of lofi_fast.train>"
EXPECTED = (("demo", "true"), ("demo", "rolled"), ("ceiling", "true"))  # these have a line even without a row
TIOUS = ("0.3", "0.5", "0.7")
SAME = ("commit", "dirty", "machine", "device", "precision", "settings")  # what seeds must share to be averaged
HEADER = (
    "what", "seeds", *(f"mAP@{tiou} (%)" for tiou in TIOUS), "average mAP (%)",
    "training (min)", "peak memory", "machine", "date, commit",
)  # fmt: skip


def main(argv: Sequence[str]) -> int:
    """Run the job once for each seed; the status of the first run that fails, else 0."""
    cut = list(argv).index("--") if "--" in argv else len(argv)
    args = _parser().parse_args(argv[:cut])
    given = list(argv[cut + 1 :])
    config, resume = read_flags(given, cuda=lambda: False)
    if config.out or resume or config.seed:
        raise InputError("--out, --resume and --seed belong to the bench: use its --keep and --repeat-seeds")
    if config.data.annotations and not args.name:
        raise InputError("give your data a --name: the tables tell jobs apart by it")
    labels = "rolled" if args.roll_labels else "true"
    name = args.name or "demo"
    if not re.fullmatch(r"[\w.-]+", name):  # it goes into file names and a table
        raise InputError(f'--name "{name}": use letters, digits, and . _ -')
    seeds = _seeds(args.repeat_seeds)

    with ExitStack() as stack:
        folder = args.keep or Path(
            stack.enter_context(tempfile.TemporaryDirectory(prefix="bench-job-", ignore_cleanup_errors=True))
        )
        folder.mkdir(parents=True, exist_ok=True)
        cache = Path(config.data.cache) if config.data.cache else folder / "cache"
        arguments = given if config.data.cache else [*given, "--cache", str(cache)]
        if args.roll_labels:
            arguments = [*arguments, *rolled(config, cache, folder / f"{name}-rolled.json")]
        for seed in seeds:
            out = folder / f"{name}-{labels}-seed{seed}"
            row: Row = {"bench": "job", "name": name, "seed": seed, "labels": labels}
            status = measure(row, [*arguments, "--seed", str(seed), "--out", str(out)], out, args.results)
            if status:
                print(f"bench: seed {seed} ended with status {status}: no row", file=sys.stderr)
                return status
    return 0


def measure(row: Row, arguments: Sequence[str], out: Path, results: Path) -> int:
    """Run one training and append its row to `results`; returns the exit status, without a row unless it is 0."""
    started = environment()  # before the run: the code that ran, even if it is edited meanwhile
    # The tree that `started` names the commit of, whatever else is installed.
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    began = time.perf_counter()
    with subprocess.Popen(
        [sys.executable, "-m", "lofi_fast.train", *arguments], env=os.environ | {"PYTHONPATH": path}
    ) as child:
        try:
            _, code, usage = os.wait4(child.pid, 0)
        except KeyboardInterrupt:  # the child was interrupted too, and says how to go on
            child.wait()
            raise
        child.returncode = os.waitstatus_to_exitcode(code)
    seconds = time.perf_counter() - began
    if child.returncode:
        return child.returncode if child.returncode > 0 else 128 - child.returncode
    # The largest resident set of any one process of the run, by the kernel's account: every stage, decoding too.
    row |= {"seconds": round(seconds, 1), "resident_peak": usage.ru_maxrss * 1024, **results_of(out), **started}
    row["command"] = " ".join(["python", "-m", "lofi_fast.train", *without_paths(arguments)])
    append_row(results, row)
    print(f"bench: row of {row['name']}, labels {row['labels']}, seed {row['seed']} appended to {results}", flush=True)
    return 0


def results_of(out: Path) -> Row:
    """What a run folder tells: mAP (fractions; None without an evaluation), seconds, bytes, plan, settings, versions.

    `peak` is the most that the process held in any joint step or trial step of the planner, by the run's own meter.
    """
    config, machine, plans = (_read(out / f"{name}.json") for name in ("config", "environment", "plan"))
    evaluated = (out / "metrics.json").exists()  # not when --stages leaves eval out
    metrics = _read(out / "metrics.json") if evaluated else {"average_map": None, "map_by_tiou": {}}
    log = read_log(out)
    times = {type(event): datetime.fromisoformat(event.time) for event in log}
    peaks = [e.peak for e in log if isinstance(e, events.Measured | events.Step) and e.peak is not None]
    stages = {"pretrain": "pretrain", "joint": "joint", "head": "head_stage"}
    return {
        "average_map": metrics["average_map"],
        "map_by_tiou": metrics["map_by_tiou"],
        "prepare_seconds": round((times[events.Data] - times[events.Start]).total_seconds(), 1),
        "training_seconds": next(e.seconds for e in log if isinstance(e, events.Done)),
        "peak": max(peaks, default=None),
        "budget": plans["budget"],
        "plan": {
            stage: {key: _without_readings(value) for key, value in plan.items() if key != "peak"}
            for stage, plan in plans["plans"].items()
        },
        "settings": {
            "preset": config["preset"],
            "stages": config["stages"],
            "fidelity": [config["full"]["num_snippets"], config["full"]["side"]],
            "encoder": config["encoder"]["name"],
            "width": config["encoder"]["width"],
            "weights": config["encoder"]["weights"] is not None,
            "epochs": {stage: config[field]["epochs"] for stage, field in stages.items()},
            "lr": {stage: config[field]["lr"] for stage, field in stages.items()},
            "batch": {stage: config[field]["batch"] for stage, field in stages.items()},
            "pattern": config["pattern"],
            "cut": [config["min_cut"], config["max_cut"]],
            "window": config["data"]["window"],
            "frame_stride": config["data"]["frame_stride"],
            "budget": config["budget"]["text"],
            "threads": machine["threads"],
        },
        "device": machine["device"],
        "precision": machine["precision"],
        "kernels": machine["kernels"],
        "versions": {"lofi_fast": machine["lofi_fast"], "python": machine["python"], **machine["packages"]},
    }


def table(rows: Sequence[Row]) -> list[Section]:
    """One line for each (name, labels), from its newest measurement."""
    found = dict.fromkeys((row["name"], row["labels"]) for row in rows)
    lines = []
    for name, labels in dict.fromkeys((*EXPECTED, *sorted(found))):
        what = name if labels == "true" else f"{name}, rolled labels"
        newest = newest_measurement([row for row in rows if (row["name"], row["labels"]) == (name, labels)])
        lines.append((what, *(_cells(newest) if newest else [MISSING] * (len(HEADER) - 1))))
    return [Table("", HEADER, lines)]


def newest_measurement(rows: Iterable[Row]) -> list[Row]:
    """The newest row and, of every other seed, the newest made by the same code with the same settings; by seed."""
    rows = sorted(rows, key=lambda row: str(row["date"]))
    seeds = {row["seed"]: row for row in rows if all(row[key] == rows[-1][key] for key in SAME)}
    return [seeds[seed] for seed in sorted(seeds)]


def _cells(rows: Sequence[Row]) -> list[str]:
    last = max(rows, key=lambda row: str(row["date"]))
    peaks = [row["peak"] for row in rows if row["peak"] is not None]
    machine = last["machine"] if last["device"].startswith("CPU,") else last["device"]
    return [
        ", ".join(str(row["seed"]) for row in rows),
        *(_mean(row["map_by_tiou"].get(tiou) for row in rows) for tiou in TIOUS),
        _mean(row["average_map"] for row in rows),
        _mean((row["training_seconds"] for row in rows), 1 / 60),
        f"{max(peaks) / 1e9:.2f} of {last['budget'] / 1e9:.2f} GB" if peaks else MISSING,
        f"{machine}, {last['precision'].split(' (')[0]}",
        f"{last['date'][:10]}, {last['commit'][:7]}{' with changes' if last['dirty'] else ''}",
    ]


def _mean(values: Iterable[float | None], scale: float = 100) -> str:
    """The mean, and the range when there are several; "not measured" when one is missing."""
    known: list[float] = []
    for value in values:
        if value is None:
            return MISSING
        known.append(scale * value)
    spread = f" ({min(known):.1f} to {max(known):.1f})" if len(known) > 1 else ""
    return f"{fmean(known):.1f}{spread}"


def _read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def _without_readings(value: Any) -> Any:
    return {k: v for k, v in value.items() if k not in ("measured", "ladder")} if isinstance(value, dict) else value


def rolled(config: Config, cache: Path, copy: Path) -> list[str]:
    """Write the labels with training segments moved by half a video to `copy`; returns the flags that select it.

    Without data of its own the config means the demo set, which is made in `cache`, where the run itself would make it.
    Training videos whose duration nobody knows are left out: the run could not read them either.
    """
    flags: list[str] = []
    if config.data.annotations and config.data.videos:
        annotations, videos = Path(config.data.annotations), Path(config.data.videos)
    else:
        annotations, videos = demo.generate(cache / "demo")
        flags = ["--preset", "demo"]  # labels given by hand would change the preset
    known = [video for video in load_annotations(annotations).videos if video.subset != "testing"]
    paths = find_videos(videos, [video.name for video in known]).paths
    database: dict[str, Any] = {}
    for video in known:
        duration = video.duration
        if duration is None and video.subset == "training":
            try:
                duration = probe(paths[video.name]).duration
            except (KeyError, VideoError):
                print(f"bench: {video.name} is left out: it cannot be read", file=sys.stderr)
                continue
        segments = [{"segment": [s.start, s.end], "label": s.label} for s in video.segments]
        database[video.name] = {"subset": video.subset, "annotations": segments}
        if duration is not None:
            database[video.name]["duration"] = duration
    copy.write_text(json.dumps(demo.roll_annotations({"database": database}), indent=1) + "\n")
    return [*flags, "--annotations", str(copy), "--videos", str(videos)]


def without_paths(arguments: Iterable[str]) -> list[str]:
    """Arguments fit for a row: paths inside the project relative to it, any other path as its last component."""
    shortened = []
    for argument in arguments:
        flag, equals, value = argument.partition("=") if argument.startswith("--") else ("", "", argument)
        if os.sep in value:
            path = Path(os.path.abspath(value))
            value = str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else path.name
        shortened.append(flag + equals + value)
    return shortened


def _seeds(text: str) -> list[int]:
    parts = text.split(",")
    if not all(part.strip().isdecimal() for part in parts):
        raise InputError(f'--repeat-seeds "{text}": write whole numbers like 0,1,2')
    return list(dict.fromkeys(int(part) for part in parts))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench job", usage=USAGE, description=__doc__)
    parser.add_argument("--name", help="what the tables call this job (default: demo, for the demo set)")
    parser.add_argument("--roll-labels", action="store_true", help="train on labels moved by half a video")
    parser.add_argument("--repeat-seeds", metavar="0,1,2", default="0", help="a run for each seed (default: 0)")
    parser.add_argument("--results", type=Path, default=RESULTS / "job.jsonl", help="file of rows to append to")
    parser.add_argument("--keep", type=Path, metavar="DIR", help="keep run folders and cache here, not in a temporary "
                        "folder; a cache that is already filled shortens the run's whole seconds")  # fmt: skip
    return parser

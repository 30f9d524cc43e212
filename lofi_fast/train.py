"""The main job: from videos, labels and a memory budget to a trained temporal action detector.

    python -m lofi_fast.train --mem-budget 11GB
    python -m lofi_fast.train --mem-budget 11GB --annotations a.json --videos v/ --out runs/x

This file wires the rooms together and holds nothing else: prepare the data, then the stages in order, each in a file
of its own: pretrain, joint (LoFi), head, eval.
"""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Any

import torch

from lofi_fast import __version__, checkpoint
from lofi_fast.config import Config, from_arguments
from lofi_fast.data import demo
from lofi_fast.data.dataset import Dataset, load_dataset
from lofi_fast.detect import load_video_scores
from lofi_fast.errors import InputError
from lofi_fast.evaluate import MapResult, parse_tiou
from lofi_fast.joint import joint
from lofi_fast.kernels import library
from lofi_fast.localize import evaluate, train_head
from lofi_fast.log import RunLog
from lofi_fast.memory.meter import Meter, is_out_of_memory, open_meter, settle_allocator
from lofi_fast.plan import gigabytes, resolve_budget
from lofi_fast.precision import Precision, choose_device, choose_precision
from lofi_fast.pretrain import pretrain
from lofi_fast.report import write_report
from lofi_fast.run import Run, environment

PLANNED_FOR = ("budget", "min_cut", "max_cut")  # when one of these changes, the plans are made again
MAY_CHANGE = (*PLANNED_FOR, "stages", "threads", "device", "out", "data.cache")  # between a run and its --resume
DISK_FULL = (errno.ENOSPC, errno.EDQUOT)
RESULTS = ("metrics.json", "predictions.json", "ground_truth.json", "report.html", "plan.json", "log.jsonl",
           "checkpoints", "features")  # fmt: skip


def train(argv: Sequence[str] | None = None) -> MapResult | None:
    """The whole job. Raises InputError, with a sentence for the user, for anything that is theirs to mend."""
    config, resume = from_arguments(argv, cuda=torch.cuda.is_available())
    check_values(config)
    config = dataclasses.replace(config, out=str(choose_folder(config, resume)))
    device = choose_device(config.device)
    if config.threads:
        torch.set_num_threads(config.threads)
    precision = choose_precision(device)
    meter = open_meter(device)
    budget = resolve_budget(config.budget, meter.total(), meter.available())
    going_on = resume and has_checkpoint(config)
    with run_folder(config, resume, going_on) as folder, closing(RunLog(folder / "log.jsonl")) as log:
        introduce(log, config, meter, precision, budget)
        dataset = prepare(config, log)
        run = Run(config, dataset, device, precision, meter, budget, log)
        extra = run.resume() if going_on else {}
        if going_on:
            log.say(f"resuming at {run.position.stage}, epoch {run.position.epoch + 1}, step {run.position.step + 1}")
            before, now = json.loads((folder / "config.json").read_text()), json.loads(config.to_json())
            if any(before.get(name) != now[name] for name in PLANNED_FOR):
                run.plans = {}  # a plan holds for the budget it was made for
        elif resume:
            log.say("the run ended before its first checkpoint: starting again")
        run.write_json("config.json", json.loads(config.to_json()))
        run.write_json("environment.json", environment(meter.device, precision, library.describe()))

        began = time.monotonic()
        pretrain(run, extra)
        joint(run)
        train_head(run)
        result = evaluate(run)
        run.write_plans()
        log.event("done", seconds=round(time.monotonic() - began, 1))
        write_report(folder)
        log.say(f"trained in {time.monotonic() - began:.0f} s; written:")
        for name in RESULTS:
            if (folder / name).exists():
                log.say(f"  {folder / name}")
        return result


def check_values(config: Config) -> None:
    """What would otherwise be found wrong only after hours of decoding or training."""
    parse_tiou(config.detect.tious)
    for flag, name in (("--encoder-weights", config.encoder.weights), ("--video-scores", config.data.video_scores)):
        if name and not os.path.isfile(name):
            raise InputError(f"{flag} {name}: no such file")


def choose_folder(config: Config, resume: bool) -> Path:
    """The run folder: --out, or runs/<preset>, numbered when that one is taken; with --resume the newest of these."""
    asked = Path(config.out)
    taken = (asked / "config.json").exists()
    if asked != Path("runs") / config.preset:
        if taken and not resume:
            raise InputError(f"{asked} already holds a run: go on with it by --resume, or name another --out")
        return asked
    numbered = [asked, *(asked.with_name(f"{asked.name}-{n}") for n in range(2, 10_000))]
    used = [folder for folder in numbered if (folder / "config.json").exists()]
    if resume and used:
        return max(used, key=lambda folder: (folder / "config.json").stat().st_mtime)
    return next(folder for folder in numbered if not (folder / "config.json").exists())


def has_checkpoint(config: Config) -> bool:
    """Whether the run in --out has a checkpoint to go on from; one that ended before its first may start again.

    Raises InputError when there is no run, when it is not the run of this command, or its checkpoint is unusable.
    """
    folder = Path(config.out)
    try:
        before = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        before = None
    if not isinstance(before, dict):
        raise InputError(f"{folder}: no run to resume (no readable config.json); name the run's --out")
    if not any((folder / name).exists() for name in ("checkpoints/last.pt", "checkpoints/best.pt", "metrics.json")):
        return False
    if change := first_change(before, json.loads(config.to_json())):
        raise InputError(
            f"{folder}: this run was started with {change}; give --resume the flags that it was started with"
        )
    checkpoint.load(folder / "checkpoints" / "last.pt")
    return True


def first_change(before: Mapping[str, Any], now: Mapping[str, Any], section: str = "") -> str:
    """The first setting that differs and must not, like "encoder.width 8, not 16"; empty when there is none."""
    for key, value in now.items():
        name, old = section + key, before.get(key)
        if name in MAY_CHANGE:
            continue
        if isinstance(value, dict) and isinstance(old, dict):
            if change := first_change(old, value, f"{name}."):
                return change
        elif old != value:
            return f"{name} {old}, not {value}"
    return ""


@contextmanager
def run_folder(config: Config, resume: bool, going_on: bool) -> Iterator[Path]:
    """Make the run folder, mark it as taken with the config, and see that it can be written to.

    When a new run is refused before it has trained anything, what it wrote is removed: the next may want the name.
    """
    folder = Path(config.out)
    made = not os.path.exists(folder)
    partial = folder / "config.json.partial"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        partial.write_text(config.to_json() + "\n", encoding="utf-8")
        if going_on:
            partial.unlink()
        else:
            partial.replace(folder / "config.json")
    except OSError as error:
        discard(folder, [partial.name], made)
        mend = "free some space or change --out" if error.errno in DISK_FULL else "change --out"
        raise InputError(f"{folder}: cannot write there ({error.strerror}); {mend}") from None
    try:
        yield folder
    except Exception as error:
        if isinstance(error, OSError):
            error.filename = error.filename or str(folder)  # a failed write does not say where
        if not resume and not has_trained(folder):
            discard(folder, ["plan.json", "environment.json", "log.jsonl", "config.json"], made)
        raise


def has_trained(folder: Path) -> bool:
    """Whether a run has done anything that would have to be done again."""
    log = folder / "log.jsonl"
    return any((folder / "checkpoints").glob("*.pt")) or (log.exists() and '"event": "step"' in log.read_text())


def discard(folder: Path, names: Sequence[str], made: bool) -> None:
    """Remove files of a run that came to nothing, and the folder if it was `made` for it."""
    with suppress(OSError):
        for name in names:
            (folder / name).unlink(missing_ok=True)
        if made:
            folder.rmdir()


def introduce(log: RunLog, config: Config, meter: Meter, precision: Precision, budget: int) -> None:
    """Say what runs where, and in how much memory."""
    log.say(f"lofi_fast {__version__} · {meter.device} · {torch.get_num_threads()} threads · {precision}")
    log.say(f"kernels: {library.describe()}")
    room = meter.available()
    log.say(
        f"memory budget {config.budget.text}: {gigabytes(budget)} = {budget / 2**30:.2f} GiB of {meter.source}; "
        f"this process holds {gigabytes(meter.own())}, {gigabytes(room)} can be had"
        f"{', which binds' if room < budget else ''}"
    )
    log.say(
        f"preset {config.preset}: full fidelity {config.full}, {config.encoder.name} of width {config.encoder.width}, "
        f"pattern {config.pattern}, cut {config.min_cut:g} to {config.max_cut:g}, run folder {config.out}"
    )
    log.event("start", device=meter.device, precision=str(precision), budget=budget, available=room, argv=sys.argv[1:])


def prepare(config: Config, log: RunLog) -> Dataset:
    """Make the demo set if no data is given, then index, decode into the frame cache, and cut windows."""
    root = Path(config.data.cache) if config.data.cache else Path(config.out).parent / "cache"
    if config.data.annotations and config.data.videos:
        annotations, videos = Path(config.data.annotations), Path(config.data.videos)
    else:
        with log.progress("demo videos", 1) as advance:
            annotations, videos = demo.generate(
                root / "demo", progress=lambda done, total, name: advance(done, name, total)
            )
    with log.progress("frame cache", 1) as advance:
        dataset = load_dataset(config, annotations, videos, root / "frames", lambda d, t, name: advance(d, name, t))
    for note in dataset.notes:
        log.say(f"note: {note}")
    for skipped in dataset.skipped:
        log.say(f"skipped: {skipped.name}: {skipped.reason}")
        log.event("skipped", video=skipped.name, path=skipped.path, reason=skipped.reason)
    if config.data.video_scores:  # read again for every evaluation; a mistake in it must not wait for the first
        names = [video.name for video in dataset.videos["validation"]]
        load_video_scores(Path(config.data.video_scores), names, dataset.classes)
    counts = ", ".join(
        f"{len(dataset.videos[subset])} {subset} videos ({len(dataset.samples[subset])} windows, "
        f"{sum(len(v.segments) for v in dataset.videos[subset])} segments)"
        for subset in dataset.videos
    )
    log.say(f"data: {counts}, {len(dataset.classes)} classes, {len(dataset.skipped)} videos skipped")
    log.event("data", classes=list(dataset.classes), skipped=len(dataset.skipped))
    return dataset


def main(argv: Sequence[str] | None = None) -> int:
    """0 when the job is done, 2 for what the user can mend, 130 when interrupted."""
    try:
        train(argv)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        if error.errno not in (*DISK_FULL, errno.EACCES, errno.EPERM, errno.EROFS):
            raise
        print(
            f"error: {error.filename}: {error.strerror}; change --out or --cache, or free some space", file=sys.stderr
        )
        return 2
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        print(
            f"error: memory ran out outside the planned steps ({' '.join(str(error).split())}); "
            "take a smaller --encoder, --width or --fidelity, or free some memory",
            file=sys.stderr,
        )
        return 2
    except KeyboardInterrupt:
        print("\ninterrupted; the same command with --resume goes on from the last checkpoint", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    settle_allocator("lofi_fast.train", sys.argv[1:])
    sys.exit(main())

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
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from lofi_fast import __version__, checkpoint
from lofi_fast.config import Config, from_arguments
from lofi_fast.data import demo
from lofi_fast.data.dataset import Dataset, load_dataset
from lofi_fast.errors import InputError
from lofi_fast.evaluate import MapResult, parse_tiou
from lofi_fast.joint import joint
from lofi_fast.kernels import library
from lofi_fast.localize import evaluate, train_head
from lofi_fast.log import RunLog
from lofi_fast.memory.meter import Meter, open_meter, settle_allocator
from lofi_fast.plan import gigabytes, resolve_budget
from lofi_fast.precision import Precision, choose_device, choose_precision
from lofi_fast.pretrain import pretrain
from lofi_fast.report import write_report
from lofi_fast.run import Run, environment

MAY_CHANGE = ("budget", "stages", "threads", "device", "out")  # between a run and its --resume
RESULTS = ("metrics.json", "predictions.json", "ground_truth.json", "report.html", "plan.json", "log.jsonl",
           "checkpoints", "features")  # fmt: skip


def train(argv: Sequence[str] | None = None) -> MapResult | None:
    """The whole job. Raises InputError, with a sentence for the user, for anything that is theirs to mend."""
    config, resume = from_arguments(argv, cuda=torch.cuda.is_available())
    parse_tiou(config.detect.tious)
    config = dataclasses.replace(config, out=str(choose_folder(config, resume)))
    device = choose_device(config.device)
    if config.threads:
        torch.set_num_threads(config.threads)
    precision = choose_precision(device)
    meter = open_meter(device)
    budget = resolve_budget(config.budget, meter.total(), meter.available())
    folder = open_folder(config, resume)
    log = RunLog(folder / "log.jsonl")
    try:
        introduce(log, config, meter, precision, budget)
        dataset = prepare(config, log)
        run = Run(config, dataset, device, precision, meter, budget, log)
        extra = run.resume() if resume else {}
        if resume:
            log.say(f"resuming at {run.position.stage}, epoch {run.position.epoch + 1}, step {run.position.step + 1}")
            if json.loads((folder / "config.json").read_text())["budget"] != dataclasses.asdict(config.budget):
                run.plans = {}  # a plan holds for the budget it was made for
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
    finally:
        log.close()


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


def open_folder(config: Config, resume: bool) -> Path:
    """Create the run folder, or check that an existing one is a run that this command can go on with."""
    folder = Path(config.out)
    if resume:
        try:
            before = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            raise InputError(f"{folder}: no run to resume (no readable config.json); name the run's --out") from None
        now = json.loads(config.to_json())
        changed = [name for name in now if name not in MAY_CHANGE and before.get(name) != now[name]]
        if changed:
            raise InputError(
                f"{folder}: this run was started with another {changed[0]} setting; resume it with the same flags"
            )
        checkpoint.load(folder / "checkpoints" / "last.pt")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / ".writable"
        probe.write_text("")
        probe.unlink()
    except OSError as error:
        raise InputError(f"{folder}: cannot write there ({error.strerror}); change --out") from None
    return folder


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
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS):
            raise
        print(
            f"error: {error.filename}: {error.strerror}; change --out or --cache, or free some space", file=sys.stderr
        )
        return 2
    except KeyboardInterrupt:
        print("\ninterrupted; the same command with --resume goes on from the last checkpoint", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    settle_allocator("lofi_fast.train", sys.argv[1:])
    sys.exit(main())

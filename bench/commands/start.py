"""How long a training takes to begin when its frame cache is full: seconds and memory, part by part, over the number of
videos.

The labels are ActivityNet's where `--annotations` names its file, repeated under other names as often as is needed, or
made up. Videos and cache entries are made up: files of one byte, what a probe would have found out about them, and
indices of pictures that are not there. Everything that a training does before it plans its stages is done with them.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from numpy.typing import NDArray

from bench.tools.rows import RESULTS, ROOT, Row, append_row, environment
from bench.tools.table import Section, Table, screen, when
from lofi_fast.config import Config
from lofi_fast.data.cache import CacheRequest, entry_path
from lofi_fast.data.catalogue import Catalogue
from lofi_fast.data.survey import cache_side
from lofi_fast.data.video import VideoInfo
from lofi_fast.data.windows import cut_windows, full_grid
from lofi_fast.presets import configured

USAGE = "python -m bench start [options]"
COUNTS = (1_000, 20_000)
RATE, TICK = 30, 512  # frames a second, and ticks of 1/15360 s from one to the next
KEY_EVERY = 60  # frames from one key frame to the next
PICTURE = 9000  # bytes of one that is not there
LINKS = 30_000  # names of one file; ext4 allows 65,000
A_FOLDER = 4_000  # videos in one


def main(argv: Sequence[str]) -> int:
    """Measure each number of videos in a process of its own, append rows, print the table."""
    args = _parser().parse_args(argv)
    if args.measured is not None:
        print(json.dumps(measured(args.measured)))
        return 0
    start = environment() | {"quick": args.quick}
    rows: list[Row] = []
    for count in args.videos or ((50,) if args.quick else COUNTS):
        with tempfile.TemporaryDirectory(prefix="bench-start-", dir=args.folder, ignore_cleanup_errors=True) as name:
            make(Path(name), count, args.annotations, args.seconds)
            command = [sys.executable, "-m", "bench", "start", "--measured", name]
            for state in ("catalogue as made", "catalogue of the run before"):
                done = subprocess.run(
                    command,
                    cwd=ROOT,
                    stdout=subprocess.PIPE,
                    text=True,
                    check=True,
                    env=os.environ | {"PYTHONPATH": str(ROOT)},
                )
                row = {"bench": "start", "state": state, "videos": count, "labels": _labels(args)}
                row |= json.loads(done.stdout.splitlines()[-1])
                append_row(args.results, row | start)
                rows.append(row | start)
    print(f"{screen(table(rows))}\n{len(rows)} rows appended to {args.results}")
    return 0


def _labels(args: argparse.Namespace) -> str:
    what = f"{args.seconds:g} s long" if args.seconds else "of ActivityNet's lengths"
    return f"of {args.annotations.name}" if args.annotations else f"made up, {what}"


# Making


def make(folder: Path, count: int, annotations: Path | None, seconds: float | None) -> None:
    """labels.json, videos/ and cache/ of `count` videos; `seconds`: of all of them, None for many lengths."""
    generator = np.random.default_rng(0)
    if annotations is not None:
        real = list(json.loads(annotations.read_text(encoding="utf-8"))["database"].values())
    else:
        real = [_made_up(generator, seconds, min(200, count // 10)) for _ in range(min(count, 2_000))]
    database = {}
    for number in range(count):
        subset = "validation" if number % 3 == 2 else "training"
        database[f"v_{number:07d}"] = real[number % len(real)] | {"subset": subset}
    (folder / "labels.json").write_text(json.dumps({"database": database}), encoding="utf-8")
    config, frames = config_of(folder), folder / "cache" / "frames"
    known = Catalogue(frames)
    firsts: dict[tuple[int, int], Path] = {}
    infos: dict[float, tuple[VideoInfo, NDArray[np.int64]]] = {}
    for number, (name, video) in enumerate(database.items()):
        path = folder / "videos" / f"{number // A_FOLDER:04d}" / f"{name}.mp4"
        if number % A_FOLDER == 0:
            path.parent.mkdir(parents=True)
        path.write_bytes(b"x")
        if video["duration"] not in infos:
            info = _info(video["duration"])
            [window] = cut_windows(name, info.duration, None, 0.5)
            infos[video["duration"]] = (
                info, np.unique(full_grid(info, window, config.full.num_snippets, config.data.frame_stride))
            )  # fmt: skip
        info, wanted = infos[video["duration"]]
        info = known.add_info(_at(info, path))
        _entry(entry_path(CacheRequest(name, info, wanted), frames, cache_side(config.full)), wanted, number, firsts)
    known.save()


def config_of(folder: Path) -> Config:
    words = {
        "preset": "activitynet", "annotations": folder / "labels.json", "videos": folder / "videos",
        "cache": folder / "cache", "out": folder / "run",
    }  # fmt: skip
    return configured({name: str(value) for name, value in words.items()}, cuda=lambda: False)


def _made_up(generator: np.random.Generator, seconds: float | None, classes: int) -> dict[str, Any]:
    duration = round(float(np.clip(generator.normal(117, 60), 5, 750)), 1) if seconds is None else seconds
    starts = np.sort(generator.uniform(0, 0.7, generator.integers(1, 4)))
    return {
        "duration": duration,
        "annotations": [
            {"segment": [round(float(part * duration), 2) for part in (start, start + 0.3)], "label": f"class {k}"}
            for start, k in zip(starts, generator.integers(0, classes, len(starts)), strict=True)
        ],
    }  # fmt: skip


def _info(duration: float) -> VideoInfo:
    ticks = np.arange(max(round(duration * RATE), 8), dtype=np.int64) * TICK
    base = Fraction(1, RATE * TICK)
    pts = ticks * base.numerator / base.denominator
    return VideoInfo(
        path=Path(), pts=pts, duration=float(pts[-1]) + 1 / RATE, width=320, height=240, rotation=0, codec="h264",
        pixel_format="yuv420p", size=1, mtime_ns=0, time_base=base, ticks=ticks, key_ticks=ticks[::KEY_EVERY],
    )  # fmt: skip


def _at(info: VideoInfo, path: Path) -> VideoInfo:
    return VideoInfo(**{**vars(info), "path": path, "mtime_ns": path.stat().st_mtime_ns})


def _entry(path: Path, wanted: NDArray[np.int64], number: int, firsts: dict[tuple[int, int], Path]) -> None:
    """The index of an entry, and an empty file of the length of its pictures; of videos alike, links to one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    key = (int(wanted[-1]), number // LINKS)
    if key in firsts:
        for suffix in (".mov", ".npz"):
            os.link(firsts[key].with_suffix(suffix), path.with_suffix(suffix))
        return
    firsts[key] = path
    sizes = np.full(len(wanted), PICTURE, dtype=np.int64)
    path.touch()
    os.truncate(path, PICTURE * len(wanted))
    np.savez(
        path.with_suffix(".npz"), frames=wanted, offsets=np.arange(len(wanted), dtype=np.int64) * PICTURE, sizes=sizes,
        checksums=np.zeros(len(wanted), dtype=np.uint32), width=320, height=240,
    )  # fmt: skip


# Measuring


def measured(folder: Path) -> Row:
    """Seconds of each part, and the peak of this process's memory after it, MB."""
    parts: dict[str, tuple[float, float]] = {}
    began = time.perf_counter()

    @contextmanager
    def part(name: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        parts[name] = (
            round(time.perf_counter() - start, 3),
            round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6, 1),
        )

    with part("imports"):
        from lofi_fast.data.dataset import Sampler, cached_dataset
        from lofi_fast.data.inventory import record_use
        from lofi_fast.data.survey import survey
        from lofi_fast.run.trained_on import digest, record_of
    config = config_of(folder)
    with part("catalogue"):
        known = Catalogue(folder / "cache" / "frames")
    with part("labels and files"):
        found = survey(config, folder / "labels.json", folder / "videos", known=known)
    if found.refused or found.skipped:
        raise AssertionError(found.refused or found.skipped[0])
    with part("cache and windows"):
        dataset = cached_dataset(found, folder / "cache" / "frames", lambda *_: None)
    with part("record of use"):
        record_use(
            folder / "cache" / "frames", folder / "run", {s.cached.path for of in dataset.samples.values() for s in of}
        )
    with part("record of data"):
        digest(record_of(dataset, config))
    with part("first batch"):
        sampler = Sampler(dataset, config.data, config.full, 0)
        for sample in sampler.epoch("joint", 0, config.joint.batch)[0]:
            sampler.request(sample, config.full, sampler.view(sample, "joint", 0)[0])
    return {
        "seconds": round(time.perf_counter() - began, 2),
        "peak": parts["first batch"][1],
        "after": round(psutil.Process().memory_info().rss / 1e6, 1),
        "parts": parts,
    }


def table(rows: Sequence[Row]) -> list[Section]:
    """The newest rows of each number of videos."""
    ordered = sorted(rows, key=lambda row: str(row["date"]))
    newest = list({(row["videos"], row["labels"], row["state"], row["machine"]): row for row in ordered}.values())
    if not newest:
        return []
    names = list(newest[0]["parts"])
    lines = [
        (
            f"{row['videos']:,}", row["labels"], row["state"], f"{row['seconds']:.1f}", f"{row['peak']:,.0f}",
            *(f"{row['parts'][name][0]:.2f}" for name in names), row["machine"], when([row]),
        )
        for row in newest
    ]  # fmt: skip
    header = ("videos", "labels", "start with", "seconds", "peak, MB", *(f"{name}, s" for name in names), "machine",
              "date, commit")  # fmt: skip
    return [Table("", header, lines)]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench start", usage=USAGE, description=__doc__)
    parser.add_argument("--videos", type=int, action="append", metavar="N", help="how many; may be given several times")
    parser.add_argument("--annotations", type=Path, metavar="FILE", help="ActivityNet's, for the labels")
    parser.add_argument("--seconds", type=float, help="length of made-up videos (default: as ActivityNet's)")
    parser.add_argument("--folder", metavar="DIR", help="where to make the files (default: the system's for such)")
    parser.add_argument("--quick", action="store_true", help="50 videos")
    parser.add_argument("--results", type=Path, default=RESULTS / "start.jsonl", help="file of rows to append to")
    parser.add_argument("--measured", type=Path, metavar="DIR", help=argparse.SUPPRESS)
    return parser

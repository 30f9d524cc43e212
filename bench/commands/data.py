"""Decoding: the frame cache with the DALI pipeline against decoding the videos themselves, on the demo set.

Every form gives the frames of the same snippets, as squares of the planned side, to the training process. The gate: the
pixels are near ours, and nearer than those of neighbouring frames. CPU seconds are those of all threads. What filling
the cache costs, once, has a row of its own; so has the share of decoding in a training step of the demo (lean encoder,
head and loss, without the update of the weights).

Filling the cache from larger videos is measured by the video engine of a GPU and by PyAV in as many processes as there
are cores, processes started and all. On the CPU, DALI's own decoder stands in for the engine, with VP9.
"""

from __future__ import annotations

import argparse
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import av
import numpy as np
import torch
from av.video.frame import VideoFrame
from torch import Tensor

from bench.peers.decoders import decoders, squares
from bench.tools.against import read_against
from bench.tools.gate import GateError
from bench.tools.measure import spread
from bench.tools.networks import WholeStep
from bench.tools.record import options, record
from bench.tools.rows import Row, environment, software
from bench.tools.table import Section, Table, by_place, newest, when
from lofi_fast.config import Config
from lofi_fast.data import demo, nvdec
from lofi_fast.data.cache import ENGINE_WORKERS, CacheRequest, prepare
from lofi_fast.data.dataset import Sample, Sampler, load_dataset
from lofi_fast.data.matching import find_videos
from lofi_fast.data.pipeline import FramePipeline, pictures_of_a_run
from lofi_fast.data.survey import CROP_OF_CACHED
from lofi_fast.data.video import probe
from lofi_fast.errors import InputError
from lofi_fast.fidelity import Fidelity, select_snippets
from lofi_fast.precision import choose_device
from lofi_fast.presets import demo as demo_config

OURS = "frame cache, DALI"
VIDEOS = 8
CUTS = {"full": (1, 1), "spatial cut 4": (1, 2), "temporal cut 4": (4, 1)}  # name -> (snippets, side) divided by
FILLED = {(320, 240): 1500, (1280, 720): 750}  # pixels of the videos that fill a cache -> frames of each
COPIES = {"cuda": 16, "cpu": 2}  # of each such video
FILLED_EVERY = 4  # frames, about what a grid of 100 snippets takes of two minutes
FILLED_SIDE = 256
LARGEST = 8.0  # mean difference of pixels, of 255: the cache is resized twice, and compressed between


def main(argv: Sequence[str]) -> int:
    """Measure, append rows, print a table; 1 when a form shows other frames."""
    args = _parser().parse_args(argv)
    if args.threads < 1 or args.rounds < 1 or args.videos < 1:
        raise InputError("--threads, --rounds and --videos must be at least 1")
    quick = args.quick or args.tiny
    device = choose_device(args.device)
    torch.set_num_threads(args.threads)
    old = read_against(args.against)
    start = environment() | software(device, args.threads) | {"quick": quick}
    count, rounds = (1, 1) if quick else (args.videos, args.rounds)
    measured = measure(device, count, rounds, args.threads, quick, not args.skip_filling)
    values = {"frames/s": ("frames_a_second",), "CPU ms a frame": ("cpu_ms_a_frame",), "share": ("share",)}
    return record("data", measured, start, args, old, table, ("measured", "case", "form"), values, line)


def measure(
    device: torch.device, count: int, rounds: int, threads: int, quick: bool, fill: bool
) -> Iterator[Row]:  # fmt: skip
    """Of `count` videos of the demo; `fill`: and of larger ones, how fast they go into the cache."""
    config = demo_config()
    config = replace(config, data=replace(config.data, jitter=0.0))
    with tempfile.TemporaryDirectory(prefix="bench-data-", ignore_cleanup_errors=True) as name:
        folder = Path(name)
        annotations, videos = demo.generate(folder / "demo", num_training=count, num_validation=1)
        began = time.perf_counter()
        dataset = load_dataset(config, annotations, videos, folder / "frames", lambda *_: None)
        seconds = time.perf_counter() - began
        samples = dataset.samples["training"]
        paths = find_videos(videos, [sample.window.video for sample in samples]).paths
        kept = sum(len(sample.cached.frames) for found in dataset.samples.values() for sample in found)
        yield {
            "measured": "cache", "case": "filled once", "form": OURS, "frames": kept, "seconds": round(seconds, 3),
            "frames_a_second": round(kept / seconds, 1),
            "bytes": sum(path.stat().st_size for path in (folder / "frames").rglob("*") if path.is_file()),
        }  # fmt: skip
        largest = max(sample.cached.width * sample.cached.height for sample in samples)
        pipeline = FramePipeline(pictures_of_a_run(largest, device.type), device.type, num_threads=threads)
        with closing(pipeline):
            for case, (fewer, smaller) in list(CUTS.items())[: 1 if quick else None]:
                fidelity = Fidelity(config.full.num_snippets // fewer, config.full.side // smaller)
                yield from decoded(case, fidelity, config, dataset, paths, samples, pipeline, device, rounds, threads)
            if fill:
                yield from filling(device, quick)
            yield share(config, Sampler(dataset, config.data, config.full, 0), samples, pipeline, device, rounds, quick)


def filling(device: torch.device, quick: bool) -> Iterator[Row]:
    """The cache from videos of usual sizes, by each way to decode them."""
    engine = f"cuda:{device.index or 0}" if device.type == "cuda" else "cpu"
    if missing := nvdec.missing(engine):
        print(f"no video engine: {missing}")
        return
    codec, suffix = ("libx264", ".mp4") if device.type == "cuda" else ("libvpx-vp9", ".webm")
    cores = len(os.sched_getaffinity(0))
    by_engine = f"{'NVDEC' if device.type == 'cuda' else 'DALI on the CPU'}, {min(cores, ENGINE_WORKERS)} processes"
    for (width, height), num_frames in list(FILLED.items())[: 1 if quick else None]:
        if quick:
            num_frames = 16
        elif device.type == "cpu":
            num_frames //= 10  # VP9 takes long to encode
        copies = 1 if quick else COPIES[device.type]
        with tempfile.TemporaryDirectory(prefix="bench-data-", ignore_cleanup_errors=True) as name:
            folder = Path(name)
            first = folder / f"0{suffix}"
            write_video(first, codec, width, height, num_frames)
            paths = [first, *(folder / f"{number}{suffix}" for number in range(1, copies))]
            for path in paths[1:]:
                shutil.copyfile(first, path)
            frames = np.arange(0, num_frames, FILLED_EVERY)
            requests = [CacheRequest(path.stem, probe(path), frames) for path in paths]
            for form, by in ((by_engine, engine), (f"PyAV, {cores} processes", None)):
                notes: list[str] = []
                began = time.perf_counter()
                made, skipped = prepare(requests, folder / form, FILLED_SIDE, engine=by, note=notes.append)
                seconds = time.perf_counter() - began
                if skipped or any("PyAV" in note for note in notes):
                    raise GateError(f"{form}: {'; '.join([*notes, *(one.reason for one in skipped)])}")
                kept = sum(len(video.frames) for video in made.values())
                yield {
                    "measured": "filling", "case": f"{width}x{height} {codec}, {copies} videos", "form": form,
                    "frames": kept, "seconds": round(seconds, 3), "frames_a_second": round(kept / seconds, 1),
                    "video_frames_a_second": round(copies * num_frames / seconds, 1),
                }  # fmt: skip


def write_video(path: Path, codec: str, width: int, height: int, num_frames: int) -> None:
    """A texture of muted colours that a window moves over, with grain, so that it is as much to decode as what a
    camera took. 25 frames a second.
    """
    random = np.random.default_rng(0)
    coarse = random.integers(64, 192, (height // 8, width // 4, 3), dtype=np.uint8)
    texture = coarse.repeat(16, 0).repeat(16, 1)
    grain = random.integers(0, 12, (height + 64, width + 64, 1), dtype=np.uint8)
    options = {"preset": "veryfast"} if codec == "libx264" else {"deadline": "realtime", "cpu-used": "8"}
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=25, options=options | {"g": "50"})
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        for number in range(num_frames):
            top, left = number % height, 2 * number % width
            down, across = random.integers(0, 64, 2)
            pixels = texture[top : top + height, left : left + width]
            pixels = pixels + grain[down : down + height, across : across + width]
            container.mux(stream.encode(VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode(None))


def decoded(
    case: str, fidelity: Fidelity, config: Config, dataset: Any, paths: Mapping[str, Path], samples: Sequence[Sample],
    pipeline: FramePipeline, device: torch.device, rounds: int, threads: int,
) -> Iterator[Row]:  # fmt: skip
    """All forms at one fidelity, a video at a time."""
    sampler = Sampler(dataset, config.data, config.full, 0)
    chosen = select_snippets(config.full.num_snippets, fidelity.num_snippets)
    share_of_side = 1.0 if config.data.resize == "squash" else CROP_OF_CACHED

    def ours(sample: Sample) -> Tensor:
        request = sampler.request(sample, fidelity, sampler.centre_view(sample))
        return next(iter(pipeline.stream([[request]])))

    def theirs(decode: Any, sample: Sample, later: int = 0) -> Tensor:
        kept = sample.cached.frames
        frames = (kept[sample.grid[chosen].ravel()] + later).clip(0, kept[-1])
        return squares(decode, paths[sample.window.video], frames, fidelity.side, share_of_side, threads).to(device)

    forms: dict[str, Callable[..., Tensor]] = {OURS: ours}
    forms |= {name: partial(theirs, decode) for name, decode in decoders().items()}
    expected = ours(samples[0]).float()
    for name in decoders():
        before, same, after = (
            (forms[name](samples[0], later=later).float() - expected).abs().mean().item() for later in (-1, 0, 1)
        )
        if not same <= min(LARGEST, before, after):
            raise GateError(
                f"{name}: its pixels differ from ours by {same:.1f} of 255, a frame earlier or later by {before:.1f} "
                f"or {after:.1f}"
            )
    wall: dict[str, list[float]] = {name: [] for name in forms}
    cpu: dict[str, list[float]] = {name: [] for name in forms}
    for _ in range(rounds):
        for sample in samples:
            for name, form in forms.items():
                seconds, of_cpu = timed(partial(form, sample), device)
                wall[name].append(seconds)
                cpu[name].append(of_cpu)
    for name in forms:
        ratios = spread([theirs / mine for theirs, mine in zip(wall[name], wall[OURS], strict=True)])
        ms = spread(wall[name])
        yield {
            "measured": "decode", "case": f"{case}: {fidelity}", "form": name, "frames": fidelity.num_frames,
            "ms": [round(1e3 * value, 3) for value in (ms.median, ms.p20, ms.p80)],
            "times_ours": [round(value, 3) for value in (ratios.median, ratios.p20, ratios.p80)],
            "frames_a_second": round(fidelity.num_frames / ms.median, 1),
            "cpu_ms_a_frame": round(1e3 * spread(cpu[name]).median / fidelity.num_frames, 4),
        }  # fmt: skip


def share(
    config: Config, sampler: Sampler, samples: Sequence[Sample], pipeline: FramePipeline, device: torch.device,
    rounds: int, quick: bool,
) -> Row:  # fmt: skip
    """Of the CPU seconds of a joint step at full fidelity, with those of its decoding; on a GPU the wall's too."""
    videos, full = (1 if quick else config.joint.batch), config.full
    step = WholeStep.of(
        "tsm_r18", full.num_snippets, full.side, "float32", device, videos, config.encoder.width, config.head,
        len(demo.CLASSES),
    )  # fmt: skip

    def decode() -> None:
        requests = [sampler.request(sample, full, sampler.centre_view(sample)) for sample in samples]
        batch = [requests[k % len(requests)] for k in range(videos)]
        next(iter(pipeline.stream([batch])))

    learn = partial(step.step, WholeStep.FORMS[1])
    readings: dict[str, list[tuple[float, float]]] = {"decode": [], "step": []}
    for number in range(rounds + 1):
        for name, call in (("decode", decode), ("step", learn)):
            reading = timed(call, device)
            if number or quick:
                readings[name].append(reading)
    (decode_wall, decode_cpu), (step_wall, step_cpu) = (
        tuple(spread(values).median for values in zip(*found, strict=True)) for found in readings.values()
    )
    return {
        "measured": "share", "case": f"{videos} videos of {full}", "frames": videos * full.num_frames,
        "form": OURS, "decode_cpu": round(decode_cpu, 4), "step_cpu": round(step_cpu, 4),
        "decode_wall": round(decode_wall, 4), "step_wall": round(step_wall, 4),
        "share": round(decode_cpu / (decode_cpu + step_cpu), 4),
    }  # fmt: skip


def timed(call: Callable[[], object], device: torch.device) -> tuple[float, float]:
    """Seconds of a call by the clock, and of the CPU in all threads."""
    began, cpu = time.perf_counter(), time.process_time()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - began, time.process_time() - cpu


def line(row: Row) -> str:
    if row["measured"] == "share":
        return f"decoding is {100 * row['share']:.1f}% of the CPU seconds of a step ({row['case']})"
    return f"{row['measured']}, {row['case']}, {row['form']}: {row['frames_a_second']:.0f} frames a second"


def table(rows: Sequence[Row]) -> list[Section]:
    """Decoding by each form, then what filling the cache costs and the share of a step."""
    rows = newest(rows, ("measured", "case", "form"))
    header = ("fidelity", "form", "frames a second", "CPU ms a frame", "time of ours, median (p20 to p80)")
    parts: list[Section] = []
    for where, here in by_place(rows):
        lines = []
        for row in (row for row in here if row["measured"] == "decode"):
            median, low, high = row["times_ours"]
            numbers = (f"{row['frames_a_second']:,.0f}", f"{row['cpu_ms_a_frame']:.3f}")
            lines.append((row["case"], row["form"], *numbers, f"{median:.2f}x ({low:.2f} to {high:.2f})"))
        parts.append(Table(f"{where}; {when(here)}:", header, lines))
        for row in here:
            if row["measured"] == "cache":
                rate, size = row["frames_a_second"], row["bytes"] / row["frames"]
                parts.append(f"Filling the cache, once: {rate:,.0f} frames a second, {size:,.0f} bytes a frame.")
            if row["measured"] == "filling":
                kept, passed = row["frames_a_second"], row["video_frames_a_second"]
                parts.append(
                    f"Filling the cache from {row['case']}, {row['form']}: {kept:,.0f} pictures a second, of "
                    f"{passed:,.0f} frames of the videos."
                )
            if row["measured"] == "share":
                parts.append(f"Decoding takes {100 * row['share']:.1f}% of a step's CPU seconds ({row['case']}).")
    return parts


def _parser() -> argparse.ArgumentParser:
    parser = options("data", __doc__, "one video: does everything run?", 5)
    parser.add_argument("--videos", type=int, default=VIDEOS, help=f"of the demo set (default: {VIDEOS})")
    parser.add_argument(
        "--skip-filling", action="store_true", help="without filling a cache from larger videos, which takes a minute"
    )
    parser.add_argument(
        "--tiny", action="store_true", help="the same as --quick, as a dry run of `bench gpu` asks for it"
    )
    return parser

"""Detection in a long video beside decoding it and nothing else, on a CPU: CPU seconds, and memory along the way.

The detector has a preset's networks with random weights and two classes, which take as long as trained ones. The video
is a moving texture with grain, its packets repeated until it is long enough. What both forms take is counted in CPU
seconds of all threads, the decoder's too. Memory is what the process holds above its start, at a tenth of the video and
at its end: it should not grow with the length.

The floor is decoding and the encoder's convolutions, at the rate of this machine's fastest large product or
convolution, in fp32 or bf16, whichever is faster here: not every CPU that multiplies bf16 gains by it. All else would
come for nothing.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import av
import torch

from bench.commands.data import timed, write_video
from bench.tools.against import read_against
from bench.tools.measure import in_child, spread
from bench.tools.record import options, record
from bench.tools.roofs import rates
from bench.tools.rows import Row, environment, software
from bench.tools.table import Section, Table, by_place, newest, when
from lofi_fast import encoder as encoders
from lofi_fast import head as heads
from lofi_fast.config import Config, PrecisionName, PresetName
from lofi_fast.data.video import stated_duration
from lofi_fast.encoder.resnet_table import network
from lofi_fast.errors import InputError
from lofi_fast.fidelity import FRAMES_PER_SNIPPET
from lofi_fast.memory.cpu import CpuMeter
from lofi_fast.model import Detector
from lofi_fast.precision import choose_precision
from lofi_fast.presets import PRESETS

WIDTH, HEIGHT, RATE = 320, 240, 25
CLIP = 500  # frames that are repeated
DECODING, OURS = "decoding alone", "detection"


def main(argv: Sequence[str]) -> int:
    """Measure, append rows, print a table."""
    args = _parser().parse_args(argv)
    if args.threads < 1 or args.rounds < 1 or not args.seconds > 0 or not args.window > 0:
        raise InputError("--threads, --rounds, --seconds and --window must be positive")
    torch.set_num_threads(args.threads)
    device = torch.device("cpu")
    old = read_against(args.against)
    seconds, rounds = (20.0, 1) if args.quick else (args.seconds, args.rounds)
    start = environment() | software(device, args.threads) | {"quick": args.quick}
    measured = measure(args.preset, args.window, args.precision, seconds, rounds, args.threads)
    values = {"CPU s": ("cpu_seconds",), "end": ("peaks",)}
    return record("detect", measured, start, args, old, table, ("preset", "precision", "video", "form"), values, line)


def measure(
    preset: PresetName, window: float, precision: PrecisionName, seconds: float, rounds: int, threads: int
) -> Iterator[Row]:
    """A row for decoding, one for detection."""
    config = PRESETS[preset]()
    config = replace(config, data=replace(config.data, window=window))
    with tempfile.TemporaryDirectory(prefix="bench-detect-") as name:
        video, model = Path(name) / "long.mp4", Path(name) / "model.safetensors"
        num_frames = write_long_video(video, seconds)
        _untrained(config).save(model)
        decoding, detection, rest = [], [], {}
        for number in range(rounds):
            calls = [(decode, decoding, (video, threads)), (detect, detection, (model, video, precision, threads))]
            for call, into, arguments in calls if number % 2 == 0 else calls[::-1]:
                found = in_child(call, *arguments)
                if found is None:
                    raise InputError(f"{call.__name__}: memory ran out")
                into.append(found.pop("cpu"))
                rest |= found
    duration = num_frames / RATE
    chosen = choose_precision(torch.device("cpu"), precision)
    shared = {
        "preset": preset, "fidelity": f"{config.full.num_snippets} x {config.full.side}", "window": window,
        "precision": str(chosen.dtype).removeprefix("torch."), "rounds": rounds,
        "video": f"{WIDTH}x{HEIGHT}, {RATE} frames a second, {duration:g} s",
    }  # fmt: skip
    plain = spread(decoding)
    encoder = _floor(config, duration, window)
    for form, samples in ((DECODING, decoding), (OURS, detection)):
        taken = spread(samples)
        ratios = spread([ours / alone for ours, alone in zip(samples, decoding, strict=True)])
        row: Row = {
            "form": form,
            "cpu_seconds": [round(value, 3) for value in (taken.median, taken.p20, taken.p80)],
            "times_real_time": round(duration / taken.median, 1),
            "times_decoding": [round(value, 2) for value in (ratios.median, ratios.p20, ratios.p80)],
            "peaks": rest["peaks"] if form == OURS else None,
            "floor": round((plain.median + encoder) / plain.median, 2) if form == OURS else None,
        }
        yield shared | row


def write_long_video(path: Path, seconds: float) -> int:
    """A file of so many seconds or a little more; how many frames it has."""
    clip = path.with_name("clip.mp4")
    write_video(clip, "libx264", WIDTH, HEIGHT, CLIP)
    times = max(1, -(-round(seconds * RATE) // CLIP))
    with av.open(str(clip)) as source, av.open(str(path), "w") as target:
        stream = source.streams.video[0]
        copy = target.add_stream_from_template(stream)
        packets = [packet for packet in source.demux(stream) if packet.pts is not None and packet.dts is not None]
        length = max(packet.pts + packet.duration for packet in packets)
        for _ in range(times):
            for packet in packets:
                packet.stream = copy
                target.mux(packet)
                packet.stream = stream
                packet.pts, packet.dts = packet.pts + length, packet.dts + length
    clip.unlink()
    return times * CLIP


def decode(video: Path, threads: int) -> dict[str, Any]:
    """Every frame of the file, and nothing with it."""

    def run() -> None:
        with av.open(str(video)) as container:
            stream = container.streams.video[0]
            stream.codec_context.thread_count = threads
            for _ in container.decode(stream):
                pass

    return {"cpu": timed(run, torch.device("cpu"))[1]}


def detect(model: Path, video: Path, precision: PrecisionName, threads: int) -> dict[str, Any]:
    """What `lofi-fast detect` does with one video after it has loaded the detector, planning included."""
    torch.set_num_threads(threads)
    meter = CpuMeter()
    with Detector.load(model).session(device="cpu", precision=precision) as session:
        meter.reset_peak()
        before, tenth = meter.own(), 0

        def run() -> None:
            def told(second: float) -> None:
                nonlocal tenth
                if not tenth and second >= duration / 10:
                    tenth = meter.peak() - before

            session.detect(video, told=told)

        duration = stated_duration(video)
        cpu = timed(run, torch.device("cpu"))[1]
        return {"cpu": cpu, "peaks": [tenth, meter.peak() - before]}


def _untrained(config: Config) -> Detector:
    torch.manual_seed(0)
    encoder = encoders.build(config)
    return Detector(encoder, heads.build(config, encoder.num_features, 2), ("one", "other"), config)


def _floor(config: Config, duration: float, window: float) -> float:
    """Seconds of the encoder's convolutions."""
    length, side = config.full.num_snippets, config.full.side
    net = network(config.encoder.name, config.encoder.width, side)
    a_frame = sum(2 * conv.multiply_adds for conv in net.convs)
    frames = FRAMES_PER_SNIPPET * length * duration / window
    # By the processor's time, as what it is compared with: a clock would count what else the machine does.
    fastest = 0.0
    for dtype in (torch.float32, torch.bfloat16):
        for call, operations in rates(torch.device("cpu"), dtype).values():
            call()
            taken = min(timed(call, torch.device("cpu"))[1] for _ in range(7))
            fastest = max(fastest, operations / taken)
    return frames * a_frame / fastest


def line(row: Row) -> str:
    return f"{row['form']}: {row['cpu_seconds'][0]:.2f} CPU seconds, {row['times_real_time']:.1f} times real time"


def table(rows: Sequence[Row]) -> list[Section]:
    """Each form, how many times as long as decoding it takes, and what it holds."""
    rows = newest(rows, ("preset", "precision", "video", "form"))
    header = (
        "preset", "video", "precision", "form", "CPU s", "times real time", "times decoding (p20 to p80)", "at best",
        "peak at a tenth, at the end",
    )  # fmt: skip
    parts: list[Section] = []
    for where, here in by_place(rows):
        lines = []
        for row in here:
            median, low, high = row["times_decoding"]
            ratio = f"{median:.2f}x ({low:.2f} to {high:.2f})"
            peaks = "" if row["peaks"] is None else "{:.0f}, {:.0f} MB".format(*(peak / 1e6 for peak in row["peaks"]))
            best = "" if row["floor"] is None else f"{row['floor']:.2f}x"
            lines.append((
                f"{row['preset']}, {row['fidelity']} px in {row['window']:g} s", row["video"], row["precision"],
                row["form"], f"{row['cpu_seconds'][0]:.2f}", f"{row['times_real_time']:.1f}", ratio, best, peaks,
            ))  # fmt: skip
        parts.append(Table(f"{where}; {when(here)}:", header, lines))
    return parts


def _parser() -> argparse.ArgumentParser:
    parser = options("detect", __doc__, "20 seconds, one round: does everything run?", 5, devices=False)
    parser.add_argument("--seconds", type=float, default=600.0, help="of the video (default: 600)")
    parser.add_argument("--preset", choices=get_args(PresetName), default="small", help="default: small")
    parser.add_argument("--window", type=float, default=32.0, help="seconds of a window (default: 32)")
    parser.add_argument(
        "--precision", choices=get_args(PrecisionName), default="auto", help="default: auto, as detection has it"
    )
    return parser

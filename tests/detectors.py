"""Videos and a small trained run for the tests of detection."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from patience import PATIENCE

from lofi_fast.data import demo

ROOT = Path(__file__).resolve().parents[1]
# Windows of 8 seconds, of which a batch of the head holds three; a last batch of another size is in every video.
SETTINGS = (
    "--preset demo --fidelity 8x32 --width 8 --window 8 --batch 2 --min-cut 1 --pretrain-epochs 1 --joint-epochs 1 "
    f"--head-epochs 3 --head-stage.batch 3 --device cpu --threads {min(2, os.cpu_count() or 1)} --mem-budget 4GB"
).split()


@dataclass(frozen=True)
class SmallRun:
    """A finished run and its demo set: four training videos and two for validation."""

    folder: Path
    videos: Path
    cache: Path

    @property
    def validation(self) -> list[Path]:
        return sorted(self.videos.glob("*validation*"))


def train_small(folder: Path) -> SmallRun:
    """Train for some seconds, in a process of its own."""
    annotations, videos = demo.generate(folder, num_training=4, num_validation=2, seed=1)
    run = SmallRun(folder / "run", videos, folder / "cache")
    data = ["--annotations", str(annotations), "--videos", str(videos), "--cache", str(run.cache)]
    command = [sys.executable, "-m", "lofi_fast.train", *data, *SETTINGS, "--out", str(run.folder)]
    done = subprocess.run(command, cwd=ROOT, text=True, capture_output=True, timeout=PATIENCE)
    assert done.returncode == 0, done.stderr
    return run


def joined(sources: list[Path], target: Path, times: int = 1) -> Path:
    """The videos one after the other, `times` over, by copying their packets."""
    with av.open(str(target), "w") as container:
        stream, offset = None, 0
        for source in sources * times:
            with av.open(str(source)) as opened:
                video = opened.streams.video[0]
                if stream is None:
                    stream = container.add_stream_from_template(video)
                end = 0
                for packet in opened.demux(video):
                    if packet.pts is None or packet.dts is None:
                        continue
                    end = max(end, packet.pts + packet.duration)
                    packet.pts, packet.dts, packet.stream = packet.pts + offset, packet.dts + offset, stream
                    container.mux(packet)
                offset += end
    return target


def with_early_sound(source: Path, target: Path, seconds: Fraction) -> Path:
    """The video with a silent track that begins `seconds` before it."""
    with av.open(str(source)) as opened, av.open(str(target), "w") as container:
        video = opened.streams.video[0]
        copy = container.add_stream_from_template(video)
        sound = container.add_stream("pcm_s16le", rate=8000)
        sound.layout = "mono"
        silence = av.AudioFrame.from_ndarray(np.zeros((1, 8000), dtype=np.int16), format="s16", layout="mono")
        silence.sample_rate, silence.pts, silence.time_base = 8000, 8000, Fraction(1, 8000)
        container.mux(sound.encode(silence))
        container.mux(sound.encode(None))
        offset = int((1 + seconds) / video.time_base)
        for packet in opened.demux(video):
            if packet.pts is not None and packet.dts is not None:
                packet.pts, packet.dts, packet.stream = packet.pts + offset, packet.dts + offset, copy
                container.mux(packet)
    return target

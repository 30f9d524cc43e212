"""How many windows an epoch of training has, before any video is at hand: published, or counted from labels."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from lofi_fast.config import DataConfig, PresetName
from lofi_fast.data.annotations import UNASSIGNED, FormatOptions, Video, load_annotations
from lofi_fast.data.split import choose_validation
from lofi_fast.data.windows import cut_windows
from lofi_fast.errors import InputError

# Training videos of the data set that a preset is for, and their mean seconds.
# ActivityNet-1.3 and HACS-1.1: their published training subsets; durations do not matter to whole videos, and are the
# usual two minutes. THUMOS14: its 200 untrimmed validation videos, which everyone trains on; the 400 videos of
# MultiTHUMOS, which are nearly the same, last 30 hours. The demo set: see data/demo.py.
PUBLISHED: dict[PresetName, tuple[str, int, float]] = {
    "activitynet": ("ActivityNet-1.3's training videos", 10_024, 120.0),
    "hacs": ("HACS's training videos", 37_613, 120.0),
    "thumos": ("THUMOS14's 200 validation videos", 200, 270.0),
    "actionformer_anet": ("ActivityNet-1.3's training videos", 10_024, 120.0),
    "actionformer_thumos": ("THUMOS14's 200 validation videos", 200, 270.0),
    "small": ("the demo set", 80, 24.0),
    "demo": ("the demo set", 80, 24.0),
}

LIKELY_WINDOW = 32.0  # seconds, of a window that is chosen from the labels once the videos are at hand


@dataclass(frozen=True)
class EpochSize:
    """`windows`: samples of an epoch. `source`: where the number comes from, in words."""

    windows: int
    source: str


def published(preset: PresetName, data: DataConfig) -> EpochSize:
    """Of the data set that a preset is for, cut as `data` says, all videos taken to last as long as their mean."""
    name, videos, seconds = PUBLISHED[preset]
    return EpochSize(videos * len(cut_windows(name, seconds, _length(data), data.overlap)), name)


def counted(path: Path, data: DataConfig) -> EpochSize:
    """Of the training videos that a file of labels names; our own division where it names none. A video whose duration
    it does not tell lasts to the end of its last segment. Raises InputError for labels that cannot be read, and for
    labels without a training video.
    """
    videos = load_annotations(path, options=FormatOptions.of(data)).videos
    validation = choose_validation([video for video in videos if video.subset == UNASSIGNED])
    training = [v for v in videos if v.subset == "training" or (v.subset == UNASSIGNED and v.name not in validation)]
    if not training:
        raise InputError(f"--annotations {path}: no video of it is for training; name another file, or give --samples")
    return EpochSize(_windows(training, data), f"counted in {path}")


def _windows(videos: Iterable[Video], data: DataConfig) -> int:
    count = 0
    for video in videos:
        seconds = video.duration or max((segment.end for segment in video.segments), default=0.0)
        count += len(cut_windows(video.name, seconds or 1.0, _length(data), data.overlap))
    return count


def _length(data: DataConfig) -> float | None:
    """Seconds of a window; None: the whole video."""
    return LIKELY_WINDOW if data.window == "labels" else data.window

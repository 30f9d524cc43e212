"""From annotations and a folder of videos to samples that a step can ask for, and the sampler that orders them.

Nothing random lives outside `Sampler`: order, crop, flip and pixel jitter are functions of (seed, stage, epoch,
window), so that a resumed run and a step tried again see the same samples with the same augmentation.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray

from lofi_fast.config import Config, DataConfig
from lofi_fast.data.annotations import Segment, Video
from lofi_fast.data.cache import ENGINE_WORKERS, Skipped, prepare
from lofi_fast.data.entry import CachedVideo
from lofi_fast.data.pictures import Pictures
from lofi_fast.data.pipeline import FrameRequest, View
from lofi_fast.data.survey import (
    CROP_OF_CACHED,
    Progress,
    Requests,
    Survey,
    cache_side,
    collector_paused,
    divided,
    require_usable,
    survey,
)
from lofi_fast.data.windows import Window, full_grid
from lofi_fast.errors import InputError
from lofi_fast.fidelity import Fidelity, select_snippets
from lofi_fast.gpu import send

SUBSETS = ("training", "validation")
JITTER_PIXELS = 64 * 112 * 112  # of the frames that are jittered at once
SQUASH_LEAST = 0.85  # share of each side that a random crop keeps when the whole frame is squashed
Array = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class FullGrid:
    """The positions in the cache of a window's full grid, (num_snippets, 8), found when they are asked for: those of
    all videos would be gigabytes.
    """

    cached: CachedVideo
    window: Window
    num_snippets: int
    frame_stride: int

    def positions(self) -> NDArray[np.int64]:
        frames = full_grid(self.cached.info, self.window, self.num_snippets, self.frame_stride)
        return self.cached.positions(frames)


@dataclass(frozen=True, slots=True)
class Sample:
    """One window of one video: its frames in the cache and its labels."""

    index: int  # within the dataset; keys the augmentation
    window: Window
    segments: Array  # (G, 2) seconds, those that touch the window
    labels: NDArray[np.int64]  # (G,) indices into the class list
    cached: CachedVideo
    places: NDArray[np.int64] | FullGrid  # what `grid` is, or is made of

    @property
    def grid(self) -> NDArray[np.int64]:
        """(L, 8) positions in the cache, full fidelity."""
        return self.places.positions() if isinstance(self.places, FullGrid) else self.places


@dataclass(frozen=True, slots=True)
class Source:
    """What tells a video's file from another one, wherever it lies, and its segments as the labels have them."""

    size: int  # bytes
    frames: int
    duration: float  # seconds that the file's clock shows at its end
    segments: tuple[Segment, ...]


@dataclass(frozen=True)
class Dataset:
    classes: tuple[str, ...]
    samples: dict[str, tuple[Sample, ...]]  # by subset
    videos: dict[str, tuple[Video, ...]]  # by subset, those that can be read
    skipped: tuple[Skipped, ...]
    notes: tuple[str, ...]
    annotations: Path | None = None  # the file that the labels are from
    window: float | None = None  # seconds of a window, None for whole videos
    sources: Mapping[str, Source] = field(default_factory=dict)  # of the videos, by name

    def durations(self, subset: str) -> dict[str, float]:
        return {sample.window.video: sample.cached.duration for sample in self.samples[subset]}


def load_dataset(config: Config, annotations: Path, videos: Path, cache: Path, progress: Progress) -> Dataset:
    """Read labels, probe the videos, fill the frame cache, cut windows: `survey` and `cached_dataset` in one."""
    return cached_dataset(survey(config, annotations, videos), cache, progress)


@collector_paused()
def cached_dataset(
    found: Survey, cache: Path, progress: Progress, engine: str | None = None, engine_workers: int = ENGINE_WORKERS
) -> Dataset:
    """Fill the frame cache with what a survey has found, and cut windows. Videos that turn out to be bad are skipped
    and counted. `engine`: of which device the video engine decodes, see `cache.prepare`.

    Raises InputError where the survey says that no training can start, when nothing is left to train on, or when a
    validation class has no training segment left.
    """
    if found.refused is not None:
        raise InputError(found.refused)
    config = found.config
    notes = list(found.notes)
    cached = found.remembered(cache)
    more, undecodable = prepare(
        Requests(found, frozenset(one.name for one in found.videos if one.name not in cached)),
        cache,
        cache_side(config.full),
        progress=progress,
        engine=engine,
        note=notes.append,
        engine_workers=engine_workers,
        known=found.known,
    )
    cached |= more
    found.known.save()
    if undecodable:
        found, division = divided(replace(found, skipped=(*found.skipped, *undecodable)), cached)
        notes += division
        require_usable([one.video for one in found.videos], found.skipped, config)

    classes = found.classes
    number = {label: k for k, label in enumerate(classes)}
    samples: dict[str, list[Sample]] = {subset: [] for subset in SUBSETS}
    kept: dict[str, list[Video]] = {subset: [] for subset in SUBSETS}
    index = 0
    for video in (one.video for one in found.videos):
        kept[video.subset].append(video)
        segments = np.array([(s.start, s.end) for s in video.segments], dtype=np.float64).reshape(-1, 2)
        labels = np.array([number[s.label] for s in video.segments], dtype=np.int64)
        for window in found.windows[video.name]:
            touching = (segments[:, 1] > window.start) & (segments[:, 0] < window.end)
            at_edge = (segments[:, 0] == window.start) | (segments[:, 0] == window.end)
            touching |= at_edge & (segments[:, 0] == segments[:, 1])  # a point on the border of a window is in it
            entry = cached[video.name]
            grid = FullGrid(entry, window, config.full.num_snippets, config.data.frame_stride)
            samples[video.subset].append(Sample(index, window, segments[touching], labels[touching], entry, grid))
            index += 1
    return Dataset(
        classes,
        {subset: tuple(samples[subset]) for subset in SUBSETS},
        {subset: tuple(kept[subset]) for subset in SUBSETS},
        found.skipped,
        (*found.warnings, *notes),
        found.path,
        found.window,
        {
            one.name: Source(one.info.size, len(one.info.pts), one.info.duration, one.labelled.segments)
            for one in found.videos
        },
    )


@dataclass(frozen=True)
class Clip:
    """One snippet of a sample with the classes that it shows."""

    sample: Sample
    snippet: int
    labels: tuple[int, ...]  # ascending, each once


@dataclass(frozen=True)
class Jitter:
    """Pixel values become gain * value + offset (of 255), clipped; one gain for each of R, G, B."""

    gain: tuple[float, float, float]
    offset: float


def jitter_pixels(frames: torch.Tensor, jitters: Sequence[Jitter]) -> None:
    """Apply each request's jitter to its share of a batch's frames, uint8 (N, side, side, 3), in place.

    In pieces of whole frames: they are floats in between, and stay below the activations of a chunk of the encoder.
    """
    size = max(JITTER_PIXELS // (frames.shape[1] * frames.shape[2]), 1)
    gains = send(torch.tensor([jitter.gain for jitter in jitters]), frames.device)
    for part, gain, jitter in zip(frames.chunk(len(jitters)), gains, jitters, strict=True):
        for piece in part.split(size):
            piece.copy_(piece.float().mul_(gain).add_(255 * jitter.offset).clamp_(0, 255))


class Sampler:
    """Order and augmentation of every stage, as pure functions of (seed, stage, epoch, window)."""

    def __init__(self, dataset: Dataset, data: DataConfig, full: Fidelity, seed: int) -> None:
        self.dataset, self.data, self.full, self.seed = dataset, data, full, seed

    def rng(self, *key: int | str) -> np.random.Generator:
        """A generator of its own for each key."""
        numbers = [k if isinstance(k, int) else int.from_bytes(k.encode(), "little") for k in key]
        return np.random.default_rng([self.seed, *numbers])

    def epoch(self, stage: str, epoch: int, batch: int) -> list[list[Sample]]:
        """The training windows of one epoch in random order, in batches; the last batch may be smaller."""
        samples = self.dataset.samples["training"]
        order = self.rng(stage, epoch).permutation(len(samples))
        return [[samples[i] for i in order[k : k + batch]] for k in range(0, len(order), batch)]

    def clip_epoch(self, epoch: int, batch: int) -> list[list[Clip]]:
        """Pre-training clips of one epoch in random order: every grid snippet whose centre lies in a segment, or that
        holds a point in time, once.
        A last batch too small for live BN is left out.
        """
        clips = self.clips
        order = self.rng("clips", epoch).permutation(len(clips))
        batches = [[clips[i] for i in order[k : k + batch]] for k in range(0, len(order), batch)]
        return [b for b in batches if len(b) >= min(4, batch)] or batches

    @cached_property
    def clips(self) -> list[Clip]:
        """All pre-training clips. Raises InputError when no segment holds the centre of a snippet."""
        clips = []
        for sample in self.dataset.samples["training"]:
            starts, ends = sample.segments.T
            half = (sample.window.end - sample.window.start) / self.full.num_snippets / 2 * (starts == ends)
            for snippet, centre in enumerate(sample.window.centres(self.full.num_snippets)):
                hit = np.flatnonzero((starts - half <= centre) & (centre <= ends + half))
                if len(hit):
                    clips.append(Clip(sample, snippet, tuple(np.unique(sample.labels[hit]).tolist())))
        if not clips:
            raise InputError(
                f"no training segment is long enough to hold the centre of one of the {self.full.num_snippets} "
                "snippets of a window; give more snippets (--fidelity), or a shorter --window"
            )
        return clips

    def view(self, sample: Sample, stage: str, epoch: int, salt: int = 0) -> tuple[View, Jitter]:
        """Random crop, flip and jitter of a whole window in training."""
        rng = self.rng(stage, epoch, sample.index, salt)
        if self.data.resize == "squash":
            height, width = rng.uniform(SQUASH_LEAST, 1, 2)
        else:
            height, width = _square(sample.cached)
        top, left = rng.uniform(0, 1, 2) * (1 - height, 1 - width)
        flip = self.data.flip and bool(rng.random() < 0.5)
        red, green, blue, offset = rng.uniform(-self.data.jitter, self.data.jitter, 4).tolist()
        jitter = Jitter((1 + red, 1 + green, 1 + blue), offset)
        return View(float(top), float(left), float(height), float(width), flip), jitter

    def centre_view(self, sample: Sample) -> View:
        """See the function of this name."""
        return centre_view(sample.cached, self.data.resize)

    def request(self, sample: Sample, fidelity: Fidelity, view: View) -> FrameRequest:
        """The frames of a window at a fidelity: a sub-selection of its full grid."""
        chosen = select_snippets(self.full.num_snippets, fidelity.num_snippets)
        return FrameRequest(sample.cached, sample.grid[chosen].ravel(), view, fidelity.side)

    def clip_request(self, clip: Clip, view: View) -> FrameRequest:
        return FrameRequest(clip.sample.cached, clip.sample.grid[clip.snippet], view, self.full.side)

    def edges(self, sample: Sample, fidelity: Fidelity, decoded: Fidelity | None = None) -> Array:
        """Boundary times (L+1,) in seconds of the snippets that `request` shows; of those that `shrink` keeps of them
        where they were asked for at a higher fidelity, `decoded`.
        """
        if decoded is None:
            decoded = fidelity
        chosen = select_snippets(self.full.num_snippets, decoded.num_snippets)
        chosen = chosen[select_snippets(decoded.num_snippets, fidelity.num_snippets)]
        return sample.window.edges(chosen, self.full.num_snippets)


def centre_view(video: Pictures, resize: Literal["crop", "squash"]) -> View:
    """What validation, feature extraction and detection see: the centre square, or all of the frame when squashed."""
    height, width = (1.0, 1.0) if resize == "squash" else _square(video)
    return View((1 - height) / 2, (1 - width) / 2, height, width, False)


def _square(video: Pictures) -> tuple[float, float]:
    """Height and width, as fractions of the frame, of a square of 7/8 of its short side."""
    side = CROP_OF_CACHED * min(video.width, video.height)
    return side / video.height, side / video.width


def centre_requests(samples: Sequence[Sample], sampler: Sampler, fidelity: Fidelity) -> Iterator[list[FrameRequest]]:
    """The centre view of every sample, in order, each a batch of its own."""
    for sample in samples:
        yield [sampler.request(sample, fidelity, sampler.centre_view(sample))]

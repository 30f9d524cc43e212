"""From annotations and a folder of videos to samples that a step can ask for, and the sampler that orders them.

Nothing random lives outside `Sampler`: order, crop, flip and pixel jitter are functions of (seed, stage, epoch,
window), so that a resumed run and a step tried again see the same samples with the same augmentation.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray

from lofi_fast.config import Config, DataConfig
from lofi_fast.data.annotations import UNASSIGNED, Annotations, Segment, Video, clip_to_duration, load_annotations
from lofi_fast.data.cache import CachedVideo, CacheRequest, Pictures, Skipped, prepare
from lofi_fast.data.matching import find_videos
from lofi_fast.data.pipeline import FrameRequest, View
from lofi_fast.data.plausibility import check_times
from lofi_fast.data.split import choose_validation
from lofi_fast.data.video import VideoError, VideoInfo, probe
from lofi_fast.data.windows import Window, cut_windows, full_grid
from lofi_fast.errors import InputError
from lofi_fast.fidelity import FRAMES_PER_SNIPPET, Fidelity, select_snippets

SUBSETS = ("training", "validation")
NOTED_START = 0.1  # seconds between a file's start and its first picture, above which it is worth a note
CLIPS_SHOWN = 10  # notes about segments that pass the ends of their videos
CROP_OF_CACHED = 7 / 8  # a 224 px crop out of a 256 px frame, and the same share at every size
JITTER_PIXELS = 64 * 112 * 112  # of the frames that are jittered at once
SQUASH_LEAST = 0.85  # share of each side that a random crop keeps when the whole frame is squashed
Progress = Callable[[int, int, str], None]
Array = NDArray[np.float64]


@dataclass(frozen=True)
class Sample:
    """One window of one video: its frames in the cache and its labels."""

    index: int  # within the dataset; keys the augmentation
    window: Window
    segments: Array  # (G, 2) seconds, those that touch the window
    labels: NDArray[np.int64]  # (G,) indices into the class list
    cached: CachedVideo
    grid: NDArray[np.int64]  # (L, 8) positions in the cache, full fidelity


@dataclass(frozen=True)
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
    sources: Mapping[str, Source] = field(default_factory=dict)  # of the videos, by name

    def durations(self, subset: str) -> dict[str, float]:
        return {sample.window.video: sample.cached.duration for sample in self.samples[subset]}


def cache_side(full: Fidelity) -> int:
    """Short side (pixels) that the cache keeps: full fidelity plus the margin of a random crop; 256 for 224."""
    return 2 * round(full.side / CROP_OF_CACHED / 2)


def _probe(path: Path) -> VideoInfo | VideoError:
    try:
        return probe(path)
    except VideoError as error:
        return error


def _probe_all(paths: dict[str, Path]) -> tuple[dict[str, VideoInfo], list[Skipped]]:
    with ThreadPoolExecutor(min(len(paths), os.cpu_count() or 1) or 1) as pool:
        results = list(pool.map(_probe, paths.values()))
    infos: dict[str, VideoInfo] = {}
    skipped = []
    for (name, path), result in zip(paths.items(), results, strict=True):
        if isinstance(result, VideoInfo):
            infos[name] = result
        else:
            skipped.append(Skipped(name, str(path), str(result)))
    return infos, skipped


def _require(readable: Sequence[Video], skipped: Sequence[Skipped], config: DataConfig) -> None:
    where = f"{config.annotations} with {config.videos}"
    told = f" ({len(skipped)} skipped, first {skipped[0].name}: {skipped[0].reason})" if skipped else ""
    if not readable:
        raise InputError(
            f"{where}: no annotated video can be used{told}; check --videos (files are matched by name without "
            "extension) and the subsets in --annotations"
        )
    training = [video for video in readable if video.subset in ("training", UNASSIGNED)]
    if not any(video.segments for video in training):
        raise InputError(
            f"{where}: no usable training video has a segment within its duration{told}; "
            "check the subsets in --annotations: videos to train on are of the subset training (in THUMOS14 those are "
            "the ones that it calls Validation)"
        )
    taught = {segment.label for video in training for segment in video.segments}
    untaught = sorted({s.label for video in readable if video.subset == "validation" for s in video.segments} - taught)
    if untaught:
        raise InputError(
            f"{where}: class {untaught[0]!r}{f' and {len(untaught) - 1} more' if untaught[1:] else ''} occurs in "
            f"validation but in no usable training video{told}, so it can never be found; "
            "mend the subsets in --annotations"
        )


def _late_pictures(starts: dict[str, float]) -> list[str]:
    """A note about videos whose first picture comes later than their file's start; by name, in seconds."""
    late = sorted((name for name, start in starts.items() if start > NOTED_START), key=lambda name: -starts[name])
    if not late:
        return []
    shown = ", ".join(f"{name} at {starts[name]:.2f} s" for name in late[:5]) + (", ..." if len(late) > 5 else "")
    return [
        f"the pictures of {len(late)} video{'s' if len(late) > 1 else ''} begin after the file's start ({shown}); "
        "labels are read on the file's clock, as players show it"
    ]


def _lost_frames(infos: dict[str, VideoInfo]) -> list[str]:
    """A note about each video of which some frames do not decode, and the rest is used."""
    return [
        f"{name}: {info.lost} frame{'s' if info.lost > 1 else ''} of {info.path} could not be decoded and "
        f"{'are' if info.lost > 1 else 'is'} left out; the other {len(info.pts)} are used"
        for name, info in infos.items()
        if info.lost
    ]


def _wanted(annotations: Annotations, path: Path) -> tuple[list[Video], list[str]]:
    """The videos to train and evaluate on, and a note where those to evaluate on are not of the validation subset."""
    wanted = [video for video in annotations.videos if video.subset != "testing"]
    testing = annotations.subset("testing")
    if any(video.subset != "training" for video in wanted) or not any(video.segments for video in testing):
        return wanted, []
    note = f"{path} has no validation subset: what is evaluated are the {len(testing)} videos of its testing subset"
    return [
        video if video.subset != "testing" else replace(video, subset="validation") for video in annotations.videos
    ], [note]


def _divided(videos: list[Video], path: Path) -> tuple[list[Video], list[str]]:
    """The videos, divided into subsets if they have none, and a note that names those to validate on."""
    if not any(video.subset == UNASSIGNED for video in videos):
        return videos, []
    chosen = choose_validation(videos)
    names = sorted(chosen)
    if names:
        shown = ", ".join(names[:20]) + (f" and {len(names) - 20} more" if names[20:] else "")
        note = f"{path} has no subsets: {len(names)} of its {len(videos)} usable videos are validation: {shown}"
    else:
        note = f"{path} has no subsets, and no video that training can spare: nothing is evaluated"
    return [replace(v, subset="validation" if v.name in chosen else "training") for v in videos], [note]


def load_dataset(config: Config, annotations_path: Path, videos: Path, cache: Path, progress: Progress) -> Dataset:
    """Read labels, probe the videos, fill the frame cache, cut windows. Bad videos are skipped and counted.

    Raises InputError when nothing is left to train on, or when a validation class has no training segment.
    """
    annotations = load_annotations(annotations_path, clip=False)
    wanted, evaluated = _wanted(annotations, annotations_path)
    matches = find_videos(videos, [video.name for video in wanted])
    skipped = [Skipped(name, str(videos / name), reason) for name, reason in matches.absent.items()]
    infos, unreadable = _probe_all(matches.paths)
    short = {name for name, info in infos.items() if len(info.pts) < FRAMES_PER_SNIPPET}
    unreadable += [
        Skipped(name, str(infos[name].path), f"{len(infos[name].pts)} frames are less than one snippet of 8")
        for name in sorted(short)
    ]
    skipped += unreadable
    notes = [*annotations.notes, *evaluated, *matches.notes]
    notes += check_times([v for v in wanted if v.name not in short], infos, str(annotations_path))
    clipped: list[str] = []
    readable = []
    for annotated in wanted:
        if annotated.name in infos and annotated.name not in short:
            video, repairs = clip_to_duration(annotated, infos[annotated.name].duration)
            clipped += repairs
            readable.append(video)
    notes += clipped[:CLIPS_SHOWN]
    if clipped[CLIPS_SHOWN:]:
        notes.append(f"segments of more videos are clipped or dropped in the same way ({len(clipped)} notes in all)")
    _require(readable, skipped, config.data)

    notes += _lost_frames({video.name: infos[video.name] for video in readable})
    notes += _late_pictures({video.name: infos[video.name].start for video in readable})
    windows = {
        video.name: cut_windows(
            video.name, infos[video.name].duration, config.data.window, config.data.overlap, infos[video.name].start
        )
        for video in readable
    }
    grid = partial(full_grid, num_snippets=config.full.num_snippets, frame_stride=config.data.frame_stride)
    grids = {name: [grid(infos[name], window) for window in windows[name]] for name in windows}
    requests = [
        CacheRequest(name, infos[name], np.unique(np.concatenate([g.ravel() for g in grids[name]]))) for name in windows
    ]
    cached, undecodable = prepare(requests, cache, cache_side(config.full), progress=progress)
    skipped += undecodable
    readable, divided = _divided([video for video in readable if video.name in cached], annotations_path)
    notes += divided
    _require(readable, skipped, config.data)

    classes = tuple(sorted({s.label for v in readable if v.subset == "training" for s in v.segments}))
    samples: dict[str, list[Sample]] = {subset: [] for subset in SUBSETS}
    kept: dict[str, list[Video]] = {subset: [] for subset in SUBSETS}
    index = 0
    for video in readable:
        kept[video.subset].append(video)
        segments = np.array([(s.start, s.end) for s in video.segments], dtype=np.float64).reshape(-1, 2)
        labels = np.array([classes.index(s.label) for s in video.segments], dtype=np.int64)
        for window, frames in zip(windows[video.name], grids[video.name], strict=True):
            touching = (segments[:, 1] > window.start) & (segments[:, 0] < window.end)
            entry = cached[video.name]
            positions = entry.positions(frames.ravel()).reshape(frames.shape)
            samples[video.subset].append(Sample(index, window, segments[touching], labels[touching], entry, positions))
            index += 1
    return Dataset(
        classes,
        {subset: tuple(samples[subset]) for subset in SUBSETS},
        {subset: tuple(kept[subset]) for subset in SUBSETS},
        tuple(skipped),
        tuple(notes),
        annotations_path,
        {
            video.name: Source(info.size, len(info.pts), info.duration, video.segments)
            for video in wanted
            if (info := infos.get(video.name)) is not None
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
    for part, jitter in zip(frames.chunk(len(jitters)), jitters, strict=True):
        gain = torch.tensor(jitter.gain, device=frames.device)
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
        """Pre-training clips of one epoch in random order: every grid snippet whose centre lies in a segment, once.
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
            for snippet, centre in enumerate(sample.window.centres(self.full.num_snippets)):
                hit = np.flatnonzero((sample.segments[:, 0] <= centre) & (centre <= sample.segments[:, 1]))
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

"""What labels and videos say of each other before anything is decoded: which file each name means, what the files are,
which segments fit them, what the grid can express, which window, and whether a training could start.

`survey` finds it out in seconds; `lofi-fast check` prints it, and training (dataset.py) goes on from it.
"""

from __future__ import annotations

import gc
import hashlib
import os
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from lofi_fast import __version__
from lofi_fast.config import Config
from lofi_fast.data.annotations import UNASSIGNED, Annotations, FormatOptions, Video, clip_to_duration, load_annotations
from lofi_fast.data.cache import CacheRequest, Skipped, remembered
from lofi_fast.data.catalogue import Catalogue
from lofi_fast.data.entry import CachedVideo
from lofi_fast.data.grid import FOUND, Grid, Labelled, Share, best_tiou, choose_window, share, shares
from lofi_fast.data.matching import match_videos
from lofi_fast.data.plausibility import check_times
from lofi_fast.data.split import choose_validation
from lofi_fast.data.video import VideoError, VideoInfo, probe
from lofi_fast.data.windows import Window, cut_windows, full_grid
from lofi_fast.errors import InputError
from lofi_fast.fidelity import FRAMES_PER_SNIPPET, Fidelity

NOTED_START = 0.1  # seconds between a file's start and its first picture, above which it is worth a note
CLIPS_SHOWN = 10  # notes about segments that pass the ends of their videos
CROP_OF_CACHED = 7 / 8  # a 224 px crop out of a 256 px frame, and the same share at every size
LOST_WARNED = 0.1  # share of the training segments that cannot be found, from which on it is a warning
LEAST_FOUND = 0.05  # share of the training segments that must be found; with fewer, training teaches little but rests
REPEATS = 8  # times that each frame of the longest window is shown, from which on there are far too many snippets
SAVED_EVERY = 60.0  # seconds of probing, after which what was found out is kept, should the run be stopped
GLANCE = 65_536  # bytes of a file that are compared with another's at three places
Progress = Callable[[int, int, str], None]


@dataclass(frozen=True, slots=True)
class Surveyed:
    """One video that can be used. `labelled`: as the labels have it. `video`: in the subset that it is used in, with
    its own duration and segments clipped to it. `repairs`: sentences on what was clipped or dropped.
    """

    labelled: Video
    video: Video
    info: VideoInfo
    repairs: tuple[str, ...]

    @property
    def name(self) -> str:
        return self.video.name


@dataclass(frozen=True)
class Survey:
    """What is known of a data set before anything is decoded.

    window: seconds, None for whole videos. tried: what other windows would make of the training segments. warnings:
    notes that are to be shown loudly. refused: why no training can start, in one sentence, or None. known: what was
    found out about files, now or before.
    """

    config: Config
    path: Path  # of the annotations
    annotations: Annotations
    videos: tuple[Surveyed, ...]
    skipped: tuple[Skipped, ...]
    notes: tuple[str, ...]
    warnings: tuple[str, ...] = ()
    refused: str | None = None
    window: float | None = None
    tried: tuple[Share, ...] = ()
    known: Catalogue = field(default_factory=Catalogue)

    @property
    def grid(self) -> Grid:
        return _grid(self.config, self.window)

    def subset(self, name: str) -> list[Video]:
        return [one.video for one in self.videos if one.video.subset == name]

    @property
    def classes(self) -> tuple[str, ...]:
        """Sorted labels of the training segments."""
        return tuple(sorted({s.label for video in self.subset("training") for s in video.segments}))

    @cached_property
    def windows(self) -> dict[str, list[Window]]:
        """By name of the video."""
        return {
            one.name: cut_windows(
                one.name, one.info.duration, self.window, self.config.data.overlap, one.info.start
            )
            for one in self.videos
        }  # fmt: skip

    def check_scores(self) -> None:
        """Raises InputError for --video-scores that evaluation could not use; it must not wait for the first one."""
        if self.config.data.video_scores:
            from lofi_fast.data.video_scores import load_video_scores  # imports torch

            names = [video.name for video in self.subset("validation")]
            load_video_scores(Path(self.config.data.video_scores), names, list(self.classes))

    def large_batch(self) -> str | None:
        """A sentence where a joint step takes more windows than there are."""
        count, batch = sum(len(self.windows[video.name]) for video in self.subset("training")), self.config.joint.batch
        if batch <= count or not count:
            return None
        return f"--batch {batch} is more than the {count} training windows: an epoch of the joint stage is one step"

    def grids(self, one: Surveyed) -> list[NDArray[np.int64]]:
        """Source frames (num_snippets, 8) of each window of a video."""
        return [
            full_grid(one.info, window, self.config.full.num_snippets, self.config.data.frame_stride)
            for window in self.windows[one.name]
        ]

    @property
    def grid_text(self) -> str:
        """How the frames of any video are chosen, as a catalogue has it."""
        of = self.config
        return f"{__version__} {self.window} {of.data.overlap} {of.full} {of.data.frame_stride} {cache_side(of.full)}"

    def remembered(self, cache: Path) -> dict[str, CachedVideo]:
        """The entries that are there by what the catalogue knows; for those of other videos frames must be found."""
        infos = {one.name: one.info for one in self.videos}
        return remembered(infos, self.grid_text, cache, cache_side(self.config.full), self.known)


@dataclass(frozen=True)
class Requests:
    """What the cache is asked for, for each video of a survey (`names`: of these). They are made one at a time: their
    frames would be gigabytes.
    """

    found: Survey
    names: frozenset[str] | None = None

    def __len__(self) -> int:
        return len(self.found.videos if self.names is None else self.names)

    def __contains__(self, request: object) -> bool:
        return any(request == other for other in self)

    def __iter__(self) -> Iterator[CacheRequest]:
        grid = self.found.grid_text
        for one in self.found.videos:
            if self.names is None or one.name in self.names:
                yield cache_request(one, self.found.grids(one), grid)


def cache_request(one: Surveyed, grids: Sequence[NDArray[np.int64]], grid: str = "") -> CacheRequest:
    """The frames of a video that the cache keeps: those of the grids of all its windows. `grid`: see `CacheRequest`."""
    kept = np.zeros(len(one.info.pts), dtype=np.bool_)
    for frames in grids:
        kept[frames] = True
    return CacheRequest(one.name, one.info, np.flatnonzero(kept), grid)


def cache_side(full: Fidelity) -> int:
    """Short side (pixels) that the cache keeps: full fidelity plus the margin of a random crop; 256 for 224."""
    return 2 * round(full.side / CROP_OF_CACHED / 2)


@contextmanager
def collector_paused() -> Iterator[None]:
    """Python does not look for unused cycles of objects meanwhile: where millions are made that stay, each look at all
    of them would be in vain, and together they take longer than making them.
    """
    was = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()


@collector_paused()
def survey(
    config: Config,
    annotations_path: Path,
    videos: Path,
    progress: Progress = lambda *_: None,
    known: Catalogue | None = None,
) -> Survey:
    """Read the labels, find and probe the files, and see whether a training as `config` says could start.

    `progress` is told (files probed, files in all, name). Files that a catalogue knows are not opened. What no training
    can start with is in `Survey.refused`, with all else that could be found out. Raises InputError for labels that
    cannot be read, and without PyAV.
    """
    annotations = load_annotations(
        annotations_path, clip=False, options=replace(FormatOptions.of(config.data), videos=Path(videos))
    )
    wanted, evaluated = _wanted(annotations, annotations_path)
    known = known or Catalogue()
    found = Survey(config, annotations_path, annotations, (), (), (*annotations.notes, *evaluated), known=known)
    try:
        matches = match_videos(videos, [video.name for video in wanted])
    except InputError as error:
        return replace(found, refused=str(error))
    absent = [Skipped(name, str(videos / name), why) for name, why in (matches.absent | matches.unclear).items()]
    infos, unreadable = _probe_all(matches.paths, progress, known)
    found = replace(found, skipped=(*absent, *unreadable), notes=(*found.notes, *matches.notes))
    if matches.unclear:
        more = f" (and {len(matches.unclear) - 1} more names that are as unclear)" if len(matches.unclear) > 1 else ""
        found = replace(found, refused=f"{next(iter(matches.unclear.values()))}{more}")
    usable: list[Surveyed] = []
    clipped: list[str] = []
    for labelled in wanted:
        if labelled.name in infos:
            video, repairs = clip_to_duration(labelled, infos[labelled.name].duration)
            clipped += repairs
            usable.append(Surveyed(labelled, video, infos[labelled.name], repairs))
    notes: list[str] = []
    found = replace(found, videos=tuple(usable))
    try:
        notes += check_times([one.labelled for one in usable], infos, str(annotations_path))
        notes += clipped[:CLIPS_SHOWN]
        if clipped[CLIPS_SHOWN:]:
            notes.append(
                f"segments of more videos are clipped or dropped in the same way ({len(clipped)} notes in all)"
            )
        require_usable([one.video for one in usable], found.skipped, config)
        notes += _lost_frames({one.name: one.info for one in usable})
        notes += _late_pictures({one.name: one.info.start for one in usable})
        found, division = divided(found, [one.name for one in usable])
        require_usable([one.video for one in found.videos], found.skipped, config)
        notes += division
        repeated, trained_on_too = _repeated(found.videos)
        notes += repeated
        found = replace(found, warnings=(*found.warnings, *trained_on_too))
    except InputError as error:
        return _with_window(replace(found, notes=(*found.notes, *notes), refused=found.refused or str(error)))
    return _with_window(replace(found, notes=(*found.notes, *notes)))


def _probe(path: Path) -> VideoInfo | VideoError:
    try:
        return probe(path)
    except VideoError as error:
        return error


def _probe_all(
    paths: Mapping[str, Path], progress: Progress, known: Catalogue
) -> tuple[dict[str, VideoInfo], list[Skipped]]:
    """What can be used, and what cannot be read or holds less than a snippet."""
    infos = known.infos(paths)
    new = {name: path for name, path in paths.items() if name not in infos}
    if infos:
        progress(len(infos), len(paths), f"{len(infos)} that are known")
    skipped, short = [], []
    saved = time.monotonic()
    with ThreadPoolExecutor(min(len(new), os.cpu_count() or 1) or 1) as pool:
        results = pool.map(_probe, new.values())
        for number, ((name, path), result) in enumerate(zip(new.items(), results, strict=True), len(paths) - len(new)):
            if isinstance(result, VideoError):
                skipped.append(Skipped(name, str(path), str(result)))
            else:
                infos[name] = known.add_info(result)
            progress(number + 1, len(paths), name)
            if time.monotonic() - saved > SAVED_EVERY:
                known.save()
                saved = time.monotonic()
    for name, path in paths.items():
        if name in infos and len(infos[name].pts) < FRAMES_PER_SNIPPET:
            number = len(infos.pop(name).pts)
            short.append(Skipped(name, str(path), f"{number} frames are less than one snippet of 8"))
    return infos, [*skipped, *sorted(short, key=lambda one: one.name)]


def require_usable(readable: Sequence[Video], skipped: Sequence[Skipped], config: Config) -> None:
    """Raises InputError when nothing is left to train on, or when a validation class has no training segment."""
    where = f"{config.data.annotations} with {config.data.videos}"
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


def _repeated(videos: Sequence[Surveyed]) -> tuple[list[str], list[str]]:
    """(notes, warnings) about files of the same content under several names; a warning where one is evaluated on that
    another of them trains.
    """
    by_size: dict[tuple[int, int, float], list[Surveyed]] = {}
    for one in videos:
        by_size.setdefault((one.info.size, len(one.info.pts), one.info.duration), []).append(one)
    by_content: dict[bytes, list[Surveyed]] = {}
    for alike in by_size.values():
        if len(alike) > 1:
            for one in alike:
                by_content.setdefault(_glance(one.info), []).append(one)
    groups = [same for same in by_content.values() if len(same) > 1]
    sentences: tuple[list[str], list[str]] = ([], [])
    for across, what in (
        (False, "their segments count as those of several"),
        (True, "what is evaluated is trained on"),
    ):
        those = [same for same in groups if (len({one.video.subset for one in same}) > 1) == across]
        if those:
            shown = " and ".join(f"{one.name} ({one.video.subset})" for one in those[0][:3])
            more = f", and {len(those) - 1} more files" if those[1:] else ""
            start = "WARNING: " if across else ""
            sentences[across].append(f"{start}one file under several names: {shown} are the same video{more}; {what}")
    return sentences


def _glance(info: VideoInfo) -> bytes:
    """A digest of a file's length, beginning, middle and end."""
    digest = hashlib.blake2b(str(info.size).encode())
    try:
        with info.path.open("rb") as file:
            for place in (0, info.size // 2, max(info.size - GLANCE, 0)):
                file.seek(place)
                digest.update(file.read(GLANCE))
    except OSError:
        return str(info.path).encode()
    return digest.digest()


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


def divided(found: Survey, usable: Iterable[str]) -> tuple[Survey, list[str]]:
    """The survey of the `usable` videos alone, divided into subsets if the labels have none, and a note that names
    those to validate on.
    """
    kept = set(usable)
    videos = [one for one in found.videos if one.name in kept]
    if not any(one.labelled.subset == UNASSIGNED for one in videos):
        return replace(found, videos=tuple(videos)), []
    chosen = choose_validation([one.video for one in videos])
    names = sorted(chosen)
    if names:
        shown = ", ".join(names[:20]) + (f" and {len(names) - 20} more" if names[20:] else "")
        note = f"{found.path} has no subsets: {len(names)} of its {len(videos)} usable videos are validation: {shown}"
    else:
        note = f"{found.path} has no subsets, and no video that training can spare: nothing is evaluated"
    videos = [
        replace(one, video=replace(one.video, subset="validation" if one.name in chosen else "training"))
        for one in videos
    ]
    return replace(found, videos=tuple(videos)), [note]


# The grid


def _grid(config: Config, window: float | None) -> Grid:
    longest = config.head.max_duration if config.head.name == "gtad" else None
    return Grid(window, config.data.overlap, config.full.num_snippets, longest)


def times_of(videos: Iterable[tuple[Surveyed, Video]]) -> Labelled:
    """The segments of videos, each as one of `Surveyed.labelled` and `Surveyed.video` has them."""
    return Labelled.of(
        [(s.start, s.end, one.info.start, one.info.duration) for one, video in videos for s in video.segments]
    )


def _with_window(found: Survey) -> Survey:
    """Choose the window, if it is to be chosen, and see what grid and fidelity make of the training segments."""
    config = found.config
    training = times_of((one, one.video) for one in found.videos if one.video.subset in ("training", UNASSIGNED))
    count = len(training)
    asked = config.data.window
    if not count:
        return replace(found, window=None if asked == "labels" else asked)
    tried = shares(training, _grid(config, None))
    window = choose_window(tried, count) if asked == "labels" else asked
    found = replace(found, window=window, tried=tried)
    now = share(training, found.grid)
    notes, warnings, refused = list(found.notes), list(found.warnings), found.refused
    if asked == "labels":
        length = "whole videos" if window is None else f"{window:g} s"
        notes.append(
            f"the window is {length}, chosen from the labels: {now.positive} of {count} training segments are near a "
            "proposal; --window sets another"
        )
    if now.found < count:
        sentence = _lost(training, now, tried)
        if now.found < LEAST_FOUND * count:
            refused = refused or f"{found.path}: {sentence}"
        elif count - now.found >= LOST_WARNED * count:
            warnings.append(f"WARNING: {sentence}")
        else:
            notes.append(sentence)
    more, absurd = _too_fine(found)
    return replace(found, notes=(*notes, *more), warnings=tuple(warnings), refused=refused or absurd)


def _lost(training: Labelled, now: Share, tried: Sequence[Share]) -> str:
    """How many segments cannot be found, why, and what would let more be."""
    grid, count = now.grid, len(training)
    lost = best_tiou(training, grid) < FOUND
    lengths = training.ends - training.starts
    shown = training.video_ends - training.video_starts
    window = shown if grid.window is None else np.full(count, grid.window)
    longest = window / grid.num_snippets * min(grid.max_duration or grid.num_snippets, grid.num_snippets)
    too_long, none = int((lost & (lengths > longest)).sum()), int((lost & (lengths == 0)).sum())
    too_short = int((lost & (lengths > 0) & (lengths < window / grid.num_snippets)).sum())
    limit = "the window" if grid.max_duration is None else "the longest proposal"
    why = [
        f"{number} {'is' if number == 1 else 'are'} {what}"
        for number, what in (
            (too_long, f"longer than {limit}"),
            (too_short, "shorter than a snippet"),
            (none, "of no length"),
        )
        if number
    ]
    better = max(tried, key=lambda of: (of.found, of.grid.window is not None))
    advice = ""
    if better.found > now.found:
        flag = "video" if better.grid.window is None else f"{better.grid.window:g}"
        advice = f"; --window {flag} would let {better.found} be found"
    elif too_short:
        advice = "; more snippets (--fidelity), or a shorter --window, would let more be found"
    elif too_long and grid.max_duration is not None:
        advice = "; a larger --head.max-duration would let more be found"
    many = f"{now.found} of {count} training segments" if now.found else f"no training segment of {count}"
    return f"{many} can be found at tIoU {FOUND:g} with this grid ({grid}){': ' if why else ''}{', '.join(why)}{advice}"


def _too_fine(found: Survey) -> tuple[list[str], str | None]:
    """(notes, a refusal or None) about a fidelity that asks for more than the videos have."""
    if not found.videos:
        return [], None
    full = found.config.full
    most = 0
    for one in found.videos:
        for window in found.windows[one.name]:
            first, last = np.searchsorted(one.info.pts, (window.start, window.end))
            most = max(most, int(last - first))
    flag = f"--fidelity {full.num_snippets}x{full.side}"
    if full.num_snippets >= REPEATS * most:
        return [], (
            f"{flag}: no window of these videos has more than {most} frames, far fewer than {full.num_snippets} "
            "snippets; give fewer, or a longer --window"
        )
    notes = []
    if full.num_snippets > most:
        notes.append(
            f"{flag}: no window of these videos has more than {most} frames, so that several of the "
            f"{full.num_snippets} snippets are of the same frames"
        )
    largest = max(min(one.info.width, one.info.height) for one in found.videos)
    if full.side > largest:
        notes.append(f"{flag}: the short sides of these videos have {largest} px at most, which are only enlarged")
    return notes, None


# Labels among themselves


@dataclass(frozen=True)
class Overlaps:
    """Of one video's segments: pairs of the same label that overlap, and segments that have several labels."""

    same_label: int
    several_labels: int


def overlaps(video: Video) -> Overlaps:
    """Two labels on one segment are no fault; a label that overlaps itself often is one."""
    at: Counter[tuple[float, float]] = Counter((s.start, s.end) for s in video.segments)
    same = 0
    latest: dict[str, float] = {}
    for segment in sorted(video.segments, key=lambda s: (s.start, s.end)):
        same += segment.start < latest.get(segment.label, segment.start)
        latest[segment.label] = max(segment.end, latest.get(segment.label, segment.end))
    return Overlaps(same, sum(1 for number in at.values() if number > 1))

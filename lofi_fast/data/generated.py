"""Sets of videos that are made up: scripts of what happens in each, drawn and written as real H.264 with B-frames, so
that the whole path (probe, cache, decode) runs on them; and their labels.
"""

from __future__ import annotations

import fcntl
import json
import multiprocessing
import os
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import numpy.typing as npt

from lofi_fast.data.packages import require_pyav
from lofi_fast.errors import InputError

FRAME_RATE = 15
SUBSETS = ("training", "validation")
_MARKER = "complete.json"

Floats = npt.NDArray[np.float32]
Frame = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class Action:
    """A labelled stretch of a video; seconds."""

    start: float
    end: float
    label: str


@dataclass(frozen=True)
class Script:
    """All that is decided about a video before it is drawn."""

    name: str
    subset: str
    entropy: tuple[int, ...]
    width: int
    height: int
    num_frames: int
    actions: tuple[Action, ...]

    @property
    def seconds(self) -> float:
        return self.num_frames / FRAME_RATE


Render = Callable[[Script], Iterable[Frame]]  # each frame, (height, width, 3) RGB; picklable
Progress = Callable[[int, int, str], None]  # videos done, videos in all, name of the video just done


@dataclass(frozen=True)
class Kind:
    """Of a set: its name in messages, what its annotations call themselves, and how its videos are drawn."""

    name: str
    version: str
    render: Render


def make(
    target: Path,
    kind: Kind,
    marker: dict[str, int],
    scripts: list[Script],
    *,
    workers: int | None = None,
    progress: Progress | None = None,
) -> tuple[Path, Path]:
    """Write the videos of `scripts` and their labels as the folder `target`, or find them there.

    They are written under another name and renamed when whole, so a killed call leaves nothing that a later one takes
    for complete. Two calls at once are safe: the second waits and reuses.

    Args:
        marker: what tells this set from others; a folder with another marker is made anew.
        workers: processes; None takes one for each CPU this process may use, 1 stays in this process.

    Returns:
        The ActivityNet-form annotations (segments in seconds) and the folder of .mp4 files named after the videos.

    Raises:
        ValueError: `workers` out of range.
        InputError: the folder cannot be written, or the videos must be made without PyAV.
    """
    if workers is not None and workers < 1:
        raise ValueError(f"workers must be at least 1, not {workers}")
    folder = target.parent
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with open(folder / f".{kind.name}.lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not _is_complete(target, marker, scripts):
                # Under the lock nobody else is writing here, so whatever bears this name was left by a killed call.
                for leftover in folder.glob(f"{target.name}.partial-*"):
                    shutil.rmtree(leftover)
                if target.exists():
                    shutil.rmtree(target)
                # A name of its own: a killed call's workers may outlive it for a video and write where it was.
                partial = target.with_name(f"{target.name}.partial-{os.getpid()}")
                try:
                    _fill(partial, kind, marker, scripts, workers, progress)
                    partial.rename(target)
                finally:
                    shutil.rmtree(partial, ignore_errors=True)
    except OSError as error:
        reason = error.strerror or str(error)
        raise InputError(
            f"the {kind.name} set cannot be written to {folder} ({reason}): --cache names another"
        ) from error
    return target / "annotations.json", target / "videos"


def labels_of(version: str, scripts: list[Script]) -> dict[str, Any]:
    """The labels in ActivityNet form."""
    database = {
        script.name: {
            "subset": script.subset,
            "duration": script.seconds,
            "annotations": [
                {"segment": [action.start, action.end], "label": action.label} for action in script.actions
            ],
        }
        for script in scripts
    }
    return {"version": version, "database": database}


def _is_complete(target: Path, marker: dict[str, int], scripts: list[Script]) -> bool:
    try:
        written = json.loads((target / _MARKER).read_text())
    except (FileNotFoundError, ValueError):
        return False
    files = [target / "annotations.json", *(_video_path(target, script) for script in scripts)]
    return bool(written == marker) and all(file.is_file() for file in files)


def _video_path(target: Path, script: Script) -> Path:
    return target / "videos" / f"{script.name}.mp4"


def _fill(
    target: Path,
    kind: Kind,
    marker: dict[str, int],
    scripts: list[Script],
    workers: int | None,
    progress: Progress | None,
) -> None:
    require_pyav()
    (target / "videos").mkdir(parents=True)
    (target / "annotations.json").write_text(json.dumps(labels_of(kind.version, scripts), indent=1) + "\n")
    num_workers = min(workers or len(os.sched_getaffinity(0)), len(scripts))
    for done, name in enumerate(_written(target, kind.render, scripts, num_workers), start=1):
        if progress is not None:
            progress(done, len(scripts), name)
    (target / _MARKER).write_text(json.dumps(marker) + "\n")


def _written(target: Path, render: Render, scripts: list[Script], num_workers: int) -> Iterator[str]:
    """Write the videos and yield each name when its file is whole."""
    if num_workers == 1:
        for script in scripts:
            write_video(script, render(script), _video_path(target, script))
            yield script.name
        return
    # Spawned, not forked: the caller may hold threads and a CUDA context.
    executor = ProcessPoolExecutor(num_workers, mp_context=multiprocessing.get_context("spawn"))
    try:
        with _without_main():  # processes start with what is submitted
            names = {
                executor.submit(_draw, script, render, _video_path(target, script)): script.name for script in scripts
            }
        for future in as_completed(names):
            future.result()
            yield names[future]
    finally:
        executor.shutdown(cancel_futures=True)


@contextmanager
def _without_main() -> Iterator[None]:
    """A process that is spawned in this block does not import the caller's main module: a script that trains without a
    guard of its own would train there once more.
    """
    main = sys.modules["__main__"]
    sys.modules["__main__"] = ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main


def _draw(script: Script, render: Render, path: Path) -> None:
    write_video(script, render(script), path)


def write_video(script: Script, frames: Iterable[Frame], path: Path) -> None:
    import av
    from av.video.reformatter import ColorRange, Colorspace

    with av.open(str(path), "w") as container:
        # x264's bits depend on the number of threads, and its fast macroblock-tree code gives other bits from one run
        # to the next (seen with core 165, frames of 96 x 96); cpu-independent leaves that code out.
        options = {"crf": "18", "preset": "veryfast", "bf": "3", "g": "60", "x264-params": "cpu-independent=1"}
        stream = container.add_stream("libx264", rate=FRAME_RATE, options=options)
        context = stream.codec_context
        context.thread_count = 1
        context.width, context.height = script.width, script.height
        context.pix_fmt = "yuv420p"
        context.colorspace, context.color_range = 6, 1  # BT.601 as SMPTE 170M, limited range
        for index, pixels in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24").reformat(
                format="yuv420p", dst_colorspace=Colorspace.ITU601, dst_color_range=ColorRange.MPEG
            )
            frame.pts, frame.time_base = index, Fraction(1, FRAME_RATE)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


def smooth_noise(rng: np.random.Generator, side: int, wavelength: float) -> Floats:
    """Periodic noise of shape (side, side, 3), zero mean, unit deviation, little detail below `wavelength`."""
    frequency = np.hypot(np.fft.fftfreq(side)[:, None], np.fft.rfftfreq(side)[None])
    response = np.exp(-0.5 * (frequency * wavelength) ** 2 * 4)[..., None]
    spectrum = np.fft.rfft2(rng.standard_normal((side, side, 3)), axes=(0, 1)) * response
    spectrum[0, 0] = 0
    noise = np.fft.irfft2(spectrum, s=(side, side), axes=(0, 1))
    return np.asarray(noise / noise.std(), np.float32)

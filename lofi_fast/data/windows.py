"""Windows: the stretch of a video that the head sees at once, and the grid of frames that its snippets are made of.

Where windows overlap by a whole number of snippets, their grids coincide there: the same snippets are of both windows.

ActivityNet and HACS rescale the whole video to L snippets: one window a video. THUMOS-like sets have long videos with
short actions: windows of fixed length that overlap. Times are seconds on the file's clock (see video.py), by PTS.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from lofi_fast.data.video import VideoInfo
from lofi_fast.fidelity import FRAMES_PER_SNIPPET

# Seconds. Of two frames that are as near to a time but for this, the earlier is taken: a snippet that two windows share
# has one time, which each of them computes with a rounding of its own.
TIE = 1e-10


@dataclass(frozen=True, slots=True)
class Window:
    """`start` and `end` in seconds; `end` may pass the video's end, where the last frame is repeated."""

    video: str
    start: float
    end: float

    def centres(self, num_snippets: int) -> NDArray[np.float64]:
        """Centre times (seconds) of `num_snippets` equally spaced snippets."""
        return self.start + (np.arange(num_snippets) + 0.5) * (self.end - self.start) / num_snippets

    def edges(self, chosen: NDArray[np.int64], full: int) -> NDArray[np.float64]:
        """Boundary times (len(chosen) + 1,) of the snippets `chosen` out of the `full` grid: halfway between
        neighbouring centres, the window's own ends outside. For the full grid these are equally spaced.
        """
        centres = self.centres(full)[chosen]
        return np.concatenate([[self.start], (centres[1:] + centres[:-1]) / 2, [self.end]])


def cut_windows(video: str, duration: float, length: float | None, overlap: float, begins: float = 0.0) -> list[Window]:
    """The windows of one video, whose pictures are shown from `begins` to `duration` seconds: all of it when `length`
    is None, else windows of `length` seconds that start every length * (1 - overlap) seconds, the last one moved back
    to end with the video.
    """
    shown = duration - begins
    if length is None or shown <= length:
        return [Window(video, begins, duration if length is None else begins + length)]
    stride = length * (1 - overlap)
    num_strides = int(np.ceil((shown - length) / stride - 1e-9))
    starts = [begins + min(i * stride, shown - length) for i in range(num_strides + 1)]
    return [Window(video, start, start + length) for start in starts]


def full_grid(info: VideoInfo, window: Window, num_snippets: int, frame_stride: int) -> NDArray[np.int64]:
    """Source frame indices (num_snippets, 8) of the full-fidelity grid: around the frame nearest to each snippet
    centre, 8 frames `frame_stride` apart, clamped to the video.
    """
    return frames_around(info, centre_frames(info, window, num_snippets), frame_stride)


def centre_frames(info: VideoInfo, window: Window, num_snippets: int) -> NDArray[np.int64]:
    """(num_snippets,) the frame nearest to each snippet centre, the earlier of two that are as near; ascending."""
    times = window.centres(num_snippets)
    after = np.searchsorted(info.pts, times)
    before, after = np.maximum(after - 1, 0), np.minimum(after, len(info.pts) - 1)
    nearest: NDArray[np.int64] = np.where((info.pts[before] + info.pts[after]) / 2 < times - TIE, after, before)
    return nearest


def frames_around(info: VideoInfo, centres: NDArray[np.int64], frame_stride: int) -> NDArray[np.int64]:
    """(n, 8) frames of the snippets around the frames `centres` (n,): `frame_stride` apart, clamped to the video."""
    offsets = (np.arange(FRAMES_PER_SNIPPET) - FRAMES_PER_SNIPPET // 2) * frame_stride
    frames: NDArray[np.int64] = np.minimum(np.maximum(centres[:, None] + offsets[None, :], 0), len(info.pts) - 1)
    return frames


def grids_coincide(num_snippets: int, overlap: float) -> bool:
    """Whether windows that overlap by this share of their length have snippets in common: a window must begin a whole
    number of snippets after the one before.
    """
    shift = num_snippets * (1 - overlap)
    return overlap > 0 and abs(shift - round(shift)) < 1e-9


@dataclass(frozen=True, eq=False)
class SharedSnippets:
    """The snippets of a video's windows, each once. The centre frame of a snippet tells all its frames.

    centres (N,) int64: ascending. places: of each window, (L,) int64: where its snippets are among them.
    """

    centres: NDArray[np.int64]
    places: tuple[NDArray[np.int64], ...]

    @staticmethod
    def of(info: VideoInfo, windows: Sequence[Window], num_snippets: int) -> SharedSnippets:
        shown = [centre_frames(info, window, num_snippets) for window in windows]
        centres = np.unique(np.concatenate(shown))
        return SharedSnippets(centres, tuple(np.searchsorted(centres, frames) for frames in shown))


def equal_parts(array: NDArray[np.int64], largest: int) -> list[NDArray[np.int64]]:
    """The array in as few parts of at most `largest` as there can be, whose sizes are the same but for one."""
    return np.array_split(array, -(-len(array) // largest))

"""Windows: the stretch of a video that the head sees at once, and the grid of frames that its snippets are made of.

ActivityNet and HACS rescale the whole video to L snippets: one window a video. THUMOS-like sets have long videos with
short actions: windows of fixed length that overlap. Times are seconds on the file's clock (see video.py), by PTS.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from lofi_fast.data.video import VideoInfo
from lofi_fast.fidelity import FRAMES_PER_SNIPPET


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
    times = window.centres(num_snippets)
    after = np.searchsorted(info.pts, times)
    before, after = np.maximum(after - 1, 0), np.minimum(after, len(info.pts) - 1)
    centres = np.where((info.pts[before] + info.pts[after]) / 2 < times, after, before)
    offsets = (np.arange(FRAMES_PER_SNIPPET) - FRAMES_PER_SNIPPET // 2) * frame_stride
    return np.minimum(np.maximum(centres[:, None] + offsets[None, :], 0), len(info.pts) - 1)

"""Which segments can be found at all: how near the proposals of a head come to them, before anything is trained.

A head that scores proposals between the snippets of a window cannot give an action longer than the window its true end,
nor one much shorter than a snippet its true start. Training then teaches it as background. What comes nearest to each
segment is arithmetic, and needs nothing but the times in the labels and the lengths of the videos.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

FOUND = 0.5  # tIoU of its nearest proposal, from which on a segment can be found
POSITIVE = 0.7  # the same, from which on training counts a proposal as a good one, and the window is chosen for
WINDOWS = (8.0, 16.0, 32.0, 64.0, 128.0, 256.0, 512.0, 1024.0)  # seconds that a window may be chosen from
USUAL_WINDOW = 32.0  # seconds, chosen wherever it does as well as any other
AS_GOOD = 0.02  # share of the segments by which a window may be behind the best one and still do as well
_AT_ONCE = 1_000_000  # pairs of a segment and a window that are worked on at once

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Grid:
    """The proposals of a head: windows of `window` seconds (None: whole videos) that overlap by a share of their
    length, each of `num_snippets` equal snippets. A proposal is 1 to `max_duration` (None: all) snippets in a row.
    `points`: the head looks for points in time, which are found wherever they are.
    """

    window: float | None
    overlap: float
    num_snippets: int
    max_duration: int | None = None
    points: bool = False

    def __str__(self) -> str:
        window = "whole videos" if self.window is None else f"window {self.window:g} s"
        return f"{window}, {self.num_snippets} snippets"


@dataclass(frozen=True)
class Labelled:
    """Segments beside the videos that they are in, all (G,) in seconds on the files' clocks: `starts` and `ends` of the
    segments, and where the pictures of each one's video begin and end.
    """

    starts: Array
    ends: Array
    video_starts: Array
    video_ends: Array

    @staticmethod
    def of(rows: Sequence[tuple[float, float, float, float]]) -> Labelled:
        """Of (start, end, start of the video, end of the video) of each segment."""
        return Labelled(*np.array(rows, dtype=np.float64).reshape(-1, 4).T)

    def __len__(self) -> int:
        return len(self.starts)


def best_tiou(segments: Labelled, grid: Grid) -> Array:
    """(G,) the highest tIoU of each segment with a proposal of any window of its video; proposals end with the video.

    0 for a segment of no length; 1 for all where points are looked for.
    """
    if grid.points:
        return np.ones(len(segments))
    shown = segments.video_ends - segments.video_starts
    length = shown if grid.window is None else np.full(len(segments), grid.window)
    stride = length * (1 - grid.overlap)
    # The windows of `windows.cut_windows`: one every stride, and the last moved back to end with the video.
    last = np.where(shown > length, np.ceil((shown - length) / stride - 1e-9), 0).astype(np.int64)
    # Those that touch the segment; the last may, wherever it would have been.
    low = np.floor((segments.starts - segments.video_starts - length) / stride).astype(np.int64).clip(0, last)
    high = np.floor((segments.ends - segments.video_starts) / stride).astype(np.int64).clip(0, last)
    counts = high - low + 2
    best = np.zeros(len(segments))
    for part in _parts(counts):
        which = np.repeat(part, counts[part])
        place = np.arange(len(which)) - np.repeat(np.cumsum(counts[part]) - counts[part], counts[part])
        number = np.where(place == counts[which] - 1, last[which], low[which] + place)
        start = np.minimum(number * stride[which], np.maximum(shown - length, 0)[which]) + segments.video_starts[which]
        found = _best_in_window(
            segments.starts[which], segments.ends[which], start, length[which], segments.video_ends[which], grid
        )
        np.maximum.at(best, which, found)
    return best


def _parts(counts: NDArray[np.int64]) -> list[NDArray[np.int64]]:
    """Indices of segments in parts of a bounded number of pairs, or of one segment."""
    if not len(counts):
        return []
    before = np.cumsum(counts) - counts
    return np.split(np.arange(len(counts)), np.flatnonzero(np.diff(before // _AT_ONCE)) + 1)


def _best_in_window(starts: Array, ends: Array, window: Array, length: Array, video_ends: Array, grid: Grid) -> Array:
    """(P,) highest tIoU of each segment with a proposal of one window.

    The tIoU falls as either boundary moves away from the segment's own. So the best proposal has one of the two edges
    beside the segment's start or end, or it is as long, or as short, as proposals may be.
    """
    longest = min(grid.max_duration or grid.num_snippets, grid.num_snippets)
    width = length / grid.num_snippets
    first = ((starts - window) / width, (ends - window) / width)
    near_start, near_end = ([(np.floor(place) + step).clip(0, grid.num_snippets) for step in (0, 1)] for place in first)
    froms = [*near_start, *(edge - longest for edge in near_end), *(edge - 1 for edge in near_end)]
    best = np.zeros(len(starts))
    for low in froms:
        low = low.clip(0, grid.num_snippets - 1)
        for edge in near_end:
            high = edge.clip(low + 1, np.minimum(low + longest, grid.num_snippets))
            a = np.minimum(window + low * width, video_ends)
            b = np.minimum(window + high * width, video_ends)
            inter = (np.minimum(b, ends) - np.maximum(a, starts)).clip(0)
            union = (b - a) + (ends - starts) - inter
            np.maximum(best, np.divide(inter, union, out=np.zeros_like(inter), where=union > 0), out=best)
    return best


@dataclass(frozen=True)
class Share:
    """What a grid makes of the segments."""

    grid: Grid
    found: int  # of the segments can be found, at tIoU `FOUND`
    positive: int  # have a proposal of tIoU `POSITIVE`


def share(segments: Labelled, grid: Grid) -> Share:
    best = best_tiou(segments, grid)
    return Share(grid, int((best >= FOUND).sum()), int((best >= POSITIVE).sum()))


def shares(segments: Labelled, grid: Grid) -> tuple[Share, ...]:
    """What windows of other lengths would make of the segments, up to the first that holds the longest video, and whole
    videos last.
    """
    longest = float((segments.video_ends - segments.video_starts).max(initial=0.0))
    count = sum(window < longest for window in WINDOWS) + 1
    return tuple(share(segments, replace(grid, window=window)) for window in (*WINDOWS[:count], None))


def choose_window(tried: Sequence[Share], num_segments: int) -> float | None:
    """The window, of those tried, that is nearest to `USUAL_WINDOW` among those that do as well as the best: with which
    as many segments, but for a share of `AS_GOOD`, have a proposal that training counts as good. None: whole videos,
    where no fixed length does as well.
    """
    enough = max(of.positive for of in tried) - AS_GOOD * num_segments
    lengths = [of.grid.window for of in tried if of.positive >= enough and of.grid.window is not None]
    return min(lengths, key=lambda window: abs(np.log2(window / USUAL_WINDOW)), default=None)

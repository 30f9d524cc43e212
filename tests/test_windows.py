"""Windows cover a video; the grid takes the frames whose times are nearest, at any frame rate."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lofi_fast.data.video import VideoInfo
from lofi_fast.data.windows import SharedSnippets, Window, cut_windows, equal_parts, full_grid, grids_coincide
from lofi_fast.fidelity import select_snippets


def video(pts: list[float] | np.ndarray, last_frame: float = 0.1) -> VideoInfo:
    times = np.asarray(pts, dtype=np.float64)
    return VideoInfo(Path("v.mp4"), times, float(times[-1]) + last_frame, 64, 48, 0, "h264", "yuv420p", 1, 1)


def spans(windows: list[Window]) -> list[tuple[float, float]]:
    return [(w.start, w.end) for w in windows]


def test_centres_by_hand() -> None:
    assert Window("v", 10.0, 18.0).centres(4).tolist() == [11.0, 13.0, 15.0, 17.0]
    assert Window("v", 0.0, 3.0).centres(1).tolist() == [1.5]


def test_edges_of_the_full_grid_are_equally_spaced() -> None:
    assert Window("v", 10.0, 18.0).edges(np.arange(4), 4).tolist() == [10.0, 12.0, 14.0, 16.0, 18.0]
    edges = Window("v", 3.0, 124.4).edges(np.arange(100), 100)
    np.testing.assert_allclose(edges, np.linspace(3.0, 124.4, 101), rtol=0, atol=1e-12)


def test_edges_of_chosen_snippets_by_hand() -> None:
    # Centres of 0..7 are 0.5, 1.5, ...; of 1, 3, 5, 7 they are 1.5, 3.5, 5.5, 7.5, with halves 2.5, 4.5, 6.5.
    assert Window("v", 0.0, 8.0).edges(np.array([1, 3, 5, 7]), 8).tolist() == [0.0, 2.5, 4.5, 6.5, 8.0]
    assert Window("v", 4.0, 8.0).edges(np.array([2]), 4).tolist() == [4.0, 8.0]


@pytest.mark.parametrize("num_snippets", [100, 99, 50, 25, 6, 2])
def test_edges_lie_between_the_centres_of_what_is_shown(num_snippets: int) -> None:
    window = Window("v", 7.0, 151.0)
    chosen = select_snippets(100, num_snippets)
    edges, centres = window.edges(chosen, 100), window.centres(100)[chosen]
    assert len(edges) == num_snippets + 1
    assert (edges[0], edges[-1]) == (7.0, 151.0)
    assert np.all(edges[:-1] < centres) and np.all(centres < edges[1:])


def test_one_window_without_a_length() -> None:
    assert spans(cut_windows("v", 123.4, None, 0.5)) == [(0.0, 123.4)]


def test_a_short_video_has_one_window_that_passes_its_end() -> None:
    assert spans(cut_windows("v", 20.0, 32.0, 0.5)) == [(0.0, 32.0)]
    assert spans(cut_windows("v", 32.0, 32.0, 0.5)) == [(0.0, 32.0)]


def test_windows_by_hand() -> None:
    assert spans(cut_windows("v", 20.0, 8.0, 0.5)) == [(0.0, 8.0), (4.0, 12.0), (8.0, 16.0), (12.0, 20.0)]
    # The last one is moved back to end with the video: 16 would pass it.
    assert spans(cut_windows("v", 21.0, 8.0, 0.5)) == [(0, 8), (4, 12), (8, 16), (12, 20), (13, 21)]
    assert spans(cut_windows("v", 9.0, 8.0, 0.0)) == [(0.0, 8.0), (1.0, 9.0)]
    assert spans(cut_windows("v", 16.0, 8.0, 0.75)) == [(0, 8), (2, 10), (4, 12), (6, 14), (8, 16)]
    assert {w.video for w in cut_windows("v", 21.0, 8.0, 0.5)} == {"v"}


def test_windows_begin_with_the_first_picture() -> None:
    assert spans(cut_windows("v", 26.0, None, 0.5, 6.0)) == [(6.0, 26.0)]
    assert spans(cut_windows("v", 26.0, 32.0, 0.5, 6.0)) == [(6.0, 38.0)]
    assert spans(cut_windows("v", 26.0, 8.0, 0.5, 6.0)) == [(6, 14), (10, 18), (14, 22), (18, 26)]
    late = video(6 + np.arange(100) / 10)
    grid = full_grid(late, Window("v", 6.0, 16.0), 10, 1)
    np.testing.assert_allclose(late.pts[grid[:, 4]], 6.5 + np.arange(10), atol=0.051)


@settings(max_examples=300)
@given(st.floats(0.1, 5000), st.floats(1, 500), st.floats(0, 0.9))
def test_windows_cover_the_video_and_overlap_at_least_as_asked(duration: float, length: float, overlap: float) -> None:
    windows = cut_windows("v", duration, length, overlap)
    assert windows[0].start == 0.0
    assert windows[-1].end >= duration - 1e-6
    assert len(windows) == 1 or windows[-1].end <= duration + 1e-6
    stride = length * (1 - overlap)
    for before, after in pairwise(windows):
        assert 0 < after.start - before.start <= stride + 1e-6
    assert all(w.end - w.start == pytest.approx(length) for w in windows)
    assert len(windows) <= max(duration - length, 0) / stride + 2


@pytest.mark.parametrize("strides", [1, 4, 6, 7, 12])
def test_an_exact_multiple_of_the_stride_gives_no_window_twice(strides: int) -> None:
    # In floating point, each of these is a hair more than a whole number of strides.
    duration = 0.2 + 0.1 * strides
    assert (duration - 0.2) / 0.1 > strides
    windows = cut_windows("v", duration, 0.2, 0.5)
    assert len(windows) == strides + 1
    assert windows[-1].end == pytest.approx(duration)


def test_grid_by_hand() -> None:
    # 100 frames at 10 a second; centres 2.5 and 7.5 s lie on frames 25 and 75, 8 frames each, 4 of them before.
    info = video(np.arange(100) / 10)
    grid = full_grid(info, Window("v", 0.0, 10.0), 2, 3)
    assert grid.tolist() == [[13, 16, 19, 22, 25, 28, 31, 34], [63, 66, 69, 72, 75, 78, 81, 84]]
    assert grid.dtype == np.int64


def test_grid_is_clamped_to_the_video_on_both_sides() -> None:
    info = video(np.arange(10) / 10)
    grid = full_grid(info, Window("v", 0.0, 2.0), 2, 2)
    # Centres 0.5 and 1.5 s: frame 5, and the last frame (9) for the one past the end.
    assert grid.tolist() == [[0, 0, 1, 3, 5, 7, 9, 9], [1, 3, 5, 7, 9, 9, 9, 9]]


def test_a_video_of_one_frame_repeats_it() -> None:
    assert full_grid(video([0.0]), Window("v", 0.0, 5.0), 3, 1).tolist() == [[0] * 8] * 3


def test_variable_frame_rate_goes_by_time_and_not_by_number() -> None:
    # Ten frames in the first second, then one a second: 3.4 s is nearest to the frame of 3 s, which is number 12.
    info = video([*(np.arange(10) / 10), 1.0, 2.0, 3.0, 4.0, 5.0])
    middle = full_grid(info, Window("v", 0.0, 6.8), 1, 1)[0, 4]
    assert middle == 12


@settings(max_examples=100)
@given(
    st.lists(st.floats(0.001, 2.0), min_size=1, max_size=80),
    st.integers(1, 40),
    st.integers(1, 9),
    st.floats(0, 30),
    st.floats(0.5, 60),
)
def test_grid_is_the_nearest_frame_by_time(
    gaps: list[float], num_snippets: int, stride: int, start: float, length: float
) -> None:
    info = video(np.concatenate([[0.0], np.cumsum(gaps)]))
    window = Window("v", start, start + length)
    grid = full_grid(info, window, num_snippets, stride)
    assert grid.shape == (num_snippets, 8)
    for frames, centre in zip(grid, window.centres(num_snippets), strict=True):
        away = np.abs(info.pts - centre)
        assert away[frames[4]] <= away.min() + 1e-9
        expected = [min(max(frames[4] + offset * stride, 0), len(info.pts) - 1) for offset in range(-4, 4)]
        assert frames.tolist() == expected


def test_of_two_frames_as_near_the_earlier_is_taken_whatever_the_window() -> None:
    # At 30 frames a second a snippet every 5 frames has its centre between two frames, and windows start at times that
    # floating point does not hold.
    info, seconds = video(np.arange(9000) / 30), 256 * 5 / 30
    for window in cut_windows("v", 300.0, seconds, 0.5)[:-1]:
        centres = full_grid(info, window, 256, 1)[:, 4]
        assert centres.tolist() == (round(window.start * 30) + 2 + 5 * np.arange(256)).tolist()


@pytest.mark.parametrize(
    ("fps", "seconds", "num_snippets", "overlap", "begins"),
    [
        (30, 256 * 5 / 30, 256, 0.5, 0.0),
        (25, 32.0, 64, 0.5, 0.0),
        (29.97, 10.0, 30, 0.9, 1.3),
        (24, 7.0, 21, 2 / 3, 0.4),
    ],
)
def test_windows_share_the_snippets_that_they_have_in_common(
    fps: float, seconds: float, num_snippets: int, overlap: float, begins: float
) -> None:
    assert grids_coincide(num_snippets, overlap)
    info = video(begins + np.arange(round(200 * fps)) / fps, 1 / fps)
    windows = cut_windows("v", info.duration, seconds, overlap, begins)
    snippets = SharedSnippets.of(info, windows, num_snippets)
    shift = round(num_snippets * (1 - overlap))
    # each once, and the last window, which ends with the video, has snippets of its own
    assert len(snippets.centres) <= shift * (len(windows) - 2) + 2 * num_snippets
    for window, places in zip(windows, snippets.places, strict=True):
        assert np.array_equal(snippets.centres[places], full_grid(info, window, num_snippets, 1)[:, 4])
    for before, after in pairwise(snippets.places[:-1]):
        assert np.array_equal(before[shift:], after[:-shift])


def test_the_snippets_past_the_end_of_a_video_are_one() -> None:
    info = video(np.arange(100) / 10)
    snippets = SharedSnippets.of(info, [Window("v", 0.0, 40.0)], 8)
    assert snippets.centres.tolist() == [25, 75, 99]
    assert snippets.places[0].tolist() == [0, 1, 2, 2, 2, 2, 2, 2]


def test_grids_that_do_not_coincide() -> None:
    assert not grids_coincide(5, 0.5) and not grids_coincide(64, 0.3) and not grids_coincide(64, 0.0)


def test_equal_parts() -> None:
    assert [len(part) for part in equal_parts(np.arange(65), 64)] == [33, 32]
    assert [len(part) for part in equal_parts(np.arange(64), 64)] == [64]
    assert np.array_equal(np.concatenate(equal_parts(np.arange(100), 7)), np.arange(100))

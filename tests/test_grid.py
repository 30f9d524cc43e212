"""What a grid of proposals can express, against all of its proposals one by one; and the window chosen from labels."""

from __future__ import annotations

import time
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lofi_fast.data.grid import Grid, Labelled, best_tiou, choose_window, share, shares
from lofi_fast.data.windows import cut_windows
from lofi_fast.head.targets import cell_segments, pairwise_iou, valid_cells


def by_hand(segments: list[tuple[float, float]], begins: float, ends: float, grid: Grid) -> np.ndarray:
    """Through every cell of every window that training would cut."""
    cells = valid_cells(grid.num_snippets, grid.max_duration or grid.num_snippets)
    chosen = np.arange(grid.num_snippets)
    proposals = [
        cell_segments(cells, window.edges(chosen, grid.num_snippets)).clip(0, ends)
        for window in cut_windows("v", ends, grid.window, grid.overlap, begins)
    ]
    return pairwise_iou(np.array(segments).reshape(-1, 2), np.concatenate(proposals)).max(axis=1)


@settings(max_examples=150)
@given(
    st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1)), min_size=1, max_size=8),
    st.sampled_from([None, 2.0, 5.0, 16.0, 40.0]),
    st.sampled_from([0.0, 0.3, 0.5, 0.75]),
    st.integers(1, 12),
    st.sampled_from([None, 1, 3, 50]),
    st.floats(0, 3),
    st.floats(0.5, 50),
)
def test_the_best_proposal_is_that_of_all_of_them(
    drawn: list[tuple[float, float]],
    window: float | None,
    overlap: float,
    num_snippets: int,
    max_duration: int | None,
    begins: float,
    shown: float,
) -> None:
    ends = begins + shown
    segments = [(begins * 0.9 + shown * min(pair), begins * 0.9 + shown * max(pair)) for pair in drawn]
    grid = Grid(window, overlap, num_snippets, max_duration)
    found = best_tiou(Labelled.of([(*segment, begins, ends) for segment in segments]), grid)
    np.testing.assert_allclose(found, by_hand(segments, begins, ends, grid), atol=1e-9)


def test_no_segment_and_a_segment_of_no_length() -> None:
    grid = Grid(8.0, 0.5, 8)
    assert best_tiou(Labelled.of([]), grid).shape == (0,)
    assert best_tiou(Labelled.of([(3.0, 3.0, 0.0, 20.0)]), grid).tolist() == [0.0]


def test_an_action_twice_as_long_as_the_window_cannot_be_found() -> None:
    segments = Labelled.of([(10.0, 75.0, 0.0, 300.0), (100.0, 160.0, 0.0, 300.0), (10.1, 10.3, 0.0, 300.0)])
    short, long, fine = (Grid(window, 0.5, 64) for window in (32.0, 64.0, 8.0))
    assert best_tiou(segments, short) == pytest.approx([32 / 65, 32 / 60, 0.4])
    assert [share(segments, grid).found for grid in (short, long, fine)] == [1, 2, 1]


def test_many_segments_take_little_time() -> None:
    rng = np.random.default_rng(0)
    length = np.repeat(rng.uniform(5, 600, 20_000), 10)
    starts = length * rng.uniform(0, 0.9, len(length))
    ends = starts + (length - starts) * rng.uniform(0, 1, len(length))
    segments = Labelled(starts, ends, np.zeros(len(length)), length)
    began = time.process_time()
    best = best_tiou(segments, Grid(32.0, 0.5, 64))
    print(f"{time.process_time() - began:.1f} s")
    checked = [by_hand([(starts[i], ends[i])], 0.0, length[i], Grid(32.0, 0.5, 64))[0] for i in range(0, 200_000, 9973)]
    np.testing.assert_allclose(best[::9973], checked, atol=1e-9)


def labelled(*lengths: float, video: float = 3000.0) -> Labelled:
    starts = np.linspace(0, video - max(lengths), len(lengths))
    return Labelled.of([(s, s + length, 0.0, video) for s, length in zip(starts, lengths, strict=True)])


@pytest.mark.parametrize(
    ("lengths", "window"),
    [
        ([5.0] * 50, 32.0),
        ([2.0] * 20 + [40.0] * 20, 32.0),
        ([65.0] * 30, 64.0),
        ([4.0] * 40 + [65.0] * 5, 64.0),
        ([4.0] * 99 + [65.0], 32.0),  # one of a hundred does not move it
        ([0.2] * 40, 8.0),
        ([400.0] * 10, 512.0),
        ([2500.0] * 10, None),
    ],
)
def test_the_window_that_the_labels_ask_for(lengths: list[float], window: float | None) -> None:
    segments = labelled(*lengths)
    tried = shares(segments, Grid(None, 0.5, 64))
    assert choose_window(tried, len(segments)) == window


def test_windows_are_tried_up_to_the_longest_video() -> None:
    tried = [of.grid.window for of in shares(labelled(5.0, 3.0, video=50.0), Grid(None, 0.5, 64))]
    assert tried == [8.0, 16.0, 32.0, 64.0, None]
    assert all(a is not None and (b is None or b > a) for a, b in pairwise(tried))

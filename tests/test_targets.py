"""Labels of the head, by hand on four snippets of one second."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lofi_fast.head.targets import (
    ABSENT,
    IGNORED,
    SHOWN,
    Targets,
    boundary_overlap,
    cell_segments,
    draw_regression_cells,
    make_targets,
    pairwise_iou,
    valid_cells,
)

EDGES = np.arange(5.0)  # L = 4
# The cells of L = 4 by duration, then start, as seconds.
CELLS = [(0, 1), (1, 2), (2, 3), (3, 4), (0, 2), (1, 3), (2, 4), (0, 3), (1, 4), (0, 4)]
CLASSES = 3


def targets(
    segments: list[tuple[float, float]],
    labels: list[int] | None = None,
    edges: np.ndarray = EDGES,
    max_duration: int = 4,
    with_zero: bool = False,
    seed: int = 0,
) -> Targets:
    return make_targets(
        edges,
        np.array(segments, dtype=np.float64).reshape(-1, 2),
        np.array(labels if labels is not None else [0] * len(segments), dtype=np.int64),
        max_duration,
        CLASSES,
        np.random.default_rng(seed),
        with_zero=with_zero,
    )


def test_cells_by_hand() -> None:
    assert cell_segments(valid_cells(4, 4), EDGES).tolist() == [list(cell) for cell in CELLS]
    assert valid_cells(4, 2).tolist() == [[0, 0], [0, 1], [0, 2], [0, 3], [1, 0], [1, 1], [1, 2]]
    assert valid_cells(2, 9).tolist() == [[0, 0], [0, 1], [1, 0]]


def test_cells_follow_unequal_boundaries() -> None:
    edges = np.array([10.0, 11.0, 13.0, 16.0])
    segments = cell_segments(valid_cells(3, 3), edges).tolist()
    assert segments == [[10, 11], [11, 13], [13, 16], [10, 13], [11, 16], [10, 16]]


def test_pairwise_iou_by_hand() -> None:
    a = np.array([[0.0, 4.0], [1.0, 1.0]])
    b = np.array([[0.0, 4.0], [2.0, 6.0], [4.0, 5.0], [1.0, 2.0], [1.0, 1.0]])
    assert pairwise_iou(a, b).tolist() == [[1.0, 2 / 6, 0.0, 1 / 4, 0.0], [0.0, 0.0, 0.0, 0.0, 0.0]]


def test_iou_map_by_hand() -> None:
    result = targets([(1.0, 3.0)])
    expected = [0, 1 / 2, 1 / 2, 0, 1 / 3, 1, 1 / 3, 2 / 3, 2 / 3, 1 / 2]
    assert result.iou.tolist() == pytest.approx(expected)
    assert result.iou.dtype == torch.float32


def test_iou_map_is_the_highest_of_all_segments() -> None:
    alone = torch.stack([targets([s]).iou for s in ((0.0, 1.0), (1.0, 3.0), (2.5, 4.0))])
    together = targets([(0.0, 1.0), (1.0, 3.0), (2.5, 4.0)]).iou
    assert torch.equal(together, alone.amax(dim=0))


def test_classes_by_hand() -> None:
    # tIoU of at least 0.5 shows the class, below 0.3 it is absent, between them neither.
    result = targets([(1.0, 3.0)], [2])
    assert result.classes.dtype == torch.int8
    assert result.classes[2].tolist() == [
        ABSENT, SHOWN, SHOWN, ABSENT, IGNORED, SHOWN, IGNORED, SHOWN, SHOWN, SHOWN
    ]  # fmt: skip
    assert (result.classes[:2] == ABSENT).all()


def test_each_class_is_told_by_its_own_segments() -> None:
    # (0, 2): 2/2 with the first, 1/3 with the second; (1, 3): 1/3 and 2/2; (0, 3): 2/3 with both, and shows both.
    result = targets([(0.0, 2.0), (1.0, 3.0)], [1, 2])
    told = dict(zip(CELLS, result.classes.T.tolist(), strict=True))
    assert (told[0, 2], told[1, 3]) == ([ABSENT, SHOWN, IGNORED], [ABSENT, IGNORED, SHOWN])
    assert told[0, 3] == [ABSENT, SHOWN, SHOWN]
    assert (told[0, 1], told[2, 3], told[3, 4]) == ([ABSENT, SHOWN, ABSENT], [ABSENT, ABSENT, SHOWN], [ABSENT] * 3)


def test_all_labels_of_a_segment_are_taught_in_any_order() -> None:
    segments, labels = [(1.0, 3.0)] * 3 + [(3.0, 4.0)], [2, 0, 2, 1]
    result = targets(segments, labels)
    alone = targets([(1.0, 3.0)], [2]).classes[2]
    assert torch.equal(result.classes[0], alone) and torch.equal(result.classes[2], alone)
    assert torch.equal(result.classes[1], targets([(3.0, 4.0)], [1]).classes[1])
    assert torch.equal(targets(segments[::-1], labels[::-1]).classes, result.classes)


def test_of_several_segments_of_a_class_the_best_counts() -> None:
    result = targets([(0.0, 2.0), (1.0, 3.0), (1.0, 4.0)], [1, 1, 1])
    alone = torch.stack([targets([s], [1]).iou for s in ((0.0, 2.0), (1.0, 3.0), (1.0, 4.0))]).amax(dim=0)
    assert torch.equal(result.classes[1] == SHOWN, alone >= 0.5)
    assert torch.equal(result.classes[1] == ABSENT, alone < 0.3)


def test_the_longest_duration_limits_the_map_alone() -> None:
    whole, short = targets([(1.0, 3.0)]), targets([(1.0, 3.0)], max_duration=2)
    assert torch.equal(short.iou, whole.iou[:7])
    assert torch.equal(short.classes, whole.classes[:, :7])
    assert torch.equal(short.start, whole.start)


def test_boundaries_by_hand() -> None:
    # Anchors are half a snippet around each edge: [-0.5, 0.5], [0.5, 1.5], ... The region of 1.25 is [-0.25, 2.75].
    assert boundary_overlap(EDGES, np.array([1.25])).tolist() == [0.75, 1.0, 1.0, 0.25]
    assert boundary_overlap(EDGES, np.array([1.0])).tolist() == [1.0, 1.0, 1.0, 0.0]
    assert boundary_overlap(EDGES, np.array([4.0])).tolist() == [0.0, 0.0, 0.0, 1.0]
    assert boundary_overlap(EDGES, np.array([0.0])).tolist() == [1.0, 1.0, 0.0, 0.0]
    assert boundary_overlap(EDGES, np.empty(0)).tolist() == [0.0, 0.0, 0.0, 0.0]


def test_boundaries_take_the_largest_overlap_not_the_sum() -> None:
    # Regions [-1.25, 1.75] and [0.75, 3.75]: of the anchor [0.5, 1.5] they have 1 and 0.75, of [1.5, 2.5] 0.25 and 1.
    assert boundary_overlap(EDGES, np.array([0.25, 2.25])).tolist() == [1.0, 1.0, 1.0, 1.0]
    assert boundary_overlap(EDGES, np.array([-0.75, 0.25])).tolist() == [1.0, 1.0, 0.25, 0.0]


def test_boundaries_of_unequal_snippets_by_hand() -> None:
    # Widths 1 and 3, mean 2, so a region reaches 3 s; anchors [-0.5, 0.5] and [-0.5, 2.5]. The region of 3.5 is
    # [0.5, 6.5]: nothing of the first anchor, 2 of 3 s of the second.
    assert boundary_overlap(np.array([0.0, 1.0, 4.0]), np.array([3.5])).tolist() == [0.0, pytest.approx(2 / 3)]


def test_starts_and_ends_of_a_segment() -> None:
    result = targets([(1.25, 3.0)])
    assert result.start.tolist() == [0.75, 1.0, 1.0, 0.25]
    assert result.end.tolist() == [0.0, 0.0, 1.0, 1.0]


@pytest.mark.parametrize(
    ("segment", "start", "end"),
    [
        ((-3.0, 2.0), [0, 0, 0, 0], [0, 1, 1, 1]),  # began before the window: no start in it
        ((2.0, 9.0), [0, 1, 1, 1], [0, 0, 0, 0]),  # goes on after it: no end in it
        ((-3.0, 9.0), [0, 0, 0, 0], [0, 0, 0, 0]),
        ((0.0, 4.0), [1, 1, 0, 0], [0, 0, 0, 1]),  # exactly the window: both
    ],
)
def test_boundaries_outside_the_window_do_not_count(
    segment: tuple[float, float], start: list[float], end: list[float]
) -> None:
    result = targets([segment])
    assert (result.start.tolist(), result.end.tolist()) == (start, end)


def test_a_segment_that_crosses_the_window_keeps_its_true_length_in_the_iou() -> None:
    # [-4, 4] has 8 s: the whole window, 4 s of it, is half.
    assert targets([(-4.0, 4.0)]).iou[-1].item() == pytest.approx(0.5)


def test_a_zero_length_segment_has_boundaries_and_nothing_else() -> None:
    result = targets([(2.0, 2.0)], [1])
    assert result.start.tolist() == result.end.tolist() == [0.0, 1.0, 1.0, 1.0]
    assert result.iou.tolist() == [0.0] * 10
    assert (result.classes == ABSENT).all()
    assert not result.regression.any()


def test_a_window_without_segments_is_background() -> None:
    result = targets([])
    assert result.start.tolist() == result.end.tolist() == [0.0] * 4
    assert result.iou.tolist() == [0.0] * 10
    assert (result.classes == ABSENT).all()
    assert result.regression.sum() == 0
    assert targets([], with_zero=True).regression.sum() == 1


# 3 high, 4 middle (0.7 itself among them), 5 low (0.3 itself among them), 4 of zero.
IOU = np.array([1.0, 0.9, 0.71, 0.7, 0.6, 0.5, 0.31, 0.3, 0.2, 0.1, 0.05, 0.01, 0, 0, 0, 0])
HIGH, MIDDLE, LOW, ZERO = slice(0, 3), slice(3, 7), slice(7, 12), slice(12, 16)


def drawn(iou: np.ndarray, with_zero: bool = False, seed: int = 0) -> np.ndarray:
    return draw_regression_cells(iou, np.random.default_rng(seed), with_zero)


def test_regression_cells_are_all_high_ones_and_as_many_of_each_other_kind() -> None:
    for seed in range(20):
        chosen = drawn(IOU, seed=seed)
        assert [int(chosen[kind].sum()) for kind in (HIGH, MIDDLE, LOW, ZERO)] == [3, 3, 3, 0]


def test_regression_cells_with_zero() -> None:
    for seed in range(20):
        chosen = drawn(IOU, with_zero=True, seed=seed)
        assert [int(chosen[kind].sum()) for kind in (HIGH, MIDDLE)] == [3, 3]
        assert int(chosen[7:].sum()) == 3
    assert any(drawn(IOU, with_zero=True, seed=seed)[ZERO].any() for seed in range(20))


def test_a_pool_that_is_too_small_is_taken_whole() -> None:
    chosen = drawn(np.array([0.9, 0.9, 0.9, 0.5, 0.1, 0.0]))
    assert chosen.tolist() == [True, True, True, True, True, False]


def test_one_of_each_is_drawn_where_nothing_is_high() -> None:
    chosen = drawn(IOU[3:])
    assert [int(chosen[kind].sum()) for kind in (slice(0, 4), slice(4, 9), slice(9, 13))] == [1, 1, 0]


def test_every_cell_of_a_pool_can_be_drawn_and_the_seed_decides() -> None:
    often = np.sum([drawn(IOU, seed=seed) for seed in range(300)], axis=0)
    assert often[HIGH].tolist() == [300] * 3
    assert np.all(np.abs(often[MIDDLE] - 225) < 45)  # 3 of 4; six standard deviations
    assert np.all(np.abs(often[LOW] - 180) < 51)  # 3 of 5
    assert drawn(IOU, seed=4).tolist() == drawn(IOU, seed=4).tolist()


@settings(max_examples=100)
@given(st.lists(st.sampled_from([0.0, 0.1, 0.3, 0.5, 0.7, 0.8, 1.0]), max_size=60), st.booleans())
def test_regression_cells_never_leave_their_pools(values: list[float], with_zero: bool) -> None:
    iou = np.array(values)
    chosen = drawn(iou, with_zero)
    high = iou > 0.7
    assert np.all(chosen[high])
    assert with_zero or not chosen[iou == 0].any()
    most = max(int(high.sum()), 1)
    assert chosen[(iou > 0.3) & ~high].sum() <= most
    assert chosen[iou <= 0.3].sum() <= most


def test_stack_keeps_every_window() -> None:
    each = [targets([(1.0, 3.0)], [2]), targets([])]
    both = Targets.stack(each, torch.device("cpu"))
    for name in ("start", "end", "iou", "regression", "classes"):
        stacked = getattr(both, name)
        assert stacked.dtype == getattr(each[0], name).dtype
        for index, one in enumerate(each):
            assert torch.equal(stacked[index], getattr(one, name)), name

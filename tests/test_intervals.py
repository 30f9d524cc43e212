"""Bootstrap intervals against the evaluator on data sets put together from the videos that were drawn."""

from __future__ import annotations

import math
import time

import numpy as np
import pytest

from lofi_fast import intervals
from lofi_fast.intervals import draws, interval, map_intervals
from lofi_fast.metrics import matches, mean_average_precision, parse_tiou
from tests.test_diagnosis import random_set

TIOUS = parse_tiou("0.3,0.5,0.75")


def drawn_set(truth, predictions, times):
    """Every video as often as it was drawn, under names of its own; predictions elsewhere as they are."""
    copies = {f"{name} {k}": name for name, count in zip(truth, times, strict=True) for k in range(count)}
    return (
        {copy: truth[name] for copy, name in copies.items()},
        {copy: predictions[name] for copy, name in copies.items() if name in predictions}
        | {name: items for name, items in predictions.items() if name not in truth},
    )


@pytest.mark.parametrize("seed", range(2))
def test_equals_the_evaluator_on_every_draw(seed):
    truth, predictions, _ = random_set(seed)
    by_tiou, average, by_class = [], [], {}
    for times in np.concatenate(list(draws(len(truth), 40, seed))):
        result = mean_average_precision(*drawn_set(truth, predictions, times), TIOUS)
        by_tiou.append(result.map_by_tiou)
        average.append(result.average)
        for name, values in zip(result.classes, result.average_precision, strict=True):
            by_class.setdefault(name, []).append(values.mean())
    told = map_intervals(matches(truth, predictions, TIOUS), 40, seed)
    assert (told.count, told.seed) == (40, seed)
    np.testing.assert_allclose(told.map_by_tiou, interval(by_tiou), rtol=1e-12)
    np.testing.assert_allclose(told.average, interval(average), rtol=1e-12)
    classes = mean_average_precision(truth, predictions, TIOUS).classes
    np.testing.assert_allclose(told.by_class, [interval(by_class[name]) for name in classes], rtol=1e-12)


def test_a_class_that_a_draw_lacks_is_no_zero():
    """Of two videos each has a class of its own, found perfectly: whatever is drawn, all that is there is found."""
    truth = {"v": [(0.0, 10.0, "a")], "w": [(0.0, 10.0, "b")], "empty": []}
    predictions = {"v": [(0.0, 10.0, "a", 0.9)], "w": [(0.0, 10.0, "b", 0.9)]}
    told = map_intervals(matches(truth, predictions, TIOUS), 200, 0)
    assert told.average.tolist() == [1, 1] and told.by_class.tolist() == [[1, 1]] * 2


def test_nothing_is_found():
    truth = {"v": [(0.0, 10.0, "a")], "w": [(0.0, 10.0, "b")]}
    for predictions in ({"v": []}, {"v": [(50.0, 60.0, "b", 0.9)]}):
        assert map_intervals(matches(truth, predictions, TIOUS), 20, 0).average.tolist() == [0, 0]


def test_draws_are_of_all_videos_and_do_not_depend_on_how_many_are_in_memory():
    all_at_once = np.concatenate(list(draws(7, 50, 3)))
    assert all_at_once.shape == (50, 7) and (all_at_once.sum(axis=1) == 7).all()
    parts = list(draws(7, 50, 3, most=30))
    assert len(parts) == 13 and np.array_equal(np.concatenate(parts), all_at_once)
    assert not np.array_equal(np.concatenate(list(draws(7, 50, 4))), all_at_once)


def test_memory_has_no_part_in_the_result(monkeypatch):
    found = matches(*random_set(1)[:2], TIOUS)
    whole = map_intervals(found, 30, 0)
    monkeypatch.setattr(intervals, "MOST_NUMBERS", 1)
    assert np.array_equal(map_intervals(found, 30, 0).average, whole.average)


def test_an_interval_holds_the_middle_of_the_draws():
    assert interval(np.arange(1001)) == pytest.approx([25, 975])
    assert interval([[0.0, 5.0], [1.0, math.nan]]) == pytest.approx(np.array([[0.025, 0.975], [5.0, 5.0]]))
    assert np.isnan(interval([[math.nan], [math.nan]])).all()


def test_a_wider_choice_of_videos_gives_a_narrower_interval():
    few, many = (map_intervals(matches(*random_set(0, videos=n)[:2], TIOUS), 300, 0).average for n in (10, 160))
    assert np.diff(many) < 0.6 * np.diff(few)


def test_a_thousand_draws_of_two_hundred_videos_take_seconds():
    found = matches(*random_set(0, videos=200)[:2], TIOUS)
    start = time.process_time()
    map_intervals(found, 1000, 0)
    assert time.process_time() - start < 10

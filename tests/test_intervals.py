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
    score = mean_average_precision(truth, predictions, TIOUS)
    np.testing.assert_allclose(told.map_by_tiou, interval(score.map_by_tiou, by_tiou), rtol=1e-12)
    np.testing.assert_allclose(told.average, interval(score.average, average), rtol=1e-12)
    for bounds, name, values in zip(told.by_class, score.classes, score.average_precision, strict=True):
        np.testing.assert_allclose(bounds, interval(values.mean(), by_class[name]), rtol=1e-12)


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


def test_an_interval_holds_the_middle_of_the_draws_around_the_score():
    thousand = np.arange(1001) / 1000
    assert interval(0.5, thousand) == pytest.approx([0.025, 0.975])
    assert interval(0.52, 0.1 * thousand) == pytest.approx([0.4725, 0.5675])  # their mean is 0.05
    assert interval(0.97, 0.1 * thousand) == pytest.approx([0.9225, 1])
    assert interval(40, 100 * thousand, most=100) == pytest.approx([0, 87.5])
    assert interval([0.5, 0.2], [[0.0, 0.2], [1.0, math.nan]]) == pytest.approx(np.array([[0.025, 0.975], [0.2, 0.2]]))
    assert np.isnan(interval([0.0], [[math.nan], [math.nan]])).all()


@pytest.mark.parametrize("seed", range(3))
def test_the_score_lies_within_its_interval(seed):
    """Also with many classes of few videos, of which draws score higher than the whole does."""
    truth, predictions, _ = random_set(seed, videos=60, classes=40)
    told = map_intervals(matches(truth, predictions, TIOUS), 200, 0)
    score = mean_average_precision(truth, predictions, TIOUS)
    assert told.average[0] < score.average < told.average[1]
    assert (told.map_by_tiou[:, 0] < score.map_by_tiou).all() and (score.map_by_tiou < told.map_by_tiou[:, 1]).all()
    within = (told.by_class[:, 0] <= score.average_precision.mean(axis=1) + 1e-12) & (
        score.average_precision.mean(axis=1) <= told.by_class[:, 1] + 1e-12
    )
    assert within.mean() > 0.9


def test_a_wider_choice_of_videos_gives_a_narrower_interval():
    few, many = (map_intervals(matches(*random_set(0, videos=n)[:2], TIOUS), 300, 0).average for n in (10, 160))
    assert np.diff(many) < 0.6 * np.diff(few)


def test_a_thousand_draws_of_two_hundred_videos_take_seconds():
    found = matches(*random_set(0, videos=200)[:2], TIOUS)
    start = time.process_time()
    map_intervals(found, 1000, 0)
    assert time.process_time() - start < 10

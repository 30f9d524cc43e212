"""How sure a score is, by the bootstrap over videos: what it would be on other videos like these.

The videos are drawn with replacement, as many as there are, many times over, and each time the score is computed of
those drawn; a video that is drawn twice counts as two. Mean average precision of the draws is higher on average than
that of the videos themselves, by more than an interval is wide where a class has few videos. This bias is taken off:
the draws are moved until their mean is the score, and the interval holds the middle 95% of them. It tells of the choice
of videos alone, not of another seed of the training.
Source: Efron and Tibshirani, An Introduction to the Bootstrap (1993), chapters 10 (bias) and 13 (percentile intervals).

Letters of array shapes: P predictions, V videos, C classes, K tIoU thresholds, R draws (of all videos), H predictions
that find a segment, counted at every threshold.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain

import numpy as np
import numpy.typing as npt

from lofi_fast.metrics import Floats, Ints, Matches

LEVEL = 0.95  # of the draws lie within an interval
MOST_NUMBERS = 1 << 19  # in memory at once, of the counts of all predictions in several draws


@dataclass(frozen=True, eq=False)
class MapIntervals:
    """Intervals [low, high] of mean average precision, in [0, 1].

    map_by_tiou (K, 2); average (2,) of the mean over thresholds; by_class (C, 2) of each class's mean over thresholds.
    A draw without a segment of a class leaves that class out of its mean. `count` draws were made with `seed`.
    """

    count: int
    seed: int
    map_by_tiou: Floats
    average: Floats
    by_class: Floats


def draws(num_videos: int, count: int, seed: int, most: int = MOST_NUMBERS) -> Iterator[Ints]:
    """How often each of V videos is drawn, (R, V) with rows that add up to V; `count` rows in all, R at a time, so that
    R * V is `most` at the most. The same for the same seed, whatever `most` is.
    """
    random = np.random.default_rng(seed)
    even = np.full(num_videos, 1 / num_videos)
    at_once = max(most // num_videos, 1)
    for first in range(0, count, at_once):
        yield random.multinomial(num_videos, even, size=min(at_once, count - first))


def interval(score: npt.ArrayLike, values: npt.ArrayLike, most: float = 1.0) -> Floats:
    """[low, high] that hold LEVEL of the draws' values (R, ...), along the first axis -> (..., 2), moved so that the
    values' mean is the score (...), and kept within 0 and `most`. Draws in which a value is NaN are left out of its
    interval.
    """
    values, score = np.asarray(values, dtype=np.float64), np.asarray(score, dtype=np.float64)
    known = np.isfinite(values).any(axis=0)
    bounds = np.full((*values.shape[1:], 2), np.nan)
    if known.any():
        tail, there = (1 - LEVEL) / 2, values[:, known]
        bias = np.nanmean(there, axis=0) - score[known]
        bounds[known] = np.clip(np.nanquantile(there, [tail, 1 - tail], axis=0) - bias, 0, most).T
    return bounds


def map_intervals(found: Matches, count: int = 1000, seed: int = 0) -> MapIntervals:
    """Intervals of what `metrics.mean_average_precision` gives of the same files.

    A video's own matching does not depend on the other videos, so that a draw only changes how often its predictions
    and segments count. Predictions in videos that the ground truth does not name count once in every draw.
    """
    num_classes, num_tious = len(found.classes), len(found.tious)
    num_predictions = len(found.video)
    # a group is a class at a threshold; hits stand group by group, in each the best score first
    threshold, row = np.nonzero(found.segment.T >= 0)
    group = threshold * num_classes + found.label[row]
    groups, first_hit = np.unique(group, return_index=True)
    group_of_hit = np.searchsorted(groups, group)
    label_start = np.searchsorted(found.label, np.arange(num_classes))
    by_class = np.argsort(found.gt_label, kind="stable")
    first_segment = np.searchsorted(found.gt_label[by_class], np.arange(num_classes))
    # The reversed running maximum must not pass from one group to another: each begins 2 above the one behind it.
    step = 2.0 * (len(groups) - group_of_hit)[:, None]

    precision = []
    most = MOST_NUMBERS * len(found.videos) // max(num_predictions + len(row), len(found.videos))
    every = np.ones((1, len(found.videos)), dtype=np.int64)  # the score itself: each video once
    for drawn in chain([every], draws(len(found.videos), count, seed, most)):
        times = np.ones((len(found.videos) + 1, len(drawn)))  # the last one: of videos elsewhere, whose index is -1
        times[:-1] = drawn.T
        average = np.zeros((num_tious * num_classes, len(drawn)))
        if len(row):
            counted = times[found.video]
            ranks = np.zeros((num_predictions + 1, len(drawn)))
            np.cumsum(counted, axis=0, out=ranks[1:])
            rank = ranks[row + 1] - ranks[label_start[found.label[row]]]
            hits = counted[row]
            total = np.cumsum(hits, axis=0)
            total -= (total[first_hit] - hits[first_hit])[group_of_hit]
            best = np.divide(total, rank, out=np.zeros_like(total), where=rank > 0)
            best += step
            best = np.maximum.accumulate(best[::-1], axis=0)[::-1] - step
            average[groups] = np.add.reduceat(hits * best, first_hit, axis=0)
        segments = np.add.reduceat(times[found.gt_video[by_class]], first_segment, axis=0)
        with np.errstate(invalid="ignore"):
            precision.append(average.reshape(num_tious, num_classes, len(drawn)) / segments)
    by_draw = np.concatenate(precision, axis=2).transpose(2, 0, 1)  # (1 + count, K, C), NaN: a class is not drawn
    drawn_classes = np.isfinite(by_draw[:, 0]).sum(axis=1)
    with np.errstate(invalid="ignore"):
        by_tiou = np.nansum(by_draw, axis=2) / drawn_classes[:, None]
    average, by_class = by_tiou.mean(axis=1), by_draw.mean(axis=1)
    told = (interval(values[0], values[1:]) for values in (by_tiou, average, by_class))
    return MapIntervals(count, seed, *told)

"""Scores of frames against their definitions written out, and cases worked by hand."""

from __future__ import annotations

import math
from functools import cache

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lofi_fast.errors import InputError
from lofi_fast.framewise import (
    BACKGROUND,
    Frames,
    average_precision,
    charades_frames,
    edit_score,
    frame_map,
    frames_at,
    one_label_each,
    runs,
    segmental_counts,
    segmental_scores,
    segmental_table,
)
from lofi_fast.intervals import draws, interval

OVERLAPS = (0.1, 0.25, 0.5)
LABELLING = st.lists(st.tuples(st.integers(-1, 3), st.integers(1, 9)), min_size=1, max_size=8).map(
    lambda parts: np.repeat([label for label, _ in parts], [count for _, count in parts])
)
PAIR = st.tuples(LABELLING, LABELLING).map(lambda pair: [part[: min(map(len, pair))] for part in pair])
SEQUENCE = st.lists(st.integers(0, 3), max_size=9)


# --- written out --------------------------------------------------------------------------------------------------


def literal_runs(labels):
    found = []
    for frame, label in enumerate(labels):
        if frame == 0 or label != labels[frame - 1]:
            found.append([label, frame, frame + 1])
        found[-1][2] = frame + 1
    return [tuple(run) for run in found if run[0] != BACKGROUND]


def literal_edit(found, truth):
    @cache
    def distance(i, j):
        if 0 in (i, j):
            return i + j
        same = found[i - 1] == truth[j - 1]
        return min(distance(i - 1, j) + 1, distance(i, j - 1) + 1, distance(i - 1, j - 1) + (not same))

    longer = max(len(found), len(truth))
    return 100 * (1 - distance(len(found), len(truth)) / longer) if longer else 100.0


def literal_counts(found, truth, threshold):
    found, truth = literal_runs(found), literal_runs(truth)
    hits, right = set(), 0
    for label, first, after in found:
        best, most = None, 0.0
        for k, (true_label, true_first, true_after) in enumerate(truth):
            frames, true_frames = set(range(first, after)), set(range(true_first, true_after))
            share = len(frames & true_frames) / len(frames | true_frames)
            if label == true_label and share > most:
                best, most = k, share
        if best is not None and most >= threshold and best not in hits:
            hits.add(best)
            right += 1
    return right, len(found) - right, len(truth) - right


def literal_precision(scores, truth):
    found = []
    for frame in np.flatnonzero(truth):
        above = [other for other in range(len(scores)) if scores[other] >= scores[frame]]
        found.append(sum(truth[other] for other in above) / len(above))
    return float(np.mean(found))


@settings(max_examples=100)
@given(labels=LABELLING)
def test_runs_equal_the_loop(labels):
    assert list(zip(*(part.tolist() for part in runs(labels)), strict=True)) == literal_runs(labels.tolist())


@settings(max_examples=100)
@given(found=SEQUENCE, truth=SEQUENCE)
def test_edit_score_equals_the_recursion(found, truth):
    score = edit_score(np.array(found, dtype=np.int64), np.array(truth, dtype=np.int64))
    assert score == pytest.approx(literal_edit(tuple(found), tuple(truth)), rel=1e-12)
    assert 0 <= score <= 100 and (score == 100) == (found == truth)


@settings(max_examples=100)
@given(pair=PAIR)
def test_segmental_counts_equal_the_loop(pair):
    found, truth = pair
    counts = segmental_counts(found, truth, OVERLAPS)
    for k, threshold in enumerate(OVERLAPS):
        assert tuple(counts[:, k]) == literal_counts(found.tolist(), truth.tolist(), threshold)


@settings(max_examples=100)
@given(
    st.lists(st.tuples(st.sampled_from([0.0, 0.25, 0.5, 0.75, 1.0]), st.booleans()), min_size=1, max_size=30).filter(
        lambda rows: any(true for _, true in rows)
    )
)
def test_average_precision_equals_the_loop(rows):
    scores, truth = np.array([score for score, _ in rows]), np.array([true for _, true in rows])
    assert average_precision(scores, truth) == pytest.approx(literal_precision(scores, truth), rel=1e-12)


def segments_of(labels, rate, score=None):
    return [
        (first / rate, after / rate, f"c{label}", *([] if score is None else [score]))
        for label, first, after in literal_runs(labels.tolist())
    ]


@settings(max_examples=50)
@given(pairs=st.lists(PAIR, min_size=1, max_size=4), rate=st.sampled_from([1.0, 15.0, 23.976, 29.97, 30.0]))
def test_scores_of_all_videos_equal_the_definition(pairs, rate):
    """Through segments in seconds and back, at rates that are no round numbers, all frames come back."""
    truth = {f"v{i}": segments_of(pair[1], rate) for i, pair in enumerate(pairs)}
    found = {f"v{i}": segments_of(pair[0], rate, 1.0) for i, pair in enumerate(pairs)}
    frames = frames_at(rate, {f"v{i}": len(pair[1]) / rate for i, pair in enumerate(pairs)})
    told = segmental_scores(truth, found, frames)
    assert told.num_frames == sum(len(pair[1]) for pair in pairs)
    equal = np.concatenate([pair[0] == pair[1] for pair in pairs])
    assert told.accuracy == pytest.approx(100 * equal.mean(), rel=1e-12)
    edits = [literal_edit(*(tuple(run[0] for run in literal_runs(part.tolist())) for part in pair)) for pair in pairs]
    assert told.edit == pytest.approx(np.mean(edits), rel=1e-12)
    for k, threshold in enumerate(OVERLAPS):
        counts = [literal_counts(pair[0].tolist(), pair[1].tolist(), threshold) for pair in pairs]
        right, wrong, missed = np.sum(counts, axis=0)
        expected = 0.0
        if right:
            precision, recall = right / (right + wrong), right / (right + missed)
            expected = 100 * 2 * precision * recall / (precision + recall)
        assert told.f1[k] == pytest.approx(expected, rel=1e-12)


# --- by hand ------------------------------------------------------------------------------------------------------


def test_over_segmentation_keeps_accuracy_and_loses_the_others():
    truth = {"v": [(0.0, 10.0, "a")]}
    found = {"v": [(0.0, 6.0, "a", 1.0), (6.0, 7.0, "b", 1.0), (7.0, 10.0, "a", 1.0)]}
    told = segmental_scores(truth, found, frames_at(10, {"v": 10.0}))
    assert (told.accuracy, told.num_frames) == (90, 100)
    assert told.edit == pytest.approx(100 / 3)
    assert told.f1.tolist() == [50, 50, 50]  # one of three is right: precision 1/3, recall 1


def test_the_best_score_gives_a_frame_its_label():
    truth = {"v": [(0.0, 4.0, "a"), (4.0, 8.0, "b")]}
    found = {"v": [(0.0, 5.0, "a", 0.9), (0.0, 8.0, "b", 0.5), (0.0, 8.0, "unknown", 0.1)]}
    assert segmental_scores(truth, found, frames_at(1, {"v": 8.0})).accuracy == pytest.approx(100 * 7 / 8)


def test_background_counts_for_accuracy_alone():
    truth, frames = {"v": [(2.0, 4.0, "a")], "w": []}, frames_at(1, {"v": 10.0, "w": 10.0})
    nothing = segmental_scores(truth, {}, frames)
    assert (nothing.accuracy, nothing.edit, nothing.f1.tolist()) == (90, 50, [0, 0, 0])
    wrong = segmental_scores({"v": []}, {"v": [(0.0, 1.0, "a", 1.0)]}, frames)
    assert (wrong.accuracy, wrong.edit, wrong.f1.tolist()) == (90, 0, [0, 0, 0])


def test_intervals_are_those_of_the_videos_drawn():
    random = np.random.default_rng(0)
    labels = {f"v{i}": np.repeat(random.integers(-1, 3, 6), 5) for i in range(8)}
    truth = {name: segments_of(of, 1) for name, of in labels.items()}
    found = {name: segments_of(np.roll(of, random.integers(0, 9)), 1, 1.0) for name, of in labels.items()}
    frames = frames_at(1, dict.fromkeys(labels, 30.0))
    told = segmental_scores(truth, found, frames, num_draws=50, seed=4)
    values = []
    for times in np.concatenate(list(draws(8, 50, 4))):
        copies = {f"{name} {k}": name for name, count in zip(labels, times, strict=True) for k in range(count)}
        one = segmental_scores(
            {copy: truth[name] for copy, name in copies.items()},
            {copy: found[name] for copy, name in copies.items()},
            Frames({copy: frames.times[name] for copy, name in copies.items()}),
        )
        values.append([one.accuracy, one.edit, *one.f1])
    expected = interval(list(told.named.values()), values, most=100)
    np.testing.assert_allclose(told.intervals, expected, rtol=1e-12)
    assert len(segmental_table(told).splitlines()) == 3
    assert len(segmental_table(segmental_scores(truth, found, frames)).splitlines()) == 2


def test_frames_of_several_labels():
    truth = {"v": [(0.0, 4.0, "a"), (2.0, 6.0, "b")], "w": [(0.0, 2.0, "b")]}
    frames = frames_at(1, {"v": 8.0, "w": 2.0})
    assert not one_label_each(truth, frames)
    assert one_label_each({"v": [(0.0, 4.0, "a"), (2.0, 6.0, "a"), (6.0, 7.0, "b")]}, frames)
    perfect = {"v": [(0.0, 4.0, "a", 0.9), (2.0, 6.0, "b", 0.8)], "w": [(0.0, 2.0, "b", 0.7)]}
    told = frame_map(truth, perfect, frames)
    assert (told.average, told.num_frames, told.classes) == (1.0, 10, ("a", "b"))
    # b: 4 of 8 frames are right at 0.8, and the other 2 of 6 are among all 10 frames
    loose = frame_map(truth, {"v": [(0.0, 8.0, "b", 0.8)]}, frames)
    assert loose.average_precision.tolist() == pytest.approx([4 / 10, (4 * 4 / 8 + 2 * 6 / 10) / 6])


@pytest.mark.parametrize("seed", range(3))
def test_frame_map_equals_the_loop(seed):
    random = np.random.default_rng(seed)

    def some(count, scored):
        starts = random.uniform(0, 25, count)
        ends = starts + random.uniform(0, 8, count)
        scores = random.integers(1, 5, count) / 4
        rows = zip(starts.tolist(), ends.tolist(), random.integers(0, 3, count).tolist(), scores.tolist(), strict=True)
        return [(s, e, f"c{label}", score) if scored else (s, e, f"c{label}") for s, e, label, score in rows]

    truth = {f"v{i}": some(6, False) for i in range(3)}
    found = {f"v{i}": some(12, True) for i in range(2)} | {"elsewhere": some(3, True)}
    for frames in (frames_at(4, dict.fromkeys(truth, 30.0)), charades_frames(dict.fromkeys(truth, 30.0))):
        told = frame_map(truth, found, frames)
        for label, value in zip(told.classes, told.average_precision, strict=True):
            scores, true = [], []
            for name, times in frames.times.items():
                for t in times:
                    inside = [row for row in truth[name] if row[0] <= t < row[1] and row[2] == label]
                    above = [row[3] for row in found.get(name, []) if row[0] <= t < row[1] and row[2] == label]
                    scores.append(max(above, default=0.0))
                    true.append(bool(inside))
            assert value == pytest.approx(literal_precision(scores, true), rel=1e-12)


def test_charades_looks_at_25_instants_and_an_end_lies_within():
    frames = charades_frames({"v": 50.0})
    assert frames.times["v"].tolist() == [2.0 * i for i in range(25)]
    assert frames.within("v", 2.0, 6.0) == slice(1, 4)
    assert frames_at(0.5, {"v": 50.0}).within("v", 1.0, 5.0) == slice(0, 2)
    assert frames_at(1, {"v": 0.0}).times["v"].tolist() == [0.5]


def test_nothing_to_score():
    frames = frames_at(1, {"v": 5.0})
    with pytest.raises(InputError, match="--frames"):
        frame_map({"v": [(1.0, 1.0, "a")]}, {"v": []}, frames)
    with pytest.raises(InputError, match="--subset"):
        segmental_scores({}, {}, frames)
    assert math.isnan(average_precision(np.zeros(3), np.zeros(3, dtype=bool)))

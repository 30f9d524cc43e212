"""Decoding: candidates, labels, soft-NMS over windows, and the files written and read."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest

from lofi_fast.data.video_scores import load_video_scores
from lofi_fast.detections import Detection, write_predictions
from lofi_fast.errors import InputError
from lofi_fast.head.decoding import detections, most_detections, voted
from lofi_fast.head.map_decoding import WindowMaps, proposals, window_proposals
from lofi_fast.head.protocol import Proposals
from lofi_fast.metrics import load_predictions

ANNOTATIONS = Path(__file__).parents[2] / "shared" / "data" / "annotations"


def make_maps(start, end, *, durations=None, class_probs=None, confidence=None, edges=None):
    """Maps whose confidence is 0.5 everywhere, also in the invalid cells, which must not be read."""
    length = len(start)
    durations = durations or length
    return WindowMaps(
        edges=np.arange(length + 1, dtype=np.float64) * 2 if edges is None else edges,
        start=np.array(start, dtype=np.float32),
        end=np.array(end, dtype=np.float32),
        confidence=np.full((durations, length), 0.5, dtype=np.float32) if confidence is None else confidence,
        class_probs=class_probs,
    )


def cells_of(maps, **options):
    return {tuple(cell) for cell in proposals(maps, **options)[0].tolist()}


def random_maps(seed, length=12, durations=9, classes=4):
    rng = np.random.default_rng(seed)
    return WindowMaps(
        edges=np.sort(rng.uniform(0, 60, length + 1)),
        start=rng.random(length),
        end=rng.random(length),
        confidence=rng.random((durations, length)),
        class_probs=rng.dirichlet(np.ones(classes), size=(durations, length)).transpose(2, 0, 1),
    )


# --- proposals ----------------------------------------------------------------------------------------------------


def test_a_proposal_needs_a_start_and_an_end():
    # Start at boundary 1 alone, end at boundary 3 alone: cell (d=1, s=1), and the last boundary 5 from the same start.
    maps = make_maps([0.0, 0.9, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.8, 0.0])
    cells, segments, scores = proposals(maps)
    assert cells.tolist() == [[1, 1], [3, 1]]
    assert segments.tolist() == [[2.0, 6.0], [2.0, 10.0]]
    assert scores.tolist() == [0.5, 0.5]


def test_a_low_local_peak_is_a_candidate_and_a_low_plateau_is_not():
    end = [0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 1.0]
    peak = make_maps([1.0, 0.0, 0.0, 0.2, 0.0, 0.0, 0.0, 0.0], end)
    assert {s for _, s in cells_of(peak)} == {0, 3}
    plateau = make_maps([1.0, 0.0, 0.0, 0.2, 0.2, 0.0, 0.0, 0.0], end)
    assert {s for _, s in cells_of(plateau)} == {0}
    high_plateau = make_maps([1.0, 0.0, 0.0, 0.6, 0.6, 0.0, 0.0, 0.0], end)
    assert {s for _, s in cells_of(high_plateau)} == {0, 3, 4}
    assert {s for _, s in cells_of(high_plateau, peak_fraction=0.7)} == {0}


def test_ends_of_the_window_can_be_peaks():
    # 0.3 and 0.2 are below half of the maximum, but greater than their one neighbour.
    maps = make_maps([0.3, 0.0, 0.0, 1.0, 0.0, 0.2], [0.0, 0.0, 0.0, 0.0, 0.0, 0.0])
    assert {s for _, s in cells_of(maps)} == {0, 3, 5}


def test_the_last_boundary_always_ends_proposals():
    maps = make_maps([1.0, 1.0, 1.0], [0.0, 0.0, 0.0])
    assert cells_of(maps) == {(2, 0), (1, 1), (0, 2)}
    # A start at the last snippet, the only proposal of a one-snippet window.
    assert cells_of(make_maps([0.1], [0.0])) == {(0, 0)}
    # D smaller than L: no cell reaches the last boundary from the first start.
    assert cells_of(make_maps([1.0, 0.0, 0.0], [0.0, 0.0, 0.0], durations=2)) == set()


@pytest.mark.parametrize("durations", [1, 5, 12])
@pytest.mark.parametrize("seed", range(5))
def test_equals_a_loop_over_cells(seed, durations):
    maps = random_maps(seed, durations=durations)
    length = len(maps.start)

    def candidate(values, i):
        left = values[i - 1] if i > 0 else -math.inf
        right = values[i + 1] if i + 1 < length else -math.inf
        return (values[i] > left and values[i] > right) or values[i] > 0.5 * max(values)

    expected = []
    for d in range(durations):
        for s in range(length):
            e = s + d + 1
            if e <= length and candidate(maps.start, s) and (e == length or candidate(maps.end, e)):
                boundary = maps.start[s] * (maps.end[e] if e < length else maps.end[-1])
                expected.append((d, s, maps.edges[s], maps.edges[e], maps.confidence[d, s], boundary))
    cells, segments, scores = proposals(maps)
    assert [(*c, *g, x) for c, g, x in zip(cells, segments, scores, strict=True)] == [row[:5] for row in expected]
    with_boundaries = proposals(maps, with_boundaries=True)[2]
    np.testing.assert_allclose(with_boundaries, [row[4] * row[5] for row in expected], rtol=1e-14)


def test_maps_that_do_not_fit_are_refused():
    good = random_maps(0)
    for name, value in {
        "edges": good.edges[:-1],
        "start": good.start[:-1],
        "end": good.end[None],
        "confidence": good.confidence.T,
        "class_probs": good.class_probs[:, :-1],
    }.items():
        with pytest.raises(ValueError, match="must be"):
            WindowMaps(**{**vars(good), name: value})
        broken = getattr(good, name).copy()
        broken.flat[0] = math.nan
        with pytest.raises(ValueError, match=f"{name} holds a NaN"):
            WindowMaps(**{**vars(good), name: broken})


# --- detections ---------------------------------------------------------------------------------------------------


def one_cell(score, probabilities, edges=(0.0, 4.0)):
    """A window of one snippet: exactly one proposal."""
    maps = WindowMaps(
        edges=np.array(edges),
        start=np.ones(1),
        end=np.ones(1),
        confidence=np.full((1, 1), score),
        class_probs=None if probabilities is None else np.array(probabilities)[:, None, None],
    )
    return window_proposals(maps)


def test_best_labels_of_each_proposal():
    found = detections([one_cell(0.5, [0.1, 0.6, 0.3])], "abc", duration=10.0)
    assert [(d.label, d.start, d.end) for d in found] == [("b", 0.0, 4.0), ("c", 0.0, 4.0)]
    assert [d.score for d in found] == pytest.approx([0.3, 0.15])
    assert [
        d.label for d in detections([one_cell(0.5, [0.1, 0.6, 0.3])], "abc", duration=9.0, labels_per_proposal=9)
    ] == [
        "b",
        "c",
        "a",
    ]
    assert all(type(value) is float for d in found for value in (d.start, d.end, d.score))


def test_a_proposal_has_two_labels_and_more_where_they_are_more_likely_than_not():
    probabilities = [0.9, 0.2, 0.6, 0.5, 0.7]
    for asked, expected in ((None, "aec"), (1, "a"), (2, "ae"), (4, "aecd")):
        found = detections([one_cell(0.5, probabilities)], "abcde", duration=9.0, labels_per_proposal=asked)
        assert "".join(d.label for d in found) == expected
    found = detections([one_cell(0.5, [0.3, 0.2, 0.1])], "abc", duration=9.0)
    assert [d.label for d in found] == ["a", "b"]
    many = detections([one_cell(0.5, [0.9] * 12)], "abcdefghijkl", duration=9.0)
    assert "".join(d.label for d in many) == "abcdefghij"


def placed(count):
    """The proposals of `count` actions of one class that are apart from each other, all found."""
    starts = np.arange(count) * 2.0
    return Proposals(np.stack([starts, starts + 1], axis=1), np.linspace(0.9, 0.5, count), None)


def test_a_long_video_may_have_more_detections():
    assert [most_detections(n) for n in (0, 1, 2, 11)] == [200, 200, 220, 400]
    whole = placed(1000)
    windows = [Proposals(whole.segments_P2[k::50], whole.scores_P[k::50], None) for k in range(50)]
    one, many = [whole], windows
    assert len(detections(many, "a", duration=1e4, top_k=None)) == 1000
    assert len(detections(many, "a", duration=1e4, top_k=200)) == 200
    assert detections(one, "a", duration=1e4, top_k=None) == detections(one, "a", duration=1e4, top_k=200)


def test_video_scores_take_the_place_of_class_probs():
    scores = np.array([0.7, 0.0, 0.2])
    found = detections([one_cell(0.5, [0.1, 0.6, 0.3])], "abc", duration=10.0, video_scores=scores)
    assert [d.label for d in found] == ["a", "c"]
    assert [d.score for d in found] == pytest.approx([0.35, 0.1])
    # A class of probability 0 is not a detection.
    found = detections([one_cell(0.5, None)], "abc", duration=10.0, video_scores=scores, labels_per_proposal=3)
    assert [d.label for d in found] == ["a", "c"]


def test_one_class_needs_no_probabilities():
    assert detections([one_cell(0.5, None)], ["a"], duration=10.0) == [Detection(0.0, 4.0, "a", 0.5)]
    with pytest.raises(ValueError, match="2 classes"):
        detections([one_cell(0.5, None)], "ab", duration=10.0)
    with pytest.raises(ValueError, match="3 classes"):
        detections([one_cell(0.5, [0.1, 0.6, 0.3])], "ab", duration=10.0)
    with pytest.raises(ValueError, match="video_scores"):
        detections([one_cell(0.5, None)], "ab", duration=10.0, video_scores=np.ones(3))


def test_soft_nms_joins_the_windows_of_a_video_within_a_class():
    # The same segment of class a from two windows, IoU 1: the second decays by exp(-1 / sigma). Class b is untouched.
    windows = [one_cell(0.8, [1.0, 0.0]), one_cell(0.6, [1.0, 0.0]), one_cell(0.7, [0.0, 1.0])]
    found = detections(windows, "ab", duration=10.0, sigma=0.5, labels_per_proposal=1)
    assert [d.label for d in found] == ["a", "b", "a"]
    assert [d.score for d in found] == pytest.approx([0.8, 0.7, 0.6 * math.exp(-2)])
    assert found[:2] == detections(windows, "ab", duration=10.0, sigma=0.5, labels_per_proposal=1, top_k=2)
    assert found[:2] == detections(windows, "ab", duration=10.0, sigma=0.5, labels_per_proposal=1, min_score=0.1)


def test_segments_are_clipped_to_the_video():
    windows = [one_cell(0.8, None, (6.0, 12.0)), one_cell(0.7, None, (9.0, 12.0)), one_cell(0.6, None, (-1.0, 2.0))]
    found = detections(windows, ["a"], duration=9.0)
    assert [(d.start, d.end) for d in found] == [(6.0, 9.0), (0.0, 2.0)]


def test_nothing_found():
    assert detections([], "ab", duration=9.0) == []
    assert detections([one_cell(0.0, [0.5, 0.5])], "ab", duration=9.0) == []
    silent = make_maps([1.0, 0.0, 0.0], [0.0, 0.0, 0.0], durations=2, class_probs=np.full((2, 2, 3), 0.5))
    assert len(proposals(silent)[0]) == 0
    assert detections([window_proposals(silent)], "ab", duration=9.0) == []


def test_ranking_is_by_falling_score():
    found = detections([window_proposals(random_maps(seed)) for seed in range(3)], "abcd", duration=50.0, top_k=30)
    scores = [d.score for d in found]
    assert len(found) == 30
    assert scores == sorted(scores, reverse=True)
    assert all(0 <= d.start < d.end <= 50 for d in found)


# --- files --------------------------------------------------------------------------------------------------------


def test_predictions_are_read_back_as_written(tmp_path):
    path = tmp_path / "predictions.json"
    found = {"v": [Detection(np.float32(0.1), 2.5, "a", np.float64(1 / 3))], "w": []}
    write_predictions(path, found)
    assert load_predictions(path) == {"v": [(float(np.float32(0.1)), 2.5, "a", 1 / 3)], "w": []}
    assert set(json.loads(path.read_text())) == {"version", "results", "external_data"}
    write_predictions(path, {"v": []})
    assert load_predictions(path) == {"v": []}
    assert [p.name for p in tmp_path.iterdir()] == ["predictions.json"]


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "predictions.json"
    write_predictions(path, {"v": []})
    with pytest.raises(ValueError, match="JSON"):
        write_predictions(path, {"v": [Detection(0.0, 1.0, "a", math.nan)]})
    assert load_predictions(path) == {"v": []}
    (tmp_path / "folder.json").mkdir()
    with pytest.raises(InputError, match=r"folder\.json: cannot write"):
        write_predictions(tmp_path / "folder.json", {"v": []})
    with pytest.raises(InputError, match="cannot write"):
        write_predictions(path / "p.json", {"v": []})
    assert sorted(p.name for p in tmp_path.iterdir()) == ["folder.json", "predictions.json"]


@pytest.mark.parametrize(
    "content",
    [
        {"v": {"a": 0.75, "b": 0.25, "z": 1}, "w": {"b": 1}},
        {
            "results": {
                "v": [{"label": "b", "score": 0.25}, {"label": "a", "score": 0.75}],
                "w": [{"label": "b", "score": 1}],
            }
        },
        {"results": {"v": [0.25, 9, 0.75], "w": [1, 9, 0]}, "class": ["b", "z", "a"]},
    ],
    ids=["by_class", "activitynet", "table"],
)
def test_video_scores_in_three_forms(tmp_path, content):
    path = tmp_path / "scores.json"
    path.write_text(json.dumps(content))
    scores = load_video_scores(path, ["w", "v"], ["a", "b"])
    assert list(scores) == ["w", "v"]
    assert scores["v"].tolist() == [0.75, 0.25]
    assert scores["w"].tolist() == [0.0, 1.0]


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("{", "not valid JSON"),
        ("[]", "no scores by video"),
        ('{"x": {"a": 1}}', r"no scores for 1 of 1 videos, for example 'v'"),
        ('{"v": {"A": 0.5, "b": 0.5}}', "no scores of the class 'a', but of 'A'"),
        ('{"v": {"a": 1}, "v": {"b": 1}}', "'v' appears twice"),
        ('{"v": {"z": 1}}', r"none of the 2 classes, such as 'a'"),
        ('{"v": {"a": -1}}', "number >= 0"),
        ('{"v": {"a": NaN}}', "number >= 0"),
        ('{"v": {"a": "1"}}', "number >= 0"),
        ('{"v": 3}', "video v"),
        ('{"results": {"v": [1, 2]}}', "video v"),
        ('{"results": {"v": [1, 2]}, "class": ["a"]}', "video v"),
    ],
)
def test_bad_video_scores_are_one_sentence(tmp_path, text, sentence):
    path = tmp_path / "scores.json"
    path.write_text(text)
    with pytest.raises(InputError, match=sentence) as caught:
        load_video_scores(path, ["v"], ["a", "b"])
    assert str(path) in str(caught.value)


def test_white_space_around_a_class_is_no_part_of_it(tmp_path):
    path = tmp_path / "scores.json"
    path.write_text('{"v": {"a ": 0.75, "\\tb": 0.25, "A": 1}}')
    assert load_video_scores(path, ["v"], ["a", "b"])["v"].tolist() == [0.75, 0.25]


def test_missing_video_scores_name_the_flag(tmp_path):
    for name in ("none.json", "none.npy"):
        with pytest.raises(InputError, match="does not exist; give --video-scores"):
            load_video_scores(tmp_path / name, ["v"], ["a"])


def test_thumos_table(tmp_path):
    path = tmp_path / "scores.npy"
    table = np.random.default_rng(0).random((3, 101)).astype(np.float32)
    np.save(path, table)
    scores = load_video_scores(path, ["video_test_0000002"], ["VolleyballSpiking", "BaseballPitch"])
    np.testing.assert_allclose(scores["video_test_0000002"], table[1, [96, 6]] / table[1].sum(), rtol=1e-6)
    for name in ("video_test_0000000", "video_test_0000004", "video_validation_0000001", "video_test_x", "v"):
        with pytest.raises(InputError, match=f"not for '{name}'"):
            load_video_scores(path, [name], ["Diving"])
    with pytest.raises(InputError, match="'Ironing' is none of them"):
        load_video_scores(path, [], ["Diving", "Ironing"])
    np.save(path, table[:, :100])
    with pytest.raises(InputError, match="101 classes"):
        load_video_scores(path, ["video_test_0000001"], ["Diving"])
    path.write_bytes(b"not an array")
    with pytest.raises(InputError, match="not a NumPy array"):
        load_video_scores(path, ["video_test_0000001"], ["Diving"])


def test_thumos_table_agrees_with_the_annotations():
    table, truth = ANNOTATIONS / "thumos14_video_scores.npy", ANNOTATIONS / "thumos14_groundtruth.json"
    if not (table.exists() and truth.exists()):
        pytest.skip(f"{ANNOTATIONS} has no THUMOS14 files")
    database = json.loads(truth.read_text())["database"]
    labels = {n: {s["label"] for s in v["annotations"]} for n, v in database.items() if v["subset"] == "test"}
    classes = sorted(set().union(*labels.values()))
    scores = load_video_scores(table, list(labels), classes)
    right = sum(classes[int(scores[name].argmax())] in labels[name] for name in labels)
    # A shifted row or column order would be right about once in twenty.
    assert len(classes) == 20
    assert right > 0.8 * len(labels)


def literal_vote(segments, scores, labels, candidate, threshold):
    """The mean of the segments of the candidate's class that overlap it enough, by score times tIoU."""
    start, end = segments[candidate]
    sums, total = [0.0, 0.0], 0.0
    for (other_start, other_end), score, label in zip(segments, scores, labels, strict=True):
        both = max(min(end, other_end) - max(start, other_start), 0.0)
        tiou = both / (max(end, other_end) - min(start, other_start)) if both else 0.0
        if label == labels[candidate] and tiou >= threshold:
            sums[0] += score * tiou * other_start
            sums[1] += score * tiou * other_end
            total += score * tiou
    return [sums[0] / total, sums[1] / total]


@pytest.mark.parametrize("threshold", [0.3, 0.7, 1.0])
def test_candidates_vote_on_where_a_detection_starts_and_ends(threshold):
    random = np.random.default_rng(3)
    segments = np.sort(random.uniform(0, 10, (40, 2)), axis=1)
    scores, labels = random.uniform(0.1, 1, 40), random.integers(0, 3, 40)
    kept = random.permutation(40)[:15]
    expected = [literal_vote(segments, scores, labels, candidate, threshold) for candidate in kept]
    np.testing.assert_allclose(voted(segments, scores, labels, kept, threshold), expected, rtol=1e-12)
    if threshold == 1.0:
        np.testing.assert_allclose(expected, segments[kept], rtol=1e-12)


def test_voting_moves_the_ends_and_no_score():
    window = Proposals(np.array([[2.0, 6.0], [2.2, 6.4], [8.0, 9.0]]), np.array([0.9, 0.6, 0.5]), np.ones((1, 3)))
    plain = detections([window], ["x"], duration=10.0)
    moved = detections([window], ["x"], duration=10.0, voting=0.7)
    assert [one.score for one in plain] == [one.score for one in moved]
    assert plain[0].start == 2.0 and 2.0 < moved[0].start < 2.2 and 6.0 < moved[0].end < 6.4
    assert [one.start for one in moved if one.end == 9.0] == [8.0]

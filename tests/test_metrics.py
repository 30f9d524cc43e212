"""Evaluation: cases worked by hand, and equality to the last bit with the plain port of the official procedure."""

from __future__ import annotations

import json
import math
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from bench.peers import official_map
from lofi_fast import metrics
from lofi_fast.data.ground_truth import load_ground_truth
from lofi_fast.errors import InputError
from lofi_fast.evaluate import main
from lofi_fast.metrics import (
    average_recall,
    load_predictions,
    mean_average_precision,
    metrics_table,
    parse_tiou,
)

ANNOTATIONS = Path(__file__).parents[2] / "shared" / "data" / "annotations"
ANET = parse_tiou("activitynet")


def shared(name):
    path = ANNOTATIONS / name
    if not path.exists():
        pytest.skip(f"{path} is not here")
    return path


# --- thresholds ---------------------------------------------------------------------------------------------------


def test_named_thresholds_are_the_official_linspace():
    assert np.array_equal(ANET, np.linspace(0.5, 0.95, 10))
    assert np.array_equal(parse_tiou("thumos"), np.linspace(0.3, 0.7, 5))
    assert np.array_equal(parse_tiou("0.5:0.05:0.95"), ANET)
    assert np.array_equal(parse_tiou("0.3:0.1:0.7"), parse_tiou("thumos"))


def test_other_thresholds():
    assert parse_tiou("0.5,0.75").tolist() == [0.5, 0.75]
    assert parse_tiou("0.6").tolist() == [0.6]
    assert parse_tiou("0.5:0.2:0.5").tolist() == [0.5]
    np.testing.assert_allclose(parse_tiou("0.1:0.25:0.7"), [0.1, 0.35, 0.6])
    assert len(parse_tiou("0.01:0.01:1")) == 100


@pytest.mark.parametrize(
    "text", ["", "hacs", "0.5:0.95", "0.9:0.1:0.5", "0.5:0:0.9", "0.5:-0.1:0.4", "0", "1.5", "nan", "0.5,,0.6", "a:b:c"]
)
def test_bad_thresholds_name_the_flag(text):
    with pytest.raises(InputError, match="--tiou"):
        parse_tiou(text)


# --- by hand ------------------------------------------------------------------------------------------------------


def ap(ground_truth, predictions, tious="0.5,0.95"):
    return mean_average_precision(ground_truth, predictions, parse_tiou(tious)).average_precision.tolist()


def test_a_better_score_on_the_worse_segment():
    gt = {"v": [(0.0, 10.0, "a")]}
    # At 0.5 the first prediction takes the segment, at 0.95 it is a false positive before the true one: AP 1/2.
    assert ap(gt, {"v": [(0.0, 9.0, "a", 0.9), (0.0, 10.0, "a", 0.8)]}) == [[1.0, 0.5]]
    assert ap(gt, {"v": [(0.0, 9.0, "a", 0.8), (0.0, 10.0, "a", 0.9)]}) == [[1.0, 1.0]]


def test_precision_is_interpolated_from_the_right():
    gt = {"v": [(0.0, 10.0, "a"), (20.0, 30.0, "a")]}
    predictions = {"v": [(0.0, 10.0, "a", 0.9), (50.0, 60.0, "a", 0.8), (20.0, 30.0, "a", 0.7)]}
    assert ap(gt, predictions, "0.5") == [[0.5 * 1 + 0.5 * (2 / 3)]]
    # A missed segment: recall stops at one half.
    assert ap(gt, {"v": [(0.0, 10.0, "a", 0.9)]}, "0.5") == [[0.5]]
    # Precision 1/2 then 2/3: the first point is lifted to 2/3.
    late = {"v": [(50.0, 60.0, "a", 0.9), (0.0, 10.0, "a", 0.8), (20.0, 30.0, "a", 0.7)]}
    assert ap(gt, late, "0.5")[0][0] == pytest.approx(2 / 3)


def test_one_segment_is_matched_once_and_the_next_best_is_free():
    gt = {"v": [(0.0, 10.0, "a"), (2.0, 10.0, "a")]}
    # Both predictions are nearest to the first segment (tIoU 1); the second falls back on the other (0.8).
    twice = {"v": [(0.0, 10.0, "a", 0.9), (0.0, 10.0, "a", 0.8)]}
    assert ap(gt, twice, "0.5,0.9") == [[1.0, 0.5]]


def test_classes_and_videos_do_not_mix():
    gt = {"v": [(0.0, 10.0, "a"), (0.0, 10.0, "b")], "w": [(0.0, 10.0, "a")]}
    predictions = {"v": [(0.0, 10.0, "b", 0.9)], "w": [(0.0, 10.0, "b", 0.8)]}
    result = mean_average_precision(gt, predictions, parse_tiou("0.5"))
    assert result.classes == ("a", "b")
    assert result.average_precision.tolist() == [[0.0], [1.0]]
    assert result.map_by_tiou.tolist() == [0.5]
    assert result.average == 0.5


def test_zero_length_ground_truth_matches_through_nan():
    gt = {"v": [(5.0, 5.0, "a")]}
    assert ap(gt, {"v": [(5.0, 5.0, "a", 1.0)]}) == [[1.0, 1.0]]
    # Of two zero-length segments at different places neither overlaps, yet 0/0 matches: the official behaviour.
    assert ap(gt, {"v": [(7.0, 7.0, "a", 1.0)]}) == [[1.0, 1.0]]
    assert ap(gt, {"v": [(4.0, 6.0, "a", 1.0)]}) == [[0.0, 0.0]]


def test_a_prediction_that_ends_before_it_starts_hits_nothing():
    # Its tIoU with a segment of the same length is 0/0, which the official evaluator counts as a hit.
    gt = {"v": [(1.0, 3.0, "a"), (5.0, 5.0, "a")]}
    assert ap(gt, {"v": [(3.0, 1.0, "a", 0.9)]}) == [[0.0, 0.0]]
    behind = {"v": [(3.0, 1.0, "a", 0.9), (1.0, 3.0, "a", 0.8), (5.0, 5.0, "a", 0.7)]}
    assert ap(gt, behind, "0.5") == [[2 / 3]]


def test_unknown_labels_are_ignored_and_unknown_videos_are_false_positives():
    gt = {"v": [(0.0, 10.0, "a")]}
    predictions = {
        "v": [(0.0, 10.0, "a", 0.5), (0.0, 10.0, "z", 0.9)],
        "elsewhere": [(0.0, 10.0, "a", 0.8), (0.0, 10.0, "z", 0.8)],
    }
    result = mean_average_precision(gt, predictions, parse_tiou("0.5"))
    assert result.average == 0.5
    assert (result.num_predictions, result.num_unknown_label, result.num_unknown_video) == (4, 2, 1)


def test_a_predicted_video_without_detections_scores_zero():
    assert ap({"v": [(0.0, 1.0, "a")]}, {"v": []}) == [[0.0, 0.0]]


def test_nothing_to_match_is_an_error():
    with pytest.raises(InputError, match="--subset"):
        mean_average_precision({"v": []}, {"v": [(0.0, 1.0, "a", 1.0)]}, ANET)
    with pytest.raises(InputError, match=r"'w' against 'v'"):
        mean_average_precision({"v": [(0.0, 1.0, "a")]}, {"w": [(0.0, 1.0, "a", 1.0)]}, ANET)
    with pytest.raises(InputError, match="no prediction"):
        mean_average_precision({"v": [(0.0, 1.0, "a")]}, {}, ANET)


# --- against the port ---------------------------------------------------------------------------------------------


def assert_same_map(ground_truth, predictions, tious):
    classes, table, by_tiou, average = official_map.mean_average_precision(ground_truth, predictions, tious)
    result = mean_average_precision(ground_truth, predictions, tious)
    assert list(result.classes) == classes
    assert np.array_equal(result.average_precision, table.T)
    assert np.array_equal(result.map_by_tiou, by_tiou)
    assert result.average == average
    return result


def random_set(seed, *, videos=60, classes=5, per_video=6, tied=False):
    """Ground truth with duplicates and zero lengths; predictions jittered, spurious, misplaced and misnamed."""
    rng = np.random.default_rng(seed)
    ground_truth, predictions = {}, {}
    for v in range(videos):
        segments = []
        for _ in range(int(rng.integers(0, per_video + 1))):
            start = float(rng.uniform(0, 90))
            length = 0.0 if rng.random() < 0.1 else float(rng.uniform(0.5, 30))
            segments.append((start, start + length, f"c{rng.integers(classes)}"))
        if segments and rng.random() < 0.3:
            segments.append(segments[0])
        ground_truth[f"v{v}"] = segments
        items = []
        for start, end, label in segments:
            for _ in range(int(rng.integers(0, 5))):
                jitter = rng.normal(0, 0.08 * (end - start), 2)
                label_given = label if rng.random() < 0.8 else f"c{rng.integers(classes + 2)}"
                items.append((start + float(jitter[0]), end + float(jitter[1]), label_given, float(rng.random())))
        for _ in range(int(rng.integers(0, 4))):
            start = float(rng.uniform(0, 90))
            items.append((start, start + float(rng.uniform(-2, 30)), f"c{rng.integers(classes)}", float(rng.random())))
        if items or rng.random() < 0.5:
            predictions[f"v{v}"] = items
    predictions["elsewhere"] = [(0.0, 5.0, "c0", 0.5), (0.0, 5.0, "c1", 0.9)]
    if tied:
        predictions = {
            name: [(round(s), round(e), label, round(score, 1)) for s, e, label, score in items]
            for name, items in predictions.items()
        }
        ground_truth = {
            name: [(float(round(s)), float(round(e)), label) for s, e, label in segments]
            for name, segments in ground_truth.items()
        }
    return ground_truth, predictions


@pytest.mark.parametrize("tied", [False, True], ids=["distinct", "tied"])
@pytest.mark.parametrize("seed", range(4))
def test_equals_the_port_on_random_sets(seed, tied):
    ground_truth, predictions = random_set(seed, tied=tied)
    assert 0 < assert_same_map(ground_truth, predictions, ANET).average < 1


@pytest.mark.parametrize("tied", [False, True], ids=["distinct", "tied"])
def test_equals_the_port_with_long_lists_of_segments(tied):
    # More than 16 and more than 256 segments to sort: other branches of NumPy's sort, whose ties fall differently.
    ground_truth, predictions = random_set(11, videos=3, classes=1, per_video=700, tied=tied)
    assert max(len(segments) for segments in ground_truth.values()) > 256
    assert 0 < assert_same_map(ground_truth, predictions, parse_tiou("0.3,0.5,0.9")).average < 1


@pytest.mark.parametrize("pairs", [1, 50, 1000])
def test_matching_in_parts_changes_nothing(monkeypatch, pairs):
    monkeypatch.setattr(metrics, "MOST_PAIRS", pairs)
    for seed, tied in ((7, False), (8, True)):
        ground_truth, predictions = random_set(seed, videos=8, classes=2, per_video=60, tied=tied)
        assert_same_map(ground_truth, predictions, ANET)
        recall, port = (
            recall_of(ground_truth, predictions, ANET, 30)
            for recall_of in (average_recall, official_map.average_recall)
        )
        assert np.array_equal(recall.recall, port[1]) and recall.auc == port[3]


@pytest.mark.parametrize("measure", [mean_average_precision, average_recall])
def test_memory_does_not_grow_with_predictions_times_segments(monkeypatch, measure):
    monkeypatch.setattr(metrics, "MOST_PAIRS", 1 << 16)
    count = 2500
    rng = np.random.default_rng(0)
    starts = rng.uniform(0, 3600, (2, count))
    (s, e), (ps, pe) = ((start.tolist(), (start + rng.uniform(1, 60, count)).tolist()) for start in starts)
    ground_truth = {"v": [(*bounds, "a") for bounds in zip(s, e, strict=True)]}
    predictions = {"v": [(*row[:2], "a", row[2]) for row in zip(ps, pe, rng.random(count).tolist(), strict=True)]}
    tracemalloc.start()
    measure(ground_truth, predictions, parse_tiou("0.3,0.5,0.7"))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 8 * count * count / 4  # a quarter of one matrix of their tIoUs


def test_equals_the_port_with_many_classes():
    # The mean over more than 128 classes depends on the order in which NumPy adds them.
    ground_truth, predictions = random_set(5, videos=200, classes=180)
    assert len(assert_same_map(ground_truth, predictions, ANET).classes) > 128


def test_equals_the_port_when_every_score_is_equal():
    ground_truth, predictions = random_set(3, videos=100, classes=2)
    flat = {name: [(s, e, label, 1.0) for s, e, label, _ in items] for name, items in predictions.items()}
    assert_same_map(ground_truth, flat, ANET)


def test_equals_the_port_on_activitynet():
    ground_truth = load_ground_truth(shared("activitynet13_validation.json"))
    sample = load_predictions(shared("activitynet_sample_predictions.json"))
    names = list(ground_truth)[::4]
    zero_length = [n for n, segments in ground_truth.items() if any(s == e for s, e, _ in segments)]
    names += [name for name in zero_length if name not in names]
    ground_truth = {name: ground_truth[name] for name in names}
    sample = {name: sample[name] for name in names}
    assert assert_same_map(ground_truth, sample, ANET).average == 1.0

    rng = np.random.default_rng(0)
    jittered = {
        name: [
            (s + rng.normal(0, 0.1) * (e - s), e + rng.normal(0, 0.1) * (e - s), label, float(rng.random()))
            for s, e, label, _ in items
            for _ in range(3)
        ]
        for name, items in sample.items()
    }
    assert 0.2 < assert_same_map(ground_truth, jittered, ANET).average < 0.9
    tied = {name: [(s, e, label, round(p, 1)) for s, e, label, p in items] for name, items in jittered.items()}
    assert_same_map(ground_truth, tied, ANET)


# --- average recall -----------------------------------------------------------------------------------------------


def test_the_evaluator_holds_little_beside_what_it_is_given():
    """Of many predictions arrays alone: 28 bytes each as columns, some more while they are ranked and matched."""
    count, videos = 100_000, 1_000
    ground_truth = {f"v{i}": [(0.0, 1.0, f"class {i % 20}")] for i in range(videos)}
    items = [(0.001 * i, 1.0, f"class {i % 20}", 1 / (i + 1)) for i in range(count // videos)]
    predictions = {name: items for name in ground_truth}
    mean_average_precision(ground_truth, {"v0": items}, ANET)  # code that is loaded at its first use
    tracemalloc.start()
    mean_average_precision(ground_truth, predictions, ANET)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 150 * count, f"{peak / count:.0f} bytes for each prediction"


def test_average_recall_by_hand():
    gt = {"v": [(0.0, 10.0, "a"), (20.0, 30.0, "a")]}
    # 100 proposals for one video: the k-th point of the curve sees the k best. Hits at ranks 1 and 51.
    items = [(50.0, 51.0, "x", 1 - i / 100) for i in range(100)]
    items[0] = (0.0, 10.0, "x", 1.0)
    items[50] = (20.0, 30.0, "x", 0.5)
    result = average_recall(gt, {"v": items}, ANET)
    np.testing.assert_allclose(result.proposals_per_video, np.arange(1, 101))
    assert result.average_recall[:50].tolist() == [0.5] * 50
    assert result.average_recall[50:].tolist() == [1.0] * 50
    # Trapezoid over 1..100: 49 steps of 0.5, one of 0.75, 49 of 1, over the official divisor 100.
    assert result.auc == pytest.approx(49 * 0.5 + 0.75 + 49)


@pytest.mark.parametrize("max_avg", [0.7, 3, 100])
@pytest.mark.parametrize("seed", range(3))
def test_average_recall_equals_the_port(seed, max_avg):
    ground_truth, proposals = random_set(seed, videos=20, tied=seed == 2)
    per_video, recall, curve, auc = official_map.average_recall(ground_truth, proposals, ANET, max_avg)
    result = average_recall(ground_truth, proposals, ANET, max_avg)
    assert np.array_equal(result.proposals_per_video, per_video)
    assert np.array_equal(result.recall, recall)
    assert np.array_equal(result.average_recall, curve)
    assert result.auc == auc
    assert 0 < curve[-1] < 1


def test_average_recall_with_nothing_to_rank():
    gt = {"v": [(0.0, 10.0, "a")]}
    with pytest.raises(InputError, match="no proposal"):
        average_recall(gt, {"v": []}, ANET)
    with pytest.raises(InputError, match="average"):
        average_recall(gt, {"v": [(0.0, 10.0, "a", 1.0)]}, ANET, max_avg=0.5)


# --- files --------------------------------------------------------------------------------------------------------


def video(subset, *segments):
    return {"subset": subset, "annotations": [{"segment": list(s[:2]), "label": s[2]} for s in segments]}


def write(path, content):
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def test_subset_by_default(tmp_path):
    path = tmp_path / "gt.json"
    a, b, c = video("training", (0, 1, "a")), video("val", (0, 2, "b")), video("test", ("0.5", "3.25", "c"))
    write(path, {"database": {"a": a, "b": b, "c": c}})
    assert load_ground_truth(path) == {"b": [(0.0, 2.0, "b")]}
    assert load_ground_truth(path, "train") == load_ground_truth(path, "training") == {"a": [(0.0, 1.0, "a")]}
    write(path, {"database": {"a": a, "c": c}})
    assert load_ground_truth(path) == {"c": [(0.5, 3.25, "c")]}
    write(path, {"database": {"a": a}})
    assert load_ground_truth(path) == {"a": [(0.0, 1.0, "a")]}
    write(path, {"database": {"a": a, "x": video("extra", (0, 1, "a"))}})
    with pytest.raises(InputError, match="--subset"):
        load_ground_truth(path)
    with pytest.raises(InputError, match=r"extra, training"):
        load_ground_truth(path, "validation")


def test_a_subset_is_named_in_any_case(tmp_path):
    path = write(
        tmp_path / "gt.json", {"database": {"a": video("Train", (0, 1, "a")), "b": video(" Val", (0, 2, "b"))}}
    )
    assert load_ground_truth(path, "TRAINING") == load_ground_truth(path, "train") == {"a": [(0.0, 1.0, "a")]}
    assert load_ground_truth(path) == load_ground_truth(path, "Validation") == {"b": [(0.0, 2.0, "b")]}
    write(path, {"database": {"a": video("Extra", (0, 1, "a")), "b": video("extra", (0, 2, "b"))}})
    assert list(load_ground_truth(path, "EXTRA")) == ["a", "b"]


def test_ground_truth_is_what_training_reads(tmp_path):
    segments = [("v", (1.0, 3.0, "run")), ("w", (0.5, 2.0, "jump"))]
    rows = "".join(f"{name},{s[0]},{s[1]}, {s[2]} ,Validation\n" for name, s in segments)
    table = tmp_path / "gt.csv"
    table.write_text(f"video,start,end,label,subset\n{rows}t,0,1,run,training\n", encoding="utf-8-sig")
    content = {name: video("validation", (s[0], s[1], f"{s[2]} ")) for name, s in segments}
    marked = tmp_path / "gt.json"
    marked.write_text(json.dumps({"database": content}), encoding="utf-8-sig")
    expected = {name: [s] for name, s in segments}
    assert load_ground_truth(table) == load_ground_truth(marked) == expected
    assert load_ground_truth(table, "Train") == {"t": [(0.0, 1.0, "run")]}
    with pytest.raises(InputError, match="--subset"):
        load_ground_truth(table, "testing")

    predictions = tmp_path / "p.json"
    found = {name: [{"segment": list(s[:2]), "label": f" {s[2]}", "score": 1}] for name, s in segments}
    predictions.write_text(json.dumps({"results": found}), encoding="utf-8-sig")
    for truth in (table, marked):
        result = mean_average_precision(load_ground_truth(truth), load_predictions(predictions), ANET)
        assert result.average == 1.0 and result.classes == ("run", "jump")


def test_predictions_of_a_video_that_stands_there_twice_are_refused(tmp_path):
    found = '[{"segment": [0, 1], "label": "a", "score": 1}]'
    path = write(tmp_path / "p.json", f'{{"results": {{"v": {found}, "w": [], "v": []}}}}')
    with pytest.raises(InputError, match="'v' appears twice in one object; mend --predictions"):
        load_predictions(path)


def test_utf_16_is_read(tmp_path):
    truth, found = tmp_path / "gt.json", tmp_path / "p.json"
    truth.write_text(json.dumps(one((1, 2))), encoding="utf-16")
    results = {"v": [{"segment": [1, 2], "label": "a", "score": 1}]}
    found.write_text(json.dumps({"results": results}), encoding="utf-16")
    assert mean_average_precision(load_ground_truth(truth), load_predictions(found), ANET).average == 1


def test_times_are_read_as_training_reads_them(tmp_path):
    for start, end in (("0:01", "00:00:03.50"), ("1,0", "3,5"), ("1", 3.5)):
        assert load_ground_truth(write(tmp_path / "gt.json", one((start, end)))) == {"v": [(1.0, 3.5, "a")]}


def test_a_video_named_twice_is_refused_as_training_does(tmp_path):
    entry = json.dumps(video("validation", (0, 1, "a")))
    path = write(tmp_path / "gt.json", f'{{"database": {{"v": {entry}, "v": {entry}}}}}')
    with pytest.raises(InputError, match="'v' appears twice"):
        load_ground_truth(path)


def test_a_table_of_detections_is_told_what_makes_json_of_it(tmp_path):
    path = tmp_path / "detections.csv"
    path.write_text("video,start,end,label,score\nv,0,1,a,0.5\n")
    with pytest.raises(InputError, match=r"is a table; give --predictions what `lofi-fast convert \S+detections.csv"):
        load_predictions(path)


def test_test_videos_may_have_no_annotations(tmp_path):
    path = write(tmp_path / "gt.json", {"database": {"a": {"subset": "testing"}, "b": video("test", (0, 1, "a"))}})
    assert load_ground_truth(path) == {"a": [], "b": [(0.0, 1.0, "a")]}


def one(segment=(0, 1), label="a", subset="validation"):
    return {"database": {"v": {"subset": subset, "annotations": [{"segment": list(segment), "label": label}]}}}


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ("{", "not valid JSON"),
        ("[]", "database"),
        ({"results": {}}, "database"),
        ({"database": {}}, "--subset"),
        ({"database": {"v": {"annotations": []}}}, "video v.*subset"),
        ({"database": {"v": {"subset": "validation"}}}, "video v.*annotations"),
        ({"database": {"v": video("validation")}}, "no segment"),
        ({"database": {"v": {"subset": "validation", "annotations": [{"label": "a"}]}}}, "segment 0"),
        (one(label=3), "label"),
        (one(label=" "), "label"),
        (one((0, 1, 2)), r"\[start, end\]"),
        (one((2, 1)), "after its end"),
        (one(("x", 1)), "segment 0: start is 'x'"),
        (one((0, None)), "segment 0: end is None"),
        (one((0, True)), "segment 0: end is True"),
        (one((math.nan, 1)), "not a finite number"),
        (one((0, math.inf)), "not a finite number"),
    ],
)
def test_bad_ground_truth_is_one_sentence(tmp_path, content, sentence):
    path = write(tmp_path / "gt.json", content)
    with pytest.raises(InputError, match=sentence) as caught:
        load_ground_truth(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    ("items", "sentence"),
    [
        ([{"segment": [0, 1], "label": "a"}], "segment 0: .*score"),
        ([{"segment": [0, 1], "label": "a", "score": math.nan}], "segment 0: score is nan"),
        ([{"segment": [0, 1], "score": 1}], "label"),
        ([{"segment": 3, "label": "a", "score": 1}], "start, end"),
        ([{"segment": [3, 1], "label": "a", "score": 1}], "after its end"),
        ({"segment": [0, 1]}, "list"),
        (["a"], "object"),
    ],
)
def test_bad_predictions_are_one_sentence(tmp_path, items, sentence):
    path = write(tmp_path / "p.json", {"results": {"v": items}})
    with pytest.raises(InputError, match=sentence) as caught:
        load_predictions(path)
    assert "video v" in str(caught.value)


def test_missing_files_name_the_flag(tmp_path):
    with pytest.raises(InputError, match=r"nothing\.json does not exist; give --ground-truth"):
        load_ground_truth(tmp_path / "nothing.json")
    with pytest.raises(InputError, match=r"cannot be read .*--predictions"):
        load_predictions(tmp_path)


def test_thumos_strings_are_read():
    ground_truth = load_ground_truth(shared("thumos14_groundtruth.json"))
    assert len(ground_truth) == 210
    assert sum(len(segments) for segments in ground_truth.values()) == 3311
    perfect = {name: [(*segment, 1.0) for segment in segments] for name, segments in ground_truth.items()}
    assert mean_average_precision(ground_truth, perfect, parse_tiou("thumos")).average == 1.0


# --- command line -------------------------------------------------------------------------------------------------


def test_command_line(tmp_path, capsys):
    gt = write(tmp_path / "gt.json", {"database": {"v": video("validation", (0, 10, "a"), (0, 5, "b"))}})
    results = {"v": [{"segment": [0, 10], "label": "a", "score": 0.5}, {"segment": [0, 1], "label": "z", "score": 1}]}
    results["w"] = [{"segment": [0, 1], "label": "a", "score": 0.1}]
    predictions = write(tmp_path / "p.json", {"results": results})
    arguments = ["--ground-truth", str(gt), "--predictions", str(predictions), "--tiou", "0.5,0.95"]
    assert main([*arguments, "--per-class", "--json", str(tmp_path / "m.json")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "validation: 1 videos, 2 segments, 2 classes; 3 predictions"
    assert "1 predictions ignored" in lines[1]
    assert "1 predictions count as false positives" in lines[2]
    assert lines[3].split() == ["tIoU", "0.5", "0.95", "average"]
    assert lines[4].split() == ["mAP", "(%)", "50.00", "50.00", "50.00"]
    assert [line.split() for line in lines[5:]] == [["a"] + ["100.00"] * 3, ["b"] + ["0.00"] * 3]
    written = json.loads((tmp_path / "m.json").read_text())
    assert written["average_map"] == 0.5
    assert written["average_precision"] == {"a": [1.0, 1.0], "b": [0.0, 0.0]}
    assert sorted(p.name for p in tmp_path.iterdir()) == ["gt.json", "m.json", "p.json"]


def test_of_several_processes_the_first_evaluates_alone(tmp_path, capsys, monkeypatch):
    truth = {"v": {"subset": "validation", "annotations": [{"segment": [1, 3], "label": "run"}]}}
    (tmp_path / "truth.json").write_text(json.dumps({"database": truth}))
    found = {"v": [{"segment": [1, 3], "label": "run", "score": 1.0}]}
    (tmp_path / "found.json").write_text(json.dumps({"results": found}))
    argv = ["--ground-truth", str(tmp_path / "truth.json"), "--predictions", str(tmp_path / "found.json")]
    monkeypatch.setenv("WORLD_SIZE", "2")
    said = []
    for rank in ("1", "0"):
        monkeypatch.setenv("RANK", rank)
        assert main([*argv, "--json", str(tmp_path / f"{rank}.json")]) == 0
        said.append(capsys.readouterr().out)
    assert said[0] == "" and not (tmp_path / "1.json").exists()
    assert "average" in said[1] and json.loads((tmp_path / "0.json").read_text())["average_map"] == 1


def test_command_line_error(tmp_path, capsys):
    gt = write(tmp_path / "gt.json", one())
    predictions = write(tmp_path / "p.json", {"results": {"other": []}})
    assert main(["--ground-truth", str(gt), "--predictions", str(predictions)]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: None of the predictions' videos")
    good = write(tmp_path / "p.json", {"results": {"v": []}})
    missing = tmp_path / "no" / "m.json"
    assert main(["--ground-truth", str(gt), "--predictions", str(good), "--json", str(missing)]) == 2
    assert "--json" in capsys.readouterr().err


def test_official_sample_scores_exactly_one(capsys):
    gt, sample = shared("activitynet13_validation.json"), shared("activitynet_sample_predictions.json")
    result = mean_average_precision(load_ground_truth(gt), load_predictions(sample), ANET)
    assert result.average == 1.0
    # Of single classes some are 1 - 1e-16, as officially: recall steps of 1/n are summed.
    np.testing.assert_allclose(result.average_precision, 1.0, rtol=1e-15)
    assert metrics_table(result).splitlines()[1].split()[-1] == "100.00"

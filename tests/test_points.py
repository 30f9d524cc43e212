"""Points in time: the spotting head and both definitions of their mAP against plain loops, and through the commands."""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lofi_fast import evaluate as evaluator
from lofi_fast import load
from lofi_fast.config import SpottingConfig
from lofi_fast.data import demo
from lofi_fast.data.grid import Grid, Labelled, best_tiou
from lofi_fast.errors import InputError
from lofi_fast.head.decoding import Candidates, best_points, point_candidates
from lofi_fast.head.protocol import NotFiniteOutput, Proposals
from lofi_fast.head.spotting import Counts, Spotting, snippet_classes
from lofi_fast.point_metrics import Tolerances, parse_tolerance, point_precision, points_table
from lofi_fast.train import main

FEATURES, CLASSES = 6, 3


def spotting(**settings: float) -> Spotting:
    torch.manual_seed(0)
    return Spotting(SpottingConfig(**settings), FEATURES, CLASSES).double()  # type: ignore[arg-type]


def features(batch: int, length: int, seed: int = 1) -> Tensor:
    return torch.from_numpy(np.random.RandomState(seed).standard_normal((batch, FEATURES, length)))


# The head


def literal_gru(x_LC: np.ndarray, head: Spotting, suffix: str) -> np.ndarray:
    """One direction of the network, snippet by snippet (Cho et al., 2014): (L, H)."""
    state = {name: value.detach().numpy() for name, value in head.recurrent.state_dict().items()}
    into, back = state[f"weight_ih_l0{suffix}"], state[f"weight_hh_l0{suffix}"]
    into_bias, back_bias = state[f"bias_ih_l0{suffix}"], state[f"bias_hh_l0{suffix}"]
    hidden = np.zeros(back.shape[1])
    rows = []
    for x in x_LC:
        reset, update, new = np.split(into @ x + into_bias, 3)
        old_reset, old_update, old_new = np.split(back @ hidden + back_bias, 3)
        update = 1 / (1 + np.exp(-update - old_update))
        candidate = np.tanh(new + old_new / (1 + np.exp(-reset - old_reset)))
        hidden = (1 - update) * candidate + update * hidden
        rows.append(hidden)
    return np.array(rows)


@pytest.mark.parametrize("length", [1, 2, 7])
def test_the_network_is_its_definition(length: int) -> None:
    head, x = spotting(hidden=4).eval(), features(2, length)
    output = head(x)
    assert output.shape == (2, CLASSES + 1, length)
    weight, bias = (value.detach().numpy() for value in (head.classifier.weight, head.classifier.bias))
    for b in range(2):
        rows = x[b].T.numpy()
        both = np.concatenate([literal_gru(rows, head, ""), literal_gru(rows[::-1], head, "_reverse")[::-1]], axis=1)
        np.testing.assert_allclose(output[b].detach().T, both @ weight.T + bias, rtol=0, atol=1e-12)


def test_it_is_as_wide_as_the_features_and_has_as_many_layers_as_are_asked_for() -> None:
    assert spotting().recurrent.hidden_size == FEATURES
    assert Spotting(SpottingConfig(), 2048, 1).recurrent.hidden_size == 768
    assert spotting(layers=2).recurrent.num_layers == 2


def literal_classes(edges: list[float], points: list[tuple[float, int]], dilation: int) -> list[int]:
    result = []
    for i in range(len(edges) - 1):
        best = (dilation + 1, 0)
        for time, label in points:
            for p in range(len(edges) - 1):
                last = p == len(edges) - 2
                inside = edges[p] <= time < edges[p + 1] or (last and time == edges[-1])
                if inside and abs(i - p) <= min(best[0], dilation):
                    best = (abs(i - p), label + 1)
        result.append(best[1])
    return result


@settings(max_examples=60)
@given(
    gaps=st.lists(st.sampled_from([0.5, 1.0, 1.5]), min_size=1, max_size=8),
    points=st.lists(st.tuples(st.integers(-2, 20).map(lambda k: k / 2), st.integers(0, CLASSES - 1)), max_size=6),
    dilation=st.integers(0, 3),
)
def test_snippets_are_taught_the_nearest_point(
    gaps: list[float], points: list[tuple[float, int]], dilation: int
) -> None:
    edges = np.concatenate([[0.0], np.cumsum(gaps)])
    times, labels = np.array([time for time, _ in points]), np.array([label for _, label in points], dtype=np.int64)
    found = snippet_classes(edges, times, labels, dilation)
    assert found.tolist() == literal_classes(edges.tolist(), points, dilation)


def test_the_loss_is_a_weighted_mean_and_that_of_a_batch_in_parts_adds_up() -> None:
    head, x = spotting(hidden=4, point_weight=3.0).eval(), features(3, 5)
    edges = np.arange(6.0)
    random = np.random.default_rng(0)
    windows = [np.array([[1.2, 1.2]]), np.array([[0.0, 2.0], [4.9, 4.9]]), np.empty((0, 2))]
    targets = [head.targets(edges, segments, np.arange(len(segments)), random) for segments in windows]
    assert [window.tolist() for window in targets] == [[0, 1, 0, 0, 0], [1, 0, 0, 0, 2], [0] * 5]
    counts = head.counts(targets)
    assert counts == Counts(12, 3) == head.counts(targets[:1]) + head.counts(targets[1:])
    output = head(x)
    (loss,) = head.loss(output, targets, counts, 0.0).values()
    expected = weights = 0.0
    for b in range(3):
        for i in range(5):
            logits, label = output[b, :, i].tolist(), int(targets[b][i])
            weight = 3.0 if label else 1.0
            expected += weight * (math.log(sum(map(math.exp, logits))) - logits[label])
            weights += weight
    assert loss.item() == pytest.approx(expected / weights, rel=1e-6)
    parts = [head.loss(head(x[part]), targets[part], counts, 0.0)["classes"] for part in (slice(1), slice(1, 3))]
    assert sum(part.item() for part in parts) == pytest.approx(loss.item(), rel=1e-6)


def test_dropout_is_drawn_by_window() -> None:
    head, x = spotting(hidden=4).train(), features(2, 6)

    def drawn(part: slice, seeds: list[int]) -> Tensor:
        head.seed(seeds)
        output: Tensor = head(x[part])
        return output

    whole = drawn(slice(2), [5, 6])
    torch.testing.assert_close(torch.cat([drawn(slice(1), [5]), drawn(slice(1, 2), [6])]), whole)
    assert not torch.equal(drawn(slice(2), [5, 7])[1], whole[1])
    assert not torch.equal(head.eval()(x), whole)


def test_points_are_found_at_the_centres_of_snippets() -> None:
    logits = torch.full((1, CLASSES + 1, 3), -20.0)
    logits[0, 0] = 0.0
    logits[0, 2, 1] = 1.0
    head = spotting()
    (window,) = head.proposals(logits, [np.array([10.0, 12.0, 14.0, 16.0])])
    assert window.segments_P2.tolist() == [[11.0, 11.0], [13.0, 13.0], [15.0, 15.0]]
    found = point_candidates(window, duration=20.0)
    assert found.segments_N2.tolist() == [[13.0, 13.0]] and found.labels_N.tolist() == [1]
    assert found.scores_N.tolist() == pytest.approx([1 / (1 + math.exp(-1.0))])
    assert not len(point_candidates(window, duration=12.9).scores_N), "the video has ended by then"
    logits[0, 1, 2] = math.nan
    with pytest.raises(NotFiniteOutput):
        head.proposals(logits, [np.arange(4.0)])
    with pytest.raises(ValueError, match="class_probs"):
        point_candidates(Proposals(np.zeros((1, 2)), np.ones(1)), duration=1.0)


# Decoding


def literal_points(points: list[tuple[float, float, int]], reach: float) -> set[tuple[float, float, int]]:
    """E2E-Spot's rule; of points at one time only the best is looked at."""
    kept = set()
    for time, score, label in points:
        others = [(t, s) for t, s, other in points if other == label and (t, s) != (time, score)]
        if not any(abs(t - time) <= reach and s > score for t, s in others):
            kept.add((time, score, label))
    return kept


@settings(max_examples=80)
@given(
    points=st.lists(
        st.tuples(
            st.integers(0, 12).map(lambda k: k / 2), st.integers(1, 6).map(lambda k: k / 8), st.integers(0, 1)
        ), max_size=14,
    ),
    reach=st.sampled_from([0.0, 0.5, 1.2, 3.0]),
    windows=st.integers(1, 3),
)  # fmt: skip
def test_suppression_keeps_what_no_better_point_is_near_to(
    points: list[tuple[float, float, int]], reach: float, windows: int
) -> None:
    parts = [
        Candidates(
            np.array([(t, t) for t, _, _ in part]).reshape(-1, 2),
            np.array([s for _, s, _ in part]),
            np.array([label for _, _, label in part], dtype=np.int64),
        )
        for part in (points[k::windows] for k in range(windows))
    ]
    found = best_points(parts, ("a", "b"), suppression=reach, top_k=100)
    assert {(d.start, d.score, "ab".index(d.label)) for d in found} == literal_points(points, reach)
    assert len({(d.start, d.label) for d in found}) == len(found), "none twice at one time"
    assert all(d.start == d.end for d in found) and [d.score for d in found] == sorted(d.score for d in found)[::-1]
    assert best_points(parts, ("a", "b"), suppression=reach, top_k=2) == found[:2]


def test_points_do_not_make_a_video_one_that_nothing_can_be_found_in() -> None:
    points = Labelled.of([(3.0, 3.0, 0.0, 60.0), (59.0, 60.0, 0.0, 60.0)])
    assert best_tiou(points, Grid(32.0, 0.5, 64)).tolist()[0] == 0
    assert best_tiou(points, Grid(32.0, 0.5, 64, points=True)).tolist() == [1.0, 1.0]


# mAP


Rows = list[tuple[str, float, float]]


def literal_spot(found: Rows, truth: dict[str, list[float]], tolerance: float) -> float:
    """Average precision as E2E-Spot defines it."""
    hits, taken = [], set()
    for rank, (video, time, _) in enumerate(sorted(found, key=lambda row: -row[2]), 1):
        left = [point for point in sorted(truth.get(video, [])) if (video, point) not in taken]
        if left and abs(min(left, key=lambda point: abs(point - time)) - time) <= tolerance:
            taken.add((video, min(left, key=lambda point: abs(point - time))))
            hits.append(len(taken) / rank)
    return sum(max(hits[k:]) for k in range(len(hits))) / sum(map(len, truth.values()))


def literal_soccernet(found: Rows, truth: dict[str, list[float]], tolerance: float) -> float:
    """Average precision as SoccerNet defines it."""
    by_score: list[tuple[float, bool]] = []
    number = 0
    for video in sorted({*truth, *(row[0] for row in found)}):
        best: dict[int, float] = {}
        for _, time, score in (row for row in found if row[0] == video):
            best[math.floor(2 * time)] = max(score, best.get(math.floor(2 * time), 0.0))
        points, hit = sorted({math.floor(2 * point) for point in truth.get(video, [])}), set()
        number += len(points)
        for point in points:
            near = [p for p in sorted(best) if p not in hit and abs(p - point) <= tolerance]
            if near:
                hit.add(max(near, key=lambda p: best[p]))
        by_score += [(score, place in hit) for place, score in best.items()]
    curve = []
    for least in np.linspace(0, 1, 200):
        reached = [hit for score, hit in by_score if score >= least]
        curve.append((sum(reached) / number, sum(reached) / len(reached) if reached else 0.0))
    return sum(max([p for r, p in curve if r >= j / 10], default=0.0) for j in range(11)) / 11


@settings(max_examples=60)
@given(
    truth=st.lists(st.tuples(st.sampled_from("uvw"), st.integers(0, 40).map(lambda k: k / 4)), min_size=1, max_size=8,
                   unique=True),
    found=st.lists(st.tuples(st.sampled_from("uvx"), st.integers(0, 40).map(lambda k: k / 4)), max_size=12),
    seed=st.integers(0, 100),
    tolerance=st.sampled_from([0.0, 0.5, 1.0, 3.0]),
)  # fmt: skip
def test_both_definitions_of_map(
    truth: list[tuple[str, float]], found: list[tuple[str, float]], seed: int, tolerance: float
) -> None:
    scores = np.random.RandomState(seed).permutation(len(found)) / 13 + 0.01  # no two alike
    rows = [(video, time, float(score)) for (video, time), score in zip(found, scores, strict=True)]
    of_truth = {video: [time for name, time in truth if name == video] for video in "uvw"}
    ground_truth = {video: [(time, time + 1, "a") for time in times] for video, times in of_truth.items()}
    predictions = {video: [(time, time, "a", score) for name, time, score in rows if name == video] for video in "uvwx"}
    for soccernet, literal in ((False, literal_spot), (True, literal_soccernet)):
        result = point_precision(ground_truth, predictions, Tolerances(np.array([tolerance]), soccernet))
        assert result.average == pytest.approx(literal(rows, of_truth, tolerance), abs=1e-12)
        assert result.num_unknown_video == sum(video == "x" for video, _ in found)


def test_the_averages_over_tolerances() -> None:
    truth = {"v": [(10.0, 10.0, "b"), (20.0, 20.0, "a")]}
    found = {"v": [(10.6, 10.6, "b", 0.9), (22.2, 22.2, "a", 0.8), (5.0, 5.0, "c", 0.7)]}
    spot = point_precision(truth, found, parse_tolerance("0.5,1,2,3"))
    assert spot.classes == ("a", "b") and spot.num_unknown_label == 1 and spot.num_segments == 2
    assert spot.average_precision.tolist() == [[0, 0, 0, 1], [0, 1, 1, 1]]
    assert spot.average == (0 + 0.5 + 0.5 + 1) / 4
    tight = point_precision(truth, found, parse_tolerance("tight"))
    # In half seconds 22 is 4 after 20, which 4 seconds allow, half on either side; 10.5 is one after 10.
    assert tight.map_by_tolerance.tolist() == [0.5, 0.5, 0.5, 1, 1]
    assert tight.average == (0.5 + 0.5 + 0.75 + 1) / 4
    assert points_table(tight).splitlines()[1].split()[2:] == ["50.00", "50.00", "50.00", "100.00", "100.00", "68.75"]
    assert "b  " in points_table(spot, per_class=True)
    with pytest.raises(InputError, match="no point"):
        point_precision({"v": []}, found, parse_tolerance("1"))
    with pytest.raises(InputError, match="None of the predictions' videos"):
        point_precision(truth, {"w": []}, parse_tolerance("1"))


def test_tolerances() -> None:
    assert parse_tolerance("loose").seconds.tolist() == [5.0 * k for k in range(1, 13)]
    assert parse_tolerance("1:1:5").seconds.tolist() == [1, 2, 3, 4, 5]
    assert parse_tolerance("2,0,1").seconds.tolist() == [0, 1, 2]
    assert parse_tolerance("0f,1f,4f", fps=25).seconds.tolist() == [0, 0.04, 0.16]
    with pytest.raises(InputError, match="add --fps"):
        parse_tolerance("1f")
    for text in ("", "x", "-1", "1,2f", "nan", "3:1:2", "1:0:2", "0:1e-9:5", "1:2"):
        with pytest.raises(InputError, match="--tolerance"):
            parse_tolerance(text, fps=25)


# Through the commands


@pytest.fixture(scope="module")
def point_set(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(labels, videos): the starts of a small demo set's segments, as points in a table."""
    folder = tmp_path_factory.mktemp("points")
    annotations, videos = demo.generate(folder, num_training=4, num_validation=2, seed=1)
    labels = folder / "points.csv"
    with labels.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("video", "start", "end", "label", "subset"))
        for name, entry in json.loads(annotations.read_text())["database"].items():
            for one in entry["annotations"]:
                start = one["segment"][0]
                writer.writerow((name, start, start, one["label"], entry["subset"]))
    return labels, videos


@pytest.mark.usefixtures("torchs_own_allocator")
def test_points_are_trained_detected_and_evaluated(
    point_set: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from test_train import SETTINGS

    labels, videos = point_set
    run = tmp_path / "run"
    data = ["--annotations", str(labels), "--videos", str(videos), "--cache", str(tmp_path / "cache")]
    flags = [*SETTINGS, "--head", "spotting", "--head-epochs", "2", "--joint-epochs", "1", "--tolerance", "tight"]
    assert main([*data, *flags, "--out", str(run)]) == 0
    said = capsys.readouterr().out
    assert "tolerance, s" in said and "tIoU" not in said and "error" not in said
    metrics = json.loads((run / "metrics.json").read_text())
    assert list(metrics["map_by_tolerance"]) == ["1", "2", "3", "4", "5"] and metrics["map_by_tiou"] == {}
    assert "tolerance in seconds" in (run / "report.html").read_text()
    detector = load(run)
    assert type(detector.head) is Spotting
    video = next(videos.glob("*validation*"))
    found = detector.detect(video, mem_budget="4GB")
    assert found and all(0 <= point.start == point.end for point in found)
    predictions = json.loads((run / "predictions.json").read_text())["results"][video.stem]
    assert [point.start for point in found] == [point["segment"][0] for point in predictions]
    result = evaluator.evaluate_points(labels, run / "predictions.json", "tight")
    assert result.average == pytest.approx(metrics["average_map"], abs=1e-12)
    asked = ["--ground-truth", str(labels), "--predictions", str(run / "predictions.json"), "--tolerance", "1f,50f"]
    assert evaluator.main(asked) == 2
    assert "add --fps" in capsys.readouterr().err
    file = tmp_path / "numbers.json"
    assert evaluator.main([*asked, "--fps", "25", "--json", str(file)]) == 0
    assert json.loads(file.read_text())["tolerance"] == [0.04, 2.0]


def test_a_head_for_segments_is_refused_points_with_the_head_that_takes_them(
    point_set: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    labels, videos = point_set
    data = ["--preset", "small", "--annotations", str(labels), "--videos", str(videos), "--out", str(tmp_path / "run")]
    assert main([*data, "--device", "cpu", "--cache", str(tmp_path / "cache")]) == 2
    assert "of no length; labels that are points in time are learned by --head spotting" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()

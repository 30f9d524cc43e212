"""DETAD's analysis against one written out in loops, and cases worked by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lofi_fast.diagnosis import KINDS, diagnose, diagnosis_table
from lofi_fast.errors import InputError
from lofi_fast.metrics import matches, mean_average_precision, parse_tiou

TIOUS = parse_tiou("0.3,0.5,0.75")
BOUNDS = {
    "activitynet": {"length": (30, 60, 120, 180), "coverage": (0.2, 0.4, 0.6, 0.8), "instances": (1, 4, 8)},
    "thumos": {"length": (3, 6, 12, 18), "coverage": (0.02, 0.04, 0.06, 0.08), "instances": (1, 40, 80)},
}


def random_set(seed, videos=12, classes=3, length=20.0):
    """Segments with some of no length; predictions near them, of other labels, and elsewhere; scores all different."""
    random = np.random.default_rng(seed)
    truth, predictions, durations = {}, {}, {}
    scores = iter(random.permutation(100_000) / 100_000)
    for v in range(videos):
        durations[f"v{v}"] = 100.0 if v else 10.0  # some segments are longer than the first video
        segments, items = [], []
        for _ in range(random.integers(0, 7)):
            start = float(random.uniform(0, 80))
            end = start if random.random() < 0.1 else start + float(random.uniform(0.5, length))
            segments.append((start, end, f"c{random.integers(classes)}"))
            for _ in range(random.integers(0, 6)):
                moved = random.normal(0, 0.15 * (end - start), 2)
                label = segments[-1][2] if random.random() < 0.7 else f"c{random.integers(classes)}"
                first = start + moved[0]
                items.append((first, max(end + moved[1], first), label, float(next(scores))))
        for _ in range(random.integers(0, 20)):
            start = float(random.uniform(0, 80))
            items.append((start, start + 5.0, f"c{random.integers(classes)}", float(next(scores))))
        truth[f"v{v}"], predictions[f"v{v}"] = segments, items
    predictions["elsewhere"] = [(0.0, 5.0, "c0", float(next(scores)))]
    return truth, predictions, durations


# --- written out --------------------------------------------------------------------------------------------------


def overlap(a, b):
    shared = max(min(a[1], b[1]) - max(a[0], b[0]), 0.0)
    return shared / ((a[1] - a[0]) + (b[1] - b[0]) - shared)


class Literal:
    """The analysis in loops, one prediction after the other."""

    def __init__(self, truth, predictions, durations, tious):
        self.tious = tious
        self.segments = [
            (name, s, e, label)
            for name, segments in truth.items()
            for s, e, label in segments
            if e > s and (e - s) / durations[name] <= 1
        ]
        self.durations = durations
        self.classes = sorted({segment[3] for segment in self.segments})
        self.per_class = len(self.segments) / len(self.classes)
        rows = [(name, *item) for name, items in predictions.items() for item in items]
        self.ranked = {
            label: sorted((row for row in rows if row[3] == label), key=lambda row: -row[4]) for label in self.classes
        }
        self.finds = {}  # (row, threshold) -> index of the segment found
        for label in self.classes:
            for tiou in tious:
                taken = set()
                for row in self.ranked[label]:
                    near = [
                        (overlap(row[1:3], segment[1:3]), i)
                        for i, segment in enumerate(self.segments)
                        if (segment[0], segment[3]) == (row[0], label)
                    ]
                    free = [(found, i) for found, i in near if found >= tiou and i not in taken]
                    if free:
                        self.finds[row, tiou] = max(free)[1]
                        taken.add(max(free)[1])

    def number(self, label, inside=None):
        chosen = range(len(self.segments)) if inside is None else inside
        return sum(self.segments[i][3] == label for i in chosen)

    def precision(self, rows, tiou, number):
        """(normalised precision after each row, area under its envelope)."""
        points, right, wrong = [], 0, 0
        for row in rows:
            right, wrong = (right + 1, wrong) if (row, tiou) in self.finds else (right, wrong + 1)
            recall = right / number
            points.append((recall, recall * self.per_class / (recall * self.per_class + wrong)))
        area, before = 0.0, 0.0
        for k, (recall, _) in enumerate(points):
            area += (recall - before) * max(precision for _, precision in points[k:])
            before = recall
        return [precision for _, precision in points], area

    def mean(self, chosen, inside=None):
        """Mean over the classes with a segment of the mean over thresholds."""
        averages = []
        for label in self.classes:
            if number := self.number(label, inside):
                rows = [chosen(row) for row in self.ranked[label]]
                kept = {tiou: [row for row, at in zip(self.ranked[label], rows, strict=True) if at(tiou)]
                        for tiou in self.tious}  # fmt: skip
                averages.append(np.mean([self.precision(kept[tiou], tiou, number)[1] for tiou in self.tious]))
        return float(np.mean(averages))

    def inside(self, characteristic, above, most):
        values = []
        for name, start, end, label in self.segments:
            same = sum((segment[0], segment[3]) == (name, label) for segment in self.segments)
            values.append({"length": end - start, "coverage": (end - start) / self.durations[name],
                           "instances": same}[characteristic])  # fmt: skip
        return {i for i, value in enumerate(values) if above < value <= most}

    def group(self, inside):
        def chosen(row):
            other = any((row, tiou) in self.finds and self.finds[row, tiou] not in inside for tiou in self.tious)
            return lambda _: not other

        missed = []
        for tiou in self.tious:
            seen = set()
            for label in self.classes:
                precision, _ = self.precision(self.ranked[label], tiou, self.number(label))
                seen |= {self.finds[row, tiou] for row, at in zip(self.ranked[label], precision, strict=True)
                         if at > 0.05 and (row, tiou) in self.finds}  # fmt: skip
            missed.append(len(inside - seen) / len(inside))
        return self.mean(chosen, inside), float(np.mean(missed))

    def kind(self, row, tiou):
        if (row, tiou) in self.finds:
            return "true positive"
        near = [segment for segment in self.segments if segment[0] == row[0]]
        if not near:
            return "background"
        nearest = max(near, key=lambda segment: overlap(row[1:3], segment[1:3]))
        most, same = overlap(row[1:3], nearest[1:3]), nearest[3] == row[3]
        if most >= tiou:
            return "double detection" if same else "wrong label"
        if most >= 0.1:
            return "localisation" if same else "confusion"
        return "background"

    def ranks(self):
        return {row: k // self.number(label) for label in self.classes for k, row in enumerate(self.ranked[label])}


@pytest.mark.parametrize("buckets", ["activitynet", "thumos"])
@pytest.mark.parametrize("seed", range(3))
def test_equals_the_analysis_in_loops(seed, buckets):
    truth, predictions, durations = random_set(seed, length=70.0 if buckets == "activitynet" else 20.0)
    told = diagnose(truth, predictions, TIOUS, durations, buckets)
    literal = Literal(truth, predictions, durations, TIOUS.tolist())
    assert told.num_segments == len(literal.segments)
    assert told.num_left_out == sum(map(len, truth.values())) - len(literal.segments) > 0
    assert told.precision == pytest.approx(literal.mean(lambda row: lambda _: True), rel=1e-12)

    filled = 0
    for characteristic, bounds in BOUNDS[buckets].items():
        edges = (0, *bounds, 1 if characteristic == "coverage" else math.inf)
        for group, above, most in zip(told.characteristics[characteristic], edges[:-1], edges[1:], strict=True):
            inside = literal.inside(characteristic, above, most)
            assert (group.num_segments, group.above, group.most) == (len(inside), above, most)
            if inside:
                filled += 1
                assert (group.precision, group.missed) == pytest.approx(literal.group(inside), rel=1e-12)
            else:
                assert math.isnan(group.precision) and math.isnan(group.missed)
    assert filled > 5

    ranks = literal.ranks()
    for g in range(10):
        rows = [row for row, rank in ranks.items() if rank == g]
        for number, kind in enumerate(KINDS):
            share = np.mean([[literal.kind(row, t) == kind for row in rows] for t in TIOUS]) if rows else math.nan
            assert told.kinds[g, number] == pytest.approx(share, nan_ok=True, rel=1e-12)
    base = literal.mean(lambda row: lambda _: ranks[row] < 10)
    for kind, gain in told.gains.items():
        without = literal.mean(lambda row, kind=kind: lambda tiou: ranks[row] < 10 and literal.kind(row, tiou) != kind)
        assert gain == pytest.approx(without - base, rel=1e-9, abs=1e-12)
    assert max(told.gains.values()) > 0


def test_each_kind_by_hand():
    truth = {"v": [(0.0, 10.0, "a"), (20.0, 30.0, "b")], "empty": []}
    predictions = {
        "v": [
            (0.0, 10.0, "a", 0.9),  # true positive
            (0.0, 9.0, "a", 0.8),  # the same again
            (20.0, 30.0, "a", 0.7),  # where b is
            (5.0, 16.0, "a", 0.6),  # tIoU 5 / 16
            (25.0, 36.0, "a", 0.5),  # near b
            (50.0, 60.0, "a", 0.4),
        ],
        "empty": [(0.0, 1.0, "a", 0.3)],
        "elsewhere": [(0.0, 1.0, "a", 0.2)],
    }
    told = diagnose(truth, predictions, parse_tiou("0.5"), {})
    assert [KINDS[k] for k in told.kinds[:6].argmax(axis=1)] == list(KINDS)
    assert told.kinds[6:8, KINDS.index("background")].tolist() == [1, 1]
    assert np.isnan(told.kinds[8:]).all()
    assert "coverage" not in told.characteristics
    assert told.gains == dict.fromkeys(KINDS[1:], 0.0)  # they all come behind the one that is found


def test_normalisation_makes_one_precision_of_rare_and_frequent_classes():
    """9 segments of a, 1 of b: of each half is found, before as many false positives as there are on average."""
    truth = {"v": [(20.0 * i, 20.0 * i + 10, "a") for i in range(9)] + [(500.0, 510.0, "b")]}
    wrong = [(1000.0 + 20 * i, 1010.0 + 20 * i, "b", 0.9) for i in range(5)]
    told = diagnose(truth, {"v": [*wrong, (500.0, 510.0, "b", 0.5)]}, parse_tiou("0.5"), {})
    assert told.precision == pytest.approx((0 + 5 / (5 + 5)) / 2)
    usual = mean_average_precision(truth, {"v": [*wrong, (500.0, 510.0, "b", 0.5)]}, parse_tiou("0.5"))
    assert usual.average == pytest.approx((0 + 1 / 6) / 2)


@settings(max_examples=25)
@given(seed=st.integers(0, 10_000))
def test_what_always_holds(seed):
    truth, predictions, durations = random_set(seed, videos=5, classes=2)
    if not any(e > s for segments in truth.values() for s, e, _ in segments):
        return
    told = diagnose(truth, predictions, TIOUS, durations)
    assert 0 <= told.precision <= 1
    shares = told.kinds.sum(axis=1)
    assert np.allclose(shares[np.isfinite(shares)], 1)
    for groups in told.characteristics.values():
        assert sum(group.num_segments for group in groups) == told.num_segments
    assert all(gain >= -1e-12 for gain in told.gains.values())


@pytest.mark.parametrize("tied", [False, True], ids=["distinct", "tied"])
def test_matches_are_those_of_the_evaluator(tied):
    truth, predictions, _ = random_set(5, videos=30)
    if tied:
        predictions = {
            name: [(round(s), round(e), label, round(score, 1)) for s, e, label, score in items]
            for name, items in predictions.items()
        }
    found = matches(truth, predictions, TIOUS)
    result = mean_average_precision(truth, predictions, TIOUS)
    assert found.classes == result.classes and len(found.label) == result.num_predictions
    for c in range(len(found.classes)):
        number = (found.gt_label == c).sum()
        for k in range(len(TIOUS)):
            segment = found.segment[found.label == c, k]
            hit = segment >= 0
            assert len(np.unique(segment[hit])) == hit.sum()  # none twice
            assert (found.gt_label[segment[hit]] == c).all()
            assert (found.gt_video[segment[hit]] == found.video[found.label == c][hit]).all()
            precision = np.maximum.accumulate((np.cumsum(hit) / np.arange(1, len(hit) + 1))[::-1])[::-1]
            assert (precision[hit].sum() / number) == pytest.approx(result.average_precision[c, k], rel=1e-12)


def test_nothing_with_a_length():
    with pytest.raises(InputError, match="No segment of the ground truth has a length"):
        diagnose({"v": [(1.0, 1.0, "a")]}, {"v": [(0.0, 2.0, "a", 1.0)]}, TIOUS, {})
    with pytest.raises(InputError, match="check --predictions"):
        diagnose({"v": [(1.0, 2.0, "a")]}, {"w": [(0.0, 2.0, "a", 1.0)]}, TIOUS, {})


def test_no_prediction_of_a_class_or_at_all():
    truth = {"v": [(0.0, 10.0, "a"), (20.0, 30.0, "b")]}
    told = diagnose(truth, {"v": [(0.0, 10.0, "a", 0.9)]}, TIOUS, {"v": 40.0})
    assert told.precision == 0.5
    nothing = diagnose(truth, {"v": []}, TIOUS, {"v": 40.0})
    assert nothing.precision == 0 and np.isnan(nothing.kinds).all()
    assert nothing.characteristics["length"][0].missed == 1


def test_the_table_is_in_percent():
    truth, predictions, durations = random_set(1)
    lines = diagnosis_table(diagnose(truth, predictions, TIOUS, durations, "thumos")).splitlines()
    assert lines[0].startswith("normalised mAP (%)")
    assert sum(line.startswith("length") for line in lines) == sum(line.startswith("coverage") for line in lines) == 5
    assert all(any(line.startswith(kind) for line in lines) for kind in KINDS)

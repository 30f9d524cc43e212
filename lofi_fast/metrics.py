"""Mean average precision and average recall, bit-equal to the official ActivityNet evaluator.

    python -m lofi_fast.evaluate --ground-truth G.json --predictions P.json --tiou activitynet

The semantics are those of Evaluation/eval_detection.py and Evaluation/eval_proposal.py in the public repository
activitynet/ActivityNet, whose scripts need Python 2; the arithmetic here is done in the same order on the same float64
values, so results are equal to the last bit, only without a Python loop over predictions. What is kept on purpose:

- equal scores are ranked by ``argsort()[::-1]`` with NumPy's default (unstable) sort, class by class, and equal tIoUs
  likewise. Such ties are therefore the same as the official ones on the same machine and NumPy, not across machines;
- a zero-length ground truth met by the same zero-length prediction has tIoU 0/0 = NaN and matches, because the official
  test is "not (tIoU < threshold)";
- a prediction in a video that has no ground truth of its class, or that is not in the evaluated subset at all, is a
  false positive;
- thresholds are those of ``np.linspace``, so 0.9 is really 0.8999999999999999;
- classes are ordered by first appearance in the ground truth, which fixes the order of the mean.

Three things differ. Where the official script stops with a KeyError or returns NaN, predictions of labels that the
ground truth does not have are ignored and counted, and an evaluation in which nothing can match is an InputError. And a
prediction that ends before it starts hits nothing; officially its tIoU with a segment of the same length is 0/0.

Letters of array shapes: P predictions, G ground-truth segments, V videos, C classes, K tIoU thresholds.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import repeat
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from lofi_fast.errors import InputError
from lofi_fast.texts import decoded, once_each

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
MOST_MATCHED = (
    1 << 18
)  # predictions that are matched at once, where they are of several classes; each takes some 100 bytes
MOST_PAIRS = 1 << 20  # of a prediction and a segment whose tIoUs are in memory at once; for each some 50 bytes
GroundTruth = Mapping[str, Sequence[tuple[float, float, str]]]
Predictions = Mapping[str, Sequence[tuple[float, float, str, float]]]

_RANGES = {"activitynet": (0.5, 0.05, 0.95), "thumos": (0.3, 0.1, 0.7)}


@dataclass(frozen=True, eq=False)
class MapResult:
    """Average precision of every class at every threshold, and what was left out.

    tious (K,); classes: C labels by first appearance in the ground truth; average_precision (C, K) in [0, 1];
    map_by_tiou (K,) mean over the classes; average: mean of map_by_tiou. num_unknown_label counts predictions ignored
    because no ground truth has their label; num_unknown_video counts those (of known labels) in videos that the ground
    truth does not name, which are false positives.
    """

    tious: Floats
    classes: tuple[str, ...]
    average_precision: Floats
    map_by_tiou: Floats
    average: float
    num_videos: int
    num_segments: int
    num_predictions: int
    num_unknown_label: int
    num_unknown_video: int


@dataclass(frozen=True, eq=False)
class RecallResult:
    """Average recall against the average number of proposals per video (AR@AN).

    proposals_per_video (100,): 1..max_avg in 100 equal steps; recall (K, 100); average_recall (100,) mean over the K
    thresholds; auc: area under average_recall, in percent of the rectangle of height 1.
    """

    tious: Floats
    proposals_per_video: Floats
    recall: Floats
    average_recall: Floats
    auc: float


def parse_tiou(text: str) -> Floats:
    """Thresholds (K,) from "activitynet", "thumos", "start:step:stop" (stop included) or "0.5,0.75".

    The two names are the official grids 0.5:0.05:0.95 and 0.3:0.1:0.7. Raises InputError for anything else, and for
    values outside (0, 1].
    """
    expected = "--tiou takes activitynet, thumos, start:step:stop or a comma-separated list of values in (0, 1]"
    try:
        if text in _RANGES or ":" in text:
            start, step, stop = _RANGES[text] if text in _RANGES else (float(part) for part in text.split(":"))
            if not (math.isfinite(start) and math.isfinite(stop) and math.isfinite(step) and step > 0):
                raise ValueError
            # The tolerance absorbs what (0.95 - 0.5) / 0.05 loses; a stop between two steps is not itself a threshold.
            num_steps = math.floor((stop - start) / step + 1e-6)
            if num_steps < 0 or num_steps > 1000:
                raise ValueError
            last = start + num_steps * step
            tious = np.linspace(start, stop if abs(last - stop) < 1e-9 else last, num_steps + 1)
        else:
            tious = np.array([float(part) for part in text.split(",")])
    except ValueError:
        raise InputError(f"{expected}, not {text!r}.") from None
    if not bool(((tious > 0) & (tious <= 1)).all()):
        raise InputError(f"{expected}, not {text!r}.")
    return tious


def tiou(start: Floats, end: Floats, other_start: Floats, other_end: Floats) -> Floats:
    """tIoU of predictions with ground truth (the "other"), broadcast; NaN where both have zero length (0/0)."""
    intersection = (np.minimum(end, other_end) - np.maximum(start, other_start)).clip(0)
    union = (other_end - other_start) + (end - start) - intersection
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.asarray(intersection / union, dtype=np.float64)


def _check_overlap(ground_truth: GroundTruth, predictions: Predictions) -> None:
    if not any(len(segments) for segments in ground_truth.values()):
        raise InputError("The ground truth holds no segment in the evaluated subset; choose another with --subset.")
    if not any(name in ground_truth for name in predictions):
        given = next(iter(predictions), None)
        example = f"{given!r} against {next(iter(ground_truth))!r}" if given is not None else "there is no prediction"
        raise InputError(
            f"None of the predictions' videos is in the ground truth ({example}); check --predictions and --subset."
        )


def mean_average_precision(ground_truth: GroundTruth, predictions: Predictions, tious: Floats) -> MapResult:
    """Interpolated mean average precision of detections, as the official ActivityNet evaluator computes it.

    ground_truth: video -> [(start, end, label)], predictions: video -> [(start, end, label, score)], in seconds; tious
    (K,). The order of the mappings matters only for ties. Raises InputError when the ground truth has no segment or no
    video of the predictions is in it; a video with an empty list of predictions counts as predicted.
    Source: activitynet/ActivityNet, Evaluation/eval_detection.py.
    """
    _check_overlap(ground_truth, predictions)
    video_index = {name: i for i, name in enumerate(ground_truth)}
    gt_rows = [(video_index[name], *segment) for name, segments in ground_truth.items() for segment in segments]
    class_index: dict[str, int] = {}
    for _, _, _, label in gt_rows:
        class_index.setdefault(label, len(class_index))
    num_classes = len(class_index)
    gt_key = np.array([video * num_classes + class_index[label] for video, _, _, label in gt_rows], dtype=np.int64)
    gt_start = np.array([row[1] for row in gt_rows], dtype=np.float64)
    gt_end = np.array([row[2] for row in gt_rows], dtype=np.float64)

    given = _columns(predictions, video_index, class_index)
    gt_class = gt_key % num_classes
    num_gt = np.bincount(gt_class, minlength=num_classes)
    counts = np.bincount(given.label, minlength=num_classes)
    by_class = np.argsort(given.label, kind="stable")
    stops = np.cumsum(counts)
    # (K, C) and not (C, K): NumPy's summation order over classes follows the memory layout of the official array.
    precision = np.zeros((len(tious), num_classes))
    for first, last in _runs(counts, MOST_MATCHED):
        # A prediction can only match a segment of its class, so classes may be taken some at a time.
        members = [by_class[stops[c] - counts[c] : stops[c]] for c in range(first, last)]
        ranked = np.concatenate([some[given.score[some].argsort()[::-1]] for some in members])
        # Absent videos get a negative key, which no ground truth has.
        video = given.video[ranked].astype(np.int64)
        key = np.where(video < 0, -1, video * num_classes + given.label[ranked])
        theirs = (first <= gt_class) & (gt_class < last)
        truth = (gt_key[theirs], gt_start[theirs], gt_end[theirs])
        hits = _match(key, given.start[ranked], given.end[ranked], *truth, tious)
        ends = np.cumsum(counts[first:last])
        for c, part in zip(range(first, last), np.split(hits, ends[:-1]), strict=True):
            precision[:, c] = _interpolated_precision(part.T, float(num_gt[c]))
    map_by_tiou = precision.mean(axis=1)
    return MapResult(
        tious=np.asarray(tious, dtype=np.float64),
        classes=tuple(class_index),
        average_precision=precision.T,
        map_by_tiou=map_by_tiou,
        average=float(map_by_tiou.mean()),
        num_videos=len(ground_truth),
        num_segments=len(gt_rows),
        num_predictions=given.num_given,
        num_unknown_label=given.num_given - len(given.label),
        num_unknown_video=int((given.video < 0).sum()),
    )


@dataclass(frozen=True, eq=False)
class Matches:
    """Which segment every prediction finds, for measures that average precision alone does not give.

    Predictions (P,) stand class by class, and in each class the best score first, as average precision ranks them;
    those of labels that the ground truth does not have are left out. video: an index into `videos`, -1 where the ground
    truth does not name it; label: an index into `classes`; start and end in seconds; segment (P, K): at each threshold
    the ground-truth segment found, an index into the arrays gt_... (G,), or -1.
    """

    tious: Floats
    videos: tuple[str, ...]
    classes: tuple[str, ...]
    video: Ints
    label: Ints
    start: Floats
    end: Floats
    segment: Ints
    gt_video: Ints
    gt_label: Ints
    gt_start: Floats
    gt_end: Floats


def matches(ground_truth: GroundTruth, predictions: Predictions, tious: Floats) -> Matches:
    """The matching under `mean_average_precision`, prediction by prediction; takes and raises what that does."""
    _check_overlap(ground_truth, predictions)
    video_index = {name: i for i, name in enumerate(ground_truth)}
    gt_rows = [(video_index[name], *segment) for name, segments in ground_truth.items() for segment in segments]
    class_index: dict[str, int] = {}
    gt_label = np.array([class_index.setdefault(row[3], len(class_index)) for row in gt_rows], dtype=np.int64)
    gt_video, gt_start, gt_end = (np.array([row[i] for row in gt_rows]) for i in range(3))
    given, num_classes = _columns(predictions, video_index, class_index), len(class_index)
    parts = np.split(np.argsort(given.label, kind="stable"), np.cumsum(np.bincount(given.label, minlength=num_classes)))
    ranked = np.concatenate([part[given.score[part].argsort()[::-1]] for part in parts])
    video, label = given.video[ranked].astype(np.int64), given.label[ranked].astype(np.int64)
    start, end = given.start[ranked], given.end[ranked]
    segment = np.full((len(ranked), len(tious)), -1, dtype=np.int64)
    gt_key, gt_start, gt_end = gt_video * num_classes + gt_label, gt_start.astype(np.float64), gt_end.astype(np.float64)
    _match(np.where(video < 0, -1, video * num_classes + label), start, end, gt_key, gt_start, gt_end, tious, segment)
    return Matches(
        np.asarray(tious, dtype=np.float64), tuple(video_index), tuple(class_index), video, label, start, end, segment,
        gt_video, gt_label, gt_start, gt_end,
    )  # fmt: skip


class _Columns(NamedTuple):
    """Predictions whose label is known, as arrays (P,) in their order; `video` is -1 where it is unknown."""

    video: npt.NDArray[np.int32]
    label: npt.NDArray[np.int32]
    start: Floats
    end: Floats
    score: Floats
    num_given: int  # those of unknown labels too


def _columns(predictions: Predictions, video_index: Mapping[str, int], class_index: Mapping[str, int]) -> _Columns:
    """Video by video, so that no list of all predictions is made beside the arrays."""
    total = sum(map(len, predictions.values()))
    video, label = np.empty(total, dtype=np.int32), np.empty(total, dtype=np.int32)
    start, end, score = np.empty(total), np.empty(total), np.empty(total)
    at = 0
    for name, items in predictions.items():
        if not len(items):
            continue
        rows = slice(at, at + len(items))
        start[rows], end[rows], labels, score[rows] = zip(*items, strict=True)
        label[rows] = list(map(class_index.get, labels, repeat(-1)))
        video[rows] = video_index.get(name, -1)
        at = rows.stop
    if (label < 0).any():
        known = label >= 0
        video, label, start, end, score = video[known], label[known], start[known], end[known], score[known]
    return _Columns(video, label, start, end, score, total)


def _runs(counts: Ints, most: int) -> Iterator[tuple[int, int]]:
    """[first, last) of runs of neighbours whose counts add up to `most` at most, or of one that is larger."""
    first = total = 0
    for index, count in enumerate(counts.tolist()):
        if index > first and total + count > most:
            yield first, index
            first, total = index, 0
        total += count
    yield first, len(counts)


def _match(
    key: Ints,
    start: Floats,
    end: Floats,
    gt_key: Ints,
    gt_start: Floats,
    gt_end: Floats,
    tious: Floats,
    segment: Ints | None = None,
) -> npt.NDArray[np.bool_]:
    """Greedy matching -> (P, K) true positives. Predictions come ranked by score within a key (= video and class).
    Where `segment` (P, K) is given, the index of the matched segment is written there.

    Predictions of one key depend on each other through the segments already taken, those of different keys do not: so
    round r settles the r-th prediction of every key at once. Keys are taken together by their number of ground-truth
    segments, because tied tIoUs are ranked as the official sort ranks them only on arrays of the same length, and in
    parts, so that memory does not grow with the product of predictions and segments.
    """
    matched = np.zeros((len(key), len(tious)), dtype=np.bool_)
    gt_order = np.argsort(gt_key, kind="stable")
    keys, first_gt, sizes = np.unique(gt_key[gt_order], return_index=True, return_counts=True)
    group = np.searchsorted(keys, key).clip(max=len(keys) - 1)
    known = np.flatnonzero((keys[group] == key) & ~(end < start))
    for size in np.unique(sizes[group[known]]):
        rows = known[sizes[group[known]] == size]
        most = max(MOST_PAIRS // int(size), 1)

        def overlaps(rows: Ints, size: int = size) -> Floats:
            members = gt_order[first_gt[group[rows], None] + np.arange(size)]
            return tiou(start[rows, None], end[rows, None], gt_start[members], gt_end[members])

        # A prediction below every threshold takes nothing: it can leave without changing the others.
        rows = np.concatenate([part[~(overlaps(part) < tious.min()).all(axis=1)] for part in _parts(rows, most)])
        if not len(rows):
            continue
        _, local = np.unique(group[rows], return_inverse=True)
        by_group = np.argsort(local, kind="stable")
        counts = np.bincount(local)
        turn = np.empty(len(rows), dtype=np.int64)
        turn[by_group] = np.arange(len(rows)) - np.repeat(np.cumsum(counts) - counts, counts)
        by_turn = np.argsort(turn, kind="stable")
        taken = np.zeros((len(counts), int(size), len(tious)), dtype=np.bool_)
        for part in _parts(by_turn, most):
            overlap = overlaps(rows[part])
            best_first = overlap.argsort(axis=1)[:, ::-1]
            # Best first, and 0/0 before all: columns in which no row reaches a threshold are not needed.
            reaching = int((~(overlap < tious.min())).sum(axis=1).max(initial=0))
            best_first = best_first[:, :reaching]
            overlap = np.take_along_axis(overlap, best_first, axis=1)
            for now in np.split(np.arange(len(part)), np.flatnonzero(np.diff(turn[part])) + 1):
                owner, order = local[part[now]], best_first[now]
                free = ~(overlap[now, :, None] < tious) & ~taken[owner[:, None], order]
                hit = free.any(axis=1)
                matched[rows[part[now]]] = hit
                i, k = np.nonzero(hit)
                place = order[i, free.argmax(axis=1)[i, k]]
                taken[owner[i], place, k] = True
                if segment is not None:
                    segment[rows[part[now[i]]], k] = gt_order[first_gt[group[rows[part[now[i]]]]] + place]
    return matched


def _parts(rows: Ints, most: int) -> list[Ints]:
    """`rows` in their order, in parts of `most` at most; one empty part where there is none."""
    return np.split(rows, range(most, len(rows), most))


def _interpolated_precision(true_positive: npt.NDArray[np.bool_], num_gt: float) -> Floats:
    """All-point interpolated average precision (VOC 2010), (K, P) ranked by score -> (K,).

    Recall rises at true positives alone, and between them precision falls, so that nothing else is looked at.
    """
    average = np.zeros(len(true_positive))
    which, places = np.nonzero(true_positive)
    for k, rank in enumerate(np.split(places, np.cumsum(np.bincount(which, minlength=len(average)))[:-1])):
        hits = np.arange(1, len(rank) + 1)
        recall = hits / num_gt
        precision = np.maximum.accumulate((hits / (rank + 1))[::-1])[::-1]
        area = np.diff(recall, prepend=0.0) * precision
        if not len(rank) or recall[-1] != 1:
            # The last step, up to a recall of 1, adds nothing; but NumPy groups a sum by the number of its terms.
            area = np.append(area, 0.0)
        average[k] = area.sum()
    return average


def average_recall(
    ground_truth: GroundTruth, proposals: Predictions, tious: Floats, max_avg: float = 100
) -> RecallResult:
    """Average recall against the average number of proposals per video, as the official proposal evaluator does.

    proposals: video -> [(start, end, label, score)] in seconds, labels ignored; tious (K,), officially 0.5:0.05:0.95.
    Every video keeps its best proposals by the one ratio that makes the average max_avg (all of them when there are
    fewer); the curve has 100 points up to max_avg, and auc is its trapezoid. Proposals in videos without ground truth
    enter the ratio alone. NaN overlaps match nothing here (the official test is "tIoU >= threshold"). Raises InputError
    when nothing can match.
    Source: activitynet/ActivityNet, Evaluation/eval_proposal.py.
    """
    _check_overlap(ground_truth, proposals)
    names = [name for name, segments in ground_truth.items() if len(segments)]
    total_given = sum(len(items) for items in proposals.values())
    if total_given == 0:
        raise InputError("The predictions hold no proposal at all; there is no recall to compute.")
    ratio = max_avg * float(len(names)) / total_given

    first_hits: list[Ints] = []  # per video (G, K): rank of the first proposal that reaches the threshold
    num_ranked = np.zeros(len(names), dtype=np.int64)
    total = 0
    for i, name in enumerate(names):
        segments = ground_truth[name]
        items = proposals.get(name, ())
        never = np.full((len(segments), len(tious)), np.iinfo(np.int64).max)
        first_hits.append(never)
        if not items:
            continue
        best = np.array([item[3] for item in items], dtype=np.float64).argsort()[::-1]
        kept = min(int(len(items) * ratio), len(items))
        total += kept
        num_ranked[i] = kept
        if kept == 0:
            continue
        bounds = np.array([item[:2] for item in items], dtype=np.float64)[best[:kept]]
        gt = np.array([segment[:2] for segment in segments], dtype=np.float64)
        for part in _parts(np.arange(len(gt)), max(MOST_PAIRS // kept, 1)):
            overlap = tiou(bounds[:, 0], bounds[:, 1], gt[part, 0, None], gt[part, 1, None])
            reached = overlap[:, :, None] >= tious
            first = reached.argmax(axis=1)
            never[part] = np.where(reached.any(axis=1), first, never[part])
    if total == 0:
        raise InputError(f"No proposal is left at an average of {max_avg:g} per video; raise the average number.")

    fraction = np.arange(1, 101) / 100.0 * (max_avg * float(len(names)) / total)
    allowed = np.minimum((num_ranked[:, None] * fraction).astype(np.int64), num_ranked[:, None])
    allowed = np.repeat(allowed, [len(hits) for hits in first_hits], axis=0)
    first_hit = np.concatenate(first_hits)
    recall = np.empty((len(tious), len(fraction)))
    for k in range(len(tious)):
        recall[k] = (first_hit[:, k, None] < allowed).sum(axis=0) / float(len(first_hit))
    curve = recall.mean(axis=0)
    per_video = fraction * (float(total) / len(names))
    area = ((per_video[1:] - per_video[:-1]) * (curve[1:] + curve[:-1]) / 2.0).sum()
    return RecallResult(
        tious=np.asarray(tious, dtype=np.float64),
        proposals_per_video=per_video,
        recall=recall,
        average_recall=curve,
        auc=float(100.0 * float(area) / per_video[-1]),
    )


def read_object(path: Path, flag: str, key: str) -> dict[str, Any]:
    """The mapping under ``key`` of a JSON file, with or without a byte order mark. Raises InputError for a file without
    one, and for a key that stands twice in one object.
    """
    try:
        content = json.loads(decoded(path), object_pairs_hook=once_each(path, f"; mend {flag}."))
    except FileNotFoundError:
        raise InputError(f"{path} does not exist; give {flag} an existing JSON file.") from None
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror}); give {flag} a readable JSON file.") from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is not valid JSON ({error}); give {flag} an ActivityNet JSON file.") from None
    if not isinstance(content, dict) or not isinstance(content.get(key), dict):
        raise InputError(f'{path} has no "{key}" object; give {flag} an ActivityNet JSON file.')
    return dict(content[key])


def number_of(value: object, where: str) -> float:
    """A finite float from a JSON number, or from a string that holds one (THUMOS files)."""
    number = math.nan
    if isinstance(value, int | float | str) and not isinstance(value, bool) and "_" not in str(value):
        try:
            number = float(value)
        except (ValueError, OverflowError):
            number = math.nan
    if not math.isfinite(number):
        raise InputError(f"{where} is {value!r}, which is not a finite number.")
    return number


def segments_of(
    items: object, where: str, seconds: Callable[[object, str], float] = number_of
) -> list[tuple[float, float, str, dict[str, Any]]]:
    """(start, end, label, the whole entry) of a list of {"segment": [start, end], "label": ...}.

    White space around a label is no part of it. `seconds` reads a start or an end, as `number_of` does. Raises
    InputError, which begins with `where`, for any other list.
    """
    if not isinstance(items, list):
        raise InputError(f"{where}: expected a list of segments.")
    entries = []
    for i, item in enumerate(items):
        place = f"{where}, segment {i}"
        if not isinstance(item, dict):
            raise InputError(f'{place}: expected an object with "segment" and "label".')
        segment, label = item.get("segment"), item.get("label")
        if not isinstance(segment, list) or len(segment) != 2:
            raise InputError(f'{place}: "segment" must be [start, end] in seconds.')
        if not isinstance(label, str):
            raise InputError(f'{place}: "label" is missing or is not a text.')
        if any("\ud800" <= character <= "\udfff" for character in label):
            raise InputError(f"{place}: the label {label!r} holds half a character.")
        start, end = (seconds(value, f"{place}: {name}") for value, name in zip(segment, ("start", "end"), strict=True))
        entries.append((start, end, label.strip(), item))
    return entries


def load_predictions(path: Path) -> dict[str, list[tuple[float, float, str, float]]]:
    """Detections of an ActivityNet JSON file: video -> [(start, end, label, score)], seconds.

    The file's form is {"results": {video: [{"segment": [start, end], "label": ..., "score": ...}]}}. Raises
    InputError for unreadable files, missing keys, a video that stands there twice, values that are no finite numbers,
    and predictions that end before they start.
    """
    if path.suffix.lower() in (".csv", ".tsv") and path.is_file():
        raise InputError(
            f"{path} is a table; give --predictions what `lofi-fast convert {path} FILE.json` makes of it."
        )
    predictions: dict[str, list[tuple[float, float, str, float]]] = {}
    for name, items in read_object(path, "--predictions", "results").items():
        where = f"{path}, video {name}"
        rows = []
        for i, (start, end, label, item) in enumerate(segments_of(items, where)):
            if "score" not in item:
                raise InputError(f'{where}, segment {i}: "score" is missing.')
            if start > end:
                raise InputError(f"{where}, segment {i}: starts at {start} s, after its end at {end} s.")
            rows.append((start, end, label, number_of(item["score"], f"{where}, segment {i}: score")))
        predictions[name] = rows
    return predictions


def metrics_table(result: MapResult, per_class: bool = False) -> str:
    """A plain-text table in percent: mAP by tIoU and their average, with a row for each class when asked."""
    rows = [("mAP (%)", [*result.map_by_tiou, result.average])]
    if per_class:
        by_name = sorted(zip(result.classes, result.average_precision, strict=True), key=lambda row: row[0])
        rows += [(name, [*values, values.mean()]) for name, values in by_name]
    width = max(len(name) for name, _ in rows)
    header = "".join(f"{f'{tiou:.4g}':>8}" for tiou in result.tious)
    lines = [f"{'tIoU':<{width}}{header}{'average':>10}"]
    for name, values in rows:
        cells = "".join(f"{100 * value:>8.2f}" for value in values[:-1])
        lines.append(f"{name:<{width}}{cells}{100 * values[-1]:>10.2f}")
    return "\n".join(lines)

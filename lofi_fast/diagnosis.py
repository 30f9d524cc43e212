"""Where a detector goes wrong: which segments it finds, by their length, coverage and number, and what its false
positives are.

The definitions are those of DETAD (Alwassel, Caba Heilbron, Escorcia and Ghanem, Diagnosing Error in Temporal Action
Detectors, ECCV 2018; HumamAlwassel/DETAD):

- *Normalised* precision counts every class as if it had as many segments as classes have on average (N): with the
  recall R and F false positives it is R * N / (R * N + F). Average precision of it does not depend on how many segments
  there are, so that groups of segments can be compared.
- The score of a group of segments leaves out predictions that find a segment of another group, at any threshold.
- A prediction that finds nothing is told by the segment, of any class, that it overlaps most.
- Segments without length count nowhere, and neither do those longer than their video.

DETAD's groups by context and by the agreement of annotators need labels of their own, which data sets do not bring.

Letters of array shapes: P predictions, G ground-truth segments, C classes, K tIoU thresholds.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import numpy.typing as npt

from lofi_fast.errors import InputError
from lofi_fast.metrics import Floats, GroundTruth, Ints, Matches, Predictions, matches, tiou

Kind = Literal["true positive", "double detection", "wrong label", "localisation", "confusion", "background"]
KINDS: tuple[Kind, ...] = get_args(Kind)
TOP = 10  # the false positives that are told are among the best TOP * (number of segments) predictions of a class
LEAST_TIOU = 0.1  # what overlaps less is background
LEAST_PRECISION = 0.05  # normalised; what is found at less counts as missed

BucketNames = Literal["activitynet", "thumos"]
_SIZES = ("XS", "S", "M", "L", "XL")
# Upper bounds of all groups but the last; each group holds its own bound.
LENGTHS: dict[BucketNames, tuple[float, ...]] = {"activitynet": (30, 60, 120, 180), "thumos": (3, 6, 12, 18)}
COVERAGES: dict[BucketNames, tuple[float, ...]] = {
    "activitynet": (0.2, 0.4, 0.6, 0.8),
    "thumos": (0.02, 0.04, 0.06, 0.08),
}
INSTANCES: dict[BucketNames, tuple[float, ...]] = {"activitynet": (1, 4, 8), "thumos": (1, 40, 80)}


@dataclass(frozen=True)
class Bucket:
    """The segments whose length (seconds), coverage (share of the video) or number of instances (of one class in one
    video) is more than `above` and at most `most`.

    precision: average precision, normalised, mean over classes and thresholds; missed: share of the segments that no
    detection finds at a normalised precision of 0.05, mean over thresholds. Both are NaN where there is no segment.
    """

    name: str
    above: float
    most: float
    num_segments: int
    precision: float
    missed: float


@dataclass(frozen=True, eq=False)
class Diagnosis:
    """What `diagnose` tells.

    precision: average precision, normalised, mean over classes and thresholds. characteristics: length, instances, and
    coverage where durations are known, with their groups. kinds (TOP, 6): share of every kind of KINDS among the
    predictions of each rank: row g those from g * N to (g + 1) * N, of classes with N segments, mean over thresholds;
    NaN where there is none. gains: what `precision` among the best TOP * N would gain if one kind of false positive
    were gone. num_left_out: segments without length or longer than their video.
    """

    tious: Floats
    precision: float
    characteristics: dict[str, tuple[Bucket, ...]]
    kinds: Floats
    gains: dict[Kind, float]
    num_segments: int
    num_left_out: int


def diagnose(
    ground_truth: GroundTruth,
    predictions: Predictions,
    tious: Floats,
    durations: Mapping[str, float],
    buckets: BucketNames = "activitynet",
) -> Diagnosis:
    """DETAD's analysis of detections.

    ground_truth: video -> [(start, end, label)], predictions: video -> [(start, end, label, score)], in seconds; tious
    (K,); durations: video -> seconds, of those videos where they are known. `buckets` chooses the bounds of the groups.
    Raises InputError where no segment is left, and as `metrics.mean_average_precision` does.
    """
    kept = {
        name: [s for s in segments if s[0] < s[1] and s[1] - s[0] <= durations.get(name, np.inf)]
        for name, segments in ground_truth.items()
    }
    num_segments = sum(map(len, kept.values()))
    if not num_segments:
        raise InputError("No segment of the ground truth has a length, so there is nothing to diagnose.")
    found = matches(kept, predictions, tious)
    per_class = num_segments / len(found.classes)
    hit = found.segment >= 0
    top, rank = _best(found)
    kinds = _kinds(found, top)
    precision = np.mean([_precisions(found, hit[:, k], per_class) for k in range(len(tious))])
    base = np.mean([_precisions(found, hit[:, k], per_class, top) for k in range(len(tious))])
    gains = {}
    for number, kind in enumerate(KINDS[1:], 1):
        without = [_precisions(found, hit[:, k], per_class, top & (kinds[:, k] != number)) for k in range(len(tious))]
        gains[kind] = float(np.mean(without) - base)
    return Diagnosis(
        tious=found.tious,
        precision=float(precision),
        characteristics=_characteristics(found, hit, per_class, durations, buckets),
        kinds=_profile(kinds, rank),
        gains=gains,
        num_segments=num_segments,
        num_left_out=sum(map(len, ground_truth.values())) - num_segments,
    )


def _precisions(
    found: Matches,
    hit: npt.NDArray[np.bool_],
    per_class: float,
    counted: npt.NDArray[np.bool_] | None = None,
    segments: Ints | None = None,
) -> Floats:
    """Normalised average precision of the classes at one threshold, (C,), of the predictions `counted` (P,); segments
    (C,): how many each class has. NaN for a class without a segment.
    """
    num_classes = len(found.classes)
    number = np.bincount(found.gt_label, minlength=num_classes) if segments is None else segments
    rows = np.arange(len(hit)) if counted is None else np.flatnonzero(counted)
    average = np.where(number > 0, 0.0, np.nan)
    for label, part in zip(*_by_class(found.label[rows]), strict=True):
        if number[label]:
            recall, precision = _curve(hit[rows[part]], number[label], per_class)
            best = np.maximum.accumulate(precision[::-1])[::-1]
            average[label] = (np.diff(recall, prepend=0.0) * best).sum()
    return average


def _by_class(label: Ints) -> tuple[Ints, list[Ints]]:
    """The classes among ascending labels, and where the predictions of each stand."""
    classes, first = np.unique(label, return_index=True)
    return classes, np.split(np.arange(len(label)), first[1:]) if len(first) else []


def _curve(hit: npt.NDArray[np.bool_], number: int, per_class: float) -> tuple[Floats, Floats]:
    """Recall and normalised precision after each prediction of one class, of which there are `number` segments."""
    recall = np.cumsum(hit) / number
    return recall, recall * per_class / (recall * per_class + np.cumsum(~hit))


def _best(found: Matches) -> tuple[npt.NDArray[np.bool_], Ints]:
    """Whether a prediction is among the best TOP * N of its class, which has N segments, and which N it is among."""
    number = np.bincount(found.gt_label, minlength=len(found.classes))
    rank = np.empty(len(found.label), dtype=np.int64)
    for label, part in zip(*_by_class(found.label), strict=True):
        rank[part] = np.arange(len(part)) // number[label]
    return rank < TOP, rank


def _kinds(found: Matches, counted: npt.NDArray[np.bool_]) -> Ints:
    """(P, K): the number in KINDS of each prediction that is `counted`; -1 of the others."""
    kinds = np.where(counted, KINDS.index("background"), -1)[:, None].repeat(len(found.tious), axis=1)
    kinds[counted[:, None] & (found.segment >= 0)] = KINDS.index("true positive")
    rows = np.flatnonzero(counted & (found.video >= 0) & (found.start <= found.end))
    rows = rows[np.argsort(found.video[rows], kind="stable")]
    order = np.argsort(found.gt_video, kind="stable")
    bounds = np.searchsorted(found.gt_video[order], np.arange(len(found.videos) + 1))
    videos, starts = np.unique(found.video[rows], return_index=True)
    for video, part in zip(videos, np.split(rows, starts[1:]) if len(rows) else [], strict=True):
        segments = order[bounds[video] : bounds[video + 1]]
        if not len(segments):
            continue
        for some in np.array_split(part, 1 + len(part) * len(segments) // (1 << 20)):
            overlap = tiou(
                found.start[some, None], found.end[some, None], found.gt_start[segments], found.gt_end[segments]
            )
            nearest = overlap.argmax(axis=1)
            most = overlap[np.arange(len(some)), nearest][:, None]
            same = (found.gt_label[segments[nearest]] == found.label[some])[:, None]
            reached, near = most >= found.tious, most >= LEAST_TIOU
            told = np.select(
                [reached & same, reached, near & same, near],
                [KINDS.index(kind) for kind in ("double detection", "wrong label", "localisation", "confusion")],
                KINDS.index("background"),
            )
            missed = found.segment[some] < 0
            kinds[some] = np.where(missed, told, kinds[some])
    return kinds


def _profile(kinds: Ints, rank: Ints) -> Floats:
    """Shares of the kinds among the predictions of each rank, (TOP, 6), mean over thresholds."""
    shares = np.full((TOP, len(KINDS)), np.nan)
    for g in range(TOP):
        there = kinds[rank == g]
        if len(there):
            shares[g] = [(there == number).mean() for number in range(len(KINDS))]
    return shares


def _characteristics(
    found: Matches,
    hit: npt.NDArray[np.bool_],
    per_class: float,
    durations: Mapping[str, float],
    names: BucketNames,
) -> dict[str, tuple[Bucket, ...]]:
    length = found.gt_end - found.gt_start
    seconds = np.array([durations.get(name, np.nan) for name in found.videos])[found.gt_video]
    same = found.gt_video * len(found.classes) + found.gt_label
    _, which, counts = np.unique(same, return_inverse=True, return_counts=True)
    values = {"length": (length, LENGTHS, np.inf), "coverage": (length / seconds, COVERAGES, 1.0)}
    values["instances"] = (counts[which].astype(np.float64), INSTANCES, np.inf)
    seen = _seen(found, hit, per_class)
    told = {}
    for characteristic, (value, bounds, most) in values.items():
        if not np.isfinite(value).any():
            continue
        edges = (0.0, *bounds[names], most)
        # NaN, of videos whose duration is unknown, is in no group
        group = np.where(np.isnan(value), -1, np.searchsorted(edges[1:-1], value, side="left"))
        told[characteristic] = tuple(
            _bucket(found, hit, per_class, seen, _SIZES[g], edges[g], edges[g + 1], group == g)
            for g in range(len(edges) - 1)
        )
    return told


def _bucket(
    found: Matches,
    hit: npt.NDArray[np.bool_],
    per_class: float,
    seen: npt.NDArray[np.bool_],
    name: str,
    above: float,
    most: float,
    inside: npt.NDArray[np.bool_],
) -> Bucket:
    """`inside` (G,): which segments are in the group; `seen` (G, K): which are found."""
    if not inside.any():
        return Bucket(name, above, most, 0, np.nan, np.nan)
    counted = np.logical_not((hit & ~inside[found.segment]).any(axis=1))
    number = np.bincount(found.gt_label[inside], minlength=len(found.classes))
    precision = [_precisions(found, hit[:, k], per_class, counted, number) for k in range(len(found.tious))]
    missed = 1 - float(seen[inside].mean())
    return Bucket(name, above, most, int(inside.sum()), float(np.nanmean(np.mean(precision, axis=0))), missed)


def _seen(found: Matches, hit: npt.NDArray[np.bool_], per_class: float) -> npt.NDArray[np.bool_]:
    """(G, K): whether a segment is found, where the normalised precision is above LEAST_PRECISION."""
    seen = np.zeros((len(found.gt_label), len(found.tious)), dtype=np.bool_)
    number = np.bincount(found.gt_label, minlength=len(found.classes))
    for label, part in zip(*_by_class(found.label), strict=True):
        for k in range(len(found.tious)):
            precise = _curve(hit[part, k], number[label], per_class)[1] > LEAST_PRECISION
            seen[found.segment[part[precise & hit[part, k]], k], k] = True
    return seen


def diagnosis_table(told: Diagnosis) -> str:
    """The diagnosis as plain text, in percent."""
    left_out = f" ({told.num_left_out} left out: no length, or longer than the video)" if told.num_left_out else ""
    lines = [f"normalised mAP (%) {100 * told.precision:.2f}, by characteristic of the segment{left_out}:"]
    lines.append(f"{'':<12}{'group':<6}{'range':<16}{'segments':>9}{'mAP_N':>8}{'missed':>8}")
    units = {"length": " s", "coverage": "", "instances": ""}
    for characteristic, groups in told.characteristics.items():
        for bucket in groups:
            unit = units[characteristic]
            most = "" if np.isinf(bucket.most) else f"{bucket.most:g}{unit}"
            span = f"above {bucket.above:g}{unit}" if not most else f"to {most}"
            lines.append(
                f"{characteristic:<12}{bucket.name:<6}{span:<16}{bucket.num_segments:>9}"
                f"{_percent(bucket.precision):>8}{_percent(bucket.missed):>8}"
            )
    lines += ["", "what predictions are (%), N being the number of segments of a class; gain: of mAP_N without them"]
    lines.append(f"{'':<18}" + "".join(f"{f'{g}N':>7}" for g in range(1, TOP + 1)) + f"{'gain':>8}")
    for number, kind in enumerate(KINDS):
        cells = "".join(f"{_percent(share, 1):>7}" for share in told.kinds[:, number])
        gain = f"{100 * told.gains[kind]:>8.2f}" if kind in told.gains else ""
        lines.append(f"{kind:<18}{cells}{gain}")
    return "\n".join(lines)


def _percent(value: float, digits: int = 2) -> str:
    return "-" if np.isnan(value) else f"{100 * value:.{digits}f}"

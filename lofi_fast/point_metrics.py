"""Mean average precision of points in time, by how far a predicted one may be from a true one.

    lofi-fast evaluate --ground-truth G.json --predictions P.json --tolerance 0.5,1,2

There are two definitions, and `Tolerances` says which of both is meant:

- That of E2E-Spot (Hong et al., ECCV 2022; jhong93/spot, util/score.py). Predictions of a class, of all videos, by
  score: each takes the nearest true point of its video that no better one has taken, and hits where that is within the
  tolerance. The average precision interpolates at every hit; the average over tolerances is their mean.
- That of SoccerNet (Giancola et al.; SoccerNet/Evaluation/ActionSpotting.py), whose average-mAP is "tight" over 1 to 5
  seconds and "loose" over 5 to 60. Times are rounded down to half seconds. Each true point in turn takes the best
  prediction that is left within half the tolerance. Precision and recall are read at 200 scores from 0 to 1 and
  interpolated at 11 recalls; the average over tolerances is the area under their curve.

A segment counts by its start. The classes are those of the ground truth, in alphabetical order; SoccerNet's code counts
classes that its ground truth lacks too, as 0. A prediction of a class that the ground truth lacks is ignored and
counted; one in a video that the ground truth does not name is a false positive.

Letters of array shapes: P predictions of a class, C classes, K tolerances.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from lofi_fast.errors import InputError
from lofi_fast.metrics import GroundTruth, Predictions

Floats = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]

ROUNDING = 1e-6  # seconds: a frame number divided by a rate and one that was multiplied back are the same time
SOCCERNET = {"tight": np.arange(1.0, 6.0), "loose": np.arange(5.0, 61.0, 5.0)}  # seconds
RATE = 2  # frames a second to which SoccerNet rounds times
SCORES, RECALLS = np.linspace(0, 1, 200), np.arange(11) / 10  # at which SoccerNet reads its curve
MOST_TOLERANCES = 1000


@dataclass(frozen=True, eq=False)
class Tolerances:
    """seconds (K,), ascending. soccernet: whether the definition is SoccerNet's, and not E2E-Spot's."""

    seconds: Floats
    soccernet: bool = False

    def average(self, values: Floats) -> Floats:
        """Over the tolerances, which are the last axis of `values`."""
        if self.soccernet and len(self.seconds) > 1:
            values = (values[..., 1:] + values[..., :-1]) / 2
        return np.asarray(values.mean(axis=-1))


@dataclass(frozen=True, eq=False)
class PointResult:
    """Average precision of every class at every tolerance, and what was left out.

    classes: C labels; average_precision (C, K) in [0, 1]; map_by_tolerance (K,) mean over the classes; average: over
    the tolerances. The counts are as in `metrics.MapResult`.
    """

    tolerances: Tolerances
    classes: tuple[str, ...]
    average_precision: Floats
    map_by_tolerance: Floats
    average: float
    num_videos: int
    num_segments: int
    num_predictions: int
    num_unknown_label: int
    num_unknown_video: int


def parse_tolerance(text: str, fps: float | None = None) -> Tolerances:
    """Tolerances from "tight" or "loose" (SoccerNet's), "0.5,1,2" seconds or start:step:stop (stop included), or in
    frames, "1f,2f,4f", of `fps` a second. Raises InputError for anything else.
    """
    if text in SOCCERNET:
        return Tolerances(SOCCERNET[text], soccernet=True)
    frames = "f" in text
    if frames and fps is None:
        raise InputError(f"--tolerance {text}: add --fps, the frames a second that are meant, or give seconds")
    try:
        if ":" in text:
            start, step, stop = (float(part) for part in text.split(":"))
            count = (stop - start) / step + 1e-6 if step > 0 else -1.0
            if not 0 <= count < MOST_TOLERANCES:
                raise ValueError
            seconds = start + step * np.arange(int(count) + 1)
        elif frames:
            if not all(part.strip().endswith("f") for part in text.split(",")):
                raise ValueError
            seconds = np.array([float(part.strip()[:-1]) for part in text.split(",")]) / (fps or 1.0)
        else:
            seconds = np.array([float(part) for part in text.split(",")])
    except ValueError:
        seconds = np.array([np.nan])
    if not bool((np.isfinite(seconds) & (seconds >= 0)).all()):
        raise InputError(
            f'--tolerance "{text}": give seconds like 0.5,1,2 or start:step:stop, frames like 1f,2f, or SoccerNet\'s '
            "tight or loose"
        )
    return Tolerances(np.unique(seconds))


class _Found(NamedTuple):
    """Predictions of a class, best first."""

    videos: list[str]
    times: Floats
    scores: Floats


def point_precision(ground_truth: GroundTruth, predictions: Predictions, tolerances: Tolerances) -> PointResult:
    """Mean average precision of points: video -> [(start, end, label)] against video -> [(start, end, label, score)],
    in seconds, of which the starts count. Predictions of equal scores are ranked as they are listed.

    Raises InputError when the ground truth has no point or no video of the predictions is in it.
    """
    truth: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for video, points in ground_truth.items():
        for start, _, label in points:
            truth[label][video].append(start)
    if not truth:
        raise InputError("The ground truth holds no point in the evaluated subset; choose another with --subset.")
    if not any(video in ground_truth for video in predictions):
        raise InputError("None of the predictions' videos is in the ground truth; check --predictions and --subset.")
    of_class: dict[str, list[tuple[str, float, float]]] = {label: [] for label in truth}
    total = unknown = 0
    for video, found in predictions.items():
        total += len(found)
        for start, _, label, score in found:
            if label in of_class:
                of_class[label].append((video, start, score))
            else:
                unknown += 1
    classes = tuple(sorted(truth))
    rule = _soccernet_precision if tolerances.soccernet else _spot_precision
    precision = np.array([rule(_ranked(of_class[label]), truth[label], tolerances.seconds) for label in classes])
    map_by_tolerance = precision.mean(axis=0)
    return PointResult(
        tolerances=tolerances,
        classes=classes,
        average_precision=precision,
        map_by_tolerance=map_by_tolerance,
        average=float(tolerances.average(map_by_tolerance)),
        num_videos=len(ground_truth),
        num_segments=sum(len(points) for points in ground_truth.values()),
        num_predictions=total,
        num_unknown_label=unknown,
        num_unknown_video=sum(video not in ground_truth for rows in of_class.values() for video, *_ in rows),
    )


def _ranked(rows: Sequence[tuple[str, float, float]]) -> _Found:
    times, scores = (np.array([row[k] for row in rows], dtype=np.float64) for k in (1, 2))
    order = np.argsort(-scores, kind="stable")
    return _Found([rows[k][0] for k in order], times[order], scores[order])


def _spot_precision(found: _Found, truth: dict[str, list[float]], seconds: Floats) -> Floats:
    """(K,) by E2E-Spot's definition."""
    number = sum(map(len, truth.values()))
    return np.array([_interpolated(_spot_hits(found, truth, tolerance)) / number for tolerance in seconds])


def _spot_hits(found: _Found, truth: dict[str, list[float]], tolerance: float) -> Bools:
    """(P,) Which predictions, best first, hit; of two true points that are equally near, the earlier is meant."""
    left = {video: sorted(set(times)) for video, times in truth.items()}
    hits = np.zeros(len(found.times), dtype=np.bool_)
    for rank, (video, time) in enumerate(zip(found.videos, found.times.tolist(), strict=True)):
        times = left.get(video)
        if not times:
            continue
        after = bisect_left(times, time)
        nearest = min((k for k in (after - 1, after) if 0 <= k < len(times)), key=lambda k: abs(times[k] - time))
        if abs(times[nearest] - time) <= tolerance + ROUNDING:
            hits[rank] = True
            del times[nearest]
    return hits


def _interpolated(hits: Bools) -> float:
    """Sum over the hits of the best precision at this one or any later."""
    places = np.flatnonzero(hits)
    precision = np.arange(1, len(places) + 1) / (places + 1)
    return float(np.maximum.accumulate(precision[::-1]).sum())


def _soccernet_precision(found: _Found, truth: dict[str, list[float]], seconds: Floats) -> Floats:
    """(K,) by SoccerNet's definition."""
    places = {video: sorted({_place(time) for time in times}) for video, times in truth.items()}
    number = sum(map(len, places.values()))
    best: dict[str, dict[int, float]] = defaultdict(dict)  # of each half second its best prediction alone
    for video, time, score in zip(found.videos, found.times, found.scores, strict=True):
        best[video].setdefault(_place(time), float(score))
    scores = np.array([score for rows in best.values() for _, score in sorted(rows.items())])
    reached = (scores >= SCORES[:, None]).sum(axis=1)
    result = []
    for tolerance in seconds:
        hits = [_soccernet_hits(best[video], places.get(video, []), tolerance) for video in best]
        hit = ((scores >= SCORES[:, None]) & np.concatenate([np.empty(0, dtype=np.bool_), *hits])).sum(axis=1)
        precision, recall = hit / np.maximum(reached, 1), hit / number
        result.append(np.mean([precision[recall >= least].max(initial=0.0) for least in RECALLS]))
    return np.array(result)


def _place(time: float) -> int:
    return int(RATE * (time + ROUNDING))


def _soccernet_hits(best: dict[int, float], truth: Sequence[int], tolerance: float) -> Bools:
    """Which of a video's predictions, by half seconds, are hits; the true points take theirs in turn."""
    places = np.array(sorted(best))
    scores = np.array([best[place] for place in sorted(best)])
    taken = np.zeros(len(places), dtype=np.bool_)
    for point in truth:
        near = np.flatnonzero((np.abs(places - point) <= RATE * tolerance / 2) & ~taken)
        if len(near):
            taken[near[scores[near].argmax()]] = True
    return taken


def points_table(result: PointResult, per_class: bool = False) -> str:
    """A plain-text table in percent: mAP by tolerance and their average, with a row for each class when asked."""
    rows = [("mAP (%)", result.map_by_tolerance)]
    if per_class:
        rows += zip(result.classes, result.average_precision, strict=True)
    width = max(len("tolerance, s"), *(len(name) for name, _ in rows))
    header = "".join(f"{f'{seconds:.4g}':>8}" for seconds in result.tolerances.seconds)
    lines = [f"{'tolerance, s':<{width}}{header}{'average':>10}"]
    for name, values in rows:
        cells = "".join(f"{100 * value:>8.2f}" for value in values)
        lines.append(f"{name:<{width}}{cells}{100 * float(result.tolerances.average(values)):>10.2f}")
    return "\n".join(lines)

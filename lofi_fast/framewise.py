"""Scores of labels for each frame, from segments that are looked at frame by frame.

Where a frame has one label (Breakfast, 50Salads, GTEA): frame accuracy, edit score and segmental F1, as Lea et al.
(Temporal Convolutional Networks for Action Segmentation and Detection, CVPR 2017) define them and Abu Farha and Gall
(MS-TCN, CVPR 2019; yabufarha/ms-tcn, eval.py) report them. Where a frame may have several (MultiTHUMOS, Charades): mean
average precision over frames (Yeung et al., Every Moment Counts, IJCV 2018; Sigurdsson et al., Hollywood in Homes, ECCV
2016).

A frame without a label is background. It counts for accuracy, but is no segment.

Letters of array shapes: T frames of a video, V videos, C classes, K thresholds.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from lofi_fast.errors import InputError
from lofi_fast.intervals import draws, interval
from lofi_fast.metrics import Floats, GroundTruth, Ints, Predictions

BACKGROUND = -1
OVERLAPS = (0.1, 0.25, 0.5)  # of segmental F1@10, 25, 50
CHARADES_FRAMES = 25  # of a video, evenly spaced, at which Charades is scored


@dataclass(frozen=True, eq=False)
class Frames:
    """The instants, in seconds, at which each video is looked at: video -> ascending (T,).

    `closed`: an instant that is a segment's end lies within it too, as Charades has it.
    """

    times: dict[str, Floats]
    closed: bool = False

    def within(self, video: str, start: float, end: float) -> slice:
        """The frames of a video that lie within a segment."""
        times = self.times[video]
        side = "right" if self.closed else "left"
        return slice(int(np.searchsorted(times, start, "left")), int(np.searchsorted(times, end, side)))  # type: ignore[call-overload]


def frames_at(rate: float, durations: Mapping[str, float]) -> Frames:
    """The middles of frames at `rate` a second, over each video's seconds; at least one frame each."""
    counts = {name: max(round(seconds * rate), 1) for name, seconds in durations.items()}
    return Frames({name: np.arange(0.5, count) / rate for name, count in counts.items()})


def charades_frames(durations: Mapping[str, float]) -> Frames:
    """CHARADES_FRAMES instants of each video from its start on, evenly spaced, as Charades_v1_localize has them."""
    numbers = np.arange(CHARADES_FRAMES)
    return Frames({name: numbers * seconds / CHARADES_FRAMES for name, seconds in durations.items()}, closed=True)


@dataclass(frozen=True, eq=False)
class SegmentalResult:
    """Scores in percent; f1 (K,) at `overlaps`.

    accuracy: share of all frames with the right label; edit: mean over videos; f1: of counts over all videos.
    intervals (2 + K, 2): [low, high] of accuracy, edit score and each F1, 95% bootstrap intervals over videos; None
    where none were asked for.
    """

    overlaps: tuple[float, ...]
    accuracy: float
    edit: float
    f1: Floats
    num_videos: int
    num_frames: int
    intervals: Floats | None = None

    @property
    def named(self) -> dict[str, float]:
        """The scores by their usual names, in the order of `intervals`."""
        f1 = {f"F1@{100 * overlap:g}": float(score) for overlap, score in zip(self.overlaps, self.f1, strict=True)}
        return {"accuracy": self.accuracy, "edit": self.edit, **f1}


@dataclass(frozen=True, eq=False)
class FrameMapResult:
    """Average precision over frames, in [0, 1], of each class that the ground truth has in a frame, (C,); its mean."""

    classes: tuple[str, ...]
    average_precision: Floats
    average: float
    num_videos: int
    num_frames: int


def one_label_each(ground_truth: GroundTruth, frames: Frames) -> bool:
    """Whether no frame has two labels."""
    for name, segments in ground_truth.items():
        labels = np.full(len(frames.times[name]), "", dtype=object)
        for start, end, label in segments:
            within = labels[frames.within(name, start, end)]
            if ((within != "") & (within != label)).any():
                return False
            within[:] = label
    return True


def labels_of_frames(
    segments: Sequence[tuple[float, float, str]], classes: Mapping[str, int], frames: Frames, video: str
) -> Ints:
    """The index of each frame's label, (T,); BACKGROUND where there is none. Of segments that overlap, the later one in
    the sequence counts.
    """
    labels = np.full(len(frames.times[video]), BACKGROUND, dtype=np.int64)
    for start, end, label in segments:
        labels[frames.within(video, start, end)] = classes[label]
    return labels


def runs(labels: Ints) -> tuple[Ints, Ints, Ints]:
    """(label, first frame, the frame after the last) of each stretch of one label, in order, without background."""
    first = np.flatnonzero(np.diff(labels, prepend=labels[:1] - 1))
    after = np.append(first[1:], len(labels))
    kept = labels[first] != BACKGROUND
    return labels[first][kept], first[kept], after[kept]


def edit_score(found: Ints, truth: Ints) -> float:
    """How alike two sequences of labels are, in percent: 100 less the Levenshtein distance as a share of the longer
    one; 100 where both are empty.
    """
    longer = max(len(found), len(truth))
    if not longer:
        return 100.0
    steps = np.arange(len(truth) + 1)
    distance = steps.copy()
    for i, label in enumerate(found, 1):
        row = np.append(i, np.minimum(distance[1:] + 1, distance[:-1] + (truth != label)))
        # what comes from the left costs 1 a step
        distance = np.minimum.accumulate(row - steps) + steps
    return float(100 * (1 - distance[-1] / longer))


def segmental_counts(found: Ints, truth: Ints, overlaps: Sequence[float] = OVERLAPS) -> Ints:
    """(true positives, false positives, false negatives) at each overlap, (3, K), of two labellings (T,) of frames.

    In the order of time, each found segment is compared with the segment of its label that it overlaps most: it is
    right where the overlap (intersection over union) reaches the threshold and that segment was not found before.
    """
    label, first, after = runs(found)
    true_label, true_first, true_after = runs(truth)
    right = np.zeros(len(overlaps), dtype=np.int64)
    if len(label) and len(true_label):
        shared = np.minimum(after[:, None], true_after) - np.maximum(first[:, None], true_first)
        union = np.maximum(after[:, None], true_after) - np.minimum(first[:, None], true_first)
        overlap = np.where(label[:, None] == true_label, shared / union, 0.0)
        best = overlap.argmax(axis=1)
        most = overlap[np.arange(len(label)), best]
        right = np.array([len(np.unique(best[most >= threshold])) for threshold in overlaps])
    return np.stack([right, len(label) - right, len(true_label) - right])


def segmental_scores(
    ground_truth: GroundTruth, predictions: Predictions, frames: Frames, num_draws: int = 0, seed: int = 0
) -> SegmentalResult:
    """Accuracy, edit score and segmental F1 of segments.

    ground_truth: video -> [(start, end, label)], predictions: video -> [(start, end, label, score)], in seconds. Of
    detections that overlap, a frame has the label of the one with the best score. A video without predictions is
    background. `num_draws`: of the bootstrap. Raises InputError where there is no video.
    """
    if not ground_truth:
        raise InputError("The ground truth names no video in the evaluated subset; choose another with --subset.")
    classes: dict[str, int] = {}
    for _, _, label in (segment for segments in ground_truth.values() for segment in segments):
        classes.setdefault(label, len(classes))
    for _, _, label, _ in (item for items in predictions.values() for item in items):
        classes.setdefault(label, len(classes))
    rows = []
    for name, segments in ground_truth.items():
        best_last = [item[:3] for item in sorted(predictions.get(name, ()), key=lambda item: item[3])]
        found = labels_of_frames(best_last, classes, frames, name)
        truth = labels_of_frames(segments, classes, frames, name)
        edit = edit_score(runs(found)[0], runs(truth)[0])
        rows.append([(found == truth).sum(), len(truth), edit, *segmental_counts(found, truth).ravel()])
    by_video = np.array(rows, dtype=np.float64)  # (V, 3 + 3 * K)
    once = _scores(np.ones((1, len(by_video))), by_video)[0]
    spans = None
    if num_draws:
        drawn = draws(len(by_video), num_draws, seed)
        spans = interval(once, np.concatenate([_scores(times, by_video) for times in drawn]), most=100.0)
    return SegmentalResult(
        overlaps=OVERLAPS,
        accuracy=float(once[0]),
        edit=float(once[1]),
        f1=once[2:],
        num_videos=len(by_video),
        num_frames=int(by_video[:, 1].sum()),
        intervals=spans,
    )


def _scores(times: Floats | Ints, by_video: Floats) -> Floats:
    """Accuracy, edit score and F1 in percent, (R, 2 + K), where each video counts `times` (R, V)."""
    totals = times @ by_video
    right, wrong, missed = np.moveaxis(totals[:, 3:].reshape(len(times), 3, -1), 1, 0)
    chances = 2 * right + wrong + missed
    f1 = np.divide(2 * right, chances, out=np.zeros_like(right), where=chances > 0)
    accuracy, edit = totals[:, 0] / totals[:, 1], totals[:, 2] / times.sum(axis=1)
    return np.column_stack([100 * accuracy, edit, 100 * f1])


def average_precision(scores: Floats, truth: npt.NDArray[np.bool_]) -> float:
    """Mean, over the frames (T,) that have a class, of the precision among the frames that score as much or more; NaN
    where no frame has it. Frames of one score rank together, so that their order plays no part.
    """
    if not truth.any():
        return float("nan")
    order = np.argsort(-scores, kind="stable")
    last = np.append(np.flatnonzero(np.diff(scores[order])), len(order) - 1)  # of each score
    right = np.cumsum(truth[order])[last]
    return float((np.diff(right, prepend=0) * right / (last + 1)).sum() / right[-1])


def frame_map(ground_truth: GroundTruth, predictions: Predictions, frames: Frames) -> FrameMapResult:
    """Mean average precision over the frames of all videos.

    ground_truth: video -> [(start, end, label)], predictions: video -> [(start, end, label, score)], in seconds; scores
    of 0 and more. A frame's score for a class is the best of its detections that the frame lies within, 0 without one.
    Raises InputError where no frame has a label.
    """
    first: dict[str, int] = {}
    num_frames = 0
    for name in ground_truth:
        first[name] = num_frames
        num_frames += len(frames.times[name])
    marked: dict[str, list[slice]] = {}
    for name, segments in ground_truth.items():
        for start, end, label in segments:
            within = frames.within(name, start, end)
            if within.start < within.stop:
                marked.setdefault(label, []).append(slice(first[name] + within.start, first[name] + within.stop))
    if not marked:
        raise InputError("No frame lies within a segment of the ground truth; give --frames a higher rate.")
    scored: dict[str, list[tuple[slice, float]]] = {label: [] for label in marked}
    for name, items in predictions.items():
        for start, end, label, score in items if name in first else ():
            if label in scored:
                within = frames.within(name, start, end)
                scored[label].append((slice(first[name] + within.start, first[name] + within.stop), score))
    precision = np.zeros(len(marked))
    for number, (label, stretches) in enumerate(marked.items()):
        truth, scores = np.zeros(num_frames, dtype=np.bool_), np.zeros(num_frames)
        for stretch in stretches:
            truth[stretch] = True
        for stretch, score in scored[label]:
            np.maximum(scores[stretch], score, out=scores[stretch])
        precision[number] = average_precision(scores, truth)
    return FrameMapResult(tuple(marked), precision, float(precision.mean()), len(ground_truth), num_frames)


def segmental_table(result: SegmentalResult) -> str:
    """The scores as plain text, in percent, with their intervals below where they were computed."""
    scores = result.named
    rows = ["".join(f"{name:>16}" for name in scores), "".join(f"{value:>16.2f}" for value in scores.values())]
    if result.intervals is not None:
        rows.append("".join(f"{f'[{low:.2f}, {high:.2f}]':>16}" for low, high in result.intervals))
    return "\n".join(rows)

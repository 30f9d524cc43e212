"""From the proposals of a video's windows to its detections: labels, soft-NMS, the best. The same for every head, but
that points in time, which overlap nothing, go their own way: `point_candidates`, `best_points`.

Shape legend: K classes, N proposals of a window.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from lofi_fast.detections import MIN_SCORE, Detection
from lofi_fast.head.protocol import Proposals
from lofi_fast.kernels import soft_nms

Floats = npt.NDArray[np.float64]
FloatArray = npt.NDArray[np.floating[Any]]
Ints = npt.NDArray[np.int64]

FEWEST_LABELS, MOST_LABELS = 2, 10  # of a proposal, where the settings name no number (MultiTHUMOS: up to 9 at once)
LEAST_POINT = 0.01  # probability of a class at a point
SAME_TIME = 1e-6  # seconds that a sum of times is rounded by
OF_ONE_WINDOW, OF_EACH_MORE = 200, 20  # detections that a video may have, where the settings name no number


def most_detections(num_windows: int) -> int:
    """How many detections are kept of a video of so many windows: a long video holds more actions than a short one."""
    return OF_ONE_WINDOW + OF_EACH_MORE * max(num_windows - 1, 0)


def _best_classes(probabilities: FloatArray, count: int) -> tuple[Ints, Floats]:
    """The `count` most probable of K classes in each of N columns -> (labels, probabilities), both (count, N).

    Of equal classes the first. A few passes of argmax, since sorting all K of 200 classes takes longer than the rest of
    the decoding.
    """
    left = np.array(probabilities, dtype=np.float64)
    columns = np.arange(left.shape[1])
    labels = np.empty((min(count, len(left)), len(columns)), dtype=np.int64)
    for row in labels:
        row[:] = left.argmax(axis=0)
        left[row, columns] = -np.inf
    return labels, probabilities[labels, columns].astype(np.float64)


def _labels(probabilities: FloatArray, count: int | None) -> tuple[Ints, Floats]:
    """The labels that each of N proposals is given, with their probabilities (., N), -1 where it has fewer.

    `count` of them; None: the FEWEST_LABELS likeliest, and up to MOST_LABELS where they are more likely than not.
    """
    if count is not None:
        return _best_classes(probabilities, count)
    likely = int((probabilities > 0.5).sum(axis=0).max(initial=0))
    labels, weights = _best_classes(probabilities, min(max(likely, FEWEST_LABELS), MOST_LABELS))
    weights[FEWEST_LABELS:][weights[FEWEST_LABELS:] <= 0.5] = -1
    return labels, weights


@dataclass(frozen=True, eq=False)
class Candidates:
    """Labelled segments of one window, before those that overlap are suppressed."""

    segments_N2: Floats  # start and end in seconds
    scores_N: Floats
    labels_N: Ints  # indices of classes


def candidates(
    window: Proposals,
    classes: Sequence[str],
    *,
    duration: float,
    labels_per_proposal: int | None = None,
    video_scores: FloatArray | None = None,
    min_score: float = MIN_SCORE,
) -> Candidates:
    """The proposals of one window with their labels; see `detections`."""
    if labels_per_proposal is not None and labels_per_proposal < 1:
        raise ValueError(f"labels_per_proposal must be at least 1, not {labels_per_proposal}")
    if video_scores is not None:
        if video_scores.shape != (len(classes),):
            raise ValueError(f"video_scores must be ({len(classes)},), not {video_scores.shape}")
        probabilities = video_scores[:, None]
    elif window.class_probs_KP is not None:
        if len(window.class_probs_KP) != len(classes):
            raise ValueError(f"class_probs has {len(window.class_probs_KP)} classes, the video {len(classes)}")
        probabilities = window.class_probs_KP
    elif len(classes) == 1:
        probabilities = np.ones((1, 1))
    else:
        raise ValueError(f"class_probs or video_scores must say which of the {len(classes)} classes a proposal is")
    labels, weights = _labels(probabilities, labels_per_proposal)
    weighted = window.scores_P * weights
    segments = np.tile(window.segments_P2, (len(labels), 1)).clip(0, duration)
    scores, labels = weighted.ravel(), np.broadcast_to(labels, weighted.shape).ravel()
    kept = (scores >= min_score) & (segments[:, 1] > segments[:, 0])
    return Candidates(segments[kept], scores[kept], labels[kept])


def best(
    windows: Sequence[Candidates],
    classes: Sequence[str],
    *,
    sigma: float = 0.84,
    voting: float | None = None,
    top_k: int | None = 100,
    min_score: float = MIN_SCORE,
) -> list[Detection]:
    """Detections of one video, best first, from the candidates of its windows; see `detections`."""
    segments = np.concatenate([np.empty((0, 2)), *(window.segments_N2 for window in windows)])
    scores = np.concatenate([np.empty(0), *(window.scores_N for window in windows)])
    labels = np.concatenate([np.empty(0, dtype=np.int64), *(window.labels_N for window in windows)])
    order, decayed = soft_nms(
        torch.from_numpy(segments),
        torch.from_numpy(scores),
        torch.from_numpy(labels),
        sigma=sigma,
        max_keep=most_detections(len(windows)) if top_k is None else top_k,
        min_score=min_score,
    )
    kept, ends = order.numpy(), segments[order.numpy()]
    if voting is not None:
        ends = voted(segments, scores, labels, kept, voting)
    return [
        Detection(float(start), float(end), classes[label], score)
        for (start, end), label, score in zip(ends, labels[kept].tolist(), decayed.tolist(), strict=True)
    ]


def point_candidates(window: Proposals, *, duration: float, min_score: float = MIN_SCORE) -> Candidates:
    """Of the points of one window, each with the probabilities of its classes: every class that is likely enough, where
    the video goes on until then. Segments start and end at once.
    """
    probabilities = window.class_probs_KP
    if probabilities is None:
        raise ValueError("class_probs must say which class a point is")
    times = window.segments_P2[:, 0]
    labels, places = np.nonzero((probabilities >= max(min_score, LEAST_POINT)) & (times <= duration))
    return Candidates(window.segments_P2[places], probabilities[labels, places].astype(np.float64), labels)


def best_points(
    windows: Sequence[Candidates], classes: Sequence[str], *, suppression: float, top_k: int | None
) -> list[Detection]:
    """Points of one video, best first, out of `point_candidates`: those that no better one of their label is as near to
    as `suppression` seconds, whether that is kept or not; the `top_k` best of them (None: `most_detections`). Of equal
    ones at the same time, which windows that overlap may give, one is kept.

    Source: non-maximum suppression in E2E-Spot's code (jhong93/spot, util/eval.py).
    """
    times = np.concatenate([np.empty(0), *(window.segments_N2[:, 0] for window in windows)])
    scores = np.concatenate([np.empty(0), *(window.scores_N for window in windows)])
    labels = np.concatenate([np.empty(0, dtype=np.int64), *(window.labels_N for window in windows)])
    kept: list[int] = []
    for label in np.unique(labels):
        own = np.flatnonzero(labels == label)
        own = own[np.lexsort((-scores[own], times[own]))]
        own = own[np.diff(times[own], prepend=-np.inf) > 0]
        low = np.searchsorted(times[own], times[own] - suppression - SAME_TIME, "left")
        high = np.searchsorted(times[own], times[own] + suppression + SAME_TIME, "right")
        best_near = np.array([scores[own[a:b]].max() for a, b in zip(low, high, strict=True)])
        kept += own[scores[own] >= best_near].tolist()
    order = sorted(kept, key=lambda one: (-scores[one], times[one]))
    order = order[: most_detections(len(windows)) if top_k is None else top_k]
    return [Detection(float(times[k]), float(times[k]), classes[labels[k]], float(scores[k])) for k in order]


def voted(segments_N2: Floats, scores_N: Floats, labels_N: Ints, kept_K: Ints, voting: float) -> Floats:
    """Where the kept candidates (K, 2) start and end by the vote of all candidates of their class whose tIoU with them
    is `voting` or more, themselves among them: the mean of these, weighed by score times tIoU.

    Source: voting in ActionFormer's code, which has it where classes are not told apart.
    """
    result = segments_N2[kept_K]
    of_class = {label: np.flatnonzero(labels_N == label) for label in np.unique(labels_N[kept_K])}
    for row, candidate in enumerate(kept_K):
        same = of_class[labels_N[candidate]]
        others, (start, end) = segments_N2[same], segments_N2[candidate]
        both = (np.minimum(others[:, 1], end) - np.maximum(others[:, 0], start)).clip(0)
        tiou = both / (others[:, 1] - others[:, 0] + end - start - both)
        weights = np.where(tiou >= voting, scores_N[same] * tiou, 0.0)
        if (total := weights.sum()) > 0:
            result[row] = weights @ others / total
    return result


def detections(
    windows: Sequence[Proposals],
    classes: Sequence[str],
    *,
    duration: float,
    sigma: float = 0.84,
    voting: float | None = None,
    top_k: int | None = 100,
    labels_per_proposal: int | None = None,
    video_scores: FloatArray | None = None,
    min_score: float = MIN_SCORE,
) -> list[Detection]:
    """Detections of one video, best first, from the proposals of its windows.

    Every proposal is emitted with its labels_per_proposal best classes (None: with the best 2, and up to 10 where they
    are more likely than not, since one segment may have many labels), score = proposal score x class probability. The
    classes are those of video_scores (K,) when given (the paper's fusion: one ranking for the whole video), else of
    each proposal's class_probs; with neither, there must be one class, of probability 1. Segments are clipped to
    [0, duration] seconds and dropped when nothing is left; then soft-NMS within each class over all windows together,
    and the top_k best are kept (None: `most_detections` of so many windows), with the ends that `voted` gives them
    where a voting is asked for. min_score drops candidates and decayed scores below it.
    Raises ValueError when the proposals or video_scores do not have len(classes) classes.
    """
    labelled = [
        candidates(
            window, classes, duration=duration, labels_per_proposal=labels_per_proposal, video_scores=video_scores,
            min_score=min_score,
        )
        for window in windows
    ]  # fmt: skip
    return best(labelled, classes, sigma=sigma, voting=voting, top_k=top_k, min_score=min_score)

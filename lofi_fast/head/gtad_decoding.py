"""From the head's maps to detections: proposals at boundary peaks, labels, soft-NMS, seconds, files.

Shape legend: L snippets of a window, D durations, K classes, N proposals. Cell (d, s) is the proposal that starts with
snippet s and covers d + 1 snippets: in seconds [edges[s], edges[s + d + 1]].
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from lofi_fast.detections import Detection
from lofi_fast.kernels import soft_nms

Floats = npt.NDArray[np.float64]
FloatArray = npt.NDArray[np.floating[Any]]
Ints = npt.NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class WindowMaps:
    """The head's probabilities for one window of a video.

    edges (L + 1,) seconds, ascending: the times between snippets. start, end (L,): probability that an action starts or
    ends at edges[i]. confidence (D, L): classification times regression score of cell (d, s), in [0, 1]; cells that
    leave the window (s + d >= L) are not read. class_probs (K, D, L): probability of each class at each cell, or None.
    Raises ValueError for shapes that do not fit together and for values that are not finite.
    """

    edges: FloatArray
    start: FloatArray
    end: FloatArray
    confidence: FloatArray
    class_probs: FloatArray | None = None

    def __post_init__(self) -> None:
        length = len(self.edges) - 1
        cells = self.confidence.shape
        fits = self.start.shape == self.end.shape == (length,) and length > 0 and len(cells) == 2 and cells[1] == length
        if self.class_probs is not None:
            fits = fits and self.class_probs.ndim == 3 and self.class_probs.shape[1:] == cells
        if not fits:
            classes = None if self.class_probs is None else self.class_probs.shape
            raise ValueError(
                f"WindowMaps: edges {self.edges.shape}, start {self.start.shape}, end {self.end.shape}, "
                f"confidence {cells} and class_probs {classes} must be (L + 1,), (L,), (L,), (D, L) and (K, D, L)"
            )
        for name in ("edges", "start", "end", "confidence", "class_probs"):
            values = getattr(self, name)
            if values is not None and not np.isfinite(values).all():
                raise ValueError(f"WindowMaps: {name} holds a NaN or an infinity (has the training diverged?)")


def _is_candidate(probabilities: FloatArray, peak_fraction: float) -> npt.NDArray[np.bool_]:
    """Boundaries (L,) that are a local peak, or above peak_fraction of the largest.

    A peak is strictly greater than both neighbours; outside the window the neighbour is -inf. A plateau has no peak:
    its boundaries are candidates by their height or not at all.
    """
    padded = np.concatenate([[-np.inf], probabilities, [-np.inf]])
    peak = (probabilities > padded[:-2]) & (probabilities > padded[2:])
    return np.asarray(peak | (probabilities > peak_fraction * probabilities.max()), dtype=np.bool_)


def proposals(
    maps: WindowMaps, peak_fraction: float = 0.5, with_boundaries: bool = False
) -> tuple[Ints, Floats, Floats]:
    """The cells whose start and end are both candidates: (cells (N, 2) as (d, s), segments (N, 2), scores (N,)).

    A boundary is a candidate when it is a local peak or above peak_fraction of the window's largest. The window's last
    boundary (s + d + 1 = L) has no probability of its own and is always a candidate, so that actions cut by the end of
    the video are kept. Segments in seconds; scores are the confidence, times the start and end probabilities when
    with_boundaries (the last boundary then counts with the probability of the one before it).
    Source: G-TAD post-processing, except for the last boundary, which upstream drops.
    """
    num_durations, length = maps.confidence.shape
    starts = _is_candidate(maps.start, peak_fraction)
    ends = np.append(_is_candidate(maps.end, peak_fraction), True)
    stop = np.arange(num_durations)[:, None] + np.arange(length) + 1
    d, s = np.nonzero((stop <= length) & starts & ends[np.minimum(stop, length)])
    scores = maps.confidence[d, s].astype(np.float64)
    if with_boundaries:
        end = np.append(maps.end, maps.end[-1])
        scores = scores * maps.start[s] * end[s + d + 1]
    edges = maps.edges.astype(np.float64)
    return np.stack([d, s], axis=1), np.stack([edges[s], edges[s + d + 1]], axis=1), scores


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


def detections(
    windows: Sequence[WindowMaps],
    classes: Sequence[str],
    *,
    duration: float,
    sigma: float = 0.84,
    top_k: int = 100,
    labels_per_proposal: int = 2,
    video_scores: FloatArray | None = None,
    min_score: float = 1e-4,
    peak_fraction: float = 0.5,
    with_boundaries: bool = False,
) -> list[Detection]:
    """Detections of one video, best first, from its windows' maps.

    Every proposal is emitted with its labels_per_proposal best classes, score = proposal score x class probability. The
    classes are those of video_scores (K,) when given (the paper's fusion: one ranking for the whole video), else of
    each cell's class_probs; with neither, there must be one class, of probability 1. Segments are clipped to
    [0, duration] seconds and dropped when nothing is left; then soft-NMS within each class over all windows together,
    and the top_k best are kept. min_score drops candidates and decayed scores below it.
    Raises ValueError when the maps or video_scores do not have len(classes) classes.
    """
    if labels_per_proposal < 1:
        raise ValueError(f"labels_per_proposal must be at least 1, not {labels_per_proposal}")
    if video_scores is not None and video_scores.shape != (len(classes),):
        raise ValueError(f"video_scores must be ({len(classes)},), not {video_scores.shape}")
    parts = [(np.empty((0, 2)), np.empty(0), np.empty(0, dtype=np.int64))]
    for maps in windows:
        cells, segments, scores = proposals(maps, peak_fraction, with_boundaries)
        if video_scores is not None:
            probabilities = video_scores[:, None]
        elif maps.class_probs is not None:
            if len(maps.class_probs) != len(classes):
                raise ValueError(f"class_probs has {len(maps.class_probs)} classes, the video {len(classes)}")
            probabilities = maps.class_probs[:, cells[:, 0], cells[:, 1]]
        elif len(classes) == 1:
            probabilities = np.ones((1, 1))
        else:
            raise ValueError(f"class_probs or video_scores must say which of the {len(classes)} classes a proposal is")
        labels, weights = _best_classes(probabilities, labels_per_proposal)
        weighted = scores * weights
        segments = np.tile(segments, (len(labels), 1)).clip(0, duration)
        parts.append((segments, weighted.ravel(), np.broadcast_to(labels, weighted.shape).ravel()))
    segments = np.concatenate([part[0] for part in parts])
    scores = np.concatenate([part[1] for part in parts])
    labels = np.concatenate([part[2] for part in parts])
    kept = (scores >= min_score) & (segments[:, 1] > segments[:, 0])
    segments, scores, labels = segments[kept], scores[kept], labels[kept]
    order, decayed = soft_nms(
        torch.from_numpy(segments),
        torch.from_numpy(scores),
        torch.from_numpy(labels),
        sigma=sigma,
        max_keep=top_k,
        min_score=min_score,
    )
    return [
        Detection(float(segments[i, 0]), float(segments[i, 1]), classes[int(labels[i])], score)
        for i, score in zip(order.tolist(), decayed.tolist(), strict=True)
    ]

"""From the head's maps to detections: proposals at boundary peaks, labels, soft-NMS, seconds, files.

Shape legend: L snippets of a window, D durations, K classes, N proposals. Cell (d, s) is the proposal that starts with
snippet s and covers d + 1 snippets: in seconds [edges[s], edges[s + d + 1]].
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from lofi_fast.errors import InputError
from lofi_fast.kernels import soft_nms

Floats = npt.NDArray[np.float64]
FloatArray = npt.NDArray[np.floating[Any]]
Ints = npt.NDArray[np.int64]

# Columns (from 0) of the THUMOS14 detection classes among the 101 of UCF101 in alphabetical order, which is the order
# of the public UntrimmedNet score file. Row i of that file is video_test_%07d with number i + 1.
_UCF101_COLUMNS = {
    "BaseballPitch": 6,
    "BasketballDunk": 8,
    "Billiards": 11,
    "CleanAndJerk": 20,
    "CliffDiving": 21,
    "CricketBowling": 22,
    "CricketShot": 23,
    "Diving": 25,
    "FrisbeeCatch": 30,
    "GolfSwing": 32,
    "HammerThrow": 35,
    "HighJump": 39,
    "JavelinThrow": 44,
    "LongJump": 50,
    "PoleVault": 67,
    "Shotput": 78,
    "SoccerPenalty": 84,
    "TennisSwing": 91,
    "ThrowDiscus": 92,
    "VolleyballSpiking": 96,
}
_THUMOS_TEST = "video_test_"


@dataclass(frozen=True)
class Detection:
    """A labelled segment in seconds and its score in [0, 1]."""

    start: float
    end: float
    label: str
    score: float


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


def write_predictions(path: Path, predictions: Mapping[str, Sequence[Detection]]) -> None:
    """Write detections as ActivityNet JSON, atomically: another reader sees the old file or the whole new one.

    Raises InputError when the file cannot be written, ValueError for a score or time that is not finite.
    """
    results = {
        name: [
            {"segment": [float(d.start), float(d.end)], "score": float(d.score), "label": str(d.label)} for d in items
        ]
        for name, items in predictions.items()
    }
    text = json.dumps({"version": "VERSION 1.3", "results": results, "external_data": {}}, allow_nan=False)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        with temporary.open("w", encoding="utf-8") as file:
            file.write(text + "\n")
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise InputError(
            f"{path} cannot be written ({error.strerror}); give an output folder with room and write permission."
        ) from None


def load_video_scores(path: Path, names: Sequence[str], classes: Sequence[str]) -> dict[str, Floats]:
    """Video-level class scores of a classifier: video -> (K,) in the order of `classes`.

    Forms: JSON {video: {class: score}}; JSON {"results": {video: [{"label": class, "score": score}]}}; JSON
    {"results": {video: [score, ...]}, "class": [class, ...]}; and the UntrimmedNet scores of the THUMOS14 test videos,
    .npy (videos, 101), whose rows are scaled to sum to 1. JSON scores are taken as they are, a class that a video does
    not list has score 0. Raises InputError for unreadable or other files, for a video that the file lacks, and for a
    file that has none of the classes.
    """
    if path.suffix == ".npy":
        return _thumos_scores(path, names, classes)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path} does not exist; give --video-scores an existing file.") from None
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror}); give --video-scores a readable file.") from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is not valid JSON ({error}); give --video-scores a JSON or .npy file.") from None
    rows = content.get("results", content) if isinstance(content, dict) else None
    if not isinstance(rows, dict):
        raise InputError(
            f"{path} has no scores by video; give --video-scores a file of the form {{video: {{class: x}}}}."
        )
    columns = content.get("class")
    missing = [name for name in names if name not in rows]
    if missing:
        raise InputError(f"{path} has no scores for {len(missing)} of {len(names)} videos, for example {missing[0]!r}.")
    index = {label: k for k, label in enumerate(classes)}
    scores = {}
    known = False
    for name in names:
        row = np.zeros(len(classes))
        for label, value in _labelled(rows[name], columns, f"{path}, video {name}"):
            if not isinstance(value, int | float) or isinstance(value, bool) or not 0 <= value < float("inf"):
                raise InputError(f"{path}, video {name}: the score of {label!r} is {value!r}, not a number >= 0.")
            if isinstance(label, str) and label in index:
                known = True
                row[index[label]] = value
        scores[name] = row
    if names and not known:
        raise InputError(
            f"{path} names none of the {len(classes)} classes, such as {classes[0]!r}; check --video-scores."
        )
    return scores


def _labelled(row: object, columns: object, where: str) -> list[tuple[object, object]]:
    """(class, score) pairs of one video in any of the three JSON forms."""
    if isinstance(row, dict):
        return list(row.items())
    if isinstance(row, list) and all(isinstance(item, dict) and "label" in item and "score" in item for item in row):
        return [(item["label"], item["score"]) for item in row]
    if isinstance(row, list) and isinstance(columns, list) and len(row) == len(columns):
        return list(zip(columns, row, strict=True))
    raise InputError(
        f'{where}: scores must be {{class: score}}, a list of {{"label", "score"}}, or as many numbers as "class" has.'
    )


def _thumos_scores(path: Path, names: Sequence[str], classes: Sequence[str]) -> dict[str, Floats]:
    try:
        table = np.load(path, allow_pickle=False)
    except FileNotFoundError:
        raise InputError(f"{path} does not exist; give --video-scores an existing file.") from None
    except (OSError, ValueError, EOFError) as error:
        raise InputError(f"{path} is not a NumPy array file ({error}); check --video-scores.") from None
    if not isinstance(table, np.ndarray) or table.ndim != 2 or table.shape[1] != 101 or table.dtype.kind != "f":
        raise InputError(
            f"{path} is not the THUMOS14 score table (videos x 101 classes of UCF101); --video-scores takes other "
            "classifiers' scores as JSON {video: {class: score}}."
        )
    foreign = [label for label in classes if label not in _UCF101_COLUMNS]
    if foreign:
        raise InputError(f"{path} scores the 20 THUMOS14 classes, and {foreign[0]!r} is none of them; use JSON scores.")
    columns = [_UCF101_COLUMNS[label] for label in classes]
    scores = {}
    for name in names:
        digits = name.removeprefix(_THUMOS_TEST)
        row = int(digits) - 1 if name.startswith(_THUMOS_TEST) and digits.isdecimal() else -1
        if not 0 <= row < len(table):
            raise InputError(
                f"{path} has rows for {_THUMOS_TEST}0000001 to {_THUMOS_TEST}{len(table):07d}, and not for {name!r}."
            )
        values = table[row].astype(np.float64)
        total = values.sum()
        if not (np.isfinite(total) and (values >= 0).all() and total > 0):
            raise InputError(f"{path}, row {row}: the scores of {name!r} are not numbers >= 0 with a positive sum.")
        scores[name] = values[columns] / total
    return scores

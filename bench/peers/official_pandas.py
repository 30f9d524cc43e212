"""The official procedure for mAP as it is published, with a pandas look-up for every detection: what people run.

Of Evaluation/eval_detection.py in activitynet/ActivityNet, in the terms of `official_map`, which has the same
arithmetic without pandas.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from bench.peers.official_map import interpolated_ap

TIMES = ["t-start", "t-end"]


def mean_average_precision(
    ground_truth: Mapping[str, Sequence[Any]], predictions: Mapping[str, Sequence[Any]], tious: np.ndarray
) -> tuple[list[str], np.ndarray, np.ndarray, float]:
    """(classes, AP (K, C), mAP (K,), average), as `official_map.mean_average_precision`."""
    segments = [(name, *segment) for name, found in ground_truth.items() for segment in found]
    detections = [(name, *detection) for name, found in predictions.items() for detection in found]
    truth = pd.DataFrame(segments, columns=["video-id", *TIMES, "label"])
    detected = pd.DataFrame(detections, columns=["video-id", *TIMES, "label", "score"])
    labels = list(dict.fromkeys(truth["label"]))
    of_label = detected.groupby("label")
    table = np.zeros((len(tious), len(labels)))
    for c, label in enumerate(labels):
        found = of_label.get_group(label) if label in of_label.groups else detected.iloc[:0]
        of_class = truth[truth["label"] == label].reset_index(drop=True)
        table[:, c] = average_precision(of_class, found.reset_index(drop=True), tious)
    by_tiou = table.mean(axis=1)
    return labels, table, by_tiou, float(by_tiou.mean())


def average_precision(truth: pd.DataFrame, detected: pd.DataFrame, tious: np.ndarray) -> np.ndarray:
    """AP (K,) of one class."""
    result = np.zeros(len(tious))
    if detected.empty:
        return result
    taken = -np.ones((len(tious), len(truth)))
    order = detected["score"].values.argsort()[::-1]
    detected = detected.loc[order].reset_index(drop=True)
    hits, misses = np.zeros((2, len(tious), len(detected)))
    of_video = truth.groupby("video-id")
    for place, detection in detected.iterrows():
        try:
            candidates = of_video.get_group(detection["video-id"]).reset_index()
        except KeyError:
            misses[:, place] = 1
            continue
        overlap = _tious(detection[TIMES].values, candidates[TIMES].values)
        best_first = overlap.argsort()[::-1]
        for k, threshold in enumerate(tious):
            for j in best_first:
                if overlap[j] < threshold:
                    break
                index = candidates.loc[j]["index"]
                if taken[k, index] >= 0:
                    continue
                hits[k, place] = 1
                taken[k, index] = place
                break
            misses[k, place] = 1 - hits[k, place]
    true, false = np.cumsum(hits, axis=1), np.cumsum(misses, axis=1)
    for k in range(len(tious)):
        result[k] = interpolated_ap(list(true[k] / (true[k] + false[k])), list(true[k] / float(len(truth))))
    return result


def _tious(segment: np.ndarray, candidates: np.ndarray) -> np.ndarray:
    first, last = np.maximum(segment[0], candidates[:, 0]), np.minimum(segment[1], candidates[:, 1])
    intersection = (last - first).clip(0)
    union = (candidates[:, 1] - candidates[:, 0]) + (segment[1] - segment[0]) - intersection
    return (intersection / union).astype(np.float64)

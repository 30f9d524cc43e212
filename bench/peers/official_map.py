"""The official ActivityNet procedure, step by step: slow, plain, and the oracle of tests/test_metrics.py.

Written from the behaviour of Evaluation/eval_detection.py and eval_proposal.py (public repository
activitynet/ActivityNet), without their pandas, which only makes it faster. NumPy stands only where its exact behaviour
is part of the result: the order of an unstable sort, float64 arithmetic, and the grouping of a sum.
"""

from __future__ import annotations

import numpy as np


def tious_with(start, end, segments):
    """tIoU of one segment with each of a list of (start, end): float64, NaN for 0/0."""
    values = np.empty(len(segments))
    for i, (other_start, other_end) in enumerate(segments):
        intersection = max(0.0, min(end, other_end) - max(start, other_start))
        union = (other_end - other_start) + (end - start) - intersection
        with np.errstate(divide="ignore", invalid="ignore"):
            values[i] = np.float64(intersection) / np.float64(union)
    return values


def interpolated_ap(precision, recall):
    """Area under the precision envelope, summed over the points where recall changes."""
    precision = [0.0, *precision, 0.0]
    recall = [0.0, *recall, 1.0]
    for i in range(len(precision) - 2, -1, -1):
        precision[i] = max(precision[i], precision[i + 1])
    terms = [(recall[i] - recall[i - 1]) * precision[i] for i in range(1, len(recall)) if recall[i] != recall[i - 1]]
    return np.sum(np.array(terms))


def average_precision(truth, detections, tious):
    """AP (K,) of one class. truth: [(video, start, end)]; detections: [(video, start, end, score)]."""
    if not detections:
        return np.zeros(len(tious))
    in_video = {}
    for index, (video, start, end) in enumerate(truth):
        in_video.setdefault(video, []).append((index, start, end))
    order = np.array([d[3] for d in detections]).argsort()[::-1]
    detections = [detections[i] for i in order]
    hits = np.zeros((len(tious), len(detections)))
    taken = [set() for _ in tious]
    for place, (video, start, end, _) in enumerate(detections):
        if video not in in_video:
            continue
        candidates = in_video[video]
        overlap = tious_with(start, end, [(s, e) for _, s, e in candidates])
        best_first = overlap.argsort()[::-1]
        for k, threshold in enumerate(tious):
            for j in best_first:
                if overlap[j] < threshold:
                    break
                if candidates[j][0] in taken[k]:
                    continue
                taken[k].add(candidates[j][0])
                hits[k, place] = 1
                break
    result = np.zeros(len(tious))
    for k in range(len(tious)):
        true = np.cumsum(hits[k])
        false = np.cumsum(1 - hits[k])
        result[k] = interpolated_ap(list(true / (true + false)), list(true / float(len(truth))))
    return result


def mean_average_precision(ground_truth, predictions, tious):
    """(classes, AP (K, C), mAP (K,), average); predictions of labels without ground truth are left out."""
    truth = {}
    for video, segments in ground_truth.items():
        for start, end, label in segments:
            truth.setdefault(label, []).append((video, start, end))
    detections = {label: [] for label in truth}
    for video, items in predictions.items():
        for start, end, label, score in items:
            if label in detections:
                detections[label].append((video, start, end, score))
    table = np.zeros((len(tious), len(truth)))
    for c, label in enumerate(truth):
        table[:, c] = average_precision(truth[label], detections[label], tious)
    by_tiou = table.mean(axis=1)
    return list(truth), table, by_tiou, by_tiou.mean()


def average_recall(ground_truth, proposals, tious, max_avg):
    """(proposals per video (100,), recall (K, 100), average recall (100,), area in percent)."""
    videos = [video for video, segments in ground_truth.items() if segments]
    number = sum(len(items) for items in proposals.values())
    ratio = max_avg * float(len(videos)) / number
    tables, total = [], 0
    for video in videos:
        segments = [(start, end) for start, end, _ in ground_truth[video]]
        items = proposals.get(video, [])
        if not items:
            tables.append(np.zeros((len(segments), 1)))
            continue
        order = np.array([item[3] for item in items]).argsort()[::-1]
        kept = min(int(len(items) * ratio), len(items))
        total += kept
        table = np.empty((len(segments), kept))
        for column, i in enumerate(order[:kept]):
            table[:, column] = tious_with(items[i][0], items[i][1], segments)
        tables.append(table)

    fractions = np.arange(1, 101) / 100.0 * (max_avg * float(len(videos)) / total)
    recall = np.zeros((len(tious), 100))
    for k, threshold in enumerate(tious):
        for point, fraction in enumerate(fractions):
            found = positives = 0
            for table in tables:
                allowed = min(int(table.shape[1] * fraction), table.shape[1])
                positives += len(table)
                found += sum(1 for row in table if any(value >= threshold for value in row[:allowed]))
            recall[k, point] = float(found) / float(positives)
    average = recall.mean(axis=0)
    per_video = fractions * (float(total) / len(videos))
    area = np.trapezoid(average, per_video) if hasattr(np, "trapezoid") else np.trapz(average, per_video)
    return per_video, recall, average, 100.0 * float(area) / per_video[-1]

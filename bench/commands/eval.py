"""The evaluator against the official procedure, on random detections of ActivityNet's size.

The procedure is there twice: as published, where pandas is installed (it is no dependency of this project), and with
the same arithmetic and no pandas, which is much faster. The gate is equality to the last bit. The procedure is timed on
a part of the videos, which the evaluator gets as well; the evaluator alone is timed on all of them too.
"""

from __future__ import annotations

import argparse
import importlib.util
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch

from bench.peers import official_map
from bench.tools.against import read_against
from bench.tools.gate import GateError
from bench.tools.measure import Stopwatch, interleaved, spread
from bench.tools.record import options, record
from bench.tools.rows import Row, environment, software
from bench.tools.table import Section, Table, by_place, newest, when
from lofi_fast.errors import InputError
from lofi_fast.metrics import average_recall, mean_average_precision, parse_tiou

VIDEOS, DETECTIONS, CLASSES = 4728, 100, 200  # of ActivityNet-1.3's validation, as usually submitted
PART = 240  # videos for the official procedure
PROPOSALS = 100  # the average number of proposals that AR@AN goes up to
SECONDS = 60.0  # that one form may take, at least three rounds
OURS, OFFICIAL, PUBLISHED = "ours", "official, without pandas", "official, as published"
METRICS = ("mAP", "AR@AN")


def main(argv: Sequence[str]) -> int:
    """Measure, append rows, print a table; 1 when a result was not the official one."""
    args = _parser().parse_args(argv)
    if args.threads < 1 or args.rounds < 1 or args.videos < 1:
        raise InputError("--threads, --rounds and --videos must be at least 1")
    torch.set_num_threads(args.threads)
    device = torch.device("cpu")
    old = read_against(args.against)
    videos, part = (40, 10) if args.quick else (args.videos, min(PART, args.videos))
    start = environment() | software(device, args.threads) | {"quick": args.quick}
    start["versions"]["numpy"] = np.__version__
    values = {"ms": ("ms",)}
    return record(
        "eval", all_metrics(videos, part, args.rounds), start, args, old, table, ("metric", "videos", "form"), values,
        line,
    )  # fmt: skip


def all_metrics(videos: int, part: int, rounds: int) -> Iterator[Row]:
    """Each metric over some of the videos by all forms, and over all of them by ours."""
    stopwatch = Stopwatch(torch.device("cpu"))
    ground_truth, predictions = detections(videos)
    some = set(list(ground_truth)[:part])
    less = tuple({name: found for name, found in full.items() if name in some} for full in (ground_truth, predictions))
    for metric in METRICS:
        official = (OURS, OFFICIAL, *published(metric))
        for (truth, found), forms in ((less, official), ((ground_truth, predictions), (OURS,))):
            yield from measure(metric, truth, found, forms, stopwatch, rounds)


def published(metric: str) -> tuple[str, ...]:
    """The form that needs pandas, where that is installed."""
    if metric != "mAP":
        return ()
    if importlib.util.find_spec("pandas") is None:
        print(f"{PUBLISHED}: left out, pandas is not installed here", flush=True)
        return ()
    return (PUBLISHED,)


def detections(videos: int, seed: int = 0) -> tuple[dict[str, list[Any]], dict[str, list[Any]]]:
    """(ground truth, predictions) of random videos: one class each, one to four segments; two classes are predicted,
    of which one is right in three videos out of four, and some segments are near the true ones.
    """
    rng = np.random.default_rng(seed)
    ground_truth: dict[str, list[Any]] = {}
    predictions: dict[str, list[Any]] = {}
    for index in range(videos):
        name, duration = f"video {index}", float(rng.uniform(20, 240))
        label = int(rng.integers(CLASSES))
        starts = np.sort(rng.uniform(0, 0.8 * duration, rng.integers(1, 5)))
        ends = starts + rng.uniform(0.05, 0.2, len(starts)) * duration
        ground_truth[name] = [(float(s), float(e), str(label)) for s, e in zip(starts, ends, strict=True)]
        chosen = rng.integers(len(starts), size=DETECTIONS)
        spread_of = rng.choice([0.02, 0.1, 0.5], DETECTIONS) * duration
        begins = np.clip(starts[chosen] + spread_of * rng.standard_normal(DETECTIONS), 0, duration)
        stops = np.maximum(begins, ends[chosen] + spread_of * rng.standard_normal(DETECTIONS))
        scores = rng.random(DETECTIONS)
        guessed = (label if rng.random() < 0.75 else int(rng.integers(CLASSES)), int(rng.integers(CLASSES)))
        labels = [str(guessed[k % 2]) for k in range(DETECTIONS)]
        predictions[name] = [
            (float(b), float(s), one, float(score))
            for b, s, one, score in zip(begins, stops, labels, scores, strict=True)
        ]
    return ground_truth, predictions


def measure(
    metric: str, ground_truth: Mapping[str, Any], predictions: Mapping[str, Any], forms: Sequence[str],
    stopwatch: Stopwatch, rounds: int,
) -> list[Row]:  # fmt: skip
    """A row for each form, ours first. Raises GateError."""
    tious = parse_tiou("activitynet")
    if metric == "mAP":
        calls: dict[str, Callable[[], Any]] = {
            OURS: partial(mean_average_precision, ground_truth, predictions, tious),
            OFFICIAL: partial(official_map.mean_average_precision, ground_truth, predictions, tious),
        }
    else:
        calls = {
            OURS: partial(average_recall, ground_truth, predictions, tious, PROPOSALS),
            OFFICIAL: partial(official_map.average_recall, ground_truth, predictions, tious, PROPOSALS),
        }
    if PUBLISHED in forms:
        from bench.peers import official_pandas

        calls[PUBLISHED] = partial(official_pandas.mean_average_precision, ground_truth, predictions, tious)
    calls = {name: calls[name] for name in forms}
    for name in forms[1:]:
        _gate(metric, calls[OURS](), calls[name](), name)
    samples = interleaved(calls, stopwatch, rounds, SECONDS)
    rows = []
    for name, seconds in samples.items():
        ratios = spread([theirs / mine for theirs, mine in zip(seconds, samples[OURS], strict=False)])
        timed = spread(seconds)
        rows.append({
            "metric": metric, "videos": len(ground_truth),
            "detections": sum(len(found) for found in predictions.values()), "form": name, "rounds": len(seconds),
            "ms": [round(1e3 * value, 2) for value in (timed.median, timed.p20, timed.p80)],
            "times_ours": [round(value, 2) for value in (ratios.median, ratios.p20, ratios.p80)],
        })  # fmt: skip
    return rows


def _gate(metric: str, ours: Any, official: Any, name: str) -> None:
    if metric == "mAP":
        classes, table, by_tiou, average = official
        equal = list(ours.classes) == classes and np.array_equal(ours.average_precision.T, table)
        equal = equal and np.array_equal(ours.map_by_tiou, by_tiou) and ours.average == average
    else:
        per_video, recall, curve, area = official
        equal = np.array_equal(ours.proposals_per_video, per_video) and np.array_equal(ours.recall, recall)
        equal = equal and np.array_equal(ours.average_recall, curve) and ours.auc == area
    if not equal:
        raise GateError(f"{metric}: the evaluator's result is not that of {name}, bit for bit")


def line(row: Row) -> str:
    return f"{row['metric']}, {row['videos']} videos, {row['form']}: {row['ms'][0]:.0f} ms"


def table(rows: Sequence[Row]) -> list[Section]:
    """Each way to evaluate, and how many times as long as ours it takes."""
    rows = newest(rows, ("metric", "videos", "form"))
    header = ("metric", "videos", "detections", "form", "ms", "time of ours, median (p20 to p80)")
    parts: list[Section] = []
    for where, here in by_place(rows):
        lines = []
        for row in here:
            median, low, high = row["times_ours"]
            counts = (f"{row['videos']:,}", f"{row['detections']:,}")
            ratio = f"{median:.1f}x ({low:.1f} to {high:.1f})"
            lines.append((row["metric"], *counts, row["form"], f"{row['ms'][0]:,.0f}", ratio))
        parts.append(Table(f"{where}; {when(here)}:", header, lines))
    return parts


def _parser() -> argparse.ArgumentParser:
    parser = options("eval", __doc__, "a few videos: does everything run?", 7, devices=False)
    parser.add_argument("--videos", type=int, default=VIDEOS, help=f"default: {VIDEOS}, ActivityNet's validation")
    return parser

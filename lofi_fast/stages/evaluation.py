"""Stage 4, eval: detections of the validation videos from their features, and mAP."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from pathlib import Path

import msgspec
import torch

from lofi_fast.data.annotations import is_activitynet
from lofi_fast.data.dataset import Sample
from lofi_fast.data.ground_truth import load_ground_truth
from lofi_fast.data.video_scores import load_video_scores
from lofi_fast.detections import Detection, write_predictions
from lofi_fast.errors import InputError
from lofi_fast.head.decoding import best_points, detections, point_candidates
from lofi_fast.head.protocol import NotFiniteOutput, Proposals
from lofi_fast.metrics import (
    GroundTruth,
    MapResult,
    Predictions,
    mean_average_precision,
    metrics_table,
    parse_tiou,
)
from lofi_fast.point_metrics import PointResult, parse_tolerance, point_precision, points_table
from lofi_fast.run import events, moments
from lofi_fast.run.state import Run
from lofi_fast.stages.features import extract, load_features

Result = MapResult | PointResult  # of segments, or of points in time


def _reported(run: Run, result: Result, as_given: Result | None) -> str:
    """What the table is of, and what it is not."""
    said = "these are weights that no head stage has trained"
    if run.head_epochs:
        said = f"these are the weights of the last epoch ({run.head_epochs}) of the head stage"
    if run.best:
        said += f"; the best on these videos was epoch {run.best['epoch'] + 1}, {100 * run.best['average']:.2f}"
    if as_given is not None:
        unread = as_given.num_videos - result.num_videos
        said += (
            f"; against the annotations as given ({as_given.num_videos} videos, of which {unread} were not read, "
            f"{as_given.num_segments} segments): average mAP {100 * as_given.average:.2f}"
        )
    return said


@torch.no_grad()
def detect_subset(run: Run, subset: str) -> dict[str, list[Detection]]:
    """Detections of every video of a subset from its cached features.

    Several processes share the videos, and all get the detections of all.
    """
    names = [video.name for video in run.dataset.videos[subset]]
    if not run.processes.several:
        return _detect(run, subset, names, _batches(run.dataset.samples[subset], run.config.head_stage.batch))
    size = run.config.head_stage.batch
    groups = run.processes.share(_groups(run.dataset.samples[subset], size))
    batches = [batch for group in groups for batch in _batches(group, size)]
    windowed = {sample.window.video for group in groups for sample in group}

    def detect() -> dict[str, list[Detection]]:
        return _detect(run, subset, [name for name in names if name in windowed], batches)

    shares = run.processes.together(f"detections of {subset} videos", detect, patient=True)
    found = {name: items for share in shares for name, items in share.items()}
    return {name: found.get(name, []) for name in names}


def _batches(samples: Sequence[Sample], size: int) -> list[Sequence[Sample]]:
    return [samples[k : k + size] for k in range(0, len(samples), size)]


def _groups(samples: Sequence[Sample], size: int) -> list[list[Sample]]:
    """Windows in order, in groups of whole videos with `size` windows or a few more: where every video is one window,
    the batches of a single process.
    """
    groups: list[list[Sample]] = [[]]
    for _, windows in groupby(samples, key=lambda sample: sample.window.video):
        if len(groups[-1]) >= size:
            groups.append([])
        groups[-1].extend(windows)
    return groups


def _detect(
    run: Run, subset: str, names: Sequence[str], batches: Sequence[Sequence[Sample]]
) -> dict[str, list[Detection]]:
    """Detections of the videos `names`, whose windows are in the batches."""
    config = run.config
    run.head.eval()
    proposals: dict[str, list[Proposals]] = {name: [] for name in names}
    for batch in batches:
        with run.machine.autocast():
            output = run.head(load_features(run, batch))
        try:
            found = run.head.proposals(output, [run.sampler.edges(sample, config.full) for sample in batch])
        except NotFiniteOutput:
            raise InputError(
                f"the head's output on {batch[0].window.video} is not finite, its training has diverged: "
                "start again with a lower --head-lr and another --out"
            ) from None
        for sample, window in zip(batch, found, strict=True):
            proposals[sample.window.video].append(window)
    durations = run.dataset.durations(subset)
    if config.points:
        return {
            name: best_points(
                [point_candidates(window, duration=durations[name]) for window in windows], run.dataset.classes,
                suppression=config.spotting.suppression, top_k=config.detect.top_k,
            )
            for name, windows in proposals.items()
        }  # fmt: skip
    scores = None
    if config.data.video_scores:
        scores = load_video_scores(Path(config.data.video_scores), list(proposals), list(run.dataset.classes))
    return {
        name: detections(
            windows, run.dataset.classes, duration=durations[name], sigma=config.detect.sigma,
            voting=config.detect.voting,
            top_k=config.detect.top_k, labels_per_proposal=config.detect.labels_per_proposal,
            video_scores=None if scores is None else scores[name],
        )
        for name, windows in proposals.items()
    }  # fmt: skip


def _scored(run: Run, truth: GroundTruth, found: dict[str, list[Detection]]) -> Result:
    """mAP at the run's tIoUs, or its tolerances where points are what was looked for."""
    predictions: Predictions = {name: [(d.start, d.end, d.label, d.score) for d in of] for name, of in found.items()}
    config = run.config
    if config.points:
        return point_precision(truth, predictions, parse_tolerance(config.detect.tolerances, config.data.fps))
    return mean_average_precision(truth, predictions, parse_tiou(config.detect.tious))


def score(run: Run, found: dict[str, list[Detection]]) -> Result:
    """mAP of validation detections."""
    truth = {v.name: [(s.start, s.end, s.label) for s in v.segments] for v in run.dataset.videos["validation"]}
    return _scored(run, truth, found)


def by_threshold(result: Result) -> dict[str, float | None]:
    """mAP by tIoU, or by tolerance in seconds."""
    if isinstance(result, PointResult):
        thresholds, values = result.tolerances.seconds, result.map_by_tolerance
    else:
        thresholds, values = result.tious, result.map_by_tiou
    return {f"{threshold:g}": float(value) for threshold, value in zip(thresholds, values, strict=True)}


def score_as_given(run: Run, found: dict[str, list[Detection]]) -> Result | None:
    """The same against all videos and segments of the annotation file: those of videos that could not be read are
    missed, and none is clipped or left out as a duplicate. None where the file is no ActivityNet JSON.
    """
    path = run.dataset.annotations
    if path is None or path.suffix.lower() != ".json" or not is_activitynet(path):
        return None
    try:
        return _scored(run, load_ground_truth(path), found)
    except InputError as error:
        run.log.say(f"note: no mAP against the annotations as given: {error}")
        return None


def looked_at(run: Run, found: dict[str, list[Detection]]) -> moments.Moments:
    """What the report shows of the validation videos, with pictures from the frame cache."""
    truth = {
        video.name: [moments.Labelled(video.name, s.start, s.end, s.label) for s in video.segments]
        for video in run.dataset.videos["validation"]
    }
    entries = {sample.window.video: sample.cached for sample in run.dataset.samples["validation"]}
    return moments.pictured(moments.moments(truth, found), entries)


def evaluate(run: Run) -> Result | None:
    """Detect on the validation videos, write predictions, ground truth and metrics; None without such videos."""
    if run.due("eval") is None:
        return None
    videos = run.dataset.videos["validation"]
    if not any(video.segments for video in videos):
        run.log.say("no validation video has a segment: nothing to evaluate")
        return None
    run.encoder.eval()
    run.encoder.freeze_batchnorm()
    extract(run)
    found = detect_subset(run, "validation")
    if not run.processes.first:
        return None
    result = score(run, found)
    as_given = score_as_given(run, found)
    write_predictions(run.folder / "predictions.json", found)
    if not run.config.points:
        run.write_json(moments.FILE, looked_at(run, found))
    run.write_json(
        "ground_truth.json",
        {
            "version": "lofi_fast",
            "database": {
                video.name: {
                    "subset": "validation",
                    "duration": run.dataset.durations("validation")[video.name],
                    "annotations": [{"segment": [s.start, s.end], "label": s.label} for s in video.segments],
                }
                for video in videos
            },
        },
    )
    metrics = events.Metrics(
        average_map=result.average,
        map_by_tiou={} if run.config.points else by_threshold(result),
        map_by_tolerance=by_threshold(result) if run.config.points else {},
        average_precision={
            name: [float(x) for x in row] for name, row in zip(result.classes, result.average_precision, strict=True)
        },
        best_epoch=run.best or None,
        videos=len(videos),
        segments=sum(len(video.segments) for video in videos),
        average_map_as_given=None if as_given is None else as_given.average,
        epoch=run.head_epochs - 1 if run.head_epochs else None,
    )
    content = msgspec.structs.asdict(metrics)
    del content["time"]
    run.write_json("metrics.json", content)
    run.log.event(metrics)
    run.log.say(points_table(result) if isinstance(result, PointResult) else metrics_table(result))
    run.log.say(_reported(run, result, as_given))
    return result

"""Stage 4, eval: detections of the validation videos from their features, and mAP."""

from __future__ import annotations

from pathlib import Path

import msgspec
import numpy as np
import torch

from lofi_fast.data.dataset import Sample
from lofi_fast.data.video_scores import load_video_scores
from lofi_fast.detections import Detection, write_predictions
from lofi_fast.errors import InputError
from lofi_fast.head.gtad import HeadOutput
from lofi_fast.head.gtad_decoding import WindowMaps, detections
from lofi_fast.metrics import MapResult, mean_average_precision, metrics_table, parse_tiou
from lofi_fast.run import events
from lofi_fast.run.state import Run
from lofi_fast.stages.features import extract, load_features


def window_maps(run: Run, sample: Sample, output: HeadOutput, row: int) -> WindowMaps:
    """One window's probabilities out of a batch's logits, as maps over (duration, start)."""
    length = output.start_BL.shape[1]
    d, s = (index.cpu().numpy() for index in output.cells_N2.unbind(1))
    num_durations = int(d.max()) + 1
    confidence = np.zeros((num_durations, length))
    confidence[d, s] = output.proposals_B2N[row].float().sigmoid().prod(dim=0).cpu().numpy()
    classes = output.classes_BKN[row].float().softmax(dim=0)[:-1].cpu().numpy()
    class_probs = np.zeros((len(classes), num_durations, length))
    class_probs[:, d, s] = classes
    return WindowMaps(
        edges=run.sampler.edges(sample, run.config.full),
        start=output.start_BL[row].float().sigmoid().cpu().numpy(),
        end=output.end_BL[row].float().sigmoid().cpu().numpy(),
        confidence=confidence,
        class_probs=class_probs,
    )


@torch.no_grad()
def detect_subset(run: Run, subset: str) -> dict[str, list[Detection]]:
    """Detections of every video of a subset from its cached features."""
    config = run.config
    run.head.eval()
    maps: dict[str, list[WindowMaps]] = {video.name: [] for video in run.dataset.videos[subset]}
    samples = run.dataset.samples[subset]
    for k in range(0, len(samples), config.head_stage.batch):
        batch = samples[k : k + config.head_stage.batch]
        with run.precision.autocast(run.device):
            output = run.head(load_features(run, batch))
        logits = (output.start_BL, output.end_BL, output.proposals_B2N, output.classes_BKN)
        if not all(bool(part.isfinite().all()) for part in logits):
            raise InputError(
                f"the head's output on {batch[0].window.video} is not finite, its training has diverged: "
                "start again with a lower --head-lr and another --out"
            )
        for row, sample in enumerate(batch):
            maps[sample.window.video].append(window_maps(run, sample, output, row))
    durations = run.dataset.durations(subset)
    scores = None
    if config.data.video_scores:
        scores = load_video_scores(Path(config.data.video_scores), list(maps), list(run.dataset.classes))
    return {
        name: detections(
            windows, run.dataset.classes, duration=durations[name], sigma=config.detect.sigma,
            top_k=config.detect.top_k, labels_per_proposal=config.detect.labels_per_proposal,
            video_scores=None if scores is None else scores[name],
        )
        for name, windows in maps.items()
    }  # fmt: skip


def score(run: Run, found: dict[str, list[Detection]]) -> MapResult:
    """mAP of validation detections at the run's tIoUs."""
    truth = {v.name: [(s.start, s.end, s.label) for s in v.segments] for v in run.dataset.videos["validation"]}
    predictions = {name: [(d.start, d.end, d.label, d.score) for d in items] for name, items in found.items()}
    return mean_average_precision(truth, predictions, parse_tiou(run.config.detect.tious))


def evaluate(run: Run) -> MapResult | None:
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
    result = score(run, found)
    write_predictions(run.folder / "predictions.json", found)
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
        map_by_tiou={f"{t:g}": float(m) for t, m in zip(result.tious, result.map_by_tiou, strict=True)},
        average_precision={
            name: [float(x) for x in row] for name, row in zip(result.classes, result.average_precision, strict=True)
        },
        best_epoch=run.best or None,
        videos=len(videos),
        segments=sum(len(video.segments) for video in videos),
    )
    run.write_json("metrics.json", msgspec.structs.asdict(metrics))
    run.log.event(metrics)
    run.log.say(metrics_table(result))
    return result

"""Stages 3 and 4, head and eval: a fresh head on the frozen encoder's full-fidelity features, then detections."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from lofi_fast.checkpoint import Position
from lofi_fast.data.dataset import Sample
from lofi_fast.detect import Detection, WindowMaps, detections, load_video_scores, write_predictions
from lofi_fast.errors import InputError
from lofi_fast.evaluate import MapResult, mean_average_precision, metrics_table, parse_tiou
from lofi_fast.extract import encoder_digest, extract, feature_path
from lofi_fast.head.gtad import HeadOutput
from lofi_fast.head.loss import Counts, tal_loss
from lofi_fast.head.targets import Targets
from lofi_fast.joint import targets_of
from lofi_fast.optim import learning_rate, make_optimizer, set_learning_rate
from lofi_fast.run import Run, seed_of

WATCH_WINDOWS = 500  # up to so many validation windows, mAP is measured after each epoch; beyond, after the last


def load_features(run: Run, samples: Sequence[Sample]) -> Tensor:
    """Features (B, C, L) of windows, on the device."""
    features = [torch.from_numpy(np.load(feature_path(run, sample))) for sample in samples]
    return torch.stack(features).to(run.device)


def train_head(run: Run) -> None:
    """Freeze the encoder, extract features once, train the head from scratch on them."""
    start = run.due("head")
    config = run.config.head_stage
    if start is None or config.epochs == 0:
        return
    run.encoder.freeze_batchnorm()
    run.encoder.eval().requires_grad_(False)
    before = encoder_digest(run)
    extract(run)
    if start == Position("head"):
        run.head = run.new_head("head")
        run.best = {}
    torch.manual_seed(seed_of(run.config.seed, "head"))
    optimizer = make_optimizer(config, run.head.parameters(), run.config.optimizer_impl)
    if state := run.optimizer_state():
        optimizer.load_state_dict(state)
    scored = any(video.segments for video in run.dataset.videos["validation"])
    watch = len(run.dataset.samples["validation"]) <= WATCH_WINDOWS

    for epoch in range(start.epoch, config.epochs):
        order = run.sampler.epoch("head", epoch, config.batch)
        first = start.step if epoch == start.epoch else 0
        run.head.train()
        total = 0.0
        with run.log.progress(f"head {epoch + 1}/{config.epochs}", len(order), first) as advance:
            for step, samples in enumerate(order[first:], first):
                lr = learning_rate(config, epoch, step, len(order))
                set_learning_rate(optimizer, lr)
                numbers = head_step(run, samples, epoch, optimizer)
                total += numbers["loss"]
                run.log.event("step", stage="head", epoch=epoch, step=step, lr=lr, **numbers)
                advance(step + 1, f"loss {total / (step + 1 - first):.3f}")
                run.save_when_due(Position("head", epoch, step + 1), optimizer)
        if scored and (watch or epoch + 1 == config.epochs):
            result = score(run, detect_subset(run, "validation"))
            run.log.event("validation", stage="head", epoch=epoch, average=result.average, map=list(result.map_by_tiou))
            run.save_best(epoch, result.average)
        run.save(Position("head", epoch + 1), optimizer)
    if encoder_digest(run) != before:
        raise RuntimeError("the encoder changed during the head stage")
    run.finish("head")


def head_step(run: Run, samples: Sequence[Sample], epoch: int, optimizer: torch.optim.Optimizer) -> dict[str, float]:
    """One optimiser step of the head on cached features."""
    config = run.config
    targets = [targets_of(run, sample, config.full, "head", epoch) for sample in samples]
    with run.precision.autocast(run.device):
        output = run.head(run.dropout(load_features(run, samples), samples, "head", epoch))
    terms = tal_loss(
        output,
        Targets.stack(targets, run.device),
        Counts.of(targets, len(run.dataset.classes), config.head.positive_iou),
        positive_iou=config.head.positive_iou,
        class_weight=config.head_stage.class_loss,
    )
    run.scaler.scale(terms.total).backward()
    run.scaler.step(optimizer)
    run.scaler.update()
    optimizer.zero_grad(set_to_none=True)
    return terms.numbers()


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
    metrics = {
        "average_map": result.average,
        "map_by_tiou": {f"{t:g}": float(m) for t, m in zip(result.tious, result.map_by_tiou, strict=True)},
        "average_precision": {
            name: [float(x) for x in row] for name, row in zip(result.classes, result.average_precision, strict=True)
        },
        "best_epoch": run.best or None,
        "videos": len(videos),
        "segments": sum(len(video.segments) for video in videos),
    }
    run.write_json("metrics.json", metrics)
    run.log.event("metrics", **metrics)
    run.log.say(metrics_table(result))
    return result

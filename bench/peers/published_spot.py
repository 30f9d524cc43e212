"""Our spotting head, and the mAP of its points, and E2E-Spot (jhong93/spot): the same weights, inputs and predictions.

What that code imports beside and does not use here (torchvision, tabulate) is stood in for.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock, patch

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from bench.tools.rows import Row
from lofi_fast.config import SpottingConfig
from lofi_fast.head.decoding import Candidates, best_points
from lofi_fast.head.spotting import Spotting
from lofi_fast.point_metrics import Tolerances, point_precision

FEATURES, CLASSES, LENGTH, BATCH = 24, 4, 50, 3
VIDEOS, FRAMES, POINTS = 6, 400, 25  # of the predictions that are evaluated; true points in a video
TOLERANCES = (0, 1, 2, 4)  # frames, which stand for seconds here
WINDOW = 2  # frames, of the suppression
UNUSED = ("torchvision", "torchvision.transforms", "torchvision.transforms.functional", "tabulate")


def compared(folder: Path) -> Iterator[Row]:
    """Forward, labels, loss, suppression and mAP, in float64."""
    torch.manual_seed(0)
    modules, dataset, evaluation, scoring = (
        _module(folder, name) for name in ("model.modules", "dataset.frame", "util.eval", "util.score")
    )
    config = SpottingConfig(dilation=1)
    ours = Spotting(config, FEATURES, CLASSES).double().eval()
    theirs = modules.GRUPrediction(FEATURES, CLASSES + 1, FEATURES).double().eval()
    theirs._gru.load_state_dict(ours.recurrent.state_dict())
    theirs._fc_out._fc_out.load_state_dict(ours.classifier.state_dict())
    features = torch.randn(BATCH, LENGTH, FEATURES, dtype=torch.float64)
    with torch.no_grad():
        logits = theirs(features)
        output = ours(features.transpose(1, 2))
    yield _row("scores", logits.softmax(dim=2), output.softmax(dim=1).transpose(1, 2))

    random = np.random.default_rng(0)
    points = [np.sort(random.choice(LENGTH // 4, 5, replace=False)) * 4 for _ in range(BATCH)]  # dilated, still apart
    labels = [random.integers(0, CLASSES, 5) for _ in points]
    edges = np.arange(LENGTH + 1.0)
    mine = [
        ours.targets(edges, np.stack([at, at], axis=1) + 0.5, of, random) for at, of in zip(points, labels, strict=True)
    ]
    given = torch.from_numpy(np.stack([_labels(dataset, at, of) for at, of in zip(points, labels, strict=True)]))
    yield _row("labels, dilated", given, torch.stack(mine))

    weight = torch.tensor([1.0] + [config.point_weight] * CLASSES)  # as their training gives it
    loss = F.cross_entropy(logits.float().reshape(-1, CLASSES + 1), given.flatten(), weight)
    yield _row("loss", loss, ours.loss(output, mine, ours.counts(mine), 1.0)["classes"])

    truth, found = _predictions(random)
    kept = evaluation.non_maximum_supression(found, WINDOW)
    yield _row("points kept by the suppression", _events(kept), _events([_suppressed(video) for video in found]))
    ground = {v["video"]: [(e["frame"], e["frame"], e["label"]) for e in v["events"]] for v in truth}
    for name, events in (("mAP by tolerance, all predictions", found), ("mAP by tolerance, those kept", kept)):
        with contextlib.redirect_stdout(io.StringIO()):
            expected, _ = scoring.compute_mAPs(truth, events, list(TOLERANCES))
        rows = {v["video"]: [(e["frame"], e["frame"], e["label"], e["score"]) for e in v["events"]] for v in events}
        result = point_precision(ground, rows, Tolerances(np.array(TOLERANCES, dtype=np.float64)))
        yield _row(name, torch.tensor(np.array(expected)), torch.from_numpy(result.map_by_tolerance))


def _predictions(random: np.random.Generator) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """(true events, predictions) of some videos as their files have them; predictions gather around the true ones."""
    truth, found = [], []
    scores = iter(random.permutation(10**5) / 10**5)  # no two alike
    for number in range(VIDEOS):
        frames = np.sort(random.choice(FRAMES, POINTS, replace=False))
        labels = random.integers(0, CLASSES, POINTS)
        events = [{"frame": int(frame), "label": str(label)} for frame, label in zip(frames, labels, strict=True)]
        near = [
            (int(frame + random.integers(-5, 6)), str(label))
            for frame, label in zip(frames, labels, strict=True) for _ in range(4)
        ]  # fmt: skip
        far = [(int(random.integers(FRAMES)), str(random.integers(CLASSES))) for _ in range(60)]
        predicted = [
            {"frame": frame, "label": label, "score": float(next(scores))} for frame, label in sorted({*near, *far})
        ]
        truth.append({"video": f"v{number}", "events": events})
        found.append({"video": f"v{number}", "events": predicted})
    return truth, found


def _suppressed(video: dict[str, Any]) -> dict[str, Any]:
    """What our suppression keeps, in their form."""
    times = np.array([event["frame"] for event in video["events"]], dtype=np.float64)
    window = Candidates(
        np.stack([times, times], axis=1),
        np.array([event["score"] for event in video["events"]]),
        np.array([int(event["label"]) for event in video["events"]]),
    )
    classes = [str(label) for label in range(CLASSES)]
    kept = best_points([window], classes, suppression=WINDOW, top_k=len(times))
    return {"events": [{"frame": d.start, "label": d.label, "score": d.score} for d in kept]}


def _events(videos: list[dict[str, Any]]) -> Tensor:
    """(events, 3) frame, label and score, video by video."""
    rows = [sorted((e["frame"], int(e["label"]), e["score"]) for e in video["events"]) for video in videos]
    return torch.tensor([row for of in rows for row in of], dtype=torch.float64)


def _labels(dataset: Any, frames: np.ndarray[Any, Any], labels: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Of a clip that begins with its video, made by the released code with a dilation of one frame."""
    made = dataset.ActionSpotDataset.__new__(dataset.ActionSpotDataset)
    made._fg_upsample, made._clip_len, made._stride, made._dilate_len, made._is_eval = 0, LENGTH, 1, 1, True
    made._class_dict = {str(label): label + 1 for label in range(CLASSES)}
    made._frame_reader = SimpleNamespace(load_frames=lambda *_, **__: None)
    events = [{"frame": int(frame), "label": str(label)} for frame, label in zip(frames, labels, strict=True)]
    made._sample_uniform = lambda: ({"video": "v", "events": events}, 0)
    result: np.ndarray[Any, Any] = made._get_one()["label"]
    return result


def _module(folder: Path, name: str) -> Any:
    """A file of the clone, whose packages are called like anything."""
    before = set(sys.modules)
    sys.path.insert(0, str(folder))
    try:
        with patch.dict(sys.modules, {unused: MagicMock() for unused in UNUSED}):
            return importlib.import_module(name)
    finally:
        sys.path.remove(str(folder))
        for new in set(sys.modules) - before:
            if new.partition(".")[0] in ("model", "dataset", "util"):
                del sys.modules[new]


def _row(what: str, theirs: Tensor, ours: Tensor) -> Row:
    error = (theirs.double() - ours.double()).abs().max() / theirs.double().abs().max().clamp(min=1e-300)
    return {"of": "E2E-Spot", "what": what, "dtype": "float64", "error": float(error), "numbers": theirs.numel()}

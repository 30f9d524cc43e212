"""Our BMN and the released one (JJBOY/BMN-Boundary-Matching-Network) with the same weights on the same inputs.

What that code draws or rounds is made the same: its sampling weights are worked out in float64, its losses get the
cells that ours draws for the regression, and scores without the 1e-6 that it adds under its logarithms.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor

from bench.tools.rows import Row
from lofi_fast.config import BMNConfig, HeadConfig
from lofi_fast.head.bmn import BMN
from lofi_fast.head.map_decoding import WindowMaps, proposals
from lofi_fast.head.targets import REGRESSION_HIGH

FEATURES, CLASSES, LENGTH, BATCH = 24, 3, 24, 2
UNDER_LOGARITHM = 1e-6
NAMES = {  # of their layers, ours
    "x_1d_b.0": "base.0.0", "x_1d_b.2": "base.1.0", "x_1d_s.0": "start.0.0", "x_1d_s.2": "start.1",
    "x_1d_e.0": "end.0.0", "x_1d_e.2": "end.1", "x_1d_p.0": "sampled.0", "x_3d_p.0": "inner", "x_2d_p.0": "reduce",
    "x_2d_p.2": "middle1", "x_2d_p.4": "middle2", "x_2d_p.6": "last",
}  # fmt: skip


def compared(folder: Path) -> Iterator[Row]:
    """Forward, labels, losses and proposals, in float64."""
    torch.manual_seed(0)
    models, dataset, losses = (_module(folder, name) for name in ("models", "dataset", "loss_function"))
    theirs = _published(models)
    ours = BMN(HeadConfig(), BMNConfig(), FEATURES, CLASSES, LENGTH).double()
    state = {name: torch.randn_like(value) * 2 / value[0].numel() ** 0.5 for name, value in ours.state_dict().items()}
    state["last.weight"] /= 10  # scores of which float64 tells the logarithms
    ours.load_state_dict(state)
    for their, mine in NAMES.items():
        for part in ("weight", "bias"):
            parameter = theirs.get_parameter(f"{their}.{part}")
            parameter.data = state[f"{mine}.{part}"].reshape(parameter.shape).clone()

    features = torch.randn(BATCH, FEATURES, LENGTH, dtype=torch.float64)
    with torch.no_grad():
        confidence, start, end = theirs(features)
        output = ours(features)
    d, s = output.cells_N2.unbind(1)
    scores = output.proposals_B2N.sigmoid()
    yield _row("start and end", torch.cat([start, end]), torch.cat([output.start_BL, output.end_BL]).sigmoid())
    yield _row("confidence", confidence[:, :, s, s + d], scores)

    segments = np.array([[1.3, 9.2], [5.5, 6.9], [12.0, 23.4]])
    random = np.random.default_rng(0)
    mine = ours.targets(np.arange(LENGTH + 1.0), segments, np.array([0, 1, 2]), random)
    labels = _labels(dataset, segments)
    iou = labels[2][s, s + d]
    yield _row("labels: start and end", torch.cat(labels[:2]), torch.cat([mine.start, mine.end]))
    yield _row("labels: tIoU", iou, mine.iou)

    counts = ours.counts([mine] * BATCH)
    terms = ours.loss(output, [mine] * BATCH, counts, 0.0)
    starts, ends = (label.repeat(BATCH, 1) for label in labels[:2])
    boundary = losses.tem_loss_func(_exact(start, starts, 0.5), _exact(end, ends, 0.5), starts, ends)
    yield _row("loss of start and end", boundary, terms["boundary"])
    iou_map = labels[2].repeat(BATCH, 1, 1)
    mask = losses.get_mask(LENGTH).double()
    entropy = losses.pem_cls_loss_func(_exact(confidence[:, 1], iou_map, 0.9), iou_map, mask)
    yield _row("loss of the confidence", entropy, terms["confidence"])
    drawn = np.zeros((BATCH, LENGTH, LENGTH))
    drawn[:, s, s + d] = mine.regression & (mine.iou <= REGRESSION_HIGH)
    with (
        patch.object(losses, "np", SimpleNamespace(random=SimpleNamespace(rand=lambda *_: drawn))),
        patch.object(Tensor, "cuda", lambda self: self),
    ):
        regression = losses.pem_reg_loss_func(confidence[:, 0], iou_map, mask)
    yield _row("loss of the regression", regression, terms["regression"] / ours.config.regression_loss)

    maps = np.zeros((LENGTH, LENGTH))
    maps[d, s] = scores[0].prod(dim=0)
    found = WindowMaps(np.linspace(0, 1, LENGTH + 1), *(row[0].numpy() for row in (start, end)), maps)
    cells, found_segments, found_scores = proposals(found, peak_fraction=0.0, with_boundaries=True)
    inside = cells.sum(axis=1) + 1 < LENGTH  # theirs has none that ends with the window
    rows = np.column_stack([found_segments, found_scores])[inside]
    yield _row(
        "proposals of every pair of boundaries", torch.tensor(_pairs(confidence, start, end)), torch.tensor(rows)
    )


def _pairs(confidence: Tensor, start: Tensor, end: Tensor) -> list[list[float]]:
    """The proposals of the first window as the released main.py combines them, by duration, then start."""
    both = confidence[0].prod(dim=0)
    return [
        [s / LENGTH, (s + d + 1) / LENGTH, float(start[0, s] * end[0, s + d + 1] * both[s, s + d])]
        for d in range(LENGTH) for s in range(LENGTH - d - 1)
    ]  # fmt: skip


def _exact(scores: Tensor, labels: Tensor, threshold: float) -> Tensor:
    """Scores of which the released loss takes the logarithms that ours does."""
    return torch.where(labels > threshold, scores - UNDER_LOGARITHM, scores + UNDER_LOGARITHM)


def _labels(dataset: Any, segments: np.ndarray[Any, Any]) -> tuple[Tensor, Tensor, Tensor]:
    """Start (L,), end (L,) and tIoU (start, last snippet) of a video of LENGTH seconds, made by the released code."""
    made = dataset.VideoDataSet.__new__(dataset.VideoDataSet)
    made.temporal_scale, made.temporal_gap = LENGTH, 1 / LENGTH
    video = {
        "duration_frame": LENGTH, "duration_second": LENGTH, "feature_frame": LENGTH,
        "annotations": [{"segment": list(segment)} for segment in segments],
    }  # fmt: skip
    made.video_list, made.video_dict = ["v"], {"v": video}
    anchors = ([(i + side) / LENGTH for i in range(LENGTH)] for side in (-0.5, 0.5))
    start, end, iou = made._get_train_label(0, *anchors)
    return start.double(), end.double(), iou.double()


def _published(models: Any) -> Any:
    settings = {
        "temporal_scale": LENGTH, "prop_boundary_ratio": 0.5, "num_sample": 32, "num_sample_perbin": 3,
        "feat_dim": FEATURES,
    }  # fmt: skip
    torch.set_default_dtype(torch.float64)
    try:
        with patch.object(models, "np", SimpleNamespace(zeros=np.zeros, stack=np.stack, float32=np.float64)):
            return models.BMN(settings)
    finally:
        torch.set_default_dtype(torch.float32)


def _module(folder: Path, name: str) -> Any:
    """A file of the clone, whose own imports are of files beside it."""
    sys.path.insert(0, str(folder))
    stand_in = ModuleType("pandas")
    try:
        with patch.dict(sys.modules, {} if "pandas" in sys.modules else {"pandas": stand_in}):
            module = importlib.import_module(name)
            del sys.modules[name]
        return module
    finally:
        sys.path.remove(str(folder))
        sys.modules.pop("utils", None)


def _row(what: str, theirs: Tensor, ours: Tensor) -> Row:
    error = (theirs.double() - ours.double()).abs().max() / theirs.double().abs().max().clamp(min=1e-300)
    return {"of": "BMN", "what": what, "dtype": "float64", "error": float(error), "numbers": theirs.numel()}

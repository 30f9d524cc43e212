"""Our ActionFormer and the published one (happyharrycn/actionformer_release) with the same weights on the same inputs.

Its package of utilities, which needs an extension to be compiled, is not loaded: nothing of it is compared here.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bench.tools.rows import Row
from lofi_fast.config import ActionFormerConfig
from lofi_fast.head.actionformer_head import ActionFormerHead, make_targets

CONFIG = ActionFormerConfig(hidden=32, attention_heads=4, attention_window=9, levels=4)
FEATURES, CLASSES, LENGTH, BLOCKS = 24, 5, 64, 5
SETTINGS: dict[str, Any] = {
    "backbone_type": "convTransformer", "fpn_type": "identity", "backbone_arch": (2, 2, 3), "scale_factor": 2,
    "input_dim": FEATURES, "max_seq_len": LENGTH, "max_buffer_len_factor": 1.0, "n_head": 4, "n_mha_win_size": 9,
    "embd_kernel_size": 3, "embd_dim": 32, "embd_with_ln": True, "fpn_dim": 32, "fpn_with_ln": True,
    "fpn_start_level": 0, "head_dim": 32, "regression_range": [(0, 4), (4, 8), (8, 16), (16, 10000)],
    "head_num_layers": 3, "head_kernel_size": 3, "head_with_ln": True, "use_abs_pe": False, "use_rel_pe": False,
    "num_classes": CLASSES,
    "train_cfg": {
        "center_sample": "radius", "center_sample_radius": 1.5, "loss_weight": 1.0, "cls_prior_prob": 0.01,
        "init_loss_norm": 100, "dropout": 0.0, "droppath": 0.1, "label_smoothing": 0.0, "head_empty_cls": [],
    },
    "test_cfg": {
        "pre_nms_thresh": 0.0, "pre_nms_topk": 10**6, "iou_threshold": 0.1, "min_score": 0.001, "max_seg_num": 200,
        "nms_method": "soft", "duration_thresh": 0.05, "multiclass_nms": True, "nms_sigma": 0.5, "voting_thresh": 0.7,
    },
}  # fmt: skip


def compared(folder: Path) -> Iterator[Row]:
    """Forward, labels, losses and decoded segments, in float64 where the published code has it."""
    torch.manual_seed(0)
    theirs = _published(folder).double().eval()
    ours = ActionFormerHead(CONFIG, FEATURES, CLASSES).double().eval()
    state = {name: torch.randn_like(value) * 0.3 for name, value in ours.state_dict().items()}
    ours.load_state_dict(state)
    same = {their: state[mine] for their, mine in _names()}
    same |= {f"reg_head.scale.{level}.scale": factor for level, factor in enumerate(state["factors"])}
    theirs.load_state_dict({name: same[name].reshape(value.shape) for name, value in theirs.state_dict().items()})

    features = torch.randn(2, FEATURES, LENGTH, dtype=torch.float64)
    with torch.no_grad():
        mask = torch.ones(2, 1, LENGTH, dtype=torch.bool)
        levels, masks = theirs.neck(*theirs.backbone(features, mask))
        classes, distances = theirs.cls_head(levels, masks), theirs.reg_head(levels, masks)
        output = ours(features)
    yield _row("class logits", torch.cat(classes, 2), output.classes_BKP)
    yield _row("distances", torch.cat(distances, 2), output.distances_B2P)

    rng = np.random.default_rng(0)
    segments = np.sort(rng.uniform(0, LENGTH - 1, (12, 2)), axis=1)
    labels = rng.integers(0, CLASSES, len(segments))
    points = list(theirs.point_generator(levels))
    shown, offsets = theirs.label_points_single_video(
        torch.cat(points).double(), torch.from_numpy(segments), torch.from_numpy(labels)
    )
    edges = np.arange(LENGTH + 1) - 0.5  # seconds that are snippets
    targets = make_targets(CONFIG, CLASSES, edges, segments, labels)
    yield _row("labels: classes", shown.T, targets.classes)
    yield _row("labels: distances", offsets.T[:, targets.positive], targets.distances[:, targets.positive])

    sizes = [level.shape[2] for level in levels]
    by_level = [[part.transpose(1, 2) for part in parts] for parts in (classes, distances)]
    counts = ours.counts([targets, targets])
    theirs.loss_normalizer, theirs.loss_normalizer_momentum = float(counts.positive), 1.0
    there = [torch.ones(2, size, dtype=torch.bool) for size in sizes]
    losses = theirs.losses(there, *by_level, [shown.double()] * 2, [offsets.double()] * 2)
    mine = ours.loss(output, [targets, targets], counts, 1.0)
    yield _row("loss of the classes, normalised by the same count", losses["cls_loss"], mine["classes"])
    yield _row("loss of the distances, normalised by the same count", losses["reg_loss"], mine["distances"])

    one = [torch.ones(size, dtype=torch.bool) for size in sizes]
    decoded = theirs.inference_single_video(points, one, *([part[0] for part in parts] for parts in by_level))
    found = ours.proposals(output, [edges] * 2)[0]
    assert found.class_probs_KP is not None
    labels_of = np.arange(CLASSES)[:, None].repeat(len(found.scores_P), 1)
    ends = np.repeat(found.segments_P2.T[:, None], CLASSES, 1)
    mine_rows = np.stack([*ends, labels_of, found.class_probs_KP]).reshape(4, -1).T
    cut = decoded["segments"].double().numpy().clip(edges[0], edges[-1])
    their_rows = np.column_stack([cut, decoded["labels"].numpy(), decoded["scores"].double().numpy()])
    if len(mine_rows) != len(their_rows):
        raise ValueError(f"{len(mine_rows)} segments are decoded, and {len(their_rows)} by the published code")
    order = [np.lexsort(rows.round(6).T) for rows in (their_rows, mine_rows)]
    yield _row("decoded segments, classes and scores", *(
        torch.from_numpy(rows[by]) for rows, by in zip((their_rows, mine_rows), order, strict=True)
    ))  # fmt: skip


def _row(what: str, theirs: Tensor, ours: Tensor) -> Row:
    error = (theirs.double() - ours.double()).abs().max() / theirs.double().abs().max().clamp(min=1e-300)
    return {"of": "ActionFormer", "what": what, "dtype": "float64", "error": float(error), "numbers": theirs.numel()}


def _published(folder: Path) -> Any:
    sys.path.insert(0, str(folder))
    try:
        utilities: Any = ModuleType("libs.utils")
        utilities.batched_nms = None
        sys.modules["libs.utils"] = utilities
        return importlib.import_module("libs.modeling.meta_archs").PtTransformer(**SETTINGS)
    finally:
        sys.path.remove(str(folder))
        sys.modules.pop("libs.utils", None)


def _names() -> Iterator[tuple[str, str]]:
    """(the published name, ours) of each parameter but the factors of the distances."""
    both = ("weight", "bias")
    for i in range(2):
        yield f"backbone.embd.{i}.conv.weight", f"embed.{i}.weight"
        yield from ((f"backbone.embd_norm.{i}.{part}", f"embed_norms.{i}.{part}") for part in both)
    for i, their in enumerate([*(f"backbone.stem.{i}" for i in range(2)), *(f"backbone.branch.{i}" for i in range(3))]):
        for name in ("query", "key", "value"):
            yield f"{their}.attn.{name}_conv.conv.weight", f"blocks.{i}.attention.{name}_conv.weight"
            yield from (
                (f"{their}.attn.{name}{kind}.{part}", f"blocks.{i}.attention.{name}{kind}.{part}")
                for kind in ("_norm", "") for part in both
            )  # fmt: skip
        for part in both:
            yield f"{their}.attn.proj.{part}", f"blocks.{i}.attention.out.{part}"
            yield from ((f"{their}.ln{n}.{part}", f"blocks.{i}.norm{n}.{part}") for n in (1, 2))
            yield from (
                (f"{their}.mlp.{n}.{part}", f"blocks.{i}.{name}.{part}") for n, name in ((0, "up"), (3, "down"))
            )
        yield f"{their}.drop_path_attn.scale", f"blocks.{i}.scaled1.scale"
        yield f"{their}.drop_path_mlp.scale", f"blocks.{i}.scaled2.scale"
    for i in range(CONFIG.levels):
        yield from ((f"neck.fpn_norms.{i}.{part}", f"norms.{i}.{part}") for part in both)
    for their, last, ours in (("cls_head", "cls_head", "classifier"), ("reg_head", "offset_head", "regressor")):
        for i in range(2):
            yield f"{their}.head.{i}.conv.weight", f"{ours}.convs.{i}.weight"
            yield from ((f"{their}.norm.{i}.{part}", f"{ours}.norms.{i}.{part}") for part in both)
        yield from ((f"{their}.{last}.conv.{part}", f"{ours}.last.{part}") for part in both)

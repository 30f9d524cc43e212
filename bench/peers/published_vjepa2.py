"""Our ViT for video and V-JEPA 2's (facebookresearch/vjepa2) with the same weights on the same frames."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn

from bench.tools.rows import Row
from lofi_fast.encoder.vit import EPS, ViT
from lofi_fast.encoder.vit_ledger import DEPTH, HEADS, PATCH, TUBELET
from lofi_fast.errors import InputError
from lofi_fast.fidelity import FRAMES_PER_SNIPPET

SNIPPETS = 2
SIZES = ((16, 48, 32), (64, 32, 32))  # channels of an attention head, height, width; 64 is ViT-B
# What it imports and a forward pass in evaluation does not need.
ABSENT = {"timm": (), "timm.models": (), "timm.models.layers": ("drop_path",), "einops": ("rearrange",)}


def compared(folder: Path) -> Iterator[Row]:
    """Features, the mean of the tokens of a snippet, and gradients of all weights, in float64."""
    published = _published(folder)
    for width, height, across in SIZES:
        torch.manual_seed(0)
        theirs = published(
            img_size=(height, across), patch_size=PATCH, num_frames=FRAMES_PER_SNIPPET, tubelet_size=TUBELET,
            embed_dim=HEADS * width, depth=DEPTH, num_heads=HEADS, mlp_ratio=4, use_rope=True,
            norm_layer=partial(nn.LayerNorm, eps=EPS),
        ).double().eval()  # fmt: skip
        for parameter in theirs.parameters():
            nn.init.normal_(parameter, 0, 1 / parameter[0].numel() ** 0.5)
        ours = ViT(width=width).double().eval()
        missing = ours.load_state_dict(theirs.state_dict(), strict=False)
        assert not missing.missing_keys, missing
        frames = torch.randint(0, 256, (SNIPPETS * FRAMES_PER_SNIPPET, height, across, 3), dtype=torch.uint8)
        pixels = ((frames.unflatten(0, (-1, FRAMES_PER_SNIPPET)) - ours.mean) / ours.std).permute(0, 4, 1, 2, 3)
        expected, features = theirs(pixels).mean(dim=1), ours.encode(frames, FRAMES_PER_SNIPPET)
        yield _row(f"features, {HEADS * width} channels", expected, features)
        expected.square().sum().backward()
        features.square().sum().backward()
        pairs = [
            (theirs.get_parameter(name).grad, parameter.grad)
            for name, parameter in ours.named_parameters()
            if parameter.grad is not None
        ]
        sides = (torch.cat([one.flatten() for one in side]) for side in zip(*pairs, strict=True))
        yield _row(f"gradients, {HEADS * width} channels", *sides)


def _published(folder: Path) -> Any:
    if not (folder / "src" / "models" / "vision_transformer.py").is_file():
        raise InputError(f"--vjepa2 {folder}: it holds no src/models; name a clone of facebookresearch/vjepa2")
    stand_ins = {}
    for name, functions in ABSENT.items():
        stand_ins[name] = ModuleType(name)
        for function in functions:
            setattr(stand_ins[name], function, None)
    with patch.dict(sys.modules, stand_ins), patch.object(sys, "path", [str(folder), *sys.path]):
        return importlib.import_module("src.models.vision_transformer").VisionTransformer


def _row(what: str, published: Tensor, ours: Tensor) -> Row:
    error = float((ours - published).detach().abs().max() / published.detach().abs().max())
    return {"of": "ViT-B, V-JEPA 2", "what": what, "dtype": "float64", "error": error, "numbers": published.numel()}

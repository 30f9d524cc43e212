"""Our R(2+1)D-18 and torchvision's with the same weights on the same frames, in both modes of batch norm.

Of torchvision its file models/video/resnet.py is read, from a clone or from an unpacked wheel: the classes, up to those
that describe weights, need nothing else of it.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bench.tools.rows import Row
from lofi_fast.encoder.r2plus1d import R2Plus1D
from lofi_fast.errors import InputError
from lofi_fast.fidelity import FRAMES_PER_SNIPPET

FILE = Path("torchvision", "models", "video", "resnet.py")
SNIPPETS, HEIGHT, WIDTH = 3, 48, 64
KEPT = ("import torch.nn", "from torch", "from typing", "from functools")  # of its imports


def compared(folder: Path) -> Iterator[Row]:
    """Features with frozen and with live batch norm, the lean form, and its gradients, in float64."""
    names = _published(folder)
    torch.manual_seed(0)
    theirs = names["VideoResNet"](names["BasicBlock"], [names["Conv2Plus1D"]] * 4, [2, 2, 2, 2], names["R2Plus1dStem"])
    theirs = theirs.double()
    for norm in (module for module in theirs.modules() if isinstance(module, nn.BatchNorm3d)):
        norm.running_mean.normal_(0, 0.1)
        norm.running_var.uniform_(0.5, 1.5)
        nn.init.uniform_(norm.weight, 0.5, 1.5)
        nn.init.normal_(norm.bias, 0, 0.1)
    theirs.fc = nn.Identity()
    ours = R2Plus1D().double()
    ours.load_state_dict(theirs.state_dict())
    frames = torch.randint(0, 256, (SNIPPETS * FRAMES_PER_SNIPPET, HEIGHT, WIDTH, 3), dtype=torch.uint8)
    pixels = ((frames.unflatten(0, (-1, FRAMES_PER_SNIPPET)) - ours.mean) / ours.std).permute(0, 4, 1, 2, 3)

    ours.eval()
    theirs.eval()
    yield _row("features, frozen batch norm", theirs(pixels), ours(frames, FRAMES_PER_SNIPPET))
    ours.freeze_batchnorm()
    features, published = ours.encode(frames, FRAMES_PER_SNIPPET), theirs(pixels)
    yield _row("features, lean", published, features)
    published.square().sum().backward()
    features.square().sum().backward()
    pairs = [
        (parameter.grad, theirs.get_parameter(name).grad)
        for name, parameter in ours.named_parameters()
        if parameter.grad is not None
    ]
    yield _row("gradients, lean", *(torch.cat([one.flatten() for one in side]) for side in zip(*pairs, strict=True)))
    ours.freeze_batchnorm(False)
    ours.train()
    theirs.train()
    yield _row("features, live batch norm", theirs(pixels), ours(frames, FRAMES_PER_SNIPPET))


def _published(folder: Path) -> dict[str, Any]:
    path = next((place for place in (folder / FILE, folder / Path(*FILE.parts[1:])) if place.is_file()), None)
    if path is None:
        raise InputError(
            f"--torchvision {folder}: it holds no {FILE}; name a clone of pytorch/vision or its wheel's folder"
        )
    classes = path.read_text(encoding="utf-8").partition("\n_COMMON_META")[0].partition("\nclass R3D_18_Weights")[0]
    lines = [
        line for line in classes.splitlines() if not line.startswith(("import ", "from ")) or line.startswith(KEPT)
    ]
    names: dict[str, Any] = {"_log_api_usage_once": lambda *_: None, "WeightsEnum": object}
    exec("\n".join(lines).partition("\ndef _video_resnet")[0], names)
    return names


def _row(what: str, published: Tensor, ours: Tensor) -> Row:
    error = float((ours - published).detach().abs().max() / published.detach().abs().max())
    return {"of": "R(2+1)D-18", "what": what, "dtype": "float64", "error": error, "numbers": published.numel()}

"""Dropout of the features that a head trains on, with a seed for each window."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def video_dropout(x_BCL: Tensor, probability: float, seeds: Sequence[int]) -> Tensor:
    """Dropout with a mask for each window from its own seed: a batch in parts draws what the whole batch draws."""
    if probability == 0:
        return x_BCL
    masks = []
    for x_CL, seed in zip(x_BCL, seeds, strict=True):
        generator = torch.Generator(x_BCL.device).manual_seed(seed)
        masks.append(torch.rand(x_CL.shape, generator=generator, device=x_BCL.device) >= probability)
    return x_BCL * (torch.stack(masks) / (1 - probability)).to(x_BCL.dtype)

"""What surrounds the convolutions of a TSM-ResNet in plain PyTorch, with frozen BN: one operator after the other."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.peers.shift import published_shift

EPS = 1e-5


class FrozenNorm(NamedTuple):
    """Batch normalisation by running statistics: y = (x - mean) / sqrt(var + eps) * weight + bias."""

    mean: Tensor
    var: Tensor
    weight: Tensor
    bias: Tensor

    def __call__(self, x: Tensor) -> Tensor:
        return F.batch_norm(x, self.mean, self.var, self.weight, self.bias, training=False, eps=EPS)


def frozen_norm(scale: Tensor, bias: Tensor) -> FrozenNorm:
    """The normalisation that equals the affine ``scale * x + bias``, with statistics that are neither 0 nor 1."""
    mean = torch.full_like(bias, 0.5)
    var = torch.full_like(bias, 4.0 - EPS)  # a standard deviation of 2
    return FrozenNorm(mean, var, 2 * scale, bias + scale * mean)


def eager_block_end(
    x: Tensor, norm: FrozenNorm, identity: Tensor | None, identity_norm: FrozenNorm | None, num_frames: int, fold: int
) -> tuple[Tensor, ...]:
    """out = relu(norm(x) + identity), the block's output; and, unless fold is 0, the next block's shifted input."""
    out = norm(x)
    if identity is not None:
        out += identity if identity_norm is None else identity_norm(identity)
    out = F.relu(out, inplace=True)
    return (out, published_shift(out, num_frames, fold)) if fold else (out,)


def eager_stem(x: Tensor, norm: FrozenNorm) -> Tensor:
    """What follows the first convolution of a ResNet."""
    return F.max_pool2d(F.relu(norm(x), inplace=True), 3, stride=2, padding=1)


def eager_stem_input(frames_NHWC: Tensor, mean: Tensor, dtype: torch.dtype) -> Tensor:
    """uint8 frames (N, H, W, C) less the mean of each channel, as channels-last (N, C, H, W) in ``dtype``."""
    return (frames_NHWC.to(torch.float32) - mean).to(dtype).permute(0, 3, 1, 2)

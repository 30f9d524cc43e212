"""ActionFormer's network: a pyramid of local self-attention over time, with a class score and two distances at every
position of every level (Zhang, Wu and Li, ECCV 2022).

Shapes: B windows, C channels, L snippets, T positions of a level, K classes, P positions of all levels together. Level
l has a position at every 2^l-th snippet. L is padded to a multiple of the last level's step, and what is padded is zero
wherever a position could see it. The published code pads to one length, and the biases of its norms reach the last
positions from there; on a window of a whole number of steps the two are the same.

Nothing depends on L: the order in time is told by convolutions, and a position sees as many neighbours at any rung.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lofi_fast.config import ActionFormerConfig

SCALE = 1e-4  # of a residual branch at the start
PRIOR = 0.01  # probability of a class at a position at the start


@dataclass(frozen=True)
class PyramidOutput:
    """Of all levels, the finest first: logits (B, K, P), distances to start and end (B, 2, P) in steps of the level."""

    classes_BKP: Tensor
    distances_B2P: Tensor
    length: int  # L


class Norm(nn.LayerNorm):
    """Layer norm over the channels of (B, C, T)."""

    def forward(self, x_BCT: Tensor) -> Tensor:
        return super().forward(x_BCT.transpose(1, 2)).transpose(1, 2)


class Attention(nn.Module):
    """Self-attention within `window` positions, all of them where it is 1; by the `step`-th of them, where it is 2.

    Queries, keys and values come from depth-wise convolutions, each followed by a norm.
    """

    def __init__(self, channels: int, heads: int, window: int, step: int) -> None:
        super().__init__()
        self.heads, self.reach = heads, window // 2
        for name in ("query", "key", "value"):
            conv = nn.Conv1d(channels, channels, 3, stride=step, padding=1, groups=channels, bias=False)
            self.add_module(f"{name}_conv", conv)
            self.add_module(f"{name}_norm", Norm(channels))
            self.add_module(name, nn.Conv1d(channels, channels, 1))
        self.out = nn.Conv1d(channels, channels, 1)

    def forward(self, x_BCT: Tensor, mask_T: Tensor) -> Tensor:
        """`mask_T`: which positions of the output are there."""
        parts = []
        for name in ("query", "key", "value"):
            part = self.get_submodule(f"{name}_conv")(x_BCT) * mask_T
            part = self.get_submodule(name)(self.get_submodule(f"{name}_norm")(part))
            parts.append(part.unflatten(1, (self.heads, -1)).transpose(2, 3))  # (B, heads, T, channels of a head)
        attend = self._all if self.reach == 0 else self._near
        attended = attend(parts[0], parts[1], parts[2], mask_T)
        out: Tensor = self.out(attended.transpose(2, 3).flatten(1, 2)) * mask_T
        return out

    def _all(self, query: Tensor, key: Tensor, value: Tensor, mask_T: Tensor) -> Tensor:
        there = mask_T.bool()
        return F.scaled_dot_product_attention(query, key, value, attn_mask=there.expand(len(there), -1))

    def _near(self, query: Tensor, key: Tensor, value: Tensor, mask_T: Tensor) -> Tensor:
        """Positions in blocks as long as the reach, so that each block looks at itself and its two neighbours alone."""
        reach, length = self.reach, len(mask_T)
        blocks = -(-length // reach)
        over = blocks * reach - length
        # (B, heads, blocks, reach, channels), and of keys and values (..., 3 * reach, channels)
        rows = F.pad(query, (0, 0, 0, over)).unflatten(2, (blocks, reach))
        keys, values = (F.pad(x, (0, 0, reach, over + reach)).unfold(2, 3 * reach, reach).mT for x in (key, value))
        index = torch.arange(3 * reach, device=query.device)
        near = (index - reach - index[:reach, None]).abs() <= reach
        there = F.pad(mask_T.bool(), (reach, over + reach)).unfold(0, 3 * reach, reach)
        # A position that is only padding looks at itself, since a softmax over nothing is none.
        allowed = (near & there[:, None]) | (index - reach == index[:reach, None])
        attended = F.scaled_dot_product_attention(rows, keys, values, attn_mask=allowed)
        return attended.flatten(2, 3)[:, :, :length]


class Scaled(nn.Module):
    """The end of a residual branch: a factor for each channel, and in training the branch left out of some windows."""

    def __init__(self, channels: int, probability: float) -> None:
        super().__init__()
        self.scale, self.probability = nn.Parameter(torch.full((channels, 1), SCALE)), probability

    def forward(self, x_BCT: Tensor, seeds: Sequence[int], salt: int) -> Tensor:
        x_BCT = x_BCT * self.scale
        if not self.training or self.probability == 0:
            return x_BCT
        kept = [torch.rand((), generator=torch.Generator().manual_seed((seed + salt) % 2**63)).item() for seed in seeds]
        factors = [float(drawn >= self.probability) / (1 - self.probability) for drawn in kept]
        return x_BCT * torch.tensor(factors, dtype=x_BCT.dtype).to(x_BCT.device, non_blocking=True)[:, None, None]


class TransformerBlock(nn.Module):
    """x + attention(norm(x)), then x + network(norm(x)); with a step of 2, max-pooled beside the attention."""

    def __init__(self, config: ActionFormerConfig, window: int, step: int, number: int) -> None:
        super().__init__()
        channels = config.hidden
        self.number, self.step = number, step
        self.norm1, self.norm2 = Norm(channels), Norm(channels)
        self.attention = Attention(channels, config.attention_heads, window, step)
        self.up, self.down = nn.Conv1d(channels, 4 * channels, 1), nn.Conv1d(4 * channels, channels, 1)
        self.scaled1, self.scaled2 = (Scaled(channels, config.drop_path) for _ in range(2))

    def forward(self, x_BCT: Tensor, mask_T: Tensor, seeds: Sequence[int]) -> tuple[Tensor, Tensor]:
        """(output, which of its positions are there)."""
        branch = self.norm1(x_BCT) * mask_T
        mask_T = mask_T[:: self.step]
        branch = self.attention(branch, mask_T)
        straight = x_BCT if self.step == 1 else F.max_pool1d(x_BCT, 3, 2, 1)
        x_BCT = straight * mask_T + self.scaled1(branch, seeds, 2 * self.number)
        branch = self.down(F.gelu(self.up(self.norm2(x_BCT)))) * mask_T
        return x_BCT + self.scaled2(branch, seeds, 2 * self.number + 1), mask_T


class Tower(nn.Module):
    """Convolutions that all levels share: two with norm and ReLU, and one to the outputs."""

    def __init__(self, channels: int, outputs: int) -> None:
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv1d(channels, channels, 3, padding=1, bias=False) for _ in range(2))
        self.norms = nn.ModuleList(Norm(channels) for _ in range(2))
        self.last = nn.Conv1d(channels, outputs, 3, padding=1)
        nn.init.zeros_(self.last.bias)  # type: ignore[arg-type]

    def forward(self, x_BCT: Tensor, mask_T: Tensor) -> Tensor:
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x_BCT = F.relu(norm(conv(x_BCT) * mask_T)) * mask_T
        out: Tensor = self.last(x_BCT) * mask_T
        return out


class ActionFormer(nn.Module):
    """Snippet features (B, num_features, L) -> `PyramidOutput`."""

    def __init__(self, config: ActionFormerConfig, num_features: int, num_classes: int) -> None:
        super().__init__()
        channels = config.hidden
        self.config, self.num_classes = config, num_classes
        inputs = (num_features, channels)
        self.embed = nn.ModuleList(nn.Conv1d(n, channels, 3, padding=1, bias=False) for n in inputs)
        self.embed_norms = nn.ModuleList(Norm(channels) for _ in inputs)
        steps = [1] * config.stem_blocks + [2] * (config.levels - 1)
        self.blocks = nn.ModuleList(
            TransformerBlock(config, config.attention_window, step, number) for number, step in enumerate(steps)
        )
        self.norms = nn.ModuleList(Norm(channels) for _ in range(config.levels))
        self.classifier, self.regressor = Tower(channels, num_classes), Tower(channels, 2)
        self.factors = nn.Parameter(torch.ones(config.levels))  # of the distances of each level
        nn.init.constant_(self.classifier.last.bias, -math.log((1 - PRIOR) / PRIOR))  # type: ignore[arg-type]
        for module in [*self.blocks.modules()]:
            if isinstance(module, nn.Conv1d) and module.bias is not None:
                nn.init.zeros_(module.bias)

    def forward(self, features_BCL: Tensor, seeds: Sequence[int] = ()) -> PyramidOutput:
        """`seeds`: one for each window, of what training leaves out."""
        length = features_BCL.shape[2]
        x = F.pad(features_BCL, (0, padded(length, self.config.levels) - length))
        mask = (torch.arange(x.shape[2], device=x.device) < length).to(x.dtype)
        for conv, norm in zip(self.embed, self.embed_norms, strict=True):
            x = F.relu(norm(conv(x) * mask)) * mask
        levels = []
        for number, block in enumerate(self.blocks):
            x, mask = block(x, mask, seeds)
            if number >= self.config.stem_blocks - 1:
                levels.append((x, mask))
        classes, distances = [], []
        for (x, mask), norm, factor in zip(levels, self.norms, self.factors, strict=True):
            x = norm(x) * mask
            classes.append(self.classifier(x, mask))
            distances.append(F.relu(self.regressor(x, mask) * factor))
        return PyramidOutput(torch.cat(classes, dim=2), torch.cat(distances, dim=2), length)


def padded(length: int, levels: int) -> int:
    """The multiple of the last level's step that so many snippets are padded to."""
    step = 1 << (levels - 1)
    return -(-length // step) * step


def positions(length: int, levels: int) -> tuple[Tensor, Tensor, Tensor]:
    """(snippet (P,) float, step (P,) float, whether it is there (P,)) of the positions of all levels, finest first."""
    whole = padded(length, levels)
    places = [torch.arange(0, whole, 2**level) for level in range(levels)]
    steps = torch.cat([torch.full((len(place),), 2.0**level) for level, place in enumerate(places)])
    snippets = torch.cat(places)
    return snippets.float(), steps, snippets < length

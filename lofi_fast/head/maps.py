"""What the networks share that score every (start, duration) of a window: their output, and the layer that samples
features at every cell.

Shapes: B windows, C channels, L snippets, K classes, N valid cells (start s, duration d) with s + d < L, d < D;
proposal (s, d) covers snippets s..s+d.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class HeadOutput:
    """Logits: start, end (B, L), proposals (B, 2, N) (regression, classification), classes (B, K, N)."""

    start_BL: Tensor
    end_BL: Tensor
    proposals_B2N: Tensor
    classes_BKN: Tensor
    cells_N2: Tensor  # (duration d, start s) of each cell


class AlignLinear(nn.Module):
    """Parameters of one `align_linear` over (channels x bins)."""

    def __init__(self, in_channels: int, out_channels: int, bins: int, fan_in: int, bias: bool = True) -> None:
        super().__init__()
        bound = 1 / math.sqrt(fan_in)  # nn.Conv's own initialisation
        stored_CRO = torch.empty(in_channels, bins, out_channels).uniform_(-bound, bound)
        self.weight = nn.Parameter(stored_CRO.permute(2, 0, 1))  # (O, C, R), in the layout its products run fastest
        self.bias = nn.Parameter(torch.empty(out_channels).uniform_(-bound, bound)) if bias else None

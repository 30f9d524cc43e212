"""Joint training whose gradients are not all of the encoder's: the ways of others to make it fit, as peers in accuracy.

    python -m bench.peers.partial sampled|"partly frozen" FLAGS

trains with such an encoder; the flags are those of `lofi_fast.train`.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

import torch
from torch import Tensor

from bench.peers.network import sampled
from lofi_fast import train
from lofi_fast.encoder.resnet import TSMResNet
from lofi_fast.train import read_flags

SHARE = 0.3  # of the snippets that gradients go through, as in ETAD (Liu et al. 2022)
CHUNK = 8  # snippets that run without a graph at once
FROZEN_STAGES = 2


class Sampled(TSMResNet):
    """Gradients of a share of the snippets, drawn anew at each call."""

    def encode(
        self, frames_NHWC: Tensor, num_frames: int, *, chunk: int | None = None, recompute: bool = False,
        eight_bit: bool = False,
    ) -> Tensor:  # fmt: skip
        if not torch.is_grad_enabled():
            return super().encode(frames_NHWC, num_frames, chunk=chunk)
        count = len(frames_NHWC) // num_frames
        chosen = torch.randperm(count)[: max(1, round(SHARE * count))].sort().values
        return sampled(self, frames_NHWC, num_frames, chosen, CHUNK)


class PartlyFrozen(TSMResNet):
    """The stem and the first stages keep their weights, and nothing for backward. Batch norm is frozen anyhow."""

    def __init__(self, name: str, width: int) -> None:
        super().__init__(name, width)
        for stage in (self.conv1, *list(self.stages)[:FROZEN_STAGES]):
            stage.requires_grad_(False)


KINDS = {"sampled": Sampled, "partly frozen": PartlyFrozen}


def main(argv: Sequence[str]) -> int:
    kind = KINDS[argv[0]]
    config, _ = read_flags(list(argv[1:]), cuda=torch.cuda.is_available)
    train(config=config, encoder=lambda config: kind(config.encoder.name, config.encoder.width))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

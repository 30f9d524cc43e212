"""What an encoder is to the rest of the package: an `nn.Module` with the methods below.

Shapes: N snippets, T frames a snippet, H x W pixels, C = `num_features`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Self

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

BATCHNORM = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


class Encoder(nn.Module, ABC):
    """uint8 RGB frames (N*T, H, W, 3) -> features (N, C). H and W may differ from call to call.

    Only `num_features` and `forward` have to be given. `encode` as it stands here serves any network in which the
    snippets of a batch do not see each other once its batch norm is frozen.
    """

    name: str = "encoder"  # in messages
    num_features: int
    memory_format = torch.channels_last  # in which its weights lie in memory
    eight_bit = False  # whether `encode` can keep the activations for backward in 8 bits
    frozen_batchnorm = False
    added: tuple[str, ...] = ()  # parts of the names of what published weights do not have, and which begins anew

    @abstractmethod
    def forward(self, frames_NHWC: Tensor, num_frames: int) -> Tensor:
        """Features (N, C) with the network in the mode it is in; pretraining calls this, with live batch norm."""

    def place(self, device: torch.device) -> Self:
        """Move to `device`, the weights in the order in memory that its convolutions read."""
        return self.to(device).to(memory_format=self.memory_format)  # type: ignore[call-overload, no-any-return]

    def freeze_batchnorm(self, frozen: bool = True) -> None:
        """Hold statistics and affine parameters of batch norm still from now on, in training mode too; or let them
        live again. End-to-end TAL trains with frozen batch norm: a few videos are too few for statistics.
        """
        self.frozen_batchnorm = frozen
        for module in self.modules():
            if isinstance(module, BATCHNORM):
                module.requires_grad_(not frozen)
        self.train(self.training)

    def train(self, mode: bool = True) -> Self:
        super().train(mode)
        if self.frozen_batchnorm:
            for module in self.modules():
                if isinstance(module, BATCHNORM):
                    module.eval()
        return self

    def encode(
        self,
        frames_NHWC: Tensor,
        num_frames: int,
        *,
        chunk: int | None = None,
        recompute: bool = False,
        eight_bit: bool = False,
    ) -> Tensor:
        """Features (N, C) with frozen batch norm, by the levers of the plan, which change memory and time alone.

        Args:
            num_frames: T.
            chunk: snippets in one graph; None leaves it to the encoder.
            recompute: keep the frames of a chunk only, and run it forward again when its gradient arrives.
            eight_bit: keep activations in 8 bits, where `eight_bit` of the class says that it can be had.
        """
        parts = frames_NHWC.split((chunk or len(frames_NHWC)) * num_frames)
        if recompute and torch.is_grad_enabled():
            return torch.cat([checkpoint(self, part, num_frames, use_reentrant=False) for part in parts])
        return torch.cat([self(part, num_frames) for part in parts])

"""TSM-ResNet as the stages use it: the plain network where batch norm is live, the lean way where it is frozen."""

from __future__ import annotations

from torch import Tensor

from lofi_fast.encoder import lean
from lofi_fast.encoder.resnet import TSMResNet


class TSMEncoder(TSMResNet):
    """`TSMResNet` with `encode` by encoder/lean.py."""

    eight_bit = True

    def encode(
        self,
        frames_NHWC: Tensor,
        num_frames: int,
        *,
        chunk: int | None = None,
        recompute: bool = False,
        eight_bit: bool = False,
    ) -> Tensor:
        """See `Encoder.encode` and `lean.encode`."""
        return lean.encode(self, frames_NHWC, num_frames, chunk=chunk, recompute=recompute, eight_bit=eight_bit)

"""TSM-ResNet as the stages use it: the plain network where batch norm is live, the lean way where it is frozen."""

from __future__ import annotations

import torch
from torch import Tensor

from lofi_fast.encoder import lean
from lofi_fast.encoder.resnet import Conv, TSMResNet
from lofi_fast.kernels import conv3x3, conv3x3_is_faster, strided_conv, strided_conv_is_faster


class FastConv(Conv):
    """By our own convolution where that is faster, with what PyTorch's keeps for backward: input and weight."""

    def forward(self, x: Tensor) -> Tensor:
        device = x.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
        if self.stride == (1, 1) and self.padding == (1, 1) and conv3x3_is_faster(x, self.weight, dtype):
            return conv3x3(x.to(dtype), self.weight.to(dtype))
        if self.stride == (2, 2) and strided_conv_is_faster(x, self.weight, dtype):
            return strided_conv(x.to(dtype), self.weight.to(dtype))
        return super().forward(x)


class TSMEncoder(TSMResNet):
    """`TSMResNet` on our kernels: its convolutions where batch norm is live, and `encode` by encoder/lean.py."""

    eight_bit = True
    conv = FastConv

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

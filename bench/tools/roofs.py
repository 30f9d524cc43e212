"""What a device can do at best, measured, and the least that an encoder's step asks of it, computed.

Floor of a step: the larger of two times. Its operations at the rate of a large matrix product or a large convolution,
PyTorch's or ours, whichever is fastest: every convolution forward, and twice that backward (for its input and its
weight; the first has no gradient of its input). Operations are counted by the definition, so that a convolution which
saves some may be faster than its processor. Its bytes at the rate of a large copy: every activation that backward needs
written once and read twice (by the next layer and by backward), its gradient written and read once, and the frames read
twice. Head, loss and folding are left out. What takes sampled gradients has less to do than this.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from bench.tools.measure import Call
from lofi_fast.config import EncoderName
from lofi_fast.encoder.resnet_ledger import lean_kept_bytes
from lofi_fast.encoder.resnet_table import network
from lofi_fast.kernels import conv3x3

PASSES = 5  # over the kept activations


@dataclass(frozen=True)
class Work:
    """Of a step: floating-point operations, and bytes that move."""

    operations: int
    bytes: int

    def floor(self, operations_a_second: float, bytes_a_second: float) -> float:
        """Seconds."""
        return max(self.operations / operations_a_second, self.bytes / bytes_a_second)


def encoder_work(name: EncoderName, width: int, frames: int, side: int, map_bytes: int) -> Work:
    """Forward and backward over `frames` of `side` x `side` pixels."""
    net = network(name, width, side)
    first = 2 * net.stem[0].multiply_adds  # a multiplication and an addition count as two
    others = sum(2 * conv.multiply_adds for conv in net.convs[1:])
    once = frames * net.image
    kept = lean_kept_bytes(name, width, side, frames, map_bytes) - once
    return Work(frames * (2 * first + 3 * others), PASSES * kept + 2 * once)


def rates(device: torch.device, dtype: torch.dtype) -> dict[str, tuple[Call, int]]:
    """Calls that are large enough to be as fast as they get, and their operations."""
    size, images = (8192, 1024) if device.type == "cuda" else (1024, 16)
    a, b = torch.randn(2, size, size, device=device).to(dtype)
    channels, side = 256, 14  # of a ResNet-18's third stage
    x = torch.randn(images, channels, side, side, device=device).to(dtype, memory_format=torch.channels_last)
    weight = torch.randn(channels, channels, 3, 3, device=device).to(dtype, memory_format=torch.channels_last)
    operations = 2 * weight.numel() * images * side**2
    return {
        "matrix product": (lambda: torch.mm(a, b), 2 * size**3),
        "convolution": (lambda: F.conv2d(x, weight, padding=1), operations),
        "convolution, ours": (lambda: conv3x3(x, weight), operations),  # where it is not faster, PyTorch's again
    }

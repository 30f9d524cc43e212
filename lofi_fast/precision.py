"""Device and mixed precision: chosen from what the hardware can do, and said."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lofi_fast import gpu
from lofi_fast.errors import InputError

if TYPE_CHECKING:  # imported where it is used: the command `plan` reads this file, and answers without torch
    import torch

BF16_CAPABILITY = (8, 0)  # Ampere; a Turing card (the 11 GB 2080 Ti) has fp16 tensor cores alone


def choose_device(name: str) -> torch.device:
    """ "auto", "cuda" or "cpu". Raises InputError when a GPU is asked for and none can be used, and when PyTorch shows
    one that it has no code for. Where "auto" is the CPU although a card is here, `gpu.unused` says why.
    """
    import torch

    if name == "cuda" and not torch.cuda.is_available():
        reason = gpu.unused() or "PyTorch sees no usable GPU here; check the driver"
        raise InputError(f"--device cuda: {reason}; or use --device cpu")
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(name)
    if device.type == "cuda":
        gpu.check_torch(device)
    return device


@dataclass(frozen=True)
class Precision:
    """Matrix products in `dtype` under autocast, parameters in fp32; fp16 gradients are scaled."""

    dtype: torch.dtype
    reason: str

    @property
    def scaled(self) -> bool:
        import torch

        return self.dtype is torch.float16

    def autocast(self, device: torch.device) -> AbstractContextManager[None]:
        import torch

        return torch.autocast(device.type, dtype=self.dtype, enabled=self.dtype is not torch.float32)

    def __str__(self) -> str:
        return f"{str(self.dtype).removeprefix('torch.')} ({self.reason})"


def choose_precision(device: torch.device) -> Precision:
    """bf16 where tensor cores have it, fp16 with a gradient scaler on older GPUs, fp32 on a CPU."""
    import torch

    if device.type != "cuda":
        return Precision(torch.float32, "a CPU")
    capability = torch.cuda.get_device_capability(device)
    name = f"compute capability {capability[0]}.{capability[1]}"
    if capability >= BF16_CAPABILITY:
        return Precision(torch.bfloat16, name)
    return Precision(torch.float16, f"{name} has no bf16; gradients are scaled")

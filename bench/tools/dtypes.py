"""Dtypes by the names that rows have, and which one mixed precision uses where."""

from __future__ import annotations

import torch

from lofi_fast.precision import BF16_CAPABILITY

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def half_of(device: torch.device) -> str:
    """bfloat16, but on a GPU without it."""
    older = device.type == "cuda" and torch.cuda.get_device_capability(device) < BF16_CAPABILITY
    return "float16" if older else "bfloat16"

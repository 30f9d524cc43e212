"""One start of a Triton kernel as data, so that what is compiled ahead of time is what is launched."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Launch:
    """A kernel, its grid and its arguments. Over meta tensors it can be inspected and compiled, but not run."""

    kernel: Any  # made by triton.jit
    grid: tuple[int, ...]  # programs; the first dimension may count up to 2^31 - 1, the others to 65535
    arguments: dict[str, Tensor | int | float | None]
    constants: dict[str, Any] = field(default_factory=dict)  # the kernel's tl.constexpr parameters
    num_warps: int = 4
    fp_fusion: bool = True  # False: a product and the sum after it round one by one, as in PyTorch

    def run(self) -> None:
        """Start the kernel on the current stream of its tensors' device. An empty grid starts nothing."""
        if 0 in self.grid:
            return
        device = next(value.device for value in self.arguments.values() if isinstance(value, Tensor))
        if device.type == "cuda":
            with torch.cuda.device(device):
                self._start()
        else:
            self._start()

    def _start(self) -> None:
        self.kernel[self.grid](
            **self.arguments, **self.constants, num_warps=self.num_warps, enable_fp_fusion=self.fp_fusion
        )

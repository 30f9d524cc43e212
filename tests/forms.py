"""What the tests of operators share: hostile layouts, and a tolerance that is honest at every dtype."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

LAYOUTS = ("contiguous", "channels_last", "strided", "permuted")


class Form:
    """One form of an operator's functions, over tensors of the CPU: a form for GPUs takes them there and back."""

    def __init__(self, ops: ModuleType, device: str = "cpu") -> None:
        self.ops, self.device = ops, device
        # Triton's interpreter cuts float32 to bfloat16 where a GPU rounds, and misreads bfloat16's denormal numbers.
        self.truncates = ops.__name__.endswith("kernel") and device == "cpu"

    def __getattr__(self, name: str) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            results = getattr(self.ops, name)(*(a.to(self.device) if isinstance(a, Tensor) else a for a in args))
            return results.cpu() if isinstance(results, Tensor) else tuple(result.cpu() for result in results)

        return call


def images(
    shape: Sequence[int], layout: str = "contiguous", dtype: torch.dtype = torch.float32, seed: int = 0
) -> Tensor:
    """Normal numbers (N, C, H, W) in a memory layout; `strided` is a window of a larger tensor of NaN."""
    num, channels, height, width = shape
    x = torch.randn(tuple(shape), generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)
    if layout == "contiguous":
        return x
    if layout == "channels_last":
        return x.contiguous(memory_format=torch.channels_last)
    if layout == "strided":
        wide = torch.full((num, channels + 3, height, 2 * width), torch.nan, dtype=dtype)
        wide[:, 2 : 2 + channels, :, ::2] = x
        return wide[:, 2 : 2 + channels, :, ::2]
    if layout == "permuted":
        return x.permute(3, 1, 0, 2).contiguous().permute(2, 1, 3, 0)
    raise ValueError(f"no layout {layout!r}")


def assert_as_good_as(got: Tensor, plain: Tensor, exact: Tensor) -> None:
    """The largest error of `got` against the float64 result is at most twice that of `plain`, the same computation in
    plain PyTorch at the same dtype; where that happens to be (nearly) exact, at most one rounding of the largest value.
    """
    assert got.shape == exact.shape and got.dtype == plain.dtype
    assert exact.dtype == torch.float64
    if got.numel() == 0:
        return
    error = (got.double() - exact).abs().max().item()
    allowed = 2 * (plain.double() - exact).abs().max().item()
    rounding = torch.finfo(plain.dtype).eps * exact.abs().max().item()
    assert error <= max(allowed, rounding), f"error {error:.3g}, allowed {max(allowed, rounding):.3g}"

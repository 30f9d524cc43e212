"""Live batch norm over several processes: its statistics are those of all their samples, as in one process.

torch's SyncBatchNorm does the same on GPUs alone. Means and variances are put together as Chan, Golub and LeVeque do
("Algorithms for computing the sample variance", 1983), in which a process may have no sample at all. Arithmetic is in
float32, in float64 for float64.

A process that runs out of memory between two layers would leave the others waiting at the next one. So every message
has room for the word that its sender has failed, and all of them leave the step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lofi_fast.encoder.protocol import BATCHNORM
from lofi_fast.errors import InputError

BatchNorm = nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d


class OthersFailed(MemoryError):
    """Another process has left the step, for want of memory as a rule."""


class SharedStatistics:
    """From now on every batch norm of an encoder, while it is live, takes its statistics over several processes; all of
    them must run the encoder at the same time, in a block of `step`. What is learned, and the state that is saved, stay
    as they are.

    `stack` gives the tensors of all processes, of one shape, as rows of one; it raises InputError where one is lost.
    """

    def __init__(self, encoder: nn.Module, stack: Callable[[Tensor], Tensor]) -> None:
        self._stack, self._device = stack, torch.device("cpu")
        self._dtype, self._width = torch.float32, 0
        for module in encoder.modules():
            if isinstance(module, BATCHNORM):
                self._device = next(encoder.parameters()).device
                self._dtype = torch.promote_types(self._dtype, next(encoder.parameters()).dtype)
                self._width = max(self._width, 2 * module.num_features + 1)
                module.forward = _Live(module, self)  # type: ignore[assignment]

    def gather(self, *values: Tensor, failed: bool = False) -> Tensor:
        """Row by row, the numbers of every process, which are as many in all. Raises OthersFailed when one of the
        processes has `failed` instead of coming here; then all have left the step.
        """
        mine = torch.zeros(1 + self._width, dtype=self._dtype, device=self._device)
        mine[0] = failed
        told = torch.cat(values) if values else mine[:0]
        mine[1 : 1 + len(told)] = told
        rows = self._stack(mine)
        if bool(rows[:, 0].any()) and not failed:
            raise OthersFailed(f"process {int(rows[:, 0].nonzero()[0])} has failed in this step")
        return rows[:, 1 : 1 + len(told)]

    @contextmanager
    def step(self) -> Iterator[None]:
        """Forward and backward of this process's share. Raises OthersFailed, as soon as they meet, when this block has
        raised in another process.
        """
        try:
            yield
        except (OthersFailed, InputError):
            raise
        except Exception:
            self.gather(failed=True)
            raise
        self.gather()  # where one that fails after its last layer is heard


class _Normalize(torch.autograd.Function):
    """(x - mean) / sqrt(var + eps) * weight + bias over all processes; also gives mean, biased variance, and count."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, shared: SharedStatistics
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        dims, shape, exact = _but_channels(x), _as_channels(x), _sums(x)
        count = torch.tensor([x.numel() // x.shape[1]], device=x.device, dtype=exact)
        if x.numel():
            var, mean = torch.var_mean(x.to(exact), dims, correction=0)
        else:
            var = mean = x.new_zeros(x.shape[1], dtype=exact)
        means, variances, counts = shared.gather(mean, var, count).double().split([len(mean), len(mean), 1], 1)
        total = counts.sum()
        mean_all = (means * counts).sum(0) / total
        var_all = ((variances + (means - mean_all).square()) * counts).sum(0) / total
        mean, var = mean_all.to(exact), var_all.to(exact)
        scale = (var + eps).rsqrt()
        ctx.save_for_backward(x, weight, mean, scale, total.to(exact))
        ctx.shared, ctx.has_bias = shared, bias is not None
        y = (x.to(exact) - mean.view(shape)) * scale.view(shape)
        if weight is not None:
            y = y * weight.to(exact).view(shape)
        if bias is not None:
            y = y + bias.to(exact).view(shape)
        ctx.mark_non_differentiable(mean, var, total)
        return y.to(x.dtype), mean, var, total

    @staticmethod
    def backward(ctx: Any, dy: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, mean, scale, total = ctx.saved_tensors
        dims, shape, exact = _but_channels(x), _as_channels(x), _sums(x)
        normal, dy = (x.to(exact) - mean.view(shape)) * scale.view(shape), dy.to(exact)
        d_bias, d_weight = dy.sum(dims), (dy * normal).sum(dims)  # of this process; the step sums gradients of all
        sum_dy, sum_dy_normal = ctx.shared.gather(d_bias, d_weight).sum(0).split(len(d_bias))
        dx = dy - (sum_dy / total).view(shape) - normal * (sum_dy_normal / total).view(shape)
        factor = scale if weight is None else scale * weight.to(exact)
        dx = (dx * factor.view(shape)).to(x.dtype)
        return dx, None if weight is None else d_weight, d_bias if ctx.has_bias else None, None, None


def _sums(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _but_channels(x: Tensor) -> list[int]:
    return [0, *range(2, x.dim())]


def _as_channels(x: Tensor) -> list[int]:
    return [-1 if dim == 1 else 1 for dim in range(x.dim())]


class _Live:
    """The `forward` of a batch norm."""

    def __init__(self, module: BatchNorm, shared: SharedStatistics) -> None:
        self._module, self._shared, self._alone = module, shared, module.forward

    def __call__(self, x: Tensor) -> Tensor:
        module = self._module
        if not module.training:
            return self._alone(x)
        y, mean, var, total = _Normalize.apply(x, module.weight, module.bias, module.eps, self._shared)  # type: ignore[no-untyped-call]
        if module.track_running_stats and module.running_mean is not None and module.running_var is not None:
            assert module.num_batches_tracked is not None
            module.num_batches_tracked.add_(1)
            share = 1 / float(module.num_batches_tracked) if module.momentum is None else module.momentum
            module.running_mean.lerp_(mean, share)
            module.running_var.lerp_(var * (total / (total - 1)).to(var.dtype), share)
        normalized: Tensor = y
        return normalized

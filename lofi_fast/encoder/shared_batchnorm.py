"""Live batch norm over several processes: its statistics are those of all their samples, as in one process.

torch's SyncBatchNorm does the same on GPUs alone. Means and variances are put together as Chan, Golub and LeVeque do
("Algorithms for computing the sample variance", 1983), in which a process may have no sample at all. Arithmetic is in
float32, in float64 for float64.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, distributed, nn

from lofi_fast.encoder.protocol import BATCHNORM

BatchNorm = nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d
Group = distributed.ProcessGroup | None


class _Normalize(torch.autograd.Function):
    """(x - mean) / sqrt(var + eps) * weight + bias over all processes; also gives mean, biased variance, and count."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, group: Group
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        dims, shape = _but_channels(x), _as_channels(x)
        sums = _sums(x)
        count = torch.tensor([x.numel() // x.shape[1]], device=x.device, dtype=sums)
        if x.numel():
            var, mean = torch.var_mean(x.to(sums), dims, correction=0)
        else:
            var = mean = x.new_zeros(x.shape[1], dtype=sums)
        mine = torch.cat([mean, var, count])
        everyones = [torch.empty_like(mine) for _ in range(distributed.get_world_size(group))]
        distributed.all_gather(everyones, mine, group=group)
        means, variances, counts = torch.stack(everyones).double().split([len(mean), len(mean), 1], 1)
        total = counts.sum()
        mean_all = (means * counts).sum(0) / total
        var_all = ((variances + (means - mean_all).square()) * counts).sum(0) / total
        mean, var = mean_all.to(sums), var_all.to(sums)
        scale = (var + eps).rsqrt()
        ctx.save_for_backward(x, weight, mean, scale, total.to(sums))
        ctx.group, ctx.has_bias = group, bias is not None
        y = (x.to(sums) - mean.view(shape)) * scale.view(shape)
        if weight is not None:
            y = y * weight.to(sums).view(shape)
        if bias is not None:
            y = y + bias.to(sums).view(shape)
        ctx.mark_non_differentiable(mean, var, total)
        return y.to(x.dtype), mean, var, total

    @staticmethod
    def backward(ctx: Any, dy: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, mean, scale, total = ctx.saved_tensors
        dims, shape, exact = _but_channels(x), _as_channels(x), _sums(x)
        normal, dy = (x.to(exact) - mean.view(shape)) * scale.view(shape), dy.to(exact)
        d_bias, d_weight = dy.sum(dims), (dy * normal).sum(dims)  # of this process; the step sums gradients of all
        sums = torch.cat([d_bias, d_weight])
        distributed.all_reduce(sums, group=ctx.group)
        sum_dy, sum_dy_normal = sums.split(len(d_bias))
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


def share_statistics(encoder: nn.Module, group: Group) -> None:
    """Let every batch norm of an encoder, while it is live, take its statistics over the processes of a group; all of
    them must run the encoder at the same time. What is learned, and the state that is saved, stay as they are.
    """
    for module in encoder.modules():
        if isinstance(module, BATCHNORM):
            module.forward = _Live(module, group)  # type: ignore[assignment]


class _Live:
    """The `forward` of a batch norm."""

    def __init__(self, module: BatchNorm, group: Group) -> None:
        self._module, self._group, self._alone = module, group, module.forward

    def __call__(self, x: Tensor) -> Tensor:
        module = self._module
        if not module.training:
            return self._alone(x)
        y, mean, var, total = _Normalize.apply(x, module.weight, module.bias, module.eps, self._group)  # type: ignore[no-untyped-call]
        if module.track_running_stats and module.running_mean is not None and module.running_var is not None:
            assert module.num_batches_tracked is not None
            module.num_batches_tracked.add_(1)
            share = 1 / float(module.num_batches_tracked) if module.momentum is None else module.momentum
            module.running_mean.lerp_(mean, share)
            module.running_var.lerp_(var * (total / (total - 1)).to(var.dtype), share)
        normalized: Tensor = y
        return normalized

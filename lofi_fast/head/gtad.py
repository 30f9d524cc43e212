"""G-TAD: sub-graph localization (Xu et al., CVPR 2020), with a class score of each proposal added.

Shapes: B windows, C channels, L snippets, D durations, N valid proposal cells (start s, duration d) with s + d < L,
d < D; proposal (s, d) covers snippets s..s+d. K classes.

The map (B, 2, D, L) of the paper is kept at its valid cells only, and SGAlign with the 1x1 convolution after it is one
`align_linear_sum`: the (C x bins) x L x L tensor never exists (method: project first, interpolate after).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from lofi_fast.config import HeadConfig
from lofi_fast.head.gtad_ledger import BASE_GROUPS, NUM_NEIGHBOURS
from lofi_fast.head.maps import AlignLinear, HeadOutput
from lofi_fast.kernels import align_linear, align_linear_sum, proposal_grid


def nearest_neighbours(x_BCL: Tensor) -> Tensor:
    """Indices (B, L, k) of each snippet's k nearest in feature space (Euclidean, itself included), k = min(3, L)."""
    x_BLC = x_BCL.detach().float().transpose(1, 2)
    distances = torch.cdist(x_BLC, x_BLC, compute_mode="donot_use_mm_for_euclid_dist")
    return distances.topk(min(NUM_NEIGHBOURS, x_BCL.shape[2]), dim=2, largest=False).indices


def gather_neighbours(x_BCL: Tensor, index_BLk: Tensor) -> Tensor:
    """x at each snippet's neighbours: (B, C, L, k)."""
    batch, channels, length = x_BCL.shape
    flat = index_BLk.reshape(batch, 1, -1).expand(-1, channels, -1)
    return x_BCL.gather(2, flat).view(batch, channels, length, -1)


class GroupedPointwise(nn.Conv2d):
    """A grouped 1x1 convolution (B, C, L, k) -> (B, O, L, k). On a CPU it is a matrix product for each group, the same
    numbers to rounding: PyTorch's convolutions of so few channels take several times as long there. No more is kept.
    """

    def __init__(self, in_channels: int, out_channels: int, groups: int) -> None:
        super().__init__(in_channels, out_channels, 1, groups=groups)

    def forward(self, x_BCLk: Tensor) -> Tensor:
        if x_BCLk.device.type != "cpu" or self.bias is None:
            return super().forward(x_BCLk)
        tensors: tuple[Tensor, ...] = (x_BCLk, self.weight, self.bias)
        if torch.is_autocast_enabled("cpu") and x_BCLk.dtype != torch.float64:
            tensors = tuple(x.to(torch.get_autocast_dtype("cpu")) for x in tensors)
        out: Tensor = _GroupedProducts.apply(self.groups, *tensors)  # type: ignore[no-untyped-call]
        return out


class _GroupedProducts(torch.autograd.Function):
    """Shapes: G groups, I and O channels of a group, P = L * k positions."""

    @staticmethod
    def forward(ctx: Any, groups: int, x_BCLk: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(x_BCLk, weight)
        ctx.groups = groups
        weight_GOI, bias_GO1 = weight.view(groups, -1, weight.shape[1]), bias.view(groups, -1, 1)
        out_BCLk = x_BCLk.new_empty(len(x_BCLk), len(bias), *x_BCLk.shape[2:])
        with torch.autocast("cpu", enabled=False):
            for x_CLk, out_CLk in zip(x_BCLk, out_BCLk, strict=True):
                x_GIP, out_GOP = (y.reshape(groups, -1, y[0].numel()) for y in (x_CLk, out_CLk))
                torch.baddbmm(bias_GO1, weight_GOI, x_GIP, out=out_GOP)
        return out_BCLk

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (x_BCLk, weight), (grad_BCLk,) = ctx.saved_tensors, grads
        _, needs_x, needs_weight, needs_bias = ctx.needs_input_grad
        weight_GOI = weight.view(ctx.groups, -1, weight.shape[1])
        grad_x, grad_weight_GOI = x_BCLk.new_empty(x_BCLk.shape), torch.zeros_like(weight_GOI)
        with torch.autocast("cpu", enabled=False):
            for x_CLk, grad_CLk, grad_x_CLk in zip(x_BCLk, grad_BCLk, grad_x, strict=True):
                x_GIP, grad_GOP, grad_x_GIP = (
                    y.reshape(ctx.groups, -1, y[0].numel()) for y in (x_CLk, grad_CLk, grad_x_CLk)
                )
                if needs_x:
                    torch.bmm(weight_GOI.transpose(1, 2), grad_GOP, out=grad_x_GIP)
                if needs_weight:
                    grad_weight_GOI.baddbmm_(grad_GOP, x_GIP.transpose(1, 2))
        return (
            None,
            grad_x if needs_x else None,
            grad_weight_GOI.view_as(weight) if needs_weight else None,
            grad_BCLk.sum((0, 2, 3)) if needs_bias else None,
        )


class GCNeXt(nn.Module):
    """out = relu(temporal(x) + x + semantic(x)); the semantic branch is an edge convolution over the 3 nearest
    neighbours, its first 1x1 (on the concatenation of neighbour and self) applied before gathering: the same numbers.
    """

    def __init__(self, channels: int, groups: int) -> None:
        super().__init__()
        width = channels // 2
        self.temporal = nn.Sequential(
            nn.Conv1d(channels, width, 1),
            nn.ReLU(inplace=True),
            nn.Conv1d(width, width, 3, padding=1, groups=groups),
            nn.ReLU(inplace=True),
            nn.Conv1d(width, channels, 1),
        )
        self.neighbour = nn.Conv1d(channels, width, 1)
        self.itself = nn.Conv1d(channels, width, 1, bias=False)
        self.semantic = nn.Sequential(
            nn.ReLU(inplace=True),
            GroupedPointwise(width, width, groups),
            nn.ReLU(inplace=True),
            nn.Conv2d(width, channels, 1),
        )

    def forward(self, x_BCL: Tensor) -> tuple[Tensor, Tensor]:
        """(out (B, C, L), neighbour indices (B, L, k) of x)."""
        index_BLk = nearest_neighbours(x_BCL)
        edges_BCLk = gather_neighbours(self.neighbour(x_BCL), index_BLk) + self.itself(x_BCL).unsqueeze(3)
        semantic_BCL = self.semantic(edges_BCLk).amax(dim=3)
        return F.relu(self.temporal(x_BCL) + x_BCL + semantic_BCL), index_BLk


class GTAD(nn.Module):
    """Snippet features (B, num_features, L) -> `HeadOutput`. Weights do not depend on L, so every rung shares them."""

    def __init__(self, config: HeadConfig, num_features: int, num_classes: int, full_snippets: int) -> None:
        super().__init__()
        self.config, self.num_classes, self.full_snippets = config, num_classes, full_snippets
        hidden = config.hidden
        base = nn.Conv1d(num_features, hidden, 3, padding=1, groups=BASE_GROUPS)
        self.base = nn.Sequential(base, nn.ReLU(inplace=True))
        self.base_graph = GCNeXt(hidden, config.groups)
        self.graph = GCNeXt(hidden, config.groups)
        self.start_graph, self.start = GCNeXt(hidden, config.groups), nn.Conv1d(hidden, 1, 1)
        self.end_graph, self.end = GCNeXt(hidden, config.groups), nn.Conv1d(hidden, 1, 1)
        fan_in = hidden * (config.inner_bins + config.context_bins)
        self.inner = AlignLinear(hidden, config.map_channels, config.inner_bins, fan_in)
        self.context = AlignLinear(hidden, config.map_channels, config.context_bins, fan_in, bias=False)
        narrow, kernel = config.map_channels // 4, config.middle_kernel
        self.reduce = nn.Conv2d(config.map_channels, narrow, 1)
        self.middle1 = nn.Conv2d(narrow, narrow, kernel, padding=kernel // 2)
        self.middle2 = nn.Conv2d(narrow, narrow, kernel, padding=kernel // 2)
        self.last = nn.Conv2d(narrow, 2, 1)
        self.classifier = AlignLinear(num_features, num_classes, config.class_bins, num_features * config.class_bins)

    def max_duration(self, num_snippets: int) -> int:
        """D of a rung: the full grid's limit, shrunk with L so that it stays the same number of seconds."""
        return self.config.longest(num_snippets, self.full_snippets)

    def forward(self, features_BCL: Tensor) -> HeadOutput:
        length = features_BCL.shape[2]
        duration = self.max_duration(length)
        base_BCL, _ = self.base_graph(self.base(features_BCL))
        graph_BCL, _ = self.graph(base_BCL)
        start_BL = self.start(self.start_graph(base_BCL)[0]).squeeze(1)
        end_BL = self.end(self.end_graph(base_BCL)[0]).squeeze(1)

        neighbours_BCL = gather_neighbours(graph_BCL, nearest_neighbours(graph_BCL)).mean(dim=3)
        inner_grid = proposal_grid(length, duration, self.config.inner_bins)
        context_grid = proposal_grid(length, duration, self.config.context_bins)
        aligned_BON = align_linear_sum(
            [(graph_BCL, inner_grid, self.inner.weight), (neighbours_BCL, context_grid, self.context.weight)],
            self.inner.bias,
        )
        cells_N2 = inner_grid.cells_on(features_BCL.device)
        proposals_B2N = self._map(F.relu(aligned_BON), cells_N2, duration, length)

        class_grid = proposal_grid(length, duration, self.config.class_bins, expand=0.0, margin=0.5)
        classes_BKN = align_linear(features_BCL, class_grid, self.classifier.weight, self.classifier.bias)
        return HeadOutput(start_BL, end_BL, proposals_B2N, classes_BKN, cells_N2)

    def _map(self, x_BON: Tensor, cells_N2: Tensor, duration: int, length: int) -> Tensor:
        """The convolutions after the first: on the valid cells where they are all 1x1, else on the (D, L) map."""
        x = F.relu(self.reduce(x_BON.unsqueeze(3)))
        d, s = cells_N2.unbind(1)
        if self.config.middle_kernel > 1:
            dense_BODL = x.new_zeros(x.shape[0], x.shape[1], duration, length)
            dense_BODL[:, :, d, s] = x.squeeze(3)
            x = dense_BODL
        x = F.relu(self.middle1(x))
        x = self.last(F.relu(self.middle2(x)))
        proposals_B2N: Tensor = x[:, :, d, s] if self.config.middle_kernel > 1 else x.squeeze(3)
        return proposals_B2N

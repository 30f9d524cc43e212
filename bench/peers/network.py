"""The whole network in plain PyTorch, with our modules: what a step costs without lean blocks and align_linear."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from bench.peers.align import sampling_matrix
from bench.peers.shift import published_shift
from lofi_fast.encoder.resnet import Bottleneck, TSMResNet
from lofi_fast.head.gtad import GTAD, gather_neighbours, nearest_neighbours
from lofi_fast.head.maps import HeadOutput
from lofi_fast.kernels import ProposalGrid, proposal_grid


def plain_features(encoder: TSMResNet, frames_NHWC: Tensor, num_frames: int) -> Tensor:
    """TSM (Lin et al. 2019) as its authors compute it: features (N, C) of uint8 frames (N*T, H, W, 3)."""
    x = frames_NHWC.permute(0, 3, 1, 2).to(encoder.conv1.weight.dtype)
    x = (x - encoder.mean) / encoder.std
    x = F.max_pool2d(F.relu(encoder.bn1(encoder.conv1(x)), inplace=True), 3, 2, 1)
    for stage in encoder.stages:
        for block in stage:
            y = published_shift(x, num_frames, x.shape[1] // 8) if block.shifted else x
            y = F.relu(block.bn1(block.conv1(y)), inplace=True)
            y = block.bn2(block.conv2(y))
            if isinstance(block, Bottleneck):
                y = block.bn3(block.conv3(F.relu(y, inplace=True)))
            identity = x if block.downsample is None else block.downsample(x)
            x = F.relu(y + identity, inplace=True)
    return x.mean(dim=(2, 3)).float().unflatten(0, (-1, num_frames)).mean(dim=1)


class DenseHead(nn.Module):
    """G-TAD with SGAlign as a product with a dense sampling matrix, and the convolutions after it on the whole map."""

    def __init__(self, head: GTAD, length: int) -> None:
        super().__init__()
        self.head, self.length = head, length
        config, duration = head.config, head.max_duration(length)
        self.grid = proposal_grid(length, duration, config.inner_bins)
        grids = (
            self.grid,
            proposal_grid(length, duration, config.context_bins),
            proposal_grid(length, duration, config.class_bins, expand=0.0, margin=0.5),
        )
        for name, grid in zip(("inner", "context", "classes"), grids, strict=True):
            self.register_buffer(name, _map_matrix(grid), persistent=False)

    def forward(self, features_BCL: Tensor) -> HeadOutput:
        head = self.head
        base_BCL, _ = head.base_graph(head.base(features_BCL))
        graph_BCL, _ = head.graph(base_BCL)
        start_BL = head.start(head.start_graph(base_BCL)[0]).squeeze(1)
        end_BL = head.end(head.end_graph(base_BCL)[0]).squeeze(1)
        neighbours_BCL = gather_neighbours(graph_BCL, nearest_neighbours(graph_BCL)).mean(dim=3)
        aligned = [self._aligned(graph_BCL, self.inner), self._aligned(neighbours_BCL, self.context)]
        weight = torch.cat([head.inner.weight.flatten(1), head.context.weight.flatten(1)], dim=1)
        x = F.relu(F.conv2d(torch.cat(aligned, dim=1), weight[:, :, None, None], head.inner.bias))
        x = F.relu(head.reduce(x))
        x = head.last(F.relu(head.middle2(F.relu(head.middle1(x)))))
        classes = F.conv2d(
            self._aligned(features_BCL, self.classes), head.classifier.weight.flatten(1)[:, :, None, None],
            head.classifier.bias,
        )  # fmt: skip
        d, s = self.grid.cells.to(features_BCL.device).unbind(1)
        return HeadOutput(start_BL, end_BL, x[:, :, d, s], classes[:, :, d, s], self.grid.cells.to(features_BCL.device))

    def _aligned(self, features_BCL: Tensor, matrix: Tensor) -> Tensor:
        """(B, C*R, D, L)."""
        aligned = torch.matmul(features_BCL, matrix.to(features_BCL.dtype))
        return aligned.view(len(features_BCL), -1, self.head.max_duration(self.length), self.length)


def _map_matrix(grid: ProposalGrid) -> Tensor:
    """(L, R*D*L): the sampling weights of every cell of the map; zeros where a proposal would end after the video."""
    matrix = torch.zeros(grid.num_snippets, grid.num_bins, grid.max_duration * grid.num_snippets)
    d, s = grid.cells.unbind(1)
    matrix[:, :, d * grid.num_snippets + s] = sampling_matrix(grid, torch.float32)
    return matrix.flatten(1)


def checkpointed(encoder: TSMResNet, frames: Tensor, num_frames: int, snippets: int) -> Tensor:
    """OpenTAD's way: the plain network, recomputed in chunks of `snippets` snippets."""
    parts = frames.split(snippets * num_frames)
    return torch.cat([checkpoint(plain_features, encoder, part, num_frames, use_reentrant=False) for part in parts])


def sampled(encoder: TSMResNet, frames: Tensor, num_frames: int, chosen: Tensor, snippets: int) -> Tensor:
    """ETAD's way (Liu et al. 2022): features of all snippets, and gradients through those `chosen` alone.

    The others run without a graph, `snippets` at a time.
    """
    frames_NT = frames.unflatten(0, (-1, num_frames))
    rest = torch.ones(len(frames_NT), dtype=torch.bool)
    rest[chosen] = False
    others = rest.nonzero().squeeze(1).to(frames.device)
    chosen = chosen.to(frames.device)
    parts = [plain_features(encoder, frames_NT[chosen].flatten(0, 1), num_frames)]
    with torch.no_grad():
        for part in others.split(snippets) if len(others) else ():
            parts.append(plain_features(encoder, frames_NT[part].flatten(0, 1), num_frames))
    return torch.cat(parts)[torch.cat([chosen, others]).argsort()]

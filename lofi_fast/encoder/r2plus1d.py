"""R(2+1)D-18 (Tran et al., CVPR 2018): each 3-D convolution is one over space, then one over time, a ReLU between.

Shapes: N snippets, T frames a snippet, H x W pixels, C channels. Module names are torchvision's `r2plus1d_18`, so that
its state dict loads as it is. Three of the four stages halve time as well as space: 8 frames become 1.

The lean form is for frozen batch norm, which is folded into the convolutions. It keeps the input of a block and what
comes out of each ReLU: the sign of a ReLU's output is its mask, and the affine needs nothing. The stem keeps the uint8
frames in place of its input. Plain PyTorch keeps the output of every convolution as well.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from lofi_fast.config import EncoderName
from lofi_fast.encoder.lean import GradientSum, Tied, default_chunk, tie
from lofi_fast.encoder.protocol import Encoder

# Of Kinetics-400, with which torchvision's and TSP's weights were trained.
KINETICS_MEAN = (0.43216, 0.394666, 0.37645)
KINETICS_STD = (0.22803, 0.22145, 0.216989)
NUM_BLOCKS = (2, 2, 2, 2)  # in each of the four stages


def _over_space(in_channels: int, out_channels: int, kernel: int, stride: int = 1) -> nn.Conv3d:
    half = kernel // 2
    return nn.Conv3d(in_channels, out_channels, (1, kernel, kernel), (1, stride, stride), (0, half, half), bias=False)


def _over_time(in_channels: int, out_channels: int, stride: int = 1) -> nn.Conv3d:
    return nn.Conv3d(in_channels, out_channels, (3, 1, 1), (stride, 1, 1), (1, 0, 0), bias=False)


def _factored(in_channels: int, middle: int, out_channels: int, stride: int = 1) -> nn.Sequential:
    """A 3x3x3 convolution as 1x3x3, then 3x1x1."""
    return nn.Sequential(
        _over_space(in_channels, middle, 3, stride),
        nn.BatchNorm3d(middle),
        nn.ReLU(inplace=True),
        _over_time(middle, out_channels, stride),
    )


class BasicBlock(nn.Module):
    """out = relu(bn(factored(relu(bn(factored(x))))) + identity(x))."""

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        middle = in_channels * channels * 27 // (in_channels * 9 + 3 * channels)  # weights as a full 3x3x3 has them
        self.conv1 = nn.Sequential(
            _factored(in_channels, middle, channels, stride), nn.BatchNorm3d(channels), nn.ReLU(inplace=True)
        )
        self.conv2 = nn.Sequential(_factored(channels, middle, channels), nn.BatchNorm3d(channels))
        self.downsample: nn.Sequential | None = None
        if stride != 1 or in_channels != channels:
            self.downsample = nn.Sequential(
                nn.Conv3d(in_channels, channels, 1, stride, bias=False), nn.BatchNorm3d(channels)
            )

    def forward(self, x_NCTHW: Tensor) -> Tensor:
        identity = x_NCTHW if self.downsample is None else self.downsample(x_NCTHW)
        return F.relu(self.conv2(self.conv1(x_NCTHW)) + identity, inplace=True)

    def pairs(self) -> list[tuple[nn.Module, nn.Module]]:
        """The branch's convolutions, each with the batch norm after it."""
        first, second = cast(nn.Sequential, self.conv1[0]), cast(nn.Sequential, self.conv2[0])
        return [(first[0], first[1]), (first[3], self.conv1[1]), (second[0], second[1]), (second[3], self.conv2[1])]


class R2Plus1D(Encoder):
    """uint8 RGB frames (N*T, H, W, 3) -> one feature vector a snippet (N, 8 * `width`).

    `width` is the channel count of the first stage: 64 in the paper, less for small data. Frames are normalised with
    the mean and std of Kinetics-400 inside. Features are the mean over time and space.
    """

    memory_format = torch.channels_last_3d
    mean: Tensor
    std: Tensor

    def __init__(self, name: EncoderName = "r2plus1d_18", width: int = 64) -> None:
        super().__init__()
        self.name, self.width = name, width
        middle = 45 * width // 64
        self.stem = nn.Sequential(
            _over_space(3, middle, 7, 2),
            nn.BatchNorm3d(middle),
            nn.ReLU(inplace=True),
            _over_time(middle, width),
            nn.BatchNorm3d(width),
            nn.ReLU(inplace=True),
        )
        channels = width
        for stage, num_blocks in enumerate(NUM_BLOCKS):
            blocks = []
            for index in range(num_blocks):
                blocks.append(BasicBlock(channels, width << stage, 2 if stage > 0 and index == 0 else 1))
                channels = width << stage
            self.add_module(f"layer{stage + 1}", nn.Sequential(*blocks))
        self.num_features = channels
        self.register_buffer("mean", 255 * torch.tensor(KINETICS_MEAN), persistent=False)
        self.register_buffer("std", 255 * torch.tensor(KINETICS_STD), persistent=False)
        for module in self.modules():
            if isinstance(module, nn.Conv3d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    @property
    def blocks(self) -> list[BasicBlock]:
        stages = (cast(nn.Sequential, getattr(self, f"layer{i + 1}")) for i in range(len(NUM_BLOCKS)))
        return [cast(BasicBlock, block) for stage in stages for block in stage]

    def forward(self, frames_NHWC: Tensor, num_frames: int) -> Tensor:
        """Features (N, num_features) of uint8 frames (N*T, H, W, 3), T = `num_frames` to a snippet."""
        x = self.stem(_pixels(_snippets(frames_NHWC, num_frames), self.mean, self.std, self.mean.dtype))
        for block in self.blocks:
            x = block(x)
        return _pooled(x)

    def encode(
        self,
        frames_NHWC: Tensor,
        num_frames: int,
        *,
        chunk: int | None = None,
        recompute: bool = False,
        eight_bit: bool = False,
    ) -> Tensor:
        """See `Encoder.encode`. The lean form where batch norm is frozen, else the plain one: the same features and
        gradients to rounding.

        Raises ValueError where the frames are no whole number of snippets, for `eight_bit`, which this encoder does not
        have, and for `recompute` while batch norm is live.
        """
        if eight_bit:
            raise ValueError(f"{self.name} cannot keep its activations in 8 bits")
        if not self.frozen_batchnorm:
            if recompute:
                raise ValueError("recompute needs frozen batch norm: live statistics tie the snippets of a batch")
            features: Tensor = self(frames_NHWC, num_frames)
            return features
        snippets = _snippets(frames_NHWC, num_frames)
        parts = snippets.split(chunk or default_chunk(num_frames, max(frames_NHWC.shape[1:3])))
        lean = Lean.of(self)
        if recompute and torch.is_grad_enabled():
            # Weights and ties are captured, not passed: the non-reentrant form follows them through the graph.
            return torch.cat([checkpoint(lean, part, use_reentrant=False, preserve_rng_state=False) for part in parts])
        return torch.cat([lean(part) for part in parts])


def _snippets(frames_NHWC: Tensor, num_frames: int) -> Tensor:
    """(N, T, H, W, 3) of (N*T, H, W, 3)."""
    if frames_NHWC.shape[0] % num_frames:
        raise ValueError(f"{frames_NHWC.shape[0]} frames are not a whole number of {num_frames}-frame snippets")
    snippets_NTHWC: Tensor = frames_NHWC.unflatten(0, (-1, num_frames))
    return snippets_NTHWC


def _pixels(snippets_NTHWC: Tensor, mean: Tensor, std: Tensor, dtype: torch.dtype) -> Tensor:
    """Normalised pixels (N, 3, T, H, W), channels-last in memory, as decoded."""
    return ((snippets_NTHWC - mean) / std).to(dtype).permute(0, 4, 1, 2, 3)


def _pooled(x_NCTHW: Tensor) -> Tensor:
    return x_NCTHW.mean(dim=(2, 3, 4), dtype=torch.promote_types(x_NCTHW.dtype, torch.float32))


@dataclass(frozen=True)
class Convolution:
    """How one convolution is applied; its bias (C,) is the frozen batch norm's shift, without gradient."""

    bias: Tensor
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    total: GradientSum  # of its folded weight

    def forward(self, x: Tensor, weight: Tensor) -> Tensor:
        return F.conv3d(x, weight, self.bias, self.stride, self.padding)

    def backward(self, grad: Tensor, x: Tensor, weight: Tensor, need_x: bool, need_weight: bool) -> Tensor | None:
        """The gradient of x; that of the weight is added to its sum."""
        grad_x, grad_weight, _ = torch.ops.aten.convolution_backward.default(
            grad, x, weight, None, self.stride, self.padding, [1, 1, 1], False, [0, 0, 0], 1,
            [need_x, need_weight, False],
        )  # fmt: skip
        self.total.add(grad_weight)
        return cast("Tensor | None", grad_x)


@dataclass(frozen=True)
class Block:
    """A residual block, or the stem, which has no identity and takes frames."""

    branch: tuple[Convolution, ...]
    downsample: Convolution | None
    mean: Tensor | None = None  # of the stem
    std: Tensor | None = None

    def source(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """What the first convolution reads."""
        return x if self.mean is None or self.std is None else _pixels(x, self.mean, self.std, dtype)


class _Block(torch.autograd.Function):
    """(x, folded weights, ties) -> out. Keeps x, what comes out of each ReLU, and the weights."""

    @staticmethod
    def forward(ctx: Any, block: Block, x: Tensor, weights: tuple[Tensor, ...], *_: Tensor) -> Tensor:
        kept, hidden = [x], block.source(x, weights[0].dtype)
        for convolution, weight in zip(block.branch, weights, strict=False):
            hidden = convolution.forward(hidden, weight)
            if convolution is block.branch[-1] and block.mean is None:
                hidden += x if block.downsample is None else block.downsample.forward(x, weights[-1])
            kept.append(hidden.relu_())
        ctx.block = block
        ctx.save_for_backward(*kept, *weights)
        return hidden

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        block: Block = ctx.block
        saved, count = ctx.saved_tensors, len(block.branch) + 1
        x, kept, weights = saved[0], list(saved[1:count]), saved[count:]
        del saved
        _, need_x, _, *need_weights = ctx.needs_input_grad
        grad: Tensor | None = torch.ops.aten.threshold_backward.default(grad_out, kept.pop(), 0)
        del grad_out
        grad_identity = grad if need_x else None
        for i in reversed(range(len(block.branch))):
            assert grad is not None
            hidden = kept.pop() if i > 0 else block.source(x, weights[0].dtype)
            grad = block.branch[i].backward(grad, hidden, weights[i], i > 0 or need_x, need_weights[i])
            if i > 0:
                torch.ops.aten.threshold_backward.grad_input(grad, hidden, 0, grad_input=grad)
            del hidden
        if block.downsample is not None:
            assert grad_identity is not None
            grad_identity = block.downsample.backward(grad_identity, x, weights[-1], need_x, need_weights[-1])
        if grad is not None and grad_identity is not None:
            grad += grad_identity
        return None, grad, None, *(None for _ in need_weights)


@dataclass(frozen=True)
class Lean:
    """An `R2Plus1D` with its frozen batch norm folded in, for one optimiser step."""

    blocks: tuple[Block, ...]  # the stem first
    weights: tuple[Tied, ...]  # of each block: of its branch, then of its downsampling

    @staticmethod
    def of(encoder: R2Plus1D) -> Lean:
        """Fold. The dtype is autocast's where that is on, else the parameters'."""
        dtype, device = encoder.mean.dtype, encoder.mean.device.type
        if torch.is_autocast_enabled(device) and dtype is not torch.float64:
            dtype = torch.get_autocast_dtype(device)

        def part(conv: nn.Module, bn: nn.Module) -> tuple[Convolution, Tensor, Tensor]:
            """With the folded weight, and its tie."""
            assert isinstance(conv, nn.Conv3d) and isinstance(bn, nn.BatchNorm3d)
            assert bn.running_mean is not None and bn.running_var is not None
            scale = bn.weight.detach() * torch.rsqrt(bn.running_var + bn.eps)
            bias = bn.bias.detach() - bn.running_mean * scale
            weight, total = conv.weight * scale.view(-1, 1, 1, 1, 1), GradientSum()
            folded = weight.detach().to(dtype, memory_format=torch.channels_last_3d)
            padding = cast("tuple[int, ...]", conv.padding)
            return Convolution(bias.to(dtype), conv.stride, padding, total), folded, tie(weight, total)

        def block(
            pairs: list[tuple[nn.Module, nn.Module]], downsample: nn.Sequential | None = None
        ) -> tuple[Block, Tied]:
            parts = [part(*pair) for pair in pairs]
            if downsample is not None:
                parts.append(part(downsample[0], downsample[1]))
            convolutions, folded, ties = zip(*parts, strict=True)
            branch = convolutions[: len(pairs)]
            return Block(branch, None if downsample is None else convolutions[-1]), Tied(folded, ties)

        stem, stem_weights = block([(encoder.stem[0], encoder.stem[1]), (encoder.stem[3], encoder.stem[4])])
        blocks, weights = zip(*(block(module.pairs(), module.downsample) for module in encoder.blocks), strict=True)
        return Lean((replace(stem, mean=encoder.mean, std=encoder.std), *blocks), (stem_weights, *weights))

    def __call__(self, snippets_NTHWC: Tensor) -> Tensor:
        """Features of the snippets of one chunk."""
        x = snippets_NTHWC
        with torch.autocast(x.device.type, enabled=False):
            for block, weights in zip(self.blocks, self.weights, strict=True):
                x = _Block.apply(block, x, weights.folded, *weights.ties)  # type: ignore[no-untyped-call]
            return _pooled(x)

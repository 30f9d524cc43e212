"""TSM-ResNet 18/34/50: a 2D ResNet whose residual branches see a temporally shifted input (Lin et al., ICCV 2019).

Shapes: N snippets, T frames a snippet, H x W pixels, C channels. Module names are torchvision's, so that its ResNet
state dicts load as they are. The frame count is an argument of every call: baked into the module, it would mix videos
silently as soon as a step's frame count changes and still divides.
"""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lofi_fast.config import EncoderName
from lofi_fast.encoder.protocol import Encoder
from lofi_fast.encoder.resnet_table import BLOCKS
from lofi_fast.kernels import temporal_shift

SHIFT_EVERY_SECOND_BLOCK_FROM = 23  # TSM: only the long stage of a ResNet-101 has so many
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


class Conv(nn.Conv2d):
    """A convolution without bias that pads by half its kernel."""

    def __init__(self, in_channels: int, out_channels: int, kernel: int, stride: int = 1) -> None:
        super().__init__(in_channels, out_channels, kernel, stride, padding=kernel // 2, bias=False)


class BasicBlock(nn.Module):
    """out = relu(bn2(conv2(relu(bn1(conv1(shift(x)))))) + identity(x)); the identity path is not shifted."""

    expansion = 1

    def __init__(self, in_channels: int, channels: int, stride: int, shifted: bool, conv: type[Conv] = Conv) -> None:
        super().__init__()
        self.shifted = shifted
        self.conv1 = conv(in_channels, channels, 3, stride)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = conv(channels, channels, 3)
        self.bn2 = nn.BatchNorm2d(channels)
        self.downsample = _downsample(in_channels, channels, stride, conv)

    def forward(self, x_NCHW: Tensor, num_frames: int) -> Tensor:
        y = temporal_shift(x_NCHW, num_frames) if self.shifted else x_NCHW
        y = F.relu(self.bn1(self.conv1(y)), inplace=True)
        y = self.bn2(self.conv2(y))
        identity = x_NCHW if self.downsample is None else self.downsample(x_NCHW)
        return F.relu(y + identity, inplace=True)


class Bottleneck(nn.Module):
    """The 1x1 - 3x3 - 1x1 block of ResNet-50, stride on the 3x3, shifted before its first convolution."""

    expansion = 4

    def __init__(self, in_channels: int, channels: int, stride: int, shifted: bool, conv: type[Conv] = Conv) -> None:
        super().__init__()
        self.shifted = shifted
        self.conv1 = conv(in_channels, channels, 1)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = conv(channels, channels, 3, stride)
        self.bn2 = nn.BatchNorm2d(channels)
        self.conv3 = conv(channels, 4 * channels, 1)
        self.bn3 = nn.BatchNorm2d(4 * channels)
        self.downsample = _downsample(in_channels, 4 * channels, stride, conv)

    def forward(self, x_NCHW: Tensor, num_frames: int) -> Tensor:
        y = temporal_shift(x_NCHW, num_frames) if self.shifted else x_NCHW
        y = F.relu(self.bn1(self.conv1(y)), inplace=True)
        y = F.relu(self.bn2(self.conv2(y)), inplace=True)
        y = self.bn3(self.conv3(y))
        identity = x_NCHW if self.downsample is None else self.downsample(x_NCHW)
        return F.relu(y + identity, inplace=True)


def _downsample(in_channels: int, out_channels: int, stride: int, conv: type[Conv]) -> nn.Sequential | None:
    if stride == 1 and in_channels == out_channels:
        return None
    return nn.Sequential(conv(in_channels, out_channels, 1, stride), nn.BatchNorm2d(out_channels))


class TSMResNet(Encoder):
    """uint8 RGB frames (N*T, H, W, 3) -> one feature vector a snippet (N, num_features).

    `width` is the channel count of the first stage: 64 in the paper, less for small data. Frames are normalised with
    ImageNet's mean and std inside. Features are the spatial mean, then the mean over the T frames of a snippet.
    """

    mean: Tensor
    std: Tensor
    conv: type[Conv] = Conv  # what its residual blocks multiply with

    def __init__(self, name: EncoderName, width: int = 64) -> None:
        super().__init__()
        self.name, self.width = name, width
        block: type[BasicBlock | Bottleneck] = Bottleneck if name == "tsm_r50" else BasicBlock
        self.conv1 = Conv(3, width, 7, 2)
        self.bn1 = nn.BatchNorm2d(width)
        channels = width
        for stage, num_blocks in enumerate(BLOCKS[name]):
            every = 2 if num_blocks >= SHIFT_EVERY_SECOND_BLOCK_FROM else 1
            blocks: list[nn.Module] = []
            for index in range(num_blocks):
                stride = 2 if stage > 0 and index == 0 else 1
                blocks.append(block(channels, width << stage, stride, index % every == 0, self.conv))
                channels = (width << stage) * block.expansion
            self.add_module(f"layer{stage + 1}", nn.ModuleList(blocks))
        self.num_features = channels
        self.register_buffer("mean", 255 * torch.tensor(IMAGENET_MEAN).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", 255 * torch.tensor(IMAGENET_STD).view(1, 3, 1, 1), persistent=False)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    @property
    def stages(self) -> tuple[nn.ModuleList, ...]:
        return tuple(cast(nn.ModuleList, getattr(self, f"layer{i}")) for i in (1, 2, 3, 4))

    def forward(self, frames_NHWC: Tensor, num_frames: int) -> Tensor:
        """Features (N, num_features) of uint8 frames (N*T, H, W, 3), T = `num_frames` to a snippet."""
        if frames_NHWC.shape[0] % num_frames:
            raise ValueError(f"{frames_NHWC.shape[0]} frames are not a whole number of {num_frames}-frame snippets")
        x = frames_NHWC.permute(0, 3, 1, 2).to(self.conv1.weight.dtype)  # channels-last in memory, as decoded
        x = (x - self.mean) / self.std
        x = F.relu(self.bn1(self.conv1(x)), inplace=True)
        x = F.max_pool2d(x, 3, 2, 1)
        for stage in self.stages:
            for block in stage:
                x = block(x, num_frames)
        sums = torch.promote_types(x.dtype, torch.float32)
        x_NTC: Tensor = x.mean(dim=(2, 3), dtype=sums).unflatten(0, (-1, num_frames))
        return x_NTC.mean(dim=1)

"""TSM-ResNet as a table of its convolutions and activations, from which its ledgers are worked out."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, lru_cache

from lofi_fast.config import EncoderName
from lofi_fast.ledger import RGB

# Blocks in each of the four stages.
BLOCKS: dict[EncoderName, tuple[int, int, int, int]] = {
    "tsm_r18": (2, 2, 2, 2),
    "tsm_r34": (3, 4, 6, 3),
    "tsm_r50": (3, 4, 6, 3),
}


@dataclass(frozen=True)
class Activation:
    """One activation of a frame."""

    channels: int
    side: int

    @cached_property
    def numel(self) -> int:
        return self.channels * self.side * self.side


@dataclass(frozen=True)
class Conv:
    """A convolution, with the frozen batch norm after it."""

    source: Activation
    result: Activation
    kernel: int

    @staticmethod
    def of(source: Activation, channels: int, kernel: int, stride: int = 1) -> Conv:
        return Conv(source, Activation(channels, (source.side - 1) // stride + 1), kernel)

    @cached_property
    def weight(self) -> int:
        return self.source.channels * self.result.channels * self.kernel**2


@dataclass(frozen=True)
class Block:
    """A residual block: x -> the branch's convolutions, each but the last with a ReLU -> + identity, ReLU -> out."""

    branch: tuple[Conv, ...]
    downsample: Conv | None

    @cached_property
    def x(self) -> Activation:
        return self.branch[0].source

    @cached_property
    def out(self) -> Activation:
        return self.branch[-1].result

    @cached_property
    def kept(self) -> int:
        """Numbers that the lean block keeps beside x: y and out."""
        return sum(conv.result.numel for conv in self.branch)

    @cached_property
    def convs(self) -> tuple[Conv, ...]:
        return self.branch if self.downsample is None else (*self.branch, self.downsample)

    @cached_property
    def weight(self) -> int:
        return sum(conv.weight for conv in self.convs)


@dataclass(frozen=True)
class Network:
    """A TSM-ResNet over square frames. Every block's input is shifted."""

    stem: Conv
    pooled: Activation
    blocks: tuple[Block, ...]

    @cached_property
    def convs(self) -> tuple[Conv, ...]:
        return (self.stem, *(conv for block in self.blocks for conv in block.convs))

    @cached_property
    def num_features(self) -> int:
        return self.blocks[-1].out.channels

    @cached_property
    def weights(self) -> int:
        return sum(conv.weight for conv in self.convs)

    @cached_property
    def channels(self) -> int:
        """Of all batch norms together."""
        return sum(conv.result.channels for conv in self.convs)


@lru_cache(maxsize=256)
def network(name: EncoderName, width: int, side: int) -> Network:
    """An encoder of `width` channels in its first stage, over frames of `side` x `side` pixels."""
    stem = Conv.of(Activation(RGB, side), width, 7, 2)
    pooled = x = Activation(width, (stem.result.side - 1) // 2 + 1)
    blocks = []
    for stage, num_blocks in enumerate(BLOCKS[name]):
        for index in range(num_blocks):
            channels, stride = width << stage, 2 if stage > 0 and index == 0 else 1
            if name == "tsm_r50":
                first = Conv.of(x, channels, 1)
                second = Conv.of(first.result, channels, 3, stride)
                branch: tuple[Conv, ...] = (first, second, Conv.of(second.result, 4 * channels, 1))
            else:
                first = Conv.of(x, channels, 3, stride)
                branch = (first, Conv.of(first.result, channels, 3))
            out = branch[-1].result
            blocks.append(Block(branch, None if out == x else Conv.of(x, out.channels, 1, stride)))
            x = out
    return Network(stem, pooled, tuple(blocks))

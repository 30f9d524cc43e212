"""What the ledgers of convolutional encoders share: a network as a table of its convolutions and activations, and the
bytes of a convolution with its batch norm, folded into it or live.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from lofi_fast.ledger import FLOAT, LONG, RGB, Parameters, Tally

# A network as a table


@dataclass(frozen=True)
class Activation:
    """One activation, of a frame or of the frames of a snippet."""

    channels: int
    side: int
    frames: int = 1

    @cached_property
    def numel(self) -> int:
        return self.channels * self.frames * self.side * self.side


@dataclass(frozen=True)
class Conv:
    """A convolution, with the batch norm after it. taps: numbers of its kernel for two channels."""

    source: Activation
    result: Activation
    taps: int

    @staticmethod
    def over_space(source: Activation, channels: int, kernel: int, stride: int = 1) -> Conv:
        return Conv(source, Activation(channels, (source.side - 1) // stride + 1, source.frames), kernel**2)

    @staticmethod
    def over_time(source: Activation, channels: int, stride: int = 1) -> Conv:
        return Conv(source, Activation(channels, source.side, (source.frames - 1) // stride + 1), 3)

    @cached_property
    def weight(self) -> int:
        return self.source.channels * self.result.channels * self.taps

    @cached_property
    def multiply_adds(self) -> int:
        return self.weight * (self.result.numel // self.result.channels)

    @cached_property
    def moved(self) -> int:
        """Numbers read and written: what lies on both sides, by three convolutions (forward, and backward for the input
        and for the weight); and its output, and the gradient of that, by what follows it.
        """
        return 3 * (self.source.numel + self.result.numel) + 4 * self.result.numel


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
    def convs(self) -> tuple[Conv, ...]:
        return self.branch if self.downsample is None else (*self.branch, self.downsample)

    @cached_property
    def kept(self) -> int:
        """Numbers that the lean block keeps beside x."""
        return sum(conv.result.numel for conv in self.branch)

    @cached_property
    def weight(self) -> int:
        return sum(conv.weight for conv in self.convs)


@dataclass(frozen=True)
class Network:
    """A residual network over square frames."""

    stem: tuple[Conv, ...]
    blocks: tuple[Block, ...]

    @cached_property
    def image(self) -> int:
        """Numbers of its input."""
        return self.stem[0].source.numel

    @cached_property
    def convs(self) -> tuple[Conv, ...]:
        return (*self.stem, *(conv for block in self.blocks for conv in block.convs))

    @cached_property
    def last(self) -> Activation:
        return self.blocks[-1].out

    @cached_property
    def num_features(self) -> int:
        return self.last.channels

    @cached_property
    def weights(self) -> int:
        return sum(conv.weight for conv in self.convs)

    @cached_property
    def channels(self) -> int:
        """Of all batch norms together."""
        return sum(conv.result.channels for conv in self.convs)

    @cached_property
    def parameters(self) -> Parameters:
        """Batch norm holds two parameters, two statistics and a count of batches; only convolutions learn."""
        held = FLOAT * (self.weights + 4 * self.channels + 2 * RGB) + LONG * len(self.convs)
        return Parameters(held, self.weights, len(self.convs), self.weights)


# Batch norm folded into the weights


def folded_weight_gradient(conv: Conv, done: int, e: int, first: bool) -> int:
    """Bytes of gradients of folded weights that backward makes up to `conv`, after `done` numbers of the same block.

    A chunk's gradient is a number of `e` bytes. It is added to a sum in fp32, which the first chunk makes: out of the
    gradient itself where that is in fp32.
    """
    made = e * conv.weight
    if first:
        made += FLOAT * done + (0 if e == FLOAT else FLOAT * conv.weight)
    return made


def unfold(tally: Tally, net: Network, gradient: int) -> None:
    """From the gradients of the folded weights to those of the parameters, which add `gradient` bytes a number."""
    for conv in reversed(net.convs):
        tally.spike(FLOAT * conv.weight)
        tally.take((gradient - FLOAT) * conv.weight)


# Live batch norm. `size`: bytes of a number, times the frames or snippets; `cast`: bytes of a number in the copy that
# autocast keeps of a weight, 0 without


def normalised(tally: Tally, conv: Conv, size: int, cast: int) -> None:
    """A convolution and its batch norm, whose mean and inverse deviation are kept."""
    tally.take(cast * conv.weight + size * conv.result.numel)
    tally.take(size * conv.result.numel + 2 * FLOAT * conv.result.channels)


def normalised_backward(tally: Tally, conv: Conv, size: int) -> None:
    """Through the batch norm: the gradient of its input is left beside that of its output; the input goes."""
    tally.take(size * conv.result.numel + 2 * FLOAT * conv.result.channels)
    tally.take(-size * conv.result.numel - 2 * FLOAT * conv.result.channels)


def weight_gradient(tally: Tally, conv: Conv, cast: int) -> None:
    """In the activations' dtype, then in float32; the cast weight goes in between."""
    tally.take((cast or FLOAT) * conv.weight)
    if cast:
        tally.take(-cast * conv.weight)
        tally.take(FLOAT * conv.weight)
        tally.take(-cast * conv.weight)

"""The ledger of TSM-ResNet: the bytes that encoder/lean.py holds in a step, and what plain PyTorch keeps beside it.

Kept by the lean encoder for each frame, in numbers of the activations' dtype (R18, width 64, at 224 px;
U = 64 * 56 * 56):

    frames           3 * 224 * 224 bytes             uint8                                        0.151 MB
    stem             pooled U, argmax U bytes        int8 position of each maximum                0.201 MB + U
    stage 1          2 blocks x (y, out)             64 channels at 56 px, U each                 4 U
    stage 2          2 blocks x (y, out)             128 channels at 28 px, U / 2 each            2 U
    stage 3, 4       2 blocks x (y, out) each        U / 4, U / 8 each                            1.5 U
    in all           8.5 U + 0.351 MB                7.18 MB in fp32, 3.76 MB in bf16 or fp16

and once: the folded weights and the few numbers of the frozen batch norms. With `eight_bit` a number of an activation
is one byte, and each channel of a frame has a scale of 4: 2.07 MB a frame. With `recompute` activations exist only
while their chunk's gradient is worked out, and a folded weight only while it is read. Plain PyTorch keeps 25.1 MB a
frame in fp32, and 13.3 MB in bf16 beside 22 MB of cast weights (`plain_kept_bytes`).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

from lofi_fast.config import EncoderName
from lofi_fast.encoder import resnet_live_ledger
from lofi_fast.encoder.chunks import Chunk, divided, play_backward, play_forward
from lofi_fast.encoder.conv_ledger import Activation, Block, Network, folded_weight_gradient, unfold
from lofi_fast.encoder.resnet_table import network
from lofi_fast.fidelity import FRAMES_PER_SNIPPET
from lofi_fast.ledger import FLOAT, LONG, Parameters, Pass, Stage, Tally

# What is kept


def lean_kept_bytes(
    name: EncoderName,
    width: int,
    side: int,
    num_frames: int,
    itemsize: int,
    *,
    recompute: bool = False,
    eight_bit: bool = False,
) -> int:
    """Bytes that autograd saves of the lean encoder's forward, uint8 frames included. `itemsize`: 4 (fp32) or 2 (bf16
    and fp16 autocast). To be compared with `plain_kept_bytes`; a step holds some more, see `StepBytes`.
    """
    net = network(name, width, side)
    activations = 0 if recompute else _kept_activations(net, num_frames, itemsize, eight_bit)
    once = (0 if recompute else itemsize * net.weights) + FLOAT * net.channels
    return num_frames * net.image + activations + once


def plain_kept_bytes(name: EncoderName, width: int, side: int, num_frames: int, itemsize: int) -> int:
    """The same of plain PyTorch's graph (`TSMResNet.forward`, frozen batch norm, in-place ReLU), under autocast where
    `itemsize` is 2: the shifted copy, and the output of every convolution and of every ReLU.
    """
    net = network(name, width, side)
    numbers = net.image + 2 * net.stem[0].result.numel
    if net.blocks[0].downsample is not None:
        numbers += net.blocks[0].x.numel  # else no convolution reads it unshifted
    for block in net.blocks:
        numbers += block.x.numel + 2 * block.kept
        if block.downsample is not None:
            numbers += block.out.numel
    indices = LONG * net.blocks[0].x.numel
    return num_frames * (itemsize * numbers + indices) + (0 if itemsize == FLOAT else itemsize * net.weights)


def _kept_activations(net: Network, num_frames: int, itemsize: int, eight_bit: bool) -> int:
    x = net.blocks[0].x
    kept = [x, *(conv.result for block in net.blocks for conv in block.branch)]
    return num_frames * (sum(_stored(activation, itemsize, eight_bit) for activation in kept) + x.numel)


def _stored(activation: Activation, itemsize: int, eight_bit: bool) -> int:
    """Bytes of one frame's activation as it is kept for backward: itself, or its codes and a scale of each channel."""
    return activation.numel + FLOAT * activation.channels if eight_bit else itemsize * activation.numel


def _stages(net: Network, frames: int, e: int, recompute: bool, eight_bit: bool, first: bool) -> list[Stage]:
    """One chunk of `frames` frames through the lean encoder. `e`: bytes of a number in an activation. `first`: no chunk
    before it has made the sums of the weights' gradients.

    Autograd holds the gradients that come into a block (of its output and of that output's shifted copy) until the
    block is done. With `eight_bit` activations
    are handed on as they are, beside the bytes that are kept of them, and are made again where backward reads them.
    """
    size, stem, x = e * frames, net.stem[0], net.blocks[0].x
    pooled, argmax, conv = size * x.numel, frames * x.numel, size * stem.result.numel
    stored = frames * _stored(x, e, eight_bit)
    image, gradient = size * net.image, folded_weight_gradient(stem, 0, e, first)
    stages = [
        Stage(
            "stem",
            kept=stored + argmax,
            handed=2 * pooled if eight_bit else pooled,
            forward=max(conv, image + conv - (2 * pooled + argmax + (stored if eight_bit else 0))),
            weight=stem.weight,
            backward=conv + max(2 * pooled if eight_bit else pooled, image + gradient),
        )
    ]
    for index, block in enumerate(net.blocks):
        out = size * block.out.numel
        stored = frames * _stored(block.out, e, eight_bit)
        identity = 0 if block.downsample is None else out
        following = index + 1 < len(net.blocks)
        kept = frames * sum(_stored(conv.result, e, eight_bit) for conv in block.branch)
        handed = out * (following + eight_bit)
        folded = e if recompute else 0  # bytes of a number of a folded weight that is made once more
        inner = max(_through_block(block, size, e, eight_bit, first, folded))
        forward = identity + out - (stored if eight_bit else 0)
        if recompute:  # with the last folded weight, before the block's output is there
            last_conv = block.branch[-1]
            made = kept - stored + (size * last_conv.source.numel if eight_bit else 0) + identity + out
            forward = max(forward, made + folded * last_conv.weight - kept - handed)
        # The gradient before the last ReLU takes the place of the block's output, where that is not kept elsewhere;
        # an output that is kept in 8 bits is there once more as it was.
        relu = out if recompute or eight_bit else 0
        stages.append(
            Stage(
                f"block {index}",
                kept=kept,
                handed=handed,
                forward=forward,
                weight=block.weight,
                backward=max(inner, relu) if recompute and not eight_bit else out + max(inner, relu),
                pending=2 * size * block.x.numel,
            )
        )
    last, channels = net.blocks[-1].out.numel, net.num_features
    features = FLOAT * channels * frames // FRAMES_PER_SNIPPET
    stages.append(
        Stage(
            "features",  # the mean over space, then over the frames of a snippet, in fp32
            handed=features,
            forward=FLOAT * channels * frames,
            backward=FLOAT * channels * frames + (FLOAT if e == FLOAT else FLOAT + e) * frames * last,
            pending=size * last,
        )
    )
    return stages


def _through_block(block: Block, size: int, e: int, eight_bit: bool, first: bool, folded: int) -> Iterator[int]:
    """Bytes that are alive at each convolution in the backward of a block, beside the gradient of the block's output.

    `size`: bytes of one number of a frame's activation, for all frames. `folded`: bytes of a number of a folded
    weight that is made once more.
    """
    x, done = size * block.x.numel, 0
    for i in reversed(range(len(block.branch))):
        conv = block.branch[i]
        # The gradient of its output and of its input. At the first one also x's shifted copy; with `eight_bit` every
        # input is made again.
        comes = size * conv.result.numel if i + 1 < len(block.branch) else 0
        gives = size * conv.source.numel
        beside = folded * conv.weight + folded_weight_gradient(conv, done, e, first)
        yield comes + gives * (2 if i == 0 or eight_bit else 1) + beside
        done += conv.weight
    if block.downsample is not None:  # two gradients of x
        beside = folded * block.downsample.weight + folded_weight_gradient(block.downsample, done, e, first)
        yield x * (3 if eight_bit else 2) + beside


@lru_cache(maxsize=1024)
def chunk_bytes(
    name: EncoderName,
    width: int,
    side: int,
    frames: int,
    e: int,
    recompute: bool,
    eight_bit: bool,
    first: bool,
    last: bool,
) -> Chunk:
    """One chunk of `frames` frames; `first` and `last` say where it stands in the order of backward.

    The gradients of the folded weights are summed over chunks: the first chunk makes the sums, the others add to them
    in place. With the last chunk the folded weights go.
    """
    net = network(name, width, side)
    *stages, features = _stages(net, frames, e, recompute, eight_bit, first)
    forward, backward = Tally(), Tally()
    if recompute:  # nothing is kept yet, so nothing is stored in 8 bits either
        forward.forward(_stages(net, frames, e, recompute, False, first), keep=False)
    else:
        forward.forward([*stages, features])
    backward.spike(features.backward)
    backward.take(features.pending)
    if recompute:
        backward.forward(stages)
    backward.backward(stages, features.pending, 0, FLOAT if first else 0, e if last and not recompute else 0)
    return Chunk(forward.now, features.handed, forward.peak, backward.peak)


# The encoder in a step


@dataclass(frozen=True)
class ResNetLedger:
    """The ledger of a `TSMResNet` whose batch norm is frozen, run by encoder/lean.py."""

    name: EncoderName
    width: int = 64

    @property
    def num_features(self) -> int:
        return self._network.num_features

    @property
    def parameters(self) -> Parameters:
        return self._network.parameters

    def multiply_adds(self, side: int) -> int:
        return sum(conv.multiply_adds for conv in network(self.name, self.width, side).convs)

    def moved(self, side: int) -> int:
        """A block's input is shifted forward, once more in backward, and its gradient is shifted back."""
        net = network(self.name, self.width, side)
        return sum(conv.moved for conv in net.convs) + sum(3 * 2 * block.x.numel for block in net.blocks)

    @property
    def _network(self) -> Network:
        """At any side: weights and channels do not depend on it."""
        return network(self.name, self.width, 1)

    def forward(self, tally: Tally, work: Pass) -> int:
        """The folded weights and batch norms, then one chunk after the other, then the features put together."""
        net = network(self.name, self.width, work.side)
        once = self._folded(net, work) + FLOAT * 2 * net.channels
        tally.take(once)
        return once + play_forward(tally, *self._chunks(work))

    def without_gradients(self, tally: Tally, work: Pass) -> None:
        """The folded weights, then one chunk after the other, then the features put together."""
        net, e = network(self.name, self.width, work.side), work.itemsize
        frames, features = min(work.chunk, work.snippets) * FRAMES_PER_SNIPPET, FLOAT * work.snippets * net.num_features
        once = e * net.weights + FLOAT * 2 * net.channels
        tally.take(once)
        if e != FLOAT:  # the last one was made in float32, and is as large as any
            tally.spike(FLOAT * (net.convs[-1].weight + 3 * net.channels))
        tally.take(features)
        tally.forward(_stages(net, frames, e, False, False, False), keep=False)
        tally.spike(features)
        tally.take(-once)

    def live(self, tally: Tally, snippets: int, side: int, itemsize: int) -> None:
        resnet_live_ledger.play(tally, network(self.name, self.width, side), snippets, itemsize)

    def backward(self, tally: Tally, work: Pass) -> None:
        """The chunks in reverse, then from the gradients of the folded weights to those of the parameters."""
        net = network(self.name, self.width, work.side)
        play_backward(tally, FLOAT * net.weights, self._folded(net, work), *self._chunks(work))
        unfold(tally, net, work.gradient)

    @staticmethod
    def _folded(net: Network, work: Pass) -> int:
        """Bytes of the folded weights that are there from forward to backward."""
        return work.itemsize * (net.stem[0].weight if work.recompute else net.weights)

    def _chunks(self, work: Pass) -> tuple[int, Chunk, Chunk]:
        def part(snippets: int, first: bool, last: bool) -> Chunk:
            frames = snippets * FRAMES_PER_SNIPPET
            return chunk_bytes(
                self.name, self.width, work.side, frames, work.itemsize, work.recompute, work.eight_bit, first, last
            )

        return divided(work, part)

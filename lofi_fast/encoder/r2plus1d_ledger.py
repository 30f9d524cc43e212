"""The ledger of R(2+1)D-18: the bytes that its lean form holds in a step, and what plain PyTorch keeps beside it.

Kept by the lean form for each snippet: the uint8 frames and the output of every ReLU, in numbers of the activations'
dtype; and once the folded weights and the numbers of the frozen batch norms. At 112 px and width 64 that is 15.5 MB
a frame in fp32 and 7.8 MB in bf16. Plain PyTorch (`plain_kept_bytes`) keeps the output of every convolution as
well, and so twice as much.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

from lofi_fast.encoder.chunks import Chunk, divided, play_backward, play_forward
from lofi_fast.encoder.conv_ledger import (
    Activation,
    Block,
    Conv,
    Network,
    folded_weight_gradient,
    normalised,
    normalised_backward,
    unfold,
    weight_gradient,
)
from lofi_fast.fidelity import FRAMES_PER_SNIPPET
from lofi_fast.ledger import FLOAT, RGB, Parameters, Pass, Stage, Tally

NUM_BLOCKS = (2, 2, 2, 2)  # in each of the four stages


# The network as a table


@lru_cache(maxsize=256)
def network(width: int, side: int) -> Network:
    """An encoder of `width` channels in its first stage, over frames of `side` x `side` pixels."""
    first = Conv.over_space(Activation(RGB, side, FRAMES_PER_SNIPPET), 45 * width // 64, 7, 2)
    second = Conv.over_time(first.result, width)
    x, blocks = second.result, []
    for stage, num_blocks in enumerate(NUM_BLOCKS):
        for index in range(num_blocks):
            channels, stride = width << stage, 2 if stage > 0 and index == 0 else 1
            middle = x.channels * channels * 27 // (x.channels * 9 + 3 * channels)
            branch = [Conv.over_space(x, middle, 3, stride)]
            branch.append(Conv.over_time(branch[0].result, channels, stride))
            branch.append(Conv.over_space(branch[1].result, middle, 3))
            branch.append(Conv.over_time(branch[2].result, channels))
            out = branch[-1].result
            blocks.append(Block(tuple(branch), None if out == x else Conv(x, out, 1)))
            x = out
    return Network((first, second), tuple(blocks))


# What is kept


def lean_kept_bytes(width: int, side: int, snippets: int, itemsize: int, *, recompute: bool = False) -> int:
    """Bytes that autograd saves of the lean form's forward, uint8 frames included. `itemsize`: 4 (fp32) or 2 (bf16 and
    fp16 autocast). To be compared with `plain_kept_bytes`; a step holds some more, see `StepBytes`.
    """
    net = network(width, side)
    kept = sum(conv.result.numel for conv in net.stem) + sum(block.kept for block in net.blocks)
    once = (0 if recompute else itemsize * net.weights) + FLOAT * net.channels
    return snippets * (net.image + (0 if recompute else itemsize * kept)) + once


def plain_kept_bytes(width: int, side: int, snippets: int, itemsize: int) -> int:
    """The same of plain PyTorch's graph (`R2Plus1D.forward`, frozen batch norm, in-place ReLU), under autocast where
    `itemsize` is 2: the output of every convolution and of every ReLU.
    """
    net = network(width, side)
    numbers = net.image + sum(2 * conv.result.numel for conv in net.stem)
    for block in net.blocks:
        numbers += 2 * block.kept + (0 if block.downsample is None else block.out.numel)
    return snippets * itemsize * numbers + (0 if itemsize == FLOAT else itemsize * net.weights)


# One chunk


def _stages(net: Network, snippets: int, e: int, first: bool, recompute: bool = False) -> list[Stage]:
    """A chunk of `snippets` snippets through the lean form. `e`: bytes of a number in an activation. `first`: no chunk
    before it has made the sums of the weights' gradients.

    Autograd holds the gradient that comes into a block until the block is done, and so it does what it has saved; what
    was recomputed goes as soon as backward has used it. The stem reads its pixels, made anew from the frames in
    float32, in backward as in forward.
    """
    size, image = e * snippets, snippets * net.image
    results = [size * conv.result.numel for conv in net.stem]
    pixels = 2 * FLOAT * image
    over_space, over_time = net.stem
    of_space = folded_weight_gradient(over_space, over_time.weight, e, first)
    of_time = folded_weight_gradient(over_time, 0, e, first)
    used = results if recompute else [0, 0]
    stages = [
        Stage(
            "stem",
            kept=sum(results),
            forward=max(pixels - sum(results), e * image - results[1], 0),
            weight=over_space.weight + over_time.weight,
            backward=max(
                results[1],
                sum(results) + of_time - used[1],
                results[0] + max(pixels + (of_time if first else 0), e * image + of_space) - sum(used),
            ),
        )
    ]
    for index, block in enumerate(net.blocks):
        out = size * block.out.numel
        stages.append(
            Stage(
                f"block {index}",
                kept=size * block.kept,
                forward=0 if block.downsample is None else out,
                weight=block.weight,
                backward=out + max(0, *_through_block(block, size, e, first, recompute)),
                pending=size * block.x.numel,
            )
        )
    last = snippets * net.last.numel
    stages.append(
        Stage(
            "features",  # the mean over time and space, in fp32
            handed=FLOAT * snippets * net.num_features,
            backward=(FLOAT if e == FLOAT else FLOAT + e) * last,
            pending=e * last,
        )
    )
    return stages


def _through_block(block: Block, size: int, e: int, first: bool, recompute: bool) -> Iterator[int]:
    """Bytes that are alive at each convolution in the backward of a block, beside the gradients of the block's output
    after and before its last ReLU, and less what has gone of the block's own. `size`: bytes of one number of a
    snippet's activation, for all snippets.
    """
    done = gone = 0
    for i in reversed(range(len(block.branch))):
        conv = block.branch[i]
        gone += size * conv.result.numel if recompute else 0
        comes = size * conv.result.numel if i + 1 < len(block.branch) else 0
        yield comes + size * conv.source.numel + folded_weight_gradient(conv, done, e, first) - gone
        done += conv.weight
    if block.downsample is not None:  # two gradients of x
        yield 2 * size * block.x.numel + folded_weight_gradient(block.downsample, done, e, first) - gone


@lru_cache(maxsize=1024)
def chunk_bytes(width: int, side: int, snippets: int, e: int, recompute: bool, first: bool, last: bool) -> Chunk:
    """One chunk of `snippets` snippets; `first` and `last` say where it stands in the order of backward. With the last
    chunk the folded weights go, block by block; with `recompute` they stay to its end.
    """
    net = network(width, side)
    *stages, features = _stages(net, snippets, e, first, recompute)
    forward, backward = Tally(), Tally()
    if recompute:
        _forward_alone(forward, net, stages, e * snippets)
    else:
        forward.forward([*stages, features])
    backward.spike(features.backward)
    backward.take(features.pending)
    if recompute:
        backward.forward(stages)
    backward.backward(stages, features.pending, 0, FLOAT if first else 0, e if last and not recompute else 0)
    return Chunk(forward.now, features.handed, forward.peak, backward.peak)


def _forward_alone(tally: Tally, net: Network, stages: list[Stage], size: int) -> None:
    """`stages` forward where nothing is kept: a block's activations go, all but its output, when it is done."""
    x = 0
    for stage, out in zip(stages, (net.stem[1].result, *(block.out for block in net.blocks)), strict=True):
        tally.spike(x + stage.kept + stage.forward)
        x = size * out.numel


# The encoder in a step


@dataclass(frozen=True)
class R2Plus1DLedger:
    """The ledger of an `R2Plus1D` whose batch norm is frozen, run by its lean form."""

    width: int = 64

    @property
    def num_features(self) -> int:
        return self._network.num_features

    @property
    def parameters(self) -> Parameters:
        return self._network.parameters

    def multiply_adds(self, side: int) -> int:
        return sum(conv.multiply_adds for conv in network(self.width, side).convs) // FRAMES_PER_SNIPPET

    def moved(self, side: int) -> int:
        return sum(conv.moved for conv in network(self.width, side).convs) // FRAMES_PER_SNIPPET

    @property
    def _network(self) -> Network:
        """At any side: weights and channels do not depend on it."""
        return network(self.width, 1)

    def forward(self, tally: Tally, work: Pass) -> int:
        once = self._fold(tally, work.itemsize)
        return once + play_forward(tally, *self._chunks(work))

    def backward(self, tally: Tally, work: Pass) -> None:
        """The chunks in reverse, then from the gradients of the folded weights to those of the parameters."""
        net = self._network
        play_backward(tally, FLOAT * net.weights, self._once(work.itemsize), *self._chunks(work))
        unfold(tally, net, work.gradient)

    def without_gradients(self, tally: Tally, work: Pass) -> None:
        """The folded weights, then one chunk after the other, then the features put together."""
        net, e = network(self.width, work.side), work.itemsize
        once, features = self._fold(tally, e), FLOAT * work.snippets * net.num_features
        snippets = min(work.chunk, work.snippets)
        tally.take(features)
        _forward_alone(tally, net, _stages(net, snippets, e, False)[:-1], e * snippets)
        tally.spike(features)
        tally.take(-once)

    def live(self, tally: Tally, snippets: int, side: int, itemsize: int) -> None:
        play_live(tally, network(self.width, side), snippets, itemsize)

    def _once(self, e: int) -> int:
        """Bytes of the folded weights and batch norms, which all chunks share."""
        return e * self._network.weights + (FLOAT + e) * self._network.channels

    def _fold(self, tally: Tally, e: int) -> int:
        """Play the folding, of one weight after the other, in float32 first; the bytes that are left."""
        for conv in self._network.convs:
            tally.take(e * conv.weight + (FLOAT + e) * conv.result.channels)
            tally.spike(0 if e == FLOAT else FLOAT * (conv.weight + 3 * conv.result.channels))
        return self._once(e)

    def _chunks(self, work: Pass) -> tuple[int, Chunk, Chunk]:
        def part(snippets: int, first: bool, last: bool) -> Chunk:
            return chunk_bytes(self.width, work.side, snippets, work.itemsize, work.recompute, first, last)

        return divided(work, part)


# Pretraining: plain PyTorch's forward and backward, with live batch norm


def play_live(tally: Tally, net: Network, snippets: int, e: int) -> None:
    """Forward up to the features, their gradient comes in, and backward: the gradients of all parameters are left.

    Of every convolution autograd keeps the input and the output, for batch norm's backward, and of every ReLU the
    output, which is the next convolution's input. `e`: bytes of a number in an activation, 4 in fp32 and 2 under
    autocast, which keeps a copy of each weight too.
    """
    size, image, cast = e * snippets, snippets * net.image, 0 if e == FLOAT else e
    last, features = net.last, FLOAT * snippets * net.num_features
    tally.spike(2 * FLOAT * image)  # less the mean, by the deviation
    tally.take(FLOAT * image + cast * image)
    for conv in net.stem:
        normalised(tally, conv, size, cast)
    if cast:
        tally.take(-FLOAT * image)
    for block in net.blocks:
        out = size * block.out.numel
        for conv in block.convs:
            normalised(tally, conv, size, cast)
        tally.take(out)
        tally.take(-out if block.downsample is None else -2 * out)  # what was added goes
    tally.take(features)

    tally.spike((FLOAT + cast) * snippets * last.numel)
    tally.take(size * last.numel)
    for block in reversed(net.blocks):
        _live_backward(tally, block, size, cast)
    for conv in reversed(net.stem):
        result = size * conv.result.numel
        tally.spike(result)
        tally.take(-result)  # the ReLU's gradient takes its input's place, and its output goes
        normalised_backward(tally, conv, size)
        tally.take(-result)
        over_time = conv is net.stem[1]
        tally.take(size * conv.source.numel if over_time else 0)
        weight_gradient(tally, conv, cast)
        tally.take(-result)
    tally.take(-e * image)


def _live_backward(tally: Tally, block: Block, size: int, cast: int) -> None:
    """From the gradient of the block's output to that of its input."""
    x, out = size * block.x.numel, size * block.out.numel
    tally.spike(out)
    tally.take(-out)  # the ReLU's gradient takes its input's place, and its output goes
    if block.downsample is not None:
        normalised_backward(tally, block.downsample, size)
        tally.take(x)
        weight_gradient(tally, block.downsample, cast)
        tally.take(-out)
    for i in reversed(range(len(block.branch))):
        conv = block.branch[i]
        result, source = size * conv.result.numel, size * conv.source.numel
        normalised_backward(tally, conv, size)
        if i + 1 < len(block.branch) or block.downsample is not None:
            tally.take(-result)  # else it is the gradient of the identity too
        tally.take(source)
        tally.spike((cast or FLOAT) * conv.weight)
        tally.take(-result)
        weight_gradient(tally, conv, cast)
        if i > 0:
            tally.spike(source)
            tally.take(-source)
    tally.spike(x)
    tally.take(-x)  # the sum of two gradients of the input

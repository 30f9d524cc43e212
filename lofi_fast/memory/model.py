"""The bytes that one step of the joint stage holds, by integer arithmetic alone: the planner's prediction rests on it.

encoder/lean.py, head/gtad.py and head/loss.py are written down as a row of stages (`Stage`): what each leaves for
backward, and what else is alive while it runs forward and backward. Played forward and then backward, the stages give
what autograd keeps, to the byte, and the peak of all live tensors, never too low and at most a few per cent too high.

Kept by the lean encoder for each frame, in elements of the maps' dtype (R18, width 64, at 224 px; U = 64 * 56 * 56):

    frames           3 * 224 * 224 bytes             uint8                                        0.151 MB
    stem             pooled U, argmax U bytes        int8 position of each maximum                0.201 MB + U
    stage 1          2 blocks x (y, out)             64 channels at 56 px, U each                 4 U
    stage 2          2 blocks x (y, out)             128 channels at 28 px, U / 2 each            2 U
    stage 3, 4       2 blocks x (y, out) each        U / 4, U / 8 each                            1.5 U
    in all           8.5 U + 0.351 MB                7.18 MB in fp32, 3.76 MB in bf16 or fp16

and once: the folded weights and the few numbers of the frozen batch norms. With `eight_bit` a map's number is a byte,
and each of its channels has a scale of 4: 2.07 MB a frame. With `recompute` the maps stay only while their chunk's
gradient is worked out. Plain PyTorch keeps 25.1 MB a frame in fp32, and 13.3 MB in bf16 beside 22 MB of
cast weights (`plain_kept_bytes`).

Not counted, because no tensor of ours shows it, and left to the fitted part of the planner: what operators take for
themselves and give back before they return (a GPU's convolution workspaces; on a CPU conv3x3's transformed tiles, and
the two further copies of a weight's gradient that oneDNN works out), rounding and fragmentation of the allocator, the
context of the device, code and Python.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from lofi_fast.config import Config, EncoderName, HeadConfig
from lofi_fast.fidelity import FRAMES_PER_SNIPPET, Fidelity

FLOAT, LONG = 4, 8  # bytes of float32 (parameters, sums, losses) and of int64
RGB = 3

# As in encoder/resnet.py, encoder/lean.py and head/gtad.py, which load torch; the tests hold them together.
BLOCKS: dict[EncoderName, tuple[int, int, int, int]] = {
    "tsm_r18": (2, 2, 2, 2),
    "tsm_r34": (3, 4, 6, 3),
    "tsm_r50": (3, 4, 6, 3),
}
CHUNK_PIXELS = 64 * 112 * 112
NUM_NEIGHBOURS = 3
BASE_GROUPS = 4
HEAD_TENSORS = 71  # parameters of the head, counted as tensors


# The encoder, as a table of maps


@dataclass(frozen=True)
class Map:
    """One feature map of a frame."""

    channels: int
    side: int

    @cached_property
    def numel(self) -> int:
        return self.channels * self.side * self.side


@dataclass(frozen=True)
class Conv:
    """A convolution, with the frozen batch norm after it."""

    source: Map
    result: Map
    kernel: int

    @staticmethod
    def of(source: Map, channels: int, kernel: int, stride: int = 1) -> Conv:
        return Conv(source, Map(channels, (source.side - 1) // stride + 1), kernel)

    @cached_property
    def weight(self) -> int:
        return self.source.channels * self.result.channels * self.kernel**2


@dataclass(frozen=True)
class Block:
    """A residual block: x -> the branch's convolutions, each but the last with a ReLU -> + identity, ReLU -> out."""

    branch: tuple[Conv, ...]
    downsample: Conv | None

    @cached_property
    def x(self) -> Map:
        return self.branch[0].source

    @cached_property
    def out(self) -> Map:
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
    pooled: Map
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
    """The maps of an encoder of `width` channels in its first stage, over frames of `side` x `side` pixels."""
    stem = Conv.of(Map(RGB, side), width, 7, 2)
    pooled = x = Map(width, (stem.result.side - 1) // 2 + 1)
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


def default_chunk(side: int) -> int:
    """Snippets that the lean encoder takes into one graph."""
    return max(CHUNK_PIXELS // (FRAMES_PER_SNIPPET * side * side), 1)


def lean_kept_bytes(
    name: EncoderName,
    width: int,
    side: int,
    num_frames: int,
    map_bytes: int,
    *,
    recompute: bool = False,
    eight_bit: bool = False,
) -> int:
    """What autograd saves of the lean encoder's forward, its uint8 frames included. `map_bytes`: 4 (fp32) or 2 (bf16
    and fp16 autocast). To be compared with `plain_kept_bytes`; a step holds some more, see `StepBytes`.
    """
    net = network(name, width, side)
    maps = 0 if recompute else _kept_maps(net, num_frames, map_bytes, eight_bit)
    once = (0 if recompute else map_bytes * net.weights) + FLOAT * net.channels
    return num_frames * net.stem.source.numel + maps + once


def plain_kept_bytes(name: EncoderName, width: int, side: int, num_frames: int, map_bytes: int) -> int:
    """The same of plain PyTorch's graph (`TSMResNet.forward`, frozen batch norm, in-place ReLU), under autocast where
    `map_bytes` is 2: the shifted copy, and the output of every convolution and of every ReLU.
    """
    net = network(name, width, side)
    maps = net.stem.source.numel + 2 * net.stem.result.numel
    if net.blocks[0].downsample is not None:
        maps += net.pooled.numel  # else no convolution reads it unshifted
    for block in net.blocks:
        maps += block.x.numel + 2 * block.kept
        if block.downsample is not None:
            maps += block.out.numel
    indices = LONG * net.pooled.numel
    return num_frames * (map_bytes * maps + indices) + (0 if map_bytes == FLOAT else map_bytes * net.weights)


def _kept_maps(net: Network, num_frames: int, map_bytes: int, eight_bit: bool) -> int:
    maps = [net.pooled, *(conv.result for block in net.blocks for conv in block.branch)]
    return num_frames * (sum(_stored(a_map, map_bytes, eight_bit) for a_map in maps) + net.pooled.numel)


def _stored(a_map: Map, map_bytes: int, eight_bit: bool) -> int:
    """Bytes of one frame's map as it is kept for backward: itself, or its codes and a scale for each channel."""
    return a_map.numel + FLOAT * a_map.channels if eight_bit else map_bytes * a_map.numel


# A step, as a row of stages


class Stage(NamedTuple):
    """A piece of forward with its piece of backward, in bytes."""

    name: str
    kept: int = 0  # left by forward for backward
    handed: int = 0  # given on beside it, and alive until the next stage is done
    forward: int = 0  # alive beyond both while forward runs
    weight: int = 0  # numbers that learn
    backward: int = 0  # alive beyond `kept` and the gradients that come in, while backward runs; its weight's aside
    pending: int = 0  # gradients alive when its backward is done


class _Tally:
    """Bytes alive, and the most that were."""

    __slots__ = ("now", "peak")

    def __init__(self) -> None:
        self.now = self.peak = 0

    def take(self, amount: int) -> None:
        """Also with a negative amount."""
        self.now += amount
        if self.now > self.peak:
            self.peak = self.now

    def spike(self, amount: int) -> None:
        """Taken and given back."""
        if self.now + amount > self.peak:
            self.peak = self.now + amount

    def forward(self, stages: Sequence[Stage], keep: bool = True) -> None:
        """Without `keep`, a stage's maps go when the next is done, which reads one as large as what was `handed`."""
        handed = 0
        for stage in stages:
            self.spike(handed * (1 if keep else 2) + stage.kept + stage.handed + stage.forward)
            self.take(stage.kept if keep else 0)
            handed = stage.handed

    def backward(self, stages: Sequence[Stage], pending: int, made: int, left: int, freed: int = 0) -> None:
        """From the gradients that are `pending`. `made`: bytes of a weight's gradient while it is worked out; `left`:
        afterwards; `freed`: of the weight itself.
        """
        for stage in reversed(stages):
            self.spike(stage.backward + made * stage.weight)
            self.take(stage.pending - pending - stage.kept + (left - freed) * stage.weight)
            pending = stage.pending
        self.take(-pending)  # what comes out is the caller's to count


def _encoder_stages(net: Network, frames: int, e: int, recompute: bool, eight_bit: bool) -> list[Stage]:
    """A chunk of the lean encoder. `e`: bytes of a map's element.

    Autograd holds the gradients that come into a block (of its last map and of that map's shifted copy) until the block
    is done. A vector of ones stands beside every call of residual_shift and stem. With `eight_bit` the maps themselves
    are handed on beside what is stored of them, and stand beside it again where backward reads them.
    """
    size = e * frames
    pooled, argmax, conv = size * net.pooled.numel, frames * net.pooled.numel, size * net.stem.result.numel
    stored = frames * _stored(net.pooled, e, eight_bit)
    image, ones = size * net.stem.source.numel, FLOAT * net.stem.result.channels
    stages = [
        Stage(
            "stem",
            kept=stored + argmax,
            handed=2 * pooled if eight_bit else pooled,
            forward=max(conv + ones, image + conv - (2 * pooled + argmax + (stored if eight_bit else 0))),
            weight=net.stem.weight,
            backward=ones + conv + max(2 * pooled if eight_bit else pooled, image),
        )
    ]
    for index, block in enumerate(net.blocks):
        out, x, first = size * block.out.numel, size * block.x.numel, size * block.branch[0].result.numel
        stored = frames * _stored(block.out, e, eight_bit)
        ones = FLOAT * block.out.channels
        identity = 0 if block.downsample is None else out + ones  # and the sum of two biases
        following = index + 1 < len(net.blocks)
        # Beside the first convolution: its output's gradient, x's shifted copy, the gradient of that; at the identity:
        # two gradients of x, and x where it is not kept.
        inner = max(first + 2 * x, 0 if block.downsample is None or not eight_bit else 3 * x)
        # The gradient before the last ReLU takes the place of the map, where that is not kept elsewhere; beside a map
        # that is kept in 8 bits stands the map.
        relu = out + ones if recompute or eight_bit else ones
        stages.append(
            Stage(
                f"block {index}",
                kept=frames * sum(_stored(conv.result, e, eight_bit) for conv in block.branch),
                handed=out * (following + eight_bit),
                forward=identity + out + ones - (stored if eight_bit else 0),
                weight=block.weight,
                backward=max(inner, relu) if recompute and not eight_bit else out + max(inner, relu),
                pending=2 * x,
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


class Head(NamedTuple):
    """Sizes of G-TAD at a rung, over a micro-batch."""

    config: HeadConfig
    num_features: int
    num_scores: int  # of a cell: the classes and background
    neighbours: int
    length: int  # L
    duration: int  # D
    steps: int  # B * L
    cells: int  # B * N, valid proposals
    dense: int  # cells that the middle convolutions work on: the whole D x L map where they are 3x3

    @staticmethod
    def of(config: HeadConfig, num_features: int, num_classes: int, full: int, batch: int, length: int) -> Head:
        """For B = `batch` videos of L = `length` of the full grid's `full` snippets."""
        duration = length
        if config.max_duration is not None:
            duration = max(1, math.ceil(config.max_duration * length / full))
        longest = min(duration, length)
        cells = longest * length - longest * (longest - 1) // 2
        dense = cells if config.middle_kernel == 1 else duration * length
        return Head(
            config, num_features, num_classes + 1, min(NUM_NEIGHBOURS, length), length, duration,
            batch * length, batch * cells, batch * dense,
        )  # fmt: skip

    @property
    def narrow(self) -> int:
        """Channels after the reduction."""
        return self.config.map_channels // 4

    @property
    def graph_weight(self) -> int:
        """Of one GCNeXt: five 1x1 convolutions between all and half the channels, grouped ones of kernels 3 and 1."""
        hidden, half = self.config.hidden, self.config.hidden // 2
        return 5 * hidden * half + 4 * half * (half // self.config.groups)

    @property
    def base_weight(self) -> int:
        return self.num_features // BASE_GROUPS * self.config.hidden * 3

    @property
    def middle_weight(self) -> int:
        return self.narrow**2 * self.config.middle_kernel**2

    @property
    def classifier(self) -> tuple[int, int]:
        """Weight and bias of the classes' align_linear."""
        return self.num_features * self.num_scores * self.config.class_bins, self.num_scores

    @property
    def bias(self) -> int:
        """All other biases."""
        c = self.config
        graphs = 4 * (4 * (c.hidden // 2) + 2 * c.hidden)
        return c.hidden + graphs + 2 + c.map_channels + 3 * self.narrow + 2


class Held(NamedTuple):
    """Bytes alive from the end of the loss to that of backward, beside what the stages keep."""

    saved: int  # by autograd too
    unsaved: int


def _head_held(h: Head, e: int, dropout: bool, class_loss: bool) -> Held:
    """The features, the head's output and the terms of the loss; what a classifier without a loss was given."""
    features, logits = FLOAT * h.steps * h.num_features, 2 * e * (h.steps + h.cells)
    given = features if dropout and not class_loss else 0
    saved = given + (0 if dropout else features) + (logits if e == FLOAT else 0)
    return Held(saved, given + features + logits + e * h.cells * h.num_scores + 5 * FLOAT - saved)


def _head_stages(h: Head, e: int, dropout: bool, class_loss: bool) -> list[Stage]:
    """The head and the loss, from the features on.

    Under autocast autograd keeps the cast inputs and weights of convolutions; align_linear keeps what it was given.
    """
    c, k = h.config, h.neighbours
    cast = 0 if e == FLOAT else e  # bytes of a number in a copy that autocast makes
    features, hidden = FLOAT * h.steps * h.num_features, e * h.steps * c.hidden
    aligned, reduced, wide = e * h.cells * c.map_channels, e * h.cells * h.narrow, e * h.dense * h.narrow
    scores, dense_map = FLOAT * h.cells * h.num_scores, wide if c.middle_kernel > 1 else 0
    distances = FLOAT * h.steps * (h.length + k + (c.hidden if cast else 0))
    classified = features if class_loss else 0  # the classifier's gradient of the features, until the base's joins it

    def graph(name: str, pending: int, after: int = 0) -> Stage:
        """A GCNeXt; `after`: the weight of a convolution that follows."""
        half, weight = c.hidden // 2, h.graph_weight + after
        temporal = 2 * half
        semantic = half + k * (2 * half + c.hidden) + c.hidden  # gathered from; edges, grouped, last; their maximum
        return Stage(
            name,
            kept=h.steps * (LONG * k + e * (temporal + semantic + c.hidden)) + cast * weight,
            forward=max(distances, hidden),
            weight=weight,
            backward=5 * hidden + h.steps * c.hidden * (LONG + k * (e + 1)),  # the maximum's, which counts its ties
            pending=pending * hidden + classified,
        )

    def conv(name: str, kept: int, weight: int, backward: int, pending: int) -> Stage:
        """On cells. `aligned`: what the ReLU after align_linear reads lives to the end of forward."""
        return Stage(name, kept + cast * weight, 0, aligned + wide, weight, backward, pending + classified)

    # align_linear makes Z out of rows of its features and its weight, each copied where it is not as it should be.
    inner, context = (c.hidden * c.map_channels * bins for bins in (c.inner_bins, c.context_bins))
    z, z_scores = (
        e * h.steps * n for n in (c.map_channels * (c.inner_bins + c.context_bins), h.num_scores * c.class_bins)
    )
    rows = e * h.steps * h.num_features
    z_made = z_scores + cast * h.classifier[0] + (rows if cast or dropout else 0)
    return [
        # The scaled mask and what it leaves, which a classifier without a loss does not give back (`Held`).
        Stage("dropout", features * (2 if class_loss else 1) if dropout else 0, backward=features, pending=features),
        Stage(
            "base",
            kept=hidden + cast * (h.steps * h.num_features + h.base_weight),
            weight=h.base_weight,
            backward=hidden + features + cast * h.steps * h.num_features,
            pending=features,
        ),
        graph("base graph", 1),
        graph("graph", 1),
        graph("start", 2, after=c.hidden),
        graph("end", 2, after=c.hidden),
        Stage(
            "neighbours",
            kept=LONG * h.steps * k + hidden,
            forward=max(distances, k * hidden),
            backward=max(2 * k, k + 2) * hidden,
            pending=hidden + classified,
        ),
        Stage(
            "align",
            forward=z + hidden + cast * context + max(hidden + cast * inner, aligned),
            weight=inner + context,
            # One after the other, each with its rows, its weight and the gradients of both.
            backward=z + 3 * hidden + cast * max(context - inner, inner - 2 * context),
            pending=2 * hidden + classified,
        ),
        Stage("aligned", kept=aligned, forward=aligned, backward=aligned, pending=aligned + classified),
        conv("reduce", reduced + dense_map, c.map_channels * h.narrow, max(aligned, 2 * reduced), aligned),
        conv("middle 1", wide, h.middle_weight, wide, wide),
        conv("middle 2", wide, h.middle_weight, wide, wide),
        conv("last", 0, 2 * h.narrow, 4 * e * h.dense + wide, wide),
        Stage(
            "classifier",
            forward=aligned + z_made,
            weight=h.classifier[0] if class_loss else 0,
            backward=z_made + rows + (features if cast else 0) if class_loss else 0,
            pending=2 * e * h.cells + classified,
        ),
        # Labels as floats and two masks for each of three balanced BCEs, and under autocast the logits as floats; for
        # the regression a sigmoid, a difference and the cells drawn.
        Stage(
            "loss",
            kept=(2 * h.steps + h.cells) * (FLOAT + 2 + (FLOAT if cast else 0)) + h.cells * (2 * FLOAT + 1),
            # The targets and some of their size; the cross entropy is worked out in any case.
            forward=FLOAT * (2 * h.steps + 8 * h.cells) + (0 if class_loss else scores) + (scores if cast else 0),
            backward=6 * FLOAT * h.cells,
            pending=2 * e * h.cells + (e * h.cells * h.num_scores if class_loss else 0),
        ),
        # The log-softmax, labels, masks.
        Stage(
            "class loss",
            kept=scores + h.cells * (LONG + 2) + FLOAT if class_loss else 0,
            forward=FLOAT * (2 * h.steps + 4 * h.cells),
            backward=FLOAT * h.cells + (2 * scores if class_loss else 0),
            pending=FLOAT * h.cells + (e * h.cells * h.num_scores if class_loss else 0),
        ),
    ]


# The step


@dataclass(frozen=True)
class Setting:
    """What is the same at every rung."""

    encoder: EncoderName
    width: int
    head: HeadConfig
    num_classes: int
    full_snippets: int
    map_bytes: int  # 4 in fp32, 2 under bf16 or fp16 autocast
    class_loss: bool
    optimizer: Literal["sgd", "adam", "adamw"]
    eight_bit: bool = False  # the lean encoder's maps
    decoded_ahead: int = 1  # micro-batches of frames beside the one that is worked on: FramePipeline's depth

    @staticmethod
    def of(config: Config, num_classes: int, map_bytes: int) -> Setting:
        return Setting(
            encoder=config.encoder.name,
            width=config.encoder.width,
            head=config.head,
            num_classes=num_classes,
            full_snippets=config.full.num_snippets,
            map_bytes=map_bytes,
            class_loss=config.joint.class_loss != 0,
            optimizer=config.joint.optimizer,
            eight_bit=config.kept_maps == "8bit",
        )


@dataclass(frozen=True)
class StepBytes:
    """Bytes of one step at its peak, by what they are."""

    parameters: int  # with batch norm's buffers
    optimizer: int
    gradients: int  # that are there before backward begins
    frames: int  # uint8, of the micro-batch and of those decoded ahead
    kept_encoder: int  # from forward to backward: maps, folded weights
    kept_head: int  # features, head, loss, output
    transient: int  # what the peak has beyond all these

    @property
    def between(self) -> int:
        """Of them, what is there between steps."""
        return self.parameters + self.optimizer

    @property
    def added(self) -> int:
        """What the step adds to that."""
        return self.gradients + self.frames + self.kept_encoder + self.kept_head + self.transient

    @property
    def total(self) -> int:
        return self.between + self.added


class _Chunk(NamedTuple):
    """Bytes of one chunk of the encoder; peaks are above what was there before."""

    kept: int
    features: int
    forward: int
    backward: int  # with what was kept there before


@lru_cache(maxsize=1024)
def _chunk(
    name: EncoderName,
    width: int,
    side: int,
    frames: int,
    e: int,
    recompute: bool,
    eight_bit: bool,
    first: bool,
    last: bool,
) -> _Chunk:
    """`first`, `last`: in the order of backward. Autograd sums the gradients of the folded weights over chunks: the
    first chunk's stay, the others' are added to them in place. With the last chunk the weights go.
    """
    net = network(name, width, side)
    *stages, features = _encoder_stages(net, frames, e, recompute, eight_bit)
    forward, backward = _Tally(), _Tally()
    if recompute:  # nothing is kept yet, so nothing is stored in 8 bits either
        forward.forward(_encoder_stages(net, frames, e, recompute, False), keep=False)
    else:
        forward.forward([*stages, features])
    backward.spike(features.backward)
    backward.take(features.pending)
    if recompute:
        backward.forward(stages)
    backward.backward(stages, features.pending, e, e if first else 0, e if last and not recompute else 0)
    return _Chunk(forward.now, features.handed, forward.peak, backward.peak)


@lru_cache(maxsize=4096)
def step_bytes(
    setting: Setting,
    fidelity: Fidelity,
    micro_batch: int,
    *,
    recompute: bool = False,
    chunk: int | None = None,
    accumulates: bool = False,
) -> StepBytes:
    """Bytes of one forward and backward over `micro_batch` videos, and of the update that follows.

    `chunk`: snippets in one graph of the encoder, `default_chunk` where None. `accumulates`: gradients of an earlier
    micro-batch of the same step are there.
    """
    s, e, side = setting, setting.map_bytes, fidelity.side
    net = network(s.encoder, s.width, side)
    head = Head.of(s.head, net.num_features, s.num_classes, s.full_snippets, micro_batch, fidelity.num_snippets)
    stages = _head_stages(head, e, s.head.dropout > 0, s.class_loss)
    held = sum(_head_held(head, e, s.head.dropout > 0, s.class_loss))
    snippets = micro_batch * fidelity.num_snippets
    chunk = default_chunk(side) if chunk is None else chunk

    def part(snippets: int, first: bool, last: bool) -> _Chunk:
        return _chunk(s.encoder, s.width, side, snippets * FRAMES_PER_SNIPPET, e, recompute, s.eight_bit, first, last)

    # The chunk that comes last in forward, first in backward, may be smaller; the others are alike.
    others = -(-snippets // chunk) - 1
    end = part(snippets - others * chunk, True, others == 0)
    other = part(chunk, False, others == 1) if others else _Chunk(0, 0, 0, 0)
    folded, affine = e * net.weights, FLOAT * 2 * net.channels
    features = other.features * others + end.features

    t = _Tally()
    t.take(folded + affine)
    t.take((others - 1) * (other.kept + other.features) if others else 0)
    t.spike(other.forward)
    t.take(other.kept + other.features if others else 0)
    t.spike(end.forward)
    t.take(end.kept + end.features)
    t.spike(features)  # the chunks' features, put together
    t.take(held - features)
    t.forward(stages)
    kept_encoder = folded + affine + others * other.kept + end.kept
    kept_head = t.now - kept_encoder

    bias = head.bias + (head.classifier[1] if s.class_loss else 0)
    left = 0 if accumulates else FLOAT
    t.take(FLOAT * (bias + 1))  # the gradients of the biases, a little early, and that of the loss
    t.backward(stages, 0, FLOAT if e == FLOAT else FLOAT + e, left)
    t.take(features)  # their gradient
    t.spike(end.backward)
    t.take(folded - end.kept)  # the gradients of the folded weights
    t.spike(other.backward)
    t.take(-others * other.kept - features - folded)
    for conv in reversed(net.convs):  # from the folded weights to the parameters; under autocast by way of fp32
        t.spike((FLOAT if e == FLOAT else 2 * FLOAT - e) * conv.weight)
        t.take((left - e) * conv.weight)

    learning = net.weights + sum(stage.weight for stage in stages) + bias
    parameters = learning + (0 if s.class_loss else sum(head.classifier))
    gradients = FLOAT * learning if accumulates else 0
    peak = max(t.peak, FLOAT * learning - gradients)  # at the update
    counters = FLOAT * (len(net.convs) + HEAD_TENSORS)
    return StepBytes(
        parameters=FLOAT * (parameters + 4 * net.channels + 2 * RGB) + LONG * len(net.convs),
        optimizer=0 if s.optimizer == "sgd" else 2 * FLOAT * parameters + counters,
        gradients=gradients,
        frames=(1 + s.decoded_ahead) * micro_batch * fidelity.num_frames * net.stem.source.numel,
        kept_encoder=kept_encoder,
        kept_head=kept_head,
        transient=peak - kept_encoder - kept_head,
    )


def features_bytes(
    name: EncoderName, width: int, side: int, snippets: int, map_bytes: int, chunk: int | None = None
) -> int:
    """Peak of the lean encoder without gradients (extraction, evaluation) over `snippets`, its frames aside."""
    net = network(name, width, side)
    chunk = min(default_chunk(side) if chunk is None else chunk, snippets)
    part = _chunk(name, width, side, chunk * FRAMES_PER_SNIPPET, map_bytes, True, False, False, False)
    features = FLOAT * snippets * net.num_features
    once = map_bytes * net.weights + FLOAT * 2 * net.channels
    return once + features + max(part.forward, features)


# What is there besides


@lru_cache(maxsize=256)
def grid_bytes(config: HeadConfig, full: int, length: int, device: Literal["cpu", "cuda"]) -> int:
    """The sampling weights of the head's proposals at one L, on `device`. They stay for every L that was used."""
    duration = Head.of(config, 0, 0, full, 1, length).duration
    cells = np.array([(d, s) for d in range(duration) for s in range(length - d)])
    inner, context = (_sampled(cells, length, bins, 0.5) for bins in (config.inner_bins, config.context_bins))
    classes = _sampled(cells, length, config.class_bins, 0.0)

    def sparse(weights: int, bins: int, value_bytes: int) -> int:
        """A matrix by compressed rows, and its transpose."""
        return 4 * (len(cells) + 1 + length * bins + 1) + 2 * weights * (4 + value_bytes)

    both, bins = inner + context, config.inner_bins + config.context_bins
    if device == "cuda":
        return sparse(both, bins, FLOAT) + sparse(classes, config.class_bins, FLOAT)
    # Each grid in float64 with its rois and cells, the sum of inner and context, and what runs, in fp32.
    grids = ((inner, config.inner_bins), (context, config.context_bins), (classes, config.class_bins))
    exact = sum(sparse(weights, bins, 8) + len(cells) * (2 * FLOAT + 2 * LONG) for weights, bins in grids)
    return exact + sparse(both, bins, 8) + 2 * FLOAT * (both + classes)


def _sampled(cells: NDArray[np.int64], length: int, bins: int, expand: float) -> int:
    """Weights that are not 0: the snippets between which the samples of each bin of each cell lie."""
    d, s = cells.T[:, :, None].astype(np.float32)  # the precision in which samples are placed
    start, extent = s - expand * (d + 1), np.maximum(d + 2 * expand * (d + 1), 1)
    step, samples = extent / bins, np.ceil(extent / bins)
    bin_start = start + np.arange(bins, dtype=np.float32) * step
    first, last = bin_start + 0.5 * step / samples, bin_start + (samples - 0.5) * step / samples
    lower, upper = np.floor(first).clip(0, length - 1), np.ceil(last).clip(0, length - 1)
    return int(((upper - lower + 1) * ((last >= -1) & (first <= length))).sum())


def decode_pool(max_frames: int, cached_pixels: int, side: int) -> int:
    """What DALI takes, about: decoded pictures of `cached_pixels` each, and them resized, before and after the flip."""
    return RGB * max_frames * (cached_pixels + 2 * side * side)

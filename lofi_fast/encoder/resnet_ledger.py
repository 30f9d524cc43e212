"""RESNET_DOC"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import NamedTuple

from lofi_fast.config import EncoderName
from lofi_fast.fidelity import FRAMES_PER_SNIPPET
from lofi_fast.ledger import FLOAT, LONG, Stage, Tally

RGB = 3

# As in encoder/resnet.py, encoder/lean.py and head/gtad.py, which load torch; the tests hold them together.
BLOCKS: dict[EncoderName, tuple[int, int, int, int]] = {
    "tsm_r18": (2, 2, 2, 2),
    "tsm_r34": (3, 4, 6, 3),
    "tsm_r50": (3, 4, 6, 3),
}
CHUNK_PIXELS = 64 * 112 * 112


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


def _encoder_stages(net: Network, frames: int, e: int, recompute: bool, eight_bit: bool) -> list[Stage]:
    """A chunk of the lean encoder. `e`: bytes of a map's element.

    Autograd holds the gradients that come into a block (of its last map and of that map's shifted copy) until the block
    is done. With `eight_bit` the maps themselves are handed on beside what is stored of them, and stand beside it again
    where backward reads them.
    """
    size = e * frames
    pooled, argmax, conv = size * net.pooled.numel, frames * net.pooled.numel, size * net.stem.result.numel
    stored = frames * _stored(net.pooled, e, eight_bit)
    image = size * net.stem.source.numel
    stages = [
        Stage(
            "stem",
            kept=stored + argmax,
            handed=2 * pooled if eight_bit else pooled,
            forward=max(conv, image + conv - (2 * pooled + argmax + (stored if eight_bit else 0))),
            weight=net.stem.weight,
            backward=conv + max(2 * pooled if eight_bit else pooled, image),
        )
    ]
    for index, block in enumerate(net.blocks):
        out, x, first = size * block.out.numel, size * block.x.numel, size * block.branch[0].result.numel
        stored = frames * _stored(block.out, e, eight_bit)
        identity = 0 if block.downsample is None else out
        following = index + 1 < len(net.blocks)
        # Beside the first convolution: its output's gradient, x's shifted copy, the gradient of that; at the identity:
        # two gradients of x, and x where it is not kept.
        inner = max(first + 2 * x, 0 if block.downsample is None or not eight_bit else 3 * x)
        # The gradient before the last ReLU takes the place of the map, where that is not kept elsewhere; beside a map
        # that is kept in 8 bits stands the map.
        relu = out if recompute or eight_bit else 0
        stages.append(
            Stage(
                f"block {index}",
                kept=frames * sum(_stored(conv.result, e, eight_bit) for conv in block.branch),
                handed=out * (following + eight_bit),
                forward=identity + out - (stored if eight_bit else 0),
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
    forward, backward = Tally(), Tally()
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

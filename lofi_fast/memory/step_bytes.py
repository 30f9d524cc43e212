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

from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

from lofi_fast.config import Config, EncoderName, HeadConfig
from lofi_fast.encoder.resnet_ledger import RGB, _Chunk, _chunk, default_chunk, network
from lofi_fast.fidelity import FRAMES_PER_SNIPPET, Fidelity
from lofi_fast.head.gtad_ledger import HEAD_TENSORS, Head, _head_held, _head_stages
from lofi_fast.ledger import FLOAT, LONG, Tally

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

    t = Tally()
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


def decode_pool(max_frames: int, cached_pixels: int, side: int) -> int:
    """What DALI takes, about: decoded pictures of `cached_pixels` each, and them resized, before and after the flip."""
    return RGB * max_frames * (cached_pixels + 2 * side * side)

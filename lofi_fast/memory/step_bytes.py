"""The bytes that one step of a stage holds: the ledgers of its encoder and its head, put together.

Exact for tensors (lofi_fast/ledger.py says how exact). Not counted, because no tensor of ours shows it, and left to the
fitted part of the planner: what operators take for themselves and give back before they return (a GPU's convolution
workspaces; on a CPU conv3x3's transformed tiles, and the two further copies of a weight's gradient that oneDNN works
out), rounding and fragmentation of the allocator, the context of the device, code and Python.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

from lofi_fast.config import Config
from lofi_fast.encoder import ledger_of as encoder_ledger
from lofi_fast.fidelity import FRAMES_PER_SNIPPET, Fidelity
from lofi_fast.head import ledger_of as head_ledger
from lofi_fast.ledger import FLOAT, RGB, EncoderLedger, HeadLedger, Pass, Tally, default_chunk


@dataclass(frozen=True)
class Setting:
    """What is the same at every rung."""

    encoder: EncoderLedger
    head: HeadLedger
    itemsize: int  # bytes of a number in an activation: 4 in fp32, 2 under bf16 or fp16 autocast
    optimizer: Literal["sgd", "adam", "adamw"]
    eight_bit: bool = False  # activations of the encoder are kept as bytes
    momentum: bool = False  # SGD keeps a buffer of each parameter
    decoded_ahead: int = 1  # micro-batches of frames beside the one that is worked on: FramePipeline's depth

    @staticmethod
    def of(config: Config, num_classes: int, itemsize: int) -> Setting | None:
        """None where the encoder or the head has no ledger: `trial.learn_ledger` then finds out by running steps."""
        encoder = encoder_ledger(config.encoder)
        if encoder is None:
            return None
        head = head_ledger(config, encoder.num_features, num_classes, config.joint.class_loss != 0)
        if head is None:
            return None
        joint = config.joint
        return Setting(encoder, head, itemsize, joint.optimizer, config.kept_maps == "8bit", joint.momentum > 0)


@dataclass(frozen=True)
class StepBytes:
    """Bytes of one step at its peak, by what they are."""

    parameters: int  # with batch norm's buffers
    optimizer: int
    gradients: int  # that are there before backward begins
    frames: int  # uint8, of the micro-batch and of those decoded ahead
    kept_encoder: int  # from forward to backward: activations, folded weights
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
    work = Pass(
        micro_batch, fidelity.num_snippets, fidelity.side, setting.itemsize, chunk or default_chunk(fidelity.side),
        recompute, setting.eight_bit, accumulates,
    )  # fmt: skip
    tally = Tally()
    kept_encoder = setting.encoder.forward(tally, work)
    setting.head.forward(tally, work)
    kept_head = tally.now - kept_encoder
    setting.head.backward(tally, work)
    setting.encoder.backward(tally, work)

    networks = (setting.encoder.parameters, setting.head.parameters)
    all_gradients = FLOAT * sum(parameters.reached for parameters in networks)
    gradients = all_gradients if accumulates else 0
    peak = max(tally.peak, all_gradients - gradients)  # at the update
    if setting.optimizer == "sgd":
        moments = sum(FLOAT * parameters.numbers for parameters in networks) if setting.momentum else 0
    else:
        moments = sum(2 * FLOAT * parameters.numbers + FLOAT * parameters.tensors for parameters in networks)
    return StepBytes(
        parameters=sum(parameters.held for parameters in networks),
        optimizer=moments,
        gradients=gradients,
        frames=_frames((1 + setting.decoded_ahead) * micro_batch * fidelity.num_snippets, fidelity.side),
        kept_encoder=kept_encoder,
        kept_head=kept_head,
        transient=peak - kept_encoder - kept_head,
    )


# The other stages, which change neither pattern nor rung. All give what a step adds to what is held between steps.


def pretrain_bytes(encoder: EncoderLedger, num_classes: int, clips: int, side: int, itemsize: int) -> int:
    """Bytes of a step of pretraining over `clips` snippets: frames (one batch decoded ahead), forward and backward with
    live batch norm, and the classifier's.
    """
    tally = Tally()
    weight, logits = encoder.num_features * num_classes, clips * num_classes
    cast = 0 if itemsize == FLOAT else itemsize
    # Weight, bias and their gradients; the logits, their softmax, the shares of the classes and two gradients.
    tally.take((cast + FLOAT) * (weight + num_classes) + cast * clips * encoder.num_features + 5 * FLOAT * logits)
    encoder.live(tally, clips, side, itemsize)
    return tally.peak + 2 * _frames(clips, side)


def features_bytes(encoder: EncoderLedger, snippets: int, decoded: int, chunk: int, side: int, itemsize: int) -> int:
    """Bytes of encoding `snippets` snippets without gradients, `chunk` at a time. `decoded`: snippets whose frames are
    there, those decoded ahead among them.
    """
    tally = Tally()
    encoder.without_gradients(tally, Pass(1, snippets, side, itemsize, chunk))
    tally.spike(2 * FLOAT * snippets * encoder.num_features)  # a copy on its way out, by snippet and by channel
    return tally.peak + _frames(decoded, side)


def head_bytes(head: HeadLedger, num_features: int, videos: int, num_snippets: int, itemsize: int) -> int:
    """Bytes of a step of the head stage over the features of `videos` windows: forward, backward and update. Forward
    without gradients takes less.
    """
    tally = Tally()
    work, features = Pass(videos, num_snippets, 1, itemsize, 1), FLOAT * videos * num_snippets * num_features
    tally.spike(2 * features)  # with the copies from which they are put together
    rows = itemsize * videos * num_snippets * num_features  # features as read lie by channel: the head copies them
    tally.take(features + rows)
    head.forward(tally, work)
    tally.take(-rows)
    head.backward(tally, work)
    return max(tally.peak, FLOAT * head.parameters.reached)


def _frames(snippets: int, side: int) -> int:
    """Bytes of the decoded frames of snippets."""
    return snippets * FRAMES_PER_SNIPPET * RGB * side**2

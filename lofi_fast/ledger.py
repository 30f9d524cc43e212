"""Ledgers: the bytes that a training step holds, by arithmetic alone.

A ledger writes a network down as a row of stages (`Stage`): what each leaves for backward, and what else is alive while
it runs forward and backward. Played on a `Tally`, forward and then backward, the stages give what autograd keeps, to
the byte, and the peak of all live tensors, never too low and at most a few per cent too high.

An encoder and a head each bring their own ledger (`EncoderLedger`, `HeadLedger`), in a file beside the network;
memory/step_bytes.py plays the two one after the other, and knows neither network. Nothing here imports torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

from lofi_fast.fidelity import FRAMES_PER_SNIPPET

FLOAT, LONG = 4, 8  # bytes of float32 (parameters, sums, losses) and of int64
RGB = 3  # bytes of a pixel of a frame
# Pixels of the frames in one graph of the encoder, where nobody says otherwise: its activations (some 20 bytes a pixel
# in bf16) are small beside what the whole video keeps.
CHUNK_PIXELS = 64 * 112 * 112


def default_chunk(side: int, pixels: int = CHUNK_PIXELS) -> int:
    """Snippets of `side` x `side` frames in one graph of about `pixels` frame pixels; at least one."""
    return max(pixels // (FRAMES_PER_SNIPPET * side * side), 1)


# What a ledger is asked, and what it answers


class Pass(NamedTuple):
    """Forward and backward of one micro-batch."""

    videos: int
    num_snippets: int  # of each video
    side: int  # pixels
    itemsize: int  # bytes of a number in an activation: 4 in fp32, 2 under bf16 or fp16 autocast
    chunk: int  # snippets in one graph of the encoder
    recompute: bool = False  # activations of the encoder are made again in backward, one chunk at a time
    eight_bit: bool = False  # activations of the encoder are kept as bytes
    accumulates: bool = False  # gradients of an earlier micro-batch of the same step are there

    @property
    def snippets(self) -> int:
        return self.videos * self.num_snippets

    @property
    def gradient(self) -> int:
        """Bytes that this pass adds for the gradient of one number that learns."""
        return 0 if self.accumulates else FLOAT


class Parameters(NamedTuple):
    """The parameters of a network."""

    held: int  # bytes of all of them, and of the buffers beside them
    numbers: int  # that the optimiser is given
    tensors: int  # that these are in
    reached: int  # numbers that get a gradient from the loss


class EncoderLedger(Protocol):
    """The bytes and the work of an encoder, which gives a feature vector of each snippet. Hashable."""

    @property
    def num_features(self) -> int: ...

    @property
    def parameters(self) -> Parameters: ...

    def forward(self, tally: Tally, work: Pass) -> int:
        """Play forward. What is left in the tally is what backward needs, whose bytes are returned, and the features,
        which are float32.
        """

    def backward(self, tally: Tally, work: Pass) -> None:
        """Play backward: the gradient of the features comes in, the gradients of the parameters are left."""

    def without_gradients(self, tally: Tally, work: Pass) -> None:
        """Play `Encoder.encode` where nothing learns; the features are left, in float32."""

    def live(self, tally: Tally, snippets: int, side: int, itemsize: int) -> None:
        """Play forward and backward with live batch norm, as in pretraining: the features, and a gradient in float32 of
        each parameter, batch norm's too, are left.
        """

    def multiply_adds(self, side: int) -> int:
        """Multiplications, each with its addition, of the forward pass over one frame of `side` x `side` pixels."""

    def moved(self, side: int) -> int:
        """Numbers that forward and backward over one such frame read from and write to memory, activations not kept in
        a cache.
        """


class HeadLedger(Protocol):
    """The bytes of a head and its loss, over the features of an encoder. Hashable."""

    @property
    def parameters(self) -> Parameters: ...

    def forward(self, tally: Tally, work: Pass) -> None:
        """Play forward up to the loss; the features are in the tally. All that lives until backward is left there."""

    def backward(self, tally: Tally, work: Pass) -> None:
        """Play backward down to the features, whose gradient is not counted any more; the parameters' are left."""


# A network, as a row of stages


class Stage(NamedTuple):
    """A piece of a network, forward and backward. All amounts but `weight` are bytes."""

    name: str
    kept: int = 0  # left by forward for backward
    handed: int = 0  # output that is not kept, and is alive until the next stage is done
    forward: int = 0  # alive beyond both while forward runs
    weight: int = 0  # numbers that learn
    backward: int = 0  # alive while backward runs, beyond what was kept, incoming gradients, and the weight's gradient
    pending: int = 0  # gradients that its backward passes on to the stage before it


class Tally:
    """Bytes alive now, and the most that ever were."""

    __slots__ = ("now", "peak")

    def __init__(self) -> None:
        self.now = self.peak = 0

    def take(self, amount: int) -> None:
        """Bytes that come and stay; where `amount` is negative, bytes that go."""
        self.now += amount
        if self.now > self.peak:
            self.peak = self.now

    def spike(self, amount: int) -> None:
        """Bytes that come and go."""
        if self.now + amount > self.peak:
            self.peak = self.now + amount

    def forward(self, stages: Sequence[Stage], keep: bool = True) -> None:
        """Play `stages` forward. Without `keep` nothing stays for backward: a stage's activations go when the next
        stage, which reads an input as large as what was `handed` to it, is done.
        """
        handed = 0
        for stage in stages:
            self.spike(handed * (1 if keep else 2) + stage.kept + stage.handed + stage.forward)
            self.take(stage.kept if keep else 0)
            handed = stage.handed

    def backward(self, stages: Sequence[Stage], pending: int, made: int, left: int, freed: int = 0) -> None:
        """Play `stages` backward, from incoming gradients of `pending` bytes.

        For each number of a weight: `made` bytes while its gradient is worked out, `left` bytes of gradient that stay,
        `freed` bytes of the weight itself that go.
        """
        for stage in reversed(stages):
            self.spike(stage.backward + made * stage.weight)
            self.take(stage.pending - pending - stage.kept + (left - freed) * stage.weight)
            pending = stage.pending
        self.take(-pending)  # the gradient that comes out is the caller's to count

"""The ledger of ActionFormer: the bytes that head/actionformer.py and head/actionformer_head.py hold in a step.

Letters as there: B windows, C channels, L snippets, T positions of a level, K classes, P positions of all levels. Here
an activation is C numbers at each of a level's B x T positions.

Forward and backward are played operator by operator, in torch's order: what comes, and then what goes. Activations are
float32 but for those around convolutions, which under autocast have `e` bytes a number. Attention is torch's plain
form, in float32: its fused ones take four dimensions whose last lies dense, which neither blocks of rows nor what lies
channels first has.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

from lofi_fast.config import ActionFormerConfig
from lofi_fast.ledger import FLOAT, LONG, Parameters, Pass, Tally


@dataclass(frozen=True)
class ActionFormerLedger:
    """Of an `ActionFormerHead` and its loss, over features of `num_features` channels. `dropout`: of the features."""

    config: ActionFormerConfig
    num_features: int
    num_classes: int
    dropout: float

    @property
    def parameters(self) -> Parameters:
        c, channels = self.config, self.config.hidden
        norm = [channels, channels]
        attention = [*(3 * [3 * channels, *norm, channels**2, channels]), channels**2, channels]
        block = [*norm, *norm, *attention, 4 * channels**2, 4 * channels, 4 * channels**2, channels, *norm]
        tower = 2 * [3 * channels**2, *norm]
        tensors = [
            3 * self.num_features * channels, 3 * channels**2, *norm, *norm,
            *((c.stem_blocks + c.levels - 1) * block), *(c.levels * norm), c.levels,
            *tower, 3 * channels * self.num_classes, self.num_classes, *tower, 3 * channels * 2, 2,
        ]  # fmt: skip
        return Parameters(FLOAT * sum(tensors), sum(tensors), len(tensors), sum(tensors))

    def forward(self, tally: Tally, work: Pass) -> None:
        played = self._played(work)
        tally.spike(played.forward)
        tally.take(played.kept)

    def backward(self, tally: Tally, work: Pass) -> None:
        played = self._played(work)
        tally.spike(played.backward)
        tally.take(played.left)

    def _played(self, work: Pass) -> Played:
        return play(self, work.videos, work.num_snippets, work.itemsize, work.gradient)


class Played(NamedTuple):
    """Bytes above what was there before."""

    forward: int  # the most
    kept: int  # from forward to backward
    backward: int  # the most, above what was there when forward was done
    left: int  # when backward is done, above the same: where negative, so much less


@lru_cache(maxsize=4096)
def play(ledger: ActionFormerLedger, videos: int, num_snippets: int, e: int, gradient: int) -> Played:
    """`gradient`: bytes that stay for each number of a parameter."""
    step = _Step(ledger, videos, num_snippets, e, gradient)
    step.forward()
    forward, kept = step.tally.peak, step.tally.now
    step.tally.peak = 0
    step.backward()
    return Played(forward, kept, step.tally.peak - kept, step.tally.now - kept)


@dataclass(frozen=True)
class Level:
    """T positions of B windows, with C channels."""

    batch: int
    channels: int
    positions: int

    @property
    def numbers(self) -> int:
        """Of an activation."""
        return self.batch * self.channels * self.positions

    @property
    def map(self) -> int:
        """Bytes of an activation in float32."""
        return FLOAT * self.numbers

    @property
    def statistics(self) -> int:
        """Bytes that a norm keeps: the mean and the deviation of each position."""
        return 2 * FLOAT * self.batch * self.positions


class Attended(NamedTuple):
    """Numbers in an attention. Where it is by blocks, rows and keys are padded, and each block has keys of its own."""

    rows: int
    keys: int
    scores: int
    mask: int
    reach: int  # of a position; a block has as many rows, and three times as many keys. 0: all positions at once
    padded: int  # keys that the blocks' are taken from
    there: int  # their positions
    in_place: bool  # the values of all blocks can be multiplied where they lie
    viewed: bool  # the heads can be put together where they lie

    @property
    def alone(self) -> bool:
        """A position that sees itself alone lies as fused attention wants it, which keeps what it is given."""
        return not self.reach and self.mask == 1

    @staticmethod
    def of(level: Level, heads: int, window: int) -> Attended:
        reach, rows, viewed = window // 2, level.batch * heads, heads in (1, level.channels)
        if reach == 0:
            mask = level.positions**2
            return Attended(level.numbers, level.numbers, rows * mask, mask, 0, 0, 0, True, viewed)
        blocks, width = -(-level.positions // reach), level.batch * level.channels * reach
        mask = blocks * 3 * reach**2
        return Attended(
            blocks * width, 3 * blocks * width, rows * mask, mask, reach, (blocks + 2) * width, (blocks + 2) * reach,
            rows == 1 or blocks == 1, viewed,
        )  # fmt: skip


class _Step:
    """Forward and backward of a micro-batch."""

    def __init__(self, ledger: ActionFormerLedger, videos: int, num_snippets: int, e: int, gradient: int) -> None:
        c = ledger.config
        self.tally, self.e, self.gradient = Tally(), e, gradient
        self.cast = 0 if e == FLOAT else e  # bytes of a number in a copy that autocast makes
        self.heads, self.window, self.channels = c.attention_heads, c.attention_window, c.hidden
        self.dropout, self.drop_path, self.classes = ledger.dropout > 0, c.drop_path > 0, ledger.num_classes
        step = 1 << (c.levels - 1)
        length = -(-num_snippets // step) * step
        self.levels = [Level(videos, c.hidden, length >> number) for number in range(c.levels)]
        # Of each block the level of its input and that of its output.
        self.blocks = [(self.levels[0], self.levels[0])] * c.stem_blocks
        self.blocks += zip(self.levels, self.levels[1:], strict=False)
        self.videos, self.num_features = videos, ledger.num_features
        self.features = FLOAT * videos * num_snippets * ledger.num_features
        self.padded = videos * length * ledger.num_features  # numbers of the features with what is padded
        self.positions = sum(level.positions for level in self.levels)
        self.single = FLOAT * videos * self.positions  # bytes of a number at each position
        self.scores = self.single * self.classes

    def come(self, *amounts: int) -> None:
        self.tally.take(sum(amounts))

    def go(self, *amounts: int) -> None:
        self.tally.take(-sum(amounts))

    def become(self, size: int, freed: int = 0) -> None:
        """Something becomes another of as many bytes, with which `freed` go."""
        self.tally.take(size)
        self.tally.take(-size - freed)

    # Forward: what is not given back is kept

    def forward(self) -> None:
        first, features = self.levels[0], self.features
        if self.dropout:
            self.come(2 * features // FLOAT, features)  # masks, of each window and of all; the scaled one
            self.go(features // FLOAT)
            self.come(features)
            self.go(features // FLOAT)
        self.come(FLOAT * first.positions, FLOAT * self.padded)
        for channels in (self.num_features, self.channels):
            inputs = self.videos * first.positions * channels
            self.conv(inputs, first.numbers, 3 * channels * self.channels)
            self.norm_and_relu(first)
            self.go(FLOAT * inputs if self.cast else 0)
        for level, out in self.blocks:
            self.block(level, out)
        before = 0
        for level in self.levels:
            self.come(level.map + level.statistics)
            self.become(level.map, before)
            before = level.map if self.cast else 0
            for outputs in (self.classes, 2):
                self.tower(level, outputs)
            self.come(2 * FLOAT * self.videos * level.positions)  # times a factor, and without what is negative
            self.become(2 * FLOAT * self.videos * level.positions)
        self.come(self.scores, 2 * self.single)
        self.go(self.scores, before, features if self.dropout else 0)
        self.go(self.cast * (9 * self.channels * len(self.blocks) + self.classes + 2))  # biases
        self.loss()

    def conv(self, inputs: int, outputs: int, weight: int, bias: int = 0, *, masked: bool = True) -> None:
        """From a float32 input of so many numbers; `masked`: the output is multiplied by the mask."""
        self.come(self.cast * (weight + bias + inputs), self.e * outputs)
        if masked:
            self.come(FLOAT * outputs)
            self.go(self.e * outputs)

    def norm_and_relu(self, level: Level) -> None:
        """A norm, a ReLU and the mask, of which all but the norm's output stays."""
        self.come(level.map + level.statistics)
        self.become(level.map)
        self.come(level.map)

    def tower(self, level: Level, outputs: int) -> None:
        once = int(level is self.levels[0])  # the weights are cast where they are first used
        for number in range(2):
            self.conv(level.numbers, level.numbers, once * 3 * self.channels**2)
            self.norm_and_relu(level)
            self.go(level.map if self.cast and number else 0)
        self.conv(
            level.numbers, self.videos * level.positions * outputs, once * 3 * self.channels * outputs, once * outputs
        )
        self.go(level.map if self.cast else 0)

    def block(self, level: Level, out: Level) -> None:
        e, square, numbers = self.e, self.channels**2, out.numbers
        self.come(level.map + level.statistics)
        self.become(level.map)
        for _ in range(3):
            self.conv(level.numbers, numbers, 3 * self.channels)
            self.come(out.map + out.statistics)
            self.conv(numbers, numbers, square, self.channels, masked=False)
            self.go(out.map if self.cast else 0)
        given = self.attend(Attended.of(out, self.heads, self.window), numbers)
        self.come(self.cast * (square + self.channels), e * numbers)
        self.come(out.map)
        self.go(given, e * numbers, level.map if self.cast else 0)
        pooled = 0 if level is out else out.map
        self.come(pooled, LONG * numbers if pooled else 0)
        self.come(out.map)
        self.residual(out)
        self.go(out.map)
        self.come(out.map + out.statistics)
        self.conv(numbers, 4 * numbers, 4 * square, 4 * self.channels, masked=False)
        self.go(out.map if self.cast else 0)
        self.come(4 * e * numbers)
        self.come(self.cast * (4 * square + self.channels), e * numbers)
        self.come(out.map)
        self.go(e * numbers)
        self.residual(out)
        self.go(pooled)

    def residual(self, out: Level) -> None:
        """The branch scaled, with windows left out, and added to what is there, of which the sum stays."""
        self.come(out.map)
        if self.drop_path:
            self.come(FLOAT * self.videos)
            self.become(out.map)
        self.become(out.map)

    def attend(self, at: Attended, numbers: int) -> int:
        """From queries, keys and values to what the convolution after it is given. Bytes that go with that one's end
        are returned.
        """
        e, cast = self.e, self.cast
        if at.alone:
            self.come(e * numbers, FLOAT * at.scores, e * at.mask)
            return 0
        given = 0
        if at.reach:
            block = 3 * at.reach**2
            padded, index = e * (at.rows + 2 * at.padded), 3 * LONG * at.reach
            self.come(padded, index)
            self.tally.spike(2 * LONG * block)
            self.come(block, at.there, at.mask)
            self.tally.spike(block + max(at.mask, index))
            given = padded + index + block + at.there + at.mask
        copies = e * at.mask + (FLOAT * (at.rows + at.keys) if cast else 0)
        self.come(copies, FLOAT * at.keys if cast else 0)
        self.come(FLOAT * (at.rows + at.keys))  # scaled
        laid_out = FLOAT * at.rows if at.reach else 0
        self.come(laid_out)
        self.come(FLOAT * at.scores)
        self.become(FLOAT * at.scores)
        self.become(FLOAT * at.scores)
        if cast:
            self.come(cast * at.scores, FLOAT * at.rows)
            self.come(cast * at.rows)
            self.go(cast * at.scores, FLOAT * at.rows)
        else:
            self.come(0 if at.in_place else FLOAT * at.keys, FLOAT * at.rows)
        self.go(given, copies, laid_out)
        self.come(self.values(at), 0 if at.viewed else e * numbers)
        return e * (3 * numbers + (0 if at.viewed else at.rows))

    def values(self, at: Attended) -> int:
        """Bytes of values that are kept as they were given."""
        return 0 if self.cast or not at.in_place else FLOAT * (at.padded if at.reach else at.keys)

    def loss(self) -> None:
        scores, single, places = self.scores, self.single, FLOAT * self.positions
        self.come(scores, 2 * single, single // FLOAT)
        self.come(7 * places)
        self.go(6 * places)
        self.come(self.positions, 2 * scores)  # the labels, smoothed
        self.go(2 * scores)
        self.come(5 * scores)  # probability, its parts that are right and what they are made of
        self.go(scores)
        self.come(scores)
        self.go(2 * scores)
        self.come(2 * scores)  # weight
        self.become(scores)
        self.come(scores)
        self.go(2 * scores)
        self.come(4 * scores)  # cross-entropy, and its factor
        self.go(scores)
        self.come(scores)
        self.go(scores)
        self.become(scores)
        self.come(10 * single)  # intersection, union and what is around both
        self.go(3 * single)
        self.come(2 * single)
        self.go(2 * single, places, scores)
        self.come(3 * FLOAT)  # two terms and their sum

    # Backward: from the loss to the features

    def backward(self) -> None:
        self.loss_backward()
        for level in reversed(self.levels):
            last = level is self.levels[0]
            number = 2 * FLOAT * self.videos * level.positions
            self.become(number, 2 * self.single - number if last else -number)
            self.come(2 * number)
            self.go(3 * number)
            self.tower_backward(level, 2, number, last=False)
            self.tower_backward(level, self.classes, self.scores if last else 0, last=True)
            self.become(level.map, level.map)
            self.become(level.map)
            self.norm_backward(level, level.map if level is self.levels[-1] else 0)
        for level, out in reversed(self.blocks):
            self.block_backward(level, out)
        first = self.levels[0]
        for channels in (self.channels, self.num_features):
            inputs = self.videos * first.positions * channels
            self.become(first.map)
            self.become(first.map, first.map)
            self.norm_backward(first, first.map)
            self.mask_backward(first.numbers, first.map)
            self.conv_backward(inputs, first.numbers, 3 * channels * self.channels, freed=self.e * inputs)
        self.come(self.features)
        self.go(FLOAT * self.padded, FLOAT * first.positions)
        if self.dropout:
            self.become(self.features, self.features)
        self.go(self.features)  # what comes out is the caller's to count

    def loss_backward(self) -> None:
        scores, single = self.scores, self.single
        self.come(5 * FLOAT)
        self.tally.spike(4 * single)
        self.go(single // FLOAT)
        self.come(5 * single)
        self.go(12 * single)
        self.tally.spike(3 * scores)
        self.go(2 * scores)
        self.come(2 * scores)
        self.come(scores)
        self.go(2 * scores)
        self.come(3 * scores)
        self.go(4 * scores)
        self.come(2 * scores)
        self.go(6 * scores, self.positions, 5 * FLOAT)

    def mask_backward(self, numbers: int, incoming: int) -> None:
        """Of what comes out of a convolution, down to its own precision."""
        self.come(FLOAT * numbers)
        self.come(self.cast * numbers)
        self.go(incoming, FLOAT * numbers if self.cast else 0)

    def conv_backward(
        self, inputs: int, outputs: int, weight: int, other: int = 0, *, freed: int = 0, whole: bool = True,
        sums: bool = False, more: bool = False,
    ) -> None:  # fmt: skip
        """From a gradient of `e` bytes a number. `other`: numbers of a bias. `freed`: bytes of the input, which go;
        `whole`: its gradient is float32 in the end. `sums`: the same weight has gradients; `more`: and will have.
        """
        e, cast, numbers = self.e, self.cast, weight + other
        self.come(e * (inputs + numbers))
        self.go(e * outputs, freed, 0 if more else cast * weight)
        if sums:
            self.become(e * numbers, e * numbers)
        if cast and whole:
            self.come(FLOAT * inputs)
            self.go(cast * inputs)
        if not more:
            if cast:
                self.come(FLOAT * numbers)
                self.go(cast * numbers)
            self.go((FLOAT - self.gradient) * numbers)

    def norm_backward(self, level: Level, freed: int, *, sums: bool = False, more: bool = False) -> None:
        """`freed`: bytes of the input, if nobody else has it."""
        parameters = 2 * self.channels
        self.come(level.map, FLOAT * parameters)
        self.go(level.map, freed, level.statistics)
        if sums:
            self.become(FLOAT * parameters, FLOAT * parameters)
        self.go(0 if more else (FLOAT - self.gradient) * parameters)

    def tower_backward(self, level: Level, outputs: int, incoming: int, last: bool) -> None:
        sums, more = level is not self.levels[-1], level is not self.levels[0]
        numbers, scores = level.numbers, self.videos * level.positions * outputs
        self.mask_backward(scores, incoming)
        self.conv_backward(
            numbers, scores, 3 * self.channels * outputs, outputs, freed=self.e * numbers, sums=sums, more=more
        )
        for number in range(2):
            self.become(level.map)
            self.become(level.map, level.map)
            self.norm_backward(level, level.map, sums=sums, more=more)
            self.mask_backward(numbers, level.map)
            # In float32 the first input is the other tower's too.
            freed = self.e * numbers if self.cast or number == 0 or last else 0
            self.conv_backward(numbers, numbers, 3 * self.channels**2, freed=freed, sums=sums, more=more)

    def block_backward(self, level: Level, out: Level) -> None:
        e, square, numbers = self.e, self.channels**2, out.numbers
        self.residual_backward(out)
        self.conv_backward(4 * numbers, numbers, 4 * square, self.channels, freed=4 * e * numbers, whole=False)
        self.become(4 * e * numbers, 4 * e * numbers)
        self.conv_backward(numbers, 4 * numbers, 4 * square, 4 * self.channels, freed=e * numbers)
        self.norm_backward(out, out.map)
        self.become(out.map, out.map)
        self.residual_backward(out, level)
        at = Attended.of(out, self.heads, self.window)
        freed = 0 if at.alone else e * (at.rows if at.viewed else numbers)
        self.conv_backward(numbers, numbers, square, self.channels, freed=freed, whole=False)
        self.attend_backward(at, numbers)
        for number in range(3):
            self.become(e * numbers)
            self.conv_backward(numbers, numbers, square, self.channels, freed=e * numbers)
            self.norm_backward(out, out.map)
            self.mask_backward(numbers, out.map)
            freed = self.cast * level.numbers if self.cast or number < 2 else level.map
            self.conv_backward(level.numbers, numbers, 3 * self.channels, freed=freed)
            if number:
                self.become(level.map, level.map)
        self.become(level.map)
        self.norm_backward(level, level.map)
        self.become(level.map, level.map)

    def residual_backward(self, out: Level, level: Level | None = None) -> None:
        """The gradient of the sum stays, beside that of the branch. `level`: of what was added, after pooling."""
        self.come(out.map if self.drop_path else 0)
        self.come(2 * out.map)
        self.go(2 * out.map, out.map + FLOAT * self.videos if self.drop_path else 0)
        self.come(self.gradient * self.channels)
        if level is not None:
            self.become(out.map)
            if level is not out:
                self.come(level.map)
                self.go(out.map, LONG * out.numbers)
                self.become(level.map, level.map)
        self.mask_backward(out.numbers, out.map)

    def attend_backward(self, at: Attended, numbers: int) -> None:
        """From the gradient of the output to those of queries, keys and values, of `e` bytes a number."""
        e, rows, keys, scores = self.e, FLOAT * at.rows, FLOAT * at.keys, FLOAT * at.scores
        if at.alone:
            self.come(3 * e * numbers)
            self.go(5 * e * numbers, scores, e * at.mask)
            return
        if self.cast or at.reach:
            self.come(rows)
            self.go(e * numbers)
        if self.cast and at.reach:
            self.become(rows)
        self.come(keys, scores)
        self.go(rows, self.values(at) or keys)
        self.become(scores, scores)
        self.come(keys, rows)
        self.go(scores, rows, keys)
        self.become(keys)
        self.become(rows)
        if self.cast:
            for size in (at.keys, at.keys, at.rows):
                self.come(e * size)
                self.go(FLOAT * size)
        if at.reach:
            for _ in range(2):
                self.come(e * at.padded)
                self.go(e * at.keys)
                self.come(e * numbers)
                self.go(e * at.padded)
            self.come(e * numbers)
            self.go(e * at.rows)

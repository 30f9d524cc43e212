"""The ledger of the ViT-B/16: the bytes that it holds in a step.

Kept for backward are the inputs of the blocks that learn or have one that learns before them, and of the last layer
norm: 13 activations of P tokens x C channels a snippet, 15.7 MB in bf16 at 224 px (P = 784, C = 768), where plain
autograd keeps some 20 activations a block. With `recompute` only the frames are kept. Beside them a step holds what
one block takes while it runs once more and backward, for the snippets of one graph (`_BLOCK_BACKWARD`).
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import lru_cache

from lofi_fast.encoder.chunks import Chunk, divided, play_backward, play_forward
from lofi_fast.fidelity import FRAMES_PER_SNIPPET
from lofi_fast.ledger import FLOAT, RGB, Parameters, Pass, Stage, Tally

DEPTH = 12  # blocks
HEADS = 12  # of the attention
PATCH, TUBELET = 16, 2  # pixels a side, and frames, of a token
PIXELS = RGB * TUBELET * PATCH**2  # numbers of a token's pixels


@dataclass(frozen=True)
class Trained:
    """What of the encoder learns: its last `blocks`, with the patches' embedding where `all`, or adapters alone."""

    all: bool
    adapters: bool
    blocks: int

    @staticmethod
    def parse(text: str) -> Trained:
        """ "all", "adapters" or "last:N". Raises ValueError."""
        last = re.fullmatch(r"last:(\d+)", text)
        if text not in ("all", "adapters") and not (last and 1 <= int(last[1]) <= DEPTH):
            raise ValueError(f'"{text}": all, adapters, or last:N with 1 to {DEPTH} blocks')
        return Trained(text == "all", text == "adapters", int(last[1]) if last else DEPTH)

    @property
    def first(self) -> int:
        """The first block that learns."""
        return DEPTH - self.blocks


@dataclass(frozen=True)
class Sizes:
    """A chunk of snippets in a network of so many channels."""

    channels: int  # C
    snippets: int
    side: int
    e: int  # bytes of a number in an activation

    @property
    def positions(self) -> int:
        """P: tokens of a snippet."""
        return FRAMES_PER_SNIPPET // TUBELET * (-(-self.side // PATCH)) ** 2

    @property
    def tokens(self) -> int:
        return self.snippets * self.positions

    @property
    def image(self) -> int:
        """Numbers of the pixels, before they are padded."""
        return self.snippets * FRAMES_PER_SNIPPET * RGB * self.side**2

    @property
    def unit(self) -> int:
        """Bytes of one activation: of C channels at each token."""
        return self.tokens * self.channels * self.e

    @property
    def cast(self) -> int:
        """Bytes of a number of a weight that is cast where it is used."""
        return 0 if self.e == FLOAT else self.e

    @property
    def square(self) -> int:
        return self.channels**2


def block_weights(channels: int) -> int:
    """Of a block without its adapter: four matrices, their biases, two layer norms."""
    return 12 * channels**2 + 13 * channels


def adapter_weights(channels: int) -> int:
    hidden = channels // 4
    return 2 * channels * hidden + hidden**2 + 6 * hidden + channels + 1


# One chunk


def _block_forward(of: Sizes) -> int:
    """Bytes alive beside its input while a block runs without a graph: in the MLP around its activation function, or
    with a cast weight.
    """
    return max(10 * of.unit, 7 * of.unit + 4 * of.cast * of.square, 4 * of.unit + 3 * of.cast * of.square) + _small(of)


def _block_backward(of: Sizes, trained: Trained) -> int:
    """Bytes alive beside its input and the gradient of its output while a block runs once more and backward.

    Units of an activation and of C x C weights at the moments that can be the highest, as tests/test_vit.py finds them
    in a real block: the matrix after the MLP's activation function, that function, the matrix before it, the one that
    makes queries, keys and values. Weights that were cast are there until they are passed, their gradients in float32
    from then on.
    """
    e, cast = of.e, of.cast
    if trained.adapters:
        made = FLOAT * adapter_weights(of.channels)
        moments = (
            18 * of.unit + 12 * cast * of.square + made + cast * adapter_weights(of.channels),
            21 * of.unit + 8 * cast * of.square + made,
        )
    else:
        moments = (
            22 * of.unit + (12 * cast + 4 * e) * of.square,
            22 * of.unit + (8 * cast + 4 * FLOAT) * of.square,
            15 * of.unit + (8 * cast + 4 * FLOAT + 4 * e) * of.square,
            7 * of.unit + (3 * cast + 9 * FLOAT + 3 * e) * of.square,
        )  # type: ignore[assignment]
    return max(moments) + _small(of) + 13 * FLOAT * of.channels


def _small(of: Sizes) -> int:
    """Sums of exponentials and statistics of each token, sines and cosines of each position."""
    return FLOAT * (HEADS + 4) * of.tokens + 3 * FLOAT * of.positions * (of.channels // HEADS)


def _embed(of: Sizes, backward: bool) -> int:
    """Bytes alive beside frames and output while pixels become tokens; backward, beside the tokens' gradient too."""
    rows, weight = of.e * PIXELS * of.tokens, PIXELS * of.channels
    pixels = max(2 * FLOAT * of.image, (FLOAT + of.e) * of.image, of.e * of.image + rows, 2 * rows)
    if backward:
        return max(pixels, rows + of.unit + (of.cast + FLOAT) * weight)
    return max(pixels - of.unit, rows + of.cast * weight)


def _largest(of: Sizes, trained: Trained) -> int:
    """Bytes of a block's largest gradient, which autograd makes anew to lay it out as its parameter, or to add it."""
    return FLOAT * of.channels * (of.channels // 4 if trained.adapters else 4 * of.channels)


def _stages(of: Sizes, trained: Trained) -> list[Stage]:
    """What learns, and what comes after that, from the first to the last layer norm."""
    weight = adapter_weights(of.channels) if trained.adapters else block_weights(of.channels)
    stages = []
    if trained.all:
        embed = PIXELS * of.channels + of.channels
        backward = max(_embed(of, True), 2 * FLOAT * embed)
        stages.append(Stage("patches", handed=of.unit, forward=_embed(of, False), weight=embed, backward=backward))
    stages += [
        Stage(
            f"block {index}", kept=of.unit, forward=_block_forward(of), weight=weight,
            backward=max(_block_backward(of, trained), FLOAT * weight + _largest(of, trained) + of.unit),
            pending=of.unit if index > trained.first or trained.all else 0,
        )
        for index in range(trained.first, DEPTH)
    ]  # fmt: skip
    dense = of.tokens * of.channels
    kept = of.unit + 2 * of.e * of.tokens + 2 * of.cast * of.channels  # with statistics, and its own weights cast
    stages.append(
        Stage(
            "norm", kept=kept, forward=of.unit,
            weight=0 if trained.adapters else 2 * of.channels,
            backward=max((FLOAT + of.cast) * dense, 2 * of.unit), pending=of.unit,
        )
    )  # fmt: skip
    return stages


@lru_cache(maxsize=1024)
def chunk_bytes(
    width: int, trained: Trained, snippets: int, side: int, e: int, recompute: bool, first: bool, stays: bool
) -> Chunk:
    """One chunk. The gradients of the one that is `first` in the order of backward become the sums, where these stay:
    what is the only chunk adds them to gradients that are there already, block by block.
    """
    of = Sizes(HEADS * width, snippets, side, e)
    stages, features = _stages(of, trained), FLOAT * snippets * of.channels
    forward, backward = Tally(), Tally()
    _without_graph(forward, of, DEPTH if recompute else trained.first, trained)
    if recompute:
        _without_graph(backward, of, trained.first, trained)
        backward.forward(stages)
    else:
        forward.forward(stages)
    forward.spike(features)
    # A chunk that ran once more as a whole gives its gradients at the end, and not block by block.
    backward.backward(stages, 0, 0, FLOAT if recompute or (first and stays) else 0)
    backward.spike(_largest(of, trained))
    return Chunk(forward.now, features, forward.peak, backward.peak)


def _without_graph(tally: Tally, of: Sizes, blocks: int, trained: Trained) -> None:
    """The patches' embedding and so many blocks, of which nothing is kept."""
    if blocks or not trained.all:
        tally.spike(of.unit + _embed(of, False))
    if blocks:
        tally.spike(of.unit + _block_forward(of))


# The encoder in a step


@dataclass(frozen=True)
class ViTLedger:
    """The ledger of a `ViT`."""

    width: int = 64
    train: str = "all"

    @property
    def trained(self) -> Trained:
        return Trained.parse(self.train)

    @property
    def num_features(self) -> int:
        return HEADS * self.width

    @property
    def parameters(self) -> Parameters:
        channels, trained = self.num_features, self.trained
        embed = PIXELS * channels + channels
        whole = embed + DEPTH * block_weights(channels) + 2 * channels
        held = FLOAT * (whole + 2 * RGB)
        if trained.adapters:
            numbers, tensors = DEPTH * adapter_weights(channels), 9 * DEPTH
            held += FLOAT * numbers
        elif trained.all:
            numbers, tensors = whole, 12 * DEPTH + 4
        else:
            numbers, tensors = trained.blocks * block_weights(channels) + 2 * channels, 12 * trained.blocks + 2
        return Parameters(held, numbers, tensors, numbers)

    def multiply_adds(self, side: int) -> int:
        of = Sizes(self.num_features, 1, side, FLOAT)
        adapter = adapter_weights(of.channels) if self.trained.adapters else 0
        block = 12 * of.square + 2 * of.positions * of.channels + adapter
        return of.positions * (PIXELS * of.channels + DEPTH * block) // FRAMES_PER_SNIPPET

    def moved(self, side: int) -> int:
        """A block's four matrices each touch what lies on both sides in forward, when it runs once more, and twice in
        backward: 4 * 16 activations; what lies between them is read and written as often: layer norms, turned queries
        and keys, the activation function, sums: 3 * 26.
        """
        of = Sizes(self.num_features, 1, side, FLOAT)
        return of.positions * (3 * PIXELS + DEPTH * (64 + 78) * of.channels) // FRAMES_PER_SNIPPET

    def forward(self, tally: Tally, work: Pass) -> int:
        return play_forward(tally, *self._chunks(work))

    def backward(self, tally: Tally, work: Pass) -> None:
        numbers = self.parameters.numbers
        sums = FLOAT * numbers if self._sums_stay(work) else 0
        play_backward(tally, sums, 0, *self._chunks(work))
        tally.take(work.gradient * numbers - sums)

    def without_gradients(self, tally: Tally, work: Pass) -> None:
        of = Sizes(self.num_features, min(work.chunk, work.snippets), work.side, work.itemsize)
        features = FLOAT * work.snippets * of.channels
        tally.take(features)
        _without_graph(tally, of, DEPTH, self.trained)
        tally.spike(features)

    def live(self, tally: Tally, snippets: int, side: int, itemsize: int) -> None:
        """As in the other stages: there is no batch norm."""
        work = Pass(1, snippets, side, itemsize, snippets)
        self.forward(tally, work)
        self.backward(tally, work)

    @staticmethod
    def _sums_stay(work: Pass) -> bool:
        return not work.accumulates or work.snippets > work.chunk

    def _chunks(self, work: Pass) -> tuple[int, Chunk, Chunk]:
        stays = self._sums_stay(work)

        def part(snippets: int, first: bool, _: bool) -> Chunk:
            return chunk_bytes(
                self.width, self.trained, snippets, work.side, work.itemsize, work.recompute, first, stays
            )

        return divided(work, part)

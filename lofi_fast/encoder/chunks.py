"""How an encoder that runs in chunks of snippets is played on a tally, whatever its network: see lofi_fast/ledger.py.

A chunk is a graph of its own. Forward leaves what each keeps; backward takes them one after the other, the last of
forward first, and makes the sums of the weights' gradients with the first one that it takes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from lofi_fast.ledger import Pass, Tally


class Chunk(NamedTuple):
    """Bytes of one chunk of the encoder; peaks are above what was there before."""

    kept: int
    features: int
    forward: int
    backward: int  # counting what was kept in forward


# Bytes of a chunk of so many snippets. Where it stands in the order of backward: (first, last).
ChunkOf = Callable[[int, bool, bool], Chunk]


def divided(work: Pass, chunk_of: ChunkOf) -> tuple[int, Chunk, Chunk]:
    """(number of others, one of the others, end chunk). The end chunk comes last in forward and first in backward,
    and may be smaller than the others, which are alike.
    """
    others = -(-work.snippets // work.chunk) - 1
    end = chunk_of(work.snippets - others * work.chunk, True, others == 0)
    return others, chunk_of(work.chunk, False, others == 1) if others else Chunk(0, 0, 0, 0), end


def play_forward(tally: Tally, others: int, other: Chunk, end: Chunk) -> int:
    """One chunk after the other, then the features put together, which are left beside what backward needs, whose bytes
    are returned.
    """
    if others:
        tally.take((others - 1) * (other.kept + other.features))
        tally.spike(other.forward)
        tally.take(other.kept + other.features)
    tally.spike(end.forward)
    tally.take(end.kept + end.features)
    tally.spike(others * other.features + end.features)
    return others * other.kept + end.kept


def play_backward(tally: Tally, sums: int, shared: int, others: int, other: Chunk, end: Chunk) -> None:
    """From the features' gradient to the sums of the weights' gradients, `sums` bytes, which are left. `shared`: bytes
    that all chunks share, and that go with the last.
    """
    features = others * other.features + end.features
    tally.take(features)  # their gradient
    tally.spike(end.backward)
    made = sums - end.kept
    if others:
        tally.take(made)
        tally.spike(other.backward)
        made = -others * other.kept
    tally.take(made - features - shared)

"""How other trainers choose once what fits, and what they do when memory runs out later. From their sources:

Lightning's `BatchSizeFinder` (lightning/pytorch/tuner/batch_size_scaling.py) runs three steps at each size. Mode
"power" doubles from a small one until a step fails and halves then; mode "binsearch" goes on to bisect between the last
that went through and the first that failed. The size is fixed from then on: memory that runs out ends the training.

accelerate's `find_executable_batch_size` (accelerate/utils/memory.py) wraps the whole training: it starts it at the
largest size, and whenever memory runs out, halves the size and starts it again. It never goes up, and raises when the
size has reached zero.

DeepSpeed's autotuner (deepspeed/autotuning/autotuner.py) runs the smallest size, divides the memory of the whole
device by what that took, tries 1.05, 1 and 0.95 times the result, and bisects when none goes through. It knows of no
other process but through steps that fail; what it found is written to a file, and fixed.

Theirs is the batch. Here the batch is given and Omega is what changes, in shares of full fidelity's.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from lofi_fast.fidelity import MAX_CUT

Attempt = Callable[[float], int | None]  # peak bytes of some steps at a share of Omega; None when memory ran out
Search = Callable[[Attempt, int, int], float | None]  # attempt, bytes of the device, of the process before a step
SMALLEST = 1 / MAX_CUT
CLOSE = 1.1  # two shares nearer than this are the same rung


@dataclass(frozen=True)
class Peer:
    """`search`: at the start of each run. `halves`: goes on with half of it when memory runs out; others end."""

    search: Search
    halves: bool = False
    repeats: bool = True  # searches again when it is started again


def highest_now(attempt: Attempt, total: int, held: int) -> float | None:
    """By hand: the highest that goes through, tried from the top."""
    share = 1.0
    while attempt(share) is None:
        if share <= SMALLEST:
            return None
        share = max(share / CLOSE, SMALLEST)
    return share


def power(attempt: Attempt, total: int, held: int) -> float | None:
    """Twice as much until it fails."""
    share = SMALLEST
    if attempt(share) is None:
        return None
    while share < 1 and attempt(min(2 * share, 1.0)) is not None:
        share = min(2 * share, 1.0)
    return share


def binsearch(attempt: Attempt, total: int, held: int) -> float | None:
    """The same, then half-way between what went through and what failed."""
    share = power(attempt, total, held)
    if share is None or share == 1:
        return share
    return _bisected(attempt, share, min(2 * share, 1.0))


def halving(attempt: Attempt, total: int, held: int) -> float | None:
    """From the top; what fails is halved by the training itself, see `Peer.halves`."""
    return 1.0


def autotuner(attempt: Attempt, total: int, held: int) -> float | None:
    """What the device would hold by proportion, a little more or less, and bisected when that fails."""
    peak = attempt(SMALLEST)
    if peak is None:
        return None
    calculated = min(SMALLEST * (total - held) / max(peak - held, 1), 1.0)
    for factor in (1.05, 1.0, 0.95):
        share = calculated * factor
        if share <= 1 and (share <= SMALLEST or attempt(share) is not None):
            return max(share, SMALLEST)
    return _bisected(attempt, SMALLEST, calculated)


def _bisected(attempt: Attempt, good: float, bad: float) -> float:
    while bad / good > CLOSE:
        middle = (good + bad) / 2
        if attempt(middle) is None:
            bad = middle
        else:
            good = middle
    return good


PEERS = {
    "fixed cut": Peer(highest_now, repeats=False),
    "Lightning, power": Peer(power),
    "Lightning, binsearch": Peer(binsearch),
    "accelerate": Peer(halving, halves=True),
    "DeepSpeed": Peer(autotuner),
}

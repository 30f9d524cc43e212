"""Plans: the ways to take a step, and which of them fits a budget. Nothing here measures; what a step needs is asked.

A plan is a rung of a ladder and three levers: how many videos are in memory at once, whether the encoder's activations
are recomputed in backward, and how many snippets go into one graph of the encoder (the chunk). `candidates` lists what
may be chosen, best first; `worthwhile` leaves out what gains nothing; `first_fitting` chooses; `refusal` says what
would help when nothing fits; `fit` turns readings of real steps into the two scalars that a ledger of bytes does not
know.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

from lofi_fast.budget import gigabytes
from lofi_fast.config import Recompute
from lofi_fast.fidelity import FRAMES_PER_SNIPPET, Fidelity, pixel_cost
from lofi_fast.ledger import CHUNK_PIXELS, default_chunk

T = TypeVar("T")
Device = Literal["cpu", "cuda"]
RECOMPUTE_COST = 4 / 3  # forward, backward, and forward again, where backward costs two forwards
SMALL_BATCH = 0.1  # more for one video at a time than for many, of what a video costs
# Frame pixels in one graph of the encoder beyond which a larger graph is hardly faster. A GPU is fed by a host that
# needs some 10 ms to launch the kernels of a graph: on an H200 (R18, bf16, 100 snippets of 224 px) graphs of 2, 8, 16,
# 32, 64 and 100 snippets take 563, 119, 63, 40, 34 and 33 ms in all. A CPU computes for longer than it launches.
SATURATING_PIXELS: dict[Device, int] = {"cpu": CHUNK_PIXELS, "cuda": 25_000_000}
# Of it, the smallest graph that is planned. Blocks of less than 1 MiB, of which small graphs are made on a CPU, are cut
# out of the C library's heap, which then keeps more than the smaller graph saves.
SMALLEST_SHARE: dict[Device, float] = {"cpu": 1 / 8, "cuda": 0.0}
LAUNCH_BOUND = 0.5  # of the saturating chunk, below which the time of a step on a GPU is in proportion to its graphs
WORTH = 0.01  # of a step's bytes, that a slower way to run a rung must save to be a plan of its own


@dataclass(frozen=True, order=True)
class Plan:
    """How a step is taken: `micro_batch` videos in memory at once, the encoder's activations kept or recomputed, and
    `chunk` snippets in one graph of the encoder (0: as many as the encoder takes by itself).
    """

    fidelity: Fidelity
    micro_batch: int
    recompute: bool = False
    chunk: int = 0

    @property
    def omega(self) -> int:
        return self.fidelity.omega

    def to_json(self) -> list[int]:
        """[num_snippets, side, micro_batch, recompute, chunk]"""
        return [self.fidelity.num_snippets, self.fidelity.side, self.micro_batch, int(self.recompute), self.chunk]

    @staticmethod
    def from_json(numbers: Sequence[Any]) -> Plan:
        """A plan may come without its chunk. Raises ValueError for what `to_json` did not write."""
        if len(numbers) not in (4, 5) or not all(isinstance(n, int) for n in numbers):
            raise ValueError(f"{numbers} is not a plan")
        if min(numbers[:3]) < 1 or min(numbers) < 0 or max(numbers) > sys.maxsize:
            raise ValueError(f"{numbers} is not a plan")
        return Plan(Fidelity(numbers[0], numbers[1]), numbers[2], bool(numbers[3]), *numbers[4:])

    def __str__(self) -> str:
        chunk = f", {self.chunk} to a graph" if self.chunk else ""
        return f"{self.fidelity}, {self.micro_batch} at once{', recompute' if self.recompute else ''}{chunk}"


def micro_batches(batch: int) -> tuple[int, ...]:
    """`batch`, then halved, rounding up, down to 1."""
    sizes = [batch]
    while sizes[-1] > 1:
        sizes.append((sizes[-1] + 1) // 2)
    return tuple(sizes)


def chunks(fidelity: Fidelity, micro_batch: int, device: Device) -> tuple[int, ...]:
    """Snippets in one graph of the encoder: as many as `device` gains from, or all there are, halved down to 1 or to
    the smallest that pays.
    """
    most = default_chunk(fidelity.side, SATURATING_PIXELS[device])
    sizes = [min(most, micro_batch * fidelity.num_snippets)]
    while sizes[-1] // 2 >= max(1, int(SMALLEST_SHARE[device] * most)):
        sizes.append(sizes[-1] // 2)
    return tuple(sizes)


def candidates(
    rungs: Sequence[Fidelity],
    batch: int,
    micro_batch: int | None = None,
    recompute: Recompute = "auto",
    device: Device | None = None,
    launch_bound: float | None = None,
) -> tuple[Plan, ...]:
    """All plans of a ladder's `rungs` (highest first), best first.

    Higher rungs come first, whatever it takes to run them; the plans of one rung stand in the order of their time on
    `device`, fastest first. So the first that fits is the highest rung that fits at all, run in the fastest way that
    fits, and more memory never buys less. `micro_batch` fixes the videos at once, `recompute` "always" or "never" that
    lever. Without a `device` the encoder chooses its chunk. `launch_bound`: see `relative_cost`.
    """
    sizes = micro_batches(batch) if micro_batch is None else (min(micro_batch, batch),)
    again = {"auto": (False, True), "always": (True,), "never": (False,)}[recompute]

    def plans(rung: Fidelity) -> list[Plan]:
        found = [
            Plan(rung, size, twice, chunk)
            for twice in again
            for size in sizes
            for chunk in ((0,) if device is None else chunks(rung, size, device))
        ]
        return sorted(
            found, key=lambda plan: relative_cost(plan, rung, device, launch_bound)
        )  # alike stay in their order

    return tuple(plan for rung in rungs for plan in plans(rung))


def worthwhile(plans: Iterable[Plan], ledger: Callable[[Plan], int]) -> Iterator[Plan]:
    """`plans` without those that save next to nothing beside a faster plan of the same rung."""
    least: dict[Fidelity, int] = {}  # bytes of the last plan of a rung that was taken
    for plan in plans:
        needs = ledger(plan)
        if plan.fidelity not in least or needs <= (1 - WORTH) * least[plan.fidelity]:
            least[plan.fidelity] = needs
            yield plan


def relative_cost(plan: Plan, full: Fidelity, device: Device | None = None, launch_bound: float | None = None) -> float:
    """Time of a step, of that at full fidelity with many videos at once: in proportion to Omega and to what a pixel
    costs at the side, which is what the convolutions cost, with a little more for few videos at once, whose kernels are
    small. On a GPU small chunks cost more, because the host cannot launch their kernels as fast as they run.

    `launch_bound`: frame pixels of the chunk below which that is so, where more is known of the GPU than that it is one
    (`estimates.launch_bound`); the slower the GPU, the fewer.
    """
    cost = plan.omega * pixel_cost(plan.fidelity.side) / (full.omega * pixel_cost(full.side))
    cost *= (RECOMPUTE_COST if plan.recompute else 1.0) * (1 + SMALL_BATCH / plan.micro_batch)
    if device == "cuda" and plan.chunk:
        side = plan.fidelity.side
        if launch_bound is None:
            fewest = LAUNCH_BOUND * default_chunk(side, SATURATING_PIXELS[device])
        else:
            fewest = launch_bound / (FRAMES_PER_SNIPPET * side**2)
        cost *= max(fewest / plan.chunk, 1.0)
    return cost


# What is chosen


def first_fitting(plans: Iterable[Plan], predict: Callable[[Plan], int], room: int) -> Plan | None:
    """The first of `plans` whose predicted bytes are within `room`, or None."""
    return next((plan for plan in plans if predict(plan) <= room), None)


def remedies(
    rungs: Sequence[Fidelity],
    batch: int,
    micro_batch: int | None = None,
    recompute: Recompute = "auto",
    device: Device | None = None,
    lower: Sequence[tuple[str, Fidelity]] = (),
) -> tuple[tuple[str, Plan], ...]:
    """What to change when none of the `candidates` of the same arguments fits: (flags, smallest plan with them).

    `lower`: rungs below the ladder's end, each with its flag, like ("--max-cut 32", rung).
    """
    lowest, never = rungs[-1], recompute == "never"
    size = 1 if micro_batch is None else min(micro_batch, batch)

    def smallest(rung: Fidelity, size: int, twice: bool) -> Plan:
        return Plan(rung, size, twice, 0 if device is None else chunks(rung, size, device)[-1])

    changes = [("--recompute auto", smallest(lowest, size, True))] if never else []
    changes += [(flag, smallest(rung, size, not never)) for flag, rung in lower]
    if size > 1:
        changes.append(("--micro-batch none", smallest(lowest, 1, not never)))
        if never:
            changes.append(("--micro-batch none --recompute auto", smallest(lowest, 1, True)))
    return tuple(changes)


def refusal(
    plans: Sequence[Plan],
    predict: Callable[[Plan], int],
    limit: int,
    room: int,
    budget: int,
    changes: Sequence[tuple[str, Plan]] = (),
) -> str:
    """The sentence for when none of `plans` fits: what the smallest needs, and which flag would change it.

    `limit`: the smaller of the budget and what this process could hold; `room`: the part of it that a plan may need.
    """
    smallest = min(plans, key=predict)
    needs = predict(smallest)
    whose = f"a budget of {gigabytes(budget)}" if limit >= budget else f"the {gigabytes(limit)} that others leave"
    helping = [f"{flag} ({gigabytes(predict(plan))})" for flag, plan in changes if predict(plan) <= room]
    enough = gigabytes(math.ceil(needs * limit / room / 1e7) * 10**7 if room > 0 else needs)
    more = f"--mem-budget {enough.replace(' ', '')}"
    if limit < budget:
        more = f"free some memory (a step needs {enough} to be left)"
    return (
        f"nothing fits: of {whose}, {gigabytes(max(room, 0))} can be planned with, and the smallest step ({smallest}) "
        f"needs {gigabytes(needs)}; {' or '.join([*helping, more])} would do"
        f"{'' if helping else ', or a smaller --batch, --encoder or --width'}"
    )


# What real steps say about the ledger


@dataclass(frozen=True)
class Fit:
    """The peak of a step above the process between steps, in bytes: scale * ledger + extra.

    `scale` (1 or more) is what allocators add in rounding and fragmentation, `extra` what does not grow with the step:
    workspaces, pools, code loaded at the first use.
    """

    scale: float
    extra: float

    def added(self, ledger: int) -> int:
        return max(math.ceil(self.scale * ledger + self.extra), ledger)


@dataclass(frozen=True)
class Prior:
    """What is assumed about the two scalars before any step was run."""

    careful: Fit = Fit(1.3, 128e6)  # for the first trial: safe rather than exact
    likely: Fit = Fit(1.1, 64e6)  # the mean of the prior
    scale_spread: float = 0.1  # its standard deviations
    extra_spread: float = 128e6
    noise: float = 0.03  # standard deviation of a reading, as a share of it: plans differ in convolution algorithms


PRIOR = Prior()


def fit(readings: Sequence[tuple[int, int]], prior: Prior) -> Fit:
    """The most probable scalars given `readings` (ledger, added), both in bytes; the careful ones without readings.

    Least squares with the prior as two more equations, under scale >= 1 and extra >= 0.
    """
    if not readings:
        return prior.careful
    unit = float(max(1, *(ledger for ledger, _ in readings)))
    pairs = [(ledger / unit, added / unit) for ledger, added in readings]
    points = [(x, y, (prior.noise * max(x, y, 1e-6)) ** -2) for x, y in pairs]  # with weights
    s0, e0 = prior.likely.scale, prior.likely.extra / unit
    ps, pe = prior.scale_spread**-2, (prior.extra_spread / unit) ** -2
    ss = sum(w * x * x for x, _, w in points) + ps
    se = sum(w * x for x, _, w in points)
    ee = sum(w for _, _, w in points) + pe
    s_ = sum(w * x * y for x, y, w in points) + ps * s0
    e_ = sum(w * y for _, y, w in points) + pe * e0

    def error(s: float, e: float) -> float:
        return ss * s * s + 2 * se * s * e + ee * e * e - 2 * s_ * s - 2 * e_ * e

    determinant = ss * ee - se * se  # positive: the prior's terms make it so
    scale, extra = (s_ * ee - e_ * se) / determinant, (e_ * ss - s_ * se) / determinant
    if scale < 1 or extra < 0:  # then the best lies on one of the two bounds
        bounds = [(1.0, max((e_ - se) / ee, 0.0)), (max(s_ / ss, 1.0), 0.0)]
        scale, extra = min(bounds, key=lambda bound: error(*bound))
    return Fit(scale, extra * unit)

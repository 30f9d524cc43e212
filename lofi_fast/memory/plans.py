"""The plan: which step fits the budget. Pure: what a step needs is told by a function, or by one that runs it.

A plan is a rung of a ladder, how many videos are in memory at once, and whether the encoder's maps are recomputed.
`candidates` lists what may be chosen, best first; `first_fitting` chooses; `refusal` says what would help when nothing
fits; `fit` turns readings of real steps into the two scalars that the ledger of bytes does not know.

`highest_fitting` plans by running instead, where there are few candidates and no ledger: it starts at the lowest rung,
goes where a straight line through its readings says the budget ends, and closes in. A line only proposes; what is
chosen has been run. (Memory is not monotone in pixels: convolution algorithms change.)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from lofi_fast.budget import gigabytes
from lofi_fast.config import Policy, Recompute
from lofi_fast.fidelity import Fidelity

T = TypeVar("T")
RECOMPUTE_COST = 4 / 3  # forward, backward, and forward again, where backward costs two forwards
SMALL_BATCH = 0.1  # more for one video at a time than for many, of what a video costs


@dataclass(frozen=True, order=True)
class Plan:
    """How a step is taken: `micro_batch` videos in memory at once, the encoder's maps kept or recomputed."""

    fidelity: Fidelity
    micro_batch: int
    recompute: bool = False

    @property
    def omega(self) -> int:
        return self.fidelity.omega

    def to_json(self) -> list[int]:
        """[num_snippets, side, micro_batch, recompute]"""
        return [self.fidelity.num_snippets, self.fidelity.side, self.micro_batch, int(self.recompute)]

    @staticmethod
    def from_json(numbers: Sequence[Any]) -> Plan:
        """Raises ValueError for what `to_json` did not write."""
        if len(numbers) != 4 or not all(isinstance(n, int) for n in numbers) or min(numbers[:3]) < 1:
            raise ValueError(f"{numbers} is not a plan")
        return Plan(Fidelity(numbers[0], numbers[1]), numbers[2], bool(numbers[3]))

    def __str__(self) -> str:
        return f"{self.fidelity}, {self.micro_batch} at once{', recompute' if self.recompute else ''}"


def micro_batches(batch: int) -> tuple[int, ...]:
    """`batch`, then halved, rounding up, down to 1."""
    sizes = [batch]
    while sizes[-1] > 1:
        sizes.append((sizes[-1] + 1) // 2)
    return tuple(sizes)


def candidates(
    rungs: Sequence[Fidelity],
    batch: int,
    policy: Policy = Policy.BATCH,
    micro_batch: int | None = None,
    recompute: Recompute = "auto",
) -> tuple[Plan, ...]:
    """All plans of a ladder's `rungs` (highest first), best first.

    Higher rungs come first, and of a rung, for the policy `fidelity`, more videos at once; `micro_batch` fixes their
    number. With "auto" the same again with recomputation comes last: it is used where nothing fits without.
    """
    if micro_batch is not None:
        sizes: tuple[int, ...] = (min(micro_batch, batch),)
    else:
        sizes = (batch,) if policy is Policy.BATCH else micro_batches(batch)
    again = {"auto": (False, True), "always": (True,), "never": (False,)}[recompute]
    return tuple(Plan(rung, size, twice) for twice in again for rung in rungs for size in sizes)


def relative_cost(plan: Plan, full: Fidelity) -> float:
    """Time of a step, of that at full fidelity with many videos at once: in proportion to Omega, which is what the
    convolutions cost, with a little more for few videos at once, whose kernels are small.
    """
    return plan.omega / full.omega * (RECOMPUTE_COST if plan.recompute else 1.0) * (1 + SMALL_BATCH / plan.micro_batch)


# What is chosen


def first_fitting(plans: Iterable[Plan], predict: Callable[[Plan], int], room: int) -> Plan | None:
    """The first of `plans` whose predicted bytes are within `room`, or None."""
    return next((plan for plan in plans if predict(plan) <= room), None)


def remedies(
    rungs: Sequence[Fidelity],
    batch: int,
    policy: Policy = Policy.BATCH,
    micro_batch: int | None = None,
    recompute: Recompute = "auto",
    lower: Sequence[tuple[str, Fidelity]] = (),
) -> tuple[tuple[str, Plan], ...]:
    """What to change when none of the `candidates` of the same arguments fits: (flags, smallest plan with them).

    `lower`: rungs below the ladder's end, each with its flag, like ("--max-cut 32", rung).
    """
    lowest, twice = rungs[-1], recompute == "always"
    size = candidates(rungs, batch, policy, micro_batch, recompute)[-1].micro_batch
    changes = []
    if recompute == "never":
        changes.append(("--recompute auto", Plan(lowest, size, True)))
    changes += [(flag, Plan(rung, size, recompute != "never")) for flag, rung in lower]
    if size > 1:
        flag = "--policy fidelity" if micro_batch is None else "--micro-batch 1"
        changes.append((flag, Plan(lowest, 1, twice or recompute == "auto")))
        if recompute == "never":
            changes.append((f"{flag} --recompute auto", Plan(lowest, 1, True)))
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

    `limit`: the smaller of the budget and what can be had; `room`: what of it can be planned with.
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
    """What is believed before any step was run."""

    careful: Fit = Fit(1.3, 128e6)  # for the first trial: safe rather than exact
    likely: Fit = Fit(1.1, 64e6)
    scale_spread: float = 0.1
    extra_spread: float = 128e6
    noise: float = 0.03  # of a reading, as a share of it: plans differ by their convolution algorithms


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

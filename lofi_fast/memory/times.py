"""Seconds of steps, as far as they are known: what a plan took lately, and for other plans an estimate from those.

The time of a step goes with its cost (`plans.relative_cost`), but not quite: small images and short videos use a device
less well. So a plan that has not run is expected to take its cost times the seconds per cost of those that have,
the nearest in fidelity counting most.
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lofi_fast.memory.plans import Plan

LATELY = 8  # steps of a plan whose median counts
NEAR = 0.1  # distance in fidelity (of log L and log side^2) up to which a plan counts as much as one at no distance


class Times:
    """Seconds of the steps of plans; `cost` is relative, `expected` the seconds of a step of cost 1 before any has run.

    Not for several threads.
    """

    def __init__(self, cost: Callable[[Plan], float], expected: float | None = None) -> None:
        self._cost, self._expected = cost, expected
        self._taken: dict[Plan, deque[float]] = {}
        self._ran: set[Plan] = set()  # in this process

    def learn(self, plan: Plan, seconds: float, warm: bool = False) -> bool:
        """A step of a plan took so long. The first of a plan in a process loads code and chooses algorithms, and is not
        learned from, unless it is `warm`. Gives whether anything was learned.
        """
        if not warm and plan not in self._ran:
            self._ran.add(plan)
            return False
        self._taken.setdefault(plan, deque(maxlen=LATELY)).append(seconds)
        return True

    def measured(self, plan: Plan) -> float | None:
        """The median of what a plan took lately; None for one that has not been timed."""
        return statistics.median(self._taken[plan]) if plan in self._taken else None

    def estimates(self, plans: Sequence[Plan]) -> NDArray[np.float64] | None:
        """Seconds of each of `plans`, measured or estimated; None while nothing is known."""
        known = {plan: statistics.median(taken) for plan, taken in self._taken.items()}
        if not known:
            if self._expected is None:
                return None
            return self._expected * np.array([self._cost(plan) for plan in plans])
        ratios = np.log([seconds / self._cost(plan) for plan, seconds in known.items()])
        apart = _places(plans)[:, None, :] - _places(known)[None, :, :]
        weights = 1 / (NEAR**2 + (apart**2).sum(axis=2))
        costs = np.array([self._cost(plan) for plan in plans])
        found: NDArray[np.float64] = costs * np.exp((weights * ratios).sum(axis=1) / weights.sum(axis=1))
        for index, plan in enumerate(plans):
            if plan in known:
                found[index] = known[plan]
        return found

    def __call__(self, plan: Plan) -> float | None:
        """Seconds of a step of one plan; see `estimates`."""
        found = self.estimates([plan])
        return None if found is None else float(found[0])

    def state_dict(self) -> list[Any]:
        """[plan, seconds of its last steps] of each, which JSON can hold."""
        return [[plan.to_json(), list(taken)] for plan, taken in self._taken.items()]

    def load_state_dict(self, state: Iterable[Any], known: Mapping[Plan, Any]) -> None:
        """Continue from `state_dict`; plans that are not in `known` are left out."""
        self._taken = {
            plan: deque(taken, LATELY) for numbers, taken in state if (plan := Plan.from_json(numbers)) in known
        }
        self._ran.clear()


def _places(plans: Iterable[Plan]) -> NDArray[np.float64]:
    """(log L, log side^2) of each plan."""
    return np.array(
        [(math.log(p.fidelity.num_snippets), 2 * math.log(p.fidelity.side)) for p in plans], dtype=np.float64
    ).reshape(-1, 2)

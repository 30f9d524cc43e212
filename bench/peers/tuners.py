"""How other trainers find what fits, from their documentation: each searches once, by steps that it runs.

Lightning's `BatchSizeFinder` (mode "power") doubles until a step fails and takes the last that went through;
accelerate's `find_executable_batch_size` starts high and halves at every failure; DeepSpeed's autotuner divides what
memory is left by what one sample took. Theirs is the batch; here the batch is given and Omega is what changes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from lofi_fast.memory.plans import Plan

Attempt = Callable[[Plan], int | None]  # peak bytes of a step; None when it ran out of memory
CUT = 4.0  # the paper's


def fixed(plans: Sequence[Plan], attempt: Attempt, budget: int, held: int) -> Plan | None:
    """By hand: cut 4, whatever the memory."""
    return _below(plans, plans[0].fidelity.omega / CUT)


def doubling(plans: Sequence[Plan], attempt: Attempt, budget: int, held: int) -> Plan | None:
    """From the smallest up by factors of two, until one fails."""
    found, omega = None, float(plans[-1].fidelity.omega)
    while True:
        plan = _below(plans, omega)
        if attempt(plan) is None:
            return found
        if plan == plans[0]:
            return plan
        found, omega = plan, 2 * omega


def halving(plans: Sequence[Plan], attempt: Attempt, budget: int, held: int) -> Plan | None:
    """From the largest down by factors of two, until one goes through."""
    omega = float(plans[0].fidelity.omega)
    while True:
        plan = _below(plans, omega)
        if attempt(plan) is not None:
            return plan
        if plan == plans[-1]:
            return None
        omega /= 2


def linear(plans: Sequence[Plan], attempt: Attempt, budget: int, held: int) -> Plan | None:
    """By a line through what is `held` and the peak of the smallest."""
    smallest = plans[-1]
    peak = attempt(smallest)
    if peak is None:
        return None
    return _below(plans, smallest.fidelity.omega * (budget - held) / max(peak - held, 1))


def _below(plans: Sequence[Plan], omega: float) -> Plan:
    """The largest plan of no more than `omega`; the smallest where all are larger. `plans`: best first."""
    return next((plan for plan in plans if plan.fidelity.omega <= omega * (1 + 1e-9)), plans[-1])


TUNERS: dict[str, Callable[[Sequence[Plan], Attempt, int, int], Plan | None]] = {
    "cut 4 by hand": fixed,
    "doubling until it fails (Lightning)": doubling,
    "halving until it works (accelerate)": halving,
    "linear in the sample (DeepSpeed)": linear,
}

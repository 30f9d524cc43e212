"""The rows of `bench gain`: from which encoder each starts, and what its joint stage is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Start = Literal["random", "ACP", "ACP+", "ACP+ with background", "ACP+ for longer"]
"""Where an encoder comes from: random or given weights; clips of another set (ACP); then the target's own segments
(ACP+); those with background as one more class; or ACP+ and then as much more of it as a joint stage takes.
"""
Peer = Literal["sampled", "partly frozen"]


@dataclass(frozen=True)
class Arm:
    """A row: the encoder it starts from, the flags of its joint stage, without any of which the encoder stays frozen,
    and those of its head, which the joint stage and the detector have.
    """

    name: str
    start: Start = "ACP+"
    joint: tuple[str, ...] = ()
    head: tuple[str, ...] = ()
    peer: Peer | None = None  # an encoder whose gradients are not all its gradients
    share: float | None = None  # of the time of an epoch at full fidelity, that an epoch may take
    told: str = ""


def _cut(cut: int, *flags: str) -> tuple[str, ...]:
    return ("--cut", str(cut), *flags)


FROZEN = (
    Arm("ICP", "random", told="weights as given, or random; frozen"),
    Arm("ACP", "ACP", told="trained on clips of another set; frozen"),
    Arm("ACP+", "ACP+", told="then on the target's own segments; frozen"),
    Arm("ACP+ with background", "ACP+ with background", told="with background as one more class; frozen"),
    Arm("ACP+ for longer", "ACP+ for longer", told="for as long again as the joint stage of long C takes; frozen"),
)
PATTERNS = (
    Arm("S", joint=_cut(4, "--pattern", "spatial"), told="half the side"),
    Arm("T", joint=_cut(4, "--pattern", "temporal"), told="a quarter of the snippets"),
    Arm("ST", joint=_cut(4, "--pattern", "spatio_temporal"), told="half the snippets, 0.7 of the side"),
    Arm("short C", joint=_cut(4, "--pattern", "cyclic", "--short-cycle", "16"), told="S, T, ST by turns of 16 steps"),
    Arm("long C", joint=_cut(4, "--pattern", "cyclic"), told="S, T, ST by epochs"),
)
CUTS = tuple(
    Arm(f"long C cut {cut}", joint=_cut(cut, "--pattern", "cyclic"), told=f"at 1/{cut} of full fidelity")
    for cut in (2, 8, 16)
)
FULL = (Arm("full", joint=_cut(1), told="full fidelity, which the paper could not train"),)
PEERS = (
    Arm("30% of gradients", joint=_cut(1), peer="sampled", told="full fidelity, gradients of 30% of the snippets"),
    Arm("partly frozen", joint=_cut(1), peer="partly frozen", told="full fidelity, stem and two stages frozen"),
)
TIMES = tuple(
    Arm(f"planned 1/{part} of the time", joint=("--min-cut", "1"), share=1 / part,
        told=f"the planner's choice where an epoch may take 1/{part} of full fidelity's")
    for part in (2, 4, 8)
)  # fmt: skip
HEADS = tuple(
    Arm(f"{arm.name} {title}", joint=arm.joint, head=("--head", head), told=f"the same with {title} for a head")
    for head, title in (("bmn", "BMN"), ("actionformer", "ActionFormer"))
    for arm in (FROZEN[2], PATTERNS[-1])
)
FRONTIER = "frontier"  # which names of its rows begin with
QUICK = ("ACP", "ACP+", "long C", "full")


def planned(budgets: list[str]) -> tuple[Arm, ...]:
    """Rows of the planner's choice within budgets of memory."""
    return tuple(
        Arm(f"planned {budget}", joint=("--min-cut", "1", "--mem-budget", budget), told="the planner's choice")
        for budget in budgets
    )


def frontier(epochs: dict[str, list[int]]) -> tuple[Arm, ...]:
    """Rows of equal training time: for each cut, numbers of epochs of the joint stage."""
    return tuple(
        Arm(f"{FRONTIER} cut {cut} for {count} epochs", joint=_cut(int(cut), "--joint-epochs", str(count)),
            told="equal training time")
        for cut, counts in epochs.items() for count in counts
    )  # fmt: skip


def all_arms(budgets: list[str]) -> dict[str, Arm]:
    """Every row by its name, those first whose times others need."""
    arms = (
        *FROZEN[:3],
        PATTERNS[-1],
        *FULL,
        *FROZEN[3:],
        *PATTERNS[:-1],
        *CUTS,
        *PEERS,
        *HEADS,
        *TIMES,
        *planned(budgets),
    )
    return {arm.name: arm for arm in arms}

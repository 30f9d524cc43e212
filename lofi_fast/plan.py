"""What will fit? The ladder against a budget, by arithmetic alone: `python -m lofi_fast.plan`. Needs no GPU, no data.

Bytes of tensors come from the ledger (memory/step_bytes.py), which is exact; what a card holds beside them is assumed
(memory/cards.py), and so is what the allocator adds (`plans.PRIOR`). A training run measures both.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

from lofi_fast import settings as spelled
from lofi_fast.budget import gigabytes
from lofi_fast.command import CallableModule, given, run
from lofi_fast.config import Config
from lofi_fast.errors import InputError
from lofi_fast.fidelity import CYCLE, PAPER_CUT, Fidelity, Pattern, coinciding, ladder
from lofi_fast.memory.cards import Profile, profile_for, profile_named
from lofi_fast.memory.plans import (
    PRIOR,
    Device,
    Plan,
    candidates,
    chunks,
    first_fitting,
    refusal,
    relative_cost,
    remedies,
    worthwhile,
)
from lofi_fast.memory.step_bytes import Setting, step_bytes
from lofi_fast.precision import BF16_CAPABILITY
from lofi_fast.presets import FILE, configured, shown_defaults

CPU_BASE = 400_000_000  # resident set of Python with torch and DALI before a step; assumed, as for a card
NUM_CLASSES = 200  # ActivityNet's and HACS's
DESCRIPTION = (
    "What will fit? The ladder of fidelities against a memory budget, by arithmetic alone. Takes the flags of "
    "lofi-fast train too."
)
KEPT_FREE = 0.02  # of the budget: the governor's smallest margin


@dataclass(frozen=True)
class Forecast:
    """Predicted peaks, in bytes as the driver shows them, of a run that was not made."""

    config: Config
    setting: Setting
    kind: Device
    device: str  # in words
    assumed: int  # what the process holds beside tensors
    budget: int

    @staticmethod
    def of(config: Config, card: Profile | None, classes: int) -> Forecast:
        """`card` None: a CPU. Raises InputError for a budget that is no amount."""
        if config.budget.amount is None and config.budget.share is None:
            raise InputError(f'--mem-budget "{config.budget.text}": give an amount like 11GB, or a share of a --card')
        setting = Setting.of(config, classes, 4 if card is None else 2)
        if setting is None:
            raise InputError(
                f"--encoder {config.encoder.name}: its memory is not known before it has run: start lofi_fast.train, "
                "which plans by running steps"
            )
        if card is None:
            if config.budget.amount is None:
                raise InputError(f'--mem-budget "{config.budget.text}": give an amount like 8GB for a CPU')
            return Forecast(config, setting, "cpu", "a CPU, float32", CPU_BASE, config.budget.amount)
        amount = config.budget.amount or round((config.budget.share or 0) * card.usable)
        precision = "bfloat16" if card.capability >= BF16_CAPABILITY else "float16"
        return Forecast(config, setting, "cuda", f"{card}, {precision}", card.outside_torch, min(amount, card.usable))

    @property
    def room(self) -> int:
        return int((1 - KEPT_FREE) * self.budget)

    def peak(self, plan: Plan) -> int:
        parted = plan.micro_batch < self.config.joint.batch
        step = step_bytes(
            self.setting, plan.fidelity, plan.micro_batch,
            recompute=plan.recompute, chunk=plan.chunk, accumulates=parted,
        )  # fmt: skip
        return self.assumed + step.between + PRIOR.likely.added(step.added)

    def fastest(self, rung: Fidelity, size: int, recompute: bool) -> Plan:
        """The plan with the largest chunk that the device gains from."""
        return Plan(rung, size, recompute, chunks(rung, size, self.kind)[0])

    def fits(self, plan: Plan) -> bool:
        """With its own chunk, or with a smaller one."""
        smaller = chunks(plan.fidelity, plan.micro_batch, self.kind)
        plans = (replace(plan, chunk=chunk) for chunk in smaller)
        return first_fitting(worthwhile(plans, self.peak), self.peak, self.room) is not None

    def patterns(self) -> tuple[Pattern, ...]:
        return CYCLE if self.config.pattern is Pattern.CYCLIC else (self.config.pattern,)

    def rungs(self, pattern: Pattern) -> tuple[Fidelity, ...]:
        return ladder(pattern, self.config.full, self.config.min_cut, self.config.max_cut)

    def chosen(self, pattern: Pattern) -> Plan | None:
        c = self.config
        plans = candidates(self.rungs(pattern), c.joint.batch, c.micro_batch, c.recompute, self.kind)
        return first_fitting(worthwhile(plans, self.peak), self.peak, self.room)

    def refusal(self, pattern: Pattern) -> str:
        c = self.config
        levers = (self.rungs(pattern), c.joint.batch, c.micro_batch, c.recompute, self.kind)
        return refusal(candidates(*levers), self.peak, self.budget, self.room, self.budget, remedies(*levers))

    def levers(self) -> tuple[tuple[int, bool], ...]:
        """(videos at once, recompute), the columns of the table."""
        sizes = dict.fromkeys((self.config.joint.batch, 1))
        return tuple((size, recompute) for size in sizes for recompute in (False, True))

    def rows(self, pattern: Pattern) -> list[dict[str, Any]]:
        """One for each rung, highest first."""
        full = self.config.full
        return [
            {
                "pattern": pattern.value,
                "num_snippets": rung.num_snippets,
                "side": rung.side,
                "cut": round(full.omega / rung.omega, 2),
                "relative_cost": round(relative_cost(Plan(rung, self.config.joint.batch), full), 3),
                "peaks": [
                    {"micro_batch": size, "recompute": again, "chunk": plan.chunk, "peak": self.peak(plan)}
                    for size, again in self.levers()
                    for plan in (self.fastest(rung, size, again),)
                ],
            }
            for rung in self.rungs(pattern)
        ]

    def to_json(self) -> dict[str, Any]:
        chosen = {pattern: self.chosen(pattern) for pattern in self.patterns()}
        return {
            "device": self.device,
            "budget": self.budget,
            "room": self.room,
            "kept_maps": self.config.kept_maps,
            "assumed": {
                "beside_tensors": self.assumed,
                "allocator_scale": PRIOR.likely.scale,
                "allocator_extra": PRIOR.likely.extra,
            },
            "ladders": {pattern.value: self.rows(pattern) for pattern in self.patterns()},
            "chosen": {pattern.value: None if plan is None else plan.to_json() for pattern, plan in chosen.items()},
        }

    def text(self, everything: bool) -> str:
        config = self.config
        lines = [
            f"{config.encoder.name} of width {config.encoder.width}, full fidelity {config.full}, "
            f"{config.joint.batch} videos a step"
            f"{', activations kept in 8 bits' if config.kept_maps == '8bit' else ''}; {self.device}",
            f"budget {gigabytes(self.budget)}, of which {gigabytes(self.room)} can be planned with",
            f"computed: the bytes of every tensor. assumed: {gigabytes(self.assumed)} beside them, and "
            f"{PRIOR.likely.scale:g} times + {gigabytes(round(PRIOR.likely.extra))} for allocator and workspaces. "
            "A training run measures what is assumed here.",
        ]
        for pattern in self.patterns():
            lines += ["", *self._table(pattern, everything)]
        chosen = {pattern.value: self.chosen(pattern) for pattern in self.patterns()}
        if note := coinciding({pattern: plan.fidelity for pattern, plan in chosen.items() if plan is not None}):
            lines += ["", f"note: {note}"]
        return "\n".join(lines)

    def _table(self, pattern: Pattern, everything: bool) -> list[str]:
        plan, rows = self.chosen(pattern), self.rows(pattern)
        rungs = self.rungs(pattern)
        at = len(rows) - 1 if plan is None else rungs.index(plan.fidelity)
        cuts = [abs(row["cut"] - PAPER_CUT) for row in rows]
        shown = {0, at - 1, at, at + 1, cuts.index(min(cuts)), len(rows) - 1}
        heads = [f"{size} at once{', recompute' if again else ''}" for size, again in self.levers()]
        lines = [f"{pattern}: predicted peak in GB (* does not fit, ~ with fewer snippets to a graph)"]
        lines.append(f"  {'rung':<24}{'cut':>6}{'cost':>7}" + "".join(f"{head:>{len(head) + 3}}" for head in heads))
        for index, row in enumerate(rows):
            if not everything and index not in shown:
                continue
            rung = rungs[index]
            cells = ""
            for head, cell in zip(heads, row["peaks"], strict=True):
                fastest = self.fastest(rung, cell["micro_batch"], cell["recompute"])
                mark = " " if cell["peak"] <= self.room else "~" if self.fits(fastest) else "*"
                cells += f"{cell['peak'] / 1e9:>{len(head) + 2}.2f}{mark}"
            taken = plan is not None and plan.fidelity == rung
            note = ""
            if plan and taken:
                levers = f"{plan.micro_batch} at once{', recompute' * plan.recompute}, {plan.chunk} snippets to a graph"
                note = f"   <- {levers}: {gigabytes(self.peak(plan))}"
            lines.append(f"  {rung!s:<24}{row['cut']:>6.2f}{row['relative_cost']:>7.3f}{cells}{note}")
        if plan is None:
            lines.append(f"  {self.refusal(pattern)}")
        return lines


@dataclass(frozen=True)
class PlanFlags:
    """What the command line may say: what to plan for, what to print, and every setting of a run."""

    run: Annotated[Config, spelled.Section("run", flat=True)]
    card: Annotated[
        str | None,
        spelled.Setting(
            'a card to plan for, like "2080ti"', "NAME", group="plan", unset="the class of card that the budget means"
        ),
    ] = None
    classes: Annotated[int, spelled.Setting("classes in the data", group="plan")] = NUM_CLASSES
    all: Annotated[bool, spelled.Setting("every rung of the ladder", group="plan")] = False
    json: Annotated[bool, spelled.Setting("for programs", group="plan")] = False
    config: Annotated[Path | None, FILE] = None


def plan(
    *, card: str | None = None, classes: int = NUM_CLASSES, config: str | Path | Config | None = None, **settings: Any
) -> Forecast:
    """What will fit, and at what fidelity, as the command says it. Needs no GPU, no data and no torch.

        lofi_fast.plan(mem_budget="11GB", encoder="tsm_r50").text(everything=False)

    `card`: one by name, like "2080ti"; None: the class of card that the budget means. `classes`: in the data. `config`
    and `settings` as `lofi_fast.train` takes them. Raises InputError for what cannot be.
    """
    (classes,) = spelled.read(PlanFlags, {"classes": classes}).values()
    asked = spelled.read(Config, settings)
    whole = isinstance(config, Config)
    made = configured(
        asked, base=config if isinstance(config, Config) else None, with_data=False, cuda=lambda: True,
        file=None if whole or config is None else Path(str(config)),
    )  # fmt: skip
    return _forecast(made, card, classes)


def _forecast(config: Config, card: str | None, classes: int) -> Forecast:
    if config.device == "cpu":
        return Forecast.of(config, None, classes)
    if config.budget.share is not None and card is None:
        raise InputError(f"--mem-budget {config.budget.text}: a share of which card? Name it with --card")
    profile = profile_named(card) if card else profile_for(config.budget.amount or 0)
    return Forecast.of(config, profile, classes)


def main(argv: Sequence[str] | None = None) -> int:
    """Print the forecast; 1 when some pattern has no plan that fits, 2 for what the user can mend."""
    return run(lambda: _command(argv))


def _command(argv: Sequence[str] | None) -> int:
    words = given(PlanFlags, argv, prog="lofi-fast plan", description=DESCRIPTION, shown=_shown)
    names = ("card", "classes", "all", "json", "config")
    own = {"classes": NUM_CLASSES} | spelled.read(PlanFlags, {name: words.pop(name) for name in names if name in words})
    config = configured(words, file=own.get("config"), cuda=lambda: True, with_data=False)
    forecast = _forecast(config, own.get("card"), own["classes"])
    print(json.dumps(forecast.to_json(), indent=1) if own.get("json") else forecast.text(own.get("all", False)))
    return int(any(forecast.chosen(pattern) is None for pattern in forecast.patterns()))


def _shown(words: Mapping[str, Any]) -> PlanFlags:
    return PlanFlags(shown_defaults(words, "activitynet"))


sys.modules[__name__].__class__ = CallableModule

if __name__ == "__main__":
    sys.exit(main())

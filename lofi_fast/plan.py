"""What will fit, and how long will it take? Fidelity against memory and time, by arithmetic alone: `lofi-fast plan`.
Needs no GPU, no data.

Bytes of tensors come from the ledger (memory/step_bytes.py), which is exact; what a card holds beside them is assumed
(memory/cards.py), and so is what the allocator adds (`plans.PRIOR`). Seconds are estimated (memory/estimates.py). A
training run measures all three.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, get_args

from lofi_fast import settings as spelled
from lofi_fast.budget import check_budget, duration, gigabytes
from lofi_fast.command import CallableModule, given, run
from lofi_fast.config import Config, EncoderName
from lofi_fast.data.samples import EpochSize, counted, published
from lofi_fast.errors import InputError
from lofi_fast.fidelity import CYCLE, PAPER_CUT, Fidelity, Pattern, coinciding, offered
from lofi_fast.files import write_bytes
from lofi_fast.memory import estimates
from lofi_fast.memory.cards import Profile, profile_for, profile_named
from lofi_fast.memory.frontier import CPU_BASE, KEPT_FREE, Levers, Way, chosen, fastest, frontier, ways
from lofi_fast.memory.plans import PRIOR, Plan, candidates, refusal, remedies
from lofi_fast.memory.step_bytes import Setting
from lofi_fast.precision import NAMES, resolved
from lofi_fast.presets import FILE, configured, shown_defaults

NUM_CLASSES = 200  # ActivityNet's and HACS's
DESCRIPTION = (
    "What will fit, and how long will it take? Fidelity against memory and time, by arithmetic alone. Takes the flags "
    "of lofi-fast train too; --mem-budget may name several budgets, like 4GB,8GB,11GB."
)
SHOWN_CUTS = (1.0, 2.0, PAPER_CUT, 8.0, 16.0)  # whose nearest rungs a short table has
BUDGETS = tuple(round(1e9 * 80 ** (step / 160)) for step in range(161))  # of the picture: 1 to 80 GB
SLOWER = 1.05  # times the fastest, from which on a way to run a rung counts as slower
NO_SPEED = "how fast a CPU is is not assumed: a training measures it"


@dataclass(frozen=True)
class Forecast:
    """What one budget buys in a run that was not made. Bytes are as the driver shows them."""

    config: Config
    levers: Levers
    device: str  # in words
    assumed: int  # bytes that the process holds beside tensors
    budget: int  # asked for
    usable: int  # that the device holds
    epoch: EpochSize
    seconds: float | None  # of a step of cost 1, estimated
    timed: str  # of which card these are, or why there are none

    @staticmethod
    def of(config: Config, card: Profile | None, classes: int, epoch: EpochSize, named: bool) -> Forecast:
        """`card` None: a CPU. `named`: the user did, and the times are of that card; a budget alone means the slowest
        card that holds as much. Raises InputError for a budget that is no amount.
        """
        check_budget(config.budget)
        if config.budget.amount is None and config.budget.share is None:
            raise InputError(f'--mem-budget "{config.budget.text}": give an amount like 11GB, or a share of a --card')
        name, _ = resolved(config.precision, None if card is None else card.capability)
        precision = NAMES[name]
        setting = Setting.of(config, classes, 4 if name == "fp32" else 2)
        if setting is None:
            raise InputError(
                f"--encoder {config.encoder.name} --head {config.head.name}: their memory is not known before they "
                "have run: start lofi_fast.train, which plans by running steps"
            )
        full, batch = config.full, config.joint.batch
        if card is None:
            if config.budget.amount is None:
                raise InputError(f'--mem-budget "{config.budget.text}": give an amount like 8GB for a CPU')
            budget = config.budget.amount
            levers = Levers(setting, full, batch, "cpu", config.micro_batch, config.recompute)
            return Forecast(config, levers, f"a CPU, {precision}", CPU_BASE, budget, budget, epoch, None, NO_SPEED)
        clock = card if named else estimates.slowest(setting, full, batch, card.card_class)
        levers = Levers(
            setting, full, batch, "cuda", config.micro_batch, config.recompute,
            estimates.launch_bound(setting, full, batch, clock),
        )  # fmt: skip
        budget = config.budget.amount or round((config.budget.share or 0) * card.usable)
        if name == "fp32":
            return Forecast(
                config, levers, f"{card}, {precision}", card.outside_torch, budget, card.usable, epoch, None,
                "how fast a card is in fp32 is not assumed: a training measures it",
            )  # fmt: skip
        seconds = estimates.full_step_seconds(setting, full, batch, clock)
        whose = clock.name if named else f"{clock.name}, the slowest known card with as much memory: --card names yours"
        return Forecast(
            config, levers, f"{card}, {precision}", card.outside_torch, budget, card.usable, epoch,
            seconds, f"estimated for {whose}",
        )  # fmt: skip

    @property
    def limit(self) -> int:
        """The budget, or what the device holds of it."""
        return min(self.budget, self.usable)

    @property
    def room(self) -> int:
        """Of it, what can be planned with."""
        return int((1 - KEPT_FREE) * self.limit)

    @property
    def steps(self) -> int:
        """Of an epoch."""
        return -(-self.epoch.windows // self.config.joint.batch)

    def peak(self, plan: Plan) -> int:
        return self.assumed + self.levers.needs(plan)

    def epoch_seconds(self, way: Way) -> float | None:
        return None if self.seconds is None else self.steps * self.seconds * way.cost

    def patterns(self) -> tuple[Pattern, ...]:
        return CYCLE if self.config.pattern is Pattern.CYCLIC else (self.config.pattern,)

    def rungs(self, pattern: Pattern) -> tuple[Fidelity, ...]:
        return offered(pattern, self.config.full, self.config.min_cut, self.config.max_cut)

    def way(self, pattern: Pattern) -> Way | None:
        """What is chosen for a pattern; None where nothing fits."""
        most = None
        if self.seconds is not None and self.config.epoch_time is not None:
            most = self.config.epoch_time / (self.steps * self.seconds)
        return chosen(self.levers, self.rungs(pattern), self.room - self.assumed, most)

    def chosen(self, pattern: Pattern) -> Plan | None:
        way = self.way(pattern)
        return None if way is None else way.plan

    def refusal(self, pattern: Pattern) -> str:
        c = self.config
        levers = (self.rungs(pattern), c.joint.batch, c.micro_batch, c.recompute, self.levers.device)
        return refusal(candidates(*levers), self.peak, self.limit, self.room, self.limit, remedies(*levers))

    def frontier(self, pattern: Pattern, everything: bool) -> tuple[Way, ...]:
        """Fidelity against time at this budget, highest first: of all rungs, or of those that a short table shows."""
        rungs = self.rungs(pattern)
        shown = rungs if everything else tuple(rungs[index] for index in sorted(self._shown(pattern)))
        return frontier(self.levers, shown, self.room - self.assumed)

    def _shown(self, pattern: Pattern) -> set[int]:
        """The chosen rung and its neighbours, the highest that fits, the ends, and those nearest to some round cuts."""
        rungs, way = self.rungs(pattern), self.way(pattern)
        if way is None:
            return {0}
        at = rungs.index(way.plan.fidelity)
        full = self.config.full.omega
        near = {min(range(len(rungs)), key=lambda i: abs(full / rungs[i].omega - cut)) for cut in SHOWN_CUTS}
        return near | {0, self._highest(pattern), len(rungs) - 1} | ({at - 1, at, at + 1} & set(range(len(rungs))))

    def notes(self) -> list[str]:
        """Sentences on what a reader may not expect."""
        config, found = self.config, []
        if self.limit < self.budget:
            found.append(f"the card holds {gigabytes(self.limit)}, which is what is planned for")
        if config.epoch_time is not None and self.seconds is None:
            found.append(f"--epoch-time lowers nothing here: {self.timed}")
        for pattern in self.patterns():
            way = self.way(pattern)
            if way is None:
                continue
            seconds = self.epoch_seconds(way)
            if config.epoch_time is not None and seconds is not None and seconds > config.epoch_time:
                found.append(
                    f"{pattern}: no rung that fits is as fast as --epoch-time {duration(config.epoch_time)}; the "
                    f"lowest is planned, an epoch of which takes about {duration(seconds)}"
                )
        if config.min_cut > 1 and (way := fastest(self.levers, config.full, self.room - self.assumed)) is not None:
            found.append(
                f"--min-cut {config.min_cut:g} keeps fidelity down: {config.full} would fit too, with "
                f"{gigabytes(self.assumed + way.needs)}; --min-cut 1 trains at it"
            )
        plans = {pattern.value: self.chosen(pattern) for pattern in self.patterns()}
        if same := coinciding({pattern: plan.fidelity for pattern, plan in plans.items() if plan is not None}):
            found.append(same)
        return found

    def traded(self, pattern: Pattern) -> list[str]:
        """What the chosen plan gives up, in sentences: fidelity for memory, time for memory, fidelity for time."""
        way, rungs = self.way(pattern), self.rungs(pattern)
        if way is None:
            return []
        rung, at = way.plan.fidelity, self._highest(pattern)
        found = []
        if at > 0:
            found.append(f"{rungs[0]} needs {gigabytes(self._least(rungs[0]))} at least")
        if rungs[at] != rung and (top := fastest(self.levers, rungs[at], self.room - self.assumed)) is not None:
            found.append(f"{rungs[at]} fits, and takes {duration(self.epoch_seconds(top) or 0)} an epoch")
        quickest = ways(self.levers, rung)[0]
        if way.cost > SLOWER * quickest.cost:
            found.append(
                f"{rung} needs {_levers(way.plan)}: {way.cost / quickest.cost:.1f} times the time of "
                f"{_levers(quickest.plan)}, which takes {gigabytes(self.assumed + quickest.needs)}"
            )
        return found or [f"nothing: the highest rung, and no way to run it is {SLOWER - 1:.0%} faster"]

    def _highest(self, pattern: Pattern) -> int:
        """The index of the highest rung that fits, where one does."""
        rungs, room = self.rungs(pattern), self.room - self.assumed
        return next(i for i, rung in enumerate(rungs) if fastest(self.levers, rung, room) is not None)

    def _least(self, rung: Fidelity) -> int:
        """Bytes of the leanest way to run a rung."""
        return self.assumed + ways(self.levers, rung)[-1].needs

    def to_json(self, everything: bool = False) -> dict[str, Any]:
        """What the command prints for this budget alone."""
        return to_json([self], everything)

    def text(self, everything: bool) -> str:
        return text([self], everything)

    def _row(self, way: Way) -> dict[str, Any]:
        plan, seconds = way.plan, self.epoch_seconds(way)
        return {
            "num_snippets": plan.fidelity.num_snippets,
            "side": plan.fidelity.side,
            "micro_batch": plan.micro_batch,
            "recompute": plan.recompute,
            "chunk": plan.chunk,
            "peak": self.assumed + way.needs,
            "epoch_seconds": None if seconds is None else round(seconds, 3),
        }

    def of_budget(self, everything: bool) -> dict[str, Any]:
        """This budget's part of the JSON."""
        found = {pattern: self.way(pattern) for pattern in self.patterns()}
        return {
            "budget": self.budget,
            "limit": self.limit,
            "room": self.room,
            "device": self.device,
            "assumed": {
                "beside_tensors": self.assumed,
                "allocator_scale": PRIOR.likely.scale,
                "allocator_extra": PRIOR.likely.extra,
            },
            "times": self.timed,
            "chosen": {pattern.value: None if way is None else self._row(way) for pattern, way in found.items()},
            "reasons": {pattern.value: self.refusal(pattern) for pattern, way in found.items() if way is None},
            "traded": {pattern.value: self.traded(pattern) for pattern, way in found.items() if way is not None},
            "frontier": {
                pattern.value: [self._row(way) for way in self.frontier(pattern, everything)] for pattern in found
            },
            "notes": self.notes(),
        }

    def lines(self, everything: bool) -> list[str]:
        """This budget's part of the text."""
        beside = f"{gigabytes(self.room)} can be planned with, {gigabytes(self.assumed)} of them beside tensors"
        found = [f"budget {gigabytes(self.budget)}: {beside}; {self.device}", f"times: {self.timed}"]
        for pattern in self.patterns():
            found += ["", *self._table(pattern, everything)]
        return [*found, *(f"note: {note}" for note in self.notes())]

    def _table(self, pattern: Pattern, everything: bool) -> list[str]:
        rungs, taken = self.rungs(pattern), self.way(pattern)
        if taken is None:
            return [f"{pattern}: {self.refusal(pattern)}"]
        full, at = self.config.full.omega, self._highest(pattern)
        found = [f"{pattern}", f"  {'rung':<24}{'cut':>6}{'GB':>8}{'cost':>7}{'an epoch':>13}"]
        for rung in dict.fromkeys((rungs[0], rungs[at - 1]) if at else ()):
            least = f"{self._least(rung) / 1e9:>8.2f}"
            found.append(f"  {rung!s:<24}{full / rung.omega:>6.2f}{least}{'':>23}does not fit, by no lever")
        for way in self.frontier(pattern, everything):
            rung, seconds = way.plan.fidelity, self.epoch_seconds(way)
            time = "" if seconds is None else duration(seconds)
            mark = "<-" if way == taken else "  "
            found.append(
                f"  {rung!s:<24}{full / rung.omega:>6.2f}{(self.assumed + way.needs) / 1e9:>8.2f}{way.cost:>7.3f}"
                f"{time:>13}   {mark} {_levers(way.plan)}"
            )
        return [*found, f"  traded: {'; '.join(self.traded(pattern))}"]


def _levers(plan: Plan) -> str:
    return f"{plan.micro_batch} at once{', recompute' * plan.recompute}, {plan.chunk} snippets to a graph"


def to_json(forecasts: Sequence[Forecast], everything: bool) -> dict[str, Any]:
    """What several budgets buy: `budgets` holds a mapping of each, with a plan of each pattern under `chosen`."""
    first = forecasts[0]
    config = first.config
    return {
        "encoder": config.encoder.name,
        "full": [config.full.num_snippets, config.full.side],
        "batch": config.joint.batch,
        "kept_maps": config.kept_maps,
        "epoch_time": config.epoch_time,
        "samples": first.epoch.windows,
        "samples_of": first.epoch.source,
        "steps": first.steps,
        "budgets": [forecast.of_budget(everything) for forecast in forecasts],
    }


def text(forecasts: Sequence[Forecast], everything: bool) -> str:
    first = forecasts[0]
    config = first.config
    lines = [
        f"{config.encoder.name} of width {config.encoder.width}, full fidelity {config.full}, "
        f"{config.joint.batch} videos a step"
        f"{', activations kept in 8 bits' if config.kept_maps == '8bit' else ''}; "
        f"an epoch: {first.steps:,} steps, {first.epoch.windows:,} windows ({first.epoch.source})",
        f"computed: the bytes of every tensor. assumed: what is beside tensors, and {PRIOR.likely.scale:g} times + "
        f"{gigabytes(round(PRIOR.likely.extra))} for allocator and workspaces. estimated: times, decoding left out. A "
        "training run measures what is assumed and estimated here.",
    ]
    for forecast in forecasts:
        lines += ["", *forecast.lines(everything)]
    return "\n".join(lines)


@dataclass(frozen=True)
class PlanFlags:
    """What the command line may say: what to plan for, what to print, and every setting of a run."""

    run: Annotated[Config, spelled.Section("run", flat=True)]
    card: Annotated[
        str | None,
        spelled.Setting(
            'a card to plan for, like "2080ti", or a class of cards, like 16GB: that with the least usable memory',
            "NAME", group="plan", unset="the class of card that the budget means",
        ),
    ] = None  # fmt: skip
    classes: Annotated[int, spelled.Setting("classes in the data", group="plan")] = NUM_CLASSES
    samples: Annotated[
        int | None,
        spelled.Setting(
            "training windows of an epoch", "N", group="plan",
            unset="counted in --annotations, or as many as the data set of the preset has",
        ),
    ] = None  # fmt: skip
    all: Annotated[bool, spelled.Setting("every rung of the ladder", group="plan")] = False
    json: Annotated[bool, spelled.Setting("for programs", group="plan")] = False
    picture: Annotated[
        Path | None,
        spelled.Setting(
            "draw what 1 to 80 GB buy, for every encoder, into an SVG file", "FILE", group="plan", unset="none"
        ),
    ] = None
    config: Annotated[Path | None, FILE] = None


def plan(
    *,
    card: str | None = None,
    classes: int = NUM_CLASSES,
    samples: int | None = None,
    config: str | Path | Config | None = None,
    **settings: Any,
) -> Forecast:
    """What will fit, at what fidelity, and in what time, as the command says it. Needs no GPU, no data and no torch.

        lofi_fast.plan(mem_budget="11GB", encoder="tsm_r50").text(everything=False)

    One budget a call; `to_json()["budgets"]` has this one's plans. `card`: one by name, like "2080ti", or a class, like
    "16GB"; None: the class of card that the budget means. `classes`: in the data. `samples`: training windows of an
    epoch; None: of the labels `annotations`, or else of the data set of the preset. `config` and `settings` as
    `lofi_fast.train` takes them. Raises InputError for what cannot be.
    """
    own = spelled.read(PlanFlags, {"classes": classes, "samples": samples})
    asked = spelled.read(Config, settings)
    whole = isinstance(config, Config)
    made = configured(
        asked, base=config if isinstance(config, Config) else None, with_data=False, cuda=lambda: True,
        file=None if whole or config is None else Path(str(config)),
    )  # fmt: skip
    return _forecast(made, card, own["classes"], epoch_size(made, own["samples"]))


def epoch_size(config: Config, samples: int | None) -> EpochSize:
    """As given, or counted in the labels, or published. Raises InputError for labels that cannot be read."""
    if samples is not None:
        return EpochSize(samples, "as given")
    if config.data.annotations is not None:
        return counted(Path(config.data.annotations), config.data)
    return published(config.preset, config.data)


def _forecast(config: Config, card: str | None, classes: int, epoch: EpochSize) -> Forecast:
    if config.device == "cpu":
        return Forecast.of(config, None, classes, epoch, named=False)
    if config.budget.share is not None and card is None:
        raise InputError(f"--mem-budget {config.budget.text}: a share of which card? Name it with --card")
    profile = profile_named(card) if card else profile_for(config.budget.amount or 0)
    return Forecast.of(config, profile, classes, epoch, named=card is not None)


def drawn(forecasts: Sequence[Forecast], card: str | None, classes: int) -> str:
    """An SVG: fidelity and hours of an epoch against 1 to 80 GB, for every encoder, on the card that the largest of the
    budgets is planned for; of a cyclic run the spatio-temporal pattern.
    """
    from lofi_fast.report.frontier import Curve, Point, picture  # imports matplotlib

    widest = max(forecasts, key=lambda forecast: forecast.budget)
    config = widest.config
    pattern = Pattern.SPATIO_TEMPORAL if config.pattern is Pattern.CYCLIC else config.pattern
    curves = []
    for name in get_args(EncoderName):
        other = _forecast(replace(config, encoder=replace(config.encoder, name=name)), card, classes, widest.epoch)
        points = []
        for amount in BUDGETS:
            at = replace(other, budget=amount, usable=amount)
            if (way := at.way(pattern)) is not None:
                share = way.plan.omega / config.full.omega
                points.append(Point(amount / 1e9, share, at.epoch_seconds(way), way.plan.recompute))
        curves.append(Curve(name, tuple(points)))
    limit = "" if config.epoch_time is None else f", at most {duration(config.epoch_time)} an epoch"
    return picture(
        curves,
        title=f"{config.full}, {config.joint.batch} videos a step, {pattern}{limit}\n{widest.device}",
        times=widest.timed,
        budgets=[forecast.budget / 1e9 for forecast in forecasts],
        holds=None if widest.levers.device == "cpu" else widest.usable / 1e9,
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Print the forecast; 1 when some pattern has no plan that fits some budget, 2 for what the user can mend."""
    return run(lambda: _command(argv))


def _command(argv: Sequence[str] | None) -> int:
    words = given(PlanFlags, argv, prog="lofi-fast plan", description=DESCRIPTION, shown=_shown)
    names = ("card", "classes", "samples", "all", "json", "picture", "config")
    own = {"classes": NUM_CLASSES} | spelled.read(PlanFlags, {name: words.pop(name) for name in names if name in words})
    picture: Path | None = own.get("picture")
    if picture is not None and picture.suffix.lower() != ".svg":
        raise InputError(f"--picture {picture}: it is written as SVG; name it {picture.with_suffix('.svg')}")
    budgets = [{"budget": part.strip()} for part in words.pop("budget").split(",")] if "budget" in words else [{}]
    configs = [
        configured(words | budget, file=own.get("config"), cuda=lambda: True, with_data=False) for budget in budgets
    ]
    epoch = epoch_size(configs[0], own.get("samples"))
    forecasts = [_forecast(config, own.get("card"), own["classes"], epoch) for config in configs]
    if picture is not None:
        write_bytes(picture, drawn(forecasts, own.get("card"), own["classes"]).encode())
    everything = own.get("all", False)
    print(json.dumps(to_json(forecasts, everything), indent=1) if own.get("json") else text(forecasts, everything))
    return int(any(forecast.way(pattern) is None for forecast in forecasts for pattern in forecast.patterns()))


def _shown(words: Mapping[str, Any]) -> PlanFlags:
    return PlanFlags(shown_defaults(words, "activitynet"))


sys.modules[__name__].__class__ = CallableModule

if __name__ == "__main__":
    sys.exit(main())

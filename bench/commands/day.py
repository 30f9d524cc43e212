"""A day on a shared card, in virtual time: the governor beside other trainers' ways and beside who knows the future.

Real ledgers of a real setting, on cards that need not be there, beside other processes that hold memory as a trace
says: made up in six manners, or recorded (`--trace`). bench/tools/shared_card.py says what a step does there and what
is counted, bench/peers/searches.py what the other trainers do.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from io import StringIO
from pathlib import Path

from bench.peers.searches import PEERS
from bench.tools.rows import RESULTS, Row, append_row, environment, read_rows
from bench.tools.shared_card import DEVICE, STEPS_AN_EPOCH, Day, Task, clairvoyant, ours, theirs
from bench.tools.table import Picture, Section, Table, screen, when
from bench.tools.traces import MANNERS, Trace, made_up, recorded
from lofi_fast.config import EncoderName, Recompute
from lofi_fast.errors import InputError
from lofi_fast.fidelity import CYCLE, ladder
from lofi_fast.memory.cards import profile_named
from lofi_fast.memory.plans import Plan, candidates
from lofi_fast.memory.step_bytes import Setting, step_bytes
from lofi_fast.presets import activitynet

USAGE = "python -m bench day [options]"
OURS, BEST = "lofi_fast", "clairvoyant"
EPOCH_HOURS = 3.0  # of a training that has a time budget too, which is taken beside one manner of others
TIMED, TIMED_BESIDE = f"lofi_fast, --epoch-time {EPOCH_HOURS:g}h", "steady"
STEPS = 6_000  # a day, more or less
LEAST, MOST = (
    1.15,
    1.1,
)  # times what the smallest plan's tensors need, and the budget: between them is what others leave
DRAWN_FROM = ("day",)
DRAWN = ("spikes", "jobs", "trainer")  # traces in the picture, of the first setting


@dataclass(frozen=True)
class Case:
    """What is trained: ActivityNet's setting in half precision, on a card of a class, with a budget of its memory."""

    encoder: EncoderName
    card: str
    budget: int
    recompute: Recompute
    flops: float  # of one frame of 224 px, forward

    def __str__(self) -> str:
        levers = "all levers" if self.recompute == "auto" else "no recompute"
        return (
            f"{self.encoder}, {self.budget / 1e9:.0f} GB of a {profile_named(self.card).card_class} GB card, {levers}"
        )


CASES = {
    "r18": Case("tsm_r18", "2080ti", 10 * 10**9, "never", 3.6e9),
    "r50": Case("tsm_r50", "3090", 22 * 10**9, "never", 8.2e9),
    "levers": Case("tsm_r50", "2080ti", 10 * 10**9, "auto", 8.2e9),
}


def main(argv: Sequence[str]) -> int:
    """Simulate, append rows, print tables; 1 when the governor went over its budget or over what others left."""
    args = _parser().parse_args(argv)
    if not 1 <= args.steps <= 100_000:
        raise InputError("--steps must be between 1 and 100,000")
    names = args.cases.split(",")
    if unknown := [name for name in names if name not in CASES]:
        raise InputError(f"--cases: no case is called {unknown[0]}; there are: {', '.join(CASES)}")
    manners = args.manners.split(",")
    if unknown := [name for name in manners if name not in MANNERS]:
        raise InputError(f"--manners: nobody behaves like {unknown[0]}; there are: {', '.join(MANNERS)}")
    recording = None if args.trace is None else recorded(args.trace)
    start = environment() | {"quick": args.steps < STEPS}
    rows: list[Row] = []
    for name in names:
        made = task(CASES[name])
        traces = {manner: trace(made, manner, args.seed) for manner in manners}
        if recording is not None:
            traces = {f"recorded: {args.trace.name}": recording}
        for manner, held in traces.items():
            timed = (TIMED,) if (name, manner) == (names[0], TIMED_BESIDE) else ()
            for way in (OURS, *timed, BEST, *PEERS):
                day = live(made, way, held, args.steps, args.seed, series=name == names[0] and manner in DRAWN)
                row = {"bench": "day", "case": str(CASES[name]), "trace": manner, "way": way, "asked": args.steps}
                row |= {"seed": args.seed, "budget": made.budget} | figures(day) | start
                append_row(args.results, row)
                rows.append(row)
                print(line(row), flush=True)
    print(f"\n{screen(table(rows))}\n{len(rows)} rows appended to {args.results}")
    return int(any(row["over"] for row in rows if row["way"] in (OURS, TIMED)))


def task(case: Case) -> Task:
    config = activitynet()
    config = replace(config, encoder=replace(config.encoder, name=case.encoder))
    setting, batch = Setting.of(config, 200, 2), config.joint.batch
    assert setting is not None

    def ledger(plan: Plan) -> int:
        return step_bytes(
            setting, plan.fidelity, plan.micro_batch, recompute=plan.recompute, chunk=plan.chunk,
            accumulates=plan.micro_batch < batch,
        ).added  # fmt: skip

    rungs = {pattern: ladder(pattern, config.full) for pattern in CYCLE}
    plans = {p: candidates(rungs[p], batch, recompute=case.recompute, device=DEVICE) for p in CYCLE}
    between = step_bytes(setting, config.full, 1).between
    return Task(profile_named(case.card), case.budget, config.full, batch, plans, ledger, between, case.flops)


def trace(of: Task, manner: str, seed: int) -> Trace:
    """Others leave between what the smallest plan needs and a little more than the budget."""
    smallest = max(min(map(of.ledger, plans)) for plans in of.plans.values())
    return made_up(manner, seed, of.card.usable, LEAST * (of.base + smallest), MOST * of.budget)


def live(of: Task, way: str, held: Trace, steps: int, seed: int, series: bool = False) -> Day:
    """A day in one way."""
    if way in PEERS:
        return theirs(of, PEERS[way], held, steps, seed)
    if way == TIMED:
        return ours(of, held, steps, seed, epoch_seconds=3600 * EPOCH_HOURS)
    return partial(ours, series=series)(of, held, steps, seed) if way == OURS else clairvoyant(of, held, steps, seed)


def figures(day: Day) -> Row:
    """What a row keeps. `share`: of the clairvoyant's fidelity; `fidelity`: of full fidelity, mean over the steps."""
    found = asdict(day)
    obtained, best = found.pop("obtained"), found.pop("best")
    return found | {
        "seconds": round(day.seconds, 1),
        "waited": round(day.waited, 1),
        "share": round(obtained / best, 4) if best else 0.0,
        "fidelity": round(obtained / max(day.steps, 1), 4),
        "steps_an_hour": round(3600 * day.steps / day.seconds, 1) if day.seconds else 0.0,
    }


def line(row: Row) -> str:
    return (
        f"{row['case']}, {row['trace']}, {row['way']}: {100 * row['share']:.1f}% of the clairvoyant's fidelity, "
        f"{row['steps']} steps in {row['seconds'] / 3600:.1f} h, {row['over']} over, {row['turned_away']} turned away, "
        f"{row['ran_out']} ran out, {row['moves']} moves, {row['restarts'] + row['refused']} restarts"
    )


def table(rows: Sequence[Row]) -> list[Section]:
    """The share by trace, and what else happened over all traces of a setting."""
    rows = _newest(rows)
    if not rows:
        return []
    in_time = [row for row in rows if row["way"] == TIMED]
    beside = [(row["case"], row["trace"]) for row in in_time]
    without = [row for row in rows if row["way"] == OURS and (row["case"], row["trace"]) in beside]
    rows = [row for row in rows if row["way"] != TIMED]
    ways = list(dict.fromkeys(row["way"] for row in rows))
    found = {(row["case"], row["trace"], row["way"]): row for row in rows}
    shares, rest = [], []
    for case, manner in dict.fromkeys((row["case"], row["trace"]) for row in rows):
        shares.append((case, manner, *(_share(found.get((case, manner, way))) for way in ways if way != BEST)))
    for case in dict.fromkeys(row["case"] for row in rows):
        for way in ways:
            mine = [row for row in rows if (row["case"], row["way"]) == (case, way)]
            if not mine:
                continue
            steps = sum(row["steps"] for row in mine)
            sums = [f"{sum(row[key] for row in mine):,}" for key in ("over", "turned_away", "ran_out")]
            again = sum(row["restarts"] + row["refused"] for row in mine)
            rest.append((
                case, way, f"{steps:,} of {sum(row['asked'] for row in mine):,}",
                f"{100 * sum(row['fidelity'] * row['steps'] for row in mine) / max(steps, 1):.0f}%", *sums,
                f"{again:,}", f"{sum(row['waited'] for row in mine) / 3600:.1f}",
                f"{sum(row['moves'] for row in mine):,}",
                f"{3600 * steps / max(sum(row['seconds'] for row in mine), 1):,.0f}",
            ))  # fmt: skip
    header = (
        "setting", "way", "steps", "fidelity, mean", "over", "turned away", "ran out of memory", "restarts",
        "waited for memory, h", "moves", "steps an hour",
    )  # fmt: skip
    return [
        Picture("The governor beside three manners of others; curves are means over 1/300 of a day", "results/day.svg"),
        Table(
            f"Fidelity, of the clairvoyant's; in virtual time; {when(rows)}:",
            ("setting", "others", *(way for way in ways if way != BEST)), shares,
        ),
        Table("What else happened, over all of these:", header, rest),
        Table(
            f"What a time budget changes, where memory would hold more (epochs of {STEPS_AN_EPOCH} steps):",
            ("setting", "others", "way", "fidelity, mean", "hours an epoch", "over", "moves"),
            [
                (
                    row["case"], row["trace"], row["way"], f"{100 * row['fidelity']:.0f}%",
                    f"{STEPS_AN_EPOCH / row['steps_an_hour']:.1f}", f"{row['over']}", f"{row['moves']:,}",
                )
                for row in [*without, *in_time]
            ],
        ),
    ]  # fmt: skip


def _share(row: Row | None) -> str:
    return "" if row is None else f"{100 * row['share']:.1f}%"


def figure(results: Path) -> str | None:
    """An SVG of the governor's days that have a series: memory above, fidelity below; None without rows."""
    rows = [row for row in _newest(read_rows(results / "day.jsonl")) if row["series"]]
    if not rows:
        return None
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    with matplotlib.rc_context({"svg.hashsalt": "bench", "svg.fonttype": "none", "font.size": 9}):
        drawing = Figure(figsize=(9, 4.6), layout="constrained")
        axes = drawing.subplots(2, len(rows), sharey="row", squeeze=False, height_ratios=(3, 2))
        for (above, below), row in zip(axes.T, rows, strict=True):
            hours, left, peak, share, best = zip(*row["series"], strict=True)
            above.fill_between(hours, left, 1.15 * row["budget"] / 1e9, color="0.85", label="what others hold")
            above.axhline(row["budget"] / 1e9, color="C3", linestyle="--", linewidth=1, label="budget")
            above.plot(hours, peak, color="C0", linewidth=1, label="peak of a step")
            above.set_ylim(0, 1.15 * row["budget"] / 1e9)
            above.set_title(row["trace"])
            below.plot(hours, [100 * value for value in best], color="0.6", linewidth=1, label="clairvoyant")
            below.plot(hours, [100 * value for value in share], color="C0", linewidth=1, label="lofi_fast")
            below.set_ylim(0, 105)
            below.set_xlabel("hours")
            for ax in (above, below):
                ax.grid(alpha=0.3)
        axes[0, 0].set_ylabel("GB")
        axes[1, 0].set_ylabel("Omega, % of full")
        labels = [pair for ax in axes[:, 0] for pair in zip(*ax.get_legend_handles_labels(), strict=True)]
        drawing.suptitle(rows[0]["case"])
        drawing.legend(*zip(*labels, strict=True), loc="outside lower center", ncols=len(labels), frameon=False)
        text = StringIO()
        FigureCanvasSVG(drawing).print_svg(text, metadata={"Date": None, "Creator": None})
    return text.getvalue()


def _newest(rows: Sequence[Row]) -> list[Row]:
    """Of each setting, trace and way the newest row; virtual time is the same on every machine."""
    ordered = sorted((row for row in rows if not row["quick"]), key=lambda row: str(row["date"]))
    return list({(row["case"], row["trace"], row["way"]): row for row in ordered}.values())


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench day", usage=USAGE, description=__doc__)
    parser.add_argument("--steps", type=int, default=STEPS, help=f"of each training (default: {STEPS:,})")
    parser.add_argument("--cases", default=",".join(CASES), metavar="A,B", help="what is trained (default: all)")
    parser.add_argument("--manners", default=",".join(MANNERS), metavar="A,B", help="of the others (default: all)")
    parser.add_argument(
        "--trace", type=Path, metavar="CSV", help="lines of `seconds,bytes` that others held, in place of manners"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--results", type=Path, default=RESULTS / "day.jsonl", help="file of rows to append to")
    return parser

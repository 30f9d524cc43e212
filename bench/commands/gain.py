"""What joint training is worth: the rows of the paper's tables, and some that the paper could not have, on data at hand
(docs/gain.md says what each is, and what was found).

Each row is an encoder and a detector: the encoder comes from random weights or clips, and where the row has a joint
stage, goes through it; then the same head is trained on its frozen features and evaluated. Encoders are kept in --work
and shared by rows. A row that is there already, of the same videos, fold, seed and flags, is not trained again, so the
table grows over several calls.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from io import StringIO
from itertools import product
from pathlib import Path
from statistics import fmean, stdev
from threading import Lock
from typing import TYPE_CHECKING

from bench.tools.arms import CUTS, FRONTIER, FULL, PATTERNS, QUICK, Arm, all_arms, frontier
from bench.tools.logs import read_log, violations
from bench.tools.rows import RESULTS, ROOT, Row, append_row, environment, read_rows
from bench.tools.sets import SETS, DataSet, Labelled, development, open_set, with_background
from bench.tools.table import MISSING, Picture, Section, Table, screen, when
from lofi_fast.errors import InputError
from lofi_fast.run import events

if TYPE_CHECKING:
    from matplotlib.axes import Axes

USAGE = "python -m bench gain [options] [-- <arguments of lofi_fast.train>]"
REFERENCE = "ACP+"  # what rows are compared with, seed by seed
LONG = "long C"  # whose joint stage is the time that "for longer" has
BUDGET = "11GB"
CLIPS = "--pretrain-epochs"  # for every training but of the source set's clips
# The search of rates, the same for every row: (joint, head, weight of the class loss), each of them a flag's value.
JOINT_RATES, HEAD_RATES, CLASS_LOSSES = ("2e-4", "5e-4", "1e-3"), ("5e-4", "1e-3", "2e-3"), ("0", "1")
# Student's t for a two-sided interval of 95%, by degrees of freedom; beyond them the normal one.
STUDENT = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26, 2.23, 2.20, 2.18, 2.16, 2.14)
NORMAL = 1.96
TIMES = (1, 2)  # of the joint stage of long C: how long the joint stages of the frontier take
SAME = ("data", "version", "fold", "seed", "arm", "flags", "measured")  # rows alike in these are one
DRAWN_FROM = ("gain",)


def main(argv: Sequence[str]) -> int:
    """Train what is missing, append rows, print the table."""
    cut = list(argv).index("--") if "--" in argv else len(argv)
    args, more = _parser().parse_args(argv[:cut]), tuple(argv[cut + 1 :])
    if args.seeds < 1 or args.jobs < 1:
        raise InputError("--seeds and --jobs must be at least 1")
    arms = all_arms(args.budgets.split(","))
    names = QUICK if args.quick else tuple(args.rows.split(",")) if args.rows else tuple(arms)
    if unknown := [name for name in names if name not in arms and name != FRONTIER]:
        raise InputError(f"--rows {unknown[0]}: no such row; there are {', '.join([*arms, FRONTIER])}")
    data = open_set(args.data, args.work / "sets", args.annotations, args.videos)
    folds = range(len(data.folds)) if args.folds is None else range(min(args.folds, len(data.folds)))
    gain = Gain(data, args.work.absolute(), args.results, more, time.monotonic() + 3600 * args.hours)
    if args.tune:
        for name in names:
            gain.tune(arms[name])
    else:
        chosen = [arm for name, arm in arms.items() if name in names]
        places = list(product(folds, range(1 if args.quick else args.seeds)))
        timed = [arm for arm in chosen if arm.start == "ACP+ for longer" or arm.share is not None]
        gain.rows([(arm, *place) for arm in chosen if arm not in timed for place in places], args.jobs)
        gain.rows([(arm, *place) for arm in timed for place in places], args.jobs)
        if FRONTIER in names:
            gain.rows([(arm, *at) for at in places for arm in frontier(gain.equal_epochs(*at))], args.jobs)
    print(screen(table(read_rows(args.results))))
    print(f"{gain.made} rows appended to {args.results}" + (f"; {gain.left} left for want of time" * bool(gain.left)))
    return 0


@dataclass
class Gain:
    """Trainings on one set of data, and their rows."""

    data: DataSet
    work: Path
    results: Path
    more: tuple[str, ...]  # flags for every training
    deadline: float
    made: int = 0
    left: int = 0
    slowest: float = 0.0  # seconds of a row so far
    start: Row = field(default_factory=environment)
    places: dict[Path, Lock] = field(default_factory=lambda: defaultdict(Lock))  # of trainings that rows share

    def rows(self, asked: Sequence[tuple[Arm, int, int]], jobs: int) -> None:
        """Train rows (arm, fold, seed) that are missing, some at once."""
        with ThreadPoolExecutor(jobs) as threads:
            for _ in threads.map(lambda row: self.row(*row), asked):
                pass

    def row(self, arm: Arm, fold: int, seed: int) -> None:
        """Train a row that is missing, if there is time for it."""
        labelled, flags = self.data.folds[fold], self.tuned(arm)
        key = self.key(arm, fold, seed, "row", flags)
        if any(all(row.get(name) == value for name, value in key.items()) for row in read_rows(self.results)):
            return
        if time.monotonic() + self.slowest > self.deadline:
            self.left += 1
            return
        began = time.monotonic()
        row = key | self.trained(arm, labelled, fold, seed, flags) | self.start
        append_row(self.results, row)
        self.made, self.slowest = self.made + 1, max(self.slowest, time.monotonic() - began)
        print(f"{self.data.name}, fold {fold}, seed {seed}, {arm.name}: average mAP {100 * row['average_map']:.2f}",
              flush=True)  # fmt: skip

    def key(self, arm: Arm, fold: int | str, seed: int, measured: str, flags: Sequence[str]) -> Row:
        return {
            "bench": "gain", "measured": measured, "data": self.data.name, "version": self.data.version, "fold": fold,
            "seed": seed, "arm": arm.name, "flags": [*arm.joint, *arm.head, *flags, *self.more],
            "settings": list(self.more),
        }  # fmt: skip

    def trained(self, arm: Arm, labelled: Labelled, fold: int | str, seed: int, flags: Sequence[str]) -> Row:
        """What came of a row: mAP, bytes, CPU seconds of each stage."""
        place = self.work / self.data.name / f"fold{fold}" / f"seed{seed}"
        encoder, seconds = self.encoder(arm.start, labelled, fold, seed)
        peak = budget = None
        passed = 0
        if arm.joint:
            joint = place / _slug(arm.name) / "joint"
            told = [*arm.joint, *arm.head, *self.share_of(arm, fold, seed), *(flags if "--joint-lr" in flags else ())]
            seconds["joint"] = self.train(joint, labelled, seed, "joint", [*encoder, *told], arm.peer)
            steps = [event for event in read_log(joint) if isinstance(event, events.Step) and event.peak is not None]
            peak, budget = max(step.peak or 0 for step in steps), steps[0].budget
            passed = len(violations(steps, []))
            encoder = _weights(joint)
        out = place / _slug(arm.name) / "detector"
        seconds["head"] = self.train(out, labelled, seed, "head,eval", [*encoder, *arm.head, *flags])
        metrics = json.loads((out / "metrics.json").read_text(encoding="utf-8"))
        return {
            "average_map": metrics["average_map"], "map_by_tiou": metrics["map_by_tiou"], "seconds": seconds,
            "peak": peak, "budget": budget, "violations": passed,
            "device": json.loads((out / "environment.json").read_text(encoding="utf-8"))["device"],
        }  # fmt: skip

    def encoder(self, start: str, labelled: Labelled, fold: int | str, seed: int) -> tuple[list[str], dict[str, float]]:
        """Flags that begin with an encoder, and the CPU seconds that it took."""
        if start == "random":
            return [], {}
        if start == "ACP":
            out = self.work / self.data.name / "source" / f"seed{seed}"
            return _weights(out), {"source": self.train(out, self.data.source, seed, "pretrain", [], more=self.others)}
        before, seconds = self.encoder("ACP+" if start == "ACP+ for longer" else "ACP", labelled, fold, seed)
        out = self.work / self.data.name / f"fold{fold}" / f"seed{seed}" / _slug(start)
        if start == "ACP+ with background":
            labelled = with_background(labelled, out.parent)
        flags, more = before, self.more
        if start == "ACP+ for longer":
            more = self.others
            base = self.work / self.data.name / f"fold{fold}" / f"seed{seed}" / _slug("ACP+")
            whole = _epochs(base, "pretrain")
            flags = [*before, "--pretrain-epochs", str(max(1, round(
                whole * self.seconds_of(LONG, fold, seed)["joint"] / seconds["pretrain"])))]  # fmt: skip
        cost = self.train(out, labelled, seed, "pretrain", flags, more=more)
        return _weights(out), seconds | {"pretrain": seconds.get("pretrain", 0.0) + cost}

    @property
    def others(self) -> list[str]:
        """The flags for every training, but for how long clips are learned: the source's take their own time, and those
        of a row for longer what it says.
        """
        found, words = [], iter(self.more)
        for word in words:
            name, given, _ = word.partition("=")
            if name != CLIPS:
                found.append(word)
            elif not given:
                next(words, None)
        return found

    def train(
        self, out: Path, labelled: Labelled, seed: int, stages: str, flags: Sequence[str], peer: str | None = None,
        more: Sequence[str] | None = None,
    ) -> float:  # fmt: skip
        """CPU seconds of a training, which is not repeated where it is there whole, by the same words; of two rows that
        want it, the second waits. `more`: what it is told in place of the flags for every training. Raises InputError
        where it fails; it has said why.
        """
        words = [*flags, *(self.more if more is None else more)]
        with self.places[out]:
            return self._train(out, labelled, seed, stages, words, peer)

    def _train(
        self, out: Path, labelled: Labelled, seed: int, stages: str, words: Sequence[str], peer: str | None
    ) -> float:
        program = ["-m", "bench.peers.partial", peer] if peer else ["-m", "lofi_fast.train"]
        budget = [] if "--mem-budget" in words else ["--mem-budget", BUDGET]
        command = [
            sys.executable, *program, *self.data.flags, *labelled.flags, "--threads", "1", "--seed", str(seed),
            "--cache", str(self.work / "cache"), "--out", str(out), "--stages", stages, *budget, *words,
        ]  # fmt: skip
        cost = out / "cost.json"
        if cost.exists() and (kept := json.loads(cost.read_text(encoding="utf-8")))["words"] == command[1:]:
            return float(kept["seconds"])
        shutil.rmtree(out, ignore_errors=True)
        out.parent.mkdir(parents=True, exist_ok=True)
        log = out.parent / f"{out.name}.log"
        with log.open("w", encoding="utf-8") as said:
            path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
            child = subprocess.Popen(command, env=os.environ | {"PYTHONPATH": path}, stdout=said, stderr=said)
            _, status, usage = os.wait4(child.pid, 0)
            child.returncode = os.waitstatus_to_exitcode(status)
        if child.returncode:
            raise InputError(f"{log}: a training ended with status {child.returncode}: {_last(log)}")
        seconds = round(usage.ru_utime + usage.ru_stime, 1)
        cost.write_text(json.dumps({"words": command[1:], "seconds": seconds}), encoding="utf-8")
        return seconds

    def seconds_of(self, name: str, fold: int | str, seed: int) -> dict[str, float]:
        """CPU seconds of a row's stages. Raises InputError where it is not there."""
        for row in reversed(read_rows(self.results)):
            same = {"data": self.data.name, "version": self.data.version, "fold": fold, "seed": seed, "arm": name,
                    "settings": list(self.more), "measured": "row"}  # fmt: skip
            if all(row.get(key) == value for key, value in same.items()):
                return dict(row["seconds"])
        raise InputError(f'--rows: the row "{name}" comes first; others take their time from it')

    def share_of(self, arm: Arm, fold: int | str, seed: int) -> list[str]:
        """--epoch-time, where a row has a share of full fidelity's."""
        if arm.share is None:
            return []
        full = FULL[0].name
        epochs = _epochs(self.work / self.data.name / f"fold{fold}" / f"seed{seed}" / _slug(full) / "joint", "joint")
        return ["--epoch-time", f"{max(1, round(arm.share * self.seconds_of(full, fold, seed)['joint'] / epochs))}s"]

    def equal_epochs(self, fold: int, seed: int) -> dict[str, list[int]]:
        """Epochs of each cut that take as long as the joint stage of long C, and twice as long."""
        long = self.seconds_of(LONG, fold, seed)["joint"]
        found = {}
        for cut, arm in zip((1, 2, 4, 8, 16), (*FULL, CUTS[0], PATTERNS[-1], *CUTS[1:]), strict=True):
            place = self.work / self.data.name / f"fold{fold}" / f"seed{seed}" / _slug(arm.name) / "joint"
            epoch = self.seconds_of(arm.name, fold, seed)["joint"] / _epochs(place, "joint")
            found[str(cut)] = sorted({max(1, round(times * long / epoch)) for times in TIMES})
        return found

    def tuned(self, arm: Arm) -> list[str]:
        """Flags of the best of the search for this row; none where there was no search."""
        kept = [row for row in read_rows(self.results) if row.get("measured") == "search"]
        same = {"data": self.data.name, "version": self.data.version, "arm": arm.name, "settings": list(self.more)}
        kept = [row for row in kept if all(row[key] == value for key, value in same.items())]
        return list(max(kept, key=lambda row: row["average_map"])["searched"]) if kept else []

    def tune(self, arm: Arm) -> None:
        """Try every combination of rates on the development split, one seed."""
        labelled = development(self.data.folds[0], self.work / self.data.name)
        for flags in searched(arm):
            key = self.key(arm, "development", 0, "search", flags)
            if any(all(row.get(name) == value for name, value in key.items()) for row in read_rows(self.results)):
                continue
            if time.monotonic() + self.slowest > self.deadline:
                self.left += 1
                continue
            began, place = time.monotonic(), self.work / self.data.name / "folddevelopment" / "seed0" / _slug(arm.name)
            shutil.rmtree(place, ignore_errors=True)
            row = key | {"searched": flags} | self.trained(arm, labelled, "development", 0, flags) | self.start
            append_row(self.results, row)
            self.made, self.slowest = self.made + 1, max(self.slowest, time.monotonic() - began)
            print(f"{arm.name} with {' '.join(flags)}: average mAP {100 * row['average_map']:.2f}", flush=True)


def searched(arm: Arm) -> Iterator[list[str]]:
    """What the search tries: a frozen row has no rate for the joint stage, and so takes more of the head's."""
    for weight in CLASS_LOSSES:
        both = ["--joint.class-loss", weight, "--head-stage.class-loss", weight]
        if arm.joint:
            yield from (["--joint-lr", rate, *both] for rate in JOINT_RATES)
        else:
            yield from (["--head-lr", rate, *both] for rate in HEAD_RATES)


def _weights(out: Path) -> list[str]:
    return ["--encoder-weights", str(out / "checkpoints" / "last.pt")]


def _epochs(out: Path, stage: str) -> int:
    """Of a stage of a run."""
    return int(json.loads((out / "config.json").read_text(encoding="utf-8"))[stage]["epochs"])


def _slug(name: str) -> str:
    return "".join(letter if letter.isalnum() or letter in "+." else "-" for letter in name)


def _last(log: Path) -> str:
    return (log.read_text(encoding="utf-8").strip().splitlines() or ["it said nothing"])[-1]


def interval(values: Sequence[float]) -> float | None:
    """Half of the 95% interval of the mean; None of a single value."""
    if len(values) < 2:
        return None
    freedom = len(values) - 1
    t = STUDENT[freedom - 1] if freedom <= len(STUDENT) else NORMAL
    return t * stdev(values) / math.sqrt(len(values))


@dataclass(frozen=True)
class Compared:
    """A row of the table over its folds and seeds."""

    name: str
    rows: tuple[Row, ...]
    pairs: tuple[float, ...]  # average mAP, in points, less the reference's of the same fold and seed

    @property
    def maps(self) -> list[float]:
        return [100 * row["average_map"] for row in self.rows]

    @property
    def peak(self) -> float | None:
        """GB that the joint stage held at most."""
        return max((row["peak"] / 1e9 for row in self.rows if row["peak"]), default=None)

    @property
    def of_equal_time(self) -> bool:
        """Whether it is a point of the frontier."""
        return self.name.startswith(FRONTIER)

    def told(self, flag: str) -> str:
        """What its joint stage was told by a flag."""
        flags = self.rows[0]["flags"]
        return str(flags[flags.index(flag) + 1])

    def seconds(self, *stages: str) -> float:
        """CPU seconds of stages; of all without any."""
        return fmean(
            sum(spent for stage, spent in row["seconds"].items() if not stages or stage in stages) for row in self.rows
        )

    def cells(self, tious: Sequence[str]) -> tuple[str, ...]:
        at = [f"{100 * fmean(row['map_by_tiou'][tiou] for row in self.rows):.1f}" for tiou in tious]
        difference = "" if self.name == REFERENCE else _with_interval(self.pairs, "+") if self.pairs else MISSING
        spent = [self.seconds("source", "pretrain"), self.seconds("joint"), self.seconds("head")]
        return (
            self.name, str(len(self.rows)), *at, _with_interval(self.maps), difference,
            "" if self.peak is None else f"{self.peak:.2f} GB", ", ".join(f"{value:.0f}" for value in spent),
        )  # fmt: skip


def compared(rows: Sequence[Row]) -> dict[tuple[str, str, str], list[Compared]]:
    """Of each (set, version, flags of every training) the rows, in the order of arms.py; of rows that are alike the
    newest.
    """
    newest = {json.dumps([row[key] for key in SAME]): row for row in rows if row["measured"] == "row"}
    found: dict[tuple[str, str, str], list[Compared]] = {}
    for place in dict.fromkeys(map(_place, newest.values())):
        here = [row for row in newest.values() if _place(row) == place]
        reference = {(r["fold"], r["seed"]): r["average_map"] for r in here if r["arm"] == REFERENCE}
        names = dict.fromkeys(row["arm"] for row in here)
        for name in sorted(names, key=[*all_arms([]), *names].index):
            mine = [row for row in here if row["arm"] == name]
            pairs = [
                100 * (row["average_map"] - reference[row["fold"], row["seed"]])
                for row in mine
                if (row["fold"], row["seed"]) in reference
            ]
            found.setdefault(place, []).append(Compared(name, tuple(mine), tuple(pairs)))
    return found


def equal_times(here: Sequence[Compared]) -> dict[int, list[Compared]]:
    """The frontier's rows, by cut, for each of TIMES: what joint stages of equal time gave."""
    found = defaultdict(list)
    for one in sorted((one for one in here if one.of_equal_time), key=lambda one: int(one.told("--cut"))):
        spent = one.seconds("joint") / next(other.seconds("joint") for other in here if other.name == LONG)
        found[min(TIMES, key=lambda times: abs(math.log(spent / times)))].append(one)
    return {times: found[times] for times in sorted(found)}


def _place(row: Row) -> tuple[str, str, str]:
    return row["data"], row["version"], " ".join(row["settings"])


def table(rows: Sequence[Row]) -> list[Section]:
    """For each set: every row's mAP with its interval, and its difference from ACP+, fold by fold and seed by seed."""
    found: list[Section] = []
    for (data, version, settings), here in compared(rows).items():
        of = [row for one in here for row in one.rows]
        tious = list(of[0]["map_by_tiou"])
        picked = [tious[0], tious[len(tious) // 2], tious[-1]]
        header = (
            "row", "trainings", *(f"mAP@{tiou}" for tiou in picked), "average mAP", f"less {REFERENCE}, in pairs",
            "peak of the joint stage", "CPU seconds: clips, joint, head",
        )  # fmt: skip
        where = of[0]["machine"] if of[0]["device"].startswith("CPU,") else of[0]["device"]
        title = f"`{data}`, version {version}{f', `{settings}`' * bool(settings)}; {where}; {when(of)}:"
        found.append(Table(title, header, [one.cells(picked) for one in here if not one.of_equal_time]))
        if frontiers := equal_times(here):
            cells = [
                (f"1/{one.told('--cut')} of full", one.told("--joint-epochs"), f"{one.seconds('joint'):.0f}",
                 str(len(one.rows)), _with_interval(one.maps))
                for points in frontiers.values() for one in points
            ]  # fmt: skip
            header = ("fidelity", "epochs", "CPU seconds of the joint stage", "trainings", "average mAP")
            found.append(Table("The same set, joint stages of equal time:", header, cells))
    if found:
        found.append(Picture("Average mAP over memory, and over the time of training", "../bench/results/gain.svg"))
    return found


def figure(results: Path) -> str | None:
    """An SVG of the rows: average mAP over the joint stage's peak, over CPU seconds of all stages and, where joint
    stages took equal time, over fidelity; None without rows.
    """
    sets = compared(read_rows(results / "gain.jsonl"))
    if not sets:
        return None
    columns = 3 if any(map(equal_times, sets.values())) else 2
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    with matplotlib.rc_context({"svg.hashsalt": "bench", "svg.fonttype": "none", "font.size": 9}):
        drawing = Figure(figsize=(4.5 * columns, 3.4 * len(sets)), layout="constrained")
        panels = drawing.subplots(len(sets), columns, sharey="row", squeeze=False)
        for ((data, version, settings), here), (memory, seconds, *fidelity) in zip(sets.items(), panels, strict=True):
            for axes in fidelity:
                _draw_equal_times(axes, equal_times(here))
            for number, one in enumerate(one for one in here if not one.of_equal_time):
                half, colour = interval(one.maps) or 0.0, f"C{number % 10}"
                places = ((seconds, one.seconds()), *(((memory, one.peak),) if one.peak is not None else ()))
                for axes, x in places:
                    axes.errorbar(x, fmean(one.maps), half, fmt="o", color=colour, capsize=2, markersize=4)
                    axes.annotate(one.name, (x, fmean(one.maps)), xytext=(4, 3), textcoords="offset points", fontsize=7)
            memory.set_title(f"{data}, version {version} {settings}")
            memory.set_ylabel("average mAP (%), 95% interval")
            memory.set_xlabel("peak of the joint stage, GB")
            seconds.set_xlabel("training, CPU seconds of all stages")
            for axes in (memory, seconds):
                axes.grid(alpha=0.3)
        text = StringIO()
        FigureCanvasSVG(drawing).print_svg(text, metadata={"Date": None, "Creator": None})
    return text.getvalue()


def _draw_equal_times(axes: Axes, frontiers: dict[int, list[Compared]]) -> None:
    if not frontiers:
        axes.set_axis_off()
        return
    for times, points in frontiers.items():
        spent = fmean(one.seconds("joint") for one in points)
        axes.errorbar(
            [int(one.told("--cut")) for one in points], [fmean(one.maps) for one in points],
            [interval(one.maps) or 0.0 for one in points], fmt="o-", capsize=2, markersize=4,
            label=f"{spent:.0f} CPU seconds, {times} x {LONG}",
        )  # fmt: skip
    cuts = sorted({int(one.told("--cut")) for points in frontiers.values() for one in points})
    axes.set_xscale("log", base=2)
    axes.set_xticks(cuts, [f"1/{cut}" for cut in cuts])
    axes.set_xlabel("fidelity, of full; joint stages of equal time")
    axes.legend(fontsize=7)
    axes.grid(alpha=0.3)


def _with_interval(values: Sequence[float], sign: str = "") -> str:
    half = interval(values)
    return f"{fmean(values):{sign}.1f}" + ("" if half is None else f" ± {half:.1f}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench gain", usage=USAGE, description=__doc__)
    parser.add_argument("--data", choices=SETS, default="rooms", help="what to train on (default: rooms)")
    parser.add_argument("--annotations", type=Path, metavar="FILE", help="ceiling: its labels, ActivityNet form")
    parser.add_argument("--videos", type=Path, metavar="DIR", help="ceiling: the folder of its videos")
    parser.add_argument(
        "--rows", metavar="A,B", help='which rows, "frontier" for those of equal time (default: all but those)'
    )
    parser.add_argument("--seeds", type=int, default=5, metavar="N", help="seeds 0 to N - 1 (default: 5)")
    parser.add_argument("--folds", type=int, metavar="N", help="the first N of them (default: all)")
    parser.add_argument(
        "--budgets", default="0.8GB,1.2GB,2GB", metavar="A,B", help="of the planner's rows (default: 0.8GB,1.2GB,2GB)"
    )
    parser.add_argument("--hours", type=float, default=math.inf, help="begin no row that may end later")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="rows at once, a thread each (default: 1)")
    parser.add_argument("--quick", action="store_true", help=f"one seed of {', '.join(QUICK)}")
    parser.add_argument(
        "--tune",
        action="store_true",
        help="search the rates of the rows on training videos kept apart; used from then on",
    )
    parser.add_argument(
        "--work",
        type=Path,
        default=Path("runs/gain"),
        metavar="DIR",
        help="encoders, caches, sets (default: runs/gain)",
    )
    parser.add_argument("--results", type=Path, default=RESULTS / "gain.jsonl", help="file of rows to append to")
    return parser

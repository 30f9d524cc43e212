"""What a change of recipes is worth on someone's videos: mAP of another checkout of the project and of this one, seed
by seed, from the same pre-trained encoder.

The other checkout (`--before DIR`) pre-trains and trains; this one trains on from its pre-trained encoder, with the
same flags. `--runs` records runs that were made so already.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean

from bench.tools.rows import RESULTS, ROOT, Row, append_row, environment
from bench.tools.table import Section, Table, screen, when
from lofi_fast.errors import InputError

USAGE = "python -m bench recipes --before DIR --annotations A --videos V [options] [-- <arguments of lofi_fast.train>]"
RECIPES = ("before", "after")


def main(argv: Sequence[str]) -> int:
    """Train each seed with both recipes, or read runs; append rows and print the table."""
    cut = list(argv).index("--") if "--" in argv else len(argv)
    args, more = _parser().parse_args(argv[:cut]), list(argv[cut + 1 :])
    if args.runs:
        runs, commits = _by_recipe("--runs", args.runs), _by_recipe("--commit", args.commit)
        of = {recipe: environment() | {"commit": commits.get(recipe, "unknown"), "dirty": None} for recipe in RECIPES}
        rows = [
            _row(args.name, recipe, seed, Path(run), of[recipe])
            for recipe in RECIPES
            for seed, run in enumerate(runs.get(recipe, "").split(","))
            if run
        ]
    elif args.before and args.annotations and args.videos:
        rows = trained(args, more)
    else:
        raise InputError("give --before, --annotations and --videos to train, or --runs to record what was trained")
    for row in rows:
        append_row(args.results, row)
    print(f"{screen(table(rows))}\n{len(rows)} rows appended to {args.results}")
    return 0


def trained(args: argparse.Namespace, more: Sequence[str]) -> list[Row]:
    checkouts = {"before": Path(args.before), "after": ROOT}
    start = {recipe: environment(checkout) for recipe, checkout in checkouts.items()}
    for of in start.values():
        of["date"] = start["after"]["date"]  # one measurement
    rows = []
    with tempfile.TemporaryDirectory(prefix="bench-recipes-", ignore_cleanup_errors=True) as name:
        folder = Path(args.keep or name)
        shared = [
            "--annotations",
            args.annotations,
            "--videos",
            args.videos,
            "--preset",
            "small",
            "--threads",
            "1",
            *more,
        ]
        for seed in range(args.seeds):
            first, told = folder / f"pretrained{seed}", [*shared, "--seed", str(seed)]
            _train(checkouts["before"], [*told, "--stages", "pretrain", "--cache", str(folder / "cache-before")], first)
            told += ["--encoder-weights", str(first / "checkpoints" / "last.pt"), "--stages", "joint,head,eval"]
            for recipe, checkout in checkouts.items():
                out = folder / f"{recipe}{seed}"
                _train(checkout, [*told, "--cache", str(folder / f"cache-{recipe}")], out)
                rows.append(_row(args.name, recipe, seed, out, start[recipe]))
                print(f"{recipe}, seed {seed}: average mAP {100 * rows[-1]['average_map']:.2f}", flush=True)
    return rows


def _train(checkout: Path, flags: Sequence[str], out: Path) -> None:
    """Raises InputError where the training fails; it has said why."""
    command = [sys.executable, "-m", "lofi_fast.train", *flags, "--out", str(out)]
    done = subprocess.run(command, cwd=checkout, env=os.environ | {"PYTHONPATH": str(checkout)})
    if done.returncode:
        raise InputError(f"{' '.join(command)} in {checkout}: status {done.returncode}")


def _row(name: str, recipe: str, seed: int, run: Path, start: Row) -> Row:
    try:
        metrics = json.loads((run / "metrics.json").read_text(encoding="utf-8"))
        config = json.loads((run / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"--runs: {run} is no run that was evaluated ({error})") from None
    row: Row = {
        "bench": "recipes", "name": name, "recipe": recipe, "seed": seed,
        "average_map": metrics["average_map"], "map_by_tiou": metrics["map_by_tiou"],
        "epochs": {stage: config[of]["epochs"] for stage, of in
                   (("pretrain", "pretrain"), ("joint", "joint"), ("head", "head_stage"))},
    }  # fmt: skip
    return row | start


def _by_recipe(flag: str, words: Sequence[str]) -> dict[str, str]:
    """What stands behind "before=" and "after="."""
    found = dict(word.partition("=")[::2] for word in words)
    if unknown := next((recipe for recipe in found if recipe not in RECIPES), None):
        raise InputError(f"{flag} {unknown}: write before=... or after=...")
    return found


def table(rows: Sequence[Row]) -> list[Section]:
    """Each data set's newest runs: every seed, mean and spread."""
    lines = []
    for name in dict.fromkeys(row["name"] for row in rows):
        for recipe in RECIPES:
            mine = [row for row in rows if (row["name"], row["recipe"]) == (name, recipe)]
            if not mine:
                continue
            newest = max(row["date"] for row in mine)
            run = sorted((row for row in mine if row["date"] == newest), key=lambda row: row["seed"])
            maps = [100 * row["average_map"] for row in run]
            lines.append((
                name, recipe, ", ".join(f"{value:.1f}" for value in maps), f"{fmean(maps):.1f}",
                f"{min(maps):.1f} to {max(maps):.1f}", run[0]["machine"], when(run),
            ))  # fmt: skip
    if not lines:
        return []
    header = ("videos", "recipe", "average mAP (%) by seed", "mean", "spread", "machine", "date, commit")
    return [Table("", header, lines)]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench recipes", usage=USAGE, description=__doc__)
    parser.add_argument("--before", metavar="DIR", help="another checkout of the project, with its kernels built")
    parser.add_argument("--annotations", metavar="FILE", help="labels of the videos")
    parser.add_argument("--videos", metavar="DIR", help="their folder")
    parser.add_argument("--seeds", type=int, default=3, metavar="N", help="seeds 0 to N - 1 (default: 3)")
    parser.add_argument("--name", default="ceiling", help="of the videos, for the table (default: ceiling)")
    parser.add_argument("--runs", action="append", metavar="RECIPE=RUN,RUN", help="finished runs by seed, not to train")
    parser.add_argument("--commit", action="append", default=[], metavar="RECIPE=COMMIT", help="that made those runs")
    parser.add_argument("--keep", metavar="DIR", help="where to train (default: a folder that is removed)")
    parser.add_argument("--results", type=Path, default=RESULTS / "recipes.jsonl", help="file of rows to append to")
    return parser

"""Our networks against their published code: the same weights and inputs, and how far the results are apart.

The code is not part of this project: name the folder of a clone. What no folder is named for is left out.
"""

from __future__ import annotations

import argparse
import subprocess
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch

from bench.peers import (
    published_actionformer,
    published_bmn,
    published_mstcn,
    published_soccernet,
    published_spot,
    published_torchvision,
    published_vjepa2,
)
from bench.tools.rows import RESULTS, Row, append_row, environment, software
from bench.tools.table import Section, Table, by_place, newest, screen, when
from lofi_fast.errors import InputError

PEERS: dict[str, Callable[[Path], Iterator[Row]]] = {
    "actionformer": published_actionformer.compared,
    "bmn": published_bmn.compared,
    "spot": published_spot.compared,
    "soccernet": published_soccernet.compared,
    "mstcn": published_mstcn.compared,
    "torchvision": published_torchvision.compared,
    "vjepa2": published_vjepa2.compared,
}
LARGEST = 1e-6  # relative error that is still rounding: the published losses are float32


def main(argv: Sequence[str]) -> int:
    """Compare, append rows, print a table; 1 when something is not the same to rounding."""
    args = _parser().parse_args(argv)
    start = environment() | software(torch.device("cpu"), torch.get_num_threads())
    rows: list[Row] = []
    for name, compared in PEERS.items():
        folder = getattr(args, name)
        if folder is None:
            print(f"left out: no --{name} FOLDER is given")
            continue
        if not folder.is_dir():
            raise InputError(f"--{name} {folder}: no such folder; name a clone of its repository")
        for row in compared(folder):
            rows.append({"bench": "published", **row, "published": _commit(folder)} | start)
            append_row(args.results, rows[-1])
    print(f"\n{screen(table(rows))}\n{len(rows)} rows appended to {args.results}")
    return int(any(row["error"] > LARGEST for row in rows))


def _commit(folder: Path) -> str | None:
    """Of the published code."""
    if (folder / "COMMIT").exists():
        return (folder / "COMMIT").read_text().strip()
    done = subprocess.run(["git", "-C", folder, "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    return done.stdout.strip() or None


def table(rows: Sequence[Row]) -> list[Section]:
    parts: list[Section] = []
    for where, here in by_place(newest(rows, ("of", "what"))):
        lines = [
            (row["of"], row["what"], f"{row['numbers']:,}", row["dtype"], f"{row['error']:.1e}",
             (row["published"] or "")[:7])
            for row in here
        ]  # fmt: skip
        header = ("of", "what", "numbers", "dtype", "largest error, of the largest number", "published commit")
        parts.append(Table(f"{where}; {when(here)}:", header, lines))
    return parts


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m bench published", usage="python -m bench published [options]", description=__doc__
    )
    parser.add_argument(
        "--actionformer", type=Path, metavar="FOLDER", help="a clone of happyharrycn/actionformer_release"
    )
    parser.add_argument("--bmn", type=Path, metavar="FOLDER", help="a clone of JJBOY/BMN-Boundary-Matching-Network")
    parser.add_argument("--spot", type=Path, metavar="FOLDER", help="a clone of jhong93/spot (E2E-Spot)")
    parser.add_argument("--soccernet", type=Path, metavar="FOLDER", help="a clone of SoccerNet/SoccerNet")
    parser.add_argument("--mstcn", type=Path, metavar="FOLDER", help="a clone of yabufarha/ms-tcn")
    parser.add_argument(
        "--torchvision", type=Path, metavar="FOLDER", help="a clone of pytorch/vision, or its wheel unpacked"
    )
    parser.add_argument("--vjepa2", type=Path, metavar="FOLDER", help="a clone of facebookresearch/vjepa2")
    parser.add_argument("--results", type=Path, default=RESULTS / "published.jsonl", help="file of rows to append to")
    return parser

"""The planner on a GPU beside a neighbour that takes and frees memory, on frames made up there: no decoder is needed.

Each budget of each model is a process of its own (`bench.tools.synthetic`) that plans and trains as `lofi_fast.train`
does: ActivityNet's setting, 16 videos, R18 with G-TAD, or another encoder or head in its place (`--models`). Once it
trains, a second process holds in turn so much of the device that less and more than the budget is left, unless
`--no-pressure` is given. What the driver shows for the training process is read from outside too, every few
milliseconds.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from threading import Event, Lock, Thread

import psutil
import torch

from bench.tools.against import add_against, comparison, read_against
from bench.tools.logs import described, read_log, summary, violations
from bench.tools.record import record_each
from bench.tools.rows import RESULTS, ROOT, Row, alike, environment, read_rows, software
from bench.tools.table import Section, Table, by_place, newest, screen, when
from lofi_fast.budget import parse_bytes
from lofi_fast.errors import InputError
from lofi_fast.precision import choose_device
from lofi_fast.run import events

USAGE = "python -m bench gpu_planner [options]"
# R18 with G-TAD, and what is put in the place of either.
MODELS: dict[str, list[str]] = {
    "r18": [],
    "r34": ["--encoder", "tsm_r34"],
    "r50": ["--encoder", "tsm_r50"],
    "r2plus1d": ["--encoder", "r2plus1d_18"],
    "vit": ["--encoder", "vit_b16", "--encoder.train", "adapters"],
    "bmn": ["--head", "bmn"],
    "actionformer": ["--head", "actionformer"],
    "spotting": ["--head", "spotting"],
}
KEY = ("model", "pressure", "budget")
BUDGETS = "11GB,4GB,24GB,8GB,16GB,6GB"  # in the order of what a cut-off should leave
SHARE_LEFT = (0.7, 1.3)  # of the budget, that the neighbour leaves in turn
HOLD_SECONDS, SAMPLE_SECONDS = 3.0, 0.01
PIECE = 128 << 20  # bytes that the neighbour takes and frees at a time
RESERVE = 256 << 20  # that it never takes
SHOWN = 10  # violations of a budget that a row describes
TINY_HOLDS = (64 << 20, 0)
TRAINING = "training"  # what bench.tools.synthetic says when it begins
VALUES = {
    "error of peak": ("error_of_peak",),
    "budget used": ("used_median",),
    "steps a second": ("steps_a_second",),
}


def main(argv: Sequence[str]) -> int:
    """Measure, append rows, print a table; 1 when a budget was passed or a sample lost."""
    args = _parser().parse_args(argv)
    device = choose_device(args.device)
    if device.type != "cuda" and not args.tiny:
        raise InputError("gpu_planner: there is no GPU here; python -m bench planner measures the planner on a CPU")
    if args.seconds <= 0 or args.threads < 1:
        raise InputError("--seconds and --threads must be positive")
    amounts = [parse_bytes(text) for text in args.budgets.split(",")]
    models = args.models.split(",")
    if unknown := [model for model in models if model not in MODELS]:
        raise InputError(f"--models: no model is called {unknown[0]}; there are: {', '.join(MODELS)}")
    asked = [(model, not args.no_pressure, budget) for model in models for budget in amounts]
    old = read_against(args.against)
    start = environment() | software(device, args.threads) | {"quick": args.tiny}
    known = alike(read_rows(args.results), start) if args.skip_measured else []
    asked = [case for case in asked if case not in [tuple(row[key] for key in KEY) for row in known]]
    with ExitStack() as stack:
        name = stack.enter_context(tempfile.TemporaryDirectory(prefix="bench-gpu-planner-", ignore_cleanup_errors=True))
        neighbour = stack.enter_context(Neighbour(device, args.tiny))

        def training(model: str, pressure: bool, budget: int) -> Row:
            of = "" if model == "r18" else f"-{model}"
            out = (args.logs or Path(name)) / f"planner{of}-{budget / 1e9:g}GB"
            shutil.rmtree(out, ignore_errors=True)  # of an earlier run
            flags = ["--seconds", str(args.seconds), "--threads", str(args.threads), *MODELS[model]]
            return measure(budget, pressure, out, neighbour, device, flags + ["--tiny"] * args.tiny)

        cases = [
            ({"bench": "gpu_planner", **dict(zip(KEY, case, strict=True))}, partial(training, *case)) for case in asked
        ]
        rows, failed = record_each(cases, start, args.results, line)
    print(f"\n{screen(table(rows))}\n{len(rows)} rows appended to {args.results}")
    if args.against:
        print(comparison(rows, old, KEY, VALUES))
    return int(failed or any(row["violations"] or row["lost"] for row in rows))


def measure(
    budget: int, pressure: bool, out: Path, neighbour: Neighbour, device: torch.device, flags: Sequence[str]
) -> Row:
    """One budget of one model."""
    command = [sys.executable, "-m", "bench.tools.synthetic", "--device", device.type, "--budget", str(budget)]
    command += ["--out", str(out), *flags]
    paths = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    began = time.perf_counter()
    neighbour.aim(budget if pressure else None)
    with subprocess.Popen(
        command, cwd=ROOT, env=os.environ | {"PYTHONPATH": paths}, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    ) as child:  # fmt: skip
        assert child.stdout
        last: deque[str] = deque(maxlen=3)
        try:
            with neighbour.watching(child.pid):
                for said in child.stdout:
                    last.append(said.strip())
                    if pressure and said.strip() == TRAINING:
                        neighbour.begin()
                child.wait()
        finally:
            child.kill()
    told = {"seconds": round(time.perf_counter() - began, 1), "seen": neighbour.seen, "turns": neighbour.turns}
    if child.returncode not in (0, 2):
        raise RuntimeError(f"a budget of {budget} bytes: status {child.returncode}: {' / '.join(last)}")
    log = read_log(out)
    steps = [event for event in log if isinstance(event, events.Step)]
    trials = [event for event in log if isinstance(event, events.Measured)]
    # Refused at the start, or in the middle, when others left too little for too long: as a user would read it.
    refused = last[-1] if child.returncode else None
    over = [described(event) for event in violations(steps, trials)][:SHOWN]
    return told | summary(steps, trials, neighbour.seen) | peaks(steps, trials) | {"refused": refused, "over": over}


def peaks(steps: Sequence[events.Step], trials: Sequence[events.Measured]) -> Row:
    """(predicted, measured) bytes: of the step with the highest peak, and of each trial step, before which nothing was
    known but what the networks are.
    """
    highest = max(steps, key=lambda step: step.peak or 0, default=None)
    return {
        "highest": None if highest is None else [highest.predicted, highest.peak],
        "tried": [[trial.predicted, trial.peak] for trial in trials],
    }


class Neighbour:
    """A second process that holds memory of the device, and the view from outside of what a third one holds.

    Once it is told what to `aim` at it holds all but 1.3 times the budget; from `begin` on it leaves 0.7 and 1.3 times
    that in turn, until `watching` ends.
    """

    _SCRIPT = """
import sys, torch
device, piece = torch.device(sys.argv[1]), int(sys.argv[2])
held = []
take = lambda: torch.empty(piece, dtype=torch.uint8, device=device).fill_(1)
free = lambda: torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else 1 << 62
take()
for line in sys.stdin:
    target, reserve = map(int, line.split())
    del held[target // piece:]
    if device.type == "cuda":
        torch.cuda.empty_cache()
    while (len(held) + 1) * piece <= target and free() > reserve + piece:
        try:
            held.append(take())
        except torch.OutOfMemoryError:
            break
    print(len(held) * piece, flush=True)
"""

    def __init__(self, device: torch.device, tiny: bool) -> None:
        self._device, self._tiny = device, tiny
        self._piece = PIECE if device.type == "cuda" else 1 << 24
        self._stop, self._quiet = Event(), Lock()
        self._held = self._base = self.seen = self.turns = 0
        self._holds: tuple[int, ...] = (0, 0)
        self._threads: list[Thread] = []

    def __enter__(self) -> Neighbour:
        command = [sys.executable, "-c", self._SCRIPT, str(self._device), str(self._piece)]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait()

    def aim(self, budget: int | None) -> None:
        """Make ready for a training with this budget, which has not started; None: hold nothing."""
        self._stop, self.seen, self.turns = Event(), 0, 0
        self._hold(0)  # its context is there then
        self._base = self._free()
        shares = [0, 0] if budget is None else [int(self._base - share * budget) for share in SHARE_LEFT]
        self._holds = TINY_HOLDS if self._tiny else tuple(max(amount, 0) for amount in shares)
        self._hold(self._holds[1])

    @contextmanager
    def watching(self, pid: int) -> Iterator[None]:
        """Keep in `seen` the most that the process held."""
        self._threads = [Thread(target=self._watch, args=(pid,), daemon=True)]
        self._threads[0].start()
        try:
            yield
        finally:
            self._stop.set()
            for thread in self._threads:
                thread.join()

    def begin(self) -> None:
        """Take and free in turn from now on."""
        self._threads.append(Thread(target=self._turn, daemon=True))
        self._threads[-1].start()

    def _turn(self) -> None:
        while not self._stop.is_set():
            with self._quiet:  # no reading from outside while it moves
                self._hold(self._holds[self.turns % 2])
            self.turns += 1
            self._stop.wait(HOLD_SECONDS)

    def _hold(self, amount: int) -> None:
        assert self._process.stdin and self._process.stdout
        self._process.stdin.write(f"{amount} {RESERVE}\n")
        self._process.stdin.flush()
        self._held = int(self._process.stdout.readline() or 0)

    def _watch(self, pid: int) -> None:
        while not self._stop.wait(SAMPLE_SECONDS):
            with self._quiet:
                if self._device.type == "cuda":
                    self.seen = max(self.seen, self._base - self._free() - self._held)
                    continue
            try:
                self.seen = max(self.seen, psutil.Process(pid).memory_info().rss)
            except psutil.Error:  # it has ended
                return

    def _free(self) -> int:
        return int(torch.cuda.mem_get_info(self._device)[0]) if self._device.type == "cuda" else 0


def line(row: Row) -> str:
    budget = f"{row['model']}, {row['budget'] / 1e9:.2f} GB"
    if row["refused"]:
        return f"{budget}: refused after {row['steps']} steps: {row['refused']}"
    return (
        f"{budget}: {row['steps']} steps ({row['short']} with less left than the budget), error at most "
        f"{100 * row['error_of_peak'][0]:.1f}% of the peak, used {100 * row['used'][1]:.0f}%, {row['violations']} "
        f"violations, {row['lost']} lost, {row['down']} down, {row['up']} up, {row['retries']} retries; seen from "
        f"outside: {100 * row['seen_of_budget']:.0f}% of the budget at most"
    )


def table(rows: Sequence[Row]) -> list[Section]:
    """The newest run of each model and budget, beside a neighbour and without."""
    models = list(MODELS)
    rows = sorted(newest(rows, KEY), key=lambda row: (models.index(row["model"]), -row["pressure"], row["budget"]))
    header = (
        "model", "budget", "neighbour", "steps, of them with less left", "highest peak: predicted, measured",
        "trial steps: predicted, measured", "largest error of the peak", "of what a step adds", "used, median",
        "most that the driver showed", "violations", "lost or repeated videos", "rungs down / up", "retries",
    )  # fmt: skip
    parts: list[Section] = []
    for where, here in by_place(rows):
        lines: list[Sequence[str]] = []
        for row in here:
            what = (row["model"], f"{row['budget'] / 1e9:.2f} GB", "yes" if row["pressure"] else "no")
            if row["refused"]:
                lines.append((*what, f"refused: {row['refused']}", *[""] * (len(header) - 4)))
                continue
            errors = [f"{100 * row[key][0]:.1f}%" for key in ("error_of_peak", "error_of_added")]
            lines.append((
                *what, f"{row['steps']}, {row['short']}", _pair(row.get("highest")),
                "; ".join(map(_pair, row.get("tried", []))), *errors, f"{100 * row['used'][1]:.0f}%",
                f"{100 * row['seen_of_budget']:.0f}% of the budget", str(row["violations"]), str(row["lost"]),
                f"{row['down']} / {row['up']}", str(row["retries"]),
            ))  # fmt: skip
        parts.append(Table(f"{where}; {when(here)}:", header, lines))
    return parts


def _pair(amounts: Sequence[int | None] | None) -> str:
    """ "3.52, 3.49 GB"; rows of older versions have none."""
    if amounts is None:
        return ""
    return f"{', '.join('?' if amount is None else f'{amount / 1e9:.2f}' for amount in amounts)} GB"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench gpu_planner", usage=USAGE, description=__doc__)
    parser.add_argument(
        "--device", choices=("auto", "cpu", "cuda"), default="auto", help="default: a GPU if there is one"
    )
    parser.add_argument("--budgets", default=BUDGETS, metavar="A,B", help=f"default: {BUDGETS}")
    parser.add_argument("--models", default="r18", metavar="A,B", help=f"of {', '.join(MODELS)} (default: r18)")
    parser.add_argument("--no-pressure", action="store_true", help="the neighbour holds nothing")
    parser.add_argument("--seconds", type=float, default=12.0, help="of training at each budget (default: 12)")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default: 1)")
    parser.add_argument("--tiny", action="store_true", help="a small network: does everything run?")
    parser.add_argument("--skip-measured", action="store_true", help="leave out what these results hold")
    parser.add_argument("--logs", type=Path, metavar="FOLDER", help="where each training leaves its log.jsonl")
    parser.add_argument("--results", type=Path, default=RESULTS / "gpu_planner.jsonl", help="file of rows to append to")
    add_against(parser)
    return parser

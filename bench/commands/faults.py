"""What faults do: kills at random moments, damaged checkpoints, damaged files of every kind that is read.

Kills: whole trainings of a tiny setting, each killed once or more by SIGKILL or SIGTERM and resumed; metrics.json and
predictions.json must be those of an unbroken one, to the byte. Ranks: the same by two processes of torchrun, of which
a random one is killed and which are started anew, by torchrun or with another number; losses and detections must be
those of one unbroken process to rounding, and no process may hang. Checkpoints: of a run that was stopped in its joint
stage; damage must be noticed and the checkpoint before taken, and of some the run goes on to the same end. Files: read
by the functions that read them in earnest; the declared error alone may come out.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from random import Random
from types import FrameType

import torch

from bench.tools.loaders import Loader, loaders
from bench.tools.mutations import damaged_bytes
from bench.tools.rows import RESULTS, ROOT, Row, append_row, environment, software
from bench.tools.table import Section, Table, by_place, newest, screen, when
from lofi_fast.data import demo
from lofi_fast.errors import InputError
from lofi_fast.run import checkpoint, events

USAGE = "python -m bench faults [options]"
PARTS = ("kills", "ranks", "checkpoints", "fuzz")
FLAGS = ("--preset=demo", "--fidelity=8x32", "--width=8", "--batch=2", "--min-cut=1", "--pretrain-epochs=2",
         "--joint-epochs=3", "--head-epochs=4", "--device=cpu", "--mem-budget=4GB")  # fmt: skip
# Steps so small that sums in another order cannot grow to be seen: Adam would make a full step of any difference.
OF_RANKS = ("--batch=4", "--pretrain-epochs=1", "--pretrain.optimizer=sgd", "--pretrain.lr=0.002",
            "--joint.optimizer=sgd", "--joint.lr=0.01", "--head-stage.optimizer=sgd", "--head-stage.lr=0.01",
            "--seed=2", "--precision=fp32")  # fmt: skip
ROUNDING = 1e-4  # of losses, relative, and of scores, in fp32
HUNG = 120.0  # seconds in which all processes must have ended after one was killed, or have gone on to the end
COMPARED = ("metrics.json", "predictions.json")
AGAIN = 0.3  # share of the resumed trainings that are killed once more
WHOLE = 5  # of the damaged checkpoints, from which the run goes on to its end
REPORTS = 100  # of the damaged files of a run, that a whole report is made of
PATIENCE = 600.0  # seconds of one training
HANGS = 30  # seconds after which reading one file counts as failed
ADDRESSES = 24 << 30  # bytes of address space while files are read: no damaged length may ask for more


def main(argv: Sequence[str]) -> int:
    """Try them, append a row for each part, print a table; 1 when something was lost or another error came out."""
    args = _parser().parse_args(argv)
    if min(args.kills, args.ranks, args.checkpoints, args.fuzz) < 0 or args.threads < 1:
        raise InputError("--kills, --ranks, --checkpoints and --fuzz must be 0 or more, and --threads 1 or more")
    unknown = [name for name in args.part.split(",") if name not in PARTS]
    if unknown:
        raise InputError(f"--part: no part is called {unknown[0]}; there are: {', '.join(PARTS)}")
    start = environment() | software(torch.device("cpu"), args.threads) | {"quick": args.quick, "seed": args.seed}
    rows: list[Row] = []
    with tempfile.TemporaryDirectory(prefix="faults-") as folder:
        trial = Trial(Path(folder), args.threads)
        for name in args.part.split(","):
            parts: dict[str, Callable[[Trial, Random, int], Row]]
            parts = {"kills": kills, "ranks": ranks, "checkpoints": checkpoints, "fuzz": fuzz}
            began = time.monotonic()
            row = parts[name](trial, Random(args.seed), getattr(args, name))
            row = {"bench": "faults", "part": name, **row, "seconds": round(time.monotonic() - began, 1), **start}
            append_row(args.results, row)
            rows.append(row)
    print(f"\n{screen(table(rows))}\n{len(rows)} rows appended to {args.results}")
    return int(any(row["failures"] for row in rows))


# Trainings


class Trial:
    """A small demo set, and trainings on it, each in a process of its own."""

    def __init__(self, folder: Path, threads: int) -> None:
        self.folder = folder
        self._threads = threads
        self._labels, self._videos = demo.generate(folder, num_training=4, num_validation=2, seed=1)
        self.whole = folder / "whole" / "run"  # of an unbroken training
        ended = self.train(self.whole)
        if ended.status:
            raise RuntimeError(f"the unbroken training failed: {ended.said}")
        self.seconds = ended.seconds  # that a training takes when nothing stops it

    def train(self, out: Path, *flags: str, kill: tuple[float, signal.Signals] | None = None) -> Ended:
        """One sitting, with a frame cache beside the run; `kill`: after so many seconds, by which signal."""
        command = [sys.executable, *self.command(out, *flags)]
        began = time.monotonic()
        with subprocess.Popen(
            command, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        ) as process:
            struck = False
            try:
                said, _ = process.communicate(timeout=kill[0] if kill else PATIENCE)
            except subprocess.TimeoutExpired:
                process.send_signal(kill[1] if kill else signal.SIGKILL)
                struck = True
                said, _ = process.communicate()
        return Ended(process.returncode, struck, said, time.monotonic() - began)

    def command(self, out: Path, *flags: str) -> list[str]:
        """What follows `python` for one sitting."""
        words = ["-m", "lofi_fast.train", "--annotations", str(self._labels), "--videos", str(self._videos)]
        return [*words, *FLAGS, "--threads", str(self._threads), "--out", str(out), *flags]

    def to_the_end(self, out: Path) -> Ended:
        """Train until it is done: on from where the run stands, or from the start where none was begun."""
        return self.train(out, *["--resume"] * (out / "config.json").exists())

    def differs(self, out: Path) -> str:
        """The first file of results that is not that of the unbroken training; empty where all are."""
        for name in COMPARED:
            if not (out / name).exists() or (out / name).read_bytes() != (self.whole / name).read_bytes():
                return name
        return ""


@dataclass(frozen=True)
class Ended:
    status: int
    killed: bool
    said: str
    seconds: float

    @property
    def last_line(self) -> str:
        return next(iter(self.said.splitlines()[::-1]), "")


def kills(trial: Trial, rng: Random, number: int) -> Row:
    """`number` kills at moments that are spread over the whole of a training, its start and its end too."""
    failures: list[str] = []
    struck: Counter[str] = Counter()
    stages: Counter[str] = Counter()
    trainings = 0
    while sum(struck.values()) < number:
        trainings += 1
        out = trial.folder / f"kills{trainings}" / "run"
        while sum(struck.values()) < number:
            kill = rng.uniform(0, 1.05 * trial.seconds), rng.choice((signal.SIGKILL, signal.SIGTERM))
            resumes = ["--resume"] * (out / "config.json").exists()
            ended = trial.train(out, *resumes, kill=kill)
            if not ended.killed:
                if not resumes:  # what else this machine does changes how long a training takes
                    trial.seconds = ended.seconds
                break
            struck[kill[1].name] += 1
            stages[_stage_of(out)] += 1
            expected = (-kill[1], 0) if kill[1] is signal.SIGTERM else (-kill[1],)
            if ended.status not in expected and not _done(out):
                failures.append(f"{kill[1].name} after {kill[0]:.2f} s: status {ended.status}: {ended.last_line}")
            if rng.random() > AGAIN:
                break
        if not _done(out):
            ended = trial.to_the_end(out)
        if not _done(out) or (differs := trial.differs(out)):
            failures.append(f"training {trainings}: {f'{differs} differs' if _done(out) else ended.last_line}")
        print(f"{sum(struck.values())} kills, {trainings} trainings, {len(failures)} failures", flush=True)
        shutil.rmtree(out.parent)
    return _of_kills(struck, stages, trainings, failures)


def ranks(trial: Trial, rng: Random, number: int) -> Row:
    """`number` kills of one of two processes, at moments spread over the whole of a training, its start and end too."""
    whole = trial.folder / "one" / "run"
    ended = trial.train(whole, *OF_RANKS)
    began = time.monotonic()
    unbroken = _together(trial, trial.folder / "two" / "run", 2)
    seconds = time.monotonic() - began
    if ended.status or unbroken.status or (differs := not_to_rounding(trial.folder / "two" / "run", whole)):
        failed = next((one.said for one in (ended, unbroken) if one.status), None)
        raise RuntimeError(f"the unbroken trainings failed: {failed or differs}")
    failures: list[str] = []
    struck: Counter[str] = Counter()
    stages: Counter[str] = Counter()
    trainings = 0
    while sum(struck.values()) < number:
        trainings += 1
        out = trial.folder / f"ranks{trainings}" / "run"
        rank, restarts, after = rng.randrange(2), rng.randrange(2), rng.uniform(0, seconds)
        what = f"process {rank} killed after {after:.2f} s, {restarts} restarts"
        ended = _together(trial, out, 2, restarts=restarts, kill=(after, rank))
        if not ended.killed:  # it was done before
            stages["done"] += 1
        else:
            struck[f"process {rank}"] += 1
            stages[_stage_of(out)] += 1
        if ended.seconds - after > HUNG:
            failures.append(f"{what}: hung")
        elif not _done(out):
            count = rng.choice((1, 2))
            again = ["--resume"] * (out / "config.json").exists()
            ended = _together(trial, out, count, *again)
            what += f", then {count}"
        if not _done(out) or (differs := not_to_rounding(out, whole)):
            failures.append(f"{what}: {differs if _done(out) else ended.last_line}")
        print(f"{sum(struck.values())} kills, {trainings} trainings, {len(failures)} failures", flush=True)
        shutil.rmtree(out.parent)
    return _of_kills(struck, stages, trainings, failures)


def _of_kills(struck: Counter[str], stages: Counter[str], trainings: int, failures: list[str]) -> Row:
    """What a part found: by what was killed, and where the newest checkpoint stood then."""
    return {
        "number": sum(struck.values()), "by": dict(struck), "where": dict(stages), "trainings": trainings,
        "recovered": trainings - len(failures), "failures": failures,
    }  # fmt: skip


def _together(
    trial: Trial, out: Path, count: int, *flags: str, restarts: int = 0, kill: tuple[float, int] | None = None
) -> Ended:
    """One sitting of `count` processes by torchrun; `kill`: after so many seconds, the process of a rank."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count)]
    launcher += ["--max-restarts", str(restarts)]
    command = [sys.executable, *launcher, *trial.command(out, *OF_RANKS, *flags)]
    began, struck = time.monotonic(), False
    with subprocess.Popen(command, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as process:
        try:
            said, _ = process.communicate(timeout=PATIENCE if kill is None else kill[0])
        except subprocess.TimeoutExpired:
            victim = None if kill is None else _child(process.pid, f"RANK={kill[1]}")
            if victim is not None:
                with suppress(ProcessLookupError):
                    os.kill(victim, signal.SIGKILL)
                    struck = True
            try:
                said, _ = process.communicate(timeout=PATIENCE)
            except subprocess.TimeoutExpired:
                process.terminate()  # which ends its processes, too
                said, _ = process.communicate()
    return Ended(process.returncode, struck, said, time.monotonic() - began)


def _child(parent: int, variable: str) -> int | None:
    """The process that another one has started with a variable of its environment; None where it is not there yet."""
    for path in Path("/proc").glob("[0-9]*"):
        with suppress(OSError, IndexError):
            started_by = int((path / "stat").read_text().rpartition(")")[2].split()[1])
            if started_by == parent and variable.encode() in (path / "environ").read_bytes().split(b"\0"):
                return int(path.name)
    return None


def not_to_rounding(out: Path, whole: Path) -> str:
    """What of a training is not that of another one to rounding; empty where all is."""
    mine, expected = (_losses(folder / "log.jsonl") for folder in (out, whole))
    if mine.keys() != expected.keys():
        return f"steps {sorted(mine.keys() ^ expected.keys())} are in one log alone"
    for step, loss in expected.items():
        if abs(mine[step] - loss) > ROUNDING * abs(loss):
            return f"the loss of step {step} is {mine[step]}, not {loss}"
    found, wanted = (json.loads((folder / "predictions.json").read_text())["results"] for folder in (out, whole))
    if found.keys() != wanted.keys() or any(len(found[video]) != len(wanted[video]) for video in wanted):
        return "other detections"
    scores = [
        abs(one["score"] - other["score"])
        for video in wanted
        for one, other in zip(found[video], wanted[video], strict=True)
    ]
    return f"scores differ by {max(scores)}" if max(scores, default=0.0) > ROUNDING else ""


def _losses(log: Path) -> dict[tuple[str, int, int], float]:
    """Of every step; of one that was taken again, the last."""
    with log.open(encoding="utf-8", errors="replace") as lines:
        return {(e.stage, e.epoch, e.step): e.loss for e in events.read(lines) if isinstance(e, events.Step)}


def _stage_of(out: Path) -> str:
    """The stage that a run's newest checkpoint stands in."""
    try:
        return str(checkpoint.load_newest(out / "checkpoints")[0]["position"]["stage"])
    except InputError:
        return "before the first checkpoint"


def _done(out: Path) -> bool:
    return all((out / name).exists() for name in (*COMPARED, "report.html"))


# Checkpoints


def checkpoints(trial: Trial, rng: Random, number: int) -> Row:
    """`number` damaged checkpoints, each beside a good one; a fifth as many times both are damaged."""
    stopped = _stopped_in_joint(trial)
    last, before = (stopped / "checkpoints" / name for name in (checkpoint.LAST, checkpoint.BEFORE))
    good = {path.name: path.read_bytes() for path in (last, before)}
    others = [path.read_bytes() for path in (stopped / "log.jsonl", trial.whole / "model.safetensors")]
    expected = checkpoint.load(before)["position"]
    failures: list[str] = []
    kinds: Counter[str] = Counter()
    resumed = 0
    for i in range(number):
        kind, content = _damaged_checkpoint(rng, good[last.name], others)
        kinds[kind] += 1
        last.write_bytes(content)
        before.write_bytes(good[before.name])
        try:
            found, path, reason = checkpoint.load_newest(last.parent)
            if path != before or found["position"] != expected or str(last) not in reason:
                failures.append(f"damage {i} ({kind}) was not noticed")
        except Exception as error:
            failures.append(f"damage {i} ({kind}): {type(error).__name__}: {error}")
        if i % max(number // WHOLE, 1) == 0 and resumed < WHOLE:
            resumed += 1
            out = Path(shutil.copytree(stopped, trial.folder / "damaged" / "run"))
            ended = trial.train(out, "--resume")
            if ended.status or "going on from the checkpoint before it" not in ended.said or trial.differs(out):
                failures.append(f"damage {i} ({kind}), resumed: {ended.last_line}")
            shutil.rmtree(out.parent)
            print(f"{i + 1} checkpoints, {resumed} resumed, {len(failures)} failures", flush=True)
    both = number // 5
    for i in range(both):
        for path in (last, before):
            path.write_bytes(_damaged_checkpoint(rng, good[path.name], others)[1])
        try:
            checkpoint.load_newest(last.parent)
            failures.append(f"both damaged, {i}: not noticed")
        except InputError as error:
            if "\n" in str(error) or "--out" not in str(error):
                failures.append(f"both damaged, {i}: {error}")
        except Exception as error:
            failures.append(f"both damaged, {i}: {type(error).__name__}: {error}")
    return {
        "number": number, "by": dict(kinds), "recovered": number + both - len(failures), "resumed": resumed,
        "both": both, "failures": failures,
    }  # fmt: skip


def _stopped_in_joint(trial: Trial) -> Path:
    """A run that was ended by SIGTERM in its joint stage, or at least before it was done, with two checkpoints."""
    out = trial.folder / "stopped" / "run"
    for share in (0.3, 0.4, 0.5, 0.6, 0.2, 0.7):
        trial.train(out, kill=(share * trial.seconds, signal.SIGTERM))
        folder = out / "checkpoints"
        if _stage_of(out) in ("joint", "head") and (folder / checkpoint.BEFORE).exists() and not _done(out):
            return out
        shutil.rmtree(out.parent, ignore_errors=True)
    raise RuntimeError("no training could be stopped in its joint stage")


def _damaged_checkpoint(rng: Random, whole: bytes, others: Sequence[bytes]) -> tuple[str, bytes]:
    kind = rng.choice(("flipped bits", "cut off", "zeros", "empty", "another file", "anything"))
    content = bytearray(whole)
    at = rng.randrange(len(content))
    match kind:
        case "flipped bits":
            for _ in range(rng.choice((1, 1, 20, 200))):
                content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
        case "cut off":
            del content[at:]
        case "zeros":
            upto = min(at + rng.choice((512, 4096, 65536)), len(content))
            content[at:upto] = bytes(upto - at)
        case "empty":
            content.clear()
        case "another file":
            content[:] = rng.choice(others)
        case _:
            content[:] = damaged_bytes(rng, whole)
    # Zeros over zeros, or a bit flipped twice, are no damage.
    return (kind, bytes(content)) if bytes(content) != whole else _damaged_checkpoint(rng, whole, others)


# Files


def fuzz(trial: Trial, rng: Random, number: int) -> Row:
    """`number` damaged files over all loaders, in proportion to their shares; then whole reports of some."""
    made = trial.folder / "files"
    made.mkdir()
    found = loaders(made, trial.whole)
    parts = sum(loader.share for loader in found)
    failures: list[str] = []
    tried: Counter[str] = Counter()
    refused = 0
    with _bounded():
        for loader in found:
            count = number * loader.share // parts if loader.share else min(REPORTS, number // 100)
            for _ in range(count):
                seed = f"{rng.random()}"
                what = attempt(loader, seed, made / "input")
                tried[loader.name] += 1
                refused += what == "refused"
                if what not in ("", "refused"):
                    failures.append(f"{loader.name}, seed {seed}: {what}")
                    print(failures[-1], flush=True)
            print(f"{loader.name}: {count} inputs, {len(failures)} failures in all", flush=True)
    return {"number": tried.total(), "by": dict(tried), "recovered": tried.total() - len(failures), "refused": refused,
            "failures": failures}  # fmt: skip


def attempt(loader: Loader, seed: str, folder: Path) -> str:
    """Read one damaged file: "" where it is taken, "refused" where the declared error came out, or what went wrong."""
    rng = Random(seed)
    content = rng.choice(loader.mutations)(rng, loader.content)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for name, other in loader.beside:
        (folder / name).write_bytes(other)
    (folder / loader.file).write_bytes(content)
    signal.alarm(HANGS)
    try:
        loader.read(folder / loader.file)
    except InputError as error:
        return "refused" if str(error).strip() else "an empty sentence"
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            raise
        return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    finally:
        signal.alarm(0)
    return ""


@contextmanager
def _bounded() -> Iterator[None]:
    """No file may take for ever, or ask for any amount of memory."""

    def hangs(number: int, frame: FrameType | None) -> None:
        raise TimeoutError(f"not read within {HANGS} s")

    limits = resource.getrlimit(resource.RLIMIT_AS)
    handler = signal.signal(signal.SIGALRM, hangs)
    resource.setrlimit(resource.RLIMIT_AS, (ADDRESSES, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)
        signal.signal(signal.SIGALRM, handler)


# Table


def table(rows: Sequence[Row]) -> list[Section]:
    """The newest run of each part on each machine."""
    header = ("faults", "number", "lost or wrong", "how", "took")
    parts: list[Section] = []
    for where, here in by_place(newest(rows, ("part",))):
        lines = [
            (
                _WHAT[row["part"]],
                f"{row['number']:,}",
                str(len(row["failures"])),
                _how(row),
                f"{row['seconds'] / 60:.0f} min",
            )
            for row in here
        ]
        parts.append(Table(f"{where}; {when(here)}:", header, lines))
    return parts


_WHAT = {
    "kills": "trainings killed at random moments, and resumed to the same bytes",
    "ranks": "trainings by two processes of torchrun, one of them killed, and started anew to the same to rounding",
    "checkpoints": "damaged checkpoints, with a good one before them",
    "fuzz": "damaged files of every kind that is read",
}


def _how(row: Row) -> str:
    kinds = ", ".join(f"{count} {name}" for name, count in sorted(row["by"].items()))
    match row["part"]:
        case "kills" | "ranks":
            where = ", ".join(f"{count} {name}" for name, count in sorted(row["where"].items()))
            return f"{kinds}; newest checkpoint then: {where}"
        case "checkpoints":
            return f"{kinds}; {row['resumed']} resumed to the end; and {row['both']} with both damaged"
        case _:
            return f"{len(row['by'])} kinds; {row['refused']:,} refused with a sentence, the others taken"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m bench faults", usage=USAGE, description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--kills", type=int, default=40, help="of trainings (default: 40)")
    parser.add_argument("--ranks", type=int, default=20, help="of one of two processes (default: 20)")
    parser.add_argument("--checkpoints", type=int, default=100, help="damaged (default: 100)")
    parser.add_argument("--fuzz", type=int, default=200_000, help="damaged files, over all kinds (default: 200000)")
    parser.add_argument("--part", default=",".join(PARTS), metavar="A,B", help=f"of {', '.join(PARTS)} (default: all)")
    parser.add_argument("--seed", type=int, default=0, help="of moments and damage (default: 0)")
    parser.add_argument("--threads", type=int, default=1, help="of each training (default: 1)")
    parser.add_argument("--quick", action="store_true", help="mark the rows as a trial of the command itself")
    parser.add_argument("--results", type=Path, default=RESULTS / "faults.jsonl", help="file of rows to append to")
    return parser

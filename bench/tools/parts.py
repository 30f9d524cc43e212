"""Commands of the bench one after the other, as `bench all` and `bench gpu` run them.

Each part is a process of its own with a limit of its own, and writes its rows as soon as each case is measured, so that
neither a cut-off nor a crash loses what was done. What became of a part is a row too, by which --resume goes on.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from threading import Thread
from typing import IO

from bench.tools.rows import ROOT, Row, alike, append_row, read_rows
from bench.tools.table import aligned
from lofi_fast.errors import InputError


@dataclass(frozen=True)
class Setting:
    """What the parts are run with."""

    command: str  # `gpu` or `all`: what the rows of parts are called
    device: str
    threads: int
    results: Path
    resume: bool
    quick: bool  # everything is run and nothing measured: no limits either
    start: Row
    against: Path | None = None  # a folder of older rows
    module: str = "bench"


Ended = tuple[bool, int]  # whether it came to its end, and its exit status


@dataclass(frozen=True)
class Part:
    """`run` takes the setting and its limit in seconds."""

    what: str
    seconds: float
    run: Callable[[Setting, float], Ended]


def chosen(names: str | None, parts: Mapping[str, Part]) -> list[str]:
    """Of --part; all where None."""
    asked = list(parts) if names is None else [name.strip() for name in names.split(",")]
    if unknown := [name for name in asked if name not in parts]:
        raise InputError(f"--part: no part is called {unknown[0]}; there are: {', '.join(parts)}")
    return asked


def introduce(start: Row) -> None:
    """What is measured on, and what measures."""
    changed = " with changes" if start["dirty"] else ""
    versions = ", ".join(f"{name} {version}" for name, version in start["versions"].items())
    print(f"{start['device']}, {start['free'] / 1e9:.1f} GB free; {start['machine']}; {start['threads']} thread(s)")
    print(f"{versions}; commit {start['commit'][:7]}{changed}", flush=True)


def run_parts(parts: Mapping[str, Part], names: Iterable[str], setting: Setting, seconds: float) -> int:
    """The parts in order, each within its share of `seconds`; 1 when one failed or did not come to its end."""
    share = seconds / sum(part.seconds for part in parts.values())
    path = setting.results / f"{setting.command}.jsonl"
    done = alike(read_rows(path), setting.start) if setting.resume else []
    complete = {row["part"] for row in done if row.get("complete")}
    lines: list[Sequence[str]] = [("part", "", "seconds", "rows")]
    failed = False
    ends = time.monotonic() + seconds
    signal.signal(signal.SIGTERM, _end)
    for name in names:
        if name in complete:
            lines.append((name, "was complete", "", ""))
            continue
        before = _rows(setting.results)
        limit = min(max(share * parts[name].seconds, 1.0), max(ends - time.monotonic(), 1.0))
        if setting.quick:
            limit = seconds
        print(f"\n--- {name}: {parts[name].what}, {limit:.0f} s at most", flush=True)
        began = time.monotonic()
        ended, status = parts[name].run(setting, limit)
        spent, rows = time.monotonic() - began, _rows(setting.results) - before
        row = {"bench": setting.command, "part": name, "complete": ended, "status": status, "seconds": round(spent, 1)}
        append_row(path, row | setting.start)
        failed = failed or not ended or status != 0
        said = "cut off: go on with --resume" if not ended else "done" if not status else f"failed with status {status}"
        lines.append((name, said, f"{spent:.0f}", str(rows)))
    print(f"\n{aligned(lines)}\n{_rows(setting.results)} rows in {setting.results}")
    return int(failed)


def _end(number: int, _: object) -> None:
    """Leave as an exception does, so that the part that runs is ended too."""
    sys.exit(128 + number)


def _rows(folder: Path) -> int:
    return sum(path.read_bytes().count(b"\n") for path in folder.glob("*.jsonl"))


def measured(name: str, setting: Setting, limit: float, options: Sequence[str] = ()) -> Ended:
    """Another command of the bench, its rows in the folder of results."""
    results = setting.results / f"{name}.jsonl"
    command = [sys.executable, "-m", setting.module, name, "--results", str(results), *options]
    # Of what is computed there is nothing to compare, and the planner's budgets are others each time.
    if setting.against is not None and name not in ("fits", "planner") and (setting.against / results.name).exists():
        command += ["--against", str(setting.against / results.name)]
    return run(command, limit, setting.results / "logs" / f"{name}.log")


def run(command: Sequence[str], limit: float, log: Path, loud: bool = True) -> Ended:
    """Run until its end or the limit, then end it with all that it started. What it says goes into `log`, and where it
    is `loud` to the terminal as well.
    """
    paths = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    log.parent.mkdir(parents=True, exist_ok=True)
    with (
        log.open("wb") as file,
        subprocess.Popen(
            command, cwd=ROOT, env=os.environ | {"PYTHONPATH": paths, "PYTHONUNBUFFERED": "1"}, start_new_session=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        ) as child,
    ):  # fmt: skip
        assert child.stdout
        listener = Thread(target=_pass_on, args=(child.stdout, file, loud))
        listener.start()
        try:
            return True, child.wait(limit)
        except subprocess.TimeoutExpired:
            return False, 0
        finally:
            with suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)
            listener.join()


def _pass_on(said: IO[bytes], log: IO[bytes], loud: bool) -> None:
    for line in said:
        log.write(line)
        log.flush()
        if loud:
            print(line.decode(errors="replace"), end="", flush=True)

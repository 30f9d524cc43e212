"""Results are data: one JSON object a line, appended and never rewritten."""

from __future__ import annotations

import json
import os
import platform
import subprocess
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil
import torch

import lofi_fast
from lofi_fast.errors import InputError
from lofi_fast.memory.settle import open_meter

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "bench" / "results"
# They change between two runs of the same code.
WRITTEN_BY_BENCH = (":(exclude)bench/results", ":(exclude)README.md", ":(exclude)bench/README.md")

Row = dict[str, Any]


def append_row(path: Path, row: Mapping[str, Any]) -> None:
    """Append one line in one write, so that two writers never mix and a killed one leaves at most a torn last line.

    Raises ValueError for NaN and infinity, which JSON does not have; InputError when the file cannot be written.
    """
    line = json.dumps(row, allow_nan=False, ensure_ascii=False) + "\n"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("ab") as file:
            file.write(line.encode())
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise InputError(f"{path}: cannot append a row ({error.strerror}); name another --results") from error


def read_rows(path: Path) -> list[Row]:
    """The rows of a file in the order they were written; none when there is no file.

    Raises InputError naming file and line for a line that is no JSON object.
    """
    if not path.exists() or not path.stat().st_size:
        return []
    rows: list[Row] = []
    for number, line in enumerate(path.read_bytes().removesuffix(b"\n").split(b"\n"), start=1):
        try:
            row = json.loads(line)
        except ValueError:
            row = None
        if not isinstance(row, dict):
            raise InputError(f"{path}:{number}: not a row (one JSON object a line); mend or delete the line")
        rows.append(row)
    return rows


def environment(checkout: Path = ROOT) -> Row:
    """Where and when: machine in words, UTC date, and the commit of `checkout`, whose code runs (dirty: with changes of
    its own).
    """
    in_clone = _git(checkout, "rev-parse", "HEAD")
    commit = in_clone or os.environ.get("LOFI_FAST_COMMIT", "")  # of a copy without its history
    return {
        "machine": f"{_processor()}, {os.cpu_count()} cores, {psutil.virtual_memory().total / 1e9:.1f} GB",
        "system": platform.system(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": commit or "unknown",
        "dirty": bool(_git(checkout, "status", "--porcelain", "--", ".", *WRITTEN_BY_BENCH)) if in_clone else None,
    }


def alike(rows: Iterable[Row], start: Row) -> list[Row]:
    """Those that the same code made on the same device as `start` describes."""
    same = ("machine", "device", "commit", "dirty", "threads", "quick")
    return [row for row in rows if all(row.get(key) == start.get(key) for key in same)]


def software(device: torch.device, threads: int) -> Row:
    """What a measurement on ``device`` ran with: the device in words, its free bytes, CPU threads, versions."""
    versions = {"lofi_fast": lofi_fast.__version__, "python": platform.python_version()}
    for package in ("torch", "triton"):
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = "not installed"
    if device.type == "cuda":
        versions["cuda"] = str(torch.version.cuda)
        versions["driver"] = _driver()
    meter = open_meter(device)
    return {"device": meter.device, "threads": threads, "free": meter.available() - meter.own(), "versions": versions}


def _driver() -> str:
    try:
        return Path("/proc/driver/nvidia/version").read_text().splitlines()[0].partition("  ")[2].split()[0]
    except (OSError, IndexError):
        pass
    try:
        import pynvml

        pynvml.nvmlInit()
        version: str = pynvml.nvmlSystemGetDriverVersion()
        return version
    except Exception:  # no package, no library, no permission
        return "unknown"


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(filter(None, names), "") or platform.processor() or platform.machine()


def _git(checkout: Path, *arguments: str) -> str:
    """What git says of a checkout of this project; empty when it is not a clone or there is no git."""
    if not (checkout / ".git").exists():  # an unpacked archive may lie inside a clone of something else
        return ""
    try:
        done = subprocess.run(["git", "-C", str(checkout), *arguments], capture_output=True, text=True)
    except OSError:
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""

"""Everything that matters on a GPU, in at most 8 minutes: operators, memory, steps, the planner, decoding, tests.

Each part is a process of its own with a limit of its own, and writes its rows as soon as each case is measured, so that
neither a cut-off nor a crash loses what was done. Go on later with --resume, or take one --part at a time. Nothing but
PyTorch, Triton, NumPy, psutil and, for the tests, pytest has to be installed.

`--dry-run` goes through all of it without a GPU, at tiny sizes, with the Triton kernels under Triton's interpreter.
"""

from __future__ import annotations

import argparse
import ast
import importlib.util
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from xml.etree import ElementTree

import torch

from bench.rows import RESULTS, ROOT, Row, alike, append_row, environment, read_rows, software
from bench.tables import aligned
from lofi_fast.errors import InputError
from lofi_fast.precision import choose_device

USAGE = "python -m bench gpu [options]"
MINUTES = 8.0
DALI = "nvidia.dali"
OPERATORS = sorted(path.parent.name for path in (ROOT / "kernels").glob("*/reference.py"))
WORKERS = 6  # test files at once; a GPU's memory is no limit for them


@dataclass(frozen=True)
class Setting:
    """What the parts are run with."""

    device: str
    threads: int
    results: Path
    resume: bool
    dry_run: bool
    start: Row


@dataclass(frozen=True)
class Part:
    """`run` takes the setting and its limit in seconds, and returns whether it came to its end, and its exit status."""

    what: str
    seconds: float
    run: Callable[[Setting, float], tuple[bool, int]]


def main(argv: Sequence[str]) -> int:
    """Run the parts, print what became of each; 1 when a part failed or did not come to its end."""
    args = _parser().parse_args(argv)
    if args.minutes <= 0 or args.threads < 1:
        raise InputError("--minutes and --threads must be positive")
    if args.commit:
        os.environ["LOFI_FAST_COMMIT"] = args.commit
    device = choose_device("auto")
    if device.type != "cuda" and not args.dry_run:
        raise InputError("PyTorch sees no usable GPU here; --dry-run goes through everything on the CPU")
    names = list(PARTS) if args.part is None else [name.strip() for name in args.part.split(",")]
    if unknown := [name for name in names if name not in PARTS]:
        raise InputError(f"--part: no part is called {unknown[0]}; there are: {', '.join(PARTS)}")
    with ExitStack() as stack:
        folder = args.results or RESULTS
        if args.dry_run and args.results is None:  # tiny rows are no results
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="bench-gpu-")))
        device = torch.device("cpu") if args.dry_run else device
        start = environment() | software(device, args.threads) | {"quick": args.dry_run}
        setting = Setting(device.type, args.threads, folder.absolute(), args.resume, args.dry_run, start)
        introduce(start)
        return parts(setting, names, 60 * args.minutes)


def introduce(start: Row) -> None:
    changed = " with changes" if start["dirty"] else ""
    versions = ", ".join(f"{name} {version}" for name, version in start["versions"].items())
    print(f"{start['device']}, {start['free'] / 1e9:.1f} GB free; {start['machine']}; {start['threads']} thread(s)")
    print(f"{versions}; commit {start['commit'][:7]}{changed}", flush=True)


def parts(setting: Setting, names: Iterable[str], seconds: float) -> int:
    """The parts in order, each within its share of `seconds`, and a row for each that says what became of it."""
    share = seconds / sum(part.seconds for part in PARTS.values())
    done = alike(read_rows(setting.results / "gpu.jsonl"), setting.start) if setting.resume else []
    complete = {row["part"] for row in done if row["complete"]}
    lines: list[Sequence[str]] = [("part", "", "seconds", "rows")]
    failed = False
    ends = time.monotonic() + seconds
    for name in names:
        if name in complete:
            lines.append((name, "was complete", "", ""))
            continue
        before = _rows(setting.results)
        limit = min(max(share * PARTS[name].seconds, 1.0), max(ends - time.monotonic(), 1.0))
        if setting.dry_run:
            limit = seconds  # nothing is to be cut off there
        print(f"\n--- {name}: {PARTS[name].what}, {limit:.0f} s at most", flush=True)
        began = time.monotonic()
        ended, status = PARTS[name].run(setting, limit)
        spent = time.monotonic() - began
        row = {"bench": "gpu", "part": name, "complete": ended, "status": status, "seconds": round(spent, 1)}
        append_row(setting.results / "gpu.jsonl", row | setting.start)
        failed = failed or not ended or status != 0
        said = "cut off: go on with --resume" if not ended else "done" if not status else f"failed with status {status}"
        lines.append((name, said, f"{spent:.0f}", str(_rows(setting.results) - before - 1)))
    print(f"\n{aligned(lines, text=2)}\n{_rows(setting.results)} rows in {setting.results}")
    return int(failed)


def _rows(folder: Path) -> int:
    return sum(path.read_bytes().count(b"\n") for path in folder.glob("*.jsonl"))


# Processes


def run(command: Sequence[str], limit: float) -> tuple[bool, int]:
    """Run until its end or the limit, then end it with all that it started; (whether it ended by itself, status)."""
    paths = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    with subprocess.Popen(
        command, cwd=ROOT, env=os.environ | {"PYTHONPATH": paths, "PYTHONUNBUFFERED": "1"}, start_new_session=True
    ) as child:
        try:
            return True, child.wait(limit)
        except subprocess.TimeoutExpired:
            return False, 0
        finally:
            with suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)


def measured(
    name: str, setting: Setting, limit: float, *, resumes: bool = True, options: Sequence[str] = ()
) -> tuple[bool, int]:
    """Another command of the bench on the device; in a dry run at tiny sizes with interpreted kernels."""
    module = "bench.interpreted" if setting.dry_run else "bench"
    command = [sys.executable, "-m", module, name, "--device", setting.device, "--threads", str(setting.threads)]
    command += ["--results", str(setting.results / f"{name}.jsonl"), *options]
    if setting.dry_run:
        command.append("--tiny")
    if setting.resume and resumes:
        command.append("--skip-measured")
    return run(command, limit)


def ops(setting: Setting, limit: float) -> tuple[bool, int]:
    return measured("ops", setting, limit, options=["--rounds", "1"] if setting.dry_run else [])


def memory(setting: Setting, limit: float) -> tuple[bool, int]:
    return measured("memory", setting, limit, resumes=False)


def step(setting: Setting, limit: float) -> tuple[bool, int]:
    return measured("step", setting, limit, resumes=False, options=["--rounds", "1" if setting.dry_run else "15"])


def planner(setting: Setting, limit: float) -> tuple[bool, int]:
    tiny = ["--budgets", "900MB,500MB", "--seconds", "3"]
    return measured("gpu_planner", setting, limit, options=tiny if setting.dry_run else [])


def data(setting: Setting, limit: float) -> tuple[bool, int]:
    if missing := [name for name in ("av", DALI) if not installed(name)]:
        print(f"left out: {' and '.join(missing)} not installed here, and nothing can be decoded without")
        return True, 0
    return measured("data", setting, limit, resumes=False)


# Tests


def tests(setting: Setting, limit: float) -> tuple[bool, int]:
    """Every test of an operator, several files at once, then what is marked gpu elsewhere, file by file."""
    if not installed("pytest"):
        print("left out: pytest is not installed here")
        return True, 0
    ends = time.monotonic() + limit
    path = setting.results / "tests.jsonl"
    known = {row["file"] for row in alike(read_rows(path), setting.start)} if setting.resume else set()
    operators, marked = [], []
    for file in sorted((ROOT / "tests").glob("test_*.py")):
        of_operator = file.stem.removeprefix("test_") in OPERATORS
        if file.name in known or not (of_operator or "pytest.mark.gpu" in file.read_text(encoding="utf-8")):
            continue
        if missing := sorted(name for name in needs(file) if not installed(name)):
            print(f"{file.name}: left out: {', '.join(missing)} not installed here")
            continue
        (operators if of_operator else marked).append(file)
    if setting.dry_run:  # are they found, and do they import? All are skipped
        groups = [[*operators, *marked]]
        results = [_tested(group, ["-m", "gpu"], setting, ends) for group in groups]
    else:
        with ThreadPoolExecutor(WORKERS) as pool:
            extra = ["-n", "2"] if installed("xdist") else []
            of_operators = partial(_tested, options=extra, setting=setting, ends=ends)
            results = list(pool.map(of_operators, [[file] for file in operators]))
        # Some look at the whole device's memory, so each is alone there.
        results += [_tested([file], ["-m", "gpu"], setting, ends) for file in marked]
    return all(ended for ended, _ in results), max((status for _, status in results), default=0)


def _tested(files: Sequence[Path], options: Sequence[str], setting: Setting, ends: float) -> tuple[bool, int]:
    """Run pytest on some files and append its row."""
    name = ", ".join(file.name for file in files)
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-p",
            "no:cacheprovider",
            "--no-header",
            f"--junitxml={report}",
        ]
        ended, status = run([*command, *options, *map(str, files)], max(ends - time.monotonic(), 1.0))
        if not ended or not report.exists():
            print(f"{name}: {'cut off' if not ended else f'pytest ended with status {status}'}", flush=True)
            return ended, status
        cases = list(ElementTree.parse(report).getroot().iter("testcase"))
    failures = [
        f"{case.get('name')}" for case in cases if case.find("failure") is not None or case.find("error") is not None
    ]
    skipped = sum(case.find("skipped") is not None for case in cases)
    row = {
        "bench": "tests", "file": name, "passed": len(cases) - len(failures) - skipped, "skipped": skipped,
        "failed": len(failures), "failures": failures[:50],
    }  # fmt: skip
    append_row(setting.results / "tests.jsonl", row | setting.start)
    print(f"{name}: {row['passed']} passed, {row['failed']} failed, {skipped} skipped", flush=True)
    return True, 0 if status == 5 else status  # 5: nothing was selected


def needs(file: Path) -> set[str]:
    """Packages outside the standard library that importing a file of this project takes, found without importing it."""
    return set().union(*(_imported(path) for path in _reached(file, set())))


def _reached(file: Path, seen: set[Path]) -> set[Path]:
    """The project's files that importing one imports."""
    if file not in seen:
        seen.add(file)
        for name in _names(file):
            if path := _own(name):
                _reached(path, seen)
    return seen


def _imported(file: Path) -> set[str]:
    foreign = {name for name in _names(file) if _own(name) is None and name.partition(".")[0] not in _OURS}
    # Of `nvidia` each part is a package of its own.
    names = {DALI if name.startswith(DALI) else name.partition(".")[0] for name in foreign}
    return names - sys.stdlib_module_names


_OURS = ("lofi_fast", "bench", "tests", "forms", "networks", "apex_stand_in", "conftest")


@cache
def _names(file: Path) -> tuple[str, ...]:
    """Modules that a file imports at its top, and of `from package import name` both."""
    found = []
    for node in ast.parse(file.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found += [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
    return tuple(found)


def _own(name: str) -> Path | None:
    """The file of a module of this project; kernels/ aside, which needs PyTorch alone."""
    base = ROOT / name.replace(".", "/")
    places = (base.with_suffix(".py"), base / "__init__.py", ROOT / "tests" / f"{name}.py")
    return next((path for path in places if path.is_file() and "kernels" not in path.parts), None)


@cache
def installed(package: str) -> bool:
    """Whether it can be imported. A package that is there and fails to load its library counts as absent."""
    try:
        if importlib.util.find_spec(package) is None:
            return False
        importlib.import_module(package)
    except ImportError:
        return False
    return True


# Their seconds add up to `MINUTES`.
PARTS = {
    "ops": Part("every operator beside its peers, and its share of the copy bandwidth", 90, ops),
    "memory": Part("what is kept of a frame; peaks of whole steps, allocator and driver", 55, memory),
    "step": Part("lean beside plain PyTorch and torch.compile of it", 110, step),
    "planner": Part("budgets of 4 to 24 GB beside a neighbour that takes and frees memory", 150, planner),
    "data": Part("decoding", 10, data),
    "tests": Part("tests of the operators, and those marked gpu", 65, tests),
}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench gpu", usage=USAGE, description=__doc__)
    parser.add_argument("--part", metavar="A,B", help=f"of {', '.join(PARTS)} (default: all)")
    parser.add_argument("--dry-run", action="store_true", help="on the CPU at tiny sizes: does everything run?")
    parser.add_argument("--resume", action="store_true", help="leave out what the results hold of this commit")
    parser.add_argument("--minutes", type=float, default=MINUTES, help=f"for all parts (default: {MINUTES:g})")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default: 1)")
    parser.add_argument("--commit", metavar="HASH", help="what the rows say, where there is no clone to ask")
    parser.add_argument("--results", type=Path, metavar="FOLDER", help="of rows (default: bench/results; a dry run's "
                        "are not kept)")  # fmt: skip
    return parser

"""Everything that matters on a GPU, in at most 8 minutes: operators, memory, steps, the planner, decoding, tests.

Go on after a cut-off with --resume, or take one --part at a time (`bench.tools.parts`). Nothing but PyTorch, Triton,
NumPy, psutil, for the planner rich and for the tests pytest has to be installed.

`--dry-run` goes through all of it without a GPU, at tiny sizes, with the Triton kernels under Triton's interpreter.
"""

from __future__ import annotations

import argparse
import ast
import importlib.util
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from xml.etree import ElementTree

import torch

from bench.tools.parts import Ended, Part, Setting, chosen, introduce, measured, run, run_parts
from bench.tools.rows import RESULTS, ROOT, alike, append_row, environment, read_rows, software
from lofi_fast.errors import InputError
from lofi_fast.precision import choose_device

USAGE = "python -m bench gpu [options]"
MINUTES = 8.0
DALI = "nvidia.dali"
OPERATORS = sorted(path.parent.name for path in (ROOT / "kernels").glob("*/reference.py"))
WORKERS = 6  # test files at once; a GPU's memory is no limit for them


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
    names = chosen(args.part, PARTS)
    with ExitStack() as stack:
        folder = args.results or RESULTS
        if args.dry_run and args.results is None:  # tiny rows are no results
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="bench-gpu-")))
        device = torch.device("cpu") if args.dry_run else device
        start = environment() | software(device, args.threads) | {"quick": args.dry_run}
        module = "bench.tools.interpreted" if args.dry_run else "bench"
        against = None if args.against is None else args.against.absolute()
        setting = Setting(
            "gpu", device.type, args.threads, folder.absolute(), args.resume, args.dry_run, start, against, module
        )  # fmt: skip
        introduce(start)
        return run_parts(PARTS, names, setting, 60 * args.minutes)


def on_device(name: str, setting: Setting, limit: float, *, resumes: bool = True, options: Sequence[str] = ()) -> Ended:
    """A command on the GPU; in a dry run at tiny sizes with interpreted kernels."""
    flags = ["--device", setting.device, "--threads", str(setting.threads), *options]
    flags += ["--tiny"] * setting.quick + ["--skip-measured"] * (setting.resume and resumes)
    return measured(name, setting, limit, flags)


def ops(setting: Setting, limit: float) -> Ended:
    return on_device("ops", setting, limit, options=["--rounds", "1"] if setting.quick else [])


def memory(setting: Setting, limit: float) -> Ended:
    return on_device("memory", setting, limit, resumes=False)


def step(setting: Setting, limit: float) -> Ended:
    return on_device("step", setting, limit, resumes=False, options=["--rounds", "1" if setting.quick else "15"])


def planner(setting: Setting, limit: float) -> Ended:
    tiny = ["--budgets", "900MB,800MB", "--seconds", "3"]
    return on_device("gpu_planner", setting, limit, options=tiny if setting.quick else [])


def data(setting: Setting, limit: float) -> Ended:
    if missing := [name for name in ("av", DALI) if not installed(name)]:
        print(f"left out: {' and '.join(missing)} not installed here, and nothing can be decoded without")
        return True, 0
    as_it_is = replace(setting, module="bench")  # no kernel of ours decodes: there is nothing to interpret
    return on_device("data", as_it_is, limit, resumes=False)


# Tests


def tests(setting: Setting, limit: float) -> Ended:
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
    if setting.quick:  # are they found, and do they import? All are skipped
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


def _tested(files: Sequence[Path], options: Sequence[str], setting: Setting, ends: float) -> Ended:
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
    return {name.partition(".")[0] for name in foreign} - sys.stdlib_module_names


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
    "ops": Part("every operator beside its peers, and its share of the copy bandwidth", 85, ops),
    "memory": Part("what is kept of a frame; peaks of whole steps, allocator and driver", 80, memory),
    "step": Part("lean beside plain PyTorch and torch.compile of it", 110, step),
    "planner": Part("budgets of 4 to 24 GB beside a neighbour that takes and frees memory", 140, planner),
    "data": Part("decoding", 5, data),
    "tests": Part("tests of the operators, and those marked gpu", 60, tests),
}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench gpu", usage=USAGE, description=__doc__)
    parser.add_argument("--part", metavar="A,B", help=f"of {', '.join(PARTS)} (default: all)")
    parser.add_argument("--dry-run", action="store_true", help="on the CPU at tiny sizes: does everything run?")
    parser.add_argument("--resume", action="store_true", help="leave out what the results hold of this commit")
    parser.add_argument("--minutes", type=float, default=MINUTES, help=f"for all parts (default: {MINUTES:g})")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default: 1)")
    parser.add_argument("--commit", metavar="HASH", help="what the rows say, where there is no clone to ask")
    parser.add_argument("--against", type=Path, metavar="FOLDER", help="of older rows, to print what changed")
    parser.add_argument("--results", type=Path, metavar="FOLDER", help="of rows (default: bench/results; a dry run's "
                        "are not kept)")  # fmt: skip
    return parser

"""The tests that say something of a GPU, run on it: the operators' first, then what is marked gpu elsewhere.

Of the operators first the tests marked gpu, several files at once; then what is marked gpu in other files, of which
some look at the whole device's memory, so each is alone there; last the operators' other tests of their Triton forms.
Files that import what is not installed are left out. Each file's outcome is a row as soon as it is known.
"""

from __future__ import annotations

import argparse
import ast
import importlib.util
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache, partial
from pathlib import Path
from xml.etree import ElementTree

import torch

from bench.tools.parts import Ended, run
from bench.tools.rows import RESULTS, ROOT, Row, alike, append_row, environment, read_rows, software
from bench.tools.table import Section, Table, by_place, newest, screen, when
from lofi_fast.errors import InputError
from lofi_fast.precision import choose_device

USAGE = "python -m bench tests [options]"
OPERATORS = sorted(path.parent.name for path in (ROOT / "kernels").glob("*/reference.py"))
WORKERS = 6  # test files at once; a GPU's memory is no limit for them
SECONDS = 600.0
MARKED = ("-m", "gpu")
TRITON = ("-m", "not gpu", "-k", "Triton")
NOTHING = 5  # what pytest ends with where no test was selected
LONGEST = 200  # characters of a failure's first line


def main(argv: Sequence[str]) -> int:
    """Run them, append rows, print a table; 1 when one failed or was cut off."""
    args = _parser().parse_args(argv)
    if args.seconds <= 0 or args.threads < 1:
        raise InputError("--seconds and --threads must be positive")
    if not installed("pytest"):
        print("left out: pytest is not installed here")
        return 0
    device = torch.device("cpu") if args.tiny else choose_device(args.device)
    start = environment() | software(device, args.threads) | {"quick": args.tiny}
    known = [(row["file"], row["selected"]) for row in alike(read_rows(args.results), start) if "selected" in row]
    runner = Runner(args.results, start, time.monotonic() + args.seconds, set(known if args.skip_measured else ()))
    operators, marked = test_files()
    # Tiny: are they found, and do they import? All are skipped.
    outcomes = [runner.run([*operators, *marked], MARKED)] if args.tiny else [*runner.run_all(operators, marked)]
    print(f"\n{screen(table(runner.rows))}\n{len(runner.rows)} rows appended to {args.results}")
    return int(any(status or not ended for ended, status in outcomes))


class Runner:
    """Runs pytest on files until the time `ends`, and appends a row for each."""

    def __init__(self, results: Path, start: Row, ends: float, known: set[tuple[str, str]]) -> None:
        self.rows: list[Row] = []
        self._results, self._start, self._ends, self._known = results, start, ends, known

    def run_all(self, operators: Sequence[Path], marked: Sequence[Path]) -> Iterator[Ended]:
        """The most telling first."""
        parallel = ("-n", "2") if installed("xdist") else ()
        with ThreadPoolExecutor(WORKERS) as pool:
            yield from pool.map(partial(self.run, options=MARKED), [[file] for file in operators])
            for file in marked:
                yield self.run([file], MARKED)
            yield from pool.map(partial(self.run, options=TRITON, more=parallel), [[file] for file in operators])

    def run(self, files: Sequence[Path], options: Sequence[str], more: Sequence[str] = ()) -> Ended:
        """Some files in one process of pytest."""
        name, selected = ", ".join(file.name for file in files), " ".join(options)
        if (name, selected) in self._known:
            return True, 0
        with tempfile.TemporaryDirectory() as folder:
            report = Path(folder) / "report.xml"
            command = [sys.executable, "-m", "pytest", "-q", "--tb=short", "-p", "no:cacheprovider", "--no-header"]
            command += [f"--junitxml={report}", *options, *more, *map(str, files)]
            log = self._results.parent / "logs" / f"{files[0].stem}-{options[-1]}.log"
            ended, status = run(command, max(self._ends - time.monotonic(), 1.0), log, loud=False)
            if not ended or not report.exists():
                print(f"{name} ({selected}): {'cut off' if not ended else f'ended with status {status}'}", flush=True)
                return ended, status
            cases = list(ElementTree.parse(report).getroot().iter("testcase"))
        row = {"bench": "tests", "file": name, "selected": selected, **outcome(cases)}
        append_row(self._results, row | self._start)
        self.rows.append(row | self._start)
        print(
            f"{name} ({selected}): {row['passed']} passed, {row['failed']} failed, {row['skipped']} skipped", flush=True
        )
        return True, 0 if status == NOTHING else status


def outcome(cases: Sequence[ElementTree.Element]) -> Row:
    """Counts, and of each test that failed its name and what its assertion said, in a line."""
    failures = []
    for case in cases:
        found = case.find("failure")
        found = case.find("error") if found is None else found
        if found is not None:
            failures.append([str(case.get("name")), " ".join(str(found.get("message")).split())[:LONGEST]])
    skipped = sum(case.find("skipped") is not None for case in cases)
    return {
        "passed": len(cases) - len(failures) - skipped, "skipped": skipped, "failed": len(failures),
        "failures": [name for name, _ in failures[:50]], "messages": [said for _, said in failures[:50]],
    }  # fmt: skip


def table(rows: Sequence[Row]) -> list[Section]:
    """Each file's newest outcome on each device; which of its tests were selected, in pytest's words."""
    rows = newest([{"selected": "", **row} for row in rows], ("file", "selected"))
    header = ("file", "selected", "passed", "failed", "skipped", "first that failed")
    parts: list[Section] = []
    for where, here in by_place(rows):
        lines = []
        for row in here:
            counts = (str(row[key]) for key in ("passed", "failed", "skipped"))
            lines.append((row["file"], row["selected"] or "all", *counts, next(iter(row["failures"]), "")))
        parts.append(Table(f"{where}; {when(here)}:", header, lines))
    return parts


# Which files


def test_files() -> tuple[list[Path], list[Path]]:
    """Files of the operators, and others with tests marked gpu; without those that cannot be imported here."""
    operators, marked = [], []
    for file in sorted((ROOT / "tests").glob("test_*.py")):
        of_operator = file.stem.removeprefix("test_") in OPERATORS
        if not of_operator and "pytest.mark.gpu" not in file.read_text(encoding="utf-8"):
            continue
        if missing := sorted(name for name in needs(file) if not installed(name)):
            print(f"{file.name}: left out: {', '.join(missing)} not installed here")
            continue
        (operators if of_operator else marked).append(file)
    return operators, marked


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
    packages = {name.partition(".")[0] for name in _names(file)}
    return {name for name in packages if _own(name) is None} - {"tests"} - sys.stdlib_module_names


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


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench tests", usage=USAGE, description=__doc__)
    parser.add_argument(
        "--device", choices=("auto", "cpu", "cuda"), default="auto", help="default: a GPU if there is one"
    )
    parser.add_argument("--seconds", type=float, default=SECONDS, help=f"after which to stop (default: {SECONDS:g})")
    parser.add_argument("--threads", type=int, default=1, help="what the rows say (default: 1)")
    parser.add_argument("--tiny", action="store_true", help="without a GPU: are the tests found, and do they import?")
    parser.add_argument("--skip-measured", action="store_true", help="leave out what these results hold of this commit")
    parser.add_argument("--results", type=Path, default=RESULTS / "tests.jsonl", help="file of rows to append to")
    return parser

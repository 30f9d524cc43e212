"""Everything that matters on a GPU, in at most 6 minutes: steps, what the host pays, the planner, torch.compile,
memory, operators, tests, whether a training waits for frames, decoding.

The most telling comes first. Go on after a cut-off with --resume, or take one --part at a time (`bench.tools.parts`).
What each part said is kept in logs/ beside the rows, and the last thing printed is a summary of all rows that these
results hold of this commit; it ends with the targets: met, missed or not measured (`bench.tools.targets`). Nothing but
PyTorch, Triton, NumPy, psutil, msgspec, for the planner rich and for the tests pytest has to be installed; without DALI
and PyAV the parts that decode are left out.

`--dry-run` goes through all of it without a GPU, at tiny sizes, with the Triton kernels under Triton's interpreter.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from bench.commands.gpu_planner import KEY
from bench.commands.tests import installed
from bench.tools import targets
from bench.tools.parts import Ended, Part, Setting, chosen, introduce, measured, run_parts
from bench.tools.rows import RESULTS, Row, alike, append_row, environment, read_rows, software
from bench.tools.table import Section, Table, aligned, by_place, newest, when
from lofi_fast.errors import InputError
from lofi_fast.precision import choose_device

USAGE = "python -m bench gpu [options]"
MINUTES = 6.0
DALI = "nvidia.dali"
LONGEST = 10_000  # characters of the summary, so that whoever sees only the end of the output sees all of it
WIDEST = 220  # characters of one of its lines


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
        status = run_parts(PARTS, names, setting, 60 * args.minutes)
        for target in targets.judged(partial(_rows, setting.results, start)):
            append_row(setting.results / "gpu.jsonl", {"bench": "gpu", **target} | start)
        print(f"\n{summary(setting.results, start)}")
        return status


def on_device(name: str, setting: Setting, limit: float, *, resumes: bool = True, options: Sequence[str] = ()) -> Ended:
    """A command on the GPU; in a dry run at tiny sizes with interpreted kernels."""
    flags = ["--device", setting.device, "--threads", str(setting.threads), *options]
    flags += ["--tiny"] * setting.quick + ["--skip-measured"] * (setting.resume and resumes)
    return measured(name, setting, limit, flags)


def step(setting: Setting, limit: float) -> Ended:
    return on_device("step", setting, limit, resumes=False, options=["--rounds", "1" if setting.quick else "15"])


def compiled(setting: Setting, limit: float) -> Ended:
    options = ["--compiled", "--rounds", "1" if setting.quick else "7"]
    return on_device("step", setting, limit, resumes=False, options=options)


def planner(setting: Setting, limit: float) -> Ended:
    options = ["--budgets", "900MB,800MB"] if setting.quick else ["--budgets", "11GB,4GB"]
    options += ["--seconds", "3" if setting.quick else "9"]
    return on_device("gpu_planner", setting, limit, options=[*options, "--logs", str(setting.results / "logs")])


def memory(setting: Setting, limit: float) -> Ended:
    return on_device("memory", setting, limit, resumes=False, options=["--short"])


def ops(setting: Setting, limit: float) -> Ended:
    return on_device("ops", setting, limit, options=["--short", "--rounds", "1" if setting.quick else "9"])


def tests(setting: Setting, limit: float) -> Ended:
    as_they_are = replace(setting, module="bench")  # they choose between GPU and interpreter themselves
    return on_device("tests", as_they_are, limit, options=["--seconds", str(max(limit - 5, 1))])


def launches(setting: Setting, limit: float) -> Ended:
    return on_device("launches", setting, limit, resumes=False)


def waits(setting: Setting, limit: float) -> Ended:
    if not _decodes():
        return True, 0
    as_it_is = replace(setting, module="bench")  # it trains in processes of its own
    return on_device("waits", as_it_is, limit, options=["--videos", "4", "--epochs", "2"] if setting.quick else [])


def data(setting: Setting, limit: float) -> Ended:
    if not _decodes():
        return True, 0
    as_it_is = replace(setting, module="bench")  # no kernel of ours decodes: there is nothing to interpret
    return on_device("data", as_it_is, limit, resumes=False, options=["--skip-filling"])


def _decodes() -> bool:
    """Whether there is what decoding takes; says what is missing."""
    missing = [name for name in ("av", DALI) if not installed(name)]
    if missing:
        print(f"left out: {' and '.join(missing)} not installed here, and nothing can be decoded without")
    return not missing


# Their seconds add up to `MINUTES`.
PARTS = {
    "step": Part("lean beside plain PyTorch", 55, step),
    "launches": Part("what the host pays for a call and a step, and device operations of a step", 26, launches),
    "planner": Part("two budgets beside a neighbour that takes and frees memory", 64, planner),
    "compiled": Part("torch.compile of plain PyTorch, with budgets of activations too", 66, compiled),
    "memory": Part("peaks of whole steps, by the allocator and by the driver", 40, memory),
    "ops": Part("every operator beside its peers, and its share of the copy bandwidth", 24, ops),
    "tests": Part("tests marked gpu, then the operators' others of Triton", 22, tests),
    "waits": Part("trainings on videos: do they wait for frames?", 60, waits),
    "data": Part("decoding", 3, data),
}


def table(rows: Sequence[Row]) -> list[Section]:
    """What became of each part, and of each target, newest run of each device."""
    parts: list[Section] = []
    for where, here in by_place(newest([row for row in rows if "part" in row], ("part",))):
        lines = [(row["part"], _became(row), f"{row['seconds']:.0f}") for row in here]
        parts.append(Table(f"{where}; {when(here)}:", ("part", "", "seconds"), lines))
    for where, here in by_place(newest([row for row in rows if "target" in row], ("target",))):
        title = f"Targets; {where}; {when(here)}:"
        parts.append(Table(title, targets.HEADER, [targets.cells(row) for row in here]))
    return parts


def _became(row: Row) -> str:
    return "cut off" if not row["complete"] else "done" if not row["status"] else f"failed, status {row['status']}"


# The summary


def summary(results: Path, start: Row) -> str:
    """What the rows in the folder of results say of this commit and device, in at most `LONGEST` characters."""

    rows = partial(_rows, results, start)
    parts = [row for row in rows("gpu") if "part" in row]
    became = [(row["part"], _became(row), f"{row['seconds']:.0f}") for row in newest(parts, ("part",))]
    peaks = [row for row in rows("memory") if row["measured"] == "step"]
    sections = [  # the least telling last, as the end is what is cut
        _section("parts", [("part", "", "seconds"), *became]),
        _section("roofs", _roofs(rows("step"))),
        _section("steps", _steps(newest(rows("step"), ("step", "dtype", "form")))),
        _section("planner", _planner(newest(rows("gpu_planner"), KEY))),
        _section("violations of the budget", _violations(rows("gpu_planner"))),
        _section("memory of whole steps", _memory(newest(peaks, ("videos", "snippets", "side", "form")))),
        _section("waiting for frames", _waits(newest(rows("waits"), ("setting",)))),
        _section("tests", _tests(rows("tests"))),
        _section("said by the parts", _said(results / "logs")),
        _section("operators: how many times as long as ours the others take", _operators(rows("ops"))),
        _section("device operations, host's microseconds", _launches(rows("launches"))),
    ]
    judged = [targets.cells(row) for row in targets.judged(rows)]
    last = _section("targets", [targets.HEADER, *judged]) if any(map(rows, targets.MEASURED_BY)) else ""
    text, room = "\n\n".join(filter(None, sections)), LONGEST - len(last) - 6
    return "\n\n".join(filter(None, (text if len(text) <= room else f"{text[:room]}\n...", last)))


def _rows(results: Path, start: Row, name: str) -> list[Row]:
    """Of a command, of this commit and device."""
    return alike(read_rows(results / f"{name}.jsonl"), start)


def _roofs(rows: Sequence[Row]) -> list[Sequence[str]]:
    """What was measured among the steps as the most that the device does."""
    floors = [row["floor"] for row in rows if row.get("floor")]
    if not floors:
        return []
    copy, products = max(floor["gbs"] for floor in floors), max(floor["tflops"] for floor in floors)
    return [("copy GB/s", "matrix products and convolutions TFLOP/s"), (f"{copy:.0f}", f"{products:.0f}")]


def _section(title: str, lines: Sequence[Sequence[str]]) -> str:
    """A title and its lines of cells; empty where there is nothing below the heading."""
    if len(lines) < 2:
        return ""
    return f"== {title}\n" + "\n".join(line[:WIDEST] for line in aligned(lines).splitlines())


def _steps(rows: Sequence[Row]) -> list[Sequence[str]]:
    """Time and peak against plain PyTorch's of the same step."""
    plain: dict[str, Row] = {}
    lines: list[Sequence[str]] = [("step", "form", "ms", "faster", "peak GB", "less", "of the floor")]
    for row in rows:
        first = plain.setdefault(row["step"], row)
        peak, less = "", ""
        if row["peak"] and first["peak"]:
            peak, less = f"{row['peak'] / 1e9:.2f}", f"{first['peak'] / row['peak']:.1f}x"
        floor = f"{row['times_floor']:.1f}x" if row["times_floor"] else ""
        lines.append((
            row["step"], row["form"], f"{row['ms'][0]:.1f}", f"{row['faster_than_plain'][0]:.2f}x", peak, less, floor,
        ))  # fmt: skip
    return lines


def _planner(rows: Sequence[Row]) -> list[Sequence[str]]:
    lines: list[Sequence[str]] = [(
        "model", "budget GB", "steps", "a second", "error of peak", "used", "violations", "lost", "retries", "refused",
    )]  # fmt: skip
    for row in rows:
        numbers = (f"{row['steps_a_second'] or 0:.2f}", *(f"{100 * row[key][place]:.0f}%" for key, place in
                                                         (("error_of_peak", 0), ("used", 1))))  # fmt: skip
        counts = (str(row[key]) for key in ("violations", "lost", "retries"))
        budget = f"{row['budget'] / 1e9:.2f}"
        lines.append((row["model"], budget, str(row["steps"]), *numbers, *counts, row["refused"] or ""))
    return lines


def _violations(rows: Sequence[Row]) -> list[Sequence[str]]:
    over = [(row["model"], f"{row['budget'] / 1e9:.2f}", said) for row in rows for said in row["over"]]
    return [("model", "budget GB", "step"), *over]


def _memory(rows: Sequence[Row]) -> list[Sequence[str]]:
    lines: list[Sequence[str]] = [("videos", "step", "form", "above the start GB", "driver GB")]
    for row in rows:
        bytes_ = ["" if row[key] is None else f"{row[key] / 1e9:.2f}" for key in ("peak", "driver")]
        lines.append((str(row["videos"]), f"{row['snippets']} x {row['side']} px", row["form"], *bytes_))
    return lines


def _waits(rows: Sequence[Row]) -> list[Sequence[str]]:
    lines: list[Sequence[str]] = [(
        "training", "first epoch", "later", "without the first step of each", "frames a second", "violations",
    )]  # fmt: skip
    for row in rows:
        shares = [row[part]["share"] for part in ("first", "after", "within")]
        said = ["" if share is None else f"{100 * share:.1f}%" for share in shares]
        lines.append((row["setting"], *said, f"{row['after']['frames_a_second'] or 0:.0f}", str(row["violations"])))
    return lines


def _operators(rows: Sequence[Row]) -> list[Sequence[str]]:
    """Ranges over the shapes of an operator."""
    groups: dict[tuple[str, str, str], list[Row]] = {}
    roofs: dict[tuple[str, str], list[float]] = {}
    for row in rows:
        of_roof = (row[passes] or {}).get("of_roof") if (passes := _passes(row)) else None
        if row["ours"] and of_roof is not None:
            roofs.setdefault((row["op"], row["dtype"]), []).append(100 * of_roof)
        if not row["ours"] and passes:
            groups.setdefault((row["op"], row["dtype"], row["form"]), []).append(row)
    lines: list[Sequence[str]] = [("operator", "dtype", "against", "least", "most", "ours of the roof")]
    for (op, dtype, form), found in groups.items():
        ratios = [row[_passes(row)]["times_ours"][0] for row in found]
        roof = roofs.get((op, dtype), [])
        share = f"{min(roof):.0f} to {max(roof):.0f}%" if roof else ""
        lines.append((op, dtype, form, f"{min(ratios):.2f}x", f"{max(ratios):.2f}x", share))
    return lines


def _passes(row: Mapping[str, Any]) -> str:
    """Forward with backward where it was timed, else forward; empty where neither was."""
    return next((passes for passes in ("forward_backward", "forward") if row[passes]), "")


def _launches(rows: Sequence[Row]) -> list[Sequence[str]]:
    lines: list[Sequence[str]] = [("what", "form", "operations", "microseconds")]
    for row in rows:
        operations = "" if row.get("operations") is None else str(row["operations"])
        lines.append((row["what"], row["form"], operations, f"{row['us'][0]:.1f}" if "us" in row else ""))
    return lines


def _tests(rows: Sequence[Row]) -> list[Sequence[str]]:
    """Counts of each file; then what failed, those that failed in the same words as one line."""
    lines: list[Sequence[str]] = [("file", "selected", "passed", "failed", "skipped", "what failed first, and how")]
    for row in newest(rows, ("file", "selected")):
        name = row["file"] if len(row["file"]) < 40 else f"{row['file'][:40]}..."
        counts = (str(row[key]) for key in ("passed", "failed", "skipped"))
        lines.append((name, row["selected"], *counts, ""))
        for message, count in Counter(row["messages"]).most_common(5):
            first = row["failures"][row["messages"].index(message)]
            lines.append(("", "", "", str(count), "", f"{first}: {message}"))
    return lines


def _said(logs: Path) -> list[Sequence[str]]:
    """Lines of the parts' logs that say what did not go well, a few of each; what tests say is in their rows."""
    telling = ("error:", "Error:", "does not pass the gate", "without ", "needs more memory")
    lines: list[Sequence[str]] = [("part", "line")]
    for name in ("step", "gpu_planner", "memory", "ops", "launches", "waits", "data"):
        if (logs / f"{name}.log").exists():
            said = (logs / f"{name}.log").read_text(encoding="utf-8", errors="replace").splitlines()
            lines += [(name, line.strip()) for line in said if any(words in line for words in telling)][:8]
    return lines


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

"""`python -m bench gpu` without a GPU: its parts, its dry run, and the planner on made-up frames."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import pytest

from bench.commands import gpu
from bench.tools import logs, parts
from bench.tools.rows import ROOT, read_rows
from lofi_fast.run import events


@pytest.fixture(scope="module")
def decoders_absent(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The environment of a machine that only computes: PyAV, DALI and apex cannot be imported."""
    folder = tmp_path_factory.mktemp("absent")
    for name in ("av", "nvidia", "apex"):
        (folder / name).mkdir()
        (folder / name / "__init__.py").write_text("raise ImportError('not here')\n")
    return os.environ | {"PYTHONPATH": str(folder)}


def test_the_dry_run_goes_through_tests_and_decoding_and_resumes(
    tmp_path: Path, decoders_absent: dict[str, str]
) -> None:
    command = [sys.executable, "-m", "bench", "gpu", "--dry-run", "--part", "data,tests", "--results", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, env=decoders_absent, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "left out: av and nvidia.dali not installed here" in done.stdout
    assert "test_pipeline.py: left out: av not installed here" in done.stdout
    (found,) = read_rows(tmp_path / "tests.jsonl")
    files = found["file"].split(", ")
    assert {f"test_{operator}.py" for operator in gpu.OPERATORS} < set(files) and "test_meter.py" in files
    assert found["failed"] == 0 and found["skipped"] > 40 and not found["failures"]
    assert [(row["part"], row["complete"]) for row in read_rows(tmp_path / "gpu.jsonl")] == [
        ("data", True), ("tests", True),
    ]  # fmt: skip
    again = subprocess.run([*command, "--resume"], cwd=ROOT, env=decoders_absent, capture_output=True, text=True)
    assert again.returncode == 0 and again.stdout.count("was complete") == 2


def test_the_dry_run_measures_interpreted_kernels(tmp_path: Path, decoders_absent: dict[str, str]) -> None:
    results = tmp_path / "ops.jsonl"
    command = [sys.executable, "-m", "bench.tools.interpreted", "ops", "--tiny", "--device", "cpu", "--rounds", "1"]
    command += ["--only", "stem_input,temporal_shift", "--results", str(results)]
    done = subprocess.run(command, cwd=ROOT, env=decoders_absent, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = read_rows(results)
    ours = {row["op"] for row in rows if row["ours"] and row["form"].endswith(", interpreted")}
    assert ours == {"stem_input", "temporal_shift"} and len(rows) == 8 and all(row["quick"] for row in rows)
    done = subprocess.run([*command, "--skip-measured"], cwd=ROOT, env=decoders_absent, capture_output=True, text=True)
    assert "4 of 4 cases were measured before" in done.stdout and len(read_rows(results)) == 8


def test_the_planner_trains_without_a_decoder_beside_a_neighbour(
    tmp_path: Path, decoders_absent: dict[str, str]
) -> None:
    results = tmp_path / "rows.jsonl"
    command = [sys.executable, "-m", "bench", "gpu_planner", "--tiny", "--device", "cpu", "--results", str(results)]
    done = subprocess.run(
        [*command, "--budgets", "10MB,2GB", "--seconds", "0.5"],
        cwd=ROOT, env=decoders_absent, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    refused, went = read_rows(results)
    assert "nothing fits: of a budget of 0.01 GB" in refused["refused"]
    assert went["refused"] is None and went["steps"] > 0 and went["violations"] == went["lost"] == 0
    assert 0 < went["used"][0] <= went["used"][2] < 1 and went["seen"] > 10**8 and went["turns"] > 0


def planner_step(epoch: int, videos: str, peak: int = 90, **changes: Any) -> events.Step:
    step = events.Step(
        stage="joint", step=0, loss=1.0, epoch=epoch, videos=list(videos), peak=peak, predicted=80, base=40, budget=100,
        limit=100, num_snippets=8, side=16, micro_batch=2, pattern="spatial", time=f"2026-01-01T00:00:0{epoch}",
    )  # fmt: skip
    return msgspec.structs.replace(step, **changes)


def trial(peak: int | None, budget: int) -> events.Measured:
    return events.Measured(plan="joint spatial", candidate="8x16", peak=peak, budget=budget)


def test_what_a_log_says_of_the_planner() -> None:
    steps = [
        planner_step(0, "ab"), planner_step(0, "cd", side=8, limit=80), planner_step(1, "ab"), planner_step(1, "aa"),
        planner_step(2, "b", pattern="temporal", side=4, retries=1, reduced_from=[8, 16]),
    ]  # fmt: skip
    found = logs.summary(steps, [trial(101, 100), trial(None, 1)], 95)
    assert found["violations"] == 2  # one step, one trial
    assert found["lost"] == 4  # c and d in the second epoch, and a came three times
    assert (found["down"], found["up"], found["short"], found["rungs"]) == (1, 1, 1, 3)
    assert found["error_of_peak"] == [round(10 / 90, 4)] * 2 and found["error_of_added"] == [0.25, 0.25]
    assert (found["seen_of_budget"], found["retries"], found["reduced"]) == (0.95, 1, 1)
    assert found["steps_a_second"] == 2.5


def test_a_part_that_takes_too_long_is_ended_with_all_it_started(tmp_path: Path) -> None:
    child = f"import time; time.sleep(3); open({str(tmp_path / 'late')!r}, 'w')"
    script = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    assert parts.run([sys.executable, "-c", script], 1.0) == (False, 0)
    assert parts.run([sys.executable, "-c", "raise SystemExit(3)"], 60.0) == (True, 3)
    time.sleep(2.5)
    assert not (tmp_path / "late").exists()


def test_parts_share_the_time_and_what_is_cut_off_is_not_complete(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given: dict[str, float] = {}
    ends = {"a": (True, 0), "b": (False, 0), "c": (True, 1)}

    def part(name: str, setting: parts.Setting, limit: float) -> tuple[bool, int]:
        given[name] = limit
        return ends[name]

    known = {name: parts.Part(name, 10, partial(part, name)) for name in ends}
    setting = parts.Setting("gpu", "cuda", 1, tmp_path, True, False, {"commit": "abc", "date": "2026"})
    assert parts.run_parts(known, list(ends), setting, 60.0) == 1
    assert given == {name: pytest.approx(20, abs=1) for name in ends}
    assert [(row["part"], row["complete"], row["status"]) for row in read_rows(tmp_path / "gpu.jsonl")] == [
        ("a", True, 0), ("b", False, 0), ("c", True, 1),
    ]  # fmt: skip
    given.clear()
    assert parts.run_parts(known, list(ends), setting, 60.0) == 1 and set(given) == {"b"}
    assert "cut off: go on with --resume" in capsys.readouterr().out


def test_what_a_file_needs_is_found_without_importing_it() -> None:
    computing = {"numpy", "psutil", "torch"}
    commands, tools = ROOT / "bench" / "commands", ROOT / "bench" / "tools"
    for command in ("gpu", "ops", "memory", "step", "tables"):
        assert gpu.needs(commands / f"{command}.py") <= computing, command
    assert gpu.needs(commands / "gpu_planner.py") <= computing | {"msgspec"}
    assert gpu.needs(tools / "synthetic.py") <= computing | {"msgspec", "rich"}
    assert "av" in gpu.needs(commands / "data.py") & gpu.needs(ROOT / "tests" / "test_pipeline.py")
    assert gpu.needs(ROOT / "tests" / "test_soft_nms.py") == {"hypothesis", "pytest", "torch"}

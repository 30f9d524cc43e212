"""`python -m bench gpu` without a GPU: its parts, its dry run, and the planner on made-up frames."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import msgspec
import pytest
import torch

from bench.__main__ import main
from bench.commands import gpu, gpu_planner, tables, tests
from bench.tools import logs, networks, parts, targets
from bench.tools.rows import ROOT, Row, append_row, read_rows
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
    command = [
        sys.executable,
        "-m",
        "bench",
        "gpu",
        "--dry-run",
        "--part",
        "data,waits,tests",
        "--results",
        str(tmp_path),
    ]
    done = subprocess.run(command, cwd=ROOT, env=decoders_absent, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("left out: av and nvidia.dali not installed here") == 2
    assert "test_pipeline.py: left out: av not installed here" in done.stdout
    (found,) = read_rows(tmp_path / "tests.jsonl")
    files = found["file"].split(", ")
    assert {f"test_{operator}.py" for operator in tests.OPERATORS} < set(files) and "test_meter.py" in files
    assert found["failed"] == 0 and found["skipped"] > 40 and not found["failures"]
    parts = [row for row in read_rows(tmp_path / "gpu.jsonl") if "target" not in row]
    assert [(row["part"], row["complete"]) for row in parts] == [
        ("data", True), ("waits", True), ("tests", True),
    ]  # fmt: skip
    again = subprocess.run([*command, "--resume"], cwd=ROOT, env=decoders_absent, capture_output=True, text=True)
    assert again.returncode == 0 and again.stdout.count("was complete") == 3


def test_the_parts_add_up_to_the_minutes_that_are_promised() -> None:
    assert sum(part.seconds for part in gpu.PARTS.values()) == 60 * gpu.MINUTES


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
        [*command, "--budgets", "10MB,2GB", "--seconds", "0.5", "--logs", str(tmp_path / "logs")],
        cwd=ROOT, env=decoders_absent, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    refused, went = read_rows(results)
    assert "nothing fits: of a budget of 0.01 GB" in refused["refused"]
    assert went["refused"] is None and went["steps"] > 0 and went["violations"] == went["lost"] == 0
    assert 0 < went["used"][0] <= went["used"][2] < 1 and went["seen"] > 10**8 and went["turns"] > 0
    assert refused["over"] == went["over"] == []
    kept = (tmp_path / "logs" / "planner-2GB" / "log.jsonl").read_text().splitlines()
    assert sum(isinstance(event, events.Step) for event in events.read(kept)) == went["steps"]


def test_every_model_is_planned_without_a_decoder(tmp_path: Path, decoders_absent: dict[str, str]) -> None:
    results = tmp_path / "rows.jsonl"
    command = [sys.executable, "-m", "bench", "gpu_planner", "--tiny", "--device", "cpu", "--results", str(results)]
    command += ["--models", ",".join(gpu_planner.MODELS), "--no-pressure", "--budgets", "2GB", "--seconds", "0.2"]
    done = subprocess.run(command, cwd=ROOT, env=decoders_absent, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = read_rows(results)
    assert [row["model"] for row in rows] == list(gpu_planner.MODELS)
    for row in rows:
        assert row["steps"] > 0 and row["refused"] is None and row["violations"] == row["lost"] == row["turns"] == 0
        predicted, peak = row["highest"]
        assert abs(predicted / peak - 1) < row["error_of_peak"][0] + 1e-4 < 0.1 and row["tried"]
    again = subprocess.run([*command, "--skip-measured"], cwd=ROOT, env=decoders_absent, capture_output=True, text=True)
    assert again.returncode == 0 and "0 rows appended" in again.stdout
    said = tables.section_of("gpu_planner", [row | {"quick": False} for row in rows])
    assert "| vit | 2.00 GB | no |" in said and "| spotting | 2.00 GB | no |" in said


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


def test_a_violation_is_described_by_its_plan_and_its_memory() -> None:
    steps = [
        planner_step(1, "ab", step=7, peak=3 * 10**9, limit=2 * 10**9, budget=4 * 10**9, recompute=True, reason="up"),
        planner_step(1, "cd"),
    ]
    over, tried = map(logs.described, logs.violations(steps, [trial(5 * 10**9, 10**9), trial(None, 1)]))
    assert over.startswith("epoch 1 step 7, 8 x 16 px, 2 at once, recompute: GB held 3.00, predicted 0.00, ")
    assert "limit 2.00" in over and "budget 4.00" in over and over.endswith("0 retries; up")
    assert tried == "trial of 8x16: 5.00 held of a budget of 1.00 GB"


def test_a_part_that_takes_too_long_is_ended_with_all_it_started(tmp_path: Path) -> None:
    child = f"import time; time.sleep(3); open({str(tmp_path / 'late')!r}, 'w')"
    script = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    log = tmp_path / "logs" / "part.log"
    assert parts.run([sys.executable, "-c", script], 1.0, log) == (False, 0)
    assert parts.run([sys.executable, "-c", "print('last words'); raise SystemExit(3)"], 60.0, log) == (True, 3)
    assert log.read_text() == "last words\n"
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


def test_a_part_is_ended_with_the_bench_that_started_it(tmp_path: Path) -> None:
    child = f"import time; time.sleep(5); open({str(tmp_path / 'late')!r}, 'w')"
    script = f"""
import pathlib, sys
from bench.tools import parts
def part(setting, limit):
    print("runs", flush=True)
    return parts.run([sys.executable, "-c", {child!r}], limit, pathlib.Path({str(tmp_path / "log")!r}))
setting = parts.Setting("gpu", "cpu", 1, pathlib.Path({str(tmp_path)!r}), False, False, {{}})
parts.run_parts({{"a": parts.Part("a", 1, part)}}, ["a"], setting, 60.0)
"""
    with subprocess.Popen([sys.executable, "-c", script], cwd=ROOT, stdout=subprocess.PIPE, text=True) as bench:
        assert bench.stdout
        assert any(line == "runs\n" for line in bench.stdout)
        time.sleep(0.5)
        bench.terminate()
        assert bench.wait(60) == 143
    time.sleep(5)
    assert not (tmp_path / "late").exists()


def test_what_a_file_needs_is_found_without_importing_it() -> None:
    computing = {"msgspec", "numpy", "psutil", "torch"}
    commands, tools = ROOT / "bench" / "commands", ROOT / "bench" / "tools"
    for command in ("gpu", "tests", "launches", "ops", "memory", "step", "tables"):
        assert tests.needs(commands / f"{command}.py") <= computing, command
    assert tests.needs(commands / "gpu_planner.py") <= computing
    assert tests.needs(tools / "synthetic.py") <= computing | {"rich"}
    assert "av" in tests.needs(commands / "data.py") & tests.needs(ROOT / "tests" / "test_pipeline.py")
    assert tests.needs(ROOT / "tests" / "test_soft_nms.py") == {"hypothesis", "pytest", "torch"}


def test_of_a_failed_test_the_name_and_the_first_words_are_kept() -> None:
    report = ElementTree.fromstring("""
<testsuite><testcase name="good"/>
<testcase name="bad[1]"><failure message="assert 1 == 2&#10;  where 1 = f()"/></testcase>
<testcase name="broken"><error message="no fixture"/></testcase><testcase name="left"><skipped/></testcase></testsuite>
""")
    assert tests.outcome(list(report.iter("testcase"))) == {
        "passed": 1, "skipped": 1, "failed": 2, "failures": ["bad[1]", "broken"],
        "messages": ["assert 1 == 2 where 1 = f()", "no fixture"],
    }  # fmt: skip


def test_the_most_telling_tests_come_first_and_only_what_was_not_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran: list[str] = []

    def run(command: list[str], limit: float, log: Path, loud: bool) -> tuple[bool, int]:
        ran.append(" ".join(command[command.index("-m", 3) :]).replace("-n 2 ", ""))
        return True, 1

    monkeypatch.setattr(tests, "run", run)
    monkeypatch.setattr(tests, "WORKERS", 1)
    runner = tests.Runner(tmp_path / "rows.jsonl", {}, time.monotonic() + 60, {("b.py", "-m gpu")})
    assert list(runner.run_all([Path("a.py"), Path("b.py")], [Path("c.py")])) == [
        (True, 1), (True, 0), (True, 1), (True, 1), (True, 1),
    ]  # fmt: skip
    assert ran == ["-m gpu a.py", "-m gpu c.py", "-m not gpu -k Triton a.py", "-m not gpu -k Triton b.py"]


def gpu_row(**fields: Any) -> Row:
    return {"date": "2026-01-01", **START, **fields}


START: Row = {
    "machine": "m", "device": "NVIDIA Some GPU", "commit": "abc", "dirty": False, "threads": 1, "quick": False,
}  # fmt: skip


def test_the_summary_says_what_matters_in_few_characters(tmp_path: Path) -> None:
    def step(form: str, ms: float, faster: float, peak: int, **changes: Any) -> Row:
        return gpu_row(
            step="whole step", dtype="bfloat16", form=form, ms=[ms] * 3, faster_than_plain=[faster] * 3, peak=peak,
            times_floor=2.0, **changes,
        )  # fmt: skip

    append_row(tmp_path / "step.jsonl", step("plain", 90.0, 1.0, 12 * 10**9))
    append_row(tmp_path / "step.jsonl", step("lean", 30.0, 3.0, 3 * 10**9))
    append_row(tmp_path / "step.jsonl", step("another commit", 1.0, 90.0, 1, commit="old"))
    append_row(tmp_path / "gpu.jsonl", gpu_row(part="step", complete=False, status=0, seconds=75.2))
    planned = {
        "model": "r18", "pressure": True, "steps_a_second": None, "error_of_peak": [0.5, 0.1], "used": [0.1, 0.9, 1.2],
        "lost": 0, "retries": 1,
    }  # fmt: skip
    over = ["epoch 0 step 3, 50 x 158 px"]
    append_row(
        tmp_path / "gpu_planner.jsonl",
        gpu_row(budget=11 * 10**9, steps=9, violations=1, refused=None, over=over, **planned),
    )
    failed = {"passed": 1, "failed": 170, "skipped": 0, "failures": ["test_a", "test_b"] * 25}
    said = ["ValueError: eps", "AssertionError: off by 2"] * 25
    append_row(tmp_path / "tests.jsonl", gpu_row(file="test_x.py", selected="-m gpu", messages=said, **failed))
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / "ops.log").write_text(
        "[1/2] a: gate passed\n[2/2] b: does not pass the gate\n" + 99 * "error: x\n"
    )
    found = gpu.summary(tmp_path, START)
    lines = {" ".join(line.split()) for line in found.splitlines()}
    assert "whole step lean 30.0 3.00x 3.00 4.0x 2.0x" in lines and "another commit" not in found
    assert "step cut off 75" in lines and "r18 11.00 9 0.00 50% 90% 1 0 1" in lines
    assert "r18 11.00 epoch 0 step 3, 50 x 158 px" in lines
    assert "25 test_a: ValueError: eps" in lines and "25 test_b: AssertionError: off by 2" in lines
    assert "ops [2/2] b: does not pass the gate" in lines and "gate passed" not in found
    for number in range(500):
        append_row(tmp_path / "step.jsonl", step(f"form {number}", 30.0, 3.0, 3 * 10**9))
    assert len(gpu.summary(tmp_path, START)) <= gpu.LONGEST < 12_000
    assert gpu.summary(tmp_path / "nothing", START) == ""


def test_targets_are_met_missed_or_not_measured(tmp_path: Path) -> None:
    def step(form: str, faster: float, peak: int, ms: float = 20.0, name: str = targets.WHOLE) -> Row:
        return gpu_row(
            step=name, dtype="bfloat16", form=form, ms=[ms] * 3, faster_than_plain=[faster] * 3, peak=peak,
            times_floor=None, floor={"gbs": 3000.4, "tflops": 700.2},
        )  # fmt: skip

    less, more, _ = networks.BUDGETS
    for row in (
        step("plain PyTorch", 1.0, 11 * 10**9), step(targets.LEAN, 2.2, 3 * 10**9),
        step(networks.COMPILED, 2.0, 8 * 10**9), step(less, 1.5, 4 * 10**9), step(more, 2.4, 4 * 10**9),
        step(networks.EACH_SNIPPET, 0.1, 100, 1000.0, targets.ENCODER),
        step(networks.LEAN_EACH_SNIPPET, 0.2, 90, 400.0, targets.ENCODER),
    ):  # fmt: skip
        append_row(tmp_path / "step.jsonl", row)
    call = {"measured": "call", "dtype": "bfloat16"}
    for row in (
        {"measured": "operations", "what": targets.WHOLE, "form": targets.LEAN, "operations": 900, "dtype": "bfloat16"},
        {"measured": "host", "what": targets.WHOLE, "form": targets.LEAN, "us": [21e3] * 3, "dtype": "bfloat16"},
        {**call, "what": "stem 4x4", "form": "Triton 3.6.0", "us": [20.0] * 3},
        {**call, "what": "stem 4x4", "form": "PyTorch", "us": [90.0] * 3},
        {**call, "what": "align_linear L=3", "form": "Triton 3.6.0", "us": [99.0] * 3},
    ):
        append_row(tmp_path / "launches.jsonl", gpu_row(**row))
    moved = {"forward": {"of_roof": 0.95}, "forward_backward": {"of_roof": 0.85}, "ours": True, "form": "Triton"}
    append_row(
        tmp_path / "ops.jsonl", gpu_row(op="temporal_shift", shape="56x56x64, 64 frames", dtype="bfloat16", **moved)
    )
    for setting, share in (("full", 0.01), ("lofi", 0.062), ("demo", None)):
        part = {"share": share, "frames_a_second": 9000.4}
        row = gpu_row(setting=setting, first=part, after=part, within=part, violations=0)
        append_row(tmp_path / "waits.jsonl", row)
    lines = [" ".join(line.split()) for line in gpu.summary(tmp_path, START).splitlines()]
    assert "lofi 6.2% 6.2% 6.2% 9000 0" in lines
    assert lines.index("== targets") == len(lines) - len(targets.judged(lambda name: [])) - 2
    assert "3000 700" in lines
    for line in (
        "whole step at full fidelity against plain PyTorch >= 2x 2.20x met",
        "whole step at full fidelity against torch.compile >= 1.3x 1.10x missed",
        f"whole step: ahead of {less} in time and peak both 1.47x, 1.33x less met",
        f"whole step: ahead of {more} in time and peak both 0.92x, 1.33x less missed",
        "recompute a snippet at a time against plain checkpointing: peak, time <= 1.15x, 0.5x 0.90x, 0.40x met",
        "one video at full fidelity, peak <= 4.3 GB 3.00 GB met",
        "16 videos at full fidelity with recompute, peak <= 5.5 GB not measured",
        "device operations, 100 snippets of 224 px <= 5000 900 met",
        "host's time below the step's, 100 snippets of 224 px below 21.0 of 20.0 ms missed",
        "host's time of one operator call <= 25 us 20.0 us at most (stem) met",
        "temporal_shift of 56 px, of the copy bandwidth >= 90% 85 to 95% missed",
        "wait for data after the first epoch, of a step < 5% 1.0% (full), 6.2% (lofi) missed",
    ):
        assert line in lines, line
    rows = [gpu_row(**row) for row in targets.judged(lambda name: read_rows(tmp_path / f"{name}.jsonl"))]
    said = tables.section_of("gpu", [*rows, gpu_row(part="step", complete=True, status=0, seconds=1.0)])
    assert "| step | done | 1 |" in said
    assert "| one video at full fidelity, peak | <= 4.3 GB | 3.00 GB | met |" in said


def test_lean_forms_take_the_planners_chunk() -> None:
    assert networks.planned_chunk(100, 224) == 62 and networks.planned_chunk(3, 224) == 3
    case = networks.WholeStep.of("tsm_r18", 3, 32, "float32", torch.device("cpu"), width=networks.TINY_WIDTH)
    case.gate(networks.PLANNED)


def test_what_the_host_pays_is_counted(tmp_path: Path) -> None:
    results = tmp_path / "launches.jsonl"
    assert main(["launches", "--tiny", "--device", "cpu", "--results", str(results)]) == 0
    rows = read_rows(results)
    assert [row["form"] for row in rows if row["measured"] == "operations"][:2] == ["plain PyTorch", "lean"]
    calls = [row for row in rows if row["measured"] == "call"]
    assert {row["what"].split()[0] for row in calls} >= {"stem", "temporal_shift", "residual_shift", "quantize"}
    assert all(0 < row["us"][1] <= row["us"][0] <= row["us"][2] for row in calls)
    said = tables.section_of("launches", [row | {"quick": False} for row in rows])
    assert "| encoder, one chunk: 1 snippets of 32 px | lean | unknown |" in said
    assert tables.section_of("launches", rows) == "not measured\n"

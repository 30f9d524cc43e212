"""The bench: rows, the tables made from them, operators, kernels, and the whole job end to end at a tiny setting."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
from av.video.frame import VideoFrame
from torch.utils.flop_counter import FlopCounterMode

from bench import against, cases, gate, gpu, gpu_planner, job, kernels, measure, networks, ops, parts, roofs, tables
from bench import data as bench_data
from bench import eval as bench_eval
from bench.__main__ import main
from bench.peers import decoders, official_map
from bench.peers.shift import published_shift
from bench.rows import ROOT, Row, append_row, environment, read_rows
from lofi_fast.data import demo
from lofi_fast.errors import InputError
from lofi_fast.metrics import parse_tiou
from lofi_fast.train import read_flags

TINY = (
    "--preset small --fidelity 8x32 --window video --frame-stride 1 --width 8 --pretrain-epochs 1 --joint-epochs 1 "
    f"--head-epochs 1 --batch 2 --min-cut 1 --device cpu --threads {min(2, os.cpu_count() or 1)}"
).split()


def row(**changes: Any) -> Row:
    """A row as the job writes it, as far as the table looks at it."""
    return {
        "name": "demo", "labels": "true", "seed": 0, "date": "2026-01-02T03:04:05+00:00",
        "average_map": 0.5, "map_by_tiou": {"0.3": 0.75, "0.5": 0.5, "0.7": 0.25}, "training_seconds": 90.0,
        "peak": 1_500_000_000, "budget": 11_000_000_000, "settings": {"batch": 4}, "commit": "0123456789abcdef",
        "dirty": False, "machine": "Some CPU, 2 cores, 8.0 GB", "device": "CPU, 2 cores, 8.0 GB",
        "precision": "float32 (a CPU)", **changes,
    }  # fmt: skip


def line_of(table: str, what: str) -> str:
    (line,) = [line for line in table.splitlines() if line.startswith(f"| {what} |")]
    return line


# Rows


def test_rows_come_back_as_they_were_written(tmp_path: Path) -> None:
    path = tmp_path / "results" / "job.jsonl"
    assert read_rows(path) == []
    rows = [{"name": "demo", "map": {"0.5": 0.1}, "peak": None}, {"name": "Grüße\u2028\nzwei"}]
    for written in rows:
        append_row(path, written)
    assert read_rows(path) == rows
    assert path.read_bytes().count(b"\n") == 2


def test_a_row_without_a_json_form_leaves_the_file_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "job.jsonl"
    append_row(path, {"average_map": 0.5})
    before = path.read_bytes()
    with pytest.raises(ValueError):
        append_row(path, {"average_map": float("nan")})
    assert path.read_bytes() == before


@pytest.mark.parametrize("bad", ["{torn", "[1]", ""], ids=["torn", "no object", "empty line"])
def test_a_malformed_line_is_named(tmp_path: Path, bad: str) -> None:
    path = tmp_path / "job.jsonl"
    path.write_text(f'{{"a": 1}}\n{bad}\n{{"a": 2}}\n')
    with pytest.raises(InputError, match=r"job\.jsonl:2: "):
        read_rows(path)


def test_environment_says_where_and_when_without_paths() -> None:
    found = environment()
    assert set(found) == {"machine", "system", "date", "commit", "dirty"}
    assert found["date"].endswith("+00:00") and "cores" in found["machine"]
    assert str(ROOT) not in json.dumps(found)


# Tables

HEADER = (
    "| what | seeds | mAP@0.3 (%) | mAP@0.5 (%) | mAP@0.7 (%) | average mAP (%) | training (min) | peak memory "
    "| machine | date, commit |\n| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |\n"
)
NOT_MEASURED = " not measured |" * 9


def test_table_of_no_rows() -> None:
    assert tables.job_table([]) == (
        f"{HEADER}| demo |{NOT_MEASURED}\n| demo, rolled labels |{NOT_MEASURED}\n| ceiling |{NOT_MEASURED}\n"
    )


def test_table_of_one_and_of_several_seeds() -> None:
    rows = [
        row(seed=2, average_map=0.25, map_by_tiou={"0.3": 0.5, "0.5": 0.25, "0.7": 0.0}, training_seconds=150.0),
        row(seed=0, peak=2_000_000_000, date="2026-01-03T00:00:00+00:00"),
        row(labels="rolled", average_map=None, map_by_tiou={}, peak=None, dirty=True),
        row(name="mine", device="NVIDIA H100, 80.0 GB", precision="bfloat16 (compute capability 9.0)"),
    ]
    assert tables.job_table(rows) == (
        f"{HEADER}"
        "| demo | 0, 2 | 62.5 (50.0 to 75.0) | 37.5 (25.0 to 50.0) | 12.5 (0.0 to 25.0) | 37.5 (25.0 to 50.0) "
        "| 2.0 (1.5 to 2.5) | 2.00 of 11.00 GB | Some CPU, 2 cores, 8.0 GB, float32 | 2026-01-03, 0123456 |\n"
        "| demo, rolled labels | 0 | not measured | not measured | not measured | not measured "
        "| 1.5 | not measured | Some CPU, 2 cores, 8.0 GB, float32 | 2026-01-02, 0123456 with changes |\n"
        f"| ceiling |{NOT_MEASURED}\n"
        "| mine | 0 | 75.0 | 50.0 | 25.0 | 50.0 | 1.5 | 1.50 of 11.00 GB | NVIDIA H100, 80.0 GB, bfloat16 "
        "| 2026-01-02, 0123456 |\n"
    )


def test_the_newest_measurement_never_mixes_code_or_settings() -> None:
    old = [row(seed=seed, average_map=0.1) for seed in (0, 1, 2)]
    again = row(seed=1, average_map=0.4, date="2026-02-01T00:00:00+00:00")
    assert [r["average_map"] for r in tables.newest_measurement([again, *old])] == [0.1, 0.4, 0.1]
    for change in ({"commit": "fedcba"}, {"settings": {"batch": 8}}, {"device": "NVIDIA H100"}, {"dirty": True}):
        newer = row(seed=1, date="2026-03-01T00:00:00+00:00", **change)
        assert tables.newest_measurement([newer, again, *old]) == [newer]


def test_tables_rewrites_between_the_markers_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    readme, results = tmp_path / "README.md", tmp_path / "results"
    readme.write_text("# Title\n<!-- bench:job -->\nold\n<!-- /bench -->\nafter <!-- a comment -->\n")
    append_row(results / "job.jsonl", row())
    assert tables.main(["--check"], (readme,), results) == 1
    assert "old" in readme.read_text()
    assert tables.main([], (readme,), results) == 0
    assert tables.main(["--check"], (readme,), results) == 0
    expected = f"# Title\n<!-- bench:job -->\n{tables.job_table([row()])}<!-- /bench -->\nafter <!-- a comment -->\n"
    assert readme.read_text() == expected
    append_row(results / "job.jsonl", row(average_map=0.9, date="2026-05-05T00:00:00+00:00"))
    assert tables.main(["--check"], (readme,), results) == 1


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("# Title\n", "<!-- bench:NAME -->"),
        ("<!-- bench:job -->\nnever closed\n", "<!-- /bench -->"),
        ("<!-- bench:jobs -->\n<!-- /bench -->\n", "no table is called jobs"),
        ("<!-- bench:job -->\nnever closed\n<!-- bench:job -->\n<!-- /bench -->\n", "<!-- /bench -->"),
    ],
    ids=["no marker", "unclosed", "unknown", "one of two unclosed"],
)
def test_markers_that_cannot_be_filled_are_refused(tmp_path: Path, text: str, says: str) -> None:
    readme = tmp_path / "README.md"
    readme.write_text(text)
    with pytest.raises(InputError, match=says) as refusal:
        tables.main([], (readme,), tmp_path)
    assert str(refusal.value).startswith(f"{readme}: ")
    assert readme.read_text() == text


def test_the_readme_shows_the_rows_of_this_repository(capsys: pytest.CaptureFixture[str]) -> None:
    status, said = tables.main(["--check"]), capsys.readouterr().out
    assert status == 0, said
    assert said == "README.md is up to date\nbench/README.md is up to date\n"


# Operators


def test_spread_is_the_median_and_what_a_fifth_lies_below_and_above() -> None:
    assert measure.spread([5.0, 1.0, 3.0, 2.0, 4.0, 6.0]) == measure.Spread(3.5, 2.0, 5.0)
    assert measure.spread([7.0]) == measure.Spread(7.0, 7.0, 7.0)


def test_rounds_alternate_and_a_slow_call_takes_part_in_the_first_ones_only() -> None:
    ran: list[str] = []
    seconds = {"fast": 0.001, "slow": 1.0}
    calls = {name: partial(ran.append, name) for name in seconds}

    def stopwatch(call: Any) -> float:
        call()
        return seconds[ran[-1]]

    samples = measure.interleaved(calls, stopwatch, rounds=5, seconds=2.0, least=3)
    assert samples == {"fast": [0.001] * 5, "slow": [1.0] * 3}
    assert ran == ["fast", "slow"] + ["fast", "slow", "slow", "fast", "fast", "slow"] + ["fast"] * 2


def test_a_child_returns_raises_or_is_ended() -> None:
    assert measure.in_child(divmod, 7, 2) == (3, 1)
    with pytest.raises(ZeroDivisionError):
        measure.in_child(divmod, 7, 0)
    assert measure.in_child(os.abort) is None  # as the system ends a process when memory runs out
    with pytest.raises(RuntimeError, match="exit ended with status 3"):
        measure.in_child(sys.exit, 3)


def test_the_peak_is_what_a_call_holds_beyond_the_start() -> None:
    held = 64 * measure.MIB
    peak = measure.in_child(measure.peak_above_start, partial(torch.ones, held, dtype=torch.uint8), torch.device("cpu"))
    assert 0.99 * held <= peak <= 1.1 * held


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_the_gate_passes_rounding_and_nothing_else(dtype: torch.dtype) -> None:
    exact = torch.randn(64, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    rounded = exact.to(dtype)
    gate.check_close("ours", [rounded, torch.arange(3)], [exact, torch.arange(3)], plain=[rounded, torch.arange(3)])
    gate.check_copies("ours", [rounded], [rounded.double()])
    worse, swapped, poisoned = rounded.clone(), rounded.flip(0), rounded.clone()
    worse[0, 0] += 8 * torch.finfo(dtype).eps * exact.abs().max()
    poisoned[5, 5] = torch.nan
    for result in (worse, swapped, poisoned, rounded[:-1]):
        with pytest.raises(gate.GateError, match=r"^ours: "):
            gate.check_close("ours", [result], [exact], plain=[rounded])
        with pytest.raises(gate.GateError, match=r"^ours: "):
            gate.check_copies("ours", [result], [rounded.double()])
    with pytest.raises(gate.GateError, match=r"^ours: "):
        gate.check_close("ours", [torch.tensor([0, 2, 1])], [torch.arange(3)])


def test_every_form_of_the_encoder_gives_the_gradients_it_says(monkeypatch: pytest.MonkeyPatch) -> None:
    case = networks.Encoded.of("tsm_r18", 40, 32, "float32", torch.device("cpu"), networks.TINY_WIDTH)
    case.gate(case.forms())
    assert len(case.chosen()) == 2 and not torch.equal(case.features("lean"), case.features("lean").flip(0))
    all_of_them = partial(networks.plain_features, case.encoder, case.frames, 8)
    monkeypatch.setattr(networks, "sampled", lambda *_: all_of_them())
    with pytest.raises(gate.GateError, match=networks.SAMPLED):
        case.gate(case.forms())


def test_the_floor_of_a_step_is_its_operations_or_its_bytes() -> None:
    work = roofs.encoder_work("tsm_r18", 64, 2, 224, 4)
    assert work.operations == pytest.approx(2 * 3 * 2 * 1.81e9, rel=0.03)  # a ResNet-18 has 1.81 G multiplications
    assert work.floor(1e12, 1e30) == work.operations / 1e12 and work.floor(1e30, 1e9) == work.bytes / 1e9
    for call, operations in roofs.rates(torch.device("cpu"), torch.float32).values():
        with FlopCounterMode(display=False) as counter:
            call()
        assert counter.get_total_flops() == operations
    case = networks.Encoded.of("tsm_r18", 16, 64, "float32", torch.device("cpu"))
    with FlopCounterMode(display=False) as counter:
        case.step("plain PyTorch")
    assert counter.get_total_flops() == roofs.encoder_work("tsm_r18", 64, 16, 64, 4).operations


QUICK = {" ".join(case.key): case for case in cases.cases(torch.device("cpu"), quick=True)}


@pytest.mark.parametrize("name", QUICK)
def test_every_form_computes_its_operator(name: str) -> None:
    ops.gate(QUICK[name].problem(torch.device("cpu")))


def test_a_form_that_is_wrong_is_not_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def backwards(x: torch.Tensor, num_frames: int, fold: int) -> torch.Tensor:
        return published_shift(x.flip(0), num_frames, fold).flip(0)

    monkeypatch.setattr(cases, "temporal_shift", backwards)
    threads = torch.get_num_threads()
    try:
        command = ["ops", "--quick", "--only", "temporal_shift", "--device", "cpu", "--results", str(tmp_path / "rows")]
        assert main(command) == 1
    finally:
        torch.set_num_threads(threads)
    said = capsys.readouterr()
    assert said.out.count("does not pass the gate, and is not measured: ours: ") == 2
    assert said.err == "error: 2 of 2 cases do not pass the gate\n"
    assert not (tmp_path / "rows").exists()


def test_operators_are_measured_without_a_decoder(tmp_path: Path) -> None:
    absent = tmp_path / "absent"
    for name in ("av", "nvidia"):  # PyAV and DALI, as a machine that only computes lacks them
        (absent / name).mkdir(parents=True)
        (absent / name / "__init__.py").write_text("raise ImportError('not here')\n")
    results = tmp_path / "ops.jsonl"
    command = ["-m", "bench", "ops", "--quick", "--device", "cpu", "--only", "temporal_shift", "--results"]
    done = subprocess.run(
        [sys.executable, *command, str(results)],
        cwd=ROOT, env=os.environ | {"PYTHONPATH": str(absent)}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    rows = read_rows(results)
    assert [(r["op"], r["dtype"], r["form"], r["ours"]) for r in rows] == [
        ("temporal_shift", dtype, form, form == ours)
        for dtype in ("float32", "bfloat16")
        for ours in (cases.form_of("temporal_shift", torch.device("cpu")),)
        for form in (ours, "PyTorch, as published")
    ]
    moved = {"float32": 2 * 16 * 7 * 7 * 512 * 4, "bfloat16": 2 * 16 * 7 * 7 * 512 * 2}
    for found in rows:
        assert found["bench"] == "ops" and found["quick"] and found["threads"] == 1 and found["versions"]["torch"]
        for passes, step in enumerate(("forward", "forward_backward"), start=1):
            timed = found[step]
            median, low, high = timed["ms"]
            assert 0 < low <= median <= high and timed["rounds"] == 3
            assert timed["bytes"] == passes * moved[found["dtype"]]
            assert timed["gbs"] == pytest.approx(timed["bytes"] / median / 1e6, rel=0.02)
            assert timed["of_roof"] == pytest.approx(timed["gbs"] / timed["roof_gbs"], rel=0.02)
            assert (timed["times_ours"][0] == 1) or not found["ours"]
        assert str(tmp_path) not in json.dumps(found)
    # Ours holds the result and the gradient; the published form zeros and copies besides.
    peaks = {(r["dtype"], r["ours"]): r["peak"] for r in rows}
    assert peaks["float32", False] >= peaks["float32", True] >= 0
    assert "PyTorch, as published" in done.stdout.splitlines()[-2]


def timed(ms: float, times_ours: float, of_roof: float | None) -> Row:
    return {"ms": [ms, ms, ms], "times_ours": [times_ours] * 3, "of_roof": of_roof}


def op_row(form: str, **changes: Any) -> Row:
    ours = form == "C++"
    return {
        "op": "temporal_shift", "shape": "7x7x8, 64 frames", "dtype": "float32", "form": form, "ours": ours,
        "forward": timed(1.0, 1.0, 0.5) if ours else timed(2.0, 2.04, 0.25),
        "forward_backward": timed(2.0, 1.0, 0.75) if ours else timed(9.0, 4.46, 0.1),
        "peak": 2**21 if ours else 5 * 2**20, "machine": "Some CPU, 2 cores, 8.0 GB", "device": "CPU, 2 cores, 8.0 GB",
        "threads": 1, "date": "2026-01-02T03:04:05+00:00", "commit": "0123456789abcdef", "dirty": False, "quick": False,
        **changes,
    }  # fmt: skip


OPS_HEADER = (
    "| operator | shape | dtype | against | forward | forward + backward | peak memory | ours, of the copy roof |\n"
    "| --- | --- | --- | --- | --- | --- | --- | --- |\n"
)


def test_table_of_operators_shows_the_newest_run_of_each_case_on_each_device() -> None:
    assert tables.ops_table([op_row("C++", quick=True)]) == "not measured\n"
    old = [op_row("C++"), op_row("eager")]
    gpu = {"device": "NVIDIA H100, 80.0 GB", "date": "2026-03-01T00:00:00+00:00", "dirty": True}
    only_forward = {"op": "soft_nms", "shape": "9", "dtype": "float64", "forward_backward": None}
    newer = [
        op_row("C++", date="2026-02-01T00:00:00+00:00", peak=1000),
        op_row("eager", date="2026-02-01T00:00:00+00:00", forward=timed(3.0, 3.0, 0.2)),
    ]
    rows = [
        *old,
        op_row("C++", **only_forward, forward=timed(1.0, 1.0, None)),
        op_row("Python", **only_forward, forward=timed(80.0, 80.0, None), peak=None),
        op_row("Triton 3.7.1", **gpu, ours=True, peak=2**21, forward=timed(0.1, 1.0, 0.91), forward_backward=None),
        op_row("eager", **gpu, forward_backward=None),
    ]
    soft_nms = "| soft_nms | 9 | float64 | Python | 80.0x |  |  |  |\n"
    on_gpu = (
        f"\nNVIDIA H100, 80.0 GB; ours is Triton 3.7.1; 2026-03-01 0123456 with changes:\n\n{OPS_HEADER}"
        "| temporal_shift | 7x7x8, 64 frames | float32 | eager | 2.0x |  | 2.5x, 5 : 2 MiB | 91% |\n"
    )
    assert tables.ops_table(rows) == (
        f"Some CPU, 2 cores, 8.0 GB, 1 thread; ours is C++; 2026-01-02 0123456:\n\n{OPS_HEADER}"
        "| temporal_shift | 7x7x8, 64 frames | float32 | eager | 2.0x | 4.5x | 2.5x, 5 : 2 MiB | 50% / 75% |\n"
        f"{soft_nms}{on_gpu}"
    )
    assert tables.ops_table([*rows, *newer]) == (
        "Some CPU, 2 cores, 8.0 GB, 1 thread; ours is C++; 2026-01-02 0123456, 2026-02-01 0123456:\n\n"
        f"{OPS_HEADER}{soft_nms}"
        "| temporal_shift | 7x7x8, 64 frames | float32 | eager | 3.0x | 4.5x | 5 : 0 MiB | 50% / 75% |\n"
        f"{on_gpu}"
    )


# Kernels


def kernel_row(kernel: str, registers: int, **changes: Any) -> Row:
    code = {"registers": registers, "spilled": 0, "shared": 0, "loads": {"16": 9, "128": 1}, "stores": {"128": 1}}
    return {
        "op": "stem", "kernel": kernel, "launches": [f"{kernel} fp32", f"{kernel} fp16"], "streams": True,
        "thin": False, "targets": {"75": code, "90": code | {"registers": registers + 8, "shared": 512}},
        "versions": {"triton": "3.7.1"}, "date": "2026-01-02T03:04:05+00:00", "commit": "0123456789abcdef",
        "dirty": False, **changes,
    }  # fmt: skip


def test_table_of_kernels_merges_the_launches_of_the_newest_run() -> None:
    assert tables.kernels_table([]) == "not measured\n"
    rows = [
        kernel_row("old", 200, date="2026-01-01T00:00:00+00:00"),
        kernel_row("stem_kernel", 40),
        kernel_row("stem_kernel", 32, launches=["one more"]),
        kernel_row("stem_kernel", 99, streams=False),
        kernel_row("stem_kernel", 255, thin=True, date="2026-02-02T00:00:00+00:00"),
    ]
    assert tables.kernels_table(rows) == (
        "Triton 3.7.1; sm_75, sm_90; 2026-01-02 0123456:\n\n"
        "| operator | kernel | layout | launches | registers | spilled bytes | shared bytes "
        "| widest load / store (bits) |\n| --- | --- | --- | --- | --- | --- | --- | --- |\n"
        "| stem | stem_kernel | channels-last, C % 64 = 0 | 3 | 32 to 48 | 0 | 0 to 512 | 128 / 128 |\n"
        "| stem | stem_kernel | others | 2 | 99 to 107 | 0 | 0 to 512 | 128 / 128 |\n"
    )


def test_rows_without_a_place_in_the_readme_are_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    readme, results = tmp_path / "README.md", tmp_path / "results"
    readme.write_text(f"<!-- bench:job -->\n{tables.job_table([])}<!-- /bench -->\n")
    assert tables.main(["--check"], (readme,), results) == 0
    append_row(results / "kernels.jsonl", kernel_row("stem_kernel", 40))
    assert tables.main(["--check"], (readme,), results) == 1
    assert "add <!-- bench:kernels --> and <!-- /bench -->" in capsys.readouterr().out
    readme.write_text(readme.read_text() + "<!-- bench:kernels -->\n<!-- /bench -->\n")
    assert tables.main([], (readme,), results) == 0
    assert tables.main(["--check"], (readme,), results) == 0


def test_launches_that_share_their_code_are_compiled_once_and_thinned_evenly() -> None:
    codes = [kernels.Code("stem", kernel, (str(n),), True) for kernel in ("a", "b") for n in range(4)]
    chosen = kernels.thinned(codes, (75, 80, 86))
    assert [(code.kernel, code.launches[0], target) for code, target in chosen if code.kernel == "b"] == [
        ("b", "0", 75), ("b", "0", 80), ("b", "0", 86),
        ("b", "1", 86), ("b", "1", 75), ("b", "2", 80), ("b", "2", 86), ("b", "3", 75), ("b", "3", 80),
    ]  # fmt: skip


@pytest.mark.parametrize(("interpreted", "says"), [("1", "TRITON_INTERPRET is set"), ("0", "Triton is not installed")])
def test_where_kernels_cannot_be_compiled_a_sentence_says_so(
    interpreted: str, says: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", interpreted)
    monkeypatch.setattr(kernels.importlib.util, "find_spec", lambda name: object() if interpreted == "1" else None)
    assert main(["kernels"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and says in error and error.count("\n") == 1


# On a GPU, without one


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
    command = [sys.executable, "-m", "bench.interpreted", "ops", "--tiny", "--device", "cpu", "--rounds", "1"]
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


def planner_step(epoch: int, videos: str, peak: int = 90, **changes: Any) -> Row:
    return {
        "epoch": epoch, "videos": list(videos), "peak": peak, "predicted": 80, "base": 40, "budget": 100, "limit": 100,
        "num_snippets": 8, "side": 16, "micro_batch": 2, "recompute": False, "reduced_from": None, "retries": 0,
        "pattern": "spatial", "time": f"2026-01-01T00:00:0{epoch}", **changes,
    }  # fmt: skip


def test_what_a_log_says_of_the_planner() -> None:
    steps = [
        planner_step(0, "ab"), planner_step(0, "cd", side=8, limit=80), planner_step(1, "ab"), planner_step(1, "aa"),
        planner_step(2, "b", pattern="temporal", side=4, retries=1, reduced_from=[8, 16]),
    ]  # fmt: skip
    found = gpu_planner.summary(steps, [{"peak": 101, "budget": 100}, {"peak": None, "budget": 1}], 95)
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
    for module in ("gpu", "gpu_planner", "ops", "memory", "step", "tables"):
        assert gpu.needs(ROOT / "bench" / f"{module}.py") <= computing, module
    assert gpu.needs(ROOT / "bench" / "synthetic.py") <= computing | {"rich"}
    assert "av" in gpu.needs(ROOT / "bench" / "data.py") & gpu.needs(ROOT / "tests" / "test_pipeline.py")
    assert gpu.needs(ROOT / "tests" / "test_soft_nms.py") == {"hypothesis", "pytest", "torch"}


def test_new_rows_are_compared_with_the_newest_old_ones() -> None:
    old = [op_row("C++", date="2026-01-01T00:00:00+00:00", peak=1), op_row("C++"), op_row("gone")]
    new = [op_row("C++", forward=timed(3.0, 1.0, 0.5), forward_backward=None), op_row("new")]
    said = against.comparison(new, old, ("op", "dtype", "form"), ops.TIMES)
    assert said.splitlines()[0] == "new / old:" and len(said.splitlines()) == 3
    assert said.splitlines()[2].split() == [
        "temporal_shift",
        "float32",
        "C++",
        "3.00x",
        "1.00x",
        "2026-01-02",
        "0123456",
    ]
    other = [op_row("C++", device="NVIDIA H100, 80.0 GB")]
    assert against.comparison(new, other, ("op", "dtype", "form"), ops.TIMES).endswith("0123456, NVIDIA H100, 80.0 GB")
    assert against.comparison(new, [], ("op",), ops.TIMES) == "new / old: no case in common"


# Decoding, evaluation


def test_decoding_is_measured_beside_the_videos_themselves(tmp_path: Path) -> None:
    results = tmp_path / "data.jsonl"
    threads = torch.get_num_threads()
    try:
        assert main(["data", "--quick", "--device", "cpu", "--results", str(results)]) == 0
    finally:
        torch.set_num_threads(threads)
    rows = read_rows(results)
    assert [row["measured"] for row in rows][:2] == ["cache", "decode"] and rows[-1]["measured"] == "share"
    forms = [row["form"] for row in rows if row["measured"] == "decode"]
    assert forms == ["frame cache, DALI", *decoders.decoders()]
    assert all(row["frames"] == 256 and row["frames_a_second"] > 0 for row in rows if row["measured"] == "decode")
    assert 0 < rows[-1]["share"] < 1
    assert tables.data_table(rows) == "not measured\n"  # one video says nothing of speed
    said = tables.data_table([row | {"quick": False} for row in rows])
    assert "| full: 32 snippets x 64 px | PyAV |" in said and "Filling the cache, once:" in said


def test_another_frame_does_not_pass_the_gate(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def late(decode: Any, path: Path, frames: Any, *arguments: Any) -> torch.Tensor:
        return decoders.squares(decode, path, np.maximum(frames - 1, 0), *arguments)

    monkeypatch.setattr(bench_data, "squares", late)
    threads = torch.get_num_threads()
    try:
        assert main(["data", "--quick", "--device", "cpu", "--results", str(tmp_path / "rows")]) == 1
    finally:
        torch.set_num_threads(threads)
    assert "error: PyAV: its pixels differ from ours by" in capsys.readouterr().err


def test_evaluation_is_measured_beside_the_official_procedure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    results = tmp_path / "eval.jsonl"
    command = ["eval", "--quick", "--rounds", "1", "--results", str(results)]
    threads = torch.get_num_threads()
    try:
        assert main(command) == 0
        rows = read_rows(results)
        assert {row["metric"] for row in rows} == {"mAP", "AR@AN"}
        assert {row["form"] for row in rows} >= {"ours", "official, without pandas"}
        monkeypatch.setattr(bench_eval, "parse_tiou", lambda text: parse_tiou("0.5,0.6"))
        wrong = official_map.mean_average_precision
        monkeypatch.setattr(official_map, "mean_average_precision", lambda *found: wrong(*found[:2], found[2] + 0.2))
        assert main([*command, "--against", str(results)]) == 1
    finally:
        torch.set_num_threads(threads)
    said = capsys.readouterr()
    assert said.err == ("error: mAP: the evaluator's result is not that of official, without pandas, bit for bit\n")
    assert len(read_rows(results)) == len(rows)
    assert "| mAP | 40 | 4,000 | ours |" in tables.eval_table([row | {"quick": False} for row in rows])


def test_all_runs_its_parts_and_compares_them(tmp_path: Path) -> None:
    old, results = tmp_path / "old", tmp_path / "new"
    threads = torch.get_num_threads()
    try:
        assert main(["eval", "--quick", "--rounds", "1", "--results", str(old / "eval.jsonl")]) == 0
    finally:
        torch.set_num_threads(threads)
    command = [sys.executable, "-m", "bench", "all", "--quick", "--part", "eval", "--results", str(results)]
    done = subprocess.run([*command, "--against", str(old)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    (found,) = read_rows(results / "all.jsonl")
    assert (found["part"], found["complete"], found["status"]) == ("eval", True, 0)
    assert len(read_rows(results / "eval.jsonl")) == 6 and "new / old:" in done.stdout


def test_what_fits_is_computed_drawn_and_kept_up_to_date(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    results, readme = tmp_path / "results", tmp_path / "README.md"
    assert main(["fits", "--results", str(results / "fits.jsonl")]) == 0
    rows = {(row["encoder"], row["videos"], row["way"]): row for row in read_rows(results / "fits.jsonl")}
    assert len(rows) == 24
    for (encoder, videos, way), row in rows.items():
        omegas = [snippets * side**2 for _, snippets, side in row["points"]]
        assert omegas == sorted(omegas)  # more memory, no lower fidelity
        plain = rows[encoder, videos, "plain PyTorch"]["full_needs"]
        assert row["full_needs"] < (0.6 * plain if way == "ours" else plain) or way == "plain PyTorch"
        if way == "ours, 8 bits":
            assert row["full_needs"] < 0.75 * rows[encoder, videos, "ours"]["full_needs"]
    # One video of the paper's full fidelity.
    assert rows["tsm_r18", 1, "ours"]["full_needs"] < 6e9 < 12e9 < rows["tsm_r18", 1, "plain PyTorch"]["full_needs"]
    readme.write_text("<!-- bench:fits -->\n<!-- /bench -->\n")
    assert tables.main(["--check"], (readme,), results) == 1
    assert tables.main([], (readme,), results) == 0 and tables.main(["--check"], (readme,), results) == 0
    figure = (results / "fits.svg").read_text()
    assert figure.startswith("<?xml") and "tsm_r50, 16 videos at once" in figure and str(tmp_path) not in figure
    assert "| tsm_r18 | 1 | ours | 1.00x |" in readme.read_text()
    measured = {
        "measured": "step", "encoder": "tsm_r18", "videos": 1, "snippets": 100, "side": 224, "form": "lean",
        "driver": 4 * 10**9, "peak": 3 * 10**9, "dtype": "bfloat16", "quick": False, "machine": "m", "device": "GPU",
        "threads": 1, "date": "2026", "commit": "abc", "dirty": False,
    }  # fmt: skip
    append_row(results / "memory.jsonl", measured)
    capsys.readouterr()
    assert tables.main(["--check"], (readme,), results) == 1
    assert "fits.svg is out of date" in capsys.readouterr().out
    tables.main([], (readme,), results)
    assert (results / "fits.svg").read_text() != figure
    assert "| 1 x 100 snippets of 224 px | bfloat16 | lean | 3.00 | 4.00 | 1.0x less |" in tables.memory_table(
        [measured]
    )


def test_growth_is_measured_beside_the_ledger(tmp_path: Path) -> None:
    results = tmp_path / "scaling.jsonl"
    threads = torch.get_num_threads()
    try:
        command = ["scaling", "--quick", "--device", "cpu", "--rounds", "1", "--results", str(results)]
        assert main(command) == 0
    finally:
        torch.set_num_threads(threads)
    rows = read_rows(results)
    assert [(row["snippets"], row["form"]) for row in rows] == [(2, form) for form in networks.WholeStep.FORMS]
    assert all(row["peak"] > 0 and row["ms"][0] > 0 for row in rows)
    assert all((row["predicted"] is None) == (row["form"] == networks.WholeStep.FORMS[0]) for row in rows)
    said = tables.scaling_table([row | {"quick": False} for row in rows])
    assert "| snippets | 2 | 32 | 1 | tsm_r18 | lean |" in said and "Exponents:" in said


def test_exponents_are_the_slopes_of_logarithms() -> None:
    rows = [
        {"along": "side", "form": form, "side": side, "ms": [2.0 * side**2], "peak": peak * side}
        for side in (64, 128, 192)
        for form, peak in (("lean", 3), ("plain", 0))
    ]
    found = tables.exponents([*rows, {"along": "encoder", "form": "lean"}])
    assert found["side", "lean"] == pytest.approx((2.0, 1.0))
    assert found["side", "plain"][0] == pytest.approx(2.0) and np.isnan(found["side", "plain"][1])
    assert set(found) == {("side", "lean"), ("side", "plain")}


# The job


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with three training videos of 6 seconds, one for validation, and their labels without durations."""
    folder = tmp_path_factory.mktemp("data")
    database = {}
    for seed, (name, subset) in enumerate({"a": "train", "b": "train", "c": "train", "d": "val"}.items()):
        picture = np.random.default_rng(seed).integers(0, 256, (48, 64, 3), dtype=np.uint8)
        with av.open(str(folder / f"{name}.mp4"), "w") as container:
            stream = container.add_stream("libx264", rate=8, options={"preset": "ultrafast", "crf": "28"})
            stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
            for i in range(48):
                frame = VideoFrame.from_ndarray(np.roll(picture, i, axis=1), format="rgb24")
                container.mux(stream.encode(frame))
            container.mux(stream.encode(None))
        segments = [{"segment": [1.0, 2.5], "label": "jump"}, {"segment": [2.25, 4.25], "label": "run"}]
        database[name] = {"subset": subset, "annotations": segments}
    (folder / "labels.json").write_text(json.dumps({"database": database}))
    return folder


def test_the_whole_job_with_true_and_with_rolled_labels(data: Path, tmp_path: Path) -> None:
    keep, results = tmp_path / "keep", tmp_path / "rows" / "job.jsonl"
    training = ["--annotations", str(data / "labels.json"), f"--videos={data}", *TINY, "--mem-budget", "4GB"]
    command = [sys.executable, "-m", "bench", "job", "--name", "tiny", "--results", str(results), "--keep", str(keep)]
    short = ["--stages", "pretrain"]  # a job that stops early has a row too, without what was not measured
    for flags in (["--"], ["--roll-labels", "--repeat-seeds", "3", "--", *short]):
        done = subprocess.run([*command, *flags, *training], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        assert "plan pretrain" in done.stdout  # the training's own words are passed on

    true, rolled = read_rows(results)
    assert [(r["name"], r["labels"], r["seed"]) for r in (true, rolled)] == [("tiny", "true", 0), ("tiny", "rolled", 3)]
    for found, folder in ((true, keep / "tiny-true-seed0"), (rolled, keep / "tiny-rolled-seed3")):
        log = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
        assert found["peak"] == max(event.get("peak") or 0 for event in log)
        assert found["budget"] == 4_000_000_000
        assert found["resident_peak"] > 100_000_000  # what importing torch alone takes
        assert found["seconds"] > found["training_seconds"] > 0 and found["seconds"] > found["prepare_seconds"] >= 0
        assert found["settings"]["epochs"] == {"pretrain": 1, "joint": 1, "head": 1}
        assert (found["settings"]["fidelity"], found["settings"]["width"]) == ([8, 32], 8)
        assert found["device"].startswith("CPU,") and found["precision"].startswith("float32")
        assert found["versions"]["torch"] and found["versions"]["numpy"]
        for private in (tmp_path, data, ROOT, Path.home()):
            assert f"{private}{os.sep}" not in json.dumps(found)

    metrics = json.loads((keep / "tiny-true-seed0" / "metrics.json").read_text())
    assert (true["average_map"], true["map_by_tiou"]) == (metrics["average_map"], metrics["map_by_tiou"])
    assert (rolled["average_map"], rolled["map_by_tiou"], set(rolled["plan"])) == (None, {}, {"pretrain"})
    plans = json.loads((keep / "tiny-true-seed0" / "plan.json").read_text())["plans"]
    assert true["plan"]["pretrain"] == {"batch": plans["pretrain"]["batch"]}
    assert true["plan"]["joint"].keys() == {"spatial", "temporal", "spatio_temporal"}
    for pattern, planned in true["plan"]["joint"].items():
        readings = {"measured", "ladder"}  # what the planner tried on the way
        assert planned == {key: value for key, value in plans["joint"][pattern].items() if key not in readings}
        assert {"rung", "cut", "batch", "peak"} <= planned.keys()
    assert "not measured" not in line_of(tables.job_table([true]), "tiny")
    assert f"--annotations labels.json --videos={data.name} " in true["command"]
    assert true["command"].endswith("--mem-budget 4GB --cache cache --seed 0 --out tiny-true-seed0")
    assert rolled["command"].endswith(
        f"--annotations tiny-rolled.json --videos {data.name} --seed 3 --out tiny-rolled-seed3"
    )

    moved = json.loads((keep / "tiny-rolled.json").read_text())["database"]
    for name in ("a", "b", "c"):  # 6 seconds: 3 later, and round the end
        assert [(s["segment"], s["label"]) for s in moved[name]["annotations"]] == [
            ([0.0, 1.25], "run"), ([4.0, 5.5], "jump"), ([5.25, 6.0], "run"),
        ]  # fmt: skip
    assert [s["segment"] for s in moved["d"]["annotations"]] == [[1.0, 2.5], [2.25, 4.25]]


def test_rolling_the_demo_set_keeps_its_preset_and_its_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "generate", partial(demo.generate, num_training=1, num_validation=1, workers=1))
    config, _ = read_flags([], cuda=lambda: False)
    flags = job.rolled(config, tmp_path / "cache", tmp_path / "copy.json")
    annotations, videos = demo.generate(tmp_path / "cache" / "demo")  # where a run with this cache looks for it
    chosen, _ = read_flags(flags, cuda=lambda: True)
    assert (chosen.preset, chosen.data.annotations, chosen.data.videos) == (
        "demo", str(tmp_path / "copy.json"), str(videos),
    )  # fmt: skip
    true = json.loads(annotations.read_text())
    copy = json.loads((tmp_path / "copy.json").read_text())
    assert copy["database"] == demo.roll_annotations(true)["database"] != true["database"]


def test_a_training_that_fails_writes_no_row_and_passes_its_status_on(data: Path, tmp_path: Path) -> None:
    results = tmp_path / "job.jsonl"
    arguments = ["--annotations", str(data / "absent.json"), "--videos", str(data), *TINY]
    assert main(["job", "--name", "x", "--results", str(results), "--", *arguments]) == 2
    assert not results.exists()


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["job", "--", "--out", "x"], "--keep"),
        (["job", "--", "--seed", "4"], "--repeat-seeds"),
        (["job", "--", "--annotations", "a.json", "--videos", "v"], "--name"),
        (["job", "--name", "a|b"], "--name"),
        (["job", "--repeat-seeds", "0,x"], "--repeat-seeds"),
        (["speed"], "no measurement is called speed"),
        (["ops", "--only", "temporal_shift,swirl"], "no operator is called 'swirl'"),
        (["ops", "--threads", "0"], "--threads"),
        (["ops", "--against", "absent.jsonl"], "--against absent.jsonl"),
        (["gpu", "--dry-run", "--part", "ops,speed"], "no part is called speed"),
        (["gpu", "--dry-run", "--minutes", "0"], "--minutes"),
        (["gpu_planner", "--device", "cpu"], "there is no GPU here"),
        (["all", "--part", "jobs"], "no part is called jobs"),
    ],
    ids=[
        "out",
        "seed",
        "no name",
        "bad name",
        "bad seeds",
        "unknown command",
        "unknown operator",
        "no thread",
        "no old rows",
        "unknown part",
        "no time",
        "planner without GPU",
        "unknown part of all",
    ],
)
def test_what_the_user_can_mend_is_one_sentence(argv: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(argv) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and says in error and error.count("\n") == 1


def test_paths_in_a_row_show_no_folder_of_the_user() -> None:
    given = ["--videos", "/home/somebody/videos/", f"--cache={ROOT}/runs/cache", "--encoder-weights=/a/b=c/r18.pth",
             "--tiou", "0.3:0.1:0.7"]  # fmt: skip
    assert job.without_paths(given) == [
        "--videos", "videos", "--cache=runs/cache", "--encoder-weights=r18.pth", "--tiou", "0.3:0.1:0.7"
    ]  # fmt: skip


def test_without_arguments_the_bench_says_what_exists(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    said = capsys.readouterr().out
    assert all(f"python -m bench {command}" in said for command in ("job", "kernels", "ops", "tables"))
    assert "bench/results" in said

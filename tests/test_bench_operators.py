"""The bench of operators: stopwatch and gate, every form of every operator, the Triton kernels' table."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from bench.__main__ import main
from bench.commands import kernels, ops, tables
from bench.peers.shift import published_shift
from bench.tools import against, cases, gate, measure, networks, roofs
from bench.tools.rows import ROOT, Row, append_row, read_rows
from bench.tools.table import Picture, Table, page, screen


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


def test_larger_chunks_give_the_same_gradients_and_a_budget_keeps_less() -> None:
    device = torch.device("cpu")
    step = networks.WholeStep.of("tsm_r18", 5, 112, "float32", device, width=networks.TINY_WIDTH)
    step.gate(networks.LARGER)
    case = networks.Encoded.of("tsm_r18", 16, 32, "float32", device, networks.TINY_WIDTH)
    forms = (networks.COMPILED, next(iter(networks.BUDGETS)))
    case.gate(forms)
    whole, less = (networks.kept_bytes(case.encoder, partial(case.features, form)) for form in forms)
    assert less < 0.6 * whole


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
    cases.gate(QUICK[name].problem(torch.device("cpu")))


def test_a_form_that_is_wrong_is_not_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def backwards(x: torch.Tensor, num_frames: int, fold: int) -> torch.Tensor:
        return published_shift(x.flip(0), num_frames, fold).flip(0)

    monkeypatch.setattr(cases, "temporal_shift", backwards)
    command = ["ops", "--quick", "--only", "temporal_shift", "--device", "cpu", "--results", str(tmp_path / "rows")]
    assert main(command) == 1
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
    assert tables.section_of("ops", [op_row("C++", quick=True)]) == "not measured\n"
    old = [op_row("C++"), op_row("eager")]
    gpu = {"device": "NVIDIA H100, 80.0 GB", "date": "2026-03-01T00:00:00+00:00", "dirty": True}
    beside_a_copy = timed(0.1, 1.0, 0.91) | {"of_copy": 0.97}
    only_forward = {"op": "soft_nms", "shape": "9", "dtype": "float64", "forward_backward": None}
    newer = [
        op_row("C++", date="2026-02-01T00:00:00+00:00", peak=1000),
        op_row("eager", date="2026-02-01T00:00:00+00:00", forward=timed(3.0, 3.0, 0.2)),
    ]
    rows = [
        *old,
        op_row("C++", **only_forward, forward=timed(1.0, 1.0, None)),
        op_row("Python", **only_forward, forward=timed(80.0, 80.0, None), peak=None),
        op_row("Triton 3.7.1", **gpu, ours=True, peak=2**21, forward=beside_a_copy, forward_backward=None),
        op_row("eager", **gpu, forward_backward=None),
    ]
    soft_nms = "| soft_nms | 9 | float64 | Python | 80.0x |  |  |  |\n"
    on_gpu = (
        f"\nNVIDIA H100, 80.0 GB; ours is Triton 3.7.1; 2026-03-01 0123456 with changes:\n\n{OPS_HEADER}"
        "| temporal_shift | 7x7x8, 64 frames | float32 | eager | 2.0x |  | 2.5x, 5 : 2 MiB | 91% (97%) |\n"
    )
    assert tables.section_of("ops", rows) == (
        f"Some CPU, 2 cores, 8.0 GB, 1 thread; ours is C++; 2026-01-02 0123456:\n\n{OPS_HEADER}"
        "| temporal_shift | 7x7x8, 64 frames | float32 | eager | 2.0x | 4.5x | 2.5x, 5 : 2 MiB | 50% / 75% |\n"
        f"{soft_nms}{on_gpu}"
    )
    assert tables.section_of("ops", [*rows, *newer]) == (
        "Some CPU, 2 cores, 8.0 GB, 1 thread; ours is C++; 2026-01-02 0123456, 2026-02-01 0123456:\n\n"
        f"{OPS_HEADER}{soft_nms}"
        "| temporal_shift | 7x7x8, 64 frames | float32 | eager | 3.0x | 4.5x | 5 : 0 MiB | 50% / 75% |\n"
        f"{on_gpu}"
    )


def test_a_table_reads_on_a_page_and_in_a_terminal() -> None:
    found = [Picture("A figure", "f.svg"), Table("Here:", ("form", "ms"), [("ours", "9"), ("theirs", "10")]), "A word."]
    assert page(found) == (
        "![A figure](f.svg)\n\nHere:\n\n| form | ms |\n| --- | --- |\n| ours | 9 |\n| theirs | 10 |\n\nA word.\n"
    )
    assert screen(found) == "A figure: f.svg\n\nHere:\nform    ms\nours     9\ntheirs  10\n\nA word."
    assert page([]) == "not measured\n" and screen([]) == "not measured"


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
    assert tables.section_of("kernels", []) == "not measured\n"
    rows = [
        kernel_row("old", 200, date="2026-01-01T00:00:00+00:00"),
        kernel_row("stem_kernel", 40),
        kernel_row("stem_kernel", 32, launches=["one more"]),
        kernel_row("stem_kernel", 99, streams=False),
        kernel_row("stem_kernel", 255, thin=True, date="2026-02-02T00:00:00+00:00"),
    ]
    assert tables.section_of("kernels", rows) == (
        "Triton 3.7.1; sm_75, sm_90; 2026-01-02 0123456:\n\n"
        "| operator | kernel | layout | launches | registers | spilled bytes | shared bytes "
        "| widest load / store (bits) |\n| --- | --- | --- | --- | --- | --- | --- | --- |\n"
        "| stem | stem_kernel | channels-last, C % 64 = 0 | 3 | 32 to 48 | 0 | 0 to 512 | 128 / 128 |\n"
        "| stem | stem_kernel | others | 2 | 99 to 107 | 0 | 0 to 512 | 128 / 128 |\n"
    )


def test_rows_without_a_place_in_the_readme_are_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    readme, results = tmp_path / "README.md", tmp_path / "results"
    readme.write_text(f"<!-- bench:job -->\n{tables.section_of('job', [])}<!-- /bench -->\n")
    assert tables.main(["--check"], (readme,), results) == 0
    append_row(results / "kernels.jsonl", kernel_row("stem_kernel", 40))
    assert tables.main(["--check"], (readme,), results) == 1
    assert "add <!-- bench:kernels --> and <!-- /bench -->" in capsys.readouterr().out
    readme.write_text(readme.read_text() + "<!-- bench:kernels -->\n<!-- /bench -->\n")
    assert tables.main([], (readme,), results) == 0
    assert tables.main(["--check"], (readme,), results) == 0


def test_launches_that_share_their_code_are_compiled_once_and_thinned_evenly() -> None:
    codes = [kernels.Code("stem", kernel, (str(n),), True, (75, 80, 86)) for kernel in ("a", "b") for n in range(4)]
    chosen = kernels.thinned(codes)
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

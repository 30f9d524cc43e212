"""In which numbers a device computes: what it has, what was asked for, what a run began with."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lofi_fast import precision as precisions
from lofi_fast.config import PrecisionName
from lofi_fast.errors import InputError
from lofi_fast.precision import (
    as_trained,
    choose_device,
    choose_precision,
    cpu_computes_bf16,
    cpu_multiplies_bf16,
    going_on_in,
    resolved,
)


def test_a_cpu_computes_in_fp32_and_says_so() -> None:
    precision = choose_precision(torch.device("cpu"))
    assert precision.dtype is torch.float32 and not precision.scaled and str(precision) == "float32 (a CPU)"
    with precision.autocast(torch.device("cpu")):
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype is torch.float32


def this_cpu_has(monkeypatch: pytest.MonkeyPatch, flags: str, limit: str) -> None:
    """Flags as Linux shows them, and ONEDNN_MAX_CPU_ISA."""
    key = "Features" if "asimd" in flags else "flags\t"
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", limit)
    monkeypatch.setattr(Path, "read_text", lambda path: f"processor\t: 0\n{key}\t: {flags}\nbugs\t\t:\n")


@pytest.mark.parametrize(("limit", "flags", "expected"), [
    ("", "fma avx2 avx512f avx512_bf16", False),  # has it, and multiplies it at half the rate of fp32
    ("", "fma avx2 amx_bf16 amx_tile", True),
    ("", "fma avx2 avx512f avx512_bf16 amx_bf16 amx_tile", True),
    ("", "fma avx2 avx512f avx512_vnni", False),
    ("AVX512_CORE", "avx512f avx512_bf16 amx_bf16", False),
    ("avx512_core_bf16", "avx512f avx512_bf16 amx_bf16", False),
    ("avx512_core_amx", "avx512f avx512_bf16 amx_bf16", True),
])  # fmt: skip
def test_a_cpu_computes_in_bf16_where_it_multiplies_it(
    monkeypatch: pytest.MonkeyPatch, limit: str, flags: str, expected: bool
) -> None:
    this_cpu_has(monkeypatch, flags, limit)
    assert cpu_multiplies_bf16.__wrapped__() is expected


AVX512 = "sse2 avx2 avx512f avx512bw avx512dq avx512vl"


@pytest.mark.parametrize(("limit", "flags", "expected"), [
    ("", "sse2 fma avx2", False),
    ("", AVX512, True),
    ("AVX512_CORE", AVX512, True),
    ("avx2", AVX512, False),
    ("", "sse2 avx2 avx512f", False),
    ("", "sse2 avx2 avx_vnni avx_ne_convert", True),
    ("", "fp asimd fphp i8mm bf16", True),
    ("", "fp asimd fphp", False),
    ("", "", True),  # cannot be told
])  # fmt: skip
def test_a_cpu_computes_in_bf16_where_onednn_does(
    monkeypatch: pytest.MonkeyPatch, limit: str, flags: str, expected: bool
) -> None:
    this_cpu_has(monkeypatch, flags, limit)
    assert cpu_computes_bf16.__wrapped__() is expected


def test_what_is_said_of_this_cpu_is_what_onednn_says() -> None:
    assert cpu_computes_bf16() is torch.ops.mkldnn._is_mkldnn_bf16_supported()


@pytest.fixture
def computes_bf16(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precisions, "cpu_computes_bf16", lambda: True)


def test_without_bf16_a_run_is_refused_or_goes_on_and_a_detector_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precisions, "cpu_computes_bf16", lambda: False)
    with pytest.raises(InputError, match=r"--precision bf16: on this CPU .*; give fp32 or auto"):
        resolved("bf16", None)
    cpu = torch.device("cpu")
    assert as_trained(cpu, "bf16").dtype is as_trained(cpu, "fp16").dtype is torch.float32
    precision, note = going_on_in(cpu, "auto", "bfloat16 (asked for)")
    assert precision.dtype is torch.float32
    assert note is not None and "which this device does not multiply: it goes on in float32" in note


@pytest.mark.usefixtures("computes_bf16")
def test_a_detector_keeps_the_precision_of_its_run() -> None:
    assert as_trained(torch.device("cpu"), "bf16").dtype is torch.bfloat16
    assert as_trained(torch.device("cpu"), "fp32").dtype is torch.float32


@pytest.mark.usefixtures("computes_bf16")
@pytest.mark.parametrize(("asked", "capability", "expected"), [
    ("auto", None, "fp32"), ("bf16", None, "bf16"), ("fp32", None, "fp32"),
    ("auto", (7, 5), "fp16"), ("auto", (8, 6), "bf16"), ("fp16", (9, 0), "fp16"), ("fp32", (9, 0), "fp32"),
])  # fmt: skip
def test_precision_is_what_was_asked_for(
    asked: PrecisionName, capability: tuple[int, int] | None, expected: PrecisionName
) -> None:
    assert resolved(asked, capability)[0] == expected


@pytest.mark.parametrize(("asked", "capability"), [("fp16", None), ("bf16", (7, 5))])
def test_a_precision_that_the_device_has_not_is_refused(
    asked: PrecisionName, capability: tuple[int, int] | None
) -> None:
    with pytest.raises(InputError, match=f"--precision {asked}: .*; give"):
        resolved(asked, capability)


@pytest.mark.usefixtures("computes_bf16")
@pytest.mark.parametrize(("asked", "before", "dtype", "said"), [
    ("auto", None, torch.float32, None),
    ("auto", "float32 (a CPU)", torch.float32, None),
    ("auto", "bfloat16 (compute capability 8.6)", torch.bfloat16, None),
    ("auto", "float16 (compute capability 7.5; gradients are scaled)", torch.float32, "began in float16, which this"),
    ("fp32", "bfloat16 (compute capability 8.6)", torch.float32, "began in bfloat16, and goes on in float32"),
])  # fmt: skip
def test_a_resumed_run_keeps_its_precision_or_says_so(
    asked: PrecisionName, before: str | None, dtype: torch.dtype, said: str | None
) -> None:
    precision, note = going_on_in(torch.device("cpu"), asked, before)
    assert precision.dtype is dtype
    assert note is None if said is None else note is not None and said in note


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is at hand")
def test_a_gpu_that_is_not_there_is_refused() -> None:
    assert choose_device("auto").type == "cpu"
    with pytest.raises(InputError, match="--device cpu"):
        choose_device("cuda")


@pytest.mark.gpu
def test_a_gpu_computes_in_half_precision() -> None:
    precision = choose_precision(torch.device("cuda"))
    recent = torch.cuda.get_device_capability() >= (8, 0)
    assert precision.dtype is (torch.bfloat16 if recent else torch.float16) and precision.scaled is not recent

"""Whether the software fits the card: the sentences where it does not, as a machine without a card can tell."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from lofi_fast import gpu
from lofi_fast.gpu import Build, Card

CUDA_13 = Build("2.13.0+cu130", (13, 0), ("sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120", "compute_120"))
CUDA_12 = Build("2.13.0+cu126", (12, 6), ("sm_50", "sm_60", "sm_70", "sm_75", "sm_80", "sm_86", "sm_90"))
T4 = Card("Tesla T4", (7, 5), (13, 0), "580.65")
V100 = Card("Tesla V100", (7, 0), (13, 0), "580.65")


@pytest.mark.parametrize(
    ("capability", "runs"),
    [((6, 1), False), ((7, 0), False), ((7, 5), True), ((8, 9), True), ((10, 3), True), ((11, 0), False)],
)
def test_code_runs_on_later_cards_of_its_major_version(capability: tuple[int, int], runs: bool) -> None:
    assert CUDA_13.runs_on(capability) is runs


def test_code_that_the_driver_compiles_runs_on_all_later_cards() -> None:
    assert CUDA_13.runs_on((13, 0)) and not CUDA_12.runs_on((12, 0))
    assert replace(CUDA_12, architectures=("sm_90a",)).runs_on((9, 0))


def test_a_build_without_cuda_is_named_with_what_fits_the_card() -> None:
    cpu = Build("2.13.0+cpu", None, ())
    assert gpu.misfit(T4, cpu) == (
        "PyTorch 2.13.0+cpu is built without CUDA; install a build for CUDA 13, with nvidia-dali-cuda130"
    )
    old = replace(T4, cuda=(12, 4), driver="550.54")
    assert gpu.misfit(old, cpu).endswith("install a build for CUDA 12, with nvidia-dali-cuda120")


def test_a_card_that_cuda_13_has_dropped_is_told_what_fits_it() -> None:
    said = gpu.misfit(V100, CUDA_13)
    assert "no code for its compute capability 7.0" in said
    assert said.endswith("install a build for CUDA 12.6, with nvidia-dali-cuda120")


def test_a_driver_that_is_too_old_is_named() -> None:
    said = gpu.misfit(replace(T4, cuda=(12, 4), driver="550.54"), CUDA_13)
    assert "driver 550.54 offers CUDA 12.4" in said and "built for 13.0" in said and "series 580 or later" in said
    assert "\n" not in said


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is at hand")
def test_nothing_is_said_where_there_is_no_card() -> None:
    assert gpu.cards() == [] and gpu.unused() == ""


def test_hidden_cards_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "cards", lambda: [T4])
    for hidden in ("", "-1"):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", hidden)
        assert gpu.unused() == ""
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    assert gpu.unused().startswith("Tesla T4 is here, but PyTorch cannot use it: ")


def test_what_triton_needs_to_compile(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr("sysconfig.get_path", lambda name: str(tmp_path))
    compiler, headers = gpu.missing_to_compile()
    assert "neither gcc nor clang is on PATH" in compiler and f"{tmp_path / 'Python.h'} is not there" in headers
    monkeypatch.setenv("CC", "/opt/none/cc")
    assert "CC names /opt/none/cc" in gpu.missing_to_compile()[0]
    (tmp_path / "Python.h").touch()
    (tmp_path / "gcc").touch(0o755)
    monkeypatch.delenv("CC")
    assert gpu.missing_to_compile() == []


def test_each_version_of_cuda_has_an_extra_with_its_package() -> None:
    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
    asked = project["optional-dependencies"]
    extras = {f"cuda{major}": [package] for major, package in gpu.DALI.items()}
    of_cuda = {name: lines for name, lines in asked.items() if name.startswith("cuda")}
    assert {name: [re.split("[>;]", line)[0] for line in lines] for name, lines in of_cuda.items()} == extras
    assert not any("dali" in line for line in project["dependencies"])


@pytest.mark.gpu
def test_a_card_that_fits_passes_all_checks() -> None:
    device = torch.device("cuda")
    gpu.check_torch(device)
    gpu.check_dali(device)
    gpu.check_triton(device)


@pytest.mark.gpu
def test_without_a_compiler_one_sentence_says_so(tmp_path: Path) -> None:
    code = (
        "import torch\nfrom lofi_fast import gpu\nfrom lofi_fast.errors import InputError\n"
        "try:\n    gpu.check_triton(torch.device('cuda'))\nexcept InputError as error:\n    print(error)"
    )
    bare = {key: value for key, value in os.environ.items() if key not in ("CC", "TRITON_CACHE_DIR")}
    bare |= {"PATH": str(tmp_path), "TRITON_CACHE_DIR": str(tmp_path / "cache")}
    done = subprocess.run([sys.executable, "-c", code], env=bare, capture_output=True, text=True)
    assert "needs a C compiler (neither gcc nor clang is on PATH)" in done.stdout and done.stdout.count("\n") == 1

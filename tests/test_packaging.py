"""Wheels are built from a copy of the sources, with and without a toolchain, and used from where they were unpacked."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = ["LICENSE", "MANIFEST.in", "CMakeLists.txt", "pyproject.toml", "setup.py", "constraints.txt", "Makefile"]

USE = """
import torch
from lofi_fast import kernels
print(kernels.__file__)
print(kernels.native_available())
print(kernels.library.forms["cpu"]["soft_nms"])
print(kernels.soft_nms(torch.tensor([[0.0, 1.0], [0.0, 1.0]]), torch.tensor([0.2, 0.5]))[0].tolist())
from lofi_fast.memory import allocator
print(allocator.install())
"""


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """The sources as a clone has them: the kernels behind their link, and nothing built."""
    copy = tmp_path / "source"
    copy.mkdir()
    for name in SOURCES:
        shutil.copy2(ROOT / name, copy)
    unbuilt = shutil.ignore_patterns("__pycache__", "*.so")
    for name in ("lofi_fast", "kernels"):
        shutil.copytree(ROOT / name, copy / name, symlinks=True, ignore=unbuilt)
    assert (copy / "lofi_fast" / "kernels").is_symlink()
    return copy


def build(source: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pip", "wheel", "-v", "--no-build-isolation", "--no-deps", "--no-index"]
    return subprocess.run(
        [*command, "--wheel-dir", source / "dist", source],
        env=os.environ | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def use(wheel: Path, folder: Path, native: str = "auto") -> subprocess.CompletedProcess[str]:
    """Unpack the wheel and run an operator from there, away from this source tree."""
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    environment = os.environ | {"PYTHONPATH": str(folder), "LOFI_FAST_NATIVE": native}
    return subprocess.run(
        [sys.executable, "-P", "-c", USE], env=environment, cwd=folder, capture_output=True, text=True
    )


def wheel_of(source: Path) -> Path:
    (wheel,) = (source / "dist").glob("*.whl")
    return wheel


def test_native_wheel_holds_real_files_and_runs_cpp(source: Path, tmp_path: Path) -> None:
    done = build(source, LOFI_FAST_NATIVE="1")
    assert done.returncode == 0, done.stdout
    wheel = wheel_of(source)
    assert "-py3-none-" in wheel.name and not wheel.name.endswith("-any.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    assert {"lofi_fast/kernels/_native.so", "lofi_fast/kernels/soft_nms/reference.py"} <= names
    assert ("lofi_fast/memory/_cpu_allocator.so" in names) == sys.platform.startswith("linux")
    assert all(name.startswith(("lofi_fast/", "lofi_fast-")) for name in names)
    used = use(wheel, tmp_path / "installed", native="1")
    assert used.returncode == 0, used.stderr
    kernels_file, available, form, order, allocator = used.stdout.splitlines()
    assert kernels_file == str(tmp_path / "installed" / "lofi_fast" / "kernels" / "__init__.py")
    assert available == "True"
    assert form == "C++"
    assert order == "[1, 0]"
    assert allocator == "None" or not sys.platform.startswith("linux")


@pytest.mark.parametrize(
    ("setting", "said"),
    [("0", "LOFI_FAST_NATIVE=0, installing pure Python"), ("auto", "installing pure Python, the C++ kernels need")],
    ids=["switched_off", "auto"],
)
def test_without_a_compiler_the_wheel_is_pure_python_and_says_so(
    source: Path, tmp_path: Path, setting: str, said: str
) -> None:
    done = build(source, LOFI_FAST_NATIVE=setting, PATH=str(tmp_path), CXX="")
    assert done.returncode == 0, done.stdout
    assert said in done.stdout
    assert wheel_of(source).name.endswith("-py3-none-any.whl")
    used = use(wheel_of(source), tmp_path / "installed")
    assert used.returncode == 0, used.stderr
    _, available, form, order, allocator = used.stdout.splitlines()
    assert available == "False"
    assert form == "reference (not built)"
    assert used.stderr.count("the C++ kernels are not built") == 1
    assert order == "[1, 0]"
    assert "the CPU allocator is" in allocator  # not built, or written for Linux


def test_the_report_is_written_from_a_wheel(source: Path, tmp_path: Path) -> None:
    """Its template and its stylesheet are files beside the code."""
    assert build(source, LOFI_FAST_NATIVE="0").returncode == 0
    with zipfile.ZipFile(wheel_of(source)) as archive:
        archive.extractall(tmp_path / "installed")
    run = tmp_path / "run"
    run.mkdir()
    (run / "metrics.json").write_text('{"average_map": 0.5, "map_by_tiou": {"0.5": 0.5}}')
    done = subprocess.run(
        [sys.executable, "-P", "-m", "lofi_fast.report", run],
        env=os.environ | {"PYTHONPATH": str(tmp_path / "installed")}, cwd=tmp_path, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    text = (run / "report.html").read_text()
    assert "50.00 %" in text and "prefers-color-scheme: dark" in text


def test_a_pure_wheel_refuses_to_run_when_cpp_is_demanded(source: Path, tmp_path: Path) -> None:
    assert build(source, LOFI_FAST_NATIVE="0").returncode == 0
    used = use(wheel_of(source), tmp_path / "installed", native="1")
    assert used.returncode != 0
    assert "ImportError: LOFI_FAST_NATIVE=1, but the C++ kernels are not built" in used.stderr


def test_a_broken_library_is_an_error_and_not_a_fall_back(source: Path, tmp_path: Path) -> None:
    assert build(source, LOFI_FAST_NATIVE="0").returncode == 0
    broken = tmp_path / "installed" / "lofi_fast" / "kernels" / "_native.so"
    broken.parent.mkdir(parents=True)
    broken.write_text("not a library")
    used = use(wheel_of(source), tmp_path / "installed")
    assert used.returncode != 0
    assert f"cannot load {broken}" in used.stderr


def test_native_without_a_compiler_is_an_error(source: Path, tmp_path: Path) -> None:
    done = build(source, LOFI_FAST_NATIVE="1", PATH=str(tmp_path), CXX="")
    assert done.returncode != 0
    assert "cannot be built without a C++ compiler" in done.stdout


@pytest.mark.parametrize("setting", ["1", "auto"])
def test_a_failing_build_is_an_error_only_when_asked_for(source: Path, setting: str) -> None:
    (source / "kernels" / "soft_nms" / "op.cpp").write_text("#error broken on purpose\n")
    done = build(source, LOFI_FAST_NATIVE=setting)
    assert "the C++ kernels do not build" in done.stdout
    assert (done.returncode == 0) == (setting == "auto"), done.stdout


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the CPU allocator is built on Linux alone")
def test_the_kernels_install_where_the_allocator_does_not_build(source: Path, tmp_path: Path) -> None:
    (source / "lofi_fast" / "memory" / "allocator.cpp").write_text("#error c10 has changed\n")
    done = build(source, LOFI_FAST_NATIVE="1")
    assert done.returncode == 0, done.stdout
    assert "the CPU allocator does not build" in done.stdout
    used = use(wheel_of(source), tmp_path / "installed", native="1")
    assert used.returncode == 0, used.stderr
    *_, form, order, allocator = used.stdout.splitlines()
    assert form == "C++" and order == "[1, 0]"
    assert "the CPU allocator is not built" in allocator


def test_a_source_distribution_holds_what_the_build_needs(source: Path) -> None:
    code = "import setuptools.build_meta as backend; backend.build_sdist('dist')"
    done = subprocess.run([sys.executable, "-c", code], cwd=source, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (sdist,) = (source / "dist").glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    sources = [path.relative_to(source) for path in (source / "lofi_fast").glob("**/*.cpp")]
    kernels = [path.relative_to(source) for path in (source / "lofi_fast" / "kernels").glob("**/*.[ch]*")]
    report = {"lofi_fast/report/page.html.jinja", "lofi_fast/report/style.css"}
    assert {str(path) for path in sources + kernels} | report | {"CMakeLists.txt", "setup.py"} <= names

"""Wheels are built from a copy of the sources, with and without a toolchain, and used from where they were unpacked."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

import build_backend
import lofi_fast

ROOT = Path(__file__).parents[1]
SOURCES = ["LICENSE", "README.md", "CITATION.cff", "MANIFEST.in", "CMakeLists.txt", "pyproject.toml", "setup.py",
           "build_backend.py", "constraints.txt", "Makefile"]  # fmt: skip

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


def leave_one_kernel(source: Path) -> Path:
    """Leave the C++ of soft_nms alone, which is compiled in seconds."""
    for path in (source / "kernels").glob("*/op.cpp"):
        if path.parent.name != "soft_nms":
            path.unlink()
    return source / "kernels" / "soft_nms" / "op.cpp"


def sdist_of(source: Path) -> Path:
    code = "import build_backend; build_backend.build_sdist('dist')"
    done = subprocess.run([sys.executable, "-c", code], cwd=source, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (sdist,) = (source / "dist").glob("*.tar.gz")
    return sdist


def build(source: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """The wheel of a folder, or of a source distribution, beside it."""
    command = [sys.executable, "-m", "pip", "wheel", "-v", "--no-build-isolation", "--no-deps", "--no-index"]
    dist = source / "dist" if source.is_dir() else source.parent
    return subprocess.run(
        [*command, "--wheel-dir", dist, source],
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
    done = build(sdist_of(source), LOFI_FAST_NATIVE="1")
    assert done.returncode == 0, done.stdout
    wheel = wheel_of(source)
    assert "-py3-none-" in wheel.name and not wheel.name.endswith("-any.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    assert {"lofi_fast/kernels/_native.so", "lofi_fast/kernels/soft_nms/reference.py", "lofi_fast/py.typed"} <= names
    assert "lofi_fast/kernels/not_built.txt" not in names
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
    ("setting", "said", "why"),
    [
        ("0", "LOFI_FAST_NATIVE=0, installing pure Python", "LOFI_FAST_NATIVE was 0 at the installation"),
        ("auto", "installing pure Python, the C++ kernels need", "at the installation they lacked a C++ compiler"),
    ],
    ids=["switched_off", "auto"],
)
def test_without_a_compiler_the_wheel_is_pure_python_and_says_so(
    source: Path, tmp_path: Path, setting: str, said: str, why: str
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
    assert f"({why})" in used.stderr
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
def test_a_failing_build_is_an_error_only_when_asked_for(source: Path, tmp_path: Path, setting: str) -> None:
    leave_one_kernel(source).write_text("#error broken on purpose\n")
    done = build(source, LOFI_FAST_NATIVE=setting)
    assert "the C++ kernels do not build" in done.stdout
    assert (done.returncode == 0) == (setting == "auto"), done.stdout
    if setting == "auto":
        assert wheel_of(source).name.endswith("-py3-none-any.whl")
        used = use(wheel_of(source), tmp_path / "installed")
        assert used.returncode == 0 and "(at the installation their build failed" in used.stderr


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the CPU allocator is built on Linux alone")
def test_the_kernels_install_where_the_allocator_does_not_build(source: Path, tmp_path: Path) -> None:
    leave_one_kernel(source)
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
    with tarfile.open(sdist_of(source)) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    sources = [path.relative_to(source) for path in (source / "lofi_fast").glob("**/*.cpp")]
    kernels = [path.relative_to(source) for path in (source / "lofi_fast" / "kernels").glob("**/*.[ch]*")]
    report = {"lofi_fast/report/page.html.jinja", "lofi_fast/report/style.css"}
    top = {"CMakeLists.txt", "setup.py", "build_backend.py", "CITATION.cff", "lofi_fast/py.typed"}
    assert {str(path) for path in sources + kernels} | report | top <= names


def test_build_makes_both_distributions(source: Path) -> None:
    """What `make dist` runs: the wheel is made from the source distribution."""
    pytest.importorskip("build", reason="`make test` installs build")
    done = subprocess.run(
        [sys.executable, "-m", "build", "--no-isolation", source],
        env=os.environ | {"LOFI_FAST_NATIVE": "0"}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    name = f"lofi_fast-{lofi_fast.__version__}"
    assert {path.name for path in (source / "dist").iterdir()} == {f"{name}.tar.gz", f"{name}-py3-none-any.whl"}
    with zipfile.ZipFile(source / "dist" / f"{name}-py3-none-any.whl") as archive:
        metadata = archive.read(f"{name}.dist-info/METADATA").decode()
    extras = re.findall(r"^Provides-Extra: (.+)$", metadata, re.MULTILINE)
    assert {"cuda12", "cuda13", "h5"} <= set(extras) and "License-Expression: Apache-2.0" in metadata


def test_the_citation_is_of_this_version() -> None:
    (version,) = re.findall(r"^version: (.+)$", (ROOT / "CITATION.cff").read_text(), re.MULTILINE)
    assert version == lofi_fast.__version__


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of all programs: python, a compiler, and make; with the torch of this environment."""
    programs = tmp_path / "bin"
    programs.mkdir()
    program(programs / "c++", "c++ 13.2")
    program(programs / "make", "GNU Make 4.3")
    monkeypatch.setattr(sys, "executable", str(programs / "python"))
    monkeypatch.setenv("PATH", str(programs))
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.delenv("LOFI_FAST_NATIVE", raising=False)
    return programs


def program(path: Path, version: str) -> None:
    path.write_text(f"#!/bin/sh\n{f'echo {version}' if version else 'exit 1'}\n")
    path.chmod(0o755)


@pytest.mark.parametrize(
    ("version", "needed"),
    [("cmake version 3.18.4", True), ("", True), ("cmake version 3.22.1", False)],
    ids=["too_old", "does_not_run", "oldest"],
)
def test_cmake_is_fetched_where_it_alone_is_missing(machine: Path, version: str, needed: bool) -> None:
    program(machine / "cmake", version)
    assert build_backend.missing() == (["cmake 3.22 or later"] if needed else [])
    assert ("cmake>=3.22" in build_backend.get_requires_for_build_wheel()) == needed


def test_nothing_is_fetched_for_kernels_that_cannot_be_built(machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (machine / "make").unlink()
    assert build_backend._programs() == ["cmake>=3.22", "ninja"]
    monkeypatch.setenv("LOFI_FAST_NATIVE", "0")
    assert build_backend._programs() == []
    monkeypatch.delenv("LOFI_FAST_NATIVE")
    (machine / "c++").unlink()
    assert build_backend._programs() == []
    assert build_backend.missing() == ["a C++ compiler", "cmake 3.22 or later", "ninja or make"]


def test_an_isolated_build_sees_the_torch_that_is_installed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import torch

    monkeypatch.setattr(sys, "path", [])
    assert build_backend.torch_folder() == Path(torch.__file__).parent
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "version.py").write_text("__version__ = '2.8.0+cpu'\n")
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    assert build_backend.missing()[0] == "torch 2.11 or later (this is 2.8.0+cpu)"


def test_a_setuptools_that_is_too_old_is_named(tmp_path: Path) -> None:
    (tmp_path / "setuptools.py").write_text("__version__ = '65.5.0'\n")
    done = subprocess.run(
        [sys.executable, "-c", "import build_backend"], cwd=ROOT, capture_output=True, text=True,
        env=os.environ | {"PYTHONPATH": str(tmp_path), "PYTHONSAFEPATH": ""},
    )  # fmt: skip
    assert done.returncode == 1
    assert done.stderr == (
        "setuptools 65.5.0 is too old to build lofi_fast: leave out --no-build-isolation, "
        'or pip install "setuptools>=77"\n'
    )

"""What pip and build call: setuptools, and cmake beside it where the C++ kernels can be built and cmake is not here.

``missing`` says what is lacking for the kernels. It looks at the environment that lofi_fast is installed into, which an
isolated build of pip sees too: `pip install .` builds the kernels against the torch that is there.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

try:
    import setuptools
except ModuleNotFoundError:
    sys.exit('lofi_fast is built by setuptools, which is not here: pip install "setuptools>=77"')
if int(setuptools.__version__.partition(".")[0]) < 77:
    sys.exit(
        f"setuptools {setuptools.__version__} is too old to build lofi_fast: "
        'leave out --no-build-isolation, or pip install "setuptools>=77"'
    )

from setuptools import build_meta
from setuptools.build_meta import *  # noqa: F403 (the hooks that are not changed below)

OLDEST_CMAKE = (3, 22)
OLDEST_TORCH = (2, 11)


def native_setting() -> str:
    """LOFI_FAST_NATIVE: auto, 1 or 0."""
    setting = os.environ.get("LOFI_FAST_NATIVE", "auto")
    if setting not in ("auto", "1", "0"):
        sys.exit(f"LOFI_FAST_NATIVE is {setting!r}; it must be auto, 1 or 0")
    return setting


def tool(name: str) -> str | None:
    """A program that runs, beside Python (pip installs cmake and ninja there, on PATH or not) or on PATH.

    A program of a package that an isolated build does not see is there, and does not run.
    """
    for folder in (os.path.dirname(sys.executable), *os.environ.get("PATH", "").split(os.pathsep)):
        found = shutil.which(name, path=folder)
        if found and _version(found) >= (OLDEST_CMAKE if name == "cmake" else ()):
            return found
    return None


def _version(program: str) -> tuple[int, ...]:
    """(-1,) of a program that does not run."""
    try:
        said = subprocess.run([program, "--version"], capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return (-1,)
    return _numbers(said)


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(map(int, re.findall(r"\d+", text)[:2]))


def compiler() -> str | None:
    """The C++ compiler that CMake would take: CXX, or one of the usual names."""
    names = [os.environ.get("CXX", "").split(" ")[0], "c++", "g++", "clang++"]
    return next((found for name in names if name and (found := shutil.which(name))), None)


def torch_folder() -> Path | None:
    """The installed torch, whose headers the kernels are built against."""
    for place in dict.fromkeys((*sys.path, sysconfig.get_path("purelib"), sysconfig.get_path("platlib"))):
        folder = Path(place, "torch")
        if (folder / "version.py").exists():
            return folder
    return None


def _torch_version(folder: Path) -> str | None:
    found = re.search(r"__version__ = '(.+?)'", (folder / "version.py").read_text())
    return found and found[1]


def missing() -> list[str]:
    """What the C++ kernels cannot be built without and is not here."""
    lacking = []
    folder = torch_folder()
    if folder is None:
        lacking.append("torch")
    elif (found := _torch_version(folder)) and _numbers(found) < OLDEST_TORCH:
        lacking.append(f"torch {'.'.join(map(str, OLDEST_TORCH))} or later (this is {found})")
    if compiler() is None:
        lacking.append("a C++ compiler")
    if tool("cmake") is None:
        lacking.append(f"cmake {'.'.join(map(str, OLDEST_CMAKE))} or later")
    if tool("ninja") is None and tool("make") is None:
        lacking.append("ninja or make")
    return lacking


def _programs() -> list[str]:
    """The packages of programs that are to be fetched: none where they alone would not do."""
    lacking = [] if native_setting() == "0" else missing()
    packages = {"cmake": "cmake>=3.22", "ninja": "ninja"}
    named = [packages.get(piece.split(" ")[0]) for piece in lacking]
    return [] if None in named else [package for package in named if package is not None]


def get_requires_for_build_wheel(config_settings: dict[str, object] | None = None) -> list[str]:
    return [*build_meta.get_requires_for_build_wheel(config_settings), *_programs()]


def get_requires_for_build_editable(config_settings: dict[str, object] | None = None) -> list[str]:
    return [*build_meta.get_requires_for_build_editable(config_settings), *_programs()]

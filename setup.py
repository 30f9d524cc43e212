"""Builds the C++ kernels and the CPU allocator with CMake as a part of the package; pyproject.toml holds the rest.

LOFI_FAST_NATIVE=auto (default) installs pure Python, and says so, where a tool is missing or the build fails; 1 makes
either an error; 0 builds nothing. Install with --no-build-isolation: the build reads the installed torch's headers.

The allocator is for Linux, and against an interface of torch that may change: where it does not build, a warning says
so under 1 too, and the kernels are installed without it.
"""

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

ROOT = Path(__file__).resolve().parent


def tool(name: str) -> str | None:
    """A program beside the running Python (pip installs cmake and ninja there, on PATH or not), or on PATH."""
    return shutil.which(name, path=os.pathsep.join([os.path.dirname(sys.executable), os.environ.get("PATH", "")]))


def missing_tools() -> list[str]:
    missing = []
    if tool("cmake") is None:
        missing.append("cmake")
    if tool("ninja") is None and tool("make") is None:
        missing.append("ninja")
    if tool(os.environ.get("CXX", "").split(" ")[0] or "c++") is None and tool("g++") is None:
        missing.append("a C++ compiler")
    if importlib.util.find_spec("torch") is None:
        missing.append("torch (is --no-build-isolation missing?)")
    return missing


def native_extensions() -> list[Extension]:
    setting = os.environ.get("LOFI_FAST_NATIVE", "auto")
    if setting not in ("auto", "1", "0"):
        sys.exit(f"LOFI_FAST_NATIVE is {setting!r}; it must be auto, 1 or 0")
    if setting == "0":
        print("lofi_fast: LOFI_FAST_NATIVE=0, installing pure Python")
        return []
    if missing := missing_tools():
        if setting == "1":
            sys.exit(f"LOFI_FAST_NATIVE=1, but the C++ kernels cannot be built without {', '.join(missing)}")
        print(f"lofi_fast: installing pure Python, the C++ kernels need {', '.join(missing)}")
        return []
    # CMakeLists.txt knows the sources. An optional extension that fails to build is a warning.
    extensions = [Extension("lofi_fast.kernels._native", sources=[], optional=setting == "auto")]
    if sys.platform.startswith("linux"):
        extensions.append(Extension("lofi_fast.memory._cpu_allocator", sources=[], optional=True))
    return extensions


class CMakeBuild(build_ext):
    def get_ext_filename(self, fullname: str) -> str:
        # No Python version in the name: the library holds no Python symbol.
        return os.path.join(*fullname.split(".")) + ".so"

    def build_extension(self, ext: Extension) -> None:
        library = ext.name.rpartition(".")[2]
        what = {"_native": "the C++ kernels do", "_cpu_allocator": "the CPU allocator does"}[library]
        build = Path(self.build_temp).resolve() / "cmake"
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        configure = [tool("cmake"), "-S", ROOT, "-B", build, f"-DPython_EXECUTABLE={sys.executable}"]
        if ninja := tool("ninja"):
            configure += ["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}"]
        try:
            subprocess.run(configure, check=True)
            subprocess.run([tool("cmake"), "--build", build, "--target", library[1:]], check=True)
        except (OSError, subprocess.CalledProcessError) as error:
            raise CompileError(f"{what} not build: {error}") from error
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(build / f"{library}.so", target)


class PlatformWheel(bdist_wheel):
    def get_tag(self) -> tuple[str, str, str]:
        # One wheel serves every Python 3 of the platform, for the same reason.
        tag = super().get_tag()
        return tag if self.root_is_pure else ("py3", "none", tag[2])


setup(ext_modules=native_extensions(), cmdclass={"build_ext": CMakeBuild, "bdist_wheel": PlatformWheel})

"""Builds the C++ kernels and the CPU allocator with CMake as a part of the package; pyproject.toml holds the rest.

LOFI_FAST_NATIVE=auto (default) installs pure Python where a tool is missing or the build fails, and leaves the reason
in the package (kernels/not_built.txt), to be told at every start; 1 makes either an error; 0 builds nothing.

The allocator is for Linux, and against an interface of torch that may change: where it does not build, a warning says
so under 1 too, and the kernels are installed without it.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py
from setuptools.errors import CompileError

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT))  # setuptools runs this file without its folder on the path

from build_backend import missing, native_setting, tool, torch_folder  # noqa: E402

REASON = Path("lofi_fast", "kernels", "not_built.txt")


def reason_not_to_build() -> str | None:
    """Why this installation has no C++ kernels, which the log tells too; None where they are to be built."""
    setting = native_setting()
    if setting == "0":
        print("lofi_fast: LOFI_FAST_NATIVE=0, installing pure Python")
        return "LOFI_FAST_NATIVE was 0 at the installation"
    if not (lacking := ", ".join(missing())):
        return None
    if setting == "1":
        sys.exit(f"LOFI_FAST_NATIVE=1, but the C++ kernels cannot be built without {lacking}")
    print(
        f"lofi_fast: installing pure Python, the C++ kernels need {lacking}. Without them a CPU is slower, and "
        "what it takes has no hard cap; install what is missing, then lofi_fast again, to have them"
    )
    return f"at the installation they lacked {lacking}"


NOT_BUILT = reason_not_to_build()


def native_extensions() -> list[Extension]:
    if NOT_BUILT:
        return []
    # CMakeLists.txt knows the sources. An optional extension that fails to build is a warning.
    extensions = [Extension("lofi_fast.kernels._native", sources=[], optional=native_setting() == "auto")]
    if sys.platform.startswith("linux"):
        extensions.append(Extension("lofi_fast.memory._cpu_allocator", sources=[], optional=True))
    return extensions


class BuildPython(build_py):
    def run(self) -> None:
        super().run()
        if NOT_BUILT and not self.editable_mode:
            (Path(self.build_lib) / REASON).write_text(NOT_BUILT + "\n")


class CMakeBuild(build_ext):
    def get_ext_filename(self, fullname: str) -> str:
        # No Python version in the name: the library holds no Python symbol.
        return os.path.join(*fullname.split(".")) + ".so"

    def build_extension(self, ext: Extension) -> None:
        library = ext.name.rpartition(".")[2]
        what = {"_native": "the C++ kernels do", "_cpu_allocator": "the CPU allocator does"}[library]
        build = Path(self.build_temp).resolve() / "cmake"
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        configure = [
            tool("cmake"), "-S", ROOT, "-B", build,
            f"-DPython_EXECUTABLE={sys.executable}", f"-DTORCH_DIR={torch_folder()}",
        ]  # fmt: skip
        if ninja := tool("ninja"):
            configure += ["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}"]
        reason = Path(self.build_lib) / REASON
        try:
            subprocess.run(configure, check=True)
            subprocess.run([tool("cmake"), "--build", build, "--target", library[1:]], check=True)
        except (OSError, subprocess.CalledProcessError) as error:
            if library == "_native" and not self.inplace:
                reason.write_text("at the installation their build failed, as pip install -v shows\n")
            raise CompileError(f"{what} not build: {error}") from error
        if library == "_native":
            reason.unlink(missing_ok=True)  # of a build in the same folder that failed before
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(build / f"{library}.so", target)


class PlatformWheel(bdist_wheel):
    def get_tag(self) -> tuple[str, str, str]:
        # Known once everything is built: an optional library that did not build leaves a wheel for every platform. One
        # wheel serves every Python 3, since no library holds a Python symbol.
        self.root_is_pure = not any(Path(self.bdist_dir).rglob("*.so"))
        tag = super().get_tag()
        return tag if self.root_is_pure else ("py3", "none", tag[2])


setup(
    ext_modules=native_extensions(),
    cmdclass={"build_py": BuildPython, "build_ext": CMakeBuild, "bdist_wheel": PlatformWheel},
)

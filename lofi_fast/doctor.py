"""The command `doctor`: what works on this machine, and what each missing piece costs.

    lofi-fast doctor
    lofi-fast doctor --json

Each check is a line and stands by itself: one that fails in an unforeseen way says so and stops no other.
"""

from __future__ import annotations

import json
import os
import platform
import re
import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from fractions import Fraction
from importlib.machinery import PathFinder
from importlib.metadata import PackageNotFoundError, packages_distributions, requires, version
from pathlib import Path
from typing import Annotated, Literal

from lofi_fast import __version__, gpu
from lofi_fast.budget import gigabytes
from lofi_fast.command import parse, run
from lofi_fast.errors import InputError, printable
from lofi_fast.settings import Setting

DESCRIPTION = (
    "What works on this machine, and what each missing piece costs; a line each. The status is 0 where all that this "
    "machine can have is there, 1 where something is missing that costs time or a feature, 2 where nothing can be "
    "trained."
)
State = Literal["ok", "absent", "costs", "broken"]
MARKS: dict[State, str] = {"ok": "ok", "absent": "-", "costs": "!", "broken": "X"}
OLDEST_PYTHON = (3, 11)
LOW_DISK = 10_000_000_000  # bytes that a data set's frame cache and a run easily take
LOW_MEMORY = 2_000_000_000


@dataclass(frozen=True)
class Finding:
    """state: ok; absent: not here, and nothing is lost by it; costs: it can be done without; broken: it cannot.
    costs, mend: what the lack costs, and what to do; empty where nothing is lacking.
    """

    name: str
    state: State
    says: str
    costs: str = ""
    mend: str = ""

    def text(self) -> str:
        rest = "; ".join(part for part in (f"costs {self.costs}" if self.costs else "", self.mend) if part)
        return f"{MARKS[self.state]:<3}{self.name:<15}{self.says}{f' ({rest})' if rest else ''}"


@dataclass(frozen=True)
class DoctorFlags:
    json: Annotated[bool, Setting("print JSON, for programs")] = False
    folder: Annotated[Path, Setting("folder whose disk is looked at: of runs and of the frame cache", "DIR")] = Path()


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit status."""
    return run(lambda: _command(argv))


def _command(argv: Sequence[str] | None) -> int:
    flags = parse(DoctorFlags, argv, prog="lofi-fast doctor", description=DESCRIPTION)
    findings = examined(flags.folder)
    status = status_of(findings)
    if flags.json:
        print(
            json.dumps(
                {"version": __version__, "status": status, "findings": [asdict(one) for one in findings]}, indent=1
            )
        )
    else:
        for one in findings:
            print(printable(one.text()))
        print(("all that this machine can have is there", "something is missing that costs time or a feature",
               "nothing can be trained")[status])  # fmt: skip
    return status


def status_of(findings: Sequence[Finding]) -> int:
    """See DESCRIPTION."""
    states = {one.state for one in findings}
    return 2 if "broken" in states else int("costs" in states)


def examined(folder: Path) -> list[Finding]:
    """What every check finds."""
    checks: tuple[tuple[str, Callable[[], Finding]], ...] = (
        ("python", _python), ("versions", _versions), ("torch", _torch), ("driver", _driver), ("card", _card),
        ("NVML", _nvml), ("DALI", _dali), ("nvJPEG", _nvjpeg), ("NVDEC", _nvdec), ("PyAV", _pyav), ("Triton", _triton),
        ("native kernels", _native), ("apex", _apex), ("memory", _memory), ("threads", _threads),
        ("disk", lambda: _disk(folder)),
    )  # fmt: skip
    return [_guarded(name, check) for name, check in checks]


def _guarded(name: str, check: Callable[[], Finding]) -> Finding:
    try:
        return check()
    except Exception as error:  # whatever is installed here may be damaged in any way
        words = " ".join(str(error).split())[:300]
        return Finding(name, "costs", f"cannot be examined: {type(error).__name__}: {words}")


def _python() -> Finding:
    says = f"{platform.python_version()} on {platform.system()} {platform.machine()}"
    if sys.version_info[:2] < OLDEST_PYTHON:
        return Finding("python", "broken", says, mend="install Python 3.11 or later")
    return Finding("python", "ok", says)


def _versions() -> Finding:
    """Whether the packages are those that this one asks for, and belong together."""
    wrong = []
    try:
        asked = requires("lofi_fast") or []
    except PackageNotFoundError:
        return Finding("versions", "ok", f"lofi_fast {__version__}, from a folder and not installed")
    for line in asked:
        name, least = re.match(r"([\w.-]+)(?:.*?>=\s*([\d.]+))?", line).groups()  # type: ignore[union-attr]
        if "extra ==" in line or ("platform_system" in line and platform.system() != "Linux"):
            continue
        try:
            found = version(name)
        except PackageNotFoundError:
            wrong.append((f"{name} is not installed", f"{name}>={least}" if least else name))
            continue
        if least and _numbers(found) < _numbers(least):
            wrong.append((f"{name} {found} is older than {least}", f"{name}>={least}"))
    wrong += _not_together()
    if hidden := _hiding(asked):
        says = f"taken in place of packages of their names: {', '.join(map(str, hidden))}"
        return Finding("versions", "broken", says, mend="rename them, or start from another folder")
    if wrong:
        packages = " ".join(f'"{package}"' for _, package in wrong)
        return Finding("versions", "broken", "; ".join(says for says, _ in wrong), mend=f"pip install {packages}")
    return Finding("versions", "ok", f"lofi_fast {__version__}; every package is as new as it asks for")


def _hiding(asked: Sequence[str]) -> list[Path]:
    """Files of this folder, such as a torch.py, that Python imports in place of a package of those `asked` for, as it
    does where it was started as `python -m`.
    """
    names = {_plain(re.split(r"[^\w.-]", line)[0]) for line in asked}
    elsewhere = [folder for folder in sys.path if Path(folder).resolve() != Path.cwd()]
    found = []
    for module, packages in packages_distributions().items():
        if names & set(map(_plain, packages)):
            taken, hidden = PathFinder.find_spec(module), PathFinder.find_spec(module, elsewhere)
            if taken is not None and hidden is not None and taken.origin and taken.origin != hidden.origin:
                found.append(Path(taken.origin))
    return sorted(found)


def _plain(package: str) -> str:
    return re.sub(r"[-_.]+", "-", package).lower()


def _not_together() -> list[tuple[str, str]]:
    """(what does not fit, the package that would) of packages that depend on each other's very version."""
    try:
        needs = [line for line in requires("torch") or [] if line.startswith("triton==")]
        wanted = re.match(r"triton==([\d.]+)", needs[0])[1] if needs else ""  # type: ignore[index]
        found = version("triton")
    except (PackageNotFoundError, TypeError):
        return []
    if wanted and _numbers(found)[:2] != _numbers(wanted)[:2]:
        return [
            (
                f"triton {found} does not belong to torch {version('torch')}, which asks for {wanted}",
                f"triton=={wanted}",
            )
        ]
    return []


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", text.partition("+")[0])[:4])


def _torch() -> Finding:
    try:
        import torch
    except (ImportError, OSError) as error:
        words = " ".join(str(error).split())[:200]
        return Finding("torch", "broken", f"cannot be imported: {words}", mend="pip install torch")
    cuda = f"CUDA {torch.version.cuda}" if torch.version.cuda else "no CUDA"
    return Finding("torch", "ok", f"{torch.__version__}, built for {cuda}")


def _driver() -> Finding:
    found = gpu.cards()
    if found:
        return Finding(
            "driver", "ok", f"NVIDIA {found[0].driver}, which offers CUDA {'.'.join(map(str, found[0].cuda))}"
        )
    return Finding("driver", "absent", "no NVIDIA driver shows a card; everything runs on the CPU")


def _card() -> Finding:
    import torch

    found = gpu.cards()
    if not found and not torch.cuda.is_available():
        return Finding("card", "absent", "none")
    if torch.cuda.is_available():
        names = [
            f"{of.name}, {gigabytes(of.total_memory)}, compute capability {of.major}.{of.minor}"
            for of in map(torch.cuda.get_device_properties, range(torch.cuda.device_count()))
        ]
        try:
            gpu.check_torch(torch.device("cuda", 0))
        except InputError as error:
            return Finding("card", "costs", str(error), "the GPU")
        return Finding("card", "ok", "; ".join(names))
    if reason := gpu.unused():
        return Finding("card", "costs", reason, "the GPU")
    return Finding("card", "absent", f"{found[0].name}, which CUDA_VISIBLE_DEVICES hides")


def _nvml() -> Finding:
    if not _sees_gpu():
        return Finding("NVML", "absent", "not needed without a card")
    import pynvml

    try:
        pynvml.nvmlInit()
        pynvml.nvmlShutdown()
    except pynvml.NVMLError as error:
        return Finding(
            "NVML", "costs", f"cannot be used ({error})",
            "exactness: what others hold of the card is read from CUDA alone", "mend the driver's libnvidia-ml.so.1",
        )  # fmt: skip
    return Finding("NVML", "ok", "tells what each program holds of the card")


def _dali() -> Finding:
    from lofi_fast.data.packages import require_dali

    both = [package for package in gpu.DALI.values() if gpu.installed(package)]
    if len(both) > 1:
        return Finding(
            "DALI", "costs", f"{' and '.join(both)} are both installed, and hold the same modules",
            "surprises: which of them runs is chance",
            f"pip uninstall {' '.join(both)}, then pip install {gpu.dali_package()}",
        )  # fmt: skip
    try:
        require_dali()
    except InputError as error:
        return Finding("DALI", "broken", str(error))
    if both and both[0] != gpu.dali_package() and _sees_gpu():
        return Finding(
            "DALI", "costs", f"{both[0]} is not the one for PyTorch's version of CUDA",
            "a refusal where the card is older", f"pip uninstall {both[0]}, then pip install {gpu.dali_package()}",
        )  # fmt: skip
    if _sees_gpu():
        import torch

        try:
            gpu.check_dali(torch.device("cuda", 0))
        except InputError as error:
            return Finding("DALI", "broken", str(error))
    return Finding("DALI", "ok", f"{both[0]} {version(both[0])}" if both else "can be imported")


def _nvjpeg() -> Finding:
    if not _sees_gpu():
        return Finding("nvJPEG", "absent", "not needed without a card: pictures are decoded by libjpeg-turbo")
    width, height = decoded_size("mixed")
    return Finding("nvJPEG", "ok", f"decodes pictures on the card ({width}x{height} tried)")


def decoded_size(device: Literal["cpu", "mixed"]) -> tuple[int, int]:
    """Width and height of a small JPEG after DALI has decoded it, on the CPU or (mixed) by nvJPEG."""
    import av
    import numpy as np
    from nvidia.dali import Pipeline, fn

    codec = av.CodecContext.create("mjpeg", "w")
    codec.width, codec.height, codec.pix_fmt, codec.time_base = 32, 16, "yuvj420p", Fraction(1, 25)
    grey = av.VideoFrame.from_ndarray(np.full((16, 32, 3), 128, np.uint8), format="rgb24")
    (packet,) = [*codec.encode(grey.reformat(format="yuvj420p")), *codec.encode(None)]
    content = np.frombuffer(bytes(packet), dtype=np.uint8)
    with Pipeline(batch_size=1, num_threads=1, device_id=0 if device == "mixed" else None) as pipeline:
        pipeline.set_outputs(fn.decoders.image(fn.external_source(source=lambda: [content]), device=device))
    pipeline.build()
    (pictures,) = pipeline.run()
    height, width, _ = np.asarray((pictures.as_cpu() if device == "mixed" else pictures).at(0)).shape
    return width, height


def _nvdec() -> Finding:
    from lofi_fast.data import nvdec

    if not _sees_gpu():
        return Finding("NVDEC", "absent", "not needed without a card: videos are decoded by PyAV")
    if reason := nvdec.missing("cuda:0"):
        return Finding("NVDEC", "costs", reason, "time once: the frame cache is filled by the CPU")
    return Finding("NVDEC", "ok", "the driver's video decoder can be loaded")


def _pyav() -> Finding:
    from lofi_fast.data.packages import require_pyav

    try:
        require_pyav()
    except InputError as error:
        return Finding("PyAV", "broken", str(error))
    import av

    lacking = [name for name in ("h264", "hevc", "vp9", "mjpeg") if name not in av.codecs_available]
    library = ".".join(map(str, av.library_versions["libavcodec"]))
    if lacking:
        return Finding(
            "PyAV", "costs", f"{av.__version__} (libavcodec {library}) cannot decode {', '.join(lacking)}",
            "the videos that need them", "pip install --force-reinstall av",
        )  # fmt: skip
    return Finding("PyAV", "ok", f"{av.__version__} (libavcodec {library})")


def _triton() -> Finding:
    from lofi_fast.kernels import library

    if not _sees_gpu():
        return Finding("Triton", "absent", "not needed without a card")
    slower = "time on the GPU: plain PyTorch forms run, which are slower and take more memory"
    if library.triton_version is None:
        return Finding("Triton", "costs", "is not installed", slower, "pip install triton")
    import torch

    try:
        gpu.check_triton(torch.device("cuda", torch.cuda.current_device()))
    except InputError as error:
        return Finding("Triton", "broken", str(error))
    return Finding("Triton", "ok", f"{library.triton_version}, and a kernel of ours compiles and runs")


def _native() -> Finding:
    slower = "time on the CPU: reference forms run"
    try:
        from lofi_fast.kernels import library, native_available
    except ImportError as error:
        return Finding("native kernels", "broken", " ".join(str(error).split())[:300])
    if not native_available():
        if os.environ.get("LOFI_FAST_NATIVE") == "0":
            return Finding("native kernels", "costs", "are turned off by LOFI_FAST_NATIVE=0", slower, "unset it")
        return Finding(
            "native kernels", "costs", f"are not built ({library.why_not_built()})",
            f"{slower}, and no hard cap on CPU memory", "install what is missing, then lofi_fast again",
        )  # fmt: skip
    counted = sum(form == "C++" for form in library.forms["cpu"].values())
    return Finding("native kernels", "ok", f"{counted} of {len(library.forms['cpu'])} operators run as C++ on the CPU")


def _apex() -> Finding:
    from lofi_fast.optim import apex_problem

    if not _sees_gpu():
        return Finding("apex", "absent", "not needed without a card")
    if problem := apex_problem():
        return Finding("apex", "absent", f"{problem}; torch's fused optimisers do the same")
    return Finding("apex", "ok", "its fused optimisers are used")


def _memory() -> Finding:
    from lofi_fast.memory import allocator
    from lofi_fast.memory.cpu import CpuMeter

    meter = CpuMeter()
    says = f"{gigabytes(meter.available())} free of {gigabytes(meter.total())}"
    if reason := allocator.missing():
        says += f"; a training on the CPU has no hard cap: {reason}"
    if _sees_gpu():
        import torch

        free, total = torch.cuda.mem_get_info()
        says = f"GPU {gigabytes(free)} free of {gigabytes(total)}; CPU {says}"
    if meter.available() < LOW_MEMORY:
        return Finding("memory", "costs", says, "fidelity: little fits", "end other programs")
    return Finding("memory", "ok", says)


def _threads() -> Finding:
    cores = os.cpu_count() or 1
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else cores
    import torch

    says = f"{torch.get_num_threads()} threads of PyTorch; {allowed} of {cores} cores may be used"
    if torch.get_num_threads() < allowed and "OMP_NUM_THREADS" in os.environ:
        return Finding(
            "threads", "costs", f"{says} (OMP_NUM_THREADS={os.environ['OMP_NUM_THREADS']})", "time on the CPU",
            "unset OMP_NUM_THREADS, or give --threads",
        )  # fmt: skip
    return Finding("threads", "ok", says)


def _disk(folder: Path) -> Finding:
    place = folder.absolute()
    while not place.exists():
        place = place.parent
    usage = shutil.disk_usage(place)
    says = f"{gigabytes(usage.free)} free of {gigabytes(usage.total)} at {place}"
    if not os.access(place, os.W_OK):
        return Finding(
            "disk", "costs", f"{says}, where this user may not write", mend="name folders with --out and --cache"
        )
    if usage.free < LOW_DISK:
        return Finding("disk", "costs", says, "room for runs and frame caches", "free some space")
    return Finding("disk", "ok", says)


def _sees_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


if __name__ == "__main__":
    sys.exit(main())

"""Whether the software here fits the card that is here: PyTorch, Triton and DALI, each said in one sentence if not.

NVIDIA's driver offers one version of CUDA, and runs what was built for any version up to it, and for older minor
versions of the same major one. CUDA 13 has no code for cards before Turing (compute capability 7.5), nor do PyTorch and
DALI that are built for it.
"""

from __future__ import annotations

import os
import re
import shutil
import sysconfig
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING

from lofi_fast.errors import InputError

if TYPE_CHECKING:
    import torch

Capability = tuple[int, int]

OLDEST_OF_CUDA_13: Capability = (7, 5)  # Turing
DRIVER_OF_CUDA_13 = 580  # the first series
DALI = {12: "nvidia-dali-cuda120", 13: "nvidia-dali-cuda130"}  # by the major version of CUDA


@dataclass(frozen=True)
class Card:
    """A GPU as the driver shows it."""

    name: str
    capability: Capability
    cuda: Capability  # the newest that the driver offers
    driver: str


@dataclass(frozen=True)
class Build:
    """What PyTorch was built for."""

    version: str
    cuda: Capability | None  # None: without CUDA
    architectures: Sequence[str]  # "sm_86": machine code; "compute_90": code that the driver compiles

    @staticmethod
    def installed() -> Build:
        import torch

        cuda = torch.version.cuda
        flags = torch._C._cuda_getArchFlags() if hasattr(torch._C, "_cuda_getArchFlags") else None
        return Build(torch.__version__, _pair(cuda) if cuda else None, (flags or "").split())

    def runs_on(self, capability: Capability) -> bool:
        """Machine code runs on cards of its own major version from its minor one on, "compute" code on all later."""
        for architecture in self.architectures:
            kind, _, digits = architecture.partition("_")
            number = int(re.match(r"\d*", digits)[0] or 0)  # type: ignore[index]
            built = divmod(number, 10)
            if built <= capability and (kind == "compute" or built[0] == capability[0]):
                return True
        return not self.architectures  # nothing is known of it


def cards() -> list[Card]:
    """The cards that the driver shows, whether PyTorch can use them or not; none where there is no driver."""
    import pynvml

    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return []
    found = []
    try:
        offered = int(pynvml.nvmlSystemGetCudaDriverVersion_v2())
        driver = _text(pynvml.nvmlSystemGetDriverVersion())
        for index in range(pynvml.nvmlDeviceGetCount()):
            handle = pynvml.nvmlDeviceGetHandleByIndex(index)
            capability = tuple(pynvml.nvmlDeviceGetCudaComputeCapability(handle))
            cuda = offered // 1000, offered % 1000 // 10
            found.append(Card(_text(pynvml.nvmlDeviceGetName(handle)), capability, cuda, driver))
    except pynvml.NVMLError:  # a card that has fallen off its bus, for one
        pass
    finally:
        pynvml.nvmlShutdown()
    return found


def unused() -> str:
    """A sentence for a card that is here and that PyTorch cannot use; empty where there is none, or where
    CUDA_VISIBLE_DEVICES hides all.
    """
    if os.environ.get("CUDA_VISIBLE_DEVICES", "0").strip() in ("", "-1"):
        return ""
    found = cards()
    return f"{found[0].name} is here, but PyTorch cannot use it: {misfit(found[0], Build.installed())}" if found else ""


def misfit(card: Card, build: Build) -> str:
    """Why PyTorch as it is built cannot use a card, and what to install."""
    if build.cuda is None:
        return f"PyTorch {build.version} is built without CUDA; install a build for {_fitting(card)}"
    if not build.runs_on(card.capability):
        return (
            f"PyTorch {build.version} has no code for its compute capability {_dotted(card.capability)}; install a "
            f"build for {_fitting(card)}"
        )
    if card.cuda[0] < build.cuda[0]:
        return (
            f"its driver {card.driver} offers CUDA {_dotted(card.cuda)}, and PyTorch {build.version} is built for "
            f"{_dotted(build.cuda)}; install a driver of series {DRIVER_OF_CUDA_13} or later, or a build of PyTorch "
            f"for CUDA 12 with {DALI[12]} in place of {DALI[13]}"
        )
    return "see what python -c 'import torch; torch.cuda.init()' says"


def _fitting(card: Card) -> str:
    """The version of CUDA, and the package of DALI, for a card with its driver."""
    major = 13 if card.capability >= OLDEST_OF_CUDA_13 and card.cuda[0] >= 13 else 12
    minor = "CUDA 12.6" if card.capability < OLDEST_OF_CUDA_13 else f"CUDA {major}"
    return f"{minor}, with {DALI[major]}"


def check_torch(device: torch.device) -> None:
    """Raises InputError where PyTorch has no code for a card that it shows."""
    import torch

    capability, build = torch.cuda.get_device_capability(device), Build.installed()
    if not build.runs_on(capability):
        name = torch.cuda.get_device_name(device)
        card = next((card for card in cards() if card.name == name), Card(name, capability, (12, 0), "unknown"))
        raise InputError(f"--device cuda: {name}: {misfit(card, build)}")


def send(x: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A CPU tensor on a device. The host does not wait for what the device still has to do: a copy out of ordinary
    memory would, so the copy is made out of pinned memory.
    """
    return x.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else x.to(device)


def dali_package() -> str:
    """The package of DALI for the version of CUDA that PyTorch was built for; the newest where that is none."""
    import torch

    return DALI[12] if (torch.version.cuda or "").startswith("12.") else DALI[13]


def check_dali(device: torch.device) -> None:
    """Raises InputError where the DALI that is installed was built for a CUDA that the card or its driver lacks."""
    import torch

    major = max((number for number, package in DALI.items() if installed(package)), default=0)
    if device.type != "cuda" or major < 13:
        return
    name, capability = torch.cuda.get_device_name(device), torch.cuda.get_device_capability(device)
    offered = max((card.cuda for card in cards()), default=(13, 0))
    if capability < OLDEST_OF_CUDA_13:
        reason = f"has compute capability {_dotted(capability)}, and {DALI[13]} begins at 7.5"
    elif offered[0] < 13:
        reason = f"has a driver for CUDA {_dotted(offered)}, and {DALI[13]} needs one of series {DRIVER_OF_CUDA_13}"
    else:
        return
    raise InputError(f"{name} {reason}: pip uninstall {DALI[13]}, then pip install {DALI[12]}")


def check_triton(device: torch.device) -> None:
    """Compile and start one small kernel. Raises InputError where that fails: at the first real one, after all videos
    were decoded, it would fail in the same way.
    """
    from lofi_fast.kernels import library

    if device.type != "cuda" or library.triton_version is None:
        return
    import torch

    from lofi_fast.kernels.temporal_shift.kernel import temporal_shift

    try:
        temporal_shift(torch.zeros(2, 2, 1, 1, device=device), 2, 1, False)
        torch.cuda.synchronize(device)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # the compiler's own, of many types
        reason = f"cannot compile for {torch.cuda.get_device_name(device)} ({' '.join(str(error).split())[-200:]})"
        if lacking := missing_to_compile():
            reason = f"needs {' and '.join(lacking)}"
        raise InputError(
            f"Triton {library.triton_version}, which the GPU's kernels are written in, {reason}; without it (pip "
            "uninstall triton) slower forms run"
        ) from error


def missing_to_compile() -> list[str]:
    """What Triton needs at run time to make its launcher in C, and what is not here."""
    lacking = []
    compiler = os.environ.get("CC")
    if not any(shutil.which(name) for name in ([compiler] if compiler else ["gcc", "clang"])):
        place = f"CC names {compiler}, which is not there" if compiler else "neither gcc nor clang is on PATH"
        lacking.append(f"a C compiler ({place})")
    header = Path(sysconfig.get_path("include"), "Python.h")
    if not header.exists():
        lacking.append(f"Python's headers ({header} is not there: install python{sysconfig.get_python_version()}-dev)")
    return lacking


def installed(package: str) -> bool:
    """Whether a package of that name is installed."""
    try:
        version(package)
    except PackageNotFoundError:
        return False
    return True


def _pair(text: str) -> Capability:
    major, minor = text.split(".")[:2]
    return int(major), int(minor)


def _dotted(pair: Capability) -> str:
    return f"{pair[0]}.{pair[1]}"


def _text(words: str | bytes) -> str:
    return words.decode(errors="replace") if isinstance(words, bytes) else words

"""The packages that decode, imported where they are used and not before: all that needs no videos runs without them.

What is offered to other rooms (probe, decode, the cache, the pipeline, the demo set) calls these first, so that its
private helpers can import plainly.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import TYPE_CHECKING

from lofi_fast.errors import InputError
from lofi_fast.gpu import dali_package

if TYPE_CHECKING:
    from av.container import InputContainer


def require_pyav() -> None:
    """Raises InputError where PyAV cannot be imported."""
    _require("av", "PyAV, which reads and writes videos,", "av")


def require_dali() -> None:
    """Raises InputError where DALI cannot be imported; it names the package for PyTorch's version of CUDA."""
    _require("nvidia.dali", "NVIDIA DALI, which decodes the frame cache,", dali_package())


def opened(path: Path) -> InputContainer:
    """A file of moving pictures, to be read. Raises av.FFmpegError or OSError for one that FFmpeg cannot open, and
    InputError without PyAV.

    FFmpeg takes what stands before a colon in a relative path, such as 10:30.mp4, for a protocol.
    """
    require_pyav()
    import av

    return av.open(str(path.absolute()))


def _require(module: str, what: str, package: str) -> None:
    try:
        importlib.import_module(module)
    except ImportError as error:  # missing, or it does not find a library of its own
        reason = " ".join(str(error).split())
        raise InputError(f"{what} cannot be imported ({reason}): pip install {package}") from error

"""An allocator for torch's CPU tensors that has a cap and keeps freed blocks. It does for a CPU what
``torch.cuda.set_per_process_memory_fraction``, the caching allocator and ``torch.cuda.memory_stats`` do for a GPU.
allocator.cpp says how it works.

It counts and caps the memory of tensors, and what oneDNN allocates through torch. It does not see the frames of a
decoder, arrays of numpy, tensors in shared memory or mapped from a file, storages made in Python
(``torch.UntypedStorage(n)``), and what was allocated before ``install``.

It is built against c10, which promises no stable interface: it is loaded only into the torch that it was built with.
"""

from __future__ import annotations

import ctypes
import os
import re
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

_BUILT_WITH = re.compile(rb"lofi_fast: built with torch ([\w.]+)\0")

_library: ctypes.CDLL | None = None


@dataclass(frozen=True)
class Allocated:
    """One reading, in bytes. Blocks of 256 KiB and more count in whole pages of 4 KiB."""

    used: int  # by what was allocated since `install`, and is not freed
    kept: int  # freed, and held for the next block; used + kept never passes the most used since `release`
    peak: int  # the most used since `reset_peak`
    limit: int | None  # of used


def _find() -> Path | None:
    """The newest of the installed library (beside this file) and a plain CMake build of a source tree (build/)."""
    here = Path(__file__).parent
    root = here.parents[1]
    places = [here / "_cpu_allocator.so"]
    if (root / "CMakeLists.txt").exists():
        places.append(root / "build" / "_cpu_allocator.so")
    built = [place for place in places if place.exists()]
    return max(built, key=lambda place: place.stat().st_mtime_ns, default=None)


def install() -> str | None:
    """Put the allocator under all tensors allocated from now on, for the rest of the process.

    Returns None when it is in place, also by an earlier call; else the reason why it is not.
    """
    global _library
    if _library is not None:
        return None
    if reason := missing():
        return reason
    path = _find()
    assert path is not None
    try:
        library = ctypes.CDLL(str(path))
    except OSError as error:
        return f"cannot load {path} ({error}): rebuild it"
    library.lofi_fast_install.restype = ctypes.c_bool
    library.lofi_fast_limit.argtypes = [ctypes.c_int64]
    library.lofi_fast_read.argtypes = [ctypes.POINTER(ctypes.c_int64)]
    if not library.lofi_fast_install():
        return "another library has put its allocator under torch, and keeps it there"
    _library = library
    return None


def missing() -> str | None:
    """Why ``install`` cannot succeed, as far as it can be told without loading anything."""
    if not sys.platform.startswith("linux"):
        return "the CPU allocator is written for Linux"
    if os.environ.get("LOFI_FAST_NATIVE") == "0":
        return "LOFI_FAST_NATIVE=0 leaves the CPU allocator out"
    path = _find()
    if path is None:
        return "the CPU allocator is not built: install with a C++ compiler to have it"
    built_with = _BUILT_WITH.search(path.read_bytes())
    if built_with is None:
        return f"{path} is no CPU allocator of ours: rebuild it"
    version = built_with[1].decode()
    if version != torch.__version__.partition("+")[0]:
        return f"{path} was built with torch {version}, and this is torch {torch.__version__}: rebuild it"
    return None


def installed() -> bool:
    """Whether ``install`` has put the allocator in place."""
    return _library is not None


def _installed() -> ctypes.CDLL:
    if _library is None:
        raise RuntimeError("the CPU allocator is not in place: call install() first, which says why where it cannot be")
    return _library


def limit(more: int | None) -> None:
    """Let no more than ``more`` bytes be allocated beyond those in use now; None lifts the limit.

    An allocation beyond raises torch.OutOfMemoryError and changes nothing. Kept blocks beyond the limit are given back.
    """
    if more is not None and more < 0:
        raise ValueError(f"more is {more}: what is in use cannot be taken back")
    _installed().lofi_fast_limit(-1 if more is None else more)


def release() -> None:
    """Give the kept blocks back to the system."""
    _installed().lofi_fast_release()


def reset_peak() -> None:
    """Start a new peak measurement."""
    _installed().lofi_fast_reset_peak()


def read() -> Allocated:
    """What is in use and kept now, in one call; cheap enough for every step."""
    values = (ctypes.c_int64 * 4)()
    _installed().lofi_fast_read(values)
    used, kept, peak, most = values
    return Allocated(used, kept, peak, None if most < 0 else most)

"""What a process whose memory is planned does at its start: it sets up its allocators and opens a meter."""

from __future__ import annotations

import ctypes
import gc
import os
import sys
from contextlib import suppress

import torch

from lofi_fast.memory import allocator
from lofi_fast.memory.cpu import CpuMeter
from lofi_fast.memory.gpu import GpuMeter
from lofi_fast.memory.meter import Meter

THRESHOLD = 1 << 20  # of glibc's blocks that are mapped by themselves, and of free memory that is given back
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # in glibc's malloc.h


def settle_allocator(module: str, arguments: list[str]) -> None:
    """Set up the allocators. Call it at the start of the process. Settings of the user's are left as they are.

    On a CPU: glibc's allocator (`settle_glibc`), and for tensors our own (allocator.cpp). Ours can refuse an
    allocation, which makes the cap, and keeps freed blocks for the next step. If it cannot be installed, a note says
    why.

    On a GPU: expandable segments. The tensors of every rung have other sizes. In fixed segments the blocks of one rung
    do not serve the next, and reserved memory, which is what the driver shows, grows beyond what is allocated. Segments
    that are mapped and unmapped in pieces (20 MiB) keep the two close, so that a peak can be predicted from the tensors
    alone. torch reads this setting only at its start, so this program (`python -m module arguments`) is started again,
    once. Where the driver has no such segments, torch says so and continues without.
    """
    if torch.cuda.is_available() and not {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"} & os.environ.keys():
        settled = os.environ | {"PYTORCH_ALLOC_CONF": "expandable_segments:True"}
        os.execve(sys.executable, [sys.executable, "-m", module, *arguments], settled)
    settle_glibc()
    if reason := allocator.install():
        print(f"note: no hard cap on CPU memory: {reason}", file=sys.stderr)


def settle_here() -> list[str]:
    """Settle the allocators of a process that is under way, a script or a notebook: what is allocated from now on is
    planned for and capped as in a process of its own. Returns a sentence for each thing that this cannot cover.
    """
    notes = []
    if torch.cuda.is_available() and not {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"} & os.environ.keys():
        if torch.cuda.is_initialized():
            notes.append(
                "the GPU was in use in this process before: its memory stays in fixed segments, so that predictions "
                "are less exact, and what tensors of before hold is counted against the budget"
            )
        else:  # the setting that the environment variable gives to a process of its own
            torch.cuda.memory._set_allocator_settings("expandable_segments:True")
    settle_glibc()
    if reason := allocator.install():
        notes.append(f"no hard cap on CPU memory: {reason}")
    return notes


def settle_glibc() -> None:
    """Make glibc map each block of 1 MiB or more by itself and return it to the system when it is freed, so that the
    resident set is what is in use. Otherwise DALI and numpy let it drift, by 80 MB in twelve steps of the demo.

    The effect on tensors that are not in our allocator, measured with R18, 64 frames of 112 pixels, forward and
    backward, ten steps, one thread (seconds are CPU time, because the machine was not idle; peaks vary more when steps
    of other sizes come between):
        thresholds                         s      peak   varies   with other sizes between   held after the step
        default                          1.40    933 MB   12%        12%                       638 MB
        1 MiB                            1.81    792 MB    0.0%       1.5%                      353 MB   (these)
        4 MiB, huge pages                1.68    817 MB    0.8%       5.5%                      410 MB
        8 MiB, huge pages                1.68    857 MB    0.8%      10.5%                      516 MB
        32 MiB, huge pages               1.46    965 MB    9.9%       9.9%                      707 MB
        default, malloc_trim each step   1.58    836 MB   12%        12%                       351 MB
        MALLOC_ARENA_MAX=1               1.36    865 MB   12%        12%                       612 MB
    Settings that keep memory are faster and less predictable, and none of them varies by less than 2%. The time goes
    into the kernel's clearing of pages (0.6 s a step, 0.2 s by default). Our allocator uses blocks again and saves it.
    """
    if sys.platform.startswith("linux") and "GLIBC_TUNABLES" not in os.environ:
        with suppress(AttributeError):  # another C library
            libc = ctypes.CDLL(None)
            libc.mallopt(_M_MMAP_THRESHOLD, THRESHOLD)
            libc.mallopt(_M_TRIM_THRESHOLD, THRESHOLD)


def open_meter(device: torch.device) -> Meter:
    return GpuMeter(device) if device.type == "cuda" else CpuMeter()


def give_back() -> None:
    """Hand memory that is not in use back to the system: what follows is no step, and nobody plans it."""
    gc.collect()
    if allocator.installed():
        allocator.release()
    if trim := getattr(ctypes.CDLL(None), "malloc_trim", None):  # glibc's
        trim(0)

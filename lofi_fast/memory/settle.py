"""The start of a process whose memory is planned: its allocators, and its meter."""

from __future__ import annotations

import ctypes
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
    """Settle the allocators for a process whose memory is planned; to be called at its start. What the user has set
    stays.

    On a CPU: glibc's (`settle_glibc`), and under tensors ours (allocator.cpp), which can refuse, hence the cap, and
    keeps what is freed for the next step; where that cannot be, it says so.

    On a GPU: expandable segments. Every rung has tensors of other sizes; in fixed segments the blocks of one rung are
    of no use to the next and reserved memory, which is what the driver shows, grows beyond what is allocated. Segments
    that are mapped and unmapped piece by piece (20 MiB) keep the two together, so that a peak can be predicted from
    the tensors alone. torch reads the setting at the start only, hence this program (`python -m module arguments`) is
    run again, once. torch says so and goes on without where the driver cannot do it.
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
    """Have glibc map blocks of a MiB and more by themselves and give them back when freed, so that the resident set is
    what is in use. Without, DALI and numpy let it drift: by 80 MB in twelve steps of the demo.

    What it does to tensors, where they are not in an allocator of ours: R18, 64 frames of 112 pixels, forward and
    backward, ten steps, one thread (seconds of CPU time, since the machine was not idle; peaks between steps of other
    sizes vary more than those of identical steps):
        thresholds                         s      peak   varies   with other sizes between   held after the step
        default                          1.40    933 MB   12%        12%                       638 MB
        1 MiB                            1.81    792 MB    0.0%       1.5%                      353 MB   (these)
        4 MiB, huge pages                1.68    817 MB    0.8%       5.5%                      410 MB
        8 MiB, huge pages                1.68    857 MB    0.8%      10.5%                      516 MB
        32 MiB, huge pages               1.46    965 MB    9.9%       9.9%                      707 MB
        default, malloc_trim each step   1.58    836 MB   12%        12%                       351 MB
        MALLOC_ARENA_MAX=1               1.36    865 MB   12%        12%                       612 MB
    Whatever keeps memory is faster and less predictable; nothing between meets 2%. The time goes into the kernel's
    clearing of pages (0.6 s a step, 0.2 by default), which our allocator saves by using blocks again.
    """
    if sys.platform.startswith("linux") and "GLIBC_TUNABLES" not in os.environ:
        with suppress(AttributeError):  # another C library
            libc = ctypes.CDLL(None)
            libc.mallopt(_M_MMAP_THRESHOLD, THRESHOLD)
            libc.mallopt(_M_TRIM_THRESHOLD, THRESHOLD)


def open_meter(device: torch.device) -> Meter:
    return GpuMeter(device) if device.type == "cuda" else CpuMeter()

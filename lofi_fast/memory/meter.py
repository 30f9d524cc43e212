"""Meters: how much memory this process holds, how much the device has left, and the cap that keeps us inside.

Budget and readings are bytes as the driver shows them. On a GPU that is the CUDA context, torch's reserved memory and
the pools of other libraries, read at device level through NVML (readings for single processes are unreliable in
containers). On a CPU it is the resident set.
"""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import psutil
import torch

_OUT_OF_MEMORY = (
    "out of memory", "can't allocate", "cannot allocate memory", "bad_alloc", "alloc_failed", "allocation_failed",
    "allocation failed", "could not create a primitive", "could not create a memory",
)  # fmt: skip
_ALLOCATOR = "glibc.malloc.mmap_threshold=1048576:glibc.malloc.trim_threshold=1048576:glibc.malloc.hugetlb=1"


class Meter(Protocol):
    """Readings in bytes."""

    device: str  # in words, with its total memory
    source: str  # where the readings come from

    def total(self) -> int:
        """Memory of the device."""

    def own(self) -> int:
        """What this process holds now."""

    def available(self) -> int:
        """What this process could hold: its own plus what is free."""

    def release(self) -> None:
        """Give memory that is held but not used back to the device, where it can be given back."""

    def reset_peak(self) -> None:
        """Start a new peak measurement."""

    def peak(self) -> int:
        """The most that this process has held since `reset_peak`."""

    def cap(self, limit: int) -> Any:
        """Context in which an allocation beyond `limit` fails inside this process, so that a neighbour never pays."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that memory ran out, on a GPU or a CPU, whichever library raised it."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    text = str(error).lower()
    return isinstance(error, RuntimeError) and any(words in text for words in _OUT_OF_MEMORY)


def settle_allocator(module: str, arguments: list[str]) -> None:
    """Run this program again with glibc's allocator settled, once; returns when that is done or does not apply.

    Under glibc's default thresholds the peak of one and the same step varies by up to 20%; with fixed ones, by a few
    percent, and memory freed is given back. They are read at process start only, hence the second start.
    """
    if not sys.platform.startswith("linux") or "GLIBC_TUNABLES" in os.environ:
        return
    os.execve(sys.executable, [sys.executable, "-m", module, *arguments], os.environ | {"GLIBC_TUNABLES": _ALLOCATOR})


class CpuMeter:
    """Resident set of this process against the machine's memory and its control group's limit (Linux)."""

    source = "resident set"

    def __init__(self) -> None:
        self._process = psutil.Process()
        self.device = f"CPU, {os.cpu_count()} cores, {self.total() / 1e9:.1f} GB"

    def total(self) -> int:
        return min([int(psutil.virtual_memory().total), *(limit for limit, _ in self._groups())])

    def own(self) -> int:
        return int(self._process.memory_info().rss)

    def available(self) -> int:
        free = min([int(psutil.virtual_memory().available), *(limit - used for limit, used in self._groups())])
        return self.own() + max(free, 0)

    @staticmethod
    def _groups() -> list[tuple[int, int]]:
        """(limit, used) bytes of each control group that this process is in and that has a limit.

        The page cache, which the kernel gives back, is not counted as used: reading the frame cache fills it.
        """
        groups = []
        for line in Path("/proc/self/cgroup").read_text().splitlines():
            _, controllers, name = line.split(":", 2)
            root = Path("/sys/fs/cgroup")
            files, prefix = ("memory.max", "memory.current"), ""
            if controllers:  # version 1
                if "memory" not in controllers.split(","):
                    continue
                root, files, prefix = root / "memory", ("memory.limit_in_bytes", "memory.usage_in_bytes"), "total_"
            own = root / name.lstrip("/")
            for folder in (own, *own.parents):
                if folder.is_relative_to(root):
                    try:
                        limit, used = ((folder / file).read_text().strip() for file in files)
                        stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
                    except OSError:
                        continue
                    if limit != "max":
                        cached = sum(int(stat.get(f"{prefix}{kind}_file", 0)) for kind in ("active", "inactive"))
                        groups.append((int(limit), int(used) - cached))
        return groups

    def release(self) -> None:
        pass  # the allocator, as `settle_allocator` sets it, does so by itself

    def reset_peak(self) -> None:
        Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts again from what is resident now

    def peak(self) -> int:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
        raise RuntimeError("/proc/self/status has no VmHWM line")

    @contextmanager
    def cap(self, limit: int) -> Iterator[None]:
        """No cap on a CPU: under a limit of the data segment (RLIMIT_DATA), OpenMP and oneDNN were seen to end the
        process where they should raise. Peaks are measured, and the joint stage goes down a rung when one is too high.
        """
        yield


class GpuMeter:
    """One NVIDIA GPU: free and used memory of the device through NVML, torch.cuda.mem_get_info where NVML fails.

    What this process holds is torch's reserved memory plus everything else it took (context, cuDNN, DALI's pools),
    which is the growth of the device's used memory that torch does not account for, measured by `settle`.
    """

    def __init__(self, device: torch.device) -> None:
        self._index = device.index or 0
        self._handle, self.source = self._open()
        before = self._used() if self._handle is not None else 0  # asking CUDA would create the context
        torch.zeros(1, device=device)  # creates it
        torch.cuda.synchronize(device)
        self._outside_torch = 0
        self.settle(before)
        self.device = f"{torch.cuda.get_device_name(device)}, {self.total() / 1e9:.1f} GB"

    def _open(self) -> tuple[Any, str]:
        try:
            import pynvml

            pynvml.nvmlInit()
            uuid = str(torch.cuda.get_device_properties(self._index).uuid)
            return pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}"), "NVML, device level"
        except Exception as error:  # no library, no permission, a MIG slice: any of them, said once at the start
            return None, f"cudaMemGetInfo, where other processes' memory counts as ours (NVML: {error})"

    def _free_total(self) -> tuple[int, int]:
        if self._handle is not None:
            import pynvml

            info = pynvml.nvmlDeviceGetMemoryInfo(self._handle)
            return int(info.free), int(info.total)
        free, total = torch.cuda.mem_get_info(self._index)
        return int(free), int(total)

    def _used(self) -> int:
        free, total = self._free_total()
        return total - free

    def settle(self, used_before: int) -> None:
        """Count what the device's used memory grew by since `used_before`, less torch's, as held outside torch."""
        self._outside_torch += max(self._used() - used_before - torch.cuda.memory_reserved(self._index), 0)

    def total(self) -> int:
        return self._free_total()[1]

    def own(self) -> int:
        return self._outside_torch + torch.cuda.memory_reserved(self._index)

    def available(self) -> int:
        return self.own() + self._free_total()[0]

    def release(self) -> None:
        torch.cuda.empty_cache()

    def reset_peak(self) -> None:
        torch.cuda.synchronize(self._index)
        torch.cuda.reset_peak_memory_stats(self._index)

    def peak(self) -> int:
        torch.cuda.synchronize(self._index)
        return self._outside_torch + torch.cuda.max_memory_reserved(self._index)

    @contextmanager
    def cap(self, limit: int) -> Iterator[None]:
        """torch's own share of the device; the context and foreign pools, which it does not cover, taken off first."""
        share = (limit - self._outside_torch) / torch.cuda.get_device_properties(self._index).total_memory
        torch.cuda.set_per_process_memory_fraction(min(max(share, 0.0), 1.0), self._index)
        try:
            yield
        finally:
            torch.cuda.set_per_process_memory_fraction(1.0, self._index)


def open_meter(device: torch.device) -> Meter:
    return GpuMeter(device) if device.type == "cuda" else CpuMeter()

"""Meters: how much memory this process holds, how much the device has left, and the cap that keeps us inside.

Budget and readings are bytes as the driver shows them. On a GPU that is the CUDA context, torch's reserved memory and
the pools of other libraries, read at device level through NVML (readings for single processes are unreliable in
containers). On a CPU it is the resident set.
"""

from __future__ import annotations

import ctypes
import errno
import math
import os
import re
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import psutil
import torch

from lofi_fast.memory import allocator
from lofi_fast.memory.groups import ControlGroup, control_groups
from lofi_fast.memory.profiles import assumed_context

_OUT_OF_MEMORY = (
    "out of memory", "can't allocate", "cannot allocate memory", "bad_alloc", "alloc_failed", "allocation_failed",
    "allocation failed", "could not create a primitive", "could not create a memory",
)  # fmt: skip
# In a kernel of ours built against the stable ABI of torch before 2.13, a failed call loses its reason. Calls that do
# nothing but allocate (for `contiguous`, and copy) fail for want of memory alone.
_ALLOCATING_CALL = re.compile(r"(aten::|aoti_torch_(aten_)?)(new_)?(empty|contiguous)\w*.* api call failed", re.DOTALL)
THRESHOLD = 1 << 20  # of glibc's blocks that are mapped by themselves, and of free memory that is given back
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # in glibc's malloc.h

SEGMENT = 20 << 20  # torch maps its expandable segments in pieces of this size: so far a cap can be overrun
SAME_DEVICE = (0.9, 1.02)  # CUDA's total memory over NVML's: below, NVML shows the whole card and CUDA a slice of it
CONTEXT = (64 << 20, 3 << 30)  # what one can take; a reading outside says that it was there before, or others moved
JUMP = 0.1  # of the device's memory: a change of others' memory between two readings that is read again
RETRY_SECONDS = 10.0  # after NVML failed
GROUPS_SECONDS = 30.0  # between two looks for control groups and their limits


@dataclass(frozen=True)
class Memory:
    """One reading, in bytes."""

    own: int  # what this process holds
    held: int  # of that, what is in use: without what `release` would give back
    free: int  # what nobody holds

    @property
    def available(self) -> int:
        """What this process could hold."""
        return self.own + self.free


class Meter(Protocol):
    """Readings in bytes."""

    device: str  # in words, with its total memory

    @property
    def source(self) -> str:
        """Where the readings come from, now."""

    def faults(self) -> list[str]:
        """What went wrong with the readings and was made good, for the log: each kind is told once."""

    def total(self) -> int:
        """Memory of the device."""

    def reading(self) -> Memory:
        """Own, held and free memory at one moment, in one call; cheap enough for every step."""

    def own(self) -> int:
        """What this process holds now."""

    def held(self) -> int:
        """What of `own` is in use: without what `release` would give back."""

    def available(self) -> int:
        """What this process could hold: its own plus what is free."""

    def settle(self, event: str) -> AbstractContextManager[None]:
        """Context around an event that takes memory which torch does not know: what it took counts as ours."""

    def release(self) -> None:
        """Give memory that is held but not used back to the device, where it can be given back."""

    def reset_peak(self) -> None:
        """Start a new peak measurement."""

    def peak(self) -> int:
        """The most that this process has held since `reset_peak`."""

    def retries(self) -> int:
        """How often since `reset_peak` torch emptied its cache to satisfy an allocation."""

    def cap(self, limit: int) -> AbstractContextManager[None]:
        """Context in which an allocation beyond `limit` fails inside this process, so that a neighbour never pays."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that memory ran out, on a GPU or a CPU, whichever library raised it."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    text = str(error).lower()
    return isinstance(error, RuntimeError) and (
        any(words in text for words in _OUT_OF_MEMORY) or _ALLOCATING_CALL.search(text) is not None
    )


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


class _Faults:
    """Notes for the log; one of a kind is told once in a process's life."""

    def __init__(self) -> None:
        self._known: set[str] = set()
        self._untold: list[str] = []

    def note(self, kind: str, text: str) -> None:
        if kind not in self._known:
            self._known.add(kind)
            self._untold.append(text)

    def drain(self) -> list[str]:
        untold, self._untold = self._untold, []
        return untold


class CpuMeter:
    """Resident set of this process against the machine's memory and its control group's limit (Linux).

    With an allocator of ours under torch (`settle_allocator`), what it keeps of freed blocks is resident and not in
    use, and a cap can be kept.
    """

    def __init__(self) -> None:
        self._process = psutil.Process()
        self._faults = _Faults()
        self._limited: list[tuple[ControlGroup, int]] = []
        self._groups_again = -math.inf  # monotonic seconds before which groups are not looked for
        self.device = f"CPU, {os.cpu_count()} cores, {self.total() / 1e9:.1f} GB"

    @property
    def source(self) -> str:
        return "resident set" if allocator.installed() else "resident set, without a hard cap"

    def faults(self) -> list[str]:
        return self._faults.drain()

    def total(self) -> int:
        return min([int(psutil.virtual_memory().total), *(limit for limit, _ in self._groups())])

    def reading(self) -> Memory:
        free = min([int(psutil.virtual_memory().available), *(limit - used for limit, used in self._groups())])
        own = self.own()
        return Memory(own, own - self._kept(), max(free, 0))

    def own(self) -> int:
        return int(self._process.memory_info().rss)

    def held(self) -> int:
        return self.own() - self._kept()

    def available(self) -> int:
        return self.reading().available

    @staticmethod
    def _kept() -> int:
        return allocator.read().kept if allocator.installed() else 0

    def _groups(self) -> list[tuple[int, int]]:
        """(limit, used) bytes of each control group that this process is in and whose limit is below the machine's
        memory. Which these are is looked up now and then.
        """
        if time.monotonic() > self._groups_again:
            self._limited = _limited_groups()
            self._groups_again = time.monotonic() + GROUPS_SECONDS
        groups = []
        for group, limit in self._limited:
            with suppress(OSError):
                groups.append((limit, group.used()))
        return groups

    @contextmanager
    def settle(self, event: str) -> Iterator[None]:
        yield  # the resident set has everything

    def release(self) -> None:
        # A backward that was broken off leaves what it did not come to in this thread's queue of autograd's engine, and
        # its graph with it, until the next one begins.
        torch.zeros((), requires_grad=True).backward()
        if allocator.installed():  # glibc, as `settle_glibc` sets it, does so by itself
            allocator.release()

    def reset_peak(self) -> None:
        try:
            Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts again from what is resident now
        except OSError as error:
            self._faults.note("peak", f"peaks cannot be reset here ({error}): each is the highest since the start")

    def peak(self) -> int:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
        raise RuntimeError("/proc/self/status has no VmHWM line")

    def retries(self) -> int:
        return 0

    @contextmanager
    def cap(self, limit: int) -> Iterator[None]:
        """torch's share: `limit` less what the process holds beside it. What libraries take for themselves inside is
        not held back. Without an allocator of ours there is no cap: under a limit that the kernel sets (RLIMIT_DATA),
        OpenMP and oneDNN die of SIGSEGV where nothing can be raised.
        """
        if not allocator.installed():
            yield
            return
        allocator.limit(max(limit - self.held(), 0))
        try:
            yield
        finally:
            allocator.limit(None)


def _limited_groups() -> list[tuple[ControlGroup, int]]:
    total, found = psutil.virtual_memory().total, []
    for group in control_groups():
        with suppress(OSError):
            limit = group.limit()
            if limit is not None and limit < total:
                found.append((group, limit))
    return found


class _Nvml:
    """Memory of one GPU, or of the slice of one (MIG) that CUDA shows, at device level.

    No figures of single processes are asked for: containers hide processes, and the driver then shows none or all.
    """

    def __init__(self, index: int) -> None:
        import pynvml

        self._nvml = pynvml
        pynvml.nvmlInit()
        properties = torch.cuda.get_device_properties(index)  # creates no context
        visible = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
        names = [f"GPU-{properties.uuid}", f"MIG-{properties.uuid}"]
        if index < len(visible) and visible[index].strip().startswith("MIG-"):
            names.append(visible[index].strip())
        problems = []
        for name in names:
            try:
                self._handle = pynvml.nvmlDeviceGetHandleByUUID(name)
                _, total = self.free_total()
            except pynvml.NVMLError as error:
                problems.append(f"{name}: {_words(error)}")
                continue
            if SAME_DEVICE[0] <= properties.total_memory / total <= SAME_DEVICE[1]:
                return
            problems.append(f"{name}: {total / 1e9:.1f} GB, where CUDA shows {properties.total_memory / 1e9:.1f} GB")
        raise RuntimeError("; ".join(problems))

    def free_total(self) -> tuple[int, int]:
        info = self._nvml.nvmlDeviceGetMemoryInfo(self._handle)
        return int(info.free), int(info.total)


class GpuMeter:
    """One NVIDIA GPU: free memory of the device through NVML, torch.cuda.mem_get_info while NVML fails.

    What this process holds is torch's reserved memory plus everything else it took (context, code of kernels, DALI's
    and NVDEC's pools, NCCL). The driver shows the device's sum only, so the rest is counted by `settle`: what the
    device's used memory grew by, less torch's share, during events known to take such memory. Wrap in it the first
    batch of a pipeline and the first step of every plan (kernels are loaded when first used); never a step whose plan
    has been run before, whose changes are others'.

    What is certain: the rest can never be more than what is used and not torch's, and `own` is cut to that, so memory
    of others that was counted as ours is let go when they leave. What is not: another process that takes memory during
    an event is counted as ours (too much: we plan too small); one that gives memory back hides as much of ours (too
    little: by as much we can pass the budget, though not what is free). Events are short, and readings are repeated.
    """

    def __init__(self, device: torch.device) -> None:
        self._index = device.index or 0
        self._faults = _Faults()
        self._nvml: _Nvml | None = None
        self._nvml_again = -math.inf  # monotonic seconds before which NVML is not tried
        self._others: int | None = None  # free + torch's at the last reading: it changes with others' memory alone
        self._retries = 0
        self.booked: dict[str, int] = {}  # bytes held outside torch, by event

        properties = torch.cuda.get_device_properties(self._index)  # like NVML, and unlike mem_get_info, this
        self._total = int(properties.total_memory)  # creates no context
        self._open_nvml()
        before = None if self._nvml is None else self._quiet()
        torch.zeros(1, device=device)  # creates it
        torch.cuda.synchronize(self._index)
        context = 0 if before is None else before - self._quiet()
        if not CONTEXT[0] <= context <= CONTEXT[1]:
            seen = "cannot be read" if before is None else f"seemed to take {context / 1e9:.2f} GB"
            context = assumed_context((properties.major, properties.minor))
            self._faults.note("context", f"the CUDA context {seen}: assumed to hold {context / 1e9:.2f} GB")
        self.booked["context"] = context
        self.device = f"{properties.name}, {self.total() / 1e9:.1f} GB"

    @property
    def source(self) -> str:
        return "cudaMemGetInfo, NVML does not answer" if self._nvml is None else "NVML, device level"

    def faults(self) -> list[str]:
        return self._faults.drain()

    # The device

    def _open_nvml(self) -> None:
        """Open NVML, when it is time to."""
        if self._nvml is not None or time.monotonic() < self._nvml_again:
            return
        try:
            self._nvml = _Nvml(self._index)
        except Exception as error:  # no package, no library, no permission, a slice it does not name
            self._without_nvml(error)
        else:
            if self._nvml_again > -math.inf:
                self._faults.note("back", "NVML answers again")

    def _without_nvml(self, error: Exception) -> None:
        self._nvml, self._nvml_again = None, time.monotonic() + RETRY_SECONDS
        self._faults.note("nvml", f"NVML cannot be used ({_words(error)}): memory is read through cudaMemGetInfo")

    def _read(self, source: Callable[[], tuple[int, int]], reserved: int) -> int:
        """Free bytes by one source. Raises what it raises, and RuntimeError for figures that cannot be."""
        free, total = source()
        if not 0 <= free <= total - reserved:
            raise RuntimeError(f"{free / 1e9:.2f} of {total / 1e9:.2f} GB free, while torch holds {reserved / 1e9:.2f}")
        return free

    def _cuda_free_total(self) -> tuple[int, int]:
        free, total = torch.cuda.mem_get_info(self._index)
        return int(free), int(total)

    def _free(self, reserved: int) -> int:
        """Free bytes of the device, by the first source whose reading can be true; else by the last such reading."""
        self._open_nvml()
        free = None
        if self._nvml is not None:
            try:
                free = self._confirmed(self._read(self._nvml.free_total, reserved), reserved)
            except Exception as error:  # whatever the driver has: the run can go on without NVML
                self._without_nvml(error)
        if free is None:
            try:
                free = self._read(self._cuda_free_total, reserved)
            except RuntimeError as error:
                if self._others is None:
                    raise
                free = max(self._others - reserved, 0)
                self._faults.note("cuda", f"cudaMemGetInfo failed ({_words(error)}): the last good reading stands")
        self._others = free + reserved
        return free

    def _confirmed(self, free: int, reserved: int) -> int:
        """NVML's reading; where others' memory seems to have jumped, CUDA must have seen it too, or CUDA's counts."""
        if self._others is None or abs(free + reserved - self._others) <= JUMP * self._total:
            return free
        try:
            second = self._read(self._cuda_free_total, reserved)
        except RuntimeError:
            return free
        if abs(second - free) <= JUMP / 2 * self._total:
            return free
        self._faults.note("jump", f"NVML's reading jumped to {free / 1e9:.2f} GB free, CUDA sees {second / 1e9:.2f} GB")
        return second

    def _quiet(self) -> int:
        """Bytes that are free or torch's: the most of a few readings, since others also hold memory for a moment."""
        readings = []
        for attempt in range(3):
            time.sleep(0.005 if attempt else 0)
            reserved = self._torch()
            readings.append(self._free(reserved) + reserved)
        return max(readings)

    def _torch(self, kind: str = "reserved", key: str = "current") -> int:
        stats = torch.cuda.memory_stats_as_nested_dict(self._index)  # far cheaper than the flat form
        return int(stats[f"{kind}_bytes"]["all"][key]) if stats else 0  # empty before CUDA is used

    @contextmanager
    def settle(self, event: str) -> Iterator[None]:
        before = self._quiet()
        try:
            yield
        finally:
            torch.cuda.synchronize(self._index)
            grown = before - self._quiet()
            if grown < 0:
                self._faults.note("shrunk", f"during {event} others gave {-grown / 1e9:.2f} GB back; ours is not seen")
            self.booked[event] = self.booked.get(event, 0) + max(grown, 0)

    # This process

    def total(self) -> int:
        return self._total

    def reading(self) -> Memory:
        reserved = self._torch()
        free = self._free(reserved)
        outside = self._outside(free, reserved)
        return Memory(reserved + outside, self._torch("allocated") + outside, free)

    def _outside(self, free: int, reserved: int) -> int:
        return min(sum(self.booked.values()), max(self._total - free - reserved, 0))

    def own(self) -> int:
        return self.reading().own

    def held(self) -> int:
        return self.reading().held

    def available(self) -> int:
        return self.reading().available

    def release(self) -> None:
        torch.cuda.empty_cache()

    def reset_peak(self) -> None:
        torch.cuda.synchronize(self._index)
        torch.cuda.reset_peak_memory_stats(self._index)
        self._retries = self._retried()

    def peak(self) -> int:
        torch.cuda.synchronize(self._index)
        reserved = self._torch()
        return self._torch(key="peak") + self._outside(self._free(reserved), reserved)

    def retries(self) -> int:
        return self._retried() - self._retries

    def _retried(self) -> int:
        return int(torch.cuda.memory_stats_as_nested_dict(self._index)["num_alloc_retries"])

    @contextmanager
    def cap(self, limit: int) -> Iterator[None]:
        """torch's share of the device: `limit` less what it does not cover (context, foreign pools), and less one
        segment, by which torch can overrun its share. Foreign pools that grow inside are not held back.
        """
        reserved = self._torch()
        rest = self._outside(self._free(reserved), reserved)
        before = torch.cuda.get_per_process_memory_fraction(self._index)
        share = (limit - rest - SEGMENT) / self._total
        torch.cuda.set_per_process_memory_fraction(min(max(share, 0.0), 1.0), self._index)
        try:
            yield
        finally:
            torch.cuda.set_per_process_memory_fraction(before, self._index)


def _words(error: BaseException) -> str:
    return str(error) or type(error).__name__


def open_meter(device: torch.device) -> Meter:
    return GpuMeter(device) if device.type == "cuda" else CpuMeter()

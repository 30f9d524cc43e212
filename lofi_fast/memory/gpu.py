"""The meter of one NVIDIA GPU: how much memory the driver shows as used, and how much of that is this process's."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from lofi_fast.memory.cards import assumed_context
from lofi_fast.memory.meter import Faults, Memory, finish_backward, is_out_of_memory, may_be_out_of_memory

SEGMENT = 20 << 20  # torch maps its expandable segments in pieces of this size, and can exceed a cap by one of them
SAME_DEVICE = (0.9, 1.02)  # CUDA's total memory / NVML's; lower where NVML shows a whole card and CUDA a slice of it
CONTEXT = (64 << 20, 3 << 30)  # bytes of a CUDA context; another reading means that it existed, or that others changed
OUTSIDE_AT_MOST = 1 << 30  # that libraries take during an event; more than that another process took
AGAIN_AT_MOST = 256 << 20  # that they take when it happens again: code of a few more kernels
FIRST_NAMESPACE = "pid:[4026531836]"  # of a machine's own processes; the kernel fixes this number
JUMP = 0.1  # of the device's memory: if others' memory changes by more between two readings, CUDA is asked too
SPARE = 4 << 10  # bytes that are held for the backward pass by which a broken one is finished
RETRY_SECONDS = 10.0  # after a failure of NVML
NEAR = 0.9  # of what torch may hold: if it held so much, a library's ambiguous error is taken for out of memory


class _Nvml:
    """Free and total memory of one GPU, or of the slice of one (MIG) that CUDA shows.

    What single processes hold is told by process number. In a container these are not the numbers that its processes
    know, so there only figures for the whole device are read.
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

    def held(self) -> int | None:
        """Bytes that this process holds; None where the driver does not say, or does not say so reliably."""
        if _namespace() != FIRST_NAMESPACE:
            return None
        try:
            processes = self._nvml.nvmlDeviceGetComputeRunningProcesses(self._handle)
        except Exception:  # no permission, or not supported here
            return None
        return next((process.usedGpuMemory for process in processes if process.pid == os.getpid()), None)


class GpuMeter:
    """Reads the free memory of one NVIDIA GPU through NVML, and through torch.cuda.mem_get_info while NVML fails.

    This process holds torch's reserved memory and what is outside torch: the CUDA context, code of kernels, pools of
    DALI and NVDEC, NCCL. What is outside torch is measured by `settle`, around an event that takes such memory: the
    construction of a pipeline, the first step of a process, and the first step of every plan (kernels are loaded when
    they are first used). Do not wrap a step whose plan has run before: what changes then is others'.

    Where the driver says what this process holds, that is what `settle` goes by. In a container, and where the driver
    keeps it to itself, only the sum over all processes can be read, and what counts is how much the device's used
    memory grew, beyond torch's. Two errors are possible then. Memory that another process takes during an event is
    counted as ours where it is no more than libraries may take (`OUTSIDE_AT_MOST`, or `AGAIN_AT_MOST`), and plans are
    smaller than they need to be. Memory that another process gives back during an event hides as much of ours, by which
    the budget can be exceeded, though never what is free. Events are short and readings are repeated, to make both
    rare. Memory outside torch can never be more than what is used and not torch's, and `own` is cut to that: if another
    process's memory was counted as ours, this ends when that process gives it back.
    """

    def __init__(self, device: torch.device) -> None:
        self._index = device.index or 0
        self._faults = Faults()
        self._nvml: _Nvml | None = None
        self._nvml_again = -math.inf  # monotonic seconds before which NVML is not tried
        self._others: int | None = None  # free + torch's memory at the last reading; only other processes change it
        self._retries = 0
        self.booked: dict[str, int] = {}  # bytes held outside torch, by event

        properties = torch.cuda.get_device_properties(self._index)  # like NVML, and unlike mem_get_info, this
        self._total = int(properties.total_memory)  # creates no context
        self._open_nvml()
        before = None if self._nvml is None else self._quiet()
        torch.zeros(1, device=device)  # creates it
        torch.cuda.synchronize(self._index)
        context = 0 if before is None else before - self._quiet()
        if (told := self._told()) is not None:
            context = told
        if not CONTEXT[0] <= context <= CONTEXT[1]:
            seen = "cannot be read" if before is None else f"seemed to take {context / 1e9:.2f} GB"
            context = assumed_context((properties.major, properties.minor))
            self._faults.note("context", f"the CUDA context {seen}: assumed to hold {context / 1e9:.2f} GB")
        self.booked["context"] = context
        self._spare: torch.Tensor | None = self._hold_spare()
        self.device = f"{properties.name}, {self.total() / 1e9:.1f} GB"

    @property
    def source(self) -> str:
        return "cudaMemGetInfo, NVML does not answer" if self._nvml is None else "NVML, device level"

    def faults(self) -> list[str]:
        return self._faults.drain()

    # The device

    def _open_nvml(self) -> None:
        """Try to open NVML, unless it failed less than `RETRY_SECONDS` ago."""
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
        """Free bytes from one source. Raises what the source raises, and RuntimeError for impossible figures."""
        free, total = source()
        if not 0 <= free <= total - reserved:
            raise RuntimeError(f"{free / 1e9:.2f} of {total / 1e9:.2f} GB free, while torch holds {reserved / 1e9:.2f}")
        return free

    def _cuda_free_total(self) -> tuple[int, int]:
        free, total = torch.cuda.mem_get_info(self._index)
        return int(free), int(total)

    def _free(self, reserved: int) -> int:
        """Free bytes of the device: the first source with a possible reading, or else the last such reading."""
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
        """NVML's reading. If others' memory seems to have jumped and CUDA does not confirm it, CUDA's reading."""
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
        """Bytes that are free or torch's: the largest of three readings; others may hold memory for a moment."""
        readings = []
        for attempt in range(3):
            time.sleep(0.005 if attempt else 0)
            reserved = self._torch()
            readings.append(self._free(reserved) + reserved)
        return max(readings)

    def _torch(self, kind: str = "reserved", key: str = "current") -> int:
        stats = torch.cuda.memory_stats_as_nested_dict(self._index)  # far cheaper than the flat form
        return int(stats[f"{kind}_bytes"]["all"][key]) if stats else 0  # empty before CUDA is used

    def _told(self) -> int | None:
        """Bytes that this process holds outside torch as the driver tells it; None where it does not."""
        held = None if self._nvml is None else self._nvml.held()
        reserved = self._torch()
        if held is None or not reserved <= held <= self._total - self._free(reserved):  # another process's, or nonsense
            return None
        return held - reserved

    @contextmanager
    def settle(self, event: str, once: bool = False) -> Iterator[None]:
        if once and event in self.booked:
            yield
            return
        before, told_before = self._quiet(), self._told()
        try:
            yield
        finally:
            torch.cuda.synchronize(self._index)
            told = self._told()
            if told is None or told_before is None:
                grown = self._ours(event, before - self._quiet())
            else:
                grown = told - told_before
            self.booked[event] = max(self.booked.get(event, 0) + grown, 0)

    def _ours(self, event: str, grown: int) -> int:
        """Of what the device's used memory grew by during an event, beyond torch's: the bytes that are ours."""
        if grown < 0:
            self._faults.note("shrunk", f"during {event} others gave {-grown / 1e9:.2f} GB back; ours is not seen")
        elif grown > (AGAIN_AT_MOST if event in self.booked else OUTSIDE_AT_MOST):
            self._faults.note("grown", f"during {event} others took memory, {grown / 1e9:.2f} GB; ours is not seen")
        else:
            return grown
        return 0

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
        """Finishes a backward pass that was broken off, waits for the device, and then empties torch's cache: a block
        that is still in use cannot be given back. It gets through where neither torch nor the card has memory left.
        """
        finish_backward(torch.device("cpu"))
        self._spare = None  # its block serves the few numbers of the next line
        finish_backward(torch.device("cuda", self._index))
        self._spare = self._hold_spare()
        torch.cuda.synchronize(self._index)
        torch.cuda.empty_cache()

    def _hold_spare(self) -> torch.Tensor:
        return torch.empty(SPARE, dtype=torch.uint8, device=torch.device("cuda", self._index))

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
        """Caps torch's memory at `limit` minus what is outside torch (context, pools of other libraries) and minus one
        segment, by which torch can exceed its cap. Pools of other libraries that grow meanwhile are not capped.
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

    def ran_out(self, error: BaseException) -> bool:
        """cuDNN and cuBLAS are believed only where torch has held nearly all that it may: elsewhere their words have
        another cause, and a step tried again with less memory would fail with the same words, which are then raised.
        """
        if is_out_of_memory(error):
            return True
        if not may_be_out_of_memory(error):
            return False
        reserved = self._torch()
        share = torch.cuda.get_per_process_memory_fraction(self._index) * self._total
        return self._torch(key="peak") >= NEAR * min(share, reserved + self._free(reserved))


def _namespace() -> str:
    try:
        return os.readlink("/proc/self/ns/pid")
    except OSError:  # not Linux
        return ""


def _words(error: BaseException) -> str:
    return str(error) or type(error).__name__

"""The meter of a CPU: the resident set, against the machine's memory and its control group's limit."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
import torch

from lofi_fast.memory import allocator
from lofi_fast.memory.cgroups import ControlGroup, control_groups
from lofi_fast.memory.meter import Faults, Memory, finish_backward, is_out_of_memory

GROUPS_SECONDS = 30.0  # between two looks for control groups and their limits


class CpuMeter:
    """Compares the resident set of this process with the machine's memory and its control group's limit (Linux).

    With our allocator under torch (`settle_allocator`) a cap can be enforced; the freed blocks that it keeps are
    resident, and are not in use.
    """

    def __init__(self) -> None:
        self._process = psutil.Process()
        self._faults = Faults()
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
        memory. The groups are looked up again every `GROUPS_SECONDS`.
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
    def settle(self, event: str, once: bool = False) -> Iterator[None]:
        yield  # the resident set already counts everything

    def release(self) -> None:
        finish_backward(torch.device("cpu"))
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
        """Caps tensors at `limit` minus what the process holds beside them. What libraries allocate by themselves
        meanwhile is not capped.

        Without our allocator there is no cap: under a limit set in the kernel (RLIMIT_DATA), OpenMP and oneDNN end the
        process with SIGSEGV where no exception can be raised.
        """
        if not allocator.installed():
            yield
            return
        allocator.limit(max(limit - self.held(), 0))
        try:
            yield
        finally:
            allocator.limit(None)

    def ran_out(self, error: BaseException) -> bool:
        return is_out_of_memory(error)


def _limited_groups() -> list[tuple[ControlGroup, int]]:
    total, found = psutil.virtual_memory().total, []
    for group in control_groups():
        with suppress(OSError):
            limit = group.limit()
            if limit is not None and limit < total:
                found.append((group, limit))
    return found

"""Time and memory of calls. Calls that are compared alternate within one process, each from cold caches, and the copy
that gives the roof runs among them, so that whatever else the machine does meets all of them.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from multiprocessing.connection import Connection
from statistics import median, quantiles
from typing import Any

import torch

from lofi_fast.memory.cpu import CpuMeter
from lofi_fast.memory.meter import is_out_of_memory
from lofi_fast.memory.settle import settle_glibc

MIB = 2**20
ROOF = "copy"  # the name of the copy among the calls

Call = Callable[[], Any]


@dataclass(frozen=True)
class Spread:
    """Of several measurements: the median, and what a fifth of them are below and above."""

    median: float
    p20: float
    p80: float


def spread(values: Sequence[float]) -> Spread:
    if len(values) == 1:
        return Spread(values[0], values[0], values[0])
    fifths = quantiles(values, n=5, method="inclusive")
    return Spread(median(values), fifths[0], fifths[3])


class Stopwatch:
    """Seconds of one call on a device."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        # More than the last cache of any current processor holds; writing it empties the caches.
        self._flush = torch.empty((256 if self._cuda else 128) * MIB, dtype=torch.uint8, device=device)

    def __call__(self, call: Call) -> float:
        self._flush.zero_()
        if not self._cuda:
            began = time.perf_counter()
            call()
            return time.perf_counter() - began
        torch.cuda.synchronize()
        # The GPU waits for a millisecond first, so that everything is queued by then: Python's own time is not counted,
        # except where the call itself waits for the GPU.
        torch.cuda._sleep(2_000_000)
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        end.synchronize()
        milliseconds: float = start.elapsed_time(end)
        return milliseconds / 1e3


@cache
def roof(device: torch.device) -> tuple[Call, int]:
    """A copy between two places of the device's memory, too large for its caches, and the bytes it moves."""
    moved = 2 * (512 if device.type == "cuda" else 64) * MIB
    return copy_of(moved, device), moved


def copy_of(moved: int, device: torch.device) -> Call:
    """A copy that reads and writes so many bytes in all."""
    source = torch.ones(moved // 2, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return lambda: target.copy_(source)


def interleaved(
    calls: Mapping[str, Call], stopwatch: Stopwatch, rounds: int, seconds: float, least: int = 3
) -> dict[str, list[float]]:
    """Seconds of each call in each round. Each round runs every call once, and begins with another of them.

    A slow call takes part in the first rounds only: as many as fit in `seconds`, and no fewer than `least`.
    """
    limits = dict.fromkeys(calls, rounds)
    for name, call in calls.items():
        if rounds > 1:  # one round tells no times, so it needs no warm-up
            limits[name] = min(rounds, max(least, int(seconds / stopwatch(call))))
    names = list(calls)
    samples: dict[str, list[float]] = {name: [] for name in names}
    for number in range(max(limits.values())):
        first = number % len(names)
        for name in (*names[first:], *names[:first]):
            if number < limits[name]:
                samples[name].append(stopwatch(calls[name]))
    return samples


def peak_above_start(call: Call, device: torch.device, warm: bool = True) -> int:
    """Bytes that a call holds at most beyond what was there before it; it is run once before, if told to `warm` up.

    On a GPU by torch's allocator. On a CPU by the resident set, which tells the truth only in a process that has done
    nothing else (`in_child`) and whose allocator gives memory back (`settle_glibc`).
    """
    if warm:
        call()
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    meter = CpuMeter()
    meter.reset_peak()
    before = meter.own()
    call()
    return max(meter.peak() - before, 0)


def in_child(function: Callable[..., Any], *arguments: Any, cuda: bool = False, settled: bool = True) -> Any:
    """What `function` returns in a process of its own; None where memory runs out there. `cuda`: it uses the GPU.

    `settled`: under glibc's settings of training (`settle_glibc`), without which the peak of one and the same call
    varies. Times are taken in the calling process, under the settings that PyTorch's users have.
    """
    os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    # The server imports torch once, and each child starts as a copy of it; CUDA does not work in copies.
    context = multiprocessing.get_context("spawn" if cuda else "forkserver")
    if not cuda:
        context.set_forkserver_preload(["bench.tools.cases"])
    receiver, sender = context.Pipe(duplex=False)
    child = context.Process(target=_send, args=(sender, settled, function, *arguments))
    child.start()
    sender.close()
    ended = False
    try:
        result = receiver.recv()
    except EOFError:
        result, ended = None, True
    child.join()
    if ended and (child.exitcode or 0) >= 0:  # by itself; the system ends a process by a signal when memory runs out
        raise RuntimeError(f"{getattr(function, '__name__', function)} ended with status {child.exitcode}")
    if not isinstance(result, Exception):
        return result
    if is_out_of_memory(result):
        return None
    raise result


def _send(sender: Connection, settled: bool, function: Callable[..., Any], *arguments: Any) -> None:
    if settled:
        settle_glibc()
    try:
        result = function(*arguments)
    except Exception as error:
        result = error
    sender.send(result)

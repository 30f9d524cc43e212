"""Meters: how much memory this process holds, how much the device has left, and the cap that keeps us inside.

Budget and readings are bytes as the driver shows them. On a GPU that is the CUDA context, torch's reserved memory and
the pools of other libraries, read at device level through NVML (readings for single processes are unreliable in
containers). On a CPU it is the resident set.
"""

from __future__ import annotations

import errno
import re
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol

import torch

STEP = "a step"  # the event of a plan's first step, which may load code
_OUT_OF_MEMORY = (
    "out of memory", "can't allocate", "cannot allocate memory", "bad_alloc", "alloc_failed", "allocation_failed",
    "allocation failed", "could not create a primitive", "could not create a memory",
)  # fmt: skip
# What cuDNN and cuBLAS say when they find no memory for a workspace or a handle, and for other reasons too.
_PERHAPS_OUT_OF_MEMORY = (
    "unable to find an engine to execute this computation", "unable to find a valid cudnn algorithm",
    "cudnn_status_not_initialized", "cudnn_status_not_supported", "cublas_status_not_initialized",
)  # fmt: skip
# In a kernel of ours built against the stable ABI of torch before 2.13, a failed call loses its reason. Calls that do
# nothing but allocate (for `contiguous`, and copy) fail for want of memory alone.
_ALLOCATING_CALL = re.compile(r"(aten::|aoti_torch_(aten_)?)(new_)?(empty|contiguous)\w*.* api call failed", re.DOTALL)


@dataclass(frozen=True)
class Memory:
    """One reading, in bytes."""

    own: int  # what this process holds
    held: int  # of that, what is in use; `release` would give the rest back
    free: int  # what no process holds

    @property
    def available(self) -> int:
        """What this process could hold."""
        return self.own + self.free


class Meter(Protocol):
    """Reads the memory of one device, and caps what this process takes of it. Amounts are bytes."""

    device: str  # its name, with its total memory

    @property
    def source(self) -> str:
        """Where readings come from at present, in words."""

    def faults(self) -> list[str]:
        """Sentences for the log about readings that failed and were replaced. Each kind of fault is reported once."""

    def total(self) -> int:
        """Memory of the device."""

    def reading(self) -> Memory:
        """Own, held and free memory at one moment, in one call; cheap enough for every step."""

    def own(self) -> int:
        """What this process holds now, as the driver or the system counts it."""

    def held(self) -> int:
        """What of `own` is in use; `release` would give the rest back."""

    def available(self) -> int:
        """What this process could hold: its own plus what is free."""

    def settle(self, event: str, once: bool = False) -> AbstractContextManager[None]:
        """Attribute to this process the memory that is gained in this context outside torch. `event` names what happens
        in it; with `once` only the first event of a name is counted. Events of one name take less when they come again.
        """

    def release(self) -> None:
        """Give memory that is held and not used back to the device, as far as possible."""

    def reset_peak(self) -> None:
        """Start a new peak measurement."""

    def peak(self) -> int:
        """The most that this process has held since `reset_peak`."""

    def retries(self) -> int:
        """How often torch has emptied its cache for an allocation since `reset_peak`."""

    def cap(self, limit: int) -> AbstractContextManager[None]:
        """Context in which an allocation fails inside this process before it holds more than `limit`, so that memory is
        never taken from a neighbour.
        """

    def ran_out(self, error: BaseException) -> bool:
        """Whether an exception, raised under the cap, means that memory ran out."""


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


def reason_of(error: BaseException) -> str:
    """One line for the log: the first of the error's text, or what it means where a kernel of ours lost the text."""
    text = str(error)
    if not isinstance(error, torch.OutOfMemoryError) and (call := _ALLOCATING_CALL.search(text.lower())):
        return f"lofi_fast: out of memory in a C++ kernel, where it called {call[0].partition(chr(34))[0]}"
    return text.partition("\n")[0] or type(error).__name__


def may_be_out_of_memory(error: BaseException) -> bool:
    """Whether an exception is one that libraries raise for want of memory, but not for that alone."""
    text = str(error).lower()
    return isinstance(error, RuntimeError) and any(words in text for words in _PERHAPS_OUT_OF_MEMORY)


def finish_backward(device: torch.device) -> None:
    """Let go of what a backward pass that was broken off still holds: the rest of it waits in the queue of autograd's
    engine for `device`, and its graph with it, until the next backward pass begins.
    """
    torch.zeros((), requires_grad=True, device=device).backward()


class Faults:
    """Sentences for the log. Of each kind only the first is kept."""

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

"""One start of a Triton kernel as data, so that what is compiled ahead of time is what is launched; and how the same
start is repeated at little cost to the host.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from triton import knobs

MOST_REMEMBERED = 4096  # launches of one kernel; a training run has some hundreds of shapes


@dataclass(frozen=True)
class Launch:
    """A kernel, its grid and its arguments. Over meta tensors it can be inspected and compiled, but not run."""

    kernel: Any  # made by triton.jit
    grid: tuple[int, ...]  # programs; the first dimension may count up to 2^31 - 1, the others to 65535
    arguments: dict[str, Tensor | int | float | None]
    constants: dict[str, Any] = field(default_factory=dict)  # the kernel's tl.constexpr parameters
    num_warps: int = 4
    fp_fusion: bool = True  # False: a product and the sum after it round one by one, as in PyTorch
    least_target: int = 0  # compute capability times 10, below which it is not launched

    def run(self) -> Any:
        """Start the kernel on the current stream of its tensors' device. An empty grid starts nothing.

        Returns the compiled kernel; None where nothing was started, or where Triton's interpreter ran it.
        """
        if 0 in self.grid:
            return None
        device = next(value.device for value in self.arguments.values() if isinstance(value, Tensor))
        if device.type == "cuda":
            with torch.cuda.device(device):
                return self._start()
        return self._start()

    def _start(self) -> Any:
        return self.kernel[self.grid](
            **self.arguments, **self.constants, num_warps=self.num_warps, enable_fp_fusion=self.fp_fusion
        )


@dataclass(frozen=True)
class _Ready:
    """A launch that was made once: all that a repetition passes to the driver beside the tensors' addresses."""

    start: Callable[..., None]  # Triton's launcher of the compiled kernel
    grid: tuple[int, int, int]
    function: int
    metadata: Any
    arguments: tuple[Any, ...]  # those that follow the tensors, in the order of the kernel's parameters


class Launcher:
    """Repeats launches of one kernel without Triton's just-in-time front end, which binds, specialises and hashes every
    argument at each call: several times what the launch itself costs the host.

    A launch is remembered by the tensors' strides and by a key that the caller gives. Together they must settle all
    else: shapes, dtypes, numbers, constants. Tensors are the first parameters of the kernel. Kernels are compiled for
    addresses that are multiples of 16; tensors that begin elsewhere take the front end's way, and so does everything
    while a profiler has hooks in Triton.

    Args:
        given: the place among the tensors of one that is never None; the others are on its device.
    """

    def __init__(self, given: int = 0) -> None:
        self._place = given
        self._ready: dict[Hashable, _Ready] = {}

    def repeat(self, tensors: Sequence[Tensor | None], key: tuple[Hashable, ...]) -> bool:
        """Start what `run` remembered for such tensors and this key; False where there is none, and nothing started."""
        device = tensors[self._place].get_device()  # type: ignore[union-attr]
        ready = self._ready.get((device, *key, *[None if x is None else x.stride() for x in tensors]))
        if ready is None or knobs.runtime.launch_enter_hook.calls or knobs.runtime.launch_exit_hook.calls:
            return False
        addresses = [None if x is None else x.data_ptr() for x in tensors]
        for address in addresses:
            if address is not None and address & 15:
                return False
        if torch._C._cuda_getDevice() == device:
            _start(ready, device, addresses)
        else:
            with torch.cuda.device(device):
                _start(ready, device, addresses)
        return True

    def run(self, launch: Launch, tensors: Sequence[Tensor | None], key: tuple[Hashable, ...]) -> None:
        """`launch.run()`, to be remembered where the tensors are the launch's own, and not copies in its place."""
        kernel = launch.run()
        if kernel is None:
            return
        names = launch.kernel.arg_names
        addresses = [None if x is None else x.data_ptr() for x in tensors]
        launched = [launch.arguments[name] for name in names[: len(tensors)]]
        if addresses != [x.data_ptr() if isinstance(x, Tensor) else x for x in launched]:
            return
        if any(address is not None and address & 15 for address in addresses):
            return
        if len(self._ready) >= MOST_REMEMBERED:
            self._ready.clear()
        grid_0, grid_1, grid_2 = (*launch.grid, 1, 1)[:3]
        rest = {**launch.arguments, **launch.constants}
        device = tensors[self._place].get_device()  # type: ignore[union-attr]
        self._ready[(device, *key, *[None if x is None else x.stride() for x in tensors])] = _Ready(
            kernel.run,
            (grid_0, grid_1, grid_2),
            kernel.function,
            kernel.packed_metadata,
            tuple(rest[name] for name in names[len(tensors) :]),
        )


def _start(ready: _Ready, device: int, addresses: list[int | None]) -> None:
    stream = torch._C._cuda_getCurrentRawStream(device)
    ready.start(*ready.grid, stream, ready.function, ready.metadata, None, None, None, *addresses, *ready.arguments)

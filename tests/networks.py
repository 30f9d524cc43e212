"""For the tests of networks: weights and frames that are the same on every machine, and what a forward pass holds."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

FP32, BF16 = 4, 2  # bytes of a number


def fill(module: torch.nn.Module, seed: int = 0) -> None:
    """The same numbers whatever the initialisation, the torch version and the order of modules: variance-keeping
    weights, BN parameters and statistics that are not the trivial ones.
    """
    with torch.no_grad():
        for key, value in sorted(module.state_dict().items()):
            random = np.random.RandomState([seed, *key.encode()])
            if value.dim() > 1:
                numbers = random.standard_normal(value.shape) * (2 / value[0].numel()) ** 0.5
            elif key.endswith("running_var") or (key.endswith("weight") and value.dim() == 1):
                numbers = random.uniform(0.5, 1.5, value.shape)
            else:
                numbers = random.uniform(-0.2, 0.2, value.shape)
            if value.is_floating_point():
                value.copy_(torch.from_numpy(np.asarray(numbers)))


def frames(count: int, side: int = 32, seed: int = 0) -> Tensor:
    return torch.from_numpy(np.random.RandomState(seed).randint(0, 256, (count, side, side, 3)).astype(np.uint8))


def storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


class Alive(TorchDispatchMode):
    """Bytes of all storages that operators made and that are still alive, and the most there were.

    What an operator takes for itself and gives back is not seen. `known` storages are not counted.
    """

    def __init__(self, known: list[Tensor]) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known = {storage(tensor) for tensor in known}
        self._alive: dict[int, Any] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self._see(tensor)
        return out

    def _see(self, tensor: Tensor) -> None:
        made = tensor.untyped_storage()
        key, size = made._cdata, made.nbytes()
        if key in self._known or key in self._alive:
            return

        def gone(reference: object) -> None:
            if self._alive.get(key) is reference:
                del self._alive[key]
                self.now -= size

        self._alive[key] = weakref.ref(made, gone)
        self.now += size
        self.peak = max(self.peak, self.now)


def saved_bytes(known: list[Tensor], forward: Callable[[], object]) -> int:
    """What autograd holds of `forward`, whose results are alive: every storage once, `known` ones not."""
    ours = {storage(tensor) for tensor in known}
    saved: dict[int, Any] = {}

    def pack(tensor: Tensor) -> Tensor:
        if storage(tensor) not in ours:
            saved[storage(tensor)] = weakref.ref(tensor.untyped_storage())
        return tensor.detach()  # a function's own result would otherwise hold its own graph

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = forward()
    alive = sum(made.nbytes() for reference in saved.values() if (made := reference()) is not None)
    del result
    return alive


def precision(itemsize: int) -> AbstractContextManager[None]:
    return torch.autocast("cpu", dtype=torch.bfloat16, enabled=itemsize == BF16)

"""Training by several processes: before a step they agree on one plan that fits in all of them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import distributed


def agree(mine: int, fits: Callable[[int], bool], count: int) -> int:
    """The index of the plan that all processes run, of `count` plans, best first; `count` when no plan fits everywhere.

    It is the first that is no better than any process's own choice (`mine`) and that `fits` in all of them. In a single
    process it is `mine`.
    """
    if not _several():
        return mine
    agreed = highest_of_all(mine)
    while True:
        mine = next((i for i in range(agreed, count) if fits(i)), count)
        lower = highest_of_all(mine)
        if lower == agreed:
            return agreed
        agreed = lower


def _several() -> bool:
    return distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1


def highest_of_all(value: int) -> int:
    """The largest of all processes' values."""
    if not _several():
        return value
    device = torch.device("cuda", torch.cuda.current_device()) if distributed.get_backend() == "nccl" else "cpu"
    shared = torch.tensor(value, device=device)
    distributed.all_reduce(shared, op=distributed.ReduceOp.MAX)
    return int(shared)

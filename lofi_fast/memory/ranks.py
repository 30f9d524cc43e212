"""What several ranks agree on before a step."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import distributed


def _agree(mine: int, fits: Callable[[int], bool], count: int) -> int:
    """The first of `count` plans that is no higher than what any process chose (`mine`) and `fits` in all of them;
    `count` when none does. In a single process: `mine`.
    """
    if not _several():
        return mine
    agreed = _highest_of_all(mine)
    while True:
        mine = next((i for i in range(agreed, count) if fits(i)), count)
        lower = _highest_of_all(mine)
        if lower == agreed:
            return agreed
        agreed = lower


def _several() -> bool:
    return distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1


def _highest_of_all(value: int) -> int:
    if not _several():
        return value
    device = torch.device("cuda", torch.cuda.current_device()) if distributed.get_backend() == "nccl" else "cpu"
    shared = torch.tensor(value, device=device)
    distributed.all_reduce(shared, op=distributed.ReduceOp.MAX)
    return int(shared)

"""Numbers for the tests of networks: weights and frames that are the same on every machine."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


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

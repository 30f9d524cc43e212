"""Optimisers and learning-rate schedules of the stages."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import nn

from lofi_fast.config import StageConfig

WARM_UP = 0.1  # share of a cosine schedule that rises from zero


def make_optimizer(config: StageConfig, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    """SGD without momentum (the paper's joint stage), Adam or AdamW, over the parameters that learn.

    Adam's state is allocated now: it is part of what a step needs, and a first update that runs out of memory halfway
    could not be taken again.
    """
    learning = [p for p in parameters if p.requires_grad]
    if config.optimizer == "sgd":
        return torch.optim.SGD(learning, lr=config.lr, momentum=0.0, weight_decay=config.weight_decay)
    kind = torch.optim.Adam if config.optimizer == "adam" else torch.optim.AdamW
    optimizer = kind(learning, lr=config.lr, weight_decay=config.weight_decay)
    for parameter in learning:
        moments = {name: torch.zeros_like(parameter) for name in ("exp_avg", "exp_avg_sq")}
        optimizer.state[parameter] = {"step": torch.tensor(0.0), **moments}
    return optimizer


def learning_rate(config: StageConfig, epoch: int, step: int, steps: int) -> float:
    """Learning rate of one step of `steps` in an epoch: x `decay` every `decay_every` epochs, or a cosine down to zero
    after a linear rise.
    """
    if config.schedule == "step":
        return config.lr * config.decay ** (epoch // config.decay_every)
    done = (epoch + (step + 0.5) / steps) / config.epochs
    if done < WARM_UP:
        return config.lr * done / WARM_UP
    return config.lr * 0.5 * (1 + math.cos(math.pi * (done - WARM_UP) / (1 - WARM_UP)))


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr

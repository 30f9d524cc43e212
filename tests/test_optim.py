"""Optimisers with their state made beforehand, learning-rate schedules, and the choice of precision."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn

from lofi_fast.config import StageConfig
from lofi_fast.errors import InputError
from lofi_fast.optim import learning_rate, make_optimizer, set_learning_rate
from lofi_fast.precision import choose_device, choose_precision

STEP = StageConfig(epochs=15, batch=1, optimizer="sgd", lr=0.1)
COSINE = StageConfig(epochs=10, batch=1, optimizer="adamw", lr=2e-3, weight_decay=0.02, schedule="cosine")


def test_the_papers_schedule_halves_every_five_epochs() -> None:
    rates = [learning_rate(STEP, epoch, 3, 7) for epoch in (0, 4, 5, 9, 10, 14)]
    assert rates == [0.1, 0.1, 0.05, 0.05, 0.025, 0.025]


def test_the_cosine_rises_for_a_tenth_and_falls_to_nothing() -> None:
    rates = [learning_rate(COSINE, epoch, step, 20) for epoch in range(10) for step in range(20)]
    peak = rates.index(max(rates))
    assert peak in (19, 20)  # a tenth of 200 steps
    assert rates[:peak] == sorted(rates[:peak]) and rates[peak:] == sorted(rates[peak:], reverse=True)
    assert rates[0] == pytest.approx(2e-3 * (0.5 / 200) / 0.1)
    assert rates[-1] < 1e-6
    assert rates[110] == pytest.approx(1e-3 * (1 + math.cos(math.pi * ((110.5 / 200) - 0.1) / 0.9)))


@pytest.mark.parametrize(
    ("name", "kind"), [("sgd", torch.optim.SGD), ("adam", torch.optim.Adam), ("adamw", torch.optim.AdamW)]
)
def test_updates_are_torchs_own(name: str, kind: type[torch.optim.Optimizer]) -> None:
    """State made beforehand changes no bit of an update, and frozen parameters are left alone."""
    torch.manual_seed(0)
    ours = nn.Sequential(nn.Linear(5, 4), nn.Linear(4, 3))
    ours[0].requires_grad_(False)
    theirs = copy.deepcopy(ours)
    config = StageConfig(epochs=1, batch=1, optimizer=name, lr=0.05, weight_decay=0.02)  # type: ignore[arg-type]
    mine = make_optimizer(config, ours.parameters())
    torchs = kind(theirs[1].parameters(), lr=0.05, weight_decay=0.02)  # type: ignore[call-arg]
    for step in range(4):
        x = torch.randn(6, 5)
        for model, optimizer in ((ours, mine), (theirs, torchs)):
            set_learning_rate(optimizer, 0.05 / (step + 1))
            model(x).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True))


def test_adams_state_is_there_before_the_first_step() -> None:
    layer = nn.Linear(30, 20)
    optimizer = make_optimizer(COSINE, layer.parameters())
    moments = sum(t.numel() for state in optimizer.state.values() for t in state.values() if t.ndim)
    assert moments == 2 * sum(p.numel() for p in layer.parameters())


def test_a_cpu_computes_in_fp32_and_says_so() -> None:
    precision = choose_precision(torch.device("cpu"))
    assert precision.dtype is torch.float32 and not precision.scaled and str(precision) == "float32 (a CPU)"
    with precision.autocast(torch.device("cpu")):
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype is torch.float32


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is at hand")
def test_a_gpu_that_is_not_there_is_refused() -> None:
    assert choose_device("auto").type == "cpu"
    with pytest.raises(InputError, match="--device cpu"):
        choose_device("cuda")


@pytest.mark.gpu
def test_a_gpu_computes_in_half_precision() -> None:
    precision = choose_precision(torch.device("cuda"))
    recent = torch.cuda.get_device_capability() >= (8, 0)
    assert precision.dtype is (torch.bfloat16 if recent else torch.float16) and precision.scaled is not recent

"""Launches that are remembered: what a repetition computes, and what is not repeated."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from forms import images
from torch import Tensor

from lofi_fast.kernels import residual_shift, stem_forward, temporal_shift
from lofi_fast.kernels.residual_shift import reference

pytest.importorskip("triton")

from lofi_fast.kernels.launch import Launcher
from lofi_fast.kernels.residual_shift import kernel
from lofi_fast.kernels.temporal_shift import kernel as shift_kernel

SHAPE = (16, 64, 14, 14)


@pytest.fixture
def remembered(monkeypatch: pytest.MonkeyPatch) -> Iterator[Launcher]:
    """residual_shift's launcher, empty at first."""
    launcher = Launcher()
    monkeypatch.setattr(kernel, "_forward", launcher)
    with torch.no_grad():
        yield launcher


def numbers(seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """(x, bias, identity) of residual_shift on the GPU."""
    x, identity = (images(SHAPE, "channels_last", torch.bfloat16, seed + k).cuda() for k in range(2))
    return x, torch.randn(SHAPE[1], generator=torch.Generator().manual_seed(seed)).cuda(), identity


def assert_right(x: Tensor, bias: Tensor, identity: Tensor) -> None:
    out, shifted = residual_shift(x, None, bias, identity, num_frames=8, fold=8)
    expected, expected_shifted = reference.residual_shift(x, None, bias, identity, None, None, 8, 8)
    assert shifted is not None and torch.equal(out, expected) and torch.equal(shifted, expected_shifted)


def test_the_interpreter_is_not_remembered(remembered: Launcher) -> None:
    if torch.cuda.is_available():
        pytest.skip("on a GPU kernels are compiled")
    x, bias = images((4, 8, 2, 3), "channels_last"), torch.zeros(8)
    for _ in range(2):
        out, _ = kernel.residual_shift(x, None, bias, None, None, None, 4, 0)
        assert torch.equal(out, x.relu())
    assert not remembered._ready


@pytest.mark.gpu
def test_a_repetition_works_on_its_own_tensors(remembered: Launcher) -> None:
    for seed in range(4):
        assert_right(*numbers(seed))
        assert len(remembered._ready) == 1


@pytest.mark.gpu
def test_other_shapes_strides_and_arguments_are_launches_of_their_own(remembered: Launcher) -> None:
    x, bias, identity = numbers(0)
    assert_right(x, bias, identity)
    assert_right(x[:8], bias, identity[:8])
    assert_right(x.contiguous(), bias, identity.contiguous())
    assert_right(x.float(), bias, identity.float())
    found = len(remembered._ready)
    assert found == 4
    out, none = residual_shift(x, None, bias, num_frames=8)
    assert none is None and torch.equal(out, reference.residual_shift(x, None, bias, None, None, None, 8, 0)[0])
    assert len(remembered._ready) == found + 1


@pytest.mark.gpu
def test_what_had_to_be_copied_is_not_remembered(remembered: Launcher) -> None:
    x, bias, identity = numbers(0)
    for _ in range(2):
        assert_right(x, bias, identity.contiguous())
        assert_right(x, torch.stack([bias, bias], dim=1)[:, 0], identity)
    assert not remembered._ready


@pytest.mark.gpu
def test_unaligned_tensors_take_the_front_end(remembered: Launcher) -> None:
    x, bias, identity = numbers(0)
    assert_right(x, bias, identity)
    memory = torch.empty(x.numel() + 1, dtype=x.dtype, device=x.device)
    moved = memory[1:].view(16, 14, 14, 64).permute(0, 3, 1, 2).copy_(x)
    assert moved.stride() == x.stride() and moved.data_ptr() % 16
    for _ in range(2):
        assert_right(moved, bias, identity)
    assert len(remembered._ready) == 1


@pytest.mark.gpu
def test_on_another_stream(remembered: Launcher) -> None:
    x, bias, identity = numbers(0)
    assert_right(x, bias, identity)
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(20_000_000)
        x.add_(1)
        out, _ = residual_shift(x, None, bias, identity, num_frames=8, fold=8)
    stream.synchronize()
    assert torch.equal(out, reference.residual_shift(x, None, bias, identity, None, None, 8, 8)[0])


@pytest.mark.gpu
def test_the_dispatcher_gives_the_same_bits() -> None:
    x, bias, identity = numbers(0)
    hidden = images((16, 64, 29, 31), "channels_last", torch.bfloat16).cuda()
    arguments = (x, None, bias, identity, None, None, 8, 8)
    for _ in range(2):
        with torch.no_grad():
            direct = (
                *residual_shift(*arguments[:6], num_frames=8, fold=8),
                temporal_shift(x, 8),
                *stem_forward(hidden, None, bias),
            )
        recorded = (
            *torch.ops.lofi_fast.residual_shift(*arguments),
            torch.ops.lofi_fast.temporal_shift(x, 8, 8, False),
            *torch.ops.lofi_fast.stem(hidden, None, bias),
        )
        assert all(a is not None and torch.equal(a, b) for a, b in zip(direct, recorded, strict=True))


@pytest.mark.gpu
def test_elements_of_one_size_do_not_share_launches_of_another() -> None:
    x = images(SHAPE, "channels_last").cuda()
    for dtype in (torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.float32):
        y = x.to(dtype)
        with torch.no_grad():
            assert torch.equal(temporal_shift(y, 8), shift_kernel.temporal_shift(y.contiguous(), 8, 8, False))

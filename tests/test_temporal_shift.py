from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from lofi_fast.kernels.temporal_shift import temporal_shift, temporal_shift_reference

# (N, T, C, H, W)
SHAPES = {
    "ordinary": (2, 8, 16, 6, 4),
    "one-frame": (3, 1, 16, 4, 4),
    "two-frames": (2, 2, 8, 3, 3),
    "nine-channels-odd-pixels": (2, 3, 9, 5, 7),
    "fewer-than-eight-channels": (2, 4, 3, 2, 2),
    "one-pixel": (1, 8, 64, 1, 1),
    "no-snippets": (0, 8, 16, 4, 4),
    "no-pixels": (2, 4, 8, 0, 3),
}
LAYOUTS = ["contiguous", "channels-last", "strided", "permuted"]


@pytest.fixture(autouse=True)
def poison() -> Iterator[None]:
    # In this mode PyTorch fills what torch.empty returns with NaN: an element that is never written shows.
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def images(shape: tuple[int, ...], layout: str = "contiguous", dtype: torch.dtype = torch.float64) -> Tensor:
    snippets, frames, channels, height, width = shape
    generator = torch.Generator().manual_seed(0)
    size = (snippets * frames, channels, height, width)
    if layout == "strided":
        wide = torch.randn(size[0], channels + 3, height, 2 * width, generator=generator).to(dtype)
        return wide[:, 2 : 2 + channels, :, ::2]
    if layout == "permuted":
        return torch.randn(width, channels, size[0], height, generator=generator).to(dtype).permute(2, 1, 3, 0)
    x = torch.randn(size, generator=generator).to(dtype)
    return x.contiguous(memory_format=torch.channels_last) if layout == "channels-last" else x


def test_by_hand() -> None:
    # Two snippets of three frames, four channels (left, right, still, still), the value says (image, channel).
    x = torch.tensor([[10.0 * image + channel for channel in range(4)] for image in range(6)]).view(6, 4, 1, 1)
    y = temporal_shift(x, 3, fold=1).view(6, 4)
    assert y[:, 0].tolist() == [10, 20, 0, 40, 50, 0]
    assert y[:, 1].tolist() == [0, 1, 11, 0, 31, 41]
    assert torch.equal(y[:, 2:], x.view(6, 4)[:, 2:])


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_equals_the_definition_with_its_gradient(shape: tuple[int, ...], layout: str) -> None:
    x = images(shape, layout).requires_grad_()
    expected_x = x.detach().clone().requires_grad_()
    y = temporal_shift(x, shape[1])
    expected = temporal_shift_reference(expected_x, shape[1], shape[2] // 8)
    assert torch.equal(y, expected)
    grad = torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=y.dtype)
    y.backward(grad)
    expected.backward(grad)
    assert x.grad is not None and expected_x.grad is not None
    assert torch.equal(x.grad, expected_x.grad)


@pytest.mark.parametrize("fold", [0, 1, 4])
def test_every_fold(fold: int) -> None:
    x = images((2, 3, 9, 2, 2))
    assert torch.equal(temporal_shift(x, 3, fold), temporal_shift_reference(x, 3, fold))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_is_a_copy_at_every_dtype(dtype: torch.dtype) -> None:
    x = (images((2, 4, 16, 3, 3)) * 10).abs().to(dtype)
    y = temporal_shift(x, 4)
    assert y.dtype == dtype
    assert torch.equal(y, temporal_shift_reference(x, 4, 2))


def test_memory_format_is_kept_in_both_directions() -> None:
    x = images((2, 4, 16, 6, 4), "channels-last").requires_grad_()
    y = temporal_shift(x, 4)
    assert y.is_contiguous(memory_format=torch.channels_last)
    y.backward(torch.ones_like(y))
    assert x.grad is not None and x.grad.is_contiguous(memory_format=torch.channels_last)
    assert temporal_shift(images((2, 4, 16, 6, 4)), 4).is_contiguous()


def test_never_an_alias() -> None:
    x = images((2, 4, 4, 2, 2))
    before = x.clone()
    temporal_shift(x, 4).add_(1)
    assert torch.equal(x, before)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_backward_is_the_adjoint(shape: tuple[int, ...]) -> None:
    # Small integers: both inner products are exact.
    x = (images(shape) * 4).round().requires_grad_()
    z = (images(shape).flip(0) * 4).round()
    y = temporal_shift(x, shape[1])
    (adjoint,) = torch.autograd.grad(y, x, z)
    assert (z * y).sum().item() == (adjoint * x).sum().item()


def test_gradcheck() -> None:
    x = images((2, 3, 9, 1, 2)).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: temporal_shift(x, 3), x)
    assert torch.autograd.gradgradcheck(lambda x: temporal_shift(x, 3), x)


def test_frame_count_may_change_between_calls() -> None:
    x = images((3, 4, 8, 2, 2))
    assert torch.equal(temporal_shift(x, 4), temporal_shift_reference(x, 4, 1))
    assert torch.equal(temporal_shift(x, 6), temporal_shift_reference(x, 6, 1))
    assert not torch.equal(temporal_shift(x, 4), temporal_shift(x, 6))


@pytest.mark.parametrize(
    ("shape", "num_frames", "fold", "message"),
    [
        ((10, 8, 2, 2), 4, None, "num_frames=4"),
        ((8, 8, 2, 2), 0, None, "num_frames must be at least 1"),
        ((8, 8, 2, 2), 4, 5, "fold=5"),
        ((8, 8, 2, 2), 4, -1, "fold=-1"),
        ((8, 8, 2), 4, None, "got 3 dimensions"),
    ],
)
def test_refuses(shape: tuple[int, ...], num_frames: int, fold: int | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        temporal_shift(torch.zeros(shape), num_frames, fold)

"""Convolutions of stride 2 by matrix products, against float64 convolutions."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from forms import LAYOUTS, images
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from lofi_fast.kernels import strided_conv, strided_conv_backward, strided_conv_is_faster
from lofi_fast.kernels.strided_conv import reference

SHAPES = [(height, width) for height in (1, 2, 3, 4, 5) for width in (1, 2, 3, 4, 7)]
every_size = pytest.mark.parametrize("taps", [1, 3], ids=["1x1", "3x3"])


def problem(taps: int, height: int, width: int, layout: str = "channels_last") -> tuple[Tensor, Tensor, Tensor]:
    """x, weight, the gradient of the result."""
    x = images((5, 6, height, width), layout, seed=1)
    weight = images((7, 6, taps, taps), layout, seed=2)
    return x, weight, images((5, 7, -(-height // 2), -(-width // 2)), layout, seed=3)


def assert_close(got: Tensor | None, exact: Tensor) -> None:
    assert got is not None and got.shape == exact.shape and got.dtype == torch.float32
    assert got.is_contiguous(memory_format=torch.channels_last)
    assert (got.double() - exact).norm() <= 4 * torch.finfo(torch.float32).eps * exact.norm()


@every_size
@pytest.mark.parametrize(("height", "width"), SHAPES)
def test_equals_a_float64_convolution_and_its_gradients(taps: int, height: int, width: int) -> None:
    x, weight, grad = problem(taps, height, width)
    assert_close(strided_conv(x, weight), F.conv2d(x.double(), weight.double(), stride=2, padding=taps // 2))
    expected = reference.strided_conv_backward(grad.double(), x.double(), weight.double(), True, True)
    both = strided_conv_backward(grad, x, weight)
    for got, exact in zip(both, expected, strict=True):
        assert_close(got, exact)
    for mask in ((True, False), (False, True), (False, False)):
        for got, whole, wanted in zip(strided_conv_backward(grad, x, weight, mask), both, mask, strict=True):
            assert got is None if not wanted else torch.equal(got, whole)  # type: ignore[arg-type]


@every_size
@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_layout_gives_the_same_numbers(taps: int, layout: str) -> None:
    x, weight, grad = problem(taps, 4, 3, layout)
    assert_close(strided_conv(x, weight), F.conv2d(x.double(), weight.double(), stride=2, padding=taps // 2))
    expected = reference.strided_conv_backward(grad.double(), x.double(), weight.double(), True, True)
    for got, exact in zip(strided_conv_backward(grad, x, weight), expected, strict=True):
        assert_close(got, exact)


@every_size
def test_it_is_an_operator_with_a_derivative(taps: int) -> None:
    x, weight, grad = problem(taps, 4, 3)
    torch.library.opcheck(torch.ops.lofi_fast.strided_conv, (x, weight))
    torch.library.opcheck(torch.ops.lofi_fast.strided_conv_backward, (grad, x, weight, True, True))
    torch.library.opcheck(torch.ops.lofi_fast.strided_conv_backward, (grad, x, weight, True, False))
    tracked = x.clone().requires_grad_(), weight.clone().requires_grad_()
    found = torch.autograd.grad(strided_conv(*tracked), tracked, grad, create_graph=True)
    for got, exact in zip(found, strided_conv_backward(grad, x, weight), strict=True):
        assert exact is not None and torch.equal(got, exact)
    with pytest.raises(NotImplementedError, match="cannot be differentiated again"):
        found[0].sum().backward()


def test_a_convolution_without_images_or_with_one() -> None:
    x, weight, grad = problem(3, 4, 4)
    assert strided_conv(x[:0], weight).shape == (0, 7, 2, 2)
    nothing = strided_conv_backward(grad[:0], x[:0], weight)
    assert nothing[0] is not None and nothing[0].shape == (0, 6, 4, 4)
    assert nothing[1] is not None and not nothing[1].any()
    one = F.conv2d(x[:1].double(), weight.double(), stride=2, padding=1)
    assert_close(strided_conv(x[:1], weight), one)


def test_its_operations_are_counted_as_a_convolutions() -> None:
    x, weight, _ = problem(3, 4, 4)
    counted = []
    for convolve in (strided_conv, lambda x, weight: F.conv2d(x, weight, stride=2, padding=1)):
        tracked = weight.clone().requires_grad_()
        with FlopCounterMode(display=False) as counter:
            convolve(x, tracked).sum().backward()
        counted.append(counter.get_total_flops())
    assert counted[0] == counted[1] == 2 * 2 * 5 * 2 * 2 * 9 * 6 * 7


def test_where_it_is_said_to_be_faster() -> None:
    three, one = torch.zeros(32, 16, 3, 3), torch.zeros(32, 16, 1, 1)
    assert strided_conv_is_faster(torch.zeros(32, 16, 4, 3), three)
    assert not strided_conv_is_faster(torch.zeros(32, 16, 4, 5), three)
    assert not strided_conv_is_faster(torch.zeros(31, 16, 4, 4), three)
    assert strided_conv_is_faster(torch.zeros(32, 16, 16, 16), one)
    assert not strided_conv_is_faster(torch.zeros(32, 16, 17, 16), one)
    assert not strided_conv_is_faster(torch.zeros(32, 16, 4, 4), torch.zeros(32, 16, 7, 7))
    assert not strided_conv_is_faster(torch.zeros(32, 16, 4, 4).bfloat16(), three.bfloat16())
    assert not strided_conv_is_faster(torch.zeros(32, 16, 4, 4), three, torch.bfloat16)
    assert not strided_conv_is_faster(torch.zeros(32, 16, 4, 4, device="meta"), three.to("meta"))


def test_arguments_that_do_not_fit_are_refused() -> None:
    x, weight, grad = problem(3, 4, 4)
    with pytest.raises(
        ValueError, match=r"x must be \(N, C, H, W\) float32 on a CPU, not \(5, 6, 4, 4\) torch.float64"
    ):
        strided_conv(x.double(), weight.double())
    with pytest.raises(ValueError, match=r"weight must be \(K, 6, 1, 1\) or \(K, 6, 3, 3\), not \(7, 5, 3, 3\)"):
        strided_conv(x, weight[:, :5])
    with pytest.raises(ValueError, match=r"weight is torch\.float64 on cpu, but x torch\.float32"):
        strided_conv(x, weight.double())
    with pytest.raises(ValueError, match=r"grad must be \(5, 7, 2, 2\) torch.float32 on cpu, not \(5, 7, 2, 1\)"):
        strided_conv_backward(grad[..., :1], x, weight)

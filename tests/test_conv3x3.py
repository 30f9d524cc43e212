"""The C++ form by Winograd's algorithm, in all of its compiled versions, against float64 convolutions."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from forms import LAYOUTS, images
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from lofi_fast.kernels import conv3x3, conv3x3_backward, conv3x3_is_faster, library
from lofi_fast.kernels.conv3x3 import _forms, reference

pytestmark = pytest.mark.usefixtures("poison", "native")

# (N, C, K, H, W): paths through the C++ form. Tiles are 4 x 4, smaller ones at the lower and right edges; panels 64, 32
# or 16 outputs; blocks of 24 tiles where there are at least K of them, else all at once in blocks of 96; sums over
# tiles in blocks of 48 or more, which are packed where they have 8,192 numbers, all at once or block by block.
SHAPES = {
    "whole-tiles": (2, 16, 16, 8, 12),
    "odd-pixels": (3, 16, 32, 7, 9),
    "one-pixel": (2, 32, 16, 1, 1),
    "one-row": (2, 16, 16, 1, 21),
    "one-column": (1, 16, 48, 13, 1),
    "two-by-three": (5, 16, 16, 2, 3),
    "edge-of-one": (1, 16, 16, 5, 9),
    "three-panels-of-64": (1, 16, 192, 6, 6),
    "three-panels-of-32": (1, 48, 96, 6, 6),
    "many-inputs": (1, 128, 16, 6, 6),
    "many-tiles": (4, 16, 16, 23, 30),
    "many-tiles-of-32": (3, 32, 32, 20, 20),
    "several-blocks-of-few": (2, 16, 192, 30, 28),
    "packed-at-once": (4, 128, 128, 16, 16),
    "packed-in-blocks": (3, 128, 128, 18, 24),
    "no-whole-tile": (70, 32, 64, 3, 3),
    "no-images": (0, 16, 16, 4, 4),
}
every_shape = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())


class Problem:
    """x is the result of a ReLU, as in a residual block."""

    def __init__(self, shape: tuple[int, ...], layout: str = "channels_last", seed: int = 0) -> None:
        num, channels, outputs, height, width = shape
        self.x = images((num, channels, height, width), layout, seed=seed).relu_()
        self.weight = images((outputs, channels, 3, 3), layout, seed=seed + 1) / channels**0.5
        self.bias = torch.randn(outputs, generator=torch.Generator().manual_seed(seed + 2))
        self.grad = images((num, outputs, height, width), layout, seed=seed + 3)


def assert_close(got: Tensor, exact: Tensor, terms: int) -> None:
    """Each element to some roundings of a sum of so many terms of the result's size: a wrong tap is far more."""
    assert got.shape == exact.shape and got.dtype == torch.float32
    assert got.is_contiguous(memory_format=torch.channels_last)
    if exact.numel():
        roundings = 16 * max(terms, 16) ** 0.5
        allowed = roundings * torch.finfo(torch.float32).eps * exact.square().mean().sqrt().item()
        assert (got.double() - exact).abs().max().item() <= allowed


@every_shape
def test_equals_a_float64_convolution(shape: tuple[int, ...]) -> None:
    problem = Problem(shape)
    exact = F.conv2d(problem.x.double(), problem.weight.double(), problem.bias.double(), padding=1)
    for relu in (False, True):
        out = torch.ops.lofi_fast.conv3x3(problem.x, problem.weight, problem.bias, relu)
        assert_close(out, exact.relu() if relu else exact, shape[1])
    out = torch.ops.lofi_fast.conv3x3(problem.x, problem.weight, None, False)
    assert_close(out, exact - problem.bias.double().view(-1, 1, 1), shape[1])


@every_shape
def test_gradients_equal_those_of_a_float64_convolution(shape: tuple[int, ...]) -> None:
    problem = Problem(shape)
    exact = [tensor.double() for tensor in (problem.grad, problem.x, problem.weight)]
    for relu in (False, True):
        expected = reference.conv3x3_backward(*exact, relu, True, True)
        found = torch.ops.lofi_fast.conv3x3_backward(problem.grad, problem.x, problem.weight, relu, True, True)
        assert_close(found[0], expected[0], shape[2])
        assert_close(found[1], expected[1], problem.x[:, 0, ::4, ::4].numel())  # tiles
        if relu:
            assert found[0][problem.x <= 0].count_nonzero() == 0
    for mask in ((True, False), (False, True), (False, False)):
        one = torch.ops.lofi_fast.conv3x3_backward(problem.grad, problem.x, problem.weight, True, *mask)
        for wanted, got, both in zip(mask, one, found, strict=True):
            assert torch.equal(got, both) if wanted else got.shape == (0,)


@pytest.mark.parametrize("height", range(1, 9))
def test_sides_of_any_length_equal_a_float64_convolution(height: int) -> None:
    """Tiles of every size that are left over below and to the right, beside whole ones or alone."""
    for width in range(1, 9):
        problem = Problem((3, 16, 16, height, width), seed=width)
        out = torch.ops.lofi_fast.conv3x3(problem.x, problem.weight, None, False)
        exact = F.conv2d(problem.x.double(), problem.weight.double(), padding=1)
        assert_close(out, exact, 9 * 16)
        found = torch.ops.lofi_fast.conv3x3_backward(problem.grad, problem.x, problem.weight, False, True, True)
        expected = reference.conv3x3_backward(
            problem.grad.double(), problem.x.double(), problem.weight.double(), False, True, True
        )
        for got, exactly, terms in zip(found, expected, (9 * 16, 3 * height * width), strict=True):
            assert_close(got, exactly, terms)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_layout_gives_the_same_bits(layout: str) -> None:
    shape = SHAPES["odd-pixels"]
    usual, other = Problem(shape), Problem(shape, layout)
    assert torch.equal(*(torch.ops.lofi_fast.conv3x3(p.x, p.weight, p.bias, True) for p in (usual, other)))
    backward = [torch.ops.lofi_fast.conv3x3_backward(p.grad, p.x, p.weight, True, True, True) for p in (usual, other)]
    for one, another in zip(*backward, strict=True):
        assert torch.equal(one, another)


@pytest.mark.parametrize(
    "name",
    ["many-tiles", "three-panels-of-64", "several-blocks-of-few", "one-pixel", "packed-at-once", "packed-in-blocks"],
)
def test_threads_do_not_change_a_bit(name: str) -> None:
    problem = Problem(SHAPES[name])
    results = []
    for threads in (1, 2, 3, 7):
        torch.set_num_threads(threads)
        out = torch.ops.lofi_fast.conv3x3(problem.x, problem.weight, problem.bias, True)
        grads = torch.ops.lofi_fast.conv3x3_backward(problem.grad, problem.x, problem.weight, True, True, True)
        results.append((out, *grads))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_a_snippet_does_not_see_the_others() -> None:
    """Chunks of a video give the bits of the whole video: blocks of tiles end anywhere in an image."""
    problem = Problem((6, 16, 16, 13, 13))
    whole = torch.ops.lofi_fast.conv3x3(problem.x, problem.weight, None, False)
    parts = [torch.ops.lofi_fast.conv3x3(x, problem.weight, None, False) for x in problem.x.split([1, 3, 2])]
    assert torch.equal(torch.cat(parts), whole)


def test_a_nan_stays_near_and_is_not_taken_for_a_negative_number() -> None:
    x, weight = torch.ones(2, 16, 12, 12), torch.ones(16, 16, 3, 3)
    x[0, 3, 5, 5] = torch.nan
    out = torch.ops.lofi_fast.conv3x3(x, weight, None, True)
    assert out[0, :, 4:7, 4:7].isnan().all()
    assert out[0, :, :, 8:].isfinite().all() and out[1].isfinite().all()
    grad_x, _ = torch.ops.lofi_fast.conv3x3_backward(torch.full_like(out, torch.nan), x, weight, True, True, False)
    assert grad_x.isnan().all()


def test_operators_hold_to_their_schemas() -> None:
    problem = Problem(SHAPES["odd-pixels"], "permuted")
    x, weight, bias = (t.requires_grad_() for t in (problem.x.clone(), problem.weight.clone(), problem.bias.clone()))
    torch.library.opcheck(torch.ops.lofi_fast.conv3x3, (x, weight, bias, True))
    torch.library.opcheck(torch.ops.lofi_fast.conv3x3, (x, weight, None, False))
    for mask in ((True, True), (False, True), (True, False)):
        arguments = (problem.grad, x.detach(), weight.detach(), True, *mask)
        torch.library.opcheck(torch.ops.lofi_fast.conv3x3_backward, arguments)


@pytest.mark.parametrize("relu", [False, True], ids=["linear", "relu"])
def test_autograd_gives_the_gradients_of_all_three(relu: bool) -> None:
    problem = Problem((8, 16, 32, 10, 10))
    found, expected = [], []
    for dtype, into in ((torch.float32, found), (torch.float64, expected)):
        x, weight, bias = (t.detach().to(dtype).requires_grad_() for t in (problem.x, problem.weight, problem.bias))
        if dtype == torch.float32:
            assert conv3x3_is_faster(x, weight)
            out = conv3x3(x, weight, bias, relu)
        else:
            out = F.conv2d(x, weight, bias, padding=1)
            out = out.relu() if relu else out
        into += torch.autograd.grad(out, (x, weight, bias), problem.grad.to(dtype))
    for got, exact in zip(found, expected, strict=True):
        error = (got.double() - exact).norm() / exact.norm()
        # A ReLU's input that rounding moves to the other side of zero counts here too.
        assert error <= (1e-3 if relu else 2e-6)


def test_it_cannot_be_differentiated_twice() -> None:
    problem = Problem((8, 16, 16, 8, 8))
    x = problem.x.requires_grad_()
    (grad,) = torch.autograd.grad(conv3x3(x, problem.weight).sum(), x, create_graph=True)
    with pytest.raises(NotImplementedError, match="cannot be differentiated again"):
        grad.sum().backward()


def test_its_operations_are_counted_as_a_convolutions() -> None:
    problem = Problem((8, 16, 32, 8, 8))
    x, weight = problem.x.requires_grad_(), problem.weight.requires_grad_()
    counted = []
    for convolve in (lambda: conv3x3(x, weight), lambda: F.conv2d(x, weight, padding=1)):
        with FlopCounterMode(display=False) as counter:
            convolve().sum().backward()
        counted.append(counter.get_total_flops())
    assert counted[0] == counted[1] == 3 * 2 * 8 * 8 * 8 * 9 * 16 * 32


def test_where_it_is_said_to_be_faster() -> None:
    weight = torch.zeros(32, 16, 3, 3)
    assert conv3x3_is_faster(torch.zeros(4, 16, 8, 8), weight)  # 256 pixels
    assert not conv3x3_is_faster(torch.zeros(3, 16, 8, 8), weight)
    assert conv3x3_is_faster(torch.zeros(32, 16, 2, 2), weight)
    assert not conv3x3_is_faster(torch.zeros(31, 16, 2, 2), weight)
    assert conv3x3_is_faster(torch.zeros(32, 16, 5, 5), weight)
    assert not conv3x3_is_faster(torch.zeros(32, 8, 8, 8), torch.zeros(32, 8, 3, 3))
    assert not conv3x3_is_faster(torch.zeros(32, 16, 8, 8), torch.zeros(24, 16, 3, 3))
    assert not conv3x3_is_faster(torch.zeros(32, 16, 8, 8), torch.zeros(32, 16, 1, 1))
    assert not conv3x3_is_faster(torch.zeros(0, 16, 8, 8), weight)
    for dtype in (torch.float64, torch.bfloat16):
        assert not conv3x3_is_faster(torch.zeros(8, 16, 8, 8, dtype=dtype), weight.to(dtype))
    assert not conv3x3_is_faster(torch.zeros(8, 16, 8, 8, device="meta"), weight.to("meta"))


SMALL = {"two-by-two": (64, 128, 128, 2, 2), "a-pixel": (80, 96, 192, 1, 1), "a-row": (64, 192, 96, 1, 2)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("shape", SMALL.values(), ids=SMALL.keys())
def test_many_small_images_are_one_product(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    problem = Problem(shape)
    x, weight, bias, grad = (t.to(dtype) for t in (problem.x, problem.weight, problem.bias, problem.grad))
    assert conv3x3_is_faster(x, weight)
    exact = [t.double().requires_grad_() for t in (x, weight, bias)]
    expected = F.conv2d(*exact, padding=1).relu()
    for t in (x, weight, bias):
        t.requires_grad_()
    out = conv3x3(x, weight, bias, relu=True)
    assert out.dtype is dtype and out.is_contiguous(memory_format=torch.channels_last)
    found = torch.autograd.grad(out, (x, weight, bias), grad)
    wanted = torch.autograd.grad(expected, exact, grad.double())
    roundings = 4 * torch.finfo(dtype).eps
    for got, exactly in zip((out, *found), (expected, *wanted), strict=True):
        assert got.dtype is dtype
        assert (got.double() - exactly).norm() <= roundings * exactly.norm()
    before = conv3x3_backward(grad, x.detach(), weight.detach(), relu=True)
    plain = torch.autograd.grad(F.conv2d(*exact[:2], padding=1), exact[:2], grad.double())
    assert before[0] is not None and before[1] is not None
    assert (before[0].double() - plain[0].masked_fill(x <= 0, 0)).norm() <= roundings * plain[0].norm()
    assert (before[1].double() - plain[1]).norm() <= roundings * plain[1].norm()
    assert conv3x3_backward(grad, x.detach(), weight.detach(), mask=(False, True))[0] is None


def test_where_a_product_is_said_to_be_faster() -> None:
    weight = torch.zeros(128, 128, 3, 3)
    bfloat16 = partial(conv3x3_is_faster, dtype=torch.bfloat16)  # tiles are float32's
    assert bfloat16(torch.zeros(32, 128, 2, 1), weight)
    assert not bfloat16(torch.zeros(31, 128, 2, 2), weight)
    assert not bfloat16(torch.zeros(32, 64, 2, 2), weight[:, :64])
    assert not bfloat16(torch.zeros(32, 128, 1, 3), weight)
    assert conv3x3_is_faster(torch.zeros(1, 64, 1, 1), weight[:64, :64])  # the weight's middle
    assert not conv3x3_is_faster(torch.zeros(1, 63, 1, 1), weight[:64, :63])
    assert not conv3x3_is_faster(torch.zeros(31, 128, 1, 1).bfloat16(), weight.bfloat16())
    assert not bfloat16(torch.zeros(31, 128, 1, 1), weight)
    assert not conv3x3_is_faster(torch.zeros(64, 128, 2, 2).double(), weight.double())
    assert not conv3x3_is_faster(torch.zeros(64, 128, 2, 2).bfloat16(), weight)
    assert conv3x3_is_faster(torch.zeros(64, 128, 2, 2).bfloat16(), weight, torch.bfloat16)


def test_a_chunk_of_a_video_is_computed_as_all_of_it() -> None:
    """From 32 images on, which form is taken does not depend on how many there are."""
    for side, channels in itertools.product(range(1, 9), (16, 64, 128, 512)):
        weight = torch.empty(channels, channels, 3, 3)
        forms = {_forms(torch.empty(num, channels, side, side), weight)[0] for num in (32, 48, 63, 64, 128, 512)}
        assert len(forms) == 1, (side, channels)


def test_the_product_is_an_operator() -> None:
    x, weight, grad = torch.randn(4, 3, 2, 2), torch.randn(5, 3, 3, 3), torch.randn(4, 5, 2, 2)
    torch.library.opcheck(torch.ops.lofi_fast.conv3x3_product, (x, weight, torch.randn(5), True))
    torch.library.opcheck(torch.ops.lofi_fast.conv3x3_product_backward, (grad, x, weight, True, True, False))


def test_without_the_compiled_form_it_is_pytorchs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(library.forms["cpu"], "conv3x3", "reference (not built)")
    problem = Problem((8, 16, 16, 8, 8))
    assert not conv3x3_is_faster(problem.x, problem.weight)
    out = conv3x3(problem.x, problem.weight, problem.bias)
    assert torch.equal(out, F.conv2d(problem.x, problem.weight, problem.bias, padding=1))


@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.bfloat16, torch.float16], ids=["float64", "bfloat16", "float16"]
)
def test_elsewhere_it_is_pytorchs_convolution(dtype: torch.dtype) -> None:
    problem = Problem((4, 16, 16, 8, 8))
    x, weight, bias, grad = (t.to(dtype) for t in (problem.x, problem.weight, problem.bias, problem.grad))
    assert torch.equal(conv3x3(x, weight, bias, relu=True), F.conv2d(x, weight, bias, padding=1).relu())
    x.requires_grad_()
    weight.requires_grad_()
    expected = torch.autograd.grad(F.conv2d(x, weight, padding=1), (x, weight), grad)
    found = conv3x3_backward(grad, x.detach(), weight.detach(), relu=True)
    assert torch.equal(found[0], expected[0].masked_fill(x <= 0, 0)) and torch.equal(found[1], expected[1])
    assert conv3x3_backward(grad, x.detach(), weight.detach(), mask=(False, True))[0] is None


def test_arguments_that_do_not_fit_are_refused() -> None:
    x, weight = torch.zeros(2, 16, 8, 8), torch.zeros(32, 16, 3, 3)
    with pytest.raises(ValueError, match=r"x must be \(N, C, H, W\) floating point, not \(2, 16, 8\) torch.float32"):
        conv3x3(x[..., 0], weight)
    with pytest.raises(ValueError, match=r"weight must be \(K, 16, 3, 3\), not \(32, 16, 5, 5\)"):
        conv3x3(x, torch.zeros(32, 16, 5, 5))
    with pytest.raises(ValueError, match=r"weight is torch.float64 on cpu, but x torch.float32"):
        conv3x3(x, weight.double())
    with pytest.raises(ValueError, match=r"bias must be \(32,\) torch.float32 on cpu, not \(16,\)"):
        conv3x3(x, weight, torch.zeros(16))
    with pytest.raises(ValueError, match=r"grad must be \(2, 32, 8, 8\) torch.float32 on cpu, not \(2, 16, 8, 8\)"):
        conv3x3_backward(x, x, weight)
    with pytest.raises(RuntimeError, match="channels must come in multiples of 16, got 8 and 32"):
        torch.ops.lofi_fast.conv3x3(x[:, :8], weight[:, :8], None, False)
    with pytest.raises(RuntimeError, match="expected float32"):
        torch.ops.lofi_fast.conv3x3(x.double(), weight.double(), None, False)


@pytest.mark.parametrize("capability", ["avx2", "default"])
def test_the_forms_for_narrower_vectors(capability: str) -> None:
    """As torch is told which vectors to use: in a process of its own, since it is read once."""
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", __file__, "-k", "equal or bits or bit"],
        env=os.environ | {"ATEN_CPU_CAPABILITY": capability},
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed" in done.stdout

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from forms import LAYOUTS, Form, assert_as_good_as, images
from torch import Tensor

from lofi_fast.encoder.resnet import TSMResNet
from lofi_fast.kernels import fold_normalization, stem, stem_backward, stem_forward, stem_input
from lofi_fast.kernels.stem import reference

pytestmark = pytest.mark.usefixtures("poison")

DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]
# (N, C, H, W)
SHAPES = {
    "ordinary": (1, 16, 8, 8),
    "odd-pixels": (2, 3, 7, 9),
    "nine-channels": (1, 9, 5, 6),
    "one-channel": (2, 1, 4, 7),
    "several-tiles": (1, 1, 20, 133),
    "one-pixel": (2, 4, 1, 1),
    "one-row": (1, 8, 1, 7),
    "one-column": (2, 4, 6, 1),
    "two-by-two": (1, 2, 2, 2),
    "no-frames": (0, 8, 4, 4),
}
CASES = {
    f"{name}-{layout}-{str(dtype).removeprefix('torch.')}": (shape, layout, dtype)
    for name, shape in (SHAPES | {"two-channel-tiles": (2, 80, 11, 10)}).items()
    for layout in LAYOUTS
    for dtype in DTYPES
    # A dense layout at every dtype, views at one; and few channels where the interpreter runs a program for each.
    if layout == "channels_last" or (shape[1] < 16 and (layout == "contiguous" or dtype == DTYPES[0]))
}
every_case = pytest.mark.parametrize(("shape", "layout", "dtype"), CASES.values(), ids=CASES.keys())
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
every_layout = pytest.mark.parametrize("layout", LAYOUTS)


@pytest.fixture(params=["reference", "C++", "Triton"])
def form(request: pytest.FixtureRequest) -> Form:
    """Triton runs on the GPU where there is one, else through its interpreter."""
    if request.param == "reference":
        return Form(reference)
    if request.param == "C++":
        request.getfixturevalue("native")
        return Form(torch.ops.lofi_fast)
    from lofi_fast.kernels.stem import kernel

    return Form(kernel, "cuda" if torch.cuda.is_available() else "cpu")


def sums(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def whole(shape: tuple[int, ...], layout: str, dtype: torch.dtype, seed: int = 0) -> Tensor:
    """Small integers: ties everywhere, and nothing is ever rounded."""
    return images(shape, layout, dtype, seed).mul_(2).round_()


def exact_affine(channels: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Both signs of scale, and zero; products and sums with small integers are exact at every dtype."""
    scale = torch.tensor([1.0, -1.0, 0.5, 0.0, -2.0]).repeat(channels)[:channels]
    bias = torch.tensor([0.0, 1.0, -1.0, 2.0]).repeat(channels)[:channels]
    return scale.to(sums(dtype)), bias.to(sums(dtype))


def affine(channels: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    scale, bias = torch.randn(2, channels, generator=torch.Generator().manual_seed(1), dtype=sums(dtype))
    return scale, bias / 2


def plain(x: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    return F.max_pool2d(F.relu(x.to(scale.dtype) * scale.view(-1, 1, 1) + bias.view(-1, 1, 1)), 3, 2, 1).to(x.dtype)


def plain_with_gradient(x: Tensor, scale: Tensor, bias: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    x = x.detach().clone().requires_grad_()
    pooled = plain(x, scale, bias)
    return pooled.detach(), torch.autograd.grad(pooled, x, grad)[0]


def exactly(got: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(got, expected, rtol=0, atol=0, equal_nan=True)


def test_by_hand(form: Form) -> None:
    x = torch.tensor([[[[1.0, 5.0, 5.0, 2.0], [5.0, 0.0, 5.0, 9.0], [-1.0, 3.0, -2.0, -3.0], [0.0, 3.0, -4.0, -5.0]]]])
    pooled, argmax = form.stem(x, torch.tensor([2.0]), torch.tensor([-4.0]))
    assert pooled.tolist() == [[[[6, 14], [6, 14]]]]
    # The first of the three fives is right of the first window's centre; all of 5, 9 lie in the upper two rows.
    assert argmax.tolist() == [[[[5, 8], [1, 2]]]]
    grad_x = form.stem_backward(
        torch.tensor([[[[1.0, 10.0], [100.0, 1000.0]]]]), pooled, argmax, torch.tensor([2.0]), 4, 4
    )
    assert grad_x.tolist() == [[[[0, 2, 0, 0], [200, 0, 0, 2020], [0, 0, 0, 0], [0, 0, 0, 0]]]]


def test_windows_without_a_positive_value_point_at_their_first_pixel_and_pass_no_gradient(form: Form) -> None:
    scale, bias = torch.tensor([1.0]), torch.tensor([0.0])
    x = -torch.arange(1.0, 26.0).flip(0).view(1, 1, 5, 5)
    x[0, 0, 2, 2] = 0
    pooled, argmax = form.stem(x, scale, bias)
    assert pooled.count_nonzero() == 0
    assert argmax.tolist() == [[[[4, 3, 3], [1, 0, 0], [1, 0, 0]]]]
    assert form.stem_backward(torch.ones_like(pooled), pooled, argmax, scale, 5, 5).count_nonzero() == 0


@every_case
def test_equals_max_pool_of_relu_in_value_position_and_gradient(
    form: Form, shape: tuple[int, ...], layout: str, dtype: torch.dtype
) -> None:
    x = whole(shape, layout, dtype)
    scale, bias = exact_affine(shape[1], dtype)
    pooled, argmax = form.stem(x, scale, bias)
    grad = whole(tuple(pooled.shape), layout, dtype, seed=2)
    expected, expected_grad = plain_with_gradient(x, scale, bias, grad)
    exactly(pooled, expected)
    exactly(argmax, reference.stem(x.double(), scale.double(), bias.double())[1])
    exactly(form.stem_backward(grad, pooled, argmax, scale, *shape[2:]), expected_grad)


@every_layout
@every_dtype
def test_a_scale_of_none_is_one(form: Form, dtype: torch.dtype, layout: str) -> None:
    x, (scale, bias) = images((2, 9, 6, 7), layout, dtype), affine(9, dtype)
    scale = torch.ones_like(scale)
    pooled, argmax = form.stem(x, None, bias)
    for got, expected in zip((pooled, argmax), form.stem(x, scale, bias), strict=True):
        exactly(got, expected)
    grad = images(tuple(pooled.shape), layout, dtype, seed=2)
    exactly(form.stem_backward(grad, pooled, argmax, None, 6, 7), form.stem_backward(grad, pooled, argmax, scale, 6, 7))


@pytest.mark.parametrize("shape", [(2, 32, 9, 8), (1, 9, 6, 11)], ids=["ordinary", "nine-channels"])
@every_dtype
def test_is_as_good_as_plain_pytorch(form: Form, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x = images(shape, "channels_last", dtype)
    scale, bias = affine(shape[1], dtype)
    pooled, argmax = form.stem(x, scale, bias)
    grad = images(tuple(pooled.shape), "channels_last", dtype, seed=2)
    grad_x = form.stem_backward(grad, pooled, argmax, scale, *shape[2:])
    exact, exact_grad = plain_with_gradient(x.double(), scale.double(), bias.double(), grad.double())
    expected, expected_grad = plain_with_gradient(x, scale, bias, grad)
    assert_as_good_as(pooled, expected, exact)
    assert_as_good_as(grad_x, expected_grad, exact_grad)
    if not (form.truncates and dtype == torch.bfloat16):
        exactly(pooled, expected)
        exactly(grad_x, reference.stem_backward(grad, pooled, argmax, scale, *shape[2:]))


def test_maxima_are_compared_before_rounding(form: Form) -> None:
    # Beside the bias, bfloat16 does not tell 1 from 1.5: the result is the same, its position is not.
    x = torch.tensor([[[[1.0, 1.5], [1.0, 1.0]]]], dtype=torch.bfloat16)
    pooled, argmax = form.stem(x, torch.tensor([1.0]), torch.tensor([1024.0]))
    assert pooled.item() == 1024
    assert argmax.item() == 5


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_nan_and_infinity_go_where_max_pool_takes_them(form: Form, layout: str) -> None:
    x = images((2, 4, 9, 9), layout)
    x[:, ::3, 2:5, 3] = math.nan  # several in a window
    x[:, 1::3, 4, 4] = math.inf
    x[:, 1::3, 4, 6] = -math.inf
    scale, bias = torch.ones(4), torch.zeros(4)
    pooled, argmax = form.stem(x, scale, bias)
    assert pooled.isnan().any() and pooled.isinf().any()
    exactly(pooled, plain(x, scale, bias))
    exactly(argmax, reference.stem(x, scale, bias)[1])
    grad = images((2, 4, 5, 5), layout, seed=2)
    _, expected = plain_with_gradient(x, scale, bias, grad)
    exactly(form.stem_backward(grad, pooled, argmax, scale, 9, 9), expected)


def test_gradient_of_a_nan_reaches_its_pixel_alone(form: Form) -> None:
    grad = torch.zeros(1, 2, 3, 3)
    grad[0, 0, 1, 1] = math.nan
    pooled, argmax = torch.ones(1, 2, 3, 3), torch.full((1, 2, 3, 3), 4, dtype=torch.int8)
    grad_x = form.stem_backward(grad, pooled, argmax, torch.ones(2), 6, 6)
    assert grad_x.isnan().nonzero().tolist() == [[0, 0, 2, 2]]


@every_layout
def test_memory_format_is_kept_in_both_directions(form: Form, layout: str) -> None:
    x = images((2, 4, 6, 5), layout)
    memory_format = torch.channels_last if layout == "channels_last" else torch.contiguous_format
    scale, bias = affine(4, torch.float32)
    pooled, argmax = form.stem(x, scale, bias)
    grad = images(tuple(pooled.shape), layout)
    for result in (pooled, argmax, form.stem_backward(grad, pooled, argmax, scale, 6, 5)):
        assert result.is_contiguous(memory_format=memory_format)


def test_backward_of_tensors_in_different_layouts(form: Form) -> None:
    x, (scale, bias) = images((2, 4, 7, 6), "channels_last"), affine(4, torch.float32)
    pooled, argmax = reference.stem(x, scale, bias)
    grad = images((2, 4, 4, 3))
    expected = reference.stem_backward(grad, pooled, argmax, scale, 7, 6)
    exactly(form.stem_backward(grad, pooled, argmax.contiguous(), scale, 7, 6), expected)
    # What sum() sends back: one number, seen as a tensor.
    ones = torch.ones(()).expand(2, 4, 4, 3)
    exactly(
        form.stem_backward(ones, pooled, argmax, scale, 7, 6),
        reference.stem_backward(ones.contiguous(), pooled, argmax, scale, 7, 6),
    )


def test_affine_of_any_stride(form: Form) -> None:
    x, (scale, bias) = images((2, 16, 6, 6), "channels_last"), affine(16, torch.float32)
    table = torch.stack([scale, bias], dim=1)
    expected = form.stem(x, scale, bias)
    for got, wanted in zip(form.stem(x, *table.unbind(1)), expected, strict=True):
        exactly(got, wanted)
    grad = torch.ones_like(expected[0])
    exactly(form.stem_backward(grad, *expected, table[:, 0], 6, 6), form.stem_backward(grad, *expected, scale, 6, 6))


@pytest.mark.usefixtures("native")
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_results_do_not_depend_on_the_number_of_threads(layout: str) -> None:
    x, (scale, bias) = images((3, 64, 41, 40), layout), affine(64, torch.float32)
    frames = torch.randint(0, 256, (3, 101, 103, 3), dtype=torch.uint8)
    results = []
    for number in (1, 2, 3):
        torch.set_num_threads(number)
        pooled, argmax = torch.ops.lofi_fast.stem(x, scale, bias)
        grad_x = torch.ops.lofi_fast.stem_backward(pooled, pooled, argmax, scale, 41, 40)
        results.append((pooled, argmax, grad_x, torch.ops.lofi_fast.stem_input(frames, scale[:3], torch.float32)))
    for other in results[1:]:
        for got, expected in zip(other, results[0], strict=True):
            exactly(got, expected)


@every_dtype
def test_every_byte_less_its_mean_is_rounded_once(form: Form, dtype: torch.dtype) -> None:
    frames = torch.arange(256, dtype=torch.uint8).view(1, 16, 16, 1).expand(2, 16, 16, 3).contiguous()
    mean = 255 * torch.tensor([0.485, 0.456, 0.406])
    x = form.stem_input(frames, mean, dtype)
    exact = (frames.double() - mean.double()).permute(0, 3, 1, 2)
    assert x.dtype == dtype
    assert x.is_contiguous(memory_format=torch.channels_last)
    if form.truncates and dtype == torch.bfloat16:
        assert_as_good_as(x, exact.to(dtype), exact)
    else:
        exactly(x, exact.to(sums(dtype)).to(dtype))


FRAMES = {
    "ordinary": torch.randint(0, 256, (2, 8, 8, 3), dtype=torch.uint8),
    "several-blocks": torch.randint(0, 256, (2, 41, 29, 3), dtype=torch.uint8),
    "one-pixel": torch.randint(0, 256, (1, 1, 1, 3), dtype=torch.uint8),
    "no-frames": torch.zeros(0, 4, 4, 3, dtype=torch.uint8),
    "no-pixels": torch.zeros(2, 0, 4, 3, dtype=torch.uint8),
    "cropped": torch.randint(0, 256, (3, 9, 11, 3), dtype=torch.uint8)[::2, 2:7, 3:8],
    "planar": torch.randint(0, 256, (2, 3, 5, 4), dtype=torch.uint8).permute(0, 2, 3, 1),
    "one-picture": torch.randint(0, 256, (1, 5, 4, 3), dtype=torch.uint8).expand(3, 5, 4, 3),
}


@pytest.mark.parametrize("frames", FRAMES.values(), ids=FRAMES.keys())
def test_frames_of_any_layout(form: Form, frames: Tensor) -> None:
    mean = torch.tensor([100.0, 50.0, 0.25])
    x = form.stem_input(frames, mean, torch.float32)
    assert x.permute(0, 2, 3, 1).is_contiguous()
    exactly(x, (frames.float() - mean).permute(0, 3, 1, 2))


def test_folding_the_normalisation_changes_neither_the_convolution_nor_its_gradient() -> None:
    encoder = TSMResNet("tsm_r18", width=8)
    frames = torch.randint(0, 256, (2, 20, 17, 3), dtype=torch.uint8)
    grad = images((2, 8, 10, 9), seed=3)

    def through_the_encoder(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        weight = encoder.conv1.weight.detach().to(dtype).requires_grad_()
        x = (frames.permute(0, 3, 1, 2).to(dtype) - encoder.mean.to(dtype)) / encoder.std.to(dtype)
        y = F.conv2d(x, weight, stride=2, padding=3)
        return y.detach(), torch.autograd.grad(y, weight, grad.to(dtype))[0]

    weight = encoder.conv1.weight
    x = stem_input(frames, encoder.mean.flatten(), torch.float32)
    y = F.conv2d(x, fold_normalization(weight, encoder.std.flatten()), stride=2, padding=3)
    (grad_weight,) = torch.autograd.grad(y, weight, grad)
    for got, plain, exact in zip(
        (y.detach(), grad_weight),
        through_the_encoder(torch.float32),
        through_the_encoder(torch.float64),
        strict=True,
    ):
        assert_as_good_as(got, plain, exact)


@every_dtype
def test_folded_weight_keeps_dtype_and_layout(dtype: torch.dtype) -> None:
    weight = images((8, 3, 7, 7), "channels_last", dtype)
    std = torch.tensor([58.4, 57.1, 57.4])
    folded = fold_normalization(weight, std)
    assert folded.is_contiguous(memory_format=torch.channels_last)
    exactly(folded, (weight.to(sums(dtype)) / std.view(3, 1, 1)).to(dtype))


def test_public_functions_by_hand() -> None:
    x = torch.arange(16.0).view(1, 1, 4, 4).requires_grad_()
    scale, bias = torch.tensor([1.0]), torch.tensor([-10.0])
    pooled = stem(x, scale, bias)
    assert pooled.tolist() == [[[[0, 0], [3, 5]]]]
    pooled.sum().backward()
    assert x.grad is not None
    assert x.grad.nonzero().tolist() == [[0, 0, 3, 1], [0, 0, 3, 3]]
    result, argmax = stem_forward(x.detach(), scale, bias)
    exactly(result, pooled.detach())
    exactly(stem_backward(torch.ones_like(result), result, argmax, scale, 4, 4), x.grad)


@every_layout
def test_gradcheck(layout: str) -> None:
    # Distinct values far apart, none near zero, so that no step of the check changes which is a maximum.
    generator = torch.Generator().manual_seed(0)
    for shape in ((2, 3, 5, 4), (1, 2, 4, 4)):
        values = (torch.randperm(math.prod(shape), generator=generator).double() - 40.5) / 8
        x = images(shape, layout, torch.float64)
        x.copy_(values.view(shape)).requires_grad_()
        scale = torch.tensor([1.5, -0.5, 1.0]).double()[: shape[1]]
        assert torch.autograd.gradcheck(lambda x, scale=scale: stem(x, scale, torch.zeros_like(scale)), x)


def test_saves_the_result_its_argmax_and_the_scale() -> None:
    x, (scale, bias) = images((2, 16, 8, 8), "channels_last").requires_grad_(), affine(16, torch.float32)
    saved: list[tuple[torch.dtype, tuple[int, ...]]] = []

    def pack(tensor: Tensor) -> Tensor:
        saved.append((tensor.dtype, tuple(tensor.shape)))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        stem(x, scale, bias)
    assert saved == [(torch.float32, (2, 16, 4, 4)), (torch.int8, (2, 16, 4, 4)), (torch.float32, (16,))]


def test_is_differentiable_once() -> None:
    x, (scale, bias) = images((1, 4, 4, 4)).requires_grad_(), affine(4, torch.float32)
    pooled = stem(x, scale, bias)
    (grad_x,) = torch.autograd.grad(pooled, x, torch.ones_like(pooled).requires_grad_(), create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad_x.sum().backward()


def test_frozen_affine_that_requires_grad_is_refused_in_grad_mode_alone() -> None:
    x, (scale, bias) = images((1, 4, 4, 4)), affine(4, torch.float32)
    for name, arguments in (
        ("scale", (scale.clone().requires_grad_(), bias)),
        ("bias", (scale, bias.clone().requires_grad_())),
    ):
        with pytest.raises(ValueError, match=f"stem: {name} requires grad"):
            stem(x, *arguments)
        with torch.no_grad():
            stem(x, *arguments)


X = torch.zeros(2, 4, 6, 6)
C = torch.ones(4)
POOLED, ARGMAX = torch.zeros(2, 4, 3, 3), torch.zeros(2, 4, 3, 3, dtype=torch.int8)
PIXELS, MEAN = torch.zeros(1, 2, 2, 3, dtype=torch.uint8), torch.zeros(3)
REFUSED = {
    "x-3d": (lambda: stem(X[0], C, C), r"stem: x must be \(N, C, H, W\).*\(4, 6, 6\)"),
    "x-without-rows": (lambda: stem(X[:, :, :0], C, C), "stem: x .* at least 1"),
    "x-integers": (lambda: stem(X.int(), C, C), "stem: x must be float.* got torch.int32"),
    "scale-shape": (lambda: stem(X, C[:3], C), r"stem: scale must be torch.float32 \(4,\).*\(3,\)"),
    "bias-dtype": (lambda: stem(X, C, C.double()), "stem: bias .* got torch.float64"),
    "double-affine": (lambda: stem(X.double(), C, C), "stem: scale must be torch.float64"),
    "scale-device": (lambda: stem(X, C.to("meta"), C), "stem: scale .* on meta"),
    "grad-shape": (lambda: stem_backward(POOLED[:1], POOLED, ARGMAX, C, 6, 6), "stem_backward: grad"),
    "grad-dtype": (lambda: stem_backward(POOLED.half(), POOLED, ARGMAX, C, 6, 6), "stem_backward: grad"),
    "argmax-dtype": (lambda: stem_backward(POOLED, POOLED, ARGMAX.long(), C, 6, 6), "stem_backward: argmax"),
    "pooled-3d": (lambda: stem_backward(POOLED, POOLED[0], ARGMAX, C, 6, 6), "stem_backward: pooled"),
    "height": (lambda: stem_backward(POOLED, POOLED, ARGMAX, C, 7, 6), "stem_backward: height=7"),
    "width": (lambda: stem_backward(POOLED, POOLED, ARGMAX, C, 5, 4), "stem_backward: width=4"),
    "backward-scale": (lambda: stem_backward(POOLED, POOLED, ARGMAX, C[:2], 6, 6), "stem_backward: scale"),
    "frames-float": (lambda: stem_input(PIXELS.float(), MEAN, torch.float32), "stem_input: frames must be uint8"),
    "frames-planar": (lambda: stem_input(PIXELS.permute(0, 3, 1, 2), MEAN, torch.float32), "stem_input: frames"),
    "mean-shape": (lambda: stem_input(PIXELS, MEAN.view(1, 3, 1, 1), torch.float32), "stem_input: mean"),
    "mean-dtype": (lambda: stem_input(PIXELS, MEAN.double(), torch.float64), "stem_input: mean"),
    "input-dtype": (lambda: stem_input(PIXELS, MEAN, torch.int32), "stem_input: dtype"),
    "weight-channels": (lambda: fold_normalization(X, MEAN), "fold_normalization: weight"),
    "std-shape": (lambda: fold_normalization(X[:, :3], C), "fold_normalization: std"),
}


@pytest.mark.parametrize(("call", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_refuses(call, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize(
    ("shape", "layout"),
    [((2, 16, 7, 6), layout) for layout in LAYOUTS] + [((1, 3, 1, 1), "channels_last")],
    ids=[*LAYOUTS, "one-pixel"],
)
def test_opcheck(shape: tuple[int, ...], layout: str) -> None:
    x = images(shape, layout).requires_grad_()
    scale, bias = affine(shape[1], torch.float32)
    torch.library.opcheck(torch.ops.lofi_fast.stem, (x, scale, bias))
    torch.library.opcheck(torch.ops.lofi_fast.stem, (x, None, bias))
    pooled, argmax = torch.ops.lofi_fast.stem(x.detach(), scale, bias)
    grad = images(tuple(pooled.shape), layout)
    for given in (scale, None):
        torch.library.opcheck(torch.ops.lofi_fast.stem_backward, (grad, pooled, argmax, given, *shape[2:]))


@pytest.mark.parametrize("frames", [FRAMES["ordinary"], FRAMES["cropped"]], ids=["ordinary", "cropped"])
def test_opcheck_of_frames(frames: Tensor) -> None:
    torch.library.opcheck(torch.ops.lofi_fast.stem_input, (frames, torch.ones(3), torch.bfloat16))


@pytest.mark.gpu
def test_the_operators_run_on_a_gpu() -> None:
    x, (scale, bias) = images((2, 64, 30, 31), "channels_last"), affine(64, torch.float32)
    leaf = x.cuda().requires_grad_()
    pooled = stem(leaf, scale.cuda(), bias.cuda())
    grad = images(tuple(pooled.shape), "channels_last", seed=2)
    pooled.backward(grad.cuda())
    expected, argmax = reference.stem(x, scale, bias)
    exactly(pooled.detach().cpu(), expected)
    assert leaf.grad is not None
    exactly(leaf.grad.cpu(), reference.stem_backward(grad, expected, argmax, scale, 30, 31))


@pytest.fixture
def unfilled() -> Iterator[None]:
    """Memory that nothing touches costs nothing: gigabytes of it fit anywhere."""
    torch.utils.deterministic.fill_uninitialized_memory = False
    yield
    torch.utils.deterministic.fill_uninitialized_memory = True


def far_apart(shape: tuple[int, ...], axis: int) -> Tensor:
    """A tensor whose one stride fits in 32 bits, but not its product with the last index."""
    strides = list(torch.empty(shape, device="meta").stride())
    strides[axis] = 2**31 // (shape[axis] - 1) + 16
    last = sum(stride * (size - 1) for stride, size in zip(strides, shape, strict=True))
    return torch.empty(last + 1, dtype=torch.float16).as_strided(shape, strides)


every_axis = pytest.mark.parametrize("axis", range(4), ids=["frames", "channels", "rows", "columns"])


@pytest.mark.usefixtures("unfilled")
@every_axis
def test_inputs_beyond_32_bits(form: Form, axis: int) -> None:
    if form.device == "cuda":
        pytest.skip("through the interpreter it takes no memory")
    near, (scale, bias) = whole((3, 3, 3, 3), "contiguous", torch.float16), exact_affine(3, torch.float16)
    far = far_apart((3, 3, 3, 3), axis).copy_(near)
    for got, expected in zip(form.stem(far, scale, bias), reference.stem(near, scale, bias), strict=True):
        exactly(got, expected)
    pooled, argmax = reference.stem(whole((3, 3, 5, 5), "contiguous", torch.float16, seed=2), scale, bias)
    exactly(
        form.stem_backward(far, pooled, argmax, scale, 5, 5),
        reference.stem_backward(near, pooled, argmax, scale, 5, 5),
    )


@pytest.mark.usefixtures("unfilled")
@every_axis
def test_results_beyond_32_bits(axis: int) -> None:
    if torch.cuda.is_available():
        pytest.skip("through the interpreter it takes no memory")
    from lofi_fast.kernels.stem import kernel

    x, (scale, bias) = whole((3, 3, 5, 5), "contiguous", torch.float16), exact_affine(3, torch.float16)
    pooled, argmax = reference.stem(x, scale, bias)
    far = far_apart((3, 3, 3, 3), axis)
    far_argmax = torch.empty(far.untyped_storage().nbytes(), dtype=torch.int8).as_strided(far.shape, far.stride())
    kernel.stem_launch(x, scale, bias, far, far_argmax).run()
    exactly(far.contiguous(), pooled)
    exactly(far_argmax.contiguous(), argmax)
    grad, far = whole((3, 3, 3, 3), "contiguous", torch.float16, seed=2), far_apart((3, 3, 5, 5), axis)
    kernel.stem_backward_launch(grad, pooled, far_argmax, scale, far).run()
    exactly(far.contiguous(), reference.stem_backward(grad, pooled, argmax, scale, 5, 5))


def test_grids_of_more_than_32_bits_of_elements() -> None:
    from lofi_fast.kernels.stem import kernel

    num = 2**12  # 3.3e9 elements: longer than any video at the encoder's size
    x = torch.empty(num, 64, 112, 112, dtype=torch.bfloat16, device="meta", memory_format=torch.channels_last)
    pooled = reference.empty_beside(x, (num, 64, 56, 56))
    argmax = reference.empty_beside(x, pooled.shape, torch.int8)
    scale = torch.empty(64, device="meta")
    for launch in (
        kernel.stem_launch(x, scale, scale, pooled, argmax),
        kernel.stem_backward_launch(pooled, pooled, argmax, scale, x),
    ):
        assert launch.grid == (num * 14 * 14,)
        assert launch.arguments["x_frame"] == 64 * 112 * 112
    frames = torch.empty(2**14, 224, 224, 3, dtype=torch.uint8, device="meta")
    launch = kernel.stem_input_launch(frames, scale, frames.float().permute(0, 3, 1, 2))
    assert launch.arguments["size"] == frames.numel() > 2**31
    assert launch.grid == (-(-frames.numel() // 2048),)

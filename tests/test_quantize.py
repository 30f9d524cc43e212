from __future__ import annotations

import math
import mmap
from collections.abc import Callable

import pytest
import torch
from forms import LAYOUTS, Form, images
from torch import Tensor

from lofi_fast.kernels import dequantize, library, quantize
from lofi_fast.kernels.quantize import reference
from lofi_fast.kernels.stem.reference import memory_format

pytestmark = [
    pytest.mark.usefixtures("poison"),
    # NumPy's, under Triton's interpreter, where NaN and infinity are what is tested.
    pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning"),
]

UNRESERVED = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x4000  # Linux's MAP_NORESERVE: not counted until it is touched

DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]
# (N, C, H, W)
SHAPES = {
    "ordinary": (3, 16, 8, 8),
    "odd-pixels": (2, 3, 7, 9),
    "nine-channels": (2, 9, 5, 6),
    "one-channel": (2, 1, 4, 7),
    "several-tiles": (1, 40, 9, 17),
    "many-pixels": (1, 2, 65, 67),
    "many-channels": (2, 600, 3, 1),
    "one-pixel": (2, 4, 1, 1),
    "one-row": (1, 8, 1, 7),
    "no-frames": (0, 8, 4, 4),
    "no-channels": (2, 0, 4, 4),
    "no-pixels": (2, 4, 0, 3),
}
every_shape = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
every_layout = pytest.mark.parametrize("layout", LAYOUTS)


@pytest.fixture(params=["reference", "C++", "Triton"])
def form(request: pytest.FixtureRequest) -> Form:
    """Triton runs on the GPU where there is one, else through its interpreter."""
    if request.param == "reference":
        return Form(reference)
    if request.param == "C++":
        request.getfixturevalue("native")
        assert library.forms["cpu"]["quantize"] == library.forms["cpu"]["dequantize"] == "C++"
        return Form(torch.ops.lofi_fast)
    pytest.importorskip("triton")
    from lofi_fast.kernels.quantize import kernel

    return Form(kernel, "cuda" if torch.cuda.is_available() else "cpu")


def sums(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def map_of(shape: tuple[int, ...], layout: str = "channels_last", dtype: torch.dtype = torch.float32) -> Tensor:
    """A map after a ReLU, whose channels differ in size; a strided one lies among NaN."""
    x = images(shape, layout, dtype)
    return x.copy_(x.relu() * torch.logspace(-2, 2, shape[1], base=4).view(-1, 1, 1)) if x.numel() else x


def in_channels(values: list[list[float]], dtype: torch.dtype = torch.float32) -> Tensor:
    """One frame, a row of values for each channel, channels-last."""
    x = torch.tensor(values, dtype=torch.float64).to(dtype)
    return x.view(1, len(values), 1, -1).contiguous(memory_format=torch.channels_last)


def exactly(got: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(got, expected, rtol=0, atol=0, equal_nan=True, check_stride=True)


def rounded(form: Form, exact: Tensor, dtype: torch.dtype) -> Tensor:
    """Numbers in dtype, as the form rounds them."""
    if dtype == torch.bfloat16 and form.truncates:
        return (exact.contiguous().view(torch.int32) & -65536).view(torch.float32).to(dtype)
    return exact.to(dtype)


def assert_same(form: Form, x: Tensor) -> None:
    """Both operators give what the definition gives, to the bit: equal numbers, and no zero with a sign."""
    expected_codes, expected_scale = reference.quantize(x)
    codes, scale = form.quantize(x)
    exactly(codes, expected_codes)
    exactly(scale, expected_scale)
    back = form.dequantize(codes, scale, x.dtype)
    expected = reference.dequantize(codes, scale, x.dtype)
    if form.truncates and x.dtype == torch.bfloat16:
        expected.copy_(rounded(form, reference.dequantize(codes, scale, torch.float32), x.dtype))
    exactly(back, expected)
    assert not back[~back.isnan()].signbit().any()


def test_by_hand(form: Form) -> None:
    # Steps of 1, of 2, of 1/255, and of nothing. Ties go to the even code; what is above zero is never code 0.
    x = in_channels(
        [
            [255.0, 0.5, 1.5, 2.5, 254.5, 0.4, 0.0],
            [510.0, 1.0, 3.0, 5.0, 509.0, 1e-30, -0.0],
            [1.0, 0.6, 0.25, 1 / 255, 1e-3, 0.999, 0.0],
            [0.0, -0.0, 0.0, 0.0, -1.0, 0.0, 0.0],
        ]
    )
    codes, scale = form.quantize(x)
    assert codes.dtype == torch.uint8
    assert codes.flatten(2).tolist() == [
        [[255, 1, 2, 2, 254, 1, 0], [255, 1, 2, 2, 254, 1, 0], [255, 153, 64, 1, 1, 255, 0], [0, 0, 0, 0, 0, 0, 0]]
    ]
    exactly(scale, torch.tensor([[1.0, 2.0, 1 / 255, 0.0]]))
    back = form.dequantize(codes, scale, torch.float32)
    assert back[0, 1].tolist() == [[510, 2, 4, 4, 508, 2, 0]]
    assert back[0, 3].tolist() == [[0] * 7]


@every_shape
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_equals_the_definition_at_every_shape(form: Form, shape: tuple[int, ...], layout: str) -> None:
    assert_same(form, map_of(shape, layout))


@every_layout
@every_dtype
def test_equals_the_definition_in_every_layout_and_dtype(form: Form, layout: str, dtype: torch.dtype) -> None:
    for shape in ((2, 16, 7, 6), (2, 9, 5, 6)):
        assert_same(form, map_of(shape, layout, dtype))


@every_layout
def test_the_definition_does_what_its_formula_says(layout: str) -> None:
    x = map_of((2, 9, 5, 6), layout)
    codes, scale = reference.quantize(x)
    assert scale.shape == (2, 9)
    exactly(scale, x.amax(dim=(2, 3)) / 255)
    steps = x.double() / scale.double().view(2, 9, 1, 1)
    unsure = ((steps % 1) - 0.5).abs() < 1e-4
    assert unsure.float().mean() < 0.01
    wanted = steps.round().clamp(1, 255).masked_fill(x <= 0, 0)
    assert torch.equal(codes[~unsure].double(), wanted[~unsure])


@every_layout
def test_memory_format_is_kept_in_both_directions(form: Form, layout: str) -> None:
    x = map_of((2, 4, 6, 5), layout)
    expected = torch.channels_last if layout == "channels_last" else torch.contiguous_format
    codes, scale = form.quantize(x)
    assert codes.is_contiguous(memory_format=expected)
    assert scale.is_contiguous()
    assert form.dequantize(codes, scale, torch.float16).is_contiguous(memory_format=expected)


def test_dequantize_takes_codes_and_scales_of_any_stride(form: Form) -> None:
    codes = torch.randint(0, 256, (4, 12, 5, 6), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    scale = torch.rand(4, 12, generator=torch.Generator().manual_seed(0))
    for taken in (
        codes.permute(0, 1, 3, 2),
        codes.permute(1, 0, 2, 3),
        codes[:, ::2, 1:, ::3],
        codes[:1].expand(3, -1, -1, -1),
    ):
        num, channels = taken.shape[:2]
        scales = scale.reshape(-1)[: num * channels].view(channels, num).t()
        exactly(
            form.dequantize(taken, scales, torch.float32),
            taken.contiguous(memory_format=memory_format(taken)) * scales.contiguous()[:, :, None, None],
        )


@every_dtype
def test_every_code_is_rounded_once(form: Form, dtype: torch.dtype) -> None:
    codes = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).expand(3, 5, 16, 16)
    generator = torch.Generator().manual_seed(0)
    scale = torch.rand((3, 5), generator=generator, dtype=sums(dtype))
    back = form.dequantize(codes, scale, dtype)
    assert back.dtype == dtype
    exactly(back, rounded(form, codes.to(sums(dtype)).contiguous() * scale[:, :, None, None], dtype))


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@every_dtype
def test_codes_are_the_mask(form: Form, dtype: torch.dtype, layout: str) -> None:
    x = images((2, 9, 6, 7), layout, dtype)  # half of it negative
    if not (form.truncates and dtype == torch.bfloat16):
        x[:, :, 1] *= torch.finfo(dtype).tiny / 16
        x[0, 1] *= torch.finfo(dtype).tiny / 16
    x[0, 2, 2, 2], x[0, 3, 3, 3] = math.inf, math.nan
    x[1, 1] = -x[1, 1].abs()
    x[1, 2, 3] = torch.tensor([0.0, -0.0, 0.0, 1.0, -1.0, 0.0, 2.0])
    codes, scale = form.quantize(x)
    assert (x > 0).any() and (x == 0).any() and (x < 0).any()
    assert torch.equal(codes > 0, ~(x <= 0))
    # A value that is stored comes back above zero in its own dtype, however small it and its channel are.
    back = form.dequantize(codes, scale, dtype)
    finite = scale.isfinite()[:, :, None, None] & (x == x)
    assert torch.equal((back > 0) & finite, (x > 0) & finite)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@every_dtype
def test_a_nan_or_an_infinity_spoils_its_frame_and_channel_alone(form: Form, dtype: torch.dtype, layout: str) -> None:
    clean = map_of((2, 9, 11, 13), layout, dtype)
    x = clean.clone()
    # All bits set: a NaN with a sign, whose last byte is no code.
    negative_nan = torch.full((dtype.itemsize,), 255, dtype=torch.uint8).view(dtype)[0]
    assert negative_nan.isnan() and negative_nan.signbit()
    for at, spoiled in (((0, 1, 0, 0), math.nan), ((1, 8, 10, 12), math.nan), ((1, 2, 5, 5), negative_nan)):
        x[at] = spoiled
    x[0, 3, 4, 4], x[1, 0, 0, 1], x[1, 0, 3, 3] = math.inf, math.inf, math.nan
    assert_same(form, x)
    codes, scale = form.quantize(x)
    back = form.dequantize(codes, scale, dtype)
    assert scale.isnan().nonzero().tolist() == [[0, 1], [1, 0], [1, 2], [1, 8]]
    assert scale.isinf().nonzero().tolist() == [[0, 3]]
    assert torch.equal(back.isnan().flatten(2).all(2), scale.isnan())
    assert torch.equal(codes[0, 3], (x[0, 3] > 0).byte())
    assert torch.equal(back[0, 3].isposinf(), x[0, 3] > 0)
    assert torch.equal(back[0, 3].isnan(), x[0, 3] <= 0)
    others = scale.isfinite()
    clean_codes, clean_scale = form.quantize(clean)
    assert torch.equal(codes[others], clean_codes[others]) and torch.equal(scale[others], clean_scale[others])


def powers(dtype: torch.dtype) -> list[float]:
    """Maxima from the smallest denormal number to the largest number."""
    limits = torch.finfo(dtype)
    smallest = limits.smallest_normal * limits.eps
    return [smallest, 3 * smallest, 130 * smallest, limits.tiny, 300 * limits.tiny, 1e-4, 1, 3, 6e4, limits.max]


@every_dtype
def test_error_bound_at_maxima_of_every_size(form: Form, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    sizes = powers(dtype)[5 if form.truncates and dtype == torch.bfloat16 else 0 :]
    maxima = torch.tensor(sizes, dtype=torch.float64).view(1, -1, 1, 1)
    x = torch.rand((2, maxima.numel(), 9, 57), generator=generator, dtype=torch.float64) ** 3 * maxima
    x[:, :, 0, :1] = maxima.squeeze(3)
    x[:, :, 1, :] = 0
    x = x.to(dtype)
    assert x.isfinite().all()
    if dtype == torch.float64:
        x[:, -1] *= 0.5  # 255 steps of 1/255 are a rounding too many for the largest number
    assert_same(form, x)
    codes, scale = form.quantize(x)
    assert scale.isfinite().all() and (scale > 0).all()
    assert (scale >= torch.finfo(sums(dtype)).tiny).all()
    largest = codes.flatten(2).amax(2)
    assert torch.equal(largest == 255, scale > torch.finfo(sums(dtype)).tiny)
    assert form.dequantize(codes, scale, dtype).isfinite().all()
    back = form.dequantize(codes, scale, sums(dtype)).double()
    step = scale.double()[:, :, None, None]
    error = (back - x.double()).abs()
    lifted = (codes == 1) & (x.double() < step / 2)
    assert lifted.any()
    assert (error <= step * torch.where(lifted, 1.0, 0.5 + 1 / 16384)).all()
    assert (error > step * 0.49).any(), "the bound says nothing about this input"


@pytest.mark.usefixtures("native")
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_results_do_not_depend_on_the_number_of_threads(layout: str) -> None:
    x = map_of((7, 24, 41, 40), layout)
    results = []
    for number in (1, 2, 3):
        torch.set_num_threads(number)
        codes, scale = torch.ops.lofi_fast.quantize(x)
        results.append((codes, scale, torch.ops.lofi_fast.dequantize(codes, scale, torch.float32)))
    for other in (*results[1:], (*reference.quantize(x), reference.dequantize(*reference.quantize(x), x.dtype))):
        for got, expected in zip(other, results[0], strict=True):
            exactly(got, expected)


@every_dtype
def test_public_functions_equal_the_definition(dtype: torch.dtype) -> None:
    x = map_of((2, 9, 5, 6), "channels_last", dtype)
    codes, scale = quantize(x)
    for got, expected in zip((codes, scale), reference.quantize(x), strict=True):
        exactly(got, expected)
    for target in DTYPES:
        scales = scale.to(sums(target))
        exactly(dequantize(codes, scales, target), reference.dequantize(codes, scales, target))


def test_has_no_derivative_and_says_so() -> None:
    x = map_of((1, 4, 3, 3)).requires_grad_()
    codes, scale = quantize(x)
    assert not codes.requires_grad
    with pytest.raises(NotImplementedError, match="quantize and dequantize have no gradient"):
        scale.sum().backward()
    with pytest.raises(NotImplementedError, match="quantize and dequantize have no gradient"):
        dequantize(codes, scale.detach().requires_grad_(), torch.float32).sum().backward()


X = torch.zeros(2, 4, 6, 6)
CODES, SCALE = torch.zeros(2, 4, 6, 6, dtype=torch.uint8), torch.ones(2, 4)
REFUSED = {
    "x-3d": (lambda: quantize(X[0]), r"quantize: x must be \(N, C, H, W\), got 3 dimensions"),
    "x-integers": (lambda: quantize(CODES), "quantize: x must be float.* got torch.uint8"),
    "x-complex": (lambda: quantize(X.cfloat()), "quantize: x must be float.* got torch.complex64"),
    "codes-2d": (lambda: dequantize(CODES[0, 0], SCALE, X.dtype), "dequantize: codes must be .* got 2 dimensions"),
    "codes-dtype": (lambda: dequantize(X, SCALE, X.dtype), "dequantize: codes must be torch.uint8, got torch.float32"),
    "codes-signed": (lambda: dequantize(CODES.char(), SCALE, X.dtype), "dequantize: codes .* got torch.int8"),
    "dtype": (lambda: dequantize(CODES, SCALE, torch.int32), "dequantize: dtype must be float.* got torch.int32"),
    "scale-shape": (lambda: dequantize(CODES, SCALE[0], X.dtype), r"dequantize: scale must be .* \(2, 4\).*\(4,\)"),
    "scale-channels": (lambda: dequantize(CODES, SCALE[:, :3], X.dtype), r"dequantize: scale .* got .*\(2, 3\)"),
    "scale-dtype": (lambda: dequantize(CODES, SCALE.half(), torch.float16), "dequantize: scale .* got torch.float16"),
    "scale-wide": (lambda: dequantize(CODES, SCALE.double(), X.dtype), "dequantize: scale must be torch.float32"),
    "scale-narrow": (lambda: dequantize(CODES, SCALE, torch.float64), "dequantize: scale must be torch.float64"),
    "scale-device": (lambda: dequantize(CODES, SCALE.to("meta"), X.dtype), "dequantize: scale .* on meta"),
}


@pytest.mark.parametrize(("call", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_refuses(call: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize(
    ("shape", "layout"),
    [((2, 16, 7, 6), layout) for layout in LAYOUTS] + [((1, 3, 1, 1), "channels_last"), ((0, 3, 2, 2), "contiguous")],
    ids=[*LAYOUTS, "one-pixel", "no-frames"],
)
def test_opcheck(shape: tuple[int, ...], layout: str) -> None:
    x = map_of(shape, layout, torch.bfloat16)
    torch.library.opcheck(torch.ops.lofi_fast.quantize.default, (x,))
    codes, scale = torch.ops.lofi_fast.quantize(x)
    torch.library.opcheck(torch.ops.lofi_fast.dequantize.default, (codes, scale, torch.float16))


@pytest.mark.gpu
@every_dtype
def test_the_operators_run_on_a_gpu(dtype: torch.dtype) -> None:
    assert library.forms["cuda"]["quantize"].startswith("Triton")
    x = map_of((4, 64, 28, 28), "channels_last", dtype)
    codes, scale = quantize(x.cuda())
    expected_codes, expected_scale = reference.quantize(x)
    exactly(codes.cpu(), expected_codes)
    exactly(scale.cpu(), expected_scale)
    exactly(dequantize(codes, scale, dtype).cpu(), reference.dequantize(expected_codes, expected_scale, dtype))
    on_gpu = reference.quantize(x.cuda())
    for got, expected in zip((codes, scale), on_gpu, strict=True):
        exactly(got, expected)


def test_grids_of_more_than_32_bits_of_elements() -> None:
    pytest.importorskip("triton")
    from lofi_fast.kernels.quantize import kernel

    num = 2**14
    x = torch.empty(num, 64, 56, 56, dtype=torch.bfloat16, device="meta", memory_format=torch.channels_last)
    assert x.numel() > 2**31
    codes, scale = torch.empty_like(x, dtype=torch.uint8), torch.empty(num, 64, device="meta")
    launch = kernel.quantize_launch(x, codes, scale)
    assert launch.grid == (num * 2,)
    assert launch.constants["PIXELS"] * launch.constants["CHANNELS"] == 4096
    launch = kernel.dequantize_launch(codes, scale, x)
    assert launch.grid == (num * 2 * -(-56 * 56 // 128),)


# (frames, channels, pixels, channel_stride, pixel_stride, CHANNELS, PIXELS): frame, channel or pixel 2 begins at 2^31.
FAR = {
    "frames": (3, 2**15, 2**15, 2**15, 1, 1, 2**12),
    "channels": (1, 4, 1, 2**30, 1, 4, 1),
    "pixels": (1, 1, 4, 1, 2**30, 1, 4),
    "pixels-of-later-tiles": (1, 1, 4, 1, 2**30, 1, 1),
}


@pytest.mark.skipif(torch.cuda.is_available(), reason="counts on memory that is taken only where it is touched")
@pytest.mark.parametrize("geometry", FAR.values(), ids=FAR.keys())
def test_offsets_above_32_bits(geometry: tuple[int, ...]) -> None:
    # Of each frame one block of channels runs. Offsets that wrap around land in the first 2^31 numbers, in no frame.
    pytest.importorskip("triton")
    from lofi_fast.kernels.launch import Launch
    from lofi_fast.kernels.quantize import kernel

    frames, channels, pixels, channel_stride, pixel_stride, tile_channels, tile_pixels = geometry
    memory = torch.frombuffer(mmap.mmap(-1, 2**34, flags=UNRESERVED), dtype=torch.float16)
    codes_memory = memory.view(torch.uint8)[2**33 + 2**32 :]
    strides = (channels * pixels, channel_stride, pixel_stride, 1)
    x = memory[2**31 :].as_strided((frames, tile_channels, pixels, 1), strides)
    codes, back = codes_memory.as_strided(x.shape, strides), memory[2**31 + 2**16 :].as_strided(x.shape, strides)
    x.copy_(images(x.shape, dtype=torch.float16).relu())
    scale = torch.empty(frames, channels)
    place = {
        **{"channels": channels, "pixels": pixels, "channel_stride": channel_stride, "pixel_stride": pixel_stride},
        "channel_blocks": 1,
    }
    example = kernel.quantize_launch(x, codes, scale)
    tile = {"CHANNELS": tile_channels, "PIXELS": tile_pixels}
    Launch(example.kernel, (frames,), example.arguments | place, example.constants | tile).run()
    expected, expected_scale = reference.quantize(x.contiguous())
    assert expected.any()
    exactly(codes.contiguous(), expected)
    exactly(scale[:, :tile_channels].contiguous(), expected_scale)
    example = kernel.dequantize_launch(codes, scale, back)
    blocks = pixels // tile_pixels
    place["pixel_blocks"] = blocks
    Launch(example.kernel, (frames * blocks,), example.arguments | place, example.constants | tile).run()
    exactly(back.contiguous(), reference.dequantize(expected, expected_scale, torch.float16))

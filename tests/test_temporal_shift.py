from __future__ import annotations

import mmap
from collections.abc import Callable
from typing import Any

import pytest
import torch
from forms import LAYOUTS, images
from torch import Tensor

from lofi_fast.kernels import library, temporal_shift
from lofi_fast.kernels.temporal_shift import reference

pytestmark = pytest.mark.usefixtures("poison")

Shift = Callable[[Tensor, int, int, bool], Tensor]

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

UNRESERVED = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x4000  # Linux's MAP_NORESERVE: not counted until it is touched

# (N, T, C, H, W)
SHAPES = {
    "ordinary": (2, 4, 16, 6, 4),
    "one-frame": (3, 1, 16, 4, 4),
    "two-frames": (2, 2, 8, 3, 3),
    "nine-channels-odd-pixels": (2, 3, 9, 5, 7),
    "fewer-than-eight-channels": (2, 4, 3, 2, 2),
    "one-channel": (1, 2, 1, 3, 2),
    "one-pixel": (1, 8, 64, 1, 1),
    "one-image": (1, 1, 8, 2, 3),
    "several-tiles": (1, 2, 64, 5, 7),
    "no-snippets": (0, 8, 16, 4, 4),
    "no-pixels": (2, 4, 8, 0, 3),
}


def snippets(shape: tuple[int, ...], layout: str = "contiguous", dtype: torch.dtype = torch.float64) -> Tensor:
    num_snippets, num_frames, *rest = shape
    return images((num_snippets * num_frames, *rest), layout, dtype)


def by_concatenation(x: Tensor, num_frames: int, fold: int) -> Tensor:
    """The shift written in another way than the reference, with autograd's own adjoint."""
    num_images, channels, height, width = x.shape
    x_NTCHW = x.reshape(num_images // num_frames, num_frames, channels, height, width)
    from_next, from_previous, still = torch.split(x_NTCHW, [fold, fold, channels - 2 * fold], dim=2)
    left = torch.cat([from_next[:, 1:], torch.zeros_like(from_next[:, :1])], dim=1)
    right = torch.cat([torch.zeros_like(from_previous[:, :1]), from_previous[:, :-1]], dim=1)
    return torch.cat([left, right, still], dim=2).reshape(x.shape)


def expected(x: Tensor, num_frames: int, fold: int, adjoint: bool) -> Tensor:
    if not adjoint:
        return by_concatenation(x, num_frames, fold)
    wanted = torch.zeros(x.shape, dtype=torch.float64, requires_grad=True)
    (grad,) = torch.autograd.grad(by_concatenation(wanted, num_frames, fold), wanted, x.double())
    return grad.to(x.dtype)


@pytest.fixture(params=["reference", "C++", "Triton"])
def shift(request: pytest.FixtureRequest) -> Shift:
    """One form of the operator, for tensors on the CPU. Triton runs on a GPU where there is one."""
    if request.param == "reference":
        return reference.temporal_shift
    if request.param == "C++":
        request.getfixturevalue("native")
        assert library.forms["cpu"]["temporal_shift"] == "C++"
        op: Shift = torch.ops.lofi_fast.temporal_shift
        return op
    pytest.importorskip("triton")
    from lofi_fast.kernels.temporal_shift import kernel

    def run(x: Tensor, num_frames: int, fold: int, adjoint: bool) -> Tensor:
        return kernel.temporal_shift(x.to(DEVICE), num_frames, fold, adjoint).cpu()

    return run


def test_by_hand(shift: Shift) -> None:
    # Two snippets of three frames, four channels (left, right, still, still), the value says (image, channel).
    x = torch.tensor([[10.0 * image + channel for channel in range(4)] for image in range(6)]).view(6, 4, 1, 1)
    y = shift(x, 3, 1, False).view(6, 4)
    assert y[:, 0].tolist() == [10, 20, 0, 40, 50, 0]
    assert y[:, 1].tolist() == [0, 1, 11, 0, 31, 41]
    assert torch.equal(y[:, 2:], x.view(6, 4)[:, 2:])


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_both_directions(shift: Shift, shape: tuple[int, ...], layout: str) -> None:
    x = snippets(shape, layout, torch.float32)
    for adjoint in (False, True):
        y = shift(x, shape[1], shape[2] // 8, adjoint)
        assert torch.equal(y, expected(x, shape[1], shape[2] // 8, adjoint))
        assert y.stride() == torch.empty_like(x).stride()


# Through every granule of the Triton kernel and every row length that the C++ form knows at compile time.
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize(
    ("channels", "fold"), [(64, 8), (32, 4), (48, 2), (16, 2), (24, 1), (9, 4), (36, 0), (256, 32)]
)
def test_every_fold(shift: Shift, channels: int, fold: int, layout: str) -> None:
    x = snippets((2, 3, channels, 2, 2), layout, torch.float32)
    for adjoint in (False, True):
        assert torch.equal(shift(x, 3, fold, adjoint), expected(x, 3, fold, adjoint))


DTYPES = [
    torch.bool,
    torch.uint8,
    torch.int16,
    torch.int64,
    torch.float16,
    torch.bfloat16,
    torch.float64,
    torch.complex64,
    torch.complex128,
]


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "strided"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_is_a_copy_at_every_dtype(shift: Shift, dtype: torch.dtype, layout: str) -> None:
    x = (images((8, 16, 3, 3), layout, torch.float32) * 10).abs()
    x = torch.complex(x, x + 1).to(dtype) if dtype.is_complex else x.to(dtype)
    y = shift(x, 4, 2, False)
    assert y.dtype == dtype
    assert torch.equal(y, by_concatenation(x, 4, 2))


def test_nan_bits_survive(shift: Shift) -> None:
    x = torch.tensor([0x7E01, 0x7C01, -1, 5], dtype=torch.int16).view(torch.float16).view(2, 2, 1, 1)  # three NaN
    y = shift(x, 2, 0, False)
    assert torch.equal(y.view(torch.int16), x.view(torch.int16))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_gradient_is_the_adjoint(shape: tuple[int, ...], layout: str) -> None:
    x = snippets(shape, layout).requires_grad_()
    expected_x = x.detach().clone().requires_grad_()
    y = temporal_shift(x, shape[1])
    expected_y = by_concatenation(expected_x, shape[1], shape[2] // 8)
    grad = torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=y.dtype)
    y.backward(grad)
    expected_y.backward(grad)
    assert torch.equal(y, expected_y)
    assert x.grad is not None and expected_x.grad is not None
    assert torch.equal(x.grad, expected_x.grad)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_inner_products_agree(shape: tuple[int, ...]) -> None:
    # Small integers: both inner products are exact.
    x = (snippets(shape) * 4).round().requires_grad_()
    z = (snippets(shape).flip(0) * 4).round()
    y = temporal_shift(x, shape[1])
    (adjoint,) = torch.autograd.grad(y, x, z)
    assert (z * y).sum().item() == (adjoint * x).sum().item()


def test_gradcheck() -> None:
    x = snippets((2, 3, 9, 1, 2)).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: temporal_shift(x, 3), x)
    assert torch.autograd.gradgradcheck(lambda x: temporal_shift(x, 3), x)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_opcheck(layout: str) -> None:
    x = images((6, 16, 3, 2), layout, torch.float32)
    for adjoint in (False, True):
        torch.library.opcheck(torch.ops.lofi_fast.temporal_shift.default, (x, 3, 2, adjoint))
    torch.library.opcheck(torch.ops.lofi_fast.temporal_shift.default, (x.requires_grad_(), 3, 2, False))


def test_memory_format_is_kept_in_both_directions() -> None:
    x = snippets((2, 4, 16, 6, 4), "channels_last").requires_grad_()
    y = temporal_shift(x, 4)
    assert y.is_contiguous(memory_format=torch.channels_last)
    y.backward(torch.ones_like(y))
    assert x.grad is not None and x.grad.is_contiguous(memory_format=torch.channels_last)
    assert temporal_shift(snippets((2, 4, 16, 6, 4)), 4).is_contiguous()


def test_never_an_alias(shift: Shift) -> None:
    x = snippets((2, 4, 4, 2, 2))
    before = x.clone()
    shift(x, 4, 0, False).add_(1)
    assert torch.equal(x, before)


def test_nothing_is_saved_for_backward() -> None:
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(saved.append, lambda nothing: nothing):
        temporal_shift(snippets((2, 4, 16, 2, 2)).requires_grad_(), 4)
    assert saved == []


def test_frame_count_may_change_between_calls() -> None:
    x = snippets((3, 4, 8, 2, 2))
    assert torch.equal(temporal_shift(x, 4), by_concatenation(x, 4, 1))
    assert torch.equal(temporal_shift(x, 6), by_concatenation(x, 6, 1))
    assert not torch.equal(temporal_shift(x, 4), temporal_shift(x, 6))


def test_default_fold_is_an_eighth() -> None:
    x = snippets((1, 3, 36, 2, 2))
    assert torch.equal(temporal_shift(x, 3), temporal_shift(x, 3, fold=4))


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
    with pytest.raises(ValueError, match=f"temporal_shift: .*{message}"):
        temporal_shift(torch.zeros(shape), num_frames, fold)


@pytest.mark.usefixtures("native")
def test_wrong_arguments_do_not_reach_memory_in_cpp() -> None:
    for shape, num_frames, fold in (
        ((6, 8, 2, 2), 4, 1),
        ((8, 8, 2, 2), 4, 5),
        ((8, 8, 2, 2), 0, 1),
        ((8, 8, 2), 4, 1),
    ):
        with pytest.raises(RuntimeError, match="temporal_shift"):
            torch.ops.lofi_fast.temporal_shift(torch.zeros(shape), num_frames, fold, False)


@pytest.mark.usefixtures("native")
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_threads_do_not_change_the_result(layout: str) -> None:
    x = images((16, 64, 24, 24), layout)
    several = temporal_shift(x, 8)
    assert torch.equal(several, by_concatenation(x, 8, 8))
    torch.set_num_threads(1)
    assert torch.equal(temporal_shift(x, 8), several)


def test_launch_of_more_elements_than_32_bits_count() -> None:
    pytest.importorskip("triton")
    from lofi_fast.kernels.temporal_shift import kernel

    x = torch.empty(4096, 512, 112, 112, dtype=torch.uint8, device="meta", memory_format=torch.channels_last)
    launch = kernel.temporal_shift_launch(x, x, 8, 64, False)
    assert launch.grid[0] == 4096 * (-(-launch.arguments["image"] // launch.constants["BLOCK"]))
    assert launch.grid[0] < 2**31
    assert not launch.constants["WIDE"]
    huge = torch.empty(8, 2**12, 2**11, 2**9, dtype=torch.uint8, device="meta")
    wide = kernel.temporal_shift_launch(huge, huge, 8, 512, False)
    assert wide.constants["WIDE"] and wide.arguments["image"] == 2**32 and wide.arguments["moved"] == 2**29


@pytest.mark.skipif(DEVICE == "cuda", reason="counts on memory that is taken only where it is touched")
def test_offsets_above_32_bits() -> None:
    # Three frames of 2^30 bytes, of which the first block runs: the last one begins at 2^31. An offset that wraps
    # around lands in the first 2^31 bytes, which belong to no frame. y lies between the blocks of x that are read.
    pytest.importorskip("triton")
    from lofi_fast.kernels.launch import Launch
    from lofi_fast.kernels.temporal_shift import kernel

    image, num_frames = 2**30, 3
    memory = torch.frombuffer(mmap.mmap(-1, 2**31 + 4 * image, flags=UNRESERVED), dtype=torch.uint8)
    x, y = (memory[2**31 + i * 2**20 :][: 3 * image].view(3, 64, -1, 2**12) for i in range(2))
    launch = kernel.temporal_shift_launch(x, y, num_frames, 8, False)
    block = launch.constants["BLOCK"]
    for frame in range(3):
        x.view(3, image)[frame, :block] = frame + 1
    Launch(launch.kernel, (num_frames,), launch.arguments, launch.constants).run()
    assert [y.view(3, image)[frame, :block].unique().tolist() for frame in range(3)] == [[2], [3], [0]]


@pytest.mark.gpu
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "strided"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.uint8], ids=str)
def test_on_the_gpu_at_an_encoder_shape(dtype: torch.dtype, layout: str) -> None:
    x = (images((64, 64, 56, 56), layout, torch.float32) * 10).abs().to("cuda", dtype)
    kept: Any = library.forms["cuda"]["temporal_shift"]
    assert kept.startswith("Triton")
    assert torch.equal(temporal_shift(x, 8), by_concatenation(x, 8, 8))

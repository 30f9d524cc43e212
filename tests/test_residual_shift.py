from __future__ import annotations

import mmap
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from forms import LAYOUTS, assert_as_good_as, images
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from lofi_fast.kernels import library, residual_shift, residual_shift_backward, temporal_shift
from lofi_fast.kernels.residual_shift import reference

pytestmark = pytest.mark.usefixtures("poison")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
IDENTITIES = ["no-identity", "identity", "downsampled"]
DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]

UNRESERVED = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x4000  # Linux's MAP_NORESERVE: not counted until it is touched

# (N, T, C, H, W)
SHAPES = {
    "ordinary": (2, 3, 16, 3, 4),
    "one-frame": (3, 1, 16, 2, 2),
    "two-frames": (2, 2, 8, 3, 3),
    "nine-channels-odd-pixels": (1, 3, 9, 5, 7),
    "one-channel": (1, 2, 1, 3, 2),
    "one-pixel": (1, 4, 64, 1, 1),
    "several-tiles": (1, 2, 64, 3, 7),
    "no-snippets": (0, 8, 16, 4, 4),
    "no-pixels": (2, 4, 8, 0, 3),
}


@dataclass(frozen=True)
class Form:
    forward: Callable[..., tuple[Tensor, Tensor]]
    backward: Callable[..., tuple[Tensor, Tensor]]


@pytest.fixture(params=["reference", "C++", "Triton"])
def form(request: pytest.FixtureRequest) -> Form:
    """One form of both operators, for tensors on the CPU. Triton runs on a GPU where there is one."""
    if request.param == "reference":
        return Form(reference.residual_shift, reference.residual_shift_backward)
    if request.param == "C++":
        request.getfixturevalue("native")
        assert library.forms["cpu"]["residual_shift"] == library.forms["cpu"]["residual_shift_backward"] == "C++"
        return Form(torch.ops.lofi_fast.residual_shift, torch.ops.lofi_fast.residual_shift_backward)
    pytest.importorskip("triton")
    from lofi_fast.kernels.residual_shift import kernel

    def there_and_back(op: Callable[..., tuple[Tensor, Tensor]]) -> Callable[..., tuple[Tensor, Tensor]]:
        def run(*arguments: Any) -> tuple[Tensor, Tensor]:
            first, second = op(*(a.to(DEVICE) if isinstance(a, Tensor) else a for a in arguments))
            return first.cpu(), second.cpu()

        return run

    return Form(there_and_back(kernel.residual_shift), there_and_back(kernel.residual_shift_backward))


@dataclass
class Case:
    """Inputs of the forward pass and gradients of its outputs."""

    x: Tensor
    scale: Tensor
    bias: Tensor
    identity: Tensor | None
    identity_scale: Tensor | None
    identity_bias: Tensor | None
    num_frames: int
    fold: int
    grad_out: Tensor
    grad_shifted: Tensor | None

    @property
    def inputs(self) -> tuple[Any, ...]:
        affine = (self.identity_scale, self.identity_bias)
        return (self.x, self.scale, self.bias, self.identity, *affine, self.num_frames, self.fold)

    def double(self) -> Case:
        return Case(**{k: v.double() if isinstance(v, Tensor) else v for k, v in vars(self).items()})


def case(
    shape: tuple[int, ...],
    identity: str = "identity",
    layout: str = "channels_last",
    dtype: torch.dtype = torch.float32,
    fold: int | None = None,
    identity_layout: str | None = None,
) -> Case:
    num_snippets, num_frames, channels, height, width = shape
    size = (num_snippets * num_frames, channels, height, width)
    generator = torch.Generator().manual_seed(1)
    number = torch.float64 if dtype == torch.float64 else torch.float32
    scale, bias, more_scale, more_bias = torch.randn((4, channels), generator=generator, dtype=number)
    fold = channels // 8 if fold is None else fold
    return Case(
        images(size, layout, dtype),
        scale,
        bias,
        None if identity == "no-identity" else images(size, identity_layout or layout, dtype, seed=2),
        more_scale if identity == "downsampled" else None,
        more_bias if identity == "downsampled" else None,
        num_frames,
        fold,
        images(size, layout, dtype, seed=3),
        images(size, layout, dtype, seed=4) if fold else None,
    )


def plain(c: Case) -> list[Tensor]:
    """Outputs and gradients of the same computation in plain PyTorch, at the dtype of the case."""
    x = c.x.detach().clone().requires_grad_()

    def batch_norm(x: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
        # Not through torch.nn.functional, which refuses an eps of 0 from torch 2.11 on.
        mean, var = torch.zeros_like(scale), torch.ones_like(scale)
        return torch.batch_norm(x, scale, bias, mean, var, False, 0.0, 0.0, False)

    v = batch_norm(x, c.scale, c.bias) if x.numel() else x * 1
    wanted = [x]
    if c.identity is not None:
        identity = c.identity.detach().clone().requires_grad_()
        wanted.append(identity)
        if c.identity_scale is not None and x.numel():
            assert c.identity_bias is not None
            v = v + batch_norm(identity, c.identity_scale, c.identity_bias)
        else:
            v = v + identity
    out = F.relu(v)
    if not c.fold:
        return [out, *torch.autograd.grad(out, wanted, c.grad_out)]
    shifted = temporal_shift(out, c.num_frames, c.fold)
    return [out, shifted, *torch.autograd.grad((out, shifted), wanted, (c.grad_out, c.grad_shifted))]


def run(form: Form, c: Case) -> list[Tensor]:
    out, shifted = form.forward(*c.inputs)
    with_identity = c.identity is not None
    grad_x, grad_identity = form.backward(
        c.grad_out, c.grad_shifted, out, c.scale, c.identity_scale, with_identity, c.num_frames, c.fold
    )
    assert c.fold or shifted.shape == (0,)
    assert with_identity or grad_identity.shape == (0,)
    assert all(tensor.dtype == c.x.dtype for tensor in (out, shifted, grad_x, grad_identity))
    return [out, *([shifted] if c.fold else []), grad_x, *([grad_identity] if with_identity else [])]


def assert_right(got: list[Tensor], c: Case) -> None:
    for tensor, in_plain, exact in zip(got, plain(c), plain(c.double()), strict=True):
        assert tensor.stride() == torch.empty_like(c.x).stride()
        assert_as_good_as(tensor, in_plain, exact)


@pytest.mark.parametrize("identity", IDENTITIES)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_shapes(form: Form, shape: tuple[int, ...], identity: str) -> None:
    c = case(shape, identity)
    assert_right(run(form, c), c)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_layouts_and_dtypes(form: Form, dtype: torch.dtype, layout: str) -> None:
    for identity in ("identity", "downsampled"):
        c = case(SHAPES["ordinary"], identity, layout, dtype)
        assert_right(run(form, c), c)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_scale_of_none_is_one(form: Form, dtype: torch.dtype, layout: str) -> None:
    c = case(SHAPES["ordinary"], "identity", layout, dtype)
    c.scale = torch.ones_like(c.scale)
    expected = run(form, c)
    out, shifted = form.forward(c.x, None, *c.inputs[2:])
    rest = (out, None, None, True, c.num_frames, c.fold)
    got = [out, shifted, *form.backward(c.grad_out, c.grad_shifted, *rest)]
    assert all(torch.equal(one, other) for one, other in zip(got, expected, strict=True))


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize(("channels", "fold"), [(64, 8), (32, 4), (48, 2), (9, 4), (8, 0), (600, 75)])
def test_every_fold(form: Form, channels: int, fold: int, layout: str) -> None:
    c = case((2, 3, channels, 1, 2), "downsampled", layout, fold=fold)
    assert_right(run(form, c), c)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_identity_and_gradients_of_another_layout(form: Form, layout: str) -> None:
    c = case(SHAPES["ordinary"], "downsampled", "channels_last", identity_layout=layout)
    c.grad_out = images(c.x.shape, layout, seed=3)
    c.grad_shifted = torch.ones(1).expand(c.x.shape)
    assert_right(run(form, c), c)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "permuted"])
@pytest.mark.parametrize("identity", IDENTITIES)
@pytest.mark.parametrize("missing", ["grad_out", "grad_shifted", "both"])
def test_a_missing_gradient_counts_as_zero(form: Form, missing: str, identity: str, layout: str) -> None:
    c = case(SHAPES["ordinary"], identity, layout)
    out = images(c.x.shape, layout).relu()
    grads = {"grad_out": c.grad_out, "grad_shifted": c.grad_shifted}
    zeroed = dict(grads)
    for name in grads if missing == "both" else [missing]:
        grads[name], zeroed[name] = None, torch.zeros_like(out)
    rest = (out, c.scale, c.identity_scale, c.identity is not None, c.num_frames, c.fold)
    expected = reference.residual_shift_backward(*zeroed.values(), *rest)
    for got, exact in zip(form.backward(*grads.values(), *rest), expected, strict=True):
        assert torch.equal(got, exact)


def test_nan_and_infinity_pass_as_through_relu(form: Form) -> None:
    x = torch.tensor([torch.nan, torch.inf, -torch.inf, 1.0, -1.0]).view(1, 1, 1, 5)
    one, zero = torch.ones(1), torch.zeros(1)
    out, _ = form.forward(x, one, zero, None, None, None, 1, 0)
    assert torch.equal(out.nan_to_num(nan=7), torch.relu(x).nan_to_num(nan=7))
    x.requires_grad_()
    grad = torch.full_like(x, 2)
    (expected,) = torch.autograd.grad(torch.relu(x), x, grad)
    grad_x, _ = form.backward(grad, None, out.detach(), one, None, False, 1, 0)
    assert torch.equal(grad_x, expected)


def test_infinite_gradients_stay_behind_the_mask(form: Form) -> None:
    out = torch.tensor([0.0, 1.0]).view(1, 1, 1, 2)
    grad = torch.full_like(out, torch.inf)
    grad_x, _ = form.backward(grad, None, out, torch.ones(1), None, False, 1, 0)
    assert grad_x.flatten().tolist() == [0, torch.inf]


@pytest.mark.parametrize("identity", IDENTITIES)
@pytest.mark.parametrize("used", ["both", "out", "shifted"])
def test_autograd(identity: str, used: str) -> None:
    c = case(SHAPES["ordinary"], identity)
    leaves = [leaf.requires_grad_() for leaf in (c.x, c.identity) if leaf is not None]
    outputs = residual_shift(*c.inputs[:6], num_frames=c.num_frames, fold=c.fold)
    expected = reference.residual_shift(*c.inputs)
    chosen = {"both": [0, 1], "out": [0], "shifted": [1]}[used]
    grads = [(c.grad_out, c.grad_shifted)[i] for i in chosen]
    got = torch.autograd.grad([outputs[i] for i in chosen], leaves, grads)
    exact = torch.autograd.grad([expected[i] for i in chosen], leaves, grads)
    for tensor, wanted in zip((*outputs, *got), (*expected, *exact), strict=True):
        assert torch.equal(tensor, wanted)


def test_a_missing_gradient_is_not_filled_with_zeros() -> None:
    given: list[tuple[Any, ...]] = []

    class Record(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func == torch.ops.lofi_fast.residual_shift_backward.default:
                given.append(args)
            return func(*args, **(kwargs or {}))

    c = case(SHAPES["ordinary"])
    out, _ = residual_shift(c.x.requires_grad_(), c.scale, c.bias, num_frames=c.num_frames, fold=c.fold)
    with Record():
        out.backward(c.grad_out)
    assert [grad_shifted for _, grad_shifted, *_ in given] == [None]


def test_only_what_needs_a_gradient_gets_one() -> None:
    c = case(SHAPES["ordinary"], "identity")
    assert c.identity is not None
    c.identity.requires_grad_()
    out, shifted = residual_shift(*c.inputs[:6], num_frames=c.num_frames, fold=c.fold)
    assert shifted is not None
    (out.sum() + shifted.sum()).backward()
    assert c.x.grad is None and c.identity.grad is not None


def test_without_a_shifted_copy() -> None:
    c = case(SHAPES["ordinary"], "identity", fold=0)
    out, shifted = residual_shift(*c.inputs[:4])
    assert shifted is None
    assert torch.equal(out, reference.residual_shift(*c.inputs)[0])
    grad_x, grad_identity = residual_shift_backward(c.grad_out, None, out, c.scale)
    assert grad_identity is None
    assert torch.equal(grad_x, torch.where(out > 0, c.grad_out, 0) * c.scale.view(-1, 1, 1))


@pytest.mark.parametrize("identity", IDENTITIES)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_gradcheck(identity: str, layout: str) -> None:
    c = case((1, 2, 8, 1, 2), identity, layout, torch.float64)
    leaves = [leaf.requires_grad_() for leaf in (c.x, c.identity) if leaf is not None]

    def outputs(*leaves: Tensor) -> tuple[Tensor, ...]:
        x, identity = leaves if len(leaves) == 2 else (*leaves, None)
        affine = (c.identity_scale, c.identity_bias)
        return residual_shift(x, c.scale, c.bias, identity, *affine, num_frames=2, fold=1)

    assert torch.autograd.gradcheck(outputs, leaves)


@pytest.mark.parametrize("identity", IDENTITIES)
@pytest.mark.parametrize("layout", ["contiguous", "permuted"])
def test_opcheck(identity: str, layout: str) -> None:
    c = case(SHAPES["ordinary"], identity, layout)
    ops = torch.ops.lofi_fast
    rest = (c.x.relu(), c.scale, c.identity_scale, identity != "no-identity", c.num_frames, c.fold)
    torch.library.opcheck(ops.residual_shift_backward.default, (c.grad_out, c.grad_shifted, *rest))
    torch.library.opcheck(ops.residual_shift_backward.default, (None, c.grad_shifted, *rest))
    torch.library.opcheck(ops.residual_shift_backward.default, (None, c.grad_shifted, rest[0], None, *rest[2:]))
    torch.library.opcheck(ops.residual_shift.default, (*c.inputs[:6], 1, 0))
    torch.library.opcheck(ops.residual_shift.default, (c.x, None, *c.inputs[2:]))
    for leaf in (c.x, c.identity):
        if leaf is not None:
            leaf.requires_grad_()
    torch.library.opcheck(ops.residual_shift.default, c.inputs)


def test_saves_its_output_and_no_input_map() -> None:
    c = case(SHAPES["ordinary"], "downsampled")
    assert c.identity is not None and c.identity_scale is not None
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(saved.append, lambda nothing: nothing):
        out, _ = residual_shift(
            c.x.requires_grad_(), *c.inputs[1:3], c.identity.requires_grad_(), *c.inputs[4:6], num_frames=3, fold=2
        )
    assert [t.data_ptr() for t in saved] == [t.data_ptr() for t in (out, c.scale, c.identity_scale)]


def test_has_no_second_derivative_and_says_so() -> None:
    c = case(SHAPES["ordinary"])
    x = c.x.requires_grad_()
    out, _ = residual_shift(x, c.scale, c.bias)
    (grad,) = torch.autograd.grad(out, x, c.grad_out.requires_grad_(), create_graph=True)
    with pytest.raises(NotImplementedError, match="residual_shift"):
        grad.sum().backward()


def _numbers(**changes: Any) -> dict[str, Any]:
    features = torch.zeros(8, 16, 2, 2)
    numbers = torch.ones(16)
    return {
        "x": features,
        "scale": numbers,
        "bias": numbers,
        "identity": features,
        "identity_scale": numbers,
        "identity_bias": numbers,
        "num_frames": 4,
        "fold": 2,
    } | changes


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x": torch.zeros(8, 16, 2)}, "x must be .* got 3 dimensions"),
        ({"x": torch.zeros(8, 16, 2, 2, dtype=torch.int64), "identity": None}, "floating point"),
        ({"num_frames": 3}, "num_frames=3"),
        ({"num_frames": 0}, "num_frames must be at least 1"),
        ({"fold": 9}, "fold=9"),
        ({"fold": -1}, "fold=-1"),
        ({"identity": torch.zeros(8, 16, 2, 3)}, "identity must be"),
        ({"identity": torch.zeros(8, 16, 2, 2, dtype=torch.float16)}, "identity must be"),
        ({"scale": torch.ones(15)}, "scale must be"),
        ({"bias": torch.ones(16, dtype=torch.float16)}, "bias must be"),
        ({"identity_scale": torch.ones(16, 1)}, "identity_scale must be"),
        ({"identity_bias": torch.ones(16, device="meta")}, "identity_bias must be"),
        ({"identity_bias": None}, "come together"),
        ({"identity": None}, "come with an identity"),
        ({"scale": torch.ones(16, requires_grad=True)}, "scale gets no gradient"),
        ({"identity_bias": torch.ones(16, requires_grad=True)}, "identity_bias gets no gradient"),
    ],
)
def test_refuses(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"residual_shift: .*{message}"):
        if changes.get("identity", 0) is None and "x" in changes:
            changes = changes | {"identity_scale": None, "identity_bias": None}
        residual_shift(**_numbers(**changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"out": torch.zeros(8, 16, 2)}, "out must be"),
        ({"grad_out": torch.zeros(8, 16, 2, 3)}, "grad_out must be"),
        ({"grad_shifted": torch.zeros(8, 16, 2, 2, dtype=torch.float64)}, "grad_shifted must be"),
        ({"scale": torch.ones(4)}, "scale must be"),
        ({"identity_scale": torch.ones(4)}, "identity_scale must be"),
        ({"fold": 0}, "grad_shifted needs the fold"),
        ({"num_frames": 5}, "num_frames=5"),
    ],
)
def test_backward_refuses(changes: dict[str, Any], message: str) -> None:
    features = torch.zeros(8, 16, 2, 2)
    arguments = {"grad_out": features, "grad_shifted": features, "out": features, "scale": torch.ones(16)}
    with pytest.raises(ValueError, match=f"residual_shift_backward: .*{message}"):
        residual_shift_backward(**({"num_frames": 4, "fold": 2} | arguments | changes))  # type: ignore[arg-type]


def test_affine_may_require_a_gradient_where_none_is_recorded() -> None:
    with torch.no_grad():
        residual_shift(**_numbers(scale=torch.ones(16, requires_grad=True)))


@pytest.mark.usefixtures("native")
def test_wrong_arguments_do_not_reach_memory_in_cpp() -> None:
    good = list(_numbers().values())
    features, numbers = good[0], good[1]
    for index, wrong in (
        (1, numbers[:8]),
        (2, numbers.double()),
        (3, features[:4]),
        (3, features.half()),
        (6, 3),
        (7, 9),
    ):
        arguments = list(good)
        arguments[index] = wrong
        with pytest.raises(RuntimeError):
            torch.ops.lofi_fast.residual_shift(*arguments)
    good = [features, features, features, numbers, numbers, True, 4, 2]
    for index, wrong in ((0, features[:4]), (1, features.double()), (3, numbers[:8]), (4, numbers[:8]), (6, 3), (7, 9)):
        arguments = list(good)
        arguments[index] = wrong
        with pytest.raises(RuntimeError):
            torch.ops.lofi_fast.residual_shift_backward(*arguments)


@pytest.mark.usefixtures("native")
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_threads_do_not_change_the_result(layout: str) -> None:
    form = Form(torch.ops.lofi_fast.residual_shift, torch.ops.lofi_fast.residual_shift_backward)
    c = case((4, 4, 64, 24, 24), "downsampled", layout)
    several = run(form, c)
    assert_right(several, c)
    torch.set_num_threads(1)
    alone = run(form, c)
    assert all(torch.equal(a, b) for a, b in zip(several, alone, strict=True))


def test_launches_of_more_elements_than_32_bits_count() -> None:
    pytest.importorskip("triton")
    from lofi_fast.kernels.residual_shift import kernel

    numbers = torch.empty(512, device="meta")
    x = torch.empty(4096, 512, 112, 112, dtype=torch.bfloat16, device="meta", memory_format=torch.channels_last)
    forward = kernel.residual_shift_launch(x, numbers, numbers, x, None, None, x, x, 8, 64)
    backward = kernel.residual_shift_backward_launch(x, x, x, numbers, None, x, x, 8, 64)
    for launch in (forward, backward):
        image, block = launch.arguments["image"], launch.constants["BLOCK"]
        assert launch.grid[0] == 4096 * (-(-image // block)) < 2**31
        assert not launch.constants["WIDE"]
    huge = torch.empty(8, 512, 2**11, 2**12, dtype=torch.bfloat16, device="meta")
    wide = kernel.residual_shift_launch(huge, numbers, numbers, None, None, None, huge, None, 8, 0)
    assert wide.constants["WIDE"] and wide.arguments["image"] == 2**32


@pytest.mark.skipif(DEVICE == "cuda", reason="counts on memory that is taken only where it is touched")
def test_offsets_above_32_bits() -> None:
    # Three frames of 2^30 numbers, of which the first block runs: the last one begins at 2^31. An offset that wraps
    # around lands in the first 2^31 numbers, which belong to no frame. The tensors lie between each other's blocks.
    pytest.importorskip("triton")
    from lofi_fast.kernels.launch import Launch
    from lofi_fast.kernels.residual_shift import kernel

    image, num_frames = 2**30, 3
    memory = torch.frombuffer(mmap.mmap(-1, 2 * (2**31 + 4 * image), flags=UNRESERVED), dtype=torch.float16)
    x, out, shifted, grad = (memory[2**31 + i * 2**20 :][: 3 * image].view(3, 64, -1, 2**12) for i in range(4))
    numbers = torch.ones(64)
    launch = kernel.residual_shift_launch(x, numbers, numbers, None, None, None, out, shifted, num_frames, 8)
    block = launch.constants["BLOCK"]
    for frame in range(3):
        x.view(3, image)[frame, :block] = frame + 1
    Launch(launch.kernel, (num_frames,), launch.arguments, launch.constants).run()
    assert [out.view(3, image)[frame, :block].unique().tolist() for frame in range(3)] == [[2], [3], [4]]
    assert [shifted.view(3, image)[frame, :block].unique().tolist() for frame in range(3)] == [[3], [4], [0]]
    launch = kernel.residual_shift_backward_launch(None, shifted, out, numbers, None, grad, None, num_frames, 8)
    Launch(launch.kernel, (num_frames,), launch.arguments, launch.constants).run()
    assert [grad.view(3, image)[frame, :block].unique().tolist() for frame in range(3)] == [[0], [3], [4]]


@pytest.mark.gpu
@pytest.mark.parametrize("identity", IDENTITIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_on_the_gpu_at_an_encoder_shape(dtype: torch.dtype, identity: str) -> None:
    assert library.forms["cuda"]["residual_shift"].startswith("Triton")
    c = case((8, 8, 64, 56, 56), identity, dtype=dtype)
    on_gpu = Case(**{k: v.to("cuda") if isinstance(v, Tensor) else v for k, v in vars(c).items()})
    dispatched = Form(torch.ops.lofi_fast.residual_shift, torch.ops.lofi_fast.residual_shift_backward)
    assert_right(run(dispatched, on_gpu), on_gpu)

from __future__ import annotations

import math
import mmap
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from forms import assert_as_good_as
from torch import Tensor

from lofi_fast.kernels import library, temporal_roi_align
from lofi_fast.kernels.temporal_roi_align import reference

pytestmark = pytest.mark.usefixtures("poison", "one_thread")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
UNRESERVED = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x4000  # Linux's MAP_NORESERVE: not counted until it is touched
DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Form:
    """One form of the operator and its gradient, with the schemas' arguments, for tensors on the CPU."""

    forward: Callable[[Tensor, Tensor, int, int], Tensor]
    backward: Callable[[Tensor, Tensor, int, int, int, int], Tensor]


REFERENCE = Form(reference.temporal_roi_align_reference, reference.temporal_roi_align_backward_reference)


@pytest.fixture(params=["reference", "C++", "Triton", "Triton by products"])
def form(request: pytest.FixtureRequest) -> Form:
    """Triton runs on a GPU where there is one; its products are not of float64."""
    if request.param == "reference":
        return REFERENCE
    if request.param == "C++":
        request.getfixturevalue("native")
        names = ("temporal_roi_align", "temporal_roi_align_backward")
        assert [library.forms["cpu"][name] for name in names] == ["C++", "C++"]
        return Form(*(getattr(torch.ops.lofi_fast, name).default for name in names))
    pytest.importorskip("triton")
    from lofi_fast.kernels.temporal_roi_align import kernel

    by_product = request.param == "Triton by products"

    def backward(grad: Tensor, rois: Tensor, *rest: int) -> Tensor:
        grad, rois = grad.to(DEVICE), rois.to(DEVICE)
        return kernel.temporal_roi_align_backward(grad, rois, *rest, by_product and grad.dtype != torch.float64).cpu()

    return Form(lambda x, rois, *rest: kernel.temporal_roi_align(x.to(DEVICE), rois.to(DEVICE), *rest).cpu(), backward)


@dataclass(frozen=True)
class Case:
    batch: int
    channels: int
    num_snippets: int
    num_rois: int
    num_bins: int
    ratio: int = 0


CASES = {
    "ordinary": Case(2, 16, 9, 10, 4),
    "one-snippet": Case(2, 8, 1, 7, 3),
    "two-snippets": Case(1, 8, 2, 9, 4),
    "nine-channels": Case(3, 9, 6, 9, 2),
    "one-channel": Case(2, 1, 5, 6, 3),
    "several-blocks-of-channels": Case(1, 130, 5, 4, 2),
    "nine-bins": Case(1, 8, 6, 4, 9),
    "more-bins-than-snippets": Case(2, 8, 3, 4, 32),
    "one-bin": Case(1, 8, 6, 19, 1),
    "ratio-1": Case(2, 8, 6, 7, 4, 1),
    "ratio-5": Case(2, 8, 5, 6, 2, 5),
    "no-rois": Case(2, 8, 5, 0, 4),
    "no-rois-no-batch": Case(0, 8, 5, 0, 4),
    "no-channels": Case(2, 0, 5, 3, 4),
    "many-rois": Case(1, 8, 3, 70, 1),
    "many-rois-of-two": Case(2, 8, 3, 90, 1),
}
LAYOUTS = ("contiguous", "channels-inside", "window")


def laid_out(x: Tensor, layout: str) -> Tensor:
    """A copy of ``x`` (A, C, B) in memory in another way; `window` is every other element of a larger tensor of NaN."""
    if layout == "channels-inside":
        return x.transpose(1, 2).contiguous().transpose(1, 2)
    if layout == "window":
        wide = torch.full((x.shape[2] + 2, 2 * x.shape[1], x.shape[0]), torch.nan, dtype=x.dtype)
        window = wide[1:-1, ::2].permute(2, 1, 0)
        return window.copy_(x)
    return x.contiguous()


def assert_right(got: Tensor, plain: Tensor, exact: Tensor, largest: float = 1.0) -> None:
    """In float64 the plain result is the exact one, so there a bound takes its place: relative to the `largest` sum."""
    if got.dtype == torch.float64:
        torch.testing.assert_close(got, exact, rtol=0, atol=1e-13 * largest)
    else:
        assert_as_good_as(got, plain, exact)


def normal(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def case_rois(case: Case) -> Tensor:
    return random_rois(case.num_rois, max(case.batch, 1), -case.num_snippets - 2, 2 * case.num_snippets + 2)


FOUR = [4.0, 10.0, 20.0, 30.0]


def row(values: list[float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64).view(1, 1, -1)


def random_rois(count: int, batch: int, low: float, high: float) -> Tensor:
    """Ends on a grid of quarters, some reversed: every operation on them but the division by g is exact."""
    generator = torch.Generator().manual_seed(count)
    ends = torch.randint(int(4 * low), int(4 * high), (count, 2), generator=generator) / 4
    return torch.cat([torch.randint(batch, (count, 1), generator=generator).float(), ends], dim=1)


def by_loops(features: Tensor, rois: Tensor, num_bins: int, sampling_ratio: int) -> Tensor:
    """The formulas once more, one number at a time."""
    num_snippets = features.shape[2]
    out = torch.zeros(len(rois), features.shape[1], num_bins, dtype=torch.float64)
    for n, (batch, start, end) in enumerate(rois.tolist()):
        length = max(end - start, 1.0)
        width = length / num_bins
        count = sampling_ratio or math.ceil(length / num_bins)
        for p in range(num_bins):
            for i in range(count):
                t = start + p * width + (i + 0.5) * width / count
                if t < -1 or t > num_snippets:
                    continue
                if t <= 0:
                    value = features[int(batch), :, 0]
                elif math.floor(t) >= num_snippets - 1:
                    value = features[int(batch), :, -1]
                else:
                    low = math.floor(t)
                    value = (1 - (t - low)) * features[int(batch), :, low] + (t - low) * features[
                        int(batch), :, low + 1
                    ]
                out[n, :, p] += value / count
    return out


@pytest.mark.parametrize(
    ("values", "roi", "num_bins", "ratio", "expected"),
    [
        pytest.param(FOUR, (0, 2), 2, 0, [7.0, 15.0], id="one sample a bin, at 0.5 and 1.5"),
        pytest.param(FOUR, (1, 3), 1, 0, [(15 + 25) / 2], id="adaptive: two samples"),
        pytest.param(FOUR, (1, 3), 1, 1, [20.0], id="ratio 1: one sample, on a snippet"),
        pytest.param(
            FOUR, (1, 5), 1, 0, [(15 + 25 + 30 + 0) / 4], id="past the end: clamp, then zero, divisor stays 4"
        ),
        pytest.param(FOUR, (-3, 1), 1, 0, [(0 + 0 + 4 + 7) / 4], id="before the start: zero, then clamp"),
        pytest.param(FOUR, (-1.5, -0.5), 1, 0, [4.0], id="exactly -1 counts"),
        pytest.param(FOUR, (3.5, 4.5), 1, 0, [30.0], id="exactly T counts"),
        pytest.param(FOUR, (3.75, 4.75), 1, 0, [0.0], id="beyond T does not"),
        pytest.param(FOUR, (-1.75, -0.75), 1, 0, [0.0], id="before -1 does not"),
        pytest.param(FOUR, (2, 2), 1, 0, [25.0], id="empty is [2, 3]"),
        pytest.param(FOUR, (2, 0), 1, 0, [25.0], id="reversed is [2, 3]"),
        pytest.param(FOUR, (0, 1), 4, 0, [4.75, 6.25, 7.75, 9.25], id="more bins than snippets"),
        pytest.param(FOUR, (100, 120), 2, 0, [0.0, 0.0], id="far outside"),
        pytest.param([5.0], (0, 1), 2, 0, [5.0, 5.0], id="one snippet"),
    ],
)
def test_by_hand(
    values: list[float], roi: tuple[float, float], num_bins: int, ratio: int, expected: list[float]
) -> None:
    aligned = temporal_roi_align(row(values), torch.tensor([[0.0, *roi]]), num_bins, ratio)
    assert aligned.shape == (1, 1, num_bins)
    assert aligned.flatten().tolist() == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("ratio", [0, 1, 3])
@pytest.mark.parametrize("num_bins", [1, 4, 32])
@pytest.mark.parametrize("num_snippets", [1, 2, 5, 25])
def test_equals_loops(num_snippets: int, num_bins: int, ratio: int) -> None:
    features = torch.randn(2, 3, num_snippets, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    rois = random_rois(40, 2, -num_snippets - 2, 2 * num_snippets + 2)
    aligned = temporal_roi_align(features, rois, num_bins, ratio)
    # The loops have double coordinates; where one lands on a third, float32 is off by its rounding alone.
    torch.testing.assert_close(aligned, by_loops(features, rois, num_bins, ratio), rtol=0, atol=2e-5)


def test_strided_features_and_rois() -> None:
    generator = torch.Generator().manual_seed(0)
    wide = torch.randn(9, 4, 3, generator=generator, dtype=torch.float64)
    features = wide.permute(2, 1, 0)[:, :, ::2]
    rois = random_rois(7, 3, -2, 8)
    strided = rois.repeat(1, 2).t().contiguous().t()[:, :3]
    assert torch.equal(
        temporal_roi_align(features, strided, 4), temporal_roi_align(features.contiguous(), rois.contiguous(), 4)
    )


@pytest.mark.parametrize("batch", [0, 2])
def test_no_rois(batch: int) -> None:
    features = torch.randn(batch, 3, 5, requires_grad=True)
    aligned = temporal_roi_align(features, torch.zeros(0, 3), 4)
    assert aligned.shape == (0, 3, 4)
    aligned.sum().backward()
    assert features.grad is not None and not features.grad.any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_features_keep_float32_coordinates(dtype: torch.dtype) -> None:
    # 200.3 is 200.25 in float16 and 200 in bfloat16: a coordinate cast down would read another place.
    features = torch.randn(1, 2, 256, generator=torch.Generator().manual_seed(0)).to(dtype)
    rois = torch.tensor([[0.0, 200.3, 203.9]])
    aligned = temporal_roi_align(features, rois, 4)
    assert aligned.dtype == dtype
    # float32 sums, rounded once.
    assert torch.equal(aligned, temporal_roi_align(features.float(), rois, 4).to(dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_every_form(form: Form, case: Case, dtype: torch.dtype) -> None:
    rois = case_rois(case)
    shape = (case.batch, case.channels, case.num_snippets)
    # One layout a case, so that each form meets all of them.
    layout = LAYOUTS[list(CASES.values()).index(case) % 3]
    features = laid_out(normal(*shape, dtype=dtype), layout)
    grad = laid_out(normal(case.num_rois, case.channels, case.num_bins, dtype=dtype, seed=1), layout)
    forward, backward = (case.num_bins, case.ratio), (case.batch, case.num_snippets, case.num_bins, case.ratio)

    out = form.forward(features, rois, *forward)
    exact = REFERENCE.forward(features.double(), rois, *forward)
    assert_right(out, REFERENCE.forward(features, rois, *forward), exact)
    assert out.transpose(1, 2).is_contiguous()

    grad_features = form.backward(grad, rois, *backward)
    exact = REFERENCE.backward(grad.double(), rois, *backward)
    assert_right(grad_features, REFERENCE.backward(grad, rois, *backward), exact)
    assert grad_features.shape == shape and grad_features.transpose(1, 2).is_contiguous()


@pytest.mark.parametrize("case", [CASES["ordinary"], CASES["ratio-5"], CASES["no-rois"]], ids=str)
def test_the_adjoint_is_that_of_the_definition(case: Case) -> None:
    rois = case_rois(case)
    features = normal(case.batch, case.channels, case.num_snippets).requires_grad_()
    grad = normal(case.num_rois, case.channels, case.num_bins, seed=1)
    out = REFERENCE.forward(features, rois, case.num_bins, case.ratio)
    (expected,) = torch.autograd.grad(out, features, grad)
    ours = REFERENCE.backward(grad, rois, case.batch, case.num_snippets, case.num_bins, case.ratio)
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-13)


# (T, P, start, end): a sample so close to -1 or T that its side depends on the rounding of every single operation. With
# s + p*w in one rounding, or with a multiplication by 1/g for the division, one of them changes sides.
EDGES = [
    (34, 7, -15.291483879089355, 13.291481971740723),
    (34, 7, -25.351627349853516, 4.5538787841796875),
    (34, 7, -23.80463981628418, 38.446510314941406),
    (34, 7, -11.240728378295898, 37.48005676269531),
    (34, 7, -8.92584228515625, 26.114723205566406),
    (34, 7, -60.7474365234375, 10.578964233398438),
    (34, 7, 20.176223754882812, 76.36318969726562),
    (34, 7, 15.848543167114258, 59.234954833984375),
    (37, 32, -42.39977264404297, 30.52459716796875),
    (37, 32, -10.520829200744629, 60.207847595214844),
    (37, 32, 11.556783676147461, 37.40386199951172),
    (29, 4, -25.191627502441406, 0.3693370819091797),
    (39, 3, -6.419073104858398, 67.47737884521484),
]


@pytest.mark.parametrize(("num_snippets", "num_bins", "start", "end"), EDGES)
def test_samples_on_the_edge_fall_on_the_side_of_the_definition(
    form: Form, num_snippets: int, num_bins: int, start: float, end: float
) -> None:
    rois = torch.tensor([[0.0, start, end]])
    ones = torch.ones(1, 8, num_snippets)
    out = form.forward(ones, rois, num_bins, 0)
    torch.testing.assert_close(out, REFERENCE.forward(ones, rois, num_bins, 0), rtol=0, atol=1e-5)
    grad = torch.ones(1, 8, num_bins)
    ours, theirs = (f.backward(grad, rois, 1, num_snippets, num_bins, 0) for f in (form, REFERENCE))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)


def test_the_edges_are_edges() -> None:
    for num_snippets, num_bins, start, end in EDGES:
        starts, length = torch.tensor(start), torch.tensor(end) - torch.tensor(start)
        count = reference.sample_counts(length, num_bins, 0)
        bins, samples = torch.meshgrid(torch.arange(num_bins), torch.arange(int(count)), indexing="ij")
        width = length / num_bins
        fused = (starts.double() + bins.double() * width.double()).float() + (samples + 0.5) * width / count
        inverse = starts + bins * width + (samples + 0.5) * width * (1 / count.float())
        exact = reference.sample_positions(starts, length, count, bins, samples, num_bins)
        sides = [(x >= -1) & (x <= num_snippets) for x in (exact, fused, inverse)]
        assert not torch.equal(sides[0], sides[1]) or not torch.equal(sides[0], sides[2])


PTX = """
from triton import compile
from triton.backends.compiler import GPUTarget
from lofi_fast.kernels.aot import source_of
from lofi_fast.kernels.temporal_roi_align import kernel

for name, launch in kernel.examples().items():
    if "fp32 100x256 32 bins" in name:
        options = {"num_warps": launch.num_warps, "enable_fp_fusion": launch.fp_fusion}
        code = compile(source_of(launch), target=GPUTarget("cuda", 80, 32), options=options).asm["ptx"]
        print(launch.fp_fusion, "fma" in code, code.count("div.rn.f32") >= 2)
"""


def test_compiled_positions_are_not_fused() -> None:
    pytest.importorskip("triton")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    root = Path(__file__).parents[1]
    done = subprocess.run([sys.executable, "-c", PTX], env=environment, cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["False False True"] * 5


@pytest.mark.parametrize(
    ("start", "end", "num_bins"),
    [
        (-1e6, 1e6, 4),
        (-197353280.0, 21372.306640625, 1),
        (-20.0, 5e6, 1),
        (1e8, 2e8, 2),
        (-2e8, -1e8, 2),
        (3e37, -3e37, 2),
    ],
    ids=str,
)
def test_far_too_long_rois(form: Form, start: float, end: float, num_bins: int) -> None:
    """Only the samples near the features are visited, and the slack of that choice grows with the rounding."""
    if form is REFERENCE:
        pytest.skip("it visits every sample")
    num_snippets = 4
    rois = torch.tensor([[0.0, start, end]])
    length = (rois[0, 2] - rois[0, 1]).clamp(min=1)
    count = reference.sample_counts(length, num_bins, 0)
    expected = torch.zeros(num_bins, dtype=torch.float64)
    features = normal(1, 8, num_snippets)
    gradient = torch.zeros(num_snippets, dtype=torch.float64)
    for p in range(num_bins):
        left = rois[0, 1] + p * (length / num_bins)
        near = int((-left.double() / (length.double() / num_bins / count)).round())
        samples = torch.arange(min(max(near - 200, 0), int(count)), min(max(near + 240, 0), int(count)))
        positions = reference.sample_positions(rois[0, 1], length, count, torch.tensor(p), samples, num_bins)
        lower, upper, lower_weight, upper_weight = reference.linear_weights(positions, num_snippets, torch.float64)
        expected[p] = (features[0, 0, lower] * lower_weight + features[0, 0, upper] * upper_weight).sum() / count
        gradient.index_add_(0, lower, lower_weight / count).index_add_(0, upper, upper_weight / count)
    out = form.forward(features, rois, num_bins, 0)
    largest = max(expected.abs().max().item(), 1e-300)
    torch.testing.assert_close(out[0, 0], expected, rtol=0, atol=1e-12 * largest)
    ours = form.backward(torch.ones(1, 8, num_bins, dtype=torch.float64), rois, 1, num_snippets, num_bins, 0)
    torch.testing.assert_close(ours[0, 0], gradient, rtol=0, atol=1e-12 * max(gradient.max().item(), 1e-300))


def test_a_snippet_that_weighs_nothing_has_no_influence(form: Form) -> None:
    if form is REFERENCE:
        pytest.skip("it multiplies by 0")
    # One sample on snippet 2 exactly, and samples outside: neither snippet 3 nor the clamped ends are read.
    features = torch.full((1, 8, 6), torch.nan)
    features[:, :, 2] = 5.0
    assert form.forward(features, torch.tensor([[0.0, 1.5, 2.5]]), 1, 0).unique().tolist() == [5.0]
    assert not form.forward(features, torch.tensor([[0.0, -9.0, -2.0]]), 3, 0).any()


@pytest.mark.usefixtures("native")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_threads_do_not_change_the_result(dtype: torch.dtype) -> None:
    rois = random_rois(300, 3, -30, 60)
    features = normal(3, 200, 25, dtype=dtype).requires_grad_()
    grad = normal(300, 200, 4, dtype=dtype, seed=1)

    def results() -> tuple[Tensor, Tensor]:
        out = temporal_roi_align(features, rois, 4)
        return out, *torch.autograd.grad(out, features, grad)

    one = results()
    torch.set_num_threads(3)
    assert all(torch.equal(three, single) for three, single in zip(results(), one, strict=True))


@pytest.mark.usefixtures("native")
def test_wrong_arguments_do_not_reach_memory_in_cpp() -> None:
    op, adjoint = torch.ops.lofi_fast.temporal_roi_align, torch.ops.lofi_fast.temporal_roi_align_backward
    features, grad, rois = torch.zeros(2, 3, 5), torch.zeros(1, 3, 4), torch.zeros(1, 3)
    for bad in ([2.0, 0.0, 1.0], [-1.0, 0.0, 1.0], [math.nan, 0.0, 1.0], [0.0, math.nan, 1.0], [0.0, -3e38, 3e38]):
        with pytest.raises(RuntimeError, match="roi 0 must be finite"):
            op(features, torch.tensor([bad]), 4, 0)
        with pytest.raises(RuntimeError, match="roi 0 must be finite"):
            adjoint(grad, torch.tensor([bad]), 2, 5, 4, 0)
    for arguments in ((features[0], rois, 4, 0), (features, rois.double(), 4, 0), (features, rois, 0, 0),
                      (features, rois, 4, -1), (features[:, :, :0], rois, 4, 0)):  # fmt: skip
        with pytest.raises(RuntimeError, match="temporal_roi_align"):
            op(*arguments)
    for arguments in ((grad, rois, 2, 5, 3, 0), (grad[:0], rois, 2, 5, 4, 0), (grad, rois, 2, 0, 4, 0)):
        with pytest.raises(RuntimeError, match="temporal_roi_align_backward"):
            adjoint(*arguments)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_operators_are_well_formed(layout: str) -> None:
    rois = random_rois(5, 2, -3, 8)
    features = laid_out(normal(2, 9, 5), layout).requires_grad_()
    torch.library.opcheck(torch.ops.lofi_fast.temporal_roi_align.default, (features, rois, 4, 0))
    grad = laid_out(normal(5, 9, 4), layout)
    torch.library.opcheck(torch.ops.lofi_fast.temporal_roi_align_backward.default, (grad, rois, 2, 5, 4, 2))


def test_only_the_rois_are_saved() -> None:
    features = normal(2, 16, 9, dtype=torch.float32).requires_grad_()
    rois = random_rois(50, 2, -3, 12)
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        out = temporal_roi_align(features, rois, 8)
    assert [x.data_ptr() for x in saved] == [rois.data_ptr()]
    assert out.requires_grad


@pytest.mark.skipif(DEVICE == "cuda", reason="counts on memory that is taken only where it is touched")
def test_offsets_above_32_bits() -> None:
    # Rows of 2^30 channels, of which the first block runs: the third begins at 2^31 elements. An offset that wraps
    # around lands in other rows, or in memory ahead of them, which holds zeros.
    pytest.importorskip("triton")
    from lofi_fast.kernels.launch import Launch
    from lofi_fast.kernels.temporal_roi_align import kernel, product

    channels, block = 2**30, 128
    memory = torch.frombuffer(mmap.mmap(-1, 18 * 2**31, flags=UNRESERVED), dtype=torch.float16)
    x_BTC, y_RPC = (memory[first * channels :][: 8 * channels] for first in (2, 10))

    def start(launch: Launch, programs: int) -> None:
        Launch(launch.kernel, (programs, 1), launch.arguments, launch.constants).run()

    x_BTC = x_BTC.view(2, 4, channels)
    x_BTC[:, :, :block] = torch.arange(8.0).view(2, 4, 1)
    rois = torch.tensor([[0.0, 0.0, 1.0], [0.0, 1.0, 2.0], [0.0, 2.5, 3.5], [1.0, 2.5, 3.5]])
    start(kernel.align_launch(x_BTC, rois, y_RPC[: 4 * channels].view(4, 1, channels), 0), 4)
    assert y_RPC.view(8, channels)[:4, :block].unique(dim=1).tolist() == [[0.5], [1.5], [3.0], [7.0]]

    order, offsets = torch.arange(4), torch.tensor([0, 3, 4])
    start(kernel.align_backward_launch(y_RPC[: 4 * channels].view(4, 1, channels), rois, order, offsets, x_BTC, 0), 8)
    expected = [0.25, 1, 0.75, 3, 0, 0, 0, 7]
    assert x_BTC[:, :, :block].flatten(0, 1).unique(dim=1).flatten().tolist() == expected
    x_BTC[:, :, :block], block = 0, product.BLOCK
    y_RPC = y_RPC[: 4 * channels].view(4, 1, channels)
    start(kernel.align_backward_launch(y_RPC, rois, order, offsets, x_BTC, 0, by_product=True), 2)
    assert x_BTC[:, :, :block].flatten(0, 1).unique(dim=1).flatten().tolist() == expected


def test_launch_of_more_elements_than_32_bits_count() -> None:
    pytest.importorskip("triton")
    from lofi_fast.kernels.temporal_roi_align import kernel

    features = torch.empty(64, 2000, 256, dtype=torch.float16, device="meta")
    rois = torch.empty(64 * 5050, 3, device="meta")
    out = torch.empty(64 * 5050, 32, 256, dtype=torch.float16, device="meta")
    assert out.numel() > 2**31
    assert kernel.align_launch(features, rois, out, 0).grid == (64 * 5050 * 4, 2)
    indices = torch.empty(64 * 5050, dtype=torch.int64, device="meta")
    launch = kernel.align_backward_launch(out, rois, indices, indices[:65], features, 0)
    assert launch.grid == (64 * 2000, 2)
    launch = kernel.align_backward_launch(out, rois, indices, indices[:65], features, 0, by_product=True)
    assert launch.grid == (64 * 16, 4)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_on_the_gpu_at_proposals(dtype: torch.dtype) -> None:
    d, s = torch.nonzero(torch.ones(100, 100).tril().flip(0)).float().unbind(1)
    rois = torch.stack([torch.zeros_like(d), s - 0.5 * (d + 1), s + d + 0.5 * (d + 1)], dim=1).cuda()
    features = normal(1, 256, 100, dtype=dtype).cuda().requires_grad_()
    assert library.forms["cuda"]["temporal_roi_align"].startswith("Triton")
    out = temporal_roi_align(features, rois, 4)
    exact = REFERENCE.forward(features.detach().double(), rois, 4, 0)
    assert_right(out, REFERENCE.forward(features.detach(), rois, 4, 0), exact)
    grad = normal(*out.shape, dtype=dtype, seed=1).cuda()
    arguments = (rois, 1, 100, 4, 0)
    (first,), (second,) = (torch.autograd.grad(out, features, grad, retain_graph=True) for _ in range(2))
    assert torch.equal(first, second)
    # Each is a sum over thousands of ROIs, of values around 10.
    exact = REFERENCE.backward(grad.double(), *arguments)
    assert_right(first, REFERENCE.backward(grad, *arguments), exact, exact.abs().max().item())


@pytest.mark.gpu
@pytest.mark.parametrize("batch", [1, 3])
def test_on_the_gpu_the_sum_over_many_rois_is_divided(batch: int) -> None:
    rois = random_rois(3000, batch, -4, 14).cuda()
    grad = normal(3000, 130, 4, dtype=torch.float32).cuda()
    arguments = (rois, batch, 10, 4, 0)
    first, second = (torch.ops.lofi_fast.temporal_roi_align_backward(grad, *arguments) for _ in range(2))
    assert torch.equal(first, second)
    assert_right(first, REFERENCE.backward(grad, *arguments), REFERENCE.backward(grad.double(), *arguments))


@pytest.mark.gpu
def test_on_the_gpu_rois_are_checked_once_and_again_when_they_change() -> None:
    features = normal(1, 64, 50, dtype=torch.float32).cuda().requires_grad_()
    rois = random_rois(500, 1, -4, 54).cuda()
    grad = torch.ones_like(temporal_roi_align(features, rois, 4))
    torch.autograd.grad(temporal_roi_align(features, rois, 4), features, grad)
    torch.cuda.set_sync_debug_mode("error")  # whatever waits for the device raises
    try:
        torch.autograd.grad(temporal_roi_align(features, rois, 4), features, grad)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    rois[7, 1] = math.nan
    with pytest.raises(ValueError, match="finite"):
        temporal_roi_align(features, rois, 4)
    rois[7] = torch.tensor([1.0, 0.0, 3.0])
    with pytest.raises(ValueError, match="batch index"):
        temporal_roi_align(features, rois, 4)
    rois[7, 0] = 0
    assert temporal_roi_align(features, rois, 4).isfinite().all()


def test_gradcheck() -> None:
    features = torch.randn(2, 2, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64, requires_grad=True)
    rois = random_rois(6, 2, -3, 8)
    assert torch.autograd.gradcheck(lambda x: temporal_roi_align(x, rois, 3), features)


def test_a_snippet_outside_every_sample_has_no_influence() -> None:
    features = torch.zeros(1, 1, 8)
    features[..., 6] = math.nan
    assert torch.isfinite(temporal_roi_align(features, torch.tensor([[0.0, 1.0, 4.0]]), 4)).all()


@pytest.mark.parametrize(
    ("features", "rois", "num_bins", "ratio", "message"),
    [
        (torch.zeros(1, 2), torch.zeros(1, 3), 4, 0, "features must be floating point"),
        (torch.zeros(1, 2, 3, dtype=torch.int64), torch.zeros(1, 3), 4, 0, "features must be floating point"),
        (torch.zeros(1, 2, 0), torch.zeros(1, 3), 4, 0, "at least one snippet"),
        (torch.zeros(1, 2, 3), torch.zeros(1, 2), 4, 0, "rois must be float32"),
        (torch.zeros(1, 2, 3), torch.zeros(1, 3, dtype=torch.float16), 4, 0, "rois must be float32"),
        (torch.zeros(1, 2, 3), torch.zeros(1, 3), 0, 0, "num_bins"),
        (torch.zeros(1, 2, 3), torch.zeros(1, 3), 4, -1, "sampling_ratio"),
        (torch.zeros(1, 2, 3), torch.tensor([[1.0, 0.0, 1.0]]), 4, 0, r"batch index in \[0, 1\)"),
        (torch.zeros(1, 2, 3), torch.tensor([[-1.0, 0.0, 1.0]]), 4, 0, r"batch index in \[0, 1\)"),
        (torch.zeros(1, 2, 3), torch.tensor([[0.0, math.nan, 1.0]]), 4, 0, "finite"),
        (torch.zeros(1, 2, 3), torch.tensor([[0.0, 0.0, math.inf]]), 4, 0, "finite"),
        (torch.zeros(1, 2, 3), torch.tensor([[0.0, -3e38, 3e38]]), 4, 0, "finite"),
        (torch.zeros(1, 2, 3), torch.zeros(1, 3, device="meta"), 4, 0, "rois are on meta"),
    ],
)
def test_refuses(features: Tensor, rois: Tensor, num_bins: int, ratio: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        temporal_roi_align(features, rois, num_bins, ratio)


@pytest.mark.parametrize("ratio", [0, 2])
@pytest.mark.parametrize("num_bins", [1, 4, 32])
def test_equals_torchvision(num_bins: int, ratio: int) -> None:
    ops = pytest.importorskip("torchvision.ops")
    features = torch.randn(2, 3, 25, generator=torch.Generator().manual_seed(0))
    rois = random_rois(60, 2, -30, 60)
    # torchvision's boxes are (b, x1, y1, x2, y2); ours run along y, over one column.
    zero = torch.zeros(len(rois), 1)
    boxes = torch.cat([rois[:, :1], zero, rois[:, 1:2], zero, rois[:, 2:]], dim=1)
    # The single column is sampled at 0.5/g <= 1 whatever g is, which clamps to it.
    expected = ops.roi_align(features[..., None], boxes, (num_bins, 1), 1.0, ratio, aligned=False)[..., 0]
    torch.testing.assert_close(temporal_roi_align(features, rois, num_bins, ratio), expected, rtol=0, atol=1e-5)

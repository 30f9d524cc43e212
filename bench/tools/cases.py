"""What `python -m bench ops` measures: every operator at the encoder's and the head's shapes, beside its peers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cache, partial
from itertools import chain
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.peers.align import (
    CHUNK,
    AlignedByProducts,
    DenseSampling,
    Materialised,
    ProjectedCsr,
    batched_rois,
    by_products,
    sampling_matrix,
)
from bench.peers.blocks import eager_block_end, eager_stem, eager_stem_input, frozen_norm
from bench.peers.shift import published_shift
from bench.peers.soft_nms import published_soft_nms
from bench.tools.dtypes import DTYPES, half_of
from bench.tools.gate import check_close, check_copies
from lofi_fast.kernels import (
    align_linear_sum,
    conv3x3,
    dequantize,
    proposal_grid,
    quantize,
    soft_nms,
    strided_conv,
    temporal_roi_align,
    temporal_shift,
)
from lofi_fast.kernels.align_linear import reference as align_linear_reference
from lofi_fast.kernels.align_linear.sampling import SparseRows, weights_of
from lofi_fast.kernels.conv3x3 import reference as conv3x3_reference
from lofi_fast.kernels.library import forms
from lofi_fast.kernels.quantize import reference as quantize_reference
from lofi_fast.kernels.residual_shift import reference as residual_shift_reference
from lofi_fast.kernels.residual_shift import residual_shift
from lofi_fast.kernels.soft_nms import reference as soft_nms_reference
from lofi_fast.kernels.stem import reference as stem_reference
from lofi_fast.kernels.stem import stem, stem_input
from lofi_fast.kernels.strided_conv import reference as strided_conv_reference
from lofi_fast.kernels.temporal_roi_align import reference as roi_reference
from lofi_fast.kernels.temporal_shift import reference as shift_reference
from lofi_fast.memory.settle import open_meter

FRAMES, SNIPPET = 64, 8  # images of an encoder case, and frames in a snippet
STAGES = ((56, 64), (28, 128), (14, 256), (7, 512))  # side and channels of a ResNet-18's stages at 224 pixels
# The same of a ResNet-18 of half the width, at 48 pixels and less; and what halves such maps, with its taps.
SMALL_MAPS = ((12, 32), (6, 64), (3, 128), (2, 256))
HALVED = ((14, 128, 1), (4, 128, 1), (4, 128, 3), (2, 128, 3))
TINY_STAGES = ((3, 16),)
GRIDS = ((25, 25), (50, 50), (100, 100), (256, 64))  # snippets and longest duration: ActivityNet's rungs, THUMOS
CHANNELS, OUTPUTS, BINS = 256, 512, (32, 4)  # G-TAD's map: inner and context bins
SMALLER = ((64, 64, (32,)), (128, 256, (16, 4)))  # maps of smaller heads, at L=100
PROPOSALS, KEPT, SIGMA = 14_000, 100, 0.84  # of one ActivityNet video before suppression

Outputs = tuple[Tensor, ...]


@dataclass(frozen=True)
class Form:
    """A way to compute the operator: ``run`` of ``inputs``. These are the same numbers for every form of a problem, in
    the memory layout that suits the form; gradients are taken for those that require them.
    """

    run: Callable[..., Outputs]
    inputs: Outputs
    grads: Outputs = ()  # of the differentiable results, what backward starts from; empty where there is no backward


@dataclass(frozen=True)
class Problem:
    """One case on one device, ready to run. Bytes are the least that must move: inputs read, results written, once."""

    ours: Form
    peers: dict[str, Form]
    exact: Callable[[], tuple[Outputs, Outputs]]  # results and gradients by the definition, in float64
    # The same sums in plain PyTorch at our dtype, which tell what rounding error is allowed. None: the first peer's. It
    # is another than the peers' where they are matrix products, which sum in blocks and so come closer.
    plain: Callable[[], tuple[Outputs, Outputs]] | None = None
    bytes_forward: int | None = None
    bytes_backward: int | None = None
    copies: bool = False  # no arithmetic: every form gives the same bits
    roundings: float = 2  # how many times plain PyTorch's largest error ours may have
    left_out: dict[str, str] = field(default_factory=dict)  # peer -> why it does not run here


@dataclass(frozen=True)
class Case:
    """A problem that is not built yet."""

    op: str
    shape: str
    dtype: torch.dtype
    build: Callable[[torch.dtype, torch.device], Problem]
    timed: bool = True  # else only its memory is measured

    @property
    def key(self) -> tuple[str, str, str]:
        return self.op, self.shape, str(self.dtype).removeprefix("torch.")

    def problem(self, device: torch.device) -> Problem:
        torch.manual_seed(0)
        return self.build(self.dtype, device)


def forward(form: Form) -> Outputs:
    """Results alone, as in inference."""
    with torch.no_grad():
        return form.run(*form.inputs)


def forward_backward(form: Form) -> tuple[Outputs, Outputs]:
    """Results and gradients; without the latter where there is no backward."""
    if not form.grads:
        return forward(form), ()
    results = form.run(*form.inputs)
    return results, torch.autograd.grad(results, [t for t in form.inputs if t.requires_grad], form.grads)


def gate(problem: Problem) -> None:
    """Raise GateError unless every form computes the operator."""
    exact, exact_grads = problem.exact()
    plain = None if problem.plain is None else tuple(chain(*problem.plain()))
    for name, form in (*problem.peers.items(), ("ours", problem.ours)):
        found, expected = tuple(chain(*forward_backward(form))), (*exact, *exact_grads)
        if problem.copies:
            check_copies(name, found, expected)
        else:
            check_close(name, found, expected, plain if form is problem.ours else None, problem.roundings)
            plain = found if plain is None else plain


def form_of(op: str, device: torch.device) -> str:
    """What runs: "C++", "Triton 3.7.1" or "reference"; soft_nms has a CPU form alone. "PyTorch's products" alone are
    what is composed of its operators.
    """
    # Its matrix products are PyTorch's.
    operator = {"align_linear": "gather_groups" if device.type == "cpu" else "gather_rows"}.get(op, op)
    return (forms["cpu"] | forms[device.type]).get(operator, "PyTorch's products").partition(" (")[0]


def cases(device: torch.device, quick: bool = False, tiny: bool = False) -> list[Case]:
    """All of them, in the order of a training step. Quick ones are small and few, and say nothing about speed; tiny
    ones are quick ones that Triton's interpreter can run.
    """
    quick = quick or tiny
    half = DTYPES[half_of(device)]
    head = (torch.float32, half) if device.type == "cuda" else (torch.float32,)  # on a CPU the head is float32
    found: list[Case] = []

    def add(op: str, shape: str, dtypes: tuple[torch.dtype, ...], build: Any, *args: Any, timed: bool = True) -> None:
        found.extend(Case(op, shape, dtype, partial(build, *args), timed) for dtype in dtypes)

    frames, side = (8, 8) if tiny else (16, 28) if quick else (FRAMES, 224)
    stages = TINY_STAGES if tiny else STAGES[-1:] if quick else STAGES
    add("stem_input", f"{side}x{side}x3, {frames} frames", (torch.float32, half), _stem_input, frames, side)
    add("stem", f"{side // 2}x{side // 2}x64, {frames} frames", (torch.float32, half), _stem, frames, side // 2)
    for stage_side, channels in stages:
        shape = f"{stage_side}x{stage_side}x{channels}, {frames} frames"
        add("temporal_shift", shape, (torch.float32, half), _temporal_shift, frames, stage_side, channels)
        add("residual_shift", shape, (torch.float32, half), _residual_shift, frames, stage_side, channels, "")
        add("quantize", shape, (torch.float32, half), _quantize, frames, stage_side, channels)
        add("dequantize", shape, (torch.float32, half), _dequantize, frames, stage_side, channels)
    if device.type == "cpu" and not tiny:  # a GPU has its library's
        for map_side, channels in (*stages, *(SMALL_MAPS[-1:] if quick else SMALL_MAPS)):
            shape = f"{map_side}x{map_side}x{channels}, {frames} frames"
            add("conv3x3", shape, (torch.float32,), _conv3x3, frames, map_side, channels)
        for map_side, channels, taps in HALVED[-1:] if quick else HALVED:
            shape = f"{map_side}x{map_side}x{channels} to {2 * channels}, {taps}x{taps}, {frames} frames"
            add("strided_conv", shape, (torch.float32,), _strided_conv, frames, map_side, channels, taps)
    side, channels = stages[0] if quick else STAGES[1]
    for variant in ("downsample", "no shift", "no identity, no shift"):
        shape = f"{side}x{side}x{channels}, {frames} frames, {variant}"
        add("residual_shift", shape, (torch.float32, half), _residual_shift, frames, side, channels, variant)
    for length, duration in ((3, 2),) if tiny else ((12, 12),) if quick else GRIDS:
        shape = f"L={length}, D={duration}"
        add("temporal_roi_align", f"{shape}, {BINS[0]} bins", head, _temporal_roi_align, length, duration)
        add("align_linear", shape, head, _align_linear, length, duration, 1, CHANNELS, OUTPUTS, BINS)
        for way in ("forward", "backward"):
            sparse = "gather_groups" if device.type == "cpu" else "gather_rows"
            add(sparse, f"{shape}, {way}", head, _sparse_sum, length, duration, way)
    if not quick:
        for sizes in SMALLER:
            shape = f"L=100, D=100, {sizes[0]} to {sizes[1]}, {sum(sizes[2])} bins"
            add("align_linear", shape, head, _align_linear, 100, 100, 1, *sizes)
        map_sizes = (CHANNELS, OUTPUTS, BINS)
        add("align_linear", "L=100, D=100, batch 4", head, _align_linear, 100, 100, 4, *map_sizes, timed=False)
    if device.type == "cpu" and not tiny:  # it has no form for a GPU
        proposals = 500 if quick else PROPOSALS
        add("soft_nms", f"{proposals:,} proposals, {KEPT} kept", (torch.float64,), _soft_nms, proposals)
    return found


def _coarse(*shape: int, step: float = 0.25, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Images of few distinct values, channels-last. Sums and products of them have no rounding error in any dtype, so
    that no form differs from another in the sign that ReLU sees or in which pixel is a maximum.
    """
    x = torch.randint(-8, 9, shape, device=device).to(dtype) * step
    return x.contiguous(memory_format=torch.channels_last)


def _affine(channels: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """(scale, bias) for `_coarse` images: nothing that they make is 0."""
    scale = 2.0 ** torch.randint(-1, 2, (channels,), device=device)
    return scale, torch.randint(-4, 5, (channels,), device=device) / 8 + 1 / 16


def _double(definition: Callable[..., Outputs], form: Form) -> tuple[Outputs, Outputs]:
    """`forward_backward` of the definition, on the form's numbers in float64; integers stay."""
    doubles = tuple(
        t.detach().double().requires_grad_(t.requires_grad) if t.is_floating_point() else t for t in form.inputs
    )
    return forward_backward(Form(definition, doubles, tuple(grad.double() for grad in form.grads)))


def _stem_input(frames: int, side: int, dtype: torch.dtype, device: torch.device) -> Problem:
    images = torch.randint(0, 256, (frames, side, side, 3), dtype=torch.uint8, device=device)
    mean = torch.tensor([123.675, 116.28, 103.53], device=device)
    inputs = (images, mean)
    ours = Form(lambda images, mean: (stem_input(images, mean, dtype),), inputs)
    return Problem(
        ours=ours,
        peers={"PyTorch": Form(lambda images, mean: (eager_stem_input(images, mean, dtype),), inputs)},
        exact=partial(_double, lambda images, mean: (stem_reference.stem_input(images, mean, torch.float64),), ours),
        bytes_forward=images.numel() * (1 + dtype.itemsize),
    )


def _stem(frames: int, side: int, dtype: torch.dtype, device: torch.device) -> Problem:
    x = _coarse(frames, 64, side, side, device=device, dtype=dtype).requires_grad_()
    scale, bias = _affine(64, device)
    norm = frozen_norm(scale, bias)
    grad = torch.randn_like(x[:, :, ::2, ::2])

    def definition(x: Tensor) -> Outputs:
        return (stem_reference.stem(x, scale.double(), bias.double())[0],)

    ours = Form(lambda x: (stem(x, scale, bias),), (x,), (grad,))
    windows = grad.numel()
    return Problem(
        ours=ours,
        peers={"PyTorch": Form(lambda x: (eager_stem(x, norm),), (x,), (grad,))},
        exact=partial(_double, definition, ours),
        bytes_forward=x.nbytes + windows * (dtype.itemsize + 1),  # the argmax is a byte
        bytes_backward=windows * (2 * dtype.itemsize + 1) + x.nbytes,
    )


def _temporal_shift(frames: int, side: int, channels: int, dtype: torch.dtype, device: torch.device) -> Problem:
    x = torch.randn(frames, channels, side, side, device=device).to(dtype, memory_format=torch.channels_last)
    x.requires_grad_()
    fold = channels // 8
    grad = torch.randn_like(x)

    def definition(x: Tensor) -> Outputs:
        return (shift_reference.temporal_shift(x, SNIPPET, fold, adjoint=False),)

    ours = Form(lambda x: (temporal_shift(x, SNIPPET, fold),), (x,), (grad,))
    return Problem(
        ours=ours,
        peers={"PyTorch, as published": Form(lambda x: (published_shift(x, SNIPPET, fold),), (x,), (grad,))},
        exact=partial(_double, definition, ours),
        bytes_forward=2 * x.nbytes,
        bytes_backward=2 * x.nbytes,
        copies=True,
    )


def _residual_shift(
    frames: int, side: int, channels: int, variant: str, dtype: torch.dtype, device: torch.device
) -> Problem:
    x = _coarse(frames, channels, side, side, device=device, dtype=dtype).requires_grad_()
    identity = _coarse(frames, channels, side, side, device=device, dtype=dtype).requires_grad_()
    scale, bias = _affine(channels, device)
    identity_scale, identity_bias = 2.0 ** torch.randint(-1, 2, (channels,), device=device), torch.zeros_like(bias)
    fold = 0 if "no shift" in variant else channels // 8
    inputs = (x,) if "no identity" in variant else (x, identity)
    affine = (identity_scale, identity_bias) if variant == "downsample" else (None, None)
    norm = frozen_norm(scale, bias)
    identity_norm = frozen_norm(identity_scale, identity_bias) if variant == "downsample" else None

    def ours(x: Tensor, identity: Tensor | None = None) -> Outputs:
        out, shifted = residual_shift(x, scale, bias, identity, *affine, num_frames=SNIPPET, fold=fold)
        return (out,) if shifted is None else (out, shifted)

    def eager(x: Tensor, identity: Tensor | None = None) -> Outputs:
        return eager_block_end(x, norm, identity, identity_norm, SNIPPET, fold)

    def definition(x: Tensor, identity: Tensor | None = None) -> Outputs:
        scales = [None if numbers is None else numbers.double() for numbers in affine]
        out, shifted = residual_shift_reference.residual_shift(
            x, scale.double(), bias.double(), identity, scales[0], scales[1], SNIPPET, fold
        )
        return (out, shifted) if fold else (out,)

    results = 2 if fold else 1
    grads = tuple(torch.randn_like(x) for _ in range(results))
    return Problem(
        ours=Form(ours, inputs, grads),
        peers={"PyTorch": Form(eager, inputs, grads)},
        exact=partial(_double, definition, Form(ours, inputs, grads)),
        bytes_forward=(len(inputs) + results) * x.nbytes,
        bytes_backward=(results + 1 + len(inputs)) * x.nbytes,  # the gradients and out for ReLU; the gradients
    )


def _quantize(frames: int, side: int, channels: int, dtype: torch.dtype, device: torch.device) -> Problem:
    x = torch.randn(frames, channels, side, side, device=device).relu_().to(dtype, memory_format=torch.channels_last)
    return Problem(
        ours=Form(quantize, (x,)),
        peers={"PyTorch": Form(quantize_reference.quantize, (x,))},
        exact=lambda: (quantize_reference.quantize(x), ()),  # codes are those of x's dtype
        bytes_forward=x.nbytes + x.numel() + 4 * frames * channels,
    )


def _dequantize(frames: int, side: int, channels: int, dtype: torch.dtype, device: torch.device) -> Problem:
    x = torch.randn(frames, channels, side, side, device=device).relu_().to(dtype, memory_format=torch.channels_last)
    ours = Form(lambda codes, scale: (dequantize(codes, scale, dtype),), quantize(x))

    def definition(codes: Tensor, scale: Tensor) -> Outputs:
        return (quantize_reference.dequantize(codes, scale.double(), torch.float64),)

    return Problem(
        ours=ours,
        peers={
            "PyTorch": Form(lambda codes, scale: (quantize_reference.dequantize(codes, scale, dtype),), ours.inputs)
        },
        exact=partial(_double, definition, ours),
        bytes_forward=x.nbytes + x.numel() + 4 * frames * channels,
    )


def _conv3x3(frames: int, side: int, channels: int, dtype: torch.dtype, device: torch.device) -> Problem:
    x = torch.randn(frames, channels, side, side, device=device).relu_().to(dtype, memory_format=torch.channels_last)
    weight = torch.randn(channels, channels, 3, 3, device=device) / channels
    weight = weight.to(dtype, memory_format=torch.channels_last)
    inputs = (x.requires_grad_(), weight.requires_grad_())
    grads = (torch.randn_like(x),)

    def definition(x: Tensor, weight: Tensor) -> Outputs:
        return (conv3x3_reference.conv3x3(x, weight, None, relu=False),)

    ours = Form(lambda x, weight: (conv3x3(x, weight),), inputs, grads)
    return Problem(
        ours=ours,
        peers={"PyTorch": Form(lambda x, weight: (F.conv2d(x, weight, padding=1),), inputs, grads)},
        exact=partial(_double, definition, ours),
        bytes_forward=2 * x.nbytes + weight.nbytes,
        bytes_backward=3 * x.nbytes + 2 * weight.nbytes,
        roundings=32,  # Winograd's sums, and no blocks within the sum over channels
    )


def _strided_conv(
    frames: int, side: int, channels: int, taps: int, dtype: torch.dtype, device: torch.device
) -> Problem:
    x = torch.randn(frames, channels, side, side, device=device).to(dtype, memory_format=torch.channels_last)
    weight = torch.randn(2 * channels, channels, taps, taps, device=device) / channels
    weight = weight.to(dtype, memory_format=torch.channels_last)
    inputs = (x.requires_grad_(), weight.requires_grad_())
    result = torch.randn(frames, 2 * channels, (side + 1) // 2, (side + 1) // 2, device=device, dtype=dtype)
    grads = (result.to(memory_format=torch.channels_last),)

    def definition(x: Tensor, weight: Tensor) -> Outputs:
        return (strided_conv_reference.strided_conv(x, weight),)

    ours = Form(lambda x, weight: (strided_conv(x, weight),), inputs, grads)
    plain = Form(lambda x, weight: (F.conv2d(x, weight, stride=2, padding=taps // 2),), inputs, grads)
    return Problem(
        ours=ours,
        peers={"PyTorch": plain},
        exact=partial(_double, definition, ours),
        bytes_forward=x.nbytes + weight.nbytes + result.nbytes,
        bytes_backward=2 * (x.nbytes + weight.nbytes) + result.nbytes,
    )


def _temporal_roi_align(length: int, duration: int, dtype: torch.dtype, device: torch.device) -> Problem:
    grid = proposal_grid(length, duration, BINS[0])
    features = torch.randn(1, CHANNELS, length, device=device).to(dtype).requires_grad_()
    rois = batched_rois(grid, 1, device)
    grad = torch.randn(grid.num_cells, BINS[0], CHANNELS, device=device).to(dtype).transpose(1, 2)

    @cache
    def matrix(dtype: torch.dtype) -> Tensor:
        return sampling_matrix(grid, dtype).flatten(1).to(device)

    def by_matrix(features: Tensor) -> Outputs:
        aligned = torch.matmul(features[0], matrix(features.dtype))
        return (aligned.view(CHANNELS, BINS[0], grid.num_cells).permute(2, 0, 1),)

    ours = Form(lambda features: (temporal_roi_align(features, rois, BINS[0]),), (features,), (grad,))

    def plain() -> tuple[Outputs, Outputs]:
        with torch.no_grad():
            parts = [roi_reference.temporal_roi_align_reference(features, part, BINS[0]) for part in rois.split(CHUNK)]
            back = roi_reference.temporal_roi_align_backward_reference(grad, rois, 1, length, BINS[0], 0)
        return (torch.cat(parts),), (back,)

    as_rows = grad.permute(1, 2, 0).contiguous().permute(2, 0, 1)  # as the product's own result lies in memory
    peers = {"PyTorch, dense matrix": Form(by_matrix, (features,), (as_rows,))}
    if by_products(dtype, device):
        products = Form(lambda x: (AlignedByProducts.apply(x, rois, BINS[0]),), (features,), (grad,))
        peers["Triton, gradient by products"] = products
    return Problem(
        ours=ours,
        peers=peers,
        exact=partial(_double, by_matrix, ours),
        plain=plain,
        bytes_forward=features.nbytes + rois.nbytes + grad.nbytes,
        bytes_backward=grad.nbytes + rois.nbytes + features.nbytes,
    )


def _align_linear(
    length: int, duration: int, batch: int, channels: int, outputs: int, num_bins: tuple[int, ...],
    dtype: torch.dtype, device: torch.device,
) -> Problem:  # fmt: skip
    """A term for each number of bins. Inputs are features of each, weights of each, the bias."""
    grids = [proposal_grid(length, duration, bins) for bins in num_bins]
    terms = len(grids)
    features = [torch.randn(batch, channels, length, device=device).to(dtype).requires_grad_() for _ in grids]
    spread = (channels * sum(num_bins)) ** -0.5
    stored = [(spread * torch.randn(channels, bins, outputs, device=device)).to(dtype) for bins in num_bins]
    bias = torch.randn(outputs, device=device).to(dtype).requires_grad_()
    grad = torch.randn(batch, grids[0].num_cells, outputs, device=device).to(dtype).transpose(1, 2)

    def weights(*order: int) -> list[Tensor]:
        """The weights as (O, C, R), in memory as ``order`` of these."""
        back = [order.index(dim) for dim in range(3)]
        logical = [weight.permute(2, 0, 1) for weight in stored]
        return [weight.permute(order).contiguous().permute(back).requires_grad_() for weight in logical]

    @cache
    def matrices() -> list[Tensor]:
        return [align_linear_reference.proposal_weights(grid).permute(1, 2, 0).flatten(1).to(device) for grid in grids]

    @cache
    def dense() -> DenseSampling:
        return DenseSampling(grids, features[0])

    @cache
    def materialised() -> Materialised:
        return Materialised(grids, features[0])

    @cache
    def csr() -> ProjectedCsr:
        return ProjectedCsr(grids, features[0])

    def by(way: Callable[[], Callable[..., Tensor]]) -> Callable[..., Outputs]:
        return lambda *inputs: (way()(inputs[:terms], inputs[terms:-1], inputs[-1]),)

    def definition(*inputs: Tensor) -> Outputs:
        out = inputs[-1].unsqueeze(1)
        for source, matrix, part in zip(inputs[:terms], matrices(), inputs[terms:-1], strict=True):
            aligned = torch.matmul(source, matrix).view(batch, -1, grids[0].num_cells)
            out = out + torch.matmul(part.flatten(1), aligned)
        return (out,)

    def projected(*inputs: Tensor) -> Outputs:
        pairs = zip(inputs[:terms], inputs[terms:-1], strict=True)
        rows = torch.cat([torch.einsum("bcl,ocr->blro", *pair) for pair in pairs], dim=2).flatten(1, 2)
        sums = [_bags(weights_of(tuple(grids)).on(device)[0], element) for element in rows]
        return ((torch.stack(sums) + inputs[-1]).transpose(1, 2),)

    peers = {
        "materialised": Form(by(materialised), (*features, *weights(0, 2, 1), bias), (grad,)),
        "dense matrix (BMN)": Form(by(dense), (*features, *weights(0, 1, 2), bias), (grad.contiguous(),)),
    }
    if dtype == torch.float32:
        peers["CSR, projected first"] = Form(by(csr), (*features, *weights(1, 2, 0), bias), (grad,))
    left_out = {}
    # Backward holds the gradient of the product's input beside it, and convolutions copy into layouts of their own.
    needed = 2 * DenseSampling.nbytes(grids, features[0])
    available = open_meter(device).available()
    if needed > available:
        del peers["dense matrix (BMN)"]
        left_out["dense matrix (BMN)"] = f"it may need {needed / 1e9:.1f} GB, and {available / 1e9:.1f} GB are free"

    def align(features: tuple[Tensor, ...], weights: tuple[Tensor, ...], bias: Tensor) -> Tensor:
        return align_linear_sum(list(zip(features, grids, weights, strict=True)), bias)

    ours = Form(by(lambda: align), (*features, *weights(1, 2, 0), bias), (grad,))
    return Problem(
        ours=ours,
        peers=peers,
        exact=partial(_double, definition, ours),
        plain=partial(forward_backward, replace(ours, run=projected)),
        # Ours sums a row's some thousand entries in turn; on a GPU embedding_bag's backward adds them in blocks.
        roundings=4 if device.type == "cuda" else 2,
        left_out=left_out,
    )


def _sparse_sum(length: int, duration: int, way: str, dtype: torch.dtype, device: torch.device) -> Problem:
    """The sparse sum inside align_linear: over the projections forward, over the cells' gradients backward."""
    grids = tuple(proposal_grid(length, duration, bins) for bins in BINS)
    matrix, transposed = weights_of(grids).on(device)
    cells, projections = grids[0].num_cells, length * sum(BINS)
    offsets, columns, values = matrix if way == "forward" else transposed
    dense = torch.randn(1, projections if way == "forward" else cells, OUTPUTS, device=device).to(dtype)
    row_step = 1 if way == "forward" else sum(BINS)
    grouped = weights_of(grids).grouped(torch.float32)
    assert grouped is not None
    *groups, num_rows, _ = grouped[way == "backward"]

    def ours(dense: Tensor) -> Outputs:
        if dense.is_cpu:
            return (torch.ops.lofi_fast.gather_groups(dense, *groups, None, num_rows, row_step),)
        return (torch.ops.lofi_fast.gather_rows(dense, offsets, columns, values, None, row_step),)

    weights = cache(values.to)  # embedding_bag wants them in the dtype of what it sums

    def bags(dense: Tensor) -> Outputs:
        return (_bags(SparseRows(offsets, columns, weights(dense.dtype)), dense[0]).unsqueeze(0),)

    results = (len(offsets) - 1) * OUTPUTS * dtype.itemsize
    return Problem(
        ours=Form(ours, (dense,)),
        peers={"embedding_bag": Form(bags, (dense,))},
        exact=partial(_double, bags, Form(ours, (dense,))),
        bytes_forward=dense.nbytes + offsets.nbytes + columns.nbytes + values.nbytes + results,
    )


def _bags(matrix: SparseRows, dense: Tensor) -> Tensor:
    """matrix @ dense (columns, O), by PyTorch's own sparse sum."""
    return F.embedding_bag(
        matrix.columns,
        dense,
        matrix.offsets,
        mode="sum",
        per_sample_weights=matrix.values.to(dense.dtype),
        include_last_offset=True,
    )


def _soft_nms(proposals: int, dtype: torch.dtype, device: torch.device) -> Problem:
    starts, lengths, scores = torch.rand(3, proposals, dtype=dtype)
    segments = torch.stack([100 * starts, 100 * starts + 50 * lengths], dim=1)
    listed = ([(start, end) for start, end in segments.tolist()], scores.tolist())

    def published(segments: Tensor, scores: Tensor) -> Outputs:
        order, decayed = published_soft_nms(*listed, SIGMA, KEPT)
        return torch.tensor(order), torch.tensor(decayed, dtype=dtype)

    inputs = (segments, scores)
    labels = torch.zeros(proposals, dtype=torch.int64)
    return Problem(
        ours=Form(lambda segments, scores: soft_nms(segments, scores, sigma=SIGMA, max_keep=KEPT), inputs),
        peers={"Python, as published": Form(published, inputs)},
        exact=lambda: (soft_nms_reference.soft_nms(*inputs, labels, SIGMA, 0.0, 0.0, KEPT, 0.0), ()),
    )

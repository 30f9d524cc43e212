from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from lofi_fast.kernels.align_linear import (
    SamplingGrid,
    align_linear,
    align_linear_reference,
    proposal_grid,
    roi_grid,
)
from lofi_fast.kernels.temporal_roi_align import temporal_roi_align


@pytest.fixture(autouse=True)
def poison() -> Iterator[None]:
    # In this mode PyTorch fills what torch.empty returns with NaN: an element that is never written shows.
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def operands(
    batch: int, channels: int, grid: SamplingGrid, outputs: int, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(batch, channels, grid.num_snippets, generator=generator, dtype=torch.float64)
    weight = torch.randn(outputs, channels, grid.num_bins, generator=generator, dtype=torch.float64)
    bias = torch.randn(outputs, generator=generator, dtype=torch.float64)
    weight /= (channels * grid.num_bins) ** 0.5
    features, weight, bias = features.to(dtype), weight.to(dtype), bias.to(dtype)
    return features.requires_grad_(), weight.requires_grad_(), bias.requires_grad_()


@pytest.mark.parametrize("batch", [0, 1, 3])
@pytest.mark.parametrize("num_bins", [1, 4, 32])
@pytest.mark.parametrize(
    ("num_snippets", "max_duration"), [(1, 1), (2, 2), (2, 1), (5, 5), (5, 3), (5, 9), (25, 25), (25, 7)]
)
def test_equals_the_definition_with_its_gradients(
    num_snippets: int, max_duration: int, num_bins: int, batch: int
) -> None:
    grid = proposal_grid(num_snippets, max_duration, num_bins)
    inputs = operands(batch, 9, grid, 5)
    features, weight, bias = inputs
    out = align_linear(features, grid, weight, bias)
    expected = align_linear_reference(features, grid, weight, bias)
    assert out.shape == (batch, 5, grid.num_cells)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-12)
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    for ours, theirs in zip(
        torch.autograd.grad(out, inputs, grad), torch.autograd.grad(expected, inputs, grad), strict=True
    ):
        # A gradient sums over every cell: the bound is relative to the largest entry.
        largest = theirs.abs().max().item() if theirs.numel() else 0.0
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12 * max(largest, 1.0))


def test_by_hand() -> None:
    # Two snippets, one bin. Cell (0, 0) is [-0.5, 0.5], sampled at 0; (0, 1) is [0.5, 1.5], sampled at 1; (1, 0) is
    # [-1, 2], sampled at -0.5, 0.5 and 1.5: the first value, the middle, the last.
    grid = proposal_grid(2, 2, 1)
    assert grid.cells.tolist() == [[0, 0], [0, 1], [1, 0]]
    features = torch.tensor([[[2.0, 6.0]]], dtype=torch.float64)
    out = align_linear(features, grid, torch.full((1, 1, 1), 10.0, dtype=torch.float64), torch.ones(1).double())
    assert out.flatten().tolist() == pytest.approx([21.0, 61.0, 41.0], abs=1e-12)


def test_cells_are_exactly_the_valid_ones() -> None:
    grid = proposal_grid(7, 4, 2)
    assert grid.cells.tolist() == [[d, s] for d in range(4) for s in range(7) if s + d < 7]
    d, s = grid.cells.unbind(1)
    assert torch.equal(grid.rois, torch.stack([s - 0.5 * (d + 1), s + d + 0.5 * (d + 1)], dim=1))


def test_expand_changes_the_roi() -> None:
    grid = proposal_grid(6, 6, 4, expand=0.0)
    d, s = grid.cells.unbind(1)
    assert torch.equal(grid.rois, torch.stack([s, s + d], dim=1).float())
    features, weight, bias = operands(2, 3, grid, 4)
    torch.testing.assert_close(
        align_linear(features, grid, weight, bias),
        align_linear_reference(features, grid, weight, bias),
        rtol=0,
        atol=1e-12,
    )


def test_grids_are_cached_by_their_arguments() -> None:
    assert proposal_grid(6, 6, 4) is proposal_grid(6, 6, 4)
    assert proposal_grid(6, 6, 4) is not proposal_grid(6, 6, 4, expand=0.25)


@pytest.mark.parametrize("batch", [0, 2])
def test_arbitrary_rois(batch: int) -> None:
    rois = torch.tensor([[-9.0, -4.0], [-2.0, 3.3], [4.0, 1.0], [2.0, 2.0], [0.0, 4.0], [3.7, 60.1], [-50.0, 50.0]])
    for some in (rois, rois.t().contiguous().t(), rois[::2], rois[:1], rois[:0]):
        grid = roi_grid(some, 5, 3)
        inputs = operands(batch, 4, grid, 2)
        out, expected = align_linear(inputs[0], grid, *inputs[1:]), align_linear_reference(inputs[0], grid, *inputs[1:])
        torch.testing.assert_close(out, expected, rtol=0, atol=1e-12)
        grad = torch.ones_like(out)
        for ours, theirs in zip(
            torch.autograd.grad(out, inputs, grad), torch.autograd.grad(expected, inputs, grad), strict=True
        ):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-11)


def test_a_grid_does_not_follow_later_changes_of_its_rois() -> None:
    rois = torch.tensor([[0.0, 3.0]])
    grid = roi_grid(rois, 4, 2)
    rois += 1
    assert grid.rois.tolist() == [[0.0, 3.0]]


def test_two_calls_equal_one_convolution_over_concatenated_bins() -> None:
    """G-TAD: 32 inner bins of one map and 4 context bins of another, concatenated, then a 1x1 convolution."""
    inner, around = proposal_grid(6, 6, 32), proposal_grid(6, 6, 4)
    graph, weight, bias = operands(2, 8, inner, 5)
    neighbours, context_weight, _ = operands(2, 8, around, 5)
    inputs = (graph, neighbours, weight, context_weight, bias)
    batch_index = torch.arange(2.0).repeat_interleave(inner.num_cells).unsqueeze(1)
    rois = torch.cat([batch_index, inner.rois.repeat(2, 1)], dim=1)
    both = [temporal_roi_align(graph, rois, 32), temporal_roi_align(neighbours.flip(2), rois, 4)]
    concatenated = torch.cat([x.flatten(1) for x in both], dim=1).view(2, inner.num_cells, -1).transpose(1, 2)
    kernel = torch.cat([weight.flatten(1), context_weight.flatten(1)], dim=1)
    expected = torch.nn.functional.conv1d(concatenated, kernel.unsqueeze(-1), bias)
    out = align_linear(graph, inner, weight, bias) + align_linear(neighbours.flip(2), around, context_weight)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-12)
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    for ours, theirs in zip(
        torch.autograd.grad(out, inputs, grad), torch.autograd.grad(expected, inputs, grad), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-11)


def test_gradcheck() -> None:
    grid = proposal_grid(4, 3, 3)
    features, weight, bias = operands(2, 3, grid, 2)
    assert torch.autograd.gradcheck(
        lambda *tensors: align_linear(tensors[0], grid, *tensors[1:]), (features, weight, bias)
    )
    assert torch.autograd.gradcheck(lambda *tensors: align_linear(tensors[0], grid, tensors[1]), (features, weight))


@pytest.mark.parametrize("needed", [(0,), (1,), (2,), (0, 2)], ids=str)
def test_only_the_gradients_asked_for(needed: tuple[int, ...]) -> None:
    grid = proposal_grid(5, 5, 4)
    inputs = [x.detach().requires_grad_(index in needed) for index, x in enumerate(operands(2, 3, grid, 4))]
    expected = align_linear_reference(inputs[0], grid, *inputs[1:]).square().sum()
    loss = align_linear(inputs[0], grid, *inputs[1:]).square().sum()
    wanted = [inputs[index] for index in needed]
    for ours, theirs in zip(torch.autograd.grad(loss, wanted), torch.autograd.grad(expected, wanted), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-10)


def test_strided_inputs() -> None:
    grid = proposal_grid(6, 6, 4)
    features, weight, bias = (x.detach() for x in operands(2, 3, grid, 5))
    expected = align_linear(features, grid, weight, bias)
    cbo = weight.permute(1, 2, 0).contiguous().permute(2, 0, 1)
    every_other = torch.stack([features, features + 1], dim=-1).flatten(2)[:, :, ::2]
    for x in (
        features.transpose(1, 2).contiguous().transpose(1, 2),
        every_other,
        features.permute(2, 1, 0).contiguous().permute(2, 1, 0),
    ):
        for w in (weight, cbo, weight.flip(0).flip(0).transpose(0, 1).contiguous().transpose(0, 1)):
            torch.testing.assert_close(align_linear(x, grid, w, bias), expected, rtol=0, atol=1e-13)
    # The gradient arrives strided too: a sum over one output hands back an expanded zero-stride tensor.
    inputs = operands(2, 3, grid, 5)
    (expanded,) = torch.autograd.grad(align_linear(inputs[0], grid, *inputs[1:]).sum(), inputs[:1])
    (expected_grad,) = torch.autograd.grad(align_linear_reference(inputs[0], grid, *inputs[1:]).sum(), inputs[:1])
    torch.testing.assert_close(expanded, expected_grad, rtol=0, atol=1e-11)


def test_layout_serves_the_convolution_that_follows() -> None:
    grid = proposal_grid(6, 6, 4)
    features, weight, bias = operands(2, 3, grid, 5)
    assert align_linear(features, grid, weight, bias).transpose(1, 2).is_contiguous()


def test_backward_is_bitwise_repeatable() -> None:
    grid = proposal_grid(25, 25, 4)
    inputs = operands(2, 16, grid, 8, torch.float32)

    def gradients() -> tuple[Tensor, ...]:
        return torch.autograd.grad(align_linear(inputs[0], grid, *inputs[1:]).square().sum(), inputs)

    assert all(torch.equal(first, second) for first, second in zip(gradients(), gradients(), strict=True))


@pytest.mark.parametrize("mode", ["float32", "bfloat16", "autocast"])
def test_no_less_exact_than_plain_pytorch(mode: str) -> None:
    grid = proposal_grid(25, 25, 32)
    dtype = torch.bfloat16 if mode == "bfloat16" else torch.float32
    inputs = operands(2, 64, grid, 16, dtype)
    exact_inputs = [x.detach().double().requires_grad_() for x in inputs]
    exact_out = align_linear_reference(exact_inputs[0], grid, *exact_inputs[1:])
    grad = torch.randn(exact_out.shape, generator=torch.Generator().manual_seed(1)).to(torch.bfloat16)
    exact = (exact_out, *torch.autograd.grad(exact_out, exact_inputs, grad.double()))

    results = []
    for function in (align_linear, align_linear_reference):
        with torch.autocast("cpu", torch.bfloat16, enabled=mode == "autocast"):
            out = function(inputs[0], grid, *inputs[1:])
        assert function is align_linear_reference or out.dtype == (dtype if mode != "autocast" else torch.bfloat16)
        gradients = torch.autograd.grad(out, inputs, grad.to(out.dtype))
        assert [x.dtype for x in gradients] == [dtype] * 3
        results.append((out, *gradients))
    for name, ours, plain, truth in zip(("out", "features", "weight", "bias"), *results, exact, strict=True):
        error, allowed = ((x.double() - truth).norm().item() for x in (ours, plain))
        assert error <= 2 * allowed, f"{name}: error {error:.3e}, plain PyTorch {allowed:.3e}"


def test_autocast_leaves_float64_alone() -> None:
    grid = proposal_grid(5, 5, 4)
    features, weight, bias = operands(1, 3, grid, 4)
    with torch.autocast("cpu", torch.bfloat16):
        out = align_linear(features, grid, weight, bias)
    assert torch.equal(out, align_linear(features, grid, weight, bias))


def test_a_grid_first_used_in_inference_mode_still_trains() -> None:
    with torch.inference_mode():
        grid = proposal_grid(9, 8, 3)
        features, weight, bias = operands(1, 3, grid, 4, torch.float32)
        align_linear(features, grid, weight, bias)
    assert not grid.cells.is_inference() and not grid.rois.is_inference()
    for matrix in grid.matrices(torch.device("cpu")):
        assert not any(part.is_inference() for part in matrix)
    inputs = operands(1, 3, grid, 4)
    torch.autograd.grad(align_linear(inputs[0], grid, *inputs[1:]).sum(), inputs)


def test_weights_of_a_cell_inside_the_clip_sum_to_one_in_each_bin() -> None:
    grid = roi_grid(torch.tensor([[0.0, 9.0], [-8.0, 30.0]]), 10, 4)
    (offsets, columns, values), _ = grid.matrices(torch.device("cpu"), torch.float64)
    sums = torch.zeros(4, dtype=torch.float64).index_add_(0, columns[: offsets[1]].long() % 4, values[: offsets[1]])
    torch.testing.assert_close(sums, torch.ones(4, dtype=torch.float64))
    assert values[offsets[1] :].sum().item() < 4


GRID = proposal_grid(5, 5, 4)


@pytest.mark.parametrize(
    ("features", "weight", "bias", "message"),
    [
        (torch.zeros(1, 5), torch.zeros(2, 3, 4), None, "features must be"),
        (torch.zeros(1, 3, 5, dtype=torch.int64), torch.zeros(2, 3, 4), None, "features must be"),
        (torch.zeros(1, 3, 6), torch.zeros(2, 3, 4), None, "features have 6 snippets, the grid 5"),
        (torch.zeros(1, 3, 5), torch.zeros(2, 3, 5), None, r"weight must be \(O, 3, 4\)"),
        (torch.zeros(1, 3, 5), torch.zeros(2, 4, 4), None, r"weight must be \(O, 3, 4\)"),
        (torch.zeros(1, 3, 5), torch.zeros(2, 3, 4), torch.zeros(3), r"bias must be \(2,\)"),
        (torch.zeros(1, 3, 5), torch.zeros(2, 3, 4).double(), None, "autocast"),
        (torch.zeros(1, 3, 5), torch.zeros(2, 3, 4, device="meta"), None, "on the device of features"),
    ],
)
def test_refuses(features: Tensor, weight: Tensor, bias: Tensor | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        align_linear(features, GRID, weight, bias)


def test_grids_refuse() -> None:
    with pytest.raises(ValueError, match="num_snippets"):
        proposal_grid(0, 1, 4)
    with pytest.raises(ValueError, match="max_duration"):
        proposal_grid(4, 0, 4)
    with pytest.raises(ValueError, match="num_bins"):
        proposal_grid(4, 4, 0)
    with pytest.raises(ValueError, match="expand"):
        proposal_grid(4, 4, 4, expand=-1.0)
    with pytest.raises(ValueError, match="float32"):
        roi_grid(torch.zeros(3, 2, dtype=torch.float16), 4, 4)
    with pytest.raises(ValueError, match="finite"):
        roi_grid(torch.full((1, 2), torch.nan), 4, 4)
    with pytest.raises(ValueError, match="dtype"):
        GRID.matrices(torch.device("cpu"), torch.bfloat16)

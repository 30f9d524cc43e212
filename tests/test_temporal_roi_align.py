from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from lofi_fast.kernels.temporal_roi_align import temporal_roi_align

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

"""G-TAD against its paper written out: neighbours by sorting, SGAlign materialised, sums in the order they are told."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Literal

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lofi_fast.config import HeadConfig
from lofi_fast.data.dataset import Jitter, jitter_pixels
from lofi_fast.encoder.resnet import TSMResNet
from lofi_fast.head.dropout import video_dropout
from lofi_fast.head.gtad import GTAD, GCNeXt, GroupedPointwise, gather_neighbours, nearest_neighbours
from lofi_fast.head.gtad_head import GTADHead
from lofi_fast.head.loss import Counts, tal_loss
from lofi_fast.head.maps import HeadOutput
from lofi_fast.head.targets import Targets, make_targets, valid_cells
from lofi_fast.kernels import proposal_grid

pytestmark = pytest.mark.usefixtures("poison", "one_thread")

SMALL = HeadConfig(hidden=16, groups=4, inner_bins=8, context_bins=4, map_channels=16, class_bins=4)
THUMOS = replace(SMALL, inner_bins=4, max_duration=5, middle_kernel=3)
FEATURES, CLASSES, FULL = 12, 3, 10


def fill(module: torch.nn.Module, seed: int = 0) -> None:
    """The same numbers whatever the initialisation, the torch version and the order of modules."""
    with torch.no_grad():
        for key, value in sorted(module.state_dict().items()):
            random = np.random.RandomState([seed, *key.encode()])
            scale = (2 / value[0].numel()) ** 0.5 if value.dim() > 1 else 0.3
            value.copy_(torch.from_numpy(random.standard_normal(value.shape) * scale))


def gtad(config: HeadConfig = SMALL) -> GTAD:
    head = GTAD(config, FEATURES, CLASSES, FULL)
    fill(head)
    return head.double().eval()


def features(batch: int, length: int, channels: int = FEATURES, seed: int = 0) -> Tensor:
    return torch.from_numpy(np.random.RandomState(seed).standard_normal((batch, channels, length)))


def test_neighbours_by_hand() -> None:
    # Snippets on a line at 0, 1, 3, 7: each snippet's three nearest, itself first.
    x = torch.tensor([[[0.0, 1.0, 3.0, 7.0]]])
    assert nearest_neighbours(x)[0].tolist() == [[0, 1, 2], [1, 0, 2], [2, 1, 0], [3, 2, 1]]
    gathered = gather_neighbours(x, nearest_neighbours(x))
    assert gathered.shape == (1, 1, 4, 3)
    assert gathered[0, 0].tolist() == [[0, 1, 3], [1, 0, 3], [3, 1, 0], [7, 3, 1]]


def test_distance_is_euclidean_over_all_channels() -> None:
    # From (0, 0): (3, 0) is at 3, (2, 2) at 2.8, (0, 4) at 4; by the sum of differences (2, 2) would come second.
    x = torch.tensor([[[0.0, 3.0, 2.0, 0.0], [0.0, 0.0, 2.0, 4.0]]])
    assert nearest_neighbours(x)[0, 0].tolist() == [0, 2, 1]


def test_large_features_lose_no_precision_to_the_distance() -> None:
    # |a|^2 + |b|^2 - 2ab would be noise here: squares are 1e8 and the differences 1.
    x = torch.tensor([[[10000.0, 10001.0, 10003.0, 10006.0, 10010.0]]])
    assert nearest_neighbours(x)[0].tolist() == [[0, 1, 2], [1, 0, 2], [2, 1, 0], [3, 2, 4], [4, 3, 2]]


def test_fewer_snippets_than_neighbours() -> None:
    assert nearest_neighbours(features(1, 2)).shape == (1, 2, 2)
    assert nearest_neighbours(features(1, 1)).tolist() == [[[0]]]


def neighbours_by_sorting(x_CL: np.ndarray) -> list[list[int]]:
    length = x_CL.shape[1]
    distance = [[float(np.sqrt(((x_CL[:, i] - x_CL[:, j]) ** 2).sum())) for j in range(length)] for i in range(length)]
    return [sorted(range(length), key=lambda j, row=row: row[j])[:3] for row in distance]


def grouped_1x1(x_C: np.ndarray, weight: np.ndarray, bias: np.ndarray, groups: int) -> np.ndarray:
    """A 1x1 convolution on one column, group by group."""
    parts = np.split(x_C, groups)
    return np.concatenate([w @ x for w, x in zip(np.split(weight, groups), parts, strict=True)]) + bias


@pytest.mark.parametrize("batch", [0, 1, 3])
@pytest.mark.parametrize(("groups", "into", "out"), [(1, 3, 5), (4, 8, 12), (6, 6, 6)])
def test_grouped_pointwise_is_the_grouped_convolution(batch: int, groups: int, into: int, out: int) -> None:
    layer = GroupedPointwise(into, out, groups).double()
    x = torch.randn(batch, 5, 3, into, dtype=torch.float64).permute(0, 3, 1, 2).requires_grad_()  # in another order
    found = layer(x)
    expected = F.conv2d(x, layer.weight, layer.bias, groups=groups)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    inputs, grad = (x, layer.weight, layer.bias), torch.randn_like(expected)
    for ours, theirs in zip(
        torch.autograd.grad(found, inputs, grad), torch.autograd.grad(expected, inputs, grad), strict=True
    ):
        assert ours is not None
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_grouped_pointwise_keeps_what_a_convolution_keeps(dtype: torch.dtype) -> None:
    layer, x = GroupedPointwise(8, 8, 4), torch.randn(2, 8, 5, 3, requires_grad=True)

    def kept(run: Callable[[Tensor], Tensor]) -> list[tuple[tuple[int, ...], str]]:
        saved: list[tuple[tuple[int, ...], str]] = []
        with (
            torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16),
            torch.autograd.graph.saved_tensors_hooks(
                lambda x: saved.append((tuple(x.shape), str(x.dtype))) or x, lambda x: x
            ),
        ):
            out = run(x)
        assert out.dtype == dtype
        out.sum().backward()
        assert layer.weight.grad is not None and layer.weight.grad.dtype == torch.float32
        return sorted(saved)

    assert kept(layer) == kept(lambda x: F.conv2d(x, layer.weight, layer.bias, groups=4))


def literal_gcnext(block: GCNeXt, x_CL: np.ndarray, groups: int) -> np.ndarray:
    """GCNeXt as published, for one window: concatenate (neighbour, self), then 1x1, grouped 1x1, 1x1, maximum."""
    state = {key: value.double().numpy() for key, value in block.state_dict().items()}
    channels, length = x_CL.shape
    first = np.concatenate([state["neighbour.weight"][:, :, 0], state["itself.weight"][:, :, 0]], axis=1)
    assert first.shape == (channels // 2, 2 * channels)
    semantic = np.full((channels, length), -np.inf)
    for i, nearest in enumerate(neighbours_by_sorting(x_CL)):
        for j in nearest:
            edge = first @ np.concatenate([x_CL[:, j], x_CL[:, i]]) + state["neighbour.bias"]
            edge = np.maximum(edge, 0)
            edge = grouped_1x1(edge, state["semantic.1.weight"][:, :, 0, 0], state["semantic.1.bias"], groups)
            edge = state["semantic.3.weight"][:, :, 0, 0] @ np.maximum(edge, 0) + state["semantic.3.bias"]
            semantic[:, i] = np.maximum(semantic[:, i], edge)

    narrow = np.maximum(state["temporal.0.weight"][:, :, 0] @ x_CL + state["temporal.0.bias"][:, None], 0)
    padded = np.pad(narrow, ((0, 0), (1, 1)))
    middle = np.stack(
        [
            sum(
                grouped_1x1(padded[:, i + tap], state["temporal.2.weight"][:, :, tap], np.zeros(len(narrow)), groups)
                for tap in range(3)
            )
            + state["temporal.2.bias"]
            for i in range(length)
        ],
        axis=1,
    )
    temporal = state["temporal.4.weight"][:, :, 0] @ np.maximum(middle, 0) + state["temporal.4.bias"][:, None]
    return np.maximum(temporal + x_CL + semantic, 0)


@pytest.mark.parametrize("length", [7, 3, 2])
def test_gcnext_equals_the_published_form(length: int) -> None:
    block = GCNeXt(16, 4)
    fill(block)
    block = block.double()
    x = features(2, length, channels=16)
    out, index = block(x)
    assert index.shape == (2, length, min(3, length))
    for b in range(2):
        np.testing.assert_allclose(out[b].detach().numpy(), literal_gcnext(block, x[b].numpy(), 4), rtol=0, atol=1e-10)


def interpolate(x_CL: np.ndarray, t: float) -> np.ndarray:
    """I(x, t) of Align1D."""
    last = x_CL.shape[1] - 1
    if t < -1 or t > last + 1:
        return np.zeros(len(x_CL))
    if t <= 0:
        return x_CL[:, 0]
    if math.floor(t) >= last:
        return x_CL[:, last]
    low = math.floor(t)
    return (1 - (t - low)) * x_CL[:, low] + (t - low) * x_CL[:, low + 1]


def align(x_CL: np.ndarray, start: float, end: float, bins: int) -> np.ndarray:
    """Align1D of one ROI (C, bins), adaptive sampling."""
    height = max(end - start, 1.0)
    samples = math.ceil(height / bins)
    width = height / bins
    places = [[start + p * width + (i + 0.5) * width / samples for i in range(samples)] for p in range(bins)]
    return np.stack([sum(interpolate(x_CL, t) for t in row) / samples for row in places], axis=1)


def relu_1x1(x: np.ndarray, conv: torch.nn.Conv2d) -> np.ndarray:
    weight, bias = conv.weight.detach().numpy()[:, :, 0, 0], conv.bias.detach().numpy()
    return np.maximum(weight @ x + bias, 0)


def literal_head(head: GTAD, x_CL: np.ndarray) -> dict[str, np.ndarray]:
    """The whole head for one window, as the paper and the ActivityNet branch of its code have it."""
    config, length = head.config, x_CL.shape[1]
    x = torch.from_numpy(x_CL)[None]
    base = F.conv1d(x, head.base[0].weight, head.base[0].bias, padding=1, groups=4).relu()[0].detach().numpy()
    base = literal_gcnext(head.base_graph, base, config.groups)
    graph = literal_gcnext(head.graph, base, config.groups)

    def boundary(block: GCNeXt, conv: torch.nn.Conv1d) -> np.ndarray:
        hidden = literal_gcnext(block, base, config.groups)
        return conv.weight.detach().numpy()[0, :, 0] @ hidden + conv.bias.detach().numpy()

    mean = np.stack([graph[:, nearest].mean(axis=1) for nearest in neighbours_by_sorting(graph)], axis=1)
    # One weight over channels x (inner + context) bins, as upstream's single convolution after the concatenation.
    first = torch.cat([head.inner.weight, head.context.weight], dim=2).detach().numpy()
    first = first.reshape(len(first), -1)
    bias = head.inner.bias.detach().numpy()
    class_weight = head.classifier.weight.detach().numpy()
    class_weight = class_weight.reshape(len(class_weight), -1)

    durations = length if config.max_duration is None else math.ceil(config.max_duration * length / FULL)
    narrow = config.map_channels // 4
    dense = np.zeros((narrow, durations, length))
    classes, cells = [], []
    for d in range(durations):
        for s in range(length):
            if s + d >= length:
                continue
            reach = (d + 1) / 2
            inner = align(graph, s - reach, s + d + reach, config.inner_bins)
            context = align(mean, s - reach, s + d + reach, config.context_bins)
            aligned = np.concatenate([inner, context], axis=1)
            hidden = np.maximum(first @ aligned.reshape(-1) + bias, 0)
            dense[:, d, s] = relu_1x1(hidden, head.reduce)
            classes.append(class_weight @ align(x_CL, s - 0.5, s + d + 0.5, config.class_bins).reshape(-1))
            cells.append((d, s))
    y = torch.from_numpy(dense)[None]
    padding = config.middle_kernel // 2
    for conv in (head.middle1, head.middle2):
        y = F.conv2d(y, conv.weight, conv.bias, padding=padding).relu()
    y = F.conv2d(y, head.last.weight, head.last.bias)[0].detach().numpy()
    return {
        "start_BL": boundary(head.start_graph, head.start),
        "end_BL": boundary(head.end_graph, head.end),
        "proposals_B2N": np.stack([y[:, d, s] for d, s in cells], axis=1),
        "classes_BKN": np.stack(classes, axis=1) + head.classifier.bias.detach().numpy()[:, None],
        "cells_N2": np.array(cells),
    }


@pytest.mark.parametrize(("config", "length"), [(SMALL, 10), (SMALL, 5), (THUMOS, 10), (THUMOS, 6)],
                         ids=["activitynet", "activitynet-half", "thumos", "thumos-shorter"])  # fmt: skip
def test_head_equals_the_published_form(config: HeadConfig, length: int) -> None:
    head = gtad(config)
    x = features(2, length)
    output = head(x)
    for b in range(2):
        expected = literal_head(head, x[b].numpy())
        assert output.cells_N2.tolist() == expected.pop("cells_N2").tolist()
        for name, value in expected.items():
            ours = getattr(output, name)[b].detach().numpy()
            # Sample places are float32 in the operator; here, where g = 3, they are not.
            np.testing.assert_allclose(ours, value, rtol=0, atol=2e-6, err_msg=name)


def test_cells_of_head_and_targets_are_the_same() -> None:
    for length in (10, 5, 2):
        head = gtad(THUMOS)
        cells = head(features(1, length)).cells_N2
        assert cells.tolist() == valid_cells(length, head.max_duration(length)).tolist()


@pytest.mark.parametrize(("length", "durations"), [(100, 10), (25, 3), (32, 4)])
@pytest.mark.parametrize("kernel", [1, 3])
def test_the_same_weights_serve_every_rung(length: int, durations: int, kernel: Literal[1, 3]) -> None:
    config = replace(
        SMALL,
        inner_bins=2,
        context_bins=1,
        class_bins=1,
        hidden=8,
        map_channels=4,
        max_duration=10,
        middle_kernel=kernel,
    )
    head = GTAD(config, FEATURES, CLASSES, 100)
    output = head(features(2, length).float())
    cells = sum(length - d for d in range(durations))
    assert output.start_BL.shape == output.end_BL.shape == (2, length)
    assert output.proposals_B2N.shape == (2, 2, cells)
    assert output.classes_BKN.shape == (2, CLASSES, cells)
    assert output.cells_N2.shape == (cells, 2)
    assert all(torch.isfinite(t).all() for t in (output.start_BL, output.proposals_B2N, output.classes_BKN))


@pytest.mark.parametrize(
    ("max_duration", "num_snippets", "expected"),
    [(64, 256, 64), (64, 64, 16), (64, 100, 25), (64, 2, 1), (None, 25, 25)],
)
def test_the_longest_action_stays_the_same_in_seconds(
    max_duration: int | None, num_snippets: int, expected: int
) -> None:
    with torch.device("meta"):
        head = GTAD(replace(SMALL, max_duration=max_duration), FEATURES, CLASSES, 256)
    assert head.max_duration(num_snippets) == expected


def test_frozen_numbers() -> None:
    """A change of these numbers breaks every checkpoint that exists."""
    output = gtad().float()(features(1, 6).float())
    expected = {
        "start_BL": [-12.836428, -10.475960, -24.544124, -9.133273, -9.940575, -7.944471],
        "end_BL": [-1.554346, -6.335513, -2.446440, -0.429717, 0.216536, -0.765846],
        "proposals_B2N": [-3.862851, -7.222934, -8.747342, -7.204893, -5.307487, -3.881484],
        "classes_BKN": [2.677579, 0.060052, 0.245191, 1.187115, 0.427543, 0.645004],
    }
    for name, numbers in expected.items():
        got = getattr(output, name)[0].detach().flatten()[: len(numbers)]
        torch.testing.assert_close(got, torch.tensor(numbers), rtol=1e-4, atol=1e-4, msg=lambda m, name=name: name + m)


def test_the_class_of_a_proposal_is_read_from_its_own_snippets() -> None:
    """A proposal of one snippet, and one of two, see as much of what comes before them as of what comes after."""
    head, length = gtad(), 7
    with torch.no_grad():
        head.classifier.weight.fill_(1.0)
        x_BCL = torch.zeros(1, FEATURES, length, dtype=torch.float64)
        x_BCL[:, :, 3] = 1.0
        output = head(x_BCL)
    seen = output.classes_BKN[0, 0] - head.classifier.bias[0]
    of = {(d, s): value for (d, s), value in zip(output.cells_N2.tolist(), seen.tolist(), strict=True)}
    assert max(of, key=of.__getitem__) == (0, 3)
    assert of[0, 2] == pytest.approx(of[0, 4]) and of[1, 2] == pytest.approx(of[1, 3])
    assert of[2, 2] == pytest.approx(max(value for (d, _), value in of.items() if d == 2))


def test_the_defaults_are_the_papers_sizes() -> None:
    with torch.device("meta"):
        head = GTAD(HeadConfig(), 512, 200, 100)
    assert (head.base[0].weight.shape, head.base[0].groups) == ((256, 128, 3), 4)
    assert head.graph.temporal[2].weight.shape == (128, 4, 3)
    assert head.graph.semantic[1].weight.shape == (128, 4, 1, 1)
    assert head.inner.weight.shape[1:].numel() + head.context.weight.shape[1:].numel() == 9216
    assert [tuple(c.weight.shape) for c in (head.reduce, head.middle1, head.middle2, head.last)] == [
        (128, 512, 1, 1), (128, 128, 1, 1), (128, 128, 1, 1), (2, 128, 1, 1)
    ]  # fmt: skip


def test_dropout_of_a_video_depends_on_its_seed_alone() -> None:
    x = torch.ones(3, 40, 25)
    together = video_dropout(x, 0.25, [5, 6, 7])
    assert sorted(together.unique().tolist()) == pytest.approx([0.0, 4 / 3])
    assert 0.7 < (together > 0).float().mean() < 0.8
    assert not torch.equal(together[0], together[1])
    apart = torch.cat([video_dropout(x[:1], 0.25, [5]), video_dropout(x[1:], 0.25, [6, 7])])
    assert torch.equal(together, apart)
    assert video_dropout(x, 0.0, [5, 6, 7]) is x


def loss_of(output: HeadOutput, batch: int, length: int) -> Tensor:
    rng = np.random.default_rng(0)
    edges = np.arange(length + 1.0)
    segments = np.array([[1.0, 4.0], [3.0, 5.0]])
    each = [
        make_targets(edges, segments, np.array([0, 2]), length, CLASSES, rng, with_zero=False) for _ in range(batch)
    ]
    counts = Counts.of(each, 0.9)
    targets = Targets.stack(each, torch.device("cpu"))
    return tal_loss(output, targets, counts, positive_iou=0.9, class_weight=1.0).total


def test_the_tal_loss_reaches_the_first_convolution_of_the_encoder() -> None:
    torch.manual_seed(0)
    encoder, length, num_frames = TSMResNet("tsm_r18", 8), 6, 4
    encoder.freeze_batchnorm()
    encoder.train()
    head = GTAD(replace(SMALL, hidden=64, map_channels=64), encoder.num_features, CLASSES, length).train()
    frames = torch.from_numpy(
        np.random.RandomState(0).randint(0, 256, (2 * length * num_frames, 16, 16, 3)).astype(np.uint8)
    )
    features_BCL = encoder(frames, num_frames).unflatten(0, (2, -1)).transpose(1, 2)
    assert features_BCL.shape == (2, 64, length)
    loss_of(head(features_BCL), 2, length).backward()
    for module in (encoder, head):
        for name, parameter in module.named_parameters():
            if not parameter.requires_grad:
                continue
            assert parameter.grad is not None, name
            assert torch.isfinite(parameter.grad).all(), name
            assert parameter.grad.abs().sum() > 0, name
    assert encoder.conv1.weight.grad is not None


@pytest.mark.parametrize("config", [SMALL, THUMOS], ids=["activitynet", "thumos"])
def test_gradients_equal_finite_differences(config: HeadConfig) -> None:
    head = gtad(config)
    random = np.random.RandomState(7)

    def weighed(output: HeadOutput) -> Tensor:
        parts = (output.start_BL, output.end_BL, output.proposals_B2N, output.classes_BKN)
        return sum((part * weight).sum() for part, weight in zip(parts, weights, strict=True))

    x = features(1, 6).requires_grad_()
    output = head(x)
    shapes = [output.start_BL.shape, output.end_BL.shape, output.proposals_B2N.shape, output.classes_BKN.shape]
    weights = [torch.from_numpy(random.standard_normal(shape)) for shape in shapes]
    inputs = [x, head.inner.weight, head.context.weight, head.base[0].weight]
    gradients = torch.autograd.grad(weighed(output), inputs)
    step = 1e-6
    for value, gradient in zip(inputs, gradients, strict=True):
        direction = torch.from_numpy(random.standard_normal(value.shape))
        with torch.no_grad():
            value += step * direction
            ahead = weighed(head(x))
            value -= 2 * step * direction
            slope = (ahead - weighed(head(x))).item() / (2 * step)
            value += step * direction
        assert slope == pytest.approx((gradient * direction).sum().item(), rel=1e-5)


def test_windows_of_a_batch_do_not_mix() -> None:
    head = gtad()
    x, other = features(2, 8), features(2, 8, seed=9)
    changed = torch.cat([x[:1], other[1:]])
    ours, theirs = head(x), head(changed)
    for name in ("start_BL", "end_BL", "proposals_B2N", "classes_BKN"):
        torch.testing.assert_close(getattr(ours, name)[0], getattr(theirs, name)[0], rtol=0, atol=1e-12)
        assert (getattr(ours, name)[1] - getattr(theirs, name)[1]).abs().max() > 1e-3


def test_cells_are_placed_on_a_device_once() -> None:
    grid = proposal_grid(6, 4, 3)
    device = torch.device("cpu")
    assert grid.cells_on(device) is grid.cells_on(device) and torch.equal(grid.cells_on(device), grid.cells)


@pytest.mark.gpu
def test_jitter_labels_and_cells_do_not_make_the_host_wait() -> None:
    torch.use_deterministic_algorithms(False)  # filling with NaN waits
    device = torch.device("cuda")
    frames = torch.zeros((4, 32, 32, 3), dtype=torch.uint8, device=device)
    head = GTADHead(SMALL, FEATURES, CLASSES, FULL).to(device)
    x = torch.zeros((2, FEATURES, FULL), device=device)
    random = np.random.default_rng(0)
    labels = [head.targets(np.arange(FULL + 1.0), np.array([[1.0, 3.0]]), np.array([0]), random) for _ in range(2)]
    counts = head.counts(labels)
    try:
        for mode in ("default", "error"):  # grids are placed at the first call
            torch.cuda.set_sync_debug_mode(mode)
            jitter_pixels(frames, [Jitter((1.1, 0.9, 1.0), 0.1), Jitter((1.0, 1.0, 0.9), 0.0)])
            terms = head.loss(head(x), labels, counts, 1.0)
            torch.stack(list(terms.values())).sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")

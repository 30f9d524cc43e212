"""BMN against its definition in plain loops, its ledger against real steps, and through the commands."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from lofi_fast.config import BMNConfig, HeadConfig
from lofi_fast.errors import InputError
from lofi_fast.head.bmn import BMN
from lofi_fast.head.maps import HeadOutput
from lofi_fast.head.protocol import NotFiniteOutput, total
from lofi_fast.presets import configured, unread_settings
from lofi_fast.train import main

pytestmark = pytest.mark.usefixtures("poison", "one_thread")

SMALL = HeadConfig(hidden=8, inner_bins=4, map_channels=16, class_bins=4)
FEATURES, CLASSES, FULL = 12, 3, 10
RELEASED, PAPER = BMNConfig(), BMNConfig(definition="paper", samples=2)


def bmn(config: HeadConfig = SMALL, alone: BMNConfig = RELEASED, seed: int = 0) -> BMN:
    torch.manual_seed(seed)
    head = BMN(config, alone, FEATURES, CLASSES, FULL).double()
    for parameter in head.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    return head.eval()


def features(batch: int, length: int, seed: int = 1) -> Tensor:
    return torch.randn(batch, FEATURES, length, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def literal_conv(x_CT: np.ndarray, weight: np.ndarray, bias: np.ndarray) -> np.ndarray:
    """Over three snippets and a ReLU, output by output, in as many groups as the weight's shape tells."""
    channels, length = x_CT.shape
    width = weight.shape[1]
    out = np.zeros((len(weight), length))
    for o in range(len(weight)):
        first = o // (len(weight) * width // channels) * width
        for t in range(length):
            out[o, t] = bias[o]
            for tap in range(3):
                if 0 <= t + tap - 1 < length:
                    out[o, t] += weight[o, :, tap] @ x_CT[first : first + width, t + tap - 1]
    return np.maximum(out, 0)


def literal_samples(x_CT: np.ndarray, s: int, d: int, bins: int, alone: BMNConfig) -> np.ndarray:
    """Features (C, bins) of the proposal of snippets s..s+d."""
    if alone.definition == "released":
        first, last = s, s + d + 1
    else:
        first, last = s, s + d
    around = (last - first + 1) / 2
    start, end = first - around, last + around
    count = bins * alone.samples
    out = np.zeros((len(x_CT), bins))
    for j in range(count):
        fraction, lower = math.modf(start + (end - start) / (count - 1) * j)
        upper = math.ceil(lower + fraction)
        for place, weight in ((int(lower), 1 - fraction), (upper, fraction)):
            # Left of the first snippet, down to -1, both of a sample's snippets are the first.
            if lower + fraction > -1 and 0 <= place < x_CT.shape[1]:
                out[:, j // alone.samples] += weight * x_CT[:, place] / alone.samples
    return out


def literal_bmn(head: BMN, x_CT: np.ndarray) -> tuple[np.ndarray, np.ndarray, dict[tuple[int, int], np.ndarray]]:
    """Logits of one window: start (L,), end (L,), and (regression, confidence) of each (d, s)."""
    state = {key: value.numpy() for key, value in head.state_dict().items()}
    length = x_CT.shape[1]

    def conv(name: str, x: np.ndarray) -> np.ndarray:
        return literal_conv(x, state[f"{name}.weight"], state[f"{name}.bias"])

    base = conv("base.1.0", conv("base.0.0", x_CT))
    boundaries = [
        state[f"{name}.1.weight"][0, :, 0] @ conv(f"{name}.0.0", base) + state[f"{name}.1.bias"]
        for name in ("start", "end")
    ]
    sampled = conv("sampled.0", base)
    duration = head.max_duration(length)
    released = head.bmn.definition == "released"
    cells = [(d, s) for d in range(min(duration, length)) for s in range(length - d)]
    rows = length if released else duration
    narrow = len(state["reduce.weight"])
    grid = np.empty((narrow, rows, length))
    place = {(d, s): (s, s + d) if released else (d, s) for d, s in cells}
    of_place = {at: cell for cell, at in place.items()}
    for row in range(rows):
        for column in range(length):
            hidden = state["inner.bias"].copy()
            if (row, column) in of_place:
                d, s = of_place[row, column]
                samples = literal_samples(sampled, s, d, head.config.inner_bins, head.bmn)
                hidden += np.einsum("ocr,cr->o", state["inner.weight"], samples)
            hidden = np.maximum(hidden, 0)
            grid[:, row, column] = np.maximum(state["reduce.weight"][:, :, 0, 0] @ hidden + state["reduce.bias"], 0)
    for name in ("middle1", "middle2"):
        padded = np.pad(grid, ((0, 0), (1, 1), (1, 1)))
        out = np.empty_like(grid)
        for row in range(rows):
            for column in range(length):
                window = padded[:, row : row + 3, column : column + 3]
                out[:, row, column] = (state[f"{name}.weight"] * window).sum(axis=(1, 2, 3)) + state[f"{name}.bias"]
        grid = np.maximum(out, 0)
    last = {
        cell: state["last.weight"][:, :, 0, 0] @ grid[:, at[0], at[1]] + state["last.bias"]
        for cell, at in place.items()
    }
    return boundaries[0], boundaries[1], last


@pytest.mark.parametrize("alone", [RELEASED, PAPER], ids=["released", "paper"])
@pytest.mark.parametrize(("length", "limit"), [(7, None), (7, 4), (4, None), (1, None), (3, 25)])
def test_it_is_its_definition(alone: BMNConfig, length: int, limit: int | None) -> None:
    head = bmn(replace(SMALL, max_duration=limit), alone)
    x = features(2, length)
    output = head(x)
    assert output.proposals_B2N.shape == (2, 2, len(output.cells_N2))
    for b in range(2):
        start, end, proposals = literal_bmn(head, x[b].numpy())
        np.testing.assert_allclose(output.start_BL[b].detach(), start, rtol=0, atol=1e-11)
        np.testing.assert_allclose(output.end_BL[b].detach(), end, rtol=0, atol=1e-11)
        assert output.cells_N2.tolist() == [list(cell) for cell in proposals]
        expected = np.stack(list(proposals.values()), axis=1)
        np.testing.assert_allclose(output.proposals_B2N[b].detach(), expected, rtol=0, atol=1e-10)


def test_the_defaults_are_the_released_sizes() -> None:
    with torch.device("meta"):
        head = BMN(HeadConfig(), BMNConfig(), 400, 200, 100)
    assert [tuple(parameter.shape) for name, parameter in head.named_parameters() if "weight" in name] == [
        (256, 100, 3), (256, 64, 3), (256, 64, 3), (1, 256, 1), (256, 64, 3), (1, 256, 1), (256, 256, 3),
        (512, 256, 32), (128, 512, 1, 1), (128, 128, 3, 3), (128, 128, 3, 3), (2, 128, 1, 1), (200, 400, 8),
    ]  # fmt: skip


@pytest.mark.parametrize("alone", [RELEASED, PAPER], ids=["released", "paper"])
def test_gradients_equal_finite_differences(alone: BMNConfig) -> None:
    head = bmn(alone=alone)
    random = np.random.RandomState(7)
    x = features(2, 6).requires_grad_()

    def parts(output: HeadOutput) -> tuple[Tensor, ...]:
        return output.start_BL, output.end_BL, output.proposals_B2N, output.classes_BKN

    weights = [torch.from_numpy(random.standard_normal(part.shape)) for part in parts(head(x))]

    def weighed() -> Tensor:
        products = [(part * weight).sum() for part, weight in zip(parts(head(x)), weights, strict=True)]
        return torch.stack(products).sum()

    inputs = [x, *head.parameters()]
    gradients = torch.autograd.grad(weighed(), inputs)
    step = 1e-7
    for value, gradient in zip(inputs, gradients, strict=True):
        direction = torch.from_numpy(random.standard_normal(value.shape))
        with torch.no_grad():
            value += step * direction
            ahead = weighed()
            value -= 2 * step * direction
            slope = (ahead - weighed()).item() / (2 * step)
            value += step * direction
        assert slope == pytest.approx((gradient * direction).sum().item(), rel=1e-4, abs=1e-4)


def test_windows_of_a_batch_do_not_see_each_other() -> None:
    head = bmn()
    x, other = features(2, 8), features(2, 8, seed=9)
    ours, theirs = head(x), head(torch.cat([x[:1], other[1:]]))
    for name in ("start_BL", "end_BL", "proposals_B2N", "classes_BKN"):
        torch.testing.assert_close(getattr(ours, name)[0], getattr(theirs, name)[0], rtol=0, atol=1e-12)
        assert (getattr(ours, name)[1] - getattr(theirs, name)[1]).abs().max() > 1e-3


def test_a_batch_in_parts_has_the_loss_and_the_gradients_of_the_whole() -> None:
    head, x = bmn(), features(3, 6)
    edges, segments = np.arange(7.0), np.array([[0.0, 2.0], [3.0, 5.0]])
    targets = [
        head.targets(edges, segments[:count], np.arange(count), np.random.default_rng(count)) for count in (1, 2, 0)
    ]
    counts = head.counts(targets)

    def gradients(parts: list[slice]) -> tuple[float, list[Tensor]]:
        head.zero_grad()
        losses = [total(head.loss(head(x[part]), targets[part], counts, 1.0)) for part in parts]
        for loss in losses:
            loss.backward()
        return sum(loss.item() for loss in losses), [p.grad.clone() for p in head.parameters() if p.grad is not None]

    whole, of_whole = gradients([slice(3)])
    apart, of_parts = gradients([slice(1), slice(1, 3)])
    assert apart == pytest.approx(whole, rel=1e-5)
    assert len(of_whole) == len(list(head.parameters()))
    for ours, theirs in zip(of_parts, of_whole, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_a_score_is_of_the_proposal_and_of_both_its_boundaries() -> None:
    head = bmn()
    output = HeadOutput(
        start_BL=torch.tensor([[3.0, -9.0, -9.0, -9.0]]),
        end_BL=torch.tensor([[-9.0, -9.0, 2.0, -9.0]]),
        proposals_B2N=torch.zeros(1, 2, 10),
        classes_BKN=torch.zeros(1, CLASSES, 10),
        cells_N2=torch.tensor([(d, s) for d in range(4) for s in range(4 - d)]),
    )
    found = head.proposals(output, [np.array([10.0, 11.0, 12.0, 13.0, 14.0])])[0]

    def sigmoid(x: float) -> float:
        return 1 / (1 + math.exp(-x))

    scores = {tuple(segment): score for segment, score in zip(found.segments_P2.tolist(), found.scores_P, strict=True)}
    assert scores == {
        (10.0, 12.0): pytest.approx(sigmoid(3) * sigmoid(2) / 4, rel=1e-6),
        (10.0, 14.0): pytest.approx(sigmoid(3) * sigmoid(-9) / 4, rel=1e-6),
    }
    broken = replace(output, proposals_B2N=torch.full((1, 2, 10), math.nan))
    with pytest.raises(NotFiniteOutput):
        head.proposals(broken, [np.arange(5.0)])


@pytest.mark.usefixtures("torchs_own_allocator")
def test_it_is_trained_and_applied_by_the_same_commands(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from test_train import SETTINGS

    from lofi_fast import load
    from lofi_fast.data import demo

    torch.use_deterministic_algorithms(False)
    annotations, videos = demo.generate(tmp_path, num_training=4, num_validation=2, seed=1)
    run = tmp_path / "run"
    flags = [*SETTINGS, "--head", "bmn", "--bmn.samples", "2"]
    data = ["--annotations", str(annotations), "--videos", str(videos), "--cache", str(tmp_path / "cache")]
    assert main([*data, *flags, "--head-epochs", "2", "--joint-epochs", "1", "--out", str(run)]) == 0
    assert "average mAP" in capsys.readouterr().out
    detector = load(run)
    assert type(detector.head) is BMN and detector.config.bmn == BMNConfig(samples=2)
    found = detector.detect(next(videos.glob("*validation*")), mem_budget="4GB")
    assert found and all(0 <= one.start < one.end for one in found)


@pytest.mark.parametrize(
    ("flag", "value", "said"),
    [
        ("head.hidden", 30, "--head.hidden 30: the channels must be a multiple of 4"),
        ("head.map_channels", 2, "--head.map-channels 2: must be 4 or more"),
    ],
)
def test_settings_that_cannot_be_are_refused(flag: str, value: int, said: str) -> None:
    with pytest.raises(InputError, match=said):
        configured({"preset": "demo", "head.name": "bmn", flag: value}, cuda=lambda: False)


def test_settings_that_the_head_does_not_read_are_told_of() -> None:
    words = {"preset": "demo", "head": {"groups": 4, "hidden": 64}, "actionformer.levels": 3, "bmn.samples": 2}

    def told(head: str) -> list[str]:
        sentences = unread_settings(configured({**words, "head.name": head}, cuda=lambda: False))
        assert all(sentence.endswith(f", not with {head}") for sentence in sentences)
        return [sentence.partition(" is not used: it goes with ")[0] for sentence in sentences]

    assert told("gtad") == ["--bmn.samples 2", "--actionformer.levels 3"]
    assert told("bmn") == ["--head.groups 4", "--actionformer.levels 3"]
    assert told("actionformer") == ["--head.hidden 64", "--head.groups 4", "--bmn.samples 2"]
    assert unread_settings(configured({"preset": "demo", "head.name": "bmn"}, cuda=lambda: False)) == []

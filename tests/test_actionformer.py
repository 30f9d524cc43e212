"""ActionFormer against its definition in plain loops; its labels, loss and decoding against each other."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from lofi_fast.config import ActionFormerConfig
from lofi_fast.head import actionformer
from lofi_fast.head.actionformer import Attention, PyramidOutput, padded, positions
from lofi_fast.head.actionformer_head import (
    ActionFormerHead,
    Counts,
    Targets,
    distance_iou_loss,
    focal_loss,
    make_targets,
)
from lofi_fast.head.protocol import NotFiniteOutput, total
from lofi_fast.train import main

SMALL = ActionFormerConfig(hidden=16, attention_heads=2, attention_window=5, levels=3)
FEATURES, CLASSES = 12, 4


def head(config: ActionFormerConfig = SMALL, seed: int = 0) -> ActionFormerHead:
    torch.manual_seed(seed)
    made = ActionFormerHead(config, FEATURES, CLASSES).double()
    for parameter in made.parameters():  # the scales of residual branches start so small that an error would not show
        torch.nn.init.normal_(parameter, std=0.3)
    return made.eval()


def features(batch: int, length: int, seed: int = 1) -> Tensor:
    return torch.randn(batch, FEATURES, length, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def literal_attention(module: Attention, x_CT: Tensor, length: int, step: int) -> Tensor:
    """By loops over positions and heads; `length` of the output's positions are there."""
    out_length, size = x_CT.shape[1] // step, len(x_CT) // module.heads

    def projected(name: str) -> Tensor:
        weight = module.get_submodule(f"{name}_conv").weight
        norm, conv = module.get_submodule(f"{name}_norm"), module.get_submodule(name)
        rows = []
        for t in range(out_length):
            row = torch.zeros(len(x_CT), dtype=x_CT.dtype)
            for tap in range(3):
                place = t * step + tap - 1
                if 0 <= place < x_CT.shape[1] and t < length:
                    row = row + weight[:, 0, tap] * x_CT[:, place]
            mean, variance = row.mean(), row.var(unbiased=False)
            row = (row - mean) / torch.sqrt(variance + norm.eps) * norm.weight + norm.bias
            rows.append(conv.weight[:, :, 0] @ row + conv.bias)
        return torch.stack(rows)

    query, key, value = (projected(name) for name in ("query", "key", "value"))
    rows = []
    for t in range(out_length):
        seen = [u for u in range(length) if module.reach == 0 or abs(u - t) <= module.reach]
        parts = []
        for h in range(module.heads):
            at = slice(h * size, (h + 1) * size)
            scores = torch.stack([query[t, at] @ key[u, at] / math.sqrt(size) for u in seen])
            parts.append(sum(p * value[u, at] for p, u in zip(scores.softmax(0), seen, strict=True)))
        row = module.out.weight[:, :, 0] @ torch.cat(parts) + module.out.bias
        rows.append(row if t < length else torch.zeros_like(row))
    return torch.stack(rows, dim=1)


@pytest.mark.parametrize("window", [1, 5, 7])
@pytest.mark.parametrize("step", [1, 2])
def test_attention_is_its_definition(window: int, step: int) -> None:
    torch.manual_seed(0)
    module = Attention(8, 2, window, step).double()
    x, length = torch.randn(1, 8, 24, dtype=torch.float64), 24 // step - 2
    mask = (torch.arange(24 // step) < length).double()
    found = module(x, mask)[0]
    expected = literal_attention(module, x[0], length, step)
    torch.testing.assert_close(found[:, :length], expected[:, :length], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("length", [5, 8, 13, 16])
def test_what_is_padded_changes_nothing(length: int, monkeypatch: pytest.MonkeyPatch) -> None:
    made, x = head(), features(2, length)
    before = made(x)
    _, _, there = positions(length, SMALL.levels)
    monkeypatch.setattr(actionformer, "padded", lambda length, levels: padded(length, levels) + 8)
    after = made(x)
    _, _, still = actionformer.positions(length, SMALL.levels)
    assert there.sum() == still.sum()
    torch.testing.assert_close(after.classes_BKP[:, :, still], before.classes_BKP[:, :, there], rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(after.distances_B2P[:, :, still], before.distances_B2P[:, :, there])


def test_windows_of_a_batch_do_not_see_each_other() -> None:
    made, x = head(), features(3, 9)
    together, alone = made(x), made(x[1:2])
    torch.testing.assert_close(together.classes_BKP[1:2], alone.classes_BKP)


def test_positions_lie_at_every_second_snippet_of_the_level_before() -> None:
    snippets, steps, there = positions(6, 3)
    assert snippets.tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 0, 2, 4, 6, 0, 4]
    assert steps.tolist() == [1] * 8 + [2] * 4 + [4] * 2
    assert there.tolist() == [True] * 6 + [False] * 2 + [True] * 3 + [False] + [True, True]


# Labels


def literal_targets(edges: np.ndarray, segments: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(classes, distances) position by position."""
    snippets, steps, there = (part.numpy().astype(float) for part in positions(len(edges) - 1, SMALL.levels))
    classes, distances = np.zeros((CLASSES, len(snippets))), np.zeros((2, len(snippets)))
    width = edges[1] - edges[0]
    for p, (t, step) in enumerate(zip(snippets, steps, strict=True)):
        best = math.inf
        for (start, end), label in sorted(zip(segments.tolist(), labels.tolist(), strict=True), key=lambda s: s[0][0]):
            low, high = max(start, edges[0]), min(end, edges[-1])
            if high - low < 0.5 * (end - start) or not there[p]:
                continue
            low, high = (low - edges[0]) / width - 0.5, (high - edges[0]) / width - 0.5
            centre = (low + high) / 2
            middle = max(low, centre - 1.5 * step) < t < min(high, centre + 1.5 * step)
            far = max(t - low, high - t)
            level = int(math.log2(step))
            reach = [(0, 4), (4, 8), (8, math.inf)][level]
            if middle and reach[0] <= far <= reach[1] and high - low < best:
                best = high - low
                classes[:, p] = 0
                classes[label, p] = 1
                distances[:, p] = (t - low) / step, (high - t) / step
    return classes, distances


@pytest.mark.parametrize("seed", range(20))
def test_a_position_learns_the_shortest_segment_that_it_answers_for(seed: int) -> None:
    rng = np.random.default_rng(seed)
    edges = np.linspace(3.0, 23.0, int(rng.integers(5, 40)))
    starts = rng.uniform(0, 22, 6)
    segments = np.stack([starts, starts + rng.uniform(0.3, 12, 6)], axis=1)
    labels = rng.integers(0, CLASSES, 6)
    found = make_targets(SMALL, CLASSES, edges, segments, labels)
    classes, distances = literal_targets(edges, segments, labels)
    np.testing.assert_allclose(found.classes.numpy(), classes)
    np.testing.assert_allclose(found.distances.numpy(), distances, atol=1e-5)
    assert (found.positive.numpy() == classes.any(axis=0)).all()


def test_two_labels_of_one_segment_are_both_shown_and_none_teaches_nothing() -> None:
    edges = np.arange(9.0)
    both = make_targets(SMALL, CLASSES, edges, np.array([[1.0, 5.0], [1.0, 5.0]]), np.array([0, 2]))
    shown = both.classes[:, both.positive]
    assert shown.shape[1] and (shown == torch.tensor([1.0, 0, 1, 0])[:, None]).all()
    none = make_targets(SMALL, CLASSES, edges, np.empty((0, 2)), np.empty(0, dtype=np.int64))
    assert not none.positive.any() and not none.classes.any()


def perfect(targets: Targets, length: int) -> PyramidOutput:
    """The output that these targets ask for."""
    return PyramidOutput(20 * (2 * targets.classes[None] - 1).double(), targets.distances[None].double(), length)


def test_what_the_labels_ask_for_is_decoded_to_the_segments() -> None:
    edges = np.linspace(10.0, 42.0, 33)  # seconds
    segments, labels = np.array([[12.0, 14.5], [18.0, 26.0], [30.2, 41.0]]), np.array([1, 3, 0])
    made = head()
    targets = make_targets(SMALL, CLASSES, edges, segments, labels)
    (found,) = made.proposals(perfect(targets, 32), [edges])
    assert found.class_probs_KP is not None
    likely = found.class_probs_KP.max(axis=0) > 0.5
    assert likely.sum() == targets.positive.sum()
    for segment, label in zip(found.segments_P2[likely], found.class_probs_KP.argmax(axis=0)[likely], strict=True):
        np.testing.assert_allclose(segment, segments[labels.tolist().index(label)], atol=1e-5)
    assert set(found.class_probs_KP.argmax(axis=0)[likely]) == set(labels)


def test_output_that_is_not_finite_is_said() -> None:
    made = head()
    output = made(features(1, 8))
    output.classes_BKP[0, 0, 0] = math.nan
    with pytest.raises(NotFiniteOutput):
        made.proposals(output, [np.arange(9.0)])


# Loss


def test_losses_are_their_formulas() -> None:
    logits, targets = torch.tensor([0.3, -2.0], dtype=torch.float64), torch.tensor([1.0, 0.0], dtype=torch.float64)
    p = [1 / (1 + math.exp(-0.3)), 1 / (1 + math.exp(2.0))]
    expected = [-0.25 * (1 - p[0]) ** 2 * math.log(p[0]), -0.75 * p[1] ** 2 * math.log(1 - p[1])]
    assert focal_loss(logits, targets).tolist() == pytest.approx(expected)
    found, true = torch.tensor([[2.0, 1.0], [3.0, 4.0]]), torch.tensor([[1.0, 3.0], [3.0, 4.0]])
    # [-2, 1] and [-1, 3]: 2 in common of 5; centres at -0.5 and 1; the second pair is the same
    assert distance_iou_loss(found, true).tolist() == pytest.approx([1 - 2 / 5 + (1.5 / 5) ** 2, 0.0])


def test_a_label_is_smoothed_over_all_classes_and_none() -> None:
    made = head(replace(SMALL, label_smoothing=0.2))
    targets = windows(8, 1)[0]
    with torch.no_grad():
        output = made(features(1, 8))
    _, _, there = positions(8, SMALL.levels)
    expected = 0.0
    for k, p in ((k, p) for k in range(CLASSES) for p in range(len(there)) if there[p]):
        label = 0.8 * float(targets.classes[k, p]) + 0.2 / (CLASSES + 1)
        q = 1 / (1 + math.exp(-float(output.classes_BKP[0, k, p])))
        right = q * label + (1 - q) * (1 - label)
        entropy = -label * math.log(q) - (1 - label) * math.log(1 - q)
        expected += (0.25 * label + 0.75 * (1 - label)) * (1 - right) ** 2 * entropy
    counts = made.counts([targets])
    terms = made.loss(output, [targets], counts, 1.0)
    assert terms["classes"].item() == pytest.approx(expected / counts.positive, rel=1e-5)


def windows(length: int, count: int) -> list[Targets]:
    rng = np.random.default_rng(0)
    edges = np.arange(length + 1.0)
    return [
        make_targets(SMALL, CLASSES, edges, np.sort(rng.uniform(0, length, (3, 2))), rng.integers(0, CLASSES, 3))
        for _ in range(count)
    ]


def test_a_batch_in_parts_has_the_loss_and_the_gradients_of_the_whole() -> None:
    made = head(replace(SMALL, drop_path=0.4)).train()
    x, targets, seeds = features(4, 11), windows(11, 4), [5, 2**63 - 1, 7, 8]
    counts = made.counts(targets)
    assert counts == made.counts(targets[:1]) + made.counts(targets[1:]) and counts.positive > 0

    def gradients(parts: list[slice]) -> tuple[float, list[Tensor]]:
        made.zero_grad()
        sums = 0.0
        for part in parts:
            made.seed(seeds[part])
            loss = total(made.loss(made(x[part]), targets[part], counts, 1.0))
            loss.backward()
            sums += loss.item()
        return sums, [parameter.grad.clone() for parameter in made.parameters() if parameter.grad is not None]

    whole, parts = gradients([slice(0, 4)]), gradients([slice(0, 1), slice(1, 4)])
    assert whole[0] == pytest.approx(parts[0], rel=1e-6)
    assert len(whole[1]) == len(list(made.parameters())), "every parameter learns"
    for one, other in zip(whole[1], parts[1], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-7)
    made.seed([1, 2, 3, 4])
    assert total(made.loss(made(x), targets, counts, 1.0)).item() != pytest.approx(whole[0], rel=1e-5)


def test_windows_without_actions_have_a_loss_too() -> None:
    made = head()
    none = make_targets(SMALL, CLASSES, np.arange(9.0), np.empty((0, 2)), np.empty(0, dtype=np.int64))
    terms = made.loss(made(features(1, 8)), [none], Counts(0), 1.0)
    assert terms["classes"].item() > 0 and terms["distances"].item() == 0


@pytest.mark.usefixtures("one_thread")
def test_it_learns_to_find_segments() -> None:
    """Features that show where which action is."""
    torch.manual_seed(0)
    made = ActionFormerHead(replace(SMALL, hidden=32), FEATURES, CLASSES).train()
    rng = np.random.default_rng(0)
    edges, optimizer = np.arange(33.0), torch.optim.AdamW(made.parameters(), lr=3e-3)

    def example() -> tuple[Tensor, np.ndarray, int]:
        start, label = rng.uniform(1, 18), int(rng.integers(CLASSES))
        segment = np.array([[start, start + rng.uniform(4, 12)]])
        x = 0.1 * rng.standard_normal((FEATURES, 32))
        centres = np.arange(32) + 0.5
        x[label, (centres > segment[0, 0]) & (centres < segment[0, 1])] += 1
        return torch.from_numpy(x).float(), segment, label

    for step in range(100):
        batch = [example() for _ in range(8)]
        targets = [make_targets(SMALL, CLASSES, edges, segment, np.array([label])) for _, segment, label in batch]
        made.seed(range(8 * step, 8 * step + 8))
        output = made(torch.stack([x for x, _, _ in batch]))
        loss = total(made.loss(output, targets, made.counts(targets), 1.0))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    made.eval()
    right = 0
    for _ in range(20):
        x, segment, label = example()
        with torch.no_grad():
            (found,) = made.proposals(made(x[None]), [edges])
        assert found.class_probs_KP is not None
        kind, best = divmod(int(found.class_probs_KP.argmax()), found.class_probs_KP.shape[1])
        start, end = found.segments_P2[best]
        both = max(min(end, segment[0, 1]) - max(start, segment[0, 0]), 0)
        union = max(end, segment[0, 1]) - min(start, segment[0, 0])
        right += kind == label and both / union > 0.7
    assert right >= 16


@pytest.mark.usefixtures("torchs_own_allocator")
def test_it_is_trained_and_applied_by_the_same_commands(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from test_train import SETTINGS

    from lofi_fast import load
    from lofi_fast.data import demo

    annotations, videos = demo.generate(tmp_path, num_training=4, num_validation=2, seed=1)
    run = tmp_path / "run"
    flags = [*SETTINGS, "--head", "actionformer", "--actionformer.hidden", "16", "--actionformer.levels", "3"]
    data = ["--annotations", str(annotations), "--videos", str(videos), "--cache", str(tmp_path / "cache")]
    assert main([*data, *flags, "--head-epochs", "2", "--joint-epochs", "1", "--out", str(run)]) == 0
    assert "average mAP" in capsys.readouterr().out
    detector = load(run)
    assert type(detector.head) is ActionFormerHead and detector.config.head.name == "actionformer"
    assert isinstance(detector.detect(next(videos.glob("*validation*")), mem_budget="4GB"), list)


def test_settings_that_cannot_be_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--preset", "demo", "--head", "actionformer", "--actionformer.hidden", "30"]) == 2
    assert "--actionformer.hidden 30 --actionformer.attention-heads 4" in capsys.readouterr().err

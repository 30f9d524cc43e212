"""The TAL loss against upstream's formulas written out, and its two promises: never NaN, and parts add up."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from lofi_fast.head.loss import Counts, LossTerms, tal_loss
from lofi_fast.head.maps import HeadOutput
from lofi_fast.head.targets import ABSENT, IGNORED, SHOWN, Targets, make_targets, valid_cells

LENGTH, CLASSES = 9, 3
CELLS = LENGTH * (LENGTH + 1) // 2
TERMS = ("boundary", "regression", "confidence", "classes")


def output(batch: int, scale: float = 1.0, seed: int = 0) -> HeadOutput:
    random = np.random.RandomState(seed)

    def logits(*shape: int) -> Tensor:
        return torch.from_numpy(scale * random.standard_normal((batch, *shape))).float().requires_grad_()

    cells = torch.from_numpy(valid_cells(LENGTH, LENGTH))
    return HeadOutput(logits(LENGTH), logits(LENGTH), logits(2, CELLS), logits(CLASSES, CELLS), cells)


def rows(whole: HeadOutput, part: slice) -> HeadOutput:
    return HeadOutput(
        whole.start_BL[part], whole.end_BL[part], whole.proposals_B2N[part], whole.classes_BKN[part], whole.cells_N2
    )


def windows(*segments: list[tuple[float, float]]) -> list[Targets]:
    edges = np.arange(LENGTH + 1.0)
    return [
        make_targets(
            edges,
            np.array(each, dtype=np.float64).reshape(-1, 2),
            np.arange(len(each), dtype=np.int64) % CLASSES,
            LENGTH,
            CLASSES,
            np.random.default_rng(index),
            with_zero=False,
        )
        for index, each in enumerate(segments)
    ]


ORDINARY = [[(1.0, 4.0), (3.5, 8.0)], [(0.0, 9.0)], [], [(2.2, 3.1), (5.0, 7.0), (6.0, 6.8)]]


def numbers(terms: LossTerms) -> dict[str, float]:
    return {"loss": terms.total.item()} | {name: term.item() for name, term in terms.by_name().items()}


def terms_of(
    result: HeadOutput, each: list[Targets], counted: list[Targets] | None = None, class_weight: float = 1.0
) -> LossTerms:
    counts = Counts.of(counted or each, 0.9)
    stacked = Targets.stack(each, torch.device("cpu"))
    return tal_loss(result, stacked, counts, positive_iou=0.9, class_weight=class_weight)


def upstream_balanced(probability: Tensor, positive: Tensor) -> Tensor:
    """G-TAD's class-balanced BCE: -mean(coef_1 * log p on positives + coef_0 * log(1 - p) on negatives)."""
    mask = positive.double()
    entries = mask.numel()
    ratio = entries / mask.sum()
    coef_0 = 0.5 * ratio / (ratio - 1)
    coef_1 = 0.5 * ratio
    loss = coef_1 * torch.log(probability) * mask + coef_0 * torch.log(1.0 - probability) * (1.0 - mask)
    return -loss.mean()


def test_terms_equal_upstreams_formulas() -> None:
    result, each = output(4), windows(*ORDINARY)
    targets = Targets.stack(each, torch.device("cpu"))
    terms = terms_of(result, each)

    start, end = result.start_BL.double().sigmoid(), result.end_BL.double().sigmoid()
    tem = upstream_balanced(start, targets.start > 0.5) + upstream_balanced(end, targets.end > 0.5)
    assert terms.boundary.item() == pytest.approx(tem.item(), rel=1e-5)

    regression, confidence = result.proposals_B2N.double().sigmoid().unbind(1)
    # PEM_reg: mse_loss(pred * weights, gt * weights) summed, over the sum of the weights, halved; times 10.
    weights = targets.regression.double()
    squared = (regression * weights - targets.iou.double() * weights) ** 2
    pem_reg = 0.5 * (squared * torch.ones_like(weights)).sum() / weights.sum()
    assert terms.regression.item() == pytest.approx(10 * pem_reg.item(), rel=1e-5)

    pem_cls = upstream_balanced(confidence, targets.iou > 0.9)
    assert terms.confidence.item() == pytest.approx(pem_cls.item(), rel=1e-5)


def test_class_term_is_half_what_is_shown_and_half_what_is_absent() -> None:
    result, each = output(4), windows(*ORDINARY)
    classes = torch.stack([t.classes for t in each])
    assert set(classes.unique().tolist()) == {IGNORED, ABSENT, SHOWN}
    assert ((classes == SHOWN).sum(dim=1) > 1).any()  # several at once
    probability = result.classes_BKN.double().sigmoid()
    shown, absent = -probability[classes == SHOWN].log(), -(1 - probability[classes == ABSENT]).log()
    expected = (0.5 * shown.mean() + 0.5 * absent.mean()).item()
    assert terms_of(result, each).classes.item() == pytest.approx(expected, rel=1e-5)
    assert terms_of(result, each, class_weight=0.3).classes.item() == pytest.approx(0.3 * expected, rel=1e-5)


def test_without_a_class_weight_the_classes_learn_nothing() -> None:
    result, each = output(4), windows(*ORDINARY)
    terms = terms_of(result, each, class_weight=0.0)
    assert terms.classes.item() == 0.0
    terms.total.backward()
    assert result.classes_BKN.grad is None


def test_by_hand_on_two_cells() -> None:
    # L = 2 with one segment of the first snippet: cells (0, 1), (1, 2), (0, 2) have tIoU 1, 0, 0.5.
    each = [
        make_targets(
            np.arange(3.0), np.array([[0.0, 1.0]]), np.array([0]), 2, 1, np.random.default_rng(0), with_zero=False
        )
    ]
    zeros = HeadOutput(
        torch.zeros(1, 2), torch.zeros(1, 2), torch.zeros(1, 2, 3), torch.zeros(1, 1, 3), torch.zeros(3, 2)
    )
    counts = Counts.of(each, 0.9)
    assert counts == Counts(start=(2, 0), end=(2, 0), map=(1, 2), classes=(2, 1), regression=2)
    terms = tal_loss(zeros, Targets.stack(each, torch.device("cpu")), counts, positive_iou=0.9, class_weight=1.0)
    half = np.log(2.0)  # every probability is a half
    assert terms.boundary.item() == pytest.approx(0.5 * half + 0.5 * half)  # no negatives: their halves stay out
    assert terms.regression.item() == pytest.approx(10 * 0.5 * (0.25 + 0.0) / 2)  # the tIoU of 1 and of 0.5
    assert terms.confidence.item() == pytest.approx(half)
    assert terms.classes.item() == pytest.approx(half)
    assert numbers(terms) == pytest.approx(
        {"loss": 3 * half + 0.625, "boundary": half, "regression": 0.625, "confidence": half, "classes": half}
    )


def everywhere(value: float, told: int, regression: bool) -> Targets:
    return Targets(
        start=torch.full((LENGTH,), value),
        end=torch.full((LENGTH,), value),
        iou=torch.full((CELLS,), value),
        regression=torch.full((CELLS,), regression),
        classes=torch.full((CLASSES, CELLS), told, dtype=torch.int8),
    )


EXTREMES = {
    "no-positives": everywhere(0.0, ABSENT, False),
    "all-positives": everywhere(1.0, SHOWN, True),
    "all-ignored": everywhere(0.4, IGNORED, True),
}


@pytest.mark.parametrize("scale", [1.0, 100.0], ids=["ordinary-logits", "saturated-logits"])
@pytest.mark.parametrize("name", EXTREMES)
def test_extremes_are_finite_with_their_gradient(name: str, scale: float) -> None:
    result = output(2, scale)
    terms = terms_of(result, [EXTREMES[name]] * 2)
    assert all(torch.isfinite(getattr(terms, term)) for term in TERMS)
    terms.total.backward()
    for logits in (result.start_BL, result.end_BL, result.proposals_B2N, result.classes_BKN):
        assert logits.grad is not None and torch.isfinite(logits.grad).all()


def test_without_positives_the_negatives_still_count() -> None:
    result = output(2)
    terms = terms_of(result, [EXTREMES["no-positives"]] * 2)
    negative = torch.nn.functional.softplus(result.proposals_B2N[:, 1]).mean()
    assert terms.confidence.item() == pytest.approx(0.5 * negative.item(), rel=1e-5)
    assert terms.regression.item() == 0.0


def test_a_window_without_segments_is_finite() -> None:
    terms = terms_of(output(1), windows([]))
    assert np.isfinite(list(numbers(terms).values())).all()


def test_half_precision_logits_are_summed_in_single() -> None:
    result, each = output(4), windows(*ORDINARY)
    low = HeadOutput(
        *(getattr(result, name).bfloat16() for name in ("start_BL", "end_BL", "proposals_B2N", "classes_BKN")),
        result.cells_N2,
    )
    terms = terms_of(low, each)
    assert terms.total.dtype == torch.float32
    rounded = HeadOutput(
        low.start_BL.float(), low.end_BL.float(), low.proposals_B2N.float(), low.classes_BKN.float(), low.cells_N2
    )
    assert terms.total.item() == pytest.approx(terms_of(rounded, each).total.item(), rel=1e-6)


@pytest.mark.parametrize("at", [1, 2, 3])
def test_a_batch_in_two_parts_adds_up_with_its_gradients(at: int) -> None:
    result, each = output(4), windows(*ORDINARY)
    whole = terms_of(result, each)
    logits = [result.start_BL, result.end_BL, result.proposals_B2N, result.classes_BKN]
    whole_gradients = torch.autograd.grad(whole.total, logits)

    parts = [terms_of(rows(result, part), each[part], counted=each) for part in (slice(0, at), slice(at, 4))]
    for term in TERMS:
        together = sum(getattr(part, term).item() for part in parts)
        assert together == pytest.approx(getattr(whole, term).item(), rel=1e-6, abs=1e-7), term
    part_gradients = torch.autograd.grad(parts[0].total + parts[1].total, logits)
    for ours, theirs in zip(part_gradients, whole_gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-8)


def test_counts_by_hand() -> None:
    each = windows([(1.0, 4.0)], [])
    counts = Counts.of(each, 0.9)
    # A start at 1 s marks edges 0, 1, 2; an end at 4 s marks 3, 4, 5. One cell, (1, 4), has tIoU above 0.9.
    assert counts.start == counts.end == (3, 2 * LENGTH - 3)
    assert counts.map == (1, 2 * CELLS - 1)
    assert counts.regression == int(each[0].regression.sum())
    ious = each[0].iou
    # The class of the one segment where that is, absent elsewhere; all else is absent, in the other window as well.
    assert counts.classes == (int((ious >= 0.5).sum()), int((ious < 0.3).sum()) + 2 * CELLS + CLASSES * CELLS)


def test_targets_equal_to_the_threshold_are_negative() -> None:
    at = everywhere(0.5, ABSENT, False)
    assert Counts.of([at], 0.5) == Counts(
        start=(0, LENGTH), end=(0, LENGTH), map=(0, CELLS), classes=(0, CLASSES * CELLS), regression=0
    )

from __future__ import annotations

import math
import os
import re
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lofi_fast.kernels import nms, soft_nms
from lofi_fast.kernels.soft_nms import reference


def candidates(num: int, num_labels: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    starts = torch.rand(num, generator=generator, dtype=torch.float64) * 100
    lengths = torch.rand(num, generator=generator, dtype=torch.float64) * 30
    scores = torch.rand(num, generator=generator, dtype=torch.float64)
    labels = torch.randint(-2, num_labels - 2, (num,), generator=generator)
    return torch.stack([starts, starts + lengths], dim=1), scores, labels


def strided(num: int) -> tuple[Tensor, Tensor, Tensor]:
    """Views whose every stride is unusual: a transposed segment table, every third score, one repeated label."""
    segments, scores, _ = candidates(num, 1, seed=5)
    table = torch.full((2, 2 * num), math.nan, dtype=torch.float64)
    table[:, ::2] = segments.T
    sparse = torch.full((3 * num,), math.nan, dtype=torch.float64)
    sparse[::3] = scores
    return table[:, ::2].T, sparse[::3], torch.tensor([7]).expand(num)


def grid(num: int) -> tuple[Tensor, Tensor, Tensor]:
    """Few distinct segments and scores, some of zero length: ties everywhere."""
    index = torch.arange(num)
    starts = (index % 4).double()
    return torch.stack([starts, starts + index % 3], dim=1), ((index % 5) / 4).double(), index % 2


def same(num: int, segment: tuple[float, float], score: float) -> tuple[Tensor, Tensor, Tensor]:
    segments = torch.tensor([segment], dtype=torch.float64).expand(num, 2)
    return segments, torch.full((num,), score, dtype=torch.float64), torch.zeros(num, dtype=torch.int64)


HOSTILE = {
    "none": candidates(0, 3, seed=0),
    "one": candidates(1, 3, seed=0),
    "two_labels_apart": candidates(2, 9, seed=1),
    "one_label": candidates(200, 1, seed=2),
    "many_labels": candidates(300, 20, seed=3),
    "identical": (
        torch.tensor([[1.0, 3.0]]).double().expand(50, 2),
        torch.full((50,), 0.5).double(),
        torch.zeros(50).long(),
    ),
    "points": same(20, (1.0, 1.0), 0.5),
    "grid": grid(120),
    "strided": strided(60),
    "huge_times": (candidates(40, 2, seed=4)[0] * 1e306, *candidates(40, 2, seed=4)[1:]),
    "all_zero_scores": (candidates(30, 2, seed=6)[0], torch.zeros(30).double(), candidates(30, 2, seed=6)[2]),
}
SETTINGS = {
    "gtad": (0.84, 0.0, 0.0, None, 0.0),
    "narrow": (0.01, 0.0, 0.0, None, 0.0),
    "bmn": (0.4, 0.5, 0.4 / 120, None, 0.0),
    "top_7": (0.84, 0.0, 0.0, 7, 0.0),
    "top_0": (0.84, 0.0, 0.0, 0, 0.0),
    "min_score": (0.3, 0.0, 0.0, None, 0.4),
}


@pytest.mark.parametrize("form", [reference.soft_nms, torch.ops.lofi_fast.soft_nms], ids=["reference", "operator"])
def test_decays_by_hand(form) -> None:
    # IoU with the best one: 1/3 (shifted by half), 1/2 (inside), 0 (apart), and 1/3 again under another label.
    segments = torch.tensor([[2.0, 6.0], [0.0, 4.0], [1.0, 3.0], [9.0, 10.0], [2.0, 6.0]], dtype=torch.float64)
    scores = torch.tensor([0.8, 0.9, 0.7, 0.1, 0.6], dtype=torch.float64)
    labels = torch.tensor([0, 0, 0, 0, 1])
    order, decayed = form(segments, scores, labels, 0.5, 0.0, 0.0, None, 0.0)
    first = 0.8 * math.exp(-((1 / 3) ** 2) / 0.5)  # 0.6406
    third = 0.7 * math.exp(-((1 / 2) ** 2) / 0.5) * math.exp(-((1 / 5) ** 2) / 0.5)  # 0.3919
    assert order.tolist() == [1, 0, 4, 2, 3]
    torch.testing.assert_close(decayed, torch.tensor([0.9, first, 0.6, third, 0.1]).double(), rtol=1e-7, atol=0)


def test_last_candidate_is_kept_and_decayed() -> None:
    order, decayed = soft_nms(torch.tensor([[0.0, 1.0], [0.0, 1.0]]), torch.tensor([0.25, 0.5]), sigma=0.84)
    assert order.tolist() == [1, 0]
    torch.testing.assert_close(decayed, torch.tensor([0.5, 0.25 * math.exp(-1 / 0.84)]))


def test_default_sigma_is_gtads() -> None:
    segments, scores, _ = candidates(30, 1, seed=8)
    for default, stated in zip(soft_nms(segments, scores), soft_nms(segments, scores, sigma=0.84), strict=True):
        assert torch.equal(default, stated)


def test_threshold_rises_with_the_length_of_the_taken_segment() -> None:
    # The rival's IoU is 0.5 in both; BMN's threshold is 0.45 for the short taken segment and 0.85 for the long one.
    for length, decays in ((10.0, True), (90.0, False)):
        segments = torch.tensor([[0.0, length], [0.0, length / 2]])
        _, decayed = soft_nms(segments, torch.tensor([0.9, 0.8]), threshold=0.4, threshold_slope=0.5 / 100)
        assert (decayed[1].item() < 0.79) == decays


def test_threshold_is_strict() -> None:
    segments, scores = torch.tensor([[0.0, 2.0], [0.0, 1.0]]), torch.tensor([0.9, 0.8])
    assert soft_nms(segments, scores, threshold=0.5)[1].tolist() == scores.tolist()


def test_points_never_decay_each_other() -> None:
    _, decayed = soft_nms(torch.ones(3, 2), torch.tensor([0.3, 0.2, 0.1]))
    assert torch.equal(decayed, torch.tensor([0.3, 0.2, 0.1]))


def test_max_keep_and_min_score_cut_the_full_run() -> None:
    segments, scores, labels = candidates(200, 3, seed=9)
    order, decayed = soft_nms(segments, scores, labels)
    assert sorted(order.tolist()) == list(range(200))
    assert bool((decayed[1:] <= decayed[:-1]).all())
    top_order, top_decayed = soft_nms(segments, scores, labels, max_keep=17)
    assert torch.equal(top_order, order[:17]) and torch.equal(top_decayed, decayed[:17])
    high_order, _ = soft_nms(segments, scores, labels, min_score=float(decayed[40]))
    assert torch.equal(high_order, order[:41])


def test_labels_are_separate_problems() -> None:
    segments, scores, labels = candidates(150, 4, seed=10)
    order, decayed = soft_nms(segments, scores, labels)
    for label in labels.unique():
        inside = (labels == label).nonzero().squeeze(1)
        alone_order, alone_decayed = soft_nms(segments[inside], scores[inside])
        mine = labels[order] == label
        assert torch.equal(order[mine], inside[alone_order])
        assert torch.equal(decayed[mine], alone_decayed)


@pytest.mark.parametrize("setting", SETTINGS.values(), ids=SETTINGS.keys())
@pytest.mark.parametrize("inputs", HOSTILE.values(), ids=HOSTILE.keys())
@pytest.mark.usefixtures("native")
def test_cpp_equals_reference_to_the_bit(inputs, setting) -> None:
    order, decayed = torch.ops.lofi_fast.soft_nms(*inputs, *setting)
    expected_order, expected_decayed = reference.soft_nms(*inputs, *setting)
    assert torch.equal(order, expected_order)
    assert torch.equal(decayed, expected_decayed)


@pytest.mark.parametrize("iou_threshold", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("inputs", HOSTILE.values(), ids=HOSTILE.keys())
@pytest.mark.usefixtures("native")
def test_cpp_nms_equals_reference(inputs, iou_threshold) -> None:
    assert torch.equal(torch.ops.lofi_fast.nms(*inputs, iou_threshold), reference.nms(*inputs, iou_threshold))


times = st.integers(0, 12).map(lambda tick: tick / 4)
candidate = st.tuples(times, times, st.integers(0, 8).map(lambda tick: tick / 8), st.integers(0, 2))


@settings(deadline=None, max_examples=200)
@given(st.lists(candidate, max_size=25), st.sampled_from(list(SETTINGS.values())))
@pytest.mark.usefixtures("native")
def test_cpp_equals_reference_where_ties_abound(rows, setting) -> None:
    segments = torch.tensor([sorted(row[:2]) for row in rows], dtype=torch.float64).reshape(-1, 2)
    scores = torch.tensor([row[2] for row in rows], dtype=torch.float64)
    labels = torch.tensor([row[3] for row in rows], dtype=torch.int64)
    order, decayed = torch.ops.lofi_fast.soft_nms(segments, scores, labels, *setting)
    expected_order, expected_decayed = reference.soft_nms(segments, scores, labels, *setting)
    assert torch.equal(order, expected_order) and torch.equal(decayed, expected_decayed)
    assert torch.equal(
        torch.ops.lofi_fast.nms(segments, scores, labels, 0.4), reference.nms(segments, scores, labels, 0.4)
    )


@pytest.mark.parametrize("form", [reference.nms, torch.ops.lofi_fast.nms], ids=["reference", "operator"])
def test_nms_by_hand(form) -> None:
    segments = torch.tensor([[0.0, 4.0], [0.0, 3.0], [2.0, 6.0], [0.0, 3.0], [0.0, 4.0]], dtype=torch.float64)
    scores = torch.tensor([0.5, 0.9, 0.4, 0.9, 0.1], dtype=torch.float64)
    # 1 and 3 tie and are identical: the lower index stays. 0 overlaps 1 by 3/4, 2 by 1/6. 4 has a label of its own.
    assert form(segments, scores, torch.tensor([0, 0, 0, 0, 1]), 0.5).tolist() == [1, 2, 4]
    assert form(segments, scores, torch.tensor([0, 0, 0, 0, 1]), 0.75).tolist() == [1, 0, 2, 4]


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_scores_come_back_in_their_dtype_from_float64_arithmetic(dtype) -> None:
    segments, scores, labels = candidates(80, 2, seed=11)
    segments, scores = segments.to(dtype), scores.to(dtype)
    order, decayed = soft_nms(segments, scores, labels)
    expected_order, expected = reference.soft_nms(segments.double(), scores.double(), labels, *SETTINGS["gtad"])
    assert decayed.dtype == dtype
    assert torch.equal(order, expected_order)
    assert torch.equal(decayed, expected.to(dtype))


@pytest.mark.gpu
def test_results_come_back_on_the_device_of_the_scores() -> None:
    segments, scores, labels = candidates(80, 2, seed=13)
    order, decayed = soft_nms(segments.cuda(), scores.cuda(), labels.cuda())
    expected_order, expected = soft_nms(segments, scores, labels)
    assert order.is_cuda and torch.equal(order.cpu(), expected_order)
    assert decayed.is_cuda and torch.equal(decayed.cpu(), expected)
    kept = nms(segments.cuda(), scores.cuda(), labels.cuda(), 0.5)
    assert kept.is_cuda and torch.equal(kept.cpu(), nms(segments, scores, labels, 0.5))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"segments": torch.tensor([[0.0, math.nan], [0.0, 1.0]])}, "NaN"),
        ({"segments": torch.tensor([[0.0, math.inf], [0.0, 1.0]])}, "infinity"),
        ({"scores": torch.tensor([math.nan, 0.5])}, "NaN"),
        ({"scores": torch.tensor([-0.1, 0.5])}, "at least 0"),
        ({"scores": torch.tensor([1, 0])}, "floating point"),
        ({"scores": torch.tensor([0.5])}, r"\(N, 2\)"),
        ({"segments": torch.tensor([[1.0, 0.0], [0.0, 1.0]])}, "after its start"),
        ({"labels": torch.tensor([0.0, 1.0])}, "int64"),
        ({"labels": torch.tensor([0])}, "labels must be"),
        ({"sigma": 0.0}, "sigma"),
        ({"sigma": math.nan}, "sigma"),
        ({"max_keep": -1}, "max_keep"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_wrong_input_is_a_value_error(change, message) -> None:
    good = {"segments": torch.tensor([[0.0, 1.0], [0.0, 1.0]]), "scores": torch.tensor([0.6, 0.5])}
    with pytest.raises(ValueError, match=message):
        soft_nms(**(good | change))
    if not change.keys() & {"sigma", "max_keep"} and message != "at least 0":
        with pytest.raises(ValueError, match=message):
            nms(**({"labels": None} | good | change), iou_threshold=0.5)


@pytest.mark.usefixtures("native")
def test_cpp_refuses_what_cannot_be_ordered() -> None:
    with pytest.raises(RuntimeError, match="candidate 1 has a NaN"):
        torch.ops.lofi_fast.nms(
            torch.ones(2, 2).double(), torch.tensor([0.5, math.nan]).double(), torch.zeros(2).long(), 0.5
        )


@pytest.mark.parametrize(
    "inputs", [HOSTILE["many_labels"], HOSTILE["strided"], HOSTILE["none"]], ids=["many", "strided", "none"]
)
def test_opcheck(inputs) -> None:
    torch.library.opcheck(torch.ops.lofi_fast.soft_nms.default, (*inputs, 0.84, 0.0, 0.0, 40, 0.0))
    torch.library.opcheck(torch.ops.lofi_fast.nms.default, (*inputs, 0.5))


SWITCHED_OFF = """
import torch
from lofi_fast import kernels
segments = torch.tensor([[0.0, 4.0], [1.0, 5.0], [1.0, 5.0]], dtype=torch.float64)
scores = torch.tensor([0.8, 0.9, 0.7], dtype=torch.float64)
labels = torch.tensor([0, 0, 1])
print(kernels.native_available(), kernels.describe(), kernels.soft_nms(segments, scores, labels), sep="\\n")
torch.library.opcheck(torch.ops.lofi_fast.soft_nms.default, (segments, scores, labels, 0.84, 0.0, 0.0, None, 0.0))
torch.library.opcheck(torch.ops.lofi_fast.nms.default, (segments, scores, labels, 0.5))
"""


def run_python(script: str, native: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"LOFI_FAST_NATIVE": native, "PYTHONPATH": os.pathsep.join(sys.path)}
    return subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True)


def test_switched_off_it_runs_the_reference_and_says_so() -> None:
    done = run_python(SWITCHED_OFF, native="0")
    assert done.returncode == 0, done.stderr
    available, forms, result = done.stdout.split("\n", 2)
    assert available == "False"
    assert re.search(r"\bsoft_nms\b[\w, ]*: reference \(LOFI_FAST_NATIVE=0\)", forms)
    assert "C++" not in forms and not done.stderr
    decayed = 0.8 * math.exp(-((3 / 5) ** 2) / 0.84)
    assert result.startswith(f"(tensor([1, 2, 0]), tensor([0.9000, 0.7000, {decayed:.4f}]")


def test_a_misspelt_setting_is_an_error() -> None:
    done = run_python("import lofi_fast.kernels", native="yes")
    assert done.returncode != 0
    assert "LOFI_FAST_NATIVE is 'yes'; it must be auto, 1 or 0" in done.stderr

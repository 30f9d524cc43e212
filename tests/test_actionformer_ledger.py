"""ActionFormer's ledger: held to what autograd saves and to the tensors that are alive in real steps."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from networks import BF16, FP32, Alive, fill, frames, precision, saved_bytes
from torch import Tensor

from lofi_fast.config import ActionFormerConfig
from lofi_fast.encoder.lean import encode
from lofi_fast.encoder.resnet import TSMResNet
from lofi_fast.encoder.resnet_ledger import ResNetLedger
from lofi_fast.fidelity import FRAMES_PER_SNIPPET, Fidelity
from lofi_fast.head import ledger_of
from lofi_fast.head.actionformer_head import ActionFormerHead, Counts
from lofi_fast.head.actionformer_ledger import ActionFormerLedger
from lofi_fast.head.dropout import video_dropout
from lofi_fast.head.protocol import total
from lofi_fast.ledger import FLOAT, Pass, Tally
from lofi_fast.memory.step_bytes import Setting, head_bytes, step_bytes
from lofi_fast.presets import actionformer_anet, actionformer_thumos

SMALL = ActionFormerConfig(hidden=32, attention_heads=4, attention_window=7, levels=3)
WIDE = ActionFormerConfig(hidden=128, attention_heads=4, attention_window=19, levels=4)
LOSS_TERMS = 3  # with their sum: alive, but not saved


pytestmark = pytest.mark.usefixtures("one_thread")


@dataclass(frozen=True)
class Case:
    config: ActionFormerConfig
    windows: int
    length: int
    itemsize: int = FP32
    dropout: float = 0.0
    num_features: int = 40
    num_classes: int = 6

    @property
    def ledger(self) -> ActionFormerLedger:
        return ActionFormerLedger(self.config, self.num_features, self.num_classes, self.dropout)

    def head(self) -> ActionFormerHead:
        torch.manual_seed(0)
        head = ActionFormerHead(self.config, self.num_features, self.num_classes).train()
        head.seed(range(self.windows))
        return head

    def labels(self, head: ActionFormerHead) -> tuple[list[Any], Counts]:
        edges, segments = np.arange(self.length + 1.0), np.array([[0.0, 1.0], [0.5, 3.0]])
        labels = np.array([0, self.num_classes - 1])
        each = [head.targets(edges, segments, labels, np.random.default_rng(0)) for _ in range(self.windows)]
        return each, head.counts(each)

    def forward(self, head: ActionFormerHead, features_NC: Tensor, labels: tuple[list[Any], Counts]) -> tuple[Any, ...]:
        """What the joint stage holds; the loss comes last."""
        with precision(self.itemsize):
            features_BCL = features_NC.unflatten(0, (self.windows, -1)).transpose(1, 2)
            output = head(video_dropout(features_BCL, self.dropout, range(self.windows)))
        terms = head.loss(output, *labels, 1.0)
        return features_NC, output, terms, total(terms)

    def played(self) -> tuple[int, int]:
        """(kept, most) by the ledger, of both with the features."""
        tally, work = Tally(), Pass(self.windows, self.length, 16, self.itemsize, 1)
        tally.take(FLOAT * self.windows * self.length * self.num_features)
        self.ledger.forward(tally, work)
        kept = tally.now
        self.ledger.backward(tally, work)
        assert tally.now >= FLOAT * self.ledger.parameters.reached  # the gradients
        return kept, tally.peak

    def check(self) -> None:
        head = self.head()
        labels = self.labels(head)
        made = torch.randn(self.windows * self.length, self.num_features, requires_grad=True)
        known = [*head.parameters(), made, *(t for window in labels[0] for t in window)]
        features = FLOAT * made.numel()
        kept, most = self.played()
        saved = saved_bytes(known, lambda: self.forward(head, made * 1, labels))
        assert saved == kept - features - LOSS_TERMS * FLOAT, self
        with Alive(known) as alive:
            result = self.forward(head, made * 1, labels)
            assert alive.now == kept, self
            result[-1].backward()
        assert alive.peak <= most <= 1.02 * alive.peak, self


CASES = {
    f"{name}_{itemsize}_{dropout}_{windows}x{length}": Case(config, windows, length, itemsize, dropout)
    for (name, config), itemsize, dropout, (windows, length) in product(
        {
            "near": SMALL,
            "all": replace(SMALL, attention_window=1),
            "deep": replace(SMALL, levels=5, stem_blocks=1, drop_path=0.0),
        }.items(),
        (FP32, BF16),
        (0.0, 0.3),
        ((1, 12), (3, 7), (2, 16)),
    )
} | {
    "one_snippet": Case(SMALL, 2, 1),
    "narrow": Case(replace(SMALL, hidden=4, attention_heads=2, attention_window=19, levels=1), 1, 27, BF16, 0.3, 128),
    "one_level": Case(replace(SMALL, levels=1), 2, 12),
    "one_position_sees_itself": Case(replace(SMALL, levels=4, attention_window=1), 3, 5, BF16),
    "window_longer_than_the_video": Case(replace(SMALL, attention_window=31), 2, 5),
    "one_head": Case(replace(SMALL, attention_heads=1), 2, 12),
    "one_head_one_window": Case(replace(SMALL, attention_heads=1), 1, 12),
    "one_head_one_window_bf16": Case(replace(SMALL, attention_heads=1, attention_window=31), 1, 12, BF16),
    "one_class": Case(SMALL, 2, 12, num_classes=1),
    "two_classes": Case(SMALL, 2, 12, num_classes=2),
    "many_classes": Case(SMALL, 2, 40, num_classes=200),
    "weights_are_most": Case(WIDE, 1, 8, num_features=512),
    "weights_are_most_bf16": Case(WIDE, 1, 8, BF16, num_features=512),
    "activations_are_most": Case(WIDE, 4, 64),
    "activations_are_most_bf16": Case(WIDE, 4, 64, BF16),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_kept_to_the_byte_and_the_peak_within_two_per_cent(case: Case) -> None:
    case.check()


@settings(max_examples=25)
@given(
    heads=st.sampled_from([1, 2, 4]), per_head=st.sampled_from([2, 8, 16]), window=st.sampled_from([1, 3, 5, 19]),
    levels=st.integers(1, 6), stem=st.integers(1, 3), drop_path=st.sampled_from([0.0, 0.1]),
    windows=st.integers(1, 5), length=st.integers(2, 50), itemsize=st.sampled_from([FP32, BF16]),
    dropout=st.sampled_from([0.0, 0.3]), num_features=st.sampled_from([8, 128]), num_classes=st.sampled_from([1, 50]),
)  # fmt: skip
def test_so_it_is_at_any_shape(
    heads: int, per_head: int, window: int, levels: int, stem: int, drop_path: float, windows: int, length: int,
    itemsize: int, dropout: float, num_features: int, num_classes: int,
) -> None:  # fmt: skip
    config = ActionFormerConfig(
        hidden=heads * per_head, attention_heads=heads, attention_window=window, levels=levels, stem_blocks=stem,
        drop_path=drop_path,
    )  # fmt: skip
    Case(config, windows, length, itemsize, dropout, num_features, num_classes).check()


STEPS = [  # config, windows, snippets, bytes of a number, dropout, chunk, recompute, accumulates
    (SMALL, 2, 6, FP32, 0.0, 3, False, False),
    (SMALL, 1, 9, BF16, 0.3, 9, False, False),
    (WIDE, 2, 24, FP32, 0.0, 1, True, False),
    (WIDE, 3, 16, BF16, 0.0, 4, True, True),
    (replace(WIDE, attention_window=1), 2, 24, FP32, 0.2, 8, True, True),
]


@pytest.mark.parametrize(
    ("config", "windows", "length", "itemsize", "dropout", "chunk", "recompute", "accumulates"), STEPS
)
def test_a_step_with_an_encoder(
    config: ActionFormerConfig, windows: int, length: int, itemsize: int, dropout: float, chunk: int, recompute: bool,
    accumulates: bool,
) -> None:  # fmt: skip
    encoder = TSMResNet("tsm_r18", 8)
    fill(encoder)
    encoder.freeze_batchnorm()
    encoder.train().to(memory_format=torch.channels_last)
    case = Case(config, windows, length, itemsize, dropout, encoder.num_features)
    head = case.head()
    labels = case.labels(head)
    learning = [p for module in (encoder, head) for p in module.parameters()]
    if accumulates:
        for parameter in learning:
            parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
    gradients = [p.grad for p in learning if p.grad is not None]
    x = frames(windows * length * FRAMES_PER_SNIPPET, 32)
    targets = [t for window in labels[0] for t in window]
    with Alive([*learning, *encoder.buffers(), x, *gradients, *targets]) as alive:
        with precision(itemsize):
            features = encode(encoder, x, FRAMES_PER_SNIPPET, chunk=chunk, recompute=recompute)
        held = case.forward(head, features, labels)
        del features
        kept = alive.now
        held[-1].backward()
    setting = Setting(ResNetLedger("tsm_r18", 8), case.ledger, itemsize, "sgd")
    predicted = step_bytes(
        setting, Fidelity(length, 32), windows, recompute=recompute, chunk=chunk, accumulates=accumulates
    )
    assert predicted.kept_encoder + predicted.kept_head == kept
    step = predicted.kept_encoder + predicted.kept_head + predicted.transient
    assert alive.peak <= step <= 1.02 * alive.peak


@pytest.mark.parametrize("case", [CASES["near_4_0.3_3x7"], CASES["all_2_0.0_2x16"], CASES["activations_are_most_bf16"]])
def test_a_step_of_the_head_stage_and_forward_without_gradients(case: Case) -> None:
    head = case.head()
    labels = case.labels(head)
    known = [*head.parameters(), *(t for window in labels[0] for t in window)]
    predicted = head_bytes(case.ledger, case.num_features, case.windows, case.length, case.itemsize)

    def read() -> Tensor:
        each = [torch.zeros(case.num_features, case.length).clone() for _ in range(case.windows)]
        return torch.stack(each)

    with Alive(known) as alive:
        features_BCL = read()
        with precision(case.itemsize):
            output = head(video_dropout(features_BCL, case.dropout, range(case.windows)))
        terms = head.loss(output, *labels, 1.0)
        total(terms).backward()
    assert alive.peak <= predicted <= 1.03 * alive.peak
    head.eval()
    del features_BCL, output, terms
    with Alive(known) as without, torch.no_grad(), precision(case.itemsize):
        head(read())
    assert without.peak < alive.peak


@pytest.mark.parametrize("class_loss", [True, False])
def test_it_is_the_networks(class_loss: bool) -> None:
    for preset in (actionformer_anet, actionformer_thumos):
        config = replace(preset(), actionformer=replace(preset().actionformer, hidden=64, levels=3))
        numbers = [p.numel() for p in ActionFormerHead(config.actionformer, 24, 7).parameters()]
        ledger = ledger_of(config, 24, 7, class_loss)
        assert ledger is not None
        assert (ledger.parameters.tensors, ledger.parameters.numbers) == (len(numbers), sum(numbers))
        assert ledger.parameters.held == FLOAT * sum(numbers) == FLOAT * ledger.parameters.reached


@settings(max_examples=60)
@given(st.sampled_from([SMALL, WIDE]), st.integers(1, 100), st.integers(1, 8), st.sampled_from([FP32, BF16]))
def test_more_needs_more(config: ActionFormerConfig, length: int, windows: int, itemsize: int) -> None:
    kept, most = Case(config, windows, length, itemsize).played()
    for more in (Case(config, windows, length + 1, itemsize), Case(config, windows + 1, length, itemsize)):
        assert more.played()[0] > kept and more.played()[1] > most

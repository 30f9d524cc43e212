"""The ledger of bytes: held to what autograd saves and to the tensors that are alive in real steps."""

from __future__ import annotations

import inspect
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from typing import Any, Literal

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from networks import BF16, FP32, Alive, fill, frames, precision, saved_bytes, storage
from torch import Tensor

from lofi_fast.config import BMNConfig, EncoderName, HeadConfig, StageConfig
from lofi_fast.data.pipeline import FramePipeline
from lofi_fast.encoder import lean, resnet_ledger
from lofi_fast.encoder.lean import encode
from lofi_fast.encoder.resnet import TSMResNet
from lofi_fast.encoder.resnet_ledger import ResNetLedger
from lofi_fast.encoder.resnet_table import BLOCKS, network
from lofi_fast.fidelity import FRAMES_PER_SNIPPET, Fidelity
from lofi_fast.head import map_ledger
from lofi_fast.head.bmn import BMN
from lofi_fast.head.bmn_ledger import BMNLedger
from lofi_fast.head.dropout import video_dropout
from lofi_fast.head.gtad import GTAD
from lofi_fast.head.gtad_ledger import GTADLedger
from lofi_fast.head.loss import Counts, LossTerms, tal_loss
from lofi_fast.head.map_ledger import MapLedger
from lofi_fast.head.targets import Targets, make_targets
from lofi_fast.kernels import boundary_matching_grid, proposal_grid
from lofi_fast.kernels.align_linear.sampling import SamplingWeights, weights_of
from lofi_fast.ledger import FLOAT, LONG, Parameters, Pass, Stage, Tally, default_chunk
from lofi_fast.memory.step_bytes import Setting, StepBytes, features_bytes, head_bytes, pretrain_bytes, step_bytes
from lofi_fast.optim import make_optimizer
from lofi_fast.presets import activitynet, demo, thumos

SMALL = HeadConfig(hidden=32, groups=4, inner_bins=5, context_bins=2, map_channels=24, class_bins=3)
LARGE = HeadConfig(hidden=128, groups=16, inner_bins=16, map_channels=256)
RELEASED, PAPER = BMNConfig(), BMNConfig(definition="paper")
NUM_CLASSES = 6


pytestmark = pytest.mark.usefixtures("one_thread")


def frozen(name: EncoderName, width: int) -> TSMResNet:
    encoder = TSMResNet(name, width)
    fill(encoder)
    encoder.freeze_batchnorm()
    return encoder.train().to(memory_format=torch.channels_last)


def setting_of(
    name: EncoderName,
    width: int,
    head: HeadConfig,
    num_classes: int,
    full_snippets: int,
    itemsize: int,
    class_loss: bool,
    optimizer: Literal["sgd", "adam", "adamw"],
    eight_bit: bool = False,
    bmn: BMNConfig | None = None,
) -> Setting:
    encoder = ResNetLedger(name, width)
    of_head = head_ledger(head, bmn, encoder.num_features, num_classes, full_snippets, class_loss)
    return Setting(encoder, of_head, itemsize, optimizer, eight_bit)


def head_ledger(
    head: HeadConfig, bmn: BMNConfig | None, num_features: int, num_classes: int, full: int, class_loss: bool
) -> MapLedger:
    if bmn is None:
        return GTADLedger(head, num_features, num_classes, full, class_loss)
    return BMNLedger(head, num_features, num_classes, full, class_loss, bmn)


def known(setting: Setting | None) -> Setting:
    assert setting is not None
    return setting


# Kept


ENCODED = [  # encoder, width, side, snippets, chunk, bytes of a number
    ("tsm_r18", 8, 64, 1, 1, FP32),
    ("tsm_r18", 16, 50, 3, 2, BF16),
    ("tsm_r18", 8, 33, 2, 5, FP32),
    ("tsm_r34", 8, 46, 3, 1, FP32),
    ("tsm_r34", 8, 31, 2, 1, BF16),
    ("tsm_r50", 8, 38, 2, 2, FP32),
    ("tsm_r50", 8, 57, 3, 2, BF16),
]


@pytest.mark.parametrize(("name", "width", "side", "snippets", "chunk", "itemsize"), ENCODED)
def test_kept_by_the_encoder_to_the_byte(
    name: EncoderName, width: int, side: int, snippets: int, chunk: int, itemsize: int
) -> None:
    encoder = frozen(name, width)
    x = frames(snippets * FRAMES_PER_SNIPPET, side)
    known = [*encoder.parameters(), *encoder.buffers()]
    arguments = (name, width, side, len(x), itemsize)

    def forward(**how: bool) -> Tensor:
        return encode(encoder, x, FRAMES_PER_SNIPPET, chunk=chunk, **how)

    with precision(itemsize):
        for recompute, eight_bit in product((False, True), repeat=2):
            how = {"recompute": recompute, "eight_bit": eight_bit}
            assert saved_bytes(known, partial(forward, **how)) == resnet_ledger.lean_kept_bytes(*arguments, **how), how
        plain = saved_bytes(known, lambda: encoder(x, FRAMES_PER_SNIPPET))
    assert plain == resnet_ledger.plain_kept_bytes(*arguments)


@dataclass
class HeadCase:
    config: HeadConfig
    full: int
    batch: int
    length: int
    itemsize: int
    class_loss: bool
    bmn: BMNConfig | None = None  # None: G-TAD

    def head(self, num_features: int) -> GTAD | BMN:
        torch.manual_seed(0)
        if self.bmn is None:
            return GTAD(self.config, num_features, NUM_CLASSES, self.full).train()
        return BMN(self.config, self.bmn, num_features, NUM_CLASSES, self.full).train()

    def labels(self, head: GTAD | BMN) -> tuple[Targets, Counts]:
        edges, segments = np.arange(self.length + 1.0), np.array([[0.0, 1.0], [1.0, 2.0]])
        duration, rng = head.max_duration(self.length), np.random.default_rng(0)
        each = [
            make_targets(edges, segments, np.array([0, 2]), duration, NUM_CLASSES, rng, with_zero=False)
            for _ in range(self.batch)
        ]
        return Targets.stack(each, torch.device("cpu")), Counts.of(each, 0.9)

    def cells(self, head: GTAD | BMN) -> list[Tensor]:
        """Of its grid: the head looks at them, and has not made them."""
        sizes = (self.length, head.max_duration(self.length), self.config.inner_bins)
        if self.bmn is not None:
            return [boundary_matching_grid(*sizes, self.bmn.samples, self.bmn.definition).cells]
        return [proposal_grid(*sizes).cells]

    def forward(self, head: GTAD | BMN, features_NC: Tensor) -> tuple[object, LossTerms, Tensor]:
        """The output, the terms and their sum: what the joint stage holds."""
        with precision(self.itemsize):
            features_BCL = features_NC.unflatten(0, (self.batch, -1)).transpose(1, 2)
            output = head(video_dropout(features_BCL, self.config.dropout, range(self.batch)))
        targets, counts = self.labels(head)
        terms = tal_loss(output, targets, counts, positive_iou=0.9, class_weight=float(self.class_loss))
        return output, terms, terms.total


HEADS = (
    [
        HeadCase(replace(SMALL, middle_kernel=kernel, dropout=dropout), 12, batch, length, itemsize, class_loss)
        for (kernel, dropout, itemsize, class_loss), (batch, length) in product(
            product((1, 3), (0.0, 0.3), (FP32, BF16), (True, False)), ((1, 12), (3, 7))
        )
    ]
    + [
        HeadCase(replace(SMALL, middle_kernel=kernel, max_duration=duration), 24, 2, length, FP32, True)
        for kernel, duration, length in ((1, 9, 12), (3, 9, 12), (3, 1, 5), (3, 40, 2), (1, 5, 24))
    ]
    + [
        HeadCase(replace(SMALL, dropout=dropout, max_duration=duration), 24, 2, length, itemsize, class_loss, bmn)
        for bmn, dropout, itemsize, class_loss, (duration, length) in product(
            (RELEASED, PAPER), (0.0, 0.3), (FP32, BF16), (True, False), ((None, 12), (9, 12), (40, 2))
        )
    ]
)


def test_kept_by_the_head_and_the_loss_to_the_byte() -> None:
    num_features = 40
    for case in HEADS:
        head = case.head(num_features)
        ledger = head_ledger(case.config, case.bmn, num_features, NUM_CLASSES, case.full, case.class_loss)
        sizes = ledger.sizes(case.batch, case.length)
        assert sizes.cells == case.labels(head)[0].iou.numel(), case
        assert sizes.duration == head.max_duration(case.length), case
        made = torch.randn(case.batch * case.length, num_features, requires_grad=True)
        known = [*head.parameters(), *case.cells(head), made]
        kept = sum(stage.kept for stage in map_ledger.stages(ledger, sizes, case.itemsize))
        held = map_ledger.held_bytes(sizes, case.itemsize, case.class_loss)

        def forward(case: HeadCase = case, head: GTAD | BMN = head, made: Tensor = made) -> tuple[object, ...]:
            features_NC = made * 1  # a new tensor, as the encoder's
            return features_NC, *case.forward(head, features_NC)

        assert saved_bytes(known, forward) == kept + held.saved, case
        with Alive(known) as alive:
            result = forward()
        assert alive.now == kept + sum(held), case
        del result


# The peak


@dataclass(frozen=True)
class StepCase:
    name: EncoderName
    width: int
    side: int
    length: int
    batch: int
    head: HeadConfig
    itemsize: int = FP32
    recompute: bool = False
    chunk: int | None = None
    accumulates: bool = False
    class_loss: bool = True
    full: int | None = None
    eight_bit: bool = False
    bmn: BMNConfig | None = None

    def predicted(self) -> StepBytes:
        setting = setting_of(
            self.name, self.width, self.head, NUM_CLASSES, self.full or self.length, self.itemsize, self.class_loss,
            "sgd", self.eight_bit, self.bmn,
        )  # fmt: skip
        return step_bytes(
            setting, Fidelity(self.length, self.side), self.batch, recompute=self.recompute, chunk=self.chunk,
            accumulates=self.accumulates,
        )  # fmt: skip

    def measured(self) -> tuple[int, int]:
        """(alive when forward is done, the most that was) of a real step's tensors beyond parameters and frames, and
        gradients that were there before.
        """
        encoder = frozen(self.name, self.width)
        case = HeadCase(
            self.head, self.full or self.length, self.batch, self.length, self.itemsize, self.class_loss, self.bmn
        )
        head = case.head(encoder.num_features)
        learning = [p for module in (encoder, head) for p in module.parameters()]
        case.forward(head, torch.zeros(self.batch * self.length, encoder.num_features))  # the grids, which stay
        if self.accumulates:
            for parameter in learning:
                parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
        x = frames(self.batch * self.length * FRAMES_PER_SNIPPET, self.side)
        gradients = [p.grad for p in learning if p.grad is not None]
        with Alive([*learning, *encoder.buffers(), x, *case.cells(head), *gradients]) as alive:
            with precision(self.itemsize):
                features = encode(
                    encoder, x, FRAMES_PER_SNIPPET,
                    chunk=self.chunk, recompute=self.recompute, eight_bit=self.eight_bit,
                )  # fmt: skip
            output, terms, total = case.forward(head, features)
            kept = alive.now
            total.backward()
            del features, output, terms
        assert alive.now <= kept + sum(p.numel() * 4 for p in learning)  # nothing is left but gradients
        return kept, alive.peak


THREE = replace(SMALL, middle_kernel=3, dropout=0.3)
STEPS = {
    "one_chunk": StepCase("tsm_r18", 8, 46, 4, 1, SMALL, chunk=9),
    "chunks": StepCase("tsm_r18", 16, 64, 7, 1, SMALL, chunk=2),
    "default_chunk": StepCase("tsm_r18", 8, 90, 6, 2, SMALL),
    "few_pixels": StepCase("tsm_r18", 16, 32, 4, 2, LARGE, chunk=2),
    "bf16": StepCase("tsm_r18", 16, 50, 5, 2, THREE, BF16, chunk=3),
    "bf16_one_chunk": StepCase("tsm_r18", 16, 32, 4, 1, THREE, BF16, chunk=4),
    "bf16_many_chunks": StepCase("tsm_r18", 32, 24, 6, 1, SMALL, BF16, chunk=1),  # its weights are most of its bytes
    "many_chunks_again": StepCase("tsm_r18", 32, 24, 6, 1, SMALL, recompute=True, chunk=1),
    "r50_many_chunks_again": StepCase("tsm_r50", 16, 24, 6, 1, SMALL, recompute=True, chunk=1, accumulates=True),
    "8bit_many_chunks_again": StepCase("tsm_r18", 32, 24, 6, 1, SMALL, BF16, True, chunk=1, eight_bit=True),
    "bf16_many_chunks_again": StepCase("tsm_r34", 16, 24, 6, 1, SMALL, BF16, recompute=True, chunk=1),
    "bf16_r50_many_chunks": StepCase("tsm_r50", 16, 32, 5, 1, THREE, BF16, chunk=1, accumulates=True),
    "again": StepCase("tsm_r18", 8, 64, 8, 2, SMALL, recompute=True, chunk=3),
    "again_one_chunk": StepCase("tsm_r18", 8, 46, 3, 1, THREE, recompute=True, chunk=3),
    "again_bf16": StepCase("tsm_r18", 8, 64, 8, 1, THREE, BF16, recompute=True, chunk=2),
    "again_large_head": StepCase("tsm_r18", 8, 32, 16, 2, LARGE, recompute=True, chunk=1, full=32),
    "again_large_head_bf16": StepCase("tsm_r18", 8, 32, 16, 1, LARGE, BF16, recompute=True, chunk=2),
    "again_3x3": StepCase("tsm_r18", 8, 32, 24, 2, replace(LARGE, middle_kernel=3, max_duration=16), recompute=True,
                          chunk=8, accumulates=True, full=48),
    "many_classes": StepCase("tsm_r18", 8, 32, 24, 3, replace(SMALL, class_bins=8), recompute=True, chunk=1,
                             accumulates=True),
    "adds": StepCase("tsm_r18", 8, 46, 6, 1, LARGE, chunk=2, accumulates=True),
    "adds_again_bf16": StepCase("tsm_r18", 8, 46, 6, 2, THREE, BF16, True, 2, True),
    "no_class_loss": StepCase("tsm_r18", 8, 40, 9, 2, THREE, chunk=4, class_loss=False),
    "no_class_loss_again": StepCase("tsm_r18", 8, 40, 9, 2, LARGE, BF16, True, 4, class_loss=False),
    "r34": StepCase("tsm_r34", 8, 46, 5, 1, SMALL, chunk=2),
    "r34_again_bf16": StepCase("tsm_r34", 8, 46, 5, 1, THREE, BF16, True, 2, True),
    "r50": StepCase("tsm_r50", 8, 46, 5, 1, THREE, chunk=2),
    "r50_bf16": StepCase("tsm_r50", 8, 50, 4, 1, SMALL, BF16, chunk=3, accumulates=True),
    "r50_again": StepCase("tsm_r50", 8, 46, 6, 1, SMALL, recompute=True, chunk=2),
    "8bit": StepCase("tsm_r18", 16, 64, 7, 1, SMALL, chunk=2, eight_bit=True),
    "8bit_one_chunk": StepCase("tsm_r18", 8, 46, 4, 1, SMALL, chunk=9, eight_bit=True),
    "8bit_bf16": StepCase("tsm_r18", 16, 50, 5, 2, THREE, BF16, chunk=3, eight_bit=True),
    "8bit_again": StepCase("tsm_r18", 8, 64, 8, 2, SMALL, recompute=True, chunk=3, eight_bit=True),
    "8bit_again_bf16": StepCase("tsm_r34", 8, 46, 5, 1, THREE, BF16, True, 2, True, eight_bit=True),
    "8bit_r50": StepCase("tsm_r50", 8, 64, 5, 1, THREE, chunk=2, eight_bit=True),
    "8bit_r50_bf16": StepCase("tsm_r50", 8, 50, 4, 1, SMALL, BF16, chunk=3, accumulates=True, eight_bit=True),
    "bmn": StepCase("tsm_r18", 8, 46, 6, 2, SMALL, chunk=2, bmn=RELEASED),
    "bmn_large": StepCase("tsm_r18", 8, 32, 24, 2, LARGE, recompute=True, chunk=1, bmn=RELEASED),
    "bmn_large_bf16": StepCase("tsm_r18", 8, 32, 24, 2, LARGE, BF16, True, 2, True, bmn=RELEASED),
    "bmn_short_actions": StepCase("tsm_r18", 8, 32, 24, 2, replace(LARGE, max_duration=16), recompute=True, chunk=8,
                                  accumulates=True, full=48, bmn=RELEASED),
    "bmn_few_samples": StepCase("tsm_r18", 8, 32, 24, 2, replace(LARGE, inner_bins=2, map_channels=64), recompute=True,
                                chunk=1, bmn=RELEASED),
    "bmn_paper": StepCase("tsm_r18", 8, 32, 24, 3, replace(LARGE, max_duration=8), recompute=True, chunk=1, bmn=PAPER),
    "bmn_dropout_bf16": StepCase("tsm_r18", 16, 50, 5, 2, THREE, BF16, chunk=3, bmn=RELEASED),
    "bmn_no_class_loss": StepCase("tsm_r18", 8, 40, 9, 2, LARGE, BF16, True, 4, class_loss=False, bmn=RELEASED),
    "8bit_r50_again": StepCase("tsm_r50", 8, 46, 6, 1, SMALL, recompute=True, chunk=2, eight_bit=True),
}  # fmt: skip


@pytest.mark.parametrize("case", STEPS.values(), ids=STEPS)
def test_a_step_keeps_and_needs_what_is_predicted(case: StepCase) -> None:
    kept, peak = case.measured()
    predicted = case.predicted()
    assert predicted.kept_encoder + predicted.kept_head == kept
    step = predicted.kept_encoder + predicted.kept_head + predicted.transient
    assert peak <= step <= 1.02 * peak


@pytest.mark.parametrize(("snippets", "chunk"), [(5, 2), (3, 3), (4, 1)])
@pytest.mark.parametrize("itemsize", [FP32, BF16])
@pytest.mark.parametrize("name", ["tsm_r18", "tsm_r50"])
def test_features_without_gradients(name: EncoderName, itemsize: int, snippets: int, chunk: int) -> None:
    encoder = frozen(name, 8)
    x = frames(snippets * FRAMES_PER_SNIPPET, 46)
    known = [*encoder.parameters(), *encoder.buffers(), x]
    with torch.no_grad(), Alive(known) as alive, precision(itemsize):
        features = encode(encoder, x, FRAMES_PER_SNIPPET, chunk=chunk)
    tally = Tally()
    ResNetLedger(name, 8).without_gradients(tally, Pass(1, snippets, 46, itemsize, chunk))
    assert alive.peak <= tally.peak <= 1.02 * alive.peak
    assert features.shape[0] == snippets


# The other stages


LIVE = [
    ("tsm_r18", 8, 46, 4, FP32), ("tsm_r18", 16, 64, 5, FP32), ("tsm_r18", 24, 50, 7, BF16),
    ("tsm_r18", 32, 24, 4, BF16),
    ("tsm_r34", 8, 90, 2, BF16), ("tsm_r34", 16, 50, 4, FP32), ("tsm_r34", 16, 24, 8, BF16),
    ("tsm_r34", 24, 24, 4, FP32),
    ("tsm_r50", 8, 32, 6, FP32), ("tsm_r50", 8, 46, 3, BF16), ("tsm_r50", 16, 33, 5, FP32),
    ("tsm_r50", 16, 64, 2, BF16),
]  # fmt: skip


@pytest.mark.parametrize(("name", "width", "side", "clips", "itemsize"), LIVE)
def test_a_step_of_pretraining(name: EncoderName, width: int, side: int, clips: int, itemsize: int) -> None:
    encoder, x = TSMResNet(name, width), frames(clips * FRAMES_PER_SNIPPET, side)
    fill(encoder)
    encoder.train().to(memory_format=torch.channels_last)
    classifier, shares = torch.nn.Linear(encoder.num_features, NUM_CLASSES), torch.full((clips, NUM_CLASSES), 1 / 6)
    known = [*encoder.parameters(), *encoder.buffers(), *classifier.parameters(), x, shares]
    with Alive(known) as alive:
        with precision(itemsize):
            logits = classifier(encoder(x, FRAMES_PER_SNIPPET))
        torch.nn.functional.cross_entropy(logits.float(), shares).backward()
    predicted = pretrain_bytes(ResNetLedger(name, width), NUM_CLASSES, clips, side, itemsize) - 2 * x.nbytes
    assert alive.peak <= predicted <= 1.03 * alive.peak


@pytest.mark.parametrize("width", [8, 32])
@pytest.mark.parametrize(("snippets", "chunk", "side"), [(6, 2, 46), (4, 4, 64), (5, 1, 90)])
@pytest.mark.parametrize("itemsize", [FP32, BF16])
def test_encoding_features(itemsize: int, snippets: int, chunk: int, side: int, width: int) -> None:
    encoder, x = frozen("tsm_r18", width), frames(snippets * FRAMES_PER_SNIPPET, side)
    with torch.no_grad(), Alive([*encoder.parameters(), *encoder.buffers()]) as alive:
        decoded = x.clone()
        with precision(itemsize):
            features = encode(encoder, decoded, FRAMES_PER_SNIPPET, chunk=chunk)
        features = features.float().T.contiguous()
    predicted = features_bytes(ResNetLedger("tsm_r18", width), snippets, snippets, chunk, side, itemsize)
    assert alive.peak <= predicted <= 1.03 * alive.peak
    assert features.shape == (encoder.num_features, snippets)


HEAD_STEPS = [
    (SMALL, 4, 32, 64, FP32, True, None),
    (SMALL, 2, 48, 96, BF16, True, None),
    (LARGE, 2, 40, 64, FP32, True, None),
    (LARGE, 3, 32, 48, BF16, False, None),
    (SMALL, 1, 64, 64, FP32, False, None),
    (replace(SMALL, dropout=0.3), 3, 32, 24, FP32, True, None),
    (replace(SMALL, dropout=0.3), 3, 40, 32, BF16, False, None),
    (replace(SMALL, middle_kernel=3), 4, 32, 64, BF16, True, None),
    (replace(LARGE, middle_kernel=3, dropout=0.2), 2, 32, 64, FP32, True, None),
    (replace(SMALL, class_bins=8), 5, 32, 64, BF16, True, None),
    (SMALL, 4, 32, 32, FP32, True, RELEASED),
    (LARGE, 2, 40, 64, BF16, False, RELEASED),
    (replace(LARGE, dropout=0.2, max_duration=9), 2, 32, 64, FP32, True, PAPER),
]


@pytest.mark.parametrize(("head", "videos", "length", "channels", "itemsize", "class_loss", "bmn"), HEAD_STEPS)
def test_a_step_of_the_head_stage(
    head: HeadConfig, videos: int, length: int, channels: int, itemsize: int, class_loss: bool, bmn: BMNConfig | None
) -> None:
    case = HeadCase(head, length, videos, length, itemsize, class_loss, bmn)
    module = case.head(channels)
    case.forward(module, torch.zeros(videos * length, channels))  # the grids, which stay
    targets, counts = case.labels(module)
    labels = [value for value in vars(targets).values() if isinstance(value, Tensor)]
    with Alive([*module.parameters(), *case.cells(module), *labels]) as alive:
        read = [torch.zeros(channels, length).clone() for _ in range(videos)]
        features_BCL = torch.stack(read)
        del read
        with precision(itemsize):
            output = module(video_dropout(features_BCL, head.dropout, range(videos)))
        terms = tal_loss(output, targets, counts, positive_iou=0.9, class_weight=float(class_loss))
        terms.total.backward()
    ledger = head_ledger(head, bmn, channels, NUM_CLASSES, length, class_loss)
    predicted = head_bytes(ledger, channels, videos, length, itemsize)
    assert alive.peak <= predicted <= 1.03 * alive.peak


# What does not change from step to step


@pytest.mark.parametrize("name", BLOCKS)
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("class_loss", [True, False])
def test_parameters_gradients_and_optimizer_state(
    name: EncoderName, optimizer: Literal["sgd", "adamw"], class_loss: bool
) -> None:
    encoder, head = frozen(name, 8), GTAD(THREE, network(name, 8, 32).num_features, NUM_CLASSES, 10)
    setting = setting_of(name, 8, THREE, NUM_CLASSES, 10, FP32, class_loss, optimizer)
    bytes_ = step_bytes(setting, Fidelity(10, 32), 1, accumulates=True)
    learning = [p for module in (encoder, head) for p in module.parameters() if p.requires_grad]
    tensors = [t for module in (encoder, head) for t in (*module.parameters(), *module.buffers())]
    assert bytes_.parameters == sum(t.nbytes for t in tensors)
    without = [] if class_loss else list(head.classifier.parameters())
    assert bytes_.gradients == sum(p.nbytes for p in learning) - sum(p.nbytes for p in without)
    if optimizer == "sgd":
        with_momentum = StageConfig(epochs=1, batch=1, optimizer="sgd", lr=0.1, momentum=0.9)
        buffers = make_optimizer(with_momentum, learning, "torch").state.values()
        held = step_bytes(replace(setting, momentum=True), Fidelity(10, 64), 1).optimizer
        assert held == sum(t.nbytes for of in buffers for t in of.values()) > 0
    made = make_optimizer(StageConfig(epochs=1, batch=1, optimizer=optimizer, lr=0.1), learning, "torch")
    state = [t for of in made.state.values() for t in of.values() if isinstance(t, Tensor)]
    assert bytes_.optimizer == sum(t.nbytes for t in state)


def grid_bytes(config: HeadConfig, full: int, length: int, device: Literal["cpu", "cuda"]) -> int:
    """The sampling weights of the head's proposals at one L, on `device`. They stay for every L that was used. On a CPU
    those that run are beside them, by groups (`grouped_bytes`).
    """
    duration = config.longest(length, full)
    cells = np.array([(d, s) for d in range(duration) for s in range(length - d)])
    inner, context = (sampled(cells, length, bins, 0.5, 0.0) for bins in (config.inner_bins, config.context_bins))
    classes = sampled(cells, length, config.class_bins, 0.0, 0.5)

    def sparse(weights: int, bins: int, value_bytes: int) -> int:
        """A matrix by compressed rows, and its transpose."""
        return 4 * (len(cells) + 1 + length * bins + 1) + 2 * weights * (4 + value_bytes)

    both, bins = inner + context, config.inner_bins + config.context_bins
    if device == "cuda":
        return sparse(both, bins, FLOAT) + sparse(classes, config.class_bins, FLOAT)
    # Each grid in float64 with its rois, cells and how many cells a duration has; the sum of inner and context.
    grids = ((inner, config.inner_bins), (context, config.context_bins), (classes, config.class_bins))
    exact = sum(sparse(weights, bins, 8) + len(cells) * (2 * FLOAT + 2 * LONG) for weights, bins in grids)
    return exact + len(grids) * LONG * min(duration, length) + sparse(both, bins, 8)


def grouped_bytes(weights: SamplingWeights, cells: Tensor) -> int:
    """The weights and their transpose in fp32, by groups of 8 rows."""
    length, bins = weights.num_snippets, weights.num_bins
    values = np.zeros((len(cells), length * bins), dtype=np.float32)
    row = np.repeat(np.arange(len(cells)), weights.forward.offsets.diff())
    values[row, weights.forward.columns] = weights.forward.values
    durations = cells[:, 0].numpy()
    of_cells = [np.flatnonzero(durations == d) for d in range(durations.max() + 1)]
    of_bins = [np.arange(r, length * bins, bins) for r in range(bins)]

    def of(values: Any, row_runs: list[Any], column_runs: list[Any]) -> int:
        gap = [-1] * 7  # stands for a column that is not there
        places = np.array(gap + [column for run in column_runs for column in [*run, *gap]])
        starts = np.arange(len(places) - 7)
        groups = shared = strips = diagonals = singles = 0
        for rows in (run[k : k + 8] for run in row_runs for k in range(0, len(run), 8)):
            read = np.stack([places[starts + i] for i in range(len(rows))])
            found = values[rows[:, None], read]
            taken = (found != 0) & (read >= 0)
            whole = (taken | (read < 0)).all(0) & (taken.sum(0) > (len(rows) > 1))
            highest, lowest = (np.where(taken, found, bound) for bound in (-np.inf, np.inf))
            one = whole & (highest.max(0) == lowest.min(0))  # a weight for all rows
            for run in "".join("x" if there else " " for there in one).split():  # in strips of 4, 2 and 1
                strips += len(run) // 4 + len(run) % 4 // 2 + len(run) % 2
            groups, shared = groups + 1, shared + int(one.sum())
            diagonals, singles = diagonals + int((whole & ~one).sum()), singles + int(taken[:, ~whole].sum())
        held = 4 * (values.shape[1] + 7 * groups + strips) + FLOAT * shared
        return held + (4 + 8 * FLOAT) * diagonals + (8 + FLOAT) * singles

    return of(values, of_cells, of_bins) + of(values.T, of_bins, of_cells)


def sampled(cells: Any, length: int, bins: int, expand: float, margin: float) -> int:
    """Weights that are not 0: the snippets between which the samples of each bin of each cell lie."""
    d, s = cells.T[:, :, None].astype(np.float64)  # the precision in which samples are placed
    wider = expand * (d + 1) + margin
    step = np.maximum(d + 2 * wider, 1) / bins
    samples = np.ceil(step)
    first, last = (np.arange(bins) * step - wider + (nth + 0.5) * step / samples for nth in (0, samples - 1))  # from s
    below = np.floor(first) + (first - np.floor(first) == 1)  # a sample may lie next to nothing before a snippet
    lower, upper = (s + below).clip(0, length - 1), (s + np.ceil(last)).clip(0, length - 1)
    first, last = s + first, s + last
    return int(((upper - lower + 1) * ((last >= -1) & (first <= length))).sum())


@pytest.mark.parametrize(
    ("head", "full", "length"),
    [(SMALL, 12, 12), (replace(SMALL, inner_bins=16), 40, 9), (replace(LARGE, max_duration=64), 256, 100),
     (replace(SMALL, max_duration=30), 12, 4)],
)  # fmt: skip
def test_sampling_grids_to_the_byte(head: HeadConfig, full: int, length: int) -> None:
    proposal_grid.cache_clear()
    module = GTAD(head, 8, NUM_CLASSES, full)
    module(torch.randn(1, 8, length))
    duration = module.max_duration(length)
    inner, context = (proposal_grid(length, duration, bins) for bins in (head.inner_bins, head.context_bins))
    classes = proposal_grid(length, duration, head.class_bins, expand=0.0, margin=0.5)
    joined = weights_of((inner, context))
    used: dict[int, int] = {}
    device: list[Tensor] = []
    running = 0
    for weights in (inner.weights, context.weights, classes.weights, joined):
        held = [*weights.forward, *weights.transposed, weights.cells]
        assert weights.cells is not None
        for grouped in weights._grouped.values():
            held += [t for groups in grouped for t in groups]
            running += grouped_bytes(weights, inner.cells)
        for pair in weights._placed.values():
            held += [t for rows in pair for t in rows]
            running += sum(rows.values.nbytes for rows in pair)
        used |= {storage(t): t.nbytes for t in held if isinstance(t, Tensor)}
    # A GPU has compressed rows, as has a CPU without the C++ kernels.
    for weights in (classes.weights, joined):
        device += [t for rows in weights.on(torch.device("cpu")) for t in rows]
    for grid in (inner, context, classes):
        used |= {storage(t): t.nbytes for t in (grid.rois, grid.cells)}
    assert running > 0 and grid_bytes(head, full, length, "cpu") + running == sum(used.values())
    assert grid_bytes(head, full, length, "cuda") == sum(t.nbytes for t in device)


def test_the_tables_are_the_networks() -> None:
    head = GTADLedger(THREE, 8, 2, 4, True)
    assert len(list(GTAD(THREE, 8, 2, 4).parameters())) == head.parameters.tensors
    of_bmn = BMNLedger(LARGE, 8, 2, 4, True, RELEASED).parameters
    sizes = [parameter.numel() for parameter in BMN(LARGE, RELEASED, 8, 2, 4).parameters()]
    assert (len(sizes), sum(sizes)) == (of_bmn.tensors, of_bmn.numbers)
    assert [default_chunk(side) for side in range(1, 600)] == [
        lean.default_chunk(FRAMES_PER_SNIPPET, side) for side in range(1, 600)
    ]
    depth = inspect.signature(FramePipeline).parameters["depth"].default
    assert known(Setting.of(demo(), 6, FP32)).decoded_ahead == depth
    for name in BLOCKS:
        convs = [p.numel() for p in TSMResNet(name, 8).parameters() if p.dim() == 4]
        assert sorted(conv.weight for conv in network(name, 8, 64).convs) == sorted(convs)


# Settings and terms


def test_a_setting_is_read_from_a_config() -> None:
    assert Setting.of(thumos(), 20, BF16) == setting_of(
        "tsm_r18", 64, thumos().head, 20, 256, BF16, class_loss=False, optimizer="sgd"
    )
    assert Setting.of(demo(), 6, FP32) == setting_of(
        "tsm_r18", 32, demo().head, 6, 32, FP32, class_loss=True, optimizer="adamw"
    )


def test_bytes_a_frame_at_224_pixels() -> None:
    def frame(of: Callable[..., int], name: EncoderName, itemsize: int) -> int:
        return of(name, 64, 224, 2, itemsize) - of(name, 64, 224, 1, itemsize)

    assert [frame(resnet_ledger.lean_kept_bytes, "tsm_r18", b) for b in (FP32, BF16)] == [7_175_168, 3_763_200]
    assert [frame(resnet_ledger.plain_kept_bytes, "tsm_r18", b) for b in (FP32, BF16)] == [25_088_000, 13_346_816]
    assert frame(resnet_ledger.plain_kept_bytes, "tsm_r50", BF16) > 2.5 * frame(
        resnet_ledger.lean_kept_bytes, "tsm_r50", BF16
    )


def test_frames_are_of_this_micro_batch_and_of_those_decoded_ahead() -> None:
    setting = known(Setting.of(activitynet(), 200, BF16))
    of_video = 100 * 8 * 224 * 224 * 3
    full = step_bytes(setting, Fidelity(100, 224), 2)
    assert full.frames == 2 * 2 * of_video
    assert step_bytes(replace(setting, decoded_ahead=2), Fidelity(100, 224), 2).frames == 3 * 2 * of_video


def test_the_update_may_be_the_peak() -> None:
    setting = setting_of("tsm_r50", 64, HeadConfig(), 200, 100, BF16, True, "adamw")
    small = step_bytes(setting, Fidelity(2, 16), 1)
    assert small.total >= small.parameters + small.optimizer + (small.optimizer - 4 * (53 + 71)) // 2 + small.frames


def test_torch_is_not_loaded() -> None:
    code = "import sys, lofi_fast.memory.step_bytes; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# Properties

SETTINGS = st.builds(
    setting_of,
    name=st.sampled_from(sorted(BLOCKS)),
    width=st.sampled_from([8, 32, 64]),
    head=st.builds(
        HeadConfig, hidden=st.sampled_from([32, 256]), groups=st.just(8), map_channels=st.sampled_from([24, 512]),
        max_duration=st.sampled_from([None, 16, 64]), middle_kernel=st.sampled_from([1, 3]),
        dropout=st.sampled_from([0.0, 0.3]),
    ),
    num_classes=st.sampled_from([1, 20, 200]),
    full_snippets=st.just(100),
    itemsize=st.sampled_from([FP32, BF16]),
    class_loss=st.booleans(),
    optimizer=st.sampled_from(["sgd", "adam"]),
)  # fmt: skip
LENGTHS, SIDES, BATCHES, CHUNKS = st.integers(2, 100), st.integers(16, 224), st.integers(1, 16), st.integers(1, 40)


@settings(max_examples=200)
@given(SETTINGS, LENGTHS, SIDES, BATCHES, CHUNKS, st.booleans(), st.booleans())
def test_more_needs_more(
    setting: Setting, length: int, side: int, batch: int, chunk: int, recompute: bool, accumulates: bool
) -> None:
    def of(**changes: Any) -> StepBytes:
        values = {"length": length, "side": side, "batch": batch, "chunk": chunk, "accumulates": accumulates} | changes
        fidelity = Fidelity(values["length"], values["side"])
        return step_bytes(
            setting, fidelity, values["batch"], recompute=recompute, chunk=values["chunk"],
            accumulates=values["accumulates"],
        )  # fmt: skip

    here = of()
    assert here.transient >= 0
    assert here.total == here.between + here.added
    for more in (of(length=length + 1), of(side=side + 1), of(batch=batch + 1)):
        assert more.total >= here.total
        assert more.kept_encoder >= here.kept_encoder
    assert of(side=side + 1).frames > here.frames
    assert of(accumulates=True).total >= of(accumulates=False).total
    assert of(chunk=chunk + 1).kept_encoder == here.kept_encoder


@settings(max_examples=100)
@given(SETTINGS, LENGTHS, SIDES, st.integers(1, 8))
def test_what_is_kept_grows_by_the_video(setting: Setting, length: int, side: int, batch: int) -> None:
    none, one, two = (step_bytes(setting, Fidelity(length, side), n, chunk=3) for n in (batch, batch + 1, batch + 2))
    for name in ("frames", "kept_encoder", "kept_head"):
        assert getattr(two, name) - getattr(one, name) == getattr(one, name) - getattr(none, name) > 0
    assert one.frames * batch == none.frames * (batch + 1)
    encoder = setting.encoder
    assert isinstance(encoder, ResNetLedger)
    a_video = resnet_ledger.lean_kept_bytes(
        encoder.name, encoder.width, side, 8 * length * (batch + 1), setting.itemsize
    )
    a_video -= resnet_ledger.lean_kept_bytes(encoder.name, encoder.width, side, 8 * length * batch, setting.itemsize)
    assert one.kept_encoder - none.kept_encoder == a_video - 8 * length * 3 * side**2


@settings(max_examples=200)
@given(SETTINGS, LENGTHS, SIDES, BATCHES, CHUNKS)
def test_recomputing_keeps_the_batch_norms_alone_and_never_needs_more_than_all_activations(
    setting: Setting, length: int, side: int, batch: int, chunk: int
) -> None:
    kept = step_bytes(setting, Fidelity(length, side), batch, chunk=chunk)
    again = step_bytes(setting, Fidelity(length, side), batch, chunk=chunk, recompute=True)
    encoder = setting.encoder
    assert isinstance(encoder, ResNetLedger)
    net = network(encoder.name, encoder.width, side)
    assert again.kept_encoder == setting.itemsize * net.stem[0].weight + 8 * net.channels <= kept.kept_encoder
    assert again.kept_head == kept.kept_head
    if length * batch >= 3 * chunk:  # else most maps are there at once in any case
        assert again.total <= kept.total


@settings(max_examples=100)
@given(SETTINGS, st.integers(4, 100), st.integers(96, 224), BATCHES)
def test_recomputing_snippet_by_snippet_needs_no_more_than_any_chunk_without(
    setting: Setting, length: int, side: int, batch: int
) -> None:
    """Where weights are more than activations (few snippets, small frames), one graph can need 3% less."""
    fidelity = Fidelity(length, side)
    again = step_bytes(setting, fidelity, batch, chunk=1, recompute=True)
    for chunk in {1, 2, 3, 8, length * batch}:
        assert again.total <= step_bytes(setting, fidelity, batch, chunk=chunk).total


# Networks that step_bytes has never seen


@dataclass(frozen=True)
class PlainEncoder:
    """Keeps one number for each pixel, has one weight."""

    num_features: int = 10

    @property
    def parameters(self) -> Parameters:
        return Parameters(held=400, numbers=100, tensors=1, reached=100)

    def forward(self, tally: Tally, work: Pass) -> int:
        kept = work.snippets * FRAMES_PER_SNIPPET * work.side**2 * work.itemsize
        tally.take(kept)
        tally.spike(work.chunk * 1000)
        tally.take(FLOAT * work.snippets * self.num_features)
        return kept

    def backward(self, tally: Tally, work: Pass) -> None:
        tally.spike(FLOAT * work.snippets * self.num_features)
        tally.take(100 * work.gradient - work.snippets * FRAMES_PER_SNIPPET * work.side**2 * work.itemsize)


@dataclass(frozen=True)
class PlainHead:
    """One layer, of whose numbers the loss reaches some."""

    @property
    def parameters(self) -> Parameters:
        return Parameters(held=80, numbers=20, tensors=2, reached=15)

    def forward(self, tally: Tally, work: Pass) -> None:
        tally.forward([Stage("all", kept=300, forward=50)])

    def backward(self, tally: Tally, work: Pass) -> None:
        tally.backward([Stage("all", kept=300, weight=15, backward=7000)], 0, FLOAT, work.gradient)


@pytest.mark.parametrize("accumulates", [False, True])
def test_any_encoder_is_put_together_with_any_head(accumulates: bool) -> None:
    setting = Setting(PlainEncoder(), PlainHead(), BF16, "adamw")
    found = step_bytes(setting, Fidelity(3, 16), 2, chunk=2, accumulates=accumulates)
    kept = 6 * 8 * 16**2 * BF16
    assert found == StepBytes(
        parameters=480,
        optimizer=2 * FLOAT * 120 + FLOAT * 3,
        gradients=FLOAT * 115 if accumulates else 0,
        frames=2 * 2 * 3 * 8 * 3 * 16**2,
        kept_encoder=kept,
        kept_head=FLOAT * 6 * 10 + 300,
        transient=7000 + FLOAT * 15,
    )

"""Every encoder and every head on a GPU: the numbers of the CPU, in float32 and within what a half type can tell."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import get_args

import numpy as np
import pytest
import torch
from networks import fill, frames
from torch import Tensor

from lofi_fast import encoder as encoders
from lofi_fast import head as heads
from lofi_fast.config import Config, EncoderName, HeadName
from lofi_fast.fidelity import FRAMES_PER_SNIPPET, Fidelity
from lofi_fast.head.protocol import total
from lofi_fast.presets import small

pytestmark = pytest.mark.gpu

SNIPPETS, SIDE = 6, 48
EXACT, HALF = 2e-4, 6e-2  # relative errors: of float32 in another order of sums, and of bfloat16
LABELS = np.array([0, 2])
SEGMENTS = np.array([[1.0, 4.5], [9.0, 12.25]])


@pytest.fixture(autouse=True)
def exact_products() -> Iterator[None]:
    """No TF32."""
    before = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = before


def config_of(encoder: EncoderName = "tsm_r18", head: HeadName = "gtad") -> Config:
    base = small()
    width = {"vit_b16": 16}.get(encoder, 16)
    return replace(
        base, full=Fidelity(16, SIDE), encoder=replace(base.encoder, name=encoder, width=width),
        head=replace(base.head, name=head, dropout=0.0),
        actionformer=replace(base.actionformer, hidden=32, levels=2, drop_path=0.0),
    )  # fmt: skip


def error(found: Tensor, expected: Tensor) -> float:
    return float((found.detach().cpu().double() - expected.double()).abs().max() / expected.double().abs().max())


@pytest.mark.parametrize("levers", [{}, {"recompute": True, "chunk": 2}], ids=["as it is", "recompute, chunks of 2"])
@pytest.mark.parametrize("name", get_args(EncoderName))
def test_an_encoder_gives_the_features_and_gradients_of_the_cpu(name: EncoderName, levers: dict[str, int]) -> None:
    config = config_of(name)
    given = frames(SNIPPETS * FRAMES_PER_SNIPPET, SIDE)
    found = {}
    for device, half in (("cpu", False), ("cuda", False), ("cuda", True)):
        network = encoders.build(config)
        fill(network)
        network.place(torch.device(device)).train()
        network.freeze_batchnorm()
        with torch.autocast(device, torch.bfloat16, enabled=half):
            features = network.encode(given.to(device), FRAMES_PER_SNIPPET, **levers)
        features.float().square().mean().backward()
        gradients = [one.grad for one in network.parameters() if one.grad is not None]
        found[device, half] = features, torch.cat([one.flatten().double().cpu() for one in gradients])
    features, gradients = found["cpu", False]
    assert error(found["cuda", False][0], features.detach()) < EXACT
    assert error(found["cuda", False][1], gradients) < 10 * EXACT
    assert error(found["cuda", True][0], features.detach()) < HALF
    same = torch.nn.functional.cosine_similarity(found["cuda", True][1], gradients, dim=0)
    assert same > 0.98


@pytest.mark.parametrize("name", get_args(HeadName))
def test_a_head_gives_the_loss_gradients_and_proposals_of_the_cpu(name: HeadName) -> None:
    config = config_of(head=name)
    length, features = config.full.num_snippets, 64
    random = np.random.RandomState(1)
    given = torch.from_numpy(random.standard_normal((2, features, length)).astype(np.float32))
    edges = np.arange(length + 1.0)
    segments = SEGMENTS[:, :1].repeat(2, axis=1) if name == "spotting" else SEGMENTS
    found = {}
    for device in ("cpu", "cuda"):
        head = heads.build(config, features, 3)
        fill(head)
        head.to(device).train()
        head.seed([0, 1])
        x = given.to(device).requires_grad_()
        targets = [head.targets(edges, segments, LABELS, np.random.default_rng(i)) for i in range(2)]
        loss = total(head.loss(head(x), targets, head.counts(targets), 1.0))
        loss.backward()
        head.eval()
        with torch.no_grad():
            proposals = head.proposals(head(given.to(device)), [edges, edges])
        assert x.grad is not None
        found[device] = loss.detach().cpu(), x.grad.cpu(), proposals
    (loss, gradient, proposals), (its_loss, its_gradient, its_proposals) = found["cpu"], found["cuda"]
    assert error(its_loss, loss) < EXACT
    assert error(its_gradient, gradient) < 10 * EXACT
    for one, other in zip(proposals, its_proposals, strict=True):
        assert np.sort(one.scores_P)[-5:] == pytest.approx(np.sort(other.scores_P)[-5:], rel=1e-3)

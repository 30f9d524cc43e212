"""ViT-B/16 for video: its definition, what of it learns, its way through backward, and its ledger."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from networks import BF16, FP32, Alive, fill, frames, precision
from torch import Tensor, nn

from lofi_fast.config import StageConfig
from lofi_fast.encoder import build, ledger_of
from lofi_fast.encoder.resnet import IMAGENET_MEAN, IMAGENET_STD
from lofi_fast.encoder.vit import Adapter, ViT
from lofi_fast.encoder.vit_ledger import Trained, ViTLedger
from lofi_fast.encoder.weights import load_encoder_weights
from lofi_fast.errors import InputError
from lofi_fast.fidelity import FRAMES_PER_SNIPPET
from lofi_fast.ledger import Pass, Tally
from lofi_fast.memory.step_bytes import features_bytes, pretrain_bytes
from lofi_fast.optim import make_optimizer
from lofi_fast.presets import configured

pytestmark = pytest.mark.usefixtures("one_thread")


def filled(width: int, train: str = "all", dtype: torch.dtype = torch.float32) -> ViT:
    encoder = ViT(width=width, train=train)
    fill(encoder)
    return encoder.train().place(torch.device("cpu")).to(dtype)


def learning(encoder: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in encoder.parameters() if parameter.requires_grad]


def literal_features(x_NHWC: Tensor, state: dict[str, Tensor], num_frames: int) -> Tensor:
    """By its definition, token by token: each is turned by its own angles and asks all others of its snippet."""
    mean, std = ((255 * torch.tensor(of)).to(x_NHWC) for of in (IMAGENET_MEAN, IMAGENET_STD))
    x = ((x_NHWC - mean) / std).unflatten(0, (-1, num_frames))
    tall, wide = (-(-size // 16) for size in x.shape[2:4])
    padded = x.new_zeros(len(x), num_frames, 16 * tall, 16 * wide, 3)
    padded[:, :, : x.shape[2], : x.shape[3]] = x
    places = [(t, h, w) for t in range(num_frames // 2) for h in range(tall) for w in range(wide)]
    weight, bias = state["patch_embed.proj.weight"], state["patch_embed.proj.bias"]
    tubes = [padded[:, 2 * t : 2 * t + 2, 16 * h : 16 * h + 16, 16 * w : 16 * w + 16] for t, h, w in places]
    tokens = torch.stack([torch.einsum("nthwi,oithw->no", tube, weight) + bias for tube in tubes], 1)
    channels = tokens.shape[-1]
    head = channels // 12

    def linear(key: str, y: Tensor) -> Tensor:
        return y @ state[f"{key}.weight"].T + state[f"{key}.bias"]

    def normed(key: str, y: Tensor) -> Tensor:
        y = (y - y.mean(-1, keepdim=True)) / (y.var(-1, correction=0, keepdim=True) + 1e-6).sqrt()
        return y * state[f"{key}.weight"] + state[f"{key}.bias"]

    def gelu(y: Tensor) -> Tensor:
        return y * (1 + torch.erf(y / math.sqrt(2))) / 2

    def turned(y: Tensor) -> Tensor:
        """(N, P, 12, head)."""
        y, out, third = y.clone(), y.clone(), 2 * (head // 3 // 2)
        for place, positions in enumerate(places):
            for axis, position in enumerate(positions):
                for pair in range(third // 2):
                    a, b = axis * third + 2 * pair, axis * third + 2 * pair + 1
                    for mine, other, sign in ((a, b, -1), (b, a, 1)):
                        wave = (mine - axis * third) % (third // 2)
                        angle = position * 10000.0 ** (-2 * wave / third)
                        rest = sign * y[:, place, :, other] * math.sin(angle)
                        out[:, place, :, mine] = y[:, place, :, mine] * math.cos(angle) + rest
        return out

    for index in range(12):
        key = f"blocks.{index}"
        parts = linear(f"{key}.attn.qkv", normed(f"{key}.norm1", tokens)).unflatten(-1, (3, 12, head)).unbind(2)
        query, value = turned(parts[0]), parts[2]
        scores = torch.einsum("nphc,nqhc->nhpq", query, turned(parts[1])) / math.sqrt(head)
        mixed = torch.einsum("nhpq,nqhc->nphc", scores.softmax(-1), value).flatten(2)
        tokens = tokens + linear(f"{key}.attn.proj", mixed)
        tokens = tokens + linear(f"{key}.mlp.fc2", gelu(linear(f"{key}.mlp.fc1", normed(f"{key}.norm2", tokens))))
        if f"{key}.adapter.gamma" in state:
            y = gelu(linear(f"{key}.adapter.down_proj", tokens))
            of_time = y.unflatten(1, (num_frames // 2, -1))
            taps, along = state[f"{key}.adapter.dwconv.weight"][:, 0], torch.zeros_like(of_time)
            for t in range(num_frames // 2):
                for tap in range(3):
                    if 0 <= t + tap - 1 < num_frames // 2:
                        along[:, t] += of_time[:, t + tap - 1] * taps[:, tap]
            along = along + state[f"{key}.adapter.dwconv.bias"]
            along = along @ state[f"{key}.adapter.conv.weight"][..., 0].T + state[f"{key}.adapter.conv.bias"]
            added = linear(f"{key}.adapter.up_proj", y + along.flatten(1, 2))
            tokens = tokens + state[f"{key}.adapter.gamma"] * added
    return normed("norm", tokens).mean(1)


@pytest.mark.parametrize(
    ("width", "num_frames", "height", "across", "train"),
    [(12, 4, 32, 32, "all"), (7, 2, 36, 20, "all"), (6, 8, 16, 34, "adapters")],
)
def test_equals_its_definition(width: int, num_frames: int, height: int, across: int, train: str) -> None:
    encoder = filled(width, train, torch.float64)
    x = frames(2 * num_frames, max(height, across))[:, :height, :across]
    with torch.no_grad():
        expected = literal_features(x.double(), encoder.state_dict(), num_frames)
        found = encoder(x, num_frames)
    torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-11)


def test_parameters_are_those_of_the_published_network() -> None:
    with torch.device("meta"):
        encoder = ViT()
    shapes = {name: tuple(value.shape) for name, value in encoder.state_dict().items()}
    assert len(shapes) == 2 + 12 * 12 + 2 and sum(p.numel() for p in encoder.parameters()) == 86_236_416
    assert encoder.num_features == 768
    assert shapes["patch_embed.proj.weight"] == (768, 3, 2, 16, 16)
    assert shapes["blocks.11.attn.qkv.weight"] == (2304, 768) and shapes["blocks.0.mlp.fc1.weight"] == (3072, 768)
    assert {"norm.bias", "blocks.3.norm2.weight", "blocks.3.attn.proj.bias", "blocks.3.mlp.fc2.bias"} <= shapes.keys()


def plain_features(encoder: ViT, x: Tensor, num_frames: int) -> Tensor:
    """With everything kept for backward."""
    grid = (num_frames // 2, -(-x.shape[1] // 16), -(-x.shape[2] // 16))
    tokens = encoder._embedded(x.unflatten(0, (-1, num_frames)), encoder.mean.dtype)
    for block in encoder.blocks:
        tokens = block(tokens, grid)
    features: Tensor = encoder.norm(tokens).mean(1)
    return features


@pytest.mark.parametrize(("train", "side", "chunk"), [("all", 34, 1), ("adapters", 32, 2), ("last:2", 18, None)])
def test_gradients_equal_plain_autograds_in_float64(train: str, side: int, chunk: int | None) -> None:
    encoder, x = filled(4, train, torch.float64), frames(3 * 8, side)
    weight = torch.linspace(-1, 1, 3 * 48, dtype=torch.float64).view(3, 48)
    plain = plain_features(encoder, x, 8)
    expected = torch.autograd.grad((plain * weight).sum(), learning(encoder))
    for recompute in (False, True):
        features = encoder.encode(x, 8, chunk=chunk, recompute=recompute)
        torch.testing.assert_close(features, plain, rtol=1e-12, atol=1e-12)
        found = torch.autograd.grad((features * weight).sum(), learning(encoder))
        for ours, theirs in zip(found, expected, strict=True):
            assert float((ours - theirs).abs().max()) <= 1e-12 * max(float(theirs.abs().max()), 1)


# What of it learns


@pytest.mark.parametrize(
    ("train", "first", "parts"),
    [("all", "patch_embed.proj.weight", 148), ("adapters", "blocks.0.adapter.gamma", 108),
     ("last:3", "blocks.9.norm1.weight", 38), ("last:12", "blocks.0.norm1.weight", 146)],
)  # fmt: skip
def test_only_what_is_asked_for_learns(train: str, first: str, parts: int) -> None:
    encoder = filled(2, train)
    names = [name for name, parameter in encoder.named_parameters() if parameter.requires_grad]
    assert (names[0], len(names)) == (first, parts)
    before = {name: value.clone() for name, value in encoder.state_dict().items()}
    optimizer = make_optimizer(StageConfig(epochs=1, batch=1, optimizer="adamw", lr=0.1), encoder.parameters(), "torch")
    encoder.freeze_batchnorm()
    encoder.encode(frames(8, 16), 8).square().sum().backward()
    optimizer.step()
    assert {name for name, value in encoder.state_dict().items() if not torch.equal(value, before[name])} == set(names)
    assert len(optimizer.state) == len(names)


def test_an_adapter_begins_as_nothing_and_learns() -> None:
    torch.manual_seed(0)
    adapter, x = Adapter(24), torch.randn(2, 4 * 3, 24)
    assert torch.equal(adapter(x, 4), x)
    adapter(x, 4).square().sum().backward()
    assert adapter.up_proj.weight.grad is not None and float(adapter.up_proj.weight.grad.abs().max()) > 0


def test_refuses_what_it_cannot_do() -> None:
    encoder = ViT(width=2)
    with pytest.raises(ValueError, match="whole number of 8-frame snippets"):
        encoder.encode(frames(7, 16), 8)
    with pytest.raises(ValueError, match="tubelets of 2"):
        encoder(frames(3, 16), 3)
    with pytest.raises(ValueError, match="8 bits"):
        encoder.encode(frames(8, 16), 8, eight_bit=True)
    with pytest.raises(ValueError, match="1 to 12 blocks"):
        Trained.parse("last:13")
    for flags, told in (
        (
            {"encoder": "vit_b16", "encoder.train": "last:13"},
            '--encoder.train "last:13": write all, adapters, or last:N',
        ),
        ({"encoder.train": "adapters"}, "--encoder.train adapters: tsm_r18 learns as a whole; use --encoder vit_b16"),
        ({"encoder": "vit_b16", "kept_maps": "8bit"}, "--kept-maps 8bit: vit_b16"),
    ):
        with pytest.raises(InputError, match=told):
            configured(flags, cuda=lambda: False)


# Weights from elsewhere


def test_v_jepas_weights_load_with_and_without_adapters(tmp_path: Path) -> None:
    source = filled(2)
    state = {f"module.backbone.{name}": value for name, value in source.state_dict().items()}
    others = {name: torch.zeros_like(value) for name, value in state.items()}
    path = tmp_path / "w.pt"
    torch.save({"encoder": others, "target_encoder": state, "predictor": {"a": torch.zeros(1)}, "epoch": 3}, path)
    for train in ("all", "adapters"):
        target = ViT(width=2, train=train)
        load_encoder_weights(target, path)
        assert all(torch.equal(target.state_dict()[name], value) for name, value in source.state_dict().items())
    adapted = filled(2, "adapters").state_dict()
    torch.save(adapted, path)
    again = ViT(width=2, train="adapters")
    load_encoder_weights(again, path)
    assert all(torch.equal(again.state_dict()[name], value) for name, value in adapted.items())
    del adapted["blocks.4.adapter.gamma"]
    torch.save(adapted, path)
    with pytest.raises(InputError, match=r"1 tensors missing \(first blocks.4.adapter.gamma\)"):
        load_encoder_weights(again, path)


# The ledger

STEPS = {  # width, side, snippets, chunk, bytes of a number, recompute, accumulates, what learns
    "chunks": (8, 64, 3, 1, FP32, False, False, "all"),
    "one_chunk": (8, 64, 4, 4, FP32, False, True, "all"),
    "bf16": (16, 48, 3, 1, BF16, False, False, "all"),
    "again": (8, 48, 3, 2, BF16, True, False, "all"),
    "adapters": (4, 100, 3, 3, FP32, False, False, "adapters"),
    "adapters_bf16": (4, 96, 3, 2, BF16, False, True, "adapters"),
    "adapters_again": (8, 64, 4, 2, BF16, True, False, "adapters"),
    "adapters_few_pixels": (32, 16, 2, 1, BF16, False, False, "adapters"),
    "last": (4, 120, 2, 2, FP32, False, False, "last:3"),
    "last_again": (8, 64, 4, 2, FP32, True, True, "last:2"),
    "last_bf16": (16, 32, 3, 1, BF16, False, True, "last:12"),
}


@pytest.mark.parametrize("case", STEPS.values(), ids=STEPS)
def test_a_step_keeps_and_needs_what_is_predicted(case: tuple[int, int, int, int, int, bool, bool, str]) -> None:
    width, side, snippets, chunk, itemsize, recompute, accumulates, train = case
    encoder, x = filled(width, train), frames(snippets * FRAMES_PER_SNIPPET, side)
    if accumulates:
        for parameter in learning(encoder):
            parameter.grad = torch.zeros_like(parameter)
    before = [parameter.grad for parameter in learning(encoder) if parameter.grad is not None]
    with Alive([*encoder.parameters(), *encoder.buffers(), x, *before]) as alive:
        with precision(itemsize):
            features = encoder.encode(x, FRAMES_PER_SNIPPET, chunk=chunk, recompute=recompute)
        kept, forward = alive.now, alive.peak
        features.sum().backward()
        del features
    tally, work = Tally(), Pass(1, snippets, side, itemsize, chunk, recompute, accumulates=accumulates)
    ledger = ViTLedger(width, train)
    of_features = FP32 * snippets * encoder.num_features
    assert ledger.forward(tally, work) + of_features == tally.now == kept
    assert 0.999 * forward <= tally.peak <= 1.02 * forward
    ledger.backward(tally, work)
    assert alive.peak <= tally.peak <= 1.03 * alive.peak
    assert tally.now == alive.now + of_features


@pytest.mark.parametrize(
    ("width", "side", "snippets", "chunk", "itemsize"), [(8, 46, 5, 2, FP32), (16, 64, 3, 3, BF16)]
)
def test_encoding_features(width: int, side: int, snippets: int, chunk: int, itemsize: int) -> None:
    encoder, x = filled(width), frames(snippets * FRAMES_PER_SNIPPET, side)
    with torch.no_grad(), Alive([*encoder.parameters(), *encoder.buffers()]) as alive:
        decoded = x.clone()
        with precision(itemsize):
            features = encoder.encode(decoded, FRAMES_PER_SNIPPET, chunk=chunk)
        features = features.float().T.contiguous()
    predicted = features_bytes(ViTLedger(width), snippets, snippets, chunk, side, itemsize)
    assert alive.peak <= predicted <= 1.03 * alive.peak


@pytest.mark.parametrize(
    ("width", "side", "clips", "itemsize", "train"),
    [(8, 46, 3, FP32, "all"), (8, 32, 4, BF16, "adapters"), (16, 64, 2, BF16, "last:4")],
)
def test_a_step_of_pretraining(width: int, side: int, clips: int, itemsize: int, train: str) -> None:
    encoder, x = filled(width, train), frames(clips * FRAMES_PER_SNIPPET, side)
    classifier, shares = nn.Linear(encoder.num_features, 6), torch.full((clips, 6), 1 / 6)
    known = [*encoder.parameters(), *encoder.buffers(), *classifier.parameters(), x, shares]
    with Alive(known) as alive:
        with precision(itemsize):
            logits = classifier(encoder(x, FRAMES_PER_SNIPPET))
        nn.functional.cross_entropy(logits.float(), shares).backward()
    predicted = pretrain_bytes(ViTLedger(width, train), 6, clips, side, itemsize) - 2 * x.nbytes
    assert alive.peak <= predicted <= 1.03 * alive.peak


@pytest.mark.parametrize("train", ["all", "adapters", "last:5"])
def test_the_ledger_knows_the_parameters(train: str) -> None:
    encoder, ledger = filled(4, train), ViTLedger(4, train)
    assert ledger.num_features == encoder.num_features
    assert ledger.parameters.held == sum(t.nbytes for t in (*encoder.parameters(), *encoder.buffers()))
    numbers = sum(parameter.numel() for parameter in learning(encoder))
    assert ledger.parameters.numbers == ledger.parameters.reached == numbers
    assert ledger.parameters.tensors == len(learning(encoder))
    config = configured({"encoder": "vit_b16", "width": 4, "encoder.train": train}, cuda=lambda: False)
    assert ledger_of(config.encoder) == ledger
    made = build(config)
    assert isinstance(made, ViT) and made.trained == encoder.trained


def test_work_is_that_of_matrices_and_attention() -> None:
    """A block multiplies a token by 12 C x C matrices, and with all 784 of its snippet twice."""
    of_token = 1536 * 768 + 12 * (12 * 768**2 + 2 * 784 * 768)
    assert ViTLedger().multiply_adds(224) == 784 * of_token // 8
    assert ViTLedger().multiply_adds(210) == ViTLedger().multiply_adds(224) > ViTLedger().multiply_adds(208)

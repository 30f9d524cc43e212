"""R(2+1)D-18: its parameters, its lean form against plain autograd, its ledger, and a training with it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from networks import BF16, FP32, Alive, fill, frames, precision, saved_bytes
from torch import Tensor, nn

from lofi_fast.config import StageConfig
from lofi_fast.encoder import build, ledger_of, r2plus1d_ledger
from lofi_fast.encoder.r2plus1d import KINETICS_MEAN, KINETICS_STD, R2Plus1D
from lofi_fast.encoder.r2plus1d_ledger import R2Plus1DLedger, network
from lofi_fast.encoder.weights import load_encoder_weights, map_key
from lofi_fast.errors import InputError
from lofi_fast.fidelity import FRAMES_PER_SNIPPET
from lofi_fast.ledger import Pass, Tally
from lofi_fast.memory.step_bytes import features_bytes, pretrain_bytes
from lofi_fast.optim import make_optimizer
from lofi_fast.precision import cpu_computes_bf16
from lofi_fast.presets import configured, demo

pytestmark = pytest.mark.usefixtures("one_thread")

CPU = torch.device("cpu")


def live(width: int) -> R2Plus1D:
    encoder = R2Plus1D(width=width)
    fill(encoder)
    return encoder.train().place(CPU)


def frozen(width: int) -> R2Plus1D:
    encoder = live(width)
    encoder.freeze_batchnorm()
    return encoder


def gradients(encoder: R2Plus1D, features: Tensor) -> list[Tensor]:
    learning = [parameter for parameter in encoder.parameters() if parameter.requires_grad]
    weight = torch.linspace(-1, 1, features.numel(), dtype=features.dtype).view_as(features)
    return list(torch.autograd.grad((features * weight).sum(), learning))


def test_parameters_are_those_of_the_published_network() -> None:
    with torch.device("meta"):
        encoder = R2Plus1D()
    shapes = {name: tuple(value.shape) for name, value in encoder.state_dict().items()}
    assert sum(parameter.numel() for parameter in encoder.parameters()) == 31_505_325 - 400 * 513  # without `fc`
    assert encoder.num_features == 512
    assert shapes["stem.0.weight"] == (45, 3, 1, 7, 7) and shapes["stem.3.weight"] == (64, 45, 3, 1, 1)
    assert shapes["layer1.0.conv1.0.0.weight"] == (144, 64, 1, 3, 3)
    assert shapes["layer2.0.conv1.0.3.weight"] == shapes["layer2.0.conv2.0.3.weight"] == (128, 230, 3, 1, 1)
    assert shapes["layer4.0.downsample.0.weight"] == (512, 256, 1, 1, 1)
    assert "layer4.1.conv2.1.running_var" in shapes and "layer4.1.downsample.0.weight" not in shapes


@pytest.mark.parametrize(
    ("num_frames", "side", "chunk"), [(8, 18, 1), (8, 17, 2), (8, 16, None), (3, 16, 2), (1, 18, 3)]
)
def test_lean_equals_plain_autograd_in_float64(num_frames: int, side: int, chunk: int | None) -> None:
    encoder, x = frozen(4).double(), frames(3 * num_frames, side)
    plain = encoder(x, num_frames)
    expected = gradients(encoder, plain)
    for recompute in (False, True):
        lean = encoder.encode(x, num_frames, chunk=chunk, recompute=recompute)
        assert lean.shape == (3, 32)
        torch.testing.assert_close(lean, plain, rtol=1e-12, atol=1e-12)
        for ours, theirs in zip(gradients(encoder, lean), expected, strict=True):
            assert float((ours - theirs).abs().max()) <= 1e-12 * float(theirs.abs().max())


def literal_features(x_NHWC: Tensor, state: dict[str, Tensor], num_frames: int) -> Tensor:
    """By its definition: 2-D convolutions of frames, and sums of three frames' products for those over time."""

    def norm(x_NTCHW: Tensor, key: str) -> Tensor:
        def by_channel(name: str) -> Tensor:
            return state[f"{key}.{name}"].view(1, 1, -1, 1, 1)

        x_NTCHW = (x_NTCHW - by_channel("running_mean")) / (by_channel("running_var") + 1e-5).sqrt()
        return x_NTCHW * by_channel("weight") + by_channel("bias")

    def over_space(x_NTCHW: Tensor, key: str, stride: int) -> Tensor:
        weight = state[f"{key}.weight"].squeeze(2)
        one = nn.functional.conv2d(x_NTCHW.flatten(0, 1), weight, stride=stride, padding=weight.shape[-1] // 2)
        return one.unflatten(0, x_NTCHW.shape[:2])

    def over_time(x_NTCHW: Tensor, key: str, stride: int) -> Tensor:
        weight, count = state[f"{key}.weight"].flatten(2), x_NTCHW.shape[1]
        moments = []
        for t in range(0, count, stride):
            near = [(tap, t + tap - 1) for tap in range(3) if 0 <= t + tap - 1 < count]
            moments.append(sum(torch.einsum("nchw,oc->nohw", x_NTCHW[:, at], weight[:, :, tap]) for tap, at in near))
        return torch.stack(moments, 1)  # type: ignore[arg-type]

    mean, std = ((255 * torch.tensor(of)).to(x_NHWC) for of in (KINETICS_MEAN, KINETICS_STD))
    x = ((x_NHWC - mean) / std).permute(0, 3, 1, 2).unflatten(0, (-1, num_frames))
    x = norm(over_space(x, "stem.0", 2), "stem.1").relu()
    x = norm(over_time(x, "stem.3", 1), "stem.4").relu()
    for stage in range(1, 5):
        for index in range(2):
            key, stride = f"layer{stage}.{index}", 2 if stage > 1 and index == 0 else 1
            y = norm(over_space(x, f"{key}.conv1.0.0", stride), f"{key}.conv1.0.1").relu()
            y = norm(over_time(y, f"{key}.conv1.0.3", stride), f"{key}.conv1.1").relu()
            y = norm(over_space(y, f"{key}.conv2.0.0", 1), f"{key}.conv2.0.1").relu()
            y = norm(over_time(y, f"{key}.conv2.0.3", 1), f"{key}.conv2.1")
            if stride > 1:
                weight = state[f"{key}.downsample.0.weight"].flatten(1)
                taken = torch.einsum("ntchw,oc->ntohw", x[:, ::2, :, ::2, ::2], weight)
                x = norm(taken, f"{key}.downsample.1")
            x = (x + y).relu()
    return x.mean(dim=(1, 3, 4))


@pytest.mark.parametrize(("num_frames", "side"), [(8, 18), (3, 17)])
def test_equals_its_definition(num_frames: int, side: int) -> None:
    encoder, x = frozen(4).double(), frames(2 * num_frames, side)
    expected = literal_features(x.double(), encoder.state_dict(), num_frames)
    with torch.no_grad():
        torch.testing.assert_close(encoder.eval()(x, num_frames), expected, rtol=1e-12, atol=1e-12)


def test_refuses_what_it_cannot_do() -> None:
    encoder = R2Plus1D(width=8)
    with pytest.raises(ValueError, match="whole number"):
        encoder.encode(frames(7, 16), 8)
    with pytest.raises(ValueError, match="frozen batch norm"):
        encoder.encode(frames(8, 16), 8, recompute=True)
    with pytest.raises(ValueError, match="8 bits"):
        encoder.encode(frames(8, 16), 8, eight_bit=True)
    for flags, told in (({"kept_maps": "8bit"}, "--kept-maps 8bit: r2plus1d_18"), ({"width": 1}, "--width 1")):
        with pytest.raises(InputError, match=told):
            configured({"encoder": "r2plus1d_18"} | flags, cuda=lambda: False)


# Weights from elsewhere


@pytest.mark.parametrize(
    ("key", "expected"),
    [
        ("stem.0.weight", "stem.0.weight"),
        ("layer2.0.conv1.0.3.weight", "layer2.0.conv1.0.3.weight"),
        ("features.layer4.1.conv2.1.running_var", "layer4.1.conv2.1.running_var"),
        ("module.features.layer2.0.downsample.0.weight", "layer2.0.downsample.0.weight"),
        ("fc.weight", None),
        ("fc1.weight", None),
        ("fc2.bias", None),
    ],
)
def test_keys_by_hand(key: str, expected: str | None) -> None:
    assert map_key(key) == expected


@pytest.mark.parametrize("tsp", [False, True])
def test_torchvisions_and_tsps_weights_load_whole(tsp: bool, tmp_path: Path) -> None:
    source, target = live(4), R2Plus1D(width=4)
    state = source.state_dict()
    if tsp:
        heads = {f"fc{n}.{part}": torch.zeros(2, 32)[: 2 if part == "weight" else 1] for n in (1, 2)
                 for part in ("weight", "bias")}  # fmt: skip
        content = {"model": {f"features.{name}": value for name, value in state.items()} | heads, "epoch": 7}
    else:
        content = state | {"fc.weight": torch.zeros(400, 32), "fc.bias": torch.zeros(400)}
    torch.save(content, tmp_path / "w.pth")
    load_encoder_weights(target, tmp_path / "w.pth")
    assert all(torch.equal(target.state_dict()[name], value) for name, value in state.items())
    torch.save({"layer1.0.conv1.weight": torch.zeros(64, 64, 3, 3)}, tmp_path / "w.pth")
    with pytest.raises(InputError, match=r"not weights of r2plus1d_18: .*first stem.0.weight.*--encoder"):
        load_encoder_weights(target, tmp_path / "w.pth")


# The ledger


@pytest.mark.parametrize(
    ("width", "side", "snippets", "chunk", "itemsize"), [(8, 32, 2, 1, FP32), (16, 34, 3, 2, BF16), (8, 33, 2, 5, FP32)]
)
def test_kept_to_the_byte(width: int, side: int, snippets: int, chunk: int, itemsize: int) -> None:
    encoder, x = frozen(width), frames(snippets * FRAMES_PER_SNIPPET, side)
    known = [*encoder.parameters(), *encoder.buffers()]
    sizes = (width, side, snippets, itemsize)
    with precision(itemsize):
        for recompute in (False, True):
            kept = saved_bytes(known, lambda again=recompute: encoder.encode(x, 8, chunk=chunk, recompute=again))
            assert kept == r2plus1d_ledger.lean_kept_bytes(*sizes, recompute=recompute), recompute
        assert saved_bytes(known, lambda: encoder(x, 8)) == r2plus1d_ledger.plain_kept_bytes(*sizes)


def test_the_lean_form_keeps_half_of_what_plain_pytorch_keeps() -> None:
    """Bytes of a snippet of 8 frames at 112 px."""
    for itemsize, lean, plain in ((FP32, 124_005_868, 250_721_240), (BF16, 62_153_462, 125_360_620)):
        forms = (r2plus1d_ledger.lean_kept_bytes, r2plus1d_ledger.plain_kept_bytes)
        assert [form(64, 112, 3, itemsize) - form(64, 112, 2, itemsize) for form in forms] == [lean, plain]


STEPS = {  # width, side, snippets, chunk, bytes of a number, recompute, accumulates
    "chunks": (8, 46, 3, 1, FP32, False, False),
    "one_chunk": (8, 33, 2, 5, FP32, False, True),
    "few_pixels": (32, 24, 3, 1, FP32, False, False),
    "bf16": (16, 50, 3, 2, BF16, False, True),
    "bf16_one_chunk": (16, 32, 3, 3, BF16, False, False),
    "bf16_few_pixels": (32, 24, 3, 1, BF16, False, True),
    "again": (16, 46, 3, 1, FP32, True, False),
    "again_bf16": (8, 48, 4, 2, BF16, True, True),
    "again_few_pixels": (32, 24, 3, 1, BF16, True, False),
    "again_one_chunk": (16, 40, 3, 4, FP32, True, True),  # nothing but one chunk is held then: its own peak shows
    "again_one_chunk_bf16": (16, 50, 3, 3, BF16, True, True),
    "again_one_snippet": (4, 50, 1, 5, FP32, True, False),
}


@pytest.mark.parametrize("case", STEPS.values(), ids=STEPS)
def test_a_step_keeps_and_needs_what_is_predicted(case: tuple[int, int, int, int, int, bool, bool]) -> None:
    width, side, snippets, chunk, itemsize, recompute, accumulates = case
    encoder, x = frozen(width), frames(snippets * FRAMES_PER_SNIPPET, side)
    learning = [parameter for parameter in encoder.parameters() if parameter.requires_grad]
    if accumulates:
        for parameter in learning:
            parameter.grad = torch.zeros_like(parameter)
    before = [parameter.grad for parameter in learning if parameter.grad is not None]
    with Alive([*encoder.parameters(), *encoder.buffers(), x, *before]) as alive:
        with precision(itemsize):
            features = encoder.encode(x, FRAMES_PER_SNIPPET, chunk=chunk, recompute=recompute)
        kept, forward = alive.now, alive.peak
        features.sum().backward()
        del features
    assert alive.now == (0 if accumulates else sum(parameter.nbytes for parameter in learning))
    tally, work = Tally(), Pass(1, snippets, side, itemsize, chunk, recompute, accumulates=accumulates)
    ledger = R2Plus1DLedger(width)
    kept_predicted = ledger.forward(tally, work)
    assert tally.now == kept_predicted + 4 * snippets * encoder.num_features == kept
    assert forward <= tally.peak <= 1.02 * forward
    ledger.backward(tally, work)
    assert alive.peak <= tally.peak <= 1.02 * alive.peak
    assert tally.now == alive.now + 4 * snippets * encoder.num_features


@pytest.mark.parametrize(
    ("width", "side", "snippets", "chunk", "itemsize"), [(8, 46, 4, 2, FP32), (16, 34, 3, 1, BF16), (8, 46, 3, 3, BF16)]
)
def test_encoding_features(width: int, side: int, snippets: int, chunk: int, itemsize: int) -> None:
    encoder, x = frozen(width), frames(snippets * FRAMES_PER_SNIPPET, side)
    with torch.no_grad(), Alive([*encoder.parameters(), *encoder.buffers()]) as alive:
        decoded = x.clone()
        with precision(itemsize):
            features = encoder.encode(decoded, FRAMES_PER_SNIPPET, chunk=chunk)
        features = features.float().T.contiguous()
    predicted = features_bytes(R2Plus1DLedger(width), snippets, snippets, chunk, side, itemsize)
    assert alive.peak <= predicted <= 1.03 * alive.peak


@pytest.mark.parametrize(
    ("width", "side", "clips", "itemsize"), [(8, 46, 3, FP32), (8, 32, 4, BF16), (32, 24, 4, BF16), (24, 24, 4, FP32)]
)
def test_a_step_of_pretraining(width: int, side: int, clips: int, itemsize: int) -> None:
    if itemsize == BF16 and not cpu_computes_bf16():
        pytest.skip("training in bf16 is refused on this CPU, whose convolutions hold more in it")
    encoder, x = live(width), frames(clips * FRAMES_PER_SNIPPET, side)
    classifier, shares = nn.Linear(encoder.num_features, 6), torch.full((clips, 6), 1 / 6)
    known = [*encoder.parameters(), *encoder.buffers(), *classifier.parameters(), x, shares]
    with Alive(known) as alive:
        with precision(itemsize):
            logits = classifier(encoder(x, FRAMES_PER_SNIPPET))
        nn.functional.cross_entropy(logits.float(), shares).backward()
    predicted = pretrain_bytes(R2Plus1DLedger(width), 6, clips, side, itemsize) - 2 * x.nbytes
    assert alive.peak <= predicted <= 1.03 * alive.peak


def test_the_table_is_the_network() -> None:
    encoder, ledger = frozen(8), R2Plus1DLedger(8)
    convs = [parameter.numel() for parameter in encoder.parameters() if parameter.dim() == 5]
    assert sorted(conv.weight for conv in network(8, 64).convs) == sorted(convs)
    learning = [parameter for parameter in encoder.parameters() if parameter.requires_grad]
    assert ledger.num_features == encoder.num_features
    assert ledger.parameters.held == sum(t.nbytes for t in (*encoder.parameters(), *encoder.buffers()))
    assert ledger.parameters.numbers == ledger.parameters.reached == sum(p.numel() for p in learning)
    assert ledger.parameters.tensors == len(learning)
    state = make_optimizer(StageConfig(epochs=1, batch=1, optimizer="adamw", lr=0.1), learning, "torch").state
    assert len(state) == ledger.parameters.tensors
    # torchvision's table of models gives 40.5 G multiplications for 16 frames of 112 px.
    assert 16 * R2Plus1DLedger().multiply_adds(112) == pytest.approx(40.5e9, rel=0.02)
    config = demo()
    chosen = configured({"encoder": "r2plus1d_18", "width": 8}, cuda=lambda: False)
    assert ledger_of(chosen.encoder) == ledger != ledger_of(config.encoder)
    assert isinstance(build(chosen), R2Plus1D)

"""TSM-ResNet: torchvision's names and sizes, the published shift, and one video never touching another."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from networks import fill, frames
from torch import Tensor

from lofi_fast.config import EncoderName, StageConfig
from lofi_fast.encoder.resnet import TSMResNet
from lofi_fast.encoder.tsm import TSMEncoder
from lofi_fast.encoder.weights import load_encoder_weights, map_key
from lofi_fast.errors import InputError
from lofi_fast.optim import make_optimizer

pytestmark = pytest.mark.usefixtures("poison", "one_thread")

NAMES: tuple[EncoderName, ...] = ("tsm_r18", "tsm_r34", "tsm_r50")
BLOCKS = {"tsm_r18": [2, 2, 2, 2], "tsm_r34": [3, 4, 6, 3], "tsm_r50": [3, 4, 6, 3]}


def torchvision_shapes(name: EncoderName, width: int = 64) -> dict[str, tuple[int, ...]]:
    """Names and shapes of torchvision's resnet state dict without fc, in its order."""
    shapes: dict[str, tuple[int, ...]] = {}

    def conv(key: str, out_channels: int, in_channels: int, kernel: int) -> None:
        shapes[f"{key}.weight"] = (out_channels, in_channels, kernel, kernel)

    def norm(key: str, channels: int) -> None:
        for part in ("weight", "bias", "running_mean", "running_var"):
            shapes[f"{key}.{part}"] = (channels,)
        shapes[f"{key}.num_batches_tracked"] = ()

    deep = name == "tsm_r50"
    conv("conv1", width, 3, 7)
    norm("bn1", width)
    channels = width
    for stage, num_blocks in enumerate(BLOCKS[name], start=1):
        narrow = width * 2 ** (stage - 1)
        wide = 4 * narrow if deep else narrow
        for block in range(num_blocks):
            key = f"layer{stage}.{block}"
            sizes = [(narrow, channels, 1), (narrow, narrow, 3), (wide, narrow, 1)]
            if not deep:
                sizes = [(narrow, channels, 3), (narrow, narrow, 3)]
            for number, size in enumerate(sizes, start=1):
                conv(f"{key}.conv{number}", *size)
                norm(f"{key}.bn{number}", size[0])
            if block == 0 and (stage > 1 or deep):
                conv(f"{key}.downsample.0", wide, channels, 1)
                norm(f"{key}.downsample.1", wide)
            channels = wide
    return shapes


def shapes_of(state: dict[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {key: tuple(value.shape) for key, value in state.items()}


def tiny(name: EncoderName = "tsm_r18", width: int = 8) -> TSMResNet:
    encoder = TSMResNet(name, width)
    fill(encoder)
    return encoder.eval()


@pytest.mark.parametrize("name", NAMES)
def test_state_dict_is_torchvisions(name: EncoderName) -> None:
    with torch.device("meta"):
        encoder = TSMResNet(name)
    assert list(shapes_of(encoder.state_dict()).items()) == list(torchvision_shapes(name).items())


@pytest.mark.parametrize(
    ("name", "parameters", "features"),
    [("tsm_r18", 11_176_512, 512), ("tsm_r34", 21_284_672, 512), ("tsm_r50", 23_508_032, 2048)],
)
def test_parameter_counts_are_torchvisions_without_fc(name: EncoderName, parameters: int, features: int) -> None:
    with torch.device("meta"):
        encoder = TSMResNet(name)
    assert sum(p.numel() for p in encoder.parameters()) == parameters
    assert encoder.num_features == features


@pytest.mark.parametrize("name", NAMES)
def test_every_block_is_shifted_in_networks_of_this_depth(name: EncoderName) -> None:
    with torch.device("meta"):
        encoder = TSMResNet(name)
    assert [block.shifted for stage in encoder.stages for block in stage] == [True] * sum(BLOCKS[name])


def published_shift(x: Tensor, num_frames: int) -> Tensor:
    """y[:, t, :f] = x[:, t+1, :f], y[:, t, f:2f] = x[:, t-1, f:2f], zero past the ends, f = C // 8, one by one."""
    fold = x.shape[1] // 8
    y = x.clone()
    for index in range(len(x)):
        t = index % num_frames
        y[index, :fold] = x[index + 1, :fold] if t + 1 < num_frames else 0
        y[index, fold : 2 * fold] = x[index - 1, fold : 2 * fold] if t > 0 else 0
    return y


def batchnorm(x: Tensor, state: dict[str, Tensor], key: str) -> Tensor:
    def part(name: str) -> Tensor:
        return state[f"{key}.{name}"].view(1, -1, 1, 1)

    return (x - part("running_mean")) / (part("running_var") + 1e-5).sqrt() * part("weight") + part("bias")


def literal_features(x_NHWC: Tensor, state: dict[str, Tensor], name: EncoderName, num_frames: int) -> Tensor:
    """TSM's network written out, in float64."""
    state = {key: value.double() for key, value in state.items()}
    mean = torch.tensor([0.485, 0.456, 0.406], dtype=torch.float64)
    std = torch.tensor([0.229, 0.224, 0.225], dtype=torch.float64)
    x = ((x_NHWC.double() / 255 - mean) / std).permute(0, 3, 1, 2)
    x = batchnorm(F.conv2d(x, state["conv1.weight"], stride=2, padding=3), state, "bn1").relu()
    x = F.max_pool2d(x, 3, stride=2, padding=1)
    for stage, num_blocks in enumerate(BLOCKS[name], start=1):
        for block in range(num_blocks):
            key = f"layer{stage}.{block}"
            stride = 2 if stage > 1 and block == 0 else 1
            identity, y = x, published_shift(x, num_frames)
            if name == "tsm_r50":
                y = batchnorm(F.conv2d(y, state[f"{key}.conv1.weight"]), state, f"{key}.bn1").relu()
                y = F.conv2d(y, state[f"{key}.conv2.weight"], stride=stride, padding=1)
                y = batchnorm(y, state, f"{key}.bn2").relu()
                y = batchnorm(F.conv2d(y, state[f"{key}.conv3.weight"]), state, f"{key}.bn3")
            else:
                y = F.conv2d(y, state[f"{key}.conv1.weight"], stride=stride, padding=1)
                y = batchnorm(y, state, f"{key}.bn1").relu()
                y = batchnorm(F.conv2d(y, state[f"{key}.conv2.weight"], padding=1), state, f"{key}.bn2")
            if f"{key}.downsample.0.weight" in state:
                identity = F.conv2d(x, state[f"{key}.downsample.0.weight"], stride=stride)
                identity = batchnorm(identity, state, f"{key}.downsample.1")
            x = (y + identity).relu()
    pooled = x.mean(dim=(2, 3))
    return torch.stack([pooled[i : i + num_frames].mean(0) for i in range(0, len(pooled), num_frames)])


@pytest.mark.parametrize("name", ["tsm_r18", "tsm_r50"])
def test_equals_the_published_network(name: EncoderName) -> None:
    encoder = tiny(name)
    x = frames(16)
    expected = literal_features(x, encoder.state_dict(), name, 8)
    features = encoder(x, 8)
    assert features.dtype == torch.float32
    torch.testing.assert_close(features.double(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("stride", [1, 2])
def test_one_block_equals_its_formula_with_its_gradient(stride: int) -> None:
    encoder = tiny().double()
    block = encoder.stages[stride - 1][0]
    state = block.state_dict()
    x = torch.from_numpy(np.random.RandomState(1).standard_normal((8, 8, 6, 5))).requires_grad_()
    y = F.conv2d(published_shift(x, 4), state["conv1.weight"], stride=stride, padding=1)
    y = batchnorm(F.conv2d(batchnorm(y, state, "bn1").relu(), state["conv2.weight"], padding=1), state, "bn2")
    identity = x
    if stride == 2:
        identity = batchnorm(F.conv2d(x, state["downsample.0.weight"], stride=2), state, "downsample.1")
    expected = (y + identity).relu()
    out = block(x, 4)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-12)
    grad = torch.from_numpy(np.random.RandomState(2).standard_normal(out.shape))
    ours, theirs = torch.autograd.grad(out, x, grad)[0], torch.autograd.grad(expected, x, grad)[0]
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)


def test_frozen_numbers() -> None:
    """A change of these numbers breaks every checkpoint that exists."""
    features = tiny()(frames(16), 8)
    assert features.shape == (2, 64)
    expected = [
        [20.548882, 0.963541, 0.942170, 2.471233, 3.033454, 2.865638],
        [22.387661, 0.229681, 0.894102, 2.546663, 3.012545, 0.797797],
    ]
    torch.testing.assert_close(features[:, :6], torch.tensor(expected), rtol=1e-4, atol=1e-4)
    assert features.sum().item() == pytest.approx(1007.8772, rel=1e-4)


@pytest.mark.parametrize("training", [False, True], ids=["eval", "frozen-batchnorm-training"])
def test_videos_in_a_batch_do_not_mix(training: bool) -> None:
    encoder = tiny()
    encoder.freeze_batchnorm()
    encoder.train(training)
    first, second, other = frames(16, seed=1), frames(16, seed=2), frames(16, seed=3)
    together = encoder(torch.cat([first, second]), 8)
    changed = encoder(torch.cat([first, other]), 8)
    torch.testing.assert_close(changed[:2], together[:2], rtol=0, atol=1e-6)
    assert (changed[2:] - together[2:]).abs().max() > 0.01
    torch.testing.assert_close(encoder(first, 8), together[:2], rtol=1e-4, atol=1e-4)


def test_the_frame_count_is_that_of_the_call() -> None:
    # The same 16 frames are two snippets of 8, then four of 4: the fifth frame belongs to another snippet then.
    encoder = tiny()
    x = frames(16)
    changed = x.clone()
    changed[4] = 255 - changed[4]
    by_8, by_8_changed = encoder(x, 8), encoder(changed, 8)
    by_4, by_4_changed = encoder(x, 4), encoder(changed, 4)
    assert (by_8.shape, by_4.shape) == ((2, 64), (4, 64))
    touched_8 = (by_8 - by_8_changed).abs().amax(dim=1) > 1e-3
    touched_4 = (by_4 - by_4_changed).abs().amax(dim=1) > 1e-3
    assert touched_8.tolist() == [True, False]
    assert touched_4.tolist() == [False, True, False, False]
    torch.testing.assert_close(encoder(x, 8), by_8, rtol=0, atol=1e-6)  # and nothing of the other count is kept


def test_the_order_of_frames_matters() -> None:
    encoder = tiny()
    x = frames(8)
    assert (encoder(x, 8) - encoder(x.flip(0), 8)).abs().max() > 1e-3


@pytest.mark.parametrize("side", [16, 34, 158])
def test_any_side_gives_the_same_number_of_features(side: int) -> None:
    assert tiny()(frames(4, side), 4).shape == (1, 64)


def test_frames_that_are_no_whole_snippets() -> None:
    with pytest.raises(ValueError, match="12 frames are not a whole number of 8-frame snippets"):
        tiny()(frames(12), 8)


def still(encoder: TSMResNet) -> dict[str, Tensor]:
    return {k: v.clone() for k, v in encoder.state_dict().items() if ".bn" in k or "bn1" in k or "downsample.1" in k}


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_frozen_batchnorm_is_bit_identical_after_training(optimizer: Any) -> None:
    encoder = tiny()
    encoder.freeze_batchnorm()
    encoder.train()
    before, conv1, stem = still(encoder), encoder.stages[0][0].conv1.weight.clone(), encoder.conv1.weight.clone()
    assert len(before) == 5 * 20  # a ResNet-18 has 20 BN layers of 5 tensors
    config = StageConfig(epochs=1, batch=1, optimizer=optimizer, lr=0.01, weight_decay=0.1)
    updates = make_optimizer(config, encoder.parameters())
    for step in range(2):
        updates.zero_grad()
        encoder.train()
        encoder(frames(8, seed=step), 4).square().mean().backward()
        updates.step()
    after = still(encoder)
    assert all(torch.equal(after[key], before[key]) for key in before)
    assert not torch.equal(encoder.conv1.weight, stem)
    assert not torch.equal(encoder.stages[0][0].conv1.weight, conv1)


def test_live_batchnorm_does_learn() -> None:
    encoder = tiny().train()
    before = still(encoder)
    encoder(frames(16), 8).square().mean().backward()
    after = still(encoder)
    assert not torch.equal(after["bn1.running_mean"], before["bn1.running_mean"])
    assert encoder.bn1.weight.grad is not None and encoder.bn1.weight.grad.abs().sum() > 0


def test_batchnorm_can_be_let_live_again() -> None:
    encoder = tiny().train()
    encoder.freeze_batchnorm()
    encoder.freeze_batchnorm(False)
    before = still(encoder)
    encoder(frames(8), 8).sum().backward()
    assert all(m.training for m in encoder.modules() if isinstance(m, torch.nn.BatchNorm2d))
    assert not torch.equal(still(encoder)["bn1.running_var"], before["bn1.running_var"])
    assert encoder.bn1.weight.grad is not None


def test_freezing_keeps_the_mode_and_evaluation_stays_evaluation() -> None:
    encoder = tiny()
    encoder.freeze_batchnorm()
    assert not encoder.training
    encoder.train()
    assert encoder.training and not encoder.bn1.training
    encoder.eval()
    assert not encoder.training


@pytest.mark.parametrize(
    ("key", "expected"),
    [
        ("layer1.0.conv1.weight", "layer1.0.conv1.weight"),
        ("module.base_model.conv1.weight", "conv1.weight"),
        ("module.base_model.layer1.0.conv1.net.weight", "layer1.0.conv1.weight"),
        ("module.base_model.layer4.1.bn2.running_var", "layer4.1.bn2.running_var"),
        ("base_model.layer2.0.downsample.0.weight", "layer2.0.downsample.0.weight"),
        ("encoder.layer1.0.conv1.weight", "layer1.0.conv1.weight"),
        ("backbone.layer1.0.conv1.weight", "layer1.0.conv1.weight"),
        ("module.new_fc.weight", None),
        ("module.new_fc.bias", None),
        ("fc.weight", None),
        ("classifier.bias", None),
    ],
)
def test_keys_by_hand(key: str, expected: str | None) -> None:
    assert map_key(key) == expected


def torchvision_like(source: TSMResNet) -> dict[str, Any]:
    state = {key: source.state_dict()[key] for key in torchvision_shapes(source.name, source.width)}
    return state | {"fc.weight": torch.zeros(1000, source.num_features), "fc.bias": torch.zeros(1000)}


def before_batch_counts(source: TSMResNet) -> dict[str, Any]:
    """torchvision's files of 2017 have no num_batches_tracked."""
    return {k: v for k, v in torchvision_like(source).items() if not k.endswith("num_batches_tracked")}


def tsm_like(source: TSMResNet) -> dict[str, Any]:
    state = {}
    for key, value in source.state_dict().items():
        wrapped = key.replace(".conv1.", ".conv1.net.") if key.startswith("layer") else key
        state[f"module.base_model.{wrapped}"] = value
    state |= {"module.new_fc.weight": torch.zeros(400, source.num_features), "module.new_fc.bias": torch.zeros(400)}
    return {"epoch": 50, "arch": "resnet18", "state_dict": state, "best_prec1": 69.9}


def our_own(source: TSMResNet) -> dict[str, Any]:
    head = {"base.0.weight": torch.zeros(3)}
    return {"version": "0.1", "config": "{}", "classes": ["a"], "encoder": source.state_dict(), "head": head}


def ours_with_prefix(source: TSMResNet) -> dict[str, Any]:
    return {"model": {f"encoder.{key}": value for key, value in source.state_dict().items()}}


FORMS = [torchvision_like, before_batch_counts, tsm_like, our_own, ours_with_prefix]


@pytest.mark.parametrize(
    ("form", "name"), [*((form, "tsm_r18") for form in FORMS), (tsm_like, "tsm_r34"), (tsm_like, "tsm_r50")]
)
def test_weights_from_elsewhere_load_whole(form: Any, name: EncoderName, tmp_path: Path) -> None:
    source, target = tiny(name, width=4), TSMResNet(name, 4)
    torch.save(form(source), tmp_path / "w.pth")
    sentence = load_encoder_weights(target, tmp_path / "w.pth")
    assert str(tmp_path / "w.pth") in sentence
    for key, value in source.state_dict().items():
        assert torch.equal(target.state_dict()[key], value), key


def test_errors_of_weights(tmp_path: Path) -> None:
    path = tmp_path / "w.pth"
    target = tiny()
    before = {key: value.clone() for key, value in target.state_dict().items()}

    def refused(content: Any) -> str:
        torch.save(content, path)
        with pytest.raises(InputError) as error:
            load_encoder_weights(target, path)
        sentence = str(error.value)
        assert str(path) in sentence and "\n" not in sentence
        return sentence

    sentence = refused(torchvision_like(tiny(width=16)))
    assert all(part in sentence for part in ("conv1.weight", "(16, 3, 7, 7)", "(8, 3, 7, 7)", "--width"))
    sentence = refused(torchvision_like(tiny("tsm_r34")))
    assert "tsm_r18" in sentence and "layer1.2.conv1.weight" in sentence and "--encoder" in sentence
    state = torchvision_like(tiny())
    del state["layer3.1.bn2.running_mean"]
    sentence = refused(state)
    assert "1 tensors missing (first layer3.1.bn2.running_mean)" in sentence
    assert "--encoder-weights" in refused(torchvision_like(tiny()) | {"extra.weight": torch.zeros(1)})
    assert "list" in refused([torch.zeros(1)])
    assert "--encoder-weights" in refused({})
    assert "--encoder-weights" in refused({0: torch.zeros(1)})
    for number in (float("nan"), float("inf")):
        state = torchvision_like(tiny())
        state["layer2.0.conv1.weight"][0, 0, 0, 0] = number
        sentence = refused(state)
        assert "layer2.0.conv1.weight holds a NaN or an infinity" in sentence and "--encoder-weights" in sentence
    # Nothing of a refused file was taken over.
    assert all(torch.equal(value, before[key]) for key, value in target.state_dict().items())


@pytest.mark.parametrize(
    "content", [b"", b"hello world\n", b"<html></html>", b"GIF89a", b'{"a": 1}', b"PK\x03\x04    "]
)
def test_a_file_that_is_no_checkpoint(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "w.pth").write_bytes(content)
    with pytest.raises(InputError, match=r"w\.pth"):
        load_encoder_weights(tiny(), tmp_path / "w.pth")


def test_no_file_and_a_folder(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="--encoder-weights"):
        load_encoder_weights(tiny(), tmp_path / "w.pth")
    with pytest.raises(InputError):
        load_encoder_weights(tiny(), tmp_path)


def test_weights_never_run_code(tmp_path: Path) -> None:
    torch.save(torchvision_like(tiny()) | {"hook": Path("p")}, tmp_path / "w.pth")
    with pytest.raises(InputError, match="only tensors"):
        load_encoder_weights(tiny(), tmp_path / "w.pth")


def test_half_precision_weights_become_single(tmp_path: Path) -> None:
    source = tiny()
    torch.save({key: value.half() for key, value in source.state_dict().items()}, tmp_path / "w.pth")
    target = TSMResNet("tsm_r18", 8)
    load_encoder_weights(target, tmp_path / "w.pth")
    assert target.conv1.weight.dtype == torch.float32
    torch.testing.assert_close(target.conv1.weight, source.conv1.weight, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("half", [False, True], ids=["float32", "bfloat16"])
def test_pretraining_on_our_kernels_is_pytorchs(half: bool) -> None:
    """Live batch norm: features, gradients and statistics, at sizes that take each form of the convolution. Of several
    batches, since a number before a ReLU that a rounding takes across zero changes gradients by more than all others.
    """

    def step(network: TSMResNet, seed: int) -> list[Tensor]:
        fill(network)
        exact = next(network.parameters()).dtype is torch.float64
        with torch.autocast("cpu", torch.bfloat16, enabled=half and not exact):
            features = network.to(memory_format=torch.channels_last).train()(frames(64, 32, seed), 8)  # type: ignore[call-overload]
        features.square().sum().backward()
        gradients = [p.grad for p in network.parameters() if p.grad is not None]
        means = [b for name, b in network.named_buffers() if name.endswith("running_mean")]
        return [features.detach(), *gradients, *means]

    def error(found: list[Tensor], expected: list[Tensor]) -> float:
        return float(np.mean([((a - b).norm() / b.norm()).item() for a, b in zip(found, expected, strict=True)]))

    errors = []
    for seed in range(1 if half else 6):
        expected = step(TSMResNet("tsm_r18", 32).double(), seed)
        plain, ours = step(TSMResNet("tsm_r18", 32), seed), step(TSMEncoder("tsm_r18", 32), seed)
        errors.append((error(plain, expected), error(ours, expected)))
    theirs, mine = (min(of) for of in zip(*errors, strict=True))
    assert mine <= (1.5 if half else 4) * theirs

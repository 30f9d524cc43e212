"""R(2+1)D-18: its parameters, and its lean form against plain autograd."""

from __future__ import annotations

import pytest
import torch
from networks import fill, frames
from torch import Tensor

from lofi_fast.encoder.r2plus1d import R2Plus1D


def frozen(dtype: torch.dtype = torch.float64) -> R2Plus1D:
    encoder = R2Plus1D(width=8)
    fill(encoder)
    encoder.freeze_batchnorm()
    return encoder.train().to(dtype)


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
    ("num_frames", "side", "chunk"), [(8, 34, 1), (8, 33, 2), (8, 32, None), (3, 32, 2), (1, 18, 3)]
)
@pytest.mark.parametrize("recompute", [False, True])
def test_lean_equals_plain_autograd_in_float64(num_frames: int, side: int, chunk: int | None, recompute: bool) -> None:
    encoder, x = frozen(), frames(3 * num_frames, side)
    plain = encoder(x, num_frames)
    lean = encoder.encode(x, num_frames, chunk=chunk, recompute=recompute)
    assert lean.shape == (3, 64)
    torch.testing.assert_close(lean, plain, rtol=1e-12, atol=1e-12)
    for ours, theirs in zip(gradients(encoder, lean), gradients(encoder, plain), strict=True):
        assert float((ours - theirs).abs().max()) <= 1e-12 * float(theirs.abs().max())


def test_lean_keeps_frames_and_outputs_of_relus_alone() -> None:
    encoder, x, width = frozen(torch.float32), frames(16, 32), 8
    sizes = {parameter.untyped_storage().data_ptr() for parameter in encoder.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        made = tensor.untyped_storage()
        if made.data_ptr() not in sizes and tensor.dim() == 5:
            kept[made.data_ptr()] = made.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        features = encoder.encode(x, 8, chunk=2)
    numbers = 2 * 8 * 16 * 16 * (5 + width)  # stem
    channels = width
    for stage in range(4):
        time, side, out = 8 >> stage, 16 >> stage, width << stage
        for _ in range(2):
            middle = channels * out * 27 // (channels * 9 + 3 * out)
            before = 2 * max(time, 1) * side * side
            first = before * (2 if stage and channels != out else 1)  # space is halved first, then time
            numbers += middle * (first + before) + out * 2 * before
            channels = out
    scales = sum(m.weight.numel() for m in encoder.modules() if isinstance(m, torch.nn.BatchNorm3d))
    assert sum(kept.values()) == x.nbytes + 4 * numbers + 4 * scales  # a scale folds each weight
    assert features.shape == (2, 64)


def test_refuses_what_it_cannot_do() -> None:
    encoder = R2Plus1D(width=8)
    with pytest.raises(ValueError, match="whole number"):
        encoder.encode(frames(7, 16), 8)
    with pytest.raises(ValueError, match="frozen batch norm"):
        encoder.encode(frames(8, 16), 8, recompute=True)
    with pytest.raises(ValueError, match="8 bits"):
        encoder.encode(frames(8, 16), 8, eight_bit=True)

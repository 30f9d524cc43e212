"""The lean encoder: the plain network's features and gradients, from what the ledger says it keeps."""

from __future__ import annotations

import copy
import os
from pathlib import Path

import pytest
import torch
from networks import fill, frames
from torch import Tensor, distributed, multiprocessing

from lofi_fast.config import EncoderName
from lofi_fast.encoder import lean
from lofi_fast.encoder.lean import encode
from lofi_fast.encoder.resnet import TSMResNet
from lofi_fast.precision import cpu_computes_bf16

NAMES: tuple[EncoderName, ...] = ("tsm_r18", "tsm_r34", "tsm_r50")

pytestmark = pytest.mark.usefixtures("poison", "one_thread")


def frozen(
    name: EncoderName = "tsm_r18", width: int = 16, dtype: torch.dtype = torch.float64, seed: int = 0
) -> TSMResNet:
    encoder = TSMResNet(name, width)
    fill(encoder, seed)
    encoder.freeze_batchnorm()
    return encoder.train().to(dtype).to(memory_format=torch.channels_last)


def gradients(encoder: TSMResNet, features: Tensor) -> dict[str, Tensor]:
    """Of a loss that no direction of the features is blind to."""
    generator = torch.Generator().manual_seed(1)
    direction = torch.randn(features.shape, generator=generator, dtype=torch.float64).to(features)
    return gradients_of(encoder, (features * direction).sum() + features.square().sum())


def gradients_of(encoder: TSMResNet, loss: Tensor) -> dict[str, Tensor]:
    learning = {name: p for name, p in encoder.named_parameters() if p.requires_grad}
    return dict(zip(learning, torch.autograd.grad(loss, list(learning.values())), strict=True))


def largest_error(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> float:
    """Relative to the largest entry of each gradient, over all parameters."""
    assert ours.keys() == theirs.keys()
    return max(((ours[name] - theirs[name]).abs().max() / theirs[name].abs().max()).item() for name in theirs)


@pytest.mark.parametrize("chunk", [1, 2, 3], ids=["chunks_of_1", "chunks_of_2_and_1", "one_chunk"])
@pytest.mark.parametrize("name", NAMES)
def test_equals_plain_autograd_in_float64(name: EncoderName, chunk: int) -> None:
    encoder = frozen(name)
    x = frames(3 * 4, side=34)  # odd maps after the stem
    plain = encoder(x, 4)
    expected = gradients(encoder, plain)
    features = encode(encoder, x, 4, chunk=chunk)
    torch.testing.assert_close(features, plain, rtol=1e-12, atol=1e-13)
    assert largest_error(gradients(encoder, features), expected) <= 1e-12


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_recompute_gives_the_same_bits(name: EncoderName, dtype: torch.dtype) -> None:
    encoder = frozen(name, dtype=torch.float32)
    x = frames(5 * 4)
    with torch.autocast("cpu", dtype=dtype, enabled=dtype is not torch.float32):
        kept, again = (encode(encoder, x, 4, chunk=2, recompute=r) for r in (False, True))
    assert torch.equal(kept, again)
    expected = gradients(encoder, kept)
    for key, grad in gradients(encoder, again).items():
        assert torch.equal(grad, expected[key]), key


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("name", NAMES)
def test_eight_bits_change_no_feature_and_round_the_gradients(name: EncoderName, dtype: torch.dtype) -> None:
    encoder = frozen(name, dtype=dtype)
    x = frames(3 * 4, side=48)
    exact, kept, again = (
        encode(encoder, x, 4, chunk=2, eight_bit=eight_bit, recompute=recompute)
        for eight_bit, recompute in ((False, False), (True, False), (True, True))
    )
    assert torch.equal(kept, exact) and torch.equal(again, exact)
    expected, found, found_again = (gradients(encoder, features) for features in (exact, kept, again))
    for key, grad in found.items():
        assert torch.equal(found_again[key], grad), key
        error = (grad - expected[key]).norm() / expected[key].norm()
        # What passes through maps needs their masks alone, and the stem keeps its frames: its gradient is exact.
        assert error == 0 if key == "conv1.weight" else 1e-6 < error < 3e-3, key


def test_frames_of_unequal_height_and_width_and_one_frame_snippets() -> None:
    encoder = frozen()
    x = frames(6, side=40)[:, 3:33]
    for num_frames in (1, 2, 3, 6):
        plain = encoder(x, num_frames)
        features = encode(encoder, x, num_frames, chunk=2)
        torch.testing.assert_close(features, plain, rtol=1e-12, atol=1e-13)
        assert largest_error(gradients(encoder, features), gradients(encoder, plain)) <= 1e-12


def test_in_float16_the_stems_gradient_is_as_large_as_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a scaler of gradients sees of it: in float16 the largest gradient decides the scale of all."""
    encoder = frozen(width=32, dtype=torch.float32)
    x = frames(4 * 4, side=64)

    def largest(dtype: torch.dtype, pixels: float) -> tuple[float, float, Tensor, Tensor]:
        """Largest entries of the folded gradients: the stem's, and of all others; features and the stem's gradient."""
        monkeypatch.setattr(lean, "PIXELS", pixels)
        with torch.autocast("cpu", dtype=dtype):
            network = lean.LeanEncoder.of(encoder, 4, False)
            totals = [network.stem.total, *(c.total for block in network.blocks for c in block.branch)]
            sizes: list[float] = []
            for total in totals:
                monkeypatch.setattr(total, "take", lambda total=total: sizes.append(float(total._sum.abs().max())))
            features = network(x, 2, False)
        features.sum().backward()
        stem, *others = reversed(sizes)
        encoder.zero_grad()
        with torch.autocast("cpu", dtype=dtype):
            features = encode(encoder, x, 4)
        (grad,) = torch.autograd.grad(features.sum(), [encoder.conv1.weight])
        return stem, max(others), features, grad

    before, others, _, _ = largest(torch.float16, 1.0)
    scaled, same, features, grad = largest(torch.float16, 64.0)
    assert before / scaled == pytest.approx(64, rel=0.05) and same == pytest.approx(others, rel=0.05)
    assert scaled < 5 * others < before
    exact = encoder(x, 4)
    assert torch.allclose(features, exact, rtol=2e-2, atol=2e-2)
    (expected,) = torch.autograd.grad(exact.sum(), [encoder.conv1.weight])
    assert (grad - expected).norm() < 0.1 * expected.norm()


def test_blocks_that_are_not_shifted() -> None:
    encoder = frozen()
    for stage in encoder.stages:
        stage[1].shifted = False
    x = frames(8)
    plain, features = encoder(x, 4), encode(encoder, x, 4)
    torch.testing.assert_close(features, plain, rtol=1e-12, atol=1e-13)
    assert largest_error(gradients(encoder, features), gradients(encoder, plain)) <= 1e-12


def test_float32_is_as_good_as_plain_float32() -> None:
    exact = frozen()
    single = copy.deepcopy(exact).float()
    x = frames(16)
    expected = gradients(exact, exact(x, 8))
    plain = {k: g.double() for k, g in gradients(single, single(x, 8)).items()}
    ours = {k: g.double() for k, g in gradients(single, encode(single, x, 8)).items()}
    assert largest_error(ours, expected) <= 4 * largest_error(plain, expected)  # conv3x3's roundings


@pytest.mark.parametrize(("count", "side"), [(16, 32), (64, 64)], ids=["few", "by-products"])
def test_bfloat16_autocast_is_as_good_as_plain_autocast(count: int, side: int) -> None:
    exact = frozen()
    single = copy.deepcopy(exact).float()
    x = frames(count, side)
    expected = gradients(exact, exact(x, 8))

    def error(found: dict[str, Tensor]) -> float:
        differences = [(found[k].double() - expected[k]).norm() / expected[k].norm() for k in expected]
        return float(torch.stack(differences).mean())

    with torch.autocast("cpu", dtype=torch.bfloat16):
        plain, ours = single(x, 8), encode(single, x, 8)
    assert ours.dtype == torch.float32
    assert error(gradients(single, ours)) <= 1.5 * error(gradients(single, plain))
    assert all(g.dtype == torch.float32 for g in gradients(single, encode(single, x, 8)).values())


def test_eight_hundred_chunks_in_bfloat16_give_the_gradient_of_one() -> None:
    """Of one in float32 to the roundings of bfloat16; and of one in bfloat16 closer still, where PyTorch's own sum over
    its images is no coarser than that (`cpu_computes_bf16`).
    """
    encoder = frozen(width=8, dtype=torch.float32)
    x = frames(800, side=32)
    exact = gradients_of(encoder, encode(encoder, x, 1, chunk=800).sum())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected, found = (gradients_of(encoder, encode(encoder, x, 1, chunk=chunk).sum()) for chunk in (800, 1))
    for key, grad in found.items():
        assert grad.dtype == torch.float32
        assert (grad - exact[key]).norm() <= 0.03 * exact[key].norm(), key
        if cpu_computes_bf16():
            assert (grad - expected[key]).norm() <= 0.01 * expected[key].norm(), key


def test_live_batchnorm_takes_the_plain_path() -> None:
    encoder = frozen(dtype=torch.float32)
    encoder.freeze_batchnorm(False)
    encoder.train()
    x = frames(8)
    before = encoder.bn1.running_mean.clone()
    encode(encoder, x, 4)
    assert not torch.equal(encoder.bn1.running_mean, before)
    with pytest.raises(ValueError, match="recompute needs frozen batch norm"):
        encode(encoder, x, 4, recompute=True)
    with pytest.raises(ValueError, match="activations in 8 bits are the lean encoder's"):
        encode(encoder, x, 4, eight_bit=True)


def test_an_encoder_that_does_not_learn_builds_no_graph() -> None:
    encoder = frozen(dtype=torch.float32).requires_grad_(False)
    assert not encode(encoder, frames(8), 4).requires_grad
    encoder.conv1.weight.requires_grad_(True)
    x = frames(8)
    (grad,) = torch.autograd.grad(encode(encoder, x, 4).sum(), encoder.conv1.weight)
    (expected,) = torch.autograd.grad(encoder(x, 4).sum(), encoder.conv1.weight)
    torch.testing.assert_close(grad, expected, rtol=1e-4, atol=1e-4)


def test_only_the_last_stage_learns() -> None:
    encoder = frozen()
    encoder.requires_grad_(False)
    encoder.stages[3].requires_grad_(True)
    encoder.freeze_batchnorm()
    x = frames(8)
    assert largest_error(gradients(encoder, encode(encoder, x, 4)), gradients(encoder, encoder(x, 4))) <= 1e-12


def test_ten_steps_give_the_same_losses() -> None:
    losses = []
    for lean_way in (False, True):
        encoder = frozen(width=8)
        optimizer = torch.optim.SGD(encoder.parameters(), lr=1e-5)
        losses.append([])
        for step in range(10):
            x = frames(16, seed=step)
            features = encode(encoder, x, 8, chunk=1) if lean_way else encoder(x, 8)
            loss = (features - 1).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses[-1].append(loss.item())
    assert losses[0][-1] < losses[0][0]
    torch.testing.assert_close(torch.tensor(losses[1]), torch.tensor(losses[0]), rtol=1e-9, atol=0)


def test_frames_that_are_no_whole_snippets_are_refused() -> None:
    with pytest.raises(ValueError, match="10 frames are not a whole number of 4-frame snippets"):
        encode(frozen(), frames(10), 4)


def test_a_chunk_has_the_pixels_of_64_frames_at_112() -> None:
    assert lean.default_chunk(8, 112) == 8
    assert lean.default_chunk(8, 224) == 2
    assert lean.default_chunk(8, 1024) == 1


class Wrapped(torch.nn.Module):
    """What DistributedDataParallel is to see: the encoder behind a forward of its own."""

    def __init__(self, recompute: bool) -> None:
        super().__init__()
        self.encoder, self.recompute = frozen(), recompute

    def forward(self, x: Tensor) -> Tensor:
        return encode(self.encoder, x, 4, chunk=1, recompute=self.recompute).square().sum()


def rank_gradients(rank: int, folder: str) -> None:
    """One of two processes: two micro-batches of two snippets each, gradients exchanged with the last backward only."""
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    for recompute in (False, True):
        model = torch.nn.parallel.DistributedDataParallel(Wrapped(recompute))
        first, second = frames(32)[16 * rank : 16 * (rank + 1)].split(8)
        with model.no_sync():
            model(first).backward()
        model(second).backward()
        if rank == 0:
            grads = {k: p.grad for k, p in model.module.encoder.named_parameters() if p.requires_grad}
            torch.save(grads, f"{folder}/{recompute}.pt")
    distributed.destroy_process_group()
    os._exit(0)  # DDP keeps gloo's threads; one that lets go of a tensor while the interpreter ends would abort it


def test_several_processes_with_micro_batches_and_recompute(tmp_path: Path) -> None:
    multiprocessing.spawn(rank_gradients, (str(tmp_path),), nprocs=2)
    encoder = frozen()
    encode(encoder, frames(32), 4, chunk=8).square().sum().backward()
    expected = {k: p.grad / 2 for k, p in encoder.named_parameters() if p.grad is not None}  # the processes' mean
    for recompute in (False, True):
        assert largest_error(torch.load(tmp_path / f"{recompute}.pt"), expected) <= 1e-12


def test_gradient_scaler_sees_what_plain_autograd_gives() -> None:
    encoder = frozen(dtype=torch.float32)
    optimizer = torch.optim.SGD([p for p in encoder.parameters() if p.requires_grad], lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    x = frames(16)
    before = {k: p.detach().clone() for k, p in encoder.named_parameters()}
    for part in x.split(8):  # two micro-batches
        scaler.scale(encode(encoder, part, 4, chunk=1, recompute=True).sum()).backward()
    scaler.step(optimizer)
    learning = {k: p for k, p in encoder.named_parameters() if p.requires_grad}
    after = {k: p.detach().clone() for k, p in learning.items()}
    with torch.no_grad():
        for k, p in encoder.named_parameters():
            p.copy_(before[k])
    grads = torch.autograd.grad(encoder(x, 4).sum(), list(learning.values()))
    for (k, value), grad in zip(after.items(), grads, strict=True):
        torch.testing.assert_close(value, before[k] - 0.1 * grad, rtol=1e-3, atol=1e-3 * float(grad.abs().max()))


@pytest.mark.gpu
@pytest.mark.parametrize(("kernel", "stride"), [(3, 1), (3, 2), (1, 1)], ids=["3x3", "3x3_stride_2", "1x1"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_cudnn_adds_bias_and_relu_within_three_roundings(dtype: torch.dtype, kernel: int, stride: int) -> None:
    generator = torch.Generator().manual_seed(0)
    x, weight, bias = (
        torch.randn(shape, generator=generator).cuda()
        for shape in ((16, 64, 28, 28), (128, 64, kernel, kernel), (128,))
    )
    x, weight = (t.to(dtype, memory_format=torch.channels_last) for t in (x, weight / (8 * kernel)))
    assert lean._cudnn_adds_bias(x.device, dtype)
    convolution = lean.Convolution(stride, kernel // 2, bias, bias.to(dtype))
    sums = torch.conv2d(x.double(), weight.double(), None, stride, kernel // 2)
    exact = (sums + bias.double().view(-1, 1, 1)).relu()
    # What the result's memory held before has no part in it: all that torch has at hand for it holds no number.
    poisoned = [torch.full_like(exact, torch.nan, dtype=dtype) for _ in range(64)]
    del poisoned
    assert torch.empty_like(exact, dtype=dtype).isnan().all()
    out = convolution.forward_relu(x, weight)
    assert out.dtype == dtype and out.is_contiguous(memory_format=torch.channels_last)
    unit = torch.finfo(dtype).eps / 2
    products = torch.conv2d(x.double().abs(), weight.double().abs(), None, stride, kernel // 2)
    summed = weight[0].numel() * 2.0**-24 * products  # what float32 sums err by, in any order
    allowed = unit * (bias.double().abs().view(-1, 1, 1) + sums.abs() + exact) * 1.01 + summed
    assert ((out.double() - exact).abs() <= allowed).all()


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["tsm_r18", "tsm_r50"])
def test_bfloat16_on_the_gpu_is_as_good_as_plain_autocast(name: EncoderName) -> None:
    """Over several networks: with the weights of one, whose roundings all frames share, either may come out ahead."""
    x = frames(16, side=64).cuda()
    of_features, of_gradients = torch.zeros(2), torch.zeros(2)
    for seed in range(6):
        exact = frozen(name, seed=seed).cuda()
        single = copy.deepcopy(exact).float()
        expected_features = exact(x, 8)
        expected = gradients(exact, expected_features)
        with torch.autocast("cuda", dtype=torch.bfloat16):
            both = encode(single, x, 8, chunk=1), single(x, 8)
        for form, features in enumerate(both):
            found = gradients(single, features)
            of_features[form] += ((features.double() - expected_features).norm() / expected_features.norm()).item()
            differences = [(found[k].double() - expected[k]).norm() / expected[k].norm() for k in expected]
            of_gradients[form] += torch.stack(differences).mean().item()
    ours, plain = of_features.tolist()
    assert ours <= 1.5 * plain
    ours, plain = of_gradients.tolist()
    assert ours <= 1.5 * plain

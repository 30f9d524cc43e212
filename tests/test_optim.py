"""Optimisers of either implementation against torch's own, and learning-rate schedules."""

from __future__ import annotations

import importlib
import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from torch import Tensor, nn

from lofi_fast import optim
from lofi_fast.config import OptimizerImpl, StageConfig
from lofi_fast.errors import InputError
from lofi_fast.optim import Implementation, choose_implementation, learning_rate, make_optimizer, set_learning_rate
from lofi_fast.run import checkpoint
from tests import apex_stand_in

STEP = StageConfig(epochs=15, batch=1, optimizer="sgd", lr=0.1)
COSINE = StageConfig(epochs=10, batch=1, optimizer="adamw", lr=2e-3, weight_decay=0.02, schedule="cosine")
PLAIN = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam, "adamw": torch.optim.AdamW}
MOMENTS = ("exp_avg", "exp_avg_sq")
SHAPES = ((), (1,), (7,), (33, 17), (16, 8, 3, 3), (6, 5, 1, 1), (5, 1, 3, 3))
SCALE = 2.0**16


@dataclass(frozen=True)
class Form:
    """One implementation on one device, to be looped over."""

    asked: OptimizerImpl | Literal["stand-in"]
    device: str = "cpu"

    def make(self, config: StageConfig, learning: Sequence[nn.Parameter]) -> torch.optim.Optimizer:
        with pytest.MonkeyPatch.context() as patch:
            if self.asked != "stand-in":
                return make_optimizer(config, learning, self.asked)
            patch.setitem(sys.modules, "apex.optimizers", apex_stand_in)
            patch.setattr(optim, "choose_implementation", lambda *_: Implementation("apex", "a stand-in"))
            return make_optimizer(config, learning, "apex")


TORCH, STAND_IN, TORCH_CUDA, APEX = Form("torch"), Form("stand-in"), Form("torch", "cuda"), Form("apex", "cuda")


@pytest.fixture(params=[pytest.param(TORCH, id="torch"), pytest.param(STAND_IN, id="apex stand-in"),
                        pytest.param(TORCH_CUDA, id="torch cuda", marks=pytest.mark.gpu),
                        pytest.param(APEX, id="apex", marks=pytest.mark.gpu)])  # fmt: skip
def form(request: pytest.FixtureRequest) -> Form:
    if request.param == APEX:
        pytest.importorskip("amp_C", reason="NVIDIA's apex with its kernels is not installed", exc_type=ImportError)
    chosen: Form = request.param
    return chosen


def stage(name: str, **changes: Any) -> StageConfig:
    return replace(COSINE, optimizer=name, lr=0.05, **changes)


def parameters(device: str = "cpu", dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    """As the models have them: maps of four dimensions in channels-last order."""
    random = torch.Generator().manual_seed(0)
    drawn = [torch.randn(shape, generator=random).to(device, dtype) for shape in SHAPES]
    return [nn.Parameter(t.to(memory_format=torch.channels_last) if t.ndim == 4 else t) for t in drawn]


def give_gradients(learning: Sequence[nn.Parameter], step: int, scale: float = 1.0) -> None:
    random = torch.Generator().manual_seed(1 + step)
    for p in learning:
        drawn = torch.randn(p.shape, generator=random) * 10.0 ** (step % 3 - 1) * scale
        p.grad = torch.empty_like(p).copy_(drawn)


def train(optimizer: torch.optim.Optimizer, learning: Sequence[nn.Parameter], steps: range, scaler: Any = None) -> None:
    for step in steps:
        set_learning_rate(optimizer, 0.05 / (step + 1))
        give_gradients(learning, step, SCALE if scaler else 1.0)
        if scaler:
            scaler.step(optimizer)
            scaler.update()
        else:
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)


def plain(name: str, dtype: torch.dtype, steps: range) -> tuple[list[nn.Parameter], torch.optim.Optimizer]:
    """torch's own optimiser, one operation after another."""
    learning = parameters(dtype=dtype)
    optimizer = PLAIN[name](learning, lr=0.05, weight_decay=0.02, foreach=False, fused=False)
    train(optimizer, learning, steps)
    return learning, optimizer


def error(learning: Sequence[Tensor], reference: Sequence[Tensor]) -> float:
    return max(float((a.detach().cpu() - b.detach()).abs().max()) for a, b in zip(learning, reference, strict=True))


def bits_equal(ours: Sequence[Tensor], theirs: Sequence[Tensor]) -> bool:
    return all(torch.equal(a.cpu(), b.cpu()) for a, b in zip(ours, theirs, strict=True))


def moments(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [state[name] for state in optimizer.state.values() for name in ("step", *MOMENTS)]


def through_a_file(optimizer: torch.optim.Optimizer, folder: Path) -> dict[str, Any]:
    checkpoint.save_atomic({"optimizer": optimizer.state_dict(), "position": {}}, folder / "last.pt")
    state: dict[str, Any] = checkpoint.load(folder / "last.pt")["optimizer"]
    return state


# The update


@pytest.mark.parametrize("name", PLAIN)
def test_the_update_is_torchs_own_to_rounding(form: Form, name: str) -> None:
    learning = parameters(form.device)
    optimizer = form.make(stage(name), learning)
    train(optimizer, learning, range(30))
    (exact, reference), (rounded, _) = (plain(name, dtype, range(30)) for dtype in (torch.float64, torch.float32))
    assert error(learning, exact) <= 2 * error(rounded, exact)
    for state, theirs in zip(optimizer.state.values(), reference.state.values(), strict=True):
        assert float(state["step"]) == 30
        for moment, off in zip(MOMENTS, (1e-6, 2e-5), strict=True):  # apex rounds 1 - 0.999 to fp32: off by 1.3e-5,
            difference = state[moment].cpu() - theirs[moment]  # in the bias correction as well, so updates agree
            assert difference.abs().max() <= off * theirs[moment].abs().max(), moment


def test_the_momentum_is_torchs_own_and_there_before_the_first_step(form: Form, tmp_path: Path) -> None:
    learning = parameters(form.device)
    optimizer = form.make(stage("sgd", momentum=0.9), learning)
    before = [t.data_ptr() for state in optimizer.state.values() for t in state.values()]
    assert len(before) == len(learning)
    train(optimizer, learning, range(10))
    resumed = form.make(stage("sgd", momentum=0.9), learning)
    resumed.load_state_dict(through_a_file(optimizer, tmp_path))
    assert before == [t.data_ptr() for state in optimizer.state.values() for t in state.values()]
    train(resumed, learning, range(10, 20))

    plainly = {}
    for dtype in (torch.float64, torch.float32):
        plainly[dtype] = parameters(dtype=dtype)
        own = torch.optim.SGD(plainly[dtype], lr=0.05, momentum=0.9, weight_decay=0.02, foreach=False, fused=False)
        train(own, plainly[dtype], range(20))
    exact, rounded = plainly[torch.float64], plainly[torch.float32]
    assert error(learning, exact) <= 2 * error(rounded, exact)
    buffers = [(state["momentum_buffer"].cpu(), own.state[p]["momentum_buffer"])
               for p, state in zip(rounded, resumed.state.values(), strict=True)]  # fmt: skip
    assert all((ours - theirs).abs().max() <= 1e-6 * theirs.abs().max() for ours, theirs in buffers)


@pytest.mark.parametrize("name", PLAIN)
def test_frozen_parameters_are_left_alone(form: Form, name: str) -> None:
    learning = parameters(form.device)
    frozen = learning[3].requires_grad_(False)
    optimizer = form.make(stage(name), learning)
    before = frozen.clone()
    frozen.grad = torch.ones_like(frozen)
    optimizer.step()
    assert torch.equal(frozen, before) and frozen not in optimizer.state


@pytest.mark.parametrize("name", PLAIN)
def test_a_gradient_of_another_memory_layout_is_the_same_gradient(form: Form, name: str) -> None:
    """Fused kernels walk memory by one index: unlike strides would pair a weight with another weight's gradient."""
    updated = []
    for order in (torch.preserve_format, torch.contiguous_format):
        learning = parameters(form.device)
        optimizer = form.make(stage(name), learning)
        for step in range(3):
            give_gradients(learning, step)
            for p in learning:
                p.grad = p.grad.clone(memory_format=order)
            optimizer.step()
        updated.append(learning)
    assert bits_equal(*updated)


@pytest.mark.parametrize("name", PLAIN)
def test_parameters_of_any_order_of_dimensions_in_memory(form: Form, name: str) -> None:
    """As the head's weights of align_linear have them; apex's kernels refuse them as they are."""
    values = torch.randn(4, 5, 6, generator=torch.Generator().manual_seed(0)).to(form.device)
    ordinary, permuted = (
        nn.Parameter(values.clone()),
        nn.Parameter(values.permute(1, 2, 0).contiguous().permute(2, 0, 1)),
    )
    assert not permuted.is_contiguous()
    for parameter in (ordinary, permuted):
        optimizer = form.make(stage(name), [parameter])
        for step in range(3):
            parameter.grad = torch.sin(values + step)
            optimizer.step()
    assert torch.equal(ordinary, permuted)


@pytest.mark.parametrize("name", PLAIN)
def test_a_parameter_without_a_gradient_waits(form: Form, name: str) -> None:
    learning, alone = parameters(form.device), parameters(form.device)[:-1]
    idle = learning[-1].detach().clone()
    optimizer, other = form.make(stage(name), learning), form.make(stage(name), alone)
    for step in range(3):
        for part, updates in ((learning[:-1], optimizer), (alone, other)):
            give_gradients(part, step)
            updates.step()
    assert torch.equal(learning[-1], idle) and bits_equal(learning[:-1], alone)
    assert name == "sgd" or float(optimizer.state[learning[-1]]["step"]) == 0


@pytest.mark.parametrize("name", PLAIN)
def test_what_an_update_changes_is_counted_as_changed(form: Form, name: Literal["sgd", "adam", "adamw"]) -> None:
    changed, waiting = (nn.Parameter(torch.ones(3, device=form.device)) for _ in range(2))
    optimizer = form.make(replace(STEP, optimizer=name), [changed, waiting])
    changed.grad = torch.ones_like(changed)
    before = changed._version, waiting._version
    optimizer.step()
    assert changed._version > before[0] and waiting._version == before[1]


def test_apex_refuses_steps_that_it_would_count_wrongly() -> None:
    learning = parameters()
    optimizer = STAND_IN.make(COSINE, learning)
    give_gradients(learning[:-1], 0)
    optimizer.step()
    give_gradients(learning, 1)
    with pytest.raises(RuntimeError, match="--optimizer-impl torch"):
        optimizer.step()


def test_apex_takes_no_other_precision() -> None:
    """Its kernels would leave such parameters out without a word."""
    with pytest.raises(ValueError, match="float32"):
        STAND_IN.make(COSINE, parameters(dtype=torch.float64))


@pytest.mark.parametrize("name", PLAIN)
def test_scaled_gradients_and_a_step_left_out(form: Form, name: str) -> None:
    """Under a GradScaler the updates are those of plain gradients, and an infinite one changes and counts nothing."""
    learning, unscaled = parameters(form.device), parameters(form.device)
    optimizer, other = form.make(stage(name), learning), form.make(stage(name), unscaled)
    scaler = torch.amp.GradScaler(form.device, init_scale=SCALE)
    scaler.scale(torch.zeros((), device=form.device))
    train(optimizer, learning, range(3), scaler)
    train(other, unscaled, range(3))
    scaled, plain = [*learning, *moments(optimizer)], [*unscaled, *moments(other)]
    if form == TORCH_CUDA:  # its kernel multiplies, unscales and adds weight decay in another order, and rounds so
        assert all(torch.allclose(a, b, rtol=1e-6, atol=1e-7) for a, b in zip(scaled, plain, strict=True))
    else:
        assert bits_equal(scaled, plain)

    before = [x.clone() for x in (*learning, *moments(optimizer))]
    give_gradients(learning, 3, SCALE)
    learning[4].grad[3, 2, 1, 0] = math.inf
    scaler.step(optimizer)
    scaler.update()
    assert bits_equal([*learning, *moments(optimizer)], before)
    assert scaler.get_scale() == SCALE / 2


def test_gradients_are_given_up_or_zeroed(form: Form) -> None:
    learning = parameters(form.device)
    for name in PLAIN:
        optimizer = form.make(stage(name), learning)
        give_gradients(learning, 0)
        optimizer.zero_grad(set_to_none=False)
        assert all(p.grad is not None and not p.grad.any() for p in learning)
        optimizer.zero_grad(set_to_none=True)
        assert all(p.grad is None for p in learning)


# The state


@pytest.mark.parametrize("name", PLAIN)
def test_all_state_is_there_before_the_first_step(form: Form, name: str) -> None:
    learning = parameters(form.device)
    optimizer = form.make(stage(name), learning)
    before = [t.data_ptr() for t in moments(optimizer)] if name != "sgd" else []
    train(optimizer, learning, range(2))
    assert before == [t.data_ptr() for state in optimizer.state.values() for t in state.values()]
    assert len(before) == (0 if name == "sgd" else 3 * len(learning))


@pytest.mark.gpu
@pytest.mark.parametrize("name", PLAIN)
def test_a_step_makes_no_temporary_tensors(name: str) -> None:
    learning = [nn.Parameter(torch.ones(1 << 22, device="cuda")) for _ in range(4)]
    optimizer = TORCH_CUDA.make(stage(name), learning)
    for p in learning:
        p.grad = torch.ones_like(p)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    optimizer.step()
    assert torch.cuda.max_memory_allocated() - before < 1 << 20


@pytest.mark.parametrize("name", PLAIN)
def test_a_resumed_run_goes_on_bit_by_bit(form: Form, name: str, tmp_path: Path) -> None:
    unbroken = parameters(form.device)
    whole = form.make(stage(name), unbroken)
    train(whole, unbroken, range(6))

    broken = parameters(form.device)
    optimizer = form.make(stage(name), broken)
    train(optimizer, broken, range(3))
    saved = through_a_file(optimizer, tmp_path)
    resumed = form.make(stage(name), broken)
    resumed.load_state_dict(saved)
    train(resumed, broken, range(3, 6))
    assert bits_equal(broken, unbroken) and bits_equal(moments(resumed), moments(whole))


@pytest.mark.parametrize(("first", "then"), [
    pytest.param(TORCH, STAND_IN, id="torch to apex stand-in"),
    pytest.param(STAND_IN, TORCH, id="apex stand-in to torch"),
    pytest.param(TORCH_CUDA, TORCH, id="cuda to cpu", marks=pytest.mark.gpu),
    pytest.param(TORCH, TORCH_CUDA, id="cpu to cuda", marks=pytest.mark.gpu),
    pytest.param(TORCH_CUDA, APEX, id="torch to apex", marks=pytest.mark.gpu),
    pytest.param(APEX, TORCH_CUDA, id="apex to torch", marks=pytest.mark.gpu),
])  # fmt: skip
@pytest.mark.parametrize("name", PLAIN)
def test_one_implementation_resumes_the_others_checkpoint(name: str, first: Form, then: Form, tmp_path: Path) -> None:
    if APEX in (first, then):
        pytest.importorskip("amp_C", reason="NVIDIA's apex with its kernels is not installed", exc_type=ImportError)
    learning = parameters(first.device)
    optimizer = first.make(stage(name), learning)
    train(optimizer, learning, range(5))
    saved = through_a_file(optimizer, tmp_path)

    moved = [nn.Parameter(p.detach().to(then.device)) for p in learning]
    other = then.make(stage(name), moved)
    other.load_state_dict(saved)
    assert bits_equal(moments(other), moments(optimizer))
    again = through_a_file(other, tmp_path)
    assert again["state"].keys() == saved["state"].keys()
    for i in saved["state"]:
        assert again["state"][i].keys() == saved["state"][i].keys()
        assert all(torch.equal(again["state"][i][key], saved["state"][i][key]) for key in saved["state"][i])

    train(other, moved, range(5, 12))
    (exact, _), (rounded, _) = (plain(name, dtype, range(12)) for dtype in (torch.float64, torch.float32))
    assert error(moved, exact) <= 2 * error(rounded, exact)


@pytest.mark.parametrize("name", PLAIN)
def test_torchs_own_optimisers_and_ours_read_each_others_state(form: Form, name: str, tmp_path: Path) -> None:
    """Earlier checkpoints were written by torch's unfused form: its state is taken over, and not its form."""
    theirs, before = plain(name, torch.float32, range(4))
    ours = [nn.Parameter(p.detach().to(form.device)) for p in theirs]
    optimizer = form.make(stage(name, weight_decay=0.5), ours)
    optimizer.load_state_dict(through_a_file(before, tmp_path))
    group = optimizer.param_groups[0]
    assert (group.get("fused"), group.get("foreach")) == (True if form.asked == "torch" else None, None)
    assert (group["weight_decay"], group["lr"]) == (0.02, 0.05 / 4)
    train(optimizer, ours, range(4, 8))

    after = PLAIN[name](theirs, lr=1.0, foreach=False, fused=False)
    after.load_state_dict(through_a_file(before, tmp_path))
    train(after, theirs, range(4, 8))
    assert error(ours, theirs) <= 1e-6 * max(float(p.detach().abs().max()) for p in theirs)

    back = PLAIN[name](theirs, lr=1.0)
    back.load_state_dict(through_a_file(optimizer, tmp_path))
    assert back.param_groups[0]["weight_decay"] == 0.02
    give_gradients(theirs, 8)
    back.step()
    assert name == "sgd" or all(float(state["step"]) == 9 for state in back.state.values())


def test_moments_of_another_memory_layout_are_the_same_moments(form: Form, tmp_path: Path) -> None:
    updated = []
    for order in (torch.channels_last, torch.contiguous_format):
        source = nn.Parameter(torch.ones(16, 8, 3, 3, device=form.device).to(memory_format=order))
        optimizer = form.make(COSINE, [source])
        give_gradients([source], 0)
        optimizer.step()
        target = nn.Parameter(torch.ones(16, 8, 3, 3, device=form.device).to(memory_format=torch.channels_last))
        resumed = form.make(COSINE, [target])
        resumed.load_state_dict(through_a_file(optimizer, tmp_path))
        give_gradients([target], 1)
        resumed.step()
        updated.append([target])
    assert bits_equal(*updated)


# The choice


@pytest.fixture
def empty_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A Python that finds modules in this folder alone, and has not loaded apex."""
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    for name in apex_modules():
        monkeypatch.delitem(sys.modules, name)
    importlib.invalidate_caches()
    yield tmp_path
    for name in apex_modules():
        del sys.modules[name]


def apex_modules() -> list[str]:
    return [name for name in sys.modules if name.split(".")[0] in ("apex", "amp_C")]


def write(folder: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)


MUST_NOT_RUN = "raise AssertionError('a stranger was imported')"
PYTHON_PART = {"apex/__init__.py": "", "apex/optimizers/__init__.py": "class FusedSGD: ...\nclass FusedAdam: ..."}
KERNELS = "multi_tensor_sgd = multi_tensor_adam = print"


@pytest.mark.parametrize(("files", "problem"), [
    pytest.param({}, "apex is not installed", id="nothing"),
    pytest.param({"apex/__init__.py": MUST_NOT_RUN, "apex/models.py": ""}, "is not NVIDIA's", id="PyPI's apex"),
    pytest.param({"apex.py": MUST_NOT_RUN}, "is not NVIDIA's", id="a module"),
    pytest.param({"apex/setup.py": MUST_NOT_RUN}, "is not NVIDIA's", id="a folder"),
    pytest.param(PYTHON_PART, "without its CUDA kernels", id="Python only"),
    pytest.param(
        PYTHON_PART | {"amp_C.py": "raise ImportError('amp_C.so: undefined\\nsymbol: _ZN3c10')"},
        "does not load: amp_C.so: undefined symbol: _ZN3c10", id="built for another torch",
    ),
    pytest.param(PYTHON_PART | {"amp_C.py": "multi_tensor_adam = print"}, "without multi_tensor_sgd", id="no kernel"),
])  # fmt: skip
def test_what_is_not_a_usable_apex(empty_path: Path, files: dict[str, str], problem: str) -> None:
    write(empty_path, files)
    cuda = torch.device("cuda")
    chosen = choose_implementation("auto", cuda)
    assert chosen.name == "torch" and problem in str(chosen) and str(chosen).startswith("torch, fused (")
    with pytest.raises(InputError, match="--optimizer-impl") as refusal:
        choose_implementation("apex", cuda)
    assert problem in str(refusal.value) and "\n" not in str(refusal.value)


def test_a_usable_apex_is_taken_on_a_gpu_alone(empty_path: Path) -> None:
    write(empty_path, PYTHON_PART | {"amp_C.py": KERNELS})
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    assert str(choose_implementation("auto", cuda)) == "NVIDIA apex (installed with its kernels)"
    assert str(choose_implementation("apex", cuda)) == "NVIDIA apex (asked for)"
    assert str(choose_implementation("torch", cuda)) == "torch, fused (asked for)"
    assert str(choose_implementation("auto", cpu)) == "torch, fused (apex's kernels need a CUDA device)"
    with pytest.raises(InputError, match="need a CUDA device"):
        choose_implementation("apex", cpu)
    with pytest.raises(InputError, match="need a CUDA device"):
        make_optimizer(STEP, parameters(), "apex")


# Schedules and precision


def test_the_papers_schedule_halves_every_five_epochs() -> None:
    rates = [learning_rate(STEP, epoch, 3, 7) for epoch in (0, 4, 5, 9, 10, 14)]
    assert rates == [0.1, 0.1, 0.05, 0.05, 0.025, 0.025]


def test_the_cosine_rises_for_a_tenth_and_falls_to_nothing() -> None:
    rates = [learning_rate(COSINE, epoch, step, 20) for epoch in range(10) for step in range(20)]
    peak = rates.index(max(rates))
    assert peak in (19, 20)  # a tenth of 200 steps
    assert rates[:peak] == sorted(rates[:peak]) and rates[peak:] == sorted(rates[peak:], reverse=True)
    assert rates[0] == pytest.approx(2e-3 * (0.5 / 200) / 0.1)
    assert rates[-1] < 1e-6
    assert rates[110] == pytest.approx(1e-3 * (1 + math.cos(math.pi * ((110.5 / 200) - 0.1) / 0.9)))


def test_the_warm_up_is_as_long_as_it_is_set() -> None:
    third = replace(COSINE, warm_up=0.3)
    rates = [learning_rate(third, epoch, step, 20) for epoch in range(10) for step in range(20)]
    assert rates.index(max(rates)) in (59, 60)
    assert rates[30] == pytest.approx(2e-3 * (30.5 / 200) / 0.3)
    assert learning_rate(replace(COSINE, warm_up=0.0), 0, 0, 1000) == pytest.approx(2e-3, rel=1e-5)

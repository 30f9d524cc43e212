"""Optimisers and learning-rate schedules of the stages.

The update is computed by NVIDIA's apex or by torch's fused kernels: the same one to fp32 rounding. Neither makes
temporary tensors, so a step needs no more memory than the plan measured before it; torch's foreach form makes some of
the size of all parameters. Both keep their state in torch's form, so a checkpoint of one resumes under the other.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from importlib import import_module
from importlib.machinery import PathFinder
from importlib.util import find_spec
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lofi_fast.config import OptimizerImpl, StageConfig
from lofi_fast.errors import InputError

MOMENTS = ("exp_avg", "exp_avg_sq")  # Adam's, of a parameter's shape, named alike by apex and torch
MOMENTUM = "momentum_buffer"  # SGD's, likewise
FORM = ("fused", "foreach", "capturable", "differentiable")  # settings that choose a form of torch's, not an update


@dataclass(frozen=True)
class Implementation:
    """Whose kernels update the parameters."""

    name: Literal["apex", "torch"]
    reason: str

    def __str__(self) -> str:
        return f"{'NVIDIA apex' if self.name == 'apex' else 'torch, fused'} ({self.reason})"


def choose_implementation(asked: OptimizerImpl, device: torch.device) -> Implementation:
    """apex where it can be used and torch is not asked for. Raises InputError when apex is asked for and cannot be."""
    if asked == "torch":
        return Implementation("torch", "asked for")
    problem = apex_problem() if device.type == "cuda" else "apex's kernels need a CUDA device"
    if problem is None:
        return Implementation("apex", "asked for" if asked == "apex" else "installed with its kernels")
    if asked == "apex":
        raise InputError(
            f"--optimizer-impl apex: {problem}; use --optimizer-impl auto, or build apex with its CUDA kernels from "
            "NVIDIA's source on a machine with a GPU"
        )
    return Implementation("torch", problem)


def apex_problem() -> str | None:
    """Why NVIDIA's apex cannot be used from this Python, or None. Another package of that name is not imported."""
    package = find_spec("apex")
    if package is None:
        return "apex is not installed"
    folders = list(package.submodule_search_locations or [])
    if PathFinder.find_spec("apex.optimizers", folders) is None:
        where = package.origin or "".join(folders[:1])
        return f"the apex at {where} is not NVIDIA's: PyPI's package of that name is another project"
    if find_spec("amp_C") is None:
        return "apex is installed without its CUDA kernels"
    try:
        kernels, optimizers = import_module("amp_C"), import_module("apex.optimizers")
    except Exception as error:  # built for another torch, it can fail in any way
        return f"apex is installed and does not load: {' '.join(str(error).split()) or type(error).__name__}"
    needed = ((kernels, "multi_tensor_sgd"), (kernels, "multi_tensor_adam"), (optimizers, "FusedSGD"),
              (optimizers, "FusedAdam"))  # fmt: skip
    missing = [name for module, name in needed if not hasattr(module, name)]
    return f"apex is installed without {', '.join(missing)}" if missing else None


def make_optimizer(config: StageConfig, parameters: Iterable[nn.Parameter], asked: OptimizerImpl = "auto") -> Optimizer:
    """SGD (the paper's joint stage: without momentum), Adam or AdamW, over the parameters that learn.

    Its state is allocated now: it is part of what a step needs, and a first update that runs out of memory halfway
    could not be taken again. State dicts are in torch's form whichever implementation `asked` comes to.
    """
    learning = [p for p in parameters if p.requires_grad]
    apex = choose_implementation(asked, learning[0].device).name == "apex"
    optimizer = _apex_optimizer(config, learning) if apex else _torch_optimizer(config, learning)
    if config.optimizer == "sgd" and config.momentum:
        for parameter in learning:  # zeros, by which the first update is that of a buffer which begins with a gradient
            optimizer.state[parameter] = {MOMENTUM: torch.zeros_like(parameter)}
    elif config.optimizer != "sgd":
        for parameter in learning:
            moments = {name: torch.zeros_like(parameter) for name in MOMENTS}
            step = torch.zeros((), device="cpu" if apex else parameter.device)  # where each implementation counts
            optimizer.state[parameter] = {"step": step, **moments}
    optimizer.register_step_pre_hook(_lay_out_gradients)
    optimizer.register_step_post_hook(_count_update)
    optimizer.register_load_state_dict_pre_hook(_keep_form)
    optimizer.register_load_state_dict_post_hook(_lay_out_moments)
    return optimizer


def _torch_optimizer(config: StageConfig, learning: Sequence[nn.Parameter]) -> Optimizer:
    if config.optimizer == "sgd":
        return torch.optim.SGD(
            learning, lr=config.lr, momentum=config.momentum, weight_decay=config.weight_decay, fused=True
        )
    kind = torch.optim.Adam if config.optimizer == "adam" else torch.optim.AdamW
    return kind(learning, lr=config.lr, weight_decay=config.weight_decay, fused=True)


class _ApexForm(Optimizer):
    """What has to differ in apex's optimisers to stand where torch's do; goes before them in the order of bases."""

    def zero_grad(self, set_to_none: bool = True) -> None:
        Optimizer.zero_grad(self, set_to_none)  # apex's takes no argument

    def get_momentums(self, parameters: list[Tensor]) -> tuple[list[Tensor], bool]:
        """The buffers that FusedSGD hands to its kernel, and whether they are new. The kernel leaves them alone at
        momentum 0: the parameters stand in for them, since apex would allocate as much again.
        """
        if not self.param_groups[0]["momentum"]:
            return parameters, True
        return [self.state[p][MOMENTUM] for p in parameters], False


def _apex_optimizer(config: StageConfig, learning: Sequence[nn.Parameter]) -> Optimizer:
    if other := {p.dtype for p in learning} - {torch.float32}:
        raise ValueError(f"apex updates float32 parameters here, and was given {other}: ask for torch's optimisers")
    apex = import_module("apex.optimizers")
    settings: dict[str, Any] = {"lr": config.lr, "weight_decay": config.weight_decay}
    if config.optimizer == "sgd":
        fused_sgd = type("FusedSGD", (_ApexForm, apex.FusedSGD), {})
        optimizer = cast(Any, fused_sgd(learning, momentum=config.momentum, **settings))
        optimizer.multi_tensor_sgd = _by_memory(optimizer.multi_tensor_sgd)
        return cast(Optimizer, optimizer)
    fused_adam = type("FusedAdam", (_ApexForm, apex.FusedAdam), {})
    optimizer = cast(Any, fused_adam(learning, adam_w_mode=config.optimizer == "adamw", **settings))
    optimizer.multi_tensor_adam = _by_memory(optimizer.multi_tensor_adam)
    optimizer.register_step_pre_hook(_count_steps)
    return cast(Optimizer, optimizer)


def _by_memory(kernel: Callable[..., object]) -> Callable[..., object]:
    """One of apex's kernels for tensors of any order of dimensions in memory. It walks memory by one index, and refuses
    all but contiguous and channels-last ones. Those of one parameter lie alike (`_lay_out_gradients`), so of the others
    it is given the numbers in a row.
    """

    def run(chunk_size: int, flag: Tensor, lists: Sequence[Sequence[Tensor]], *rest: object) -> object:
        return kernel(chunk_size, flag, [[_in_a_row(tensor) for tensor in tensors] for tensors in lists], *rest)

    return run


def _in_a_row(tensor: Tensor) -> Tensor:
    if tensor.is_contiguous() or (tensor.dim() == 4 and tensor.is_contiguous(memory_format=torch.channels_last)):
        return tensor
    return tensor.detach().as_strided((tensor.numel(),), (1,))


def _count_steps(optimizer: Optimizer, *_: object) -> None:
    """Keep apex's count of steps as torch does: for each parameter, in its state, of the steps that it had a gradient
    in. apex takes its bias correction from one count of the whole group, so these counts must agree.
    """
    for group in optimizer.param_groups:
        counts = [optimizer.state[p]["step"] for p in group["params"] if p.grad is not None]
        if not counts:
            continue
        done = {int(count) for count in torch.stack(counts).tolist()}
        if len(done) > 1:
            raise RuntimeError(
                f"apex counts the steps of all parameters together, and these have had {sorted(done)} gradients: "
                "use --optimizer-impl torch"
            )
        group["step"] = max(done)  # apex adds this step
        torch._foreach_add_(counts, 1)


def _keep_form(optimizer: Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
    """Take a saved state over with its settings, but for those that say how the update is computed: they, and the
    ones that only one implementation knows, stay this optimiser's own.
    """
    groups = [
        {name: own if name in FORM else saved.get(name, own) for name, own in group.items()}
        for group, saved in zip(optimizer.param_groups, state_dict["param_groups"], strict=True)
    ]
    return state_dict | {"param_groups": groups}


def _lay_out_gradients(optimizer: Optimizer, *_: object) -> None:
    """Fused kernels walk a parameter, its gradient and its moments by one index into memory; unlike strides give wrong
    updates without an error (apex, and torch on a CPU). Autograd's own gradients have the parameter's strides.
    """
    for group in optimizer.param_groups:
        for p in group["params"]:
            if p.grad is not None:
                p.grad = _laid_out_as(p, p.grad)


def _lay_out_moments(optimizer: Optimizer) -> None:
    for parameter, state in optimizer.state.items():
        state.update({name: _laid_out_as(parameter, state[name]) for name in (*MOMENTS, MOMENTUM) if name in state})


def _count_update(optimizer: Optimizer, *_: object) -> None:
    """Count the update as torch counts other changes in place (`Tensor._version`), which fused kernels leave out: by
    that count a step that fails is known to have changed something, or nothing. The kernels allocate nothing, so an
    update is made as a whole, or memory ran out before it.
    """
    torch.autograd.graph.increment_version(
        [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    )


def _laid_out_as(parameter: Tensor, tensor: Tensor) -> Tensor:
    strides = zip(parameter.shape, parameter.stride(), tensor.stride(), strict=True)
    if all(size == 1 or one == other for size, one, other in strides):
        return tensor
    return torch.empty_like(parameter).copy_(tensor)


def learning_rate(config: StageConfig, epoch: int, step: int, steps: int) -> float:
    """Learning rate of one step of `steps` in an epoch: x `decay` every `decay_every` epochs, or a cosine down to zero
    after a linear rise.
    """
    if config.schedule == "step":
        return config.lr * config.decay ** (epoch // config.decay_every)
    done = (epoch + (step + 0.5) / steps) / config.epochs
    if done < config.warm_up:
        return config.lr * done / config.warm_up
    return config.lr * 0.5 * (1 + math.cos(math.pi * (done - config.warm_up) / (1 - config.warm_up)))


def set_learning_rate(optimizer: Optimizer, lr: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr

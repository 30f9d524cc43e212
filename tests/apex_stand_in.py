"""What `apex.optimizers` offers, in plain PyTorch on any device, for machines where apex cannot run.

Written from apex's documentation and published behaviour: the arguments, `zero_grad` without any, Adam's step count in
the parameter group, SGD's momentum buffers made by `get_momentums`, arithmetic in fp32 from hyperparameters rounded to
fp32, and kernels that walk memory by one index, and refuse tensors that are neither contiguous nor channels-last. The
tests marked `gpu` run apex itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

CHUNK = 65536  # numbers of one block, which say nothing here


def flat(tensor: Tensor) -> Tensor:
    """The elements as they lie in memory."""
    return tensor.detach().as_strided((tensor.numel(),), (1,))


def check(lists: Sequence[Sequence[Tensor]]) -> None:
    """What apex's kernels refuse, and its words."""
    for tensor in (tensor for tensors in lists for tensor in tensors):
        image = tensor.dim() == 4 and tensor.is_contiguous(memory_format=torch.channels_last)
        if not (image or tensor.is_contiguous()):
            raise RuntimeError("A tensor was not contiguous.")


def fp32(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float32)


class FusedAdam(torch.optim.Optimizer):
    def __init__(
        self, params: Any, lr: float = 1e-3, bias_correction: bool = True, betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8, adam_w_mode: bool = True, weight_decay: float = 0.0,
    ) -> None:  # fmt: skip
        super().__init__(params, {"lr": lr, "bias_correction": bias_correction, "betas": betas, "eps": eps,
                                  "weight_decay": weight_decay})  # fmt: skip
        self.adam_w_mode = adam_w_mode
        self.multi_tensor_adam = multi_tensor_adam

    def zero_grad(self) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                p.grad = None

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            group["step"] = group.get("step", 0) + 1
            learning = [p for p in group["params"] if p.grad is not None]
            for parameter in learning:
                state = self.state[parameter]
                if len(state) == 0:
                    state["exp_avg"] = torch.zeros_like(parameter.data).float()
                    state["exp_avg_sq"] = torch.zeros_like(parameter.data).float()
            moments = [[self.state[p][name] for p in learning] for name in ("exp_avg", "exp_avg_sq")]
            lists = [[p.grad for p in learning], learning, *moments]
            rest = (group["lr"], *group["betas"], group["eps"], group["step"], self.adam_w_mode, group["weight_decay"])
            self.multi_tensor_adam(CHUNK, torch.zeros(1), lists, *rest)


def multi_tensor_adam(
    chunk_size: int, flag: Tensor, lists: Sequence[Sequence[Tensor]], lr: float, beta1: float, beta2: float, eps: float,
    step: int, adam_w: bool, weight_decay: float,
) -> None:  # fmt: skip
    check(lists)
    first, second = fp32(beta1), fp32(beta2)
    correction1, correction2 = ((1 - beta.double() ** step).float() for beta in (first, second))
    rate, decay, small = fp32(lr), fp32(weight_decay), fp32(eps)
    for tensors in zip(*lists, strict=True):
        g, p, m, v = map(flat, tensors)
        if not adam_w:
            g = g + decay * p
        m.copy_(first * m + (1 - first) * g)
        v.copy_(second * v + (1 - second) * g * g)
        update = (m / correction1) / ((v / correction2).sqrt() + small)
        if adam_w:
            update = update + decay * p
        p.sub_(rate * update)


class FusedSGD(torch.optim.Optimizer):
    def __init__(
        self, params: Any, lr: float, momentum: float = 0, dampening: float = 0, weight_decay: float = 0,
        nesterov: bool = False,
    ) -> None:  # fmt: skip
        super().__init__(params, {"lr": lr, "momentum": momentum, "dampening": dampening, "weight_decay": weight_decay,
                                  "nesterov": nesterov})  # fmt: skip
        self.multi_tensor_sgd = multi_tensor_sgd

    def zero_grad(self) -> None:  # type: ignore[override]
        super().zero_grad()

    def get_momentums(self, params: list[Tensor]) -> tuple[list[Tensor], bool]:
        new = any("momentum_buffer" not in self.state[p] for p in params)
        for p in params:
            self.state[p].setdefault("momentum_buffer", torch.zeros_like(p.data))
        return [self.state[p]["momentum_buffer"] for p in params], new

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            learning = [p for p in group["params"] if p.grad is not None]
            momentums, new = self.get_momentums(learning)
            assert [m.numel() for m in momentums] == [p.numel() for p in learning]  # the kernel looks at these
            lists = [[p.grad for p in learning], learning, momentums]
            rest = (group["weight_decay"], group["momentum"], group["dampening"], group["lr"], new)
            self.multi_tensor_sgd(CHUNK, torch.zeros(1), lists, *rest)


def multi_tensor_sgd(
    chunk_size: int, flag: Tensor, lists: Sequence[Sequence[Tensor]], weight_decay: float, momentum: float,
    dampening: float, lr: float, first: bool,
) -> None:  # fmt: skip
    check(lists)
    for tensors in zip(*lists, strict=True):
        g, p, m = map(flat, tensors)
        g = g + fp32(weight_decay) * p
        if momentum:
            m.copy_(g if first else fp32(momentum) * m + (1 - fp32(dampening)) * g)
            g = m
        p.add_(-fp32(lr) * g)

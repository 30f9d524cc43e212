"""What `apex.optimizers` offers, in plain PyTorch on any device, for machines where apex cannot run.

Written from apex's documentation and published behaviour: the arguments, `zero_grad` without any, Adam's step count in
the parameter group, SGD's momentum buffers made by `get_momentums`, arithmetic in fp32 from hyperparameters rounded to
fp32, and kernels that walk memory by one index whatever the strides are. The tests marked `gpu` run apex itself.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def flat(tensor: Tensor) -> Tensor:
    """The elements as they lie in memory."""
    return tensor.detach().as_strided((tensor.numel(),), (1,))


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

    def zero_grad(self) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                p.grad = None

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            group["step"] = group.get("step", 0) + 1
            beta1, beta2 = (fp32(beta) for beta in group["betas"])
            correction1, correction2 = ((1 - beta.double() ** group["step"]).float() for beta in (beta1, beta2))
            lr, decay, eps = (fp32(group[name]) for name in ("lr", "weight_decay", "eps"))
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if len(state) == 0:
                    state["exp_avg"] = torch.zeros_like(parameter.data).float()
                    state["exp_avg_sq"] = torch.zeros_like(parameter.data).float()
                p, g, m, v = (flat(t) for t in (parameter, parameter.grad, state["exp_avg"], state["exp_avg_sq"]))
                if not self.adam_w_mode:
                    g = g + decay * p
                m.copy_(beta1 * m + (1 - beta1) * g)
                v.copy_(beta2 * v + (1 - beta2) * g * g)
                update = (m / correction1) / ((v / correction2).sqrt() + eps)
                if self.adam_w_mode:
                    update = update + decay * p
                p.sub_(lr * update)


class FusedSGD(torch.optim.Optimizer):
    def __init__(
        self, params: Any, lr: float, momentum: float = 0, dampening: float = 0, weight_decay: float = 0,
        nesterov: bool = False,
    ) -> None:  # fmt: skip
        super().__init__(params, {"lr": lr, "momentum": momentum, "dampening": dampening, "weight_decay": weight_decay,
                                  "nesterov": nesterov})  # fmt: skip

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
            for parameter, buffer in zip(learning, momentums, strict=True):
                p, g = flat(parameter), flat(parameter.grad)
                g = g + fp32(group["weight_decay"]) * p
                if group["momentum"]:
                    m = flat(buffer)
                    m.copy_(g if new else fp32(group["momentum"]) * m + (1 - fp32(group["dampening"])) * g)
                    g = m
                p.add_(-fp32(group["lr"]) * g)

"""Encoders beside TSM-ResNet in the forms that `bench memory` compares: plain PyTorch, torch's checkpoints, ours."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from bench.peers.vit import vit_features
from bench.tools.dtypes import DTYPES
from bench.tools.networks import gate_gradients
from lofi_fast.encoder.protocol import Encoder
from lofi_fast.encoder.r2plus1d import R2Plus1D
from lofi_fast.encoder.vit import ViT
from lofi_fast.fidelity import FRAMES_PER_SNIPPET

Name = Literal["r2plus1d_18", "vit_b16, adapters"]
NAMES: tuple[Name, ...] = get_args(Name)
PLAIN, BLOCKS, LEAN = "plain PyTorch", "plain, each block checkpointed", "lean"


@dataclass(frozen=True)
class Other:
    """Forward and backward of an encoder alone; batch norm is frozen."""

    encoder: Encoder
    frames: Tensor
    dtype: torch.dtype

    @staticmethod
    def of(name: Name, num_frames: int, side: int, dtype: str, device: torch.device, width: int = 64) -> Other:
        torch.manual_seed(0)
        encoder = R2Plus1D("r2plus1d_18", width) if name == "r2plus1d_18" else ViT("vit_b16", width, "adapters")
        encoder.freeze_batchnorm()
        encoder.train().place(device)
        frames = torch.randint(0, 256, (num_frames, side, side, 3), dtype=torch.uint8, device=device)
        return Other(encoder, frames, DTYPES[dtype])

    def forms(self) -> dict[str, Callable[[], Tensor]]:
        """Name -> features. The first is plain PyTorch."""
        arguments = self.frames, FRAMES_PER_SNIPPET
        lean = {LEAN: partial(self.encoder.encode, *arguments, chunk=len(self.frames) // FRAMES_PER_SNIPPET)}
        if isinstance(self.encoder, ViT):
            plain = partial(vit_features, self.encoder, *arguments)
            return {PLAIN: plain, BLOCKS: partial(plain, checkpoints=True), **lean}
        return {PLAIN: partial(self.encoder, *arguments), **lean}

    def features(self, form: str) -> Tensor:
        with torch.autocast(self.frames.device.type, dtype=self.dtype, enabled=self.dtype is not torch.float32):
            return self.forms()[form]()

    def step(self, form: str) -> None:
        """Forward and backward; the gradients of the step before are dropped first."""
        self.encoder.zero_grad(set_to_none=True)
        features = self.features(form)
        # Not their plain sum, which a layer norm makes the same whatever the weights are.
        (features * torch.linspace(-1, 1, features.shape[1], device=features.device)).sum().backward()

    def first(self) -> Other:
        """The first snippet alone."""
        return replace(self, frames=self.frames[:FRAMES_PER_SNIPPET])

    def gate(self) -> None:
        """Raise GateError unless the gradients of every form are those of plain PyTorch."""
        with torch.no_grad():
            for name, parameter in self.encoder.named_parameters():
                if name.endswith("up_proj.weight"):  # or an adapter that begins as nothing passes nothing on
                    parameter.normal_(std=0.02)
        gate_gradients(self.encoder, self.step, self.forms(), PLAIN, self.dtype)


class _Made(TorchDispatchMode):
    """The storages that operators make and that are still there."""

    def __init__(self, own: set[int]) -> None:
        super().__init__()
        self._own, self._made = own, dict[int, Any]()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor) and tensor.untyped_storage()._cdata not in self._own:
                made = tensor.untyped_storage()
                self._made[made._cdata] = weakref.ref(made)
        return out

    def bytes(self) -> int:
        return sum(made.nbytes() for reference in self._made.values() if (made := reference()) is not None)


def held_bytes(case: Other, form: str) -> int:
    """What is alive between forward and backward beside features, frames, parameters and buffers. Hooks of autograd
    would not see what torch's checkpoint holds: its arguments.
    """
    encoder = case.encoder
    own = {t.untyped_storage()._cdata for t in (*encoder.parameters(), *encoder.buffers(), case.frames)}
    with _Made(own) as made:
        features = case.features(form)
        return made.bytes() - features.untyped_storage().nbytes()

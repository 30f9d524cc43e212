"""Forms of the encoder and of a whole training step that `bench memory` and `bench step` compare."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields, replace
from functools import cache, partial
from types import FunctionType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from bench.peers.network import DenseHead, checkpointed, plain_features, sampled
from bench.tools.dtypes import DTYPES
from bench.tools.gate import GateError
from lofi_fast.config import EncoderName, HeadConfig
from lofi_fast.encoder.lean import default_chunk, encode
from lofi_fast.encoder.resnet import TSMResNet
from lofi_fast.fidelity import FRAMES_PER_SNIPPET, Fidelity
from lofi_fast.head.gtad import GTAD
from lofi_fast.head.loss import Counts, tal_loss
from lofi_fast.head.maps import HeadOutput
from lofi_fast.head.targets import Targets, make_targets
from lofi_fast.memory.plans import chunks

CLASSES = 200  # ActivityNet's
WIDTH, TINY_WIDTH = 64, 8  # channels of the first stage: the paper's, and what Triton's interpreter can run
COMPILED = "torch.compile"  # of plain PyTorch
# It recomputes until that share of the activations is kept.
BUDGETS = {f"torch.compile, activation budget {share}": share for share in (0.3, 0.1, 0.5)}
CHECKPOINTED = "plain, checkpointed"
EACH_SNIPPET = "plain, checkpointed, a snippet at a time"
LEAN_EACH_SNIPPET = "lean, recompute, a snippet at a time"
SHARE = 0.3  # of the snippets that gradients go through, in ETAD
SAMPLED = "plain, 30% sampled gradients"
EIGHT_BIT = "lean, 8 bits"
EIGHT_BIT_LARGEST = 0.002  # ||error|| / ||exact|| of its gradients
LEAN: dict[str, dict[str, bool]] = {"lean": {}, "lean, recompute": {"recompute": True}, EIGHT_BIT: {"eight_bit": True}}
# Lean forms with larger chunks: how the chunk is computed, and how many times the default it holds; None: everything.
LARGER: dict[str, tuple[str, int | None]] = {
    "lean, chunk x8": ("lean", 8),
    "lean, chunk x32": ("lean", 32),
    "lean, one graph": ("lean", None),
    "lean, recompute, chunk x8": ("lean, recompute", 8),
    "lean, recompute, chunk x32": ("lean, recompute", 32),
}
# Lean forms with the chunk that the planner takes first on a GPU.
PLANNED = {f"{form}, planned chunk": form for form in LEAN}
HEAD = HeadConfig()

# ||gradient - plain gradient|| / ||plain gradient||, the mean over parameters. In float64 they agree to 1e-12 (tests);
# here the random network's own rounding is what remains.
LARGEST = {torch.float32: 1e-3, torch.bfloat16: 0.3, torch.float16: 0.1}


@dataclass(frozen=True)
class Encoded:
    """One forward and backward of the encoder alone, in several forms."""

    encoder: TSMResNet
    frames: Tensor
    dtype: torch.dtype
    backend: str | None = None  # of torch.compile; None: see `compiled`

    @staticmethod
    def of(
        name: EncoderName,
        num_frames: int,
        side: int,
        dtype: str,
        device: torch.device,
        width: int = WIDTH,
        backend: str | None = None,
    ) -> Encoded:
        torch.manual_seed(0)
        encoder = TSMResNet(name, width)
        encoder.freeze_batchnorm()
        encoder.train().to(device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        frames = torch.randint(0, 256, (num_frames, side, side, 3), dtype=torch.uint8, device=device)
        return Encoded(encoder, frames, DTYPES[dtype], backend)

    def forms(self) -> dict[str, Callable[[], Tensor]]:
        """Name -> features. The first is plain PyTorch. What takes long on a CPU is there for a GPU alone."""
        snippets = len(self.frames) // FRAMES_PER_SNIPPET
        chunk = min(default_chunk(FRAMES_PER_SNIPPET, self.frames.shape[1]), snippets)
        lean = partial(lean_features, self.encoder, self.frames)
        plain = partial(plain_features, self.encoder, self.frames, FRAMES_PER_SNIPPET)
        forms: dict[str, Callable[[], Tensor]] = {
            "plain PyTorch": plain,
            CHECKPOINTED: partial(checkpointed, self.encoder, self.frames, FRAMES_PER_SNIPPET, chunk),
            SAMPLED: partial(sampled, self.encoder, self.frames, FRAMES_PER_SNIPPET, self.chosen(), chunk),
            **{form: partial(lean, form) for form in ("lean, one graph", *LEAN)},
        }
        if self.frames.is_cuda:
            forms |= {form: partial(lean, form) for form in (*LARGER, *PLANNED)}
            forms |= {form: partial(self.compiled, form) for form in (COMPILED, *BUDGETS)}
        return forms

    def a_snippet_at_a_time(self) -> dict[str, Callable[[], Tensor]]:
        """Name -> features: recomputed in the smallest pieces there are."""
        arguments = self.encoder, self.frames, FRAMES_PER_SNIPPET
        return {
            EACH_SNIPPET: partial(checkpointed, *arguments, 1),
            LEAN_EACH_SNIPPET: partial(encode, *arguments, chunk=1, recompute=True),
        }

    def compiled(self, form: str) -> Tensor:
        """Features by torch.compile of plain PyTorch."""
        return compiled_features(form, self.backend)(self.encoder, self.frames, FRAMES_PER_SNIPPET)

    def step(self, form: str) -> None:
        """Forward and backward; the gradients of the step before are dropped first."""
        self.encoder.zero_grad(set_to_none=True)
        self.features(form).sum().backward()

    def features(self, form: str) -> Tensor:
        with torch.autocast(self.frames.device.type, dtype=self.dtype, enabled=self.dtype is not torch.float32):
            if form in (COMPILED, *BUDGETS):
                return self.compiled(form)
            return (self.forms() | self.a_snippet_at_a_time())[form]()

    def drop_gradients(self) -> None:
        """So that the next step makes its own, and its peak holds them."""
        self.encoder.zero_grad(set_to_none=True)

    def chosen(self) -> Tensor:
        """The snippets that sampled gradients go through."""
        snippets = len(self.frames) // FRAMES_PER_SNIPPET
        count = math.ceil(SHARE * snippets)
        return torch.randperm(snippets, generator=torch.Generator().manual_seed(0))[:count].sort().values

    def gate(self, names: Iterable[str]) -> None:
        """Raise GateError unless the gradients of every form are those of plain PyTorch; where they are sampled, those
        of plain PyTorch over the snippets chosen.
        """
        names = list(names)
        gate_gradients(
            self.encoder, self.step, [name for name in names if name != SAMPLED], "plain PyTorch", self.dtype
        )
        if SAMPLED in names:
            frames = self.frames.unflatten(0, (-1, FRAMES_PER_SNIPPET))[self.chosen().to(self.frames.device)]
            part = Encoded(self.encoder, frames.flatten(0, 1), self.dtype)
            step = {"plain PyTorch": partial(part.step, "plain PyTorch"), SAMPLED: partial(self.step, SAMPLED)}
            gate_gradients(self.encoder, lambda name: step[name](), [SAMPLED], "plain PyTorch", self.dtype)


@dataclass(frozen=True)
class WholeStep:
    """Encoder, head and loss of `videos` videos, forward and backward: plain blocks and the dense-matrix SGAlign, that
    compiled, or ours.
    """

    encoder: TSMResNet
    head: GTAD
    dense: DenseHead
    frames: Tensor
    targets: Targets
    counts: Counts
    dtype: torch.dtype
    videos: int = 1

    @staticmethod
    def of(
        name: EncoderName, num_snippets: int, side: int, dtype: str, device: torch.device, videos: int = 1,
        width: int = WIDTH, config: HeadConfig = HEAD, classes: int = CLASSES,
    ) -> WholeStep:  # fmt: skip
        encoded = Encoded.of(name, videos * num_snippets * FRAMES_PER_SNIPPET, side, dtype, device, width)
        head = GTAD(config, encoded.encoder.num_features, classes, num_snippets).to(device)
        edges = np.arange(num_snippets + 1.0)
        segments = np.array([[0.1, 0.3], [0.5, 0.9]]) * num_snippets
        label = make_targets(
            edges, segments, np.array([3, 5]), num_snippets, classes, np.random.default_rng(0), with_zero=False
        )
        counts = Counts.of([label] * videos, config.positive_iou)
        targets = Targets.stack([label] * videos, device)
        dense = DenseHead(head, num_snippets).to(device)
        return WholeStep(encoded.encoder, head, dense, encoded.frames, targets, counts, encoded.dtype, videos)

    FORMS = ("plain PyTorch, dense SGAlign", *LEAN)

    def share(self, videos: Sequence[int]) -> WholeStep:
        """The part of some of the videos, by their numbers. Its loss is divided by the counts of all of them, so that
        gradients of parts add up to those of the whole.
        """
        chosen = list(videos)
        frames = self.frames.unflatten(0, (self.videos, -1))[chosen].flatten(0, 1)
        targets = Targets(*(getattr(self.targets, field.name)[chosen] for field in fields(Targets)))
        return replace(self, frames=frames, targets=targets, videos=len(chosen))

    def drop_gradients(self) -> None:
        """So that the next step makes its own, and its peak holds them."""
        self.encoder.zero_grad(set_to_none=True)
        self.head.zero_grad(set_to_none=True)

    def step(self, form: str, chunk: int | None = None) -> None:
        """`chunk`: snippets to a graph of a lean form, in place of the form's own."""
        self.drop_gradients()
        with torch.autocast(self.frames.device.type, dtype=self.dtype, enabled=self.dtype is not torch.float32):
            if form in (self.FORMS[0], COMPILED, *BUDGETS):
                plain = plain_features if form == self.FORMS[0] else compiled_features(form)
                features_NC = plain(self.encoder, self.frames, FRAMES_PER_SNIPPET)
            else:
                features_NC = lean_features(self.encoder, self.frames, form, chunk)
            features_BCL = features_NC.unflatten(0, (self.videos, -1)).transpose(1, 2)
            output = self._head(form)(features_BCL)
        tal_loss(output, self.targets, self.counts, positive_iou=0.9, class_weight=1.0).total.backward()

    def head_step(self, form: str, features_BCL: Tensor) -> None:
        """The head and its loss alone, with the gradient of the features."""
        self.head.zero_grad(set_to_none=True)
        features_BCL.grad = None
        with torch.autocast(self.frames.device.type, dtype=self.dtype, enabled=self.dtype is not torch.float32):
            output = self._head(form)(features_BCL)
        tal_loss(output, self.targets, self.counts, positive_iou=0.9, class_weight=1.0).total.backward()

    def _head(self, form: str) -> Callable[[Tensor], HeadOutput]:
        if form in (COMPILED, *BUDGETS):
            return partial(compiled(DenseHead.forward), self.dense)
        return self.dense if form == self.FORMS[0] else self.head

    def gate(self, names: Iterable[str] = FORMS, largest: float | None = None) -> None:
        """In half precision the head's nearest neighbours are others for a few snippets, and gradients differ by more
        than rounding: allow for it by `largest`, and gate in float32.
        """
        gate_gradients(nn.ModuleList([self.encoder, self.head]), self.step, names, self.FORMS[0], self.dtype, largest)


def lean_features(encoder: TSMResNet, frames: Tensor, form: str, chunk: int | None = None) -> Tensor:
    """Features by a form of `LEAN`, `LARGER` or `PLANNED`, `chunk` snippets to a graph; where None, the form's own:
    those of `LEAN` leave it to the encoder.
    """
    way, times = LARGER.get(form, (PLANNED.get(form, form), 1))
    snippets = len(frames) // FRAMES_PER_SNIPPET
    if chunk is None and form in PLANNED:
        chunk = planned_chunk(snippets, frames.shape[1])
    elif chunk is None and form in LARGER:
        default = default_chunk(FRAMES_PER_SNIPPET, frames.shape[1])
        chunk = snippets if times is None else min(times * default, snippets)
    return encode(encoder, frames, FRAMES_PER_SNIPPET, chunk=chunk, **LEAN[way])


def planned_chunk(snippets: int, side: int) -> int:
    """Snippets in one graph, of all in memory at once, that the planner takes first on a GPU."""
    return chunks(Fidelity(snippets, side), 1, "cuda")[0]


@cache
def compiled(function: Callable[..., Any], backend: str | None = None) -> Callable[..., Any]:
    """torch.compile of it, for one shape at a time. On a CPU, unless told a backend, its graph is taken and run as it
    is, which shows that it can be compiled and says nothing of speed.
    """
    backend = backend or ("inductor" if torch.cuda.is_available() else "aot_eager")
    return torch.compile(function, dynamic=False, backend=backend)


@cache
def compiled_features(form: str, backend: str | None = None) -> Callable[..., Tensor]:
    """`plain_features` by a form of torch.compile."""
    if form == COMPILED:
        return compiled(plain_features, backend)
    from torch._functorch import config

    # torch keeps what it compiled beside a function's code: another budget needs code of its own.
    code = plain_features.__code__.replace(co_name=f"plain_features_within_{BUDGETS[form]}".replace(".", "_"))
    function = compiled(FunctionType(code, plain_features.__globals__, code.co_name), backend)

    def features(*arguments: Any) -> Tensor:
        with config.patch(activation_memory_budget=BUDGETS[form]):
            found: Tensor = function(*arguments)
        return found

    return features


def gate_gradients(
    module: nn.Module, step: Callable[[str], None], names: Iterable[str], plain: str, dtype: torch.dtype,
    largest: float | None = None,
) -> None:  # fmt: skip
    """Raise GateError unless the gradients of every form are those of the form `plain`, but for rounding."""

    def gradients(name: str) -> dict[str, Tensor]:
        step(name)
        return {key: p.grad.clone() for key, p in module.named_parameters() if p.grad is not None}

    expected = gradients(plain)
    for name in names:
        found = gradients(name)
        if found.keys() != expected.keys():
            raise GateError(f"{name}: gradients of other parameters than {plain}'s")
        errors = [(found[k] - expected[k]).norm() / expected[k].norm().clamp(min=1e-20) for k in expected]
        error = float(torch.stack(errors).mean())
        allowed = max(largest or LARGEST[dtype], EIGHT_BIT_LARGEST if name == EIGHT_BIT else 0)
        if not error <= allowed:
            raise GateError(f"{name}: its gradients differ from {plain}'s by {error:.1e} of their norm")


def kept_bytes(module: nn.Module, features: Callable[[], Tensor]) -> int:
    """What autograd holds between forward and backward: every storage once, parameters and buffers excluded."""
    own = {tensor.untyped_storage().data_ptr() for tensor in (*module.parameters(), *module.buffers())}
    storages: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            storages[storage.data_ptr()] = storage.nbytes()
        return tensor.detach()  # a result that held itself would never be freed

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        kept = features()
    del kept
    return sum(storages.values())

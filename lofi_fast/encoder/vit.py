"""ViT-B/16 for video in the layout of V-JEPA 2 (Assran et al., 2025): tubelets of two frames, rotary positions in 3-D.

Shapes: N snippets, T frames a snippet, H x W pixels, P tokens a snippet, C channels of a token, t x h x w tokens over
(time, height, width). Parameter names are those of V-JEPA 2, so that its encoder's state dict loads as it is.

Three ways to train it (`--encoder.train`): all of it; its last blocks; or adapters, small bottlenecks with a depth-wise
convolution over time behind every block (AdaTAD, Liu et al., CVPR 2024), while the blocks stay as they are. Adapters
look along the time of a snippet, where AdaTAD's look along the whole video: snippets stay independent of each other.

There is no batch norm. A block keeps its input and nothing else, and runs once more when its gradient arrives. Weights
are cast where they are used, so their gradients are summed in float32 over all chunks.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from lofi_fast.encoder.lean import default_chunk
from lofi_fast.encoder.protocol import Encoder
from lofi_fast.encoder.resnet import IMAGENET_MEAN, IMAGENET_STD
from lofi_fast.encoder.vit_ledger import DEPTH, HEADS, PATCH, TUBELET, Trained

EPS = 1e-6  # of the layer norms
BASE = 10000.0  # of the wave lengths of rotary positions


class Attention(nn.Module):
    """Self-attention of all tokens of a snippet, its queries and keys turned by their positions."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.qkv = nn.Linear(channels, 3 * channels)
        self.proj = nn.Linear(channels, channels)

    def forward(self, x_NPC: Tensor, angles: tuple[Tensor, Tensor]) -> Tensor:
        qkv = _linear(self.qkv, x_NPC).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        query, key, value = qkv.unbind(0)  # (N, HEADS, P, C / HEADS)
        out = F.scaled_dot_product_attention(_rotated(query, *angles), _rotated(key, *angles), value)
        return _linear(self.proj, out.transpose(1, 2).flatten(2))


class Mlp(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(channels, 4 * channels)
        self.fc2 = nn.Linear(4 * channels, channels)

    def forward(self, x_NPC: Tensor) -> Tensor:
        return _linear(self.fc2, F.gelu(_linear(self.fc1, x_NPC)))


class Adapter(nn.Module):
    """x + gamma * up(y + conv(y over time)), y = gelu(down(x)) of a quarter of the channels. Begins as x: `up` is 0."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        hidden = channels // 4
        self.down_proj = nn.Linear(channels, hidden)
        self.dwconv = nn.Conv1d(hidden, hidden, 3, padding=1, groups=hidden)
        self.conv = nn.Conv1d(hidden, hidden, 1)
        self.up_proj = nn.Linear(hidden, channels)
        self.gamma = nn.Parameter(torch.ones(1))
        nn.init.trunc_normal_(self.down_proj.weight, std=0.02)
        nn.init.normal_(self.dwconv.weight, std=math.sqrt(2 / 3))
        nn.init.normal_(self.conv.weight, std=math.sqrt(2 / hidden))
        nn.init.zeros_(self.up_proj.weight)
        for layer in (self.down_proj, self.dwconv, self.conv, self.up_proj):
            assert layer.bias is not None
            nn.init.zeros_(layer.bias)

    def forward(self, x_NPC: Tensor, num_times: int) -> Tensor:
        y = F.gelu(_linear(self.down_proj, x_NPC))
        along_time = y.unflatten(1, (num_times, -1)).permute(0, 2, 3, 1).flatten(0, 1)  # (N * h * w, C / 4, t)
        along_time = _conv(self.conv, _conv(self.dwconv, along_time))
        y = y + along_time.unflatten(0, (len(y), -1)).permute(0, 3, 1, 2).flatten(1, 2)
        return x_NPC + _linear(self.up_proj, y) * self.gamma.to(y.dtype)


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)), then the adapter where there is one."""

    def __init__(self, channels: int, adapted: bool) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(channels, EPS)
        self.attn = Attention(channels)
        self.norm2 = nn.LayerNorm(channels, EPS)
        self.mlp = Mlp(channels)
        self.adapter = Adapter(channels) if adapted else None

    def forward(self, x_NPC: Tensor, grid: tuple[int, int, int]) -> Tensor:
        x_NPC = x_NPC + self.attn(_normed(self.norm1, x_NPC), angles_of(grid, x_NPC.shape[-1] // HEADS, x_NPC))
        x_NPC = x_NPC + self.mlp(_normed(self.norm2, x_NPC))
        return x_NPC if self.adapter is None else self.adapter(x_NPC, grid[0])


class PatchEmbed(nn.Module):
    """Tubelets of (2, 16, 16) pixels to tokens, as one matrix product."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.proj = nn.Conv3d(3, channels, (TUBELET, PATCH, PATCH), (TUBELET, PATCH, PATCH))


class ViT(Encoder):
    """uint8 RGB frames (N*T, H, W, 3) -> one feature vector a snippet (N, 12 * `width`). T is even.

    `width` is the channel count of an attention head: 64 in the paper, less for small data. `train`: "all", "adapters"
    or "last:N" blocks. Frames are normalised with ImageNet's mean and std inside, and padded by the mean at the right
    and below to whole patches: no pixel is lost at sides that are no multiple of 16. Positions are patches, as V-JEPA 2
    counts them, so that smaller frames have fewer. Features are the mean over all tokens of a snippet.
    """

    memory_format = torch.contiguous_format
    added = (".adapter.",)
    mean: Tensor
    std: Tensor

    def __init__(self, name: str = "vit_b16", width: int = 64, train: str = "all") -> None:
        super().__init__()
        self.name, self.width, self.trained = name, width, Trained.parse(train)
        channels = self.num_features = HEADS * width
        self.patch_embed = PatchEmbed(channels)
        self.blocks = nn.ModuleList([Block(channels, self.trained.adapters) for _ in range(DEPTH)])
        self.norm = nn.LayerNorm(channels, EPS)
        self.register_buffer("mean", 255 * torch.tensor(IMAGENET_MEAN), persistent=False)
        self.register_buffer("std", 255 * torch.tensor(IMAGENET_STD), persistent=False)
        for index, block in enumerate(self.blocks, 1):
            assert isinstance(block, Block)
            layers = (block.attn.qkv, block.attn.proj, block.mlp.fc1, block.mlp.fc2)
            for layer in layers:
                nn.init.trunc_normal_(layer.weight, std=0.02)
                nn.init.zeros_(layer.bias)
            for layer in layers[1::2]:  # as V-JEPA 2 begins: deeper blocks add less
                with torch.no_grad():
                    layer.weight.div_(math.sqrt(2 * index))
        nn.init.trunc_normal_(self.patch_embed.proj.weight, std=0.02)
        assert self.patch_embed.proj.bias is not None
        nn.init.zeros_(self.patch_embed.proj.bias)
        learning = [part for index in range(self.trained.first, DEPTH) for part in self._learning(index)]
        if self.trained.all:
            learning.append(self.patch_embed)
        if not self.trained.adapters:
            learning.append(self.norm)
        self.requires_grad_(False)
        for part in learning:
            part.requires_grad_()

    def _learning(self, index: int) -> list[nn.Module]:
        block = cast(Block, self.blocks[index])
        return [block] if block.adapter is None else [block.adapter]

    def forward(self, frames_NHWC: Tensor, num_frames: int) -> Tensor:
        """Features (N, num_features) of uint8 frames (N*T, H, W, 3), T = `num_frames` to a snippet."""
        return self._features(_snippets(frames_NHWC, num_frames), self._dtype())

    def encode(
        self,
        frames_NHWC: Tensor,
        num_frames: int,
        *,
        chunk: int | None = None,
        recompute: bool = False,
        eight_bit: bool = False,
    ) -> Tensor:
        """See `Encoder.encode`. With `recompute` a chunk keeps its frames alone, and not the input of each block.

        Raises ValueError where the frames are no whole number of snippets, or those of one an odd number, and for
        `eight_bit`, which this encoder does not have.
        """
        if eight_bit:
            raise ValueError(f"{self.name} cannot keep its activations in 8 bits")
        snippets = _snippets(frames_NHWC, num_frames)
        run = partial(self._features, dtype=self._dtype())
        parts = snippets.split(chunk or default_chunk(num_frames, max(frames_NHWC.shape[1:3])))
        if recompute:
            return torch.cat([_once_more(run, part, self._given()) for part in parts])
        return torch.cat([run(part) for part in parts])

    def _given(self) -> list[nn.Parameter]:
        return [parameter for parameter in self.parameters() if parameter.requires_grad]

    def _dtype(self) -> torch.dtype:
        """Of activations: autocast's where that is on, else the parameters'."""
        dtype, device = self.mean.dtype, self.mean.device.type
        if torch.is_autocast_enabled(device) and dtype is not torch.float64:
            dtype = torch.get_autocast_dtype(device)
        return dtype

    def _features(self, snippets_NTHWC: Tensor, dtype: torch.dtype) -> Tensor:
        with torch.autocast(snippets_NTHWC.device.type, enabled=False):
            times, height, width = snippets_NTHWC.shape[1:4]
            grid = (times // TUBELET, -(-height // PATCH), -(-width // PATCH))
            embed = [p for p in self.patch_embed.parameters() if p.requires_grad]
            x = _once_more(partial(self._embedded, dtype=dtype), snippets_NTHWC, embed)
            for block in self.blocks:
                learning = [parameter for parameter in block.parameters() if parameter.requires_grad]
                x = _once_more(partial(block, grid=grid), x, learning)
            x = _normed(self.norm, x)
            return x.mean(dim=1, dtype=torch.promote_types(dtype, torch.float32))

    def _embedded(self, snippets_NTHWC: Tensor, dtype: torch.dtype) -> Tensor:
        """Tokens (N, P, C)."""
        height, width = snippets_NTHWC.shape[2:4]
        x = ((snippets_NTHWC - self.mean) / self.std).to(dtype)
        x = F.pad(x, (0, 0, 0, -width % PATCH, 0, -height % PATCH))
        # (N, t, 2, h, 16, w, 16, 3) -> (N, t, h, w, 3, 2, 16, 16): the order of the convolution's weight
        x = x.unflatten(3, (-1, PATCH)).unflatten(2, (-1, PATCH)).unflatten(1, (-1, TUBELET))
        x = x.permute(0, 1, 3, 5, 7, 2, 4, 6).flatten(4).flatten(1, 3)
        proj = self.patch_embed.proj
        assert proj.bias is not None
        return F.linear(x, proj.weight.flatten(1).to(dtype), proj.bias.to(dtype))


class _OnceMore(torch.autograd.Function):
    """x -> run(x), which is run again with a graph when its gradient arrives. Keeps x alone."""

    @staticmethod
    def forward(ctx: Any, run: Callable[[Tensor], Tensor], x: Tensor, *learning: Tensor) -> Tensor:
        ctx.run, ctx.learning = run, learning
        ctx.save_for_backward(x)
        return run(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        (x,), need_x = ctx.saved_tensors, ctx.needs_input_grad[1]
        with torch.enable_grad():
            x = x.detach().requires_grad_(need_x)
            out = ctx.run(x)
        grads = torch.autograd.grad(out, ([x] if need_x else []) + list(ctx.learning), grad_out)
        return None, *(() if need_x else (None,)), *grads


def _once_more(run: Callable[[Tensor], Tensor], x: Tensor, learning: Sequence[Tensor]) -> Tensor:
    """run(x), for the parameters `learning` in it; no graph is made where nothing learns before or in it."""
    if not torch.is_grad_enabled() or not (learning or x.requires_grad):
        with torch.no_grad():
            return run(x)
    out: Tensor = _OnceMore.apply(run, x, *learning)  # type: ignore[no-untyped-call]
    return out


def angles_of(grid: tuple[int, int, int], channels: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """(sine, cosine) of the angle (P, channels) by which each channel of an attention head is turned at each token.

    A third of the channels each, rounded down to an even number, are turned by the position in time, height and width.
    Neighbouring channels are turned together; that the two of a pair are given angles of different wave lengths is how
    V-JEPA 2 was trained (src/models/utils/modules.py, `rotate_queries_or_keys`).
    """
    of_axis = 2 * (channels // 3 // 2)
    exact = torch.promote_types(like.dtype, torch.float32)
    waves = BASE ** -(torch.arange(of_axis // 2, dtype=exact, device=like.device) / (of_axis / 2))
    axes = torch.meshgrid(*(torch.arange(size, dtype=exact, device=like.device) for size in grid), indexing="ij")
    angles = torch.cat([torch.outer(axis.flatten(), waves.repeat(2)) for axis in axes], dim=1)
    angles = F.pad(angles, (0, channels - 3 * of_axis))  # the rest stays as it is
    return angles.sin().to(like.dtype), angles.cos().to(like.dtype)


def _rotated(x: Tensor, sine: Tensor, cosine: Tensor) -> Tensor:
    """Neighbouring channels (a, b) turned to (a cos - b sin, b cos + a sin), each with its own angle."""
    pairs = x.unflatten(-1, (-1, 2)) if x.shape[-1] % 2 == 0 else F.pad(x, (0, 1)).unflatten(-1, (-1, 2))
    turned = torch.stack((-pairs[..., 1], pairs[..., 0]), dim=-1).flatten(-2)[..., : x.shape[-1]]
    return x * cosine + turned * sine


def _snippets(frames_NHWC: Tensor, num_frames: int) -> Tensor:
    """(N, T, H, W, 3) of (N*T, H, W, 3)."""
    if frames_NHWC.shape[0] % num_frames:
        raise ValueError(f"{frames_NHWC.shape[0]} frames are not a whole number of {num_frames}-frame snippets")
    if num_frames % TUBELET:
        raise ValueError(f"{num_frames} frames are not a whole number of tubelets of {TUBELET}")
    snippets_NTHWC: Tensor = frames_NHWC.unflatten(0, (-1, num_frames))
    return snippets_NTHWC


def _linear(layer: nn.Linear, x: Tensor) -> Tensor:
    return F.linear(x, layer.weight.to(x.dtype), layer.bias.to(x.dtype))


def _conv(layer: nn.Conv1d, x: Tensor) -> Tensor:
    assert layer.bias is not None
    return F.conv1d(x, layer.weight.to(x.dtype), layer.bias.to(x.dtype), padding=layer.padding, groups=layer.groups)


def _normed(layer: nn.LayerNorm, x: Tensor) -> Tensor:
    return F.layer_norm(x, layer.normalized_shape, layer.weight.to(x.dtype), layer.bias.to(x.dtype), layer.eps)

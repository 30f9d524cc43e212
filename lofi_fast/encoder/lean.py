"""The memory-lean TSM-ResNet: what backward needs, and nothing else, survives forward. For frozen batch norm.

A residual block is y = relu(conv1(shift(x)) + b1); out = relu(conv2(y) + b2 + identity(x)), with the frozen batch norm
folded into the convolutions. Kept are x, y and out alone (out is the next block's x): the sign of out is the ReLU's
mask, the shifted input is copied again in backward, the affine needs nothing. The stem keeps the uint8 frames, the
pooled activation and the int8 position of each maximum. The sum over a TSM-R18 at 224 px is 7.2 MB a frame in fp32,
where plain PyTorch keeps 25.

With `eight_bit` these activations are kept as bytes with a scale for each frame and channel (`kernels/quantize`):
2.1 MB a frame. Features stay as they are, and so do the ReLUs' masks, through which all gradients pass; a weight's own
gradient comes from an activation rounded to 1/255 of its largest value (some 1e-3 of its norm; the stem's, from its
frames, is exact).

Snippets do not see each other under frozen batch norm, so the graph is built in chunks of whole snippets: what backward
needs for itself exists for one chunk at a time. A weight's gradient is the sum of its chunks' (`GradientSum`). With
`recompute` a chunk keeps only its frames and runs forward once more when its gradient arrives; folded weights, too, are
made once more where they are read, since all of them may be more than a small chunk's activations.

Shapes: N snippets, T frames a snippet, H x W pixels, C channels. Activations are channels-last.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from lofi_fast.encoder.resnet import BasicBlock, Bottleneck, TSMResNet
from lofi_fast.kernels import (
    conv3x3,
    conv3x3_backward,
    conv3x3_is_faster,
    dequantize,
    fold_normalization,
    quantize,
    residual_shift,
    residual_shift_backward,
    stem_backward,
    stem_forward,
    stem_input,
    strided_conv,
    strided_conv_backward,
    strided_conv_is_faster,
    temporal_shift,
)
from lofi_fast.ledger import CHUNK_PIXELS

# In float16 pixels are divided by this, and the first convolution's weight multiplied by it, so that its gradient is as
# large as those of other weights, and not a hundred times so: one scale for all of them loses none to the range of
# float16. A power of two: nothing is rounded by it.
PIXELS = 64.0


def default_chunk(num_frames: int, side: int) -> int:
    """Snippets of `num_frames` frames of `side` x `side` pixels in one chunk of the graph."""
    return max(CHUNK_PIXELS // (num_frames * side * side), 1)


class GradientSum:
    """The gradient of one folded weight, summed over the chunks of a step in float32 (float64 in float64).

    Autograd would add the chunks' gradients in the dtype of the weight that they used. In bfloat16 such a sum stops
    growing after some hundred chunks, when a chunk's gradient is less than half a unit in its last place.
    """

    def __init__(self) -> None:
        self._sum: Tensor | None = None

    def add(self, grad: Tensor | None) -> None:
        """The gradient of one more chunk, which the caller gives away."""
        if grad is None:
            return
        if self._sum is None:
            self._sum = grad.to(torch.promote_types(grad.dtype, torch.float32))
        else:
            self._sum += grad

    def take(self) -> Tensor | None:
        """The sum, which is not held any longer; None where nothing was added."""
        total, self._sum = self._sum, None
        return total


class _Summed(torch.autograd.Function):
    """(folded weight, sum of its gradients) -> an empty tensor that ties the chunks' graphs to the weight.

    A chunk adds to the sum and passes no gradient to the tie, but autograd runs this backward when all chunks are done.
    """

    @staticmethod
    def forward(ctx: Any, folded: Tensor, total: GradientSum) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.total = total
        return folded.new_empty(0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, _: None) -> tuple[Tensor | None, None]:
        return ctx.total.take(), None


@dataclass(frozen=True)
class Convolution:
    """How one convolution is applied; its bias is the frozen batch norm's shift (C,), without gradient."""

    stride: int
    padding: int
    bias: Tensor
    total: GradientSum  # of its folded weight
    rounded_bias: Tensor | None = None  # in the activations' dtype, where cuDNN is to add it (`_cudnn_adds_bias`)

    def forward(self, x: Tensor, weight: Tensor) -> Tensor:
        """Without the bias."""
        if self._takes_conv3x3(x, weight):
            return conv3x3(x, weight)
        if self._takes_strided_conv(x, weight):
            return strided_conv(x, weight)
        return F.conv2d(x, weight, None, self.stride, self.padding)

    def forward_relu(self, x: Tensor, weight: Tensor) -> Tensor:
        """With the bias, and a ReLU after it: in one kernel where there is one.

        residual_shift adds the exact bias to the rounded sum and rounds again: two roundings to the activations' dtype.
        cuDNN's adds the rounded bias, and may round the sum before as well, as it did on an H100: three.
        """
        if self._takes_conv3x3(x, weight) and x.dtype == self.bias.dtype:
            return conv3x3(x, weight, self.bias, relu=True)
        if self.rounded_bias is not None:
            fused: Tensor = torch.ops.aten.cudnn_convolution_relu.default(
                x, weight, self.rounded_bias, [self.stride] * 2, [self.padding] * 2, [1, 1], 1
            )
            return fused
        out, _ = residual_shift(self.forward(x, weight), None, self.bias)
        return out

    def backward(
        self, grad: Tensor, x: Tensor, weight: Tensor, mask: tuple[bool, bool], relu: bool = False
    ) -> Tensor | None:
        """Gradients of (x, weight), each where `mask` asks for it: that of x is returned, before x's ReLU where `relu`;
        that of the weight is added to its sum.
        """
        grad_x, grad_weight = self._gradients(grad, x, weight, mask, relu)
        self.total.add(grad_weight)
        return grad_x

    def _gradients(
        self, grad: Tensor, x: Tensor, weight: Tensor, mask: tuple[bool, bool], relu: bool
    ) -> tuple[Tensor | None, Tensor | None]:
        if self._takes_conv3x3(x, weight):
            return conv3x3_backward(grad, x, weight, relu, mask)
        if self._takes_strided_conv(x, weight):
            grad_x, grad_weight = strided_conv_backward(grad, x, weight, mask)
        else:
            grad_x, grad_weight, _ = torch.ops.aten.convolution_backward.default(
                grad, x, weight, None, [self.stride] * 2, [self.padding] * 2, [1, 1], False, [0, 0], 1, [*mask, False]
            )
        if relu and mask[0]:
            grad_x = torch.ops.aten.threshold_backward.grad_input(grad_x, x, 0, grad_input=grad_x)
        return grad_x, grad_weight

    def _takes_conv3x3(self, x: Tensor, weight: Tensor) -> bool:
        # By shapes alone, so that recompute and backward choose as forward did.
        return self.stride == 1 and self.padding == 1 and conv3x3_is_faster(x, weight)

    def _takes_strided_conv(self, x: Tensor, weight: Tensor) -> bool:
        return self.stride == 2 and self.padding == weight.shape[2] // 2 and strided_conv_is_faster(x, weight)


def _cudnn_adds_bias(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether bias and ReLU are left to cuDNN's convolution: in half precision on a GPU, where that is faster."""
    cudnn = torch.backends.cudnn
    return (
        device.type == "cuda"
        and dtype in (torch.float16, torch.bfloat16)
        and torch.version.hip is None
        and cudnn.is_available()
        and cudnn.enabled
    )


class Unfolded(NamedTuple):
    """A weight, and the scale of the frozen batch norm that is to be folded in."""

    weight: Tensor
    scale: Tensor
    dtype: torch.dtype  # of activations

    def folded(self) -> Tensor:
        """Rounded once to `dtype`, channels-last, without gradient."""
        made = torch.empty_like(self.weight, dtype=self.dtype, memory_format=torch.channels_last)
        return torch.mul(self.weight, self.scale, out=made)


@dataclass(frozen=True)
class Block:
    """What a lean block needs besides tensors with gradients."""

    branch: tuple[Convolution, ...]  # the last one's bias includes that of the downsampling branch
    downsample: Convolution | None
    num_frames: int
    fold: int  # channels its own shift moved each way; 0: not shifted
    next_fold: int  # the same of the block that follows; 0: no shifted copy wanted
    unfolded: tuple[Unfolded, ...]  # weights of the branch, then of the downsampling

    def weight(self, i: int, kept: Sequence[Tensor]) -> Tensor:
        """The i-th folded weight: as it was kept, or, where none was, made once more."""
        return kept[i] if kept else self.unfolded[i].folded()


Stored = tuple[Tensor, ...]  # a map that backward needs: itself, or its codes and their scale


def _store(x: Tensor, eight_bit: bool) -> Stored:
    return quantize(x) if eight_bit else (x,)


def _restore(stored: Stored, dtype: torch.dtype) -> Tensor:
    if len(stored) == 1:
        return stored[0]
    codes, scale = stored
    return dequantize(codes, scale, dtype)


def frozen_affine(bn: nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    """(scale (C, 1, 1, 1), bias (C,)) for which a convolution with `weight * scale` and `bias` is batch norm with its
    running statistics after a convolution with `weight`.
    """
    assert bn.running_mean is not None and bn.running_var is not None
    scale = bn.weight.detach() * torch.rsqrt(bn.running_var + bn.eps)
    return scale.view(-1, 1, 1, 1), bn.bias.detach() - bn.running_mean * scale


class _Block(torch.autograd.Function):
    """(x, shift of x by `fold`, x as stored, weights and ties) -> (out, shift of out by `next_fold`, *out as stored).

    Keeps x, the activations between the convolutions and out, as stored, and the folded weights, if any are given.
    Where nothing but themselves is stored, x's place is empty and nothing follows out.
    """

    @staticmethod
    def forward(
        ctx: Any,
        block: Block,
        x: Tensor,
        shifted: Tensor | None,
        stored_x: Stored,
        weights: tuple[Tensor, ...],
        *ties: Tensor,
    ) -> tuple[Tensor | None, ...]:
        eight_bit = len(stored_x) == 2
        hidden = x if shifted is None else shifted
        del shifted
        kept = list(stored_x) if eight_bit else [x]
        for i, convolution in enumerate(block.branch[:-1]):
            hidden = convolution.forward_relu(hidden, block.weight(i, weights))
            kept += _store(hidden, eight_bit)
        last = block.branch[-1]
        identity = x if block.downsample is None else block.downsample.forward(x, block.weight(-1, weights))
        hidden = last.forward(hidden, block.weight(len(block.branch) - 1, weights))
        out, shifted_out = residual_shift(
            hidden, None, last.bias, identity, num_frames=block.num_frames, fold=block.next_fold
        )
        stored_out = _store(out, eight_bit)
        ctx.set_materialize_grads(False)
        ctx.block, ctx.dtype, ctx.eight_bit = block, out.dtype, eight_bit
        ctx.save_for_backward(*kept, *stored_out, *weights)
        if not eight_bit:
            return out, shifted_out
        ctx.mark_non_differentiable(*stored_out)
        return out, shifted_out, *stored_out

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad_out: Tensor | None, grad_shifted_out: Tensor | None, *_: None
    ) -> tuple[Tensor | None, ...]:
        block: Block = ctx.block
        count = len(block.branch)
        _, need_x, need_shifted, _, _, *need_weights = ctx.needs_input_grad
        size = 2 if ctx.eight_bit else 1
        saved = ctx.saved_tensors
        kept, weights = [saved[k : k + size] for k in range(0, size * (count + 1), size)], saved[size * (count + 1) :]
        del saved
        out = _restore(kept.pop(), ctx.dtype)
        grad: Tensor | None = _through_relu(grad_out, grad_shifted_out, out, block.num_frames, block.next_fold)
        del grad_out, grad_shifted_out, out
        grad_identity: Tensor | None = grad
        for i in reversed(range(count)):
            hidden = _restore(kept[i], ctx.dtype)
            if i == 0 and block.fold:
                hidden = temporal_shift(hidden, block.num_frames, block.fold)
            need_hidden = i > 0 or need_x or need_shifted
            assert grad is not None
            grad = block.branch[i].backward(
                grad, hidden, block.weight(i, weights), (need_hidden, need_weights[i]), relu=i > 0
            )
            del hidden
        grad_shifted = None
        if block.downsample is not None:
            assert grad_identity is not None
            x = _restore(kept[0], ctx.dtype)
            grad_identity = block.downsample.backward(
                grad_identity, x, block.weight(-1, weights), (need_x, need_weights[-1])
            )
        if block.fold:
            grad_shifted = grad
        elif need_x:
            assert grad_identity is not None and grad is not None
            grad_identity = grad_identity + grad
        return None, grad_identity if need_x else None, grad_shifted, None, None, *(None for _ in need_weights)


class _Stem(torch.autograd.Function):
    """uint8 frames (N*T, H, W, 3), weight, its tie -> (pooled, its shift, *pooled as stored, where that is not itself).

    Keeps the frames, pooled as stored and its int8 argmax.
    """

    @staticmethod
    def forward(
        ctx: Any,
        convolution: Convolution,
        frames: Tensor,
        mean: Tensor,
        weight: Tensor,
        tie: Tensor,
        num_frames: int,
        fold: int,
        eight_bit: bool,
    ) -> tuple[Tensor, ...]:
        hidden = convolution.forward(_pixels(frames, mean, weight.dtype), weight)
        pooled, argmax = stem_forward(hidden, None, convolution.bias)
        ctx.set_materialize_grads(False)
        ctx.convolution, ctx.size, ctx.num_frames, ctx.fold = convolution, hidden.shape[2:], num_frames, fold
        shifted, stored = temporal_shift(pooled, num_frames, fold), _store(pooled, eight_bit)
        ctx.save_for_backward(frames, mean, weight, argmax, *stored)
        if not eight_bit:
            return pooled, shifted
        ctx.mark_non_differentiable(*stored)
        return pooled, shifted, *stored

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad_pooled: Tensor | None, grad_shifted: Tensor | None, *_: None
    ) -> tuple[Tensor | None, ...]:
        frames, mean, weight, argmax, *stored = ctx.saved_tensors
        pooled = _restore(tuple(stored), weight.dtype)
        grad = _through_relu(grad_pooled, grad_shifted, pooled, ctx.num_frames, ctx.fold)
        grad = stem_backward(grad, pooled, argmax, None, *ctx.size)
        del pooled
        ctx.convolution.backward(grad, _pixels(frames, mean, weight.dtype), weight, (False, True))
        return (None,) * 8


def _pixels(frames: Tensor, mean: Tensor, dtype: torch.dtype) -> Tensor:
    """What the first convolution takes; its weight is that of `LeanEncoder.of`."""
    x = stem_input(frames, mean, dtype)
    return x.mul_(1 / PIXELS) if dtype is torch.float16 else x


def _through_relu(
    grad_out: Tensor | None, grad_shifted: Tensor | None, out: Tensor, num_frames: int, fold: int
) -> Tensor:
    """The gradient before the ReLU that made `out`, from those of `out` and of its shifted copy."""
    grad, _ = residual_shift_backward(grad_out, grad_shifted, out, None, None, False, num_frames, fold)
    return grad


class Tied(NamedTuple):
    """The weights of a block, or of the stem, folded: in the activations' dtype, without gradient."""

    folded: tuple[Tensor, ...]  # none where they are made once more wherever they are read
    ties: tuple[Tensor, ...]  # (0,) each: they tie a graph to the weights that learn


@dataclass(frozen=True)
class LeanEncoder:
    """A `TSMResNet` with its frozen batch norm folded in, for one optimiser step: weights in the activations' dtype."""

    stem: Convolution
    mean: Tensor
    stem_weight: Tied
    blocks: tuple[Block, ...]
    weights: tuple[Tied, ...]
    recompute: bool

    @staticmethod
    def of(encoder: TSMResNet, num_frames: int, recompute: bool) -> LeanEncoder:
        """Fold. The dtype is autocast's where that is on, else the parameters'."""
        recompute = recompute and torch.is_grad_enabled()
        device = encoder.conv1.weight.device
        dtype = encoder.conv1.weight.dtype
        if torch.is_autocast_enabled(device.type) and dtype is not torch.float64:
            dtype = torch.get_autocast_dtype(device.type)

        def part(conv: nn.Conv2d, bn: nn.BatchNorm2d) -> tuple[Convolution, Unfolded, Tensor, tuple[Tensor, ...]]:
            """With the tie, and the folded weight where it is kept."""
            scale, bias = frozen_affine(bn)
            convolution = Convolution(conv.stride[0], int(conv.padding[0]), bias, GradientSum())
            weight = conv.weight * scale
            kept = () if recompute else (_placed(weight, dtype),)
            return convolution, Unfolded(conv.weight.detach(), scale, dtype), tie(weight, convolution.total), kept

        scale, bias = frozen_affine(encoder.bn1)
        stem = Convolution(2, 3, bias, GradientSum())
        weight = fold_normalization(encoder.conv1.weight * scale, encoder.std.flatten())
        if dtype is torch.float16:
            weight = weight * PIXELS
        stem_weight = Tied((_placed(weight, dtype),), (tie(weight, stem.total),))
        modules = [block for stage in encoder.stages for block in stage]
        blocks, weights = [], []
        for index, module in enumerate(modules):
            assert isinstance(module, BasicBlock | Bottleneck)
            pairs = [(module.conv1, module.bn1), (module.conv2, module.bn2)]
            if isinstance(module, Bottleneck):
                pairs.append((module.conv3, module.bn3))
            parts = [part(*pair) for pair in pairs]
            if module.downsample is not None:
                parts.append(part(*module.downsample))
            branch, unfolded, ties, kept = map(list, zip(*parts, strict=True))
            downsample = None if module.downsample is None else branch.pop()
            if _cudnn_adds_bias(device, dtype):
                branch[:-1] = [replace(conv, rounded_bias=conv.bias.to(dtype)) for conv in branch[:-1]]
            if downsample is not None:
                branch[-1] = replace(branch[-1], bias=branch[-1].bias + downsample.bias)
            following = modules[index + 1] if index + 1 < len(modules) else None
            blocks.append(
                Block(tuple(branch), downsample, num_frames, _fold(module), _fold(following), tuple(unfolded))
            )
            weights.append(Tied(tuple(chain.from_iterable(kept)), tuple(ties)))
        mean = encoder.mean.flatten().float()
        return LeanEncoder(stem, mean, stem_weight, tuple(blocks), tuple(weights), recompute)

    def __call__(self, frames: Tensor, chunk: int, eight_bit: bool) -> Tensor:
        """Features (N, C) of uint8 frames (N*T, H, W, 3), `chunk` snippets to a graph of their own."""
        parts = frames.split(chunk * self.blocks[0].num_frames)
        if self.recompute:
            # Weights and ties are captured, not passed: the non-reentrant form follows them through the graph.
            return torch.cat(
                [
                    checkpoint(self._chunk, part, eight_bit, use_reentrant=False, preserve_rng_state=False)
                    for part in parts
                ]
            )
        return torch.cat([self._chunk(part, eight_bit) for part in parts])

    def _chunk(self, frames: Tensor, eight_bit: bool) -> Tensor:
        num_frames = self.blocks[0].num_frames
        eight_bit = eight_bit and torch.is_grad_enabled()  # else nothing is kept
        with torch.autocast(frames.device.type, enabled=False):
            x, shifted, *stored = _Stem.apply(  # type: ignore[no-untyped-call]
                self.stem, frames, self.mean, *self.stem_weight.folded, *self.stem_weight.ties, num_frames,
                self.blocks[0].fold, eight_bit,
            )  # fmt: skip
            for block, weights in zip(self.blocks, self.weights, strict=True):
                x, shifted, *stored = _Block.apply(  # type: ignore[no-untyped-call]
                    block, x, shifted, tuple(stored), weights.folded, *weights.ties
                )
            sums = torch.promote_types(x.dtype, torch.float32)
            x_NTC: Tensor = x.mean(dim=(2, 3), dtype=sums).unflatten(0, (-1, num_frames))
            return x_NTC.mean(dim=1)


def _fold(block: nn.Module | None) -> int:
    """Channels that a block's shift moves each way; 0 for none."""
    return block.conv1.in_channels // 8 if isinstance(block, BasicBlock | Bottleneck) and block.shifted else 0


def _placed(weight: Tensor, dtype: torch.dtype) -> Tensor:
    return weight.detach().to(dtype, memory_format=torch.channels_last)


def tie(weight: Tensor, total: GradientSum) -> Tensor:
    """An empty tensor that ties the graphs of chunks to `weight`, whose gradient is then what `total` has summed."""
    tied: Tensor = _Summed.apply(weight, total)  # type: ignore[no-untyped-call]
    return tied


def encode(
    encoder: TSMResNet,
    frames: Tensor,
    num_frames: int,
    *,
    chunk: int | None = None,
    recompute: bool = False,
    eight_bit: bool = False,
) -> Tensor:
    """Features (N, C) of uint8 frames (N*T, H, W, 3): the lean way where batch norm is frozen, else the plain one.

    Both give the same features and gradients to rounding.

    Args:
        num_frames: T, the frames of one snippet.
        chunk: snippets to a graph of their own; `default_chunk` where None. The gradient of a weight is the sum of its
            chunks', so it depends on the size of a chunk to rounding.
        recompute: keep only the frames, and run each chunk forward again when its gradient arrives: the same bits as
            without, for one more forward.
        eight_bit: keep activations as bytes: the same features, gradients rounded.

    Raises:
        ValueError: the frames are no whole number of snippets, or `recompute` or `eight_bit` is asked for while batch
            norm is live.
    """
    if frames.shape[0] % num_frames:
        raise ValueError(f"{frames.shape[0]} frames are not a whole number of {num_frames}-frame snippets")
    if not encoder.frozen_batchnorm:
        if recompute:
            raise ValueError("recompute needs frozen batch norm: live statistics tie the snippets of a batch together")
        if eight_bit:
            raise ValueError("activations in 8 bits are the lean encoder's, which needs frozen batch norm")
        features: Tensor = encoder(frames, num_frames)
        return features
    if chunk is None:
        chunk = default_chunk(num_frames, max(frames.shape[1:3]))
    return LeanEncoder.of(encoder, num_frames, recompute)(frames, chunk, eight_bit)

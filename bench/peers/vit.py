"""The ViT in plain PyTorch, with our modules: autograd keeps what a block computes, or a checkpoint keeps its input."""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from lofi_fast.encoder.vit import Block, ViT
from lofi_fast.encoder.vit_ledger import PATCH, TUBELET


def vit_features(encoder: ViT, frames_NHWC: Tensor, num_frames: int, *, checkpoints: bool = False) -> Tensor:
    """Features (N, C) of uint8 frames (N*T, H, W, 3). `checkpoints`: each block runs again in backward, by torch's own
    checkpoint.
    """
    proj = encoder.patch_embed.proj
    assert proj.bias is not None
    device = frames_NHWC.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else proj.weight.dtype
    with torch.autocast(device, enabled=False):  # as in the published code, activations have one precision throughout
        x = ((frames_NHWC - encoder.mean) / encoder.std).to(dtype).unflatten(0, (-1, num_frames)).movedim(-1, 1)
        x = F.pad(x, (0, -x.shape[-1] % PATCH, 0, -x.shape[-2] % PATCH))
        x = F.conv3d(x, proj.weight.to(dtype), proj.bias.to(dtype), stride=(TUBELET, PATCH, PATCH))
        grid = cast(tuple[int, int, int], tuple(x.shape[2:]))
        x = x.flatten(2).transpose(1, 2)
        for module in encoder.blocks:
            block = cast(Block, module)
            x = checkpoint(block, x, grid, use_reentrant=False) if checkpoints else block(x, grid)
        norm = encoder.norm
        x = F.layer_norm(x, norm.normalized_shape, norm.weight.to(dtype), norm.bias.to(dtype), norm.eps)
        return x.float().mean(dim=1)

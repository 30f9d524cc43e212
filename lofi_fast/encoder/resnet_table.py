"""TSM-ResNet as a table of its convolutions. The stem's is pooled, and every block's input shifted."""

from __future__ import annotations

from functools import lru_cache

from lofi_fast.config import EncoderName
from lofi_fast.encoder.conv_ledger import Activation, Block, Conv, Network
from lofi_fast.ledger import RGB

# Blocks in each of the four stages.
BLOCKS: dict[EncoderName, tuple[int, int, int, int]] = {
    "tsm_r18": (2, 2, 2, 2),
    "tsm_r34": (3, 4, 6, 3),
    "tsm_r50": (3, 4, 6, 3),
}


@lru_cache(maxsize=256)
def network(name: EncoderName, width: int, side: int) -> Network:
    """An encoder of `width` channels in its first stage, over frames of `side` x `side` pixels."""
    stem = Conv.over_space(Activation(RGB, side), width, 7, 2)
    x, blocks = Activation(width, (stem.result.side - 1) // 2 + 1), []
    for stage, num_blocks in enumerate(BLOCKS[name]):
        for index in range(num_blocks):
            channels, stride = width << stage, 2 if stage > 0 and index == 0 else 1
            if name == "tsm_r50":
                first = Conv.over_space(x, channels, 1)
                second = Conv.over_space(first.result, channels, 3, stride)
                branch: tuple[Conv, ...] = (first, second, Conv.over_space(second.result, 4 * channels, 1))
            else:
                first = Conv.over_space(x, channels, 3, stride)
                branch = (first, Conv.over_space(first.result, channels, 3))
            out = branch[-1].result
            blocks.append(Block(branch, None if out == x else Conv.over_space(x, out.channels, 1, stride)))
            x = out
    return Network((stem,), tuple(blocks))

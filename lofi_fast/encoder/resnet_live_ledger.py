"""The ledger of TSM-ResNet in pretraining: plain PyTorch's forward and backward, with live batch norm.

Of every convolution autograd keeps the input and the output (for batch norm's backward), and of every ReLU the output,
which is the next convolution's input. Events come in the order in which `TSMResNet.forward` runs, and in which
autograd's engine takes its nodes: the latest of forward first.
"""

from __future__ import annotations

from lofi_fast.encoder.conv_ledger import Block, Network, normalised, normalised_backward, weight_gradient
from lofi_fast.fidelity import FRAMES_PER_SNIPPET
from lofi_fast.ledger import FLOAT, LONG, Tally


def play(tally: Tally, net: Network, snippets: int, e: int) -> None:
    """Forward up to the features, their gradient comes in, and backward: the gradients of all parameters are left.

    `e`: bytes of a number in an activation, 4 in fp32 and 2 under autocast, which keeps a copy of each weight too.
    """
    frames = snippets * FRAMES_PER_SNIPPET
    size, cast, (stem,), x = e * frames, 0 if e == FLOAT else e, net.stem, net.blocks[0].x
    image, pooled, indices = frames * net.image, size * x.numel, LONG * frames * x.numel
    last = net.blocks[-1].out.numel
    keeps_pooled = net.blocks[0].downsample is not None

    tally.spike(3 * FLOAT * image)  # as floats, less the mean, by the deviation
    tally.take(FLOAT * image + cast * net.image * frames)
    normalised(tally, stem, size, cast)
    if cast:
        tally.take(-FLOAT * image)
    tally.take(pooled + indices)
    for index, block in enumerate(net.blocks):
        _forward(tally, block, size, cast)
        if index == 0 and not keeps_pooled:
            tally.take(-pooled)
    tally.take(FLOAT * net.num_features * snippets)
    tally.spike(FLOAT * net.num_features * frames)

    tally.spike(FLOAT * net.num_features * frames + (FLOAT + cast) * frames * last)
    tally.take(size * last)
    for index, block in reversed(list(enumerate(net.blocks))):
        _backward(tally, block, size, cast, index == 0)
    conv = size * stem.result.numel
    tally.take(conv)  # the gradient of the pooling's input
    tally.take(-pooled - indices)
    tally.spike(conv)
    tally.take(-conv)  # the ReLU's gradient takes its input's place, and its output goes
    normalised_backward(tally, stem, size)
    tally.take(-conv)
    weight_gradient(tally, stem, cast)
    tally.take(-conv - e * image)


def _forward(tally: Tally, block: Block, size: int, cast: int) -> None:
    out = size * block.out.numel
    tally.take(size * block.x.numel)  # shifted
    for conv in block.convs:
        normalised(tally, conv, size, cast)
    tally.take(out)
    tally.take(-out if block.downsample is None else -2 * out)  # what was added goes


def _backward(tally: Tally, block: Block, size: int, cast: int, first: bool) -> None:
    """From the gradient of the block's output to that of its input. `first`: its input is kept by nobody else."""
    x, out = size * block.x.numel, size * block.out.numel
    tally.spike(out)
    tally.take(-out)  # the ReLU's gradient takes its input's place, and its output goes
    if block.downsample is not None:
        normalised_backward(tally, block.downsample, size)
        tally.take(x)
        weight_gradient(tally, block.downsample, cast)
        tally.take(-out - (x if first else 0))
    for i in reversed(range(len(block.branch))):
        conv = block.branch[i]
        result, source = size * conv.result.numel, size * conv.source.numel
        normalised_backward(tally, conv, size)
        if i + 1 < len(block.branch) or block.downsample is not None:
            tally.take(-result)  # else it is the gradient of the identity too
        tally.take(source)
        tally.spike((cast or FLOAT) * conv.weight)
        tally.take(-result)
        weight_gradient(tally, conv, cast)
        if i > 0:
            tally.spike(source)
            tally.take(-source)
    tally.spike(x)  # back from the shift
    tally.take(-2 * x)  # the shifted copy, and the sum of two gradients of the input

"""strided_conv of small images on a CPU, as matrix products.

With one tap, all outputs are one product of every second pixel. With 3 x 3, each output of an image is a product of its
window of up to 9 pixels, one for all images: as many multiplications as the definition has, where a convolution also
multiplies the zeros beyond the edge, which are most of what a window of so small an image has.

Shapes: as in reference.py.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor


def strided_conv(x_NCHW: Tensor, weight_KCRR: Tensor) -> Tensor:
    """(N, K, ceil(H / 2), ceil(W / 2)), channels-last, in x's dtype; see reference.py."""
    x, weight = x_NCHW.permute(0, 2, 3, 1), weight_KCRR.permute(0, 2, 3, 1)
    num, height, width, channels = x.shape
    outputs, taps = weight.shape[:2]
    out = x.new_empty(num, (height + 1) // 2, (width + 1) // 2, outputs)
    if taps == 1:
        torch.mm(x[:, ::2, ::2].reshape(-1, channels), weight.reshape(outputs, channels).T, out=out.view(-1, outputs))
    else:
        for i, j, pixels, tapped in _windows(height, width):
            out[:, i, j] = x[:, *pixels].flatten(1) @ weight[:, *tapped].flatten(1).T
    return out.permute(0, 3, 1, 2)


def strided_conv_backward(
    grad_NKHW: Tensor, x_NCHW: Tensor, weight_KCRR: Tensor, with_x: bool, with_weight: bool
) -> tuple[Tensor, Tensor]:
    """(grad_x_NCHW, grad_weight_KCRR), channels-last, in x's dtype; (0,) in place of one that is not wanted."""
    grad, x, weight = grad_NKHW.permute(0, 2, 3, 1), x_NCHW.permute(0, 2, 3, 1), weight_KCRR.permute(0, 2, 3, 1)
    height, width, channels = x.shape[1:]
    outputs, taps = weight.shape[:2]
    grad_x = torch.zeros_like(x, memory_format=torch.contiguous_format) if with_x else x.new_empty(0)
    grad_weight = torch.zeros_like(weight, memory_format=torch.contiguous_format) if with_weight else x.new_empty(0)
    if taps == 1:
        rows = grad.reshape(-1, outputs)
        seen = x[:, ::2, ::2]
        if with_x:
            grad_x[:, ::2, ::2] = (rows @ weight.reshape(outputs, channels)).view(seen.shape)
        if with_weight:
            torch.mm(rows.T, seen.reshape(-1, channels), out=grad_weight.view(outputs, channels))
    else:
        for i, j, pixels, tapped in _windows(height, width):
            rows = grad[:, i, j]
            if with_x:
                part = grad_x[:, *pixels]
                part += (rows @ weight[:, *tapped].flatten(1)).view(part.shape)
            if with_weight:
                part = grad_weight[:, *tapped]
                part += (rows.T @ x[:, *pixels].flatten(1)).view(part.shape)
    return (
        grad_x.permute(0, 3, 1, 2) if with_x else grad_x,
        grad_weight.permute(0, 3, 1, 2) if with_weight else grad_weight,
    )


Window = tuple[slice, slice]


def _windows(height: int, width: int) -> Iterator[tuple[int, int, Window, Window]]:
    """(row and column of an output, the pixels that it reads, the taps that it reads them through)."""
    for i in range((height + 1) // 2):
        for j in range((width + 1) // 2):
            (rows, down), (columns, across) = _reach(i, height), _reach(j, width)
            yield i, j, (rows, columns), (down, across)


def _reach(output: int, length: int) -> tuple[slice, slice]:
    """Of three pixels from 2 * output - 1 on: those inside the image, and their taps."""
    first = 2 * output - 1
    begin, end = max(first, 0), min(first + 3, length)
    return slice(begin, end), slice(begin - first, end - first)

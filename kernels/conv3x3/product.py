"""The 3x3 convolution of images of 1 or 2 pixels a side, as one matrix product on a CPU.

So small an image is all neighbours: each of its H * W outputs reads each of its H * W pixels, through one tap of the
weight. With the taps laid out as a matrix, (output, K) x (pixel, C), the convolution of N images is the product of
(N, pixels * C) with it, with as many multiplications as the definition has, and one call for all images, where
convolutions cut them up.

Shapes: N images, C input channels, K output channels, H x W pixels, P = H * W.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

LARGEST = 2  # pixels of a side; from 3 on, some pixels are no neighbours


def conv3x3(x_NCHW: Tensor, weight_KC33: Tensor, bias_K: Tensor | None, relu: bool) -> Tensor:
    """(N, K, H, W), channels-last, in x's dtype; see reference.py."""
    num, _, height, width = x_NCHW.shape
    bias = None if bias_K is None else bias_K.repeat(height * width)
    out = F.linear(_rows(x_NCHW), _matrix(weight_KC33, height, width), bias)
    return _images(out.relu_() if relu else out, (num, weight_KC33.shape[0], height, width))


def conv3x3_backward(
    grad_NKHW: Tensor, x_NCHW: Tensor, weight_KC33: Tensor, relu: bool, with_x: bool, with_weight: bool
) -> tuple[Tensor, Tensor]:
    """(grad_x_NCHW, grad_weight_KC33), channels-last, in x's dtype; (0,) in place of one that is not wanted."""
    num, channels, height, width = x_NCHW.shape
    outputs, pixels = weight_KC33.shape[0], height * width
    grad, x = _rows(grad_NKHW), _rows(x_NCHW)
    grad_x = grad_weight = x_NCHW.new_empty(0)
    if with_x:
        grad_x = grad @ _matrix(weight_KC33, height, width)
        if relu:
            grad_x.masked_fill_(x <= 0, 0)
        grad_x = _images(grad_x, (num, channels, height, width))
    if with_weight:
        products = (grad.T @ x).view(pixels, outputs, pixels, channels)
        sums = torch.zeros(outputs, 3, 3, channels, dtype=torch.promote_types(x.dtype, torch.float32))
        for out, pixel, i, j in _taps(height, width):
            sums[:, i, j] += products[out, :, pixel]
        grad_weight = sums.to(x.dtype).permute(0, 3, 1, 2)
    return grad_x, grad_weight


def _taps(height: int, width: int) -> list[tuple[int, int, int, int]]:
    """(output, pixel, row and column of the tap that leads from the pixel to the output)."""
    places = [(y, x) for y in range(height) for x in range(width)]
    return [
        (out, pixel, y - b + 1, x - a + 1) for out, (b, a) in enumerate(places) for pixel, (y, x) in enumerate(places)
    ]


def _matrix(weight_KC33: Tensor, height: int, width: int) -> Tensor:
    """(P * K, P * C): what leads from each pixel's channels to each output's."""
    outputs, channels = weight_KC33.shape[:2]
    matrix = weight_KC33.new_empty(height * width, outputs, height * width, channels)
    for out, pixel, i, j in _taps(height, width):
        matrix[out, :, pixel] = weight_KC33[:, :, i, j]
    return matrix.flatten(2).flatten(0, 1)


def _rows(images: Tensor) -> Tensor:
    """(N, P * channels) of (N, channels, H, W); no copy of what is channels-last."""
    return images.permute(0, 2, 3, 1).reshape(len(images), -1)


def _images(rows: Tensor, shape: tuple[int, int, int, int]) -> Tensor:
    """The reverse, channels-last."""
    num, channels, height, width = shape
    return rows.view(num, height, width, channels).permute(0, 3, 1, 2)

"""quantize and dequantize: activations after a ReLU in 8 bits, with one scale for each frame and channel."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor

from .. import library
from ..stem.reference import empty_beside
from . import reference

__all__ = ["dequantize", "quantize"]

_FLOATS = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


def quantize(x: Tensor) -> tuple[Tensor, Tensor]:
    """A map after a ReLU as bytes, for an autograd function that keeps it for its backward pass.

    Activations compressed between forward and backward are ActNN's (Chen et al., ICML 2021) and GACT's (Liu et al.,
    ICML 2022). This variant rounds to nearest, in steps of 1/255 of the largest value of each frame and channel.

    Args:
        x: (N, C, H, W) float32, float16, bfloat16 or float64, any strides. Negative values count as zero.

    Returns:
        codes: uint8 (N, C, H, W) in the memory format of x (channels-last stays channels-last). A code is 0 where
            x <= 0 and at least 1 elsewhere, so ``codes > 0`` is exactly the mask of the ReLU.
        scale: (N, C) float32 (float64 for float64 x), the size of one step: the maximum / 255, but at least the
            smallest normal number, and 0 where the maximum is 0.

    ``codes * scale`` is within half a scale of x, and within one scale where x is below half of it and lifted to code
    1; to that come the roundings of the arithmetic, below scale / 16384 in all. A NaN makes the scale of its frame and
    channel NaN, an infinity makes it infinite; codes are 1 there where the mask is set (a NaN's, too), so dequantize
    gives NaN everywhere for the one, and for the other infinity, and NaN where x <= 0: an overflow stays seen.

    There is no gradient: backward through the result raises NotImplementedError.

    Raises:
        ValueError: x is not 4-D, or of another dtype.
    """
    _check_dimensions("quantize", "x", x)
    if x.dtype not in _FLOATS:
        raise ValueError(f"quantize: x must be float32, float16, bfloat16 or float64, got {x.dtype}")
    run = library.operator("quantize", x)
    codes, scale = run(x)
    return codes, scale


def dequantize(codes: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """The map that ``quantize`` stored: codes * scale in float32 (float64 for float64), rounded once to dtype.

    Args:
        codes: uint8 (N, C, H, W), any strides.
        scale: (N, C) float32, or float64 for dtype float64.
        dtype: float32, float16, bfloat16 or float64. In the dtype of the map that was stored, a value is positive
            exactly where it was, unless its scale is not finite.

    Returns:
        (N, C, H, W) of dtype, in the memory format of codes. There is no gradient: backward through it raises
        NotImplementedError.

    Raises:
        ValueError: a wrong shape, dtype or device.
    """
    _check_dimensions("dequantize", "codes", codes)
    if codes.dtype != torch.uint8:
        raise ValueError(f"dequantize: codes must be torch.uint8, got {codes.dtype}")
    if dtype not in _FLOATS:
        raise ValueError(f"dequantize: dtype must be float32, float16, bfloat16 or float64, got {dtype}")
    exact = _exact(dtype)
    if scale.shape != codes.shape[:2] or scale.dtype != exact or scale.device != codes.device:
        raise ValueError(
            f"dequantize: scale must be {exact} {tuple(codes.shape[:2])} on {codes.device} for {dtype}, got "
            f"{scale.dtype} {tuple(scale.shape)} on {scale.device}"
        )
    run = library.operator("dequantize", codes, scale)
    x: Tensor = run(codes, scale, dtype)
    return x


def _check_dimensions(op: str, name: str, x: Tensor) -> None:
    if x.dim() != 4:
        raise ValueError(f"{op}: {name} must be (N, C, H, W), got {x.dim()} dimensions")


def _exact(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _quantize_fake(x: Tensor) -> tuple[Tensor, Tensor]:
    return empty_beside(x, x.shape, torch.uint8), x.new_empty(x.shape[:2], dtype=_exact(x.dtype))


def _dequantize_fake(codes: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    return empty_beside(codes, codes.shape, dtype)


@cache
def _kernel() -> Any:
    """The module of the Triton forms, imported when one first runs: elsewhere Triton may be missing."""
    from . import kernel

    return kernel


def _quantize_triton(*arguments: Any) -> Any:
    return _kernel().quantize(*arguments)


def _dequantize_triton(*arguments: Any) -> Any:
    return _kernel().dequantize(*arguments)


def _no_derivative(ctx: Any, *grads: Tensor) -> None:
    raise NotImplementedError("quantize and dequantize have no gradient: call them inside an autograd function")


library.define(
    "quantize(Tensor x) -> (Tensor codes, Tensor scale)", reference.quantize, _quantize_fake, _quantize_triton
)
library.define(
    "dequantize(Tensor codes, Tensor scale, ScalarType dtype) -> Tensor",
    reference.dequantize,
    _dequantize_fake,
    _dequantize_triton,
)
library.differentiate("quantize", _no_derivative)
library.differentiate("dequantize", _no_derivative)

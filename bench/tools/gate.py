"""The gate before every measurement: a form that does not compute the operator has no speed."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

Tensors = Sequence[Tensor]

# Largest ||error|| / ||exact|| of any form, by dtype. Rounding alone stays far below, a wrong formula far above.
LARGEST = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 0.005, torch.bfloat16: 0.04}


class GateError(Exception):
    """One sentence: which form, which result, how far off."""


def check_copies(form: str, results: Tensors, exact: Tensors) -> None:
    """Bit for bit, for operators that do no arithmetic."""
    for number, (result, expected) in enumerate(_pairs(form, results, exact)):
        if not torch.equal(result, expected.to(result.dtype)):
            raise GateError(f"{form}: result {number} is not the reference's, bit for bit")


def check_close(
    form: str, results: Tensors, exact: Tensors, plain: Tensors | None = None, roundings: float = 2
) -> None:
    """Close to the float64 results; and, with `plain`, at most `roundings` times as far from them as plain PyTorch at
    that dtype.

    Where plain PyTorch happens to be (nearly) exact, one rounding of the largest value is allowed.
    """
    for number, (result, expected) in enumerate(_pairs(form, results, exact)):
        if not result.is_floating_point():
            if not torch.equal(result, expected):
                raise GateError(f"{form}: result {number} is not the reference's")
            continue
        if not result.numel():
            continue
        error = result.double() - expected
        relative = (error.norm() / expected.norm().clamp(min=1e-30)).item()
        if not relative <= LARGEST[result.dtype]:  # NaN too
            raise GateError(f"{form}: result {number} is off by {relative:.1e} of the reference's norm")
        if plain is not None:
            largest, theirs = error.abs().max().item(), (plain[number].double() - expected).abs().max().item()
            allowed = max(roundings * theirs, torch.finfo(result.dtype).eps * expected.abs().max().item())
            if largest > allowed:
                raise GateError(f"{form}: result {number} has an error of {largest:.1e}, plain PyTorch of {theirs:.1e}")


def _pairs(form: str, results: Tensors, exact: Tensors) -> list[tuple[Tensor, Tensor]]:
    shapes, expected = [tuple(t.shape) for t in results], [tuple(t.shape) for t in exact]
    if shapes != expected:
        raise GateError(f"{form}: results of shapes {shapes}, the reference's are {expected}")
    return list(zip(results, exact, strict=True))

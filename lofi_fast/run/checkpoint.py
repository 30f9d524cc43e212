"""Checkpoints: complete, atomic, and enough to go on to the same result as an unbroken run.

A checkpoint is one dictionary of tensors, numbers and strings (loadable with weights_only=True): weights, optimiser,
gradient scaler, RNG states of torch, numpy and python, position in the run, and the plans.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch

from lofi_fast import files
from lofi_fast.errors import InputError


@dataclass(frozen=True)
class Position:
    """The next step to do: stage by name, epoch and step within it."""

    stage: str
    epoch: int = 0
    step: int = 0


def save_atomic(content: dict[str, Any], path: Path) -> None:
    """Write a checkpoint, whole or not at all: a reader sees the old file or the new one.

    Raises InputError when the disk is full or not writable; the old file stays.
    """
    try:
        with files.replacing(path) as file:
            _write(content, file)
        files.sweep(path.parent)
    except InputError as error:
        reason = error.__cause__.strerror or error.__cause__ if isinstance(error.__cause__, OSError) else error
        raise InputError(
            f"{path}: cannot write the checkpoint ({reason}); free some space or change --out, then go on with --resume"
        ) from error


def _write(content: dict[str, Any], file: IO[bytes]) -> None:
    try:
        torch.save(content, file)
    except RuntimeError as error:  # torch reports a full disk as a RuntimeError of its zip writer
        raise OSError(str(error).splitlines()[0]) from error


def not_finite(content: Mapping[str, Any]) -> str:
    """The first tensor of a checkpoint's networks that holds a NaN or an infinity, as "encoder.conv1.weight"; empty
    where all are finite.
    """
    networks = {part: content[part] for part in ("encoder", "head") if part in content} | content.get("extra", {})
    for part, state in networks.items():
        for name, value in state.items():
            if not bool(value.isfinite().all()):
                return f"{part}.{name}"
    return ""


def load(path: Path) -> dict[str, Any]:
    """Read a checkpoint onto the CPU. Raises InputError when there is none or it is not one."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise InputError(f"{path}: no checkpoint to resume from; name the --out of the run to go on with") from None
    except Exception as error:  # a damaged file can make the unpickler raise anything
        raise InputError(f"{path}: not a readable checkpoint ({type(error).__name__}); name another --out") from None
    if not isinstance(content, dict) or "position" not in content:
        raise InputError(f"{path}: not a checkpoint of a lofi_fast run")
    return content


def rng_state() -> dict[str, Any]:
    """States of python's, numpy's and torch's global generators, as plain values."""
    version, internal, gauss = random.getstate()
    numpy_state = np.random.get_state(legacy=False)
    assert isinstance(numpy_state, dict)
    key = torch.from_numpy(numpy_state["state"]["key"].astype(np.int64))
    return {
        "python": [version, list(internal), gauss],
        "numpy": {**numpy_state, "state": {"key": key, "pos": int(numpy_state["state"]["pos"])}},
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def restore_rng(state: dict[str, Any]) -> None:
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    inner = state["numpy"]["state"]
    key = inner["key"].numpy().astype(np.uint32)
    np.random.set_state({**state["numpy"], "state": {"key": key, "pos": inner["pos"]}})
    torch.set_rng_state(state["torch"])
    if state["cuda"] and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(state["cuda"])

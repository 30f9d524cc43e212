"""Checkpoints: complete, atomic, and enough to go on to the same result as an unbroken run.

A checkpoint is one dictionary of tensors, numbers and strings (loadable with weights_only=True): weights, optimiser,
gradient scaler, RNG states of torch, numpy and python, position in the run, and the plans.

torch.load does not notice bits that have flipped on a disk. So a checkpoint ends with a seal, a digest of all bytes
before it, which stands where a zip file has its comment: any other reader of zip files, torch.load too, passes over it.
A run folder holds two checkpoints, last.pt and the one that was saved before it, for when the last cannot be read.
"""

from __future__ import annotations

import hashlib
import os
import random
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch

from lofi_fast import files
from lofi_fast.errors import InputError

LAST, BEFORE = "last.pt", "previous.pt"
SEAL = b"blake2b:"  # and 32 hexadecimal digits
SEAL_SIZE = len(SEAL) + 32
BLOCK = 2**20  # bytes read at once


@dataclass(frozen=True)
class Position:
    """The next step to do: stage by name, epoch and step within it."""

    stage: str
    epoch: int = 0
    step: int = 0


def save_atomic(content: dict[str, Any], path: Path, before: Path | None = None) -> None:
    """Write a checkpoint, whole or not at all: a reader sees the old file or the new one. The old one is kept as
    `before`, where that is given.

    Raises InputError when the disk is full or not writable; the old file stays.
    """
    try:
        with files.replacing(path, before) as file:
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
    file.seek(-2, os.SEEK_END)  # a zip file ends with the length of its comment
    file.write(SEAL_SIZE.to_bytes(2, "little"))
    size = file.tell()
    file.seek(0)
    digest = _digest(file, size)
    file.seek(size)
    file.write(SEAL + digest)


def _digest(file: IO[bytes], size: int) -> bytes:
    """32 hexadecimal digits of the next `size` bytes."""
    digest = hashlib.blake2b(digest_size=16)
    while size > 0 and (block := file.read(min(size, BLOCK))):
        digest.update(block)
        size -= len(block)
    return digest.hexdigest().encode()


def is_sealed(path: Path) -> bool:
    """Whether a file ends with a seal, and its bytes are those that were sealed. Raises OSError."""
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size - SEAL_SIZE
        digest = _digest(file, size)
        return size > 0 and file.read() == SEAL + digest


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
    """Read a checkpoint onto the CPU. Raises InputError when there is none, it is not one, or its bytes have changed
    since it was saved.
    """
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
        sealed = is_sealed(path)
    except FileNotFoundError:
        raise InputError(f"{path}: no checkpoint to resume from; name the --out of the run to go on with") from None
    except Exception as error:  # a damaged file can make the unpickler raise anything
        raise InputError(f"{path}: not a readable checkpoint ({type(error).__name__}); name another --out") from None
    if not isinstance(content, dict) or "position" not in content:
        raise InputError(f"{path}: not a checkpoint of a lofi_fast run")
    if not sealed:
        raise InputError(f"{path}: damaged, its checksum does not hold; name another --out")
    return content


def load_newest(folder: Path) -> tuple[dict[str, Any], Path, str]:
    """(content, its file, why it is not the last one, else empty) of the last checkpoint in `folder` that can be read:
    last.pt or the one before it. Raises InputError when neither can.
    """
    last, before = folder / LAST, folder / BEFORE
    try:
        return load(last), last, ""
    except InputError as error:
        reason = str(error).partition("; ")[0]
        if not before.exists():
            raise
    try:
        return load(before), before, reason
    except InputError as error:
        raise InputError(f"{reason}, and the checkpoint before it is of no use either: {error}") from None


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

"""Full-fidelity features of every window, by the frozen encoder, once: what the head stage and other heads train on."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from lofi_fast import files
from lofi_fast.data.cache import file_name
from lofi_fast.data.dataset import SUBSETS, Sample, centre_requests
from lofi_fast.errors import InputError
from lofi_fast.fidelity import FRAMES_PER_SNIPPET
from lofi_fast.run import events
from lofi_fast.run.state import Run

LARGEST_CHUNK = 64  # snippets encoded at once, at most


def encoder_digest(run: Run) -> str:
    """A digest of the encoder's weights and BN statistics: says which encoder features came from."""
    digest = hashlib.blake2b(digest_size=16)
    for name, value in run.encoder.state_dict().items():
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def feature_path(run: Run, sample: Sample) -> Path:
    """features/<video>.npy, or <video>@<start>s.npy where a video has several windows; (C, L) float32."""
    whole = run.config.data.window is None
    video = file_name(sample.window.video)
    name = video if whole else f"{video}@{sample.window.start:.2f}s"
    return run.folder / "features" / f"{name}.npy"


def extract(run: Run) -> None:
    """Write the features of all training and validation windows; those already there from the same encoder stay."""
    folder = run.folder / "features"
    stamp, digest = folder / "encoder.txt", encoder_digest(run)
    stale = not stamp.exists() or stamp.read_text() != digest
    samples = [sample for subset in SUBSETS for sample in run.dataset.samples[subset]]
    missing = [sample for sample in samples if stale or not feature_path(run, sample).exists()]
    if not missing:
        return
    run.encoder.eval()
    chunk = _chunk(run, missing)  # before the folder is touched: a refusal leaves nothing behind
    files.sweep(folder)
    if stale:
        for path in folder.glob("*.npy"):
            path.unlink()
        files.write_bytes(stamp, digest.encode())
    with run.log.progress("features", len(missing)) as advance:
        stream = run.pipeline.stream(centre_requests(missing, run.sampler, run.config.full))
        for done, (sample, frames) in enumerate(zip(missing, stream, strict=True), 1):
            features = encode(run, frames, chunk)
            if not np.isfinite(features).all():
                raise InputError(
                    f"the encoder's features of {sample.window.video} are not finite, its training has diverged: "
                    "start again with a lower --pretrain-lr or --joint-lr, and another --out"
                )
            with files.replacing(feature_path(run, sample)) as file:
                np.save(file, features)
            advance(done, sample.window.video)
    run.log.event(events.Features(windows=len(missing), chunk=chunk, encoder=digest))


@torch.no_grad()
def encode(run: Run, frames: torch.Tensor, chunk: int) -> NDArray[np.float32]:
    """Features (C, L) of uint8 frames (L * 8, side, side, 3), `chunk` snippets at a time."""
    with run.machine.autocast():
        encoded = run.encoder.encode(frames, FRAMES_PER_SNIPPET, chunk=chunk)
    features: NDArray[np.float32] = encoded.float().T.contiguous().cpu().numpy()
    return features


def _chunk(run: Run, samples: Sequence[Sample]) -> int:
    """The largest chunk of snippets that fits the budget."""
    sizes = [LARGEST_CHUNK]
    while sizes[-1] > 1:
        sizes.append(sizes[-1] // 2)
    whole = run.config.full.num_snippets
    sizes = [size for size in sizes if size <= whole] or [whole]
    first = samples[:1]

    def step(size: int) -> None:
        for frames in run.pipeline.stream(centre_requests([*first, *first], run.sampler, run.config.full)):
            encode(run, frames[: size * FRAMES_PER_SNIPPET], size)
            return

    refusal = "raise --mem-budget, or give a smaller --fidelity"
    return run.trials.highest_fitting("features, snippets at once", sizes, float, step, refusal).candidate


def load_features(run: Run, samples: Sequence[Sample]) -> torch.Tensor:
    """Features (B, C, L) of windows, on the device."""
    features = [torch.from_numpy(np.load(feature_path(run, sample))) for sample in samples]
    return torch.stack(features).to(run.machine.device)

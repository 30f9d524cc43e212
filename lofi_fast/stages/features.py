"""Full-fidelity features of every window, by the frozen encoder, once: what the head stage and other heads train on.

Beside each file of features lies a `.key`: the frame cache's name for the pictures that they were made of, which
changes with the video's file, and a checksum of the features. A file whose key does not hold is made anew; while the
head trains, each file is held against its key whenever it is read.
"""

from __future__ import annotations

import hashlib
import io
import zlib
from collections.abc import Sequence
from functools import partial
from itertools import chain
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from lofi_fast import files
from lofi_fast.budget import gigabytes
from lofi_fast.data.cache import file_name
from lofi_fast.data.dataset import SUBSETS, Sample, centre_requests
from lofi_fast.errors import InputError
from lofi_fast.fidelity import FRAMES_PER_SNIPPET, Fidelity
from lofi_fast.gpu import send
from lofi_fast.memory.step_bytes import Setting, features_bytes
from lofi_fast.run import events
from lofi_fast.run.state import Run

LARGEST_CHUNK = 64  # snippets encoded at once, at most
PLAN = "features, snippets at once"  # in the log
REFUSAL = "raise --mem-budget, or give a smaller --fidelity"


def encoder_digest(run: Run) -> str:
    """A digest of the encoder's weights and BN statistics: says which encoder features came from."""
    digest = hashlib.blake2b(digest_size=16)
    for name, value in run.encoder.state_dict().items():
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def feature_path(run: Run, sample: Sample) -> Path:
    """features/<video>.npy, or <video>@<start>s.npy where a video has several windows; (C, L) float32."""
    whole = run.config.data.window_seconds is None
    video = file_name(sample.window.video)
    name = video if whole else f"{video}@{sample.window.start:.2f}s"
    return run.folder / "features" / f"{name}.npy"


def key_path(features: Path) -> Path:
    return features.with_suffix(".key")


def key_of(sample: Sample, features: bytes) -> bytes:
    """The content of the .key beside a file of features."""
    return f"{sample.cached.path.stem} {zlib.crc32(features):08x}\n".encode()


def holds(run: Run, sample: Sample) -> bool:
    """Whether the features of a window are there, as they were written, and of the pictures that the cache has now."""
    path = feature_path(run, sample)
    try:
        return key_path(path).read_bytes() == key_of(sample, path.read_bytes())
    except OSError:
        return False


def extract(run: Run) -> None:
    """Write the features of all training and validation windows; those already there from the same encoder and the
    same pictures stay.

    Several processes share the windows; each writes the features of its own. It ends early, after a window, when the
    run is told to stop.
    """
    processes = run.processes
    folder = run.folder / "features"
    stamp, digest = folder / "encoder.txt", encoder_digest(run)
    stale = processes.of_first("features' encoder", lambda: not stamp.exists() or stamp.read_bytes() != digest.encode())
    samples = [sample for subset in SUBSETS for sample in run.dataset.samples[subset]]
    looked_at = processes.share(samples)
    found = processes.together("features", lambda: [stale or not holds(run, one) for one in looked_at], patient=True)
    missing = [sample for sample, lacks in zip(samples, chain.from_iterable(found), strict=True) if lacks]
    if not missing:
        return
    if not stale and (unusable := sum(feature_path(run, sample).exists() for sample in missing)):
        run.log.say(f"features of {unusable} windows are damaged, or their videos have changed: making them anew")
    run.encoder.eval()
    chunk = min(processes.together(PLAN, lambda: _chunk(run, missing), patient=True))  # a refusal leaves nothing behind

    def clear() -> None:
        files.sweep(folder)
        if stale:
            for path in (*folder.glob("*.npy"), *folder.glob("*.key")):
                path.unlink()
            files.write_bytes(stamp, digest.encode())

    processes.of_first("the folder of features", clear)
    stopped = processes.together("features made", lambda: _write(run, processes.share(missing), chunk), patient=True)
    if any(stopped):
        run.stopped = True
        return
    run.log.event(events.Features(windows=len(missing), chunk=chunk, encoder=digest))


def _write(run: Run, missing: Sequence[Sample], chunk: int) -> bool:
    """Write the features of windows; whether it ended early, since the run was told to stop."""
    with run.log.progress("features", len(missing)) as advance:
        stream = run.pipeline.stream(centre_requests(missing, run.sampler, run.config.full))
        for done, (sample, frames) in enumerate(zip(missing, stream, strict=True), 1):
            features, chunk = encode_within_budget(run, frames, chunk, verify=done == 1)
            if not np.isfinite(features).all():
                raise InputError(
                    f"the encoder's features of {sample.window.video} are not finite, its training has diverged: "
                    "start again with a lower --pretrain-lr or --joint-lr, and another --out"
                )
            run.require_folder()
            content = npy_bytes(features)
            path = files.write_bytes(feature_path(run, sample), content)
            files.write_bytes(key_path(path), key_of(sample, content))
            advance(done, sample.window.video)
            if run.stop():
                return True
    return False


def npy_bytes(array: NDArray[np.float32]) -> bytes:
    """The content of a .npy file."""
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


@torch.no_grad()
def encode(run: Run, frames: torch.Tensor, chunk: int) -> NDArray[np.float32]:
    """Features (C, L) of uint8 frames (L * 8, side, side, 3), `chunk` snippets at a time."""
    with run.machine.autocast():
        encoded = run.encoder.encode(frames, FRAMES_PER_SNIPPET, chunk=chunk)
    features: NDArray[np.float32] = encoded.float().T.contiguous().cpu().numpy()
    return features


def encode_within_budget(run: Run, frames: torch.Tensor, chunk: int, verify: bool) -> tuple[NDArray[np.float32], int]:
    """`encode`, with the chunk that it was done with: a smaller one where memory ran out. With `verify` the peak is
    measured and logged. Raises InputError when one snippet at a time is too much.
    """
    meter, limit = run.machine.meter, run.machine.budget
    features: list[NDArray[np.float32]] = []
    while True:
        peak, failed = None, False
        if verify:
            peak = run.trials.measure(lambda: features.append(encode(run, frames, chunk)), limit)  # noqa: B023
            failed = peak is None
            run.log.event(events.Measured(plan=PLAN, candidate=str(chunk), peak=peak, budget=limit))
        else:
            try:
                with meter.cap(limit):
                    features.append(encode(run, frames, chunk))
            except Exception as error:
                if not meter.ran_out(error):
                    raise
                failed = True  # the traceback holds tensors: leave the except block before going on
        if not failed:
            return features[0], chunk
        if chunk == 1:
            raise InputError(f"one snippet at once needs more than the budget of {gigabytes(limit)}; {REFUSAL}")
        chunk //= 2
        meter.release()
        run.log.say(f"memory ran out: {chunk} snippets at once from now on")


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

    setting = run.setting()
    ledger = None if setting is None else partial(_ledger, setting, run.config.full)
    return run.trials.highest_fitting(PLAN, sizes, float, step, REFUSAL, late=True, ledger=ledger).candidate


def _ledger(setting: Setting, full: Fidelity, chunk: int) -> int:
    decoded = 2 * full.num_snippets  # those of the next window are decoded meanwhile
    return features_bytes(setting.encoder, full.num_snippets, decoded, chunk, full.side, setting.itemsize)


def load_features(run: Run, samples: Sequence[Sample]) -> torch.Tensor:
    """Features (B, C, L) of windows, on the device. Raises InputError when a file of them has changed meanwhile."""
    features = [torch.from_numpy(_load(sample, feature_path(run, sample))) for sample in samples]
    return send(torch.stack(features), run.machine.device)


def _load(sample: Sample, path: Path) -> NDArray[np.float32]:
    try:
        content, key = path.read_bytes(), key_path(path).read_bytes()
    except OSError as error:
        raise InputError(
            f"{path}: these features cannot be read any more ({error.strerror}); --resume makes them anew"
        ) from None
    if key != key_of(sample, content):
        raise InputError(f"{path}: these features are not what was written; --resume makes them anew")
    features: NDArray[np.float32] = np.load(io.BytesIO(content))
    return features

"""Every file that a user may hand over or that a disk may damage, with the function that reads it in earnest."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from bench.tools.mutations import (
    Mutation,
    damaged_bytes,
    damaged_json,
    damaged_lines,
    damaged_npy,
    damaged_npz,
    damaged_safetensors,
    damaged_text,
)
from lofi_fast.config import Config, EncoderConfig, HeadConfig
from lofi_fast.data.annotations import load_annotations
from lofi_fast.data.cache import CacheRequest, prepare
from lofi_fast.data.ground_truth import load_ground_truth
from lofi_fast.data.video import probe
from lofi_fast.data.video_scores import load_video_scores
from lofi_fast.encoder import build as build_encoder
from lofi_fast.encoder.weights import load_encoder_weights
from lofi_fast.fidelity import Fidelity, Pattern, ladder
from lofi_fast.head import build as build_head
from lofi_fast.memory.governor import Governor
from lofi_fast.memory.meter import Memory
from lofi_fast.memory.plans import candidates
from lofi_fast.memory.readings import VERSION
from lofi_fast.memory.replay import Replay
from lofi_fast.metrics import load_predictions
from lofi_fast.model import Detector
from lofi_fast.presets import configured, small
from lofi_fast.report.page import write_report
from lofi_fast.report.read import read_run
from lofi_fast.run import checkpoint, trained_on
from lofi_fast.run.folder import require_run

CLASSES = ("jump", "run")
RATE = 8  # pictures a second of the video behind the cache entry


@dataclass(frozen=True)
class Loader:
    """`read` is given a damaged `file` in a folder of its own, and may raise InputError alone.

    `share`: how many of all inputs it gets, in parts. `beside`: other files that have to be there.
    """

    name: str
    file: str
    content: bytes
    read: Callable[[Path], object]
    mutations: Sequence[Mutation]
    share: int
    beside: tuple[tuple[str, bytes], ...] = ()


SEGMENTS = [{"segment": [0.5, 2], "label": "jump", "score": 0.25}, {"segment": [3, 4.5], "label": "run", "score": 1}]
DATABASE = {
    "v": {"subset": "validation", "duration": 12.5, "annotations": SEGMENTS},
    "w": {"subset": "training", "duration": 9.0, "resolution": "320x240", "annotations": SEGMENTS[:1]},
    "cam1/x": {"subset": "training", "annotations": []},
}
THUMOS = {
    "video_validation_0000051": {
        "subset": "Validation", "duration_second": "169.79", "duration_frame": "4073",
        "annotations": [{"segment": ["67.5", "75.9"], "label": "Billiards"}],
    },
    "video_test_0000004": {"subset": "Test", "annotations": [{"segment": [0.2, 1.1], "label": "CricketBowling"}]},
}  # fmt: skip
TABLE = "video,start,end,label,subset,duration\nv,0.5,2,jump,validation,12.5\nw,1,2,run,training,\nx,,,,training,3\n"
EUROPEAN = "sep=;\nvideo;start;end;label\nv;00:00:01,5;00:01:02;jump\nw;0,25;1,75;run\n"
TOML = 'preset = "small"\nmem_budget = "2GB"\nfidelity = "8x32"\nthreads = 1\n[joint]\nlr = 0.05\nepochs = 3\n'
STEP = {
    "event": "step", "stage": "joint", "epoch": 0, "step": 0, "num_snippets": 8, "side": 32, "micro_batch": 1,
    "recompute": False, "chunk": 4, "reduced_from": [8, 64],
}  # fmt: skip


def _dumped(content: object) -> bytes:
    return json.dumps(content).encode()


def _npy(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def _tiny() -> Config:
    config = small()
    return replace(
        config,
        full=Fidelity(8, 32),
        encoder=EncoderConfig(width=8),
        head=HeadConfig(hidden=16, groups=2, inner_bins=4, context_bins=2, map_channels=8, class_bins=2),
    )


def loaders(folder: Path, run: Path | None = None) -> list[Loader]:
    """All of them. `folder`: for what has to be made first. `run`: of a finished run, whose files the report reads;
    without one it is left out.
    """
    text, values = (damaged_bytes, damaged_text), (damaged_bytes, damaged_text, damaged_json, damaged_json)
    found = [
        Loader("annotations, ActivityNet", "a.json", _dumped({"database": DATABASE}), load_annotations, values, 24),
        Loader("annotations, THUMOS", "a.json", _dumped({"database": THUMOS}), load_annotations, values, 16),
        Loader("annotations, CSV", "a.csv", TABLE.encode(), load_annotations, text, 20),
        Loader("annotations, CSV with semicolons", "a.csv", EUROPEAN.encode(), load_annotations, text, 12),
        Loader("ground truth, JSON", "g.json", _dumped({"database": DATABASE}), load_ground_truth, values, 14),
        Loader("ground truth, CSV", "g.csv", TABLE.encode(), load_ground_truth, text, 8),
        Loader(
            "predictions", "p.json", _dumped({"version": "1", "results": {"v": SEGMENTS}}), load_predictions, values, 16
        ),
        Loader("video scores, by class", "s.json", _dumped({"v": {"jump": 1, "run": 0.5}}), _scores, values, 6),
        Loader("video scores, a list", "s.json", _dumped({"results": {"v": SEGMENTS}}), _scores, values, 6),
        Loader(
            "video scores, a table", "s.json", _dumped({"results": {"v": [1, 2]}, "class": CLASSES}), _scores, values, 6
        ),
        Loader(
            "video scores, .npy", "s.npy", _npy(np.ones((2, 101), dtype=np.float32)), _thumos_scores,
            (damaged_bytes, damaged_npy), 6,
        ),
        Loader("config.json", "config.json", _tiny().to_json().encode(), _config, values, 14),
        Loader("--config, TOML", "s.toml", TOML.encode(), _settings, text, 10),
        Loader(
            "--config, JSON", "s.json", _dumped({"preset": "small", "joint": {"lr": 0.05}, "threads": 1}), _settings,
            values, 8,
        ),
        Loader(
            "replay", "log.jsonl", _dumped(STEP) + b"\n" + _dumped(STEP | {"step": 1}) + b"\n",
            lambda path: Replay(path, 1), (damaged_bytes, damaged_text, damaged_lines), 10,
        ),
        _readings(),
        _index(folder),
        *_weights(folder),
    ]  # fmt: skip
    return found if run is None else [*found, *_of_a_run(run)]


def _scores(path: Path) -> object:
    return load_video_scores(path, ["v"], CLASSES)


def _thumos_scores(path: Path) -> object:
    return load_video_scores(path, ["video_test_0000001"], ["Diving"])


def _config(path: Path) -> object:
    require_run(path.parent)
    return Config.read(path)


def _settings(path: Path) -> object:
    return configured({"annotations": "a.json", "videos": "v"}, file=path, cuda=lambda: False)


class _Still:
    """A meter of a device where nothing ever happens."""

    def total(self) -> int:
        return 24 * 10**9

    def held(self) -> int:
        return 10**9

    def reading(self) -> Memory:
        return Memory(10**9, 10**9, 20 * 10**9)


def _readings() -> Loader:
    """A cache file: what is not readable is said, and not used."""
    key = {"device": "card", "threads": 2}
    plans = {Pattern.SPATIAL: candidates(ladder(Pattern.SPATIAL, Fidelity(8, 64)), 2)}
    known = [[*plan.to_json(), 10**8] for plan in plans[Pattern.SPATIAL][:3]]

    def read(path: Path) -> object:
        governor = Governor(_Still(), 8 * 10**9, lambda plan: plan.omega * 1000, plans, lambda said: None)
        governor.load_readings(path, key)
        return governor.choose(Pattern.SPATIAL)

    content = _dumped({"version": VERSION, "key": key, "readings": known})
    return Loader("readings of memory", "r.json", content, read, (damaged_bytes, damaged_text, damaged_json), 6)


def _index(folder: Path) -> Loader:
    """An entry is there as it was written, or made anew; what its pictures are is compared."""
    import av

    source = folder / "v.mp4"
    with av.open(str(source), "w") as container:
        stream = container.add_stream("libx264", rate=RATE)
        stream.width, stream.height, stream.pix_fmt = 32, 32, "yuv420p"
        for i in range(4):
            picture = np.random.default_rng(i).integers(0, 256, (32, 32, 3)).astype(np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode(None))
    request = CacheRequest("v", probe(source), np.arange(3))
    entry = prepare([request], folder / "cache", 16, workers=1)[0]["v"]
    pictures = [picture.tobytes() for picture in entry.read(np.arange(3))]
    index = entry.path.with_suffix(".npz")

    def read(path: Path) -> object:
        index.write_bytes(path.read_bytes())
        found = prepare([request], folder / "cache", 16, workers=1)[0]["v"]
        if [picture.tobytes() for picture in found.read(np.arange(3))] != pictures:
            raise AssertionError("other pictures")
        return found

    return Loader("cache index", "i.npz", index.read_bytes(), read, (damaged_bytes, damaged_npz), 4)


def _weights(folder: Path) -> list[Loader]:
    """A checkpoint, weights to start from, and a model file, of tiny networks."""
    config = _tiny()
    encoder = build_encoder(config)
    head = build_head(config, encoder.num_features, len(CLASSES))
    path = folder / "w.pt"
    content = {"position": {"stage": "joint", "epoch": 0, "step": 1}, "encoder": encoder.state_dict()}
    checkpoint.save_atomic(content, path)
    sealed = path.read_bytes()
    torch.save(encoder.state_dict(), path)
    plain = path.read_bytes()
    Detector(encoder, head, CLASSES, config).save(folder / "m.safetensors")

    def changed(path: Path) -> object:
        read = checkpoint.load(path)
        if path.read_bytes() != sealed:
            raise AssertionError("damage was not noticed")
        return read

    return [
        Loader("checkpoint", "last.pt", sealed, changed, (damaged_bytes,), 4),
        Loader("--encoder-weights", "w.pt", plain, lambda p: load_encoder_weights(encoder, p), (damaged_bytes,), 2),
        Loader(
            "model.safetensors", "m.safetensors", (folder / "m.safetensors").read_bytes(), Detector.load,
            (damaged_bytes, damaged_safetensors, damaged_safetensors), 1,
        ),
    ]  # fmt: skip


def _of_a_run(run: Path) -> list[Loader]:
    """The files of a run folder, each damaged beside the others as they were written."""
    names = ("config.json", "environment.json", "log.jsonl", "plan.json", "metrics.json", "predictions.json",
             "ground_truth.json")  # fmt: skip
    whole = {name: (run / name).read_bytes() for name in names}

    def of_log(path: Path) -> object:
        return read_run(path.parent)

    def report(path: Path) -> object:
        return write_report(path.parent)

    values = (damaged_bytes, damaged_text, damaged_json, damaged_json)
    lines = (damaged_bytes, damaged_text, damaged_lines, damaged_lines)
    record = (run / trained_on.RECORD).read_bytes()

    def data(path: Path) -> object:
        found = trained_on.read_record(path, trained_on.digest(record))
        if found not in (None, record):
            raise AssertionError("damage was not noticed")
        return found

    return [
        Loader("log.jsonl", "log.jsonl", whole["log.jsonl"], of_log, lines, 4),
        *(
            Loader(name, name, whole[name], of_log, values, 2)
            for name in ("plan.json", "metrics.json", "predictions.json", "ground_truth.json", "environment.json")
        ),
        *(
            Loader(
                f"report, {name}",
                name,
                content,
                report,
                lines if name == "log.jsonl" else values,
                0,
                tuple((other, text) for other, text in whole.items() if other != name),
            )
            for name, content in whole.items()
        ),
        Loader(trained_on.RECORD, trained_on.RECORD, record, data, values, 2),
    ]

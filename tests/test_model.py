"""The detector as an object: saved and loaded to the bit, refused in one sentence, and finding what the run found."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from copy import copy
from dataclasses import replace
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors
import safetensors.torch
import torch
from detectors import ROOT, SmallRun, joined, with_early_sound
from patience import PATIENCE

import lofi_fast
from lofi_fast.config import Config
from lofi_fast.data.cache import CacheRequest, prepare
from lofi_fast.data.dataset import Dataset, Sample, Sampler
from lofi_fast.data.pipeline import FramePipeline
from lofi_fast.data.survey import cache_side
from lofi_fast.data.video import VideoError, probe
from lofi_fast.data.windows import cut_windows, full_grid
from lofi_fast.detections import Detection
from lofi_fast.errors import InputError
from lofi_fast.head.decoding import detections
from lofi_fast.model import Detector
from lofi_fast.model_file import MODEL
from lofi_fast.presets import PRESETS

TRAPS = ROOT.parent / "shared" / "data" / "videos"
BUDGET = "4GB"
ENVIRONMENT = dict(os.environ)  # of processes of their own: as it was before any test
pytestmark = pytest.mark.usefixtures("torchs_own_allocator")


@pytest.fixture(scope="module")
def detector(small: SmallRun) -> Detector:
    return Detector.load(small.folder)


def rows(found: list[Detection]) -> list[tuple[float, float, str, float]]:
    return [(d.start, d.end, d.label, d.score) for d in found]


def predictions(run: SmallRun) -> dict[str, list[tuple[float, float, str, float]]]:
    content = json.loads((run.folder / "predictions.json").read_text())["results"]
    return {name: [(*d["segment"], d["label"], d["score"]) for d in items] for name, items in content.items()}


def test_a_finished_run_holds_a_detector_that_finds_what_the_run_found(small: SmallRun) -> None:
    detector = lofi_fast.load(small.folder)
    assert isinstance(detector, lofi_fast.Detector)
    found = detector.detect(small.validation, mem_budget=BUDGET)
    expected = predictions(small)
    assert {path.stem: rows(items) for path, items in found.items()} == expected
    assert all(len(items) > 10 for items in expected.values())
    assert rows(detector.detect(str(small.validation[0]), mem_budget=BUDGET)) == expected[small.validation[0].stem]


def test_saving_and_loading_keeps_every_bit(detector: Detector, small: SmallRun, tmp_path: Path) -> None:
    path = detector.save(tmp_path / "a" / "copy.safetensors")
    assert path.read_bytes() == (small.folder / MODEL).read_bytes() == detector.save(tmp_path / "b").read_bytes()
    again = Detector.load(str(path))
    assert (again.classes, again.config) == (detector.classes, detector.config)
    assert again.config.data.window == 8 and again.config.encoder.width == 8
    for ours, theirs in ((again.encoder, detector.encoder), (again.head, detector.head)):
        assert ours.state_dict().keys() == theirs.state_dict().keys()
        for name, value in theirs.state_dict().items():
            assert torch.equal(ours.state_dict()[name], value)
        assert not ours.training
    assert list(tmp_path.rglob("*.partial")) == []


def test_the_file_is_readable_by_others(small: SmallRun) -> None:
    with safetensors.safe_open(small.folder / MODEL, framework="np") as content:
        metadata, names = content.metadata(), set(content.keys())
    assert {"format", "lofi_fast", "torch", "settings", "classes"} <= metadata.keys()
    assert json.loads(metadata["settings"])["data"]["window"] == 8
    assert len(json.loads(metadata["classes"])) == 6
    assert "encoder.layer1.0.bn1.running_var" in names and any(name.startswith("head.") for name in names)


def test_loading_draws_nothing_from_the_random_generator(small: SmallRun) -> None:
    before = torch.get_rng_state()
    Detector.load(small.folder)
    assert torch.equal(torch.get_rng_state(), before)


def rewritten(source: Path, target: Path, *, metadata: dict[str, str] | None = None, **tensors: object) -> Path:
    """A copy of a model file with other metadata, and with tensors changed, or left out where None."""
    with safetensors.safe_open(source, framework="pt") as content:
        words = content.metadata() if metadata is None else metadata
    values = {**safetensors.torch.load_file(source), **tensors}
    safetensors.torch.save_file({n: v for n, v in values.items() if v is not None}, target, words)  # type: ignore[misc]
    return target


def spoilt(kind: str, small: SmallRun, folder: Path) -> Path:
    """Something that is no detector, of some kind."""
    model, target = small.folder / MODEL, folder / "spoilt"
    with safetensors.safe_open(model, framework="pt") as content:
        metadata = dict(content.metadata())
    weight = safetensors.torch.load_file(model)["encoder.conv1.weight"]
    if kind == "absent":
        return folder / "nowhere"
    if kind == "text":
        target.write_text("not a model")
    elif kind == "empty":
        target.touch()
    elif kind == "cut off":
        target.write_bytes(model.read_bytes()[:-1000])
    elif kind == "checkpoint":
        shutil.copy(small.folder / "checkpoints" / "last.pt", target)
    elif kind == "foreign":
        rewritten(model, target, metadata={"format": "pt"})
    elif kind == "newer":
        rewritten(model, target, metadata=metadata | {"format": "2", "lofi_fast": "9.1"})
    elif kind == "shapes":
        rewritten(model, target, **{"encoder.conv1.weight": weight[:4].clone()})
    elif kind == "lacking":
        rewritten(model, target, **{"head.last.bias": None})
    elif kind == "more":
        rewritten(model, target, **{"head.extra": weight})
    elif kind == "not finite":
        rewritten(model, target, **{"encoder.conv1.weight": torch.full_like(weight, torch.nan)})
    elif kind == "classes":
        rewritten(model, target, metadata=metadata | {"classes": '["a", 3'})
    elif kind == "unknown setting":
        settings = json.loads(metadata["settings"]) | {"colour": "red"}
        rewritten(model, target, metadata=metadata | {"settings": json.dumps(settings)})
    else:
        target.mkdir()
        config = json.loads((small.folder / "config.json").read_text())
        if kind == "before":
            del config["lofi_fast"]
        if kind == "no head":
            config["stages"] = ["pretrain"]
        if kind != "no run":
            (target / "config.json").write_text(json.dumps(config))
    return target


@pytest.mark.parametrize(
    ("kind", "says"),
    [
        ("absent", "no such file"),
        ("text", "not a whole safetensors file"),
        ("empty", "not a whole safetensors file"),
        ("cut off", "not a whole safetensors file"),
        ("checkpoint", "not a whole safetensors file"),
        ("foreign", "no detector of lofi_fast"),
        ("newer", "written by lofi_fast 9.1, newer than this"),
        ("shapes", r"encoder.conv1.weight has shape \(4, 3, 7, 7\) where .* \(8, 3, 7, 7\)"),
        ("lacking", "lacks head.last.bias"),
        ("more", "holds head.extra"),
        ("not finite", "encoder.conv1.weight holds a NaN or an infinity"),
        ("classes", "its list of classes is damaged"),
        ("unknown setting", '"colour" is no setting'),
        ("unfinished", "has not finished.*--resume"),
        ("no head", "--stages pretrain trained no head"),
        ("no run", "no run folder"),
        ("before", "written by a version of lofi_fast before"),
    ],
)
def test_what_is_no_detector_is_refused_in_one_sentence(kind: str, says: str, small: SmallRun, tmp_path: Path) -> None:
    path = spoilt(kind, small, tmp_path)
    with pytest.raises(InputError, match=says) as refused:
        Detector.load(path)
    assert str(refused.value).startswith(str(path)) and "\n" not in str(refused.value)


def test_weights_that_are_not_finite_are_not_saved(small: SmallRun, tmp_path: Path) -> None:
    detector = Detector.load(small.folder)
    next(detector.head.parameters()).data.view(-1)[0] = torch.inf
    with pytest.raises(InputError, match="not finite"):
        detector.save(tmp_path / "model")
    assert list(tmp_path.iterdir()) == []


def all_at_once(detector: Detector, video: Path, cache: Path) -> list[Detection]:
    """The detections of one video by the way of training and evaluation, with all of its frames in the cache."""
    config = detector.config
    info, full = probe(video), config.full
    windows = cut_windows(video.stem, info.duration, config.data.window, config.data.overlap)
    grid = partial(full_grid, num_snippets=full.num_snippets, frame_stride=config.data.frame_stride)
    grids = [grid(info, window) for window in windows]
    wanted = CacheRequest(video.stem, info, np.unique(np.concatenate([g.ravel() for g in grids])))
    entry = prepare([wanted], cache, cache_side(full))[0][video.stem]
    nothing = np.empty((0, 2)), np.empty(0, dtype=np.int64)
    samples = [
        Sample(index, window, *nothing, entry, entry.positions(g.ravel()).reshape(g.shape))
        for index, (window, g) in enumerate(zip(windows, grids, strict=True))
    ]
    sampler = Sampler(Dataset(detector.classes, {}, {}, (), ()), config.data, full, seed=0)
    pipeline = FramePipeline(max_frames=1000)
    requests = [[sampler.request(sample, full, sampler.centre_view(sample)) for sample in samples]]
    (frames,) = pipeline.stream(requests)
    pipeline.close()
    proposals = []
    with torch.no_grad():
        features = detector.encoder.encode(frames, 8, chunk=full.num_snippets)
        features_WCL = features.unflatten(0, (len(samples), -1)).transpose(1, 2).contiguous()
        order = [*range(len(samples)), *[len(samples) - 1] * (-len(samples) % 3)]  # batches of three
        for start in range(0, len(order), 3):
            batch = order[start : start + 3]
            edges = [sampler.edges(samples[index], full) for index in batch]
            proposals += detector.head.proposals(detector.head(features_WCL[batch]), edges)
    return detections(
        proposals[: len(samples)], detector.classes, duration=info.duration, sigma=config.detect.sigma,
        top_k=config.detect.top_k, labels_per_proposal=config.detect.labels_per_proposal,
    )  # fmt: skip


@pytest.mark.parametrize("window", [8.0, 5.0, 100.0, None])
def test_window_by_window_equals_all_at_once(
    window: float | None, detector: Detector, small: SmallRun, tmp_path: Path
) -> None:
    video = joined(small.validation[:1], tmp_path / "v.mp4", times=3)
    data = replace(detector.config.data, window=window)
    other = Detector(detector.encoder, detector.head, detector.classes, replace(detector.config, data=data))
    found = other.detect(video, mem_budget=BUDGET)
    assert rows(found) == rows(all_at_once(other, video, tmp_path / "cache"))
    assert len(found) > 10
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cache", "v.mp4"]


@pytest.mark.parametrize(("window", "snippets"), [(8.0, 78), (5.0, 29 * 4 + 8 + 8), (100.0, 8), (None, 8)])
def test_a_snippet_of_several_windows_is_encoded_once(
    window: float | None, snippets: int, detector: Detector, small: SmallRun, tmp_path: Path
) -> None:
    video = joined(small.validation[:1], tmp_path / "v.mp4", times=3)
    data = replace(detector.config.data, window=window)
    encoder, encoded = copy(detector.encoder), []

    def counted(frames: torch.Tensor, num_frames: int, **levers: object) -> torch.Tensor:
        encoded.append(len(frames) // num_frames)
        return detector.encoder.encode(frames, num_frames, **levers)  # type: ignore[arg-type]

    encoder.encode = counted  # type: ignore[method-assign]
    other = Detector(encoder, detector.head, detector.classes, replace(detector.config, data=data))
    with other.session(mem_budget=BUDGET) as session:
        session.detect(video)
        assert sum(encoded) >= snippets - 1  # of the planning too
        encoded.clear()
        session.detect(video)
    # of 78 seconds; that of the last window, which ends with the video, may by chance be one of another window
    assert snippets - 1 <= sum(encoded) <= snippets


def test_it_is_said_where_windows_can_share_no_snippets(detector: Detector) -> None:
    said: list[str] = []
    data = replace(detector.config.data, overlap=0.3)
    other = Detector(detector.encoder, detector.head, detector.classes, replace(detector.config, data=data))
    other.session(mem_budget=BUDGET, say=said.append).close()
    assert any("begin every 5.6 snippets, which is no whole number" in text for text in said)
    said.clear()
    detector.session(mem_budget=BUDGET, say=said.append).close()
    assert not any("whole number" in text for text in said)


def test_scores_and_counts_are_cut_as_asked(detector: Detector, small: SmallRun) -> None:
    video = small.validation[0]
    whole = rows(detector.detect(video, mem_budget=BUDGET, top_k=10_000))
    least = whole[len(whole) // 2][3]
    assert rows(detector.detect(video, mem_budget=BUDGET, top_k=7)) == whole[:7]
    cut = detector.detect(video, mem_budget=BUDGET, top_k=10_000, min_score=least)
    assert rows(cut) == [row for row in whole if row[3] >= least]


@pytest.mark.parametrize(
    "wrong",
    [
        {"min_score": -1.0}, {"min_score": float("nan")}, {"min_score": 2.0}, {"top_k": 0}, {"top_k": -3},
        {"top_k": 2.5}, {"device": "gpu"}, {"mem_budget": 4},
    ],
    ids=str,
)  # fmt: skip
def test_a_value_that_cannot_be_is_one_sentence(wrong: dict[str, Any], detector: Detector, small: SmallRun) -> None:
    ((name, value),) = wrong.items()
    with pytest.raises(InputError, match=f"{name} {value!r}: "):
        detector.detect(small.validation[0], **{"mem_budget": "4GB", "device": "cpu"} | wrong)


def test_times_are_of_a_players_clock(detector: Detector, small: SmallRun, tmp_path: Path) -> None:
    source = small.validation[0]
    late = with_early_sound(source, tmp_path / "late.mov", Fraction(1, 2))
    plain, shifted = (detector.detect(video, mem_budget=BUDGET) for video in (source, late))
    assert [(d.label, d.score) for d in shifted] == [(d.label, d.score) for d in plain]
    for ours, theirs in zip(shifted, plain, strict=True):
        assert (ours.start, ours.end) == pytest.approx((theirs.start + 0.5, theirs.end + 0.5), abs=2e-3)
    features = [detector.features(video, mem_budget=BUDGET) for video in (source, late)]
    np.testing.assert_allclose(features[1].times, features[0].times + 0.5, atol=2e-3)


@pytest.mark.parametrize("window", [8.0, 5.0, 100.0, None])
def test_features_cover_a_video_once(window: float | None, detector: Detector, small: SmallRun) -> None:
    video = small.validation[0]
    duration = probe(video).duration
    data = replace(detector.config.data, window=window)
    other = Detector(detector.encoder, detector.head, detector.classes, replace(detector.config, data=data))
    features = other.features(video, mem_budget=BUDGET)
    assert features.values.shape == (len(features.times), 64) and features.values.dtype == np.float32
    step = (window or duration) / 8
    gaps = np.diff(features.times)
    assert (gaps > 0).all() and (gaps <= step + 1e-6).all()
    assert features.times[0] == pytest.approx(step / 2)
    assert duration - step <= features.times[-1] < duration


def test_features_are_those_that_the_head_was_trained_on(detector: Detector, small: SmallRun) -> None:
    video = small.validation[0]
    features = detector.features(video, mem_budget=BUDGET)
    stored = np.load(small.folder / "features" / f"{video.stem}@0.00s.npy")
    assert np.array_equal(features.values[:8], stored.T)


def test_one_bad_video_among_several_is_left_out_with_a_warning(
    detector: Detector, small: SmallRun, tmp_path: Path
) -> None:
    bad = tmp_path / "bad.mp4"
    bad.write_text("no video")
    with pytest.warns(UserWarning, match=r"left out: video .*bad\.mp4"):
        found = detector.detect([bad, small.validation[0]], mem_budget=BUDGET)
    assert list(found) == [small.validation[0]]
    for asked in (bad, [bad, tmp_path / "nowhere.mp4"]):
        with pytest.raises(VideoError, match=r"bad\.mp4"):
            detector.detect(asked, mem_budget=BUDGET)


@pytest.mark.skipif(not TRAPS.is_dir(), reason="the folder with real videos is absent")
def test_real_traps(detector: Detector) -> None:
    with pytest.warns(UserWarning, match="left out"):
        found = detector.detect(sorted(TRAPS.iterdir()), mem_budget=BUDGET)
    assert {path.name for path in TRAPS.iterdir()} - {path.name for path in found} == {
        "corrupted.mp4",
        "rotated_90.mov",  # 3 frames
    }
    for path, items in found.items():
        duration = probe(path).duration
        assert items and all(0 <= d.start < d.end <= duration + 1e-9 for d in items)


def test_networks_of_ones_own(tmp_path: Path) -> None:
    from lofi_fast import encoder as encoders
    from lofi_fast import head as heads
    from lofi_fast.encoder.protocol import Encoder
    from lofi_fast.encoder.tsm import TSMEncoder

    class Doubled(TSMEncoder):
        def encode(self, *args: object, **levers: object) -> torch.Tensor:
            return 2 * super().encode(*args, **levers)  # type: ignore[arg-type]

    def own(config: Config) -> Encoder:
        return Doubled(config.encoder.name, 8)

    config = replace(PRESETS["demo"](), head=replace(PRESETS["demo"]().head, hidden=32, groups=4, map_channels=16))
    path = Detector(own(config), heads.build(config, 64, 2), ["a", "b"], config).save(tmp_path / "own")
    assert type(Detector.load(path, encoder=own).encoder) is Doubled
    with pytest.raises(InputError, match=r"weights of other networks, which were Doubled, GTADHead"):
        Detector.load(path)
    assert encoders.build(config).num_features == 256


SCRIPT = """
import json, sys
from lofi_fast.model import Detector
run, budget, *videos = sys.argv[1:]
said = []
with Detector.load(run).session(mem_budget=budget, device="cpu", say=said.append) as session:
    found = [[[d.start, d.end, d.label, d.score] for d in session.detect(video).detections] for video in videos]
    status = open("/proc/self/status").read()
peak = int(status.split("VmHWM:")[1].split()[0]) * 1024
print(json.dumps({"found": found, "said": said, "chunk": session.chunk, "rows": session.rows, "peak": peak}))
"""


def in_a_process(run: SmallRun, budget: str, *videos: Path, script: str = SCRIPT) -> dict[str, object]:
    """What a process of its own, which has the hard cap, finds and says."""
    command = [sys.executable, "-c", script, str(run.folder), budget, *map(str, videos)]
    done = subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, text=True, capture_output=True, timeout=PATIENCE)
    assert done.returncode == 0, done.stderr
    result: dict[str, object] = json.loads(done.stdout)
    return result


def test_memory_is_flat_over_a_long_video(small: SmallRun, tmp_path: Path) -> None:
    peaks = []
    for name, times in (("short", 4), ("long", 28)):  # of two videos of 24 seconds: 3 minutes, and 22
        video = joined(small.validation, tmp_path / f"{name}.mp4", times)
        assert probe(video).duration > 45 * times
        peaks.append(int(in_a_process(small, BUDGET, video)["peak"]))  # type: ignore[call-overload]
    assert peaks[1] < 1.05 * peaks[0]


def test_too_small_a_budget_is_refused_in_one_sentence(small: SmallRun) -> None:
    detector = Detector.load(small.folder)
    with pytest.raises(InputError, match=r"nothing fits: .*raise --mem-budget"):
        detector.detect(small.validation[0], mem_budget="50MB")


MEMORY_RUNS_OUT = """
import json, sys
from dataclasses import replace
from lofi_fast import encoder, head
from lofi_fast.fidelity import Fidelity
from lofi_fast.model import Detector
from lofi_fast.presets import demo

_, budget, video = sys.argv[1:]
config = replace(demo(), full=Fidelity(64, 96), encoder=replace(demo().encoder, width=16))
network = encoder.build(config)
detector = Detector(network, head.build(config, network.num_features, 2), "ab", config)
said = []
with detector.session(mem_budget=budget, device="cpu", say=said.append) as session:
    session.detect(video)
    planned, session.rows = session.chunk, 1
    session.meter.release()
    session.budget = session.meter.held() + 70_000_000
    found = len(session.detect(video).detections)
print(json.dumps({"planned": planned, "chunk": session.chunk, "said": said, "found": found}))
"""


def test_where_memory_runs_out_fewer_snippets_are_encoded_at_once(small: SmallRun) -> None:
    if (reason := allocator_missing()) is not None:
        pytest.skip(reason)
    result = in_a_process(small, BUDGET, small.validation[0], script=MEMORY_RUNS_OUT)
    assert 64 == result["planned"] > result["chunk"] and result["found"]  # type: ignore[operator]
    assert any("memory ran out" in text for text in result["said"])  # type: ignore[attr-defined]


def allocator_missing() -> str | None:
    done = subprocess.run(
        [sys.executable, "-c", "from lofi_fast.memory import allocator; print(allocator.install() or '')"],
        cwd=ROOT, env=ENVIRONMENT, text=True, capture_output=True,
    )  # fmt: skip
    return done.stdout.strip() or None

"""Inputs of people's own, each with what its user would want: every one of them once gave a wrong result in silence,
was lost whole, or was answered with a sentence that leads astray. docs/inputs.md has the kinds that they stand for.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
from av.audio.frame import AudioFrame
from av.video.frame import VideoFrame

from lofi_fast.config import HeadConfig
from lofi_fast.data.dataset import Dataset, Sampler, cached_dataset
from lofi_fast.data.survey import Survey, survey
from lofi_fast.data.video import decode
from lofi_fast.data.windows import cut_windows
from lofi_fast.evaluate import main as evaluate
from lofi_fast.head.decoding import detections, most_detections
from lofi_fast.head.gtad_head import GTADHead
from lofi_fast.head.map_decoding import WindowMaps, window_proposals
from lofi_fast.head.protocol import total
from lofi_fast.head.targets import make_targets
from lofi_fast.metrics import mean_average_precision
from lofi_fast.train import main as train
from lofi_fast.train import read_flags

RATE = 10
TINY = (
    "--preset small --fidelity 8x32 --window video --frame-stride 1 --width 8 --pretrain-epochs 1 --joint-epochs 1 "
    f"--head-epochs 1 --batch 2 --min-cut 1 --device cpu --threads {min(2, os.cpu_count() or 1)}"
).split()
Segments = Sequence[tuple[float, float, str]]
TWO: Segments = [(1, 2.5, "jump"), (3, 5, "run")]
LONG_NAME = "Finale" + "x" * 234  # bytes; file systems take 255


def write_video(
    path: Path, seconds: float = 12, rate: int = RATE, codec: str = "libx264", gop: int = 50, sound: bool = False,
    seed: int = 0, **container: Any,
) -> Path:  # fmt: skip
    """Grey noise whose brightness tells the time: 30 + 200 * t / seconds."""
    noise = np.random.default_rng(seed).integers(-20, 20, (48, 64, 1))
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w", **container) as file:
        options = {"preset": "ultrafast", "sc_threshold": "0"} if codec == "libx264" else {}
        stream = file.add_stream(codec, rate=rate, options={"g": str(gop), **options})
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        audio = file.add_stream("aac", rate=8000) if sound else None
        count = round(seconds * rate)
        for i in range(count):
            pixels = (30 + 200 * i / count + noise).clip(0, 255).repeat(3, axis=2).astype(np.uint8)
            file.mux(stream.encode(VideoFrame.from_ndarray(pixels, format="rgb24")))
        file.mux(stream.encode(None))
        if audio is not None:
            for i in range(round(seconds * 8000 / 1024)):
                samples = AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
                samples.sample_rate, samples.pts = 8000, 1024 * i
                file.mux(audio.encode(samples))
            file.mux(audio.encode(None))
    return path


def labels(path: Path, videos: Mapping[str, tuple[str, Segments]], **common: Any) -> Path:
    """ActivityNet JSON of name -> (subset, segments)."""
    database = {
        name: {"subset": subset, "annotations": [{"segment": [s, e], "label": x} for s, e, x in segments], **common}
        for name, (subset, segments) in videos.items()
    }
    path.write_text(json.dumps({"database": database}), encoding="utf-8")
    return path


def looked_at(annotations: Path, videos: Path, *flags: str) -> Survey:
    """What is known of labels and videos before a training decodes them."""
    config, _ = read_flags(
        ["--annotations", str(annotations), "--videos", str(videos), *TINY, *flags], cuda=lambda: False
    )
    return survey(config, annotations, videos)


def said(found: Survey) -> str:
    skipped = (f"skipped {one.name}: {one.reason}" for one in found.skipped)
    return " / ".join([*found.warnings, *found.notes, *skipped, *([found.refused] if found.refused else [])])


def loaded(found: Survey, cache: Path) -> Dataset:
    return cached_dataset(found, cache, lambda *_: None)


# Wrong results without a word


def test_cut_by_stream_copy(tmp_path: Path) -> None:
    """A label at t s of the player's clock teaches the picture that players show then, and a note tells the offset."""
    source = write_video(tmp_path / "source.mp4", 30, gop=200, sound=True)
    (tmp_path / "v").mkdir()
    with av.open(str(source)) as given, av.open(str(tmp_path / "v" / "a.mp4"), "w") as cut:
        streams = {old.index: cut.add_stream_from_template(old) for old in given.streams}
        begun = False
        for packet in given.demux():
            if packet.dts is None or packet.pts * packet.time_base < 12:
                continue
            if packet.stream.type == "video" and not (begun := begun or packet.is_keyframe):
                continue
            offset = round(12 / packet.time_base)
            packet.pts, packet.dts = packet.pts - offset, packet.dts - offset
            packet.stream = streams[packet.stream.index]
            cut.mux(packet)
    found = looked_at(labels(tmp_path / "a.json", {"a": ("training", [(10, 12, "x")])}), tmp_path / "v")
    info = found.videos[0].info
    assert info.pts[0] == pytest.approx(8.0, abs=0.1) and "begin after the file's start (a at" in said(found)
    index = int(np.searchsorted(info.pts, 10.0 - 1e-6))
    ((_, frame),) = decode(info, np.array([index]))
    assert frame.to_ndarray(format="gray").mean() == pytest.approx(30 + 200 * 22 / 30, abs=12)


def test_two_labels_on_one_segment() -> None:
    """Each of two labels of one segment is taught."""
    segments, both = np.array([[4.0, 12.0], [4.0, 12.0]]), np.array([1, 0])
    targets = make_targets(np.linspace(0, 32, 65), segments, both, 64, 2, np.random.default_rng(0), with_zero=True)
    shown = (targets.classes == 1).sum(1)
    assert shown[0] == shown[1] > 0


def test_two_labels_trained(tmp_path: Path) -> None:
    """A head finds the segments of each of two labels that always stand together as well as those of one alone."""
    names = ("cliff", "diving", "run")
    videos: dict[str, tuple[str, Segments]] = {
        "a": ("training", [(0, 3, "diving"), (0, 3, "cliff"), (5, 8, "run")]),
        "b": ("training", [(1, 3, "run"), (4, 7, "diving"), (4, 7, "cliff")]),
        "c": ("training", [(2, 6, "diving"), (2, 6, "cliff")]),
    }
    for name in videos:
        write_video(tmp_path / f"{name}.mp4", 8)
    found = looked_at(labels(tmp_path / "a.json", videos), tmp_path)
    dataset = loaded(found, tmp_path / "cache")
    assert dataset.classes == names
    taught = {clip.labels for clip in Sampler(dataset, found.config.data, found.config.full, 0).clips}
    assert taught == {(0, 1), (2,)}, "pretraining teaches both too"

    config = HeadConfig(hidden=16, groups=2, inner_bins=4, context_bins=2, map_channels=16, class_bins=2,
                        positive_iou=0.7, sample_zero_iou=True)  # fmt: skip
    samples, edges = dataset.samples["training"], np.arange(9.0)
    centres = edges[:-1] + 0.5
    shown = np.stack([
        [[((s <= t) & (t <= e) & (sample.labels == k)).any() for t in centres] for k in range(3)]
        for sample in samples for s, e in [sample.segments.T]
    ])  # fmt: skip
    features = torch.from_numpy(np.pad(3 * shown, ((0, 0), (0, 5), (0, 0))).astype(np.float32))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        head = GTADHead(config, 8, 3, 8).train()
        optimizer = torch.optim.AdamW(head.parameters(), lr=1e-2)
        for step in range(120):
            random = np.random.default_rng(step)
            targets = [head.targets(edges, sample.segments, sample.labels, random) for sample in samples]
            total(head.loss(head(features), targets, head.counts(targets), 1.0)).backward()
            optimizer.step()
            optimizer.zero_grad()
    with torch.no_grad():
        windows = head.eval().proposals(head(features), [edges] * len(samples))
    predictions = {
        sample.window.video: [
            (d.start, d.end, d.label, d.score) for d in detections([window], names, duration=8.0, sigma=0.4)
        ]
        for sample, window in zip(samples, windows, strict=True)
    }
    truth = {name: list(segments) for name, (_, segments) in videos.items()}
    result = mean_average_precision(truth, predictions, np.array([0.5]))
    assert min(result.average_precision[:, 0]) > 0.6, dict(zip(result.classes, result.average_precision, strict=True))


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(folder with videos and labels, a finished run on them); one of the videos has a name of 240 bytes."""
    folder = tmp_path_factory.mktemp("cases")
    for seed, name in enumerate((LONG_NAME, "b", "c")):
        write_video(folder / "v" / f"{name}.mp4", 6, seed=seed)
    assert train(given(folder, folder / "run")) == 0
    return folder, folder / "run"


def given(folder: Path, run: Path, *flags: str, moved: float = 0.0) -> list[str]:
    """The tiny training on `folder`, with its labels `moved` by seconds."""
    segments = [(start + moved, end + moved, label) for start, end, label in TWO]
    subsets = {LONG_NAME: "training", "b": "training", "c": "validation"}
    path = labels(folder / "a.json", {name: (subset, segments) for name, subset in subsets.items()})
    cache = folder / "cache"
    return ["--annotations", str(path), "--videos", str(folder / "v"), "--cache", str(cache), *TINY, "--out", str(run),
            "--mem-budget", "2GB", *flags]  # fmt: skip


@pytest.fixture
def copied(trained: tuple[Path, Path], tmp_path: Path) -> Path:
    """A copy of all of it, with its run in the folder `run`."""
    return Path(shutil.copytree(trained[0], tmp_path / "data"))


def test_features_of_a_replaced_video(copied: Path) -> None:
    """A video that is replaced under its name has its features made anew by --resume."""
    before = {path.name: path.read_bytes() for path in (copied / "run" / "features").glob("*.npy")}
    write_video(copied / "v" / "c.mp4", 6, seed=9)
    assert train(given(copied, copied / "run", "--resume")) == 0
    after = {path.name: path.read_bytes() for path in (copied / "run" / "features").glob("*.npy")}
    assert {name for name in before if after[name] != before[name]} == {"c.npy"}


def test_same_stem_in_two_folders(tmp_path: Path) -> None:
    """Two files of one stem are refused with both paths; a name with its folder finds its file."""
    for camera, seconds in (("cam1", 6), ("cam2", 3)):
        write_video(tmp_path / "v" / camera / "0001.mp4", seconds)
    videos: dict[str, tuple[str, Segments]] = {name: ("training", TWO) for name in ("0001", "cam2/0001")}
    found = looked_at(labels(tmp_path / "a.json", videos), tmp_path / "v")
    assert found.refused and "cam1/0001.mp4" in found.refused and "cam2/0001.mp4" in found.refused
    assert [(one.name, one.info.path) for one in found.videos] == [("cam2/0001", tmp_path / "v" / "cam2" / "0001.mp4")]


def test_many_actions_in_a_long_video() -> None:
    """With a perfect head, 1,000 actions in a video of 90 minutes have a mAP of more than 95 at tIoU 0.5."""
    length, duration = 64, 5400.0
    starts = np.sort(np.random.default_rng(0).choice(np.arange(int(duration) - 2), 1000, replace=False)).astype(float)
    proposals = []
    for window in cut_windows("v", duration, 32.0, 0.5):
        start, end, confidence, classes = (
            np.zeros(shape) for shape in (length, length, (length, length), (1, length, length))
        )
        for at in np.round(2 * (starts - window.start)).astype(int):
            if 0 <= at < length - 1:
                start[at] = confidence[1, at] = classes[0, 1, at] = 1
            if 0 <= at < length - 2:
                end[at + 2] = 1
        edges = np.linspace(window.start, window.end, length + 1)
        proposals.append(window_proposals(WindowMaps(edges, start, end, confidence, classes)))
    found = detections(proposals, ["x"], duration=duration, top_k=most_detections(len(proposals)))
    truth = {"v": [(start, start + 1, "x") for start in starts.tolist()]}
    result = mean_average_precision(truth, {"v": [(d.start, d.end, d.label, d.score) for d in found]}, np.array([0.5]))
    assert result.average > 0.95


def test_actions_longer_than_the_window(tmp_path: Path) -> None:
    """Segments of 80 s in windows of 32 s, which no proposal reaches at tIoU 0.5: a sentence names --window."""
    write_video(tmp_path / "a.mp4", 280, rate=1)
    spans = [(10.0, 90.0, "x"), (100.0, 180.0, "x"), (190.0, 270.0, "x")]
    found = looked_at(
        labels(tmp_path / "a.json", {"a": ("training", spans)}), tmp_path, "--window", "32", "--fidelity", "64x32"
    )
    assert "longer than the window" in said(found) and "--window" in said(found)


def test_frame_numbers_as_seconds(tmp_path: Path) -> None:
    """Frame numbers as times are refused by their name, also where early actions lie within the videos."""
    for name in "ab":
        write_video(tmp_path / "v" / f"{name}.mp4", rate=25)
    rows = ("a,25,62,jump,training", "a,5,10,jump,training", "a,1,4,run,training", "a,75,125,run,training",
            "b,25,75,run,validation", "b,3,8,jump,validation")  # fmt: skip
    table = tmp_path / "a.csv"
    table.write_text("\n".join(("video,start,end,label,subset", *rows)))
    assert "look like frame numbers" in str(looked_at(table, tmp_path / "v").refused)


def test_truncated_video(tmp_path: Path) -> None:
    """Half an upload: the labels say 12 s, the file holds some 6 s. It is used, and told."""
    whole = write_video(tmp_path / "whole.mp4", container_options={"movflags": "faststart"}).read_bytes()
    (tmp_path / "v").mkdir()
    (tmp_path / "v" / "a.mp4").write_bytes(whole[: len(whole) // 2])
    path = labels(tmp_path / "a.json", {"a": ("training", [(1, 2.5, "x")])}, duration=12.0)
    found = looked_at(path, tmp_path / "v")
    assert found.refused is None and found.videos[0].info.duration < 8
    assert "do not last as long as the labels say" in said(found) and "cut off" in said(found)


def evaluated(folder: Path, truth: Any, prediction: Sequence[float], *flags: str) -> int:
    """The status of `evaluate` of one prediction of the label "run" in video b."""
    content = truth if isinstance(truth, bytes) else json.dumps(truth).encode()
    (folder / "g.json").write_bytes(content)
    entry = {"segment": list(prediction), "label": "run", "score": 0.5}
    (folder / "p.json").write_text(json.dumps({"results": {"b": [entry]}}))
    paths = ("--ground-truth", str(folder / "g.json"), "--predictions", str(folder / "p.json"))
    return evaluate([*paths, "--tiou", "0.5", *flags])


def truth_of(names: Iterable[tuple[str, str]], label: str = "run") -> dict[str, Any]:
    entry = {"annotations": [{"segment": [1, 3], "label": label}]}
    return {"database": {name: {"subset": subset, **entry} for name, subset in names}}


def test_reversed_prediction(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A prediction that ends before it starts is refused, as such a label is."""
    assert evaluated(tmp_path, truth_of([("b", "validation")]), (3, 1)) == 2
    assert "video b, segment 0: starts at 3.0 s, after its end" in capsys.readouterr().err


def test_label_with_a_space(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A label with a space at its end is one label in training and in evaluation."""
    assert evaluated(tmp_path, truth_of([("b", "validation")], "run "), (1, 3)) == 0
    assert "100.00" in capsys.readouterr().out


def test_labels_edited_before_resume(copied: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Labels that were edited in place are named by --resume."""
    assert train(given(copied, copied / "run", "--resume", moved=0.5)) == 2
    assert "3 videos have other segments" in capfd.readouterr().err


# Whole videos or runs lost


def test_joined_transport_streams(tmp_path: Path) -> None:
    """Two transport streams joined end to end, in which every frame decodes, are used whole."""
    parts = [write_video(tmp_path / f"{seed}.ts", 4, seed=seed, format="mpegts").read_bytes() for seed in range(2)]
    (tmp_path / "v").mkdir()
    (tmp_path / "v" / "a.ts").write_bytes(b"".join(parts))
    found = looked_at(labels(tmp_path / "a.json", {"a": ("training", TWO)}), tmp_path / "v", "--fidelity", "64x32")
    dataset = loaded(found, tmp_path / "cache")
    assert not dataset.skipped and len(dataset.samples["training"]) == 1
    assert len(found.videos[0].info.pts) == 80 and found.videos[0].info.duration == pytest.approx(8.0, abs=0.2)


def test_long_video_name(trained: tuple[Path, Path]) -> None:
    """A video whose name has 240 bytes is trained on to the end."""
    assert (trained[1] / "metrics.json").exists()
    record = json.loads((trained[1] / "data.json").read_text())
    assert LONG_NAME in record["videos"]


def test_rare_class_and_our_own_split(tmp_path: Path) -> None:
    """A table without subsets trains: the division, which is our own, keeps a class's only video in training."""
    for name in "abcde":
        write_video(tmp_path / "v" / f"{name}.mp4", 3)
    table = tmp_path / "a.csv"
    table.write_text("video,start,end,label\n" + "".join(f"{n},0.5,2,run\n" for n in "abcd") + "e,1,2,rare\n")
    found = looked_at(table, tmp_path / "v")
    assert found.refused is None and found.subset("validation") and "rare" in found.classes


def test_other_extensions(tmp_path: Path) -> None:
    """Any container and codec that FFmpeg reads is found and read."""
    codecs = {"3gp": "mpeg4", "mxf": "mpeg2video", "vob": "mpeg2video", "ogv": "libvpx", "asf": "msmpeg4"}
    for extension, codec in codecs.items():
        write_video(tmp_path / "v" / f"{extension}1.{extension}", 4, rate=25, codec=codec)
    videos: dict[str, tuple[str, Segments]] = {f"{extension}1": ("training", [(1, 2, "x")]) for extension in codecs}
    found = looked_at(labels(tmp_path / "a.json", videos), tmp_path / "v")
    assert not found.skipped and len(loaded(found, tmp_path / "cache").videos["training"]) == len(codecs)


def test_thumos_subsets(tmp_path: Path) -> None:
    """With subsets train and test, the test set is evaluated; with Validation and Test alone, which have nothing to
    train on, the sentence says what is to be renamed.
    """
    for name in "ab":
        write_video(tmp_path / "v" / f"{name}.mp4", 6)
    found = looked_at(labels(tmp_path / "a.json", {"a": ("Validation", TWO), "b": ("Test", TWO)}), tmp_path / "v")
    assert found.refused and "Validation" in found.refused
    found = looked_at(labels(tmp_path / "a.json", {"a": ("train", TWO), "b": ("test", TWO)}), tmp_path / "v")
    assert [video.name for video in found.subset("validation")] == ["b"] and "testing subset" in said(found)


def test_evaluate_subset_case(tmp_path: Path) -> None:
    """`evaluate` takes subset names as training does, in any case."""
    truth = truth_of([("a", "Test"), ("b", "Validation")])
    assert evaluated(tmp_path, truth, (1, 3), "--subset", "validation") == 0


def test_resume_with_another_path(copied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A data set that has moved, or the same file by another path, can be resumed."""
    monkeypatch.chdir(copied)
    flags = given(copied, copied / "run", "--resume", "--stages", "eval")
    flags[flags.index("--annotations") + 1] = str(Path("v") / ".." / "a.json")
    assert train(flags) == 0


# Sentences that lead astray


def test_milliseconds(tmp_path: Path) -> None:
    """Milliseconds: the sentence says that the segments lie outside their videos, and that seconds are expected."""
    write_video(tmp_path / "a.mp4", 4)
    (tmp_path / "a.csv").write_text("video,start,end,label,subset\na,1000,2500,x,training\n")
    refused = str(looked_at(tmp_path / "a.csv", tmp_path).refused)
    assert "outside" in refused and "look like milliseconds" in refused and "must be in seconds" in refused


def test_semicolons(tmp_path: Path) -> None:
    """A table as spreadsheets of half of Europe write it is read."""
    write_video(tmp_path / "a.mp4", 4)
    (tmp_path / "a.csv").write_bytes(b"video;start;end;label\r\na;1,0;2,5;x\r\n")
    found = looked_at(tmp_path / "a.csv", tmp_path)
    assert found.refused is None
    assert [(s.start, s.end) for s in found.videos[0].video.segments] == [(1.0, 2.5)]


def test_byte_order_mark(tmp_path: Path) -> None:
    """`evaluate` reads JSON with a byte order mark, as training does."""
    content = b"\xef\xbb\xbf" + json.dumps(truth_of([("b", "validation")])).encode()
    assert evaluated(tmp_path, content, (1, 3)) == 0


def test_the_table_of_kinds_names_tests_that_exist() -> None:
    folder = Path(__file__).resolve().parent
    named = re.findall(r"`(test_\w+\.py)::(\w+)`", (folder.parent / "docs" / "inputs.md").read_text())
    missing = [(file, name) for file, name in named if f"\ndef {name}(" not in (folder / file).read_text()]
    assert len(named) > 50 and not missing

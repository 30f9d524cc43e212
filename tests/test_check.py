"""`check` says before training what labels and videos say of each other, and training begins with the same."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
from av.video.frame import VideoFrame

import lofi_fast
from lofi_fast import __main__ as program
from lofi_fast.config import Config
from lofi_fast.data.annotations import Segment, Video
from lofi_fast.data.cache_size import LOOKED_AT
from lofi_fast.data.dataset import cached_dataset
from lofi_fast.data.survey import Overlaps, overlaps
from lofi_fast.encoder.tsm import TSMEncoder
from lofi_fast.errors import InputError
from lofi_fast.train import main as train

RATE = 4
SETTINGS = {
    "preset": "small", "fidelity": "16x32", "frame-stride": 1, "width": 8, "batch": 2, "min-cut": 1, "device": "cpu",
    "threads": min(2, os.cpu_count() or 1), "pretrain-epochs": 1, "joint-epochs": 1, "head-epochs": 1,
}  # fmt: skip
TINY = [f"--{name}={value}" for name, value in SETTINGS.items()]
Spans = list[tuple[float, float, str]]
KEY = "found_at_tiou_0.5"


def write_video(path: Path, seconds: float, size: int = 48, smooth: bool = False, seed: int = 0) -> None:
    picture = np.random.default_rng(seed).integers(0, 256, (size, size, 3), dtype=np.uint8)
    if smooth:
        picture = np.linspace(0, 255, size).astype(np.uint8)[:, None].repeat(size, axis=1)
        picture = picture[:, :, None].repeat(3, axis=2)
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=RATE, options={"preset": "ultrafast", "crf": "35"})
        stream.width, stream.height, stream.pix_fmt = size, size, "yuv420p"
        for i in range(round(seconds * RATE)):
            container.mux(stream.encode(VideoFrame.from_ndarray(np.roll(picture, i, axis=1), format="rgb24")))
        container.mux(stream.encode(None))


@dataclass(frozen=True)
class Data:
    folder: Path

    def labels(self, videos: dict[str, tuple[str, Spans]], **common: Any) -> Path:
        database = {
            name: {"subset": subset, "annotations": [{"segment": [s, e], "label": x} for s, e, x in spans]} | common
            for name, (subset, spans) in videos.items()
        }
        path = self.folder / "labels.json"
        path.write_text(json.dumps({"database": database}))
        return path

    def flags(self, labels: Path) -> list[str]:
        return ["--annotations", str(labels), "--videos", str(self.folder / "videos")]


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("check")
    for name in ("a", "b", "v"):
        write_video(folder / f"{name}.mp4", 40)
    write_video(folder / "long.mp4", 60)
    (folder / "damaged.mp4").write_bytes(b"no video" * 1000)
    return folder


@pytest.fixture
def data(videos: Path, tmp_path: Path) -> Data:
    (tmp_path / "videos").symlink_to(videos)
    return Data(tmp_path)


Check = Callable[..., tuple[int, dict[str, Any], str]]


@pytest.fixture
def check(capfd: pytest.CaptureFixture[str]) -> Check:
    """(status, what --json says, stderr)"""

    def run(*flags: str) -> tuple[int, dict[str, Any], str]:
        capfd.readouterr()
        status = program.main(["check", *flags, "--json"])
        captured = capfd.readouterr()
        return status, json.loads(captured.out), captured.err

    return run


SHORT: Spans = [(2.0, 6.0, "run"), (10.0, 14.0, "jump"), (20.0, 26.0, "run")]


def test_what_can_be_known_of_a_data_set(data: Data, check: Check) -> None:
    labels = data.labels(
        {
            "a": ("training", [*SHORT, (2.0, 6.0, "jump"), (21.0, 27.0, "run")]),
            "b": ("training", [*SHORT, (20.0, 26.0, "run"), (38.0, 43.0, "jump"), (50.0, 52.0, "jump")]),
            "v": ("validation", SHORT),
            "damaged": ("training", SHORT),
            "absent": ("training", SHORT),
            "t": ("testing", SHORT),
        }
    )
    status, said, _ = check(*data.flags(labels), *TINY)
    assert status == 0 and "refused" not in said
    assert {one["name"] for one in said["skipped"]} == {"damaged", "absent"}
    assert all(one["reason"] for one in said["skipped"])
    a, b, v = (said["videos"][name] for name in "abv")
    assert a["file"].endswith("videos/a.mp4") and (a["subset"], v["subset"]) == ("training", "validation")
    assert (a["duration"], a["duration_annotated"], a["clock_offset"]) == (40.0, None, 0.0)
    assert (a["segments"], a["overlapping"], a["several_labels"], a["outside"], a["clipped"]) == (5, 1, 1, 0, 0)
    assert (b["segments"], b["overlapping"], b["outside"], b["clipped"]) == (5, 0, 1, 1)
    assert (said["segments"], said[KEY]) == (13, 12)
    assert said["duplicates"] == 1
    assert said["subsets"]["training"] == {"videos": 2, "segments": 9, "classes": {"jump": 4, "run": 5}}
    assert said["subsets"]["testing"]["videos"] == 1
    assert said["window"] == 32.0 and {of["window"] for of in said["windows"]} == {8.0, 16.0, 32.0, 64.0, "video"}
    assert said["cache_bytes"] == sum(of["cache_bytes"] for of in said["videos"].values()) > 0
    notes = " / ".join(said["notes"])
    for part in ("duplicate", "overlap an earlier one of the same label", "several labels", "chosen from the labels"):
        assert part in notes


def test_a_table_for_people(data: Data, capfd: pytest.CaptureFixture[str]) -> None:
    labels = data.labels({"a": ("training", SHORT), "v": ("validation", SHORT)}, duration=0.67)
    assert program.main(["check", *data.flags(labels), *TINY]) == 0
    lines = capfd.readouterr().out.splitlines()
    assert lines[0].split()[:3] == ["video", "subset", "seconds"]
    assert lines[1].split()[:5] == ["a", "training", "40.00", "0.67", "0.00"]
    assert any("6 of 6 segments can be found" in line for line in lines)
    assert any(line.startswith("note: ") and "minutes" in line for line in lines)


def test_the_size_of_the_cache_is_foretold(tmp_path: Path) -> None:
    """Of noise, of smooth pictures, and of a container whose packets tell no times."""
    names = ("noise.mp4", "large.mp4", "smooth.mp4", "noise.ts", "small.avi")
    for name, size in zip(names, (64, 128, 96, 64, 32), strict=True):
        write_video(tmp_path / name, 20, size, smooth=name == "smooth.mp4")
    labels = tmp_path / "labels.csv"
    labels.write_text("video,start,end,label\n" + "".join(f"{name},2,5,run\n" for name in names))
    checked = lofi_fast.check(annotations=labels, videos=tmp_path, preset="small", fidelity="16x56", window=8.0)
    assert checked.survey is not None
    cached_dataset(checked.survey, tmp_path / "cache", lambda *_: None)
    for video, told in checked.to_json()["videos"].items():
        written = sum(path.stat().st_size for path in (tmp_path / "cache").glob(f"*/{video}-*"))
        assert told["cache_bytes"] == pytest.approx(written, rel=0.15), video


def test_the_size_of_the_cache_of_many_videos_is_foretold_from_some(tmp_path: Path) -> None:
    for k in range(2 * LOOKED_AT):
        write_video(tmp_path / f"{k:02d}.mp4", 5, 48, smooth=k % 4 == 0)
    labels = tmp_path / "labels.csv"
    labels.write_text("video,start,end,label\n" + "".join(f"{k:02d},2,4,run\n" for k in range(2 * LOOKED_AT)))
    checked = lofi_fast.check(annotations=labels, videos=tmp_path, preset="small", fidelity="8x32")
    assert checked.survey is not None
    cached_dataset(checked.survey, tmp_path / "cache", lambda *_: None)
    written = sum(path.stat().st_size for path in (tmp_path / "cache").glob("??/*"))
    assert checked.to_json()["cache_bytes"] == pytest.approx(written, rel=0.15)


def test_what_would_be_refused_is_shown_with_all_that_is_known(data: Data, check: Check) -> None:
    frames = [(s * RATE * 4, e * RATE * 4, x) for s, e, x in SHORT]
    labels = data.labels({"a": ("training", frames), "v": ("validation", SHORT), "absent": ("training", SHORT)})
    status, said, err = check(*data.flags(labels), *TINY)
    assert status == 2 and "lie outside their videos" in said["refused"]
    assert err.splitlines()[-1] == f"error: {said['refused']}"
    assert said["videos"].keys() == {"a", "v"} and said["segments"] == 6 and len(said["skipped"]) == 1


@pytest.mark.parametrize(
    ("flags", "part"),
    [
        (["--mem-budget", "11"], "--mem-budget 11"),
        (["--fidelity", "4000x32"], "--fidelity 4000x32"),
        (["--video-scores", "absent.json"], "--video-scores"),
        (["--encoder-weights", "absent.pth"], "--encoder-weights"),
    ],
)
def test_what_training_refuses_at_its_start_check_refuses_too(
    flags: list[str], part: str, data: Data, check: Check, capfd: pytest.CaptureFixture[str]
) -> None:
    labels = data.labels({"a": ("training", SHORT), "v": ("validation", SHORT)})
    status, said, _ = check(*data.flags(labels), *TINY, *flags)
    assert status == 2 and part in said["refused"] and said["videos"]
    out = data.folder / "run"
    assert train([*data.flags(labels), *TINY, *flags, "--out", str(out)]) == 2
    assert part in capfd.readouterr().err
    assert not out.exists() and not (data.folder / "cache").exists()


def test_labels_that_cannot_be_read_are_a_refusal(data: Data, check: Check) -> None:
    (data.folder / "labels.json").write_text("{")
    status, said, _ = check(*data.flags(data.folder / "labels.json"))
    assert status == 2 and "not valid JSON" in said["refused"]
    assert (said["videos"], said["skipped"], said["segments"], said[KEY]) == ({}, [], 0, 0)


def test_files_that_claim_one_name(data: Data, check: Check, tmp_path: Path) -> None:
    (tmp_path / "videos").unlink()
    for camera in ("cam1", "cam2"):
        write_video(tmp_path / "videos" / camera / "a.mp4", 3)
    write_video(tmp_path / "videos" / "b.mp4", 4)
    labelled = ("training", [(1.0, 2.0, "run")])
    status, said, _ = check(*data.flags(data.labels({"a": labelled, "b": labelled, "absent": labelled})))
    assert status == 2 and "cam1/a.mp4" in said["refused"] and "cam2/a.mp4" in said["refused"]
    assert said["videos"].keys() == {"b"} and said["videos"]["b"]["duration"] == 4.0
    reasons = {one["name"]: one["reason"] for one in said["skipped"]}
    assert reasons.keys() == {"a", "absent"} and "cam1/a.mp4, cam2/a.mp4" in reasons["a"]


def test_one_file_under_several_names(data: Data, check: Check, tmp_path: Path) -> None:
    """Warned of where what is evaluated is trained on too; other files of equal length are no such thing."""
    (tmp_path / "videos").unlink()
    for seed, name in enumerate("abc"):
        write_video(tmp_path / "videos" / f"{name}.mp4", 8, seed=seed)
    (tmp_path / "videos" / "link.mp4").symlink_to(tmp_path / "videos" / "a.mp4")
    shutil.copyfile(tmp_path / "videos" / "b.mp4", tmp_path / "videos" / "copy.mp4")
    subsets = {"a": "training", "link": "validation", "b": "training", "copy": "training", "c": "validation"}
    segments: Spans = [(1.0, 3.0, "run")]
    _, said, _ = check(*data.flags(data.labels({name: (subset, segments) for name, subset in subsets.items()})))
    (warning,) = [note for note in said["notes"] if "what is evaluated is trained on" in note]
    assert warning.startswith("WARNING") and "a (training) and link (validation)" in warning
    (note,) = [note for note in said["notes"] if "count as those of several" in note]
    assert "b (training) and copy (training)" in note
    assert "c (" not in warning + note


def test_without_data_of_ones_own_there_is_nothing_to_check(capfd: pytest.CaptureFixture[str]) -> None:
    assert program.main(["check"]) == 2
    assert "--annotations FILE --videos DIR" in capfd.readouterr().err


def test_it_needs_no_torch(data: Data) -> None:
    labels = data.labels({"a": ("training", SHORT), "v": ("validation", SHORT)})
    code = "import sys, lofi_fast.check; s = lofi_fast.check.main(); sys.exit(s or 'torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code, *data.flags(labels), "--json"], check=True, capture_output=True)


def test_from_python(data: Data) -> None:
    labels = data.labels({"a": ("training", SHORT), "v": ("validation", SHORT)})
    checked = lofi_fast.check(annotations=labels, videos=data.folder / "videos", preset="small")
    assert checked.refused is None and checked.to_json()[KEY] == 6
    with pytest.raises(InputError, match="--annotations"):
        lofi_fast.check(preset="demo")


# The grid

LONG: Spans = [(1.0, 39.0, "run")]


def test_a_window_that_finds_few_is_refused_and_another_named(data: Data, check: Check) -> None:
    labels = data.labels({"a": ("training", LONG), "b": ("training", LONG), "v": ("validation", SHORT[:1])})
    status, said, _ = check(*data.flags(labels), *TINY, "--window", "8")
    assert status == 2 and said[KEY] == 1
    for part in ("no training segment of 2", "2 are longer than the window", "--window 32 would let 2 be found"):
        assert part in said["refused"]


def test_a_tenth_that_cannot_be_found_is_a_warning_and_less_a_note(data: Data, check: Check) -> None:
    many = [(0.5 + 2 * k, 2.0 + 2 * k, "run") for k in range(19)]
    for more, start in ((LONG, ""), (LONG * 1 + [(2.0, 38.5, "run"), (1.5, 39.5, "run")], "WARNING: ")):
        labels = data.labels({"a": ("training", many + more)})
        status, said, _ = check(*data.flags(labels), *TINY, "--window", "8")
        (note,) = [note for note in said["notes"] if "can be found at tIoU 0.5" in note]
        assert status == 0 and note.startswith(f"{start}19 of {19 + len(more)} training segments")


def test_labels_choose_the_window_of_a_run_and_its_folder_says_which(
    data: Data, check: Check, capfd: pytest.CaptureFixture[str]
) -> None:
    labels = data.labels({"long": ("training", [(1.0, 59.0, "run"), (2.5, 57.0, "jump")]), "v": ("validation", SHORT)})
    _, said, _ = check(*data.flags(labels), *TINY)
    assert said["window"] == 64.0, "validation labels must not count"
    out = data.folder / "run"
    flags = [*data.flags(labels), *TINY, "--stages", "head", "--out", str(out)]
    assert train(flags) == 0
    assert "the window is 64 s, chosen from the labels" in capfd.readouterr().out
    assert Config.read(out / "config.json").data.window == 64.0
    assert lofi_fast.load(out).config.data.window == 64.0
    assert {path.name for path in (out / "features").glob("*.npy")} >= {"long@0.00s.npy", "v@0.00s.npy"}
    for again in (["--resume", str(out)], [*flags, "--resume", "--window", "labels"]):
        assert train(again) == 0, again
    assert Config.read(out / "config.json").data.window == 64.0
    assert train([*flags, "--resume", "--window", "16"]) == 2
    assert "--window 64.0, not 16.0" in capfd.readouterr().err


# What training checks at its start


def test_weights_that_do_not_fit_are_refused_before_decoding(data: Data, capfd: pytest.CaptureFixture[str]) -> None:
    labels = data.labels({"a": ("training", SHORT), "v": ("validation", SHORT)})
    weights = data.folder / "w.pth"
    torch.save(TSMEncoder("tsm_r18", 16).state_dict(), weights)
    out = data.folder / "run"
    assert train([*data.flags(labels), *TINY, "--encoder-weights", str(weights), "--out", str(out)]) == 2
    assert "change --encoder, --width or --encoder-weights" in capfd.readouterr().err
    assert not out.exists() and not (data.folder / "cache").exists()


def test_a_batch_of_more_windows_than_there_are_and_pixels_that_are_not_there(data: Data, check: Check) -> None:
    labels = data.labels({"a": ("training", SHORT), "v": ("validation", SHORT)})
    _, said, _ = check(*data.flags(labels), *TINY, "--window", "video", "--fidelity", "200x64", "--batch", "2")
    notes = " / ".join(said["notes"])
    for part in ("--batch 2 is more than the 1 training windows", "more than 160 frames", "48 px at most"):
        assert part in notes


def test_more_proposals_than_any_machine_scores(capfd: pytest.CaptureFixture[str]) -> None:
    for command in ("train", "plan", "check"):
        assert program.main([command, "--fidelity", "1000000x64", "--mem-budget", "11GB"]) == 2
        assert "--fidelity 1000000x64: 1,000,000,000,000 proposals" in capfd.readouterr().err


# Labels among themselves


@pytest.mark.parametrize(
    ("spans", "expected"),
    [
        ([], (0, 0)),
        ([(1, 3, "x"), (1, 3, "y")], (0, 1)),
        ([(1, 3, "x"), (3, 4, "x")], (0, 0)),
        ([(1, 3, "x"), (2, 4, "x"), (2.5, 3.5, "x")], (2, 0)),
        ([(1, 9, "x"), (2, 3, "x"), (2, 3, "y"), (4, 5, "x")], (2, 1)),
    ],
)
def test_overlapping_labels(spans: Spans, expected: tuple[int, int]) -> None:
    video = Video("v", "training", None, tuple(Segment(*span) for span in spans))
    assert overlaps(video) == Overlaps(*expected)

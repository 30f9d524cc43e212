"""The command `extract`: features as other programs load them, each feature at the time that its file says."""

from __future__ import annotations

import ast
import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from detectors import SmallRun, with_early_sound

from lofi_fast.data.exchange import Labels, labels_for, write_layout
from lofi_fast.data.given import unique_names
from lofi_fast.data.labels import Segment, Video
from lofi_fast.data.video import probe
from lofi_fast.errors import InputError
from lofi_fast.extract import _rescaled, main
from lofi_fast.model import Detector

pytestmark = pytest.mark.usefixtures("torchs_own_allocator")
Captured = pytest.CaptureFixture[str]
STRIDE = 8.0 / 8  # seconds: windows of 8 seconds have 8 snippets


def extract(run: SmallRun, *words: object) -> int:
    return main([str(run.folder), *map(str, words), "--mem-budget", "4GB"])


def index(out: Path) -> dict[str, dict[str, Any]]:
    rows = [json.loads(line) for line in (out / "index.jsonl").read_text().splitlines()]
    return {row["video"]: row for row in rows}


def said(captured: Captured) -> str:
    return captured.readouterr().out


@pytest.fixture(scope="module")
def detector(small: SmallRun) -> Detector:
    return Detector.load(small.folder)


def test_features_are_a_regular_series_on_a_players_clock(detector: Detector, small: SmallRun, tmp_path: Path) -> None:
    video = small.validation[0]
    late = with_early_sound(video, tmp_path / "late.mov", 4 * 1)  # its pictures begin four features later
    with detector.session(mem_budget="4GB", device="cpu") as session:
        of_video, of_late = (session.regular_features(path) for path in (video, late))
        whole, shifted = (np.concatenate(list(of.parts)) for of in (of_video, of_late))
        plain = session.features(video)
    assert of_video.stride == STRIDE and whole.shape == (of_video.count, of_video.num_channels) == (len(whole), 64)
    assert abs(of_video.count * STRIDE - probe(video).duration) <= STRIDE / 2 + 1e-6
    # where windows are those of the head, features are the same to the last bit
    assert np.array_equal(whole[:8], plain.values[:8]) and np.allclose(plain.times[:8], (np.arange(8) + 0.5) * STRIDE)
    assert of_late.count == of_video.count + 4
    np.testing.assert_allclose(shifted[4 : 4 + 8], whole[:8], atol=2e-2)


def test_each_format_holds_the_same(small: SmallRun, tmp_path: Path, capsys: Captured) -> None:
    pictures = small.validation[0]
    for form in ("npy", "npz", "pt"):
        assert extract(small, pictures, "--out", tmp_path / form, "--format", form) == 0
    row = index(tmp_path / "npy")[pictures.stem]
    values = np.load(tmp_path / "npy" / row["file"])
    assert values.dtype == np.float32 and values.shape == (row["features"], row["channels"])
    assert (row["first_centre"], row["stride"]) == (STRIDE / 2, STRIDE)
    info = probe(pictures)
    assert (row["fps"], row["stride_frames"], row["duration"]) == (info.fps, info.fps * STRIDE, info.duration)
    with np.load(tmp_path / "npz" / f"{pictures.stem}.npz") as found:
        assert np.array_equal(found["feats"], values) and found["stride"] == STRIDE
        assert np.allclose(found["centres"], (np.arange(len(values)) + 0.5) * STRIDE)
    assert np.array_equal(torch.load(tmp_path / "pt" / f"{pictures.stem}.pt").numpy(), values)
    assert "features of 1 of 1 videos" in said(capsys)


def test_one_file_for_all(small: SmallRun, tmp_path: Path) -> None:
    h5py = pytest.importorskip("h5py", reason="h5py is an extra")
    out = tmp_path / "f"
    assert extract(small, *small.validation, "--out", out, "--format", "h5") == 0
    with h5py.File(out / "features.hdf5") as found:
        assert {name: of.shape for name, of in found.items()} == {
            name: (row["features"], row["channels"]) for name, row in index(out).items()
        }
    assert not (out / "parts").exists()


def test_one_file_keeps_what_earlier_commands_made(small: SmallRun, tmp_path: Path, capsys: Captured) -> None:
    h5py = pytest.importorskip("h5py", reason="h5py is an extra")
    first, second = small.validation[:2]
    for video in (first, second, first):
        assert extract(small, video, "--out", tmp_path / "f", "--format", "h5") == 0
    assert "1 of 1 videos have their features already" in said(capsys)
    with h5py.File(tmp_path / "f" / "features.hdf5") as found:
        assert {name for name, _ in found.items()} == {first.stem, second.stem}


def test_a_video_of_the_same_name_does_not_replace_features(small: SmallRun, tmp_path: Path, capsys: Captured) -> None:
    out = tmp_path / "f"
    videos = []
    for cam, video in zip(("cam1", "cam2"), small.validation, strict=False):
        (tmp_path / cam).mkdir()
        videos.append(Path(shutil.copy(video, tmp_path / cam / "a.mp4")))
    assert extract(small, videos[0], "--out", out) == 0
    before = (out / "a.npy").read_bytes()
    assert extract(small, videos[1], "--out", out) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert f"{out} holds features of {videos[0]} under the name a, and {videos[1]} would replace them" in line
    assert (out / "a.npy").read_bytes() == before
    videos[0].rename(tmp_path / "a.mp4")  # the same video in another place
    assert extract(small, tmp_path / "a.mp4", "--out", out) == 0
    assert "1 of 1 videos have their features already" in said(capsys)


def test_annotations_that_leave_out_earlier_videos_are_told(small: SmallRun, tmp_path: Path, capsys: Captured) -> None:
    first, second = small.validation[:2]
    (tmp_path / "l.csv").write_text(f"video,start,end,label\n{first.stem},1,2,a\n{second.stem},1,2,a\n")
    words = ("--out", tmp_path / "f", "--layout", "opentad", "--annotations", tmp_path / "l.csv")
    assert extract(small, first, *words) == 0
    assert "which the annotations written now leave out" not in said(capsys)
    assert extract(small, second, *words) == 0
    assert "holds features of 1 video more, which the annotations written now leave out" in said(capsys).replace(
        "\n", " "
    )


def test_features_that_were_cut_off_are_made_anew(small: SmallRun, tmp_path: Path, capsys: Captured) -> None:
    video = small.validation[0]
    file = tmp_path / f"{video.stem}.npy"
    assert extract(small, video, "--out", tmp_path) == 0
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2])
    said(capsys)
    assert extract(small, video, "--out", tmp_path) == 0
    assert file.read_bytes() == whole
    told = said(capsys)
    assert "making it anew" in told and "already" not in told


def test_it_goes_on_and_notices_another_file(small: SmallRun, tmp_path: Path, capsys: Captured) -> None:
    folder, out = tmp_path / "v", tmp_path / "f"
    folder.mkdir()
    first, second = (Path(shutil.copy(video, folder)) for video in small.validation)
    assert extract(small, first, "--out", out) == 0
    (out / "index.jsonl").open("a").write('{"video": "cut off')
    before = (out / f"{first.stem}.npy").stat().st_mtime_ns
    said(capsys)
    assert extract(small, folder, "--out", out) == 0
    assert "1 of 2 videos have their features already" in said(capsys)
    assert (out / f"{first.stem}.npy").stat().st_mtime_ns == before
    shutil.copyfile(second, first)
    (folder / "bad.mp4").write_text("no video")
    assert extract(small, folder, "--out", out) == 1
    told = said(capsys)
    assert "1 of 3 videos have their features already" in told and "bad.mp4" in told and "1 skipped" in told
    assert np.array_equal(np.load(out / f"{first.stem}.npy"), np.load(out / f"{second.stem}.npy"))


def test_memory_does_not_hold_what_was_written(detector: Detector, small: SmallRun) -> None:
    with detector.session(mem_budget="4GB", device="cpu") as session:
        sizes = [len(part) for part in session.regular_features(small.validation[0]).parts]
    assert max(sizes) == 8 and len(sizes) > 1


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["{video}", "--layout", "opentad"], "--layout opentad needs the labels too: add --annotations FILE"),
        (
            ["{video}", "--layout", "actionformer", "--format", "pt"],
            "actionformer does not load it; give --format npy or h5",
        ),
        (["{video}", "--format", "csv"], "--format csv: plain does not load it"),
        (["{video}", "--annotations", "nowhere.json", "--layout", "opentad"], "nowhere.json cannot be read"),
        (["{video}", "--layout", "opentad", "--annotations", "{other}"], "labels none of the 1 videos"),
        (["nowhere.mp4"], "none of the 1 videos can be used"),
        (["{video}", "--out", "{taken}"], "is there already, and not by this command; name another folder"),
    ],
)
def test_bad_input_is_one_sentence(
    words: list[str], says: str, small: SmallRun, tmp_path: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    video = small.validation[0]
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / f"{video.stem}.npy").write_text("somebody's")
    (tmp_path / "other.csv").write_text("video,start,end,label\nelsewhere,1,2,a\n")
    places = {"video": video, "other": tmp_path / "other.csv", "taken": tmp_path / "taken"}
    filled = [word.format(**places) for word in words]
    assert extract(small, *filled, *([] if "--out" in words else ["--out", tmp_path / "f"])) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("error: ") and says in line
    assert (tmp_path / "taken" / f"{video.stem}.npy").read_text() == "somebody's"


def test_features_made_otherwise_are_not_mixed(small: SmallRun, tmp_path: Path, capsys: Captured) -> None:
    video, out = small.validation[0], tmp_path / "f"
    assert extract(small, video, "--out", out) == 0
    assert extract(small, video, "--out", out, "--format", "npz") == 2
    assert "holds features of another --format (npy)" in capsys.readouterr().err


@pytest.mark.parametrize("count", [3, 24, 100])
def test_rescaled_features_are_where_they_belong(count: int) -> None:
    stride, duration = 0.5, 12.0
    centres = (np.arange(24) + 0.5) * stride
    found = _rescaled(np.stack([centres, 2 * centres], 1).astype(np.float32), stride, duration, count)
    wanted = np.clip((np.arange(count) + 0.5) * duration / count, centres[0], centres[-1])
    np.testing.assert_allclose(found, np.stack([wanted, 2 * wanted], 1), rtol=1e-6)


# By the rules of those who load them. The features are those of two videos of 30 and 25 frames a second, and each one
# holds its own time, so that where a loader looks for a second can be read off.

ROWS = [
    {"video": "a", "features": 75, "channels": 2, "stride": 0.4, "duration": 30.0, "fps": 30.0},
    {"video": "b/c", "features": 50, "channels": 2, "stride": 0.4, "duration": 20.06, "fps": 25.0},
]
SEGMENTS = (Segment(1.0, 4.2, "run"), Segment(10.1, 12.3, "jump"))
LABELS = Labels(
    {"a": Video("a", "training", 30.0, SEGMENTS), "b/c": Video("b/c", "validation", 20.0, SEGMENTS[:1])},
    ("jump", "run"), (),
)  # fmt: skip


def time_features(row: dict[str, Any]) -> np.ndarray:
    centres = (np.arange(row["features"]) + 0.5) * row["stride"]
    return np.stack([centres, centres], 1).astype(np.float32)


@pytest.fixture
def features(tmp_path: Path) -> Iterator[Path]:
    for row in ROWS:
        (tmp_path / f"{row['video']}.npy").parent.mkdir(exist_ok=True)
        np.save(tmp_path / f"{row['video']}.npy", time_features(row))
    return tmp_path


def settings_of(path: Path) -> dict[str, Any]:
    """The keys and values of the piece for ActionFormer, which is YAML of the plainest kind."""
    text = "\n".join(line for line in path.read_text().splitlines() if not line.startswith("#"))
    text = text.replace("dataset: {", "").replace("\n}", "")
    pairs = (line.strip().rstrip(",").split(": ", 1) for line in text.splitlines() if ":" in line)
    return {key: ast.literal_eval(value) if value[:1] in "[-0123456789" else value for key, value in pairs}


@pytest.mark.parametrize("fixed", [False, True])
def test_actionformer_finds_seconds_where_they_are(fixed: bool, features: Path) -> None:
    write_layout("actionformer", features, "npy", ROWS, LABELS, fixed)
    config = settings_of(features / "actionformer.yaml")
    database = json.loads((features / "annotations.json").read_text())["database"]
    assert {act["label_id"] for of in database.values() for act in of["annotations"]} == set(
        range(config["num_classes"])
    )
    assert config["dataset_name"] == ("anet" if fixed else "thumos") and config["input_dim"] == 2
    for row in ROWS:
        of = database[row["video"]]
        assert of["subset"] in (*config["train_split"], *config["val_split"])
        series = np.load(Path(config["feat_folder"]) / (row["video"] + config["file_ext"]))
        if config["feat_stride"] > 0:
            stride, frames = config["feat_stride"], config["num_frames"]
        else:  # a series of one length over the whole video
            assert len(series) <= config["max_seq_len"]
            stride = frames = of["duration"] * of["fps"] / len(series)
        for act in of["annotations"]:
            for second in act["segment"]:
                place = second * of["fps"] / stride - 0.5 * frames / stride
                there = np.interp(place, np.arange(len(series)), series[:, 0])
                assert there == pytest.approx(second, abs=row["stride"] / 2 * fixed + 1e-3)


def loaded(path: Path) -> dict[str, Any]:
    """The variables of a configuration in Python."""
    found: dict[str, Any] = {}
    exec(path.read_text(), found)
    return found


def test_opentad_finds_seconds_where_they_are(features: Path) -> None:
    write_layout("opentad", features, "npy", ROWS, LABELS, False)
    config = loaded(features / "opentad.py")
    for part, subset in (("train", "training"), ("val", "validation"), ("test", "validation")):
        of = config["dataset"][part]
        assert (of["type"], of["subset_name"]) == ("ThumosPaddingDataset", subset)
        database = json.loads(Path(of["ann_file"]).read_text())["database"]
        classes = Path(of["class_map"]).read_text().split("\n")[:-1]
        stride = of["feature_stride"] * of["sample_stride"]
        for row in ROWS:
            video = database[row["video"]]
            series = np.load(of["data_path"] + row["video"] + ".npy")
            for act in video["annotations"]:
                assert act["label"] in classes
                for second in act["segment"]:
                    frame = int(second / video["duration"] * video["frame"])  # whole frames
                    place = (frame - of["offset_frames"]) / stride
                    there = np.interp(place, np.arange(len(series)), series[:, 0])
                    assert there == pytest.approx(second, abs=row["stride"] / 16 + 1e-3)
                    back = (place * stride + of["offset_frames"]) / (video["frame"] / video["duration"])
                    assert back == pytest.approx(second, abs=row["stride"] / 16 + 1e-9)


def test_opentad_has_series_of_one_length(features: Path) -> None:
    rows = [{**row, "features": 75, "stride": row["duration"] / 75} for row in ROWS]
    write_layout("opentad", features, "npz", rows, LABELS, True)
    train = loaded(features / "opentad.py")["dataset"]["train"]
    assert (train["type"], train["resize_length"]) == ("AnetResizeDataset", 75)
    assert train["pipeline"][0] == {"type": "LoadFeats", "feat_format": "npz"}


def test_mmaction2_finds_seconds_where_they_are(small: SmallRun, tmp_path: Path) -> None:
    video = small.validation[0]
    (tmp_path / "a.csv").write_text(f"video,start,end,label,subset\n{video.stem},1.5,3.0,run,val\n")
    out = tmp_path / "f"
    words = ["--layout", "mmaction2", "--length", "20", "--annotations", tmp_path / "a.csv", "--out", out]
    assert extract(small, video, *words) == 0
    config = loaded(out / "mmaction2.py")
    series = np.loadtxt(out / f"{video.stem}.csv", dtype=np.float32, delimiter=",", skiprows=1).T
    assert series.shape == (config["model"]["feat_dim"], config["model"]["temporal_dim"]) == (64, 20)
    (entry,) = json.loads(Path(config["val_dataloader"]["dataset"]["ann_file"]).read_text()).values()
    corrected = entry["feature_frame"] / entry["duration_frame"] * entry["duration_second"]
    assert corrected == pytest.approx(probe(video).duration)
    assert entry["annotations"] == [{"segment": [1.5, 3.0], "label": "run"}]


def test_a_configuration_of_the_users_stays(features: Path) -> None:
    (features / "opentad.py").write_text("mine = 1\n")
    told = write_layout("opentad", features, "npy", ROWS, LABELS, False)
    assert any("opentad.py is there and differs" in sentence for sentence in told)
    assert (features / "opentad.py").read_text() == "mine = 1\n"


def test_labels_without_subsets_are_divided(small: SmallRun, tmp_path: Path) -> None:
    rows = "".join(f"{video.stem},1,2,run\n" for video in small.validation)
    (tmp_path / "a.csv").write_text("video,start,end,label\n" + rows)
    words = ["--layout", "actionformer", "--annotations", tmp_path / "a.csv", "--out", tmp_path / "f"]
    assert extract(small, small.validation[0].parent, *words) == 0
    database = json.loads((tmp_path / "f" / "annotations.json").read_text())["database"]
    assert set(database) == {video.stem for video in small.validation}
    assert {of["subset"] for of in database.values()} == {"training", "validation"}


@pytest.mark.parametrize("as_folder", [True, False])
def test_labels_of_files_of_one_name(as_folder: bool, tmp_path: Path) -> None:
    files = [tmp_path / "v" / folder / "0001.mp4" for folder in ("cam1", "cam2")]
    for file in files:
        file.parent.mkdir(parents=True)
        file.touch()
    given, names = [str(tmp_path / "v")] if as_folder else [*map(str, files)], unique_names(files)
    table = tmp_path / "a.csv"
    table.write_text("video,start,end,label,subset\ncam2/0001,1,2,run,val\ncam1/0001.mp4,3,4,sit,train\n")
    videos = labels_for(table, given, names).videos
    assert {name: video.segments for name, video in videos.items()} == {
        names[files[0]]: (Segment(3, 4, "sit"),), names[files[1]]: (Segment(1, 2, "run"),)
    }  # fmt: skip
    for rows, says in (("0001,1,2,run,val\n", "'0001' may be any of 2"),
                       ("cam1/0001,1,2,run,val\ncam1/0001.mp4,1,2,run,val\n", "mean one|meant by two")):  # fmt: skip
        table.write_text(f"video,start,end,label,subset\n{rows}")
        with pytest.raises(InputError, match=says):
            labels_for(table, given, names)


def test_whole_videos_have_one_length(detector: Detector, small: SmallRun) -> None:
    data = replace(detector.config.data, window=None)
    other = Detector(detector.encoder, detector.head, detector.classes, replace(detector.config, data=data))
    with other.session(mem_budget="4GB", device="cpu") as session:
        for video in small.validation:
            of = session.regular_features(video)
            assert sum(map(len, of.parts)) == of.count == 8
            assert of.stride == pytest.approx(of.info.duration / 8)

"""The command `detect`: what it writes, what it says, how it ends."""

from __future__ import annotations

import csv
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import av
import pytest
import torch
from detectors import ROOT, SmallRun, joined
from patience import PATIENCE

from lofi_fast import gpu
from lofi_fast.data.annotations import FormatOptions, load_annotations
from lofi_fast.data.video import probe
from lofi_fast.detect import main, unique_names
from lofi_fast.detections import draw_timeline
from lofi_fast.metrics import load_predictions
from lofi_fast.model import Detector
from lofi_fast.model_file import MODEL

pytestmark = pytest.mark.usefixtures("torchs_own_allocator")
ENVIRONMENT = dict(os.environ)  # of processes of their own: as it was before any test

Captured = pytest.CaptureFixture[str]


def detect(run: SmallRun, *words: object) -> int:
    return main([str(run.folder), *map(str, words), "--mem-budget", "4GB"])


def refused(captured: Captured) -> str:
    """The one sentence on stderr."""
    (line,) = captured.readouterr().err.splitlines()
    assert line.startswith("error: ")
    return line


def test_a_folder_with_a_bad_file(small: SmallRun, tmp_path: Path, capsys: Captured) -> None:
    folder, out = tmp_path / "videos", tmp_path / "deep" / "found"
    (folder / "inner").mkdir(parents=True)
    first, second = small.validation
    shutil.copy(first, folder / first.name)
    shutil.copy(second, folder / "inner" / second.name)
    (folder / "inner" / "bad.mkv").write_text("no video")
    (folder / "notes.txt").write_text("no video either")
    assert detect(small, folder, "--out", out) == 1
    said = capsys.readouterr().out
    assert "skipped: video" in said and "bad.mkv" in said and "2 of 3 videos are done, 1 skipped" in said
    stems = [path.stem for path in small.validation]
    suffixes = (".png", ".srt", ".vtt")
    assert sorted(path.name for path in out.iterdir()) == sorted(
        ["detections.csv", "detections.json", *(stem + suffix for stem in stems for suffix in suffixes)]
    )
    assert (out / "detections.json").read_bytes() == (small.folder / "predictions.json").read_bytes()
    with (out / "detections.csv").open(newline="") as file:
        table = list(csv.DictReader(file))
    found = load_predictions(out / "detections.json")
    assert [(row["video"], row["label"]) for row in table] == [(n, label) for n in found for _, _, label, _ in found[n]]
    assert all((out / f"{stem}.png").read_bytes().startswith(b"\x89PNG") for stem in stems)
    assert {path.name for path in folder.rglob("*")} == {"inner", "notes.txt", "bad.mkv", first.name, second.name}


def test_nothing_but_earlier_results_of_the_same_videos_is_replaced(
    small: SmallRun, tmp_path: Path, capsys: Captured
) -> None:
    first, second = small.validation
    folder = tmp_path / "videos"
    folder.mkdir()
    shutil.copy(first, folder)
    for name in (f"{first.stem}.srt", f"{first.stem}.png", "detections.json", "detections.csv"):
        mine = folder / name
        mine.write_text("mine")
        assert detect(small, folder, "--out", folder) == 2
        assert f"{mine} is there already, and not by this command; name another folder" in refused(capsys)
        assert {path.name for path in folder.iterdir()} == {first.name, name} and mine.read_text() == "mine"
        mine.unlink()
    for _ in range(2):
        assert detect(small, folder, "--out", folder, "--format", "json,csv,srt,boris,elan") == 0
        capsys.readouterr()
        for tool in ("elan", "boris"):
            (corrected,) = folder.glob({"elan": "*.eaf", "boris": "*.boris"}[tool])
            assert detect(small, folder, "--out", folder, "--format", tool) == 2
            assert f"{corrected} is there already, and may have been corrected" in refused(capsys)
            corrected.unlink()

    # What the same detector found in other videos stays, and what another found is not taken for its own.
    table = folder / "detections.json"
    alone = json.loads(table.read_text())["results"]
    assert detect(small, second, "--out", folder, "--format", "json,csv") == 0
    capsys.readouterr()
    both = json.loads(table.read_text())["results"]
    assert list(both) == [first.stem, second.stem] and both[first.stem] == alone[first.stem]
    rows = list(csv.DictReader((folder / "detections.csv").read_text().splitlines()))
    assert len(rows) == sum(map(len, both.values()))
    draw_timeline(folder / f"{first.stem}.png", "by another", [], 1.0, "another")
    before = {path: path.read_bytes() for path in folder.iterdir()}
    for form in ("json", "csv"):
        assert detect(small, second, "--out", folder, "--format", form) == 2
        assert f"detections.{form} holds what was found in {first.stem}, which would be lost" in refused(capsys)
    assert {path: path.read_bytes() for path in folder.iterdir()} == before


def test_half_a_file_is_used_and_told(small: SmallRun, tmp_path: Path, capsys: Captured) -> None:
    whole, half = small.validation[0], tmp_path / "half.mp4"
    with av.open(str(whole)) as source, av.open(str(half), "w", options={"movflags": "faststart"}) as target:
        stream = target.add_stream_from_template(source.streams.video[0])
        for packet in source.demux(video=0):
            if packet.dts is not None:
                packet.stream = stream
                target.mux(packet)
    half.write_bytes(half.read_bytes()[: half.stat().st_size * 6 // 10])
    assert detect(small, half, whole, "--out", tmp_path / "found", "--format", "json") == 0
    (note,) = [line for line in capsys.readouterr().out.splitlines() if "is it cut off" in line]
    assert note.startswith(f"note: {half}: the file says that it lasts 2")
    told: list[str] = []
    with Detector.load(small.folder).session(mem_budget="4GB", device="cpu", say=told.append) as session:
        session.regular_features(half)
    assert note in told


def test_what_is_asked_for_is_written(small: SmallRun, tmp_path: Path) -> None:
    video, out = small.validation[0], tmp_path / "found"
    whole = load_predictions(small.folder / "predictions.json")[video.stem]
    least = whole[5][3]
    flags = ["--format", "vtt,JSON", "--min-score", f"{least:.9f}", "--top-k", "4", "--subtitle-score", "0"]
    assert detect(small, video, "--out", out, *flags) == 0
    assert {path.name for path in out.iterdir()} == {"detections.json", f"{video.stem}.png", f"{video.stem}.vtt"}
    assert load_predictions(out / "detections.json") == {video.stem: whole[:4]}
    assert len(re.findall(" --> ", (out / f"{video.stem}.vtt").read_text())) == 4


def test_files_of_labelling_tools_hold_what_subtitles_show(small: SmallRun, tmp_path: Path) -> None:
    video, out = small.validation[0], tmp_path / "found"
    flags = ["--format", "json,elan,boris,label-studio,via", "--subtitle-score", "0.02"]
    assert detect(small, video, "--out", out, *flags) == 0
    shown = [row for row in load_predictions(out / "detections.json")[video.stem] if row[3] >= 0.02]
    assert shown
    half_a_frame = 0.5 / probe(video).fps
    for name, unit in (
        (f"{video.stem}.eaf", 1e-3), ("detections.boris", 1e-3), ("detections.via.json", 1e-3),
        ("detections.label-studio.json", half_a_frame + 1e-6),
    ):  # fmt: skip
        (found,) = load_annotations(out / name, options=FormatOptions(videos=video.parent), clip=False).videos
        # soft-NMS may leave a segment twice with two scores, and labels have it once
        ours = sorted({(label, start, end) for start, end, label, _ in shown})
        assert found.name == video.stem and len(found.segments) == len(ours)
        theirs = sorted((s.label, s.start, s.end) for s in found.segments)
        assert [label for label, *_ in theirs] == [label for label, *_ in ours]
        for mine, other in zip(ours, theirs, strict=True):
            assert other[1:] == pytest.approx(mine[1:], abs=unit)


def test_the_command_keeps_the_scores_that_a_detector_keeps(small: SmallRun, tmp_path: Path) -> None:
    video, out = small.validation[0], tmp_path / "found"
    assert detect(small, video, "--out", out, "--top-k", "100000") == 0
    found = Detector.load(small.folder).detect(video, mem_budget="4GB", top_k=100000)
    assert load_predictions(out / "detections.json") == {
        video.stem: [(item.start, item.end, item.label, item.score) for item in found]
    }


def test_a_model_file_and_the_same_video_twice(small: SmallRun, tmp_path: Path, capsys: Captured) -> None:
    model = shutil.copy(small.folder / MODEL, tmp_path / "elsewhere.safetensors")
    video = small.validation[0]
    words = [model, video, video.parent / "." / video.name, "--out", tmp_path / "found", "--mem-budget", "4GB"]
    assert main([str(word) for word in words]) == 0
    assert "1 of 1 videos are done" in capsys.readouterr().out
    assert list(load_predictions(tmp_path / "found" / "detections.json")) == [video.stem]


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ([], "VIDEO|FOLDER is missing"),
        (["{bad}"], "bad.mp4"),
        (["{bad}", "nowhere.mp4"], "none of the 2 videos can be used; first: video"),
        (["{empty}"], "no video in this folder"),
        (["{video}", "--format", "mp3"], '--format "mp3": name one or more of json,csv,srt,vtt'),
        (["{video}", "--min-scor", "1"], "perhaps you meant --min-score"),
        (["{video}", "--top-k", "0"], "--top-k 0"),
        (["{video}", "--min-score", "2"], "--min-score 2"),
        (["{video}", "--mem-budget", "50MB"], "nothing fits"),
        (["{video}", "--mem-budget", "much"], "is not an amount of memory"),
        (["{video}", "--out", "{file}"], "cannot write there"),
        (["{video}", "--out", "/proc/found"], "--out /proc/found: cannot write there"),
    ],
)
def test_bad_input_is_one_sentence_and_leaves_nothing(
    words: list[str], says: str, small: SmallRun, tmp_path: Path, capsys: Captured
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "bad.mp4").write_text("no video")
    (tmp_path / "file").write_text("a file")
    places = {name: tmp_path / name for name in ("empty", "file")}
    before = sorted(tmp_path.rglob("*"))
    given = [word.format(video=small.validation[0], bad=tmp_path / "bad.mp4", **places) for word in words]
    assert main([str(small.folder), "--out", str(tmp_path / "a" / "found"), *given]) == 2
    assert says in refused(capsys)
    assert sorted(tmp_path.rglob("*")) == before


def test_a_card_that_cannot_be_used_is_told_of(
    small: SmallRun, tmp_path: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu, "unused", lambda: "Tesla T4 is here, but PyTorch cannot use it")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert detect(small, small.validation[0], "--out", tmp_path / "found", "--format", "json") == 0
    assert "warning: Tesla T4 is here, but PyTorch cannot use it. Detecting on the CPU" in capsys.readouterr().out
    assert detect(small, small.validation[0], "--out", tmp_path / "asked", "--format", "json", "--device", "cpu") == 0
    assert "Tesla" not in capsys.readouterr().out


def test_a_folder_without_a_model(tmp_path: Path, small: SmallRun, capsys: Captured) -> None:
    assert main([str(tmp_path), str(small.validation[0]), "--out", str(tmp_path / "found")]) == 2
    assert "no run folder" in refused(capsys)
    assert list(tmp_path.iterdir()) == []


def test_results_of_equal_names_do_not_overwrite_each_other() -> None:
    paths = [Path(p) for p in ("x/a.mp4", "x/a.mkv", "y/a.mp4", "z/y/a.mp4", "x/B.mp4", "y/b.MP4", "x/c.mp4", "x/c")]
    names = unique_names(paths)
    assert names[Path("x/a.mkv")] == "a.mkv"
    assert names[Path("x/a.mp4")] == "x-a.mp4"
    assert len({name.casefold() for name in names.values()}) == len(paths)
    assert not any("/" in name for name in names.values())


def test_help_and_typos_import_no_torch(small: SmallRun) -> None:
    script = (
        "import sys; from lofi_fast.__main__ import main\n"
        "try: main(sys.argv[1:])\n"
        "except SystemExit: pass\n"
        "sys.exit('torch' in sys.modules)"
    )
    for words in (["detect", "--help"], ["detect", "run", "video", "--nonsense"]):
        command = [sys.executable, "-c", script, *words]
        assert subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, capture_output=True).returncode == 0


def test_interrupted_it_keeps_what_it_found(small: SmallRun, tmp_path: Path) -> None:
    long = joined(small.validation, tmp_path / "z-long.mp4", times=60)
    out = tmp_path / "found"
    command = [sys.executable, "-m", "lofi_fast", "detect", str(small.folder), str(small.validation[0]), str(long)]
    with subprocess.Popen(
        [*command, "--out", str(out), "--mem-budget", "4GB"], cwd=ROOT, env=ENVIRONMENT, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    ) as process:  # fmt: skip
        deadline = time.monotonic() + PATIENCE
        while not (out / f"{small.validation[0].stem}.png").exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        time.sleep(1)
        process.send_signal(signal.SIGINT)
        said, errors = process.communicate(timeout=PATIENCE)
    assert process.returncode == 130, errors
    assert "interrupted; 1 of 2 videos are done" in said and "Traceback" not in errors
    assert list(json.loads((out / "detections.json").read_text())["results"]) == [small.validation[0].stem]
    assert not list(out.glob("*.partial"))

"""`prepare` fills the frame cache as training would, from any number of processes, and looks after it."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from av.video.frame import VideoFrame
from patience import PATIENCE

import lofi_fast
from lofi_fast import __main__ as program
from lofi_fast.config import Config
from lofi_fast.data.catalogue import Catalogue
from lofi_fast.data.inventory import inventory, record_use
from lofi_fast.data.survey import survey
from lofi_fast.errors import InputError
from lofi_fast.prepare import Shard
from lofi_fast.presets import configured
from lofi_fast.run.folder import locked
from lofi_fast.settings import read

ROOT = Path(__file__).resolve().parents[1]
COUNT = 16
SETTINGS = ("--preset=small", "--fidelity=16x48", "--frame-stride=1", "--window=video", "--device=cpu")


def write_video(path: Path, num_frames: int, size: int = 96) -> None:
    generator = np.random.default_rng(num_frames)
    picture = generator.integers(0, 256, (size, size, 3), dtype=np.uint8)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=10, options={"preset": "ultrafast", "crf": "30"})
        stream.width, stream.height, stream.pix_fmt = size, size, "yuv420p"
        for i in range(num_frames):
            container.mux(stream.encode(VideoFrame.from_ndarray(np.roll(picture, i, axis=1), format="rgb24")))
        container.mux(stream.encode(None))


def write_labels(path: Path, names: Sequence[str]) -> None:
    database = {
        name: {
            "subset": "validation" if i % 4 == 3 else "training",
            "annotations": [{"segment": [2, 6], "label": "a"}],
        }
        for i, name in enumerate(names)
    }
    path.write_text(json.dumps({"database": database}))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Videos v00.mp4 ... in videos/, and labels.json."""
    folder = tmp_path_factory.mktemp("data")
    (folder / "videos").mkdir()
    for i in range(COUNT):
        write_video(folder / "videos" / f"v{i:02}.mp4", 120 + 10 * i)
    write_labels(folder / "labels.json", [f"v{i:02}" for i in range(COUNT)])
    return folder


def flags(data: Path, cache: Path) -> list[str]:
    return [
        "--annotations", str(data / "labels.json"), "--videos", str(data / "videos"), "--cache", str(cache), *SETTINGS
    ]  # fmt: skip


def prepare(data: Path, cache: Path, *more: str) -> int:
    return program.main(["prepare", *flags(data, cache), *more])


def started(data: Path, cache: Path, *more: str, **environment: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "lofi_fast", "prepare", *flags(data, cache), *more],
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def contents(cache: Path) -> dict[str, bytes]:
    """Of all files that belong to entries, by their place."""
    found = (path for path in (cache / "frames").rglob("*") if path.suffix in (".mov", ".npz"))
    return {str(path.relative_to(cache)): path.read_bytes() for path in found}


def leftovers(cache: Path) -> list[Path]:
    return [path for path in cache.rglob("*.partial") if path.is_file()]


@pytest.fixture(scope="module")
def whole(data: Path) -> Path:
    """The cache that one process makes."""
    cache = data / "whole"
    assert prepare(data, cache) == 0
    return cache


def test_forecast_progress_and_what_was_done(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert prepare(data, tmp_path) == 0
    said = capsys.readouterr().out
    forecast = lofi_fast.check(
        annotations=data / "labels.json", videos=data / "videos", preset="small", fidelity="16x48", frame_stride=1,
        window="video",
    ).to_json()["cache_bytes"]  # fmt: skip
    assert f"0 of {COUNT} videos are there" in said
    assert f"to decode: {COUNT} videos, about {forecast / 1e6:,.1f} MB, about " in said
    assert f"frame cache: {COUNT}/{COUNT}" in said
    assert f"{COUNT} videos are in the frame cache, {COUNT} of them decoded now" in said
    made = contents(tmp_path)
    assert len(made) == 2 * COUNT and all(Path(name).parent.name == Path(name).stem[-10:-8] for name in made)
    times = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.npz")}
    assert prepare(data, tmp_path) == 0
    assert "0 of them decoded now" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.npz")} == times


def test_eight_processes_of_which_three_are_killed(data: Path, whole: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    running = [started(data, cache, "--threads=1") for _ in range(8)]
    while not list(cache.rglob("*.npz")):
        assert any(process.poll() is None for process in running)
        time.sleep(0.005)
    for process in [process for process in running if process.poll() is None][:3]:
        process.kill()
    for process in running:
        said, _ = process.communicate(timeout=PATIENCE)
        assert process.returncode in (0, -signal.SIGKILL), said
    assert [process.returncode for process in running].count(-signal.SIGKILL) == 3
    assert contents(cache) == contents(whole)
    assert len(inventory(cache / "frames")) == COUNT
    again = lofi_fast.prepare(
        annotations=data / "labels.json", videos=data / "videos", cache=cache, preset="small", fidelity="16x48",
        frame_stride=1, window="video", verify=True,
    )  # fmt: skip
    assert (again.complete, again.made, again.damaged, again.skipped) == (COUNT, 0, (), ())
    assert leftovers(cache) == []


@pytest.mark.parametrize("by", ["flag", "rank"])
def test_shards_are_the_whole_together(by: str, data: Path, whole: Path, tmp_path: Path) -> None:
    if by == "flag":
        running = [started(data, tmp_path, "--shard", f"{k}/3", "--threads=1") for k in (1, 2, 3)]
    else:
        running = [started(data, tmp_path, RANK=str(k), WORLD_SIZE="3", LOCAL_WORLD_SIZE="3") for k in range(3)]
    said = [process.communicate(timeout=PATIENCE)[0] for process in running]
    assert [process.returncode for process in running] == [0, 0, 0], said
    decoded = [int(text.split(" of them decoded now")[0].rsplit(maxsplit=1)[1]) for text in said]
    assert sorted(decoded) == [5, 5, 6], "no video twice"
    assert contents(tmp_path) == contents(whole)


def test_every_name_is_in_one_shard() -> None:
    names = [f"n{i}" for i in random.Random(0).sample(range(100), 23)]
    for count in (1, 2, 7, 23, 40):
        shares = [Shard(k, count).names(names) for k in range(1, count + 1)]
        assert sorted(name for share in shares for name in share) == sorted(names)
        assert max(map(len, shares)) - min(map(len, shares)) <= 1
    ranks = [Shard(2, 3).of_rank(rank, 4).names(names) for rank in range(4)]
    others = [Shard(k, 3).of_rank(rank, 4).names(names) for k in (1, 3) for rank in range(4)]
    assert sorted(name for share in (*ranks, *others) for name in share) == sorted(names)


def test_damaged_entries_are_named_and_made_anew(
    data: Path, whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert prepare(data, tmp_path) == 0
    pictures, index = (next((tmp_path / "frames").rglob(name)) for name in ("v03-*.mov", "v05-*.npz"))
    content = bytearray(pictures.read_bytes())
    content[len(content) // 2] ^= 0x55
    pictures.write_bytes(content)
    index.write_bytes(b"x")
    capsys.readouterr()
    assert prepare(data, tmp_path, "--verify") == 0
    said = capsys.readouterr().out
    assert str(pictures) in said and str(index) in said and said.count("it is made anew") == 2
    assert f"{COUNT - 2} of {COUNT} videos are there" in said
    assert contents(tmp_path) == contents(whole)
    assert prepare(data, tmp_path, "--verify") == 0
    assert "it is made anew" not in capsys.readouterr().out


def test_broken_videos_are_named_and_the_rest_is_done(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mixed = tmp_path / "mixed"
    (mixed / "videos").mkdir(parents=True)
    for i in range(5):
        os.link(data / "videos" / f"v{i:02}.mp4", mixed / "videos" / f"v{i:02}.mp4")
    (mixed / "videos" / "broken.mp4").write_bytes(b"no video" * 100)
    write_labels(mixed / "labels.json", [*(f"v{i:02}" for i in range(5)), "absent", "broken"])
    assert prepare(mixed, tmp_path / "cache") == 1
    said = capsys.readouterr().out
    assert "skipped: absent: no video file of this name" in said and "skipped: broken: video" in said
    assert "5 videos are in the frame cache, 5 of them decoded now" in said and "2 skipped" in said
    told = []
    for number in (1, 2, 3):
        prepare(mixed, tmp_path / "cache", "--shard", f"{number}/3")
        told.append(capsys.readouterr().out.count("skipped: "))
    assert sum(told) == 2, "by one shard each"
    rank = started(mixed, tmp_path / "cache", RANK="0", WORLD_SIZE="2")
    assert "skipped: " in rank.communicate(timeout=PATIENCE)[0] and rank.returncode == 0, (
        "or its launcher ends the others"
    )


def test_training_afterwards_decodes_nothing(data: Path, whole: Path, tmp_path: Path) -> None:
    made = {path: path.stat().st_mtime_ns for path in whole.rglob("*.npz")}
    code = (
        "import sys, lofi_fast.data.cache as cache\n"
        "cache.write_pictures = lambda *_: sys.exit('decoded again')\n"
        "cache._start_worker = lambda *_: sys.exit('decoded again')\n"
        "from lofi_fast.train import main; sys.exit(main(sys.argv[1:]))"
    )
    tiny = ["--width=8", "--batch=2", "--min-cut=1", "--joint-epochs=0", "--stages=joint", "--threads=1"]
    run = subprocess.run(
        [sys.executable, "-c", code, *flags(data, whole), *tiny, "--out", str(tmp_path / "run")],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    assert {path: path.stat().st_mtime_ns for path in whole.rglob("*.npz")} == made
    entries = inventory(whole / "frames")
    assert {entry.runs for entry in entries} == {(str(tmp_path / "run"),)}


def test_a_start_afterwards_opens_no_entry(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was made is in the catalogue, but for what was made so late that it might still change unnoticed."""
    monkeypatch.setattr("lofi_fast.data.catalogue.FRESH", -1.0)  # as if every entry had aged
    settings: dict[str, Any] = {"preset": "small", "fidelity": "16x48", "frame_stride": 1, "window": "video"}
    where = {"annotations": data / "labels.json", "videos": data / "videos"}
    assert lofi_fast.prepare(**where, cache=tmp_path, **settings).made == COUNT
    frames = tmp_path / "frames"
    config = configured(read(Config, {**where, **settings}), cuda=lambda: False)
    found = survey(config, where["annotations"], where["videos"], known=Catalogue(frames))
    assert len(found.remembered(frames)) == COUNT


def test_list_and_clean(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cache = tmp_path / "cache"
    assert prepare(data, cache) == 0
    frames = cache / "frames"
    entries = inventory(frames)
    first, second = tmp_path / "first", tmp_path / "second"
    second.mkdir()
    record_use(frames, first, [str(entry.stem) for entry in entries[:10]])
    record_use(frames, second, [str(entry.stem) for entry in entries[6:12]])
    capsys.readouterr()

    assert program.main(["prepare", "--cache", str(cache), "--list"]) == 0
    said = capsys.readouterr().out
    size = sum(path.stat().st_size for path in frames.rglob("v*-*"))
    assert f"{COUNT} entries, {size / 1e6:,.1f} MB" in said
    assert f"{first} (gone): 10 entries" in said and f"{second}: 6 entries" in said and "of no run: 4 entries" in said

    old = time.time() - 10 * 86_400
    for entry in entries:
        for suffix in (".npz", ".mov"):
            os.utime(f"{entry.stem}{suffix}", (old, old))
    assert program.main(["prepare", "--cache", str(cache), "--clean-days", "5"]) == 0
    assert "4 entries removed" in capsys.readouterr().out
    assert program.main(["prepare", "--cache", str(cache), "--clean-run", str(first)]) == 0
    assert "6 entries removed" in capsys.readouterr().out, "those of the other run stay"
    assert {entry.stem for entry in inventory(frames)} == {entry.stem for entry in entries[6:12]}
    assert program.main(["prepare", "--cache", str(cache), "--clean-run", str(tmp_path / "third")]) == 2
    assert str(second) in capsys.readouterr().err
    assert program.main(["prepare", "--cache", str(cache), "--clean-run", str(second), "--clean-days", "5"]) == 0
    assert "0 entries removed" in capsys.readouterr().out, "it began today"


@pytest.mark.parametrize("how", ["--clean-run", "--clean-days"])
def test_what_a_training_reads_stays(how: str, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A training that began long ago is no reason to take its entries from it."""
    assert prepare(data, tmp_path / "cache") == 0
    frames, run = tmp_path / "cache" / "frames", tmp_path / "run"
    entries = inventory(frames)
    run.mkdir()
    record_use(frames, run, [str(entry.stem) for entry in entries[:10]])
    for path in (*frames.glob("*/*.npz"), *frames.glob("*/*.mov"), *frames.glob("uses/*")):
        os.utime(path, (1, 1))
    command = ["prepare", "--cache", str(tmp_path / "cache"), how, str(run) if how == "--clean-run" else "5"]
    with locked(run):
        assert program.main(command) == 0
    assert f"10 of these entries stay: {run} is trained in" in capsys.readouterr().out
    assert {entry.stem for entry in inventory(frames)} >= {entry.stem for entry in entries[:10]}
    assert program.main(command) == 0
    assert "10 entries removed" in capsys.readouterr().out, "it has ended"


def test_files_of_killed_processes_go_and_those_of_living_ones_stay(data: Path, tmp_path: Path) -> None:
    partial = tmp_path / "frames" / "partial"
    partial.mkdir(parents=True)
    from lofi_fast.data.cache import _machine

    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    names = {
        "mine": f"a-0123456789.mov.{_machine()}-{os.getpid()}.partial",
        "ended": f"a-0123456789.mov.{_machine()}-{ended.pid}.partial",
        "elsewhere": f"a-0123456789.mov.{'0' * 8}-{ended.pid}.partial",
        "elsewhere, long ago": f"b-0123456789.mov.{'0' * 8}-{ended.pid}.partial",
    }
    for name in names.values():
        (partial / name).touch()
    os.utime(partial / names["elsewhere, long ago"], (1, 1))
    assert prepare(data, tmp_path) == 0
    assert {path.name for path in partial.iterdir()} == {names["mine"], names["elsewhere"]}


def test_entries_of_a_flat_folder_are_used(data: Path, whole: Path, tmp_path: Path) -> None:
    frames = tmp_path / "frames"
    frames.mkdir()
    for place, content in contents(whole).items():
        (frames / Path(place).name).write_bytes(content)
    done = lofi_fast.prepare(
        annotations=data / "labels.json", videos=data / "videos", cache=tmp_path, preset="small", fidelity="16x48",
        frame_stride=1, window="video",
    )  # fmt: skip
    assert done.complete == COUNT
    assert not list(frames.glob("*.npz")) and contents(tmp_path) == contents(whole)


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (["--shard", "0/4"], "--shard 0/4: the shards of 4 are numbered from 1 to 4"),
        (["--shard", "5/4"], "--shard 5/4: the shards of 4 are numbered from 1 to 4"),
        (["--shard", "one"], '--shard "one": write which of how many, like 3/64'),
        (["--list", "--verify"], "--verify fills the cache"),
        (["--clean-days", "-1"], "--clean-days -1: must be a positive number"),
        (["--annotations", "/nowhere.json"], "--annotations /nowhere.json cannot be read"),
        (["--videos", "/nowhere"], "--videos /nowhere is not a folder"),
        (["--cache", "/proc/cache"], "/proc/cache"),
        (["--shards", "1/2"], "--shards is no flag of this command; perhaps you meant --shard"),
    ],
)
def test_bad_input_is_one_sentence(
    more: list[str], says: str, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert prepare(data, tmp_path / "cache", *more) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and says in error and error.count("\n") == 1
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize("environment", [{"RANK": "2", "WORLD_SIZE": "2"}, {"WORLD_SIZE": "two"}, {"RANK": "-1"}])
def test_an_environment_that_no_launcher_makes(
    environment: dict[str, str], data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(InputError, match="in the environment"):
        lofi_fast.prepare(annotations=data / "labels.json", videos=data / "videos", cache=tmp_path)


def test_data_are_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    assert program.main(["prepare"]) == 2
    assert "add --annotations FILE --videos DIR" in capsys.readouterr().err
    with pytest.raises(InputError, match="there is no frame cache"):
        inventory(Path("/nowhere"))


def test_the_command_needs_no_torch() -> None:
    code = "import sys, lofi_fast.prepare; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ, "PYTHONPATH": str(ROOT)})

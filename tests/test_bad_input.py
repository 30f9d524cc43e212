"""Bad input, through the real command line: one sentence, status 2, and nothing half written.

Commands run in this process, for speed, except where the process itself matters: the budget and the command's stderr.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
from av.video.frame import VideoFrame

import lofi_fast
from lofi_fast.encoder.tsm import TSMEncoder
from lofi_fast.errors import InputError
from lofi_fast.presets import small
from lofi_fast.run import checkpoint
from lofi_fast.run.folder import choose_folder, locked
from lofi_fast.train import main

ROOT = Path(__file__).resolve().parents[1]
THREADS = str(min(2, os.cpu_count() or 1))
TINY = (
    "--preset small --fidelity 8x32 --window video --frame-stride 1 --width 8 --pretrain-epochs 1 --joint-epochs 1 "
    f"--head-epochs 1 --batch 2 --min-cut 1 --device cpu --threads {THREADS}"
).split()
SECONDS, RATE = 6, 8
LABELLED: list[dict[str, Any]] = [
    {"segment": [1.0, 2.5], "label": "jump"},
    {"segment": [3.5, 5.0], "label": "run"},
]

Database = dict[str, dict[str, Any]]


def write_video(path: Path, num_frames: int, seed: int) -> Path:
    """A 64x48 H.264 video of noise that moves: its frames differ, and its cache is larger than most."""
    picture = np.random.default_rng(seed).integers(0, 256, (48, 64, 3), dtype=np.uint8)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=RATE, options={"preset": "ultrafast", "crf": "28"})
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for i in range(num_frames):
            container.mux(stream.encode(VideoFrame.from_ndarray(np.roll(picture, i, axis=1), format="rgb24")))
        container.mux(stream.encode(None))
    return path


@dataclass(frozen=True)
class Data:
    """Three training videos and one for validation, each with both classes, and a frame cache that tests share."""

    videos: Path
    annotations: Path
    database: Database
    cache: Path


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Data:
    folder = tmp_path_factory.mktemp("data")
    videos = folder / "videos"
    videos.mkdir()
    subsets = {"a": "training", "b": "training", "c": "training", "d": "validation"}
    for seed, name in enumerate(subsets):
        write_video(videos / f"{name}.mp4", SECONDS * RATE, seed)
    database: Database = {name: {"subset": subset, "annotations": LABELLED} for name, subset in subsets.items()}
    annotations = folder / "annotations.json"
    annotations.write_text(json.dumps({"database": database}))
    return Data(videos, annotations, database, folder / "cache")


@dataclass(frozen=True)
class Outcome:
    status: int
    out: str
    err: str

    def refused(self, *parts: str) -> str:
        """The sentence of a refusal, which must be all that is on stderr and hold each of `parts`."""
        assert self.status == 2, self.out + self.err
        lines = self.err.splitlines()
        assert len(lines) == 1 and lines[0].startswith("error: "), self.err
        for part in parts:
            assert part in lines[0]
        return lines[0]


Train = Callable[..., Outcome]


def command(
    data: Data, out: Path, *flags: str, annotations: Path | None = None, videos: Path | None = None
) -> list[str]:
    """The tiny training, with more flags, or other data, or another cache (the last of two equal flags counts)."""
    return [
        *("--annotations", str(annotations or data.annotations), "--videos", str(videos or data.videos)),
        *("--cache", str(data.cache), *TINY, "--out", str(out), *flags),
    ]


@pytest.fixture
def train(data: Data, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> Iterator[Train]:
    """Runs a command in this process; afterwards no temporary file may be left, whatever happened."""

    def run(*flags: str, out: Path = tmp_path / "run", **other: Path) -> Outcome:
        capfd.readouterr()
        try:
            status = main(command(data, out, *flags, **other))
        except SystemExit as stop:  # argparse's own way out
            status = int(stop.code or 0)
        captured = capfd.readouterr()
        return Outcome(status, captured.out, captured.err)

    yield run
    leftovers = [path for folder in (tmp_path, data.cache) for path in folder.rglob("*.partial*")]
    assert not leftovers


def contents(folder: Path) -> dict[str, tuple[int, bytes]]:
    """Every file below a folder with its time of change and its bytes."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): (path.stat().st_mtime_ns, path.read_bytes()) for path in files}


def events(folder: Path, kind: str) -> list[dict[str, Any]]:
    lines = (folder / "log.jsonl").read_text().splitlines()
    return [event for event in map(json.loads, lines) if event["event"] == kind]


# Flags


@pytest.mark.parametrize(
    ("flags", "parts"),
    [
        (["--mem-budget", "11 apples"], ['"11 apples"', "11GB", "--mem-budget"]),
        (["--mem-budget", "0GB"], ["--mem-budget"]),
        (["--mem-budget", "120%"], ["120%", "--mem-budget"]),
        (["--fidelity", "100"], ['--fidelity "100"', "100x224"]),
        (["--fidelity", "8x15"], ['--fidelity "8x15"', "even"]),
        (["--fidelity", "2x32"], ["--fidelity", "at least 4 snippets"]),
        (["--stages", "joint,heads"], ['--stages "joint,heads"', "pretrain, joint, head, eval"]),
        (["--stages", ","], ["--stages"]),
        (["--tiou", "0.5,high"], ["--tiou", "0.5,high"]),
        (["--tiou", "0.5:0:0.9"], ["--tiou", "0.5:0:0.9"]),
        (["--tiou", "1.5"], ["--tiou", "1.5"]),
        (["--encoder-weights", "/nowhere/w.pt"], ["--encoder-weights /nowhere/w.pt", "no such file"]),
        (["--video-scores", "/nowhere/s.json"], ["--video-scores /nowhere/s.json", "no such file"]),
        (["--frame-stride", str(10**20)], ["--frame-stride", "smaller"]),
        (["--joint-lr", "nan"], ["--joint-lr"]),
        (["--window", "soon"], ['--window "soon"', "seconds"]),
        (["--width", "wide"], ["--width", "'wide'"]),
        (["--preset", "enormous"], ["--preset", "small"]),
        (["--short-cycle", "3", "--pattern", "spatial"], ["--short-cycle 3", "--pattern cyclic"]),
        (["--frobnicate"], ["--frobnicate", "--help"]),
        (["--resume"], ["run", "no run to resume", "--out"]),
    ],
    ids=" ".join,
)
def test_a_bad_flag(train: Train, tmp_path: Path, flags: list[str], parts: list[str]) -> None:
    train(*flags).refused(*parts)
    assert list(tmp_path.iterdir()) == []


def test_several_processes(train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "4")
    train().refused("one of 4 processes", "RANK", "torchrun", "plain python")
    assert list(tmp_path.iterdir()) == []


def test_the_process_itself_says_one_sentence_and_ends_with_2(data: Data, tmp_path: Path) -> None:
    done = run_process(command(data, tmp_path / "run", "--mem-budget", "11 apples"))
    done.refused('"11 apples"', "--mem-budget")
    assert done.out == ""
    assert list(tmp_path.iterdir()) == []


def run_process(flags: list[str], program: Sequence[str] = ("-m", "lofi_fast.train")) -> Outcome:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))}
    done = subprocess.run(
        [sys.executable, *program, *flags], capture_output=True, text=True, env=environment, check=False
    )
    return Outcome(done.returncode, done.stdout, done.stderr)


def test_a_budget_below_the_tensors_of_the_smallest_step_is_refused_before_decoding(
    train: Train, tmp_path: Path
) -> None:
    cache = tmp_path / "fresh"
    done = train("--width", "512", "--mem-budget", "2GB", "--cache", str(cache))
    done.refused("--mem-budget 2GB", "nothing fits", "needs")
    assert "looking at the videos" in done.out and "frame cache:" not in done.out
    assert not list(cache.rglob("*.npz"))


def test_a_budget_too_small_for_anything(data: Data, tmp_path: Path) -> None:
    done = run_process(command(data, tmp_path / "run", "--mem-budget", "300MB"))
    done.refused("nothing fits", "0.30 GB", "holds", "--mem-budget", "--fidelity")
    assert not (tmp_path / "run").exists()


# Packages

PYAV = ("error: PyAV, which reads and writes videos, cannot be imported (", "): pip install av")
DALI = ("error: NVIDIA DALI, which decodes the frame cache, cannot be imported (", "): pip install nvidia-dali-cuda130")


@pytest.mark.parametrize(("module", "sentence"), [("av", PYAV), ("nvidia.dali", DALI)], ids=["PyAV", "DALI"])
def test_a_decoder_that_is_missing_is_named_before_anything_is_made(
    data: Data, tmp_path: Path, module: str, sentence: tuple[str, str]
) -> None:
    code = f"import sys; sys.modules[{module!r}] = None; import lofi_fast.train; sys.exit(lofi_fast.train.main())"
    done = run_process(command(data, tmp_path / "run"), ("-c", code))
    said = done.refused(module)
    assert said.startswith(sentence[0]) and said.endswith(sentence[1])
    assert done.out == "" and list(tmp_path.iterdir()) == []


WITHOUT_DECODERS = """
import sys

sys.modules["av"] = sys.modules["nvidia.dali"] = None

from pathlib import Path

import numpy as np

import lofi_fast.presets, lofi_fast.stages.joint, lofi_fast.train
from lofi_fast.data import demo
from lofi_fast.data.cache import CacheRequest, prepare
from lofi_fast.data.dataset import load_dataset
from lofi_fast.data.pipeline import FramePipeline
from lofi_fast.data.video import VideoInfo, decode, probe
from lofi_fast.errors import InputError
from lofi_fast.kernels import library
from lofi_fast.run.state import environment

print("imported", *environment("CPU", "float32", library.describe())["packages"])
annotations, videos, folder = map(Path, sys.argv[1:])
video = videos / "a.mp4"
info = VideoInfo(video, np.arange(8.0), 8.0, 64, 48, 0, "h264", "yuv420p", 1, 1)
config = lofi_fast.presets.demo()
for ask in (
    lambda: probe(video),
    lambda: decode(info, np.arange(2)),
    lambda: prepare([CacheRequest("a", info, np.arange(8))], folder / "cache", 32, workers=1),
    lambda: load_dataset(config, annotations, videos, folder / "cache", lambda done, total, name: None),
    lambda: demo.generate(folder / "demo", num_training=1, num_validation=0, workers=1),
    lambda: FramePipeline(1),
):
    try:
        ask()
    except InputError as error:
        print(f"error: {error}")
"""


def test_without_decoders_all_but_decoding_is_there(data: Data, tmp_path: Path) -> None:
    """Training imports and says what it runs on; each way to a frame ends in the sentence, and skips no video."""
    done = run_process([str(data.annotations), str(data.videos), str(tmp_path)], ("-c", WITHOUT_DECODERS))
    assert done.status == 0, done.err
    imported, *refusals = done.out.splitlines()
    assert imported.startswith("imported torch ")
    for refusal, (begins, ends) in zip(refusals, [*[PYAV] * 5, DALI], strict=True):
        assert refusal.startswith(begins) and refusal.endswith(ends), refusal
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and not path.name.endswith("lock")]


# Annotations


def changed(change: Callable[[Database], object]) -> Callable[[Database], str]:
    def text(database: Database) -> str:
        mine = json.loads(json.dumps(database))  # a deep copy would keep the list that all videos share
        change(mine)
        return json.dumps({"database": mine})

    return text


def in_subset(subset: str, *names: str) -> Callable[[Database], str]:
    return changed(lambda database: [database[name].update(subset=subset) for name in names])


def with_segment(segment: list[float]) -> Callable[[Database], str]:
    """The second segment of video b, which is segment 1."""
    return changed(lambda database: database["b"]["annotations"][1].update(segment=segment))


def labelled_as(segment: list[float], *names: str) -> Callable[[Database], str]:
    """All segments of some videos replaced by one."""
    one = [{"segment": segment, "label": "run"}]
    return changed(lambda database: [database[name].update(annotations=one) for name in names])


@pytest.mark.parametrize(
    ("suffix", "content", "parts"),
    [
        pytest.param("json", '{"database": {', ["not valid JSON", "line 1"], id="malformed JSON"),
        pytest.param("json", "", ["not valid JSON"], id="empty file"),
        pytest.param("json", "[]", ["ActivityNet form", '"database"'], id="JSON of another form"),
        pytest.param("json", b"\xff\xfe\x00", ["--annotations", "UTF-8"], id="not text"),
        pytest.param("txt", "a 1 2 run", ["--annotations", ".json", ".csv"], id="another kind of file"),
        pytest.param("csv", "video,start,label\na,1,run\n", ["lacks end", "video,start,end,label"], id="CSV, no end"),
        pytest.param("csv", "a,1,2,run\n", ["lacks video, start, end, label"], id="CSV without a first line"),
        pytest.param("csv", "video,start,end,label\na,1,2\n", ["line 2", "3 cells"], id="CSV, short row"),
        pytest.param("csv", "video,start,end,label\na,nan,2,run\n", ["line 2", "video a", "finite"], id="CSV, NaN"),
        pytest.param("json", with_segment([5, 3]), ["video b, segment 1", "5.0 s", "3.0 s"], id="start after end"),
        pytest.param(
            "json", with_segment([float("nan"), 3]), ["video b, segment 1", "nan", "finite"], id="NaN seconds"
        ),
        pytest.param(
            "json",
            changed(lambda database: database["d"]["annotations"][0].update(label="swim")),
            ["'swim'", "validation", "training", "--annotations"],
            id="class seen only in validation",
        ),
        pytest.param("json", in_subset("validation", "a", "b", "c"), ["training", "--annotations"], id="no training"),
        pytest.param("json", in_subset("testing", "a", "b", "c", "d"), ["subsets in --annotations"], id="testing only"),
        pytest.param(
            "json",
            changed(lambda database: [database[name].update(annotations=[]) for name in "abc"]),
            ["no usable training video has a segment", "--annotations"],
            id="training without segments",
        ),
        pytest.param(
            "json",
            labelled_as([50, 60], "a", "b", "c"),
            ["3 of 5 segments lie outside their videos", "must be in seconds"],
            id="training segments after the end",
        ),
        pytest.param(
            "json",
            changed(lambda database: [database.update({f"other-{name}": database.pop(name)}) for name in "abcd"]),
            ["4 skipped", "other-a: no video file of this name", "--videos"],
            id="no matching video",
        ),
    ],
)
def test_bad_annotations(train: Train, data: Data, tmp_path: Path, suffix: str, content: Any, parts: list[str]) -> None:
    path = tmp_path / f"labels.{suffix}"
    text = content(data.database) if callable(content) else content
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    train(annotations=path).refused(str(path), *parts)
    assert list(tmp_path.iterdir()) == [path]


def test_a_missing_annotations_file(train: Train, tmp_path: Path) -> None:
    train(annotations=tmp_path / "none.json").refused("--annotations", str(tmp_path / "none.json"))
    assert list(tmp_path.iterdir()) == []


def test_a_missing_videos_folder(train: Train, tmp_path: Path) -> None:
    train(videos=tmp_path / "none").refused("--videos", str(tmp_path / "none"), "not a folder")
    assert list(tmp_path.iterdir()) == []


def test_a_paper_preset_from_random_weights_is_warned_of_before_all_else(train: Train, tmp_path: Path) -> None:
    assert "WARNING: --preset thumos" in train("--preset", "thumos", videos=tmp_path / "none").out
    assert "WARNING" not in train(videos=tmp_path / "none").out


def test_segments_that_no_snippet_meets(train: Train, data: Data, tmp_path: Path) -> None:
    path = tmp_path / "labels.json"
    path.write_text(labelled_as([1.0, 1.01], "a", "b", "c", "d")(data.database))
    train(annotations=path).refused("no training segment", "8 snippets", "--fidelity", "--window")
    assert list(tmp_path.iterdir()) == [path]


def test_validation_without_segments_trains_and_says_that_nothing_is_evaluated(
    train: Train, data: Data, tmp_path: Path
) -> None:
    path = tmp_path / "labels.json"
    path.write_text(changed(lambda database: database["d"].update(annotations=[]))(data.database))
    done = train("--stages", "head,eval", annotations=path)
    assert (done.status, done.err) == (0, "")
    assert "nothing to evaluate" in done.out
    assert not (tmp_path / "run" / "metrics.json").exists()


# Videos


def test_bad_videos_are_skipped_counted_and_reported(train: Train, data: Data, tmp_path: Path) -> None:
    videos = tmp_path / "videos"
    shutil.copytree(data.videos, videos)
    good = (data.videos / "a.mp4").read_bytes()
    third = len(good) // 3
    (videos / "empty.mp4").write_bytes(b"")
    (videos / "noise.mp4").write_bytes(np.random.default_rng(0).bytes(50_000))
    (videos / "cut.mp4").write_bytes(good[: 2 * third])
    (videos / "damaged.mp4").write_bytes(good[:third] + b"\xaa" * (third // 2) + good[third + third // 2 :])
    write_video(videos / "short.mp4", 5, seed=9)
    reasons = {
        "absent": "no video file of this name",
        "empty": "empty file",
        "noise": "cannot be decoded",
        "cut": "cannot be decoded",
        "damaged": "fails after",
        "short": "5 frames are less than one snippet of 8",
    }
    bad = {name: {"subset": "training", "annotations": LABELLED} for name in reasons}
    path = tmp_path / "labels.json"
    path.write_text(json.dumps({"database": {**bad, **data.database}}))

    done = train(annotations=path, videos=videos)
    assert (done.status, done.err) == (0, "")
    run = tmp_path / "run"
    logged = {event["video"]: event["reason"] for event in events(run, "skipped")}
    assert logged.keys() == reasons.keys()
    for name, reason in reasons.items():
        assert reason in logged[name]
        assert f"skipped: {name}: {logged[name]}" in done.out
    assert "3 training videos" in done.out and "6 videos skipped" in done.out
    assert [event["skipped"] for event in events(run, "data")] == [6]
    assert (run / "metrics.json").exists()
    assert {path.stem for path in (run / "features").glob("*.npy")} == set("abcd")


def test_a_video_that_cannot_be_read_is_missed_in_the_official_map(train: Train, data: Data, tmp_path: Path) -> None:
    database = data.database | {"gone": {"subset": "validation", "duration": SECONDS, "annotations": LABELLED * 2}}
    path = tmp_path / "labels.json"
    path.write_text(json.dumps({"database": database}))
    done = train(annotations=path)
    assert (done.status, done.err) == (0, "")
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    official = lofi_fast.evaluate(path, tmp_path / "run" / "predictions.json", tiou="thumos")
    assert metrics["average_map_as_given"] == official.average
    assert (official.num_videos, official.num_segments) == (metrics["videos"] + 1, metrics["segments"] + 4)
    assert "weights of the last epoch (1)" in done.out and "have the same rung, 8 snippets x 32 px" in done.out
    assert f"({metrics['videos'] + 1} videos, of which 1 were not read, {metrics['segments'] + 4} segments)" in done.out


def test_all_videos_bad(train: Train, data: Data, tmp_path: Path) -> None:
    videos = tmp_path / "videos"
    videos.mkdir()
    for name, content in (("a", b""), ("b", b"x" * 999), ("c", b"\0" * 5000), ("d", b"")):
        (videos / f"{name}.mp4").write_bytes(content)
    train(videos=videos).refused("4 skipped", f"video {videos / 'a.mp4'} is an empty file", "--videos")
    assert list(tmp_path.iterdir()) == [videos]


def test_the_only_training_videos_bad(train: Train, data: Data, tmp_path: Path) -> None:
    videos = tmp_path / "videos"
    shutil.copytree(data.videos, videos)
    for name in "abc":
        (videos / f"{name}.mp4").write_bytes(b"")
    train(videos=videos).refused("no usable training video", "3 skipped", "empty file")
    assert list(tmp_path.iterdir()) == [videos]


# Files given with flags


def test_encoder_weights_that_are_none(train: Train, tmp_path: Path) -> None:
    weights = tmp_path / "weights.pt"
    weights.write_text("not weights")
    train("--encoder-weights", str(weights)).refused(str(weights), "not a PyTorch checkpoint")
    assert list(tmp_path.iterdir()) == [weights]


def test_encoder_weights_of_another_model(train: Train, tmp_path: Path) -> None:
    weights = tmp_path / "weights.pt"
    torch.save({"fc.weight": torch.zeros(2, 2), "conv1.weight": torch.zeros(3, 3)}, weights)
    train("--encoder-weights", str(weights)).refused(str(weights), "tsm_r18", "--encoder-weights")
    assert list(tmp_path.iterdir()) == [weights]


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("{", ["not valid JSON", "--video-scores"]),
        ('{"a": {"run": 1}}', ["'d'"]),
        ('{"d": {"swim": 1}}', ["--video-scores", "none of the 2 classes"]),
        ('{"d": {"run": "likely"}}', ["video d", "'run'", "'likely'"]),
    ],
    ids=["malformed", "without the video", "of other classes", "not numbers"],
)
def test_bad_video_scores_are_refused_before_the_training(
    train: Train, tmp_path: Path, text: str, parts: list[str]
) -> None:
    scores = tmp_path / "scores.json"
    scores.write_text(text)
    train("--video-scores", str(scores)).refused(str(scores), *parts)
    assert list(tmp_path.iterdir()) == [scores]


# Folders that cannot be written


def mounted(folder: Path, options: str) -> None:
    """Mount a tmpfs, or skip the test, saying so, where that is not permitted."""
    folder.mkdir(exist_ok=True)
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)], capture_output=True, text=True, check=False
    )
    if done.returncode:
        pytest.skip(f"a tmpfs cannot be mounted here: {done.stderr.strip()}")


@pytest.fixture
def disk(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], Path]]:
    """A small file system of its own, made with the mount options given."""
    if sys.platform != "linux" or shutil.which("mount") is None:
        pytest.skip("no mount command here")
    folder = tmp_path_factory.mktemp("disk")

    def make(options: str) -> Path:
        mounted(folder, options)
        return folder

    yield make
    subprocess.run(["umount", str(folder)], capture_output=True, check=False)


@pytest.fixture(params=["below a file", "a file", "read-only mount", "immutable", "no permission"])
def unwritable(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A path at which no folder can be made."""
    folder = tmp_path_factory.mktemp("unwritable")
    if request.param in ("below a file", "a file"):
        (folder / "file").write_text("kept")
        yield folder / "file" / "x" if request.param == "below a file" else folder / "file"
        assert (folder / "file").read_text() == "kept"
    elif request.param == "read-only mount":
        make = request.getfixturevalue("disk")
        yield make("ro,size=1m") / "x"
    elif request.param == "immutable":
        done = subprocess.run(["chattr", "+i", str(folder)], capture_output=True, text=True, check=False)
        if done.returncode:
            pytest.skip(f"a folder cannot be made immutable here: {done.stderr.strip()}")
        yield folder / "x"
        subprocess.run(["chattr", "-i", str(folder)], check=True)
    else:
        if os.geteuid() == 0:
            pytest.skip("permissions do not bind root")
        folder.chmod(0o555)
        yield folder / "x"
        folder.chmod(0o755)


def test_out_cannot_be_written(train: Train, unwritable: Path) -> None:
    train(out=unwritable).refused(str(unwritable), "cannot write", "--out")


def test_cache_cannot_be_written(train: Train, unwritable: Path, tmp_path: Path) -> None:
    train("--cache", str(unwritable)).refused(str(unwritable), "cannot be written", "--cache")
    assert list(tmp_path.iterdir()) == []


def test_disk_of_out_is_full_from_the_start(train: Train, disk: Callable[[str], Path]) -> None:
    folder = disk("size=4k")
    (folder / "filler").write_bytes(b"x" * 4096)
    train(out=folder / "run").refused(str(folder / "run"), "No space left", "--out")
    assert [path.name for path in folder.iterdir()] == ["filler"]


def test_disk_of_out_fills_up_at_the_log(train: Train, disk: Callable[[str], Path]) -> None:
    folder = disk("size=1m,nr_inodes=3")  # the mount's root, the run folder, its config
    train(out=folder / "run").refused(str(folder / "run"), "No space left", "--out")
    assert list(folder.iterdir()) == []


def test_disk_of_out_fills_up_at_a_checkpoint_and_the_run_goes_on_once_there_is_room(
    train: Train, disk: Callable[[str], Path]
) -> None:
    folder = disk("size=64k")
    run = folder / "run"
    train(out=run).refused(str(run / "checkpoints" / "last.pt"), "free some space", "--out", "--resume")
    assert not list(folder.rglob("*.partial*"))
    assert not list(run.rglob("*.pt"))
    train(out=run).refused(str(run), "already holds a run", "--resume")
    subprocess.run(["mount", "-o", "remount,size=64m", str(folder)], check=True)
    done = train("--resume", out=run)
    assert (done.status, done.err) == (0, "")
    assert "starting again" in done.out
    assert (run / "metrics.json").exists()


@pytest.mark.parametrize(
    ("size", "parts"),
    [("64k", ["GB free"]), ("300k", ["disk is full"])],
    ids=["by the estimate", "while it is written"],
)
def test_disk_of_cache_is_full(
    train: Train, disk: Callable[[str], Path], tmp_path: Path, size: str, parts: list[str]
) -> None:
    folder = disk(f"size={size}")
    train("--cache", str(folder)).refused(str(folder), "--cache", *parts)
    assert not list(folder.rglob("*.partial*"))
    assert list(tmp_path.iterdir()) == []


def test_a_log_that_may_grow_no_further_is_one_sentence(data: Data, run: Path) -> None:
    """As under `ulimit -f`, where a write has no name to tell of."""
    limit = (run / "log.jsonl").stat().st_size
    code = f"import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))\n"
    code += "from lofi_fast.train import main; sys.exit(main(sys.argv[1:]))"
    done = subprocess.run(
        [sys.executable, "-c", code, "--resume", str(run)], cwd=ROOT, text=True, capture_output=True, timeout=300
    )
    Outcome(done.returncode, done.stdout, done.stderr).refused(str(run / "log.jsonl"), "File too large", "--out")


@pytest.mark.parametrize("name", ["log.jsonl", "plan.json", "data.json"])
def test_a_folder_in_the_place_of_a_file_of_the_run(train: Train, run: Path, name: str) -> None:
    (run / name).unlink()
    (run / name).mkdir()
    train("--resume").refused(str(run / name), "Is a directory", "name another place")


# Runs that are there already


@pytest.fixture(scope="session")
def finished(data: Data, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A complete run."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    assert main(command(data, folder)) == 0
    return folder


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    """A copy of it, to be spoilt."""
    return Path(shutil.copytree(finished, tmp_path / "run"))


def test_out_holds_a_run(train: Train, run: Path) -> None:
    before = contents(run)
    train().refused(str(run), "already holds a run", "--resume", "--out")
    assert contents(run) == before


@pytest.mark.parametrize("left", ["checkpoints/previous.pt", "model.safetensors", "metrics.json"])
def test_a_run_whose_config_is_gone_is_not_trained_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, left: str
) -> None:
    """Whether --out names it or the preset does."""
    monkeypatch.chdir(tmp_path)
    run = tmp_path / "runs" / "small"
    (run / left).parent.mkdir(parents=True)
    (run / left).touch()
    assert choose_folder(small(), resume=False) == Path("runs/small-2")
    with pytest.raises(InputError, match=r"whose config.json is gone; put it back .*another --out"):
        choose_folder(replace(small(), out=str(run)), resume=False)


@pytest.mark.parametrize(
    ("flags", "parts"),
    [
        (["--width", "16"], ["--width 8, not 16"]),
        (["--fidelity", "16x32"], ["--fidelity 8x32, not 16x32"]),
        (["--seed", "3"], ["--seed 0, not 3"]),
        (["--width", "16", "--no-flip"], ["--flip true, not false; --width 8, not 16"]),
        (["--preset", "demo"], ["--preset small, not demo"]),
        (["--joint-epochs", "2"], ["--joint-epochs 1, not 2", "rests on it"]),
        (["--head-epochs", "0"], ["--head-epochs 0", "has trained for 1 already"]),
    ],
    ids=lambda value: value[0] if value[0].startswith("--") else "",
)
def test_resume_with_other_flags(train: Train, run: Path, flags: list[str], parts: list[str]) -> None:
    before = contents(run)
    train("--resume", *flags).refused(str(run), "--resume", *parts)
    assert contents(run) == before


@pytest.mark.parametrize(
    ("position", "flags"),
    [
        ({"stage": "head", "epoch": 2, "step": 0}, ["--head-epochs", "1"]),
        ({"stage": "head", "epoch": 1, "step": 1}, ["--head-epochs", "1"]),
        ({"stage": "joint", "epoch": 1, "step": 1}, ["--joint-epochs", "1"]),
    ],
    ids=["past", "in the one after", "joint"],
)
def test_resume_for_fewer_epochs_than_were_trained(
    train: Train, run: Path, position: dict[str, Any], flags: list[str]
) -> None:
    """The numbers would be told as those of an epoch that they are not of."""
    last = run / "checkpoints" / "last.pt"
    checkpoint.save_atomic(checkpoint.load(last) | {"position": position}, last)
    before = contents(run)
    train("--resume", *flags).refused(str(run), f"{flags[0]} 1", "has trained for 2 already", "give --resume 2")
    assert contents(run) == before


@pytest.mark.parametrize("given", [[], ["--seed", "3"]], ids=["with its own settings", "with the same in flags"])
def test_resume_where_the_config_is_not_the_one_that_was_trained_with(
    train: Train, run: Path, given: list[str], capfd: pytest.CaptureFixture[str]
) -> None:
    """Edited by hand, or another run's."""
    path = run / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"seed": 3}))
    before = contents(run)
    capfd.readouterr()
    assert main(["--resume", str(run), *given]) == 2
    (line,) = capfd.readouterr().err.splitlines()
    assert "config.json is not what last.pt was trained with" in line and "--seed 0, not 3" in line
    assert contents(run) == before


def test_resume_goes_on_where_the_data_has_moved(
    train: Train, data: Data, run: Path, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Copies in another folder, named from where the command is given, and of other times of change."""
    monkeypatch.chdir(tmp_path)
    (run / "metrics.json").unlink()
    (run / "checkpoints" / "previous.pt").replace(run / "checkpoints" / "last.pt")
    position = checkpoint.load(run / "checkpoints" / "last.pt")["position"]
    assert position["stage"] == "head", "there is something left to train"
    shutil.copytree(data.videos, "moved", copy_function=shutil.copyfile)
    Path("labels.json").write_text(json.dumps({"database": data.database}, indent=1))
    done = train("--resume", "--cache", "cache", annotations=Path("labels.json"), videos=Path("moved"))
    assert (done.status, done.err) == (0, "")
    for name in ("metrics.json", "predictions.json", "data.json"):
        assert (run / name).read_bytes() == (finished / name).read_bytes(), name
    config = json.loads((run / "config.json").read_text())
    assert (config["data"]["annotations"], config["data"]["videos"]) == ("labels.json", "moved")
    train("--resume", annotations=Path("none.json")).refused("--annotations", "none.json")


LESS = {"annotations": LABELLED[:1]}


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        (
            lambda database: database["b"].update(LESS),
            ["1 video has other segments (b: 1 segments, before 2; [3.5, 5] run is gone)"],
        ),
        (
            lambda database: database["c"]["annotations"][0].update(segment=[1, 3.5]),
            ["1 video has other segments (c: 2 segments, before 2; [1, 2.5] jump is gone)"],
        ),
        (lambda database: [database[name].update(LESS) for name in "ab"], ["2 videos have other segments (a: 1 "]),
        (lambda database: database.pop("c"), ["1 video is gone (c)"]),
        (lambda database: database["a"].update(subset="validation"), ["1 video is in another subset (a: validation"]),
        (
            lambda database: [database[name]["annotations"][0].update(label="hop") for name in "abcd"],
            ["4 videos have other segments", "1 class less", "1 class more (hop)"],
        ),
        (lambda database: database.update(a=database.pop("a")), ["the videos are in another order"]),
    ],
    ids=["fewer segments", "another time", "two videos", "no video", "another subset", "another class", "order"],
)
def test_resume_refuses_labels_that_were_edited(
    train: Train, data: Data, run: Path, tmp_path: Path, change: Any, parts: list[str]
) -> None:
    path = tmp_path / "labels.json"
    path.write_text(changed(change)(data.database))
    if parts[0].startswith("1"):  # else only the evaluation is left, and that is of the labels too
        (run / "checkpoints" / "previous.pt").replace(run / "checkpoints" / "last.pt")
    before = contents(run)
    train("--resume", annotations=path).refused(str(run), "is not what it was started with", "--out", *parts)
    assert {name: of for name, of in contents(run).items() if name != "log.jsonl"} == {
        name: of for name, of in before.items() if name != "log.jsonl"
    }


def test_resume_refuses_labels_that_were_edited_also_where_the_record_is_gone(
    train: Train, data: Data, run: Path, tmp_path: Path
) -> None:
    path = tmp_path / "labels.json"
    path.write_text(changed(lambda database: database["b"].update(LESS))(data.database))
    (run / "data.json").unlink()
    train("--resume", annotations=path).refused("is not what it was started with", "data.json", "cannot be read")
    assert train("--resume").status == 0
    assert (run / "data.json").exists(), "it is written again"


def test_resume_says_that_a_video_is_another_file_and_trains_no_further_on_it(
    train: Train, data: Data, run: Path, tmp_path: Path
) -> None:
    videos = Path(shutil.copytree(data.videos, tmp_path / "videos"))
    write_video(videos / "b.mp4", SECONDS * RATE, 9)
    for _ in range(2):
        done = train("--resume", "--cache", str(tmp_path / "cache"), videos=videos)
        assert (done.status, done.err) == (0, ""), "only the evaluation is left"
        assert "since the run was trained, 1 video is another file (b: " in done.out
    (run / "checkpoints" / "previous.pt").replace(run / "checkpoints" / "last.pt")
    refusal = train("--resume", "--cache", str(tmp_path / "cache"), videos=videos)
    refusal.refused("1 video is another file (b: ", f"{SECONDS * RATE} frames", "--out")


def test_resume_goes_on_where_weights_and_scores_have_moved_and_names_those_that_were_edited(
    train: Train, tmp_path: Path
) -> None:
    weights, scores = tmp_path / "w.pth", tmp_path / "s.json"
    torch.save(TSMEncoder("tsm_r18", 8).state_dict(), weights)
    scores.write_text(json.dumps({"d": {"jump": 0.5, "run": 0.5}}))
    run = tmp_path / "run"
    assert train("--encoder-weights", str(weights), "--video-scores", str(scores)).status == 0
    whole = (run / "metrics.json").read_bytes()
    assert set(json.loads((run / "data.json").read_text())["files"]) == {"--encoder-weights", "--video-scores"}
    last, previous = (run / "checkpoints" / f"{name}.pt" for name in ("last", "previous"))
    assert checkpoint.load(previous)["position"]["stage"] == "head"
    shutil.copyfile(previous, last)
    moved = [weights.rename(tmp_path / "moved.pth"), scores.rename(tmp_path / "moved.json")]
    flags = ["--resume", "--encoder-weights", str(moved[0]), "--video-scores", str(moved[1])]
    train("--resume").refused("--encoder-weights", str(weights), "no such file")
    done = train(*flags)
    assert (done.status, done.err) == (0, "")
    assert (run / "metrics.json").read_bytes() == whole

    moved[1].write_text(json.dumps({"d": {"jump": 0.9, "run": 0.1}}))
    assert "since the run was trained, --video-scores is another file" in train(*flags).out, "evaluation alone is left"
    shutil.copyfile(previous, last)
    train(*flags).refused("is not what it was started with, --video-scores is another file")
    torch.save(TSMEncoder("tsm_r18", 8).state_dict(), moved[0])
    train(*flags).refused("--encoder-weights is another file; --video-scores is another file")


def test_resume_takes_another_cache_and_other_cuts(train: Train, run: Path, tmp_path: Path) -> None:
    done = train("--resume", "--cache", str(tmp_path / "cache"), "--min-cut", "2", "--max-cut", "8")
    assert (done.status, done.err) == (0, "")


@pytest.mark.parametrize(
    "content", ["", "{", "[]", "3", "[" * 3000, None], ids=["empty", "torn", "list", "number", "deep", "gone"]
)
def test_resume_with_a_spoilt_config(train: Train, run: Path, content: str | None) -> None:
    (run / "config.json").unlink()
    if content is not None:
        (run / "config.json").write_text(content)
    before = contents(run)
    train("--resume").refused(str(run), "no run to resume", "config.json", "put it back as it was, by: ", "--out")
    assert contents(run) == before


def test_a_spoilt_config_is_put_back_by_the_command_that_the_refusal_names(train: Train, run: Path) -> None:
    path = run / "config.json"
    before = path.read_bytes()
    path.write_text("{")
    refused = train("--resume")
    refused.refused("no run to resume", "put it back as it was, by: python -c")
    command = refused.err.partition(", by: python ")[2].partition(", or name")[0]
    subprocess.run(f"{sys.executable} {command}", shell=True, check=True)
    assert json.loads(path.read_bytes()) == json.loads(before)
    done = train("--resume")
    assert (done.status, done.err) == (0, "")


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        (lambda config: config.pop("lofi_fast"), ["config.json", "before", "train again"]),
        (lambda config: config["joint"].update(nesterov=True), ['"joint.nesterov" is no setting']),
    ],
    ids=["of the version before", "with an unknown setting"],
)
def test_resume_of_a_run_of_another_version(
    train: Train, run: Path, change: Callable[[dict[str, Any]], object], parts: list[str]
) -> None:
    config = json.loads((run / "config.json").read_text())
    change(config)
    (run / "config.json").write_text(json.dumps(config))
    before = contents(run)
    train("--resume").refused(str(run), *parts)
    assert contents(run) == before


@pytest.mark.parametrize(
    "spoil",
    [
        lambda whole: b"garbage",
        lambda whole: b"",
        lambda whole: whole[: len(whole) // 2],
        lambda whole: bytes(len(whole)),
    ],
    ids=["garbage", "empty", "half", "zeros"],
)
def test_resume_with_a_spoilt_checkpoint_goes_on_from_the_one_before(
    train: Train, run: Path, finished: Path, spoil: Callable[[bytes], bytes]
) -> None:
    last = run / "checkpoints" / "last.pt"
    last.write_bytes(spoil(last.read_bytes()))
    (run / "metrics.json").unlink()
    metrics = (finished / "metrics.json").read_bytes()
    done = train("--resume")
    assert (done.status, done.err) == (0, "")
    assert (
        str(last) in done.out and f"going on from the checkpoint before it, {last.parent / 'previous.pt'}" in done.out
    )
    assert (run / "metrics.json").read_bytes() == metrics

    for path in last.parent.glob("*.pt"):
        path.write_bytes(spoil(path.read_bytes()))
    before = contents(run)
    train("--resume").refused(str(last), "checkpoint", "--out")
    assert contents(run) == before


def test_resume_with_a_file_of_something_else(train: Train, run: Path) -> None:
    last = run / "checkpoints" / "last.pt"
    torch.save([1, 2, 3], last)
    last.with_name("previous.pt").unlink()
    before = contents(run)
    train("--resume").refused(str(last), "not a checkpoint of a lofi_fast run")
    assert contents(run) == before


def test_resume_with_both_checkpoints_gone_overwrites_nothing(train: Train, run: Path) -> None:
    for name in ("last.pt", "previous.pt"):
        (run / "checkpoints" / name).unlink()
    before = contents(run)
    train("--resume").refused("last.pt", "no checkpoint", "--out")
    assert contents(run) == before


def test_two_processes_do_not_train_in_one_folder(train: Train, run: Path, tmp_path: Path) -> None:
    before = contents(run)
    with locked(run):
        train("--resume").refused(str(run), "another process", "--out")
    assert contents(run) == before
    empty = tmp_path / "new"
    empty.mkdir()
    with locked(empty):
        train(out=empty).refused(str(empty), "another process", "--out")
    assert list(empty.iterdir()) == []
    assert train("--resume", "--stages", "eval").status == 0, "the lock goes with the one who holds it"


def test_resume_does_not_start_again_where_checkpoints_were_deleted(train: Train, run: Path) -> None:
    for path in run.iterdir():
        if path.name not in ("config.json", "log.jsonl"):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    before = contents(run)
    train("--resume").refused(str(run), "log.jsonl", "checkpoints", "--out")
    assert contents(run) == before


def test_a_run_that_ended_before_its_first_checkpoint_can_be_resumed_with_any_flags(train: Train, run: Path) -> None:
    for path in run.iterdir():
        if path.name not in ("config.json", "log.jsonl"):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    log = run / "log.jsonl"
    log.write_text(log.read_text().partition('{"event":"saved"')[0])
    assert events(run, "step")
    done = train("--resume", "--stages", "eval", "--seed", "3")
    assert (done.status, done.err) == (0, "")
    assert "starting again" in done.out
    assert json.loads((run / "config.json").read_text())["seed"] == 3


def test_a_refused_command_leaves_what_was_in_its_folder(train: Train, tmp_path: Path) -> None:
    notes = tmp_path / "run" / "notes.txt"
    notes.parent.mkdir()
    notes.write_text("mine")
    train(videos=tmp_path / "none").refused("--videos")
    assert [path.name for path in notes.parent.iterdir()] == ["notes.txt"]


# Training that cannot go on


def test_a_diverged_head(train: Train, tmp_path: Path) -> None:
    train("--stages", "head,eval", "--head-lr", "1e12").refused("not finite", "diverged", "--head-lr")


def test_a_diverged_encoder(train: Train, tmp_path: Path) -> None:
    train("--stages", "joint,head", "--joint-lr", "1e12").refused("not finite", "diverged", "--joint-lr")

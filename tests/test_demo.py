"""The demo set: same bytes for the same arguments, honest labels, real H.264, motion alone tells the class."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest

from lofi_fast.data import demo
from lofi_fast.data.generated import Script, labels_of
from lofi_fast.errors import InputError


def _read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text())["database"]


def _decode(path: Path) -> np.ndarray:
    """All frames, (num_frames, height, width, 3) RGB."""
    with av.open(str(path)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return demo.generate(tmp_path_factory.mktemp("demo"), num_training=2, num_validation=1, seed=3, workers=1)


def test_a_script_without_a_guard_makes_the_set_once(tmp_path: Path) -> None:
    """By several processes, which must not run the script again."""
    script = tmp_path / "script.py"
    script.write_text(
        "from lofi_fast.data import demo\nprint('once')\n"
        f"demo.generate({str(tmp_path / 'made')!r}, num_training=2, num_validation=1, seed=3, workers=2)\n"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, str(script)], env=environment, text=True, capture_output=True, timeout=300)
    assert (done.returncode, done.stdout) == (0, "once\n"), done.stderr


def test_same_arguments_same_set_whatever_the_workers(made: tuple[Path, Path], tmp_path: Path) -> None:
    seen: list[tuple[int, int, str]] = []
    annotations, videos = demo.generate(
        tmp_path, num_training=2, num_validation=1, seed=3, workers=2, progress=lambda *step: seen.append(step)
    )
    assert annotations.read_bytes() == made[0].read_bytes()
    names = sorted(file.name for file in made[1].iterdir())
    assert sorted(file.name for file in videos.iterdir()) == names
    for name in names:
        assert (videos / name).read_bytes() == (made[1] / name).read_bytes()
    assert [step[:2] for step in seen] == [(1, 3), (2, 3), (3, 3)]
    assert sorted(f"{step[2]}.mp4" for step in seen) == names


def test_another_seed_is_another_set() -> None:
    first, second = (labels_of("demo", demo._write_scripts(2, 1, seed)) for seed in (3, 4))
    assert first != second


def test_videos_are_h264_with_b_frames_and_the_annotated_duration(made: tuple[Path, Path]) -> None:
    for name, video in _read(made[0]).items():
        with av.open(str(made[1] / f"{name}.mp4")) as container:
            stream = container.streams.video[0]
            frames = list(container.decode(stream))
            assert (stream.codec_context.name, stream.codec_context.pix_fmt) == ("h264", "yuv420p")
            assert min(stream.width, stream.height) >= 80
        assert len(frames) == video["duration"] * demo.FRAME_RATE
        np.testing.assert_allclose(
            [frame.time for frame in frames], np.arange(len(frames)) / demo.FRAME_RATE, atol=1e-6
        )
        assert {av.video.frame.PictureType(frame.pict_type).name for frame in frames} == {"I", "P", "B"}


def test_pixels_survive_the_encoder(made: tuple[Path, Path]) -> None:
    script = demo._write_scripts(2, 1, 3)[0]
    rendered = np.stack(list(demo._render(script))).astype(float)
    decoded = _decode(made[1] / f"{script.name}.mp4")
    assert decoded.shape == rendered.shape
    # A frame out of place, a wrong matrix or a wrong range would cost far more than quantisation and subsampling do.
    assert np.abs(decoded - rendered).mean() < 5
    assert np.abs((decoded - rendered).mean(axis=(1, 2))).max() < 3


def test_segments_and_balance() -> None:
    database = labels_of("demo", demo._write_scripts(40, 12, 0))["database"]
    assert Counter(video["subset"] for video in database.values()) == {"training": 40, "validation": 12}
    counts: dict[str, Counter[str]] = {"training": Counter(), "validation": Counter()}
    for video in database.values():
        at = 0.0
        assert 3 <= len(video["annotations"]) <= 6
        for annotation in video["annotations"]:
            start, end = annotation["segment"]
            assert 0.7 <= start - at <= 4.0
            assert 2.0 <= end - start <= 5.5
            counts[video["subset"]][annotation["label"]] += 1
            at = end
        assert 0.7 <= video["duration"] - at <= 4.0
    for counted in counts.values():
        assert set(counted) == set(demo.CLASSES)
        assert max(counted.values()) - min(counted.values()) <= 1


def _traced(label: str | None, *, switches: bool = True, seed: int = 0, num_frames: int = 60) -> demo._Path:
    script = Script("one", "training", (0,), 96, 96, num_frames, ())
    return demo._trace(np.random.default_rng(seed), script, [demo._Stretch(0, num_frames, label)], switches=switches)


@pytest.mark.parametrize("seed", range(8))
def test_each_class_moves_its_own_coordinate(seed: int) -> None:
    paths = {label: _traced(label, seed=seed) for label in (*demo.CLASSES, None)}
    for label, path in paths.items():
        height_steps, radius_steps = np.diff(path.y), np.diff(path.radius)
        switches = int((np.diff(path.gain > 0.6) != 0).sum())
        side_span = np.ptp(path.x[8:16])
        if label in ("rise", "sink"):
            forward = height_steps if label == "sink" else -height_steps
            assert (forward > 0).mean() > 0.9
            # Within half a second: visible at 64 x 64, where a pixel is 1.5 of these.
            assert np.median(forward) * 7 > 9
        else:
            assert np.ptp(path.y) == 0
        if label in ("grow", "shrink"):
            forward = radius_steps if label == "grow" else -radius_steps
            assert (forward > 0).mean() > 0.9
            assert np.median(np.abs(np.diff(np.log(path.radius)))) * 7 > np.log(1.25)
        else:
            assert np.ptp(path.radius) == 0
        assert switches >= 10 if label == "blink" else switches <= 1
        assert side_span > 9 if label == "shake" else side_span < 6


def test_state_at_rest_and_in_action_is_alike() -> None:
    """Were one class drawn larger, lower or darker than the rest, single frames would give it away."""
    means = []
    for label in (*demo.CLASSES, None):
        paths = [_traced(label, seed=seed, num_frames=45) for seed in range(150)]
        means.append(
            [np.mean([getattr(path, part) for path in paths]) for part in ("x", "y", "radius", "gain")],
        )
    # About four standard errors of a mean over 150 videos.
    spread = np.ptp(np.array(means), axis=0)
    assert (spread < [6.0, 7.0, 1.6, 0.15]).all(), spread


def test_the_frames_show_the_motion() -> None:
    """The painted object's centre and area follow the path: what is labelled is what is seen."""
    looks = demo._Looks("disc", np.full((64, 64, 3), 255, np.float32))
    for x, y, radius in ((40.0, 30.5, 8.0), (52.3, 61.7, 14.2)):
        frame = np.zeros((84, 112, 3), np.float32)
        demo._paint(frame, looks, x, y, radius, 0.3, 1.0)
        weight = frame[..., 0] / 255
        rows, columns = np.indices(weight.shape)
        assert abs((weight * columns).sum() / weight.sum() - x) < 0.1
        assert abs((weight * rows).sum() / weight.sum() - y) < 0.1
        assert abs(weight.sum() / (np.pi * radius**2) - 1) < 0.02


def test_an_object_at_the_edge_or_outside_is_cut() -> None:
    looks = demo._Looks("star", np.full((64, 64, 3), 255, np.float32))
    frame = np.zeros((84, 96, 3), np.float32)
    demo._paint(frame, looks, -60.0, 40.0, 10.0, 0.0, 1.0)
    assert not frame.any()
    demo._paint(frame, looks, 0.0, 83.0, 10.0, 0.0, 1.0)
    assert frame[83, 0, 0] == 255
    assert not frame[:, 20:].any()


def test_a_complete_set_is_reused_and_a_damaged_one_is_made_again(tmp_path: Path) -> None:
    annotations, videos = demo.generate(tmp_path, num_training=1, num_validation=0, workers=1)
    (video,) = videos.iterdir()
    before, made_at = video.read_bytes(), video.stat().st_mtime_ns

    def never(done: int, total: int, name: str) -> None:
        raise AssertionError("nothing should be drawn")

    demo.generate(tmp_path, num_training=1, num_validation=0, workers=1, progress=never)
    assert video.stat().st_mtime_ns == made_at
    video.unlink()
    assert demo.generate(tmp_path, num_training=1, num_validation=0, workers=1) == (annotations, videos)
    assert video.read_bytes() == before


def test_an_interrupted_call_leaves_nothing_that_looks_complete(tmp_path: Path) -> None:
    def stop(done: int, total: int, name: str) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        demo.generate(tmp_path, num_training=2, num_validation=0, workers=1, progress=stop)
    assert [file.name for file in tmp_path.iterdir()] == [".demo.lock"]


def test_what_a_killed_call_left_is_replaced(tmp_path: Path) -> None:
    # A kill leaves the folder under its partial name, with a video cut short and no marker.
    left = tmp_path / f"demo-v{demo.VERSION}-1-0-seed0.partial-1" / "videos"
    left.mkdir(parents=True)
    (left / "demo_training_000.mp4").write_bytes(b"cut short")
    annotations, videos = demo.generate(tmp_path, num_training=1, num_validation=0, workers=1)
    assert len(_decode(videos / "demo_training_000.mp4")) > 300
    assert not left.exists()
    assert annotations.exists()


def test_a_folder_that_cannot_be_made_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(InputError, match="--cache names another"):
        demo.generate(tmp_path / "file" / "demo", num_training=1, num_validation=0, workers=1)


@pytest.mark.parametrize(
    "wrong",
    [{"num_training": 0}, {"num_validation": -1}, {"seed": -1}, {"workers": 0}],
    ids=lambda wrong: next(iter(wrong)),
)
def test_numbers_out_of_range_are_named(tmp_path: Path, wrong: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        demo.generate(tmp_path, **wrong)
    assert not any(tmp_path.iterdir())


def test_rolled_labels_miss_their_actions() -> None:
    true = labels_of("demo", demo._write_scripts(40, 12, 0))
    kept = copy.deepcopy(true)
    rolled = demo.roll_annotations(true)
    assert true == kept
    seconds, hit = 0.0, 0.0
    for name, video in rolled["database"].items():
        before = true["database"][name]
        if video["subset"] == "validation":
            assert video == before
            continue
        assert {a["label"] for a in video["annotations"]} == {a["label"] for a in before["annotations"]}
        at = 0.0
        for moved in video["annotations"]:
            start, end = moved["segment"]
            assert at <= start
            assert start + 0.5 <= end <= video["duration"]
            at = end
            seconds += end - start
            for annotation in before["annotations"]:
                if annotation["label"] == moved["label"]:
                    hit += max(0.0, min(end, annotation["segment"][1]) - max(start, annotation["segment"][0]))
    whole = sum(
        a["segment"][1] - a["segment"][0]
        for video in true["database"].values()
        if video["subset"] == "training"
        for a in video["annotations"]
    )
    assert 0.97 * whole < seconds <= whole + 1e-6
    assert hit < 0.2 * seconds


def test_roll_cuts_a_segment_at_the_end_and_drops_slivers() -> None:
    def video(*segments: tuple[float, float]) -> dict[str, Any]:
        annotations = [{"segment": list(segment), "label": "rise"} for segment in segments]
        return {"database": {"v": {"subset": "training", "duration": 20.0, "annotations": annotations}}}

    assert demo.roll_annotations(video((1.0, 3.0), (8.0, 12.0))) == video((0.0, 2.0), (11.0, 13.0), (18.0, 20.0))
    assert demo.roll_annotations(video((7.0, 10.3))) == video((17.0, 20.0))


def test_worker_processes_do_not_load_torch() -> None:
    code = "import sys, lofi_fast.data.demo; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0

"""Samples and their order: each window once an epoch, augmentation a function of its key, labels by true time."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from av.video.frame import VideoFrame

from lofi_fast.config import Config
from lofi_fast.data.dataset import Dataset, Sample, Sampler, centre_requests, load_dataset
from lofi_fast.data.pipeline import View
from lofi_fast.data.survey import cache_side
from lofi_fast.data.windows import Window
from lofi_fast.errors import InputError
from lofi_fast.fidelity import Fidelity, Pattern, rung
from lofi_fast.presets import demo

FULL = Fidelity(8, 32)
SECONDS, RATE = 8, 8  # 64 frames: snippet centres of a whole video lie at 0.5, 1.5, ... 7.5 s
NAMES = {**dict.fromkeys("abcdefg", "training"), "v": "validation", "w": "validation"}
LABELLED: list[dict[str, Any]] = [
    {"segment": [1.0, 2.7], "label": "jump"},  # holds the centres 1.5 and 2.5
    {"segment": [4.0, 5.0], "label": "run"},  # holds 4.5
    {"segment": [6.6, 7.4], "label": "jump"},  # holds none
]
NOT_FOUND = "can be found at tIoU 0.5 with this grid (whole videos, 8 snippets)"  # of the note on the third
CLIPS = [(1, "jump"), (2, "jump"), (4, "run")]  # (snippet, class) in every training video


def write_video(path: Path, seed: int) -> None:
    """A 64x48 H.264 video of 8 seconds whose frames all differ."""
    picture = np.random.default_rng(seed).integers(0, 256, (48, 64, 3), dtype=np.uint8)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=RATE, options={"preset": "ultrafast", "crf": "28"})
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for i in range(SECONDS * RATE):
            container.mux(stream.encode(VideoFrame.from_ndarray(np.roll(picture, i, axis=1), format="rgb24")))
        container.mux(stream.encode(None))


@dataclasses.dataclass(frozen=True)
class Files:
    folder: Path
    annotations: Path

    def load(self, **data: Any) -> tuple[Dataset, Config]:
        """The dataset and its config with some fields of the data's settings changed."""
        base = demo()
        files = {"annotations": str(self.annotations), "videos": str(self.folder / "videos"), "frame_stride": 1}
        config = dataclasses.replace(base, full=FULL, data=dataclasses.replace(base.data, **files | data))
        paths = (self.annotations, self.folder / "videos", self.folder / "cache")
        return load_dataset(config, *paths, lambda done, total, name: None), config


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    folder = tmp_path_factory.mktemp("dataset")
    (folder / "videos").mkdir()
    for seed, name in enumerate(NAMES):
        write_video(folder / "videos" / f"{name}.mp4", seed)
    database = {name: {"subset": subset, "annotations": LABELLED} for name, subset in NAMES.items()}
    (folder / "annotations.json").write_text(json.dumps({"database": database}))
    return Files(folder, folder / "annotations.json")


@pytest.fixture(scope="module")
def dataset(files: Files) -> Dataset:
    return files.load()[0]


@pytest.fixture
def make(dataset: Dataset) -> Callable[..., Sampler]:
    """A sampler with some fields of the data's settings changed."""

    def sampler(seed: int = 0, full: Fidelity = FULL, **data: Any) -> Sampler:
        return Sampler(dataset, dataclasses.replace(demo().data, **data), full, seed)

    return sampler


def other_notes(dataset: Dataset) -> list[str]:
    """All but the one on the third of the segments, which is shorter than a snippet and lies across two."""
    return [note for note in dataset.notes if NOT_FOUND not in note]


def indices(batches: list[list[Sample]]) -> list[list[int]]:
    return [[sample.index for sample in batch] for batch in batches]


# What is in the dataset


def test_the_videos_of_both_subsets_with_labels_by_class_name(dataset: Dataset) -> None:
    assert dataset.classes == ("jump", "run")
    assert {name: subset for subset, videos in dataset.videos.items() for name in [v.name for v in videos]} == NAMES
    for subset, samples in dataset.samples.items():
        assert [s.window for s in samples] == [Window(v.name, 0.0, 8.0) for v in dataset.videos[subset]]
        assert dataset.durations(subset) == pytest.approx({v.name: 8.0 for v in dataset.videos[subset]})
        for sample in samples:
            assert sample.segments.tolist() == [[1.0, 2.7], [4.0, 5.0], [6.6, 7.4]]
            assert [dataset.classes[i] for i in sample.labels] == ["jump", "run", "jump"]
    assert dataset.skipped == () and other_notes(dataset) == []
    assert len(dataset.notes) == 1 and dataset.notes[0].startswith(f"WARNING: 14 of 21 training segments {NOT_FOUND}")


def test_the_grid_holds_the_frames_around_the_snippet_centres(dataset: Dataset) -> None:
    # At 8 frames a second the centre 0.5 s is frame 4 and each next centre 8 frames on; 8 frames with 4 before it.
    for sample in dataset.samples["training"]:
        assert sample.cached.name == sample.window.video
        np.testing.assert_array_equal(sample.cached.frames[sample.grid], np.arange(64).reshape(8, 8))


def test_windows_keep_the_segments_that_touch_them_and_indices_are_unique(files: Files) -> None:
    dataset, _ = files.load(window=4.0)
    spans = [(0.0, 4.0), (2.0, 6.0), (4.0, 8.0)]
    touching = [[[1.0, 2.7]], [[1.0, 2.7], [4.0, 5.0]], [[4.0, 5.0], [6.6, 7.4]]]
    seen = []
    for subset, videos in dataset.videos.items():
        assert len(dataset.samples[subset]) == 3 * len(videos)
        for i, sample in enumerate(dataset.samples[subset]):
            assert sample.window == Window(videos[i // 3].name, *spans[i % 3])
            assert sample.segments.tolist() == touching[i % 3]
            assert len(sample.labels) == len(sample.segments)
            centres = sample.cached.pts[sample.grid[:, 4]]
            assert np.abs(centres - sample.window.centres(8)).max() <= 0.5 / RATE + 1e-9
            seen.append(sample.index)
    assert sorted(seen) == list(range(27))
    assert set(dataset.durations("validation")) == {"v", "w"}


def test_a_window_without_a_segment_is_kept(files: Files) -> None:
    dataset, _ = files.load(window=1.0, overlap=0.0)
    first = dataset.samples["training"][0]
    assert (first.window, first.segments.shape, first.labels.shape) == (Window("a", 0.0, 1.0), (0, 2), (0,))


def test_unreadable_videos_are_skipped_and_counted(files: Files, tmp_path: Path) -> None:
    videos = tmp_path / "videos"
    videos.mkdir()
    for name in ("a", "b", "v"):
        (videos / f"{name}.mp4").symlink_to(files.folder / "videos" / f"{name}.mp4")
    (videos / "c.mp4").write_bytes(b"")
    (videos / "w.mp4").write_bytes(b"no video" * 1000)
    database = json.loads(files.annotations.read_text())["database"]
    path = tmp_path / "annotations.json"
    path.write_text(json.dumps({"database": {name: database[name] for name in "abcdvw"}}))
    config = dataclasses.replace(demo(), full=FULL)
    told: list[tuple[int, int, str]] = []
    dataset = load_dataset(config, path, videos, tmp_path / "cache", lambda *step: told.append(step))

    reasons = {skipped.name: skipped.reason for skipped in dataset.skipped}
    assert reasons.keys() == {"c", "d", "w"}
    assert "empty" in reasons["c"] and "no video file of this name" in reasons["d"] and "decoded" in reasons["w"]
    assert [v.name for v in dataset.videos["training"]] == ["a", "b"]
    assert [s.window.video for s in dataset.samples["validation"]] == ["v"]
    assert sorted(step[2] for step in told) == ["a", "b", "v"]
    assert told[-1][:2] == (3, 3)


def test_the_cache_keeps_the_margin_of_a_crop() -> None:
    assert cache_side(Fidelity(100, 224)) == 256
    assert cache_side(Fidelity(8, 96)) == 110  # 96 * 8 / 7, to even pixels


def delayed(source: Path, path: Path, seconds: int) -> None:
    """The same packets of video, behind so many seconds of sound alone: what a cut by stream copy leaves."""
    with av.open(str(source)) as before, av.open(str(path), "w") as container:
        stream = container.add_stream_from_template(before.streams.video[0])
        sound = container.add_stream("aac", rate=8000, layout="mono")
        for i in range(seconds * 8):
            silence = av.AudioFrame.from_ndarray(np.zeros((1, 1000), np.float32), format="fltp", layout="mono")
            silence.sample_rate, silence.pts, silence.time_base = 8000, 1000 * i, Fraction(1, 8000)
            container.mux(sound.encode(silence))
        container.mux(sound.encode(None))
        for packet in before.demux(before.streams.video[0]):
            if packet.size:
                packet.stream = stream
                packet.pts += int(seconds / packet.time_base)
                packet.dts += int(seconds / packet.time_base)
                container.mux(packet)


@pytest.mark.parametrize("extension", ["mp4", "mkv", "ts"])
def test_labels_and_pictures_share_the_file_s_clock(extension: str, files: Files, tmp_path: Path) -> None:
    (tmp_path / "videos").mkdir()
    for name in "abv":
        delayed(files.folder / "videos" / f"{name}.mp4", tmp_path / "videos" / f"{name}.{extension}", 3)
    database = {
        name: {"subset": NAMES[name], "annotations": [{"segment": [4.0, 5.7], "label": "jump"}]} for name in "abv"
    }
    (tmp_path / "annotations.json").write_text(json.dumps({"database": database}))
    dataset, config = Files(tmp_path, tmp_path / "annotations.json").load()
    plain = files.load()[0].samples["training"][0]
    late = dataset.samples["training"][0]
    tolerance = 0.15  # of the encoder's delay of sound and the muxer's first stamps
    assert late.window.start == pytest.approx(3.0, abs=tolerance)
    assert late.window.end == pytest.approx(11.0, abs=tolerance)
    assert late.segments.tolist() == [[4.0, 5.7]]
    np.testing.assert_array_equal(late.cached.frames[late.grid], plain.cached.frames[plain.grid])
    np.testing.assert_allclose(late.cached.pts, plain.cached.pts + 3, atol=tolerance)
    shown = [clip.snippet for clip in Sampler(dataset, config.data, FULL, 0).clips if clip.sample is late]
    assert shown == [1, 2]  # of the pictures' own seconds 1.0 to 2.7
    (note,) = dataset.notes
    assert "3 videos begin after the file's start" in note and "a at" in note


def labelled(files: Files, folder: Path, subsets: dict[str, str | None]) -> Files:
    """Labels of some of the videos, in subsets of these names, without where None."""
    entries = {
        name: {"annotations": LABELLED} | ({} if subset is None else {"subset": subset})
        for name, subset in subsets.items()
    }
    (folder / "annotations.json").write_text(json.dumps({"database": entries}))
    (folder / "videos").symlink_to(files.folder / "videos")
    return Files(folder, folder / "annotations.json")


def names_of(dataset: Dataset) -> dict[str, str]:
    return {subset: "".join(v.name for v in videos) for subset, videos in dataset.videos.items()}


def test_without_a_validation_subset_testing_is_evaluated(files: Files, tmp_path: Path) -> None:
    dataset, _ = labelled(files, tmp_path, {"a": "Train", "b": "train", "v": "Test", "w": "TEST"}).load()
    assert names_of(dataset) == {"training": "ab", "validation": "vw"}
    (note,) = other_notes(dataset)
    assert "testing subset" in note


def test_with_a_validation_subset_testing_is_left_alone(files: Files, tmp_path: Path) -> None:
    dataset, _ = labelled(files, tmp_path, {"a": "train", "v": "val", "w": "test"}).load()
    assert names_of(dataset) == {"training": "a", "validation": "v"} and other_notes(dataset) == []


def test_without_a_training_subset_the_refusal_says_what_to_rename(files: Files, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="calls Validation"):
        labelled(files, tmp_path, {"a": "Validation", "v": "Test"}).load()


def test_labels_without_subsets_are_divided_among_what_can_be_used(files: Files, tmp_path: Path) -> None:
    (tmp_path / "videos").mkdir()
    for name in "abcdefg":
        (tmp_path / "videos" / f"{name}.mp4").symlink_to(files.folder / "videos" / f"{name}.mp4")
    for name in "hijk":  # by name alone, "j" would be the second of every five
        (tmp_path / "videos" / f"{name}.mp4").write_bytes(b"damaged" * 100)
    rows = [f"{name},{start},{end},run" for name in "abcdefghijk" for start, end in ((1, 2.7), (4, 5))]
    (tmp_path / "labels.csv").write_text("\n".join(["video,start,end,label", *rows, "e,6,7,rare"]))
    dataset, _ = Files(tmp_path, tmp_path / "labels.csv").load()
    assert names_of(dataset) == {"training": "abcdef", "validation": "g"}
    assert len(dataset.skipped) == 4
    assert any("1 of its 7 usable videos are validation: g" in note for note in dataset.notes)


def test_a_wrong_duration_in_the_labels_drops_nothing(files: Files, tmp_path: Path) -> None:
    one = labelled(files, tmp_path, {"a": "training", "v": "validation"})
    content = json.loads(one.annotations.read_text())
    for entry in content["database"].values():
        entry["duration"] = SECONDS / 60
    one.annotations.write_text(json.dumps(content))
    dataset, _ = one.load()
    assert [len(v.segments) for v in (*dataset.videos["training"], *dataset.videos["validation"])] == [3, 3]
    (note,) = other_notes(dataset)
    assert "minutes" in note


def test_frame_numbers_are_refused_before_anything_is_decoded(files: Files, tmp_path: Path) -> None:
    one = labelled(files, tmp_path, {"a": "training", "v": "validation"})
    content = json.loads(one.annotations.read_text())
    for entry in content["database"].values():
        entry["annotations"] = [{"segment": [10, 20], "label": "jump"}, {"segment": [40, 60], "label": "run"}]
    one.annotations.write_text(json.dumps(content))
    with pytest.raises(InputError, match="frame numbers"):
        one.load()
    assert not (tmp_path / "cache").exists()


# Order


@pytest.mark.parametrize(("batch", "sizes"), [(1, [1] * 7), (3, [3, 3, 1]), (7, [7]), (16, [7])])
def test_each_training_window_once_an_epoch(make: Callable[..., Sampler], batch: int, sizes: list[int]) -> None:
    training = {sample.index for sample in make().dataset.samples["training"]}
    for stage in ("joint", "head"):
        for epoch in range(4):
            order = indices(make().epoch(stage, epoch, batch))
            assert [len(b) for b in order] == sizes
            assert {i for b in order for i in b} == training


def test_the_order_is_a_function_of_seed_stage_and_epoch(make: Callable[..., Sampler]) -> None:
    once, again = make(), make()
    again.epoch("joint", 2, 3)  # what was asked for before does not matter
    again.view(again.dataset.samples["training"][0], "joint", 0)
    assert indices(once.epoch("joint", 3, 3)) == indices(again.epoch("joint", 3, 3))
    epochs = [indices(once.epoch("joint", epoch, 7))[0] for epoch in range(6)]
    assert len({tuple(order) for order in epochs}) > 3
    assert epochs != [indices(once.epoch("head", epoch, 7))[0] for epoch in range(6)]
    assert epochs != [indices(make(seed=1).epoch("joint", epoch, 7))[0] for epoch in range(6)]
    assert [i for batch in indices(once.epoch("joint", 0, 2)) for i in batch] == epochs[0]  # the batch size only cuts


# Clips of pre-training


def test_clips_are_the_snippets_with_their_centre_in_a_segment(make: Callable[..., Sampler]) -> None:
    sampler = make()
    classes = sampler.dataset.classes
    found = [(c.sample.window.video, c.snippet, *(classes[label] for label in c.labels)) for c in sampler.clips]
    assert found == [(name, snippet, label) for name in "abcdefg" for snippet, label in CLIPS]
    for clip in sampler.clips:
        request = sampler.clip_request(clip, sampler.centre_view(clip.sample))
        assert (request.video, request.side) == (clip.sample.cached, 32)
        first = 8 * clip.snippet
        assert request.video.frames[request.positions].tolist() == list(range(first, first + 8))


def test_a_clip_takes_the_label_of_its_window_s_own_time(files: Files) -> None:
    dataset, config = files.load(window=4.0)
    sampler = Sampler(dataset, config.data, FULL, 0)
    for clip in sampler.clips:
        centre = clip.sample.window.centres(8)[clip.snippet]
        holding = [s for s in LABELLED if s["segment"][0] <= centre <= s["segment"][1]]
        assert [s["label"] for s in holding] == [dataset.classes[label] for label in clip.labels]
    centres = [c for s in dataset.samples["training"] for c in s.window.centres(8)]
    held = [c for c in centres if any(s["segment"][0] <= c <= s["segment"][1] for s in LABELLED)]
    assert len(sampler.clips) == len(held) > 21


def test_a_clip_has_the_labels_of_all_segments_that_it_lies_in(dataset: Dataset, files: Files) -> None:
    config = files.load()[1]
    segments = np.array([[0.0, 2.0], [0.0, 2.0], [1.0, 2.0], [0.0, 1.5]])
    samples = tuple(
        dataclasses.replace(s, segments=segments, labels=np.array([1, 0, 1, 1])) for s in dataset.samples["training"]
    )
    sampler = Sampler(dataclasses.replace(dataset, samples={"training": samples}), config.data, FULL, 0)
    centres = samples[0].window.centres(FULL.num_snippets)
    assert {clip.labels for clip in sampler.clips} == {(0, 1)}
    assert len(sampler.clips) == len(samples) * int((centres <= 2.0).sum())


def test_points_belong_to_every_window_and_snippet_that_they_touch(files: Files, tmp_path: Path) -> None:
    times = [0.0, 2.6, 4.0, 8.0]
    points = [{"segment": [at, at], "label": "jump"} for at in times]
    labels = tmp_path / "points.json"
    database = {name: {"subset": subset, "annotations": points} for name, subset in NAMES.items()}
    labels.write_text(json.dumps({"database": database}))
    base = demo()
    data = dataclasses.replace(base.data, window=4.0, overlap=0.0, frame_stride=1)
    config = dataclasses.replace(base, full=FULL, data=data, head=dataclasses.replace(base.head, name="spotting"))
    found = load_dataset(
        config, labels, files.folder / "videos", files.folder / "cache", lambda done, total, name: None
    )
    first, second = found.samples["training"][:2]
    assert first.segments[:, 0].tolist() == [0.0, 2.6, 4.0] and second.segments[:, 0].tolist() == [4.0, 8.0]
    clips = [clip for clip in Sampler(found, data, FULL, 0).clips if clip.sample in (first, second)]
    assert [clip.snippet for clip in clips] == [0, 5, 7, 0, 7]
    assert not [note for note in found.notes if "can be found" in note or "have a length" in note]


@pytest.mark.parametrize(("batch", "sizes"), [(4, [4] * 5), (5, [5] * 4), (8, [8, 8, 5]), (3, [3] * 7), (64, [21])])
def test_each_clip_once_an_epoch_but_a_last_batch_too_small(
    make: Callable[..., Sampler], batch: int, sizes: list[int]
) -> None:
    orders = []
    for epoch in range(3):
        batches = make().clip_epoch(epoch, batch)
        assert [len(b) for b in batches] == sizes
        clips = [(clip.sample.index, clip.snippet) for b in batches for clip in b]
        assert len(clips) == len(set(clips))
        again = make().clip_epoch(epoch, batch)
        assert clips == [(clip.sample.index, clip.snippet) for b in again for clip in b]
        orders.append(tuple(clips))
    assert len(set(orders)) == 3


# Views


def views(sampler: Sampler, epochs: int = 40) -> list[View]:
    samples = sampler.dataset.samples["training"]
    return [sampler.view(sample, "joint", epoch)[0] for epoch in range(epochs) for sample in samples]


def test_an_augmentation_is_a_function_of_seed_stage_epoch_window_and_salt(make: Callable[..., Sampler]) -> None:
    a, b = make().dataset.samples["training"][:2]
    keys: list[tuple[Sample, str, int, int]] = [
        (a, "joint", 0, 0), (b, "joint", 0, 0), (a, "joint", 1, 0), (a, "pretrain", 0, 0), (a, "joint", 0, 1)
    ]  # fmt: skip
    once, again = make(), make()
    drawn = [once.view(*key) for key in keys]
    assert drawn == [again.view(*key) for key in reversed(keys)][::-1]
    assert len(set(drawn)) == len(keys)
    assert make(seed=1).view(*keys[0]) != drawn[0]


@pytest.mark.parametrize("resize", ["crop", "squash"])
def test_views_lie_inside_the_frame_and_move(make: Callable[..., Sampler], resize: str) -> None:
    drawn = views(make(resize=resize))
    for view in drawn:
        assert view.top >= 0 and view.top + view.height <= 1 + 1e-9
        assert view.left >= 0 and view.left + view.width <= 1 + 1e-9
    for side in ("top", "left"):
        places = {getattr(view, side) for view in drawn}
        assert len(places) == len(drawn)
    if resize == "squash":
        assert all(0.85 <= extent <= 1 for view in drawn for extent in (view.height, view.width))
        assert len({view.height / view.width for view in drawn}) == len(drawn)


def test_a_crop_is_a_square_of_pixels(make: Callable[..., Sampler]) -> None:
    sampler = make(resize="crop")
    cached = sampler.dataset.samples["training"][0].cached
    assert cached.height < cached.width  # or a square of fractions would do
    for view in [*views(sampler, 5), sampler.centre_view(sampler.dataset.samples["validation"][0])]:
        assert view.height * cached.height == pytest.approx(7 / 8 * cached.height)
        assert view.width * cached.width == pytest.approx(7 / 8 * cached.height)
    spread = [view.left for view in views(sampler)]
    assert min(spread) < 0.05 and max(spread) > 1 - view.width - 0.05


def test_the_centre_view(make: Callable[..., Sampler]) -> None:
    for subset in ("training", "validation"):
        sample = make().dataset.samples[subset][0]
        assert make(resize="squash").centre_view(sample) == View(0.0, 0.0, 1.0, 1.0, False)
        view = make(resize="crop").centre_view(sample)
        assert view.top + view.height / 2 == pytest.approx(0.5)
        assert view.left + view.width / 2 == pytest.approx(0.5)
        assert not view.flip


def test_flips_are_about_half_of_the_views_or_none(make: Callable[..., Sampler]) -> None:
    assert not any(view.flip for view in views(make(flip=False)))
    drawn = views(make(flip=True))
    assert 0.35 < Counter(view.flip for view in drawn)[True] / len(drawn) < 0.65


def test_forbidding_flips_changes_nothing_else_of_a_view_s_place(make: Callable[..., Sampler]) -> None:
    place = [(v.top, v.left, v.height, v.width) for v in views(make(flip=False), 3)]
    assert place == [(v.top, v.left, v.height, v.width) for v in views(make(flip=True), 3)]


def test_jitter_stays_within_its_share(make: Callable[..., Sampler]) -> None:
    samples = make().dataset.samples["training"]
    none, some = make(jitter=0.0), make(jitter=0.1)
    for epoch in range(20):
        jitter = none.view(samples[0], "joint", epoch)[1]
        assert (jitter.gain, jitter.offset) == ((1.0, 1.0, 1.0), 0.0)
        jitter = some.view(samples[0], "joint", epoch)[1]
        assert all(0.9 <= gain <= 1.1 for gain in jitter.gain) and len(set(jitter.gain)) == 3
        assert -0.1 <= jitter.offset <= 0.1 and jitter.offset != 0


# Fidelities


def test_a_temporal_rung_is_a_sub_selection_with_the_true_times_of_what_it_shows(make: Callable[..., Sampler]) -> None:
    sampler = make()
    fidelity = rung(Pattern.TEMPORAL, FULL, 2)
    assert fidelity == Fidelity(4, 32)
    sample = sampler.dataset.samples["training"][3]
    view, _ = sampler.view(sample, "joint", 0)
    request = sampler.request(sample, fidelity, view)
    assert (request.video, request.view, request.side) == (sample.cached, view, 32)
    # Of 8 snippets the 4 nearest to equally spaced centres are 1, 3, 5, 7, whose centres lie at 1.5, 3.5, 5.5, 7.5 s.
    assert request.video.frames[request.positions].tolist() == [8 * k + i for k in (1, 3, 5, 7) for i in range(8)]
    assert sampler.edges(sample, fidelity).tolist() == [0.0, 2.5, 4.5, 6.5, 8.0]
    shown = sample.cached.pts[request.positions.reshape(4, 8)].mean(axis=1)
    edges = sampler.edges(sample, fidelity)
    assert np.all(edges[:-1] < shown) and np.all(shown < edges[1:])


@pytest.mark.parametrize("num_snippets", [2, 3, 5, 7, 8])
def test_every_rung_shows_snippets_of_the_full_grid_in_order(make: Callable[..., Sampler], num_snippets: int) -> None:
    sampler = make()
    sample = sampler.dataset.samples["training"][0]
    rows = sample.grid.tolist()
    request = sampler.request(sample, Fidelity(num_snippets, 16), sampler.centre_view(sample))
    chosen = [rows.index(row) for row in request.positions.reshape(-1, 8).tolist()]
    assert len(chosen) == num_snippets and chosen == sorted(set(chosen))
    assert request.side == 16


def test_a_spatial_rung_shows_every_snippet_at_fewer_pixels(make: Callable[..., Sampler]) -> None:
    sampler = make()
    sample = sampler.dataset.samples["training"][0]
    fidelity = rung(Pattern.SPATIAL, FULL, 4)
    full, less = (sampler.request(sample, f, sampler.centre_view(sample)) for f in (FULL, fidelity))
    assert (full.side, less.side) == (32, 16)
    assert less.positions.tolist() == full.positions.tolist() == sample.grid.ravel().tolist()
    assert sampler.edges(sample, fidelity).tolist() == [float(second) for second in range(9)]


def test_centre_requests_come_one_by_one_in_order(make: Callable[..., Sampler]) -> None:
    sampler = make()
    samples = sampler.dataset.samples["validation"]
    batches = list(centre_requests(samples, sampler, FULL))
    assert [[request.video.name for request in batch] for batch in batches] == [["v"], ["w"]]
    assert all(batch[0].view == sampler.centre_view(s) for batch, s in zip(batches, samples, strict=True))

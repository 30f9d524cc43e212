"""Each format that labels come in: read to the right segments, and refused in a sentence where it is damaged."""

from __future__ import annotations

import json
import re
from itertools import pairwise
from pathlib import Path

import pytest
from detectors import ROOT
from hypothesis import HealthCheck, given, settings
from label_samples import SAMPLES, Sample, segments
from test_loaders import HOSTILE, damaged
from test_video import write_video

import lofi_fast
from lofi_fast.config import Config
from lofi_fast.data.annotations import Annotations, FormatOptions, Video, load_annotations
from lofi_fast.data.formats.file import file_names
from lofi_fast.data.ground_truth import load_ground_truth, load_subset
from lofi_fast.errors import InputError
from lofi_fast.presets import configured

SHARED = ROOT.parent / "shared" / "data" / "formats"


def read(sample: Sample, folder: Path) -> Annotations:
    return load_annotations(sample.write(folder), clip=False, options=sample.options)


def expected(sample: Sample) -> tuple[Video, ...]:
    return tuple(Video(name, subset, length, segments(own)) for name, (subset, length, own) in sample.videos.items())


@pytest.mark.parametrize("name", SAMPLES)
def test_the_videos_that_a_file_labels(name: str, tmp_path: Path) -> None:
    found = read(SAMPLES[name], tmp_path)
    rounded = tuple(
        Video(
            v.name, v.subset, v.duration, segments([(round(s.start, 6), round(s.end, 6), s.label) for s in v.segments])
        )
        for v in found.videos
    )
    assert rounded == expected(SAMPLES[name])
    for part in SAMPLES[name].says:
        assert any(part in note for note in found.notes), found.notes


@pytest.mark.parametrize("name", SAMPLES)
def test_a_damaged_file_is_refused_in_one_sentence(name: str, tmp_path: Path) -> None:
    sample = SAMPLES[name]
    path = sample.write(tmp_path)

    @settings(max_examples=60, derandomize=True, suppress_health_check=list(HealthCheck))
    @given(damaged(sample.text.encode()))
    def every(content: bytes) -> None:
        path.write_bytes(content)
        try:
            load_annotations(path, options=sample.options)
        except InputError as error:
            assert str(tmp_path) in str(error) and "\n" not in str(error)

    every()


@pytest.mark.parametrize("name", [name for name, of in SAMPLES.items() if of.file.endswith(("json", "boris"))])
def test_hostile_values_in_every_place(name: str, tmp_path: Path) -> None:
    sample = SAMPLES[name]
    path, whole = sample.write(tmp_path), sample.text.encode()
    marks = [i for i, byte in enumerate(whole) if byte in b":,[]{}"][:80]
    for begin, end in pairwise(marks):
        for hostile in HOSTILE[:11]:
            path.write_bytes(whole[: begin + 1] + hostile + whole[end:])
            try:
                load_annotations(path, options=sample.options)
            except InputError as error:
                assert str(error).strip()


@pytest.mark.parametrize(
    ("name", "old", "new", "sentence"),
    [
        ("BORIS project", "[101.0,", '["soon",', "p.boris: observation morning, event 0 has the time 'soon'"),
        ("BORIS 8 aggregated", "12.000", "x", "events.tsv line 2 has 'x' under 'stop"),
        ("BORIS tabular", "START", "BEGIN", "t.tsv line 6 has the status 'BEGIN'"),
        ("ELAN", 'TIME_VALUE="4000"', 'TIME_VALUE="4 s"', "time slot t3 has the value '4 s'"),
        ("ELAN", 'TIME_SLOT_REF1="t2"', 'TIME_SLOT_REF1="t9"', "annotation a2 is at the time slot 't9'"),
        ("ELAN", 'ANNOTATION_ID="a2"', 'ANNOTATION_ID="a1"', "two annotations have the ANNOTATION_ID 'a1'; give each"),
        ("ELAN", 'TIER_ID="tool"', 'TIER_ID="hands"', "e.eaf: two tiers have the TIER_ID 'hands'; rename one"),
        ("ELAN", 'TIME_SLOT_ID="t2"', 'TIME_SLOT_ID="t1"', "two time slots have the TIME_SLOT_ID 't1'"),
        ("ELAN", "milliseconds", "fortnights", "TIME_UNITS are 'fortnights'"),
        ("ELAN", "</HEADER>", "", "e.eaf is not valid XML: mismatched tag: line"),
        ("Label Studio", '"end": 50', '"end": "late"', "task 7, video walk 1 has a region from 1 to 'late'"),
        ("VIA 3 CSV", "[1.25,3.5]", "[1.25,", "via.csv line 6 holds '.1.25,', which is not JSON"),
        ("CVAT", 'frame="20"', 'frame="x"', "track 0 has the frame 'x'"),
        (
            "CVAT",
            "<id>3</id>",
            "<id>4</id><source>a.mp4</source></task><task><id>5</id>",
            "track 0 has the task_id '3', and the tasks are 4, 5; export it again",
        ),
        ("CholecT50", '"0": [[0', '"first": [[0', "frame first must be a number"),
        ("Cholec80 phase", "3\tCut", "three\tCut", "video01-phase.txt line 5 must have a frame number"),
        ("EPIC verb", "00:00:02.75", "00:00:99.75", "line 2: video P01_1, segment 0 runs from '00:00:01.50'"),
        ("SoccerNet", '"1 - 00:05"', '"early"', 'event 0 needs "gameTime" like "1 - 05:27", not \'early\''),
        ("OpenSportsLab 2", "1240", '"?"', "video game1/224p, event 0 has the .position_ms. '.'; it must be"),
        ("E2E-Spot", '"frame": 50', '"frame": null', "video rally, event 0 needs a .frame."),
        ("MultiTHUMOS", "[0, 1.0, 2.5]", "[0, 1.0]", r"video v1, action 0 needs \[class, start, end\]"),
        ("Charades", "c147 0.00 12.60", "c147 0.00", "line 2: video 46GP8 has the action 'c147 0.00'"),
        ("SubRip", "01:00:00,250", "01:00:00:250", "new.srt line 6: .* is no time of a cue; write it as 00:01:02,500"),
        ("WebVTT", "00:03.000", "3 s", "new.vtt line 3: .00:01.500 --> 3 s align:start. is no time of a cue"),
        ("frame-wise", "pour_milk\n", "\n", "P03_milk.txt line 6 is empty, and labels of frames follow; write a label"),
        ("frame-wise", "SIL\n", "\nSIL\n", "P03_milk.txt line 1 is empty, and labels of frames"),
        ("runs of frames", "31-150", "150-31", "P03_milk.txt line 2: a run from frame 150 to 31"),
    ],
)
def test_the_sentence_says_where(name: str, old: str, new: str, sentence: str, tmp_path: Path) -> None:
    sample = SAMPLES[name]
    path = sample.write(tmp_path)
    assert old in sample.text
    path.write_text(sample.text.replace(old, new, 1))
    with pytest.raises(InputError, match=sentence):
        load_annotations(path, options=sample.options)


@pytest.mark.parametrize(
    ("name", "options", "sentence"),
    [
        ("Label Studio", {}, "does not say how many there are a second in walk 1; give --fps, or the folder"),
        ("CVAT", {"fps": None}, "its times are frames"),
        ("EPIC verb", {"label": "adverb"}, "--label adverb is none of EPIC-KITCHENS-100; it is verb, noun or action"),
        ("CholecT50", {"label": "surgeon"}, "--label surgeon is none of CholecT50"),
        ("ELAN", {"tiers": ("feet",)}, "--tiers feet: it has no such tier, but hands, tool"),
        ("OpenSportsLab 2 of all heads", {"label": "mood"}, "--label mood: it has no such head, but action, team"),
        ("VIA 3", {"label": "mood"}, "--label mood: it has no such attribute, but activity, comment"),
    ],
)
def test_what_a_format_leaves_open_is_asked_for(name: str, options: dict, sentence: str, tmp_path: Path) -> None:
    path = SAMPLES[name].write(tmp_path)
    with pytest.raises(InputError, match=sentence):
        load_annotations(path, options=FormatOptions(**options))


def test_a_flag_that_a_format_has_no_use_for_is_noted(tmp_path: Path) -> None:
    path = SAMPLES["TRACE"].write(tmp_path)
    notes = load_annotations(path, options=FormatOptions(tiers=("a",), fps=25)).notes
    assert [note for note in notes if "is not used" in note] == [
        f"{path}: --{name} is not used: nothing in these labels asks for it" for name in ("fps", "tiers")
    ]


def test_frames_are_counted_at_the_rate_of_the_videos(tmp_path: Path) -> None:
    path = SAMPLES["frame-wise"].write(tmp_path)
    (tmp_path / "v").mkdir()
    write_video(tmp_path / "v" / "P03_milk.mp4", 10, rate=20)
    (video,) = load_annotations(path, options=FormatOptions(videos=tmp_path / "v")).videos
    assert [(s.start, s.end) for s in video.segments] == [(2 / 20, 5 / 20), (5 / 20, 6 / 20)]


def test_frames_of_label_studio_that_are_taken_for_the_videos_are_told(tmp_path: Path) -> None:
    path = SAMPLES["Label Studio JSON-MIN"].write(tmp_path)
    (tmp_path / "v").mkdir()
    write_video(tmp_path / "v" / "w.mp4", 40, rate=20)
    found = load_annotations(path, options=FormatOptions(videos=tmp_path / "v"))
    assert (found.videos[0].segments[0].start, found.videos[0].segments[0].end) == (0.5, 1.0)
    assert any("24 where <Video> has none" in note and "give --fps" in note for note in found.notes)
    told = load_annotations(path, options=FormatOptions(fps=20.0)).notes
    assert not any("<Video>" in note for note in told)


def test_halves_of_a_game_are_named_like_their_files(tmp_path: Path) -> None:
    path = SAMPLES["SoccerNet"].write(tmp_path)
    game = "england_epl/2014-2015/2015-02-21 - 18-00 Chelsea 1 - 1 Burnley"
    (tmp_path / "v" / game).mkdir(parents=True)
    for name in ("1_224p.mkv", "1_720p.mkv", "2_224p.mkv", "Labels-v2.json"):
        (tmp_path / "v" / game / name).touch()
    found = load_annotations(path, options=FormatOptions(videos=tmp_path / "v"))
    assert [video.name for video in found.videos] == [f"{game}/1_720p", f"{game}/2_224p"]
    (tmp_path / "w" / game).mkdir(parents=True)
    (tmp_path / "w" / game / "720p.mp4").touch()
    whole = load_annotations(path, options=FormatOptions(videos=tmp_path / "w"))
    assert [video.name for video in whole.videos] == [f"{game}/720p"]


# Folders


def test_a_folder_of_classes_is_one_data_set(tmp_path: Path) -> None:
    (tmp_path / "annotation").mkdir()
    for label, rows in (
        ("Diving_val", "video_validation_0000001 1.0 2.0\nvideo_validation_0000002 3 4\n"),
        ("CliffDiving_val", "video_validation_0000001 1.0 2.0\n"),
        ("Diving_test", "video_test_0000001 5.0 6.5\n"),
        ("Ambiguous_val", "video_validation_0000002 7.0 8.0\n"),
    ):
        (tmp_path / "annotation" / f"{label}.txt").write_text(rows)
    (tmp_path / "README.txt").write_text("How the data set was made.\nBy hand.\n")
    found = load_annotations(tmp_path)
    assert {video.name: video.segments for video in found.videos} == {
        "video_test_0000001": segments([(5.0, 6.5, "Diving")]),
        "video_validation_0000001": segments([(1.0, 2.0, "CliffDiving"), (1.0, 2.0, "Diving")]),
        "video_validation_0000002": segments([(3.0, 4.0, "Diving")]),
    }
    assert {video.subset for video in found.subset("training")} == {"training"} and len(found.subset("testing")) == 1
    assert any("1 segment of Ambiguous dropped" in note for note in found.notes)
    assert any("1 file of no known format passed over: README.txt" in note for note in found.notes)


def test_files_of_one_name_in_several_folders(tmp_path: Path) -> None:
    labels, videos = tmp_path / "labels", tmp_path / "v"
    eaf = SAMPLES["ELAN"].text
    assert "cooking.mp4" in eaf
    of_folder = re.compile(r"(MEDIA_URL=\")[^\"]*cooking.mp4")
    labels.mkdir()
    for cam in ("cam1", "cam2"):
        (labels / f"{cam}.eaf").write_text(of_folder.sub(rf"\1file:///D:/old/{cam}/cooking.mp4", eaf))
        (videos / cam).mkdir(parents=True)
        write_video(videos / cam / "cooking.mp4", 4)
    for options in (FormatOptions(), FormatOptions(videos=videos)):
        found = load_annotations(labels, options=options)
        assert [(video.name, len(video.segments)) for video in found.videos] == [
            ("cam1/cooking", 3),
            ("cam2/cooking", 3),
        ]
        assert any("are as many videos, which have a folder in theirs: cam1/cooking, cam2" in n for n in found.notes)
    # two people opened one file, each from a place of their own
    found = load_annotations(labels, options=FormatOptions(videos=videos / "cam1"))
    assert [(video.name, len(video.segments)) for video in found.videos] == [("cooking", 3)]
    assert any("the segments of 1 video come from files in several folders and are put" in n for n in found.notes)


def test_labels_called_like_videos_of_one_name(tmp_path: Path) -> None:
    for number, cam in enumerate(("cam1", "cam2"), 1):
        (tmp_path / cam).mkdir()
        (tmp_path / cam / "a.srt").write_text(f"1\n00:00:0{number},000 --> 00:00:04,000\nrun\n")
    whole = load_annotations(tmp_path)
    assert [video.name for video in whole.videos] == ["a"] and len(whole.videos[0].segments) == 2
    assert any("come from files in several folders and are put together (a of" in note for note in whole.notes)
    for cam in ("cam1", "cam2"):
        write_video(tmp_path / cam / "a.mp4", 4)
    found = load_annotations(tmp_path, options=FormatOptions(videos=tmp_path))
    assert [(video.name, video.segments) for video in found.videos] == [
        ("cam1/a", segments([(1.0, 4.0, "run")])), ("cam2/a", segments([(2.0, 4.0, "run")])),
    ]  # fmt: skip


def test_times_of_frames_and_steps_of_a_goal_are_no_labels(tmp_path: Path) -> None:
    (tmp_path / "c").mkdir()
    for name, text in (
        ("video01-phase.txt", "Frame\tPhase\n0\tCut\n1\tCut\n"),
        ("video01-timestamp.txt", "Frame\tTimestamp\n0\t00:00:00.00\n1\t00:00:00.04\n"),
    ):
        (tmp_path / "c" / name).write_text(text)
    found = load_annotations(tmp_path / "c")
    assert found.videos == (Video("video01", "unassigned", 0.08, segments([(0.0, 0.08, "Cut")])),)
    assert any("passed over: video01-timestamp.txt" in note for note in found.notes)
    path = tmp_path / "goalstep_train.json"
    path.write_text(json.dumps({"videos": [{"video_uid": "u", "segments": [{"start_time": 1.0, "end_time": 2.0}]}]}))
    with pytest.raises(InputError, match="nor is it in another form"):
        load_annotations(path)


def test_the_files_of_epic_name_their_classes_alike(tmp_path: Path) -> None:
    text = SAMPLES["EPIC verb"].text
    lines = text.splitlines(keepends=True)
    (tmp_path / "EPIC_100_train.csv").write_text(text + lines[1])
    # alone, this one would call the class pick-up
    (tmp_path / "EPIC_100_validation.csv").write_text((lines[0] + lines[2]).replace("P01_1", "P02_1"))
    found = load_annotations(tmp_path)
    assert found.classes == ("take",)
    assert [(video.name, video.subset) for video in found.videos] == [("P01_1", "training"), ("P02_1", "validation")]
    assert load_annotations(tmp_path / "EPIC_100_validation.csv").classes == ("take",)


def test_what_spreadsheets_write_of_letters(tmp_path: Path) -> None:
    path = tmp_path / "labels.txt"
    path.write_text("video\tstart\tend\tlabel\nä\t1,5\t2\tläuft\n", encoding="utf-16")
    assert load_annotations(path).videos == (Video("ä", "unassigned", None, segments([(1.5, 2.0, "läuft")])),)
    path.write_text("video\tstart\tend\tlabel\nä\t1,5\t2\tläuft\n", encoding="latin-1")
    with pytest.raises(InputError, match=r"not UTF-8 text \(byte 22\); save it as UTF-8"):
        load_annotations(path)


def test_folders_that_cannot_be(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="a folder without a file of labels"):
        load_annotations(tmp_path)
    (tmp_path / "notes.txt").write_text("nothing\n")
    with pytest.raises(InputError, match="none of its 1 files is of a known format"):
        load_annotations(tmp_path)
    entry = {"duration": 9.0, "annotations": []}
    for name, subset in (("a", "training"), ("b", "validation")):
        (tmp_path / f"{name}.json").write_text(json.dumps({"database": {"v": {**entry, "subset": subset}}}))
    with pytest.raises(
        InputError,
        match="video v has the subset validation, and another file of the folder says training; name one file",
    ):
        load_annotations(tmp_path)


@pytest.mark.parametrize(
    ("paths", "names"),
    [
        (["C:\\v\\a.MP4", "b"], ["a", "b"]),
        (["/d/cam1/0.mp4", "/d/cam2/0.mp4", "/d/x.y.avi"], ["cam1/0", "cam2/0", "x.y"]),
        (["http://host/p/a%20b.mp4", "file:///home/a.v2", "100%25.mp4"], ["a b", "a.v2", "100%25"]),
        (["same.mp4", "same.mp4"], ["same", "same"]),
    ],
)
def test_names_of_media_files(paths: list[str], names: list[str]) -> None:
    found = file_names(paths)
    assert [found[path] for path in paths] == names


# What the tools themselves and the publishers of data sets have written


@pytest.mark.skipif(not SHARED.is_dir(), reason="the shared folder of real labels is not there")
@pytest.mark.parametrize(
    ("file", "videos", "count", "classes", "subsets"),
    [
        ("EPIC_100_validation.csv", 138, 9668, 78, {"validation"}),
        ("boris_aggregated_events.tsv", 2, 18, 2, {"unassigned"}),
        ("boris_project.boris", 4, 34, 4, {"unassigned"}),
        ("elan_sample_2.8.eaf", 1, 1596, 403, {"unassigned"}),
        ("multithumos.json", 413, 38690, 65, {"training", "testing"}),
        ("spot_tennis_val.json", 455, 3642, 6, {"validation"}),
    ],
)
def test_real_labels(file: str, videos: int, count: int, classes: int, subsets: set[str]) -> None:
    found = load_annotations(SHARED / file, clip=False)
    assert len(found.videos) == videos and sum(len(video.segments) for video in found.videos) == count
    assert len(found.classes) == classes and {video.subset for video in found.videos} == subsets


# What reads labels takes them all


def test_ground_truth_is_of_any_format(tmp_path: Path) -> None:
    path = SAMPLES["E2E-Spot"].write(tmp_path)
    assert load_ground_truth(path) == {"rally": [(2.0, 2.0, "serve")]}
    epic = SAMPLES["EPIC action"].write(tmp_path / "epic")
    assert load_ground_truth(epic, options=FormatOptions(label="noun"))["P01_1"][2] == (120.0, 121.0, "lid")
    assert load_subset(tmp_path / "epic", None)[0] == "validation"
    with pytest.raises(InputError, match="its times are frames"):
        load_ground_truth(SAMPLES["CVAT"].write(tmp_path / "cvat"))


@pytest.mark.parametrize("name", ["Label Studio JSON-MIN", "CVAT", "frame-wise"])
def test_check_reads_them_with_the_videos_at_hand(name: str, tmp_path: Path) -> None:
    sample = SAMPLES[name]
    path = sample.write(tmp_path)
    (tmp_path / "v").mkdir()
    for video in sample.videos:
        write_video(tmp_path / "v" / f"{video}.mp4", 80, rate=10)
    found = lofi_fast.check(annotations=str(path), videos=str(tmp_path / "v"), window=4).survey
    assert found is not None
    (one,) = found.videos
    assert [(round(s.start, 6), round(s.end, 6), s.label) for s in one.labelled.segments] == sample.videos[one.name][2]
    faster = lofi_fast.check(annotations=str(path), videos=str(tmp_path / "v"), fps=20, window=4).survey
    assert faster is not None
    assert faster.videos[0].labelled.segments[0].end == pytest.approx(one.labelled.segments[0].end / 2)


def test_settings_say_how_labels_are_read() -> None:
    config = configured(
        {"preset": "demo", "data.fps": 25.0, "data.label": "noun", "data.tiers": "a, b"}, cuda=lambda: False
    )
    assert FormatOptions.of(config.data) == FormatOptions(25.0, "noun", ("a", "b"), None)
    again = Config.from_json(config.to_json(), "config.json")
    assert again.data == config.data

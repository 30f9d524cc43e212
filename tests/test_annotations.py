"""Annotations: every repair is counted, every refusal names file, video and segment, nothing else crashes."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lofi_fast.data.annotations import UNASSIGNED, Annotations, Segment, Video, clip_to_duration, load_annotations
from lofi_fast.data.ground_truth import load_subset
from lofi_fast.data.split import choose_validation
from lofi_fast.errors import InputError

DATA = Path(__file__).resolve().parents[2] / "shared" / "data"


def entry(*segments: tuple[object, object, object], subset: object = "training", duration: object = 10.0) -> dict:
    return {
        "subset": subset,
        "duration": duration,
        "annotations": [{"segment": [start, end], "label": label} for start, end, label in segments],
    }


def load_json(folder: Path, database: object) -> Annotations:
    path = folder / "a.json"
    path.write_text(json.dumps({"version": "1", "database": database}))
    return load_annotations(path)


def load_csv(folder: Path, text: str) -> Annotations:
    path = folder / "a.csv"
    path.write_text(text)
    return load_annotations(path)


def test_activitynet_form(tmp_path: Path) -> None:
    found = load_json(
        tmp_path,
        {
            "x": entry((1.5, 2, "run"), (0, 10, "jump")),
            "y": entry((3, 4, "jump"), subset="validation", duration=None),
            "z": entry(subset="testing"),
        },
    )
    assert found.videos == (
        Video("x", "training", 10.0, (Segment(1.5, 2.0, "run"), Segment(0.0, 10.0, "jump"))),
        Video("y", "validation", None, (Segment(3.0, 4.0, "jump"),)),
        Video("z", "testing", 10.0, ()),
    )
    assert found.classes == ("jump", "run") and found.notes == () and found.untrained_classes == ()
    assert [video.name for video in found.subset("validation")] == ["y"]
    with pytest.raises(ValueError, match="subset must be"):
        found.subset("val")


def test_thumos_form_has_strings_and_no_durations(tmp_path: Path) -> None:
    video = {"subset": "test", "annotations": [{"segment": ["18.6", " 24.8"], "label": "HighJump"}]}
    found = load_json(tmp_path, {"video_test_0000896": video})
    assert found.videos == (Video("video_test_0000896", "testing", None, (Segment(18.6, 24.8, "HighJump"),)),)


@pytest.mark.parametrize(
    ("given_name", "subset"),
    [
        *[("train", "training"), ("VAL", "validation"), ("Testing", "testing"), (" validation ", "validation")],
        *[("TRAIN_SET", "training"), ("Val-1", "validation"), ("dev", "validation"), ("Test Set", "testing")],
    ],
)
def test_subset_names(given_name: str, subset: str, tmp_path: Path) -> None:
    assert load_json(tmp_path, {"x": entry(subset=given_name)}).videos[0].subset == subset


def test_repairs_are_counted_in_one_sentence_a_kind(tmp_path: Path) -> None:
    found = load_json(
        tmp_path,
        {
            "x": entry((2, 2, "a"), (8, 12, "a"), (9, 11.5, "a"), (1, 2, "a"), (1.0, "2", "a"), (11, 12, "a")),
            "y": entry((-1, 3, "b"), (10, 12, "b"), (-2, 0, "b"), (0, 0, "b"), (10, 10, "b"), (10.5, 10.5, "b")),
        },
    )
    assert found.videos[0].segments == (
        Segment(2, 2, "a"),
        Segment(8, 10, "a"),
        Segment(9, 10, "a"),
        Segment(1, 2, "a"),
    )
    assert found.videos[1].segments == (Segment(0, 3, "b"), Segment(0, 0, "b"), Segment(10, 10, "b"))
    where = tmp_path / "a.json"
    assert found.notes == (
        f"{where}: 3 segments have zero length and are kept",
        f"{where}: 1 segment starts before 0 s and is clipped",
        f"{where}: 2 segments end after the video and are clipped",
        f"{where}: 4 segments lie outside the video and are dropped",
        f"{where}: 1 segment is a duplicate and is removed",
    )


def test_clipping_can_make_duplicates(tmp_path: Path) -> None:
    found = load_json(tmp_path, {"x": entry((5, 11, "a"), (5, 12, "a"), (5, 12, "b"))})
    assert found.videos[0].segments == (Segment(5, 10, "a"), Segment(5, 10, "b"))


def test_a_class_of_validation_alone_is_kept_and_noted(tmp_path: Path) -> None:
    database = {
        "x": entry((1, 2, "run")),
        "y": entry((1, 2, "swim"), subset="validation"),
        "z": entry((1, 2, "secret"), subset="testing"),
    }
    found = load_json(tmp_path, database)
    assert found.classes == ("run", "swim") and found.untrained_classes == ("swim",)
    [note] = found.notes
    assert "1 class of validation never seen in training: swim" in note


BAD_VIDEOS = {
    "start_after_end": (entry((1, 2, "a"), (3, 2.5, "a")), r"video x, segment 1 starts at 3\.0 s, after its end"),
    "nan": (entry((math.nan, 2, "a")), "segment 0 runs from nan to 2; both must be finite"),
    "infinite": (entry((0, math.inf, "a")), "both must be finite"),
    "text_nan": (entry((0, "nan", "a")), "both must be finite"),
    "no_number": (entry((0, "1h 30", "a")), "runs from 0 to '1h 30'"),
    "boolean": (entry((0, True, "a")), "both must be finite"),
    "null": (entry((None, 1, "a")), "both must be finite"),
    "huge": (entry((0, 10**400, "a")), "both must be finite"),
    "negative_duration": (entry(duration=-1), "duration -1; it must be positive"),
    "zero_duration": (entry(duration=0), "positive seconds"),
    "nan_duration": (entry(duration=math.nan), "positive seconds"),
    "text_duration": (entry(duration="long"), "positive seconds"),
    "no_label": (entry((0, 1, None)), "segment 0 needs a label"),
    "empty_label": (entry((0, 1, " ")), "needs a label"),
    "number_label": (entry((0, 1, 5)), "needs a label, not 5"),
    "subset": (entry(subset="all"), "video x has the subset 'all'"),
    "no_subset": (entry(subset=None), "training, validation or testing"),
    "not_an_object": ([], "video x must be an object"),
    "no_annotations": ({"subset": "training"}, 'needs a list "annotations"'),
    "annotations_object": ({"subset": "training", "annotations": {}}, 'needs a list "annotations"'),
    "no_segment": ({"subset": "training", "annotations": [{"label": "a"}]}, "segment 0 needs"),
    "three_numbers": ({"subset": "training", "annotations": [{"segment": [1, 2, 3], "label": "a"}]}, "needs"),
    "segment_number": ({"subset": "training", "annotations": [7]}, "segment 0 needs"),
}


@pytest.mark.parametrize("case", BAD_VIDEOS)
def test_refusals_name_file_video_and_segment(case: str, tmp_path: Path) -> None:
    video, complaint = BAD_VIDEOS[case]
    with pytest.raises(InputError, match=complaint) as caught:
        load_json(tmp_path, {"good": entry((0, 1, "a")), "x": video})
    assert f"{tmp_path / 'a.json'}: video x" in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "content", "complaint"),
    [
        ("a.json", "{", "not valid JSON: .* at line 1"),
        ("a.json", "[]", 'needs an object "database"'),
        ("a.json", '{"database": []}', 'needs an object "database"'),
        ("a.json", '{"database": {}}', "holds no video"),
        ("a.json", '{"database": {"x": {}, "x": {}}}', "'x' appears twice"),
        ("a.json", '{"database": {"": {}}}', "empty name"),
        ("a.json", "[" * 100_000, "nested too deeply|not valid JSON"),
        ("a.csv", "", "it lacks video, start, end, label"),
        ("a.csv", "video,start,stop,label\n", "it lacks end"),
        ("a.csv", "video,start,end,label\n", "holds no video"),
        ("a.csv", "video,start,end,label,end\n", "column twice"),
        ("a.csv", "video,start,end,label\nx,1,2\n", "line 2 has 3 cells, the first line has 4"),
        ("a.csv", "video,start,end,label\nx,1,2,a\n,1,2,a\n", "line 3 has no video name"),
        ("a.csv", "video,start,end,label\nx,1,2,a\nx,2,1,a\n", "line 3: video x, segment 1 starts at"),
        ("a.csv", "video,start,end,label\nx,1,,a\n", "segment 0 runs from '1' to ''"),
        ("a.csv", "video,start,end,label\nx,1,2,\n", "needs a label"),
        ("a.csv", "video,start,end,label,subset\nx,1,2,a,\n", "subset ''"),
        ("a.csv", "video,start,end,label,subset\nx,1,2,a,val\nx,1,2,a,train\n", "an earlier line says validation"),
        ("a.csv", "video,start,end,label,duration\nx,1,2,a,5\nx,1,2,a,6\n", "an earlier line says 5"),
        ("a.csv", "video,start,end,label,duration\nx,1,2,a,-5\n", "positive seconds"),
        ("a.txt", "", "must be a .json file"),
    ],
)
def test_malformed_files(name: str, content: str, complaint: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(InputError, match=complaint) as caught:
        load_annotations(tmp_path / name)
    assert str(tmp_path / name) in str(caught.value)


def test_unreadable_files(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_bytes(b'{"database": "\xff"}')
    (tmp_path / "folder.json").mkdir()
    for name, complaint in (("a.json", "UTF-8"), ("folder.json", "cannot be read"), ("absent.csv", "No such file")):
        with pytest.raises(InputError, match=complaint):
            load_annotations(tmp_path / name)


def test_columns_that_are_not_read_are_told(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("video,start,end,label,split,score\na,1,2,run,train,1\n")
    (note,) = load_annotations(tmp_path / "a.csv").notes
    assert note.endswith("a.csv: columns that are not read: split, score; subsets are read of a column subset")
    (tmp_path / "a.csv").write_text("video,start,end,label,subset,fps,\na,1,2,run,train,25,\n")
    (note,) = load_annotations(tmp_path / "a.csv").notes
    assert note.endswith("a.csv: columns that are not read: fps")


def test_a_quotation_mark_that_is_left_open_swallows_no_line(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text('video,start,end,label\na,1,2,"run\nb,1,2,run\nc,1,2,run\n')
    with pytest.raises(InputError, match=r"a.csv line 4 ends a label .*; is a quotation mark left open\?"):
        load_annotations(tmp_path / "a.csv")


def test_a_row_that_is_too_long_is_told_of_by_the_line_where_it_begins(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text('# mine\nvideo,start,end,label\na,1,2,run\nb,1,2,"run\n' + "c,1,2,run\n" * 15_000)
    with pytest.raises(InputError, match=r"a.csv line 4 is not valid CSV: .*; is a quotation mark left open\?"):
        load_annotations(path)
    path.write_text("video,start,end,label\na,1,2,run\nb,1,2," + "n" * 140_000 + "\n")
    with pytest.raises(InputError, match=r"a.csv line 3 is not valid CSV: field larger than field limit \(\d+\)$"):
        load_annotations(path)


def test_a_comma_that_may_be_between_thousands_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    for time in ("1,250", "12,345", "1,234,567"):
        path.write_text(f'video,start,end,label\na,1,"{time}",run\n')
        with pytest.raises(InputError, match=f"line 2: video a has the time '{time}', which may have a decimal comma"):
            load_annotations(path)
    for time, seconds in (("1,25", 1.25), ("1,2500", 1.25), ("0,250", 0.25)):
        path.write_text(f'video,start,end,label\na,0,"{time}",run\n')
        assert load_annotations(path).videos[0].segments == (Segment(0, seconds, "run"),)
    path.write_text("video;start;end;label\na;0;1,250;run\n")
    assert load_annotations(path).videos[0].segments == (Segment(0, 1.25, "run"),)


def test_a_pipe_is_not_read_in_part(tmp_path: Path) -> None:
    os.mkfifo(pipe := tmp_path / "pipe")
    with pytest.raises(InputError, match=r"--annotations .*pipe is a pipe or a device.*; write it to a file first"):
        load_annotations(pipe)
    with pytest.raises(InputError, match=r"--ground-truth .*pipe is a pipe or a device.*; write it to a file first"):
        load_subset(pipe, None)


def test_csv(tmp_path: Path) -> None:
    found = load_csv(
        tmp_path,
        "\ufeffLabel, video ,start,end,subset,duration\r\n"
        '"high, jump",x,1,2.5,train,10\r\n'
        "\r\n"
        "run,y,0,3,val,\r\n"
        "run,x,4,5,train,\r\n"
        ",empty,,,train,7\r\n",
    )
    assert found.videos == (
        Video("x", "training", 10.0, (Segment(1, 2.5, "high, jump"), Segment(4, 5, "run"))),
        Video("y", "validation", None, (Segment(0, 3, "run"),)),
        Video("empty", "training", 7.0, ()),
    )
    assert found.classes == ("high, jump", "run")


@pytest.mark.parametrize(
    "text",
    [
        "video;start;end;label\r\na;1,0;2,5;x, y\r\n",
        "sep=;\r\nvideo;start;end;label\r\na;1.0;2.5;x, y\r\n",
        '"sep=;"\nvideo;start;end;label\na;1,0;2,5;"x, y"\n',
        "sep=\t\nvideo\tstart\tend\tlabel\na\t1\t2.5\tx, y\n",
        "video\tstart\tend\tlabel\na\t1\t2.5\tx, y\n",
        "video|start|end|label\na|1|2.5|x, y\n",
        'sep=,\nvideo,start,end,label\na,"1,0",2.5,"x, y"\n',
        '\ufeffvideo,start,end,label\na,"1,0","2,5","x, y"\n',
        'video,start,end,label\na,00:00:01,0:00:02.50,"x, y"\n',
        "video;start;end;label\na;0:01;00:00:02,5;x, y\n",
        '\n\n# made by a tool, on a day\n , , \nvideo,start,end,label\n# first\na,1,2.5,"x, y"\n# end, of it\n',
        "\ufeff# tabs\n#\nvideo\tstart\tend\tlabel\na\t1\t2.5\tx, y\n#\t\n",
        '# video,start,end,label\ra,1,2.5,"x, y"\r',
        '#video;start;end;label\r\n\r\na;1;2.5;"x, y"\r\n',
    ],
)
def test_csv_as_spreadsheets_write_it(text: str, tmp_path: Path) -> None:
    (video,) = load_csv(tmp_path, text).videos
    assert (video.name, video.segments) == ("a", (Segment(1.0, 2.5, "x, y"),))


def test_lines_are_counted_as_editors_do(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="line 5: video a, segment 0 runs from 'x'"):
        load_csv(tmp_path, "# one\n\nsep=;\nvideo;start;end;label\na;x;2;run\n")


def test_a_name_may_begin_like_a_comment(tmp_path: Path) -> None:
    assert [video.name for video in load_csv(tmp_path, "video,start,end,label\n#1,1,2,x\n").videos] == ["#1"]


def test_labels_in_several_spellings_are_noted(tmp_path: Path) -> None:
    labels = ("Run", "run", "high jump", "high  jump", "high_jump", "caf\u00e9", "cafe\u0301", "swim")
    (note,) = load_json(tmp_path, {"x": entry(*((i, i + 1, label) for i, label in enumerate(labels)))}).notes
    for part in ("'Run' and 'run'", "'high  jump' and 'high jump' and 'high_jump'", "classes of their own"):
        assert part in note
    assert "swim" not in note


@pytest.mark.parametrize(
    ("written", "seconds"),
    [("01:02:03.25", 3723.25), ("1:02:03", 3723), ("62:03", 3723), ("0:00", 0), ("100:00:00", 360000), ("12,5", 12.5)],
)
def test_times_as_people_write_them(written: str, seconds: float, tmp_path: Path) -> None:
    found = load_json(tmp_path, {"x": entry(("0", written, "a"), duration="200:00:00")})
    assert found.videos[0].segments == (Segment(0, seconds, "a"),)


@pytest.mark.parametrize(
    "written", ["1:2:3:4", "00:61:00", "00:00:75", "1:-2", ":30", "1,234,5", "1h", "1_0", "00:00:01:12"]
)
def test_times_that_are_none(written: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="both must be finite seconds"):
        load_json(tmp_path, {"x": entry(("0", written, "a"))})


@pytest.mark.parametrize(
    ("num_videos", "held_out"), [(1, []), (2, [1]), (4, [3]), (5, [4]), (9, [4]), (15, [4, 9, 14])]
)
def test_csv_without_subsets_is_split_by_name(num_videos: int, held_out: list[int], tmp_path: Path) -> None:
    names = [f"v{i:02d}" for i in range(num_videos)]
    lines = [f"{name},0,1,a" for name in reversed(names)]
    found = load_csv(tmp_path, "\n".join(["video,start,end,label", *lines]))
    assert len(found.subset(UNASSIGNED)) == num_videos
    assert sorted(choose_validation(found.videos)) == [names[i] for i in held_out]


def video_of(name: str, labels: str) -> Video:
    return Video(name, UNASSIGNED, None, tuple(Segment(i, i + 1, label) for i, label in enumerate(labels)))


@settings(max_examples=200)
@given(st.lists(st.text("abcdef", max_size=4), max_size=40))
def test_our_own_split_teaches_every_class_and_is_a_fifth_at_most(labels: list[str]) -> None:
    videos = [video_of(f"{i}", text) for i, text in enumerate(labels)]
    chosen = choose_validation(videos)
    assert chosen == choose_validation(videos[::-1])
    assert len(chosen) <= max(len(videos) // 5, 1)
    taught = {s.label for v in videos if v.name not in chosen for s in v.segments}
    assert taught == {label for text in labels for label in text}
    assert not chosen or any(v.segments for v in videos if v.name in chosen)


def test_our_own_split_holds_every_class_that_can_be_spared() -> None:
    videos = [video_of(f"{i:03d}", "common") for i in range(50)] + [video_of(f"r{i}", "z") for i in range(6)]
    videos += [video_of("only", "y")]
    chosen = choose_validation(videos)
    assert len(chosen) == 11 and "only" not in chosen
    assert 1 <= sum(name.startswith("r") for name in chosen) <= 2


def test_json_without_any_subset_is_divided_too(tmp_path: Path) -> None:
    bare = entry((0, 1, "a"))
    del bare["subset"]
    assert len(load_json(tmp_path, {"x": bare, "y": bare}).subset(UNASSIGNED)) == 2
    with pytest.raises(InputError, match="subset None"):
        load_json(tmp_path, {"x": bare, "y": entry((0, 1, "a"))})


def test_segments_are_left_as_they_are_where_files_tell_the_duration(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(json.dumps({"database": {"x": entry((8, 12, "a"), (11, 12, "a"), duration=10)}}))
    found = load_annotations(tmp_path / "a.json", clip=False)
    assert (len(found.videos[0].segments), found.videos[0].duration, found.notes) == (2, 10.0, ())


def test_clip_to_duration() -> None:
    video = Video("x", "training", 12.0, (Segment(1, 9, "a"), Segment(9.5, 12, "a"), Segment(3, 3, "b")))
    clipped, notes = clip_to_duration(video, 8.0)
    assert clipped == Video("x", "training", 8.0, (Segment(1, 8, "a"), Segment(3, 3, "b")))
    assert notes == (
        "x: 1 segment ends after the video and is clipped",
        "x: 1 segment lies outside the video and is dropped",
    )
    assert clip_to_duration(clipped, 8.0) == (clipped, ())
    for duration in (0.0, -1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match="positive"):
            clip_to_duration(video, duration)


seconds = st.floats(-5, 20, allow_nan=False)


@settings(max_examples=200)
@given(st.lists(st.tuples(seconds, seconds, st.sampled_from("ab"))), st.floats(0.1, 15))
def test_clipped_segments_lie_inside_and_none_that_did_is_lost(
    drawn: list[tuple[float, float, str]], duration: float
) -> None:
    segments = tuple(Segment(min(s, e), max(s, e), label) for s, e, label in drawn)
    clipped, _ = clip_to_duration(Video("x", "training", None, segments), duration)
    kept = clipped.segments
    assert all(0 <= s.start <= s.end <= duration for s in kept)
    assert len(set(kept)) == len(kept)
    inside = [s for s in segments if s.start >= 0 and s.end <= duration]
    assert set(inside) <= set(kept)
    assert clip_to_duration(clipped, duration) == (clipped, ())


@pytest.mark.skipif(not DATA.is_dir(), reason="the folder with real annotations is absent")
@pytest.mark.parametrize(
    ("file", "videos", "segments", "classes", "notes"),
    [
        ("annotations/activitynet13_validation.json", 4926, 7654 - 1 - 19, 200, 4),
        ("annotations/thumos14_groundtruth.json", 410, None, 20, None),
        ("ceiling/annotations.json", 15, 101, 4, 0),
    ],
)
def test_real_files(file: str, videos: int, segments: int | None, classes: int, notes: int | None) -> None:
    found = load_annotations(DATA / file)
    assert (len(found.videos), len(found.classes)) == (videos, classes)
    assert segments is None or sum(len(video.segments) for video in found.videos) == segments
    assert notes is None or len(found.notes) == notes

"""The command `convert`, and what is written for labelling tools: it is read again to the same segments."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path

import pytest
from label_samples import SAMPLES
from test_video import write_video

from lofi_fast.convert import FORMS, main
from lofi_fast.data.annotations import Annotations, FormatOptions, load_annotations
from lofi_fast.data.exports import ENDINGS, TOOLS, medium_of, write_for
from lofi_fast.data.formats.file import Medium
from lofi_fast.detections import Detection, lanes, write_csv, write_predictions
from lofi_fast.metrics import load_predictions

Captured = pytest.CaptureFixture[str]
FOUND = {
    "walk": [
        Detection(0.48, 2.0, "run", 0.9),
        Detection(1.0, 3.04, "run", 0.5),  # overlaps the first
        Detection(2.0, 2.52, "run", 0.25),  # touches the first
        Detection(0.0, 12.0, "<b> & \"high\" jump, 'é'", 0.125),
        Detection(4.0, 4.48, "run", 0.0625),
    ],
    "cam 2": [Detection(1.0, 1.2, "Sit", 1.0)],
    "empty": [],
}


def times(annotations: Annotations) -> dict[str, list[tuple[str, float, float]]]:
    return {
        video.name: sorted((s.label, round(s.start, 6), round(s.end, 6)) for s in video.segments)
        for video in annotations.videos
    }


EXPECTED = {name: sorted((d.label, d.start, d.end) for d in items) for name, items in FOUND.items()}


@pytest.mark.parametrize("form", ["elan", "boris", "label-studio", "via", "srt", "vtt", "csv"])
def test_detections_are_read_again_as_they_were(form: str, tmp_path: Path, capsys: Captured) -> None:
    write_predictions(tmp_path / "found.json", FOUND)
    out = tmp_path / ("out" if form != "csv" else "out.csv")
    assert main([str(tmp_path / "found.json"), str(out), "--to", form, "--fps", "25"]) == 0
    assert "3 videos, 6 of 6 detections" in capsys.readouterr().out
    found = times(load_annotations(out, options=FormatOptions(fps=25)))
    assert found == {name: own for name, own in EXPECTED.items() if own or form != "csv"}


def test_labels_that_look_like_a_further_tier_of_elan(tmp_path: Path) -> None:
    found = {
        "v": [
            *(Detection(at, at + 2.0, "run", 0.5) for at in (1.0, 2.0)),
            *(Detection(at, at + 2.0, label, 0.5) for at in (5.0, 6.0) for label in ("run (2)", "a\tb", "a b\ufffe")),
        ]
    }
    path = tmp_path / "v.eaf"
    write_for("elan", path, found, {"v": Medium("v.mp4")})
    in_one_line = {"a\tb": "a b", "a b\ufffe": "a b"}
    assert times(load_annotations(path, clip=False)) == {
        "v": sorted({(in_one_line.get(d.label, d.label), d.start, d.end) for d in found["v"]})
    }


def test_labels_of_two_lines_are_one_in_a_table(tmp_path: Path) -> None:
    write_predictions(tmp_path / "found.json", {"v": [Detection(1.0, 2.0, "run\r\n up", 0.5)]})
    labels = {"database": {"v": {"subset": "training", "annotations": [{"segment": [1, 2], "label": "run\n\nup"}]}}}
    (tmp_path / "labels.json").write_text(json.dumps(labels))
    for source in ("found", "labels"):
        assert main([str(tmp_path / f"{source}.json"), str(tmp_path / f"{source}.csv")]) == 0
        assert times(load_annotations(tmp_path / f"{source}.csv")) == {"v": [("run up", 1.0, 2.0)]}


def test_a_name_is_an_address_in_label_studio(tmp_path: Path) -> None:
    found = {name: [Detection(1.0, 2.0, "run", 0.5)] for name in ("100%25", "why?", "a b")}
    path = tmp_path / "found.json"
    write_for("label-studio", path, found, {name: Medium(f"/v/{name}.mp4", None, 25.0) for name in found})
    assert times(load_annotations(path)) == {name: [("run", 1.0, 2.0)] for name in found}


@pytest.mark.parametrize("tool", TOOLS)
def test_a_tool_finds_the_files(tool: str, tmp_path: Path) -> None:
    video = write_video(tmp_path / "walk.mp4", 20, rate=20)
    medium = medium_of(video)
    assert (medium.path, medium.fps) == (str(video), 20) and medium.duration == pytest.approx(1.0, abs=0.1)
    path = tmp_path / f"found{ENDINGS[tool]}"
    write_for(tool, path, {"walk": [Detection(0.25, 0.75, "run", 0.5)]}, {"walk": medium})
    assert times(load_annotations(path, options=FormatOptions(videos=tmp_path))) == {"walk": [("run", 0.25, 0.75)]}
    assert times(load_annotations(path)) == {"walk": [("run", 0.25, 0.75)]}  # without a word of the frame rate
    assert "walk.mp4" in path.read_text()


def test_points_stay_points_where_the_tool_has_them(tmp_path: Path) -> None:
    found = {"v": [Detection(1.0, 1.0, "hit", 1.0), Detection(1.0, 1.0, "hit", 0.5), Detection(2.0, 2.0, "hit", 1.0)]}
    for tool, ends in (("boris", 1.0), ("via", 1.0), ("elan", 1.001)):
        path = tmp_path / f"found{ENDINGS[tool]}"
        write_for(tool, path, found, {"v": Medium("v.mp4")})
        assert times(load_annotations(path))["v"][0] == ("hit", 1.0, ends)


def test_lanes_hold_no_two_that_overlap_or_touch() -> None:
    found = lanes(FOUND["walk"])
    assert sorted(d.start for lane in found for d in lane) == sorted(d.start for d in FOUND["walk"])
    assert all(one.end < other.start for lane in found for one, other in pairwise(lane))
    assert len(found) == 4  # so many overlap or touch at 2 s


@pytest.mark.parametrize("name", SAMPLES)
def test_labels_become_activitynet_json_and_csv(name: str, tmp_path: Path) -> None:
    sample = SAMPLES[name]
    path = sample.write(tmp_path / "in")
    options = sample.options
    flags = [
        *(["--fps", str(options.fps)] if options.fps else []),
        *(["--label", options.label] if options.label else []),
        *(["--tiers", ",".join(options.tiers)] if options.tiers else []),
    ]
    whole = load_annotations(path, options=options, clip=False)
    for file in ("a.json", "a.csv"):
        assert main([str(path), str(tmp_path / file), *flags]) == 0
        assert load_annotations(tmp_path / file, clip=False).videos == whole.videos


def test_labels_are_counted_and_explained(tmp_path: Path, capsys: Captured) -> None:
    path = SAMPLES["BORIS project"].write(tmp_path)
    assert main([str(path), str(tmp_path / "a.json")]) == 0
    said = capsys.readouterr().out.splitlines()
    assert f"note: {path}: 1 observation without media files dropped" in said
    assert said[-2:] == [
        "no subset: 3 videos, 5 segments of which 1 are points, 3 classes",
        f"written: {tmp_path / 'a.json'}",
    ]
    assert "subset" not in json.loads((tmp_path / "a.json").read_text())["database"]["a"]


def test_labels_have_no_scores(tmp_path: Path, capsys: Captured) -> None:
    (tmp_path / "labels.csv").write_text("video,start,end,label\nv,0,1,a\n")
    assert main([str(tmp_path / "labels.csv"), str(tmp_path / "labels.json"), "--min-score", "0.5"]) == 0
    assert "labels.csv: --min-score is not used: labels have no scores" in capsys.readouterr().out


def test_scores_of_a_table_are_kept(tmp_path: Path) -> None:
    write_csv(tmp_path / "found.csv", FOUND)
    flags = ["--min-score", "0.4"]
    assert main([str(tmp_path / "found.csv"), str(tmp_path / "found.json"), *flags]) == 0
    assert load_predictions(tmp_path / "found.json") == {
        name: [(d.start, d.end, d.label, d.score) for d in items if d.score >= 0.4]
        for name, items in FOUND.items()
        if items
    }


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_a_table_of_detections_as_spreadsheets_write_it(encoding: str, tmp_path: Path) -> None:
    text = "video;start;end;label;score\nwalk;1,5;0:02,5;run;0,9\n\nwalk;3;4; sit ;1\n"
    (tmp_path / "found.csv").write_text(text, encoding=encoding)
    assert main([str(tmp_path / "found.csv"), str(tmp_path / "found.json")]) == 0
    assert load_predictions(tmp_path / "found.json") == {"walk": [(1.5, 2.5, "run", 0.9), (3.0, 4.0, "sit", 1.0)]}


def test_labels_with_scores_keep_their_subsets(tmp_path: Path, capsys: Captured) -> None:
    (tmp_path / "a.csv").write_text("video,start,end,label,score,subset\na,1,2,run,1,train\nb,1,2,run,1,val\n")
    assert main([str(tmp_path / "a.csv"), str(tmp_path / "a.json")]) == 0
    assert [video.subset for video in load_annotations(tmp_path / "a.json").videos] == ["training", "validation"]


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ("a,1,2,,1", "line 2: video a needs a label"),
        (",1,2,run,1", "line 2: a video has an empty name"),
        ("a,2,1,run,1", "line 2: video a starts at 2.0 s, after its end at 1.0 s"),
        ("a,1,nan,run,1", "line 2: video a runs from '1' to 'nan'"),
        ("a,1,2,run,inf", "line 2: video a has the score 'inf'"),
        ("a,1,2,run,1:30", "line 2: video a has the score '1:30'"),
        ("a,1,2,run,", "line 2: video a has the score ''"),
    ],
)
def test_a_bad_row_of_a_table_is_named(row: str, says: str, tmp_path: Path, capsys: Captured) -> None:
    (tmp_path / "found.csv").write_text(f"video,start,end,label,score\n{row}\n")
    assert main([str(tmp_path / "found.csv"), str(tmp_path / "found.json")]) == 2
    assert says in capsys.readouterr().err and not (tmp_path / "found.json").exists()


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["{found}", "out"], "out: its suffix names no format; give --to, one of activitynet, csv"),
        (
            ["{found}", "out.eaf"],
            "out.eaf: a file of elan holds one video, and there are 3; name a folder, and give --to",
        ),
        (["{found}", "{found}"], "found.json is there already; name another file, or give --overwrite"),
        (["{found}", "x", "--to", "label-studio"], "how many walk has a second is not known; give --fps"),
        (["{found}", "x", "--to", "boris", "--videos", "nowhere"], "--videos nowhere: no such folder"),
        (["nowhere.json", "a.json"], "nowhere.json: no such file or folder of labels or detections"),
        (["{found}", "a.json", "--to", "word"], f"--to 'word': choose one of {', '.join(FORMS)}"),
        (["{found}"], "OUT is missing"),
        (["{bad}", "a.json"], 'bad.json is not in ActivityNet form: it needs an object "database"'),
    ],
)
def test_bad_input_is_one_sentence(
    words: list[str], says: str, tmp_path: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write_predictions(tmp_path / "found.json", FOUND)
    (tmp_path / "bad.json").write_text('{"videos": 3}')
    before = sorted(tmp_path.rglob("*"))
    filled = [word.format(found=tmp_path / "found.json", bad=tmp_path / "bad.json") for word in words]
    assert main(filled) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and says in line
    assert sorted(tmp_path.rglob("*")) == before

"""The command `evaluate`: what it prints, writes and draws, and the sentences for what it cannot do."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lofi_fast.data.formats import frames as frame_labels
from lofi_fast.data.ground_truth import load_subset
from lofi_fast.evaluate import main
from lofi_fast.metrics import average_recall, load_predictions, parse_tiou
from tests.test_diagnosis import random_set

PNG = b"\x89PNG\r\n\x1a\n"


@pytest.fixture
def files(tmp_path: Path) -> list[str]:
    """--ground-truth and --predictions of a set whose durations are told, but for one video's."""
    truth, predictions, durations = random_set(0)
    database = {
        name: {
            "subset": "validation",
            "annotations": [{"segment": [s, e], "label": label} for s, e, label in segments],
            **({"duration": durations[name]} if name != "v1" else {}),
        }
        for name, segments in truth.items()
    }
    results = {
        name: [{"segment": [s, e], "label": label, "score": score} for s, e, label, score in items]
        for name, items in predictions.items()
    }
    (tmp_path / "g.json").write_text(json.dumps({"database": database}))
    (tmp_path / "p.json").write_text(json.dumps({"results": results}))
    return ["--ground-truth", str(tmp_path / "g.json"), "--predictions", str(tmp_path / "p.json")]


def numbers(path: Path) -> dict[str, Any]:
    return dict(json.loads(path.read_text()))


def refused(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    assert main(list(argv)) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.startswith("error: ") and captured.err.count("\n") == 1
    return captured.err


def test_everything_as_text_json_and_pictures(
    files: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    written, pictures = tmp_path / "m.json", tmp_path / "new" / "pictures"
    flags = ["--pictures", str(pictures), "--json", str(written), "--frames", "4", "--bootstrap", "50", "--per-class"]
    assert main([*files, *flags, "--buckets", "thumos"]) == 0
    out = capsys.readouterr().out
    for part in ("mAP (%)", "95% intervals over videos, 50 draws, seed 0", "AR@100", "normalised mAP", "background",
                 "mAP over frames (%)", "coverage", "note: nothing tells how long 1 video of 12"):  # fmt: skip
        assert part in out
    told = numbers(written)
    found, truth = load_predictions(tmp_path / "p.json"), load_subset(tmp_path / "g.json", None).truth
    assert told["average_recall"]["auc"] == average_recall(truth, found, parse_tiou("activitynet")).auc
    low, high = told["intervals"]["average_map"]
    assert low < told["average_map"] < high and told["intervals"]["draws"] == 50
    assert list(told["diagnosis"]["characteristics"]) == ["length", "coverage", "instances"]
    covered = sum(group["num_segments"] for group in told["diagnosis"]["characteristics"]["coverage"])
    assert 0 < covered < told["diagnosis"]["num_segments"]  # all but those of v1
    shares = np.array(list(told["diagnosis"]["false_positives"].values()))
    assert shares.shape == (6, 10) and shares[:, 0].sum() == pytest.approx(1)
    assert 0 < told["frame_map"]["average_map"] < 1
    assert {path.name for path in pictures.iterdir()} == {
        "map.png", "recall.png", "characteristics.png", "false_positives.png"
    }  # fmt: skip
    assert all(path.read_bytes().startswith(PNG) for path in pictures.iterdir())


def test_the_same_seed_gives_the_same_intervals(files: list[str], tmp_path: Path) -> None:
    intervals = []
    for seed in ("1", "1", "2"):
        assert main([*files, "--bootstrap", "40", "--seed", seed, "--json", str(tmp_path / "m.json")]) == 0
        intervals.append(numbers(tmp_path / "m.json")["intervals"])
    assert intervals[0] == intervals[1] != intervals[2]


def test_only_what_is_asked_for(files: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*files, "--recall", "--json", str(tmp_path / "m.json")]) == 0
    assert "AR@10" in capsys.readouterr().out
    assert not {"intervals", "diagnosis", "frames", "frame_map"} & numbers(tmp_path / "m.json").keys()
    assert main([*files, "--diagnose", "--tiou", "thumos"]) == 0
    out = capsys.readouterr().out
    assert "to 3 s" in out and "AR@10" not in out


def test_without_any_prediction_the_recall_is_left_out(
    files: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "p.json").write_text(json.dumps({"results": {"v0": []}}))
    assert main([*files, "--full", "--bootstrap", "5"]) == 0
    assert "no average recall: there is no prediction" in capsys.readouterr().out


def test_points_have_no_diagnosis(files: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    points = [{"segment": [3, 3], "label": "c0"}]
    (tmp_path / "g.json").write_text(json.dumps({"database": {"v0": {"subset": "validation", "annotations": points}}}))
    assert main([*files, "--full", "--bootstrap", "5"]) == 0
    out = capsys.readouterr().out
    assert "note: no diagnosis: all segments of the ground truth are points" in out and "mAP_N" not in out


def test_points_are_not_what_tiou_compares(
    files: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    points = [{"segment": [second, second], "label": "c0"} for second in (1, 3)]
    (tmp_path / "g.json").write_text(json.dumps({"database": {"v0": {"subset": "val", "annotations": points}}}))
    assert main(files) == 0
    assert "any prediction of no length hits any of them; --tolerance scores points" in capsys.readouterr().out
    assert main([*files, "--tolerance", "1"]) == 0
    assert "points in time" not in capsys.readouterr().out


def test_videos_that_the_predictions_do_not_name_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "g.csv").write_text("video,start,end,label\na,1,2,run\nb,1,2,run\nc,1,2,run\nc,3,4,run\nd,1,2,run\n")
    found = {"a": [{"segment": [1, 2], "label": "run", "score": 1}], "d": []}
    (tmp_path / "p.json").write_text(json.dumps({"results": found}))
    files = ["--ground-truth", str(tmp_path / "g.csv"), "--predictions", str(tmp_path / "p.json")]
    for flags in ([], ["--tolerance", "1"]):
        assert main([*files, *flags]) == 0
        out = capsys.readouterr().out
        assert "the predictions do not name 2 of the 4 videos, such as b, whose 3 segments count as missed" in out


def test_how_the_ground_truth_was_read_is_told(
    files: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table = tmp_path / "g.csv"
    table.write_text("video,start,end,label,duration\nv0,1,2,c0,9\nv0,1,2,c0,9\nv0,5,12,c0,9\n")
    assert main(["--ground-truth", str(table), *files[2:], "--fps", "5", "--json", str(tmp_path / "m.json")]) == 0
    out = capsys.readouterr().out
    for note in ("1 segment is a duplicate", "1 segment ends after the video and is clipped", "--fps is not used"):
        assert f"note: {table}: {note}" in out
        assert any(note in told for told in numbers(tmp_path / "m.json")["notes"])
    assert main([*files, "--fps", "5"]) == 0
    assert f"note: {files[1]}: --fps is not used" in capsys.readouterr().out


def test_labels_without_subsets_are_one_whatever_their_form(files: list[str], tmp_path: Path) -> None:
    assert main([*files, "--json", str(tmp_path / "m.json")]) == 0
    with_subset = numbers(tmp_path / "m.json")["average_map"]
    content = json.loads(Path(files[1]).read_text())
    for entry in content["database"].values():
        del entry["subset"]
    Path(files[1]).write_text(json.dumps(content))
    assert main([*files, "--json", str(tmp_path / "m.json")]) == 0
    assert numbers(tmp_path / "m.json")["average_map"] == with_subset > 0


def test_videos_tell_how_long_they_are(files: list[str], tmp_path: Path) -> None:
    video = Path(__file__).parents[2] / "shared" / "data" / "videos" / "h264_340x256_28fps.mp4"
    if not video.exists():
        pytest.skip(f"{video} is not here")
    (tmp_path / "videos").mkdir()
    (tmp_path / "videos" / "v1.mp4").symlink_to(video)
    coverage = []
    for flags in ([], ["--videos", str(tmp_path / "videos")]):
        assert main([*files, "--diagnose", "--json", str(tmp_path / "m.json"), *flags]) == 0
        told = numbers(tmp_path / "m.json")["diagnosis"]
        coverage.append((told["num_left_out"], sum(g["num_segments"] for g in told["characteristics"]["coverage"])))
    assert coverage[0] != coverage[1]  # segments of v1 are longer than the file, or have a coverage now


def test_the_commands_of_the_documentation_run(
    files: list[str], labelled: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "g.json").rename(tmp_path / "labels.json")
    results = json.loads((tmp_path / "p.json").read_text())["results"]
    results["P03_milk"] = [{"segment": [0.3, 0.7], "label": "take", "score": 0.9}]
    (tmp_path / "detections.json").write_text(json.dumps({"results": results}))
    labels = json.loads((tmp_path / "labels.json").read_text())["database"]
    for name in ("multithumos.json", "charades.json"):
        actions = {
            video: {
                "subset": "testing",
                "duration": 100.0,
                "actions": [[one["label"], *one["segment"]] for one in entry["annotations"]],
            }
            for video, entry in labels.items()
        }
        (tmp_path / name).write_text(json.dumps(actions))
    monkeypatch.chdir(tmp_path)
    text = (Path(__file__).parents[1] / "docs" / "evaluation.md").read_text()
    commands = [
        shlex.split(line, comments=True) for line in text.splitlines() if line.startswith("lofi-fast evaluate ")
    ]
    assert len(commands) == 9
    for command in commands:
        assert main(command[2:]) == 0, command
    assert (tmp_path / "scores.json").exists() and len(list((tmp_path / "pictures").iterdir())) == 4


# --- labels of frames ---------------------------------------------------------------------------------------------


@pytest.fixture
def labelled(tmp_path: Path) -> list[str]:
    """Two videos as MS-TCN has them: labels in groundTruth/, and what was recognised beside it."""
    truth = {"P03_milk": ["SIL"] * 4 + ["take"] * 6 + ["pour"] * 10, "P04_tea": ["take"] * 10 + ["background"] * 5}
    found = {"P03_milk": ["SIL"] * 5 + ["take"] * 5 + ["pour"] * 10, "P04_tea": ["take"] * 4 + ["pour"] * 11}
    (tmp_path / "groundTruth").mkdir()
    (tmp_path / "results").mkdir()
    for name, labels in truth.items():
        (tmp_path / "groundTruth" / f"{name}.txt").write_text("\n".join(labels) + "\n")
    (tmp_path / "results" / "P03_milk").write_text(f"### Frame level recognition: ###\n{' '.join(found['P03_milk'])}")
    (tmp_path / "results" / "P04_tea.txt").write_text("1-4 take\n5-15 pour\n")
    return ["--ground-truth", str(tmp_path / "groundTruth"), "--predictions", str(tmp_path / "results")]


def test_labels_of_frames(labelled: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    written, pictures = tmp_path / "m.json", tmp_path / "pictures"
    flags = ["--fps", "15", "--json", str(written), "--pictures", str(pictures), "--bootstrap", "20"]
    assert main([*labelled, *flags]) == 0
    out = capsys.readouterr().out
    assert "2 videos, 35 frames" in out and "mAP" not in out
    told = numbers(written)["frames"]
    assert told["accuracy"] == pytest.approx(100 * (19 + 4) / 35)
    assert told["edit"] == pytest.approx((100 + 50) / 2)
    # take and pour of the first, take of the second at an overlap of 4 / 10; its pour is wrong
    assert [told[f"F1@{k}"] for k in (10, 25, 50)] == pytest.approx([100 * 6 / 7, 100 * 6 / 7, 100 * 4 / 7])
    assert [path.name for path in pictures.iterdir()] == ["frames.png"]
    assert main([*labelled, "--fps", "15", "--background", "background", "--json", str(written)]) == 0
    kept = numbers(written)["frames"]  # SIL is a class like the others: one segment more that is right
    assert kept["F1@10"] == pytest.approx(100 * 8 / 9) and kept["accuracy"] == told["accuracy"]


def test_detections_against_labels_of_frames(labelled: list[str], tmp_path: Path) -> None:
    found = {"P03_milk": [(4 / 15, 10 / 15, "take", 0.9), (10 / 15, 20 / 15, "pour", 0.8), (0, 2, "take", 0.1)],
             "P04_tea": [(0, 10 / 15, "take", 0.7)]}  # fmt: skip
    results = {
        name: [{"segment": [s, e], "label": label, "score": score} for s, e, label, score in items]
        for name, items in found.items()
    }
    (tmp_path / "p.json").write_text(json.dumps({"results": results}))
    flags = [*labelled[:2], "--predictions", str(tmp_path / "p.json"), "--fps", "15", "--frames", "15"]
    assert main([*flags, "--min-score", "0.2", "--json", str(tmp_path / "m.json")]) == 0
    told = numbers(tmp_path / "m.json")
    assert (told["frames"]["accuracy"], told["frames"]["F1@50"]) == (100, 100)
    assert main([*flags, "--json", str(tmp_path / "m.json")]) == 0
    assert numbers(tmp_path / "m.json")["frames"]["accuracy"] == pytest.approx(100 * 31 / 35)


def test_what_programs_write_of_frames_is_read(tmp_path: Path) -> None:
    for name, text in (("a.txt", "x\nx\ny\n"), ("a", "### recognised ###\nx x\ny\n"), ("a.mp4.txt", "1-2 x\n3-3 y\n")):
        path = tmp_path / name
        path.write_text(text)
        assert frame_labels.recognised(path) == ("a", [(0, 2, "x"), (2, 3, "y")])


# --- bad input ----------------------------------------------------------------------------------------------------


def test_bad_frames(files: list[str], labelled: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "--fps says how many" in refused(capsys, *labelled)
    assert "--frames many: must be" in refused(capsys, *files, "--frames", "many")
    assert "--frames 0: must be" in refused(capsys, *files, "--frames", "0")
    assert "--frames charades needs how long" in refused(capsys, *files, "--frames", "charades")
    too_many = refused(capsys, *labelled, "--fps", "1e-7", "--frames", "1000")
    assert "more than 50,000,000 in all; give --frames a lower rate" in too_many
    empty = tmp_path / "empty"
    empty.mkdir()
    flags = [*labelled[:2], "--predictions", str(empty), "--fps", "15"]
    assert "the folder holds no file" in refused(capsys, *flags)
    (empty / "other.txt").write_text("take\ntake\n")
    assert "'other' against 'P03_milk'" in refused(capsys, *flags)
    (empty / "other").write_text("pour\n")
    assert "is of the video other, as another file of the folder is" in refused(capsys, *flags)
    (empty / "other").unlink()
    (empty / "P03_milk.txt").write_bytes(b"\xff\xfe\x00")
    assert "cannot be read as labels of frames" in refused(capsys, *flags)
    (empty / "P03_milk.txt").write_text("1-4 take\nand so on\n")
    assert "line 2" in refused(capsys, *flags)


@pytest.mark.parametrize(
    ("score", "flags", "says"),
    [
        (
            -2.5,
            ("--frames", "4"),
            "the score -2.5 is not 0 or more, and --frames gives a frame without a detection the",
        ),
        (
            7.0,
            ("--tolerance", "tight"),
            "the score 7 is not from 0 to 1, and SoccerNet's definition reads its curve at",
        ),
        (-2.5, ("--tolerance", "loose"), "the score -2.5 is not from 0 to 1, and SoccerNet's"),
        (-2.5, ("--tolerance", "1,2"), ""),
        (7.0, ("--frames", "4"), ""),
        (-2.5, (), ""),
    ],
)
def test_scores_that_a_measure_cannot_rank(
    score: float, flags: tuple[str, ...], says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    truth = {"subset": "validation", "duration": 9.0, "annotations": [{"segment": [1, 4], "label": "a"}]}
    found = [{"segment": [1, 4], "label": "a", "score": score}]
    (tmp_path / "g.json").write_text(json.dumps({"database": {"v": truth}}))
    (tmp_path / "p.json").write_text(json.dumps({"results": {"v": found}}))
    words = ["--ground-truth", str(tmp_path / "g.json"), "--predictions", str(tmp_path / "p.json"), *flags]
    if says:
        assert f"p.json, video v: {says}" in refused(capsys, *words)
    else:
        assert main(words) == 0 and "100.00" in capsys.readouterr().out


def test_targets_are_checked_first(files: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    assert "--pictures" in refused(capsys, *files, "--pictures", str(tmp_path / "file"))
    assert "--json" in refused(capsys, *files, "--json", str(tmp_path / "none" / "m.json"))
    assert "--videos" in refused(capsys, *files, "--diagnose", "--videos", str(tmp_path / "none"))
    assert "--buckets" in refused(capsys, *files, "--buckets", "mine")
    assert "--bootstrap -1" in refused(capsys, *files, "--bootstrap", "-1")
    assert not list(tmp_path.glob("*.partial"))

"""The files that detections are written to, each read back by its own rules."""

from __future__ import annotations

import csv
import json
import re
from html import unescape
from pathlib import Path

import av
import numpy as np
import pytest

from lofi_fast.detections import (
    MAX_CLASSES,
    MAX_LINES,
    Detection,
    detector_of,
    draw_timeline,
    write_csv,
    write_predictions,
    write_srt,
    write_vtt,
)
from lofi_fast.errors import InputError
from lofi_fast.metrics import load_predictions

FOUND = [
    Detection(3723.4567, 3725.0, "long jump", 0.98765),
    Detection(0.0, 0.0001, "blink", 0.5),
    Detection(59.9996, 61.2, "rise & <fall>", 0.25),
    Detection(59.0, 62.0, "one\n\n2 --> line", 0.125),
]
BY_START = [FOUND[1], FOUND[3], FOUND[2], FOUND[0]]


def seconds(stamp: str) -> float:
    hours, minutes, rest = stamp.split(":")
    assert len(minutes) == 2 and len(rest) == 6
    return 3600 * int(hours) + 60 * int(minutes) + float(rest)


def test_predictions_keep_their_bytes(tmp_path: Path) -> None:
    write_predictions(tmp_path / "p.json", {"v": [Detection(17.1875, 21.875, "blink", 0.8885477154907555)], "w é": []})
    assert (tmp_path / "p.json").read_bytes() == (
        b'{"version": "VERSION 1.3", "results": {"v": [{"segment": [17.1875, 21.875], "score": 0.8885477154907555, '
        b'"label": "blink"}], "w \\u00e9": []}, "external_data": {}}\n'
    )
    assert load_predictions(tmp_path / "p.json")["v"] == [(17.1875, 21.875, "blink", 0.8885477154907555)]


def test_csv_is_a_table_of_seconds(tmp_path: Path) -> None:
    write_csv(tmp_path / "p.csv", {'a, "b"': FOUND, "empty": []})
    with (tmp_path / "p.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [row["video"] for row in rows] == ['a, "b"'] * 4
    assert [row["label"] for row in rows] == [d.label for d in FOUND]
    for row, d in zip(rows, FOUND, strict=True):
        assert float(row["start"]) == pytest.approx(d.start, abs=5e-4)
        assert float(row["end"]) == pytest.approx(d.end, abs=5e-4)
        assert float(row["score"]) == pytest.approx(d.score, abs=1e-6)


def test_srt_has_a_cue_for_each_detection_in_time_order(tmp_path: Path) -> None:
    write_srt(tmp_path / "v.srt", FOUND)
    cues = (tmp_path / "v.srt").read_text(encoding="utf-8").rstrip("\n").split("\n\n")
    assert len(cues) == 4
    for number, (cue, d) in enumerate(zip(cues, BY_START, strict=True), 1):
        first, times, text = cue.split("\n")
        assert first == str(number)
        match = re.fullmatch(r"(\d\d:\d\d:\d\d),(\d{3}) --> (\d\d:\d\d:\d\d),(\d{3})", times)
        assert match is not None
        start, end = seconds(f"{match[1]}.{match[2]}"), seconds(f"{match[3]}.{match[4]}")
        assert start == pytest.approx(d.start, abs=5e-4) and end == pytest.approx(d.end, abs=1.1e-3)
        assert end > start
        assert text == f"{' '.join(d.label.split()).replace('-->', '->')} {d.score:.2f}"


def test_vtt_has_a_cue_for_each_detection_in_time_order(tmp_path: Path) -> None:
    write_vtt(tmp_path / "v.vtt", FOUND)
    header, *cues = (tmp_path / "v.vtt").read_text(encoding="utf-8").rstrip("\n").split("\n\n")
    assert header == "WEBVTT" and len(cues) == 4
    for cue, d in zip(cues, BY_START, strict=True):
        times, text = cue.split("\n")
        match = re.fullmatch(r"(\d\d:\d\d:\d\d\.\d{3}) --> (\d\d:\d\d:\d\d\.\d{3})", times)
        assert match is not None and seconds(match[2]) > seconds(match[1])
        assert seconds(match[1]) == pytest.approx(d.start, abs=5e-4)
        assert "<" not in text and ">" not in text
        assert unescape(text) == f"{' '.join(d.label.split()).replace('-->', '->')} {d.score:.2f}"


@pytest.mark.parametrize("write", [write_srt, write_vtt], ids=["srt", "vtt"])
def test_ffmpeg_reads_the_subtitles(write: object, tmp_path: Path) -> None:
    path = tmp_path / f"v.{write.__name__[-3:]}"  # type: ignore[attr-defined]
    write(path, FOUND)  # type: ignore[operator]
    with av.open(str(path)) as container:
        packets = [packet for packet in container.demux(container.streams[0]) if packet.size]
        base = packets[0].time_base
    assert [float(packet.pts * base) for packet in packets] == pytest.approx([d.start for d in BY_START], abs=1e-3)


def test_subtitles_of_a_video_without_detections(tmp_path: Path) -> None:
    write_srt(tmp_path / "v.srt", [])
    write_vtt(tmp_path / "v.vtt", [])
    assert (tmp_path / "v.srt").read_bytes() == b""
    assert (tmp_path / "v.vtt").read_bytes() == b"WEBVTT\n"


def pixels(path: Path) -> np.ndarray:
    with av.open(str(path)) as container:
        return next(container.decode(video=0)).to_ndarray(format="rgb24").astype(int)


def blueness(path: Path) -> float:
    """Share of pixels that are clearly bluer than red: those of bars in the first row's colour."""
    image = pixels(path)
    return float((image[..., 2] - image[..., 0] > 60).mean())


def test_a_timeline_shows_length_and_score(tmp_path: Path) -> None:
    shown = {
        "nothing": [],
        "faint": [Detection(0, 50, "a", 0.01)],
        "half": [Detection(0, 50, "a", 0.9)],
        "whole": [Detection(0, 100, "a", 0.9)],
        "instant": [Detection(50, 50.001, "a", 0.9)],
        "point": [Detection(50, 50, "a", 0.9)],
        "point at the start": [Detection(0, 0, "a", 0.9)],
    }
    share = {}
    for name, found in shown.items():
        draw_timeline(tmp_path / f"{name}.png", name, found, 100.0)
        share[name] = blueness(tmp_path / f"{name}.png")
    assert share["nothing"] == share["faint"] == 0
    assert share["whole"] == pytest.approx(2 * share["half"], rel=0.02)
    assert 0 < share["instant"] < share["half"] / 50
    assert share["point"] == share["instant"] and share["point at the start"] > 0


def test_points_are_drawn_in_every_line_of_a_long_video(tmp_path: Path) -> None:
    for name, points in (("middle", (300, 900)), ("start", (0, 600))):
        draw_timeline(tmp_path / f"{name}.png", name, [Detection(at, at, "a", 0.9) for at in points], 1200.0)
    assert blueness(tmp_path / "start.png") > 0.7 * blueness(tmp_path / "middle.png") > 0


def test_long_videos_and_many_classes_stay_a_picture(tmp_path: Path) -> None:
    found = [Detection(40.0 * k, 40.0 * k + 9, f"class ${k % 99}$ " + "x" * 300, 0.2 + k / 1000) for k in range(700)]
    draw_timeline(tmp_path / "long.png", "long $title$", found, 8 * 3600.0)
    height, width, _ = pixels(tmp_path / "long.png").shape
    assert width == 1200
    assert height < 100 * (1 + MAX_LINES * (1 + 0.26 * MAX_CLASSES))
    assert [path.name for path in tmp_path.iterdir()] == ["long.png"]


def test_a_file_that_cannot_be_written_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("a file")
    for write in (write_srt, write_vtt):
        with pytest.raises(InputError, match="cannot write"):
            write(tmp_path / "taken" / "v", FOUND)
    with pytest.raises(InputError, match="cannot write"):
        draw_timeline(tmp_path / "taken" / "v.png", "v", FOUND, 10.0)
    with pytest.raises(ValueError, match="JSON"):
        write_predictions(tmp_path / "p.json", {"v": [Detection(0, 1, "a", float("nan"))]})
    assert not (tmp_path / "p.json").exists() and json.dumps(sorted(p.name for p in tmp_path.iterdir())) == '["taken"]'


def test_a_picture_tells_whose_detections_it_shows(tmp_path: Path) -> None:
    path = tmp_path / "v.png"
    for number in range(8):  # what follows the words in the file differs with them
        draw_timeline(path, "v", FOUND, 10.0, f"detector {number}")
        assert detector_of(path) == f"detector {number}"
    path.write_bytes(b"a picture of another program, or none")
    assert detector_of(path) is None and detector_of(tmp_path / "absent.png") is None

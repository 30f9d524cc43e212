"""Times in the labels beside what the files are: another unit, a file cut off, or a rounding that is nobody's fault."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lofi_fast.data.annotations import Segment, Video
from lofi_fast.data.plausibility import check_times
from lofi_fast.data.video import VideoInfo
from lofi_fast.errors import InputError


def info(seconds: float, fps: float = 25.0) -> VideoInfo:
    pts = np.arange(round(seconds * fps)) / fps
    return VideoInfo(Path("v.mp4"), pts, float(pts[-1] + 1 / fps), 64, 48, 0, "h264", "yuv420p", 1, 1)


def check(
    segments: dict[str, list[tuple[float, float]]], seconds: float, fps: float = 25.0, duration: float | None = None
) -> list[str]:
    videos = [
        Video(name, "training", duration, tuple(Segment(start, end, "x") for start, end in spans))
        for name, spans in segments.items()
    ]
    return check_times(videos, dict.fromkeys(segments, info(seconds, fps)), "a.json")


SECONDS = {"a": [(1.0, 2.5), (3.0, 5.0), (8.0, 11.0)], "b": [(0.2, 2.0), (9.5, 11.9)]}


def scaled(factor: float) -> dict[str, list[tuple[float, float]]]:
    return {name: [(start * factor, end * factor) for start, end in spans] for name, spans in SECONDS.items()}


def test_times_that_fit_are_not_worth_a_word() -> None:
    assert check(SECONDS, 12.0) == check(SECONDS, 12.0, duration=12.3) == []
    assert check({"a": [(1, 12.8)]}, 12.0) == []


@pytest.mark.parametrize(
    ("factor", "fps", "unit"),
    [
        (25, 25, "frame numbers"),
        (29.97, 29.97, "frame numbers"),
        (25, 25.02, "frame numbers"),
        (30, 29.9, "frame numbers"),
        (25, 10, "frame numbers at 25 or 30 a second, which is not the files' rate"),
        (30, 10, "frame numbers at 25 or 30 a second, which is not the files' rate"),
        (100, 25, "hundredths of a second"),
        (1000, 25, "milliseconds"),
        (1e6, 25, "microseconds"),
    ],
)
def test_another_unit_is_refused_by_its_name(factor: float, fps: float, unit: str) -> None:
    with pytest.raises(InputError, match=f"a.json: .* of 5 segments lie outside .* look like {unit}; .* in seconds"):
        check(scaled(factor), 12.0, fps)


def test_frame_numbers_of_early_actions_are_seen_in_part() -> None:
    spans = {"a": [(25.0, 62.0), (5.0, 10.0), (1.0, 4.0), (75.0, 125.0)], "b": [(25.0, 75.0), (3.0, 8.0)]}
    with pytest.raises(InputError, match=r"3 of 6 segments lie outside their videos.*frame numbers"):
        check(spans, 12.0)


def test_minutes_and_shares_of_a_video_are_noted() -> None:
    (note,) = check({"a": [(0.5, 1.0), (2.0, 3.5)], "b": [(7.0, 9.5)]}, 600.0)
    assert "minutes" in note
    (note,) = check({"a": [(0.1, 0.2), (0.5, 0.7)], "b": [(0.9, 1.0)]}, 600.0)
    assert "shares" in note
    assert check({"a": [(0.5, 1.0), (2.0, 3.5)], "b": [(300.0, 305.0)]}, 600.0) == []


@pytest.mark.parametrize(
    ("duration", "looks"),
    [
        (0.2, "minutes"),
        (300.0, "frame numbers"),
        (1200.0, "hundredths"),
        (12_000.0, "milliseconds"),
        (40.0, "cut off"),
        (5.0, "files count"),
    ],
)
def test_another_duration_is_noted(duration: float, looks: str) -> None:
    (note,) = check(SECONDS, 12.0, duration=duration)
    assert looks in note and "2 of 2 videos" in note and "12.00 s" in note


def test_a_file_that_is_cut_off_is_noted_and_used() -> None:
    spans = {"a": [(1.0, 2.0), (2.0, 3.0), (4.0, 5.0), (9.0, 11.0)]}
    notes = check(spans, 5.4, duration=12.0)
    assert "cut off" in notes[0] and "1 of 4 segments lie outside" in notes[1] and "look like" not in notes[1]
    with pytest.raises(InputError, match=r"3 of 4 segments lie outside.*cut off"):
        check({"a": [(1.0, 2.0), (7.0, 8.0), (8.0, 9.0), (9.0, 11.0)]}, 5.4, duration=12.0)


def test_a_few_outside_are_noted() -> None:
    (note,) = check({"a": [(float(i), i + 0.5) for i in range(10)] + [(30.0, 31.0)]}, 12.0)
    assert "1 of 11 segments lie outside" in note


@given(st.lists(st.tuples(st.floats(0, 60), st.floats(0, 60)), max_size=20), st.floats(1, 60))
def test_segments_inside_are_never_refused(drawn: list[tuple[float, float]], seconds: float) -> None:
    spans = [(min(pair) * seconds / 60, max(pair) * seconds / 60) for pair in drawn]
    assert check({"a": spans}, seconds) == []

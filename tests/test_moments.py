"""Which moments of the validation videos are shown: what was found, missed and wrongly found, and their pictures."""

from __future__ import annotations

import io
import itertools
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from lofi_fast.detections import Detection
from lofi_fast.errors import InputError
from lofi_fast.files import json_bytes
from lofi_fast.run.moments import (
    HEIGHT,
    MOST,
    WIDEST,
    Labelled,
    Moment,
    Moments,
    best_threshold,
    moments,
    picture,
    pictured,
    positions_at,
    varied,
)

TRUTH = {
    "a": [Labelled("a", 0, 10, "jump"), Labelled("a", 20, 30, "jump"), Labelled("a", 40, 50, "throw")],
    "b": [Labelled("b", 0, 4, "throw")],
    "empty": [],
}
FOUND = {
    "a": [
        Detection(0, 9, "jump", 0.9),  # right
        Detection(1, 10, "jump", 0.8),  # the same again
        Detection(21, 30, "throw", 0.7),  # of another class
        Detection(40, 44, "throw", 0.6),  # badly placed
        Detection(40, 49, "throw", 0.5),  # right
        *(Detection(60 + k, 62 + k, "jump", 0.1) for k in range(9)),  # for whose sake the threshold is higher
        Detection(20, 27, "jump", 0.01),  # right, and too low to count
    ],
    "empty": [Detection(3, 5, "jump", 0.95)],
}


def test_segments_and_detections_are_told_apart_with_what_was_there_instead() -> None:
    told = moments(TRUTH, FOUND)
    assert told.threshold == 0.5
    assert told.counts == {"found": 2, "missed": 2, "wrong": 4}
    said = {(m.kind, m.video, m.label, m.start, m.score): m.note for m in told.moments}
    assert said == {
        ("found", "a", "jump", 0, 0.9): "tIoU 0.90",
        ("found", "a", "throw", 40, 0.5): "tIoU 0.90",
        ("missed", "a", "jump", 20, None): "the nearest is 20.0 to 27.0 s, score 0.01, tIoU 0.70",
        ("missed", "b", "throw", 0, None): "nothing was found there",
        ("wrong", "empty", "jump", 3, 0.95): "nothing is labelled there",
        ("wrong", "a", "jump", 1, 0.8): "a second time: 0.0 to 10.0 s was found already",
        ("wrong", "a", "throw", 21, 0.7): "it is jump",
        ("wrong", "a", "throw", 40, 0.6): "badly placed: it is 40.0 to 50.0 s",
    }


def test_without_detections_everything_is_missed_and_without_labels_nothing_is() -> None:
    nothing = moments(TRUTH, {})
    assert nothing.counts == {"found": 0, "missed": 4, "wrong": 0} and nothing.threshold == 0
    assert moments({"v": []}, {}).counts == {"found": 0, "missed": 0, "wrong": 0}


SCORES = st.lists(st.sampled_from([0.1, 0.2, 0.3, 0.4]), max_size=6)


@settings(max_examples=100)
@given(right=SCORES, wrong=SCORES, more=st.integers(0, 5))
def test_the_threshold_has_the_highest_f1_of_all(right: list[float], wrong: list[float], more: int) -> None:
    segments = len(right) + more

    def f1(least: float) -> float:
        hits, misses = (sum(score >= least for score in of) for of in (right, wrong))
        return 2 * hits / (hits + misses + segments) if segments else 0.0

    chosen = best_threshold(right, wrong, segments)
    tried = sorted({*right, *wrong})
    if segments and tried:
        assert chosen in tried and f1(chosen) == pytest.approx(max(map(f1, tried)))


def test_few_are_shown_of_many_classes_and_videos() -> None:
    of = [("jump", "a")] * 8 + [("jump", "b"), ("throw", "c")]
    assert varied(range(10), of) == [0, 9, 8, 1, 2, 3]  # at most MOST, one of every kind before more of one
    assert len(varied(range(10), of)) == MOST
    assert varied([], []) == []


class Held:
    """A cache entry of `count` pictures of which each has one colour: its number times ten."""

    def __init__(self, count: int, size: tuple[int, int], damaged: bool = False) -> None:
        self.pts, self.size, self.damaged = np.arange(count) / 2, size, damaged

    def read(self, positions: np.ndarray) -> list[np.ndarray]:
        if self.damaged:
            raise InputError("damaged")
        pictures = []
        for position in positions:
            file = io.BytesIO()
            Image.new("RGB", self.size, (int(position) * 10,) * 3).save(file, "JPEG")
            pictures.append(np.frombuffer(file.getvalue(), np.uint8))
        return pictures


def entry(*args: Any, **more: Any) -> Any:
    return Held(*args, **more)


@pytest.mark.parametrize("size", [(320, 240), (64, 64), (90, 400), (2, 2)], ids=str)
def test_the_picture_shows_beginning_middle_and_end_small(size: tuple[int, int]) -> None:
    jpeg = picture(entry(24, size), Moment("found", "a", 0.0, 6.0, "jump", ""))
    strip = Image.open(io.BytesIO(jpeg))
    assert strip.height <= HEIGHT and strip.width <= 3 * WIDEST + 4 and len(jpeg) < 8000
    each = (strip.width - 4) // 3
    middle = [strip.convert("L").getpixel((k * (each + 2) + each // 2, strip.height // 2)) for k in range(3)]
    assert [round(value / 10) for value in middle] == [2, 6, 10], "1, 3 and 5 of 6 seconds, two pictures a second"


def test_a_moment_whose_pictures_are_damaged_is_shown_without() -> None:
    shown = pictured(moments(TRUTH, FOUND), {"a": entry(120, (64, 64)), "b": entry(8, (64, 64), damaged=True),
                                             "empty": entry(1, (64, 64))})  # fmt: skip
    assert {m.video for m in shown.moments if not m.picture} == {"b"}
    assert msgspec.json.decode(json_bytes(shown), type=Moments) == shown


@settings(max_examples=200)
@given(
    pts=st.lists(st.floats(0, 100), min_size=1, max_size=8, unique=True).map(sorted),
    times=st.lists(st.floats(-10, 120), min_size=1, max_size=4),
)
def test_the_nearest_picture_is_taken(pts: list[float], times: list[float]) -> None:
    for time, position in zip(times, positions_at(np.array(pts), times), strict=True):
        assert abs(pts[position] - time) == min(abs(other - time) for other in pts)


def test_many_detections_take_no_long(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    truth, found = {}, {}
    for number in range(300):
        name, starts = f"v{number}", rng.uniform(0, 100, 110)
        truth[name] = [Labelled(name, s, s + 5, f"c{k % 4}") for k, s in enumerate(starts[:10])]
        found[name] = [Detection(s, s + 5, f"c{k % 4}", float(rng.random())) for k, s in enumerate(starts[10:])]
    told = moments(truth, found)
    assert sum(told.counts[kind] for kind in ("found", "missed")) == 3000
    kinds = [kind for kind, _ in itertools.groupby(m.kind for m in told.moments)]
    assert kinds == ["found", "missed", "wrong"] and len(told.moments) == 3 * MOST

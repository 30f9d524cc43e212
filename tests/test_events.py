"""The records of log.jsonl: what is written is what is read, whatever it holds and whoever wrote it."""

from __future__ import annotations

import io
import json
import math
from pathlib import Path
from typing import Any, get_args

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from lofi_fast import command
from lofi_fast.errors import InputError
from lofi_fast.files import write_json
from lofi_fast.run import events
from lofi_fast.run.log import RunLog, Terminal

EVENTS = (
    events.Start(
        device="CPU, 2 cores", precision="float32", optimizers="torch", budget=11_000_000_000, available=12_000_000_000,
        argv=["--mem-budget", "11GB"],
    ),
    events.SkippedVideo(video="v_\u8df3", path="/data/v.mp4", reason="no video stream"),
    events.Data(classes=["rise", "sink"], skipped=1),
    events.Measured(plan="joint, spatial", candidate="32 snippets x 32 px", peak=None, budget=11, predicted=7),
    events.Planned(plan="pretrain", chosen="16", peak=6, budget=11, seconds=0.5),
    events.Step(
        stage="joint", epoch=1, step=2, loss=3.5, lr=0.1, terms={"boundary": 1.5, "classes": None}, accuracy=0.5,
        videos=["a", "b"], pattern="spatial", num_snippets=32, side=46, micro_batch=4, chunk=8, recompute=True,
        reduced_from=[32, 64], predicted=7, peak=6, base=1, limit=9, room=8, free=20, budget=11, retries=1,
        reason="others hold memory",
    ),
    events.OutOfMemory(
        stage="joint", epoch=1, step=2, reason="out of memory", peak=5, plan=[32, 64, 4, 0], next=[32, 46, 4, 0],
        limit=9,
    ),
    events.NotFinite(stage="head", epoch=1, step=2, what="gradient", videos=["a"], in_a_row=2),
    events.Saved(stage="head", epoch=2, step=0),
    events.Epoch(stage="pretrain", epoch=3, accuracy=0.75),
    events.Validation(stage="head", epoch=3, average=0.5, map=[0.6, 0.4]),
    events.Features(windows=12, chunk=32, encoder="0f3a"),
    events.Metrics(
        average_map=0.5, map_by_tiou={"0.5": 0.6}, average_precision={"rise": [0.6, None]},
        best_epoch={"epoch": 3.0, "average": 0.5}, videos=12, segments=54,
    ),
    events.Done(seconds=40.0),
)  # fmt: skip


def strictly(line: bytes) -> dict[str, Any]:
    """The object of a line of JSON as the standard has it, without NaN and Infinity."""

    def refuse(word: str) -> None:
        raise AssertionError(f"{word} is no JSON")

    content: dict[str, Any] = json.loads(line.decode(), parse_constant=refuse)
    return content


def test_there_is_an_example_of_every_kind() -> None:
    assert [type(event) for event in EVENTS] == list(get_args(events.AnyEvent))


@pytest.mark.parametrize("event", EVENTS, ids=lambda event: type(event).__name__)
def test_every_record_comes_back_as_it_was(event: events.Event) -> None:
    line = events.encode(event)
    assert line.count(b"\n") == 1 and line.endswith(b"\n")
    back = events.decode(line)
    assert back is not None and back.time.endswith("+00:00")
    assert msgspec.structs.replace(back, time="") == event
    assert strictly(line)["event"] == type(event).__struct_config__.tag


@given(
    loss=st.floats(),
    lr=st.none() | st.floats(),
    terms=st.dictionaries(st.text(), st.floats()),
    videos=st.lists(st.text()),
)
def test_any_step_is_valid_json_and_what_is_not_finite_comes_back_as_none(
    loss: float, lr: float | None, terms: dict[str, float], videos: list[str]
) -> None:
    line = events.encode(events.Step(stage="head", epoch=0, step=0, loss=loss, lr=lr, terms=terms, videos=videos))
    strictly(line)
    back = events.decode(line)
    assert isinstance(back, events.Step)
    assert back.loss == (loss if math.isfinite(loss) else None)
    assert back.terms == {name: value if math.isfinite(value) else None for name, value in terms.items()}
    assert back.videos == videos


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, np.float64("nan"), np.float32("inf")])
def test_results_that_are_not_finite_can_be_logged(value: float) -> None:
    for event in (
        events.Validation(stage="head", epoch=0, average=value, map=[value, 0.5]),
        events.Epoch(stage="pretrain", epoch=0, accuracy=value),
        events.Metrics(
            average_map=value, map_by_tiou={"0.5": value}, average_precision={"a": [value]}, best_epoch=None, videos=1,
            segments=1,
        ),
    ):  # fmt: skip
        line = events.encode(event)
        strictly(line)
        assert type(events.decode(line)) is type(event)


def test_numbers_of_numpy_are_written_as_numbers() -> None:
    event = events.Step(stage="head", epoch=np.int64(3), step=np.int32(4), loss=np.float32(0.5), peak=np.int64(2**40))
    back = events.decode(events.encode(event))
    assert isinstance(back, events.Step)
    assert (back.epoch, back.step, back.loss, back.peak) == (3, 4, 0.5, 2**40)


def test_a_file_name_that_is_no_text_can_be_logged(tmp_path: Path) -> None:
    name = b"caf\xe9.mp4".decode(errors="surrogateescape")
    line = events.encode(events.SkippedVideo(video=name, path=f"/data/{name}", reason="no video stream"))
    back = events.decode(line)
    assert isinstance(back, events.SkippedVideo) and back.video == "caf\\udce9.mp4"
    content = json.loads(write_json(tmp_path / "a.json", {name: [name, (1, np.float32("nan"))]}).read_text())
    assert content == {back.video: [back.video, [1, None]]}


def test_fields_of_a_newer_version_are_passed_over() -> None:
    event = events.decode('{"event": "done", "seconds": 3, "colour": {"red": [1]}}')
    assert event == events.Done(seconds=3.0)


def test_kinds_of_a_newer_version_are_passed_over() -> None:
    unreadable: list[str] = []
    lines = ['{"event": "eclipse", "of": "the moon"}', '{"event": "done", "seconds": 3}']
    assert list(events.read(lines, unreadable)) == [events.Done(seconds=3.0)]
    assert not unreadable


@pytest.mark.parametrize(
    "line",
    ["{", "[1]", "null", "{}", "[" * 10_000, "\udcff", '{"event": 3}', '{"event": "done"}',
     '{"event": "done", "seconds": "x"}', '{"event": "done", "seconds": NaN}',
     '{"event": "skipped", "video": "\\udcff", "path": "p", "reason": "r"}'],
)  # fmt: skip
def test_what_is_no_event_is_refused_and_passed_over(line: str) -> None:
    with pytest.raises(ValueError):
        events.decode(line)
    unreadable: list[str] = []
    assert not list(events.read([line, "\n"], unreadable)) and unreadable == [line]


@pytest.mark.parametrize("event", EVENTS, ids=lambda event: type(event).__name__)
def test_a_torn_line_is_passed_over_and_what_follows_is_found(event: events.Event) -> None:
    line = events.encode(event).decode()
    for end in range(1, len(line) - 1, 7):
        unreadable: list[str] = []
        found = list(events.read([line, line[:end] + "\n", line[:end] + line], unreadable))
        assert [msgspec.structs.replace(e, time="") for e in found] == [event, event]
        assert len(unreadable) == 2


def test_a_log_goes_on_behind_a_torn_line(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    path.write_bytes(events.encode(EVENTS[0]) + events.encode(EVENTS[2])[:20])
    log = RunLog(path)
    log.event(events.Done(seconds=1.0))
    log.close()
    with path.open(encoding="utf-8") as lines:
        assert [type(event) for event in events.read(lines)] == [events.Start, events.Done]


def test_control_characters_of_names_do_not_reach_the_terminal() -> None:
    text = io.StringIO()
    terminal = Terminal(Console(file=text, highlight=False, soft_wrap=True))
    terminal.say("skipped: \x1b[31mred\x07\x9b2J\r é 跳: no video\n\tand [b]more[/b]")
    assert text.getvalue() == "skipped: \\x1b[31mred\\x07\\x9b2J\\x0d é 跳: no video\n        and [b]more[/b]\n"


def test_brackets_and_colons_of_names_are_shown_as_they_are() -> None:
    """Rich would end a style at [/b], and draw a picture for :x:."""
    text = io.StringIO()
    terminal = Terminal(Console(file=text, highlight=False, soft_wrap=True, force_terminal=True, width=200))
    terminal.say("concat:x: [/b]")
    with terminal.progress("videos", 2) as advance:
        advance(1, "cam:x:[/b].mp4")
    assert "concat:x: [/b]\n" in text.getvalue() and "cam:x:[/b].mp4" in text.getvalue()


def test_control_characters_do_not_reach_the_terminal_in_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    def refuse() -> None:
        raise InputError("\x1b]0;title\x07.mp4: no video")

    assert command.run(refuse) == 2
    assert capsys.readouterr().err == "error: \\x1b]0;title\\x07.mp4: no video\n"

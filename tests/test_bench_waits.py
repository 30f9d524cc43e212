"""Whether trainings wait for frames, as `bench waits` measures it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pytest

from bench.__main__ import main
from bench.commands import tables, waits
from bench.tools.rows import read_rows
from lofi_fast.run import events


def test_trainings_are_asked_whether_they_wait_for_frames(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    results = tmp_path / "waits.jsonl"
    command = ["waits", "--tiny", "--device", "cpu", "--videos", "4", "--epochs", "2", "--results", str(results)]
    assert main([*command, "--settings", "full,lofi"]) == 0
    full, lofi = read_rows(results)
    assert full["rungs"] == [["spatial", 16, 32], ["temporal", 16, 32]], "nothing is cut"
    assert all(length * side**2 <= 16 * 32**2 / 4 for _, length, side in lofi["rungs"])
    for row in (full, lofi):
        assert (row["first"]["steps"], row["after"]["steps"], row["within"]["steps"]) == (2, 2, 1)
        assert 0 < row["first"]["share"] < 1 and 0 <= row["within"]["share"] < 1
        assert 0 < row["peak"] < row["budget"] and row["violations"] == 0 and row["decoder"] == "DALI on the CPU"
    assert main([*command, "--settings", "full,demo", "--skip-measured"]) == 0
    assert [row["setting"] for row in read_rows(results)] == ["full", "lofi", "demo"]
    said = tables.section_of("waits", [row | {"quick": False} for row in read_rows(results)])
    assert "| full: activitynet, tsm_r18, 2 videos a step | 16x32 |" in said and "| DALI on the CPU |" in said
    assert main([*command, "--mem-budget", "10MB", "--settings", "lofi"]) == 1
    assert "error: lofi: status 2" in capsys.readouterr().err


def test_what_a_log_says_of_waiting_for_frames() -> None:
    def at(second: float, kind: type[events.Event] = events.Step, **fields: Any) -> Any:
        return kind(time=f"2026-01-01T00:00:{second:06.3f}+00:00", stage="joint", **fields)

    def step(second: float, epoch: int, number: int, waited: float, **changes: Any) -> Any:
        fields = {"loss": 1.0, "samples": 2, "num_snippets": 10, "side": 16, "peak": 90, "budget": 100, "limit": 100}
        return at(second, epoch=epoch, step=number, waited=waited, **(fields | {"pattern": "spatial"} | changes))

    log = [
        at(0, events.Saved, epoch=0, step=0), step(4, 0, 0, 3), step(6, 0, 1, 1), at(9, events.Saved, epoch=1, step=0),
        step(11, 1, 0, 1.0, peak=120), step(12, 1, 1, 0.25), step(13, 1, 2, 0.0, pattern="temporal", num_snippets=5),
        msgspec.structs.replace(step(59, 1, 0, 0.0), stage="head"),
    ]  # fmt: skip
    found = waits.summary(log)
    assert found["first"] == {"steps": 2, "seconds": 6, "waited": 4, "share": 0.6667, "frames_a_second": 53.3}
    assert found["after"] == {"steps": 3, "seconds": 4, "waited": 1.25, "share": 0.3125, "frames_a_second": 100}
    assert found["within"] == {"steps": 2, "seconds": 2, "waited": 0.25, "share": 0.125, "frames_a_second": 120}
    assert found["rungs"] == [["spatial", 10, 16], ["temporal", 5, 16]]
    assert (found["peak"], found["violations"], len(found["over"])) == (120, 1, 1)
    assert waits.share([])["share"] is None

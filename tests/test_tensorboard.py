"""The curves that `--tensorboard` writes, read by TensorBoard's own reader."""

from __future__ import annotations

import sys
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from lofi_fast.config import Config
from lofi_fast.errors import InputError
from lofi_fast.run import events
from lofi_fast.run.log import RunLog
from lofi_fast.run.tensorboard import FOLDER, Board, require_tensorboard
from lofi_fast.train import read_flags


def curves(folder: Path, stage: str) -> dict[str, list[tuple[int, float]]]:
    """(step, value) of every curve, as TensorBoard shows them."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    read = EventAccumulator(str(folder / FOLDER / stage)).Reload()
    return {tag: [(e.step, round(e.value, 4)) for e in read.Scalars(tag)] for tag in read.Tags()["scalars"]}


def step(epoch: int, number: int, loss: float | None, **more: Any) -> events.Step:
    terms = {"boundary": 0.5, "classes": None}
    fields: dict[str, Any] = {"stage": "joint", "steps": 3, "lr": 0.25, "terms": terms, "waited": 0.125}
    return events.Step(epoch=epoch, step=number, loss=loss, **{**fields, **more})


def test_curves_of_a_run_and_of_one_that_went_on_from_a_checkpoint(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason='needs TensorBoard: pip install "lofi_fast[tensorboard]"')
    plan: dict[str, Any] = {"num_snippets": 50, "side": 158, "peak": 1_500_000_000, "budget": 2_000_000_000}
    with closing(RunLog(tmp_path / "log.jsonl", watchers=[Board(tmp_path / FOLDER)])) as log:
        for number in range(5):
            log.event(step(number // 3, number % 3, 9.0 - number, **plan))
    with closing(Board(tmp_path / FOLDER)) as board:  # the checkpoint was before step 3
        for number in range(3, 6):
            board.event(step(number // 3, number % 3, None if number == 4 else 1.0, **plan))
        board.event(events.Step(stage="head", epoch=0, step=0, steps=1, loss=2.0))
        board.event(events.Validation(stage="head", epoch=0, average=0.75, map=[]))
        metrics: dict[str, Any] = {"average_precision": {}, "best_epoch": None, "videos": 1, "segments": 1}
        board.event(events.Metrics(average_map=0.5, map_by_tiou={"0.3": 0.625, "0.5": None}, **metrics))
    found = curves(tmp_path, "joint")
    assert found["joint/loss"] == [(0, 9.0), (1, 8.0), (2, 7.0), (3, 1.0), (5, 1.0)]
    assert found["joint/loss/boundary"] == [(number, 0.5) for number in range(6)]
    assert found["joint/memory, GB/peak"][0] == (0, 1.5) and found["joint/memory, GB/budget"][0] == (0, 2.0)
    assert found["joint/rung/side"][5] == (5, 158) and found["joint/learning rate"][0] == (0, 0.25)
    assert found["joint/seconds waiting for frames"][0] == (0, 0.125)
    assert not {name for name in found if "classes" in name or "predicted" in name or "accuracy" in name}
    assert curves(tmp_path, "head") == {"head/loss": [(0, 2.0)], "head/mAP": [(0, 0.75)]}
    assert curves(tmp_path, "eval") == {"eval/average mAP": [(0, 0.5)], "eval/mAP at 0.3": [(0, 0.625)]}


def test_nothing_is_written_before_the_first_step(tmp_path: Path) -> None:
    with closing(Board(tmp_path / FOLDER)) as board:
        board.event(events.Done(seconds=1.0))
    assert not (tmp_path / FOLDER).exists()


def test_without_the_package_a_run_is_refused_at_its_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "torch.utils.tensorboard", raising=False)
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    with pytest.raises(InputError, match=r'--tensorboard needs .* pip install "lofi_fast\[tensorboard\]"'):
        require_tensorboard()


def test_a_resumed_run_may_begin_or_end_to_write_them() -> None:
    def config(*argv: str) -> Config:
        return read_flags(["--preset", "demo", *argv], cuda=lambda: False)[0]

    assert not config().tensorboard and config("--tensorboard").tensorboard
    assert not config("--no-tensorboard").tensorboard

"""What a training shows on a terminal while it runs, and the lines that stand for it elsewhere."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from lofi_fast.data.pipeline import FramePipeline
from lofi_fast.run import events
from lofi_fast.run.live import LiveView, curve
from lofi_fast.run.log import RunLog

BUDGET = 2_000_000_000
JOINT: dict[str, Any] = {
    "stage": "joint", "pattern": "spatio_temporal", "num_snippets": 50, "side": 158, "micro_batch": 1,
    "recompute": True, "budget": BUDGET, "samples": 4, "steps": 5,
}  # fmt: skip


class Clock:
    """Seconds that a test lets go by."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Iterator[Clock]:
    fake = Clock()
    monkeypatch.setattr("lofi_fast.run.live.time", fake)
    yield fake


def terminal(width: int = 100, **more: Any) -> Console:
    return Console(file=io.StringIO(), force_terminal=True, width=width, height=40, color_system=None, **more)


def new_view(console: Console) -> LiveView:
    view = LiveView(console, "runs/[x]\x1b[2J", {"pretrain": 2, "joint": 3, "head": 4, "eval": 0})
    view.event(events.Start(device="CPU", precision="fp32", optimizers="torch", budget=BUDGET, available=1, argv=[]))
    return view


def shown(view: LiveView, width: int = 100) -> str:
    console = Console(file=io.StringIO(), width=width)
    console.print(view)
    text = console.file.getvalue()  # type: ignore[attr-defined]
    return re.sub(r"[ │]+", " ", text)


def take_steps(view: LiveView, clock: Clock, epoch: int, count: int, seconds: float = 2.0, **fields: Any) -> None:
    for step in range(count):
        clock.now += seconds
        told = {"peak": 1_500_000_000, "waited": 0.5, "loss": 3.0 - step / 4}
        view.event(events.Step(**{**JOINT, "epoch": epoch, "step": step, **told, **fields}))
        view.advance(step + 1, "said at the bar")


def test_the_view_tells_stage_rung_memory_loss_speed_waiting_and_time_left(clock: Clock) -> None:
    console = terminal()
    view = new_view(console)
    with closing(view):
        view.begin("joint 2/3", 5, 0)
        take_steps(view, clock, epoch=1, count=3)
        view.event(events.Validation(stage="head", epoch=0, average=0.5, map=[]))
        view.event(events.Validation(stage="head", epoch=1, average=0.4321, map=[]))
        text = shown(view)
    assert "pretrain ✓ joint 2/3 head eval" in text
    assert "3/5 4 s left of this epoch, 14 s of joint" in text  # 2 steps here, 5 in the last epoch, 2 s each
    assert "50 x 158 px, spatio-temporal; 1 video at once, recompute" in text
    assert "1.50 GB of 2.00 GB, 75 %" in text
    assert "loss 2.500 █▅▁" in text
    assert "mAP 43.2 % after epoch 2, best 50.0 % after 1" in text
    assert "2 videos a second, 25 % of the time waiting for frames" in text
    assert "\x1b[2J" not in text and "runs/[x]" in text


def test_memory_of_stages_that_do_not_measure_it_is_the_highest_seen_or_what_was_planned(clock: Clock) -> None:
    with closing(new_view(terminal())) as view:
        planned = events.Planned(plan="pretrain", chosen="16", peak=800_000_000, budget=BUDGET, seconds=0.1)
        view.event(planned)
        view.begin("pretrain 1/2", 9, 0)
        take_steps(view, clock, 0, 2, stage="pretrain", peak=None, num_snippets=0, accuracy=0.25, samples=16)
        text = shown(view)
        assert "0.80 GB of 2.00 GB, 40 %, planned" in text and "rung" not in text
        assert "accuracy 25 %" in text and "8 clips a second" in text
        view.event(events.Measured(plan="pretrain", candidate="16", peak=900_000_000, budget=BUDGET))
        assert "0.90 GB of 2.00 GB, 45 %, at most so far" in shown(view)


def test_speed_and_time_left_go_on_from_one_epoch_to_the_next(clock: Clock) -> None:
    with closing(new_view(terminal())) as view:
        for epoch in (0, 1):
            view.begin(f"joint {epoch + 1}/3", 5, 0)
            take_steps(view, clock, epoch, 5 if epoch == 0 else 1)
            view.event(events.Saved(stage="joint", epoch=epoch, step=1))
            if epoch == 0:
                view.end()
                assert "joint" in shown(view)
        assert "1/5 8 s left of this epoch, 18 s of joint" in shown(view)


@pytest.mark.parametrize("width", [40, 60, 200])
def test_the_view_stays_inside_any_terminal(clock: Clock, width: int) -> None:
    with closing(new_view(terminal(width))) as view:
        view.begin("joint 1/3", 5, 0)
        take_steps(view, clock, 0, 5, loss=None, retries=2)
        console = Console(file=io.StringIO(), width=width)
        console.print(view)
        lines = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
        assert all(len(line) <= width for line in lines)
        assert any("not finite" in line for line in lines)


def test_other_tasks_show_their_bar_and_what_is_done(clock: Clock) -> None:
    with closing(new_view(terminal())) as view:
        view.begin("frame cache", 1, 0)
        clock.now += 10
        view.advance(5, "a\x07video", 20)
        text = shown(view)
        assert "frame cache" in text and "5/20 30 s left" in text and "a\\x07video" in text
        clock.now += 5
        view.advance(20, "the last")
        assert view.end() == "frame cache: 20/20, 15 s  the last"
        view.begin("nothing to do", 4, 4)
        assert view.end() == ""


def test_what_is_said_stands_above_the_view_and_stays(tmp_path: Path) -> None:
    console = terminal()
    log = RunLog(tmp_path / "log.jsonl", console, view=new_view(console))
    with closing(log), log.progress("joint 1/3", 2) as advance:
        log.event(events.Step(**JOINT, epoch=0, step=0, loss=1.0))
        advance(1, "")
        log.say("a note")
        advance(2, "loss 1.000")
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert "a note" in text and "joint 1/3: 2/2," in text and "loss 1.000" in text
    assert text.endswith("\x1b[?25h") or "\x1b[?25h" in text.rpartition("joint 1/3: 2/2,")[2], "the cursor is back"


@pytest.mark.parametrize("plain", [False, True], ids=["no terminal", "a terminal, --plain"])
def test_without_a_view_there_are_plain_lines(tmp_path: Path, plain: bool) -> None:
    console = terminal() if plain else Console(file=io.StringIO())
    with closing(RunLog(tmp_path / "log.jsonl", console, plain=plain)) as log, log.progress("joint 1/3", 2) as advance:
        advance(1, "loss 2.000")
        advance(2, "loss 1.000")
    assert re.fullmatch(r"joint 1/3: 2/2, \d+ s, 0 s left  loss 1.000\n", console.file.getvalue())  # type: ignore[attr-defined]


def test_a_curve_has_the_means_of_equal_stretches() -> None:
    assert curve((0.0, 7.0)) == "▁█"
    assert curve((1.0, 1.0, 1.0)) == "▁▁▁"
    assert curve(tuple(float(k) for k in range(80)), width=8) == "▁▂▃▄▅▆▇█"
    assert len(curve(tuple(float(k) for k in range(401)))) <= 40


def test_the_pipeline_counts_the_seconds_that_its_consumer_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    import time

    import numpy as np

    from lofi_fast.data.pipeline import FrameRequest, View

    class Slow(FramePipeline):
        def _build(self) -> Any:
            return None

        def _load(self, batch: Any, frames: Any, allocated: Any) -> Any:
            time.sleep(0.2)
            return frames

    class Video:
        path, frames, width, height = Path("v"), np.arange(4), 8, 8

        def read(self, positions: np.ndarray) -> list[np.ndarray]:
            return []

    request = FrameRequest(Video(), np.arange(2), View(0, 0, 1, 1, False), 4)
    with closing(Slow(1)) as pipeline:
        stream = pipeline.stream([[request], [request]])
        next(stream)
        assert pipeline.waited >= 0.15
        time.sleep(0.5)  # the second is ready by then
        before = pipeline.waited
        next(stream)
        assert pipeline.waited - before < 0.15

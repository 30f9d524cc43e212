"""What a training shows of itself on a terminal: where it stands, how much memory it takes, how well and how fast it
learns.

Everything comes from the events that the run logs anyway, so that showing it asks nothing of the device. rich draws it
in a thread of its own, twice a second.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from lofi_fast.budget import duration, gigabytes
from lofi_fast.errors import printable
from lofi_fast.run import events

FRAMES_A_SECOND = 2
RECENT = 40  # steps that speed, waiting and the time left are taken from
MOST_LOSSES = 400  # that the curve of the loss is drawn from
BLOCKS = "▁▂▃▄▅▆▇█"
CURVE = 40  # characters of the curve
BAR = 32  # characters of a bar


@dataclass(frozen=True)
class Tick:
    """A moment at which so many more units were done, with so many samples, after `waited` seconds without frames."""

    at: float
    units: int = 0
    samples: int = 0
    waited: float = 0.0


class LiveView:
    """The panel at the foot of the terminal. The values that rich's thread reads are replaced, never changed in place.

    `title` is the run's name; `epochs` of each stage that the run has, in order, 0 where it has none to count.
    """

    def __init__(self, console: Console, title: str, epochs: Mapping[str, int]) -> None:
        self._title, self._epochs, self._console = title, dict(epochs), console
        self._live: Live | None = None
        self._began = time.monotonic()
        self._task, self._before, self._note = "", "", ""
        self._total, self._start, self._done = 0, 0, 0
        self._task_began = self._began
        self._ticks: tuple[Tick, ...] = ()
        self._losses: tuple[float, ...] = ()
        self._step: events.Step | None = None
        self._best: events.Validation | None = None
        self._last: events.Validation | None = None
        self._budget, self._highest, self._planned = 0, 0, 0

    # What happens

    def begin(self, title: str, total: int, start: int) -> None:
        """A task of `total` units begins, `start` of them done before."""
        self._task_began = time.monotonic()
        if title.partition(" ")[0] != self._before.partition(" ")[0]:  # else: another epoch of the stage
            self._ticks = (Tick(self._task_began),)
        self._task, self._before, self._total, self._note = title, title, total, ""
        self._start = self._done = start
        if self._live is None:
            self._live = Live(
                self,
                console=self._console,
                refresh_per_second=FRAMES_A_SECOND,
                transient=True,
                vertical_overflow="crop",
            )
            self._live.start()

    def advance(self, done: int, note: str, total: int | None = None) -> None:
        """See `run.log.Advance`."""
        if done != self._done:  # no event of a step has told of it
            self._tick(Tick(time.monotonic(), done - self._done))
        self._done, self._note, self._total = done, note, total or self._total

    def end(self) -> str:
        """The task is over. Returns what should stay of it on the terminal: nothing where nothing was done."""
        task, self._task = self._task, ""
        if self._done == self._start:
            return ""
        took = duration(time.monotonic() - self._task_began)
        return f"{task}: {self._done}/{self._total}, {took}  {self._note}".rstrip()

    def event(self, event: events.Event) -> None:
        """Take note of what is logged."""
        match event:
            case events.Start():
                self._budget = event.budget
            case events.Planned():
                self._planned = max(self._planned, event.peak)
            case events.Measured():
                self._highest = max(self._highest, event.peak or 0)
            case events.Step():
                if self._step is None or self._step.stage != event.stage:
                    self._losses = ()
                self._step, self._done = event, event.step + 1
                self._highest = max(self._highest, event.peak or 0)
                if event.loss is not None and math.isfinite(event.loss):
                    self._losses = (*self._losses[-MOST_LOSSES:], event.loss)
                self._tick(Tick(time.monotonic(), 1, event.samples, event.waited))
            case events.Validation():
                self._last = event
                if self._best is None or (event.average or 0.0) > (self._best.average or 0.0):
                    self._best = event

    def close(self) -> None:
        """Take the panel off the terminal."""
        if self._live is not None:
            self._live.stop()
            self._live = None

    def _tick(self, tick: Tick) -> None:
        self._ticks = (*self._ticks[-RECENT:], tick)

    # What is shown

    def __rich__(self) -> RenderableType:
        parts: list[RenderableType] = [self._stages()]
        if self._task:
            parts.append(self._progress())
        if self._step is not None:
            parts += [Text(), self._learning(self._step)]
        clock = duration(time.monotonic() - self._began)
        return Panel(
            Group(*parts), title=Text(printable(self._title), "bold"), title_align="left", subtitle=clock,
            subtitle_align="right", border_style="dim", padding=(0, 1),
        )  # fmt: skip

    def _stages(self) -> Text:
        """The stages in order, those that are over with a tick, the one under way in bold."""
        here = self._task.partition(" ")[0]
        if here not in self._epochs and self._step is not None:
            here = self._step.stage
        before, line = here in self._epochs, Text()
        for stage in self._epochs:
            if stage == here:
                line.append(self._task if self._task.startswith(stage) else stage, "bold cyan")
                before = False
            else:
                line.append(f"{stage} \N{CHECK MARK}" if before else stage, "green" if before else "dim")
            line.append("  ")
        return line

    def _progress(self) -> RenderableType:
        row = Table.grid(padding=(0, 2))
        title = "" if self._task.partition(" ")[0] in self._epochs else self._task
        left = "" if (seconds := self._seconds_each()) is None else self._left(seconds)
        bar = ProgressBar(total=max(self._total, 1), completed=self._done, width=BAR)
        cells: list[RenderableType] = [bar, f"{self._done}/{self._total}", left]
        row.add_row(*([title, *cells] if title else cells))
        if self._step is not None and not title:
            return row
        return Group(row, Text(printable(self._note), "dim", no_wrap=True, overflow="ellipsis"))

    def _left(self, seconds: float) -> str:
        """How long the epoch, and the stage, will still take at `seconds` a step."""
        epoch = f"{duration(max(seconds * (self._total - self._done), 0.0))} left"
        stage, step = self._task.partition(" ")[0], self._step
        more = self._epochs.get(stage, 0) - (step.epoch if step is not None and step.stage == stage else 0) - 1
        if more < 1 or step is None or step.stage != stage:
            return epoch
        return f"{epoch} of this epoch, {duration(seconds * (self._total * (1 + more) - self._done))} of {stage}"

    def _seconds_each(self) -> float | None:
        """Seconds of a unit, of late; None before any was done."""
        ticks = self._ticks
        units = sum(tick.units for tick in ticks[1:])
        return (ticks[-1].at - ticks[0].at) / units if units else None

    def _learning(self, step: events.Step) -> RenderableType:
        table = Table.grid(padding=(0, 2))
        table.add_column(style="dim")
        table.add_column(overflow="fold")
        if step.num_snippets:
            table.add_row("rung", rung(step))
        if self._budget:
            table.add_row("memory", self._memory(step))
        table.add_row("loss", self._loss(step))
        if self._last is not None and self._best is not None:
            best = f", best {_percent(self._best.average)} after {self._best.epoch + 1}"
            told = f"{_percent(self._last.average)} after epoch {self._last.epoch + 1}"
            table.add_row("mAP", told + (best if self._best is not self._last else ""))
        if speed := self._speed(step):
            table.add_row("speed", speed)
        return table

    def _memory(self, step: events.Step) -> RenderableType:
        """Memory as a share of the budget: this step's peak where it was measured, else the most seen or planned."""
        amount, word = self._planned, "planned"
        if self._highest:
            amount, word = self._highest, "at most so far"
        if step.peak is not None:
            amount, word = step.peak, f"{step.retries} retries" if step.retries else ""
        row = Table.grid(padding=(0, 2))
        colour = "red" if amount > self._budget else "green"
        bar = ProgressBar(
            total=self._budget, completed=min(amount, self._budget), width=BAR, complete_style=colour,
            finished_style=colour,
        )  # fmt: skip
        share = f"{gigabytes(amount)} of {gigabytes(self._budget)}, {100 * amount / self._budget:.0f} %"
        row.add_row(bar, share + (f", {word}" if word else ""))
        return row

    def _loss(self, step: events.Step) -> Text:
        line = Text("not finite" if step.loss is None else f"{step.loss:.3f}")
        if step.accuracy is not None:
            line.append(f", accuracy {100 * step.accuracy:.0f} %")
        if len(self._losses) > 1:
            line.append(f"  {curve(self._losses)}", "cyan")
        return line

    def _speed(self, step: events.Step) -> str:
        """Samples a second, and the share of the time that went by in waiting for frames."""
        ticks = self._ticks
        seconds = ticks[-1].at - ticks[0].at if ticks else 0.0
        samples = sum(tick.samples for tick in ticks[1:])
        if seconds <= 0 or not samples:
            return ""
        noun = "clips" if step.stage == "pretrain" else "videos"
        share = 100 * sum(tick.waited for tick in ticks[1:]) / seconds
        waits = f", {share:.0f} % of the time waiting for frames" if step.stage != "head" else ""
        return f"{samples / seconds:.3g} {noun} a second{waits}"


def rung(step: events.Step) -> str:
    """The plan of a LoFi step in words: "50 x 158 px, spatio-temporal; 4 videos at once, recompute"."""
    at_once = f"{step.micro_batch} video{'' if step.micro_batch == 1 else 's'} at once"
    how = at_once + (", recompute" if step.recompute else "")
    pattern = (step.pattern or "").replace("_", "-")
    return f"{step.num_snippets} x {step.side} px{f', {pattern}' if pattern else ''}; {how}"


def curve(values: tuple[float, ...], width: int = CURVE) -> str:
    """A curve of blocks, from the least of the values to the greatest: the means of at most `width` stretches."""
    size = -(-len(values) // width)
    means = [sum(part) / len(part) for k in range(0, len(values), size) if (part := values[k : k + size])]
    low, high = min(means), max(means)
    top = len(BLOCKS) - 1
    return "".join(BLOCKS[round(top * (mean - low) / (high - low)) if high > low else 0] for mean in means)


def _percent(fraction: float | None) -> str:
    return "unknown" if fraction is None else f"{100 * fraction:.1f} %"

"""What the log of a training says of the planner: how well it predicted, and whether it kept to the budget."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from itertools import pairwise
from pathlib import Path
from statistics import median

from bench.tools.rows import Row
from lofi_fast.run import events


def read_log(out: Path) -> list[events.AnyEvent]:
    """The events of a run folder's log."""
    with (out / "log.jsonl").open(encoding="utf-8") as lines:
        return list(events.read(lines))


def violations(steps: Sequence[events.Step], trials: Sequence[events.Measured]) -> list[events.Step | events.Measured]:
    """Steps that held more than the budget, or than what others left of it; and trial steps beyond the budget."""
    found: list[events.Step | events.Measured] = [
        step for step in steps if step.peak is not None and step.peak > min(step.budget, step.limit)
    ]
    found += [trial for trial in trials if trial.peak is not None and trial.peak > trial.budget]
    return found


def described(event: events.Step | events.Measured) -> str:
    """A step or a trial step in one line: its plan, and what was predicted and measured of its memory."""
    if isinstance(event, events.Measured):
        return f"trial of {event.candidate}: {_gb(event.peak)} held of a budget of {_gb(event.budget)} GB"
    videos = f"{event.micro_batch} at once{', recompute' if event.recompute else ''}"
    amounts = {
        "held": event.peak, "predicted": event.predicted, "held before": event.base, "limit": event.limit,
        "room": event.room, "free": event.free, "budget": event.budget,
    }  # fmt: skip
    told = ", ".join(f"{name} {_gb(amount)}" for name, amount in amounts.items())
    plan = f"{event.num_snippets} x {event.side} px, {videos}"
    return f"epoch {event.epoch} step {event.step}, {plan}: GB {told}; {event.retries} retries; {event.reason}"


def _gb(amount: int | None) -> str:
    return "?" if amount is None else f"{amount / 1e9:.2f}"


def summary(steps: Sequence[events.Step], trials: Sequence[events.Measured], seen: int) -> Row:
    """What a log says of predictions, peaks, rungs and samples."""
    errors = [abs(step.peak - step.predicted) / step.peak for step in steps]
    added = [abs(s.peak - s.predicted) / max(s.predicted - s.base, 1) for s in steps]
    used = [step.peak / min(step.budget, step.limit) for step in steps]
    omegas = [step.num_snippets * step.side**2 for step in steps]
    of_pattern: dict[str, list[int]] = {}
    for omega, step in zip(omegas, steps, strict=True):
        of_pattern.setdefault(step.pattern, []).append(omega)
    moves = [b - a for found in of_pattern.values() for a, b in pairwise(found)]
    epochs: dict[int, list[str]] = {}
    for step in steps:
        epochs.setdefault(step.epoch, []).extend(step.videos)
    # Of the last epoch only some steps may have been taken.
    whole = set().union(*epochs.values()) if epochs else set()
    complete = [videos for epoch, videos in epochs.items() if epoch != max(epochs)]
    lost = sum(len(whole - set(videos)) for videos in complete)
    repeated = sum(len(videos) - len(set(videos)) for videos in epochs.values())
    spent = _seconds(steps)
    return {
        "steps": len(steps),
        "trials": len(trials),
        "steps_a_second": round(len(steps) / spent, 3) if spent else None,
        "error_of_peak": [round(max(errors, default=0.0), 4), round(median(errors or [0.0]), 4)],
        "error_of_added": [round(max(added, default=0.0), 4), round(median(added or [0.0]), 4)],
        "used": [round(f(used or [0.0]), 4) for f in (min, median, max)],
        "used_median": round(median(used or [0.0]), 4),
        "bound": True,  # full fidelity of 16 videos needs about 50 GB
        "violations": len(violations(steps, trials)),
        "seen_of_budget": round(seen / steps[0].budget, 4) if steps else None,
        "short": sum(step.limit < step.budget for step in steps),
        "retries": sum(step.retries for step in steps),
        "reduced": sum(step.reduced_from is not None for step in steps),
        "down": sum(move < 0 for move in moves),
        "up": sum(move > 0 for move in moves),
        "rungs": len({(s.num_snippets, s.side, s.micro_batch, s.recompute) for s in steps}),
        "lost": lost + repeated,
    }


def _seconds(steps: Sequence[events.Step]) -> float:
    if len(steps) < 2:
        return 0.0
    first, last = (datetime.fromisoformat(step.time) for step in (steps[0], steps[-1]))
    return (last - first).total_seconds()

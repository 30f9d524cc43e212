"""Targets for a GPU, and what the rows of `bench gpu` say of each: met, missed, or not measured."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

from bench.tools.networks import BUDGETS, COMPILED, EACH_SNIPPET, LEAN_EACH_SNIPPET, PLANNED
from bench.tools.rows import Row
from bench.tools.table import newest

HEADER = ("target", "bound", "found", "")
MEASURED_BY = ("step", "launches", "gpu_planner", "memory", "ops", "waits")
WHOLE, ENCODER = "whole step, 100 snippets of 224 px", "encoder, 800 frames of 224 px"
LARGE_BATCH = "whole step, 16 x 50 snippets of 158 px"
LEAN, RECOMPUTE, EIGHT_BIT = PLANNED
OPERATIONS, CALL_US = 5000, 25
MOST_WAITED = 0.05  # of the time of a step
ONE_KERNEL = ("temporal_shift", "residual_shift", "stem", "stem_input", "quantize", "dequantize", "gather_rows")
COPIES = ("temporal_shift", "residual_shift")

Rows = Callable[[str], Sequence[Row]]
Found = tuple[str, str, str, bool | None]  # target, bound, what was found, whether it was met; None: not measured


def judged(rows: Rows) -> list[Row]:
    """A row for each target, from the rows of each command of one commit on one device."""
    steps = {(row["step"], row["form"]): row for row in newest(rows("step"), ("step", "dtype", "form"))}
    found = [
        *_speed(steps), *_memory(steps, rows("memory")), *_host(rows("launches"), steps),
        *_planner(rows("gpu_planner")), *_bandwidth(rows("ops")), *_waiting(rows("waits")),
    ]  # fmt: skip
    return [{"target": what, "bound": bound, "found": said, "met": met} for what, bound, said, met in found]


def cells(row: Row) -> tuple[str, str, str, str]:
    """Of the table with `HEADER`."""
    verdict = "not measured" if row["met"] is None else "met" if row["met"] else "missed"
    return row["target"], row["bound"], row["found"], verdict


def _speed(steps: Mapping[tuple[str, str], Row]) -> Iterable[Found]:
    """Speeds are those beside plain PyTorch in the same minute, so that forms of several runs can be compared."""

    def speed(step: str, form: str) -> float | None:
        return steps[step, form]["faster_than_plain"][0] if (step, form) in steps else None

    for step, name in ((WHOLE, "whole step"), (ENCODER, "encoder")):
        ours, compiled = speed(step, LEAN), speed(step, COMPILED)
        yield _least(f"{name} at full fidelity against plain PyTorch", 2.0, ours)
        ratio = ours / compiled if ours and compiled else None
        yield _least(f"{name} at full fidelity against torch.compile", 1.3, ratio)
        for form in BUDGETS:
            what = f"{name}: ahead of {form} in time and peak"
            theirs = speed(step, form)
            if not ours or not theirs or not steps[step, form]["peak"] or not steps[step, LEAN]["peak"]:
                yield what, "both", "", None
                continue
            less = steps[step, form]["peak"] / steps[step, LEAN]["peak"]
            yield what, "both", f"{ours / theirs:.2f}x, {less:.2f}x less", ours > theirs and less > 1
    each = [steps.get((ENCODER, form)) for form in (EACH_SNIPPET, LEAN_EACH_SNIPPET)]
    what = "recompute a snippet at a time against plain checkpointing: peak, time"
    if each[0] and each[1] and each[0]["peak"] and each[1]["peak"]:
        peak, time = each[1]["peak"] / each[0]["peak"], each[1]["ms"][0] / each[0]["ms"][0]
        yield what, "<= 1.15x, 0.5x", f"{peak:.2f}x, {time:.2f}x", peak <= 1.15 and time <= 0.5
    else:
        yield what, "<= 1.15x, 0.5x", "", None


def _memory(steps: Mapping[tuple[str, str], Row], rows: Sequence[Row]) -> Iterable[Found]:
    peaks = {(row["videos"], row["snippets"], row["form"]): row["peak"] for row in rows if row["measured"] == "step"}
    for form in (LEAN, RECOMPUTE, EIGHT_BIT):
        if (WHOLE, form) in steps:
            peaks.setdefault((1, 100, form), steps[WHOLE, form]["peak"])
    small = "lean, recompute"  # in the smallest chunks
    for what, bound, key in (
        ("one video at full fidelity, peak", 4.3e9, (1, 100, LEAN)),
        ("one video at full fidelity with recompute, peak", 1.2e9, (1, 100, small)),
        ("16 videos at full fidelity with recompute, peak", 5.5e9, (16, 100, small)),
    ):
        found = peaks.get(key)
        yield (
            what,
            f"<= {bound / 1e9:g} GB",
            f"{found / 1e9:.2f} GB" if found else "",
            found <= bound if found else None,
        )


def _host(rows: Sequence[Row], steps: Mapping[tuple[str, str], Row]) -> Iterable[Found]:
    rows = newest(rows, ("measured", "what", "dtype", "form"))
    ours = {(row["measured"], row["what"]): row for row in rows if row["form"] == LEAN}
    for step in (WHOLE, LARGE_BATCH):
        count = ours.get(("operations", step), {}).get("operations")
        name = step.removeprefix("whole step, ")
        yield f"device operations, {name}", f"<= {OPERATIONS}", f"{count:,}" if count else "", (
            count <= OPERATIONS if count else None
        )  # fmt: skip
    host, device = ours.get(("host", WHOLE)), steps.get((WHOLE, LEAN))
    what = f"host's time below the step's, {WHOLE.removeprefix('whole step, ')}"
    if host and device:
        taken, whole = host["us"][0] / 1e3, device["ms"][0]
        yield what, "below", f"{taken:.1f} of {whole:.1f} ms", taken < whole
    else:
        yield what, "below", "", None
    calls = [
        (row["us"][0], row["what"]) for row in rows
        if row["measured"] == "call" and row["what"].split()[0] in ONE_KERNEL and row["form"].startswith("Triton")
    ]  # fmt: skip
    slowest = max(calls, default=None)
    said = f"{slowest[0]:.1f} us at most ({slowest[1].split()[0]})" if slowest else ""
    yield "host's time of one operator call", f"<= {CALL_US} us", said, slowest[0] <= CALL_US if slowest else None


def _planner(rows: Sequence[Row]) -> Iterable[Found]:
    pressed = [row for row in rows if row["model"] == "r18" and row["pressure"]]
    ran = [row for row in newest(pressed, ("budget",)) if row["steps"] and not row["refused"]]
    budgets = ", ".join(f"{row['budget'] / 1e9:g} GB" for row in ran)
    what = f"planner beside a neighbour, {budgets or 'any budget'}"
    for name, bound, found, met in (
        ("worst error of a peak", "<= 3%", lambda row: row["error_of_peak"][0], lambda value: value <= 0.03),
        ("budget used, median", ">= 90%", lambda row: row["used"][1], lambda value: value >= 0.9),
    ):
        values = [found(row) for row in ran]
        yield f"{what}: {name}", bound, ", ".join(f"{100 * v:.1f}%" for v in values), (
            all(map(met, values)) if values else None
        )  # fmt: skip
    over, lost = sum(row["violations"] for row in ran), sum(row["lost"] for row in ran)
    yield f"{what}: violations, lost", "0, 0", f"{over}, {lost}" if ran else "", not over + lost if ran else None


def _bandwidth(rows: Sequence[Row]) -> Iterable[Found]:
    for op in COPIES:
        shares = [
            row[passes]["of_roof"] for row in rows
            if row["op"] == op and row["ours"] and row["shape"].startswith("56x56")
            for passes in ("forward", "forward_backward") if row[passes] and row[passes].get("of_roof")
        ]  # fmt: skip
        said = f"{100 * min(shares):.0f} to {100 * max(shares):.0f}%" if shares else ""
        yield f"{op} of 56 px, of the copy bandwidth", ">= 90%", said, min(shares) >= 0.9 if shares else None


def _waiting(rows: Sequence[Row]) -> Iterable[Found]:
    """Of the steps of a long epoch: its first, which waits for its own frames, is not among them."""
    shares = {row["setting"]: row["within"]["share"] for row in newest(rows, ("setting",))}
    known = {setting: share for setting, share in shares.items() if share is not None}
    said = ", ".join(f"{100 * share:.1f}% ({setting})" for setting, share in known.items())
    met = all(share < MOST_WAITED for share in known.values()) if known else None
    yield "wait for data after the first epoch, of a step", f"< {100 * MOST_WAITED:g}%", said, met


def _least(what: str, bound: float, found: float | None) -> Found:
    return what, f">= {bound:g}x", "" if found is None else f"{found:.2f}x", None if found is None else found >= bound

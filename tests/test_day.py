"""A day on a shared card in virtual time: traces of others, what a step meets, other trainers' searches, the rows."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from bench.__main__ import main
from bench.commands import day, tables
from bench.peers.searches import PEERS
from bench.tools.rows import read_rows
from bench.tools.shared_card import BY_HAND, STEPS_AN_EPOCH, Day, SharedCard, Task, ours, scripted
from bench.tools.traces import DAY, MANNERS, Trace, made_up, recorded
from lofi_fast.errors import InputError
from lofi_fast.fidelity import Fidelity, Pattern, ladder
from lofi_fast.memory.plans import candidates

GB = 10**9
S = Pattern.SPATIAL


def steps_of(*changes: tuple[float, float], seconds: float = 1000.0) -> Trace:
    """From (second, GB) on."""
    times, held = zip(*changes, strict=True)
    return Trace(np.array(times, dtype=np.float64), (GB * np.array(held)).astype(np.int64), seconds)


# Traces


def test_a_trace_is_a_step_function_that_begins_anew() -> None:
    trace = steps_of((0, 1), (4, 5), (6, 2), seconds=10)
    assert [trace.at(time) // GB for time in (0, 3.9, 4, 9.9, 10, 14, 24.5)] == [1, 1, 5, 2, 1, 5, 5]
    assert trace.most(0, 3) == GB and trace.most(0, 4) == 5 * GB and trace.most(7, 2) == 2 * GB
    assert trace.most(7, 6.9) == 2 * GB and trace.most(7, 7) == 5 * GB, "round the end"
    offsets, held = trace.window(5, 6)
    assert offsets.tolist() == [0, 1, 5] and (held // GB).tolist() == [5, 2, 1]
    assert [trace.next_change(time) for time in (0, 4, 6, 13)] == [4, 6, 10, 14]
    assert trace.below(3 * GB).held.tolist() == [GB, 3 * GB, 2 * GB]


@pytest.mark.parametrize("manner", MANNERS)
def test_made_up_traces_last_a_day_and_stay_on_the_card(manner: str) -> None:
    total, low, high = 12 * GB, 2 * GB, 11 * GB
    trace = made_up(manner, 0, total, low, high)
    assert trace.times[0] == 0 and (np.diff(trace.times) > 0).all() and DAY / 2 < trace.times[-1] < DAY
    left = total - trace.held
    assert 0.98 * low <= left.min() and left.max() <= total and len(trace.times) == len(left)
    assert left.min() < 0.6 * high or manner == "trainer"
    assert (made_up(manner, 0, total, low, high).held == trace.held).all()
    assert len(made_up(manner, 1, total, low, high).held) != len(left) or (trace.held[1:] != trace.held[:-1]).any()


def test_a_recording_is_read(tmp_path: Path) -> None:
    path = tmp_path / "others.csv"
    path.write_text("seconds,bytes\n100,1000000000\n102.5,5e9\n\n104,0\n")
    trace = recorded(path)
    assert trace.times.tolist() == [0, 2.5, 4] and trace.held.tolist() == [GB, 5 * GB, 0] and trace.seconds == 5.5


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("1,2\nx,3\n", r"others\.csv:2"),
        ("1,2\n1,3\n", r"others\.csv:2"),
        ("1,2\n2,-3\n", r"others\.csv:2"),
        ("1,2\n2,nan\n", r"others\.csv:2"),
        ("1,2\n2\n", r"others\.csv:2"),
        ("1,2\n", "at least two lines"),
        ("", "at least two lines"),
    ],
)
def test_what_is_no_recording_is_refused(tmp_path: Path, text: str, says: str) -> None:
    path = tmp_path / "others.csv"
    path.write_text(text)
    with pytest.raises(InputError, match=says):
        recorded(path)
    with pytest.raises(InputError, match="cannot be read"):
        recorded(tmp_path / "none.csv")


# A step


@pytest.fixture(scope="module")
def made() -> Task:
    return day.task(day.CASES["r18"])


def run(made: Task, trace: Callable[[float, int], Trace], cap: Callable[[int], int]) -> tuple[Day, int | None, float]:
    """What became of the first step of the lowest rung: `trace` is told its seconds and its peak, `cap` its peak."""
    found, empty = Day(), SharedCard(made, steps_of((0, 0)), 0)
    plan = empty.rung(S, 0.0)
    peak = empty.run(plan, made.budget, Day())
    assert peak is not None
    seconds = made.seconds(plan)
    card = SharedCard(made, trace(seconds, peak), 0)
    reached = card.run(plan, cap(peak), found)
    return found, reached, card.time / seconds


def others(made: Task, *changes: tuple[float, int]) -> Callable[[float, int], Trace]:
    """They leave the peak and so many bytes, from so many shares of the step's time on."""
    return lambda seconds, peak: steps_of(
        *((share * seconds, (made.card.usable - peak - more) / GB) for share, more in changes), seconds=1e6
    )


def test_a_step_beside_others(made: Task) -> None:
    found, peak, took = run(made, others(made, (0, 0)), lambda peak: peak)
    assert peak is not None and took == 1
    assert (found.over, found.ran_out, found.turned_away) == (0, 0, 0)


@pytest.mark.parametrize(("share", "happens"), [(0.4, "ran_out"), (0.6, "turned_away"), (1.1, "")])
def test_others_take_in_the_middle_of_a_step(made: Task, share: float, happens: str) -> None:
    found, peak, took = run(made, others(made, (0, 0), (share, -1000)), lambda peak: peak)
    assert (peak is None) == (happens == "ran_out") and took == (0.5 if peak is None else 1)
    assert {name: getattr(found, name) for name in ("over", "ran_out", "turned_away")} == {
        name: int(name == happens) for name in ("over", "ran_out", "turned_away")
    }
    found, peak, _ = run(made, others(made, (0, 0), (0.2, -1000), (0.3, 0)), lambda peak: peak)
    assert peak is not None and found.ran_out == 0, "they gave it back in time"


def test_the_cap_catches_what_torch_takes_and_not_what_libraries_take_at_first(made: Task) -> None:
    found, peak, _ = run(made, others(made, (0, GB)), lambda peak: peak - 1000)
    assert peak is not None and found.over == 1
    found, peak, took = run(made, others(made, (0, GB)), lambda peak: peak - 10**8)
    assert peak is None and (found.over, found.ran_out, took) == (0, 1, 0.5)


def test_a_script_has_one_plan_for_each_rung() -> None:
    rungs = ladder(S, Fidelity(100, 224))
    plans = scripted(candidates(rungs, 16, recompute="auto", device="cuda"))
    assert [plan.fidelity for plan in plans] == list(rungs)
    assert all(plan.recompute and plan.chunk <= BY_HAND for plan in plans)
    plans = scripted(candidates(rungs, 16, micro_batch=1, recompute="never", device="cuda"))
    assert all((plan.micro_batch, plan.recompute) == (1, False) and plan.chunk > BY_HAND for plan in plans)


def test_the_clairvoyant_looks_ahead_as_far_as_its_step_goes(made: Task) -> None:
    card = SharedCard(made, steps_of((0, 0)), 0)
    free, seconds = card.best(S)
    assert free > 0.1 and seconds > 0
    sudden = steps_of((0, 0), (seconds - 0.1, made.card.usable / GB - 3), seconds=1e6)
    share, quick = SharedCard(made, sudden, 0).best(S)
    assert 0 < share < free and quick < seconds
    later = steps_of((0, 0), (seconds + 0.1, made.card.usable / GB - 3), seconds=1e6)
    assert SharedCard(made, later, 0).best(S) == (free, seconds)


# Other trainers


@pytest.mark.parametrize("fits", [1.0, 0.7, 0.3, 0.1])
def test_the_searches_find_what_fits(fits: float) -> None:
    tried: list[float] = []

    def attempt(share: float) -> int | None:
        tried.append(share)
        return 1000 + round(16_000 * share) if share <= fits else None

    def found(way: str) -> float:
        tried.clear()
        share = PEERS[way].search(attempt, 17_000, 1000)
        assert share is not None
        return share

    assert 0.9 * fits <= found("fixed cut") <= fits
    assert 0.5 * fits < found("Lightning, power") <= fits
    assert 0.9 * fits < found("Lightning, binsearch") <= fits
    assert tried[:2] == [1 / 16, 1 / 8], "from the smallest, doubled"
    assert 0.9 * fits < found("DeepSpeed") <= fits
    assert tried[:2] == [1 / 16, 1.0], "the smallest, then what the whole device would hold"
    assert found("accelerate") == 1 and tried == [], "it halves when training fails"
    for way in PEERS:
        assert PEERS[way].search(lambda _: None, 17_000, 1000) in (None, 1.0)


def test_a_time_budget_makes_epochs_shorter_and_costs_fidelity_at_most() -> None:
    made = day.task(day.CASES["r18"])
    held, steps, hours = day.trace(made, "steady", 0), 400, 3
    free, timed = (ours(made, held, steps, 0, epoch_seconds=limit) for limit in (None, 3600.0 * hours))
    assert timed.over == free.over == 0
    assert timed.steps == steps and timed.seconds / steps * STEPS_AN_EPOCH <= 3600 * hours
    assert free.seconds / free.steps * STEPS_AN_EPOCH > 3600 * hours, "else the budget binds nothing"
    assert timed.obtained / timed.steps <= free.obtained / free.steps


# The command


def test_days_are_lived_and_drawn(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    results, page = tmp_path / "results", tmp_path / "README.md"
    recording = tmp_path / "others.csv"
    recording.write_text("0,1e9\n30,7e9\n60,3e9\n90,1e9\n")
    command = ["day", "--steps", "1000", "--cases", "r18", "--results", str(results / "day.jsonl")]
    assert main([*command, "--manners", "spikes"]) == 0
    assert main([*command, "--trace", str(recording)]) == 0
    rows = {(row["trace"], row["way"]): row for row in read_rows(results / "day.jsonl")}
    assert len(rows) == 2 * (2 + len(PEERS))
    for (_, way), row in rows.items():
        assert row["quick"] and row["seconds"] > 0 and row["share"] <= 1.1
        if way in ("lofi_fast", "clairvoyant"):
            assert row["over"] == 0 and row["restarts"] == 0 and row["steps"] == 1000
        if way == "clairvoyant":
            assert row["share"] == 1 and row["ran_out"] == 0 and row["turned_away"] == 0
    assert rows["spikes", "lofi_fast"]["share"] >= 0.85
    assert rows["recorded: others.csv", "lofi_fast"]["moves"] > 0
    assert main([*command, "--manners", "spikes"]) == 0
    again = read_rows(results / "day.jsonl")[-len(rows) // 2 :]
    moved = {"date", "commit", "dirty"}
    for row in again:
        first = rows["spikes", row["way"]]
        assert {k: v for k, v in row.items() if k not in moved} == {k: v for k, v in first.items() if k not in moved}

    shown = (results / "day.jsonl").read_text().replace('"quick": true', '"quick": false')
    (results / "day.jsonl").write_text(shown)
    page.write_text("<!-- bench:day -->\n<!-- /bench -->\n")
    capsys.readouterr()
    assert tables.main([], (page,), results) == 0 and tables.main(["--check"], (page,), results) == 0
    assert "| spikes | " in page.read_text() and "| clairvoyant | 2,000 of 2,000 |" in page.read_text()
    picture = (results / "day.svg").read_text()
    assert picture.startswith("<?xml") and "what others hold" in picture and str(tmp_path) not in picture


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--steps", "0"], "--steps"),
        (["--cases", "r18,r99"], "no case is called r99"),
        (["--manners", "polite"], "nobody behaves like polite"),
        (["--trace", "absent.csv"], "--trace absent.csv"),
    ],
)
def test_flags_are_checked(flags: list[str], says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["day", *flags, "--results", str(tmp_path / "day.jsonl")]) == 2
    assert says in capsys.readouterr().err and not (tmp_path / "day.jsonl").exists()

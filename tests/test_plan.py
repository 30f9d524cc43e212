"""lofi-fast plan: what would fit a card that is not here, and how long it would take."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any, get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import lofi_fast
from lofi_fast.budget import Budget
from lofi_fast.config import Config, EncoderName, PresetName, Recompute
from lofi_fast.errors import InputError
from lofi_fast.fidelity import CYCLE, PAPER_CUT, Pattern
from lofi_fast.memory.cards import PROFILES, Profile, profile_for
from lofi_fast.memory.frontier import ways
from lofi_fast.memory.plans import candidates
from lofi_fast.plan import Forecast, epoch_size, main
from lofi_fast.presets import PRESETS

PLAN_KEYS = {"num_snippets", "side", "micro_batch", "recompute", "chunk", "peak", "epoch_seconds"}


def forecast(capsys: pytest.CaptureFixture[str], *flags: str) -> dict[str, Any]:
    """The JSON of the one budget that the flags name."""
    assert main([*flags, "--json"]) == 0
    (found,) = json.loads(capsys.readouterr().out)["budgets"]
    return dict(found)


def rung(plan: dict[str, Any]) -> tuple[int, int]:
    return plan["num_snippets"], plan["side"]


def test_the_module_is_a_command() -> None:
    command = [sys.executable, "-m", "lofi_fast.plan", "--mem-budget", "11GB"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert "100 snippets x 224 px" in done.stdout and done.stdout.count("<- 2 at once") == 3
    assert "assumed" in done.stdout and "GeForce RTX 2080 Ti" in done.stdout


def test_what_is_chosen_is_the_highest_rung_that_fits() -> None:
    found = lofi_fast.plan(mem_budget="3GB", recompute="never")
    for pattern in found.patterns():
        rungs, plan = found.rungs(pattern), found.chosen(pattern)
        assert plan is not None and found.peak(plan) <= found.room
        at = rungs.index(plan.fidelity)
        assert at > 0 and not plan.recompute
        for above in candidates(rungs[:at], 16, None, "never", "cuda"):
            assert found.peak(above) > found.room
        cuts = [rungs[0].omega / one.omega for one in rungs]
        assert cuts == sorted(cuts)


def test_more_memory_never_plans_lower(capsys: pytest.CaptureFixture[str]) -> None:
    cuts = []
    for profile in PROFILES:
        flags = ("--pattern", "spatial", "--micro-batch", "16", "--recompute", "never")
        found = forecast(capsys, "--mem-budget", "100%", "--card", profile.name, *flags)
        side = found["chosen"]["spatial"]["side"]
        cuts.append((found["room"] - found["assumed"]["beside_tensors"], side))
    assert [side for _, side in sorted(cuts)] == sorted(side for _, side in cuts)
    assert cuts[0][1] < cuts[-1][1]


def test_full_fidelity_of_the_papers_batch_fits_an_11_gb_card_with_recompute(
    capsys: pytest.CaptureFixture[str],
) -> None:
    found = forecast(capsys, "--mem-budget", "11GB", "--recompute", "always")
    for plan in found["chosen"].values():
        assert (*rung(plan), plan["micro_batch"], plan["recompute"]) == (100, 224, 16, True)


def test_a_cpu_and_other_presets(capsys: pytest.CaptureFixture[str]) -> None:
    found = forecast(capsys, "--mem-budget", "11GB", "--device", "cpu", "--preset", "demo")
    assert found["device"] == "a CPU, float32"
    plan = found["chosen"]["spatial"]
    assert (*rung(plan), plan["micro_batch"], plan["recompute"], plan["chunk"]) == (32, 32, 4, False, 98)
    assert plan["epoch_seconds"] is None and "a training measures it" in found["times"]
    assert forecast(capsys, "--mem-budget", "11GB", "--preset", "thumos")["chosen"].keys() == found["chosen"].keys()


def test_a_time_limit_on_a_cpu_is_said_to_do_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    flags = ("--mem-budget", "2GB", "--device", "cpu", "--preset", "demo")
    limited = forecast(capsys, *flags, "--epoch-time", "1s")
    assert limited["chosen"] == forecast(capsys, *flags)["chosen"]
    assert any("--epoch-time lowers nothing here" in note for note in limited["notes"])


def test_nothing_fits_says_what_would_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--mem-budget", "2GB", "--recompute", "never", "--max-cut", "2", "--micro-batch", "8"]) == 1
    out = capsys.readouterr().out
    assert "nothing fits: of a budget of 2.00 GB" in out and "--micro-batch none --recompute auto" in out


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--mem-budget", "auto"], "give an amount like 11GB"),
        (["--mem-budget", "11 apples"], "is not an amount of memory"),
        (["--mem-budget", "4GB,,8GB"], "is not an amount of memory"),
        (["--mem-budget", "4GB,-8GB"], "is not an amount of memory"),
        (["--mem-budget", "4GB,80%"], "a share of which card?"),
        (["--mem-budget", "11GB", "--card", "voodoo"], "no known card"),
        (["--mem-budget", "11GB", "--card", "13GB"], "the classes are 8GB, 10GB, 11GB,"),
        (["--mem-budget", "80%", "--device", "cpu"], "give an amount like 8GB"),
        (["--mem-budget", "900GB"], "no known card holds 900.0 GB"),
        (["--mem-budget", "11GB", "--samples", "0"], "--samples 0: must be a positive number"),
        (["--mem-budget", "11GB", "--samples", "-3"], "--samples -3: must be a positive number"),
        (["--mem-budget", "11GB", "--epoch-time", "-3min"], "write a time like 30min"),
        (["--mem-budget", "11GB", "--annotations", "nowhere.json"], "nowhere.json cannot be read"),
    ],
)
def test_bad_input_is_one_sentence(capsys: pytest.CaptureFixture[str], flags: list[str], said: str) -> None:
    assert main(flags) == 2
    error = capsys.readouterr().err
    assert said in error and error.startswith("error: ") and error.count("\n") == 1


def test_activations_in_8_bits_leave_room_for_more(capsys: pytest.CaptureFixture[str]) -> None:
    exact, eight = (lofi_fast.plan(mem_budget="11GB", kept_maps=kept) for kept in ("exact", "8bit"))
    assert [made.to_json()["kept_maps"] for made in (exact, eight)] == ["exact", "8bit"]
    for pattern in exact.patterns():
        for plan in candidates(exact.rungs(pattern), 16, None, "auto", "cuda"):
            if plan.micro_batch in (1, 16) and plan.chunk > 30:
                less, peak = eight.peak(plan), exact.peak(plan)
                # Recompute keeps frames alone, and its peak may be anywhere.
                assert less < peak or (plan.recompute and less == peak)
    assert main(["--mem-budget", "11GB", "--kept-maps", "8bit"]) == 0
    assert "16 videos a step, activations kept in 8 bits; " in capsys.readouterr().out


def test_a_cycle_without_a_change_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--mem-budget", "80GB", "--card", "A100 80GB", "--batch", "1"]) == 0
    assert "note: spatial and temporal and spatio_temporal have the same rung" in capsys.readouterr().out
    for flags in (["--min-cut", "4"], ["--pattern", "spatial"]):
        assert main(["--mem-budget", "80GB", "--card", "A100 80GB", "--batch", "1", *flags]) == 0
        assert "have the same rung" not in capsys.readouterr().out


# Several budgets, and time


def test_several_budgets(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--mem-budget", "4GB, 8GB,11GB", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [one["budget"] for one in found["budgets"]] == [4 * 10**9, 8 * 10**9, 11 * 10**9]
    for one in found["budgets"]:
        assert set(one["chosen"]) == {pattern.value for pattern in CYCLE} and one["reasons"] == {}
        for plan in one["chosen"].values():
            assert set(plan) == PLAN_KEYS and plan["peak"] <= one["budget"] and plan["epoch_seconds"] > 0
    single = forecast(capsys, "--mem-budget", "8GB")
    assert single == found["budgets"][1]
    assert main(["--mem-budget", "4GB,8GB,11GB"]) == 0
    assert capsys.readouterr().out.count("\nbudget ") == 3


def test_a_pattern_that_does_not_fit_is_null_with_its_reason(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--mem-budget", "0.9GB,8GB", "--json"]) == 1
    none, some = json.loads(capsys.readouterr().out)["budgets"]
    assert set(none["chosen"].values()) == {None} and all(some["chosen"].values())
    assert none["reasons"].keys() == none["chosen"].keys()
    assert all(reason.startswith("nothing fits: of a budget of 0.90 GB") for reason in none["reasons"].values())


def test_the_highest_fidelity_whose_epoch_is_in_time(capsys: pytest.CaptureFixture[str]) -> None:
    flags = ("--mem-budget", "11GB", "--card", "2080ti", "--all")
    free, short = forecast(capsys, *flags), forecast(capsys, *flags, "--epoch-time", "30min")
    for pattern, plan in short["chosen"].items():
        assert plan["epoch_seconds"] <= 1800 < free["chosen"][pattern]["epoch_seconds"]
        higher = [row for row in free["frontier"][pattern] if rung(row) > rung(plan)]
        assert higher and all(row["epoch_seconds"] > 1800 for row in higher)
        assert "100 snippets x 224 px fits, and takes 1 h" in short["traded"][pattern][0]
    none = forecast(capsys, *flags, "--epoch-time", "1s")
    for pattern, plan in none["chosen"].items():
        assert rung(plan) == rung(none["frontier"][pattern][-1])
        assert any(note.startswith(f"{pattern}: no rung that fits is as fast as") for note in none["notes"])


def test_the_frontier_falls_in_fidelity_and_in_time(capsys: pytest.CaptureFixture[str]) -> None:
    found = forecast(capsys, "--mem-budget", "3GB", "--card", "3060", "--all")
    for rows in found["frontier"].values():
        omegas = [length * side**2 for length, side in map(rung, rows)]
        seconds = [row["epoch_seconds"] for row in rows]
        assert len(rows) > 15 and omegas == sorted(omegas, reverse=True)
        assert seconds == sorted(set(seconds), reverse=True)
        assert all(row["peak"] <= found["room"] for row in rows)


def test_what_was_traded_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    found = forecast(capsys, "--mem-budget", "3GB", "--card", "3060", "--pattern", "spatial")
    (sentence,) = found["traded"]["spatial"]
    assert (
        sentence.startswith("100 snippets x 224 px needs 4 at once, recompute") and "1.4 times the time of" in sentence
    )
    low = forecast(capsys, "--mem-budget", "3GB", "--card", "3060", "--pattern", "spatial", "--recompute", "never")
    assert "100 snippets x 224 px needs" in low["traded"]["spatial"][0]


def test_a_least_cut_says_what_it_costs(capsys: pytest.CaptureFixture[str]) -> None:
    def notes(*flags: str) -> list[str]:
        return [note for note in forecast(capsys, "--mem-budget", "8GB", *flags)["notes"] if "min-cut 4 keeps" in note]

    for flags, full in (
        (("--preset", "small", "--min-cut", "4"), "64 snippets x 96 px"), (("--preset", "demo"), "32 snippets x 64 px"),
    ):  # fmt: skip
        (note,) = notes(*flags)
        assert full in note and "--min-cut 1" in note
    assert not notes() and not notes("--preset", "small")


@pytest.mark.parametrize(
    ("flags", "windows"),
    [
        (("--preset", "activitynet"), 10_024),
        (("--preset", "hacs"), 37_613),
        (("--preset", "demo"), 80),
        (("--preset", "hacs", "--samples", "500"), 500),
    ],
)
def test_steps_of_an_epoch(capsys: pytest.CaptureFixture[str], flags: tuple[str, ...], windows: int) -> None:
    assert main(["--mem-budget", "8GB", *flags, "--batch", "16", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["samples"], found["steps"]) == (windows, -(-windows // 16))


def test_windows_are_counted_in_labels(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    labels = tmp_path / "labels.csv"
    rows = [
        ("a", 1, 2, "run", "training", 100),
        ("b", 1, 2, "run", "training", 30),
        ("c", 1, 2, "run", "validation", 99),
    ]
    labels.write_text("\n".join(["video,start,end,label,subset,duration", *(",".join(map(str, row)) for row in rows)]))
    assert main(["--mem-budget", "8GB", "--annotations", str(labels), "--preset", "small", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["samples"] == 6 + 1  # windows of 32 s every 16 s: 0 to 64 and 68; and one
    labels.write_text("video,start,end,label,subset\nc,1,2,run,validation\n")
    assert main(["--mem-budget", "8GB", "--annotations", str(labels)]) == 2
    assert "no video of it is for training" in capsys.readouterr().err


def test_the_picture_is_an_svg_of_every_encoder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "what.svg"
    flags = ["--mem-budget", "4GB,8GB", "--batch", "2", "--micro-batch", "1", "--picture"]
    assert main([*flags, str(file)]) == 0
    drawn = file.read_text()
    assert drawn.count("<svg") == 1 and all(name in drawn for name in get_args(EncoderName))
    assert "hours of an epoch at it" in drawn and "more than this card holds" in drawn
    capsys.readouterr()
    (tmp_path / "file").write_text("")
    assert main([*flags, str(tmp_path / "file" / "what.svg")]) == 2
    assert "cannot write" in capsys.readouterr().err


# More of either budget never buys less


def _forecasts(config: Config, card: Profile | None, named: bool, budget: int, seconds: float | None) -> Forecast:
    config = replace(config, budget=Budget.parse(str(budget)), epoch_time=seconds)
    return Forecast.of(config, card if named else profile_for(budget), 20, epoch_size(config, None), named)


@settings(max_examples=40)
@given(
    encoder=st.sampled_from(get_args(EncoderName)),
    preset=st.sampled_from(get_args(PresetName)),
    card=st.sampled_from((None, None, *PROFILES)),
    pattern=st.sampled_from(CYCLE),
    recompute=st.sampled_from(get_args(Recompute)),
    micro_batch=st.sampled_from((None, None, 1, 3, 16)),
    cut=st.sampled_from((None, 1.0, PAPER_CUT)),
    seed=st.integers(0, 2**32),
)
def test_more_memory_or_more_time_never_buys_less(
    encoder: EncoderName, preset: PresetName, card: Profile | None, pattern: Pattern, recompute: Recompute,
    micro_batch: int | None, cut: float | None, seed: int,
) -> None:  # fmt: skip
    made = PRESETS[preset]()
    made = replace(
        made, encoder=replace(made.encoder, name=encoder), pattern=pattern, recompute=recompute,
        micro_batch=micro_batch, min_cut=made.min_cut if cut is None else cut,
    )  # fmt: skip
    draw = random.Random(seed)
    for _ in range(60):  # of 40 settings: 2,400 pairs of budgets and times
        memory = sorted(round(0.6e9 * 250 ** draw.random()) for _ in range(2))
        if draw.random() < 0.3:  # around the bounds of the classes of cards
            memory[1] = min(memory[0] + round(10 ** draw.uniform(6, 9)), 140 * 10**9)
        time = sorted(10 ** draw.uniform(0.5, 6) for _ in range(2))
        limits: list[float | None] = [*time, None]
        low, high = sorted(draw.sample(range(3), 2))
        less = _forecasts(made, card, card is not None, min(memory), limits[low]).chosen(pattern)
        more = _forecasts(made, card, card is not None, max(memory), limits[high]).chosen(pattern)
        assert less is None or (more is not None and more.omega >= less.omega), (memory, limits, low, high)


def test_a_head_that_is_planned_by_running_steps_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--head", "spotting", "--mem-budget", "11GB"]) == 2
    assert "--head spotting: their memory is not known before they have run" in capsys.readouterr().err


def test_a_larger_class_of_cards_never_leaves_less_room() -> None:
    for small, large in pairwise(PROFILES):
        if small.card_class == large.card_class:
            continue
        budgets = (small.card_class * 2**30, small.card_class * 2**30 + 1)
        config = PRESETS["activitynet"]()
        one, other = (_forecasts(config, None, False, budget, None) for budget in budgets)
        assert one.room - one.assumed <= other.room - other.assumed, (small.name, large.name)


def test_ways_are_fastest_first_and_ever_leaner() -> None:
    found = lofi_fast.plan(mem_budget="11GB", card="2080ti")
    for one in found.rungs(Pattern.SPATIAL)[::5]:
        listed = ways(found.levers, one)
        assert [way.cost for way in listed] == sorted(way.cost for way in listed)
        assert [way.needs for way in listed] == sorted((way.needs for way in listed), reverse=True)
        everything = candidates((one,), 16, None, "auto", "cuda")
        assert listed[-1].needs == min(found.levers.needs(plan) for plan in everything)


def test_the_function_takes_one_budget() -> None:
    assert lofi_fast.plan(mem_budget="11GB", samples=160).steps == 10
    with pytest.raises(InputError, match="not an amount of memory"):
        lofi_fast.plan(mem_budget="4GB,8GB")
    with pytest.raises(InputError, match="--samples 0"):
        lofi_fast.plan(mem_budget="4GB", samples=0)

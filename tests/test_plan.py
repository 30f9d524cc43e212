"""python -m lofi_fast.plan: what would fit a card that is not here."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest

from lofi_fast.memory.cards import PROFILES
from lofi_fast.plan import main


def forecast(capsys: pytest.CaptureFixture[str], *flags: str) -> dict[str, Any]:
    assert main([*flags, "--json"]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def test_the_module_is_a_command() -> None:
    command = [sys.executable, "-m", "lofi_fast.plan", "--mem-budget", "11GB"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert "100 snippets x 224 px" in done.stdout and done.stdout.count("<- 2 at once") == 3
    assert "assumed" in done.stdout and "GeForce RTX 2080 Ti" in done.stdout


def test_what_is_chosen_is_the_highest_rung_that_fits(capsys: pytest.CaptureFixture[str]) -> None:
    found = forecast(capsys, "--mem-budget", "3GB", "--recompute", "never")
    for pattern, rows in found["ladders"].items():
        length, side, _, recompute, _ = found["chosen"][pattern]
        at = next(i for i, row in enumerate(rows) if (row["num_snippets"], row["side"]) == (length, side))
        assert at > 0 and not recompute
        for row in rows[:at]:  # none above fits, one video at once and in the fastest chunks at least
            least = min(p["peak"] for p in row["peaks"] if not p["recompute"])
            assert least > found["room"]
        assert [row["cut"] for row in rows] == sorted(row["cut"] for row in rows)


def test_more_memory_never_plans_lower(capsys: pytest.CaptureFixture[str]) -> None:
    cuts = []
    for profile in PROFILES:
        flags = ("--pattern", "spatial", "--micro-batch", "16", "--recompute", "never")
        found = forecast(capsys, "--mem-budget", "100%", "--card", profile.name, *flags)
        side = found["chosen"]["spatial"][1]
        cuts.append((found["budget"] - found["assumed"]["beside_tensors"], side))
    assert [side for _, side in sorted(cuts)] == sorted(side for _, side in cuts)
    assert cuts[0][1] < cuts[-1][1]


def test_full_fidelity_of_the_papers_batch_fits_an_11_gb_card_with_recompute(
    capsys: pytest.CaptureFixture[str],
) -> None:
    found = forecast(capsys, "--mem-budget", "11GB", "--recompute", "always")
    assert all(plan[:4] == [100, 224, 16, 1] for plan in found["chosen"].values())


def test_a_cpu_and_other_presets(capsys: pytest.CaptureFixture[str]) -> None:
    found = forecast(capsys, "--mem-budget", "11GB", "--device", "cpu", "--preset", "demo")
    assert found["device"] == "a CPU, float32"
    assert found["chosen"]["spatial"] == [32, 32, 4, 0, 98]
    assert forecast(capsys, "--mem-budget", "11GB", "--preset", "thumos")["chosen"].keys() == found["chosen"].keys()


def test_nothing_fits_says_what_would_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--mem-budget", "2GB", "--recompute", "never", "--max-cut", "2", "--micro-batch", "8"]) == 1
    out = capsys.readouterr().out
    assert "nothing fits: of a budget of 2.00 GB" in out and "--micro-batch none --recompute auto" in out


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--mem-budget", "auto"], "give an amount like 11GB"),
        (["--mem-budget", "11 apples"], "is not an amount of memory"),
        (["--mem-budget", "11GB", "--card", "voodoo"], "no known card"),
        (["--mem-budget", "80%", "--device", "cpu"], "give an amount like 8GB"),
        (["--mem-budget", "900GB"], "no known card holds 900.0 GB"),
    ],
)
def test_bad_input_is_one_sentence(capsys: pytest.CaptureFixture[str], flags: list[str], said: str) -> None:
    assert main(flags) == 2
    error = capsys.readouterr().err
    assert said in error and error.startswith("error: ") and error.count("\n") == 1


def test_maps_in_8_bits_leave_room_for_more(capsys: pytest.CaptureFixture[str]) -> None:
    exact, eight = (forecast(capsys, "--mem-budget", "11GB", "--kept-maps", kept) for kept in ("exact", "8bit"))
    assert (exact["kept_maps"], eight["kept_maps"]) == ("exact", "8bit")
    for pattern, rows in exact["ladders"].items():
        for row, smaller in zip(rows, eight["ladders"][pattern], strict=True):
            for peak, less in zip(row["peaks"], smaller["peaks"], strict=True):
                # Recompute keeps frames alone, and its peak may be anywhere.
                assert less["peak"] < peak["peak"] or (peak["recompute"] and less["peak"] == peak["peak"])
    assert main(["--mem-budget", "11GB", "--kept-maps", "8bit"]) == 0
    assert "16 videos a step, activations kept in 8 bits; " in capsys.readouterr().out


def test_a_cycle_without_a_change_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--mem-budget", "80GB", "--card", "A100 80GB", "--batch", "1"]) == 0
    assert "note: spatial and temporal and spatio_temporal have the same rung" in capsys.readouterr().out
    for flags in (["--min-cut", "4"], ["--pattern", "spatial"]):
        assert main(["--mem-budget", "80GB", "--card", "A100 80GB", "--batch", "1", *flags]) == 0
        assert "have the same rung" not in capsys.readouterr().out

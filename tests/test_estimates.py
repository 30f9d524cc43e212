"""Seconds of a step before any has run: against what was measured on a GPU, and in the planner's own order."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from lofi_fast.config import Config
from lofi_fast.encoder.resnet_ledger import ResNetLedger
from lofi_fast.fidelity import Fidelity
from lofi_fast.memory.cards import PROFILES, profile_named
from lofi_fast.memory.estimates import HOST, full_step_seconds, launch_bound, slowest
from lofi_fast.memory.plans import Plan, relative_cost
from lofi_fast.memory.step_bytes import Setting
from lofi_fast.presets import activitynet

ROWS = Path(__file__).parent.parent / "bench" / "results" / "step.jsonl"
FULL = Fidelity(100, 224)


def setting(config: Config) -> Setting:
    found = Setting.of(config, 200, 2)
    assert found is not None
    return found


def measured(step: str, form: str) -> float:
    """Seconds of the newest such row of an H200."""
    rows: list[dict[str, Any]] = [json.loads(line) for line in ROWS.read_text().splitlines()]
    found = [row for row in rows if "H200" in row["device"] and (row["step"], row["form"]) == (step, form)]
    return float(max(found, key=lambda row: str(row["date"]))["ms"][0]) / 1e3


def test_an_h200_takes_what_was_measured() -> None:
    whole = full_step_seconds(setting(activitynet()), FULL, 1, profile_named("H200"))
    encoder = measured("encoder, 800 frames of 224 px", "lean, one graph")
    assert whole - HOST == pytest.approx(encoder, rel=0.15)
    bound = launch_bound(setting(activitynet()), FULL, 1, profile_named("H200"))
    step = "whole step, 100 snippets of 224 px"
    for form, recompute, chunk, within in (
        ("lean, one graph", False, 100, 0.15),
        ("lean, chunk x32", False, 64, 0.15),
        ("lean, recompute, chunk x32", True, 64, 0.15),
        ("lean, chunk x8", False, 16, 0.4),  # neither the host nor the device by itself
        ("lean", False, 2, 0.15),
    ):
        cost = relative_cost(Plan(FULL, 1, recompute, chunk), FULL, "cuda", bound)
        assert whole * cost == pytest.approx(measured(step, form), rel=within), form


def test_multiply_adds_are_those_of_the_published_networks() -> None:
    assert ResNetLedger("tsm_r18").multiply_adds(224) == pytest.approx(1.81e9, rel=0.01)
    assert ResNetLedger("tsm_r34").multiply_adds(224) == pytest.approx(3.66e9, rel=0.01)
    assert ResNetLedger("tsm_r50").multiply_adds(224) == pytest.approx(4.09e9, rel=0.01)


def test_what_moves_goes_with_pixels_and_is_more_than_what_is_kept() -> None:
    ledger = ResNetLedger("tsm_r18")
    assert ledger.moved(224) == pytest.approx(4 * ledger.moved(112), rel=0.02)  # 7 px are halved to 4
    assert ledger.moved(224) > 5 * 8.5 * 64 * 56 * 56


@pytest.mark.parametrize("encoder", ["tsm_r18", "tsm_r50"])
def test_a_larger_class_is_never_slower_than_a_smaller(encoder: Any) -> None:
    config = activitynet()
    of = setting(replace(config, encoder=replace(config.encoder, name=encoder)))
    classes = sorted({card.card_class for card in PROFILES})
    cards = [slowest(of, FULL, 16, size) for size in classes]
    seconds = [full_step_seconds(of, FULL, 16, card) for card in cards]
    assert seconds == sorted(seconds, reverse=True)
    small = [Plan(FULL, 16, False, chunk) for chunk in (1, 4, 31, 62)]  # nor where launches are what counts
    for plan in small:
        taken = [
            whole * relative_cost(plan, FULL, "cuda", launch_bound(of, FULL, 16, card))
            for whole, card in zip(seconds, cards, strict=True)
        ]
        assert all(after <= before * (1 + 1e-12) for before, after in pairwise(taken))

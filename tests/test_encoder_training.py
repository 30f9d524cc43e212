"""Every encoder that is not a TSM-ResNet, trained by the command and used for detection, at tiny sizes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from detectors import ROOT, SETTINGS, SmallRun
from patience import PATIENCE

ENCODERS = {
    "r2plus1d_18": ("--encoder", "r2plus1d_18", "--width", "4"),
    "vit_b16": ("--encoder", "vit_b16", "--width", "4", "--encoder.train", "adapters"),
}


def events(folder: Path, kind: str) -> list[dict[str, Any]]:
    lines = map(json.loads, (folder / "log.jsonl").read_text().splitlines())
    return [event for event in lines if event["event"] == kind]


def run(*command: object) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "lofi_fast", *map(str, command)],
        cwd=ROOT,
        text=True,
        capture_output=True,
        timeout=PATIENCE,
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("encoder", ENCODERS)
def test_an_encoder_trains_as_predicted_and_detects(encoder: str, small: SmallRun, tmp_path: Path) -> None:
    out, annotations = tmp_path / "run", small.videos.parent / "annotations.json"
    data = ("--annotations", annotations, "--videos", small.videos, "--cache", small.cache)
    run("train", *data, *SETTINGS, *ENCODERS[encoder], "--out", out)
    steps = [step for step in events(out, "step") if step["stage"] == "joint"]
    assert steps and not events(out, "out_of_memory")
    for step in steps:
        assert step["peak"] <= 4e9 and abs(step["peak"] - step["predicted"]) <= 0.05 * step["peak"]
    assert not [event for event in events(out, "measured") if event["plan"] == "joint, ledger"], "it has a ledger"
    assert json.loads((out / "metrics.json").read_text())["videos"] == 2
    run("detect", out, small.validation[0], "--out", tmp_path / "found", "--device", "cpu", "--mem-budget", "4GB")
    assert list((tmp_path / "found").glob("*.json"))

"""Our average-mAP of points by SoccerNet's definition and SoccerNet's own (SoccerNet/SoccerNet), on the same games."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest.mock import MagicMock, patch

import numpy as np

from bench.tools.rows import Row
from lofi_fast.point_metrics import parse_tolerance, point_precision

GAMES, POINTS, CLASSES = 3, 40, 4  # points of a half
SECONDS = 45 * 60


def compared(folder: Path) -> Iterator[Row]:
    """Tight and loose average-mAP and the mAP of each class, over generated games that have every class."""
    spotting = _spotting(folder)
    classes = {f"class {k}": k for k in range(CLASSES)}
    random = np.random.default_rng(0)
    games = {f"game {k}": {half: _half(random, list(classes)) for half in ("1", "2")} for k in range(GAMES)}
    with TemporaryDirectory() as name:
        where = Path(name)
        for game, halves in games.items():
            (where / game).mkdir()
            labels = [
                {"gameTime": f"{half} - 00:00", "label": label, "position": str(position)}
                for half, (points, _) in halves.items() for position, label in points
            ]  # fmt: skip
            predictions = [
                {"half": half, "label": label, "position": str(position), "confidence": str(score)}
                for half, (_, found) in halves.items() for position, label, score in found
            ]  # fmt: skip
            (where / game / "Labels-v2.json").write_text(json.dumps({"annotations": labels}))
            (where / game / "results_spotting.json").write_text(json.dumps({"predictions": predictions}))
        truth, found = {}, {}
        for game, halves in games.items():
            for half, (points, predicted) in halves.items():
                truth[f"{game}/{half}"] = [(at / 1000, at / 1000, label) for at, label in points]
                found[f"{game}/{half}"] = [(at / 1000, at / 1000, label, score) for at, label, score in predicted]
        for metric in ("tight", "loose"):
            with (
                patch.object(spotting, "getListGames", lambda **_: list(games)),
                patch.object(spotting, "tqdm", lambda items: items),
            ):
                theirs = spotting.evaluate(name, name, metric=metric, EVENT_DICTIONARY=classes)
            ours = point_precision(truth, found, parse_tolerance(metric))
            expected = np.array([theirs["a_mAP"], *theirs["a_mAP_per_class"]])
            mine = np.array([ours.average, *ours.tolerances.average(ours.average_precision)])
            error = np.abs(expected - mine).max() / expected.max()
            yield {
                "of": "SoccerNet", "what": f"average-mAP, {metric}, and of each class", "dtype": "float64",
                "error": float(error), "numbers": len(expected),
            }  # fmt: skip


def _half(
    random: np.random.Generator, classes: list[str]
) -> tuple[list[tuple[int, str]], list[tuple[int, str, float]]]:
    """(true points, predictions) of a half, in milliseconds; of no class two predictions in one half second."""
    times = random.choice(SECONDS, POINTS, replace=False) * 1000
    points = [(int(time), classes[k % len(classes)]) for k, time in enumerate(times)]
    near = [(max(int(time + 1000 * random.normal(0, 6)), 0), label) for time, label in points for _ in range(3)]
    far = [(int(random.integers(SECONDS * 1000)), str(random.choice(classes))) for _ in range(60)]
    by_place = {(time // 500, label): time for time, label in near + far}
    scores = random.random(len(by_place))
    return points, [
        (time, label, float(score)) for ((_, label), time), score in zip(by_place.items(), scores, strict=True)
    ]


def _spotting(folder: Path) -> Any:
    """Their module of this name, without what it does not use here."""
    unused: dict[str, Any] = {"SoccerNet.utils": MagicMock(), "SoccerNet.Evaluation.utils": MagicMock()}
    sys.path.insert(0, str(folder))
    try:
        with patch.dict(sys.modules, unused | ({} if "tqdm" in sys.modules else {"tqdm": MagicMock()})):
            return importlib.import_module("SoccerNet.Evaluation.ActionSpotting")
    finally:
        sys.path.remove(str(folder))

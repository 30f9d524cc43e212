"""Our scores of labels of frames and those that MS-TCN (yabufarha/ms-tcn, eval.py) reports, on labels drawn at random.

Its file is written for Python 2: of it the functions are read, up to the one that prints, with today's name of a type.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from bench.tools.rows import Row
from lofi_fast.errors import InputError
from lofi_fast.framewise import OVERLAPS, frames_at, segmental_scores

VIDEOS, RATE = 60, 15.0
LABELS = ("background", "SIL", "take", "pour", "stir")


def compared(folder: Path) -> Iterator[Row]:
    """A row for accuracy, edit score and each F1. Raises InputError for a folder without the file."""
    theirs = _published(folder / "eval.py")
    random = np.random.default_rng(0)
    truth = {f"v{i}": _labels(random, int(random.integers(200, 900))) for i in range(VIDEOS)}
    found = {name: _disturbed(random, labels) for name, labels in truth.items()}

    frames = frames_at(RATE, {name: len(labels) / RATE for name, labels in truth.items()})
    ours = segmental_scores(
        {name: [row[:3] for row in _segments(labels)] for name, labels in truth.items()},
        {name: _segments(labels) for name, labels in found.items()},
        frames,
    ).named
    pairs = [(found[name], truth[name]) for name in truth]
    right = sum(mine == true for pair in pairs for mine, true in zip(*pair, strict=True))
    published = {
        "accuracy": 100 * right / sum(len(labels) for labels in truth.values()),
        "edit": float(np.mean([theirs["edit_score"](*pair) for pair in pairs])),
    }
    for overlap in OVERLAPS:
        right, wrong, missed = np.sum([theirs["f_score"](*pair, overlap) for pair in pairs], axis=0)
        precision, recall = right / (right + wrong), right / (right + missed)
        published[f"F1@{100 * overlap:g}"] = float(200 * precision * recall / (precision + recall))
    for name, value in published.items():
        error = abs(ours[name] - value) / value
        yield {"of": "MS-TCN", "what": name, "dtype": "float64", "error": error, "numbers": VIDEOS}


def _published(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise InputError(f"--mstcn {path.parent}: it holds no eval.py; name a clone of yabufarha/ms-tcn")
    functions = path.read_text().partition("\ndef main")[0]
    names: dict[str, Any] = {}
    exec(re.sub(r"\bnp\.float\b", "np.float64", functions), names)
    return names


def _labels(random: np.random.Generator, count: int) -> list[str]:
    labels: list[str] = []
    while len(labels) < count:
        labels += [LABELS[random.integers(len(LABELS))]] * int(random.integers(1, 60))
    return labels[:count]


def _disturbed(random: np.random.Generator, labels: list[str]) -> list[str]:
    found = list(labels)
    for _ in range(12):
        at, count = random.integers(len(found)), random.integers(1, 80)
        part = found[at : at + count]
        found[at : at + count] = [LABELS[random.integers(len(LABELS))]] * len(part)
    return found


def _segments(labels: list[str]) -> list[tuple[float, float, str, float]]:
    """In seconds, with a score; background is none."""
    changes = [0, *(i for i in range(1, len(labels)) if labels[i] != labels[i - 1]), len(labels)]
    return [
        (first / RATE, after / RATE, labels[first], 1.0)
        for first, after in pairwise(changes)
        if labels[first] != "background"
    ]

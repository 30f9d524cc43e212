"""What was found: labelled segments with scores, and the files that they are written to."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from lofi_fast.errors import InputError


@dataclass(frozen=True)
class Detection:
    """A labelled segment in seconds and its score in [0, 1]."""

    start: float
    end: float
    label: str
    score: float


def write_predictions(path: Path, predictions: Mapping[str, Sequence[Detection]]) -> None:
    """Write detections as ActivityNet JSON, atomically: another reader sees the old file or the whole new one.

    Raises InputError when the file cannot be written, ValueError for a score or time that is not finite.
    """
    results = {
        name: [
            {"segment": [float(d.start), float(d.end)], "score": float(d.score), "label": str(d.label)} for d in items
        ]
        for name, items in predictions.items()
    }
    text = json.dumps({"version": "VERSION 1.3", "results": results, "external_data": {}}, allow_nan=False)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        with temporary.open("w", encoding="utf-8") as file:
            file.write(text + "\n")
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise InputError(
            f"{path} cannot be written ({error.strerror}); give an output folder with room and write permission."
        ) from None

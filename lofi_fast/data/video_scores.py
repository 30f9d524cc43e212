"""Class scores of whole videos, from an external classifier: the paper's fusion."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from lofi_fast.data.annotations import plain_spelling
from lofi_fast.errors import InputError
from lofi_fast.head.map_decoding import Floats
from lofi_fast.texts import decoded, once_each

# Columns (from 0) of the THUMOS14 detection classes among the 101 of UCF101 in alphabetical order, which is the order
# of the public UntrimmedNet score file. Row i of that file is video_test_%07d with number i + 1.
_UCF101_COLUMNS = {
    "BaseballPitch": 6,
    "BasketballDunk": 8,
    "Billiards": 11,
    "CleanAndJerk": 20,
    "CliffDiving": 21,
    "CricketBowling": 22,
    "CricketShot": 23,
    "Diving": 25,
    "FrisbeeCatch": 30,
    "GolfSwing": 32,
    "HammerThrow": 35,
    "HighJump": 39,
    "JavelinThrow": 44,
    "LongJump": 50,
    "PoleVault": 67,
    "Shotput": 78,
    "SoccerPenalty": 84,
    "TennisSwing": 91,
    "ThrowDiscus": 92,
    "VolleyballSpiking": 96,
}
_THUMOS_TEST = "video_test_"


def load_video_scores(path: Path, names: Sequence[str], classes: Sequence[str]) -> dict[str, Floats]:
    """Video-level class scores of a classifier: video -> (K,) in the order of `classes`.

    Forms: JSON {video: {class: score}}; JSON {"results": {video: [{"label": class, "score": score}]}}; JSON
    {"results": {video: [score, ...]}, "class": [class, ...]}; and the UntrimmedNet scores of the THUMOS14 test videos,
    .npy (videos, 101), whose rows are scaled to sum to 1. JSON scores are taken as they are, a class that a video does
    not list has score 0; white space around a class is no part of it. Raises InputError for unreadable or other files,
    for a video that the file lacks, for a file that has none of the classes, or one in another spelling only, and for a
    key that stands twice in one object.
    """
    if path.suffix == ".npy":
        return _thumos_scores(path, names, classes)
    try:
        content = json.loads(decoded(path), object_pairs_hook=once_each(path, "; mend --video-scores."))
    except InputError:
        raise
    except FileNotFoundError:
        raise InputError(f"{path} does not exist; give --video-scores an existing file.") from None
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror}); give --video-scores a readable file.") from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is not valid JSON ({error}); give --video-scores a JSON or .npy file.") from None
    rows = content.get("results", content) if isinstance(content, dict) else None
    if not isinstance(rows, dict):
        raise InputError(
            f"{path} has no scores by video; give --video-scores a file of the form {{video: {{class: x}}}}."
        )
    columns = content.get("class")
    missing = [name for name in names if name not in rows]
    if missing:
        raise InputError(f"{path} has no scores for {len(missing)} of {len(names)} videos, for example {missing[0]!r}.")
    index = {label: k for k, label in enumerate(classes)}
    scores = {}
    known: set[str] = set()
    unknown: dict[str, str] = {}  # by its plain spelling -> as it is written
    for name in names:
        row = np.zeros(len(classes))
        for label, value in _labelled(rows[name], columns, f"{path}, video {name}"):
            if not isinstance(value, int | float) or isinstance(value, bool) or not 0 <= value <= sys.float_info.max:
                raise InputError(
                    f"{path}, video {name}: the score of {label!r} is {value!r}, not a finite number >= 0."
                )
            if not isinstance(label, str):
                continue
            if (known_as := label.strip()) in index:
                known.add(known_as)
                row[index[known_as]] = value
            else:
                unknown[plain_spelling(label)] = label
        scores[name] = row
    if names and not known:
        raise InputError(
            f"{path} names none of the {len(classes)} classes, such as {classes[0]!r}; check --video-scores."
        )
    for label in classes:
        if names and label not in known and (other := unknown.get(plain_spelling(label))) is not None:
            raise InputError(
                f"{path} has no scores of the class {label!r}, but of {other!r}; write it as the labels have it, or "
                "give other --video-scores."
            )
    return scores


def _labelled(row: object, columns: object, where: str) -> list[tuple[object, object]]:
    """(class, score) pairs of one video in any of the three JSON forms."""
    if isinstance(row, dict):
        return list(row.items())
    if isinstance(row, list) and all(isinstance(item, dict) and "label" in item and "score" in item for item in row):
        return [(item["label"], item["score"]) for item in row]
    if isinstance(row, list) and isinstance(columns, list) and len(row) == len(columns):
        return list(zip(columns, row, strict=True))
    raise InputError(
        f'{where}: scores must be {{class: score}}, a list of {{"label", "score"}}, or as many numbers as "class" has.'
    )


def _thumos_scores(path: Path, names: Sequence[str], classes: Sequence[str]) -> dict[str, Floats]:
    try:
        # Mapped, and not read: a damaged header may ask for any amount of memory.
        table = np.load(path, mmap_mode="r", allow_pickle=False)
    except FileNotFoundError:
        raise InputError(f"{path} does not exist; give --video-scores an existing file.") from None
    except Exception as error:  # NumPy evaluates the header, and a damaged one can fail in any way
        reason = " ".join(str(error).split()) or type(error).__name__
        raise InputError(f"{path} is not a NumPy array file ({reason}); check --video-scores.") from None
    if not isinstance(table, np.ndarray) or table.ndim != 2 or table.shape[1] != 101 or table.dtype.kind != "f":
        raise InputError(
            f"{path} is not the THUMOS14 score table (videos x 101 classes of UCF101); --video-scores takes other "
            "classifiers' scores as JSON {video: {class: score}}."
        )
    foreign = [label for label in classes if label not in _UCF101_COLUMNS]
    if foreign:
        raise InputError(f"{path} scores the 20 THUMOS14 classes, and {foreign[0]!r} is none of them; use JSON scores.")
    columns = [_UCF101_COLUMNS[label] for label in classes]
    scores = {}
    for name in names:
        digits = name.removeprefix(_THUMOS_TEST)
        row = int(digits) - 1 if name.startswith(_THUMOS_TEST) and digits.isdecimal() else -1
        if not 0 <= row < len(table):
            raise InputError(
                f"{path} has rows for {_THUMOS_TEST}0000001 to {_THUMOS_TEST}{len(table):07d}, and not for {name!r}."
            )
        values = table[row].astype(np.float64)
        total = values.sum()
        if not (np.isfinite(total) and (values >= 0).all() and total > 0):
            raise InputError(f"{path}, row {row}: the scores of {name!r} are not numbers >= 0 with a positive sum.")
        scores[name] = values[columns] / total
    return scores

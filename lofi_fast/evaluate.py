"""The command `evaluate`, and `lofi_fast.evaluate`: mAP of any predictions against any ground truth."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from lofi_fast.command import CallableModule, parse, run
from lofi_fast.data.formats.file import NO_OPTIONS, FormatOptions, LabelFlags
from lofi_fast.data.ground_truth import load_subset
from lofi_fast.errors import InputError
from lofi_fast.files import write_json
from lofi_fast.metrics import (
    MapResult,
    load_predictions,
    mean_average_precision,
    metrics_table,
    parse_tiou,
)
from lofi_fast.settings import Section, Setting

DESCRIPTION = "mAP of detections, equal to the last bit to the official ActivityNet evaluator."


@dataclass(frozen=True)
class EvaluateFlags:
    ground_truth: Annotated[Path, Setting("annotations, of any format that train takes", "FILE")]
    predictions: Annotated[Path, Setting("detections in ActivityNet's form", "JSON")]
    labels: Annotated[LabelFlags, Section("labels", flat=True)]
    tiou: Annotated[str, Setting("activitynet, thumos, start:step:stop or a list", "SPEC")] = "activitynet"
    subset: Annotated[
        str | None, Setting("subset of the annotations", unset="validation, else the only one, else testing")
    ] = None
    json: Annotated[Path | None, Setting("also write the numbers there", "FILE", unset="no file")] = None
    per_class: Annotated[bool, Setting("also print the average precision of each class")] = False


def evaluate(
    ground_truth: str | Path,
    predictions: str | Path,
    tiou: str = "activitynet",
    subset: str | None = None,
    options: FormatOptions = NO_OPTIONS,
) -> MapResult:
    """mAP of the detections in an ActivityNet-form JSON file against annotations as training takes them, bit-equal to
    the official evaluator. `tiou`: "activitynet", "thumos", "start:step:stop" or a list like "0.5,0.75". `options`:
    what some formats of annotations leave open.

    Raises InputError for files that cannot be read and values that cannot be.
    """
    return _evaluated(Path(ground_truth), Path(predictions), tiou, subset, options)[1]


def _evaluated(
    ground_truth: Path, predictions: Path, tiou: str, subset: str | None, options: FormatOptions
) -> tuple[str, MapResult]:
    tious = parse_tiou(tiou)
    name, truth = load_subset(ground_truth, subset, options)
    return name, mean_average_precision(truth, load_predictions(predictions), tious)


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit status. Of several processes of torchrun the first does it all, and the others end
    with 0: nine tenths of the time is reading the file of detections, which no process could be spared.
    """
    if os.environ.get("WORLD_SIZE", "1") != "1" and os.environ.get("RANK", "0") != "0":
        return 0
    return run(lambda: _command(argv))


def _command(argv: Sequence[str] | None) -> None:
    flags = parse(EvaluateFlags, argv, prog="lofi-fast evaluate", description=DESCRIPTION)
    subset, result = _evaluated(flags.ground_truth, flags.predictions, flags.tiou, flags.subset, flags.labels.options)
    if flags.json is not None:
        _write(flags.json, subset, result)
    print(
        f"{subset}: {result.num_videos} videos, {result.num_segments} segments, {len(result.classes)} classes; "
        f"{result.num_predictions} predictions"
    )
    if result.num_unknown_label:
        print(f"note: {result.num_unknown_label} predictions ignored: the ground truth has no such label")
    if result.num_unknown_video:
        print(f"note: {result.num_unknown_video} predictions count as false positives: their video is not in {subset}")
    print(metrics_table(result, per_class=flags.per_class))


def _write(path: Path, subset: str, result: MapResult) -> None:
    content: dict[str, Any] = {
        "subset": subset,
        "tiou": result.tious.tolist(),
        "map": result.map_by_tiou.tolist(),
        "average_map": result.average,
        "average_precision": {
            name: values.tolist() for name, values in zip(result.classes, result.average_precision, strict=True)
        },
        "num_videos": result.num_videos,
        "num_segments": result.num_segments,
        "num_predictions": result.num_predictions,
        "num_unknown_label": result.num_unknown_label,
        "num_unknown_video": result.num_unknown_video,
    }
    if not path.parent.is_dir():
        raise InputError(f"{path} cannot be written (no such folder); change --json")
    try:
        write_json(path, content)
    except InputError as error:
        reason = error.__cause__.strerror if isinstance(error.__cause__, OSError) else error
        raise InputError(f"{path} cannot be written ({reason}); change --json") from error


sys.modules[__name__].__class__ = CallableModule

if __name__ == "__main__":
    sys.exit(main())

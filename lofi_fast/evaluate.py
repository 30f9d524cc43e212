"""The command `evaluate`, and `lofi_fast.evaluate`: mAP of any predictions against any ground truth."""

from __future__ import annotations

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
from lofi_fast.point_metrics import PointResult, parse_tolerance, point_precision, points_table
from lofi_fast.settings import Section, Setting

DESCRIPTION = (
    "mAP of detections, equal to the last bit to the official ActivityNet evaluator; or of points in time, as E2E-Spot "
    "and SoccerNet define it."
)


@dataclass(frozen=True)
class EvaluateFlags:
    ground_truth: Annotated[Path, Setting("annotations, of any format that train takes", "FILE")]
    predictions: Annotated[Path, Setting("detections in ActivityNet's form", "JSON")]
    labels: Annotated[LabelFlags, Section("labels", flat=True)]
    tiou: Annotated[str, Setting("activitynet, thumos, start:step:stop or a list", "SPEC")] = "activitynet"
    tolerance: Annotated[
        str | None,
        Setting(
            "score points in time: seconds like 0.5,1,2 or 1:1:5, frames like 1f,2f with --fps, or SoccerNet's tight "
            "or loose; segments count by their start",
            "SPEC", unset="score segments",
        ),
    ] = None  # fmt: skip
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
    tious = parse_tiou(tiou)
    _, truth = load_subset(Path(ground_truth), subset, options)
    return mean_average_precision(truth, load_predictions(Path(predictions)), tious)


def evaluate_points(
    ground_truth: str | Path,
    predictions: str | Path,
    tolerance: str,
    subset: str | None = None,
    options: FormatOptions = NO_OPTIONS,
) -> PointResult:
    """The same of points in time; `tolerance` as `parse_tolerance` takes it, frames by the rate of `options`."""
    tolerances = parse_tolerance(tolerance, options.fps)
    _, truth = load_subset(Path(ground_truth), subset, options)
    return point_precision(truth, load_predictions(Path(predictions)), tolerances)


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit status."""
    return run(lambda: _command(argv))


def _command(argv: Sequence[str] | None) -> None:
    flags = parse(EvaluateFlags, argv, prog="lofi-fast evaluate", description=DESCRIPTION)
    options = flags.labels.options
    tious = parse_tiou(flags.tiou)
    tolerances = None if flags.tolerance is None else parse_tolerance(flags.tolerance, options.fps)
    subset, truth = load_subset(flags.ground_truth, flags.subset, options)
    predictions = load_predictions(flags.predictions)
    result: MapResult | PointResult
    if tolerances is None:
        result = mean_average_precision(truth, predictions, tious)
    else:
        result = point_precision(truth, predictions, tolerances)
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
    if isinstance(result, PointResult):
        print(points_table(result, flags.per_class))
    else:
        print(metrics_table(result, flags.per_class))


def _write(path: Path, subset: str, result: MapResult | PointResult) -> None:
    if isinstance(result, PointResult):
        by = {"tolerance": result.tolerances.seconds.tolist(), "map": result.map_by_tolerance.tolist()}
    else:
        by = {"tiou": result.tious.tolist(), "map": result.map_by_tiou.tolist()}
    content: dict[str, Any] = {
        "subset": subset,
        **by,
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

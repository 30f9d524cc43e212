"""The command `evaluate`, and `lofi_fast.evaluate`: scores of any predictions against any ground truth."""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

from lofi_fast.command import CallableModule, parse, run
from lofi_fast.data.formats import frames as frame_labels
from lofi_fast.data.formats.file import NO_OPTIONS, FormatOptions, LabelFlags, plural
from lofi_fast.data.ground_truth import Subset, load_subset
from lofi_fast.data.matching import match_videos
from lofi_fast.data.video import stated_duration
from lofi_fast.diagnosis import KINDS, BucketNames, Diagnosis, diagnose, diagnosis_table
from lofi_fast.errors import InputError
from lofi_fast.files import write_json
from lofi_fast.framewise import (
    FrameMapResult,
    Frames,
    SegmentalResult,
    charades_frames,
    frame_map,
    frames_at,
    one_label_each,
    segmental_scores,
    segmental_table,
)
from lofi_fast.intervals import LEVEL, MapIntervals, map_intervals
from lofi_fast.metrics import (
    MapResult,
    Predictions,
    RecallResult,
    average_recall,
    load_predictions,
    matches,
    mean_average_precision,
    metrics_table,
    parse_tiou,
)
from lofi_fast.point_metrics import PointResult, parse_tolerance, point_precision, points_table
from lofi_fast.settings import Section, Setting

SOCCERNET_SCORES = "SoccerNet's definition reads its curve at scores from 0 to 1"
ABOVE = 1e-6  # the largest score, by rounding
DESCRIPTION = (
    "mAP of detections, equal to the last bit to the official ActivityNet evaluator, or of points in time, as E2E-Spot "
    "and SoccerNet define it; and what else tells how good they are. docs/evaluation.md explains the numbers."
)
DRAWS = 1000  # of the bootstrap, where --full does not say how many
CHARADES = "charades"
MOST_FRAMES = 50_000_000  # that are looked at; 8 bytes each in several arrays
PREDICTIONS = "predictions.json"  # of a run folder
SHOWN_PROPOSALS = (1, 5, 10, 50, 100)  # a video, on average, at which the recall is printed


@dataclass(frozen=True)
class EvaluateFlags:
    ground_truth: Annotated[Path, Setting("annotations, of any format that train takes", "FILE")]
    predictions: Annotated[Path, Setting("detections in ActivityNet's form, or a folder of labels of frames", "PATH")]
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
    pictures: Annotated[Path | None, Setting("as --full, and draw it there", "DIR", unset="no pictures")] = None
    per_class: Annotated[bool, Setting("also print the average precision of each class")] = False
    full: Annotated[bool, Setting(f"--recall, --diagnose and --bootstrap {DRAWS}")] = False
    recall: Annotated[bool, Setting("also average recall by the number of proposals (AR@AN)")] = False
    diagnose: Annotated[
        bool, Setting("also scores by length, coverage and number of the segments, and kinds of false positives")
    ] = False
    buckets: Annotated[
        BucketNames | None,
        Setting("whose groups of length, coverage and number", unset="activitynet; thumos with --tiou thumos"),
    ] = None
    bootstrap: Annotated[
        int, Setting("also 95% intervals, by so many draws of the videos", zero=True, most=1_000_000)
    ] = 0
    seed: Annotated[int, Setting("of these draws", zero=True)] = 0
    frames: Annotated[
        str | None, Setting(f"also scores of frames, at a rate a second, or {CHARADES}", "RATE", unset="none")
    ] = None
    min_score: Annotated[float, Setting("leave out detections that score less, in scores of frames", zero=True)] = 0.0
    background: Annotated[
        str | None,
        Setting("labels of frames that are no action", "A,B", unset=", ".join(sorted(frame_labels.BACKGROUND))),
    ] = None


@dataclass
class _Scores:
    """All that was computed, for the terminal, the JSON file and the pictures."""

    subset: str
    precision: MapResult | None = None
    points: PointResult | None = None
    recall: RecallResult | None = None
    diagnosis: Diagnosis | None = None
    intervals: MapIntervals | None = None
    segmental: SegmentalResult | None = None
    frame_map: FrameMapResult | None = None
    notes: list[str] = field(default_factory=list)


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
    truth = load_subset(Path(ground_truth), subset, options).truth
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
    truth = load_subset(Path(ground_truth), subset, options).truth
    found = load_predictions(Path(predictions))
    if tolerances.soccernet:
        _check_scores(predictions, found, 1.0, SOCCERNET_SCORES)
    return point_precision(truth, found, tolerances)


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit status. Of several processes of torchrun the first does it all, and the others end
    with 0: nine tenths of the time is reading the file of detections, which no process could be spared.
    """
    if os.environ.get("WORLD_SIZE", "1") != "1" and os.environ.get("RANK", "0") != "0":
        return 0
    return run(lambda: _command(argv))


def _command(argv: Sequence[str] | None) -> None:
    flags = parse(EvaluateFlags, argv, prog="lofi-fast evaluate", description=DESCRIPTION)
    _check_targets(flags)
    scores = _scored(flags)
    if flags.json is not None:
        _write(flags.json, scores)
    drawn: list[Path] = []
    if flags.pictures is not None:
        from lofi_fast.report.score_figures import write_pictures  # with what it draws, only where it does

        drawn = write_pictures(
            flags.pictures, scores.precision, scores.recall, scores.diagnosis, scores.intervals, scores.segmental
        )
    for line in _lines(scores, flags.per_class):
        print(line)
    if drawn:
        print(f"\npictures: {', '.join(map(str, drawn))}")


def _scored(flags: EvaluateFlags) -> _Scores:
    if flags.predictions.is_dir():
        return _framewise(flags)
    if flags.tolerance is None:
        return _detected(flags)
    if flags.full or flags.recall or flags.diagnose or flags.bootstrap or flags.frames or flags.pictures:
        raise InputError(
            "--tolerance scores points in time, of which there is no --full, --recall, --diagnose, --bootstrap, "
            "--frames or --pictures; give one or the other"
        )
    options = _options(flags)
    tolerances = parse_tolerance(flags.tolerance, options.fps)
    subset = load_subset(flags.ground_truth, flags.subset, options)
    predictions = load_predictions(flags.predictions)
    if tolerances.soccernet:
        _check_scores(flags.predictions, predictions, 1.0, SOCCERNET_SCORES)
    points = point_precision(subset.truth, predictions, tolerances)
    return _Scores(subset.name, points=points, notes=_notes(subset, predictions))


def _notes(subset: Subset, predictions: Predictions) -> list[str]:
    """How the ground truth was read, and what of it the predictions pass over."""
    missed = {name: len(segments) for name, segments in subset.truth.items() if segments and name not in predictions}
    if not missed:
        return [*subset.notes]
    count = plural(sum(missed.values()), "segment")
    return [
        *subset.notes,
        f"the predictions do not name {len(missed)} of the {plural(len(subset.truth), 'video')}, such as "
        f"{next(iter(missed))}, whose {count} count as missed; --subset names another subset",
    ]


def _check_scores(path: str | Path, predictions: Predictions, most: float, why: str) -> None:
    """Raises InputError for a score below 0 or above `most`, such as a logit, which would be ranked wrongly."""
    for name, items in predictions.items():
        if wrong := next((score for *_, score in items if not 0 <= score <= most + ABOVE), None):
            limits = "0 or more" if math.isinf(most) else f"from 0 to {most:g}"
            raise InputError(
                f"{path}, video {name}: the score {wrong:g} is not {limits}, and {why}; rescale the scores "
                "of --predictions"
            )


def _check_targets(flags: EvaluateFlags) -> None:
    """What cannot be written is refused before anything is computed."""
    if flags.json is not None and not flags.json.parent.is_dir():
        raise InputError(f"{flags.json} cannot be written (no such folder); change --json")
    if flags.pictures is not None and flags.pictures.exists() and not flags.pictures.is_dir():
        raise InputError(f"{flags.pictures} is a file; name a folder for --pictures")


def _options(flags: EvaluateFlags) -> FormatOptions:
    if flags.background is None:
        return flags.labels.options
    names = frozenset(name.strip().casefold() for name in flags.background.split(",") if name.strip())
    return replace(flags.labels.options, background=names)


def _detected(flags: EvaluateFlags) -> _Scores:
    """Scores of detections."""
    tious = parse_tiou(flags.tiou)
    subset = load_subset(flags.ground_truth, flags.subset, _options(flags))
    predictions = load_predictions(flags.predictions)
    if flags.frames is not None:
        _check_scores(
            flags.predictions, predictions, math.inf, "--frames gives a frame without a detection the score 0"
        )
    full = flags.full or flags.pictures is not None
    num_draws = flags.bootstrap or (DRAWS if full else 0)
    precision = mean_average_precision(subset.truth, predictions, tious)
    scores = _Scores(subset.name, precision, notes=_notes(subset, predictions))
    if all(start == end for segments in subset.truth.values() for start, end, _ in segments):
        scores.notes.append(
            "all segments of the ground truth are points in time, which tIoU cannot compare: any prediction of no "
            "length hits any of them; --tolerance scores points"
        )
    if flags.recall or full:
        if any(predictions.values()):
            scores.recall = average_recall(subset.truth, predictions, tious)
        else:
            scores.notes.append("no average recall: there is no prediction")
    durations = subset.durations
    if flags.diagnose or full or flags.frames is not None:
        durations = _durations(subset, flags.labels.videos)
    if flags.diagnose or full:
        buckets = flags.buckets or ("thumos" if flags.tiou == "thumos" else "activitynet")
        if any(start < end for segments in subset.truth.values() for start, end, _ in segments):
            scores.diagnosis = diagnose(subset.truth, predictions, tious, durations, buckets)
        else:
            scores.notes.append("no diagnosis: all segments of the ground truth are points")
        if scores.diagnosis and (unknown := sum(name not in durations for name in subset.truth)):
            scores.notes.append(
                f"nothing tells how long {plural(unknown, 'video')} of {len(subset.truth)} are, so that their segments "
                "have no coverage; --videos names the folder of the videos"
            )
    if num_draws:
        scores.intervals = map_intervals(matches(subset.truth, predictions, tious), num_draws, flags.seed)
    if flags.frames is not None:
        kept = {name: [p for p in items if p[3] >= flags.min_score] for name, items in predictions.items()}
        _score_frames(scores, flags, subset, kept, durations, num_draws)
    return scores


def _framewise(flags: EvaluateFlags) -> _Scores:
    """Scores of labels of frames, which have no scores of their own, and so no mAP."""
    options = _options(flags)
    if options.fps is None:
        if (flags.predictions / PREDICTIONS).exists():
            raise InputError(
                f"{flags.predictions} is a run folder; give --predictions {flags.predictions / PREDICTIONS}"
            )
        raise InputError(f"{flags.predictions} is a folder of labels of frames; --fps says how many there are a second")
    subset = load_subset(flags.ground_truth, flags.subset, options)
    no_action = frame_labels.BACKGROUND if options.background is None else options.background
    predictions: dict[str, list[tuple[float, float, str, float]]] = {}
    for path in sorted(flags.predictions.iterdir()):
        if path.is_file() and not path.name.startswith("."):
            name, runs = frame_labels.recognised(path)
            if name in predictions:
                raise InputError(f"{path} is of the video {name}, as another file of the folder is; remove one of them")
            predictions[name] = [
                (first / options.fps, after / options.fps, label, 1.0)
                for first, after, label in runs
                if label.casefold() not in no_action
            ]
    if not predictions.keys() & subset.truth.keys():
        given = next(iter(predictions), None)
        example = "the folder holds no file" if given is None else f"{given!r} against {next(iter(subset.truth))!r}"
        raise InputError(
            f"None of the predictions' videos is in the ground truth ({example}); check --predictions and --subset."
        )
    scores = _Scores(subset.name, notes=[*subset.notes])
    num_draws = flags.bootstrap or (DRAWS if flags.full or flags.pictures is not None else 0)
    _score_frames(scores, flags, subset, predictions, _durations(subset, flags.labels.videos), num_draws)
    return scores


def _durations(subset: Subset, videos: Path | None) -> dict[str, float]:
    """Seconds of each video whose length its labels tell, or else the header of its file."""
    unknown = [name for name in subset.truth if name not in subset.durations]
    if not unknown or videos is None:
        return subset.durations
    if not videos.is_dir():
        raise InputError(f"{videos} is no folder; name that of the videos with --videos")
    told = {name: stated_duration(path) for name, path in match_videos(videos, unknown).paths.items()}
    return subset.durations | {name: seconds for name, seconds in told.items() if seconds > 0}


def _score_frames(
    scores: _Scores,
    flags: EvaluateFlags,
    subset: Subset,
    predictions: Predictions,
    durations: Mapping[str, float],
    num_draws: int,
) -> None:
    frames = _frames(flags, subset, predictions, durations, scores.notes)
    if missing := sum(name not in predictions for name in subset.truth):
        scores.notes.append(f"{plural(missing, 'video')} without predictions: all their frames are background")
    if one_label_each(subset.truth, frames):
        scores.segmental = segmental_scores(subset.truth, predictions, frames, num_draws, flags.seed)
    else:
        scores.notes.append("no accuracy, edit score and segmental F1 of frames: some frames have several labels")
    if not flags.predictions.is_dir():
        scores.frame_map = frame_map(subset.truth, predictions, frames)


def _frames(
    flags: EvaluateFlags,
    subset: Subset,
    predictions: Predictions,
    durations: Mapping[str, float],
    notes: list[str],
) -> Frames:
    """The frames at which the videos are looked at."""
    if flags.frames == CHARADES:
        if (silent := next((name for name in subset.truth if name not in durations), None)) is not None:
            raise InputError(
                f"--frames {CHARADES} needs how long every video is, and nothing tells it of {silent}; "
                "name the folder of the videos with --videos, or give --frames a rate"
            )
        return charades_frames({name: durations[name] for name in subset.truth})
    try:
        rate = float(flags.labels.fps or 0.0) if flags.frames is None else float(flags.frames)
    except ValueError:
        rate = math.nan
    if not 0 < rate <= 1000:
        raise InputError(f"--frames {flags.frames}: must be a number of frames a second up to 1000, or {CHARADES}")
    if unknown := [name for name in subset.truth if name not in durations]:
        notes.append(
            f"nothing tells how long {plural(len(unknown), 'video')} are: their frames end with the last segment or "
            "prediction; --videos names the folder of the videos"
        )
    seconds = {
        name: durations[name]
        if name in durations
        else max((float(row[1]) for row in (*subset.truth[name], *predictions.get(name, ()))), default=0.0)
        for name in subset.truth
    }
    if rate * sum(seconds.values()) > MOST_FRAMES:
        longest = max(seconds, key=lambda name: seconds[name])
        raise InputError(
            f"{rate:g} frames a second are more than {MOST_FRAMES:,} in all; give --frames a lower rate "
            f"(the longest video, {longest}, is said to have {seconds[longest]:g} s)"
        )
    return frames_at(rate, seconds)


def _lines(scores: _Scores, per_class: bool) -> list[str]:
    """What is printed."""
    lines = []
    result = scores.precision
    if (counted := result or scores.points) is not None:
        lines.append(
            f"{scores.subset}: {counted.num_videos} videos, {counted.num_segments} segments, "
            f"{len(counted.classes)} classes; {counted.num_predictions} predictions"
        )
        if counted.num_unknown_label:
            lines.append(f"note: {counted.num_unknown_label} predictions ignored: the ground truth has no such label")
        if counted.num_unknown_video:
            lines.append(
                f"note: {counted.num_unknown_video} predictions count as false positives: "
                f"their video is not in {scores.subset}"
            )
    lines += [f"note: {note}" for note in scores.notes]
    if scores.points is not None:
        lines.append(points_table(scores.points, per_class))
    if result is not None:
        lines.append(metrics_table(result, per_class=per_class))
    if result is not None and scores.intervals is not None:
        lines += ["", _intervals_table(scores.intervals, result, per_class)]
    if scores.recall is not None:
        names = "".join(f"{f'AR@{count}':>8}" for count in SHOWN_PROPOSALS)
        values = "".join(f"{100 * scores.recall.average_recall[count - 1]:>8.2f}" for count in SHOWN_PROPOSALS)
        lines += ["", f"{'recall':<7}{names}{'AUC':>8}", f"{'%':<7}{values}{scores.recall.auc:>8.2f}"]
    if scores.diagnosis is not None:
        lines += ["", diagnosis_table(scores.diagnosis)]
    frames = scores.segmental or scores.frame_map
    if frames is not None:
        lines += ["", f"{scores.subset}, frame by frame: {frames.num_videos} videos, {frames.num_frames} frames"]
    if scores.segmental is not None:
        lines.append(segmental_table(scores.segmental))
    if scores.frame_map is not None:
        lines.append(f"mAP over frames (%) {100 * scores.frame_map.average:.2f}")
    if scores.frame_map is not None and per_class:
        width = max(map(len, scores.frame_map.classes))
        by_name = sorted(zip(scores.frame_map.classes, scores.frame_map.average_precision, strict=True))
        lines += [f"{name:<{width}}{100 * value:>8.2f}" for name, value in by_name]
    return lines


def _intervals_table(told: MapIntervals, result: MapResult, per_class: bool) -> str:
    """The intervals in percent: of mAP at each threshold below it, and of each class's mean when asked."""
    lines = [f"{100 * LEVEL:g}% intervals over videos, {told.count} draws, seed {told.seed}:"]
    lines.append(f"{'tIoU':<7}" + "".join(f"{f'{tiou:.4g}':>8}" for tiou in result.tious) + f"{'average':>10}")
    for name, side in (("low", 0), ("high", 1)):
        values = "".join(f"{100 * bounds[side]:>8.2f}" for bounds in told.map_by_tiou)
        lines.append(f"{name:<7}{values}{100 * told.average[side]:>10.2f}")
    if per_class:
        width = max(map(len, result.classes)) + 1
        for name, (low, high) in sorted(zip(result.classes, told.by_class.tolist(), strict=True)):
            lines.append(f"{name:<{width}}{100 * low:.2f} to {100 * high:.2f}")
    return "\n".join(lines)


def _write(path: Path, scores: _Scores) -> None:
    content = _content(scores)
    try:
        write_json(path, content)
    except InputError as error:
        reason = error.__cause__.strerror if isinstance(error.__cause__, OSError) else error
        raise InputError(f"{path} cannot be written ({reason}); change --json") from error


def _content(scores: _Scores) -> dict[str, Any]:
    """The numbers as JSON holds them: shares are from 0 to 1, scores of frame labels and areas in percent."""
    content: dict[str, Any] = {"subset": scores.subset, "notes": scores.notes}
    if (result := scores.precision) is not None:
        content |= {"tiou": result.tious.tolist(), "map": result.map_by_tiou.tolist(), **_counted(result)}
    if (points := scores.points) is not None:
        by = {"tolerance": points.tolerances.seconds.tolist(), "map": points.map_by_tolerance.tolist()}
        content |= {**by, **_counted(points)}
    if result is not None and (told := scores.intervals) is not None:
        content["intervals"] = {
            "level": LEVEL,
            "draws": told.count,
            "seed": told.seed,
            "map": told.map_by_tiou.tolist(),
            "average_map": told.average.tolist(),
            "average_precision": dict(zip(result.classes, told.by_class.tolist(), strict=True)),
        }
    if (recall := scores.recall) is not None:
        content["average_recall"] = {
            "proposals_per_video": recall.proposals_per_video.tolist(),
            "average_recall": recall.average_recall.tolist(),
            "auc": recall.auc,
        }
    if (diagnosis := scores.diagnosis) is not None:
        content["diagnosis"] = {
            "normalised_map": diagnosis.precision,
            "num_segments": diagnosis.num_segments,
            "num_left_out": diagnosis.num_left_out,
            "characteristics": diagnosis.characteristics,
            "false_positives": dict(zip(KINDS, diagnosis.kinds.T.tolist(), strict=True)),
            "gains": diagnosis.gains,
        }
    if (segmental := scores.segmental) is not None:
        content["frames"] = {"num_frames": segmental.num_frames, **segmental.named}
        if segmental.intervals is not None:
            content["frames"]["intervals"] = dict(zip(segmental.named, segmental.intervals.tolist(), strict=True))
    if (over_frames := scores.frame_map) is not None:
        content["frame_map"] = {
            "num_frames": over_frames.num_frames,
            "average_map": over_frames.average,
            "average_precision": dict(zip(over_frames.classes, over_frames.average_precision.tolist(), strict=True)),
        }
    return content


def _counted(result: MapResult | PointResult) -> dict[str, Any]:
    return {
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


sys.modules[__name__].__class__ = CallableModule

if __name__ == "__main__":
    sys.exit(main())

"""The command `evaluate`: mAP of any predictions against any ground truth."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from lofi_fast.errors import InputError
from lofi_fast.metrics import (
    _arguments,
    _load_subset,
    _write_metrics,
    load_predictions,
    mean_average_precision,
    metrics_table,
    parse_tiou,
)


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status (0, or 2 after an "error: ..." line)."""
    args = _arguments(argv)
    try:
        tious = parse_tiou(args.tiou)
        subset, ground_truth = _load_subset(args.ground_truth, args.subset)
        result = mean_average_precision(ground_truth, load_predictions(args.predictions), tious)
        if args.json is not None:
            _write_metrics(args.json, subset, result)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(
        f"{subset}: {result.num_videos} videos, {result.num_segments} segments, {len(result.classes)} classes; "
        f"{result.num_predictions} predictions"
    )
    if result.num_unknown_label:
        print(f"note: {result.num_unknown_label} predictions ignored: the ground truth has no such label")
    if result.num_unknown_video:
        print(f"note: {result.num_unknown_video} predictions count as false positives: their video is not in {subset}")
    print(metrics_table(result, per_class=args.per_class))
    return 0


if __name__ == "__main__":
    sys.exit(main())

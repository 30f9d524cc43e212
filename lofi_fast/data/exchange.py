"""Annotations and pieces of configuration by which other programs load our features: OpenTAD, ActionFormer, mmaction2.

They count in frames, and one stride holds for all videos of a data set. Our features are regular in seconds, so each
video is told to have its own number of frames a second, by which a feature is FRAMES of them: feature i is then centred
on frame (i + 0.5) * FRAMES, and stride, offset and rate agree in all three programs whatever the videos' own rates are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from lofi_fast.data.annotations import UNASSIGNED, FormatOptions, Video, load_annotations
from lofi_fast.data.matching import match_videos
from lofi_fast.data.split import choose_validation
from lofi_fast.errors import InputError
from lofi_fast.files import write_bytes, write_json

Layout = Literal["plain", "opentad", "actionformer", "mmaction2"]
LAYOUTS: dict[Layout, tuple[str, ...]] = {  # the formats that each loads, the usual one first
    "plain": ("npy", "npz", "h5", "pt"),
    "opentad": ("npy", "npz", "pt"),
    "actionformer": ("npy", "h5"),
    "mmaction2": ("csv",),
}
FRAMES = 16  # of a feature; the finer, the less OpenTAD's whole frame numbers round
LONGEST = 2304  # features of a training sample, as ActionFormer's configurations have it


@dataclass(frozen=True)
class Labels:
    """The labelled videos by the names that their features have, the classes, and what is to be told of them."""

    videos: dict[str, Video]
    classes: tuple[str, ...]
    notes: tuple[str, ...]


def labels_for(annotations: Path, given: Sequence[str], names: Mapping[Path, str]) -> Labels:
    """The labels of videos that were `given` as files and folders; `names`: of the features of each file.

    Videos without a subset are divided into training and validation. Raises InputError for labels that cannot be read,
    that name none of the videos, or of which a name may mean several of them.
    """
    folders = [Path(one) for one in given if Path(one).is_dir()]
    found = load_annotations(annotations, clip=False, options=FormatOptions(videos=folders[0] if folders else None))
    by_path = {path.resolve(): name for path, name in names.items()}
    by_end = _ends(names)
    matched = [match_videos(folder, [video.name for video in found.videos], flag="") for folder in folders]
    validation = choose_validation([video for video in found.videos if video.subset == UNASSIGNED])
    videos: dict[str, Video] = {}
    for video in found.videos:
        paths = [of.paths[video.name].resolve() for of in matched if video.name in of.paths]
        several = {by_path[path] for path in paths if path in by_path} or by_end.get(video.name, set())
        if not several:
            continue
        if unclear := next((of.unclear[video.name] for of in matched if video.name in of.unclear), None):
            raise InputError(unclear)
        name, *others = sorted(several)
        if others:
            raise InputError(
                f"--annotations {annotations}: its video {video.name!r} may be any of {len(several)} that are given, "
                f"such as {name} and {others[0]}; write it with its folder"
            )
        if name in videos:
            raise InputError(
                f"--annotations {annotations}: {videos[name].name!r} and {video.name!r} mean one video; give it one "
                "name"
            )
        own = "validation" if video.name in validation else "training"
        subset = own if video.subset == UNASSIGNED else video.subset
        videos[name] = Video(video.name, subset, video.duration, video.segments)
    if not videos:
        raise InputError(f"--annotations {annotations}: it labels none of the {len(names)} videos, by their names")
    notes = [*found.notes, *(note for of in matched for note in of.notes)]
    if left := len(found.videos) - len(videos):
        notes.append(f"{annotations}: {left} of its videos are not among those given")
    classes = tuple(sorted({s.label for video in videos.values() for s in video.segments}))
    return Labels(videos, classes, tuple(notes))


def _ends(names: Mapping[Path, str]) -> dict[str, set[str]]:
    """What labels may call the videos: the ends of their paths with and without extension; the names of each."""
    ends: dict[str, set[str]] = {}
    for path, name in names.items():
        folders = path.absolute().parts[:-1]
        for last in (path.name, path.stem):
            for begin in range(1, len(folders) + 1):
                ends.setdefault("/".join((*folders[begin:], last)), set()).add(name)
    return ends


def write_layout(
    layout: Layout, out: Path, form: str, rows: Sequence[Mapping[str, Any]], labels: Labels, fixed: bool
) -> list[str]:
    """Write annotations and a piece of configuration for the features that `rows` of the index tell of; sentences on
    what was written. `fixed`: every video has as many features. A configuration that is there stays as it is. Raises
    InputError where a file cannot be written.
    """
    rows = [row for row in rows if row["video"] in labels.videos]
    if not rows:
        raise InputError("no labelled video has features: nothing to write for another program")
    if layout == "mmaction2":
        files = [_write_mmaction2(out, rows, labels, subset) for subset in ("training", "validation", "testing")]
        text, name = _mmaction2(out, rows[0]), "mmaction2.py"
    else:
        files = [write_json(out / "annotations.json", {"version": "lofi_fast", "database": _database(rows, labels)})]
        files.append(write_bytes(out / "classes.txt", "".join(f"{label}\n" for label in labels.classes).encode()))
        name = {"opentad": "opentad.py", "actionformer": "actionformer.yaml", "plain": ""}[layout]
        make = {"opentad": _opentad, "actionformer": _actionformer}.get(layout)
        text = make(out, form, rows[0], labels, fixed) if make else ""
    told = [f"annotations: {', '.join(str(file) for file in files if file is not None)}"]
    if name and (out / name).exists() and (out / name).read_text(errors="replace") != text:
        told.append(f"{out / name} is there and differs; it stays as it is")
    elif name:
        told.append(f"configuration: {write_bytes(out / name, text.encode())}")
    return told


def _database(rows: Sequence[Mapping[str, Any]], labels: Labels) -> dict[str, Any]:
    """ActivityNet's form with the keys that OpenTAD and ActionFormer read too."""
    numbers = {label: number for number, label in enumerate(labels.classes)}
    return {
        row["video"]: {
            "subset": labels.videos[row["video"]].subset,
            "duration": row["duration"],
            "fps": FRAMES / row["stride"],
            "frame": row["duration"] * FRAMES / row["stride"],
            "annotations": [
                {"label": s.label, "label_id": numbers[s.label], "segment": [s.start, s.end]}
                for s in labels.videos[row["video"]].segments
            ],
        }
        for row in rows
    }


def _opentad(out: Path, form: str, row: Mapping[str, Any], labels: Labels, fixed: bool) -> str:
    kind = "AnetResizeDataset" if fixed else "ThumosPaddingDataset"
    where = (
        f"resize_length={row['features']}," if fixed
        else f"feature_stride={FRAMES},\n        sample_stride=1,\n        offset_frames={FRAMES // 2},"
    )  # fmt: skip
    load = f'dict(type="LoadFeats", feat_format="{form}"),'
    resize = '            dict(type="ResizeFeat", tool="interpolate"),\n' if fixed else ""
    cut = "" if fixed else (
        f'            dict(type="RandomTrunc", trunc_len={LONGEST}, trunc_thresh=0.5, crop_ratio=[0.9, 1.0]),\n'
    )  # fmt: skip
    end = '            dict(type="Rearrange", keys=["feats"], ops="t c -> c t"),\n'
    parts = []
    for part, subset, tests in (
        ("train", "training", False),
        ("val", "validation", False),
        ("test", "validation", True),
    ):
        keys = '["feats"]' if tests else '["feats", "gt_segments", "gt_labels"]'
        kept = '["masks"]' if tests else '["masks", "gt_segments", "gt_labels"]'
        parts.append(
            f'    {part}=dict(\n        type="{kind}",\n        ann_file=annotation_path,\n'
            f'        subset_name="{subset}",\n        class_map=class_map,\n        data_path=data_path,\n'
            f"        filter_gt=False,\n        {where}\n{'        test_mode=True,' + chr(10) if tests else ''}"
            f'        pipeline=[\n            {load}\n            dict(type="ConvertToTensor", keys={keys}),\n'
            f"{resize}{cut if part == 'train' else ''}{end}"
            f'            dict(type="Collect", inputs="feats", keys={kept}),\n        ],\n    ),\n'
        )
    return (
        "# A data set for OpenTAD: name this file in _base_ of a configuration, in place of its data set.\n"
        f"# The projection takes in_channels={row['channels']}; the head has num_classes={len(labels.classes)}.\n"
        f'annotation_path = "{out.absolute()}/annotations.json"\nclass_map = "{out.absolute()}/classes.txt"\n'
        f'data_path = "{out.absolute()}/"\n\ndataset = dict(\n{"".join(parts)})\n\n'
        'evaluation = dict(\n    type="mAP",\n    subset="validation",\n'
        "    tiou_thresholds=[0.3, 0.4, 0.5, 0.6, 0.7],\n"
        "    ground_truth_filename=annotation_path,\n)\n"
    )


def _actionformer(out: Path, form: str, row: Mapping[str, Any], labels: Labels, fixed: bool) -> str:
    folder = out.absolute() / "features.hdf5" if form == "h5" else out.absolute()
    # its loader of ActivityNet reads one file for all, and series of one length
    name = "anet" if fixed or form == "h5" else "thumos"
    stride = -1 if fixed else FRAMES
    # a multiple of what its local attention and its levels need in the published configurations
    longest = -(-int(row["features"]) // 576) * 576 if fixed else LONGEST
    return (
        "# A data set for ActionFormer: put this in place of the same keys of a configuration.\n"
        f"dataset_name: {name}\ntrain_split: ['training']\nval_split: ['validation']\ndataset: {{\n"
        f"  json_file: {out.absolute()}/annotations.json,\n  feat_folder: {folder},\n  file_prefix: ~,\n"
        f"  file_ext: .npy,\n  num_classes: {len(labels.classes)},\n  input_dim: {row['channels']},\n"
        f"  feat_stride: {stride},\n  num_frames: {stride},\n  default_fps: ~,\n  trunc_thresh: 0.5,\n"
        f"  crop_ratio: [0.9, 1.0],\n  max_seq_len: {longest},\n"
        "  force_upsampling: False,\n}\n"
    )


def _write_mmaction2(out: Path, rows: Sequence[Mapping[str, Any]], labels: Labels, subset: str) -> Path | None:
    """mmaction2 has a file for each subset, and no key above the videos; None where the subset has none."""
    videos = {
        row["video"]: {
            "duration_second": row["duration"],
            "duration_frame": FRAMES * row["features"],
            "feature_frame": FRAMES * row["features"],
            "fps": FRAMES / row["stride"],
            "annotations": [
                {"segment": [s.start, s.end], "label": s.label} for s in labels.videos[row["video"]].segments
            ],
        }
        for row in rows
        if labels.videos[row["video"]].subset == subset
    }
    return write_json(out / f"annotations_{subset}.json", videos) if videos else None


def _mmaction2(out: Path, row: Mapping[str, Any]) -> str:
    loaders = "".join(
        f'{part}_dataloader = dict(\n    dataset=dict(\n        type="ActivityNetDataset",\n'
        f'        ann_file="{out.absolute()}/annotations_{subset}.json",\n'
        f'        data_prefix=dict(video="{out.absolute()}"),\n    )\n)\n'
        for part, subset in (("train", "training"), ("val", "validation"), ("test", "validation"))
    )
    return (
        "# Data for mmaction2's localizers: put this behind a configuration of BMN or BSN that _base_ names.\n"
        f"model = dict(temporal_dim={row['features']}, feat_dim={row['channels']})\n{loaders}"
    )

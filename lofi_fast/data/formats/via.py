"""VIA 3 (VGG Image Annotator for video): projects (JSON) and its CSV export.

Temporal segments in seconds; a single time is a still frame, a point. A region in space is left out, and told. The
label is the option of a choice (by the options' names), or the text; of several attributes the one named TEMPORAL
SEGMENTS or that --label names, or else the first that a segment has. No subsets.
"""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lofi_fast.data.formats.file import Gathered, LabelFile, Medium, plural
from lofi_fast.data.labels import Video
from lofi_fast.detections import Detection
from lofi_fast.errors import InputError
from lofi_fast.files import write_bytes

NAME = "VIA 3"
OPTIONS = frozenset(("label",))
_HEADER = re.compile(r"^#\s*CSV_HEADER\s*=\s*(.*)$", re.MULTILINE)
_ATTRIBUTE = re.compile(r"^#\s*ATTRIBUTES?\s*=\s*(\{.*\})\s*$", re.MULTILINE)
_SELECT = 4  # VIA's number of an attribute with a list of options, and of a video among files


def recognises(content: Any) -> bool:
    return isinstance(content, dict) and all(
        isinstance(content.get(key), dict) for key in ("metadata", "attribute", "file")
    )


def recognises_text(text: str) -> bool:
    return text.lstrip().startswith("#") and _HEADER.search(text[:100_000]) is not None


def read(file: LabelFile, content: Any) -> list[Video]:
    """Of a project. Raises InputError, which names the entry, for what cannot be."""
    files, views = content["file"], content.get("view")
    media: dict[str, str] = {}  # view -> path
    for vid, view in views.items() if isinstance(views, dict) else ((fid, {"fid_list": [fid]}) for fid in files):
        ids = view.get("fid_list") if isinstance(view, dict) else None
        of = files.get(str(ids[0])) if isinstance(ids, list) and ids else None
        if isinstance(of, dict):
            source = str(of.get("src") or "")
            held = not source or source.startswith(("data:", "blob:"))  # in the project, or where the user says
            media[str(vid)] = str(of.get("fname") or "") if held else source
    entries = []
    for key, entry in content["metadata"].items():
        if not isinstance(entry, dict) or str(entry.get("vid")) not in media:
            raise InputError(f"{file.path}: metadata {key} is of no file of the project")
        path = media[str(entry["vid"])]
        entries.append((path, entry.get("z"), bool(entry.get("xy")), entry.get("av"), f"{file.path}: metadata {key}"))
    return _videos(file, list(media.values()), entries, content["attribute"])


def read_text(file: LabelFile) -> list[Video]:
    """Of a CSV export. Raises InputError, which names the line, for what cannot be."""
    header = _HEADER.search(file.text)
    assert header is not None  # it was recognised by it
    columns = [column.strip() for column in re.split(r"[,\t]", header[1]) if column.strip()]
    told = _ATTRIBUTE.search(file.text)
    attributes = _json(told[1] if told else "{}", f"{file.path}: ATTRIBUTE")
    entries = []
    before = file.text[: header.end()].count("\n") + 1
    body = file.text[header.end() :].lstrip("\r\n")
    separator = "\t" if "\t" in header[1] else ","
    reader = csv.reader(io.StringIO(body, newline=""), delimiter=separator)
    try:
        for row in reader:
            line = f"{file.path} line {before + reader.line_num}"
            if not any(cell.strip() for cell in row) or row[0].lstrip().startswith("#"):
                continue
            if len(row) < len(columns):
                raise InputError(f"{line} has {len(row)} cells, its CSV_HEADER has {len(columns)}")
            cell = dict(zip(columns, row, strict=False))
            path = _first(_json(cell.get("file_list", ""), line))
            if "temporal_coordinates" in cell:
                z: Any = _json(cell["temporal_coordinates"], line)
            else:
                z = [_json(cell.get(f"temporal_segment_{end}", ""), line) for end in ("start", "end")]
            spatial = _json(cell.get("spatial_coordinates") or "[]", line)
            entries.append((path, z, bool(spatial), _json(cell.get("metadata", "{}"), line), line))
    except csv.Error as error:
        raise InputError(f"{file.path} line {before + reader.line_num} is not valid CSV: {error}") from error
    videos = _videos(file, [path for path, *_ in entries], entries, attributes)
    if told is None and any(segment.label.isdigit() for video in videos for segment in video.segments):
        file.note(
            "its line ATTRIBUTE is gone or changed, as spreadsheets do, so that numbers of options are labels; export "
            "it again, or take the project"
        )
    return videos


def _videos(
    file: LabelFile, media: Sequence[str], entries: list[tuple[str, Any, bool, Any, str]], attributes: Any
) -> list[Video]:
    names = file.named(media)
    found, spatial, unlabelled = Gathered(file), 0, 0
    chosen = _attribute(file, attributes)
    for path in media:
        found.video(names[path], f"{file.path}: video {names[path]}")
    for path, z, is_spatial, values, where in entries:
        if is_spatial or not isinstance(z, list) or not z:
            spatial += 1
            continue
        labels = _labels(values, attributes, chosen)
        unlabelled += not labels
        for label in labels:
            found.segment(names[path], z[0], z[-1], label, f"{where}: video {names[path]}")
    file.note(f"read as {NAME}: seconds; no subsets")
    if spatial:
        file.note(f"{spatial} entr{'y' if spatial == 1 else 'ies'} with a region, or without a time, left out")
    if unlabelled:
        file.note(f"{plural(unlabelled, 'segment')} without a label dropped")
    return found.videos()


def _attribute(file: LabelFile, attributes: Any) -> str | None:
    """The id of the attribute that holds the labels; None: the first that a segment has."""
    named = {str(key): str(of.get("aname") if isinstance(of, dict) else of) for key, of in _items(attributes)}
    if file.options.label:
        found = [key for key, name in named.items() if name == file.options.label]
        if not found:
            raise InputError(
                f"{file.path}: --label {file.options.label}: it has no such attribute, but {', '.join(named.values())}"
            )
        return found[0]
    plain = {key: re.sub(r"[\W_]+", " ", name).strip().casefold() for key, name in named.items()}
    return next((key for key, name in plain.items() if name == "temporal segments"), None)


def _labels(values: Any, attributes: Any, chosen: str | None) -> list[str]:
    """Of a segment, in words: of ticked boxes there may be several."""
    own = {str(key): value for key, value in _items(values)}
    keys = [chosen] if chosen is not None else [key for key in own if str(own[key]).strip()]
    for key in keys[:1]:
        of = dict(_items(attributes)).get(key)
        options = of.get("options") if isinstance(of, dict) else None
        value = str(own.get(key, "")).strip()
        if isinstance(options, dict) and options:
            return [str(options.get(part, part)) for part in filter(None, map(str.strip, value.split(",")))]
        return [value] if value else []
    return []


def _items(of: Any) -> list[tuple[Any, Any]]:
    return list(of.items()) if isinstance(of, dict) else []


def _first(listed: Any) -> str:
    return str(listed[0]) if isinstance(listed, list) and listed else str(listed)


def _json(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        raise InputError(f"{where} holds {text[:60]!r}, which is not JSON") from None


def write(path: Path, predictions: Mapping[str, Sequence[Detection]], media: Mapping[str, Medium]) -> None:
    """Write detections as a project, to be opened and corrected; seconds to the millisecond. VIA
    asks for the files by their names. Raises InputError when the file cannot be written.
    """
    labels = sorted({d.label for items in predictions.values() for d in items})
    options = {str(number): label for number, label in enumerate(labels)}
    numbers = {label: number for number, label in options.items()}
    metadata: dict[str, Any] = {}
    ids = {name: str(number) for number, name in enumerate(predictions, 1)}
    for name, items in predictions.items():
        for d in sorted(items, key=lambda d: (d.start, d.end)):
            times = [round(d.start, 3), round(d.end, 3)]
            metadata[f"{ids[name]}_d{len(metadata)}"] = {
                "vid": ids[name], "flg": 0, "z": times[:1] if times[0] == times[1] else times, "xy": [],
                "av": {"1": numbers[d.label], "2": f"{d.score:.4f}"},
            }  # fmt: skip
    anchor = {"anchor_id": "FILE1_Z2_XY0", "desc": "", "default_option_id": ""}
    content = {
        "project": {
            "pid": "__VIA_PROJECT_ID__", "rev": "__VIA_PROJECT_REV_ID__",
            "rev_timestamp": "__VIA_PROJECT_REV_TIMESTAMP__", "pname": "detections", "creator": "lofi_fast",
            "created": 0, "data_format_version": "3.1.1", "vid_list": list(ids.values()),
        },
        "config": {"file": {"loc_prefix": {"1": "", "2": "", "3": "", "4": ""}}, "ui": {
            "file_content_align": "center", "file_metadata_editor_visible": True,
            "spatial_metadata_editor_visible": True, "temporal_segment_metadata_editor_visible": True,
            "spatial_region_label_attribute_id": "",
            "gtimeline_visible_row_count": "4",
        }},
        "attribute": {
            "1": {"aname": "TEMPORAL-SEGMENTS", "type": _SELECT, "options": options, **anchor},
            "2": {"aname": "score", "type": 1, "options": {}, **anchor},
        },
        "file": {
            ids[name]: {
                "fid": ids[name], "fname": Path(media[name].path).name, "type": _SELECT, "loc": 1,
                "src": media[name].path,
            }
            for name in predictions
        },
        "metadata": metadata,
        "view": {number: {"fid_list": [number]} for number in ids.values()},
    }  # fmt: skip
    write_bytes(path, json.dumps(content, allow_nan=False).encode() + b"\n")

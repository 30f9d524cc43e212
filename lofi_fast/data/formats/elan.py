"""ELAN (.eaf): annotations on tiers, between time slots in milliseconds; and PAL or NTSC frames, of which a file says
so itself.

The label is an annotation's value, and the tier's name where the value is empty. Read are the tiers that --tiers names,
and otherwise all that depend on no other one and have times. An annotation that refers to another one has its times.
Slots without a value divide the time between their neighbours evenly, as ELAN draws them. The video is the first media
file that is one, by its MIME type or, where that says neither video nor audio, by its name; its TIME_ORIGIN is where
the annotations' clock begins on the video's. There are no subsets.
"""

from __future__ import annotations

import itertools
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from xml.etree.ElementTree import Element, SubElement, indent, tostring

from lofi_fast.data.formats.file import Gathered, LabelFile, Medium, plural, shown
from lofi_fast.data.labels import Video
from lofi_fast.data.matching import EXTENSIONS
from lofi_fast.detections import Detection, lanes
from lofi_fast.errors import InputError
from lofi_fast.files import write_bytes

NAME = "ELAN"
OPTIONS = frozenset(("tiers",))
_UNITS = {"milliseconds": 1e-3, "PAL-frames": 1 / 25, "PAL-50-frames": 1 / 50, "NTSC-frames": 1001 / 30000}
Times = dict[str, tuple[float, float]]  # of annotations by their ids, in the file's unit


def recognises(content: Element) -> bool:
    return content.tag == "ANNOTATION_DOCUMENT"


@dataclass
class _Tier:
    name: str
    parent: str | None
    aligned: list[tuple[str, str, str, str]]  # id, first slot, last slot, value
    referring: list[tuple[str, str, str, str]]  # id, the annotation that it refers to, the one before it, value


def read(file: LabelFile, content: Element) -> list[Video]:
    """Raises InputError, which names tier and annotation, for what cannot be."""
    header = content.find("HEADER")
    name, origin = _media(file, header)
    unit = "milliseconds" if header is None else header.get("TIME_UNITS", "milliseconds")
    if unit not in _UNITS:
        raise InputError(f"{file.path}: its TIME_UNITS are {unit!r}, and only {', '.join(_UNITS)} can be read")
    tiers = _tiers(file, content)
    chosen = _chosen(file, tiers)
    times, between = _times(file, content, tiers)
    found = Gathered(file)
    found.video(name, f"{file.path}: video {name}")
    unplaced: Counter[str] = Counter()
    for tier in chosen:
        where = f"{file.path}: video {name}, tier {tier.name}"
        for key, _, _, value in (*tier.aligned, *tier.referring):
            if key not in times:
                unplaced[tier.name] += 1
                continue
            start, end = (round(at * _UNITS[unit] + origin, 6) for at in times[key])
            label = re.sub(r"\s*[\r\n]\s*", " ", value.strip())  # ELAN takes several lines
            found.segment(name, start, end, label or tier.name, f"{where}, annotation {key}")
    told = f"the tiers {shown(file.options.tiers)}" if file.options.tiers else "tiers that depend on no other one"
    file.note(f"read as {NAME}: {unit}; labels are the values on {told}; no subsets")
    if others := [tier for tier in tiers if tier not in {t.name for t in chosen}]:
        file.note(f"{plural(len(others), 'tier')} left out, which --tiers can name: {shown(others)}")
    if count := sum(key in between for tier in chosen for key, *_ in (*tier.aligned, *tier.referring)):
        file.note(f"{plural(count, 'annotation')} with a time slot without value: the time between is divided evenly")
    if unplaced:
        file.note(f"{plural(unplaced.total(), 'annotation')} without any time dropped")
    return found.videos()


def _media(file: LabelFile, header: Element | None) -> tuple[str, float]:
    """(name of the video, seconds of its clock at which the annotations' clock begins)."""
    found = [] if header is None else list(header.iter("MEDIA_DESCRIPTOR"))
    videos = [one for one in found if _is_video(one)]
    if not found:  # ELAN of before 2004 names one file in the header itself
        named = "" if header is None else header.get("MEDIA_FILE", "").strip()
        return file.named([named])[named] if named else file.path.stem, 0.0
    chosen = (videos or found)[0]
    url = chosen.get("MEDIA_URL") or chosen.get("RELATIVE_MEDIA_URL") or file.path.stem
    name = file.named([url])[url]
    if len(videos) > 1:
        file.note(f"of {len(videos)} videos the first is taken, {name}; the others show the same scene")
    origin = chosen.get("TIME_ORIGIN", "0")
    try:
        return name, int(origin) / 1000
    except (ValueError, OverflowError):
        raise InputError(f"{file.path}: its medium has the TIME_ORIGIN {origin!r}; it must be milliseconds") from None


def _is_video(medium: Element) -> bool:
    kind = medium.get("MIME_TYPE", "")
    url = medium.get("MEDIA_URL") or medium.get("RELATIVE_MEDIA_URL") or ""
    return kind.startswith("video") or (not kind.startswith("audio") and Path(url).suffix.lower() in EXTENSIONS)


def _tier(element: Element) -> _Tier:
    aligned, referring = [], []
    for one in element.iter("ALIGNABLE_ANNOTATION"):
        slots = one.get("TIME_SLOT_REF1", ""), one.get("TIME_SLOT_REF2", "")
        aligned.append((one.get("ANNOTATION_ID", ""), *slots, one.findtext("ANNOTATION_VALUE") or ""))
    for one in element.iter("REF_ANNOTATION"):
        of = one.get("ANNOTATION_REF", ""), one.get("PREVIOUS_ANNOTATION", "")
        referring.append((one.get("ANNOTATION_ID", ""), *of, one.findtext("ANNOTATION_VALUE") or ""))
    return _Tier(element.get("TIER_ID", ""), element.get("PARENT_REF"), aligned, referring)


def _tiers(file: LabelFile, content: Element) -> dict[str, _Tier]:
    """By their names. Raises InputError for a tier or an annotation that stands twice: the last would replace it."""
    tiers: dict[str, _Tier] = {}
    keys: set[str] = set()
    for tier in map(_tier, content.iter("TIER")):
        if tier.name in tiers:
            raise InputError(f"{file.path}: two tiers have the TIER_ID {tier.name!r}; rename one")
        tiers[tier.name] = tier
        for key, *_ in (*tier.aligned, *tier.referring):
            if key in keys:
                raise InputError(
                    f"{file.path}: tier {tier.name}: two annotations have the ANNOTATION_ID {key!r}; give each its own"
                )
            keys.add(key)
    return tiers


def _chosen(file: LabelFile, tiers: dict[str, _Tier]) -> list[_Tier]:
    asked = file.options.tiers
    if missing := [name for name in asked if name not in tiers]:
        raise InputError(f"{file.path}: --tiers {missing[0]}: it has no such tier, but {shown(tiers, 12) or 'none'}")
    if asked:
        return [tiers[name] for name in asked]
    chosen = [tier for tier in tiers.values() if tier.parent is None and tier.aligned]
    return chosen or [tier for tier in tiers.values() if tier.aligned]


def _times(file: LabelFile, content: Element, tiers: dict[str, _Tier]) -> tuple[Times, set[str]]:
    """The times of all annotations that have some, and the ids of those whose slots lack a value."""
    values = _slots(file, content)
    times: Times = {}
    between: set[str] = set()
    for tier in tiers.values():
        run: list[str] = []  # annotations since the last time that is known
        since: float | None = None
        for key, first, last, _ in sorted(tier.aligned, key=lambda one: _place(values, one[1])):
            for slot in (first, last):
                if slot not in values:
                    raise InputError(f"{file.path}: annotation {key} is at the time slot {slot!r}, which is not there")
            start, end = values[first][1], values[last][1]
            if start is not None:
                run, since = [], start
            run.append(key)
            if end is not None and since is not None:
                step = (end - since) / len(run)
                for number, own in enumerate(run):
                    times[own] = (since + number * step, since + (number + 1) * step)
                if len(run) > 1:
                    between.update(run)
                run, since = [], end
    waiting = [one for tier in tiers.values() for one in tier.referring]
    while waiting:  # an annotation may refer to one that itself refers to another
        left = [one for one in waiting if one[1] not in times]
        ready: dict[str, list[tuple[str, str]]] = {}
        for key, of, before, _ in waiting:
            if of in times:
                ready.setdefault(of, []).append((key, before))
        for of, those in ready.items():
            _divide(times, of, those)
        if len(left) == len(waiting):
            break
        waiting = left
    return times, between


def _divide(times: Times, of: str, those: Sequence[tuple[str, str]]) -> None:
    """Give annotations that refer to `of` its times; those that follow each other on one tier share them evenly."""
    after = {before: key for key, before in those if before}
    for first in [key for key, before in those if not before]:
        chain = [first]
        while (following := after.get(chain[-1])) is not None and following not in chain:
            chain.append(following)
        start, end = times[of]
        step = (end - start) / len(chain)
        for number, key in enumerate(chain):
            times[key] = (start + number * step, start + (number + 1) * step)


def _slots(file: LabelFile, content: Element) -> dict[str, tuple[int, float | None]]:
    """Place and value of each time slot."""
    found: dict[str, tuple[int, float | None]] = {}
    for place, slot in enumerate(content.iter("TIME_SLOT")):
        text = slot.get("TIME_VALUE")
        if slot.get("TIME_SLOT_ID", "") in found:
            raise InputError(f"{file.path}: two time slots have the TIME_SLOT_ID {slot.get('TIME_SLOT_ID', '')!r}")
        try:
            found[slot.get("TIME_SLOT_ID", "")] = (place, None if text is None else float(int(text)))
        except (ValueError, OverflowError):
            raise InputError(
                f"{file.path}: time slot {slot.get('TIME_SLOT_ID')} has the value {text!r}; it must be a whole number"
            ) from None
    return found


def _place(values: dict[str, tuple[int, float | None]], slot: str) -> int:
    return values[slot][0] if slot in values else -1


def write(path: Path, detections: Sequence[Detection], medium: Medium) -> None:
    """Write the detections of one video: a tier for each class, and further ones for those that overlap or touch, which
    a tier of ELAN cannot hold. Milliseconds; what is shorter than one is made one long, as ELAN wants it.

    Raises InputError when the file cannot be written.
    """
    schema = "{http://www.w3.org/2001/XMLSchema-instance}noNamespaceSchemaLocation"
    root = Element("ANNOTATION_DOCUMENT", {
        "AUTHOR": "lofi_fast", "DATE": "1970-01-01T00:00:00+00:00", "FORMAT": "3.0", "VERSION": "3.0",
        schema: "http://www.mpi.nl/tools/elan/EAFv3.0.xsd",
    })  # fmt: skip
    header = SubElement(root, "HEADER", {"MEDIA_FILE": "", "TIME_UNITS": "milliseconds"})
    file = Path(medium.path)
    SubElement(header, "MEDIA_DESCRIPTOR", {
        "MEDIA_URL": file.as_uri() if file.is_absolute() else medium.path,
        "MIME_TYPE": "video/mp4" if file.suffix.lower() in (".mp4", ".m4v") else "video/*",
        "RELATIVE_MEDIA_URL": f"./{file.name}",
    })  # fmt: skip
    order = SubElement(root, "TIME_ORDER")
    count = 0
    labels = sorted({_text(d.label) for d in detections})
    names = set(labels)  # of tiers: a label may look like the further tier of another one
    for label in labels:
        for number, lane in enumerate(lanes([d for d in detections if _text(d.label) == label]), 1):
            name = label
            if number > 1:
                name = next(new for k in itertools.count(number) if (new := f"{label} ({k})") not in names)
                names.add(name)
            tier = SubElement(root, "TIER", {"LINGUISTIC_TYPE_REF": "action", "TIER_ID": name})
            for d in lane:
                start = round(1000 * d.start)
                for slot, at in ((2 * count + 1, start), (2 * count + 2, max(round(1000 * d.end), start + 1))):
                    SubElement(order, "TIME_SLOT", {"TIME_SLOT_ID": f"ts{slot}", "TIME_VALUE": str(at)})
                slots = {"TIME_SLOT_REF1": f"ts{2 * count + 1}", "TIME_SLOT_REF2": f"ts{2 * count + 2}"}
                count += 1
                one = SubElement(
                    SubElement(tier, "ANNOTATION"), "ALIGNABLE_ANNOTATION", {"ANNOTATION_ID": f"a{count}", **slots}
                )
                SubElement(one, "ANNOTATION_VALUE").text = label
    SubElement(root, "LINGUISTIC_TYPE", {
        "GRAPHIC_REFERENCES": "false", "LINGUISTIC_TYPE_ID": "action", "TIME_ALIGNABLE": "true",
    })  # fmt: skip
    indent(root, " ")
    write_bytes(path, tostring(root, encoding="UTF-8", xml_declaration=True) + b"\n")


def _text(label: str) -> str:
    """In one line, without the characters that XML has no form for."""
    return re.sub(r"[\x00-\x1f\ufffe\uffff]", "", re.sub(r"[\t\r\n]+", " ", label))

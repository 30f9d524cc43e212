"""Moments of the validation videos that are worth a look: segments that were found, segments that were missed, and
detections that were wrong, each with a few small pictures.

A detection counts from the score on at which F1 is highest. It is right where it overlaps a segment of its label, one
that no higher detection has taken, by tIoU 0.5.
"""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, TypeVar

import msgspec
import numpy as np
from numpy.typing import NDArray

from lofi_fast.data.entry import CachedVideo
from lofi_fast.detections import Detection
from lofi_fast.errors import InputError

FILE = "moments.json"
TIOU = 0.5
TOUCHES = 0.1  # tIoU from which on a wrong detection belongs to a segment
MOST = 6  # of each kind
HEIGHT, WIDEST, GAP = 72, 128, 2  # pixels of a picture, and between two
PLACES = (1 / 6, 1 / 2, 5 / 6)  # of a moment that are shown
QUALITY = 70  # of the JPEG
Kind = Literal["found", "missed", "wrong"]
KINDS: tuple[Kind, ...] = ("found", "missed", "wrong")
T = TypeVar("T")


class Moment(msgspec.Struct, frozen=True):
    """`score` of the detection, None where there is none. `note` says what it was instead, or how well it was found.
    `picture`: a JPEG of the moment at `PLACES`, side by side; empty where it could not be read.
    """

    kind: Kind
    video: str
    start: float  # seconds
    end: float
    label: str
    note: str
    score: float | None = None
    picture: bytes = b""


class Moments(msgspec.Struct, frozen=True):
    """The content of moments.json. `threshold`: the score from which on detections count. `counts`: of each kind."""

    threshold: float
    counts: dict[Kind, int]
    moments: list[Moment]


@dataclass(frozen=True)
class Labelled:
    """A segment of a video, and the score of the detection that has found it."""

    video: str
    start: float
    end: float
    label: str
    score: float | None = None
    tiou: float = 0.0


def pictured(chosen: Moments, entries: Mapping[str, CachedVideo]) -> Moments:
    """The same moments with pictures, out of the frame cache's entries by video."""
    shown = [msgspec.structs.replace(one, picture=picture(entries[one.video], one)) for one in chosen.moments]
    return msgspec.structs.replace(chosen, moments=shown)


def moments(truth: Mapping[str, Sequence[Labelled]], found: Mapping[str, Sequence[Detection]]) -> Moments:
    """The moments of each kind, without pictures: at most `MOST` of each, and of as many classes as there are."""
    segments: list[Labelled] = []
    wrong: list[tuple[str, Detection]] = []
    for video, labelled in truth.items():
        matched, rest = match(labelled, found.get(video, ()))
        segments += matched
        wrong += [(video, detection) for detection in rest]
    threshold = best_threshold([s.score for s in segments if s.score is not None], [d.score for _, d in wrong],
                               len(segments))  # fmt: skip
    hits = [s for s in segments if s.score is not None and s.score >= threshold]
    misses = [s for s in segments if s.score is None or s.score < threshold]
    wrong = [(video, detection) for video, detection in wrong if detection.score >= threshold]
    counts: dict[Kind, int] = {"found": len(hits), "missed": len(misses), "wrong": len(wrong)}
    hits.sort(key=lambda s: (-(s.score or 0.0), s.video, s.start))
    missed_of = Counter(s.label for s in misses)
    misses.sort(key=lambda s: (-missed_of[s.label], s.label, s.video, s.start))
    wrong.sort(key=lambda one: (-one[1].score, one[0], one[1].start))
    shown = [
        Moment("found", s.video, s.start, s.end, s.label, f"tIoU {s.tiou:.2f}", s.score)
        for s in varied(hits, [(s.label, s.video) for s in hits])
    ]
    shown += [
        Moment("missed", s.video, s.start, s.end, s.label, nearest(s, found.get(s.video, ())))
        for s in varied(misses, [(s.label, s.video) for s in misses])
    ]
    shown += [
        Moment("wrong", video, d.start, d.end, d.label, instead(d, truth[video]), d.score)
        for video, d in varied(wrong, [(d.label, video) for video, d in wrong])
    ]
    return Moments(threshold, counts, shown)


def match(
    segments: Sequence[Labelled], detections: Iterable[Detection]
) -> tuple[list[Labelled], list[Detection]]:  # fmt: skip
    """(the segments of one video with the scores of what has found them, detections that found none)."""
    taken = list(segments)
    rest = []
    for detection in sorted(detections, key=lambda d: -d.score):
        free = [
            (overlap, k)
            for k, s in enumerate(taken)
            if s.score is None and s.label == detection.label and (overlap := tiou(s, detection)) >= TIOU
        ]
        if not free:
            rest.append(detection)
            continue
        overlap, k = max(free, key=lambda one: one[0])
        taken[k] = replace(taken[k], score=detection.score, tiou=overlap)
    return taken, rest


def best_threshold(right: Sequence[float], wrong: Sequence[float], num_segments: int) -> float:
    """The score from which on detections make the highest F1; of equal ones the highest score. 0 without detections."""
    scores = np.array([*right, *wrong], dtype=np.float64)
    if not len(scores):
        return 0.0
    true = np.arange(len(scores)) < len(right)
    order = np.argsort(-scores, kind="stable")
    hits, taken = np.cumsum(true[order]), np.arange(1, len(scores) + 1)
    f1 = 2 * hits / (taken + max(num_segments, 1))
    last = np.append(np.diff(scores[order]) != 0, True)  # detections of one score count together
    return float(scores[order][np.flatnonzero(last)[np.argmax(f1[last])]])


def varied(items: Sequence[T], of: Sequence[tuple[str, str]], most: int = MOST) -> list[T]:
    """At most so many, of many labels and videos: always the first of those whose label and video were taken least.
    `of`: (label, video) of each.
    """
    labels, videos = Counter[str](), Counter[str]()
    left, chosen = list(range(len(of))), []
    for _ in range(min(most, len(of))):
        best = min(left, key=lambda k: labels[of[k][0]] + videos[of[k][1]])
        left.remove(best)
        chosen.append(items[best])
        labels[of[best][0]] += 1
        videos[of[best][1]] += 1
    return chosen


def nearest(segment: Labelled, detections: Iterable[Detection]) -> str:
    """What was detected of a segment that counts as missed."""
    near = [(tiou(segment, d), d) for d in detections if d.label == segment.label]
    overlap, best = max(near, key=lambda one: one[0], default=(0.0, None))
    if best is None or overlap < TOUCHES:
        return "nothing was found there"
    return f"the nearest is {best.start:.1f} to {best.end:.1f} s, score {best.score:.2f}, tIoU {overlap:.2f}"


def instead(detection: Detection, segments: Sequence[Labelled]) -> str:
    """What the labels have where a wrong detection is."""
    own = max((s for s in segments if s.label == detection.label), key=lambda s: tiou(s, detection), default=None)
    other = max((s for s in segments if s.label != detection.label), key=lambda s: tiou(s, detection), default=None)
    if own is not None and tiou(own, detection) >= TIOU:
        return f"a second time: {own.start:.1f} to {own.end:.1f} s was found already"
    if other is not None and tiou(other, detection) >= TIOU:
        return f"it is {other.label}"
    if own is not None and tiou(own, detection) >= TOUCHES:
        return f"badly placed: it is {own.start:.1f} to {own.end:.1f} s"
    return "nothing is labelled there"


def tiou(segment: Labelled, detection: Detection) -> float:
    inside = min(segment.end, detection.end) - max(segment.start, detection.start)
    union = max(segment.end, detection.end) - min(segment.start, detection.start)
    return max(inside, 0.0) / union if union > 0 else 0.0


def picture(video: CachedVideo, moment: Moment) -> bytes:
    """A JPEG of a moment, from the pictures of the frame cache; empty where they cannot be read."""
    from PIL import Image  # with what it loads, only where there is something to draw

    times = [moment.start + place * (moment.end - moment.start) for place in PLACES]
    try:
        jpegs = video.read(positions_at(video.pts, times))
    except InputError:
        return b""
    small = []
    for jpeg in jpegs:
        whole = Image.open(io.BytesIO(jpeg.tobytes()))
        whole.thumbnail((WIDEST, HEIGHT))
        small.append(whole.convert("RGB"))
    strip = Image.new("RGB", (sum(one.width for one in small) + GAP * (len(small) - 1), small[0].height), "white")
    left = 0
    for one in small:
        strip.paste(one, (left, 0))
        left += one.width + GAP
    file = io.BytesIO()
    strip.save(file, format="JPEG", quality=QUALITY, optimize=True)
    return file.getvalue()


def positions_at(pts: NDArray[np.float64], times: Sequence[float]) -> NDArray[np.int64]:
    """Of the picture that is nearest to each time."""
    after = np.clip(np.searchsorted(pts, times), 1, max(len(pts) - 1, 1))
    nearer = np.abs(pts[after - 1] - times) <= np.abs(pts[np.minimum(after, len(pts) - 1)] - times)
    positions: NDArray[np.int64] = np.where(nearer, after - 1, np.minimum(after, len(pts) - 1)).astype(np.int64)
    return positions

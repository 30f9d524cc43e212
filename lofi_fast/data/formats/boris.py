"""BORIS projects (.boris): observations of media files, each with its events.

An event is [seconds, subject, behaviour, modifiers, comment, ...] on the observation's clock: media that are played one
after the other count on, and the observation's "time offset" is added. State events come in pairs, a start and a stop
of one subject, behaviour and modifiers; point events are segments that start and end at once. The label is the
behaviour. There are no subsets. Dropped, and told: observations without media (live, pictures), events that lack their
pair, and second players, which show the same scene. Where an observation counts from the dates at which its media were
made ("media_creation_date_as_offset"), a time is such a date and seconds of that medium.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lofi_fast.data.formats.file import Gathered, LabelFile, Medium, plural, shown
from lofi_fast.data.labels import Segment, Video, seconds_of
from lofi_fast.detections import Detection, lanes
from lofi_fast.errors import InputError
from lofi_fast.files import write_bytes
from lofi_fast.texts import decoded

NAME = "a project of BORIS"
OPTIONS = frozenset[str]()


def recognises(content: Any) -> bool:
    return isinstance(content, dict) and isinstance(content.get("observations"), dict) and "behaviors_conf" in content


@dataclass(frozen=True)
class Event:
    """What was coded at `time`, in seconds; is_state: of something that lasts, so that there are two. status: START or
    STOP, where that is told.
    """

    time: float
    subject: str
    behavior: str
    modifiers: str
    is_state: bool
    status: str = ""


def paired(events: Iterable[Event]) -> tuple[list[Segment], Counter[str]]:
    """Segments of events, by time; and of each behaviour how many events lack their pair.

    Where the status is told, a stop without a start lacks it, and so does a start that another one follows, as in a
    table of a part of an observation. Elsewhere a first event is a start, and the next one its stop.
    """
    open_since: dict[tuple[str, str, str], float] = {}
    segments = []
    unpaired: Counter[str] = Counter()
    waiting = sorted(events, key=lambda event: event.time)[::-1]
    while waiting:
        event = waiting.pop()
        key = _key(event)
        if event.status == "START" and key in open_since:  # of one time, it may stand before the stop of what is open
            at = len(waiting)
            while at and waiting[at - 1].time == event.time:
                at -= 1
                if (waiting[at].status, _key(waiting[at])) == ("STOP", key):
                    waiting[at], event = event, waiting[at]
                    break
        if not event.is_state:
            segments.append(Segment(event.time, event.time, event.behavior))
        elif key in open_since and event.status != "START":
            segments.append(Segment(open_since.pop(key), event.time, event.behavior))
        elif event.status == "STOP":
            unpaired[event.behavior] += 1
        else:
            unpaired[event.behavior] += key in open_since
            open_since[key] = event.time
    return segments, +unpaired + Counter(behavior for _, behavior, _ in open_since)


def _key(event: Event) -> tuple[str, str, str]:
    return event.subject, event.behavior, event.modifiers


def placed(segment: Segment, media: Sequence[tuple[str, float | None]]) -> list[tuple[str, float, float]] | None:
    """(medium, start, end) of a segment on the clock of each medium that it touches; `media`: names and lengths in
    seconds of those that are played one after the other. None where lengths that are needed are not known.
    """
    found, begins = [], 0.0
    for number, (name, length) in enumerate(media):
        is_last = number == len(media) - 1
        if length is None and not is_last and segment.end > begins:
            # with more media behind it, only what is known to be before its end can be told to be in it
            return None
        ends = float("inf") if is_last or length is None else begins + length
        if segment.start < ends and (segment.end > begins or segment.start >= begins):
            found.append((name, max(segment.start, begins) - begins, min(segment.end, ends) - begins))
        begins = ends
    return found


def read(file: LabelFile, content: Any) -> list[Video]:
    """Raises InputError, which names observation and event, for what cannot be."""
    found, dropped = Gathered(file), Dropped()
    states = {
        str(of.get("code")): "state" in str(of.get("type", "")).lower()
        for of in _objects(content["behaviors_conf"], f"{file.path}: behaviors_conf")
    }
    observations = {name: one for name, one in content["observations"].items() if isinstance(one, dict) and _queue(one)}
    dropped.without_media = len(content["observations"]) - len(observations)
    names = file.named(path for one in observations.values() for path in _queue(one))
    lengths = {path: length for one in observations.values() for path, length in media_lengths(one).items()}
    silent = [path for path in names if path not in lengths]
    probed = file.lengths(names[path] for path in silent)
    lengths |= {path: probed[names[path]] for path in silent if names[path] in probed}
    seen: Counter[str] = Counter()
    for name, one in observations.items():
        where = f"{file.path}: observation {name}"
        queue = _queue(one)
        dropped.players += sum(bool(files) for player, files in one["file"].items() if player != min(one["file"]))
        for path in queue:
            found.video(names[path], where, duration=lengths.get(path))
            seen[names[path]] += 1
        offset = seconds_of(one.get("time offset", 0.0)) or 0.0
        events = [_event(event, states, offset, f"{where}, event {i}") for i, event in enumerate(one["events"])]
        dropped.unknown.update(event.behavior for event in events if event.behavior not in states)
        known = [event for event in events if event.behavior in states]
        if one.get("media_creation_date_as_offset") is True:
            dates = [(names[path], _made(one, path), lengths.get(path)) for path in queue]
            _place_by_date(found, known, dates, dropped, where)
        else:
            place(found, known, [(names[path], lengths.get(path)) for path in queue], dropped, where)
    file.note(f"read as {NAME}: seconds; labels are behaviours, whatever subject and modifiers; no subsets")
    if several := [name for name, count in seen.items() if count > 1]:
        file.note(
            f"the segments of {plural(len(several), 'video')} come from several observations and are put together "
            f"({shown(several)})"
        )
    dropped.tell(file)
    return found.videos()


@dataclass
class Dropped:
    """What of BORIS's events cannot be used, to be told."""

    without_media: int = 0
    players: int = 0
    dated: int = 0
    unplaced: int = 0

    def __post_init__(self) -> None:
        self.unpaired: Counter[str] = Counter()
        self.unknown: Counter[str] = Counter()

    def tell(self, file: LabelFile) -> None:
        if self.without_media:
            file.note(f"{plural(self.without_media, 'observation')} without media files dropped")
        if self.players:
            file.note(f"{plural(self.players, 'player')} beside the first left out: they show the same scene")
        if self.dated:
            file.note(
                f"{plural(self.dated, 'segment')} dropped: the times are dates, and no medium is told to be of then"
            )
        if self.unpaired:
            counts = shown(f"{count} of {behavior}" for behavior, count in self.unpaired.items())
            file.note(f"{plural(self.unpaired.total(), 'state event')} without a pair dropped ({counts})")
        if self.unknown:
            file.note(f"{plural(self.unknown.total(), 'event')} of behaviours that are not in the ethogram dropped")
        if self.unplaced:
            file.note(
                f"{plural(self.unplaced, 'segment')} dropped: media are played one after the other, and nothing "
                "tells how long they are; give --videos, or the .boris project itself"
            )


def place(
    found: Gathered, events: Sequence[Event], media: Sequence[tuple[str, float | None]], dropped: Dropped, where: str
) -> None:
    """Add the segments of an observation's events to those of its media."""
    segments, unpaired = paired(events)
    dropped.unpaired += unpaired
    for segment in segments:
        put(found, segment, media, dropped, where)


def put(
    found: Gathered, segment: Segment, media: Sequence[tuple[str, float | None]], dropped: Dropped, where: str
) -> None:
    """Add one segment on its observation's clock to the media that it touches."""
    parts = placed(segment, media)
    if parts is None:
        dropped.unplaced += 1
        return
    for medium, start, end in parts:
        found.segment(medium, start, end, segment.label, where)


def _place_by_date(
    found: Gathered,
    events: Sequence[Event],
    media: Sequence[tuple[str, float | None, float | None]],
    dropped: Dropped,
    where: str,
) -> None:
    """The same where times are dates; `media`: names, the date of each in seconds, and their lengths."""
    dated = sorted(
        ((begin, name, length) for name, begin, length in media if begin is not None), key=lambda one: one[0]
    )
    spans = []  # name, first and last date
    for number, (begin, name, length) in enumerate(dated, 1):
        later = dated[number][0] if number < len(dated) else float("inf")
        spans.append((name, begin, later if length is None else begin + length))
    segments, unpaired = paired(events)
    dropped.unpaired += unpaired
    for segment in segments:
        is_point = segment.start == segment.end
        touched = [
            (name, begin, end)
            for name, begin, end in spans
            if (begin <= segment.start <= end if is_point else segment.start < end and segment.end > begin)
        ]
        dropped.dated += not touched
        for name, begin, end in touched:
            start, stop = max(segment.start, begin) - begin, min(segment.end, end) - begin
            found.segment(name, round(start, 6), round(stop, 6), segment.label, where)


def _event(event: Any, states: Mapping[str, bool], offset: float, where: str) -> Event:
    if not isinstance(event, list) or len(event) < 3:
        raise InputError(f"{where} must be [seconds, subject, behaviour, ...]")
    seconds = seconds_of(event[0])
    if seconds is None:
        raise InputError(f"{where} has the time {event[0]!r}; it must be seconds")
    modifiers = str(event[3]) if len(event) > 3 else ""
    behavior = str(event[2])
    return Event(round(seconds - offset, 6), str(event[1]), behavior, modifiers, states.get(behavior, False))


def _queue(observation: Mapping[str, Any]) -> list[str]:
    """The media of the first player, in the order in which they are played; none of live observations."""
    players = observation.get("file")
    if not isinstance(players, dict) or not players or not isinstance(observation.get("events"), list):
        return []
    first = players[min(players)]
    return [str(path) for path in first] if isinstance(first, list) else []


def media_lengths(observation: Mapping[str, Any]) -> dict[str, float]:
    """Seconds of the media of an observation, as far as a project tells them."""
    info = observation.get("media_info")
    lengths = info.get("length") if isinstance(info, dict) else None
    told = {str(path): seconds_of(value) for path, value in lengths.items()} if isinstance(lengths, dict) else {}
    return {path: seconds for path, seconds in told.items() if seconds is not None and seconds > 0}


def _made(observation: Mapping[str, Any], path: str) -> float | None:
    """When a medium was made, in seconds of the Unix epoch. BORIS writes its path with forward slashes here."""
    info = observation.get("media_info")
    dates = info.get("media_creation_time") if isinstance(info, dict) else None
    told = {key.replace("\\", "/"): seconds_of(date) for key, date in dates.items()} if isinstance(dates, dict) else {}
    return told.get(path.replace("\\", "/"))


def _objects(of: Any, where: str) -> list[dict[str, Any]]:
    listed = list(of.values()) if isinstance(of, dict) else of
    if not isinstance(listed, list) or not all(isinstance(one, dict) for one in listed):
        raise InputError(f"{where} must hold objects")
    return listed


def lengths_beside(folder: Path) -> dict[str, float]:
    """Seconds of media by their paths, as the projects in a folder tell them."""
    found: dict[str, float] = {}
    for path in sorted(folder.glob("*.boris")):
        try:
            content = json.loads(decoded(path))
        except (OSError, ValueError, RecursionError):
            continue
        if recognises(content):
            for one in content["observations"].values():
                found |= media_lengths(one) if isinstance(one, dict) else {}
    return found


def write(path: Path, predictions: Mapping[str, Sequence[Detection]], media: Mapping[str, Medium]) -> None:
    """Write detections as a project of BORIS 7, which later versions open: an observation for each video, a state event
    for each class, and scores as comments. Seconds to the millisecond.

    Detections of one class that overlap or touch belong to different subjects, since BORIS pairs starts and stops by
    subject. A class of which all segments start and end at once is a point event. Raises InputError when the file
    cannot be written.
    """
    by_class: dict[str, list[Detection]] = {}
    for items in predictions.values():
        for d in items:
            by_class.setdefault(d.label, []).append(d)
    points = {label for label, items in by_class.items() if all(d.start == d.end for d in items)}
    observations, subjects = {}, 0
    for name, items in predictions.items():
        events: list[list[Any]] = []
        for label in sorted({d.label for d in items}):
            for number, lane in enumerate(lanes([d for d in items if d.label == label]), 1):
                subjects = max(subjects, number)
                for d in lane:
                    for at in (d.start,) if label in points else (d.start, d.end):
                        events.append([round(at, 3), f"detection {number}", label, "", f"score {d.score:.4f}"])
        medium = media[name]
        length = medium.duration or max((d.end for d in items), default=0.0)
        observations[name] = {
            "file": {"1": [medium.path], **{str(player): [] for player in range(2, 9)}}, "type": "MEDIA",
            "date": "1970-01-01T00:00:00", "description": "", "time offset": 0.0,
            "events": sorted(events, key=lambda event: event[0]), "independent_variables": {},
            "visualize_spectrogram": False, "close_behaviors_between_videos": False,
            "media_info": {
                "length": {medium.path: round(length, 3)}, "fps": {medium.path: medium.fps or 25.0},
                "hasVideo": {medium.path: True}, "hasAudio": {medium.path: False},
                "offset": {str(player): 0.0 for player in range(1, 9)},
            },
        }  # fmt: skip
    content = {
        "time_format": "hh:mm:ss", "project_name": "detections", "project_date": "1970-01-01T00:00:00",
        "project_description": "", "project_format_version": "7.0", "behavioral_categories": [], "coding_map": {},
        "converters": {}, "independent_variables": {}, "observations": observations,
        "subjects_conf": {
            str(number): {"key": "", "name": f"detection {number + 1}", "description": ""} for number in range(subjects)
        },
        "behaviors_conf": {
            str(number): {
                "type": "Point event" if label in points else "State event", "key": "", "code": label,
                "description": "", "category": "", "modifiers": {}, "excluded": "", "coding map": "",
            }
            for number, label in enumerate(sorted(by_class))
        },
    }  # fmt: skip
    write_bytes(path, json.dumps(content, indent=1, allow_nan=False).encode() + b"\n")

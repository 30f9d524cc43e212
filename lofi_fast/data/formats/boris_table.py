"""Tables that BORIS exports: aggregated events, a row a segment, and tabular events, a row for each start and stop.

Columns are found by name, since versions have others: "Behavior", "Behavior type" (or "Status"), "Start (s)" and
"Stop (s)" (or "Time"), "Media file name" ("Media file", "Media file path", or else "Source"), "Observation id". Seconds
on the observation's clock: media that are played one after the other count on, and "Time offset (s)" is added. Before
BORIS 8 that and the media stand above a table of tabular events. Where media begin is told by "Source" and "Media
duration (s)", by a .boris project beside the table, or by the files in --videos; segments of later media are dropped,
and told, where nothing tells it. There are no subsets.
"""

from __future__ import annotations

import re
from collections import defaultdict

from lofi_fast.data.formats.boris import Dropped, Event, lengths_beside, paired, put
from lofi_fast.data.formats.file import Gathered, LabelFile, Table, plural
from lofi_fast.data.labels import Segment, Video, seconds_of
from lofi_fast.errors import InputError

NAME = "a table of BORIS"
OPTIONS = frozenset[str]()
_MEDIA = ("media file name", "media file", "media file path", "media file(s)")
_NONE = frozenset(("", "na", "n/a", "none", "not found", "no media file", "live"))
PREAMBLE = 200  # lines that may stand above a table of tabular events
_FACT = re.compile(r'"?(time offset \(s\)|player #1)"?[\t,;]\s*(.*?)[\t,;\s]*', re.IGNORECASE)


def recognises(columns: list[str]) -> bool:
    found = set(columns)
    aggregated = {"behavior", "start (s)", "stop (s)"} <= found
    return aggregated or ({"behavior", "time"} <= found and bool({"status", "behavior type"} & found))


def begins(text: str) -> int | None:
    """The number of lines above the table of tabular events, which older versions write under facts of the observation;
    None where there is no such table.
    """
    for number, line in enumerate(text.splitlines()[:PREAMBLE]):
        cells = [cell.strip(' "').lower() for cell in re.split(r"[\t,;]", line)]
        if recognises(cells):
            return number
    return None


def _above(text: str) -> tuple[float, list[str]]:
    """The time offset, and the media of the first player, as they stand above a table of tabular events."""
    offset, media = 0.0, []
    for line in text.splitlines()[: begins(text) or 0]:
        if fact := _FACT.fullmatch(line):
            value = fact[2].strip('"').strip()
            if fact[1].lower() == "player #1":
                media.append(value)
            else:
                offset = seconds_of(value) or 0.0
    return offset, media


def read(file: LabelFile, table: Table) -> list[Video]:
    """Raises InputError, which names the line, for what cannot be."""
    observations: dict[str, list[tuple[str, dict[str, str]]]] = defaultdict(list)
    live = 0
    medium = next((column for column in _MEDIA if column in table.columns), None)
    if medium is None and "source" not in table.columns:
        raise InputError(f"{file.path}: this table of BORIS has no column of the media file, so no video can be told")
    for line, cell in table.rows():
        if (cell[medium].lower() in _NONE) if medium is not None else not _first_player(cell):
            live += 1
        elif cell["behavior"]:
            observations[cell.get("observation id", "")].append((line, cell))
    offset, above = _above(file.text)
    queues = {name: _queue(rows, medium, above) for name, rows in observations.items()}
    names = file.named(path for queue in queues.values() for path in queue)
    beside = lengths_beside(file.path.parent)
    told = {path: length for queue in queues.values() for path, length in queue.items() if length is not None}
    told = {path: beside[path] for path in names if path in beside} | told
    probed = file.lengths(names[path] for path in names if path not in told) if len(names) > 1 else {}
    told |= {path: probed[names[path]] for path in names if names[path] in probed and path not in told}
    found, dropped = Gathered(file), Dropped()
    for name, rows in observations.items():
        media = [(names[path], told.get(path)) for path in queues[name]]
        for path in queues[name]:
            found.video(names[path], f"{file.path}: observation {name}", duration=told.get(path))
        _observation(found, rows, media, medium, next(iter(queues[name])), dropped, offset)
    file.note(f"read as {NAME}: seconds; labels are behaviours, whatever subject and modifiers; no subsets")
    if live:
        file.note(f"{plural(live, 'row')} without a media file dropped")
    dropped.tell(file)
    return found.videos()


def _queue(rows: list[tuple[str, dict[str, str]]], medium: str | None, above: list[str]) -> dict[str, float | None]:
    """The media of an observation in the order in which they are played, with their lengths where they are told."""
    cell = rows[0][1]
    paths = list(dict.fromkeys(above)) or _first_player(cell)
    if paths and (medium is None or all(row[medium] in paths for _, row in rows)):
        told = cell.get("media duration (s)") or cell.get("total length", "")
        lengths = [seconds_of(text) for text in told.split("|")[0].split(";")]
        return dict(zip(paths, lengths, strict=True)) if len(lengths) == len(paths) else dict.fromkeys(paths)
    assert medium is not None  # rows without it and without a first player are left out
    times = {id(cell): _seconds(cell, ("start (s)", "time"), line) for line, cell in rows}
    ordered = sorted((cell for _, cell in rows), key=lambda cell: times[id(cell)])
    paths = list(dict.fromkeys(cell[medium] for cell in ordered))
    total = seconds_of(cell.get("total length", ""))
    return {path: total if len(paths) == 1 else None for path in paths}


def _first_player(cell: dict[str, str]) -> list[str]:
    """The media of the first player, as "Source" lists them: "player #1:a.mp4;b.mp4|player #2:side.mp4" since BORIS
    8.10, and before with blanks, with "; " behind each medium, or without the player's name where there is one alone.
    """
    source = cell.get("source", "")
    if source.lower() in _NONE or not cell.get("observation type", "media").lower().startswith("media"):
        return []
    first = re.split(r"[|;\s]\s*player #\d+:", re.sub(r"^player #\d+:", "", source))[0]
    return [path.strip() for path in first.split(";") if path.strip()]


def _observation(
    found: Gathered,
    rows: list[tuple[str, dict[str, str]]],
    media: list[tuple[str, float | None]],
    medium: str | None,
    first: str,
    dropped: Dropped,
    above: float,
) -> None:
    """Add the segments of one observation; `medium`: the column of the media, `first`: what it says of the first.
    `above`: the time offset, where the rows say none.
    """
    events = []
    reached = -1.0  # the first medium lasts that long at least
    for line, cell in rows:
        offset = seconds_of(cell.get("time offset (s)", "")) or above
        start = round(_seconds(cell, ("start (s)", "time"), line) - offset, 6)
        in_first = medium is not None and cell[medium] == first and media[0][1] is None
        if "start (s)" in cell:
            stop = cell["stop (s)"]
            is_point = cell.get("behavior type", "").upper() == "POINT"
            end = start if is_point else round(_seconds(cell, ("stop (s)",), line) - offset, 6)
            if end < start:
                raise InputError(
                    f"{line}: the event of {cell['behavior']} starts at {start} s, after its stop at {stop}"
                )
            # what is of the first medium can be placed, however long that is
            known = media[:1] if in_first else media
            put(found, Segment(start, end, cell["behavior"]), known, dropped, line)
        else:
            status = (cell.get("status") or cell.get("behavior type") or "").upper()
            if status not in ("POINT", "START", "STOP", "STATE"):
                raise InputError(f"{line} has the status {status!r}; it must be POINT, START or STOP")
            modifiers = "|".join(text for column, text in cell.items() if column.startswith("modifier"))
            reached = max(reached, start) if in_first else reached
            told = status if status in ("START", "STOP") else ""
            events.append(Event(start, cell.get("subject", ""), cell["behavior"], modifiers, status != "POINT", told))
    segments, unpaired = paired(events)
    dropped.unpaired += unpaired
    for segment in segments:
        put(found, segment, media[:1] if segment.end <= reached else media, dropped, rows[0][0])


def _seconds(cell: dict[str, str], columns: tuple[str, ...], line: str) -> float:
    for column in columns:
        if column in cell:
            seconds = seconds_of(cell[column])
            if seconds is None:
                raise InputError(f"{line} has {cell[column]!r} under {column!r}; it must be seconds")
            return seconds
    raise InputError(f"{line} has no {columns[0]!r}")

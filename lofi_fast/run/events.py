"""What a run logs: one typed record for each kind of event. What is written is what is read.

log.jsonl holds one JSON object a line: "event" names the kind, "time" is UTC, the rest are the record's fields. A
number that is not finite is written as null, because JSON has no other word for it. The log, the report and the
benchmarks all go through this file.

A log may be read by an older or a newer version than the one that wrote it: fields and kinds of event that the reader
does not know are passed over, so a new field needs a default, and a field's name never changes its meaning.

Amounts of memory are bytes, durations are seconds, epochs and steps count from 0.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from datetime import UTC, datetime
from typing import get_args

import msgspec

from lofi_fast.files import json_bytes

Number = float | None  # None: not finite


class Event(msgspec.Struct, frozen=True, kw_only=True, tag_field="event", omit_defaults=True):
    """What all events share. A field that holds its default is not written."""

    time: str = ""  # ISO 8601, UTC; the log fills it in


class Start(Event, frozen=True, kw_only=True, tag="start"):
    """A sitting begins: a new run, or one that goes on."""

    device: str
    precision: str
    optimizers: str
    budget: int
    available: int
    argv: list[str]


class SkippedVideo(Event, frozen=True, kw_only=True, tag="skipped"):
    """A video that is annotated and cannot be used."""

    video: str
    path: str
    reason: str


class Data(Event, frozen=True, kw_only=True, tag="data"):
    """The data set is ready."""

    classes: list[str]
    skipped: int


class Measured(Event, frozen=True, kw_only=True, tag="measured"):
    """A trial step of the planner; `peak` None: memory ran out."""

    plan: str
    candidate: str
    peak: int | None
    budget: int
    predicted: int | None = None


class Planned(Event, frozen=True, kw_only=True, tag="plan"):
    """What the planner chose, by running candidates or by arithmetic."""

    plan: str
    chosen: str
    peak: int  # predicted, where it was not measured
    budget: int
    seconds: float
    measured: bool = True


class Step(Event, frozen=True, kw_only=True, tag="step"):
    """One optimiser step of any stage that trains.

    The fields after `waited` are those of a LoFi step: the plan that it ran under, and its memory as it was predicted
    and measured.
    """

    stage: str
    epoch: int
    step: int
    loss: Number
    lr: float | None = None
    terms: Mapping[str, Number] = {}  # of the loss, by name, as they are added up in it
    accuracy: Number = None  # share of the clips named right, in this epoch so far
    videos: list[str] = []
    steps: int = 0  # of its epoch
    samples: int = 0  # that it took: windows of videos, or clips in pretraining
    waited: float = 0.0  # seconds, for frames

    pattern: str | None = None
    num_snippets: int = 0
    side: int = 0
    micro_batch: int = 0  # videos in memory at once
    chunk: int = 0  # snippets in one graph of the encoder; 0: as many as the device takes by default
    recompute: bool = False
    reduced_from: list[int] | None = None  # [num_snippets, side] that the frames were decoded at, where it was higher
    predicted: int = 0  # peak of the step
    peak: int | None = None  # as measured
    base: int = 0  # held before the step
    limit: int = 0  # the smaller of the budget and what others left
    room: int = 0  # what of the limit could be planned with
    free: int = 0  # on the whole device
    budget: int = 0
    retries: int = 0  # how often memory ran out before the step went through
    reason: str = ""  # why this plan was chosen


class OutOfMemory(Event, frozen=True, kw_only=True, tag="out_of_memory"):
    """A step ran out of memory, and is taken again with the same videos by a lower plan.

    `plan` and `next` are the two plans, as `Plan.to_json` writes them.
    """

    stage: str
    epoch: int
    step: int
    reason: str
    peak: int | None
    plan: list[int]
    next: list[int]
    limit: int


class NotFinite(Event, frozen=True, kw_only=True, tag="not_finite"):
    """A step whose loss or gradient was not finite: nothing was updated.

    `in_a_row` counts it together with the steps of that kind that came directly before it.
    """

    stage: str
    epoch: int
    step: int
    what: str  # "loss" or "gradient"
    videos: list[str]
    in_a_row: int


class Saved(Event, frozen=True, kw_only=True, tag="saved"):
    """A checkpoint was written, from which the run can go on at this step."""

    stage: str
    epoch: int
    step: int


class Epoch(Event, frozen=True, kw_only=True, tag="epoch"):
    """An epoch of pretraining is done; `accuracy` is the share of its clips that were named right."""

    stage: str
    epoch: int
    accuracy: Number


class Validation(Event, frozen=True, kw_only=True, tag="validation"):
    """mAP of the validation videos after an epoch, from 0 to 1; `map` has one value for each tIoU of the run."""

    stage: str
    epoch: int
    average: Number
    map: list[Number]
    measure: str = ""  # what the average is over, as flags say it; a resumed run may be scored by another


class Features(Event, frozen=True, kw_only=True, tag="features"):
    """Features of `windows` windows were made, `chunk` snippets at once; `encoder` is a digest of its weights."""

    windows: int
    chunk: int
    encoder: str


class Metrics(Event, frozen=True, kw_only=True, tag="metrics"):
    """The content of metrics.json: mAP of the final weights on the validation videos, from 0 to 1."""

    average_map: Number
    map_by_tiou: dict[str, Number]
    average_precision: dict[str, list[Number]]  # of each class, one value for each tIoU, or tolerance
    best_epoch: dict[str, Number] | None  # "epoch" and "average" of the best validation; checkpoints/best.pt holds it
    videos: int
    segments: int
    # Against all videos and segments of the annotation file as they stand there, which is the official measure; None
    # where the file is no ActivityNet JSON.
    average_map_as_given: Number = None
    map_by_tolerance: dict[str, Number] = {}  # in seconds, where points were looked for; `map_by_tiou` is empty then
    epoch: int | None = None  # of the head stage, whose weights these numbers are of: its last


class Done(Event, frozen=True, kw_only=True, tag="done"):
    """The run came to its end, `seconds` after this sitting began to train."""

    seconds: float


AnyEvent = (
    Start | SkippedVideo | Data | Measured | Planned | Step | OutOfMemory | NotFinite | Saved | Epoch | Validation
    | Features | Metrics | Done
)  # fmt: skip

_decoder = msgspec.json.Decoder(AnyEvent)


class _Kind(msgspec.Struct):
    event: str


_kind_decoder = msgspec.json.Decoder(_Kind)
_KINDS = {kind.__struct_config__.tag for kind in get_args(AnyEvent)}


def encode(event: Event) -> bytes:
    """One line, with its end; the time is now's."""
    now = datetime.now(UTC).isoformat(timespec="milliseconds")
    return json_bytes(msgspec.structs.replace(event, time=now)) + b"\n"


def decode(line: str | bytes) -> AnyEvent | None:
    """The event of a line; None for a kind of event that this version does not know.

    Raises ValueError for what is no event, or lacks what its kind has.
    """
    try:
        event: AnyEvent = _decoder.decode(line)
    except (msgspec.MsgspecError, UnicodeError, RecursionError) as error:
        if _kind(line) not in (None, *_KINDS):
            return None
        raise ValueError(str(error)) from None
    return event


def _kind(line: str | bytes) -> str | None:
    try:
        return _kind_decoder.decode(line).event
    except (msgspec.MsgspecError, UnicodeError, RecursionError):
        return None


def read(lines: Iterable[str], unreadable: list[str] | None = None) -> Iterator[AnyEvent]:
    """The events of a log, without those of kinds that this version does not know.

    A line that a killed run left torn is passed over, and appended to `unreadable`; an event that was written behind
    it on the same line is found.
    """
    for line in lines:
        try:
            event = decode(line)
        except ValueError:
            if not line.strip():
                continue
            if unreadable is not None:
                unreadable.append(line)
            begins = max(line.rfind('{"event"'), line.rfind('{"time"'))
            try:
                event = decode(line[begins:]) if begins > 0 else None
            except ValueError:
                event = None
        if event is not None:
            yield event

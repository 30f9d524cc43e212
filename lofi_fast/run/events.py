"""What a run logs: one typed record for each kind of event. What is written is what is read.

log.jsonl holds one JSON object a line: "event" names the kind, "time" is UTC, the rest are the record's fields. A
number that is not finite is written as null, because JSON has no other word for it. The log, the report, the replay of
another run's rungs and the benchmarks all go through this file.

Amounts of memory are bytes, times are seconds.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from datetime import UTC, datetime
from typing import Any

import msgspec

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
    """What the planner chose by running candidates."""

    plan: str
    chosen: str
    peak: int
    budget: int
    seconds: float


class Step(Event, frozen=True, kw_only=True, tag="step"):
    """One optimiser step of any stage that trains. What follows `videos` is a LoFi step's: the plan that it ran under,
    and what was predicted and measured of its memory.
    """

    stage: str
    epoch: int
    step: int
    loss: Number
    lr: float | None = None
    terms: Mapping[str, Number] = {}  # of the loss, by name, as they enter it
    accuracy: Number = None  # of clips, in this epoch so far
    videos: list[str] = []

    pattern: str | None = None
    num_snippets: int = 0
    side: int = 0
    micro_batch: int = 0
    recompute: bool = False
    chunk: int = 0  # snippets in one graph of the encoder; 0: not recorded
    reduced_from: list[int] | None = None  # [num_snippets, side] that the frames were decoded at, where it was higher
    predicted: int = 0
    peak: int | None = None
    base: int = 0
    limit: int = 0
    room: int = 0
    free: int = 0
    budget: int = 0
    retries: int = 0  # how often memory ran out before it went through
    reason: str = ""  # for this plan


class OutOfMemory(Event, frozen=True, kw_only=True, tag="out_of_memory"):
    """A step ran out of memory, and is taken again by a lower plan. Plans as `Plan.to_json` writes them."""

    stage: str
    epoch: int
    step: int
    reason: str
    peak: int | None
    plan: list[int]
    next: list[int]
    limit: int


class NotFinite(Event, frozen=True, kw_only=True, tag="not_finite"):
    """A step whose loss or gradient was not finite: nothing was updated. `in_a_row` counts it and those before it."""

    stage: str
    epoch: int
    step: int
    what: str  # "loss" or "gradient"
    videos: list[str]
    in_a_row: int


class Epoch(Event, frozen=True, kw_only=True, tag="epoch"):
    """An epoch of the encoder on clips is done."""

    stage: str
    epoch: int
    accuracy: Number


class Validation(Event, frozen=True, kw_only=True, tag="validation"):
    """mAP of the validation videos after an epoch; `map` by tIoU."""

    stage: str
    epoch: int
    average: float
    map: list[float]


class Features(Event, frozen=True, kw_only=True, tag="features"):
    """Features of so many windows were made, `chunk` snippets at once; `encoder` is a digest of its weights."""

    windows: int
    chunk: int
    encoder: str


class Metrics(Event, frozen=True, kw_only=True, tag="metrics"):
    """The content of metrics.json."""

    average_map: float
    map_by_tiou: dict[str, float]
    average_precision: dict[str, list[float]]
    best_epoch: dict[str, Any] | None
    videos: int
    segments: int


class Done(Event, frozen=True, kw_only=True, tag="done"):
    """The run came to its end, `seconds` after this sitting began to train."""

    seconds: float


AnyEvent = (
    Start | SkippedVideo | Data | Measured | Planned | Step | OutOfMemory | NotFinite | Epoch | Validation | Features
    | Metrics | Done
)  # fmt: skip

_encoder = msgspec.json.Encoder(enc_hook=lambda value: value.item())  # numbers of NumPy
_decoder = msgspec.json.Decoder(AnyEvent)


def encode(event: Event) -> bytes:
    """One line, with its end; the time is now's."""
    now = datetime.now(UTC).isoformat(timespec="milliseconds")
    return _encoder.encode(msgspec.structs.replace(event, time=now)) + b"\n"


def decode(line: str | bytes) -> AnyEvent:
    """The event of a line. Raises ValueError for what `encode` did not write."""
    try:
        event: AnyEvent = _decoder.decode(line)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(str(error)) from None
    return event


def read(lines: Iterable[str]) -> Iterator[AnyEvent]:
    """The events of a log; a line that a killed run left torn is passed over."""
    for line in lines:
        try:
            yield decode(line)
        except ValueError:
            continue

"""The command `check`, and `lofi_fast.check`: all that can be known of labels and videos before training.

    lofi-fast check --annotations a.json --videos v/

It decodes a few pictures at most and answers in seconds; `train` begins with the same, but for the size of the cache.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

from rich.console import Console

from lofi_fast.budget import check_budget
from lofi_fast.command import CallableModule, given, run
from lofi_fast.config import Config
from lofi_fast.data.cache_size import cache_bytes
from lofi_fast.data.grid import FOUND, best_tiou
from lofi_fast.data.survey import Survey, Surveyed, overlaps, survey, times_of
from lofi_fast.errors import InputError, printable
from lofi_fast.presets import FILE, configured, preset_note, shown_defaults, unread_settings, weights_warning
from lofi_fast.run.log import Terminal
from lofi_fast.settings import Section, Setting, read

DESCRIPTION = (
    "What labels and videos say of each other, before anything is decoded: which file each name means, times that do "
    "not fit, labels that overlap, which actions the windows can express, the size of the frame cache. Takes the flags "
    "of lofi-fast train too. The status is 0 when a training could start."
)
ROWS = 200  # of the table of videos, on a terminal


@dataclass(frozen=True)
class CheckFlags:
    """What the command line may say: how to print, and every setting of a run."""

    settings: Annotated[Config, Section("settings", flat=True)]
    json: Annotated[bool, Setting("for programs", group="check")] = False
    config: Annotated[Path | None, FILE] = None


@dataclass(frozen=True)
class Checked:
    """A survey of the data, and what is to be said of it. `refused`: why no training can start, or None. `cache`: bytes
    that the frame cache will hold, by name of the video.
    """

    survey: Survey | None  # None where the labels cannot be read
    notes: tuple[str, ...]
    refused: str | None
    cache: Mapping[str, int] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """All of it, for programs: times in seconds, sizes in bytes."""
        found = self.survey
        videos = {} if found is None else {one.name: _video(found, one, self.cache[one.name]) for one in found.videos}
        content: dict[str, Any] = {
            "videos": videos,
            "skipped": [] if found is None else [{"name": s.name, "reason": s.reason} for s in found.skipped],
            "notes": list(self.notes),
            f"found_at_tiou_{FOUND:g}": sum(video[f"found_at_tiou_{FOUND:g}"] for video in videos.values()),
            "segments": sum(video["segments"] for video in videos.values()),
        }
        if self.refused is not None:
            content["refused"] = self.refused
        if found is None:
            return content
        training = [s for video in found.subset("training") for s in video.segments]
        return content | {
            "preset": found.config.preset,
            "window": _window(found.window),
            "num_snippets": found.config.full.num_snippets,
            "windows": [
                {
                    "window": _window(of.grid.window),
                    "training_segments": len(training),
                    f"found_at_tiou_{FOUND:g}": of.found,
                }
                for of in found.tried
            ],
            "subsets": {
                subset: {"videos": count, "segments": sum(classes.values()), "classes": dict(sorted(classes.items()))}
                for subset, (count, classes) in _subsets(found).items()
            },
            "duplicates": found.annotations.duplicates,
            "cache_bytes": sum(video["cache_bytes"] for video in videos.values()),
        }

    def text(self) -> str:
        """The same for people, with at most `ROWS` videos; those with something to say come first."""
        if self.survey is None:
            return ""
        content = self.to_json()
        lines = [*_table(content["videos"]), ""]
        for skipped in content["skipped"]:
            lines.append(f"skipped: {skipped['name']}: {skipped['reason']}")
        for subset, of in content["subsets"].items():
            classes = ", ".join(f"{label} {count}" for label, count in of["classes"].items())
            lines.append(
                f"{subset}: {of['videos']} videos, {of['segments']} segments{f': {classes}' if classes else ''}"
            )
        found, segments, windows = content[f"found_at_tiou_{FOUND:g}"], content["segments"], content["windows"]
        if self.survey.config.points:
            lines.append(f"{segments} points in time can be found, to half a snippet ({self.survey.grid})")
            windows = []
        else:
            lines.append(f"{found} of {segments} segments can be found at tIoU {FOUND:g} ({self.survey.grid})")
        if windows:
            lines.append(
                f"training segments found with other windows, of {windows[0]['training_segments']}: "
                + ", ".join(f"{_shown(of['window'])} {of[f'found_at_tiou_{FOUND:g}']}" for of in windows)
            )
        lines.append(f"frame cache: about {content['cache_bytes'] / 1e6:,.1f} MB")
        lines += [note if note.startswith("WARNING") else f"note: {note}" for note in self.notes]
        return "\n".join(lines)


def check(*, config: str | Path | Config | None = None, **settings: Any) -> Checked:
    """Look at labels and videos as the command does: `lofi_fast.check(annotations="a.json", videos="v/").to_json()`.

    `config` and `settings` as `lofi_fast.train` takes them. What would be refused is in `Checked.refused`; raises
    InputError for settings that cannot be.
    """
    asked = read(Config, settings)
    if isinstance(config, Config):
        return _checked(configured(asked, base=config, cuda=_cuda), [], Terminal(Console(quiet=True)))
    file = None if config is None else Path(config)
    made = configured(asked, file=file, cuda=_cuda)
    return _checked(made, preset_note(asked, file, made), Terminal(Console(quiet=True)))


def _cuda() -> bool:
    import torch

    return torch.cuda.is_available()


def _checked(config: Config, told: Sequence[str], terminal: Terminal) -> Checked:
    if not config.data.annotations or not config.data.videos:
        raise InputError("check looks at your data: add --annotations FILE --videos DIR")
    notes = [*told, *unread_settings(config), *([warning] if (warning := weights_warning(config)) else [])]
    try:
        with terminal.progress("looking at the videos", 1) as advance:
            found = survey(
                config, Path(config.data.annotations), Path(config.data.videos),
                lambda done, total, name: advance(done, name, total),
            )  # fmt: skip
    except InputError as error:
        return Checked(None, tuple(notes), str(error))
    notes += [*found.warnings, *found.notes, *([large] if (large := found.large_batch()) else []), *_labels(found)]
    try:
        _rest(found)
    except InputError as error:
        found = replace(found, refused=found.refused or str(error))
    return Checked(found, tuple(notes), found.refused, cache_bytes(found))


def _rest(found: Survey) -> None:
    """What training refuses at its start beside the data. Raises InputError."""
    config = found.config
    check_budget(config.budget)
    found.check_scores()
    if config.encoder.weights:
        from lofi_fast.encoder import build
        from lofi_fast.encoder.weights import check_encoder_weights

        check_encoder_weights(lambda: build(config), Path(config.encoder.weights))


def _labels(found: Survey) -> list[str]:
    """Notes about labels that overlap."""
    each = {one.name: overlaps(one.labelled) for one in found.videos}
    notes = []
    if same := {name: of.same_label for name, of in each.items() if of.same_label}:
        first = next(iter(same))
        notes.append(
            f"{sum(same.values())} segments overlap an earlier one of the same label, in {len(same)} "
            f"video{'s' if len(same) > 1 else ''} such as {first}; was one action labelled twice?"
        )
    if several := sum(of.several_labels for of in each.values()):
        notes.append(f"{several} segments have several labels each, which are all taught")
    return notes


def _video(found: Survey, one: Surveyed, cache: int) -> dict[str, Any]:
    """One video, for programs."""
    segments, info = one.labelled.segments, one.info
    outside = sum(s.start >= info.duration > 0 or s.end <= 0 for s in segments if s.end > s.start)
    clipped = sum(s.end > info.duration or s.start < 0 for s in segments) - outside
    among = overlaps(one.labelled)
    near = best_tiou(times_of([(one, one.video)]), found.grid)
    return {
        "file": str(info.path),
        "subset": one.video.subset,
        "duration": round(info.duration, 3),
        "duration_annotated": one.labelled.duration,
        "clock_offset": round(info.start, 3),
        "frames": len(info.pts),
        "frames_lost": info.lost or 0,
        "fps": round(info.fps, 3),
        "width": info.width,
        "height": info.height,
        "codec": info.codec,
        "segments": len(segments),
        "outside": outside,
        "clipped": clipped,
        "overlapping": among.same_label,
        "several_labels": among.several_labels,
        f"found_at_tiou_{FOUND:g}": int((near >= FOUND).sum()),
        "windows": len(found.windows[one.name]),
        "cache_bytes": cache,
        "notes": list(one.repairs),
    }


def _subsets(found: Survey) -> dict[str, tuple[int, Counter[str]]]:
    """subset -> (videos, segments by class), of the videos that can be used, and of those that are left alone."""
    counts: dict[str, tuple[int, Counter[str]]] = {}
    used = {one.name for one in found.videos}
    alone = [v for v in found.annotations.subset("testing") if v.name not in used]
    for video in [one.video for one in found.videos] + alone:
        number, classes = counts.get(video.subset, (0, Counter()))
        counts[video.subset] = (number + 1, classes + Counter(segment.label for segment in video.segments))
    return counts


def _window(window: float | None) -> float | str:
    return "video" if window is None else window


def _shown(window: float | str) -> str:
    return window if isinstance(window, str) else f"{window:g} s:"


def _table(videos: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """The videos in columns."""
    key = f"found_at_tiou_{FOUND:g}"
    odd = {
        name: of["outside"] + of["clipped"] + of["overlapping"] + of["frames_lost"] + (of["segments"] - of[key])
        for name, of in videos.items()
    }
    chosen = sorted(videos, key=lambda name: not odd[name]) if len(videos) > ROWS else list(videos)
    head = ("video", "subset", "seconds", "labels say", "begins", "segments", "outside", "clipped", "found", "windows",
            "file")  # fmt: skip
    rows = [head]
    for name in chosen[:ROWS]:
        of = videos[name]
        told = "" if of["duration_annotated"] is None else f"{of['duration_annotated']:.2f}"
        numbers = (of["segments"], of["outside"] or "", of["clipped"] or "", of[key], of["windows"])
        rows.append((
            printable(name), of["subset"], f"{of['duration']:.2f}", told, f"{of['clock_offset']:.2f}",
            *map(str, numbers), printable(of["file"]),
        ))  # fmt: skip
    widths = [min(max(len(row[k]) for row in rows), 40) for k in range(len(head))]
    lines = [
        "  ".join(
            text.ljust(width) if k in (0, 1, len(head) - 1) else text.rjust(width)
            for k, (text, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
    if len(videos) > ROWS:
        lines.append(f"... and {len(videos) - ROWS} more videos, which --json lists")
    return lines


def main(argv: Sequence[str] | None = None) -> int:
    """Print what is known; 0 when a training could start, 2 when it would be refused."""
    return run(lambda: _command(argv))


def _command(argv: Sequence[str] | None) -> int:
    words = given(CheckFlags, argv, prog="lofi-fast check", description=DESCRIPTION, shown=_shown_defaults)
    own = read(CheckFlags, {name: words.pop(name) for name in ("json", "config") if name in words})
    config = configured(words, file=own.get("config"), cuda=_cuda)
    told = preset_note(words, own.get("config"), config)
    checked = _checked(config, told, Terminal(Console(stderr=True, highlight=False, soft_wrap=True)))
    if own.get("json"):
        print(json.dumps(checked.to_json(), indent=1))
    elif checked.survey is not None:
        print(printable(checked.text()))
    sys.stdout.flush()
    if checked.refused is not None:
        raise InputError(checked.refused)
    return 0


def _shown_defaults(words: Mapping[str, Any]) -> CheckFlags:
    return CheckFlags(shown_defaults(words, "small"))


sys.modules[__name__].__class__ = CallableModule

if __name__ == "__main__":
    sys.exit(main())

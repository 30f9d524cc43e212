"""Subtitles, SubRip (.srt) and WebVTT (.vtt): a cue is a segment, and its text the label, without a score behind it as
`detect` writes one. A file is a video and has its name. No subsets.
"""

from __future__ import annotations

import html
import re

from lofi_fast.data.formats.file import Gathered, LabelFile
from lofi_fast.data.labels import Video
from lofi_fast.errors import InputError

NAME = "subtitles"
OPTIONS = frozenset[str]()
_TIME = r"((?:\d+:)?\d{1,2}:\d{2}(?:[.,]\d+)?)"
_CUE = re.compile(rf"^[ \t]*{_TIME}[ \t]*-->[ \t]*{_TIME}(?:[ \t][^\n]*)?$", re.MULTILINE)
_LIKE_A_CUE = re.compile(r"^[ \t]*-?\d[\d:.,]*[ \t]*-->[^\n]*$", re.MULTILINE)
_SCORE = re.compile(r"\s+[01]\.\d{2}$")


def recognises(text: str) -> bool:
    return text.startswith("WEBVTT") or (
        re.match(r"\s*\d+[ \t]*\r?\n", text) is not None and bool(_CUE.search(text[:2000]))
    )


def read(file: LabelFile) -> list[Video]:
    """Raises InputError, which names the line, for a cue without text, or with times that are none."""
    name, text = file.path.stem, file.text.replace("\r\n", "\n")
    found = Gathered(file)
    found.video(name, f"{file.path}: video {name}")
    cues = list(_LIKE_A_CUE.finditer(text))
    for number, like in enumerate(cues):
        line = text.count("\n", 0, like.start()) + 1
        cue = _CUE.fullmatch(like[0])
        if cue is None:
            raise InputError(
                f"{file.path} line {line}: {like[0].strip()!r} is no time of a cue; write it as 00:01:02,500 --> "
                "00:01:04,000"
            )
        rest = text[like.end() :]
        if cues[number + 1 :]:  # the next one's number may follow without an empty line
            rest = re.sub(r"\n[ \t]*\d+[ \t]*\n$", "\n", text[like.end() : cues[number + 1].start()])
        lines = re.match(r"\n((?:[^\n]*\S[^\n]*\n?)*)", rest)
        words = " ".join(lines[1].split()) if lines else ""
        if text.startswith("WEBVTT"):
            words = html.unescape(re.sub(r"<[^>]*>", "", words))
        label = _SCORE.sub("", words)
        found.segment(name, cue[1], cue[2], label, f"{file.path} line {line}: video {name}")
    file.note(f"read as {NAME}: the video is named like the file; no subsets")
    return found.videos()

"""Subtitles, SubRip (.srt) and WebVTT (.vtt): a cue is a segment, and its text the label, without a score behind it as
`detect` writes one. A file is a video and has its name. No subsets.
"""

from __future__ import annotations

import html
import re

from lofi_fast.data.formats.file import Gathered, LabelFile
from lofi_fast.data.labels import Video

NAME = "subtitles"
OPTIONS = frozenset[str]()
_CUE = re.compile(
    r"^[ \t]*((?:\d+:)?\d{1,2}:\d{2}[.,]\d{1,3})[ \t]+-->[ \t]+((?:\d+:)?\d{1,2}:\d{2}[.,]\d{1,3})[^\n]*$", re.MULTILINE
)
_SCORE = re.compile(r"\s+[01]\.\d{2}$")


def recognises(text: str) -> bool:
    return text.startswith("WEBVTT") or (
        re.match(r"\s*\d+[ \t]*\r?\n", text) is not None and bool(_CUE.search(text[:2000]))
    )


def read(file: LabelFile) -> list[Video]:
    """Raises InputError, which names the line, for a cue without text."""
    name, text = file.path.stem, file.text.replace("\r\n", "\n")
    found = Gathered(file)
    found.video(name, f"{file.path}: video {name}")
    for cue in _CUE.finditer(text):
        line = text.count("\n", 0, cue.start()) + 1
        lines = re.match(r"\n((?:[^\n]*\S[^\n]*\n?)*)", text[cue.end() :])
        words = " ".join(lines[1].split()) if lines else ""
        if text.startswith("WEBVTT"):
            words = html.unescape(re.sub(r"<[^>]*>", "", words))
        label = _SCORE.sub("", words)
        found.segment(name, cue[1], cue[2], label, f"{file.path} line {line}: video {name}")
    file.note(f"read as {NAME}: the video is named like the file; no subsets")
    return found.videos()

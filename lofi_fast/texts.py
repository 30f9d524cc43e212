"""Texts that users' programs write: how they are encoded, and JSON in which no key may stand twice."""

from __future__ import annotations

import codecs
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lofi_fast.errors import InputError


def decoded(path: Path) -> str:
    """A text in UTF-8, or in UTF-16 with its mark, as some spreadsheets write; a byte order mark would become part of
    the first column's name. Raises OSError and UnicodeDecodeError.
    """
    with path.open("rb") as file:
        mark = file.read(2)
    is_utf_16 = mark in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
    return path.read_text(encoding="utf-16" if is_utf_16 else "utf-8-sig")


def once_each(path: Path, ending: str = "") -> Callable[[list[tuple[str, Any]]], dict[str, Any]]:
    """json's `object_pairs_hook` that refuses a key which stands twice: json keeps the last, and a video would be lost
    without a word. `ending`: of the sentence.
    """

    def checked(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            twice = next(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
            raise InputError(f"{path}: the key {twice!r} appears twice in one object{ending}")
        return found

    return checked

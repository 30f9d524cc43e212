"""Files damaged at random: by a disk (bytes), or by a program or a hand that meant something else (other
values).

Every mutation is a function of a generator and the bytes of a whole file, so a seed gives the same damage again.
"""

from __future__ import annotations

import io
import json
import re
from collections.abc import Callable
from copy import deepcopy
from random import Random
from typing import Any

import numpy as np

Mutation = Callable[[Random, bytes], bytes]

# What may stand where something else was expected, as a file has it.
HOSTILE = (
    b"9" * 5000, b"1" + b"0" * 400, b"-1e999", b"1e308", b"NaN", b"-Infinity", b'"\\ud800"', b'"\\udcff"', b'"\xff"',
    b'""', b"null", b"true", b"[]", b"{}", b"[" * 3000, b'{"a":' * 3000, b'"a\\u0000b"', b"\x00", b'"', b"\xef\xbb\xbf",
    b"-0", b"\r", b",", b"1_000", b"0x10", b"2026-11-26", b"inf", b"--", b"\xe2\x80\xa8",
)  # fmt: skip

# The same as values of a parsed file.
VALUES: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 2**31, 2**63, 2**64, -(2**63) - 1, 10**400, 0.5, -0.0, 1e308, float("inf"),
    float("-inf"), float("nan"), "", "0", "1e999", "nan", "none", "\ud800", "\udcff", "a\x00b", "\x1b[2J", "../..",
    "é" * 300,
    "x" * 100_000, "00:00:61", "1,5", [], {}, [[]], [None], [1, 2, 3], {"": 0}, {"segment": [0, 1]}, [0] * 1000,
)  # fmt: skip


def damaged_bytes(rng: Random, whole: bytes) -> bytes:
    """What a disk or a broken transfer does: flipped bits, a block of zeros, a lost end, pieces lost or doubled."""
    content = bytearray(whole)
    for _ in range(rng.choice((1, 1, 1, 2, 5))):
        at = rng.randrange(len(content) + 1)
        upto = min(at + rng.choice((1, 2, 8, 64, 512)), len(content))
        match rng.randrange(7):
            case 0:
                for _ in range(rng.choice((1, 1, 3, 50))):
                    if content:
                        content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
            case 1:
                content[at:upto] = bytes(upto - at)
            case 2:
                del content[at:]
            case 3:
                del content[at:upto]
            case 4:
                content[at:at] = content[at:upto]
            case 5:
                content[at:upto] = rng.randbytes(upto - at)
            case _:
                content[at:upto] = rng.choice(HOSTILE)
    return bytes(content)


def damaged_text(rng: Random, whole: bytes) -> bytes:
    """A value, or what stands between two marks, replaced by something hostile."""
    places = [match.span() for match in re.finditer(rb"[^\[\]{}:,;=\t\n\r]+", whole)]
    if not places:
        return damaged_bytes(rng, whole)
    begin, end = rng.choice(places)
    return whole[:begin] + rng.choice(HOSTILE) + whole[end:]


def damaged_json(rng: Random, whole: bytes) -> bytes:
    """Some values of a JSON file replaced, dropped, doubled, wrapped, renamed, or of another type."""
    return json.dumps(damaged_value(rng, json.loads(whole)), ensure_ascii=rng.random() < 0.8).encode(
        errors="surrogatepass"
    )


def damaged_lines(rng: Random, whole: bytes) -> bytes:
    """The same in one of many JSON lines; or lines lost, doubled, torn."""
    lines = whole.splitlines()
    at = rng.randrange(len(lines))
    match rng.randrange(5):
        case 0:
            del lines[at]
        case 1:
            lines.insert(rng.randrange(len(lines)), lines[at])
        case 2:
            lines[at] = lines[at][: rng.randrange(len(lines[at]) + 1)]
        case _:
            lines[at] = damaged_json(rng, lines[at])
    return b"\n".join(lines) + b"\n"


def damaged_value(rng: Random, tree: Any) -> Any:
    """A copy of a parsed JSON value, with one to three places changed."""
    tree = json.loads(json.dumps(tree))
    for _ in range(rng.choice((1, 1, 2, 3))):
        holders = _holders(tree)
        if not holders:
            return deepcopy(rng.choice(VALUES))
        holder = rng.choice(holders)
        key = rng.choice(list(holder)) if isinstance(holder, dict) else rng.randrange(len(holder))
        match rng.randrange(6):
            case 0:
                del holder[key]
            case 1 if isinstance(holder, dict):
                name = rng.choice(("", "x", "\udcff", "a/b", "..", key.upper(), f"{key} ", "y" * 300))
                holder[name] = holder.pop(key)
            case 1:
                holder.append(holder[key])
            case 2:
                for _ in range(rng.choice((1, 2, 150))):
                    holder[key] = [holder[key]] if rng.random() < 0.5 else {"a": holder[key]}
            case 3:
                value = holder[key]
                holder[key] = value[::-1] if isinstance(value, str | list) else json.dumps(value)
            case _:
                holder[key] = deepcopy(rng.choice(VALUES))
    return tree


def _holders(tree: Any) -> list[Any]:
    """All objects and lists of a JSON value that hold something."""
    found, waiting = [], [tree]
    while waiting:
        value = waiting.pop()
        if isinstance(value, dict | list) and value:
            found.append(value)
            waiting += value.values() if isinstance(value, dict) else value
    return found


def damaged_array(rng: Random, array: np.ndarray) -> np.ndarray:
    """An array of another type, shape, order or content."""
    match rng.randrange(8):
        case 0:
            return array.astype(rng.choice(("f4", "f8", "i4", "u8", "S8", "U8", "c16", "?", "f2")))
        case 1:
            return array[None]
        case 2:
            return array.reshape(-1)[: rng.randrange(array.size + 1)]
        case 3:
            return array[::-1] if array.ndim else array
        case 4:
            return np.zeros_like(array) + rng.choice((0, 1))
        case 5:
            return np.array(rng.choice((0, -1, 2**40, 1.5)))
        case 6:
            return np.full(array.shape, np.nan) if array.dtype.kind == "f" else -array.astype(np.int64)
        case _:
            return np.zeros(array.shape, dtype=[("a", "i4"), ("b", "f8")])


def damaged_npy(rng: Random, whole: bytes) -> bytes:
    file = io.BytesIO()
    np.save(file, damaged_array(rng, np.load(io.BytesIO(whole))))
    return file.getvalue()


def damaged_npz(rng: Random, whole: bytes) -> bytes:
    with np.load(io.BytesIO(whole)) as index:
        arrays = dict(index)
    name = rng.choice(list(arrays))
    match rng.randrange(4):
        case 0:
            del arrays[name]
        case _:
            arrays[name] = damaged_array(rng, arrays[name])
    file = io.BytesIO()
    (np.savez_compressed if rng.random() < 0.1 else np.savez)(file, **arrays)
    return file.getvalue()


def damaged_safetensors(rng: Random, whole: bytes) -> bytes:
    """The header changed: the places of its tensors, or the metadata, whose settings and classes are JSON."""
    size = int.from_bytes(whole[:8], "little")
    header = json.loads(whole[8 : 8 + size])
    metadata = header["__metadata__"]
    match rng.randrange(4):
        case 0:
            header = damaged_value(rng, header)
        case 1:
            header["__metadata__"] = damaged_value(rng, metadata)
        case _:
            name = rng.choice(("settings", "classes"))
            metadata[name] = json.dumps(damaged_value(rng, json.loads(metadata[name])))
    text = json.dumps(header).encode(errors="surrogatepass")
    return len(text).to_bytes(8, "little") + text + whole[8 + size :]

"""Seeds: a function of a key, the same on every machine."""

from __future__ import annotations

import hashlib


def seed_of(*key: int | str) -> int:
    """A 63-bit seed of a key, the same on every machine."""
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1

"""The one way in which files of a run folder and of the cache are written: whole, or not at all.

A file is written beside its place as NAME.PID.partial, flushed to disk, then renamed. Another reader sees the old file
or the new one, and a killed process leaves at most a `.partial` that nothing reads.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

import msgspec

from lofi_fast.errors import InputError

DISK_FULL = (errno.ENOSPC, errno.EDQUOT)


@contextmanager
def replacing(path: Path) -> Iterator[IO[bytes]]:
    """A binary file to write to, which takes the place of `path` when the block ends without an error.

    The folder is made where it is not there. Raises InputError, naming the file and the reason, when it cannot be
    written; the old file stays.
    """
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with partial.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except OSError as error:
        reason = error.strerror or error  # NumPy's own OSError has no strerror
        raise InputError(f"{path}: cannot write ({reason}); free some space or change --out") from error
    finally:
        with suppress(OSError):
            partial.unlink(missing_ok=True)


def write_bytes(path: Path, content: bytes) -> Path:
    """Write `content`; see `replacing`."""
    with replacing(path) as file:
        file.write(content)
    return path


def write_json(path: Path, content: object) -> Path:
    """Write readable JSON; records and dataclasses are taken as they are. A number that is not finite becomes null."""
    encoded = msgspec.json.encode(content, enc_hook=lambda value: value.item())  # NumPy's numbers
    return write_bytes(path, msgspec.json.format(encoded, indent=1) + b"\n")

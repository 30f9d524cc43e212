"""The one way in which files of a run folder and of the cache are written: whole, or not at all.

A file is written beside its place as NAME.PID.partial, flushed to disk, then renamed. Another reader sees the old file
or the new one, and a killed process leaves at most a `.partial` that nothing reads, until `sweep` removes it.
"""

from __future__ import annotations

import errno
import hashlib
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

import msgspec

from lofi_fast.errors import InputError

DISK_FULL = (errno.ENOSPC, errno.EDQUOT)


@contextmanager
def replacing(path: Path, before: Path | None = None) -> Iterator[IO[bytes]]:
    """A binary file to write and read, which takes the place of `path` when the block ends without an error.

    The old file is kept under the name `before`, in the same folder, where one is given. The folder is made where it is
    not there. Raises InputError, naming the file and the reason, when it cannot be written; the old file stays.
    """
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with partial.open("w+b") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        if before is not None and path.exists():
            _keep(path, before)
        partial.replace(path)
    except OSError as error:
        raise InputError(f"{path}: cannot write ({reason_of(error, path)}); {mend_of(error)}") from error
    finally:
        with suppress(OSError):
            partial.unlink(missing_ok=True)


def reason_of(error: OSError, path: Path) -> str:
    """Why `path` could not be written, in words."""
    try:
        blocks = next((folder for folder in path.parents if os.path.lexists(folder) and not folder.is_dir()), None)
    except OSError:  # a folder that this user may not look into
        blocks = None
    if blocks is not None:  # the system says "File exists" or "Not a directory"
        return f"{blocks} is a file, not a folder" if blocks.exists() else f"{blocks} is a link that leads nowhere"
    return str(error.strerror or error)  # NumPy's own OSError has no strerror


def mend_of(error: OSError) -> str:
    """What to do about it."""
    return "free some space or change --out" if error.errno in DISK_FULL else "name another place"


def _keep(path: Path, before: Path) -> None:
    """Give the file the name `before` as well, in place of what has it now. Raises OSError."""
    second = before.with_name(f"{before.name}.{os.getpid()}.partial")
    try:
        second.unlink(missing_ok=True)
        os.link(path, second)
    except OSError:  # a file system without hard links: until the new file is there, the old one has only this name
        path.replace(before)
        return
    second.replace(before)
    second.unlink(missing_ok=True)  # it is still there where both names belonged to one file already


def write_bytes(path: Path, content: bytes) -> Path:
    """Write `content`; see `replacing`."""
    with replacing(path) as file:
        file.write(content)
    return path


def write_json(path: Path, content: object) -> Path:
    """Write readable JSON of what `json_bytes` takes."""
    return write_bytes(path, msgspec.json.format(json_bytes(content), indent=1) + b"\n")


def json_bytes(content: object) -> bytes:
    """JSON of records, dataclasses, builtins and NumPy's numbers, valid whatever they hold.

    A number that is not finite becomes null. Lone surrogates, by which Python holds those bytes of a file name that are
    no text, become escapes.
    """
    try:
        return _json.encode(content)
    except UnicodeEncodeError:
        return _json.encode(_readable(msgspec.to_builtins(content, enc_hook=_number)))


def _number(value: Any) -> Any:
    """The Python number of one of NumPy's. Raises TypeError for what JSON has no form for."""
    if not hasattr(value, "item"):
        raise TypeError(f"{type(value).__name__} cannot be written as JSON")
    return value.item()


_json = msgspec.json.Encoder(enc_hook=_number)


def _readable(value: object) -> object:
    """The same with each lone surrogate of a text written out, like \\udcff."""
    if isinstance(value, str):
        return value.encode(errors="backslashreplace").decode()
    if isinstance(value, dict):
        return {_readable(key): _readable(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_readable(item) for item in value]
    return value


def sha256_of(path: Path) -> str:
    """By which a file is known, whatever its name. Raises OSError."""
    with path.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


def sweep(folder: Path) -> None:
    """Remove the `.partial` files that processes of this machine left in `folder` when they were killed."""
    for partial in folder.glob("*.partial"):
        with suppress(OSError):
            if not is_alive(partial.name.split(".")[-2]):
                partial.unlink()


def is_alive(pid: str) -> bool:
    """Whether a process of this machine has the number `pid`."""
    try:
        os.kill(int(pid), 0)
    except PermissionError:  # another user's
        return True
    except (ValueError, OverflowError, ProcessLookupError):
        return False
    return True


@contextmanager
def output_folder(out: Path) -> Iterator[None]:
    """Make the folder of --out and see that it can be written to; gone again if nothing was written.

    Raises InputError where it cannot.
    """
    made = [folder for folder in (out, *out.parents) if not folder.exists()]
    probe = out / f"{os.getpid()}.partial"
    try:
        out.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink()
    except OSError as error:
        _remove_empty(made)
        raise InputError(f"--out {out}: cannot write there ({reason_of(error, probe)}); name another folder") from None
    try:
        yield
    finally:
        _remove_empty(made)


def check_output(out: Path) -> None:
    """Raises InputError for an --out that cannot be written to, before anything is done for it. One of several
    processes would take away the folder that another has found, and leaves it to `output_folder`.
    """
    if os.environ.get("WORLD_SIZE", "1") == "1":
        with output_folder(out):
            pass


def _remove_empty(folders: Sequence[Path]) -> None:
    with suppress(OSError):
        for folder in folders:
            folder.rmdir()

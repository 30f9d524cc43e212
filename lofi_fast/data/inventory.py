"""What a frame cache holds, which runs use it, and what may go.

Every run that begins with entries of a cache leaves a list of them in its folder `uses/`, from which `lofi-fast prepare
--list` and `--clean-run` know whose they are. Entries are removed index first: one without an index is no entry.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from lofi_fast.config import Config
from lofi_fast.errors import InputError
from lofi_fast.files import write_bytes

USES = "uses"
_ENTRY = re.compile(r"(?P<stem>.*-[0-9a-f]{10})\.(?:npz|mov)", re.DOTALL)


@dataclass(frozen=True)
class Entry:
    """One entry. bytes: of both its files. used: when a run last began with it, or when it was made, in seconds since
    1970. runs: folders of the runs that have begun with it.
    """

    stem: Path  # of its two files, without their suffixes
    bytes: int
    used: float
    runs: tuple[str, ...]


def cache_folder(config: Config) -> Path:
    """Where the frame cache is, and what else is worth keeping for the next run: --cache, or beside the run folder."""
    return Path(config.data.cache) if config.data.cache else Path(config.out).parent / "cache"


def record_use(cache: Path, run: Path, entries: Iterable[Path]) -> None:
    """Leave word that the run in the folder `run` uses `entries` (the paths of their pictures). A cache that this user
    may only read gets none.
    """
    where = str(run.absolute())
    lines = [where, *sorted(path.stem for path in entries)]
    name = hashlib.sha256(os.fsencode(where)).hexdigest()[:16]
    with contextlib.suppress(InputError):
        write_bytes(cache / USES / name, "\n".join(lines).encode("utf-8", "surrogateescape"))


def inventory(cache: Path) -> list[Entry]:
    """Every complete entry of a cache, by name; and files that lost their other half, as entries of no run.

    Raises InputError where there is no cache.
    """
    if not cache.is_dir():
        raise InputError(f"{cache}: there is no frame cache; --cache names the folder that train was given")
    runs: dict[str, list[str]] = {}
    last: dict[str, float] = {}
    for use in sorted((cache / USES).glob("*")):
        with contextlib.suppress(OSError):
            when = use.stat().st_mtime
            where, *stems = use.read_bytes().decode("utf-8", "surrogateescape").split("\n")
            for stem in stems:
                runs.setdefault(stem, []).append(where)
                last[stem] = max(when, last.get(stem, 0.0))
    sizes: dict[Path, int] = {}
    made: dict[Path, float] = {}
    for folder in (cache, *sorted(cache.glob("[0-9a-f][0-9a-f]"))):
        with os.scandir(folder) as found:
            for file in found:
                if entry := _ENTRY.fullmatch(file.name):
                    status = file.stat()
                    both = folder / entry["stem"]
                    sizes[both] = sizes.get(both, 0) + status.st_size
                    made[both] = max(status.st_mtime, made.get(both, 0.0))
    return [
        Entry(stem, sizes[stem], max(made[stem], last.get(stem.name, 0.0)), tuple(runs.get(stem.name, ())))
        for stem in sorted(sizes)
    ]


def of_run(entries: Sequence[Entry], run: Path) -> list[Entry]:
    """The entries that a run has begun with, and no other run whose folder is still there.

    Raises InputError for a run that has left no word in this cache.
    """
    where = str(run.absolute())
    mine = [entry for entry in entries if where in entry.runs]
    if not mine:
        known = sorted({name for entry in entries for name in entry.runs})
        told = f"; those that use it are {', '.join(known)}" if known else ""
        raise InputError(f"--clean-run {run}: no run of this folder has used this frame cache{told}")
    return [entry for entry in mine if not any(Path(other).is_dir() for other in entry.runs if other != where)]


def remove(cache: Path, entries: Iterable[Entry]) -> None:
    """Remove entries, and the lists of runs that name no entry any more. Raises InputError where that is forbidden."""
    gone = set()
    try:
        for entry in entries:
            for suffix in (".npz", ".mov"):
                Path(f"{entry.stem}{suffix}").unlink(missing_ok=True)
            gone.add(entry.stem.name)
        if not gone:
            return
        left = {entry.stem.name for entry in inventory(cache)}
        for use in (cache / USES).glob("*"):
            stems = use.read_bytes().decode("utf-8", "surrogateescape").split("\n")[1:]
            if not left.intersection(stems):
                use.unlink(missing_ok=True)
    except OSError as error:
        raise InputError(f"{error.filename}: cannot be removed ({error.strerror})") from error

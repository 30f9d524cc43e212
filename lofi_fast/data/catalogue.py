"""What was found out about videos and cache entries, so that the next start need not open them again.

To probe a video means to read its packets, and to check an entry means to open its index: with tens of thousands of
videos that takes minutes. A catalogue holds the outcome beside the file's size and time of change, and what it says
counts only while these are the same. It is a set of files (NumPy's .npz) in the folder `known/` of the cache. Every
run that has found out something adds one, under a name of its own, so that any number of runs can add at once; when
there are many they are put together. A file that is not what was written, or of which a checksum is wrong, is left out.

Frame times of most videos are the beginning of one and the same series (30 frames a second, say), and are held once.
"""

from __future__ import annotations

import contextlib
import os
import time
import zlib
from collections.abc import Iterable
from fractions import Fraction
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple
from uuid import uuid4

import numpy as np
from numpy.typing import NDArray

from lofi_fast.data.video import VideoInfo
from lofi_fast.errors import InputError
from lofi_fast.files import replacing

FOLDER, SUFFIX = "known", ".catalogue"
_FORMAT = 1  # raise it when `probe` would find something else in the same file
MANY = 16  # files of a catalogue, from which on they are put together
FRESH = 2.0  # seconds after a change of a file in which another one could have the same time
_NONE = -1

_VIDEO = np.dtype([
    ("size", "<i8"), ("mtime_ns", "<i8"), ("start", "<f8"), ("duration", "<f8"), ("width", "<i4"), ("height", "<i4"),
    ("rotation", "<i2"), ("mirrored", "?"), ("codec", "<i2"), ("pixel_format", "<i2"), ("numerator", "<i8"),
    ("denominator", "<i8"), ("lost", "<i8"), ("stamped", "?"), ("times", "<i4"), ("times_n", "<i4"),
    ("keys", "<i4"), ("keys_n", "<i4"), ("places", "<i4"), ("places_n", "<i4"),
])  # fmt: skip
_ENTRY = np.dtype([("index", "<i8", (2,)), ("pictures", "<i8", (2,))])
Numbers = NDArray[np.int64]


class Stamps(NamedTuple):
    """Size (bytes) and time of change (ns) of an entry's two files, its index and its pictures."""

    of_index: tuple[int, int]
    of_pictures: tuple[int, int]

    @staticmethod
    def of(index: Path | str, pictures: Path | str) -> Stamps:
        """Raises OSError."""
        a, b = os.stat(index), os.stat(pictures)
        return Stamps((a.st_size, a.st_mtime_ns), (b.st_size, b.st_mtime_ns))


def real_path(path: Path) -> str:
    """The path without links, as `Path.resolve` gives it, in a tenth of the time where a folder has many files."""
    folder, name = os.path.split(path)
    if os.path.islink(path) or not name or name in (".", ".."):
        return os.path.realpath(path)
    try:
        status = os.stat(folder or ".")
    except OSError:
        return os.path.realpath(path)
    where = folder if os.path.isabs(folder) else os.path.join(os.getcwd(), folder)
    return os.path.join(_real_folder(where, status.st_dev, status.st_ino), name)


@lru_cache(65_536)
def _real_folder(folder: str, device: int, number: int) -> str:
    """`device` and `number` tell a folder from another one that has taken its path."""
    return os.path.realpath(folder)


class _Series:
    """Series of whole numbers, each held once; one that is the beginning of another is that other's beginning."""

    def __init__(self) -> None:
        self.series: list[Numbers] = []
        self._by_start: dict[tuple[int, ...], list[int]] = {}
        self._seconds: dict[tuple[int, int, int, float], NDArray[np.float64]] = {}

    def add(self, numbers: Numbers) -> tuple[int, int]:
        """(number of the series, length)."""
        key = tuple(numbers[:3].tolist())
        alike = self._by_start.setdefault(key, [])
        for number in alike[:8]:  # of many with one beginning a few are worth a comparison
            known = self.series[number]
            shared = min(len(known), len(numbers))
            if np.array_equal(known[:shared], numbers[:shared]):
                if len(numbers) > len(known):
                    self.series[number] = _fixed(numbers)
                return number, len(numbers)
        alike.append(len(self.series))
        self.series.append(_fixed(numbers))
        return len(self.series) - 1, len(numbers)

    def seconds(self, number: int, count: int, base: Fraction, start: float) -> NDArray[np.float64]:
        """The times of stamps as `probe` computes them, again one array for all that begin alike."""
        key = (number, base.numerator, base.denominator, start)
        known = self._seconds.get(key)
        if known is None or len(known) < count:
            stamps = self.series[number]
            known = (stamps - stamps[0]) * base.numerator / base.denominator
            known += start
            self._seconds[key] = _fixed(known)
        return known[:count]


def _fixed(array: Any) -> Any:
    array = np.ascontiguousarray(array)
    array.setflags(write=False)
    return array


class Catalogue:
    """See the file's beginning. `folder`: of the cache; None: nothing is known, and nothing kept."""

    def __init__(self, folder: Path | None = None) -> None:
        self._folder = None if folder is None else folder / FOLDER
        self._series = _Series()
        self._words: list[str] = []
        self._bases: dict[tuple[int, int], Fraction] = {}
        self._videos: dict[str, Any] = {}
        self._entries: dict[str, Stamps] = {}
        # grid -> real path of a video -> (its file then, stem of the entry)
        self._of_grid: dict[str, dict[str, tuple[int, str]]] = {}
        self._new_videos: set[str] = set()
        self._new_entries: set[str] = set()
        self._files: list[Path] = []
        if self._folder is not None:
            self._files = sorted(self._folder.glob(f"*{SUFFIX}"))
            for file in self._files:
                with contextlib.suppress(Exception):  # damaged bytes can make the reader of .npz raise anything
                    self._read(file)

    # Videos

    def info(self, path: Path) -> VideoInfo | None:
        """What is known of a video, if its file is the same as then."""
        row = self._videos.get(real_path(path)) if self._videos else None
        if row is None:
            return None
        try:
            status = os.stat(path)
        except OSError:
            return None
        if row["size"] != status.st_size or row["mtime_ns"] != status.st_mtime_ns:
            return None
        return self._made(path, row)

    def add_info(self, info: VideoInfo) -> VideoInfo:
        """Keep what was found out; returns the same, in less memory."""
        real = real_path(info.path)
        times, count = self._series.add(_bits(info.pts) if info.ticks is None else info.ticks)
        keys, num_keys = self._series.add(info.key_ticks)
        places, num_places = (_NONE, 0) if info.places is None else self._series.add(info.places)
        row = np.array(
            (
                info.size, info.mtime_ns, info.start, info.duration, info.width, info.height, info.rotation,
                info.mirrored, self._word(info.codec), self._word(info.pixel_format), info.time_base.numerator,
                info.time_base.denominator, _NONE if info.lost is None else info.lost, info.ticks is not None, times,
                count, keys, num_keys, places, num_places,
            ),
            dtype=_VIDEO,
        )[()]  # fmt: skip
        self._videos[real] = row
        self._new_videos.add(real)
        return self._made(info.path, row)

    def _word(self, text: str) -> int:
        if text not in self._words:
            self._words.append(text)
        return self._words.index(text)

    def _made(self, path: Path, row: Any) -> VideoInfo:
        (
            size, mtime_ns, start, duration, width, height, rotation, mirrored, codec, pixel_format, numerator,
            denominator, lost, stamped, times, count, keys, num_keys, places, num_places,
        ) = row.item()  # fmt: skip
        base = self._bases.setdefault((numerator, denominator), Fraction(numerator, denominator))
        series = self._series.series
        pts = self._series.seconds(times, count, base, start) if stamped else series[times].view(np.float64)[:count]
        return VideoInfo(
            path=path,
            pts=pts,
            duration=duration,
            width=width,
            height=height,
            rotation=rotation,
            codec=self._words[codec],
            pixel_format=self._words[pixel_format],
            size=size,
            mtime_ns=mtime_ns,
            time_base=base,
            ticks=series[times][:count] if stamped else None,
            key_ticks=series[keys][:num_keys],
            mirrored=mirrored,
            lost=None if lost == _NONE else lost,
            places=None if places == _NONE else series[places][:num_places],
        )

    # Entries

    def holds(self, stem: str, stamps: Stamps) -> bool:
        """Whether the entry was found to be complete when its files had these stamps."""
        return self._entries.get(stem) == stamps

    def stem_of(self, info: VideoInfo, grid: str) -> str | None:
        """The entry that a video was found to have for a grid of frames."""
        of_grid = self._of_grid.get(grid)
        found = of_grid.get(real_path(info.path)) if of_grid else None
        return found[1] if found is not None and found[0] == _file(info) else None

    def add_entry(self, stem: str, stamps: Stamps, info: VideoInfo | None = None, grid: str = "") -> None:
        """An entry is complete, and is what `info` has for `grid`, a text that says how its frames are chosen. One that
        has only just been written is not taken down: it might change unnoticed.
        """
        if self.holds(stem, stamps) and (info is None or not grid or self.stem_of(info, grid) == stem):
            return
        if time.time() - max(stamps.of_index[1], stamps.of_pictures[1]) / 1e9 > FRESH:
            self._entries[stem] = stamps
            self._new_entries.add(stem)
            if info is not None and grid:
                self._of_grid.setdefault(grid, {})[real_path(info.path)] = (_file(info), stem)

    # Files

    def save(self) -> None:
        """Add what is new to the folder; one that cannot be written is left as it is."""
        if self._folder is None or not (self._new_videos or self._new_entries):
            return
        together = len(self._files) >= MANY
        videos = self._videos if together else {real: self._videos[real] for real in self._new_videos}
        entries = self._entries if together else {stem: self._entries[stem] for stem in self._new_entries}
        path = self._folder / f"{time.time_ns():020d}-{uuid4().hex[:8]}{SUFFIX}"
        with contextlib.suppress(InputError), replacing(path) as file:
            self._write(file, videos, entries)
            self._new_videos, self._new_entries = set(), set()
        if together and path.exists():
            for old in self._files:
                with contextlib.suppress(OSError):
                    old.unlink()
        self._files = [path] if together else [*self._files, path]

    def _write(self, file: Any, videos: dict[str, Any], entries: dict[str, Stamps]) -> None:
        table = np.array(list(videos.values()), dtype=_VIDEO)
        used = np.unique(np.concatenate([table[name] for name in ("times", "keys", "places")]))
        used = used[used != _NONE]
        for name in ("times", "keys", "places"):
            table[name] = np.where(table[name] == _NONE, _NONE, np.searchsorted(used, table[name]))
        series = [self._series.series[number] for number in used]
        steps = [np.diff(numbers, prepend=np.int64(0)) for numbers in series]
        owned = [
            (number, real, file, stem)
            for number, of_grid in enumerate(self._of_grid.values())
            for real, (file, stem) in of_grid.items()
            if stem in entries
        ]
        content: dict[str, Any] = {
            "format": np.int64(_FORMAT),
            "words": _packed(self._words),
            "videos": _packed(videos),
            "video_table": table,
            "lengths": np.array([len(numbers) for numbers in series], dtype=np.int64),
            "steps": _deflated(np.concatenate([np.empty(0, dtype=np.int64), *steps])),
            "entries": _packed(entries),
            "entry_table": np.array(list(entries.values()), dtype=np.int64).reshape(-1, 2, 2),
            "grids": _packed(self._of_grid),
            "owners": _packed(real for _, real, _, _ in owned),
            "owned": _packed(stem for *_, stem in owned),
            "owned_table": np.array([(number, file) for number, _, file, _ in owned], dtype=np.int64).reshape(-1, 2),
        }
        np.savez(file, **content)

    def _read(self, file: Path) -> None:
        """Raises anything for a file that is not whole."""
        with np.load(file, allow_pickle=False) as content:
            if int(content["format"]) != _FORMAT:
                return
            lengths, steps = content["lengths"], np.frombuffer(zlib.decompress(content["steps"]), dtype=np.int64)
            words, names, table = _unpacked(content["words"]), _unpacked(content["videos"]), content["video_table"]
            stems, stamps = _unpacked(content["entries"]), content["entry_table"]
            grids, owners, owned = (_unpacked(content[name]) for name in ("grids", "owners", "owned"))
            owned_table = content["owned_table"].tolist()
        ends = np.cumsum(lengths)
        numbers = np.empty(len(lengths) + 1, dtype=np.int64)
        numbers[_NONE] = _NONE
        for k, (length, end) in enumerate(zip(lengths.tolist(), ends.tolist(), strict=True)):
            numbers[k] = self._series.add(np.cumsum(steps[end - length : end]))[0]
        if (
            len(names) != len(table)
            or len(stems) != len(stamps)
            or (len(ends) and ends[-1] != len(steps))
            or not (len(owners) == len(owned) == len(owned_table))
        ):
            raise ValueError(f"{file} is not a catalogue")
        for name in ("times", "keys", "places"):
            table[name] = numbers[table[name]]
        known = np.array([self._word(word) for word in words], dtype=np.int16)
        for name in ("codec", "pixel_format"):
            table[name] = known[table[name]]
        self._videos.update(zip(names, table, strict=True))
        self._entries.update(
            (stem, Stamps((a, b), (c, d))) for stem, ((a, b), (c, d)) in zip(stems, stamps.tolist(), strict=True)
        )
        for real, stem, (number, when) in zip(owners, owned, owned_table, strict=True):
            self._of_grid.setdefault(grids[number], {})[real] = (when, stem)


def _file(info: VideoInfo) -> int:
    """One number for the size and the time of change of a video's file."""
    return (info.mtime_ns * 1_000_003 + info.size) % 2**63


def _bits(seconds: NDArray[np.float64]) -> Numbers:
    return np.ascontiguousarray(seconds).view(np.int64)


def _packed(texts: Iterable[str]) -> NDArray[np.uint8]:
    """Texts that hold no 0, as bytes."""
    return np.frombuffer("\0".join(texts).encode("utf-8", "surrogateescape"), dtype=np.uint8)


def _unpacked(content: NDArray[np.uint8]) -> list[str]:
    return content.tobytes().decode("utf-8", "surrogateescape").split("\0") if len(content) else []


def _deflated(values: Numbers) -> NDArray[np.uint8]:
    return np.frombuffer(zlib.compress(np.ascontiguousarray(values).tobytes(), 1), dtype=np.uint8)

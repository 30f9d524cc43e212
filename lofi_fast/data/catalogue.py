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
import itertools
import os
import stat
import time
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
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
AT_ONCE = 4096  # rows that are made into records at once
VIEWS_HELD = 65_536
FRESH = 2.0  # seconds after a change of a file in which another one could have the same time
_NONE = -1

_VIDEO = np.dtype([
    ("size", "<i8"), ("mtime_ns", "<i8"), ("start", "<f8"), ("duration", "<f8"), ("width", "<i4"), ("height", "<i4"),
    ("rotation", "<i2"), ("mirrored", "?"), ("codec", "<i2"), ("pixel_format", "<i2"), ("numerator", "<i8"),
    ("denominator", "<i8"), ("lost", "<i8"), ("stamped", "?"), ("times", "<i4"), ("times_n", "<i4"),
    ("keys", "<i4"), ("keys_n", "<i4"), ("places", "<i4"), ("places_n", "<i4"),
])  # fmt: skip
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


def real_paths(paths: Iterable[Path]) -> Iterator[tuple[str, os.stat_result | None]]:
    """Of each path what `real_path` gives, and the state of its file, None where there is none; each folder is looked
    at once.
    """
    folders: dict[str, str] = {}
    for path in paths:
        text = os.fspath(path)
        folder, name = os.path.split(text)
        try:
            status = os.lstat(text)
            if stat.S_ISLNK(status.st_mode) or name in ("", ".", ".."):
                yield os.path.realpath(text), os.stat(text)
                continue
        except OSError:
            yield os.path.realpath(text), None
            continue
        if (real := folders.get(folder)) is None:
            real = folders[folder] = os.path.join(os.path.realpath(folder or "."), "")
        yield real + name, status


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
        self._views: dict[tuple[int, int, float | None], NDArray[Any]] = {}
        self._rows: dict[str, int] = {}  # real path of a video -> row of the table
        self._table = _Column(np.empty(0, dtype=_VIDEO))
        self._stems: list[str] = []  # of entries
        self._stamps = _Column(np.empty((0, 2, 2), dtype=np.int64))  # of the same
        self._numbers: dict[str, int] | None = {}  # stem -> the last of its places in both; None: to be made
        self._owned: dict[str, NDArray[np.int32]] = {}  # grid -> number of the entry of each row of the table
        self._files: list[Path] = []
        if self._folder is not None:
            self._files = sorted(self._folder.glob(f"*{SUFFIX}"))
            for file in self._files:
                with contextlib.suppress(Exception):  # damaged bytes can make the reader of .npz raise anything
                    self._read(file)
        self._saved = len(self._table.values), len(self._stems)  # rows and entries that are in the files

    # Videos

    def info(self, path: Path) -> VideoInfo | None:
        """What is known of a video, if its file is the same as then."""
        return self.infos({"": path}).get("")

    def infos(self, paths: Mapping[str, Path]) -> dict[str, VideoInfo]:
        """The same for many videos, by the names that they have here; those that are not known are left out."""
        if not self._rows:
            return {}
        found: list[tuple[str, Path, int, int, int]] = []
        for (name, path), (real, status) in zip(paths.items(), real_paths(paths.values()), strict=True):
            row = self._rows.get(real)
            if row is not None and status is not None:
                found.append((name, path, row, status.st_size, status.st_mtime_ns))
        infos = {}
        for start in range(0, len(found), AT_ONCE):
            part = found[start : start + AT_ONCE]
            rows = self._table.values[[row for _, _, row, _, _ in part]].tolist()
            for (name, path, _, size, mtime_ns), row in zip(part, rows, strict=True):
                if row[:2] == (size, mtime_ns):
                    infos[name] = self._made(path, row)
        return infos

    def add_info(self, info: VideoInfo) -> VideoInfo:
        """Keep what was found out; returns the same, in less memory."""
        real = real_path(info.path)
        times, count = self._series.add(_bits(info.pts) if info.ticks is None else info.ticks)
        keys, num_keys = self._series.add(info.key_ticks)
        places, num_places = (_NONE, 0) if info.places is None else self._series.add(info.places)
        row = (
            info.size, info.mtime_ns, info.start, info.duration, info.width, info.height, info.rotation,
            info.mirrored, self._word(info.codec), self._word(info.pixel_format), info.time_base.numerator,
            info.time_base.denominator, _NONE if info.lost is None else info.lost, info.ticks is not None, times,
            count, keys, num_keys, places, num_places,
        )  # fmt: skip
        self._rows[real] = self._table.add(np.array([row], dtype=_VIDEO))
        return self._made(info.path, row)

    def _word(self, text: str) -> int:
        if text not in self._words:
            self._words.append(text)
        return self._words.index(text)

    def _made(self, path: Path, row: tuple[Any, ...]) -> VideoInfo:
        (
            size, mtime_ns, start, duration, width, height, rotation, mirrored, codec, pixel_format, numerator,
            denominator, lost, stamped, times, count, keys, num_keys, places, num_places,
        ) = row  # fmt: skip
        base = self._bases.setdefault((numerator, denominator), Fraction(numerator, denominator))
        pts = self._seconds(times, count, base, start) if stamped else self._view(times, count).view(np.float64)
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
            ticks=self._view(times, count) if stamped else None,
            key_ticks=self._view(keys, num_keys),
            mirrored=mirrored,
            lost=None if lost == _NONE else lost,
            places=None if places == _NONE else self._view(places, num_places),
        )

    def _seconds(self, times: int, count: int, base: Fraction, start: float) -> NDArray[np.float64]:
        return self._shared((times, count, start), lambda: self._series.seconds(times, count, base, start))

    def _view(self, number: int, count: int) -> Numbers:
        return self._shared((number, count, None), lambda: self._series.series[number][:count])

    def _shared(self, key: tuple[int, int, float | None], make: Callable[[], NDArray[Any]]) -> NDArray[Any]:
        """One view for all videos that are as long; each view is as large as a short text."""
        view = self._views.get(key)
        if view is None:
            view = make()
            if len(self._views) < VIEWS_HELD:
                self._views[key] = view
        return view

    # Entries

    def holds(self, stem: str, stamps: Stamps) -> bool:
        """Whether the entry was found to be complete when its files had these stamps."""
        number = self._number(stem)
        return number is not None and self._stamps_of(number) == stamps

    def entries(self, infos: Iterable[VideoInfo], grid: str) -> Iterator[tuple[str, Stamps] | None]:
        """The entry that each video was found to have for a grid of frames, and the stamps of its files then."""
        owned = self._owned.get(grid)
        if owned is None:
            yield from (None for _ in infos)
            return
        first, second = itertools.tee(infos)
        sizes, changes = self._table.values["size"], self._table.values["mtime_ns"]
        for info, (real, _) in zip(first, real_paths(info.path for info in second), strict=True):
            row = self._rows.get(real, len(owned))
            if row < len(owned) and owned[row] != _NONE and (info.size, info.mtime_ns) == (sizes[row], changes[row]):
                number = int(owned[row])
                yield self._stems[number], self._stamps_of(number)
            else:
                yield None

    def add_entry(self, stem: str, stamps: Stamps, info: VideoInfo | None = None, grid: str = "") -> None:
        """An entry is complete, and is what `info` has for `grid`, a text that says how its frames are chosen. One that
        has only just been written is not taken down: it might change unnoticed.
        """
        real = "" if info is None or not grid else real_path(info.path)
        owner = None if info is None else self._row(real, info)
        if self.holds(stem, stamps) and (owner is None or self._owned_by(owner, grid) == stem):
            return
        if time.time() - max(stamps.of_index[1], stamps.of_pictures[1]) / 1e9 > FRESH:
            self._add_entries([stem], np.array([stamps], dtype=np.int64))
            if owner is not None:
                self._own(grid, [owner], [len(self._stems) - 1])

    def _number(self, stem: str) -> int | None:
        if self._numbers is None:
            self._numbers = {name: number for number, name in enumerate(self._stems)}
        return self._numbers.get(stem)

    def _stamps_of(self, number: int) -> Stamps:
        (a, b), (c, d) = self._stamps.values[number].tolist()
        return Stamps((a, b), (c, d))

    def _row(self, real: str, info: VideoInfo) -> int | None:
        """Where the table holds the video of a real path as `info` has it."""
        row = self._rows.get(real)
        same = row is not None and self._table.values[row].item()[:2] == (info.size, info.mtime_ns)
        return row if same else None

    def _owned_by(self, row: int, grid: str) -> str | None:
        owned = self._owned.get(grid)
        return None if owned is None or row >= len(owned) or owned[row] == _NONE else self._stems[owned[row]]

    def _add_entries(self, stems: Sequence[str], stamps: Numbers) -> int:
        first = self._stamps.add(stamps)
        self._stems += stems
        if self._numbers is not None:
            self._numbers.update((stem, first + k) for k, stem in enumerate(stems))
        return first

    def _own(self, grid: str, rows: Sequence[int], numbers: Sequence[int]) -> None:
        owned = self._owned.get(grid)
        if owned is None or len(owned) < len(self._table.values):
            room = max(2 * len(self._table.values), 64)
            grown = np.full(room, _NONE, dtype=np.int32)
            grown[: 0 if owned is None else len(owned)] = _NONE if owned is None else owned
            owned = self._owned[grid] = grown
        owned[np.asarray(rows, dtype=np.int64)] = numbers

    # Files

    def save(self) -> None:
        """Add what is new to the folder; one that cannot be written is left as it is."""
        held = len(self._table.values), len(self._stems)
        if self._folder is None or held == self._saved:
            return
        together = len(self._files) >= MANY
        path = self._folder / f"{time.time_ns():020d}-{uuid4().hex[:8]}{SUFFIX}"
        try:
            with replacing(path) as file:
                self._write(file, *((0, 0) if together else self._saved))
        except InputError:
            return
        self._saved = held
        if together:
            for old in self._files:
                with contextlib.suppress(OSError):
                    old.unlink()
        self._files = [path] if together else [*self._files, path]

    def _write(self, file: Any, first_row: int, first_entry: int) -> None:
        """What the rows and entries from these on say."""
        names, rows = list(self._rows), np.fromiter(self._rows.values(), dtype=np.int64, count=len(self._rows))
        videos = [names[k] for k in np.flatnonzero(rows >= first_row).tolist()]
        table = self._table.values[rows[rows >= first_row]]
        stems = list(dict.fromkeys(self._stems[first_entry:]))
        owners: list[str] = []
        owned: list[str] = []
        owned_table: list[tuple[int, int]] = []
        for number, of_row in enumerate(self._owned.values()):
            entries = np.full(len(self._table.values), _NONE, dtype=np.int32)
            entries[: len(of_row)] = of_row[: len(entries)]
            new = np.flatnonzero(entries[rows] >= first_entry)
            owners += [names[k] for k in new.tolist()]
            owned += [self._stems[entry] for entry in entries[rows[new]].tolist()]
            files = self._table.values[["size", "mtime_ns"]][rows[new]]
            owned_table += [(number, _file(size, mtime_ns)) for size, mtime_ns in files.tolist()]
        used = np.unique(np.concatenate([table[name] for name in ("times", "keys", "places")]))
        used = used[used != _NONE]
        for name in ("times", "keys", "places"):
            table[name] = np.where(table[name] == _NONE, _NONE, np.searchsorted(used, table[name]))
        series = [self._series.series[number] for number in used]
        steps = [np.diff(numbers, prepend=np.int64(0)) for numbers in series]
        content: dict[str, Any] = {
            "format": np.int64(_FORMAT),
            "words": _packed(self._words),
            "videos": _packed(videos),
            "video_table": table,
            "lengths": np.array([len(numbers) for numbers in series], dtype=np.int64),
            "steps": _deflated(np.concatenate([np.empty(0, dtype=np.int64), *steps])),
            "entries": _packed(stems),
            "entry_table": self._stamps.values[np.array([self._number(stem) for stem in stems], dtype=np.int64)],
            "grids": _packed(self._owned),
            "owners": _packed(owners),
            "owned": _packed(owned),
            "owned_table": np.array(owned_table, dtype=np.int64).reshape(-1, 2),
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
            owned_table = content["owned_table"]
        ends = np.cumsum(lengths)
        if (
            len(names) != len(table)
            or len(stems) != len(stamps)
            or (len(ends) and ends[-1] != len(steps))
            or not (len(owners) == len(owned) == len(owned_table))
        ):
            raise ValueError(f"{file} is not a catalogue")
        numbers = np.empty(len(lengths) + 1, dtype=np.int64)
        numbers[_NONE] = _NONE
        for k, (length, end) in enumerate(zip(lengths.tolist(), ends.tolist(), strict=True)):
            numbers[k] = self._series.add(np.cumsum(steps[end - length : end]))[0]
        for name in ("times", "keys", "places"):
            table[name] = numbers[table[name]]
        known = np.array([self._word(word) for word in words], dtype=np.int16)
        for name in ("codec", "pixel_format"):
            table[name] = known[table[name]]
        first = self._table.add(table)
        self._rows.update((name, first + k) for k, name in enumerate(names))
        self._numbers = None
        first = self._add_entries(stems, stamps)
        places = {stem: first + k for k, stem in enumerate(stems)}
        files = [_file(size, mtime_ns) for size, mtime_ns in self._table.values[["size", "mtime_ns"]].tolist()]
        for number, grid in enumerate(grids):
            found = [
                (row, places[owned[k]])
                for k in np.flatnonzero(owned_table[:, 0] == number).tolist()
                if (row := self._rows.get(owners[k])) is not None and files[row] == owned_table[k, 1]
            ]
            self._own(grid, [row for row, _ in found], [place for _, place in found])


class _Column:
    """Rows of an array that grows."""

    def __init__(self, empty: NDArray[Any]) -> None:
        self._held, self._count = empty, 0

    @property
    def values(self) -> NDArray[Any]:
        return self._held[: self._count]

    def add(self, rows: NDArray[Any]) -> int:
        """The number of the first of them."""
        first, self._count = self._count, self._count + len(rows)
        if self._count > len(self._held):
            held = np.empty((max(2 * first, self._count), *self._held.shape[1:]), dtype=self._held.dtype)
            held[:first] = self._held[:first]
            self._held = held
        self._held[first : self._count] = rows
        return first


def _file(size: int, mtime_ns: int) -> int:
    """One number for the size and the time of change of a video's file."""
    return (mtime_ns * 1_000_003 + size) % 2**63


def _bits(seconds: NDArray[np.float64]) -> Numbers:
    return np.ascontiguousarray(seconds).view(np.int64)


def _packed(texts: Iterable[str]) -> NDArray[np.uint8]:
    """Texts that hold no 0, as bytes."""
    return np.frombuffer("\0".join(texts).encode("utf-8", "surrogateescape"), dtype=np.uint8)


def _unpacked(content: NDArray[np.uint8]) -> list[str]:
    return content.tobytes().decode("utf-8", "surrogateescape").split("\0") if len(content) else []


def _deflated(values: Numbers) -> NDArray[np.uint8]:
    return np.frombuffer(zlib.compress(np.ascontiguousarray(values).tobytes(), 1), dtype=np.uint8)

"""An entry of the frame cache, as it is read: its index, and its pictures.

A picture is held against its checksum whenever it is read: bytes that have changed on the disk may still decode. Where
it differs the entry's index is removed, so that the next run makes the entry anew.
"""

from __future__ import annotations

import contextlib
import functools
import io
import os
import struct
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lofi_fast.data.video import VideoInfo
from lofi_fast.errors import InputError

INDICES_HELD = 256  # indices of entries in memory, some 30 kB each


@dataclass(frozen=True, slots=True)
class CachedVideo:
    """A complete entry: picture p of the .mov at `path` is source frame frames[p], shown at pts[p] seconds.

    place: the paths of the entry's two files without their suffixes. frames, offsets, sizes (n,) int64, checksums (n,)
    uint32, pts (n,) float64: source frame indices (ascending), where each JPEG lies in the file, how many bytes it has,
    and their CRC-32. They are read from the file `index` (last changed at `changed` ns) when they are asked for, and
    those of the entries used last are held. width, height: pixels of the pictures. info: of the source video.
    """

    name: str
    place: str
    changed: int
    width: int
    height: int
    info: VideoInfo

    @property
    def path(self) -> Path:
        return Path(f"{self.place}.mov")

    @property
    def index(self) -> str:
        return f"{self.place}.npz"

    @property
    def frames(self) -> np.ndarray:
        return _held_index(self.index, self.changed).frames

    @property
    def offsets(self) -> np.ndarray:
        return _held_index(self.index, self.changed).offsets

    @property
    def sizes(self) -> np.ndarray:
        return _held_index(self.index, self.changed).sizes

    @property
    def checksums(self) -> np.ndarray:
        return _held_index(self.index, self.changed).checksums

    @property
    def pts(self) -> np.ndarray:
        # of the probe, not of the index: an entry may be older than what is known of the file's clock
        times: np.ndarray = self.info.pts[self.frames]
        return times

    @property
    def duration(self) -> float:
        """Seconds that the source video's clock shows at its end."""
        return self.info.duration

    def positions(self, frames: np.ndarray) -> np.ndarray:
        """Positions (int64, same shape) of source frames; ValueError if one of them is not in the cache."""
        frames, cached = np.asarray(frames, dtype=np.int64), self.frames
        positions = np.minimum(np.searchsorted(cached, frames), len(cached) - 1)
        absent = frames[cached[positions] != frames]
        if absent.size:
            raise ValueError(f"frame {absent.flat[0]} of {self.name} is not among the {len(cached)} cached ones")
        return positions.astype(np.int64)

    def read(self, positions: np.ndarray) -> list[np.ndarray]:
        """JPEG bytes (uint8) at each position. The file is open only meanwhile, so any number of videos can be used.

        Read, not mapped: mapped pages count as this process's memory. InputError when the file is gone or cut off, or
        when a picture is not what was written; the entry is then made anew by the next `prepare`.
        """
        pictures = []
        index = _held_index(self.index, self.changed)
        try:
            descriptor = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
            try:
                for position in np.asarray(positions, dtype=np.int64):
                    size = int(index.sizes[position])
                    picture = os.pread(descriptor, size, int(index.offsets[position]))
                    if len(picture) != size:
                        raise InputError(f"cache file {self.path} is cut off; delete it and run again")
                    if zlib.crc32(picture) != index.checksums[position]:
                        raise self._damaged(int(position))
                    pictures.append(np.frombuffer(picture, dtype=np.uint8))
            finally:
                os.close(descriptor)
        except OSError as error:
            raise InputError(
                f"cache file {self.path} cannot be read: {error.strerror}; run again, which makes it anew"
            ) from error
        return pictures

    def _damaged(self, position: int) -> InputError:
        """Have the entry made anew by the next run, and say so."""
        mend = "run again, and the file is made anew"
        try:
            os.unlink(self.index)
        except OSError:
            mend = "delete the file and run again, it will be made anew"
        return InputError(f"picture {position} of the cache file {self.path} is damaged; {mend}")


@dataclass(frozen=True, eq=False)
class Index:
    """What the index of an entry holds; see `CachedVideo`. size: pixels, width and height."""

    frames: np.ndarray
    offsets: np.ndarray
    sizes: np.ndarray
    checksums: np.ndarray
    size: tuple[int, int]


def read_index(path: str, length: int | None = None) -> Index | None:
    """The index in a file, or None where it is none, or not of pictures in `length` bytes."""
    try:
        with open(path, "rb") as file:
            content = _arrays(file.read())
        frames, offsets, sizes = (content[name] for name in ("frames", "offsets", "sizes"))
        checksums = content["checksums"]
        size = int(content["width"]), int(content["height"])
    except Exception:  # damaged bytes can make the reader raise anything
        return None
    shape = frames.shape
    if not (
        len(shape) == 1
        and all(numbers.dtype == np.int64 and numbers.shape == shape for numbers in (frames, offsets, sizes))
        and checksums.dtype == np.uint32
        and checksums.shape == shape
        and bool(np.all((sizes > 0) & (offsets >= 0)))
        and (length is None or bool(np.all((sizes <= length) & (offsets <= length - sizes))))
    ):
        return None
    return Index(frames, offsets, sizes, checksums, size)


_MEMBER = struct.Struct("<4s5H3I2H")  # what a member of a ZIP file begins with, before its name
_LONG = 0xFFFFFFFF  # the size of a member whose size is elsewhere


def _arrays(content: bytes) -> dict[str, np.ndarray]:
    """The arrays in an uncompressed .npz as `np.savez` writes it, in a tenth of the time that `np.load` takes: a start
    may read a million. Raises anything for other bytes.
    """
    arrays = {}
    at = 0
    while content.startswith(b"PK\x03\x04", at):
        _, _, flags, method, _, _, checksum, size, _, len_name, len_extra = _MEMBER.unpack_from(content, at)
        name_at = at + _MEMBER.size
        if size == _LONG:
            (size,) = struct.unpack_from("<Q", content, name_at + len_name + 12)
        start = name_at + len_name + len_extra
        member = content[start : start + size]
        if flags or method or len(member) < size or zlib.crc32(member) != checksum:
            raise ValueError("not a member as np.savez writes it")
        header_end = 10 + int.from_bytes(member[8:10], "little")
        dtype, shape = _array_header(member[:header_end])
        array = np.frombuffer(member, dtype, offset=header_end).reshape(shape)
        arrays[content[name_at : name_at + len_name].decode("ascii").removesuffix(".npy")] = array
        at = start + size
    return arrays


@functools.lru_cache(4096)
def _array_header(header: bytes) -> tuple[np.dtype[Any], tuple[int, ...]]:
    """What the beginning of an .npy file says of the array."""
    file = io.BytesIO(header)
    if np.lib.format.read_magic(file) != (1, 0):
        raise ValueError("another version of .npy")
    shape, _, dtype = np.lib.format.read_array_header_1_0(file)
    if dtype.hasobject or len(shape) > 1:
        raise ValueError("not an array of an index")
    return dtype, shape


@functools.lru_cache(INDICES_HELD)
def _held_index(path: str, changed: int) -> Index:
    """The index of an entry that was found complete. Raises InputError where it is no more."""
    index = read_index(path)
    if index is None:
        with contextlib.suppress(OSError):
            os.unlink(path)
        raise InputError(f"the index {path} of the frame cache is damaged or gone; run again, and it is made anew")
    return index

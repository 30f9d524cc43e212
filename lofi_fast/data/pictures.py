"""Pictures: what is kept of a video's frames, as JPEGs of a size and in colours that every rung can be cut from.

They go into a file of the frame cache (`write_pictures`), or are held in memory for as long as a window needs them
(`hold_in_turn`). BT.601 full range, as JPEG decoders assume, whatever the source was.
"""

from __future__ import annotations

import errno
import os
import zlib
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise
from pathlib import Path
from queue import SimpleQueue
from threading import Event, Semaphore, Thread
from typing import TYPE_CHECKING, Protocol, TypeVar

import numpy as np

from lofi_fast.data.packages import opened, require_pyav
from lofi_fast.data.video import VideoError, VideoInfo, decode

if TYPE_CHECKING:
    from av.video.codeccontext import VideoCodecContext
    from av.video.frame import VideoFrame
    from av.video.reformatter import Colorspace

    from lofi_fast.data.nvdec import VideoEngine

T = TypeVar("T")

# FFmpeg's quantiser scale, 2 is its best usual one (about quality 94 elsewhere); lambda units are 118 a step.
_MJPEG_OPTIONS = {"flags": "+qscale", "global_quality": str(2 * 118)}

_HANDED_OVER = 16  # pictures that one thread hands to another at once: one at a time would cost a tenth of the decoding

# H.273 matrix coefficients -> swscale's, by the names that PyAV gives them; 2 is unspecified, RGB (0) and the rare ones
# are left to swscale's default.
_MATRICES = {
    1: "ITU709",
    4: "FCC",
    5: "ITU601",
    6: "ITU601",
    7: "SMPTE240M",
    9: "BT2020",
    10: "BT2020",
}


class Pictures(Protocol):
    """What is decoded from: JPEG pictures of one video, in a cache entry or in memory."""

    @property
    def path(self) -> Path: ...
    @property
    def frames(self) -> np.ndarray:
        """Source frame indices, ascending."""

    @property
    def width(self) -> int: ...
    @property
    def height(self) -> int: ...
    def read(self, positions: np.ndarray) -> list[np.ndarray]:
        """JPEG bytes (uint8) at each position."""


def cached_size(info: VideoInfo, short_side: int) -> tuple[int, int]:
    """(width, height) of the pictures: the aspect kept, the short side at most `short_side`, both even."""
    short = min(info.width, info.height)
    scale = min(1.0, short_side / short)

    def even(pixels: int) -> int:
        return max(2, round(pixels * scale / 2) * 2)

    return even(info.width), even(info.height)


def write_pictures(
    info: VideoInfo, frames: np.ndarray, path: Path, short_side: int, threads: int, engine: VideoEngine | None = None
) -> None:
    """A .mov of the pictures of source frames `frames`, on the disk when it returns; decoded by `engine` where one is
    given, else by PyAV with `threads`. Raises VideoError, OSError, av.FFmpegError for what cannot be converted, and
    nvdec.Unsuitable for what the engine cannot decode.
    """
    import av

    time_base = _time_base(info)
    # the time of the first picture is kept in units of its own, by default only milliseconds
    units = {"movie_timescale": str(time_base.denominator)}
    with av.open(str(path.absolute()), "w", format="mov", container_options=units) as container:
        stream = container.add_stream("mjpeg", options=_MJPEG_OPTIONS)
        _settle_encoder(stream.codec_context, info, short_side)
        for _, picture in _pictures(info, frames, short_side, threads, engine):
            container.mux(stream.encode(picture))
        container.mux(stream.encode(None))
    with open(path, "rb") as file:
        os.fsync(file.fileno())


def written_pictures(path: Path, num_pictures: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Offset, size and CRC-32 of each picture in a written .mov, read back from the file itself."""
    with opened(path) as container:
        packets = (packet for packet in container.demux(container.streams.video[0]) if packet.size)
        written = [(packet.pos, packet.size, zlib.crc32(bytes(packet))) for packet in packets]
    if len(written) != num_pictures or any(offset is None for offset, *_ in written):
        raise OSError(errno.EIO, f"{len(written)} of {num_pictures} pictures were written")
    offsets, sizes, checksums = np.array(written, dtype=np.int64).T
    return np.ascontiguousarray(offsets), np.ascontiguousarray(sizes), checksums.astype(np.uint32)


def _time_base(info: VideoInfo) -> Fraction:
    """.mov counts in whole fractions of a second: 1/denominator holds every multiple of the source's time base."""
    return Fraction(1, info.time_base.denominator)


def _settle_encoder(context: VideoCodecContext, info: VideoInfo, short_side: int) -> None:
    from av.video.reformatter import ColorRange

    context.width, context.height = cached_size(info, short_side)
    context.pix_fmt, context.color_range = "yuvj420p", ColorRange.JPEG
    context.time_base = _time_base(info)
    context.thread_count = 1  # an encoder with more holds pictures back


def _pictures(
    info: VideoInfo, frames: np.ndarray, short_side: int, threads: int, engine: VideoEngine | None = None
) -> Iterator[tuple[int, VideoFrame]]:
    """(source frame index, picture to encode) of each of `frames`: upright, at the size and in the colours kept."""
    width, height = cached_size(info, short_side)
    if info.rotation in (90, 270):
        width, height = height, width
    lying: Iterator[tuple[int, VideoFrame]]  # not yet turned upright
    if engine is None:
        convert = Converter(width, height)
        lying = ((index, convert(frame)) for index, frame in decode(info, frames, threads))
    else:
        lying = engine.pictures(info, frames, width, height, threads)
    time_base = _time_base(info)
    for index, picture in lying:
        picture = _upright(picture, info.rotation, info.mirrored)
        picture.time_base = time_base
        if info.ticks is None:
            picture.pts = round((info.pts[index] - info.start) / time_base)
        else:
            picture.pts = int(info.ticks[index] - info.ticks[0]) * info.time_base.numerator
        yield index, picture


def colours(frame: VideoFrame) -> tuple[Colorspace, bool]:
    """The matrix a frame's colours are coded with, and whether in full range. Where it says nothing: standard
    definition was BT.601, high definition is BT.709; limited range.
    """
    from av.video.reformatter import ColorRange, Colorspace

    matrix = Colorspace[_MATRICES.get(frame.colorspace, "ITU601" if frame.height < 720 else "ITU709")]
    return matrix, frame.color_range == ColorRange.JPEG or frame.format.name.startswith("yuvj")


@dataclass(frozen=True, eq=False)
class HeldVideo:
    """Pictures in memory, the very bytes that a cache entry would hold: picture p is source frame frames[p].

    path: of the source video. frames (n,) int64, ascending. width, height: pixels of the pictures.
    """

    path: Path
    frames: np.ndarray
    jpegs: tuple[np.ndarray, ...]
    width: int
    height: int

    def read(self, positions: np.ndarray) -> list[np.ndarray]:
        """JPEG bytes (uint8) at each position."""
        return [self.jpegs[int(position)] for position in positions]


def hold_in_turn(
    info: VideoInfo, selections: Sequence[np.ndarray], short_side: int, threads: int = 0
) -> Generator[HeldVideo]:
    """For each selection of source frames its pictures, in one pass over the file, and nothing is written.

    A thread decodes, scales and compresses while the caller is at work, ahead by as many pictures as the largest
    selection has. A picture is held until no later selection needs it, so memory is that of two selections when these
    follow each other in time, as windows do. Selections are int64, sorted and unique, and their last frames ascend.
    `threads` of the decoder: 0 is one for each core.
    Raises VideoError where the file fails, ValueError for selections out of order, InputError without PyAV.
    """
    require_pyav()
    import av
    from av.video.codeccontext import VideoCodecContext

    if any(len(selection) == 0 for selection in selections) or any(a[-1] > b[-1] for a, b in pairwise(selections)):
        raise ValueError("selections must not be empty, and their last frames must ascend")
    if not selections:
        return
    width, height = cached_size(info, short_side)
    encoder = VideoCodecContext.create("mjpeg", "w")
    encoder.options = _MJPEG_OPTIONS
    _settle_encoder(encoder, info, short_side)
    # frame -> the last selection that it belongs to
    wanted = np.unique(np.concatenate(selections))
    last_use = np.zeros(len(wanted), dtype=np.int64)
    for number, selection in enumerate(selections):
        last_use[np.searchsorted(wanted, selection)] = number
    held: dict[int, np.ndarray] = {}
    number = 0

    def compressed() -> Generator[dict[int, np.ndarray]]:
        jpegs: dict[int, np.ndarray] = {}
        for index, picture in _pictures(info, wanted, short_side, threads):
            jpegs[index] = np.frombuffer(b"".join(bytes(packet) for packet in encoder.encode(picture)), dtype=np.uint8)
            if len(jpegs) == _HANDED_OVER:
                yield jpegs
                jpegs = {}
        if jpegs:
            yield jpegs

    try:
        with closing(_ahead(compressed(), max(map(len, selections)) // _HANDED_OVER + 1)) as jpegs:
            for more in jpegs:
                latest = max(more)
                held |= more
                more.clear()  # `_ahead` still refers to it
                while number < len(selections) and selections[number][-1] <= latest:
                    frames = selections[number]
                    yield HeldVideo(info.path, frames, tuple(held[int(frame)] for frame in frames), width, height)
                    number += 1
                    uses = last_use[np.searchsorted(wanted, np.fromiter(held, dtype=np.int64))]
                    held = {frame: jpeg for (frame, jpeg), use in zip(held.items(), uses, strict=True) if use >= number}
    except av.FFmpegError as error:  # a pixel format or size that cannot be converted
        raise VideoError(f"video {info.path} cannot be converted: {error}") from error


def _ahead(items: Generator[T], count: int) -> Generator[T]:
    """The items in order, made by a thread that is at most `count` ahead. What it raises is raised here, in its place.

    Closing it waits until the item under way is made.
    """
    made: SimpleQueue[tuple[T | None, Exception | None]] = SimpleQueue()  # (None, None) at the end
    room, stopped = Semaphore(count), Event()

    def work() -> None:
        failure = None
        try:
            with closing(items):
                for item in items:
                    made.put((item, None))
                    room.acquire()
                    if stopped.is_set():
                        return
        except Exception as error:
            failure = error
        made.put((None, failure))

    thread = Thread(target=work, name="pictures", daemon=True)
    thread.start()
    try:
        while True:
            item, failure = made.get()
            if failure is not None:
                raise failure
            if item is None:
                return
            room.release()
            yield item
    finally:
        stopped.set()
        room.release()
        thread.join()


class Converter:
    """Scales frames to (width, height) and converts them from the matrix and range they are in to BT.601 full range.

    One object a video: the scaler is set up once and reused.
    """

    def __init__(self, width: int, height: int) -> None:
        from av.video.reformatter import VideoReformatter

        self._width, self._height = width, height
        self._reformatter = VideoReformatter()

    def __call__(self, frame: VideoFrame) -> VideoFrame:
        from av.video.reformatter import ColorRange, Colorspace, Interpolation

        matrix, full = colours(frame)
        picture = self._reformatter.reformat(
            frame,
            width=self._width,
            height=self._height,
            format="yuvj420p",
            src_colorspace=matrix,
            dst_colorspace=Colorspace.ITU601,
            src_color_range=ColorRange.JPEG if full else ColorRange.MPEG,
            dst_color_range=ColorRange.JPEG,
            interpolation=Interpolation.AREA | Interpolation.ACCURATE_RND,
            threads=1,
        )
        # the decoder's picture types would ask the encoder for predicted pictures, which MJPEG has not
        picture.pict_type = 0
        return picture


def _upright(frame: VideoFrame, degrees: int, mirrored: bool) -> VideoFrame:
    """The frame flipped left-right if `mirrored`, then turned clockwise by 0, 90, 180 or 270 degrees."""
    if degrees == 0 and not mirrored:
        return frame
    from av.video.frame import VideoFrame

    width, height = frame.width, frame.height
    stacked = frame.to_ndarray().reshape(-1)
    luma, blue, red = np.split(stacked, (width * height, width * height * 5 // 4))
    turned = []
    for plane, rows in ((luma, height), (blue, height // 2), (red, height // 2)):
        pixels = plane.reshape(rows, -1)
        turned.append(np.rot90(pixels[:, ::-1] if mirrored else pixels, -degrees // 90).reshape(-1))
    rows = (width if degrees in (90, 270) else height) * 3 // 2
    upright = VideoFrame.from_ndarray(np.concatenate(turned).reshape(rows, -1).astype(np.uint8), format="yuvj420p")
    upright.color_range, upright.colorspace = frame.color_range, frame.colorspace
    return upright

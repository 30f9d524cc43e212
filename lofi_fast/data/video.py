"""Where the frames of a video file are in time, and how to get exactly those asked for.

A frame is named by its index in presentation order; its time is `VideoInfo.pts[index]`, taken from the file's own
time stamps and never from a frame rate. All times are on the file's clock, the one that players and labelling tools
show: 0 is where the container starts, which is its earliest stream, and the pictures may begin later. Sources of the
traps handled here: FFmpeg's libavformat and libavcodec, read through PyAV.
"""

from __future__ import annotations

import math
from array import array
from bisect import bisect_left
from collections.abc import Generator, Iterator
from contextlib import closing
from dataclasses import dataclass, field
from fractions import Fraction
from itertools import pairwise
from pathlib import Path
from stat import S_ISREG
from typing import TYPE_CHECKING, cast

import numpy as np

from lofi_fast.data.packages import opened, require_pyav
from lofi_fast.errors import InputError

if TYPE_CHECKING:
    import av
    from av.packet import Packet
    from av.sidedata.sidedata import SideDataContainer
    from av.video.frame import VideoFrame
    from av.video.stream import VideoStream

# Packets tell every frame's time only where the container stores presentation times and the codec makes one shown
# frame of one packet. VP8 hides reference frames in packets of their own; AVI stores no times; a transport stream
# may begin in the middle of a group of pictures. Those are decoded once to be counted.
_CONTAINERS_WITH_TIMES = frozenset(("mov", "mp4", "matroska", "webm"))
_ONE_FRAME_A_PACKET = frozenset(("h264", "hevc", "vp9", "av1", "libdav1d", "mjpeg", "prores", "png"))

MIN_PIECE = 8  # frames of each of several files that were joined; fewer are stamps in disorder
LEAST_KEPT = 0.9  # share of a file's stamps that ascend; fewer are in disorder, and not in order but for some damage
LEAST_START = 1e-3  # seconds; below it is the rounding of containers that count milliseconds


class VideoError(InputError):
    """One video cannot be used; the sentence names it and says why. Others are unaffected."""


@dataclass(frozen=True, slots=True)
class VideoInfo:
    """What `probe` found out about a file's best video stream.

    pts (num_frames,) float64: seconds of each frame in presentation order, ascending, on the file's clock.
    duration: seconds that the file's clock shows at the end of the last frame. width, height: pixels as shown, after
    rotation.
    rotation: degrees clockwise (0, 90, 180, 270) that turn a decoded frame upright, after it is flipped left-right if
    `mirrored`. size, mtime_ns: of the file.
    ticks (num_frames,) int64: the stamp each decoded frame carries, in units of time_base seconds; None where the
    decoder's stamps are wrong or missing and a frame is found by counting (MPEG-4 with packed B-frames).
    key_ticks: ascending stamps of frames from which decoding may start and still give the same pixels; may be empty.
    lost: frames that are in the file and do not decode whole; None where the packets alone were read, and any frame
    that does not decode is an error. pts and ticks leave them out.
    places: of each frame, in the order of the frames that decode; None where it is that of the frames themselves.
    """

    path: Path
    pts: np.ndarray
    duration: float
    width: int
    height: int
    rotation: int
    codec: str
    pixel_format: str
    size: int
    mtime_ns: int
    time_base: Fraction = Fraction(1, 90000)
    ticks: np.ndarray | None = None
    key_ticks: np.ndarray = field(default_factory=lambda: np.empty(0, dtype=np.int64))
    mirrored: bool = False
    lost: int | None = None
    places: np.ndarray | None = None

    @property
    def start(self) -> float:
        """Seconds that the file's clock shows at the first frame: 0 unless another stream begins before it."""
        return float(self.pts[0])

    @property
    def fps(self) -> float:
        """Mean frames a second; 0.0 for a video without a duration."""
        shown = self.duration - self.start
        return len(self.pts) / shown if shown > 0 else 0.0


def probe(path: Path) -> VideoInfo:
    """Finds every frame's time by reading the packets, and decodes the first frame to see that it can be done.

    Where packets do not tell (see _CONTAINERS_WITH_TIMES, and any irregular time stamp) the whole video is decoded,
    and its frames are those that decode.
    Raises VideoError for a file that is missing, empty, damaged or without a video stream, InputError without PyAV.
    """
    require_pyav()
    import av

    path = Path(path)
    try:
        status = path.stat()
    except OSError as error:
        raise VideoError(f"video {path} cannot be read: {error.strerror}") from error
    if not S_ISREG(status.st_mode):
        raise VideoError(f"video {path} is a pipe, a device or a folder, and no file")
    if status.st_size == 0:
        raise VideoError(f"video {path} is an empty file")
    try:
        with opened(path) as container:
            stream = _best_stream(container, path)
            time_base = stream.time_base or Fraction(1, 90000)
            ticks, key_ticks, last_length = _ticks_of_packets(container, stream)
            rate = stream.average_rate or stream.guessed_rate
            codec = stream.codec_context.name
            begins = container.start_time
            stream_begins = (stream.start_time or 0) * time_base
            is_avi = container.format.name == "avi"
        first = _first_frame(path)
        times: np.ndarray
        lost: int | None = None
        places: np.ndarray | None = None
        stamped, is_timed = True, not is_avi
        if ticks is not None and first.pts == ticks[0]:
            times = ticks
        else:
            key_ticks = key_ticks[:0]
            decoded, lost = _decoded_ticks(path)
            if _ascending(decoded):
                times = ticks = np.array(decoded, dtype=np.int64)
                if is_avi:
                    # The stamps that are made up for its frames are those of later chunks, by as many as a decoder
                    # holds back; a chunk may be empty, and the picture before it stays for longer.
                    chunks = _chunk_ticks(path)
                    is_timed = len(chunks) == len(decoded)
                    times = chunks if is_timed else times
            elif (joined := _joined_times(decoded)) is not None:
                times, ticks = joined, None
            elif len(places := _longest_ascending(decoded)) >= LEAST_KEPT * len(decoded):
                times, ticks = np.array([decoded[place] for place in places], dtype=np.int64), None
                lost += len(decoded) - len(places)
            else:
                stream_base, places, ticks = time_base, None, None
                times, time_base = _counted_times(path, len(decoded), time_base, rate)
                stamped = time_base == stream_base
    except av.FFmpegError as error:
        raise VideoError(f"video {path} cannot be decoded: {error.strerror or error}") from error
    except OSError as error:
        raise VideoError(f"video {path} cannot be read: {error.strerror or error}") from error

    # int64 * numerator / denominator is one rounding away from the exact rational time
    pts = (times - times[0]) * time_base.numerator / time_base.denominator
    if last_length > 0 and ticks is not None:
        length = last_length * time_base.numerator / time_base.denominator
    elif len(pts) > 1:
        length = float(np.median(np.diff(pts)))
    else:
        length = float(1 / rate) if rate else 0.0
    pts += _start(int(times[0]) * time_base if stamped and is_timed else stream_begins, begins)
    rotation, mirrored = _orientation(first)
    width, height = (first.height, first.width) if rotation in (90, 270) else (first.width, first.height)
    return VideoInfo(
        path=path,
        pts=pts,
        duration=float(pts[-1]) + length,
        width=width,
        height=height,
        rotation=rotation,
        codec=codec,
        pixel_format=first.format.name,
        size=status.st_size,
        mtime_ns=status.st_mtime_ns,
        time_base=time_base,
        ticks=ticks,
        key_ticks=key_ticks,
        mirrored=mirrored,
        lost=lost,
        places=places,
    )


def _start(first: Fraction, container: int | None) -> float:
    """Seconds from where the file's clock begins to the first frame. Players show a container's start time, that of
    its earliest stream (`container`, microseconds), as 0.
    """
    late = float(first - Fraction(container, 1_000_000)) if container is not None else 0.0
    return late if late >= LEAST_START else 0.0


def stated_duration(path: Path) -> float:
    """Seconds that the file's clock shows where its pictures end, as its header says, or where the file ends where it
    says no more; 0.0 where it says nothing, cannot be read, or is no file, such as a pipe that nobody writes into. For
    an estimate.
    """
    require_pyav()
    import av

    try:
        if not path.is_file():
            return 0.0
        with opened(path) as container:
            pictures = container.streams.best("video")
            begins = Fraction(container.start_time or 0, 1_000_000)
            if pictures is not None and pictures.duration and pictures.time_base:  # sound may go on after them
                late = float((pictures.start_time or 0) * pictures.time_base - begins)  # and begin before them
                return max(float(pictures.duration * pictures.time_base) + max(late, 0.0), 0.0)
            # Matroska says where the last stamp is, and stamps may begin at the time of day
            before = begins if "matroska" in container.format.name else 0
            return max(float(Fraction(container.duration or 0, 1_000_000) - before), 0.0)
    except (av.FFmpegError, OSError):
        return 0.0


def stated_rate(path: Path) -> float:
    """Frames a second on average as a file's header says; 0.0 where it says nothing, cannot be read, or is no file."""
    require_pyav()
    import av
    from av.video.stream import VideoStream

    try:
        if not path.is_file():
            return 0.0
        with opened(path) as container:
            pictures = container.streams.best("video")
            if not isinstance(pictures, VideoStream):
                return 0.0
            return float(pictures.average_rate or pictures.guessed_rate or 0)
    except (av.FFmpegError, OSError):
        return 0.0


def decode(info: VideoInfo, frames: np.ndarray, threads: int = 0) -> Iterator[tuple[int, VideoFrame]]:
    """Yields (index, frame) for each of the sorted unique indices `frames`, and stops reading after the last.

    Frames come as they are stored: the caller flips and turns them as `info` says. `threads` of the decoder: 0 is one
    for each core. Raises ValueError for indices that are unsorted, repeated or out of range, VideoError where the file
    fails or holds fewer frames than promised (what was decoded before has been yielded), InputError without PyAV.
    """
    require_pyav()
    frames = np.asarray(frames, dtype=np.int64)
    if frames.ndim != 1 or np.any(np.diff(frames) <= 0):
        raise ValueError("frames must be sorted and unique")
    if len(frames) and not (frames[0] >= 0 and frames[-1] < len(info.pts)):
        raise ValueError(f"frames must be within 0..{len(info.pts) - 1} of {info.path}")
    return _complete(info, len(frames), _decode(info, frames, threads))


def _complete(
    info: VideoInfo, count: int, found: Generator[tuple[int, VideoFrame], None, None]
) -> Iterator[tuple[int, VideoFrame]]:
    """The first `count` of what is found. Whatever ends it before is a VideoError that says how far it came."""
    import av

    done = 0
    with closing(found):
        try:
            while done < count:
                yield next(found)
                done += 1
        except StopIteration:
            raise VideoError(f"video {info.path} ends after {done} of {count} frames (a truncated file?)") from None
        except av.FFmpegError as error:
            what = error.strerror or error
            raise VideoError(f"video {info.path} fails after {done} of {count} frames: {what}") from error
        except OSError as error:
            raise VideoError(f"video {info.path} cannot be read: {error.strerror or error}") from error


def _decode(info: VideoInfo, frames: np.ndarray, threads: int) -> Generator[tuple[int, VideoFrame], None, None]:
    # what a decoded frame is found by: its place in the decoder's order, or its stamp
    places = frames if info.places is None else info.places[frames]
    keys = places if info.ticks is None else info.ticks[frames]
    wanted = _Wanted(keys)
    if info.lost is not None:
        yield from _decode_what_can_be(info, frames, wanted, threads)
        return
    # where decoding may start for each of them
    beginning = np.iinfo(np.int64).min
    entries = np.concatenate(([beginning], info.key_ticks))
    starts = entries[np.searchsorted(entries, keys, side="right") - 1]
    entry_ticks = set(info.key_ticks.tolist())
    done, position = 0, 0
    with opened(info.path) as container:
        stream = _best_stream(container, info.path)
        stream.thread_type = "AUTO"
        stream.thread_count = threads
        context = stream.codec_context
        # the last entry point that the decoder, which runs ahead of its output, has been given
        entered, skipped = beginning, False
        for packet in container.demux(stream):
            if packet.size and packet.is_corrupt:
                continue
            if packet.size and len(info.key_ticks):
                start = int(starts[done])
                if packet.pts != start and start > entered:
                    # nothing is wanted before a key frame that is still to come
                    skipped = True
                    continue
                if skipped:
                    context.flush_buffers()
                    skipped = False
                if packet.pts is not None and packet.pts in entry_ticks:
                    entered = packet.pts
                # frames that nobody refers to and nobody asked for need no decoding: a third of the time
                context.skip_frame = "NONREF" if wanted.place(packet.pts) is None else "DEFAULT"
            for frame in context.decode(packet if packet.size else None):
                key = position if info.ticks is None else frame.pts
                position += 1
                place = wanted.place(key)
                if place is None:
                    continue
                index = int(frames[place])
                if place != done:
                    raise VideoError(f"video {info.path} gives frames out of order at {info.pts[index]:.3f} s")
                if frame.is_corrupt:
                    raise VideoError(f"video {info.path} is damaged at {info.pts[index]:.3f} s")
                yield index, frame
                done += 1


class _Wanted:
    """Ascending keys of the frames that are wanted: eight bytes for each, hours of video have a hundred thousand."""

    def __init__(self, keys: np.ndarray) -> None:
        self._keys = array("q", keys.astype(np.int64).tobytes())

    def place(self, key: int | None) -> int | None:
        """Where a key is among them; None where it is not."""
        if key is None:
            return None
        place = bisect_left(self._keys, key)
        return place if place < len(self._keys) and self._keys[place] == key else None


def _decode_what_can_be(
    info: VideoInfo, frames: np.ndarray, wanted: _Wanted, threads: int
) -> Generator[tuple[int, VideoFrame], None, None]:
    """As `probe` decoded a whole file, so that both see the same frames."""

    with opened(info.path) as container:
        stream = _best_stream(container, info.path)
        stream.thread_type, stream.thread_count = "AUTO", 1 if info.lost else threads
        for position, frame in enumerate(_whole_frames(container, stream, [])):
            place = wanted.place(position if info.ticks is None else frame.pts)
            if place is not None:
                yield int(frames[place]), frame


def _whole_frames(
    container: av.container.InputContainer, stream: VideoStream, faults: list[str]
) -> Iterator[VideoFrame]:
    """Frames that decode whole, in presentation order. What does not is passed over, one sentence in `faults` each.

    Packets that the container marks as damaged are given to the decoder too: where two transport streams were joined
    the last one of the first is marked, and is whole.
    """
    import av

    packets = container.demux(stream)
    while True:
        try:
            packet = next(packets, None)
        except IndexError:  # of PyAV, where damage looks like the beginning of one more stream
            packets = container.demux(stream)
            continue
        except av.FFmpegError as error:
            faults.append(f"reading stopped: {error.strerror or error}")
            packet = None
        try:
            frames = stream.codec_context.decode(packet if packet is not None and packet.size else None)
        except av.EOFError:
            return  # the decoder was flushed before
        except av.FFmpegError as error:
            faults.append(f"a packet does not decode: {error.strerror or error}")
            frames = []
        for frame in frames:
            if frame.is_corrupt:
                faults.append("a frame has parts that were not decoded")
            else:
                yield frame
        if packet is None:
            return


def _best_stream(container: av.container.InputContainer, path: Path) -> VideoStream:
    from av.video.stream import VideoStream

    stream = container.streams.best("video")
    if not isinstance(stream, VideoStream):
        raise VideoError(f"video {path} has no video stream")
    if stream.codec_context is None:
        raise VideoError(f"video {path} is coded in a way that this PyAV cannot decode")
    return stream


def _ticks_of_packets(
    container: av.container.InputContainer, stream: VideoStream
) -> tuple[np.ndarray | None, np.ndarray, int]:
    """Sorted stamps of all frames, those of exact entry points, the last frame's length.

    (None, empty, 0) where packets cannot be trusted.
    """
    context = stream.codec_context
    nothing = (None, np.empty(0, dtype=np.int64), 0)
    trusted = (
        not _CONTAINERS_WITH_TIMES.isdisjoint(container.format.name.split(","))
        and context.name in _ONE_FRAME_A_PACKET
        # two fields of an interlaced frame may come in two packets; 0 is unknown, 1 progressive
        and context.field_order in (0, 1)
    )
    if not trusted:
        return nothing
    stamps = array("q")  # hours of video have a million
    key_stamps: list[int] = []
    last, last_length = 0, 0
    for packet in container.demux(stream):
        # the flush packet at the end, and the torn last packet of a truncated file
        if packet.size == 0 or packet.is_corrupt:
            continue
        if packet.pts is None or packet.is_discard or (not stamps and not packet.is_keyframe):
            return nothing
        stamps.append(packet.pts)
        if len(stamps) == 1 or packet.pts >= last:
            last, last_length = packet.pts, packet.duration or 0
        if packet.is_keyframe and _is_entry_point(context.name, context.extradata, packet):
            key_stamps.append(packet.pts)
    # a frame shown before the first key frame hangs on one that is not in the file
    ticks = np.sort(np.array(stamps, dtype=np.int64))
    if not stamps or np.any(ticks[1:] == ticks[:-1]) or ticks[0] < stamps[0]:
        return nothing
    return ticks, np.sort(np.array(key_stamps, dtype=np.int64)), last_length


def _is_entry_point(codec: str, extradata: bytes | None, packet: Packet[VideoStream]) -> bool:
    """Whether a decoder that starts at this key packet gives the same pixels from its frame on.

    Containers also mark recovery points (H.264 open groups, gradual refresh), from which the first pictures may
    differ. Of H.264 only IDR pictures (NAL type 5) are taken, of HEVC all random access pictures (types 16 to 21,
    ITU-T H.265 section 7.4.2.2: what follows them in output order never refers to what precedes).
    """
    if codec in ("vp9", "mjpeg", "prores", "png"):
        return True
    if codec == "h264" and extradata and extradata[0] == 1 and len(extradata) > 4:
        length_size, first, last, shift, mask = (extradata[4] & 3) + 1, 5, 5, 0, 0x1F
    elif codec == "hevc" and extradata and extradata[0] == 1 and len(extradata) > 21:
        length_size, first, last, shift, mask = (extradata[21] & 3) + 1, 16, 21, 1, 0x3F
    else:
        return False
    data, at = memoryview(packet), 0
    while at + length_size < len(data):
        if first <= data[at + length_size] >> shift & mask <= last:
            return True
        at += length_size + int.from_bytes(data[at : at + length_size], "big")
    return False


def _first_frame(path: Path) -> VideoFrame:

    with opened(path) as container:
        for frame in _whole_frames(container, _best_stream(container, path), []):
            return frame
    raise VideoError(f"video {path} has no decodable frame")


def _orientation(frame: VideoFrame) -> tuple[int, bool]:
    """(degrees clockwise, whether to flip left-right first) that the frame's display matrix asks for.

    The matrix maps (x, y) to (a x + c y, b x + d y), y pointing down (ISO/IEC 14496-12 section 6.2.2).
    """
    from av.sidedata.sidedata import Type

    # PyAV declares motion vectors only
    matrix = cast("SideDataContainer", frame.side_data).get(Type.DISPLAYMATRIX)
    if matrix is None:
        return 0, False
    a, b, _, c, d = np.frombuffer(bytes(matrix), dtype=np.int32)[:5].tolist()
    mirrored = a * d - b * c < 0
    if mirrored:
        a, b = -a, -b
    return round(math.degrees(math.atan2(b, a)) / 90) % 4 * 90, mirrored


def _decoded_ticks(path: Path) -> tuple[list[int | None], int]:
    """Stamps of all frames that decode whole, and how many do not."""

    # several threads make other frames of damaged data, and report it late
    for threads in (0, 1):
        faults: list[str] = []
        with opened(path) as container:
            stream = _best_stream(container, path)
            stream.thread_type, stream.thread_count = "AUTO", threads
            ticks = [frame.pts for frame in _whole_frames(container, stream, faults)]
        if not faults:
            break
    if not ticks:
        raise VideoError(f"video {path} has no decodable frame")
    return ticks, len(faults)


def _chunk_ticks(path: Path) -> np.ndarray:
    """Ascending numbers (int64) of an AVI's chunks that hold a frame, which are its times; empty where they are in
    disorder.
    """

    with opened(path) as container:
        stream = _best_stream(container, path)
        stamps = [packet.dts for packet in container.demux(stream) if packet.size]
    return np.array(stamps if _ascending(stamps) else [], dtype=np.int64)


def _longest_ascending(ticks: list[int | None]) -> np.ndarray:
    """Places (int64) of the longest strictly ascending part of the stamps: what damage, or a lost stamp, leaves."""
    lowest: list[int] = []  # the lowest stamp that ends an ascending part of each length
    ends: list[int] = []  # its place
    before = [-1] * len(ticks)
    for place, tick in enumerate(ticks):
        if tick is None:
            continue
        length = bisect_left(lowest, tick)
        before[place] = ends[length - 1] if length else -1
        lowest[length : length + 1] = [tick]
        ends[length : length + 1] = [place]
    chain = []
    place = ends[-1] if ends else -1
    while place >= 0:
        chain.append(place)
        place = before[place]
    return np.array(chain[::-1], dtype=np.int64)


def _joined_times(ticks: list[int | None]) -> np.ndarray | None:
    """Ascending times of the frames of files that were joined end to end, each piece of which counts anew: a piece
    goes on where the one before ends. None where the stamps are no such thing.
    """
    if None in ticks or len(ticks) < 2:
        return None
    stamps = np.array(ticks, dtype=np.int64)
    steps = np.diff(stamps)
    backwards = steps <= 0
    if not (backwards.any() and backwards.sum() <= len(stamps) / MIN_PIECE):
        return None
    # stamps that merely change places, as of B-frames in the wrong order, go on where they were within a few frames
    length = max(int(np.median(steps[~backwards])), 1)
    if np.any(steps[backwards] > -MIN_PIECE * length):
        return None
    steps[backwards] = length
    return np.concatenate(([stamps[0]], stamps[0] + np.cumsum(steps)))


def _ascending(ticks: list[int | None]) -> bool:
    stamps = [tick for tick in ticks if tick is not None]
    return len(stamps) == len(ticks) and all(a < b for a, b in pairwise(stamps))


def _counted_times(
    path: Path, num_frames: int, time_base: Fraction, rate: Fraction | None
) -> tuple[np.ndarray, Fraction]:
    """Times of `num_frames` decoded frames whose own stamps are unusable, and their time base.

    The decoder's order is the presentation order whatever its stamps say, so the packets' stamps belong to the
    frames in ascending order if there are as many of them; else the frames are as regular as the stream says.
    """

    with opened(path) as container:
        stream = _best_stream(container, path)
        stamps = {packet.pts for packet in container.demux(stream) if packet.size and packet.pts is not None}
    if len(stamps) == num_frames:
        return np.sort(np.array(list(stamps), dtype=np.int64)), time_base
    if not rate:
        raise VideoError(f"video {path} has no usable time stamps")
    return np.arange(num_frames, dtype=np.int64), 1 / Fraction(rate)

"""The frame cache: each video decoded once, the frames of the full-fidelity grid kept as JPEG pictures.

An entry is `<name>-<hash>.mov`, intra-only MJPEG that any player opens, and `<name>-<hash>.npz`, its index, which says
where in it each picture lies, and a checksum of each. Both are written under a temporary name and renamed, the index
last: an entry is complete if and only if its index exists. The hash covers everything the pictures depend on, so a
changed video or grid is a new entry. An index that is not what was written is treated as if it were not there.

A picture is held against its checksum whenever it is read: bytes that have changed on the disk may still decode. Where
it differs the entry's index is removed, so that the next run makes the entry anew.

Pictures are BT.601 full range, as JPEG decoders assume, whatever the source was.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import os
import pickle
import queue
import re
import shutil
import signal
import subprocess
import sys
import threading
import traceback
import zlib
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np

from lofi_fast.data.packages import require_pyav
from lofi_fast.data.video import VideoError, VideoInfo, decode
from lofi_fast.errors import InputError

if TYPE_CHECKING:
    from av.video.codeccontext import VideoCodecContext
    from av.video.frame import VideoFrame

# Part of the hash: raise it whenever the same request would give other pictures.
_FORMAT_VERSION = 1

# FFmpeg's quantiser scale, 2 is its best usual one (about quality 94 elsewhere); lambda units are 118 a step.
_MJPEG_OPTIONS = {"flags": "+qscale", "global_quality": str(2 * 118)}

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


_READY = b"ready"

LONGEST_NAME = 180  # bytes of a video's name in names of files; systems allow 255, and more is added


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


@dataclass(frozen=True)
class CachedVideo:
    """A complete entry: picture p of the .mov at `path` is source frame frames[p], shown at pts[p] seconds.

    frames, offsets, sizes (n,) int64, checksums (n,) uint32, pts (n,) float64: source frame indices (ascending), where
    each JPEG lies in the file, how many bytes it has, and their CRC-32. width, height: pixels of the pictures.
    duration: seconds that the source video's clock shows at its end.
    """

    name: str
    path: Path
    frames: np.ndarray
    pts: np.ndarray
    offsets: np.ndarray
    sizes: np.ndarray
    checksums: np.ndarray
    width: int
    height: int
    duration: float

    def positions(self, frames: np.ndarray) -> np.ndarray:
        """Positions (int64, same shape) of source frames; ValueError if one of them is not in the cache."""
        frames = np.asarray(frames, dtype=np.int64)
        positions = np.minimum(np.searchsorted(self.frames, frames), len(self.frames) - 1)
        absent = frames[self.frames[positions] != frames]
        if absent.size:
            raise ValueError(f"frame {absent.flat[0]} of {self.name} is not among the {len(self.frames)} cached ones")
        return positions.astype(np.int64)

    def read(self, positions: np.ndarray) -> list[np.ndarray]:
        """JPEG bytes (uint8) at each position. The file is open only meanwhile, so any number of videos can be used.

        Read, not mapped: mapped pages count as this process's memory. InputError when the file is gone or cut off, or
        when a picture is not what was written; the entry is then made anew by the next `prepare`.
        """
        pictures = []
        try:
            descriptor = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
            try:
                for position in np.asarray(positions, dtype=np.int64):
                    size = int(self.sizes[position])
                    picture = os.pread(descriptor, size, int(self.offsets[position]))
                    if len(picture) != size:
                        raise InputError(f"cache file {self.path} is cut off; delete it and run again")
                    if zlib.crc32(picture) != self.checksums[position]:
                        raise self._damaged(int(position))
                    pictures.append(np.frombuffer(picture, dtype=np.uint8))
            finally:
                os.close(descriptor)
        except OSError as error:
            raise InputError(f"cache file {self.path} cannot be read: {error.strerror}") from error
        return pictures

    def _damaged(self, position: int) -> InputError:
        """Have the entry made anew by the next run, and say so."""
        mend = "run again, and the file is made anew"
        try:
            _index_path(self.path).unlink()
        except OSError:
            mend = "delete the file and run again, it will be made anew"
        return InputError(f"picture {position} of the cache file {self.path} is damaged; {mend}")


@dataclass(frozen=True)
class CacheRequest:
    """Keep the source frames `frames` (int64, sorted, unique, not empty) of one probed video under `name`."""

    name: str
    info: VideoInfo
    frames: np.ndarray


@dataclass(frozen=True)
class Skipped:
    """A video that could not be used, its file, and one sentence that says why."""

    name: str
    path: str
    reason: str


def cached_size(info: VideoInfo, short_side: int) -> tuple[int, int]:
    """(width, height) of the pictures: the aspect kept, the short side at most `short_side`, both even."""
    short = min(info.width, info.height)
    scale = min(1.0, short_side / short)

    def even(pixels: int) -> int:
        return max(2, round(pixels * scale / 2) * 2)

    return even(info.width), even(info.height)


def estimate_bytes(requests: Sequence[CacheRequest], side: int) -> int:
    """Bytes on disk that entries for `requests` at the short side `side` take, within about a factor of two."""
    total = 0.0
    for request in requests:
        width, height = cached_size(request.info, side)
        # Fitted to two dozen clips at sides 64 to 256: a smaller picture of the same scene has more detail a pixel.
        total += len(request.frames) * 9 * (width * height) ** (2 / 3)
    return int(total)


def prepare(
    requests: Sequence[CacheRequest],
    folder: Path,
    short_side: int,
    workers: int | None = None,
    progress: Callable[[int, int, str], None] | None = None,
) -> tuple[dict[str, CachedVideo], list[Skipped]]:
    """Makes every requested entry that `folder` lacks, and returns all entries by name and the videos that failed.

    `workers` processes (default: one for each core) take one video each; `progress` is called from this thread with
    (videos done, videos in all, what was just done). May be killed at any time and run again. Several runs may share
    a folder: they take turns.

    Raises InputError when the folder cannot be written, the estimated size exceeds the free space, or an entry must be
    made without PyAV. ValueError for two requests of one name, no frames, or a short side below 2.
    """
    folder = Path(folder)
    names = [request.name for request in requests]
    if len(set(names)) < len(names):
        raise ValueError("two requests have the same name")
    if short_side < 2 or any(len(request.frames) == 0 for request in requests):
        raise ValueError("short_side must be at least 2, and each request needs at least one frame")
    cached: dict[str, CachedVideo] = {}
    skipped: list[Skipped] = []

    def tell(what: str) -> None:
        if progress is not None:
            progress(len(cached) + len(skipped), len(requests), what)

    def take_complete(waiting: Sequence[CacheRequest]) -> list[CacheRequest]:
        pending = []
        for request in waiting:
            entry = _load(request, folder, short_side)
            if entry is None:
                pending.append(request)
            else:
                cached[request.name] = entry
                tell(request.name)
        return pending

    pending = take_complete(requests)
    if pending:
        with _lock(folder, tell) as lock:
            pending = take_complete(pending)
            _check_free_space(pending, folder, short_side)
            cores = len(os.sched_getaffinity(0))
            workers = min(cores if workers is None else workers, len(pending))
            results: Generator[tuple[CacheRequest, CachedVideo | Skipped]]
            if workers > 1:
                results = _in_processes(pending, folder, short_side, workers, max(1, cores // workers), lock)
            else:
                results = ((request, _make_entry(request, folder, short_side, cores)) for request in pending)
            with contextlib.closing(results):
                for request, result in results:
                    if isinstance(result, Skipped):
                        skipped.append(result)
                    else:
                        cached[request.name] = result
                    tell(request.name)
    return {name: cached[name] for name in names if name in cached}, skipped


def _entry_path(request: CacheRequest, folder: Path, short_side: int) -> Path:
    info = request.info
    facts = f"{_FORMAT_VERSION}|{info.path.resolve()}|{info.size}|{info.mtime_ns}|{short_side}|"
    digest = hashlib.sha256(facts.encode("utf-8", "surrogateescape"))
    digest.update(np.ascontiguousarray(request.frames, dtype="<i8").tobytes())
    return folder / f"{_readable(request.name)}-{digest.hexdigest()[:10]}.mov"


def _index_path(pictures: Path) -> Path:
    return pictures.with_suffix(".npz")


def file_name(video: str) -> str:
    """A name for files made of a video: its own where every file system takes it with something added, else one like
    those of the cache, its readable part and a hash.
    """
    try:
        plain = len(video.encode()) <= LONGEST_NAME and video[:1] != "." and not re.search(r"[/\\\x00-\x1f\x7f]", video)
    except UnicodeEncodeError:  # bytes of a file name that are no text
        plain = False
    if plain:
        return video
    return f"{_readable(video)}-{hashlib.sha256(video.encode('utf-8', 'surrogatepass')).hexdigest()[:10]}"


def _readable(name: str) -> str:
    """Names may hold anything; the file system may not."""
    return re.sub(r"[^A-Za-z0-9._-]", "_", name)[:100]


def _load(request: CacheRequest, folder: Path, short_side: int) -> CachedVideo | None:
    """The complete entry for `request`, or None where there is none, or where it does not fit its files."""
    path = _entry_path(request, folder, short_side)
    width, height = cached_size(request.info, short_side)
    try:
        with np.load(_index_path(path), allow_pickle=False) as index:
            frames, offsets, sizes = (index[name] for name in ("frames", "offsets", "sizes"))
            checksums = index["checksums"]
            size = int(index["width"]), int(index["height"])
        length = path.stat().st_size
    except Exception:  # damaged bytes can make the readers of .npz and .npy raise anything
        return None
    if not (
        all(numbers.dtype == np.int64 and numbers.shape == request.frames.shape for numbers in (frames, offsets, sizes))
        and checksums.dtype == np.uint32
        and checksums.shape == frames.shape
        and np.array_equal(frames, request.frames)
        and bool(np.all((sizes > 0) & (sizes <= length) & (offsets >= 0) & (offsets <= length - sizes)))
        and size == (width, height)
    ):
        return None
    return CachedVideo(
        name=request.name,
        path=path,
        frames=frames,
        # of the probe, not of the index: an entry may be older than what is known of the file's clock
        pts=request.info.pts[request.frames],
        offsets=offsets,
        sizes=sizes,
        checksums=checksums,
        width=width,
        height=height,
        duration=request.info.duration,
    )


@contextlib.contextmanager
def _writing_to(folder: Path) -> Iterator[None]:
    """Turns what a full, read-only or forbidden disk raises into one sentence."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            reason = "the disk is full"
        elif error.errno == errno.EFBIG:
            reason = "a file would be larger than this system allows"
        else:
            reason = (error.strerror or str(error)).lower()
        raise InputError(f"the cache folder {folder} cannot be written: {reason}; --cache names another") from error


@contextlib.contextmanager
def _lock(folder: Path, tell: Callable[[str], None]) -> Iterator[int]:
    """Makes `folder` and holds it for this run alone; yields the descriptor that holds the lock.

    The lock goes when the last process that has the descriptor ends, however it ends.
    """
    with contextlib.ExitStack() as stack:
        with _writing_to(folder):
            folder.mkdir(parents=True, exist_ok=True)
            file = stack.enter_context(open(folder / ".lock", "wb"))
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                tell(f"waiting for another run that writes to {folder}")
                fcntl.flock(file, fcntl.LOCK_EX)
            except OSError as error:
                # some network file systems have no locks; there, runs that share a folder must not overlap
                if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP):
                    raise
            _remove_partial(folder)
        yield file.fileno()


def _remove_partial(folder: Path) -> None:
    for leftover in folder.glob("*.partial"):
        leftover.unlink(missing_ok=True)


def _check_free_space(requests: Sequence[CacheRequest], folder: Path, short_side: int) -> None:
    needed, free = estimate_bytes(requests, short_side), shutil.disk_usage(folder).free
    if needed > free:
        raise InputError(
            f"the frame cache needs about {needed / 1e9:.2f} GB more and {folder} has {free / 1e9:.2f} GB free; "
            "--cache names another folder"
        )


def _make_entry(request: CacheRequest, folder: Path, short_side: int, threads: int) -> CachedVideo | Skipped:
    """Decodes, encodes and indexes one video. OSError or InputError where the folder cannot be written."""
    require_pyav()
    import av

    path = _entry_path(request, folder, short_side)
    partial = path.with_name(path.name + ".partial")
    partial_index = path.with_name(_index_path(path).name + ".partial")
    try:
        with _writing_to(folder):
            _write_pictures(request, partial, short_side, threads)
            offsets, sizes, checksums = _written_pictures(partial, len(request.frames))
            width, height = cached_size(request.info, short_side)
            with open(partial_index, "wb") as file:
                np.savez(
                    file,
                    frames=np.asarray(request.frames, dtype=np.int64),
                    pts=request.info.pts[request.frames],
                    offsets=offsets,
                    sizes=sizes,
                    checksums=checksums,
                    width=width,
                    height=height,
                    duration=request.info.duration,
                )
                file.flush()
                os.fsync(file.fileno())
            os.replace(partial, path)
            os.replace(partial_index, _index_path(path))
    except VideoError as error:
        return Skipped(request.name, str(request.info.path), str(error))
    except av.FFmpegError as error:
        # not an OSError, which concerns the folder: a pixel format or size that cannot be converted
        return Skipped(request.name, str(request.info.path), f"video {request.info.path} cannot be converted: {error}")
    finally:
        partial.unlink(missing_ok=True)
        partial_index.unlink(missing_ok=True)
    entry = _load(request, folder, short_side)
    if entry is None:
        raise InputError(f"the cache folder {folder} does not keep what is written to it; --cache names another")
    return entry


def _in_processes(
    pending: Sequence[CacheRequest], folder: Path, short_side: int, workers: int, threads: int, lock: int
) -> Generator[tuple[CacheRequest, CachedVideo | Skipped]]:
    """Results in the order in which they are finished, from `workers` processes with `threads` decoder threads each.

    Plain processes that run `serve_requests`, and not a pool of multiprocessing: that would import the caller's main
    module, and torch with it, into every worker, and could not tell which video crashed one. Workers hold the lock
    too, so when this process is killed no other run touches the folder before they have ended.
    """
    # the longest first, so that no long one is left for the end
    todo = sorted(pending, key=lambda request: len(request.info.pts))
    finished: queue.SimpleQueue[tuple[CacheRequest, CachedVideo | Skipped] | BaseException] = queue.SimpleQueue()
    processes: list[subprocess.Popen[bytes]] = []
    changing = threading.Lock()
    stopped = False

    def feed_one_worker() -> None:
        worker: subprocess.Popen[bytes] | None = None
        try:
            while True:
                with changing:
                    if stopped or not todo:
                        return
                    request = todo.pop()
                    if worker is None:
                        worker = _start_worker(lock)
                        processes.append(worker)
                assert worker.stdin is not None and worker.stdout is not None
                try:
                    pickle.dump((request, folder, short_side, threads), worker.stdin)
                    worker.stdin.flush()
                    result = pickle.load(worker.stdout)
                except (EOFError, BrokenPipeError, pickle.UnpicklingError):
                    reason = f"the process that decoded video {request.info.path} died ({_fate(worker.wait())})"
                    worker = None
                    result = Skipped(request.name, str(request.info.path), reason)
                finished.put(result if isinstance(result, BaseException) else (request, result))
        except BaseException as error:
            finished.put(error)
        finally:
            if worker is not None and worker.stdin is not None:
                worker.stdin.close()
                worker.wait()

    feeders = [threading.Thread(target=feed_one_worker, daemon=True) for _ in range(workers)]
    try:
        for feeder in feeders:
            feeder.start()
        for _ in pending:
            result = finished.get()
            if isinstance(result, BaseException):
                raise result
            yield result
    finally:
        with changing:
            stopped = True
            for process in processes:
                process.kill()
        for feeder in feeders:
            feeder.join()
        _remove_partial(folder)


def _start_worker(lock: int) -> subprocess.Popen[bytes]:
    environment = dict(os.environ)
    # the package may be importable only through this process's own path, as in a checkout
    root = str(Path(__file__).resolve().parents[2])
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, (root, environment.get("PYTHONPATH"))))
    worker = subprocess.Popen(
        [sys.executable, "-c", "from lofi_fast.data.cache import serve_requests; serve_requests()"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=environment,
        pass_fds=(lock,),
    )
    assert worker.stdout is not None
    if worker.stdout.read(len(_READY)) != _READY:
        raise RuntimeError(f"a worker of the frame cache did not start ({_fate(worker.wait())})")
    return worker


def _fate(status: int) -> str:
    return f"signal {signal.Signals(-status).name}" if status < 0 else f"exit status {status}"


def serve_requests() -> None:
    """The life of one worker: requests come in on stdin, results and errors leave on stdout, both pickled."""
    # Ctrl-C reaches the whole group; the parent decides when a worker ends
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    requests = sys.stdin.buffer
    # nothing but results may reach the parent through stdout
    with os.fdopen(os.dup(1), "wb") as answers:
        os.dup2(2, 1)
        answers.write(_READY)
        answers.flush()
        while True:
            try:
                request, folder, short_side, threads = pickle.load(requests)
            except EOFError:
                return
            result: CachedVideo | Skipped | Exception
            try:
                result = _make_entry(request, folder, short_side, threads)
            except InputError as error:
                result = error
            except Exception:
                result = RuntimeError(f"a worker of the frame cache failed\n{traceback.format_exc()}")
            pickle.dump(result, answers)
            answers.flush()


def _write_pictures(request: CacheRequest, path: Path, short_side: int, threads: int) -> None:
    import av

    time_base = _time_base(request.info)
    # the time of the first picture is kept in units of its own, by default only milliseconds
    units = {"movie_timescale": str(time_base.denominator)}
    with av.open(str(path), "w", format="mov", container_options=units) as container:
        stream = container.add_stream("mjpeg", options=_MJPEG_OPTIONS)
        _settle_encoder(stream.codec_context, request.info, short_side)
        for _, picture in _pictures(request.info, request.frames, short_side, threads):
            container.mux(stream.encode(picture))
        container.mux(stream.encode(None))
    with open(path, "rb") as file:
        os.fsync(file.fileno())


def _time_base(info: VideoInfo) -> Fraction:
    """.mov counts in whole fractions of a second: 1/denominator holds every multiple of the source's time base."""
    return Fraction(1, info.time_base.denominator)


def _settle_encoder(context: VideoCodecContext, info: VideoInfo, short_side: int) -> None:
    from av.video.reformatter import ColorRange

    context.width, context.height = cached_size(info, short_side)
    context.pix_fmt, context.color_range = "yuvj420p", ColorRange.JPEG
    context.time_base = _time_base(info)
    context.thread_count = 1  # an encoder with more holds pictures back


def _pictures(info: VideoInfo, frames: np.ndarray, short_side: int, threads: int) -> Iterator[tuple[int, VideoFrame]]:
    """(source frame index, picture to encode) of each of `frames`: upright, at the size and in the colours kept."""
    width, height = cached_size(info, short_side)
    upright = info.rotation in (0, 180)
    convert = _Converter(*((width, height) if upright else (height, width)))
    time_base = _time_base(info)
    for index, frame in decode(info, frames, threads):
        picture = _upright(convert(frame), info.rotation, info.mirrored)
        picture.time_base = time_base
        if info.ticks is None:
            picture.pts = round((info.pts[index] - info.start) / time_base)
        else:
            picture.pts = int(info.ticks[index] - info.ticks[0]) * info.time_base.numerator
        yield index, picture


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

    A picture is held until no later selection needs it, so memory is that of one selection when these follow each
    other in time, as windows do. Selections are int64, sorted and unique, and their last frames ascend. `threads` of
    the decoder: 0 is one for each core.
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
    try:
        for index, picture in _pictures(info, wanted, short_side, threads):
            held[index] = np.frombuffer(b"".join(bytes(packet) for packet in encoder.encode(picture)), dtype=np.uint8)
            while number < len(selections) and selections[number][-1] <= index:
                frames = selections[number]
                yield HeldVideo(info.path, frames, tuple(held[int(frame)] for frame in frames), width, height)
                number += 1
                uses = last_use[np.searchsorted(wanted, np.fromiter(held, dtype=np.int64))]
                held = {frame: jpeg for (frame, jpeg), use in zip(held.items(), uses, strict=True) if use >= number}
    except av.FFmpegError as error:  # a pixel format or size that cannot be converted
        raise VideoError(f"video {info.path} cannot be converted: {error}") from error


class _Converter:
    """Scales frames to (width, height) and converts them from the matrix and range they are in to BT.601 full range.

    One object a video: the scaler is set up once and reused.
    """

    def __init__(self, width: int, height: int) -> None:
        from av.video.reformatter import VideoReformatter

        self._width, self._height = width, height
        self._reformatter = VideoReformatter()

    def __call__(self, frame: VideoFrame) -> VideoFrame:
        from av.video.reformatter import ColorRange, Colorspace, Interpolation

        # unspecified: standard definition was BT.601, high definition is BT.709; limited range unless told otherwise
        matrix = Colorspace[_MATRICES.get(frame.colorspace, "ITU601" if frame.height < 720 else "ITU709")]
        full = frame.color_range == ColorRange.JPEG or frame.format.name.startswith("yuvj")
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


def _written_pictures(path: Path, num_pictures: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Offset, size and CRC-32 of each picture in a written .mov, read back from the file itself."""
    import av

    with av.open(str(path)) as container:
        packets = (packet for packet in container.demux(container.streams.video[0]) if packet.size)
        written = [(packet.pos, packet.size, zlib.crc32(bytes(packet))) for packet in packets]
    if len(written) != num_pictures or any(offset is None for offset, *_ in written):
        raise OSError(errno.EIO, f"{len(written)} of {num_pictures} pictures were written")
    offsets, sizes, checksums = np.array(written, dtype=np.int64).T
    return np.ascontiguousarray(offsets), np.ascontiguousarray(sizes), checksums.astype(np.uint32)

"""The frame cache: each video decoded once, the frames of the full-fidelity grid kept as JPEG pictures.

An entry is `<name>-<hash>.mov`, intra-only MJPEG that any player opens, and `<name>-<hash>.npz`, its index, which says
where in it each picture lies, and a checksum of each. Both are written below `partial/` and renamed, the index last: an
entry is complete if and only if its index exists. The hash covers everything the pictures depend on, so a changed video
or grid is a new entry; its first two digits name the folder that the entry is in, so that no folder holds more than a
256th of the files. An index that is not what was written is treated as if it were not there.

Videos are decoded by PyAV, or by a GPU's video engine (data/nvdec.py) where there is one. The hash does not tell the
two apart: their pictures differ about as much as a JPEG differs from its source, so that an entry is as good for
either, and a cache that was filled on one machine serves on another.

Here entries are made and found; data/entry.py reads them.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import functools
import hashlib
import os
import pickle
import queue
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Collection, Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from lofi_fast import files
from lofi_fast.data import catalogue, nvdec
from lofi_fast.data.catalogue import Catalogue, Stamps, real_path
from lofi_fast.data.entry import CachedVideo, read_index
from lofi_fast.data.packages import require_pyav
from lofi_fast.data.pictures import cached_size, write_pictures, written_pictures
from lofi_fast.data.video import VideoError, VideoInfo
from lofi_fast.errors import InputError

# Part of the hash: raise it whenever the same request would give other pictures.
_FORMAT_VERSION = 1

_READY = b"ready"

PARTIAL = "partial"  # folder of the cache for files that are not whole yet
ABANDONED = 86_400.0  # seconds since the last byte, after which a file that another machine was writing is removed

ENGINE_WORKERS = 4  # processes that decode by NVDEC, at most; cards have one to seven engines
MOST_DEATHS = 3  # of such processes; then PyAV decodes what is left

LONGEST_NAME = 180  # bytes of a video's name in names of files; systems allow 255, and more is added


@dataclass(frozen=True, slots=True)
class CacheRequest:
    """Keep the source frames `frames` (int64, sorted, unique, not empty) of one probed video under `name`. `grid`: a
    text that says how the frames are chosen of any video; empty where nothing does.
    """

    name: str
    info: VideoInfo
    frames: np.ndarray
    grid: str = ""


@dataclass(frozen=True, slots=True)
class Skipped:
    """A video that could not be used, its file, and one sentence that says why."""

    name: str
    path: str
    reason: str


@dataclass(frozen=True)
class _Made:
    """What became of a request. `refused`: why the engine that was to decode it did not; "" where it did, or there was
    none.
    """

    result: CachedVideo | Skipped
    refused: str = ""


def estimate_bytes(requests: Sequence[CacheRequest], side: int) -> int:
    """Bytes on disk that entries for `requests` at the short side `side` take, within about a factor of two."""
    total = 0.0
    for request in requests:
        width, height = cached_size(request.info, side)
        # Fitted to two dozen clips at sides 64 to 256: a smaller picture of the same scene has more detail a pixel.
        total += len(request.frames) * 9 * (width * height) ** (2 / 3)
    return int(total)


def prepare(
    requests: Collection[CacheRequest],
    folder: Path,
    short_side: int,
    workers: int | None = None,
    progress: Callable[[int, int, str], None] | None = None,
    engine: str | None = None,
    note: Callable[[str], None] | None = None,
    engine_workers: int = ENGINE_WORKERS,
    *,
    alone: bool = True,
    known: Catalogue | None = None,
) -> tuple[dict[str, CachedVideo], list[Skipped]]:
    """Makes every requested entry that `folder` lacks, and returns all entries by name and the videos that failed.

    `workers` processes (default: one for each core) take one video each; `progress` is called from this thread with
    (videos done, videos in all, what was just done). `engine` is the device whose video engine decodes, as "cuda:0" (or
    "cpu", where DALI decodes VP9 and MJPEG), by default in `engine_workers` processes at most; PyAV decodes what it
    cannot, and everything without one. `note` is told at most once, which of the two decoded how many videos and why.
    May be killed at any time and run again. Several runs may share a folder: they take turns. Where not `alone`, they
    work side by side, on this machine and on others, each in an order of its own; an entry that two are making at once
    is kept of the one that ends first. Entries that the catalogue `known` holds are not opened; it learns of the
    others, but for those that were made within the last two seconds.

    Raises InputError when the folder cannot be written, the estimated size exceeds the free space, or an entry must be
    made without PyAV. ValueError for two requests of one name, no frames, or a short side below 2.
    """
    folder = Path(folder)
    if short_side < 2:
        raise ValueError("short_side must be at least 2")
    names: dict[str, None] = {}
    cached: dict[str, CachedVideo] = {}
    skipped: list[Skipped] = []

    def tell(what: str) -> None:
        if progress is not None:
            progress(len(cached) + len(skipped), len(requests), what)

    def take_complete(waiting: Iterable[CacheRequest]) -> list[CacheRequest]:
        pending = []
        for request in waiting:
            entry = _load(request, folder, short_side, known)
            if entry is None:
                pending.append(request)
            else:
                cached[request.name] = entry
                tell(request.name)
        return pending

    def sound() -> Iterator[CacheRequest]:
        for request in requests:
            if request.name in names:
                raise ValueError("two requests have the same name")
            if len(request.frames) == 0:
                raise ValueError("each request needs at least one frame")
            names[request.name] = None
            yield request

    pending = take_complete(sound())
    if pending:
        with _held(folder, tell, alone) as lock:
            pending = take_complete(pending)
            # the longest first, so that no long one is left for the end; side by side, not all the same one
            pending.sort(key=lambda request: -len(request.info.pts))
            if not alone:
                random.shuffle(pending)
            _check_free_space(pending, folder, short_side)
            cores = len(os.sched_getaffinity(0))
            missing = nvdec.missing(engine) if engine is not None else ""
            if missing:
                engine = None
            if workers is None:
                workers = cores if engine is None else min(cores, engine_workers)
            workers = min(workers, len(pending))
            results: Generator[tuple[CacheRequest, _Made]]
            # an engine always has processes: its device memory goes with them, and what kills one costs no more
            if workers > 1 or (pending and engine is not None):
                results = _in_processes(pending, folder, short_side, workers, max(1, cores // workers), lock, engine)
            else:
                results = ((request, _make_entry(request, folder, short_side, cores, None)) for request in pending)
            decoded, refused = 0, []
            made_at: deque[tuple[float, CacheRequest]] = deque()
            with contextlib.closing(results):
                for request, made in results:
                    if isinstance(made.result, Skipped):
                        skipped.append(made.result)
                    else:
                        cached[request.name] = made.result
                        decoded += 1
                        made_at.append((time.monotonic(), request))
                        if made.refused:
                            refused.append((request.name, made.refused))
                    tell(request.name)
                    # what has aged enough to be taken down is looked at once more, so that the next run need not
                    while made_at and time.monotonic() - made_at[0][0] > catalogue.FRESH:
                        _load(made_at.popleft()[1], folder, short_side, known)
            if note is not None and pending and (missing or engine is not None):
                note(_who_decoded(decoded, missing, refused))
    if not alone:
        _remove_partial(folder)  # of those that were killed meanwhile
    return {name: cached[name] for name in names if name in cached}, skipped


def _who_decoded(videos: int, missing: str, refused: Sequence[tuple[str, str]]) -> str:
    """One sentence about the `videos` that were decoded; `refused`: (name, reason) of those that the engine left."""
    if missing:
        return f"PyAV decoded the videos, on the CPU: {missing}"
    if not refused:
        return f"the GPU's video engine (NVDEC) decoded {videos} of {videos} videos"
    names: dict[str, list[str]] = {}
    for name, reason in refused:
        names.setdefault(reason, []).append(name)
    reasons = "; ".join(f"{reason} ({len(of)}, such as {of[0]})" for reason, of in names.items())
    done = videos - len(refused)
    return f"the GPU's video engine (NVDEC) decoded {done} of {videos} videos, PyAV the others: {reasons}"


def remembered(
    infos: Mapping[str, VideoInfo], grid: str, folder: Path, short_side: int, known: Catalogue
) -> dict[str, CachedVideo]:
    """The entries that a catalogue knows videos (by name) to have for a grid, without finding the grid's frames. Those
    whose files have changed are left out.
    """
    entries = {}
    for (name, info), entry in zip(infos.items(), known.entries(infos.values(), grid), strict=True):
        if entry is None:
            continue
        stem, stamps = entry
        place = os.path.join(folder, stem[-10:-8], stem)
        try:
            if Stamps.of(f"{place}.npz", f"{place}.mov") != stamps:
                continue
        except OSError:
            continue
        width, height = cached_size(info, short_side)
        entries[name] = CachedVideo(name, place, stamps.of_index[1], width, height, info)
    return entries


def lookup(
    requests: Iterable[CacheRequest], folder: Path, short_side: int, known: Catalogue | None = None
) -> dict[str, CachedVideo]:
    """The entries that are there and complete, by name; nothing is made."""
    found = {request.name: _load(request, folder, short_side, known) for request in requests}
    return {name: entry for name, entry in found.items() if entry is not None}


def entry_path(request: CacheRequest, folder: Path, short_side: int) -> Path:
    """Where the pictures of a request are, once they are made."""
    return Path(f"{_place(request, folder, short_side)}.mov")


def _place(request: CacheRequest, folder: Path, short_side: int) -> str:
    """The paths of both files of an entry without their suffixes."""
    info = request.info
    facts = f"{_FORMAT_VERSION}|{real_path(info.path)}|{info.size}|{info.mtime_ns}|{short_side}|"
    digest = hashlib.sha256(facts.encode("utf-8", "surrogateescape"))
    digest.update(np.ascontiguousarray(request.frames, dtype="<i8").tobytes())
    number = digest.hexdigest()[:10]
    return os.path.join(folder, number[:2], f"{_readable(request.name)}-{number}")


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


def _load(request: CacheRequest, folder: Path, short_side: int, known: Catalogue | None = None) -> CachedVideo | None:
    """The complete entry for `request`, or None where there is none, or where it does not fit its files."""
    place = _place(request, folder, short_side)
    stem = os.path.basename(place)
    try:
        stamps = Stamps.of(f"{place}.npz", f"{place}.mov")
    except OSError:
        return None
    width, height = cached_size(request.info, short_side)
    if known is None or not known.holds(stem, stamps):
        index = read_index(f"{place}.npz", stamps.of_pictures[0])
        if index is None or not np.array_equal(index.frames, request.frames) or index.size != (width, height):
            return None
    if known is not None:
        known.add_entry(stem, stamps, request.info, request.grid)
    return CachedVideo(request.name, place, stamps.of_index[1], width, height, request.info)


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
        elif error.errno in (errno.EEXIST, errno.ENOTDIR):
            reason = files.reason_of(error, Path(error.filename or folder) / "file")
        else:
            reason = (error.strerror or str(error)).lower()
        raise InputError(f"the cache folder {folder} cannot be written: {reason}; --cache names another") from error


@contextlib.contextmanager
def _held(folder: Path, tell: Callable[[str], None], alone: bool) -> Iterator[int | None]:
    """Makes `folder`, clears it of what killed runs have left, and, if `alone`, holds it for this run; then yields the
    descriptor that holds the lock.

    The lock goes when the last process that has the descriptor ends, however it ends.
    """
    with contextlib.ExitStack() as stack:
        with _writing_to(folder):
            (folder / PARTIAL).mkdir(parents=True, exist_ok=True)
            file = stack.enter_context(open(folder / ".lock", "wb")) if alone else None
            try:
                if file is not None:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                assert file is not None
                tell(f"waiting for another run that writes to {folder}")
                fcntl.flock(file, fcntl.LOCK_EX)
            except OSError as error:
                # some network file systems have no locks; there, runs that share a folder work side by side
                if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP):
                    raise
            _remove_partial(folder)
            _put_into_place(folder)
        yield None if file is None else file.fileno()


@functools.cache
def _machine() -> str:
    """Tells this machine, since it was started, and this container's processes from others that share a folder."""
    facts = [socket.gethostname()]
    with contextlib.suppress(OSError):
        facts += [Path("/proc/sys/kernel/random/boot_id").read_text(), os.readlink("/proc/self/ns/pid")]
    return hashlib.sha256("|".join(facts).encode()).hexdigest()[:8]


def _partial(path: Path, folder: Path) -> Path:
    """Where this process writes a file before it gets its name."""
    return folder / PARTIAL / f"{path.name}.{_machine()}-{os.getpid()}.partial"


def _remove_partial(folder: Path) -> None:
    """Removes what killed runs have left: of this machine where the process has ended, of others after a day."""
    for leftover in (*folder.glob("*.partial"), *(folder / PARTIAL).glob("*.partial")):
        writer = re.fullmatch(r".*\.([0-9a-f]{8})-(\d+)\.partial", leftover.name)
        with contextlib.suppress(OSError):
            if writer is None or (
                not files.is_alive(writer[2])
                if writer[1] == _machine()
                else time.time() - leftover.stat().st_mtime > ABANDONED
            ):
                leftover.unlink()


def _put_into_place(folder: Path) -> None:
    """Entries that lie in `folder` itself go to the folder of their hash."""
    for index in folder.glob(f"*-{'[0-9a-f]' * 10}.npz"):
        place = folder / index.stem[-10:-8]
        with contextlib.suppress(FileNotFoundError):  # another run is doing the same
            place.mkdir(exist_ok=True)
            for path in (index.with_suffix(".mov"), index):
                path.replace(place / path.name)


def _check_free_space(requests: Sequence[CacheRequest], folder: Path, short_side: int) -> None:
    needed, free = estimate_bytes(requests, short_side), shutil.disk_usage(folder).free
    if needed > free:
        raise InputError(
            f"the frame cache needs about {needed / 1e9:.2f} GB more and {folder} has {free / 1e9:.2f} GB free; "
            "--cache names another folder"
        )


def _make_entry(
    request: CacheRequest, folder: Path, short_side: int, threads: int, engine: nvdec.VideoEngine | None
) -> _Made:
    """Decodes, encodes and indexes one video. OSError or InputError where the folder cannot be written."""
    require_pyav()
    import av

    refused = ""
    path = entry_path(request, folder, short_side)
    if (entry := _load(request, folder, short_side)) is not None:  # of a run beside this one
        return _Made(entry)
    partial, partial_index = _partial(path, folder), _partial(_index_path(path), folder)
    try:
        with _writing_to(folder):
            try:
                write_pictures(request.info, request.frames, partial, short_side, threads, engine)
            except nvdec.Unsuitable as unsuitable:
                refused = str(unsuitable)
                write_pictures(request.info, request.frames, partial, short_side, threads)
            offsets, sizes, checksums = written_pictures(partial, len(request.frames))
            width, height = cached_size(request.info, short_side)
            with open(partial_index, "wb") as file:
                np.savez(
                    file,
                    frames=np.asarray(request.frames, dtype=np.int64),
                    offsets=offsets,
                    sizes=sizes,
                    checksums=checksums,
                    width=width,
                    height=height,
                )
                file.flush()
                os.fsync(file.fileno())
            path.parent.mkdir(exist_ok=True)
            if _load(request, folder, short_side) is None:
                os.replace(partial, path)
                os.replace(partial_index, _index_path(path))
    except VideoError as error:
        return _Made(Skipped(request.name, str(request.info.path), str(error)), refused)
    except av.FFmpegError as error:
        # not an OSError, which concerns the folder: a pixel format or size that cannot be converted
        reason = f"video {request.info.path} cannot be converted: {error}"
        return _Made(Skipped(request.name, str(request.info.path), reason), refused)
    finally:
        partial.unlink(missing_ok=True)
        partial_index.unlink(missing_ok=True)
    entry = _load(request, folder, short_side)
    if entry is None:
        raise InputError(f"the cache folder {folder} does not keep what is written to it; --cache names another")
    return _Made(entry, refused)


def _in_processes(
    pending: Sequence[CacheRequest],
    folder: Path,
    short_side: int,
    workers: int,
    threads: int,
    lock: int | None,
    engine: str | None = None,
) -> Generator[tuple[CacheRequest, _Made]]:
    """Results in the order in which they are finished, from `workers` processes with `threads` decoder threads each,
    which take up `pending` in its order.

    Plain processes that run `serve_requests`, and not a pool of multiprocessing: that would import the caller's main
    module, and torch with it, into every worker, and could not tell which video crashed one. Workers hold the lock
    too, so when this process is killed no other run touches the folder before they have ended. A video whose worker
    dies while `engine` decodes is decoded once more, by PyAV.
    """
    todo = list(reversed(pending))
    finished: queue.SimpleQueue[tuple[CacheRequest, _Made] | BaseException] = queue.SimpleQueue()
    processes: list[subprocess.Popen[bytes]] = []
    changing = threading.Lock()
    stopped = False
    died: dict[str, str] = {}  # name -> how the process ended in which the engine decoded it

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
                    refused = died.get(request.name, "")
                    if not refused and len(died) >= MOST_DEATHS:
                        refused = "it ended several processes"
                    by = None if refused else engine
                assert worker.stdin is not None and worker.stdout is not None
                try:
                    pickle.dump((request, folder, short_side, threads, by), worker.stdin)
                    worker.stdin.flush()
                    made = pickle.load(worker.stdout)
                except (EOFError, BrokenPipeError, pickle.UnpicklingError):
                    fate = _fate(worker.wait())
                    worker = None
                    if by is not None:
                        with changing:
                            died[request.name] = f"the process that used it died ({fate})"
                            todo.append(request)
                        continue
                    reason = f"the process that decoded video {request.info.path} died ({fate})"
                    made = _Made(Skipped(request.name, str(request.info.path), reason))
                if isinstance(made, _Made) and engine is not None and refused:
                    made = replace(made, refused=refused)
                finished.put(made if isinstance(made, BaseException) else (request, made))
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
            made = finished.get()
            if isinstance(made, BaseException):
                raise made
            yield made
    finally:
        with changing:
            stopped = True
            for process in processes:
                process.kill()
        for feeder in feeders:
            feeder.join()
        _remove_partial(folder)


def _start_worker(lock: int | None) -> subprocess.Popen[bytes]:
    environment = dict(os.environ)
    # the package may be importable only through this process's own path, as in a checkout
    root = str(Path(__file__).resolve().parents[2])
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, (root, environment.get("PYTHONPATH"))))
    worker = subprocess.Popen(
        [sys.executable, "-c", "from lofi_fast.data.cache import serve_requests; serve_requests()"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=environment,
        pass_fds=() if lock is None else (lock,),
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
    engine: nvdec.VideoEngine | None = None
    # nothing but results may reach the parent through stdout
    with os.fdopen(os.dup(1), "wb") as answers:
        os.dup2(2, 1)
        answers.write(_READY)
        answers.flush()
        while True:
            try:
                request, folder, short_side, threads, device = pickle.load(requests)
            except EOFError:
                return
            if engine is None and device is not None:
                engine = nvdec.VideoEngine(device)
            made: _Made | Exception
            try:
                made = _make_entry(request, folder, short_side, threads, None if device is None else engine)
            except InputError as error:
                made = error
            except Exception:
                made = RuntimeError(f"a worker of the frame cache failed\n{traceback.format_exc()}")
            pickle.dump(made, answers)
            answers.flush()

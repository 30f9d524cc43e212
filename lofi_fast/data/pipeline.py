"""From the frame cache to the encoder: JPEG packets in, uint8 RGB tensors out, decoded and resized by NVIDIA DALI.

One background thread works through the requests: it reads the packets (pread), runs DALI and copies the pictures into
a tensor that the consumer's thread has allocated. DALI's own `schedule_run` is asynchronous too, but leaves reading,
feeding and copying to the consumer, and a batch that needs several runs would stop prefetching after its first.
Here the consumer only waits, and DALI holds one run at a time: its memory is bounded by `max_frames` alone.

DALI owns no randomness and no position. Every request says which frames and which view, so a request that failed, or
was never looked at, can be sent again and gives the same bits.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Generator, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import groupby, islice
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.dlpack import from_dlpack

from lofi_fast.data.packages import require_dali, require_pyav
from lofi_fast.data.pictures import Pictures
from lofi_fast.errors import InputError
from lofi_fast.fidelity import FRAMES_PER_SNIPPET, Fidelity, select_snippets

if TYPE_CHECKING:
    from nvidia.dali import Pipeline

# nvJPEG takes this much device and pinned memory for each thread at the start, and grows by itself. DALI's defaults
# (16 and 8 MiB) are for photographs; a cached frame is a few hundred kilobytes, and these bytes count in the budget.
_NVJPEG_PADDING = 1 << 20

# Decoded by one run. A CPU decodes frames of 340x256 1.8 times as fast in runs of 4 MiB as of 32 MiB (they stay in its
# cache), and what a run holds comes on top of the step that it runs beside.
RUN_BYTES = {"cpu": 4 << 20, "cuda": 32 << 20}

_END_OF_IMAGE = b"\xff\xd9"  # the last marker of a JPEG picture


def pictures_of_a_run(pixels: int, device: str) -> int:
    """`max_frames` for cached pictures of at most `pixels`."""
    return max(RUN_BYTES[device] // (3 * pixels), 1)


def shrink(frames: torch.Tensor, decoded: Fidelity, fidelity: Fidelity) -> torch.Tensor:
    """Frames that were decoded at a higher fidelity, brought to a lower one on their device: when memory has shrunk
    since they were asked for, they need not be decoded again. The pixels differ a little from decoded ones.

    Args:
        frames: uint8 (B * L * 8, side, side, 3) of whole videos at `decoded`.
        fidelity: no more snippets and no larger a side. Its snippets are nearest to equally spaced among those decoded.
    """
    if decoded == fidelity:
        return frames
    snippets_BL = frames.unflatten(0, (-1, decoded.num_snippets, FRAMES_PER_SNIPPET))
    chosen = torch.from_numpy(select_snippets(decoded.num_snippets, fidelity.num_snippets)).to(frames.device)
    frames = snippets_BL.index_select(1, chosen).flatten(0, 2)
    if decoded.side == fidelity.side:
        return frames
    side = fidelity.side
    small = frames.new_empty((len(frames), side, side, 3))
    step = 8 * FRAMES_PER_SNIPPET  # at once, since they are floats in between
    for source, target in zip(frames.split(step), small.split(step), strict=True):
        x_NCHW = source.permute(0, 3, 1, 2).float()
        resized = F.interpolate(x_NCHW, (side, side), mode="bilinear", antialias=True)
        target.copy_(resized.round_().clamp_(0, 255).permute(0, 2, 3, 1))
    return small


@dataclass(frozen=True)
class View:
    """The part of a cached frame that is kept, as fractions of its height and width, then resized to a square.

    `top` and `left` are the corner, `height` and `width` the extent; `flip` mirrors left and right. The resize is
    linear and antialiased; at the border of the view it looks at the pixels beyond, where the frame has them.
    Raises ValueError where the view does not lie inside the frame.
    """

    top: float
    left: float
    height: float
    width: float
    flip: bool

    def __post_init__(self) -> None:
        for start, extent in ((self.top, self.height), (self.left, self.width)):
            # Written so that NaN fails; the slack is for fractions that were rounded on their way here.
            if not (start >= 0 and extent > 0 and start + extent <= 1 + 1e-6):
                raise ValueError(f"a view must lie inside the frame (fractions from 0 to 1), got {self}")


@dataclass(frozen=True, eq=False)
class FrameRequest:
    """Frames of one video, all seen through one view.

    `positions` (num_frames,) int64 count the pictures of `video`, in the order wanted (repeats allowed);
    `side` is the height and width of the result in pixels.
    """

    video: Pictures
    positions: np.ndarray
    view: View
    side: int


@dataclass(frozen=True, eq=False)
class _Picture:
    """One frame of a request."""

    request: FrameRequest
    position: int


class FramePipeline:
    """A DALI pipeline that serves frame requests on the CPU or on one GPU.

    `max_frames` bounds the pictures decoded at once (a larger batch takes several runs, with the same result), hence
    the decode pool: about max_frames * cached height * cached width * 3 bytes. `depth` is how many batches may be in
    flight while the consumer works; each holds its tensor of num_frames * side^2 * 3 bytes (`pending` in all).
    `num_threads` decode.
    On the CPU, DALI keeps a pool that was ever larger than 32 MiB until the process ends, so prefer a smaller one.
    On "cuda" the pictures are decoded by nvJPEG and never come back to the host.
    Raises InputError without DALI or PyAV.
    """

    def __init__(self, max_frames: int, device: str = "cpu", num_threads: int = 2, depth: int = 1) -> None:
        for name, value in (("max_frames", max_frames), ("num_threads", num_threads), ("depth", depth)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        self._device = torch.device(device)
        if self._device.type not in ("cpu", "cuda"):
            raise ValueError(f'device must be "cpu" or "cuda", got "{device}"')
        self._max_frames = max_frames
        self._num_threads = num_threads
        self._depth = depth
        self.pending = 0  # bytes of the tensors in flight
        self.waited = 0.0  # seconds that consumers have waited for tensors in all
        self._copy_stream: torch.cuda.Stream | None = None
        if self._device.type == "cuda":
            if self._device.index is None:
                self._device = torch.device("cuda", torch.cuda.current_device())
            self._copy_stream = torch.cuda.Stream(self._device)
        # Built here and not at the first request, so that its memory is already there when the planner measures.
        self._pipeline: Pipeline | None = self._build()
        self._worker = ThreadPoolExecutor(
            max_workers=1,
            thread_name_prefix="frames",
            # A thread starts on device 0, whichever the process has chosen.
            initializer=partial(torch.cuda.set_device, self._device) if self._device.type == "cuda" else None,
        )

    def stream(self, batches: Iterable[Sequence[FrameRequest]]) -> Generator[torch.Tensor]:
        """One uint8 tensor (num_frames, side, side, 3), RGB and contiguous, for each batch of requests, in order: the
        frames of its requests one after the other. The requests of a batch share one side.

        `batches` is read lazily in the consumer's thread, at most `depth` ahead of the tensor it holds; sides and
        frame counts may change from one to the next. The tensors belong to the consumer. A stream may be left at any
        time and a new one started.

        Raises InputError for a damaged picture, naming the cache file; MemoryError when DALI gets no memory (torch's
        own error when the tensor gets none); RuntimeError for any other failure of DALI. The pipeline is then rebuilt
        at the next batch, so what was not delivered can be asked for again. ValueError for a side below 1, a
        position outside the cache, or a batch of several sides.
        """
        incoming = iter(batches)
        in_flight: deque[tuple[Future[torch.Tensor], int]] = deque()

        def submit(count: int) -> None:
            for batch in islice(incoming, count):
                future, size = self._submit(batch)
                in_flight.append((future, size))
                self.pending += size

        try:
            submit(self._depth)
            while in_flight:
                # Held in a list and popped: a local variable would keep the tensor alive after the consumer drops it.
                asked = time.monotonic()
                ready = [in_flight[0][0].result()]
                self.waited += time.monotonic() - asked
                self.pending -= in_flight.popleft()[1]
                submit(1)
                yield ready.pop()
        finally:
            for future, size in in_flight:
                future.cancel()
                self.pending -= size

    def close(self) -> None:
        """Finish the run under way, drop the rest, and give back DALI's threads and memory."""
        self._worker.shutdown(wait=True, cancel_futures=True)
        self._pipeline = None

    def _submit(self, batch: Sequence[FrameRequest]) -> tuple[Future[torch.Tensor], int]:
        """Allocate in the consumer's thread, where running out of memory can be handled, and queue the work; with the
        bytes allocated.
        """
        sides = {request.side for request in batch}
        if len(sides) != 1 or min(sides) < 1:
            raise ValueError(f"the requests of a batch need one side of at least 1 pixel, got {sorted(sides)}")
        for request in batch:
            num_cached = len(request.video.frames)
            if np.any((request.positions < 0) | (request.positions >= num_cached)):
                raise ValueError(f"positions in {request.video.path} must be from 0 to {num_cached - 1}")
        num_frames, side = sum(len(request.positions) for request in batch), sides.pop()
        frames = torch.empty((num_frames, side, side, 3), dtype=torch.uint8, device=self._device)
        # The allocator hands out memory that kernels queued on the consumer's stream may still be reading.
        allocated = None if self._copy_stream is None else torch.cuda.current_stream(self._device).record_event()
        return self._worker.submit(self._load, batch, frames, allocated), frames.nbytes

    def _load(
        self, batch: Sequence[FrameRequest], frames: torch.Tensor, allocated: torch.cuda.Event | None
    ) -> torch.Tensor:
        wanted = [_Picture(request, position) for request in batch for position in request.positions]
        for start in range(0, len(frames), self._max_frames):
            part = frames[start : start + self._max_frames]
            # The copy is needed: DALI writes its next run into the same buffer. It also joins the runs of one batch.
            decoded = self._decode(wanted[start : start + self._max_frames])
            if self._copy_stream is None:
                part.copy_(decoded)
                continue
            with torch.cuda.stream(self._copy_stream):
                if allocated is not None:
                    self._copy_stream.wait_event(allocated)
                part.copy_(decoded)
            # Until the copy is done the buffer must not go back to DALI, nor the tensor to another stream.
            self._copy_stream.synchronize()
        return frames

    def _decode(self, pictures: list[_Picture]) -> torch.Tensor:
        jpegs: list[np.ndarray] = []
        for request, group in groupby(pictures, key=lambda picture: picture.request):
            jpegs += request.video.read(np.array([picture.position for picture in group]))
        for picture, jpeg in zip(pictures, jpegs, strict=True):
            # Zeros decode as grey blocks: a picture whose end was never written would pass.
            if jpeg[-2:].tobytes() != _END_OF_IMAGE:
                raise _damaged(picture)
        try:
            return self._run(jpegs, [picture.request.view for picture in pictures], pictures[0].request.side)
        except RuntimeError as error:
            failure = str(error)
        # Outside the handler, because the traceback holds the failed pipeline and all its memory. DALI's text alone
        # does not tell a damaged picture from a decoder that got no memory: both "failed to decode sample".
        in_decoder = "decoders.image" in failure
        if in_decoder:
            for picture, jpeg in zip(pictures, jpegs, strict=True):
                if not _is_decodable(jpeg):
                    raise _damaged(picture)
        if in_decoder or "alloc" in failure.lower():
            video = pictures[0].request.video
            size = f"{video.width}x{video.height}"
            raise MemoryError(f"DALI got no memory to decode {len(jpegs)} frames of {size} pixels on {self._device}")
        raise RuntimeError(failure)

    def _run(self, jpegs: list[np.ndarray], views: list[View], side: int) -> torch.Tensor:
        """One run: (len(jpegs), side, side, 3) uint8, on DALI's memory, valid until the next run."""
        if self._pipeline is None:
            self._pipeline = self._build()
        corners = [(v.top, v.left, v.top + v.height, v.left + v.width) for v in views]
        starts_ends = np.array(corners, dtype=np.float32)
        try:
            (batch,) = self._pipeline.run(
                jpegs=jpegs,
                start=np.ascontiguousarray(starts_ends[:, :2]),
                end=np.ascontiguousarray(starts_ends[:, 2:]),
                size=np.full((len(jpegs), 2), side, dtype=np.float32),
                flip=np.array([v.flip for v in views], dtype=np.int32),
            )
            return from_dlpack(batch.as_tensor())
        except Exception:
            # DALI declares a pipeline invalid after an error, and some inputs may have been fed without the others.
            self._pipeline = None
            raise

    def _build(self) -> Pipeline:
        require_dali()
        require_pyav()  # here, because `_is_decodable` is asked when memory is short
        from nvidia.dali import Pipeline, fn, types

        on_gpu = self._device.type == "cuda"
        pipeline = Pipeline(
            batch_size=self._max_frames,
            num_threads=self._num_threads,
            device_id=self._device.index if on_gpu else None,
            prefetch_queue_depth=1,
        )
        with pipeline:
            # no_copy: the packets outlive the run that reads them.
            jpegs = fn.external_source(name="jpegs", dtype=types.UINT8, ndim=1, no_copy=True)
            start, end, size = (fn.external_source(name=n, dtype=types.FLOAT, ndim=1) for n in ("start", "end", "size"))
            if on_gpu:
                pictures = fn.decoders.image(
                    jpegs,
                    device="mixed",
                    output_type=types.RGB,
                    adjust_orientation=False,
                    # The CPU decoder's chroma upsampling, so that both devices see nearly the same pixels.
                    jpeg_fancy_upsampling=True,
                    # Pinned decoder threads of several ranks would all sit on the same first cores.
                    affine=False,
                    device_memory_padding=_NVJPEG_PADDING,
                    host_memory_padding=_NVJPEG_PADDING,
                )
            else:
                pictures = fn.decoders.image(jpegs, device="cpu", output_type=types.RGB, adjust_orientation=False)
            flip = fn.external_source(name="flip", dtype=types.INT32, ndim=0)
            squares = fn.resize(
                pictures,
                roi_start=start,
                roi_end=end,
                roi_relative=True,
                size=size,
                interp_type=types.INTERP_LINEAR,
                antialias=True,
            )
            # `resize` also mirrors a region whose ends are swapped, but that is off by a level here and there.
            pipeline.set_outputs(fn.flip(squares, horizontal=flip))
        pipeline.build()
        return pipeline


def _is_decodable(jpeg: np.ndarray) -> bool:
    """A second opinion, from FFmpeg's decoder in its strict mode; it needs the memory of one picture."""
    import av

    decoder = av.CodecContext.create("mjpeg", "r")
    decoder.options = {"err_detect": "explode"}
    try:
        decoder.decode(av.Packet(jpeg.tobytes()))
    except av.InvalidDataError:
        return False
    return True


def _damaged(picture: _Picture) -> InputError:
    return InputError(
        f"picture {picture.position} of the cache file {picture.request.video.path} is damaged; delete the file and "
        "run again, it will be made anew"
    )

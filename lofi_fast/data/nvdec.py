"""Videos decoded by the video engine of a GPU (NVDEC), through NVIDIA DALI, into the pictures that PyAV would give.

A frame is asked for by its index in presentation order, as everywhere. DALI counts the packets' time stamps as
`video.probe` does, so only videos whose frames were found by their packets alone are taken. DALI knows no colour matrix
but BT.601, and tells nobody when it shows another frame than was asked for; so the first and the last picture of each
video are decoded by PyAV too, and a video where they differ is left to PyAV. Damage in between goes unnoticed here: the
engine conceals it.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import numpy as np

from lofi_fast.data.packages import require_dali
from lofi_fast.data.pictures import Converter, colours
from lofi_fast.data.video import VideoError, VideoInfo, decode
from lofi_fast.errors import InputError

if TYPE_CHECKING:
    from av.video.frame import VideoFrame
    from av.video.reformatter import Colorspace
    from nvidia.dali import Pipeline

# Mean absolute difference of a picture's 8-bit values (luma and subsampled chroma) from those of PyAV's. Of real videos
# it is 0.3 to 0.8: another filter when they are made smaller, chroma that went through RGB. Another matrix, range or
# frame of anything that moves is far beyond it.
TOLERANCE = 3.0

# What DALI 2.4 decodes, by the names of FFmpeg's decoders. On the CPU it serves the tests.
CODECS = {
    "cuda": frozenset(("h264", "hevc", "vp9", "av1", "libdav1d")),
    "cpu": frozenset(("vp9", "mjpeg")),
}

# NVDEC gives 8 bits of 10, as the pictures have. Its chroma is always of half the size.
PIXEL_FORMATS = frozenset(("yuv420p", "yuvj420p", "yuv420p10le"))

RUN_BYTES = {"cuda": 256 << 20, "cpu": 32 << 20}  # of decoded frames in one run, before they are made smaller
# Of the GPU's memory that one decoding process holds: its CUDA context, the engine's surfaces, a run, and what DALI
# keeps. On an NVIDIA H100 four processes were seen to hold 4.0 GB together.
PROCESS_BYTES = 1_100_000_000
_LARGEST_FILE = (1 << 31) - 1  # bytes; DALI counts them in 32 bits


class Unsuitable(Exception):
    """The engine cannot decode this video, or not as PyAV does. Its text is a reason: "the codec is mpeg4"."""


def missing(device: str) -> str:
    """Why no video can be decoded on `device` ("cuda:0", "cpu"), "" where they can."""
    try:
        require_dali()
    except InputError as error:
        return str(error)
    if device == "cpu":
        return ""
    try:
        ctypes.CDLL("libnvcuvid.so.1")
    except OSError:
        return (
            "the driver's video decoder, libnvcuvid.so.1, cannot be loaded (a container needs `video` among "
            "NVIDIA_DRIVER_CAPABILITIES)"
        )
    return ""


def why_not(info: VideoInfo, device: str) -> str:
    """What of a probed video keeps the engine of `device` ("cuda", "cpu") from it, "" where nothing does."""
    if info.codec not in CODECS[device]:
        return f"the codec is {info.codec}"
    if info.ticks is None or info.lost is not None or info.places is not None:
        return "its packets do not tell its frames"
    if info.pixel_format not in PIXEL_FORMATS:
        return f"the pixel format is {info.pixel_format}"
    if info.width % 2 or info.height % 2:
        return "a side is an odd number of pixels"
    if info.size > _LARGEST_FILE:
        return "the file is larger than 2 GiB"
    return ""


class VideoEngine:
    """Decodes videos on `device`: "cuda" and "cuda:1" by NVDEC; "cpu" by the decoders that DALI has there.

    It keeps one DALI pipeline, built at the first video and again after a failure. Raises InputError without DALI.
    """

    def __init__(self, device: str) -> None:
        require_dali()
        self._kind, _, number = device.partition(":")
        self._number = int(number or 0)
        self._pipeline: Pipeline | None = None

    def pictures(
        self, info: VideoInfo, frames: np.ndarray, width: int, height: int, threads: int
    ) -> Iterator[tuple[int, VideoFrame]]:
        """(source frame index, its picture of width x height pixels) of each of the sorted unique `frames`, in BT.601
        full range and not yet turned upright: within TOLERANCE what `pictures.Converter` makes of a frame that PyAV has
        decoded. `threads` are PyAV's, for the first frame and the last.

        Raises Unsuitable for what the engine cannot decode as PyAV does, before or between pictures, and VideoError for
        a file that cannot be read.
        """
        from av.video.reformatter import Colorspace

        if reason := why_not(info, self._kind):
            raise Unsuitable(reason)
        # without entry points the last frame would cost the decoding of all
        ends = np.unique(frames[[0, -1]]) if len(info.key_ticks) else frames[:1]
        by_pyav = Converter(width, height)
        expected: dict[int, VideoFrame] = {}
        matrix = Colorspace.ITU601
        for index, frame in decode(info, ends, threads):
            if frame.interlaced_frame:
                raise Unsuitable("the video is interlaced")
            matrix, _ = colours(frame)
            expected[index] = by_pyav(frame)
        convert = _FromRgb(matrix)
        try:
            file = np.memmap(info.path, dtype=np.uint8, mode="r")
        except OSError as error:
            raise VideoError(f"video {info.path} cannot be read: {error.strerror or error}") from error
        at_once = max(RUN_BYTES[self._kind] // (3 * info.width * info.height), 1)
        parts = [frames[start : start + at_once] for start in range(0, len(frames), at_once)]
        # the next run decodes while pictures of this one are compressed
        with ThreadPoolExecutor(max_workers=1, thread_name_prefix="nvdec") as ahead:
            coming = ahead.submit(self._run, file, parts[0], width, height)
            for number, part in enumerate(parts):
                try:
                    rgb_NHWC = coming.result()
                except RuntimeError as error:
                    raise Unsuitable(f"DALI refuses it: {_reason(error)}") from error
                if number + 1 < len(parts):
                    coming = ahead.submit(self._run, file, parts[number + 1], width, height)
                for index, rgb_HWC in zip(part.tolist(), rgb_NHWC, strict=True):
                    picture = convert(rgb_HWC)
                    if index in expected and difference(picture, expected[index]) > TOLERANCE:
                        raise Unsuitable("its pictures differ from those of PyAV")
                    yield index, picture

    def _run(self, file: np.ndarray, frames: np.ndarray, width: int, height: int) -> np.ndarray:
        """(len(frames), height, width, 3) uint8, in host memory of its own."""
        if self._pipeline is None:
            self._pipeline = self._build()
        try:
            (found,) = self._pipeline.run(
                file=[file],
                frames=[np.ascontiguousarray(frames, dtype=np.int32)],
                size=[np.array((height, width), dtype=np.float32)],
            )
            return np.array(found.as_cpu()[0])
        except Exception:
            self._pipeline = None  # DALI declares a pipeline invalid after an error
            raise

    def _build(self) -> Pipeline:
        from nvidia.dali import Pipeline, fn, types

        on_gpu = self._kind == "cuda"
        pipeline = Pipeline(
            batch_size=1, num_threads=1, device_id=self._number if on_gpu else None, prefetch_queue_depth=1
        )
        with pipeline:
            # no_copy: the file stays mapped for longer than the run
            file = fn.external_source(name="file", dtype=types.UINT8, ndim=1, no_copy=True)
            frames = fn.external_source(name="frames", dtype=types.INT32, ndim=1)
            size = fn.external_source(name="size", dtype=types.FLOAT, ndim=1)
            decoded = fn.decoders.video(
                file,
                device="mixed" if on_gpu else "cpu",
                frames=frames,
                pad_mode="none",  # a frame beyond the end is an error
                affine=False,
            )
            # of DALI's filters the nearest to the mean over areas, by which PyAV makes pictures smaller
            pipeline.set_outputs(fn.resize(decoded, size=size, interp_type=types.INTERP_CUBIC, antialias=True))
        pipeline.build()
        return pipeline


class _FromRgb:
    """Pictures in BT.601 full range of what DALI decodes. It takes every video's numbers for BT.601: what they are in
    truth is `matrix`, and is put right here.
    """

    def __init__(self, matrix: Colorspace) -> None:
        from av.video.reformatter import VideoReformatter

        self._matrix = matrix
        self._to_yuv, self._to_bt601 = VideoReformatter(), VideoReformatter()

    def __call__(self, rgb_HWC: np.ndarray) -> VideoFrame:
        from av.video.frame import VideoFrame
        from av.video.reformatter import ColorRange, Colorspace

        picture = self._to_yuv.reformat(
            VideoFrame.from_ndarray(rgb_HWC, format="rgb24"),
            format="yuvj420p",
            dst_colorspace=Colorspace.ITU601,
            dst_color_range=ColorRange.JPEG,
            threads=1,
        )
        if self._matrix == Colorspace.ITU601:
            return picture
        return self._to_bt601.reformat(
            picture,
            format="yuvj420p",
            src_colorspace=self._matrix,
            dst_colorspace=Colorspace.ITU601,
            src_color_range=ColorRange.JPEG,
            dst_color_range=ColorRange.JPEG,
            threads=1,
        )


def difference(one: VideoFrame, other: VideoFrame) -> float:
    """Mean absolute difference of the 8-bit values of two pictures of one size and form."""
    return float(np.abs(one.to_ndarray().astype(np.int16) - other.to_ndarray()).mean())


def _reason(error: RuntimeError) -> str:
    """The one line of DALI's text that says what happened."""
    _, _, told = str(error).partition("encountered:\n")
    return (told or str(error)).strip().partition("\n")[0]

"""Pictures by a video engine are those of PyAV: the same frames, in the same colours; what it cannot do is PyAV's.

Without a GPU, DALI's own decoders (VP9, MJPEG) go through everything but NVDEC itself.
"""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from av.video.frame import VideoFrame
from av.video.reformatter import ColorRange, Colorspace

from lofi_fast.data import cache, nvdec
from lofi_fast.data.cache import CacheRequest, prepare
from lofi_fast.data.dataset import cached_dataset
from lofi_fast.data.demo import generate
from lofi_fast.data.entry import CachedVideo
from lofi_fast.data.nvdec import PROCESS_BYTES, TOLERANCE, Unsuitable, VideoEngine, difference, missing, why_not
from lofi_fast.data.pictures import Converter, cached_size
from lofi_fast.data.survey import survey
from lofi_fast.data.video import VideoInfo, decode, probe
from lofi_fast.presets import demo
from lofi_fast.stages import job
from lofi_fast.stages.job import video_engine

BITS = 6
X264 = {"bf": "3", "g": "12", "x264-params": "b-adapt=0:b-pyramid=1:scenecut=0"}
X265 = {"x265-params": "keyint=12:bframes=3:log-level=none"}
VP9 = {"deadline": "realtime", "cpu-used": "8", "g": "10", "crf": "20", "b": "0"}
AV1 = {"preset": "8", "crf": "15", "svtav1-params": "keyint=12"}


def numbered(number: int, width: int, height: int) -> np.ndarray:
    """Coloured shades that move, and in the top rows the number in binary, as dark and light squares."""
    down, across = np.mgrid[:height, :width].astype(np.float64)
    pixels = np.stack((across / width, down / height, (across + 8 * number) / (2 * width) % 1), -1) * 160 + 40
    square = width // BITS
    for bit in range(BITS):
        pixels[: height // 4, bit * square : (bit + 1) * square] = 220 if number >> bit & 1 else 30
    return pixels.astype(np.uint8)


def number_of(picture: VideoFrame) -> int:
    luma = picture.to_ndarray(format="gray")
    centres = luma[luma.shape[0] // 8, luma.shape[1] // BITS // 2 :: luma.shape[1] // BITS][:BITS]
    return sum(1 << bit for bit in range(BITS) if centres[bit] > 125)


def write(
    path: Path,
    codec: str = "libvpx-vp9",
    options: dict[str, str] = VP9,
    size: tuple[int, int] = (240, 176),
    form: str = "yuv420p",
    matrix: str = "",
    full: bool = False,
    degrees: int = 0,
    frames: int = 40,
) -> Path:
    """Frames at irregular times. `matrix`: "ITU709" codes the colours so and says so."""
    ticks = np.cumsum(np.random.default_rng(0).integers(20, 60, frames)).tolist()
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=25, options=options)
        stream.width, stream.height, stream.pix_fmt = *size, form
        stream.codec_context.time_base = Fraction(1, 1000)
        target = Colorspace[matrix or "ITU601"]
        if matrix:
            stream.codec_context.colorspace = 1 if matrix == "ITU709" else 6
        if full:
            stream.codec_context.color_range = ColorRange.JPEG
        if degrees:
            stream.set_display_rotation(-degrees)
        for number, tick in enumerate(ticks):
            frame = VideoFrame.from_ndarray(numbered(number, *size), format="rgb24").reformat(
                format=form,
                dst_colorspace=target,
                dst_color_range=ColorRange.JPEG if full else ColorRange.MPEG,
            )
            frame.time_base, frame.pts = Fraction(1, 1000), tick
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


@functools.cache
def engine_of(device: str) -> VideoEngine:
    """One for all tests, as a process has one for all its videos."""
    return VideoEngine(device)


def both(device: str, info: VideoInfo, frames: np.ndarray, side: int) -> list[tuple[int, VideoFrame, VideoFrame]]:
    """(index, the engine's picture, PyAV's) of each frame."""
    width, height = cached_size(info, side)
    if info.rotation in (90, 270):
        width, height = height, width
    convert = Converter(width, height)
    expected = {index: convert(frame) for index, frame in decode(info, frames)}
    found = dict(engine_of(device).pictures(info, frames, width, height, 1))
    assert list(found) == list(expected) == frames.tolist()
    return [(index, found[index], expected[index]) for index in found]


def must_agree(device: str, info: VideoInfo, frames: np.ndarray, side: int) -> None:
    for index, picture, expected in both(device, info, frames, side):
        assert number_of(picture) == number_of(expected) == index
        assert (picture.width, picture.height) == (expected.width, expected.height)
        assert difference(picture, expected) <= TOLERANCE
    # the tolerance tells frames apart
    (_, one, _), (_, _, other) = both(device, info, np.array([3, 4]), side)
    assert difference(one, other) > TOLERANCE


IRREGULAR = np.array([0, 1, 2, 9, 10, 11, 12, 23, 24, 25, 37, 38, 39])


@pytest.mark.parametrize("side", [176, 96])
def test_frames_by_index_of_irregular_times(side: int, tmp_path: Path) -> None:
    must_agree("cpu", probe(write(tmp_path / "a video.webm")), IRREGULAR, side)


def test_every_frame_in_many_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(nvdec.RUN_BYTES, "cpu", 5 * 3 * 240 * 176)
    must_agree("cpu", probe(write(tmp_path / "v.webm")), np.arange(40), 176)


def test_one_frame(tmp_path: Path) -> None:
    [(index, picture, expected)] = both("cpu", probe(write(tmp_path / "v.webm")), np.array([39]), 96)
    assert index == 39 and difference(picture, expected) <= TOLERANCE


def test_mjpeg_is_full_range(tmp_path: Path) -> None:
    path = write(tmp_path / "v.mov", "mjpeg", {"qscale": "2"}, form="yuvj420p", full=True)
    must_agree("cpu", probe(path), IRREGULAR, 176)


@pytest.mark.parametrize("matrix, size", [("ITU709", (240, 176)), ("", (1280, 720)), ("ITU601", (1280, 720))])
def test_matrix_of_colours(matrix: str, size: tuple[int, int], tmp_path: Path) -> None:
    path = write(tmp_path / "v.webm", matrix=matrix, size=size, frames=8)
    for _, picture, expected in both("cpu", probe(path), np.arange(8), 176):
        assert difference(picture, expected) <= TOLERANCE / 2


def test_an_engine_goes_on_after_a_failure(tmp_path: Path) -> None:
    engine = VideoEngine("cpu")
    bad = dataclasses.replace(probe(write(tmp_path / "v.mp4", "libx264", X264)), codec="vp9")
    for _ in range(2):
        with pytest.raises(Unsuitable, match=r"^DALI refuses it: .*Failed to create video decoder"):
            list(engine.pictures(bad, np.arange(4), 240, 176, 1))
    good = probe(write(tmp_path / "v.webm"))
    assert [index for index, _ in engine.pictures(good, np.arange(4), 240, 176, 1)] == [0, 1, 2, 3]


def test_other_frames_than_pyavs_are_noticed(tmp_path: Path) -> None:
    """As if DALI counted one frame more than the probe."""
    info = probe(write(tmp_path / "v.webm"))
    assert info.ticks is not None
    late = dataclasses.replace(info, ticks=info.ticks[1:], pts=info.pts[1:])
    with pytest.raises(Unsuitable, match="its pictures differ"):
        list(VideoEngine("cpu").pictures(late, np.arange(4), 240, 176, 1))


@pytest.mark.parametrize(
    "reason, changed",
    [
        ("", {}),
        ("the codec is mpeg4", {"codec": "mpeg4"}),
        ("its packets do not tell its frames", {"ticks": None}),
        ("its packets do not tell its frames", {"lost": 0}),
        ("the pixel format is yuv444p", {"pixel_format": "yuv444p"}),
        ("a side is an odd number of pixels", {"width": 241}),
        ("the file is larger than 2 GiB", {"size": 1 << 31}),
    ],
)
def test_what_is_left_to_pyav(reason: str, changed: dict[str, object], tmp_path: Path) -> None:
    info = dataclasses.replace(probe(write(tmp_path / "v.webm", frames=2)), **changed)  # type: ignore[arg-type]
    assert why_not(info, "cpu") == why_not(info, "cuda") == reason


def request(path: Path, frames: np.ndarray = IRREGULAR) -> CacheRequest:
    return CacheRequest(path.stem, probe(path), frames)


def shown(video: CachedVideo) -> list[int]:
    context = av.CodecContext.create("mjpeg", "r")
    return [
        number_of(frame)
        for jpeg in video.read(np.arange(len(video.frames)))
        for frame in context.decode(av.Packet(jpeg.tobytes()))
    ]


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.suffix == ".mov"}


@pytest.mark.parametrize("workers", [1, None])
def test_a_cache_of_what_the_engine_can_and_cannot_decode(workers: int | None, tmp_path: Path) -> None:
    requests = [request(write(tmp_path / f"good{k}.webm")) for k in range(2)]
    requests += [request(write(tmp_path / f"other{k}.mp4", "libx264", X264)) for k in range(2)]
    broken = request(write(tmp_path / "broken.webm"))
    data = broken.info.path.read_bytes()
    broken.info.path.write_bytes(data[:200] + bytes(len(data) - 200))
    requests.insert(1, broken)
    notes: list[str] = []
    told: list[tuple[int, int, str]] = []
    cached, skipped = prepare(
        requests, tmp_path / "cache", 96, workers, lambda *step: told.append(step), engine="cpu", note=notes.append
    )
    assert [one.name for one in skipped] == ["broken"]
    assert sorted(cached) == ["good0", "good1", "other0", "other1"]
    assert all(shown(video) == IRREGULAR.tolist() for video in cached.values())
    assert notes == [
        "the GPU's video engine (NVDEC) decoded 2 of 4 videos, PyAV the others: the codec is h264 (2, such as "
        f"{next(name for _, _, name in told if name.startswith('other'))})"
    ]
    assert [done for done, _, _ in told] == [1, 2, 3, 4, 5]
    # what PyAV decodes has the bytes that it has without an engine; and an entry serves whoever made it
    by_pyav, _ = prepare(requests, tmp_path / "pyav", 96, 1)
    engines, pyavs = files(tmp_path / "cache"), files(tmp_path / "pyav")
    assert engines.keys() == pyavs.keys()
    assert {name for name in engines if engines[name] == pyavs[name]} == {
        name for name in engines if name.startswith("other")
    }
    again, _ = prepare(requests, tmp_path / "cache", 96, 1, engine="cpu", note=notes.append)
    assert files(tmp_path / "cache") == engines
    np.testing.assert_array_equal(again["good0"].pts, by_pyav["good0"].pts)


def test_a_process_that_the_engine_ends_costs_no_video(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # found before the real one by the processes that decode
    fatal = tmp_path / "path" / "nvidia"
    fatal.mkdir(parents=True)
    (fatal / "__init__.py").write_text("import os; os.abort()\n")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join((str(tmp_path / "path"), os.environ.get("PYTHONPATH", ""))))
    path = write(tmp_path / "v.webm")
    requests = [dataclasses.replace(request(path), name=f"v{k}") for k in range(cache.MOST_DEATHS + 1)]
    notes: list[str] = []
    cached, skipped = prepare(requests, tmp_path / "cache", 96, 1, engine="cpu", note=notes.append)
    assert not skipped and all(shown(cached[one.name]) == IRREGULAR.tolist() for one in requests)
    assert notes[0].startswith("the GPU's video engine (NVDEC) decoded 0 of 4 videos, PyAV the others: the process")
    assert "died (signal SIGABRT) (3, such as v" in notes[0] and "it ended several processes (1, " in notes[0]


@pytest.mark.skipif(not missing("cuda:0"), reason="this machine has NVDEC")
def test_a_machine_without_an_engine_says_so_and_fills_the_cache_as_ever(tmp_path: Path) -> None:
    wanted = [request(write(tmp_path / "v.mp4", "libx264", X264))]
    notes: list[str] = []
    prepare(wanted, tmp_path / "cache", 96, engine="cuda:0", note=notes.append)
    prepare(wanted, tmp_path / "pyav", 96, note=notes.append)
    assert files(tmp_path / "cache") == files(tmp_path / "pyav")
    [note] = notes
    assert note.startswith("PyAV decoded the videos, on the CPU: the driver's video decoder, libnvcuvid.so.1, cannot")


def test_a_data_set_says_which_videos_pyav_decoded(tmp_path: Path) -> None:
    annotations, videos = generate(tmp_path / "demo", num_training=1, num_validation=1)
    dataset = cached_dataset(survey(demo(), annotations, videos), tmp_path / "frames", lambda *_: None, "cpu")
    assert sum(map(len, dataset.samples.values())) == 2
    assert dataset.notes[-1].startswith(
        "the GPU's video engine (NVDEC) decoded 0 of 2 videos, PyAV the others: the codec"
    )


@pytest.mark.parametrize("decoder, device", [("auto", "cpu"), ("pyav", "auto")])
def test_pyav_is_used_where_it_is_asked_for(decoder: str, device: str) -> None:
    config = demo()
    data = dataclasses.replace(config.data, decoder=decoder)
    assert video_engine(dataclasses.replace(config, data=data, device=device), 10**12) == (None, 0)


def test_processes_of_the_engine_stay_within_the_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(job, "choose_device", lambda _: torch.device("cuda", 0))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    rooms = (-1, PROCESS_BYTES - 1, PROCESS_BYTES, 3 * PROCESS_BYTES, 80 * PROCESS_BYTES)
    assert [video_engine(demo(), room)[1] for room in rooms] == [0, 0, 1, 3, 4]
    assert [video_engine(demo(), room)[0] for room in rooms] == [None, None, "cuda:0", "cuda:0", "cuda:0"]


GPU_VIDEOS: dict[str, tuple[str, Callable[[Path], Path]]] = {
    "h264_b_frames": ("v.mp4", lambda path: write(path, "libx264", X264)),
    "h264_mkv": ("v.mkv", lambda path: write(path, "libx264", X264)),
    "h264_720": ("v.mp4", lambda path: write(path, "libx264", X264, size=(1280, 720))),
    "h264_709": ("v.mp4", lambda path: write(path, "libx264", X264, matrix="ITU709")),
    "h264_full_range": ("v.mp4", lambda path: write(path, "libx264", X264, form="yuvj420p", full=True)),
    "h264_no_entry_points": ("v.mp4", lambda path: write(path, "libx264", {"x264-params": "intra-refresh=1"})),
    "hevc": ("v.mp4", lambda path: write(path, "libx265", X265)),
    "hevc_10_bit": ("v.mp4", lambda path: write(path, "libx265", X265, form="yuv420p10le")),
    "vp9": ("v.webm", lambda path: write(path)),
    "av1": ("v.mkv", lambda path: write(path, "libsvtav1", AV1)),
    "av1_10_bit": ("v.mp4", lambda path: write(path, "libsvtav1", AV1, form="yuv420p10le")),
    "rotated": ("v.mp4", lambda path: write(path, "libx264", X264, degrees=90)),
}


@pytest.mark.parametrize("name", GPU_VIDEOS)
def test_videos_of_the_gpu_tests_are_right_by_pyav(name: str, tmp_path: Path) -> None:
    """So that a failure on a GPU is the engine's."""
    file, make = GPU_VIDEOS[name]
    info = probe(make(tmp_path / file))
    assert why_not(info, "cuda") == ""
    assert len(info.pts) == 40 and np.ptp(np.diff(info.pts)) > 0.03
    convert = Converter(240, 176)
    numbers = [number_of(convert(frame)) for _, frame in decode(info, np.arange(40))]
    assert numbers == list(range(40))


@pytest.mark.gpu
@pytest.mark.parametrize("side", [176, 96])
@pytest.mark.parametrize("name", GPU_VIDEOS)
def test_nvdec_gives_pyavs_pictures(name: str, side: int, tmp_path: Path) -> None:
    if reason := missing("cuda:0"):
        pytest.skip(reason)
    file, make = GPU_VIDEOS[name]
    info = probe(make(tmp_path / file))
    try:
        must_agree("cuda:0", info, IRREGULAR, side)
        must_agree("cuda:0", info, np.arange(40), side)
    except Unsuitable as unsuitable:
        if "not supported" not in str(unsuitable):  # by this GPU, as AV1 by an H100
            raise
        pytest.skip(str(unsuitable))


@pytest.mark.gpu
def test_a_cache_filled_by_nvdec(tmp_path: Path) -> None:
    """Several videos at once, one that NVDEC cannot decode, one that is broken."""
    if reason := missing("cuda:0"):
        pytest.skip(reason)
    requests = [request(write(tmp_path / f"good{k}.mp4", "libx264", X264)) for k in range(5)]
    requests.append(request(write(tmp_path / "other.mov", "mjpeg", {"qscale": "2"}, form="yuvj420p", full=True)))
    broken = request(write(tmp_path / "broken.mp4", "libx264", X264))
    broken.info.path.write_bytes(bytes(broken.info.path.stat().st_size))
    requests.append(broken)
    notes: list[str] = []
    cached, skipped = prepare(requests, tmp_path / "cache", 96, engine="cuda:0", note=notes.append)
    assert [one.name for one in skipped] == ["broken"] and len(cached) == 6
    assert all(shown(video) == IRREGULAR.tolist() for video in cached.values())
    [note] = notes
    assert note == (
        "the GPU's video engine (NVDEC) decoded 5 of 6 videos, PyAV the others: the codec is mjpeg (1, such as other)"
    )

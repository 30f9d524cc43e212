"""Every frame that `decode` yields must be the one shown at `pts[index]`, whatever the codec and container do.

Test videos carry their own frame number as a bar code of dark and light squares, so identity is read from pixels.
"""

from __future__ import annotations

import os
from fractions import Fraction
from itertools import pairwise
from pathlib import Path

import av
import numpy as np
import pytest
from av.video.frame import VideoFrame
from detectors import with_early_sound

from lofi_fast.data.video import VideoError, VideoInfo, decode, probe, stated_duration, stated_rate
from lofi_fast.errors import InputError

DATA = Path(__file__).resolve().parents[2] / "shared" / "data"
TRAPS = DATA / "videos"
needs_data = pytest.mark.skipif(not TRAPS.is_dir(), reason="the folder with real videos is absent")

BITS = 8
SQUARE = 16


def numbered(number: int, width: int = BITS * SQUARE, height: int = 48) -> VideoFrame:
    """A grey frame whose top row of squares spells `number` in binary."""
    pixels = np.full((height, width, 3), 90, dtype=np.uint8)
    for bit in range(BITS):
        pixels[:SQUARE, bit * SQUARE : (bit + 1) * SQUARE] = 230 if number >> bit & 1 else 20
    # something that moves, so that encoders choose B-frames
    pixels[SQUARE:, number % width :: 16] = 140
    return VideoFrame.from_ndarray(pixels, format="rgb24")


def number_of(frame: VideoFrame) -> int:
    luma = frame.to_ndarray(format="gray")
    centres = luma[SQUARE // 2, SQUARE // 2 :: SQUARE][:BITS]
    return sum(1 << bit for bit in range(BITS) if centres[bit] > 125)


def write_video(
    path: Path,
    num_frames: int,
    codec: str = "libx264",
    rate: int | Fraction = 25,
    options: dict[str, str] | None = None,
    ticks: list[int] | None = None,
    time_base: Fraction | None = None,
    container_options: dict[str, str] | None = None,
) -> Path:
    with av.open(str(path), "w", container_options=container_options or {}) as container:
        stream = container.add_stream(codec, rate=rate, options=options or {})
        stream.width, stream.height, stream.pix_fmt = BITS * SQUARE, 48, "yuv420p"
        if codec == "mjpeg":
            stream.pix_fmt = "yuvj420p"
        if time_base is not None:
            stream.codec_context.time_base = time_base
        for i in range(num_frames):
            frame = numbered(i)
            frame.time_base = time_base or 1 / Fraction(rate)
            frame.pts = ticks[i] if ticks else i
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def all_numbers(info: VideoInfo, frames: np.ndarray) -> list[tuple[int, int]]:
    return [(index, number_of(frame)) for index, frame in decode(info, frames, threads=1)]


X264_B = {"bf": "3", "g": "12", "x264-params": "b-adapt=0:b-pyramid=1:scenecut=0"}
X264_OPEN_GOP = {"bf": "3", "g": "12", "x264-params": "open-gop=1:b-adapt=0:scenecut=0"}
X264_INTRA_REFRESH = {"g": "12", "x264-params": "intra-refresh=1:scenecut=0"}

VIDEOS = {
    "h264_b_frames_mp4": ("v.mp4", "libx264", X264_B),
    "h264_open_gop_mp4": ("v.mp4", "libx264", X264_OPEN_GOP),
    "h264_open_gop_mkv": ("v.mkv", "libx264", X264_OPEN_GOP),
    "h264_intra_refresh_mkv": ("v.mkv", "libx264", X264_INTRA_REFRESH),
    "h264_ms_times_mkv": ("v.mkv", "libx264", X264_B),
    "h264_transport_stream": ("v.ts", "libx264", X264_B),
    "h264_avi_without_pts": ("v.avi", "libx264", X264_B),
    "hevc_mp4": ("v.mp4", "libx265", {"x265-params": "log-level=none:keyint=12"}),
    "mpeg4_b_frames_avi": ("v.avi", "mpeg4", {"bf": "2", "g": "12"}),
    "mpeg4_b_frames_mp4": ("v.mp4", "mpeg4", {"bf": "2", "g": "12"}),
    "mpeg2_program_stream": ("v.mpg", "mpeg2video", {"bf": "2", "g": "12"}),
    "vp8_hidden_frames_webm": ("v.webm", "libvpx", {"auto-alt-ref": "1", "lag-in-frames": "16", "g": "12"}),
    "vp9_webm": ("v.webm", "libvpx-vp9", {"auto-alt-ref": "1", "lag-in-frames": "16", "g": "12", "cpu-used": "8"}),
    "mjpeg_mov": ("v.mov", "mjpeg", {}),
}


@pytest.mark.parametrize("case", VIDEOS)
def test_decodes_exactly_the_frame_asked_for(case: str, tmp_path: Path) -> None:
    file, codec, options = VIDEOS[case]
    path = write_video(tmp_path / file, 60, codec, options=options)
    info = probe(path)
    assert len(info.pts) == 60
    # .mkv and .webm round to 1 ms, .ts and .mpg are exact at 25 fps
    np.testing.assert_allclose(info.pts, np.arange(60) / 25, atol=0.0011)
    assert info.duration == pytest.approx(60 / 25, abs=0.0011)
    assert (info.width, info.height, info.rotation) == (128, 48, 0)
    for frames in (np.arange(60), np.arange(3, 60, 7), np.array([0]), np.array([58, 59]), np.array([13, 14, 47])):
        assert all_numbers(info, frames) == [(int(i), int(i)) for i in frames]


@pytest.mark.parametrize(
    ("codec", "options"), [("libx264", {"bf": "0"}), ("libx264", X264_B), ("mpeg4", {}), ("mjpeg", {})]
)
def test_an_avi_with_empty_chunks(codec: str, options: dict[str, str], tmp_path: Path) -> None:
    """The picture before them stays on the screen. A cut by stream copy begins so, where its sound begins first."""
    path = tmp_path / "v.avi"
    ticks = [0, *range(41, 60), *range(70, 90)]
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=25, options=options)
        stream.width, stream.height, stream.pix_fmt = BITS * SQUARE, 48, "yuv420p"
        if codec == "mjpeg":
            stream.pix_fmt = "yuvj420p"
        for i, tick in enumerate(ticks):
            frame = numbered(i)
            frame.pts = tick
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    info = probe(path)
    assert len(info.pts) == 40 and info.start == 0.0
    # a chunk has its place in the order of coding, and pictures have none of their own
    leeway = 0.121 if options is X264_B else 1e-6
    assert np.median(np.abs(info.pts - np.array(ticks) / 25)) <= leeway
    if options is not X264_B:
        np.testing.assert_allclose(info.pts, np.array(ticks) / 25, atol=1e-6)
    assert all_numbers(info, np.array([0, 1, 20, 39])) == [(i, i) for i in (0, 1, 20, 39)]


def test_pts_are_exact_for_ntsc_rates(tmp_path: Path) -> None:
    rate = Fraction(30000, 1001)
    info = probe(write_video(tmp_path / "v.mp4", 30, rate=rate, options=X264_B))
    assert info.pts.tolist() == [float(Fraction(i) / rate) for i in range(30)]
    assert info.duration == pytest.approx(float(30 / rate), abs=1e-9)
    assert info.fps == pytest.approx(float(rate))


def test_variable_frame_rate_keeps_each_time(tmp_path: Path) -> None:
    ticks = [0, 40, 80, 500, 533, 567, 2000, 2010, 2020, 4000]
    path = write_video(
        tmp_path / "v.mp4", 10, ticks=ticks, time_base=Fraction(1, 1000), options={"bf": "2"}, rate=Fraction(25)
    )
    info = probe(path)
    np.testing.assert_allclose(info.pts, np.array(ticks) / 1000, atol=1e-9)
    assert all_numbers(info, np.array([3, 6, 9])) == [(3, 3), (6, 6), (9, 9)]


def test_times_count_from_the_first_frame(tmp_path: Path) -> None:
    path = write_video(
        tmp_path / "v.mkv", 5, ticks=[7000 + 40 * i for i in range(5)], time_base=Fraction(1, 1000), options=X264_B
    )
    info = probe(path)
    np.testing.assert_allclose(info.pts, np.arange(5) * 0.04, atol=1e-9)
    assert all_numbers(info, np.array([4])) == [(4, 4)]


def write_with_sound(path: Path, first_frame: int, first_sound: int) -> Path:
    """Ten frames at 25 a second and a second of silence, each starting at so many milliseconds."""
    with av.open(str(path), "w") as container:
        video = container.add_stream("libx264", rate=25, options=X264_B)
        video.width, video.height, video.pix_fmt = BITS * SQUARE, 48, "yuv420p"
        video.codec_context.time_base = Fraction(1, 1000)
        sound = container.add_stream("pcm_s16le", rate=8000)
        sound.layout = "mono"
        silence = av.AudioFrame.from_ndarray(np.zeros((1, 8000), dtype=np.int16), format="s16", layout="mono")
        silence.sample_rate, silence.pts, silence.time_base = 8000, 8 * first_sound, Fraction(1, 8000)
        container.mux(sound.encode(silence))
        container.mux(sound.encode(None))
        for i in range(10):
            frame = numbered(i)
            frame.pts, frame.time_base = first_frame + 40 * i, Fraction(1, 1000)
            container.mux(video.encode(frame))
        container.mux(video.encode(None))
    return path


@pytest.mark.parametrize(
    ("first_frame", "first_sound", "start"), [(0, 0, 0.0), (7000, 7000, 0.0), (7500, 7000, 0.5), (200, 900, 0.0)]
)
def test_a_players_clock_begins_with_the_earliest_stream(
    first_frame: int, first_sound: int, start: float, tmp_path: Path
) -> None:
    info = probe(write_with_sound(tmp_path / "v.mkv", first_frame, first_sound))
    assert info.start == pytest.approx(start, abs=1e-6)
    np.testing.assert_allclose(info.pts, start + np.arange(10) * 0.04, atol=1e-9)
    assert info.duration == pytest.approx(start + 0.4, abs=1e-3)
    assert info.fps == pytest.approx(25, rel=0.01)
    assert all_numbers(info, np.array([0, 5, 9])) == [(0, 0), (5, 5), (9, 9)]


def test_one_frame(tmp_path: Path) -> None:
    info = probe(write_video(tmp_path / "v.mp4", 1))
    assert info.pts.tolist() == [0.0]
    assert info.duration == pytest.approx(1 / 25)
    assert all_numbers(info, np.array([0])) == [(0, 0)]
    assert all_numbers(info, np.array([], dtype=np.int64)) == []


@pytest.mark.parametrize("degrees", [90, 180, 270])
def test_rotation_is_reported_clockwise(degrees: int, tmp_path: Path) -> None:
    path = tmp_path / "v.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=25)
        stream.width, stream.height, stream.pix_fmt = 128, 48, "yuv420p"
        # PyAV, like FFmpeg, gives the angle counterclockwise
        stream.set_display_rotation(-degrees)
        container.mux(stream.encode(numbered(0)))
        container.mux(stream.encode(None))
    info = probe(path)
    assert info.rotation == degrees
    assert (info.width, info.height) == ((48, 128) if degrees in (90, 270) else (128, 48))


@pytest.mark.parametrize(
    ("frames", "complaint"),
    [([3, 2], "sorted"), ([2, 2], "unique"), ([-1], "within"), ([10], "within"), ([[1]], "sorted")],
)
def test_decode_refuses_bad_indices(frames: list[int], complaint: str, tmp_path: Path) -> None:
    info = probe(write_video(tmp_path / "v.mp4", 10))
    with pytest.raises(ValueError, match=complaint):
        decode(info, np.array(frames))


def test_unusable_files_are_one_sentence_each(tmp_path: Path) -> None:
    (tmp_path / "empty.mp4").touch()
    (tmp_path / "text.mp4").write_text("not a video\n" * 100)
    (tmp_path / "noise.mkv").write_bytes(np.random.default_rng(0).bytes(5000))
    (tmp_path / "folder.mp4").mkdir()
    with av.open(str(tmp_path / "sound.mp4"), "w") as container:
        stream = container.add_stream("aac", rate=8000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 8000
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    for name in ("empty.mp4", "text.mp4", "noise.mkv", "folder.mp4", "sound.mp4", "absent.mp4"):
        with pytest.raises(VideoError) as caught:
            probe(tmp_path / name)
        sentence = str(caught.value)
        assert str(tmp_path / name) in sentence and "\n" not in sentence
        assert isinstance(caught.value, InputError)


@pytest.mark.parametrize("name", ["10:30.mp4", "concat:a.mp4", "file:.mp4", "-i.mp4", "%03d.mp4", "a|b?c#d.mp4"])
def test_a_name_is_that_of_a_file_whatever_ffmpeg_makes_of_it(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    path = Path(write_video(tmp_path / "v.mp4", 20).rename(name).name)
    info = probe(path)
    assert all_numbers(info, np.array([0, 19])) == [(0, 0), (19, 19)]
    assert stated_duration(path) == pytest.approx(0.8) and stated_rate(path) == 25


def test_what_is_no_file_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(pipe := tmp_path / "pipe.mp4")
    (device := tmp_path / "device.mp4").symlink_to("/dev/zero")
    (folder := tmp_path / "folder.mp4").mkdir()
    for path in (pipe, device, folder):
        assert stated_duration(path) == stated_rate(path) == 0
        with pytest.raises(VideoError, match=f"{path.name} is a pipe, a device or a folder, and no file"):
            probe(path)


def test_a_truncated_mp4_gives_what_is_left_and_says_so(tmp_path: Path) -> None:
    # the index first, so that the file can be opened at all
    whole = write_video(tmp_path / "v.mp4", 60, options=X264_B, container_options={"movflags": "faststart"})
    info = probe(whole)
    data = whole.read_bytes()
    whole.write_bytes(data[: len(data) * 2 // 3])
    seen = []
    with pytest.raises(VideoError, match="of 60 frames"):
        for index, frame in decode(info, np.arange(60), threads=1):
            assert number_of(frame) == index
            seen.append(index)
    assert 10 < len(seen) < 60 and seen == list(range(len(seen)))
    # probed as it is now, the file is a shorter video without a fault
    shorter = probe(whole)
    assert len(seen) <= len(shorter.pts) < 60
    indices = np.arange(len(shorter.pts))
    assert all_numbers(shorter, indices) == [(i, i) for i in indices]


# Damaged and joined streams: what decodes is used.

STREAMS = {
    "h264_ts": ("v.ts", "libx264", X264_B),
    "h264_m2ts": ("v.m2ts", "libx264", X264_B),
    "mpeg2_ts": ("v.ts", "mpeg2video", {"bf": "2", "g": "12"}),
    "mpeg2_program_stream": ("v.mpg", "mpeg2video", {"bf": "2", "g": "12"}),
}


def agreeing(path: Path) -> tuple[VideoInfo, list[int]]:
    """The probe, and the numbers of all its frames, decoded in two ways."""
    info = probe(path)
    assert np.all(np.diff(info.pts) > 0) and info.duration > info.pts[-1]
    frames = np.arange(len(info.pts))
    numbers = all_numbers(info, frames)
    assert [index for index, _ in numbers] == frames.tolist()
    some = [(index, number_of(frame)) for index, frame in decode(info, frames[::3], threads=2)]
    assert some == numbers[::3]
    return info, [number for _, number in numbers]


@pytest.mark.parametrize("pieces", [2, 3])
@pytest.mark.parametrize("case", STREAMS)
def test_joined_streams_are_one_video_on_one_clock(case: str, pieces: int, tmp_path: Path) -> None:
    file, codec, options = STREAMS[case]
    path = write_video(tmp_path / file, 60, codec, options=options)
    path.write_bytes(path.read_bytes() * pieces)
    info, numbers = agreeing(path)
    assert numbers == list(range(60)) * pieces
    np.testing.assert_allclose(info.pts, np.arange(60 * pieces) / 25, atol=0.0011)
    assert info.lost == 0


@pytest.mark.parametrize("case", STREAMS)
@pytest.mark.parametrize("damage", ["torn", "headless", "hole", "zeros", "flipped"])
def test_of_a_damaged_stream_what_decodes_is_used(damage: str, case: str, tmp_path: Path) -> None:
    file, codec, options = STREAMS[case]
    path = write_video(tmp_path / file, 60, codec, options=options)
    whole = path.read_bytes()
    middle = len(whole) // 188 // 2 * 188
    flipped = bytearray(whole)
    rng = np.random.default_rng(0)
    for place in rng.integers(2000, len(whole), 20):
        flipped[place] ^= 255
    damaged = {
        "torn": whole[: middle + 77],
        "headless": whole[middle:],
        "hole": whole[:middle] + whole[middle + 6 * 188 :],
        "zeros": whole[:middle] + bytes(1000) + whole[middle:],
        "flipped": bytes(flipped),
    }
    path.write_bytes(damaged[damage])
    info, numbers = agreeing(path)
    assert len(numbers) >= 20 and info.lost is not None
    if damage in ("torn", "headless"):
        assert numbers == sorted(numbers)
    # what is left of the true times stays where it was
    if damage == "zeros" and info.lost == 0:
        np.testing.assert_allclose(info.pts, np.arange(60) / 25, atol=0.0011)
    if damage == "flipped":
        assert info.lost > 0 or len(numbers) == 60


def test_the_best_of_two_streams_is_taken(tmp_path: Path) -> None:
    path = tmp_path / "v.mkv"
    with av.open(str(path), "w") as container:
        small = container.add_stream("mpeg4", rate=10)
        small.width, small.height, small.pix_fmt = 32, 32, "yuv420p"
        large = container.add_stream("libx264", rate=25)
        large.width, large.height, large.pix_fmt = 128, 48, "yuv420p"
        for i in range(10):
            container.mux(small.encode(VideoFrame.from_ndarray(np.zeros((32, 32, 3), np.uint8), format="rgb24")))
            container.mux(large.encode(numbered(i)))
        container.mux(small.encode(None))
        container.mux(large.encode(None))
    info = probe(path)
    assert (info.codec, info.width, info.height) == ("h264", 128, 48)
    assert stated_rate(path) == 25  # by which labels in frames are placed
    assert all_numbers(info, np.array([2, 9])) == [(2, 2), (9, 9)]


TRAP_FACTS = {
    # frames, fps, width, height, rotation, pixel format
    "h264_340x256_28fps.mp4": (280, 28.0, 340, 256, 0, "yuv420p"),
    "h264_matroska_ms_pts.mkv": (310, 30.0, 426, 240, 0, "yuv420p"),
    "h264_short_32_frames.mp4": (32, 29.09, 340, 256, 0, "yuv420p"),
    "h264_two_streams.mp4": (390, 29.97, 480, 270, 0, "yuv420p"),
    "h264_yuv444p.mp4": (250, 25.0, 1280, 272, 0, "yuv444p"),
    "hevc_10_frames.mp4": (10, 10.0, 128, 128, 0, "yuv420p"),
    "mpeg4_packed_b.avi": (164, 25.0, 320, 240, 0, "yuv420p"),
    "rotated_90.mov": (3, 30.0, 320, 568, 90, "yuv420p"),
}


@needs_data
@pytest.mark.parametrize("file", TRAP_FACTS)
def test_real_traps(file: str) -> None:
    num_frames, fps, width, height, rotation, pixel_format = TRAP_FACTS[file]
    info = probe(TRAPS / file)
    assert (len(info.pts), info.width, info.height, info.rotation) == (num_frames, width, height, rotation)
    assert info.fps == pytest.approx(fps, abs=0.01) and info.pixel_format == pixel_format
    assert info.pts[0] == info.start == 0 and all(a < b for a, b in pairwise(info.pts))

    # the truth: everything in the decoder's order, which is the presentation order
    with av.open(str(info.path)) as container:
        stream = container.streams.best("video")
        truth = [frame.to_ndarray(format="gray") for frame in container.decode(stream)]
    assert len(truth) == num_frames
    frames = np.arange(0, num_frames, 7)
    decoded = list(decode(info, frames, threads=1))
    assert [index for index, _ in decoded] == frames.tolist()
    for index, frame in decoded:
        np.testing.assert_array_equal(frame.to_ndarray(format="gray"), truth[index])
        if info.ticks is not None:
            start = float(info.ticks[0] * info.time_base)
            assert frame.time - start == pytest.approx(info.pts[index] - info.start, abs=1e-9)


@needs_data
def test_packed_b_frames_are_counted() -> None:
    """The decoder swaps the stamps of this file's frames; their order is right."""
    info = probe(TRAPS / "mpeg4_packed_b.avi")
    assert info.ticks is None
    np.testing.assert_allclose(np.diff(info.pts), 0.04, atol=1e-9)


@needs_data
def test_corrupted_file_fails_with_a_sentence() -> None:
    info = probe(TRAPS / "corrupted.mp4")
    with pytest.raises(VideoError, match=r"corrupted\.mp4 fails after \d+ of 50 frames"):
        list(decode(info, np.arange(50), threads=1))


@pytest.mark.parametrize("name", ["v.mov", "v.mkv"])
def test_a_file_says_where_its_pictures_end_on_its_own_clock(name: str, tmp_path: Path) -> None:
    late = with_early_sound(write_video(tmp_path / "v.mp4", 50), tmp_path / name, Fraction(4))
    assert probe(late).duration == pytest.approx(6.0, abs=0.01)
    assert stated_duration(late) == pytest.approx(6.0, abs=0.01)


def test_stamps_that_begin_at_the_time_of_day(tmp_path: Path) -> None:
    ticks = [1_700_000_000_000 + 40 * i for i in range(50)]
    path = write_video(tmp_path / "v.mkv", 50, ticks=ticks, time_base=Fraction(1, 1000))
    assert stated_duration(path) == pytest.approx(probe(path).duration, abs=0.01) == pytest.approx(2.0, abs=0.01)


def test_what_a_file_says_of_its_pictures_is_not_how_long_its_sound_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "v.mp4"
    with av.open(str(path), "w") as target:
        pictures = target.add_stream("libx264", rate=8)
        pictures.width, pictures.height, pictures.pix_fmt = 32, 32, "yuv420p"
        sound = target.add_stream("aac", rate=8000, layout="mono")
        for _ in range(16):
            target.mux(pictures.encode(VideoFrame.from_ndarray(np.zeros((32, 32, 3), np.uint8), format="rgb24")))
        target.mux(pictures.encode(None))
        for number in range(40):
            silence = av.AudioFrame.from_ndarray(np.zeros((1, 1000), np.float32), format="fltp", layout="mono")
            silence.sample_rate, silence.pts = 8000, 1000 * number
            target.mux(sound.encode(silence))
        target.mux(sound.encode(None))
    assert stated_duration(path) == pytest.approx(2.0, abs=0.2)

"""The frame cache: right pictures, right times, right colours; and what is left after kills, full disks and crashes."""

from __future__ import annotations

import dataclasses
import os
import pickle
import re
import resource
import signal
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable, Generator, Iterator
from fractions import Fraction
from pathlib import Path
from typing import BinaryIO

import av
import numpy as np
import psutil
import pytest
from av.video.frame import VideoFrame

from lofi_fast.data.cache import CacheRequest, Skipped, entry_path, estimate_bytes, file_name, prepare
from lofi_fast.data.entry import CachedVideo
from lofi_fast.data.pictures import _ahead, cached_size, hold_in_turn
from lofi_fast.data.video import VideoError, VideoInfo, probe
from lofi_fast.errors import InputError

ROOT = Path(__file__).resolve().parents[1]
TRAPS = ROOT.parent / "shared" / "data" / "videos"

BITS = 8
SQUARE = 16


def numbered(number: int) -> np.ndarray:
    """A 128x48 picture whose top row of squares spells `number` in binary."""
    pixels = np.full((48, BITS * SQUARE, 3), 90, dtype=np.uint8)
    for bit in range(BITS):
        pixels[:SQUARE, bit * SQUARE : (bit + 1) * SQUARE] = 230 if number >> bit & 1 else 20
    return pixels


def number_of(rgb: np.ndarray) -> int:
    square = rgb.shape[1] // BITS
    centres = rgb[square // 2, square // 2 :: square, 1]
    return sum(1 << bit for bit in range(BITS) if centres[bit] > 125)


def write_video(
    path: Path,
    num_frames: int,
    degrees: int = 0,
    flip: str = "",
    rate: Fraction = Fraction(25),
    noise: bool = False,
) -> Path:
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=rate, options={"bf": "2", "g": "12", "crf": "15"})
        stream.width, stream.height, stream.pix_fmt = BITS * SQUARE, 48, "yuv420p"
        if degrees or flip:
            stream.set_display_rotation(-degrees, hflip=flip == "hflip", vflip=flip == "vflip")
        for i in range(num_frames):
            pixels = np.random.default_rng(i).integers(0, 256, (48, 128, 3)).astype(np.uint8) if noise else numbered(i)
            container.mux(stream.encode(VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode(None))
    return path


def request(path: Path, frames: np.ndarray | None = None) -> CacheRequest:
    info = probe(path)
    return CacheRequest(path.stem, info, np.arange(len(info.pts)) if frames is None else frames)


@pytest.fixture(scope="module")
def info(tmp_path_factory: pytest.TempPathFactory) -> VideoInfo:
    """What a probe finds, to be changed by tests that need no such file."""
    return probe(write_video(tmp_path_factory.mktemp("info") / "v.mp4", 2))


def decoded(jpeg: np.ndarray) -> np.ndarray:
    """RGB of a JPEG by its own rule, BT.601 full range (ITU-T T.871 section 7)."""
    context = av.CodecContext.create("mjpeg", "r")
    [frame] = context.decode(av.Packet(jpeg.tobytes()))
    assert frame.format.name == "yuvj420p"
    planes = frame.to_ndarray().reshape(-1).astype(float)
    width, height = frame.width, frame.height
    luma = planes[: width * height].reshape(height, width)
    blue, red = planes[width * height :].reshape(2, height // 2, width // 2).repeat(2, 1).repeat(2, 2) - 128
    rgb = np.stack((luma + 1.402 * red, luma - 0.344136 * blue - 0.714136 * red, luma + 1.772 * blue), -1)
    return np.clip(np.round(rgb), 0, 255).astype(np.uint8)


def contents(folder: Path) -> set[str]:
    return {path.suffix for path in folder.rglob("*") if path.is_file() and path.name != ".lock"}


def test_pictures_times_and_positions(tmp_path: Path) -> None:
    frames = np.array([3, 4, 17, 40, 59])
    wanted = request(write_video(tmp_path / "v.mp4", 60, rate=Fraction(30000, 1001)), frames)
    cached, skipped = prepare([wanted], tmp_path / "cache", 32)
    assert skipped == [] and list(cached) == ["v"]
    video = cached["v"]
    assert (video.width, video.height) == (86, 32)
    assert video.duration == wanted.info.duration
    np.testing.assert_array_equal(video.frames, frames)
    np.testing.assert_array_equal(video.pts, wanted.info.pts[frames])

    np.testing.assert_array_equal(video.positions(np.array([59, 3, 3])), [4, 0, 0])
    assert video.positions(np.array([], dtype=np.int64)).size == 0
    for absent in (0, 18, 60):
        with pytest.raises(ValueError, match=f"frame {absent} of v"):
            video.positions(np.array([3, absent]))

    pictures = video.read(video.positions(np.array([59, 3, 40, 4, 17])))
    assert all(picture.dtype == np.uint8 and bytes(picture[:2]) == b"\xff\xd8" for picture in pictures)
    assert [number_of(decoded(picture)) for picture in pictures] == [59, 3, 40, 4, 17]

    # the .mov is a video of its own, with the exact times
    with av.open(str(video.path)) as container:
        stream = container.streams.video[0]
        copies = list(container.decode(stream))
        assert [frame.pts * frame.time_base for frame in copies] == [Fraction(int(i) * 1001, 30000) for i in frames]
        assert [(frame.width, frame.height) for frame in copies] == [(86, 32)] * 5


def test_dali_decodes_the_pictures(tmp_path: Path) -> None:
    dali = pytest.importorskip("nvidia.dali")
    wanted = request(write_video(tmp_path / "v.mp4", 20), np.arange(0, 20, 3))
    video = prepare([wanted], tmp_path / "cache", 48)[0]["v"]
    jpegs = video.read(np.arange(7))
    pipeline = dali.Pipeline(batch_size=7, num_threads=1, device_id=None)
    with pipeline:
        data = dali.fn.external_source(name="jpegs", dtype=dali.types.UINT8, ndim=1)
        pipeline.set_outputs(dali.fn.decoders.image(data, device="cpu", output_type=dali.types.RGB))
    pipeline.build()
    pipeline.feed_input("jpegs", jpegs)
    [pictures] = pipeline.run()
    for i in range(7):
        picture = np.array(pictures[i])
        assert picture.shape == (48, 128, 3) and number_of(picture) == 3 * i
        # chroma is upsampled in another way by each decoder, which shows at edges only
        assert np.median(np.abs(picture.astype(int) - decoded(jpegs[i]))) <= 1


COLOURS = np.array(
    [[255, 255, 255], [0, 0, 0], [128, 128, 128], [220, 30, 30], [30, 200, 40], [40, 50, 220], [230, 220, 40]],
    dtype=float,
)


def encoded_colours(path: Path, matrix: str, full: bool, tag: int, pixel_format: str, height: int) -> None:
    """One frame of bars whose YUV was computed here from the definition (H.273 section 8.3), not by a library."""
    red, blue = {"601": (0.299, 0.114), "709": (0.2126, 0.0722), "2020": (0.2627, 0.0593)}[matrix]
    rgb = COLOURS / 255
    luma = red * rgb[:, 0] + (1 - red - blue) * rgb[:, 1] + blue * rgb[:, 2]
    chroma_b, chroma_r = (rgb[:, 2] - luma) / (2 - 2 * blue), (rgb[:, 0] - luma) / (2 - 2 * red)
    if full:
        planes = np.stack((255 * luma, 255 * chroma_b + 128, 255 * chroma_r + 128))
    else:
        planes = np.stack((219 * luma + 16, 224 * chroma_b + 128, 224 * chroma_r + 128))
    bars = np.clip(np.round(planes), 0, 255).astype(np.uint8).repeat(16, 1)
    y, u, v = (np.tile(plane, (height, 1)) for plane in bars)
    stacked = np.concatenate([y.reshape(-1), u[::2, ::2].reshape(-1), v[::2, ::2].reshape(-1)])
    frame = VideoFrame.from_ndarray(stacked.reshape(height * 3 // 2, -1), format="yuv420p")
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=25, options={"qp": "1"})
        stream.width, stream.height, stream.pix_fmt = y.shape[1], height, pixel_format
        stream.codec_context.colorspace = frame.colorspace = tag
        stream.codec_context.color_range = frame.color_range = 2 if full else 1
        if pixel_format != "yuv420p":
            frame = frame.reformat(
                format=pixel_format, src_color_range=frame.color_range, dst_color_range=frame.color_range
            )
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


@pytest.mark.parametrize(
    ("matrix", "full", "tag", "pixel_format", "height"),
    [
        pytest.param("709", False, 1, "yuv420p", 64, id="bt709_limited"),
        pytest.param("709", True, 1, "yuv420p", 64, id="bt709_full"),
        pytest.param("601", False, 6, "yuv420p", 64, id="bt601_limited"),
        pytest.param("601", False, 5, "yuv420p", 720, id="bt601_tagged_in_high_definition"),
        pytest.param("601", True, 6, "yuvj420p", 64, id="bt601_full_as_jpeg"),
        pytest.param("2020", False, 9, "yuv420p", 64, id="bt2020_limited"),
        pytest.param("601", False, 2, "yuv420p", 64, id="untagged_small_is_601"),
        pytest.param("709", False, 2, "yuv420p", 720, id="untagged_high_definition_is_709"),
        pytest.param("709", False, 1, "yuv444p", 64, id="bt709_limited_444"),
        pytest.param("709", False, 1, "yuv420p10le", 64, id="bt709_limited_10_bit"),
    ],
)
def test_colours_become_bt601_full_range(
    matrix: str, full: bool, tag: int, pixel_format: str, height: int, tmp_path: Path
) -> None:
    encoded_colours(tmp_path / "v.mp4", matrix, full, tag, pixel_format, height)
    video = prepare([request(tmp_path / "v.mp4")], tmp_path / "cache", height)[0]["v"]
    rgb = decoded(video.read(np.array([0]))[0]).astype(float)
    # away from the edges, where neighbours share chroma
    centres = rgb[height // 2 - 4 : height // 2 + 4].reshape(8, len(COLOURS), 16, 3)[:, :, 6:10].mean((0, 2))
    np.testing.assert_allclose(centres, COLOURS, atol=3.5)


@pytest.mark.parametrize("degrees", [0, 90, 180, 270])
@pytest.mark.parametrize("flip", ["", "hflip", "vflip"])
def test_rotation_and_mirroring_are_undone(degrees: int, flip: str, tmp_path: Path) -> None:
    path = write_video(tmp_path / "v.mp4", 3, degrees, flip)
    video = prepare([request(path)], tmp_path / "cache", 48)[0]["v"]
    assert (video.width, video.height) == ((48, 128) if degrees in (90, 270) else (128, 48))
    picture = decoded(video.read(np.array([2]))[0])
    # undo by hand what the writer asked players to do: turn clockwise, and flip what is then shown
    if flip:
        picture = picture[:, ::-1] if flip == "hflip" else picture[::-1]
    assert number_of(np.rot90(picture, degrees // 90)) == 2


@pytest.mark.parametrize(
    ("width", "height", "side", "expected"),
    [
        (320, 240, 128, (170, 128)),
        (240, 320, 128, (128, 170)),
        (320, 240, 256, (320, 240)),
        (101, 75, 256, (100, 76)),
        (1920, 1080, 2, (4, 2)),
        (1000, 3, 2, (666, 2)),
    ],
)
def test_sizes_are_even_and_never_larger(
    width: int, height: int, side: int, expected: tuple[int, int], info: VideoInfo
) -> None:
    assert cached_size(dataclasses.replace(info, width=width, height=height), side) == expected


def test_odd_pixels(tmp_path: Path) -> None:
    with av.open(str(tmp_path / "v.mkv"), "w") as container:
        stream = container.add_stream("ffv1", rate=25)
        stream.width, stream.height, stream.pix_fmt = 101, 75, "yuv444p"
        container.mux(stream.encode(VideoFrame.from_ndarray(np.full((75, 101, 3), 200, np.uint8), format="rgb24")))
        container.mux(stream.encode(None))
    video = prepare([request(tmp_path / "v.mkv")], tmp_path / "cache", 256)[0]["v"]
    picture = decoded(video.read(np.array([0]))[0])
    assert picture.shape == (video.height, video.width, 3) == (76, 100, 3)
    assert np.abs(picture.astype(int) - 200).max() <= 3


def test_entries_are_reused_until_something_changes(tmp_path: Path) -> None:
    path = write_video(tmp_path / "v.mp4", 10)
    cache = tmp_path / "cache"
    told: list[tuple[int, int, str]] = []

    def make(frames: np.ndarray, side: int = 32) -> tuple[CachedVideo, int]:
        video = prepare([request(path, frames)], cache, side, progress=lambda *what: told.append(what))[0]["v"]
        return video, video.path.stat().st_mtime_ns

    first, written = make(np.arange(5))
    again, when = make(np.arange(5))
    assert (again.path, when) == (first.path, written) and again.sizes.tolist() == first.sizes.tolist()
    assert told == [(1, 1, "v")] * 2
    others = {make(np.arange(6))[0].path, make(np.arange(5), side=30)[0].path}
    os.utime(path, ns=(1, 1))
    others.add(make(np.arange(5))[0].path)
    assert len(others | {first.path}) == 4


@pytest.mark.parametrize("damage", ["pictures gone", "pictures cut off", "index is text", "index is empty"])
def test_a_damaged_entry_is_made_again(damage: str, tmp_path: Path) -> None:
    wanted = request(write_video(tmp_path / "v.mp4", 5))
    path = prepare([wanted], tmp_path / "cache", 32)[0]["v"].path
    if damage == "pictures gone":
        path.unlink()
    elif damage == "pictures cut off":
        os.truncate(path, 100)
    else:
        path.with_suffix(".npz").write_text("x" if damage == "index is text" else "")
    video = prepare([wanted], tmp_path / "cache", 32)[0]["v"]
    assert [number_of(decoded(picture)) for picture in video.read(np.arange(5))] == list(range(5))


def stored(path: Path) -> dict[str, np.ndarray]:
    with np.load(path) as index:
        return dict(index)


def in_other_form(write: Callable[[BinaryIO, dict[str, np.ndarray]], None]) -> Callable[[Path], None]:
    """Write what an index holds in another form in its place."""

    def damage(path: Path) -> None:
        content = stored(path)
        with path.open("wb") as file:
            write(file, content)

    return damage


def with_other(**numbers: Callable[[np.ndarray], object]) -> Callable[[Path], None]:
    """Write an index some of whose arrays were replaced."""
    return in_other_form(
        lambda file, old: np.savez(
            file, **old | {name: np.asarray(change(old[name])) for name, change in numbers.items()}
        )
    )


def encrypted(path: Path) -> None:
    """Set the bit of a zip file that says so: its reader raises RuntimeError."""
    content = bytearray(path.read_bytes())
    for mark, flags in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        at = content.find(mark)
        while at >= 0:
            content[at + flags] |= 1
            at = content.find(mark, at + 1)
    path.write_bytes(content)


def of_unknown_compression(path: Path) -> None:
    """For which its reader raises NotImplementedError."""
    content = bytearray(path.read_bytes())
    for mark, method in ((b"PK\x03\x04", 8), (b"PK\x01\x02", 10)):
        at = content.find(mark)
        while at >= 0:
            content[at + method] = 99
            at = content.find(mark, at + 1)
    path.write_bytes(content)


class Bomb:
    """What a pickle can do when it is read."""

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, ("exploded",)


SPOILT_INDEX: dict[str, Callable[[Path], None]] = {
    "encrypted": encrypted,
    "unknown compression": of_unknown_compression,
    "an array alone": in_other_form(lambda file, old: np.save(file, old["offsets"])),
    "a pickle": in_other_form(lambda file, old: pickle.dump(Bomb(), file)),
    "a pickle inside": in_other_form(
        lambda file, old: np.savez(file, allow_pickle=True, **old | {"offsets": np.array([Bomb()] * 5)})
    ),
    "floats": with_other(offsets=lambda old: old.astype(float), frames=lambda old: old.astype(float)),
    "objects' names": with_other(sizes=lambda old: old.astype(str)),
    "one more axis": with_other(offsets=lambda old: old[None], sizes=lambda old: old[None]),
    "too few": with_other(sizes=lambda old: old[:-1]),
    "another order": with_other(frames=lambda old: old[::-1]),
    "before the file": with_other(offsets=lambda old: -old),
    "behind the file": with_other(offsets=lambda old: old + 2**40),
    "beyond all numbers": with_other(offsets=lambda old: np.full_like(old, 2**63 - 1)),
    "no bytes": with_other(sizes=lambda old: old * 0),
    "without checksums": in_other_form(
        lambda file, old: np.savez(file, **{name: old[name] for name in old if name != "checksums"})
    ),
    "signed checksums": with_other(checksums=lambda old: old.astype(np.int64)),
    "no width": with_other(width=lambda old: np.array([])),
    "another width": with_other(width=lambda old: old + 2),
}


@pytest.mark.parametrize("damage", SPOILT_INDEX)
def test_an_index_that_is_not_what_was_written_is_made_again(
    damage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    wanted = request(write_video(tmp_path / "v.mp4", 5))
    entry = prepare([wanted], tmp_path / "cache", 32)[0]["v"]
    index = entry.path.with_suffix(".npz")
    whole = stored(index)
    SPOILT_INDEX[damage](index)
    video = prepare([wanted], tmp_path / "cache", 32)[0]["v"]
    assert [number_of(decoded(picture)) for picture in video.read(np.arange(5))] == list(range(5))
    assert {name: numbers.tolist() for name, numbers in stored(index).items()} == {
        name: numbers.tolist() for name, numbers in whole.items()
    }
    assert not (tmp_path / "exploded").exists()


def test_any_damage_to_an_index_gives_the_entry_or_makes_it_again(tmp_path: Path) -> None:
    wanted = request(write_video(tmp_path / "v.mp4", 3))
    entry = prepare([wanted], tmp_path / "cache", 32)[0]["v"]
    index, pictures = entry.path.with_suffix(".npz"), entry.read(np.arange(3))
    whole = index.read_bytes()
    generator = np.random.default_rng(0)
    for _ in range(60):
        content = np.frombuffer(whole, dtype=np.uint8).copy()
        at = generator.integers(0, len(content), generator.integers(1, 9))
        content[at] = generator.integers(0, 256, len(at))
        index.write_bytes(content.tobytes()[: generator.choice((len(content), generator.integers(0, len(content))))])
        video = prepare([wanted], tmp_path / "cache", 32)[0]["v"]
        for ours, theirs in zip(video.read(np.arange(3)), pictures, strict=True):
            assert np.array_equal(ours, theirs)


def spoil(video: CachedVideo, position: int) -> None:
    """Change eight bytes of a picture, of which its decoder takes no notice: they are brightness and colour."""
    content = bytearray(video.path.read_bytes())
    middle = int(video.offsets[position] + video.sizes[position] // 2)
    for at in range(middle, middle + 8):
        content[at] ^= 0x11
    video.path.write_bytes(content)


def test_a_picture_that_has_changed_is_noticed_and_made_again(tmp_path: Path) -> None:
    wanted = request(write_video(tmp_path / "v.mp4", 12, noise=True))
    cache = tmp_path / "cache"
    video = prepare([wanted], cache, 48)[0]["v"]
    pictures = video.read(np.arange(12))
    spoil(video, 7)
    changed = decoded(np.frombuffer(video.path.read_bytes(), np.uint8)[video.offsets[7] :][: video.sizes[7]])
    assert changed.shape == decoded(pictures[7]).shape, "it decodes, to something else"
    assert not np.array_equal(changed, decoded(pictures[7]))

    assert len(video.read(np.delete(np.arange(12), 7))) == 11
    with pytest.raises(InputError, match=r"picture 7 of the cache file .*\.mov is damaged; run again") as caught:
        video.read(np.arange(12))
    assert "\n" not in str(caught.value)
    with pytest.raises(InputError, match=r"picture 7 .* is damaged; delete the file and run again"):
        video.read(np.array([7]))  # the index has gone already
    again = prepare([wanted], cache, 48)[0]["v"]
    for ours, theirs in zip(again.read(np.arange(12)), pictures, strict=True):
        assert np.array_equal(ours, theirs)

    again.path.unlink()
    with pytest.raises(InputError, match=r"\.mov cannot be read: No such file or directory; run again"):
        again.read(np.arange(12))


def test_a_complete_cache_needs_no_write_access(tmp_path: Path) -> None:
    wanted = request(write_video(tmp_path / "v.mp4", 5))
    cache = tmp_path / "cache"
    prepare([wanted], cache, 32)
    (cache / ".lock").unlink()
    assert "v" in prepare([wanted], cache, 32)[0]
    assert contents(cache) == {".mov", ".npz"} and not (cache / ".lock").exists()


def test_reading_a_spoiled_cache_names_the_file(tmp_path: Path) -> None:
    video = prepare([request(write_video(tmp_path / "v.mp4", 5))], tmp_path / "cache", 32)[0]["v"]
    os.truncate(video.path, 200)
    with pytest.raises(InputError, match="cut off; delete it"):
        video.read(np.array([4]))
    video.path.unlink()
    with pytest.raises(InputError, match=r"v-.*\.mov cannot be read"):
        video.read(np.array([0]))


def test_names_that_no_file_system_likes(tmp_path: Path) -> None:
    wanted = request(write_video(tmp_path / "v.mp4", 2))
    names = ["a/b", "../up", "é" * 300, "x\n", "."]
    cached, _ = prepare([dataclasses.replace(wanted, name=name) for name in names], tmp_path / "cache", 32, workers=1)
    assert list(cached) == names
    assert all(video.path.parent.parent == tmp_path / "cache" for video in cached.values())


@pytest.mark.parametrize("workers", [1, 2])
def test_a_bad_video_is_skipped_and_the_others_go_on(workers: int, tmp_path: Path) -> None:
    good = [request(write_video(tmp_path / f"good{i}.mp4", 20 + i)) for i in range(3)]
    cut = request(write_video(tmp_path / "cut.mp4", 60))
    data = cut.info.path.read_bytes()
    at = data.index(b"mdat") + 200
    cut.info.path.write_bytes(data[:at] + bytes(len(data) - at - 2500) + data[-2500:])
    gone = request(write_video(tmp_path / "gone.mp4", 5))
    gone.info.path.unlink()
    told: list[tuple[int, int]] = []
    cached, skipped = prepare(
        [cut, *good, gone], tmp_path / "cache", 32, workers, lambda done, total, _: told.append((done, total))
    )
    assert list(cached) == ["good0", "good1", "good2"]
    assert sorted(video.name for video in skipped) == ["cut", "gone"]
    assert all(video.path in video.reason and "\n" not in video.reason for video in skipped)
    assert told == [(i, 5) for i in range(1, 6)]
    assert contents(tmp_path / "cache") == {".mov", ".npz"}
    for i, video in enumerate(cached.values()):
        assert [number_of(decoded(jpeg)) for jpeg in video.read(np.arange(20 + i))] == list(range(20 + i))


def test_processes_give_the_same_bytes_as_one(tmp_path: Path) -> None:
    requests = [request(write_video(tmp_path / f"v{i}.mp4", 10 + i)) for i in range(3)]
    one, _ = prepare(requests, tmp_path / "one", 32, workers=1)
    two, _ = prepare(requests, tmp_path / "two", 32, workers=2)
    assert list(one) == list(two)
    for name in one:
        assert one[name].path.read_bytes() == two[name].path.read_bytes()


@pytest.fixture
def blocked(info: VideoInfo, tmp_path: Path) -> CacheRequest:
    """A request whose worker waits for ever: its video is a pipe that nobody writes to."""
    pipe = tmp_path / "blocked.mp4"
    os.mkfifo(pipe)
    # the longest video, so that it is handed out first
    return CacheRequest("blocked", dataclasses.replace(info, path=pipe, pts=np.arange(1000) / 25), np.arange(2))


def test_a_worker_that_dies_costs_one_video(blocked: CacheRequest, tmp_path: Path) -> None:
    requests = [blocked, *(request(write_video(tmp_path / f"v{i}.mp4", 10)) for i in range(3))]

    def kill_workers(done: int, total: int, name: str) -> None:
        if done == total - 1:
            for child in psutil.Process().children():
                child.kill()

    cached, skipped = prepare(requests, tmp_path / "cache", 32, 2, kill_workers)
    assert sorted(cached) == ["v0", "v1", "v2"]
    assert [video.name for video in skipped] == ["blocked"]
    assert "died (signal SIGKILL)" in skipped[0].reason and "blocked.mp4" in skipped[0].reason


def test_interrupting_leaves_no_process_and_no_partial_file(blocked: CacheRequest, tmp_path: Path) -> None:
    requests = [blocked, *(request(write_video(tmp_path / f"v{i}.mp4", 10)) for i in range(2))]

    def interrupt(done: int, total: int, name: str) -> None:
        if done == total - 1:
            raise KeyboardInterrupt

    before = psutil.Process().children()  # of other tests
    with pytest.raises(KeyboardInterrupt):
        prepare(requests, tmp_path / "cache", 32, 2, interrupt)
    assert [child for child in psutil.Process().children() if child not in before] == []
    assert contents(tmp_path / "cache") == {".mov", ".npz"}


KILLED_RUN = """
import os, signal, sys
from pathlib import Path
import numpy as np
from lofi_fast.data.cache import CacheRequest, prepare
from lofi_fast.data.video import probe
folder = Path(sys.argv[1])
requests = [CacheRequest(p.stem, probe(p), np.arange(30)) for p in sorted(folder.glob("*.mp4"))]
prepare(requests, folder / "cache", 32, int(sys.argv[2]), lambda *what: os.kill(os.getpid(), signal.SIGKILL))
"""


@pytest.mark.parametrize("workers", [1, 2])
def test_a_killed_run_is_continued(workers: int, tmp_path: Path) -> None:
    paths = [write_video(tmp_path / f"v{i}.mp4", 30) for i in range(4)]
    run = subprocess.run(
        [sys.executable, "-c", KILLED_RUN, str(tmp_path), str(workers)], env={**os.environ, "PYTHONPATH": str(ROOT)}
    )
    assert run.returncode == -signal.SIGKILL
    cache = tmp_path / "cache"
    (cache / "v9-0123456789.mov.partial").write_bytes(b"left by a killed run")
    complete = {path: path.stat().st_mtime_ns for path in cache.rglob("*.npz")}
    assert complete
    # workers of the killed run may still be finishing a video; they hold the lock, and this run waits for them
    cached, skipped = prepare([request(path) for path in paths], cache, 32, workers=1)
    assert len(cached) == 4 and skipped == []
    assert {path: path.stat().st_mtime_ns for path in complete} == complete
    assert contents(cache) == {".mov", ".npz"} and len(list(cache.rglob("*.mov"))) == 4
    for video in cached.values():
        assert [number_of(decoded(jpeg)) for jpeg in video.read(np.arange(30))] == list(range(30))


def test_two_runs_take_turns(tmp_path: Path) -> None:
    wanted = request(write_video(tmp_path / "v.mp4", 10))
    cache = tmp_path / "cache"
    told: list[str] = []
    in_turn = threading.Event()

    def first_run(done: int, total: int, name: str) -> None:
        # holds the lock until the second run says that it waits
        in_turn.wait(30)

    def second_run(done: int, total: int, name: str) -> None:
        told.append(name)
        in_turn.set()

    other = dataclasses.replace(wanted, name="other")
    thread = threading.Thread(target=prepare, args=([wanted], cache, 32, 1, first_run))
    thread.start()
    while thread.is_alive() and not list(cache.rglob("*.npz")):
        time.sleep(0.01)
    cached, _ = prepare([other], cache, 32, 1, second_run)
    thread.join()
    assert told == [f"waiting for another run that writes to {cache}", "other"]
    assert list(cached) == ["other"]


def test_worker_modules_do_not_load_torch() -> None:
    code = "import sys, lofi_fast.data.cache, lofi_fast.data.annotations; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ, "PYTHONPATH": str(ROOT)})


def test_bad_requests(tmp_path: Path) -> None:
    wanted = request(write_video(tmp_path / "v.mp4", 3))
    with pytest.raises(ValueError, match="same name"):
        prepare([wanted, wanted], tmp_path / "cache", 32)
    with pytest.raises(ValueError, match="at least one frame"):
        prepare([dataclasses.replace(wanted, frames=np.array([], dtype=np.int64))], tmp_path / "cache", 32)
    with pytest.raises(ValueError, match="short_side"):
        prepare([wanted], tmp_path / "cache", 1)
    assert prepare([], tmp_path / "cache", 32) == ({}, [])


def test_a_cache_that_cannot_fit_is_refused_before_anything_is_written(info: VideoInfo, tmp_path: Path) -> None:
    huge = dataclasses.replace(info, width=100_000, height=100_000, pts=np.arange(10_000_000) / 25)
    wanted = CacheRequest("v", huge, np.arange(10_000_000))
    assert estimate_bytes([wanted], 100_000) > 1e14
    with pytest.raises(InputError, match="--cache names another folder"):
        prepare([wanted], tmp_path / "cache", 100_000)
    assert contents(tmp_path / "cache") == set()


@pytest.mark.parametrize("place", range(4), ids=["cache", "frames", "partial", "entry"])
@pytest.mark.parametrize("kind", ["file", "link"])
def test_what_lies_in_the_place_of_a_folder_is_named(kind: str, place: int, tmp_path: Path) -> None:
    wanted = request(write_video(tmp_path / "v.mp4", 3))
    frames = tmp_path / "cache" / "frames"
    of_entry = entry_path(wanted, frames, 32).parent
    blocked = (frames.parent, frames, frames / "partial", of_entry)[place]
    blocked.parent.mkdir(parents=True, exist_ok=True)
    if kind == "file":
        blocked.touch()
    else:
        blocked.symlink_to(tmp_path / "nowhere")
    with pytest.raises(InputError) as caught:
        prepare([wanted], frames, 32)
    what = "a file, not a folder" if kind == "file" else "a link that leads nowhere"
    assert str(caught.value) == (
        f"the cache folder {frames} cannot be written: {blocked} is {what}; --cache names another"
    )


def test_a_folder_that_cannot_be_written_is_one_sentence(tmp_path: Path) -> None:
    wanted = request(write_video(tmp_path / "v.mp4", 3))
    (tmp_path / "file").touch()
    for folder in (tmp_path / "file", tmp_path / "file" / "below", Path("/proc/cache")):
        with pytest.raises(InputError, match="--cache") as caught:
            prepare([wanted], folder, 32)
        assert str(folder) in str(caught.value) and "\n" not in str(caught.value)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=96k", "tmpfs", str(folder)], capture_output=True)
    if mounted.returncode:
        pytest.skip("a small file system cannot be mounted here")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.parametrize("workers", [1, 2])
def test_a_disk_that_fills_up(workers: int, small_disk: Path, tmp_path: Path) -> None:
    # noise takes several times the estimate, so the run starts and meets the end of the disk
    requests = [request(write_video(tmp_path / f"v{i}.mp4", 14, noise=True)) for i in range(2)]
    assert estimate_bytes(requests, 48) < 96_000
    with pytest.raises(InputError, match="the disk is full; --cache names another") as caught:
        prepare(requests, small_disk, 48, workers)
    assert str(small_disk) in str(caught.value)
    assert contents(small_disk) <= {".mov", ".npz"}


TOO_LARGE_A_FILE = """
import resource, sys
from pathlib import Path
import numpy as np
from lofi_fast.data.cache import CacheRequest, prepare
from lofi_fast.data.video import probe
from lofi_fast.errors import InputError
resource.setrlimit(resource.RLIMIT_FSIZE, (20000, 20000))
try:
    prepare([CacheRequest("v", probe(Path(sys.argv[1])), np.arange(14))], Path(sys.argv[2]), 48)
except InputError as error:
    print(error)
"""


OVERLAPPING = [np.arange(start, start + 16, 2) for start in range(0, 40, 8)]


@pytest.mark.parametrize("degrees", [0, 90])
def test_held_pictures_are_those_of_a_cache_entry(degrees: int, tmp_path: Path) -> None:
    path = write_video(tmp_path / "v.mp4", 60, degrees=degrees)
    wanted = request(path, np.unique(np.concatenate(OVERLAPPING)))
    entry = prepare([wanted], tmp_path / "cache", 48)[0]["v"]
    held = list(hold_in_turn(probe(path), OVERLAPPING, 48))
    assert len(held) == len(OVERLAPPING)
    for video, frames in zip(held, OVERLAPPING, strict=True):
        assert (video.path, video.width, video.height) == (path, entry.width, entry.height)
        assert np.array_equal(video.frames, frames)
        backwards = np.arange(len(frames))[::-1]
        for ours, theirs in zip(video.read(backwards), entry.read(entry.positions(frames)[::-1]), strict=True):
            assert np.array_equal(ours, theirs)
    assert sorted(tmp_path.iterdir()) == [tmp_path / "cache", path]


def test_pictures_are_held_no_longer_than_needed(tmp_path: Path) -> None:
    path, alive = write_video(tmp_path / "v.mp4", 60), 0
    jpegs: list[weakref.ref[np.ndarray]] = []
    for video in hold_in_turn(probe(path), OVERLAPPING, 48):
        jpegs += [weakref.ref(jpeg) for jpeg in video.jpegs if all(seen() is not jpeg for seen in jpegs)]
        del video
        alive = max(alive, sum(jpeg() is not None for jpeg in jpegs))
    assert len(jpegs) == len(np.unique(np.concatenate(OVERLAPPING)))
    assert alive <= 2 * len(OVERLAPPING[0])


def test_a_thread_makes_no_more_than_it_may_and_ends_when_left() -> None:
    made, ended = [], []

    def items() -> Generator[int]:
        try:
            for number in range(100):
                made.append(number)
                yield number
        finally:
            ended.append(True)

    ahead = _ahead(items(), 3)
    assert [next(ahead) for _ in range(5)] == [0, 1, 2, 3, 4]
    time.sleep(0.2)
    assert 5 < len(made) <= 5 + 3 + 1 and not ended
    ahead.close()
    assert ended and len(made) <= 5 + 3 + 2
    assert list(_ahead((number for number in range(7)), 3)) == list(range(7))


def test_what_a_thread_raises_comes_in_its_place() -> None:
    def items() -> Generator[int]:
        yield from range(3)
        raise OSError("gone")

    seen = []
    with pytest.raises(OSError, match="gone"):
        for number in _ahead(items(), 2):
            seen.append(number)
    assert seen == [0, 1, 2]


def test_held_pictures_of_a_damaged_video(tmp_path: Path) -> None:
    path = write_video(tmp_path / "v.mp4", 60, noise=True)
    info = probe(path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(VideoError, match=re.escape(str(path))):
        list(hold_in_turn(info, OVERLAPPING, 48))


@pytest.mark.parametrize("selections", [[np.arange(3), np.arange(0)], [np.arange(9), np.arange(5)]])
def test_selections_that_cannot_be_held_in_turn(selections: list[np.ndarray], info: VideoInfo) -> None:
    with pytest.raises(ValueError, match="selections"):
        list(hold_in_turn(info, selections, 48))
    assert list(hold_in_turn(info, [], 48)) == []


@pytest.mark.skipif(not hasattr(resource, "RLIMIT_FSIZE"), reason="this system has no limit on file sizes")
def test_a_file_larger_than_allowed(tmp_path: Path) -> None:
    path = write_video(tmp_path / "v.mp4", 14, noise=True)
    run = subprocess.run(
        [sys.executable, "-c", TOO_LARGE_A_FILE, str(path), str(tmp_path / "cache")],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert "larger than this system allows; --cache" in run.stdout
    assert contents(tmp_path / "cache") == set()


@pytest.mark.skipif(not TRAPS.is_dir(), reason="the folder with real videos is absent")
def test_real_traps(tmp_path: Path) -> None:
    requests = []
    for path in sorted(TRAPS.iterdir()):
        info = probe(path)
        requests.append(CacheRequest(path.stem, info, np.arange(0, len(info.pts), 9)))
    cached, skipped = prepare(requests, tmp_path / "cache", 128, workers=1)
    assert [video.name for video in skipped] == ["corrupted"]
    assert isinstance(skipped[0], Skipped) and "fails after" in skipped[0].reason
    written = sum(video.path.stat().st_size for video in cached.values())
    assert 0.5 < estimate_bytes([r for r in requests if r.name in cached], 128) / written < 2
    assert (cached["rotated_90"].width, cached["rotated_90"].height) == (128, 228)
    for wanted in requests:
        if wanted.name == "corrupted":
            continue
        video = cached[wanted.name]
        with av.open(str(wanted.info.path)) as container:
            frames = [f for i, f in enumerate(container.decode(container.streams.best("video"))) if i % 9 == 0]
        for jpeg, frame in zip(video.read(np.arange(len(frames))), frames, strict=True):
            turned = np.rot90(decoded(jpeg), wanted.info.rotation // 90)
            size = {"width": turned.shape[1], "height": turned.shape[0]}
            truth = frame.to_ndarray(format="rgb24", interpolation="AREA", **size)
            assert np.abs(turned.astype(int) - truth).mean() < 6


@pytest.mark.parametrize("name", ["a", "v_abc-1.2", "a b", "f\u00fcr", "x" * 180])
def test_plain_names_stay_names_of_files(name: str) -> None:
    assert file_name(name) == name


def test_other_names_become_short_ones_that_differ(tmp_path: Path) -> None:
    names = [
        "cam1/1",
        "cam2/1",
        "cam1_1",
        "../a",
        "..",
        ".a",
        "a\\b",
        "a\nb",
        "a\udcff",
        "x" * 240,
        "x" * 241,
        "\u00fc" * 120,
    ]
    made = [file_name(name) for name in names]
    assert len(set(made)) == len(made)
    for name in made:
        assert len(name.encode()) <= 180
        (tmp_path / f"{name}@12345.67s.npy.1234567.partial").touch()
    assert len(list(tmp_path.iterdir())) == len(names)

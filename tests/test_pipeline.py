"""Pictures from a real cache, through DALI, against FFmpeg's decode of the same bytes and PyTorch's resize.

In every test video red grows to the right, green grows downwards and blue counts the frames, so that a wrong region,
a mirrored picture or a wrong order shows in the pixels. A fine grain shows how a picture was made smaller.
"""

from __future__ import annotations

import pickle
import shutil
import subprocess
import sys
import weakref
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path

import av
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from patience import PATIENCE

from lofi_fast.data.cache import CacheRequest, prepare
from lofi_fast.data.entry import CachedVideo
from lofi_fast.data.pipeline import FramePipeline, FrameRequest, View, shrink
from lofi_fast.data.video import probe
from lofi_fast.errors import InputError
from lofi_fast.fidelity import Fidelity, select_snippets

pytest.importorskip("nvidia.dali", exc_type=ModuleNotFoundError)  # a machine that only computes may lack it

NUM_FRAMES = 24
WHOLE = View(0.0, 0.0, 1.0, 1.0, False)
ALL = np.arange(NUM_FRAMES)
# Of 255. One rounding of luma, one and a half of chroma (times up to 1.772 in the matrix), half a one of the result.
LEVELS = 4


def drawn(index: int, width: int, height: int) -> np.ndarray:
    y, x = np.mgrid[:height, :width]
    picture = np.stack([40 + 150 * x / width, 40 + 150 * y / height, np.full(x.shape, 30 + 8 * index)], axis=-1)
    return picture + np.random.default_rng(index).integers(-14, 15, (height, width, 1))


def make_cached(folder: Path, name: str, width: int, height: int) -> CachedVideo:
    path = folder / f"{name}.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=10, options={"crf": "1"})
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        for index in range(NUM_FRAMES):
            picture = av.VideoFrame.from_ndarray(drawn(index, width, height).astype(np.uint8), format="rgb24")
            container.mux(stream.encode(picture))
        container.mux(stream.encode(None))
    request = CacheRequest(name, probe(path), ALL)
    cached, skipped = prepare([request], folder / "cache", min(width, height), workers=1)
    assert not skipped
    return cached[name]


@pytest.fixture(scope="module")
def square(tmp_path_factory: pytest.TempPathFactory) -> CachedVideo:
    return make_cached(tmp_path_factory.mktemp("square"), "square", 64, 64)


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> CachedVideo:
    return make_cached(tmp_path_factory.mktemp("wide"), "wide", 96, 72)


@pytest.fixture(scope="module")
def pipeline() -> Iterator[FramePipeline]:
    pipeline = FramePipeline(max_frames=32)
    yield pipeline
    pipeline.close()


def ffmpeg_pictures(video: CachedVideo) -> torch.Tensor:
    """The cached pictures as FFmpeg decodes them to planes, then by JFIF's rules, (n, height, width, 3) float64.

    Chroma is upsampled linearly between the centres of its pixels, and the matrix is BT.601, full range.
    """
    planes = []
    for jpeg in video.read(ALL):
        (frame,) = av.CodecContext.create("mjpeg", "r").decode(av.Packet(jpeg.tobytes()))
        assert frame.format.name == "yuvj420p"
        planes.append(torch.from_numpy(frame.to_ndarray()).double())
    flat = torch.stack(planes).reshape(NUM_FRAMES, -1)
    height, width = video.height, video.width
    luma = flat[:, : height * width].reshape(-1, height, width)
    chroma = flat[:, height * width :].reshape(-1, 2, height // 2, width // 2) - 128
    blue, red = torch.nn.functional.interpolate(chroma, (height, width), mode="bilinear").unbind(1)
    rgb = torch.stack([luma + 1.402 * red, luma - 0.344136 * blue - 0.714136 * red, luma + 1.772 * blue], dim=-1)
    return rgb.clamp(0, 255)


def one_by_one(pipeline: FramePipeline, requests: Iterable[FrameRequest]) -> Iterator[torch.Tensor]:
    """Each request as a batch of its own, read as lazily as the stream reads."""
    return pipeline.stream([request] for request in requests)


def assert_close(frames: torch.Tensor, expected: torch.Tensor, levels: int) -> None:
    assert frames.shape == expected.shape
    assert frames.dtype == torch.uint8
    assert frames.is_contiguous()
    error = (frames.double() - expected.double()).abs()
    assert error.mean() <= 0.6, f"mean error {error.mean()}"
    assert error.max() <= levels, f"largest error {error.max()} at {np.unravel_index(int(error.argmax()), error.shape)}"


def test_requests_of_a_batch_follow_each_other_in_one_tensor(
    pipeline: FramePipeline, square: CachedVideo, wide: CachedVideo
) -> None:
    views = (WHOLE, View(0.25, 0.5, 0.5, 0.375, True), View(0.0, 0.125, 1.0, 0.75, False))
    requests = [
        FrameRequest(video, ALL[:count], view, 20)
        for video, count, view in zip((wide, square, wide), (3, 1, 5), views, strict=True)
    ]
    (batch,) = pipeline.stream([requests])
    assert torch.equal(batch, torch.cat(list(one_by_one(pipeline, requests))))
    with pytest.raises(ValueError, match="one side"):
        next(pipeline.stream([[requests[0], FrameRequest(wide, ALL, WHOLE, 24)]]))
    with pytest.raises(ValueError, match="one side"):
        next(pipeline.stream([[]]))


def test_whole_frame_at_its_own_size_is_the_decoded_picture(pipeline: FramePipeline, square: CachedVideo) -> None:
    (frames,) = one_by_one(pipeline, [FrameRequest(square, ALL, WHOLE, 64)])
    assert_close(frames, ffmpeg_pictures(square), levels=LEVELS)
    # and with what was drawn, so that FFmpeg's reading of the file is not the only judge of range and matrix
    original = torch.from_numpy(np.stack([drawn(index, 64, 64) for index in ALL]))
    assert (frames.double() - original).mean(dim=(0, 1, 2)).abs().max() < 2


def test_crop_without_resize_is_a_slice(pipeline: FramePipeline, wide: CachedVideo, square: CachedVideo) -> None:
    whole, part = one_by_one(
        pipeline,
        [FrameRequest(square, ALL, WHOLE, 64), FrameRequest(square, ALL, View(0.25, 0.5, 0.375, 0.375, False), 24)],
    )
    assert torch.equal(part, whole[:, 16:40, 32:56])
    (part,) = one_by_one(pipeline, [FrameRequest(wide, ALL, View(0.25, 0.5, 0.5, 0.375, False), 36)])
    assert_close(part, ffmpeg_pictures(wide)[:, 18:54, 48:84], levels=LEVELS)


@pytest.mark.parametrize(
    ("rows", "columns", "side"),
    [
        pytest.param((0, 72), (0, 96), 32, id="whole-frame-smaller"),
        pytest.param((18, 54), (24, 84), 28, id="crop-smaller"),
        pytest.param((36, 54), (72, 90), 40, id="crop-larger"),
        pytest.param((9, 72), (12, 96), 17, id="odd-side"),
        pytest.param((0, 72), (0, 96), 1, id="one-pixel"),
    ],
)
def test_resize_is_linear_and_antialiased(
    pipeline: FramePipeline, wide: CachedVideo, rows: tuple[int, int], columns: tuple[int, int], side: int
) -> None:
    (top, bottom), (left, right) = rows, columns
    view = View(top / 72, left / 96, (bottom - top) / 72, (right - left) / 96, False)
    (frames,) = one_by_one(pipeline, [FrameRequest(wide, ALL, view, side)])
    region = ffmpeg_pictures(wide)[:, top:bottom, left:right].permute(0, 3, 1, 2).double()
    expected = torch.nn.functional.interpolate(region, (side, side), mode="bilinear", antialias=True)
    # at the border of a crop DALI looks at the pixels beyond it, which this region has not
    inner = slice(None) if (bottom - top, right - left) == (72, 96) else slice(2, -2)
    assert frames.shape == (NUM_FRAMES, side, side, 3)
    assert_close(frames[:, inner, inner].contiguous(), expected.permute(0, 2, 3, 1)[:, inner, inner], levels=LEVELS)


def test_flip_is_the_exact_mirror_of_the_same_view(pipeline: FramePipeline, wide: CachedVideo) -> None:
    view = View(0.11, 0.07, 0.83, 0.61, False)
    plain, flipped = one_by_one(
        pipeline, [FrameRequest(wide, ALL, view, 45), FrameRequest(wide, ALL, replace(view, flip=True), 45)]
    )
    assert torch.equal(flipped, plain.flip(2))
    assert not torch.equal(flipped, plain)


@pytest.mark.parametrize("depth", [1, 2, 5])
def test_order_is_kept_when_counts_and_sides_vary(square: CachedVideo, wide: CachedVideo, depth: int) -> None:
    positions = [
        np.array([7]),
        np.array([3, 1, 2]),
        np.array([], dtype=np.int64),
        ALL[::-1],
        np.array([5, 5, 0, 23, 5]),
        ALL[4:13],
        np.array([22]),
    ]
    sides = [16, 64, 8, 33, 1, 16, 48]
    requests = [
        FrameRequest(wide if index % 2 else square, which, WHOLE, side)
        for index, (which, side) in enumerate(zip(positions, sides, strict=True))
    ]
    pipeline = FramePipeline(max_frames=NUM_FRAMES, depth=depth)
    results = list(one_by_one(pipeline, requests))
    pipeline.close()
    assert len(results) == len(requests)
    for request, frames in zip(requests, results, strict=True):
        assert frames.shape == (len(request.positions), request.side, request.side, 3)
        blue = frames[..., 2].double().mean(dim=(1, 2))
        assert torch.equal(((blue - 30) / 8).round().long(), torch.from_numpy(request.positions.copy()).long())


@pytest.mark.parametrize("max_frames", [1, 7, 12, 23, 24])
def test_request_larger_than_a_run_gives_the_same_bits(
    pipeline: FramePipeline, wide: CachedVideo, max_frames: int
) -> None:
    requests = [FrameRequest(wide, ALL, View(0.1, 0.2, 0.7, 0.7, True), side) for side in (40, 21)]
    small = FramePipeline(max_frames=max_frames)
    for whole, split in zip(one_by_one(pipeline, requests), one_by_one(small, requests), strict=True):
        assert torch.equal(whole, split)
    small.close()


def test_tensors_belong_to_the_consumer(pipeline: FramePipeline, wide: CachedVideo) -> None:
    requests = [FrameRequest(wide, ALL[start : start + 4], WHOLE, 48) for start in range(0, NUM_FRAMES, 4)]
    kept, copies = [], []
    for frames in one_by_one(pipeline, requests):
        kept.append(frames)
        copies.append(frames.clone())
    assert all(torch.equal(a, b) for a, b in zip(kept, copies, strict=True))
    for frames in one_by_one(pipeline, requests):
        released = weakref.ref(frames)
        del frames
        assert released() is None, "the pipeline still holds a tensor that its consumer has dropped"


def test_requests_are_drawn_at_most_depth_ahead(pipeline: FramePipeline, square: CachedVideo) -> None:
    drawn = 0

    def requests() -> Iterator[FrameRequest]:
        nonlocal drawn
        for position in ALL:
            drawn += 1
            yield FrameRequest(square, np.array([position]), WHOLE, 16)

    stream = one_by_one(pipeline, requests())
    assert drawn == 0
    for delivered, _ in enumerate(stream, start=1):
        assert drawn == min(delivered + 1, NUM_FRAMES)
        assert pipeline.pending == (drawn - delivered) * 16 * 16 * 3
    stream = one_by_one(pipeline, requests())
    next(stream)
    stream.close()
    assert pipeline.pending == 0


def test_stream_may_be_left_and_another_started(pipeline: FramePipeline, square: CachedVideo) -> None:
    requests = [FrameRequest(square, ALL[index:], WHOLE, 32) for index in range(6)]
    expected = list(one_by_one(pipeline, requests))
    for wanted in (0, 1, 3):
        left = one_by_one(pipeline, requests)
        for _ in range(wanted):
            next(left)
        left.close()
        assert all(torch.equal(a, b) for a, b in zip(one_by_one(pipeline, requests), expected, strict=True))
    # the first one is not even closed
    left = one_by_one(pipeline, requests)
    next(left)
    assert all(torch.equal(a, b) for a, b in zip(one_by_one(pipeline, requests), expected, strict=True))
    assert torch.equal(next(left), expected[1])


def test_two_pipelines_of_different_threads_give_the_same_bits(square: CachedVideo, wide: CachedVideo) -> None:
    view = View(0.03, 0.2, 0.9, 0.55, True)
    requests = [FrameRequest(video, ALL, view, side) for side in (19, 56) for video in (square, wide)]
    one, two = FramePipeline(NUM_FRAMES, num_threads=1), FramePipeline(NUM_FRAMES, num_threads=2, depth=3)
    count = 0
    for a, b in zip(one_by_one(one, requests), one_by_one(two, requests), strict=True):
        assert torch.equal(a, b)
        count += 1
    assert count == 4
    one.close()
    assert torch.equal(next(one_by_one(two, requests[-1:])), a)
    two.close()


def without_an_index(entry: CachedVideo, place: Path) -> CachedVideo:
    """The entry at another place, where its index was read and is gone."""
    moved = replace(entry, place=str(place))
    shutil.copy2(entry.index, moved.index)
    assert np.array_equal(moved.frames, entry.frames)
    Path(moved.index).unlink()
    return moved


@pytest.mark.parametrize(
    ("first", "last"), [(0.0, 1.0), (0.5, 1.0), (0.0, 0.5)], ids=["all-zero", "second-half-zero", "first-half-zero"]
)
def test_damaged_picture_names_the_file_and_the_pipeline_goes_on(
    tmp_path: Path, pipeline: FramePipeline, square: CachedVideo, first: float, last: float
) -> None:
    bad = 9
    damaged = without_an_index(square, tmp_path / "damaged")
    content = bytearray(square.path.read_bytes())
    start, end = (int(square.offsets[bad] + fraction * square.sizes[bad]) for fraction in (first, last))
    content[start:end] = bytes(end - start)
    damaged.path.write_bytes(content)

    good = FrameRequest(square, ALL, WHOLE, 32)
    (expected,) = one_by_one(pipeline, [good])
    stream = one_by_one(pipeline, [good, FrameRequest(damaged, ALL, WHOLE, 32), good])
    assert torch.equal(next(stream), expected)
    with pytest.raises(InputError, match=rf"picture {bad} of the cache file .*damaged\.mov is damaged; delete"):
        next(stream)
    rest = FrameRequest(damaged, np.delete(ALL, bad), WHOLE, 32)
    assert torch.equal(next(one_by_one(pipeline, [rest])), expected[rest.positions])


def test_errors_of_the_requests_reach_the_consumer(pipeline: FramePipeline, square: CachedVideo) -> None:
    good = FrameRequest(square, ALL, WHOLE, 32)

    def requests() -> Iterator[FrameRequest]:
        yield good
        raise KeyError("the sampler failed")

    with pytest.raises(KeyError, match="the sampler failed"):
        list(one_by_one(pipeline, requests()))
    missing = without_an_index(square, square.path.with_name("gone"))
    with pytest.raises(InputError, match=r"gone\.mov"):
        list(one_by_one(pipeline, [replace(good, video=missing)]))
    for positions in (np.array([0, NUM_FRAMES]), np.array([-1])):
        with pytest.raises(ValueError, match=f"from 0 to {NUM_FRAMES - 1}"):
            list(one_by_one(pipeline, [replace(good, positions=positions)]))
    with pytest.raises(ValueError, match="side"):
        list(one_by_one(pipeline, [replace(good, side=0)]))
    assert len(list(one_by_one(pipeline, [good]))) == 1


def test_settings_that_cannot_work_are_refused() -> None:
    for settings in ({"max_frames": 0}, {"max_frames": 8, "num_threads": 0}, {"max_frames": 8, "depth": 0}):
        with pytest.raises(ValueError, match=list(settings)[-1]):
            FramePipeline(**settings)
    with pytest.raises(ValueError, match="device"):
        FramePipeline(8, device="meta")
    for outside in ((-0.1, 0, 0.5, 0.5), (0, 0.6, 0.5, 0.5), (0, 0, 0, 1), (0, 0, float("nan"), 1)):
        with pytest.raises(ValueError, match="inside the frame"):
            View(*outside, flip=False)


LACK_OF_MEMORY = """
import pickle, resource, sys
import numpy as np, torch
from lofi_fast.data.pipeline import FramePipeline, FrameRequest, View

video = pickle.loads(bytes.fromhex(sys.argv[1]))
large = FrameRequest(video, np.zeros(256, dtype=np.int64), View(0.0, 0.0, 1.0, 1.0, False), 64)
pipeline = FramePipeline(max_frames=256)
(expected,) = pipeline.stream([[FrameRequest(video, np.zeros(1, dtype=np.int64), large.view, 64)]])

in_use = next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith("VmData"))
resource.setrlimit(resource.RLIMIT_DATA, (in_use + 80 * 2**20, resource.RLIM_INFINITY))
try:
    next(pipeline.stream([[large]]))
except MemoryError as error:
    print(type(error).__name__)
resource.setrlimit(resource.RLIMIT_DATA, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
(again,) = pipeline.stream([[large]])
print(torch.equal(again, expected.expand_as(again)))
"""


def test_lack_of_memory_is_not_taken_for_a_damaged_picture(tmp_path: Path) -> None:
    """256 pictures of 640x480 are 236 MB; the limit leaves 80 MiB, then the same request is sent again without it."""
    video = make_cached(tmp_path, "large", 640, 480)
    result = subprocess.run(
        [sys.executable, "-c", LACK_OF_MEMORY, pickle.dumps(video).hex()],
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
    assert result.stdout.split() == ["MemoryError", "True"], result.stderr


@pytest.mark.gpu
def test_gpu_gives_the_pictures_of_the_cpu(pipeline: FramePipeline, square: CachedVideo, wide: CachedVideo) -> None:
    requests = [
        FrameRequest(video, ALL, View(0.1, 0.2, 0.7, 0.7, flip), side)
        for side, flip in ((32, False), (57, True), (64, False))
        for video in (square, wide)
    ]
    on_gpu = FramePipeline(max_frames=10, device="cuda")
    for frames, expected in zip(one_by_one(on_gpu, requests), one_by_one(pipeline, requests), strict=True):
        assert frames.is_cuda
        assert_close(frames.cpu(), expected, levels=LEVELS)
    on_gpu.close()


# Frames that were asked for at more memory than is left


def test_shrink_keeps_the_snippets_nearest_to_equal_spacing() -> None:
    decoded, lower = Fidelity(6, 16), Fidelity(3, 16)
    frames = torch.arange(2 * 6, dtype=torch.uint8).repeat_interleave(8).view(-1, 1, 1, 1).expand(-1, 16, 16, 3)
    small = shrink(frames, decoded, lower)
    assert small.shape == (2 * 3 * 8, 16, 16, 3)
    chosen = select_snippets(6, 3).tolist()
    assert small[::8, 0, 0, 0].tolist() == [*chosen, *(6 + c for c in chosen)]
    assert small.unflatten(0, (-1, 8)).flatten(1).float().std(dim=1).max() == 0, "whole snippets"


def test_shrink_resizes_like_the_mean_of_pixels() -> None:
    generator = torch.Generator().manual_seed(0)
    frames = torch.randint(0, 256, (2 * 8, 32, 32, 3), generator=generator, dtype=torch.uint8)
    frames = F.interpolate(frames.permute(0, 3, 1, 2).float(), scale_factor=4, mode="bilinear").permute(0, 2, 3, 1)
    frames = frames.round().to(torch.uint8)  # smooth: 128 px that 32 px describe
    small = shrink(frames, Fidelity(2, 128), Fidelity(2, 64))
    expected = F.avg_pool2d(frames.permute(0, 3, 1, 2).float(), 2).permute(0, 2, 3, 1)
    assert small.dtype == torch.uint8 and small.is_contiguous()
    assert (small.float() - expected).abs().mean() < 4
    same = shrink(frames, Fidelity(2, 128), Fidelity(2, 128))
    assert same is frames

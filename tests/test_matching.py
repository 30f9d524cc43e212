"""A name in the labels means one file, or is refused; a container is known by what it holds."""

from __future__ import annotations

import os
import unicodedata
from pathlib import Path

import av
import numpy as np
import pytest
from av.video.frame import VideoFrame

from lofi_fast.data.matching import find_videos, list_videos, match_videos
from lofi_fast.data.video import decode, probe
from lofi_fast.errors import InputError


def touch(folder: Path, *files: str) -> None:
    for file in files:
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        (folder / file).touch()


def test_find_videos(tmp_path: Path) -> None:
    for file in ("b/x.mp4", "a/x.mkv", "v_y.MP4", "a/deep/z.1.webm", "x.txt", "w.avi"):
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).touch()
    (tmp_path / "a" / "loop").symlink_to(tmp_path)
    found = find_videos(tmp_path, ["a/x", "b/x.mp4", "y", "z.1", "w.avi", "absent"])
    assert found.paths == {
        "a/x": tmp_path / "a" / "x.mkv",
        "b/x.mp4": tmp_path / "b" / "x.mp4",
        "y": tmp_path / "v_y.MP4",
        "z.1": tmp_path / "a" / "deep" / "z.1.webm",
        "w.avi": tmp_path / "w.avi",
    }
    assert (found.absent, found.notes) == ({"absent": "no video file of this name"}, ())
    with pytest.raises(InputError, match="--videos"):
        find_videos(tmp_path / "nowhere", ["x"])
    with pytest.raises(InputError, match="--videos"):
        find_videos(tmp_path / "x.txt", ["x"])


def test_list_videos(tmp_path: Path) -> None:
    for file in ("b/x.mp4", "a/x.3GP", "v.ogv", "notes.txt", "mp4"):
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).touch()
    (tmp_path / "a" / "loop").symlink_to(tmp_path)
    assert list_videos(tmp_path) == [tmp_path / "a" / "x.3GP", tmp_path / "b" / "x.mp4", tmp_path / "v.ogv"]
    with pytest.raises(InputError, match="mp4 is a file, not a folder"):
        list_videos(tmp_path / "mp4")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may list any folder")
def test_find_videos_in_a_forbidden_folder(tmp_path: Path) -> None:
    closed = tmp_path / "closed"
    closed.mkdir(mode=0)
    with pytest.raises(InputError, match="cannot be listed"):
        find_videos(closed, ["x"])


@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("cam2/0001", "cam2/0001.mp4"),
        ("cam2/0001.mp4", "cam2/0001.mp4"),
        ("./cam2/0001", "cam2/0001.mp4"),
        ("cam2\\0001.mp4", "cam2/0001.mp4"),
        ("videos/cam1/0001", "cam1/0001.mp4"),
        ("cam3/0007", "day1/cam3/0007.mkv"),
        ("day1/cam3/0007", "day1/cam3/0007.mkv"),
        ("cam3/abc", "day1/cam3/v_abc.mp4"),
        ("top", "top.mp4"),  # a whole path from the folder, although cam1/top.mp4 ends like it
        ("cam1/top", "cam1/top.mp4"),
        ("0002.mkv", "cam1/0002.mkv"),
    ],
)
def test_relative_paths_are_names(name: str, file: str, tmp_path: Path) -> None:
    folder = tmp_path / "videos"
    touch(folder, "cam1/0001.mp4", "cam2/0001.mp4", "day1/cam3/0007.mkv", "day1/cam3/v_abc.mp4", "top.mp4")
    touch(folder, "cam1/top.mp4", "cam1/0002.mkv", "cam1/0002.avi")
    assert find_videos(folder, [name]).paths == {name: folder / file}
    absolute = str(folder / file)
    assert find_videos(folder, [absolute]).paths == {absolute: folder / file}


@pytest.mark.parametrize(
    ("name", "files"),
    [
        ("0001", ("cam1/0001.mp4", "cam2/0001.mp4")),
        ("0001.mp4", ("cam1/0001.mp4", "cam2/0001.mp4")),
        ("cam/0001", ("a/cam/0001.mp4", "b/cam/0001.mp4")),
        ("x", ("x.mkv", "x.mp4")),
        ("x", ("a/v_x.mkv", "b/v_x.mp4")),
    ],
)
def test_a_name_of_several_files_is_refused(name: str, files: tuple[str, ...], tmp_path: Path) -> None:
    touch(tmp_path, *files)
    with pytest.raises(InputError) as caught:
        find_videos(tmp_path, [name])
    assert repr(name) in str(caught.value) and all(file in str(caught.value) for file in files)


@pytest.mark.parametrize(
    ("name", "file", "rule"),
    [
        ("/data/old/x.mp4", "x.mp4", "begins in another place"),
        ("C:\\data\\cam1\\y.mp4", "cam1/y.mp4", "begins in another place"),
        ("https://a.org/v/cam2/y.mp4", "cam2/y.mp4", "begins in another place"),
        ("../z/x", "x.mp4", "begins in another place"),
        ("x ", "x.mp4", "white space"),
        ("\u00a0x.mp4", "x.mp4", "white space"),
        ("late", "late .mp4", "white space"),
        ("two  words", "two\u00a0words.mkv", "white space"),
        ("x.MP4", "x.mp4", "extension is in another case"),
        ("cam1/y.Mp4", "cam1/y.mp4", "extension is in another case"),
    ],
)
def test_what_is_no_file_s_name_but_can_mean_one_only(name: str, file: str, rule: str, tmp_path: Path) -> None:
    touch(tmp_path, "x.mp4", "cam1/y.mp4", "cam2/y.mp4", "late .mp4", "two\u00a0words.mkv")
    found = find_videos(tmp_path, [name])
    assert found.paths == {name: tmp_path / file}
    assert len(found.notes) == 1 and rule in found.notes[0] and repr(name) in found.notes[0]


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("x.avi", "but there is x.mp4; leave the extension out in the labels if it is that one"),
        ("cam3/x", "in that folder, but there is x.mp4"),
        ("folder", "but a folder, folder.mp4"),
        ("folder.mp4", "but a folder, folder.mp4"),
        ("a.b", ""),
    ],
)
def test_what_comes_near_is_hinted_at(name: str, hint: str, tmp_path: Path) -> None:
    touch(tmp_path, "x.mp4", "folder.mp4/inside.mp4", "a.b.c.mp4")
    found = find_videos(tmp_path, [name])
    assert not found.paths and not found.notes
    assert found.absent[name].startswith("no video file of this name") and found.absent[name].endswith(hint)


def test_names_from_above_the_folder(tmp_path: Path) -> None:
    folder = tmp_path / "videos" / "train"
    touch(folder, "x.mp4", "cam/y.mp4")
    names = ["videos/train/x", "train/cam/y.mp4"]
    assert find_videos(folder, names).paths == dict(zip(names, (folder / "x.mp4", folder / "cam/y.mp4"), strict=True))


def test_names_that_are_unclear_are_told_beside_all_others(tmp_path: Path) -> None:
    touch(tmp_path, "1/x.mp4", "2/x.mp4", "3/x.mp4", "y.mp4", "z.mp4")
    found = match_videos(tmp_path, ["x", "y", "y ", "z", "/old/x.mp4"])
    assert found.paths == {"y": tmp_path / "y.mp4", "z": tmp_path / "z.mp4"}
    assert found.unclear.keys() == {"x", "y ", "/old/x.mp4"} and not found.absent
    assert all(f"{folder}/x.mp4" in found.unclear["x"] for folder in "123")
    assert "'y' and 'y '" in found.unclear["y "]


def test_a_pipe_without_extension_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "x")
    assert find_videos(tmp_path, ["x"]).absent.keys() == {"x"}


def test_links_to_one_file_are_one_file(tmp_path: Path) -> None:
    touch(tmp_path, "a/x.mp4")
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "x.mp4").symlink_to(tmp_path / "a" / "x.mp4")
    assert find_videos(tmp_path, ["x"]).paths == {"x": tmp_path / "a" / "x.mp4"}


def test_two_names_of_one_file_are_refused(tmp_path: Path) -> None:
    touch(tmp_path, "cam1/x.mp4")
    with pytest.raises(InputError, match="'x' and 'cam1/x'"):
        find_videos(tmp_path, ["x", "cam1/x"])


def test_another_unicode_form_is_taken_and_another_case_is_hinted_at(tmp_path: Path) -> None:
    composed, decomposed = (unicodedata.normalize(form, "caf\u00e9/\u00fcbung") for form in ("NFC", "NFD"))
    for wanted, stored in ((composed, decomposed), (decomposed, composed)):
        folder = tmp_path / str(len(wanted))
        touch(folder, f"{stored}.mp4", "Clip_1.mp4", "A/b.mp4")
        found = find_videos(folder, [wanted, "clip_1", "a/B"])
        assert found.paths == {wanted: folder / f"{stored}.mp4"}
        assert len(found.notes) == 1 and "Unicode" in found.notes[0]
        assert "Clip_1.mp4" in found.absent["clip_1"] and "case" in found.absent["clip_1"]
        assert "A/b.mp4" in found.absent["a/B"]


CONTAINERS = {
    "3gp": ("h263", "3gp", "v.3gp"),
    "mxf": ("mpeg2video", "mxf", "v.mxf"),
    "vob": ("mpeg2video", "vob", "v.VOB"),
    "asf": ("msmpeg4", "asf", "v.asf"),
    "ogv": ("libvpx", "ogv", "v.ogv"),
    "h264": ("libx264", "h264", "v.h264"),
    "hevc": ("libx265", "hevc", "v.265"),
    "mjpeg": ("mjpeg", "mjpeg", "v.mjpeg"),
    "no extension": ("libx264", "mp4", "v"),
    "no extension, transport stream": ("libx264", "mpegts", "v"),
    "an extension of its own": ("libx264", "matroska", "v.camera7"),
    "a dot in the name": ("libx264", "mp4", "v.2024-01-02"),
}


@pytest.mark.parametrize("case", CONTAINERS)
def test_any_container_is_found_and_decoded(case: str, tmp_path: Path) -> None:
    codec, container_format, file = CONTAINERS[case]
    (tmp_path / "v.txt").write_text("beside it")
    with av.open(str(tmp_path / file), "w", format=container_format) as container:
        stream = container.add_stream(codec, rate=25)
        stream.width, stream.height = 176, 144
        stream.pix_fmt = "yuvj420p" if codec == "mjpeg" else "yuv420p"
        for i in range(25):
            pixels = np.full((144, 176, 3), 40 + 7 * i, dtype=np.uint8)
            container.mux(stream.encode(VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode(None))
    found = find_videos(tmp_path, ["v"])
    assert found.paths == {"v": tmp_path / file}
    info = probe(found.paths["v"])
    assert len(info.pts) == 25
    np.testing.assert_allclose(info.pts, np.arange(25) / 25, atol=0.0011)
    shown = [frame.to_ndarray(format="gray").mean() for _, frame in decode(info, np.arange(25), threads=1)]
    assert np.all(np.diff(shown) > 0)


def test_what_is_no_video_is_not_taken_for_one(tmp_path: Path) -> None:
    (tmp_path / "v").write_text("just words\n" * 100)
    (tmp_path / "v.dat").write_bytes(np.random.default_rng(0).bytes(5000))
    (tmp_path / "v.json").write_text("{}")
    (tmp_path / "w").write_text("ffconcat version 1.0\nfile x.mp4\n")
    assert find_videos(tmp_path, ["v", "w"]).absent.keys() == {"v", "w"}

"""The catalogue gives back what a probe found out, for as long as the file is the same, and never anything else."""

from __future__ import annotations

import dataclasses
import json
import os
import threading
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from test_prepare import write_video

from bench.commands import start
from lofi_fast.data.cache import CacheRequest, lookup, prepare
from lofi_fast.data.catalogue import MANY, Catalogue, Stamps, real_path
from lofi_fast.data.dataset import cached_dataset
from lofi_fast.data.entry import CachedVideo
from lofi_fast.data.survey import Requests, Survey, cache_side, survey
from lofi_fast.data.video import VideoInfo, probe


def made_up(path: Path, step: int, count: int, **changes: object) -> VideoInfo:
    """An info as a probe gives it, of a file that is made for it."""
    path.write_bytes(b"x" * (1 + count % 7))
    ticks = np.arange(count, dtype=np.int64) * step + 3
    base = Fraction(1, 15360)
    pts = (ticks - ticks[0]) * base.numerator / base.denominator
    pts += 0.25
    status = path.stat()
    info = VideoInfo(
        path=path, pts=pts, duration=float(pts[-1]) + 0.04, width=320, height=240, rotation=90, codec="h264",
        pixel_format="yuv420p", size=status.st_size, mtime_ns=status.st_mtime_ns, time_base=base, ticks=ticks,
        key_ticks=ticks[::12],
    )  # fmt: skip
    return dataclasses.replace(info, **changes)  # type: ignore[arg-type]


def assert_same(ours: VideoInfo | None, theirs: VideoInfo) -> None:
    assert ours is not None
    for field in dataclasses.fields(VideoInfo):
        mine, other = getattr(ours, field.name), getattr(theirs, field.name)
        if isinstance(other, np.ndarray):
            assert mine.dtype == other.dtype and np.array_equal(mine, other), field.name
        else:
            assert mine == other and type(mine) is type(other), field.name


@pytest.fixture
def infos(tmp_path: Path) -> list[VideoInfo]:
    """Of every kind: regular, longer and shorter than one alike, irregular, counted, joined, with lost frames."""
    irregular = np.cumsum(np.random.default_rng(0).integers(1, 900, 500))
    return [
        made_up(tmp_path / "a.mp4", 512, 300),
        made_up(tmp_path / "b.mp4", 512, 900),
        made_up(tmp_path / "c.mp4", 512, 30, codec="hevc", mirrored=True, rotation=0),
        made_up(tmp_path / "d.mp4", 1001, 40, time_base=Fraction(1, 30000), pts=np.arange(40) * 1001 / 30000),
        made_up(tmp_path / "e.mkv", 1, 500, ticks=irregular, pts=(irregular - irregular[0]) * 1 / 15360 + 0.25),
        made_up(tmp_path / "f.avi", 1, 20, ticks=None, key_ticks=np.empty(0, dtype=np.int64), lost=0),
        made_up(tmp_path / "g.ts", 1, 20, ticks=None, lost=3, places=np.arange(20) + (np.arange(20) > 7) * 3),
        made_up(tmp_path / "\udcff\u00fc.mp4", 512, 8),
    ]


def test_what_is_kept_comes_back_to_the_last_bit(infos: list[VideoInfo], tmp_path: Path) -> None:
    catalogue = Catalogue(tmp_path / "cache")
    for info in infos:
        assert_same(catalogue.add_info(info), info)
    for info in infos:
        assert_same(catalogue.info(info.path), info)
    catalogue.save()
    again = Catalogue(tmp_path / "cache")
    for info in infos:
        assert_same(again.info(info.path), info)
    regular = [again.info(info.path) for info in infos[:2]]
    assert regular[0] is not None and regular[1] is not None
    assert np.shares_memory(regular[0].pts, regular[1].pts), "held once"


def test_probed_videos(tmp_path: Path) -> None:
    paths = [tmp_path / f"v.{suffix}" for suffix in ("mp4", "mkv", "avi", "ts")]
    for number, path in enumerate(paths):
        write_video(path, 20 + number)
    probed = [probe(path) for path in paths]
    catalogue = Catalogue(tmp_path / "cache")
    for info in probed:
        catalogue.add_info(info)
    catalogue.save()
    for info in probed:
        assert_same(Catalogue(tmp_path / "cache").info(info.path), info)


def test_a_file_that_has_changed_is_not_known(infos: list[VideoInfo], tmp_path: Path) -> None:
    catalogue = Catalogue(tmp_path / "cache")
    for info in infos[:4]:
        catalogue.add_info(info)
    os.utime(infos[0].path, ns=(1, 1))
    infos[1].path.write_bytes(b"longer than before")
    os.utime(infos[1].path, ns=(infos[1].mtime_ns, infos[1].mtime_ns))
    infos[2].path.unlink()
    assert [catalogue.info(info.path) for info in infos[:3]] == [None] * 3
    assert catalogue.info(infos[3].path) is not None
    assert Catalogue().info(infos[3].path) is None


def test_links_lead_to_the_same_video(infos: list[VideoInfo], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    catalogue = Catalogue(tmp_path / "cache")
    catalogue.add_info(infos[0])
    (tmp_path / "elsewhere").symlink_to(tmp_path)
    (tmp_path / "link.mp4").symlink_to(infos[0].path)
    monkeypatch.chdir(tmp_path)
    for path in (tmp_path / "elsewhere" / "a.mp4", tmp_path / "link.mp4", Path("a.mp4"), Path("elsewhere/../a.mp4")):
        assert real_path(path) == str(path.resolve())
    found = catalogue.info(Path("link.mp4"))
    assert found is not None and found.path == Path("link.mp4"), "under the name that it was asked for by"
    for path in (tmp_path / "absent" / "x", Path("."), Path("/"), Path("..")):
        assert real_path(path) == str(path.resolve())


def test_a_damaged_catalogue_is_left_out(infos: list[VideoInfo], tmp_path: Path) -> None:
    catalogue = Catalogue(tmp_path / "cache")
    for info in infos:
        catalogue.add_info(info)
    catalogue.save()
    [file] = (tmp_path / "cache" / "known").iterdir()
    whole = file.read_bytes()
    generator = np.random.default_rng(0)
    for _ in range(150):
        content = bytearray(whole)
        for at in generator.integers(0, len(content), generator.integers(1, 5)):
            content[at] ^= int(generator.integers(1, 256))
        file.write_bytes(content[: generator.choice((len(content), generator.integers(0, len(content))))])
        damaged = Catalogue(tmp_path / "cache")
        for info in infos:
            if (found := damaged.info(info.path)) is not None:
                assert_same(found, info)
    file.write_bytes(whole)
    assert Catalogue(tmp_path / "cache").info(infos[0].path) is not None


def test_many_files_are_put_together_and_writers_lose_nothing(infos: list[VideoInfo], tmp_path: Path) -> None:
    folder = tmp_path / "cache"
    for number in range(MANY + 3):
        catalogue = Catalogue(folder)
        catalogue.add_info(infos[number % len(infos)])
        catalogue.add_entry(f"e{number}", Stamps((number, 1), (2, 3)))
        catalogue.save()
    assert len(list((folder / "known").iterdir())) < MANY
    whole = Catalogue(folder)
    assert all(whole.holds(f"e{number}", Stamps((number, 1), (2, 3))) for number in range(MANY + 3))
    for info in infos:
        assert_same(whole.info(info.path), info)

    def add(number: int) -> None:
        mine = Catalogue(folder)
        mine.add_entry(f"t{number}", Stamps((0, 0), (0, 0)))
        mine.save()

    threads = [threading.Thread(target=add, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(Catalogue(folder).holds(f"t{number}", Stamps((0, 0), (0, 0))) for number in range(8))


def test_an_entry_counts_while_its_files_are_as_they_were(tmp_path: Path) -> None:
    write_video(tmp_path / "v.mp4", 20)
    wanted = CacheRequest("v", probe(tmp_path / "v.mp4"), np.arange(8))
    cache = tmp_path / "cache"
    known = Catalogue(cache)
    entry = prepare([wanted], cache, 32)[0]["v"]
    prepare([wanted], cache, 32, known=known)
    stamps = Stamps.of(entry.index, entry.path)
    assert not known.holds(entry.path.stem, stamps), "just written: it might change in the same instant"
    for path in (entry.index, entry.path):
        os.utime(path, (1, 1))
    prepare([wanted], cache, 32, known=known)
    stamps = Stamps.of(entry.index, entry.path)
    assert known.holds(entry.path.stem, stamps)
    pictures = [bytes(picture) for picture in entry.read(np.arange(8))]
    Path(entry.index).write_bytes(b"x")
    again = prepare([wanted], cache, 32, known=known)[0]["v"]
    assert [bytes(picture) for picture in again.read(np.arange(8))] == pictures
    os.truncate(again.path, 100)
    again = prepare([wanted], cache, 32, known=known)[0]["v"]
    assert [bytes(picture) for picture in again.read(np.arange(8))] == pictures


def test_a_full_cache_is_known_without_finding_its_frames(tmp_path: Path) -> None:
    start.make(tmp_path, 30, None, None)
    config, cache = start.config_of(tmp_path), tmp_path / "cache" / "frames"
    for path in cache.rglob("v_*"):
        os.utime(path, (1, 1))

    def looked_at(**changes: int) -> tuple[Survey, dict[str, CachedVideo]]:
        changed = dataclasses.replace(config, data=dataclasses.replace(config.data, **changes))  # type: ignore[arg-type]
        found = survey(changed, tmp_path / "labels.json", tmp_path / "videos", known=Catalogue(cache))
        return found, found.remembered(cache)

    found, remembered = looked_at()
    assert remembered == {}
    dataset = cached_dataset(found, cache, lambda *_: None)
    found, remembered = looked_at()
    assert len(remembered) == 30
    made = {sample.window.video: sample.cached for of in dataset.samples.values() for sample in of}
    for name, entry in lookup(Requests(found), cache, cache_side(config.full)).items():
        ours = remembered[name]
        assert (ours.path, ours.index, ours.changed) == (entry.path, entry.index, entry.changed)
        assert (ours.width, ours.height, ours.duration) == (entry.width, entry.height, entry.duration)
        assert np.array_equal(ours.frames, entry.frames) and made[name].path == entry.path
    assert looked_at(frame_stride=4)[1] == {}
    video = found.videos[0].info.path
    os.utime(video, (1, 1))
    os.utime(remembered[found.videos[1].name].index, (2, 2))
    remembered[found.videos[2].name].path.unlink()
    assert {one.name for one in found.videos} - set(looked_at()[1]) >= {one.name for one in found.videos[1:3]}
    assert not video.exists() or Catalogue(cache).info(video) is None


def test_starts_are_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    results = tmp_path / "start.jsonl"
    assert start.main(["--quick", "--results", str(results), "--folder", str(tmp_path)]) == 0
    rows = [json.loads(line) for line in results.read_text().splitlines()]
    assert [row["state"] for row in rows] == ["entries not in the catalogue", "entries in the catalogue"]
    for row in rows:
        assert row["videos"] == 50 and row["quick"] and row["peak"] >= row["parts"]["imports"][1] > 0
        assert row["seconds"] >= sum(seconds for seconds, _ in row["parts"].values()) - 0.1
    assert "2 rows appended" in capsys.readouterr().out

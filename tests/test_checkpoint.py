"""Checkpoints: the old file or the new one, never half of one; and the same random numbers after a restart."""

from __future__ import annotations

import os
import random
import resource
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lofi_fast import files
from lofi_fast.errors import InputError
from lofi_fast.run.checkpoint import Position, load, load_newest, restore_rng, rng_state, save_atomic


def checkpoint(value: float) -> dict[str, Any]:
    return {"position": asdict(Position("joint", 2, 7)), "encoder": {"w": torch.full((50_000,), value)}}


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """Writing past `size` bytes fails in this process, as on a full disk."""
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, old[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)


@pytest.fixture(autouse=True)
def generators_as_before() -> Iterator[None]:
    state = rng_state()
    yield
    restore_rng(state)


def test_round_trip(tmp_path: Path) -> None:
    path = tmp_path / "checkpoints" / "last.pt"
    save_atomic(checkpoint(3.0), path)
    content = load(path)
    assert Position(**content["position"]) == Position("joint", 2, 7)
    assert torch.equal(content["encoder"]["w"], torch.full((50_000,), 3.0))
    assert [p.name for p in path.parent.iterdir()] == ["last.pt"]


def test_a_save_replaces_the_old_file_and_what_a_killed_one_left(tmp_path: Path) -> None:
    path = tmp_path / "last.pt"
    save_atomic(checkpoint(1.0), path)
    (tmp_path / "last.pt.partial").write_bytes(b"half a checkpoint" * 100_000)
    save_atomic(checkpoint(2.0), path)
    assert load(path)["encoder"]["w"][0] == 2.0
    assert [p.name for p in tmp_path.iterdir()] == ["last.pt"]


def test_what_a_killed_process_left_goes_and_what_a_living_one_writes_stays(tmp_path: Path) -> None:
    with subprocess.Popen(["sleep", "60"]) as living:
        mine, other, dead = (tmp_path / f"plan.json.{pid}.partial" for pid in (os.getpid(), living.pid, 2**22 + 1))
        for path in (mine, other, dead, tmp_path / "plan.json"):
            path.write_text("{}")
        files.sweep(tmp_path)
        assert sorted(tmp_path.iterdir()) == sorted([mine, other, tmp_path / "plan.json"])
        living.kill()
    files.sweep(tmp_path / "no such folder")


def test_who_reads_the_old_file_during_a_save_gets_all_of_it(tmp_path: Path) -> None:
    path = tmp_path / "last.pt"
    save_atomic(checkpoint(1.0), path)
    before = path.read_bytes()
    with path.open("rb") as reader:
        beginning = reader.read(1000)
        save_atomic(checkpoint(2.0), path)
        assert beginning + reader.read() == before
    assert load(path)["encoder"]["w"][0] == 2.0


def test_a_full_disk_keeps_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "last.pt"
    save_atomic(checkpoint(1.0), path)
    before = path.read_bytes()
    with pytest.raises(InputError) as error, largest_file(100_000):
        save_atomic(checkpoint(2.0), path)
    assert str(path) in str(error.value) and "--out" in str(error.value) and "--resume" in str(error.value)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["last.pt"]
    save_atomic(checkpoint(3.0), path)  # and the next one goes through
    assert load(path)["encoder"]["w"][0] == 3.0


def test_a_folder_that_cannot_be_made_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(InputError, match="--out"):
        save_atomic(checkpoint(1.0), tmp_path / "file" / "last.pt")


def test_a_save_that_fails_for_any_reason_leaves_no_partial_file(tmp_path: Path) -> None:
    path = tmp_path / "last.pt"
    save_atomic(checkpoint(1.0), path)
    with pytest.raises(Exception, match="pickle"):
        save_atomic(checkpoint(2.0) | {"plans": lambda: None}, path)
    assert load(path)["encoder"]["w"][0] == 1.0
    assert [p.name for p in tmp_path.iterdir()] == ["last.pt"]


def test_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no checkpoint to resume from"):
        load(tmp_path / "last.pt")


def legacy(content: object, path: Path) -> None:
    torch.save(content, path, _use_new_zipfile_serialization=False)


# What people point a flag at by mistake, and what the bytes of damaged files look like to an unpickler.
FOREIGN: dict[str, bytes] = {
    "empty": b"",
    "text": b"hello world\n",
    "json": b'{"database": {}}',
    "csv": b"video,start,end,label\na,1,2,b\n",
    "markdown": b"# A title\n\nand text\n",
    "dots": b"....",
    "git-lfs-pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 5\n",
    "html": b"<!doctype html><html></html>",
    "mp4": b"\x00\x00\x00\x18ftypmp42" + b"\x00" * 60,
    "jpeg": b"\xff\xd8\xff\xe0\x00\x10JFIF" + b"\x00" * 60,
    "gzip": b"\x1f\x8b\x08" + b"\x00" * 60,
    "zip-header": b"PK\x03\x04" + b"\x00" * 60,
    "letters": b"h" * 40,
    "capitals": b"GIF89a",
    "pickle-of-a-list": b"\x80\x02]q\x00.",
    "pickle-cut-short": b"\x80\x02}q\x00(X\x08\x00\x00\x00posi",
    "not-utf8": b"\x80\x02X\x04\x00\x00\x00\xff\xfe\xfd\xfc.",
}


@pytest.mark.parametrize("name", FOREIGN)
def test_a_file_that_is_no_checkpoint(name: str, tmp_path: Path) -> None:
    path = tmp_path / "last.pt"
    path.write_bytes(FOREIGN[name])
    with pytest.raises(InputError) as error:
        load(path)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("write", [save_atomic, legacy], ids=["zip", "legacy"])
def test_a_checkpoint_cut_short(write: Callable[[Any, Path], None], tmp_path: Path) -> None:
    whole, cut = tmp_path / "whole.pt", tmp_path / "cut.pt"
    write({"position": {}, "w": torch.arange(100.0)}, whole)
    content = whole.read_bytes()
    for size in range(0, len(content), len(content) // 40):
        cut.write_bytes(content[:size])
        with pytest.raises(InputError):
            load(cut)


@pytest.mark.parametrize("content", [[1, 2], torch.zeros(3), {"state_dict": {}}], ids=["list", "tensor", "other-dict"])
def test_a_file_of_something_else(content: Any, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "last.pt")
    with pytest.raises(InputError, match="not a checkpoint of a lofi_fast run"):
        load(tmp_path / "last.pt")


def test_a_folder_in_its_place(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="not a readable checkpoint"):
        load(tmp_path)


def test_a_checkpoint_never_runs_code(tmp_path: Path) -> None:
    path = tmp_path / "last.pt"
    torch.save({"position": {}, "hook": Path("p")}, path)
    with pytest.raises(InputError):
        load(path)


# Damage that a disk does, and the checkpoint before the last


@pytest.mark.parametrize("count", [1, 200])
def test_a_flipped_bit_anywhere_is_noticed(tmp_path: Path, count: int) -> None:
    path, damaged = tmp_path / "last.pt", tmp_path / "damaged.pt"
    save_atomic({"position": {}, "w": torch.arange(3000.0), "names": ["a", "b"]}, path)
    whole = np.frombuffer(path.read_bytes(), dtype=np.uint8)
    generator = np.random.default_rng(count)
    for _ in range(150):
        content = whole.copy()
        content[generator.integers(0, len(whole), count)] ^= np.uint8(1 << generator.integers(0, 8))
        damaged.write_bytes(content.tobytes())
        if np.array_equal(content, whole):
            continue
        with pytest.raises(InputError) as error:
            load(damaged)
        assert str(damaged) in str(error.value) and "\n" not in str(error.value)


def test_what_follows_a_checkpoint_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "last.pt"
    save_atomic(checkpoint(1.0), path)
    path.write_bytes(path.read_bytes() + b"more")
    with pytest.raises(InputError):
        load(path)


def test_any_reader_of_pytorch_files_reads_a_checkpoint(tmp_path: Path) -> None:
    save_atomic(checkpoint(3.0), tmp_path / "last.pt")
    content = torch.load(tmp_path / "last.pt", weights_only=True)
    assert torch.equal(content["encoder"]["w"], torch.full((50_000,), 3.0))


@pytest.mark.parametrize("links", [True, False], ids=["hard links", "no hard links"])
def test_the_checkpoint_before_the_last_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, links: bool) -> None:
    if not links:

        def refuse(*of: object) -> None:
            raise PermissionError(1, "Operation not permitted")

        monkeypatch.setattr(os, "link", refuse)
    last, before = tmp_path / "last.pt", tmp_path / "previous.pt"
    for value in (1.0, 2.0, 3.0):
        save_atomic(checkpoint(value), last, before)
    assert (load(last)["encoder"]["w"][0], load(before)["encoder"]["w"][0]) == (3.0, 2.0)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["last.pt", "previous.pt"]


def test_a_save_that_was_killed_between_its_two_names_is_followed_by_a_whole_one(tmp_path: Path) -> None:
    last, before = tmp_path / "last.pt", tmp_path / "previous.pt"
    save_atomic(checkpoint(1.0), last)
    os.link(last, before)
    save_atomic(checkpoint(2.0), last, before)
    assert (load(last)["encoder"]["w"][0], load(before)["encoder"]["w"][0]) == (2.0, 1.0)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["last.pt", "previous.pt"]


def test_a_save_that_fails_keeps_both(tmp_path: Path) -> None:
    last, before = tmp_path / "last.pt", tmp_path / "previous.pt"
    save_atomic(checkpoint(1.0), last, before)
    save_atomic(checkpoint(2.0), last, before)
    with pytest.raises(InputError), largest_file(100_000):
        save_atomic(checkpoint(3.0), last, before)
    assert (load(last)["encoder"]["w"][0], load(before)["encoder"]["w"][0]) == (2.0, 1.0)


@pytest.mark.parametrize("spoil", ["flip", "cut", "gone"])
def test_the_one_before_stands_in_for_the_last_and_the_reason_is_told(tmp_path: Path, spoil: str) -> None:
    last, before = tmp_path / "last.pt", tmp_path / "previous.pt"
    for value in (1.0, 2.0):
        save_atomic(checkpoint(value), last, before)
    content, path, reason = load_newest(tmp_path)
    assert (content["encoder"]["w"][0], path, reason) == (2.0, last, "")

    def damage(path: Path) -> None:
        whole = path.read_bytes()
        if spoil == "gone":
            path.unlink()
        else:
            path.write_bytes(whole[: len(whole) // 2] if spoil == "cut" else whole[:9000] + b"\xff" + whole[9001:])

    damage(last)
    content, path, reason = load_newest(tmp_path)
    assert (content["encoder"]["w"][0], path) == (1.0, before)
    assert str(last) in reason
    damage(before)
    with pytest.raises(InputError) as error:
        load_newest(tmp_path)
    assert str(last) in str(error.value) and "--out" in str(error.value) and "\n" not in str(error.value)


def draws() -> list[Any]:
    return [
        [random.random(), random.gauss(0, 1)],
        np.random.standard_normal(3).tolist(),
        np.random.permutation(10).tolist(),
        torch.randn(5).tolist(),
        torch.randperm(10).tolist(),
    ]


def test_generators_go_on_where_they_stood(tmp_path: Path) -> None:
    random.seed(1)
    np.random.seed(2)
    torch.manual_seed(3)
    # An odd number of normals leaves python and numpy with one of a pair in hand, which is part of their state.
    random.gauss(0, 1)
    np.random.standard_normal(1)
    save_atomic({"position": {}, "rng": rng_state()}, tmp_path / "last.pt")
    expected = draws()
    assert draws() != expected
    restore_rng(load(tmp_path / "last.pt")["rng"])
    assert draws() == expected


@pytest.mark.gpu
def test_gpu_generators_go_on_where_they_stood() -> None:
    state = rng_state()
    expected = torch.randn(5, device="cuda").tolist()
    restore_rng(state)
    assert torch.randn(5, device="cuda").tolist() == expected

"""The series of faults: what it does to files, and that it sees what goes wrong; a small series of its own."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path
from random import Random

import pytest

from bench.commands import faults
from bench.tools.loaders import Loader, loaders
from bench.tools.mutations import damaged_bytes
from lofi_fast.errors import InputError

NUMBER = 1500  # damaged files, over all loaders


@pytest.fixture(scope="module")
def all_loaders(tmp_path_factory: pytest.TempPathFactory) -> list[Loader]:
    return loaders(tmp_path_factory.mktemp("loaders"))


def test_whole_files_are_read(all_loaders: list[Loader], tmp_path: Path) -> None:
    for loader in all_loaders:
        (tmp_path / loader.file).write_bytes(loader.content)
        assert loader.read(tmp_path / loader.file) is not None, loader.name


def test_damaged_files_end_in_the_declared_error_alone(all_loaders: list[Loader], tmp_path: Path) -> None:
    parts = sum(loader.share for loader in all_loaders)
    outcomes: Counter[str] = Counter()
    for loader in all_loaders:
        for i in range(NUMBER * loader.share // parts):
            what = faults.attempt(loader, f"{loader.name} {i}", tmp_path / "input")
            assert what in ("", "refused"), f"{loader.name}, seed {i}: {what}"
            outcomes[what] += 1
    assert outcomes["refused"] > NUMBER / 3 and outcomes[""] > NUMBER / 20


def test_the_same_seed_does_the_same_damage(all_loaders: list[Loader]) -> None:
    for loader in all_loaders:
        for mutation in loader.mutations:
            once, again, other = (mutation(Random(seed), loader.content) for seed in (1, 1, 2))
            assert once == again
            assert once != other or mutation is not damaged_bytes


def test_another_error_is_a_failure(all_loaders: list[Loader], tmp_path: Path) -> None:
    def fails(error: BaseException) -> str:
        def read(path: Path) -> object:
            raise error

        return faults.attempt(replace(all_loaders[0], read=read), "0", tmp_path / "input")

    assert fails(InputError("a sentence")) == "refused"
    assert fails(InputError("")) == "an empty sentence"
    assert fails(MemoryError("too much")) == "MemoryError: too much"
    assert fails(SystemExit(1)) == "SystemExit: 1"


def test_the_table_says_what_was_lost() -> None:
    row = {
        "bench": "faults", "part": "kills", "number": 3, "by": {"SIGKILL": 2, "SIGTERM": 1}, "where": {"joint": 3},
        "failures": ["training 1: metrics.json differs"], "seconds": 90.0, "date": "2026-01-02T03:04:05+00:00",
        "machine": "Some CPU", "device": "CPU, 2 cores", "threads": 1, "commit": "0123456789", "dirty": False,
    }  # fmt: skip
    (section,) = faults.table([row])
    assert not isinstance(section, str)
    ((what, number, lost, how, took),) = section.lines
    assert (number, lost, took) == ("3", "1", "2 min") and "killed" in what
    assert how == "2 SIGKILL, 1 SIGTERM; newest checkpoint then: 3 joint"

"""The bench of the gain: sets and folds, rows that share encoders, and what is said of them."""

from __future__ import annotations

import json
from functools import partial
from itertools import pairwise
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import numpy as np
import pytest
import torch

from bench.commands import gain
from bench.peers import partial as partial_encoders
from bench.tools import arms, rooms, sets
from bench.tools.rows import read_rows
from lofi_fast.data.generated import FRAME_RATE, labels_of
from lofi_fast.errors import InputError
from lofi_fast.presets import demo as demo_preset

TINY = ["--width", "8", "--fidelity", "8x32", "--pretrain-epochs", "1", "--joint-epochs", "1", "--head-epochs", "1"]


def _videos(annotations: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(annotations.read_text())["database"]
    return found


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sets of few videos, all of whose classes occur in training."""
    for module, seed in ((sets.demo, 0), (sets.rooms, 3)):
        made = partial(module.generate, num_training=3, num_validation=2, seed=seed)
        monkeypatch.setattr(module, "generate", made)


@pytest.mark.parametrize("version", rooms.VERSIONS)
def test_rooms_are_the_same_for_the_same_arguments_and_hold_what_they_say(version: int) -> None:
    scripts = rooms.scripts(12, 4, 3, version)
    assert scripts == rooms.scripts(12, 4, 3, version) != rooms.scripts(12, 4, 4, version)
    labels = {action.label for script in scripts for action in script.actions}
    assert labels == set(rooms.CLASSES)
    for script in scripts:
        edges = [0.0, *(time for action in script.actions for time in (action.start, action.end)), script.seconds]
        gap = rooms.VERSIONS[version].gap - 0.1
        assert all(later - earlier >= gap for earlier, later in zip(edges[::2], edges[1::2], strict=True))
        assert sum(action.end - action.start for action in script.actions) < 0.5 * script.seconds


@pytest.mark.parametrize("version", rooms.VERSIONS)
def test_a_room_moves_at_rest_as_in_actions_and_its_people_are_small(version: int) -> None:
    script = rooms.scripts(1, 0, 0, version)[0]
    frames = np.stack(list(rooms.render(script, version))).astype(np.float32)
    assert frames.shape == (script.num_frames, rooms.HEIGHT, rooms.WIDTH, 3)
    moved = np.abs(np.diff(frames.mean(axis=3), axis=0)).max(axis=(1, 2))
    acting = np.zeros(script.num_frames - 1, bool)
    for action in script.actions:
        acting[int(action.start * FRAME_RATE) : int(action.end * FRAME_RATE)] = True
    assert np.median(moved[~acting]) > 20 and np.median(moved[acting]) > 20
    still = np.median(frames, axis=0)
    changed = (np.abs(frames - still).max(axis=3) > 60).mean(axis=(1, 2))
    assert 0 < changed.max() < 0.2


def test_folds_hold_each_video_once_for_validation(tmp_path: Path, few: None) -> None:
    form = labels_of("rooms", rooms.scripts(9, 4, 0))
    (tmp_path / "a.json").write_text(json.dumps(form))
    data = sets.open_set("ceiling", tmp_path / "sets", tmp_path / "a.json", tmp_path)
    kept = [
        {name for name, video in _videos(fold.annotations).items() if video["subset"] == "validation"}
        for fold in data.folds
    ]
    assert sorted(name for fold in kept for name in fold) == sorted(form["database"])
    apart = _videos(sets.development(data.folds[0], tmp_path).annotations)
    assert not kept[0] & set(apart) and {video["subset"] for video in apart.values()} == {
        "training", "validation",
    }  # fmt: skip
    with pytest.raises(InputError, match="--annotations and --videos"):
        sets.open_set("ceiling", tmp_path, None, None)


def test_background_is_what_lies_between_the_actions_of_training_videos(tmp_path: Path) -> None:
    form = labels_of("rooms", rooms.scripts(2, 1, 0))
    (tmp_path / "a.json").write_text(json.dumps(form))
    found = json.loads(
        sets.with_background(sets.Labelled(tmp_path / "a.json", tmp_path), tmp_path).annotations.read_text()
    )
    for name, video in found["database"].items():
        rests = [one["segment"] for one in video["annotations"] if one["label"] == sets.BACKGROUND]
        actions = [one["segment"] for one in form["database"][name]["annotations"]]
        if video["subset"] == "validation":
            assert not rests
            continue
        covered = sorted([*rests, *actions])
        assert covered[0][0] == 0 and covered[-1][1] == video["duration"]
        assert all(abs(b[0] - a[1]) < 1e-9 for a, b in pairwise(covered))


def test_rows_share_encoders_and_are_not_trained_twice(
    tmp_path: Path, few: None, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = ["--rows", "ACP,long C", "--seeds", "1", "--work", str(tmp_path), "--results", str(tmp_path / "rows.jsonl")]
    assert gain.main([*asked, "--", *TINY]) == 0
    frozen, joint = read_rows(tmp_path / "rows.jsonl")
    assert (frozen["arm"], joint["arm"]) == ("ACP", "long C")
    assert frozen["seconds"]["source"] == joint["seconds"]["source"] > 0
    assert set(frozen["seconds"]) == {"source", "head"} and frozen["peak"] is None
    assert joint["seconds"]["joint"] > 0 and joint["peak"] <= joint["budget"] and joint["violations"] == 0
    assert "2 rows appended" in capsys.readouterr().out
    (source,) = tmp_path.glob("rooms/source/seed0/config.json")  # as long as its own set asks for, whatever the flags
    assert json.loads(source.read_text())["pretrain"]["epochs"] == demo_preset().pretrain.epochs
    assert gain.main([*asked, "--", *TINY]) == 0
    assert "0 rows appended" in capsys.readouterr().out
    (cost,) = tmp_path.glob("rooms/fold0/seed0/ACP/detector/cost.json")
    asked[1] = "ACP"
    assert gain.main([*asked, "--", *TINY, "--head-lr", "0.01"]) == 0  # the same places, but not the same trainings
    assert "1 rows appended" in capsys.readouterr().out and "0.01" in json.loads(cost.read_text())["words"]
    drawn = gain.figure(_as_results(tmp_path))
    assert drawn is not None and "long C" in drawn


def test_every_row_can_be_asked_for_by_name() -> None:
    every = [*arms.all_arms(["2GB", "3GB"]), *(arm.name for arm in arms.frontier({"4": [6]}))]
    assert not [name for name in every if "," in name]


def test_joint_stages_of_equal_time_have_a_table_and_a_line_for_each_time(tmp_path: Path) -> None:
    joint = {"long C": 70.0} | {f"{arms.FRONTIER} cut 4 for {count} epochs": 12.0 * count for count in (6, 12)}
    joint |= {f"{arms.FRONTIER} cut 1 for {count} epochs": 50.0 * count for count in (1, 3)}
    names = {arm.name: arm for arm in arms.frontier({"1": [1, 3], "4": [6, 12]})}
    rows = [
        {"bench": "gain", "measured": "row", "data": "demo", "version": "1", "fold": 0, "seed": 0, "arm": name,
         "flags": [*names[name].joint] if name in names else [], "settings": [], "average_map": 0.5,
         "map_by_tiou": {"0.5": 0.5}, "seconds": {"pretrain": 9.0, "joint": spent, "head": 9.0}, "peak": 10**9,
         "device": "CPU, 2 cores", "machine": "a machine", "date": "2026-01-01T00:00:00+00:00", "commit": "0" * 40,
         "dirty": False}
        for name, spent in joint.items()
    ]  # fmt: skip
    (here,) = gain.compared(rows).values()
    assert {times: [one.name for one in points] for times, points in gain.equal_times(here).items()} == {
        1: ["frontier cut 1 for 1 epochs", "frontier cut 4 for 6 epochs"],
        2: ["frontier cut 1 for 3 epochs", "frontier cut 4 for 12 epochs"],
    }
    main, equal, _ = gain.table(rows)
    assert [cells[0] for cells in main.lines] == ["long C"]
    assert [cells[:3] for cells in equal.lines] == [
        ("1/1 of full", "1", "50"), ("1/4 of full", "6", "72"),
        ("1/1 of full", "3", "150"), ("1/4 of full", "12", "144"),
    ]  # fmt: skip
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    drawn = gain.figure(_as_results(tmp_path))
    assert drawn is not None and "61 CPU seconds" in drawn and "147 CPU seconds" in drawn


@pytest.mark.parametrize("kind", list(partial_encoders.KINDS))
def test_peers_have_some_of_the_gradients(kind: str) -> None:
    torch.manual_seed(0)
    network = partial_encoders.KINDS[kind]("tsm_r18", 8)
    network.freeze_batchnorm()
    network.train()
    frames = torch.randint(0, 256, (80, 32, 32, 3), dtype=torch.uint8)
    features = network.encode(frames, 8)
    with torch.no_grad():
        assert torch.allclose(features, network.encode(frames, 8), atol=1e-5)
    features.retain_grad()
    features.square().sum().backward()
    early = [network.conv1, network.layer1, network.layer2]
    of_early = [parameter.grad is not None for part in early for parameter in part.parameters()]
    assert not any(of_early) if kind == "partly frozen" else any(of_early)
    assert network.layer4[1].conv2.weight.grad is not None


def test_sampled_gradients_are_those_of_the_chosen_snippets(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    network = partial_encoders.Sampled("tsm_r18", 8).double()
    network.freeze_batchnorm()
    frames = torch.randint(0, 256, (80, 32, 32, 3), dtype=torch.uint8)
    monkeypatch.setattr(torch, "randperm", lambda count: torch.tensor([7, 2, 4, *range(20, 27)])[:count])
    network.encode(frames, 8).sum().backward()
    found = network.conv1.weight.grad
    network.zero_grad()
    chosen = frames.unflatten(0, (-1, 8))[[2, 4, 7]].flatten(0, 1)
    network(chosen, 8).sum().backward()
    assert found is not None and torch.allclose(found, network.conv1.weight.grad, rtol=1e-9)


def _as_results(folder: Path) -> Path:
    (folder / "results").mkdir()
    (folder / "results" / "gain.jsonl").write_bytes((folder / "rows.jsonl").read_bytes())
    return folder / "results"


def test_intervals_are_students_and_pairs_are_of_the_same_seed() -> None:
    values = [10.0, 12.0, 17.0]
    assert gain.interval(values) == pytest.approx(4.30 * stdev(values) / 3**0.5)
    assert gain.interval([1.0]) is None

    def row(arm: str, seed: int, value: float) -> dict[str, object]:
        return {
            "measured": "row", "data": "rooms", "version": "1", "fold": 0, "seed": seed, "arm": arm, "flags": [],
            "settings": [],
            "average_map": value, "map_by_tiou": {}, "peak": None, "seconds": {"head": 1.0}, "device": "CPU, 1 thread",
        }  # fmt: skip

    rows = [row("ACP+", 0, 0.2), row("ACP+", 1, 0.4), row("long C", 1, 0.5), row("long C", 0, 0.35)]
    smaller = ["--fidelity", "8x32"]
    others = [
        row("ACP+", 0, 0.9) | {"version": "2"},
        row("ACP+", 0, 0.1) | dict.fromkeys(("flags", "settings"), smaller),
    ]
    found = gain.compared([*rows, *others])
    assert list(found) == [("rooms", "1", ""), ("rooms", "2", ""), ("rooms", "1", "--fidelity 8x32")]
    assert [part[0].maps for part in found.values()][1:] == [[90.0], [10.0]]
    (reference, long) = found["rooms", "1", ""]
    assert reference.pairs == (0.0, 0.0)
    assert long.name == "long C" and fmean(long.pairs) == pytest.approx(12.5)


def test_a_search_tries_as_much_for_every_row() -> None:
    counts = {len(list(gain.searched(arm))) for arm in arms.all_arms(["1GB"]).values()}
    assert counts == {6}


def test_mistakes_are_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="--rows nonsense"):
        gain.main(["--rows", "nonsense", "--work", str(tmp_path)])
    with pytest.raises(InputError, match="--seeds"):
        gain.main(["--seeds", "0"])

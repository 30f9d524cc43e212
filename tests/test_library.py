"""lofi_fast as a library: the same words, sentences and results as its commands, the memory budget kept to as well.

Trainings run in processes of their own, as scripts of a user would.
"""

from __future__ import annotations

import inspect
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from patience import PATIENCE

import lofi_fast
from lofi_fast.command import SPINS
from lofi_fast.config import Config, StageConfig
from lofi_fast.data import demo
from lofi_fast.errors import InputError
from lofi_fast.memory import settle
from lofi_fast.presets import PRESETS
from lofi_fast.train import flags_of, main, read_flags

ROOT = Path(__file__).resolve().parents[1]
THREADS = min(2, os.cpu_count() or 1)
TINY: dict[str, Any] = {
    "preset": "demo", "fidelity": "8x32", "width": 8, "batch": 2, "min_cut": 1, "pretrain_epochs": 1,
    "joint_epochs": 2, "head_epochs": 2, "device": "cpu", "threads": THREADS, "mem_budget": "4GB",
}  # fmt: skip
# Large enough for memory to depend on the rung.
LARGER = TINY | {"fidelity": "16x96", "width": 32, "batch": 4, "stages": "joint", "joint_epochs": 1}

SCRIPT = """
import json, sys
import lofi_fast
assert "torch" not in sys.modules, "importing the package imports torch"
result = lofi_fast.train(**json.loads(sys.argv[1]))
from lofi_fast.memory import allocator
print("result", json.dumps([
    str(result.run), None if result.metrics is None else result.metrics.average, allocator.installed()
]))
"""


@dataclass(frozen=True)
class Videos:
    annotations: Path
    videos: Path
    cache: Path

    def words(self, out: Path) -> dict[str, str]:
        return {
            "annotations": str(self.annotations), "videos": str(self.videos), "cache": str(self.cache), "out": str(out),
        }  # fmt: skip


@pytest.fixture(scope="session")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Videos:
    folder = tmp_path_factory.mktemp("library")
    annotations, videos = demo.generate(folder, num_training=4, num_validation=2, seed=1)
    return Videos(annotations, videos, folder / "cache")


def script(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))}
    return subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, env=environment, timeout=PATIENCE
    )


def trained(words: dict[str, Any]) -> list[Any]:
    """[run folder, average mAP, whether the CPU allocator is in place] of a training by a script."""
    done = script(SCRIPT, json.dumps(words))
    assert (done.returncode, done.stderr) == (0, ""), done.stdout + done.stderr
    found: list[Any] = json.loads(done.stdout.rpartition("result ")[2])
    return found


def steps(folder: Path) -> list[dict[str, Any]]:
    events = map(json.loads, (folder / "log.jsonl").read_text().splitlines())
    return [event for event in events if event["event"] == "step" and event["stage"] == "joint"]


def test_a_script_trains_what_the_command_trains(videos: Videos, tmp_path: Path) -> None:
    whole = trained({**TINY, **videos.words(tmp_path / "script"), "head": {"dropout": 0.25}})
    assert whole[0] == str(tmp_path / "script")
    words = {**TINY, **videos.words(tmp_path / "command"), "head.dropout": 0.25}
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in words.items()]
    done = script("import sys; from lofi_fast.__main__ import main; sys.exit(main(sys.argv[1:]))", "train", *flags)
    assert (done.returncode, done.stderr) == (0, ""), done.stdout + done.stderr
    for name in ("predictions.json", "metrics.json"):
        assert (tmp_path / "script" / name).read_bytes() == (tmp_path / "command" / name).read_bytes()
    assert whole[1] == json.loads((tmp_path / "script" / "metrics.json").read_text())["average_map"]
    assert (tmp_path / "script" / "report.html").exists()
    start = json.loads((tmp_path / "script" / "log.jsonl").read_text().splitlines()[0])
    assert read_flags(start["argv"])[0] == Config.read(tmp_path / "script" / "config.json"), "the log says how"


def test_the_budget_binds_and_the_cap_holds_in_a_script(videos: Videos, tmp_path: Path) -> None:
    one_way = {**LARGER, "micro_batch": 4, "recompute": "never"}  # to run each rung, so that the rung has to fall
    _, average, capped = trained({**one_way, **videos.words(tmp_path / "unbound")})
    assert average is None, "nothing was evaluated"
    if not capped:
        pytest.skip("the CPU allocator is not built: there is no cap to hold")
    plans = json.loads((tmp_path / "unbound" / "plan.json").read_text())["plans"]["joint"]
    kept = [[row["predicted"] for row in plan["ladder"] if not row["plan"][3]] for plan in plans.values()]
    budget = (max(ladder[-1] for ladder in kept) + min(ladder[0] for ladder in kept)) // 2
    own_readings = {"cache": str(tmp_path / "cache")}  # those of the run without a bound would plan it without a trial
    words = {**one_way, **videos.words(tmp_path / "bound"), **own_readings, "mem_budget": str(budget)}
    assert trained(words)[2]
    taken = steps(tmp_path / "bound")
    assert taken and all(step["peak"] <= step["budget"] == budget for step in taken)
    assert all((step["num_snippets"], step["side"]) != (16, 96) for step in taken), "full fidelity would not fit"


def test_networks_of_ones_own_are_trained(videos: Videos, tmp_path: Path) -> None:
    code = """
import json, sys
import lofi_fast
from lofi_fast.run.networks import Networks
made = []
def encoder(config):
    made.append("encoder")
    return Networks().encoder(config)
def head(config, num_features, num_classes):
    made.append(("head", num_features, num_classes))
    return Networks().head(config, num_features, num_classes)
lofi_fast.train(encoder=encoder, head=head, **json.loads(sys.argv[1]))
assert made[0] == "encoder" and ("head", 64, 6) in made, made
"""
    words = {**TINY, **videos.words(tmp_path / "run"), "stages": "joint", "joint_epochs": 1}
    done = script(code, json.dumps(words))
    assert (done.returncode, done.stderr) == (0, ""), done.stdout + done.stderr
    assert len(steps(tmp_path / "run")) == 2


@pytest.mark.parametrize(
    ("keywords", "flags"),
    [
        ({"mem_budget": "11 apples"}, ["--mem-budget", "11 apples"]),
        ({"width": "wide"}, ["--width", "wide"]),
        ({"joint": {"lr": float("nan")}}, ["--joint-lr", "nan"]),
        ({"head_epochs": -1}, ["--head-epochs", "-1"]),
        ({"videos": "v"}, ["--videos", "v"]),
        ({"preset": "enormous"}, ["--preset", "enormous"]),
        ({"min_cut": 8, "max_cut": 4}, ["--min-cut", "8", "--max-cut", "4"]),
        ({"config": "none.toml"}, ["--config", "none.toml"]),
        ({"encoder_weights": "/nowhere/w.pt"}, ["--encoder-weights", "/nowhere/w.pt"]),
        ({"resume": True, "out": "/nowhere/run"}, ["--resume", "--out", "/nowhere/run"]),
    ],
    ids=lambda value: " ".join(map(str, value)) if isinstance(value, list) else "",
)
def test_what_cannot_be_is_refused_with_the_commands_sentence(
    keywords: dict[str, Any], flags: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    # What these keywords reach is refused before anything is allocated; this process is to stay as it is.
    monkeypatch.setattr("lofi_fast.memory.settle.settle_here", lambda: [])
    with pytest.raises(InputError) as refused:
        lofi_fast.train(**keywords)
    assert main(flags) == 2
    assert capsys.readouterr().err == f"error: {refused.value}\n"


def test_a_misspelt_keyword_is_told_its_neighbour() -> None:
    with pytest.raises(InputError, match='"mem_budgte" is no setting; perhaps you meant "mem_budget"'):
        lofi_fast.train(mem_budgte="11GB")
    with pytest.raises(InputError, match=r'"joint\.learning_rate" is no setting'):
        lofi_fast.plan(mem_budget="11GB", joint={"learning_rate": 3})


def test_plan_is_what_the_command_prints(capsys: pytest.CaptureFixture[str]) -> None:
    forecast = lofi_fast.plan(mem_budget="11GB", encoder="tsm_r50", card="2080ti")
    assert lofi_fast.plan.main(["--mem-budget", "11GB", "--encoder", "tsm_r50", "--card", "2080ti", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == json.loads(json.dumps(forecast.to_json()))


def test_plan_takes_a_whole_config_and_changes_to_it() -> None:
    thumos = PRESETS["thumos"]()
    stage = StageConfig(epochs=1, batch=4, optimizer="sgd", lr=0.1)
    forecast = lofi_fast.plan(config=thumos, mem_budget="8GB", joint=stage, fidelity="128x112")
    assert (forecast.config.joint, forecast.config.head) == (stage, thumos.head)
    assert str(forecast.config.full) == "128 snippets x 112 px"
    with pytest.raises(InputError, match="--preset demo"):
        lofi_fast.plan(config=thumos, mem_budget="8GB", preset="demo")


def test_evaluate_is_the_evaluator(tmp_path: Path) -> None:
    segment = {"segment": [1.0, 2.0], "label": "run"}
    truth, found = tmp_path / "truth.json", tmp_path / "found.json"
    truth.write_text(json.dumps({"database": {"v": {"subset": "validation", "annotations": [segment]}}}))
    found.write_text(json.dumps({"results": {"v": [segment | {"score": 1.0}]}}))
    assert lofi_fast.evaluate(truth, str(found), tiou="thumos").average == 1.0
    with pytest.raises(InputError, match="--tiou"):
        lofi_fast.evaluate(truth, found, tiou="high")


def test_flags_of_keywords_say_the_same() -> None:
    config, resume = read_flags(flags_of({"joint.lr": 0.5, "data.flip": False, "head.sample_zero_iou": False}, True))
    assert (config.joint.lr, config.data.flip, config.head.sample_zero_iou, resume) == (0.5, False, False, True)


def test_the_public_names_are_there_and_documented() -> None:
    for name in lofi_fast.__all__:
        assert inspect.getdoc(getattr(lofi_fast, name)), name
    assert set(lofi_fast.__all__) <= set(dir(lofi_fast))
    assert not hasattr(lofi_fast, "nothing_of_that_name")


@pytest.mark.parametrize("first", ["import lofi_fast.train", "from lofi_fast import train", "import lofi_fast"])
def test_a_module_and_its_function_share_their_name_in_whatever_order_they_come(first: str) -> None:
    code = f"{first}\nimport lofi_fast\nassert callable(lofi_fast.train) and callable(lofi_fast.train.main)"
    done = script(code)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("in_use", [False, True])
def test_a_gpu_is_settled_before_its_first_use_or_a_note_says_that_it_is_too_late(
    in_use: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_to: list[str] = []
    monkeypatch.delenv("PYTORCH_ALLOC_CONF", raising=False)
    monkeypatch.delenv("PYTORCH_CUDA_ALLOC_CONF", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: in_use)
    monkeypatch.setattr(torch.cuda.memory, "_set_allocator_settings", set_to.append)
    monkeypatch.setattr(settle, "settle_glibc", lambda: None)  # this process is to stay as it is
    monkeypatch.setattr(settle.allocator, "install", lambda: "it is not built")
    gpu, cpu = ["the GPU was in use"] * in_use, ["no hard cap on CPU memory: it is not built"]
    notes = settle.settle_here()
    assert [note.startswith(begin) for note, begin in zip(notes, gpu + cpu, strict=True)] == [True] * len(notes)
    assert set_to == ([] if in_use else ["expandable_segments:True"])


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="other systems have another OpenMP")
@pytest.mark.parametrize(("given", "spins"), [
    ({}, str(SPINS)), ({"GOMP_SPINCOUNT": "77"}, "77"), ({"OMP_WAIT_POLICY": "PASSIVE"}, "0"),
])  # fmt: skip
def test_threads_that_wait_sleep_soon_unless_the_user_says_otherwise(given: dict[str, str], spins: str) -> None:
    program = "from lofi_fast.command import run; run(lambda: __import__('torch') and 0)"
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("GOMP_", "OMP_"))}
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment | {"OMP_DISPLAY_ENV": "verbose"} | given, cwd=ROOT,
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0 and f"GOMP_SPINCOUNT = '{spins}'" in done.stderr, done.stderr

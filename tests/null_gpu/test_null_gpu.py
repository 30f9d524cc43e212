"""What a null GPU shows of the CUDA path: see conftest.py. Each test is some seconds, on one core."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from conftest import Machine, Row

OPERATIONS = 5_000  # that a step may ask the device for, by the planner's own choice of chunk
WAITS = 13  # of the host for the device in a step: its losses, its gradients' norm, its frames, its meter
REQUESTED = 0.01  # that a step's tensors may differ from the ledger
RESERVED, PLAIN = 0.03, 0.12  # beyond the ledger, at most; in expandable segments, and in plain ones
FRAGMENTED = 0.18  # the same where graphs are large, whose tensors leave gaps that the next ones do not fit
PIECES = 5 * (20 << 20)  # bytes that may be reserved beyond the ledger in any case, in expandable segments
LARGE = 1e9  # bytes of a step from which what is reserved is compared

# What the planner chooses among when memory is plenty.
FULL: dict[str, Any] = {"batch": 1, "cut": 1, "pattern": "spatio_temporal", "budget": 11e9}
QUARTER: dict[str, Any] = {"batch": 16, "cut": 4, "max_cut": 4, "pattern": "spatio_temporal", "budget": 24e9}


@pytest.mark.parametrize("setting", [QUARTER, FULL], ids=["16 x (50, 158)", "1 x (100, 224)"])
def test_a_step_is_few_operations_and_the_host_seldom_waits(
    machine: Machine, row: Row, setting: dict[str, Any]
) -> None:
    found = machine("chosen", total=25e9, **setting)
    for step in found["steps"]:
        row(f"{step['plan']}", **numbers(step), seconds=found["seconds"])
    chosen, plain = found["steps"]
    assert chosen["operations"] <= OPERATIONS < plain["operations"]
    assert max(chosen["synchronizations"], plain["synchronizations"]) <= WAITS
    assert chosen["reserved"] / chosen["ledger"] - 1 <= FRAGMENTED


def test_a_call_that_is_recorded_passes_the_dispatcher_by_unless_something_watches(machine: Machine) -> None:
    found = machine("recorded")
    assert found["nodes"] == ["residual_shiftBackward"] * 2
    assert found["watched"] == ["residual_shift.default", "residual_shift_backward.default"]
    assert not found["alone"]
    assert "cannot be differentiated again" in found["said"]
    assert found["compiled"]
    assert found["shift"] == [False, True]
    assert found["unshifted"]


def rung(snippets: int, side: int, micro_batch: int, **levers: Any) -> dict[str, Any]:
    return {"rung": [snippets, side], "micro_batch": micro_batch, **levers}


WHOLE, QUARTERED, SMALL = rung(100, 224, 1), rung(50, 158, 4), rung(50, 158, 2, recompute=True)
LEDGERS: dict[str, dict[str, Any]] = {
    "tsm_r18": {"batch": 4, "plans": [WHOLE, QUARTERED, rung(50, 158, 2), SMALL, rung(50, 158, 4, chunk=32)]},
    "tsm_r34": {"batch": 4, "encoder": "tsm_r34", "plans": [WHOLE, QUARTERED, SMALL]},
    "tsm_r50": {"batch": 4, "encoder": "tsm_r50", "plans": [WHOLE, QUARTERED, SMALL]},
    "tsm_r18, 8 bits": {"batch": 4, "eight_bit": True, "plans": [WHOLE, QUARTERED, SMALL]},
    "tsm_r50, 8 bits": {"batch": 4, "encoder": "tsm_r50", "eight_bit": True, "plans": [WHOLE, SMALL]},
    "thumos": {"preset": "thumos", "batch": 4, "plans": [rung(256, 96, 4), rung(256, 96, 2, recompute=True)]},
}


@pytest.mark.parametrize("expandable", [True, False], ids=["expandable segments", "plain segments"])
@pytest.mark.parametrize("network", LEDGERS)
def test_the_ledger_is_what_the_allocator_allocates(machine: Machine, row: Row, network: str, expandable: bool) -> None:
    found = machine("steps", expandable=expandable, **LEDGERS[network])
    for plan, step in zip(LEDGERS[network]["plans"], found["steps"], strict=True):
        row(f"{network}: {step['plan']}", **numbers(step), segments="" if expandable else "plain")
        assert abs(step["requested"] / step["ledger"] - 1) <= REQUESTED, step
        if step["ledger"] >= LARGE:
            share = FRAGMENTED if "chunk" in plan else RESERVED if expandable else PLAIN
            assert step["reserved"] - step["ledger"] <= max(share * step["ledger"], PIECES if expandable else 0), step


@pytest.mark.parametrize(
    ("capability", "dtype"),
    [("75", "float16"), ("86", "bfloat16"), ("86", "float16"), ("90", "bfloat16"), ("90", "float16")],
)
def test_no_type_or_device_is_mixed_up_in_a_joint_step(machine: Machine, row: Row, capability: str, dtype: str) -> None:
    plans = [rung(8, 64, 2), rung(8, 64, 1, recompute=True, chunk=3)]
    found = machine("steps", capability=capability, dtype=dtype, batch=2, plans=plans)
    assert found["precision"] == f"torch.{dtype}"
    for step in found["steps"]:
        assert step["parts"]["triton_launches"] > 0 and step["parts"]["convolutions"] > 0
    row(f"{dtype}, capability {capability}: {found['steps'][0]['plan']}", **numbers(found["steps"][0]))


PLACES = ("decode", "encoder", "loss", "backward", "update", "cudnn, near the cap")


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("capability", ["86", "75"], ids=["bf16", "fp16"])
def test_memory_that_runs_out_costs_a_rung_and_no_sample(
    machine: Machine, row: Row, place: str, capability: str
) -> None:
    found = machine("shortages", capability=capability, total=25e9, place=place, batch=4, budget=12e9)
    assert found["struck"] and [step["retries"] for step in found["steps"]] == [0, 1]
    assert [step["updates"] for step in found["steps"]] == [1, 2], "one update a step, and none of a step that failed"
    assert all(step["videos"] == step["wanted"] for step in found["steps"])
    ((plan, lower),) = found["plans"]
    assert plan != lower and found["lower"] < found["predicted"]
    assert found["left"] <= 0, "tensors of the step that failed"
    (reason,) = found["reasons"]
    assert ("GET was unable" if place.startswith("cudnn") else "CUDA out of memory") in reason
    row(f"out of memory in {place}, capability {capability}", survived="yes", seconds=found["seconds"])


def test_a_library_that_fails_far_from_the_cap_is_not_short_of_memory(machine: Machine) -> None:
    said = machine("shortages", status=1, total=25e9, place="cudnn, far from it", batch=4, budget=12e9)["said"]
    assert said.rstrip().endswith("RuntimeError: GET was unable to find an engine to execute this computation")


def test_a_budget_is_kept_beside_a_neighbour_that_takes_and_frees(machine: Machine, row: Row) -> None:
    found = machine("neighbour", total=16e9, batch=2, budget=11e9, count=1000, others=[2e9, 11e9])
    assert found["steps"] == 1000 and found["turns"] > 100
    assert {name: found[name] for name in ("violations", "over", "lost")} == {"violations": 0, "over": 0, "lost": 0}
    assert found["short"] > 200 and found["rungs"] > 1, "the neighbour was never felt"
    row("1,000 steps beside a neighbour", violations=0, retries=found["retries"], seconds=found["seconds"])


@pytest.mark.parametrize("expandable", [True, False], ids=["expandable segments", "plain segments"])
def test_what_torch_could_not_be_given_whole_is_the_cards_again(machine: Machine, expandable: bool) -> None:
    found = machine("refused", expandable=expandable, total=16e9, free=200e6)
    assert found["after"] == found["before"]


def test_memory_outside_torch_is_ours_in_every_process(machine: Machine, row: Row, tmp_path: Path) -> None:
    setting = {"total": 24e9, "batch": 4, "budget": 11e9}
    fresh = machine("foreign", folder=str(tmp_path), **setting)
    resumed = machine("foreign", folder=str(tmp_path), resume=True, **setting)
    replayed = machine("foreign", replay=str(tmp_path / "run" / "log.jsonl"), **setting)
    for how, found in {"fresh": fresh, "resumed": resumed, "replayed": replayed}.items():
        assert found["own"] == pytest.approx(found["held"], rel=0.02), how
        row(f"300 MB outside torch, {how}", error=f"{found['own'] / found['held'] - 1:+.2%}", seconds=found["seconds"])
    assert resumed["settled before"] == replayed["settled before"] == ["context", "the frame pipeline"]


JOB = """
    --preset demo --fidelity 8x32 --width 8 --window 8 --batch 2 --min-cut 1 --pretrain-epochs 1 --joint-epochs 1
    --head-epochs 1 --mem-budget 4GB --device cuda
"""


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("videos")


@pytest.mark.parametrize("capability", ["75", "86", "90"])
def test_the_whole_job_runs_and_detects(
    machine: Machine, row: Row, videos: Path, tmp_path: Path, capability: str
) -> None:
    made = machine("demo", where=str(videos))
    out = tmp_path / "trained"
    data = ["--annotations", made["annotations"], "--videos", made["videos"], "--cache", str(videos / "cache")]
    flags = [*JOB.split(), *data, "--out", str(out)]
    video = sorted(Path(made["videos"]).iterdir())[-1]
    found = machine("job", capability=capability, total=16e9, flags=flags, out=str(out), video=str(video))
    assert found["stages"] == ["head", "joint", "pretrain"] and found["metrics"] and found["features"] > 0
    precision = "float16" if capability == "75" else "bfloat16"
    assert precision in (out / "environment.json").read_text()
    row(f"the whole job, {precision}, capability {capability}", seconds=found["seconds"])


def numbers(step: dict[str, Any]) -> dict[str, Any]:
    """The columns of a step."""
    return {
        "operations": step["operations"],
        "waits": step["synchronizations"],
        "ledger MB": round(step["ledger"] / 1e6),
        "tensors": f"{step['requested'] / step['ledger'] - 1:+.2%}",
        "reserved": f"{step['reserved'] / step['ledger'] - 1:+.2%}",
    }

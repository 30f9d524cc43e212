"""Networks of one's own: an encoder and a head in a file each, without ledgers, trained within a budget that binds."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from patience import PATIENCE
from toy_encoder import ToyEncoder
from toy_head import ToyHead

from lofi_fast import encoder as encoders
from lofi_fast import head as heads
from lofi_fast.data import demo
from lofi_fast.encoder.protocol import Encoder
from lofi_fast.fidelity import Fidelity, Pattern, offered
from lofi_fast.head.protocol import Head
from lofi_fast.presets import demo as demo_preset
from lofi_fast.run.networks import Networks

ROOT = Path(__file__).resolve().parents[1]
SETTINGS = [
    *("--preset", "demo", "--fidelity", "16x64", "--batch", "4", "--min-cut", "1", "--stages", "joint,head,eval"),
    *("--micro-batch", "4", "--recompute", "never"),  # one way to run each rung
    *("--joint-epochs", "3", "--head-epochs", "2", "--device", "cpu", "--threads", "1"),
]
TRAINING = """
import sys

import lofi_fast
from toy_encoder import make_encoder
from toy_head import make_head

from lofi_fast.train import read_flags

config, resume = read_flags(sys.argv[1:], cuda=lambda: False)
lofi_fast.train(config=config, resume=resume, encoder=make_encoder, head=make_head)
"""


def test_the_first_networks_are_an_encoder_and_a_head() -> None:
    config = demo_preset()
    encoder = encoders.build(config)
    head = heads.build(config, encoder.num_features, 6)
    assert isinstance(encoder, Encoder) and isinstance(head, Head)
    assert Networks().named and not Networks(head=lambda *_: head).named


def test_what_says_what_an_encoder_and_a_head_are_imports_no_torch() -> None:
    code = "import sys, lofi_fast.encoder, lofi_fast.head; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


@pytest.mark.parametrize(("chunk", "recompute"), [(None, True), (1, False), (2, True), (9, False)])
def test_the_levers_that_every_encoder_has_change_neither_features_nor_gradients(
    chunk: int | None, recompute: bool
) -> None:
    torch.manual_seed(0)
    encoder = ToyEncoder()
    encoder.freeze_batchnorm()
    encoder.train()
    frames = torch.randint(0, 256, (5 * 8, 24, 20, 3), dtype=torch.uint8)

    def run(**levers: Any) -> tuple[torch.Tensor, list[torch.Tensor]]:
        features = encoder.encode(frames, 8, **levers)
        learning = [p for p in encoder.parameters() if p.requires_grad]
        return features.detach(), list(torch.autograd.grad(features.square().sum(), learning))

    features, gradients = run()
    again, other = run(chunk=chunk, recompute=recompute)
    torch.testing.assert_close(again, features, rtol=1e-5, atol=1e-6)
    for grad, expected in zip(other, gradients, strict=True):
        torch.testing.assert_close(grad, expected, rtol=1e-4, atol=1e-5)
    assert not any(
        p.requires_grad for m in encoder.modules() if isinstance(m, torch.nn.BatchNorm2d) for p in m.parameters()
    )


def test_a_head_that_gives_a_part_of_the_protocol_cannot_be_made() -> None:
    class Half(Head):
        def forward(self, features_BCL: torch.Tensor) -> torch.Tensor:
            return features_BCL

    with pytest.raises(TypeError, match=r"abstract.*counts.*loss.*proposals.*targets"):
        Half()  # type: ignore[abstract]


def test_the_toy_heads_loss_of_parts_adds_up() -> None:
    torch.manual_seed(0)
    head, labels = ToyHead(8, 3), [torch.tensor([0, 3, 2, 1]), torch.tensor([3, 3, 0, 0]), torch.tensor([1, 1, 1, 2])]
    output = torch.randn(3, 4, 4)
    counts = head.counts(labels)
    whole = head.loss(output, labels, counts, 1.0)["snippets"]
    parts = [head.loss(output[k : k + 2], labels[k : k + 2], counts, 1.0)["snippets"] for k in (0, 2)]
    torch.testing.assert_close(sum(parts), whole)


def events(folder: Path, kind: str) -> list[dict[str, Any]]:
    lines = map(json.loads, (folder / "log.jsonl").read_text().splitlines())
    return [event for event in lines if event["event"] == kind]


def train(
    data: tuple[Path, Path], cache: Path, out: Path, budget: int, *flags: str
) -> subprocess.CompletedProcess[str]:
    places = ["--annotations", data[0], "--videos", data[1], "--cache", cache, "--out", out, "--mem-budget", budget]
    paths = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    return subprocess.run(
        [sys.executable, "-c", TRAINING, *SETTINGS, *map(str, places), *flags], cwd=ROOT, text=True,
        env=os.environ | {"PYTHONPATH": paths}, capture_output=True, timeout=PATIENCE,
    )  # fmt: skip


def test_networks_without_ledgers_are_planned_by_trial_and_kept_within_the_budget(tmp_path: Path) -> None:
    data = demo.generate(tmp_path, num_training=8, num_validation=2, seed=1)
    done = train(data, tmp_path / "cache", tmp_path / "free", 4 * 10**9)
    assert done.returncode == 0, done.stdout + done.stderr
    free = json.loads((tmp_path / "free" / "plan.json").read_text())["plans"]
    assert all(chosen["rung"] == [16, 64] for chosen in free["joint"].values())
    ladders = [
        [row["predicted"] for row in chosen["ladder"] if not row["plan"][3]] for chosen in free["joint"].values()
    ]
    low, high = max(of[-1] for of in ladders), min(of[0] for of in ladders)
    assert high > 1.15 * low, "memory depends on the rung"

    budget, out = (low + high) // 2, tmp_path / "bound"
    done = train(data, tmp_path / "other-cache", out, budget)
    assert done.returncode == 0, done.stdout + done.stderr
    steps = [step for step in events(out, "step") if step["stage"] == "joint"]
    assert len(steps) == 6 and {step["pattern"] for step in steps} == {"spatial", "temporal", "spatio_temporal"}
    for step in steps:
        assert step["peak"] <= budget and step["predicted"] <= step["room"]
        rung = Fidelity(step["num_snippets"], step["side"])
        assert rung in offered(Pattern(step["pattern"]), Fidelity(16, 64))[1:-1], (
            "neither the highest nor the last resort"
        )
        assert step["terms"].keys() == {"snippets"} and step["terms"]["snippets"] == step["loss"]
    assert {event["plan"] for event in events(out, "measured")} >= {"joint, ledger", "joint, spatial"}
    assert not events(out, "out_of_memory")
    metrics = json.loads((out / "metrics.json").read_text())
    assert 0 <= metrics["average_map"] <= 1 and metrics["videos"] == 2

    # A run that goes on plans with what was learned, and does not learn again.
    learned, known = json.loads((out / "plan.json").read_text())["plans"]["ledger"], len(events(out, "measured"))
    done = train(data, tmp_path / "other-cache", out, budget, "--stages", "head,eval", "--resume")
    assert done.returncode == 0, done.stdout + done.stderr
    assert json.loads((out / "plan.json").read_text())["plans"]["ledger"] == learned
    assert not [event for event in events(out, "measured")[known:] if event["plan"] == "joint, ledger"]

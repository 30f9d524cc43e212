"""The joint stage on frames that are made up on their device: the stage as it is, without videos or decoders.

A process of its own, started by `bench.commands.gpu_planner`; `bench.commands.tuners` takes single steps of such a run.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args

import numpy as np
import torch
from torch import Tensor

from lofi_fast import encoder as encoders
from lofi_fast.budget import Budget, gigabytes
from lofi_fast.config import Config, EncoderName, HeadName, PresetName, parse_trained
from lofi_fast.data.dataset import Dataset, Sample
from lofi_fast.data.pipeline import FramePipeline
from lofi_fast.data.windows import Window
from lofi_fast.errors import InputError
from lofi_fast.fidelity import FRAMES_PER_SNIPPET, Fidelity
from lofi_fast.memory.meter import Meter
from lofi_fast.memory.settle import open_meter, settle_allocator
from lofi_fast.precision import choose_device, choose_precision
from lofi_fast.presets import preset
from lofi_fast.run.log import RunLog
from lofi_fast.run.state import Machine, Run
from lofi_fast.stages.joint import joint, plan_joint

BATCHES = 2  # of an epoch
SECONDS = 120.0  # that each made-up video is said to last
TRAINING = "training"  # said when the plans are made and the steps begin
RECIPES: dict[HeadName, PresetName] = {"bmn": "bmn_anet", "actionformer": "actionformer_anet"}  # of heads that have one


class NoisePipeline(FramePipeline):
    """The pipeline as it is, with noise for decoded frames."""

    def _build(self) -> Any:
        return None

    def _load(self, batch: Any, frames: Tensor, allocated: torch.cuda.Event | None) -> Tensor:
        if self._copy_stream is None:
            return frames.random_(0, 256)
        with torch.cuda.stream(self._copy_stream):
            if allocated is not None:
                self._copy_stream.wait_event(allocated)
            frames.random_(0, 256)
        self._copy_stream.synchronize()
        return frames


def synthetic_run(config: Config, device: torch.device, meter: Meter, log: RunLog) -> Run:
    """A run whose videos have labels and no frames. It writes its log, and no checkpoints."""
    assert config.budget.amount is not None
    torch.manual_seed(0)
    encoder = encoders.build(config)
    encoder.place(device)
    machine = Machine(device, choose_precision(device), meter, config.budget.amount)
    return Run(
        config, made_up(config), machine, NoisePipeline(1, device.type, num_threads=1), log, encoder, saves=False
    )


def train(run: Run, seconds: float) -> None:
    """Plan, then train until the time is up."""
    plan_joint(run)
    print(TRAINING, flush=True)
    until = time.monotonic() + seconds
    run.stop = lambda: time.monotonic() > until
    joint(run)


def made_up(config: Config) -> Dataset:
    """Videos of a few segments each, with as many classes as ActivityNet has."""
    rng = np.random.default_rng(0)
    length = config.full.num_snippets
    grid = np.arange(length * FRAMES_PER_SNIPPET, dtype=np.int64).reshape(length, FRAMES_PER_SNIPPET)
    # What a view is cut out of.
    frame: Any = SimpleNamespace(width=340, height=256, frames=grid.ravel(), path=Path("made up"))
    samples = []
    for index in range(BATCHES * config.joint.batch):
        starts = rng.uniform(0, 0.7 * SECONDS, 3)
        segments = np.stack([starts, starts + rng.uniform(0.05, 0.3, 3) * SECONDS], axis=1)
        labels = rng.integers(0, 200, 3)
        samples.append(Sample(index, Window(f"video {index}", 0.0, SECONDS), segments, labels, frame, grid))
    return Dataset(tuple(map(str, range(200))), {"training": tuple(samples)}, {}, (), ())


def setting(
    budget: int, out: Path, tiny: bool, encoder: EncoderName = "tsm_r18", trained: str = "all", head: HeadName = "gtad"
) -> Config:
    """ActivityNet's with these networks, or the demo's with fewer pixels; nothing is learned from noise, so the rate is
    low.
    """
    config = preset("demo" if tiny else RECIPES.get(head, "activitynet"), head)
    config = replace(config, encoder=replace(config.encoder, name=encoder, train=trained))
    if tiny:
        config = replace(
            config, full=Fidelity(8, 32), encoder=replace(config.encoder, width=8), data=replace(config.data, jitter=0)
        )
    joint_stage = replace(config.joint, epochs=10_000, lr=1e-5, schedule="step", batch=2 if tiny else 16)
    return replace(
        config, joint=joint_stage, stages=("joint",), min_cut=1.0, out=str(out),
        budget=Budget(gigabytes(budget), amount=budget),
    )  # fmt: skip


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.tools.synthetic", description=__doc__)
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--budget", type=int, required=True, metavar="BYTES")
    parser.add_argument("--seconds", type=float, required=True, help="of training")
    parser.add_argument("--out", type=Path, required=True, help="folder for log.jsonl")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--encoder", choices=get_args(EncoderName), default="tsm_r18")
    parser.add_argument("--encoder.train", dest="trained", type=parse_trained, default="all", help="what of it learns")
    parser.add_argument("--head", choices=get_args(HeadName), default="gtad")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    try:
        device = choose_device(args.device)
        args.out.mkdir(parents=True, exist_ok=True)
        with closing(RunLog(args.out / "log.jsonl")) as log:
            config = setting(args.budget, args.out, args.tiny, args.encoder, args.trained, args.head)
            train(synthetic_run(config, device, open_meter(device), log), args.seconds)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    settle_allocator("bench.tools.synthetic", sys.argv[1:])
    sys.exit(main(sys.argv[1:]))

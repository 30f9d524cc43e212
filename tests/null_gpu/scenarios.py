"""What is run on the null GPU, each in a process of its own: `python scenarios.py NAME ARGUMENTS`, the arguments as
JSON. The last line printed is what was found, as JSON.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import closing, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random
from threading import Event, Thread
from types import ModuleType
from typing import Any

import av
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from bench.tools import logs
from bench.tools.synthetic import NoisePipeline, made_up
from lofi_fast import encoder as encoders
from lofi_fast import kernels, model, train
from lofi_fast.budget import Budget, gigabytes
from lofi_fast.config import Config
from lofi_fast.data import demo
from lofi_fast.data.pipeline import FramePipeline
from lofi_fast.fidelity import CYCLE, Fidelity, Pattern
from lofi_fast.memory.decision import Decision
from lofi_fast.memory.governor import Governor
from lofi_fast.memory.gpu import GpuMeter
from lofi_fast.memory.plans import Plan
from lofi_fast.memory.settle import open_meter
from lofi_fast.precision import Precision, choose_precision
from lofi_fast.presets import activitynet, thumos
from lofi_fast.run import events, state
from lofi_fast.run.checkpoint import Position
from lofi_fast.run.log import RunLog
from lofi_fast.run.state import Machine, Run
from lofi_fast.stages.epochs import Outcome
from lofi_fast.stages.joint import Joint, ledger_of, plan_joint, set_modes

PRESETS = {"activitynet": activitynet, "thumos": thumos}
COUNTS = ("launches", "copies", "fills", "uploads", "downloads", "synchronizations", "convolutions", "products")
OPERATIONS = ("launches", "triton_launches", "copies", "fills", "convolutions", "products")  # that the device would do


class Card:
    """The null GPU of this process: what it counts, and what can be set."""

    def __init__(self) -> None:
        folder = os.environ["LD_LIBRARY_PATH"]
        self._runtime = ctypes.CDLL(f"{folder}/libcudart.so.13")
        self._driver = ctypes.CDLL(f"{folder}/libcuda.so.1")
        torch.ops.load_library(f"{folder}/operators.so")

    def __getitem__(self, name: str) -> int:
        return self._value(name).value

    def __setitem__(self, name: str, value: int) -> None:
        self._value(name).value = value

    def _value(self, name: str) -> ctypes.c_long:
        library = self._driver if name == "triton_launches" else self._runtime
        return ctypes.c_long.in_dll(library, f"null_{name}")

    def counts(self) -> dict[str, int]:
        return {name: self[name] for name in (*COUNTS, "triton_launches")}

    @property
    def held(self) -> int:
        """Bytes that this process really holds."""
        return self["torch"] + self["context"] + self["outside"]


@dataclass(frozen=True)
class Scene:
    """Where a scenario happens: the card, and the run folder with its log."""

    card: Card
    folder: Path
    log: RunLog

    def config(self, **settings: Any) -> Config:
        return replace(config_of(**settings), out=str(self.folder))


def operations(before: dict[str, int], after: dict[str, int]) -> int:
    return sum(after[name] - before[name] for name in OPERATIONS)


def config_of(
    preset: str = "activitynet", encoder: str = "tsm_r18", batch: int = 16, eight_bit: bool = False, cut: float = 1.0,
    pattern: str = "cyclic", budget: float = 70e9, jitter: bool = True, full: tuple[int, int] | None = None,
    max_cut: float = 16.0,
) -> Config:  # fmt: skip
    config = PRESETS[preset]()
    joint = replace(config.joint, batch=batch, epochs=10_000, lr=1e-5, schedule="step")
    return replace(
        config,
        encoder=replace(config.encoder, name=encoder),
        joint=joint,
        data=config.data if jitter else replace(config.data, jitter=0),
        full=config.full if full is None else Fidelity(*full),
        kept_maps="8bit" if eight_bit else "exact",
        pattern=Pattern(pattern),
        min_cut=cut,
        max_cut=max(cut, max_cut),
        stages=("joint",),
        budget=Budget(gigabytes(round(budget)), amount=round(budget)),
    )


def open_run(
    scene: Scene, config: Config, dtype: str | None = None, pipeline: type[FramePipeline] = NoisePipeline
) -> Run:
    """A run on frames that are made up; its networks are the config's."""
    device = torch.device("cuda")
    assert config.budget.amount is not None
    precision = choose_precision(device) if dtype is None else Precision(getattr(torch, dtype), "asked for")
    machine = Machine(device, precision, open_meter(device), config.budget.amount)
    torch.manual_seed(0)
    encoder = encoders.build(config)
    encoder.to(device).to(memory_format=torch.channels_last)
    with machine.meter.settle("the frame pipeline"):
        frames = pipeline(1, "cuda", num_threads=1)
    return Run(config, made_up(config), machine, frames, scene.log, encoder, saves=False)


class Fixed:
    """A planner that knows one plan."""

    def __init__(self, plan: Plan, limit: int) -> None:
        self._decision = Decision(CYCLE[0], 0, 0, plan, plan, 0, limit, limit, limit, "fixed")

    def choose(self, pattern: Pattern, epoch: int, step: int) -> Decision:
        return replace(self._decision, epoch=epoch, step=step)

    def recheck(self, decision: Decision) -> Decision:
        return decision

    def learn(self, decision: Decision, peak: int | None, seconds: float | None = None) -> None:
        pass

    def failed(self, decision: Decision) -> Decision:
        raise AssertionError(f"memory ran out at {decision.plan}")


def plan_of(
    rung: tuple[int, int], micro_batch: int, recompute: bool = False, chunk: int = 0
) -> Plan:  # fmt: skip
    return Plan(Fidelity(*rung), micro_batch, recompute, chunk)


def measured_step(card: Card, run: Run, plan: Plan) -> dict[str, Any]:
    """A step of the joint stage at a plan, after one that loads code, and while frames of the next are there:
    operations, waits of the host, and bytes beyond what is there between steps, by the ledger and by the allocator.
    """
    gc.collect()  # the stage of a plan before, with its frames
    run.planner = Fixed(plan, run.machine.budget)
    set_modes(run)
    stage = Joint(run)
    stage.begin(0, 1)
    stage.step(0, 1)
    stage.begin(0, 0)
    run.machine.meter.release()
    between, before, began = torch.cuda.memory_stats(), card.counts(), time.process_time()
    loss = stage.step(0, 0).loss
    seconds, after, stats = time.process_time() - began, card.counts(), torch.cuda.memory_stats()

    def beyond(what: str, of: str) -> int:
        return int(stats[f"{what}_bytes.all.peak"] - between[f"{of}_bytes.all.current"])

    return {
        "plan": str(plan),
        "loss": loss,
        "host": round(seconds, 2),
        "operations": operations(before, after),
        "parts": {name: after[name] - before[name] for name in after},
        "synchronizations": after["synchronizations"] - before["synchronizations"],
        "ledger": ledger_of(run, [])(plan),
        "requested": beyond("requested", "requested"),
        "reserved": beyond("reserved", "allocated"),
    }


def steps(scene: Scene, plans: list[dict[str, Any]], dtype: str | None = None, **settings: Any) -> Any:
    """Steps at plans, of one setting."""
    run = open_run(scene, scene.config(**settings), dtype)
    return {
        "steps": [measured_step(scene.card, run, plan_of(**plan)) for plan in plans],
        "precision": str(run.machine.precision.dtype),
    }


def chosen(scene: Scene, **settings: Any) -> Any:
    """The step that the planner chooses, and the same at the encoder's own chunk."""
    run = open_run(scene, scene.config(**settings))
    plan_joint(run)
    assert isinstance(run.planner, Governor)
    decision = run.planner.choose(run.config.pattern, 0, 0)
    return {
        "steps": [measured_step(scene.card, run, plan) for plan in (decision.plan, replace(decision.plan, chunk=0))]
    }


# Out of memory

PIECES = (256 << 20, 16 << 20, 1 << 20, 512)  # by which what the allocator has left is taken


class Shortage:
    """Memory that runs out at a stated moment, for torch's own allocator, and is back when the planner has noticed."""

    def __init__(self, card: Card) -> None:
        self._card, self._taken = card, []  # type: ignore[var-annotated]
        self.armed = False

    def strike(self) -> None:
        """From now on nothing can be allocated, if a shortage is due."""
        if not self.armed:
            return
        self.armed = False
        torch.cuda.empty_cache()
        self._card["refuse"] = 1
        for size in PIECES:
            with suppress(torch.OutOfMemoryError):
                while True:
                    self._taken.append(torch.empty(size, dtype=torch.uint8, device="cuda"))

    def end(self) -> None:
        self._taken.clear()
        self._card["refuse"] = 0


def shortages(scene: Scene, place: str, dtype: str | None = None, **settings: Any) -> Any:
    """Steps under a planner, in the second of which memory runs out in one place."""
    run = open_run(scene, scene.config(**settings), dtype)
    plan_joint(run)
    planner, meter = run.planner, run.machine.meter
    assert isinstance(planner, Governor)
    set_modes(run)
    stage = Joint(run)
    shortage = Shortage(scene.card)
    _place(run, stage.optimizer, shortage, place)
    left, tried = [], []
    failed, recheck = planner.failed, planner.recheck

    def noticed(decision: Decision) -> Decision:
        shortage.end()
        left.append(torch.cuda.memory_allocated() - run.pipeline.pending)
        lower = failed(decision)
        tried.append((planner.predict(decision.plan), planner.predict(lower.plan)))
        return lower

    def started(decision: Decision) -> Decision:
        meter.release()
        tried.append(torch.cuda.memory_allocated() - run.pipeline.pending)
        return recheck(decision)

    planner.failed, planner.recheck = noticed, started  # type: ignore[method-assign]
    stage.begin(0, 0)
    updates = [0]
    stage.optimizer.register_step_post_hook(lambda *_: updates.append(updates.pop() + 1))
    taken = []
    for step in range(2):
        shortage.armed = step == 1
        done = stage.step(0, step)
        taken.append(
            {
                "videos": list(done.videos),
                "wanted": [sample.window.video for sample in stage._order[step]],
                "retries": done.logged["retries"],
                "updates": updates[0],
            }
        )
    oom = [event for event in logs.read_log(scene.folder) if isinstance(event, events.OutOfMemory)]
    held, (predicted, lower) = tried[-2], tried[-1]
    return {
        "steps": taken, "reasons": [event.reason for event in oom], "plans": [[e.plan, e.next] for e in oom],
        "predicted": predicted, "lower": lower, "left": left[0] - held, "struck": not shortage.armed,
    }  # fmt: skip


def _place(run: Run, optimizer: torch.optim.Optimizer, shortage: Shortage, place: str) -> None:
    """Let the shortage strike in one place of a step."""
    encode, loss, submit = run.encoder.encode, run.head.loss, run.pipeline._submit

    def short_encode(*args: Any, **named: Any) -> Any:
        shortage.strike()
        return encode(*args, **named)

    def short_loss(*args: Any, **named: Any) -> Any:
        shortage.strike()
        return loss(*args, **named)

    def hooked_encode(*args: Any, **named: Any) -> Any:
        features = encode(*args, **named)
        features.register_hook(lambda gradient: shortage.strike())
        return features

    def short_submit(*args: Any, **named: Any) -> Any:
        shortage.strike()
        return submit(*args, **named)

    def short_update(gradients: Any, *args: Any, **named: Any) -> Any:
        shortage.strike()
        return norm(gradients, *args, **named)

    def library_has_none(*args: Any, **named: Any) -> Any:
        if not shortage.armed:
            return encode(*args, **named)
        shortage.armed = False
        if place == "cudnn, near the cap":
            with suppress(torch.OutOfMemoryError):
                held = []
                while True:
                    held.append(torch.empty(PIECES[1], dtype=torch.uint8, device="cuda"))
            held.clear()
        raise RuntimeError("GET was unable to find an engine to execute this computation")

    norm = torch._foreach_norm
    patches: dict[str, tuple[Any, str, Any]] = {
        "decode": (run.pipeline, "_submit", short_submit),
        "encoder": (run.encoder, "encode", short_encode),
        "loss": (run.head, "loss", short_loss),
        "backward": (run.encoder, "encode", hooked_encode),
        "update": (torch, "_foreach_norm", short_update),
        "cudnn, near the cap": (run.encoder, "encode", library_has_none),
        "cudnn, far from it": (run.encoder, "encode", library_has_none),
    }
    target, name, patch = patches[place]
    if place == "update" and run.scaler.is_enabled():
        target, name, patch = run.scaler, "step", _struck(run.scaler.step, shortage)
    setattr(target, name, patch)


def _struck(call: Callable[..., Any], shortage: Shortage) -> Callable[..., Any]:
    def struck(*args: Any, **named: Any) -> Any:
        shortage.strike()
        return call(*args, **named)

    return struck


# Neighbours


def neighbour(scene: Scene, count: int, others: tuple[float, float], **settings: Any) -> Any:
    """So many steps under a planner, beside a process that takes and frees memory at any moment, never more than is
    free. It holds between `others` bytes, and the most while the steps are planned.
    """
    card = scene.card
    card["other"] = round(others[1])
    run = open_run(scene, scene.config(**settings))
    plan_joint(run)
    random, stop, turns = Random(0), Event(), [0]

    def turn() -> None:
        while not stop.is_set():
            wanted = round(random.choice((others[0], random.uniform(*others), others[1])))
            while not stop.is_set() and abs(wanted - card["other"]) > PIECES[0]:
                change = PIECES[0] if wanted > card["other"] else -PIECES[0]
                if change < 0 or card["total"] - card.held - card["other"] > 2 * change:
                    card["other"] += change
                elif random.random() < 0.2:
                    break
                time.sleep(0.0005)
            turns[0] += 1
            stop.wait(random.uniform(0, 0.2))

    thread = Thread(target=turn, daemon=True)
    thread.start()
    set_modes(run)
    stage = Joint(run)
    most, over, size, epoch = 0, 0, 0, -1
    for _ in range(count):
        if not size:
            epoch += 1
            size = of_epoch = stage.begin(epoch, 0)
        card["most"] = card.held
        take(run, stage, epoch, of_epoch - size)
        size -= 1
        most, over = max(most, card["most"]), over + (card["most"] > run.machine.budget)
    stop.set()
    thread.join()
    found = logs.read_log(scene.folder)
    taken = [event for event in found if isinstance(event, events.Step)]
    trials = [event for event in found if isinstance(event, events.Measured)]
    return logs.summary(taken, trials, most) | {"over": over, "turns": turns[0]}


def refused(scene: Scene, free: float) -> Any:
    """What the card holds before and after torch asks it for twice as much as is free."""
    card = scene.card
    first = torch.empty(1, device="cuda")
    before = card.held
    card["other"] = card["total"] - before - round(free)
    try:
        torch.empty(2 * round(free), dtype=torch.uint8, device=first.device)
    except torch.OutOfMemoryError:
        return {"before": before, "after": card.held}
    raise AssertionError("torch was given more than there is")


# Memory that torch does not know


class ForeignPipeline(NoisePipeline):
    """Takes memory outside torch where DALI does: when it is built, and at its first run."""

    card: Card
    first = True

    def _build(self) -> Any:
        self.card["outside"] += FOREIGN[0]
        return None

    def _load(self, batch: Any, frames: torch.Tensor, allocated: Any) -> torch.Tensor:
        if ForeignPipeline.first:
            ForeignPipeline.first = False
            self.card["outside"] += FOREIGN[1]
        return super()._load(batch, frames, allocated)


FOREIGN = (100_000_000, 200_000_000)


def foreign(scene: Scene, resume: bool = False, replay: str | None = None, **settings: Any) -> Any:
    """Two steps beside memory that torch does not know, and a checkpoint; with `resume`, those of the run that goes on
    in the same folder.
    """
    ForeignPipeline.card = scene.card
    run = open_run(scene, replace(scene.config(**settings), replay=replay), pipeline=ForeignPipeline)
    run.saves = True
    if resume:
        run.resume()
    if "joint" not in run.plans:
        run.plans["joint"] = plan_joint(run)
    before = sorted(booked_of(run))
    set_modes(run)
    stage = Joint(run)
    stage.begin(0, 0)
    for step in range(2):
        take(run, stage, 0, step)
    reading = run.machine.meter.reading()
    if not resume:
        run.save(Position("joint", 0, 0), stage.optimizer)
    return {"own": reading.own, "held": scene.card.held, "settled before": before, "settled": booked_of(run)}


def booked_of(run: Run) -> dict[str, int]:
    """What the meter has attributed to this process outside torch, by event."""
    assert isinstance(run.machine.meter, GpuMeter)
    return run.machine.meter.booked


def take(run: Run, stage: Joint, epoch: int, step: int) -> Outcome:
    """One step, logged as the loop over epochs does."""
    done = stage.step(epoch, step)
    run.log.event(events.Step(stage="joint", epoch=epoch, step=step, loss=done.loss, **done.logged))
    return done


# The whole job


class CachePipeline(FramePipeline):
    """The pictures of the frame cache, decoded by FFmpeg and brought to the device, in place of DALI's."""

    def _build(self) -> Any:
        return None

    def _run(self, jpegs: list[Any], views: list[Any], side: int) -> torch.Tensor:
        squares = []
        for jpeg, view in zip(jpegs, views, strict=True):
            decoder = av.CodecContext.create("mjpeg", "r")
            (picture,) = decoder.decode(av.Packet(jpeg.tobytes()))
            image = torch.from_numpy(picture.to_ndarray(format="rgb24"))
            top, left = round(view.top * len(image)), round(view.left * image.shape[1])
            height, width = round(view.height * len(image)), round(view.width * image.shape[1])
            part = image[top : top + height, left : left + width].permute(2, 0, 1)[None].float()
            square = torch.nn.functional.interpolate(part, (side, side), mode="bilinear", antialias=True)
            squares.append((square.flip(-1) if view.flip else square)[0].permute(1, 2, 0).byte())
        return torch.stack(squares).to(self._device)


def demo_videos(scene: Scene, where: str) -> Any:
    """Real videos, few and short."""
    annotations, videos = demo.generate(Path(where), num_training=4, num_validation=2, seed=1)
    return {"annotations": str(annotations), "videos": str(videos)}


def job(scene: Scene, flags: list[str], out: str, video: str) -> Any:
    """The command `train`, all its stages, and then `detect` on a video."""
    sys.modules["nvidia.dali"] = ModuleType("nvidia.dali")  # which is asked for, and replaced
    state.FramePipeline = model.FramePipeline = CachePipeline  # type: ignore[misc]
    status = train.main(flags)
    if status:
        sys.exit(status)
    stages = {event.stage for event in logs.read_log(Path(out)) if isinstance(event, events.Step)}
    found = model.Detector.load(out).detect(video, device="cuda", mem_budget="4GB")
    return {
        "stages": sorted(stages), "detections": len(found), "metrics": (Path(out) / "metrics.json").exists(),
        "features": len(list((Path(out) / "features").glob("*"))),
    }  # fmt: skip


class Seen(TorchDispatchMode):
    """The operators of this project that reach the dispatcher."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "lofi_fast":
            self.names.append(func.__name__)
        return func(*args, **kwargs or {})


def recorded(scene: Scene) -> Any:
    """Ways to call an operator that has a derivative."""
    x = torch.zeros(16, 16, 4, 4, device="cuda", requires_grad=True)
    ones = torch.ones(16, device=x.device)

    def call(x: Tensor) -> Tensor:
        out, shifted = kernels.residual_shift(x, ones, ones, x, num_frames=8, fold=2)
        return out + shifted  # type: ignore[operator]

    nodes = [type(edge[0]).__name__ for edge in call(x).grad_fn.next_functions]  # type: ignore[union-attr]
    with Seen() as seen:
        call(x).sum().backward()
    with torch.no_grad():
        alone = call(x).requires_grad
    (grad,) = torch.autograd.grad(call(x).sum(), x, create_graph=True)
    try:
        grad.sum().backward()
    except NotImplementedError as error:
        said = str(error)
    compiled = torch.compile(call, backend="aot_eager", fullgraph=True)(x)
    (unshifted,) = torch.autograd.grad(kernels.residual_shift(x, ones, ones)[0].sum(), x)
    with Seen():
        (filled,) = torch.autograd.grad(kernels.residual_shift(x, ones, ones)[0].sum(), x)
    shift = kernels.temporal_shift
    (once,) = torch.autograd.grad(shift(x, 8).sum(), x, create_graph=True)
    (twice,) = torch.autograd.grad((shift(x, 8) * x).sum(), x, create_graph=True)
    return {
        "nodes": nodes, "watched": seen.names, "alone": alone, "said": said, "compiled": compiled.requires_grad,
        "shift": [once.requires_grad, twice.requires_grad], "unshifted": unshifted.shape == filled.shape == x.shape,
    }  # fmt: skip


SCENARIOS: dict[str, Callable[..., Any]] = {
    "steps": steps, "chosen": chosen, "shortages": shortages, "neighbour": neighbour, "refused": refused,
    "foreign": foreign, "demo": demo_videos, "job": job, "recorded": recorded,
}  # fmt: skip


def main(name: str, arguments: str) -> int:
    torch.set_num_threads(1)
    card = Card()
    given = json.loads(arguments)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(given.pop("folder", temporary)) / "run"
        folder.mkdir(exist_ok=True)
        with closing(RunLog(folder / "log.jsonl")) as log:
            found = SCENARIOS[name](Scene(card, folder, log), **given)
    print(json.dumps(found))
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))

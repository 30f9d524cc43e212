"""The loop over epochs: what is not finite updates nothing, is counted, and ends a stage; and a run can be stopped.

The joint stage of a small run on frames that are made up, with heads whose loss breaks at chosen steps.
"""

from __future__ import annotations

import copy
import errno
import math
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from io import StringIO
from itertools import chain, cycle, repeat
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from rich.console import Console
from torch import Tensor

from bench.tools.synthetic import NoisePipeline, setting, synthetic_run
from lofi_fast.config import Config, StageConfig
from lofi_fast.data.dataset import Clip
from lofi_fast.encoder.tsm import TSMEncoder
from lofi_fast.errors import InputError
from lofi_fast.head.gtad_head import GTADHead
from lofi_fast.memory.decision import NothingFits
from lofi_fast.memory.settle import open_meter
from lofi_fast.memory.trial import Choice, Reading, Trials
from lofi_fast.optim import make_optimizer
from lofi_fast.run import checkpoint, events
from lofi_fast.run.checkpoint import Position
from lofi_fast.run.log import OutputLost, RunLog
from lofi_fast.run.networks import Networks
from lofi_fast.run.state import Run
from lofi_fast.stages import pretrain as pretrain_room
from lofi_fast.stages.epochs import LEAST_SCALE, NOT_FINITE_STEPS, update
from lofi_fast.stages.features import encode, encode_within_budget
from lofi_fast.stages.head import check_head
from lofi_fast.stages.joint import joint, plan_joint
from lofi_fast.stages.pretrain import ClipsPlan, clip_batches, holds, new_classifier, plan_again, pretrain

STEPS = 2  # of an epoch


class Breaking(GTADHead):
    """Its loss is NaN, or has a gradient that is, in the given calls."""

    calls = 0
    broken: Callable[[int], str] = staticmethod(lambda call: "")

    def loss(self, *of: Any) -> dict[str, Tensor]:
        terms = super().loss(*of)
        what = self.broken(self.calls)
        self.calls += 1
        if what == "loss":
            terms["classes"] = terms["classes"] * math.nan
        elif what == "gradient":  # of the square root at 0: infinite, and times 0 it is NaN
            terms["classes"] = terms["classes"] + (terms["classes"] * 0).sqrt()
        return terms


class Still(NoisePipeline):
    """The same noise for every batch of a size: frames do not depend on what was decoded before."""

    def _load(self, batch: Any, frames: Tensor, allocated: Any) -> Tensor:
        return frames.random_(0, 256, generator=torch.Generator().manual_seed(0))


def breaking_head(config: Config, num_features: int, num_classes: int) -> Breaking:
    return Breaking(config.head, num_features, num_classes, config.full.num_snippets)


@contextmanager
def small_run(folder: Path, epochs: int, broken: Callable[[int], str] = lambda call: "") -> Iterator[Run]:
    """A run whose joint stage is planned. Networks are the settings', so far as planning goes."""
    config = setting(4 * 10**9, folder, tiny=True)
    config = replace(config, joint=replace(config.joint, epochs=epochs, lr=1e-3))
    folder.mkdir(parents=True)
    log = RunLog(folder / "log.jsonl")
    device = torch.device("cpu")
    run = synthetic_run(config, device, open_meter(device), log)
    run.pipeline, run.saves = Still(1, num_threads=1), True
    run.plans["joint"] = plan_joint(run)
    run.networks = Networks(head=breaking_head)
    run.head = run.new_head("joint")
    assert isinstance(run.head, Breaking)
    run.head.broken = broken
    yield run
    run.pipeline.close()
    log.close()


def logged(run: Run) -> list[events.AnyEvent]:
    return list(events.read((run.folder / "log.jsonl").read_text().splitlines()))


def weights(run: Run) -> dict[str, Tensor]:
    return copy.deepcopy({**run.encoder.state_dict(prefix="encoder."), **run.head.state_dict(prefix="head.")})


def different(a: dict[str, Tensor], b: dict[str, Tensor]) -> list[str]:
    return [name for name in a if not torch.equal(a[name], b[name])]


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_a_step_that_is_not_finite_updates_nothing_and_the_next_goes_on(tmp_path: Path, what: str) -> None:
    with small_run(tmp_path / "run", 2, lambda call: what if call == 1 else "") as run:
        seen = []
        run.stop = lambda: bool(seen.append(weights(run)))  # asked after every step
        joint(run)
        assert different(seen[0], seen[1]) == [], "the second step, which broke"
        assert different(seen[1], seen[2]) and different(seen[2], seen[3])
        assert all(bool(value.isfinite().all()) for value in seen[3].values())
        assert all(p.grad is None for p in run.head.parameters())
        steps = [event for event in logged(run) if isinstance(event, events.Step)]
        assert [(step.epoch, step.step) for step in steps] == [(0, 0), (0, 1), (1, 0), (1, 1)]
        assert [step.loss is None for step in steps] == [False, what == "loss", False, False]
        (skipped,) = [event for event in logged(run) if isinstance(event, events.NotFinite)]
        assert (skipped.epoch, skipped.step, skipped.what, skipped.in_a_row) == (0, 1, what, 1)
        assert skipped.videos == steps[1].videos != []


def test_a_stage_that_diverges_ends_and_names_the_last_good_checkpoint(tmp_path: Path) -> None:
    with small_run(tmp_path / "run", 9, lambda call: "loss" if call >= STEPS else "") as run:
        with pytest.raises(InputError) as error:
            joint(run)
        said = str(error.value)
        assert "\n" not in said and "not finite" in said and "diverged" in said and "--joint-lr" in said
        assert str(run.last_checkpoint) in said and "epoch" in said
        counted = [event.in_a_row for event in logged(run) if isinstance(event, events.NotFinite)]
        assert counted == list(range(1, NOT_FINITE_STEPS + 1))
        content = checkpoint.load(run.last_checkpoint)
        assert checkpoint.not_finite(content) == ""
        # Nothing was updated since: the checkpoint of any epoch's end holds the last good weights.
        assert different(content["head"], run.head.state_dict()) == []


def test_steps_that_are_not_finite_now_and_then_end_nothing(tmp_path: Path) -> None:
    pattern = [*["loss"] * (NOT_FINITE_STEPS - 1), "", *["gradient"] * (NOT_FINITE_STEPS - 1), ""]
    with small_run(tmp_path / "run", len(pattern) // STEPS, pattern.__getitem__) as run:
        joint(run)
        counted = [event.in_a_row for event in logged(run) if isinstance(event, events.NotFinite)]
        assert counted == 2 * list(range(1, NOT_FINITE_STEPS))


def test_without_a_checkpoint_the_refusal_says_so(tmp_path: Path) -> None:
    with small_run(tmp_path / "run", 9, lambda call: "loss") as run:
        run.saves = False
        with pytest.raises(InputError, match="no checkpoint was saved before"):
            joint(run)


def test_weights_that_are_not_finite_are_neither_saved_nor_resumed(tmp_path: Path) -> None:
    with small_run(tmp_path / "run", 1) as run:
        run.save(Position("joint", 0, 1), None)
        good = run.last_checkpoint.read_bytes()
        content = checkpoint.load(run.last_checkpoint)
        with torch.no_grad():
            next(run.head.parameters()).view(-1)[3] = math.inf
        with pytest.raises(InputError, match=r"last\.pt: not saved.*not finite.*diverged.*last good.*epoch 1, step 2"):
            run.save(Position("joint", 0, 2), None)
        assert run.last_checkpoint.read_bytes() == good

        content["encoder"]["conv1.weight"][0, 0, 0, 0] = math.nan
        checkpoint.save_atomic(content, run.last_checkpoint)
        before = weights(run)
        with pytest.raises(InputError, match=r"last\.pt: its weights are not finite \(encoder\.conv1\.weight\)"):
            run.resume()
        assert different(before, weights(run)) == []


def test_a_run_that_is_told_to_stop_saves_after_the_step_and_goes_on_from_there(tmp_path: Path) -> None:
    with small_run(tmp_path / "whole", 2) as run:
        joint(run)
        expected = weights(run)
    with small_run(tmp_path / "stopped", 2) as run:
        answers = iter([False, False, True])
        run.stop = lambda: next(answers)
        joint(run)
        assert run.position == Position("joint", 1, 1)
        assert run.due("joint") is None and not run.ahead("head"), "no other stage begins"
        assert Position(**checkpoint.load(run.last_checkpoint)["position"]) == run.position
    with small_run(tmp_path / "on", 2) as run:
        checkpoint.save_atomic(checkpoint.load(tmp_path / "stopped" / "checkpoints" / "last.pt"), run.last_checkpoint)
        run.resume()
        run.planner = None
        joint(run)
        assert different(expected, weights(run)) == []


def test_a_step_that_is_refused_leaves_all_before_it_saved_and_the_run_goes_on_from_there(tmp_path: Path) -> None:
    def refused(call: int) -> str:
        if call == STEPS + 1:
            raise NothingFits("nothing fits: raise --mem-budget")
        return ""

    with small_run(tmp_path / "whole", 2) as run:
        joint(run)
        expected = weights(run)
    with small_run(tmp_path / "refused", 2, refused) as run:
        with pytest.raises(InputError) as error:
            joint(run)
        assert "nothing fits" in str(error.value) and f"--resume {run.folder}" in str(error.value)
        assert Position(**checkpoint.load(run.last_checkpoint)["position"]) == Position("joint", 1, 1)
        saved = run.last_checkpoint
    with small_run(tmp_path / "on", 2) as run:
        checkpoint.save_atomic(checkpoint.load(saved), run.last_checkpoint)
        run.resume()
        run.planner = None
        joint(run)
        assert different(expected, weights(run)) == []


def test_a_step_that_is_refused_in_the_middle_of_its_update_is_not_saved(tmp_path: Path) -> None:
    with small_run(tmp_path / "run", 2) as run:

        def half_updated(call: int) -> str:
            if call == STEPS + 1:
                with torch.no_grad():
                    next(run.encoder.parameters()).add_(1.0)
                raise InputError("memory ran out in the middle of an update")
            return ""

        assert isinstance(run.head, Breaking)
        run.head.broken = half_updated
        with pytest.raises(InputError, match=r"^memory ran out in the middle of an update$"):
            joint(run)
        assert Position(**checkpoint.load(run.last_checkpoint)["position"]) == Position("joint", 1)


@pytest.mark.parametrize("last", [True, False], ids=["after the last step", "before it"])
def test_an_epoch_of_pretraining_that_was_stopped_is_as_accurate_as_an_unbroken_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, last: bool
) -> None:
    right = cycle([3, 1])  # clips of the two steps
    clip_loss = pretrain_room.clip_loss
    monkeypatch.setattr(pretrain_room, "clip_loss", lambda *of: (clip_loss(*of)[0], torch.tensor(next(right))))

    def pretrained(folder: Path, answers: Iterator[bool], saved: Path | None = None) -> list[float | None]:
        with small_run(folder, 1) as run:
            run.config = replace(run.config, stages=("pretrain",), pretrain=replace(run.config.pretrain, epochs=1))
            run.position, run.plans["pretrain"] = Position("pretrain"), {"batch": 8}
            extra = {}
            if saved is not None:
                checkpoint.save_atomic(checkpoint.load(saved), run.last_checkpoint)
                extra = run.resume()
            run.stop = lambda: next(answers)
            pretrain(run, extra)
            return [event.accuracy for event in logged(run) if isinstance(event, events.Epoch)]

    expected = pretrained(tmp_path / "whole", repeat(False))
    with small_run(tmp_path / "counted", 1) as run:
        steps = len(run.sampler.clip_epoch(0, 8))
    assert steps == 2 and expected[0]
    stops = chain(repeat(False, steps - 1 if last else 0), [True])
    assert pretrained(tmp_path / "stopped", stops) == []
    assert pretrained(tmp_path / "on", repeat(False), tmp_path / "stopped" / "checkpoints" / "last.pt") == expected


@pytest.mark.parametrize("error", [BrokenPipeError(), OSError(errno.ENOSPC, "No space left on device")], ids=type)
def test_a_terminal_that_takes_no_more_costs_nothing_that_was_trained(tmp_path: Path, error: OSError) -> None:
    class Lost(StringIO):
        def write(self, text: str) -> int:
            raise error

    class Pipe(Console):
        def on_broken_pipe(self) -> None:  # rich's own turns this process's stdout away, too
            raise SystemExit(1)

    with small_run(tmp_path / "run", 2) as run:
        run.log.console = Pipe(file=Lost())
        with pytest.raises((BrokenPipeError, OutputLost)) as ended:  # the last step of an epoch is told of
            joint(run)
        assert Position(**checkpoint.load(run.last_checkpoint)["position"]) == Position("joint", 0, STEPS)
        if isinstance(error, BrokenPipeError):
            assert ended.type is BrokenPipeError
        else:
            assert str(ended.value).startswith("the output cannot be written: No space left on device; all up to here")
            assert f"--resume {run.folder}" in str(ended.value)


class Full:
    """The log's file on a disk that takes no more after some lines."""

    name = "log.jsonl"

    def __init__(self, file: Any, left: int) -> None:
        self.file, self.left = file, left

    def write(self, content: bytes) -> None:
        self.left -= 1
        self.file.write(content if self.left >= 0 else b"")

    def flush(self) -> None:
        self.file.flush()
        if self.left < 0:
            raise OSError(errno.ENOSPC, "No space left on device")

    def close(self) -> None:
        self.flush()


@pytest.mark.parametrize("step", [0, STEPS - 1, STEPS])
def test_a_log_that_takes_no_more_loses_no_step(tmp_path: Path, step: int) -> None:
    with small_run(tmp_path / "run", 2) as run:
        file, run.log._file = run.log._file, Full(run.log._file, step + step // STEPS)  # type: ignore[assignment]
        with pytest.raises(OutputLost) as ended:
            joint(run)
        assert Position(**checkpoint.load(run.last_checkpoint)["position"]) == Position(
            "joint", step // STEPS, step % STEPS + 1
        )
        said = str(ended.value)
        assert (
            said.startswith("log.jsonl: cannot write (No space left on device)") and "all up to here is saved" in said
        )
        run.log.close()  # which loses nothing that was not told
        run.log._file = file


@pytest.mark.parametrize("way", ["moved", "removed", "replaced"])
def test_a_run_folder_that_goes_while_it_is_trained_in_is_not_made_anew(tmp_path: Path, way: str) -> None:
    gone = list[Path]()
    with small_run(tmp_path / "run", 2) as run:

        def go() -> bool:
            if not gone:
                gone.append(run.folder.rename(tmp_path / "moved"))
                if way == "removed":
                    shutil.rmtree(tmp_path / "moved")
                if way == "replaced":  # by the folder of another run
                    run.folder.mkdir()
            return True

        run.stop = go  # and save, after the first step
        with pytest.raises(InputError) as ended:
            joint(run)
        said = str(ended.value)
        assert said.startswith(f"{run.folder}: the run folder has gone")
        if way != "removed":
            assert said.endswith(f"it is {tmp_path / 'moved'} now: go on with --resume {tmp_path / 'moved'}")
            content = checkpoint.load(tmp_path / "moved" / "checkpoints" / "last.pt")
            assert Position(**content["position"]) == Position("joint", 0, 1)
        else:
            assert said.endswith("it was removed")
        with pytest.raises(InputError, match="has gone"):
            run.write_plans()
        assert list(run.folder.glob("*")) == []


def test_statistics_of_batchnorm_are_as_before_when_a_step_of_pretraining_breaks(tmp_path: Path) -> None:
    with small_run(tmp_path / "run", 1) as run:
        run.config = replace(run.config, stages=("pretrain",), pretrain=replace(run.config.pretrain, epochs=9))
        run.position, run.plans["pretrain"] = Position("pretrain"), {"batch": 8}
        classifier = new_classifier(run).state_dict()
        classifier["weight"].fill_(3e38)  # finite, and its products are not
        before = weights(run)
        with pytest.raises(InputError, match=r"pretrain: the loss was not finite in 5 steps .* --pretrain-lr"):
            pretrain(run, {"classifier": classifier})
        assert different(before, weights(run)) == []


def test_the_first_step_of_pretraining_is_measured_and_halves_a_batch_that_is_too_large(tmp_path: Path) -> None:
    def trained(folder: Path, plan: dict[str, int | None], budget: int) -> Run:
        with small_run(folder, 1) as run:
            run.config = replace(run.config, stages=("pretrain",), pretrain=replace(run.config.pretrain, epochs=1))
            run.position, run.plans["pretrain"] = Position("pretrain"), dict(plan)
            run.machine = replace(run.machine, budget=budget)
            pretrain(run, {})
        return run

    amply = 4 * 10**9
    known = trained(tmp_path / "known", {"batch": 4, "peak": 1}, amply)
    planned = trained(tmp_path / "planned", {"batch": 4, "predicted": 10**9, "peak": None}, amply)
    assert different(weights(known), weights(planned)) == [], "the step that is measured trains"
    measured = [event for event in logged(planned) if isinstance(event, events.Measured)][-1]
    assert measured.candidate == "4" and measured.predicted == 10**9
    assert planned.plans["pretrain"]["peak"] == measured.peak

    # A budget below what the process holds: the resident set is over it, whichever step runs.
    halved = trained(tmp_path / "halved", {"batch": 8, "predicted": 10**9, "peak": None}, 10**8)
    sizes = [(e.candidate, e.peak) for e in logged(halved) if isinstance(e, events.Measured) and "clips" in e.plan]
    assert [size for size, _ in sizes] == ["8", "4"] and halved.plans["pretrain"]["batch"] == 4
    assert different(weights(known), weights(halved)) == [], "as if the smaller batch had been planned"


@pytest.mark.parametrize(("before", "fits", "expected"), [(8, 4, 4), (4, 16, 8), (4, 4, 4)])
def test_pretraining_that_is_planned_again_in_mid_epoch_sees_each_clip_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, before: int, fits: int, expected: int
) -> None:
    """A run goes on with less memory, or more, after 8 clips of an epoch: two steps of 4, or one of 8."""
    done = 8

    def choose(self: Trials, name: str, sizes: Sequence[int], *of: Any, ledger: Any, **how: Any) -> Choice[int]:
        assert ledger is None, "measured now, since the epoch's first step is over"
        size = next(size for size in sizes if size <= fits)
        return Choice(size, 10**9, (Reading(size, 10**9),))

    monkeypatch.setattr(Trials, "highest_fitting", choose)
    asked = list[Clip]()

    def batches(run: Run, epoch: int, ahead: list[list[Clip]]) -> Iterator[tuple[Tensor, Tensor]]:
        asked.extend(chain.from_iterable(ahead))
        return clip_batches(run, epoch, ahead)

    monkeypatch.setattr(pretrain_room, "clip_batches", batches)
    with small_run(tmp_path / "run", 1) as run:
        run.config = replace(run.config, stages=("pretrain",), pretrain=replace(run.config.pretrain, epochs=1))
        run.position = Position("pretrain", 0, done // before)
        plan_again(run, {"batch": before, "predicted": 10**9, "peak": None})
        assert (run.plans["pretrain"]["batch"], run.position.step) == (expected, done // expected)
        pretrain(run, {})
    assert asked == list(chain.from_iterable(run.sampler.clip_epoch(0, 1)))[done:]


@pytest.mark.parametrize(("plan", "room", "kept"), [
    ({"batch": 8, "predicted": 3, "peak": 2}, 2, True),
    ({"batch": 8, "predicted": 3, "peak": None}, 2, False),
    ({"batch": 8, "predicted": 1, "peak": 3}, 2, False),
    ({"batch": 4, "predicted": 3, "peak": 3}, 2, True),  # there is no smaller one
])  # fmt: skip
def test_a_plan_of_pretraining_holds_where_there_is_as_much_memory(
    tmp_path: Path, plan: ClipsPlan, room: int, kept: bool
) -> None:
    with small_run(tmp_path / "run", 1) as run:
        run.machine = replace(run.machine, budget=room)  # of `auto` or a share, on another machine
        assert holds(run, plan) == kept


@pytest.mark.parametrize("verify", [True, False])
def test_features_are_encoded_in_smaller_chunks_where_memory_runs_out(tmp_path: Path, verify: bool) -> None:
    class Narrow(TSMEncoder):
        """Has memory for two snippets at once."""

        def encode(self, frames_NHWC: Tensor, num_frames: int, **how: Any) -> Tensor:
            if how["chunk"] > most:
                raise MemoryError
            return super().encode(frames_NHWC, num_frames, **how)

    with small_run(tmp_path / "run", 1) as run:
        narrow = Narrow(run.encoder.name, run.encoder.width)  # type: ignore[arg-type]
        narrow.load_state_dict(run.encoder.state_dict())
        run.encoder = narrow.eval()
        narrow.freeze_batchnorm()
        frames = torch.randint(0, 256, (8 * 8, 16, 16, 3), dtype=torch.uint8)
        most = 8
        whole = encode(run, frames, 2)
        most = 2
        features, chunk = encode_within_budget(run, frames, 8, verify)
        assert chunk == 2 and np.array_equal(features, whole)
        measured = [(e.candidate, e.peak is None) for e in logged(run) if getattr(e, "plan", "").startswith("features")]
        assert measured == ([("8", True), ("4", True), ("2", False)] if verify else [])
        most = 0
        with pytest.raises(InputError, match=r"one snippet at once needs more than .*; raise --mem-budget"):
            encode_within_budget(run, frames, 4, verify)


def test_a_head_stage_that_cannot_fit_is_refused_before_anything_trains(tmp_path: Path) -> None:
    with small_run(tmp_path / "run", 1) as run:
        run.networks = Networks()
        check_head(run)
        held = run.machine.meter.held()
        run.machine = replace(run.machine, budget=held - 10**7)
        with pytest.raises(InputError, match=r"the head stage needs at least .* give a smaller --head-stage.batch"):
            check_head(run)
        run.networks = Networks(head=breaking_head)
        check_head(run)  # nothing is known of a head of the caller's own


# The update


def one_step(
    scaler: torch.amp.GradScaler, gradients: Sequence[float], loss: float = 1.0, clip: float | None = None,
    optimizer_name: Literal["adamw", "sgd"] = "adamw",
) -> tuple[str, Tensor]:  # fmt: skip
    parameter = torch.nn.Parameter(torch.ones(len(gradients)))
    optimizer = make_optimizer(StageConfig(1, 1, optimizer_name, 0.5, weight_decay=0.0), [parameter], "torch")
    run: Any = type("run", (), {"scaler": scaler})
    scaler.scale((parameter * torch.tensor(gradients)).sum()).backward()
    return update(run, optimizer, loss, clip), parameter.detach()


def test_under_a_scaler_an_overflow_is_the_scalers_business_until_it_is_stuck() -> None:
    scaler = torch.amp.GradScaler("cpu", init_scale=4 * LEAST_SCALE, enabled=True)
    told = []
    for _ in range(4):
        what, parameter = one_step(scaler, [1.0, math.inf])
        told.append(what)
        assert parameter.tolist() == [1.0, 1.0]
    assert told == ["", "", "gradient", "gradient"]  # at a scale of 4, 2, 1, 1/2
    what, parameter = one_step(scaler, [1.0, 2.0])
    assert what == "" and parameter[0] < 1


@pytest.mark.parametrize("scaled", [False, True])
def test_gradients_are_clipped_to_their_norm_whatever_the_scale(scaled: bool) -> None:
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, enabled=scaled)
    what, parameter = one_step(scaler, [3.0, 4.0], clip=1.0, optimizer_name="sgd")
    assert what == "" and torch.allclose(parameter, 1 - 0.5 * torch.tensor([0.6, 0.8]), atol=1e-6)
    what, parameter = one_step(scaler, [0.3, 0.4], clip=1.0, optimizer_name="sgd")
    assert what == "" and torch.allclose(parameter, 1 - 0.5 * torch.tensor([0.3, 0.4]), atol=1e-6)


def test_a_loss_that_is_not_finite_leaves_the_scaler_alone() -> None:
    scaler = torch.amp.GradScaler("cpu", init_scale=16.0, enabled=True)
    assert one_step(scaler, [1.0], loss=math.nan)[0] == "loss"
    assert scaler.get_scale() == 16.0


@pytest.mark.parametrize("gradients", [[1e30, 3e30], [0.0, -1e-30], [1.0]], ids=["huge", "tiny", "one"])
def test_finite_gradients_are_applied_as_by_the_optimizer_alone(gradients: list[float]) -> None:
    what, parameter = one_step(torch.amp.GradScaler("cpu", enabled=False), gradients)
    expected = torch.nn.Parameter(torch.ones(len(gradients)))
    optimizer = make_optimizer(StageConfig(1, 1, "adamw", 0.5, weight_decay=0.0), [expected], "torch")
    (expected * torch.tensor(gradients)).sum().backward()
    optimizer.step()
    assert what == "" and torch.equal(parameter, expected.detach())

"""The whole job, from settings to a trained detector: prepare the data, then the stages in order, each in a file of its
own: pretrain, joint (LoFi), head, eval.

This file wires the rooms together and holds nothing else.
"""

from __future__ import annotations

import dataclasses
import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from rich.console import Console

from lofi_fast import __version__, gpu
from lofi_fast import encoder as encoders
from lofi_fast.budget import gigabytes, resolve_budget
from lofi_fast.config import PLANNED_FOR, Config
from lofi_fast.data import cache, demo, nvdec
from lofi_fast.data.catalogue import Catalogue
from lofi_fast.data.dataset import Dataset, cached_dataset
from lofi_fast.data.inventory import cache_folder, record_use
from lofi_fast.data.packages import require_dali, require_pyav
from lofi_fast.data.survey import Survey, survey
from lofi_fast.encoder.weights import check_encoder_weights
from lofi_fast.errors import InputError
from lofi_fast.files import write_bytes
from lofi_fast.kernels import library
from lofi_fast.memory.meter import Meter
from lofi_fast.memory.ranks import lowest_of_all
from lofi_fast.memory.settle import give_back, open_meter
from lofi_fast.model import Detector
from lofi_fast.model_file import MODEL
from lofi_fast.optim import Implementation, choose_implementation
from lofi_fast.precision import Precision, choose_device, going_on_in
from lofi_fast.presets import unread_settings, weights_warning
from lofi_fast.run import events, tensorboard
from lofi_fast.run.early import check_values
from lofi_fast.run.folder import choose_folder, run_folder
from lofi_fast.run.heartbeat import restarts
from lofi_fast.run.live import LiveView
from lofi_fast.run.log import RunLog, SilentLog
from lofi_fast.run.networks import Networks
from lofi_fast.run.processes import Processes, check_alike, check_batches, check_data, check_same, opened
from lofi_fast.run.state import Machine, Run, environment, open_run
from lofi_fast.run.stop import Stop, Stopped
from lofi_fast.run.tensorboard import Board
from lofi_fast.run.trained_on import RECORD
from lofi_fast.settings import leaves
from lofi_fast.stages.evaluation import Result, evaluate
from lofi_fast.stages.head import check_head, train_head
from lofi_fast.stages.joint import check_smallest, joint, plan_joint
from lofi_fast.stages.pretrain import check_smallest_clips, holds, plan_again, plan_pretrain, pretrain


@dataclass(frozen=True)
class Finished:
    """What a job leaves: the run folder, and mAP of the validation videos, or None where nothing was evaluated."""

    folder: Path
    metrics: Result | None
    seconds: float  # from the plans to the end
    first: bool = True  # whether this process is the one that speaks, where several have trained together


def run_job(
    config: Config,
    *,
    resume: bool = False,
    networks: Networks | None = None,
    argv: Sequence[str] = (),
    notes: Sequence[str] = (),
    stop: Stop | None = None,
    plain: bool = False,
) -> Finished:
    """Train as `config` says, from the start or from the run's last checkpoint. `networks` None: the config's.

    `argv` (the flags that say the same) and `notes` (sentences about this process) are logged. `stop` says whether
    signals have asked the run to end. `plain`: lines alone on the terminal. Raises InputError, with a sentence for the
    user, for anything that is theirs to mend, and Stopped when the run has ended early.
    """
    with opened() as processes:
        return _run_job(config, processes, resume, networks, argv, notes, stop or Stop(), plain)


def _run_job(
    config: Config, processes: Processes, resume: bool, networks: Networks | None, argv: Sequence[str],
    notes: Sequence[str], stop: Stop, plain: bool,
) -> Finished:  # fmt: skip
    check_alike(processes, config)
    processes.together("settings' values", lambda: check_values(config))
    processes.together("packages", lambda: require_packages(config))
    out, resume = processes.of_first("folder", lambda: _folder(config, resume))
    config = dataclasses.replace(config, out=out)
    if resume and config.data.window == "labels":
        config = with_window(config, _window_of(Path(config.out)))
    device = processes.device(config.device)
    processes.together("DALI", lambda: gpu.check_dali(device))
    if config.threads:
        torch.set_num_threads(config.threads)
    began_in = _precision_of(Path(config.out)) if resume else None
    precision, precision_note = going_on_in(device, config.precision, began_in)
    check_same(processes, "computes in", str(precision).partition(" ")[0], "a --precision that all have")
    optimizers = choose_implementation(config.optimizer_impl, device)
    meter = open_meter(device)
    budget = lowest_of_all(resolve_budget(config.budget, meter.total(), meter.available()))

    def check() -> None:
        gpu.check_triton(device)
        check_held(config, budget, meter)
        if networks is None and config.encoder.weights:
            check_encoder_weights(lambda: encoders.build(config), Path(config.encoder.weights))

    processes.together("budget and weights", check)
    with (
        _folder_of_all(config, resume, processes) as (folder, going_on),
        closing(open_log(config, folder, plain) if processes.first else SilentLog()) as log,
    ):
        stop.folder = folder
        introduce(log, config, device, meter, precision, optimizers, budget, argv)
        if networks is None and (warning := weights_warning(config)):
            log.say(warning)
        unread = unread_settings(config) if networks is None else []
        for note in [*notes, *unread, *filter(None, [precision_note])]:
            log.say(f"note: {note}")
        machine = Machine(device, precision, meter, budget)

        def before_decoding() -> None:
            if networks is not None or going_on or processes.several:
                return
            if "joint" in config.stages and config.joint.epochs > 0:
                check_smallest(config, machine, log.say)
            if "pretrain" in config.stages and config.pretrain.epochs > 0:
                check_smallest_clips(config, machine)

        room = min(budget, meter.available()) - meter.own()
        dataset = processes.in_turns("data", lambda: prepare(config, log, room, before_decoding))
        config = with_window(config, dataset.window)
        run = open_run(config, dataset, machine, log, networks, processes)
        run.stop = stop
        check_data(processes, run.data)
        check_batches(processes, batch_sizes(run))
        extra = run.resume() if going_on else {}
        if going_on:
            log.say(f"resuming at {run.position.stage}, epoch {run.position.epoch + 1}, step {run.position.step + 1}")
            review_plans(run, Config.read(folder / "config.json"))
        elif resume:
            log.say("the run ended before its first checkpoint: starting again")
        if processes.first:
            write_bytes(folder / "config.json", f"{config.to_json()}\n".encode())
            write_bytes(folder / RECORD, run.data)
        run.write_json("environment.json", environment(meter.device, precision, library.describe(device.type)))

        began = time.monotonic()
        plan(run)
        with stop.between_steps():
            pretrain(run, extra)
            joint(run)
            train_head(run, extra)
        if run.stopped:  # since another process was told to
            raise Stopped
        result = evaluate(run)
        give_back()
        if processes.first and set(config.stages) != {"pretrain"}:  # which trains no head
            Detector(run.encoder, run.head, dataset.classes, config).save(folder / MODEL)
        seconds = time.monotonic() - began
        log.event(events.Done(seconds=round(seconds, 1)))
        return Finished(folder, result, seconds, processes.first)


def _folder(config: Config, resume: bool) -> tuple[str, bool]:
    """(the run folder, whether to go on with what is there): also where torchrun starts the processes anew."""
    again = int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0"))
    if again and not config.out:
        raise InputError(
            f"torchrun --max-restarts {again} without --out: name the run's folder, in which the processes go on when "
            "they are started anew"
        )
    resume = resume or (restarts() > 0 and (Path(config.out) / "config.json").exists())
    return str(choose_folder(config, resume)), resume


@contextmanager
def _folder_of_all(config: Config, resume: bool, processes: Processes) -> Iterator[tuple[Path, bool]]:
    """`run_folder`, which the first process holds for all. Raises InputError where one of them cannot see it."""
    with ExitStack() as held:
        taken = processes.of_first("run folder", lambda: held.enter_context(run_folder(config, resume)))

        def see() -> None:
            if not (taken[0] / "config.json").exists():
                raise InputError(f"it does not see {taken[0]}; name an --out on a disk that all machines share")

        if processes.several:
            processes.together("the run folder is seen", see)
        yield taken


def open_log(config: Config, folder: Path, plain: bool) -> RunLog:
    """The log of a run, and what shows it as it goes on: on a terminal a panel, elsewhere lines."""
    console = Console(highlight=False, soft_wrap=True)
    plain = plain or not console.is_terminal or console.is_dumb_terminal
    epochs = {"pretrain": config.pretrain.epochs, "joint": config.joint.epochs, "head": config.head_stage.epochs}
    view = None if plain else LiveView(console, str(folder), {stage: epochs.get(stage, 0) for stage in config.stages})
    boards = [Board(folder / tensorboard.FOLDER)] if config.tensorboard else []
    return RunLog(folder / "log.jsonl", console, plain=plain, view=view, watchers=boards)


def batch_sizes(run: Run) -> dict[str, int]:
    """Videos, or clips, of the first step of each stage to come that trains, by the flag of its batch."""
    config, windows = run.config, len(run.dataset.samples["training"])
    sizes = {}
    if run.ahead("pretrain") and config.pretrain.epochs > 0:
        sizes["--pretrain.batch"] = min(config.pretrain.batch, len(run.sampler.clips))
    if run.ahead("joint") and config.joint.epochs > 0:
        sizes["--batch"] = min(config.joint.batch, windows)
    if run.ahead("head") and config.head_stage.epochs > 0:
        sizes["--head-stage.batch"] = min(config.head_stage.batch, windows)
    return sizes


def with_window(config: Config, window: float | Literal["labels"] | None) -> Config:
    return dataclasses.replace(config, data=dataclasses.replace(config.data, window=window))


def _window_of(folder: Path) -> float | Literal["labels"] | None:
    """What a run was started with, or has chosen from its labels since."""
    path = folder / "config.json"
    return Config.read(path).data.window if path.exists() else "labels"


def _precision_of(folder: Path) -> str | None:
    """What a run has computed in; None where it does not tell."""
    try:
        content = json.loads((folder / "environment.json").read_bytes())
    except (OSError, ValueError):
        return None
    told = content.get("precision") if isinstance(content, dict) else None
    return told if isinstance(told, str) else None


def plan(run: Run) -> None:
    """Plan the stages to come before any of them trains: a refusal must not come hours late."""
    for stage, planner in (("pretrain", plan_pretrain), ("joint", plan_joint)):
        if run.ahead(stage) and stage not in run.plans and getattr(run.config, stage).epochs > 0:
            run.plans[stage] = planner(run)
    if run.ahead("head") and run.config.head_stage.epochs > 0:
        check_head(run)
    run.write_plans()


def review_plans(run: Run, before: Config) -> None:
    """Forget what a run that goes on has planned for another budget, other settings than those of `before`, or another
    number of processes; plan pretraining anew, which may be in mid-epoch, where there is less memory now.
    """
    clips = run.plans.get("pretrain") if run.ahead("pretrain") else None
    if any(leaf.of(before) != leaf.of(run.config) for leaf in leaves(Config) if leaf.name in PLANNED_FOR):
        run.plans = {}  # a plan holds for the budget it was made for
    if run.resumed_count != run.processes.count:
        for stage in ("pretrain", "joint"):  # whose plans are of the share of a step that one process takes
            run.plans.pop(stage, None)
    if clips is not None and ("pretrain" not in run.plans or not holds(run, clips)):
        plan_again(run, clips)


def require_packages(config: Config) -> None:
    """Raises InputError for a package that is missing and will be needed. Imports those that decode, so that what they
    hold counts from the first reading of memory on.
    """
    require_pyav()
    require_dali()
    if config.tensorboard:
        tensorboard.require_tensorboard()


def check_held(config: Config, budget: int, meter: Meter) -> None:
    """Raises InputError for a budget that this process is over before its first step."""
    held = meter.held()
    if budget > held:
        return
    raise InputError(
        f"--mem-budget {config.budget.text}: nothing fits: of a budget of {gigabytes(budget)} this process holds "
        f"{gigabytes(held)} before its first step, whatever --fidelity is; give --mem-budget {2 * held / 1e9:.1f}GB or "
        "more"
    )


def introduce(
    log: RunLog, config: Config, device: torch.device, meter: Meter, precision: Precision, optimizers: Implementation,
    budget: int, argv: Sequence[str],
) -> None:  # fmt: skip
    """Say what runs where, and in how much memory."""
    if config.device == "auto" and device.type == "cpu" and (reason := gpu.unused()):
        log.say(f"warning: {reason}. Training on the CPU")
    log.say(f"lofi_fast {__version__} · {meter.device} · {torch.get_num_threads()} threads · {precision}")
    log.say(f"kernels: {library.describe(device.type)}")
    log.say(f"optimisers: {optimizers}")
    room = meter.available()
    log.say(
        f"memory budget {config.budget.text}: {gigabytes(budget)} = {budget / 2**30:.2f} GiB of {meter.source}; "
        f"this process holds {gigabytes(meter.own())}, {gigabytes(room)} can be had"
        f"{', which binds' if room < budget else ''}"
    )
    log.say(
        f"preset {config.preset}: full fidelity {config.full}, {config.encoder.name} of width {config.encoder.width}, "
        f"pattern {config.pattern}, cut {config.min_cut:g} to {config.max_cut:g}, "
        f"{'activations kept in 8 bits, ' if config.kept_maps == '8bit' else ''}run folder {config.out}"
    )
    log.event(
        events.Start(
            device=meter.device, precision=str(precision), optimizers=str(optimizers), budget=budget,
            available=room, argv=list(argv),
        )
    )  # fmt: skip


def prepare(config: Config, log: RunLog, room: int, before_decoding: Callable[[], None] = lambda: None) -> Dataset:
    """Make the demo set if no data is given, look at the data, decode into the frame cache, and cut windows. `room`:
    bytes of the device that decoding may hold. `before_decoding`, which takes long, is called when the data are known
    to be sound.
    """
    root = cache_folder(config)
    if config.data.annotations and config.data.videos:
        annotations, videos = Path(config.data.annotations), Path(config.data.videos)
    else:
        with log.progress("demo videos", 1) as advance:
            annotations, videos = demo.generate(
                root / "demo", progress=lambda done, total, name: advance(done, name, total)
            )
    with log.progress("looking at the videos", 1) as advance:
        known = Catalogue(root / "frames")
        found = survey(config, annotations, videos, lambda done, total, name: advance(done, name, total), known)
    tell(found, log)
    known.save()
    before_decoding()
    with log.progress("frame cache", 1) as advance:
        dataset = cached_dataset(
            found, root / "frames", lambda d, t, name: advance(d, name, t), *video_engine(config, room)
        )
    record_use(root / "frames", Path(config.out), (s.cached.place for of in dataset.samples.values() for s in of))
    for note in dataset.notes[len(found.warnings) + len(found.notes) :]:
        log.say(f"note: {note}")
    for skipped in dataset.skipped:
        if skipped not in found.skipped:
            log.say(f"skipped: {skipped.name}: {skipped.reason}")
        log.event(events.SkippedVideo(video=skipped.name, path=skipped.path, reason=skipped.reason))
    counts = ", ".join(
        f"{len(dataset.videos[subset])} {subset} videos ({len(dataset.samples[subset])} windows, "
        f"{sum(len(v.segments) for v in dataset.videos[subset])} segments)"
        for subset in dataset.videos
    )
    log.say(f"data: {counts}, {len(dataset.classes)} classes, {len(dataset.skipped)} videos skipped")
    log.event(events.Data(classes=list(dataset.classes), skipped=len(dataset.skipped)))
    return dataset


def video_engine(config: Config, room: int) -> tuple[str | None, int]:
    """(the device whose video engine fills the frame cache, processes that decode there in `room` bytes of its memory);
    (None, 0) where PyAV decodes.
    """
    processes = min(room // nvdec.PROCESS_BYTES, cache.ENGINE_WORKERS)
    if config.data.decoder == "pyav" or processes < 1 or choose_device(config.device).type != "cuda":
        return None, 0
    return f"cuda:{torch.cuda.current_device()}", processes


def tell(found: Survey, log: RunLog) -> None:
    """Say what was found in the data. Raises InputError for what would be refused after decoding."""
    for warning in found.warnings:
        log.say(warning)
    for note in found.notes:
        log.say(f"note: {note}")
    for skipped in found.skipped:
        log.say(f"skipped: {skipped.name}: {skipped.reason}")
    if found.refused is not None:
        raise InputError(found.refused)
    found.check_scores()
    if "joint" in found.config.stages and (large := found.large_batch()):
        log.say(f"note: {large}")

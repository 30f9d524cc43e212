"""The command `train`, and `lofi_fast.train`: from videos, labels and a memory budget to a detector of actions.

    python -m lofi_fast.train --mem-budget 11GB
    python -m lofi_fast.train --mem-budget 11GB --annotations a.json --videos v/ --out runs/x

Importing this file imports no torch: help, and a sentence about a mistyped flag, come at once.
"""

from __future__ import annotations

import shlex
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from lofi_fast.command import INTERRUPTED, CallableModule, given, run, speaks
from lofi_fast.config import JOB, Config
from lofi_fast.presets import FILE, configured, file_of_settings, preset_note, shown_defaults
from lofi_fast.settings import Section, Setting, leaves, read

if TYPE_CHECKING:
    from lofi_fast.metrics import MapResult
    from lofi_fast.point_metrics import PointResult
    from lofi_fast.stages.job import Finished

DESCRIPTION = (
    "Train a temporal action detector end to end within a memory budget. With no videos given, it trains on a small "
    "demo set that it makes itself."
)
WRITTEN = ("model.safetensors", "metrics.json", "predictions.json", "ground_truth.json", "report.html", "plan.json",
           "log.jsonl", "checkpoints", "features")  # fmt: skip


@dataclass(frozen=True)
class TrainFlags:
    """What the command line may say: how to go about it, and every setting of a run."""

    settings: Annotated[Config, Section("settings", flat=True)]
    resume: Annotated[
        bool,
        Setting(
            "go on from the last checkpoint of the run in --out, with its own settings; --resume DIR: of that in DIR",
            group=JOB,
        ),
    ] = False
    config: Annotated[Path | None, FILE] = None
    plain: Annotated[
        bool, Setting("lines on the terminal as in a file, and no live view of the training", group=JOB)
    ] = False


@dataclass(frozen=True)
class Trained:
    """What `lofi_fast.train` gives back."""

    run: Path  # the run folder
    metrics: MapResult | PointResult | None  # mAP of the validation videos; None where nothing was evaluated

    def detector(self) -> Any:
        """The `Detector` that was trained. Raises InputError where the run has made none."""
        import lofi_fast

        return lofi_fast.load(self.run)


def train(
    *,
    resume: bool | str | Path = False,
    config: str | Path | Config | None = None,
    encoder: str | Mapping[str, Any] | Callable[..., Any] | None = None,
    head: Mapping[str, Any] | Callable[..., Any] | None = None,
    plain: bool = False,
    **settings: Any,
) -> Trained:
    """Train a detector, as the command does: its flags are the keywords.

        lofi_fast.train(annotations="a.json", videos="v/", mem_budget="11GB", joint={"lr": 0.05}, head_epochs=20)

    `settings` are the flags' names with underscores (`mem_budget`, `no_flip`), or sections of settings by name, each a
    mapping or the dataclass of config.py. `config` is a file of settings, or a whole `Config`, that they change.
    `encoder` and `head` may be factories of networks of one's own (encoder/protocol.py, head/protocol.py): of the
    config, and of (config, num_features, num_classes). `resume` goes on with the run in `out`, or in the folder that
    `resume` names, with its own settings; others can be given as far as a run may change them. `plain`: no live view on
    a terminal.

    The memory budget holds from this call on; a note says what of this process it does not cover. Raises InputError,
    with one sentence, for anything that the caller can mend.
    """
    words = dict(settings)
    factories: dict[str, Callable[..., Any]] = {}
    for name, network in (("encoder", encoder), ("head", head)):
        if callable(network):
            factories[name] = network
        elif network is not None:
            words[name] = network
    if not isinstance(resume, bool):
        words["out"] = str(resume)
        resume = True
    asked = read(Config, words)
    told: list[str] = []
    if isinstance(config, Config):
        whole = configured(asked, base=config, cuda=_cuda)
    else:
        file = None if config is None else Path(config)
        whole = settings_of(asked, file, _cuda, resume)
        told = [] if resume else preset_note(asked, file, whole)
    from lofi_fast.run.early import check_early

    check_early(whole, resume)
    from lofi_fast.memory.settle import settle_here  # from here on torch is needed

    notes = [*told, *settle_here()]
    from lofi_fast.run.networks import Networks
    from lofi_fast.stages.job import run_job

    networks = Networks(**factories) if factories else None
    return _reported(
        run_job(whole, resume=resume, networks=networks, argv=flags_of(asked, resume), notes=notes, plain=plain)
    )


def flags_of(asked: Mapping[str, Any], resume: bool) -> list[str]:
    """The command line that says the same as values by name, for the log and the report."""
    flags = [leaf.argument(asked[leaf.name]) for leaf in leaves(Config) if leaf.name in asked]
    return [*flags, *(["--resume"] if resume else [])]


def _cuda() -> bool:
    import torch

    return torch.cuda.is_available()


def _reported(finished: Finished) -> Trained:
    """Write the report of a finished job, and say what there is."""
    from lofi_fast.memory.settle import give_back
    from lofi_fast.report.page import write_report

    folder = finished.folder
    if not finished.first:
        return Trained(folder, finished.metrics)
    give_back()
    write_report(folder)
    print(f"trained in {finished.seconds:.0f} s; written:")
    for name in WRITTEN:
        if (folder / name).exists():
            print(f"  {folder / name}")
    return Trained(folder, finished.metrics)


def main(argv: Sequence[str] | None = None, *, owns_process: bool = False) -> int:
    """The command; returns its exit status. `owns_process`: this Python was started for it, so that the allocators may
    be settled for the whole process, which on a GPU means to start it once more.
    """
    return run(lambda: _command(list(sys.argv[1:] if argv is None else argv), owns_process))


def read_flags(argv: Sequence[str], cuda: Callable[[], bool] | None = None) -> tuple[Config, bool]:
    """(config, resume) of the command's flags; `cuda` says whether a GPU is at hand (None: torch is asked).

    Raises as `command.parse` does.
    """
    return _read_flags(argv, cuda or _cuda)[:2]


def _read_flags(argv: Sequence[str], cuda: Callable[[], bool]) -> tuple[Config, bool, bool, list[str]]:
    """(config, resume, plain, sentences on what was chosen by default)."""
    words = given(TrainFlags, spelled_out(argv), prog="lofi-fast train", description=DESCRIPTION, shown=_shown)
    own = read(TrainFlags, {name: words.pop(name) for name in ("resume", "config", "plain") if name in words})
    resume: bool = own.get("resume", False)
    config = settings_of(words, own.get("config"), cuda, resume)
    told = [] if resume else preset_note(words, own.get("config"), config)
    return config, resume, own.get("plain", False), told


def spelled_out(argv: Sequence[str]) -> list[str]:
    """A command line with `--resume DIR` written as `--resume --out DIR`."""
    words: list[str] = []
    for before, word in zip(["", *argv], argv, strict=False):
        if before == "--resume" and not word.startswith("-"):
            words.append("--out")
        words.append(word)
    return words


def settings_of(words: Mapping[str, Any], file: Path | None, cuda: Callable[[], bool], resume: bool) -> Config:
    """The settings that flags or keywords, a file of settings, and a preset make; with `resume` the run's own stand in
    the place of the preset's. Raises InputError.
    """
    if not resume:
        return configured(words, file=file, cuda=cuda)
    from lofi_fast.run.folder import choose_folder, require_run

    asked = {} if file is None else read(Config, file_of_settings(file), f"{file}: ")
    asked |= read(Config, words)
    folder = Path(asked["out"]) if asked.get("out") else choose_folder(configured(words, file=file, cuda=cuda), True)
    if not (folder / "config.json").exists():  # refused with the folder, after what is wrong with the settings
        return configured(words, file=file, cuda=cuda)
    require_run(folder)
    own = replace(Config.read(folder / "config.json"), out=str(folder))
    # Another preset is another run, which a run that has not trained yet may become.
    base = own if asked.get("preset", own.preset) == own.preset else None
    return replace(configured(asked, base=base, cuda=cuda), out=str(folder))


def _command(argv: list[str], owns_process: bool) -> int:
    config, resume, plain, notes = _read_flags(argv, _cuda)
    from lofi_fast.run.early import check_early

    check_early(config, resume)
    if owns_process:
        from lofi_fast.memory.settle import settle_allocator

        settle_allocator("lofi_fast.train", argv)
    from lofi_fast.run.stop import Stop, Stopped
    from lofi_fast.stages.job import run_job

    stop = Stop()
    try:
        with stop.on_signals():
            finished = run_job(config, resume=resume, argv=argv, notes=notes, stop=stop, plain=plain)
    except Stopped as stopped:
        again = "nothing was begun"
        if stop.folder is not None:
            again = f"go on with: lofi-fast train --resume {shlex.quote(str(stop.folder))}"
        if speaks():
            by = "a signal to another process" if stopped.signal is None else stopped.signal.name
            print(f"stopped by {by}; {again}")
        return INTERRUPTED if stopped.signal is signal.SIGINT else 0
    _reported(finished)
    return 0


def _shown(words: Mapping[str, Any]) -> TrainFlags:
    return TrainFlags(shown_defaults(words, "demo"))


sys.modules[__name__].__class__ = CallableModule

if __name__ == "__main__":
    sys.exit(main(owns_process=True))

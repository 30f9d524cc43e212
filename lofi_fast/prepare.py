"""The command `prepare`, and `lofi_fast.prepare`: fill the frame cache without training.

    lofi-fast prepare --annotations a.json --videos v/ --cache c/
    lofi-fast prepare ... --shard 3/64        # one of 64 tasks, on any machine that sees the folders
    torchrun --nproc-per-node 4 -m lofi_fast.prepare ...

Training with the same settings then decodes nothing. Any number of processes may work in one folder.
"""

from __future__ import annotations

import math
import os
import sys
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from datetime import datetime
from itertools import islice
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from rich.console import Console

from lofi_fast.budget import duration, resolve_budget
from lofi_fast.command import INTERRUPTED, CallableModule, given, run
from lofi_fast.config import Config
from lofi_fast.data.cache import CacheRequest, Skipped, entry_path, lookup
from lofi_fast.data.cache import prepare as fill
from lofi_fast.data.cache_size import cache_bytes
from lofi_fast.data.catalogue import Catalogue
from lofi_fast.data.inventory import Entry, cache_folder, inventory, of_run, remove
from lofi_fast.data.packages import require_pyav
from lofi_fast.data.pictures import hold_in_turn
from lofi_fast.data.survey import Requests, cache_side, survey
from lofi_fast.data.video import VideoError
from lofi_fast.errors import InputError, printable
from lofi_fast.precision import choose_device
from lofi_fast.presets import FILE, configured, preset_note, shown_defaults
from lofi_fast.run.folder import is_held
from lofi_fast.run.log import Terminal
from lofi_fast.settings import Section, Setting, read

DESCRIPTION = (
    "Fill the frame cache without training, on one machine or many; training with the same settings then decodes "
    "nothing. Takes the flags of lofi-fast train too. The status is 1 where some videos could not be used "
    "(0 in a rank of torchrun, which would end the others)."
)
PREPARE = "prepare"  # heading of --help
SAMPLE_SECONDS = 10.0  # of a video, that are decoded for the forecast of the time
SAMPLE_TRIES = 3  # videos, until one decodes
OWN = ("shard", "verify", "list", "clean_run", "clean_days", "config")


@dataclass(frozen=True)
class Shard:
    """The part `number` (1 to `count`) of all videos."""

    number: int = 1
    count: int = 1

    @staticmethod
    def parse(text: str) -> Shard:
        """ "3/64". Raises InputError."""
        number, _, count = text.partition("/")
        if not (number.isascii() and number.isdigit() and count.isascii() and count.isdigit()):
            raise InputError(f'--shard "{text}": write which of how many, like 3/64')
        if len(text) > 20 or not 1 <= int(number) <= int(count):
            raise InputError(f"--shard {text}: the shards of {count[:20]} are numbered from 1 to {count[:20]}")
        return Shard(int(number), int(count))

    def __str__(self) -> str:
        return f"{self.number}/{self.count}"

    def of_rank(self, rank: int, ranks: int) -> Shard:
        """The part of this shard that one of several processes takes."""
        return Shard((self.number - 1) * ranks + rank + 1, self.count * ranks)

    def names(self, names: Sequence[str]) -> list[str]:
        """The share of names, in their order; the shares of all shards are every name once."""
        return sorted(names)[self.number - 1 :: self.count]


@dataclass(frozen=True)
class PrepareFlags:
    """What the command line may say: what to do, and every setting of a run."""

    settings: Annotated[Config, Section("settings", flat=True)]
    shard: Annotated[
        Shard | None,
        Setting(
            "take this part of the videos: K of N, from 1 on. Processes of torchrun share what is theirs", "K/N",
            group=PREPARE, parse=Shard.parse, unset="all",
        ),
    ] = None  # fmt: skip
    verify: Annotated[
        bool, Setting("read all pictures that are there, name the damaged files, make them anew", group=PREPARE)
    ] = False
    list: Annotated[bool, Setting("say what the cache holds, for which runs; needs no data", group=PREPARE)] = False
    clean_run: Annotated[
        Path | None,
        Setting("remove what the run in DIR has used and no other run does", "DIR", group=PREPARE, unset="nothing"),
    ] = None
    clean_days: Annotated[
        float | None,
        Setting("remove what no run has begun with for so many days", "DAYS", group=PREPARE, unset="nothing"),
    ] = None
    config: Annotated[Path | None, FILE] = None


@dataclass(frozen=True)
class Prepared:
    """What `lofi_fast.prepare` gives back, of the videos of its shard.

    cache: the folder for `--cache`. complete: videos that are in it. made: those of them that were decoded meanwhile,
    here or by processes beside this one. damaged: names of files that --verify found damaged and that were made anew
    where that could be done.
    """

    cache: Path
    complete: int
    made: int
    skipped: tuple[Skipped, ...]
    damaged: tuple[str, ...] = ()


def prepare(
    *, shard: str | None = None, verify: bool = False, config: str | Path | Config | None = None, **settings: Any
) -> Prepared:
    """Fill the frame cache as the command does: `lofi_fast.prepare(annotations="a.json", videos="v/", cache="c/")`.

    `config` and `settings` as `lofi_fast.train` takes them, `shard` like "3/64". Raises InputError, with one sentence,
    where no training could start with these data, and for a folder that cannot be written.
    """
    asked = read(Config, settings)
    part = Shard() if shard is None else Shard.parse(shard)
    terminal = Terminal(Console(quiet=True))
    if isinstance(config, Config):
        return _filled(configured(asked, base=config, cuda=_cuda), part, verify, terminal)
    file = None if config is None else Path(config)
    return _filled(configured(asked, file=file, cuda=_cuda), part, verify, terminal)


def _cuda() -> bool:
    import torch

    return torch.cuda.is_available()


def _frames_of(config: Config) -> Path:
    """The folder of entries that a training with these settings uses."""
    return cache_folder(replace(config, out=config.out or str(Path("runs") / config.preset))) / "frames"


def _filled(config: Config, shard: Shard, verify: bool, terminal: Terminal) -> Prepared:
    """See `prepare`; tells `terminal` how it goes."""
    if not config.data.annotations or not config.data.videos:
        raise InputError("prepare decodes your videos: add --annotations FILE --videos DIR")
    require_pyav()
    folder, side = _frames_of(config), cache_side(config.full)
    known = Catalogue(folder)
    here = _Place.of_environment(config.threads)
    shard, workers = shard.of_rank(here.rank, here.ranks), here.workers
    with terminal.progress("looking at the videos", 1) as advance:
        found = survey(
            config, Path(config.data.annotations), Path(config.data.videos),
            lambda done, total, name: advance(done, name, total), known,
        )  # fmt: skip
    for note in (*found.warnings, *(f"note: {note}" for note in found.notes)):
        terminal.say(note)
    if found.refused is not None:
        raise InputError(found.refused)
    known.save()
    mine = set(shard.names([*(one.name for one in found.videos), *(one.name for one in found.skipped)]))
    skipped = [one for one in found.skipped if one.name in mine]
    requests = Requests(found, frozenset(mine - {one.name for one in skipped}))

    damaged = _damaged(requests, folder, side, workers, terminal) if verify else []
    for sentence in damaged:
        terminal.say(sentence)
    there = lookup(requests, folder, side, known)
    missing = [request for request in requests if request.name not in there]
    engine, engine_workers = _engine(config, here) if missing else (None, 0)
    part = f", shard {shard}" if shard.count > 1 else ""
    terminal.say(f"frame cache {folder}{part}: {len(there)} of {len(requests)} videos are there")
    if missing:
        size = sum(cache_bytes(found, {request.name for request in missing}).values())
        seconds = _forecast(missing, side, workers)
        told = "" if seconds is None else f", about {duration(seconds)} on {workers} core{'s' if workers > 1 else ''}"
        if told and engine is not None:
            told += f" alone; the video engine of {engine} decodes what it can"
        terminal.say(f"to decode: {len(missing)} videos, about {size / 1e6:,.1f} MB{told}")
    began = time.monotonic()
    notes: list[str] = []
    with terminal.progress("frame cache", 1) as advance:
        cached, undecodable = fill(
            requests, folder, side, workers if engine is None else min(workers, engine_workers),
            lambda done, total, name: advance(done, name, total), engine, notes.append, alone=False, known=known,
        )  # fmt: skip
    for note in notes:
        terminal.say(f"note: {note}")
    known.save()
    skipped += undecodable
    for one in skipped:
        terminal.say(f"skipped: {one.name}: {one.reason}")
    made = len(set(cached) - set(there))
    terminal.say(
        f"{len(cached)} videos are in the frame cache, {made} of them decoded now, here or by others beside, in "
        f"{duration(time.monotonic() - began)}; {len(skipped)} skipped"
    )
    return Prepared(folder.parent, len(cached), made, tuple(skipped), tuple(damaged))


@dataclass(frozen=True)
class _Place:
    """This process among those of torchrun and the like: `rank` of `ranks`, `local_rank` of the `neighbours` on this
    machine, and how many processes may decode for it.
    """

    rank: int
    ranks: int
    local_rank: int
    neighbours: int
    workers: int

    @staticmethod
    def of_environment(threads: int | None) -> _Place:
        """`threads`: what the settings say, or None. Raises InputError for what launchers never say."""
        numbers = {}
        for name, least, default in (
            ("WORLD_SIZE", 1, 1), ("RANK", 0, 0), ("LOCAL_WORLD_SIZE", 1, 1), ("LOCAL_RANK", 0, 0)
        ):  # fmt: skip
            text = os.environ.get(name, str(default))
            if not (text.isascii() and text.isdigit() and int(text) >= least):
                raise InputError(f"{name}={text} in the environment: must be a whole number; unset it, or use torchrun")
            numbers[name] = int(text)
        for which, count in (("RANK", "WORLD_SIZE"), ("LOCAL_RANK", "LOCAL_WORLD_SIZE")):
            if numbers[which] >= numbers[count]:
                raise InputError(
                    f"{which}={numbers[which]} in the environment is not below {count}={numbers[count]}; unset it, or "
                    "use torchrun"
                )
        cores, neighbours = len(os.sched_getaffinity(0)), numbers["LOCAL_WORLD_SIZE"]
        return _Place(
            numbers["RANK"], numbers["WORLD_SIZE"], numbers["LOCAL_RANK"], neighbours,
            threads or max(1, cores // neighbours),
        )  # fmt: skip


def _engine(config: Config, here: _Place) -> tuple[str | None, int]:
    """What decodes, as in training: (device of a video engine, processes that decode there), (None, 0) for PyAV. The
    processes of a machine take its cards in turn, and share the memory of one.
    """
    if config.data.decoder == "pyav" or choose_device(config.device).type != "cuda":
        return None, 0
    import torch

    from lofi_fast.memory.settle import open_meter
    from lofi_fast.stages.job import video_engine

    cards = torch.cuda.device_count()
    torch.cuda.set_device(here.local_rank % cards)
    meter = open_meter(torch.device("cuda", here.local_rank % cards))
    budget = resolve_budget(config.budget, meter.total(), meter.available())
    room = min(budget, meter.available()) - meter.own()
    return video_engine(config, room // math.ceil(here.neighbours / cards))


def _damaged(requests: Requests, folder: Path, side: int, workers: int, terminal: Terminal) -> list[str]:
    """A sentence about each entry that is not as it was written. Its index is removed: it will be made anew."""
    there = lookup(requests, folder, side)
    sentences = []
    for request in requests:
        index = entry_path(request, folder, side).with_suffix(".npz")
        if request.name not in there and index.exists():
            sentences.append(f"damaged: {index} is not an index of its pictures; it is made anew")

    def checked(name: str) -> str | None:
        entry = there[name]
        try:
            for start in range(0, len(entry.frames), 64):
                entry.read(np.arange(start, min(start + 64, len(entry.frames))))
        except InputError as error:
            entry.path.with_suffix(".npz").unlink(missing_ok=True)
            return f"damaged: {error}".partition("; ")[0] + "; it is made anew"
        return None

    with terminal.progress("verifying", 1) as advance, ThreadPoolExecutor(workers) as pool:
        for number, (name, sentence) in enumerate(zip(there, pool.map(checked, there), strict=True), 1):
            if sentence is not None:
                sentences.append(sentence)
            advance(number, name, len(there))
    return sentences


def _forecast(requests: Sequence[CacheRequest], side: int, workers: int) -> float | None:
    """Seconds that `workers` processes need for `requests`, by the first seconds of a middling video; None where
    that says nothing.
    """
    work = {request.name: _work(request, len(request.frames)) for request in requests}
    by_work = sorted(requests, key=lambda request: work[request.name])
    middle = len(by_work) // 2
    for request in islice((*by_work[middle:], *by_work[:middle]), SAMPLE_TRIES):
        pts = request.info.pts[request.frames]
        count = max(1, int((pts <= pts[0] + SAMPLE_SECONDS).sum()))
        began = time.perf_counter()
        try:
            for _ in hold_in_turn(request.info, [request.frames[:count]], side, threads=1):
                pass
        except VideoError:
            continue
        rate = (time.perf_counter() - began) / _work(request, count)
        return max(rate * sum(work.values()) / workers, rate * max(work.values()))
    return None


def _work(request: CacheRequest, count: int) -> float:
    """Pixels that are decoded for the first `count` pictures: of all frames up to the last of them."""
    return float(request.frames[count - 1] + 1) * request.info.width * request.info.height


def main(argv: Sequence[str] | None = None) -> int:
    """Fill, list or clean; 0 when all videos are in the cache, 1 when some could not be used, 2 for what would be
    refused.
    """
    return run(lambda: _command(argv))


def _command(argv: Sequence[str] | None) -> int:
    words = given(PrepareFlags, argv, prog="lofi-fast prepare", description=DESCRIPTION, shown=_shown_defaults)
    own = read(PrepareFlags, {name: words.pop(name) for name in OWN if name in words})
    keeps = own.get("list") or "clean_run" in own or "clean_days" in own
    terminal = Terminal()
    if keeps:
        if clash := [f"--{name}" for name in ("shard", "verify") if own.get(name)]:
            raise InputError(f"{clash[0]} fills the cache, and --list and --clean look after it: one at a time")
        _keep(_frames_of(configured(words, file=own.get("config"), cuda=_cuda)), own, terminal)
        return 0
    config = configured(words, file=own.get("config"), cuda=_cuda)
    for note in preset_note(words, own.get("config"), config):
        terminal.say(f"note: {note}")
    try:
        done = _filled(config, own.get("shard") or Shard(), own.get("verify", False), terminal)
    except KeyboardInterrupt:
        print("\ninterrupted; the same command goes on from here", file=sys.stderr)
        return INTERRUPTED
    # a launcher ends all ranks at the first status that is not 0, and the others have videos to decode
    return 1 if done.skipped and os.environ.get("WORLD_SIZE", "1") == "1" else 0


def _keep(frames: Path, own: Mapping[str, Any], terminal: Terminal) -> None:
    """Remove what is asked for, and say what there is."""
    entries = inventory(frames)
    folder, days = own.get("clean_run"), own.get("clean_days")
    if folder is not None or days is not None:
        chosen = entries if folder is None else of_run(entries, folder)
        if days is not None:
            chosen = [entry for entry in chosen if entry.used < time.time() - 86_400 * days]
        training = [run for run in sorted({run for entry in chosen for run in entry.runs}) if is_held(Path(run))]
        for run in training:
            needed = [entry for entry in chosen if run in entry.runs]
            terminal.say(f"note: {len(needed)} of these entries stay: {run} is trained in, and reads them")
            chosen = [entry for entry in chosen if run not in entry.runs]
        remove(frames, chosen)
        terminal.say(f"{len(chosen)} entries removed, {sum(entry.bytes for entry in chosen) / 1e6:,.1f} MB")
        entries = inventory(frames)
    terminal.say(printable("\n".join(_listed(frames, entries))))


def _listed(frames: Path, entries: Sequence[Entry]) -> list[str]:
    total = sum(entry.bytes for entry in entries)
    lines = [f"frame cache {frames}: {len(entries)} entries, {total / 1e6:,.1f} MB"]
    for name in sorted({one for entry in entries for one in entry.runs}):
        mine = [entry for entry in entries if name in entry.runs]
        lines.append(f"{name}{'' if Path(name).is_dir() else ' (gone)'}: {_amount(mine)}")
    if rest := [entry for entry in entries if not entry.runs]:
        lines.append(f"of no run: {_amount(rest)}")
    return lines


def _amount(entries: Sequence[Entry]) -> str:
    last = datetime.fromtimestamp(max(entry.used for entry in entries)).strftime("%Y-%m-%d %H:%M")
    size = sum(entry.bytes for entry in entries)
    return f"{len(entries)} entries, {size / 1e6:,.1f} MB, last used {last}"


def _shown_defaults(words: Mapping[str, Any]) -> PrepareFlags:
    return PrepareFlags(shown_defaults(words, "small"))


sys.modules[__name__].__class__ = CallableModule

if __name__ == "__main__":
    sys.exit(main())

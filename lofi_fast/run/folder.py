"""The run folder: chosen, checked for whether this command may use it, cleaned up when the run is refused early."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shlex
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

from lofi_fast import files
from lofi_fast.config import STAGES, Config
from lofi_fast.errors import InputError
from lofi_fast.files import DISK_FULL
from lofi_fast.model_file import MODEL, hint_of_run
from lofi_fast.run import events
from lofi_fast.settings import leaves

LEFT = ("checkpoints/last.pt", "checkpoints/previous.pt", "checkpoints/best.pt", "metrics.json")  # by what was trained
NO_LOCKS = (errno.ENOTSUP, errno.ENOSYS, errno.ENOLCK, errno.EBADF)  # the last: NFS, which locks no folder


def choose_folder(config: Config, resume: bool) -> Path:
    """The run folder: --out, or runs/<preset>, numbered when that one is taken; with --resume the newest of these."""
    if config.out:
        asked = Path(config.out)
        if (asked / "config.json").exists() and not resume:
            raise InputError(f"{asked} already holds a run: go on with it by --resume, or name another --out")
        if holds_run(asked) and not resume:
            raise InputError(f"{asked} already holds a run, whose config.json is gone; {_put_back(asked)}")
        return asked
    asked = Path("runs") / config.preset
    numbered = [asked, *(asked.with_name(f"{asked.name}-{n}") for n in range(2, 10_000))]
    used = [folder for folder in numbered if (folder / "config.json").exists()]
    if resume and used:
        return max(used, key=lambda folder: (folder / "config.json").stat().st_mtime)
    return next(folder for folder in numbered if not holds_run(folder))


def holds_run(folder: Path) -> bool:
    """Whether there is anything of a run that another one would replace, be it without its config.json."""
    return any((folder / name).exists() for name in ("config.json", MODEL, "metrics.json")) or has_trained(folder)


def require_run(folder: Path) -> None:
    """Raises InputError when there is no run in the folder."""
    try:
        before = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        before = None
    if not isinstance(before, dict):
        hint = _put_back(folder) if holds_run(folder) else hint_of_run(folder, "config.json")
        raise InputError(f"{folder}: no run to resume (no readable config.json); {hint}")


def _put_back(folder: Path) -> str:
    """What to do about a config.json that is damaged or gone, whose text a checkpoint holds as well."""
    config = folder / "config.json"
    last = next((folder / name for name in LEFT[:2] if (folder / name).exists()), None)
    if last is None:
        return "put it back as it was, or name another --out"
    text = "import sys, torch; print(torch.load(sys.argv[1])['config'])"
    command = f'python -c "{text}" {shlex.quote(str(last))} > {shlex.quote(str(config))}'
    return f"put it back as it was, by: {command}, or name another --out"


def has_checkpoint(config: Config) -> bool:
    """Whether the run in --out has a checkpoint to go on from; one that ended before its first may start again.

    Raises InputError when it is not the run of this command, or its checkpoint is unusable, or gone.
    """
    folder = Path(config.out)
    if not any((folder / name).exists() for name in LEFT):
        if logged(folder, events.Saved):
            raise InputError(
                f"{folder}: its log.jsonl tells of checkpoints, and none is there: put them back in "
                f"{folder / 'checkpoints'}, or train anew with another --out"
            )
        return False
    before = Config.read(folder / "config.json")
    if changes := differences(before, config):
        raise InputError(
            f"{folder}: this run was started with {'; '.join(changes)}; give --resume the flags that it was started "
            "with, or none, or train another run in another --out"
        )
    from lofi_fast.run import checkpoint  # imports torch, which what is refused above does not wait for

    content, path, _ = checkpoint.load_newest(folder / "checkpoints")
    trained = Config.from_json(content["config"], str(path)) if "config" in content else before
    if changes := differences(trained, config):
        raise InputError(
            f"{folder}: its config.json is not what {path.name} was trained with, which is {'; '.join(changes)}; put "
            "config.json back as it was, or train another run in another --out"
        )
    done = STAGES.index(content["position"].get("stage", STAGES[0]))
    for stage, section in (("pretrain", "pretrain"), ("joint", "joint"), ("head", "head_stage")):
        # The stages after it rest on what it has learned; only on the head's nothing is built.
        rested_on = STAGES.index(stage) < (done if stage != "head" else 0)
        then, now = getattr(before, section).epochs, getattr(config, section).epochs
        if rested_on and stage in before.stages and then != now:
            raise InputError(
                f"{folder}: --{stage}-epochs {then}, not {now}: this stage is done, and what came after rests on it; "
                "leave that flag out at --resume, or train another run in another --out"
            )
        if (taken := _epochs_taken(stage, content["position"], trained)) > now:
            raise InputError(
                f"{folder}: --{stage}-epochs {now}: its {stage} stage has trained for {taken} already; give --resume "
                f"{taken} or more, or train another run in another --out"
            )
    return True


def _epochs_taken(stage: str, position: Mapping[str, Any], trained: Config) -> int:
    """How many epochs of a stage the weights of a checkpoint have been through, one that is under way among them."""
    if position.get("stage") == stage:
        return int(position["epoch"] + (position["step"] > 0))
    done = STAGES.index(position.get("stage", STAGES[0])) > STAGES.index(stage)
    epochs: int = {"head": trained.head_stage.epochs}.get(stage, 0)  # those of other stages that are done are compared
    return epochs if done and stage in trained.stages else 0


def differences(before: Config, now: Config) -> list[str]:
    """The settings that differ and must not, like "--width 8, not 16"."""
    return [
        f"{leaf.flag} {leaf.text(leaf.of(before))}, not {leaf.text(leaf.of(now))}"
        for leaf in leaves(Config)
        if not leaf.may_change and leaf.of(before) != leaf.of(now)
    ]


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold a run folder for this process alone; the lock goes when the process ends, however it ends.

    Raises InputError when another process holds it. On a file system that has no locks nothing is held.
    """
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(
                f"{folder}: another process is training there; wait until it has ended, or name another --out"
            ) from None
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise
        yield
    finally:
        os.close(descriptor)


def is_held(folder: Path) -> bool:
    """Whether a process is training in a run folder, as far as this machine can know."""
    try:
        with locked(folder):
            return False
    except InputError:
        return True
    except OSError:  # no such folder, or one that this user may not open
        return False


def take_lock(folder: Path, seconds: float) -> bool:
    """Hold a run folder, from now to the end of this process, whose holder is ending. False where another process holds
    it for `seconds` more, and on a file system that has no locks.
    """
    descriptor, deadline = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC), time.monotonic() + seconds
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            if time.monotonic() < deadline:
                time.sleep(0.1)
                continue
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise
        os.close(descriptor)
        return False


@contextmanager
def run_folder(config: Config, resume: bool) -> Iterator[tuple[Path, bool]]:
    """(the run folder, whether there is a checkpoint to go on from): made, locked, marked as taken with the config, and
    seen to be writable.

    When a new run is refused before it has trained anything, what it wrote is removed: the next may want the name.
    Raises InputError as `require_run`, `locked` and `has_checkpoint` do, and when the folder cannot be written.
    """
    folder = Path(config.out)
    made = not os.path.exists(folder)
    if resume:
        require_run(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _cannot_write(folder, error) from None
    with locked(folder):
        going_on = resume and has_checkpoint(config)
        _take(folder, config, going_on, made)
        try:
            yield folder, going_on
        except Exception as error:
            if isinstance(error, OSError) and error.errno in (*DISK_FULL, errno.EFBIG):
                error.filename = error.filename or str(folder)  # a failed write does not say where
            if not resume and not has_trained(folder):
                discard(folder, ["plan.json", "environment.json", "data.json", "log.jsonl", "config.json"], made)
            raise


def _take(folder: Path, config: Config, going_on: bool, made: bool) -> None:
    """Write the config, or, where the run's own stays until all is restored, see that it could be written."""
    content = config.to_json().encode() + b"\n"
    try:
        if going_on:
            files.sweep(folder)
            with TemporaryFile(dir=folder) as probe:  # whether there is room and permission to write
                probe.write(content)
        else:
            files.write_bytes(folder / "config.json", content)
    except (OSError, InputError) as error:
        discard(folder, [], made)
        if isinstance(error, InputError):
            raise
        raise _cannot_write(folder, error) from None


def _cannot_write(folder: Path, error: OSError) -> InputError:
    mend = "free some space or change --out" if error.errno in DISK_FULL else "change --out"
    return InputError(f"{folder}: cannot write there ({files.reason_of(error, folder / 'config.json')}); {mend}")


def has_trained(folder: Path) -> bool:
    """Whether a run has done anything that would have to be done again."""
    return any((folder / "checkpoints").glob("*.pt")) or logged(folder, events.Step)


def logged(folder: Path, kind: type[events.Event]) -> bool:
    """Whether a run's log has an event of a kind."""
    log = folder / "log.jsonl"
    if not log.exists():
        return False
    with log.open(encoding="utf-8", errors="replace") as lines:
        return any(isinstance(event, kind) for event in events.read(lines))


def discard(folder: Path, names: Sequence[str], made: bool) -> None:
    """Remove files of a run that came to nothing, and the folder if it was `made` for it."""
    with suppress(OSError):
        for name in names:
            (folder / name).unlink(missing_ok=True)
        if made:
            folder.rmdir()

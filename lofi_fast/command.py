"""What all commands share: their flags, out of a dataclass of settings, and how they end.

`parse` makes flags and help with tyro; `run` turns what the user can mend into one sentence and status 2. Importing
this file imports no torch.
"""

from __future__ import annotations

import errno
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, dataclass
from difflib import get_close_matches
from io import TextIOWrapper
from types import ModuleType
from typing import Annotated, Any, TypeVar

from lofi_fast.errors import InputError, printable
from lofi_fast.files import DISK_FULL
from lofi_fast.settings import GONE, Leaf, applied, leaves, made, negated, read

T = TypeVar("T")
INTERRUPTED = 130  # the shell's status of a process that Ctrl-C ended
SPEAKING_SECONDS = 1.0  # that a silent process waits before it ends: torchrun would end the one that speaks, too
HELP = ("-h", "--help")
SPINS = 3000  # rounds that a waiting thread goes before it sleeps
UNWRITABLE = (*DISK_FULL, errno.EFBIG, errno.EACCES, errno.EPERM, errno.EROFS)
PLACES = ("FILE", "DIR", "RUN")  # units of what has a name on the disk
ELSEWHERE = {  # what other programs call a setting
    "gpu": "device", "gpus": "device", "memory": "mem-budget", "mem": "mem-budget", "vram": "mem-budget",
    "max-memory": "mem-budget", "labels": "annotations", "labelled": "annotations",
    "data-dir": "videos", "video-dir": "videos", "output": "out", "output-dir": "out", "save-dir": "out",
    "batch-size": "batch", "weights": "encoder-weights", "pretrained": "encoder-weights", "model": "encoder",
    "resolution": "fidelity", "size": "fidelity", "workers": "threads", "num-workers": "threads", "fp16": "precision",
    "amp": "precision", "gt": "ground-truth", "prediction": "predictions", "continue": "resume",
}  # fmt: skip


def parse(settings: type[T], argv: Sequence[str] | None, *, prog: str, description: str, default: T | None = None) -> T:
    """An instance of `settings` out of a command line (None: this process's). What it does not give is as in `default`,
    or else as the fields' own defaults.

    Raises InputError for a mistyped flag, a value that cannot be, or a setting that is missing; --help prints the help
    and raises SystemExit(0).
    """
    values = read(settings, given(settings, argv, prog=prog, description=description, shown=lambda _: default))
    return made(settings, values) if default is None else applied(default, values)


def given(
    settings: type[T],
    argv: Sequence[str] | None,
    *,
    prog: str,
    description: str,
    shown: Callable[[Mapping[str, Any]], T | None],
) -> dict[str, Any]:
    """{name: text, or bool} of the settings that a command line gives; of two equal flags the last counts.

    `shown` says whose values --help shows as defaults, from what else the command line gives. Raises as `parse` does.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    rest = [word for word in words if word not in HELP]
    table = leaves(settings)
    _refuse_empty(table, rest)
    for word in rest:  # tyro would take the value of a flag that has none for a word by itself
        if "=" in word and any(word.partition("=")[0] in _spellings(leaf) for leaf in table if leaf.type is bool):
            raise InputError(f"{word}: {word.partition('=')[0]} takes no value; --help lists the flags")
    try:
        found, unknown = _ask(table, None, rest, prog=prog, console_outputs=False)
    except SystemExit:
        raise InputError(_without_value(table, rest)) from None
    flags = {word.partition("=")[0].replace("_", "-") for word in rest}
    known: dict[str, Any] = {}
    for leaf, value in zip(table, found, strict=True):
        if isinstance(value, _Text) and value.given:
            known[leaf.name] = value.text
        elif isinstance(value, bool) and flags & _spellings(leaf):
            known[leaf.name] = value
    if rest != words:
        _ask(table, shown(known), ["--help"], prog=prog, description=description)
    several = next((leaf for leaf in table if leaf.setting.positional and leaf.is_tuple), None)
    if several is not None and unknown and not any(word.startswith("-") for word in unknown):
        known[several.name] = (*known.get(several.name, ()), *unknown)  # those after a flag that stands between
    elif unknown:
        raise InputError(_unknown(table, unknown[0], rest))
    return known


@dataclass(frozen=True)
class _Text:
    """What stands for a value while tyro reads a command line: its text, or the text of a default for --help."""

    text: str | tuple[str, ...]
    given: bool = False


def _ask(table: Sequence[Leaf], default: Any, argv: Sequence[str], **how: Any) -> tuple[list[Any], list[str]]:
    """(what tyro found for each setting: a text or a bool, words that are no flags).

    Raises SystemExit after --help, and for a flag without its value.
    """
    import tyro  # takes a twentieth of a second, which `lofi-fast --help` need not wait for
    from tyro.constructors import ConstructorRegistry, PrimitiveConstructorSpec, StructConstructorSpec, StructFieldSpec

    groups = {leaf.group: type("Group", (), {}) for leaf in table}
    everything = type("Everything", (), {})
    registry = ConstructorRegistry()

    def field(number: int, leaf: Leaf) -> Any:
        value = leaf.default if default is None else leaf.of(default)
        shown = "required" if value is MISSING else f"default: {leaf.shown(value)}"
        look = tyro.conf.arg(
            name=leaf.long[2:],
            aliases=(leaf.short,) if leaf.short else None,
            prefix_name=False,
            metavar=None if leaf.type is bool else leaf.unit,
            help=leaf.setting.help,
            help_behavior_hint=f"({shown})",
        )
        notes: list[Any] = [look]
        if leaf.setting.positional:
            notes.append(tyro.conf.Positional)
        if leaf.type is bool:
            if leaf.is_switch:
                notes.append(tyro.conf.FlagCreatePairsOff)
            return StructFieldSpec(f"leaf{number}", Annotated[(bool, *notes)], value is True)  # type: ignore[arg-type]
        several = leaf.setting.positional and leaf.is_tuple
        spec = PrimitiveConstructorSpec(
            nargs="*" if several else 1,
            metavar=leaf.unit,
            instance_from_str=lambda words: _Text(tuple(words) if several else words[0], given=True),
            is_instance=lambda value: isinstance(value, _Text),
            str_from_instance=lambda value: [str(value.text)],
        )
        return StructFieldSpec(f"leaf{number}", Annotated[(_Text, spec, *notes)], _Text(""))  # type: ignore[arg-type]

    @registry.struct_rule
    def struct(info: Any) -> StructConstructorSpec | None:
        if info.type is everything:
            boxes = [
                StructFieldSpec(f"group{k}", Annotated[kind, tyro.conf.arg(name=title)], tyro.MISSING_NONPROP)  # type: ignore[arg-type]
                for k, (title, kind) in enumerate(groups.items())
            ]
            return StructConstructorSpec(dict, tuple(boxes))
        for title, kind in groups.items():
            if info.type is kind:
                inside = [field(k, leaf) for k, leaf in enumerate(table) if leaf.group == title]
                return StructConstructorSpec(dict, tuple(inside))
        return None

    by_group, unknown = tyro.cli(everything, args=list(argv), registry=registry, return_unknown_args=True, **how)
    found = {name: value for group in by_group.values() for name, value in group.items()}
    return [found[f"leaf{number}"] for number in range(len(table))], unknown


def _spellings(leaf: Leaf) -> set[str]:
    """The flags of one setting; for a bool also those that say no."""
    flags = {flag for flag in (leaf.long, leaf.short) if flag and not leaf.setting.positional}
    if leaf.type is bool and not leaf.is_switch:
        flags |= {negated(flag) for flag in flags}
    return flags


def _refuse_empty(table: Sequence[Leaf], words: Sequence[str]) -> None:
    """Raises InputError for a file or folder without a name, as a shell gives for a variable that is not set."""
    if "" in words and any(leaf.setting.positional for leaf in table):
        before = words[max(words.index("") - 1, 0)]
        if not before.startswith("-"):
            raise InputError("one of the names given is empty; is a variable of the shell not set?")
    for word, following in zip(words, [*words, "--"][1:], strict=True):
        flag, given, value = word.partition("=")
        leaf = next((leaf for leaf in table if flag.replace("_", "-") in _spellings(leaf)), None)
        if leaf is not None and leaf.unit in PLACES and not (value if given else following):
            raise InputError(f"{flag} is empty: give {leaf.unit}, or leave it out; is a variable of the shell not set?")


def _unknown(table: Sequence[Leaf], word: str, words: Sequence[str]) -> str:
    flag = word.partition("=")[0]
    if not flag.startswith("-"):
        return _stray(table, word, words)
    if (name := flag[2:].replace("-", "_")) in GONE:
        return f"{flag} is gone: {GONE[name]}"
    near = _near(table, flag.lower().replace("_", "-").lstrip("-"))
    meant = f"; perhaps you meant {' or '.join(near)}" if near else ""
    return f"{flag} is no flag of this command{meant}; --help lists the flags"


def _near(table: Sequence[Leaf], asked: str) -> list[str]:
    """The flags that may be meant by one, without its dashes, that there is not."""
    flags = sorted({flag for leaf in table for flag in _spellings(leaf)})
    if (known := f"--{ELSEWHERE.get(asked, '')}") in flags:
        return [known]
    ends = [leaf.flag for leaf in table if leaf.name.rpartition(".")[2] == asked.replace("-", "_")]
    if ends:  # what several stages have, such as --lr
        return ends
    whole = [flag[2:] for flag in flags if "." in asked or "." not in flag]
    return [f"--{name}" for name in get_close_matches(asked, whole, n=1)]


def _stray(table: Sequence[Leaf], word: str, words: Sequence[str]) -> str:
    """A word that belongs to nothing: a second one after a flag that takes one, or one by itself."""
    place = words.index(word)
    before = next((k for k in range(place - 1, -1, -1) if words[k].startswith("--")), None)
    if before is not None and place > before + 1 and "=" not in words[before]:
        flag = words[before]
        leaf = next((leaf for leaf in table if flag.replace("_", "-") in _spellings(leaf)), None)
        if leaf is not None and leaf.type is not bool:
            one = f"one {leaf.unit}" if leaf.unit in PLACES else "one value"
            return f"{word!r} is one word too many: {flag} takes {one}; a value with a space in it needs quotes"
    if not word.strip():
        return "a word of the command line is empty; is a variable of the shell not set?"
    return f"{word!r} is no flag of this command; --help lists the flags"


def _without_value(table: Sequence[Leaf], words: Sequence[str]) -> str:
    takes = {flag: leaf for leaf in table if leaf.type is not bool for flag in _spellings(leaf)}
    for word, following in zip(words, [*words[1:], "--"], strict=True):
        leaf = takes.get(word.replace("_", "-"))
        if leaf is not None and following.startswith("--"):
            return f"{word} needs a value, {leaf.unit}; --help says which"
    return f"{' '.join(words)}: not a command line that can be read; --help lists the flags"


def run(main: Callable[[], int | None]) -> int:
    """The exit status of a command: what `main` returns (None: 0), 2 for what the user can mend, after one sentence on
    stderr, 130 when interrupted, and 1, in silence, when nobody reads its output any more (`... | head`).
    """
    _mend_streams()
    settle_threads()
    try:
        status = main() or 0
        sys.stdout.flush()
        return status
    except InputError as error:
        return _end(f"error: {error}", 2)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for the flush when Python ends
        return 1
    except OSError as error:
        if error.filename is None and error.errno in (*UNWRITABLE, errno.EIO):  # of a print
            return _end(f"error: the output cannot be written: {error.strerror}", 2)
        if error.filename is None or error.errno is None:
            raise
        mend = "change --out or --cache" if error.errno in UNWRITABLE else "name another place"
        mend += ", or free some space" if error.errno in DISK_FULL else ""
        return _end(f"error: {error.filename}: {error.strerror}; {mend}", 2)
    except (RuntimeError, MemoryError) as error:
        from lofi_fast.memory.meter import is_out_of_memory  # imports torch, which by now is there

        if not is_out_of_memory(error):
            raise
        return _end(
            f"error: memory ran out outside the planned steps ({' '.join(str(error).split())}); "
            "take a smaller --encoder, --width or --fidelity, or free some memory",
            2,
        )
    except KeyboardInterrupt:
        return _end("\ninterrupted", INTERRUPTED)


def settle_threads() -> None:
    """Let threads of libgomp, which torch computes with on a CPU, sleep soon where they wait for each other. To be
    called before torch is imported; settings of the user's are left as they are.

    By default one goes 300,000 rounds, some 14 ms, at each of a step's many meetings, and where others use the cores
    too that time is taken from the very thread that it waits for. A step of R18 over 128 frames of 64 px by two threads
    on two cores (seconds): alone 0.11, as by default; beside three busy processes 0.9, and by default 4 to 12. With
    1,000 rounds it is slower alone (0.14), with 10,000 beside others (1.2).
    """
    if not {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"} & os.environ.keys():
        os.environ["GOMP_SPINCOUNT"] = str(SPINS)


def _mend_streams() -> None:
    """Streams that can be written to: one that is closed (`>&-`) leads nowhere, and a letter that the terminal's
    encoding lacks is written out. Both would be tracebacks of a print.
    """
    if None in (sys.stdin, sys.stdout, sys.stderr):
        while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
            pass  # else a file of ours would take the number, and what libraries print
        os.close(descriptor)
        sys.stdin = sys.stdin or open(os.devnull)  # noqa: SIM115
        sys.stdout = sys.stdout or open(os.devnull, "w")  # noqa: SIM115
        sys.stderr = sys.stderr or open(os.devnull, "w")  # noqa: SIM115
    if isinstance(sys.stdout, TextIOWrapper) and sys.stdout.errors == "strict":
        sys.stdout.reconfigure(errors="backslashreplace")


def _end(sentence: str, status: int) -> int:
    if speaks():
        print(printable(sentence), file=sys.stderr)
    else:
        time.sleep(SPEAKING_SECONDS)
    return status


def speaks() -> bool:
    """Whether this process is the first of those that torchrun has started on its machine, which speaks for them; so
    is one that was started by itself.
    """
    return os.environ.get("LOCAL_RANK", "0") == "0"


class CallableModule(ModuleType):
    """The module of a command that is a function too: `lofi_fast.train(...)` calls `lofi_fast.train.train`, and
    `lofi_fast.train.main` stays what `python -m lofi_fast.train` runs.
    """

    def __call__(self, *args: Any, **keywords: Any) -> Any:
        return getattr(self, self.__name__.rpartition(".")[2])(*args, **keywords)

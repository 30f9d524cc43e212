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
from types import ModuleType
from typing import Annotated, Any, TypeVar

from lofi_fast.errors import InputError, printable
from lofi_fast.files import DISK_FULL
from lofi_fast.settings import GONE, Leaf, applied, leaves, made, negated, read

T = TypeVar("T")
INTERRUPTED = 130  # the shell's status of a process that Ctrl-C ended
SPEAKING_SECONDS = 1.0  # that a silent process waits before it ends: torchrun would end the one that speaks, too
HELP = ("-h", "--help")


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
        raise InputError(_unknown(table, unknown[0]))
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


def _unknown(table: Sequence[Leaf], word: str) -> str:
    flag = word.partition("=")[0]
    if not flag.startswith("-"):
        return f"{word!r} is no flag of this command; --help lists the flags"
    if (name := flag[2:].replace("-", "_")) in GONE:
        return f"{flag} is gone: {GONE[name]}"
    near = get_close_matches(flag.replace("_", "-"), sorted({f for leaf in table for f in _spellings(leaf)}), n=1)
    meant = f"; perhaps you meant {near[0]}" if near else ""
    return f"{flag} is no flag of this command{meant}; --help lists the flags"


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
        if error.errno not in (*DISK_FULL, errno.EACCES, errno.EPERM, errno.EROFS):
            raise
        where = f"{error.filename}: {error.strerror}"
        return _end(f"error: {where}; change --out or --cache, or free some space", 2)
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
        return _end("\ninterrupted; the same command with --resume goes on from the last checkpoint", INTERRUPTED)


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

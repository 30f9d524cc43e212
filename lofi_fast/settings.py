"""Settings: each is spelled once, as a field of a frozen dataclass, with what a reader and a program must know of it.

    @dataclass(frozen=True)
    class Stage:
        lr: Annotated[float, Setting("learning rate at the start")] = 0.1

    @dataclass(frozen=True)
    class Config:
        joint: Annotated[Stage, Section("joint stage", flags={"lr": "--joint-lr"})]

From such a dataclass come the flags of a command and their help (command.py), what a file of settings or the keywords
of a Python call may say (`read`), and what a resumed run may change. A word for the setting above is `joint.lr`, or a
mapping `joint` that has `lr`, or `joint_lr`, which is its short flag without the dashes.
"""

from __future__ import annotations

import dataclasses
import math
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from enum import Enum
from functools import cache
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import msgspec

from lofi_fast.errors import InputError

T = TypeVar("T")
NONE = "none"  # how a flag says None where a setting can be None
GONE = {  # settings that were there once, and what to do without them
    "policy": "every step takes the highest fidelity that fits, with as many videos at once as fit then; "
    "--micro-batch fixes their number",
}


@dataclass(frozen=True)
class Setting:
    """What stands beside a field's type.

    A number has to be finite and positive; `zero` allows 0 too, `below` is a bound that it stays under, and `most` the
    largest that it may be.
    """

    help: str
    unit: str = ""  # of the value, as --help shows it: SECONDS, FILE, ...; empty: the choices, or the kind of number
    flag: str = ""  # a short name, like "--window", beside the long one made of section and field
    group: str = ""  # heading in --help; empty: the section's
    unset: str = ""  # what None or an empty text means, in words
    zero: bool = False
    below: float = math.inf
    most: float = sys.maxsize
    parse: Callable[[str], Any] | None = None  # of a text, where the type alone does not say how; raises InputError
    show: Callable[[Any], str] = str  # the other way round
    positional: bool = False  # a word of the command line by itself, without a flag

    may_change: bool = False  # between a run and its --resume
    planned_for: bool = False  # memory is planned for this value: a resumed run may change it, and plans again
    memory: bool = False  # readings of memory that were taken at another value do not hold


@dataclass(frozen=True)
class Section:
    """What stands beside a field that is itself a dataclass of settings. `flags` and `memory` are by field name, for
    where one dataclass serves several sections; a `flat` section adds no word of its own to the long names.
    """

    title: str
    flags: Mapping[str, str] = field(default_factory=dict)
    memory: frozenset[str] = frozenset()
    flat: bool = False


@dataclass(frozen=True)
class Leaf:
    """One setting in its place. `path` is of field names; `name` is the path in words, without flat sections."""

    path: tuple[str, ...]
    name: str
    type: Any
    setting: Setting
    group: str
    short: str
    memory: bool
    default: Any  # dataclasses.MISSING where the field has none

    @property
    def long(self) -> str:
        return "--" + self.name.replace("_", "-")

    @property
    def flag(self) -> str:
        """The flag that a sentence names."""
        return self.unit if self.setting.positional else self.short or self.long

    @property
    def may_change(self) -> bool:
        return self.setting.may_change or self.setting.planned_for

    @property
    def is_switch(self) -> bool:
        """Whether it is there or not, and nobody has to say no: a command's own bool, off by default."""
        return self.type is bool and len(self.path) == 1 and self.default is False

    @property
    def is_tuple(self) -> bool:
        return get_origin(self.type) is tuple

    @property
    def choices(self) -> tuple[str, ...]:
        """What a text may be, where only a few can be."""
        kind = _without_none(self.type)
        if get_origin(kind) is Literal:
            return tuple(str(choice) for choice in get_args(kind))
        return tuple(str(member.value) for member in kind) if _is_class(kind, Enum) else ()

    @property
    def unit(self) -> str:
        """The placeholder of its value in --help."""
        if self.setting.unit or self.setting.positional:
            return self.setting.unit or self.path[-1].upper()
        if self.choices:
            return "{" + ",".join(self.choices) + "}"
        return {int: "N", float: "X"}.get(_without_none(self.type), self.path[-1].upper())

    def of(self, instance: Any) -> Any:
        """This setting's value in an instance of the dataclass."""
        for name in self.path:
            instance = getattr(instance, name)
        return instance

    def text(self, value: Any) -> str:
        """A value as a flag says it."""
        if value is None:
            return NONE
        if isinstance(value, bool):
            return str(value).lower()
        return self.setting.show(value)

    def argument(self, value: Any) -> str:
        """The word of a command line that gives this value."""
        if self.type is bool:
            return self.flag if value else negated(self.flag)
        return f"{self.flag}={self.text(value)}"

    def shown(self, value: Any) -> str:
        """A value as --help says it."""
        return self.setting.unset if value in (None, "", ()) and self.setting.unset else self.text(value)


def negated(flag: str) -> str:
    """The flag that says no to a bool: --no-flip, --head.no-sample-zero-iou."""
    section, dot, last = flag[2:].rpartition(".")
    return f"--{section}{dot}no-{last}"


def _is_class(kind: Any, base: type) -> bool:
    return isinstance(kind, type) and issubclass(kind, base)


def _is_optional(kind: Any) -> bool:
    return get_origin(kind) in (Union, UnionType) and NoneType in get_args(kind)


def _without_none(kind: Any) -> Any:
    if not _is_optional(kind):
        return kind
    return Union[tuple(part for part in get_args(kind) if part is not NoneType)]  # noqa: UP007


def leaves(settings: type) -> tuple[Leaf, ...]:
    """All settings of a dataclass and of its sections, in order."""
    return _all_leaves(settings)


@cache
def _all_leaves(settings: type) -> tuple[Leaf, ...]:
    return tuple(_leaves(settings, (), ""))


def _leaves(settings: Any, path: tuple[str, ...], name: str, section: Section | None = None) -> Iterator[Leaf]:
    hints = get_type_hints(settings, include_extras=True)
    for one in dataclasses.fields(settings):
        hint = hints[one.name]
        kind, *notes = get_args(hint) if get_origin(hint) is Annotated else (hint,)
        inner = next((note for note in notes if isinstance(note, Section)), None)
        place = (*path, one.name)
        if inner is not None:
            yield from _leaves(kind, place, name if inner.flat else f"{name}{one.name}.", inner)
            continue
        (setting,) = (note for note in notes if isinstance(note, Setting))
        above = section or Section("")
        default = one.default
        if default is dataclasses.MISSING and one.default_factory is not dataclasses.MISSING:
            default = one.default_factory()
        leaf = Leaf(
            place, name + one.name, kind, setting, setting.group or above.title,
            above.flags.get(one.name, setting.flag), setting.memory or one.name in above.memory, default,
        )  # fmt: skip
        # In a command's own flags the long name of a shared setting is the short one already.
        yield dataclasses.replace(leaf, short="") if leaf.short == leaf.long else leaf


@cache
def _by_word(settings: type) -> dict[str, Leaf]:
    words = {leaf.name: leaf for leaf in leaves(settings)}
    return words | {_word(leaf.short[2:]): leaf for leaf in leaves(settings) if leaf.short}


@cache
def _section_words(settings: type) -> frozenset[str]:
    parts = (leaf.name.split(".") for leaf in leaves(settings))
    return frozenset(".".join(of[:k]) for of in parts for k in range(1, len(of)))


def _word(text: str) -> str:
    return text.replace("-", "_")


def read(settings: type, words: Mapping[str, Any], where: str = "") -> dict[str, Any]:
    """{name: value} of what `words` say, each checked and of its setting's type.

    A value may be a text as a flag has it, or of the setting's type, as JSON, TOML or Python have it. Raises InputError
    for a word that is no setting, for a value that cannot be and for two of one setting in a file; `where` begins the
    sentence ("settings.toml: ").
    """
    found: dict[str, Any] = {}
    table, sections = _by_word(settings), _section_words(settings)
    said: dict[str, str] = {}  # name -> the word that gave its value

    def take(leaf: Leaf, value: Any, word: str) -> None:
        if where and leaf.name in found and found[leaf.name] != value:  # of keywords the last counts
            raise InputError(f'{where}"{said[leaf.name]}" and "{word}" are one setting with two values; leave one out')
        found[leaf.name], said[leaf.name] = value, word

    def walk(words: Mapping[str, Any], prefix: str) -> None:
        for key, value in words.items():
            word = prefix + _word(str(key))
            if word in sections and isinstance(value, Mapping):
                walk(value, f"{word}.")
            elif word in sections and dataclasses.is_dataclass(value) and not isinstance(value, type):
                walk({part.name: getattr(value, part.name) for part in dataclasses.fields(value)}, f"{word}.")
            elif word in table:
                take(table[word], _value(table[word], value, where), f"{prefix}{key}")
            elif (word.startswith("no_") and (leaf := table.get(word[3:])) and leaf.type is bool) and value is True:
                take(leaf, False, f"{prefix}{key}")
            elif word in sections:
                raise InputError(f'{where}"{prefix}{key}" is a section of settings, not a setting of its own')
            elif word in GONE:
                raise InputError(f'{where}"{prefix}{key}" is gone: {GONE[word]}')
            else:
                near = get_close_matches(word, [*table, *sections], n=1)
                meant = f'; perhaps you meant "{near[0]}"' if near else "; --help lists the settings"
                raise InputError(f'{where}"{prefix}{key}" is no setting{meant}')

    walk(words, "")
    return found


def applied(instance: T, values: Mapping[str, Any]) -> T:
    """A copy of an instance of settings with some values changed, by name as `read` gives them."""
    for leaf in leaves(type(instance)):
        if leaf.name in values:
            instance = _replaced(instance, leaf.path, values[leaf.name])
    return instance


def _replaced(instance: Any, path: tuple[str, ...], value: Any) -> Any:
    name, *rest = path
    new = _replaced(getattr(instance, name), tuple(rest), value) if rest else value
    return dataclasses.replace(instance, **{name: new})


def made(settings: type[T], values: Mapping[str, Any], where: str = "") -> T:
    """An instance out of values by name, as `read` gives them; fields without a value hold their defaults.

    Raises InputError for a setting without a value that has no default.
    """
    tree: dict[str, Any] = {}
    for leaf in leaves(settings):
        value = values.get(leaf.name, leaf.default)
        if value is dataclasses.MISSING:
            raise InputError(f"{where}{leaf.flag} is missing; --help says what it is")
        inner = tree
        for part in leaf.path[:-1]:
            inner = inner.setdefault(part, {})
        inner[leaf.path[-1]] = value
    return _instance(settings, tree)


def _instance(settings: type[T], tree: Mapping[str, Any]) -> T:
    hints = get_type_hints(settings)
    return settings(
        **{name: _instance(hints[name], value) if isinstance(value, dict) else value for name, value in tree.items()}
    )


def _value(leaf: Leaf, given: Any, where: str) -> Any:
    kind, said = _without_none(leaf.type), f"{where}{leaf.flag} {given}"
    try:
        value = _from_text(leaf, kind, given) if isinstance(given, str) else _typed(leaf, kind, given)
    except InputError as error:
        raise InputError(f"{where}{error}") from None
    except (ValueError, msgspec.ValidationError):
        quoted = f"{where}{leaf.flag} {given!r}"
        if leaf.choices:
            raise InputError(f"{quoted}: choose one of {', '.join(leaf.choices)}") from None
        must = {int: "a whole number", float: "a number", bool: "true or false", str: "a text"}
        raise InputError(f"{quoted}: must be {must.get(kind, f'written like {leaf.unit}')}") from None
    if isinstance(value, int | float) and not isinstance(value, bool) and not leaf.choices:
        setting = leaf.setting
        finite = isinstance(value, int) or math.isfinite(value)  # a whole number may be larger than any float
        if not finite or value < 0 or (value == 0 and not setting.zero):
            raise InputError(f"{said}: must be {'0 or more' if setting.zero else 'a positive number'}")
        if value > setting.most:
            raise InputError(f"{said}: must be a smaller number")
        if value >= setting.below:
            raise InputError(f"{said}: must be less than {setting.below:g}")
    return value


def _from_text(leaf: Leaf, kind: Any, text: str) -> Any:
    """Raises InputError or ValueError."""
    if text == NONE and _is_optional(leaf.type):
        return None
    if leaf.setting.parse is not None:
        return leaf.setting.parse(text)
    if leaf.choices:
        options = get_args(kind) if get_origin(kind) is Literal else tuple(kind)
        return options[leaf.choices.index(text)]
    if kind is bool:
        return bool(("false", "true").index(text.lower()))
    if leaf.is_tuple:
        return tuple(get_args(kind)[0](part) for part in text.split(","))
    return kind(text)


def _typed(leaf: Leaf, kind: Any, given: Any) -> Any:
    """A value that is no text, as its setting's type; checked as its text would be. Raises InputError or
    msgspec.ValidationError.
    """
    if kind is str and isinstance(given, Path):
        return str(given)
    known = isinstance(kind, type) and isinstance(given, kind) and not isinstance(given, bool)
    value = given if known else msgspec.convert(given, leaf.type, dec_hook=lambda of, text: of(text))  # paths
    if leaf.setting.parse is None or value is None:
        return value
    return leaf.setting.parse(leaf.setting.show(value))

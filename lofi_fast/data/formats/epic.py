"""EPIC-KITCHENS-100: EPIC_100_train.csv, EPIC_100_validation.csv and EPIC_100_test_timestamps.csv.

Times are hh:mm:ss.ff in start_timestamp and stop_timestamp. The file's name tells the subset. A segment has a verb, a
noun, and both together are the action; --label says which is wanted, the verb where it does not. The class is the
number in verb_class or noun_class, since people used many words for one class; its name is that of
EPIC_100_verb_classes.csv or EPIC_100_noun_classes.csv where they lie beside, and otherwise its most frequent word.
EPIC-SOUNDS, whose tables have the same times, says the class in words.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable

from lofi_fast.data.formats.file import Gathered, LabelFile, Table
from lofi_fast.data.labels import UNASSIGNED, Video
from lofi_fast.errors import InputError
from lofi_fast.texts import decoded

NAME = "EPIC-KITCHENS-100"
OPTIONS = frozenset(("label",))
KINDS = ("verb", "noun", "action")


def recognises(columns: list[str]) -> bool:
    return {"video_id", "start_timestamp", "stop_timestamp"} <= set(columns)


def read(file: LabelFile, table: Table) -> list[Video]:
    """Raises InputError, which names the line, for what cannot be, and for another --label."""
    kind = file.options.label or "verb"
    if kind not in KINDS:
        raise InputError(f"{file.path}: --label {kind} is none of EPIC-KITCHENS-100; it is verb, noun or action")
    parts = ("verb", "noun") if kind == "action" else (kind,)
    labelled = all(f"{part}_class" in table.columns for part in parts)
    of_sounds = not labelled and "class" in table.columns
    if of_sounds and file.options.label:
        raise InputError(f"{file.path}: --label {kind} is none of EPIC-SOUNDS; leave it out")
    rows = list(table.rows())
    names = [_names(file, part, rows) for part in parts] if labelled else []
    seconds = _seconds(file)
    subset = file.subset_of_name()
    found = Gathered(file)
    for line, cell in rows:
        name = cell["video_id"]
        where = f"{line}: video {name}"
        found.video(name, where, subset=subset, duration=seconds.get(name))
        if labelled:
            words = [of(cell[f"{part}_class"], where) for part, of in zip(parts, names, strict=True)]
            found.segment(name, cell["start_timestamp"], cell["stop_timestamp"], " ".join(words), where)
        elif of_sounds:
            found.segment(name, cell["start_timestamp"], cell["stop_timestamp"], cell["class"], where)
    told = "no subset" if subset == UNASSIGNED else f"the subset {subset}"
    if of_sounds:
        file.note(f"read as EPIC-SOUNDS: hh:mm:ss; its name tells {told}; labels are its classes")
        return found.videos()
    file.note(
        f"read as {NAME}: hh:mm:ss; its name tells {told}; labels are its {kind}s"
        f"{'' if file.options.label else ' (--label noun or --label action for others)'}"
        if labelled
        else f"read as {NAME}: it has no labels, only videos of {told}"
    )
    return found.videos()


def _names(file: LabelFile, part: str, rows: list[tuple[str, dict[str, str]]]) -> Callable[[str, str], str]:
    """The name of a class by its number, and a place for a sentence."""
    listed = {cell["id"]: cell["key"] for _, cell in _beside(file, f"EPIC_100_{part}_classes.csv", {"id", "key"})}
    words: dict[str, Counter[str]] = defaultdict(Counter)
    if not listed:
        wanted = {part, f"{part}_class"}
        own = [cell for _, cell in rows if wanted <= cell.keys()]
        for other in sorted(file.path.parent.glob("EPIC_100_*.csv")):
            if other.name != file.path.name:
                own += [cell for _, cell in _beside(file, other.name, wanted)]
        for cell in own:
            words[cell[f"{part}_class"]][cell[part]] += 1
    taken: dict[str, str] = {}
    for number, counts in sorted(words.items(), key=lambda item: (-item[1].total(), item[0])):
        free = [word for word, _ in sorted(counts.items(), key=lambda one: (-one[1], one[0])) if word not in taken]
        taken[free[0] if free else f"{part} {number}"] = number
    by_number = listed or {number: word for word, number in taken.items()}

    def name(number: str, where: str) -> str:
        if number not in by_number:
            raise InputError(f"{where} has the {part}_class {number!r}, which no class has")
        return by_number[number]

    return name


def _seconds(file: LabelFile) -> dict[str, str]:
    """Durations by video, where the data set's own table of videos lies beside."""
    rows = _beside(file, "EPIC_100_video_info.csv", {"video_id", "duration"})
    return {cell["video_id"]: cell["duration"] for _, cell in rows}


def _beside(file: LabelFile, name: str, columns: set[str]) -> list[tuple[str, dict[str, str]]]:
    """The rows of a table in the same folder; none where it is not there, or lacks one of the columns."""
    path = file.path.parent / name
    try:
        table = Table(path, decoded(path))
    except (OSError, UnicodeDecodeError):
        return []
    return list(table.rows()) if columns <= set(table.columns) else []

"""The file of readings: what steps were measured to add, for a later run of the same kind to start from."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from lofi_fast.errors import InputError
from lofi_fast.files import write_json
from lofi_fast.memory.plans import Plan

VERSION = 2


def write_readings(path: Path, key: Mapping[str, Any], added: Mapping[Plan, int], say: Callable[[str], None]) -> None:
    """Write the bytes that steps of plans added, for runs with the same `key`; `say` is told where that fails."""
    readings = [[*plan.to_json(), amount] for plan, amount in added.items()]
    try:
        write_json(path, {"version": VERSION, "key": dict(key), "readings": readings})
    except InputError as error:
        say(f"readings of memory cannot be written ({error}); the next run starts without")


def read_readings(path: Path, key: Mapping[str, Any], say: Callable[[str], None]) -> dict[Plan, int] | None:
    """What `write_readings` wrote with the same `key`. None where there is none, and `say` is told why unless there is
    no file.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["version"] != VERSION or content["key"] != json.loads(json.dumps(dict(key))):
            say(f"{path}: readings of memory of another machine or model are not used")
            return None
        return {Plan.from_json(plan): _count(added) for *plan, added in content["readings"]}
    except FileNotFoundError:
        return None
    except OSError as error:
        say(f"{path}: readings of memory cannot be read ({error.strerror}) and are not used")
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, RecursionError):
        say(f"{path}: not a readable file of readings of memory; it is not used")
    return None


def _count(value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= sys.maxsize:
        raise ValueError(f"{value!r} is not a count")
    return value

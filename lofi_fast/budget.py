"""The two budgets, memory and time: what a user writes, and what it means in bytes and in seconds."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from lofi_fast.errors import InputError

LEAST_HELD = 250_000_000  # bytes that Python with torch and DALI hold before they compute anything, on any machine
AUTO_SHARE = 0.9  # of what is free, for --mem-budget auto
_UNITS = {"": 0, "K": 1, "M": 2, "G": 3, "T": 4}


def parse_bytes(text: str) -> int:
    """Bytes of "11GB" (11e9), "11GiB" (11 * 2^30), "512MB", "2000000000". Raises InputError for anything else."""
    match = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]*)?|\.[0-9]+)\s*([KMGT]?)(i?)B?\s*", text, re.IGNORECASE | re.ASCII)
    if match is None or (match[3] and not match[2]):
        raise InputError(f'"{text}" is not an amount of memory: write it like 11GB, 11GiB, 80% or auto (--mem-budget)')
    base = 1024 if match[3] else 1000
    amount = float(match[1]) * float(base ** _UNITS[match[2].upper()])
    if not 0.5 < amount < float(2**63):
        raise InputError(f'"{text}" is no memory that a machine has: give --mem-budget an amount like 11GB')
    return round(amount)


@dataclass(frozen=True)
class Budget:
    """What the user allows this process: an amount in bytes, a share of the device, or (neither) what is free now."""

    text: str
    amount: int | None = None
    share: float | None = None

    @staticmethod
    def parse(text: str) -> Budget:
        """ "11GB", "11GiB", "80%" (of the device's memory) or "auto" (what is free at the start)."""
        if text.strip().lower() == "auto":
            return Budget(text)
        if text.strip().endswith("%"):
            try:
                share = float(text.strip()[:-1]) / 100
            except ValueError:
                share = math.nan
            if not 0 < share <= 1:
                raise InputError(f'"{text}" is not a share of memory: write --mem-budget like 80% (0 to 100)')
            return Budget(text, share=share)
        return Budget(text, amount=parse_bytes(text))


def check_budget(budget: Budget) -> None:
    """Raises InputError for an amount in which no process computes, on any machine: known before torch is imported."""
    amount = budget.amount
    if amount is None or amount >= LEAST_HELD:
        return
    number = budget.text.strip()
    if number.isdecimal():
        raise InputError(f"--mem-budget {number} means {amount} bytes: nothing fits; write its unit, like {number}GB")
    raise InputError(
        f"--mem-budget {budget.text} is {amount / 1e6:g} MB: nothing fits, for Python with its libraries holds more "
        f"than {LEAST_HELD / 1e6:g} MB before it computes anything; give an amount like 4GB"
    )


def resolve_budget(budget: Budget, total: int, available: int) -> int:
    """Bytes of a budget on a device of `total` bytes with `available` for this process now."""
    if budget.amount is not None:
        return budget.amount
    if budget.share is not None:
        return round(budget.share * total)
    return round(AUTO_SHARE * available)


def gigabytes(amount: int) -> str:
    return f"{amount / 1e9:.2f} GB"


# Time

_TIME_UNITS = {"h": 3600.0, "min": 60.0, "s": 1.0}
_TIME = re.compile("".join(rf"(?:(\d+(?:\.\d+)?){unit})?" for unit in _TIME_UNITS), re.ASCII)


def parse_time(text: str) -> float:
    """Seconds of "30min", "90s", "1h30min", "0.5h". Raises InputError."""
    found = _TIME.fullmatch(text.replace(" ", ""))
    parts = found.groups() if found is not None else ()
    seconds = sum(float(part) * unit for part, unit in zip(parts, _TIME_UNITS.values(), strict=False) if part)
    if not 0 < seconds < math.inf:
        raise InputError(f'--epoch-time "{text}": write a time like 30min, 90s or 1h30min')
    return seconds


def show_time(seconds: float) -> str:
    """The text of which `parse_time` makes so many seconds."""
    return f"{seconds!r}s"


def duration(seconds: float) -> str:
    """For a sentence: 0.25 s, 45 s, 7 min 31 s, 2 h 05 min."""
    if seconds < 9.5:
        return f"{seconds:.2g} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"

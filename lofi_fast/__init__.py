"""lofi_fast: end-to-end temporal action localization on one ordinary GPU, within a stated memory budget.

    import lofi_fast

    result = lofi_fast.train(annotations="a.json", videos="v/", mem_budget="11GB")
    lofi_fast.load(result.run).detect("new.mp4")

Importing the package is light: torch is imported by the rooms that compute, when they are first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.2.0"
__all__ = ["Config", "Detector", "check", "evaluate", "load", "plan", "prepare", "train"]

if TYPE_CHECKING:
    from lofi_fast.check import check as check
    from lofi_fast.config import Config as Config
    from lofi_fast.evaluate import evaluate as evaluate
    from lofi_fast.model import Detector as Detector
    from lofi_fast.plan import plan as plan
    from lofi_fast.prepare import prepare as prepare
    from lofi_fast.train import train as train

    load = Detector.load

_COMMANDS = (
    "check",
    "evaluate",
    "plan",
    "prepare",
    "train",
)  # functions too: see command.CallableModule
_NAMES = {"Config": "lofi_fast.config", "Detector": "lofi_fast.model"}


def __getattr__(name: str) -> Any:
    if name in _COMMANDS:
        return import_module(f"lofi_fast.{name}")
    if name in _NAMES:
        return getattr(import_module(_NAMES[name]), name)
    if name == "load":
        return import_module("lofi_fast.model").Detector.load
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

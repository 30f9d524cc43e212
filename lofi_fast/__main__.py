"""`lofi-fast COMMAND ...` (or `python -m lofi_fast`). A command is a module, imported when it is asked for."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from difflib import get_close_matches
from importlib import import_module

from lofi_fast import __version__
from lofi_fast.command import HELP, run
from lofi_fast.errors import InputError

COMMANDS = {  # name: (module with `main`, what it does)
    "train": ("lofi_fast.train", "train a detector within a memory budget"),
    "check": ("lofi_fast.check", "what labels and videos say of each other, before training"),
    "prepare": ("lofi_fast.prepare", "fill the frame cache without training, on one machine or many"),
    "plan": ("lofi_fast.plan", "what will fit a budget? Needs no GPU and no data"),
    "detect": ("lofi_fast.detect", "find actions in videos with a trained detector"),
    "convert": ("lofi_fast.convert", "labels or detections of any format into another one"),
    "extract": ("lofi_fast.extract", "features of videos by a trained encoder, for other programs"),
    "evaluate": ("lofi_fast.evaluate", "scores of any predictions against any ground truth"),
    "doctor": ("lofi_fast.doctor", "what works on this machine, and what each missing piece costs"),
    "report": ("lofi_fast.report", "write report.html of a run folder, or compare runs"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command that `argv` (None: this process's) begins with; returns its exit status."""
    return run(lambda: _command(list(sys.argv[1:] if argv is None else argv)))


def _command(argv: list[str]) -> int:
    if argv[:1] == ["help"]:  # `lofi-fast help train`
        argv = [*argv[1:2], "--help"]
    if argv[:1] and argv[0] in ("--version", "-V", "version"):
        print(f"lofi_fast {__version__}")
        return 0
    if not argv or argv[0] in HELP:
        print("usage: lofi-fast COMMAND [OPTIONS]\n\nFind actions in untrimmed videos, end to end, on one GPU.\n")
        for name, (_, does) in COMMANDS.items():
            print(f"  {name:<10}{does}")
        print("\n`lofi-fast COMMAND --help` lists what a command takes; `lofi-fast --version` says which this is.")
        return 0 if argv else 2
    name, *rest = argv
    if name not in COMMANDS:
        near = get_close_matches(name, COMMANDS, n=1)
        meant = f"; perhaps you meant {near[0]}" if near else ""
        raise InputError(f"{name!r} is no command of lofi-fast{meant}; the commands are {', '.join(COMMANDS)}")
    module = import_module(COMMANDS[name][0])
    how = {"owns_process": True} if name in ("train", "detect", "extract") else {}
    status: int = module.main(rest, **how)
    return status


if __name__ == "__main__":
    sys.exit(main())

"""Measure, and make the README's tables: `python -m bench` says what there is."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence

from bench.tools.rows import RESULTS, ROOT, read_rows
from lofi_fast.errors import InputError

# Each is a file of bench/commands, imported only when asked for: operators are measured on machines without decoders.
COMMANDS = {
    "all": ("[options]", "everything that a CPU can measure, subsampled, in half an hour"),
    "ops": ("[options]", "every operator against plain PyTorch: time, memory, share of the machine's copy bandwidth"),
    "kernels": (
        "[--save]",
        "every Triton kernel compiled for GPUs that need not be there: registers, spills, accesses",
    ),
    "memory": ("[options]", "what autograd keeps of a frame, and the peak of a step: lean against plain PyTorch"),
    "scaling": ("[options]", "time and peak of a step over snippets, pixels, videos, the encoder, and processes"),
    "rungs": ("[options]", "what a frame pixel costs at the sides of the rungs, as measured and as counted"),
    "step": ("[options]", "time of the encoder, the head and the whole step: ours against plain PyTorch"),
    "optim": ("[options]", "time of one update: apex's and torch's optimisers"),
    "planner": ("[options]", "predicted and measured peaks over many budgets, alone or beside a neighbour"),
    "truth": ("[options]", "whether a budget is kept to, read from outside every 10 ms over whole trainings"),
    "epochs": ("[options]", "the time of an epoch as it was planned, against the epochs as they went"),
    "tuners": ("[options]", "the planner beside the searches of Lightning, accelerate and DeepSpeed"),
    "day": ("[options]", "a day on a shared card in virtual time: the governor, other trainers' ways, a clairvoyant"),
    "overhead": ("[options]", "what planning costs: the governor's time in a step, the allocators"),
    "data": ("[options]", "decoding: the frame cache against decoding the video itself; share of a training step"),
    "waits": ("[options]", "whether trainings wait for frames: shares of the time of a step"),
    "detect": ("[options]", "detection in a long video against decoding it alone, and its memory along the way"),
    "published": ("[options]", "our networks against their published code, on the same weights and inputs"),
    "eval": ("[options]", "the evaluator against the official procedure, equal to the last bit"),
    "fits": ("[options]", "what fits: the highest fidelity against the budget, by arithmetic"),
    "plan": ("[options]", "what a budget buys, and the time of an epoch: the plans of every encoder, by arithmetic"),
    "gpu": ("[options]", "all that matters on a GPU, in 6 minutes; --dry-run goes through it without one"),
    "tests": ("[options]", "the tests that say something of a GPU, the operators' first"),
    "launches": ("[options]", "on a GPU: what the host pays for a call, and device operations of a step"),
    "gpu_planner": ("[options]", "the planner on a GPU beside a neighbour, on frames made up there"),
    "start": ("[options]", "how long a training takes to begin, and its memory, over the number of videos"),
    "faults": ("[options]", "kills, damaged checkpoints and damaged files: is all noticed, and nothing lost?"),
    "job": ("[options] -- <arguments of lofi_fast.train>", "train as a user would and append a row for each seed"),
    "recipes": (
        "[options] -- <arguments of lofi_fast.train>",
        "a change of recipes: mAP of another checkout and of this one",
    ),
    "stages": (
        "--before DIR [options] -- <arguments of lofi_fast.train>",
        "CPU seconds of the whole job by stage, of another checkout and of this one",
    ),
    "gain": (
        "[options] -- <arguments of lofi_fast.train>",
        "what joint training is worth, and which fidelity an hour should buy: frozen, LoFi, full",
    ),
    "pictures": (
        "[options] -- <arguments of lofi_fast.train>",
        "the README's picture: what a training finds, and its memory beside a neighbour",
    ),
    "tables": ("[--check]", "make the README's tables from the rows"),
}


def overview() -> str:
    """The commands, and the rows that were measured so far."""
    lines = []
    for name, (arguments, what) in COMMANDS.items():
        lines += [f"python -m bench {name} {arguments}", f"    {what}"]
    lines += ["--help after a command lists its options.", ""]
    for path in sorted(RESULTS.glob("*.jsonl")):
        dates = [str(row["date"]) for row in read_rows(path)]
        lines.append(f"{path.relative_to(ROOT)}: {len(dates)} rows, the newest of {max(dates, default='never')}")
    if lines[-1] == "":
        lines.append(f"{RESULTS.relative_to(ROOT)}: nothing measured yet")
    return "\n".join(lines)


def main(argv: Sequence[str]) -> int:
    """0 when done, 1 for what does not hold (tables out of date, a gate not passed), 2 for what the user can mend, or a
    failed training's status.
    """
    try:
        if not argv or argv[0] in ("-h", "--help"):
            print(overview())
            return 0
        if argv[0] not in COMMANDS:
            raise InputError(f"no measurement is called {argv[0]}; there are: {', '.join(COMMANDS)}")
        status: int = importlib.import_module(f"bench.commands.{argv[0]}").main(argv[1:])
        return status
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

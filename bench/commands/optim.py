"""Time of one update of a TSM-R18 and its head: ours (NVIDIA's apex, or torch's fused kernels) beside torch's others.

Every form starts from the same weights and gets the same gradients; after three updates the weights must agree.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from bench.tools.against import read_against
from bench.tools.gate import GateError
from bench.tools.measure import Stopwatch, interleaved, spread
from bench.tools.networks import CLASSES, HEAD, TINY_WIDTH, WIDTH
from bench.tools.record import options, record
from bench.tools.rows import Row, environment, software
from bench.tools.table import Section, Table, by_place, newest, when
from lofi_fast.config import StageConfig
from lofi_fast.encoder.resnet import TSMResNet
from lofi_fast.errors import InputError
from lofi_fast.head.gtad import GTAD
from lofi_fast.optim import apex_problem, make_optimizer
from lofi_fast.precision import choose_device

UPDATES = 3  # before the gate
CLOSE = 1e-5  # relative, in float32
SECONDS = 20.0  # that one form may take, at least three rounds
OPTIMIZERS = ("sgd", "adam", "adamw")


def main(argv: Sequence[str]) -> int:
    """Measure, append rows, print a table; 1 when a form came to other weights."""
    args = options("optim", __doc__, "a narrow network: does everything run?", 7).parse_args(argv)
    if args.threads < 1 or args.rounds < 1:
        raise InputError("--threads and --rounds must be at least 1")
    device = choose_device(args.device)
    torch.set_num_threads(args.threads)
    old = read_against(args.against)
    start = environment() | software(device, args.threads) | {"quick": args.quick}
    measured = measure(device, args.rounds, TINY_WIDTH if args.quick else WIDTH)
    values = {"ms": ("ms",), "of ours": ("times_ours",)}
    return record("optim", measured, start, args, old, table, ("optimizer", "form"), values)


def measure(device: torch.device, rounds: int, width: int) -> Iterator[Row]:
    """Ours first, then the others, for each optimiser."""
    apex = device.type == "cuda" and apex_problem() is None
    for name in OPTIMIZERS:
        config = StageConfig(epochs=1, batch=1, optimizer=name, lr=1e-3, weight_decay=1e-4)
        forms: dict[str, Callable[[Sequence[nn.Parameter]], Optimizer]] = {}
        if apex:
            forms["apex"] = partial(_ours, config, "apex")
        forms["torch, fused"] = partial(_ours, config, "torch")
        forms["torch, foreach"] = partial(_torch, config, True)
        forms["torch, one by one"] = partial(_torch, config, False)
        parameters = {form: _parameters(device, width) for form in forms}
        optimizers = {form: make(parameters[form]) for form, make in forms.items()}
        for _ in range(UPDATES):
            for optimizer in optimizers.values():
                optimizer.step()
        first = next(iter(forms))
        for form, found in parameters.items():
            error = _distance(found, parameters[first])
            if not error < CLOSE:
                raise GateError(f"{name}, {form}: weights differ from those of {first} by {error:.1e}")
        calls: dict[str, Callable[[], object]] = {form: optimizer.step for form, optimizer in optimizers.items()}
        samples = interleaved(calls, Stopwatch(device), rounds, SECONDS)
        numbers = sum(parameter.numel() for parameter in parameters[first])
        for form, seconds in samples.items():
            timed = spread(seconds)
            ratio = spread([theirs / ours for theirs, ours in zip(seconds, samples[first], strict=False)])
            yield {
                "optimizer": name, "form": form, "ours": form == first, "numbers": numbers, "rounds": len(seconds),
                "ms": [round(1e3 * value, 4) for value in (timed.median, timed.p20, timed.p80)],
                "times_ours": [round(value, 3) for value in (ratio.median, ratio.p20, ratio.p80)],
            }  # fmt: skip


def _parameters(device: torch.device, width: int) -> list[nn.Parameter]:
    torch.manual_seed(0)
    encoder = TSMResNet("tsm_r18", width).to(device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    head = GTAD(HEAD, encoder.num_features, CLASSES, 100).to(device)
    found: list[nn.Parameter] = [*encoder.parameters(), *head.parameters()]
    for parameter in found:
        parameter.grad = torch.randn_like(parameter)
    return found


def _ours(config: StageConfig, name: str, parameters: Sequence[nn.Parameter]) -> Optimizer:
    return make_optimizer(config, parameters, "apex" if name == "apex" else "torch")


def _torch(config: StageConfig, foreach: bool, parameters: Sequence[nn.Parameter]) -> Optimizer:
    kind = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[config.optimizer]
    made: Optimizer = kind(parameters, lr=config.lr, weight_decay=config.weight_decay, foreach=foreach)
    return made


def _distance(a: Sequence[Tensor], b: Sequence[Tensor]) -> float:
    """The largest, over tensors, of ||a - b|| / ||b||."""
    with torch.no_grad():
        return max(float((x - y).norm() / y.norm().clamp(min=1e-12)) for x, y in zip(a, b, strict=True))


def table(rows: Sequence[Row]) -> list[Section]:
    """Each optimiser's forms; the first of them is the one that trains here."""
    rows = newest(rows, ("optimizer", "form"))
    header = ("optimiser", "form", "ms", "time of the first, median (p20 to p80)")
    parts: list[Section] = []
    for where, here in by_place(rows):
        lines = []
        for row in here:
            median, low, high = row["times_ours"]
            ratio = f"{median:.2f}x ({low:.2f} to {high:.2f})"
            lines.append((row["optimizer"], row["form"], f"{row['ms'][0]:,.1f}", ratio))
        parts.append(Table(f"{where}; {when(here)}:", header, lines))
    return parts

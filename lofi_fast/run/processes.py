"""Training by several processes, one for each GPU, as torchrun starts them: who this one is, and what all do together.

The batch of a step is that of the settings, however many processes share it. Each takes gradients of its share, of a
loss that is divided by counts of the whole batch; the gradients are then summed over the processes, once a step. The
first process (rank 0) writes, logs and speaks; the others are silent.

    torchrun --standalone --nproc-per-node 4 -m lofi_fast.train --mem-budget 11GB ...
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from functools import cached_property, partial
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor, distributed, nn
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous

from lofi_fast import __version__
from lofi_fast.config import Config
from lofi_fast.errors import InputError
from lofi_fast.memory import ranks
from lofi_fast.memory.meter import is_out_of_memory, reason_of
from lofi_fast.memory.ranks import LostProcess, answered, gather
from lofi_fast.precision import choose_device
from lofi_fast.run import trained_on
from lofi_fast.run.heartbeat import restarts, watched
from lofi_fast.settings import leaves

T = TypeVar("T")
PATIENT = timedelta(days=30)  # while one process decodes videos or scores predictions, the others wait
BUCKET = 25 * 2**20 // 4  # numbers, fp32, that are summed over the processes at once, as torch's own DDP does
ELSEWHERE = ("data.annotations", "data.videos", "data.cache", "out")  # settings that may differ: paths on a machine
NAMES = ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")  # what torchrun sets, beside WORLD_SIZE


@dataclass(frozen=True)
class _Failure:
    """What went wrong in one process, as the others are told."""

    sentence: str
    bad_input: bool
    out_of_memory: bool


@dataclass(eq=False)
class Processes:
    """This process among those that train together; by default it is alone."""

    rank: int = 0
    count: int = 1
    local_rank: int = 0  # on its machine
    local_count: int = 1
    patient: distributed.ProcessGroup | None = None  # for waits that last as long as they must

    @property
    def several(self) -> bool:
        return self.count > 1

    @property
    def first(self) -> bool:
        """Whether it is the one that writes, logs and speaks."""
        return self.rank == 0

    def share(self, items: Sequence[T]) -> Sequence[T]:
        """This process's part of what all have, in order; the parts differ by one item at most, and may be empty."""
        bounds = [len(items) * rank // self.count for rank in (self.rank, self.rank + 1)]
        return items[bounds[0] : bounds[1]]

    def largest_share(self, size: int) -> int:
        """Of `size` items, how many a process has at most."""
        return -(-size // self.count)

    # Exchanges. All processes have to come to each of them, in the same order.

    def together(self, about: str, work: Callable[[], T], *, patient: bool = False) -> list[T]:
        """What `work` gives in every process, in the order of their ranks.

        When it raises in one of them, it raises in all: bad input the same InputError, and where nothing but memory was
        missing, a MemoryError in those where it was not. `patient`: wait for the others as long as they work.
        """
        if not self.several:
            return [work()]
        raised: Exception | None = None
        failure, value = None, None
        try:
            value = work()
        except LostProcess:
            raise
        except Exception as error:
            raised, bad_input = error, isinstance(error, InputError)
            failure = _Failure(str(error) if bad_input else reason_of(error), bad_input, is_out_of_memory(error))
        told = gather(about, (value, failure), self.patient if patient else None)
        failures = {rank: failed for rank, (_, failed) in enumerate(told) if failed is not None}
        if failures:
            raise self._error(raised, failures)
        return [value for value, _ in told]  # type: ignore[misc]

    def _error(self, raised: Exception | None, failures: Mapping[int, _Failure]) -> Exception:
        """What this process raises where it has `raised` an error itself or None, and others have failed."""
        everyones = len(failures) == self.count and len(set(failures.values())) == 1
        rank, worst = min(failures.items(), key=lambda of: (of[1].out_of_memory, of[0]))
        if raised is not None and (everyones or (worst.out_of_memory or not failures[self.rank].bad_input)):
            return raised
        sentence = f"process {rank} of {self.count}: {worst.sentence}" if rank > 0 else worst.sentence
        if worst.out_of_memory:
            return MemoryError(sentence)
        return InputError(sentence) if worst.bad_input else LostProcess(f"{sentence}; its own output says more")

    def of_first(self, about: str, work: Callable[[], T]) -> T:
        """What `work` gives in the first process; only there it is done. Raises in all when it raises there."""
        found = self.together(about, lambda: work() if self.first else None, patient=True)[0]
        return found  # type: ignore[return-value]

    def in_turns(self, about: str, work: Callable[[], T]) -> T:
        """Do `work` in the first process, then in the first of each other machine, then in all others: what is written
        by one of them to a disk need not be made again by those that read the same disk.
        """
        mine = 0 if self.first else 1 if self.local_rank == 0 else 2
        done: list[T] = []

        def do(turn: int) -> None:
            if turn == mine:
                done.append(work())

        for turn in range(3 if self.several else 1):
            self.together(about, partial(do, turn), patient=True)
        return done[0]

    def any(self, about: str, mine: bool) -> bool:
        """Whether it is true in any process."""
        return any(gather(about, mine)) if self.several else mine

    # Work

    def device(self, name: str) -> torch.device:
        """`choose_device`, with a GPU of its own for each process of a machine. Raises InputError, the same in all,
        where one has none.
        """
        if not self.several:
            return choose_device(name)

        def own() -> torch.device:
            device = choose_device(name)
            if device.type == "cuda":
                if self.local_rank >= torch.cuda.device_count():
                    raise InputError(
                        f"its machine has {torch.cuda.device_count()} GPUs for {self.local_count} processes; start "
                        "as many as there are GPUs, by --nproc-per-node"
                    )
                device = torch.device("cuda", self.local_rank)
                torch.cuda.set_device(device)
            return device

        devices = self.together("device", own)
        for rank, device in enumerate(devices):
            if device.type != devices[0].type:
                raise InputError(
                    f"process {rank} of {self.count} computes on {_name(device)} and process 0 on {_name(devices[0])}; "
                    "start processes only where there is a GPU, or give --device cpu"
                )
        return devices[self.rank]

    def add_gradients(self, parameters: Iterable[nn.Parameter], bucket: Tensor) -> None:
        """Sum the gradients of all processes, in fp32 and in pieces of `bucket`, into each of them. A process that has
        none for a parameter, because it had nothing to do, adds zeros.
        """
        learning = [parameter for parameter in parameters if parameter.requires_grad]
        have = [parameter.grad is not None for parameter in learning]
        wanted = [max(of) for of in zip(*gather("gradients", have), strict=True)]
        grads = []
        for parameter, needed in zip(learning, wanted, strict=True):
            if needed and parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            if needed and parameter.grad is not None:
                grads.append(parameter.grad)
        for part in _parts(grads, len(bucket)):
            sizes = [grad.numel() for grad in part]
            flat = bucket[: sum(sizes)]
            views = [piece.view(grad.shape) for piece, grad in zip(flat.split(sizes), part, strict=True)]
            torch._foreach_copy_(views, part)
            with answered():
                distributed.all_reduce(flat, group=self.group_of(flat.device))
            torch._foreach_copy_(part, views)

    def stack(self, mine: Tensor) -> Tensor:
        """The tensors of all processes, of one shape, as rows of one."""
        everyones = [torch.empty_like(mine) for _ in range(self.count)]
        with answered():
            distributed.all_gather(everyones, mine, group=self.group_of(mine.device))
        return torch.stack(everyones)

    def new_bucket(self, parameters: Iterable[nn.Parameter], device: torch.device) -> Tensor:
        """Room for what `add_gradients` sums at once."""
        sizes = [parameter.numel() for parameter in parameters if parameter.requires_grad]
        return torch.empty(max(min(BUCKET, sum(sizes)), *sizes), device=device)

    def group_of(self, device: torch.device) -> distributed.ProcessGroup | None:
        """The processes as they exchange tensors of a device: by NCCL on GPUs, else as everything is exchanged."""
        return self._nccl if device.type == "cuda" else None

    @cached_property
    def _nccl(self) -> distributed.ProcessGroup:
        group: distributed.ProcessGroup = distributed.new_group(
            backend="nccl", timeout=timedelta(seconds=ranks.TIMEOUT_SECONDS)
        )
        return group

    def leave(self) -> None:
        """Part from the others, and wait for the threads that talked to them: a thread of gloo that lets go of a tensor
        while the interpreter ends would abort it.
        """
        self.patient = None
        vars(self).pop("_nccl", None)
        distributed.destroy_process_group()


ALONE = Processes()


@contextmanager
def opened() -> Iterator[Processes]:
    """The processes that torchrun has started with this one, connected as long as the block lasts; this one alone where
    there is no torchrun.

    Raises InputError where the environment does not tell how to find the others, and where they are not found.
    """
    text = os.environ.get("WORLD_SIZE", "1")
    if text == "1":
        yield ALONE
        return
    if missing := [name for name in NAMES if not os.environ.get(name)]:
        raise InputError(
            f"started as one of {text} processes, as WORLD_SIZE says, without {missing[0]}: start several by torchrun, "
            "which sets it, or one by plain python with WORLD_SIZE unset"
        )
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    try:
        rank, count, local_rank = (int(os.environ[name]) for name in names)
        local_count = int(os.environ.get("LOCAL_WORLD_SIZE", count))
        timeout = timedelta(seconds=ranks.TIMEOUT_SECONDS)
        met, _, _ = next(rendezvous("env://", timeout=timeout))
        # torchrun's store outlives the processes: started anew, they would read the addresses of those that are gone.
        store = PrefixStore(f"attempt/{restarts()}", met)
        distributed.init_process_group("gloo", store=store, rank=rank, world_size=count, timeout=timeout)
    except (ValueError, RuntimeError) as error:
        where = ":".join(os.environ[name] for name in NAMES[2:])
        reason = str(error).partition("\n")[0]
        raise InputError(
            f"process {os.environ['RANK']} of {text} cannot meet the others at {where} ({reason}); where that port is "
            "in use, give torchrun --standalone or another --master-port"
        ) from None
    processes = Processes(rank, count, local_rank, local_count)
    try:
        with watched(rank, count, os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])):
            processes.patient = distributed.new_group(backend="gloo", timeout=PATIENT)
            yield processes
    finally:
        processes.leave()


def check_alike(processes: Processes, config: Config) -> None:
    """Raises InputError, the same in all processes, where one was started with other settings or another version."""
    if not processes.several:
        return
    told = gather("settings", (config.to_json(), {"lofi_fast": _code(), "torch": str(torch.__version__)}))
    first = Config.from_json(told[0][0], "process 0")
    for rank, (text, versions) in enumerate(told):
        other, (_, expected) = Config.from_json(text, f"process {rank}"), told[0]
        for package, version in versions.items():
            if version != expected[package]:
                raise InputError(
                    f"process {rank} of {processes.count} runs {package} {version}, and process 0 {expected[package]}; "
                    "install the same on all machines"
                )
        for leaf in leaves(Config):
            if leaf.name not in ELSEWHERE and leaf.of(first) != leaf.of(other):
                raise InputError(
                    f"process {rank} of {processes.count} was started with {leaf.flag} {leaf.text(leaf.of(other))}, "
                    f"and process 0 with {leaf.text(leaf.of(first))}; give all of them the same settings"
                )


def check_same(processes: Processes, does: str, what: str, remedy: str) -> None:
    """Raises InputError, the same in all processes, where what one of them `does` is not `what` process 0 does."""
    if not processes.several:
        return
    told = gather(does, what)
    other = next((rank for rank, said in enumerate(told) if said != told[0]), None)
    if other is not None:
        raise InputError(
            f"process {other} of {processes.count} {does} {told[other]}, and process 0 {told[0]}; give {remedy}"
        )


def check_data(processes: Processes, record: bytes) -> None:
    """Raises InputError, the same in all processes, where one sees other labels or videos; `record` is what
    `trained_on.record_of` says of them.
    """
    if not processes.several:
        return
    records = processes.together("data", lambda: record, patient=True)
    for rank, other in enumerate(records):
        if other != records[0]:
            changes = trained_on.changes_between(records[0], other)
            raise InputError(
                f"process {rank} of {processes.count} sees other data than process 0: "
                f"{'; '.join((*changes.labels, *changes.files))}; give all machines the same labels and videos"
            )


def check_batches(processes: Processes, sizes: Mapping[str, int]) -> None:
    """Raises InputError where there are more processes than a step has videos or clips; `sizes` are by flag."""
    for flag, size in sizes.items():
        if size < processes.count:
            raise InputError(
                f"{processes.count} processes share steps of {size} ({flag}): start at most {size}, or raise {flag}"
            )


def _name(device: torch.device) -> str:
    return "a GPU" if device.type == "cuda" else "the CPU"


def _code() -> str:
    """The version, and a digest of the package's source files."""
    digest = hashlib.blake2b(digest_size=4)
    root = Path(__file__).parents[1]
    for path in sorted(root.rglob("*.py")):
        digest.update(path.relative_to(root).as_posix().encode() + path.read_bytes())
    return f"{__version__} ({digest.hexdigest()})"


def _parts(grads: Sequence[Tensor], size: int) -> Iterator[list[Tensor]]:
    """Tensors in order, in groups of `size` numbers at most."""
    part: list[Tensor] = []
    for grad in grads:
        if part and sum(one.numel() for one in (*part, grad)) > size:
            yield part
            part = []
        part.append(grad)
    if part:
        yield part

"""Heartbeats of processes that train together, so that one which hangs is noticed where nobody waits for its answer.

An exchange within a step has a time-out, and one that has ended is noticed at once by its closed connection. But while
one process decodes videos or scores predictions, the others wait as long as it takes; a process that is stopped, or
stuck in a driver, would keep them for ever. So each has a thread that counts, and looks whether the others do.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta

from torch.distributed.distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import TCPStore  # type: ignore[attr-defined]

from lofi_fast.memory import ranks

BEATS = 60  # within the time-out of an exchange
GRACE = 1.25  # times that time-out, after which a silent process is given up: an exchange that waits for it ends first
ENDED = b"ended"


@contextmanager
def watched(rank: int, count: int, address: str, port: int) -> Iterator[None]:
    """In this block this process is known to live, and is ended, with a sentence, when another one does not any more:
    it may be in a call that nothing else can interrupt. Files are written beside their place and moved there, so none
    is left in halves.

    `address` and `port` are those at which the processes have met.
    """
    seconds = ranks.TIMEOUT_SECONDS
    try:
        store = TCPStore(address, port, is_master=False, timeout=timedelta(seconds=seconds))
    except (RuntimeError, ValueError):  # they met in another way
        yield
        return
    left = threading.Event()
    arguments = (PrefixStore(f"beats/{restarts()}", store), rank, count, seconds, left)
    thread = threading.Thread(target=_beat, args=arguments, daemon=True)
    thread.start()
    try:
        yield
    finally:
        left.set()
        thread.join()


def restarts() -> int:
    """How often torchrun has started all processes anew."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))


def _beat(store: Store, rank: int, count: int, seconds: float, left: threading.Event) -> None:
    heard = dict.fromkeys(range(count), (b"", time.monotonic()))  # what each said last, and since when
    number = 0
    with suppress(RuntimeError):  # of a store whose process has ended: whoever exchanges anything hears of that
        while not left.wait(seconds / BEATS):
            number += 1
            store.set(str(rank), str(number))
            now = time.monotonic()
            for other in range(count):
                said = store.get(str(other)) if store.check([str(other)]) else b""
                if said != heard[other][0]:
                    heard[other] = (said, now)
            silent = [r for r, (said, since) in heard.items() if said != ENDED and now - since > GRACE * seconds]
            if silent:
                if rank == min(set(range(count)) - set(silent), default=rank):
                    print(
                        f"error: process {silent[0]} of {count} has not been heard of for {(GRACE * seconds) / 60:.0f} "
                        "minutes: it hangs, or its machine does; go on from the last checkpoint with --resume",
                        file=sys.stderr, flush=True,
                    )  # fmt: skip
                os._exit(2)
        store.set(str(rank), ENDED.decode())

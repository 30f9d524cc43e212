"""Two threads and fp32 on every CPU, so results do not depend on it; tests marked `gpu` are skipped without CUDA.

Without CUDA, Triton kernels run on the CPU through Triton's interpreter, which must be chosen before they are imported.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

from lofi_fast.command import settle_threads

settle_threads()

import torch  # noqa: E402  (its threads are settled before)

if TYPE_CHECKING:
    from detectors import SmallRun

THREADS = 2
torch.set_num_threads(THREADS)
os.environ["ONEDNN_MAX_CPU_ISA"] = "AVX512_CORE"  # a CPU's bf16 is for the tests that ask for it
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

if importlib.util.find_spec("hypothesis"):
    from hypothesis import settings

    settings.register_profile("any_machine", deadline=None)  # how long an example takes tells of the machine alone
    settings.load_profile("any_machine")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="no CUDA device: torch.cuda.is_available() is False"))


@pytest.fixture(autouse=True)
def process_as_before() -> Iterator[None]:
    """Whatever a test changes of its process, as commands that run in it do, the next one finds as many threads as all
    (sums are rounded as threads share them), the environment as it was, and a process that leaves others their turn:
    as root, encoding AV1 (libsvtav1) makes the calling thread, and all that it starts later, real-time ones.
    """
    environment = dict(os.environ)
    policy, priority = os.sched_getscheduler(0), os.sched_getparam(0)
    yield
    if os.sched_getscheduler(0) != policy:
        os.sched_setscheduler(0, policy, priority)
    torch.set_num_threads(THREADS)
    for name in os.environ.keys() - environment.keys():
        del os.environ[name]
    os.environ.update(environment)


@pytest.fixture
def one_thread() -> None:
    """What a test computes is so small that a second thread is only waited for."""
    torch.set_num_threads(1)


@pytest.fixture
def poison() -> Iterator[None]:
    """Fill what torch.empty returns with NaN (integers: their largest value): an element never written shows."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(scope="session")
def native() -> None:
    """For tests of a C++ form: skipped where it is switched off, failed where it should be there and is not."""
    if os.environ.get("LOFI_FAST_NATIVE") == "0":
        pytest.skip("LOFI_FAST_NATIVE=0: the C++ form is switched off")
    from lofi_fast import kernels

    assert kernels.native_available(), "the C++ kernels are not built: `make test` builds them, or see CMakeLists.txt"


@pytest.fixture(scope="session")
def small(tmp_path_factory: pytest.TempPathFactory) -> SmallRun:
    """A small run, trained once for all tests of detection."""
    from detectors import train_small

    return train_small(tmp_path_factory.mktemp("small"))


@pytest.fixture
def torchs_own_allocator(monkeypatch: pytest.MonkeyPatch) -> None:
    """For detection in this process: ours would stay under torch for the tests that follow. Those of budgets have
    processes of their own.
    """
    from lofi_fast.memory import allocator

    if not allocator.installed():
        monkeypatch.setenv("LOFI_FAST_NATIVE", "0")

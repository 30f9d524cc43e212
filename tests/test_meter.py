"""Meters and caps on the real process: what was held is seen, and what is too much fails in here and not elsewhere."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch

from lofi_fast.memory.meter import CpuMeter, GpuMeter, is_out_of_memory, open_meter

ROOT = Path(__file__).resolve().parents[1]
MB = 10**6
linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc, and RLIMIT_DATA as Linux counts it")


def test_own_and_available_are_of_this_machine() -> None:
    meter = CpuMeter()
    assert isinstance(open_meter(torch.device("cpu")), CpuMeter)
    assert 20 * MB < meter.own() < meter.available() <= meter.total() + 200 * MB
    assert meter.total() <= psutil.virtual_memory().total
    assert f"{meter.total() / 1e9:.1f} GB" in meter.device
    held = np.ones(100 * MB, dtype=np.uint8)
    after = meter.own()
    del held
    assert after - meter.own() > 90 * MB


def test_peak_sees_what_was_freed_and_starts_again() -> None:
    meter = CpuMeter()
    meter.reset_peak()
    before = meter.own()
    held = torch.ones(200 * MB, dtype=torch.uint8)
    del held
    peak = meter.peak()
    assert 195 * MB < peak - before < 260 * MB
    assert meter.own() < before + 60 * MB
    meter.reset_peak()
    assert meter.peak() < peak - 140 * MB


# A program that settles its allocator as ours do, then runs out of memory in many ways where 400 MB more can be had.
PROBE = """
import json, os, resource, sys
import numpy as np
import psutil
import torch
from lofi_fast.memory.meter import is_out_of_memory, settle_allocator

print(os.getpid(), flush=True)
settle_allocator("probe", sys.argv[1:])
print(os.environ["GLIBC_TUNABLES"], flush=True)
print(sys.argv[1:], flush=True)
torch.set_num_threads(2)
MB = 10**6
conv = torch.nn.Conv2d(4, 64, 3, padding=1)
small = torch.zeros(2, 4, 64, 64)
conv(small).sum().backward()  # threads and workspaces of an ordinary step are there before the limit

def backward():
    x = torch.zeros(8, 4, 256, 256, requires_grad=True)
    y = conv(x)  # 134 MB each: the graph fits, its gradients do not
    (y.exp() * y.sin()).sum().backward()

too_much = {
    "empty": lambda: torch.empty(2000 * MB, dtype=torch.uint8),
    "a little more": lambda: torch.zeros(500 * MB, dtype=torch.uint8),
    "numpy": lambda: np.ones(2000 * MB, dtype=np.uint8),
    "bytes": lambda: bytes(2000 * MB),
    "convolution": lambda: conv(torch.zeros(64, 4, 256, 256)),  # 1.07 GB of output
    "backward": backward,
    "matrix product": lambda: torch.zeros(20_000, 10) @ torch.zeros(10, 20_000),
    "copy": lambda: torch.zeros(150 * MB, dtype=torch.uint8).to(torch.float64),
}
old = resource.getrlimit(resource.RLIMIT_DATA)
result = {"errors": {}, "recognised": {}, "works_after": {}}
for name, allocate in too_much.items():
    failed = None
    resource.setrlimit(resource.RLIMIT_DATA, (psutil.Process().memory_info().data + 400 * MB, old[1]))
    try:
        allocate()
    except BaseException as error:
        failed = f"{type(error).__name__}: {error}"
        result["recognised"][name] = is_out_of_memory(error)
    result["errors"][name] = failed
    conv(small).sum().backward()
    result["works_after"][name] = float(torch.ones(50 * MB)[-1])
    resource.setrlimit(resource.RLIMIT_DATA, old)
print(json.dumps(result))
"""


def run(arguments: list[str], **environment: str) -> subprocess.CompletedProcess[str]:
    clean = {key: value for key, value in os.environ.items() if key != "GLIBC_TUNABLES"}
    return subprocess.run(
        [sys.executable, *arguments],
        env=clean | {"PYTHONPATH": str(ROOT)} | environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )


@pytest.fixture(scope="module")
def probed(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """What PROBE printed, a line at a time."""
    folder = tmp_path_factory.mktemp("probe")
    (folder / "probe.py").write_text(PROBE)
    return run(["-m", "probe", "--out", "a b"], PYTHONPATH=f"{ROOT}{os.pathsep}{folder}").stdout.splitlines()


@linux
def test_the_allocator_is_settled_by_one_second_start(probed: list[str]) -> None:
    before, after, tunables, arguments = probed[:4]
    assert before == after, "one process, started twice"
    assert "glibc.malloc.mmap_threshold=1048576" in tunables
    assert "glibc.malloc.trim_threshold=1048576" in tunables
    assert arguments == "['--out', 'a b']"


@linux
def test_real_failures_are_recognised_and_the_process_goes_on(probed: list[str]) -> None:
    result: dict[str, Any] = json.loads(probed[4])
    assert len(result["errors"]) == 8
    assert None not in result["errors"].values(), result["errors"]
    assert list(result["recognised"].values()) == [True] * 8, result["errors"]
    assert list(result["works_after"].values()) == [1.0] * 8


def test_a_cpu_has_no_cap_but_keeps_the_readings() -> None:
    meter = CpuMeter()
    meter.reset_peak()
    before = meter.own()
    with meter.cap(before):
        held = torch.ones(100 * MB, dtype=torch.uint8)
    assert held[-1] == 1
    assert meter.peak() - before > 95 * MB
    with pytest.raises(KeyError), meter.cap(before):
        raise KeyError


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        np._core._exceptions._ArrayMemoryError((10**9,), np.dtype(np.float64)),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
        OSError(errno.ENOMEM, "Cannot allocate memory"),
        RuntimeError(
            "[enforce fail at alloc_cpu.cpp:121] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to "
            "allocate 2000000000 bytes. Error code 12 (Cannot allocate memory)"
        ),
        RuntimeError("could not create a primitive"),
        RuntimeError("could not create a memory object"),
        RuntimeError("std::bad_alloc"),
        RuntimeError("unable to mmap 800 bytes from file <x>: Cannot allocate memory (12)"),
        RuntimeError("CUDA error: out of memory"),
        RuntimeError("Triton Error [CUDA]: out of memory"),
        RuntimeError("CUDA driver error: out of memory"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
        RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED"),
        RuntimeError(
            "ncclUnhandledCudaError: Call to CUDA function failed.\nLast error:\nCuda failure 2 'out of memory'"
        ),
        RuntimeError("Critical error in pipeline:\nError in thread 3: CUDA allocation failed"),
        RuntimeError("Can't allocate 1073741824 bytes on device 0."),
    ],
    ids=lambda error: f"{type(error).__name__}-{str(error)[:40]}",
)
def test_out_of_memory_in_whatever_words(error: BaseException) -> None:
    assert is_out_of_memory(error)


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("shape '[2, 3]' is invalid for input of size 5"),
        RuntimeError("CUDA error: an illegal memory access was encountered"),
        RuntimeError("CUDA error: device-side assert triggered"),
        RuntimeError("cuDNN error: CUDNN_STATUS_NOT_SUPPORTED"),
        ValueError("out of memory"),
        OSError(errno.ENOSPC, "No space left on device"),
        KeyboardInterrupt(),
    ],
    ids=str,
)
def test_other_errors_are_not_taken_for_it(error: BaseException) -> None:
    assert not is_out_of_memory(error)


@pytest.mark.gpu
class TestGpuMeter:
    device = torch.device("cuda", 0)

    def test_peak_sees_what_was_freed(self) -> None:
        meter = open_meter(self.device)
        assert isinstance(meter, GpuMeter)
        meter.reset_peak()
        before = meter.own()
        held = torch.ones(512 * 2**20, dtype=torch.uint8, device=self.device)
        del held
        assert 512 * 2**20 <= meter.peak() - before <= 560 * 2**20
        meter.reset_peak()
        assert meter.peak() - before <= 64 * 2**20
        assert 0 < meter.own() <= meter.available() <= meter.total()

    def test_the_context_counts_as_ours(self) -> None:
        # Read in a process of its own: here, the context was there before the meter.
        script = (
            "import torch; from lofi_fast.memory.meter import open_meter; m = open_meter(torch.device('cuda', 0));"
            "print(m.source); print(m.own())"
        )
        source, own = run(["-c", script]).stdout.splitlines()
        assert int(own) > 100 * MB, source

    def test_beyond_the_cap_memory_runs_out_and_the_process_goes_on(self) -> None:
        meter = open_meter(self.device)
        meter.reset_peak()
        failed = False
        with meter.cap(meter.own() + 256 * 2**20):
            try:
                torch.empty(2**30, dtype=torch.uint8, device=self.device)
            except RuntimeError as error:
                failed = is_out_of_memory(error)
            fits = torch.ones(100 * 2**20, dtype=torch.uint8, device=self.device)
        assert failed
        assert fits[-1] == 1
        assert torch.ones(2**30, dtype=torch.uint8, device=self.device)[0] == 1

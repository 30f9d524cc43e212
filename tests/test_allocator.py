"""The CPU allocator counts to the byte, refuses beyond its limit, leaks nothing, and what it says is what is resident.

It cannot be taken out of a process again, so each check runs in one of its own.
"""

from __future__ import annotations

import functools
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from networks import frames
from patience import PATIENCE
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from lofi_fast.encoder.lean import encode
from lofi_fast.encoder.resnet import TSMResNet
from lofi_fast.memory import allocator
from lofi_fast.memory.meter import is_out_of_memory
from lofi_fast.memory.settle import open_meter
from lofi_fast.memory.trial import Trials

ROOT = Path(__file__).resolve().parents[1]
KIB, MIB, GIB = 2**10, 2**20, 2**30
LARGE = 256 * KIB  # bytes from which blocks are kept, and count in whole pages

pytestmark = [
    pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the CPU allocator is written for Linux"),
    pytest.mark.skipif(os.environ.get("LOFI_FAST_NATIVE") == "0", reason="LOFI_FAST_NATIVE=0 leaves it out"),
]


def child(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    paths = os.pathsep.join([str(ROOT), str(Path(__file__).parent)])
    environment = os.environ | {"PYTHONPATH": paths} | environment
    return subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)


def apart(check: Callable[..., None]) -> Callable[..., None]:
    """Run the check in a process of its own, with the allocator in place."""

    @functools.wraps(check)
    def run(**arguments: Any) -> None:
        call = f"import test_allocator as t; t.begin(); t.{check.__name__}.__wrapped__(**{arguments!r})"
        done = child(call)
        assert done.returncode == 0, done.stderr[-4000:]

    return run


def begin() -> None:
    assert allocator.install() is None, allocator.install()
    assert allocator.installed()
    torch.set_num_threads(2)
    torch.manual_seed(0)


def counted(num_bytes: int) -> int:
    """What a block of so many bytes counts."""
    return num_bytes if num_bytes < LARGE else -(-num_bytes // 4096) * 4096


def empty(num_bytes: int) -> Tensor:
    return torch.empty(num_bytes, dtype=torch.uint8)


def touched(num_bytes: int) -> Tensor:
    return torch.ones(num_bytes, dtype=torch.uint8)


def network(width: int = 16) -> nn.Sequential:
    layers: list[nn.Module] = []
    for inputs, outputs in ((3, width), (width, 2 * width), (2 * width, 2 * width)):
        layers += [nn.Conv2d(inputs, outputs, 3, padding=1), nn.BatchNorm2d(outputs), nn.ReLU(), nn.MaxPool2d(2)]
    net = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2 * width, 10))
    return net.to(memory_format=torch.channels_last)


def step(net: nn.Module, optimizer: torch.optim.Optimizer, num_images: int = 8, side: int = 32) -> None:
    """One training step, with operators of several kinds that allocate."""
    images = torch.rand(num_images, 3, side, side).contiguous(memory_format=torch.channels_last)
    doubled = torch.cat([images, images.flip(0)])[torch.arange(2 * num_images).flip(0)]
    optimizer.zero_grad(set_to_none=True)
    net(doubled).square().mean().backward()
    optimizer.step()


# Counting


@apart
def test_used_and_peak_are_the_bytes_of_the_tensors() -> None:
    start = allocator.read().used
    allocator.reset_peak()
    sizes = [0, 1, 63, 64, 65, 4096, LARGE - 1, LARGE, LARGE + 1, 2 * MIB, 2 * MIB + 4097, 7 * MIB, 300 * MIB]
    tensors = []
    expected = start
    for size in sizes:
        tensors.append(empty(size))
        expected += counted(size)
        assert allocator.read() == allocator.Allocated(expected, 0, expected, None)
        assert tensors[-1].data_ptr() % 64 == 0
        assert (tensors[-1].data_ptr() == 0) == (size == 0)
    peak = expected
    for size in sizes:
        tensors.pop(0)
        expected -= counted(size)
        assert allocator.read().used == expected
        assert allocator.read().peak == peak
    assert expected == start
    allocator.reset_peak()
    assert allocator.read().peak == start


@apart
def test_blocks_of_many_gigabytes() -> None:
    start = allocator.read().used
    blocks = [empty(5 * GIB), torch.empty(3 * GIB // 4, dtype=torch.float32)]  # address space: nothing is written
    blocks[0][-1] = 7
    blocks[1][-1] = 7.0
    assert allocator.read().used == start + 8 * GIB
    blocks.clear()
    assert allocator.read().used == start
    assert allocator.read().kept == 0, "what was never touched is not held, and would count as if it were"
    for size in (2**50, 2**62, 2**63 - 1):  # beyond any address space
        with pytest.raises(torch.OutOfMemoryError, match="out of memory"):
            empty(size)
    assert allocator.read().used == start


def test_blocks_from_before_do_not_count() -> None:
    code = """
import torch, test_allocator as t
from lofi_fast.memory import allocator
torch.manual_seed(0)
before = [torch.ones(n) for n in (1, 1000, 10_000_000)]
net = t.network()
optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
t.step(net, optimizer)  # oneDNN's scratch memory is then of the allocator before
t.begin()
start = allocator.read().used
assert start == 0
t.step(net, optimizer)
before[1].resize_(5_000_000)
assert before[1][:1000].sum() == 1000
del before, net, optimizer
import gc; gc.collect()
left = allocator.read().used
assert 0 <= left < 100_000, left
"""
    done = child(code)
    assert done.returncode == 0, done.stderr[-4000:]


def test_blocks_from_before_can_arrive_through_this_one(tmp_path: Path) -> None:
    """oneDNN frees by pointer alone, through whatever allocator is in place then."""
    compiler = shutil.which(os.environ.get("CXX", "c++"))
    if compiler is None:
        pytest.skip("needs a C++ compiler")
    source, library = tmp_path / "raw.cpp", tmp_path / "raw.so"
    source.write_text("""
#include <c10/core/CPUAllocator.h>
extern "C" void* take(size_t bytes) { return c10::GetCPUAllocator()->raw_allocate(bytes); }
extern "C" void give(void* block) { c10::GetCPUAllocator()->raw_deallocate(block); }
""")
    torch_folder = Path(torch.__file__).parent
    command = [compiler, "-std=c++20", "-shared", "-fPIC", "-isystem", torch_folder / "include", source, "-o", library]
    subprocess.run([*command, "-L", torch_folder / "lib", "-lc10"], check=True)
    code = f"""
import ctypes, test_allocator as t
from lofi_fast.memory import allocator
raw = ctypes.CDLL({str(library)!r})
raw.take.restype, raw.take.argtypes, raw.give.argtypes = ctypes.c_void_p, [ctypes.c_size_t], [ctypes.c_void_p]
before = [raw.take(100), raw.take(50 * t.MIB)]
ctypes.memset(before[1], 1, 50 * t.MIB)
t.begin()
ours = raw.take(3 * t.MIB)
assert allocator.read().used == 3 * t.MIB
resident = t.resident()
for block in before:
    raw.give(block)
assert resident - t.resident() > 45 * t.MIB
assert allocator.read() == allocator.Allocated(3 * t.MIB, 0, 3 * t.MIB, None)
raw.give(ours)
assert allocator.read().used == 0
"""
    done = child(code)
    assert done.returncode == 0, done.stderr[-4000:]


@apart
def test_the_profiler_sees_the_blocks() -> None:
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as prof:
        held = torch.empty(3 * MIB)
    assert held.nbytes in [event.self_cpu_memory_usage for event in prof.key_averages()]


# Keeping


@apart
def test_kept_blocks_serve_again_and_raise_no_peak() -> None:
    start = allocator.read().used
    first = touched(64 * MIB)
    address = first.data_ptr()
    del first
    assert allocator.read().kept == 64 * MIB
    second = empty(10 * MIB)  # the smallest that holds it, and its rest stays kept
    assert second.data_ptr() == address
    assert allocator.read() == allocator.Allocated(start + 10 * MIB, 54 * MIB, start + 64 * MIB, None)
    third = empty(54 * MIB - 4096)  # a small rest is given back
    assert third.data_ptr() == address + 10 * MIB
    assert allocator.read().kept == 0
    del second, third
    fourth = empty(60 * MIB)  # which no kept block holds: they make room for it
    assert allocator.read().used + allocator.read().kept <= start + 64 * MIB
    del fourth
    allocator.release()
    assert allocator.read().kept == 0


@apart
def test_kept_and_used_together_stay_within_the_most_used_and_the_limit() -> None:
    rng = random.Random(0)
    start = allocator.read().used
    allocator.reset_peak()
    held: list[tuple[Tensor, int]] = []
    for turn in range(4000):
        if held and rng.random() < 0.5:
            tensor, value = held.pop(rng.randrange(len(held)))
            assert tensor[0] == value and tensor[-1] == value
            del tensor
        else:
            size = int(2 ** rng.uniform(0, 24))
            tensor = empty(size) if turn % 3 else touched(size)  # one in three is worth keeping
            tensor[0] = tensor[-1] = turn % 251
            held.append((tensor, turn % 251))
            del tensor
        now = allocator.read()
        assert now.used == start + sum(counted(tensor.nbytes) for tensor, _ in held)
        assert now.used + now.kept <= now.peak
        if turn % 500 == 250:
            room = rng.randrange(MIB, 64 * MIB)
            allocator.limit(room)
            assert allocator.read().used + allocator.read().kept <= now.used + room
            allocator.limit(None)
        elif turn % 500 == 499:
            allocator.release()
            allocator.reset_peak()
            assert allocator.read().kept == 0
    held.clear()
    assert allocator.read().used == start


@apart
def test_a_limit_holds_for_kept_blocks_too() -> None:
    blocks = [touched(size * MIB) for size in (3, 5, 7, 11, 13, 17, 19)]
    del blocks
    before = allocator.read().used
    allocator.limit(20 * MIB)
    assert allocator.read().limit == before + 20 * MIB
    held = []
    for _ in range(4):
        held.append(empty(5 * MIB - 8192))
        assert allocator.read().used + allocator.read().kept <= before + 20 * MIB
    with pytest.raises(torch.OutOfMemoryError):
        empty(MIB)


# Refusing


@apart
def test_a_refusal_is_torchs_error_and_changes_nothing() -> None:
    held = empty(10 * MIB)
    for more in (0, 1, 1000, 5 * MIB):
        before = allocator.read()
        allocator.limit(more)
        assert allocator.read().limit == before.used + more
        empty(more)
        with pytest.raises(torch.OutOfMemoryError, match="out of memory") as raised:
            empty(more + 1)
        assert is_out_of_memory(raised.value)
        assert allocator.read().used == before.used
    allocator.limit(0)
    with pytest.raises(torch.OutOfMemoryError):
        held.resize_(11 * MIB)
    assert held.untyped_storage().nbytes() == 10 * MIB  # its sizes torch has changed already
    allocator.limit(None)
    assert allocator.read().limit is None
    held.resize_(11 * MIB)
    with pytest.raises(ValueError, match="more is -1"):
        allocator.limit(-1)


@apart
def test_operators_of_every_kind_are_refused() -> None:
    x = torch.rand(400, 400)
    rows = torch.arange(400)
    calls: dict[str, Callable[[], object]] = {
        "cat": lambda: torch.cat([x, x]),
        "index": lambda: x[rows],
        "index_put": lambda: x.index_put((rows,), x[:1]),
        "matmul": lambda: x @ x,
        "sort": lambda: x.sort(),
        "copy": lambda: x.to(torch.float64),
        "contiguous": lambda: x.t().contiguous(),
        "zeros": lambda: torch.zeros(10),
        "tensor": lambda: torch.tensor([1.0, 2.0]),
        "nonzero": lambda: x.nonzero(),
        "where": lambda: torch.where(x > 0.5, x, 0.0),
        "scatter": lambda: x.scatter_add(0, rows.expand(400, 400), x),
        "unique": lambda: x.unique(),
        "clone": lambda: x.clone(),
        "growing in place": lambda: torch.empty(0).resize_(1000),
        "an output": lambda: torch.add(x, x, out=torch.empty(0)),
    }
    for name, call in calls.items():
        start = allocator.read().used
        allocator.limit(0)
        try:
            call()
        except torch.OutOfMemoryError as error:
            assert "out of memory" in str(error)
        else:
            raise AssertionError(f"{name} was not refused")
        allocator.limit(None)
        assert allocator.read().used == start, name
        call()
        assert allocator.read().used == start, name


@apart
def test_the_lean_encoder_is_refused_in_its_own_backward_too() -> None:
    encoder = TSMResNet("tsm_r18", 8)
    encoder.freeze_batchnorm()
    images = frames(8)

    def run() -> None:
        encode(encoder, images, 4).sum().backward()

    start = allocator.read().used
    allocator.reset_peak()
    run()
    need = allocator.read().peak - start
    encoder.zero_grad(set_to_none=True)
    rng = random.Random(0)
    for _ in range(30):
        with LimitedFrom(rng.randrange(150), rng.randrange(need // 50)):
            try:
                run()
            except RuntimeError as error:  # through a kernel of ours a refusal can lose its class
                assert is_out_of_memory(error), error
            else:
                raise AssertionError("not refused")
        allocator.limit(None)
        encoder.zero_grad(set_to_none=True)
        assert allocator.read().used == start
    allocator.limit(need)
    run()


class LimitedFrom(TorchDispatchMode):
    """From operator `number` on, no more than `more` bytes beyond those in use then can be allocated."""

    def __init__(self, number: int, more: int) -> None:
        super().__init__()
        self.number, self.more = number, more
        self.called: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if len(self.called) == self.number:
            allocator.limit(self.more)
        self.called.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("num_threads", [1, 2])
@apart
def test_a_training_step_refused_anywhere_leaks_nothing_and_can_be_repeated(num_threads: int) -> None:
    torch.set_num_threads(num_threads)
    net = network()
    optimizer = torch.optim.SGD(net.parameters(), lr=1e-3, momentum=0.9)
    step(net, optimizer)  # the optimizer's state is allocated in the first
    optimizer.zero_grad(set_to_none=True)
    start = allocator.read().used
    allocator.reset_peak()
    with LimitedFrom(-1, 0) as free:
        step(net, optimizer)
    need = allocator.read().peak - start
    optimizer.zero_grad(set_to_none=True)
    assert allocator.read().used == start

    rng = random.Random(0)
    refused = set()
    for _ in range(100):
        number = rng.randrange(len(free.called))
        more = rng.choice([0, rng.randrange(100_000), rng.randrange(2 * MIB)])
        raised = None
        with LimitedFrom(number, more) as limited:
            try:
                step(net, optimizer)
            except torch.OutOfMemoryError as error:
                raised = str(error)
        if raised is None:  # what was left of the step had room
            assert more > 0 or number > len(free.called) - 20
        else:
            assert "out of memory" in raised
            refused.add(limited.called[-1])
        allocator.limit(None)
        optimizer.zero_grad(set_to_none=True)
        assert allocator.read().used == start
    for name in ("cat", "convolution", "convolution_backward", "native_batch_norm_backward", "max_pool2d"):
        assert any(f".{name}" in place for place in refused), refused

    for more in (need // 3, need - 4096):
        allocator.limit(more)
        allocator.reset_peak()
        with pytest.raises(torch.OutOfMemoryError):
            step(net, optimizer)
        assert allocator.read().peak <= start + more
        allocator.limit(None)
        optimizer.zero_grad(set_to_none=True)
    allocator.limit(need)
    step(net, optimizer)
    assert all(parameter.isfinite().all() for parameter in net.parameters())


@apart
def test_convolutions_are_refused_in_forward_in_backward_and_for_their_scratch_memory() -> None:
    convolution = nn.Conv2d(48, 24, 3, padding=1)
    image = torch.rand(4, 48, 57, 57)

    def refuse(run: Callable[[], object], shares: list[float]) -> int:
        """Bytes that `run` takes beyond those it leaves in use, after it was refused at each share of its peak."""
        start = allocator.read().used
        allocator.reset_peak()
        run()
        peak, left = allocator.read().peak - start, allocator.read().used - start
        convolution.zero_grad(set_to_none=True)
        for share in shares:
            allocator.limit(int(share * peak))
            with pytest.raises(torch.OutOfMemoryError, match="out of memory"):
                run()
            allocator.limit(None)
            convolution.zero_grad(set_to_none=True)
            assert allocator.read().used == start
        return peak - left

    shares = [0, 0.2, 0.4, 0.6, 0.8, 0.99]
    held: list[Tensor] = []

    def forward() -> None:
        held[:] = []
        held[:] = [convolution(image)]

    def backward() -> None:
        held[0].sum().backward(retain_graph=True)

    with torch.no_grad():
        scratch = refuse(lambda: convolution(image), shares)
    if torch.backends.mkldnn.is_available():
        assert scratch > image.nbytes // 2, scratch  # its reordered image, in memory that is oneDNN's
    forward()
    refuse(backward, shares)


# Threads and processes


@apart
def test_many_threads_at_once() -> None:
    start = allocator.read().used
    errors: list[str] = []

    def hammer(seed: int) -> None:
        rng = random.Random(seed)
        held: list[Tensor] = []
        for turn in range(1500):
            if len(held) > 6 or (held and rng.random() < 0.4):
                tensor = held.pop(rng.randrange(len(held)))
                if not (tensor[0] == seed and tensor[-1] == seed):
                    errors.append(f"thread {seed}: a block was another's too")
                del tensor
            else:
                try:
                    tensor = empty(int(2 ** rng.uniform(2, 23)))
                except torch.OutOfMemoryError:
                    continue
                tensor[0] = tensor[-1] = seed
                held.append(tensor)
                del tensor
            if turn % 100 == seed:
                allocator.release()
            elif turn % 100 == seed + 10:
                allocator.limit(20 * MIB)
            elif turn % 100 == seed + 20:
                allocator.limit(None)

    threads = [threading.Thread(target=hammer, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert allocator.read().used == start


@apart
def test_blocks_and_the_allocator_outlive_a_fork() -> None:
    torch.set_num_threads(1)
    ours = torch.full((3 * MIB,), 3, dtype=torch.uint8)
    kept = empty(5 * MIB)
    del kept
    before = allocator.read()
    stop = threading.Event()

    def busy() -> None:  # so that some fork finds the lock taken
        while not stop.is_set():
            empty(100)
            empty(2 * MIB)

    threads = [threading.Thread(target=busy) for _ in range(2)]
    for thread in threads:
        thread.start()
    children = []
    try:
        for _ in range(20):
            pid = os.fork()
            if pid == 0:
                good = int(ours.sum()) == 3 * ours.numel()
                mine = torch.full((4 * MIB,), 1, dtype=torch.uint8)
                ours.zero_()
                good = good and int(mine.sum()) == mine.numel()
                allocator.release()
                os._exit(0 if good else 1)
            children.append(pid)
        deadline = time.monotonic() + PATIENCE
        while children and time.monotonic() < deadline:
            time.sleep(0.01)
            for pid in list(children):
                ended, status = os.waitpid(pid, os.WNOHANG)
                if ended:
                    children.remove(pid)
                    assert status == 0
        assert not children, "a child waits for a lock that nobody gives back"
    finally:
        for pid in children:
            os.kill(pid, signal.SIGKILL)
        stop.set()
        for thread in threads:
            thread.join()
    assert int(ours.sum()) == 3 * ours.numel()
    assert allocator.read().used == before.used


# What is resident


def resident() -> int:
    return int(psutil.Process().memory_info().rss)


@apart
def test_the_resident_set_follows_the_count() -> None:
    torch.set_num_threads(1)
    net = network(32)
    optimizer = torch.optim.SGD(net.parameters(), lr=1e-3, momentum=0.9)
    apart_from_tensors = []
    for _ in range(8):
        step(net, optimizer, num_images=16, side=96)
        now = allocator.read()
        apart_from_tensors.append(resident() - now.used - now.kept)
    settled = apart_from_tensors[2:]
    assert max(settled) - min(settled) < 4 * MIB, apart_from_tensors
    before = resident()
    kept = allocator.read().kept
    assert kept > 50 * MIB
    allocator.release()
    assert before - resident() > 0.9 * kept


@apart
def test_steps_of_mixed_sizes_do_not_grow() -> None:
    torch.set_num_threads(1)
    rng = random.Random(0)
    net = network()
    optimizer = torch.optim.SGD(net.parameters(), lr=1e-3, momentum=0.9)
    shapes = [(num_images, side) for num_images in (3, 6, 9, 12) for side in (48, 64, 80, 96)]
    for shape in shapes:  # oneDNN keeps the code that it makes for each
        step(net, optimizer, *shape)
    most = resident()
    apart_from_tensors = []
    for _ in range(50):
        step(net, optimizer, *rng.choice(shapes))
        now = allocator.read()
        apart_from_tensors.append(resident() - now.used - now.kept)
    assert resident() < most + 8 * MIB
    assert max(apart_from_tensors) - min(apart_from_tensors) < 8 * MIB, apart_from_tensors


# Where it is not


def test_nothing_is_counted_before_install() -> None:
    code = """
from lofi_fast.memory import allocator
assert not allocator.installed()
for call in (allocator.read, allocator.release, allocator.reset_peak, lambda: allocator.limit(None)):
    try:
        call()
    except RuntimeError as error:
        assert "install()" in str(error)
    else:
        raise AssertionError(call)
"""
    done = child(code)
    assert done.returncode == 0, done.stderr


def test_switched_off_it_says_so() -> None:
    code = "from lofi_fast.memory import allocator; print(allocator.install(), allocator.installed())"
    done = child(code, LOFI_FAST_NATIVE="0")
    assert done.stdout == "LOFI_FAST_NATIVE=0 leaves the CPU allocator out False\n", done.stderr


def test_another_torchs_or_a_broken_library_is_not_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    built = allocator._find()
    assert built is not None, "the CPU allocator is not built: `make test` builds it, or see CMakeLists.txt"
    version = torch.__version__.partition("+")[0].encode()
    library = tmp_path / "_cpu_allocator.so"
    monkeypatch.setattr(allocator, "_find", lambda: library)
    other = bytes([version[0] ^ 1]) + version[1:]  # "2.13.0" -> "3.13.0"
    library.write_bytes(built.read_bytes().replace(b"with torch " + version, b"with torch " + other))
    reason = allocator.install()
    assert reason is not None and f"was built with torch {other.decode()}, and this is torch" in reason
    library.write_bytes(b"not a library")
    assert "is no CPU allocator of ours" in (allocator.install() or "")
    library.write_bytes(b"lofi_fast: built with torch " + version + b"\0")
    assert f"cannot load {library}" in (allocator.install() or "")
    monkeypatch.setattr(allocator, "_find", lambda: None)
    assert "is not built" in (allocator.install() or "")
    monkeypatch.setattr(sys, "platform", "darwin")
    assert "written for Linux" in (allocator.install() or "")
    assert not allocator.installed()


def test_the_newest_build_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "lofi_fast" / "memory"
    package.mkdir(parents=True)
    monkeypatch.setattr(allocator, "__file__", str(package / "allocator.py"))
    assert allocator._find() is None
    installed = package / "_cpu_allocator.so"
    shutil.copy2(__file__, installed)
    plain = tmp_path / "build" / "_cpu_allocator.so"
    plain.parent.mkdir()
    plain.write_text("newer")
    assert allocator._find() == installed  # build/ counts beside a CMakeLists.txt alone
    (tmp_path / "CMakeLists.txt").touch()
    assert allocator._find() == plain


@apart
def test_a_trial_that_ran_out_leaves_nothing_behind() -> None:
    """What it had taken would otherwise count as the process's own, and the next trial would have that much less."""
    meter = open_meter(torch.device("cpu"))
    trials = Trials(meter, GIB, lambda *_: None, lambda *_: None)

    def step() -> None:
        _held = [torch.ones(MIB) for _ in range(1000)]

    meter.release()
    before = meter.own()
    assert trials.measure(step, before + 200 * MIB) is None
    assert meter.own() - before < 20 * MIB

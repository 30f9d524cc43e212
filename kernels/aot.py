"""Compile Triton kernels ahead of time, for GPUs that are not there, and read what came out: `python -m bench kernels`.

Under TRITON_INTERPRET=1 kernels are not compilable objects, so this needs a process without it.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from .launch import Launch

TARGETS = (75, 80, 86, 89, 90, 100, 120)

_TYPES = {
    torch.float64: "fp64",
    torch.float32: "fp32",
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.int64: "i64",
    torch.int32: "i32",
    torch.int8: "i8",
    torch.uint8: "u8",
    torch.bool: "i1",
}


@dataclass(frozen=True)
class Compiled:
    """What the compiler made of one launch for one target. Accesses are counted in the machine code, by their bits."""

    target: int  # compute capability times 10
    registers: int  # of one thread
    spilled: int  # bytes of local memory of one thread: spills and stack
    shared: int  # bytes of shared memory of one block
    loads: dict[int, int]  # width in bits -> instructions that read global memory
    stores: dict[int, int]  # width in bits -> instructions that write it

    @property
    def widest_load(self) -> int:
        return max(self.loads, default=0)

    @property
    def widest_store(self) -> int:
        return max(self.stores, default=0)


def source_of(launch: Launch) -> ASTSource:
    """The launch as the just-in-time compiler would see it: integers that are 1, or divisible by 16, known as such.

    Tensors count as 16-byte aligned, as PyTorch's own allocations are.
    """
    signature: dict[str, str] = {}
    constants: dict[str, Any] = dict(launch.constants)
    attributes: dict[tuple[int], list[list[Any]]] = {}
    for index, name in enumerate(launch.kernel.arg_names):
        if name in launch.constants:
            signature[name] = "constexpr"
            continue
        value = launch.arguments[name]
        if value is None or (isinstance(value, int) and value == 1):
            signature[name] = "constexpr"
            constants[name] = value
            continue
        if isinstance(value, Tensor):
            signature[name] = f"*{_TYPES[value.dtype]}"
            aligned = True
        elif isinstance(value, int):
            signature[name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            aligned = value % 16 == 0
        else:
            signature[name] = "fp32"
            aligned = False
        if aligned:
            attributes[(index,)] = [["tt.divisibility", 16]]
    return ASTSource(launch.kernel, signature, constants, attributes)


def compile_launch(launch: Launch, target: int) -> Compiled:
    """Compile for compute capability target/10; raises whatever Triton or ptxas raise."""
    options = {"num_warps": launch.num_warps, "enable_fp_fusion": launch.fp_fusion}
    kernel = triton.compile(source_of(launch), target=GPUTarget("cuda", target, 32), options=options)
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(kernel.asm["cubin"])
        usage = _run(knobs.nvidia.cuobjdump.path, "--dump-resource-usage", cubin)
        code = _run(knobs.nvidia.nvdisasm.path, "--print-code", "--no-dataflow", cubin)
    fields = dict(re.findall(r"\b(REG|STACK|LOCAL|SHARED):(\d+)", usage))
    return Compiled(
        target=target,
        registers=int(fields["REG"]),
        spilled=int(fields["STACK"]) + int(fields["LOCAL"]),
        shared=int(kernel.metadata.shared),
        loads=_widths(code, "LDG"),
        stores=_widths(code, "STG"),
    )


def _widths(code: str, instruction: str) -> dict[int, int]:
    counts: Counter[int] = Counter()
    for suffixes in re.findall(rf"\b{instruction}((?:\.\w+)*)", code):
        width = re.search(r"\.[US]?(8|16|64|128|256)\b", suffixes)
        counts[int(width[1]) if width else 32] += 1
    return dict(sorted(counts.items()))


def _run(*command: Any) -> str:
    return subprocess.run([str(part) for part in command], check=True, capture_output=True, text=True).stdout

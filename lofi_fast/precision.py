"""Device and mixed precision: chosen from what the hardware can do, and said."""

from __future__ import annotations

import os
import re
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

from lofi_fast import gpu
from lofi_fast.config import PrecisionName
from lofi_fast.errors import InputError

if TYPE_CHECKING:  # imported where it is used: the command `plan` reads this file, and answers without torch
    import torch

NAMES: dict[PrecisionName, str] = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}
# Values of ONEDNN_MAX_CPU_ISA with which oneDNN computes nothing in bf16, and more, with which it does without AMX.
WITHOUT_BF16 = ("SSE41", "AVX", "AVX2", "AVX2_VNNI")
WITHOUT_AMX = (
    *WITHOUT_BF16, "AVX2_VNNI_2", "AVX512_CORE", "AVX512_CORE_VNNI", "AVX512_CORE_BF16", "AVX512_CORE_FP16",
    "AVX10_1_512",
)  # fmt: skip
BF16_CAPABILITY = (8, 0)  # Ampere; a Turing card (the 11 GB 2080 Ti) has fp16 tensor cores alone


def choose_device(name: str) -> torch.device:
    """ "auto", "cuda" or "cpu". Raises InputError when a GPU is asked for and none can be used, and when PyTorch shows
    one that it has no code for. Where "auto" is the CPU although a card is here, `gpu.unused` says why.
    """
    import torch

    if name == "cuda" and not torch.cuda.is_available():
        reason = gpu.unused() or "PyTorch sees no usable GPU here; check the driver"
        raise InputError(f"--device cuda: {reason}; or use --device cpu")
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(name)
    if device.type == "cuda":
        gpu.check_torch(device)
    return device


@dataclass(frozen=True)
class Precision:
    """Matrix products in `dtype` under autocast, parameters in fp32; fp16 gradients are scaled."""

    dtype: torch.dtype
    reason: str

    @property
    def scaled(self) -> bool:
        import torch

        return self.dtype is torch.float16

    def autocast(self, device: torch.device) -> AbstractContextManager[None]:
        import torch

        return torch.autocast(device.type, dtype=self.dtype, enabled=self.dtype is not torch.float32)

    def __str__(self) -> str:
        return f"{str(self.dtype).removeprefix('torch.')} ({self.reason})"


def resolved(asked: PrecisionName, capability: tuple[int, int] | None) -> tuple[PrecisionName, str]:
    """(what is computed in, why): what was asked for, or bf16 where the device multiplies it, and else fp16 on a GPU
    and fp32 on a CPU. `capability` None: this CPU. Raises InputError for what the device has not. Needs no torch.
    """
    if asked == "fp32":
        return "fp32", "asked for"
    if capability is None:
        if asked == "fp16":
            raise InputError("--precision fp16: a CPU multiplies bf16 or fp32; give one of these, or auto")
        if asked == "bf16" and not cpu_computes_bf16():
            raise InputError(
                "--precision bf16: on this CPU PyTorch's convolutions sum gradients in bf16, which loses much of them; "
                "give fp32 or auto"
            )
        if asked == "bf16":
            return "bf16", "asked for"
        return ("bf16", "a CPU that multiplies it") if cpu_multiplies_bf16() else ("fp32", "a CPU")
    name = f"compute capability {capability[0]}.{capability[1]}"
    if asked == "bf16" and capability < BF16_CAPABILITY:
        raise InputError(f"--precision bf16: this GPU ({name}) has none; give fp16, fp32 or auto")
    if asked == "fp16":
        return "fp16", f"{name}; gradients are scaled"
    return ("bf16", name) if capability >= BF16_CAPABILITY else ("fp16", f"{name} has no bf16; gradients are scaled")


def choose_precision(device: torch.device, asked: PrecisionName = "auto") -> Precision:
    """See `resolved`."""
    import torch

    capability = torch.cuda.get_device_capability(device) if device.type == "cuda" else None
    name, reason = resolved(asked, capability)
    return Precision(getattr(torch, NAMES[name]), reason)


def as_trained(device: torch.device, own: PrecisionName) -> Precision:
    """For a detector whose run was asked for `own`: that, or what the device has."""
    try:
        return choose_precision(device, own)
    except InputError:
        return choose_precision(device)


def going_on_in(device: torch.device, asked: PrecisionName, before: str | None) -> tuple[Precision, str | None]:
    """(the precision of a run that is resumed, what there is to say of it): the run's own unless another is asked for
    or the device has not got it. `before`: what environment.json says, None where it says nothing.
    """
    chosen = choose_precision(device, asked)
    own = next((name for name, dtype in NAMES.items() if before is not None and before.startswith(dtype)), None)
    if own is None or str(chosen).startswith(NAMES[own]):
        return chosen, None
    if asked == "auto":
        try:
            kept = choose_precision(device, own)
        except InputError:
            return chosen, f"the run began in {NAMES[own]}, which this device does not multiply: it goes on in {chosen}"
        return Precision(kept.dtype, "as the run began"), None
    return chosen, f"the run began in {NAMES[own]}, and goes on in {chosen}"


@lru_cache
def cpu_multiplies_bf16() -> bool:
    """Whether this CPU has a unit for products of bf16 matrices (AMX), and oneDNN, whose convolutions use it, is not
    told to do without (ONEDNN_MAX_CPU_ISA). Elsewhere bf16 is slower than fp32: AVX512_BF16 alone, on a Xeon,
    multiplies at half the rate of fp32.
    """
    return "amx_bf16" in _cpu_flags() and _limit() not in WITHOUT_AMX


@lru_cache
def cpu_computes_bf16() -> bool:
    """Whether oneDNN takes bf16 on this CPU. Where it does not, PyTorch has convolutions of its own, which sum a
    weight's gradient over the images of a batch in bf16: with some thousands of them the sum stops growing. Where it
    cannot be told, as on other systems than Linux, it is taken for granted.
    """
    flags = _cpu_flags()
    if "asimd" in flags:  # ARM
        return "bf16" in flags
    if _limit() in WITHOUT_BF16:
        return False
    return "sse2" not in flags or {"avx512bw", "avx512vl", "avx512dq"} <= flags or "avx_ne_convert" in flags


def _limit() -> str:
    return os.environ.get("ONEDNN_MAX_CPU_ISA", os.environ.get("DNNL_MAX_CPU_ISA", "")).upper()


def _cpu_flags() -> set[str]:
    """Empty where this is not Linux."""
    try:
        text = Path("/proc/cpuinfo").read_text()
        return set(re.findall(r"^(?:flags|Features)\s*:(.*)$", text, re.MULTILINE)[0].split())
    except (OSError, IndexError):
        return set()

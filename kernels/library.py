"""The torch operator library ``lofi_fast`` and the shared library that holds the C++ forms of its operators.

Schemas, fakes and references are registered from Python, so every operator exists even where nothing was built; the
shared library only adds CPU kernels to them (LibTorch stable ABI), and Triton serves CUDA where it is installed.
``describe()`` says which form of each runs.

The environment variable ``LOFI_FAST_NATIVE`` decides at import: ``auto`` (default) loads the shared library if there is
one, ``1`` raises ImportError when there is none, ``0`` leaves it alone.
"""

from __future__ import annotations

import importlib.metadata
import os
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

# Owned here for the life of the process: the operators are unregistered when this object dies.
LIBRARY = torch.library.Library("lofi_fast", "DEF")

# Device type -> operator -> the form that runs, filled by each operator's package as it is imported.
forms: dict[str, dict[str, str]] = {"cpu": {}, "cuda": {}}

# What `operator` calls past the dispatcher: Triton forms, and autograd functions around those that have a derivative.
_triton: dict[str, Callable[..., Any]] = {}
_recorded: dict[str, Callable[..., Any]] = {}
_ORDINARY = frozenset((Tensor, torch.nn.Parameter, type(None)))


def _setting() -> str:
    value = os.environ.get("LOFI_FAST_NATIVE", "auto")
    if value not in ("auto", "1", "0"):
        raise ValueError(f"LOFI_FAST_NATIVE is {value!r}; it must be auto, 1 or 0")
    return value


def _find() -> Path | None:
    """The newest of the installed library (beside this file) and a plain CMake build of a source tree (build/)."""
    here = Path(__file__).parent
    root = here.parents[1]
    places = [here / "_native.so"]
    if (root / "CMakeLists.txt").exists():
        places.append(root / "build" / "_native.so")
    built = [place for place in places if place.exists()]
    return max(built, key=lambda place: place.stat().st_mtime_ns, default=None)


def why_not_built() -> str:
    """Why there is no library, as the installation left it (setup.py), or as it looks where it left nothing."""
    left = Path(__file__).with_name("not_built.txt")
    if left.exists():
        return left.read_text().strip()
    lacking = [name for name in ("cmake", "c++") if shutil.which(name) is None]
    return f"{' and '.join(lacking)} not on PATH" if lacking else "nothing was built at the installation"


def _load(setting: str) -> Path | None:
    if setting == "0":
        return None
    path = _find()
    if path is None:
        if setting == "1":
            raise ImportError(f"LOFI_FAST_NATIVE=1, but the C++ kernels are not built ({why_not_built()})")
        warnings.warn(
            f"lofi_fast: the C++ kernels are not built ({why_not_built()}). So slower references run on the CPU, whose "
            "memory then has no hard cap; install what is missing, then lofi_fast again, to have them, or set "
            "LOFI_FAST_NATIVE=0 to be told no more",
            stacklevel=2,
        )
        return None
    try:
        torch.ops.load_library(path)
    except OSError as error:
        # A library that is there but does not load is a broken installation; choosing the reference would hide it.
        raise ImportError(
            f"cannot load {path} ({error.__cause__ or error}): rebuild it, or set LOFI_FAST_NATIVE=0"
        ) from error
    return path


_native_setting = _setting()
native_path = _load(_native_setting)


def native_available() -> bool:
    """Whether the shared library with the C++ kernels is loaded in this process."""
    return native_path is not None


def _triton_version() -> str | None:
    try:
        return importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        return None


triton_version = _triton_version()


def define(
    schema: str,
    reference: Callable[..., Any],
    fake: Callable[..., Any],
    triton: Callable[..., Any] | None = None,
    direct: Callable[..., Any] | None = None,
) -> None:
    """Define an operator by its schema, and choose its form for each device type.

    On the CPU the C++ kernel runs where it is loaded, else the reference; on CUDA the Triton form, where the operator
    has one and Triton is installed, else the reference. Every form and the fake (output shapes, strides and dtypes
    alone) take the arguments of the schema in their order. The choice is recorded in ``forms``.

    ``direct`` is what ``operator`` calls in place of ``triton``: it may give None where the schema has an empty tensor.
    """
    name = schema.partition("(")[0]
    LIBRARY.define(schema)
    torch.library.register_fake(f"lofi_fast::{name}", fake, lib=LIBRARY)
    # Asked of the dispatcher, since a library built before the operator was written does not have it.
    if torch._C._dispatch_has_kernel_for_dispatch_key(f"lofi_fast::{name}", "CPU"):
        forms["cpu"][name] = "C++"
    else:
        LIBRARY.impl(name, reference, "CPU")
        if _native_setting == "0":
            forms["cpu"][name] = "reference (LOFI_FAST_NATIVE=0)"
        elif native_path is None:
            forms["cpu"][name] = "reference (not built)"
        else:
            forms["cpu"][name] = f"reference (not in {native_path}: rebuild it)"
    if triton is not None and triton_version is not None:
        LIBRARY.impl(name, triton, "CUDA")
        _triton[name] = direct or triton
        forms["cuda"][name] = f"Triton {triton_version}"
    elif triton is not None:
        LIBRARY.impl(name, reference, "CUDA")
        forms["cuda"][name] = "reference (Triton is not installed)"


def compose(schema: str, form: Callable[..., Any], fake: Callable[..., Any]) -> None:
    """Define an operator for CPUs that has one form, made of PyTorch's operators; see ``define``."""
    name = schema.partition("(")[0]
    LIBRARY.define(schema)
    LIBRARY.impl(name, form, "CPU")
    torch.library.register_fake(f"lofi_fast::{name}", fake, lib=LIBRARY)


def differentiate(
    name: str, backward: Callable[..., Any], setup_context: Callable[[Any, tuple[Any, ...], Any], None] | None = None
) -> None:
    """Give a defined operator its derivative. ``backward`` and ``setup_context`` are those of an autograd function."""
    torch.library.register_autograd(f"lofi_fast::{name}", backward, setup_context=setup_context, lib=LIBRARY)
    if name not in _triton:
        return
    form = _triton[name]

    def forward(ctx: Any, *arguments: Any) -> Any:
        output = form(*arguments)
        if setup_context is not None:
            setup_context(ctx, arguments, output)
        return output

    members = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
    function: Any = type(name, (torch.autograd.Function,), members)
    # Not its own `apply`, which looks for transforms of torch.func once more, in Python.
    _recorded[name] = super(torch.autograd.Function, function).apply


def operator(name: str, *tensors: Tensor | None) -> Callable[..., Any]:
    """What a public function calls for the operator: a form that costs the host least.

    For ordinary tensors on a GPU that is the Triton form itself, or an autograd function around it where a graph is
    recorded: torch.library's layers are Python, and cost the host more than the launch. Everything else goes through
    the dispatcher: what is compiled, transformed (torch.func) or watched (a dispatch mode) must be seen by it.

    Args:
        tensors: the arguments that may need a gradient; the first is on the device that counts.
    """
    if (
        not torch.compiler.is_compiling()
        and name in _triton
        and tensors[0].is_cuda  # type: ignore[union-attr]
        and _ORDINARY.issuperset(map(type, tensors))
        and not torch._C._are_functorch_transforms_active()
        and not torch._C._len_torch_dispatch_stack()
    ):
        recorded = torch.is_grad_enabled() and any([x is not None and x.requires_grad for x in tensors])
        form = _recorded.get(name) if recorded else _triton[name]
        if form is not None:
            return form
    return getattr(torch.ops.lofi_fast, name)  # type: ignore[no-any-return]


def describe(device: str = "cpu") -> str:
    """One line naming the form of every operator that runs on ``device``: ``soft_nms, nms: C++ · stem: Triton 3.7.1``.

    An operator without a form for a GPU (soft_nms) runs on the CPU there, and is named with that form.
    """
    operators: dict[str, list[str]] = {}
    for name, form in (forms["cpu"] | forms[torch.device(device).type]).items():
        operators.setdefault(form, []).append(name)
    return " · ".join(f"{', '.join(names)}: {form}" for form, names in operators.items())

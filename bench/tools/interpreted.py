"""`python -m bench.tools.interpreted COMMAND ...`: a command of the bench on a CPU that runs what a GPU would run.

Every operator's Triton form takes the place of its C++ form, under Triton's interpreter.
"""

from __future__ import annotations

import os
import sys
import warnings
from functools import partial
from typing import Any

os.environ["TRITON_INTERPRET"] = "1"  # read when a kernel is imported

import torch

from bench.__main__ import main
from lofi_fast.kernels import library

# Owned here, as the process's life is this module's.
_OVERRIDES = torch.library.Library("lofi_fast", "IMPL")


def _as_on_cuda(operator: Any, *arguments: Any) -> Any:
    return operator.redispatch(torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA), *arguments)


def interpret() -> None:
    """Dispatch the CPU's calls to what is registered for CUDA."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of overriding, which is meant
        for name, form in library.forms["cuda"].items():
            operator = getattr(torch.ops.lofi_fast, name).default
            _OVERRIDES.impl(name, partial(_as_on_cuda, operator), "CPU", allow_override=True)
            library.forms["cpu"][name] = f"{form}, interpreted"


if __name__ == "__main__":
    interpret()
    sys.exit(main(sys.argv[1:]))

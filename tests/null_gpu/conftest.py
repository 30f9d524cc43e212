"""The project's CUDA path on a null GPU: stub CUDA libraries under a real CUDA build of torch (`make null-gpu`).

torch's dispatcher, autograd and caching allocator and Triton's compiler and launcher are the real ones. Kernels do
nothing. So launches, waits of the host, bytes, and types and devices that do not match are seen; results, the speed of
kernels and what cuDNN, nvJPEG or NVDEC do are not.

Each test runs a scenario (scenarios.py) in a process of its own, on a card of the memory and the compute capability
that it asks for, and looks at what came of it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, Protocol

import pytest

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
ROWS: list[dict[str, Any]] = []


class Machine(Protocol):
    def __call__(
        self, scenario: str, /, *, capability: str = "86", total: float = 80e9, expandable: bool = True,
        status: int = 0, **arguments: Any,
    ) -> dict[str, Any]:  # fmt: skip
        """What a scenario found on a card of `total` bytes; with other status than 0, what it `said`."""


class Row(Protocol):
    def __call__(self, what: str, /, **columns: Any) -> None:
        """Put a row into the table that ends the session."""


def built() -> Path | None:
    """The folder of the stub libraries, which `make null-gpu` names."""
    folder = os.environ.get("NULL_GPU")
    return Path(folder) if folder else None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if built() is not None:
        return
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.skip(reason="needs the CUDA build of torch and stubs: make null-gpu"))


@pytest.fixture
def machine() -> Machine:
    folder = built()
    assert folder is not None

    def run(
        scenario: str, /, *, capability: str = "86", total: float = 80e9, expandable: bool = True, status: int = 0,
        **arguments: Any,
    ) -> dict[str, Any]:  # fmt: skip
        environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"} | {
            "LD_PRELOAD": f"{folder}/libcudart.so.13:{folder}/libcuda.so.1",
            "LD_LIBRARY_PATH": str(folder),
            "TRITON_LIBCUDA_PATH": str(folder),
            "TRITON_CACHE_DIR": str(folder / "triton"),
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": str(ROOT),
            "PYTORCH_ALLOC_CONF": f"expandable_segments:{expandable}",
            "NULL_CC": capability,
            "NULL_TOTAL": str(round(total)),
        }
        command = [sys.executable, str(HERE / "scenarios.py"), scenario, json.dumps(arguments)]
        began = time.monotonic()
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=500)
        said = f"{done.stdout[-6000:]}\n{done.stderr[-6000:]}"
        assert done.returncode == status, said
        if status:
            return {"said": said}
        found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
        return found | {"seconds": round(time.monotonic() - began, 1)}

    return run


@pytest.fixture
def row() -> Row:
    def add(what: str, /, **columns: Any) -> None:
        ROWS.append({"what": what, **columns})

    return add


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if not ROWS:
        return
    columns = list(dict.fromkeys(key for row in ROWS for key in row))
    cells = [[_text(row.get(column)) for column in columns] for row in ROWS]
    widths = [max(map(len, column)) for column in zip(columns, *cells, strict=True)]
    terminalreporter.section("null GPU")
    for line in (columns, *cells):
        terminalreporter.write_line("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)))


def _text(value: Any) -> str:
    return "" if value is None else f"{value:,}" if isinstance(value, int) else str(value)

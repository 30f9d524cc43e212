"""Every Triton kernel compiled for every target, as `python -m bench kernels` does it: what must hold of the code."""

from __future__ import annotations

import ast
import importlib.util
import os
import subprocess
import sys

import pytest

from bench.tools.rows import ROOT, Row, read_rows
from lofi_fast.kernels.library import triton_version

TARGETS = {"75", "80", "86", "89", "90", "100", "120"}
OPERATORS = sorted(path.parent.name for path in (ROOT / "kernels").glob("*/kernel.py"))
ON_TENSOR_CORES = {"align_backward_product_kernel"}  # which Triton has from sm_80 on
WRITES_LITTLE = {"align_backward_kernel", *ON_TENSOR_CORES}  # a sum over thousands of values for each that it writes
WRITES_A_SCALE = {"quantize_kernel"}  # beside its codes one store more, of a number for each channel

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> list[Row]:
    """A row for each compilation, from a process in which kernels are not interpreted."""
    folder = tmp_path_factory.mktemp("aot")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    results = folder / "kernels.jsonl"
    done = subprocess.run(
        [sys.executable, "-m", "bench", "kernels", "--thin", "--save", "--results", str(results)],
        cwd=ROOT, env=environment | {"TRITON_CACHE_DIR": str(folder / "cache")}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return read_rows(results)


def of(rows: list[Row], op: str) -> list[Row]:
    found = [row for row in rows if row["op"] == op]
    assert found, f"{op} has no examples"
    return found


def launched(op: str) -> set[str]:
    """Names of the functions under triton.jit that no other function calls: the kernels."""
    trees = {path: ast.parse(path.read_text()) for path in (ROOT / "kernels").glob("*/*.py")}
    called = {
        ast.unparse(node.func) for tree in trees.values() for node in ast.walk(tree) if isinstance(node, ast.Call)
    }
    compiled = (
        node.name
        for path, tree in trees.items()
        for node in tree.body
        if path.parent.name == op
        and isinstance(node, ast.FunctionDef)
        and "triton.jit" in map(ast.unparse, node.decorator_list)
    )
    return set(compiled) - called


def where(row: Row, target: str) -> str:
    return f"{row['op']}: {row['launches'][0]} (sm_{target})"


@pytest.mark.parametrize("op", OPERATORS)
def test_every_kernel_is_compiled_for_every_target(rows: list[Row], op: str) -> None:
    found = of(rows, op)
    assert all(row["versions"] == {"triton": triton_version} for row in found)
    kernels = {row["kernel"]: set[str]() for row in found}
    for row in found:
        kernels[row["kernel"]] |= set(row["targets"])
    assert kernels == {name: TARGETS - {"75"} if name in ON_TENSOR_CORES else TARGETS for name in launched(op)}


@pytest.mark.parametrize("op", OPERATORS)
def test_nothing_spills(rows: list[Row], op: str) -> None:
    for row in of(rows, op):
        for target, code in row["targets"].items():
            assert code["spilled"] == 0, where(row, target)
            assert 0 < code["registers"] <= 255, where(row, target)


@pytest.mark.parametrize("op", OPERATORS)
def test_hot_launches_read_and_write_16_bytes_at_a_time(rows: list[Row], op: str) -> None:
    for row in of(rows, op):
        for target, code in row["targets"].items() if row["streams"] else ():
            loads, stores = set(map(int, code["loads"])), set(map(int, code["stores"]))
            assert max(loads) == 128, where(row, target)
            if row["kernel"] not in WRITES_LITTLE:
                assert max(stores) == 128, where(row, target)
                # 64: bytes beside 16-bit numbers
                narrow = sum(number for width, number in code["stores"].items() if int(width) < 64)
                assert narrow <= (row["kernel"] in WRITES_A_SCALE), where(row, target)

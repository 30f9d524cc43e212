"""`bench memory` of the encoders beside TSM-ResNet: what it counts is what their ledgers say, and it shows."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from bench.commands import tables
from bench.tools.encoders import BLOCKS, LEAN, NAMES, PLAIN, Name, Other, held_bytes
from bench.tools.gate import GateError
from lofi_fast.encoder.r2plus1d_ledger import R2Plus1DLedger
from lofi_fast.encoder.vit_ledger import ViTLedger
from lofi_fast.ledger import EncoderLedger, Pass, Tally

CPU = torch.device("cpu")
WIDTH, SIDE = 8, 32
LEDGERS: dict[Name, EncoderLedger] = {
    "r2plus1d_18": R2Plus1DLedger(WIDTH),
    "vit_b16, adapters": ViTLedger(WIDTH, "adapters"),
}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("dtype", "itemsize"), [("float32", 4), ("bfloat16", 2)])
def test_what_is_held_is_what_the_ledger_keeps(name: Name, dtype: str, itemsize: int) -> None:
    case = Other.of(name, 16, SIDE, dtype, CPU, WIDTH)
    held = {form: held_bytes(case, form) for form in case.forms()}
    work = Pass(1, 2, SIDE, itemsize, 2)
    assert held[LEAN] == LEDGERS[name].forward(Tally(), work)
    assert held[PLAIN] > held[LEAN]  # though it has folded weights beside them
    if BLOCKS in held:
        assert held[LEAN] <= held[BLOCKS] < held[PLAIN]


@pytest.mark.parametrize("name", NAMES)
def test_forms_whose_gradients_differ_do_not_pass(name: Name, monkeypatch: pytest.MonkeyPatch) -> None:
    case = Other.of(name, 8, SIDE, "float32", CPU, WIDTH)
    case.gate()
    forms = case.forms()
    monkeypatch.setattr(Other, "forms", lambda self: forms | {LEAN: lambda: 1.1 * forms[LEAN]()})
    with pytest.raises(GateError, match="lean: its gradients differ"):
        case.gate()


def test_they_have_a_table() -> None:
    shared: dict[str, Any] = {
        "encoder": "vit_b16, adapters", "dtype": "float32", "machine": "m", "device": "CPU", "threads": 1,
        "date": "2026", "commit": "abc", "dirty": False, "quick": False,
    }  # fmt: skip
    rows: list[dict[str, Any]] = [
        {"measured": "kept of others", "side": 224, "form": form, "bytes_a_frame": kept, "bytes_once": 0} | shared
        for form, kept in ((PLAIN, 60e6), (LEAN, 4e6))
    ]
    rows.append({"measured": "peak of others", "frames": 16, "side": 112, "form": LEAN, "peak": 2**28} | shared)
    text = tables.section_of("memory", rows)
    assert "| vit_b16, adapters | float32 | plain PyTorch | 224 px | 60.00 | 1.0x less | not measured |" in text
    assert "| vit_b16, adapters | float32 | lean | 224 px | 4.00 | 15.0x less | 16 frames of 112 px | 256 |" in text

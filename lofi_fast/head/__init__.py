"""TAL heads: from the features of a window's snippets to proposals, and from its labels to a loss.

`Head` (head/protocol.py) is all that the rest of the package knows of one. The first is G-TAD: its network (gtad.py),
labels (targets.py), loss (loss.py) and decoding (gtad_decoding.py), all of them together as a head (gtad_head.py), and
the bytes that it takes (gtad_ledger.py). What is the same for every head: dropout.py before it, and decoding.py after
it, from proposals to detections. Another head is another file beside these.

Importing this package imports no torch, so that memory can be planned without it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lofi_fast.config import Config
    from lofi_fast.head.protocol import Head


def build(config: Config, num_features: int, num_classes: int) -> Head:
    """The head of `config.head`, with weights drawn from torch's global generator."""
    from lofi_fast.head.gtad_head import GTADHead

    return GTADHead(config.head, num_features, num_classes, config.full.num_snippets)

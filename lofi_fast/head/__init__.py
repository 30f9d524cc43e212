"""TAL heads: from the features of a window's snippets to proposals, and from its labels to a loss.

`Head` (head/protocol.py) is all that the rest of the package knows of one. The first is G-TAD: its network (gtad.py),
labels (targets.py), loss (loss.py) and decoding (gtad_decoding.py), all of them together as a head (gtad_head.py), and
the bytes that it takes (gtad_ledger.py). The second is ActionFormer: its network (actionformer.py), and the rest
(actionformer_head.py). What is the same for every head: dropout.py before it, and decoding.py after it, from proposals
to detections.

Importing this package imports no torch, so that memory can be planned without it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from lofi_fast.head.gtad_ledger import GTADLedger

if TYPE_CHECKING:
    from lofi_fast.config import Config
    from lofi_fast.head.protocol import Head
    from lofi_fast.ledger import HeadLedger


def build(config: Config, num_features: int, num_classes: int) -> Head:
    """The head of `config.head`, with weights drawn from torch's global generator."""
    if config.head.name == "actionformer":
        from lofi_fast.head.actionformer_head import ActionFormerHead

        return ActionFormerHead(config.actionformer, num_features, num_classes)
    from lofi_fast.head.gtad_head import GTADHead

    return GTADHead(config.head, num_features, num_classes, config.full.num_snippets)


def ledger_of(config: Config, num_features: int, num_classes: int, class_loss: bool) -> HeadLedger | None:
    """The ledger of the head of `config`, over features of `num_features` channels; None where it has none.

    `class_loss`: whether the loss has a term for classes.
    """
    if config.head.name != "gtad":
        return None
    return GTADLedger(config.head, num_features, num_classes, config.full.num_snippets, class_loss)

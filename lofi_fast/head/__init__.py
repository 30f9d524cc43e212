"""TAL heads: from the features of a window's snippets to proposals, and from its labels to a loss.

`Head` (head/protocol.py) is all that the rest of the package knows of one. G-TAD and BMN score every (start, duration)
of a window: their networks (gtad.py, bmn.py; maps.py), and what is the same for both (map_head.py), of labels
(targets.py), loss (loss.py) and decoding (map_decoding.py); G-TAD with these is gtad_head.py. ActionFormer is its
network (actionformer.py), and the rest (actionformer_head.py). Points in time are found by spotting.py. The bytes that
a head takes are in NAME_ledger.py. What is the same for every head: dropout.py before it, and decoding.py after it,
from proposals to detections.

Importing this package imports no torch, so that memory can be planned without it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from lofi_fast.head.actionformer_ledger import ActionFormerLedger
from lofi_fast.head.bmn_ledger import BMNLedger
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
    if config.head.name == "spotting":
        from lofi_fast.head.spotting import Spotting

        return Spotting(config.spotting, num_features, num_classes)
    if config.head.name == "bmn":
        from lofi_fast.head.bmn import BMN

        return BMN(config.head, config.bmn, num_features, num_classes, config.full.num_snippets)
    from lofi_fast.head.gtad_head import GTADHead

    return GTADHead(config.head, num_features, num_classes, config.full.num_snippets)


def ledger_of(config: Config, num_features: int, num_classes: int, class_loss: bool) -> HeadLedger | None:
    """The ledger of the head of `config`, over features of `num_features` channels; None where it has none.

    `class_loss`: whether the loss has a term for classes.
    """
    if config.head.name == "spotting":
        return None
    if config.head.name == "actionformer":
        return ActionFormerLedger(config.actionformer, num_features, num_classes, config.head.dropout)
    if config.head.name == "bmn":
        return BMNLedger(config.head, num_features, num_classes, config.full.num_snippets, class_loss, config.bmn)
    return GTADLedger(config.head, num_features, num_classes, config.full.num_snippets, class_loss)

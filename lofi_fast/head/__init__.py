"""TAL heads: from snippet features to scored proposals. A network is a file, and its ledger a file beside it."""

from __future__ import annotations

from lofi_fast.config import HeadConfig
from lofi_fast.head.gtad_ledger import GTADLedger
from lofi_fast.ledger import HeadLedger


def ledger_of(
    config: HeadConfig, num_features: int, num_classes: int, full_snippets: int, class_loss: bool
) -> HeadLedger | None:
    """The ledger of the head that `config` describes, over features of `num_features` channels; None where it has none.

    `full_snippets`: of the full grid. `class_loss`: whether the loss has a term for classes.
    """
    return GTADLedger(config, num_features, num_classes, full_snippets, class_loss)

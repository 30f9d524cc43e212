"""Video encoders: a network is a file, and its ledger a file beside it."""

from __future__ import annotations

from lofi_fast.config import EncoderConfig
from lofi_fast.encoder.resnet_ledger import BLOCKS, ResNetLedger
from lofi_fast.ledger import EncoderLedger


def ledger_of(config: EncoderConfig) -> EncoderLedger | None:
    """The ledger of the encoder that `config` names; None where it has none, and is planned by running it."""
    return ResNetLedger(config.name, config.width) if config.name in BLOCKS else None

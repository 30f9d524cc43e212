"""Encoders: from the frames of a snippet to one feature vector.

`Encoder` (encoder/protocol.py) is all that the rest of the package knows of one. The first is TSM-ResNet: its network
(resnet.py), the memory-lean way to run it (lean.py), both together as an encoder (tsm.py), the bytes that it takes
(resnet_ledger.py, and resnet_live_ledger.py for pretraining, over the table of its convolutions in resnet_table.py)
and weights from elsewhere (weights.py). R(2+1)D-18, both ways, is r2plus1d.py, and its bytes r2plus1d_ledger.py;
the ViT-B/16 is vit.py and vit_ledger.py. What ledgers share is chunks.py, and of convolutions conv_ledger.py. Another
encoder is another file beside these.

Importing this package imports no torch, so that memory can be planned without it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from lofi_fast.encoder.r2plus1d_ledger import R2Plus1DLedger
from lofi_fast.encoder.resnet_ledger import ResNetLedger
from lofi_fast.encoder.vit_ledger import ViTLedger

if TYPE_CHECKING:
    from lofi_fast.config import Config, EncoderConfig
    from lofi_fast.encoder.protocol import Encoder
    from lofi_fast.ledger import EncoderLedger


def build(config: Config) -> Encoder:
    """The encoder that `config.encoder` names, with weights drawn from torch's global generator."""
    name, width = config.encoder.name, config.encoder.width
    if name == "r2plus1d_18":
        from lofi_fast.encoder.r2plus1d import R2Plus1D

        return R2Plus1D(name, width)
    if name == "vit_b16":
        from lofi_fast.encoder.vit import ViT

        return ViT(name, width, config.encoder.train)
    from lofi_fast.encoder.tsm import TSMEncoder

    return TSMEncoder(name, width)


def ledger_of(config: EncoderConfig) -> EncoderLedger | None:
    """The ledger of the encoder that `config` names; None where it has none, and is planned by running it."""
    if config.name == "r2plus1d_18":
        return R2Plus1DLedger(config.width)
    if config.name == "vit_b16":
        return ViTLedger(config.width, config.train)
    return ResNetLedger(config.name, config.width)

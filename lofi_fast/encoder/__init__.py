"""Encoders: from the frames of a snippet to one feature vector.

`Encoder` (encoder/protocol.py) is all that the rest of the package knows of one. The first is TSM-ResNet: its network
(resnet.py), the memory-lean way to run it (lean.py), both together as an encoder (tsm.py), the bytes that it takes
(resnet_ledger.py) and weights from elsewhere (weights.py). Another encoder is another file beside these.

Importing this package imports no torch, so that memory can be planned without it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lofi_fast.config import Config
    from lofi_fast.encoder.protocol import Encoder


def build(config: Config) -> Encoder:
    """The encoder that `config.encoder` names, with weights drawn from torch's global generator."""
    from lofi_fast.encoder.tsm import TSMEncoder

    return TSMEncoder(config.encoder.name, config.encoder.width)

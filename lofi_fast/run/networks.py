"""Who makes the two networks of a run: the config's names, or factories of one's own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from lofi_fast.config import Config
from lofi_fast.encoder.resnet import TSMResNet
from lofi_fast.head.gtad import GTAD


def named_encoder(config: Config) -> TSMResNet:
    """The encoder that `config.encoder` names."""
    return TSMResNet(config.encoder.name, config.encoder.width)


def named_head(config: Config, num_features: int, num_classes: int) -> GTAD:
    """The head of `config.head`."""
    return GTAD(config.head, num_features, num_classes, config.full.num_snippets)


@dataclass(frozen=True)
class Networks:
    """Factories that draw initial weights from torch's global generator, which is seeded before each call."""

    encoder: Callable[[Config], TSMResNet] = named_encoder
    head: Callable[[Config, int, int], GTAD] = named_head  # of (config, num_features, num_classes)

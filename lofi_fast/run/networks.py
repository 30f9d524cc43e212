"""Who makes the two networks of a run: the settings, by name, or factories of the caller's own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from lofi_fast import encoder as encoders
from lofi_fast import head as heads
from lofi_fast.config import Config
from lofi_fast.encoder.protocol import Encoder
from lofi_fast.head.protocol import Head


@dataclass(frozen=True)
class Networks:
    """Factories that draw initial weights from torch's global generator, which is seeded before each call."""

    encoder: Callable[[Config], Encoder] = encoders.build
    head: Callable[[Config, int, int], Head] = heads.build  # of (config, num_features, num_classes)

    @property
    def named(self) -> bool:
        """Whether the settings name both: only then do ledgers say what a step needs."""
        return self.encoder is encoders.build and self.head is heads.build

"""G-TAD as a `Head`."""

from __future__ import annotations

from lofi_fast.head.gtad import GTAD
from lofi_fast.head.map_head import MapHead


class GTADHead(GTAD, MapHead):
    """`GTAD` with its labels, loss and decoding."""

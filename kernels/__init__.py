"""Operators of temporal action localization, one folder each; the reference in the folder is the definition."""

from .align_linear import ProposalGrid, SamplingGrid, align_linear, proposal_grid, roi_grid
from .library import describe, native_available
from .soft_nms import nms, soft_nms
from .temporal_roi_align import temporal_roi_align
from .temporal_shift import temporal_shift

__all__ = [
    "ProposalGrid",
    "SamplingGrid",
    "align_linear",
    "describe",
    "native_available",
    "nms",
    "proposal_grid",
    "roi_grid",
    "soft_nms",
    "temporal_roi_align",
    "temporal_shift",
]

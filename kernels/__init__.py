"""Operators of temporal action localization, one folder each; the reference in the folder is the definition."""

from .align_linear import (
    BoundaryMatchingGrid,
    ProposalGrid,
    SamplingGrid,
    align_linear,
    align_linear_sum,
    boundary_matching_grid,
    proposal_grid,
    roi_grid,
)
from .conv3x3 import conv3x3, conv3x3_backward, conv3x3_is_faster
from .library import describe, native_available
from .quantize import dequantize, quantize
from .residual_shift import residual_shift, residual_shift_backward
from .soft_nms import nms, soft_nms
from .stem import fold_normalization, stem, stem_backward, stem_forward, stem_input
from .strided_conv import strided_conv, strided_conv_backward, strided_conv_is_faster
from .temporal_roi_align import temporal_roi_align
from .temporal_shift import temporal_shift

__all__ = [
    "BoundaryMatchingGrid",
    "ProposalGrid",
    "SamplingGrid",
    "align_linear",
    "align_linear_sum",
    "boundary_matching_grid",
    "conv3x3",
    "conv3x3_backward",
    "conv3x3_is_faster",
    "dequantize",
    "describe",
    "fold_normalization",
    "native_available",
    "nms",
    "proposal_grid",
    "quantize",
    "residual_shift",
    "residual_shift_backward",
    "roi_grid",
    "soft_nms",
    "stem",
    "stem_backward",
    "stem_forward",
    "stem_input",
    "strided_conv",
    "strided_conv_backward",
    "strided_conv_is_faster",
    "temporal_roi_align",
    "temporal_shift",
]

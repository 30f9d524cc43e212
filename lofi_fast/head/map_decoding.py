"""From the maps of G-TAD or BMN to proposals: the cells between two boundary candidates.

Shape legend: L snippets of a window, D durations, K classes, N proposals. Cell (d, s) is the proposal that starts with
snippet s and covers d + 1 snippets: in seconds [edges[s], edges[s + d + 1]].
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from lofi_fast.head.protocol import Proposals

Floats = npt.NDArray[np.float64]
FloatArray = npt.NDArray[np.floating[Any]]
Ints = npt.NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class WindowMaps:
    """The head's probabilities for one window of a video.

    edges (L + 1,) seconds, ascending: the times between snippets. start, end (L,): probability that an action starts or
    ends at edges[i]. confidence (D, L): classification times regression score of cell (d, s), in [0, 1]; cells that
    leave the window (s + d >= L) are not read. class_probs (K, D, L): probability of each class at each cell, or None.
    Raises ValueError for shapes that do not fit together and for values that are not finite.
    """

    edges: FloatArray
    start: FloatArray
    end: FloatArray
    confidence: FloatArray
    class_probs: FloatArray | None = None

    def __post_init__(self) -> None:
        length = len(self.edges) - 1
        cells = self.confidence.shape
        fits = self.start.shape == self.end.shape == (length,) and length > 0 and len(cells) == 2 and cells[1] == length
        if self.class_probs is not None:
            fits = fits and self.class_probs.ndim == 3 and self.class_probs.shape[1:] == cells
        if not fits:
            classes = None if self.class_probs is None else self.class_probs.shape
            raise ValueError(
                f"WindowMaps: edges {self.edges.shape}, start {self.start.shape}, end {self.end.shape}, "
                f"confidence {cells} and class_probs {classes} must be (L + 1,), (L,), (L,), (D, L) and (K, D, L)"
            )
        for name in ("edges", "start", "end", "confidence", "class_probs"):
            values = getattr(self, name)
            if values is not None and not np.isfinite(values).all():
                raise ValueError(f"WindowMaps: {name} holds a NaN or an infinity (has the training diverged?)")


def _is_candidate(probabilities: FloatArray, peak_fraction: float) -> npt.NDArray[np.bool_]:
    """Boundaries (L,) that are a local peak, or above peak_fraction of the largest.

    A peak is strictly greater than both neighbours; outside the window the neighbour is -inf. A plateau has no peak:
    its boundaries are candidates by their height or not at all.
    """
    padded = np.concatenate([[-np.inf], probabilities, [-np.inf]])
    peak = (probabilities > padded[:-2]) & (probabilities > padded[2:])
    return np.asarray(peak | (probabilities > peak_fraction * probabilities.max()), dtype=np.bool_)


def proposals(
    maps: WindowMaps, peak_fraction: float = 0.5, with_boundaries: bool = False
) -> tuple[Ints, Floats, Floats]:
    """The cells whose start and end are both candidates: (cells (N, 2) as (d, s), segments (N, 2), scores (N,)).

    A boundary is a candidate when it is a local peak or above peak_fraction of the window's largest. The window's last
    boundary (s + d + 1 = L) has no probability of its own and is always a candidate, so that actions cut by the end of
    the video are kept. Segments in seconds; scores are the confidence, times the start and end probabilities when
    with_boundaries (the last boundary then counts with the probability of the one before it).
    Source: G-TAD post-processing, except for the last boundary, which upstream drops.
    """
    num_durations, length = maps.confidence.shape
    starts = _is_candidate(maps.start, peak_fraction)
    ends = np.append(_is_candidate(maps.end, peak_fraction), True)
    stop = np.arange(num_durations)[:, None] + np.arange(length) + 1
    d, s = np.nonzero((stop <= length) & starts & ends[np.minimum(stop, length)])
    scores = maps.confidence[d, s].astype(np.float64)
    if with_boundaries:
        end = np.append(maps.end, maps.end[-1])
        scores = scores * maps.start[s] * end[s + d + 1]
    edges = maps.edges.astype(np.float64)
    return np.stack([d, s], axis=1), np.stack([edges[s], edges[s + d + 1]], axis=1), scores


def window_proposals(maps: WindowMaps, peak_fraction: float = 0.5, with_boundaries: bool = False) -> Proposals:
    """The same with the class probabilities of each cell; without its place in the maps."""
    cells_N2, segments_N2, scores_N = proposals(maps, peak_fraction, with_boundaries)
    probabilities = None
    if maps.class_probs is not None:
        probabilities = np.asarray(maps.class_probs[:, cells_N2[:, 0], cells_N2[:, 1]], dtype=np.float64)
    return Proposals(segments_N2, scores_N, probabilities)

"""How large the frame cache of a data set will be, from a few of its pictures."""

from __future__ import annotations

from collections.abc import Collection

import numpy as np

from lofi_fast.data.cache import estimate_bytes
from lofi_fast.data.pictures import hold_in_turn
from lofi_fast.data.survey import Survey, Surveyed, cache_request, cache_side
from lofi_fast.data.video import VideoError

LOOKED_AT = 12  # videos of which pictures are made
AFTER_KEY = 15  # frames from a key frame to the picture: key frames compress otherwise than those between
OF_A_PICTURE = 40  # bytes beside it, in the index and in the file's own tables
OF_A_VIDEO = 3000  # bytes beside its pictures


def cache_bytes(found: Survey, names: Collection[str] | None = None) -> dict[str, int]:
    """Bytes on the disk by name of the video (of those in `names` alone), within some 15% of the whole.

    Pictures of a size differ by a factor of five in bytes, by what they show. So a few are made, of `LOOKED_AT` videos
    at most; their ratio to what their size alone lets expect (`estimate_bytes`) holds for all others.
    """
    side = cache_side(found.config.full)
    videos = [one for one in found.videos if names is None or one.name in names]
    expected: dict[str, int] = {}
    pictures: dict[str, int] = {}
    for one in videos:
        request = cache_request(one, found.grids(one))
        expected[one.name], pictures[one.name] = estimate_bytes([request], side), len(request.frames)
    places = np.linspace(0, len(videos) - 1, min(LOOKED_AT, len(videos))).round().astype(int)
    ratios: dict[str, float] = {}
    for one in (videos[place] for place in places):
        mean = _mean_bytes(one, side)
        if mean is not None:
            ratios[one.name] = mean * pictures[one.name] / expected[one.name]
    usual = float(np.mean(list(ratios.values()))) if ratios else 1.0
    return {
        name: round(expected[name] * ratios.get(name, usual)) + OF_A_PICTURE * count + OF_A_VIDEO
        for name, count in pictures.items()
    }


def _mean_bytes(one: Surveyed, side: int) -> float | None:
    """Of two pictures of a video; None where they do not decode, which training will tell of."""
    info = one.info
    count = len(info.pts)
    if info.ticks is None or not len(info.key_ticks):
        frames = np.array([min(100, count // 2)])  # all before it is decoded too
    else:
        keys = np.searchsorted(info.ticks, info.key_ticks[[len(info.key_ticks) // 3, 2 * len(info.key_ticks) // 3]])
        frames = np.unique(np.minimum(keys + AFTER_KEY, count - 1))
    try:
        (held,) = hold_in_turn(info, [frames], side)
    except VideoError:
        return None
    return float(np.mean([len(jpeg) for jpeg in held.jpegs]))

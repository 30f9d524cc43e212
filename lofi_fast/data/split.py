"""Our own division into training and validation, for labels that have none."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from heapq import heapify, heappop, heappush

from lofi_fast.data.annotations import Video

ONE_OF = 5  # videos is validation


def choose_validation(videos: Sequence[Video]) -> frozenset[str]:
    """Names of the videos to validate on: one of five, at least one of two or more, with the classes in proportion.

    Every class keeps a video in training, so a class's only video is never chosen. The choice depends on nothing but
    names and labels; where labels leave it open it is every fifth video by name. May be empty: one video, or none that
    can be spared.
    """
    ordered = sorted(videos, key=lambda video: video.name)
    labels = {video.name: {segment.label for segment in video.segments} for video in ordered}
    in_training = Counter(label for names in labels.values() for label in names)
    share = {label: count / ONE_OF for label, count in in_training.items()}
    wanted = max(len(ordered) // ONE_OF, 1) if len(ordered) > 1 else 0
    chosen: set[str] = set()
    held: Counter[str] = Counter()

    def rank(place: int) -> tuple[bool, float, bool, int]:
        """Least first: videos with segments, what brings the classes nearer to their share, then every fifth. It never
        gets better while others are chosen.
        """
        own = labels[ordered[place].name]
        gain = sum(1 if held[label] < share[label] else -1 for label in own) / max(len(own), 1)
        fifth = place % ONE_OF == ONE_OF - 1
        return not own, -gain, not fifth, place if fifth else -place

    waiting = [(rank(place), place) for place in range(len(ordered))]
    heapify(waiting)
    while waiting and len(chosen) < wanted:
        before, place = heappop(waiting)
        own = labels[ordered[place].name]
        if any(in_training[label] < 2 for label in own):
            continue
        if (now := rank(place)) != before:
            heappush(waiting, (now, place))
            continue
        if not own and not held:
            break  # a validation without a segment measures nothing
        chosen.add(ordered[place].name)
        held.update(own)
        in_training.subtract(own)
    return frozenset(chosen)

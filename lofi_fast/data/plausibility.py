"""Do the times in the labels fit the files? They may be of another unit, or of a file that was longer once."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence

from lofi_fast.data.annotations import Segment, Video
from lofi_fast.data.video import VideoInfo
from lofi_fast.errors import InputError

LOST_SHARE = 0.2  # of all segments outside their videos, from which on training would be on wrong times
BEYOND_SHARE = 0.5  # of all segments outside or cut, from which on the same
LONG_ENOUGH = 60.0  # seconds of videos of which a first sixtieth can be told from the rest

_MINUTE = 60.0  # seconds


def _frame(info: VideoInfo) -> float:
    return 1 / max(info.fps, 1e-9)


def _frame_at(rate: float) -> Callable[[VideoInfo], float]:
    """A frame of a video that was labelled at another rate; at nearly its own it is one of its own."""
    return lambda info: _frame(info) if abs(info.fps / rate - 1) < 0.05 else 1 / rate


_ANOTHER_RATE = "frame numbers at 25 or 30 a second, which is not the files' rate"
# (unit, seconds of one of it for a video); of equal ones the first is told
_UNITS: tuple[tuple[str, Callable[[VideoInfo], float]], ...] = (
    ("frame numbers", _frame),
    (_ANOTHER_RATE, _frame_at(25)),
    (_ANOTHER_RATE, _frame_at(30)),
    ("hundredths of a second", lambda info: 1e-2),
    ("milliseconds", lambda info: 1e-3),
    ("microseconds", lambda info: 1e-6),
    ("minutes", lambda info: _MINUTE),
)


def check_times(videos: Sequence[Video], infos: Mapping[str, VideoInfo], where: str) -> list[str]:
    """Notes about durations and segments that contradict the files; `videos` are as labelled, nothing clipped.

    Raises InputError where so large a share of the segments lies outside the videos that the times must be wrong.
    """
    videos = [video for video in videos if video.name in infos]
    return [*_durations(videos, infos, where), *_segments(videos, infos, where)]


def _slack(duration: float) -> float:
    """Seconds by which labels may pass a video's end without being worth a word: tools round, and encoders trim."""
    return max(1.0, 0.02 * duration)


def _durations(videos: Sequence[Video], infos: Mapping[str, VideoInfo], where: str) -> list[str]:
    other = []
    units: Counter[str] = Counter()
    for video in videos:
        info = infos[video.name]
        if video.duration is None or abs(video.duration - info.duration) <= max(1.0, 0.05 * info.duration):
            continue
        other.append(video)
        for unit, seconds in _UNITS:
            if abs(video.duration * seconds(info) / info.duration - 1) < 0.05:
                units[unit] += 1
                break
        else:
            units["cut off" if video.duration > info.duration else ""] += 1
    if not other:
        return []
    first = other[0]
    unit = units.most_common(1)[0][0]
    looks = f"; they look like {unit}" if unit else ""
    if unit == "cut off":
        looks = "; such a file may be cut off, or a part of the video that was labelled"
    return [
        f"{where}: {len(other)} of {len(videos)} videos do not last as long as the labels say, such as {first.name}, "
        f"whose file ends at {infos[first.name].duration:.2f} s and not at {first.duration:g} s{looks}; the files count"
    ]


def _segments(videos: Sequence[Video], infos: Mapping[str, VideoInfo], where: str) -> list[str]:
    pairs = [(video, segment) for video in videos for segment in video.segments]
    outside: list[tuple[Video, Segment]] = []
    cut: list[tuple[Video, Segment]] = []
    for video, segment in pairs:
        end = infos[video.name].duration
        if segment.end > end + _slack(end):
            (outside if segment.start >= end else cut).append((video, segment))
    if not outside and not cut:
        return _too_early(pairs, infos, where)
    video, segment = (outside or cut)[0]
    parts = [
        f"{len(found)} of {len(pairs)} segments {verb}"
        for found, verb in ((outside, "lie outside their videos"), (cut, "end well after their videos"))
        if found
    ]
    sentence = (
        f"{where}: {' and '.join(parts)}, such as {segment.start:g} to {segment.end:g} of {video.name}, whose file "
        f"ends at {infos[video.name].duration:.2f} s"
    )
    # a file that is shorter than its labels say explains them without another unit
    explained = all(v.duration is not None and s.end <= v.duration + _slack(v.duration) for v, s in outside + cut)
    looks = ""
    if not explained:
        # smaller units fit too, and would leave most of each video without labels
        largest = sorted(_UNITS, key=lambda unit: -unit[1](infos[video.name]))
        unit = next((unit for unit, seconds in largest if _fits(pairs, infos, seconds)), "")
        looks = f"; the times look like {unit}" if unit else ""
    lost, beyond = len(outside) / len(pairs), (len(outside) + len(cut)) / len(pairs)
    if beyond >= BEYOND_SHARE or (lost >= LOST_SHARE and not explained):
        cause = "; the files seem to be cut off" if explained else looks
        raise InputError(f"{sentence}{cause}; segments must be in seconds, on the clock of the files in --videos")
    return [f"{sentence}{looks}"]


def _fits(
    pairs: Sequence[tuple[Video, Segment]], infos: Mapping[str, VideoInfo], seconds: Callable[[VideoInfo], float]
) -> bool:
    """Whether all segments lie inside their videos if their times are in a unit of so many seconds."""
    return all(
        segment.end * seconds(infos[video.name]) <= infos[video.name].duration + _slack(infos[video.name].duration)
        for video, segment in pairs
    )


def _too_early(pairs: Sequence[tuple[Video, Segment]], infos: Mapping[str, VideoInfo], where: str) -> list[str]:
    """A note where all segments lie so early in their videos that their times may be minutes, or shares of a video."""
    if len(pairs) < 3 or any(infos[video.name].duration < LONG_ENOUGH for video, _ in pairs):
        return []
    latest = max(segment.end / infos[video.name].duration for video, segment in pairs)
    if all(segment.end <= 1 for _, segment in pairs):
        looks = "shares of the video's length"
    elif _fits(pairs, infos, lambda info: _MINUTE) and latest * 60 >= 0.5:
        looks = "minutes"
    else:
        return []
    return [
        f"{where}: all {len(pairs)} segments lie within the first {100 * latest:.2g}% of their videos; the times look "
        f"like {looks}, and seconds are expected"
    ]

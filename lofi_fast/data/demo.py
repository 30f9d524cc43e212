"""The embedded demo set: small untrimmed videos whose actions are motions.

Six classes (rise, sink, grow, shrink, blink, shake) are told by motion alone. Every class moves one coordinate of the
object (height, size, lamp, sideways position) through the very range that coordinate also has at rest, and an action
starts from and leaves behind the state it finds. So one frame says neither which class it is nor whether anything
happens, a horizontal flip changes no label, and a frozen encoder that knows appearance alone has nothing to go by.
Camera, background, drift, spin and flicker follow the same law in action and at rest, and in some shots a
bystander drifts and spins all the time.

The files are real H.264 with B-frames, so the whole path (probe, cache, decode) runs on them.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lofi_fast.data.generated import (
    FRAME_RATE,
    SUBSETS,
    Action,
    Floats,
    Frame,
    Kind,
    Progress,
    Script,
    make,
    smooth_noise,
)

VERSION = 4
"""Raised with every change of what is drawn: a folder of another version is never reused."""

CLASSES = ("blink", "grow", "rise", "shake", "shrink", "sink")
SIZES = ((96, 96), (112, 84))
"""Width and height in pixels."""

_SECONDS = (22, 26)
_ACTIONS = (3, 6)
_ACTION_SECONDS = (2.0, 5.5)
_GAP_SECONDS = (0.7, 4.0)

# Lengths below are pixels of a frame 96 pixels high; lower frames scale them.
_RADIUS = (12.0, 27.0)
_HEIGHT_RANGE = (0.2, 0.8)  # of the frame's height, the object's centre
_SIDE_RANGE = (0.22, 0.78)  # of the frame's width
_VERTICAL_SPEED = (30.0, 42.0)  # per second: 10 pixels or more at 64 x 64 within 8 frames
_GROWTH_SECONDS = (1.2, 1.6)  # for the whole range of radii
_SHAKE_AMPLITUDE = (8.0, 11.0)
_OSCILLATION_HERTZ = (1.6, 2.2)  # of blink and shake; every second frame still shows more than three phases
_DRIFT_SPEED = (3.0, 9.0)
_LAMP_OFF = 0.5

_TEXTURE_SIDE = 64
_BACKGROUND_SIDE = 192


@dataclass(frozen=True)
class _Stretch:
    """Frames [first, last) of a video during which one thing happens; label None is rest."""

    first: int
    last: int
    label: str | None


@dataclass(frozen=True)
class _Path:
    """State of one object at each frame of a shot, arrays of shape (num_frames,)."""

    x: Floats
    y: Floats
    radius: Floats
    angle: Floats
    gain: Floats


@dataclass(frozen=True)
class _Looks:
    shape: str
    texture: Floats  # (_TEXTURE_SIDE, _TEXTURE_SIDE, 3), periodic


def generate(
    folder: Path,
    *,
    num_training: int = 80,
    num_validation: int = 12,
    seed: int = 0,
    workers: int | None = None,
    progress: Progress | None = None,
) -> tuple[Path, Path]:
    """Make the demo set below `folder`, or find it there.

    The same arguments give the same annotations and pixels. The set lies in a sub-folder named after the version and
    the arguments; it is written under another name and renamed when whole, so a killed call leaves nothing that a later
    one takes for complete. Two calls at once are safe: the second waits and reuses.

    Args:
        folder: made if it is missing.
        num_training, num_validation: videos in each subset, 22 to 26 seconds each.
        workers: processes; None takes one for each CPU this process may use, 1 stays in this process.
        progress: called with (videos done, videos in all, name of the video just done).

    Returns:
        The ActivityNet-form annotations (segments in seconds) and the folder of .mp4 files named after the videos.

    Raises:
        ValueError: a count or `workers` out of range.
        InputError: the folder cannot be written, or the videos must be made without PyAV.
    """
    if num_training < 1:
        raise ValueError(f"num_training must be at least 1, not {num_training}")
    if num_validation < 0:
        raise ValueError(f"num_validation must not be negative, not {num_validation}")
    if seed < 0:
        raise ValueError(f"seed must not be negative, not {seed}")
    if workers is not None and workers < 1:
        raise ValueError(f"workers must be at least 1, not {workers}")

    marker = {"version": VERSION, "num_training": num_training, "num_validation": num_validation, "seed": seed}
    kind = Kind("demo", f"lofi_fast demo {VERSION}", _render)
    name = f"demo-v{VERSION}-{num_training}-{num_validation}-seed{seed}"
    scripts = _write_scripts(num_training, num_validation, seed)
    return make(Path(folder) / name, kind, marker, scripts, workers=workers, progress=progress)


def roll_annotations(annotations: dict[str, Any]) -> dict[str, Any]:
    """Move the training labels by half a video, for the control run that must fail.

    Each training segment moves later by half the duration; what passes the end comes back at the start, and pieces
    shorter than half a second are dropped. Which classes a video holds stays as it was, when they happen does not. So a
    model that learns as well from these labels as from the true ones was not using their times.

    Args:
        annotations: ActivityNet form with durations, as `generate` writes it; left unchanged.

    Returns:
        A copy with the training subset's segments (seconds) moved and sorted. Other subsets are as they were.
    """
    rolled = copy.deepcopy(annotations)
    for video in rolled["database"].values():
        if video["subset"] != "training":
            continue
        duration = float(video["duration"])
        moved = []
        for annotation in video["annotations"]:
            start, end = annotation["segment"]
            start_moved = (start + duration / 2) % duration
            end_moved = start_moved + (end - start)
            for piece in ((start_moved, min(end_moved, duration)), (0.0, end_moved - duration)):
                segment = [round(piece[0], 2), round(piece[1], 2)]
                if segment[1] - segment[0] >= 0.5:
                    moved.append({**annotation, "segment": segment})
        video["annotations"] = sorted(moved, key=lambda annotation: annotation["segment"])
    return rolled


def _write_scripts(num_training: int, num_validation: int, seed: int) -> list[Script]:
    scripts = []
    for code, (subset, count) in enumerate(zip(SUBSETS, (num_training, num_validation), strict=True)):
        rng = np.random.default_rng((VERSION, seed, code))
        deck: list[str] = []
        for index in range(count):
            num_frames = FRAME_RATE * int(rng.integers(_SECONDS[0], _SECONDS[1] + 1))
            times = _draw_times(rng, num_frames / FRAME_RATE)
            # Dealt from shuffled decks of all six, so that the classes are balanced within each subset.
            while len(deck) < len(times):
                deck.extend(rng.permutation(CLASSES).tolist())
            actions = tuple(Action(start, end, deck.pop(0)) for start, end in times)
            width, height = SIZES[int(rng.integers(len(SIZES)))]
            entropy = (VERSION, seed, code, index)
            scripts.append(Script(f"demo_{subset}_{index:03d}", subset, entropy, width, height, num_frames, actions))
    return scripts


def _draw_times(rng: np.random.Generator, duration: float) -> list[tuple[float, float]]:
    """Start and end in seconds of each action, in order, with a gap before, between and after."""
    num_actions = int(rng.integers(_ACTIONS[0], _ACTIONS[1] + 1))
    while True:
        lengths = rng.uniform(*_ACTION_SECONDS, num_actions)
        spare = duration - lengths.sum() - _GAP_SECONDS[0] * (num_actions + 1)
        if spare <= 0:
            continue
        gaps = _GAP_SECONDS[0] + spare * rng.dirichlet(np.full(num_actions + 1, 2.0))
        # The margins keep lengths and gaps within their bounds after rounding.
        if gaps.max() > _GAP_SECONDS[1] - 0.02 or gaps.min() < _GAP_SECONDS[0] + 0.02:
            continue
        if lengths.max() > _ACTION_SECONDS[1] - 0.02 or lengths.min() < _ACTION_SECONDS[0] + 0.02:
            continue
        starts = np.cumsum(gaps[:-1]) + np.cumsum(lengths) - lengths
        return [
            (round(float(start), 2), round(float(start + length), 2))
            for start, length in zip(starts, lengths, strict=True)
        ]


def _render(script: Script) -> Iterator[Frame]:
    """Yield each frame, (height, width, 3) RGB."""
    rng = np.random.default_rng(script.entropy)
    for shot in _draw_shots(rng, script):
        yield from _render_shot(rng, script, shot)


def _draw_shots(rng: np.random.Generator, script: Script) -> list[list[_Stretch]]:
    """The video's stretches of action and rest, in shots; every shot shows another scene with other objects.

    Cuts fall in rests, and not in every one: they give few videos many looks, and no cut marks an action's edge.
    """
    shots: list[list[_Stretch]] = [[]]
    at = 0
    for action in script.actions:
        # A frame belongs to an action when its time lies in [start, end).
        first, last = (math.ceil(time * FRAME_RATE - 1e-6) for time in (action.start, action.end))
        if at > 0 and rng.uniform() < 0.7:
            cut = int(rng.integers(at + 2, first - 1))
            shots[-1].append(_Stretch(at, cut, None))
            shots.append([])
            at = cut
        shots[-1] += [_Stretch(at, first, None), _Stretch(first, last, action.label)]
        at = last
    shots[-1].append(_Stretch(at, script.num_frames, None))
    return shots


def _render_shot(rng: np.random.Generator, script: Script, shot: list[_Stretch]) -> Iterator[Frame]:
    first, last = shot[0].first, shot[-1].last
    seconds = np.arange(last - first) / FRAME_RATE
    hue = rng.uniform()
    scene = _draw_background(rng, hue, script)
    # Bystanders first: the object that acts is drawn over them and never hidden.
    cast = [
        (_draw_object(rng, hue), _trace(rng, script, [_Stretch(first, last, None)], switches=False))
        for _ in range(int(rng.uniform() < 0.3))
    ]
    cast.append((_draw_object(rng, hue), _trace(rng, script, shot, switches=True)))

    # Three slow sines for each axis: a hand that is not quite still.
    rates, starts = rng.uniform(0.3, 1.3, (2, 2, 3, 1))
    jitter = (rng.uniform(0.1, 0.4, (2, 3, 1)) * np.sin(2 * np.pi * (rates * seconds + starts))).sum(axis=1)
    direction = rng.uniform(0, 2 * np.pi)
    pan = rng.uniform(1.0, 7.0) * seconds * np.array([[np.cos(direction)], [np.sin(direction)]])
    exposure = 1 + 0.05 * np.sin(2 * np.pi * (rng.uniform(0.05, 0.2) * seconds + rng.uniform()))

    for index in range(last - first):
        jitter_x, jitter_y = jitter[:, index]
        frame = _window(scene, jitter_x + pan[0, index], jitter_y + pan[1, index], script)
        for looks, path in cast:
            x, y = path.x[index] - jitter_x, path.y[index] - jitter_y
            _paint(frame, looks, x, y, path.radius[index], path.angle[index], path.gain[index])
        frame *= np.float32(exposure[index])
        yield np.clip(frame + 0.5, 0, 255).astype(np.uint8)


def _colour(hue: float, saturation: float, value: float) -> Floats:
    """RGB in 0 to 255 of a hue in turns."""
    offsets = np.abs((hue + np.array([0.0, 2 / 3, 1 / 3])) % 1 * 6 - 3) - 1
    return np.asarray(255 * value * (1 - saturation * (1 - np.clip(offsets, 0, 1))), np.float32)


def _draw_background(rng: np.random.Generator, hue: float, script: Script) -> Floats:
    base = _colour(hue, rng.uniform(0.15, 0.5), rng.uniform(0.15, 0.35))
    noise = 9 * smooth_noise(rng, _BACKGROUND_SIDE, 24.0) + 4 * smooth_noise(rng, _BACKGROUND_SIDE, 5.0)
    texture = np.clip(base + noise, 0, 255).astype(np.float32)
    # Repeated past its period so that every window is one plain slice.
    return np.pad(texture, ((0, script.height + 1), (0, script.width + 1), (0, 0)), mode="wrap")


def _draw_object(rng: np.random.Generator, background_hue: float) -> _Looks:
    shape = ("disc", "square", "star")[int(rng.integers(3))]
    # Away from the background's hue: the task is to see motion, not to find camouflage.
    base = _colour(background_hue + rng.uniform(0.25, 0.75), rng.uniform(0.5, 0.9), rng.uniform(0.85, 1.0))
    noise = 30 * smooth_noise(rng, _TEXTURE_SIDE, rng.uniform(6.0, 12.0))
    return _Looks(shape, np.clip(base + noise, 0, 255).astype(np.float32))


def _window(scene: Floats, x: float, y: float, script: Script) -> Floats:
    """The frame's part of the periodic background whose top left corner is at (x, y), bilinear, as a new array."""
    x, y = x % _BACKGROUND_SIDE, y % _BACKGROUND_SIDE
    left, top = int(x), int(y)
    across, down = np.float32(x - left), np.float32(y - top)
    block = scene[top : top + script.height + 1, left : left + script.width + 1]
    rows = block[:-1] + down * (block[1:] - block[:-1])
    return np.asarray(rows[:, :-1] + across * (rows[:, 1:] - rows[:, :-1]))


def _paint(frame: Floats, looks: _Looks, x: float, y: float, radius: float, angle: float, gain: float) -> None:
    """Draw the object into `frame` (height, width, 3), with edges one pixel soft."""
    reach = math.ceil(1.3 * radius) + 1
    top, bottom = max(0, int(y) - reach), min(frame.shape[0], int(y) + reach + 1)
    left, right = max(0, int(x) - reach), min(frame.shape[1], int(x) + reach + 1)
    if top >= bottom or left >= right:
        return
    down = (np.arange(top, bottom, dtype=np.float32) - np.float32(y))[:, None]
    across = np.arange(left, right, dtype=np.float32) - np.float32(x)
    cosine, sine = np.float32(math.cos(angle)), np.float32(math.sin(angle))
    u, v = cosine * across + sine * down, cosine * down - sine * across

    if looks.shape == "square":
        inside = np.float32(0.85 * radius) - np.maximum(np.abs(u), np.abs(v))
    else:
        inside = np.float32(radius) - np.hypot(u, v)
        if looks.shape == "star":
            inside += np.float32(0.25 * radius) * np.cos(5 * np.arctan2(v, u))
    alpha = np.clip(inside + np.float32(0.5), 0, 1)[..., None]

    texels_per_pixel = np.float32(_TEXTURE_SIDE / (4 * radius))
    wrap = _TEXTURE_SIDE - 1
    columns = np.floor(u * texels_per_pixel).astype(np.int32) & wrap
    rows = np.floor(v * texels_per_pixel).astype(np.int32) & wrap
    area = frame[top:bottom, left:right]
    area += alpha * (looks.texture[rows, columns] * np.float32(gain) - area)


def _trace(rng: np.random.Generator, script: Script, stretches: list[_Stretch], *, switches: bool) -> _Path:
    """Move one object through a shot.

    Height and radius are phases in [0, 1) that an action drives round and nothing else touches; the lamp is a bit that
    blinking toggles. So the state's distribution is the same in action and at rest. `switches`: the lamp may also
    switch once in a rest.
    """
    scale = script.height / 96
    low, high = _HEIGHT_RANGE[0] * script.height, _HEIGHT_RANGE[1] * script.height
    left, right = _SIDE_RANGE[0] * script.width, _SIDE_RANGE[1] * script.width
    x, angle = rng.uniform(left, right), rng.uniform(0, 2 * np.pi)
    height_phase, radius_phase = rng.uniform(), rng.uniform()
    lamp = bool(rng.integers(2))

    states: list[tuple[float, float, float, float, float]] = []
    for stretch in stretches:
        label, num_frames = stretch.label, stretch.last - stretch.first
        drift = rng.choice((-1, 1)) * rng.uniform(*_DRIFT_SPEED) * scale * rng.integers(2)
        spin = rng.choice((-1, 1)) * rng.uniform(0.3, 1.2) * rng.integers(2)
        flicker = rng.uniform(0.03, 0.08) * rng.integers(2)
        flicker_hertz, flicker_phase = rng.uniform(0.7, 1.5), rng.uniform()
        hertz = rng.uniform(*_OSCILLATION_HERTZ)
        amplitude = rng.uniform(*_SHAKE_AMPLITUDE) * scale
        climb = rng.uniform(*_VERTICAL_SPEED) * scale / (high - low) / FRAME_RATE
        growth = 1 / rng.uniform(*_GROWTH_SECONDS) / FRAME_RATE
        # One switch at rest: to blink is to switch again and again.
        switch = int(rng.integers(num_frames)) if switches and label is None and rng.uniform() < 0.25 else -1
        side = 1 if rng.integers(2) else -1
        swing = 0.0
        lamp_before = lamp
        for index in range(num_frames):
            elapsed = index / FRAME_RATE
            if label == "rise":
                height_phase = (height_phase - climb) % 1
            elif label == "sink":
                height_phase = (height_phase + climb) % 1
            elif label == "grow":
                radius_phase = (radius_phase + growth) % 1
            elif label == "shrink":
                radius_phase = (radius_phase - growth) % 1
            elif label == "blink":
                lamp = lamp_before ^ (int(2 * hertz * elapsed) % 2 == 0)
            elif label == "shake":
                swing = side * amplitude * math.sin(2 * math.pi * hertz * elapsed)
            if index == switch:
                lamp = not lamp
            if (x < left and drift < 0) or (x > right and drift > 0):
                drift = -drift
            x += drift / FRAME_RATE
            angle += spin / FRAME_RATE
            radius = _RADIUS[0] * (_RADIUS[1] / _RADIUS[0]) ** radius_phase * scale
            gain = (1.0 if lamp else _LAMP_OFF) * (
                1 + flicker * math.sin(2 * math.pi * (flicker_hertz * elapsed + flicker_phase))
            )
            states.append((x + swing, low + height_phase * (high - low), radius, angle, gain))
        # Left where the shake left it; snapping back would mark every shake's end with a jump.
        x += swing
    return _Path(*np.array(states, np.float32).T)

"""Videos as large as those that people train on, quickly made: a camera that moves over a picture with detail at every
scale, and a square that comes and goes. There is nothing to learn from them; what costs time is to decode them.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np

from lofi_fast.data.generated import FRAME_RATE, Action, Frame, Kind, Script, make, smooth_noise

VERSION = 1  # raised with every change of what is drawn
CLASSES = ("one", "two", "three")
ACTIONS = 4  # of a video, with as long between them
WAVELENGTHS = (6.0, 20.0, 60.0, 180.0)  # pixels
CONTRAST = 18.0  # of each, in 0 to 255


def generate(folder: Path, num_training: int, seconds: float, width: int, height: int) -> tuple[Path, Path]:
    """Make a set below `folder`, one video of it for validation: annotations, and the folder of videos. Raises as
    `lofi_fast.data.generated.make`.
    """
    num_frames = round(FRAME_RATE * seconds)
    marker = {"version": VERSION, "training": num_training, "frames": num_frames, "width": width, "height": height}
    subsets = ["training"] * num_training + ["validation"]
    written = [
        Script(f"footage_{index:03d}", subset, (VERSION, index), width, height, num_frames, _actions(index, seconds))
        for index, subset in enumerate(subsets)
    ]
    name = "footage-" + "-".join(map(str, marker.values()))
    return make(Path(folder) / name, Kind("footage", f"footage {VERSION}", render), marker, written)


def _actions(index: int, seconds: float) -> tuple[Action, ...]:
    length = seconds / (2 * ACTIONS)
    starts = [round((2 * number + 0.5) * length, 2) for number in range(ACTIONS)]
    names = [CLASSES[(index + number) % len(CLASSES)] for number in range(ACTIONS)]
    return tuple(Action(at, round(at + length, 2), name) for at, name in zip(starts, names, strict=True))


def render(script: Script) -> Iterator[Frame]:
    """Yield each frame, (height, width, 3) RGB."""
    rng = np.random.default_rng(script.entropy)
    side = 2 * max(script.width, script.height)
    picture = 128 + CONTRAST * sum(map(partial(smooth_noise, rng, side), WAVELENGTHS))
    pixels = np.clip(picture, 0, 255).astype(np.uint8)
    room = np.array([side - script.height, side - script.width])
    phases = rng.uniform(0, 2 * np.pi, 2)
    for index in range(script.num_frames):
        at = index / FRAME_RATE
        top, left = (room * (0.5 + 0.5 * np.sin(0.2 * at + phases))).astype(int)
        frame = pixels[top : top + script.height, left : left + script.width].copy()
        if any(action.start <= at < action.end for action in script.actions):
            frame[: script.height // 4, : script.height // 4] //= 2
        yield frame

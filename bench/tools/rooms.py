"""Generated videos with what real footage has and the demo lacks (docs/gain.md says why each): a fixed camera high in a
furnished room, a few small people who do other things most of the time, and few labelled changes of posture, slow to
begin, whose looks are those of the hours beside them.

Each person is upright, seated or lying, for long. One of them changes posture a few times: falls, lies down, gets
up, sits down, stands up; these are the classes. In between all of them walk about, bend and come up again, crouch half
way and rise, wave, carry, turn over where they lie, or do nothing. So every posture, and the beginning of every change,
is seen at rest too, and most of what moves is no action.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from lofi_fast.data.generated import FRAME_RATE, SUBSETS, Action, Floats, Frame, Kind, Progress, Script, make
from lofi_fast.data.generated import smooth_noise as noise

CLASSES = ("fall", "get up", "lie down", "sit down", "stand up")
WIDTH, HEIGHT = 128, 96  # pixels


@dataclass(frozen=True)
class Version:
    """What differs between the versions of the set (docs/gain.md says why)."""

    training: int  # videos
    validation: int
    seconds: tuple[int, int]  # of a video
    changes: tuple[int, int]  # of posture in a video
    most: float  # share of a video that they may take
    gap: float  # seconds at least before, between and after them
    people: int
    height: tuple[int, int]  # of a person in front, pixels
    farthest: float  # share of the height that is left at the top of the picture
    rooms: int | None = None  # that all videos share, and so many people; None: each video has its own
    cast: int = 0


VERSIONS = {
    1: Version(40, 16, (44, 56), (3, 5), most=1.0, gap=3.0, people=3, height=(24, 30), farthest=0.55),
    2: Version(64, 24, (24, 30), (1, 3), most=0.5, gap=2.0, people=2, height=(44, 54), farthest=0.7),
    3: Version(96, 24, (24, 30), (1, 3), most=0.5, gap=2.0, people=2, height=(44, 54), farthest=0.7, rooms=4, cast=6),
}
VERSION = 3

# Posture -> what can follow it: label, the posture then, seconds that the change takes, seconds that the label goes on
# after it.
_NEXT = {
    "upright": (
        ("fall", "lying", (0.9, 1.6), (0.6, 1.2)),
        ("lie down", "lying", (3.0, 5.0), (0.2, 0.6)),
        ("sit down", "seated", (1.8, 3.2), (0.2, 0.5)),
    ),
    "seated": (("stand up", "upright", (1.8, 3.2), (0.2, 0.5)), ("lie down", "lying", (2.4, 4.0), (0.2, 0.6))),
    "lying": (("get up", "upright", (3.0, 5.0), (0.2, 0.6)),),
}
_LEAN = {"upright": 0.0, "seated": 0.12, "lying": 1.45}  # radians from the vertical
_TALL = {"upright": 1.0, "seated": 0.62, "lying": 0.95}  # of the standing height
_REST = {
    "upright": ("still", "walk", "walk", "bend", "crouch", "wave", "carry"),
    "seated": ("still", "still", "bend", "wave"),
    "lying": ("still", "still", "turn"),
}
_ROOM, _PERSON = 2, 3  # in place of a subset's number, which is 0 or 1
_ONSET = 0.35  # share of a change in which it is still slow


@dataclass(frozen=True)
class _Change:
    first: int  # frames
    last: int
    label: str
    posture: str  # after it


@dataclass(frozen=True)
class _Looks:
    """Colours in 0 to 255, the height of the person who stands in front, in pixels, and the share of it far away."""

    body: Floats
    head: Floats
    legs: Floats
    height: float
    farthest: float


@dataclass(frozen=True)
class _Path:
    """State of a person at each frame, arrays of shape (num_frames,)."""

    x: Floats  # of the feet, pixels
    y: Floats
    lean: Floats  # radians, to either side
    tall: Floats
    stride: Floats  # radians between the legs
    arm: Floats  # radians


def generate(
    folder: Path,
    *,
    version: int = VERSION,
    num_training: int | None = None,
    num_validation: int | None = None,
    seed: int = 0,
    workers: int | None = None,
    progress: Progress | None = None,
) -> tuple[Path, Path]:
    """Make the set below `folder`, or find it there: annotations, and the folder of videos.

    The same arguments give the same bytes. Raises as `lofi_fast.data.generated.make`.
    """
    num_training = VERSIONS[version].training if num_training is None else num_training
    num_validation = VERSIONS[version].validation if num_validation is None else num_validation
    marker = {"version": version, "num_training": num_training, "num_validation": num_validation, "seed": seed}
    name = f"rooms-v{version}-{num_training}-{num_validation}-seed{seed}"
    kind = Kind("rooms", f"rooms {version}", partial(render, version=version))
    written = scripts(num_training, num_validation, seed, version)
    return make(Path(folder) / name, kind, marker, written, workers=workers, progress=progress)


def scripts(num_training: int, num_validation: int, seed: int, version: int = VERSION) -> list[Script]:
    """What happens in each video."""
    of = VERSIONS[version]
    found = []
    for code, (subset, count) in enumerate(zip(SUBSETS, (num_training, num_validation), strict=True)):
        for index in range(count):
            entropy = (1000 + version, seed, code, index)
            rng = np.random.default_rng(entropy)
            num_frames = FRAME_RATE * int(rng.integers(of.seconds[0], of.seconds[1] + 1))
            actions = _draw_actions(rng, num_frames / FRAME_RATE, of)
            found.append(Script(f"rooms_{subset}_{index:03d}", subset, entropy, WIDTH, HEIGHT, num_frames, actions))
    return found


def _draw_actions(rng: np.random.Generator, seconds: float, of: Version) -> tuple[Action, ...]:
    """Changes of one person's posture, in order, with a gap before, between and after."""
    while True:
        posture = _first_posture(rng)
        chosen = []
        for _ in range(int(rng.integers(of.changes[0], of.changes[1] + 1))):
            label, posture, takes, goes_on = _NEXT[posture][int(rng.integers(len(_NEXT[posture])))]
            chosen.append((label, rng.uniform(*takes) + rng.uniform(*goes_on)))
        lengths = np.array([length for _, length in chosen])
        spare = seconds - lengths.sum() - of.gap * (len(chosen) + 1)
        if spare > 0 and lengths.sum() < of.most * seconds:
            break
    gaps = of.gap + spare * rng.dirichlet(np.full(len(chosen) + 1, 1.5))
    starts = np.cumsum(gaps[:-1]) + np.cumsum(lengths) - lengths
    return tuple(
        Action(round(float(start), 2), round(float(start + length), 2), label)
        for start, (label, length) in zip(starts, chosen, strict=True)
    )


def _first_posture(rng: np.random.Generator) -> str:
    return ("upright", "upright", "seated", "lying")[int(rng.integers(4))]


def render(script: Script, version: int = VERSION) -> Iterator[Frame]:
    """Yield each frame, (height, width, 3) RGB."""
    of = VERSIONS[version]
    rng = np.random.default_rng((*script.entropy, 1))
    room, front = _draw_room(rng if of.rooms is None else _shared(script, _ROOM, int(rng.integers(of.rooms))))
    parts = _parts(rng, script, of.people)
    if of.rooms is None:
        cast = [(_draw_looks(rng, of), _trace(rng, script.num_frames, changes)) for changes in parts]
    else:
        who = rng.choice(of.cast, len(parts), replace=False)
        looks = [_draw_looks(_shared(script, _PERSON, int(person)), of) for person in who]
        cast = [(one, _trace(rng, script.num_frames, changes)) for one, changes in zip(looks, parts, strict=True)]
    seconds = np.arange(script.num_frames) / FRAME_RATE
    light = 1 + 0.06 * np.sin(2 * np.pi * (rng.uniform(0.02, 0.1) * seconds + rng.uniform()))
    grain = 3 * np.stack([noise(rng, 160, 2.0)[:HEIGHT, :WIDTH] for _ in range(4)])
    for index in range(script.num_frames):
        frame = room.copy()
        for looks, path in sorted(cast, key=lambda one: float(one[1].y[index])):
            _paint_person(frame, looks, path, index)
        np.copyto(frame, front[0], where=front[1])
        frame = frame * np.float32(light[index]) + np.roll(grain[index % 4], int(rng.integers(WIDTH)), axis=1)
        yield np.clip(frame + 0.5, 0, 255).astype(np.uint8)


def _shared(script: Script, what: int, number: int) -> np.random.Generator:
    """Draws the same room, or person, of that number in every video of a set."""
    version, seed, *_ = script.entropy
    return np.random.default_rng((version, seed, what, number))


def _parts(rng: np.random.Generator, script: Script, people: int) -> list[tuple[str, list[_Change]]]:
    """First posture and changes of each person: one acts, and the others stay as they are."""
    after = {label: posture for options in _NEXT.values() for label, posture, _, _ in options}
    changes = []
    for action in script.actions:
        # A frame belongs to an action when its time lies in [start, end).
        first, last = (math.ceil(time * FRAME_RATE - 1e-6) for time in (action.start, action.end))
        changes.append(_Change(first, last, action.label, after[action.label]))
    before = next(posture for posture, options in _NEXT.items() if changes[0].label in [label for label, *_ in options])
    found: list[tuple[str, list[_Change]]] = [(_first_posture(rng), []) for _ in range(people - 1)]
    found.insert(int(rng.integers(people)), (before, changes))
    return found


def _draw_room(rng: np.random.Generator) -> tuple[Floats, tuple[Floats, np.ndarray]]:
    """The room behind the people; and the furniture in front of them, with where it is."""
    hue = rng.uniform(60, 140, 3)
    down = np.linspace(0.75, 1.15, HEIGHT)[:, None, None]
    room = hue * down + 12 * noise(rng, 192, 20.0)[:HEIGHT, :WIDTH] + 5 * noise(rng, 192, 3.0)[:HEIGHT, :WIDTH]
    front, where = np.zeros((HEIGHT, WIDTH, 3), np.float32), np.zeros((HEIGHT, WIDTH, 1), bool)
    for piece in range(int(rng.integers(7, 11))):
        width, height = int(rng.integers(8, 30)), int(rng.integers(6, 22))
        left, top = int(rng.integers(0, WIDTH - width)), int(rng.integers(0, HEIGHT - height))
        colour = rng.uniform(30, 210, 3)
        looks = colour + 14 * noise(rng, 64, rng.uniform(3.0, 8.0))[:height, :width]
        if piece < 2:  # in front, low in the picture
            top = int(rng.integers(HEIGHT * 2 // 3, HEIGHT - height // 2))
            bottom = min(HEIGHT, top + height)
            front[top:bottom, left : left + width] = looks[: bottom - top]
            where[top:bottom, left : left + width] = True
        else:
            room[top : top + height, left : left + width] = looks
    return np.asarray(room, np.float32), (front, where)


def _draw_looks(rng: np.random.Generator, of: Version) -> _Looks:
    body, legs = rng.uniform(20, 235, (2, 3)).astype(np.float32)
    head = np.asarray(rng.uniform(0.5, 1.0) * np.array([230, 180, 150]), np.float32)
    return _Looks(body, head, legs, float(rng.uniform(*of.height)), of.farthest)


def _eased(share: float) -> float:
    """Of a change after a share of its time: slow at first, then quicker, slow at the end."""
    warped = share ** (1 / (1 - _ONSET))
    return warped * warped * (3 - 2 * warped)


def _trace(rng: np.random.Generator, num_frames: int, part: tuple[str, list[_Change]]) -> _Path:
    """Move one person through a video."""
    posture, changes = part
    x, y = rng.uniform(0.12, 0.88) * WIDTH, rng.uniform(0.45, 0.95) * HEIGHT
    side = 1.0 if rng.integers(2) else -1.0
    states: list[tuple[float, float, float, float, float, float]] = []
    at = 0
    for change in [*changes, None]:
        until = num_frames if change is None else change.first
        while at < until:
            length = min(until - at, int(FRAME_RATE * rng.uniform(2.0, 6.0)))
            doing = _REST[posture][int(rng.integers(len(_REST[posture])))]
            x, y = _rest(rng, states, doing, posture, side, x, y, length)
            at += length
        if change is None:
            break
        lean, tall = _LEAN[posture], _TALL[posture]
        takes = change.last - change.first
        moving = max(2, int(takes * (0.6 if change.label == "fall" else 0.88)))
        if posture != "lying":
            side = 1.0 if rng.integers(2) else -1.0
        for index in range(takes):
            done = _eased(min(1.0, (index + 1) / moving))
            new_lean = lean + (_LEAN[change.posture] - lean) * done
            new_tall = tall + (_TALL[change.posture] - tall) * done
            if change.label in ("lie down", "get up"):  # by way of the floor, bent
                new_tall -= 0.3 * math.sin(math.pi * done)
            states.append((x, y, side * new_lean, new_tall, 0.15, 0.3 * math.sin(math.pi * done)))
        posture, at = change.posture, change.last
    return _Path(*np.array(states, np.float32).T)


def _rest(
    rng: np.random.Generator,
    states: list[tuple[float, float, float, float, float, float]],
    doing: str,
    posture: str,
    side: float,
    x: float,
    y: float,
    length: int,
) -> tuple[float, float]:
    """Append what a person does for a while without a change of posture; where it ends."""
    lean, tall = _LEAN[posture], _TALL[posture]
    angle = rng.uniform(0, 2 * math.pi)
    speed = rng.uniform(4.0, 11.0) / FRAME_RATE
    hertz, deep = rng.uniform(0.8, 1.6), rng.uniform(0.5, 0.9)
    for index in range(length):
        share, beat = (index + 1) / length, math.sin(2 * math.pi * hertz * index / FRAME_RATE)
        hump = math.sin(math.pi * share)
        now_lean, now_tall, stride, arm = lean, tall, 0.15, 0.1
        if doing in ("walk", "carry"):
            nx, ny = x + speed * math.cos(angle), y + 0.5 * speed * math.sin(angle)
            if not (0.08 * WIDTH < nx < 0.92 * WIDTH and 0.4 * HEIGHT < ny < 0.97 * HEIGHT):
                angle += math.pi / 2
            else:
                x, y = nx, ny
            stride, arm = 0.5 * beat, 0.9 if doing == "carry" else 0.5 * beat
        elif doing == "bend":  # begins as falling or lying down does
            now_lean = lean + 0.75 * deep * _eased(min(1.0, 2 * min(share, 1 - share)))
        elif doing == "crouch":  # begins as sitting down does
            now_tall = tall - 0.33 * deep * _eased(min(1.0, 2 * min(share, 1 - share)))
        elif doing == "wave":
            arm = 2.2 + 0.5 * beat
        elif doing == "turn":
            now_lean, arm = lean - 0.25 * deep * hump, 0.6 * hump
        states.append((x, y, side * now_lean, now_tall, stride, arm))
    return x, y


def _paint_person(frame: Floats, looks: _Looks, path: _Path, index: int) -> None:
    """Draw a person into `frame`: two legs, a body, an arm and a head, along an axis that leans from the feet."""
    x, y, lean, tall = (float(of[index]) for of in (path.x, path.y, path.lean, path.tall))
    size = looks.height * (looks.farthest + (1 - looks.farthest) * y / HEIGHT)  # the further up, the further away
    along = np.array([math.sin(lean), -math.cos(lean)]) * size * tall
    across = np.array([math.cos(lean), math.sin(lean)])
    feet = np.array([x, y])
    hip, neck, top = feet + 0.45 * along, feet + 0.8 * along, feet + 0.92 * along
    stride = float(path.stride[index]) * 0.35 * size
    for leg in (-1, 1):
        _paint_line(frame, hip, feet + leg * stride * across, 0.075 * size, looks.legs)
    _paint_line(frame, hip, neck, 0.13 * size, looks.body)
    swing = float(path.arm[index])
    reach = neck + 0.36 * size * (math.sin(swing) * across - math.cos(swing) * along / max(1e-6, np.hypot(*along)))
    _paint_line(frame, neck, reach, 0.055 * size, looks.head)
    _paint_line(frame, top, top, 0.1 * size, looks.head)


def _paint_line(frame: Floats, start: np.ndarray, end: np.ndarray, radius: float, colour: Floats) -> None:
    """A line with round ends, its edges one pixel soft."""
    reach = radius + 1.5
    left, top = np.floor(np.minimum(start, end) - reach).astype(int)
    right, bottom = np.ceil(np.maximum(start, end) + reach).astype(int)
    left, top, right, bottom = max(0, left), max(0, top), min(WIDTH, right), min(HEIGHT, bottom)
    if left >= right or top >= bottom:
        return
    px = np.arange(left, right, dtype=np.float32)[None, :] - np.float32(start[0])
    py = np.arange(top, bottom, dtype=np.float32)[:, None] - np.float32(start[1])
    dx, dy = (np.float32(value) for value in end - start)
    length = dx * dx + dy * dy
    share = np.clip((px * dx + py * dy) / length, 0, 1) if length > 1e-6 else np.float32(0)
    distance = np.hypot(px - share * dx, py - share * dy)
    alpha = np.clip(np.float32(radius + 0.5) - distance, 0, 1)[..., None]
    area = frame[top:bottom, left:right]
    area += alpha * (colour - area)

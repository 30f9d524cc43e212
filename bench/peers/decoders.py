"""Frames of a video decoded from the video itself, as data loaders do: wanted indices, the centre square, resized."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import av
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

Decode = Callable[[Path, np.ndarray, int], Iterator[np.ndarray]]  # (path, sorted indices, threads) -> RGB (H, W, 3)


def pyav(path: Path, frames: np.ndarray, threads: int) -> Iterator[np.ndarray]:
    """Every frame is decoded up to the last that is wanted; a wanted one is converted."""
    wanted = set(frames.tolist())
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        stream.thread_type, stream.codec_context.thread_count = "AUTO", threads
        for index, frame in enumerate(container.decode(stream)):
            if index in wanted:
                yield frame.to_ndarray(format="rgb24")
            if index == frames[-1]:
                return


def opencv(path: Path, frames: np.ndarray, threads: int) -> Iterator[np.ndarray]:
    """VideoCapture: `grab` decodes, `retrieve` converts."""
    cv2 = importlib.import_module("cv2")
    cv2.setNumThreads(threads)
    wanted = set(frames.tolist())
    capture = cv2.VideoCapture(str(path), cv2.CAP_FFMPEG, [cv2.CAP_PROP_N_THREADS, threads])
    try:
        for index in range(int(frames[-1]) + 1):
            if not capture.grab():
                raise RuntimeError(f"{path.name} ends at frame {index}")
            if index in wanted:
                yield np.ascontiguousarray(capture.retrieve()[1][:, :, ::-1])
    finally:
        capture.release()


def decord(path: Path, frames: np.ndarray, threads: int) -> Iterator[np.ndarray]:
    """get_batch of all that is wanted."""
    module: Any = importlib.import_module("decord")
    reader = module.VideoReader(str(path), num_threads=threads)
    yield from reader.get_batch(frames.tolist()).asnumpy()


def decoders() -> dict[str, Decode]:
    """Those that can run here. decord2 installs the module decord."""
    others = {"OpenCV": ("cv2", opencv), "decord": ("decord", decord)}
    found = {name: decode for name, (module, decode) in others.items() if importlib.util.find_spec(module)}
    return {"PyAV": pyav, **found}


def squares(decode: Decode, path: Path, frames: np.ndarray, side: int, share: float, threads: int) -> Tensor:
    """uint8 (len(frames), side, side, 3): the centre square of `share` of the short side, resized with antialiasing.

    `frames` may repeat and need not be sorted.
    """
    order, places = np.unique(frames, return_inverse=True)
    pictures = []
    for picture in decode(path, order, threads):
        height, width = picture.shape[:2]
        extent = share * min(height, width)
        top, left = round((height - extent) / 2), round((width - extent) / 2)
        pictures.append(picture[top : round(top + extent), left : round(left + extent)])
    x_NCHW = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).float()
    resized = F.interpolate(x_NCHW, (side, side), mode="bilinear", antialias=True)
    return resized.round_().clamp_(0, 255).to(torch.uint8).permute(0, 2, 3, 1)[torch.from_numpy(places)].contiguous()

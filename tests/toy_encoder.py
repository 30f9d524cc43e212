"""An encoder in one file, as a newcomer would write one: no ledger, no levers of its own."""

from __future__ import annotations

from torch import Tensor, nn

from lofi_fast.config import Config
from lofi_fast.encoder.protocol import Encoder

CHANNELS = 32


class ToyEncoder(Encoder):
    """Two convolutions, then the mean over the pixels and frames of a snippet."""

    name = "toy encoder"
    num_features = CHANNELS

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(3, CHANNELS, 5, stride=2, padding=2), nn.BatchNorm2d(CHANNELS), nn.ReLU(),
            nn.Conv2d(CHANNELS, CHANNELS, 3, stride=2, padding=1), nn.BatchNorm2d(CHANNELS), nn.ReLU(),
        )  # fmt: skip

    def forward(self, frames_NHWC: Tensor, num_frames: int) -> Tensor:
        x_NCHW = self.layers(frames_NHWC.permute(0, 3, 1, 2) / 127.5 - 1)
        features: Tensor = x_NCHW.mean(dim=(2, 3)).unflatten(0, (-1, num_frames)).mean(dim=1)
        return features


def make_encoder(config: Config) -> ToyEncoder:
    return ToyEncoder()

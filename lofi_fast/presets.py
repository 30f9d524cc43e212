"""Presets: whole settings by name, as functions."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from lofi_fast.config import Config, DataConfig, DetectConfig, EncoderConfig, HeadConfig, StageConfig
from lofi_fast.fidelity import Fidelity


def activitynet() -> Config:
    """The paper's setting for ActivityNet-1.3 and HACS-1.1: whole videos, 100 x 224 px, batch 16."""
    return Config(
        preset="activitynet",
        full=Fidelity(100, 224),
        data=DataConfig(),
        encoder=EncoderConfig(),
        head=HeadConfig(),
        pretrain=StageConfig(epochs=10, batch=64, optimizer="sgd", lr=0.01, decay_every=4, decay=0.1),
        joint=StageConfig(epochs=15, batch=16, optimizer="sgd", lr=0.1, class_loss=0.0),
        head_stage=StageConfig(epochs=10, batch=16, optimizer="adam", lr=1e-3, decay_every=5, decay=0.1),
        detect=DetectConfig(),
    )


def hacs() -> Config:
    """HACS-1.1 segments: ActivityNet's setting, as in the paper."""
    return replace(activitynet(), preset="hacs")


def thumos() -> Config:
    """THUMOS14: windows of 256 snippets (one every 5 frames at 30 fps), actions up to 64 snippets, G-TAD's 16 + 16
    bins and 3x3 middle convolutions.
    """
    base = activitynet()
    return replace(
        base,
        preset="thumos",
        full=Fidelity(256, 112),
        data=DataConfig(window=256 * 5 / 30, frame_stride=1),
        head=HeadConfig(inner_bins=16, context_bins=16, max_duration=64, middle_kernel=3),
        detect=DetectConfig(tious="thumos", top_k=200),
    )


def small() -> Config:
    """A few videos, no pre-trained weights, a CPU or a small GPU: a narrow encoder learned from scratch."""
    return Config(
        preset="small",
        full=Fidelity(64, 96),
        data=DataConfig(window=32.0, frame_stride=2, resize="squash", jitter=0.1),
        encoder=EncoderConfig(width=32),
        head=HeadConfig(
            hidden=128, groups=16, inner_bins=16, map_channels=256, positive_iou=0.7, sample_zero_iou=True, dropout=0.3
        ),
        pretrain=StageConfig(epochs=12, batch=16, optimizer="adamw", lr=2e-3, weight_decay=0.02, schedule="cosine"),
        joint=StageConfig(epochs=6, batch=2, optimizer="adamw", lr=5e-4, weight_decay=0.02, schedule="cosine"),
        head_stage=StageConfig(epochs=40, batch=8, optimizer="adamw", lr=1e-3, weight_decay=0.02, schedule="cosine"),
        detect=DetectConfig(tious="thumos", top_k=200),
        min_cut=4.0,
    )


def demo() -> Config:
    """The embedded demo set: 24-second videos at 32 x 64 px, and a least cut of 4 so that LoFi's cycle is seen at any
    budget and a CPU is done in minutes.
    """
    base = small()
    return replace(
        base,
        preset="demo",
        full=Fidelity(32, 64),
        data=DataConfig(frame_stride=2, jitter=0.1),
        pretrain=replace(base.pretrain, epochs=6),
        joint=replace(base.joint, epochs=6, batch=4),
        head_stage=replace(base.head_stage, epochs=25),
    )


PRESETS: dict[str, Callable[[], Config]] = {
    "demo": demo,
    "small": small,
    "activitynet": activitynet,
    "hacs": hacs,
    "thumos": thumos,
}

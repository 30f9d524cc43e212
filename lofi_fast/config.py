"""Settings: frozen dataclasses, presets as functions, and the few flags of the main job.

Every error names the flag to change. A config is made once, saved in the run folder, and never changed afterwards.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Literal, get_args

from lofi_fast.budget import Budget
from lofi_fast.fidelity import MAX_CUT, Fidelity, Pattern

Stage = Literal["pretrain", "joint", "head", "eval"]
STAGES: tuple[Stage, ...] = get_args(Stage)
EncoderName = Literal["tsm_r18", "tsm_r34", "tsm_r50"]
OptimizerImpl = Literal["auto", "apex", "torch"]
Recompute = Literal["auto", "always", "never"]


class Policy(StrEnum):
    """What gives way when memory is short."""

    BATCH = "batch"  # the paper's: all videos of a step at once, the cut takes the slack
    FIDELITY = "fidelity"  # fewer videos at once, down to one, before the cut grows


KeptMaps = Literal["exact", "8bit"]


@dataclass(frozen=True)
class DataConfig:
    annotations: str | None = None  # None: the embedded demo set
    videos: str | None = None
    cache: str | None = None  # None: <out>/../cache, shared by the runs beside each other
    video_scores: str | None = None
    window: float | None = None  # seconds the head sees at once; None: the whole video (ActivityNet's way)
    overlap: float = 0.5  # of neighbouring windows
    frame_stride: int = 8  # source frames from one frame of a snippet to the next
    resize: Literal["crop", "squash"] = "crop"  # a square out of the frame, or the whole frame made square
    flip: bool = True  # only where no class is told by left and right
    jitter: float = 0.0  # random gain and offset of the pixel values in training, as a fraction


@dataclass(frozen=True)
class EncoderConfig:
    name: EncoderName = "tsm_r18"
    width: int = 64
    weights: str | None = None


@dataclass(frozen=True)
class HeadConfig:
    """G-TAD. The defaults are its ActivityNet configuration."""

    hidden: int = 256
    groups: int = 32
    inner_bins: int = 32
    context_bins: int = 4
    map_channels: int = 512
    max_duration: int | None = None  # in snippets of the full grid; None: as long as the window
    middle_kernel: Literal[1, 3] = 1
    class_bins: int = 8
    positive_iou: float = 0.9  # tIoU from which a proposal counts as positive for the classification map
    sample_zero_iou: bool = False  # upstream draws its low cells from (0, 0.3]; True draws them from [0, 0.3]
    dropout: float = 0.0


@dataclass(frozen=True)
class StageConfig:
    epochs: int
    batch: int
    optimizer: Literal["sgd", "adam", "adamw"]
    lr: float
    weight_decay: float = 1e-4
    schedule: Literal["step", "cosine"] = "step"
    decay_every: int = 5  # epochs, for "step"
    decay: float = 0.5
    class_loss: float = 1.0  # weight of our class loss beside the head's own TAL loss


@dataclass(frozen=True)
class DetectConfig:
    tious: str = "activitynet"
    sigma: float = 0.84
    top_k: int = 100
    labels_per_proposal: int = 2


@dataclass(frozen=True)
class Config:
    preset: str
    full: Fidelity
    data: DataConfig
    encoder: EncoderConfig
    head: HeadConfig
    pretrain: StageConfig
    joint: StageConfig
    head_stage: StageConfig
    detect: DetectConfig
    stages: tuple[Stage, ...] = STAGES
    pattern: Pattern = Pattern.CYCLIC
    short_cycle: int | None = None
    min_cut: float = 1.0
    max_cut: float = MAX_CUT
    micro_batch: int | None = None  # videos of a joint step in memory at once; None: all of them
    policy: Policy = Policy.BATCH
    recompute: Recompute = "auto"
    kept_maps: KeptMaps = "exact"  # how the encoder's maps wait for backward
    replay: str | None = None  # log.jsonl of a run whose rungs are taken
    budget: Budget = field(default_factory=lambda: Budget.parse("auto"))
    optimizer_impl: OptimizerImpl = "auto"
    out: str = ""  # empty: runs/<preset>, numbered when that is taken
    seed: int = 0
    device: str = "auto"
    threads: int | None = None

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), indent=1)

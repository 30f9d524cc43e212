"""Settings: frozen dataclasses, presets as functions, and the few flags of the main job.

Every error names the flag to change. A config is made once, saved in the run folder, and never changed afterwards.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import os
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NoReturn, get_args

from lofi_fast.errors import InputError
from lofi_fast.fidelity import MAX_CUT, MIN_SIDE, Fidelity, Pattern
from lofi_fast.plan import Policy, Recompute

Stage = Literal["pretrain", "joint", "head", "eval"]
STAGES: tuple[Stage, ...] = get_args(Stage)
EncoderName = Literal["tsm_r18", "tsm_r34", "tsm_r50"]
OptimizerImpl = Literal["auto", "apex", "torch"]
KeptMaps = Literal["exact", "8bit"]
_UNITS = {"": 0, "K": 1, "M": 2, "G": 3, "T": 4}


def parse_bytes(text: str) -> int:
    """Bytes of "11GB" (11e9), "11GiB" (11 * 2^30), "512MB", "2000000000". Raises InputError for anything else."""
    match = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]*)?|\.[0-9]+)\s*([KMGT]?)(i?)B?\s*", text, re.IGNORECASE | re.ASCII)
    if match is None or (match[3] and not match[2]):
        raise InputError(f'"{text}" is not an amount of memory: write it like 11GB, 11GiB, 80% or auto (--mem-budget)')
    base = 1024 if match[3] else 1000
    amount = float(match[1]) * float(base ** _UNITS[match[2].upper()])
    if not 0.5 < amount < float(2**63):
        raise InputError(f'"{text}" is no memory that a machine has: give --mem-budget an amount like 11GB')
    return round(amount)


@dataclass(frozen=True)
class Budget:
    """What the user allows this process: an amount in bytes, a share of the device, or (neither) what is free now."""

    text: str
    amount: int | None = None
    share: float | None = None

    @staticmethod
    def parse(text: str) -> Budget:
        """ "11GB", "11GiB", "80%" (of the device's memory) or "auto" (what is free at the start)."""
        if text.strip().lower() == "auto":
            return Budget(text)
        if text.strip().endswith("%"):
            try:
                share = float(text.strip()[:-1]) / 100
            except ValueError:
                share = math.nan
            if not 0 < share <= 1:
                raise InputError(f'"{text}" is not a share of memory: write --mem-budget like 80% (0 to 100)')
            return Budget(text, share=share)
        return Budget(text, amount=parse_bytes(text))


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


class _Parser(argparse.ArgumentParser):
    """One sentence for a mistyped flag, as for every other bad input, and not the whole usage before it."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message}; --help lists the flags\n")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="python -m lofi_fast.train",
        description="Train a temporal action detector end to end within a memory budget. With no videos given, it "
        "trains on a small demo set that it makes itself.",
    )
    main = parser.add_argument_group("the job")
    main.add_argument("--mem-budget", metavar="11GB", default="auto", help="memory this process may hold, as the "
                      "driver shows it: 11GB, 11GiB, 80%% (of the device) or auto (what is free; default)")  # fmt: skip
    main.add_argument("--annotations", metavar="FILE", help="ActivityNet-form JSON, or a CSV: video,start,end,label")
    main.add_argument("--videos", metavar="DIR", help="folder of the videos that the annotations name")
    main.add_argument("--out", metavar="DIR", help="run folder (default: runs/<preset>)")
    main.add_argument("--preset", choices=tuple(PRESETS), help="default: demo; with --annotations: small on a CPU, "
                      "activitynet on a GPU")  # fmt: skip
    main.add_argument("--stages", metavar="A,B", help=f"which of {','.join(STAGES)} to run (default: all)")
    main.add_argument("--resume", action="store_true", help="go on with the run in --out from its last checkpoint")

    model = parser.add_argument_group("model and fidelity")
    model.add_argument("--encoder", choices=get_args(EncoderName), help="default: tsm_r18")
    model.add_argument("--width", type=int, metavar="C", help="channels of the encoder's first stage (64: the paper's)")
    model.add_argument("--encoder-weights", metavar="FILE", help="torchvision ResNet, TSM or lofi_fast checkpoint")
    model.add_argument("--fidelity", metavar="LxS", help="full fidelity: snippets x pixels, like 100x224")
    model.add_argument("--pattern", choices=[p.value for p in Pattern], help="where LoFi cuts (default: cyclic)")
    model.add_argument("--short-cycle", type=int, metavar="N", help="cyclic: switch every N steps, not every epoch")
    model.add_argument("--min-cut", type=float, metavar="K", help="never train above 1/K of full fidelity")
    model.add_argument("--max-cut", type=float, metavar="K", help=f"never train below 1/K of it (default {MAX_CUT:g})")

    memory = parser.add_argument_group("memory")
    memory.add_argument("--policy", choices=[p.value for p in Policy], help="what gives way when memory is short: "
                        "batch (default): all videos of a step are in memory at once, and the cut grows; fidelity: "
                        "fewer at once, at more time, before the cut grows")  # fmt: skip
    memory.add_argument("--micro-batch", type=int, metavar="B", help="videos of a joint step in memory at once (the "
                        "loss is the same; default: the policy decides)")  # fmt: skip
    memory.add_argument("--recompute", choices=get_args(Recompute), help="run the encoder forward a second time "
                        "instead of keeping its maps; auto (default): where nothing fits without")  # fmt: skip
    memory.add_argument("--kept-maps", choices=get_args(KeptMaps), help="how the encoder's maps wait for backward: "
                        "exact (default), or in 8bit: less memory, gradients rounded by some 1e-3")  # fmt: skip
    memory.add_argument("--replay-rungs", metavar="FILE", help="take the rungs of every joint step from the log.jsonl "
                        "of another run")  # fmt: skip

    data = parser.add_argument_group("data")
    data.add_argument("--window", metavar="SECONDS", help="the head sees this much at once; 'video': all of it")
    data.add_argument("--frame-stride", type=int, metavar="N", help="source frames between frames of a snippet")
    data.add_argument("--resize", choices=("crop", "squash"), help="a square of the frame, or all of it made square")
    data.add_argument("--no-flip", action="store_true", help="no horizontal flips: a class is told by left and right")
    data.add_argument("--cache", metavar="DIR", help="frame cache (default: cache/ beside the run folder)")
    data.add_argument("--video-scores", metavar="FILE", help="class scores of whole videos, used instead of our own")

    training = parser.add_argument_group("training")
    for stage in ("pretrain", "joint", "head"):
        training.add_argument(f"--{stage}-epochs", type=int, metavar="N")
        training.add_argument(f"--{stage}-lr", type=float, metavar="LR")
    training.add_argument("--batch", type=int, metavar="B", help="videos of a joint step (16 in the paper)")
    training.add_argument("--optimizer-impl", choices=get_args(OptimizerImpl), default="auto", help="whose kernels "
                          "update the weights: NVIDIA's apex, torch's, or auto: apex where it is built")  # fmt: skip
    training.add_argument("--tiou", metavar="SPEC", help="activitynet, thumos, or like 0.3:0.1:0.7")
    training.add_argument("--seed", type=int, default=0)
    training.add_argument("--device", choices=("auto", "cuda", "cpu"), default="auto")
    training.add_argument("--threads", type=int, metavar="N", help="CPU threads (default: all cores)")
    return parser


def _fidelity(text: str) -> Fidelity:
    match = re.fullmatch(r"(\d+)x(\d+)", text)
    if match is None or int(match[1]) < 4 or int(match[2]) < MIN_SIDE or int(match[2]) % 2:
        raise InputError(
            f'--fidelity "{text}": write snippets x pixels, like 100x224 '
            f"(at least 4 snippets; an even side of {MIN_SIDE} px or more)"
        )
    return Fidelity(int(match[1]), int(match[2]))


def _stages(text: str) -> tuple[Stage, ...]:
    asked = [name.strip() for name in text.split(",") if name.strip()]
    unknown = [name for name in asked if name not in STAGES]
    if unknown or not asked:
        raise InputError(f'--stages "{text}": name one or more of {", ".join(STAGES)}')
    return tuple(stage for stage in STAGES if stage in asked)


def _stage(config: StageConfig, **changes: Any) -> StageConfig:
    return replace(config, **{name: value for name, value in changes.items() if value is not None})


def _positive(args: argparse.Namespace) -> None:
    for name, value in vars(args).items():
        zero_allowed = name == "seed" or name.endswith("_epochs")
        if isinstance(value, bool) or not isinstance(value, int | float):
            continue
        if not math.isfinite(value) or value < 0 or (value == 0 and not zero_allowed):
            raise InputError(f"--{name.replace('_', '-')} {value}: must be a positive number")
        if name != "seed" and value > sys.maxsize:
            raise InputError(f"--{name.replace('_', '-')} {value}: must be a smaller number")


def from_arguments(argv: Sequence[str] | None, *, cuda: bool, with_data: bool = True) -> tuple[Config, bool]:
    """(config, resume) of a command line; `cuda` says whether a GPU is at hand, for the default preset. Without data
    any preset goes, and the paper's is the default.
    """
    args = _parser().parse_args(argv)
    _positive(args)
    cores = os.cpu_count() or 1
    if args.threads is not None and args.threads > cores:
        raise InputError(f"--threads {args.threads}: this machine has {cores} cores; more threads than that only wait")
    if args.videos and not args.annotations:
        raise InputError("--videos is given without --annotations: name the file of labels too")
    if args.annotations and not args.videos:
        raise InputError("--annotations is given without --videos: name the folder of the videos too")
    own_data = "activitynet" if cuda and args.device != "cpu" else "small"
    preset = args.preset or (own_data if args.annotations else "demo" if with_data else "activitynet")
    if preset != "demo" and not args.annotations and with_data:
        raise InputError(f"--preset {preset} needs your data: add --annotations FILE --videos DIR")
    base = PRESETS[preset]()
    if args.short_cycle and Pattern(args.pattern or base.pattern) is not Pattern.CYCLIC:
        raise InputError(f"--short-cycle {args.short_cycle} goes with --pattern cyclic, not {args.pattern}")
    data: dict[str, Any] = {
        "annotations": args.annotations,
        "videos": args.videos,
        "cache": args.cache,
        "video_scores": args.video_scores,
        "frame_stride": args.frame_stride,
        "resize": args.resize,
        "flip": False if args.no_flip else None,
    }
    if args.window is not None:
        data["window"] = _window(args.window)
    config = replace(
        base,
        full=base.full if args.fidelity is None else _fidelity(args.fidelity),
        data=replace(base.data, **{k: v for k, v in data.items() if v is not None or k == "window"}),
        encoder=replace(
            base.encoder,
            name=args.encoder or base.encoder.name,
            width=args.width or base.encoder.width,
            weights=args.encoder_weights,
        ),
        pretrain=_stage(base.pretrain, epochs=args.pretrain_epochs, lr=args.pretrain_lr),
        joint=_stage(base.joint, epochs=args.joint_epochs, lr=args.joint_lr, batch=args.batch),
        head_stage=_stage(base.head_stage, epochs=args.head_epochs, lr=args.head_lr),
        detect=replace(base.detect, tious=args.tiou or base.detect.tious),
        stages=base.stages if args.stages is None else _stages(args.stages),
        pattern=Pattern(args.pattern or base.pattern),
        short_cycle=args.short_cycle,
        min_cut=args.min_cut or base.min_cut,
        max_cut=args.max_cut or max(base.max_cut, args.min_cut or base.min_cut),
        micro_batch=args.micro_batch,
        policy=Policy(args.policy or base.policy),
        recompute=args.recompute or base.recompute,
        kept_maps=args.kept_maps or base.kept_maps,
        replay=args.replay_rungs,
        budget=Budget.parse(args.mem_budget),
        optimizer_impl=args.optimizer_impl,
        out=args.out or "",
        seed=args.seed,
        device=args.device,
        threads=args.threads,
    )
    if not 1 <= config.min_cut <= config.max_cut <= 64:
        raise InputError(f"--min-cut {config.min_cut:g} --max-cut {config.max_cut:g}: need 1 <= min <= max <= 64")
    return config, args.resume


def _window(text: str) -> float | None:
    if text == "video":
        return None
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not 0 < seconds < math.inf:
        raise InputError(f'--window "{text}": give a positive number of seconds, or "video" for whole videos')
    return seconds

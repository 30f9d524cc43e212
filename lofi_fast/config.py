"""The settings of a run: frozen dataclasses whose fields say all that is to be said of a setting (settings.py).

A config is made once (presets.py), saved in the run folder as config.json, and never changed afterwards. The same words
serve the command line, a file of settings (--config) and keywords in Python.
"""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import msgspec

from lofi_fast import __version__
from lofi_fast.budget import Budget, parse_time, show_time
from lofi_fast.errors import InputError
from lofi_fast.fidelity import MAX_CUT, MIN_SIDE, Fidelity, Pattern
from lofi_fast.settings import Section, Setting, leaves, made, read

Stage = Literal["pretrain", "joint", "head", "eval"]
STAGES: tuple[Stage, ...] = get_args(Stage)
EncoderName = Literal["tsm_r18", "tsm_r34", "tsm_r50", "r2plus1d_18", "vit_b16"]
HeadName = Literal["gtad", "bmn", "actionformer", "spotting"]
OptimizerImpl = Literal["auto", "apex", "torch"]
Recompute = Literal["auto", "always", "never"]
PrecisionName = Literal["auto", "bf16", "fp16", "fp32"]
VERSION = "lofi_fast"  # the key of config.json that holds the version which wrote it
JOB, FIDELITY, MEMORY, TRAINING = "job", "model and fidelity", "memory", "training"  # headings of --help


KeptMaps = Literal["exact", "8bit"]
Device = Literal["auto", "cuda", "cpu"]


def parse_fidelity(text: str) -> Fidelity:
    """ "100x224": snippets x pixels. Raises InputError."""
    match = re.fullmatch(r"(\d+)x(\d+)", text)
    if match is None or int(match[1]) < 4 or int(match[2]) < MIN_SIDE or int(match[2]) % 2:
        raise InputError(
            f'--fidelity "{text}": write snippets x pixels, like 100x224 '
            f"(at least 4 snippets; an even side of {MIN_SIDE} px or more)"
        )
    return Fidelity(int(match[1]), int(match[2]))


def parse_stages(text: str) -> tuple[Stage, ...]:
    """ "joint,head": each once, in the order in which they run. Raises InputError."""
    asked = [name.strip() for name in text.split(",") if name.strip()]
    unknown = [name for name in asked if name not in STAGES]
    if unknown or not asked:
        raise InputError(f'--stages "{text}": name one or more of {", ".join(STAGES)}')
    return tuple(stage for stage in STAGES if stage in asked)


def parse_window(text: str) -> float | Literal["labels"] | None:
    """Seconds, None for "video": all of it, or "labels". Raises InputError."""
    if text == "video":
        return None
    if text == "labels":
        return "labels"
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not 0 < seconds < math.inf:
        raise InputError(
            f'--window "{text}": give a positive number of seconds, "video" for whole videos, or "labels" to have it '
            "chosen from the labels"
        )
    return seconds


def parse_trained(text: str) -> str:
    """ "all", "adapters" or "last:N" blocks. Raises InputError."""
    if not re.fullmatch(r"all|adapters|last:([1-9]|1[0-2])", text):
        raise InputError(f'--encoder.train "{text}": write all, adapters, or last:N for the last 1 to 12 blocks')
    return text


# What formats of labels leave open: settings of a run, and flags of the other commands that read labels.
FPS = Setting(
    "frames a second, for labels that count frames and do not tell", "X", flag="--fps",
    unset="as the labels say, or else the videos",
)  # fmt: skip
LABEL = Setting(
    "which of several labels a segment has in some formats: verb, noun or action of EPIC-KITCHENS, ...", "NAME",
    flag="--label", unset="the format's usual one",
)  # fmt: skip
TIERS = Setting(
    "tiers of ELAN files that hold the actions", "A,B", flag="--tiers", unset="all that depend on no other one"
)
HELD = (  # what a budget is
    "memory that this process may hold, as the driver shows it: 11GB, 11GiB, 80% (of the device) or auto (what is free)"
)
# Of the commands that apply a detector.
MemBudget = Annotated[Budget, Setting(HELD, "11GB", parse=Budget.parse, show=lambda budget: budget.text)]


@dataclass(frozen=True)
class DataConfig:
    annotations: Annotated[
        str | None,
        Setting(
            "labels: ActivityNet-form JSON, a CSV with video,start,end,label, or what docs/formats.md lists; or a "
            "folder of such files",
            "FILE", flag="--annotations", group=JOB, unset="the embedded demo set", may_change=True,
        ),
    ] = None  # fmt: skip
    videos: Annotated[
        str | None,
        Setting(
            "folder of the videos that the annotations name", "DIR", flag="--videos", group=JOB,
            unset="the embedded demo set", may_change=True,
        ),
    ] = None  # fmt: skip
    fps: Annotated[float | None, FPS] = None
    label: Annotated[str | None, LABEL] = None
    tiers: Annotated[str | None, TIERS] = None
    cache: Annotated[
        str | None,
        Setting(
            "frame cache, which runs may share", "DIR", flag="--cache", unset="cache/ beside the run folder",
            may_change=True,
        ),
    ] = None  # fmt: skip
    decoder: Annotated[
        Literal["auto", "pyav"],
        Setting(
            'what decodes videos for the frame cache; "auto": the video engine of the GPU where there is one (NVDEC), '
            "and PyAV for what it cannot decode",
            may_change=True,
        ),
    ] = "auto"
    video_scores: Annotated[
        str | None,
        Setting(
            "class scores of whole videos, used instead of our own", "FILE", flag="--video-scores", unset="our own",
            may_change=True,
        ),
    ] = None  # fmt: skip
    window: Annotated[
        float | Literal["labels"] | None,
        Setting(
            'how much of a video the head sees at once; "video": all of it; "labels": chosen from the training labels',
            "SECONDS", flag="--window", unset="video", parse=parse_window,
        ),
    ] = None  # fmt: skip
    overlap: Annotated[float, Setting("share of a window that the next one repeats", zero=True, below=1)] = 0.5
    frame_stride: Annotated[
        int, Setting("frames of the video from one frame of a snippet to the next", flag="--frame-stride")
    ] = 8
    resize: Annotated[
        Literal["crop", "squash"],
        Setting("a square cut out of the frame, or the whole frame made square", flag="--resize"),
    ] = "crop"
    flip: Annotated[
        bool, Setting("horizontal flips in training; not where a class is told by left and right", flag="--flip")
    ] = True
    jitter: Annotated[
        float, Setting("random gain and offset of pixel values in training, as a fraction", zero=True, below=1)
    ] = 0.0

    @property
    def window_seconds(self) -> float | None:
        """Length of a window, None for whole videos. Raises ValueError while it is still to be chosen from labels; the
        config of a run, once its data were looked at, and that of a detector hold the one that was chosen.
        """
        if self.window == "labels":
            raise ValueError("the window was not chosen from the labels yet")
        return self.window


@dataclass(frozen=True)
class EncoderConfig:
    name: Annotated[EncoderName, Setting("the network that makes features", flag="--encoder", memory=True)] = "tsm_r18"
    width: Annotated[
        int,
        Setting(
            "channels of its first stage, or of an attention head (the papers': 64)", flag="--width", memory=True
        ),
    ] = 64  # fmt: skip
    train: Annotated[
        str,
        Setting(
            "what of vit_b16 learns: all, adapters (small layers beside blocks that stay), or last:N blocks",
            "all|adapters|last:N", memory=True, parse=parse_trained,
        ),
    ] = "all"  # fmt: skip
    weights: Annotated[
        str | None,
        Setting(
            "torchvision, TSM, TSP, V-JEPA 2 or lofi_fast checkpoint to start from", "FILE", flag="--encoder-weights",
            unset="random weights", may_change=True,
        ),
    ] = None  # fmt: skip


@dataclass(frozen=True)
class HeadConfig:
    """Which head; and G-TAD, whose ActivityNet configuration is the default, and what BMN has in common with it."""

    name: Annotated[HeadName, Setting("what finds the actions in features", flag="--head", memory=True)] = "gtad"
    hidden: Annotated[
        int,
        Setting(
            "channels of a snippet: of G-TAD's graph blocks, a multiple of twice their groups; a multiple of 4",
            memory=True,
        ),
    ] = 256  # fmt: skip
    groups: Annotated[int, Setting("groups of the graph blocks' convolutions (gtad)", memory=True)] = 32
    inner_bins: Annotated[int, Setting("samples of features inside a proposal", memory=True)] = 32
    context_bins: Annotated[int, Setting("samples of its neighbours' features (gtad)", memory=True)] = 4
    map_channels: Annotated[int, Setting("channels of a proposal, 4 or more", memory=True)] = 512
    max_duration: Annotated[
        int | None,
        Setting("longest proposal, in snippets of the full grid", "SNIPPETS", unset="as the window", memory=True),
    ] = None
    middle_kernel: Annotated[
        Literal[1, 3], Setting("size of the middle convolutions over (duration, start) (gtad; 3 in bmn)", memory=True)
    ] = 1
    class_bins: Annotated[int, Setting("samples of features for the class of a proposal", memory=True)] = 8
    positive_iou: Annotated[
        float, Setting("tIoU from which a proposal counts as positive for the classification map")
    ] = 0.9
    regression_loss: Annotated[float, Setting("weight of the loss of a proposal's tIoU", zero=True)] = 10.0
    confidence_loss: Annotated[
        float, Setting("weight of the loss of whether a proposal is one, by its tIoU", zero=True)
    ] = 1.0
    sample_zero_iou: Annotated[
        bool, Setting("draw low cells from [0, 0.3], and not from (0, 0.3] as upstream does")
    ] = False
    dropout: Annotated[float, Setting("share of the feature values that training sets to zero", zero=True, below=1)] = (
        0.0
    )

    def longest(self, num_snippets: int, full_snippets: int) -> int:
        """D, the number of durations at a rung of `num_snippets`: the full grid's limit, shrunk with L so that it stays
        the same number of seconds.
        """
        if self.max_duration is None:
            return num_snippets
        return max(1, math.ceil(self.max_duration * num_snippets / full_snippets))


@dataclass(frozen=True)
class BMNConfig:
    """What BMN has beyond `HeadConfig`. The defaults are those of its authors' code."""

    samples: Annotated[int, Setting("places whose features are the mean of one sample of a proposal", memory=True)] = 3
    definition: Annotated[
        Literal["released", "paper"],
        Setting(
            "where a proposal is sampled, and which proposals are neighbours: as in the authors' code since 2020, or "
            "as in the paper",
            memory=True,
        ),
    ] = "released"  # fmt: skip


@dataclass(frozen=True)
class ActionFormerConfig:
    """ActionFormer. The defaults are those of its published code."""

    hidden: Annotated[int, Setting("channels, a multiple of the attention heads", memory=True)] = 512
    attention_heads: Annotated[int, Setting("heads of the attention", memory=True)] = 4
    attention_window: Annotated[
        int, Setting("positions that one attends to, itself in the middle; 1: all of them", memory=True)
    ] = 19
    levels: Annotated[int, Setting("levels of the pyramid, each at half the rate of the one before", memory=True)] = 6
    stem_blocks: Annotated[int, Setting("transformer blocks before the second level", memory=True)] = 2
    drop_path: Annotated[
        float, Setting("how often training leaves a residual branch out of a window", zero=True, below=1)
    ] = 0.1
    center_radius: Annotated[
        float, Setting("how far from a segment's centre positions learn it, in steps of their level")
    ] = 1.5
    regression_loss: Annotated[float, Setting("weight of the loss of the distances to start and end", zero=True)] = 1.0
    label_smoothing: Annotated[
        float, Setting("share of a label that is spread over all classes and none of them", zero=True, below=1)
    ] = 0.0


@dataclass(frozen=True)
class SpottingConfig:
    """Spotting of points in time. The defaults are those of E2E-Spot's published code."""

    hidden: Annotated[
        int | None,
        Setting(
            "channels of the recurrent network in each direction", "N", unset="as the features, 768 at most",
            memory=True,
        ),
    ] = None  # fmt: skip
    layers: Annotated[int, Setting("layers of the recurrent network", memory=True)] = 1
    dropout: Annotated[
        float, Setting("share of the recurrent network's output that training sets to zero", zero=True, below=1)
    ] = 0.5
    dilation: Annotated[int, Setting("snippets on either side of a point's own that are taught it too", zero=True)] = 0
    point_weight: Annotated[float, Setting("weight of a snippet with a point in the loss; one without has 1")] = 5.0
    suppression: Annotated[
        float, Setting("of points of one label that are as near to each other, the best is kept", "SECONDS", zero=True)
    ] = 1.0


@dataclass(frozen=True)
class StageConfig:
    epochs: Annotated[int, Setting("passes over the training videos", zero=True, may_change=True)]
    batch: Annotated[int, Setting("samples of one step: clips in pretrain, windows of videos elsewhere")]
    optimizer: Annotated[Literal["sgd", "adam", "adamw"], Setting("what updates the weights")]
    lr: Annotated[float, Setting("learning rate at the start", "LR")]
    weight_decay: Annotated[float, Setting("weight decay", zero=True)] = 1e-4
    momentum: Annotated[float, Setting("momentum of SGD; Adam has its own", zero=True, below=1)] = 0.0
    schedule: Annotated[
        Literal["step", "cosine"],
        Setting("learning rate over time: step by step down, or up at first and then down along a cosine"),
    ] = "step"
    warm_up: Annotated[
        float, Setting("share of the time in which the rate of the cosine schedule rises", zero=True, below=1)
    ] = 0.1
    decay_every: Annotated[int, Setting("length of a step of the schedule", "EPOCHS")] = 5
    decay: Annotated[float, Setting("factor of the learning rate at each step of the schedule")] = 0.5
    clip: Annotated[
        float | None, Setting("largest norm of all gradients together, beyond which they are scaled down", unset="any")
    ] = None
    class_loss: Annotated[float, Setting("weight of the class loss beside the head's own", zero=True)] = 1.0


@dataclass(frozen=True)
class HeadStageConfig(StageConfig):
    ema: Annotated[
        float | None,
        Setting(
            "decay, at each step, of a moving average of the head's weights that detects in their place: 0.999, say",
            "DECAY", unset="no average", below=1,
        ),
    ] = None  # fmt: skip


@dataclass(frozen=True)
class DetectConfig:
    tious: Annotated[
        str,
        Setting(
            "tIoUs of the mAP: activitynet, thumos, or like 0.3:0.1:0.7", "SPEC", flag="--tiou", may_change=True
        ),
    ] = "activitynet"  # fmt: skip
    tolerances: Annotated[
        str,
        Setting(
            "how far a point may be from a true one for the mAP of --head spotting: seconds like 0.5,1,2 or 1:1:5, "
            "SoccerNet's tight or loose, or frames like 1f,2f with --fps",
            "SPEC", flag="--tolerance", may_change=True,
        ),
    ] = "0.5,1,2"  # fmt: skip
    sigma: Annotated[float, Setting("width of soft-NMS, in tIoU", flag="--sigma")] = 0.84
    voting: Annotated[
        float | None,
        Setting(
            "candidates of its class of this tIoU or more with a detection vote on where it starts and ends, by score "
            "and tIoU",
            "TIOU", unset="no voting", most=1,
        ),
    ] = None  # fmt: skip
    top_k: Annotated[
        int | None,
        Setting(
            "most detections of a video", "N", flag="--top-k", unset="200, and 20 more for each window after the first"
        ),
    ] = 100  # fmt: skip
    labels_per_proposal: Annotated[
        int | None,
        Setting(
            "labels that one proposal is given, the likeliest", "N",
            unset="2, and up to 10 where further ones are more likely than not",
        ),
    ] = None  # fmt: skip


PresetName = Literal[
    "demo", "small", "activitynet", "hacs", "thumos", "bmn_anet", "actionformer_thumos", "actionformer_anet"
]


@dataclass(frozen=True)
class Config:
    """All settings of a run. `to_json` and `from_json` are config.json's form."""

    preset: Annotated[
        PresetName,
        Setting(
            "whole settings by name, which other flags change; with --annotations: small, or on a GPU activitynet "
            "where --encoder-weights are given or the videos are many",
            group=JOB,
        ),
    ]  # fmt: skip
    full: Annotated[
        Fidelity,
        Setting(
            "full fidelity: snippets x pixels", "LxS", flag="--fidelity", group=FIDELITY, memory=True,
            parse=parse_fidelity, show=lambda full: f"{full.num_snippets}x{full.side}",
        ),
    ]  # fmt: skip
    data: Annotated[DataConfig, Section("data")]
    encoder: Annotated[EncoderConfig, Section(FIDELITY)]
    head: Annotated[HeadConfig, Section("head, and G-TAD and BMN")]
    pretrain: Annotated[
        StageConfig, Section("pretrain stage", flags={"epochs": "--pretrain-epochs", "lr": "--pretrain-lr"})
    ]
    joint: Annotated[
        StageConfig,
        Section(
            "joint stage", flags={"epochs": "--joint-epochs", "lr": "--joint-lr", "batch": "--batch"},
            memory=frozenset({"batch", "optimizer", "momentum"}),
        ),
    ]  # fmt: skip
    head_stage: Annotated[HeadStageConfig, Section("head stage", flags={"epochs": "--head-epochs", "lr": "--head-lr"})]
    detect: Annotated[DetectConfig, Section("detection")]
    bmn: Annotated[BMNConfig, Section("BMN alone")] = BMNConfig()
    actionformer: Annotated[ActionFormerConfig, Section("ActionFormer")] = ActionFormerConfig()
    spotting: Annotated[SpottingConfig, Section("spotting of points in time")] = SpottingConfig()
    stages: Annotated[
        tuple[Stage, ...],
        Setting(
            f"which of {','.join(STAGES)} to run", "A,B", group=JOB, parse=parse_stages,
            show=",".join, may_change=True,
        ),
    ] = STAGES  # fmt: skip
    pattern: Annotated[Pattern, Setting("where LoFi cuts", group=FIDELITY)] = Pattern.CYCLIC
    short_cycle: Annotated[
        int | None,
        Setting("cyclic: switch the pattern every N steps", group=FIDELITY, unset="every epoch"),
    ] = None
    min_cut: Annotated[
        float,
        Setting(
            "never train above 1/K of full fidelity", "K", group=FIDELITY, planned_for=True,
            show="{:g}".format,
        ),
    ] = 1.0  # fmt: skip
    max_cut: Annotated[
        float,
        Setting("never train below 1/K of it", "K", group=FIDELITY, planned_for=True, show="{:g}".format),
    ] = MAX_CUT
    cut: Annotated[
        float | None,
        Setting(
            "train at 1/K of it: short for --min-cut K --max-cut K", "K", group=FIDELITY, planned_for=True,
            unset="between those two", show="{:g}".format,
        ),
    ] = None  # fmt: skip
    epoch_time: Annotated[
        float | None,
        Setting(
            "how long an epoch of the joint stage may take, like 30min: lowers the fidelity as a short budget does",
            "TIME", group=FIDELITY, parse=parse_time, show=show_time, unset="as long as it takes", planned_for=True,
        ),
    ] = None  # fmt: skip
    micro_batch: Annotated[
        int | None,
        Setting(
            "videos of a joint step in memory at once; the loss is the same", "B", group=MEMORY,
            unset="all, or fewer where a higher fidelity fits by it", planned_for=True,
        ),
    ] = None  # fmt: skip
    recompute: Annotated[
        Recompute,
        Setting(
            "run the encoder forward a second time instead of keeping its activations; auto: where a higher fidelity "
            "fits by it",
            group=MEMORY, planned_for=True,
        ),
    ] = "auto"  # fmt: skip
    kept_maps: Annotated[
        KeptMaps,
        Setting(
            "how the encoder's activations wait for backward: exact, or in 8bit: less memory, gradients rounded by "
            "some 1e-3",
            group=MEMORY, memory=True,
        ),
    ] = "exact"  # fmt: skip
    replay: Annotated[
        str | None,
        Setting(
            "take the rungs of every joint step from the log.jsonl of another run", "FILE", flag="--replay-rungs",
            group=MEMORY, unset="planned", planned_for=True,
        ),
    ] = None  # fmt: skip
    budget: Annotated[
        Budget,
        Setting(
            HELD, "11GB", flag="--mem-budget", group=JOB, parse=Budget.parse, show=lambda budget: budget.text,
            planned_for=True,
        ),
    ] = field(default_factory=lambda: Budget.parse("auto"))  # fmt: skip
    precision: Annotated[
        PrecisionName,
        Setting(
            "what matrices are multiplied in; auto: bf16 where the GPU or AMX multiplies it, else fp16 on a GPU and "
            "fp32 on a CPU; a resumed run keeps its own",
            group=TRAINING, may_change=True,
        ),
    ] = "auto"  # fmt: skip
    optimizer_impl: Annotated[
        OptimizerImpl,
        Setting(
            "whose kernels update the weights: NVIDIA's apex, torch's, or auto: apex where it is built",
            group=TRAINING, may_change=True,
        ),
    ] = "auto"  # fmt: skip
    out: Annotated[
        str,
        Setting("run folder", "DIR", group=JOB, unset="runs/<preset>, numbered when taken", may_change=True),
    ] = ""
    seed: Annotated[int, Setting("where all that is random starts from", group=TRAINING, zero=True, most=math.inf)] = 0
    device: Annotated[Device, Setting("where to compute", group=TRAINING, may_change=True)] = "auto"
    threads: Annotated[
        int | None,
        Setting("CPU threads", group=TRAINING, unset="all cores", may_change=True),
    ] = None
    tensorboard: Annotated[
        bool,
        Setting(
            "write the curves for TensorBoard too, into tensorboard/ of the run folder", group=JOB, may_change=True
        ),
    ] = False

    @property
    def points(self) -> bool:
        """Whether points in time are what is looked for, and not segments."""
        return self.head.name == "spotting"

    def to_json(self) -> str:
        return json.dumps({VERSION: __version__} | msgspec.to_builtins(self), indent=1)

    @staticmethod
    def from_json(text: str | bytes, where: str) -> Config:
        """Raises InputError, which begins with `where` (a file's name), for what `to_json` of this version did not
        write: another version's config, a setting that is unknown or lacks, a value that cannot be.
        """
        try:
            content = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise InputError(f"{where}: not readable as JSON ({error})") from None
        if not isinstance(content, dict):
            raise InputError(f"{where}: not the settings of a run")
        if VERSION not in content:
            raise InputError(
                f"{where}: written by a version of lofi_fast before {__version__}, whose runs this one cannot go on "
                "with or load; train again, or use the version that it was made with"
            )
        del content[VERSION]
        return made(Config, read(Config, content, f"{where}: "), f"{where}: ")

    @staticmethod
    def read(path: Path) -> Config:
        """The config of a run from its config.json; see `from_json`."""
        try:
            text = path.read_bytes()
        except OSError as error:
            raise InputError(f"{path}: cannot be read ({error.strerror}); name the folder of a run") from None
        return Config.from_json(text, str(path))


# Between a run and its --resume: what asks for new plans, and all that may change.
PLANNED_FOR = tuple(leaf.name for leaf in leaves(Config) if leaf.setting.planned_for)
MAY_CHANGE = tuple(leaf.name for leaf in leaves(Config) if leaf.may_change)


def memory_settings(config: Config) -> dict[str, Any]:
    """The settings that readings of memory depend on, by name: readings taken at other values do not hold."""
    return {leaf.name: msgspec.to_builtins(leaf.of(config)) for leaf in leaves(Config) if leaf.memory}

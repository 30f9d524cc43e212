"""Presets: whole settings by name, as functions; and `configured`, which makes the config of a run: a preset, then a
file of settings, then what flags or keywords say.
"""

from __future__ import annotations

import json
import math
import os
from codecs import BOM_UTF8
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import msgspec

from lofi_fast.config import (
    JOB,
    ActionFormerConfig,
    Config,
    DataConfig,
    DetectConfig,
    EncoderConfig,
    HeadConfig,
    HeadName,
    HeadStageConfig,
    PresetName,
    StageConfig,
)
from lofi_fast.data.annotations import FormatOptions, num_videos
from lofi_fast.errors import InputError
from lofi_fast.fidelity import Fidelity, Pattern
from lofi_fast.settings import Setting, applied, leaves, read
from lofi_fast.texts import once_each


def activitynet() -> Config:
    """The paper's setting for ActivityNet-1.3 and HACS-1.1: whole videos, 100 x 224 px, batch 16.

    The joint stage is SGD without momentum, as the paper says. Pretraining, left open there, has the usual 0.9.
    """
    return Config(
        preset="activitynet",
        full=Fidelity(100, 224),
        data=DataConfig(),
        encoder=EncoderConfig(),
        head=HeadConfig(),
        pretrain=StageConfig(epochs=10, batch=64, optimizer="sgd", lr=0.01, momentum=0.9, decay_every=4, decay=0.1),
        joint=StageConfig(epochs=15, batch=16, optimizer="sgd", lr=0.1, class_loss=0.0),
        head_stage=HeadStageConfig(epochs=10, batch=16, optimizer="adam", lr=1e-3, decay_every=5, decay=0.1),
        detect=DetectConfig(),
    )


def hacs() -> Config:
    """HACS-1.1 segments: ActivityNet's setting, as in the paper."""
    return replace(activitynet(), preset="hacs")


def thumos() -> Config:
    """THUMOS14, by G-TAD's configuration for it (frostinassiky/gtad): windows of 256 snippets (one every 5 frames at
    30 fps), actions up to 64 snippets, 16 + 16 bins, 3x3 middle convolutions; a head stage in batches of 8 at a
    learning rate of 4e-5, the loss of confidence weighted 10 and that of regression 1, soft-NMS of sigma 0.46; and
    gradients clipped to a norm of 1, as OpenTAD does.

    Not G-TAD's: training windows are all that there are, not only those that hold nine tenths of an action; proposals
    lie between peaks of the boundary probabilities; features are our encoder's, and classes our own head's unless
    --video-scores are given.
    """
    base = activitynet()
    return replace(
        base,
        preset="thumos",
        full=Fidelity(256, 112),
        data=DataConfig(window=256 * 5 / 30, frame_stride=1),
        head=HeadConfig(
            inner_bins=16, context_bins=16, max_duration=64, middle_kernel=3, regression_loss=1.0, confidence_loss=10.0
        ),
        head_stage=replace(base.head_stage, batch=8, lr=4e-5, clip=1.0),
        detect=DetectConfig(tious="thumos", top_k=None, sigma=0.46),
    )


def bmn_anet() -> Config:
    """ActivityNet-1.3 with BMN: the head, rates, batch and epochs of its authors' code (JJBOY/BMN-Boundary-Matching-
    Network), on the whole videos of `activitynet`.

    Not its own: proposals lie between peaks of the boundary probabilities, as in the paper; soft-NMS has one width for
    all lengths and no threshold below which a proposal keeps its score.
    """
    base = activitynet()
    return replace(
        base,
        preset="bmn_anet",
        head=HeadConfig(name="bmn"),
        head_stage=HeadStageConfig(
            epochs=9, batch=16, optimizer="adam", lr=1e-3, weight_decay=1e-4, decay_every=7, decay=0.1
        ),
        detect=DetectConfig(sigma=0.4),
    )


def actionformer_thumos() -> Config:
    """THUMOS14 with ActionFormer: the head, rates, batch and soft-NMS of its configuration for it (happyharrycn/
    actionformer_release, thumos_i3d.yaml), on the windows of `thumos`.

    Not its own: windows of 43 seconds and 256 snippets instead of 307 seconds and 2,304, since the encoder learns too.
    """
    base = thumos()
    return replace(
        base,
        preset="actionformer_thumos",
        head=HeadConfig(name="actionformer"),
        joint=replace(base.joint, class_loss=1.0),
        head_stage=HeadStageConfig(
            epochs=35,
            batch=2,
            optimizer="adamw",
            lr=1e-4,
            weight_decay=0.05,
            schedule="cosine",
            warm_up=5 / 35,
            clip=1.0,
            ema=0.999,
        ),
        detect=DetectConfig(tious="thumos", top_k=200, sigma=0.5),
    )


def actionformer_anet() -> Config:
    """ActivityNet-1.3 with ActionFormer: the head, rates, batch and soft-NMS of its configuration (anet_tsp.yaml), on
    the whole videos of `activitynet`, 100 snippets instead of 192.

    Not its own: classes are told by the head, where it takes them from a classifier of whole videos (--video-scores
    FILE gives such), and soft-NMS and voting are within a class; no embedding of absolute positions.
    """
    base = activitynet()
    return replace(
        base,
        preset="actionformer_anet",
        head=HeadConfig(name="actionformer"),
        actionformer=ActionFormerConfig(hidden=256, attention_window=7, regression_loss=2.0, label_smoothing=0.1),
        joint=replace(base.joint, class_loss=1.0),
        head_stage=HeadStageConfig(
            epochs=15,
            batch=16,
            optimizer="adamw",
            lr=1e-3,
            weight_decay=0.05,
            schedule="cosine",
            warm_up=5 / 15,
            clip=1.0,
            ema=0.999,
        ),
        detect=DetectConfig(top_k=100, sigma=0.75, voting=0.9),
    )


def small() -> Config:
    """A few videos, no pre-trained weights, a CPU or a small GPU: a narrow encoder learned from scratch."""
    return Config(
        preset="small",
        full=Fidelity(64, 96),
        data=DataConfig(window="labels", frame_stride=2, resize="squash", jitter=0.1),
        encoder=EncoderConfig(width=32),
        head=HeadConfig(
            hidden=128, groups=16, inner_bins=16, map_channels=256, positive_iou=0.7, sample_zero_iou=True, dropout=0.3
        ),
        pretrain=StageConfig(epochs=12, batch=16, optimizer="adamw", lr=2e-3, weight_decay=0.02, schedule="cosine"),
        joint=StageConfig(epochs=6, batch=2, optimizer="adamw", lr=5e-4, weight_decay=0.02, schedule="cosine"),
        head_stage=HeadStageConfig(
            epochs=40, batch=8, optimizer="adamw", lr=1e-3, weight_decay=0.02, schedule="cosine"
        ),
        detect=DetectConfig(tious="thumos", top_k=None),
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
        min_cut=4.0,
    )


PRESETS: dict[PresetName, Callable[[], Config]] = {
    "demo": demo,
    "small": small,
    "activitynet": activitynet,
    "hacs": hacs,
    "thumos": thumos,
    "bmn_anet": bmn_anet,
    "actionformer_thumos": actionformer_thumos,
    "actionformer_anet": actionformer_anet,
}


def preset(name: PresetName, head: HeadName | None = None) -> Config:
    """The settings of a preset, with `head` in place of its own.

    Learned from scratch on a few videos, ActionFormer is small and takes gentler joint steps than G-TAD: at G-TAD's
    rate and without clipping the features of a run can collapse (docs/heads-and-encoders.md).
    """
    config = PRESETS[name]()
    if head is None or head == config.head.name:
        return config
    config = replace(config, head=replace(config.head, name=head))
    if head != "actionformer" or name in OF_PRETRAINED:
        return config
    return replace(
        config,
        actionformer=ActionFormerConfig(hidden=128, levels=4, attention_window=9),
        joint=replace(config.joint, lr=2e-4, clip=1.0),
        head_stage=replace(config.head_stage, clip=1.0),
    )


MOST_PROPOSALS = 2**24  # of a window: at 512 channels and 4 bytes they alone are 34 GB
MOST_LEVELS, MOST_POSITIONS = 12, 2**16  # of ActionFormer's pyramid; of a head that answers at every snippet
OF_GTAD_ALONE = ("head.groups", "head.context_bins", "head.middle_kernel")  # settings that BMN does not share
OF_SEGMENTS = (  # settings that points in time have no use for
    "data.video_scores", "detect.tious", "detect.sigma", "detect.voting", "detect.labels_per_proposal",
)  # fmt: skip
MANY_VIDEOS = 2000  # from which on own data are a large set, for which the paper's recipe is meant

# Presets whose rates and epochs are for a pre-trained encoder.
OF_PRETRAINED = ("activitynet", "hacs", "thumos", "bmn_anet", "actionformer_thumos", "actionformer_anet")


def weights_warning(config: Config) -> str | None:
    """What there is to warn of where a preset meant for a pre-trained encoder starts from random weights."""
    if config.preset not in OF_PRETRAINED or config.encoder.weights:
        return None
    return (
        f"WARNING: --preset {config.preset} is a recipe for an encoder pre-trained on a large set of videos, such as "
        "Kinetics-400, and this run starts from random weights: expect a far lower mAP. Give "
        "--encoder-weights FILE, or use --preset small, whose recipe learns from scratch"
    )


def unread_settings(config: Config) -> list[str]:
    """Sentences on what was changed from the preset and the chosen head does not read."""
    chosen = config.head.name
    before = preset(config.preset, chosen)
    changed = [leaf for leaf in leaves(Config) if leaf.of(config) != leaf.of(before)]
    return [
        f"{leaf.flag} {leaf.text(leaf.of(config))} is not used: it goes with --head {' and '.join(readers)}, not with "
        f"{chosen}"
        for leaf in changed
        if chosen not in (readers := _readers(leaf.name))
    ]


def _readers(name: str) -> tuple[HeadName, ...]:
    """The heads that read a setting, by its name."""
    section, _, last = name.partition(".")
    if section in get_args(HeadName):
        return tuple(head for head in get_args(HeadName) if head == section)
    if name == "detect.tolerances":
        return ("spotting",)
    if name in OF_SEGMENTS:
        return tuple(head for head in get_args(HeadName) if head != "spotting")
    if section != "head" or last in ("name", "dropout"):
        return get_args(HeadName)
    return ("gtad",) if name in OF_GTAD_ALONE else ("gtad", "bmn")


FILE = Setting(  # --config of every command that takes the settings of a run
    "settings in TOML or JSON, by the flags' names; flags go before them", "FILE", group=JOB, unset="none"
)


def configured(
    words: Mapping[str, Any],
    *,
    file: Path | None = None,
    base: Config | None = None,
    cuda: Callable[[], bool],
    with_data: bool = True,
) -> Config:
    """The config of a run out of `words` (flags or keywords, see settings.py), which go before those of a `file` of
    settings (TOML or JSON), which go before the preset's, or those of a whole config `base` in its place.

    `cuda` says whether a GPU is at hand; it is asked where the default preset depends on it. Without data any preset
    goes, and the paper's is the default. Raises InputError, with a sentence that names the flag or the file.
    """
    asked = {} if file is None else read(Config, file_of_settings(file), f"{file}: ")
    asked |= read(Config, words)
    if base is not None and asked.get("preset", base.preset) != base.preset:
        raise InputError(f"--preset {asked['preset']}: the settings given are a whole config, of {base.preset}")
    config = applied(base or preset(chosen_preset(asked, cuda, with_data), asked.get("head.name")), asked)
    if config.cut is not None:
        if clash := [flag for name, flag in (("min_cut", "--min-cut"), ("max_cut", "--max-cut")) if name in asked]:
            raise InputError(f"--cut {config.cut:g} goes without {clash[0]}: it sets both bounds")
        config = replace(config, min_cut=config.cut, max_cut=config.cut, cut=None)
    elif "max_cut" not in asked:
        config = replace(config, max_cut=max(config.max_cut, config.min_cut))
    cores = os.cpu_count() or 1
    if config.threads is not None and config.threads > cores:
        raise InputError(
            f"--threads {config.threads}: this machine has {cores} cores; more threads than that only wait"
        )
    if config.short_cycle and config.pattern is not Pattern.CYCLIC:
        raise InputError(f"--short-cycle {config.short_cycle} goes with --pattern cyclic, not {config.pattern}")
    if not 1 <= config.min_cut <= config.max_cut <= 64:
        raise InputError(f"--min-cut {config.min_cut:g} --max-cut {config.max_cut:g}: need 1 <= min <= max <= 64")
    _check_encoder(config)
    checks = {"gtad": _check_gtad, "bmn": _check_bmn, "actionformer": _check_actionformer, "spotting": _check_length}
    checks[config.head.name](config)
    return config


def _check_encoder(config: Config) -> None:
    encoder = config.encoder
    if encoder.train != "all" and encoder.name != "vit_b16":
        raise InputError(f"--encoder.train {encoder.train}: {encoder.name} learns as a whole; use --encoder vit_b16")
    if encoder.name.startswith("tsm_"):
        return
    if config.kept_maps == "8bit":
        raise InputError(f"--kept-maps 8bit: {encoder.name} cannot keep its activations in 8 bits; use exact")
    if encoder.name == "r2plus1d_18" and encoder.width < 2:
        raise InputError(f"--width {encoder.width}: {encoder.name} needs 2 channels or more")


def _check_gtad(config: Config) -> None:
    head = config.head
    if head.hidden % math.lcm(4, 2 * head.groups):
        raise InputError(
            f"--head.hidden {head.hidden} --head.groups {head.groups}: the channels must be a multiple of 4 and of "
            "twice the groups"
        )
    _check_map(config)


def _check_bmn(config: Config) -> None:
    if config.head.hidden % 4:
        raise InputError(f"--head.hidden {config.head.hidden}: the channels must be a multiple of 4")
    _check_map(config)


def _check_map(config: Config) -> None:
    """Of a head that scores every (start, duration)."""
    head = config.head
    proposals = config.full.num_snippets * min(head.max_duration or config.full.num_snippets, config.full.num_snippets)
    if proposals > MOST_PROPOSALS:
        raise InputError(
            f"--fidelity {config.full.num_snippets}x{config.full.side}: {proposals:,} proposals in every window are "
            "more than any machine scores; give fewer snippets, or a --head.max-duration"
        )
    if head.map_channels < 4:
        raise InputError(f"--head.map-channels {head.map_channels}: must be 4 or more")


def _check_actionformer(config: Config) -> None:
    head = config.actionformer
    if head.hidden % head.attention_heads:
        raise InputError(
            f"--actionformer.hidden {head.hidden} --actionformer.attention-heads {head.attention_heads}: the channels "
            "must be a multiple of the heads"
        )
    if head.levels > MOST_LEVELS:
        raise InputError(f"--actionformer.levels {head.levels}: {MOST_LEVELS} at most")
    _check_length(config)


def _check_length(config: Config) -> None:
    """Of a head that answers at every snippet."""
    if config.full.num_snippets > MOST_POSITIONS:
        raise InputError(
            f"--fidelity {config.full.num_snippets}x{config.full.side}: more snippets than any machine trains on; give "
            f"{MOST_POSITIONS:,} at most"
        )


def chosen_preset(asked: Mapping[str, Any], cuda: Callable[[], bool], with_data: bool = True) -> PresetName:
    """The preset that was asked for, or the default of what data there is. Raises InputError where they do not agree.

    `asked`: values by name, as `settings.read` gives them.
    """
    annotations, videos = asked.get("data.annotations"), asked.get("data.videos")
    if videos and not annotations:
        raise InputError("--videos is given without --annotations: name the file of labels too")
    if annotations and not videos and with_data:
        raise InputError("--annotations is given without --videos: name the folder of the videos too")
    named: PresetName | None = asked.get("preset")
    if named is None and annotations:
        return _of_own_data(asked, cuda)[0]
    named = named or ("demo" if with_data else "activitynet")
    if named != "demo" and not annotations and with_data:
        raise InputError(f"--preset {named} needs your data: add --annotations FILE --videos DIR")
    return named


def _options(asked: Mapping[str, Any]) -> FormatOptions:
    """How the labels are to be read."""
    named = {name: asked[f"data.{name}"] for name in ("fps", "label", "tiers", "videos") if f"data.{name}" in asked}
    return FormatOptions.of(DataConfig(**named))


def _of_own_data(asked: Mapping[str, Any], cuda: Callable[[], bool]) -> tuple[PresetName, str]:
    """(the default preset of own data, why that)."""
    weights = asked.get("encoder.weights")
    count = 0 if weights else num_videos(Path(asked["data.annotations"]), _options(asked))
    if not weights and count < MANY_VIDEOS:
        return "small", (
            f"which learns from scratch, since no --encoder-weights are given and fewer than {MANY_VIDEOS} videos are "
            "labelled"
        )
    why = f"--encoder-weights {weights} are given" if weights else f"{count} videos are labelled"
    if asked.get("device") == "cpu" or not cuda():
        return "small", f"since this is a CPU, although {why}"
    return "activitynet", f"since {why}"


def preset_note(words: Mapping[str, Any], file: Path | None, config: Config) -> list[str]:
    """A sentence on which preset own data were given, and why; none where it was asked for. `words` and `file` as
    `configured` made `config` from them.
    """
    asked = {} if file is None else read(Config, file_of_settings(file), f"{file}: ")
    asked |= read(Config, words)
    if "preset" in asked or not asked.get("data.annotations"):
        return []
    why = _of_own_data(asked, lambda: config.preset == "activitynet")[1]
    return [f"preset {config.preset}, {why}; --preset names another"]


def shown_defaults(words: Mapping[str, Any], default: PresetName) -> Config:
    """The settings that --help shows as defaults: of the preset, head and file that the same command line names."""
    file = words.get("config")
    asked = read(Config, file_of_settings(Path(file)), f"{file}: ") if file else {}
    asked |= read(Config, {name: words[name] for name in ("preset", "head.name") if name in words})
    return applied(preset(asked.get("preset", default), asked.get("head.name")), asked)


def file_of_settings(path: Path) -> Mapping[str, Any]:
    """What a file of settings says. Raises InputError for one that cannot be read."""
    kind = path.suffix.lower()
    if kind not in (".toml", ".json"):
        raise InputError(f"--config {path}: a file of settings is TOML or JSON, and its name says which")
    try:
        text = path.read_bytes().removeprefix(BOM_UTF8)
        content = msgspec.toml.decode(text) if kind == ".toml" else msgspec.json.decode(text)
        if kind == ".json":  # of which the last of two equal keys would count; TOML allows none
            json.loads(text, object_pairs_hook=once_each(path))
    except InputError as error:
        raise InputError(f"--config {error}") from None
    except OSError as error:
        raise InputError(f"--config {path}: cannot be read ({error.strerror})") from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"--config {path}: not readable as {kind[1:].upper()} ({error})") from None
    if not isinstance(content, dict):
        raise InputError(f"--config {path}: not settings by name")
    return content

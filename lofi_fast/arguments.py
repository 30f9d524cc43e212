"""The flags of the main job."""

from __future__ import annotations

import argparse
import math
import os
import re
import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NoReturn, get_args

from lofi_fast.budget import Budget
from lofi_fast.config import STAGES, Config, EncoderName, KeptMaps, OptimizerImpl, Policy, Recompute, Stage, StageConfig
from lofi_fast.errors import InputError
from lofi_fast.fidelity import MAX_CUT, MIN_SIDE, Fidelity, Pattern
from lofi_fast.presets import PRESETS


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

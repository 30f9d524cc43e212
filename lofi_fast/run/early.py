"""What settings and files show to be wrong before torch is imported, which takes seconds: refused at once.

The job checks all of it again where it uses it: this room only makes a sentence come sooner.
"""

from __future__ import annotations

import os
from itertools import islice
from pathlib import Path

from lofi_fast.budget import check_budget
from lofi_fast.config import Config
from lofi_fast.data.annotations import FormatOptions, load_annotations, require_text
from lofi_fast.data.matching import list_folder
from lofi_fast.errors import InputError
from lofi_fast.memory.replay import Replay
from lofi_fast.metrics import parse_tiou
from lofi_fast.point_metrics import parse_tolerance
from lofi_fast.presets import weights_warning
from lofi_fast.run.folder import require_run

# Labels that are read in less time than torch takes to import; more wait for the job, which reads them again.
QUICKLY_READ = 1_000_000  # bytes of a file
QUICKLY_LISTED = 100  # files in a folder


def check_early(config: Config, resume: bool) -> None:
    """Raises InputError for settings, labels, videos, or a run to resume, with which no training can start."""
    if resume and config.out:
        require_run(Path(config.out))
    check_budget(config.budget)
    check_values(config)
    if config.replay and not resume and "joint" in config.stages and config.joint.epochs:
        Replay(Path(config.replay), 0)  # a resumed run may be past the steps that it is for
    if config.data.annotations and config.data.videos and not weights_warning(config):  # which is said before all else
        labels, videos = Path(config.data.annotations), Path(config.data.videos)
        list_folder(videos, "--videos ")
        if labels.is_file() and labels.stat().st_size > QUICKLY_READ:
            require_text(labels)
        elif len(list(islice(labels.rglob("*"), QUICKLY_LISTED + 1))) <= QUICKLY_LISTED:
            load_annotations(labels, clip=False, options=FormatOptions.of(config.data))


def check_values(config: Config) -> None:
    """Raises InputError for what would otherwise be found wrong only after hours of decoding or training."""
    parse_tiou(config.detect.tious)
    if config.points:
        parse_tolerance(config.detect.tolerances, config.data.fps)
    epochs = {"pretrain": config.pretrain.epochs, "joint": config.joint.epochs, "head": config.head_stage.epochs}
    asked = {stage: epochs[stage] for stage in config.stages if stage in epochs}
    if len(asked) > 1 and not any(asked.values()):  # of one stage alone, no epochs plan it
        flags = " ".join(f"--{stage}-epochs 0" for stage in asked)
        raise InputError(f"{flags}: nothing would be trained; give one of them 1 or more, or leave it out")
    for flag, name in (("--encoder-weights", config.encoder.weights), ("--video-scores", config.data.video_scores)):
        if name and not os.path.isfile(name):
            raise InputError(f"{flag} {name}: no such file")

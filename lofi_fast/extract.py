"""The command `extract`: features of videos by the encoder of a trained detector, for heads of other programs.

    lofi-fast extract runs/x videos/ --out features/
    lofi-fast extract runs/x videos/ --out features/ --layout actionformer --annotations a.json

Features of a video are a regular series: feature i is centred on (i + 0.5) * stride seconds of a player's clock. OUT
gets a file for each video, index.jsonl with what each file holds, features.json with how they were made, and for
another program's layout its annotations and a piece of its configuration. The same command goes on where it was ended.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np

from lofi_fast import __version__
from lofi_fast.budget import Budget, check_budget
from lofi_fast.command import INTERRUPTED, parse, run
from lofi_fast.config import MemBudget, PrecisionName
from lofi_fast.data.exchange import LAYOUTS, Layout, labels_for, write_layout
from lofi_fast.data.formats.file import plural
from lofi_fast.data.given import paths_of, unique_names
from lofi_fast.data.video import VideoError
from lofi_fast.errors import InputError
from lofi_fast.fidelity import FRAMES_PER_SNIPPET
from lofi_fast.files import check_output, replacing, sha256_of, write_json
from lofi_fast.model_file import metadata_of, model_file
from lofi_fast.settings import Setting

if TYPE_CHECKING:
    from lofi_fast.model import Detector, Session
    from lofi_fast.run.log import Terminal

DESCRIPTION = (
    "Write the features that a trained encoder makes of videos, at regular times, for heads of other programs. "
    "--layout writes them as OpenTAD, ActionFormer or mmaction2 load them, with the annotations in their form and a "
    "piece of configuration."
)
Form = Literal["npy", "npz", "h5", "pt", "csv"]
INDEX, MADE = "index.jsonl", "features.json"
PARTS = "parts"  # of features that are put into one file at the end
HDF5 = "features.hdf5"


@dataclass(frozen=True)
class ExtractFlags:
    run: Annotated[Path, Setting("folder of a finished run, or its model.safetensors", "RUN", positional=True)]
    videos: Annotated[
        tuple[str, ...], Setting("files, and folders that are searched for videos", "VIDEO|FOLDER", positional=True)
    ]
    out: Annotated[Path, Setting("folder for the features; one of another detector is refused", "DIR")]
    layout: Annotated[Layout, Setting("whose program loads them; plain: any")] = "plain"
    format: Annotated[
        Form | None,
        Setting(
            "npy, pt: an array (features, channels) for each video; npz: with the centres in seconds; h5: one file for "
            "all (needs h5py); csv: of mmaction2",
            unset="npy, or csv for mmaction2",
        ),
    ] = None
    length: Annotated[
        int | None,
        Setting("rescale each video to so many features", "N", unset="as they come; 100 for mmaction2"),
    ] = None
    annotations: Annotated[
        Path | None,
        Setting("labels of the videos, to be written in the layout's form", "FILE", unset="features alone"),
    ] = None
    mem_budget: MemBudget = field(default_factory=lambda: Budget.parse("auto"))
    device: Annotated[Literal["auto", "cuda", "cpu"], Setting("where to compute")] = "auto"
    precision: Annotated[
        PrecisionName | None,
        Setting("what matrices are multiplied in: auto, bf16, fp16 or fp32", unset="as the run was asked for"),
    ] = None
    threads: Annotated[int | None, Setting("CPU threads", unset="all cores")] = None

    @property
    def form(self) -> Form:
        """Raises InputError for a format that the layout's program does not load."""
        form = self.format or LAYOUTS[self.layout][0]
        if form not in LAYOUTS[self.layout]:
            raise InputError(
                f"--format {form}: {self.layout} does not load it; give --format {' or '.join(LAYOUTS[self.layout])}"
            )
        if form == "h5" and find_spec("h5py") is None:
            raise InputError('--format h5 needs the package h5py: pip install "lofi_fast[h5]", or give --format npy')
        return form  # type: ignore[return-value]  # one of a layout's

    @property
    def count(self) -> int | None:
        return self.length or (100 if self.layout == "mmaction2" else None)


@dataclass(frozen=True)
class Row:
    """What the index says of one video. Feature i is centred on first_centre + i * stride seconds, which is the middle
    of `frames` frames, frame_stride apart. fps: of the video. size, mtime_ns: of its file, by which another is noticed.
    bytes: of the file of features; None where it is of all videos, or a version of before wrote it.
    """

    video: str
    file: str
    source: str
    size: int
    mtime_ns: int
    duration: float
    fps: float
    features: int
    channels: int
    first_centre: float
    stride: float
    stride_frames: float
    frames: int
    frame_stride: int
    bytes: int | None = None


def main(argv: Sequence[str] | None = None, *, owns_process: bool = False) -> int:
    """0 when the features of all videos are there, 1 when some had to be skipped, 2 for what the user can mend or when
    none could be used, 130 when interrupted. `owns_process`: this Python was started for it.
    """
    return run(lambda: _command(list(sys.argv[1:] if argv is None else argv), owns_process))


def _command(argv: list[str], owns_process: bool) -> int:
    flags = parse(ExtractFlags, argv, prog="lofi-fast extract", description=DESCRIPTION)
    form = flags.form
    check_budget(flags.mem_budget)
    metadata_of(model_file(flags.run))  # before torch, which takes seconds to import
    paths = paths_of(flags.videos)
    names = unique_names(paths)
    if flags.layout != "plain" and flags.annotations is None:
        raise InputError(f"--layout {flags.layout} needs the labels too: add --annotations FILE")
    labels = None if flags.annotations is None else labels_for(flags.annotations, flags.videos, names)
    check_output(flags.out)
    if owns_process:
        from lofi_fast.memory.settle import settle_allocator

        settle_allocator("lofi_fast.extract", argv)
    import torch

    from lofi_fast.model import Detector
    from lofi_fast.run.log import Terminal

    if flags.threads:
        torch.set_num_threads(flags.threads)
    terminal = Terminal()
    detector = Detector.load(flags.run)
    index = _index(flags, form, detector, names)
    with detector.session(
        mem_budget=flags.mem_budget.text, device=flags.device, precision=flags.precision, say=terminal.say
    ) as session:
        skipped, interrupted = _extract(flags, form, names, index, session, terminal)
    rows = {name: index[name] for name in names.values() if name in index}
    if not interrupted:
        if form == "h5":
            _join(flags.out, _read_index(flags.out))
        if labels is not None:
            others = index.keys() - rows.keys()
            told = (
                f"{flags.out} holds features of {plural(len(others), 'video')} more, which the annotations written now "
                "leave out; name all videos in one command to have them in",
            )
            for sentence in (*labels.notes, *(told if others else ())):
                terminal.say(f"note: {sentence}")
            fixed = flags.count is not None or detector.config.data.window_seconds is None
            written = [asdict(row) for row in rows.values()]
            for sentence in write_layout(flags.layout, flags.out, form, written, labels, fixed):
                terminal.say(sentence)
    terminal.say(
        f"{'interrupted, the same command goes on; ' if interrupted else ''}features of {len(rows)} of {len(paths)} "
        f"videos are in {flags.out}{f', {skipped} skipped' if skipped else ''}"
    )
    return INTERRUPTED if interrupted else int(bool(skipped))


def _index(flags: ExtractFlags, form: Form, detector: Detector, names: Mapping[Path, str]) -> dict[str, Row]:
    """What is in OUT already. Raises InputError for features that were made otherwise, and for files that this command
    would overwrite.
    """
    out = flags.out
    config = detector.config
    made: dict[str, Any] = {
        "lofi_fast": __version__, "model": sha256_of(model_file(flags.run)),
        "run": str(flags.run), "encoder": config.encoder.name,
        "width": config.encoder.width, "window": config.data.window_seconds, "snippets": config.full.num_snippets,
        "side": config.full.side, "format": form, "length": flags.count,
    }  # fmt: skip
    if not (out / MADE).exists():
        there = [out / _file(form, name) for name in names.values()] + [out / INDEX, out / HDF5]
        if (taken := next((path for path in there if path.exists()), None)) is not None:
            raise InputError(f"{taken} is there already, and not by this command; name another folder with --out")
        write_json(out / MADE, made)
        return {}
    try:
        before = json.loads((out / MADE).read_text())
        other = [key for key in ("model", "format", "length") if before[key] != made[key]]
    except (OSError, ValueError, KeyError, TypeError):
        raise InputError(f"{out / MADE} cannot be read; name another folder with --out") from None
    if other:
        what = "another detector" if "model" in other else f"another --{other[0]} ({before[other[0]]})"
        raise InputError(f"{out} holds features of {what}; name another folder with --out")
    found = _read_index(out)
    for path, name in names.items():
        row = found.get(name)
        if row is not None and not _is_of(row, path) and _is_elsewhere(row, path):
            raise InputError(
                f"{out} holds features of {row.source} under the name {name}, and {path} would replace them; name "
                "another folder with --out, or both videos in one command"
            )
    return found


def _is_elsewhere(row: Row, path: Path) -> bool:
    """Whether the video of the row is still where it was, and is not this file."""
    source = Path(row.source)
    return source.exists() and not (path.exists() and source.samefile(path))


def _read_index(out: Path) -> dict[str, Row]:
    """The last row of each video; a line that was cut off is passed over."""
    found: dict[str, Row] = {}
    try:
        lines = (out / INDEX).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError):
        return {}
    for line in lines:
        try:
            row = Row(**json.loads(line))
        except (ValueError, TypeError):
            continue
        found[row.video] = row
    return found


def _file(form: Form, name: str) -> str:
    """Where the features of a video are, in OUT."""
    return f"{PARTS}/{name}.npy" if form == "h5" else f"{name}.{form}"


def _extract(
    flags: ExtractFlags, form: Form, names: Mapping[Path, str], index: dict[str, Row], session: Session,
    terminal: Terminal,
) -> tuple[int, bool]:  # fmt: skip
    """(videos that cannot be used, whether it was interrupted); what is made is added to `index`, and to its file."""
    joined = _joined(flags.out, names.values()) if form == "h5" else frozenset()
    known, skipped = 0, 0
    with terminal.progress("videos", len(names)) as advance:
        for number, (path, name) in enumerate(names.items(), 1):
            row = index.get(name)
            file = flags.out / _file(form, name)
            there = file.exists()
            whole = there and (row is None or row.bytes in (None, file.stat().st_size))
            if row is not None and _is_of(row, path) and (whole or name in joined):
                known += 1
            else:
                if there and not whole:
                    terminal.say(f"{file}: not as long as it was written; making it anew")
                try:
                    made = _made(flags, form, path, name, file, session)
                    _add(flags.out, made)
                    index[name] = made
                except VideoError as error:
                    skipped += 1
                    index.pop(name, None)
                    terminal.say(f"skipped: {error}")
                except KeyboardInterrupt:
                    return skipped, True
            advance(number, name)
    if known:
        terminal.say(f"{known} of {len(names)} videos have their features already")
    if skipped == len(names):
        raise InputError(f"none of the {len(names)} videos can be used")
    return skipped, False


def _is_of(row: Row, path: Path) -> bool:
    """Whether the row is of this very file."""
    try:
        status = path.stat()
    except OSError:
        return False
    return (row.size, row.mtime_ns) == (status.st_size, status.st_mtime_ns)


def _made(flags: ExtractFlags, form: Form, path: Path, name: str, file: Path, session: Session) -> Row:
    """Write the features of one video, a window at a time, and say what they are."""
    features = session.regular_features(path)
    info, stride, count = features.info, features.stride, features.count
    if flags.count is not None:
        values = _rescaled(np.concatenate(list(features.parts)), stride, info.duration, flags.count)
        stride, count = info.duration / flags.count, flags.count
        parts: Iterator[np.ndarray] = iter([values])
    else:
        parts = features.parts
    with closing(features.parts):
        _write(file, form, parts, count, features.num_channels, stride, info.fps)
    return Row(
        video=name, file=HDF5 if form == "h5" else file.name, source=str(path.absolute()), size=info.size,
        mtime_ns=info.mtime_ns, duration=info.duration, fps=info.fps, features=count, channels=features.num_channels,
        first_centre=stride / 2, stride=stride, stride_frames=stride * info.fps, frames=FRAMES_PER_SNIPPET,
        frame_stride=session.config.data.frame_stride, bytes=None if form == "h5" else file.stat().st_size,
    )  # fmt: skip


def _rescaled(values: np.ndarray, stride: float, duration: float, count: int) -> np.ndarray:
    """`count` features (count, C) that share the duration evenly, between those around their centres."""
    wanted = (np.arange(count) + 0.5) * duration / count
    at = np.clip(wanted / stride - 0.5, 0, len(values) - 1)
    before = np.floor(at).astype(np.int64)
    after = np.minimum(before + 1, len(values) - 1)
    share = (at - before)[:, None].astype(np.float32)
    return values[before] * (1 - share) + values[after] * share


def _write(
    file: Path, form: Form, parts: Iterator[np.ndarray], count: int, channels: int, stride: float, fps: float
) -> None:
    """Write the features of one video. Raises InputError where it cannot be."""
    if form in ("npy", "h5"):
        header = {"descr": "<f4", "fortran_order": False, "shape": (count, channels)}
        with replacing(file) as target:
            np.lib.format.write_array_header_1_0(target, header)
            for part in parts:
                target.write(part.astype("<f4", copy=False).tobytes())
        return
    values = np.concatenate(list(parts))
    with replacing(file) as target:
        if form == "npz":
            centres = (np.arange(count) + 0.5) * stride
            np.savez(target, feats=values, centres=centres, stride=stride, fps=fps)
        elif form == "pt":
            import torch

            torch.save(torch.from_numpy(values), target)
        else:
            head = ",".join(f"f{k}" for k in range(channels))
            np.savetxt(target, values, fmt="%.6g", delimiter=",", header=head, comments="")


def _add(out: Path, row: Row) -> None:
    """Add a row to the index; its features are there."""
    try:
        with (out / INDEX).open("ab+") as index:
            end = index.seek(0, os.SEEK_END)
            index.seek(max(end - 1, 0))
            cut_off = index.read(1) not in (b"", b"\n")  # by a process that was killed
            index.write(b"\n" * cut_off + json.dumps(asdict(row)).encode() + b"\n")
            index.flush()
            os.fsync(index.fileno())
    except OSError as error:
        raise InputError(f"{out / INDEX}: cannot write ({error.strerror}); free some space or change --out") from error


def _joined(out: Path, names: Iterable[str]) -> frozenset[str]:
    """Those names of videos that the HDF5 file has features of."""
    import h5py

    if not (out / HDF5).exists():
        return frozenset()
    with h5py.File(out / HDF5, "r") as found:
        return frozenset(name for name in names if name in found)


def _join(out: Path, rows: Mapping[str, Row]) -> None:
    """Put the features of all videos, also of earlier commands, into one HDF5 file, each under its video's name."""
    import h5py

    parts = {name: out / _file("h5", name) for name in rows}
    if not any(part.exists() for part in parts.values()):
        return
    with replacing(out / HDF5) as target:
        before = h5py.File(out / HDF5, "r") if (out / HDF5).exists() else None
        with h5py.File(target, "w") as joined:
            for name, part in parts.items():
                if part.exists():
                    joined.create_dataset(name, data=np.load(part, mmap_mode="r"))
                elif before is not None and name in before:
                    joined.create_dataset(name, data=before[name][()])
        if before is not None:
            before.close()
    for part in parts.values():
        part.unlink(missing_ok=True)
    if not any((out / PARTS).iterdir()):
        (out / PARTS).rmdir()


if __name__ == "__main__":
    sys.exit(main(owns_process=True))

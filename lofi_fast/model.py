"""The detector: what was trained, as one object. Its encoder, its head, the classes, and the settings of the run.

    detector = Detector.load("runs/x")
    for found in detector.detect("new.mp4"):
        print(found.start, found.end, found.label, found.score)

A video goes through the very path of training and evaluation (probe, windows, grid of frames, JPEG pictures, DALI,
encoder, head, soft-NMS), a batch of snippets after the other: memory does not grow with its length, apart from what is
found. A snippet that several windows show is encoded once. Decoding, DALI and the networks work at the same time.

Shapes: C channels, L snippets of a window.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self, overload
from warnings import warn

import msgspec
import numpy as np
import safetensors.torch
import torch
from numpy.typing import NDArray
from torch import Tensor

from lofi_fast import __version__, gpu
from lofi_fast import encoder as encoders
from lofi_fast import head as heads
from lofi_fast.budget import Budget, gigabytes, resolve_budget
from lofi_fast.config import Config, PrecisionName
from lofi_fast.data.dataset import centre_view
from lofi_fast.data.packages import require_dali, require_pyav
from lofi_fast.data.pictures import cached_size, hold_in_turn
from lofi_fast.data.pipeline import FramePipeline, FrameRequest, pictures_of_a_run
from lofi_fast.data.survey import cache_side
from lofi_fast.data.video import VideoError, VideoInfo, probe, stated_duration
from lofi_fast.data.windows import (
    SharedSnippets,
    Window,
    cut_windows,
    equal_parts,
    frames_around,
    grids_coincide,
)
from lofi_fast.detections import MIN_SCORE, Detection
from lofi_fast.encoder.protocol import Encoder
from lofi_fast.errors import InputError
from lofi_fast.fidelity import FRAMES_PER_SNIPPET
from lofi_fast.files import write_bytes
from lofi_fast.head.decoding import Candidates, best, best_points, candidates, point_candidates
from lofi_fast.head.protocol import Head, NotFiniteOutput
from lofi_fast.ledger import EncoderLedger
from lofi_fast.memory.settle import open_meter, settle_here
from lofi_fast.memory.step_bytes import features_bytes
from lofi_fast.memory.trial import Trials
from lofi_fast.model_file import FORMAT, MODEL, metadata_of, model_file
from lofi_fast.precision import as_trained, choose_device, choose_precision

LARGEST_CHUNK = 64  # snippets encoded at once, at most
CUT_OFF = 1.0  # seconds by which a file is shorter than it says, from which on that is worth a note
FEWEST = 8  # snippets of a batch, where a video has fewer the last one is repeated: tiny batches are rounded otherwise
REFUSAL = "raise --mem-budget, or take a detector of a smaller --encoder, --width or --fidelity"

Anything = str | Path
Features = NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class VideoFeatures:
    """values (N, C) float32 of the N snippets of a video; times (N,) float64, ascending: the seconds of a player's
    clock at each snippet's centre.
    """

    values: Features
    times: NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class RegularFeatures:
    """Features of a video, `stride` seconds apart, feature i being centred on (i + 0.5) * stride. count: how many there
    are. parts: (n, num_channels) float32 in turn, `count` in all, which can be gone through once.
    """

    info: VideoInfo
    stride: float
    count: int
    num_channels: int
    parts: Generator[Features]


@dataclass(frozen=True)
class Found:
    """What was found in one video, best first; `duration`: what a player's clock shows at its end."""

    path: Path
    duration: float
    detections: list[Detection]


class Detector:
    """An encoder, a head, the classes that it tells, and the settings that it was trained with."""

    def __init__(self, encoder: Encoder, head: Head, classes: Sequence[str], config: Config) -> None:
        self.encoder, self.head, self.classes, self.config = encoder, head, tuple(classes), config
        self.ledger: EncoderLedger | None = None  # of an encoder that the settings name; others are planned by running

    @staticmethod
    def load(
        path: Anything,
        *,
        encoder: Callable[[Config], Encoder] = encoders.build,
        head: Callable[[Config, int, int], Head] = heads.build,
    ) -> Detector:
        """The detector of a finished run's folder, or of a model file.

        `encoder(config)` and `head(config, num_features, num_classes)` make the networks that the weights are loaded
        into; to be given where a detector was trained with networks of one's own.
        Raises InputError, one sentence, for what holds no detector, one of a newer version, weights of other shapes,
        and weights that are not finite.
        """
        path = Path(path)
        file = model_file(path)
        metadata = metadata_of(file)
        config = Config.from_json(metadata["settings"], f"{file}: settings")
        try:
            classes = msgspec.json.decode(metadata["classes"], type=list[str])
        except (msgspec.MsgspecError, ValueError, RecursionError):
            raise InputError(f"{file}: its list of classes is damaged; name another {MODEL}") from None
        with torch.random.fork_rng(devices=[]):
            try:
                made_encoder = encoder(config)
                made_head = head(config, made_encoder.num_features, len(classes))
            except (ValueError, RuntimeError) as error:
                raise InputError(f"{file}: no network can be made from its settings ({error})") from None
        detector = Detector(made_encoder, made_head, classes, config)
        detector.ledger = encoders.ledger_of(config.encoder) if encoder is encoders.build else None
        detector._load_weights(file, metadata.get("networks", ""))
        detector.encoder.eval()
        detector.encoder.freeze_batchnorm()
        detector.head.eval()
        return detector

    def save(self, path: Anything) -> Path:
        """Write one safetensors file: the weights of encoder and head with batch norm's statistics, and as metadata
        the settings and classes (JSON) and versions. The same detector gives the same bytes.

        Raises InputError where it cannot be written, or where a weight is not finite.
        """
        path = Path(path)
        tensors = {name: value.detach().cpu().contiguous().clone() for name, value in self._weights().items()}
        if spoilt := _not_finite(tensors):
            raise InputError(f"{path}: not written, since {spoilt} is not finite: the training has diverged")
        metadata = {
            "format": str(FORMAT),
            "lofi_fast": __version__,
            "torch": torch.__version__,
            "networks": self._networks(),
            "classes": json.dumps(self.classes),
            "settings": self.config.to_json(),
        }
        return write_bytes(path, _with_sorted_header(safetensors.torch.save(tensors, metadata)))

    @overload
    def detect(  # type: ignore[overload-overlap]  # a str is a sequence too
        self, videos: Anything, *, mem_budget: str = ..., min_score: float = ..., top_k: int | None = ...,
        device: str = ...,
    ) -> list[Detection]: ...  # fmt: skip
    @overload
    def detect(
        self, videos: Sequence[Anything], *, mem_budget: str = ..., min_score: float = ..., top_k: int | None = ...,
        device: str = ...,
    ) -> dict[Path, list[Detection]]: ...  # fmt: skip
    def detect(
        self,
        videos: Anything | Sequence[Anything],
        *,
        mem_budget: str = "auto",
        min_score: float = MIN_SCORE,
        top_k: int | None = None,
        device: str = "auto",
    ) -> list[Detection] | dict[Path, list[Detection]]:
        """What happens when in videos that FFmpeg reads: detections, best first, in seconds of a player's clock.

        Args:
            videos: one file, or several; of several the result is by path, and one that cannot be used is left out
                with a warning.
            mem_budget: memory that this process may hold: "11GB", "11GiB", "80%" of the device, "auto" (what is free).
            min_score: the least score of what is given.
            top_k: most detections of a video; None: as the detector was trained to be evaluated.
            device: "auto", "cuda" or "cpu".

        Raises InputError where a value cannot be or the budget is too small, and VideoError (an InputError) where no
        video can be used.
        """
        with self.session(mem_budget=mem_budget, device=device) as session:
            if isinstance(videos, str | Path):
                return session.detect(videos, min_score=min_score, top_k=top_k).detections
            found: dict[Path, list[Detection]] = {}
            failures: list[VideoError] = []
            for path in map(Path, videos):
                try:
                    found[path] = session.detect(path, min_score=min_score, top_k=top_k).detections
                except VideoError as error:
                    failures.append(error)
            if failures and not found:
                raise failures[0]
            for failure in failures:
                warn(f"left out: {failure}", stacklevel=2)
            return found

    def features(self, video: Anything, *, mem_budget: str = "auto", device: str = "auto") -> VideoFeatures:
        """The encoder's features of one video at full fidelity, each snippet once, for other heads.

        Snippets are as far apart as those that the head sees. Raises as `detect` does.
        """
        with self.session(mem_budget=mem_budget, device=device) as session:
            return session.features(video)

    def session(
        self, *, mem_budget: str = "auto", device: str = "auto", precision: PrecisionName | None = None,
        say: Callable[[str], None] = lambda _: None,
    ) -> Session:  # fmt: skip
        """The detector at work, for many videos after each other; `say` is told what was planned. `precision`: "auto",
        "bf16", "fp16" or "fp32"; None: as the run was asked for, where the device has it.
        """
        return Session(self, mem_budget=mem_budget, device=device, precision=precision, say=say)

    def _weights(self) -> dict[str, Tensor]:
        parts = (("encoder", self.encoder), ("head", self.head))
        return {f"{part}.{name}": value for part, module in parts for name, value in module.state_dict().items()}

    def _networks(self) -> str:
        return f"{type(self.encoder).__name__}, {type(self.head).__name__}"

    def _load_weights(self, file: Path, networks: str) -> None:
        given, expected = safetensors.torch.load_file(file), self._weights()
        missing, unknown = sorted(expected.keys() - given.keys()), sorted(given.keys() - expected.keys())
        wrong = [name for name in expected if name in given and given[name].shape != expected[name].shape]
        if missing or unknown or wrong:
            if wrong:
                fault = (
                    f"{wrong[0]} has shape {tuple(given[wrong[0]].shape)} where its settings ask for "
                    f"{tuple(expected[wrong[0]].shape)}"
                )
            else:
                fault = f"it lacks {missing[0]}" if missing else f"it holds {unknown[0]} that nobody asks for"
            other = f", which were {networks} when it was saved" if networks != self._networks() else ""
            raise InputError(f"{file}: weights of other networks{other}: {fault}")
        if spoilt := _not_finite(given):
            raise InputError(
                f"{file}: {spoilt} holds a NaN or an infinity; the training diverged, or the file is spoilt"
            )
        for part, module in (("encoder.", self.encoder), ("head.", self.head)):
            own = {name.removeprefix(part): value for name, value in given.items() if name.startswith(part)}
            module.load_state_dict(own)


def _not_finite(tensors: dict[str, Tensor]) -> str:
    """The first tensor that holds a NaN or an infinity, or nothing."""
    return next((name for name, value in tensors.items() if not bool(value.isfinite().all())), "")


def _with_sorted_header(content: bytes) -> bytes:
    """A safetensors file with its metadata in alphabetical order; the library writes it in random order. A file is
    the header's length (8 bytes), the header (JSON, padded with spaces), the tensors.
    """
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + content[8 + length :]


class Session:
    """A detector at work: its networks on a device, planned within a budget at the first video.

    The networks move to the device and stay there. To be closed, or used as a context.
    """

    def __init__(
        self, detector: Detector, *, mem_budget: str, device: str, precision: PrecisionName | None,
        say: Callable[[str], None],
    ) -> None:  # fmt: skip
        if not isinstance(mem_budget, str):
            raise InputError(f'mem_budget {mem_budget!r}: write it like "4GB", "80%" or "auto"')
        budget = Budget.parse(mem_budget)
        if device.partition(":")[0] not in ("auto", "cuda", "cpu"):
            raise InputError(f'device {device!r}: choose one of "auto", "cuda" and "cpu"')
        require_pyav()
        require_dali()
        self.detector, self.config, self._say = detector, detector.config, say
        self.device = choose_device(device)
        gpu.check_dali(self.device)
        if device == "auto" and self.device.type == "cpu" and (reason := gpu.unused()):
            say(f"warning: {reason}. Detecting on the CPU")
        self.precision = (
            choose_precision(self.device, precision) if precision else as_trained(self.device, self.config.precision)
        )
        for note in settle_here():
            say(f"note: {note}")
        self.meter = open_meter(self.device)
        gpu.check_triton(self.device)
        self.budget = resolve_budget(budget, self.meter.total(), self.meter.available())
        if self.config.data.video_scores:
            say(f"note: classes are the head's own, and not those of {self.config.data.video_scores}")
        seconds, overlap, length = self.config.data.window, self.config.data.overlap, self.config.full.num_snippets
        if seconds is not None and overlap and not grids_coincide(length, overlap):
            say(
                f"note: windows begin every {length * (1 - overlap):g} snippets, which is no whole number: what two of "
                "them show is encoded for each"
            )
        detector.encoder.place(self.device).eval()
        detector.encoder.freeze_batchnorm()
        detector.head.to(self.device).eval()
        self.chunk = 0  # snippets encoded at once; 0: not planned yet
        self.rows = 0  # windows that the head sees at once
        self._pipeline: FramePipeline | None = None
        self._largest = 0  # pixels of the pictures that the pipeline was built for

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        if self._pipeline is not None:
            self._pipeline.close()
            self._pipeline = None

    def detect(
        self,
        video: Anything,
        *,
        min_score: float = MIN_SCORE,
        top_k: int | None = None,
        told: Callable[[float], None] = lambda _: None,
    ) -> Found:
        """What is found in one video; see `Detector.detect`. `told` hears up to which second the work is done."""
        if not 0 <= min_score < 1:
            raise InputError(f"min_score {min_score}: must be 0 or more, and less than 1")
        if top_k is not None and (not isinstance(top_k, int) or top_k < 1):
            raise InputError(f"top_k {top_k}: must be a whole number of 1 or more")
        path = Path(video)
        config, classes = self.config, self.detector.classes
        with self._blaming(path):
            info = self._probed(path)
            windows = cut_windows(str(path), info.duration, config.data.window_seconds, config.data.overlap, info.start)
            kept: list[Candidates] = []
            batch: list[tuple[Window, Features]] = []
            with closing(self._encoded(info, windows)) as encoded:
                for number, (window, features) in enumerate(encoded, 1):
                    batch.append((window, features))
                    if len(batch) == self.rows or number == len(windows):
                        kept += self._candidates(batch, info, min_score)
                        batch.clear()
                    told(min(window.end, info.duration))
            most = config.detect.top_k if top_k is None else top_k
            if config.points:
                found = best_points(kept, classes, suppression=config.spotting.suppression, top_k=most)
            else:
                found = best(
                    kept, classes, sigma=config.detect.sigma, voting=config.detect.voting, top_k=most,
                    min_score=min_score,
                )  # fmt: skip
        return Found(path, info.duration, found)

    def features(self, video: Anything, *, told: Callable[[float], None] = lambda _: None) -> VideoFeatures:
        """The features of one video; see `Detector.features`. `told` hears up to which second the work is done."""
        path = Path(video)
        length = self.config.full.num_snippets
        values: list[Features] = []
        times: list[NDArray[np.float64]] = []
        with self._blaming(path):
            info = self._probed(path)
            windows = cut_windows(str(path), info.duration, self.config.data.window_seconds, 0.0, info.start)
            covered = info.start  # seconds: the last window is moved back to end with the video
            with closing(self._encoded(info, windows)) as encoded:
                for window, features in encoded:
                    centres = window.centres(length)
                    new = (centres >= covered) & (centres < info.duration)
                    values.append(features.T[new])
                    times.append(centres[new])
                    covered = window.end
                    told(min(covered, info.duration))
        return VideoFeatures(np.concatenate(values), np.concatenate(times))

    def regular_features(self, video: Anything) -> RegularFeatures:
        """The features of one video at regular times: feature i is centred on (i + 0.5) * stride seconds of a player's
        clock, whenever the pictures begin. They are computed while `parts` is gone through, a window at a time.

        Raises VideoError where the video cannot be used, also while `parts` is gone through.
        """
        path = Path(video)
        info = self._probed(path)
        length = self.config.full.num_snippets
        seconds = self.config.data.window_seconds or info.duration
        stride = seconds / length
        count = max(math.ceil(info.duration / stride - 0.5 - 1e-9), 1)
        windows = [
            Window(str(path), k * seconds, (k + 1) * seconds) for k in range(math.ceil(count / length))
        ]  # the last one passes the video's end

        def parts() -> Generator[Features]:
            left = count
            with self._blaming(path), closing(self._encoded(info, windows)) as encoded:
                for _, features in encoded:
                    yield np.ascontiguousarray(features.T[:left])
                    left -= length

        return RegularFeatures(info, stride, count, self.detector.encoder.num_features, parts())

    def _probed(self, path: Path) -> VideoInfo:
        """A video that can be used; says what of it is missing. Raises VideoError."""
        info, stated = probe(path), stated_duration(path)
        if len(info.pts) < FRAMES_PER_SNIPPET:
            raise VideoError(f"video {path}: {len(info.pts)} frames are less than one snippet of {FRAMES_PER_SNIPPET}")
        if info.lost:
            self._say(f"note: {info.lost} frames of {path} could not be decoded and are left out")
        if stated - info.duration > CUT_OFF:
            self._say(
                f"note: {path}: the file says that it lasts {stated:.1f} s, and ends after {info.duration:.1f} s; "
                "is it cut off, or still being copied?"
            )
        return info

    @contextmanager
    def _blaming(self, path: Path) -> Iterator[None]:
        """Turn what goes wrong with one video into a sentence that names it."""
        try:
            yield
        except NotFiniteOutput:
            raise VideoError(
                f"video {path}: the head's output is not finite; the detector's training has diverged"
            ) from None
        except (RuntimeError, MemoryError) as error:
            if not self.meter.ran_out(error):
                raise
            raise VideoError(
                f"video {path} needs more memory than the budget of {gigabytes(self.budget)}; {REFUSAL}"
            ) from None

    def _encoded(self, info: VideoInfo, windows: Sequence[Window]) -> Generator[tuple[Window, Features]]:
        """Features (C, L) of each window in turn. Snippets are encoded `chunk` at a time, in the order in which the
        video shows them, whichever windows they are of; how many at a time changes them by rounding.
        """
        full = self.config.full
        snippets = SharedSnippets.of(info, windows, full.num_snippets)
        width, height = cached_size(info, cache_side(full))
        pipeline = self._pipeline_for(width * height)
        if not self.chunk:
            with closing(self._requests(info, [snippets.centres[:1]], 1)) as requests:
                (one,) = next(requests)  # and the decoder stays open: its memory counts
                self._plan(one, pipeline)
                del one
        centres = np.pad(snippets.centres, (0, max(FEWEST - len(snippets.centres), 0)), mode="edge")
        kept: Features = np.empty((0, self.detector.encoder.num_features), dtype=np.float32)
        first = 0  # of the snippets whose features are kept: those before are of no window to come
        with (
            closing(self._requests(info, equal_parts(centres, self.chunk))) as requests,
            closing(pipeline.stream(requests)) as stream,
        ):
            for window, places in zip(windows, snippets.places, strict=True):
                kept, first = kept[places[0] - first :], int(places[0])
                while len(kept) <= places[-1] - first:
                    new = self._encode(next(stream)).float().cpu().numpy()
                    if not np.isfinite(new).all():
                        raise NotFiniteOutput("a feature is not finite")
                    kept = np.concatenate([kept, new])
                yield window, np.ascontiguousarray(kept[places - first].T)

    def _requests(
        self, info: VideoInfo, batches: Sequence[NDArray[np.int64]], chunk: int | None = None
    ) -> Generator[list[FrameRequest]]:
        """The frames of the snippets around the frames of each batch in turn, of `chunk` snippets at once; None: of as
        many as are encoded at once, which may become fewer.
        """
        full, stride = self.config.full, self.config.data.frame_stride
        selections = [np.unique(frames_around(info, batch, stride)) for batch in batches]
        with closing(hold_in_turn(info, selections, cache_side(full), torch.get_num_threads())) as held:
            for batch, video in zip(batches, held, strict=True):
                view = centre_view(video, self.config.data.resize)
                for centres in equal_parts(batch, chunk or self.chunk):
                    positions = np.searchsorted(video.frames, frames_around(info, centres, stride).ravel())
                    yield [FrameRequest(video, positions, view, full.side)]

    @torch.no_grad()
    def _encode(self, frames: Tensor) -> Tensor:
        """Features (n, C) of n snippets; in smaller chunks from now on where memory runs out."""
        while True:
            try:
                with self.meter.cap(self.budget), self.precision.autocast(self.device):
                    return self.detector.encoder.encode(frames, FRAMES_PER_SNIPPET, chunk=self.chunk)
            except Exception as error:
                if not self.meter.ran_out(error) or self.chunk == 1:
                    raise
            self.chunk //= 2
            self.meter.release()
            self._say(f"memory ran out: {self.chunk} snippets at once from now on")

    @torch.no_grad()
    def _candidates(
        self, batch: Sequence[tuple[Window, Features]], info: VideoInfo, min_score: float
    ) -> list[Candidates]:
        """Of each window. The head always sees `rows` windows, the last one repeated: how many there are would change
        its rounding, and the run's own evaluation has full batches too.
        """
        length = self.config.full.num_snippets
        filled = [*batch, *[batch[-1]] * (self.rows - len(batch))]
        with self.meter.cap(self.budget):
            features_BCL = torch.stack([torch.from_numpy(features) for _, features in filled]).to(self.device)
            with self.precision.autocast(self.device):
                output = self.detector.head(features_BCL)
            edges = [window.edges(np.arange(length), length) for window, _ in filled]
            proposals = self.detector.head.proposals(output, edges)
        if self.config.points:
            return [
                point_candidates(window, duration=info.duration, min_score=min_score)
                for window in proposals[: len(batch)]
            ]
        return [
            candidates(
                window, self.detector.classes, duration=info.duration, min_score=min_score,
                labels_per_proposal=self.config.detect.labels_per_proposal,
            )
            for window in proposals[: len(batch)]
        ]  # fmt: skip

    def _pipeline_for(self, pixels: int) -> FramePipeline:
        """DALI for pictures of so many pixels, whose runs are as many as a bounded decode pool holds."""
        pixels = max(pixels, 2 * cache_side(self.config.full) ** 2)
        if self._pipeline is None or pixels > self._largest:
            self.close()
            self._largest = pixels
            threads = min(torch.get_num_threads(), 8)
            self._pipeline = FramePipeline(pictures_of_a_run(pixels, self.device.type), self.device.type, threads)
        return self._pipeline

    def _plan(self, snippet: FrameRequest, pipeline: FramePipeline) -> None:
        """How many windows the head sees and how many snippets are encoded at once: the most that fit the budget, up
        to what training had. The head, whose steps are quick, is run; a ledger tells what the encoder needs, where
        there is one, and else the encoder is run on the frames of one snippet, repeated. Raises InputError when nothing
        fits.
        """
        length, side = self.config.full.num_snippets, self.config.full.side
        num_features, ledger = self.detector.encoder.num_features, self.detector.ledger
        itemsize = self.precision.dtype.itemsize

        @torch.no_grad()
        def propose(rows: int) -> None:
            with self.precision.autocast(self.device):
                output = self.detector.head(torch.zeros(rows, num_features, length, device=self.device))
            self.detector.head.proposals(output, [np.arange(length + 1.0)] * rows)

        @torch.no_grad()
        def encode(size: int) -> None:
            batch = [snippet] * size
            with closing(pipeline.stream([batch, batch])) as stream:
                frames = next(stream)  # the second batch is decoded meanwhile
                with self.precision.autocast(self.device):
                    self.detector.encoder.encode(frames, FRAMES_PER_SNIPPET, chunk=size)

        rows = _halves(self.config.head_stage.batch)

        def encoding(size: int) -> int:
            assert ledger is not None
            return features_bytes(ledger, length, 2 * size, size, side, itemsize)

        trials = Trials(self.meter, self.budget, lambda *_: None, lambda *_: None)
        self.rows = trials.highest_fitting("detection, windows at once", rows, float, propose, REFUSAL).candidate
        sizes = _halves(min(LARGEST_CHUNK, length))
        encoded = trials.highest_fitting(
            "detection, snippets at once", sizes, float, encode, REFUSAL, ledger=encoding if ledger else None
        )
        self.chunk = encoded.candidate
        peak = f"{'' if encoded.readings else 'at most '}{gigabytes(encoded.peak)}"
        self._say(
            f"plan: {self.chunk} snippets and {self.rows} windows at once, peak {peak} of {gigabytes(self.budget)}"
        )


def _halves(largest: int) -> list[int]:
    """`largest`, a half of it, a quarter ... down to 1."""
    sizes = [largest]
    while sizes[-1] > 1:
        sizes.append(sizes[-1] // 2)
    return sizes

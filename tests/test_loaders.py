"""Every file that a user may hand over, damaged at random: what comes is what it holds, or the one declared error."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lofi_fast.config import Config
from lofi_fast.data.annotations import load_annotations
from lofi_fast.data.formats.frames import recognised
from lofi_fast.data.ground_truth import load_ground_truth
from lofi_fast.data.video_scores import load_video_scores
from lofi_fast.errors import InputError
from lofi_fast.memory.replay import Replay
from lofi_fast.metrics import load_predictions
from lofi_fast.presets import file_of_settings, small

SEGMENT = {"segment": [0.5, 2], "label": "jump", "score": 0.25}
VIDEO = {"subset": "validation", "duration": 12.5, "annotations": [SEGMENT]}
STEP = {"event": "step", "stage": "joint", "epoch": 0, "step": 0, "num_snippets": 8, "side": 32, "micro_batch": 1}
TABLE = "video,start,end,label,subset,duration\nv,0.5,2,jump,validation,12.5\nw,1,2,run,training,\n"
SETTINGS = 'preset = "small"\nmem_budget = "2GB"\n[joint]\nlr = 0.05\n'


def npy(table: Any) -> bytes:
    file = io.BytesIO()
    np.save(file, table)
    return file.getvalue()


def dumped(content: Any) -> bytes:
    return json.dumps(content).encode()


LOADERS: dict[str, tuple[Callable[[Path], Any], str, bytes]] = {
    "annotations": (load_annotations, "a.json", dumped({"database": {"v": VIDEO}})),
    "annotations_csv": (load_annotations, "a.csv", TABLE.encode()),
    "ground_truth": (load_ground_truth, "g.json", dumped({"database": {"v": VIDEO}})),
    "ground_truth_csv": (load_ground_truth, "g.csv", TABLE.encode()),
    "predictions": (load_predictions, "p.json", dumped({"results": {"v": [SEGMENT]}})),
    "labels_of_frames": (recognised, "v.txt", b"1-4 take\n5-15 pour\n"),
    "recognised_frames": (recognised, "v", b"### Frame level recognition: ###\ntake take pour\n"),
    "scores": (lambda p: load_video_scores(p, ["v"], ["jump"]), "s.json", dumped({"v": {"jump": 1}})),
    "scores_table": (
        lambda p: load_video_scores(p, ["v"], ["jump"]), "s.json", dumped({"results": {"v": [1]}, "class": ["jump"]}),
    ),
    "scores_npy": (
        lambda p: load_video_scores(p, ["video_test_0000001"], ["Diving"]), "s.npy",
        npy(np.ones((2, 101), dtype=np.float32)),
    ),
    "config": (Config.read, "config.json", small().to_json().encode()),
    "settings_toml": (file_of_settings, "s.toml", SETTINGS.encode()),
    "settings_json": (file_of_settings, "s.json", dumped({"preset": "small", "joint": {"lr": 0.05}})),
    "replay": (lambda p: Replay(p, 1), "log.jsonl", dumped(STEP) + b"\n"),
}  # fmt: skip

# What stands where something else was expected: numbers that no float holds, half a character, kinds of nothing.
HOSTILE = (
    b"9" * 5000, b"1" + b"0" * 400, b"-1e999", b"NaN", b'"\\ud800"', b'"\\udcff"', b'"\xff"', b'""', b"null", b"true",
    b"[]", b"{}", b"[" * 3000, b'{"a":' * 3000, b'"a\\u0000b"', b"\x00", b'"',
    b"\xef\xbb\xbf", b"-0", b"\r", b",", b"1_000",
)  # fmt: skip


@st.composite
def damaged(draw: st.DrawFn, whole: bytes) -> bytes:
    """A file with a few of its bytes changed, taken out, or replaced, by the value, with something hostile."""
    content = bytearray(whole)
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.integers(0, len(content)))
        upto = min(at + draw(st.integers(0, 6)), len(content))
        kind = draw(st.sampled_from(("flip", "hostile", "value", "cut")))
        if kind == "flip" and at < len(content):
            content[at] ^= 1 << draw(st.integers(0, 7))
        elif kind == "hostile":
            content[at:upto] = draw(st.sampled_from(HOSTILE))
        elif kind == "value":
            ends = [i for i in range(at, len(content)) if content[i] in b",}]\n"]
            begins = [i for i in range(at) if content[i] in b":[,= "]
            if ends and begins:
                content[begins[-1] + 1 : ends[0]] = draw(st.sampled_from(HOSTILE))
        else:
            del content[at : max(upto, at + draw(st.integers(0, len(content))))]
    return bytes(content)


def load(name: str, path: Path, content: bytes) -> None:
    loader, file, _ = LOADERS[name]
    path /= file
    path.write_bytes(content)
    try:
        loader(path)
    except InputError as error:
        assert str(error).strip() and "Traceback" not in str(error)


@pytest.mark.parametrize("name", LOADERS)
def test_the_whole_file_is_read(name: str, tmp_path: Path) -> None:
    loader, file, content = LOADERS[name]
    (tmp_path / file).write_bytes(content)
    assert loader(tmp_path / file)


@pytest.mark.parametrize("name", LOADERS)
def test_a_damaged_file_raises_the_declared_error_alone(name: str, tmp_path: Path) -> None:
    @settings(max_examples=200, derandomize=True, suppress_health_check=list(HealthCheck))
    @given(damaged(LOADERS[name][2]))
    def every(content: bytes) -> None:
        load(name, tmp_path, content)

    every()


@pytest.mark.parametrize("hostile", HOSTILE, ids=range(len(HOSTILE)))
@pytest.mark.parametrize("name", [name for name, (_, file, _) in LOADERS.items() if not file.endswith(("npy", "toml"))])
def test_hostile_values_in_every_place(name: str, hostile: bytes, tmp_path: Path) -> None:
    """Each value of the file in turn."""
    whole = LOADERS[name][2]
    marks = [i for i, byte in enumerate(whole) if byte in b":,[]{}\n"]
    for begin, end in pairwise(marks[:40]):
        load(name, tmp_path, whole[: begin + 1] + hostile + whole[end:])


@pytest.mark.parametrize(
    ("name", "old", "new", "sentence"),
    [
        ("annotations", b"12.5", b"9" * 5000, "a.json is not an annotation file.*digits"),
        ("annotations", b'"v"', b'"\\ud800"', "no file can have the name"),
        ("annotations", b'"jump"', b'"\\udcff"', "segment 0 has the label .*half a character"),
        ("annotations_csv", b"12.5", b"9" * 5000, "v has the duration '9"),
        ("ground_truth", b'"jump"', b'"\\ud800"', "segment 0: the label .*half a character"),
        ("predictions", b"0.25", b"9" * 5000, "p.json is not valid JSON"),
        ("scores", b": 1}", b": 1" + b"0" * 400 + b"}", "score of 'jump' is 10.*not a finite number"),
        ("scores_npy", b"(2, 101)", b"(2" + b"0" * 14 + b", 101)", "s.npy is not a NumPy array file"),
        ("scores_npy", b"{'descr'", b"z'descr' ", "s.npy is not a NumPy array file"),
        ("config", b"{", b"[" * 3000, "config.json: not readable as JSON"),
        ("config", b'"threads": null', b'"threads": 1' + b"0" * 400, "config.json: --threads 10.*must be a smaller"),
        ("config", b'"side": 96', b'"side": -1' + b"0" * 400, "config.json: --fidelity"),
        ("settings_json", b"{", b"[" * 3000, "--config .*s.json: not readable as JSON"),
        ("replay", b"{", b"[" * 3000, "--replay-rungs .*no joint step"),
    ],
)
def test_the_sentence_says_what_and_where(name: str, old: bytes, new: bytes, sentence: str, tmp_path: Path) -> None:
    loader, file, content = LOADERS[name]
    assert old in content
    (tmp_path / file).write_bytes(content.replace(old, new, 1))
    with pytest.raises(InputError, match=sentence) as refusal:
        loader(tmp_path / file)
    assert "\n" not in str(refusal.value)

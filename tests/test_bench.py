"""The bench: rows, the tables made from them, decoding, evaluation, and the whole job end to end at a tiny setting."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
from av.video.frame import VideoFrame

from bench.__main__ import main
from bench.commands import data as bench_data
from bench.commands import epochs, job, pictures, recipes, rungs, scaling, stages, tables
from bench.commands import eval as bench_eval
from bench.commands.detect import write_long_video
from bench.peers import decoders, official_map
from bench.tools import networks
from bench.tools.rows import ROOT, Row, append_row, environment, read_rows
from bench.tools.table import Table
from lofi_fast.data import demo
from lofi_fast.data.video import probe
from lofi_fast.errors import InputError
from lofi_fast.fidelity import offered
from lofi_fast.metrics import parse_tiou
from lofi_fast.presets import PRESETS
from lofi_fast.train import read_flags

TINY = (
    "--preset small --fidelity 8x32 --window video --frame-stride 1 --width 8 --pretrain-epochs 1 --joint-epochs 1 "
    f"--head-epochs 1 --batch 2 --min-cut 1 --device cpu --threads {min(2, os.cpu_count() or 1)}"
).split()


def row(**changes: Any) -> Row:
    """A row as the job writes it, as far as the table looks at it."""
    return {
        "name": "demo", "labels": "true", "seed": 0, "date": "2026-01-02T03:04:05+00:00",
        "average_map": 0.5, "map_by_tiou": {"0.3": 0.75, "0.5": 0.5, "0.7": 0.25}, "training_seconds": 90.0,
        "peak": 1_500_000_000, "budget": 11_000_000_000, "settings": {"batch": 4}, "commit": "0123456789abcdef",
        "dirty": False, "machine": "Some CPU, 2 cores, 8.0 GB", "device": "CPU, 2 cores, 8.0 GB",
        "precision": "float32 (a CPU)", **changes,
    }  # fmt: skip


def line_of(table: str, what: str) -> str:
    (line,) = [line for line in table.splitlines() if line.startswith(f"| {what} |")]
    return line


# Rows


def test_rows_come_back_as_they_were_written(tmp_path: Path) -> None:
    path = tmp_path / "results" / "job.jsonl"
    assert read_rows(path) == []
    rows = [{"name": "demo", "map": {"0.5": 0.1}, "peak": None}, {"name": "Grüße\u2028\nzwei"}]
    for written in rows:
        append_row(path, written)
    assert read_rows(path) == rows
    assert path.read_bytes().count(b"\n") == 2


def test_a_row_without_a_json_form_leaves_the_file_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "job.jsonl"
    append_row(path, {"average_map": 0.5})
    before = path.read_bytes()
    with pytest.raises(ValueError):
        append_row(path, {"average_map": float("nan")})
    assert path.read_bytes() == before


@pytest.mark.parametrize("bad", ["{torn", "[1]", ""], ids=["torn", "no object", "empty line"])
def test_a_malformed_line_is_named(tmp_path: Path, bad: str) -> None:
    path = tmp_path / "job.jsonl"
    path.write_text(f'{{"a": 1}}\n{bad}\n{{"a": 2}}\n')
    with pytest.raises(InputError, match=r"job\.jsonl:2: "):
        read_rows(path)


def test_environment_says_where_and_when_without_paths() -> None:
    found = environment()
    assert set(found) == {"machine", "system", "date", "commit", "dirty"}
    assert found["date"].endswith("+00:00") and "cores" in found["machine"]
    assert str(ROOT) not in json.dumps(found)


# Tables

HEADER = (
    "| what | seeds | mAP@0.3 (%) | mAP@0.5 (%) | mAP@0.7 (%) | average mAP (%) | training (min) | peak memory "
    "| machine | date, commit |\n| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |\n"
)
NOT_MEASURED = " not measured |" * 9


def test_table_of_no_rows() -> None:
    assert tables.section_of("job", []) == (
        f"{HEADER}| demo |{NOT_MEASURED}\n| demo, rolled labels |{NOT_MEASURED}\n| ceiling |{NOT_MEASURED}\n"
    )


def test_table_of_one_and_of_several_seeds() -> None:
    rows = [
        row(seed=2, average_map=0.25, map_by_tiou={"0.3": 0.5, "0.5": 0.25, "0.7": 0.0}, training_seconds=150.0),
        row(seed=0, peak=2_000_000_000, date="2026-01-03T00:00:00+00:00"),
        row(labels="rolled", average_map=None, map_by_tiou={}, peak=None, dirty=True),
        row(name="mine", device="NVIDIA H100, 80.0 GB", precision="bfloat16 (compute capability 9.0)"),
    ]
    assert tables.section_of("job", rows) == (
        f"{HEADER}"
        "| demo | 0, 2 | 62.5 (50.0 to 75.0) | 37.5 (25.0 to 50.0) | 12.5 (0.0 to 25.0) | 37.5 (25.0 to 50.0) "
        "| 2.0 (1.5 to 2.5) | 2.00 of 11.00 GB | Some CPU, 2 cores, 8.0 GB, float32 | 2026-01-03, 0123456 |\n"
        "| demo, rolled labels | 0 | not measured | not measured | not measured | not measured "
        "| 1.5 | not measured | Some CPU, 2 cores, 8.0 GB, float32 | 2026-01-02, 0123456 with changes |\n"
        f"| ceiling |{NOT_MEASURED}\n"
        "| mine | 0 | 75.0 | 50.0 | 25.0 | 50.0 | 1.5 | 1.50 of 11.00 GB | NVIDIA H100, 80.0 GB, bfloat16 "
        "| 2026-01-02, 0123456 |\n"
    )


def test_the_newest_measurement_never_mixes_code_or_settings() -> None:
    old = [row(seed=seed, average_map=0.1) for seed in (0, 1, 2)]
    again = row(seed=1, average_map=0.4, date="2026-02-01T00:00:00+00:00")
    assert [r["average_map"] for r in job.newest_measurement([again, *old])] == [0.1, 0.4, 0.1]
    for change in ({"commit": "fedcba"}, {"settings": {"batch": 8}}, {"device": "NVIDIA H100"}, {"dirty": True}):
        newer = row(seed=1, date="2026-03-01T00:00:00+00:00", **change)
        assert job.newest_measurement([newer, again, *old]) == [newer]


def test_tables_rewrites_between_the_markers_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    readme, results = tmp_path / "README.md", tmp_path / "results"
    readme.write_text("# Title\n<!-- bench:job -->\nold\n<!-- /bench -->\nafter <!-- a comment -->\n")
    append_row(results / "job.jsonl", row())
    assert tables.main(["--check"], (readme,), results) == 1
    assert "old" in readme.read_text()
    assert tables.main([], (readme,), results) == 0
    assert tables.main(["--check"], (readme,), results) == 0
    expected = (
        f"# Title\n<!-- bench:job -->\n{tables.section_of('job', [row()])}<!-- /bench -->\nafter <!-- a comment -->\n"
    )
    assert readme.read_text() == expected
    append_row(results / "job.jsonl", row(average_map=0.9, date="2026-05-05T00:00:00+00:00"))
    assert tables.main(["--check"], (readme,), results) == 1


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("# Title\n", "<!-- bench:NAME -->"),
        ("<!-- bench:job -->\nnever closed\n", "<!-- /bench -->"),
        ("<!-- bench:jobs -->\n<!-- /bench -->\n", "no table is called jobs"),
        ("<!-- bench:job -->\nnever closed\n<!-- bench:job -->\n<!-- /bench -->\n", "<!-- /bench -->"),
    ],
    ids=["no marker", "unclosed", "unknown", "one of two unclosed"],
)
def test_markers_that_cannot_be_filled_are_refused(tmp_path: Path, text: str, says: str) -> None:
    readme = tmp_path / "README.md"
    readme.write_text(text)
    with pytest.raises(InputError, match=says) as refusal:
        tables.main([], (readme,), tmp_path)
    assert str(refusal.value).startswith(f"{readme}: ")
    assert readme.read_text() == text


def test_the_readme_shows_the_rows_of_this_repository(capsys: pytest.CaptureFixture[str]) -> None:
    status, said = tables.main(["--check"]), capsys.readouterr().out
    assert status == 0, said
    assert said == "README.md is up to date\nbench/README.md is up to date\ndocs/gain.md is up to date\n"


# Decoding, evaluation


def test_decoding_is_measured_beside_the_videos_themselves(tmp_path: Path) -> None:
    results = tmp_path / "data.jsonl"
    assert main(["data", "--quick", "--device", "cpu", "--results", str(results)]) == 0
    rows = read_rows(results)
    assert [row["measured"] for row in rows][:2] == ["cache", "decode"] and rows[-1]["measured"] == "share"
    forms = [row["form"] for row in rows if row["measured"] == "decode"]
    assert forms == ["frame cache, DALI", *decoders.decoders()]
    assert all(row["frames"] == 256 and row["frames_a_second"] > 0 for row in rows if row["measured"] == "decode")
    assert 0 < rows[-1]["share"] < 1
    filled = [row for row in rows if row["measured"] == "filling"]
    assert len(filled) == 2 and "DALI on the CPU" in filled[0]["form"] and "PyAV" in filled[1]["form"]
    assert all(row["frames"] == 4 and row["video_frames_a_second"] > 0 for row in filled)
    assert tables.section_of("data", rows) == "not measured\n"  # one video says nothing of speed
    said = tables.section_of("data", [row | {"quick": False} for row in rows])
    assert "| full: 32 snippets x 64 px | PyAV |" in said and "Filling the cache, once:" in said


def test_detection_is_measured_beside_decoding(tmp_path: Path) -> None:
    results = tmp_path / "detect.jsonl"
    assert main(["detect", "--quick", "--precision", "fp32", "--results", str(results)]) == 0
    alone, ours = read_rows(results)
    assert (alone["form"], ours["form"]) == ("decoding alone", "detection")
    assert alone["times_decoding"] == [1.0, 1.0, 1.0] and ours["precision"] == "float32"
    # Whatever it takes, it decodes all of the video as well, and holds its networks and a decoder.
    assert ours["cpu_seconds"][0] > alone["cpu_seconds"][0] > 0 and ours["floor"] > 1
    assert 1e6 < ours["peaks"][0] <= ours["peaks"][1] < 2e9
    said = tables.section_of("detect", [row | {"quick": False} for row in (alone, ours)])
    assert "| small, 64 x 96 px in 32 s | 320x240, 25 frames a second, 20 s | float32 | detection |" in said


def test_a_long_video_is_its_clip_over_and_over(tmp_path: Path) -> None:
    path = tmp_path / "long.mp4"
    assert write_long_video(path, 41.0) == 1500
    info = probe(path)
    assert len(info.pts) == 1500 and not info.lost
    assert np.diff(info.pts) == pytest.approx(0.04) and info.duration == pytest.approx(60)


def test_another_frame_does_not_pass_the_gate(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def late(decode: Any, path: Path, frames: Any, *arguments: Any) -> torch.Tensor:
        return decoders.squares(decode, path, np.maximum(frames - 1, 0), *arguments)

    monkeypatch.setattr(bench_data, "squares", late)
    assert main(["data", "--quick", "--device", "cpu", "--results", str(tmp_path / "rows")]) == 1
    assert "error: PyAV: its pixels differ from ours by" in capsys.readouterr().err


def test_evaluation_is_measured_beside_the_official_procedure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    results = tmp_path / "eval.jsonl"
    command = ["eval", "--quick", "--rounds", "1", "--results", str(results)]
    assert main(command) == 0
    rows = read_rows(results)
    assert {row["metric"] for row in rows} == {"mAP", "AR@AN"}
    assert {row["form"] for row in rows} >= {"ours", "official, without pandas"}
    monkeypatch.setattr(bench_eval, "parse_tiou", lambda text: parse_tiou("0.5,0.6"))
    wrong = official_map.mean_average_precision
    monkeypatch.setattr(official_map, "mean_average_precision", lambda *found: wrong(*found[:2], found[2] + 0.2))
    assert main([*command, "--against", str(results)]) == 1
    said = capsys.readouterr()
    assert said.err == ("error: mAP: the evaluator's result is not that of official, without pandas, bit for bit\n")
    assert len(read_rows(results)) == len(rows)
    assert "| mAP | 40 | 4,000 | ours |" in tables.section_of("eval", [row | {"quick": False} for row in rows])


def test_all_runs_its_parts_and_compares_them(tmp_path: Path) -> None:
    old, results = tmp_path / "old", tmp_path / "new"
    assert main(["eval", "--quick", "--rounds", "1", "--results", str(old / "eval.jsonl")]) == 0
    command = [sys.executable, "-m", "bench", "all", "--quick", "--part", "eval", "--results", str(results)]
    done = subprocess.run([*command, "--against", str(old)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    (found,) = read_rows(results / "all.jsonl")
    assert (found["part"], found["complete"], found["status"]) == ("eval", True, 0)
    assert len(read_rows(results / "eval.jsonl")) == 6 and "new / old:" in done.stdout


def test_what_fits_is_computed_drawn_and_kept_up_to_date(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    results, readme = tmp_path / "results", tmp_path / "README.md"
    assert main(["fits", "--results", str(results / "fits.jsonl")]) == 0
    rows = {(row["encoder"], row["videos"], row["way"]): row for row in read_rows(results / "fits.jsonl")}
    assert len(rows) == 24
    for (encoder, videos, way), row in rows.items():
        omegas = [snippets * side**2 for _, snippets, side in row["points"]]
        assert omegas == sorted(omegas)  # more memory, no lower fidelity
        plain = rows[encoder, videos, "plain PyTorch"]["full_needs"]
        assert row["full_needs"] < (0.6 * plain if way == "ours" else plain) or way == "plain PyTorch"
        if way == "ours, 8 bits":
            assert row["full_needs"] < 0.75 * rows[encoder, videos, "ours"]["full_needs"]
    # One video of the paper's full fidelity.
    assert rows["tsm_r18", 1, "ours"]["full_needs"] < 6e9 < 12e9 < rows["tsm_r18", 1, "plain PyTorch"]["full_needs"]
    readme.write_text("<!-- bench:fits -->\n<!-- /bench -->\n")
    assert tables.main(["--check"], (readme,), results) == 1
    assert tables.main([], (readme,), results) == 0 and tables.main(["--check"], (readme,), results) == 0
    figure = (results / "fits.svg").read_text()
    assert figure.startswith("<?xml") and "tsm_r50, 16 videos at once" in figure and str(tmp_path) not in figure
    assert "| tsm_r18 | 1 | ours | 1.00x |" in readme.read_text()
    measured = {
        "measured": "step", "encoder": "tsm_r18", "videos": 1, "snippets": 100, "side": 224, "form": "lean",
        "driver": 4 * 10**9, "peak": 3 * 10**9, "dtype": "bfloat16", "quick": False, "machine": "m", "device": "GPU",
        "threads": 1, "date": "2026", "commit": "abc", "dirty": False,
    }  # fmt: skip
    append_row(results / "memory.jsonl", measured)
    capsys.readouterr()
    assert tables.main(["--check"], (readme,), results) == 1
    assert "fits.svg is out of date" in capsys.readouterr().out
    tables.main([], (readme,), results)
    assert (results / "fits.svg").read_text() != figure
    assert "| 1 x 100 snippets of 224 px | bfloat16 | lean | 3.00 | 4.00 | 1.0x less |" in tables.section_of(
        "memory", [measured]
    )


def test_growth_is_measured_beside_the_ledger(tmp_path: Path) -> None:
    results = tmp_path / "scaling.jsonl"
    command = ["scaling", "--quick", "--device", "cpu", "--rounds", "1", "--results", str(results)]
    assert main(command) == 0
    rows = read_rows(results)
    shared = [row for row in rows if row["along"] == "processes"]
    rows = rows[: -len(shared)]
    assert [(row["snippets"], row["form"]) for row in rows] == [(2, form) for form in networks.WholeStep.FORMS]
    assert all(row["peak"] > 0 and row["ms"][0] > 0 for row in (*rows, *shared))
    assert [row["processes"] for row in shared] == [1, 2][: os.cpu_count()]
    assert all((row["predicted"] is None) == (row["form"] == networks.WholeStep.FORMS[0]) for row in rows)
    said = tables.section_of("scaling", [row | {"quick": False} for row in (*rows, *shared)])
    assert "| snippets | 2 | 32 | 1 | tsm_r18 | lean |" in said and "Exponents:" in said
    assert "| 1 | 2 | 32 | 2 | tsm_r18 | lean |" in said and "Processes that share a step" in said


def test_gradients_of_the_parts_of_a_step_add_up_to_those_of_the_whole() -> None:
    whole = networks.WholeStep.of("tsm_r18", 4, 32, "float32", torch.device("cpu"), videos=3, width=8)
    parameters = [*whole.encoder.parameters(), *whole.head.parameters()]

    def gradients(step: networks.WholeStep) -> list[torch.Tensor]:
        step.step("lean")
        return [parameter.grad.clone() for parameter in parameters if parameter.grad is not None]

    parts = [gradients(whole.share(videos)) for videos in ((0, 1), (2,))]
    for *of_parts, expected in zip(*parts, gradients(whole), strict=True):
        assert (sum(of_parts) - expected).norm() <= 1e-4 * expected.norm() + 1e-7


def test_exponents_are_the_slopes_of_logarithms() -> None:
    rows = [
        {"along": "side", "form": form, "side": side, "ms": [2.0 * side**2], "peak": peak * side}
        for side in (64, 128, 192)
        for form, peak in (("lean", 3), ("plain", 0))
    ]
    found = scaling.exponents([*rows, {"along": "encoder", "form": "lean"}])
    assert found["side", "lean"] == pytest.approx((2.0, 1.0))
    assert found["side", "plain"][0] == pytest.approx(2.0) and np.isnan(found["side", "plain"][1])
    assert set(found) == {("side", "lean"), ("side", "plain")}


# The job


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with three training videos of 6 seconds, one for validation, and their labels without durations."""
    folder = tmp_path_factory.mktemp("data")
    database = {}
    for seed, (name, subset) in enumerate({"a": "train", "b": "train", "c": "train", "d": "val"}.items()):
        picture = np.random.default_rng(seed).integers(0, 256, (48, 64, 3), dtype=np.uint8)
        with av.open(str(folder / f"{name}.mp4"), "w") as container:
            stream = container.add_stream("libx264", rate=8, options={"preset": "ultrafast", "crf": "28"})
            stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
            for i in range(48):
                frame = VideoFrame.from_ndarray(np.roll(picture, i, axis=1), format="rgb24")
                container.mux(stream.encode(frame))
            container.mux(stream.encode(None))
        segments = [{"segment": [1.0, 2.5], "label": "jump"}, {"segment": [2.25, 4.25], "label": "run"}]
        database[name] = {"subset": subset, "annotations": segments}
    (folder / "labels.json").write_text(json.dumps({"database": database}))
    return folder


def test_the_whole_job_with_true_and_with_rolled_labels(data: Path, tmp_path: Path) -> None:
    keep, results = tmp_path / "keep", tmp_path / "rows" / "job.jsonl"
    training = ["--annotations", str(data / "labels.json"), f"--videos={data}", *TINY, "--mem-budget", "4GB"]
    command = [sys.executable, "-m", "bench", "job", "--name", "tiny", "--results", str(results), "--keep", str(keep)]
    short = ["--stages", "pretrain"]  # a job that stops early has a row too, without what was not measured
    for flags in (["--"], ["--roll-labels", "--repeat-seeds", "3", "--", *short]):
        done = subprocess.run([*command, *flags, *training], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        assert "plan pretrain" in done.stdout  # the training's own words are passed on

    true, rolled = read_rows(results)
    assert [(r["name"], r["labels"], r["seed"]) for r in (true, rolled)] == [("tiny", "true", 0), ("tiny", "rolled", 3)]
    for found, folder in ((true, keep / "tiny-true-seed0"), (rolled, keep / "tiny-rolled-seed3")):
        log = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
        measured = [event for event in log if event.get("measured", True)]  # a plan by arithmetic is a prediction
        assert found["peak"] == max(event.get("peak") or 0 for event in measured)
        assert found["budget"] == 4_000_000_000
        assert found["resident_peak"] > 100_000_000  # what importing torch alone takes
        assert found["seconds"] > found["training_seconds"] > 0 and found["seconds"] > found["prepare_seconds"] >= 0
        assert found["settings"]["epochs"] == {"pretrain": 1, "joint": 1, "head": 1}
        assert (found["settings"]["fidelity"], found["settings"]["width"]) == ([8, 32], 8)
        assert found["device"].startswith("CPU,") and found["precision"].startswith("float32")
        assert found["versions"]["torch"] and found["versions"]["numpy"]
        for private in (tmp_path, data, ROOT, Path.home()):
            assert f"{private}{os.sep}" not in json.dumps(found)

    metrics = json.loads((keep / "tiny-true-seed0" / "metrics.json").read_text())
    assert (true["average_map"], true["map_by_tiou"]) == (metrics["average_map"], metrics["map_by_tiou"])
    assert (rolled["average_map"], rolled["map_by_tiou"], set(rolled["plan"])) == (None, {}, {"pretrain"})
    plans = json.loads((keep / "tiny-true-seed0" / "plan.json").read_text())["plans"]
    assert true["plan"]["pretrain"] == {key: plans["pretrain"][key] for key in ("batch", "predicted")}
    assert true["plan"]["joint"].keys() == {"spatial", "temporal", "spatio_temporal"}
    for pattern, planned in true["plan"]["joint"].items():
        readings = {"measured", "ladder"}  # what the planner tried on the way
        assert planned == {key: value for key, value in plans["joint"][pattern].items() if key not in readings}
        assert {"rung", "cut", "batch", "peak"} <= planned.keys()
    assert "not measured" not in line_of(tables.section_of("job", [true]), "tiny")
    assert f"--annotations labels.json --videos={data.name} " in true["command"]
    assert true["command"].endswith("--mem-budget 4GB --cache cache --seed 0 --out tiny-true-seed0")
    assert rolled["command"].endswith(
        f"--annotations tiny-rolled.json --videos {data.name} --seed 3 --out tiny-rolled-seed3"
    )

    moved = json.loads((keep / "tiny-rolled.json").read_text())["database"]
    for name in ("a", "b", "c"):  # 6 seconds: 3 later, and round the end
        assert [(s["segment"], s["label"]) for s in moved[name]["annotations"]] == [
            ([0.0, 1.25], "run"), ([4.0, 5.5], "jump"), ([5.25, 6.0], "run"),
        ]  # fmt: skip
    assert [s["segment"] for s in moved["d"]["annotations"]] == [[1.0, 2.5], [2.25, 4.25]]


def test_rolling_the_demo_set_keeps_its_preset_and_its_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "generate", partial(demo.generate, num_training=1, num_validation=1, workers=1))
    config, _ = read_flags([], cuda=lambda: False)
    flags = job.rolled(config, tmp_path / "cache", tmp_path / "copy.json")
    annotations, videos = demo.generate(tmp_path / "cache" / "demo")  # where a run with this cache looks for it
    chosen, _ = read_flags(flags, cuda=lambda: True)
    assert (chosen.preset, chosen.data.annotations, chosen.data.videos) == (
        "demo", str(tmp_path / "copy.json"), str(videos),
    )  # fmt: skip
    true = json.loads(annotations.read_text())
    copy = json.loads((tmp_path / "copy.json").read_text())
    assert copy["database"] == demo.roll_annotations(true)["database"] != true["database"]


def test_the_picture_is_drawn_from_a_row(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = tmp_path / "pictures.jsonl"
    flags = ["--annotations", str(data / "labels.json"), "--videos", str(data), *TINY]
    asked = ["pictures", "--alone", "--budget", "4GB", "--results", str(rows)]
    assert main([*asked, "--", *flags]) == 0
    (row,) = read_rows(rows)
    assert row["steps"] == len(row["columns"]["peak"]) > 0 and max(row["columns"]["peak"]) <= row["budget"] == 4 * 10**9
    truth = json.loads((data / "labels.json").read_text())["database"]
    for shown in row["timelines"]:
        assert sorted(bar[:3] for bar in shown["truth"]) == sorted(
            [*one["segment"], one["label"]] for one in truth[shown["video"]]["annotations"]
        )
    drawn = pictures.figure(tmp_path)
    assert drawn is not None and drawn == pictures.figure(tmp_path)
    for said in ("as labelled", row["timelines"][0]["video"], "predicted", "joint step"):
        assert said in drawn
    assert "pictures.svg" in capsys.readouterr().out
    assert main([*asked, "--least", "5GB", "--", *flags]) == 2 and len(read_rows(rows)) == 1


def test_a_training_that_fails_writes_no_row_and_passes_its_status_on(data: Path, tmp_path: Path) -> None:
    results = tmp_path / "job.jsonl"
    arguments = ["--annotations", str(data / "absent.json"), "--videos", str(data), *TINY]
    assert main(["job", "--name", "x", "--results", str(results), "--", *arguments]) == 2
    assert not results.exists()


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["job", "--", "--out", "x"], "--keep"),
        (["job", "--", "--seed", "4"], "--repeat-seeds"),
        (["job", "--", "--annotations", "a.json", "--videos", "v"], "--name"),
        (["job", "--name", "a|b"], "--name"),
        (["job", "--repeat-seeds", "0,x"], "--repeat-seeds"),
        (["speed"], "no measurement is called speed"),
        (["ops", "--only", "temporal_shift,swirl"], "no operator is called 'swirl'"),
        (["ops", "--threads", "0"], "--threads"),
        (["ops", "--against", "absent.jsonl"], "--against absent.jsonl"),
        (["gpu", "--dry-run", "--part", "ops,speed"], "no part is called speed"),
        (["gpu", "--dry-run", "--minutes", "0"], "--minutes"),
        (["gpu_planner", "--device", "cpu"], "there is no GPU here"),
        (["gpu_planner", "--tiny", "--device", "cpu", "--models", "r18,r19"], "--models: no model is called r19"),
        (["launches", "--device", "cpu"], "there is no GPU here"),
        (["waits", "--device", "cpu", "--settings", "demo,half"], "there is no setting half"),
        (["waits", "--device", "cpu", "--epochs", "1"], "--epochs 2"),
        (["all", "--part", "jobs"], "no part is called jobs"),
    ],
    ids=[
        "out",
        "seed",
        "no name",
        "bad name",
        "bad seeds",
        "unknown command",
        "unknown operator",
        "no thread",
        "no old rows",
        "unknown part",
        "no time",
        "planner without GPU",
        "unknown model",
        "launches without GPU",
        "unknown setting",
        "no later epoch",
        "unknown part of all",
    ],
)
def test_what_the_user_can_mend_is_one_sentence(argv: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(argv) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and says in error and error.count("\n") == 1


def test_paths_in_a_row_show_no_folder_of_the_user() -> None:
    given = ["--videos", "/home/somebody/videos/", f"--cache={ROOT}/runs/cache", "--encoder-weights=/a/b=c/r18.pth",
             "--tiou", "0.3:0.1:0.7"]  # fmt: skip
    assert job.without_paths(given) == [
        "--videos", "videos", "--cache=runs/cache", "--encoder-weights=r18.pth", "--tiou", "0.3:0.1:0.7"
    ]  # fmt: skip


def test_without_arguments_the_bench_says_what_exists(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    said = capsys.readouterr().out
    assert all(f"python -m bench {command}" in said for command in ("job", "kernels", "ops", "tables"))
    assert "bench/results" in said


# A change of recipes


def evaluated(folder: Path, average: float) -> Path:
    folder.mkdir(parents=True)
    (folder / "metrics.json").write_text(json.dumps({"average_map": average, "map_by_tiou": {"0.5": average}}))
    (folder / "config.json").write_text(PRESETS["demo"]().to_json())
    return folder


def test_recipes_are_compared_seed_by_seed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = [evaluated(tmp_path / f"b{seed}", 0.1 * seed) for seed in (1, 2, 3)]
    after = [evaluated(tmp_path / f"a{seed}", 0.2 * seed) for seed in (1, 2, 3)]
    told = [f"--runs={recipe}={','.join(map(str, runs))}" for recipe, runs in (("before", before), ("after", after))]
    results = tmp_path / "recipes.jsonl"
    assert recipes.main([*told, "--commit=before=abc1234", "--name=rooms", f"--results={results}"]) == 0
    rows = read_rows(results)
    assert [(row["recipe"], row["seed"], row["commit"]) for row in rows] == [
        *(("before", seed, "abc1234") for seed in range(3)), *(("after", seed, "unknown") for seed in range(3))
    ]  # fmt: skip
    (table,) = recipes.table(rows)
    assert [line[:5] for line in table.lines] == [
        ("rooms", "before", "10.0, 20.0, 30.0", "20.0", "10.0 to 30.0"),
        ("rooms", "after", "20.0, 40.0, 60.0", "40.0", "20.0 to 60.0"),
    ]
    assert "rooms" in capsys.readouterr().out
    for wrong in (["--runs=later=x"], [f"--runs=after={tmp_path / 'none'}"], ["--name=rooms"]):
        with pytest.raises(InputError):
            recipes.main([*wrong, f"--results={results}"])
    assert len(read_rows(results)) == 6


def test_stages_of_another_checkout_beside_this_one(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    training = ["--annotations", str(data / "labels.json"), f"--videos={data}", *TINY, "--mem-budget", "4GB"]
    results = tmp_path / "stages.jsonl"
    told = ["--before", str(ROOT), "--seeds", "1", "--first", "2", "--precision", "fp32", "--results", str(results)]
    assert stages.main([*told, "--", *training]) == 0
    before, after = read_rows(results)
    assert [(row["which"], row["seed"]) for row in (before, after)] == [("before", 2), ("fp32", 2)]
    for row in (before, after):
        assert set(row["seconds"]) >= {"prepare", "pretrain", "joint", "head", "eval"}
        assert all(spent > 0 for spent in row["seconds"].values())
    (table,) = stages.table([before, after])
    ratio = sum(before["seconds"].values()) / sum(after["seconds"].values())
    assert [line[0] for line in table.lines] == ["before", "after, fp32"]
    assert table.lines[0][-2] == "1.00" and float(table.lines[1][-2]) == pytest.approx(ratio, abs=0.01)
    assert "seed 2, fp32" in capsys.readouterr().out
    with pytest.raises(InputError, match="no checkout"):
        stages.main(["--before", str(tmp_path)])


def test_epochs_are_measured_beside_their_plan(tmp_path: Path) -> None:
    results = tmp_path / "epochs.jsonl"
    told = ["--cuts", "16", "--epochs", "3", "--videos", "8", "--mem-budget", "2GB", "--results", str(results)]
    assert epochs.main(told) == 0
    rows = read_rows(results)
    assert [row["pattern"] for row in rows] == ["spatial", "temporal", "spatio_temporal"]
    for row in rows:
        length, side = row["rung"]
        assert length * side**2 <= 32 * 64**2 / 12, "a cut of 16, as near as its rungs come"
        assert len(row["seconds"]) == 1 and min(row["seconds"][0], row["predicted_seconds"]) > 0
        assert row["error"] == pytest.approx(row["predicted_seconds"] / row["seconds"][0] - 1, abs=0.01)


def test_what_a_pixel_costs_at_each_side(tmp_path: Path) -> None:
    results = tmp_path / "rungs.jsonl"
    assert main(["rungs", "--quick", "--device", "cpu", "--rounds", "1", "--results", str(results)]) == 0
    rows = read_rows(results)
    assert {(row["width"], row["side"], row["dtype"]) for row in rows} == {
        (8, side, dtype) for side in (16, 32) for dtype in rungs.dtypes_of(torch.device("cpu"))
    }
    assert all(row["least"] <= row["ns"][0] and row["quick"] for row in rows)
    assert {row["side"]: row["counted"] for row in rows} == {16: 1.75, 32: 1}

    measured = rungs.all_sides()
    assert {96, 68, 46, 38} <= set(measured[32]) and {224, 104, 28} <= set(measured[64])
    shared = rows[0] | {"quick": False, "dtype": "float32"}
    made = [shared | {"width": 32, "side": side, "least": 100.0 + side} for side in rungs.sides_of("demo", offered)]
    (of_presets, _) = rungs.table(made)[:2]
    assert isinstance(of_presets, Table)
    demo = next(line for line in of_presets.lines if line[0] == "demo")
    assert demo == ("demo", "float32", "4", "1.41", "1.75", "17", "", "2.33")

"""The page that compares runs: results, curves, and the settings that differ."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from test_report import Checker, Lines, write_run

from lofi_fast.errors import InputError
from lofi_fast.report import main
from lofi_fast.report.compare import comparison, differences, named, panels, result, write_comparison
from lofi_fast.report.figures import PALETTE, Panel
from lofi_fast.report.read import RunContents, read_run
from lofi_fast.report.rows import UNKNOWN
from lofi_fast.run import events


def with_config(folder: Path, **config: Any) -> RunContents:
    write_run(folder)
    (folder / "config.json").write_text(json.dumps(config))
    return read_run(folder)


FULL = {"num_snippets": 100, "side": 224}


@pytest.fixture
def runs(tmp_path: Path) -> list[RunContents]:
    same: dict[str, Any] = {"full": FULL, "seed": 0}
    first = with_config(tmp_path / "a" / "run", **same, out="x", joint={"lr": 0.1, "epochs": 3}, stages=["joint"])
    second = with_config(tmp_path / "b" / "run", **same, out="y", joint={"lr": 0.2, "epochs": 3}, pattern="<cyclic>")
    return [first, second]


def test_settings_that_differ_are_listed_and_no_others(runs: list[RunContents]) -> None:
    assert differences(named(runs)) == [
        ("joint.lr", ["0.1", "0.2"]),
        ("stages", ['["joint"]', UNKNOWN]),
        ("pattern", [UNKNOWN, "<cyclic>"]),
    ]
    assert differences(named([runs[0], replace(runs[0], folder=Path("elsewhere"))])) == []


def test_runs_are_named_by_as_much_of_their_paths_as_tells_them_apart(tmp_path: Path) -> None:
    empty = [read_run(write_run(tmp_path / name)) for name in ("a/run", "b/run", "b/other")]
    assert [of.name for of in named(empty)] == ["a/run", "b/run", "b/other"]
    assert [of.name for of in named(empty[1:])] == ["run", "other"]


def test_more_runs_than_colours_are_told_apart_by_dashes(runs: list[RunContents]) -> None:
    many = [runs[0], *runs[1:] * 9]
    looks = {(of.colour, of.dash) for of in named([replace(run, folder=Path(f"/r/{k}")) for k, run in enumerate(many)])}
    assert len(looks) == 10 and len({colour for colour, _ in looks}) == len(PALETTE)


def test_the_curves_of_all_runs_are_in_one_picture_each(runs: list[RunContents]) -> None:
    shown = panels(named(runs))
    assert all(isinstance(panel, Panel) for panel in shown.values())
    words = {name: panel.alt for name, panel in shown.items() if isinstance(panel, Panel)}
    assert words["tiou"] == "mAP by tIoU, at the end: a/run 35.42, b/run 35.42."
    assert words["validation"].endswith("a/run 40, b/run 40.")
    assert words["joint"].endswith("a/run 2, b/run 2.")
    assert words["memory"].endswith("a/run 9.003, b/run 9.003.")
    assert words["fidelity"].endswith("a/run 24.88, b/run 24.88.")  # 50 x 158 px of 100 x 224 px


def test_the_page_is_whole_self_contained_and_says_the_numbers(runs: list[RunContents], tmp_path: Path) -> None:
    path = write_comparison([run.folder for run in runs], tmp_path / "c.html")
    text = path.read_text(encoding="utf-8")
    checked = Checker(text)
    assert not checked.wrong and not checked.open and not checked.undescribed
    assert len(checked.ids) == len(set(checked.ids))
    assert not checked.tags & {"script", "link", "iframe"} and "http" not in text
    for words in ("2 runs compared", "43.21", "51.00", "9.00 GB", "11.00 GB", "&lt;cyclic&gt;", "joint.lr"):
        assert words in text
    assert text.count('class="plot"') == 6
    assert write_comparison([run.folder for run in runs], tmp_path / "c.html").read_text(encoding="utf-8") == text


def test_runs_without_results_are_compared_by_what_they_have(tmp_path: Path) -> None:
    lines = Lines()
    lines.start()
    lines.add(events.Validation(stage="head", epoch=0, average=0.25, map=[]))
    folder = tmp_path / "early"
    folder.mkdir()
    (folder / "log.jsonl").write_text("\n".join(lines.lines))
    (tmp_path / "torn").mkdir()
    (tmp_path / "torn" / "config.json").write_text('{"full": {"num_snippets": "many", "side": -1}')
    compared = named([read_run(folder), read_run(tmp_path / "torn")])
    early = result(compared[0])
    assert (early.map, early.so_far, early.finished) == (0.25, True, False)
    text = comparison(compared)
    assert not Checker(text).wrong
    assert "25.00 so far" in text and "No joint step was logged." in text and "No run was evaluated." in text


def test_runs_that_were_evaluated_on_other_segments_are_told(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_run(tmp_path / name)
    assert "not evaluated on the same segments" not in comparison(named([read_run(tmp_path / "a")] * 2))
    content = json.loads((tmp_path / "b" / "ground_truth.json").read_text())
    content["database"] = dict(reversed(content["database"].items()))
    (tmp_path / "b" / "ground_truth.json").write_text(json.dumps(content))
    text = comparison(named([read_run(tmp_path / name) for name in ("a", "b")]))
    assert "not evaluated on the same segments" not in text
    content["database"]["v_3"]["annotations"].pop()
    (tmp_path / "b" / "ground_truth.json").write_text(json.dumps(content))
    text = comparison(named([read_run(tmp_path / name) for name in ("a", "b")]))
    assert "their mAPs do not compare: a on 30 of 20 videos, b on 29 of 20 videos." in text and not Checker(text).wrong


def test_runs_whose_averages_are_over_other_thresholds_are_told(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_run(tmp_path / name)
    assert "do not compare" not in comparison(named([read_run(tmp_path / name) for name in ("a", "b")]))
    content = json.loads((tmp_path / "b" / "metrics.json").read_text())
    content["map_by_tiou"] = {"0.5": 0.3542}
    (tmp_path / "b" / "metrics.json").write_text(json.dumps(content))
    text = comparison(named([read_run(tmp_path / name) for name in ("a", "b")]))
    assert "being over other thresholds: a tIoU 0.3 to 0.5 in steps of 0.2, b at tIoU 0.5." in text


def test_files_of_a_run_that_cannot_be_read_are_told(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_run(tmp_path / name)
    (tmp_path / "b" / "metrics.json").write_text('{"average_map": 0.5')
    text = comparison(named([read_run(tmp_path / name) for name in ("a", "b")]))
    assert "b: metrics.json cannot be read (" in text and "a: " not in text and not Checker(text).wrong


def test_what_cannot_be_compared_ends_in_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = write_run(tmp_path / "run")
    with pytest.raises(InputError, match="two run folders or more"):
        write_comparison([run], tmp_path / "c.html")
    for argv, said in (
        (["--compare", str(run), f"{run}/../run"], "is named twice"),
        (["--compare", str(run), str(tmp_path / "absent")], "absent: not a run folder"),
        (["--out", "x.html", str(run)], "--out goes with --compare"),
        ([], "RUN is missing"),
        (["--comparison", str(run)], "perhaps you meant --compare"),
    ):
        assert main(argv) == 2
        assert said in capsys.readouterr().err
    assert not (tmp_path / "c.html").exists() and not (run / "report.html").exists()


def test_the_command_writes_where_it_is_asked_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = [str(write_run(tmp_path / name)) for name in ("a", "b")]
    monkeypatch.chdir(tmp_path)
    assert main(["--compare", *runs]) == 0
    assert main(["--compare", *runs, "--out", "other.html"]) == 0
    assert capsys.readouterr().out == "comparison.html\nother.html\n"
    assert Path("comparison.html").read_text() == Path("other.html").read_text()

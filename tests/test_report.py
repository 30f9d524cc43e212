"""The report of a run folder: whole, torn, resumed, over its budget, long, and with hostile names."""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lofi_fast.errors import InputError
from lofi_fast.report import main
from lofi_fast.report.figures import PALETTE, memory_axis, panels, thin
from lofi_fast.report.page import page, write_report
from lofi_fast.report.read import (
    FILES,
    GroundTruthFile,
    MetricsFile,
    PredictionsFile,
    Segment,
    Steps,
    TruthVideo,
    read_log,
    read_run,
)
from lofi_fast.report.rows import Bar, headline, lanes, notes, plan_rows, rung_rows, state, timelines
from lofi_fast.run import events

BUDGET = 11_000_000_000
HOSTILE = 'jump & <script>alert("1")</script>'
CLASSES = (HOSTILE, "throw", "spin")
RUNGS = {"spatial": (100, 112), "temporal": (25, 224), "spatio_temporal": (50, 158)}
TIMES = "\N{MULTIPLICATION SIGN}"
VOID = {"meta", "br", "hr", "img", "link", "input"}


class Lines:
    """log.jsonl in the making, a second between events."""

    def __init__(self) -> None:
        self.now = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)
        self.lines: list[str] = []

    def add(self, event: events.Event) -> None:
        self.now += timedelta(seconds=1)
        line = json.loads(events.encode(event))
        self.lines.append(json.dumps(line | {"time": self.now.isoformat(timespec="milliseconds")}))

    def start(self, budget: int = BUDGET) -> None:
        self.now += timedelta(hours=1)  # between two sittings: not time of the run
        self.add(
            events.Start(
                device="CPU, 2 cores", precision="float32", optimizers="torch", budget=budget, available=2 * budget,
                argv=["--x"],
            )
        )  # fmt: skip

    def joint(
        self, epoch: int, step: int, *, loss: float = 2.0, peak: int = 9_000_000_000, budget: int = BUDGET, **more: Any
    ) -> None:
        pattern = tuple(RUNGS)[epoch % 3]
        self.add(
            events.Step(
                stage="joint", epoch=epoch, step=step, pattern=pattern, lr=0.1, peak=peak, budget=budget,
                num_snippets=RUNGS[pattern][0], side=RUNGS[pattern][1], videos=["v"], loss=loss,
                terms={name: loss / 4 for name in ("boundary", "regression", "confidence", "classes")}, **more,
            )
        )  # fmt: skip

    def measured(self, plan: str, candidate: str, peak: int | None, budget: int = BUDGET) -> None:
        self.add(events.Measured(plan=plan, candidate=candidate, peak=peak, budget=budget))

    def planned(self, plan: str, chosen: str, peak: int, budget: int = BUDGET) -> None:
        self.add(events.Planned(plan=plan, chosen=chosen, peak=peak, budget=budget, seconds=2.0))

    def done(self, evaluated: bool = True) -> None:
        if evaluated:
            self.add(
                events.Metrics(
                    average_map=0.4321, map_by_tiou={}, average_precision={}, best_epoch=None, videos=20, segments=30
                )
            )
        self.add(events.Done(seconds=40.0))


def write_run(folder: Path, log: Iterable[str] | None = None) -> Path:
    """A small finished run as train.py leaves it."""
    folder.mkdir(parents=True, exist_ok=True)
    if log is None:
        lines = Lines()
        lines.start()
        lines.add(events.SkippedVideo(video="v_<broken>", path="/data/v.mp4", reason="no video stream"))
        lines.add(events.Data(classes=list(CLASSES), skipped=1))
        lines.measured("pretrain", "64", None)
        lines.measured("pretrain", "32", 6_000_000_000)
        lines.planned("pretrain", "32", 6_000_000_000)
        for step in range(8):
            lines.add(
                events.Step(stage="pretrain", epoch=step // 4, step=step % 4, loss=2 - step / 8, accuracy=step / 8)
            )
        lines.add(events.Epoch(stage="pretrain", epoch=0, accuracy=0.25))
        lines.add(events.Epoch(stage="pretrain", epoch=1, accuracy=0.5))
        for epoch in range(3):
            for step in range(4):
                lines.joint(epoch, step, loss=3 - epoch / 2, peak=9_000_000_000 + 1_000_000 * step)
        for epoch in range(2):
            terms = {"boundary": 1.0, "regression": 0.5}
            lines.add(events.Step(stage="head", epoch=epoch, step=0, lr=0.1, loss=1.5, terms=terms))
            lines.add(events.Validation(stage="head", epoch=epoch, average=0.3 + epoch / 10, map=[0.5, 0.3]))
        lines.done()
        log = lines.lines
    (folder / "log.jsonl").write_text("\n".join(log) + "\n", encoding="utf-8")
    joint = {
        pattern: {"rung": list(rung), "cut": 4.0, "batch": 16, "peak": 9_000_000_000,
                  "measured": [[*rung, 9_000_000_000], [rung[0] + 1, rung[1] + 2, None]]}
        for pattern, rung in RUNGS.items()
    }  # fmt: skip
    truth = {
        f"v_{i}": {
            "subset": "validation",
            "duration": 60.0,
            "annotations": [{"segment": [5.0 * k, 5.0 * k + 4], "label": CLASSES[k % 3]} for k in range(i % 4)],
        }
        for i in range(20)
    }
    found = {
        name: [
            {"segment": [s["segment"][0] + d / 2, s["segment"][1]], "score": 0.9 - d / 5, "label": s["label"]}
            for s in video["annotations"]
            for d in range(4)
        ]
        for name, video in truth.items()
    }
    contents: dict[str, Any] = {
        "config.json": {"preset": "demo", "budget": {"text": "11GB"}, "data": {"videos": "a<b>"}},
        "environment.json": {"device": "CPU, 2 cores", "precision": "float32", "packages": {"torch": "2.13.0"}},
        "plan.json": {"budget": BUDGET, "plans": {"pretrain": {"batch": 32, "peak": 6_000_000_000}, "joint": joint}},
        "metrics.json": {
            "average_map": 0.4321, "map_by_tiou": {"0.3": 0.51, "0.5": 0.3542},
            "average_precision": {name: [0.5, 0.25 + i / 10] for i, name in enumerate(CLASSES)},
            "best_epoch": {"epoch": 1, "average": 0.4}, "videos": 20, "segments": 30,
        },
        "predictions.json": {"version": "lofi_fast", "results": found, "external_data": {}},
        "ground_truth.json": {"version": "lofi_fast", "database": truth},
    }  # fmt: skip
    for name, content in contents.items():
        (folder / name).write_text(json.dumps(content), encoding="utf-8")
    return folder


def render(folder: Path) -> str:
    """The page with the descriptions of its figures in place of the figures."""
    run = read_run(folder)
    shown = {name: panel if isinstance(panel, str) else panel.alt for name, panel in panels(run).items()}
    return page(run, shown, timelines(run.ground_truth, run.predictions))


@pytest.fixture(scope="module")
def reported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_run(tmp_path_factory.mktemp("runs") / "demo run")
    assert write_report(folder) == folder / "report.html"
    return folder


class Checker(HTMLParser):
    """Collects what must hold of a page: every element closed in its turn, ids, images' descriptions, references."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.wrong: list[str] = []
        self.ids: list[str] = []
        self.undescribed = 0
        self.tags: set[str] = set()
        self.references: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        self.tags.add(tag)
        if tag not in VOID:
            self.open.append(tag)
        self._look(tag, given)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._look(tag, dict(attrs))

    def handle_endtag(self, tag: str) -> None:
        if not self.open or self.open.pop() != tag:
            self.wrong.append(f"</{tag}> at {self.getpos()}")

    def _look(self, tag: str, given: dict[str, str | None]) -> None:
        self.ids += [value or "" for name, value in given.items() if name == "id"]
        self.references += [value or "" for name, value in given.items() if name in ("src", "href", "xlink:href")]
        if tag == "svg" and not given.get("aria-label") and given.get("aria-hidden") != "true":
            self.undescribed += 1


def test_page_is_whole_and_self_contained(reported: Path) -> None:
    text = (reported / "report.html").read_text(encoding="utf-8")
    checked = Checker(text)
    assert not checked.wrong and not checked.open
    assert len(checked.ids) == len(set(checked.ids)) > 0
    assert not checked.undescribed
    assert not checked.tags & {"script", "link", "iframe", "img"}
    assert "http" not in text and "@import" not in text
    assert all(reference[1:] in checked.ids for reference in checked.references)  # "#id": within the page
    assert set(re.findall(r"url\(#([^)]+)\)", text)) <= set(checked.ids)
    assert text.count('class="plot"') == 8


def test_page_says_the_numbers(reported: Path) -> None:
    text = (reported / "report.html").read_text(encoding="utf-8")
    top = text[: text.index("<h2>")]
    for words in ("43.21 %", "tIoU 0.3 to 0.5", "20 videos, 30 segments", "11.00 GB", "10.24 GiB", "9.00 GB",
                  "81.8 % of the budget, in a joint step", "CPU, 2 cores", "float32", "33 s"):  # fmt: skip
        assert words in top, words
    for words in ("51.000", "35.420", "43.210", f"100 snippets {TIMES} 112 px",
                  f"101 snippets {TIMES} 114 px: out of memory",
                  "64 clips: out of memory", "9.00 GB in 4 steps", "8 of 20 videos", "no video stream", "2.13.0",
                  "--mem-budget 11GB", "Loss over 12 joint steps: from 3.000 to 2.000."):  # fmt: skip
        assert words in text, words


def test_names_are_escaped(reported: Path) -> None:
    text = (reported / "report.html").read_text(encoding="utf-8")
    assert "<script" not in text and "v_<broken>" not in text and "a<b>" not in text
    assert "jump &amp; &lt;script&gt;" in text and "v_&lt;broken&gt;" in text


NAMES = ("$\\frac{$", "_hidden", "\u8df3\u8dc3", "\udcff", "", "a" * 300, "{x}%s")


def test_any_name_can_be_drawn(tmp_path: Path) -> None:
    """Names that a font, a formula parser, a legend or an encoder stumbles over."""
    item = {"segment": [1, 2], "score": 0.5}
    named = {name: {"duration": 9, "annotations": [item | {"label": name}]} for name in NAMES}
    for name, content in (("ground_truth.json", {"database": named}),
                          ("predictions.json", {"results": {n: v["annotations"] for n, v in named.items()}}),
                          ("metrics.json", {"average_precision": {name: [0.5] for name in NAMES}})):  # fmt: skip
        (tmp_path / name).write_text(json.dumps(content))
    text = write_report(tmp_path).read_text(encoding="utf-8")
    assert not Checker(text).wrong
    assert all(name in text for name in NAMES if name != "\udcff")


def test_png_is_there(reported: Path) -> None:
    content = (reported / "report.png").read_bytes()
    assert content.startswith(b"\x89PNG\r\n\x1a\n")
    width, height = (int.from_bytes(content[i : i + 4], "big") for i in (16, 20))
    assert width == 1300 and height > 1300


def test_same_folder_same_page(reported: Path) -> None:
    before = (reported / "report.html").read_bytes()
    assert write_report(reported).read_bytes() == before


@pytest.mark.parametrize("name", FILES)
def test_says_which_file_is_missing(tmp_path: Path, name: str) -> None:
    folder = write_run(tmp_path)
    (folder / name).unlink()
    text = render(folder)
    assert f"{name} is not there" in text
    assert not Checker(text).wrong


@pytest.mark.parametrize("name", FILES)
def test_one_file_alone_makes_a_page(tmp_path: Path, name: str) -> None:
    folder = write_run(tmp_path)
    for other in set(FILES) - {name}:
        (folder / other).unlink()
    text = render(folder)
    assert text.count("is not there") == len(FILES) - 1
    assert not Checker(text).wrong


def test_a_finished_run_stays_finished_where_resuming_it_was_refused(tmp_path: Path) -> None:
    lines = Lines()
    lines.start()
    lines.joint(0, 0)
    lines.done()
    before = read_log(lines.lines)
    lines.start(budget=1)
    lines.add(events.SkippedVideo(video="v_1", path="/elsewhere/v_1.mp4", reason="no video file of this name"))
    refused = read_log(lines.lines)
    assert before.finished and refused.finished
    assert (refused.starts, refused.skipped) == (before.starts, before.skipped)
    lines.joint(0, 1)
    going_on = read_log(lines.lines)
    assert not going_on.finished and len(going_on.starts) == 2 and len(going_on.skipped) == 1


def test_run_killed_early(tmp_path: Path) -> None:
    lines = Lines()
    lines.start()
    lines.joint(0, 0, loss=math.nan)
    (tmp_path / "log.jsonl").write_text("\n".join(lines.lines)[:-3], encoding="utf-8")
    text = write_report(tmp_path).read_text(encoding="utf-8")
    assert "Not finished" in text and "1 torn or unreadable line" in text and "No joint step was logged" in text
    assert not list(tmp_path.glob("*.partial"))


BROKEN_PLANS = (
    "", "{", "[1, 2]", "null", '{"budget": []}', '{"plans": {"joint": [3]}}',
    '{"plans": {"joint": {"x": {"rung": ["a", null], "measured": [7]}}}}',
)  # fmt: skip


@pytest.mark.parametrize("content", BROKEN_PLANS)
def test_broken_plan_file(tmp_path: Path, content: str) -> None:
    folder = write_run(tmp_path)
    (folder / "plan.json").write_text(content, encoding="utf-8")
    assert "The plan: what was chosen" in render(folder)  # from the log


def test_not_a_run_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for folder in (tmp_path, tmp_path / "absent"):
        with pytest.raises(InputError, match="not a run folder"):
            write_report(folder)
        assert main([str(folder)]) == 2
        assert capsys.readouterr().err.startswith(f"error: {folder}: not a run folder")
    assert not list(tmp_path.iterdir())


def test_failing_write_keeps_the_old_report(tmp_path: Path) -> None:
    folder = write_run(tmp_path, ['{"event": "start"}'])
    for name in ("report.png", "report.html"):
        (folder / name).write_text("old")
    (folder / f"report.png.{os.getpid()}.partial").mkdir()  # in the way of the temporary file
    with pytest.raises(InputError, match=r"report\.png: cannot write .*python -m lofi_fast\.report"):
        write_report(folder)
    assert (folder / "report.html").read_text() == (folder / "report.png").read_text() == "old"


def test_a_clock_that_is_set_back_takes_no_time_away() -> None:
    lines = Lines()
    lines.start()
    lines.joint(0, 0)
    lines.now -= timedelta(hours=3)
    lines.joint(0, 1)
    lines.joint(0, 2)
    assert read_log(lines.lines).seconds == {"joint": 2.0}


def test_resumed_run_counts_the_later_step() -> None:
    lines = Lines()
    lines.start()
    for step in range(6):
        lines.joint(0, step, loss=1.0)
    lines.joint(1, 0, loss=1.0)
    lines.start()  # back to the checkpoint after step 2
    for step in range(3, 5):
        lines.joint(0, step, loss=7.0)
    log = read_log(lines.lines)
    assert log.steps["joint"]["step"].tolist() == [0, 1, 2, 3, 4]
    assert log.steps["joint"]["loss"].tolist() == [1, 1, 1, 7, 7]
    assert len(log.starts) == 2
    assert log.seconds == {"joint": 9.0}  # the hour between the sittings is not the run's


@pytest.mark.parametrize("cut", [1, 20, 60])
def test_event_appended_to_a_torn_line_is_found(cut: int) -> None:
    lines = Lines()
    lines.start()
    for step in range(3):
        lines.joint(0, step)
    torn = lines.lines.pop()[:cut]
    lines.start()
    lines.lines[-1] = torn + lines.lines[-1]
    lines.joint(0, 2, loss=5.0)
    log = read_log(lines.lines)
    assert len(log.starts) == 2 and log.unreadable == 1
    assert log.steps["joint"]["loss"].tolist() == [2, 2, 5]


def test_validations_by_another_measure_are_left_out_and_told(tmp_path: Path) -> None:
    """As after a resume with another --tiou: the averages of before stand beside none, and are no best so far."""
    lines = Lines()
    lines.start()
    for epoch, average, measure in ((0, 0.9, "--tiou 0.1"), (1, 0.8, "--tiou 0.1"), (2, 0.4, "--tiou 0.5"),
                                    (3, 0.3, "--tiou 0.5")):  # fmt: skip
        if epoch == 2:
            lines.start()
        lines.add(events.Validation(stage="head", epoch=epoch, average=average, map=[average], measure=measure))
    run = replace(read_run(write_run(tmp_path / "run", lines.lines)), metrics=MetricsFile())
    assert [one.epoch for one in run.log.validations] == [2, 3]
    assert "The validations of 2 epochs were scored at other thresholds than the last one (--tiou 0.5)" in " ".join(
        notes(run)
    )
    assert (headline(run)[0].name, headline(run)[0].value) == ("average mAP so far", "40.00 %")


def test_validations_of_logs_that_name_no_measure_are_told_apart_by_how_many_thresholds_they_have() -> None:
    lines = Lines()
    lines.start()
    for epoch, values in enumerate(([0.5, 0.4], [0.5, 0.4], [0.5])):
        lines.add(events.Validation(stage="head", epoch=epoch, average=0.45, map=list(values)))
    log = read_log(lines.lines)
    assert ([one.epoch for one in log.validations], log.validated_otherwise) == ([2], 2)


def test_skipped_videos_are_those_of_the_last_sitting() -> None:
    lines = Lines()
    for videos in (("a", "b"), ("b",)):
        lines.start()
        for video in videos:
            lines.add(events.SkippedVideo(video=video, path="p", reason="zero bytes"))
    assert [event.video for event in read_log(lines.lines).skipped] == ["b"]


def test_peak_over_the_budget_warns(tmp_path: Path) -> None:
    lines = Lines()
    lines.start()
    lines.joint(0, 0, peak=BUDGET + 1_000_000_000)
    lines.joint(0, 1, peak=BUDGET)
    lines.measured("joint, spatial", "x", BUDGET + 1)
    lines.planned("joint, spatial", "x", BUDGET + 1)  # says that reading again
    lines.start(budget=20_000_000_000)
    lines.joint(0, 2, peak=15_000_000_000, budget=20_000_000_000)  # within the budget of its own sitting
    folder = write_run(tmp_path, lines.lines)
    run = read_run(folder)
    assert run.log.over == 2
    peak = next(tile for tile in headline(run) if tile.name == "highest peak")
    assert (peak.value, peak.warns) == ("15.00 GB", True) and "75.0 % of the budget" in peak.note
    assert "2 measured peak(s) lie above the budget" in render(folder)


def test_plans_join_the_file_and_the_log(tmp_path: Path) -> None:
    lines = Lines()
    lines.start()
    lines.measured("pretrain, clips a step", "64", None)
    lines.measured("pretrain, clips a step", "32", 6_000_000_000)
    lines.planned("pretrain, clips a step", "32", 6_000_000_000)
    lines.measured("features, snippets at once", "64", None)
    lines.measured("features, snippets at once", "32", 5_000_000_000)
    lines.planned("features, snippets at once", "32", 5_000_000_000)
    folder = write_run(tmp_path, lines.lines)
    rows = {row.name: row for row in plan_rows(read_run(folder))}
    assert list(rows) == ["pretrain", *(f"joint, {p}" for p in RUNGS), "features, snippets at once"]
    assert rows["joint, temporal"].chosen == "25 snippets x 224 px"
    assert rows["joint, temporal"].others == (("26 snippets x 226 px", None),)
    assert rows["features, snippets at once"].others == (("64", None),)
    assert rows["features, snippets at once"].peak == 5_000_000_000
    assert rows["features, snippets at once"].size("32") == "32 snippets at once"
    assert rows["pretrain"].others == (("64 clips", None),)


def test_a_number_that_no_float_holds_is_a_gap(tmp_path: Path) -> None:
    lines = Lines()
    lines.start()
    for step in range(3):
        lines.joint(0, step)
    lines.lines[-1] = lines.lines[-1].replace('"peak": 9000000000', f'"peak": {10**400}')
    (tmp_path / "log.jsonl").write_text("\n".join(lines.lines))
    peaks = read_run(tmp_path).log.steps["joint"]["peak"]
    assert peaks[:2].tolist() == [9e9, 9e9] and math.isnan(peaks[2])
    write_report(tmp_path)


def test_long_log_is_thinned(tmp_path: Path) -> None:
    sizes = []
    for num_steps in (3_000, 30_000):
        lines = Lines()
        lines.start()
        for i in range(num_steps):
            lines.joint(i // 1000, i % 1000, loss=2 + math.sin(i), peak=9_000_000_000 + i % 7)
        lines.joint(num_steps // 1000, 0, peak=10_999_000_000)
        folder = tmp_path / str(num_steps)
        folder.mkdir()
        (folder / "log.jsonl").write_text("\n".join(lines.lines))
        run = read_run(folder)
        text = page(run, panels(run), [])
        assert f"of {num_steps + 1} joint steps: 9.00 GB to 11.00 GB" in text
        sizes.append(len(text))
    assert sizes[1] < 1.2 * sizes[0] < 600_000


def test_thin_keeps_every_peak() -> None:
    values = np.zeros(10_000)
    values[[17, 9_999]] = 5, 9
    values[300:400] = math.nan
    index, least, mean, greatest = thin(values, 100)
    assert len(index) == len(least) == len(mean) == len(greatest) == 100
    assert greatest[0] == 5 and greatest[-1] == 9 and mean[0] == 0.05 and least[0] == 0
    assert np.flatnonzero(np.isnan(mean)).tolist() == np.flatnonzero(np.isnan(greatest)).tolist() == [3]
    assert index[0] == 49.5 and index[-1] == 9949.5


@pytest.mark.parametrize("count", [0, 1, 5])
def test_thin_leaves_a_short_curve(count: int) -> None:
    values = np.arange(count, dtype=np.float64)
    assert all(part.tolist() == values.tolist() for part in thin(values, 5))


def test_timelines_show_segments_above_the_best_detections() -> None:
    truth = {f"v{i:02d}": TruthVideo(50, [Segment((1, 9), "a")]) for i in range(30)}
    truth["empty"] = TruthVideo(50)
    items = [Segment((k, k + 20), "a", k / 30) for k in range(30)]
    rows = timelines(GroundTruthFile(truth), PredictionsFile({name: items for name in truth}))
    assert [row.video for row in rows] == ["v01", "v05", "v09", "v13", "v16", "v20", "v24", "v28"]
    assert [(bar.start, bar.end, bar.lane) for bar in rows[0].truth] == [(1, 9, 0)]
    assert [bar.start for bar in rows[0].found] == [29, 28, 27, 26, 25]  # all overlap: the best of each of 5 lanes
    assert rows[0].left_out == 25
    assert not timelines(GroundTruthFile(), PredictionsFile())
    assert len(timelines(GroundTruthFile(truth), PredictionsFile())) == 8


@settings(max_examples=60)
@given(st.lists(st.tuples(st.integers(0, 50), st.integers(0, 20)), max_size=30), st.sampled_from([None, 1, 3]))
def test_lanes_never_overlap(spans: list[tuple[int, int]], most: int | None) -> None:
    bars = [Bar(start, start + length, "a", 1.0, 0) for start, length in spans]
    placed, left_out = lanes(bars, most)
    assert len(placed) + left_out == len(bars) and (most is not None or left_out == 0)
    for lane in {bar.lane for bar in placed}:
        assert most is None or lane < most
        row = sorted((bar.start, bar.end) for bar in placed if bar.lane == lane)
        assert all(end <= start for (_, end), (start, _) in pairwise(row))


def test_page_says_which_epoch_is_reported_and_what_best_means(reported: Path) -> None:
    text = (reported / "report.html").read_text(encoding="utf-8")
    assert "of the final weights, after head epoch 2<" in text
    assert "The best validation was 40.00 %, after epoch 2; checkpoints/best.pt has those weights." in text
    assert text.count("best 40.00") == 1  # marked in the figure; it is the last too


def test_page_of_a_run_that_trains_longer_says_which_epoch_its_numbers_are_of(tmp_path: Path) -> None:
    folder = write_run(tmp_path)
    metrics = json.loads((folder / "metrics.json").read_text())
    (folder / "metrics.json").write_text(json.dumps(metrics | {"epoch": 1}))
    assert "of the final weights, after head epoch 2<" in render(folder)
    lines = Lines()
    lines.start()
    for epoch in range(2, 5):
        lines.add(events.Step(stage="head", epoch=epoch, step=0, lr=0.1, loss=1.5))
    with (folder / "log.jsonl").open("a") as log:
        log.write("\n".join(lines.lines) + "\n")
    text = render(folder)
    assert "of the weights after head epoch 2, and the head trains on since: epoch 5<" in text
    assert "final weights, after" not in text


def test_validation_figure_marks_the_best_and_the_last(tmp_path: Path) -> None:
    lines = Lines()
    lines.start()
    for epoch, average in enumerate((0.2, 0.5, 0.4)):
        lines.add(events.Validation(stage="head", epoch=epoch, average=average, map=[average]))
    text = write_report(write_run(tmp_path, lines.lines)).read_text(encoding="utf-8")
    assert "best 50.00" in text and "last 40.00" in text


@pytest.mark.parametrize(
    ("stages", "evaluated", "done", "words"),
    [
        (["pretrain", "head", "eval"], True, True, "Finished 2026-01-02 04:04 UTC."),
        (
            ["pretrain", "head"],
            False,
            True,
            "--stages did not ask for it. The run's command with --resume --stages eval",
        ),
        (["pretrain", "eval"], False, True, "no validation video has a segment"),
        (
            ["pretrain", "eval"],
            False,
            False,
            "in joint epoch 1, step 1. There are no results yet. The run's command with",
        ),
    ],
    ids=["evaluated", "not_asked_for", "nothing_to_evaluate", "killed"],
)
def test_state_says_what_the_run_is(tmp_path: Path, stages: list[str], evaluated: bool, done: bool, words: str) -> None:
    lines = Lines()
    lines.start()
    lines.joint(0, 0)
    if done:
        lines.done(evaluated)
    folder = write_run(tmp_path, lines.lines)
    (folder / "config.json").write_text(json.dumps({"stages": stages}))
    if not evaluated:
        for name in ("metrics.json", "predictions.json", "ground_truth.json"):
            (folder / name).unlink()
    run = read_run(folder)
    assert words in state(run)
    assert not run.unread  # results that were never due are not missing
    text = render(folder)
    assert "is not there" not in text and not Checker(text).wrong


def test_whatever_terms_the_loss_has_are_drawn(tmp_path: Path) -> None:
    lines = Lines()
    lines.start()
    names = ["actionness", "<offset>", *(f"term {i}" for i in range(9))]
    for step in range(3):
        loss = {name: 0.5 for name in names}
        lines.add(events.Step(stage="head", epoch=0, step=step, loss=5.5, terms=loss | ({"late": 0.1} if step else {})))
    folder = write_run(tmp_path, lines.lines)
    steps = read_run(folder).log.steps["head"]
    assert list(steps.terms) == [*names, "late"]
    assert steps.terms["late"].tolist()[1:] == [0.1, 0.1] and math.isnan(steps.terms["late"][0])
    text = write_report(folder).read_text(encoding="utf-8")
    assert all(name in text for name in (*names[2:], "late", "actionness", "&lt;offset&gt;"))


def trouble(lines: Lines, epoch: int, step: int) -> None:
    lines.add(
        events.OutOfMemory(
            stage="joint", epoch=epoch, step=step, reason="out", peak=None, plan=[8, 8, 1, 0], next=[4, 8, 1, 0],
            limit=BUDGET,
        )
    )  # fmt: skip


def test_steps_that_ran_out_of_memory_or_were_not_finite_are_told(tmp_path: Path) -> None:
    lines = Lines()
    lines.start()
    trouble(lines, 0, 0)
    trouble(lines, 0, 0)
    lines.joint(0, 0)
    trouble(lines, 0, 1)
    lines.joint(0, 1)
    for step, what in ((2, "loss"), (3, "gradient"), (4, "loss")):
        lines.add(
            events.NotFinite(stage="joint", epoch=0, step=step, what=what, videos=["a", "b", "<c>", "d"], in_a_row=1)
        )
    text = render(write_run(tmp_path, lines.lines))
    assert "Memory ran out 3 times, in 2 joint steps; each was taken again" in text
    assert "3 joint steps updated nothing, because a number was not finite (loss: 2, gradient: 1)" in text
    assert "the last was step 5 of epoch 1, with a, b, &lt;c&gt; and others." in text


def test_trouble_of_steps_that_a_resumed_run_took_again_is_not_counted_twice() -> None:
    lines = Lines()
    lines.start()
    for step in (1, 2, 3):
        trouble(lines, 0, step)
        lines.joint(0, step)
    lines.start()  # back to the checkpoint after step 1
    trouble(lines, 0, 2)
    lines.joint(0, 2)
    assert [(event.epoch, event.step) for event in read_log(lines.lines).out_of_memory] == [(0, 1), (0, 2)]


def joint_steps(peaks: Iterable[int], budget: int, predicted: int = 0) -> Steps:
    lines = Lines()
    for step, peak in enumerate(peaks):
        lines.joint(0, step, peak=peak, budget=budget, predicted=predicted)
    return read_log(lines.lines).steps["joint"]


def test_memory_axis_is_fitted_to_the_readings_where_the_budget_is_far_above() -> None:
    low, high, drawn = memory_axis(joint_steps([740_000_000, 770_000_000], 11_000_000_000))
    assert 0.7e9 < low < 0.74e9 and 0.77e9 < high < 0.8e9 and drawn < 11e9


@pytest.mark.parametrize("budget", [10_900_000_000, 9_000_000_000], ids=["above", "exceeded"])
def test_memory_axis_shows_a_budget_that_is_near(budget: int) -> None:
    low, high, drawn = memory_axis(joint_steps([9_800_000_000, 10_000_000_000], budget))
    assert low < 9.8e9 and high > max(budget, 10e9) and drawn >= budget


def test_memory_axis_begins_at_zero_where_readings_differ_much() -> None:
    assert memory_axis(joint_steps([1_000_000_000, 9_000_000_000], 11_000_000_000))[0] == 0


def test_page_says_a_budget_that_is_above_the_axis(tmp_path: Path) -> None:
    lines = Lines()
    lines.start()
    lines.joint(0, 0, peak=1_000_000_000)
    folder = write_run(tmp_path, lines.lines)
    words = "The budget, 11.00 GB, is above this axis: 11 times the highest point."
    assert words in write_report(folder).read_text(encoding="utf-8")
    lines.joint(0, 1, peak=10_000_000_000)
    (folder / "log.jsonl").write_text("\n".join(lines.lines))
    assert "above this axis" not in write_report(folder).read_text(encoding="utf-8")


def test_rungs_show_the_levers_that_steps_ran_with(tmp_path: Path) -> None:
    lines = Lines()
    lines.start()
    for step in range(3):
        lines.joint(0, step, peak=8_000_000_000 + step, micro_batch=2, chunk=8)
    lines.joint(0, 3, peak=5_000_000_000, micro_batch=1, chunk=1, recompute=True)
    lines.joint(1, 0, peak=6_000_000_000, micro_batch=2)
    folder = write_run(tmp_path, lines.lines)
    rows = rung_rows(read_run(folder).log.steps["joint"])
    assert [(row.pattern, row.rung, row.levers, row.steps, row.peak) for row in rows] == [
        ("spatial", "100 snippets x 112 px", "2 videos at once, chunks of 8 snippets", 3, 8_000_000_002),
        ("spatial", "100 snippets x 112 px", "1 video at once, chunks of 1 snippet, recompute", 1, 5_000_000_000),
        ("temporal", "25 snippets x 224 px", "2 videos at once", 1, 6_000_000_000),
    ]
    assert "1 video at once, chunks of 1 snippet, recompute" in render(folder)


def test_every_table_has_as_many_cells_in_a_row_as_in_its_head(reported: Path) -> None:
    text = (reported / "report.html").read_text(encoding="utf-8")
    tables = [table for table in re.findall(r"<table.*?</table>", text, re.DOTALL) if "<thead>" in table]
    assert len(tables) == 6
    for table in tables:
        head, body = table.split("</thead>")
        rows = [len(re.findall("<t[dh][ >]", row)) for row in body.split("<tr>")[1:]]
        assert rows and set(rows) == {len(re.findall("<th[ >]", head))}
        aligned = [' class="n"' in cell for cell in re.findall("<th(?: [^>]*)?>", head)]
        for row in body.split("<tr>")[1:]:
            assert [bool(re.search(r'class="n\b', cell)) for cell in re.findall("<t[dh](?: [^>]*)?>", row)] == aligned


def test_cells_of_a_table_that_a_phone_stacks_carry_their_columns_name(reported: Path) -> None:
    text = (reported / "report.html").read_text(encoding="utf-8")
    stacked = re.findall(r'<table class="stacked">.*?</table>', text, re.DOTALL)
    assert len(stacked) == 3
    for table in stacked:
        names = re.findall(r"<th[^>]*>([^<]*)</th>", table.partition("</thead>")[0])
        for row in table.partition("</thead>")[2].split("<tr>")[1:]:
            assert re.findall(r'data-label="([^"]*)"', row) == names[1:]


def test_light_colours_of_the_page_are_those_of_the_figures(reported: Path) -> None:
    style = (reported / "report.html").read_text(encoding="utf-8").partition("</style>")[0]
    light = style.partition("@media")[0]
    assert tuple(re.findall(r"--c\d: (#[0-9a-f]{6})", light)) == PALETTE


@pytest.mark.parametrize("room", ["read", "rows", "figures", "page"])
def test_reading_imports_no_plotting(room: str) -> None:
    """What the training process imports at its start counts against its budget."""
    code = f"import sys, lofi_fast.report.{room}; sys.exit('matplotlib' in sys.modules or 'torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0

"""The report of a run folder: whole, torn, resumed, over its budget, long, and with hostile names."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
from collections.abc import Iterable
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
from lofi_fast.report.page import (
    FILES,
    Bar,
    _lanes,
    headline,
    main,
    page,
    panels,
    plan_rows,
    read_log,
    read_run,
    thin,
    timelines,
    write_report,
)

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

    def add(self, kind: str, **fields: Any) -> None:
        self.now += timedelta(seconds=1)
        self.lines.append(json.dumps({"time": self.now.isoformat(timespec="milliseconds"), "event": kind, **fields}))

    def start(self, budget: int = BUDGET) -> None:
        self.now += timedelta(hours=1)  # between two sittings: not time of the run
        self.add("start", device="CPU, 2 cores", precision="float32", budget=budget, available=2 * budget, argv=["--x"])

    def joint(
        self, epoch: int, step: int, *, loss: float = 2.0, peak: int = 9_000_000_000, budget: int = BUDGET
    ) -> None:
        pattern = tuple(RUNGS)[epoch % 3]
        terms = {name: loss / 4 for name in ("boundary", "regression", "confidence", "classes")}
        self.add(
            "step", stage="joint", epoch=epoch, step=step, pattern=pattern, lr=0.1, peak=peak, budget=budget,
            num_snippets=RUNGS[pattern][0], side=RUNGS[pattern][1], videos=["v"], loss=loss, **terms,
        )  # fmt: skip


def write_run(folder: Path, log: Iterable[str] | None = None) -> Path:
    """A small finished run as train.py leaves it."""
    folder.mkdir(parents=True, exist_ok=True)
    if log is None:
        lines = Lines()
        lines.start()
        lines.add("skipped", video="v_<broken>", path="/data/v.mp4", reason="no video stream")
        lines.add("data", classes=list(CLASSES), skipped=1)
        lines.add("measured", plan="pretrain", candidate="64", peak=None, budget=BUDGET)
        lines.add("measured", plan="pretrain", candidate="32", peak=6_000_000_000, budget=BUDGET)
        lines.add("plan", plan="pretrain", chosen="32", peak=6_000_000_000, budget=BUDGET, seconds=2.0)
        for step in range(8):
            lines.add("step", stage="pretrain", epoch=step // 4, step=step % 4, loss=2 - step / 8, accuracy=step / 8)
        lines.add("epoch", stage="pretrain", epoch=0, accuracy=0.25)
        lines.add("epoch", stage="pretrain", epoch=1, accuracy=0.5)
        for epoch in range(3):
            for step in range(4):
                lines.joint(epoch, step, loss=3 - epoch / 2, peak=9_000_000_000 + 1_000_000 * step)
        for epoch in range(2):
            lines.add("step", stage="head", epoch=epoch, step=0, lr=0.1, loss=1.5, boundary=1.0, regression=0.5)
            lines.add("validation", stage="head", epoch=epoch, average=0.3 + epoch / 10, map=[0.5, 0.3])
        lines.add("metrics", average_map=0.4321)
        lines.add("done", seconds=40.0)
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
    record = read_run(folder)
    shown = {name: panel if isinstance(panel, str) else panel.alt for name, panel in panels(record).items()}
    return page(record, shown, timelines(record.ground_truth, record.predictions))


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
    (folder / "report.png.partial").mkdir()  # in the way of the temporary file
    with pytest.raises(InputError, match=r"report\.png: cannot write"):
        write_report(folder)
    assert (folder / "report.html").read_text() == (folder / "report.png").read_text() == "old"


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


def test_skipped_videos_are_those_of_the_last_sitting() -> None:
    lines = Lines()
    for videos in (("a", "b"), ("b",)):
        lines.start()
        for video in videos:
            lines.add("skipped", video=video, path="p", reason="zero bytes")
    assert [event["video"] for event in read_log(lines.lines).skipped] == ["b"]


def test_peak_over_the_budget_warns(tmp_path: Path) -> None:
    lines = Lines()
    lines.start()
    lines.joint(0, 0, peak=BUDGET + 1_000_000_000)
    lines.joint(0, 1, peak=BUDGET)
    lines.add("measured", plan="joint, spatial", candidate="x", peak=BUDGET + 1, budget=BUDGET)
    lines.add("plan", plan="joint, spatial", chosen="x", peak=BUDGET + 1, budget=BUDGET)  # says that reading again
    lines.start(budget=20_000_000_000)
    lines.joint(0, 2, peak=15_000_000_000, budget=20_000_000_000)  # within the budget of its own sitting
    folder = write_run(tmp_path, lines.lines)
    record = read_run(folder)
    assert record.log.over == 2
    peak = next(tile for tile in headline(record) if tile.name == "highest peak")
    assert (peak.value, peak.warns) == ("15.00 GB", True) and "75.0 % of the budget" in peak.note
    assert "2 measured peak(s) lie above the budget" in render(folder)


def test_plans_join_the_file_and_the_log(tmp_path: Path) -> None:
    lines = Lines()
    lines.start()
    lines.add("measured", plan="features, snippets at once", candidate="64", peak=None, budget=BUDGET)
    lines.add("measured", plan="features, snippets at once", candidate="32", peak=5_000_000_000, budget=BUDGET)
    lines.add("plan", plan="features, snippets at once", chosen="32", peak=5_000_000_000, budget=BUDGET)
    folder = write_run(tmp_path, lines.lines)
    rows = {row.name: row for row in plan_rows(read_run(folder))}
    assert list(rows) == ["pretrain", *(f"joint, {p}" for p in RUNGS), "features, snippets at once"]
    assert rows["joint, temporal"].chosen == "25 snippets x 224 px"
    assert rows["joint, temporal"].others == (("26 snippets x 226 px", None),)
    assert rows["features, snippets at once"].others == (("64", None),)
    assert rows["features, snippets at once"].peak == 5_000_000_000


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
        record = read_run(folder)
        text = page(record, panels(record), [])
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
    truth = {f"v{i:02d}": {"duration": 50, "annotations": [{"segment": [1, 9], "label": "a"}]} for i in range(30)}
    truth["empty"] = {"duration": 50, "annotations": []}
    items = [{"segment": [k, k + 20], "score": k / 30, "label": "a"} for k in range(30)]
    rows = timelines({"database": truth}, {"results": {name: items for name in truth}})
    assert [row.video for row in rows] == ["v01", "v05", "v09", "v13", "v16", "v20", "v24", "v28"]
    assert [(bar.start, bar.end, bar.lane) for bar in rows[0].truth] == [(1, 9, 0)]
    assert [bar.start for bar in rows[0].found] == [29, 28, 27, 26, 25]  # all overlap: the best of each of 5 lanes
    assert rows[0].left_out == 25
    assert not timelines({}, {}) and len(timelines({"database": truth}, {})) == 8


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 50), st.integers(0, 20)), max_size=30), st.sampled_from([None, 1, 3]))
def test_lanes_never_overlap(spans: list[tuple[int, int]], most: int | None) -> None:
    bars = [Bar(start, start + length, "a", 1.0, 0) for start, length in spans]
    placed, left_out = _lanes(bars, most)
    assert len(placed) + left_out == len(bars) and (most is not None or left_out == 0)
    for lane in {bar.lane for bar in placed}:
        assert most is None or lane < most
        row = sorted((bar.start, bar.end) for bar in placed if bar.lane == lane)
        assert all(end <= start for (_, end), (start, _) in pairwise(row))


def test_reading_imports_no_plotting() -> None:
    """What the training process imports at its start counts against its budget."""
    code = "import sys, lofi_fast.report.page; sys.exit('matplotlib' in sys.modules or 'torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0

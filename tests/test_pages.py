"""The pages of reports in a headless Chromium: opened wide and narrow, light and dark, and clicked."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path

import pytest
from browser import Browser, chromium
from PIL import Image
from test_report import HOSTILE, write_run

from lofi_fast.files import json_bytes
from lofi_fast.report.compare import write_comparison
from lofi_fast.report.page import write_report
from lofi_fast.run.moments import FILE, Moment, Moments

PHONE, DESKTOP = 390, 1200  # pixels
DARK, LIGHT = "rgb(18, 21, 25)", "rgb(255, 255, 255)"
GROUND = "getComputedStyle(document.body).backgroundColor"
SCROLLS = "document.documentElement.scrollWidth > innerWidth"


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    program = chromium()
    if program is None:
        pytest.skip("no Chromium on this machine (apt-get install chromium)")
    with Browser(program, tmp_path_factory.mktemp("profile")) as opened:
        yield opened


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two run folders, the first with pictures of moments."""
    folder = tmp_path_factory.mktemp("runs")
    made = [
        write_run(folder / name) for name in ("first", "second one with a name that is as long as any name may get")
    ]
    strip = io.BytesIO()
    Image.new("RGB", (388, 72), "teal").save(strip, "JPEG")
    note = "the nearest is 1.0 to 2.0 s, score 0.01, tIoU 0.30"
    shown = [
        Moment("found", "v_1", 1, 2, HOSTILE, "tIoU 0.80", 0.9, strip.getvalue()),
        Moment("missed", "v_2" + "x" * 80, 1, 2, "throw", note, None, strip.getvalue()),
        Moment("missed", "v_3", 1, 2, "throw", "nothing was found there"),
    ]
    moments = Moments(0.5, {"found": 1, "missed": 2, "wrong": 0}, shown)
    (made[0] / FILE).write_bytes(json_bytes(moments))
    for run in made:
        write_report(run)
    return made


@pytest.fixture(scope="module")
def compared(runs: list[Path]) -> Path:
    return write_comparison(runs, runs[0].parent / "comparison.html")


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [PHONE, DESKTOP])
def test_pages_open_without_complaint_and_fit_the_screen(
    browser: Browser, runs: list[Path], compared: Path, width: int, dark: bool
) -> None:
    for page in (runs[0] / "report.html", compared):
        browser.open(page, width, dark=dark)
        browser.evaluate("document.querySelectorAll('details').forEach(d => d.open = true)")
        assert browser.evaluate(SCROLLS) is False, page.name
        assert browser.evaluate(GROUND) == (DARK if dark else LIGHT)
        assert browser.evaluate("[...document.images].filter(i => !i.complete || !i.naturalWidth).length") == 0
    assert browser.errors == []


def test_pictures_of_moments_are_shown(browser: Browser, runs: list[Path]) -> None:
    browser.open(runs[0] / "report.html", PHONE)
    assert browser.evaluate("document.images.length") == 2
    assert browser.evaluate("document.images[0].naturalWidth") == 388
    text = browser.evaluate("document.querySelector('.moments').parentElement.innerText")
    assert "1 segments were found and 2 missed, and 0 detections were wrong" in text
    assert HOSTILE in text and "None." in text and "nothing was found there" in text
    browser.open(runs[1] / "report.html", PHONE)
    assert browser.evaluate("document.images.length") == 0
    assert "No pictures: the run was not evaluated" in browser.evaluate("document.body.innerText")


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_the_colours_can_be_chosen_whatever_the_system_prefers(browser: Browser, runs: list[Path], dark: bool) -> None:
    browser.open(runs[0] / "report.html", DESKTOP, dark=dark)
    for theme, colour in (("dark", DARK), ("light", LIGHT), ("auto", DARK if dark else LIGHT)):
        browser.click(f"label[for=theme-{theme}]")
        assert browser.evaluate(GROUND) == colour
    assert browser.errors == []


def test_a_folded_table_opens_when_it_is_clicked(browser: Browser, runs: list[Path]) -> None:
    browser.open(runs[0] / "report.html", DESKTOP)
    assert browser.evaluate("document.querySelector('details').open") is False
    browser.click("details summary")
    assert browser.evaluate("document.querySelector('details').open") is True


def test_a_run_of_a_comparison_is_hidden_and_shown_again(browser: Browser, compared: Path) -> None:
    browser.open(compared, DESKTOP)
    seen = "[...document.querySelectorAll(`{}`)].filter(e => getComputedStyle(e).display != 'none').length"
    curves, rows = seen.format('[id$="-run1"]'), seen.format("tr.run1")
    assert (browser.evaluate(curves), browser.evaluate(rows)) == (5, 1)
    browser.click("label[for=show1]")
    assert (browser.evaluate(curves), browser.evaluate(rows)) == (0, 0)
    assert browser.evaluate(seen.format("tr.run0")) == 1, "the other one stays"
    browser.click("label[for=show1]")
    assert (browser.evaluate(curves), browser.evaluate(rows)) == (5, 1)
    assert browser.errors == []

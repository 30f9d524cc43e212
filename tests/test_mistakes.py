"""What people mistype, swap and forget: each gets one sentence that says what, where and what to change, at once, and
nothing on the disk changes. Mistakes of one command alone stand in that command's tests.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from patience import PATIENCE

from lofi_fast import __main__ as program
from lofi_fast import __version__
from lofi_fast.data.given import paths_of
from lofi_fast.errors import InputError
from lofi_fast.model_file import MODEL

ROOT = Path(__file__).resolve().parents[1]
Captured = pytest.CaptureFixture[str]
DATA = ["--annotations", "labels.csv", "--videos", "videos"]
EVALUATE = ["evaluate", "--ground-truth", "labels.csv", "--tiou", "thumos"]


@pytest.fixture
def desk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder to work in: labels, videos that are none, a run that is none."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "videos").mkdir()
    (tmp_path / "videos" / "a.mp4").write_bytes(b"\0\0\0\x18ftypmp42" + bytes(2_000_000))
    (tmp_path / "videos" / "b.mp4").write_bytes(b"\0\0\0\x18ftypmp42")
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("a file")
    (tmp_path / "labels.csv").write_text("video,start,end,label\na,1,2,run\nb,1,2,run\n")
    (tmp_path / "headless.csv").write_text("a,1,2,run\n")
    (tmp_path / "runs" / "x" / "checkpoints").mkdir(parents=True)
    (tmp_path / "runs" / "x" / MODEL).write_bytes(b"half")
    (tmp_path / "runs" / "x" / "predictions.json").write_text('{"results": {}}')
    (tmp_path / "runs" / "x" / "config.json").write_text("{}")
    return tmp_path


MISTAKES = [
    # a flag of another program, or one that several stages have
    (["train", "--epochs", "3"], "--epochs is no flag", "--pretrain-epochs or --joint-epochs or --head-epochs"),
    (["train", "--weight-decay", "0.1"], "--weight-decay is no flag", "--joint.weight-decay"),
    (["train", "--gpu", "0"], "--gpu is no flag", "perhaps you meant --device;"),
    (["train", "--batch-size", "4"], "--batch-size is no flag", "perhaps you meant --batch;"),
    (["train", "--memory=4GB"], "--memory is no flag", "perhaps you meant --mem-budget;"),
    (["train", "--num_workers", "4"], "--num_workers is no flag", "perhaps you meant --threads;"),
    (["train", "--labels", "labels.csv"], "--labels is no flag", "perhaps you meant --annotations;"),
    (["detect", "runs/x", "videos", "--output", "found"], "--output is no flag", "perhaps you meant --out;"),
    # several words where one is taken: a pattern that the shell has filled in, a space in a value
    (["train", "--annotations", "labels.csv", "--videos", "videos/a.mp4", "videos/b.mp4"], "'videos/b.mp4' is one",
     "--videos takes one DIR"),
    (["plan", "--mem-budget", "11", "gb"], "'gb' is one word too many", "--mem-budget takes one value"),
    # a variable of the shell that is not set
    (["train", *DATA, "--out", ""], "--out is empty", "variable"),
    (["train", *DATA, "--out="], "--out is empty", "variable"),
    (["train", "--annotations", "", "--videos", "videos"], "--annotations is empty", "variable"),
    (["detect", "runs/x", ""], "names given is empty", "variable"),
    (["detect", "", "videos/a.mp4"], "names given is empty", "variable"),
    (["report", ""], "names given is empty", "variable"),
    # units
    (["train", *DATA, "--mem-budget", "11"], "--mem-budget 11 means 11 bytes", "11GB"),
    (["train", *DATA, "--mem-budget", "8000"], "--mem-budget 8000 means 8000 bytes", "unit"),
    (["train", *DATA, "--mem-budget", "11MB"], "--mem-budget 11MB is 11 MB", "4GB"),
    (["plan", "--mem-budget", "11"], "--mem-budget 11 means 11 bytes", "11GB"),
    (["detect", "runs/x", "videos", "--mem-budget", "11"], "--mem-budget 11 means 11 bytes", "11GB"),
    (["extract", "runs/x", "videos", "--out", "f", "--mem-budget", "11"], "--mem-budget 11 means 11 bytes", "11GB"),
    # a file in the place of a folder, and the other way round
    (["train", "--annotations", "labels.csv", "--videos", "labels.csv"], "--videos labels.csv", "file, not a folder"),
    (["train", "--annotations", "labels.csv", "--videos", "nowhere"], "--videos nowhere", "not there"),
    (["train", "--annotations", "nowhere.csv", "--videos", "videos"], "--annotations nowhere.csv", "No such file"),
    (["train", "--annotations", "videos", "--videos", "videos"], "--annotations videos", "without a file of labels"),
    (["train", "--annotations", "videos/a.mp4", "--videos", "videos"], "--annotations videos/a.mp4", "such as a video"),
    (["train", "--annotations", "headless.csv", "--videos", "videos"], "headless.csv", "video,start,end,label"),
    (["train", *DATA, "--stages", "joint,head", "--joint-epochs", "0", "--head-epochs", "0"],
     "--joint-epochs 0 --head-epochs 0: nothing would be trained", "1 or more"),
    (["train", *DATA, "--tiou", "50"], "--tiou", "50"),
    (["convert", "videos/a.mp4", "a.json"], "videos/a.mp4 is not UTF-8 text", "such as a video"),
    (["convert", "labels.csv", "file/a.json"], "file/a.json: cannot write", "file is a file, not a folder"),
    (["plan", "--mem-budget", "11GB", "--picture", "what.pdf"], "--picture what.pdf", ".svg"),
    # what is no run, and the run that is meant
    (["detect", "runs", "videos/a.mp4"], "runs: no run folder", "perhaps you meant runs/x"),
    (["detect", "runs/x/checkpoints", "videos/a.mp4"], "runs/x/checkpoints: no run folder", "runs/x, which holds it"),
    (["detect", "videos/a.mp4", "runs/x"], "videos/a.mp4: not a whole safetensors file", "run folder"),
    (["detect", "nowhere", "videos/a.mp4"], "nowhere: no such file", "run folder"),
    (["extract", "nowhere", "videos", "--out", "f"], "nowhere: no such file", "run folder"),
    (["extract", "runs", "videos", "--out", "f"], "runs: no run folder", "perhaps you meant runs/x"),
    (["train", "--resume", "runs"], "runs: no run to resume", "perhaps you meant runs/x"),
    (["train", "--resume", f"runs/x/{MODEL}"], f"{MODEL}: no run to resume", "runs/x, which holds it"),
    (["train", "--resume", "nowhere"], "nowhere: no run to resume", "--out"),
    ([*EVALUATE, "--predictions", "runs/x"], "runs/x is a run folder", "--predictions runs/x/predictions.json"),
]  # fmt: skip


@pytest.mark.parametrize(("argv", "what", "mend"), MISTAKES, ids=lambda value: " ".join(value)[:60] if value else "")
def test_a_mistake_is_one_sentence_and_changes_nothing(
    argv: list[str], what: str, mend: str, desk: Path, capsys: Captured
) -> None:
    before = {path: path.stat().st_mtime_ns for path in desk.rglob("*")}
    assert program.main(argv) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and what in line and mend in line
    assert {path: path.stat().st_mtime_ns for path in desk.rglob("*")} == before


LONG = "a" * 300  # more than a name may have


@pytest.mark.parametrize(
    "argv",
    [
        ["train", *DATA, "--out", LONG],
        ["train", "--annotations", LONG, "--videos", "videos"],
        ["train", "--annotations", "labels.csv", "--videos", LONG],
        ["train", *DATA, "--config", f"{LONG}.toml"],
        ["train", *DATA, "--cache", LONG],
        ["train", "--resume", LONG],
        ["prepare", *DATA, "--cache", LONG],
        ["detect", LONG, "videos/a.mp4"],
        ["check", "--annotations", "labels.csv", "--videos", LONG],
        ["plan", "--mem-budget", "11GB", "--annotations", LONG],
        ["report", LONG],
        ["report", "loop"],
        ["train", "--resume", "loop"],
        ["evaluate", "--ground-truth", LONG, "--predictions", LONG],
    ],
    ids=lambda argv: " ".join(argv).replace(LONG, "LONG"),
)
def test_a_name_that_no_file_can_have_is_one_sentence(argv: list[str], desk: Path, capsys: Captured) -> None:
    Path("loop").symlink_to("loop")
    before = sorted(desk.rglob("*"))
    assert program.main(argv) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and ("loop" if "loop" in argv else LONG) in line
    assert sorted(desk.rglob("*")) == before


@pytest.mark.parametrize(("name", "mend"), [("nowhere.mp4", "name videos"), ("https://a.org/b.mp4", "download it")])
def test_videos_that_are_not_there_are_refused_before_a_model_is_loaded(name: str, mend: str, desk: Path) -> None:
    with pytest.raises(InputError, match=f"{name}: no such file; {mend}"):
        paths_of([name])
    assert paths_of([name, "videos/a.mp4"]) == [Path(name), Path("videos/a.mp4")]  # the one is used, the other skipped


def started(argv: list[str], **how: object) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "lofi_fast", *argv]
    return subprocess.run(command, env=environment, text=True, stderr=subprocess.PIPE, **how)  # type: ignore[call-overload, no-any-return]


@pytest.mark.parametrize(
    "argv",
    [
        ["train", "--annotations", "nowhere.csv", "--videos", "videos"],
        ["train", *DATA, "--mem-budget", "11"],
        ["train", "--resume", "nowhere"],
        ["train", *DATA, "--mem-budget", "11GB", "--replay-rungs", "nowhere.jsonl"],
        ["detect", "runs", "videos/a.mp4"],
        ["extract", "nowhere", "videos", "--out", "f"],
    ],
    ids=" ".join,
)
def test_what_is_known_without_torch_does_not_wait_for_it(argv: list[str], desk: Path) -> None:
    code = (
        "import sys; from lofi_fast.__main__ import main\n"
        "assert main(sys.argv[1:]) == 2\n"
        "assert not {'torch', 'triton', 'nvidia'} & sys.modules.keys()"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code, *argv], env=environment, text=True, stderr=subprocess.PIPE)
    assert done.returncode == 0, done.stderr


def test_an_output_that_is_full_is_one_sentence() -> None:
    with open("/dev/full", "w") as full:
        done = started(["plan", "--mem-budget", "11GB"], stdout=full)
    assert done.returncode == 2
    assert done.stderr == "error: the output cannot be written: No space left on device\n"


def test_streams_that_are_closed_and_letters_that_a_terminal_lacks(desk: Path) -> None:
    (desk / "labels.csv").write_text("video,start,end,label\nä b,1,2,läuft\n", encoding="utf-8")
    words = f'"{sys.executable}" -m lofi_fast convert labels.csv'
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "ascii"}
    for number, streams in enumerate(("<&-", ">&-", "<&- >&- 2>&-", "")):
        command = ["bash", "-c", f"{words} {number}.json {streams}"]
        done = subprocess.run(command, env=environment, stderr=subprocess.PIPE)
        assert (done.returncode, done.stderr) == (0, b"")
        assert (desk / f"{number}.json").exists()
    nowhere = subprocess.run(
        ["bash", "-c", f"{words.replace('labels.csv', 'läuft.csv')} x.json"], env=environment, stderr=subprocess.PIPE
    )
    assert nowhere.returncode == 2 and nowhere.stderr.startswith(b"error: l") and nowhere.stderr.count(b"\n") == 1


def test_interrupted_while_it_reads_labels(desk: Path) -> None:
    rows = (f"v{i // 10},{i % 10},{i % 10 + 1},run\n" for i in range(300_000))  # some seconds' reading
    (desk / "many.csv").write_text("video,start,end,label\n" + "".join(rows))
    script = "from lofi_fast import __main__ as program; print(flush=True); exit(program.main())"
    command = [sys.executable, "-c", script, "convert", "many.csv", "a.json"]
    environment, pipe = os.environ | {"PYTHONPATH": str(ROOT)}, subprocess.PIPE
    with subprocess.Popen(command, env=environment, stdout=pipe, stderr=pipe, text=True) as process:
        assert process.stdout is not None and process.stdout.readline() == "\n"
        time.sleep(0.5)
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=PATIENCE)
    assert (process.returncode, said) == (130, "\ninterrupted\n")
    assert not (desk / "a.json").exists()


def test_version_and_help_as_people_ask_for_them(capsys: Captured) -> None:
    for word in ("--version", "-V", "version"):
        assert program.main([word]) == 0
        assert capsys.readouterr().out == f"lofi_fast {__version__}\n"
    with pytest.raises(SystemExit) as stop:
        program.main(["help", "convert"])
    assert stop.value.code == 0 and "--overwrite" in capsys.readouterr().out
    assert program.main(["help"]) == 0
    assert "\n  convert " in capsys.readouterr().out

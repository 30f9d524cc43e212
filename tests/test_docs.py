"""The commands of README.md, CONTRIBUTING.md and docs/.

Those of `console` blocks are run, in the order of their page, in a folder that holds labels.csv, videos/, new.mp4 and
the finished run runs/mine; lines shown below a command must be among those that it prints (`...` stands for anything).
Those of `sh` and `bash` blocks are parsed alone: a flag that does not exist, or a value that cannot be, fails. So does
a flag in the text that no command has, and a link to nothing.
"""

from __future__ import annotations

import ast
import re
import shlex
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
from detectors import SmallRun

import lofi_fast
from lofi_fast.__main__ import COMMANDS
from lofi_fast.budget import Budget
from lofi_fast.command import given
from lofi_fast.fidelity import Pattern
from lofi_fast.settings import leaves, made, negated, read
from lofi_fast.train import read_flags, spelled_out

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
LANGUAGES = {"sh", "bash", "console", "python", "csv", "toml", "text", ""}
# What a block for a shell may begin a line with, besides commands of ours, make, pip and python.
OTHERS = {"cd", "export", "git", "source", "sudo", "APEX_CPP_EXT=1"}
FLAGS_OF_OTHERS = {
    "--help", "--max-restarts", "--no-build-isolation", "--nproc-per-node", "--shm-size", "--standalone",
    "--tune",  # of bench gain
}  # fmt: skip


@dataclass(frozen=True)
class Block:
    language: str
    text: str


def blocks(page: Path) -> list[Block]:
    """The fenced blocks of a page, in lists too."""
    found = re.findall(r"^( *)```(\w*)\n(.*?)^\1```$", page.read_text(), re.MULTILINE | re.DOTALL)
    return [Block(language, re.sub(rf"^{indent}", "", text, flags=re.MULTILINE)) for indent, language, text in found]


def prose(page: Path) -> str:
    return re.sub(r"^( *)```.*?^\1```$", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)


def lines_of(text: str) -> list[list[str]]:
    """The words of every line of a shell, continued lines put together, comments left out."""
    whole = text.replace("\\\n", " ").splitlines()
    return [words for line in whole if (words := shlex.split(line, comments=True))]


def commands(words: list[str]) -> Iterator[tuple[str, list[str]]]:
    """(name, arguments) of every command of ours in a line of a shell."""
    for k, word in enumerate(words):
        rest = words[k + 1 :]
        end = next((n for n, other in enumerate(rest) if other in ("&", "&&", "|", ">", ";")), len(rest))
        rest = [other for other in rest[:end] if "[@]" not in other]
        if word == "lofi-fast" and rest:
            yield rest[0], rest[1:]
        elif word == "-m" and rest and rest[0].startswith("lofi_fast."):
            yield rest[0].removeprefix("lofi_fast."), rest[1:]


def parse(name: str, argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """Read a command line as the command does, without doing what it says."""
    assert name in COMMANDS, f"{name} is no command"
    module: Any = import_module(COMMANDS[name][0])
    flags = getattr(module, f"{name.capitalize()}Flags", None)
    if flags is None:  # argparse
        with pytest.raises(SystemExit):
            module.main(["--help"])
        shown = capsys.readouterr().out
        assert all(word.partition("=")[0] in shown for word in argv if word.startswith("--")), argv
        return
    argv = spelled_out(argv) if name == "train" else argv
    words = given(flags, argv, prog=name, description="", shown=lambda _: None)
    if name == "plan":
        for budget in words.pop("budget", "auto").split(","):
            Budget.parse(budget.strip())
    if any("$" in word for word in argv):
        return  # values that a script fills in
    values = read(flags, words)
    if any(leaf.setting.positional for leaf in leaves(flags)):
        made(flags, values)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_command_can_be_parsed(page: Path, capsys: pytest.CaptureFixture[str]) -> None:
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    extras = set(re.findall(r"^(\w+) = \[\"", (ROOT / "pyproject.toml").read_text(), re.MULTILINE))
    benches = {path.stem for path in (ROOT / "bench" / "commands").glob("*.py")} | {"tables"}
    for block in blocks(page):
        assert block.language in LANGUAGES, block
        if block.language == "console":
            lines = [line[2:] for line in block.text.splitlines() if line.startswith("$ ")]
            block = Block("sh", "\n".join(lines))
        if block.language not in ("sh", "bash"):
            continue
        for words in lines_of(block.text):
            ours = list(commands(words))
            for name, argv in ours:
                parse(name, argv, capsys)
            if words[0] == "torchrun":
                from torch.distributed.run import get_args_parser

                get_args_parser().parse_args(words[1:])
            elif words[0] == "make":
                assert {word for word in words[1:] if "=" not in word} <= targets, words
            elif words[:3] == ["python", "-m", "bench"]:
                assert words[3] in benches, words
            elif words[0] == "pip":
                named = [extra for found in re.findall(r"\[(.+?)\]", " ".join(words)) for extra in found.split(",")]
                assert set(named) <= extras, words
            elif block.language == "sh" and not ours:
                assert words[0] in OTHERS or words[:2] in (["python", "-m"], ["python3", "-m"], ["python", "-c"]), words
        for array in re.findall(r"flags=\((.*)\)", block.text):
            parse("train", shlex.split(array), capsys)


@pytest.mark.parametrize(
    "page", [page for page in PAGES if any(block.language == "console" for block in blocks(page))],
    ids=lambda page: page.name,
)  # fmt: skip
def test_what_a_page_shows_is_what_happens(
    page: Path, small: SmallRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
    torchs_own_allocator: None,
) -> None:  # fmt: skip
    from lofi_fast.convert import main as convert

    (annotations,) = small.videos.parent.glob("annotations.json")
    assert convert([str(annotations), str(tmp_path / "labels.csv")]) == 0
    (tmp_path / "videos").symlink_to(small.videos)
    shutil.copytree(small.folder, tmp_path / "runs" / "mine")
    shutil.copy2(small.validation[0], tmp_path / "new.mp4")
    monkeypatch.chdir(tmp_path)
    capsys.readouterr()
    for block in blocks(page):
        if block.language != "console":
            continue
        for shown in re.split(r"^\$ ", block.text, flags=re.MULTILINE)[1:]:
            line, _, expected = shown.partition("\n")
            ((name, argv),) = commands(shlex.split(line, comments=True))
            status = import_module(COMMANDS[name][0]).main(argv)
            printed = capsys.readouterr().out
            assert status == 0 or name == "doctor", line
            rest = printed.splitlines()
            for text in expected.splitlines():
                pattern = ".*".join(map(re.escape, text.split("...")))
                place = next((k for k, said in enumerate(rest) if re.fullmatch(pattern, said.rstrip())), None)
                assert place is not None, f"{line}\nprints no such line: {text}\nbut:\n{printed}"
                rest = rest[place + 1 :]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_file_of_ours_in_the_text_exists(page: Path) -> None:
    for path in re.findall(r"`((?:lofi_fast|kernels|bench|tests|docs)/[\w/]+\.\w+)`", prose(page)):
        assert "NAME" in path or (ROOT / path).is_file(), path


def test_the_files_of_a_head_and_of_an_encoder_are_all_named() -> None:
    page = (ROOT / "docs" / "heads-and-encoders.md").read_text()
    for room, shared in (
        ("head", "gtad|loss|targets|dropout|protocol"),
        ("encoder", "resnet|lean|tsm|shared|protocol"),
    ):
        for path in sorted((ROOT / "lofi_fast" / room).glob("[!_]*.py")):
            assert re.match(shared, path.name) or f"`lofi_fast/{room}/{path.name}`" in page, path


def test_what_heads_and_encoders_need_is_what_plan_says() -> None:
    page = (ROOT / "docs" / "heads-and-encoders.md").read_text()
    rows = re.findall(r"^\| `(--.+?)` \| (\S+) \| (\S+) \| (\S+) \|$", page, re.MULTILINE)
    assert {flags.split()[1] for flags, *_ in rows} >= {"bmn", "actionformer", "tsm_r50", "r2plus1d_18", "vit_b16"}
    for flags, *shown in rows:
        named = flags.replace("--encoder vit_b16 --encoder.train", "--encoder.name vit_b16 --encoder.train").split()
        words: dict[str, Any] = {}
        for flag, value in zip(named[::2], named[1::2], strict=True):
            room, _, leaf = flag[2:].partition(".")
            words[room] = {**words.get(room, {}), leaf: value} if leaf else value
        said = []
        for micro_batch, recompute in ((1, "never"), (16, "never"), (16, "always")):
            forecast = lofi_fast.plan(
                mem_budget="80GB", card="A100 80GB", pattern="spatial", cut=4, micro_batch=micro_batch,
                recompute=recompute, **words,
            )  # fmt: skip
            plan = forecast.chosen(Pattern.SPATIAL)
            said.append("more" if plan is None else f"{forecast.peak(plan) / 1e9:.2f}")
        assert said == shown, flags


def test_every_flag_in_the_text_exists() -> None:
    known = set(FLAGS_OF_OTHERS)
    for name, (where, _) in COMMANDS.items():
        module: Any = import_module(where)
        if (flags := getattr(module, f"{name.capitalize()}Flags", None)) is None:
            known |= set(re.findall(r"\"(--[\w-]+)\"", Path(module.__file__).read_text()))
            continue
        for leaf in leaves(flags):
            spelled = {flag for flag in (leaf.long, leaf.short) if flag}
            known |= spelled | ({negated(flag) for flag in spelled} if leaf.type is bool else set())
    wrong = {
        (page.name, flag)
        for page in PAGES
        for flag in re.findall(r"(?<![\w-])--[a-z][\w.-]*\w", prose(page))
        if flag not in known
    }
    assert not wrong


def slug(heading: str) -> str:
    """The anchor of a heading, as it is made where Markdown is shown."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


def test_every_link_leads_somewhere() -> None:
    for page in [*PAGES, ROOT / "bench" / "README.md"]:
        for link in re.findall(r"\]\((?!https?:)([^)\s]+)\)", page.read_text()):
            place, _, anchor = link.partition("#")
            target = (page.parent / place).resolve() if place else page
            assert target.exists(), f"{page.name}: {link}"
            if anchor:
                headings = re.findall(r"^#+ (.+)$", target.read_text(), re.MULTILINE)
                assert anchor in map(slug, headings), f"{page.name}: {link}"


def test_files_of_settings_can_be_read(tmp_path: Path) -> None:
    for page in PAGES:
        for block in blocks(page):
            if block.language == "toml":
                (tmp_path / "settings.toml").write_text(block.text)
                read_flags(["--config", str(tmp_path / "settings.toml")], cuda=lambda: True)


def test_python_in_the_docs_names_what_there_is() -> None:
    for page in PAGES:
        for block in blocks(page):
            if block.language == "python":
                for node in ast.walk(ast.parse(block.text)):
                    if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                        assert node.value.id != "lofi_fast" or node.attr in lofi_fast.__all__, node.attr

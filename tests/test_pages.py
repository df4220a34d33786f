"""README and docs/ as written: every code block runs or says why not, every link leads somewhere, figures are true.

A block is fenced with its language. `python` and `sh` blocks of a page run in order, in one folder that holds
`data.json`, its `images/`, and `photographs/`, with the demo's checkpoint in the place of MODEL. A comment
`<!-- not run: REASON -->` in front of a block leaves it out; its `vig` commands are still parsed. `text` holds no code.
"""

from __future__ import annotations

import ast
import json
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import click
import pyarrow.parquet as pq
import pytest
import yaml
from page_blocks import ROOT, Block, anchors, blocks_of, links_of, pages
from typer.main import get_command
from typer.testing import CliRunner

from vig.cli import app
from vig.demo.arms import CHECKPOINT
from vig.demo.dataset import DATA_SEED, SAMPLES, tuning_records, write_records
from vig_kernels.__main__ import main as show_backends

HUB_NAME = "llava-hf/llava-1.5-7b-hf"
LANGUAGES = ("python", "sh", "json", "yaml", "text")
RUN_ELSEWHERE = {
    "trainers.md": "tests/test_trainers_page.py",
    "recipes.md": "tests/test_recipes.py",
}  # Python blocks
CODE = re.compile(r"^\s*(\$ )?(vig|python|pip install|make|import|from [\w.]+ import) [-\w]", re.MULTILINE)
PAGES = pages()


@pytest.fixture(scope="module")
def given(tmp_path_factory) -> Path:
    """What a reader has: the demo's first 24 records, and its captions as a folder of photographs."""
    folder = tmp_path_factory.mktemp("given")
    records = tuning_records(SAMPLES, DATA_SEED)[:24]
    write_records(folder, "data", records)
    (folder / "photographs").mkdir()
    for record in records:
        if record.turn.kind == "caption":
            shutil.copy(folder / "images" / f"{record.id}.png", folder / "photographs")
            (folder / "photographs" / f"{record.id}.txt").write_text(record.turn.answer)
    return folder


class Sandbox(NamedTuple):
    folder: Path
    names: dict  # of the page's Python blocks
    monkeypatch: pytest.MonkeyPatch

    def python(self, block: Block) -> None:
        code = block.text.replace(repr(HUB_NAME).replace("'", '"'), repr(str(CHECKPOINT)))
        exec(compile(code, f"{block.page.name}, line {block.line}", "exec"), self.names)

    def shell(self, block: Block) -> None:
        for words in commands(block):
            with self.monkeypatch.context() as patch:
                while "=" in words[0]:
                    patch.setenv(*words.pop(0).split("=", 1))
                self.command([str(CHECKPOINT) if word == "MODEL" else word for word in words], block)

    def command(self, words: list[str], block: Block) -> None:
        said = f"{block.page.name}, line {block.line}: {shlex.join(words)}"
        if words[0] == "vig":
            done = CliRunner().invoke(app, words[1:])
            assert done.exit_code == 0, f"{said}\n{done.output}\n{done.exception!r}"
        elif words[:3] == ["python", "-m", "vig_kernels"]:
            with self.monkeypatch.context() as patch:
                patch.setattr(sys, "argv", words[2:])
                show_backends()
        elif words[:3] == ["python", "-m", "benchmarks"]:
            from benchmarks.__main__ import app as benchmarks

            parse(get_command(benchmarks), words[3:])
        elif words[0] == "make":
            dry = subprocess.run(["make", "-n", *words[1:]], cwd=ROOT, capture_output=True, text=True)
            assert dry.returncode == 0, f"{said}\n{dry.stderr}"
        elif words[:2] == ["pip", "install"]:
            check_extras(words[2:], said)
        else:
            pytest.fail(
                f"{said}: nothing here runs {words[0]}; write <!-- not run: REASON --> above the block"
            )


def commands(block: Block) -> Iterator[list[str]]:
    """The command lines of a block, each as its words, without comments."""
    for line in block.text.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        if words:
            yield words


def parse(command: click.Command, words: list[str]) -> None:
    """Raises click's UsageError for options and commands that are not there; nothing is run."""
    context = command.make_context(command.name or "", list(words), resilient_parsing=False)
    if isinstance(command, click.Group) and words:
        _, found, rest = command.resolve_command(context, words)
        parse(found, rest)


def check_extras(words: list[str], said: str) -> None:
    text = (ROOT / "pyproject.toml").read_text()
    known = re.findall(r"^([\w-]+) = \[", text.partition("[project.optional-dependencies]")[2], re.MULTILINE)
    for word in words:
        extras = re.search(r"\[(.+)\]", word)
        for extra in extras[1].split(",") if extras else ():
            assert extra in known, f"{said}: there is no extra {extra}"


def ids(value) -> str:
    return value.name if isinstance(value, Path) else str(value)


@pytest.mark.parametrize("page", PAGES, ids=ids)
def test_every_block_of_the_page_runs(page: Path, given: Path, tmp_path: Path, monkeypatch):
    here = tmp_path / "here"
    found = [block for block in blocks_of(page) if block.language in ("python", "sh")]
    if not found:
        return
    shutil.copytree(given, here)
    monkeypatch.chdir(here)
    sandbox = Sandbox(here, {"MODEL": str(CHECKPOINT)}, monkeypatch)
    for block in found:
        if block.why_not is not None:
            for words in commands(block) if block.language == "sh" else ():
                if "vig" in words[:1]:
                    parse(get_command(app), words[1:])
        elif block.language == "sh":
            sandbox.shell(block)
        elif page.name not in RUN_ELSEWHERE:
            sandbox.python(block)


@pytest.mark.parametrize("page", PAGES, ids=ids)
def test_blocks_are_what_they_say(page: Path):
    for block in blocks_of(page):
        where = f"{page.name}, line {block.line}"
        assert block.language in LANGUAGES, f"{where}: a block of {block.language or 'no language'!r}"
        assert block.why_not is None or len(block.why_not) > 5, f"{where}: not run, but why?"
        if block.language == "json":
            records = re.sub(r"\}\n\{", "}\x1e{", block.text.replace("...", '"..."')).split("\x1e")
            assert all(json.loads(record) for record in records), where
        elif block.language == "yaml":
            assert yaml.compose(block.text) is not None, where  # tags of its own are not made
        elif block.language == "text" and block.why_not is None:
            assert not CODE.search(block.text), f"{where}: code in a block of text"


@pytest.mark.parametrize("page", PAGES, ids=ids)
def test_links_lead_somewhere(page: Path):
    """Files, pictures and anchors; addresses on the web are only looked at for their form."""
    for line, target in links_of(page):
        where = f"{page.name}, line {line}: {target}"
        if re.match(r"[a-z]+:", target):
            assert target.startswith("https://"), where
            continue
        name, _, anchor = target.partition("#")
        file = (page.parent / name).resolve() if name else page
        assert file.is_file() and file.is_relative_to(ROOT), f"{where}: no such file"
        assert not anchor or anchor in anchors(file), f"{where}: no such heading"


def test_the_site_has_every_page():
    config = yaml.safe_load((ROOT / "mkdocs.yml").read_text())

    def files(entries: list) -> Iterator[str]:
        for entry in entries:
            for value in entry.values():
                yield from files(value) if isinstance(value, list) else (value,)

    there = {page.name for page in PAGES if page.parent == ROOT / "docs"} | {
        "CHANGELOG.md",
        "CONTRIBUTING.md",
    }
    assert sorted(files(config["nav"])) == sorted(there)


def test_the_site_builds_without_a_warning(tmp_path):
    pytest.importorskip("mkdocs")
    pytest.importorskip("material")
    command = [sys.executable, "-m", "mkdocs", "build", "--site-dir", tmp_path / "site"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "site" / "CONTRIBUTING.html").is_file()
    loads = re.compile(r"<(?:script|img|link rel=.(?:stylesheet|icon)) [^>]*(?:src|href)=.http[^>]+")
    for page in (tmp_path / "site").glob("*.html"):
        assert loads.findall(page.read_text()) == [], f"{page.name} loads from the web"


def test_the_readme_is_short_and_its_record_is_the_demos(given, tmp_path, monkeypatch):
    from vig import Scorer, score_dataset, select

    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) <= 160
    shown = [json.loads(part) for part in re.findall(r"^\{(?:.|\n)+?\]\}$", text, re.MULTILINE)]
    record, score, kept = shown
    data = json.loads((given / "data.json").read_text())
    assert record == data[6]
    monkeypatch.chdir(given)
    score_dataset(Scorer(CHECKPOINT), "data.json", tmp_path / "scores", progress_bar=False)
    rows = pq.read_table(tmp_path / "scores").to_pylist()
    for name, value in score.items():
        found = rows[6][name]
        assert value == (pytest.approx(found, abs=6e-4) if "nll" in name or name == "vig" else found)
    chosen = select(tmp_path / "scores", p=70).table().table.to_pylist()[6]
    assert {name: chosen[name] for name in kept} == kept


def test_messages_on_the_page_of_troubles_are_the_codes_own():
    """Each quoted message: its parts between dots stand in some string of the sources."""
    strings = []
    for file in [*(ROOT / "vig").rglob("*.py"), *(ROOT / "vig_kernels").rglob("*.py")]:
        strings += [
            node.value
            for node in ast.walk(ast.parse(file.read_text()))
            if isinstance(node, ast.Constant) and isinstance(node.value, str)
        ]
    said = "\n".join(strings)
    page = (ROOT / "docs" / "troubleshooting.md").read_text()
    first_cells = re.findall(r"^\| (.+?) \|", page, re.MULTILINE)
    quoted = [message for cell in first_cells for message in re.findall(r"`([^`]+)`", cell)]
    assert len(quoted) > 30
    parts = [part.strip(" :=[]") for message in quoted for part in re.split(r"\.\.\.|\d+|'[^']*'", message)]
    lost = [part for part in parts if part not in said]
    assert lost == [], lost

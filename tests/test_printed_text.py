"""Ids, paths and texts are printed as they are: rich's markup and emoji codes in them mean nothing."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path

import pytest
import tiny
from rich.console import Console
from typer.testing import CliRunner

from vig.cli import app
from vig.demo.run import Shell
from vig.evaluation.probes.findings import Figure
from vig.evaluation.probes.show import _table
from vig.evaluation.show import show_measures

ROOT = Path(__file__).parent.parent
ODD = "urn:a:17 [red]x[/red] [0] [/b]"


@pytest.fixture(scope="module")
def odd(tmp_path_factory):
    """A folder with a model and data, its name full of codes; record 1 has no image."""
    folder = tmp_path_factory.mktemp("odd") / "a:a:[red]x[" / "b] [0]"
    folder.mkdir(parents=True)
    tiny.save_llava(folder / "model")
    turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "red"}]
    records = [{"id": f"{ODD} {n}", "image": f"{n}:a:[0].png", "conversations": turns} for n in range(3)]
    for number in (0, 2):
        tiny.save_picture(folder / f"{number}:a:[0].png", number)
    (folder / "data.json").write_text(json.dumps(records))
    return folder


def call(*words, code=0) -> str:
    result = CliRunner().invoke(app, [str(word) for word in words])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == code, result.output
    return result.stdout


def test_json_is_what_the_data_say(odd):
    found = json.loads(call("inspect", odd / "model", odd / "data.json", "-o", odd / "p.png", "--json"))
    assert found["id"] == f"{ODD} 0" and found["picture"] == str(odd / "p.png")
    scored = json.loads(call("score", odd / "model", odd / "data.json", "-o", odd / "j", "--json", code=3))
    assert scored["scores"] == str(odd / "j") and scored["errors"][0]["examples"][0]["id"] == f"{ODD} 1"


@pytest.mark.parametrize("terminal", [False, True])
@pytest.mark.parametrize(
    ("module", "words", "code"),
    [
        ("scoring", ("score", "-o", "scores"), 3),
        ("training", ("train", "-o", "out", "--max-steps", "1"), 3),
        ("evaluation", ("eval", "--task", "exact", "-o", "answers", "--max-new-tokens", "2"), 3),
        ("probing", ("probe", "--probe", "attention", "-o", "probed"), 3),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_names_and_ids_on_a_terminal_and_in_a_log(odd, tmp_path, monkeypatch, module, words, code, terminal):
    screen = io.StringIO()
    shown = Console(file=screen, force_terminal=terminal, width=1000, soft_wrap=True, emoji=False)
    monkeypatch.setattr(f"vig.cli.{module}.err", shown)
    command, *options = (
        tmp_path / word if word in ("scores", "out", "answers", "probed") else word for word in words
    )
    said = call(command, odd / "model", odd / "data.json", *options, code=code)
    before = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", screen.getvalue())
    assert str(odd / "model") in before and str(odd / "1:a:[0].png") in said and f"(id '{ODD} 1')" in said


def test_folders_are_named_as_they_are(odd):
    call("score", odd / "model", odd / "data.json", "-o", odd / "s", code=3)
    for words in (
        ("select", odd / "s", "-o", odd / "selection"),
        ("report", odd / "s", "-o", odd / "report.html"),
        ("compare", odd / "s", odd / "s", "-o", odd / "page.html"),
        ("card", odd / "selection"),
        ("inspect", odd / "model", odd / "data.json", "-o", odd / "q.png"),
    ):
        assert str(words[-1]) in call(*words)


def test_tables_name_groups_as_the_data_do():
    console = Console(file=io.StringIO(), width=200, emoji=False)
    figure = {"group": ODD, "name": "accuracy", "value": 0.5, "low": None, "high": None}
    counts = {"answered": 1, "images": 1, "units": 1, "text_only": 0, "cut": 0}
    show_measures(
        console, {"task": "choice", "by": None, "rule": None, "figures": [figure], "counts": counts}
    )
    console.print(_table([Figure(ODD, "VIG", 1, 0.5, None, None)], "match", lambda *_: "0.5"))
    Shell(console, lambda words: 0).vig("score", ODD)
    assert console.file.getvalue().count(ODD) == 3


def test_no_console_replaces_emoji_codes():
    sources = [path for part in ("vig", "benchmarks") for path in (ROOT / part).rglob("*.py")]
    made = [call for path in sources for call in re.findall(r"(?<!\w)Console\(.*\)", path.read_text())]
    assert len(made) >= 6 and all("emoji=False" in call for call in made)

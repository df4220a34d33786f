"""Errors by reason: counts and examples on one screen, all of them in a file."""

from __future__ import annotations

import json
import math
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import tiny
from typer.testing import CliRunner

from vig.cli import app
from vig.data.error_log import ErrorLog
from vig.data.images import open_images
from vig.data.sample import SampleError
from vig.models.prompts import Encoder
from vig.reporting.facts import Facts, _add_errors
from vig.scoring.run import score_dataset
from vig.scoring.scorer import Scorer

WAYS = [
    {"image": "nowhere-{n}.png"},
    {"image": "https://a.b/{n}.png"},
    {"image": "../{n}.png"},
    {"video": "{n}.mp4"},
    {"conversations": [{"from": "robot {n}", "value": "q"}]},
    {"conversations": [{"from": "human", "value": "<image>q {n}"}]},
    {"photo": "{n}.png", "image": None},
]


def record(number: int, way: dict | None = None) -> dict:
    turns = [{"from": "human", "value": "<image>q"}, {"from": "gpt", "value": f"red {number}"}]
    good = {"id": str(number), "image": "0.png", "conversations": turns}
    return good | json.loads(json.dumps(way or {}).replace("{n}", str(number)))


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    tiny.save_llava(folder)
    return folder


def call(*words, code=0) -> str:
    result = CliRunner().invoke(app, [str(word) for word in words])
    assert result.exit_code == code, result.output
    return result.output


@pytest.fixture
def encoded_once(monkeypatch):
    """Prompts are not the matter: what the first record is encoded to stands for all, images are opened for each."""
    encode, known = Encoder.encode, []

    def encode_once(self, sample, images=None):
        open_images(sample)
        if not known:
            known.append(encode(self, sample, images))
        return replace(known[0], sample=sample)

    monkeypatch.setattr(Encoder, "encode", encode_once)


def test_a_thousand_errors_of_seven_kinds_in_20_000_records_fit_one_screen(tmp_path, model, encoded_once):
    tiny.save_picture(tmp_path / "0.png", 0)
    records = [record(n, None if n % 20 else WAYS[n // 20 % 7]) for n in range(20_000)]
    (tmp_path / "data.json").write_text(json.dumps(records))
    data = (model, tmp_path / "data.json", "-o", tmp_path / "scores")
    said = call("score", *data, "--dry-run", "--errors", tmp_path / "errors.jsonl", code=3)
    said = said[said.index("checked 20,000 records: 19,000 with images") :]
    assert sum(math.ceil(len(line) / 80) for line in said.splitlines()) <= 40  # a terminal 80 columns wide
    counts = [line.split()[0] for line in said.splitlines() if " samples: data.json#" in line]
    assert counts == ["143"] * 6 + ["142"]
    assert "1,000 of 20,000 samples could not be scored" in said
    assert f"all of them: {tmp_path}/errors.jsonl" in said
    errors = [json.loads(line) for line in (tmp_path / "errors.jsonl").read_text().splitlines()]
    assert [error["key"] for error in errors] == [f"data.json#{n}" for n in range(0, 20_000, 20)]
    assert errors[0]["message"].startswith("no image at") and errors[0]["id"] == "0"


def test_scores_are_complete_only_with_their_errors_beside_them(tmp_path, monkeypatch):
    tiny.save_picture(tmp_path / "0.png", 0)
    (tmp_path / "data.json").write_text(json.dumps([record(0), record(1, WAYS[0])]))
    scorer, out, rename = Scorer(tiny.llava_model(), tiny.llava_processor()), tmp_path / "scores", os.replace

    def stopped(source, target):
        if Path(target).name == "_errors.jsonl":
            raise KeyboardInterrupt
        rename(source, target)

    monkeypatch.setattr(os, "replace", stopped)
    with pytest.raises(KeyboardInterrupt):
        score_dataset(scorer, tmp_path / "data.json", out)
    assert not json.loads((out / "_manifest.json").read_text())["complete"]
    monkeypatch.undo()
    with pytest.warns(UserWarning, match="1 samples could not be scored"):
        score_dataset(scorer, tmp_path / "data.json", out)
    assert json.loads((out / "_manifest.json").read_text())["complete"]
    assert json.loads((out / "_errors.jsonl").read_text())["key"] == "data.json#1"


def test_scores_have_their_errors_beside_them_until_they_are_mended(tmp_path, model):
    tiny.save_picture(tmp_path / "0.png", 0)
    records = [record(0), record(1, WAYS[0]), record(2, WAYS[0]), record(3, WAYS[3])]
    (tmp_path / "data.json").write_text(json.dumps(records))
    data = (model, tmp_path / "data.json", "-o", tmp_path / "scores")
    for _ in range(2):  # the second run finds them as the first left them
        said = call("score", *data, "--errors", tmp_path / "mine.jsonl", code=3)
        assert "2 samples: data.json#1 (id '1'): no image at" in said
        assert "likewise data.json#2 (id '2')" in said
        assert "data.json#3 (id '3'): the field video holds video" in said
        for file in (tmp_path / "scores" / "_errors.jsonl", tmp_path / "mine.jsonl"):
            keys = [json.loads(line)["key"] for line in file.read_text().splitlines()]
            assert keys == ["data.json#1", "data.json#2", "data.json#3"]
    pandas = pytest.importorskip("pandas")
    assert len(pandas.read_parquet(tmp_path / "scores")) == 4
    scorer = Scorer(str(model))
    with pytest.warns(UserWarning, match="3 samples could not be scored:\n2 samples: data.json#1"):
        score_dataset(scorer, tmp_path / "data.json", tmp_path / "scores")
    call("select", tmp_path / "scores", "-o", tmp_path / "selection")
    said = call("train", *data[:2], "-o", tmp_path / "out", "--max-steps", "1", code=3)
    assert "2 samples: data.json#1 (id '1'): no image at" in said or "data.json#3" in said


def test_lines_of_errors_are_taken_apart_and_long_ones_cut():
    log = ErrorLog()
    for number in range(5):
        log.add_line(str(SampleError(f"a b.json#{number}", f"it's {number}", "no image at /x/1.png", "Look")))
    log.add("k#1", "i", "x" * 10_000)
    log.add_line("something else")
    lines = list(log.lines())
    assert lines[0] == '5 samples: a b.json#0 (id "it\'s 0"): no image at /x/1.png. Look'
    assert lines[1].endswith('a b.json#2 (id "it\'s 2"), ...')
    assert all(len(line) < 900 for line in lines) and lines[-1] == "something else"
    assert list(log.lines(1))[-1] == "... and 2 samples for 2 more reasons"
    assert log.count == 7 and log.summary()[0]["count"] == 5


def test_terminal_and_page_count_errors_by_the_same_reasons():
    """Brackets, signs, and a list of names of which some records have more were particulars of one of them alone."""
    messages = [
        "no text in the field q (fields: a, b)", "no text in the field q (fields: c)", "width -3, expected 1e-5",
        "width 7, expected 0.5", "no images a.png b.txt", "no images c.png d/e.gif f.txt", "no turns", " no turns ",
    ]  # fmt: skip
    log, facts = ErrorLog(), Facts()
    log.extend((f"d.json#{n}", str(n), message) for n, message in enumerate(messages))
    rows = {"key": [f"d.json#{n}" for n in range(8)], "status": [f"error: {message}" for message in messages]}
    _add_errors(facts, pa.RecordBatch.from_pydict(rows), np.ones(8, bool))
    assert {reason: group.count for reason, group in facts.errors.items()} == {
        reason: group.count for reason, group in log.groups.items()
    }
    assert [group.count for group in log.by_count()] == [2, 2, 2, 2] and facts.n_errors == 8


def test_a_long_message_is_grouped_before_it_is_cut_and_keeps_its_cure():
    log, cure = ErrorLog(), "Say which are which, such as --columns images=img_path,question=q,answer=ans"
    for number in range(2, 30):
        log.add(f"d.csv#{number}", "", f"line {number}: no turns among the fields {'f ' * 200}. {cure}")
    for number in (1, 100):
        log.add(f"e.csv#{number}", "", f"line {number}: {'g ' * 2000}. {cure}")
    assert [group.count for group in log.by_count()] == [28, 2]
    first = [group.lines()[0] for group in log.by_count()]
    assert all(line.endswith(cure) and len(line) < 900 for line in first)

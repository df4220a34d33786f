"""The notebooks of examples/ run from top to bottom, and are stored with the outputs of their own code."""

from __future__ import annotations

import base64
import io
import re
from pathlib import Path

import pytest
from PIL import Image

pytest.importorskip("nbclient", reason="notebooks run with nbclient, nbformat and ipykernel (the test extra)")

import nbformat
from notebook import NOTEBOOKS, run

LARGEST = 150_000  # bytes, so that a difference between two versions can be read


def shape(output: nbformat.NotebookNode) -> tuple:
    """What an output is, without its numbers, which differ in their last digits from machine to machine."""
    data = output.get("data", {})
    text = output.get("text", data.get("text/html", ""))
    lines = [len(re.sub(r"[-+.,\d]+", "0", line).split()) for line in text.splitlines()]
    pictures = [Image.open(io.BytesIO(base64.b64decode(data[kind]))).size for kind in data if "png" in kind]
    return output.output_type, output.get("name"), sorted(data), lines, pictures


@pytest.fixture(scope="module", params=NOTEBOOKS, ids=lambda path: path.stem)
def pair(request, tmp_path_factory):
    """(as stored, as run now)"""
    stored = nbformat.read(request.param, as_version=4)
    return stored, run(request.param, tmp_path_factory.mktemp("notebook"))


def test_there_is_one():
    assert [path.name for path in NOTEBOOKS] == ["miniature.ipynb"]


@pytest.mark.slow
def test_its_outputs_are_those_of_a_run(pair):
    stored, found = pair
    assert [[shape(one) for one in cell.get("outputs", ())] for cell in stored.cells] == [
        [shape(one) for one in cell.get("outputs", ())] for cell in found.cells
    ]
    assert [cell.get("execution_count") for cell in stored.cells] == [
        cell.get("execution_count") for cell in found.cells
    ]


@pytest.mark.slow
def test_what_it_tells_holds(pair):
    printed = "".join(one.get("text", "") for cell in pair[1].cells for one in cell.get("outputs", ()))
    right = dict(
        re.findall(r"^(base|all tokens|VIG, p = 70) +colour right ([\d.]+) %", printed, re.MULTILINE)
    )
    assert len(right) == 3 and float(right["VIG, p = 70"]) > float(right["base"])
    assert ", 0 failed" in printed and "</s>" in printed
    most, least = re.findall(r"^(?:most|least) +(.*)$", printed, re.MULTILINE)
    assert not {"a", "the", "and"} & set(most.split()) and {"a", "the", "and"} <= set(least.split())


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_stored_small_and_without_a_machine_of_its_own(path):
    text = path.read_text()
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    assert len(text) < LARGEST
    assert str(Path.home()) not in text and "/site-packages/" not in text, "a path of the machine that ran it"
    assert set(notebook.metadata["language_info"]) == {"name"}
    assert not [
        one for cell in notebook.cells for one in cell.get("outputs", ()) if one.get("name") == "stderr"
    ]

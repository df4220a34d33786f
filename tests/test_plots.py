"""`vig plot`: every figure as PNG and SVG, the same files for the same scores."""

import sys
import xml.etree.ElementTree as ET

import pytest
from PIL import Image
from test_report_figures import block
from typer.testing import CliRunner

from vig.cli import app
from vig.data.files import StoreError
from vig.reporting.plots import plot
from vig.store.rows import ScoreBlock, ScoreRow
from vig.store.scores import ScoreWriter

NAMES = {"samples", "tokens", "by-source", "by-place-in-the-answer", "by-length-of-the-answer", "words"}


@pytest.fixture
def scores(tmp_path):
    with ScoreWriter(tmp_path / "scores", {"model": "nowhere"}) as writer:
        writer.write(0, block(300, 0))
        writer.mark_complete()
    return tmp_path / "scores"


def test_every_figure_is_drawn(scores, tmp_path):
    files = plot(scores, tmp_path / "figures", sweep=True)
    assert {file.name for file in files} == {
        f"{name}.{kind}" for name in NAMES | {"sweep-of-p"} for kind in ("png", "svg")
    }
    for file in files:
        if file.suffix == ".svg":
            root = ET.fromstring(file.read_text())
            assert root.tag.endswith("svg") and len(list(root.iter())) > 30
        else:
            with Image.open(file) as image:
                assert image.width > 900 and len(image.convert("RGB").getcolors(1 << 20)) > 5
    again = plot(scores, tmp_path / "again", sweep=True)
    assert [file.read_bytes() for file in again] == [file.read_bytes() for file in files]


def test_the_command_draws_and_says_where(scores, tmp_path):
    out = tmp_path / "figures"
    done = CliRunner().invoke(app, ["plot", str(scores), "-o", str(out), "--format", "pdf"])
    assert done.exit_code == 0 and f"6 files: {out}" in done.output
    assert {file.stem for file in out.iterdir()} == NAMES and all(
        f.read_bytes()[:5] == b"%PDF-" for f in out.iterdir()
    )
    assert CliRunner().invoke(app, ["plot", str(scores), "--format", "gif"]).exit_code == 2


def test_what_cannot_be_drawn_is_said(scores, tmp_path, monkeypatch):
    text_only = ScoreBlock.from_rows([ScoreRow("k", "k", "s", "text_only", [5], [0], [0.1])]).table()
    with pytest.raises(StoreError, match="no scored sample has an image"):
        plot(text_only, tmp_path / "x")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r"pip install 'vig-kernels\[plot\]'"):
        plot(scores, tmp_path / "x")

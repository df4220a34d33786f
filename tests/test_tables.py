"""What is listed is listed once: help, errors, docs and tests follow the tables, and so does what a newcomer adds."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import tiny_families
import tiny_formats
from typer.testing import CliRunner

from vig import cli
from vig.data.formats import FORMATS, FORMS, Form, Format, file_suffixes
from vig.data.images import open_images
from vig.data.records import sample_from_record
from vig.data.sample import DataError, answers
from vig.data.samples import count_records, read_samples
from vig.models.end_of_turn import END_OF_TURN
from vig.models.families import FAMILIES, ModelError, family_of
from vig.models.null_image import NULLS, NullSettings
from vig_kernels import backend_table
from vig_kernels.backend_table import BACKENDS

ROOT = Path(__file__).parent.parent


def make_tables():
    spec = importlib.util.spec_from_file_location("make_tables", ROOT / "docs" / "make_tables.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def help_of(*command: str) -> str:
    result = CliRunner().invoke(cli.app, [*command, "--help"], env={"COLUMNS": "400"})
    assert result.exit_code == 0, result.output
    return " ".join(result.output.split())


# --- the tables and what follows from them ---


def test_help_loads_neither_torch_nor_transformers():
    code = (
        "import sys; from vig import cli\n"
        "try: cli.app(['score', '--help'])\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'transformers', 'numpy', 'PIL', 'pyarrow', 'accelerate'} & set(sys.modules)\n"
        "sys.exit(f'loaded: {heavy}' if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "--null" in done.stdout


def test_help_lists_every_row():
    said = help_of("score")
    assert f"Null image: {', '.join(list(NULLS)[:-1])} or {list(NULLS)[-1]}." in said
    assert f"answers: {', '.join(list(END_OF_TURN)[:-1])} or {list(END_OF_TURN)[-1]}." in said
    assert f"Kernels: {backend_table.choices()}." in said and all(name in said for name in BACKENDS)
    assert all(family.name in said for family in FAMILIES.values())
    assert all(suffix in said for suffix in file_suffixes())


def test_errors_list_every_row(tmp_path):
    with pytest.raises(ValueError, match=f"expected one of {', '.join(NULLS)}"):
        NullSettings("fog")
    with pytest.raises(ModelError) as error:
        family_of(type("Config", (), {"model_type": "eye"}))
    assert all(f"{row.model_type} ({row.name})" in str(error.value) for row in FAMILIES.values())
    (tmp_path / "data.docx").write_text("")
    for path in (tmp_path / "data.docx", tmp_path / "nowhere"):
        with pytest.raises(DataError) as error:
            read_samples(path)
        assert all(suffix in str(error.value) for suffix in file_suffixes())


def test_pages_hold_the_tables_that_are_made():
    tables = make_tables()
    for page in dict.fromkeys(page for page, _ in tables.TABLES.values()):
        assert (ROOT / "docs" / page).read_text(encoding="utf-8") == tables.made(page), (
            f"docs/{page} is out of date: run `python docs/make_tables.py`"
        )


def test_each_family_and_each_format_has_its_tiny_twin():
    assert set(tiny_families.FAMILIES) == set(FAMILIES)
    assert set(tiny_formats.WRITERS) == {row.name for row in FORMATS}


@pytest.mark.parametrize("row", FORMATS, ids=lambda row: row.name)
def test_every_format_gives_the_same_samples(tmp_path, row: Format):
    data = tiny_formats.WRITERS[row.name](tmp_path)
    samples = list(read_samples(data))
    assert [answers(sample) for sample in samples] == [[caption] for caption in tiny_formats.CAPTIONS]
    for number, sample in enumerate(samples):
        assert open_images(sample)[0].tobytes() == tiny.picture(number).tobytes()
    assert len({sample.key for sample in samples}) == len(samples)
    assert count_records(data) in (len(samples), None)
    assert list(read_samples(data, wanted=lambda number: number == 1)) == [None, samples[1], None]


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.name)
def test_the_record_shown_for_a_form_is_of_that_form(form: Form):
    sample = sample_from_record(form.example, key="k")
    assert len(sample.images) == 1 and all(text.startswith(("A cat", "A chair")) for text in answers(sample))
    assert form.fields[0] in form.example and sample.messages[0]["content"][0] == {"type": "image"}


# --- a newcomer adds one of each, by the steps of CONTRIBUTING.md ---

GREY = '''

def grey(pictures: Tensor, settings: NullSettings, pixel_range: PixelRange, seeds: Sequence[int]) -> Tensor:
    """Half way between black and white."""
    middle = [(low + high) / 2 for low, high in zip(pixel_range.black, pixel_range.white, strict=True)]
    return pictures.new_tensor(middle)[:, None, None].expand_as(pictures).contiguous()
'''
GREY_ROW = """    "grey": Null("pixels", "grey", "grey", "a control", "vig.models.null_pixels:grey"),
"""
FLAT = '''"""Flat files: one tab-separated `id, image, caption` a line."""

from vig.data.rows import SKIPPED


def flat_rows(path, wanted):
    for number, line in enumerate(path.read_text().splitlines()):
        names = ("id", "image", "caption")
        yield dict(zip(names, line.split("\\t"), strict=True)) if wanted(number) else SKIPPED


def count_flat(path):
    return len(path.read_text().splitlines())
'''
FLAT_ROW = """    Format("flat", (".flat",), "vig.data.flat:flat_rows", "vig.data.flat:count_flat", "a line a record"),
"""
FLAT_WRITER = """

def flat(folder: Path) -> Path:
    pictures_beside(folder)
    lines = ["\\t".join((row["id"], row["image"], row["caption"])) for row in records(False)]
    (folder / "data.flat").write_text("\\n".join(lines))
    return folder / "data.flat"


WRITERS["flat"] = flat
"""
VIP_ROW = """        Family("ViP-LLaVA", "vipllava", "vig.models.pixels:PLAIN", ONE_PICTURE),
"""
VIP_TINY = '\n\nFAMILIES["vipllava"] = FAMILIES["llava"]\n'
PLAIN_OPS = {
    "linear_nll": "forward, backward",
    "linear_vig": "with_stats",
    "linear_cross_entropy": "forward_backward",
}  # op -> what the backend `plain` takes of `torch`: no more than the contract says
PLAIN_PACKAGE = '''"""Plain."""


def why_not(device):
    return None
'''
PLAIN_ROW = """        Backend("plain", "any device: an example", "vig_kernels.kernels.plain"),
"""


def insert(file: Path, before: str, text: str) -> None:
    """Puts `text` in front of the last `before`, as an editor would."""
    content = file.read_text()
    place = content.rindex(before)
    file.write_text(content[:place] + text + content[place:])


def append(file: Path, text: str) -> None:
    file.write_text(file.read_text() + text)


@pytest.fixture(scope="module")
def extended(tmp_path_factory) -> Path:
    """A copy of the project to which a null image, a format, a family and a backend were added."""
    copy = tmp_path_factory.mktemp("copy")
    for name in ("vig", "vig_kernels", "docs", "tests"):
        shutil.copytree(
            ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__", "plots", "checkpoint")
        )
    shutil.copy(ROOT / "README.md", copy)
    append(copy / "vig/models/null_pixels.py", GREY)
    insert(copy / "vig/models/null_image.py", '    "drop": Null(', GREY_ROW)
    (copy / "vig/data/flat.py").write_text(FLAT)
    insert(copy / "vig/data/formats.py", '    Format(\n        "photographs"', FLAT_ROW)
    append(copy / "tests/tiny_formats.py", FLAT_WRITER)
    insert(copy / "vig/models/families.py", '        Family("Gemma 3"', VIP_ROW)
    append(copy / "tests/tiny_families.py", VIP_TINY)
    (copy / "vig_kernels/kernels/plain").mkdir()
    (copy / "vig_kernels/kernels/plain/__init__.py").write_text(PLAIN_PACKAGE)
    for op, functions in PLAIN_OPS.items():
        text = f"from vig_kernels.kernels.torch.{op} import {functions}  # noqa: F401\n"
        (copy / f"vig_kernels/kernels/plain/{op}.py").write_text(text)
    insert(copy / "vig_kernels/backend_table.py", '        Backend("reference"', PLAIN_ROW)
    return copy


def run_in(copy: Path, *words: str) -> subprocess.CompletedProcess:
    environment = os.environ | {"PYTHONPATH": str(copy), "COLUMNS": "400"}
    return subprocess.run(
        [sys.executable, *words], cwd=copy, env=environment, capture_output=True, text=True, check=False
    )


def test_what_is_added_is_in_the_help_and_the_docs(extended):
    said = " ".join(run_in(extended, "-m", "vig", "score", "--help").stdout.split())
    for words in ("grey", ".flat", "ViP-LLaVA", "plain"):
        assert words in said
    done = run_in(extended, "docs/make_tables.py")
    assert done.returncode == 0, done.stderr
    assert "| `grey` | pixels | grey | a control |" in (extended / "docs/null-images.md").read_text()
    assert "| ViP-LLaVA | `vipllava` |" in (extended / "docs/families.md").read_text()
    assert "ViP-LLaVA" in (extended / "README.md").read_text()


SHOW = """
import json
from pathlib import Path
import torch
from vig.data.locate import locate
from vig.models.families import family_of
from vig.models.null_image import NullSettings
from vig.reporting.report import null_caption
from vig_kernels import dispatch, linear_cross_entropy, linear_nll, linear_vig, reference

def error(function, *arguments):
    try:
        function(*arguments)
    except ValueError as problem:
        return str(problem)

hidden, weight, target = torch.randn(2, 8), torch.randn(5, 8), torch.tensor([1, 2])
found, more = linear_vig(hidden, hidden + 1, weight, target, stats=("kl", "argmax_null"), backend="plain")
leaf = hidden.clone().requires_grad_()
loss, counted = linear_cross_entropy(leaf, weight, target, stats=("nll",), reduction="sum", backend="plain")
loss.backward()
print(json.dumps({
    "null": error(NullSettings, "fog"),
    "family": error(family_of, type("Config", (), {"model_type": "eye"})),
    "format": error(locate, Path("nowhere")),
    "backend": error(lambda: linear_nll(hidden, weight, torch.tensor([1, 2]), backend="best")),
    "caption": null_caption({"null": {"kind": "grey"}}),
    "available": dispatch.why_not("linear_nll", "plain", torch.device("cpu")),
    "values": linear_nll(hidden, weight, target, backend="plain").tolist(),
    "vig": [found.nll_image.tolist(), found.nll_null.tolist(), sorted(more)],
    "loss": [loss.item(), counted["nll"].tolist(), bool(leaf.grad.any())],
    "exact": [reference.linear_nll(x, weight, target).tolist() for x in (hidden, hidden + 1)],
}))
"""


def test_what_is_added_is_in_errors_and_the_report(extended):
    done = run_in(extended, "-c", SHOW)
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    assert "grey, drop" in said["null"] and said["caption"] == "grey"
    assert "vipllava (ViP-LLaVA)" in said["family"] and ".flat" in said["format"]
    assert "'plain', 'reference'" in said["backend"]
    image, null = (pytest.approx(values, abs=1e-5) for values in said["exact"])
    assert said["available"] is None and said["values"] == image
    nll_image, nll_null, names = said["vig"]
    assert nll_image == said["values"] and nll_null == null and names == ["argmax_null", "kl"]
    loss, nll, has_gradient = said["loss"]
    assert loss == pytest.approx(sum(said["exact"][0]), abs=1e-4) and nll == image and has_gradient


def test_what_is_added_is_among_the_parameters_of_the_tests_and_passes(extended):
    files = ("test_cli.py", "test_pixels.py", "test_linear_nll.py", "test_tables.py")
    listed = run_in(extended, "-m", "pytest", "-p", "no:cacheprovider", "--collect-only", "-q",
                    *(f"tests/{file}" for file in files)).stdout  # fmt: skip
    for test in (
        "test_inspect_shows_the_scores_of_every_null[grey]",
        "test_pictures_put_back_give_the_same_bits_and_leave_padding_alone[vipllava]",
        "test_every_format_gives_the_same_samples[flat]",
    ):
        assert test in listed, test
    assert any("plain" in line for line in listed.splitlines() if "test_linear_nll.py" in line)
    done = run_in(extended, "-m", "pytest", "-p", "no:cacheprovider", "-q", "tests/test_tables.py",
                  "-k", "gives_the_same_samples and flat or twin")  # fmt: skip
    assert "2 passed" in done.stdout, done.stdout

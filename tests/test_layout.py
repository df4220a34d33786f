"""How the code lies: few files at the top, no module in the place of a function, short files, few parameters."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import vig
import vig_kernels

ROOT = Path(__file__).parents[1]
MOST_PARAMETERS, MOST_LINES = 8, 400
SOURCES = sorted(
    path for name in ("vig", "vig_kernels", "benchmarks") for path in (ROOT / name).rglob("*.py")
)


def functions(path: Path) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node


def count(node: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Its parameters, without self and cls; of a public function or class only those that may be given by position."""
    given = [one.arg for one in (*node.args.posonlyargs, *node.args.args) if one.arg not in ("self", "cls")]
    public = node.name in PUBLIC or node.name == "__init__"
    return len(given) + (0 if public else len(node.args.kwonlyargs))


def is_excepted(node: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    """Triton kernels, commands of typer, and ops whose parameters are those of their schema."""
    decorators = [ast.unparse(one) for one in node.decorator_list]
    return any(one.startswith(("triton.jit", "gluon.jit", "app.", "torch.library.")) or one.endswith("register_fake")
               for one in decorators)  # fmt: skip


PUBLIC = {*vig.__all__, *vig_kernels.__all__, "score_dataset_on_ray", "selective_loss"}


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_function_takes_more_than_eight_parameters(path):
    many = {node.name: count(node) for node in functions(path) if not is_excepted(node)}
    assert {name: found for name, found in many.items() if found > MOST_PARAMETERS} == {}


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_files_are_short(path):
    assert len(path.read_text().splitlines()) <= MOST_LINES


def test_the_top_of_the_packages():
    assert len(list((ROOT / "vig").glob("*.py"))) <= 6
    for package, names in (("vig", vig.__all__), ("vig_kernels", vig_kernels.__all__)):
        modules = {path.stem for path in (ROOT / package).iterdir()}
        assert not modules & set(names), "an imported submodule would take the place of the function"

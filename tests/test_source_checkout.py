"""A source checkout that nobody installed: no package metadata, no compiled part."""

import os
import shutil
import subprocess
import tomllib
import venv
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
PACKAGES = Path(torch.__file__).parents[1]
SOURCES = ("vig_kernels", "vig", "pyproject.toml", "tests/test_dispatch.py", "tests/conftest.py")


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """(Python, folder): a copy of the sources, and a Python that has every package but this one."""
    folder = tmp_path_factory.mktemp("source")
    packages = folder / "packages"
    packages.mkdir()
    for entry in PACKAGES.iterdir():
        if "vig_kernels" not in entry.name:
            (packages / entry.name).symlink_to(entry)
    venv.create(folder / "python", symlinks=True)
    site = next((folder / "python" / "lib").glob("python*/site-packages"))
    (site / "packages.pth").write_text(f"{packages}\n")
    copy = folder / "checkout"
    for name in SOURCES:
        source, to = ROOT / name, copy / name
        to.parent.mkdir(parents=True, exist_ok=True)
        if source.is_dir():
            leave = shutil.ignore_patterns("*.so", "*.pyd", "__pycache__", "_build.json", "checkpoint")
            shutil.copytree(source, to, ignore=leave)
        else:
            shutil.copy(source, to)
    return folder / "python" / "bin" / "python", copy


def run(checkout, *arguments: str) -> str:
    python, folder = checkout
    hidden = ("PYTHONPATH", "PYTHONHOME", "VIG_BACKEND", "VIG_FORCE_ISA")
    environment = {name: value for name, value in os.environ.items() if name not in hidden}
    done = subprocess.run(
        [python, *arguments], cwd=folder, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_versions_without_metadata(checkout):
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    code = "import vig, vig_kernels; print(vig_kernels.__file__, vig.__version__, vig_kernels.__version__)"
    where, *versions = run(checkout, "-c", code).split()
    assert Path(where).is_relative_to(checkout[1]), "the copy was not what ran"
    assert versions == [f"{version}+source"] * 2
    assert run(checkout, "-m", "vig_kernels", "--version").strip() == f"vig-kernels {version}+source"


def test_the_table_and_the_dispatch_tests(checkout):
    table = run(checkout, "-m", "vig_kernels")
    assert "compiled part: missing" in table
    assert 'linear_nll            torch      cpu     available, taken by "auto"' in table
    chosen = "public_names or lists_every_op or shows_itself or environment"
    passed = run(checkout, "-m", "pytest", "-p", "no:cacheprovider", "tests/test_dispatch.py", "-k", chosen)
    assert " passed" in passed and "failed" not in passed


def test_a_package_folder_alone(checkout):
    """Copied without its pyproject.toml there is no number to give, and still no error."""
    project = checkout[1] / "pyproject.toml"
    text = project.read_text()
    project.unlink()
    try:
        assert run(checkout, "-c", "import vig_kernels; print(vig_kernels.__version__)").strip() == "0+source"
    finally:
        project.write_text(text)

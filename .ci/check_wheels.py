"""`make wheels-check`: each wheel of dist/ in a new environment, away from the checkout and without a compiler.

Installs it with the versions of constraints.txt, from wheels alone; then `check_installed.py` and `vig demo` to its
end. Nothing but the environment's own programs is on PATH. Takes two minutes a wheel, and 2 GB of disk while it runs.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from wheels import DIST, ROOT, find_python

LEAST_AUROC = 0.9  # of words that need the picture against words that do not


def install(wheel: Path, python: Path, folder: Path) -> tuple[Path, dict[str, str]]:
    """The programs of a new environment with the wheel in it, and the variables to run them with."""
    subprocess.run([python, "-m", "venv", folder / "venv"], check=True)
    inside = folder / "venv" / "bin"
    quiet = ("--quiet", "--disable-pip-version-check", "--no-compile", "--only-binary", ":all:")
    subprocess.run(
        [inside / "python", "-m", "pip", "install", *quiet, "-c", ROOT / "constraints.txt", wheel], check=True
    )
    hidden = ("PYTHONPATH", "PYTHONHOME", "VIG_BACKEND", "VIG_FORCE_ISA", "CC", "CXX")
    environment = {name: value for name, value in os.environ.items() if name not in hidden}
    environment |= {"PATH": str(inside), "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    return inside, environment


def run_demo(run: Callable[..., Any], folder: Path) -> str:
    """`vig demo` to its end; returns a line about its figures."""
    run("vig", "demo", "-o", "demo")
    figures = json.loads((folder / "demo" / "figures.json").read_text())
    auroc = figures["scores"]["auroc"]
    assert auroc > LEAST_AUROC, f"AUROC {auroc}"
    assert figures["triples"]["holds"], figures["triples"]
    assert_report(folder / "demo" / "report.html")
    claims = [arm for arm, claimed in figures["claims"].items() if claimed]
    return f"demo in {figures['seconds']:.0f} s, AUROC {auroc:.3f}, {', '.join(claims)} beat the base"


def run_steps(run: Callable[..., Any], folder: Path) -> str:
    """The steps of the demo on a few samples, with one short training."""
    checkpoint = run("python", "-c", "from vig.demo.arms import CHECKPOINT; print(CHECKPOINT)").strip()
    draw = "from pathlib import Path; from vig.demo import dataset as d; "
    run("python", "-c", f"{draw}d.write_records(Path(), 'tune', d.tuning_records(100, seed=0))")
    run("vig", "score", checkpoint, "tune.json", "-o", "scores")
    run("vig", "select", "scores", "-o", "selection")
    run(
        "vig", "train", checkpoint, "tune.json", "--selection", "selection", "-o", "tuned", "--max-steps", "5"
    )
    run("vig", "report", "scores", "--selection", "selection", "-o", "report.html")
    assert_report(folder / "report.html")
    return f"trained {json.loads((folder / 'tuned' / 'train.json').read_text())['tokens']} tokens"


def assert_report(page: Path) -> None:
    assert page.stat().st_size > 100_000, f"{page} has {page.stat().st_size} bytes"


def check(wheel: Path, python: Path, folder: Path, quick: bool) -> str:
    """Install, look, run; returns a line about it. Raises where a step fails."""
    inside, environment = install(wheel, python, folder)

    def run(program: str, *words: str | Path) -> str | None:
        command = [inside / program, *words]
        options = {"cwd": folder, "env": environment, "check": True, "stdin": subprocess.DEVNULL}
        shown = None if program == "vig" else subprocess.PIPE
        return subprocess.run(command, stdout=shown, text=True, **options).stdout

    print(run("python", "-P", ROOT / ".ci" / "check_installed.py"))  # -P: its own folder holds no modules
    return (run_steps if quick else run_demo)(run, folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("wheels", nargs="*", type=Path, help="all of dist/ unless given")
    parser.add_argument(
        "--quick", action="store_true", help="the demo's steps on a few samples, not the demo"
    )
    args = parser.parse_args()
    wheels = args.wheels or sorted(DIST.glob("vig_kernels-*.whl"))
    if not wheels:
        sys.exit(f"no wheel in {DIST}: run `make wheels` first")
    lines = []
    for wheel in wheels:
        version = re.search(r"-cp3(\d+)-", wheel.name)
        python = find_python(f"3.{version[1]}") if version else None
        if python is None:
            sys.exit(f"{wheel.name}: no Python here runs it")
        started = time.monotonic()
        with tempfile.TemporaryDirectory(prefix="vig-wheel-") as folder:
            line = check(wheel.resolve(), python, Path(folder), args.quick)
        lines.append(f"{wheel.name}: {line}; {time.monotonic() - started:.0f} s in all")
    print("\n".join(lines))


if __name__ == "__main__":
    main()

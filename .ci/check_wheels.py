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
from pathlib import Path

from wheels import DIST, ROOT, find_python

LEAST_AUROC = 0.9  # of words that need the picture against words that do not


def check(wheel: Path, python: Path, folder: Path) -> str:
    """Install, look, run the demo; returns a line about it. Raises where a step fails."""
    subprocess.run([python, "-m", "venv", folder / "venv"], check=True)
    inside = folder / "venv" / "bin"
    quiet = ("--quiet", "--disable-pip-version-check", "--only-binary", ":all:")
    subprocess.run(
        [inside / "python", "-m", "pip", "install", *quiet, "-c", ROOT / "constraints.txt", wheel], check=True
    )
    hidden = ("PYTHONPATH", "PYTHONHOME", "VIG_BACKEND", "VIG_FORCE_ISA", "CC", "CXX")
    environment = {name: value for name, value in os.environ.items() if name not in hidden}
    environment |= {"PATH": str(inside), "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    # -P: the script's own folder is not searched for modules.
    for command in (
        [inside / "python", "-P", ROOT / ".ci" / "check_installed.py"],
        [inside / "vig", "demo", "-o", "demo"],
    ):
        subprocess.run(command, cwd=folder, env=environment, check=True, stdin=subprocess.DEVNULL)
    figures = json.loads((folder / "demo" / "figures.json").read_text())
    auroc = figures["scores"]["auroc"]
    assert auroc > LEAST_AUROC, f"AUROC {auroc}"
    assert figures["triples"]["holds"], figures["triples"]
    report = folder / "demo" / "report.html"
    assert report.stat().st_size > 100_000, f"{report} has {report.stat().st_size} bytes"
    claims = [arm for arm, claimed in figures["claims"].items() if claimed]
    return f"demo in {figures['seconds']:.0f} s, AUROC {auroc:.3f}, {', '.join(claims)} beat the base"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("wheels", nargs="*", type=Path, help="all of dist/ unless given")
    wheels = parser.parse_args().wheels or sorted(DIST.glob("vig_kernels-*.whl"))
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
            line = check(wheel.resolve(), python, Path(folder))
        lines.append(f"{wheel.name}: {line}; {time.monotonic() - started:.0f} s in all")
    print("\n".join(lines))


if __name__ == "__main__":
    main()

"""Fails where an installed vig-kernels is not whole. Run it by the Python of the environment, away from a checkout."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path

PROJECT = Path(__file__).resolve().parents[1] / "pyproject.toml"


def main() -> None:
    import torch

    import vig
    import vig_kernels
    from vig.demo.arms import CHECKPOINT

    version = tomllib.loads(PROJECT.read_text())["project"]["version"]
    assert vig.__version__ == vig_kernels.__version__ == version, (vig.__version__, version)
    for package in (vig, vig_kernels):
        assert Path(package.__file__).is_relative_to(sys.prefix), (
            f"{package.__file__} lies outside {sys.prefix}"
        )
    assert metadata.metadata("vig-kernels")["Requires-Python"]
    assert (CHECKPOINT / "model.safetensors").is_file(), f"{CHECKPOINT} has no weights"

    shown = subprocess.run(
        [sys.executable, "-m", "vig_kernels"], capture_output=True, text=True, check=True
    ).stdout
    print(shown)
    assert "compiled part: present" in shown, "the compiled part is missing"

    hidden, weight = torch.randn(5, 64), torch.randn(100, 64)
    target = torch.arange(5)
    found = vig_kernels.linear_nll(hidden, weight, target, backend="cpu")
    expected = vig_kernels.linear_nll(hidden, weight, target, backend="reference")
    torch.testing.assert_close(found, expected.float(), atol=1e-4, rtol=1e-5)
    try:  # an exception has to cross from C++ to Python, whichever C++ library is inside
        vig_kernels.linear_nll(hidden, weight, target + 1000, backend="cpu")
    except ValueError as error:
        assert "1000" in str(error), error
    else:
        raise AssertionError("a target outside of the vocabulary raised nothing")


if __name__ == "__main__":
    main()

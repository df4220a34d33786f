"""Fused ops for Visual Information Gain: per-token values of an LM head without (N, V) logits, and Gaussian blur.

Four ops, each on several backends (`python -m vig_kernels` shows which can run here):

    linear_nll            per-token negative log-likelihood, with gradients for any upstream
    linear_vig            the same for an image pass and a null pass, in one sweep of the weight
    linear_cross_entropy  masked, weighted loss
    gaussian_blur         separable blur, for null images

Names are loaded when they are first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vig_kernels.dispatch import BackendUnavailable, backends
    from vig_kernels.ops.gaussian_blur import gaussian_blur
    from vig_kernels.ops.linear_cross_entropy import linear_cross_entropy
    from vig_kernels.ops.linear_nll import linear_nll
    from vig_kernels.ops.linear_vig import TokenVIG, linear_vig

_HOMES = {
    "BackendUnavailable": "vig_kernels.dispatch",
    "TokenVIG": "vig_kernels.ops.linear_vig",
    "backends": "vig_kernels.dispatch",
    "gaussian_blur": "vig_kernels.ops.gaussian_blur",
    "linear_cross_entropy": "vig_kernels.ops.linear_cross_entropy",
    "linear_nll": "vig_kernels.ops.linear_nll",
    "linear_vig": "vig_kernels.ops.linear_vig",
}

__all__ = [
    "BackendUnavailable",
    "TokenVIG",
    "backends",
    "gaussian_blur",
    "linear_cross_entropy",
    "linear_nll",
    "linear_vig",
]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return _version()
    if name not in _HOMES:
        raise AttributeError(f"module 'vig_kernels' has no attribute {name!r}")
    value = getattr(import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def _version() -> str:
    """Of the installed package. A source checkout that nobody installed says so: "0.1.0+source"."""
    from importlib import metadata

    try:
        return metadata.version("vig-kernels")
    except metadata.PackageNotFoundError:
        return _source_version()


def _source_version() -> str:
    """From the checkout's pyproject.toml; without one (a copied folder) there is no number to give."""
    import tomllib
    from pathlib import Path

    project = Path(__file__).resolve().parent.parent / "pyproject.toml"
    if not project.is_file():
        return "0+source"
    return tomllib.loads(project.read_text(encoding="utf-8"))["project"]["version"] + "+source"
